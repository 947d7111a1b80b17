"""The swarm of the demo: start it, kill a worker, watch the takeover, wait for the mixture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.demo.live_view import LiveTable, shard_rows
from lutetia.cli.demo.report import DemoPhase
from lutetia.cli.demo.takeover import Takeover, choose_victim
from lutetia.cli.local.poller import SwarmPoller
from lutetia.cli.local.processes import LocalSwarm
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import LutetiaError

if TYPE_CHECKING:
    from lutetia.cli.demo.presets import Preset
    from lutetia.cli.demo.setup import MadeRun


LOOK_EVERY = 0.5  # seconds


COORDINATOR = "coordinator"


@dataclass
class DemoClock:
    """The demo's clock, its phases and what it shows."""

    view: LiveTable
    began: float = field(default_factory=time.monotonic)
    phases: list[DemoPhase] = field(default_factory=list)

    def at(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.view.enter(self.at(), name)
        start = self.at()
        yield
        self.phases.append(DemoPhase(name, self.at() - start))

    def happened(self, sentence: str) -> None:
        self.view.happened(self.at(), sentence)


async def perform(telling: DemoClock, plan: Preset, made: MadeRun, work: Path) -> DemoSwarm:
    """The swarm from its first process to its last."""
    async with LocalSwarm(work / "logs") as swarm:
        act = DemoSwarm(telling, plan, swarm, SwarmPoller(made.folder, work))
        await act.run(made.ticket)
    return act


@dataclass
class DemoSwarm:
    """The swarm's part: start, kill, takeover, wait for the mixture."""

    telling: DemoClock
    plan: Preset
    swarm: LocalSwarm
    watch: SwarmPoller
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
