"""Join a swarm: start the transport, dial the ticket's addresses, verify the manifest, enter the DHT."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lutetia.protocol.async_helpers import gather_quickly
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import (
    MANIFEST,
    OLDEST_PROTOCOL,
    PROTOCOL_VERSION,
    Hello,
    ask_document,
    ask_hello,
    serve_introduction,
)
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity, peer_id_of
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import check_upgrade
from lutetia.protocol.schema.records import NodeRecord, node_key, node_keys, read_envelope
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.backend import start_transport
from lutetia.protocol.transport.base import StartTransport, Transport
from lutetia.protocol.transport.reachability import bootstrap_failure, policy_of
from lutetia.system.errors import BootstrapError, ConfigError, IdentityError, LutetiaError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PEERS_FILE = "peers.json"
REMEMBER_PERIOD = 120.0


@dataclass(frozen=True)
class Introduction:
    """What one peer answered. `offset` is its clock minus ours in seconds, plus or minus `doubt`."""

    peer_id: str
    hello: Hello
    manifest: bytes
    offset: float
    doubt: float


async def enter_swarm(
    identity: Identity,
    ticket: Ticket,
    *,
    listen: str = "/ip4/0.0.0.0/tcp/0",
    state_folder: Path,
    announce: Sequence[str] = (),
    live: LiveManifest | None = None,
    start: StartTransport = start_transport,
) -> tuple[Transport, LiveManifest]:
    """Join the swarm of `ticket` as `identity`. Every record is checked against the newest manifest known.

    The ticket's addresses and those of peers met in earlier sessions are dialled together: one live peer is enough to join.
    The manifest is verified against the keys that the ticket pins, and cached in `state_folder`; an older one is refused.

    Args:
        identity: The key of this peer.
        ticket: Where to join which run.
        listen: The multiaddr to listen at.
        state_folder: Folder of the transport's files, the cached manifest and the peers met.
        announce: Multiaddrs to publish in place of those that the transport finds out.
        live: The manifest known so far, to be kept up to date. Given, it is also the one that is returned.
        start: Starts the transport.

    Raises:
        BootstrapError: No address answers; the text names each one with its reason.
        ConfigError: Another run or protocol, an expired or older manifest, or a wrong clock on this machine.
        AuthorisationError: The manifest is signed by another key.
        IdentityError: This identity is online elsewhere, or the state folder is in use.
        UnreachableError: The listen address is taken.
    """
    transport = await start(identity, listen=listen, state_folder=state_folder, announce=announce)
    try:
        live = await _enter(transport, identity, ticket, state_folder, live)
    except BaseException:
        await transport.close()
        raise
    return transport, live


async def join_swarm(
    identity: Identity,
    ticket: Ticket,
    *,
    listen: str = "/ip4/0.0.0.0/tcp/0",
    state_folder: Path,
    start: StartTransport = start_transport,
) -> tuple[Transport, SignedManifest]:
    """`enter_swarm` for a short visit: returns the manifest as it is now, which is not updated."""
    transport, live = await enter_swarm(identity, ticket, listen=listen, state_folder=state_folder, start=start)
    return transport, live.signed


async def _enter(
    transport: Transport, identity: Identity, ticket: Ticket, state_folder: Path, live: LiveManifest | None
) -> LiveManifest:
    cache, cached = Peerstore(state_folder / PEERS_FILE), state_folder / MANIFEST_FILE
    reachable = await _dial(transport, ticket, cache, _load_cached(cached, ticket))
    met = await _meet(transport, ticket, reachable)
    signed = choose_manifest(ticket, met, cached, transport.now())
    check_clock(met, signed.manifest.timing.maximum_clock_skew)
    if live is None:
        live = LiveManifest(signed, cached)
    elif signed.manifest.version > live.version:
        live.signed = signed
    newest, run = live, signed.manifest.run_id
    met_ids = {peer.peer_id for peer in met}
    await transport.enter_dht(record_check(newest, transport.now), [a for a in reachable if _peer_of(a) in met_ids])
    await _refuse_double(transport, identity, run)
    await serve_introduction(transport, lambda: newest.signed)
    cache.remember(address for address in reachable if _peer_of(address) in met_ids)
    await remember_nodes(transport, run, cache)
    transport.every(REMEMBER_PERIOD, lambda: remember_nodes(transport, run, cache))
    return newest


def coordinator_addresses(manifest: Manifest, ticket: Ticket) -> dict[str, tuple[str, ...]]:
    """Where to dial each coordinator, by peer id.

    A coordinator whose key is newer than the ticket is looked for at every host and port of the ticket.
    """
    places = tuple(dict.fromkeys(address.rpartition("/p2p/")[0] for address in ticket.addresses))
    addresses: dict[str, tuple[str, ...]] = {}
    for peer in map(peer_id_of, manifest.coordinators):
        named = tuple(address for address in ticket.addresses if _peer_of(address) == peer)
        addresses[peer] = named or tuple(f"{place}/p2p/{peer}" for place in places)
    return addresses


async def _dial(transport: Transport, ticket: Ticket, cache: Peerstore, known: SignedManifest | None) -> list[str]:
    """The addresses that answer. Raises BootstrapError."""
    rotated = [a for addresses in coordinator_addresses(known.manifest, ticket).values() for a in addresses] if known else []
    trusted, cached = dict.fromkeys([*ticket.addresses, *rotated]), cache.load()
    transport.limit_dials(await policy_of(trusted))
    wanted = [address for address in dict.fromkeys([*trusted, *cached]) if _peer_of(address) != transport.peer_id]
    if not wanted:
        raise BootstrapError("every address of the ticket is this peer's own; join with an identity other than the coordinator's")
    refused = await transport.dial_each(wanted)
    reachable = [address for address in wanted if address not in refused]
    for address, reason in refused.items():
        log.info("cannot reach %s: %s", address, reason)
    if not reachable:
        raise BootstrapError(bootstrap_failure(refused))
    cache.remember([], gone=refused.keys())
    if all(address in refused for address in ticket.addresses):
        log.warning("no address of the ticket answers; joining through %d peers met before", len(reachable))
    return reachable


async def _meet(transport: Transport, ticket: Ticket, reachable: Sequence[str]) -> list[Introduction]:
    """Ask every reachable peer for its introduction. Raises BootstrapError or ConfigError when none serves the ticket's run."""
    peer_ids = list(dict.fromkeys(_peer_of(address) for address in reachable))
    replies = await gather_quickly(
        [_introduce(transport, peer_id) for peer_id in peer_ids], lambda reply: isinstance(reply, Introduction)
    )
    met = [reply for reply in replies if isinstance(reply, Introduction)]
    if not met:
        reasons = "; ".join(str(reply) for reply in replies)
        raise BootstrapError(f"none of the {len(peer_ids)} reachable peers introduces itself ({reasons}); try again later")
    matching = [peer for peer in met if peer.hello.run == ticket.run and peer.hello.understood]
    if not matching:
        other = met[0].hello
        if other.run != ticket.run:
            raise ConfigError(f"the peers of this ticket serve run {other.run[:12]}, not {ticket.run[:12]}; get a new ticket")
        raise ConfigError(
            f"the swarm speaks protocol {other.protocol} (software {other.software}), this node {OLDEST_PROTOCOL} to "
            f"{PROTOCOL_VERSION}; install the matching version of lutetia"
        )
    return matching


async def _introduce(transport: Transport, peer_id: str) -> Introduction | ConnectionError:
    try:
        answer = await ask_hello(transport, peer_id)
        manifest = await ask_document(transport, peer_id, MANIFEST, limit_bytes=MAX_MANIFEST_BYTES)
    except ConnectionError as error:
        return error
    sent, received = answer.sent, answer.received
    return Introduction(peer_id, answer.hello, manifest, answer.hello.clock - (sent + received) / 2, (received - sent) / 2)


def choose_manifest(ticket: Ticket, met: Sequence[Introduction], cached: Path, now: float) -> SignedManifest:
    """The newest valid manifest among the offered ones and the cached one. It is then written to `cached`.

    Args:
        ticket: Pins the run and the owner's key.
        met: The peers that offer manifests.
        cached: File of the newest manifest of earlier sessions; an older one is refused.
        now: Unix seconds.

    Raises ConfigError or AuthorisationError, with the problem of the last offer, when no manifest is valid.
    """
    known = _load_cached(cached, ticket)
    least = known.manifest.version if known else 1
    offered = [known] if known and known.manifest.expires > now else []  # first: it stays when an owner signed its version twice
    problem: LutetiaError | None = None
    for peer in met:
        try:
            signed = open_manifest(peer.manifest, now=now, run=ticket.run, owner=ticket.owner, at_least_version=least)
            if known and signed.manifest.version > least:
                check_upgrade(known.manifest, signed.manifest)
            offered.append(signed)
        except LutetiaError as error:
            log.warning("refused the manifest of peer %s: %s", peer.peer_id, error)
            problem = error
    if not offered:
        raise problem or BootstrapError("no peer offers a manifest; try again later")
    best = max(offered, key=lambda signed: signed.manifest.version)
    write_atomic(cached, best.to_bytes())
    return best


def check_clock(met: Sequence[Introduction], tolerance: float) -> None:
    """Raises ConfigError when this clock differs from the median of the peers' by more than `tolerance` seconds."""
    offset = median(peer.offset for peer in met)
    if abs(offset) > tolerance + max(peer.doubt for peer in met):
        direction = "behind" if offset > 0 else "ahead of"
        raise ConfigError(
            f"this machine's clock is {abs(offset):.0f} s {direction} the swarm's, and the run allows {tolerance:.0f} s; "
            "synchronise it (for instance: timedatectl set-ntp true)"
        )


def _load_cached(path: Path, ticket: Ticket) -> SignedManifest | None:
    """The manifest of an earlier session, even if it has expired. A damaged one, or one of another run, is ignored."""
    with contextlib.suppress(OSError, LutetiaError):
        return open_manifest(path.read_bytes(), now=float("-inf"), run=ticket.run, owner=ticket.owner)
    return None


async def _refuse_double(transport: Transport, identity: Identity, run: str) -> None:
    """Raises IdentityError when another peer is online under this identity: the two would replace each other's records.

    A live node record at another address may be left over from this node's last start, so a peer there must prove our key.
    """
    stored = (await transport.get(node_key(run, identity.public_key))).get(identity.public_key)
    record = read_envelope(stored.value) if stored else None
    if not isinstance(record, NodeRecord):
        return
    double = await transport.find_double([address for address in record.addresses if address not in transport.addresses()])
    if double:
        raise IdentityError(
            f"another node is online under this identity, at {double}; give this node its own (remove the copied key, or "
            "choose another state folder)"
        )


async def remember_nodes(transport: Transport, run: str, cache: Peerstore) -> None:
    """Save the addresses of the nodes that this peer is connected to, for a later join without the ticket's bootstrap peers."""
    stored_by_key = await asyncio.gather(*(transport.get(key) for key in node_keys(run)))
    records = [read_envelope(stored.value) for values in stored_by_key for stored in values.values()]
    cache.remember_nodes(records, await transport.connections(), except_peer=transport.peer_id)


def _peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2]
