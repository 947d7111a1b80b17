"""Polling a local swarm: the coordinator's status file and the nodes' control sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.cli.local.processes import LocalSwarm
from lutetia.protocol.schema.status import ShardStatus, SwarmStatus
from lutetia.system.errors import LutetiaError

POLL_SECONDS = 0.5


async def polls(swarm: LocalSwarm, seconds: float = POLL_SECONDS) -> AsyncIterator[None]:
    """Yield every `seconds` until the caller leaves the loop. Raises LutetiaError when a process of `swarm` has failed."""
    while True:
        swarm.check()
        yield
        await asyncio.sleep(seconds)


def read_status(run: Path) -> SwarmStatus | None:
    """The status that the coordinator last wrote into the folder `run`; None before the first."""
    path = run / "status.json"
    return SwarmStatus.model_validate_json(path.read_bytes()) if path.is_file() else None


async def ask_node(state_folder: Path) -> dict[str, Any] | None:
    """The status document of the node in `state_folder`; None while it does not answer."""
    from lutetia.node.control import ask

    try:
        return await ask(state_folder, "status")
    except LutetiaError:
        return None  # not up yet, or ended: its process is checked elsewhere


class SwarmPoller:
    """The last known state of the run in folder `run`, and of the nodes whose state folders are in `folder`."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.status: SwarmStatus | None = None
        self.names: dict[str, str] = {}  # public key -> name, also of nodes that have ended
        self._folders: dict[str, Path] = {}
        self._known: dict[str, LocalWorker] = {}

    def add(self, name: str) -> Path:
        """Register a node; returns its state folder."""
        self._folders[name] = self.folder / name
        return self._folders[name]

    def forget(self, name: str) -> LocalWorker:
        """Stop asking a node; returns its last known state."""
        del self._folders[name]
        return self._known.pop(name)

    @property
    def workers(self) -> dict[str, LocalWorker]:
        """The nodes that are asked, by public key."""
        return {worker.owner: worker for worker in self._known.values()}

    async def poll(self, swarm: LocalSwarm) -> None:
        """Read the status and ask every running node once. A node that does not answer keeps its last known state."""
        self.status = read_status(self.run) or self.status
        running = [name for name, process in swarm.members.items() if process.running]
        await asyncio.gather(*(self._ask(name) for name in running if name in self._folders))

    async def _ask(self, name: str) -> None:
        if document := await ask_node(self._folders[name]):
            self._known[name] = worker = worker_of(name, document)
            self.names[worker.owner] = name


def busy_worker(shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> LocalWorker | None:
    """The node (of `workers` by public key) that trains `shard`, if coordinator and node agree on it."""
    worker = workers.get(shard.owner or "")
    return worker if worker and worker.shard == shard.shard and shard.state != "done" else None


def samples_done(shard: ShardStatus, workers: Mapping[str, LocalWorker]) -> int:
    """Samples of `shard` that are accepted or that its node has trained on, whichever is more."""
    busy = busy_worker(shard, workers)
    return max(shard.samples, busy.samples if busy else 0)


def worker_of(name: str, document: dict[str, Any]) -> LocalWorker:
    """The fields of a node's status document that are shown."""
    return LocalWorker(
        name=name, owner=document["owner"], state=document["state"], shard=document.get("shard"), epoch=document.get("epoch"),
        step=document.get("step") or 0, loss=document.get("loss"),
        samples_per_second=document.get("samples_per_second") or 0.0, samples=document.get("samples") or 0,
    )  # fmt: skip


@dataclass(frozen=True)
class LocalWorker:
    """A node of a local swarm as its control socket describes it. `samples` counts those of its shard in this run."""

    name: str
    owner: str
    state: str = "joining"
    shard: int | None = None
    epoch: int | None = None
    step: int = 0
    loss: float | None = None
    samples_per_second: float = 0.0
    samples: int = 0
