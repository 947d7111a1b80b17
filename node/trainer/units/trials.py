"""Trials on random clips: how fast a trainer is, and whether a plan fits a unit of cards.

Of a unit all ranks take steps together, in processes that may run out of memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lutetia.models.data.shards import ShardData
from lutetia.models.experts.pictures import empty_pictures
from lutetia.models.training.memory.plan import MemoryPlan
from lutetia.models.training.units.split import Split
from lutetia.models.training.units.split_trainer import SplitTrainer
from lutetia.node.device_settings import torch_cards
from lutetia.node.trainer.assignment import EXIT_CODES
from lutetia.node.trainer.units.ranks import UnitTrial, run_trial
from lutetia.protocol.schema.manifest import Manifest, SignedManifest

MOST_STEPS = 8
ENOUGH_SECONDS = 2.0


def fastest_rate(step: Callable[[], object], samples: int, clock: Callable[[], float] = time.monotonic) -> float:
    """Samples per second of the fastest of up to MOST_STEPS steps, begun within ENOUGH_SECONDS.

    The fastest, because whatever else the machine does for a moment makes steps slower and none faster: by one step alone, eight
    nodes that start together on two cores each look several times as slow as they are.

    Args:
        step: takes one step; one that was taken before has allocated memory and compiled kernels.
        samples: of a step.
        clock: seconds.
    """
    begin = now = clock()
    times = list[float]()
    while not times or (len(times) < MOST_STEPS and now - begin < ENOUGH_SECONDS):
        started = now
        step()
        now = clock()
        times.append(now - started)
    return samples / min(times)


def probe_data(manifest: Manifest) -> ShardData:
    """A batch of random clips of the shape that takes the most memory.

    Their null condition is random, too: an expert that is told its padding takes one of zeros for padding alone, and diverges.
    """
    batch, latent = manifest.optimisation.batch, max(manifest.latent.of_buckets, key=lambda each: math.prod(each.shape))
    pictures = empty_pictures(latent, batch)
    return ShardData(
        torch.randn(batch, *latent.shape), torch.randn(batch, latent.text_tokens, latent.text_width),
        torch.randn(batch, latent.pooled_width), [""] * batch, [""] * batch,
        null=(torch.randn(latent.text_tokens, latent.text_width), torch.randn(latent.pooled_width)),
        pictures=pictures.each(torch.zeros_like) if pictures else None,
    )  # fmt: skip


@dataclass
class UnitTrialRunner:
    """Tries plans on the cards of a unit, in processes of their own. `rate`: samples per second of the last one that worked."""

    manifest: Path
    shard: int
    device: str
    threads: int | None = None
    limit: int | None = None
    """Bytes that each rank may take of its card."""
    problem: str = ""
    out_of_memory: bool = False
    rate: float = 0.0

    def works(self, plan: MemoryPlan, rows: int) -> bool:
        trial = UnitTrial(
            manifest=self.manifest, shard=self.shard, device=self.device, precision=plan.precision, micro_batch=rows,
            memory=plan.options, threads=self.threads,
        )  # fmt: skip
        rate, code = run_trial(trial, self.limit)
        if rate is None:
            self.out_of_memory = code == EXIT_CODES["out-of-memory"]
            self.problem = f"a rank of {self.device} ended with exit code {code}; its error is in the log"
            return False
        self.rate = rate
        return True


def try_unit(trial: UnitTrial, split: Split) -> float:
    """A few steps of a trial, on one rank of it; returns samples per second."""
    manifest = SignedManifest.model_validate_json(trial.manifest.read_bytes()).manifest
    trainer = SplitTrainer(
        split, manifest, trial.shard, probe_data(manifest), base="random", device=torch_cards(trial.device)[split.rank],
        micro_batch=trial.micro_batch, precision=trial.precision, memory=trial.memory,
    )  # fmt: skip
    if split.rank:
        trainer.follow()
        return 0.0
    trainer.step()
    rate = fastest_rate(trainer.step, manifest.optimisation.batch)
    trainer.end()
    return rate
