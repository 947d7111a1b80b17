"""Waiting for many answers without waiting for the slowest, for libraries that lose a cancellation, and for threads."""

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
    """The results in order. Once one is `good`, the others get `grace` seconds more; those still out are cancelled and None."""
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
    """`call(item)` for every item, at most `limit` at a time; the results in order of the items. The first error is raised."""
    slots = asyncio.Semaphore(limit)

    async def one(item: S) -> T:
        async with slots:
            return await call(item)

    return await asyncio.gather(*map(one, items))


async def heeding(call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`, unless this task was cancelled meanwhile: then CancelledError, even if `call` kept that to itself.

    In Python 3.11 `asyncio.wait_for`, through which hivemind makes its calls, gives a result that comes together with a
    cancellation, and the task goes on as if nobody had asked it to end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    result = await call
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def to_its_end(work: Awaitable[T], given_up: threading.Event | None = None) -> T:
    """The result of `work` in a thread, which no cancellation reaches: who is cancelled sets `given_up` and waits for it."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        if given_up:
            given_up.set()
        await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # nobody is left to hear of it, and asyncio complains of errors that nobody has looked at
        raise
