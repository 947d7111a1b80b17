"""Random faults hit six nodes in any order: every invariant holds after every event, and the run completes."""

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

NODE = st.integers(0, 4)  # the last node has no fault, so that it can complete the run
PAIRS = (("stop", "continue"), ("disk full", "disk free"), ("device lost", "device back"), ("kill", "join"))


class Chaos(RuleBasedStateMachine):
    """`SimulatedWorld.invariants` raises after the event that violates an invariant."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.world = SimulatedWorld(SimulationConfig(shards=3, epochs=6), 6, seed, strict=False)
        for index in range(6):
            self.apply("join", index)
        self.passes(20)

    def passes(self, seconds: float) -> None:
        self.world.queue.run(START + self.world.now + seconds)

    def apply(self, action: str, *nodes: int, after: float = 0.0, value: float = 0.0, detail: str = "") -> None:
        self.world.queue.after(after, carry_out, self.world, Step(0.0, action, nodes, value, detail))
        self.passes(0.0)

    @rule(seconds=st.sampled_from([0.3, 5, 21, 61, 100]))
    def time_passes(self, seconds: float) -> None:
        self.passes(seconds)

    @rule(index=NODE, reason=st.sampled_from(["crash", "out-of-memory", "bad-state", "disk-full", "hardware"]))
    def trainer_ends(self, index: int, reason: str) -> None:
        self.apply("trainer fails", index, detail=reason)
        if reason == "disk-full":
            self.apply("disk free", index, after=30)

    @rule(index=NODE, pair=st.sampled_from(PAIRS), seconds=st.sampled_from([3.0, 50.0, 200.0]))
    def fault_and_recovery(self, index: int, pair: tuple[str, str], seconds: float) -> None:
        self.apply(pair[0], index)
        self.apply(pair[1], index, after=seconds)

    @rule(index=NODE, seconds=st.sampled_from([3.0, 50.0]))
    def pause(self, index: int, seconds: float) -> None:
        self.apply("pause", index, value=seconds)

    @rule(index=NODE)
    def network_process_dies(self, index: int) -> None:
        self.apply("network process dies", index)

    @rule(seconds=st.sampled_from([5.0, 40.0]))
    def coordinator_is_away(self, seconds: float) -> None:
        self.apply("coordinator crashes")
        self.apply("coordinator starts", after=seconds)

    @rule(half=st.sets(st.integers(0, 5), min_size=1, max_size=5), detail=st.sampled_from(["", "with"]))
    def cut(self, half: set[int], detail: str) -> None:
        self.apply("partition", *half, detail=detail)
        self.apply("heal", after=90)

    @rule(index=st.integers(0, 2), verb=st.sampled_from(["finish", "leave", "resume"]))
    def verb(self, index: int, verb: str) -> None:
        self.apply(cast(m.Verb, verb), index)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.apply("heal")
            self.apply("coordinator starts")
            self.apply("join", 5)
            self.passes(4800)
            assert self.world.done, [(peer, peer.state.phase, peer.state.why) for peer in self.world.nodes]


TestChaos = Chaos.TestCase
TestChaos.settings = settings(
    max_examples=8, stateful_step_count=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
