"""The rungs of the ladder that need the network, the disk and the workshop."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, field
from typing import Any, get_args

from ..protocol.manifest import BlobRef, Manifest
from ..protocol.offers import Rung
from ..protocol.records import CheckpointRecord, provider_key
from ..protocol.services import read_records
from ..protocol.store import BlobStore
from ..protocol.transfer import Provider, fetch_blob
from ..protocol.transport import Transport
from ..system.errors import DiskError, IntegrityError, UnreachableError
from .ladder import SizeLimits, Stopped
from .workshop_client import WorkshopClient, WorkshopFailed, WorkshopRefused

_log = logging.getLogger("lutetia.coordinator.tools")

_FETCH_GRACE = 30.0
_INSPECT_LIMIT, _LOSS_LIMIT = 300.0, 900.0
_MAX_PROVIDERS = 8
KEPT_STATES = 3


@dataclass
class NetworkTools:
    """Fetches candidates into `incoming`, so that nothing undecided is ever served, and has them looked at by `workshop`.

    `states`: per shard the digests of accepted training states that may still be held, oldest first.
    """

    transport: Transport
    manifest: Manifest
    blobs: BlobStore
    incoming: BlobStore
    workshop: WorkshopClient
    slowest_bytes_per_second: float
    states: dict[int, list[str]] = field(default_factory=dict)

    async def limits(self) -> dict[int, SizeLimits]:
        """Size limits of every shard, from the manifest's weight schema."""
        answer = await self.workshop.ask("limits", limit=_INSPECT_LIMIT)
        steps = self.manifest.steps_per_epoch
        return {
            int(shard): SizeLimits.of(tuple(form["weights"]), tuple(form["state"]), steps)
            for shard, form in answer["shards"].items()
        }

    async def fetch(self, record: CheckpointRecord) -> None:
        """Rung `transfer`: all three blobs, from the author and whoever else says that it holds them."""
        for name, ref in (("weights", record.weights), ("state", record.state), ("trace", record.trace)):
            if self.blobs.has(ref.digest) or self.incoming.has(ref.digest):
                continue
            seconds = _FETCH_GRACE + ref.size / self.slowest_bytes_per_second
            try:
                async with asyncio.timeout(seconds):
                    await fetch_blob(self.transport, self.incoming, ref, await self._providers(record, ref))
            except TimeoutError as error:
                raise Stopped("inconclusive", "transfer", f"its {name} did not arrive within {seconds:.0f} s") from error
            except (UnreachableError, IntegrityError, DiskError, ConnectionError) as error:
                if isinstance(error, DiskError):
                    _log.error("cannot take in results: %s", error)
                raise Stopped("inconclusive", "transfer", f"its {name} could not be fetched: {error}") from error

    async def _providers(self, record: CheckpointRecord, ref: BlobRef) -> list[Provider]:
        providers = [Provider(record.peer_id, tuple(record.addresses))]
        for other, _ in await read_records(self.transport, provider_key(record.run, ref.digest)):
            if other.kind == "provider" and other.peer_id not in (record.peer_id, self.transport.peer_id):
                providers.append(Provider(other.peer_id, tuple(other.addresses)))
        return providers[:_MAX_PROVIDERS]

    async def inspect(self, record: CheckpointRecord) -> None:
        """Rungs `format` and `numbers`."""
        files = {"weights": self._path(record.weights), "state": self._path(record.state)}
        await self._ask("format", "inspect", _INSPECT_LIMIT, shard=record.shard, epoch=record.epoch, **files)

    async def baseline(self, shard: int) -> float:
        """Held-out loss of the initial model."""
        return await self._loss(shard, None)

    async def loss(self, record: CheckpointRecord) -> float:
        """Held-out loss of the candidate."""
        return await self._loss(record.shard, self._path(record.weights))

    async def _loss(self, shard: int, weights: str | None) -> float:
        holdout = str(self.blobs.path(self.manifest.shards[shard].holdout.digest))
        answer = await self._ask("holdout", "loss", _LOSS_LIMIT, shard=shard, weights=weights, holdout=holdout)
        loss = answer["loss"]
        return loss if isinstance(loss, float) else math.nan

    async def _ask(self, rung: Rung, verb: str, limit: float, **fields: Any) -> dict[str, Any]:
        """A crash of the workshop says nothing about the result: inconclusive, and tried again."""
        try:
            return await self.workshop.ask(verb, limit=limit, **fields)
        except WorkshopRefused as error:
            found = error.rung if error.rung in get_args(Rung) else rung
            raise Stopped("invalid", found, str(error)) from error  # pyright: ignore[reportArgumentType]
        except WorkshopFailed as error:
            raise Stopped("inconclusive", rung, str(error)) from error

    def _path(self, ref: BlobRef) -> str:
        store = self.blobs if self.blobs.has(ref.digest) else self.incoming
        return str(store.path(ref.digest))

    def keep(self, record: CheckpointRecord) -> None:
        """The result was accepted: its blobs are served from now on. Blocks on the disk.

        Weights and traces are kept for good. Training states, several times as large, are needed only to go on: those of the
        last KEPT_STATES epochs of a shard stay.
        """
        for ref in (record.weights, record.state, record.trace):
            if not self.blobs.has(ref.digest):
                self.blobs.adopt(self.incoming.path(ref.digest), self.incoming.table(ref.digest))
                self.incoming.remove(ref.digest)
        states = self.states.setdefault(record.shard, [])
        states.append(record.state.digest)
        self.forget_old_states()

    def forget_old_states(self) -> None:
        """Remove the training states that nobody goes on from any more."""
        recent = {digest for states in self.states.values() for digest in states[-KEPT_STATES:]}
        for states in self.states.values():
            for digest in states[:-KEPT_STATES]:
                if digest not in recent:
                    self.blobs.remove(digest)
            del states[:-KEPT_STATES]

    def discard(self, record: CheckpointRecord) -> None:
        """The result is out: forget what was fetched of it."""
        for ref in (record.weights, record.state, record.trace):
            self.incoming.remove(ref.digest)
