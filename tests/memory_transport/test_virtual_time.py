"""The virtual clock: hours pass at once, in the same order every time."""

from __future__ import annotations

import asyncio

import pytest

from tests.memory_transport.virtual_time import Deadlock, run_virtual


def test_an_hour_passes_at_once_and_in_order() -> None:
    async def main() -> list[tuple[str, float]]:
        loop, beats = asyncio.get_running_loop(), []
        start = loop.time()

        async def beat(name: str, period: float, times: int) -> None:
            for _ in range(times):
                await asyncio.sleep(period)
                beats.append((name, round(loop.time() - start, 3)))

        await asyncio.gather(beat("slow", 1800, 2), beat("quick", 1000, 3))
        return beats

    beats = run_virtual(main)
    assert beats == [("quick", 1000.0), ("slow", 1800.0), ("quick", 2000.0), ("quick", 3000.0), ("slow", 3600.0)]
    assert run_virtual(main) == beats


def test_timeouts_and_threads_work() -> None:
    async def main() -> tuple[float, int]:
        start = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.Event().wait()
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return asyncio.get_running_loop().time() - start, await asyncio.to_thread(lambda: 42)

    assert run_virtual(main) == (7.0, 42)


def test_a_deadlock_is_reported_instead_of_waited_for() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="no timer is left"):
        run_virtual(main)
