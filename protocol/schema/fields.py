"""Types of the fields that peers exchange. Each has bounds: no single number, text or list may end or delay its reader.

`tests/test_walls.py` walks every document that crosses the wire and fails on a field without bounds.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lutetia.system.errors import plain

MOST_SHARDS = 4096
MOST_LANES = 256
LONGEST_SENTENCE = 1000
LONGEST_EXPLANATION = 400
_LARGEST_COUNT = 10**15  # exact as a float, too: below 2**53
_LARGEST_FLOAT32 = 1e39
_NO_WORD = re.compile(r"[^A-Za-z0-9 ._,:;()+/@#*=%-]")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9 ._,:;()+/@#*=%-]{0,64}")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
PeerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9]{20,80}$")]
Label = Annotated[str, Field(max_length=512, pattern=r"^\P{C}*$")]
"""One printable line, for instance a path or the name of a model."""

Count = Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
Tally = Annotated[int, Field(ge=0, le=_LARGEST_COUNT)]
"""A count that may be 0."""
Extent = Annotated[int, Field(ge=1, le=1 << 20)]
"""The size of one axis of a tensor."""
ShardIndex = Annotated[int, Field(ge=0, le=MOST_SHARDS - 1)]
LaneIndex = Annotated[int, Field(ge=0, le=MOST_LANES - 1)]
EpochCount = Annotated[int, Field(ge=0, le=10**9)]
"""How many epochs of a shard, or how many of its rollbacks."""
EpochNumber = Annotated[int, Field(ge=1, le=10**9)]
"""An epoch of a shard, 1 for the first; or a term, 1 after the first rollback."""
EpochsByShard = Annotated[tuple[EpochCount, ...], Field(max_length=MOST_SHARDS)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]

Moment = Annotated[float, Field(ge=-1e10, le=1e11)]
"""Unix seconds, up to the year 5138."""
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Rate = Annotated[float, Field(ge=0, le=1e9)]
"""Per second, or a fraction without an upper limit of its own."""
Real = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
MeasuredLoss = Annotated[float, Field(ge=-_LARGEST_FLOAT32, le=_LARGEST_FLOAT32)]
"""A loss that this program measured: any float32."""


def _clamped(least: float, most: float) -> BeforeValidator:
    return BeforeValidator(lambda value: min(max(value, least), most) if type(value) in (int, float) else value)


ReportedLoss = Annotated[MeasuredLoss, _clamped(-_LARGEST_FLOAT32, _LARGEST_FLOAT32)]
"""A loss that a peer reports and no check depends on. An absurd one is cut: ledgers of release 0.1 may hold it."""
ReportedBatch = Annotated[int, Field(ge=1, le=1 << 20), _clamped(-1, 1 << 20)]
"""Samples at once, as a peer reports them; cut like `ReportedLoss`."""


def sentence(text: str, most: int = LONGEST_SENTENCE) -> str:
    """`text` on one printable line of at most `most` characters."""
    text = plain(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def word(text: str) -> str:
    """`text` in the characters that words of records may have, at most 64 of them; every other one becomes `?`, ™ TM, é e.

    No character among them is markup of a terminal, a page or a log.
    """
    if _PLAIN_WORD.fullmatch(text):
        return text
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", text[:256]) if not unicodedata.combining(letter))
    return _NO_WORD.sub("?", letters)[:64]


LONGEST_PEER_NAME = 32
PEER_NAME = r"^([A-Za-z0-9]([A-Za-z0-9 ._-]{0,30}[A-Za-z0-9])?)?$"


def peer_name(text: str) -> str:
    """`text` if it is a name that a peer may show, else nothing: a strange name must not cost a peer its records."""
    return text if re.fullmatch(PEER_NAME, text) else ""


def _texts(change: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: change(value) if isinstance(value, str) else value)


Sentence = Annotated[str, Field(max_length=LONGEST_SENTENCE), _texts(sentence)]
"""A reason, for people. It is cut where it is made and where it is read, so no reply can fail its own schema."""
Explanation = Annotated[str, Field(max_length=LONGEST_EXPLANATION), _texts(lambda text: sentence(text, LONGEST_EXPLANATION))]
"""A sentence in a list that must stay small; cut like `Sentence`."""
Word = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9 ._,:;()+/@#*=%?-]*$"), _texts(word)]
"""A word in a record: what a device is called, a version. Other characters are replaced on reading and writing."""
PeerName = Annotated[str, Field(max_length=LONGEST_PEER_NAME, pattern=PEER_NAME), _texts(peer_name)]
"""What a volunteer calls a node, or nothing. Letters and digits of ASCII with spaces, dots and dashes between: no markup, and no
letters that look like others."""
OpenWord = Annotated[str, Field(pattern=r"^[a-z][a-z0-9 -]{0,31}$")]
"""A value of a list that later versions may lengthen; readers show one that they do not know as it is."""


def added(default: Any, description: str, **limits: Any) -> Any:
    """A field that came after release 0.1: it is not written while it has its `default`.

    Older peers thus read and hash documents that do not use it as before. `limits`: as for `pydantic.Field`.
    """
    return Field(default=default, description=description, exclude_if=lambda value: value == default, **limits)
