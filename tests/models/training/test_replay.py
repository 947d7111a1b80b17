"""Replays of real training: an honest author is never called invalid, and one that did not train always is."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lutetia.coordinator.acceptance.audit_comparison import (
    BFLOAT16_CPU,
    BFLOAT16_OTHER,
    FLOAT32_CPU,
    FLOAT32_OTHER,
    compare,
    tolerance,
)
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.replay import ReplayDoubt, ReplayEnd, ReplayParent, read_trace, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.records import TrainedWith
from lutetia.system.errors import IntegrityError
from tests.child_environment import child_environment
from tests.models.tiny_experts import CONFIGS, tiny_data, tiny_manifest

CPU = TrainedWith()
MANIFEST = tiny_manifest(samples_per_shard=96, checkpoint_samples=48)  # epochs of 12 steps


def author(folder: Path, **options) -> tuple[ReplayParent, ReplayEnd, list[float]]:
    """Two epochs: the first is the parent, the second is audited."""
    trainer = ExpertTrainer(MANIFEST, 0, tiny_data(), **options)
    for name in ("parent", "end"):
        for _ in range(MANIFEST.steps_per_epoch):
            trainer.step()
        write_weights(trainer.snapshot(), folder / f"{name}.weights")
        write_state(trainer.snapshot(), folder / f"{name}.state", ema=False)
    return parent_of(folder), ReplayEnd(folder / "end.weights", folder / "end.state"), trainer.trace


def parent_of(folder: Path) -> ReplayParent:
    return ReplayParent(1, folder / "parent.weights", folder / "parent.state")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"micro_batch": 3}, {"precision": "bfloat16"}])
@pytest.mark.parametrize("whole", [False, True])
def test_honest_author_is_valid_with_any_micro_batch(tmp_path, options, whole):
    parent, end, trace = author(tmp_path, **options)
    precision = options.get("precision", "float32")
    replayed = replay(MANIFEST, 0, tiny_data(), parent, 4, end=end if whole else None, precision=precision)
    assert len(replayed.losses) == (12 if whole else 4)
    finding = compare(trace, replayed.losses, replayed.drift, TrainedWith(precision=precision), replayed.made)
    assert finding.outcome == "valid", finding.text
    if not options:
        assert list(replayed.losses) == trace[: len(replayed.losses)], "bit by bit on the same processor"
        assert replayed.drift in (None, 0.0)


def test_author_on_an_accelerator_and_auditor_on_the_cpu_agree_both_ways(tmp_path, device):
    parent, end, trace = author(tmp_path, device=device)
    for here in ("cpu", device):
        replayed = replay(MANIFEST, 0, tiny_data(), parent, 12, end=end, device=here)
        assert replayed.made.device == ("cpu" if here == "cpu" else "other")
        finding = compare(trace, replayed.losses, replayed.drift, TrainedWith(device=replayed.made.device), replayed.made)
        assert finding.outcome == "valid", finding.text


def test_other_threads_and_instruction_sets_are_valid(tmp_path):
    """The author is another process, with two threads and without vector instructions."""
    environment = child_environment(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", OMP_NUM_THREADS="2")
    code = "import sys, pathlib, torch; torch.set_num_threads(2); from tests.models.training.test_replay import author\n"
    code += "print(author(pathlib.Path(sys.argv[1]))[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    trace = [float(loss) for loss in done.stdout.strip().strip("[]").split(",")]
    end = ReplayEnd(tmp_path / "end.weights", tmp_path / "end.state")
    replayed = replay(MANIFEST, 0, tiny_data(), parent_of(tmp_path), 4, end=end)
    finding = compare(trace, replayed.losses, replayed.drift, CPU, replayed.made)
    assert finding.outcome == "valid", finding.text


def test_invented_trace_is_invalid_and_names_the_step(tmp_path):
    parent, _, trace = author(tmp_path)
    replayed = replay(MANIFEST, 0, tiny_data(), parent, 4)
    invented = [*trace[:2], trace[2] * 1.05, *trace[3:]]
    finding = compare(invented, replayed.losses, None, CPU, replayed.made)
    assert finding.outcome == "invalid"
    assert "step 2" in finding.text
    assert f"{invented[2]:.6g}" in finding.text
    assert f"{replayed.losses[2]:.6g}" in finding.text
    assert "1e-04" in finding.text
    assert compare(trace[:3], replayed.losses, None, CPU, replayed.made).outcome == "invalid", "too short a trace"


def test_author_of_only_the_first_steps_fails_a_whole_replay(tmp_path):
    """The author publishes the parent as its end, with a trace that is honest for the steps that are usually replayed."""
    parent, end, trace = author(tmp_path)
    assert parent.weights
    assert parent.state
    fake = [*trace[:4], *(loss * 1.3 for loss in trace[4:])]
    part = replay(MANIFEST, 0, tiny_data(), parent, 4)
    assert compare(fake, part.losses, part.drift, CPU, part.made).outcome == "valid", "a short replay cannot notice"
    whole = replay(MANIFEST, 0, tiny_data(), parent, 4, end=ReplayEnd(parent.weights, parent.state))
    assert whole.drift is not None
    assert whole.drift > 0.9
    assert compare(fake, whole.losses, whole.drift, CPU, whole.made).outcome == "invalid"
    finding = compare(trace, whole.losses, whole.drift, CPU, whole.made)
    assert finding.outcome == "invalid", "honest losses with another end"
    assert "distance of its end from the replay" in finding.text


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", "adamw.exp_avg."), ("muon", "muon.momentum_buffer.")])
def test_crafted_moments_with_honest_weights_are_invalid_whatever_the_device(tmp_path, optimizer: str, kind: str):
    manifest = tiny_manifest(samples_per_shard=24, checkpoint_samples=24, optimisation={"optimizer": optimizer})
    trainer, data, found = ExpertTrainer(manifest, 0, tiny_data()), tiny_data(), []
    while not trainer.at_epoch_end:
        trainer.step()
    snapshot = trainer.snapshot()
    write_weights(snapshot, tmp_path / "weights")
    for name in ("honest", "crafted"):
        write_state(snapshot, tmp_path / name, ema=False)
        found.append(replay(manifest, 0, data, ReplayParent(0), 1, end=ReplayEnd(tmp_path / "weights", tmp_path / name)))
        snapshot.moments = {key: -value if key.startswith(kind) else value for key, value in snapshot.moments.items()}
    honest, crafted = found
    assert (honest.drift, crafted.farthest) == (0.0, "moments")
    for claimed in (CPU, TrainedWith(device="other", precision="bfloat16")):
        finding = compare(trainer.trace, crafted.losses, crafted.drift, claimed, crafted.made, part="moments")
        assert finding.outcome == "invalid", finding.text
        assert "its moments" in finding.text


def test_published_tensors_that_are_never_trained_are_compared_too(tmp_path):
    """Learned positions of CogVideoX are a buffer: in the published weights, in no state, and without a gradient."""
    config = CONFIGS["CogVideoXTransformer3DModel"] | {
        "use_learned_positional_embeddings": True,
        "use_rotary_positional_embeddings": True,
    }
    expert = ExpertSpec(class_name="CogVideoXTransformer3DModel", config=config)
    manifest, data = tiny_manifest(expert=expert, samples_per_shard=4, checkpoint_samples=4), tiny_data()
    trainer = ExpertTrainer(manifest, 0, data)
    trainer.step()
    snapshot, parent, ends = trainer.snapshot(), ReplayParent(0), []
    for name in ("honest", "tampered"):
        write_weights(snapshot, tmp_path / f"{name}.weights")
        write_state(snapshot, tmp_path / f"{name}.state", ema=False)
        end = ReplayEnd(tmp_path / f"{name}.weights", tmp_path / f"{name}.state")
        ends.append(replay(manifest, 0, data, parent, 1, end=end))
        snapshot.buffers["patch_embed.pos_embedding"] += 1.0
    assert (ends[0].drift, ends[1].farthest) == (0.0, "averages")
    assert compare(trainer.trace, ends[1].losses, ends[1].drift, CPU, ends[1].made).outcome == "invalid"


def test_replay_from_the_beginning_needs_no_files(tmp_path):
    trainer = ExpertTrainer(MANIFEST, 0, tiny_data())
    losses = [trainer.step() for _ in range(4)]
    assert replay(MANIFEST, 0, tiny_data(), ReplayParent(0), 4).losses == tuple(losses)
    assert len(replay(MANIFEST, 0, tiny_data(), ReplayParent(0), 99).losses) == 12, "no more than an epoch"


def test_diverging_replay_is_inconclusive():
    assert compare([1.0, 1.0], [1.0, math.nan], None, CPU, CPU).outcome == "inconclusive"
    assert compare([1.0], [], None, CPU, CPU).outcome == "inconclusive"
    assert compare([1.0, math.inf], [1.0, 1.0], None, CPU, CPU).outcome == "invalid"


made = st.builds(
    TrainedWith, device=st.sampled_from(["cpu", "cuda", "mps", "other"]), precision=st.sampled_from(["float32", "bfloat16"])
)


@settings(max_examples=200)
@given(made, made)
def test_tolerance_is_bounded_for_every_claimed_device(author, auditor):
    bounds = tolerance(author, auditor)
    assert bounds in (FLOAT32_CPU, BFLOAT16_CPU, FLOAT32_OTHER, BFLOAT16_OTHER)
    for near, far in (bounds.first, bounds.later, bounds.drift):
        assert 0 < near < far
    assert bounds.first[1] <= 0.1
    assert bounds.drift[1] < 0.9, "not training is a drift of 1"
    assert bounds.first[1] / bounds.first[0] == pytest.approx(bounds.later[1] / bounds.later[0]), "the worst step decides"
    assert compare([2.0] * 4, [1.0] * 4, None, author, auditor).outcome == "invalid"
    assert compare([1.0] * 4, [1.0] * 4, 0.0, author, auditor).outcome == "valid"
    assert compare([1.0] * 4, [1.0] * 4, math.nan, author, auditor).outcome == "invalid"


losses = st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4)


@settings(max_examples=200)
@given(made, made, losses, losses)
def test_claimed_device_never_turns_invalid_into_valid(author, auditor, published, replayed):
    """A trace that is invalid for a node of the coordinator's kind never passes a short replay, whatever device is claimed."""
    if compare(published, replayed, None, CPU, CPU).outcome == "invalid":
        finding = compare(published, replayed, None, author, auditor)
        assert finding.outcome == "invalid" or finding.closer
        assert not finding.doubt


@settings(max_examples=200)
@given(made, made, st.floats(0, 2), st.none() | st.floats(0, 1))
def test_epoch_noise_decides_only_between_the_bounds(author, auditor, drift, noise):
    bounds = tolerance(author, auditor)
    (near, far), (alike, apart) = bounds.drift, bounds.noise
    finding = compare([1.0] * 4, [1.0] * 4, drift, author, auditor, noise)
    if drift <= near or drift > far:
        assert finding == compare([1.0] * 4, [1.0] * 4, drift, author, auditor)
        assert finding.outcome == ("valid" if drift <= near else "invalid")
    elif noise is None:
        assert (finding.outcome, finding.doubt) == ("inconclusive", True)
    else:
        expected = "valid" if drift <= alike * noise else "invalid" if drift > apart * noise else "inconclusive"
        assert (finding.outcome, finding.doubt) == (expected, expected == "inconclusive")


def halfway(folder: Path, parent: ReplayParent) -> ReplayEnd:
    """The end of an author that trains half of the second epoch."""
    trainer = ExpertTrainer(MANIFEST, 0, tiny_data())
    trainer.restore(parent.epoch, parent.weights, parent.state)
    for _ in range(MANIFEST.steps_per_epoch // 2):
        trainer.step()
    write_weights(trainer.snapshot(), folder / "half.weights")
    write_state(trainer.snapshot(), folder / "half.state", ema=False)
    return ReplayEnd(folder / "half.weights", folder / "half.state")


@pytest.mark.parametrize("claimed", [CPU, TrainedWith(device="other", precision="bfloat16")], ids=str)
def test_half_trained_epoch_is_invalid_by_its_noise(tmp_path, claimed):
    parent, _, trace = author(tmp_path)
    bounds = tolerance(claimed, TrainedWith(precision=claimed.precision))
    doubt = ReplayDoubt(bounds.drift[0], 2.0, coarse=claimed != CPU)
    replayed = replay(
        MANIFEST, 0, tiny_data(), parent, 4, end=halfway(tmp_path, parent), precision=claimed.precision, doubt=doubt
    )  # fmt: skip
    assert replayed.drift is not None
    assert replayed.noise is not None
    assert 0.2 < replayed.drift < 0.8
    assert 0 < replayed.noise < (1e-4 if claimed == CPU else 0.02)
    finding = compare(trace, replayed.losses, replayed.drift, claimed, replayed.made, replayed.noise)
    assert finding.outcome == "invalid", finding.text


def test_noise_is_not_measured_without_doubt_or_second_way(tmp_path):
    parent, end, _ = author(tmp_path)
    assert replay(MANIFEST, 0, tiny_data(), parent, 4, end=end, doubt=ReplayDoubt(1e-3, 2.0, False)).noise is None
    base = ReplayEnd(parent.weights, parent.state)  # pyright: ignore[reportArgumentType]
    alone = replay(MANIFEST, 0, tiny_data(), parent, 4, end=base, micro_batch=1, doubt=ReplayDoubt(1e-3, 2.0, False))
    assert alone.drift is not None
    assert (alone.drift > 0.9, alone.noise) == (True, None), "micro-batches of one cannot be split further"


def test_malformed_trace_files_are_refused(tmp_path):
    write_tensors(tmp_path / "good", {"trace": torch.tensor([1.0, 2.0])})
    assert read_trace(tmp_path / "good") == (1.0, 2.0)
    for name, tensors in {
        "wide": {"trace": torch.zeros(2, 2)},
        "other": {"loss": torch.zeros(2)}, "double": {"trace": torch.zeros(2, dtype=torch.float64)},
    }.items():  # fmt: skip
        save_file(tensors, tmp_path / name)
        with pytest.raises(IntegrityError, match="not one row"):
            read_trace(tmp_path / name)
    (tmp_path / "junk").write_bytes(b"\xff" * 40)
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        read_trace(tmp_path / "junk")
