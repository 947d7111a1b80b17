"""The check runner over the model of blobs: a fetch takes as long as the links need, the other checks `check_seconds`."""

from __future__ import annotations

import math

from lutetia.coordinator.acceptance.checks import CheckFailed
from lutetia.coordinator.acceptance.loss_bounds import Losses
from lutetia.coordinator.runtime.check_runner import fetch_limit
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.simulation.interfaces import Coordinator
from lutetia.simulation.network.blobs import Content, SimulatedDelay, untrained_loss
from lutetia.system.errors import UnreachableError

_CORRUPT_SECONDS = 3.0
"""Model: how long it takes until a fetch of corrupt bytes is given up."""


class SimulatedCheckRunner:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._world = coordinator, coordinator.world

    def _content(self, record: CheckpointRecord) -> Content:
        return self._world.blobs.contents[record.digest]

    async def fetch(self, record: CheckpointRecord, patience: float = 1.0) -> None:
        """Corrupt bytes count as not arrived."""
        world, digest = self._world, record.digest
        size = world.config.weights_bytes + world.config.state_bytes
        started = world.queue.now
        try:
            if not self._content(record).intact:
                await SimulatedDelay(_CORRUPT_SECONDS)
                raise UnreachableError("its bytes do not match their digest")
            await world.blobs.fetch(self._coordinator, digest, size)
            if world.queue.now - started > patience * self._fetch_limit(record):
                raise UnreachableError("it did not arrive in time")
        except UnreachableError as error:
            raise CheckFailed("inconclusive", "transfer", f"its weights could not be fetched: {error}") from error

    def _fetch_limit(self, record: CheckpointRecord) -> float:
        """The real runner fetches the three files one after the other, each within its own limit."""
        slowest = self._world.config.slowest_bytes_per_second
        return sum(fetch_limit(ref.size, slowest) for ref in (record.weights, record.state, record.trace))

    async def inspect(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        await SimulatedDelay(self._world.config.check_seconds / 3)
        if not self._content(record).sound:
            raise CheckFailed("invalid", "numbers", "its tensors are not those of the manifest")

    async def parent_losses(self, record: CheckpointRecord, parent: AcceptanceRecord | None) -> Losses:
        await SimulatedDelay(self._world.config.check_seconds / 3)
        content = self._world.blobs.contents[parent.checkpoint] if parent else None
        if held_out := self._world.held_out:
            quality = content.quality if content and content.quality else held_out.initial(record.shard)
            return held_out.rows(quality.averages, content.weights if content else "", record.digest)
        return [content.loss if content else untrained_loss(record.shard)]

    async def raw_losses(self, record: CheckpointRecord) -> Losses:
        return self._losses(record, raw=True)

    async def losses(self, record: CheckpointRecord) -> Losses:
        await SimulatedDelay(self._world.config.check_seconds / 3)
        return self._losses(record)

    def _losses(self, record: CheckpointRecord, raw: bool = False) -> Losses:
        content, held_out = self._content(record), self._world.held_out
        if not content.sound:
            return [math.nan]
        if held_out and (quality := content.quality):
            return held_out.rows(quality.raw if raw else quality.averages, f"{content.weights}{raw}", record.digest)
        return [content.loss]
