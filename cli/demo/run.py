"""The demo from clips to report: a swarm of processes on this machine, one of which is killed midway."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lutetia.cli.demo.live_view import live_view
from lutetia.cli.demo.swarm_run import DemoClock, run_swarm
from lutetia.cli.formatting import clock
from lutetia.cli.local.processes import free_port
from lutetia.cli.output import console, say
from lutetia.cli.workspace import check_replaceable, workspace
from lutetia.system.errors import LutetiaError
from lutetia.system.files import replace_folder

MARKS = ("report.md", "status.json", "samples.gif")
"""Files of an earlier demo: a folder with all of them may be replaced."""


def run_demo(out: Path, *, keep_run: bool, preset: str) -> None:
    """Run the demo and write mixture, samples, status and report into `out`.

    Args:
        out: folder for the result. Raises UsageError where it holds anything but an earlier demo.
        keep_run: also keep clips, shards, the run's folder and logs, in `out/run`.
        preset: `demo`, or `tiny` for tests.
    """
    from lutetia.cli.demo.presets import preset_of
    from lutetia.cli.demo.results import write_results
    from lutetia.cli.demo.setup import make_run

    check_replaceable(out, MARKS)
    chosen = preset_of(preset)
    with workspace(out) as work, live_view() as view:
        timer = DemoClock(view)
        made = make_run(work, chosen, f"127.0.0.1:{free_port()}", timer.phase)
        with timer.phase("train three experts in a swarm"), _keep_logs(work / "logs", out):
            swarm = asyncio.run(run_swarm(timer, chosen, made, work))
        replace_folder(write_results(work, made, swarm, timer, keep_run), out)
    print_summary(out, timer)


@contextmanager
def _keep_logs(logs: Path, out: Path) -> Iterator[None]:
    """When the swarm fails, copy the logs of its processes to a folder beside `out`."""
    try:
        yield
    except LutetiaError:
        kept = out.with_name(f"{out.name}.logs")
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        say(f"the logs of the swarm's processes are in {kept}")
        raise


def print_summary(out: Path, timer: DemoClock) -> None:
    """Print how long it took, and what to look at."""
    lines = (
        f"done in {clock(timer.at())} minutes",
        f"  look at   {out / 'samples.gif'}  (or samples.mp4)",
        f"  read      {out / 'report.md'}",
        f'  try       lutetia generate "a purple star spins" --mixture {out / "mixture"} --out clip.mp4',
    )
    console().print("\n".join(lines))
