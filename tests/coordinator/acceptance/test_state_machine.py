"""The judge: what happens to each offered result, and that an epoch is never accepted twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import CheckDone, DiscardCandidate, JudgeTick, LimitsKnown, Publish, StartCheck
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.events import CheckpointAccepted, ResultRefused
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, limits_of, make_record


def test_a_valid_result_is_queued_checked_accepted_and_published():
    driver = drive_judge()
    first = make_record(driver.manifest, PEERS[0])
    assert driver.offer(first).verdict == "queued"
    assert driver.checks == [StartCheck(first, None)]
    assert driver.offer(first).verdict == "queued", "offering again asks for the state"
    actions = driver.verdict(first, 0.4)
    acceptance = next(action.acceptance for action in actions if isinstance(action, Publish))
    assert acceptance.epoch == 1
    assert acceptance.checkpoint == first.digest
    assert acceptance.author == PEERS[0].public_key
    assert acceptance.tenure_until == driver.now + driver.manifest.timing.tenure
    assert acceptance.holdout_loss == 0.4
    assert driver.offer(first).verdict == "accepted"
    assert driver.kinds() == ["run-created", "checkpoint-seen", "baseline-measured", "checkpoint-accepted", "audit-due"]


def test_the_next_epoch_must_have_the_accepted_parent():
    driver = drive_judge()
    first = make_record(driver.manifest, PEERS[0])
    early = make_record(driver.manifest, PEERS[0], epoch=2, parent=first.digest)
    reply = driver.offer(early)
    assert reply.verdict == "busy"
    assert reply.retry_after
    driver.offer(first)
    driver.verdict(first)
    orphan = make_record(driver.manifest, PEERS[1], epoch=2, parent="0" * 64)
    reply = driver.offer(orphan)
    assert (reply.verdict, reply.check) == ("invalid", "lineage")
    assert "its parent is 0000" in reply.text
    assert driver.offer(early).verdict == "queued"
    assert driver.checks[-1] == StartCheck(early, driver.state.run.shards[0].acceptance), "compared with the accepted parent"


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        ({"run": "a" * 64}, "signature", "is of run aaaa"),
        ({"peer_id": "12D3KooWsomebodyElseEntirely"}, "signature", "not its owner's"),
        ({"samples": 3}, "lineage", "3 samples"),
        ({"parent": "b" * 64}, "lineage", "the initial model"),
        ({"shard": 7}, "lineage", "no shard 7"),
    ],
)
def test_a_refused_offer_names_the_check_and_the_reason(change, check, words):
    driver = drive_judge()
    reply = driver.offer(make_record(driver.manifest, PEERS[0], **change))
    assert (reply.verdict, reply.check) == ("invalid", check)
    assert words in reply.text
    assert not driver.checks


def test_a_peer_off_the_allowlist_is_refused():
    driver = drive_judge(allowlist=(PEERS[0].public_key,))
    assert driver.offer(make_record(driver.manifest, PEERS[0])).verdict == "queued"
    reply = driver.offer(make_record(driver.manifest, PEERS[1]))
    assert reply.verdict == "invalid"
    assert "allowlist" in reply.text


def oversized(driver: JudgeDriver, peer: Identity) -> CheckpointRecord:
    record = make_record(driver.manifest, peer)
    return record.model_copy(update={"weights": record.weights.model_copy(update={"size": 1001})})


def test_oversized_blobs_are_refused_before_a_byte_is_fetched():
    driver = drive_judge()
    reply = driver.offer(oversized(driver, PEERS[0]))
    assert (reply.verdict, reply.check) == ("invalid", "size")
    assert "1001 bytes" in reply.text
    assert not driver.checks


def test_oversized_blobs_are_refused_once_limits_are_known():
    driver = drive_judge(limits=False)
    big = oversized(driver, PEERS[0])
    assert driver.offer(big).verdict == "queued"
    driver.send(LimitsKnown(limits_of(2), driver.now))
    refusal = driver.events[-1]
    assert isinstance(refusal, ResultRefused)
    assert refusal.check == "size"
    assert not driver.checks
    assert driver.offer(big).verdict == "invalid"
    assert driver.state.run.rejected == 1


@pytest.mark.parametrize("via", ["offer", "poll"])
def test_free_refusals_of_strangers_leave_no_trace(via: str):
    """Otherwise new identities would grow the ledger and the state without bound, and so would each read of the DHT."""
    driver = drive_judge(allowlist=None, rules={"offers_per_minute": 1000})
    driver.accept(PEERS[0])
    before, strangers = driver.state.run, [Identity.derived(f"stranger {index}") for index in range(20)]
    for _ in range(3):
        for stranger in (*strangers, PEERS[0]):
            orphan = make_record(driver.manifest, stranger, epoch=2, parent="e" * 64)
            assert driver.offer(orphan, via).check == "lineage"
            assert driver.offer(orphan.model_copy(update={"peer_id": PEERS[5].peer_id}), via).check == "signature"
            big = oversized(driver, stranger)
            assert driver.offer(big.model_copy(update={"shard": 1}), via).check == "size"
    assert driver.state.run == before


def test_free_refusals_in_old_ledgers_remember_no_stranger():
    """They hold an event for every refusal by a free check."""
    driver = drive_judge()
    driver.accept(PEERS[0])
    facts = {
        "time": driver.now,
        "shard": 0,
        "epoch": 2,
        "checkpoint": "e" * 64,
        "verdict": "invalid",
        "text": "its parent is another",
    }
    run = driver.state.run
    for index in range(20):
        run = apply(run, ResultRefused(**facts, owner=f"{index:064x}", check="lineage"))
    run = apply(run, ResultRefused(**facts, owner=PEERS[0].public_key, check="lineage"))
    assert set(run.peers) == {PEERS[0].public_key}
    assert run.peer(PEERS[0].public_key).rejected == 1
    assert run.rejected == 21
    broken = apply(run, ResultRefused(**facts, owner=PEERS[1].public_key, check="numbers"))
    assert broken.peer(PEERS[1].public_key).rejected == 1, "a refusal that cost a download is remembered"


def test_nothing_is_fetched_before_the_limits_are_known():
    driver = drive_judge(limits=False)
    driver.offer(make_record(driver.manifest, PEERS[0]))
    assert not driver.checks
    driver.send(LimitsKnown(limits_of(2), driver.now))
    assert len(driver.checks) == 1


def test_the_first_valid_result_supersedes_the_others():
    driver = drive_judge()
    results = [make_record(driver.manifest, peer) for peer in PEERS[:3]]
    for result in results:
        assert driver.offer(result).verdict == "queued"
    assert len(driver.checks) == 1, "one check per shard at a time"
    driver.send(CheckDone(results[0], Verdict("invalid", "numbers", "tensor x is not finite"), driver.now))
    assert driver.checks[-1].record == results[1], "the next candidate is checked"
    actions = driver.verdict(results[1])
    assert [a.record for a in actions if isinstance(a, DiscardCandidate)] == [results[2]]
    assert driver.kinds()[-1] == "checkpoint-superseded"
    assert driver.offer(results[2]).verdict == "superseded"
    third = driver.state.run.peer(PEERS[2].public_key)
    assert third.rejected == 0
    assert driver.state.run.rejected == 1
    assert driver.offer(results[0]).verdict == "superseded", "its epoch is accepted"


def test_a_copied_result_under_another_name_is_superseded():
    driver = drive_judge()
    original = make_record(driver.manifest, PEERS[0])
    copied = original.model_copy(update={"owner": PEERS[1].public_key, "peer_id": PEERS[1].peer_id})
    assert copied.digest == original.digest
    driver.offer(original)
    driver.offer(copied)
    driver.verdict(original)
    assert driver.offer(original).verdict == "accepted"
    assert driver.offer(copied).verdict == "superseded"
    assert driver.state.run.peer(PEERS[1].public_key).accepted == 0


def test_an_inconclusive_check_is_retried_then_given_up():
    driver = drive_judge(rules={"attempts": 3, "retry_delay": 5.0})
    result = make_record(driver.manifest, PEERS[0])
    driver.offer(result)
    for delay in (5.0, 10.0):
        driver.send(CheckDone(result, Verdict("inconclusive", "transfer", "nobody has its blobs"), driver.now))
        asked = len(driver.checks)
        driver.now += delay - 0.1
        driver.send(JudgeTick(driver.now))
        assert len(driver.checks) == asked
        driver.now += 0.2
        driver.send(JudgeTick(driver.now))
        assert len(driver.checks) == asked + 1
    actions = driver.send(CheckDone(result, Verdict("inconclusive", "transfer", "nobody has its blobs"), driver.now))
    assert any(isinstance(action, DiscardCandidate) for action in actions)
    assert driver.offer(result).verdict == "inconclusive"
    assert driver.offer(result, "poll").verdict == "inconclusive"
    assert driver.state.run.rejected == 0
    assert not driver.state.pending
    driver.now += 41
    assert driver.offer(result, "poll").verdict == "inconclusive", "a record in the DHT is no new offer"
    assert driver.offer(result).verdict == "queued"
    driver.verdict(result)
    assert driver.offer(result).verdict == "accepted"


def test_a_peer_that_offers_too_often_waits():
    driver = drive_judge(rules={"offers_per_minute": 3})
    result = make_record(driver.manifest, PEERS[0])
    assert [driver.offer(result).verdict for _ in range(4)] == ["queued", "queued", "queued", "busy"]
    driver.now += 61
    driver.send(JudgeTick(driver.now))
    assert len(driver.state.offers) == 0
    assert driver.offer(result).verdict == "queued"


def test_one_result_per_shard_and_owner_waits():
    driver = drive_judge()
    driver.offer(make_record(driver.manifest, PEERS[0]))
    reply = driver.offer(make_record(driver.manifest, PEERS[0], text="another"))
    assert reply.verdict == "busy"
    assert driver.offer(make_record(driver.manifest, PEERS[0], shard=1)).verdict == "queued"


def test_a_late_verdict_of_an_ended_check_changes_nothing():
    driver = drive_judge()
    result = make_record(driver.manifest, PEERS[0])
    driver.offer(result)
    driver.verdict(result)
    before = driver.state
    assert driver.verdict(result) == ()
    assert driver.state == before


def test_a_restart_checks_waiting_results_again():
    driver = drive_judge()
    result = make_record(driver.manifest, PEERS[0])
    driver.offer(result)
    state = RunState()
    for event in driver.events:
        state = apply(state, event)
    again = JudgeState.restored(state)
    driver.state, driver.checks = again, []
    driver.send(LimitsKnown(limits_of(2), driver.now))
    assert [check.record for check in driver.checks] == [result]


moves = st.lists(
    st.tuples(
        st.sampled_from(["offer", "poll", "valid", "invalid", "inconclusive", "tick", "restart", "late"]),
        st.integers(0, 3), st.integers(0, 1), st.integers(0, 3), st.sampled_from(["right", "wrong", "none"]), st.floats(0, 90),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=150)
@given(moves)
def test_an_epoch_is_never_accepted_twice(moves):
    driver = drive_judge(epochs=3, rules={"offers_per_minute": 5})
    for move, who, shard, ahead, parent, wait in moves:
        ledger = driver.state.run.shards[shard]
        if move in ("offer", "poll"):
            digest = {"right": ledger.accepted, "wrong": "e" * 64, "none": None}[parent]
            driver.offer(
                make_record(driver.manifest, PEERS[who], shard, max(1, ledger.epoch + ahead), digest, text=str(wait)), move
            )
        elif move == "tick":
            driver.now += wait
            driver.send(JudgeTick(driver.now))
        elif move == "restart":
            driver.state = JudgeState.restored(driver.state.run)
            driver.send(LimitsKnown(limits_of(2), driver.now))
        elif driver.checks:
            record = driver.checks[-1 if move != "late" else who % len(driver.checks)].record
            if move in ("valid", "late"):
                driver.verdict(record)
            else:
                driver.send(CheckDone(record, Verdict(move, "transfer", "why"), driver.now))
        for index, expected in driver.state.run.shards.items():
            assert expected.epoch <= driver.manifest.epochs
            assert bool(expected.candidates) == (index in driver.state.pending)
    accepted = [event.acceptance for event in driver.events if isinstance(event, CheckpointAccepted)]
    assert len({(a.shard, a.epoch) for a in accepted}) == len(accepted)
    for shard in range(2):
        lineage = [a for a in accepted if a.shard == shard]
        assert [a.parent for a in lineage] == [None, *[a.checkpoint for a in lineage]][: len(lineage)], (
            "each parent is the epoch before"
        )
    state = RunState()
    for event in driver.events:
        state = apply(state, event)
    assert state == driver.state.run
