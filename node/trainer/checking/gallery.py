"""Samples a mixture's gallery in the trainer process, for the coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lutetia.models.checking.pictures import Clip, write_file
from lutetia.models.data.nearest_clips import latents_of, nearest_clips
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.pipeline import LutetiaPipeline, load_pipeline
from lutetia.models.video_files import to_uint8
from lutetia.node.trainer.checking.questions import GalleryQuestion
from lutetia.protocol.schema.manifest import Manifest

_EXPERTS_IN_MEMORY = 2


def sample_gallery(question: GalleryQuestion, manifest: Manifest) -> None:
    """Write one clip for each of the manifest's prompts, one after another, each from its own fixed noise.

    Nothing is downloaded. Raises ConfigError if the text encoder or the autoencoder are not on this machine.
    """
    pipeline = load_pipeline(question.mixture, device=question.device, experts_in_memory=_EXPERTS_IN_MEMORY, base=question.base)
    clips, routing = [], []
    for index, prompt in enumerate(manifest.sampling.prompts):
        frames, weights = pipeline([prompt], seed=index, return_dict=False)
        clips.append(to_uint8(frames)[0])
        routing.append(weights[:, 0].float().cpu())
    real = list(_real(pipeline, manifest, question)) if question.train else []
    write_file(question.out, clips, torch.stack(routing).numpy(), real)


def _real(pipeline: LutetiaPipeline, manifest: Manifest, question: GalleryQuestion) -> Iterator[tuple[dict[str, Any], Clip]]:
    shards = [open_shard(path, manifest.latent) for path in question.train]
    prompts = list(manifest.sampling.prompts)
    for each in nearest_clips(prompts, pipeline.encode_prompt(prompts)[1], shards):
        clip = to_uint8(pipeline.decode_latents(latents_of(each, shards).to(pipeline.device)))[0]
        yield {"caption": each.caption, "shard": each.shard, "similarity": each.similarity}, clip
