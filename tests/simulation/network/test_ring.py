"""The ring finds the members that answer, whatever came, went, stopped or was cut off since a key was last looked up."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.network.links import Links
from lutetia.simulation.network.ring import Ring

KEYS = [f"key {number}" for number in range(12)]


@dataclass(eq=False)
class Member:
    index: int
    answering: bool = True
    access_latency: float = 0.0
    up: float = 1.0


def nearest_afresh(links: Links, members: dict[int, Member], source: Member, key: str) -> list[Member]:
    ring: Ring[Member] = Ring(links, 3)
    for member in members.values():
        ring.add(member, f"member {member.index}")
    return ring.nearest(source, key)


def test_kept_walks_equal_new_ones_after_every_change() -> None:
    rng, links = random.Random(3), Links(SimulationConfig(), 3)
    ring, members, kept = Ring[Member](links, 3), dict[int, Member](), 0
    for step in range(300):
        action = rng.random()
        if action < 0.4 or len(members) < 6:
            member = members[step] = Member(step)
            ring.add(member, f"member {step}")
        elif action < 0.6:
            ring.remove(members.pop(rng.choice(list(members))))
        elif action < 0.9:
            member = rng.choice(list(members.values()))
            member.answering = not member.answering
            ring.changed(member)
        elif action < 0.95:
            links.partition([rng.sample(list(members), 2)])
        else:
            links.heal()
        for source in [member for member in members.values() if member.answering][:1]:
            for key in KEYS:
                before = ring.nearest(source, key)
                assert before == nearest_afresh(links, members, source, key), f"step {step}, {key}"
                kept += before is ring.nearest(source, key)
    assert kept > 1000
