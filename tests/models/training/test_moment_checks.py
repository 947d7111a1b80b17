"""Optimiser moments: those of training pass, poisoned ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.moment_checks import check_lag, check_moments, moment_ratio
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.training_spec import Optimisation
from tests.models.tiny_experts import tiny_data, tiny_manifest


@pytest.mark.parametrize(
    "optimisation",
    [{}, {"optimizer": "muon"}, {"gradient_clip": 0.01}, {"beta1": 0.5, "beta2": 0.3}, {"beta1": 0.9, "beta2": 0.999}],
)
def test_moments_of_training_pass_at_every_step(tmp_path: Path, optimisation: dict):
    trainer = ExpertTrainer(tiny_manifest(optimisation={"learning_rate": 3e-2, **optimisation}), 0, tiny_data())
    for _ in range(8):
        trainer.step()
        write_state(trainer.snapshot(), tmp_path / "state")
        check_moments(tmp_path / "state", trainer.manifest.optimisation)
        write_weights(trainer.snapshot(), tmp_path / "weights")
        check_lag(tmp_path / "state", tmp_path / "weights", trainer.manifest.optimisation)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_raw_parameters_that_no_step_reaches_are_refused(optimizer, tmp_path: Path):
    trainer = ExpertTrainer(tiny_manifest(optimisation={"optimizer": optimizer, "ema_decay": 0.9}), 0, tiny_data())
    for _ in range(3):
        trainer.step()
    snapshot = trainer.snapshot()
    write_weights(snapshot, tmp_path / "weights")
    snapshot.parameters["blocks.0.attn1.to_q.weight"][3, 4] += 0.5
    write_state(snapshot, tmp_path / "state")
    with pytest.raises(CheckpointMisfit, match=r"blocks.0.attn1.to_q.weight in state is farther from its average than"):
        check_lag(tmp_path / "state", tmp_path / "weights", trainer.manifest.optimisation)


@settings(max_examples=60)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0, 0.98), st.floats(0.5, 0.999))
def test_moment_bound_holds_for_all_gradients(gradients: list[float], beta1: float, beta2: float):
    first = second = 0.0
    for gradient in gradients:
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
    ratio = moment_ratio(Optimisation(beta1=beta1, beta2=beta2))
    assert first**2 <= (ratio * second if second else 0.0) * (1 + 1e-9) + 1e-300  # the ratio may be infinite


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertTrainer, Path]:
    trainer = ExpertTrainer(tiny_manifest(optimisation={"optimizer": "muon"}), 0, tiny_data())
    for _ in range(trainer.manifest.steps_per_epoch):
        trainer.step()
    path = tmp_path_factory.mktemp("moments") / "state"
    write_state(trainer.snapshot(), path)
    return trainer, path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("negative", "negative entries"), ("no second", "without the other"), ("large first", "contradict each other"),
        ("tiny second", "contradict each other"), ("large both", "clipped gradients give at most"),
        ("large momentum", "momenta in"),
    ],
)  # fmt: skip
def test_poisoned_moments_are_refused_with_their_reason(honest, tmp_path: Path, kind: str, words: str):
    trainer, path = honest
    tensors = load_file(path)
    first = next(name for name in sorted(tensors) if name.startswith("adamw.exp_avg."))
    second = first.replace("exp_avg", "exp_avg_sq")
    momentum = next(name for name in sorted(tensors) if name.startswith("muon."))
    match kind:
        case "negative":
            tensors[second].view(-1)[0] = -1e-3
        case "no second":
            del tensors[second]
        case "large first":
            tensors[first].view(-1)[0] = 0.5
        case "tiny second":
            tensors[second] *= 1e-4
        case "large both":
            tensors[first] += 3
            tensors[second] += 9
        case "large momentum":
            tensors[momentum] += 1
    save_file(tensors, tmp_path / "state")
    with pytest.raises(CheckpointMisfit, match=words) as caught:
        check_moments(tmp_path / "state", trainer.manifest.optimisation)
    assert caught.value.reason in ("norm", "missing")


def test_holdout_loss_of_raw_parameters_differs_from_averages(honest, tmp_path: Path):
    trainer, path = honest
    manifest, data = trainer.manifest, tiny_data(6, seed=1)
    write_weights(trainer.snapshot(), tmp_path / "weights")
    averages = holdout_loss(manifest, 0, tmp_path / "weights", data).loss
    raw = holdout_loss(manifest, 0, path, data, raw=True).loss
    assert raw == pytest.approx(averages, rel=0.3)
    assert raw != averages
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("param."):
            tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "poisoned")
    assert holdout_loss(manifest, 0, tmp_path / "poisoned", data, raw=True).loss > 1.5 * averages
