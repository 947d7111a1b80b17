"""A swarm on paper: many node machines, a DHT with delay, a coordinator and trainers, in virtual time from one seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

from lutetia.node import messages as m
from lutetia.node.machine import advance
from lutetia.node.state import Rules, State, next_wake
from lutetia.protocol.claims import LiveClaim, ShardView
from lutetia.protocol.records import AcceptanceRecord, ClaimRecord

RUN = "ab" * 32


def claim_record(owner: str, claim: m.Claim, now: float) -> ClaimRecord:
    fields = {"shard": claim.shard, "epoch": claim.epoch, "samples": claim.samples, "state": claim.state}
    return cast(ClaimRecord, SimpleNamespace(owner=owner, issued=now, **fields))


def acceptance(shard: int, epoch: int, digest: str, author: str, tenure_until: float = 0.0, term: int = 0) -> AcceptanceRecord:
    fields = {"shard": shard, "epoch": epoch, "checkpoint": digest, "author": author, "tenure_until": tenure_until, "term": term}
    return cast(AcceptanceRecord, SimpleNamespace(**fields))


@dataclass
class Trainer:
    number: int
    shard: int
    at: int
    digest: str | None
    until: int
    waiting: bool = False


@dataclass
class Peer:
    """One machine and its hands."""

    swarm: PaperSwarm
    rules: Rules
    state: State = field(default_factory=State)
    trainer: Trainer | None = None
    alive: bool = True
    online: bool = True
    speed: float = 1.0
    log: list[str] = field(default_factory=list)
    wake: int = 0

    @property
    def name(self) -> str:
        return self.rules.owner

    def feed(self, event: m.Event) -> None:
        if not self.alive:
            return
        self.state, actions = advance(self.rules, self.state, event)
        for action in actions:
            self.do(action)
        self.swarm.check(self)
        self.wake += 1
        due = next_wake(self.rules, self.state)
        if due is not None:
            mine = self.wake
            self.swarm.later(
                max(0.0, due - self.swarm.now), lambda: self.feed(m.Tick(self.swarm.now)) if self.wake == mine else None
            )

    def do(self, action: m.Action) -> None:
        swarm, now = self.swarm, self.swarm.now
        match action:
            case m.Report(text=text):
                self.log.append(f"{now:.1f} {text}")
            case m.Probe():
                fitness = dict.fromkeys(range(self.rules.shards), 1.0)
                swarm.later(0.1, lambda: self.feed(m.Probed(swarm.now, fitness)))
            case m.Look(shards=shards):
                if self.online:
                    views = tuple(swarm.view(shard) for shard in shards)
                    swarm.later(swarm.delay(), lambda: self.feed(m.SwarmSeen(swarm.now, views)))
            case m.PublishClaim(claim=claim) | m.RenewRecords(claim=claim) if claim is not None and self.online:
                expires = now + 3 * self.rules.heartbeat
                swarm.later(swarm.delay(), lambda: swarm.store(self, claim, expires))
            case m.Sync(shard=shard, epoch=epoch, checkpoint=digest):
                swarm.later(0.5, lambda: self.feed(m.SyncDone(swarm.now, shard, epoch, digest)))
            case m.StartTrainer(run=run, shard=shard, epoch=epoch, checkpoint=digest, until=until):
                assert self.trainer is None
                work = self.state.work
                assert work is not None
                newest = work.pending[-1] if work.pending else None
                self.trainer = Trainer(run, shard, newest.epoch if newest else epoch, newest.digest if newest else digest, until)
                swarm.later(swarm.epoch_seconds / self.speed, lambda: self.trained(run))
            case m.AllowEpochs(until=until):
                assert self.trainer is not None
                self.trainer.until = until
                if self.trainer.waiting and self.trainer.at < until:
                    self.trainer.waiting = False
                    number = self.trainer.number
                    swarm.later(swarm.epoch_seconds / self.speed, lambda: self.trained(number))
            case m.StopTrainer():
                assert self.trainer is not None
                self.trainer = None
            case m.PublishCheckpoint(candidate=candidate):
                swarm.later(swarm.delay(), lambda: swarm.judge(self, candidate))
            case _:
                pass

    def trained(self, number: int) -> None:
        trainer, now = self.trainer, self.swarm.now
        if not self.alive or trainer is None or trainer.number != number or trainer.waiting:
            return
        candidate = m.Candidate(
            trainer.shard, trainer.at + 1, f"{trainer.digest}>{trainer.at + 1}:{self.name[:4]}", trainer.digest
        )
        trainer.at, trainer.digest = candidate.epoch, candidate.digest
        trainer.waiting = trainer.at >= trainer.until
        if not trainer.waiting:
            self.swarm.later(self.swarm.epoch_seconds / self.speed, lambda: self.trained(number))
        self.feed(m.TrainerProgress(now, number, trainer.at, trainer.at * 100, trainer.waiting))
        self.feed(m.CheckpointReady(now, number, candidate))

    def crash_trainer(self, reason: m.Exit = "crash") -> None:
        if self.trainer:
            number, self.trainer = self.trainer.number, None
            self.feed(m.TrainerExited(self.swarm.now, number, reason))


class PaperSwarm:
    """`check` asserts the invariants after every event."""

    def __init__(
        self, seed: int, peers: int, shards: int, epochs: int, *, heartbeat: float = 20.0, epoch_seconds: float = 60.0
    ) -> None:
        self.random = random.Random(seed)
        self.now = 1_800_000_000.0
        self.epoch_seconds = epoch_seconds
        self.epochs = epochs
        self.claims: list[dict[str, LiveClaim]] = [{} for _ in range(shards)]
        self.accepted: list[AcceptanceRecord | None] = [None] * shards
        self.lineage: list[list[str]] = [[] for _ in range(shards)]
        self.free_since: list[float | None] = [self.now] * shards
        self.judging = True
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        rules = [
            Rules(
                RUN,
                f"{self.random.getrandbits(256):064x}",
                shards,
                epochs,
                heartbeat,
                min(2.0, max(0.25, heartbeat / 20)),
            )
            for _ in range(peers)
        ]
        self.peers = [Peer(self, rule) for rule in rules]

    def delay(self) -> float:
        return self.random.uniform(0.01, 0.15)

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._count), call))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        calls = 0
        while self._queue and self._queue[0][0] <= end:
            before, (self.now, _, call) = self.now, heapq.heappop(self._queue)
            calls = calls + 1 if self.now - before < 1e-3 else 0
            assert calls < 50 * len(self.peers) + 1000, "a loop that time does not leave"
            call()
        self.now = end

    def join(self, peer: Peer) -> None:
        peer.feed(m.Joined(self.now))

    def store(self, peer: Peer, claim: m.Claim, expires: float) -> None:
        self.claims[claim.shard][peer.name] = LiveClaim(claim_record(peer.name, claim, self.now), expires)

    def view(self, shard: int) -> ShardView:
        return ShardView(shard, tuple(self.claims[shard].values()), self.accepted[shard])

    def judge(self, peer: Peer, candidate: m.Candidate) -> None:
        """Accepts exactly epoch + 1 on the accepted parent (invariant I1)."""
        verdict: m.Verdict = "unreachable"
        if self.judging and peer.online and peer.alive:
            now = self.accepted[candidate.shard]
            head = (now.epoch, now.checkpoint) if now else (0, None)
            if candidate.digest in self.lineage[candidate.shard]:
                verdict = "accepted"
            elif (candidate.epoch - 1, candidate.parent) == head:
                verdict = "accepted"
                self.lineage[candidate.shard].append(candidate.digest)
                self.accepted[candidate.shard] = acceptance(
                    candidate.shard, candidate.epoch, candidate.digest, peer.name, self.now + 600
                )
            else:
                verdict = "superseded"
        self.later(self.delay(), lambda: peer.feed(m.OfferAnswered(self.now, candidate.digest, verdict)))

    def check(self, peer: Peer) -> None:
        state = peer.state
        work = state.work
        assert (work is not None and work.trainer == "on") == (peer.trainer is not None), peer.log[-5:]
        if state.phase in ("paused", "idle", "left", "joining", "probing"):
            assert peer.trainer is None
            assert work is None or not work.owned
        if work:
            assert [c.epoch for c in work.pending] == list(range(work.epoch + 1, work.newest + 1))
            parents = [work.checkpoint, *(c.digest for c in work.pending)]
            assert [c.parent for c in work.pending] == parents[:-1]
        due = next_wake(peer.rules, state)
        assert due is None or due > self.now or state.phase == "joining" or not peer.alive, (state.phase, due, self.now)

    @property
    def done(self) -> bool:
        return all(record is not None and record.epoch == self.epochs for record in self.accepted)

    def owners(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for peer in self.peers:
            if peer.alive and peer.state.work and peer.state.work.owned:
                found.setdefault(peer.state.work.shard, []).append(peer.name)
        return found
