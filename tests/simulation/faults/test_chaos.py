"""Anything may happen to six peers, in any order: every promise holds after every event, and the run comes to its end."""

from __future__ import annotations

from typing import cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from lutetia.node.machine import messages as m
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.event_queue import START
from lutetia.simulation.faults.plan import carry_out
from lutetia.simulation.faults.step import Step
from lutetia.simulation.world import SimulatedWorld

BOX = st.integers(0, 4)  # the last box is left alone, so that somebody can end the run
PAIRS = (("stop", "continue"), ("disk full", "disk free"), ("device lost", "device back"), ("kill", "join"))


class Chaos(RuleBasedStateMachine):
    """`SimulatedWorld.invariants` raises after the event that breaks a promise."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.world = SimulatedWorld(SimulationConfig(shards=3, epochs=6), 6, seed, strict=False)
        for index in range(6):
            self.befall("join", index)
        self.passes(20)

    def passes(self, seconds: float) -> None:
        self.world.queue.run(START + self.world.now + seconds)

    def befall(self, what: str, *who: int, after: float = 0.0, value: float = 0.0, word: str = "") -> None:
        self.world.queue.after(after, carry_out, self.world, Step(0.0, what, who, value, word))
        self.passes(0.0)

    @rule(seconds=st.sampled_from([0.3, 5, 21, 61, 100]))
    def time_passes(self, seconds: float) -> None:
        self.passes(seconds)

    @rule(index=BOX, reason=st.sampled_from(["crash", "out-of-memory", "bad-state", "disk-full", "hardware"]))
    def trainer_ends(self, index: int, reason: str) -> None:
        self.befall("trainer fails", index, word=reason)
        if reason == "disk-full":
            self.befall("disk free", index, after=30)

    @rule(index=BOX, pair=st.sampled_from(PAIRS), seconds=st.sampled_from([3.0, 50.0, 200.0]))
    def goes_and_comes(self, index: int, pair: tuple[str, str], seconds: float) -> None:
        self.befall(pair[0], index)
        self.befall(pair[1], index, after=seconds)

    @rule(index=BOX, seconds=st.sampled_from([3.0, 50.0]))
    def pause(self, index: int, seconds: float) -> None:
        self.befall("pause", index, value=seconds)

    @rule(index=BOX)
    def network_process_dies(self, index: int) -> None:
        self.befall("network process dies", index)

    @rule(seconds=st.sampled_from([5.0, 40.0]))
    def coordinator_is_away(self, seconds: float) -> None:
        self.befall("coordinator crashes")
        self.befall("coordinator starts", after=seconds)

    @rule(half=st.sets(st.integers(0, 5), min_size=1, max_size=5), word=st.sampled_from(["", "with"]))
    def cut(self, half: set[int], word: str) -> None:
        self.befall("partition", *half, word=word)
        self.befall("heal", after=90)

    @rule(index=st.integers(0, 2), verb=st.sampled_from(["finish", "leave", "resume"]))
    def verb(self, index: int, verb: str) -> None:
        self.befall(cast(m.Verb, verb), index)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.befall("heal")
            self.befall("coordinator starts")
            self.befall("join", 5)
            self.passes(4800)
            assert self.world.done, [(peer, peer.state.phase, peer.state.why) for peer in self.world.nodes]


TestChaos = Chaos.TestCase
TestChaos.settings = settings(
    max_examples=8, stateful_step_count=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
