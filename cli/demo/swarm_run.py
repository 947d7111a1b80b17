"""The demo's swarm: start it, kill a node, watch the takeover, wait for the mixture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.cli.demo.live_view import LiveTable, shard_rows
from lutetia.cli.demo.report import DemoPhase
from lutetia.cli.demo.takeover import Takeover, choose_victim
from lutetia.cli.local.poller import SwarmPoller, polls
from lutetia.cli.local.processes import LocalSwarm
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import LutetiaError

if TYPE_CHECKING:
    from lutetia.cli.demo.presets import Preset
    from lutetia.cli.demo.setup import MadeRun


@dataclass
class DemoClock:
    """The demo's clock and phases; it passes both on to the view."""

    view: LiveTable
    began: float = field(default_factory=time.monotonic)
    phases: list[DemoPhase] = field(default_factory=list)

    def at(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as phase `name`."""
        self.view.start_phase(self.at(), name)
        start = self.at()
        yield
        self.phases.append(DemoPhase(name, self.at() - start))

    def log_event(self, sentence: str) -> None:
        self.view.log_event(self.at(), sentence)


async def run_swarm(timer: DemoClock, preset: Preset, made: MadeRun, work: Path) -> DemoSwarm:
    """Run the swarm until its mixture is stitched. Raises LutetiaError when it takes too long or a process fails."""
    async with LocalSwarm(work / "logs") as swarm:
        demo = DemoSwarm(timer, preset, swarm, SwarmPoller(made.folder, work))
        await demo.run(made.ticket)
    return demo


@dataclass
class DemoSwarm:
    """The demo's swarm, and what was seen of it."""

    timer: DemoClock
    preset: Preset
    swarm: LocalSwarm
    poller: SwarmPoller
    takeover: Takeover | None = None

    @property
    def status(self) -> SwarmStatus | None:
        """The last status of the coordinator."""
        return self.poller.status

    async def run(self, ticket: str) -> None:
        """Start the coordinator and the nodes, and wait for the mixture."""
        coordinator = await self.swarm.serve(self.poller.run, "--stitch", "end", "--no-gallery", "--exit-when-done")
        await self._until(lambda: self.status is not None, self.preset.start_timeout)
        self.timer.log_event("the coordinator is up")
        for limit in self.preset.workers:
            options = ("--device", "cpu", "--threads", str(limit.threads), "--duty", str(limit.duty))
            await self.swarm.join(limit.name, ticket, self.poller.add(limit.name), *options)
            self.timer.log_event(f"{limit.name} joins ({limit.description})")
        await self._until(lambda: not coordinator.running, self.preset.run_timeout)
        self.timer.log_event("all budgets are done, the router is trained, the mixture is stitched")

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Poll the swarm and act on it until `condition` holds. Raises LutetiaError: too late, or a process failed."""
        deadline = time.monotonic() + seconds
        async for _ in polls(self.swarm):
            await self.poller.poll(self.swarm)
            if self.status is not None:
                self._step(self.status)
            if condition():
                return
            if time.monotonic() > deadline:
                raise LutetiaError(f"the swarm was not done after {seconds:.0f} s; read its logs, or use more cores")

    def _step(self, status: SwarmStatus) -> None:
        workers = self.poller.workers
        self.timer.view.update(self.timer.at(), shard_rows(status, workers))
        if self.takeover is None:
            if victim := choose_victim(status, workers, self.preset.slowest_first):
                self._kill(status, victim.name)
        elif not self.takeover.complete:
            before = len(self.takeover.timeline())
            self.takeover = self.takeover.observe(self.timer.at(), status.shards[self.takeover.shard], workers)
            for _, sentence in self.takeover.timeline()[before:]:
                self.timer.log_event(sentence)

    def _kill(self, status: SwarmStatus, name: str) -> None:
        victim = self.poller.forget(name)
        self.swarm.members[name].kill()
        shard = status.shards[victim.shard or 0]
        self.takeover = Takeover(
            victim.name,
            victim.owner,
            shard.shard,
            shard.name,
            shard.epoch,
            self.timer.at(),
            max(0, victim.samples - shard.samples),
        )
        self.timer.log_event(self.takeover.timeline()[0][1])
