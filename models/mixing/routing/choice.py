"""Which routing mode and temperature a mixture gets, from what was measured on held-out clips.

The manifest's mode at temperature 1 stays unless another way is better beyond the noise of equal rows; a way that asks more
experts per step must besides be better by LEAST_GAIN for what it costs. The best of many candidates looks better than it is, so
the chance of a mistake is divided among them (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lutetia.models.mixing.routing.evidence import RoutingEvidence
from lutetia.models.mixture import Mode, routing_weights

TEMPERATURES = (0.5, 0.7, 1.0, 1.4, 2.0)
MISTAKES = 0.01
"""The chance that a way is chosen which is not better."""
LEAST_GAIN = 0.01
"""Fraction by which a mode that asks more experts per step must lower the loss."""
_ASKED: dict[Mode, int] = {"top1": 1, "sticky": 1, "top2": 2, "full": 1 << 16}


@dataclass(frozen=True)
class RoutingChoice:
    """How a mixture routes, its held-out loss in that way row by row [R], and why, in words."""

    mode: Mode
    temperature: float
    losses: tuple[float, ...]
    text: str


def losses_of(evidence: RoutingEvidence, mode: Mode, temperature: float) -> Tensor:
    """The error of the mixture's velocity per element, [R]; for `sticky` its expectation over the draw of the expert.

    Probabilities are softmax(logits / temperature).
    """
    gram = evidence.gram.nan_to_num(0.0)
    if mode == "sticky":
        drawn = (evidence.first.double() / temperature).softmax(1)
        return (drawn * gram.diagonal(dim1=1, dim2=2)).sum(1)
    weights = routing_weights((evidence.logits.double() / temperature).softmax(1), mode)
    return torch.einsum("rj,rjk,rk->r", weights, gram, weights)


def losses_known(evidence: RoutingEvidence, mode: Mode, temperature: float) -> tuple[float, ...]:
    """As `losses_of`; where experts were not asked that the mode asks, the loss of the likeliest expert stands for it."""
    hidden = not evidence.complete and mode not in ("top1", "top2")
    return tuple(losses_of(evidence, *(("top1", 1.0) if hidden else (mode, temperature))).tolist())


def choose_routing(evidence: RoutingEvidence, usual: Mode, choose: bool = True) -> RoutingChoice:
    """The way of routing, chosen on the rows of `evidence`.

    Args:
        evidence: what was measured.
        usual: the manifest's mode.
        choose: False: keep to the manifest's mode.
    """
    experts = int(torch.isfinite(evidence.logits[0]).sum())
    kept = losses_of(evidence, usual, 1.0)
    hidden = not evidence.complete and usual not in ("top1", "top2")
    if experts == 1 or hidden or not choose:
        why = "the mixture has one expert" if experts == 1 else "the settings say so"
        if hidden:  # then the loss of the likeliest expert stands for it
            why, kept = f"{experts} experts are too many to ask all of them for each row", losses_of(evidence, "top1", 1.0)
        return RoutingChoice(usual, 1.0, tuple(kept.tolist()), f"{usual}, as the manifest says: {why}")
    best: tuple[float, Mode, float, Tensor, float] | None = None
    candidates = [way for way in _ways(evidence, experts) if way != (usual, 1.0)]
    for mode, temperature in candidates:
        losses = losses_of(evidence, mode, temperature)
        gain = _sure_gain(kept, losses, MISTAKES / len(candidates))
        costlier = min(_ASKED[mode], experts) > min(_ASKED[usual], experts)
        if gain <= 0 or (costlier and float(losses.mean()) > (1 - LEAST_GAIN) * float(kept.mean())):
            continue
        if best is None or float(losses.mean()) < best[0]:
            best = float(losses.mean()), mode, temperature, losses, gain
    rows = f"on {len(kept)} held-out rows"
    if best is None:
        text = f"{usual}, as the manifest says: none of {len(candidates)} other ways is better beyond the noise {rows}"
        return RoutingChoice(usual, 1.0, tuple(kept.tolist()), text)
    loss, mode, temperature, losses, gain = best
    text = (
        f"{mode} at temperature {temperature:g}: held-out loss {loss:.5g} against {float(kept.mean()):.5g} of {usual} {rows}, "
        f"better by at least {gain:.2g}"
    )
    return RoutingChoice(mode, temperature, tuple(losses.tolist()), text)


def _ways(evidence: RoutingEvidence, experts: int) -> Iterator[tuple[Mode, float]]:
    """The candidates. The likeliest expert is the same at every temperature, and so are two of two."""
    yield "top1", 1.0
    modes: list[Mode] = ["top2"]
    if evidence.complete:
        modes = ["sticky", "top2"] if experts == 2 else ["sticky", "top2", "full"]
    for mode in modes:
        for temperature in TEMPERATURES:
            yield mode, temperature


def _sure_gain(before: Tensor, after: Tensor, mistakes: float) -> float:
    """The lower end of the one-sided interval of the mean of `before - after`; minus infinity if it is not finite."""
    from scipy.special import stdtrit

    gains = (before - after).double()
    count, mean = len(gains), float(gains.mean())
    if count < 2 or not math.isfinite(mean):
        return -math.inf
    return mean - float(stdtrit(count - 1, 1 - mistakes)) * float(gains.std()) / math.sqrt(count)
