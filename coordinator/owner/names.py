"""What peers with accepted work are called, also while they are away.

Kept in a file that changes, and not in the ledger: who takes a name back, by a record without one, is forgotten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.fields import PEER_NAME
from lutetia.protocol.schema.records import NodeRecord
from lutetia.system.files import write_atomic

MOST_NAMES = 4096


@dataclass
class PeerNames:
    """`names`: public key -> name, as the file at `path` keeps them."""

    path: Path
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            kept = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return
        if isinstance(kept, dict):
            self.names = {
                owner: name for owner, name in list(kept.items())[-MOST_NAMES:] if isinstance(name, str) and _is_name(name)
            }

    def note(self, nodes: Iterable[NodeRecord], known: Container[str]) -> bool:
        """Take over the names in the records of nodes with accepted work. Returns whether something changed."""
        before = dict(self.names)
        for node in nodes:
            if not node.name:
                self.names.pop(node.owner, None)
            elif node.owner in known:
                self.names[node.owner] = node.name
        while len(self.names) > MOST_NAMES:
            del self.names[next(iter(self.names))]
        return self.names != before

    def write(self) -> None:
        """Raises DiskError. Blocks on the disk."""
        write_atomic(self.path, canonical(dict(self.names)))


def _is_name(text: str) -> bool:
    return bool(text) and re.fullmatch(PEER_NAME, text) is not None
