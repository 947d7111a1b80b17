"""The decisions that a simulation runs: the real ones, unless somebody wants to see that the invariants notice other ones."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from ..coordinator.judge import JudgeState, judge
from ..coordinator.judge import Rules as JudgeRules
from ..coordinator.ladder import Tools, Verdict, climb
from ..coordinator.messages import Action as JudgeAction
from ..coordinator.messages import Stimulus
from ..node.machine import advance
from ..node.messages import Action, Event
from ..node.state import Rules, State
from ..protocol.events import Event as LedgerEvent
from ..protocol.ledger_state import RunState, apply
from ..protocol.manifest import Manifest
from ..protocol.records import CheckpointRecord
from ..protocol.status import SwarmStatus
from ..protocol.status_view import LiveView, status
from .goods import weights_after

Advance = Callable[[Rules, State, Event], tuple[State, list[Action]]]
Judge = Callable[[JudgeRules, JudgeState, Stimulus], tuple[JudgeState, tuple[JudgeAction, ...]]]
Climb = Callable[[CheckpointRecord, float | None, Manifest, Tools], Coroutine[Any, Any, Verdict]]
Status = Callable[[RunState, Manifest, LiveView, float], SwarmStatus]


def replayed(events: Sequence[LedgerEvent]) -> RunState:
    """A coordinator's state after a restart: the sum of its ledger."""
    state = RunState()
    for event in events:
        state = apply(state, event)
    return state


@dataclass(frozen=True)
class Decisions:
    advance: Advance = advance
    judge: Judge = judge
    climb: Climb = climb
    replayed: Callable[[Sequence[LedgerEvent]], RunState] = replayed
    status: Status = status
    weights: Callable[[int, int, str, str, tuple[tuple[int, int], ...]], str] = weights_after
