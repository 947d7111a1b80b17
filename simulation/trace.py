"""What each peer did and why: recorded to explain a violation, and reduced to what led to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lutetia.coordinator.acceptance import messages as j
from lutetia.node.machine import messages as m
from lutetia.simulation.event_queue import START, EventQueue
from lutetia.simulation.interfaces import Coordinator, Node

if TYPE_CHECKING:
    from lutetia.simulation.faults.step import Step
    from lutetia.simulation.network.dht import SimulatedRecord

_ROUTINE = (m.RenewRecords, m.LookAtShards, m.LogSentence)
_SEARCHED = 3000


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """`causes`: numbers of earlier entries. `dull`: it caused nothing but the routine of a heartbeat."""

    time: float
    subject: str
    text: str
    causes: tuple[int, ...]
    dull: bool


class Trace:
    """Attach it to a world's event queue before the run."""

    def __init__(self) -> None:
        self.entries: list[TraceEntry] = []
        self.queue: EventQueue | None = None

    def _note(self, subject: str, text: str, causes: Sequence[int] = (), *, dull: bool = False) -> None:
        assert self.queue
        known = tuple(cause for cause in (self.queue.cause, *causes) if cause >= 0)
        self.queue.cause = len(self.entries)
        self.entries.append(TraceEntry(self.queue.now - START, subject, text, known, dull))

    def step(self, step: Step) -> None:
        self._note("fault" if step.action != "join" else "plan", step.sentence)

    def machine(self, peer: Node, event: m.Event, before: str, actions: Sequence[m.Action]) -> None:
        done = [_action(action) for action in actions if not isinstance(action, m.LogSentence)]
        moved = f" [{before} → {peer.state.phase}]" if before != peer.state.phase else ""
        dull = not moved and all(isinstance(action, _ROUTINE) for action in actions)
        why = f": {peer.state.why}" if moved else ""
        self._note(str(peer), f"{_event(event)}{moved}{why}{' ⇒ ' if done else ''}{', '.join(done)}", dull=dull)

    def read(self, peer: Node, shards: Sequence[int]) -> None:
        writers = [cause for shard in shards for cause in peer.world.dht.writers(peer, shard)]
        self._note(str(peer), f"reads the records of shards {', '.join(map(str, shards))}", writers, dull=True)

    def judged(self, coordinator: Coordinator, stimulus: j.Stimulus, actions: Sequence[j.Action]) -> None:
        done = [_decision(action) for action in actions]
        dull = isinstance(stimulus, j.JudgeTick | j.LimitsKnown) or not any(
            isinstance(action, j.Write | j.Publish) for action in actions
        )
        self._note(str(coordinator), f"{_stimulus(stimulus)}{' ⇒ ' if done else ''}{', '.join(done)}", dull=dull)

    def record_read(self, coordinator: Coordinator, stored: SimulatedRecord) -> None:
        """The next entry follows from a record that a peer wrote."""
        self._note(
            str(coordinator), f"reads a {stored.record.kind} record of {stored.record.owner[:6]}", [stored.cause], dull=True
        )

    def explain(self, causes: Sequence[int] = (), most: int = 24) -> list[str]:
        """What led to the last entry and to `causes`, oldest first: the nearest `most` that were more than routine.

        The plan's last steps are added, because a death or a partition causes no entry by itself.
        """
        if not self.entries:
            return []
        assert self.queue
        last = self.queue.cause if self.queue.cause >= 0 else len(self.entries) - 1
        begin = sorted({last, *(cause for cause in causes if cause >= 0)})
        seen, queue, relevant = set(begin), begin, []
        while queue and len(seen) < _SEARCHED:
            queue.sort()
            number = queue.pop()
            if not self.entries[number].dull or number == last:
                relevant.append(number)
            for cause in self.entries[number].causes:
                if cause not in seen:
                    seen.add(cause)
                    queue.append(cause)
        steps = [number for number, entry in enumerate(self.entries) if entry.subject in ("fault", "plan")]
        shown = sorted({*relevant[:most], *steps[-most // 2 :]})
        return [f"{h.time:9.2f} s  {h.subject:<16} {h.text}" for h in (self.entries[number] for number in shown)]


def _event(event: m.Event) -> str:
    match event:
        case m.SwarmSeen(views=views):
            return "sees " + "; ".join(_view(view) for view in views[:3]) + (" …" if len(views) > 3 else "")
        case m.CheckpointReady(candidate=whole):
            return f"checkpoint {whole.digest[:8]} of epoch {whole.epoch} is complete"
        case m.OfferAnswered(digest=digest, verdict=verdict, text=text):
            return f"gets the verdict on {digest[:8]}: {verdict}" + (f" ({text})" if text else "")
        case m.UserVerb(verb=verb):
            return f"gets the command to {verb}"
        case m.TrainerExited(reason=reason):
            return f"loses its trainer ({reason})"
        case m.SyncFailed(reason=reason):
            return f"cannot sync: {reason}"
        case _:
            return type(event).__name__


def _view(view: Any) -> str:
    claims = ", ".join(f"{claim.record.owner[:6]} {claim.record.state}" for claim in view.claims) or "no claim"
    return f"shard {view.shard} at epoch {view.epoch} ({claims})"


def _action(action: m.Action) -> str:
    match action:
        case m.PublishClaim(claim=claim):
            return f"claim shard {claim.shard} ({claim.state})"
        case m.RenewRecords(claim=claim):
            return "renew" + (f" the claim on shard {claim.shard} ({claim.state})" if claim else " the node record")
        case m.LookAtShards(shards=shards):
            return f"look at {', '.join(map(str, shards[:6]))}{' …' if len(shards) > 6 else ''}"
        case m.StartTrainer(shard=shard, epoch=epoch):
            return f"train shard {shard} on epoch {epoch}"
        case m.PublishCheckpoint(candidate=whole):
            return f"offer {whole.digest[:8]} as epoch {whole.epoch}"
        case _:
            return type(action).__name__


def _stimulus(stimulus: j.Stimulus) -> str:
    match stimulus:
        case j.Offered(record=record, via=via):
            kind = "is offered" if via == "offer" else "finds"
            return f"{kind} {record.digest[:8]} of {record.owner[:6]} as epoch {record.epoch} of shard {record.shard}"
        case j.CheckDone(record=record, verdict=verdict):
            return f"has checked {record.digest[:8]}: {verdict.outcome} {verdict.text}".rstrip()
        case _:
            return type(stimulus).__name__


def _decision(action: j.Action) -> str:
    match action:
        case j.Write(event=event):
            return f"write {event.kind}"
        case j.Publish(acceptance=given):
            return f"accept {given.checkpoint[:8]} as epoch {given.epoch} of shard {given.shard}"
        case j.Answer(reply=reply):
            return f"answer {reply.verdict}"
        case _:
            return type(action).__name__
