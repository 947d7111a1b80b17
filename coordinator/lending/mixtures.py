"""Makes mixtures without torch: nodes train the router, evaluate the mixture and sample its gallery; files are linked here."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.coordinator.galleries import written_prompts
from lutetia.coordinator.lending.agreement import Settled
from lutetia.coordinator.lending.loans import LentCheck, loan_seconds_for
from lutetia.coordinator.lending.measuring import PATIENCE, LentMeasuring
from lutetia.coordinator.lending.pictures import largest_file, write_pictures
from lutetia.coordinator.lending.runner import NoWorker
from lutetia.coordinator.lending.service import CheckLender
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.worker.client import WorkerFailed
from lutetia.coordinator.worker.messages import (
    GallerySampled,
    Job,
    MixtureReady,
    RouterReady,
    SampleGallery,
    StitchMixture,
    TrainRouter,
)
from lutetia.models.mixing.assembly import assemble, write_mixture
from lutetia.models.mixing.description import FILE, MixtureDocument, MixtureRouting, read_mixture
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.check_request import CheckJob, CheckReport, GalleryCheck
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import LutetiaError

_LARGEST_ROUTER = 1 << 28
_FETCH_SECONDS = 600.0


@dataclass
class LentMixtures(NoWorker):
    """In the place of the worker process that makes mixtures.

    Args:
        folder: the run.
        manifest: the newest one.
        lender: has nodes train the router, measure it and sample.
        incoming: where a router that is not measured yet is kept, and pictures until they are read.
        slowest: bytes per second at which borrowers must be able to fetch.
        measuring: has mixtures evaluated.
    """

    folder: RunFolder
    manifest: Callable[[], Manifest]
    lender: CheckLender
    incoming: BlobStore
    slowest: float
    measuring: LentMeasuring

    def __post_init__(self) -> None:
        super().__init__()

    async def ask(self, job: Job[Any], *, limit: float, sign: Callable[[bytes], str] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Raises WorkerFailed: it cannot be made now, or not without a worker process."""
        if isinstance(job, TrainRouter):
            return await self._train(job)
        if isinstance(job, StitchMixture):
            return await self._make(job, sign)
        if isinstance(job, SampleGallery):
            return await self._sample(job)
        return await super().ask(job)

    async def _train(self, job: TrainRouter) -> RouterReady:
        """One node trains a router; its report counts once that of another on the same router agrees."""
        trained = await self._lend("router", needed=1)
        report = trained.report
        if report is None or report.router is None:
            raise WorkerFailed("no node trained a router")
        try:
            path = await self._fetch(report.router, report.owner)
            measured = await self._lend("router-report", report)
            if measured.report is None or report.owner in measured.liars:
                raise WorkerFailed(f"what {report.owner[:8]} says of the router that it trained is not what others measure")
            await asyncio.to_thread(shutil.copyfile, path, job.out)
        finally:
            await asyncio.to_thread(self.incoming.remove, report.router.digest)
        assert report.accuracy is not None
        return RouterReady(
            accuracy=report.accuracy, accuracy_by_time=report.accuracy_by_time,
            calibration_error=report.calibration_error or 0.0,
        )  # fmt: skip

    async def _lend(self, kind: str, trained: CheckReport | None = None, needed: int = 2) -> Settled:
        shards = self.manifest().shards
        size = sum(shard.size for shard in shards)
        check = LentCheck(
            name=kind, kind=kind, shard=None, since=self.lender.transport.now(), needed=needed,
            excluded=self.lender.excluded(trained.owner) if trained else frozenset(),
            reports=(trained,) if trained else (),
            seconds=loan_seconds_for(size, self.slowest, self.lender.usual.get(kind)),
        )  # fmt: skip
        job = CheckJob(id="0" * 64, kind=kind, shard=0, router=trained.router if trained else None, until=0.0)
        lends = {trained.router.digest: self.incoming} if trained and trained.router else {}
        return await self.lender.ask(check, job, lends)

    async def _fetch(self, ref: BlobRef, owner: str, most: int = _LARGEST_ROUTER) -> Path:
        """What a node has made for its check. Raises WorkerFailed."""
        if ref.size > most:
            raise WorkerFailed(f"the file that {owner[:8]} made has {ref.size} bytes; at most {most} are fetched")
        addresses = next((peer.addresses for peer in self.lender.peers() if peer.owner == owner), ())
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                return await fetch_blob(self.lender.transport, self.incoming, ref, [Provider(peer_id_of(owner), addresses)])
        except (TimeoutError, ConnectionError, LutetiaError) as error:
            raise WorkerFailed(f"the file that {owner[:8]} made could not be fetched: {error}") from error

    async def _make(self, job: StitchMixture, sign: Callable[[bytes], str] | None) -> MixtureReady:
        router, measured = self.lender.run().router, None
        if job.measure:
            weights = {given.shard: given.weights for given in job.accepted}
            measured = await self.measuring.measure(weights, router.router if router else None, job.measure)
        digest = await asyncio.to_thread(self._stitch, job, measured and measured.routing, sign)
        if measured is None:
            return MixtureReady(digest=digest)
        return MixtureReady(
            digest=digest, losses=measured.losses, routing=measured.routing.text if measured.routing else "",
            before=measured.before, rows_of=measured.rows_of,
        )  # fmt: skip

    async def _sample(self, job: SampleGallery) -> GallerySampled:
        """One node samples: pictures decide nothing. Only nodes that the owner names may put any on the run's page."""
        manifest = self.manifest()
        if not self.lender.checkers:
            raise WorkerFailed("pictures come only from nodes that the setting checkers names")
        prompts = list(manifest.sampling.prompts)
        real = job.real is not None and written_prompts(job.real) != prompts
        description = await asyncio.to_thread(self.incoming.add_file, job.mixture / FILE)
        size = sum(shard.size for shard in manifest.shards) if real else 0
        size += sum(ref.size for ref in read_mixture(job.mixture).mixture.files.values())
        check = LentCheck(
            name="gallery", kind="gallery", shard=None, since=self.lender.transport.now(), needed=1,
            seconds=loan_seconds_for(size, self.slowest, self.lender.usual.get("gallery")),
        )  # fmt: skip
        asked = GalleryCheck(mixture=description, real=real)
        lent = CheckJob(id="0" * 64, kind="gallery", shard=0, gallery=asked, until=0.0)
        pictures: BlobRef | None = None
        try:
            async with asyncio.timeout(PATIENCE * check.seconds):
                report = (await self.lender.ask(check, lent, {description.digest: self.incoming})).report
            assert report
            assert report.pictures
            pictures = report.pictures
            path = await self._fetch(pictures, report.owner, largest_file(len(prompts), len(manifest.shards)))
            await asyncio.to_thread(write_pictures, path, job, manifest, real)
        except TimeoutError as error:
            raise WorkerFailed(f"no node has sampled the gallery within {PATIENCE * check.seconds:.0f} s") from error
        finally:
            for ref in (description, pictures):
                if ref:
                    await asyncio.to_thread(self.incoming.remove, ref.digest)
        return GallerySampled(clips=len(prompts))

    def _stitch(self, job: StitchMixture, routing: MixtureRouting | None, sign: Callable[[bytes], str] | None) -> str:
        weights = {given.shard: path for given, path in zip(job.accepted, job.weights, strict=True)}
        accepted = {given.shard: given for given in job.accepted}

        def fill(build: Path) -> MixtureDocument:
            shutil.copytree(self.folder.parts, build, dirs_exist_ok=True)
            return assemble(build, self.manifest(), weights, accepted, job.router, routing)

        return write_mixture(job.folder, fill, sign)
