"""Run the handlers of inbound streams, each in its own task: one that fails ends only its own stream."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from lutetia.protocol.transport.base import Handler, Stream
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


class HandlerTasks:
    """The running handlers, at most `limit` of them. Further streams are refused until one ends.

    One peer gets at most an eighth of the places and one origin at most half, so that neither a greedy peer nor many made-up
    ones behind one address can keep all others out.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self._peers: Counter[str] = Counter()
        self._origins: Counter[str] = Counter()

    def start(self, protocol: str, handler: Handler, stream: Stream) -> bool:
        """Run `handler` in the background and close `stream` at its end. False when too many are running."""
        peer, origin = stream.peer_id, stream.origin
        full = len(self._tasks) >= self._limit
        if full or self._peers[peer] >= self._limit // 8 or self._origins[origin] >= self._limit // 2:
            open_here = (len(self._tasks), self._peers[peer], self._origins[origin], origin or "relays")
            log.warning("refused stream %s of %s: %d are open, %d of that peer, %d from %s", protocol, peer, *open_here)
            return False
        self._peers[peer] += 1
        self._origins[origin] += 1
        task = asyncio.get_running_loop().create_task(_answer(handler, stream))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, protocol, peer, origin))
        return True

    async def close(self) -> None:
        """Cancel all handlers and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None], protocol: str, peer_id: str, origin: str) -> None:
        self._tasks.discard(task)
        for counter, name in ((self._peers, peer_id), (self._origins, origin)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, (LutetiaError, OSError, EOFError, TimeoutError)):
            log.info("stream %s of %s ended: %s", protocol, peer_id, error)
        elif error is not None:
            log.error("the handler of %s failed for %s", protocol, peer_id, exc_info=error)


async def _answer(handler: Handler, stream: Stream) -> None:
    try:
        await handler(stream)
    finally:
        await stream.close()
