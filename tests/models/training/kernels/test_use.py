"""Training with chosen kernels: it goes on bit by bit, a replay with the same kernels repeats it, a plain one finds it valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lutetia.coordinator.acceptance.audit_comparison import compare
from lutetia.models.training.checkpoint_io import read_place, write_state, write_weights
from lutetia.models.training.kernels import use
from lutetia.models.training.kernels.choice import Kernels
from lutetia.models.training.replay import ReplayEnd, ReplayParent, made_with, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.records import TrainedWith
from tests.models.tiny_experts import CONFIGS, tiny_data, tiny_manifest

MANIFEST, MATH = tiny_manifest(), Kernels(attention="math")
FINER = tiny_manifest(expert=ExpertSpec(config=CONFIGS["WanTransformer3DModel"] | {"patch_size": [1, 2, 2]}))
"""Of more tokens, whose sums the two kernels take in other orders."""


def test_replay_with_the_same_kernels_is_bit_equal_and_a_plain_one_valid(tmp_path: Path) -> None:
    author = ExpertTrainer(FINER, 0, tiny_data(), kernels=MATH)
    for name in ("parent", "end"):
        for _ in range(FINER.steps_per_epoch):
            author.step()
        write_weights(author.snapshot(), tmp_path / f"{name}.weights")
        write_state(author.snapshot(), tmp_path / f"{name}.state", ema=False)
    parent = ReplayParent(1, tmp_path / "parent.weights", tmp_path / "parent.state")
    end = ReplayEnd(tmp_path / "end.weights", tmp_path / "end.state")
    made = made_with("cpu", "float32", 4, kernels=author.kernels)
    same, plain = (replay(FINER, 0, tiny_data(), parent, 6, end=end, kernels=each) for each in (MATH, Kernels()))
    assert (same.drift, list(same.losses)) == (0.0, author.trace)
    assert (same.made.kernels, plain.made.kernels) == ("math", "plain")
    assert plain.drift, "the plain way has other last bits, or this test shows nothing"
    assert compare(author.trace, plain.losses, plain.drift, made, plain.made).outcome == "valid"


def test_record_of_a_plain_epoch_is_written_as_before() -> None:
    assert "kernels" not in made_with("cpu", "float32", 4).model_dump()
    assert made_with("cpu", "float32", 4, kernels=MATH).model_dump()["kernels"] == "math"
    assert TrainedWith.model_validate({"kernels": "of later times"}).kernels == "of later times"


def test_kernel_that_is_not_there_fails_a_trial_and_no_training() -> None:
    absent = Kernels(attention="cudnn")
    trainer, plain = (ExpertTrainer(MANIFEST, 0, tiny_data(), kernels=each) for each in (absent, Kernels()))
    assert trainer.step() == pytest.approx(plain.step(), rel=1e-5), "another kernel took its place"
    trainer.strict_kernels = True
    with pytest.raises(RuntimeError, match="kernel"):
        trainer.step()


def test_compiled_training_goes_on_from_a_local_state_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's compiler that takes operations as they are: its compiler of machine code takes minutes."""
    monkeypatch.setattr(use, "COMPILER", "eager")
    torch.compiler.reset()
    counters.clear()
    trainer = ExpertTrainer(MANIFEST, 0, tiny_data(), kernels=Kernels(compiled=True), micro_batch=3)
    for _ in range(3):
        trainer.step()
    write_state(trainer.snapshot(), tmp_path / "local")
    assert read_place(tmp_path / "local", MANIFEST, 0)["kernels"].word == "compiled"
    compiled = counters["stats"]["unique_graphs"]
    assert compiled >= 2, "one for three rows and one for the last of a batch"
    again = ExpertTrainer(MANIFEST, 0, tiny_data())
    again.restore(0, local=tmp_path / "local")
    assert again.kernels.word == "compiled", "the epoch is finished as it was begun"
    assert [again.step() for _ in range(3)] == [trainer.step() for _ in range(3)]
    assert counters["stats"]["unique_graphs"] >= compiled
    with use.uncompiled():
        before = counters["stats"]["unique_graphs"]
        trainer.micro_batch = 2
        trainer.step()
        assert counters["stats"]["unique_graphs"] == before, "calls of other shapes are not compiled"
    torch.compiler.reset()
