"""Who is sent blobs at once, and how fast: an upload is shared so that every answer makes progress.

A receiver that reads as slowly as is allowed would keep its slot for days. So an answer that has had time for a chunk gives way
to one that waits: if it is slower than half of its share, or if its prefix has at least two slots more than that of the waiting
one. The one with the least progress is chosen. It loses at most a chunk, and may ask again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.transport.network_origin import prefix_of

PIECE = 1 << 18
MAX_STREAMS = 64
STALL_TIMEOUT = 20.0
"""Seconds without PIECE bytes of progress after which a peer counts as stalled: at least 13 KiB/s are needed."""
TURN_TIMEOUT = STALL_TIMEOUT / 2
"""Seconds that a request waits for other answers to end before it is refused as BUSY."""
HELD_SECONDS = CHUNK / PIECE * STALL_TIMEOUT
"""An answer keeps its slot at least for so long: within it the slowest receiver that is allowed gets a chunk."""
_LOOK_SECONDS = 1.0


class RateLimit:
    """At most `bytes_per_second` over all streams together. None is no limit. `taken`: bytes that were asked for so far."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self.bytes_per_second = self._rate = bytes_per_second
        self._free_at = 0.0
        self.taken = 0

    @property
    def answers_at_once(self) -> int:
        """How many answers can share the rate so that each sends a PIECE in half of STALL_TIMEOUT."""
        return max(1, min(MAX_STREAMS, int(self._rate * STALL_TIMEOUT / (2 * PIECE)))) if self._rate else MAX_STREAMS

    async def take(self, count: int) -> None:
        self.taken += count
        if self._rate:
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now) + count / self._rate
            try:
                await asyncio.sleep(self._free_at - now)
            except asyncio.CancelledError:
                self._free_at -= count / self._rate  # not sent
                self.taken -= count
                raise


@dataclass(eq=False)
class AnswerSlot:
    """An answer in progress: where it goes, since when (seconds of the loop's clock), its task and the bytes `sent`.

    `task` None: it does not give way.
    """

    origin: str
    since: float
    task: asyncio.Task[object] | None
    sent: int = 0

    def pace(self, now: float) -> float:
        """Bytes a second so far."""
        return self.sent / max(now - self.since, 1e-9)


@dataclass(frozen=True, eq=False)
class _Turn:
    """A request that waits for a slot, and the task that will use it; None: that task must not be ended."""

    origin: str
    task: asyncio.Task[object] | None
    slot: asyncio.Future[AnswerSlot]


def yields(taken: Collection[AnswerSlot], waiting: str, now: float, share: float) -> AnswerSlot | None:
    """Which answer ends so that one of origin `waiting` gets its slot; None: it goes on waiting.

    Args:
        taken: The answers in progress.
        waiting: Network origin of the request that waits.
        now: Seconds of the loop's clock.
        share: Bytes a second that each answer gets when all slots are taken; 0 where nothing limits the upload.
    """
    prefixes = Counter(prefix_of(slot.origin) for slot in taken)
    own = prefixes[prefix_of(waiting)]
    may_end = (
        slot
        for slot in taken
        if slot.task
        and now - slot.since >= HELD_SECONDS
        and (slot.pace(now) < share / 2 or prefixes[prefix_of(slot.origin)] >= own + 2)
    )
    return min(may_end, key=lambda slot: slot.pace(now), default=None)


class AnswerSlots:
    """Limits the answers in progress to `places`, half of them for one prefix. Others wait for up to TURN_TIMEOUT.

    The next place goes to the prefix that has the fewest. While somebody waits, answers give way (`yields`): their tasks are
    cancelled. Without a limit all would share the rate, until none gets enough to make progress.
    """

    def __init__(self, places: int, bytes_per_second: float | None = None) -> None:
        self._places, self._most = places, (places + 1) // 2
        self._share = (bytes_per_second or 0.0) / places
        self._taken: set[AnswerSlot] = set()
        self._waiting: list[_Turn] = []

    async def take(self, origin: str, *, may_end: bool = True) -> AnswerSlot | None:
        """Wait for a slot for the current task, which must give it back. None: none came free in TURN_TIMEOUT.

        Args:
            origin: Where the answer goes.
            may_end: Whether the current task may be cancelled when others wait.
        """
        loop = asyncio.get_running_loop()
        turn = _Turn(origin, asyncio.current_task() if may_end else None, loop.create_future())
        self._waiting.append(turn)
        self._admit(loop.time())
        until = loop.time() + TURN_TIMEOUT
        try:
            while not turn.slot.done() and (left := until - loop.time()) > 0:
                await asyncio.wait([turn.slot], timeout=min(_LOOK_SECONDS, left))
                self._make_way(turn, loop.time())
        except BaseException:
            if turn.slot.done():
                self.give_back(turn.slot.result())  # it got its slot just as the wait ended
            else:
                self._waiting.remove(turn)
            raise
        if turn.slot.done():
            return turn.slot.result()
        self._waiting.remove(turn)
        return None

    def give_back(self, slot: AnswerSlot) -> None:
        """Free a slot. Idempotent."""
        self._taken.discard(slot)
        self._admit(asyncio.get_running_loop().time())

    def _make_way(self, turn: _Turn, now: float) -> None:
        """End an answer for a request that waits for a slot, if one gives way to it."""
        own = sum(prefix_of(slot.origin) == prefix_of(turn.origin) for slot in self._taken)
        if turn.slot.done() or len(self._taken) < self._places or own >= self._most:
            return
        slot = yields(self._taken, turn.origin, now, self._share)
        if slot and slot.task is not None:
            slot.task.cancel()
            self.give_back(slot)

    def _admit(self, now: float) -> None:
        while len(self._taken) < self._places:
            prefixes = Counter(prefix_of(slot.origin) for slot in self._taken)
            fit = [turn for turn in self._waiting if prefixes[prefix_of(turn.origin)] < self._most]
            turn = min(fit, key=lambda turn: prefixes[prefix_of(turn.origin)], default=None)
            if turn is None:
                return
            slot = AnswerSlot(turn.origin, now, turn.task)
            self._waiting.remove(turn)
            self._taken.add(slot)
            turn.slot.set_result(slot)
