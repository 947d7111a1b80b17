"""What checking one result costs: each check that reads or computes, in seconds and in training steps of the same expert."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measures.audit_process import LATENT, data, manifest
from benchmarks.report import Row
from lutetia.coordinator.settings import small_expert
from lutetia.models.data.shards import ShardData
from lutetia.models.training.checkpoint_checks import check_state, check_weights
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.models.training.moment_checks import check_moments
from lutetia.models.training.replay import ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.blobs.chunk_table import ChunkTable

HELD_OUT, REPEATS = 16, 3


def run() -> list[Row]:
    torch.set_num_threads(1)
    described = manifest("adamw")
    described = described.model_copy(update={"run": described.run_id, "expert": small_expert(LATENT)})
    clips = data()
    trainer = ExpertTrainer(described, 0, clips)
    steps = []
    for _ in range(described.steps_per_epoch):
        began = time.perf_counter()
        trainer.step()
        steps.append(time.perf_counter() - began)
    n = HELD_OUT
    held = ShardData(clips.latents[:n], clips.tokens[:n], clips.pooled[:n], clips.captions[:n], clips.kinds[:n])
    optimisation, spec = described.optimisation, described.expert
    rows = [Row.of(f"a training step, batch of {optimisation.batch}", steps, "s")]
    with tempfile.TemporaryDirectory() as folder:
        weights, state = Path(folder, "weights"), Path(folder, "state")
        write_weights(trainer.snapshot(), weights)
        write_state(trainer.snapshot(), state, ema=False)
        size = (weights.stat().st_size + state.stat().st_size) / 1e6
        checks: dict[str, Callable[[], object]] = {
            "transfer: hash the blobs": lambda: (ChunkTable.of_file(weights), ChunkTable.of_file(state)),
            "format, numbers": lambda: (check_weights(weights, spec), check_state(state, spec, optimisation)),
            "numbers: moments": lambda: check_moments(state, optimisation),
            f"holdout, {HELD_OUT} clips": lambda: holdout_loss(described, 0, weights, held),
            f"holdout, its parent with the same draw, {HELD_OUT} clips": lambda: holdout_loss(described, 0, weights, held),
            f"raw, {HELD_OUT} clips": lambda: holdout_loss(described, 0, state, held, raw=True),
            "audit, 4 steps": lambda: replay(described, 0, clips, ReplayParent(1, weights, state), 4),
        }
        typical = rows[0].value
        for name, check in checks.items():
            took = [_seconds(check) for _ in range(REPEATS)]
            detail = f"{sorted(took)[REPEATS // 2] / typical:.1f} steps; weights and state have {size:.1f} MB"
            rows.append(Row.of(name, took, "s", detail=detail))
    return rows


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
