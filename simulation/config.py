"""Settings of a simulated run; its manifest and its machines, drawn from one seed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from lutetia.coordinator.settings import ServeSettings
from lutetia.protocol.claims import slots_of
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.identity import Identity, peer_id_of
from lutetia.protocol.schema.manifest import Manifest, ShardSpec, Timing, lease_seconds
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import MOST_DEVICES
from lutetia.simulation.event_queue import START

MIB = 1 << 20
OWNER = Identity.derived("simulated owner")
COORDINATOR = Identity.derived("simulated coordinator")
DEVICES = ("cpu", "cuda A", "cuda B")
_STEPS = 50
_SERVE = ServeSettings.model_construct()
"""The defaults of a served run."""


@dataclass(frozen=True)
class SimulationConfig:
    """What a scenario may set. Times in seconds, sizes in bytes, rates in bytes per second.

    Args:
        epoch_seconds: time of a node of speed 1 for one checkpoint; speeds are log-normal with `speed_sigma`.
        latency: median of a packet, one way, with log-normal spread `latency_sigma`, plus `jitter` (uniform) and the access
            latency of both machines (exponential, mean `access`).
        unfit: share of machines that cannot train any shard.
        save_every: pause between saves of the training state, a volunteer's setting.
        operators: number of people who run the nodes, in turn, and declare it; 0: one each.
        held_out_clips: fewest and most held-out clips of a shard, whose noise then decides over results (`network.held_out`);
            None: so many that it does not matter.
        team: lanes of every shard; None: one node trains an epoch.
        lent: the coordinator lends its checks to nodes.
        devices: how many devices the nodes have, in turn.
        signed: records are the real sealed bytes, and every replica and reader verifies them.
    """

    shards: int = 4
    epochs: int = 8
    heartbeat: float = 20.0
    tenure: float = 600.0
    epoch_seconds: float = 60.0
    speed_sigma: float = 0.35
    latency: float = 0.04
    latency_sigma: float = 0.5
    jitter: float = 0.0
    access: float = 0.02
    loss: float = 0.0
    replicas: int = 5
    skew: float = 0.0
    one_device: bool = False
    unfit: float = 0.0
    weights_bytes: int = 6 * MIB
    state_bytes: int = 18 * MIB
    shard_bytes: int = 40 * MIB
    up: float = 4.0 * MIB
    origin_up: float = 60.0 * MIB
    origin_slots: int = 64
    check_seconds: float = 1.5
    checks_at_once: int = _SERVE.checks_at_once
    slowest_bytes_per_second: float = _SERVE.slowest_bytes_per_second
    write_seconds: float = 0.3
    save_every: float = 10.0
    join_within: float = 10.0
    status_every: float = 10.0
    poll_every: float | None = None
    signed: bool = False
    operators: int = 0
    held_out_clips: tuple[int, int] | None = None
    team: TeamSpec | None = None
    lent: bool = False
    devices: tuple[int, ...] = (1,)

    @property
    def lease(self) -> float:
        return lease_seconds(self.heartbeat)

    @property
    def slots(self) -> tuple[int, ...]:
        """The lanes of all shards; without a team the shards."""
        return slots_of(self.shards, self.team.lanes if self.team else 1)


def with_lanes(config: SimulationConfig, lanes: int) -> SimulationConfig:
    """The same settings with so many lanes of each shard, as an owner of so many would set them; 1: without a team.

    The shares fit the speeds of the machines: each lane takes a machine of its part of the distribution the time that an epoch
    takes one of speed 1 without lanes, and the deadline is a tenth more. The coordinator checks as many results at once as it
    needs to check one of every lane in a third of that time (benchmarks/simulation/lanes.py shows what happens else).
    """
    if lanes == 1:
        return replace(config, team=None)
    fastest, *others = (_speed_of(config, (lanes - lane - 0.5) / lanes) for lane in range(lanes))
    shares = (1.0, *(round(speed / fastest, 3) for speed in others))
    checks = math.ceil(3 * config.check_seconds * config.shards * lanes / config.epoch_seconds)
    return replace(
        config, team=TeamSpec(lanes=lanes, shares=shares, deadline=1.1 * config.epoch_seconds),
        epoch_seconds=config.epoch_seconds * fastest, checks_at_once=max(config.checks_at_once, checks),
    )  # fmt: skip


def _speed_of(config: SimulationConfig, quantile: float) -> float:
    """The speed that this share of the machines falls short of."""
    return math.exp(config.speed_sigma * NormalDist().inv_cdf(quantile))


@dataclass(frozen=True)
class SimulatedMachine:
    """One volunteer's machine. `speed`: 1 is that of the setting. `access_latency`: seconds that it adds to every packet."""

    owner: str
    identity: Identity | None
    speed: float
    device: str
    access_latency: float
    up: float
    fitness: Mapping[int, float]
    skew: float = 0.0
    operator: str | None = None
    peer_id: str = field(default="", compare=False)


def draw_machine(config: SimulationConfig, seed: int, index: int) -> SimulatedMachine:
    """Machine number `index`. It depends only on seed and number, so that leaving out other machines does not change it."""
    rng = random.Random(f"{seed}|box|{index}")
    identity = Identity.derived(f"{seed}|{index}") if config.signed else None
    owner = identity.public_key if identity else hashlib.sha256(f"{seed}|{index}".encode()).hexdigest()
    fits = rng.random() >= config.unfit
    strength = round(rng.uniform(0.4, 1.0), 2)
    operator = hashlib.sha256(f"operator {index % config.operators}".encode()).hexdigest() if config.operators else None
    return SimulatedMachine(
        owner=owner, identity=identity, speed=rng.lognormvariate(0.0, config.speed_sigma),
        device=DEVICES[0] if config.one_device else rng.choice(DEVICES), access_latency=rng.expovariate(1 / config.access),
        up=config.up * rng.lognormvariate(0.0, 0.5), fitness=dict.fromkeys(range(config.shards), strength if fits else 0.0),
        skew=rng.uniform(-config.skew, config.skew),
        operator=operator, peer_id=peer_id_of(owner),
    )  # fmt: skip


def draw_device(config: SimulationConfig, seed: int, host: int, number: int, machine: SimulatedMachine) -> SimulatedMachine:
    """Device `number` (the first is 0) of node `host`: speed and kind are its own, all else is that of the node's `machine`."""
    own = draw_machine(config, seed, -(host * MOST_DEVICES + number))
    return replace(machine, speed=own.speed, device=own.device)


def make_manifest(config: SimulationConfig) -> Manifest:
    """A real manifest with invented blobs. Version 2 holds the run id, which need not be computed for every use then."""
    latent = LatentSpec(
        channels=4, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8,
        text_encoder="builtin:words", text_tokens=4, text_width=8, pooled_width=8,
    )  # fmt: skip
    batch = 16
    return Manifest(
        name="simulated", run=hashlib.sha256(b"simulated run").hexdigest(), version=2, owner=OWNER.public_key,
        coordinators=(COORDINATOR.public_key,), created=START - 60, expires=START + 30 * 86400, latent=latent,
        expert=ExpertSpec(config={}), optimisation=Optimisation(batch=batch), checkpoint_samples=batch * _STEPS,
        samples_per_shard=batch * _STEPS * config.epochs,
        timing=Timing(heartbeat=config.heartbeat, tenure=config.tenure),
        shards=tuple(_shard(config, index) for index in range(config.shards)),
        team=config.team, needs=(LANES,) if config.team else (),
    )  # fmt: skip


def _shard(config: SimulationConfig, index: int) -> ShardSpec:
    return ShardSpec(
        index=index, name=f"shard {index}", train=blob(f"train {index}", config.shard_bytes),
        holdout=blob(f"holdout {index}", MIB), clips=1000, holdout_clips=16, prior=1 / config.shards,
    )  # fmt: skip


def blob(text: str, size: int) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(text.encode()).hexdigest(), size=size)
