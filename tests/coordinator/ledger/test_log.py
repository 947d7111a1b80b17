"""The ledger: it is read back byte for byte, and a changed one is refused in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import CheckDone, DiscardCandidate
from lutetia.coordinator.ledger.events import (
    CheckpointAccepted,
    CoordinatorStopped,
    Event,
    ManifestPublished,
    MixtureStitched,
    ResultRefused,
    ResultSeen,
    RouterTrained,
    RunCreated,
    read_event,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.reducer import LedgerOutOfOrder, apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import ConfigError, IntegrityError
from tests.coordinator.acceptance.judge_driver import (
    COORDINATOR,
    PEERS,
    START,
    drive_judge,
    first_event,
    make_manifest,
    make_record,
)
from tests.unprivileged import shared_folder, unprivileged


def events_of(steps: list[tuple[int, int, str]]) -> list[Event]:
    """The events of a run in which results come to `steps`: (peer, shard, outcome)."""
    driver = drive_judge(epochs=4)
    for count, (who, shard, outcome) in enumerate(steps):
        driver.now += 1.5
        ledger = driver.state.run.shards[shard]
        record = make_record(driver.manifest, PEERS[who], shard, ledger.epoch + 1, ledger.accepted, text=str(count))
        if driver.offer(record, "poll").verdict == "queued" and outcome != "waits":
            asked = driver.checks[-1].record
            if outcome == "valid":
                driver.verdict(asked, 0.1 + count / 7)
            else:
                verdict = Verdict(outcome, "transfer", "naïve ünïcode – why")  # pyright: ignore[reportArgumentType]
                driver.send(CheckDone(asked, verdict, driver.now))
    mixture = make_record(driver.manifest, PEERS[0]).digest
    return [
        *driver.events,
        ManifestPublished(time=driver.now + 1, version=1, digest=driver.manifest.run_id, expires=START + 1e6),
        RouterTrained(time=driver.now + 2, epochs=(1, 2), router=make_record(driver.manifest, PEERS[0]).weights, accuracy=0.9),
        MixtureStitched(time=driver.now + 3, epochs=(1, 2), mixture=mixture),
    ]


steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from(["valid", "invalid", "inconclusive", "waits"])), max_size=25
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.floats(0, 60))
def test_replay_is_byte_equal(tmp_path_factory, steps, until):
    events = events_of(steps)
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    ledger = Ledger.create(path, events[0])  # pyright: ignore[reportArgumentType]
    for event in events[1:]:
        ledger.append([event])
    written = [row.text.encode() for row in ledger.rows()]
    assert written == [canonical(event) for event in events]
    ledger.close()
    again = Ledger.open(path, first_event(make_manifest(epochs=4)).run)
    expected = RunState()
    for event in events:
        expected = apply(expected, event)
    assert again.state == expected == again.replay()
    assert [canonical(read_event(row.text)) for row in again.rows()] == written
    past = RunState()
    for event in events:
        if event.time <= START + until:
            past = apply(past, event)
    assert again.replay(START + until) == past
    again.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    events = events_of([(0, 0, "valid"), (1, 1, "valid"), (0, 0, "valid")])
    ledger = Ledger.create(path, events[0])  # pyright: ignore[reportArgumentType]
    ledger.append(events[1:])
    ledger.close()
    return path


def raw(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(";".join(["DROP TRIGGER no_update", "DROP TRIGGER no_delete", *statements]))
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events WHERE id = 4",
        "UPDATE events SET event = replace(event, '100', '900') WHERE id = 2",
        "UPDATE events SET time = time + 1 WHERE id = 3",
        "UPDATE events SET chain = zeroblob(32) WHERE id = 5",
        "INSERT INTO events SELECT id + 100, time, event, chain FROM events WHERE id = 2",
        "DELETE FROM events",
    ],
)
def test_a_changed_ledger_is_refused(path: Path, statement: str):
    raw(path, statement)
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        Ledger.open(path)


def test_rows_can_be_neither_changed_nor_deleted(path: Path):
    connection = sqlite3.connect(path)
    for statement in ("DELETE FROM events", "UPDATE events SET time = 0"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_a_damaged_file_is_refused(path: Path):
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"ledger\.sqlite is damaged"):
        Ledger.open(path)


@pytest.mark.parametrize("content", [b"not a database, only some text" * 200, b""])
def test_a_file_that_is_no_ledger_is_refused_unchanged(tmp_path: Path, content: bytes):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    with pytest.raises((ConfigError, IntegrityError)):
        Ledger.open(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_another_programs_database_is_refused_unchanged(tmp_path: Path):
    path = tmp_path / "ledger.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another program"):
        Ledger.open(path)
    assert path.read_bytes() == before


def test_a_ledger_of_another_run_or_absent_is_refused(path: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="not of aaaaaaaaaaaa"):
        Ledger.open(path, "a" * 64)
    with pytest.raises(ConfigError, match="there is no ledger"):
        Ledger.open(tmp_path / "absent.sqlite")
    with pytest.raises(ConfigError, match="already exists"):
        Ledger.create(path, first_event(make_manifest()))


def test_a_refused_transaction_writes_nothing(path: Path):
    ledger = Ledger.open(path)
    before, rows = ledger.state, len(list(ledger.rows()))
    record = make_record(make_manifest(epochs=4), PEERS[2], epoch=1)
    fine = ManifestPublished(time=START + 99, version=2, digest="c" * 64, expires=START + 1e6)
    with pytest.raises(LedgerOutOfOrder):
        ledger.append([fine, ResultSeen(time=START + 100, record=record, via="offer")])
    assert ledger.state is before
    assert len(list(ledger.rows())) == rows
    ledger.close()


def acceptances(count: int) -> list[Event]:
    """A run of 8 shards and 1,000 peers with `count` acceptances."""
    manifest = make_manifest(8, epochs=count // 8)
    parents: dict[int, str | None] = dict.fromkeys(range(8))
    events: list[Event] = [first_event(manifest)]
    for index in range(count):
        shard, epoch = index % 8, index // 8 + 1
        checkpoint = f"{index:064x}"
        blob = make_record(manifest, PEERS[0]).weights if not index else blob  # noqa: F821
        accepted = AcceptanceRecord(
            run=manifest.run_id, owner=COORDINATOR.public_key, issued=START, shard=shard, epoch=epoch, checkpoint=checkpoint,
            parent=parents[shard], weights=blob, state=blob, samples=4, author=f"{index % 1000:064x}", tenure_until=START,
            holdout_loss=0.5,
        )  # fmt: skip
        events.append(CheckpointAccepted(time=START + index, acceptance=accepted, parent_loss=0.6))
        parents[shard] = checkpoint
    return events


def test_apply_costs_the_same_early_and_late():
    """The history is not copied: the last tenth of 20,000 events costs about as much as the first (budget: 10^5 in seconds)."""
    events, state, marks = acceptances(20_000), RunState(), []
    for index, event in enumerate(events):
        if index % 2000 == 0:
            marks.append(time.process_time())
        state = apply(state, event)
    marks.append(time.process_time())
    assert state.events == 20_001
    early, late = marks[2] - marks[1], marks[-1] - marks[-2]
    assert late < 3 * early + 0.05
    assert marks[-1] - marks[0] < 4.0, "2e4 events took more than 4 s of processor time"


def test_batched_transactions_give_the_same_state(tmp_path: Path):
    """The judge and the durable ledger reach the same state, whatever the size of a transaction."""
    driver = drive_judge(shards=8, epochs=40, rules={"offers_per_minute": 10_000})
    ledger = Ledger.create(tmp_path / "ledger.sqlite", driver.events[0])  # pyright: ignore[reportArgumentType]
    for round_ in range(25):
        before = len(driver.events)
        for shard in range(8):
            driver.accept(PEERS[(8 * round_ + shard) % 6], shard)
        ledger.append(driver.events[before:])
    assert ledger.state == driver.state.run
    assert driver.state.run.accepted == 200
    assert not any(isinstance(action, DiscardCandidate) for action in driver.actions)
    ledger.close()


def test_an_event_of_an_older_ledger_is_read():
    """`check` was called `rung`, in the event and in its costs."""
    event = read_event(
        '{"again_at":null,"checkpoint":"' + "a" * 64 + '","costs":[{"outcome":"valid","rung":"transfer","seconds":0.5,"size":7},'
        '{"outcome":"invalid","rung":"numbers","seconds":0.1,"size":7}],"epoch":1,"kind":"checkpoint-refused","owner":"'
        + PEERS[0].public_key
        + '","rung":"numbers","shard":0,"text":"a tensor is not finite","time":1700000000.0,"verdict":"invalid"}'
    )
    assert isinstance(event, ResultRefused)
    assert (event.check, [cost.check for cost in event.costs]) == ("numbers", ["transfer", "numbers"])
    assert read_event(canonical(event)) == event


def test_a_ledger_with_older_events_opens_and_grows(tmp_path: Path):
    driver = drive_judge()
    driver.refuse(make_record(driver.manifest, PEERS[1]))
    path = tmp_path / "ledger.sqlite"
    first, *others = driver.events
    assert isinstance(first, RunCreated)
    ledger = Ledger.create(path, first)
    text = canonical(others[-1]).decode().replace('"check":', '"rung":')
    assert '"rung":"numbers"' in text
    ledger.append(others[:-1])
    count, chain = ledger.head
    link = hashlib.sha256(bytes.fromhex(chain) + repr(others[-1].time).encode() + b"\n" + text.encode()).digest()
    ledger._insert([(count + 1, others[-1].time, text, link)], durable=True)
    ledger.close()
    again = Ledger.open(path)
    assert again.state == driver.state.run
    again.append([CoordinatorStopped(time=driver.now)])
    assert len(list(again.rows())) == count + 2
    again.close()


def test_a_ledger_is_read_where_nothing_can_be_written() -> None:
    with shared_folder() as folder:
        path = folder / "ledger.sqlite"
        ledger = Ledger.create(path, first_event(make_manifest(), START))
        state = ledger.state
        ledger.close()
        path.chmod(0o444)
        folder.chmod(0o555)
        with unprivileged(), contextlib.closing(Ledger.open(path, to_read=True)) as read:
            assert read.state == state
            assert [row.event().kind for row in read.rows()] == ["run-created"]
        assert [file.name for file in folder.iterdir()] == ["ledger.sqlite"]


def test_a_reader_sees_what_a_writer_has_appended(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite", first_event(make_manifest(), START))
    ledger.append([CoordinatorStopped(time=START + 1)])
    with contextlib.closing(Ledger.open(tmp_path / "ledger.sqlite", to_read=True)) as read:
        assert len(list(read.rows())) == 2
    ledger.close()


def test_closing_waits_for_a_thread_that_is_writing(tmp_path: Path) -> None:
    """A stopping coordinator cancels an append; its thread goes on. Without the wait, SQLite ends the process by SIGSEGV."""
    first = first_event(drive_judge(epochs=4).manifest)
    for attempt in range(30):
        ledger, writing = Ledger.create(tmp_path / str(attempt), first), threading.Event()

        def append_until_closed(ledger: Ledger = ledger, writing: threading.Event = writing) -> None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # "Cannot operate on a closed database"
                while True:
                    ledger.append([CoordinatorStopped(time=START + ledger.head[0])])
                    writing.set()

        thread = threading.Thread(target=append_until_closed)
        thread.start()
        assert writing.wait(30)
        ledger.close()
        thread.join()
        again = Ledger.open(tmp_path / str(attempt))
        assert again.head == ledger.head
        again.close()
