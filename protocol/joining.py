"""Joining a swarm: from a ticket to a peer that is on the network, knows the manifest and is known to the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lutetia.protocol.async_helpers import gather_quickly
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.introduction import (
    HELLO,
    MANIFEST,
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    Hello,
    ask_document,
    serve_introduction,
)
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.identity import Identity, peer_id_of
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import check_upgrade
from lutetia.protocol.schema.records import NodeRecord, node_key, node_keys, read_envelope
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.reachability import answers
from lutetia.system.errors import BootstrapError, ConfigError, IdentityError, LutetiaError
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.protocol.transport.hivemind.p2pd_process import Reachability
    from lutetia.protocol.transport.hivemind.transport import HivemindTransport

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PEERS_FILE = "peers.json"
REMEMBER_PERIOD = 120.0


@dataclass(frozen=True)
class Introduction:
    """What one peer answered. `offset` is its clock minus ours in seconds, give or take `doubt`."""

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
    reach: Reachability | None = None,
    live: LiveManifest | None = None,
) -> tuple[HivemindTransport, LiveManifest]:
    """Go on the network of `ticket`'s run as `identity`, with every record checked against the run's newest manifest.

    The ticket's addresses and the peers met in earlier sessions are dialled together, so a join works while one of them lives.
    The manifest is verified against the keys that the ticket pins and cached in `state_folder`; one older than that is refused.
    What this peer serves and checks records by follows the manifest that is returned (`live` itself where it was given).

    Raises BootstrapError (nobody answers; each address with its reason), ConfigError (another run or protocol, expired or older
    manifest, this clock is wrong), AuthorisationError (manifest by another key), IdentityError (this identity is online
    elsewhere, or the state folder in use), UnreachableError (the listen address is taken).
    """
    from lutetia.protocol.transport.hivemind.transport import HivemindTransport

    transport = await HivemindTransport.start(
        identity, listen=listen, state_folder=state_folder, announce=announce, reach=reach
    )  # fmt: skip
    try:
        live = await _enter(transport, identity, ticket, state_folder, live)
    except BaseException:
        await transport.close()
        raise
    return transport, live


async def join_swarm(
    identity: Identity, ticket: Ticket, *, listen: str = "/ip4/0.0.0.0/tcp/0", state_folder: Path
) -> tuple[HivemindTransport, SignedManifest]:
    """`enter_swarm` for a visit: with the manifest as it is now."""
    transport, live = await enter_swarm(identity, ticket, listen=listen, state_folder=state_folder)
    return transport, live.signed


async def _enter(
    transport: HivemindTransport, identity: Identity, ticket: Ticket, state_folder: Path, live: LiveManifest | None
) -> LiveManifest:
    from lutetia.protocol.record_rules import record_check

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
    friends = {peer.peer_id for peer in met}
    await transport.enter_dht(record_check(newest, transport.now), [a for a in reachable if _peer_of(a) in friends])
    await _refuse_a_double(transport, identity, run, state_folder)
    await serve_introduction(transport, lambda: newest.signed)
    cache.remember(address for address in reachable if _peer_of(address) in friends)
    await remember_nodes(transport, run, cache)
    transport.every(REMEMBER_PERIOD, lambda: remember_nodes(transport, run, cache))
    return newest


def coordinator_addresses(manifest: Manifest, ticket: Ticket) -> dict[str, tuple[str, ...]]:
    """Peer id of each coordinator -> where to dial it: as the ticket says, or, of a coordinator whose key is newer than the
    ticket, at the ticket's places.
    """
    places = tuple(dict.fromkeys(address.rpartition("/p2p/")[0] for address in ticket.addresses))
    found: dict[str, tuple[str, ...]] = {}
    for peer in map(peer_id_of, manifest.coordinators):
        own = tuple(address for address in ticket.addresses if _peer_of(address) == peer)
        found[peer] = own or tuple(f"{place}/p2p/{peer}" for place in places)
    return found


async def _dial(transport: HivemindTransport, ticket: Ticket, cache: Peerstore, known: SignedManifest | None) -> list[str]:
    """The addresses that answer. Raises BootstrapError."""
    from lutetia.protocol.transport.hivemind.transport import bootstrap_sentence

    rotated = [a for found in coordinator_addresses(known.manifest, ticket).values() for a in found] if known else []
    wanted = [a for a in dict.fromkeys([*ticket.addresses, *rotated, *cache.load()]) if _peer_of(a) != transport.peer_id]
    if not wanted:
        raise BootstrapError("every address of the ticket is this peer's own; join with another identity than the coordinator's")
    refused = await transport.dial_each(wanted)
    reachable = [address for address in wanted if address not in refused]
    for address, reason in refused.items():
        log.info("cannot reach %s: %s", address, reason)
    if not reachable:
        raise BootstrapError(bootstrap_sentence(refused))
    if all(address in refused for address in ticket.addresses):
        log.warning("all bootstrap peers of the ticket are down; joining through %d peers met before", len(reachable))
    return reachable


async def _meet(transport: Transport, ticket: Ticket, reachable: Sequence[str]) -> list[Introduction]:
    """Ask every reachable peer who it is. Raises BootstrapError or ConfigError when none of them is of our run."""
    peer_ids = list(dict.fromkeys(_peer_of(address) for address in reachable))
    replies = await gather_quickly(
        [_introduce(transport, peer_id) for peer_id in peer_ids], lambda reply: isinstance(reply, Introduction)
    )
    met = [reply for reply in replies if isinstance(reply, Introduction)]
    if not met:
        reasons = "; ".join(str(reply) for reply in replies)
        raise BootstrapError(f"none of the {len(peer_ids)} reachable peers introduces itself ({reasons}); try again later")
    ours = [peer for peer in met if peer.hello.run == ticket.run and peer.hello.protocol == PROTOCOL_VERSION]
    if not ours:
        other = met[0].hello
        if other.run != ticket.run:
            raise ConfigError(f"the peers of this ticket serve run {other.run[:12]}, not {ticket.run[:12]}; get a new ticket")
        raise ConfigError(
            f"the swarm speaks protocol {other.protocol} (software {other.software}), this box {PROTOCOL_VERSION}; "
            "install the matching version of lutetia"
        )
    return ours


async def _introduce(transport: Transport, peer_id: str) -> Introduction | ConnectionError:
    try:
        sent = transport.now()
        hello = Hello.model_validate_json(await ask_document(transport, peer_id, HELLO, limit_bytes=MAX_HELLO_BYTES))
        received = transport.now()
        manifest = await ask_document(transport, peer_id, MANIFEST, limit_bytes=MAX_MANIFEST_BYTES)
    except ConnectionError as error:
        return error
    except ValidationError:
        return ConnectionError(f"peer {peer_id} speaks another protocol")
    return Introduction(peer_id, hello, manifest, hello.clock - (sent + received) / 2, (received - sent) / 2)


def choose_manifest(ticket: Ticket, met: Sequence[Introduction], cached: Path, now: float) -> SignedManifest:
    """The newest valid manifest among those offered and the cached one, which then replaces the cached one.

    Raises what is wrong with the best offer when there is none (ConfigError or AuthorisationError).
    """
    known = _load_cached(cached, ticket)
    least = known.manifest.version if known else 1
    offered: list[SignedManifest] = []
    problem: LutetiaError | None = None
    for peer in met:
        try:
            found = open_manifest(peer.manifest, now=now, run=ticket.run, owner=ticket.owner, at_least_version=least)
            if known and found.manifest.version > least:
                check_upgrade(known.manifest, found.manifest)
            offered.append(found)
        except LutetiaError as error:
            log.warning("peer %s offers a manifest that is refused: %s", peer.peer_id, error)
            problem = error
    if known and known.manifest.expires > now:
        offered.append(known)
    if not offered:
        raise problem or BootstrapError("no peer offers a manifest; try again later")
    best = max(offered, key=lambda signed: signed.manifest.version)
    write_atomic(cached, best.to_bytes())
    return best


def check_clock(met: Sequence[Introduction], tolerance: float) -> None:
    """Raises ConfigError when this clock differs from the median of the peers' by more than `tolerance` seconds."""
    offset = median(peer.offset for peer in met)
    if abs(offset) > tolerance + max(peer.doubt for peer in met):
        word = "behind" if offset > 0 else "ahead of"
        raise ConfigError(
            f"this machine's clock is {abs(offset):.0f} s {word} the swarm's, and the run allows {tolerance:.0f} s; "
            "synchronise it (for instance: timedatectl set-ntp true)"
        )


def _load_cached(path: Path, ticket: Ticket) -> SignedManifest | None:
    """The manifest of an earlier session, expired or not; one that is damaged or of another run counts as none."""
    with contextlib.suppress(OSError, LutetiaError):
        return open_manifest(path.read_bytes(), now=float("-inf"), run=ticket.run, owner=ticket.owner)
    return None


async def _refuse_a_double(transport: Transport, identity: Identity, run: str, state_folder: Path) -> None:
    """Two boxes with one key fight over every record. A live node record of ours at another address may be our own past: dial it.

    Raises IdentityError when a peer that proves our identity answers there.
    """
    stored = (await transport.get(node_key(run, identity.public_key))).get(identity.public_key)
    record = read_envelope(stored.value) if stored else None
    if not isinstance(record, NodeRecord):
        return
    foreign = [address for address in record.addresses if address not in transport.addresses()]
    suspects = [address for address, there in zip(foreign, await asyncio.gather(*map(answers, foreign)), strict=True) if there]
    if suspects and await _proves_identity(suspects, identity.peer_id, state_folder):
        raise IdentityError(
            f"another box is online under this identity, at {suspects[0]}; give this box its own (remove the copied key, or "
            "choose another state folder)"
        )


async def _proves_identity(addresses: Sequence[str], peer_id: str, state_folder: Path) -> bool:
    """Dial as a stranger: libp2p's handshake succeeds only if the other side holds the key of `peer_id`."""
    from lutetia.protocol.transport.hivemind.p2pd_process import P2pdProcess

    stranger = await P2pdProcess.start(Identity.generate(), "/ip4/127.0.0.1/tcp/0", state_folder / "stranger")
    try:
        await stranger.control.connect(peer_id, addresses)
    except ConnectionError:
        return False
    else:
        return True
    finally:
        await stranger.close()


async def remember_nodes(transport: Transport, run: str, cache: Peerstore) -> None:
    """Note the addresses of the nodes that are online now, for a later join without the ticket's bootstrap peers."""
    found = await asyncio.gather(*(transport.get(key) for key in node_keys(run)))
    records = [read_envelope(stored.value) for values in found for stored in values.values()]
    cache.remember_nodes(records, except_peer=transport.peer_id)


def _peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2]
