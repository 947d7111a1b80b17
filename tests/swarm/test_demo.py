"""The whole demo with its tiny preset, as real processes over libp2p: what it writes, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.forked import TEMPLATE
from tests.cli.command_runner import lutetia  # pyright: ignore[reportMissingImports]
from tests.swarm.leak_check import family, litter
from tests.swarm.processes import command, until

CHILD = {"OMP_NUM_THREADS": "1", TEMPLATE: ""}  # its swarm starts a template of its own


@dataclass(frozen=True)
class Demo:
    out: Path
    printed: str
    litter: set[str]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One demo with its run kept, for all tests below."""
    folder, before = tmp_path_factory.mktemp("demo"), litter()
    run = lutetia("demo", "--preset", "tiny", "--out", "demo", "--keep-run", cwd=folder, timeout=480)
    assert run.returncode == 0, run.stderr + run.stdout
    return Demo(folder / "demo", run.stdout, litter() - before)


@pytest.mark.timeout(900)
def test_demo_writes_every_file(demo: Demo) -> None:
    names = {path.name for path in demo.out.iterdir()}
    assert names >= {
        "mixture",
        "samples.gif",
        "samples.mp4",
        "status.json",
        "report.md",
        "held-out-loss.png",
        "router-accuracy.png",
        "run",
    }
    assert [path.name for path in demo.out.parent.iterdir()] == ["demo"]
    with Image.open(demo.out / "samples.gif") as gif, av.open(str(demo.out / "samples.mp4")) as mp4:
        assert gif.n_frames == 8  # pyright: ignore[reportAttributeAccessIssue]
        assert mp4.streams.video[0].width == gif.width
    status = SwarmStatus.model_validate_json((demo.out / "status.json").read_bytes())
    assert status.done
    assert status.router is not None
    assert len(status.router.accuracy_by_time) == 10


def test_killed_nodes_shard_is_taken_over(demo: Demo) -> None:
    report = (demo.out / "report.md").read_text()
    assert "was killed (SIGKILL)" in report
    times = [float(number) for number in re.findall(r"^\| (\d+\.\d) \|", report, re.M)]
    assert len(times) == 5, report  # killed, lease expired, claimed, training, accepted
    assert times == sorted(times)
    killed = re.search(r"(worker-\d) was killed", report)
    successor = re.search(r"(worker-\d) continues expert", report)
    assert killed
    assert successor
    assert killed[1] != successor[1]
    assert f"{killed[1]}, then {successor[1]}" in report  # in the table of experts


def test_mixture_loads_in_a_new_process(demo: Demo, tmp_path: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1)\nfrom diffusers import WanTransformer3DModel\n"
        "from lutetia.models.pipeline import LutetiaPipeline\npipe = LutetiaPipeline.from_pretrained(sys.argv[1])\n"
        "frames = pipe(['a purple star spins'], seed=0).frames\n"
        "WanTransformer3DModel.from_pretrained(sys.argv[1] + '/expert_000')\nprint(frames.shape, frames.dtype)"
    )
    arguments = [sys.executable, "-c", code, str(demo.out / "mixture")]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **CHILD})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "(1, 8, 16, 16, 3) float32"


def test_generate_names_the_experts_used(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    run = lutetia("generate", "a purple star spins", "--mixture", demo.out / "mixture", "--out", out, "--json")
    document = json.loads(run.stdout)
    assert document["files"] == [str(out)]
    assert len(document["experts"][0]) == 2  # steps
    with av.open(str(out)) as container:
        assert len(list(container.decode(video=0))) == 8


def test_ledger_replays_to_the_reported_status(demo: Demo) -> None:
    replayed = json.loads(lutetia("coordinator", "replay", demo.out / "run" / "run", "--json").stdout)
    status = json.loads((demo.out / "status.json").read_text())
    assert replayed["status"]["mixture"] == status["mixture"]
    assert [shard["epoch"] for shard in replayed["status"]["shards"]] == [shard["epoch"] for shard in status["shards"]]
    assert replayed["events"][0]["kind"] == "run-created"
    assert replayed["events"][-1]["kind"] in ("run-finished", "coordinator-stopped")


def test_restarted_coordinator_serves_the_mixture(demo: Demo, tmp_path: Path) -> None:
    run, log = demo.out / "run" / "run", tmp_path / "coordinator.log"
    with command(log, "coordinator", "serve", run, "--no-gallery"):
        until(lambda: lutetia("swarm", "status", run / "ticket.txt").returncode == 0)
        fetched = lutetia("swarm", "fetch", run / "ticket.txt", "--out", tmp_path / "mixture", "--json")
        assert fetched.returncode == 0, fetched.stderr
        status = json.loads(lutetia("swarm", "status", run / "ticket.txt", "--json").stdout)
    assert json.loads(fetched.stdout)["mixture"] == status["mixture"]
    assert contents(tmp_path / "mixture") == contents(demo.out / "mixture")


def test_demo_leaves_no_process_or_file(demo: Demo) -> None:
    assert not demo.litter
    assert not family((str(demo.out.parent),))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "sigkill"])
def test_stopped_demo_ends_its_processes(end: signal.Signals, tmp_path: Path) -> None:
    before = litter()
    command = [sys.executable, "-m", "lutetia.cli", "demo", "--preset", "tiny", "--out", tmp_path / "demo"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, 
        env={**os.environ, **CHILD, "LUTETIA_PARENT": str(os.getpid())},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores Ctrl-C for us
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if "worker-3 joins" in line:
            break
    family_before = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(end)
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(family_before, timeout=120)
    assert not alive
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert len(family_before) >= 4
    assert not litter() - before
    if end == signal.SIGINT:
        assert not list(tmp_path.iterdir())
