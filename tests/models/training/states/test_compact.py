"""The compact form of a checkpoint: four bytes a number, from which author, successor and auditor go on alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import ValidationError

from lutetia.models.mixing.stitch import stitch
from lutetia.models.tensor_files import TensorFile, write_tensors
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights, published_schema, state_schema
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.moment_checks import check_moments
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.capabilities import COMPACT
from tests.models.tiny_experts import tiny_data, tiny_manifest

NARROW = MemoryOptions(moments="8bit", weights="bfloat16")


def compact(optimizer: str = "adamw", **fields):
    optimisation = {"learning_rate": 3e-3, "optimizer": optimizer}
    return tiny_manifest(optimisation=optimisation, checkpoints="compact", needs=(COMPACT,), **fields)


def write(trainer: ExpertTrainer, folder: Path, name: str) -> tuple[Path, Path]:
    live = trainer.live_snapshot()
    write_weights(live, folder / f"{name}.weights")
    write_state(live, folder / f"{name}.state", ema=False)
    live.release()
    return folder / f"{name}.weights", folder / f"{name}.state"


def epoch(trainer: ExpertTrainer) -> list[float]:
    return [trainer.step() for _ in range(trainer.manifest.steps_per_epoch)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertTrainer, Path, Path]:
    """The trainer at the end of its first epoch, and what it published."""
    trainer = ExpertTrainer(compact(), 0, tiny_data())
    epoch(trainer)
    return trainer, *write(trainer, tmp_path_factory.mktemp("compact"), "end")


def test_checkpoint_takes_a_quarter_of_the_plain_form(published: tuple[ExpertTrainer, Path, Path]):
    trainer, weights, state = published
    numbers = sum(parameter.numel() for parameter in trainer.model.parameters())
    size = 0
    for path in (weights, state):
        with TensorFile(path) as file:
            size += sum(file[name].nbytes for name in file if name != "trace")
    scales = sum(-(-parameter.numel() // 256) for parameter in trainer.model.parameters())
    assert size == 4 * numbers + 2 * scales


@pytest.mark.parametrize(
    ("optimizer", "memory", "precision"),
    [("adamw", PLAIN, "float32"), ("muon", PLAIN, "float32"), ("adamw", NARROW, "bfloat16")],
)
def test_author_successor_and_auditor_go_on_alike(tmp_path: Path, optimizer: str, memory: MemoryOptions, precision):
    manifest = compact(optimizer)
    author = ExpertTrainer(manifest, 0, tiny_data(), memory=memory, precision=precision)
    epoch(author)
    parent = write(author, tmp_path, "parent")
    check_weights(parent[0], manifest.expert_of(0), "compact")
    check_state(parent[1], manifest.expert_of(0), manifest.optimisation, "compact", parent[0])
    check_moments(parent[1], manifest.optimisation, "compact", parent[0])
    successor = ExpertTrainer(manifest, 0, tiny_data(), memory=memory, precision=precision)
    successor.restore(1, *parent)
    assert epoch(author) == epoch(successor)
    end = write(author, tmp_path, "end")
    assert [path.read_bytes() for path in write(successor, tmp_path, "other")] == [path.read_bytes() for path in end]
    found = replay(manifest, 0, tiny_data(), ReplayParent(1, *parent), 1, end=ReplayEnd(*end), memory=memory, precision=precision)
    assert found.drift == 0
    unmoved = replay(
        manifest, 0, tiny_data(), ReplayParent(1, *parent), 1, end=ReplayEnd(*parent), memory=memory, precision=precision
    )
    assert unmoved.drift
    assert unmoved.drift > 0.7, "an epoch that was not trained"


def test_compact_training_stays_close_to_plain_training():
    plain = ExpertTrainer(tiny_manifest(optimisation={"learning_rate": 3e-3}), 0, tiny_data())
    slim = ExpertTrainer(compact(run=plain.manifest.run_id, version=2), 0, tiny_data())
    before = plain.snapshot().parameters
    assert epoch(plain) == epoch(slim), "nothing is rounded within an epoch"
    assert epoch(plain) == pytest.approx(epoch(slim), rel=0.05), "without its first moments the second begins more slowly"
    ends = plain.snapshot().parameters, slim.snapshot().parameters
    moved = sum(torch.dist(ends[0][name], before[name]) ** 2 for name in before) ** 0.5
    assert sum(torch.dist(ends[0][name], ends[1][name]) ** 2 for name in before) ** 0.5 < 0.3 * moved


def test_raw_loss_is_that_of_the_trained_numbers(published: tuple[ExpertTrainer, Path, Path]):
    trainer, weights, state = published
    raw = holdout_loss(trainer.manifest, 0, state, tiny_data(3), raw=True, averages=weights, draw="x")
    averaged = holdout_loss(trainer.manifest, 0, weights, tiny_data(3), draw="x")
    assert raw.loss != averaged.loss
    assert raw.loss == pytest.approx(averaged.loss, rel=0.2)


def test_expert_of_a_mixture_loads_alone(published: tuple[ExpertTrainer, Path, Path], tmp_path: Path):
    trainer, weights, _ = published
    manifest = compact(shards=1)
    shutil.copy(weights, tmp_path / "weights")
    stitch(tmp_path / "mixture", manifest, [tmp_path / "weights"], None)
    expert = WanTransformer3DModel.from_pretrained(tmp_path / "mixture" / "expert_000", torch_dtype=torch.float32)
    average = trainer.snapshot().weights
    assert all(torch.equal(tensor, average[name]) for name, tensor in expert.state_dict().items())


@pytest.mark.parametrize("fault", ["plain weights", "no moments", "overflow", "nan", "one nan", "least exponent", "zero block"])
def test_file_that_is_not_a_compact_checkpoint_is_refused(
    published: tuple[ExpertTrainer, Path, Path], tmp_path: Path, fault: str
):
    trainer, weights, state = published
    manifest = trainer.manifest
    with TensorFile(weights) as file:
        averages = dict(file)
    with TensorFile(state) as file:
        tensors, document = dict(file), file.document
    name = next(name for name in tensors if name.startswith("scale.param."))
    if fault == "plain weights":
        averages = {each: tensor.float() for each, tensor in averages.items()}
    elif fault == "no moments":
        tensors = {each: tensor for each, tensor in tensors.items() if "exp_avg_sq" not in each}
    elif fault == "overflow":
        tensors[name] = torch.full_like(tensors[name], 127)
    elif fault == "one nan":  # 0x7f is the one NaN of float8 e4m3 beside its negative
        codes = next(each for each in tensors if each.startswith("codes.adamw"))
        tensors[codes].view(torch.uint8).view(-1)[-1] = 0x7F
    elif fault == "least exponent":
        tensors[name][-1] = -128
    elif fault == "zero block":  # whose numbers are 0 whatever the exponent
        tensors[name.replace("scale.", "codes.")].zero_()
        tensors[name].fill_(-127)
    else:
        codes = next(each for each in tensors if each.startswith("codes.adamw"))
        tensors[codes] = torch.full(tensors[codes].shape, float("nan")).to(torch.float8_e4m3fn)
    write_tensors(tmp_path / "weights", averages)
    write_tensors(tmp_path / "state", tensors, document)

    def check() -> None:
        check_weights(tmp_path / "weights", manifest.expert_of(0), "compact")
        check_state(tmp_path / "state", manifest.expert_of(0), manifest.optimisation, "compact", tmp_path / "weights")

    with pytest.raises(CheckpointMisfit):
        check()


def test_plain_run_takes_no_compact_weights(published: tuple[ExpertTrainer, Path, Path]):
    trainer, weights, _ = published
    spec = trainer.manifest.expert_of(0)
    with pytest.raises(CheckpointMisfit, match="BF16 instead of F32"):
        check_weights(weights, spec)
    check_weights(weights, spec, None)


def test_manifest_says_that_peers_must_know_the_form():
    with pytest.raises(ValidationError, match="need the capability compact-checkpoints"):
        tiny_manifest(checkpoints="compact")
    assert "checkpoints" not in tiny_manifest().model_dump(mode="json"), "an older peer reads a plain manifest as before"


def test_expert_of_1_3_billion_publishes_less_than_6_gb():
    from tests.models.training.memory.test_plan import WAN_1_3B

    manifest = compact(expert=WAN_1_3B)
    required, _ = state_schema(WAN_1_3B, manifest.optimisation, "compact")
    size = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for shape, dtype in (*published_schema(WAN_1_3B, "compact").values(), *required.values())
    )
    assert 5e9 < size < 6e9
