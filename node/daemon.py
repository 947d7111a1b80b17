"""The node's daemon: joins the run of a ticket and works for it until it is told to finish or leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lutetia.models.experts.adapters.base_sources import find_base, missing_base
from lutetia.node.contributions import Contributions
from lutetia.node.control import ControlRequest, serve_control
from lutetia.node.journal import LastLines, NodeJournal, TrainingLoss, last_lines, with_loss
from lutetia.node.local_status import LocalStatus
from lutetia.node.machine.messages import UserVerb
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.runtime.status_fields import status_fields
from lutetia.node.runtime.workspace import RunPaths, Workspace
from lutetia.node.schedule import WeeklyHours, follow_schedule
from lutetia.node.services.auditor import run_audits
from lutetia.node.services.borrowing import Borrowing
from lutetia.node.services.checker import run_checks
from lutetia.node.services.manifest_updates import ManifestUpdates
from lutetia.node.services.membership import Membership
from lutetia.node.services.thermal import check_sensors, limit_temperature
from lutetia.node.services.traffic import keep_to_caps
from lutetia.node.settings import NodeSettings, announced
from lutetia.node.state_lock import state_lock
from lutetia.node.traffic.meter import Traffic
from lutetia.node.traffic.policy import ByteCaps
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.joining import enter_swarm
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedService
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.transport.backend import start_transport
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.metered import metered
from lutetia.system.errors import UsageError
from lutetia.system.files import sweep_parts
from lutetia.system.notify import ending_signals, notify

log = logging.getLogger(__name__)

IDENTITY, TRAFFIC = "identity.key", "traffic.json"
_SHOW_SECONDS = 2.0


async def run_node(settings: NodeSettings, on_status: Callable[[LocalStatus], None] | None = None) -> None:
    """Join the ticket's run and work for it. Returns when the node has left. `on_status` gets the status every two seconds.

    Raises HardwareError (no sensor for `max_temp`), ConfigError (ticket, manifest, `announce`), IdentityError (two daemons, bad
    key), BootstrapError, UnreachableError or AuthorisationError when it cannot join.
    """
    ticket = settings.decoded_ticket
    if settings.max_temp is not None:
        await asyncio.to_thread(check_sensors, settings.devices)
    with state_lock(settings.state_folder):
        for name in ("runs", "blobs"):  # the folder may hold other people's files too
            sweep_parts(settings.state_folder / name)
        daemon = NodeDaemon(settings, _identity(settings))
        async with serve_control(settings.state_folder, daemon.answer):
            with daemon.signals(), last_lines() as daemon.lines:
                log.info("joining run %s as %s", ticket.run[:12], daemon.identity.peer_id)
                showing = asyncio.create_task(daemon.show(on_status))
                try:
                    await daemon.run()
                finally:
                    showing.cancel()
    log.info("left the run; all its processes have ended")


def _identity(settings: NodeSettings) -> Identity:
    """The node's key. When it is created, log what the volunteer should know about it."""
    path = settings.state_folder / IDENTITY
    new = not path.exists()
    identity = Identity.load_or_create(path)
    if new:
        log.info("this node is %s; its secret key is %s", identity.peer_id, path)
        log.info("back it up with `lutetia identity export FILE`: without the key the node's identity and its record are lost")
        log.info(
            "other peers see its addresses, device, speed, software version, its name if it has one, what it works on, and what "
            "it made or checked for the run; nothing else is sent"
        )
        log.info(
            "stop with Ctrl-C or `lutetia finish` (finishes the current checkpoint), `lutetia pause --for 2h`, `lutetia leave`"
        )
    return identity


class NodeDaemon:
    """Identity, control and signals for the life of the process; the shell once network and manifest are there."""

    def __init__(self, settings: NodeSettings, identity: Identity) -> None:
        self.settings, self.identity = settings, identity
        self.started = time.time()
        self.ending = asyncio.Event()
        self.traffic = Traffic(settings.state_folder / TRAFFIC, ByteCaps(settings.bytes_per_day, settings.bytes_per_month))
        self.shell: NodeShell | None = None
        self.manifest_updates: ManifestUpdates | None = None
        self._early_verbs: list[UserVerb] = []
        self._signals = 0
        self.losses: list[TrainingLoss] = []
        self.lines = LastLines()

    async def run(self) -> None:
        """Join, work, leave."""
        paths = RunPaths(self.settings.state_folder, self.settings.decoded_ticket.run)
        joining = asyncio.create_task(self.join(paths))
        ending = asyncio.create_task(self.ending.wait())
        try:
            await asyncio.wait([joining, ending], return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                return
            transport, live = joining.result()
        finally:
            for task in (joining, ending):
                task.cancel()
            await asyncio.gather(joining, ending, return_exceptions=True)
        try:
            await self._work(transport, live, paths)
        finally:
            await (self.shell.network.transport if self.shell else transport).close()

    async def join(self, paths: RunPaths, live: LiveManifest | None = None) -> tuple[Transport, LiveManifest]:
        """Join the swarm. `live`: the manifest known so far, when it rejoins after p2pd has died."""
        settings = self.settings
        announce = announced(settings.announce, self.identity.peer_id)
        return await enter_swarm(
            self.identity, settings.decoded_ticket,
            listen=settings.listen, announce=announce, state_folder=paths.folder, live=live,
            start=metered(start_transport, self.traffic),
        )  # fmt: skip

    async def _work(self, transport: Transport, live: LiveManifest, paths: RunPaths) -> None:
        manifest = live()
        store = await asyncio.to_thread(BlobStore, paths.blobs, self.settings.disk_limit)
        network = NodeNetwork(
            self.identity, transport, manifest, self.settings.decoded_ticket, store,
            operator=self.settings.operator, name=self.settings.name or "", traffic=self.traffic,
        )  # fmt: skip
        contributions = Contributions(paths.folder / "contributions.json")
        workspace = Workspace(paths, manifest, store)
        workspace.local_model = await asyncio.to_thread(find_local_model, manifest, self.settings.base, store)
        shell = NodeShell(self.settings, network, workspace, contributions, self.rejoin)
        self.manifest_updates = ManifestUpdates(network, live, lambda: shell.upgrade(live()))
        self.shell = shell
        await self.serve(transport, store)
        notify(f"READY=1\nSTATUS=joined run {manifest.name}")
        for verb in self._early_verbs:
            self.shell.feed(verb)
        services = [
            self.manifest_updates.run(), Membership(shell, copies=self.settings.copies).run(), keep_to_caps(shell, self.traffic),
        ]  # fmt: skip
        if self.settings.hours:
            services.append(follow_schedule(WeeklyHours.parse(self.settings.hours), shell.feed))
        if limit := self.settings.max_temp:
            services.append(limit_temperature(limit, lambda: tuple(shell.devices.values())))
        if self.settings.audits:
            borrowing = Borrowing()
            checks = await asyncio.to_thread(BlobStore, paths.borrowed, self.settings.disk_limit)
            services += [run_audits(shell, borrowing), run_checks(shell, borrowing, checks)]
        await shell.run(*services)

    async def serve(self, transport: Transport, store: BlobStore) -> None:
        """Serve blobs, manifest versions and accepted checkpoints on `transport`."""
        assert self.manifest_updates
        assert self.shell
        transport.favour(self.shell.network.has_accepted_work)
        orders = self.manifest_updates.live
        banned, room = lambda peer_id: orders().orders.bans(peer_id), self.shell.network.room
        await serve_blobs(transport, store, self.settings.upload_rate, banned, room)
        await self.manifest_updates.serve(transport)
        await AcceptedService(transport, self.manifest_updates.live).serve()

    async def rejoin(self) -> Transport:
        """A new transport in place of the dead one. Raises LutetiaError or ConnectionError when it cannot join now."""
        assert self.shell
        assert self.manifest_updates
        transport, live = await self.join(self.shell.workspace.paths, self.manifest_updates.live)
        try:
            await self.serve(transport, self.shell.network.store)
            self.shell.upgrade(live())
        except BaseException:
            await transport.close()  # its p2pd would block the next attempt
            raise
        return transport

    # --- the volunteer's commands -----------------------------------------------------------------------------------------

    def apply_verb(self, event: UserVerb) -> None:
        """Feed a command to the shell; before it exists, keep it, or end for finish and leave."""
        if self.shell:
            self.shell.feed(event)
        elif event.verb in ("finish", "leave"):
            self.ending.set()
        else:
            self._early_verbs.append(event)

    async def answer(self, request: ControlRequest) -> dict[str, Any]:
        """Answer a request on the control socket: carry out its verb and return the status."""
        if request.verb == "journal":
            return self.journal().model_dump(mode="json")
        if request.verb != "status":
            now = time.time()
            event = UserVerb(now, request.verb, now + request.seconds if request.seconds else None)
            if request.device is None:
                self.apply_verb(event)
            elif request.verb not in ("pause", "resume"):
                raise UsageError(f"{request.verb} concerns the whole node; only pause and resume take a device")
            elif self.shell is None:
                raise UsageError("the node is still joining; its devices are not known yet")
            else:
                self.shell.feed_device(event, request.device)
        return self.status().model_dump(mode="json")

    def status(self) -> LocalStatus:
        fields: dict[str, Any] = {"state": "joining", "reason": "joining the network", "since": self.started}
        if self.shell:
            fields = status_fields(self.shell, self.started)
        return LocalStatus(
            owner=self.identity.public_key, peer_id=self.identity.peer_id, pid=os.getpid(),
            software=software_version(), started=self.started, **fields,
        )  # fmt: skip

    def journal(self) -> NodeJournal:
        verdicts = self.shell.contributions.verdicts.verdicts if self.shell else ()
        return NodeJournal(verdicts=verdicts, losses=tuple(self.losses), log=tuple(self.lines.lines))

    async def show(self, on_status: Callable[[LocalStatus], None] | None) -> None:
        """Note the training loss, and call `on_status` with the status, until cancelled."""
        while True:
            status = self.status()
            for each in status.devices or (status,):
                if each.shard is not None and each.loss is not None and each.samples is not None:
                    place = {"shard": each.shard, "lane": each.lane or 0, "samples": each.samples}
                    new = TrainingLoss(time=time.time(), loss=each.loss, **place)
                    self.losses = with_loss(self.losses, new)
            if on_status:
                on_status(status)
            await asyncio.sleep(_SHOW_SECONDS)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP: the first means finish, a second SIGTERM or SIGINT leave at once."""
        loop = asyncio.get_running_loop()
        numbers = ending_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signals and number not in (signal.SIGTERM, signal.SIGINT):
            return  # a closed terminal may send several
        self._signals += 1
        now = time.time()
        if self._signals > 1:
            self.apply_verb(UserVerb(now, "leave"))
            return
        within = self.settings.stop_within
        log.info("stopping: finishing the current checkpoint within %.0f s; Ctrl-C again leaves at once", within)
        self.apply_verb(UserVerb(now, "finish"))
        asyncio.get_running_loop().call_later(within, lambda: self.apply_verb(UserVerb(time.time(), "leave")))


def find_local_model(manifest: Manifest, folder: Path | None, store: BlobStore) -> dict[str, Path] | None:
    """Files of the base that the run's experts adapt; None where there is none, or where it is fetched from the swarm.

    Raises ConfigError when `folder` holds another base, or it is nowhere to be had: better now than after hours.
    """
    if manifest.adapter is None:
        return None
    base = manifest.adapter.base
    files = find_base(base, folder, store)
    if files is None and not base.served:
        raise missing_base(base)
    log.info("the base %s %s", base.source, "is here" if files else f"is fetched from the swarm: {base.size / 1e9:.1f} GB")
    fetched = files is not None and all(path.is_relative_to(store.root) for path in files.values())
    return None if fetched else files
