"""Audits by peers that have no shard: who is lent what, whose word counts, and what a wrong word costs."""

from __future__ import annotations

from typing import Any

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import AuditDelivered, AuditWanted, JudgeTick, LendAudit, LimitsKnown
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.events import AuditDone, Outcome
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting
from lutetia.coordinator.runtime.audit_service import free_auditors, relatives
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.records import DeviceEntry, Hardware, NodeRecord, NodeState
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, limits_of

CHEAT, HONEST, OTHER, AUDITOR = PEERS[0], PEERS[1], PEERS[2], PEERS[4]


def owner(peer) -> str:
    return peer.public_key


def ask(driver: JudgeDriver, peer=AUDITOR, related: frozenset[str] = frozenset()) -> LendAudit:
    actions = driver.send(AuditWanted(owner(peer), driver.now, related))
    return next(action for action in actions if isinstance(action, LendAudit))


def lent_to_auditor(**changes) -> tuple[JudgeDriver, str]:
    """A driver whose auditor was just lent the audit of an honest epoch."""
    driver = drive_judge(epochs=60, rules={"offers_per_minute": 500, **changes})
    ask(driver)
    record = driver.accept(HONEST)
    assert not driver.audits, "while peers ask, an audit waits for one of them"
    lend = ask(driver)
    assert lend.audit
    assert lend.audit.audit.checkpoint == record.digest
    assert lend.until == driver.now + driver.rules.audit_loan
    return driver, record.digest


def report(driver: JudgeDriver, checkpoint: str, outcome: Outcome, peer=AUDITOR):
    finding = AuditFinding(outcome=outcome, text="step 1: 0.5 and 0.5")
    return driver.send(AuditDelivered(owner(peer), checkpoint, finding, 3.0, driver.now))


def test_the_coordinator_audits_at_once_when_no_peer_asks():
    driver = drive_judge()
    driver.accept(HONEST)
    assert len(driver.audits) == 1


def test_the_coordinator_audits_what_peers_do_not_finish():
    driver = drive_judge()
    ask(driver)
    driver.accept(HONEST)
    driver.now += driver.rules.audit_wait + 0.1
    driver.send(JudgeTick(driver.now))
    assert len(driver.audits) == 1, "no peer took it"
    driver, checkpoint = lent_to_auditor()
    driver.now += driver.rules.audit_loan - 1
    driver.send(JudgeTick(driver.now))
    assert not driver.audits
    driver.now += 1.1
    driver.send(JudgeTick(driver.now))
    assert [audit.audit.checkpoint for audit in driver.audits] == [checkpoint], "the peer did not report"


def lent_whole(pace: float | None = None) -> tuple[JudgeDriver, LendAudit]:
    """A driver whose auditor was just lent a whole epoch; its author took `pace` seconds for each one before."""
    driver = drive_judge(shards=2, epochs=60, audit=AuditPolicy(whole_epoch=1.0), rules={"offers_per_minute": 500})
    for _ in range(2 if pace else 0):
        driver.accept(HONEST)
        driver.finish_audit("valid")
        driver.now += pace or 0.0
    ask(driver)
    driver.accept(HONEST)
    lend = ask(driver)
    assert lend.audit
    assert lend.audit.audit.whole
    return driver, lend


@pytest.mark.parametrize(("pace", "factor"), [(None, 6.0), (10.0, 1.0), (400.0, 2.0), (5000.0, 6.0)])
def test_loan_of_a_whole_epoch_follows_its_authors_pace(pace: float | None, factor: float):
    driver, lend = lent_whole(pace)
    assert lend.until - driver.now == pytest.approx(factor * driver.rules.audit_loan)


@pytest.mark.parametrize("auditors", [frozenset(), frozenset({owner(HONEST)})])
def test_loan_ends_when_the_borrower_is_gone_or_has_other_work(auditors: frozenset[str]):
    driver, _ = lent_whole()
    lease = driver.rules.manifest.timing.lease
    driver.now += lease - 1
    driver.send(JudgeTick(driver.now, auditors))
    assert driver.state.auditing is None, "its record may be on its way"
    driver.now += 1
    driver.send(JudgeTick(driver.now, auditors))
    assert driver.state.auditing is not None, "the coordinator replays it itself"
    driver.finish_audit("valid")
    assert ask(driver).audit is None


@pytest.mark.parametrize("auditors", [None, frozenset({owner(AUDITOR)})])
def test_loan_ends_when_the_borrower_is_silent(auditors: frozenset[str] | None):
    driver, lend = lent_whole()
    for _ in range(10):
        driver.now += 300
        driver.send(JudgeTick(driver.now, auditors))
        assert ask(driver) == lend, "asking again is a sign of life"
    assert driver.state.auditing is None
    driver.now += driver.rules.audit_loan
    driver.send(JudgeTick(driver.now, auditors))
    assert driver.state.auditing is not None


def test_report_of_an_ended_loan_still_counts():
    driver, lend = lent_whole()
    assert lend.audit
    driver.now += driver.rules.audit_loan
    driver.send(JudgeTick(driver.now, frozenset()))
    report(driver, lend.audit.audit.checkpoint, "valid")
    assert driver.state.run.audits[lend.audit.audit.checkpoint].reported == (owner(AUDITOR), "valid")


def test_free_auditors_are_the_idle_nodes_of_the_view():
    states: tuple[tuple[Identity, NodeState], ...] = ((AUDITOR, "idle"), (HONEST, "training"), (OTHER, "left"))
    facts: dict[str, Any] = {
        "run": "a" * 64,
        "issued": 1.0,
        "hardware": Hardware(device="cpu", memory_bytes=1, cores=1),
        "software": "1",
    }
    nodes = [
        Sighting(NodeRecord(**facts, owner=owner(peer), peer_id=peer.peer_id, samples_per_second=1.0, state=state), 9.0, 1.0)
        for peer, state in states
    ]
    assert free_auditors(LiveView(nodes)) == {owner(AUDITOR)}
    cards = (DeviceEntry(device="cuda:0", state="training"), DeviceEntry(device="cuda:1", state="idle"))
    nodes[1] = nodes[1]._replace(record=nodes[1].record.model_copy(update={"devices": cards}))
    assert free_auditors(LiveView(nodes)) == {owner(AUDITOR), owner(HONEST)}, "one of its devices has nothing to do"
    assert free_auditors(LiveView()) is None, "nothing was read yet"


def test_an_unfinished_audit_is_not_lent_again():
    """Otherwise a series of idle identities could keep an audit from ever being carried out."""
    driver = drive_judge(shards=2)
    ask(driver)
    busy = driver.accept(PEERS[3], 1)
    driver.now += driver.rules.audit_wait
    driver.send(JudgeTick(driver.now))
    assert driver.audits[-1].audit.checkpoint == busy.digest, "the coordinator is busy with another"
    ask(driver)
    record = driver.accept(HONEST)
    assert ask(driver).audit
    driver.now += driver.rules.audit_loan + 1
    assert ask(driver, OTHER).audit is None
    driver.finish_audit("valid")
    assert driver.audits[-1].audit.checkpoint == record.digest


def test_at_the_end_of_the_run_audits_wait_for_no_peer():
    driver = drive_judge(shards=1, epochs=1)
    ask(driver)
    record = driver.accept(HONEST)
    assert [audit.audit.checkpoint for audit in driver.audits] == [record.digest]


def test_many_asking_peers_are_told_to_wait_longer():
    driver = drive_judge()
    waits = [ask(driver, Identity.derived(f"idle {number}")).retry_after for number in range(300)]
    assert waits[0] < 20
    assert waits[-1] > 60


def test_a_peer_is_lent_one_unrelated_audit_at_a_time():
    driver = drive_judge(shards=2)
    ask(driver)
    driver.accept(AUDITOR)
    assert ask(driver).audit is None, "not its own"
    driver.accept(HONEST, 1)
    assert ask(driver, related=frozenset({owner(HONEST)})).audit is None, "not its operator's"
    lend = ask(driver)
    assert lend.audit
    assert lend.audit.audit.owner == owner(HONEST)
    assert ask(driver, OTHER).audit, "another peer may audit the auditor's own result"
    again = ask(driver)
    assert (again.audit, again.until) == (lend.audit, lend.until), "one at a time: a peer that asks again gets the same"
    driver = drive_judge()
    driver.accept(CHEAT)
    driver.finish_audit("invalid")
    driver.accept(HONEST)
    assert ask(driver, CHEAT).audit is None, "not to a quarantined peer"


def test_audit_requests_are_rate_limited_like_offers():
    driver = drive_judge(rules={"offers_per_minute": 3})
    assert [ask(driver).retry_after > 50 for _ in range(4)] == [False] * 3 + [True]


def test_a_new_auditor_is_verified_ten_times_then_one_in_n():
    driver, checkpoint = lent_to_auditor()
    checked = 0
    for number in range(40):
        trust = driver.state.run.peer(owner(AUDITOR)).trust
        before = len(driver.audits)
        report(driver, checkpoint, "valid")
        if len(driver.audits) > before:
            assert driver.state.run.audits[checkpoint].reported == (owner(AUDITOR), "valid")
            driver.finish_audit("valid", checkpoint)
            checked += 1
            assert driver.state.run.peer(owner(AUDITOR)).trust == trust + 1
        else:
            assert trust >= 10
            assert driver.state.run.peer(owner(AUDITOR)).trust == trust, "an unverified report earns no trust"
        assert checkpoint not in driver.state.run.audits
        while not driver.state.run.audits:  # the author, too, is trusted in time
            checkpoint = driver.accept(HONEST, text=str(number)).digest
            if driver.state.run.shards[0].epoch > 55:
                break
        if not driver.state.run.audits:
            break
        lend = ask(driver)
        assert lend.audit
    assert checked >= 10
    done = [event for event in driver.events if isinstance(event, AuditDone)]
    assert {event.by for event in done} >= {None}
    assert all(event.outcome == "valid" for event in done)


@pytest.mark.parametrize("outcome", ["invalid", "inconclusive"])
def test_a_report_alone_convicts_nobody(outcome: Outcome):
    driver, checkpoint = lent_to_auditor()
    report(driver, checkpoint, outcome)
    assert not driver.state.run.quarantined
    assert driver.audits[-1].audit.checkpoint == checkpoint, "the coordinator replays it itself"
    driver.finish_audit("valid", checkpoint)
    assert not driver.state.run.quarantined
    assert driver.state.run.peer(owner(AUDITOR)).trust == 0
    assert driver.state.run.peer(owner(HONEST)).streak == 1


def test_an_auditor_that_covers_a_cheat_loses_its_trust():
    driver, checkpoint = lent_to_auditor()
    report(driver, checkpoint, "valid")
    driver.finish_audit("valid", checkpoint)
    assert driver.state.run.peer(owner(AUDITOR)).trust == 1
    faked = driver.accept(CHEAT)
    assert ask(driver).audit
    report(driver, faked.digest, "valid")
    driver.finish_audit("invalid", faked.digest)
    assert driver.state.run.peer(owner(AUDITOR)).trust == 0
    assert set(driver.state.run.quarantined) == {owner(CHEAT)}


def test_a_report_on_an_audit_not_lent_changes_nothing():
    driver, checkpoint = lent_to_auditor()
    before = driver.state
    assert report(driver, checkpoint, "invalid", OTHER) == ()
    assert report(driver, "f" * 64, "invalid") == ()
    assert driver.state == before
    driver.state = JudgeState.restored(driver.state.run)
    driver.send(LimitsKnown(limits_of(2), driver.now))
    assert driver.audits[-1].audit.checkpoint == checkpoint, "after a restart the coordinator audits lent results itself"
    assert report(driver, checkpoint, "invalid") == ()


def test_relatives_share_an_operator_or_a_public_address():
    def peer(name: str, address: str, operator: str | None = None) -> NodeRecord:
        identity = Identity.derived(name)
        addresses = (f"{address}/p2p/{identity.peer_id}",)
        return NodeRecord(
            run="0" * 64, owner=identity.public_key, issued=0.0, peer_id=identity.peer_id, addresses=addresses,
            hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1, software="1", state="idle",
            operator=operator,
        )  # fmt: skip

    operator = Identity.derived("operator").public_key
    peers = [
        peer("a", "/ip4/1.2.3.4/tcp/1", operator), peer("b", "/ip4/1.2.3.4/tcp/2"), peer("c", "/ip4/5.6.7.8/tcp/1", operator),
        peer("d", "/ip4/127.0.0.1/tcp/1"), peer("e", "/ip4/127.0.0.1/tcp/2"),
    ]  # fmt: skip
    names = {record.owner: name for record, name in zip(peers, "abcde", strict=True)}
    assert {names[key] for key in relatives(peers[0].owner, peers)} == {"a", "b", "c"}
    assert {names[key] for key in relatives(peers[3].owner, peers)} == {"d"}, "a loopback address says nothing"
    assert relatives("unknown", peers) == frozenset()
