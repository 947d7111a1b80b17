"""One call of the state machine: the state as it changes, and the actions so far. Lives no longer than that call."""

from __future__ import annotations

from typing import Any

from lutetia.node.machine.messages import Action, LogSentence
from lutetia.node.machine.state import MachineState, NodeRules, ShardWork, evolve
from lutetia.protocol.schema.records import NodeState

_WORTH_TELLING = frozenset({"idle", "training", "publishing", "paused", "draining"})
"""Phases that the swarm should hear of at once, not with the next heartbeat."""
_RELAPSE = 120.0
"""Seconds: what is full again so soon after was full all the time."""


class NodeTransition:
    """Collects what one event changes."""

    def __init__(self, rules: NodeRules, state: MachineState, now: float) -> None:
        self.rules = rules
        self.state = state
        self.now = now
        self.actions: list[Action] = []

    def set(self, **changes: Any) -> None:
        self.state = evolve(self.state, **changes)

    def change(self, **changes: Any) -> None:
        """Change the work in hand."""
        assert self.state.work
        self.state = evolve(self.state, work=evolve(self.state.work, **changes))

    @property
    def work(self) -> ShardWork:
        assert self.state.work
        return self.state.work

    def do(self, action: Action) -> None:
        self.actions.append(action)

    def enter(self, phase: NodeState, why: str) -> None:
        """Change phase, and say why."""
        changed = phase != self.state.phase
        self.set(phase=phase, why=why, since=self.now if changed else self.state.since)
        self.info(f"{phase}: {why}")
        if changed and phase in _WORTH_TELLING:
            self.set(renew_at=self.now)

    def because(self, why: str) -> None:
        """The phase stays; its reason may have changed."""
        if why != self.state.why:
            self.set(why=why)
            self.info(f"{self.state.phase}: {why}")

    def disk_full(self, text: str) -> None:
        """Say so once. Hope in between does not begin the time anew after which the shard is let go."""
        state = self.state
        if state.disk_full_since is None:
            relapse = state.disk_freed is not None and self.now - state.disk_freed[1] < _RELAPSE
            self.set(disk_full_since=state.disk_freed[0] if relapse and state.disk_freed else self.now)
            self.warn(text)

    def info(self, text: str) -> None:
        self.do(LogSentence("info", text))

    def warn(self, text: str) -> None:
        self.do(LogSentence("warning", text))
