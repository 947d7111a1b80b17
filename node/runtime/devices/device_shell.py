"""The shell around one device's state machine: carries out its actions and feeds it the results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from lutetia.node.device_settings import DeviceChoice
from lutetia.node.machine import messages as m
from lutetia.node.machine.machine import advance
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.node.pacing import tick_pause
from lutetia.node.runtime.devices.hardware_prober import HardwareProber
from lutetia.node.runtime.devices.parts import NodeHooks, NodeParts
from lutetia.node.runtime.devices.trainer_process import TrainerProcess
from lutetia.node.runtime.node_record import DeviceFacts
from lutetia.node.runtime.tasks import NodeTasks
from lutetia.node.services.thermal import Temperature
from lutetia.node.settings import MIN_DUTY_CYCLE, NodeSettings
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import remembered_slots
from lutetia.node.trainer.devices import DeviceMissing
from lutetia.node.trainer.probe import ProbeResult
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.manifest_upgrade import training_changed
from lutetia.system.errors import DiskError, LutetiaError, one_error
from lutetia.system.files import disk_errors, takes_writes

log = logging.getLogger(__name__)

_DISK_CHECK_SECONDS = 2.0
_DISK_RETRY_SECONDS = 30.0
_LEAVE_SECONDS = 5.0


class DeviceShell:
    """One device of a node. `run` returns when it has ended.

    Args:
        parts: what it shares with the node's other devices.
        choice: the device and what it may take.
        node: the node that it belongs to.
        found: whether the node found the device; false: the volunteer named it.
    """

    def __init__(self, parts: NodeParts, choice: DeviceChoice, node: NodeHooks, *, found: bool = False) -> None:
        self.settings, self.network, self.workspace = parts.settings, parts.network, parts.workspace
        self.contributions, self.replicator = parts.contributions, parts.replicator
        self.choice, self.node, self.found = choice, node, found
        self.rules = NodeRules.of(self.manifest, self.network.identity.public_key)
        remembered = remembered_slots(self.workspace.paths.work, self.manifest.run_id)
        self.state = MachineState(since=time.time(), remembered=remembered)
        self.trainer = TrainerProcess(self.feed, time.time, choice.threads, choice.memory)
        self.prober = HardwareProber(self.settings, choice, self.workspace.paths, self.trainer)
        self.tasks = NodeTasks(self.settings, self.network, self.workspace, self.prober)
        self.data_wanted = self.trainer.starved
        """Set when parts of the data may have to be fetched (`DataFetcher`)."""
        self.left = asyncio.Event()
        self.named = False
        """Whether log lines name the device: the node has several."""
        self.celsius: float | None = None
        """Its temperature, where the volunteer limits it."""
        self.slowed: str | None = None
        """Why it trains less than it may."""
        self.problem: str | None = None
        """The last warning, for the local status."""
        self._told_needs: tuple[str, ...] = ()
        self._group: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._ordered_lock = asyncio.Lock()
        self._under_orders: Counter[int] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._disk_watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def manifest(self) -> Manifest:
        return self.network.manifest

    @property
    def cards(self) -> tuple[str, ...]:
        """Ids of its cards, as NVIDIA's tool names them; none before the probe."""
        return self.prober.result.cards if self.prober.result else ()

    async def set_heat(self, reading: Temperature, share: float, slowed: str | None) -> None:
        """Note its temperature, and train that share of the time that the volunteer allows (`thermal.HeatedDevice`)."""
        self.celsius, self.slowed = reading.celsius, slowed
        await self.trainer.set_duty_cycle(share * self.settings.duty)

    async def run(self, verbs: list[m.Event], *services: Coroutine[Any, Any, None]) -> None:
        """Run until the device has ended.

        Args:
            verbs: what the volunteer and the schedule have said before; it is fed first.
            services: run beside it and are cancelled at the end.
        """
        try:
            with one_error():
                async with asyncio.TaskGroup() as self._group:
                    beside = [self._group.create_task(work) for work in services]
                    for event in (*verbs, m.Joined(time.time())):
                        self.feed(event)
                    await self.left.wait()
                    for task in [*beside, *self._running]:
                        task.cancel()
        finally:
            if self._timer:
                self._timer.cancel()
            await self.trainer.close()

    def upgrade(self, old: Manifest) -> None:
        """Apply the network's manifest in place of `old`; the current work continues."""
        manifest = self.tasks.manifest = self.manifest
        rate = self.prober.result.samples_per_second if self.prober.result else 0.0
        self.rules = with_hang_timeout(NodeRules.of(manifest, self.network.identity.public_key), manifest, self.settings, rate)
        resumed = old.orders.paused is not None and manifest.orders.paused is None
        self.feed(m.ManifestChanged(time.time(), manifest.version, training_changed(old, manifest), resumed))
        if (manifest.hardware, manifest.team) != (old.hardware, old.team) and self._group:
            self._spawn(self._probe())

    @property
    def facts(self) -> DeviceFacts:
        """What the node's record says of the device."""
        report, work, probed = self.trainer.report, self.state.work, self.prober.result
        rate = report.rate if report else probed.samples_per_second * self.settings.duty if probed else 0.0
        return DeviceFacts(self.name, self.state.phase, self.prober.result, rate, shard_and_lane(work.shard)[0] if work else None)

    @property
    def slots_in_use(self) -> frozenset[int]:
        """Slots that no other device may take: claimed or worked on, or whose files orders still concern."""
        used, work = set(self._under_orders), self.state.work
        if work and (work.owned or work.pending or work.trainer == "on"):
            used.add(work.shard)
        return frozenset(used | {slot for slot in (self.state.target, self.trainer.slot) if slot is not None})

    # --- the machine --------------------------------------------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        """Let the machine decide on an event, and start the resulting actions."""
        if self._group is None or self.left.is_set():
            return
        before = self.state
        self.state, actions = advance(self.rules, before, event)
        for action in actions:
            self._do(action)
        if self.state.phase != before.phase:
            self.data_wanted.set()
        if self._syncing and self.state.phase != "syncing":
            self._syncing.cancel()
        if self.state.disk_full_since is not None and (self._disk_watch is None or self._disk_watch.done()):
            self._disk_watch = self._spawn(self._wait_for_disk())
        self._set_timer()
        self.node.device_changed()

    def _set_timer(self) -> None:
        """Send a ClockTick when the machine needs it, and at least once a heartbeat, because clocks may jump."""
        if self._timer:
            self._timer.cancel()
        due = next_wake(self.rules, self.state)
        if due is not None:
            wait = tick_pause(due, time.time(), self.rules.heartbeat)
            self._timer = asyncio.get_running_loop().call_later(wait, lambda: self.feed(m.ClockTick(time.time())))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group
        task = self._group.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _ordered(self, work: Coroutine[Any, Any, Any], slot: int | None = None) -> None:
        """Run after all work that was ordered before: a discard must not overtake the stop before it.

        `slot`: whose files it concerns; no other device takes that slot meanwhile.
        """
        if slot is not None:
            self._under_orders[slot] += 1

        async def in_order() -> None:
            try:
                async with self._ordered_lock:  # first come, first served
                    await work
            finally:
                if slot is not None:
                    self._under_orders[slot] -= 1
                    self._under_orders += Counter()  # without zeros
                self.node.device_changed()

        self._spawn(in_order())

    def _do(self, action: m.Action) -> None:
        match action:
            case m.LogSentence(level=level, text=text):
                where = f"{self.name}: " if self.named else ""
                log.log(logging.WARNING if level == "warning" else logging.INFO, "%s%s", where, text)
                self.problem = text if level == "warning" else self.problem
            case m.ProbeHardware():
                self._spawn(self._probe())
            case m.LookAtShards(shards=slots):
                self._spawn(self._look(slots))
            case m.PublishClaim(claim=claim):
                self._spawn(self._publish_claim(claim))
            case m.RenewRecords(claim=claim):
                self._spawn(self._renew(claim))
            case m.Sync(shard=slot):
                self._ordered(self._begin_sync(action), slot)
            case m.StartTrainer(shard=slot):
                self._ordered(self._start_trainer(action), slot)
            case m.AllowEpochs(until=until):
                self._ordered(self.trainer.allow(until))
            case m.StopTrainer(save=save, again=again):
                self._ordered(self.trainer.stop(save=save, keep=again))
            case m.PublishCheckpoint(candidate=candidate):
                self._spawn(self._publish_checkpoint(candidate))
            case m.DiscardWork(shard=slot, epoch=epoch):
                self._ordered(self._clean_up(self.workspace.discard, slot, epoch), slot)
            case m.CheckpointsSuperseded(shard=slot, epoch=epoch):
                self._count_accepted(slot, epoch)
                self._ordered(self._clean_up(self.workspace.superseded, slot, epoch), slot)
            case m.Leave():
                self._spawn(self._leave())

    # --- network ------------------------------------------------------------------------------------------------------------

    async def _look(self, slots: tuple[int, ...]) -> None:
        views = await self.network.look(slots)
        if views:
            event = m.SwarmSeen(time.time(), views)
            self.feed(event)
            self.node.shards_seen(event)

    async def _publish_claim(self, claim: m.Claim) -> None:
        with _log_unreachable("claim"):
            await self.network.publish_claim(claim)
        if claim.state == "claiming":  # a process can import its libraries while the claim settles
            await self.trainer.start_spare()

    async def _renew(self, claim: m.Claim | None) -> None:
        with _log_unreachable("records"):
            if claim:
                await self.network.publish_claim(claim)
            await self.node.renew()

    def served(self) -> dict[str, int]:
        """Blobs that this node serves (own work and copies for other peers), with sizes in bytes. Blocks on the disk."""
        return self.workspace.held() | self.replicator.held()

    # --- hardware, data, trainer --------------------------------------------------------------------------------------------

    async def _probe(self) -> None:
        try:
            probed = await self.prober.probe(self.manifest)
        except LutetiaError as error:
            if isinstance(error, DeviceMissing):
                if not self.prober.result and not self.found:
                    raise  # it never was there, so the setting is wrong; a device that is lost later may come back
                self.node.device_missing()
            self.feed(m.ProbeFailed(time.time(), str(error)))
        else:
            self.rules = with_hang_timeout(self.rules, self.manifest, self.settings, probed.samples_per_second)
            self._tell_needs(probed)
            self.feed(m.Probed(time.time(), probed.fitness, probed.samples_per_second * self.settings.duty))

    def _tell_needs(self, probed: ProbeResult) -> None:
        """Say once in two lines what the run takes of this machine, before it works."""
        lines = probed.lines(base_here=self.workspace.local_model is not None)
        for line in lines if lines != self._told_needs else ():
            log.info("%s", line)
        self._told_needs = lines

    async def _begin_sync(self, action: m.Sync) -> None:
        """Start fetching, without making later ordered work wait for it."""
        if self._syncing:
            self._syncing.cancel()
        self._syncing = self._spawn(self._sync(action))

    async def _sync(self, action: m.Sync) -> None:
        self._feed_result(await self.tasks.sync(action))

    async def _start_trainer(self, action: m.StartTrainer) -> None:
        assignment = await self.tasks.assignment(action)
        if isinstance(assignment, Assignment):
            await self.trainer.start(action.run, assignment)
        else:
            self._feed_result(assignment)

    async def _publish_checkpoint(self, candidate: m.OwnCheckpoint) -> None:
        answer = await self.tasks.publish(candidate)
        if isinstance(answer, m.OfferAnswered) and answer.verdict == "invalid":
            self.contributions.count_refused(time.time(), candidate.shard, candidate.epoch, answer.text)
        elif isinstance(answer, m.OfferAnswered) and answer.verdict == "gathered":
            self._count_accepted(candidate.shard, candidate.epoch, candidate.digest)
        self._feed_result(answer)

    def _count_accepted(self, slot: int, epoch: int, digest: str = "") -> None:
        self.contributions.count_accepted(time.time(), slot, epoch, digest)
        if self.state.disk_full_since is None:  # a full disk stays the problem to report
            self.problem = None

    def _feed_result(self, event: m.Event) -> None:
        """Feed a task's result, after a full disk that it met."""
        if self.tasks.disk_problem:
            text, self.tasks.disk_problem = self.tasks.disk_problem, None
            self.feed(m.DiskFull(time.time(), text))
        self.feed(event)

    # --- disk, leaving, status ----------------------------------------------------------------------------------------------

    async def _clean_up(self, work: Callable[[int, Any], None], slot: int, epoch: int | None) -> None:
        """Remove files; on a read-only or full disk report it and leave them."""
        try:
            with disk_errors(self.settings.state_folder):
                await asyncio.to_thread(work, slot, epoch)
        except DiskError as error:
            self.feed(m.DiskFull(time.time(), str(error)))

    async def _wait_for_disk(self) -> None:
        """Report DiskFree when there is more space than at the failure, or a read-only disk takes writes again.

        Report it every _DISK_RETRY_SECONDS anyway: space may have become free before the first check, or suffice for a smaller
        file.
        """
        folder, begun = self.settings.state_folder, time.monotonic()
        free, refused = shutil.disk_usage(folder).free, not await asyncio.to_thread(takes_writes, folder)
        while self.state.disk_full_since is not None:
            await asyncio.sleep(_DISK_CHECK_SECONDS)
            more = shutil.disk_usage(folder).free > free or time.monotonic() - begun > _DISK_RETRY_SECONDS
            if not self.trainer.disk_full and (more or (refused and await asyncio.to_thread(takes_writes, folder))):
                self.feed(m.DiskFree(time.time()))

    async def _leave(self) -> None:
        """Wait for ordered work, and up to _LEAVE_SECONDS for the last records to be published."""
        async with self._ordered_lock:
            pass
        last = {task for task in self._running if task is not asyncio.current_task()} - {self._disk_watch, self._syncing}
        if last:
            await asyncio.wait(last, timeout=_LEAVE_SECONDS)
        self.left.set()


def with_hang_timeout(rules: NodeRules, manifest: Manifest, settings: NodeSettings, rate: float) -> NodeRules:
    """Let a slow trainer be silent for 20 of its own steps.

    Args:
        rules: the rules to change.
        manifest: gives the batch size.
        settings: duty cycle, `hang_after` and `max_temp`.
        rate: training speed in samples per second at a duty cycle of 1.
    """
    slowest = rate * settings.duty * (MIN_DUTY_CYCLE if settings.max_temp else 1)
    longest = 20 * manifest.optimisation.batch / slowest if slowest > 0 else 0.0
    return replace(rules, hang_after=max(settings.hang_after, longest))


@contextlib.contextmanager
def _log_unreachable(what: str):
    """Log that records could not be published; the next heartbeat tries again."""
    try:
        yield
    except ConnectionError as error:
        log.info("could not publish %s: %s", what, error)
