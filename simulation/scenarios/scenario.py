"""A scenario: settings, a plan drawn from the seed, and conditions that must hold at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from lutetia.coordinator.ledger.events import AuditDone, AuditReported
from lutetia.protocol.claims import shard_and_lane, slot_name
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.world import SimulatedWorld

PlanOf = Callable[[SimulationConfig, int, Random], list[Step]]
End = Callable[[SimulatedWorld], str | None]
"""None, or a sentence that says what is wrong at the end."""


@dataclass(frozen=True)
class Scenario:
    """`fault`: its number in docs/explanation/faults.md (0: none). `strict`: every replica and reader checks records by its
    own clock.
    """

    name: str
    summary: str
    fault: int
    plan: PlanOf
    seconds: float = 1200.0
    peers: int = 8
    config: SimulationConfig = field(default_factory=SimulationConfig)
    strict: bool = False
    ends: tuple[End, ...] = ()
    min_peers: int = 1
    """Fewest nodes with which the scenario makes sense."""


def joins(config: SimulationConfig, peers: int, rng: Random, within: float | None = None) -> list[Step]:
    """Every node joins within the first seconds, one step each."""
    span = config.join_within if within is None else within
    return [Step(rng.uniform(0, span), "join", (index,)) for index in range(peers)]


# --- ends -----------------------------------------------------------------------------------------------------------------


def all_held(world: SimulatedWorld) -> str | None:
    """No slot with work left has two holders, and none is free while a node that it fits has no work."""
    holders, quarantined = world.holders(), world.coordinators[0].state.run.quarantined
    idle = [
        peer for peer in world.nodes
        if peer.answering and peer.machine.owner not in quarantined and not (peer.state.work and peer.state.work.owned)
    ]  # fmt: skip
    for slot in world.config.slots:
        if world.invariants.heads[shard_and_lane(slot)[0]] >= world.manifest.epochs:
            continue
        held = holders.get(slot, [])
        if len(held) > 1:
            return f"{slot_name(slot)} has {len(held)} holders: {held}"
        if not held and any(peer.state.fitness.get(slot, 0) > 0 for peer in idle):
            return f"{slot_name(slot)} has no holder"
    return None


def advanced(share: float) -> End:
    """At least `share` of the possible work was accepted: that of one node of speed 1 for every shard, if there are as many."""

    def end(world: SimulatedWorld) -> str | None:
        working = min(world.config.shards, len(world.nodes))
        possible = min(working * world.now / world.config.epoch_seconds, world.config.shards * world.manifest.epochs)
        if world.accepted < share * possible:
            return f"{world.accepted} epochs were accepted, fewer than {share:.0%} of the {possible:.0f} that were possible"
        return None

    return end


def completed(world: SimulatedWorld) -> str | None:
    return None if world.done else f"the run is not complete: epochs {world.invariants.heads} of {world.manifest.epochs}"


def refused_all(kinds: int) -> End:
    """At least so many different kinds of forged records were refused."""

    def end(world: SimulatedWorld) -> str | None:
        reasons = {reason.split(":")[0].split(" of ")[0] for reason in world.dht.refused}
        return None if len(reasons) >= kinds else f"only {len(reasons)} kinds of refusals: {sorted(reasons)}"

    return end


def caught(world: SimulatedWorld) -> str | None:
    """No epoch that was never trained stays accepted and unnoticed for longer than five epochs take."""
    for shard in world.coordinators[0].state.run.shards.values():
        for link in shard.trained:
            faked = world.blobs.contents[link.acceptance.checkpoint].faked
            overdue = world.queue.now - link.at > 5 * world.config.epoch_seconds
            found = link.audit == "invalid"  # the epochs after it are kept, or are replayed to decide that
            if faked == "all" and overdue and not found:
                return f"epoch {link.acceptance.epoch} of shard {link.acceptance.shard} was never trained, and is still accepted"
    return None


def up_to_date(world: SimulatedWorld) -> str | None:
    """All nodes that are online use the newest manifest."""
    late = [peer for peer in world.nodes if peer.answering and peer.manifest_updates.live.version < world.manifest.version]
    return f"{late} know no newer manifest than version {late[0].manifest_updates.live.version}" if late else None


def audited_by_peers(least: int) -> End:
    """At least so many audits were carried out by peers."""

    def end(world: SimulatedWorld) -> str | None:
        audits = [event for event in world.coordinators[0].ledger if isinstance(event, AuditReported | AuditDone) and event.by]
        return None if len(audits) >= least else f"peers carried out {len(audits)} audits, fewer than {least}"

    return end


def stopped_itself(world: SimulatedWorld) -> str | None:
    """A coordinator whose ledger lacked one of its own records stopped itself, and exactly one serves at the end."""
    serving = sum(coordinator.serving for coordinator in world.coordinators)
    if not any(coordinator.stopped_itself for coordinator in world.coordinators):
        return "no coordinator noticed that its ledger is not the newest"
    return None if serving == 1 else f"{serving} coordinators serve"


def no_double_work(world: SimulatedWorld) -> str | None:
    """At most a tenth of all steps were wasted on work that another node did, too."""
    steps = world.manifest.steps_per_epoch
    taken = sum(peer.trainer.taken for peer in world.nodes)
    useful = world.accepted * steps + len(world.holders()) * 4 * steps
    return None if taken <= 1.1 * useful else f"{taken} steps were taken for {world.accepted} accepted epochs of {steps}"
