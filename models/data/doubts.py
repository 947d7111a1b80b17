"""What an owner should know of a build that succeeds: encoders that are stand-ins, and captions that say nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lutetia.models.data.decode.cut import Frames
from lutetia.models.data.encode.encoder import PreparedClips
from lutetia.models.data.encode.latents import Latents
from lutetia.models.data.encode.text import TextEncoder
from lutetia.models.data.ingest.listing import ClipSource

_TRIED = 6  # clips of the round trip


@dataclass(frozen=True)
class Doubts:
    """One sentence each, and the PSNR in dB of some clips after the round trip through a stand-in (None: no stand-in)."""

    sentences: tuple[str, ...]
    round_trip_db: float | None


def find_doubts(
    chosen: Collection[str], prepared: PreparedClips, text: TextEncoder, latents: Latents, decode: Callable[[ClipSource], Frames]
) -> Doubts:
    """Look at encoders and captions.

    Args:
        chosen: names of the settings that the user set; a stand-in that was chosen needs no warning.
        prepared: the clips of the build.
        text: encoder of the captions.
        latents: the autoencoder, with raw latents.
        decode: gives the frames [F, H, W, 3] of a clip.
    """
    sentences, ratio = [], None
    if latents.ref == "builtin:demo" and "latents" not in chosen:
        ratio = round_trip(latents, [decode(clip) for clip in _spread(prepared.clips)])
        sentences.append(
            f"latents builtin:demo are a stand-in, made for the clips of the demo: it rebuilds these clips at {ratio:.1f} dB, "
            "and no expert can be better; name an autoencoder (--latents), or train one: "
            "lutetia data train-autoencoder OUT --clips CLIPS"
        )
    if text.ref == "builtin:words" and "text" not in chosen:
        sentences.append(
            "text builtin:words is a stand-in that knows no meaning of words; name a text encoder (--text), such as a CLIP or T5"
        )
    captions = [(clip.name, caption) for clip in prepared.clips for caption in clip.captions]
    wordless = {caption for caption in {caption for _, caption in captions} if text.count([caption]) == 0}
    silent = [name for name, caption in captions if caption in wordless]
    if silent:
        sentences.append(
            f"{len(silent)} of {len(captions)} captions hold no words (the first is of {silent[0]}) and train as no "
            "caption; write words"
        )
    return Doubts(tuple(sentences), ratio)


def round_trip(latents: Latents, clips: Sequence[Frames]) -> float:
    """Mean PSNR, dB, of clips [F, H, W, 3] after encoding and decoding."""
    ratios = []
    for frames in clips:
        rebuilt = latents.decode(latents.encode(frames[None]))[0]
        error = np.square(rebuilt.astype(np.float32) - frames).mean()
        ratios.append(10 * np.log10(255**2 / max(float(error), 1e-3)))
    return round(float(np.mean(ratios)), 1)


def _spread(clips: Sequence[ClipSource]) -> list[ClipSource]:
    return [clips[place] for place in np.unique(np.linspace(0, len(clips) - 1, _TRIED).round().astype(int))]
