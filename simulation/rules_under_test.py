"""The decision functions that a simulation runs: the real ones, or a mutant that the invariants must notice."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from lutetia.coordinator.acceptance.checks import CheckRunner, Verdict, run_checks
from lutetia.coordinator.acceptance.messages import Action as JudgeAction
from lutetia.coordinator.acceptance.messages import Stimulus
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.events import Event as LedgerEvent
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.node.machine.machine import advance
from lutetia.node.machine.messages import Action, Event
from lutetia.node.machine.state import MachineState, NodeRules
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.simulation.network.blobs import weights_after

Advance = Callable[[NodeRules, MachineState, Event], tuple[MachineState, list[Action]]]
Judge = Callable[[JudgeRules, JudgeState, Stimulus], tuple[JudgeState, tuple[JudgeAction, ...]]]
RunChecks = Callable[
    [CheckpointRecord, AcceptanceRecord | None, Manifest, CheckRunner, Callable[[], float]], Coroutine[Any, Any, Verdict]
]
Status = Callable[[RunState, Manifest, LiveView, float], SwarmStatus]


def replayed(events: Sequence[LedgerEvent]) -> RunState:
    """A coordinator's state after a restart, from its ledger."""
    state = RunState()
    for event in events:
        state = apply(state, event)
    return state


@dataclass(frozen=True)
class RulesUnderTest:
    advance: Advance = advance
    judge: Judge = judge
    run_checks: RunChecks = run_checks
    replayed: Callable[[Sequence[LedgerEvent]], RunState] = replayed
    status: Status = status
    weights: Callable[[int, int, str, str, tuple[tuple[int, int], ...]], str] = weights_after
