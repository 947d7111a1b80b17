"""Results that wait for the whole replay of a newcomer's epoch below them, and what a newcomer's conviction can void."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.attacks.buried_newcomer import buried_newcomer, copies_by_new_keys
from lutetia.cli.status_table import shard_reason
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import key_of
from lutetia.coordinator.acceptance.intake.newcomer_holds import (
    BUILT_AT_ONCE,
    LONGEST_HOLD,
    NEWCOMER_EPOCHS,
    PROBATION_TENURES,
    hold,
)
from lutetia.coordinator.acceptance.messages import AuditWanted, CheckDone, JudgeTick, LimitsKnown
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.events import AuditDue
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, limits_of, make_record

CHEAT, KNOWN, OTHER, STRANGER = PEERS[:4]
POLICIES = [AuditPolicy(), AuditPolicy(whole_epoch=0.0), AuditPolicy(replay_steps=0, whole_epoch=0.001)]


def offer(driver: JudgeDriver, peer: Identity, text: str = "") -> CheckpointRecord:
    """`peer`'s next epoch of shard 0 arrives and passes its checks."""
    ledger = driver.state.run.shards[0]
    record = make_record(driver.manifest, peer, 0, ledger.epoch + 1, ledger.accepted, text)
    assert driver.offer(record).verdict == "queued"
    driver.send(CheckDone(record, Verdict("valid", "holdout", "", 0.4, 0.5), driver.now))
    return record


def audits_end(driver: JudgeDriver, besides: str = "") -> None:
    """All audits that the coordinator carries out end well, up to that of `besides`."""
    while driver.state.auditing and driver.state.auditing != besides:
        driver.finish_audit("valid", driver.state.auditing)


def with_newcomer(audit: AuditPolicy | None = None, built: int = BUILT_AT_ONCE) -> tuple[JudgeDriver, CheckpointRecord]:
    """KNOWN is proved; then comes an epoch of CHEAT, whose replay runs, and `built` epochs of KNOWN on it."""
    driver = drive_judge(
        shards=1, epochs=200, audit=audit or AuditPolicy(), rules={"newcomer_epochs": NEWCOMER_EPOCHS, "offers_per_minute": 500}
    )
    for _ in range(NEWCOMER_EPOCHS):
        offer(driver, KNOWN)
        audits_end(driver)
    newcomer = offer(driver, CHEAT)
    for _ in range(built):
        accepted = offer(driver, KNOWN)
        assert driver.state.run.shards[0].accepted == accepted.digest
    return driver, newcomer


def epoch(driver: JudgeDriver) -> int:
    return driver.state.run.shards[0].epoch


def document(driver: JudgeDriver) -> SwarmStatus:
    return status(driver.state.run, driver.manifest, LiveView(), driver.now)


@pytest.mark.parametrize("audit", POLICIES)
def test_third_epoch_on_a_newcomers_waits_for_its_replay_under_every_policy(audit: AuditPolicy):
    driver, newcomer = with_newcomer(audit)
    before = epoch(driver)
    held = offer(driver, KNOWN)
    assert (epoch(driver), list(driver.state.held)) == (before, [key_of(held)])
    driver.finish_audit("valid", newcomer.digest)
    assert driver.state.run.shards[0].accepted == held.digest
    assert not driver.state.held


def test_first_epochs_of_a_newcomer_are_replayed_whole_without_a_share_of_whole_audits():
    driver, newcomer = with_newcomer(AuditPolicy(whole_epoch=0.0), built=0)
    due = [event for event in driver.events if isinstance(event, AuditDue)]
    assert [(event.whole, event.why) for event in due] == [(True, "newcomer")] * 3
    assert due[-1].checkpoint == newcomer.digest


def test_nothing_waits_where_audits_are_off():
    driver = drive_judge(shards=1, epochs=50, audit=AuditPolicy(replay_steps=0, whole_epoch=0.0), rules={"newcomer_epochs": 2})
    offer(driver, CHEAT)
    for _ in range(5):
        offer(driver, KNOWN)
    assert epoch(driver) == 6
    assert not driver.state.run.audits


def test_newcomers_own_epochs_do_not_wait():
    driver, _ = with_newcomer(built=0)
    before = epoch(driver)
    for _ in range(4):
        offer(driver, CHEAT)
    assert epoch(driver) == before + 4, "what its conviction voids is its own"


def test_each_further_epoch_waits_twice_as_long_up_to_a_limit():
    driver, _ = with_newcomer()
    tenure, before = driver.manifest.timing.tenure, epoch(driver)
    for waited, tenures in enumerate((1, 2, 4, LONGEST_HOLD, LONGEST_HOLD)):
        offer(driver, KNOWN)
        driver.now += tenures * tenure - 1
        driver.send(JudgeTick(driver.now))
        assert epoch(driver) == before + waited
        driver.now += 1
        driver.send(JudgeTick(driver.now))
        assert epoch(driver) == before + waited + 1, "the shard never stands still"


def test_conviction_voids_what_was_built_and_never_what_is_held():
    driver, newcomer = with_newcomer()
    offer(driver, KNOWN)
    driver.finish_audit("invalid", newcomer.digest)
    assert epoch(driver) == newcomer.epoch - 1
    assert not driver.state.held
    assert not driver.state.run.shards[0].candidates


def test_coordinator_replays_at_once_what_holds_up_a_result_even_while_a_peer_has_it():
    driver = drive_judge(shards=1, epochs=50, audit=AuditPolicy())
    driver.send(AuditWanted(OTHER.public_key, driver.now))
    for _ in range(NEWCOMER_EPOCHS):
        proved = offer(driver, KNOWN)
        driver.send(AuditWanted(OTHER.public_key, driver.now))
        driver.finish_audit("valid", proved.digest)
    newcomer = offer(driver, CHEAT)
    driver.send(AuditWanted(OTHER.public_key, driver.now))
    assert newcomer.digest in driver.state.lent
    for _ in range(BUILT_AT_ONCE):
        offer(driver, KNOWN)
    assert driver.state.auditing is None, "left to the peer"
    offer(driver, KNOWN)
    assert driver.state.auditing == newcomer.digest


def test_known_author_goes_before_a_stranger_when_the_hold_ends():
    driver, newcomer = with_newcomer()
    offer(driver, STRANGER)
    known = offer(driver, KNOWN)
    assert len(driver.state.held) == 2
    driver.finish_audit("valid", newcomer.digest)
    assert driver.state.run.shards[0].accepted == known.digest


def test_strangers_held_in_a_full_shard_give_way_to_a_known_author():
    driver, newcomer = with_newcomer()
    for number in range(driver.rules.candidates_per_shard):
        offer(driver, Identity.derived(f"stranger {number}"))
    known = offer(driver, KNOWN)
    driver.finish_audit("valid", newcomer.digest)
    assert driver.state.run.shards[0].accepted == known.digest


def test_restart_while_a_result_is_held_checks_it_again_and_holds_it_no_longer():
    driver, _ = with_newcomer()
    held = offer(driver, KNOWN)
    driver.now += driver.manifest.timing.tenure / 2
    driver.state = JudgeState.restored(driver.state.run)
    driver.send(LimitsKnown(limits_of(1), driver.now))
    driver.send(CheckDone(held, Verdict("valid", "holdout", "", 0.4, 0.5), driver.now))
    assert list(driver.state.held) == [key_of(held)]
    driver.now += driver.manifest.timing.tenure / 2
    driver.send(JudgeTick(driver.now))
    assert driver.state.run.shards[0].accepted == held.digest


def test_status_and_run_why_say_why_a_result_waits_and_how_long():
    driver, newcomer = with_newcomer()
    offer(driver, KNOWN)
    driver.now += driver.manifest.timing.lease + 1
    shown = document(driver)
    [stall] = shown.stalls
    assert (stall.kind, stall.shard, shown.stalled_shards) == ("shard", 0, (0,))
    assert f"epoch {newcomer.epoch} by a newcomer" in stall.why
    assert "2 epochs of others stand on it" in stall.why
    assert "in 53 s at the latest" in stall.remedy
    assert "by a newcomer" in shard_reason(shown, 0, driver.now)["text"]


def after_conviction() -> JudgeDriver:
    """KNOWN is proved; an epoch of CHEAT was convicted, and the shard is back at KNOWN's."""
    driver, newcomer = with_newcomer(built=0)
    driver.finish_audit("invalid", newcomer.digest)
    return driver


def test_unproved_author_waits_where_others_were_convicted_and_a_proved_one_does_not():
    driver = after_conviction()
    before = epoch(driver)
    stranger = offer(driver, STRANGER)
    assert (epoch(driver), list(driver.state.held)) == (before, [key_of(stranger)])
    known = offer(driver, KNOWN)
    assert driver.state.run.shards[0].accepted == known.digest
    assert not driver.state.held


def test_unproved_author_is_accepted_after_a_tenure_and_its_wait_is_explained():
    driver = after_conviction()
    stranger = offer(driver, STRANGER)
    driver.now += driver.manifest.timing.lease + 1
    assert "1 author was convicted on this shard lately" in document(driver).stalls[0].why
    driver.now += driver.manifest.timing.tenure - driver.manifest.timing.lease
    driver.send(JudgeTick(driver.now))
    assert driver.state.run.shards[0].accepted == stranger.digest


def test_convictions_in_other_shards_or_long_ago_hold_nobody():
    driver = after_conviction()
    driver.now += PROBATION_TENURES * driver.manifest.timing.tenure
    stranger = offer(driver, STRANGER)
    assert driver.state.run.shards[0].accepted == stranger.digest


def test_early_copy_of_one_network_does_not_go_before_honest_strangers_when_the_hold_ends():
    """Of results of unproved authors to be early proves nothing: a secret draw decides, one for each network."""
    won = 0
    for number in range(12):
        driver = after_conviction()
        driver.rules = replace(driver.rules, secret=b"%d" % number)
        for key in range(3):
            early = Identity.derived(f"copy {number} {key}")
            record = make_record(driver.manifest, early, 0, epoch(driver) + 1, driver.state.run.shards[0].accepted)
            driver.offer(record, origin="203.0.113.1")
            driver.verdict(record)
        record = make_record(driver.manifest, STRANGER, 0, epoch(driver) + 1, driver.state.run.shards[0].accepted)
        driver.offer(record, origin="198.51.100.9")
        driver.verdict(record)
        driver.now += driver.manifest.timing.tenure
        driver.send(JudgeTick(driver.now))
        won += driver.state.run.shards[0].accepted == record.digest
    assert 3 <= won <= 9, "one of two networks"


def test_copies_by_ever_new_keys_do_not_stop_a_shard():
    """Without the rule none of the honest epochs stands, and a new key is convicted in each epoch's time."""
    found = copies_by_new_keys(epochs=15)
    assert found.standing == found.trained >= 10
    assert found.convicted <= 3


def test_hold_names_the_epoch_its_author_and_what_stands_on_it():
    driver, newcomer = with_newcomer()
    offer(driver, KNOWN)
    [waiting] = driver.state.run.shards[0].undecided_of(KNOWN.public_key)
    found = hold(driver.state.run, driver.manifest, waiting)
    assert found is not None
    assert (found.epoch, found.author, found.built) == (newcomer.epoch, CHEAT.public_key, BUILT_AT_ONCE)


@pytest.mark.parametrize("audit", POLICIES)
@pytest.mark.parametrize("improves", [True, False])
def test_conviction_of_a_newcomer_costs_others_few_epochs_however_late_its_replay_ends(audit: AuditPolicy, improves: bool):
    """The replay takes as long as thirty epochs. Without the rule thirty epochs stand on the lazy one by then."""
    found = buried_newcomer(replay_epochs=30, improves=improves, audit=audit)
    assert found.lost <= BUILT_AT_ONCE + 6
    assert found.longest_wait <= LONGEST_HOLD * 600
