"""Checks of whole mixtures by an idle node: score one on held-out clips, and sample its gallery."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from lutetia.models.mixing.description import FILE, MixtureDocument, SignedMixture, signed_document
from lutetia.node.services.check_files import MIXTURE, PICTURES, CheckFiles, Findings, failed
from lutetia.node.trainer.checking.questions import GalleryQuestion, MixtureQuestion
from lutetia.node.trainer.messages import GalleryWritten, MixtureScored, SampleMixture, ScoreMixture
from lutetia.protocol.rpc.check_request import GalleryCheck, MixtureCheck
from lutetia.protocol.schema.manifest import Manifest, first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import IntegrityError
from lutetia.system.files import disk_errors

MOST_DESCRIPTION = 64 << 20


async def score_mixture(check: CheckFiles, asked: MixtureCheck) -> Findings:
    current = asked.current.weights if asked.current else {}
    named: dict[str, BlobRef | None] = {f"new {shard}": ref for shard, ref in asked.new.weights.items()}
    named |= {f"current {shard}": ref for shard, ref in current.items()}
    named |= {f"holdout {number}": ref for number, ref in enumerate(asked.holdout)} | {"router": asked.router}
    files = await check.fetched(named)
    holdout = tuple([files[f"holdout {number}"] for number in range(len(asked.holdout))])
    for path in holdout:
        await check.fetch_parts(path)
    await check.fetch_base()
    question = MixtureQuestion(
        **check.common(), weights={shard: files[f"new {shard}"] for shard in asked.new.weights},
        current={shard: files[f"current {shard}"] for shard in current}, mode=asked.current and asked.current.mode,
        temperature=asked.current.temperature if asked.current else 1.0, router=files.get("router"), holdout=holdout,
        draw=asked.draw, seconds=asked.seconds, choose=asked.choose, base=check.base(),
    )  # fmt: skip
    report = await check.in_child(ScoreMixture(question=question).to_wire())
    return report.findings.model_dump() if isinstance(report, MixtureScored) else failed(report)


async def sample_gallery(check: CheckFiles, asked: GalleryCheck) -> Findings:
    manifest = check.shell.network.manifest
    description = (await check.fetched({"mixture": asked.mixture}))["mixture"]
    document = await asyncio.to_thread(open_description, description, manifest)
    files = await check.fetched(dict(document.known_files))
    folder = check.store.root / MIXTURE
    await asyncio.to_thread(lay_out, folder, description, files)
    await check.fetch_base()
    train = tuple([await check.data(shard.index) for shard in manifest.shards]) if asked.real else ()
    question = GalleryQuestion(**check.common(), mixture=folder, train=train, out=check.store.root / PICTURES, base=check.base())
    report = await check.in_child(SampleMixture(question=question).to_wire())
    if not isinstance(report, GalleryWritten):
        return failed(report)
    await check.serve_made(question.out)
    return {"pictures": check.borrowing.made[-1]}


def open_description(path: Path, manifest: Manifest) -> MixtureDocument:
    """A mixture's description that a coordinator of the run signed. Raises IntegrityError, AuthorisationError."""
    if path.stat().st_size > MOST_DESCRIPTION:
        raise IntegrityError(f"the mixture's description has more than {MOST_DESCRIPTION} bytes; refused")
    try:
        signed = SignedMixture.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise IntegrityError(f"the mixture's description is malformed: {first_problem(error)}; refused") from error
    document = signed_document(signed, manifest.coordinators, path.name[:12])
    if document.run != manifest.run_id:
        raise IntegrityError(f"the mixture is of run {document.run[:12]}, not of {manifest.run_id[:12]}; refused")
    return document


def lay_out(folder: Path, description: Path, files: Mapping[str, Path]) -> None:
    """Make a mixture's folder of its files, which are linked. `files`: by relative path, as `known_files` lets them through."""
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for name, path in {**files, FILE: description}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, folder / name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, folder / name)
