"""The held-out loss of one expert. Weights that are compared get the same clips, noise and times, so that only they differ."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lutetia.models.data.shards import ClipReader, bucket_of
from lutetia.models.experts.adapters.base_model import Base
from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.families import call_expert
from lutetia.models.experts.loss_weights import weighted_losses
from lutetia.models.experts.objectives import times
from lutetia.models.experts.trained import load_trained, trained_parameters
from lutetia.models.randomness import normals, stream
from lutetia.models.training.checkpoint_io import read_weights
from lutetia.models.training.states.compact import open_state
from lutetia.models.training.trainer import initial_seed
from lutetia.protocol.schema.manifest import CheckpointForm, Manifest

BINS = 10
_ROWS = 32  # per forward pass; does not change a row's noise
_REPORT_SECONDS = 10.0
"""Where rows are slow, a forward pass takes about so long, so that progress is reported and little is lost when it ends."""


@dataclass(frozen=True)
class HoldoutLoss:
    """Held-out loss of one set of weights."""

    loss: float
    """Mean over the rows that were scored, at times of the run's distribution."""
    by_time: tuple[float | None, ...]
    """Means in ten equal bins of t; None for a bin without rows."""
    rows: tuple[float, ...]
    """The loss of each clip with each noise. The order does not depend on the weights."""
    drawn: bool = False
    """Whether `rows` are the first ones of the order that the draw gives, not the clips one after another."""


@dataclass(frozen=True)
class RowLimits:
    """How many of the held-out rows are scored.

    Args:
        seconds: rows beyond the fewest are scored only while they fit into this time.
        fewest: so many rows are scored however long they take.
        count: at most so many rows, because what they are compared with has no more; None: all.
        drawn: whether rows come in drawn order, as in what they are compared with. None: only if not all of them fit.
        known: the losses of the first rows of that order, from an attempt that was cut off.
    """

    seconds: float = math.inf
    fewest: int = 1
    count: int | None = None
    drawn: bool | None = None
    known: tuple[float, ...] = ()


OnRows = Callable[[bool, Sequence[float]], None]
"""Called with `drawn` and the losses of all rows so far."""


@torch.no_grad()
def holdout_loss(
    manifest: Manifest,
    shard: int,
    weights: Path | None,
    data: ClipReader,
    *,
    draw: str | None = None,
    raw: bool = False,
    averages: Path | None = None,
    noises: int = 4,
    device: str | torch.device = "cpu",
    limits: RowLimits | None = None,
    on_rows: OnRows = lambda drawn, losses: None,
    clock: Callable[[], float] = time.monotonic,
    base: Base | None = None,
) -> HoldoutLoss:
    """The loss on held-out clips. Times are stratified over all rows, so a few clips give a good estimate.

    Where not all rows fit into the time, the first ones of a drawn order are scored: what two sets of weights have in common of
    it is a fair sample of the rows for both.

    Args:
        manifest: the run.
        shard: whose expert is scored.
        weights: a checkpoint's weights file. None: the shard's initial weights.
        data: the held-out clips.
        draw: fixes noise and times. The coordinator gives a secret one for each result, so that nobody can train on the very
            rows that will be scored. None: the run's id, for measurements that decide nothing.
        raw: `weights` is a checked state file; score its parameters, from which training continues, instead of averages.
        averages: the weights file of a raw state in the compact form.
        noises: rows per clip, each with its own noise and time.
        device: where to compute.
        limits: how many rows to score. None: all.
        on_rows: called after each forward pass.
        clock: seconds, for `limits`.
        base: the files of the base that the expert adapts, if it does.

    Raises:
        CheckpointMisfit: the weights do not fit the expert.
    """
    limits = limits or RowLimits()
    spec = manifest.expert_of(shard)
    model = load_expert(spec, initial_seed(manifest, shard), base)
    if weights is not None and raw:
        _load_raw(model, weights, averages, manifest.checkpoints)
    elif weights is not None:
        load_trained(model, read_weights(weights, manifest, shard))
    model = model.to(device).eval()
    clips, noise, t = holdout_rows(manifest, shard, data, draw=draw, noises=noises)
    drawing = stream(draw or manifest.run_id, shard, 0, 0, "holdout first frame")
    with_frame = torch.from_numpy(drawing.random(len(clips)) < (spec.first_frame or 0.0))

    def score(rows: Tensor) -> list[float]:
        losses = torch.empty(len(rows))
        buckets = bucket_of(data.sizes, clips[rows])
        for bucket in buckets.unique():
            places = (buckets == bucket).nonzero().flatten()
            losses[places] = score_bucket(rows[places])
        return losses.tolist()

    def score_bucket(rows: Tensor) -> Tensor:
        taken = data.take(clips[rows])
        latents, tokens, pooled = (each.to(device) for each in (taken.latents, taken.tokens, taken.pooled))

        pictures = taken.pictures.each(lambda tensor: tensor.to(device)) if taken.pictures else None
        given = None if spec.first_frame is None else (with_frame[rows] & (latents.shape[2] > 1)).to(device)

        def answer(z, s):
            return call_expert(model, z, s, tokens, pooled, spec.inputs, given, pictures)

        asked = latents, noise.take(rows).to(device), t[rows].to(device), given
        return weighted_losses(manifest.optimisation, spec, answer, *asked).cpu()

    order, losses = _score_rows(score, len(clips), _drawn_order(manifest, shard, draw, len(clips)), limits, on_rows, clock)
    drawn, scored = order is not None, torch.tensor(losses)
    times_scored = t[order[: len(losses)]] if order is not None else t[: len(losses)]
    bins = (times_scored * BINS).long().clamp(0, BINS - 1)
    by_time = tuple(scored[bins == b].mean().item() if (bins == b).any() else None for b in range(BINS))
    return HoldoutLoss(scored.double().mean().item(), by_time, tuple(scored.tolist()), drawn)


def _score_rows(
    score: Callable[[Tensor], list[float]],
    total: int,
    order: Tensor,
    limits: RowLimits,
    on_rows: OnRows,
    clock: Callable[[], float],
) -> tuple[Tensor | None, list[float]]:
    """(order of the rows, or None for that of the clips; the losses of those that were scored)."""
    began, losses, pace = clock(), list(limits.known), 0.0
    most = min(total, limits.count or total)
    drawn = limits.drawn
    if drawn is None:
        drawn, losses, pace = _tried(score, order, total, limits.seconds, clock)
    rows = order if drawn else torch.arange(total)
    while size := _next_rows(len(losses), most, drawn, pace, limits.seconds - (clock() - began), limits.fewest):
        start = clock()
        losses += score(rows[len(losses) : len(losses) + size])
        pace = (clock() - start) / size
        on_rows(drawn, losses)
    return (order if drawn else None), losses


def _next_rows(scored: int, most: int, drawn: bool, pace: float, left: float, fewest: int) -> int:
    """How many rows the next forward pass takes; 0: no more.

    Args:
        scored: rows that are done.
        most: rows to score in all.
        drawn: whether they come in drawn order. In the order of the clips batches are always whole, so that losses are bit-equal
            whatever the time.
        pace: seconds that a row takes; 0: not known yet.
        left: seconds that are left.
        fewest: so many rows are scored however long they take.
    """
    size = min(_ROWS, most - scored)
    if not pace:
        return min(size, 1) if drawn else size
    fit = max(fewest - scored, int(min(left / pace, size)), 0)
    if not drawn:
        return size if fit else 0
    return min(size, fit, max(1, int(_REPORT_SECONDS / pace)))


def _tried(
    score: Callable[[Tensor], list[float]], order: Tensor, total: int, seconds: float, clock: Callable[[], float]
) -> tuple[bool, list[float], float]:
    """Whether all rows take longer than `seconds`; if so, the losses of the rows that showed it, and the seconds that one takes.

    One row shows it. The first one also pays for what a device loads once, so a second one decides.
    """
    if not math.isfinite(seconds):
        return False, [], 0.0
    losses: list[float] = []
    pace = 0.0
    for row in order[:2].split(1):
        began = clock()
        losses += score(row)
        pace = clock() - began
        if pace * total <= seconds:
            return False, [], 0.0
    return True, losses, pace


def _drawn_order(manifest: Manifest, shard: int, draw: str | None, count: int) -> Tensor:
    return torch.from_numpy(stream(draw or manifest.run_id, shard, 0, 0, "holdout order").permutation(count))


@dataclass(frozen=True)
class RowNoise:
    """The noise of the rows that are scored, one block [N, C, F, H, W] per bucket; rows are numbered bucket by bucket."""

    blocks: tuple[Tensor, ...]

    def take(self, rows: Tensor) -> Tensor:
        """The noise of `rows`, all of one bucket, [len(rows), C, F, H, W]."""
        sizes = [len(block) for block in self.blocks]
        bucket = int(bucket_of(sizes, rows[:1]))
        return self.blocks[bucket][rows - sum(sizes[:bucket])]


def holdout_rows(
    manifest: Manifest, shard: int, data: ClipReader, *, draw: str | None = None, noises: int = 4
) -> tuple[Tensor, RowNoise, Tensor]:
    """The rows that are scored: the clip of each [N], its noise and its time [N]."""
    count = len(data) * noises
    numbers = stream(draw or manifest.run_id, shard, 0, 0, "holdout")
    clips = torch.arange(len(data)).repeat_interleave(noises)
    strata = torch.from_numpy(numbers.permutation(count))
    part = manifest.expert_of(shard).noise_part
    t = times(manifest.optimisation.time, (strata + torch.from_numpy(numbers.random(count))) / count, part)
    shapes = [latent.shape for latent in manifest.latent.of_buckets]
    blocks = tuple(normals(numbers, (size * noises, *shape)) for size, shape in zip(data.sizes, shapes, strict=False))
    return clips, RowNoise(blocks), t


def _load_raw(model: nn.Module, state: Path, averages: Path | None, form: CheckpointForm) -> None:
    """Reads one parameter at a time: a state is several times as large as its parameters."""
    with open_state(state, averages, form) as tensors:
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(tensors[f"param.{name}"])
