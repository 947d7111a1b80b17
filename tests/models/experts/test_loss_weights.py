"""Loss weights: one error of x0 weighs the same whatever an expert predicts, and training and judging use the same weights."""

from __future__ import annotations

import pytest
import torch

from lutetia.models.experts.loss_weights import loss_weights, weighted_losses
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.capabilities import LOSS_WEIGHTS
from lutetia.protocol.schema.manifest import needed_capabilities
from lutetia.protocol.schema.model.loss_weighting import LossWeighting
from lutetia.protocol.schema.model.training_spec import Optimisation
from tests.models.tiny_experts import WAN, tiny_data, tiny_manifest

T = torch.tensor([0.1, 0.3, 0.5, 0.8], dtype=torch.float64)
MIN_SNR = LossWeighting(kind="min-snr")


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [("velocity", "linear"), ("velocity", "vp_cosine"), ("epsilon", "linear"), ("epsilon", "vp_cosine"), ("sample", "linear")],
)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction, schedule) -> None:
    """Every expert here is wrong about x0 by the same `error`."""
    spec = WAN.model_copy(update={"prediction": prediction, "noise_schedule": schedule})
    draw = torch.Generator().manual_seed(0)
    x0, noise, error = (torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(3))

    def wrong(z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        a, b = (1 - T, T) if schedule == "linear" else ((1 - T) / torch.hypot(1 - T, T), T / torch.hypot(1 - T, T))
        a, b = a[:, None], b[:, None]
        guess = x0 + error
        eps = (z - a * guess) / b
        if prediction == "velocity":
            return eps - guess if schedule == "linear" else a * eps - b * guess
        return guess if prediction == "sample" else eps

    optimisation = Optimisation(weighting=MIN_SNR)
    losses = weighted_losses(optimisation, spec, wrong, x0, noise, T)
    expected = ((1 - T) / T).square().clamp_max(5) * error.square().mean(1)
    assert torch.allclose(losses, expected)


def test_weights_of_stable_diffusion_3_are_those_of_diffusers() -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    for weighting, name in ((LossWeighting(kind="sigma-sqrt"), "sigma_sqrt"), (LossWeighting(kind="cosmap"), "cosmap")):
        expected = compute_loss_weighting_for_sd3(name, T).double()
        assert torch.allclose(loss_weights(weighting, WAN, T), expected, rtol=1e-6)


def test_weights_are_finite_at_both_ends_of_time() -> None:
    ends = torch.tensor([0.0, 1.0])
    for weighting in (MIN_SNR, LossWeighting(kind="sigma-sqrt"), LossWeighting(kind="cosmap")):
        for prediction in ("velocity", "sample", "epsilon"):
            spec = WAN.model_copy(update={"prediction": prediction})
            weights = loss_weights(weighting, spec, ends)
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()


def test_run_trains_and_is_judged_by_its_weights_and_names_the_need(tmp_path) -> None:
    plain, weighted = tiny_manifest(), tiny_manifest(optimisation={"weighting": MIN_SNR})
    assert "weighting" not in plain.optimisation.model_dump()
    assert needed_capabilities(weighted.expert, weighted.optimisation) == (LOSS_WEIGHTS,)
    assert needed_capabilities(plain.expert, plain.optimisation) == ()
    run = weighted.model_copy(update={"run": plain.run_id})  # the same seeds
    first, second = (ExpertTrainer(manifest, 0, tiny_data()).step() for manifest in (plain, run))
    assert second < first
    judged = [holdout_loss(manifest, 0, None, tiny_data(6), draw="x").loss for manifest in (plain, run)]
    assert judged[1] < judged[0]
