"""The keeper of a run's snapshot with its real process: what it makes, verifies and finds."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import open_with_snapshot, read_snapshot
from lutetia.coordinator.snapshot.keeper import LEAST_EVENTS, SnapshotKeeper, due
from lutetia.system.errors import IntegrityError
from tests.coordinator.acceptance.judge_driver import COORDINATOR
from tests.coordinator.ledger.test_log import acceptances
from tests.coordinator.scripted_node import until
from tests.coordinator.snapshot.test_document import write_run


def test_a_snapshot_is_due_when_a_start_would_add_up_much():
    assert not due(LEAST_EVENTS - 1, 0)
    assert due(LEAST_EVENTS, 0)
    assert not due(104_999, 100_000)
    assert due(105_000, 100_000)
    covered = made = 0
    for events in range(0, 100_001, 100):
        if due(events, covered):
            covered, made = events, made + events
    assert made < 30 * 100_000, "in all, each event is replayed a few dozen times at most"


async def exists(root: RunFolder) -> bool:
    return root.snapshot.exists()


async def nobody(events: int) -> None:
    raise AssertionError("no snapshot lies here")


async def test_the_keeper_makes_a_snapshot_and_finds_a_changed_ledger(tmp_path: Path):
    events = acceptances(LEAST_EVENTS)
    root, run = write_run(tmp_path / "run", events), events[0].run  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.closing(Ledger.open(root.ledger)) as ledger:
        keeping = asyncio.create_task(SnapshotKeeper(root, ledger, None, nobody).run())
        await until(lambda: exists(root), "the snapshot")
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    made = read_snapshot(root.snapshot, run, COORDINATOR.public_key)
    assert made is not None
    assert made.header.events == len(events)
    with contextlib.closing(sqlite3.connect(root.ledger)) as connection:
        connection.executescript("DROP TRIGGER no_update; UPDATE events SET time = time + 1 WHERE id = 3;")
    ledger, snapshot = open_with_snapshot(root, run, COORDINATOR.public_key)
    with contextlib.closing(ledger), pytest.raises(IntegrityError, match="was changed at event 3"):
        async with asyncio.timeout(60):
            await SnapshotKeeper(root, ledger, snapshot, nobody).run()
