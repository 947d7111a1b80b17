"""Audits as the judge decides them: which are due, what follows from a conviction, and what it leaves untouched."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, audit_due, lottery, secret_steps
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import (
    Audited,
    CheckDone,
    DiscardCandidate,
    JudgeTick,
    LedgerFacts,
    LimitsKnown,
    PublishReset,
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
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, limits_of, make_record
from tests.coordinator.tiny_data import build_tiny

CHEAT, HONEST, OTHER = PEERS[0], PEERS[1], PEERS[2]


def owner(peer) -> str:
    return peer.public_key


# --- the rule ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(0, 500), st.floats(0, 1, exclude_max=True))
def test_audit_due_follows_adaptive_replication(needed: int, streak: int, draw: float):
    due = audit_due(streak, needed, draw)
    if streak < needed:
        assert due, "always below the threshold"
    elif due:
        assert draw < 1 / streak
    else:
        assert draw >= 1 / streak


@settings(max_examples=30)
@given(st.integers(0, 1 << 32), st.integers(1, 20))
def test_in_the_long_run_one_in_n_is_audited(seed: int, needed: int):
    """n grows by audits only: dn/dN = 1/n, so about sqrt(2 N) of N results are audited. After a conviction n is 0."""
    secret, streak, audits = seed.to_bytes(8, "big"), 0, 0
    for number in range(3000):
        if audit_due(streak, needed, lottery(secret, f"{number:064x}")):
            streak, audits = streak + 1, audits + 1
    assert audits == streak
    assert 50 < audits < 110, "sqrt(6000) is 77"
    convicted = 0
    assert all(audit_due(convicted + step, needed, 0.999999) for step in range(needed))


def test_the_lottery_is_unpredictable_and_uniform():
    draws = [lottery(b"secret", f"{n:064x}") for n in range(4000)]
    assert 0.48 < sum(draws) / len(draws) < 0.52
    assert lottery(b"other", "0" * 64) != draws[0], "the digest alone does not determine it"
    whole = [lottery(b"secret", f"{n:064x}", "whole") for n in range(4000)]
    both = sum(a < 0.1 and b < 0.1 for a, b in zip(draws, whole, strict=True))
    assert 15 < both < 80, "whether an audit is whole is independent of whether it is due"


# --- the ordinary course ----------------------------------------------------------------------------------------------------


def test_only_valid_audits_of_one_build_earn_trust():
    driver = drive_judge(epochs=40, rules={"offers_per_minute": 100})
    for expected in range(10):
        assert driver.state.run.peer(owner(HONEST)).streak == expected
        driver.accept(HONEST)
        assert driver.state.run.shards[0].audit == "due"
        driver.finish_audit("valid")
    spared = 0
    for _ in range(20):
        driver.accept(HONEST)
        if driver.state.run.audits:
            driver.finish_audit("valid")
        else:
            spared += 1
            assert driver.state.run.shards[0].audit == "not due"
    assert spared > 10
    before = driver.state.run.peer(owner(HONEST)).streak
    assert before == 30 - spared
    record = driver.accept(HONEST, made={"device": "cpu", "software": "9.9"})
    assert driver.state.run.peer(owner(HONEST)).streak == 0, "a new version earns its own trust"
    assert record.digest in driver.state.run.audits


def test_an_inconclusive_audit_is_retried_then_given_up():
    driver = drive_judge(rules={"audit_attempts": 3, "audit_delay": 10.0})
    first = driver.accept(HONEST)
    for delay in (10.0, 20.0):
        driver.finish_audit("inconclusive")
        asked = len(driver.audits)
        driver.now += delay - 0.1
        driver.send(JudgeTick(driver.now))
        assert len(driver.audits) == asked
        driver.now += 0.2
        driver.send(JudgeTick(driver.now))
        assert len(driver.audits) == asked + 1
    driver.finish_audit("inconclusive")
    assert not driver.state.run.audits
    assert driver.state.run.shards[0].audit == "inconclusive"
    assert driver.state.run.peer(owner(HONEST)).streak == 0
    assert driver.finish_audit("valid", first.digest) == (), "a late finding changes nothing"


def test_losses_between_the_bounds_lead_to_a_whole_replay():
    driver = drive_judge(audit={"whole_epoch": 0})
    first = driver.accept(HONEST)
    assert not driver.audits[-1].audit.whole
    driver.send(Audited(first.digest, AuditFinding(outcome="inconclusive", text="step 1", closer=True), driver.now))
    assert (driver.audits[-1].audit.checkpoint, driver.audits[-1].audit.whole) == (first.digest, True)
    driver.finish_audit("valid")
    assert driver.state.run.peer(owner(HONEST)).streak == 1


def test_an_end_in_doubt_resets_trust_without_a_replay():
    driver = drive_judge(shards=1, epochs=40, audit={"streak": 3, "whole_epoch": 1})
    for _ in range(3):
        driver.accept(CHEAT)
        driver.finish_audit("valid")
    assert driver.state.run.peer(owner(CHEAT)).streak == 3
    while not driver.state.run.audits:
        doubtful = driver.accept(CHEAT)
    driver.send(Audited(doubtful.digest, AuditFinding(outcome="inconclusive", text="12 times as far", doubt=True), driver.now))
    assert not driver.state.run.audits
    assert driver.events[-1].kind == "audit-done"
    assert driver.state.run.peer(owner(CHEAT)).streak == 0
    assert not driver.state.run.quarantined
    assert driver.accept(CHEAT).digest in driver.state.run.audits, "everything of it is audited again"


def test_audits_run_oldest_first_and_survive_a_restart():
    driver = drive_judge(shards=3)
    for shard in (2, 0, 1):
        driver.now += 1
        driver.accept(PEERS[shard], shard)
    assert [audit.audit.shard for audit in driver.audits] == [2]
    driver.state = JudgeState.restored(driver.state.run)
    driver.send(LimitsKnown(limits_of(3), driver.now))
    assert driver.audits[-1].audit.shard == 2
    for _ in range(3):
        driver.finish_audit("valid")
    assert [audit.audit.shard for audit in driver.audits[1:]] == [2, 0, 1]


def test_no_audits_when_the_policy_replays_no_steps():
    driver = drive_judge(audit={"replay_steps": 0, "whole_epoch": 0})
    driver.accept(HONEST)
    assert not driver.state.run.audits
    assert driver.state.run.shards[0].audit == "not due"


# --- a conviction -----------------------------------------------------------------------------------------------------------


def convicted() -> tuple[JudgeDriver, list]:
    """Epochs of shard 0 by honest, cheat, honest; of shard 1 by cheat, other. Then the cheat's on shard 0 is found invalid."""
    driver = drive_judge(shards=3, epochs=5)
    driver.accept(HONEST)
    driver.finish_audit("valid")
    driver.now += 5
    earlier = driver.accept(CHEAT, 1)
    driver.finish_audit("valid")
    driver.now += 5
    faked = driver.accept(CHEAT)
    driver.now += 5
    driver.accept(HONEST)
    driver.accept(OTHER, 1)
    driver.accept(OTHER, 2)
    driver.offer(make_record(driver.manifest, HONEST, 0, 4, driver.state.run.shards[0].accepted))
    driver.offer(make_record(driver.manifest, CHEAT, 2, 2, driver.state.run.shards[2].accepted))
    assert driver.audits[-1].audit.checkpoint == faked.digest
    actions = driver.finish_audit("invalid")
    return driver, [earlier, faked, *actions]


def test_a_conviction_quarantines_rolls_back_and_re_audits():
    driver, (earlier, faked, *actions) = convicted()
    run = driver.state.run
    assert set(run.quarantined) == {owner(CHEAT)}
    assert "step 2" in run.quarantined[owner(CHEAT)].text
    assert run.peer(owner(CHEAT)).streak == 0
    zero, one, two = (run.shards[index] for index in range(3))
    assert (zero.epoch, zero.term, len(zero.lineage)) == (1, 1, 1)
    assert zero.candidates == {}
    assert (one.epoch, one.term) == (2, 0), "other shards are not touched"
    assert (two.epoch, two.term) == (1, 0)
    assert two.candidates == {}, "the cheat's candidates are refused"
    published = [action.record for action in actions if isinstance(action, PublishReset)]
    assert [(record.epoch, record.term) for record in published if isinstance(record, AcceptanceRecord)] == [(1, 1)]
    assert len([action for action in actions if isinstance(action, DiscardCandidate)]) == 2
    again = [event for event in driver.events if isinstance(event, AuditDue) and event.why == "re-audit"]
    assert [(event.checkpoint, event.whole) for event in again] == [(earlier.digest, True)], (
        "also one that was found valid in part"
    )
    assert driver.audits[-1].audit.checkpoint == earlier.digest, "it is the oldest"
    assert faked.digest not in run.audits


@pytest.mark.parametrize(("fewest", "epoch"), [(4, 16), (4, 100), (8, 40)])
def test_how_many_steps_are_replayed_is_secret_and_half_as_many_more_on_average(fewest: int, epoch: int):
    steps = [secret_steps((place + 0.5) / 20_000, fewest, epoch) for place in range(20_000)]
    assert sum(steps) / len(steps) == pytest.approx(1.5 * fewest, rel=0.02)
    assert (min(steps), max(steps)) == (fewest, epoch)
    reach = {k: sum(count >= k for count in steps) for k in (fewest + 1, epoch)}
    assert reach[fewest + 1] / reach[epoch] == pytest.approx(epoch / (fewest + 1), rel=0.1), "k or more: in proportion to 1 / k"


@pytest.mark.parametrize(("fewest", "epoch", "expected"), [(4, 4, 4), (4, 3, 3), (9, 1, 1)])
def test_short_epochs_are_replayed_to_their_last_step(fewest: int, epoch: int, expected: int):
    assert {secret_steps(draw, fewest, epoch) for draw in (0.0, 1e-9, 0.5, 0.999)} == {expected}


def test_an_audit_replays_equally_many_steps_at_each_try_and_results_differ():
    driver = drive_judge(shards=1, epochs=12, checkpoint_samples=32, samples_per_shard=384, audit={"whole_epoch": 0})
    counts = []
    for epoch in range(12):
        driver.accept(HONEST, text=str(epoch))
        counts.append(driver.audits[-1].steps)
        driver.finish_audit("inconclusive")
        driver.now += 3600
        driver.send(JudgeTick(driver.now))
        assert driver.audits[-1].steps == counts[-1]
        driver.finish_audit("valid")
    assert len(set(counts)) > 1
    assert min(counts) >= driver.manifest.audit.replay_steps


def test_a_quarantined_peer_is_refused_until_pardoned():
    driver, _ = convicted()
    record = make_record(driver.manifest, CHEAT, 0, 2, driver.state.run.shards[0].accepted, text="again")
    reply = driver.offer(record)
    assert (reply.verdict, reply.check) == ("invalid", "quarantine")
    assert "epoch 2 of shard 0" in reply.text
    assert "operator" in reply.text
    shown = status(driver.state.run, driver.manifest, LiveView(), driver.now)
    assert [(why.owner, why.shard, why.epoch) for why in shown.quarantined] == [(owner(CHEAT), 0, 2)]
    assert shown.shards[0].term == 1
    driver.send(LedgerFacts((PeerPardoned(time=driver.now, owner=owner(CHEAT)),), driver.now))
    assert driver.offer(record).verdict == "queued"
    assert driver.state.run.peer(owner(CHEAT)).streak == 0


def test_results_on_a_faked_parent_are_superseded():
    driver, (_, faked, *_) = convicted()
    orphan = make_record(driver.manifest, OTHER, 0, 3, faked.digest)
    reply = driver.offer(orphan)
    assert (reply.verdict, "rolled back to epoch 1" in reply.text) == ("superseded", True)
    record = driver.accept(HONEST, text="again")
    given = [event.acceptance for event in driver.events if isinstance(event, CheckpointAccepted)][-1]
    assert (given.checkpoint, given.epoch, given.term) == (record.digest, 2, 1)


def test_a_second_conviction_rolls_back_to_the_beginning():
    driver, (earlier, *_) = convicted()
    actions = driver.finish_audit("invalid", earlier.digest)
    shard = driver.state.run.shards[1]
    assert (shard.epoch, shard.term, shard.acceptance, shard.accepted) == (0, 1, None, None)
    assert [type(action.record) for action in actions if isinstance(action, PublishReset)] == [ResetRecord]
    assert len([event for event in driver.events if isinstance(event, PeerQuarantined)]) == 1
    assert shard.baseline == 0.5
    driver.accept(OTHER, 1, text="from the beginning")
    assert driver.state.run.shards[1].epoch == 1


def test_a_check_from_before_a_rollback_changes_nothing():
    driver = drive_judge(epochs=5)
    driver.accept(CHEAT)
    late = make_record(driver.manifest, HONEST, 0, 2, driver.state.run.shards[0].accepted)
    driver.offer(late)
    assert driver.checks[-1].record == late
    driver.finish_audit("invalid")
    before = driver.state
    assert driver.send(CheckDone(late, Verdict("valid", "holdout", "", 0.3, 0.4), driver.now)) == ()
    assert driver.state == before
    assert driver.accept(HONEST).epoch == 1


def test_a_rollback_reopens_a_finished_run():
    driver = drive_judge(shards=1, epochs=1)
    driver.accept(CHEAT)
    driver.finish_audit("invalid")
    assert not driver.state.run.budgets_done
    assert driver.state.run.mixture is None


moves = st.lists(
    st.tuples(st.sampled_from(["work", "fake", "audit", "restart", "tick", "pardon"]), st.integers(0, 2), st.integers(0, 1)),
    max_size=60,
)


@settings(max_examples=100)
@given(moves, st.integers(0, 1000))
def test_lineages_stay_whole_under_any_sequence_of_moves(moves, seed):
    """Peer 0 fakes now and then; replays, whole or in part, find the truth or nothing."""
    driver, draw, faked = drive_judge(epochs=6), random.Random(seed), set()
    for number, (move, who, shard) in enumerate(moves):
        driver.now += 20
        ledger = driver.state.run.shards[shard]
        if move in ("work", "fake") and ledger.epoch < 6 and owner(PEERS[who]) not in driver.state.run.quarantined:
            record = driver.accept(PEERS[who], shard, text=str(number))
            if move == "fake" and who == 0:
                faked.add(record.digest)
        elif move == "audit" and driver.state.auditing:
            outcome = "inconclusive" if draw.random() < 0.2 else "invalid" if driver.state.auditing in faked else "valid"
            driver.finish_audit(outcome, driver.state.auditing)
        elif move == "restart":
            driver.state = JudgeState.restored(driver.state.run)
            driver.send(LimitsKnown(limits_of(2), driver.now))
        elif move == "pardon":
            driver.send(LedgerFacts((PeerPardoned(time=driver.now, owner=owner(PEERS[who])),), driver.now))
        driver.send(JudgeTick(driver.now))
        check_lineages(driver.state.run)
    for event in driver.events:
        if isinstance(event, LineageRolledBack):
            assert event.checkpoint in faked, "only faked epochs are rolled back"
        if isinstance(event, PeerQuarantined):
            assert event.owner == owner(PEERS[0])
    state = RunState()
    for event in driver.events:
        state = apply(state, event)
    assert state == driver.state.run


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
def test_audit_outcomes_of_old_ledgers_are_read(outcome):
    """Events of the first version, which never replayed anything."""
    driver = drive_judge()
    record = driver.accept(HONEST)
    facts = {"time": driver.now, "shard": 0, "epoch": 1, "owner": record.owner, "checkpoint": record.digest}
    state = apply(driver.state.run, AuditDone(**facts, outcome=outcome))
    assert state.shards[0].audit == outcome
    assert not state.audits


def test_a_pardon_is_written_at_once_or_left_as_a_note(tmp_path):
    created = create_run(build_tiny(tmp_path / "data"), tmp_path / "run", RunSettings(preset="tiny"))
    folder = RunFolder(created.folder)
    ledger = Ledger.open(folder.ledger)
    facts = {"time": 1.0, "shard": 0, "epoch": 1, "checkpoint": "0" * 64, "text": "step 2"}
    ledger.append([PeerQuarantined(**facts, owner=owner(peer)) for peer in (CHEAT, OTHER)])
    ledger.close()
    with pytest.raises(UsageError, match="no quarantined peer or refuted checker is called"):
        pardon(created.folder, owner(HONEST))
    assert pardon(created.folder, owner(CHEAT)[:8]) == (owner(CHEAT), True)
    assert set(Ledger.open(folder.ledger).state.quarantined) == {owner(OTHER)}
    with folder.locked():
        assert pardon(created.folder, OTHER.peer_id) == (owner(OTHER), False)
    assert noted_pardons(folder) == [owner(OTHER)]
    remove_notes(folder, noted_pardons(folder))
    assert noted_pardons(folder) == []
