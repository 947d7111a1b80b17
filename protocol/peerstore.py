"""Addresses of peers met before, on disk. With them a node can rejoin when every bootstrap peer of the ticket is down."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from lutetia.protocol.schema.records import NodeRecord
from lutetia.protocol.schema.ticket import Address
from lutetia.system.errors import DiskError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)

MAX_PEERS = 64
_ADDRESSES = TypeAdapter(Annotated[list[Address], Field(max_length=MAX_PEERS * 8)])


class Peerstore:
    """One file with the addresses of the last MAX_PEERS peers. A damaged file counts as empty."""

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

    def remember(self, addresses: Iterable[str]) -> None:
        """Put `addresses` first and drop the oldest peers beyond MAX_PEERS. A failure to write is only logged."""
        merged = list(dict.fromkeys([*addresses, *self.load()]))
        peers = list(dict.fromkeys(address.rpartition("/p2p/")[2] for address in merged))[:MAX_PEERS]
        kept = [address for address in merged if address.rpartition("/p2p/")[2] in peers][: MAX_PEERS * 8]
        try:
            write_atomic(self.path, json.dumps(kept, indent=1).encode())
        except DiskError as error:
            log.warning("the addresses of peers were not saved: %s", error)

    def remember_nodes(self, records: Iterable[object], except_peer: str = "") -> None:
        """Put the addresses of node records first. Other records, nodes that left and `except_peer` are ignored."""
        nodes = [r for r in records if isinstance(r, NodeRecord) and r.peer_id != except_peer and r.state != "left"]
        self.remember(address for node in nodes for address in node.addresses)
