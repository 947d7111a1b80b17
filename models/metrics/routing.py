"""Figures of the router's decisions during sampling, and tables of held-out loss and of router accuracy by timestep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError


class ByTime(Protocol):
    """A mean loss, and the means in equal bins of t (None for an empty bin), such as `TimedLoss`."""

    @property
    def loss(self) -> float: ...
    @property
    def by_time(self) -> tuple[float | None, ...]: ...


class RouterAccuracy(Protocol):
    """Accuracy and expected calibration error, overall and in equal bins of t, such as `RouterReport`."""

    @property
    def accuracy(self) -> float: ...
    @property
    def accuracy_by_time(self) -> tuple[float, ...]: ...
    @property
    def ece(self) -> float: ...
    @property
    def ece_by_time(self) -> tuple[float, ...]: ...


class Routing(Frozen):
    """How the router shared the sampling steps among the experts."""

    load: tuple[float, ...] = Field(description="share of each expert in all steps and clips, 0 to 1")
    balance: float = Field(description="entropy of the load divided by log K; 1: evenly shared")
    entropy: float = Field(description="mean entropy of a single decision, nats")
    switches: float = Field(description="mean number of changes of the leading expert per clip")


def routing_figures(weights: Tensor) -> Routing:
    """Figures of the experts' weights [steps, N, K] that sampling returns. Raises DataError on another shape.

    Steps without weights, which a model of the other part of the noise levels made, do not count.
    """
    if weights.ndim != 3 or weights.numel() == 0:
        raise DataError(f"routing must be the weights [steps, clips, experts], not {list(weights.shape)}; sample again")
    shares = weights.double()
    asked = shares.sum((1, 2)) > 0
    shares = shares[asked] if asked.any() else shares
    load = shares.mean(dim=(0, 1))
    leaders = shares.argmax(dim=-1)
    changes = (leaders[1:] != leaders[:-1]).double().sum(dim=0).mean() if len(leaders) > 1 else torch.tensor(0.0)
    experts = shares.shape[-1]
    return Routing(
        load=tuple(load.tolist()),
        balance=float(_entropy(load) / math.log(experts)) if experts > 1 else 1.0,
        entropy=float(_entropy(shares).mean()),
        switches=float(changes),
    )


def loss_table(losses: Mapping[str, ByTime]) -> str:
    """Markdown with one row per candidate (monolith, expert 0, …): held-out loss overall and by bin of t (0 data, 1 noise)."""
    bins = max((len(loss.by_time) for loss in losses.values()), default=0)
    rows = [[name, f"{loss.loss:.4f}", *(_cell(value) for value in loss.by_time)] for name, loss in losses.items()]
    return _table(["held-out loss", "all t", *_spans(bins)], rows)


def router_table(reports: Mapping[str, RouterAccuracy]) -> str:
    """Markdown with two rows per router: accuracy and calibration error, overall and by bin of t."""
    bins = max((len(report.accuracy_by_time) for report in reports.values()), default=0)
    rows = []
    for name, report in reports.items():
        rows.append([f"{name}: accuracy", f"{report.accuracy:.3f}", *(f"{value:.3f}" for value in report.accuracy_by_time)])
        rows.append([f"{name}: calibration error", f"{report.ece:.3f}", *(f"{value:.3f}" for value in report.ece_by_time)])
    return _table(["router", "all t", *_spans(bins)], rows)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-12).log()).sum(dim=-1)


def _spans(bins: int) -> list[str]:
    return [f"{number / bins:.1f}–{(number + 1) / bins:.1f}" for number in range(bins)]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"
