"""Several cards train one expert: as one card does, up to rounding; and anybody goes on from its files. Two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.models.training.units.split import Split
from lutetia.models.training.units.split_trainer import SplitTrainer
from lutetia.system import tether
from lutetia.system.errors import ConfigError
from tests.child_environment import child_environment
from tests.models.tiny_experts import tiny_data, tiny_manifest
from tests.models.training.units.rank_process import manifest_of

SCRIPT = Path(__file__).with_name("rank_process.py")
TOLERANCE = 1e-5
"""Of losses and weights against one card's: sums of float32 in another order."""


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """The files of a unit's runs, and the losses of each."""
    folder = tmp_path_factory.mktemp("unit")
    command = [*tether.command(sys.executable), str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True, timeout=400)
    assert done.returncode == 0
    losses: dict[str, list[float]] = {}
    for line in done.stdout.splitlines():
        name, loss = line.split()
        losses.setdefault(name, []).append(float(loss))
    return folder, losses


@pytest.mark.parametrize("run", ["float32", "compact", "pictures"])
def test_unit_trains_as_one_card_and_its_files_are_of_the_ordinary_form(
    unit: tuple[Path, dict[str, list[float]]], tmp_path: Path, run: str
):
    folder, losses = unit[0], unit[1][run]
    single = ExpertTrainer(manifest_of(run), 1, tiny_data(), micro_batch=2)
    single.restore(0)
    nearly = 2e-3 if run == "compact" else TOLERANCE
    assert losses == pytest.approx([single.step() for _ in range(12)], rel=nearly)
    write_weights(single.snapshot(), tmp_path / "weights")
    ours, theirs = load_file(folder / f"weights-{run}-2"), load_file(tmp_path / "weights")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        least = 2**-7 if run == "compact" else TOLERANCE
        torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=least, atol=least)
    successor = ExpertTrainer(manifest_of(run), 1, tiny_data(), micro_batch=2)
    successor.restore(1, folder / f"weights-{run}-1", folder / f"state-{run}-1")
    assert [successor.step() for _ in range(6)] == pytest.approx(losses[6:], rel=TOLERANCE), "one card goes on from its files"


def test_unit_that_resumes_in_its_own_layout_ends_with_equal_bytes(unit: tuple[Path, dict[str, list[float]]]):
    folder, losses = unit
    assert losses["again"] == losses["float32"][9:]
    for kind in ("weights", "state"):
        assert (folder / f"{kind}-again-2").read_bytes() == (folder / f"{kind}-float32-2").read_bytes()


def test_unit_refuses_what_does_not_go_with_several_cards():
    class Alone(SplitTrainer):
        def _placed(self, model: torch.nn.Module) -> torch.nn.Module:
            return model

    with pytest.raises(ConfigError, match="whole matrices"):
        Alone(Split(0, 2), tiny_manifest(optimisation={"optimizer": "muon"}), 1, tiny_data())
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        Alone(Split(0, 2), tiny_manifest(), 1, tiny_data(), precision="float16")


@pytest.mark.parametrize(("rows", "ranks"), [(5, 2), (2, 4), (1, 3), (8, 2)])
def test_parts_are_the_rows_of_each_rank_and_all_of_them_once(rows: int, ranks: int):
    whole = torch.arange(rows * 3.0).view(rows, 3)
    parts = [Split(rank, ranks).part(whole) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)
    chunks = whole.chunk(ranks)
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=False)), "as FSDP2 cuts them"
