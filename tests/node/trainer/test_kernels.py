"""Measuring kernels in processes of their own: what is found, what a crash costs, and that the time ends it."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lutetia.models.training.kernels.choice import LOSSES_APART, PLAIN_KERNELS, Kernels
from lutetia.node.trainer.kernels import measuring
from lutetia.node.trainer.kernels.measuring import KernelOrder, kernels_for, measure, shapes_of
from lutetia.node.trainer.probe import ProbeQuestion, probe, question_digest
from lutetia.system import tether
from lutetia.system.files import sweep_parts
from tests.child_environment import child_environment
from tests.node.tiny_run import make_run

WAYS = (PLAIN_KERNELS, Kernels(attention="math"), Kernels(attention="cudnn"))


def test_steps_are_measured_from_one_start_and_an_absent_kernel_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    order = KernelOrder(manifest=run.manifest_file, shard=0, device="cpu", micro_batch=4, threads=1)
    plain, exact, absent = measure(order, WAYS, time.monotonic() + 300)
    assert (plain.problem, exact.problem) == ("", "")
    assert "kernel" in absent.problem
    assert plain.step_seconds > 0
    assert len(set(plain.losses)) == len(plain.losses) == 4
    assert all(math.isclose(a, b, rel_tol=LOSSES_APART["float32"]) for a, b in zip(plain.losses, exact.losses, strict=True))


def test_process_that_crashes_costs_one_way_and_late_ones_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    order = KernelOrder(manifest=run.manifest_file, shard=0, device="cpu", micro_batch=4, threads=1)
    late = measure(order, WAYS[:2], time.monotonic() + 0.05)  # Python's start takes longer
    assert [trial.problem for trial in late] == ["not measured in time"] * 2
    monkeypatch.setattr(measuring, "_MODULE", "lutetia.no_such_module")
    crashed = measure(order, WAYS[:2], time.monotonic() + 60)
    assert [trial.problem for trial in crashed] == ["its process ended with exit code 1"] * 2


def test_killed_probe_leaves_only_what_the_next_start_removes(tmp_path: Path) -> None:
    run, elsewhere = make_run(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    order = KernelOrder(manifest=run.manifest_file, shard=0, device="cpu", micro_batch=4, threads=1)
    code = (
        "import sys; from lutetia.node.trainer.kernels.measuring import *; "
        "measure(KernelOrder.model_validate_json(sys.argv[1]), (PLAIN_KERNELS,), time.monotonic() + 300)"
    )
    command = [*tether.command(sys.executable), "-c", code, order.model_dump_json()]
    measuring_process = subprocess.Popen(command, env=child_environment(TMPDIR=str(elsewhere)))
    family = psutil.Process(measuring_process.pid)
    deadline = time.monotonic() + 120
    while not family.children():  # it was started with the folder of its compiler
        assert measuring_process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)  # nothing tells of a child of another process
    children = family.children()
    measuring_process.kill()
    measuring_process.wait()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert list(run.folder.glob(".kernels.*.part"))
    assert not list(elsewhere.iterdir())
    sweep_parts(run.folder)  # as a node does when it starts
    assert not list(run.folder.glob(".*"))


@pytest.mark.parametrize(
    ("choice", "device", "words"),
    [("plain", "cuda:0", "as set"), ("auto", "cpu", "give the same bits"), ("measured", "cpu:0+cpu:1", "are not measured for")],
)
def test_plain_way_is_taken_with_the_reason(tmp_path: Path, choice: measuring.KernelChoice, device: str, words: str) -> None:
    run = make_run(tmp_path)
    order = KernelOrder(manifest=run.manifest_file, shard=0, device=device, micro_batch=4)
    found = kernels_for(choice, order, run.manifest, math.inf)
    assert found.kernels == PLAIN_KERNELS
    assert words in found.reason


def test_probe_says_which_kernels_it_took_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lutetia.node.trainer.probe.KERNEL_SHARE", 0.0)  # no time is left for any
    run = make_run(tmp_path, experts=1)
    plain = ProbeQuestion(manifest=run.manifest_file, device="cpu", threads=1, free_disk=10**9)
    measured = plain.model_copy(update={"kernels": "measured"})
    assert "kernels: plain, so that replays" in probe(plain).shards[0].reason
    assert "could not be measured: not measured in time" in probe(measured).shards[0].reason
    assert question_digest(plain) != question_digest(measured)


def test_each_bucket_and_the_last_rows_of_a_batch_are_shapes(tmp_path: Path) -> None:
    manifest = make_run(tmp_path).manifest
    assert [shapes_of(manifest, rows) for rows in (4, 3, 2)] == [1, 2, 1]
