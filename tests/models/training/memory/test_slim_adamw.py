"""Moments in eight bits and weights in bfloat16: close to plain training, and the same again after a restart or in an audit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lutetia.models.device import Precision
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.memory.slim_adamw import SlimAdamW
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.system.errors import ConfigError
from tests.models.tiny_experts import tiny_data, tiny_manifest

PACKED = MemoryOptions(moments="8bit")
NARROW = MemoryOptions(moments="8bit", weights="bfloat16", average="host", checkpointing=True)
MANIFEST = tiny_manifest(optimisation={"learning_rate": 3e-3})


def trained(steps: int, memory: MemoryOptions, precision: Precision = "float32") -> ExpertTrainer:
    trainer = ExpertTrainer(MANIFEST, 0, tiny_data(), memory=memory, precision=precision)
    for _ in range(steps):
        trainer.step()
    return trainer


def test_plain_update_is_that_of_torch():
    parameter = torch.randn(40, 30)
    one, two = (torch.nn.Parameter(parameter.clone()) for _ in range(2))
    slim = SlimAdamW([one], (0.9, 0.99), 0.1, packed=False, lr=1e-2)
    plain = torch.optim.AdamW([two], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        one.grad = torch.randn(40, 30)
        two.grad = one.grad.clone()
        slim.step()
        plain.step()
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("memory", "precision", "most"), [(PACKED, "float32", 0.06), (NARROW, "bfloat16", 0.08)])
def test_training_with_fewer_bits_ends_close_to_plain_training(memory: MemoryOptions, precision, most: float):
    start, plain, slim = (
        trainer.snapshot().parameters for trainer in (trained(0, PLAIN), trained(12, PLAIN), trained(12, memory, precision))
    )
    moved = sum(torch.dist(plain[name], start[name]) ** 2 for name in plain) ** 0.5
    apart = sum(torch.dist(plain[name], slim[name]) ** 2 for name in plain) ** 0.5
    assert apart < most * moved


@pytest.mark.parametrize(("memory", "precision"), [(PACKED, "float32"), (NARROW, "bfloat16")])
def test_resumed_training_gives_equal_losses(tmp_path: Path, memory: MemoryOptions, precision):
    whole = trained(3, memory, precision)
    write_state(whole.snapshot(), tmp_path / "local")
    live = whole.live_snapshot()
    write_state(live, tmp_path / "live")
    live.release()
    assert (tmp_path / "live").read_bytes() == (tmp_path / "local").read_bytes()
    resumed = ExpertTrainer(MANIFEST, 0, tiny_data(), memory=memory, precision=precision)
    assert "step 3" in resumed.restore(0, local=tmp_path / "local")
    assert [whole.step() for _ in range(4)] == [resumed.step() for _ in range(4)]
    assert whole.snapshot().memory == memory


def test_state_of_another_form_is_not_resumed_within_an_epoch(tmp_path: Path):
    write_state(trained(2, PACKED).snapshot(), tmp_path / "local")
    plain = ExpertTrainer(MANIFEST, 0, tiny_data())
    assert "seeded initial weights" in plain.restore(0, local=tmp_path / "local")


def test_replay_in_the_author_s_form_agrees_to_the_bit(tmp_path: Path):
    author = trained(MANIFEST.steps_per_epoch, PACKED)
    write_weights(author.snapshot(), tmp_path / "weights")
    write_state(author.snapshot(), tmp_path / "state", ema=False)
    end = ReplayEnd(tmp_path / "weights", tmp_path / "state")
    found = replay(MANIFEST, 0, tiny_data(), ReplayParent(0), 1, end=end, memory=PACKED)
    assert found.drift == 0
    assert found.losses == tuple(author.trace)
    assert found.made.moments == "8bit"
    other = replay(MANIFEST, 0, tiny_data(), ReplayParent(0), 1, end=end)
    assert other.drift
    assert other.drift > 1e-3, "in another form it does not"


def test_narrow_weights_take_half_the_memory_of_gradients():
    trainer = trained(1, NARROW, "bfloat16")
    narrow = [parameter for parameter in trainer.model.parameters() if parameter.dtype == torch.bfloat16]
    assert sum(parameter.numel() for parameter in narrow) > 0.8 * sum(
        parameter.numel() for parameter in trainer.model.parameters()
    )
    with pytest.raises(ConfigError, match="precision bfloat16"):
        trained(0, NARROW)
