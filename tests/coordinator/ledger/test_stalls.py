"""Whatever stalls is in the status within one lease, with its reason and a remedy."""

from __future__ import annotations

import dataclasses

from lutetia.cli.status_table import shard_reason, stall_lines
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import Audited, CheckDone, JudgeTick
from lutetia.coordinator.ledger.events import AuditDue, RouterTrained
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.stalls import STALLED_AUDIT_TENURES
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.runtime.swarm_monitor import free_since
from lutetia.coordinator.web.metrics import metrics_text
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.status import StallStatus, SwarmStatus
from lutetia.protocol.schema.verdicts import CheckName
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, blob, drive_judge, make_record
from tests.coordinator.acceptance.lanes.lanes_driver import LanesDriver
from tests.coordinator.ledger.test_status_builder import claim, node

HOLDER, STRANGER = PEERS[0], PEERS[1]


def document(driver: JudgeDriver, view: LiveView | None = None) -> SwarmStatus:
    """The status while HOLDER claims shard 0 since the run began, or with `view`."""
    run = driver.manifest.run_id
    held = LiveView([node(run, HOLDER, driver.now)], [claim(run, HOLDER, driver.now)])
    return status(driver.state.run, driver.manifest, view or held, driver.now)


def stall(driver: JudgeDriver, view: LiveView | None = None) -> StallStatus | None:
    shown = document(driver, view)
    found = next((stall for stall in shown.stalls if (stall.kind, stall.shard) == ("shard", 0)), None)
    assert (found is not None) == (0 in shown.stalled_shards)
    return found


def refused(driver: JudgeDriver, peer: Identity, check: CheckName = "raw", loss: float | None = None) -> CheckpointRecord:
    ledger = driver.state.run.shards[0]
    record = make_record(driver.manifest, peer, 0, ledger.epoch + 1, ledger.accepted)
    assert driver.offer(record).verdict == "queued"
    verdict = Verdict("invalid", check, "the raw parameters score 0.6 % over the bound", loss, loss and 0.5)
    driver.send(CheckDone(record, verdict, driver.now))
    return record


def started() -> JudgeDriver:
    driver = drive_judge(epochs=9)
    driver.accept(HOLDER)
    driver.finish_audit("valid")
    return driver


def test_a_shard_that_goes_on_has_no_stall():
    driver = started()
    assert stall(driver) is None
    assert document(driver).stalls == ()
    assert "Nothing holds it up: training, 1 of 9 epochs" in shard_reason(document(driver), 0, driver.now)["text"]


def test_a_refused_holder_makes_its_shard_red_at_once_everywhere():
    driver = started()
    refused(driver, HOLDER)
    shown = document(driver)
    found = stall(driver)
    assert found is not None
    assert (found.since, "0.6 % over the bound" in found.why) == (driver.now, True)
    assert "lutetia run upgrade RUN --set raw_tolerance=" in found.remedy
    assert "lutetia coordinator rollback RUN 0 0" in found.remedy
    assert b'lutetia_shard_stalled{shard="0"} 1.0' in metrics_text(shown)
    assert "<td class=stalled>stalled</td>" in render_page(shown)
    assert found.why in render_page(shown).replace("&#x27;", "'")
    assert stall_lines(shown, driver.now)[0].startswith("expert 000 stalled for 0 s: 1 result of a peer for epoch 2 did not pass")
    reason = shard_reason(shown, 0, driver.now)
    assert (reason["state"], reason["why"], reason["remedy"]) == ("stalled", found.why, found.remedy)
    driver.accept(HOLDER, text="passes")
    assert stall(driver) is None


def test_one_stranger_cannot_make_a_shard_red_but_two_can():
    driver = started()
    refused(driver, STRANGER)
    assert stall(driver) is None
    refused(driver, PEERS[2])
    assert stall(driver) is not None


def test_a_proof_is_shown_once_it_takes_longer_than_a_lease():
    driver = started()
    refused(driver, HOLDER, loss=0.6)
    assert driver.state.run.shards[0].undecided_of(HOLDER.public_key)[0].doubt
    assert stall(driver) is None
    driver.now += driver.manifest.timing.lease + 1
    found = stall(driver)
    assert found is not None
    assert "The coordinator replays epoch 1 and then the result built on it" in found.why
    driver.finish_audit("valid")
    found = stall(driver)
    assert found is not None
    assert "The coordinator replays a result, which fails the check raw" in found.why
    assert "it is accepted if the replay confirms it" in found.remedy


def test_a_shard_without_holder_is_red_after_one_lease():
    driver = started()
    lease, began = driver.manifest.timing.lease, driver.now
    empty = LiveView(free_since=free_since({}, (), range(2), began))
    assert stall(driver, empty) is None
    driver.now += lease + 1
    assert free_since(empty.free_since, (), range(2), driver.now) == empty.free_since
    found = stall(driver, empty)
    assert found is not None
    assert (found.since, "none stands by" in found.why) == (began, True)
    idle = dataclasses.replace(empty, nodes=[node(driver.manifest.run_id, STRANGER, driver.now, "idle")])
    found = stall(driver, idle)
    assert found is not None
    assert "although 1 stands by" in found.why


def test_an_overdue_holder_is_named_with_its_shard():
    driver = started()
    driver.now += driver.manifest.timing.tenure + driver.manifest.timing.lease + 1
    run = driver.manifest.run_id
    held = LiveView([node(run, HOLDER, driver.now)], [claim(run, HOLDER, driver.now, since=driver.now - 500)])
    shown = document(driver, held)
    shard, holder = shown.stalls
    assert (shard.kind, holder.kind, holder.owner) == ("shard", "node", HOLDER.public_key)
    assert f"node …{HOLDER.peer_id[-8:]} holds it" in shard.why
    assert "holds shard 0, and offers no result" in holder.why


def test_a_check_that_takes_too_long_is_named():
    driver = started()
    record = make_record(driver.manifest, HOLDER, 0, 2, driver.state.run.shards[0].accepted)
    driver.offer(record)
    driver.send(CheckDone(record, Verdict("inconclusive", "transfer", "its weights did not arrive within 30 s"), driver.now))
    assert stall(driver) is None
    driver.now += driver.manifest.timing.lease + 1
    found = stall(driver)
    assert found is not None
    assert "after 1 tries without a verdict" in found.why
    assert "its weights did not arrive within 30 s" in found.remedy


def test_audits_that_do_not_end_are_listed():
    driver = drive_judge(epochs=9)
    accepted = driver.accept(HOLDER)
    assert document(driver).stalls == ()
    for _ in range(2):
        finding = AuditFinding(outcome="inconclusive", text="the worker process was killed")
        driver.send(Audited(accepted.digest, finding, driver.now))
        driver.now += 60
        driver.send(JudgeTick(driver.now))
    [found] = [stall for stall in document(driver).stalls if stall.kind == "audit"]
    assert (found.shard, found.epoch) == (0, 1)
    assert "2 replays of the first steps ended without a verdict" in found.why
    assert b"lutetia_audits_stalled 1.0" in metrics_text(document(driver))


def test_an_audit_that_nobody_carries_out_is_listed_after_six_tenures():
    driver = drive_judge(epochs=9)
    driver.accept(HOLDER)
    assert any(isinstance(event, AuditDue) for event in driver.events)
    driver.now += STALLED_AUDIT_TENURES * driver.manifest.timing.tenure + 1
    assert [stall.epoch for stall in document(driver).stalls if stall.kind == "audit"] == [1]


def test_a_quarantined_node_is_told_why():
    driver = drive_judge(epochs=9)
    driver.accept(HOLDER)
    driver.finish_audit("invalid")
    shown = document(driver)
    assert shown.nodes[0].health == "quarantined"
    [found] = [stall for stall in shown.stalls if stall.kind == "node"]
    assert (found.owner, "step 2: 0.7 and 0.9" in found.why) == (HOLDER.public_key, True)


def test_the_router_is_as_old_as_its_training():
    """Ledgers of earlier versions repeat its event with every mixture."""
    driver = started()
    trained = RouterTrained(time=driver.now, epochs=(1, 0), router=blob("router"), accuracy=0.9)
    state = apply(driver.state.run, trained)
    state = apply(state, trained.model_copy(update={"time": driver.now + 500, "epochs": (2, 0)}))
    assert state.router is not None
    assert (state.router.time, state.router.epochs) == (driver.now, (2, 0))
    again = apply(state, trained.model_copy(update={"time": driver.now + 900, "router": blob("another")}))
    assert again.router is not None
    assert again.router.time == driver.now + 900


def test_a_merge_that_does_not_end_makes_its_shard_red_after_the_usual_time():
    driver = LanesDriver()
    for lane in range(4):
        driver.result(lane)
    manifest, due = driver.judge.manifest, driver.judge.now
    view = LiveView(at_work={0: frozenset(range(4))})
    waiting = dataclasses.replace(view, lent={0: "a check (result) has waited 99 s for another node"})

    def red(view: LiveView) -> StallStatus | None:
        shown = status(driver.judge.state.run, manifest, view, driver.judge.now)
        return next((stall for stall in shown.stalls if stall.shard == 0), None)

    driver.judge.now += manifest.timing.lease
    assert red(waiting) is None
    driver.judge.now += 1
    found = red(waiting)
    assert found is not None
    assert (found.kind, found.since) == ("shard", due)
    assert found.why == "The merge of the 4 accepted lanes of epoch 1 is due, and has not ended."
    assert found.remedy.endswith("a check (result) has waited 99 s for another node.")
    found = red(view)
    assert found is not None
    assert "The coordinator's log says" in found.remedy
    driver.merged()
    assert red(waiting) is None
