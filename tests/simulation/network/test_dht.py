"""Readers share what they read: at any time it is what the replicas would answer each of them now."""

from __future__ import annotations

from lutetia.simulation.event_queue import START
from lutetia.simulation.faults.plan import schedule
from lutetia.simulation.network.dht import SimulatedRecord
from lutetia.simulation.runner import steps_of
from lutetia.simulation.scenarios.catalogue import SCENARIOS
from lutetia.simulation.world import SimulatedWorld


def asked(world: SimulatedWorld, slot: int) -> list[tuple[str, float]]:
    """Owner and expiry of the live claims on a slot, newest of each owner, from the parts of all members that answer."""
    key, now, newest = world.dht.claim_keys[slot], world.queue.now, dict[str, SimulatedRecord]()
    for member in [*world.nodes, *world.coordinators]:
        for owner, stored in member.parts.get(key, {}).items() if member.answering else ():
            if stored.expires > now and (owner not in newest or stored.expires > newest[owner].expires):
                newest[owner] = stored
    return [(owner, newest[owner].expires) for owner in sorted(newest)]


def test_shared_views_show_what_the_replicas_hold() -> None:
    scenario = SCENARIOS["team"]
    world = SimulatedWorld(scenario.config, 4, 4, strict=False)  # with the coordinator as many members as replicas
    schedule(world, [step for step in steps_of(scenario, 4, 4) if step.action != "behaviour"])
    seen, changed = dict[int, object](), 0
    for tenth in range(1, 6000, 3):
        world.queue.run(START + tenth / 10)
        for slot in world.config.slots:
            view = world.dht.look(world.coordinators[0], (slot,))[0]
            assert [(claim.record.owner, claim.expires) for claim in view.claims] == asked(world, slot), f"{tenth / 10} s"
            changed += view is not seen.get(slot)
            seen[slot] = view
    assert 300 < changed < 4000, "views are made again when a claim is, and are shared in between"
