"""The file in which a node hands in the clips of a gallery: uint8 frames and the routing, as safetensors. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Clip = NDArray[np.uint8]
"""[F, H, W, 3]"""

MOST_CLIP_BYTES = 32 << 20
"""Of a clip in the file: its reader has one at a time in memory. Larger ones are made smaller, by whole pixels."""


def clip_name(kind: str, index: int) -> str:
    """The tensor of a prompt's clip. `kind`: clip (sampled) or real (of the training clips)."""
    return f"{kind}.{index:03d}"


def within_limit(clip: Clip, most: int = MOST_CLIP_BYTES) -> Clip:
    """The clip, of which every n-th pixel of a row and column is taken if it has too many bytes."""
    step = math.ceil(math.sqrt(clip.nbytes / most))
    return np.ascontiguousarray(clip[:, ::step, ::step]) if step > 1 else clip


def write_file(
    path: Path, clips: Sequence[Clip], routing: NDArray[np.float32], real: Sequence[tuple[Mapping[str, Any], Clip]] = ()
) -> None:
    """Write the file.

    Args:
        path: where to.
        clips: one for each prompt.
        routing: weights of all experts at each step, [prompts, steps, experts].
        real: for each prompt the training clip that fits best, and what is told of it.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {clip_name("clip", index): within_limit(clip) for index, clip in enumerate(clips)}
    tensors |= {clip_name("real", index): within_limit(clip) for index, (_, clip) in enumerate(real)}
    tensors["routing"] = np.ascontiguousarray(routing)
    save_file(tensors, path, {"real": json.dumps([about for about, _ in real])})
