"""The demo from clips to report: a swarm of processes on this machine, one of which is killed midway."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol.status import SwarmStatus
from ..system.errors import LutetiaError
from ..system.files import replace_folder
from .live import View, live_view, shard_rows
from .local_swarm import LocalSwarm, free_port
from .output import say
from .report import Phase
from .takeover import Takeover, choose_victim
from .watch import Watch
from .words import clock
from .workspace import check_replaceable, workspace

if TYPE_CHECKING:
    from .presets import Preset
    from .stages import MadeRun

MARKS = ("report.md", "status.json", "samples.gif")
LOOK_EVERY = 0.5  # seconds
COORDINATOR = "coordinator"


@dataclass
class Telling:
    """The demo's clock, its phases and what it shows."""

    view: View
    began: float = field(default_factory=time.monotonic)
    phases: list[Phase] = field(default_factory=list)

    def at(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.view.enter(self.at(), name)
        start = self.at()
        yield
        self.phases.append(Phase(name, self.at() - start))

    def happened(self, sentence: str) -> None:
        self.view.happened(self.at(), sentence)


def run_demo(out: Path, *, keep_run: bool, preset: str) -> None:
    """Fill `out` with mixture, samples, status and report. Raises UsageError where `out` holds something else."""
    from .finish import finish
    from .presets import preset_of
    from .stages import make_run

    check_replaceable(out, MARKS)
    plan = preset_of(preset)
    with workspace(out) as work, live_view() as view:
        telling = Telling(view)
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


async def perform(telling: Telling, plan: Preset, made: MadeRun, work: Path) -> Act:
    """The swarm from its first process to its last."""
    async with LocalSwarm(work / "logs") as swarm:
        act = Act(telling, plan, swarm, Watch(made.folder, work))
        await act.run(made.ticket)
    return act


def closing_words(out: Path, telling: Telling) -> None:
    from .output import console

    lines = (
        f"done in {clock(telling.at())} minutes",
        f"  look at   {out / 'samples.gif'}  (or samples.mp4)",
        f"  read      {out / 'report.md'}",
        f'  try       lutetia generate "a purple star spins" --mixture {out / "mixture"} --out clip.mp4',
    )
    console().print("\n".join(lines), markup=False)


@dataclass
class Act:
    """The swarm's part: start, kill, takeover, wait for the mixture."""

    telling: Telling
    plan: Preset
    swarm: LocalSwarm
    watch: Watch
    takeover: Takeover | None = None
    status: SwarmStatus | None = None

    async def run(self, ticket: str) -> None:
        serve = ["coordinator", "serve", str(self.watch.run), "--stitch", "end", "--no-gallery", "--exit-when-done"]
        coordinator = await self.swarm.start(COORDINATOR, serve)
        await self._until(lambda: self.status is not None, self.plan.patience)
        self.telling.happened("the coordinator is up")
        for limit in self.plan.workers:
            folder = self.watch.add(limit.name)
            arguments = ["join", ticket, "--state-folder", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0"]
            arguments += ["--device", "cpu", "--threads", str(limit.threads), "--duty", str(limit.duty)]
            await self.swarm.start(limit.name, arguments, {"LUTETIA_STOP_WITHIN": "0"})  # the demo ends at once
            self.telling.happened(f"{limit.name} joins ({limit.words})")
        await self._until(lambda: not coordinator.running, self.plan.longest)
        self.telling.happened("all budgets are done, the router is trained, the mixture is stitched")

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Look at the swarm and act on it until `condition` holds. Raises LutetiaError: too late, or a process failed."""
        deadline = time.monotonic() + seconds
        while True:
            self.swarm.check()
            await self.watch.look([name for name, member in self.swarm.members.items() if member.running])
            self.status = self.watch.status or self.status
            if self.status is not None:
                self._step(self.status)
            if condition():
                return
            if time.monotonic() > deadline:
                raise LutetiaError(f"the swarm was not done after {seconds:.0f} s; its logs say why, or it needs more cores")
            await asyncio.sleep(LOOK_EVERY)

    def _step(self, status: SwarmStatus) -> None:
        workers = self.watch.workers
        self.telling.view.show(self.telling.at(), shard_rows(status, workers))
        if self.takeover is None:
            if victim := choose_victim(status, workers, self.plan.slowest_first):
                self._kill(status, victim.name)
        elif not self.takeover.complete:
            before = len(self.takeover.steps())
            self.takeover = self.takeover.seen(self.telling.at(), status.shards[self.takeover.shard], workers)
            for _, sentence in self.takeover.steps()[before:]:
                self.telling.happened(sentence)

    def _kill(self, status: SwarmStatus, name: str) -> None:
        victim = self.watch.forget(name)
        self.swarm.members[name].kill()
        shard = status.shards[victim.shard or 0]
        self.takeover = Takeover(
            victim.name,
            victim.owner,
            shard.shard,
            shard.name,
            shard.epoch,
            self.telling.at(),
            max(0, victim.samples - shard.samples),
        )
        self.telling.happened(self.takeover.steps()[0][1])
