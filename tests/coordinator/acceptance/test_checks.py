"""The list of acceptance checks, and the typed changes of the judge's and the ledger's states."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from lutetia.coordinator.acceptance.checks import ACCEPTANCE_CHECKS, CheckFailed, CheckRunner, run_checks, run_transfer
from lutetia.coordinator.acceptance.loss_bounds import Losses
from lutetia.coordinator.acceptance.transition import JudgeChanges, JudgeState
from lutetia.coordinator.ledger import run_state
from lutetia.coordinator.ledger.events import CheckCost
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.verdicts import CHECK_NAMES, CheckName
from tests.coordinator.acceptance.judge_driver import PEERS, START, make_manifest, make_record


class ScriptedChecks(CheckRunner):
    """Every check passes, except the one that `failed` names. Each call takes a second of `seconds`."""

    def __init__(self, failed: CheckName | None = None) -> None:
        self.failed, self.seconds = failed, 0.0

    def clock(self) -> float:
        return self.seconds

    def _run(self, *names: CheckName) -> None:
        self.seconds += 1
        if self.failed in names:
            raise CheckFailed("invalid", self.failed, "as the script wants")

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        self._run("transfer")

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        self._run("format", "numbers")

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        self._run()
        return [1.0, 1.0]

    async def losses(self, record: CheckpointRecord) -> Losses:
        self._run()
        return [9.0, 9.0] if self.failed == "holdout" else [0.5, 0.5]

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        self._run()
        return [9.0, 9.0] if self.failed == "raw" else [0.5, 0.5]


async def verdict_of(runner: ScriptedChecks):
    manifest = make_manifest()
    record = make_record(manifest, PEERS[0])
    transfer = await run_transfer(record, manifest, runner, runner.clock)
    if transfer.outcome != "valid":
        return transfer
    verdict = await run_checks(record, None, manifest, runner, runner.clock)
    return dataclasses.replace(verdict, costs=(*transfer.costs, *verdict.costs))


def test_the_list_has_every_check_in_the_order_of_the_names():
    assert tuple(name for check in ACCEPTANCE_CHECKS for name in (*check.includes, check.name)) == CHECK_NAMES
    assert get_args(CheckName) == CHECK_NAMES


def test_checks_are_listed_cheapest_first():
    order = ["free", "network", "disk", "compute", "replay"]
    costs = [order.index(check.cost) for check in ACCEPTANCE_CHECKS]
    assert costs == sorted(costs)


async def test_a_result_that_passes_has_run_every_check():
    verdict = await verdict_of(ScriptedChecks())
    assert (verdict.outcome, verdict.loss, verdict.parent_loss) == ("valid", 0.5, 1.0)
    assert verdict.rules == 1
    assert [cost.check for cost in verdict.costs] == ["transfer", "numbers", "holdout", "holdout", "raw"]
    assert [(cost.outcome, cost.seconds) for cost in verdict.costs] == [("valid", 1.0)] * 5


@pytest.mark.parametrize("name", ["transfer", "format", "numbers", "holdout", "raw"])
async def test_the_first_failed_check_ends_the_run(name: CheckName):
    verdict = await verdict_of(ScriptedChecks(failed=name))
    assert (verdict.outcome, verdict.check) == ("invalid", name)
    assert [cost.check for cost in verdict.costs if cost.outcome == "invalid"] == [name]
    assert verdict.costs[-1].check == name


@pytest.mark.parametrize(
    ("changes", "state", "besides"),
    [
        (JudgeChanges, JudgeState, set()),
        (run_state.Changes, run_state.RunState, {"events"}),
        (run_state.ShardChanges, run_state.ShardLedger, set()),
        (run_state.PeerChanges, run_state.PeerLedger, set()),
        (run_state.PendingAuditChanges, run_state.PendingAudit, {"shard", "epoch", "owner", "checkpoint", "since", "lane"}),
    ],
)
def test_typed_changes_name_the_fields_of_their_state(changes: type, state: type, besides: set[str]):
    assert {field.name: field.type for field in dataclasses.fields(state) if field.name not in besides} == {
        name: hint.__forward_arg__ for name, hint in changes.__annotations__.items()
    }


def test_a_cost_is_written_under_the_new_name_only():
    assert CheckCost(check="raw", outcome="valid", seconds=START).model_dump().keys() == {"check", "outcome", "seconds", "size"}


def test_the_offer_reply_keeps_its_name_on_the_wire():
    reply = OfferReply(verdict="invalid", check="numbers", text="a tensor is not finite")
    data = canonical(reply)
    assert data == b'{"retry_after":null,"rung":"numbers","text":"a tensor is not finite","verdict":"invalid"}'
    assert OfferReply.model_validate_json(data) == reply
