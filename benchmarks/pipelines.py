"""`python -m benchmarks pipelines`: tiny pipelines of every supported kind, each through a whole swarm of real processes.

Each pipeline has random weights and the classes and files of the real one. It goes from clips through data build, run create, a
coordinator and one node over loopback, and stitch, to a loaded mixture. Every epoch is checked and audited. Then the stock
pipeline, with the trained transformer, and the mixture draw latents from the same prompts and equal noise.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Machine
from lutetia.cli.local.poller import polls, read_status
from lutetia.cli.local.processes import LocalSwarm, free_port
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.describe import read_events
from lutetia.protocol.schema.manifest import AuditPolicy
from tests.pipelines.made_pipeline import apart, draw_mixture, draw_stock, stitched
from tests.pipelines.tiny_clips import build, run_settings, write_clips
from tests.pipelines.tiny_pipelines import PIPELINES

EPOCHS = 2


@dataclass(frozen=True)
class WholeWay:
    """What came of one pipeline.

    Attributes:
        model: the class of its transformer.
        accepted: epochs.
        audits: outcomes of the replays of whole epochs.
        mixture: relative distance between the latents of the loaded mixture and of the stock pipeline.
        stand_in: the same of the stock pipeline with the mixture in place of its transformer.
        seconds: of the swarm, from its start to its end.
    """

    name: str
    model: str
    accepted: int
    audits: Sequence[str]
    mixture: float
    stand_in: float
    seconds: float

    @property
    def row(self) -> str:
        audits = f"{self.audits.count('valid')} of {len(self.audits)}"
        cells = (
            self.name,
            f"`{self.model}`",
            f"{self.accepted} of {EPOCHS}",
            audits,
            f"{self.mixture:.1e}",
            f"{self.stand_in:.1e}",
        )
        return f"| {' | '.join(cells)} | {self.seconds:.0f} |"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pipelines", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=sorted(PIPELINES), help="a pipeline, may be given again (default: all)"
    )
    arguments = parser.parse_args(argv)
    rows = ["| pipeline | transformer | accepted | valid audits | mixture | stand-in | s |", "|---|---|---|---|---|---|---|"]
    for name in arguments.only or PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            made = asyncio.run(whole_way(name, Path(folder)))
        rows.append(made.row)
        print(made.row, file=sys.stderr, flush=True)
    print(f"{Machine.this()}\n")
    print("\n".join(rows))


async def whole_way(name: str, folder: Path) -> WholeWay:
    """Train, check, audit, stitch and load the pipeline `name` in a new folder."""
    build(name, write_clips(folder / "clips"), folder)
    settings = run_settings(
        name, preset="tiny", addresses=(f"127.0.0.1:{free_port()}",), samples_per_shard=4 * EPOCHS,
        audit=AuditPolicy(whole_epoch=1.0),
    )  # fmt: skip
    run = create_run(folder / "data", folder / "run", settings)
    began = time.monotonic()
    await serve_to_its_end(run, folder)
    seconds, events = time.monotonic() - began, list(read_events(run.folder))
    made = stitched(name, folder, run.manifest, run.folder / "mixture")
    theirs = draw_stock(made)
    return WholeWay(
        name, type(made.stock.transformer).__name__, sum(event.kind == "checkpoint-accepted" for event in events),
        [event.outcome for event in events if event.kind == "audit-done"], apart(draw_mixture(made), theirs),
        apart(draw_stock(made, made.mixture.transformer), theirs), seconds,
    )  # fmt: skip


async def serve_to_its_end(run: CreatedRun, folder: Path) -> None:
    """A coordinator that ends with its run, and one node."""
    async with LocalSwarm(folder / "logs") as swarm:
        coordinator = await swarm.serve(run.folder, "--exit-when-done", "--stitch", "end", "--no-gallery")
        async for _ in polls(swarm):
            if read_status(run.folder):
                break
        await swarm.join("node", run.ticket, folder / "node", "--device", "cpu", "--threads", "1")
        async for _ in polls(swarm):
            if not coordinator.running:
                return
