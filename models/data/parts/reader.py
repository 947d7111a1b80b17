"""Read the clips of a shard from its parts: only what a batch needs is loaded, and padded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lutetia.models.data.parts.index import ShardIndex, is_index, part_path, read_index
from lutetia.models.data.parts.part_file import OpenPart, PartMetadata, Picture
from lutetia.models.data.parts.single_file import SingleFileShard
from lutetia.models.data.shards import ClipReader, ClipRows, Rows, ShardData, bucket_of, infinite_name
from lutetia.models.experts.pictures import Pictures, empty_pictures
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, IntegrityError

_MAPPED_BYTES = 256 << 20
"""Parts that are kept open together hold at most this much, or are one part."""

Wait = Callable[[int, Path], None]
"""Called with the number and path of a part that is not there yet; returns when it is, or raises."""


class PartedShard:
    """The clips of a shard that lies in parts. Safe for several threads.

    Args:
        path: the index.
        index: its content.
        wait: waits for a part; None: a missing part is an error.
    """

    def __init__(self, path: Path, index: ShardIndex, wait: Wait | None = None) -> None:
        self.path, self.index, self.latent = path, index, index.document.latent
        self._latents = self.latent.of_buckets
        self.null = _null_of(index)
        self._wait = wait
        self._open: OrderedDict[int, OpenPart] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clips of each bucket."""
        return self.index.sizes

    def take(self, rows: Rows, *, with_tokens: bool = True, captions: Tensor | None = None) -> ClipRows:
        picked = torch.as_tensor(rows, dtype=torch.long).numpy()
        latent, count = self._shape_of(picked), len(picked)
        data = ClipRows(
            torch.empty(count, *latent.shape),
            torch.zeros(count, latent.text_tokens if with_tokens else 0, latent.text_width),
            torch.empty(count, latent.pooled_width),
            pictures=empty_pictures(latent, count) if with_tokens else None,
        )
        texts = self.index.texts_of(picked, None if captions is None else captions.double().numpy())
        places = np.stack([self.index.parts_of(picked)[:, 0], self.index.parts_of_texts(texts)], axis=1)
        with self._lock:
            for number in np.unique(places):
                part = self._part(int(number))
                for row in np.flatnonzero(places[:, 0] == number):
                    clip = int(picked[row] - self.index.clip_starts[number])
                    data.latents[row] = part.latents(clip)
                    if data.pictures:
                        _place(data.pictures, int(row), part.picture(clip))
                for row in np.flatnonzero(places[:, 1] == number):
                    tokens, data.pooled[row] = part.text(int(texts[row] - self.index.text_starts[number]))
                    if with_tokens:
                        data.tokens[row, : len(tokens)] = tokens
        if name := infinite_name(data):
            numbers = ", ".join(str(number) for number in np.unique(places)[:8])
            raise IntegrityError(f"shard {self.path.name}: {name} of parts {numbers} are not finite; build the data again")
        return data

    def _shape_of(self, clips: NDArray[np.int64]) -> LatentSpec:
        """The spec of the bucket that all of `clips` are of."""
        numbers = {self.index.parts[number].bucket for number in self.index.parts_of(clips)[:, 0]}
        if len(numbers) > 1:
            raise DataError(f"shard {self.path.name}: clips of buckets {sorted(numbers)} cannot be read at once; read them apart")
        return self._latents[min(numbers, default=0)]

    def load(self) -> ShardData:
        """All clips. Raises DataError if they are of several buckets, or one has several captions."""
        if self.index.more is not None:
            raise DataError(
                f"shard {self.path.name}: clips have several captions, which cannot be read at once; build the data with one each"
            )
        rows, kinds, captions = self.take(range(len(self))), [], []
        with self._lock:
            for number in range(len(self.index.parts)):
                metadata = self._part(number).metadata()
                kinds += metadata.kinds
                captions += metadata.captions
        return ShardData(
            rows.latents,
            rows.tokens,
            rows.pooled,
            [captions[text] for text in self.index.texts],
            kinds,
            self.null,
            pictures=rows.pictures,
        )

    def texts(self) -> Iterator[tuple[int, Sequence[str], Tensor]]:
        """Of each part: the number of its first text, its captions and their pooled vectors [n, P]."""
        for number in range(len(self.index.parts)):
            with self._lock:
                part = self._part(number)
                captions, pooled = part.metadata().captions, part.pooled()
            yield int(self.index.text_starts[number]), captions, pooled

    def clip_with(self, text: int) -> int:
        """The first clip with this text."""
        has = self.index.texts == text
        if self.index.more is not None:
            has |= (self.index.more == text).any(axis=1)
        return int(np.flatnonzero(has)[0])

    def metadata(self, number: int) -> PartMetadata:
        """Captions, kinds and sources of a part."""
        with self._lock:
            return self._part(number).metadata()

    def _part(self, number: int) -> OpenPart:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        spec = self.index.parts[number]
        path = part_path(self.path, number, spec.blob)
        part = self._open[number] = self._opened(number, path)
        while len(self._open) > 1 and sum(each.part.blob.size for each in self._open.values()) > _MAPPED_BYTES:
            self._open.popitem(last=False)
        return part

    def _opened(self, number: int, path: Path) -> OpenPart:
        spec = self.index.parts[number]
        while True:
            if self._wait and not path.is_file():
                self._wait(number, path)
            try:
                return OpenPart(path, spec, self._latents[spec.bucket])
            except DataError:
                if not self._wait or path.is_file():
                    raise  # otherwise it was removed just now, to make room: wait for it again


def _place(pictures: Pictures, row: int, stored: Picture) -> None:
    pictures.latents[row] = stored["pictures"]
    if pictures.vision is not None:
        pictures.vision[row] = stored["vision"]


def _null_of(index: ShardIndex) -> tuple[Tensor, Tensor] | None:
    """The null condition: tokens [L, D] and pooled vector [P], float32; None: zeros."""
    if index.null is None:
        return None
    tokens, pooled = (torch.from_numpy(part).float() for part in index.null)
    return nn.functional.pad(tokens, (0, 0, 0, index.document.latent.text_tokens - len(tokens))), pooled


def open_shard(
    path: Path, latent: LatentSpec, batch: int | None = None, wait: Wait | None = None
) -> PartedShard | SingleFileShard:
    """Open a shard and check it; its clips are read when they are used.

    Args:
        path: its index, or the shard file of release 0.1.
        latent: the spec of the run; that of the shard must be equal in every field.
        batch: the fewest clips that the shard must have.
        wait: waits for a part that is not there yet; None: that is an error.

    Raises DataError (no such file, or fewer clips than a batch) or IntegrityError (anything that does not match).
    """
    shard = PartedShard(path, read_index(path), wait) if is_index(path) else SingleFileShard(path)
    for field in LatentSpec.model_fields:
        built, expected = getattr(shard.latent, field), getattr(latent, field)
        if built != expected:
            raise IntegrityError(
                f"shard {path.name} was built with {field} {built}, but the run has {expected}; build the data again"
            )
    if batch is not None and len(shard) < batch:
        raise DataError(
            f"shard {path.name} has {len(shard)} clips, fewer than a batch of {batch}; use a smaller batch or fewer experts"
        )
    return shard


def load_shard(path: Path, latent: LatentSpec, batch: int | None = None) -> ShardData:
    """Read a whole shard into memory. Arguments and errors as those of `open_shard`."""
    return open_shard(path, latent, batch).load()


class Excerpt:
    """Some clips of a shard, in ascending order and numbered from 0."""

    def __init__(self, clips: ClipReader, rows: list[int]) -> None:
        self._clips, self._rows = clips, torch.tensor(rows, dtype=torch.long)
        self.null = clips.null

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clips of each bucket."""
        buckets = len(self._clips.sizes)
        return tuple(bucket_of(self._clips.sizes, self._rows).bincount(minlength=buckets).tolist())

    def take(self, rows: Rows, *, with_tokens: bool = True, captions: Tensor | None = None) -> ClipRows:
        picked: Tensor = self._rows[torch.as_tensor(rows, dtype=torch.long)]
        return self._clips.take(picked, with_tokens=with_tokens, captions=captions)
