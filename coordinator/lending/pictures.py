"""Reads the clips that a node sampled for the gallery, one at a time and without torch, and writes them as any gallery.

The node is named by the owner, and its file may still be damaged or made to hurt: form and sizes are bounded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lutetia.coordinator.galleries import experts_of, write_gallery
from lutetia.coordinator.worker.messages import SampleGallery
from lutetia.models.checking.pictures import MOST_CLIP_BYTES, clip_name
from lutetia.models.mixing.description import read_mixture
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import IntegrityError

_MOST_STEPS = 1000
_LONGEST_CAPTION = 400
_HEADER = 1 << 20


def largest_file(prompts: int, experts: int) -> int:
    """Bytes of a file with a sampled clip and a training clip for each of so many prompts."""
    return prompts * (2 * MOST_CLIP_BYTES + 4 * _MOST_STEPS * experts) + _HEADER


def write_pictures(path: Path, job: SampleGallery, manifest: Manifest, real: bool) -> None:
    """Write both folders of the job from the file at `path`. Raises IntegrityError, DiskError.

    Args:
        path: what a node made.
        job: says where to.
        manifest: the run.
        real: whether the file has training clips, too.
    """
    prompts, fps = list(manifest.sampling.prompts), manifest.latent.fps
    try:
        with safe_open(path, framework="np") as file:
            routing = _routing(file, len(prompts), len(manifest.shards))
            entries = [
                {"prompt": prompt, "seed": index, "experts": experts_of(routing[index].tolist())}
                for index, prompt in enumerate(prompts)
            ]
            digest = read_mixture(job.mixture).mixture.digest
            write_gallery(job.out, entries, _clips(file, "clip", len(prompts)), fps, {"mixture": digest})
            if real and job.real:
                chosen = _real_entries(file, prompts, len(manifest.shards))
                write_gallery(job.real, chosen, _clips(file, "real", len(prompts)), fps, {"prompts": prompts})
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"the pictures that a node made cannot be read: {str(error)[:200]}; refused") from error


def _routing(file: Any, prompts: int, experts: int) -> NDArray[np.float32]:
    """Weights of all experts at each step, [prompts, steps, experts]."""
    shape = file.get_slice("routing").get_shape()
    if len(shape) != 3 or (shape[0], shape[2]) != (prompts, experts) or not 1 <= shape[1] <= _MOST_STEPS:
        raise ValueError(f"its routing has the shape {shape}")
    values = file.get_tensor("routing")
    if values.dtype != np.float32 or not np.isfinite(values).all():
        raise ValueError("its routing is not of finite float32 numbers")
    return values


def _clips(file: Any, kind: str, count: int) -> Iterator[NDArray[np.uint8]]:
    for index in range(count):
        name = clip_name(kind, index)
        shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
        if dtype != "U8" or len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or int(np.prod(shape)) > MOST_CLIP_BYTES:
            raise ValueError(f"{name} is of {dtype} and the shape {shape}")
        yield file.get_tensor(name)


def _real_entries(file: Any, prompts: list[str], shards: int) -> list[dict[str, Any]]:
    listed = json.loads((file.metadata() or {})["real"])
    if len(listed) != len(prompts):
        raise ValueError(f"it has {len(listed)} training clips for {len(prompts)} prompts")
    entries = []
    for prompt, each in zip(prompts, listed, strict=True):
        shard, similarity = int(each["shard"]), float(each["similarity"])
        if not 0 <= shard < shards or not -1 <= similarity <= 1:
            raise ValueError(f"it names shard {shard} with the similarity {similarity}")
        caption = str(each["caption"])[:_LONGEST_CAPTION]
        entries.append(
            {"prompt": prompt, "caption": caption, "shard": shard, "same": similarity == 1.0, "similarity": similarity}
        )
    return entries
