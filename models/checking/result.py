"""What a result is checked for, by a coordinator's worker process or by a node that borrowed the check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from lutetia.models.data.shards import ClipReader
from lutetia.models.experts.adapters.base_model import Base
from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights
from lutetia.models.training.checkpoint_io import read_place
from lutetia.models.training.holdout_loss import RowLimits, holdout_loss
from lutetia.models.training.moment_checks import check_lag, check_moments
from lutetia.models.training.replay import read_trace
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import LutetiaError

_NUMBER_REASONS = ("non-finite", "norm")


@dataclass(frozen=True)
class ResultFiles:
    """The files of a result for `epoch` of `shard`. `lanes`: the lane that trained it, or those that were merged into it."""

    shard: int
    epoch: int
    weights: Path
    state: Path
    trace: Path
    lanes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class PartLosses:
    """Held-out losses of a result, of its raw parameters and of its parent, on the same rows in drawn order."""

    parent: tuple[float, ...]
    averages: tuple[float, ...]
    raw: tuple[float, ...]


def failed_check(error: LutetiaError) -> CheckName | None:
    """The check that a file fails which was refused with `error`; None: the refusal is not of a file."""
    reason = getattr(error, "reason", None)
    return None if reason is None else "numbers" if reason in _NUMBER_REASONS else "format"


def inspect_result(manifest: Manifest, files: ResultFiles, progress: Callable[[], None] = lambda: None) -> None:
    """Weights and training state must be exactly what the manifest says, and belong together; a trace has a loss per step.

    Args:
        manifest: the run.
        files: the result's.
        progress: called between the parts of the work.

    Raises CheckpointMisfit.
    """
    spec, form = manifest.expert_of(files.shard), manifest.checkpoints
    check_weights(files.weights, spec, form)
    progress()
    check_state(files.state, spec, manifest.optimisation, form, files.weights)
    progress()
    check_moments(files.state, manifest.optimisation, form, files.weights)
    progress()
    _check_agreement(manifest, files, progress)
    check_lag(files.state, files.weights, manifest.optimisation, form)
    progress()
    needed = max(map(manifest.lane_steps, files.lanes))
    if (steps := len(read_trace(files.trace))) != needed:
        share = (
            f"lane {files.lanes[0]} trains {needed} steps of one" if needed < manifest.steps_per_epoch else f"has {needed} steps"
        )
        raise CheckpointMisfit("shape", f"its trace has {steps} losses; an epoch {share}")


def score_result(
    manifest: Manifest,
    files: ResultFiles,
    parent: Path | None,
    data: ClipReader,
    *,
    draw: str,
    limits: RowLimits,
    device: str = "cpu",
    base: Base | None = None,
) -> PartLosses:
    """Score the parent on the first rows of the drawn order, then the result on as many.

    Args:
        manifest: the run.
        files: the result's, which were inspected.
        parent: weights of the accepted parent; None: the shard's initial model.
        data: the held-out clips.
        draw: fixes noise, times and order of the rows.
        limits: how many rows; `seconds` for all three parts.
        device: where to compute.
        base: the files of the base that the expert adapts, if it does.

    Raises CheckpointMisfit: the weights do not fit the expert.
    """
    counts = [limits.count]

    def score(weights: Path | None, raw: bool = False) -> tuple[float, ...]:
        few = RowLimits(limits.seconds / 3, limits.fewest, counts[-1], drawn=True)
        loss = holdout_loss(
            manifest, files.shard, weights, data, draw=draw, raw=raw, averages=files.weights if raw else None, device=device,
            limits=few, base=base,
        )  # fmt: skip
        rows = loss.rows
        counts.append(len(rows))
        return rows

    return PartLosses(score(parent), score(files.weights), score(files.state, raw=True))


def _check_agreement(manifest: Manifest, files: ResultFiles, progress: Callable[[], None]) -> None:
    """The state must start this shard's next epoch, and its averages must equal the published weights: training needs both.

    Tensor by tensor, so that large experts fit a small coordinator. Raises CheckpointMisfit.
    """
    place = read_place(files.state, manifest, files.shard)
    if (place["epoch"], place["step"]) != (files.epoch, 0):
        text = f"the state is of epoch {place['epoch']}, step {place['step']}, not of epoch {files.epoch}, step 0; refused"
        raise CheckpointMisfit("header", text)
    with safe_open(files.state, framework="pt") as states, safe_open(files.weights, framework="pt") as published:
        for name in states.keys():  # noqa: SIM118 (not a dictionary)
            weight = name.removeprefix("ema.")
            if weight != name and not torch.equal(states.get_tensor(name), published.get_tensor(weight)):
                raise CheckpointMisfit("norm", f"{weight} in the state's averages is not the published one; refused")
            progress()


def finite_or_none(losses: tuple[float, ...]) -> tuple[float | None, ...]:
    """Losses as a message carries them: None where they are not a number."""
    return tuple(loss if math.isfinite(loss) else None for loss in losses)
