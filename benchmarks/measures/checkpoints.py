"""What forms of a checkpoint cost in quality and what audits see of them, and how long a snapshot holds training up.

Every form is what a trainer's state is rounded to between epochs. The run is that of the audits' measurements. A cheater
publishes the parent with noise in place of an epoch's end.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from benchmarks.measures.audit_process import data, manifest
from benchmarks.report import Row
from lutetia.models.data.shards import ShardData
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.memory.options import PLAIN, MemoryOptions
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.states.eight_bit import pack_float, unpack
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.capabilities import COMPACT
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec

SEEDS, EPOCHS, HELD_OUT = 3, 4, 24
LARGE = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
    "text_dim": 256, "freq_dim": 256, "ffn_dim": 3072, "num_layers": 17, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
"""165 million parameters."""

Rounding = Callable[[ExpertTrainer], None]


def _nothing(trainer: ExpertTrainer) -> None:
    """The plain form, 16 bytes a number."""


def _bfloat16(trainer: ExpertTrainer) -> None:
    """Weights and averages in bfloat16, no moments: 4 bytes a number."""
    with torch.no_grad():
        for name, parameter in trained_parameters(trainer.model).items():
            parameter.copy_(parameter.bfloat16())
            average = trainer._ema.weights[name]
            average.copy_(average.bfloat16())
    trainer._optimiser.load({}, trainer.steps)


def _no_moments(trainer: ExpertTrainer) -> None:
    """Set both moments to zero. A checkpoint then has 8 bytes a number."""
    trainer._optimiser.load({}, trainer.steps)


def _first_moment_too(trainer: ExpertTrainer) -> None:
    """The compact form with the first moment in 8 bits: 5 bytes a number."""
    kept = {name: unpack(pack_float(tensor)) for name, tensor, _ in trainer._optimiser.state() if ".exp_avg." in name}
    trainer._optimiser.settle(trainer._ema.weights)
    for name, tensor, _ in trainer._optimiser.state():
        if name in kept:
            tensor.copy_(kept[name])


def _compact(trainer: ExpertTrainer) -> None:
    trainer._optimiser.settle(trainer._ema.weights)


FORMS: dict[str, Rounding] = {
    "plain, 16 B a number": _nothing,
    "compact, 4.03 B": _compact,
    "compact and the first moment, 5.03 B": _first_moment_too,
    "bfloat16 and no moments, 4 B": _bfloat16,
    "float32 without moments, 8 B": _no_moments,
}


def run() -> list[Row]:
    torch.set_num_threads(1)
    return [*_quality(), *_audits(), *_snapshot()]


def _run(seed: int, **changes: object) -> Manifest:
    given = manifest("adamw")
    return given.model_copy(update={"run": f"{seed:064x}", "samples_per_shard": EPOCHS * given.checkpoint_samples, **changes})


def _quality() -> list[Row]:
    """Held-out loss of the averages after EPOCHS epochs, as a difference from the plain form with the same seed."""
    losses: dict[str, list[float]] = {}
    clips = data()
    held, taught = _part(clips, slice(0, HELD_OUT)), _part(clips, slice(HELD_OUT, None))
    for seed in range(SEEDS):
        for name, rounding in FORMS.items():
            trainer = ExpertTrainer(_run(seed), 0, taught)
            for step in range(EPOCHS * trainer.manifest.steps_per_epoch):
                trainer.step()
                if (step + 1) % trainer.manifest.steps_per_epoch == 0:
                    rounding(trainer)
            with tempfile.TemporaryDirectory() as folder:
                write_weights(trainer.snapshot(), Path(folder, "weights"))
                losses.setdefault(name, []).append(
                    holdout_loss(trainer.manifest, 0, Path(folder, "weights"), held, draw="one").loss
                )
    plain = losses[next(iter(FORMS))]
    rows = [Row.of(f"held-out loss, {next(iter(FORMS))}", plain, "", detail=f"{EPOCHS} epochs, {SEEDS} seeds")]
    for name in list(FORMS)[1:]:
        apart = [100 * (loss / base - 1) for loss, base in zip(losses[name], plain, strict=True)]
        rows.append(Row.of(f"held-out loss, {name}", apart, "%", detail="difference from plain, same seed"))
    return rows


def _part(clips: ShardData, rows: slice) -> ShardData:
    return ShardData(clips.latents[rows], clips.tokens[rows], clips.pooled[rows], clips.captions[rows], clips.kinds[rows])


def _audits() -> list[Row]:
    """The drift of an honest end in other arithmetic, and of a cheater's."""
    rows = []
    compact = {"checkpoints": "compact", "needs": (COMPACT,)}
    ways: dict[str, tuple[dict, MemoryOptions, str]] = {
        "plain": ({}, PLAIN, "float32"), "compact": (compact, PLAIN, "float32"),
        "plain, moments in 8 bits": ({}, MemoryOptions(moments="8bit"), "float32"),
        "compact, moments in 8 bits": (compact, MemoryOptions(moments="8bit"), "float32"),
        "compact, moments in 8 bits, weights in bfloat16": (
            compact, MemoryOptions(moments="8bit", weights="bfloat16"), "bfloat16",
        ),
    }  # fmt: skip
    for name, (changes, memory, precision) in ways.items():
        honest, cheat = [], []
        for seed in range(SEEDS):
            described, clips = _run(seed, **changes), data()
            how = {"memory": memory, "precision": precision}
            with tempfile.TemporaryDirectory() as folder:
                files = [Path(folder, file) for file in ("parent", "parent-state", "end", "end-state", "fake", "fake-state")]
                author = ExpertTrainer(described, 0, clips, **how)
                _epoch(author, *files[:2])
                _epoch(author, *files[2:4])
                faker = ExpertTrainer(described, 0, clips, **how)
                faker.restore(1, *files[:2])
                faker.epoch, faker.step_in_epoch = 1, described.steps_per_epoch
                with torch.no_grad():
                    for parameter in trained_parameters(faker.model).values():
                        parameter.add_(torch.randn_like(parameter), alpha=1e-3)
                if changes:
                    faker._optimiser.settle(faker._ema.weights)
                _write(faker, *files[4:])
                for ends, found in ((files[2:4], honest), (files[4:], cheat)):
                    parent, end = ReplayParent(1, *files[:2]), ReplayEnd(*ends)
                    drift = replay(described, 0, clips, parent, 1, end=end, micro_batch=1, **how).drift
                    assert drift is not None
                    found.append(drift)
        rows.append(Row.of(f"drift of an honest end, micro-batches of 1: {name}", honest, ""))
        rows.append(Row.of(f"drift of a cheater's end: {name}", cheat, ""))
    return rows


def _epoch(trainer: ExpertTrainer, weights: Path, state: Path) -> None:
    for _ in range(trainer.manifest.steps_per_epoch):
        trainer.step()
    _write(trainer, weights, state)


def _write(trainer: ExpertTrainer, weights: Path, state: Path) -> None:
    snapshot = trainer.snapshot()
    write_weights(snapshot, weights)
    write_state(snapshot, state, ema=False)


def _snapshot() -> list[Row]:
    """How long the step loop stands still while a checkpoint of 165 million parameters is written."""
    latent = LatentSpec(
        channels=16, frames=5, height=16, width=16, vae="pixels", pixel_frames=17, pixel_height=128, pixel_width=128,
        text_encoder="builtin:words", text_tokens=16, text_width=256, pooled_width=32,
    )  # fmt: skip
    described = _run(0, expert=ExpertSpec(config=LARGE), latent=latent)
    batch = described.optimisation.batch
    clips = ShardData(
        torch.randn(batch, *latent.shape), torch.randn(batch, 16, 256), torch.randn(batch, 32), [""] * batch, [""] * batch
    )
    trainer = ExpertTrainer(described, 0, clips, micro_batch=1)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.step()
    plain, still, written, memory = [], [], [], []
    for _ in range(3):
        began = time.perf_counter()
        with _Peak() as alone:
            trainer.step()
        plain.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder, _Peak() as beside:
            began = time.perf_counter()
            live = trainer.live_snapshot()
            taken = time.perf_counter() - began

            def write(live=live, folder=folder) -> None:
                began = time.perf_counter()
                write_weights(live, Path(folder, "weights"))
                write_state(live, Path(folder, "state"), ema=False)
                live.release()
                written.append(time.perf_counter() - began)

            thread = threading.Thread(target=write)
            thread.start()
            trainer.step()
            thread.join()
            still.append(1000 * (taken + live.waited))
        memory.append((beside.bytes - alone.bytes) / parameters)
    detail = f"{parameters / 1e6:.0f} million parameters; a step takes {statistics.median(plain):.1f} s"
    return [
        Row.of("the loop stands still for a snapshot", still, "ms", "≤ 50 ms", detail),
        Row.of("writing it beside the next step", written, "s"),
        Row.of("memory for it, at its peak", memory, "B a parameter", "≤ 1", "beside a step, above a step alone"),
        *_restore(trainer, described, clips),
    ]


def _restore(trainer: ExpertTrainer, described: Manifest, clips: ShardData) -> list[Row]:
    """Memory that a new trainer takes to go on from files, at its peak, above what it holds afterwards."""
    above = []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "weights"), Path(folder, "state")
        while not trainer.at_epoch_end:
            trainer.step()
        _write(trainer, *files)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        for _ in range(3):
            with _Peak() as peak:
                fresh = ExpertTrainer(described, 0, clips, micro_batch=1)
                fresh.restore(1, *files)
            above.append((peak.bytes - _resident()) / parameters)
            del fresh
    return [Row.of("memory for a restore, at its peak", above, "B a parameter", "≤ 17", "above the restored trainer")]


class _Peak:
    """The most memory that this process held inside a `with`, in bytes, looked at every 5 ms."""

    def __enter__(self) -> Self:
        self.bytes, self._ended = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, _resident())


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0
