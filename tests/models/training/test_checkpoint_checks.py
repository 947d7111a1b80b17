"""Checkpoints of other peers: every kind of damage is refused with its own reason, and a good file passes."""

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lutetia.models.experts.families import build_expert
from lutetia.models.training.checkpoint_checks import MAX_HEADER_BYTES, CheckpointMisfit, check_state, check_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.trainer import ExpertTrainer, write_state, write_weights
from lutetia.protocol.schema.model.training_spec import Optimisation
from tests.models.tiny_experts import WAN, tiny_data, tiny_manifest

NAME = "blocks.0.attn1.to_q.weight"


@pytest.fixture
def good() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in build_expert(WAN, 1).state_dict().items()}


def reason_of(path: Path) -> str:
    with pytest.raises(CheckpointMisfit) as refusal:
        check_weights(path, WAN)
    assert path.name in str(refusal.value)
    assert len(str(refusal.value)) < 300
    return refusal.value.reason


def _nan(weights):
    weights[NAME][0, 0] = float("nan")


def _infinite(weights):
    weights[NAME][1, 1] = float("inf")


def _huge(weights):
    weights[NAME] *= 1e5


def _shape(weights):
    weights[NAME] = weights[NAME][:-1]


def _dtype(weights):
    weights[NAME] = weights[NAME].half()


def _extra(weights):
    weights["backdoor"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda weights: weights.pop(NAME), "missing"),
        (_extra, "extra"),
        (_shape, "shape"),
        (_dtype, "dtype"),
        (_nan, "non-finite"),
        (_infinite, "non-finite"),
        (_huge, "norm"),
    ],
)
def test_damaged_weights_are_refused_with_their_reason(good, damage, reason, tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(good, path)
    check_weights(path, WAN)
    damage(good)
    save_file(good, path)
    assert reason_of(path) == reason


def _with_header(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\2\3",
        _with_header(b"{}", MAX_HEADER_BYTES + 1, b"x" * 64),
        _with_header(b"{}", 1 << 62),
        _with_header(b"not json"),
        _with_header(b"[1, 2]"),
        _with_header(b'{"a": 3}'),
        _with_header(b"[" * 100_000),
    ],
)
def test_hostile_headers_are_refused(data, tmp_path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(data)
    assert reason_of(path) == "header"


def test_cut_file_or_false_offsets_are_refused(good, tmp_path) -> None:
    path = tmp_path / "cut"
    save_file(good, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert reason_of(path) == "header"
    path.write_bytes(whole + b"more")
    assert reason_of(path) == "header"
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header[NAME]["data_offsets"] = [0, 4]
    path.write_bytes(_with_header(json.dumps(header).encode(), body=whole[8 + size :]))
    assert reason_of(path) == "header"


@given(position=st.integers(0, 1 << 20), value=st.integers(0, 255))
@settings(max_examples=60)
def test_flipped_byte_passes_or_is_refused_cleanly(position, value, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    if not path.exists():
        save_file(build_expert(WAN, 1).state_dict(), path)
    whole = bytearray(path.read_bytes())
    flipped = path.with_name("flipped.now")
    whole[position % len(whole)] = value
    flipped.write_bytes(whole)
    with contextlib.suppress(CheckpointMisfit):
        check_weights(flipped, WAN)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_with_foreign_or_missing_tensors_is_refused(optimizer, tmp_path) -> None:
    manifest = tiny_manifest(optimisation={"optimizer": optimizer})
    trainer = ExpertTrainer(manifest, 0, tiny_data())
    for _ in range(2):
        trainer.step()
    snapshot = trainer.snapshot()
    write_state(snapshot, tmp_path / "state")
    check_state(tmp_path / "state", WAN, manifest.optimisation)
    snapshot.moments["sgd.velocity.x"] = torch.zeros(1)
    write_state(snapshot, tmp_path / "state")
    with pytest.raises(CheckpointMisfit, match="sgd.velocity.x"):
        check_state(tmp_path / "state", WAN, manifest.optimisation)
    del snapshot.moments["sgd.velocity.x"], snapshot.parameters[NAME]
    write_state(snapshot, tmp_path / "state")
    with pytest.raises(CheckpointMisfit, match="lacks 1 tensors"):
        check_state(tmp_path / "state", WAN, Optimisation(optimizer=optimizer))


KINDS = [("velocity", "linear"), ("sample", "linear"), ("epsilon", "vp_cosine"), ("velocity", "vp_cosine")]


@pytest.mark.parametrize(("prediction", "schedule"), KINDS)
def test_holdout_loss_is_deterministic_and_falls_with_training(prediction, schedule, tmp_path) -> None:
    spec = WAN.model_copy(update={"prediction": prediction, "noise_schedule": schedule})
    manifest = tiny_manifest(expert=spec, samples_per_shard=320, checkpoint_samples=320, optimisation={"learning_rate": 1e-2})
    holdout = tiny_data(6, seed=9, offset=1.0)
    trainer = ExpertTrainer(manifest, 0, tiny_data(offset=1.0))
    for _ in range(60):
        trainer.step()
    write_weights(trainer.snapshot(), tmp_path / "w")
    start, again, trained = (holdout_loss(manifest, 0, w, holdout) for w in (None, None, tmp_path / "w"))
    assert start == again
    assert trained.loss < 0.9 * start.loss
    assert len(trained.by_time) == 10
    assert sum(value is not None for value in trained.by_time) >= 6
