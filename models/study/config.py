"""The configuration of a study: clips, data, one recipe, a budget, controls, and how everything is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.device import Device
from lutetia.models.metrics.settings import EvaluatorSettings
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Count, Name, Positive
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, RouterSpec, SamplingSpec

Arm = Literal["small-batch", "root-rate", "balanced", "random", "kinds", "warm-start", "wide", "narrow"]
Control = Arm | Literal["text-blind", "oracle", "modes", "experts"]
Prompts = Literal["natural", "stratified"]


class FolderClips(Frozen):
    """The user's own folder of captioned clips with a split `test`, for instance a public data set."""

    kind: Literal["folder"] = Field(description="source of the clips")
    folder: Path = Field(description="folder of clips with captions and splits")


class MadeClips(Frozen):
    """The union of sets that `make_clips.py` of the assets makes; each set is a natural kind."""

    kind: Literal["made"] = Field(description="source of the clips")
    sets: dict[Literal["lpc", "emoji", "digits"], Count] = Field(min_length=1, description="name of a set to its number of clips")
    size: Literal[32, 64] = Field(default=64, description="height and width of the clips, px")
    frames: Count = Field(default=16, description="frames of a clip")
    seed: int = Field(default=0, description="seed of the clips")
    maker: Path | None = Field(default=None, description="path of make_clips.py; none: the asset in LUTETIA_ASSETS")


class DrawnClips(Frozen):
    """Clips drawn by rules, as in the demo. They need no files; use them to try out a study."""

    kind: Literal["drawn"] = Field(description="source of the clips")
    clips: Count = Field(description="number of clips")
    size: Count = Field(default=32, description="height and width of the clips, px")
    frames: Count = Field(default=8, description="frames of a clip")
    seed: int = Field(default=0, description="seed of the clips")
    test_every: int = Field(default=4, ge=2, description="one in this many prompts is held out for the split test")


class Autoencoder(Frozen):
    """A small autoencoder, trained on single frames of the training clips and shared by all arms."""

    steps: Count = Field(default=3000, description="training steps")
    channels: Count = Field(default=8, description="channels of a latent")
    scale: Literal[4, 8] = Field(default=8, description="side of the square that one latent stands for, px")
    seed: int = Field(default=0, description="seed of weights and frames")
    bfloat16: bool = Field(default=False, description="train in bfloat16; faster on processors that multiply it (AMX)")


class WeightsBase(Frozen):
    """Weights that were trained elsewhere."""

    kind: Literal["weights"] = Field(description="source of the base")
    weights: str = Field(description="folder or hub id of a transformer, or of a pipeline or mixture of one expert that holds it")


class FramesBase(Frozen):
    """An image model: the expert's network, trained first on single frames of the training clips."""

    kind: Literal["frames"] = Field(description="source of the base")
    samples: Count = Field(description="frames it trains on, at the batch and learning rate of the monolith")
    seed: int = Field(default=0, description="training seed")


class Controls(Frozen):
    """Arms that could explain a gain of the mixture, at a share of the budget of the headline.

    They are compared with a monolith and a mixture of the same budget.

    - small-batch: a monolith at batch B/K for K times the steps.
    - root-rate: a monolith at the square root of K times the learning rate, as a batch K times an expert's may bear.
    - balanced: a monolith that sees every cluster equally often, as the mixture does: clips of small clusters are repeated.
    - random: clusters at random.
    - kinds: clusters by the kinds in the metadata.
    - warm-start: experts that start from the first checkpoint of the monolith; its FLOPs count as theirs.
    - wide: a monolith with K times the parameters.
    - narrow: experts with 1/K of the parameters each: together as many as the monolith.
    - text-blind: the router does not see the prompt.
    - oracle: each prompt goes to the expert of its cluster.
    - modes: the sampling modes top1, top2, full and sticky.
    - experts: each expert alone, on the prompts of its own cluster and on all others.
    """

    share: float = Field(default=0.25, gt=0, le=1, description="budget of the controls, as a share of that of the headline")
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="training seeds of the controls")
    arms: tuple[Control, ...] = Field(default=(), description="controls to carry out at `share` of the budget")
    full: tuple[Arm, ...] = Field(
        default=(), description="controls to carry out at the whole budget and for all seeds of the headline"
    )
    expert_counts: tuple[int, ...] = Field(default=(), description="other numbers of experts K to train mixtures with")
    learning_rates: tuple[Positive, ...] = Field(
        default=(),
        description="other learning rates to train both sides with: the best rate may differ between a large and a small batch",
    )
    clips: int = Field(default=128, ge=20, description="prompts that each control is evaluated on")


class EvaluationPlan(Frozen):
    """How the sides are evaluated."""

    on: Literal["test", "tune"] = Field(
        default="test", description="clips to evaluate on: tune (taken out of train) to choose a recipe, test once it is fixed"
    )
    clips: int = Field(default=256, ge=20, description="prompts, and as many real clips, at the end of a training")
    spare: int = Field(default=256, ge=0, description="more real held-out clips, for the floors")
    fit_clips: int = Field(default=1000, ge=20, description="real training clips to fit probe and classifier on")
    curve_clips: int = Field(default=128, ge=20, description="prompts at each checkpoint of a learning curve")
    loss_clips: int = Field(default=256, ge=1, description="held-out clips for the loss by timestep")
    prompts: tuple[Prompts, ...] = Field(
        default=("natural", "stratified"),
        min_length=1,
        description="choices of prompts: natural (kinds as frequent as in the data), stratified (equally many of each kind)",
    )
    batch: Count = Field(default=16, description="clips sampled at once")
    resamples: int = Field(default=100, ge=12, description="subsets of clips that are drawn for each interval of a distance")
    evaluator: EvaluatorSettings = Field(default=EvaluatorSettings(), description="metrics and their weights")


class Machines(Frozen):
    """The local swarm that trains."""

    workers: int | None = Field(default=None, ge=1, description="nodes; none: one per shard, at most one per core")
    threads: int | None = Field(default=None, ge=1, description="threads of each node; none: the cores divided by the nodes")
    device: Device = Field(default="cpu", description="device of every node: cpu, mps, cuda, cuda:N, xpu or xpu:N")
    heartbeat: Positive = Field(
        default=2.0, description="heartbeat of a claim, seconds; the shard of a lost node is free after three"
    )
    audits: bool = Field(default=False, description="replay epochs, as among strangers; not needed, as all nodes are local")
    patience: Positive = Field(
        default=180.0, description="seconds without an accepted checkpoint and without a shard in training before giving up"
    )


class StudyConfig(Frozen):
    """A whole study: a monolith against a mixture of K = `data.experts` experts, on equal data and equal FLOPs."""

    name: Name = Field(description="name of the study")
    clips: Annotated[FolderClips | MadeClips | DrawnClips, Field(discriminator="kind")] = Field(
        description="where the clips come from"
    )
    tune_share: float = Field(default=0.06, gt=0, lt=0.5, description="share of the training prompts set apart for tuning")
    autoencoder: Autoencoder | None = Field(
        default=None, description="autoencoder to train first, instead of data.latents; none: data.latents"
    )
    data: BuildSettings = Field(description="how clips become shards; data.experts is K")
    expert: ExpertSpec = Field(description="network of the monolith and of each expert")
    base: Annotated[WeightsBase | FramesBase, Field(discriminator="kind")] | None = Field(
        default=None,
        description="weights that all arms start from, whose FLOPs count for none of them; none: every arm starts afresh",
    )
    wide: ExpertSpec | None = Field(default=None, description="network of the control `wide`")
    narrow: ExpertSpec | None = Field(default=None, description="network of each expert of the control `narrow`")
    optimisation: Optimisation = Field(description="optimiser; its batch is that of the monolith, and each expert has 1/K of it")
    samples: Count = Field(description="clips the monolith trains on; all other arms get the same FLOPs, the router's included")
    checkpoints: Count = Field(default=4, description="checkpoints of a training, the points of its learning curve")
    holdout_tolerance: float = Field(
        default=0.1, ge=0, description="how much the held-out loss of a checkpoint may exceed that of its parent, as a share"
    )
    router: RouterSpec = Field(default=RouterSpec(), description="router of every mixture")
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="how the clips of every arm are sampled")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="training seeds of the headline")
    controls: Controls = Field(default=Controls(), description="arms that could explain a gain")
    evaluation: EvaluationPlan = Field(default=EvaluationPlan(), description="how the sides are evaluated")
    machines: Machines = Field(default=Machines(), description="the local swarm that trains")

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.data.text_tokens is None:
            raise ValueError("data.text_tokens must be set: the FLOPs depend on it")
        if self.data.auto_experts:
            raise ValueError("data.experts must be a number: the budgets depend on it")
        for experts in (self.data.experts, *self.controls.expert_counts):
            if experts < 2:
                raise ValueError("a mixture needs 2 or more experts")
            if self.optimisation.batch % experts:
                raise ValueError(f"the batch {self.optimisation.batch} must be divisible by the number of experts {experts}")
        for arm, spec in (("wide", self.wide), ("narrow", self.narrow)):
            if arm in (*self.controls.arms, *self.controls.full) and spec is None:
                raise ValueError(f"the control {arm} needs its own expert: set {arm}")
            if self.base and arm in (*self.controls.arms, *self.controls.full):
                raise ValueError(f"the control {arm} has another network, which cannot start from the base; leave it out")
        if isinstance(self.base, FramesBase):
            self._check_frames_base(self.base)
        self._check_values()
        return self

    def _check_frames_base(self, base: FramesBase) -> None:
        patch = self.expert.config.get("patch_size", 1)
        if (patch[0] if isinstance(patch, list | tuple) else self.expert.config.get("patch_size_t") or 1) != 1:
            raise ValueError("a base of frames needs an expert whose patch is one frame long")
        if base.samples < self.optimisation.batch:
            raise ValueError(f"base.samples is {base.samples}, fewer than a batch of {self.optimisation.batch}")

    def _check_values(self) -> None:
        controls = self.controls
        for name, values in (
            ("seeds", self.seeds),
            ("controls.seeds", controls.seeds),
            ("controls.expert_counts", controls.expert_counts),
            ("controls.learning_rates", controls.learning_rates),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"the values of {name} must differ from each other")
