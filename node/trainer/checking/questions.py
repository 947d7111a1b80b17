"""What the supervisor asks its trainer process to check for the coordinator, and what comes back. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.verdicts import CheckName


class CheckQuestion(Frozen):
    """A result to inspect and score, from files that the supervisor has fetched."""

    manifest: Path = Field(description="The signed manifest")
    shard: int = Field(description="Index of the shard")
    epoch: int = Field(description="Epoch of the result")
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


class RouterFindings(Frozen):
    """How good the router is on clips that it was not trained on."""

    accuracy: float = Field(description="Share of noisy clips whose shard it tells")
    accuracy_by_time: tuple[float, ...] = Field(description="The same in equal bins of the time t")
    calibration_error: float = Field(description="Expected calibration error")
