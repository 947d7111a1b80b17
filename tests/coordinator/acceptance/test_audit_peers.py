"""Audits by peers that have no shard: who is lent what, whose word counts, and what a wrong word costs."""

from __future__ import annotations

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import AuditDelivered, AuditWanted, JudgeTick, LendAudit, LimitsKnown
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.events import AuditDone, Outcome
from lutetia.coordinator.runtime.audit_service import relatives
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import Hardware, NodeRecord
from tests.coordinator.acceptance.judge_driver import PEERS, Court, court, limits_of

CHEAT, HONEST, OTHER, AUDITOR = PEERS[0], PEERS[1], PEERS[2], PEERS[4]


def owner(peer) -> str:
    return peer.public_key


def wants(c: Court, peer=AUDITOR, related: frozenset[str] = frozenset()) -> LendAudit:
    actions = c.hears(AuditWanted(owner(peer), c.now, related))
    return next(action for action in actions if isinstance(action, LendAudit))


def lent_to_auditor(**changes) -> tuple[Court, str]:
    """A court whose auditor has just been lent the audit of an honest epoch."""
    c = court(epochs=60, rules={"offers_per_minute": 500, **changes})
    wants(c)
    record = c.accept(HONEST)
    assert not c.audits, "while peers ask, an audit waits for a taker"
    lend = wants(c)
    assert lend.audit
    assert lend.audit.audit.checkpoint == record.digest
    assert lend.until == c.now + c.rules.audit_loan
    return c, record.digest


def delivers(c: Court, checkpoint: str, outcome: Outcome, peer=AUDITOR):
    finding = AuditFinding(outcome=outcome, text="step 1: 0.5 and 0.5")
    return c.hears(AuditDelivered(owner(peer), checkpoint, finding, 3.0, c.now))


def test_without_peers_that_ask_the_coordinator_audits_at_once():
    c = court()
    c.accept(HONEST)
    assert len(c.audits) == 1


def test_an_audit_that_nobody_takes_or_brings_back_is_done_by_the_coordinator():
    c = court()
    wants(c)
    c.accept(HONEST)
    c.now += c.rules.audit_wait + 0.1
    c.hears(JudgeTick(c.now))
    assert len(c.audits) == 1, "nobody took it"
    c, checkpoint = lent_to_auditor()
    c.now += c.rules.audit_loan - 1
    c.hears(JudgeTick(c.now))
    assert not c.audits
    c.now += 1.1
    c.hears(JudgeTick(c.now))
    assert [audit.audit.checkpoint for audit in c.audits] == [checkpoint], "nobody brought it back"


def test_what_was_not_brought_back_is_not_lent_again():
    """Else a row of idle identities could keep an audit from ever being carried out."""
    c = court(shards=2)
    wants(c)
    busy = c.accept(PEERS[3], 1)
    c.now += c.rules.audit_wait
    c.hears(JudgeTick(c.now))
    assert c.audits[-1].audit.checkpoint == busy.digest, "the coordinator is at work on another"
    wants(c)
    record = c.accept(HONEST)
    assert wants(c).audit
    c.now += c.rules.audit_loan + 1
    assert wants(c, OTHER).audit is None
    c.audited("valid")
    assert c.audits[-1].audit.checkpoint == record.digest


def test_at_the_end_of_the_run_nobody_waits_for_a_peer():
    c = court(shards=1, epochs=1)
    wants(c)
    record = c.accept(HONEST)
    assert [audit.audit.checkpoint for audit in c.audits] == [record.digest]


def test_a_crowd_that_stands_by_is_told_to_ask_less_often():
    c = court()
    waits = [wants(c, Identity.derived(f"idle {number}")).retry_after for number in range(300)]
    assert waits[0] < 20
    assert waits[-1] > 60


def test_nobody_judges_itself_its_operator_or_two_at_a_time():
    c = court(shards=2)
    wants(c)
    c.accept(AUDITOR)
    assert wants(c).audit is None, "not its own"
    c.accept(HONEST, 1)
    assert wants(c, related=frozenset({owner(HONEST)})).audit is None, "not its operator's"
    lend = wants(c)
    assert lend.audit
    assert lend.audit.audit.owner == owner(HONEST)
    assert wants(c, OTHER).audit, "another may judge the auditor's own"
    again = wants(c)
    assert (again.audit, again.until) == (lend.audit, lend.until), "one at a time: who asks again gets the same again"
    c = court()
    c.accept(CHEAT)
    c.audited("invalid")
    c.accept(HONEST)
    assert wants(c, CHEAT).audit is None, "not from quarantine"


def test_asking_is_bounded_like_offering():
    c = court(rules={"offers_per_minute": 3})
    assert [wants(c).retry_after > 50 for _ in range(4)] == [False] * 3 + [True]


def test_a_new_auditor_is_checked_until_it_was_right_ten_times_and_then_one_in_n():
    c, checkpoint = lent_to_auditor()
    checked = 0
    for number in range(40):
        trust = c.state.run.peer(owner(AUDITOR)).trust
        before = len(c.audits)
        delivers(c, checkpoint, "valid")
        if len(c.audits) > before:
            assert c.state.run.audits[checkpoint].reported == (owner(AUDITOR), "valid")
            c.audited("valid", checkpoint)
            checked += 1
            assert c.state.run.peer(owner(AUDITOR)).trust == trust + 1
        else:
            assert trust >= 10
            assert c.state.run.peer(owner(AUDITOR)).trust == trust, "who is believed unchecked earns nothing by it"
        assert checkpoint not in c.state.run.audits
        while not c.state.run.audits:  # the author, too, is trusted by and by
            checkpoint = c.accept(HONEST, text=str(number)).digest
            if c.state.run.shards[0].epoch > 55:
                break
        if not c.state.run.audits:
            break
        lend = wants(c)
        assert lend.audit
    assert checked >= 10
    done = [event for event in c.events if isinstance(event, AuditDone)]
    assert {event.by for event in done} >= {None}
    assert all(event.outcome == "valid" for event in done)


@pytest.mark.parametrize("said", ["invalid", "inconclusive"])
def test_nobody_is_convicted_on_a_strangers_word(said: Outcome):
    c, checkpoint = lent_to_auditor()
    delivers(c, checkpoint, said)
    assert not c.state.run.quarantined
    assert c.audits[-1].audit.checkpoint == checkpoint, "the coordinator replays it itself"
    c.audited("valid", checkpoint)
    assert not c.state.run.quarantined
    assert c.state.run.peer(owner(AUDITOR)).trust == 0
    assert c.state.run.peer(owner(HONEST)).streak == 1


def test_an_auditor_that_covers_a_cheat_loses_its_trust_and_the_cheat_its_work():
    c, checkpoint = lent_to_auditor()
    delivers(c, checkpoint, "valid")
    c.audited("valid", checkpoint)
    assert c.state.run.peer(owner(AUDITOR)).trust == 1
    faked = c.accept(CHEAT)
    assert wants(c).audit
    delivers(c, faked.digest, "valid")
    c.audited("invalid", faked.digest)
    assert c.state.run.peer(owner(AUDITOR)).trust == 0
    assert set(c.state.run.quarantined) == {owner(CHEAT)}


def test_what_was_not_lent_or_is_gone_changes_nothing():
    c, checkpoint = lent_to_auditor()
    before = c.state
    assert delivers(c, checkpoint, "invalid", OTHER) == ()
    assert delivers(c, "f" * 64, "invalid") == ()
    assert c.state == before
    c.state = JudgeState.restored(c.state.run)
    c.hears(LimitsKnown(limits_of(2), c.now))
    assert c.audits[-1].audit.checkpoint == checkpoint, "a restart forgets loans and does the work itself"
    assert delivers(c, checkpoint, "invalid") == ()


def test_relatives_share_an_operator_or_a_public_address():
    def peer(name: str, address: str, operator: str | None = None) -> NodeRecord:
        identity = Identity.derived(name)
        addresses = (f"{address}/p2p/{identity.peer_id}",)
        return NodeRecord(
            run="0" * 64, owner=identity.public_key, issued=0.0, peer_id=identity.peer_id, addresses=addresses,
            hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1, software="1", state="idle",
            operator=operator,
        )  # fmt: skip

    boss = Identity.derived("boss").public_key
    peers = [
        peer("a", "/ip4/1.2.3.4/tcp/1", boss), peer("b", "/ip4/1.2.3.4/tcp/2"), peer("c", "/ip4/5.6.7.8/tcp/1", boss),
        peer("d", "/ip4/127.0.0.1/tcp/1"), peer("e", "/ip4/127.0.0.1/tcp/2"),
    ]  # fmt: skip
    names = {record.owner: name for record, name in zip(peers, "abcde", strict=True)}
    assert {names[key] for key in relatives(peers[0].owner, peers)} == {"a", "b", "c"}
    assert {names[key] for key in relatives(peers[3].owner, peers)} == {"d"}, "everybody is at home on loopback"
    assert relatives("unknown", peers) == frozenset()
