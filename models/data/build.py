"""From a folder of captioned clips to shards: decode, encode, cluster, split off holdouts, write.

The result is a folder with `shards/NNN.{train,holdout,test}.safetensors`, `sheets/` (a contact sheet per cluster), `clips.jsonl`
(what became of every clip) and `data.json`. Same folder, same settings: same bytes. It appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from lutetia.models.data.cluster.assignment import drop_copies_of_test_clips, feature_vectors, place_clips
from lutetia.models.data.cluster.kmeans import ClusterSettings
from lutetia.models.data.description import DataDescription
from lutetia.models.data.encode.cache import ArrayCache
from lutetia.models.data.encode.encoder import Progress, Recipe, prepare_captions, prepare_clips
from lutetia.models.data.encode.features import load_features, wants_text
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import MAX_TOKENS, TextEncoder, load_text_encoder
from lutetia.models.data.ingest.listing import BadClip, read_listing
from lutetia.models.data.ingest.video import ClipShape
from lutetia.models.data.output import check_output, output_folder
from lutetia.models.data.shard_writer import BuildInputs, latent_spec, write_data
from lutetia.models.device import Device
from lutetia.models.networks.model_ref import anchored
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Count, Positive
from lutetia.system.errors import DataError

_log = logging.getLogger(__name__)
_NOT_CONTENT = {"skip_bad", "workers", "device", "cache"}  # settings that do not change what is written


class BuildSettings(Frozen):
    """How clips become shards. `text_tokens` None: as many as the longest caption takes; `cache` None: the user's cache folder.

    `normalisation`: `measured` on the training clips, `shipped` with the autoencoder, or `auto`: shipped where there is one.
    """

    experts: Count = 3
    frames: Count = 8
    fps: Positive = 8.0
    height: Count = 64
    width: Count = 64
    start: Literal["middle", "start", "whole"] = "middle"
    short: Literal["refuse", "loop"] = "refuse"
    latents: str = "builtin:demo"
    normalisation: Literal["auto", "measured", "shipped"] = "auto"
    text: str = "builtin:words"
    text_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    features: str = "builtin+text"
    method: Literal["kmeans", "random", "kinds"] = "kmeans"
    fine: int | None = Field(default=None, ge=1, le=1024)
    largest_share: float | None = Field(default=None, gt=0, le=1)
    smallest: Count = 24
    holdout: float = Field(default=0.1, gt=0, lt=0.5)
    seed: int = 0
    skip_bad: bool = False
    workers: int = Field(default_factory=lambda: min(16, os.cpu_count() or 1), ge=1, le=256)
    device: Device = "cpu"
    cache: Path | None = None

    @property
    def clip_shape(self) -> ClipShape:
        return ClipShape.model_validate({name: getattr(self, name) for name in ClipShape.model_fields})

    @property
    def clustering(self) -> ClusterSettings:
        return ClusterSettings.model_validate({name: getattr(self, name) for name in ClusterSettings.model_fields})


class BuildReport(Frozen):
    """What a build did. `cached` clips needed no decoding; `repeated` training clips were dropped as copies of test clips."""

    out: Path
    description: DataDescription
    train: int
    holdout: int
    test: int
    repeated: int
    cached: int
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: dict[str, float] = {}


def default_cache() -> Path:
    """Where latents and embeddings are kept between builds: `LUTETIA_CACHE`, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("LUTETIA_CACHE") or user_cache_path("lutetia")) / "data"


def build_data(folder: Path, out: Path, settings: BuildSettings, on_progress: Progress | None = None) -> BuildReport:
    """Build `out` from the clips in `folder`.

    Raises DataError, ConfigError or DiskError, one sentence each; `out` is then as it was before.
    """
    progress = on_progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = {}
    check_output(out)
    settings = settings.model_copy(update={"latents": anchored(settings.latents), "text": anchored(settings.text)})
    recipe = Recipe(
        settings.clip_shape,
        load_latents(settings.latents, device=settings.device),
        load_features(settings.features, settings.device),
    )
    recipe.latents.shape_of(settings.frames, settings.height, settings.width)
    load_text_encoder(settings.text, settings.text_tokens or 1)  # names what is wrong before the long work begins
    if any(Path(part).is_dir() for part in settings.text.split("+")):
        _log.warning("whoever uses the mixture needs the text encoder at that path, %s; a hub id suits all", settings.text)
    listing = read_listing(folder)
    _refuse_bad(listing.bad, settings.skip_bad)
    cache = ArrayCache(settings.cache or default_cache())
    with output_folder(out) as part:
        with _timed(seconds, "clips"):
            prepared = prepare_clips(
                listing.clips, recipe, cache, workers=settings.workers, skip_bad=settings.skip_bad, on_progress=progress
            )  # fmt: skip
            prepared.bad[:0] = listing.bad
            repeated = drop_copies_of_test_clips(prepared)
        with _timed(seconds, "captions"):
            captions = [clip.caption for clip in prepared.clips]
            encoder = _text_encoder(settings, captions)
            embedded = prepare_captions(captions, encoder, cache, progress)
        with _timed(seconds, "clusters"):
            progress("clusters", 0, 1)
            vectors = feature_vectors(prepared, recipe, cache, embedded, wants_text(settings.features))
            placement = place_clips(prepared, vectors, settings.clustering, settings.holdout)
            progress("clusters", 1, 1)
        with _timed(seconds, "shards"):
            source = BuildInputs(recipe, cache, prepared, embedded, placement)
            latent = latent_spec(source, encoder, settings.normalisation)
            description = write_data(part, source, latent, settings.model_dump(mode="json", exclude=_NOT_CONTENT), progress)
    return BuildReport(
        out=out, description=description, train=placement.count("train"), holdout=placement.count("holdout"),
        test=placement.count("test"), repeated=repeated, cached=prepared.cached,
        skipped=tuple((bad.name, bad.reason) for bad in prepared.bad), seconds=seconds,
    )  # fmt: skip


def _refuse_bad(bad: Sequence[BadClip], skip_bad: bool) -> None:
    """Faults of the listing: all are known before anything is decoded."""
    if bad and not skip_bad:
        more = f" ({len(bad) - 1} more clips have faults)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0].reason}{more}; or leave such clips out with --skip-bad")
    for clip in bad:
        _log.warning("left out: %s", clip.reason)


def _text_encoder(settings: BuildSettings, captions: Sequence[str]) -> TextEncoder:
    different, reader = sorted(set(captions)), load_text_encoder(settings.text, 1)
    longest = max(1, reader.count(different))
    tokens = settings.text_tokens or min(longest, reader.longest)
    if longest > tokens:
        cut = sum(reader.count([caption]) > tokens for caption in different)
        _log.warning("%d of %d captions are longer than %d tokens and lose their end", cut, len(different), tokens)
    elif settings.text_tokens is None:
        _log.info("captions get %d tokens, as many as the longest takes", tokens)
    return load_text_encoder(settings.text, tokens, device=settings.device)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - begun, 2)
