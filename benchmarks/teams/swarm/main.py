"""`python -m benchmarks team-swarm`: accepted samples of eight nodes on two shards in four lanes, and of two nodes without lanes.

Every node has one thread and the same duty cycle (an eighth by default), so that one machine holds all of them. A duty cycle
bounds training only: what a node imports, fetches and writes is not slowed. Four swarms, one after the other:

- pair: two nodes on two shards without lanes;
- lanes: eight nodes on two shards of four lanes;
- killed: the same, and one node is killed (SIGKILL) when the measured time begins;
- slow: the same as lanes, and one node has an eighth of the duty cycle.

The measured time begins when each node has an accepted result; in the slow swarm, when each of the others has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Machine
from benchmarks.teams.swarm.rates import Delivery, begins, delivery
from lutetia.cli.local.poller import polls, read_status
from lutetia.cli.local.processes import LocalSwarm, free_port
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.describe import read_events
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data import recipe
from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

SWARMS = ("pair", "lanes", "killed", "slow")
SHARDS, LANES = 2, 4
CLIPS = 320
LINES = "swarms.jsonl"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks team-swarm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("team-swarm"), help="folder of lines and table (default: team-swarm)")
    parser.add_argument("--swarm", action="append", choices=SWARMS, help="a swarm to measure, may be given again (default: all)")
    parser.add_argument("--seconds", type=float, default=900.0, help="measured time of each swarm (default: 900)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of an epoch (default: 400)")
    parser.add_argument("--duty", type=float, default=0.125, help="duty cycle of every node (default: 0.125)")
    parser.add_argument("--tiny", action="store_true", help="the tiny expert in place of the demo's, to see that all parts work")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "machine.json").write_text(json.dumps(asdict(Machine.this())))
    with tempfile.TemporaryDirectory() as name:
        data = _data(Path(name))
        for swarm in arguments.swarm or SWARMS:
            folder = Path(name) / swarm
            made = asyncio.run(measure(swarm, _run(data, folder, swarm, arguments), folder, arguments))
            asked = {"swarm": swarm, "steps": arguments.steps, "duty": arguments.duty, "tiny": arguments.tiny}
            line = {**asked, **asdict(made)}
            with (arguments.out / LINES).open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{swarm}: {made.rate:.2f} accepted samples/s", flush=True)
    text = table([json.loads(line) for line in (arguments.out / LINES).read_text().splitlines()])
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


def _data(folder: Path) -> Path:
    make_clips(folder / "clips", CLIPS, 0, recipe.CLIPS["frames"], recipe.CLIPS["size"])
    settings = {**recipe.DATA, "experts": SHARDS, "cache": folder / "cache"}
    build_data(folder / "clips", folder / "data", BuildSettings(**settings))
    return folder / "data"


def _run(data: Path, folder: Path, swarm: str, arguments: argparse.Namespace) -> CreatedRun:
    """A run whose budget outlasts the measured time."""
    batch, team = 4, TeamSpec(lanes=LANES, quorum=0.75, deadline=1200.0)
    settings: dict[str, Any] = {
        "preset": "tiny" if arguments.tiny else "demo", "name": swarm, "experts": SHARDS,
        "addresses": (f"127.0.0.1:{free_port()}",), "optimisation": Optimisation(batch=batch),
        "checkpoint_samples": batch * arguments.steps,
        "samples_per_shard": batch * arguments.steps * 1000, "holdout_tolerance": 1.0, "raw_tolerance": 1.0,
    }  # fmt: skip
    return create_run(data, folder / "run", RunSettings(**settings, team=None if swarm == "pair" else team))


async def measure(swarm: str, run: CreatedRun, folder: Path, arguments: argparse.Namespace) -> Delivery:
    """Serve the run to its nodes, and measure once they are all at work."""
    nodes = SHARDS * (1 if swarm == "pair" else LANES)
    async with LocalSwarm(folder / "logs") as processes:
        await processes.serve(run.folder, "--stitch", "end", "--no-gallery")
        async for _ in polls(processes):
            if read_status(run.folder):
                break
        for number in range(nodes):
            duty = arguments.duty / (8 if swarm == "slow" and number == nodes - 1 else 1)
            flags = ("--device", "cpu", "--threads", "1", "--duty", str(duty))
            await processes.join(f"node-{number}", run.ticket, folder / f"node-{number}", *flags)
        begin = 0.0
        async for _ in polls(processes, 1.0):
            begin = begins(read_events(run.folder), run.manifest, nodes - (swarm == "slow")) or 0.0
            if begin:
                break
        if swarm == "killed":
            processes.members["node-0"].kill()
        end = begin + arguments.seconds
        with contextlib.suppress(StopAsyncIteration):
            async for _ in polls(processes, 1.0):
                if time.time() >= end:
                    break
        return delivery(read_events(run.folder), run.manifest, begin, end)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """All measured swarms, each beside the pair that was measured before it."""
    rows = ["| swarm | accepted samples/s | of the pair | nodes with accepted work | seconds to the next epoch |"]
    rows.append("|---|---|---|---|---|")
    pair: float | None = None
    for line in lines:
        rate = line["rate"]
        pair = rate if line["swarm"] == "pair" else pair
        ratio = f"{rate / pair:.2f}" if pair else "-"
        gaps = sorted(line["epochs"])
        spread = f"{gaps[len(gaps) // 2]:.0f} ({gaps[0]:.0f} to {gaps[-1]:.0f}, N = {len(gaps)})" if gaps else "-"
        rows.append(f"| {line['swarm']} | {rate:.2f} | {ratio} | {len(line['authors'])} | {spread} |")
    return "\n".join(rows)
