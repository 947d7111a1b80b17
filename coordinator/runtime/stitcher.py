"""When the mixture is made anew, and the making itself: router, stitch, gallery, all in a workshop of their own.

The router tells the clusters' *data* apart and never sees an expert, so it is trained once, as soon as the first result was
accepted, and serves every mixture of the manifest's data after that. Shards without an accepted result are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lutetia.coordinator.ledger.events import Event, MixtureStitched, RouterTrained, RunFinished
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.models.mixing.description import read_mixture
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import BlobRef, Manifest
from lutetia.system.errors import LutetiaError

_log = logging.getLogger(__name__)

_MIXTURE_DOMAIN = b"lutetia-mixture-1\n"  # what models.mixture_document signs
_ROUTER_LIMIT, _STITCH_LIMIT, _GALLERY_LIMIT = 6 * 3600.0, 3600.0, 6 * 3600.0
_RETRY_SECONDS = 30.0

Step = Literal["router", "mixture", "finish", "nothing"]


def next_step(state: RunState, *, when: Literal["refresh", "end"], rested: bool) -> Step:
    """What is to be made now. `rested`: the last mixture is old enough for a new one before the end."""
    epochs = state.accepted_epochs
    if not any(epochs):
        return "nothing"
    if state.router is None and len(epochs) > 1:
        return "router"
    if state.mixture is None or state.mixture.epochs != epochs:
        due = state.budgets_done or (when == "refresh" and rested)
        return "mixture" if due else "nothing"
    return "finish" if state.budgets_done and not state.finished and not state.audits else "nothing"


@dataclass
class Stitcher:
    """Follows the ledger. `wake` is called whenever the run's state changed."""

    folder: RunFolder
    manifest: Manifest
    coordinator: Identity
    blobs: BlobStore
    bench: JudgeLoop
    workshop: WorkerClient
    now: Callable[[], float]
    when: Literal["refresh", "end"]
    refresh_seconds: float
    gallery: bool
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _last: float = float("-inf")

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Make what is due until cancelled. A failed attempt is told and repeated; the run goes on meanwhile."""
        while True:
            self._changed.clear()
            state = self.bench.state.run
            if not self.folder.mixture.is_dir():
                state = replace(state, mixture=None)  # restored from a backup that lacked some of its files
            step = next_step(state, when=self.when, rested=self.now() - self._last >= self.refresh_seconds)
            if step == "nothing":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.refresh_seconds):
                        await self._changed.wait()
                continue
            try:
                await self.bench.note(*await self._make(step, state))
                if step == "mixture" and self.gallery and self.manifest.sampling.prompts:
                    await self._sample()
            except LutetiaError as error:  # blobs that are with peers alone yet, a full disk, a workshop that crashed
                _log.warning("could not make the %s: %s; trying again in %.0f s", step, error, _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _make(self, step: Step, state: RunState) -> list[Event]:
        if step == "router":
            return [await self._train_router(state.accepted_epochs)]
        if step == "mixture":
            return await self._stitch(state)
        assert state.mixture is not None
        return [RunFinished(time=self.now(), mixture=state.mixture.mixture)]

    async def _train_router(self, epochs: tuple[int, ...]) -> RouterTrained:
        shards = self.manifest.shards
        out = self.folder.root / "router.safetensors"
        report = await self.workshop.ask(
            "router", limit=_ROUTER_LIMIT, out=str(out),
            train=[str(self.blobs.path(shard.train.digest)) for shard in shards],
            holdout=[str(self.blobs.path(shard.holdout.digest)) for shard in shards],
        )  # fmt: skip
        ref = await asyncio.to_thread(self.blobs.add_file, out, True)
        _log.info("router trained: %.1f %% right on held-out noisy clips", 100 * report["accuracy"])
        return _router_event(self.now(), epochs, ref, report)

    async def _stitch(self, state: RunState) -> list[Event]:
        accepted = [state.shards[index].acceptance for index in range(len(state.shards))]
        router = state.router
        given = [acceptance for acceptance in accepted if acceptance is not None]
        answer = await self.workshop.ask(
            "stitch", limit=_STITCH_LIMIT, sign=self._sign, folder=str(self.folder.mixture),
            weights=[str(self.blobs.path(acceptance.weights.digest)) for acceptance in given],
            accepted=[acceptance.model_dump(mode="json") for acceptance in given],
            router=str(self.blobs.path(router.router.digest)) if router else None,
        )  # fmt: skip
        await asyncio.to_thread(self._offer_files)
        self._last, epochs = self.now(), state.accepted_epochs
        _log.info("mixture %s stitched from epochs %s", answer["digest"][:12], list(epochs))
        stitched = MixtureStitched(time=self.now(), epochs=epochs, terms=state.terms, mixture=answer["digest"])
        if router is None:
            return [stitched]
        return [router.model_copy(update={"time": self.now(), "epochs": epochs}), stitched]

    def _offer_files(self) -> None:
        """Serve every file of the mixture as a blob; the experts' weights are served already."""
        for name in read_mixture(self.folder.mixture).mixture.files:
            self.blobs.add_file(self.folder.mixture / name)

    def _sign(self, message: bytes) -> str:
        """The workshop reads strangers' files: whatever it asks for, nothing but a mixture's description gets a signature."""
        if not message.startswith(_MIXTURE_DOMAIN):
            raise WorkerFailed("the workshop asked for a signature that is none of its business")
        return self.coordinator.sign(message)

    async def _sample(self) -> None:
        """Pictures are a courtesy: without them the mixture still counts."""
        try:
            mixture, out = str(self.folder.mixture), str(self.folder.gallery)
            await self.workshop.ask("gallery", limit=_GALLERY_LIMIT, mixture=mixture, out=out)
        except (WorkerFailed, WorkerRefused) as error:
            _log.warning("could not sample the gallery: %s", error)


def _router_event(now: float, epochs: tuple[int, ...], ref: BlobRef, report: dict[str, Any]) -> RouterTrained:
    return RouterTrained(
        time=now, epochs=epochs, router=ref, accuracy=report["accuracy"],
        accuracy_by_time=tuple(report["accuracy_by_time"]), calibration_error=report["ece"],
    )  # fmt: skip
