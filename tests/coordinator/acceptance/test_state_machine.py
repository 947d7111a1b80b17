"""The judge as a person would question it: what becomes of each result, and can it ever accept two?"""

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
from tests.coordinator.acceptance.judge_driver import PEERS, Court, court, limits_of, make_record


def test_a_valid_result_is_queued_checked_accepted_and_published():
    c = court()
    first = make_record(c.manifest, PEERS[0])
    assert c.offer(first).verdict == "queued"
    assert c.checks == [StartCheck(first, None)]
    assert c.offer(first).verdict == "queued", "offering again asks how it stands"
    actions = c.verdict(first, 0.4)
    acceptance = next(action.acceptance for action in actions if isinstance(action, Publish))
    assert acceptance.epoch == 1
    assert acceptance.checkpoint == first.digest
    assert acceptance.author == PEERS[0].public_key
    assert acceptance.tenure_until == c.now + c.manifest.timing.tenure
    assert acceptance.holdout_loss == 0.4
    assert c.offer(first).verdict == "accepted"
    assert c.kinds() == ["run-created", "checkpoint-seen", "baseline-measured", "checkpoint-accepted", "audit-due"]


def test_the_next_epoch_must_stand_on_the_accepted_one():
    c = court()
    first = make_record(c.manifest, PEERS[0])
    early = make_record(c.manifest, PEERS[0], epoch=2, parent=first.digest)
    reply = c.offer(early)
    assert reply.verdict == "busy"
    assert reply.retry_after
    c.offer(first)
    c.verdict(first)
    orphan = make_record(c.manifest, PEERS[1], epoch=2, parent="0" * 64)
    reply = c.offer(orphan)
    assert (reply.verdict, reply.check) == ("invalid", "lineage")
    assert "its parent is 0000" in reply.text
    assert c.offer(early).verdict == "queued"
    assert c.checks[-1] == StartCheck(early, 0.4), "compared with the accepted parent"


@pytest.mark.parametrize(
    ("change", "rung", "words"),
    [
        ({"run": "a" * 64}, "signature", "is of run aaaa"),
        ({"peer_id": "12D3KooWsomebodyElseEntirely"}, "signature", "not its owner's"),
        ({"samples": 3}, "lineage", "3 samples"),
        ({"parent": "b" * 64}, "lineage", "the initial model"),
        ({"shard": 7}, "lineage", "no shard 7"),
    ],
)
def test_what_is_refused_at_the_door_says_why(change, rung, words):
    c = court()
    reply = c.offer(make_record(c.manifest, PEERS[0], **change))
    assert (reply.verdict, reply.check) == ("invalid", rung)
    assert words in reply.text
    assert not c.checks


def test_the_allowlist_is_kept():
    c = court(allowlist=(PEERS[0].public_key,))
    assert c.offer(make_record(c.manifest, PEERS[0])).verdict == "queued"
    reply = c.offer(make_record(c.manifest, PEERS[1]))
    assert reply.verdict == "invalid"
    assert "allowlist" in reply.text


def oversized(c: Court, peer: Identity) -> CheckpointRecord:
    record = make_record(c.manifest, peer)
    return record.model_copy(update={"weights": record.weights.model_copy(update={"size": 1001})})


def test_oversized_blobs_are_refused_before_a_byte_is_fetched():
    c = court()
    reply = c.offer(oversized(c, PEERS[0]))
    assert (reply.verdict, reply.check) == ("invalid", "size")
    assert "1001 bytes" in reply.text
    assert not c.checks


def test_oversized_blobs_that_came_before_the_limits_were_known_are_refused_then():
    c = court(limits=False)
    big = oversized(c, PEERS[0])
    assert c.offer(big).verdict == "queued"
    c.hears(LimitsKnown(limits_of(2), c.now))
    refusal = c.events[-1]
    assert isinstance(refusal, ResultRefused)
    assert refusal.check == "size"
    assert not c.checks
    assert c.offer(big).verdict == "invalid"
    assert c.state.run.rejected == 1


@pytest.mark.parametrize("via", ["offer", "poll"])
def test_what_costs_a_stranger_nothing_leaves_no_trace(via: str):
    """Else throw-away identities would grow the ledger and the state without bound, and so would each look at the DHT."""
    c = court(allowlist=None, rules={"offers_per_minute": 1000})
    c.accept(PEERS[0])
    before, strangers = c.state.run, [Identity.derived(f"stranger {index}") for index in range(20)]
    for _ in range(3):
        for stranger in (*strangers, PEERS[0]):
            orphan = make_record(c.manifest, stranger, epoch=2, parent="e" * 64)
            assert c.offer(orphan, via).check == "lineage"
            assert c.offer(orphan.model_copy(update={"peer_id": PEERS[5].peer_id}), via).check == "signature"
            big = oversized(c, stranger)
            assert c.offer(big.model_copy(update={"shard": 1}), via).check == "size"
    assert c.state.run == before


def test_old_ledgers_tell_of_strangers_whom_the_state_need_not_remember():
    """They hold an event for every refusal at the door."""
    c = court()
    c.accept(PEERS[0])
    facts = {"time": c.now, "shard": 0, "epoch": 2, "checkpoint": "e" * 64, "verdict": "invalid", "text": "its parent is another"}
    run = c.state.run
    for index in range(20):
        run = apply(run, ResultRefused(**facts, owner=f"{index:064x}", check="lineage"))
    run = apply(run, ResultRefused(**facts, owner=PEERS[0].public_key, check="lineage"))
    assert set(run.peers) == {PEERS[0].public_key}
    assert run.peer(PEERS[0].public_key).rejected == 1
    assert run.rejected == 21
    spoilt = apply(run, ResultRefused(**facts, owner=PEERS[1].public_key, check="numbers"))
    assert spoilt.peer(PEERS[1].public_key).rejected == 1, "bytes that had to be looked at are remembered"


def test_nothing_is_fetched_before_the_limits_are_known():
    c = court(limits=False)
    c.offer(make_record(c.manifest, PEERS[0]))
    assert not c.checks
    c.hears(LimitsKnown(limits_of(2), c.now))
    assert len(c.checks) == 1


def test_first_valid_wins_and_the_others_are_superseded_without_blame():
    c = court()
    results = [make_record(c.manifest, peer) for peer in PEERS[:3]]
    for result in results:
        assert c.offer(result).verdict == "queued"
    assert len(c.checks) == 1, "one check per shard at a time"
    c.hears(CheckDone(results[0], Verdict("invalid", "numbers", "tensor x is not finite"), c.now))
    assert c.checks[-1].record == results[1], "the next in line gets its turn"
    actions = c.verdict(results[1])
    assert [a.record for a in actions if isinstance(a, DiscardCandidate)] == [results[2]]
    assert c.kinds()[-1] == "checkpoint-superseded"
    assert c.offer(results[2]).verdict == "superseded"
    third = c.state.run.peer(PEERS[2].public_key)
    assert third.rejected == 0
    assert c.state.run.rejected == 1
    assert c.offer(results[0]).verdict == "superseded", "its epoch is over"


def test_a_copied_result_under_another_name_wins_nothing():
    c = court()
    own = make_record(c.manifest, PEERS[0])
    copied = own.model_copy(update={"owner": PEERS[1].public_key, "peer_id": PEERS[1].peer_id})
    assert copied.digest == own.digest
    c.offer(own)
    c.offer(copied)
    c.verdict(own)
    assert c.offer(own).verdict == "accepted"
    assert c.offer(copied).verdict == "superseded"
    assert c.state.run.peer(PEERS[1].public_key).accepted == 0


def test_an_inconclusive_check_is_retried_with_back_off_and_then_given_up():
    c = court(rules={"attempts": 3, "retry_delay": 5.0})
    result = make_record(c.manifest, PEERS[0])
    c.offer(result)
    for delay in (5.0, 10.0):
        c.hears(CheckDone(result, Verdict("inconclusive", "transfer", "nobody has its blobs"), c.now))
        asked = len(c.checks)
        c.now += delay - 0.1
        c.hears(JudgeTick(c.now))
        assert len(c.checks) == asked
        c.now += 0.2
        c.hears(JudgeTick(c.now))
        assert len(c.checks) == asked + 1
    actions = c.hears(CheckDone(result, Verdict("inconclusive", "transfer", "nobody has its blobs"), c.now))
    assert any(isinstance(action, DiscardCandidate) for action in actions)
    assert c.offer(result).verdict == "inconclusive"
    assert c.offer(result, "poll").verdict == "inconclusive"
    assert c.state.run.rejected == 0
    assert not c.state.pending
    c.now += 41
    assert c.offer(result, "poll").verdict == "inconclusive", "lying in the DHT is not insisting"
    assert c.offer(result).verdict == "queued"
    c.verdict(result)
    assert c.offer(result).verdict == "accepted"


def test_a_peer_that_offers_too_often_waits():
    c = court(rules={"offers_per_minute": 3})
    result = make_record(c.manifest, PEERS[0])
    assert [c.offer(result).verdict for _ in range(4)] == ["queued", "queued", "queued", "busy"]
    c.now += 61
    c.hears(JudgeTick(c.now))
    assert len(c.state.offers) == 0
    assert c.offer(result).verdict == "queued"


def test_one_result_per_shard_and_owner_waits_at_a_time():
    c = court()
    c.offer(make_record(c.manifest, PEERS[0]))
    reply = c.offer(make_record(c.manifest, PEERS[0], text="another"))
    assert reply.verdict == "busy"
    assert c.offer(make_record(c.manifest, PEERS[0], shard=1)).verdict == "queued"


def test_a_late_answer_of_an_ended_check_changes_nothing():
    c = court()
    result = make_record(c.manifest, PEERS[0])
    c.offer(result)
    c.verdict(result)
    before = c.state
    assert c.verdict(result) == ()
    assert c.state == before


def test_a_restart_judges_again_what_was_in_flight():
    c = court()
    result = make_record(c.manifest, PEERS[0])
    c.offer(result)
    state = RunState()
    for event in c.events:
        state = apply(state, event)
    again = JudgeState.restored(state)
    c.state, c.checks = again, []
    c.hears(LimitsKnown(limits_of(2), c.now))
    assert [check.record for check in c.checks] == [result]


moves = st.lists(
    st.tuples(
        st.sampled_from(["offer", "poll", "valid", "invalid", "inconclusive", "tick", "restart", "late"]),
        st.integers(0, 3), st.integers(0, 1), st.integers(0, 3), st.sampled_from(["right", "wrong", "none"]), st.floats(0, 90),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=150)
@given(moves)
def test_never_two_acceptances_of_one_epoch_whatever_happens(moves):
    c = court(epochs=3, rules={"offers_per_minute": 5})
    for move, who, shard, ahead, parent, wait in moves:
        ledger = c.state.run.shards[shard]
        if move in ("offer", "poll"):
            digest = {"right": ledger.accepted, "wrong": "e" * 64, "none": None}[parent]
            c.offer(make_record(c.manifest, PEERS[who], shard, max(1, ledger.epoch + ahead), digest, text=str(wait)), move)
        elif move == "tick":
            c.now += wait
            c.hears(JudgeTick(c.now))
        elif move == "restart":
            c.state = JudgeState.restored(c.state.run)
            c.hears(LimitsKnown(limits_of(2), c.now))
        elif c.checks:
            record = c.checks[-1 if move != "late" else who % len(c.checks)].record
            if move in ("valid", "late"):
                c.verdict(record)
            else:
                c.hears(CheckDone(record, Verdict(move, "transfer", "why"), c.now))
        for index, expected in c.state.run.shards.items():
            assert expected.epoch <= c.manifest.epochs
            assert bool(expected.candidates) == (index in c.state.pending)
    accepted = [event.acceptance for event in c.events if isinstance(event, CheckpointAccepted)]
    assert len({(a.shard, a.epoch) for a in accepted}) == len(accepted)
    for shard in range(2):
        lineage = [a for a in accepted if a.shard == shard]
        assert [a.parent for a in lineage] == [None, *[a.checkpoint for a in lineage]][: len(lineage)], "one unbroken line"
    state = RunState()
    for event in c.events:
        state = apply(state, event)
    assert state == c.state.run
