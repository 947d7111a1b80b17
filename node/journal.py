"""What a node remembers for its own page: verdicts on its checkpoints, its training loss, and the last lines of its log."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import added
from lutetia.system.errors import DiskError
from lutetia.system.files import write_atomic
from lutetia.system.log_format import PlainFormatter

MOST_VERDICTS, MOST_LOSSES, MOST_LINES = 100, 1000, 200
_LONGEST_LINE, LONGEST_TEXT = 300, 500
"""Characters; with these bounds an answer of the control socket holds the journal, however its letters are escaped."""


class NodeVerdict(Frozen):
    """What became of one checkpoint of this node."""

    time: float = Field(description="When the node learnt it, in Unix seconds")
    shard: int = Field(description="Index of the shard")
    lane: int = added(0, "Lane of the shard, in a run with lanes")
    epoch: int = Field(description="Its epoch")
    outcome: Literal["accepted", "refused"] = Field(description="What the coordinator decided")
    text: str = Field(default="", max_length=LONGEST_TEXT, description="Why it was refused, in words")
    checkpoint: str = added("", "Digest of an accepted result of a lane")


class TrainingLoss(Frozen):
    """The training loss at one moment."""

    time: float = Field(description="Unix seconds")
    shard: int = Field(description="Index of the shard")
    lane: int = added(0, "Lane of the shard, in a run with lanes")
    samples: int = Field(description="Samples of the shard that this work has seen so far")
    loss: float = Field(description="Training loss of the last step")


class NodeJournal(Frozen):
    """The journal as its page reads it, each list oldest first."""

    verdicts: tuple[NodeVerdict, ...] = Field(default=(), description="The last verdicts, also of earlier starts")
    losses: tuple[TrainingLoss, ...] = Field(default=(), description="Training losses since the start, evenly thinned out")
    log: tuple[str, ...] = Field(default=(), description="The last lines of the log since the start")


class _Verdicts(Frozen):
    verdicts: tuple[NodeVerdict, ...] = ()


class VerdictBook:
    """The last verdicts on this node's checkpoints, kept in a small file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: tuple[NodeVerdict, ...] = ()
        with contextlib.suppress(OSError, ValidationError):
            self.verdicts = _Verdicts.model_validate_json(path.read_bytes()).verdicts[-MOST_VERDICTS:]

    def add(self, verdict: NodeVerdict) -> None:
        """Keep it, on disk if that takes it: a full disk must not stop training over this."""
        self.verdicts = (*self.verdicts, verdict)[-MOST_VERDICTS:]
        with contextlib.suppress(DiskError, OSError):
            write_atomic(self.path, canonical(_Verdicts(verdicts=self.verdicts)))


def with_loss(known: Sequence[TrainingLoss], new: TrainingLoss, most: int = MOST_LOSSES) -> list[TrainingLoss]:
    """`known` and the new loss; of too many, the one between the nearest neighbours goes, so that the rest is spread evenly.

    Losses of later samples of its lane go, too: the shard goes on from an earlier checkpoint.
    """
    place = new.shard, new.lane
    kept = [each for each in known if (each.shard, each.lane) != place or each.samples < new.samples]
    kept.append(new)
    if len(kept) > most:
        del kept[min(range(1, len(kept) - 1), key=lambda at: kept[at + 1].time - kept[at - 1].time)]
    return kept


class LastLines(logging.Handler):
    """Keeps the last lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(PlainFormatter())
        self.lines: deque[str] = deque(maxlen=MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record)[:_LONGEST_LINE])


@contextlib.contextmanager
def last_lines() -> Iterator[LastLines]:
    """Keep the last lines that Lutetia logs until the block ends."""
    handler, logger = LastLines(), logging.getLogger("lutetia")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
