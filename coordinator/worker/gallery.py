"""The gallery of a mixture: a clip per prompt, which expert drew each step, and the training clip that fits the prompt best."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lutetia.coordinator.galleries import experts_of, write_gallery, written_prompts
from lutetia.coordinator.worker.messages import GallerySampled, SampleGallery
from lutetia.models.data.nearest_clips import latents_of, nearest_clips
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.mixing.description import read_mixture
from lutetia.models.pipeline import LutetiaPipeline, load_pipeline
from lutetia.models.video_files import to_uint8
from lutetia.protocol.schema.manifest import Manifest

_log = logging.getLogger(__name__)


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
    if job.real and job.train and written_prompts(job.real) != prompts:
        _write_real(job.real, prompts, pipeline, manifest, job.train)
    return GallerySampled(clips=len(prompts))


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
