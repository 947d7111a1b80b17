"""Replays another peer's training steps for an audit, from files that the supervisor has fetched."""

from __future__ import annotations

import math

import torch

from lutetia.models.data.parts.reader import open_shard
from lutetia.models.training.replay import ReplayDoubt, ReplayEnd, ReplayParent, replay, under_budget
from lutetia.node.trainer.messages import ReplayFinished, ReplayQuestion, RequestFailed
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.system.errors import LutetiaError


def answer_replay(question: ReplayQuestion) -> ReplayFinished | RequestFailed:
    if question.threads:
        torch.set_num_threads(question.threads)
    end = ReplayEnd(question.end_weights, question.end_state) if question.end_weights and question.end_state else None
    try:
        manifest = SignedManifest.model_validate_json(question.manifest.read_bytes()).manifest
        manifest = under_budget(manifest, question.epochs)
        outcome = replay(
            manifest, question.shard, open_shard(question.data, manifest.latent),
            ReplayParent(question.epoch, question.weights, question.state), question.steps,
            end=end, device=question.device, precision=question.precision, micro_batch=question.micro_batch,
            base=question.base, memory=question.memory,
            doubt=ReplayDoubt(*question.doubt) if question.doubt else None, lane=question.lane,
            kernels=question.kernels,
        )  # fmt: skip
    except (LutetiaError, RuntimeError, MemoryError) as error:
        return RequestFailed(text=" ".join(str(error).split())[:500])
    losses = tuple(loss if math.isfinite(loss) else None for loss in outcome.losses)
    return ReplayFinished(losses=losses, drift=outcome.drift, made=outcome.made, noise=outcome.noise)
