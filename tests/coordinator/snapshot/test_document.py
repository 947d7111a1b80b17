"""A snapshot gives the state that a replay gives, whatever is cut where; one that does not fit is left unused."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lutetia.coordinator.ledger.events import Event, RunCreated
from lutetia.coordinator.ledger.log import Ledger, LedgerStart
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot import document
from lutetia.coordinator.snapshot.document import (
    header_of,
    open_with_snapshot,
    parts_of,
    read_snapshot,
    rule_sources,
    rules_digest,
    write_snapshot,
)
from lutetia.coordinator.snapshot.process import SnapshotOrder, replay_and_write
from lutetia.coordinator.web.api.history import History
from lutetia.protocol.schema.identity import Identity
from tests.coordinator.acceptance.judge_driver import COORDINATOR, OWNER
from tests.coordinator.ledger.test_log import events_of, steps
from tests.protocol.power_loss import every_power_loss, needs_strace, record
from tests.test_walls import ROOT, imported_files

VARIED = [(who % 4, who % 2, outcome) for who, outcome in enumerate(["valid", "invalid", "valid", "inconclusive", "waits"] * 4)]


def added_up(events: list[Event]) -> tuple[RunState, History]:
    state, history = RunState(), History()
    for number, event in enumerate(events, start=1):
        state = apply(state, event)
        history.add(number, event)
    return state, history


def write_run(folder: Path, events: list[Event]) -> RunFolder:
    """The folder of a run with a ledger of `events` and the coordinator's key."""
    root = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    COORDINATOR.save(root.coordinator_key)
    first, *rest = events
    assert isinstance(first, RunCreated)
    with contextlib.closing(Ledger.create(root.ledger, first)) as ledger:
        ledger.append(rest)
    return root


def write_snapshot_of(root: RunFolder, events: list[Event], cut: int, **changes: object) -> None:
    """A snapshot of the first `cut` events; `changes`: fields of the state that it gets wrong."""
    state, history = added_up(events[:cut])
    with contextlib.closing(Ledger.open(root.ledger)) as ledger:
        chain = ledger.chain_at(cut)
    assert chain
    parts = parts_of(replace(state, **changes), history)  # pyright: ignore[reportArgumentType]
    header = header_of(state.run, cut, chain, parts, COORDINATOR.public_key)
    write_snapshot(root.snapshot, header, parts, COORDINATOR)


@pytest.fixture
def events() -> list[Event]:
    return events_of(VARIED)


@pytest.fixture
def root(tmp_path: Path, events: list[Event]) -> RunFolder:
    return write_run(tmp_path / "run", events)


def opened(root: RunFolder, run: str, coordinator: Identity = COORDINATOR) -> tuple[RunState, int, History | None]:
    """(state, events that were not read, history of the snapshot) of an opened ledger."""
    ledger, snapshot = open_with_snapshot(root, run, coordinator.public_key)
    with contextlib.closing(ledger):
        assert ledger.head[0] == ledger.state.events
        return ledger.state, ledger.trusted, snapshot.history() if snapshot else None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.floats(0, 1))
def test_state_from_a_snapshot_and_the_rest_equals_the_replay(tmp_path_factory, steps, where):
    events = events_of(steps)
    cut = 1 + round(where * (len(events) - 1))
    root = write_run(tmp_path_factory.mktemp("run"), events)
    write_snapshot_of(root, events, cut)
    state, history = added_up(events)
    loaded, trusted, earlier = opened(root, state.run)
    assert trusted == cut
    assert loaded == state
    assert [list(shard.judged) for shard in loaded.shards.values()] == [list(shard.judged) for shard in state.shards.values()]
    assert list(loaded.peers) == list(state.peers), "in the same order, on which decisions may depend"
    assert earlier is not None
    assert earlier == added_up(events[:cut])[1]
    for number, event in enumerate(events[cut:], start=cut + 1):
        earlier.add(number, event)
    assert parts_of(loaded, earlier) == parts_of(state, history)


def tampered(data: bytes) -> bytes:
    return data.replace(b'"accepted":', b'"accepted" ', 1)


def shifted(data: bytes) -> bytes:
    """A header that names one event more, under the old signature."""
    line, _, rest = data.partition(b"\n")
    signed = json.loads(line)
    signed["header"]["events"] += 1
    return json.dumps(signed).encode() + b"\n" + rest


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:-1], "cut off or too long"),
        (lambda data: data + b" ", "cut off or too long"),
        (lambda data: data[:100], "header cannot be read"),
        (lambda data: b"", "header cannot be read"),
        (lambda data: b"\xff" * 10_000, "header cannot be read"),
        (shifted, "signature is wrong"),
        (tampered, "its state was changed"),
    ],
    ids=["cut", "longer", "header", "empty", "garbage", "shifted", "tampered"],
)
def test_a_spoilt_snapshot_is_ignored_with_one_line(
    root: RunFolder, events: list[Event], caplog: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes], says: str
):
    state, _ = added_up(events)
    write_snapshot_of(root, events, 9)
    root.snapshot.write_bytes(spoil(root.snapshot.read_bytes()))
    with caplog.at_level(logging.INFO):
        assert opened(root, state.run) == (state, 0, None)
    [line] = caplog.messages
    assert says in line
    assert "the whole ledger is read" in line


def test_a_snapshot_of_other_rules_another_run_or_coordinator_is_ignored(
    root: RunFolder, events: list[Event], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    state, _ = added_up(events)
    write_snapshot_of(root, events, 9)
    assert read_snapshot(root.snapshot, "a" * 64, COORDINATOR.public_key) is None
    assert opened(root, state.run, OWNER) == (state, 0, None), "the key was rotated"
    monkeypatch.setattr(document, "rules_digest", lambda: "b" * 64)
    assert opened(root, state.run) == (state, 0, None)
    assert ["another run or another coordinator" in line for line in caplog.messages] == [True, True, False]
    assert "another version of the software" in caplog.messages[-1]


def test_a_snapshot_that_is_newer_than_the_ledger_or_of_another_is_ignored(tmp_path: Path, events: list[Event]):
    run = write_run(tmp_path / "run", events)
    state, _ = added_up(events)
    write_snapshot_of(run, events, len(events))
    shorter = write_run(tmp_path / "shorter", events[:-1])
    other = write_run(tmp_path / "other", [*events[:-1], events[-1].model_copy(update={"time": events[-1].time + 1})])
    for folder in (shorter, other):
        folder.snapshot.write_bytes(run.snapshot.read_bytes())
        loaded, trusted, earlier = opened(folder, state.run)
        assert (loaded.events, trusted, earlier) == (len(list(_rows(folder))), 0, None)
        assert loaded.events in (len(events), len(events) - 1)
    assert opened(run, state.run)[1] == len(events)


def _rows(root: RunFolder) -> list[int]:
    with contextlib.closing(Ledger.open(root.ledger)) as ledger:
        return [row.id for row in ledger.rows()]


def test_a_snapshot_from_which_later_events_do_not_follow_is_ignored(root: RunFolder, events: list[Event]):
    state, _ = added_up(events)
    blank = added_up(events[:1])[0]
    write_snapshot_of(root, events, 12, shards=blank.shards)
    assert opened(root, state.run)[:2] == (state, 0)


def test_the_process_finds_a_lie_and_replaces_it(root: RunFolder, events: list[Event]):
    state, history = added_up(events)
    order = SnapshotOrder(rules=rules_digest())
    report = replay_and_write(root, order)
    assert (report.fits, report.events, report.broken, report.unwritten) == (None, len(events), "", "")
    snapshot = read_snapshot(root.snapshot, state.run, COORDINATOR.public_key)
    assert snapshot is not None
    assert (snapshot.state, snapshot.history()) == (state, history)
    for cut, changes, fits in ((9, {}, True), (9, {"accepted": 77}, False)):
        write_snapshot_of(root, events, cut, **changes)
        known = read_snapshot(root.snapshot, state.run, COORDINATOR.public_key)
        assert known is not None
        assert replay_and_write(root, order.model_copy(update={"known": known.header})).fits is fits
        assert opened(root, state.run)[:2] == (state, len(events))


def test_the_process_reports_a_ledger_that_was_changed_before_the_snapshot(root: RunFolder, events: list[Event]):
    import sqlite3

    state, _ = added_up(events)
    replay_and_write(root, SnapshotOrder(rules=rules_digest()))
    with contextlib.closing(sqlite3.connect(root.ledger)) as connection:
        connection.executescript("DROP TRIGGER no_update; UPDATE events SET time = time + 1 WHERE id = 3;")
    assert opened(root, state.run)[1] == len(events), "a start does not read it"
    report = replay_and_write(root, SnapshotOrder(rules=rules_digest()))
    assert "was changed at event 3" in report.broken
    assert report.events == 0


def test_the_process_of_other_software_writes_nothing(root: RunFolder):
    report = replay_and_write(root, SnapshotOrder(rules="c" * 64))
    assert report.unwritten
    assert not root.snapshot.exists()


def test_all_code_that_adds_events_up_is_among_the_rules():
    found, waiting = set(), [ROOT / "coordinator/ledger/reducer.py", ROOT / "coordinator/web/api/history.py"]
    while waiting:
        if (path := waiting.pop()) not in found and "system" not in path.relative_to(ROOT).parts:
            found.add(path)
            waiting += imported_files(path)
    assert len(found) > 20
    assert not found - set(rule_sources())


def test_a_start_is_used_only_where_it_fits(root: RunFolder, events: list[Event]):
    state, _ = added_up(events[:5])
    with contextlib.closing(Ledger.open(root.ledger, start=LedgerStart(5, "0" * 64, state))) as ledger:
        assert ledger.trusted == 0
        assert ledger.restore() == added_up(events)[0]


WRITES = """
import sys
from pathlib import Path
from lutetia.system.files import write_atomic
root, first, second = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
for number, file in enumerate((first, second)):
    write_atomic(root / "snapshot", file.read_bytes(), mode=0o600)
    print("@", number, flush=True)
"""


@needs_strace
def test_after_a_power_loss_the_snapshot_is_old_or_new(tmp_path: Path, root: RunFolder, events: list[Event]):
    state, _ = added_up(events)
    sizes = (7, len(events))
    for number, cut in enumerate(sizes):
        write_snapshot_of(root, events, cut)
        (tmp_path / str(number)).write_bytes(root.snapshot.read_bytes())

    def check(folder: Path, marks: list[str]) -> None:
        found = read_snapshot(folder / "snapshot", state.run, COORDINATOR.public_key)
        covers = found.header.events if found else 0
        assert covers >= max([0, *(sizes[int(mark)] for mark in marks)])

    calls = record(WRITES, tmp_path / "disk", str(tmp_path / "0"), str(tmp_path / "1"))
    assert every_power_loss(calls, tmp_path / "disk", tmp_path / "disks", check) > 8
