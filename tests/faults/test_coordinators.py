"""What may happen to the coordinator: killed, away, its disk full, or there twice. Training does not depend on it."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.events import CoordinatorStarted
from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import say, until
from tests.faults.world.world import acceptances, events, free_port

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(900)]


async def test_killed_and_started_again(pair: Pair) -> None:
    """F4. From disk it goes on where it was: not an event is lost or changed, and what was offered meanwhile is accepted."""
    holder, _ = await pair.ready()
    await pair.coordinator.end(signal.SIGKILL)
    before = events(pair.coordinator.run)
    await holder.until(pending=lambda count: count >= 2, state="training")
    await pair.serve()
    await pair.coordinator.accepts(2, author=await owner(holder))
    after = events(pair.coordinator.run)
    assert after[: len(before)] == before
    assert isinstance(after[len(before)], CoordinatorStarted)


async def test_all_bootstraps_go_down_and_a_box_comes_back_through_its_friends(pair: Pair) -> None:
    """F5. The ticket names nobody who lives: training goes on, and who was here before finds the others by itself."""
    holder, standby = await pair.ready()
    await standby.end(signal.SIGKILL)
    again = await pair.join(standby.name)  # it meets the holder, and remembers it; where heartbeats are late, a little later
    await again.until(state="idle")
    met, friend = list(again.state.glob("runs/*/peers.json")), (await holder.until(peer_id=lambda name: name))["peer_id"]
    await until(lambda: any(friend in path.read_text() for path in met), "the box to remember its friend")
    await again.end(signal.SIGKILL)
    await pair.coordinator.end(signal.SIGKILL)
    mark = standby.mark()
    again = await pair.join(standby.name)
    await again.says("no address of the ticket answers; joining through", mark)
    await again.until(state="idle", online=True)
    assert (await holder.until(pending=lambda count: count >= 1))["state"] == "training"
    await pair.serve()
    await pair.coordinator.accepts(1, author=await owner(holder))


async def test_all_bootstraps_are_down_before_a_stranger_joins(pair: Pair, tmp_path: Path) -> None:
    """F5. Nobody to ask: one sentence that names the address and why, exit code 30, at once."""
    await pair.ready()
    await pair.coordinator.end(signal.SIGTERM)
    joined = await say("join", pair.world.run.ticket, "--state-folder", tmp_path / "new", "--listen", "/ip4/127.0.0.1/tcp/0")
    asked = await say("swarm", "status", pair.world.run.ticket)
    assert (joined.code, asked.code) == (30, 30)
    assert "connection refused (nothing listens there)" in joined.sentence()
    assert "refused" in asked.sentence()
    await pair.serve()


async def test_a_second_one_on_the_same_folder_is_refused(pair: Pair) -> None:
    """F4. By a lock that the kernel frees; the sentence names the process that has it."""
    await pair.ready()
    second = await say("coordinator", "serve", pair.coordinator.run)
    assert second.code == 11, second.err
    assert f"process {pair.coordinator.process.pid}" in second.sentence()
    assert await until(pair.coordinator.alive, "the first to go on")
    assert acceptances(pair.coordinator.run)


async def test_a_copy_of_its_folder_is_served_elsewhere(pair: Pair, tmp_path: Path) -> None:
    """F4. No lock knows of it; the copy sees that the swarm has heard more from its key, and stops before it says a word."""
    holder, _ = await pair.ready()
    original = pair.coordinator.run
    await until(lambda: (original / "peers.json").exists(), "the coordinator to remember its peers")
    await pair.coordinator.end(signal.SIGTERM)
    copy = tmp_path / "copy"
    await asyncio.to_thread(shutil.copytree, original, copy)
    await pair.serve()
    await pair.coordinator.accepts(2, author=await owner(holder))
    known = events(copy)
    listen = ("--listen", f"/ip4/127.0.0.1/tcp/{free_port()}")
    second = await say("coordinator", "serve", copy, *listen)
    assert second.code == 11, second.err
    assert "does not know: another coordinator is at work, or this folder is an old copy" in second.sentence()
    assert [event for event in events(copy)[len(known) :] if event.kind == "checkpoint-accepted"] == []
    await pair.coordinator.accepts(1, author=await owner(holder))
