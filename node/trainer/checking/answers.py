"""Carries out checks for the coordinator in the trainer process."""

from __future__ import annotations

from pathlib import Path

import torch

from lutetia.models.checking.result import ResultFiles, failed_check, finite_or_none, inspect_result, score_result
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.mixing.router import read_router, write_router
from lutetia.models.mixing.router_training import report_split, train_router
from lutetia.models.mixing.routing.choice import choose_routing, losses_known
from lutetia.models.mixing.routing.evidence import RoutingEvidence, gather_evidence
from lutetia.models.training.holdout_loss import RowLimits
from lutetia.node.trainer.checking.questions import (
    CheckFindings,
    CheckQuestion,
    GalleryQuestion,
    MixtureFindings,
    MixtureQuestion,
    RouterFindings,
    RouterQuestion,
)
from lutetia.node.trainer.messages import CheckFinished, GalleryWritten, MixtureScored, RequestFailed, RouterFinished
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.system.errors import LutetiaError

_CUT = 500


def answer_check(question: CheckQuestion) -> CheckFinished | RequestFailed:
    try:
        return CheckFinished(findings=_checked(question))
    except (LutetiaError, RuntimeError, MemoryError) as error:
        if isinstance(error, LutetiaError) and (check := failed_check(error)):
            return CheckFinished(findings=CheckFindings(check=check, text=_line(error)))
        return RequestFailed(text=_line(error))


def _checked(question: CheckQuestion) -> CheckFindings:
    manifest = _prepared(question.manifest, question.threads)
    files = ResultFiles(
        question.shard, question.epoch, question.weights, question.state, question.trace, question.lanes
    )  # fmt: skip
    inspect_result(manifest, files)
    losses = score_result(
        manifest, files, question.parent, open_shard(question.holdout, manifest.latent), draw=question.draw,
        limits=RowLimits(question.seconds, question.fewest, question.rows), device=question.device,
        base=question.base,
    )  # fmt: skip
    parent, averages, raw = map(finite_or_none, (losses.parent, losses.averages, losses.raw))
    return CheckFindings(parent=parent, averages=averages, raw=raw)


def answer_router(question: RouterQuestion) -> RouterFinished | RequestFailed:
    try:
        manifest = _prepared(question.manifest, question.threads)
        shards = [open_shard(path, manifest.latent) for path in question.train]
        if question.router:
            report = report_split(manifest, read_router(manifest, question.router), shards)
        else:
            router, report = train_router(manifest, shards, seed=0, device=question.device)
            write_router(router, question.out)
    except (LutetiaError, RuntimeError, MemoryError) as error:
        return RequestFailed(text=_line(error))
    return RouterFinished(
        findings=RouterFindings(accuracy=report.accuracy, accuracy_by_time=report.accuracy_by_time, calibration_error=report.ece)
    )


def answer_mixture(question: MixtureQuestion) -> MixtureScored | RequestFailed:
    try:
        return MixtureScored(findings=_scored(question))
    except (LutetiaError, OSError, RuntimeError, MemoryError) as error:
        return RequestFailed(text=_line(error))


def _scored(question: MixtureQuestion) -> MixtureFindings:
    manifest = _prepared(question.manifest, question.threads)
    router = read_router(manifest, question.router) if question.router else None
    holdouts = [open_shard(path, manifest.latent) for path in question.holdout]

    def evidence(weights: dict[int, Path]) -> RoutingEvidence:
        return gather_evidence(
            manifest, weights, router, holdouts, draw=question.draw, seconds=question.seconds, device=question.device,
            base=question.base,
        )  # fmt: skip

    usual = manifest.sampling.mode
    choice, before = choose_routing(evidence(question.weights), usual, question.choose), ()
    if question.current:
        now = evidence(question.current)
        before = losses_known(now, question.mode or usual, question.temperature)[: len(choice.losses)]
    few = len(before) or len(choice.losses)
    return MixtureFindings(
        mode=choice.mode, temperature=choice.temperature, averages=finite_or_none(choice.losses[:few]),
        parent=finite_or_none(before),
    )  # fmt: skip


def answer_gallery(question: GalleryQuestion) -> GalleryWritten | RequestFailed:
    from lutetia.node.trainer.checking.gallery import sample_gallery  # loads a text encoder's library

    try:
        sample_gallery(question, _prepared(question.manifest, question.threads))
    except (LutetiaError, OSError, RuntimeError, MemoryError) as error:
        return RequestFailed(text=_line(error))
    return GalleryWritten()


def _prepared(manifest: Path, threads: int | None) -> Manifest:
    if threads:
        torch.set_num_threads(threads)
    return SignedManifest.model_validate_json(manifest.read_bytes()).manifest


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:_CUT]
