"""Build shards from a folder of captioned clips: decode, encode, cluster, hold out, write.

The result is a folder with `shards/NNN.{train,holdout,test}.safetensors`, `sheets/` (a contact sheet per cluster), `clips.jsonl`
(shard and split of every clip) and `data.json`. The same clips and settings give the same bytes. It appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.cluster.assignment import drop_copies_of_test_clips, feature_vectors, place_clips, training_rows
from lutetia.models.data.cluster.expert_count import propose_experts
from lutetia.models.data.cluster.kmeans import Vectors, smallest_cluster
from lutetia.models.data.decode.cut import Frames
from lutetia.models.data.decode.pool import DecoderPool, memory_of_a_clip
from lutetia.models.data.description import DataDescription
from lutetia.models.data.doubts import find_doubts
from lutetia.models.data.encode.cache import array_cache
from lutetia.models.data.encode.encoder import PreparedClips, Progress, Recipe, prepare_captions, prepare_clips
from lutetia.models.data.encode.features import load_features, wants_text
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.picture_encoder import VisionEncoder
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.data.encode.text_encoder import TextEncoder
from lutetia.models.data.ingest.listing import BadClip, ClipSource, Listing, read_listing
from lutetia.models.data.output import check_output, output_folder
from lutetia.models.data.shard_writer import BuildInputs, latent_spec, write_data
from lutetia.models.networks.model_ref import anchored
from lutetia.models.sources.data_settings import check_tokenizer, with_pipeline
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.model.pipeline_spec import TextRecipe
from lutetia.system.errors import DataError
from lutetia.system.paths import default_cache_folder

_log = logging.getLogger(__name__)
_ROOM = 32  # tokens at least: prompts may be longer than all captions, and cannot get more tokens later
# settings that are not written: they do not change the content, or only the number of experts, which is written
_NOT_CONTENT = {"skip_bad", "workers", "device", "cache", "clip_seconds", "clip_memory", "auto_experts", "budget"}


class BuildReport(Frozen):
    """The result of a build."""

    out: Path = Field(description="the folder that was written")
    description: DataDescription = Field(description="content of its data.json")
    train: int = Field(description="clips to train on")
    holdout: int = Field(description="training clips held out for acceptance checks")
    test: int = Field(description="clips of the split test")
    repeated: int = Field(description="training clips left out as copies of test clips")
    cached: int = Field(description="clips that were in the cache and were not decoded")
    skipped: tuple[tuple[str, str], ...] = Field(default=(), description="(clip, reason) of the clips that were left out")
    unused: tuple[tuple[str, str], ...] = Field(default=(), description="(file, reason) of other files that were not used")
    round_trip_db: float | None = Field(
        default=None, description="PSNR of some clips after encoding and decoding, dB; only of the stand-in builtin:demo"
    )
    buckets: tuple[tuple[str, int], ...] = Field(
        default=(), description="(frames×height×width, clips) of each bucket; empty: all clips have one shape"
    )
    seconds: dict[str, float] = Field(default={}, description="stage to its duration, seconds")


def build_data(folder: Path, out: Path, settings: BuildSettings, on_progress: Progress | None = None) -> BuildReport:
    """Build `out` from the clips in `folder`.

    Args:
        folder: videos or WebDataset archives with captions.
        out: new folder, or the result of an earlier build, which is replaced.
        settings: how clips become shards.
        on_progress: called with stage, done and total.

    Raises DataError, ConfigError or DiskError; `out` is then unchanged.
    """
    progress = on_progress or (lambda stage, done, total: None)
    seconds: dict[str, float] = {}
    check_output(out)
    chosen = settings.model_fields_set
    settings, text, picture = with_pipeline(settings)
    settings = settings.model_copy(update={"latents": anchored(settings.latents), "text": anchored(settings.text)})
    recipe = Recipe(
        settings.clip_shapes,
        load_latents(settings.latents, device=settings.device),
        load_features(settings.features, settings.device),
        picture,
        VisionEncoder(settings.text, settings.device) if picture and picture.vision_tokens else None,
    )
    for shape in recipe.shapes:
        recipe.latents.shape_of(shape.frames, shape.height, shape.width)
    check_tokenizer(load_text_encoder(settings.text, settings.text_tokens or 1, text))  # fails before the long work begins
    if any(Path(part).is_dir() for part in settings.text.split("+")):
        _log.warning("every user of the mixture needs the text encoder at this path: %s; a hub id avoids that", settings.text)
    listing = read_listing(folder)
    _refuse_bad(listing.bad, settings.skip_bad)
    if listing.unused:
        _log.warning("files in %s that were not used: %s; clips.jsonl names each", folder, listing.unused_in_short())
    _check_counts(listing, settings)
    with (
        output_folder(out) as part,
        array_cache(settings.cache or default_cache_folder() / "data", instead=part.parent) as cache,
        DecoderPool(settings.clip_seconds, settings.clip_memory or memory_of_a_clip(settings.workers)) as decoder,
    ):
        with _timed(seconds, "clips"):
            prepared = prepare_clips(
                listing.clips, recipe, cache, decoder, workers=settings.workers, skip_bad=settings.skip_bad, on_progress=progress
            )  # fmt: skip
            prepared.bad[:0] = listing.bad
            prepared.unused = listing.unused
            _require_clips(prepared)
            repeated = drop_copies_of_test_clips(prepared)
            buckets = _clips_of_buckets(recipe, prepared)
        with _timed(seconds, "captions"):
            captions = [caption for clip in prepared.clips for caption in clip.captions]
            encoder = _text_encoder(settings, text, captions)
            embedded = prepare_captions(captions, encoder, cache, progress)

            def frames_of(clip: ClipSource) -> Frames:
                return decoder.decode(clip.path, recipe.shapes[prepared.buckets[prepared.clips.index(clip)]])

            doubts = find_doubts(chosen, prepared, encoder, recipe.latents, frames_of)
            for doubt in doubts.sentences:
                _log.warning("%s", doubt)
        with _timed(seconds, "clusters"):
            progress("clusters", 0, 1)
            vectors = feature_vectors(prepared, recipe, cache, embedded, wants_text(settings.features))
            settings = _with_experts(settings, prepared, vectors)
            placement = place_clips(prepared, vectors, settings.clustering, settings.holdout)
            progress("clusters", 1, 1)
        with _timed(seconds, "shards"):
            source = BuildInputs(recipe, cache, decoder, prepared, embedded, placement)
            latent = latent_spec(source, encoder, settings.normalisation)
            description = write_data(part, source, latent, settings.model_dump(mode="json", exclude=_NOT_CONTENT), progress)
    return BuildReport(
        out=out, description=description, train=placement.count("train"), holdout=placement.count("holdout"),
        test=placement.count("test"), repeated=repeated, cached=prepared.cached,
        skipped=tuple((bad.name, bad.reason) for bad in prepared.bad),
        unused=tuple((other.name, other.reason) for other in prepared.unused),
        round_trip_db=doubts.round_trip_db, buckets=buckets, seconds=seconds,
    )  # fmt: skip


def _clips_of_buckets(recipe: Recipe, prepared: PreparedClips) -> tuple[tuple[str, int], ...]:
    """Shape and number of clips of each bucket; empty if there is one. DataError: one has no training clip."""
    if len(recipe.shapes) == 1:
        return ()
    names = [f"{shape.frames}×{shape.height}×{shape.width}" for shape in recipe.shapes]
    counts = tuple((name, prepared.buckets.count(number)) for number, name in enumerate(names))
    _log.info("clips by bucket (frames×height×width): %s", ", ".join(f"{name}: {count}" for name, count in counts))
    training = [bucket for clip, bucket in zip(prepared.clips, prepared.buckets, strict=True) if clip.split == "train"]
    empty = next((name for number, name in enumerate(names) if number not in training), None)
    if empty is not None:
        raise DataError(f"no training clip goes to the bucket {empty}; leave that shape out of frames, height, width and buckets")
    return counts


def _refuse_bad(bad: Sequence[BadClip], skip_bad: bool) -> None:
    """Raise or log the faults of the listing, before anything is decoded."""
    if bad and not skip_bad:
        others = len(bad) - 1
        more = f" ({others} more clip{'s have' if others > 1 else ' has'} faults)" if others else ""
        raise DataError(f"{bad[0].reason}{more}; or leave such clips out with --skip-bad")
    for clip in bad:
        _log.warning("left out: %s", clip.reason)


def _check_counts(listing: Listing, settings: BuildSettings) -> None:
    """Raise DataError where the number of clips alone shows that the build must fail, before anything is decoded."""
    training = sum(clip.split == "train" for clip in listing.clips)
    if not listing.clips:
        raise DataError(f"no clip is left: all {len(listing.bad)} were left out, the first because {listing.bad[0].reason}")
    if not training:
        raise DataError("no clip is left for training; check the split column of the metadata")
    fewest = settings.clustering.model_copy(update={"experts": 1}) if settings.auto_experts else settings.clustering
    smallest_cluster(fewest, training)


def _with_experts(settings: BuildSettings, prepared: PreparedClips, vectors: Vectors) -> BuildSettings:
    """The settings with the number of experts that the data deserve, if that was asked for."""
    if not settings.auto_experts:
        return settings
    rows = training_rows(prepared.clips)
    digests, kinds = [prepared.digests[row] for row in rows], [prepared.clips[row].kind for row in rows]
    proposal = propose_experts(vectors[rows], digests, kinds, settings.clustering, settings.budget)
    for each in proposal.tried:
        _log.info(
            "%d experts: %s", each.experts, each.impossible or f"silhouette {each.silhouette:.2f}, smallest {each.smallest}"
        )
    _log.warning("%s", proposal.reason)
    return settings.model_copy(update={"experts": proposal.experts})


def _require_clips(prepared: PreparedClips) -> None:
    """Raise DataError if every clip was left out."""
    if not prepared.clips:
        raise DataError(f"no clip is left: all {len(prepared.bad)} were left out, the first because {prepared.bad[0].reason}")


def _text_encoder(settings: BuildSettings, recipe: TextRecipe | None, captions: Sequence[str]) -> TextEncoder:
    different, reader = sorted(set(captions)), load_text_encoder(settings.text, 1, recipe)
    longest = max(1, reader.count(different))
    tokens = settings.text_tokens or min(max(longest, _ROOM), reader.longest)
    if longest > tokens:
        cut = sum(reader.count([caption]) > tokens for caption in different)
        _log.warning("%d of %d captions are longer than %d tokens and are truncated", cut, len(different), tokens)
    elif settings.text_tokens is None:
        _log.info("captions and prompts get %d tokens; the longest caption needs %d", tokens, longest)
    return load_text_encoder(settings.text, tokens, recipe, device=settings.device)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - started, 2)
