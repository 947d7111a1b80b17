"""The distance of optimiser moments: what honest machines differ by, and every way to craft them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lutetia.models.training.moment_checks import FIRST, MUON, SECOND
from lutetia.models.training.moment_distance import moment_distance

Moments = dict[str, Tensor]


def moments() -> Moments:
    """Of two parameters under AdamW, one with much smaller gradients than the other, and of a matrix under Muon."""
    draw = torch.Generator().manual_seed(1)
    found: Moments = {}
    for name, size in (("large", 1e-2), ("small", 1e-6)):
        found[FIRST + name] = 0.3 * size * torch.randn(64, generator=draw)
        found[SECOND + name] = size**2 * (0.5 + torch.rand(64, generator=draw))
    found[MUON + "matrix"] = 1e-3 * torch.randn(8, 4, generator=draw)
    return found


def apart(crafted: Moments) -> float:
    return moment_distance(moments(), crafted.get)


def scaled(kind: str, factor: float, name: str = "") -> Moments:
    return {key: value * factor if key.startswith(kind + name) else value for key, value in moments().items()}


@pytest.mark.parametrize("error", [0.0, 1e-5, 1e-3])
def test_equal_moments_are_as_far_apart_as_their_rounding(error: float):
    draw = torch.Generator().manual_seed(2)
    rounded = {name: tensor * (1 + error * torch.randn(tensor.shape, generator=draw)) for name, tensor in moments().items()}
    assert apart(rounded) <= 10 * error


@pytest.mark.parametrize(
    "crafted",
    [
        {},
        {name: tensor for name, tensor in moments().items() if not name.startswith(MUON)},
        scaled(FIRST, -1.0),
        scaled(FIRST, 0.0),
        scaled(SECOND, 100.0),
        scaled(SECOND, 1e-4, "small"),
        scaled(FIRST, 5.0, "small"),
        scaled(MUON, -1.0),
        scaled(MUON, 30.0),
        {**scaled(FIRST, 1e-3), **{k: v for k, v in scaled(SECOND, 1e-6).items() if k.startswith(SECOND)}},
    ],
    ids=["none", "no momentum", "reversed", "no first", "slow", "small ones fast", "small ones far", "momentum reversed",
         "momentum that lasts", "same direction, a thousandth"],
)  # fmt: skip
def test_crafted_moments_are_farther_apart_than_any_bound(crafted: Moments):
    assert apart(crafted) > 0.7


def test_small_gradients_count_though_norms_do_not_show_them():
    crafted = scaled(FIRST, -1.0, "small")
    name = FIRST + "large"
    plain = sum(torch.dist(crafted[key], value).item() for key, value in moments().items()) / moments()[name].norm().item()
    assert plain < 1e-3 < 0.7 < apart(crafted)


def test_what_never_had_a_gradient_is_no_difference():
    still = {FIRST + "still": torch.zeros(4), SECOND + "still": torch.zeros(4)}
    assert moment_distance(still, still.get) == 0
    assert moment_distance(still, {}.get) == 0
    assert moment_distance({}, {}.get) == 0
