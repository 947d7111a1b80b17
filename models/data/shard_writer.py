"""Write the files of a build: shards, contact sheets, `clips.jsonl` and `data.json`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lutetia.models.data.cluster.assignment import Placement, Split
from lutetia.models.data.cluster.contact_sheets import SHEET_CLIPS, write_sheet
from lutetia.models.data.cluster.report import central
from lutetia.models.data.decode.cut import Frames
from lutetia.models.data.decode.pool import DecoderPool
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.description import DATA_FILE, DataDescription, DataFile, DataShard
from lutetia.models.data.encode.cache import ArrayCache
from lutetia.models.data.encode.encoder import EmbeddedCaptions, PreparedClips, Progress, Recipe, cached_array
from lutetia.models.data.encode.text import TextEncoder
from lutetia.models.data.parts.part_file import picture_shapes
from lutetia.models.data.parts.writer import ShardWriter, WrittenShard, part_bytes, text_of
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.latent_spec import LatentShape, LatentSpec
from lutetia.system.errors import ConfigError, DataError
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildInputs:
    """Everything that the files of a build are made from."""

    recipe: Recipe
    cache: ArrayCache
    decoder: DecoderPool
    prepared: PreparedClips
    embedded: EmbeddedCaptions
    placement: Placement

    def latents(self, row: int) -> np.ndarray:
        """Raw latents [C, F, H, W] of the clip number `row`."""
        return cached_array(self.cache, self.recipe.latents_key(self.prepared.digests[row], self.prepared.buckets[row]))

    def picture(self, row: int, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        """What a part holds of the first picture of the clip number `row`, its latents normalised as those of clips."""
        keys = self.recipe.picture_keys(self.prepared.digests[row], self.prepared.buckets[row])
        held = {name: torch.from_numpy(cached_array(self.cache, key)) for name, key in keys.items()}
        if self.recipe.picture:
            held["pictures"] = self.recipe.picture.scale * (held["pictures"] - mean) / std
        return held

    def frames(self, row: int) -> Frames:
        """The frames of the clip number `row`."""
        return self.decoder.decode(self.prepared.clips[row].path, self.recipe.shapes[self.prepared.buckets[row]])


def latent_spec(source: BuildInputs, encoder: TextEncoder, normalisation: Literal["auto", "measured", "shipped"]) -> LatentSpec:
    """The latent spec of the run, with mean and std per channel: shipped with the autoencoder or measured on training clips."""
    recipe, shape = source.recipe, source.recipe.shapes[0]
    channels, frames, height, width = recipe.latents.shape_of(shape.frames, shape.height, shape.width)
    shipped = recipe.latents.shipped_statistics
    if normalisation == "shipped" and shipped is None:
        raise ConfigError(f"latents {recipe.latents.ref!r} have no mean and std; set normalisation to measured")
    if shipped is not None and normalisation != "measured":
        mean, std = shipped
        _log.info("latents are normalised by the statistics of %s", recipe.latents.ref)
    else:
        mean, std = _measure(source)
        _log.info("latents are normalised by statistics of the training clips")
    return LatentSpec(
        channels=channels, frames=frames, height=height, width=width, mean=mean, std=std,
        vae=recipe.latents.ref, pixel_frames=shape.frames, pixel_height=shape.height, pixel_width=shape.width, fps=shape.fps,
        text_encoder=encoder.ref, text_tokens=encoder.tokens, text_width=encoder.width, pooled_width=encoder.pooled_width,
        text=encoder.recipe, picture=recipe.picture,
        buckets=tuple(_latent_shape(recipe, further) for further in recipe.shapes[1:]),
    )  # fmt: skip


def _latent_shape(recipe: Recipe, shape: ClipShape) -> LatentShape:
    _, frames, height, width = recipe.latents.shape_of(shape.frames, shape.height, shape.width)
    pixels = {"pixel_frames": shape.frames, "pixel_height": shape.height, "pixel_width": shape.width}
    return LatentShape(frames=frames, height=height, width=width, **pixels)


def _measure(source: BuildInputs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over all training clips."""
    count, total, squares = 0, 0.0, 0.0
    for row, split in enumerate(source.placement.splits):
        if split == "train":
            raw = source.latents(row).astype(np.float64).reshape(source.latents(row).shape[0], -1)
            count, total, squares = count + raw.shape[1], total + raw.sum(1), squares + (raw**2).sum(1)
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 1e-8))
    return tuple(round(float(value), 6) for value in mean), tuple(round(float(value), 6) for value in std)


def write_data(
    folder: Path, source: BuildInputs, latent: LatentSpec, settings: Mapping[str, Any], on_progress: Progress
) -> DataDescription:
    """Write all files into `folder`; returns the content of `data.json`.

    Args:
        folder: empty folder.
        source: clips, embeddings and clusters.
        latent: spec with the statistics to normalise by.
        settings: those that determine the content.
        on_progress: called with stage, done and total.

    Raises DataError if a cluster has no clips to train on or to hold out.
    """
    placement, clusters = source.placement, source.placement.report.clusters
    total = len(source.prepared.clips) - placement.count("test")
    shards = []
    for summary in clusters:
        index = summary.index
        files = {
            split: _write_split(folder, source, latent, index, summary.name, split) for split in ("train", "holdout", "test")
        }
        train, holdout = files["train"], files["holdout"]
        if train is None or holdout is None:
            raise DataError(f"cluster {summary.name} has no clips left to train on or to hold out; use fewer experts")
        share = (train.clips + holdout.clips) / total
        shard = DataShard(index=index, name=summary.name, train=train, holdout=holdout, test=files["test"], prior=share)
        shards.append(shard.model_copy(update={"keywords": summary.keywords}))
        _write_sheet(folder / "sheets" / f"{index:03d}-{summary.name}.png", source, index, summary.name)
        on_progress("shards", index + 1, len(clusters))
    write_atomic(folder / "clips.jsonl", _clip_lines(source))
    description = DataDescription(
        latent=latent,
        shards=tuple(shards),
        clustering=placement.report,
        settings=dict(settings),
        skipped=len(source.prepared.bad),
    )
    write_atomic(folder / DATA_FILE, canonical(description))
    return description


def _write_split(folder: Path, source: BuildInputs, latent: LatentSpec, index: int, name: str, split: Split) -> DataFile | None:
    rows = sorted(source.placement.rows(index, split), key=lambda row: source.prepared.buckets[row])
    if not rows:
        return None
    relative = f"shards/{index:03d}.{split}.safetensors"
    drawn = split == "train"  # of other clips the first caption is used
    captions = {caption for row in rows for caption in source.prepared.clips[row].captions[: None if drawn else 1]}
    of_rows = [latent.in_bucket(source.prepared.buckets[row]) for row in rows]
    numbers = sum(math.prod(each.shape) + sum(map(math.prod, picture_shapes(each).values())) for each in of_rows)
    total = 2 * (numbers + len(captions) * latent.text_tokens * latent.text_width)
    null = text_of("", *source.embedded.null) if source.embedded.null else None
    writer = ShardWriter(folder / relative, latent, name, split, part_bytes(total), null)
    mean, std = (torch.tensor(each).view(-1, 1, 1, 1) for each in (latent.mean, latent.std))
    for row in rows:  # one at a time: a shard may be larger than the memory
        clip = source.prepared.clips[row]
        first, *more = (
            text_of(caption, source.embedded.tokens(caption), source.embedded.pooled[caption])
            for caption in clip.captions[: None if drawn else 1]
        )
        writer.add(
            (torch.from_numpy(source.latents(row)) - mean) / std,
            first,
            clip.kind,
            source.prepared.digests[row],
            source.prepared.buckets[row],
            more,
            source.picture(row, mean, std),
        )
    return data_file(relative, writer.finish())


def data_file(path: str, written: WrittenShard) -> DataFile:
    """The entry of `data.json` for a shard that was written to `path`, relative to the folder."""
    return DataFile(path=path, blob=written.blob, clips=written.clips, bytes=written.bytes, captions=written.captions)


def _write_sheet(path: Path, source: BuildInputs, index: int, name: str) -> None:
    """Draw clips of a cluster: half of them nearest to its centre, half spread evenly over the others."""
    rows = source.placement.rows(index, "train")
    ranked = central(source.placement.vectors, rows, len(rows))
    half = SHEET_CLIPS // 2
    spread = np.linspace(half, len(ranked) - 1, half).round().astype(int) if len(ranked) > half else np.empty(0, int)
    chosen = ranked[:half] + [ranked[place] for place in np.unique(spread) if place >= half]
    clips = [source.prepared.clips[row] for row in chosen]
    frames = [source.frames(row) for row in chosen]
    write_sheet(
        path,
        f"{name}: {len(rows)} clips; the most typical first, then farther from the centre",
        frames,
        [clip.caption for clip in clips],
    )


def _clip_lines(source: BuildInputs) -> bytes:
    """One JSON object per clip: file, SHA-256, caption, kind, split and shard; then what was left out or is no clip, and why."""
    placement, prepared = source.placement, source.prepared
    lines: list[dict[str, Any]] = [
        {
            "file_name": clip.name, "sha256": digest, "caption": clip.caption, "kind": clip.kind,
            "split": placement.splits[row], "shard": int(placement.shards[row]),
            **({"captions": list(clip.captions)} if clip.more else {}),
        }
        for row, (clip, digest) in enumerate(zip(prepared.clips, prepared.digests, strict=True))
    ]  # fmt: skip
    lines += [{"file_name": bad.name, "left_out": bad.reason} for bad in prepared.bad]
    lines += [{"file_name": other.name, "not_used": other.reason} for other in prepared.unused]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
