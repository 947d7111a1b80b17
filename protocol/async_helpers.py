"""Helpers for asyncio: gather many answers, keep a cancellation that a library swallows, wait for a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")

GRACE = 1.0


async def gather_quickly(
    calls: Sequence[Coroutine[Any, Any, T]], good: Callable[[T], bool], grace: float = GRACE
) -> list[T | None]:
    """Run `calls` at once and do not wait for the slowest.

    Args:
        calls: What to run.
        good: Whether a result is the kind that is waited for.
        grace: Seconds that the others get after the first good result. Those that are not done by then are cancelled.

    Returns the results in order, with None for a call that was cancelled.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        waiting: set[asyncio.Future[T]] = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if any(good(task.result()) for task in done):
                break
        if waiting:
            await asyncio.wait(waiting, timeout=grace)
        return [task.result() if task.done() else None for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def gather_bounded(call: Callable[[S], Awaitable[T]], items: Iterable[S], limit: int) -> list[T]:
    """Run `call(item)` for every item, at most `limit` at a time. Returns the results in order; raises the first error."""
    slots = asyncio.Semaphore(limit)

    async def one(item: S) -> T:
        async with slots:
            return await call(item)

    return await asyncio.gather(*map(one, items))


async def keep_cancellation(call: Coroutine[Any, Any, T]) -> T:
    """Await `call`. Raises CancelledError if this task was cancelled meanwhile, even if `call` swallowed that.

    hivemind calls through `asyncio.wait_for`. In Python 3.11 that returns a result that arrives together with a cancellation,
    and the cancellation is lost.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def wait_for_thread(work: Awaitable[T], given_up: threading.Event | None = None) -> T:
    """Await `work`, which runs in a thread that no cancellation reaches.

    On a cancellation set `given_up`, which asks the thread to end, wait for it and re-raise CancelledError.
    """
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        if given_up:
            given_up.set()
        await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # else asyncio logs that the exception was never retrieved
        raise
