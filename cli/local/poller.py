"""Looking at a local swarm: the coordinator's status file and the workers' control sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.protocol.schema.status import ShardStatus, SwarmStatus
from lutetia.system.errors import LutetiaError


class SwarmPoller:
    """The last known state of a run in folder `run` and of the workers whose state folders lie in `folder`."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.status: SwarmStatus | None = None
        self.names: dict[str, str] = {}  # public key -> name, also of the dead
        self._folders: dict[str, Path] = {}
        self._seen: dict[str, LocalWorker] = {}

    def add(self, name: str) -> Path:
        """A new worker's state folder."""
        self._folders[name] = self.folder / name
        return self._folders[name]

    def forget(self, name: str) -> LocalWorker:
        """The worker's last known state; it will not be asked again."""
        del self._folders[name]
        return self._seen.pop(name)

    @property
    def workers(self) -> dict[str, LocalWorker]:
        """The living workers by public key."""
        return {worker.owner: worker for worker in self._seen.values()}

    async def look(self, running: Sequence[str]) -> None:
        """Ask everybody once. Whoever does not answer keeps its last known state."""
        if (path := self.run / "status.json").exists():
            self.status = SwarmStatus.model_validate_json(path.read_bytes())
        await asyncio.gather(*(self._ask(name) for name in running if name in self._folders))

    async def _ask(self, name: str) -> None:
        from lutetia.node.control import ask

        try:
            worker = worker_of(name, await ask(self._folders[name], "status"))
        except LutetiaError:
            return  # not up yet, or just ended: the process itself is watched elsewhere
        self._seen[name] = worker
        self.names[worker.owner] = name


def busy_worker(shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> LocalWorker | None:
    """The worker (by public key) that trains `shard` now, as far as both sides say so."""
    worker = workers.get(shard.owner or "")
    return worker if worker and worker.shard == shard.shard and shard.state != "done" else None


def samples_done(shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> int:
    """Samples of `shard` that are accepted, or that its worker has trained on, whichever are more."""
    busy = busy_worker(shard, workers)
    return max(shard.samples, busy.samples if busy else 0)


def worker_of(name: str, document: dict[str, Any]) -> LocalWorker:
    """The daemon's own status document, as far as it is shown."""
    return LocalWorker(
        name=name, owner=document["owner"], state=document["state"], shard=document.get("shard"), epoch=document.get("epoch"),
        step=document.get("step") or 0, loss=document.get("loss"),
        samples_per_second=document.get("samples_per_second") or 0.0, samples=document.get("samples") or 0,
    )  # fmt: skip


@dataclass(frozen=True)
class LocalWorker:
    """One of the demo's workers as its own control socket tells it; `samples` is counted within the run's shard."""

    name: str
    owner: str
    state: str = "joining"
    shard: int | None = None
    epoch: int | None = None
    step: int = 0
    loss: float | None = None
    samples_per_second: float = 0.0
    samples: int = 0
