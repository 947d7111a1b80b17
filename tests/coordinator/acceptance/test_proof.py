"""A result that fails a loss check, though its training may be right, is replayed before it is decided."""

from __future__ import annotations

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import (
    Audited,
    AuditWanted,
    CheckDone,
    DiscardCandidate,
    LedgerFacts,
    LendAudit,
    Proved,
    Publish,
    StartProof,
)
from lutetia.coordinator.acceptance.proof import PROVED_LATELY
from lutetia.coordinator.acceptance.rollback import due_audit
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import CheckpointAccepted, ManifestPublished, Outcome, ResultDoubted
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName
from tests.coordinator.acceptance.judge_driver import PEERS, START, JudgeDriver, drive_judge, make_record

KNOWN, STRANGER, OTHER, THIRD = PEERS[0], PEERS[1], PEERS[2], PEERS[3]


def begun(whole: bool = True) -> JudgeDriver:
    """Epoch 1 of shard 0 is accepted from KNOWN and audited, `whole` or its first steps."""
    driver = drive_judge(shards=4, epochs=9)
    driver.accept(KNOWN)
    driver.finish_audit("valid")
    if whole:
        first = driver.state.run.shards[0].lineage[0].acceptance.checkpoint
        driver.send(LedgerFacts((due_audit(driver.state.run, 0, first, driver.now, True, "refusals"),), driver.now))
        driver.finish_audit("valid")
    return driver


def fails(
    driver: JudgeDriver, peer: Identity, check: CheckName = "raw", loss: float | None = 0.6, text: str = "",
    shard: int = 0,
) -> CheckpointRecord:  # fmt: skip
    """`peer` offers epoch 2 of `shard`, and it fails `check`."""
    record = make_record(driver.manifest, peer, shard, 2, driver.state.run.shards[shard].accepted, text=text)
    assert driver.offer(record).verdict == "queued"
    driver.send(CheckDone(record, Verdict("invalid", check, "0.6 % over its bound", loss, loss and 0.5), driver.now))
    return record


def proofs(driver: JudgeDriver) -> list[StartProof]:
    return [action for action in driver.actions if isinstance(action, StartProof)]


def prove(driver: JudgeDriver, record: CheckpointRecord, outcome: Outcome = "valid") -> None:
    driver.send(Proved(record, AuditFinding(outcome=outcome, text="its end lies 0 of the way away"), driver.now, 60.0))


def test_a_reproduced_result_is_accepted_with_a_note():
    driver = begun()
    record = fails(driver, KNOWN)
    [proof] = proofs(driver)
    assert (proof.record, proof.replay.audit.whole, proof.replay.parent) == (record, True, driver.state.run.shards[0].acceptance)
    assert proof.replay.link.trace == record.trace
    assert driver.offer(record).verdict == "queued", "its author goes on training meanwhile"
    prove(driver, record)
    accepted = next(event for event in reversed(driver.events) if isinstance(event, CheckpointAccepted))
    assert (accepted.acceptance.checkpoint, accepted.acceptance.holdout_loss) == (record.digest, 0.6)
    assert "0.6 % over its bound; a replay of the whole epoch confirms the training" in accepted.note
    assert [action.record for action in driver.actions if isinstance(action, Publish)][-1] == record
    shard = driver.state.run.shards[0]
    assert (shard.audit, shard.lineage[-1].whole) == ("valid", True), "the replay counts as its audit"
    assert not driver.state.run.audits


@pytest.mark.parametrize("check", ["holdout", "raw"])
def test_a_stranger_is_refused_until_its_work_is_reproduced(check: CheckName):
    """One refusal of a stranger costs no replay. The same work again, or that of another peer, does."""
    driver = begun()
    fails(driver, STRANGER, check)
    assert not proofs(driver)
    assert driver.state.run.peer(STRANGER.public_key).rejected == 1
    second = fails(driver, OTHER, check, text="as reproduced")
    assert [proof.record for proof in proofs(driver)] == [second]
    prove(driver, second)
    assert driver.state.run.shards[0].accepted == second.digest
    assert driver.state.run.peer(STRANGER.public_key).rejected == 0, "nobody's fault"
    assert driver.state.run.rejected == 0


def test_a_lone_stranger_that_makes_the_same_again_is_proved():
    driver = begun()
    record = fails(driver, STRANGER)
    assert driver.offer(record).verdict == "queued", "checked once more"
    driver.send(CheckDone(record, Verdict("invalid", "raw", "0.6 % over its bound", 0.6, 0.5), driver.now))
    assert [proof.record for proof in proofs(driver)] == [record]


def test_the_parent_is_replayed_too_and_its_conviction_rolls_back():
    """Crafted optimiser moments make every honest next epoch fail."""
    driver = begun(whole=False)
    record = fails(driver, KNOWN, "holdout")
    assert driver.audits[-1].audit.whole, "the whole epoch of the parent"
    prove(driver, record)
    assert driver.state.run.shards[0].epoch == 1, "it waits for the parent's replay"
    driver.finish_audit("invalid")
    assert driver.state.run.shards[0].epoch == 0
    assert not driver.state.run.shards[0].candidates
    assert not driver.state.proved
    assert DiscardCandidate(record) in driver.actions


@pytest.mark.parametrize("parent_first", [True, False])
def test_a_result_is_accepted_when_both_replays_have_ended(parent_first: bool):
    driver = begun(whole=False)
    record = fails(driver, KNOWN, "holdout")
    assert [proof.record for proof in proofs(driver)] == [record], "at once, beside its parent's"
    for parent in (parent_first, not parent_first):
        assert driver.state.run.shards[0].epoch == 1
        if parent:
            driver.finish_audit("valid")
        else:
            prove(driver, record)
    assert driver.state.run.shards[0].accepted == record.digest
    assert len(proofs(driver)) == 1


def test_a_parent_without_verdict_leaves_the_result_without_one():
    driver = begun(whole=False)
    record = fails(driver, KNOWN, "holdout")
    prove(driver, record)
    parent = driver.audits[-1].audit.checkpoint
    driver.send(Audited(parent, AuditFinding(outcome="inconclusive", text="its file is gone"), driver.now, again=False))
    assert driver.offer(record).verdict == "inconclusive"
    assert KNOWN.public_key not in driver.state.run.quarantined


@pytest.mark.parametrize("peer", [KNOWN, STRANGER])
def test_a_proof_and_its_parent_wait_for_no_audit_of_accepted_epochs(peer: Identity):
    """A whole epoch of another shard is replayed and a second one is due when the result fails."""
    driver = begun(whole=False)
    for shard in (1, 2):
        driver.accept(OTHER, shard)
        accepted = driver.state.run.shards[shard].accepted
        assert accepted
        driver.send(LedgerFacts((due_audit(driver.state.run, shard, accepted, driver.now, True, "depth"),), driver.now))
    running = driver.state.auditing
    if peer is STRANGER:
        fails(driver, THIRD)
    record = fails(driver, peer)
    assert [proof.record for proof in proofs(driver)] == [record]
    parent = driver.audits[-1]
    assert (parent.audit.checkpoint, parent.process) == (record.parent, "parent")
    assert driver.state.auditing == running, "it goes on"


@pytest.mark.parametrize(("peer", "first"), [(KNOWN, 2), (OTHER, 3)])
def test_among_audits_those_come_first_that_a_known_authors_proof_waits_for(peer: Identity, first: int):
    """Shards 0 and 2 have doubted results, and the proof of shard 0 is under way; the audit of shard 3 is the oldest one.

    Strangers' doubts cost nothing, so they delay no audit.
    """
    driver = begun(whole=False)
    for shard in (1, 3, 2):
        driver.now += 1
        driver.accept(KNOWN, shard)
    busy = driver.state.auditing
    fails(driver, KNOWN)
    if peer is not KNOWN:
        fails(driver, STRANGER, shard=2)
    fails(driver, peer, shard=2)
    assert driver.state.proving_parent == driver.state.run.shards[0].accepted
    driver.finish_audit("valid", busy)
    assert driver.state.auditing == driver.state.run.shards[first].accepted


def test_peers_are_lent_first_what_a_proof_waits_for():
    driver = begun(whole=False)
    for shard in (1, 3, 2):
        driver.now += 1
        driver.accept(KNOWN, shard)
    for shard in (0, 2):
        fails(driver, KNOWN, shard=shard)
    driver.send(AuditWanted(OTHER.public_key, driver.now))
    lend = driver.actions[-1]
    assert isinstance(lend, LendAudit)
    assert lend.audit
    assert lend.audit.audit.checkpoint == driver.state.run.shards[2].accepted


def test_work_that_a_replay_refutes_is_refused_and_convicts():
    driver = begun()
    record = fails(driver, KNOWN)
    prove(driver, record, "invalid")
    assert driver.state.run.shards[0].epoch == 1
    assert KNOWN.public_key in driver.state.run.quarantined
    assert driver.state.proving is None


def test_a_replay_without_verdict_refuses_and_counts_against_nobody():
    driver = begun()
    record = fails(driver, KNOWN)
    prove(driver, record, "inconclusive")
    assert driver.offer(record).verdict == "inconclusive"
    assert driver.state.run.peer(KNOWN.public_key).rejected == 0


@pytest.mark.parametrize(("check", "loss"), [("numbers", 0.6), ("raw", None), ("holdout", None)])
def test_other_checks_and_undefined_losses_are_refused_at_once(check: CheckName, loss: float | None):
    driver = begun()
    fails(driver, KNOWN, check, loss)
    assert not proofs(driver)
    assert driver.state.run.rejected == 1


def test_strangers_cannot_keep_the_coordinator_replaying():
    """After each refuted result the next replay for strangers waits a lease, two, four, … at most an hour."""
    driver, began, times = begun(), START, []
    for index in range(400):
        cheat = Identity.derived(f"cheat {index}")
        seen = len(proofs(driver))
        record = fails(driver, cheat)
        if len(proofs(driver)) > seen:
            times.append(driver.now)
            prove(driver, record, "invalid")
        driver.now += 60
    assert began + 400 * 60 > times[-1]
    assert len(times) <= 16, "in 6 hours and 40 minutes"
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps)


def test_strangers_do_not_delay_the_proof_of_a_known_author():
    driver = begun()
    fails(driver, STRANGER)
    second = fails(driver, OTHER)
    fails(driver, THIRD)
    known = fails(driver, KNOWN)
    prove(driver, second, "invalid")
    assert [proof.record for proof in proofs(driver)] == [second, known]
    assert not driver.state.run.shards[0].undecided_of(THIRD.public_key)


def test_the_forfeited_streak_comes_back():
    driver = begun()
    driver.accept(OTHER, 1)
    driver.finish_audit("valid")
    assert driver.state.run.peer(OTHER.public_key).streak == 1
    record = fails(driver, KNOWN)
    prove(driver, record)
    assert driver.state.run.peer(KNOWN.public_key).streak == 3, "two audits before, and the proof"


def test_newer_rules_check_a_doubted_result_again():
    driver = begun()
    record = fails(driver, KNOWN)
    event = ManifestPublished(time=driver.now, version=2, digest="c" * 64, expires=START + 1e6)
    driver.send(LedgerFacts((event,), driver.now))
    assert driver.checks[-1].record == record
    driver.verdict(record)
    prove(driver, record)
    assert [event.note for event in driver.events if isinstance(event, CheckpointAccepted)][-1] == ""


def test_a_restart_goes_on_with_the_proof():
    driver = begun()
    record = fails(driver, KNOWN)
    state = RunState()
    for event in driver.events:
        state = apply(state, event)
    assert state == driver.state.run
    driver.state = JudgeState.restored(state)
    driver.send(LedgerFacts((), driver.now))
    assert [proof.record for proof in proofs(driver)] == [record, record]
    doubted = next(event for event in driver.events if isinstance(event, ResultDoubted))
    assert "fails check raw and is replayed before it is decided" in sentence(doubted)


def proved_shard() -> JudgeDriver:
    """Epoch 2 of shard 0 is accepted by a proof."""
    driver = begun()
    prove(driver, fails(driver, KNOWN))
    return driver


def third(driver: JudgeDriver, peer: Identity, over: float) -> CheckpointRecord:
    record = make_record(driver.manifest, peer, 0, 3, driver.state.run.shards[0].accepted)
    assert driver.offer(record).verdict == "queued"
    driver.send(CheckDone(record, Verdict("invalid", "holdout", "worse again", 0.7, 0.6, over=over), driver.now))
    return record


def test_after_a_proof_a_known_author_is_accepted_first_and_audited_whole():
    """Where every epoch is overfitted, the coordinator's replays do not set the pace."""
    driver = proved_shard()
    record = third(driver, KNOWN, 0.2)
    assert driver.state.run.shards[0].accepted == record.digest
    assert driver.state.run.audits[record.digest].whole
    driver.finish_audit("invalid", record.digest)
    assert driver.state.run.shards[0].epoch == 2, "a faked one is rolled back as ever"


@pytest.mark.parametrize(("peer", "over"), [(KNOWN, 0.3), (STRANGER, 0.1)])
def test_large_excesses_and_strangers_still_need_a_proof(peer: Identity, over: float):
    driver = proved_shard()
    third(driver, peer, over)
    assert driver.state.run.shards[0].epoch == 2


def test_the_trust_of_a_proof_fades():
    driver = drive_judge(epochs=20)
    driver.accept(KNOWN)
    driver.finish_audit("valid")
    prove_first = fails(driver, KNOWN)
    driver.finish_audit("valid")
    prove(driver, prove_first)
    for _ in range(PROVED_LATELY):
        driver.accept(KNOWN)
        if driver.state.run.audits:
            driver.finish_audit("valid")
    shard = driver.state.run.shards[0]
    record = make_record(driver.manifest, KNOWN, 0, shard.epoch + 1, shard.accepted)
    driver.offer(record)
    driver.send(CheckDone(record, Verdict("invalid", "holdout", "worse again", 0.7, 0.6, over=0.1), driver.now))
    assert driver.state.run.shards[0].epoch == shard.epoch
    assert driver.state.run.shards[0].undecided_of(KNOWN.public_key)[0].doubt
