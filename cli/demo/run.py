"""The demo from clips to report: a swarm of processes on this machine, one of which is killed midway."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.demo.live_view import live_view
from lutetia.cli.demo.swarm_run import DemoClock, perform
from lutetia.cli.formatting import clock
from lutetia.cli.local.processes import free_port
from lutetia.cli.output import say
from lutetia.cli.workspace import check_replaceable, workspace
from lutetia.system.errors import LutetiaError
from lutetia.system.files import replace_folder

if TYPE_CHECKING:
    pass

MARKS = ("report.md", "status.json", "samples.gif")


def run_demo(out: Path, *, keep_run: bool, preset: str) -> None:
    """Fill `out` with mixture, samples, status and report. Raises UsageError where `out` holds something else."""
    from lutetia.cli.demo.presets import preset_of
    from lutetia.cli.demo.results import finish
    from lutetia.cli.demo.setup import make_run

    check_replaceable(out, MARKS)
    plan = preset_of(preset)
    with workspace(out) as work, live_view() as view:
        telling = DemoClock(view)
        made = make_run(work, plan, f"127.0.0.1:{free_port()}", telling.phase)
        with telling.phase("train three experts in a swarm"), _logs_kept(work / "logs", out):
            act = asyncio.run(perform(telling, plan, made, work))
        replace_folder(finish(work, made, act, telling, keep_run), out)
    closing_words(out, telling)


@contextmanager
def _logs_kept(logs: Path, out: Path) -> Iterator[None]:
    """When the swarm fails, put the logs of its processes beside `out`."""
    try:
        yield
    except LutetiaError:
        kept = out.with_name(f"{out.name}.logs")
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        say(f"the logs of the swarm's processes are in {kept}")
        raise


def closing_words(out: Path, telling: DemoClock) -> None:
    from lutetia.cli.output import console

    lines = (
        f"done in {clock(telling.at())} minutes",
        f"  look at   {out / 'samples.gif'}  (or samples.mp4)",
        f"  read      {out / 'report.md'}",
        f'  try       lutetia generate "a purple star spins" --mixture {out / "mixture"} --out clip.mp4',
    )
    console().print("\n".join(lines), markup=False)
