"""One call of the state machine: the changing state and the actions so far."""

from __future__ import annotations

from typing import Unpack

from lutetia.node.machine.changes import MachineChanges, WorkChanges
from lutetia.node.machine.messages import Action, LogSentence
from lutetia.node.machine.state import MachineState, NodeRules, ShardWork, evolve
from lutetia.protocol.schema.records import NodeState

_ANNOUNCED = frozenset({"idle", "training", "publishing", "paused", "draining"})
"""Phases that are published at once, not with the next heartbeat."""
_FULL_AGAIN = 120.0
"""Seconds. A disk that is full again within this time counts as full since the first time."""


class NodeTransition:
    """Collects the changes and actions of one event."""

    def __init__(self, rules: NodeRules, state: MachineState, now: float) -> None:
        self.rules = rules
        self.state = state
        self.now = now
        self.actions: list[Action] = []

    def set(self, **changes: Unpack[MachineChanges]) -> None:
        self.state = evolve(self.state, **changes)

    def set_work(self, **changes: Unpack[WorkChanges]) -> None:
        """Change the current work."""
        assert self.state.work
        self.state = evolve(self.state, work=evolve(self.state.work, **changes))

    @property
    def work(self) -> ShardWork:
        assert self.state.work
        return self.state.work

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def enter(self, phase: NodeState, why: str) -> None:
        """Change the phase and log why."""
        changed = phase != self.state.phase
        self.set(phase=phase, why=why, since=self.now if changed else self.state.since)
        self.info(f"{phase}: {why}")
        if changed and phase in _ANNOUNCED:
            self.set(renew_at=self.now)

    def explain(self, why: str) -> None:
        """Keep the phase; log its reason if that is new."""
        if why != self.state.why:
            self.set(why=why)
            self.info(f"{self.state.phase}: {why}")

    def disk_full(self, text: str) -> None:
        """Warn once. A short recovery does not restart the timer that releases the shard."""
        state = self.state
        if state.disk_full_since is None:
            again = state.disk_freed is not None and self.now - state.disk_freed[1] < _FULL_AGAIN
            self.set(disk_full_since=state.disk_freed[0] if again and state.disk_freed else self.now)
            self.warn(text)

    def info(self, text: str) -> None:
        self.do(LogSentence("info", text))

    def warn(self, text: str) -> None:
        self.do(LogSentence("warning", text))
