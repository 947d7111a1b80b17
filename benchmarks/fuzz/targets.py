"""All targets by name: parsers, and decisions on what was parsed. Those that need torch are imported only when asked for."""

from __future__ import annotations

from benchmarks.fuzz.contract import Target
from benchmarks.fuzz.decisions import DECISIONS
from benchmarks.fuzz.documents import DOCUMENTS
from benchmarks.fuzz.files import FILES
from benchmarks.fuzz.streams import STREAMS

LIGHT: dict[str, Target] = {target.name: target for target in (*DOCUMENTS, *STREAMS, *FILES, *DECISIONS)}
TENSOR_NAMES = ("weights", "state", "shard", "weights-header", "state-header", "shard-header")
NAMES = (*LIGHT, *TENSOR_NAMES)


def target(name: str) -> Target:
    """Raises KeyError."""
    if name in LIGHT:
        return LIGHT[name]
    from benchmarks.fuzz.tensors import TENSORS

    return {found.name: found for found in TENSORS}[name]
