"""What a wrong clock does: a little wrong is borne, very wrong is told, and a jump in the middle of the work costs no work."""

from __future__ import annotations

import signal
import struct
from pathlib import Path

import pytest

from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import until
from tests.faults.world.world import LEASE, Box

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]
PROGRAM = Path(__file__).parent / "world" / "skewed_clock.py"


def set_ahead(file: Path, seconds: float) -> None:
    """Whoever has mapped `file` lives in that time from now on."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(struct.pack("<d", seconds))


async def skewed(pair: Pair, name: str, clock: Path, state: Path | None = None) -> Box:
    return await pair.world.box(name, program=(PROGRAM, clock), state=state)


async def test_a_clock_two_minutes_off_is_refused_by_one_sentence(pair: Pair, tmp_path: Path) -> None:
    """F8. The run allows half a minute; the sentence says how far off the clock is and what to do."""
    await pair.ready()
    set_ahead(tmp_path / "clock", -120.0)
    box = await skewed(pair, "late", tmp_path / "clock")
    assert await until(lambda: box.process.returncode, "the box to be refused") == 10, box.words()
    last = box.words().splitlines()[-1]
    assert "this machine's clock is 120 s behind the swarm's" in last
    assert "timedatectl" in last


async def test_ten_seconds_off_and_a_jump_in_the_middle_of_the_work(pair: Pair, tmp_path: Path) -> None:
    """F8. A box 10 s ahead takes over and is accepted; its clock jumps to 10 s behind, and its work is still accepted.

    Ten seconds are more than a lease here: to this box the holder's claim always looks expired. What it sees being accepted
    tells it to stand back.
    """
    holder, standby = await pair.ready()
    await standby.end(signal.SIGKILL)
    clock = tmp_path / "clock"
    set_ahead(clock, 10.0)
    box = pair.boxes[standby.name] = await skewed(pair, standby.name, clock, standby.state)
    await box.until(state="idle")
    await holder.end(signal.SIGKILL)
    await pair.taken_over(box)
    set_ahead(clock, -10.0)
    await pair.coordinator.accepts(3, author=await owner(box), seconds=20 * LEASE)
    assert await box.end(signal.SIGTERM) == 0
