"""The thin shell around the state machine: carries its actions out, and tells it what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

from lutetia.node.contributions import Contributions
from lutetia.node.machine import messages as m
from lutetia.node.machine.machine import advance
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.node.runtime.hardware_prober import HardwareProber
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.replication import Replicator
from lutetia.node.runtime.tasks import NodeTasks
from lutetia.node.runtime.trainer_process import TrainerProcess
from lutetia.node.runtime.workspace import Workspace
from lutetia.node.settings import LEAST_SHARE, NodeSettings
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import remembered_shards
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.manifest_upgrade import training_changed
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import DiskError, LutetiaError, one_error
from lutetia.system.files import disk_errors, takes_writes
from lutetia.system.notify import notify

log = logging.getLogger(__name__)

_ALIVE_SECONDS = 1.0
_DISK_SECONDS = 2.0
_DISK_PATIENCE = 30.0
_LAST_WORDS_SECONDS = 5.0


class NodeShell:
    """One node at work. Made when the network is up; `run` returns when it has left."""

    def __init__(
        self,
        settings: NodeSettings,
        network: NodeNetwork,
        material: Workspace,
        contributions: Contributions,
        rejoin: Callable[[], Awaitable[Transport]],
    ) -> None:
        self.settings, self.network, self.material, self.contributions = settings, network, material, contributions
        self.manifest = network.manifest
        self.rules = NodeRules.of(self.manifest, network.identity.public_key)
        remembered = remembered_shards(material.places.work, self.manifest.run_id)
        self.state = MachineState(since=time.time(), remembered=remembered)
        self.hands = TrainerProcess(self.feed, time.time, settings.threads)
        self.prober = HardwareProber(settings, material.places, self.hands)
        self.chores = NodeTasks(settings, network, material, self.prober)
        self.left = asyncio.Event()
        self.problem: str | None = None
        self.slowed: str | None = None
        self.seeder = Replicator(network, material, material.places.folder / "seeds.json")
        self._rejoin = rejoin
        self._early: list[m.UserVerb] = []
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._order = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._disk: asyncio.Task[None] | None = None

    def early(self, verb: m.UserVerb) -> None:
        """What the volunteer said before there was a shell."""
        self._early.append(verb)

    async def run(self, *companions: Coroutine[Any, Any, None]) -> None:
        """Until the node has left; `companions` run beside it and end with it."""
        try:
            with one_error():
                async with asyncio.TaskGroup() as self._group:
                    beside = [self._group.create_task(work) for work in (self._watch_network(), *companions)]
                    for verb in self._early:
                        self.feed(verb)
                    self.feed(m.Joined(time.time()))
                    await self.left.wait()
                    for task in [*beside, *self._tasks]:
                        task.cancel()
        finally:
            if self._timer:
                self._timer.cancel()
            await self.hands.close()

    def upgrade(self, manifest: Manifest) -> None:
        """Go on under a newer version of the manifest; nothing that was done is lost."""
        old = self.manifest
        if manifest.version <= old.version:
            return
        self.manifest = self.material.manifest = self.chores.manifest = manifest
        self.network.upgrade(manifest)
        rate = self.prober.finding.samples_per_second if self.prober.finding else 0.0
        self.rules = patient_rules(NodeRules.of(manifest, self.network.identity.public_key), manifest, self.settings, rate)
        self.feed(m.ManifestChanged(time.time(), manifest.version, training_changed(old, manifest)))
        if manifest.hardware != old.hardware and self._group:
            self._spawn(self._probe())

    # --- the machine --------------------------------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        """Let the machine decide, and begin what it asks for."""
        if self._group is None or self.left.is_set():
            return
        before = self.state
        self.state, actions = advance(self.rules, before, event)
        for action in actions:
            self._do(action)
        if self.state.phase != before.phase:
            notify(f"STATUS={self.state.phase}: {self.state.why}")
        if self._syncing and self.state.phase != "syncing":
            self._syncing.cancel()
        if self.state.disk_full_since is not None and (self._disk is None or self._disk.done()):
            self._disk = self._spawn(self._wait_for_disk())
        self._arm()

    def _arm(self) -> None:
        """Wake up when the machine wants; at least once a heartbeat, for clocks jump."""
        if self._timer:
            self._timer.cancel()
        due = next_wake(self.rules, self.state)
        if due is not None:
            wait = min(max(0.0, due - time.time()), self.rules.heartbeat)
            self._timer = asyncio.get_running_loop().call_later(wait, lambda: self.feed(m.ClockTick(time.time())))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _ordered(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run after everything that was ordered before: a discard never overtakes the stop before it."""

        async def turn() -> None:
            async with self._order:  # first come, first served
                await work

        self._spawn(turn())

    def _do(self, action: m.Action) -> None:
        match action:
            case m.LogSentence(level=level, text=text):
                log.log(logging.WARNING if level == "warning" else logging.INFO, "%s", text)
                self.problem = text if level == "warning" else self.problem
            case m.ProbeHardware():
                self._spawn(self._probe())
            case m.LookAtShards(shards=shards):
                self._spawn(self._look(shards))
            case m.PublishClaim(claim=claim):
                self._spawn(self._publish_claim(claim))
            case m.RenewRecords(claim=claim):
                self._spawn(self._renew(claim))
            case m.Sync():
                self._ordered(self._begin_sync(action))
            case m.StartTrainer():
                self._ordered(self._start_trainer(action))
            case m.AllowEpochs(until=until):
                self._ordered(self.hands.allow(until))
            case m.StopTrainer(save=save):
                self._ordered(self.hands.stop(save=save))
            case m.PublishCheckpoint(candidate=candidate):
                self._spawn(self._publish_checkpoint(candidate))
            case m.DiscardWork(shard=shard, epoch=epoch):
                self._ordered(self._tidy(self.material.discard, shard, epoch))
            case m.CheckpointsSuperseded(shard=shard, epoch=epoch):
                self.contributions.count_accepted(time.time())
                if self.state.disk_full_since is None:  # an acceptance says nothing about a disk that takes no writes
                    self.problem = None
                self._ordered(self._tidy(self.material.superseded, shard, epoch))
            case m.Leave():
                self._spawn(self._leave())

    # --- network ------------------------------------------------------------------------------------------------------------

    async def _look(self, shards: tuple[int, ...]) -> None:
        views = await self.network.look(shards)
        if views:
            self.feed(m.SwarmSeen(time.time(), views))

    async def _publish_claim(self, claim: m.Claim) -> None:
        with _offline("claim"):
            await self.network.publish_claim(claim)
        if claim.state == "claiming":  # a child may import its libraries while the claim settles
            await self.hands.warm()

    async def _renew(self, claim: m.Claim | None) -> None:
        with _offline("records"):
            if claim:
                await self.network.publish_claim(claim)
            report, finding, work = self.hands.report, self.prober.finding, self.state.work
            if finding:
                rate = report.rate if report and report.rate else finding.samples_per_second
                await self.network.publish_node(self.state.phase, finding.hardware, rate, work.shard if work else None)
            if self.state.phase != "left":
                await self.network.announce(await asyncio.to_thread(self.served))

    def served(self) -> dict[str, int]:
        """Blobs that this box has for its work, and those that it keeps for others, with their sizes. Blocks on the disk."""
        return self.material.held() | self.seeder.held()

    async def _watch_network(self) -> None:
        """p2pd may die; then the network side is built anew while training goes on."""
        while True:
            await asyncio.sleep(_ALIVE_SECONDS)
            if not self.network.transport.alive():
                self.feed(m.NetworkLost(time.time()))
                await self.network.transport.close()
                await self._come_back()
                self.feed(m.NetworkBack(time.time()))

    async def _come_back(self) -> None:
        attempt = 0
        while True:
            attempt += 1
            try:
                self.network.moved(await self._rejoin())
            except (LutetiaError, ConnectionError) as error:
                wait = self.rules.backoff(attempt, "rejoin")
                self.problem = str(error)
                log.warning("cannot go back on the network: %s; trying again in %.0f s", error, wait)
                await asyncio.sleep(wait)
            else:
                return

    # --- hardware, data, trainer --------------------------------------------------------------------------------------------

    async def _probe(self) -> None:
        try:
            finding = await self.prober.find(self.manifest)
        except LutetiaError as error:
            self.feed(m.ProbeFailed(time.time(), str(error)))
        else:
            self.rules = patient_rules(self.rules, self.manifest, self.settings, finding.samples_per_second)
            self.feed(m.Probed(time.time(), finding.fitness))

    async def _begin_sync(self, action: m.Sync) -> None:
        """Fetching may take long: it does not keep later orders waiting."""
        if self._syncing:
            self._syncing.cancel()
        self._syncing = self._spawn(self._sync(action))

    async def _sync(self, action: m.Sync) -> None:
        self._told(await self.chores.sync(action))

    async def _start_trainer(self, action: m.StartTrainer) -> None:
        assignment = await self.chores.assignment(action)
        if isinstance(assignment, Assignment):
            await self.hands.start(action.run, assignment)
        else:
            self._told(assignment)

    async def _publish_checkpoint(self, candidate: m.OwnCheckpoint) -> None:
        answer = await self.chores.publish(candidate)
        if isinstance(answer, m.OfferAnswered) and answer.verdict == "invalid":
            self.contributions.count_refused()
        self._told(answer)

    def _told(self, event: m.Event) -> None:
        """A chore's outcome, after the disk's part in it."""
        if self.chores.disk_problem:
            text, self.chores.disk_problem = self.chores.disk_problem, None
            self.feed(m.DiskFull(time.time(), text))
        self.feed(event)

    # --- disk, leaving, telling ---------------------------------------------------------------------------------------------

    async def _tidy(self, work: Callable[[int, Any], None], shard: int, epoch: int | None) -> None:
        """Removing what is not needed any more may wait until the disk takes changes again."""
        try:
            with disk_errors(self.settings.state_folder):
                await asyncio.to_thread(work, shard, epoch)
        except DiskError as error:
            self.feed(m.DiskFull(time.time(), str(error)))

    async def _wait_for_disk(self) -> None:
        """Until there is hope: more space than when it failed, or a disk that took no writes takes one.

        And now and then anyway: it may have been free again before we looked, or have room for less than was to be written.
        """
        folder, begun = self.settings.state_folder, time.monotonic()
        free, refused = shutil.disk_usage(folder).free, not await asyncio.to_thread(takes_writes, folder)
        while self.state.disk_full_since is not None:
            await asyncio.sleep(_DISK_SECONDS)
            more = shutil.disk_usage(folder).free > free or time.monotonic() - begun > _DISK_PATIENCE
            if not self.hands.disk_full and (more or (refused and await asyncio.to_thread(takes_writes, folder))):
                self.feed(m.DiskFree(time.time()))

    async def _leave(self) -> None:
        """When the trainer has ended and the swarm knows, or does not hear us."""
        async with self._order:
            pass
        last = {task for task in self._tasks if task is not asyncio.current_task()} - {self._disk, self._syncing}
        if last:
            await asyncio.wait(last, timeout=_LAST_WORDS_SECONDS)
        self.left.set()

    def describe(self) -> dict[str, Any]:
        """The shell's part of the local status."""
        state, work, report, finding, now = self.state, self.state.work, self.hands.report, self.prober.finding, time.time()
        counts = self.contributions
        document: dict[str, Any] = {
            "state": state.phase, "reason": state.why, "since": state.since, "run": self.manifest.run_id,
            "name": self.manifest.name, "manifest_version": self.manifest.version, "online": state.online,
            "problem": self.problem, "slowed": self.slowed, "copies": len(self.seeder.seeds),
            "paused_until": state.pause_until or state.closed_until,
            "accepted": counts.accepted, "refused": counts.refused, "last_accepted": counts.last_accepted,
            "accepted_today": counts.today(now), "addresses": self.network.addresses if state.online else (),
        }  # fmt: skip
        if finding:
            document |= {"device": finding.device, "precision": finding.precision_reason}
        if work:
            document |= {
                "shard": work.shard, "shard_name": self.manifest.shards[work.shard].name, "epoch": work.epoch,
                "epochs": self.manifest.epochs, "pending": len(work.pending), "samples": work.samples,
            }  # fmt: skip
        if work and report:
            rate = report.rate or None
            left = (self.manifest.steps_per_epoch - report.step) * self.manifest.optimisation.batch
            document |= {
                "step": report.step, "steps": report.steps or None, "samples": report.samples, "loss": report.loss,
                "samples_per_second": rate, "due": now + left / rate if rate else None,
            }  # fmt: skip
        return document


def patient_rules(rules: NodeRules, manifest: Manifest, settings: NodeSettings, rate: float) -> NodeRules:
    """A slow box is not a hung one: it may be silent for 20 of its own steps. `rate` in samples per second at full duty."""
    pace = rate * settings.duty * (LEAST_SHARE if settings.max_temp else 1)
    longest = 20 * manifest.optimisation.batch / pace if pace > 0 else 0.0
    return replace(rules, hang_after=max(settings.hang_after, longest))


@contextlib.contextmanager
def _offline(what: str):
    """Without network nothing can be told; the machine knows, and tries again with the next heartbeat."""
    try:
        yield
    except ConnectionError as error:
        log.info("could not publish %s: %s", what, error)
