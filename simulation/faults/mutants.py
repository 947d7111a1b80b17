"""Rules broken on purpose, at least one for each invariant, to show that its check works and what a violation looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lutetia.coordinator.acceptance import messages as j
from lutetia.coordinator.acceptance.checks import CheckRunner, Verdict
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import CheckpointAccepted
from lutetia.coordinator.ledger.events import Event as LedgerEvent
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.node.machine import messages as m
from lutetia.node.machine.machine import advance
from lutetia.node.machine.state import MachineState, NodeRules
from lutetia.protocol.claims import LiveClaim, ShardView
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.simulation.rules_under_test import RulesUnderTest, replayed
from lutetia.system.errors import UsageError


@dataclass(frozen=True)
class Mutant:
    """`invariant`: the one that it violates. `scenario`: one that shows it."""

    summary: str
    invariant: str
    scenario: str
    decide: Callable[[], RulesUnderTest]


def _accept_twice(rules: JudgeRules, state: JudgeState, stimulus: j.Stimulus) -> tuple[JudgeState, tuple[j.Action, ...]]:
    """A second, different result for an accepted epoch is accepted, too."""
    after, actions = judge(rules, state, stimulus)
    if isinstance(stimulus, j.Offered):
        record, shard = stimulus.record, state.run.shards[stimulus.record.shard]
        if record.epoch == shard.epoch and shard.acceptance and record.digest != shard.accepted:
            twin = shard.acceptance.model_copy(
                update={"checkpoint": record.digest, "parent": record.parent, "author": record.owner, "weights": record.weights}
            )
            assert isinstance(twin, AcceptanceRecord)
            return after, (*actions, j.Publish(twin, record))
    return after, actions


def _believe_auditors(rules: JudgeRules, state: JudgeState, stimulus: j.Stimulus) -> tuple[JudgeState, tuple[j.Action, ...]]:
    """Every audit report of a peer counts at once, without a second replay."""
    if isinstance(stimulus, j.AuditDelivered):
        stimulus = j.Audited(stimulus.checkpoint, stimulus.finding, stimulus.now, by=stimulus.owner)
    return judge(rules, state, stimulus)


async def _check_nothing(
    record: CheckpointRecord,
    parent: AcceptanceRecord | None,
    manifest: Manifest,
    runner: CheckRunner,
    clock: Callable[[], float],
) -> Verdict:
    """Every checkpoint that arrives counts as valid."""
    return Verdict("valid", "holdout", "", 0.0, 1.0)


def _replay_without_end(events: Sequence[LedgerEvent]) -> RunState:
    """A restart loses the last acceptance, as if it had not reached the disk."""
    last = max((place for place, event in enumerate(events) if isinstance(event, CheckpointAccepted)), default=len(events))
    return replayed(events[:last])


def _claims_live_forever(rules: NodeRules, state: MachineState, event: m.Event) -> tuple[MachineState, list[m.Action]]:
    """Claims that were seen once never expire: no node takes over from a dead one."""
    if isinstance(event, m.SwarmSeen):
        event = replace(event, views=tuple(_still_claimed(state.views.get(view.shard), view, event.now) for view in event.views))
    return advance(rules, state, event)


def _still_claimed(before: ShardView | None, view: ShardView, now: float) -> ShardView:
    if before is None or view.live(now):
        return view
    return replace(view, claims=tuple(LiveClaim(claim.record, claim.expires + 1e6) for claim in before.claims))


def _blind_to_lanes(rules: NodeRules, state: MachineState, event: m.Event) -> tuple[MachineState, list[m.Action]]:
    """No node takes a lane above the first."""
    if isinstance(event, m.Probed):
        after, actions = advance(rules, state, event)
        return replace(after, fitness={slot: fit for slot, fit in after.fitness.items() if slot < rules.shards}), actions
    return advance(rules, state, event)


def _trainers_run_on(rules: NodeRules, state: MachineState, event: m.Event) -> tuple[MachineState, list[m.Action]]:
    """A node that loses its shard does not stop the trainer."""
    after, actions = advance(rules, state, event)
    return after, [action for action in actions if not isinstance(action, m.StopTrainer)]


def _status_believes_claims(state: RunState, manifest: Manifest, live: LiveView, now: float) -> SwarmStatus:
    """Every node that claims a shard is called working."""
    document = status(state, manifest, live, now)
    nodes = tuple(node.model_copy(update={"health": "working"}) if node.shard is not None else node for node in document.nodes)
    return document.model_copy(update={"nodes": nodes})


def _resume_depends_on_history(shard: int, epoch: int, parent: str, device: str, spans: tuple[tuple[int, int], ...]) -> str:
    """Random numbers depend on when the process started, not on the step: a resumed epoch ends with other weights."""
    import hashlib

    return hashlib.sha256(f"{shard}|{epoch}|{parent}|{device}|{spans}".encode()).hexdigest()


MUTANTS: dict[str, Mutant] = {
    "accept-twice": Mutant(
        "a second result for an accepted epoch is accepted, too (I1)",
        "I1",
        "partition",
        lambda: RulesUnderTest(judge=_accept_twice),
    ),
    "check-nothing": Mutant(
        "checkpoints are accepted without any check of their content (I2)",
        "I2",
        "liars",
        lambda: RulesUnderTest(run_checks=_check_nothing),
    ),
    "forget-the-last": Mutant(
        "a restarted coordinator has lost the last acceptance (I3)",
        "I3",
        "coordinator-crash",
        lambda: RulesUnderTest(replayed=_replay_without_end),
    ),
    "believe-auditors": Mutant(
        "a peer's audit report convicts without a second replay (I3)",
        "I3",
        "auditors",
        lambda: RulesUnderTest(judge=_believe_auditors),
    ),
    "claims-for-good": Mutant(
        "an expired claim still keeps other nodes away (I4)",
        "I4",
        "killed",
        lambda: RulesUnderTest(advance=_claims_live_forever),
    ),
    "trainers-run-on": Mutant(
        "a trainer is not stopped when its node loses the shard (I5)",
        "I5",
        "sleep",
        lambda: RulesUnderTest(advance=_trainers_run_on),
    ),
    "believe-claims": Mutant(
        "the status calls every node working that claims a shard (I6)",
        "I6",
        "calm",
        lambda: RulesUnderTest(status=_status_believes_claims),
    ),
    "blind-to-lanes": Mutant(
        "no node takes a lane above the first (I8)",
        "I8",
        "team",
        lambda: RulesUnderTest(advance=_blind_to_lanes),
    ),
    "resume-elsewhere": Mutant(
        "a resumed epoch gives other weights than an uninterrupted one (I7)",
        "I7",
        "resume",
        lambda: RulesUnderTest(weights=_resume_depends_on_history),
    ),
}


def mutant_rules(name: str) -> RulesUnderTest:
    """The rules with one mutant. Raises UsageError for an unknown name."""
    if name not in MUTANTS:
        raise UsageError(f"there is no rule {name!r} for --broken; `lutetia simulate --list` prints all rules")
    return MUTANTS[name].decide()
