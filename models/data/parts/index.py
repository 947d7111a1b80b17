"""The index of a shard: which blobs its clips lie in, and which text each clip has. Needs no torch: a node's supervisor reads it.

A shard is an index and its *parts*, one safetensors file each. Clips are numbered through all parts. A text (a caption and its
embedding) is stored once, in the part of the first clip that has it; texts are numbered in that order. So the index and the
order of batches say which parts a step needs. A clip may have several texts, of which each step draws one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.fields import Count, Tally
from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, IntegrityError
from lutetia.system.files import atomic_path

MAX_INDEX_BYTES = 64 << 20
MAX_PARTS = 4096
MAX_PART_BYTES = 256_000_000
MAX_CLIPS = 1 << 23
METADATA = "lutetia"
"""The metadata entry of index and parts. Only one: safetensors writes several in random order."""
Split = Literal["train", "holdout", "test"]
Null = tuple[NDArray[np.float16], NDArray[np.float16]]
MOST_TEXTS = 16
"""Texts of a clip."""
_NULL = ("null_tokens", "null_pooled")
_TENSORS = tuple({"texts", *null, *more} for null in ((), _NULL) for more in ((), ("more_texts",)))
"""Of an index: `_NULL` where the null condition of its texts is not zeros, `more_texts` where a clip has several texts."""


class PartSpec(Frozen):
    """One part of a shard."""

    blob: BlobRef = Field(description="digest and size of the file")
    clips: Count = Field(description="clips in the part")
    texts: Tally = Field(description="texts in the part")
    bucket: int = Field(default=0, ge=0, le=63, description="bucket of all its clips")

    @model_validator(mode="after")
    def _is_bounded(self) -> PartSpec:
        if self.blob.size > MAX_PART_BYTES:
            raise ValueError(f"a part has {self.blob.size} bytes, more than {MAX_PART_BYTES}")
        return self


class IndexDocument(Frozen):
    """The metadata of an index file."""

    format: Literal["lutetia-shard-2"] = Field(default="lutetia-shard-2", description="version of this format")
    latent: LatentSpec = Field(description="shapes of latents and texts, and their encoders")
    name: str = Field(default="", max_length=512, description="name of the cluster")
    split: Split = Field(default="train", description="use of the clips")
    parts: tuple[PartSpec, ...] = Field(min_length=1, max_length=MAX_PARTS, description="the parts, in the order of their clips")


@dataclass(frozen=True)
class ShardIndex:
    """An index that was read.

    Attributes:
        document: its metadata.
        texts: the number of each clip's first text, int32 [N].
        more: its further texts, int32 [N, V], -1 where it has fewer; None: each clip has one.
        null: tokens [l, D] and pooled vector [P] of the null condition, float16; None: zeros.
    """

    document: IndexDocument
    texts: NDArray[np.int32]
    null: Null | None = None
    more: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def parts(self) -> tuple[PartSpec, ...]:
        return self.document.parts

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Clips of each bucket; clips are numbered bucket by bucket."""
        sizes = [0] * (1 + len(self.document.latent.buckets))
        for part in self.parts:
            sizes[part.bucket] += part.clips
        return tuple(sizes)

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.blob.size for part in self.parts)

    @cached_property
    def clip_starts(self) -> NDArray[np.int64]:
        """The first clip of each part, and the number of clips [parts + 1]."""
        return np.cumsum([0, *(part.clips for part in self.parts)])

    @cached_property
    def text_starts(self) -> NDArray[np.int64]:
        """The first text of each part, and the number of texts [parts + 1]."""
        return np.cumsum([0, *(part.texts for part in self.parts)])

    def texts_of(self, clips: NDArray[np.int64], drawn: NDArray[np.float64] | None = None) -> NDArray[np.int32]:
        """One text of each clip, [len(clips)]: the first, or of all its texts the one at the place `drawn`, in [0, 1)."""
        first = self.texts[clips]
        if self.more is None or drawn is None:
            return first
        texts = np.concatenate([first[:, None], self.more[clips]], axis=1)
        place = (drawn * (texts >= 0).sum(axis=1)).astype(np.int64)
        return texts[np.arange(len(texts)), place]

    def parts_of(self, clips: NDArray[np.int64]) -> NDArray[np.int64]:
        """The parts that hold the latents and each text of each clip, int64 [len(clips), 1 + texts]."""
        texts = self.texts[clips][:, None]
        if self.more is not None:
            more = self.more[clips]
            texts = np.concatenate([texts, np.where(more < 0, texts, more)], axis=1)
        of_clips = np.searchsorted(self.clip_starts, clips, side="right") - 1
        return np.concatenate([of_clips[:, None], self.parts_of_texts(texts)], axis=1)

    def parts_of_texts(self, texts: NDArray[np.int32]) -> NDArray[np.int64]:
        """The part that holds each text, in the shape of `texts`."""
        return np.searchsorted(self.text_starts, texts, side="right") - 1


def is_index(path: Path) -> bool:
    """Whether the file names parts; otherwise it may be a shard in one file, as earlier versions wrote them."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys()) in _TENSORS
    except (SafetensorError, OSError):
        return False


def parts_of(path: Path) -> tuple[PartSpec, ...]:
    """The parts that the file at `path` lists; none if it is a shard in one file. Raises as `read_index`."""
    return read_index(path).parts if is_index(path) else ()


def read_index(path: Path) -> ShardIndex:
    """Read and check an index. Raises DataError (no such file) or IntegrityError (malformed, too large, contradictory)."""
    try:
        if (size := path.stat().st_size) > MAX_INDEX_BYTES:
            raise IntegrityError(f"the index {path.name} has {size} bytes, more than {MAX_INDEX_BYTES}; refused")
        with safe_open(path, framework="numpy") as file:
            text, names = (file.metadata() or {}).get(METADATA), set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names} if names in _TENSORS else {}
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist; fetch or build it again") from error
    except SafetensorError as error:
        raise IntegrityError(f"shard {path} is not a complete safetensors file ({error}); fetch or build it again") from error
    if text is None or not tensors:
        raise IntegrityError(f"{path} is a safetensors file but not a shard; name one that `lutetia data build` wrote")
    try:
        document = IndexDocument.model_validate_json(text)
    except ValidationError as error:
        raise IntegrityError(f"the index {path.name} is malformed ({first_problem(error)}); build the data again") from error
    null = (tensors[_NULL[0]], tensors[_NULL[1]]) if _NULL[0] in tensors else None
    index = ShardIndex(document, tensors["texts"], cast("Null | None", null), tensors.get("more_texts"))
    if problem := _contradiction(index):
        raise IntegrityError(f"the index {path.name} contradicts itself: {problem}; build the data again")
    return index


def _contradiction(index: ShardIndex) -> str | None:
    texts = index.texts
    if texts.dtype != np.int32 or texts.ndim != 1 or not 0 < len(texts) <= MAX_CLIPS:
        return f"its texts are not one row of 1 to {MAX_CLIPS} whole numbers"
    if len(texts) != index.clip_starts[-1]:
        return f"its parts hold {index.clip_starts[-1]} clips, but {len(texts)} clips have texts"
    buckets = [part.bucket for part in index.parts]
    if buckets != sorted(buckets) or buckets[-1] > len(index.document.latent.buckets):
        return "its parts are not ordered by the buckets of its latents"
    if texts.min() < 0 or texts.max() >= index.text_starts[-1]:
        return f"a clip has a text beyond the {index.text_starts[-1]} of its parts"
    if index.more is not None and (problem := _more_contradiction(index.more, len(texts), int(index.text_starts[-1]))):
        return problem
    return _null_contradiction(index.null, index.document.latent)


def _more_contradiction(more: NDArray[np.int32], clips: int, texts: int) -> str | None:
    if more.dtype != np.int32 or more.ndim != 2 or len(more) != clips or not 0 < more.shape[1] < MOST_TEXTS:
        return f"its further texts are not 1 to {MOST_TEXTS - 1} whole numbers for each of {clips} clips"
    if more.min() < -1 or more.max() >= texts:
        return f"a clip has a further text beyond the {texts} of its parts"
    if ((more[:, :-1] < 0) & (more[:, 1:] >= 0)).any():
        return "the further texts of a clip are not its first entries"
    return None


def _null_contradiction(null: Null | None, latent: LatentSpec) -> str | None:
    needed = latent.text is not None and latent.text.null == "empty"
    if needed != (null is not None):
        return "the null condition of its text is missing" if needed else "it has a null condition that its text does not need"
    if null is None:
        return None
    tokens, pooled = null
    if tokens.ndim != 2 or len(tokens) > latent.text_tokens or tokens.shape[1] != latent.text_width:
        return f"the tokens of its null condition are {list(tokens.shape)}"
    if pooled.shape != (latent.pooled_width,):
        return f"the pooled vector of its null condition is {list(pooled.shape)}"
    if any(part.dtype != np.float16 or not np.isfinite(part).all() for part in null):
        return "its null condition is not finite in half precision"
    return None


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index atomically. The same index gives the same bytes. Raises DataError if it is too large, or DiskError."""
    tensors = {"texts": index.texts, **dict(zip(_NULL, index.null or (), strict=False))}
    if index.more is not None:
        tensors["more_texts"] = index.more
    data = save(
        {name: np.ascontiguousarray(each) for name, each in tensors.items()},
        metadata={METADATA: canonical(index.document).decode()},
    )
    if len(data) > MAX_INDEX_BYTES:
        raise DataError(f"cannot write shard {path.name}: its index has {len(data)} bytes; split the data into more experts")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def part_path(index: Path, number: int, blob: BlobRef) -> Path:
    """Where a part lies: in a blob store under its digest, beside other blobs; in a folder of data under its number."""
    if len(index.name) == 64 and index.parent.name == index.name[:2]:
        return index.parent.parent / blob.digest[:2] / blob.digest
    return index.with_suffix("") / f"{number:04d}.safetensors"
