"""Training in float16: the loss is scaled, overflowing steps are computed again, and a resumed trainer goes on bit for bit."""

from __future__ import annotations

import pytest
import torch

from lutetia.models.training.loss_scaling import FACTORS, scaled_backward
from lutetia.models.training.replay import made_with
from lutetia.models.training.trainer import ExpertTrainer, TrainingDiverged, write_state
from tests.models.tiny_experts import tiny_data, tiny_manifest


def float16_gradient(value: float, asked: list[float]):
    """A parameter, and a backward pass that computes its gradient `value` in float16."""
    parameter = torch.nn.Parameter(torch.zeros(1))

    def backward(factor: float) -> torch.Tensor:
        asked.append(factor)
        gradient = (torch.tensor([value]) * factor).half().float()
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return torch.tensor(7.0)

    return parameter, backward


def test_gradients_below_the_range_of_float16_survive() -> None:
    assert torch.tensor(1e-9).half() == 0
    parameter, backward = float16_gradient(1e-9, asked := [])
    assert scaled_backward(backward, [parameter]) == 7
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(1e-9, rel=0.02)
    assert asked == [FACTORS[0]]


def test_overflowing_step_is_computed_again_with_a_smaller_factor() -> None:
    parameter, backward = float16_gradient(100.0, asked := [])
    scaled_backward(backward, [parameter])
    assert parameter.grad is not None
    assert parameter.grad.item() == pytest.approx(100, rel=1e-3)
    assert asked == [2.0**16, 2.0**11, 2.0**6]


def test_gradient_that_always_overflows_is_left_as_it_is() -> None:
    parameter, backward = float16_gradient(1e9, asked := [])
    scaled_backward(backward, [parameter])
    assert parameter.grad is not None
    assert torch.isinf(parameter.grad).all()
    assert asked == list(FACTORS)


def test_training_in_float16_follows_float32_and_resumes_bit_for_bit(tmp_path) -> None:
    manifest = tiny_manifest()
    exact, half = ExpertTrainer(manifest, 0, tiny_data()), ExpertTrainer(manifest, 0, tiny_data(), precision="float16")
    for _ in range(4):
        assert half.step() == pytest.approx(exact.step(), rel=2e-3)
    assert half.trace != exact.trace
    write_state(half.snapshot(), tmp_path / "local")
    resumed = ExpertTrainer(manifest, 0, tiny_data())
    resumed.restore(0, local=tmp_path / "local")
    assert resumed.precision == "float16"
    assert [resumed.step(), resumed.step()] == [half.step(), half.step()]


def test_divergence_in_float16_names_float32() -> None:
    trainer = ExpertTrainer(tiny_manifest(), 0, tiny_data(offset=1e9), precision="float16")
    with pytest.raises(TrainingDiverged, match="set precision to float32"):
        trainer.step()


def test_record_of_float16_names_a_coarser_format_that_every_peer_knows() -> None:
    assert made_with("cuda", "float16", 4).precision == "bfloat16"
    assert made_with("cpu", "float16", 4).device == "other"
