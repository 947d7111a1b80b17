"""`python -m benchmarks lean-coordinator`: memory of a coordinator that computes nothing, over a whole run with real nodes.

Nodes train two shards, check and replay each other's results, train and measure the router, and evaluate the mixtures, all on
this machine. Its made-up clips have no text encoder, so no gallery is sampled; a test of a whole run samples one.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.fuzz.examples import WAN
from benchmarks.report import Machine
from benchmarks.toy_data import write_toy_data
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.ledger.events import MixtureStitched
from lutetia.coordinator.settings import RunSettings
from lutetia.models.mixing.description import verify_mixture
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Timing
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

SHARDS, CHECKERS, EPOCHS, STEPS, BATCH = 2, 2, 2, 8, 4
HEARTBEAT = 15.0
"""Seconds. A lease is three: on a busy machine nodes with the two seconds of small runs lose their shards again and again."""
HELD_OUT = 16
LIMIT_MIB = 300
_LONGEST = 1800.0


def make_run(root: Path) -> CreatedRun:
    write_toy_data(root / "data", SHARDS, HELD_OUT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = RunSettings(
        preset="tiny", name="lean", addresses=(f"127.0.0.1:{port}",), expert=ExpertSpec(config=WAN),
        optimisation=Optimisation(batch=BATCH, learning_rate=2e-3, ema_decay=0.9),
        samples_per_shard=EPOCHS * STEPS * BATCH, checkpoint_samples=STEPS * BATCH,
        timing=Timing(heartbeat=HEARTBEAT),
    )  # fmt: skip
    return create_run(root / "data", root / "run", settings)


def write_settings(root: Path) -> Path:
    """The coordinator's settings, which name all nodes as checkers; their keys are made."""
    keys = []
    for folder in node_folders(root):
        folder.mkdir()
        identity = Identity.generate()
        identity.save(folder / "identity.key")
        keys.append(identity.public_key)
    named = ", ".join(f'"{key}"' for key in keys)
    path = root / "serve.toml"
    lines = ("[serve]", "lend_checks = true", 'stitch = "refresh"', "refresh_seconds = 1.0", "exit_when_done = true")
    path.write_text("\n".join([*lines, "gallery = false", f"checkers = [{named}]", ""]))
    return path


def node_folders(root: Path) -> list[Path]:
    return [root / f"node {number}" for number in range(SHARDS + CHECKERS)]


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "lutetia.cli", *arguments], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(300)


def measure(run: CreatedRun, root: Path) -> tuple[float, set[str], float]:
    """(MiB of the coordinator's process at most, what processes it had, seconds of the run)."""
    began, peak, kinds = time.monotonic(), 0.0, set[str]()
    with ExitStack() as stack:
        options = ("--config", str(write_settings(root)))
        coordinator = stack.enter_context(command("coordinator", "serve", str(run.folder), *options))
        while not (run.folder / "status.json").exists() and coordinator.poll() is None:
            time.sleep(0.2)  # the file is made by another process, and nothing else tells of it
        if coordinator.poll() is not None:
            raise SystemExit(f"the coordinator ended with exit code {coordinator.poll()} before it served; see its log above")
        for folder in node_folders(root):
            options = ("--state-folder", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0", "--device", "cpu", "--threads", "1")
            stack.enter_context(command("join", run.ticket, *options))
        process = psutil.Process(coordinator.pid)
        while coordinator.poll() is None and time.monotonic() - began < _LONGEST:
            for member in (process, *process.children(recursive=True)):
                try:
                    line, used = " ".join(member.cmdline()), member.memory_info().rss / 2**20
                except psutil.Error:
                    continue
                kind = "worker process" if "coordinator.worker" in line else "p2pd" if "p2pd" in line else "coordinator"
                kinds.add(kind)
                peak = max(peak, used) if kind == "coordinator" else peak
            time.sleep(0.25)  # the distance between two samples of the memory
        if coordinator.poll() != 0:
            raise SystemExit(f"the run did not end well within {_LONGEST:.0f} s")
    return peak, kinds, time.monotonic() - began


def main(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks lean-coordinator", description=__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        run = make_run(Path(name))
        peak, kinds, seconds = measure(run, Path(name))
        story = list(tell(run.folder))
        totals = [line for line in story if line.startswith("check ") or "results accepted" in line]
        stitched = [event for event in read_events(run.folder) if isinstance(event, MixtureStitched)]
        mixture = verify_mixture(run.folder / "mixture", run.manifest.coordinators)
    print(f"{Machine.this()}\n")
    print(f"A run of {SHARDS} shards and {EPOCHS} epochs each, {SHARDS + CHECKERS} nodes, {seconds:.0f} s.\n")
    print("| what | value |\n|---|---|")
    print(f"| largest resident memory of the coordinator's process | {peak:.0f} MiB (limit {LIMIT_MIB}) |")
    print(f"| its processes while it served | {', '.join(sorted(kinds))} |")
    print(f"| mixtures stitched | {len(stitched)}, of which {sum(event.current for event in stitched)} became current |")
    for event in stitched:
        print(f"| mixture of epochs {list(event.epochs)} | {'current' if event.current else 'kept'}: {event.text} |")
    print(f"| routing of the last one | {mixture.routing.text if mixture.routing else 'not measured'} |")
    for line in totals:
        what, _, value = line.partition(": ")
        print(f"| {what} | {value} |")
