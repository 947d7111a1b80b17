"""`python -m benchmarks lean-coordinator`: memory of a coordinator that computes nothing, over a whole run with real nodes.

Nodes train two shards, check and replay each other's results, and train and measure the router, all on this machine.
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

from benchmarks.attacks.lab import clips
from benchmarks.fuzz.examples import LATENT, WAN
from benchmarks.report import Machine
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.admin.reserve import draw_reserve
from lutetia.coordinator.ledger.describe import tell
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.cluster.report import ClusterReport
from lutetia.models.data.description import DATA_FILE, DataDescription, DataFile, DataShard
from lutetia.models.data.parts.index import Split
from lutetia.models.data.parts.writer import write_shard
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

SHARDS, CHECKERS, EPOCHS, STEPS, BATCH = 2, 3, 3, 8, 4
HELD_OUT, CLIPS_OF_A_CHECK = 16, 2
LIMIT_MIB = 300
_LONGEST = 1800.0


def make_run(root: Path) -> CreatedRun:
    (root / "data" / "shards").mkdir(parents=True)
    entries = []
    for index in range(SHARDS):
        files = {}
        splits: tuple[tuple[Split, int], ...] = (("train", 32), ("holdout", HELD_OUT))
        for split, count in splits:
            path = f"shards/{index:03d}.{split}.safetensors"
            written = write_shard(root / "data" / path, clips(index, count, 0.1), LATENT, name=f"kind {index}", split=split)
            files[split] = DataFile(path=path, blob=written.blob, clips=written.clips, bytes=written.bytes)
        entries.append(DataShard(index=index, name=f"kind {index}", **files, prior=1 / SHARDS))
    report = ClusterReport(clusters=(), silhouette=0.0, largest_uncapped=1 / SHARDS)
    (root / "data" / DATA_FILE).write_bytes(canonical(DataDescription(latent=LATENT, shards=tuple(entries), clustering=report)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = RunSettings(
        preset="tiny", name="lean", addresses=(f"127.0.0.1:{port}",), expert=ExpertSpec(config=WAN),
        optimisation=Optimisation(batch=BATCH, learning_rate=2e-3, ema_decay=0.9),
        samples_per_shard=EPOCHS * STEPS * BATCH, checkpoint_samples=STEPS * BATCH,
    )  # fmt: skip
    run = create_run(root / "data", root / "run", settings)
    draw_reserve(run.folder, CLIPS_OF_A_CHECK)
    return run


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
        options = ("--lend-checks", "--stitch", "end", "--exit-when-done")
        coordinator = stack.enter_context(command("coordinator", "serve", str(run.folder), *options))
        while not (run.folder / "status.json").exists() and coordinator.poll() is None:
            time.sleep(0.2)  # the file is made by another process, and nothing else tells of it
        for number in range(SHARDS + CHECKERS):
            folder = str(root / f"node {number}")
            options = ("--state-folder", folder, "--listen", "/ip4/127.0.0.1/tcp/0", "--device", "cpu", "--threads", "1")
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
        totals = [line for line in tell(run.folder) if line.startswith("check ") or "results accepted" in line]
    print(f"{Machine.this()}\n")
    print(f"A run of {SHARDS} shards and {EPOCHS} epochs each, {SHARDS + CHECKERS} nodes, {seconds:.0f} s.\n")
    print("| what | value |\n|---|---|")
    print(f"| largest resident memory of the coordinator's process | {peak:.0f} MiB (limit {LIMIT_MIB}) |")
    print(f"| its processes while it served | {', '.join(sorted(kinds))} |")
    for line in totals:
        what, _, value = line.partition(": ")
        print(f"| {what} | {value} |")
