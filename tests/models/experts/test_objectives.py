"""The equations, checked with exact predictions instead of trained ones, so that every error is the code's."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from lutetia.models.experts.objectives import (
    ALPHA_MIN,
    T_MIN,
    flow_time,
    from_velocity,
    matched,
    row_losses,
    shift_time,
    to_velocity,
    velocity,
)
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.pipeline_spec import BetaSchedule
from tests.models.tiny_experts import WAN

SCHEDULES = ("linear", "vp_cosine")
PREDICTIONS = ("velocity", "sample", "epsilon")


def path(schedule: str, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if schedule == "linear":
        return 1 - s, s
    return torch.cos(math.pi * s / 2), torch.sin(math.pi * s / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matched_time_shows_the_same_picture_up_to_scale(schedule) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    s, c = matched(schedule, t)
    a, b = path(schedule, s)
    assert torch.allclose(c * (1 - t), a, atol=1e-12)
    assert torch.allclose(c * t, b, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_predictions_become_the_true_velocity(prediction, schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(T_MIN, 1 - ALPHA_MIN, 40, dtype=torch.float64)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * noise

    def perfect(z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        a, b = (v[:, None] for v in path(schedule, s))
        assert torch.allclose(z, a * x0 + b * noise, atol=1e-12)
        if prediction == "sample":
            return x0
        if prediction == "epsilon":
            return noise
        return noise - x0 if schedule == "linear" else a * noise - b * x0

    flow = velocity(prediction, schedule, perfect, x_t, t)
    assert (flow - (noise - x0)).abs().max() < 1e-10
    spec = WAN.model_copy(update={"prediction": prediction, "noise_schedule": schedule})
    assert row_losses(spec, perfect, x0, noise, t).max() < 1e-20


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bfloat16_predictions_are_converted_in_float32(prediction, schedule) -> None:
    """Near pure noise, x0 is a difference of nearly equal numbers over a small one: only the prediction may be rounded."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 40, 50, generator=generator)
    t = torch.full((40,), 0.97)
    x_t = torch.lerp(x0, noise, t[:, None])

    def rounded(z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        a, b = (v[:, None] for v in path(schedule, s))
        answer = {"sample": x0, "epsilon": noise, "velocity": noise - x0 if schedule == "linear" else a * noise - b * x0}
        return answer[prediction].bfloat16()

    flow = velocity(prediction, schedule, rounded, x_t, t)
    assert flow.dtype == torch.float32
    error = (flow - (noise - x0)).square().mean().sqrt() / (noise - x0).square().mean().sqrt()
    assert error < (0.06 if prediction == "epsilon" else 0.006)  # bfloat16 keeps eight bits; 1 / (1 - t) is 33


def test_sample_loss_is_the_velocity_error_with_a_floor() -> None:
    spec = WAN.model_copy(update={"prediction": "sample"})
    x0, noise, guess = torch.randn(3, 4, 6, dtype=torch.float64)
    t = torch.tensor([0.01, 0.04, 0.3, 0.9], dtype=torch.float64)
    losses = row_losses(spec, lambda z, s: guess, x0, noise, t)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * noise
    implied = to_velocity("sample", "linear", guess, x_t, t)
    assert torch.allclose(losses[2:], (implied - (noise - x0)).square().mean(1)[2:])
    assert torch.allclose(losses[:2], ((guess - x0) / T_MIN).square().mean(1)[:2])


def test_velocity_is_finite_at_both_ends_of_time() -> None:
    x_t, out = torch.randn(2, 2, 6)
    for prediction in PREDICTIONS:
        for schedule in SCHEDULES:
            flow = velocity(prediction, schedule, lambda z, s: out, x_t, torch.tensor([0.0, 1.0]))
            assert torch.isfinite(flow).all()
            assert flow.abs().max() < 1e3


def test_time_shift_keeps_the_ends() -> None:
    ends = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(shift_time(ends, 3.0), torch.tensor([0.0, 0.75, 1.0]))


def test_expert_spec_accepts_both_noise_schedules() -> None:
    assert ExpertSpec(config={}, prediction="epsilon", noise_schedule="vp_cosine").noise_schedule == "vp_cosine"


COGVIDEOX = BetaSchedule(start=0.00085, end=0.012, kind="scaled_linear", snr_shift=3.0, zero_snr=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_table_of_betas_is_the_path_of_diffusers_scheduler(prediction) -> None:
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, snr_shift_scale=3.0, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    x0, noise = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    k: Any = torch.tensor([0, 1, 500, 900, 998])  # diffusers asks for torch.IntTensor
    z = scheduler.add_noise(x0, noise, k)
    t = flow_time(COGVIDEOX, k / 1000)
    s, scale = matched(COGVIDEOX, t)
    assert torch.allclose(s * 1000, k.float(), atol=2e-4)
    x_t = torch.lerp(x0, noise, t[:, None])
    assert torch.allclose(scale[:, None] * x_t, z, atol=1e-6)
    answer = {"sample": x0, "epsilon": noise, "velocity": scheduler.get_velocity(x0, noise, k)}[prediction]
    flow = noise - x0
    assert torch.allclose(from_velocity(prediction, COGVIDEOX, flow, x_t, t), answer, atol=2e-6)
    if prediction == "velocity":
        assert torch.allclose(velocity(prediction, COGVIDEOX, lambda z, s: answer, x_t, t), flow, atol=2e-6)
        spec = WAN.model_copy(update={"betas": COGVIDEOX})
        assert row_losses(spec, lambda z, s: answer, x0, noise, t).max() < 1e-10


@pytest.mark.parametrize("schedule", [*SCHEDULES, COGVIDEOX], ids=str)
def test_own_time_and_flow_time_are_inverse(schedule) -> None:
    t = torch.linspace(0.1, 0.99, 50)
    assert torch.allclose(flow_time(schedule, matched(schedule, t)[0]), t, atol=1e-6)
