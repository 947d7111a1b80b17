"""Training of the router on the clips of all shards, which are read from disk as they are drawn, and the report on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from lutetia.models.data.parts.reader import Excerpt
from lutetia.models.data.shards import ClipReader, ClipRows, bucket_of
from lutetia.models.mixing.router import VideoRouter, build_router, resized
from lutetia.models.randomness import normals, seed_of, stream
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import DataError

TIME_BINS = 10
_CALIBRATION_BINS = 15
_REPORT_NOISES = 4


@dataclass(frozen=True)
class RouterReport:
    """How good a router is on held-out clips drawn by the priors, with their text."""

    accuracy: float
    accuracy_by_time: tuple[float, ...]
    """In ten equal bins of t."""
    ece: float
    """Expected calibration error, 0 to 1."""
    ece_by_time: tuple[float, ...]
    loss: float
    """Mean cross-entropy, nats."""
    steps: int
    """Steps it was trained for."""


def train_router(
    manifest: Manifest,
    shards: Sequence[ClipReader],
    *,
    seed: int,
    steps: int | None = None,
    holdouts: Sequence[ClipReader] | None = None,
    on_progress: Callable[[int, int, float], None] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[VideoRouter, RouterReport]:
    """Train the run's router on the clips of all shards and report on held-out clips. Equal arguments: equal router on a CPU.

    Args:
        manifest: the run.
        shards: training clips, one entry per shard.
        seed: of initial weights and noise.
        steps: None: as many as the manifest's samples give.
        holdouts: held-out clips, one entry per shard. None: every tenth clip of `shards`, which is then not trained on.
        on_progress: called with (steps done, steps, loss) after every step.
        device: where to train.

    Raises:
        DataError: a shard is missing.
    """
    if len(shards) != len(manifest.shards) or (holdouts is not None and len(holdouts) != len(shards)):
        raise DataError(f"the router needs the data of all {len(manifest.shards)} shards, not of {len(shards)}; fetch the others")
    if holdouts is None:
        shards, holdouts = _split(shards)
    spec, run = manifest.router, manifest.run_id
    router = build_router(manifest, seed_of(run, seed, "router"))
    nn.Module.to(router, device)
    steps = steps or max(1, spec.samples // spec.batch)
    optimiser = torch.optim.AdamW(router.parameters(), lr=spec.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        optimiser.param_groups[0]["lr"] = spec.learning_rate * rate
        draw = stream(run, seed, 0, step, "router")
        rows = _choose(manifest, shards, draw, spec.batch, manifest.optimisation.text_dropout)
        captions = torch.from_numpy(stream(run, seed, 0, step, "router captions").random(spec.batch))
        drawn = replace(rows, captions=captions)
        logits = router(*(tensor.to(device) for tensor in _noisy(router.latent_size, shards, drawn, draw)))
        loss = nn.functional.cross_entropy(logits, rows.labels.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimiser.step()
        if on_progress:
            on_progress(step + 1, steps, loss.item())
    return router.eval(), report_router(manifest, router, holdouts, steps=steps)


@torch.no_grad()
def report_router(manifest: Manifest, router: VideoRouter, holdouts: Sequence[ClipReader], *, steps: int = 0) -> RouterReport:
    """Accuracy and calibration of `router`, on the same clips, noise and times for every router of a run."""
    count = max(256, _REPORT_NOISES * sum(len(holdout) for holdout in holdouts))
    draw = stream(manifest.run_id, 0, 0, 0, "router report")
    rows = _choose(manifest, holdouts, draw, count, text_dropout=0.0)
    device = next(router.parameters()).device
    parts = (_noisy(router.latent_size, holdouts, part, draw) for part in rows.split(64))
    logits = torch.cat([router(*(tensor.to(device) for tensor in part)).cpu() for part in parts])
    t, labels = rows.t, rows.labels
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    inside = [bins == b for b in range(TIME_BINS)]
    return RouterReport(
        accuracy=right.mean().item(),
        accuracy_by_time=tuple(right[rows].mean().item() for rows in inside),
        ece=_calibration_error(confidence, right),
        ece_by_time=tuple(_calibration_error(confidence[rows], right[rows]) for rows in inside),
        loss=nn.functional.cross_entropy(logits, labels).item(),
        steps=steps,
    )


def report_split(manifest: Manifest, router: VideoRouter, shards: Sequence[ClipReader]) -> RouterReport:
    """The report of a router that was trained on `shards` alone: on every tenth clip, which it was not trained on."""
    return report_router(manifest, router, _split(shards)[1])


@dataclass(frozen=True)
class _Rows:
    """Clips drawn by the shards' priors; all fields [N]."""

    labels: Tensor
    """The clip's shard."""
    clips: Tensor
    """Its row in the shard."""
    t: Tensor
    """Flow time of its noise."""
    with_text: Tensor
    """Whether the router gets its text."""
    captions: Tensor
    """Which of its captions, as a place in [0, 1) among them."""

    def split(self, size: int) -> list[_Rows]:
        parts = (getattr(self, field.name).split(size) for field in fields(self))
        return [_Rows(*part) for part in zip(*parts, strict=True)]

    def at(self, places: Tensor) -> _Rows:
        return _Rows(*(getattr(self, field.name)[places] for field in fields(self)))


def _choose(
    manifest: Manifest, shards: Sequence[ClipReader], draw: np.random.Generator, count: int, text_dropout: float
) -> _Rows:
    """`count` rows drawn by the shards' priors, with uniform, stratified times."""
    priors = np.array([shard.prior for shard in manifest.shards])
    labels = draw.choice(len(shards), size=count, p=priors / priors.sum())
    clips = torch.tensor([int(draw.integers(len(shards[label]))) for label in labels])
    t = torch.from_numpy((draw.permutation(count) + draw.random(count)) / count).float()
    with_text = torch.from_numpy(draw.random(count) >= text_dropout)
    return _Rows(torch.from_numpy(labels), clips, t, with_text, torch.zeros(count))


def _noisy(
    size: tuple[int, ...], shards: Sequence[ClipReader], rows: _Rows, draw: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The router's inputs for `rows`: noisy latents in the router's size, times and pooled texts."""
    buckets = torch.empty_like(rows.clips)
    for label in rows.labels.unique().tolist():
        buckets[rows.labels == label] = bucket_of(shards[label].sizes, rows.clips[rows.labels == label])
    order, noisy, pooled = [], [], []
    for bucket in buckets.unique():
        places = (buckets == bucket).nonzero().flatten()
        clips, t = _taken(shards, rows.at(places)), rows.t[places].view(-1, 1, 1, 1, 1)
        order.append(places)
        noisy.append(resized(torch.lerp(clips.latents, normals(draw, tuple(clips.latents.shape)), t), size))
        pooled.append(clips.pooled)
    back = torch.cat(order).argsort()
    return torch.cat(noisy)[back], rows.t, torch.cat(pooled)[back] * rows.with_text[:, None]


def _taken(shards: Sequence[ClipReader], rows: _Rows) -> ClipRows:
    """The clips of `rows`, in that order, without tokens. Only they are read."""
    order, parts = [], []
    for label in rows.labels.unique().tolist():
        places = (rows.labels == label).nonzero().flatten()
        order.append(places)
        parts.append(shards[label].take(rows.clips[places], with_tokens=False, captions=rows.captions[places]))
    back = torch.cat(order).argsort()
    return ClipRows(*(torch.cat([getattr(part, name) for part in parts])[back] for name in ("latents", "tokens", "pooled")))


def _split(shards: Sequence[ClipReader]) -> tuple[list[Excerpt], list[Excerpt]]:
    def part(shard: ClipReader, kept: bool) -> Excerpt:
        return Excerpt(shard, [row for row in range(len(shard)) if (row % 10 == 9) != kept or len(shard) < 10])

    return [part(shard, True) for shard in shards], [part(shard, False) for shard in shards]


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The gap between confidence and accuracy, averaged over equal bins of confidence by their share (Guo et al. 2017)."""
    bins = (confidence * _CALIBRATION_BINS).long().clamp(0, _CALIBRATION_BINS - 1)
    gaps = [((bins == b).float().mean(), (right - confidence)[bins == b]) for b in bins.unique().tolist()]
    return sum((share * gap.mean().abs()).item() for share, gap in gaps)
