"""How a mixture's experts do on held-out clips, measured once, so that every way of routing can be scored from it.

Experts are asked for the velocity u of noisy held-out clips. With residuals r_k = v_k - u and weights w that sum to 1, the error
of the mixture's velocity is |sum_k w_k r_k|^2 = w^T G w, G_jk = r_j . r_k. So one pass of each expert gives the loss of every
mode and temperature. Of long residuals a fixed draw of elements is kept: their mean square is an unbiased estimate, and the same
elements are drawn for every expert and every mixture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lutetia.models.data.shards import ClipReader, bucket_of
from lutetia.models.experts.adapters.base_model import Base
from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.objectives import schedule_of
from lutetia.models.experts.pictures import Pictures
from lutetia.models.experts.trained import load_trained
from lutetia.models.mixing.denoisers import ExpertCall, module_denoiser
from lutetia.models.randomness import normals, stream
from lutetia.models.training.checkpoint_io import read_weights
from lutetia.models.training.trainer import initial_seed
from lutetia.protocol.schema.manifest import Manifest

FEWEST_ROWS, MOST_ROWS = 8, 128
MOST_ASKED = 8
"""Up to so many experts all are asked for every row; of more the two likeliest, and only modes that ask no others are scored."""
_ELEMENTS = 16384
_BATCH = 16
_ENDS = 0.02
"""Times lie between this and 1 minus this: at the very ends an expert that predicts noise or data has no velocity."""


@dataclass(frozen=True)
class RoutingEvidence:
    """What was measured on R rows, drawn by the shards' priors, with K experts.

    Attributes:
        gram: products of the experts' residuals per element, [R, K, K], float64; NaN for experts that were not asked.
        logits: the router's, at the noisy clip, [R, K]; minus infinity for experts without an accepted checkpoint.
        first: the router's, at the same noise and t = 1, where a path begins, [R, K].
    """

    gram: Tensor
    logits: Tensor
    first: Tensor

    @property
    def complete(self) -> bool:
        """Whether all available experts were asked for every row."""
        asked = torch.isfinite(self.logits[0])
        return bool(torch.isfinite(self.gram[:, asked][:, :, asked]).all())


@dataclass(frozen=True)
class _Rows:
    """Held-out clips with noise, row by row."""

    shards: list[int]
    clips: list[int]
    times: Tensor
    draw: str

    def noise(self, row: int, shape: tuple[int, ...]) -> Tensor:
        return normals(stream(self.draw, 0, 0, row, "mixture noise"), shape)

    def elements(self, row: int, count: int) -> Tensor | None:
        """Which elements of a long residual are kept; None: all."""
        if count <= _ELEMENTS:
            return None
        return torch.from_numpy(stream(self.draw, 0, 0, row, "mixture elements").integers(count, size=_ELEMENTS))


def draw_rows(manifest: Manifest, holdouts: Sequence[ClipReader], draw: str) -> _Rows:
    """The rows of a run, in a drawn order, so that the first of them are a fair sample, too."""
    numbers = stream(draw, 0, 0, 0, "mixture rows")
    priors = np.array([shard.prior for shard in manifest.shards])
    shards = numbers.choice(len(holdouts), size=MOST_ROWS, p=priors / priors.sum()).tolist()
    clips = [int(numbers.integers(len(holdouts[shard]))) for shard in shards]
    low, high = manifest.expert.noise_part.span if manifest.expert.noise_part else (0.0, 1.0)
    low, high = max(low, _ENDS), min(high, 1 - _ENDS)
    times = torch.from_numpy(low + (high - low) * numbers.random(MOST_ROWS)).float()
    return _Rows(shards, clips, times, draw)


@torch.no_grad()
def gather_evidence(
    manifest: Manifest,
    weights: Mapping[int, Path],
    router: nn.Module | None,
    holdouts: Sequence[ClipReader],
    *,
    draw: str,
    seconds: float,
    device: str | torch.device = "cpu",
    base: Base | None = None,
    on_progress: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> RoutingEvidence:
    """Ask router and experts for noisy held-out clips: at most MOST_ROWS, as many as fit into the time, at least FEWEST_ROWS.

    Args:
        manifest: the run.
        weights: the accepted weights by shard.
        router: the run's; None: it has one shard.
        holdouts: held-out clips, one entry per shard.
        draw: fixes rows, noise and times: mixtures with the same draw are compared row by row.
        seconds: what the experts' passes may take in all, beyond the fewest rows.
        device: where to compute.
        base: the files of the base of adapters.
        on_progress: called after each pass.
        clock: seconds.

    Raises CheckpointMisfit when weights do not fit, ConfigError when a base is missing.
    """
    site = _Site(manifest, holdouts, draw_rows(manifest, holdouts, draw), device, on_progress, clock)
    available = sorted(weights)
    experts = _experts(manifest, weights, base, device)
    shard, first = next(experts)
    count = site.rows_within(seconds / min(len(available), MOST_ASKED), shard, first)
    logits, begins = site.route(router, count, available, len(manifest.shards))
    asked = torch.isfinite(logits)
    if len(available) > MOST_ASKED:
        asked = torch.zeros_like(asked).scatter(1, logits.topk(2, dim=1).indices, True)
    residuals: dict[int, dict[int, Tensor]] = {row: {} for row in range(count)}
    while True:
        for row, residual in site.residuals(shard, first, asked[:, shard].nonzero().flatten().tolist()):
            residuals[row][shard] = residual
        following = next(experts, None)
        if following is None:
            break
        shard, first = following
    return RoutingEvidence(_gram(residuals, len(manifest.shards)), logits, begins)


def _gram(residuals: Mapping[int, Mapping[int, Tensor]], experts: int) -> Tensor:
    gram = torch.full((len(residuals), experts, experts), torch.nan, dtype=torch.float64)
    for row, of_experts in residuals.items():
        who = torch.tensor(sorted(of_experts))
        stacked = torch.stack([of_experts[expert] for expert in sorted(of_experts)]).double()
        gram[row, who[:, None], who[None, :]] = stacked @ stacked.T / stacked.shape[1]
    return gram


def _experts(
    manifest: Manifest, weights: Mapping[int, Path], base: Base | None, device: str | torch.device
) -> Iterator[tuple[int, nn.Module]]:
    """Shard by shard the expert, one in memory at a time: networks of one kind are built once and get the next one's weights."""
    model, kind = None, ""
    for shard in sorted(weights):
        spec = manifest.expert_of(shard)
        name = spec.model_dump_json(exclude={"init"})
        if model is None or name != kind:
            model, kind = load_expert(spec, initial_seed(manifest, shard), base).to(device).eval(), name
        load_trained(model, read_weights(weights[shard], manifest, shard))
        yield shard, model


@dataclass(frozen=True)
class _Site:
    manifest: Manifest
    holdouts: Sequence[ClipReader]
    rows: _Rows
    device: str | torch.device
    on_progress: Callable[[], None]
    clock: Callable[[], float]

    def rows_within(self, seconds: float, shard: int, model: nn.Module) -> int:
        """How many rows fit into the time. The first row also pays for what a device loads once, so the second one decides."""
        pace = 0.0
        for row in range(2):
            began = self.clock()
            list(self.residuals(shard, model, [row]))
            pace = self.clock() - began
        return MOST_ROWS if pace * MOST_ROWS <= seconds else max(FEWEST_ROWS, int(seconds / pace))

    def residuals(self, shard: int, model: nn.Module, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The expert's residual at each row, flat, [elements]."""
        spec = self.manifest.expert_of(shard)
        denoise = module_denoiser(model, spec.prediction, schedule_of(spec), lambda: ExpertCall(spec.inputs))
        for part in self._batches(rows):
            latents, noise, tokens, pooled, pictures = self._taken(part)
            t = self.rows.times[part].to(self.device)
            x_t = torch.lerp(latents, noise, t.view(-1, 1, 1, 1, 1))
            off = (denoise(x_t, t, tokens, pooled, pictures).float() - (noise - latents)).flatten(1).cpu()
            for row, residual in zip(part, off, strict=True):
                kept = self.rows.elements(row, len(residual))
                yield row, residual if kept is None else residual[kept]
            self.on_progress()

    def route(self, router: nn.Module | None, count: int, available: Sequence[int], experts: int) -> tuple[Tensor, Tensor]:
        """The router's logits at the noisy rows and at their beginnings, [count, experts] each."""
        found = torch.zeros(2, count, experts)
        if router is not None:
            router.to(self.device)
            for part in self._batches(range(count)):
                latents, noise, _, pooled, _ = self._taken(part)
                t = self.rows.times[part].to(self.device)
                x_t = torch.lerp(latents, noise, t.view(-1, 1, 1, 1, 1))
                found[0, part] = router(x_t, t, pooled).float().cpu()
                found[1, part] = router(noise, torch.ones_like(t), pooled).float().cpu()
        missing = [shard for shard in range(experts) if shard not in available]
        found[:, :, missing] = -torch.inf
        return found[0], found[1]

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows in batches of one shard and bucket each."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row in rows:
            shard = self.rows.shards[row]
            bucket = int(bucket_of(self.holdouts[shard].sizes, torch.tensor([self.rows.clips[row]])))
            groups.setdefault((shard, bucket), []).append(row)
        for group in groups.values():
            yield from (group[start : start + _BATCH] for start in range(0, len(group), _BATCH))

    def _taken(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Pictures | None]:
        """Latents, noise, tokens, pooled texts and pictures of rows of one shard and bucket, on the device."""
        clips = self.holdouts[self.rows.shards[rows[0]]].take([self.rows.clips[row] for row in rows])
        noise = torch.stack([self.rows.noise(row, tuple(clips.latents.shape[1:])) for row in rows])
        latents, noise, tokens, pooled = (each.to(self.device) for each in (clips.latents, noise, clips.tokens, clips.pooled))
        pictures = clips.pictures.each(lambda tensor: tensor.to(self.device)) if clips.pictures else None
        return latents, noise, tokens, pooled, pictures
