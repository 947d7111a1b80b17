"""Audits as the judge decides them: who is due, what a conviction brings about, and what survives it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, audit_due, lottery
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import (
    Audited,
    CheckDone,
    DiscardCandidate,
    JudgeTick,
    LedgerFacts,
    LimitsKnown,
    PublishReset,
    StartCheck,
)
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.admin.pardon import noted_pardons, pardon, remove_notes
from lutetia.coordinator.ledger.events import (
    AuditDone,
    AuditDue,
    CheckpointAccepted,
    LineageRolledBack,
    PeerPardoned,
    PeerQuarantined,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings
from lutetia.protocol.schema.records import AcceptanceRecord, ResetRecord
from lutetia.system.errors import UsageError
from tests.coordinator.acceptance.judge_driver import PEERS, Court, court, limits_of, make_record
from tests.coordinator.tiny_data import build_tiny

CHEAT, HONEST, OTHER = PEERS[0], PEERS[1], PEERS[2]


def owner(peer) -> str:
    return peer.public_key


# --- the rule ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(0, 500), st.floats(0, 1, exclude_max=True))
def test_the_rule_is_boincs(needed: int, streak: int, draw: float):
    due = audit_due(streak, needed, draw)
    if streak < needed:
        assert due, "always below the threshold"
    elif due:
        assert draw < 1 / streak
    else:
        assert draw >= 1 / streak


@settings(max_examples=30)
@given(st.integers(0, 1 << 32), st.integers(1, 20))
def test_in_the_long_run_one_in_n_is_audited_and_a_conviction_begins_anew(seed: int, needed: int):
    """n grows by audits only, so after N results about sqrt(2 N) were audited: dn/dN = 1/n."""
    secret, streak, audits = seed.to_bytes(8, "big"), 0, 0
    for number in range(3000):
        if audit_due(streak, needed, lottery(secret, f"{number:064x}")):
            streak, audits = streak + 1, audits + 1
    assert audits == streak
    assert 50 < audits < 110, "sqrt(6000) is 77"
    convicted = 0
    assert all(audit_due(convicted + step, needed, 0.999999) for step in range(needed))


def test_nobody_foresees_the_lottery():
    tickets = [lottery(b"secret", f"{n:064x}") for n in range(4000)]
    assert 0.48 < sum(tickets) / len(tickets) < 0.52
    assert lottery(b"other", "0" * 64) != tickets[0], "without the secret nothing follows from the digest"
    whole = [lottery(b"secret", f"{n:064x}", "whole") for n in range(4000)]
    both = sum(a < 0.1 and b < 0.1 for a, b in zip(tickets, whole, strict=True))
    assert 15 < both < 80, "whether an audit is whole does not follow from whether it is due"


# --- the ordinary course ----------------------------------------------------------------------------------------------------


def test_only_valid_audits_earn_trust_and_one_kind_of_software_at_a_time():
    c = court(epochs=40, rules={"offers_per_minute": 100})
    for expected in range(10):
        assert c.state.run.peer(owner(HONEST)).streak == expected
        c.accept(HONEST)
        assert c.state.run.shards[0].audit == "due"
        c.audited("valid")
    spared = 0
    for _ in range(20):
        c.accept(HONEST)
        if c.state.run.audits:
            c.audited("valid")
        else:
            spared += 1
            assert c.state.run.shards[0].audit == "not due"
    assert spared > 10
    before = c.state.run.peer(owner(HONEST)).streak
    assert before == 30 - spared
    record = c.accept(HONEST, made={"device": "cpu", "software": "9.9"})
    assert c.state.run.peer(owner(HONEST)).streak == 0, "a new version earns its own trust"
    assert record.digest in c.state.run.audits


def test_an_audit_without_outcome_is_tried_again_and_then_given_up_without_trust():
    c = court(rules={"audit_attempts": 3, "audit_delay": 10.0})
    first = c.accept(HONEST)
    for delay in (10.0, 20.0):
        c.audited("inconclusive")
        asked = len(c.audits)
        c.now += delay - 0.1
        c.hears(JudgeTick(c.now))
        assert len(c.audits) == asked
        c.now += 0.2
        c.hears(JudgeTick(c.now))
        assert len(c.audits) == asked + 1
    c.audited("inconclusive")
    assert not c.state.run.audits
    assert c.state.run.shards[0].audit == "inconclusive"
    assert c.state.run.peer(owner(HONEST)).streak == 0
    assert c.audited("valid", first.digest) == (), "a late answer changes nothing"


def test_losses_between_the_bounds_ask_for_the_whole_epoch_at_once():
    c = court(audit={"whole_epoch": 0})
    first = c.accept(HONEST)
    assert not c.audits[-1].audit.whole
    c.hears(Audited(first.digest, AuditFinding(outcome="inconclusive", text="step 1", closer=True), c.now))
    assert (c.audits[-1].audit.checkpoint, c.audits[-1].audit.whole) == (first.digest, True)
    c.audited("valid")
    assert c.state.run.peer(owner(HONEST)).streak == 1


def test_an_end_in_doubt_takes_all_trust_and_is_not_replayed_again():
    c = court(shards=1, epochs=40, audit={"streak": 3, "whole_epoch": 1})
    for _ in range(3):
        c.accept(CHEAT)
        c.audited("valid")
    assert c.state.run.peer(owner(CHEAT)).streak == 3
    while not c.state.run.audits:
        slip = c.accept(CHEAT)
    c.hears(Audited(slip.digest, AuditFinding(outcome="inconclusive", text="12 times as far", doubt=True), c.now))
    assert not c.state.run.audits
    assert c.events[-1].kind == "audit-done"
    assert c.state.run.peer(owner(CHEAT)).streak == 0
    assert not c.state.run.quarantined
    assert c.accept(CHEAT).digest in c.state.run.audits, "everything of it is audited again"


def test_audits_go_one_by_one_oldest_first_and_survive_a_restart():
    c = court(shards=3)
    for shard in (2, 0, 1):
        c.now += 1
        c.accept(PEERS[shard], shard)
    assert [audit.audit.shard for audit in c.audits] == [2]
    c.state = JudgeState.restored(c.state.run)
    c.hears(LimitsKnown(limits_of(3), c.now))
    assert c.audits[-1].audit.shard == 2
    for _ in range(3):
        c.audited("valid")
    assert [audit.audit.shard for audit in c.audits[1:]] == [2, 0, 1]


def test_without_steps_to_replay_nobody_is_audited():
    c = court(audit={"replay_steps": 0, "whole_epoch": 0})
    c.accept(HONEST)
    assert not c.state.run.audits
    assert c.state.run.shards[0].audit == "not due"


# --- a conviction -----------------------------------------------------------------------------------------------------------


def convicted() -> tuple[Court, list]:
    """Shard 0: honest, cheat, honest on top; shard 1: cheat, honest. Then the cheat's epoch 2 of shard 0 is found invalid."""
    c = court(shards=3, epochs=5)
    c.accept(HONEST)
    c.audited("valid")
    c.now += 5
    earlier = c.accept(CHEAT, 1)
    c.audited("valid")
    c.now += 5
    faked = c.accept(CHEAT)
    c.now += 5
    c.accept(HONEST)
    c.accept(OTHER, 1)
    c.accept(OTHER, 2)
    c.offer(make_record(c.manifest, HONEST, 0, 4, c.state.run.shards[0].accepted))
    c.offer(make_record(c.manifest, CHEAT, 2, 2, c.state.run.shards[2].accepted))
    assert c.audits[-1].audit.checkpoint == faked.digest
    actions = c.audited("invalid")
    return c, [earlier, faked, *actions]


def test_a_conviction_quarantines_rolls_back_and_looks_again():
    c, (earlier, faked, *actions) = convicted()
    run = c.state.run
    assert set(run.quarantined) == {owner(CHEAT)}
    assert "step 2" in run.quarantined[owner(CHEAT)].text
    assert run.peer(owner(CHEAT)).streak == 0
    zero, one, two = (run.shards[index] for index in range(3))
    assert (zero.epoch, zero.term, len(zero.lineage)) == (1, 1, 1)
    assert zero.candidates == {}
    assert (one.epoch, one.term) == (2, 0), "other shards are not touched"
    assert (two.epoch, two.term) == (1, 0)
    assert two.candidates == {}, "what the cheat had in judgement is refused"
    proclaimed = [action.record for action in actions if isinstance(action, PublishReset)]
    assert [(record.epoch, record.term) for record in proclaimed if isinstance(record, AcceptanceRecord)] == [(1, 1)]
    assert len([action for action in actions if isinstance(action, DiscardCandidate)]) == 2
    again = [event for event in c.events if isinstance(event, AuditDue) and event.why == "re-audit"]
    assert [(event.checkpoint, event.whole) for event in again] == [(earlier.digest, True)], "also what was found valid in part"
    assert c.audits[-1].audit.checkpoint == earlier.digest, "it is the oldest"
    assert faked.digest not in run.audits


def test_a_quarantined_peer_is_refused_with_a_typed_reason_until_it_is_pardoned():
    c, _ = convicted()
    record = make_record(c.manifest, CHEAT, 0, 2, c.state.run.shards[0].accepted, text="again")
    reply = c.offer(record)
    assert (reply.verdict, reply.check) == ("invalid", "quarantine")
    assert "epoch 2 of shard 0" in reply.text
    assert "operator" in reply.text
    shown = status(c.state.run, c.manifest, LiveView(), c.now)
    assert [(why.owner, why.shard, why.epoch) for why in shown.quarantined] == [(owner(CHEAT), 0, 2)]
    assert shown.shards[0].term == 1
    c.hears(LedgerFacts((PeerPardoned(time=c.now, owner=owner(CHEAT)),), c.now))
    assert c.offer(record).verdict == "queued"
    assert c.state.run.peer(owner(CHEAT)).streak == 0


def test_work_goes_on_in_the_new_term_and_what_stood_on_the_fake_is_superseded():
    c, (_, faked, *_) = convicted()
    orphan = make_record(c.manifest, OTHER, 0, 3, faked.digest)
    reply = c.offer(orphan)
    assert (reply.verdict, "rolled back to epoch 1" in reply.text) == ("superseded", True)
    record = c.accept(HONEST, text="again")
    given = [event.acceptance for event in c.events if isinstance(event, CheckpointAccepted)][-1]
    assert (given.checkpoint, given.epoch, given.term) == (record.digest, 2, 1)


def test_a_second_conviction_falls_further_to_the_beginning():
    c, (earlier, *_) = convicted()
    actions = c.audited("invalid", earlier.digest)
    shard = c.state.run.shards[1]
    assert (shard.epoch, shard.term, shard.acceptance, shard.accepted) == (0, 1, None, None)
    assert [type(action.record) for action in actions if isinstance(action, PublishReset)] == [ResetRecord]
    assert len([event for event in c.events if isinstance(event, PeerQuarantined)]) == 1
    assert shard.parent_loss == 0.5, "compared with the initial model again"
    c.accept(OTHER, 1, text="from the beginning")
    assert c.state.run.shards[1].epoch == 1


def test_a_check_that_was_under_way_when_the_lineage_fell_changes_nothing():
    c = court(epochs=5)
    c.accept(CHEAT)
    late = make_record(c.manifest, HONEST, 0, 2, c.state.run.shards[0].accepted)
    c.offer(late)
    assert c.checks[-1] == StartCheck(late, 0.4)
    c.audited("invalid")
    before = c.state
    assert c.hears(CheckDone(late, Verdict("valid", "holdout", "", 0.3, 0.4), c.now)) == ()
    assert c.state == before
    assert c.accept(HONEST).epoch == 1


def test_a_run_that_had_finished_is_open_again():
    c = court(shards=1, epochs=1)
    c.accept(CHEAT)
    c.audited("invalid")
    assert not c.state.run.budgets_done
    assert c.state.run.mixture is None


moves = st.lists(
    st.tuples(st.sampled_from(["work", "fake", "audit", "restart", "tick", "pardon"]), st.integers(0, 2), st.integers(0, 1)),
    max_size=60,
)


@settings(max_examples=100)
@given(moves, st.integers(0, 1000))
def test_whatever_happens_the_lineages_are_whole_and_the_ledger_adds_up(moves, seed):
    """Peer 0 fakes now and then, at whole and partial audits alike; replays tell the truth or nothing."""
    c, draw, faked = court(epochs=6), random.Random(seed), set()
    for number, (move, who, shard) in enumerate(moves):
        c.now += 20
        ledger = c.state.run.shards[shard]
        if move in ("work", "fake") and ledger.epoch < 6 and owner(PEERS[who]) not in c.state.run.quarantined:
            record = c.accept(PEERS[who], shard, text=str(number))
            if move == "fake" and who == 0:
                faked.add(record.digest)
        elif move == "audit" and c.state.auditing:
            found = "inconclusive" if draw.random() < 0.2 else "invalid" if c.state.auditing in faked else "valid"
            c.audited(found, c.state.auditing)
        elif move == "restart":
            c.state = JudgeState.restored(c.state.run)
            c.hears(LimitsKnown(limits_of(2), c.now))
        elif move == "pardon":
            c.hears(LedgerFacts((PeerPardoned(time=c.now, owner=owner(PEERS[who])),), c.now))
        c.hears(JudgeTick(c.now))
        check_lineages(c.state.run)
    for event in c.events:
        if isinstance(event, LineageRolledBack):
            assert event.checkpoint in faked, "nobody falls for another's fault alone"
        if isinstance(event, PeerQuarantined):
            assert event.owner == owner(PEERS[0])
    state = RunState()
    for event in c.events:
        state = apply(state, event)
    assert state == c.state.run


def check_lineages(run: RunState) -> None:
    for shard in run.shards.values():
        chain = [link.acceptance for link in shard.lineage]
        assert [given.epoch for given in chain] == list(range(1, shard.epoch + 1))
        assert [given.parent for given in chain] == [None, *(given.checkpoint for given in chain)][: len(chain)]
        assert shard.acceptance == (chain[-1] if chain else None)
        assert {link.acceptance.checkpoint for link in shard.lineage if link.audit == "due"} == {
            audit.checkpoint for audit in run.audits.values() if run.shards[audit.shard] is shard
        }


@pytest.mark.parametrize("outcome", ["valid", "invalid", "inconclusive", "not carried out"])
def test_old_ledgers_can_be_read(outcome):
    """Events of the first version, which never replayed anything."""
    c = court()
    record = c.accept(HONEST)
    facts = {"time": c.now, "shard": 0, "epoch": 1, "owner": record.owner, "checkpoint": record.digest}
    state = apply(c.state.run, AuditDone(**facts, outcome=outcome))
    assert state.shards[0].audit == outcome
    assert not state.audits


def test_a_pardon_by_the_operator_is_done_at_once_or_left_as_a_note(tmp_path):
    created = create_run(build_tiny(tmp_path / "data"), tmp_path / "run", RunSettings(preset="tiny"))
    folder = RunFolder(created.folder)
    ledger = Ledger.open(folder.ledger)
    facts = {"time": 1.0, "shard": 0, "epoch": 1, "checkpoint": "0" * 64, "text": "step 2"}
    ledger.append([PeerQuarantined(**facts, owner=owner(peer)) for peer in (CHEAT, OTHER)])
    ledger.close()
    with pytest.raises(UsageError, match="no quarantined peer is called"):
        pardon(created.folder, owner(HONEST))
    assert pardon(created.folder, owner(CHEAT)[:8]) == (owner(CHEAT), True)
    assert set(Ledger.open(folder.ledger).state.quarantined) == {owner(OTHER)}
    with folder.locked():
        assert pardon(created.folder, OTHER.peer_id) == (owner(OTHER), False)
    assert noted_pardons(folder) == [owner(OTHER)]
    remove_notes(folder, noted_pardons(folder))
    assert noted_pardons(folder) == []
