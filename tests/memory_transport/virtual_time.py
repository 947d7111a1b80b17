"""An asyncio loop whose clock jumps to the next timer: a simulated hour takes seconds, and every run is the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Every task waits and no timer is left: a deadlock of the program under test."""


class _NoWait(selectors.SelectSelector):
    """A selector that never waits. It moves the clock to the next timer instead."""

    jump: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task waits, and no timer is left that could wake one")
        if timeout > 0:
            self.jump()
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` starts at `start` (Unix seconds) and moves only when no task can run. No sockets; thread calls run inline."""

    def __init__(self, start: float) -> None:
        self._virtual_now = start
        selector = _NoWait()
        selector.jump = self._jump
        super().__init__(selector)
        self._clock_resolution = 1e-6  # a double holds Unix seconds to 2.4e-7; a timer due "now" must count as due

    def time(self) -> float:
        return self._virtual_now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call `func` in this thread, because with a second one the order of events would depend on the machine."""

        async def call() -> Any:
            return func(*args)

        return self.create_task(call())

    def _jump(self) -> None:
        scheduled = self._scheduled  # type: ignore[attr-defined]  # asyncio's heap of timers, the earliest first
        self._virtual_now = max(self._virtual_now, scheduled[0]._when)


def run_virtual(main: Callable[[], Awaitable[T]], start: float = 1_800_000_000.0) -> T:
    """Run `main()` on a fresh virtual-time loop, cancel the tasks it leaves, return its result. Raises Deadlock."""

    async def call() -> T:
        return await main()

    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(start)) as runner:
        return runner.run(call())
