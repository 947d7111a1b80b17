"""The manifest's way of routing stays unless another one is better beyond the noise, and worth what it costs."""

from __future__ import annotations

import math

import pytest
import torch

from lutetia.models.mixing.routing.choice import LEAST_GAIN, choose_routing, losses_of
from lutetia.models.mixing.routing.evidence import MOST_ROWS, RoutingEvidence
from lutetia.models.mixture import Mode

CPU = torch.Generator()


def evidence(residuals: torch.Tensor, logits: torch.Tensor, first: torch.Tensor | None = None) -> RoutingEvidence:
    """From residuals [R, K, N] and logits [R, K]."""
    gram = (residuals @ residuals.transpose(1, 2)).double() / residuals.shape[2]
    return RoutingEvidence(gram, logits, logits if first is None else first)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared(rows: int, experts: int, own: float) -> torch.Tensor:
    """Residuals with a common part of size 1 and one of size `own` of each expert."""
    return normal(rows, 1, 64) + own * normal(rows, experts, 64, seed=1)


@pytest.mark.parametrize("mode", ["top1", "top2", "full", "sticky"])
def test_equal_experts_keep_the_manifests_mode(mode: Mode):
    same = normal(MOST_ROWS, 1, 64).expand(-1, 4, -1)
    chosen = choose_routing(evidence(same, normal(MOST_ROWS, 4)), mode)
    assert (chosen.mode, chosen.temperature) == (mode, 1.0)
    assert f"{mode}, as the manifest says" in chosen.text
    assert len(chosen.losses) == MOST_ROWS


def test_independent_errors_average_out_and_all_experts_are_asked():
    chosen = choose_routing(evidence(normal(MOST_ROWS, 4, 64), 0.1 * normal(MOST_ROWS, 4, seed=2)), "top1")
    assert chosen.mode == "full"
    assert "better by at least" in chosen.text
    assert sum(chosen.losses) / MOST_ROWS < 0.4, "a quarter of the error of one"


def test_two_experts_that_disagree_are_both_asked_at_the_better_temperature():
    """The likelier expert is no better than the other, so weights should be nearly equal: a high temperature."""
    logits = torch.stack([torch.full((MOST_ROWS,), 1.5), torch.zeros(MOST_ROWS)], dim=1)
    chosen = choose_routing(evidence(normal(MOST_ROWS, 2, 64), logits), "top2")
    assert (chosen.mode, chosen.temperature) == ("top2", 2.0)


def test_gain_below_its_cost_keeps_the_cheaper_mode():
    """Two experts gain half of `own`^2 in each row, so surely, but less than a percent."""
    own = math.sqrt(LEAST_GAIN)
    told = evidence(shared(MOST_ROWS, 2, own), torch.zeros(MOST_ROWS, 2))
    saved = 1 - losses_of(told, "top2", 1.0).mean() / losses_of(told, "top1", 1.0).mean()
    assert 0 < saved < LEAST_GAIN
    assert choose_routing(told, "top1").mode == "top1"
    assert choose_routing(evidence(shared(MOST_ROWS, 2, 4 * own), torch.zeros(MOST_ROWS, 2)), "top1").mode == "top2"


def test_gain_within_the_noise_of_few_rows_changes_nothing():
    """The second mode is better in the mean by a single row."""
    residuals = normal(8, 1, 64).repeat(1, 2, 1)
    residuals[0, 1] = -residuals[0, 0]
    chosen = choose_routing(evidence(residuals, torch.zeros(8, 2)), "top1")
    assert chosen.mode == "top1"
    assert "none of" in chosen.text


def test_first_decision_that_is_right_makes_it_sticky():
    """The router knows the clip's expert at the beginning and guesses later."""
    right = torch.arange(MOST_ROWS) % 3
    residuals = normal(MOST_ROWS, 3, 64)
    residuals[torch.arange(MOST_ROWS), right] *= 0.1
    first = 12.0 * torch.nn.functional.one_hot(right, 3)
    assert choose_routing(evidence(residuals, -first.float(), first.float()), "top1").mode == "sticky"


def test_one_expert_has_nothing_to_choose():
    logits = torch.tensor([[0.0, -math.inf]]).expand(8, 2)
    gram = torch.full((8, 2, 2), math.nan, dtype=torch.float64)
    gram[:, 0, 0] = 0.5
    chosen = choose_routing(RoutingEvidence(gram, logits, logits), "sticky")
    assert (chosen.mode, chosen.losses) == ("sticky", (0.5,) * 8)
    assert "one expert" in chosen.text


def test_owner_may_keep_the_manifests_mode():
    told = evidence(normal(MOST_ROWS, 4, 64), torch.zeros(MOST_ROWS, 4))
    assert choose_routing(told, "top1", choose=False).mode == "top1"


def test_modes_that_ask_all_are_not_scored_where_only_two_were_asked():
    gram = torch.full((8, 9, 9), math.nan, dtype=torch.float64)
    gram[:, :2, :2] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([1.0, 0.9] + [-9.0] * 7).expand(8, 9)
    told = RoutingEvidence(gram, logits, logits)
    assert not told.complete
    chosen = choose_routing(told, "top1")
    assert chosen.mode == "top2"
    kept = choose_routing(told, "full")
    assert (kept.mode, kept.losses) == ("full", (1.0,) * 8)
    assert "too many" in kept.text
