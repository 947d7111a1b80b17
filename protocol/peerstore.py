"""Addresses of peers spoken to before, on disk. With them a node can rejoin when every bootstrap peer of the ticket is down."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from lutetia.protocol.schema.records import NodeRecord
from lutetia.protocol.schema.ticket import Address
from lutetia.protocol.transport.dial_policy import host_of
from lutetia.system.errors import DiskError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)

MAX_PEERS = 64
PER_HOST = 4
"""Peers of one host that are remembered, and addresses of one host: whoever dials them must not flood it."""
_PER_PEER = 2
_ADDRESS = TypeAdapter(Address)
_ADDRESSES = TypeAdapter(Annotated[list[Address], Field(max_length=MAX_PEERS * 8)])


class Peerstore:
    """One file with up to two addresses of each of the last MAX_PEERS peers. A damaged file counts as empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[str]:
        """Multiaddrs with peer id, the most recently seen first."""
        try:
            return list(_ADDRESSES.validate_json(self.path.read_bytes()))
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            log.warning("ignored the saved peers in %s: %s", self.path, str(error).splitlines()[0])
            return []

    def remember(self, addresses: Iterable[str], gone: Collection[str] = ()) -> None:
        """Put `addresses` first and drop those that are `gone`. A failure to write is only logged.

        Of each peer's addresses the first must be the one at which it was seen.
        """
        kept = addresses_to_keep([*addresses, *(address for address in self.load() if address not in gone)])
        try:
            write_atomic(self.path, json.dumps(kept, indent=1).encode())
        except DiskError as error:
            log.warning("the addresses of peers were not saved: %s", error)

    def remember_nodes(self, records: Iterable[object], connections: Mapping[str, str], except_peer: str = "") -> None:
        """Put the peers first that this peer is connected to and that have a node record.

        Args:
            records: Records of the DHT. Those of other kinds, of nodes that left and of `except_peer` are ignored.
            connections: The address of each connected peer, by peer id (`Transport.connections`).
            except_peer: This peer's own id.
        """
        nodes = [r for r in records if isinstance(r, NodeRecord) and r.peer_id != except_peer and r.state != "left"]
        spoken = [(node, connections[node.peer_id]) for node in nodes if node.peer_id in connections]
        self.remember(address for node, seen in spoken for address in _places(node, seen))


def addresses_to_keep(addresses: Iterable[str]) -> list[str]:
    """The addresses worth remembering, in their order: two of each peer, and PER_HOST peers and addresses of each host.

    A liar can name any address, but not be seen at many hosts. So a peer counts for the host of its first address.
    """
    by_peer: dict[str, list[str]] = {}
    for address in dict.fromkeys(addresses):
        by_peer.setdefault(address.rpartition("/p2p/")[2], []).append(address)
    kept: list[str] = []
    peers, dialled = Counter[str](), Counter[str]()
    for places in by_peer.values():
        seen_at = str(host_of(places[0]))
        if peers[seen_at] >= PER_HOST or peers.total() >= MAX_PEERS:
            continue
        peers[seen_at] += 1
        for address in places[:_PER_PEER]:
            host = str(host_of(address))
            if dialled[host] < PER_HOST:
                dialled[host] += 1
                kept.append(address)
    return kept


def _places(node: NodeRecord, seen: str) -> list[str]:
    """The address at which a node is seen, and one that it announces: on the same host if there is one."""
    observed = f"{seen}/p2p/{node.peer_id}"
    host = host_of(observed)
    others = sorted(node.addresses, key=lambda address: host_of(address) != host)
    return [address for address in (observed, *others[:1]) if _is_address(address)]


def _is_address(address: str) -> bool:
    try:
        _ADDRESS.validate_python(address)
    except ValidationError:
        return False
    return True
