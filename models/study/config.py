"""What a study is: clips, how they become shards, one recipe, a budget, controls, and how all of it is judged. Strict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lutetia.models.data.build import BuildSettings
from lutetia.models.device import Device
from lutetia.models.metrics.evaluator import EvaluatorSettings
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Count, ExpertSpec, Name, Optimisation, Positive, RouterSpec, SamplingSpec

Arm = Literal["small-batch", "balanced", "random", "kinds", "warm-start", "wide", "narrow"]
Control = Arm | Literal["text-blind", "oracle", "modes", "experts"]
Prompts = Literal["natural", "stratified"]


class FolderClips(Frozen):
    """The user's own folder of captioned clips with a split test, such as a public data set that was downloaded."""

    kind: Literal["folder"]
    folder: Path


class MadeClips(Frozen):
    """Sets by `make_clips.py` of the assets, each a natural kind, and their union. `sets`: how many clips of each."""

    kind: Literal["made"]
    sets: dict[Literal["lpc", "emoji", "digits"], Count] = Field(min_length=1)
    size: Literal[32, 64] = 64
    frames: Count = 16
    seed: int = 0
    maker: Path | None = None


class DrawnClips(Frozen):
    """Rule-made clips that need no files, as in the demo; one in `test_every` is held out. For trying a study out."""

    kind: Literal["drawn"]
    clips: Count
    size: Count = 32
    frames: Count = 8
    seed: int = 0
    test_every: int = Field(default=4, ge=2)


class Autoencoder(Frozen):
    """A small autoencoder, learnt from single frames of the clips in train and shared by all arms.

    `scale`: pixels of a side of one latent. `channels`: of a latent.
    """

    steps: Count = 3000
    channels: Count = 8
    scale: Literal[4, 8] = 8
    seed: int = 0
    bfloat16: bool = Field(default=False, description="quicker where the processor multiplies bfloat16 (AMX)")


class Controls(Frozen):
    """What could explain a gain, at `share` of the headline's budget, against a monolith and a mixture of that budget too.
    Those named by `full` are carried out at the whole budget and for all seeds of the headline, too.

    small-batch: a monolith at batch B/K for K times the steps. balanced: a monolith that meets every cluster equally often,
    as the mixture does, because the clips of small clusters are repeated. random: clusters that mean nothing. kinds: clusters
    by the clips' own kinds. warm-start: experts that go on from the monolith's first checkpoint, whose FLOPs count as theirs.
    text-blind: the router does not see the prompt. oracle: each prompt goes to its cluster's expert. modes: top1, top2, full,
    sticky. experts: each expert alone, on its own and on others' prompts. wide: a monolith of K times the parameters. narrow:
    experts of 1/K of the parameters each, so that all together have as many as the monolith. `learning_rates`: both sides at
    each of these too, since one rate for a large batch and a small one need not be the best of either.
    """

    share: float = Field(default=0.25, gt=0, le=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    arms: tuple[Control, ...] = ()
    full: tuple[Arm, ...] = ()
    expert_counts: tuple[int, ...] = ()
    learning_rates: tuple[Positive, ...] = ()
    clips: int = Field(default=128, ge=20)


class EvaluationPlan(Frozen):
    """How sides are judged: `clips` prompts and real clips at the end, `curve_clips` of them along the way. `on`: never judge
    a recipe on `test` before it is fixed; `tune` are clips carved out of train for that. `spare` real clips make the floors.
    """

    on: Literal["test", "tune"] = "test"
    clips: int = Field(default=256, ge=20)
    spare: int = Field(default=256, ge=0)
    fit_clips: int = Field(default=1000, ge=20)
    curve_clips: int = Field(default=128, ge=20)
    loss_clips: int = Field(default=256, ge=1)
    prompts: tuple[Prompts, ...] = Field(default=("natural", "stratified"), min_length=1)
    batch: Count = 16
    resamples: int = Field(default=100, ge=12)
    judges: EvaluatorSettings = EvaluatorSettings()


class Machines(Frozen):
    """The swarm that trains: `workers` processes (None: as many as the shards keep busy, at most one per core), each on `device`.

    `threads` per worker (None: the cores shared out). Heartbeat in seconds; a lost worker's shard is free after three.
    """

    workers: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    device: Device = "cpu"
    heartbeat: Positive = 2.0
    audits: bool = Field(default=False, description="replay work as among strangers; all processes here are our own")
    patience: Positive = Field(default=180.0, description="seconds without a checkpoint or a shard in training before giving up")


class StudyConfig(Frozen):
    """A whole study. `data.experts` is K of the mixture, `optimisation.batch` the monolith's batch, of which each expert has 1/K.

    With `autoencoder`, one is trained first and takes the place of `data.latents`.
    `samples`: what the monolith sees; every other arm gets the same FLOPs, the router's included. `checkpoints`: of a curve.
    """

    name: Name
    clips: Annotated[FolderClips | MadeClips | DrawnClips, Field(discriminator="kind")]
    tune_share: float = Field(default=0.06, gt=0, lt=0.5)
    autoencoder: Autoencoder | None = None
    data: BuildSettings
    expert: ExpertSpec
    wide: ExpertSpec | None = None
    narrow: ExpertSpec | None = None
    optimisation: Optimisation
    samples: Count
    checkpoints: Count = 4
    holdout_tolerance: float = Field(default=0.1, ge=0)
    router: RouterSpec = RouterSpec()
    sampling: SamplingSpec = SamplingSpec()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    controls: Controls = Controls()
    judging: EvaluationPlan = EvaluationPlan()
    machines: Machines = Machines()

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.data.text_tokens is None:
            raise ValueError("data.text_tokens must be set, so that the FLOPs are known beforehand")
        for experts in (self.data.experts, *self.controls.expert_counts):
            if experts < 2:
                raise ValueError("a mixture needs 2 or more experts")
            if self.optimisation.batch % experts:
                raise ValueError(f"the batch {self.optimisation.batch} must be divisible by the number of experts {experts}")
        for arm, spec in (("wide", self.wide), ("narrow", self.narrow)):
            if arm in (*self.controls.arms, *self.controls.full) and spec is None:
                raise ValueError(f"the control {arm} needs an expert of its own: set {arm}")
        controls = self.controls
        for name, values in (
            ("seeds", self.seeds),
            ("controls.seeds", controls.seeds),
            ("controls.expert_counts", controls.expert_counts),
            ("controls.learning_rates", controls.learning_rates),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must differ from each other")
        return self
