"""Training of adapters: what a checkpoint weighs, that it continues and replays bit by bit, and that crafted ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.moment_checks import check_moments
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from tests.models.experts.tiny_base import adapting, tiny_base
from tests.models.tiny_experts import CONFIGS, tiny_data, tiny_manifest

WIDE = {**CONFIGS["WanTransformer3DModel"], "num_attention_heads": 8, "attention_head_dim": 48, "ffn_dim": 512, "num_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    return tiny_base(tmp_path_factory.mktemp("base"))


def manifest_of(base: dict[str, Path], optimizer: str = "adamw", **adapter: Any) -> Manifest:
    return tiny_manifest(expert=adapting(base, **adapter), optimisation={"optimizer": optimizer, "learning_rate": 1e-2})


def train(trainer: ExpertTrainer, folder: Path, steps: int = 6) -> ReplayEnd:
    """Steps, then the two files of a checkpoint."""
    folder.mkdir(exist_ok=True)
    for _ in range(steps):
        trainer.step()
    write_weights(trainer.snapshot(), folder / "weights")
    write_state(trainer.snapshot(), folder / "state", ema=False)
    return ReplayEnd(folder / "weights", folder / "state")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("adapter", [{}, {"dtype": "bfloat16", "dora": True}])
def test_adapter_continues_on_another_node_and_replays_bit_by_bit(optimizer, adapter, base, tmp_path) -> None:
    manifest = manifest_of(base, optimizer, **adapter)
    there, here = (ExpertTrainer(manifest, 0, tiny_data(), base=base) for _ in range(2))
    frozen = {name: tensor.clone() for name, tensor in there.model.state_dict().items() if ".lora_" not in name}
    parent = train(there, tmp_path / "parent")
    end = train(there, tmp_path / "end")
    here.restore(1, parent.weights, parent.state)
    assert train(here, tmp_path / "here").weights.read_bytes() == end.weights.read_bytes()
    assert end.state.read_bytes() == (tmp_path / "here" / "state").read_bytes()
    assert all(torch.equal(there.model.state_dict()[name], tensor) for name, tensor in frozen.items()), "the base never changes"
    again = replay(manifest, 0, tiny_data(), ReplayParent(1, parent.weights, parent.state), 6, end=end, base=base)
    assert (list(again.losses), again.drift) == (there.trace, 0.0)


def test_checkpoint_takes_at_most_16_5_bytes_per_adapter_parameter(tmp_path) -> None:
    spec = ExpertSpec(config=WIDE)
    files = tiny_base(tmp_path / "base", spec)
    manifest = tiny_manifest(expert=adapting(files, spec, rank=32, dtype="bfloat16"))
    trainer = ExpertTrainer(manifest, 0, tiny_data(), base=files)
    end = train(trainer, tmp_path / "end")
    parameters = sum(tensor.numel() for tensor in trainer.snapshot().parameters.values())
    size = end.weights.stat().st_size + end.state.stat().st_size
    assert parameters > 300_000
    assert size <= 16.5 * parameters, size / parameters


def test_holdout_loss_begins_at_that_of_the_base(base, tmp_path) -> None:
    manifest, whole = manifest_of(base), tiny_manifest()
    from_base = holdout_loss(whole, 0, base["diffusion_pytorch_model.safetensors"], tiny_data(6, seed=9), draw="d")
    initial = holdout_loss(manifest, 0, None, tiny_data(6, seed=9), draw="d", base=base)
    assert initial.rows == pytest.approx(from_base.rows, rel=1e-6)
    end = train(ExpertTrainer(manifest, 0, tiny_data(), base=base), tmp_path, 24)
    for path, raw in ((end.weights, False), (end.state, True)):
        assert holdout_loss(manifest, 0, path, tiny_data(6, seed=9), raw=raw, draw="d", base=base).loss < initial.loss


A = "blocks.0.attn1.to_q.lora_A.weight"


def _rename(tensors):
    tensors[A.replace("lora_A.", "lora_A.default.")] = tensors.pop(A)


def _base_tensor(tensors):
    tensors["blocks.0.attn1.to_q.weight"] = torch.zeros(24, 24)


def _rank(tensors):
    tensors[A] = torch.zeros(8, 24)


def _scaled(tensors):
    tensors[A] *= 1e5


@pytest.mark.parametrize(
    ("damage", "reason"), [(_rename, "missing"), (_base_tensor, "extra"), (_rank, "shape"), (_scaled, "norm")]
)
def test_crafted_adapter_weights_are_refused(damage, reason, base, tmp_path) -> None:
    manifest = manifest_of(base)
    end = train(ExpertTrainer(manifest, 0, tiny_data(), base=base), tmp_path, 1)
    check_weights(end.weights, manifest.expert)
    tensors = load_file(end.weights)
    damage(tensors)
    save_file(tensors, tmp_path / "crafted")
    with pytest.raises(CheckpointMisfit) as refusal:
        check_weights(tmp_path / "crafted", manifest.expert)
    assert refusal.value.reason == reason


def _hidden_base(tensors):
    tensors["param.proj_out.weight"] = torch.zeros(64, 24)


def _negative(tensors):
    tensors[f"adamw.exp_avg_sq.{A}"].fill_(-1.0)


def _contradicting(tensors):
    tensors[f"adamw.exp_avg.{A}"].fill_(0.5)


@pytest.mark.parametrize(("damage", "reason"), [(_hidden_base, "extra"), (_negative, "norm"), (_contradicting, "norm")])
def test_crafted_adapter_states_are_refused(damage, reason, base, tmp_path) -> None:
    manifest = manifest_of(base)
    end = train(ExpertTrainer(manifest, 0, tiny_data(), base=base), tmp_path, 2)
    tensors = load_file(end.state)
    damage(tensors)
    save_file(tensors, tmp_path / "crafted")
    check = check_state if reason == "extra" else lambda path, _, optimisation: check_moments(path, optimisation)
    with pytest.raises(CheckpointMisfit) as refusal:
        check(tmp_path / "crafted", manifest.expert, manifest.optimisation)
    assert refusal.value.reason == reason
