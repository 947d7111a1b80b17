"""A live snapshot is the state of one step, though training goes on while it is read."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lutetia.models.tensor_files import TensorFile
from lutetia.models.training.checkpoint_io import write_state
from lutetia.models.training.states.live_snapshot import LiveSnapshot
from lutetia.models.training.trainer import ExpertTrainer, UpdateInterrupted
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from tests.models.tiny_experts import WAN, tiny_data, tiny_manifest


@pytest.fixture
def trainer() -> ExpertTrainer:
    trainer = ExpertTrainer(tiny_manifest(), 0, tiny_data())
    trainer.step()
    return trainer


def test_update_waits_until_the_state_is_read(trainer: ExpertTrainer, tmp_path: Path):
    write_state(trainer.snapshot(), tmp_path / "copied")
    live, stepped = trainer.live_snapshot(), threading.Event()
    live.spare = 0
    begun = threading.Event()
    step = threading.Thread(target=lambda: (trainer.step(lambda: begun.set() or True), stepped.set()))
    step.start()
    assert begun.wait(60), "the update looks at the reader"
    assert not stepped.is_set()
    write_state(live, tmp_path / "live")
    step.join(60)
    assert (tmp_path / "live").read_bytes() == (tmp_path / "copied").read_bytes()
    assert live.waited > 0
    assert trainer.step_in_epoch == 2


def test_last_tensors_are_copied_instead_of_waited_for(trainer: ExpertTrainer, tmp_path: Path):
    before = trainer.snapshot()
    live = trainer.live_snapshot()
    read = list(before.moments)[:-1] + list(before.ema)
    for name in read:
        with live.reading({**live.moments, **live.ema}[name]):
            pass
    live.spare = 1 << 30
    trainer.step(lambda: False)
    write_state(live, tmp_path / "late", ema=False)
    with TensorFile(tmp_path / "late") as file:
        name = list(before.moments)[-1]
        assert torch.equal(file[name], before.moments[name])
        assert all(torch.equal(file[f"param.{name}"], tensor) for name, tensor in before.parameters.items())
    assert not live.rewind(), "what was read before the update has changed since"


def test_stopped_trainer_gives_the_step_up(trainer: ExpertTrainer):
    twin = ExpertTrainer(tiny_manifest(), 0, tiny_data())
    twin.step()
    live = trainer.live_snapshot()
    live.spare = 0
    with pytest.raises(UpdateInterrupted):
        trainer.step(lambda: False)
    assert live.rewind(), "nothing has changed"
    live.release()
    assert trainer.step() == twin.step()
    assert trainer.step() == twin.step(), "no gradient of the interrupted step is left"


def test_tensor_that_is_being_read_is_not_changed(trainer: ExpertTrainer):
    live = trainer.live_snapshot()
    name, tensor = next(iter(live.parameters.items()))
    before = tensor.detach().clone()
    asked = threading.Event()
    stepping = threading.Thread(target=lambda: trainer.step(lambda: asked.set() or True))
    with live.reading(tensor) as values:
        stepping.start()
        assert asked.wait(60), "the update waits"
        assert torch.equal(values, before), name
    live.release()
    stepping.join(60)
    assert not torch.equal(tensor, before)


def test_live_snapshot_holds_no_copy(trainer: ExpertTrainer):
    live = trainer.live_snapshot()
    assert isinstance(live, LiveSnapshot)
    assert live.parameters[next(iter(live.parameters))] is next(trainer.model.parameters())
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert live.spare == parameters, "one byte per parameter"
    assert live.nbytes == 16 * parameters
    live.release()


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations within it have made and that are alive. `peak`: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return made


def traced(work: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that torch's operations, and that Python and numpy, held at once while `work` was done."""
    work()  # what is imported or cached at the first time is no part of it
    tracemalloc.start()
    try:
        with Allocations() as tensors:
            work()
        return tensors.peak, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_snapshot_and_restore_go_tensor_by_tensor(tmp_path: Path):
    wide = {"num_attention_heads": 2, "attention_head_dim": 96, "ffn_dim": 768, "num_layers": 2}
    manifest = tiny_manifest(expert=ExpertSpec(config={**WAN.config, **wide}))
    trainer = ExpertTrainer(manifest, 0, tiny_data())
    trainer.step()
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    held = traced(lambda: write_state(trainer.live_snapshot(), tmp_path / "state"))
    assert max(held) < count, "less than a byte a parameter above the live trainer"
    again = ExpertTrainer(manifest, 0, tiny_data())
    again.restore(0, local=tmp_path / "state")
    held = traced(lambda: again.restore(0, local=tmp_path / "state"))
    assert max(held) < 17 * count
    assert again.step() == trainer.step()
