"""Decides when to make a new mixture, and makes it: router, stitch and gallery, in a worker process of its own.

The router tells the clusters' *data* apart and never sees an expert. So it is trained once, when the first result was accepted,
and every later mixture uses it. Shards without an accepted result are left out. Every mixture is kept by its digest; the one that
`succession` makes current is in the mixture folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from lutetia.coordinator.acceptance.loss_bounds import mean
from lutetia.coordinator.galleries import REAL, keep_gallery
from lutetia.coordinator.holdouts import data_files, holdout_files
from lutetia.coordinator.ledger.events import Event, MixtureStitched, RouterTrained, RunFinished
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.mixtures.archive import HeldOutLosses, MixtureArchive
from lutetia.coordinator.mixtures.succession import Succession, succession
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed
from lutetia.coordinator.worker.messages import (
    MeasureMixture,
    MixtureReady,
    RouterReady,
    SampleGallery,
    StitchMixture,
    TrainRouter,
)
from lutetia.coordinator.worker.time_limits import patience_for
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import LutetiaError
from lutetia.system.files import replace_folder

_log = logging.getLogger(__name__)

_MIXTURE_DOMAIN = b"lutetia-mixture-1\n"  # what models/mixing/description.py signs
_GALLERY_PATIENCE = 6 * 3600.0
"""Sampling reports nothing until all prompts are done."""
_RETRY_SECONDS = 30.0

Step = Literal["router", "mixture", "finish", "nothing"]


def next_step(state: RunState, *, when: Literal["refresh", "end"], rested: bool) -> Step:
    """What to make now. `rested`: the last mixture is old enough for a new one before the run's end."""
    epochs = state.accepted_epochs
    if not any(epochs):
        return "nothing"
    if state.router is None and len(epochs) > 1:
        return "router"
    if state.stitched is None or state.stitched.epochs != epochs:
        due = state.budgets_done or (when == "refresh" and rested)
        return "mixture" if due else "nothing"
    return "finish" if state.budgets_done and not state.finished and not state.audits else "nothing"


@dataclass(frozen=True)
class Measuring:
    """How mixtures are measured on held-out clips.

    Args:
        draw: a secret that fixes rows, noise and times.
        seconds: what one measurement may take.
        choose: choose mode and temperature of the routing by it.
    """

    draw: str
    seconds: float
    choose: bool


@dataclass
class Stitcher:
    """Makes what the ledger says is due.

    Args:
        worker: trains the router, stitches and samples.
        now: Unix seconds.
        when: after acceptances, at most every `refresh_seconds` ("refresh"), or once when all budgets are done ("end").
        gallery: sample the manifest's prompts from each mixture that becomes current.
        gallery_bytes: most bytes of the galleries of earlier mixtures.
        archive: keeps all mixtures.
        measuring: how mixtures are measured on held-out clips; None: they are not.
    """

    folder: RunFolder
    manifest: Manifest
    coordinator: Identity
    blobs: BlobStore
    judge_loop: JudgeLoop
    worker: WorkerClient
    now: Callable[[], float]
    when: Literal["refresh", "end"]
    refresh_seconds: float
    gallery: bool
    archive: MixtureArchive
    gallery_bytes: int = 0
    measuring: Measuring | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _last: float = float("-inf")

    def wake(self) -> None:
        """The run's state has changed."""
        self._changed.set()

    async def run(self) -> None:
        """Make what is due until cancelled. A failed attempt is logged and repeated; the run continues meanwhile."""
        while True:
            self._changed.clear()
            state = self.judge_loop.state.run
            if not self.folder.mixture.is_dir():
                state = replace(state, mixture=None, stitched=None)  # restored from a backup without some of its files
            step = next_step(state, when=self.when, rested=self.now() - self._last >= self.refresh_seconds)
            if step == "nothing":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.refresh_seconds):
                        await self._changed.wait()
                continue
            try:
                events = await self._make(step, state)
                await self.judge_loop.append(*events)
                if self.gallery and self.manifest.sampling.prompts and any(_becomes_current(event) for event in events):
                    await self._sample()
            except LutetiaError as error:  # blobs that only peers have yet, a full disk, a crash of the worker process
                _log.warning("could not make the %s: %s; trying again in %.0f s", step, error, _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _make(self, step: Step, state: RunState) -> list[Event]:
        if step == "router":
            return [await self._train_router(state.accepted_epochs)]
        if step == "mixture":
            return await self._stitch(state)
        assert state.mixture is not None
        _log.info(
            "all budgets are done; the mixture is %s: lutetia generate PROMPT --mixture %s; results and mixture are served on",
            self.folder.mixture, shlex.quote(str(self.folder.mixture)),
        )  # fmt: skip
        return [RunFinished(time=self.now(), mixture=state.mixture.mixture)]

    async def _train_router(self, epochs: tuple[int, ...]) -> RouterTrained:
        out = self.folder.root / "router.safetensors"
        job = TrainRouter(
            train=tuple(data_files(self.folder, self.manifest)),
            holdout=tuple(holdout_files(self.folder, self.manifest)), out=out,
        )  # fmt: skip
        report = await self.worker.ask(job, limit=patience_for(sum(shard.size for shard in self.manifest.shards)))
        ref = await asyncio.to_thread(self.blobs.add_file, out, True)
        _log.info("router trained: %.1f %% right on held-out noisy clips", 100 * report.accuracy)
        return _router_event(self.now(), epochs, ref, report)

    async def _stitch(self, state: RunState) -> list[Event]:
        router = state.router
        accepted = [given for index in range(len(state.shards)) if (given := state.shards[index].acceptance)]
        job = StitchMixture(
            folder=self.folder.next_mixture, accepted=tuple(accepted),
            weights=tuple(self.blobs.path(acceptance.weights.digest) for acceptance in accepted),
            router=self.blobs.path(router.router.digest) if router else None, measure=self._measure(),
        )  # fmt: skip
        size = sum(acceptance.weights.size for acceptance in accepted)
        answer = await self.worker.ask(job, limit=patience_for(size), sign=self._sign)
        self._last, epochs = self.now(), state.accepted_epochs
        decided = await asyncio.to_thread(self._settle, state, answer)
        _log.info(
            "mixture %s stitched from epochs %s; it is %scurrent: %s",
            answer.digest[:12], list(epochs), "" if decided.current else "kept, and not ", decided.text,
        )  # fmt: skip
        if answer.routing:
            _log.info("routing of mixture %s: %s", answer.digest[:12], answer.routing)
        return [
            MixtureStitched(
                time=self.now(), epochs=epochs, terms=state.terms, mixture=answer.digest, current=decided.current,
                text=decided.text, loss=mean(answer.losses) if answer.losses else None, rows=len(answer.losses),
            )
        ]  # fmt: skip

    def _measure(self) -> MeasureMixture | None:
        """On secret rows that are the same for all mixtures of a manifest."""
        if self.measuring is None:
            return None
        return MeasureMixture(
            holdout=tuple(holdout_files(self.folder, self.manifest)), draw=self.measuring.draw,
            seconds=self.measuring.seconds, choose=self.measuring.choose,
        )  # fmt: skip

    def _settle(self, state: RunState, made: MixtureReady) -> Succession:
        """Keep the new mixture, and make it the run's if it succeeds the current one. Blocks on the disk."""
        digest, new, old = self.archive.add(self.folder.next_mixture), None, None
        if made.losses and self.measuring:
            words = [digest_of(self.manifest), self.measuring.draw, *(shard.holdout.digest for shard in self.manifest.shards)]
            rows = made.rows_of or hashlib.sha256(" ".join(words).encode()).hexdigest()
            weights = {shard: given.weights for shard, view in state.shards.items() if (given := view.acceptance)}
            new = HeldOutLosses(rows_of=rows, losses=made.losses, weights=weights)
            self.archive.write_losses(digest, new)
        if made.before:
            old = HeldOutLosses(rows_of=made.rows_of, losses=made.before)
        elif state.mixture and not made.rows_of:
            old = self.archive.read_losses(state.mixture.mixture)
        decided = succession(state, new, old)
        if decided.current:
            replace_folder(self.folder.next_mixture, self.folder.mixture)
        else:
            shutil.rmtree(self.folder.next_mixture)
        self.archive.settle(made.digest if decided.current or state.mixture is None else state.mixture.mixture)
        return decided

    def _sign(self, message: bytes) -> str:
        """Sign a mixture's description and nothing else: the worker process reads files of unknown peers."""
        if not message.startswith(_MIXTURE_DOMAIN):
            raise WorkerFailed("the worker process asked for a signature of something else than a mixture; refused")
        return self.coordinator.sign(message)

    async def _sample(self) -> None:
        """A failure is only logged: the mixture is complete without its gallery."""
        try:
            job = SampleGallery(
                mixture=self.folder.mixture, out=self.folder.gallery, train=tuple(data_files(self.folder, self.manifest)),
                real=self.folder.galleries / REAL,
            )  # fmt: skip
            await self.worker.ask(job, limit=_GALLERY_PATIENCE)
            await asyncio.to_thread(keep_gallery, self.folder, self.gallery_bytes)
        except LutetiaError as error:
            _log.warning("could not sample the gallery: %s", error)


def _becomes_current(event: Event) -> bool:
    return isinstance(event, MixtureStitched) and event.current


def _router_event(now: float, epochs: tuple[int, ...], ref: BlobRef, report: RouterReady) -> RouterTrained:
    return RouterTrained(
        time=now, epochs=epochs, router=ref, accuracy=report.accuracy,
        accuracy_by_time=report.accuracy_by_time, calibration_error=report.calibration_error,
    )  # fmt: skip
