"""The gallery of a mixture: a clip per prompt, which expert drew each step, and the training clip that fits the prompt best."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lutetia.coordinator.worker.messages import GallerySampled, SampleGallery
from lutetia.models.data.nearest_clips import latents_of, nearest_clips
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.mixing.description import read_mixture
from lutetia.models.pipeline import LutetiaPipeline, load_pipeline
from lutetia.models.video_files import to_uint8, write_gif
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.files import replace_folder

_log = logging.getLogger(__name__)

_PIXELS = 128
"""Small clips are enlarged to about this side."""
_LEAST_SHARE = 0.01
_MOST_EXPERTS = 8
"""Of each step at most so many experts are named, those with the largest shares, and none below one percent."""


def sample_gallery(job: SampleGallery, manifest: Manifest, device: str, base: Mapping[str, Path] | None) -> GallerySampled:
    """Sample every prompt of the manifest, each from its own fixed noise, and write both folders of the job."""
    pipeline = load_pipeline(job.mixture, experts_in_memory=2, hub=True, base=base)  # the run's owner named the models
    if device != "cpu":
        pipeline.to(device)
    prompts = list(manifest.sampling.prompts)
    frames, routing = pipeline(prompts, seed=0, return_dict=False)
    entries = [
        {"prompt": prompt, "seed": index, "experts": experts_of(routing[:, index].tolist())}
        for index, prompt in enumerate(prompts)
    ]
    write_gallery(job.out, entries, list(to_uint8(frames)), pipeline.fps, {"mixture": read_mixture(job.mixture).mixture.digest})
    if job.real and job.train and _written_prompts(job.real) != prompts:
        _write_real(job.real, prompts, pipeline, manifest, job.train)
    return GallerySampled(clips=len(prompts))


def experts_of(routing: Sequence[Sequence[float]]) -> list[list[tuple[int, float]]]:
    """Of each step, from noise to clip: the experts that drew it and their shares, the largest first.

    `routing`: weights of all experts at each step, [steps][K].
    """
    steps = []
    for weights in routing:
        ranked = sorted(enumerate(weights), key=lambda item: -item[1])[:_MOST_EXPERTS]
        steps.append([(expert, round(share, 3)) for expert, share in ranked if share >= _LEAST_SHARE])
    return steps


def _write_real(out: Path, prompts: list[str], pipeline: LutetiaPipeline, manifest: Manifest, train: Sequence[Path]) -> None:
    """Training clips, never held-out ones: every peer of the run may have them already."""
    shards = [open_shard(path, manifest.latent) for path in train]
    chosen = nearest_clips(prompts, pipeline.encode_prompt(prompts)[1], shards)
    entries = [
        {"prompt": prompt, "caption": each.caption, "shard": each.shard, "same": each.same, "similarity": each.similarity}
        for prompt, each in zip(prompts, chosen, strict=True)
    ]
    clips = [to_uint8(pipeline.decode_latents(latents_of(each, shards).to(pipeline.device)))[0] for each in chosen]
    write_gallery(out, entries, clips, pipeline.fps, {"prompts": prompts})
    _log.info("%d of %d prompts have a training clip of the same caption", sum(each.same for each in chosen), len(prompts))


def _written_prompts(folder: Path) -> list[str] | None:
    try:
        return json.loads((folder / "gallery.json").read_text())["prompts"]
    except (OSError, ValueError, KeyError):
        return None


def write_gallery(
    out: Path, entries: Sequence[Mapping[str, Any]], clips: Sequence[Any], fps: float, about: Mapping[str, Any]
) -> None:
    """Replace the folder `out` by one GIF per entry and `gallery.json`, which is `about` and the entries with their files.

    `clips`: uint8 [F, H, W, 3] each.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        listed = []
        for index, (entry, clip) in enumerate(zip(entries, clips, strict=True)):
            factor = max(1, _PIXELS // max(clip.shape[1:3]))
            pictures = [Image.fromarray(frame).resize((frame.shape[1] * factor, frame.shape[0] * factor), 0) for frame in clip]
            file = f"{index:03d}.gif"
            write_gif(pictures, part / file, fps, shared_palette=False)
            listed.append({**entry, "file": file})
        (part / "gallery.json").write_text(json.dumps({**about, "clips": listed}, ensure_ascii=False))
        part.chmod(0o755)
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
