"""Finds the training clip that fits a prompt best: one with the same caption, else one whose caption's vector is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from lutetia.models.data.parts.reader import PartedShard
from lutetia.models.data.parts.single_file import SingleFileShard

_NEAR = 1 - 1e-6
"""The largest similarity of another caption: 1 means that the captions are equal."""
MOST_TEXTS = 1_000_000
"""Captions that are compared over all shards; later ones are passed over, which bounds the time."""


@dataclass(frozen=True)
class NearestClip:
    """A training clip for a prompt. `similarity`: cosine of the pooled text vectors, 1 for an equal caption."""

    shard: int
    text: int
    caption: str
    similarity: float

    @property
    def same(self) -> bool:
        """Whether the caption is the prompt."""
        return self.similarity == 1.0


def nearest_clips(
    prompts: Sequence[str], pooled: Tensor, shards: Sequence[PartedShard | SingleFileShard], most: int = MOST_TEXTS
) -> list[NearestClip]:
    """One clip per prompt.

    Args:
        prompts: N texts.
        pooled: their pooled vectors [N, P].
        shards: the training clips, at least one.
        most: captions that are compared.
    """
    best: list[NearestClip | None] = [None] * len(prompts)
    wanted: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        wanted.setdefault(prompt.strip(), []).append(index)
    directions = functional.normalize(pooled.detach().cpu().float(), dim=1)
    seen = 0
    for number, shard in enumerate(shards):
        for first, captions, vectors in shard.texts():
            if not captions:
                continue
            values, places = (directions @ functional.normalize(vectors.float(), dim=1).T).max(dim=1)
            for index in range(len(prompts)):
                place, known, capped = int(places[index]), best[index], min(float(values[index]), _NEAR)
                if known is None or capped > known.similarity:
                    best[index] = NearestClip(number, first + place, captions[place], capped)
            for place, caption in enumerate(captions):
                for index in wanted.pop(caption.strip(), ()):
                    best[index] = NearestClip(number, first + place, caption, 1.0)
            seen += len(captions)
            if seen >= most:
                return [each for each in best if each]
    return [each for each in best if each]


def latents_of(found: NearestClip, shards: Sequence[PartedShard | SingleFileShard]) -> Tensor:
    """Latents [1, C, F, H, W] of the clip, normalised as in training."""
    shard = shards[found.shard]
    return shard.take([shard.clip_with(found.text)], with_tokens=False).latents
