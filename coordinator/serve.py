"""`coordinator serve`: serve one run until it is told to stop, as bootstrap peer, source of blobs, judge and stitcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lutetia.coordinator.admin.base import settle_base
from lutetia.coordinator.admin.rotate import renew_mixture_signature, settle_rotation
from lutetia.coordinator.admin.upgrade import check_version, published_since
from lutetia.coordinator.holdouts import withdraw_holdouts
from lutetia.coordinator.ledger.signed_head import check_head
from lutetia.coordinator.lending.prepare import check_lending, prepare_lending
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.recovery import SignedLineages
from lutetia.coordinator.service import Service
from lutetia.coordinator.settings import ServeSettings
from lutetia.coordinator.snapshot.document import open_with_snapshot
from lutetia.coordinator.web.listener import bind, page_address
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.backend import connect_transport
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.reachability import policy_of
from lutetia.system.errors import AuthorisationError, BootstrapError, ConfigError
from lutetia.system.files import sweep_parts
from lutetia.system.notify import ending_signals

_log = logging.getLogger(__name__)

Connect = Callable[[LiveManifest, Identity, RunFolder, ServeSettings], Awaitable[Transport]]


async def connect(live: LiveManifest, identity: Identity, folder: RunFolder, settings: ServeSettings) -> Transport:
    """Join the real network on the address that the ticket names; after a restart through the peers known from before.

    Records are checked against the newest version of the manifest that `live` has.

    Raises UnreachableError when the port is taken.
    """
    endpoint = folder.read_endpoint()
    policy = await policy_of(_own_addresses(folder, settings))

    async def join(bootstrap: Sequence[str]) -> Transport:
        return await connect_transport(
            identity, listen=settings.listen or endpoint.listen, check=record_check(live, time.time), bootstrap=bootstrap,
            announce=settings.announce or endpoint.announce, state_folder=folder.network, policy=policy,
        )  # fmt: skip

    peers = Peerstore(folder.peers)
    before = peers.load()
    try:
        transport = await join(before)
    except BootstrapError as error:
        _log.info("no peer from before answered; starting alone: %s", error)
        return await join(())
    here = await transport.connections()
    peers.remember([], gone=[address for address in before if address.rpartition("/p2p/")[2] not in here])
    return transport


def _own_addresses(folder: RunFolder, settings: ServeSettings) -> list[str]:
    """Where volunteers dial this coordinator. They show in which networks the run lives."""
    endpoint = folder.read_endpoint()
    listen = settings.listen or endpoint.listen
    with contextlib.suppress(OSError, ConfigError):
        return [listen, *settings.announce, *Ticket.decode(folder.ticket.read_text()).addresses]
    return [listen, *(settings.announce or endpoint.announce)]


@dataclass(frozen=True)
class ServedRun:
    """What a run's owner tells others about it.

    Args:
        name: the run's name.
        ticket: empty if its file is lost.
        page: the address of the status page, if there is one.
    """

    name: str
    ticket: str
    page: str | None


async def serve_run(
    root: Path, settings: ServeSettings | None = None, *, connecting: Connect = connect,
    on_serving: Callable[[ServedRun], None] = lambda run: None,
) -> None:  # fmt: skip
    """Serve the run in `root` until a signal or, with `exit_when_done`, the run ends. It continues where it stopped last.

    Raises:
        ConfigError: no run there, its manifest has expired or is malformed, or the base of its adapters is not here.
        IdentityError: another coordinator serves this run.
        AuthorisationError: the key in the folder is no coordinator of the run.
        IntegrityError: the ledger is damaged, or held-out clips are missing.
        UnreachableError: a port is taken, or the network process ended.
        DiskError: the disk cannot be read or written.
    """
    settings = settings or ServeSettings()
    folder = RunFolder(root)
    signed = folder.read_manifest(time.time())
    with folder.locked(), contextlib.ExitStack() as stack:
        sweep_parts(root)
        settle_rotation(folder)
        identity = Identity.load(folder.coordinator_key)
        if identity.public_key not in signed.manifest.coordinators:
            raise AuthorisationError(
                f"{folder.coordinator_key} is no coordinator of this run; put the key there that the manifest names"
            )
        withdraw_holdouts(folder, signed.manifest)
        settle_base(folder, signed.manifest, settings.base)
        listener = stack.enter_context(bind(settings.http)) if settings.http != "off" else None
        recover = settings.recover or folder.restored.exists()
        ledger, snapshot = open_with_snapshot(folder, signed.manifest.run_id, identity.public_key)
        stack.callback(ledger.close)
        if not recover:
            check_head(folder.head, ledger, signed.manifest)
        newer, live = check_version(folder, signed.manifest, ledger.state), LiveManifest(signed)
        if newer:
            known = ledger.state.manifest_version
            ledger.append(published_since(folder, signed.manifest, known, identity.public_key, time.time()))
        renew_mixture_signature(folder, ledger.state, identity)
        if settings.lend_checks:
            check_lending(folder, settings)
        sizes = await prepare_lending(folder, signed.manifest, settings) if settings.lend_checks else None
        transport = await connecting(live, identity, folder, settings)
        try:
            lineage = SignedLineages(transport, live, identity.public_key)
            if recover:
                await lineage.recover(ledger, signed.manifest.timing.lease)
                folder.restored.unlink(missing_ok=True)
            served = ServedRun(signed.manifest.name, _ticket(folder), listener and page_address(listener))
            service = Service(
                folder,
                live,
                identity,
                ledger,
                transport,
                settings,
                lineage,
                recover,
                sizes,
                snapshot,
                on_serving=lambda: on_serving(served),
            )
            with _signals(service.stopping):
                await service.serve(listener)
        finally:
            await transport.close()


def _ticket(folder: RunFolder) -> str:
    """The run's ticket; empty if somebody has removed its file, which nothing but people needs."""
    try:
        return folder.ticket.read_text().strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """Set `stopping` on SIGTERM, SIGINT or SIGHUP."""
    loop = asyncio.get_running_loop()
    numbers = ending_signals()
    for number in numbers:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
