"""Compute latents and features of clips and embeddings of captions. The cache ensures that each is computed only once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lutetia.models.data.decode.clip import hash_file
from lutetia.models.data.decode.cut import ClipRefused, Frames
from lutetia.models.data.decode.pool import DecoderPool, in_pool
from lutetia.models.data.decode.shape import ClipShape, choose_bucket
from lutetia.models.data.encode.cache import ArrayCache, cache_key
from lutetia.models.data.encode.features import Features
from lutetia.models.data.encode.latents import Latents
from lutetia.models.data.encode.picture_encoder import VisionEncoder, picture_latents
from lutetia.models.data.encode.text import TextEncoder
from lutetia.models.data.ingest.listing import BadClip, ClipSource
from lutetia.protocol.schema.model.pipeline_spec import PictureSpec
from lutetia.system.errors import DataError

Progress = Callable[[str, int, int], None]
"""(stage, done, total); the stages are clips, captions, clusters and shards."""

_RULE = 2  # raised when the rule changes by which files become frames, so that what was cached before is not used
_PACK_CLIPS = 64
_PACK_BYTES = 64 << 20
_CAPTIONS_AT_ONCE = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How the file of a clip becomes arrays. Its fingerprints are a part of the keys of the cache.

    Attributes:
        shapes: of the clips of each bucket.
        latents: the autoencoder.
        features: what clips are clustered by.
        picture: what shards hold of each clip's first picture; None: nothing.
        vision: the image encoder, if they hold its vectors.
    """

    shapes: Sequence[ClipShape]
    latents: Latents
    features: Sequence[Features]
    picture: PictureSpec | None = None
    vision: VisionEncoder | None = None

    def latents_key(self, digest: str, bucket: int) -> str:
        made_by = {"latents": self.latents.ref, "fingerprint": self.latents.fingerprint}
        return cache_key(kind="latents", rule=_RULE, file=digest, shape=self.shapes[bucket].model_dump(mode="json"), **made_by)

    def picture_keys(self, digest: str, bucket: int) -> dict[str, str]:
        """Keys of what a part holds of a picture, by name; its latents are not normalised yet."""
        if self.picture is None:
            return {}
        of = self.latents_key(digest, bucket)
        keys = {"pictures": cache_key(kind="picture", of=of, frames=self.picture.frames)}
        return keys | ({"vision": cache_key(kind="vision", of=of, fingerprint=self.vision.fingerprint)} if self.vision else {})

    def picture_of(self, name: str, frames: Frames) -> Tensor:
        """What a part holds of the first of the frames uint8 [F, H, W, 3] under `name`."""
        if name == "vision":
            assert self.vision
            return self.vision.encode([frames[0]])[0].cpu()
        assert self.picture
        picture = torch.as_tensor(frames[:1]).to(self.latents.device).movedim(-1, 1).float() / 127.5 - 1
        return picture_latents(self.picture, self.latents, picture, len(frames))[0].cpu()

    def features_key(self, digest: str, bucket: int, features: Features) -> str:
        of = self.latents_key(digest, bucket)
        return cache_key(kind="features", of=of, name=features.name, fingerprint=features.fingerprint)


@dataclass
class PreparedClips:
    """The usable clips in order.

    Attributes:
        clips: the clips.
        digests: SHA-256 (hex) of their files.
        buckets: the bucket of each.
        bad: clips that were left out.
        unused: other files of the folder.
        cached: how many were in the cache.
    """

    clips: list[ClipSource] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    bad: list[BadClip] = field(default_factory=list)
    unused: list[BadClip] = field(default_factory=list)
    cached: int = 0


def prepare_clips(
    clips: Sequence[ClipSource], recipe: Recipe, cache: ArrayCache, decoder: DecoderPool, *, workers: int, skip_bad: bool,
    on_progress: Progress,
) -> PreparedClips:  # fmt: skip
    """Decode and encode the clips that are not in the cache.

    Args:
        clips: of the listing.
        recipe: shape, autoencoder and features.
        cache: keeps the arrays.
        decoder: decodes the clips.
        workers: threads.
        skip_bad: leave out clips that cannot be used.
        on_progress: called after every clip.

    Raises DataError at the first clip that cannot be used, unless `skip_bad`.
    """
    prepared = PreparedClips()
    pack: dict[str, dict[str, NDArray[Any]]] = {}

    def work(clip: ClipSource) -> tuple[str, int, dict[str, NDArray[Any]]]:
        return _prepare_clip(clip, recipe, cache, decoder)

    with _one_thread_each():
        try:
            for done, (clip, outcome) in enumerate(in_pool(clips, work, workers, decoder.close), 1):
                if isinstance(outcome, ClipRefused):
                    _refuse(clip, outcome, prepared, skip_bad)
                else:
                    digest, bucket, arrays = outcome
                    prepared.clips.append(clip)
                    prepared.digests.append(digest)
                    prepared.buckets.append(bucket)
                    prepared.cached += not arrays
                    pack.update({key: {"array": array} for key, array in arrays.items()})
                    if len(pack) >= _PACK_CLIPS or sum(a["array"].nbytes for a in pack.values()) > _PACK_BYTES:
                        cache.put(pack)
                        pack.clear()
                on_progress("clips", done, len(clips))
        finally:
            cache.put(pack)  # so that an interrupted build can resume
    return prepared


def _refuse(clip: ClipSource, refusal: ClipRefused, prepared: PreparedClips, skip_bad: bool) -> None:
    if not skip_bad:
        raise DataError(f"{refusal}; or leave such clips out with --skip-bad") from refusal
    _log.warning("left out: %s", refusal)
    prepared.bad.append(BadClip(clip.name, str(refusal)))


def _prepare_clip(
    clip: ClipSource, recipe: Recipe, cache: ArrayCache, decoder: DecoderPool
) -> tuple[str, int, dict[str, NDArray[Any]]]:
    """Digest of the file, bucket, and key to array for what is not in the cache. Results depend on no other clip."""
    digest = hash_file(clip.path)
    bucket = choose_bucket(decoder.look(clip.path), recipe.shapes) if len(recipe.shapes) > 1 else 0
    latents_key = recipe.latents_key(digest, bucket)
    missing = {recipe.features_key(digest, bucket, features): features for features in recipe.features}
    missing = {key: features for key, features in missing.items() if key not in cache}
    shown = {key: name for name, key in recipe.picture_keys(digest, bucket).items() if key not in cache}
    if latents_key in cache and not missing and not shown:
        return digest, bucket, {}
    frames = decoder.decode(clip.path, recipe.shapes[bucket])
    cached = cache.get(latents_key)
    latents = torch.from_numpy(cached["array"]) if cached else recipe.latents.encode(frames[None])[0]
    if not torch.isfinite(latents).all():
        raise ClipRefused(f"{clip.name} has latents that are not finite; remove it or use another autoencoder")
    computed: dict[str, NDArray[Any]] = {} if cached else {latents_key: latents.numpy()}
    computed.update({key: features.of(frames, latents) for key, features in missing.items()})
    computed.update({key: recipe.picture_of(name, frames).numpy() for key, name in shown.items()})
    return digest, bucket, computed


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch use one thread per clip: several clips are encoded in parallel, and more threads than cores are much slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cached_array(cache: ArrayCache, key: str, name: str = "array") -> NDArray[Any]:
    """The array `name` under `key`. Raises DataError if it is no longer in the cache."""
    arrays = cache.get(key)
    if arrays is None:
        raise DataError("the cache of latents was damaged or cleared while it was in use; run the build again")
    return arrays[name]


@dataclass(frozen=True)
class EmbeddedCaptions:
    """Pooled vectors [P] of the distinct captions. Their tokens are much larger and stay in the cache on disk."""

    cache: ArrayCache
    keys: Mapping[str, str]
    pooled: Mapping[str, Tensor]
    null: tuple[Tensor, Tensor] | None = None
    """Tokens [L, D] and pooled vector [P] of the null condition; None: zeros."""

    def tokens(self, caption: str) -> Tensor:
        """Tokens [L, D]. Raises DataError if they are no longer in the cache."""
        return torch.from_numpy(cached_array(self.cache, self.keys[caption], "tokens"))


def prepare_captions(captions: Sequence[str], encoder: TextEncoder, cache: ArrayCache, on_progress: Progress) -> EmbeddedCaptions:
    """Embed each distinct caption, unless it is in the cache."""
    unique = sorted(set(captions))
    keys = {
        caption: cache_key(
            kind="text", caption=caption, encoder=encoder.ref, fingerprint=encoder.fingerprint, tokens=encoder.tokens
        )
        for caption in unique
    }
    pooled: dict[str, Tensor] = {}
    for start in range(0, len(unique), _CAPTIONS_AT_ONCE):
        part = unique[start : start + _CAPTIONS_AT_ONCE]
        if any(cache.get(keys[caption]) is None for caption in part):
            tokens, vectors = (tensor.numpy().astype(np.float32) for tensor in encoder.encode(part))
            cache.put({keys[caption]: {"tokens": tokens[row], "pooled": vectors[row]} for row, caption in enumerate(part)})
        pooled.update({caption: torch.from_numpy(cached_array(cache, keys[caption], "pooled")) for caption in part})
        on_progress("captions", min(start + _CAPTIONS_AT_ONCE, len(unique)), len(unique))
    return EmbeddedCaptions(cache, keys, pooled, encoder.null())
