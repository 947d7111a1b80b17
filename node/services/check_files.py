"""What a check for the coordinator needs on this machine, and what it makes: fetched, handed to a trainer process, removed."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lutetia.models.data.parts.index import parts_of
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.services.borrowing import Borrowing, clean_up, fetch_blob_of, fetch_data
from lutetia.node.trainer.messages import FromTrainer, RequestFailed, parse_report
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.model.blob_ref import BlobRef

log = logging.getLogger(__name__)

Findings = dict[str, Any]
"""The fields of a CheckReport that a check fills."""
ROUTER, PICTURES, MIXTURE = "router.safetensors", "pictures.safetensors", "mixture"
"""Names in the folder of the store: what checks make, and the folder of a mixture."""


class CheckFiles:
    """The files of one check.

    Args:
        shell: the device.
        borrowing: shared with audits.
        store: for what a check needs; it is never served. It is emptied at the end.
    """

    def __init__(self, shell: DeviceShell, borrowing: Borrowing, store: BlobStore) -> None:
        self.shell, self.borrowing, self.store = shell, borrowing, store
        self._fetched_data: dict[int, list[BlobRef]] = {}

    async def end(self) -> None:
        """Remove what was fetched."""
        await asyncio.to_thread(empty, self.store)
        for shard, blobs in self._fetched_data.items():
            await clean_up(self.shell, shard, blobs)
        self._fetched_data.clear()

    async def fetched(self, refs: dict[str, BlobRef | None]) -> dict[str, Path]:
        wanted = {name: ref for name, ref in refs.items() if ref is not None}
        await asyncio.to_thread(self._make_room, wanted.values())
        return {name: await self.shell.network.fetch_into(self.store, ref) for name, ref in wanted.items()}

    async def fetch_parts(self, holdout: Path) -> None:
        parts = await asyncio.to_thread(parts_of, holdout)
        await self.fetched({str(number): part.blob for number, part in enumerate(parts)})

    async def fetch_base(self) -> None:
        model = self.shell.workspace.model_blobs()
        for blob in model:
            await fetch_blob_of(self.shell, blob, {*self.shell.served(), *(ref.digest for ref in model)})

    def base(self) -> dict[str, Path] | None:
        return self.shell.workspace.base_model()

    async def data(self, shard: int) -> Path:
        """A shard's training data, which the node keeps only as long as it needs them."""
        path, blobs = await fetch_data(self.shell, shard)
        self._fetched_data[shard] = blobs
        return path

    def common(self) -> dict[str, Any]:
        result = self.shell.prober.result
        assert result
        return {
            "manifest": self.shell.workspace.paths.manifest, "device": result.device, "threads": self.shell.choice.threads,
        }  # fmt: skip

    def _make_room(self, refs: Iterable[BlobRef]) -> None:
        """Under a disk limit both stores share it. Blocks on the disk."""
        served = self.shell.network.store
        need = sum(ref.size for ref in refs if not served.has(ref.digest))
        self.shell.workspace.make_room(need, {*self.shell.served(), *(ref.digest for ref in refs)})
        if served.limit_bytes is not None:
            self.store.limit_bytes = max(0, served.limit_bytes - served.used_bytes())

    async def in_child(self, order: dict[str, Any]) -> FromTrainer | None:
        """The answer of a trainer process, which is ended when the check is cancelled; None if it crashed."""
        trainer, message = self.shell.trainer, None
        child = await trainer.take()
        try:
            await child.send(order)
            message = await anext(child.messages(), None)
        finally:
            await (trainer.give_back(child) if message else child.kill())
        return parse_report(message) if message else None

    async def serve_made(self, path: Path) -> None:
        """Serve a file that was made for a check from now on, for the coordinator to fetch, in place of earlier ones."""
        await asyncio.to_thread(self._forget_made)
        self.borrowing.made.append(await asyncio.to_thread(self.shell.network.store.add_file, path, True))

    def _forget_made(self) -> None:
        """What was made for earlier checks: the coordinator has fetched it, or does not want it. Blocks on the disk."""
        while self.borrowing.made:
            self.shell.network.store.remove(self.borrowing.made.pop().digest)


def empty(store: BlobStore) -> None:
    """Remove what was fetched for a check. Blocks on the disk."""
    for digest in {*store.digests(), *store.arriving()}:
        store.remove(digest)
    for name in (ROUTER, PICTURES):
        (store.root / name).unlink(missing_ok=True)
    shutil.rmtree(store.root / MIXTURE, ignore_errors=True)


def failed(report: FromTrainer | None) -> Findings:
    text = report.text if isinstance(report, RequestFailed) else "the process that checks crashed"
    log.warning("could not carry out a check: %s", text)
    return {"outcome": "failed", "text": text}
