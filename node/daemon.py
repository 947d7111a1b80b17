"""The daemon of a volunteer's box: from a ticket to training that counts, until it is finished or told to leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from lutetia.node.contributions import Contributions
from lutetia.node.control import ControlRequest, LocalStatus, serve_control
from lutetia.node.machine.messages import UserVerb
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.runtime.workspace import RunPaths, Workspace
from lutetia.node.schedule import WeeklyHours, keep_hours
from lutetia.node.services.auditor import NodeAuditor
from lutetia.node.services.manifest_updates import ManifestUpdates
from lutetia.node.services.membership import Membership
from lutetia.node.services.thermal import check_sensors, keep_cool
from lutetia.node.settings import NodeSettings, announced
from lutetia.node.state_lock import state_lock
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.joining import enter_swarm
from lutetia.protocol.rpc.accepted_checkpoints import AcceptedService
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Transport
from lutetia.system.files import sweep_parts
from lutetia.system.notify import notify

log = logging.getLogger(__name__)

IDENTITY = "identity.key"


async def run_node(settings: NodeSettings) -> None:
    """Join the ticket's run and work for it. Returns when the node has left.

    Raises HardwareError (no sensor for `max_temp`), ConfigError (ticket, manifest, `announce`), IdentityError (two daemons, bad
    key), BootstrapError, UnreachableError or AuthorisationError when it cannot join.
    """
    ticket = settings.decoded_ticket
    if settings.max_temp is not None:
        await asyncio.to_thread(check_sensors, settings.device)
    with state_lock(settings.state_folder):
        for ours in ("runs", "blobs"):  # beside them may lie what is not ours
            sweep_parts(settings.state_folder / ours)
        daemon = NodeDaemon(settings, _identity(settings))
        async with serve_control(settings.state_folder, daemon.answer):
            with daemon.signals():
                log.info("joining run %s as %s", ticket.run[:12], daemon.identity.peer_id)
                await daemon.run()
    log.info("left the run; nothing of it is left running")


def _identity(settings: NodeSettings) -> Identity:
    """The key of this box; the first time, what a volunteer should know about it."""
    path = settings.state_folder / IDENTITY
    new = not path.exists()
    identity = Identity.load_or_create(path)
    if new:
        log.info("this box is now %s; its secret key is %s", identity.peer_id, path)
        log.info(
            "back it up with `lutetia identity export FILE`: whoever has the key is this box, and without it its record is lost"
        )
        log.info("others see: addresses, device, speed, software version, and the checkpoints made here; nothing else is sent")
        log.info(
            "stop with Ctrl-C or `lutetia finish` (hands the checkpoint under way in), `lutetia pause --for 2h`, `lutetia leave`"
        )
    return identity


class NodeDaemon:
    """What lives as long as the process: identity, control, signals; the shell as soon as the network and manifest are known."""

    def __init__(self, settings: NodeSettings, identity: Identity) -> None:
        self.settings, self.identity = settings, identity
        self.started = time.time()
        self.ending = asyncio.Event()
        self.shell: NodeShell | None = None
        self.news: ManifestUpdates | None = None
        self._verbs: list[UserVerb] = []
        self._signals = 0

    async def run(self) -> None:
        """Join, work, leave."""
        places = RunPaths(self.settings.state_folder, self.settings.decoded_ticket.run)
        joining = asyncio.create_task(self.join(places))
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
            await self._work(transport, live, places)
        finally:
            await (self.shell.network.transport if self.shell else transport).close()

    async def join(self, places: RunPaths, live: LiveManifest | None = None) -> tuple[Transport, LiveManifest]:
        """Also used to come back after p2pd has died, then with the manifest known so far."""
        settings = self.settings
        announce = announced(settings.announce, self.identity.peer_id)
        return await enter_swarm(
            self.identity, settings.decoded_ticket,
            listen=settings.listen, announce=announce, state_folder=places.folder, live=live,
        )  # fmt: skip

    async def _work(self, transport: Transport, live: LiveManifest, places: RunPaths) -> None:
        manifest = live()
        store = await asyncio.to_thread(BlobStore, places.blobs, self.settings.disk_limit)
        network = NodeNetwork(self.identity, transport, manifest, self.settings.decoded_ticket, store, self.settings.operator)
        contributions = Contributions(places.folder / "contributions.json")
        shell = NodeShell(self.settings, network, Workspace(places, manifest, store), contributions, self.rejoined)
        self.news = ManifestUpdates(network, live, lambda: shell.upgrade(live()))
        self.shell = shell
        await self.serve(transport, store)
        notify(f"READY=1\nSTATUS=joined run {manifest.name}")
        for verb in self._verbs:
            self.shell.early(verb)
        companions = [self.news.run(), Membership(shell, copies=self.settings.copies).run()]
        if self.settings.hours:
            companions.append(keep_hours(WeeklyHours.parse(self.settings.hours), shell.feed))
        if limit := self.settings.max_temp:
            companions.append(self._keep_cool(shell, limit))
        if self.settings.audits:
            companions.append(NodeAuditor(shell).run())
        await shell.run(*companions)

    async def _keep_cool(self, shell: NodeShell, limit: float) -> None:
        def slowed(why: str | None) -> None:
            shell.slowed = why

        await keep_cool(limit, self.settings.device, lambda share: shell.hands.pace(share * self.settings.duty), slowed)

    async def serve(self, transport: Transport, store: BlobStore) -> None:
        assert self.news
        await serve_blobs(transport, store, self.settings.upload_rate)
        await self.news.serve(transport)
        await AcceptedService(transport, self.news.live).serve()

    async def rejoined(self) -> Transport:
        """A new transport instead of the dead one. Raises LutetiaError when that does not work now."""
        assert self.shell
        assert self.news
        transport, live = await self.join(self.shell.material.places, self.news.live)
        try:
            await self.serve(transport, self.shell.network.store)
            self.shell.upgrade(live())
        except BaseException:
            await transport.close()  # its p2pd would keep the state folder from the next attempt
            raise
        return transport

    # --- what the volunteer says ------------------------------------------------------------------------------------------

    def say(self, event: UserVerb) -> None:
        if self.shell:
            self.shell.feed(event)
        elif event.verb in ("finish", "leave"):
            self.ending.set()
        else:
            self._verbs.append(event)

    async def answer(self, request: ControlRequest) -> dict[str, Any]:
        """What the control socket says."""
        if request.verb != "status":
            now = time.time()
            self.say(UserVerb(now, request.verb, now + request.seconds if request.seconds else None))
        return self.status().model_dump(mode="json")

    def status(self) -> LocalStatus:
        fields: dict[str, Any] = {"state": "joining", "reason": "joining the network", "since": self.started}
        if self.shell:
            fields = self.shell.describe()
        return LocalStatus(
            owner=self.identity.public_key, peer_id=self.identity.peer_id, pid=os.getpid(),
            software=software_version(), started=self.started, **fields,
        )  # fmt: skip

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT means finish, the second leave now."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        self._signals += 1
        now = time.time()
        if self._signals > 1:
            self.say(UserVerb(now, "leave"))
            return
        within = self.settings.stop_within
        log.info("asked to stop: finishing the checkpoint under way within %.0f s; Ctrl-C again leaves at once", within)
        self.say(UserVerb(now, "finish"))
        asyncio.get_running_loop().call_later(within, lambda: self.say(UserVerb(time.time(), "leave")))
