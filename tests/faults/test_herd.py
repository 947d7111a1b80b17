"""A thundering herd: many real peers at one moment on one coordinator, which also serves its two boxes meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from lutetia.system import tether
from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import relatives, say, until

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]
HERD = Path(__file__).parent / "world" / "herd.py"
PROCESSES, EACH = 2, 10
MEMORY = 300 << 20
"""What the coordinator itself and its p2pd may take together (its worker processes hold torch, and are not counted)."""


def memory(pair: Pair) -> int:
    """Bytes of the coordinator and its p2pd."""
    return psutil.Process(pair.coordinator.process.pid).memory_info().rss + pair.coordinator.child("p2pd").memory_info().rss


def seen(pair: Pair) -> set[str]:
    """Whom the status shows now: on a busy machine heartbeats are late, and not all are shown at one moment."""
    return {node.owner for node in pair.coordinator.status().nodes}


async def test_twenty_peers_join_at_once(pair: Pair, tmp_path: Path) -> None:
    """F17. All get in, the status is served meanwhile and shows them all, memory is bounded, no work is held up."""
    holder, _ = await pair.ready()
    herd = [
        await asyncio.create_subprocess_exec(
            *tether.command(sys.executable), str(HERD), str(tmp_path / f"herd {number}"), pair.world.run.ticket, str(EACH),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for number in range(PROCESSES)
    ]  # fmt: skip
    try:
        asked = await say("swarm", "status", pair.world.run.ticket, "--timeout", "120")
        assert asked.code == 0, asked.err
        missing: set[str] = set()
        for process in herd:
            assert process.stdout
            told = json.loads(await process.stdout.readline())
            assert not told["problems"]
            missing |= set(told["owners"])
        assert len(missing) == PROCESSES * EACH
        await until(lambda: not missing.difference_update(seen(pair)) and not missing, "all to be shown")
        assert memory(pair) < MEMORY
        await pair.coordinator.accepts(1, author=await owner(holder))
    finally:
        for process in herd:
            assert process.stdin
            process.stdin.close()
        for process in herd:
            await process.wait()
    await until(lambda: not relatives(tmp_path), "the herd to be gone")
