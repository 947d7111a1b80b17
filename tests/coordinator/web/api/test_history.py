"""The history behind the web API: what is credited is what counts, whatever is accepted and rolled back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.ledger.events import CheckpointAccepted, LineageRolledBack
from lutetia.coordinator.web.api.history import RECENT, History, seconds_left
from lutetia.protocol.schema.records import AcceptanceRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, blob

EPOCH_SAMPLES = 8


def acceptance(shard: int, epoch: int, peer: int, number: int) -> CheckpointAccepted:
    name = f"{shard} {epoch} {number}"
    record = AcceptanceRecord(
        run=blob("run").digest, owner=COORDINATOR.public_key, issued=START, shard=shard, epoch=epoch, parent=None,
        checkpoint=blob(name).digest, weights=blob(f"w{name}"), state=blob(f"s{name}"), samples=epoch * EPOCH_SAMPLES,
        author=PEERS[peer].public_key, tenure_until=START, holdout_loss=0.5,
    )  # fmt: skip
    return CheckpointAccepted(time=START + number, acceptance=record, parent_loss=0.6)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.booleans(), st.integers(0, 9)), max_size=60))
def test_credit_is_conserved_under_any_rollbacks(steps: list[tuple[int, int, bool, int]]) -> None:
    history, epochs = History(), dict.fromkeys(range(3), 0)
    for number, (shard, peer, back, depth) in enumerate(steps, 1):
        if back and epochs[shard]:
            target = max(0, epochs[shard] - 1 - depth)
            void = {"dropped": epochs[shard] - target, "checkpoint": blob("x").digest, "why": "operator"}
            history.add(number, LineageRolledBack(time=START, shard=shard, epoch=target, term=number, **void))
            epochs[shard] = target
        else:
            epochs[shard] += 1
            history.add(number, acceptance(shard, epochs[shard], peer, number))
    counted = [point for shard in history.shards.values() for point in shard.accepted if not point.void]
    assert sum(author.samples for author in history.authors.values()) == EPOCH_SAMPLES * sum(epochs.values())
    assert sum(point.trained for point in counted) == EPOCH_SAMPLES * sum(epochs.values())
    assert sum(author.accepted for author in history.authors.values()) == len(counted) == sum(epochs.values())


def test_long_histories_of_one_author_keep_the_last_entries() -> None:
    history = History()
    for epoch in range(1, RECENT + 20):
        history.add(epoch, acceptance(0, epoch, 0, epoch))
    author = history.authors[PEERS[0].public_key]
    assert (author.accepted, len(author.points), author.points[0].epoch) == (RECENT + 19, RECENT, 20)
    assert len(history.shards[0].accepted) == RECENT + 19


def test_time_left_is_that_of_the_slowest_shard() -> None:
    assert seconds_left({0: 10, 1: 30}, {0: 1.0, 1: 2.0}) == 15.0
    assert seconds_left({0: 10, 1: 30}, {0: 1.0}) is None
    assert seconds_left({0: 0, 1: 0}, {}) == 0.0
