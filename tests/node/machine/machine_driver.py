"""Drives a node's state machine in a test: feeds events and sets the clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from lutetia.node.machine import messages as m
from lutetia.node.machine.machine import advance
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.protocol.claims import LiveClaim, ShardView
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord

ME, OTHER = "11" * 32, "22" * 32
T = 1_800_000_000.0
RULES = NodeRules("ab" * 32, ME, shards=2, epochs=4, heartbeat=20.0, propagation=1.0)


def claim_record(owner: str, claim: m.Claim, now: float) -> ClaimRecord:
    fields = {"shard": claim.shard, "epoch": claim.epoch, "samples": claim.samples, "state": claim.state}
    return cast(ClaimRecord, SimpleNamespace(owner=owner, issued=now, **fields))


def acceptance(shard: int, epoch: int, digest: str, author: str, tenure_until: float = 0.0, term: int = 0) -> AcceptanceRecord:
    fields = {
        "shard": shard,
        "epoch": epoch,
        "checkpoint": digest,
        "author": author,
        "tenure_until": tenure_until,
        "term": term,
        "lanes": (),
        "authors": (),
    }
    return cast(AcceptanceRecord, SimpleNamespace(**fields))


def claimed(shard: int, owner: str, expires: float, state: str = "training", epoch: int = 0, accepted=None) -> ShardView:
    record = claim_record(owner, m.Claim(shard, epoch, 0, state), T)  # type: ignore[arg-type]
    return ShardView(shard, (LiveClaim(record, expires),), accepted)


class MachineDriver:
    """A state machine with its clock and the actions of its last event."""

    def __init__(self, rules: NodeRules = RULES) -> None:
        self.rules, self.now, self.state = rules, T, MachineState()
        self.actions: list[m.Action] = []

    def feed(self, event: m.Event) -> list[m.Action]:
        self.state, self.actions = advance(self.rules, self.state, event)
        return self.actions

    def tick(self) -> list[m.Action]:
        """Advance the clock to the machine's next wake-up."""
        due = next_wake(self.rules, self.state)
        assert due is not None
        self.now = max(self.now, due)
        return self.feed(m.ClockTick(self.now))

    def until(self, kind: type, limit: int = 20) -> m.Action:
        """Tick until there is an action of `kind`."""
        for _ in range(limit):
            for action in self.tick():
                if isinstance(action, kind):
                    return action
        raise AssertionError(f"no {kind.__name__} within {limit} ticks; {self.state.phase}: {self.state.why}")

    def actions_of(self, kind: type) -> list[m.Action]:
        return [action for action in self.actions if isinstance(action, kind)]

    def idle(self, fitness: dict[int, float] | None = None) -> MachineDriver:
        self.feed(m.Joined(self.now))
        self.feed(m.Probed(self.now, {0: 1.0, 1: 1.0} if fitness is None else fitness))
        return self

    def claiming(self) -> MachineDriver:
        self.idle({0: 1.0})
        self.feed(m.SwarmSeen(self.now, (ShardView(0), ShardView(1))))
        return self

    def syncing(self) -> MachineDriver:
        self.claiming()
        self.until(m.LookAtShards)
        self.feed(m.SwarmSeen(self.now, (ShardView(0),)))
        assert self.actions_of(m.PublishClaim)
        self.until(m.LookAtShards)
        self.feed(m.SwarmSeen(self.now, (claimed(0, ME, self.now + 60, "claiming"),)))
        assert self.state.phase == "syncing"
        return self

    def training(self) -> MachineDriver:
        self.syncing()
        self.feed(m.SyncDone(self.now, 0, 0, None))
        assert self.actions_of(m.StartTrainer)
        return self

    def checkpoint(self, epoch: int, parent: str | None) -> list[m.Action]:
        return self.feed(m.CheckpointReady(self.now, self.state.trainers_started, m.OwnCheckpoint(0, epoch, f"d{epoch}", parent)))

    def progress(self, epoch: int, waiting: bool = False) -> list[m.Action]:
        return self.feed(m.TrainerProgress(self.now, self.state.trainers_started, epoch, epoch * 100, waiting))

    def seconds_to_leave(self, verdict: str) -> float:
        """Seconds until the node has left, with every offer answered by `verdict`."""
        began = self.now
        for _ in range(100):
            if self.state.phase == "left":
                return self.now - began
            self.tick()
            for action in self.actions_of(m.PublishCheckpoint):
                self.feed(m.OfferAnswered(self.now, action.candidate.digest, verdict))  # type: ignore[union-attr, arg-type]
        raise AssertionError(f"the node has not left after {self.now - began:.0f} s")
