"""Counts the accepted and refused checkpoints of this node and what it does for the coordinator meanwhile, across restarts."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lutetia.node.journal import LONGEST_TEXT, NodeVerdict, VerdictBook
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.system.errors import DiskError
from lutetia.system.files import write_atomic

_RECENT_SECONDS = 2 * 86_400.0


class _Book(Frozen):
    accepted: int = 0
    refused: int = 0
    last_accepted: float | None = None
    recent: tuple[float, ...] = ()
    audits: tuple[float, ...] = ()
    checks: tuple[float, ...] = ()


def _with(times: tuple[float, ...], now: float) -> tuple[float, ...]:
    """The recent ones of `times`, and `now`."""
    return (*(at for at in times if now - at < _RECENT_SECONDS), now)


class Contributions:
    """Accepted and refused checkpoints of one run, kept in a small file. Times are Unix seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts = VerdictBook(path.with_name("verdicts.json"))
        self._book = _Book()
        with contextlib.suppress(OSError, ValidationError):
            self._book = _Book.model_validate_json(path.read_bytes())

    @property
    def accepted(self) -> int:
        return self._book.accepted

    @property
    def refused(self) -> int:
        return self._book.refused

    @property
    def last_accepted(self) -> float | None:
        return self._book.last_accepted

    def today(self, now: float, what: Literal["recent", "audits", "checks"] = "recent") -> int:
        """Accepted checkpoints, or audits or checks carried out, since local midnight."""
        midnight = datetime.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        return sum(at >= midnight for at in getattr(self._book, what))

    def count_help(self, now: float, what: Literal["audits", "checks"]) -> None:
        """An audit or check was carried out for the coordinator."""
        self._book = self._book.model_copy(update={what: _with(getattr(self._book, what), now)})
        self._save()

    def count_accepted(self, now: float, slot: int, epoch: int, digest: str = "") -> None:
        """`digest`: of a checkpoint that may be reported again; it is counted once."""
        if digest and any(known.checkpoint == digest for known in self.verdicts.verdicts):
            return
        shard, lane = shard_and_lane(slot)
        self.verdicts.add(NodeVerdict(time=now, shard=shard, lane=lane, epoch=epoch, outcome="accepted", checkpoint=digest))
        recent = {"last_accepted": now, "recent": _with(self._book.recent, now)}
        self._book = self._book.model_copy(update={"accepted": self.accepted + 1, **recent})
        self._save()

    def count_refused(self, now: float, slot: int, epoch: int, text: str) -> None:
        shard, lane = shard_and_lane(slot)
        self.verdicts.add(NodeVerdict(time=now, shard=shard, lane=lane, epoch=epoch, outcome="refused", text=text[:LONGEST_TEXT]))
        self._book = self._book.model_copy(update={"refused": self.refused + 1})
        self._save()

    def _save(self) -> None:
        with contextlib.suppress(DiskError, OSError):  # a full disk must not stop training over a statistic
            write_atomic(self.path, canonical(self._book))
