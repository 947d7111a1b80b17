"""What the supervisor asks its trainer process to check for the coordinator, and what comes back. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.model.training_spec import MixtureMode
from lutetia.protocol.schema.verdicts import CheckName


class CheckQuestion(Frozen):
    """A result to inspect and score, from files that the supervisor has fetched."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    epoch: int = Field(description="Epoch of the result")
    lanes: tuple[int, ...] = Field(default=(0,), description="Lane that trained it, or lanes that were merged into it")
    weights: Path = Field(description="Weights of the result")
    state: Path = Field(description="Its training state")
    trace: Path = Field(description="Its trace")
    parent: Path | None = Field(default=None, description="Weights of the parent; None: the shard's initial model")
    holdout: Path = Field(description="The held-out clips")
    draw: str = Field(description="Fixes noise, times and order of the rows")
    rows: int = Field(description="Rows to score at most")
    fewest: int = Field(description="Rows to score however long they take")
    seconds: float = Field(description="Time that further rows may take")
    device: str = Field(description="cpu, mps or cuda:N")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    base: dict[str, Path] | None = Field(default=None, description="Files of the base that the expert adapts, if it does")


class CheckFindings(Frozen):
    """Losses row by row, None where they are no finite number; or the check that the result's files fail."""

    check: CheckName | None = Field(default=None, description="The check that the files fail; None: they are right")
    text: str = Field(default="", description="Why they fail it")
    parent: tuple[float | None, ...] = Field(default=(), description="Losses of the parent")
    averages: tuple[float | None, ...] = Field(default=(), description="Losses of the result's published averages")
    raw: tuple[float | None, ...] = Field(default=(), description="Losses of its raw parameters")


class RouterQuestion(Frozen):
    """Train the run's router and report on it, or only report on one. Every tenth clip is for the report."""

    manifest: Path = Field(description="The signed manifest")
    train: tuple[Path, ...] = Field(description="The training data of all shards, in order")
    router: Path | None = Field(default=None, description="Weights to report on; None: train")
    out: Path = Field(description="File for the trained weights")
    device: str = Field(description="cpu, mps or cuda:N")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")


class MixtureQuestion(Frozen):
    """Score a mixture on held-out clips, and the current one on the same rows."""

    manifest: Path = Field(description="The signed manifest")
    weights: dict[int, Path] = Field(description="Accepted weights by shard")
    current: dict[int, Path] = Field(default={}, description="Those of the current mixture; none: there is none")
    mode: MixtureMode | None = Field(default=None, description="How the current one routes; None: as the manifest says")
    temperature: float = Field(default=1.0, description="By which the current one divides the router's logits")
    router: Path | None = Field(default=None, description="The router's weights; None: the run has one shard")
    holdout: tuple[Path, ...] = Field(description="The held-out clips of all shards, in order")
    draw: str = Field(description="Fixes rows, noise and times")
    seconds: float = Field(description="Time that rows beyond the fewest may take")
    choose: bool = Field(description="Choose mode and temperature by what is measured")
    device: str = Field(description="cpu, mps or cuda:N")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    base: dict[str, Path] | None = Field(default=None, description="Files of the base that the experts adapt, if they do")


class MixtureFindings(Frozen):
    """How the mixture routes, and losses row by row, None where they are no finite number."""

    mode: MixtureMode = Field(description="The mode that was chosen")
    temperature: float = Field(description="The temperature that was chosen")
    averages: tuple[float | None, ...] = Field(description="Losses of the new mixture")
    parent: tuple[float | None, ...] = Field(default=(), description="Losses of the current one")


class GalleryQuestion(Frozen):
    """Sample the manifest's prompts from a mixture."""

    manifest: Path = Field(description="The signed manifest")
    mixture: Path = Field(description="The mixture's folder")
    train: tuple[Path, ...] = Field(default=(), description="The training data of all shards, to find fitting clips; or none")
    out: Path = Field(description="File for the clips")
    device: str = Field(description="cpu, mps or cuda:N")
    threads: int | None = Field(default=None, description="CPU threads; None: the default of torch")
    base: dict[str, Path] | None = Field(default=None, description="Files of the base that the experts adapt, if they do")


class RouterFindings(Frozen):
    """How good the router is on clips that it was not trained on."""

    accuracy: float = Field(description="Share of noisy clips whose shard it tells")
    accuracy_by_time: tuple[float, ...] = Field(description="The same in equal bins of the time t")
    calibration_error: float = Field(description="Expected calibration error")
