"""Settings of `lutetia evaluate`. Importing this takes no torch, so that a command's help can be made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.device import Device
from lutetia.models.mixing.options import SamplingOptions
from lutetia.protocol.schema.canonical import Frozen

MIN_CLIPS = 20
Name = Literal["fvd", "motion", "retrieval", "classifier", "clip"]
Precision = Literal["float32", "bfloat16"]


class EvaluatorSettings(Frozen):
    """Which metrics are measured, with which weights, and where."""

    metrics: tuple[Name, ...] = Field(
        default=("fvd", "motion", "retrieval", "classifier", "clip"),
        description="metrics to measure: fvd, motion, retrieval, classifier, clip",
    )
    cache: Path | None = Field(default=None, description="folder that keeps features and samples; none: nothing is kept")
    i3d: Path | None = Field(default=None, description="file of I3D's weights; none: the asset in LUTETIA_ASSETS")
    efficientnet: Path | None = Field(
        default=None, description="file of EfficientNet-lite0's weights; none: the asset in LUTETIA_ASSETS"
    )
    minilm: Path | None = Field(default=None, description="folder of MiniLM; none: the asset in LUTETIA_ASSETS")
    clip: str | None = Field(default=None, description="CLIP for text-video similarity, a folder or hub id; none: left out")
    aesthetic: Path | None = Field(
        default=None, description="LAION's aesthetic head for that CLIP, a safetensors file; none: left out"
    )
    device: Device = Field(default="cpu", description="device of the networks: cpu, mps, cuda, cuda:N, xpu or xpu:N")
    i3d_precision: Precision = Field(
        default="float32", description="number format of I3D; bfloat16 is faster on processors with AMX, with other figures"
    )
    resamples: int = Field(default=60, description="subsets of clips that are drawn for each interval of a distance")


class EvaluateSettings(Frozen):
    """What `lutetia evaluate` samples and measures."""

    clips: int = Field(default=256, ge=MIN_CLIPS, description="prompts to sample, and as many real clips to compare with")
    spare: int = Field(default=256, ge=0, description="more real held-out clips, for floors at the same number of clips")
    fit_clips: int = Field(default=1000, ge=MIN_CLIPS, description="real training clips to fit probe and classifier on")
    seed: int = Field(default=0, description="seed of the choice of clips and of the sampling noise")
    prompts: Literal["natural", "stratified"] = Field(
        default="natural", description="natural: kinds as frequent as in the data; stratified: equally many of each kind"
    )
    loss_clips: int = Field(default=256, ge=0, description="held-out clips for the loss by timestep; 0: not measured")
    complete: bool = Field(
        default=False, description="fail if one of the metrics cannot be measured, instead of reporting it as left out"
    )
    hub: bool = Field(default=False, description="download models that the mixture names by a hub id; they run no code")
    shape: ClipShape | None = Field(
        default=None,
        description="how real clips are cut in time and space, as when the data of the run were built; none: the middle of each "
        "clip at the size of the mixture. Required to evaluate a folder of video files",
    )
    sampling: SamplingOptions = Field(default=SamplingOptions(), description="how the mixture is sampled")
    evaluator: EvaluatorSettings = Field(default=EvaluatorSettings(), description="metrics and their weights")
