"""Killing, moving or splitting a training does not change its weights. Also schedule, EMA, warm start and refusals."""

import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lutetia.models.experts.families import build_expert
from lutetia.models.training.batches import Batches, BatchesAhead
from lutetia.models.training.memory.options import MemoryOptions
from lutetia.models.training.muon import Muon, orthogonalise
from lutetia.models.training.optimisers import LAST_RATE, Ema, ema_decay, hidden_matrices, learning_rate
from lutetia.models.training.trainer import ExpertTrainer, TrainingDiverged, write_state, write_weights
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system import tether
from lutetia.system.errors import ConfigError, DataError, IntegrityError
from tests.child_environment import child_environment
from tests.models.tiny_experts import CONFIGS, WAN, tiny_data, tiny_manifest

HERE = Path(__file__).parent


def steps(trainer: ExpertTrainer, count: int) -> list[float]:
    return [trainer.step() for _ in range(count)]


def weights_bytes(trainer: ExpertTrainer, folder: Path) -> bytes:
    write_weights(trainer.snapshot(), folder / "w")
    return (folder / "w").read_bytes()


def child(folder: Path, optimizer: str, micro_batch: int) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(HERE / "trainer_process.py"), str(folder), optimizer, str(micro_batch)]
    return subprocess.Popen(
        [*tether.command(command[0]), *command[1:]], env=child_environment(), stdout=subprocess.PIPE, text=True
    )


def test_sigkill_and_resume_end_with_equal_bytes(tmp_path) -> None:
    """A killed and resumed process against an undisturbed training in this one. Muon is used together with AdamW."""
    killed = child(tmp_path, "muon", 3)
    assert killed.stdout
    for _ in range(random.randint(1, 10)):  # of 12 steps; the epoch ends after the sixth
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert not (tmp_path / "weights.safetensors").exists()
    resumed = child(tmp_path, "muon", 3)
    whole = ExpertTrainer(tiny_manifest(optimisation={"optimizer": "muon"}), 1, tiny_data(), micro_batch=3)
    steps(whole, 12)
    write_state(whole.snapshot(), tmp_path / "state")
    resumed.communicate(timeout=600)
    assert resumed.returncode == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == weights_bytes(whole, tmp_path)
    assert (tmp_path / "local.safetensors").read_bytes() == (tmp_path / "state").read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_after_every_step_changes_nothing(optimizer, tmp_path) -> None:
    """A trainer that resumes within an epoch keeps its micro-batch, even if it is asked for another."""
    manifest = tiny_manifest(optimisation={"optimizer": optimizer})
    whole = ExpertTrainer(manifest, 0, tiny_data(), micro_batch=3)
    relay = ExpertTrainer(manifest, 0, tiny_data(), micro_batch=3)
    for step in range(12):
        whole.step()
        relay.step()
        write_state(relay.snapshot(), tmp_path / "local")
        assert f"step {(step + 1) % 6}" in relay.restore((step + 1) // 6, local=tmp_path / "local")
    assert weights_bytes(relay, tmp_path) == weights_bytes(whole, tmp_path)
    steps(relay, 2)
    write_state(relay.snapshot(), tmp_path / "local")
    successor = ExpertTrainer(manifest, 0, tiny_data(), micro_batch=4)
    successor.restore(2, local=tmp_path / "local")
    assert successor.micro_batch == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema", [True, False])
def test_accepted_checkpoint_continues_on_another_node(optimizer, ema, device, tmp_path) -> None:
    manifest = tiny_manifest(optimisation={"optimizer": optimizer})
    there, here = (ExpertTrainer(manifest, 0, tiny_data(), device=device) for _ in range(2))
    steps(there, 6)
    assert there.at_epoch_end
    snapshot = there.snapshot()
    write_weights(snapshot, tmp_path / "weights")
    write_state(snapshot, tmp_path / "state", ema=ema)
    steps(there, 3)
    assert "accepted epoch 1" in here.restore(1, tmp_path / "weights", tmp_path / "state")
    assert (here.epoch, here.step_in_epoch, here.samples, here.trace) == (1, 0, 24, [])
    steps(here, 3)
    assert here.trace == there.trace
    assert weights_bytes(here, tmp_path) == weights_bytes(there, tmp_path)


def test_snapshot_is_a_copy_with_its_place_in_the_run() -> None:
    trainer = ExpertTrainer(tiny_manifest(), 0, tiny_data())
    steps(trainer, 5)
    middle = trainer.snapshot()
    before = {name: tensor.clone() for name, tensor in middle.parameters.items()}
    steps(trainer, 1)
    assert all(torch.equal(middle.parameters[name], tensor) for name, tensor in before.items())
    end = trainer.snapshot()
    assert (middle.epoch, middle.step, middle.samples) == (0, 5, 20)
    assert (end.epoch, end.step, end.samples, end.trace) == (1, 0, 24, trainer.trace)
    assert len(end.trace) == 6
    steps(trainer, 1)
    assert (trainer.epoch, trainer.step_in_epoch, len(trainer.trace)) == (1, 1, 1)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_only_rounding(micro_batch, device) -> None:
    whole, split = (
        ExpertTrainer(tiny_manifest(), 0, tiny_data(), device=device, micro_batch=size) for size in (None, micro_batch)
    )
    assert steps(whole, 4) == pytest.approx(steps(split, 4), rel=1e-5)
    pairs = zip(whole.model.parameters(), split.model.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_without_moments_continues_alike_after_a_restart(tmp_path, optimizer) -> None:
    """A trainer that continues and one that replays it from its published state must agree, whatever state they started from."""
    manifest = tiny_manifest(optimisation={"optimizer": optimizer, "beta2": 0.999}, samples_per_shard=96)
    author = ExpertTrainer(manifest, 0, tiny_data())
    steps(author, 6)
    write_state(replace(author.snapshot(), moments={}), tmp_path / "stripped")
    here, there = (ExpertTrainer(manifest, 0, tiny_data()) for _ in range(2))
    for trainer in (here, there):
        trainer.restore(1, state=tmp_path / "stripped")
        steps(trainer, 6)
    write_state(here.snapshot(), tmp_path / "own")
    there.restore(2, state=tmp_path / "own")
    assert steps(here, 6) == steps(there, 6)
    assert weights_bytes(here, tmp_path) == weights_bytes(there, tmp_path)


def test_epoch_on_two_kinds_of_device_is_of_kind_other(tmp_path) -> None:
    begun = ExpertTrainer(tiny_manifest(), 0, tiny_data())
    steps(begun, 2)
    write_state(replace(begun.snapshot(), device="cuda"), tmp_path / "s")
    trainer = ExpertTrainer(tiny_manifest(), 0, tiny_data())
    trainer.restore(0, local=tmp_path / "s")
    steps(trainer, 2)
    write_state(trainer.snapshot(), tmp_path / "s")
    trainer.restore(0, local=tmp_path / "s")
    steps(trainer, 2)
    assert trainer.at_epoch_end
    assert trainer.snapshot().device == "other"
    steps(trainer, 1)
    assert trainer.snapshot().device == "cpu"
    write_state(replace(begun.snapshot(), device=""), tmp_path / "s")
    trainer.restore(0, local=tmp_path / "s")
    assert trainer.snapshot().device == "cpu", "a file of an earlier version has no entry"


def test_gradient_checkpointing_changes_no_loss(device) -> None:
    options = {"device": device}
    plain, frugal = (
        ExpertTrainer(tiny_manifest(), 0, tiny_data(), memory=MemoryOptions(checkpointing=frugal), **options)
        for frugal in (False, True)
    )
    assert steps(plain, 3) == steps(frugal, 3)
    for name, tensor in plain.snapshot().parameters.items():
        assert torch.equal(tensor, frugal.snapshot().parameters[name]), name


@pytest.mark.parametrize("class_name", sorted(CONFIGS))
def test_gradient_checkpointing_changes_no_bit_of_any_class(class_name: str) -> None:
    manifest = tiny_manifest(expert=ExpertSpec(class_name=class_name, config=CONFIGS[class_name]))
    ends = []
    for frugal in (False, True):
        trainer = ExpertTrainer(manifest, 0, tiny_data(), memory=MemoryOptions(checkpointing=frugal))
        steps(trainer, 2)
        ends.append(trainer.snapshot())
    for name, tensor in ends[0].parameters.items():
        assert torch.equal(tensor, ends[1].parameters[name]), name


def test_bfloat16_trains_close_to_float32() -> None:
    exact, rough = (ExpertTrainer(tiny_manifest(), 0, tiny_data(), precision=p) for p in ("float32", "bfloat16"))
    assert steps(exact, 3) == pytest.approx(steps(rough, 3), rel=0.03)


def test_training_on_few_clips_lowers_their_loss() -> None:
    data = tiny_data(4, offset=1.0)
    trainer = ExpertTrainer(
        tiny_manifest(samples_per_shard=480, checkpoint_samples=480, optimisation={"learning_rate": 1e-2}), 0, data
    )
    losses = steps(trainer, 100)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_learning_rate_follows_its_schedule() -> None:
    optimisation = Optimisation(learning_rate=2.0, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(optimisation, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3)
    assert max(rates) <= 2.0
    assert rates[50] == pytest.approx(2.0 * (1 + LAST_RATE) / 2)
    assert rates[100] == pytest.approx(2.0 * LAST_RATE)
    flat = Optimisation(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(flat, step, 100) for step in range(100)} == {2.0}


def test_ema_follows_its_definition() -> None:
    model = build_expert(WAN, 0)
    live = model.get_parameter("proj_out.weight").detach()
    ema, expected = Ema(model), live.clone()
    for step in range(3):
        live += 1.0
        decay = ema_decay(Optimisation(ema_decay=0.9), step)
        ema.update(decay)
        expected = decay * expected + (1 - decay) * live
    assert torch.allclose(ema.weights["proj_out.weight"], expected, atol=1e-6)
    assert ema_decay(Optimisation(ema_decay=0.9), 0) == pytest.approx(2 / 11)
    assert ema_decay(Optimisation(ema_decay=0.9), 10_000) == 0.9


def test_muon_trains_hidden_matrices_only() -> None:
    hidden = hidden_matrices(build_expert(WAN, 0))
    assert "blocks.0.attn1.to_q.weight" in hidden
    assert "blocks.0.ffn.net.2.weight" in hidden
    assert not any("embed" in name or name.startswith("proj_out") or name.endswith("bias") for name in hidden)


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_muon_agrees_with_torchs_muon(shape) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape) * k) for k in (1.0, 2.0)] for _ in range(2))
    pair = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.95)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape, generator=generator)
            b.grad = a.grad.clone()
        for optimiser in pair:
            optimiser.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 0.02
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(3, *shape, generator=generator)))
    assert singular.min() > 0.3
    assert singular.max() < 1.3


def test_warm_start_uses_given_weights_and_new_moments(tmp_path) -> None:
    manifest = tiny_manifest()
    base = ExpertTrainer(manifest, 0, tiny_data())
    steps(base, 4)
    given = base.snapshot().weights
    write_weights(base.snapshot(), tmp_path / "init")
    trainer = ExpertTrainer(manifest, 1, tiny_data())
    assert "given weights" in trainer.restore(0, weights=tmp_path / "init")
    snapshot = trainer.snapshot()
    assert all(torch.equal(tensor, given[name]) for name, tensor in snapshot.parameters.items())
    assert all(torch.equal(tensor, given[name]) for name, tensor in snapshot.ema.items())
    assert snapshot.moments == {}


def test_damaged_or_foreign_local_state_is_not_used(tmp_path, caplog) -> None:
    manifest = tiny_manifest()
    fresh = ExpertTrainer(manifest, 0, tiny_data()).snapshot().weights
    trainer = ExpertTrainer(manifest, 0, tiny_data())
    steps(trainer, 2)
    write_state(trainer.snapshot(), tmp_path / "good")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    other = ExpertTrainer(manifest, 1, tiny_data())
    for shard, name in ((0, "cut"), (1, "good")):
        target = trainer if shard == 0 else other
        assert "seeded initial weights" in target.restore(0, local=tmp_path / name)
        assert "is not used" in caplog.text
        caplog.clear()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in trainer.snapshot().parameters.items())


def test_restore_from_unfit_files_is_refused(tmp_path) -> None:
    manifest = tiny_manifest()
    trainer = ExpertTrainer(manifest, 0, tiny_data())
    steps(trainer, 2)
    write_state(trainer.snapshot(), tmp_path / "middle")
    write_state(trainer.snapshot(), tmp_path / "without", ema=False)
    with pytest.raises(ConfigError, match="epoch 1 of shard 0 has no accepted state"):
        trainer.restore(1)
    with pytest.raises(IntegrityError, match="is of epoch 0, step 2, not of epoch 1"):
        trainer.restore(1, state=tmp_path / "middle")
    with pytest.raises(IntegrityError, match="not of shard 1 of this run"):
        ExpertTrainer(manifest, 1, tiny_data()).restore(0, state=tmp_path / "middle")
    with pytest.raises(DataError, match="has 3 clips, fewer than a batch of 4"):
        ExpertTrainer(manifest, 0, tiny_data(3))


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a file system of its own")
def test_full_disk_raises_and_keeps_the_last_state(tmp_path) -> None:
    """On a tmpfs of 600 kB, which has room for one state but not for two."""
    mount = 'mount -t tmpfs -o size=600k tmpfs "$2" || exit 77; exec "$0" "$1" "$2"'
    child = [sys.executable, str(HERE / "full_disk_process.py"), str(tmp_path)]
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, *child]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip("users of this machine cannot mount file systems")
    assert done.returncode == 0, done.stderr
    assert "no space left on device; free space" in done.stdout
    assert done.stdout.strip().endswith("1")


def test_batches_made_ahead_are_the_same() -> None:
    manifest, data = tiny_manifest(), tiny_data()
    batches = Batches(manifest, 0, data)
    ahead = BatchesAhead(batches, manifest.steps_per_epoch, torch.device("cuda"))
    for epoch, step in [(0, 0), (0, 1), (0, 5), (1, 0), (1, 1), (0, 3)]:
        made, expected = ahead.take(epoch, step), batches.at(epoch, step)
        assert torch.equal(made.noise, expected.noise)
        assert torch.equal(made.latents, expected.latents)


def test_divergence_raises(device) -> None:
    data = tiny_data()
    data.latents[:] = float("nan")
    with pytest.raises(TrainingDiverged, match="shard 0 diverged at step 0"):
        ExpertTrainer(tiny_manifest(), 0, data, device=device).step()
