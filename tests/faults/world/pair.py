"""The swarm that most faults befall: one coordinator and two boxes for one shard, so that there is always one to take over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lutetia.protocol.blobs.chunk_table import CHUNK
from tests.faults.world.network_namespaces import Network
from tests.faults.world.processes import PATIENCE, POLL, until
from tests.faults.world.world import Box, Coordinator, World

ENVIRONMENT = {
    "LUTETIA_HANG_AFTER": "12", "LUTETIA_STOP_WITHIN": "600", "LUTETIA_UPLOAD_RATE": "4MiB", "LUTETIA_SAVE_EVERY": "1",
}  # fmt: skip


@dataclass
class Pair:
    """`ready` brings it back to health, whatever the test before has done to it."""

    world: World
    network: Network | None = None
    """Where every process has a network namespace of its own: the coordinator's is "hub", a box's is called as the box."""
    boxes: dict[str, Box] = field(default_factory=dict)

    @property
    def coordinator(self) -> Coordinator:
        member = self.world.members["coordinator"]
        assert isinstance(member, Coordinator)
        return member

    async def serve(self) -> Coordinator:
        if self.network is None:
            return await self.world.coordinator()
        return await self.world.coordinator(prefix=self.network.prefix("hub"))

    async def join(self, name: str) -> Box:
        where: dict[str, Any] = {}
        if self.network:
            where = {"prefix": self.network.prefix(name), "listen": f"/ip4/{self.network.address(name)}/tcp/0"}
        self.boxes[name] = await self.world.box(name, environment=ENVIRONMENT, **where)
        return self.boxes[name]

    async def ready(self) -> tuple[Box, Box]:
        """(who trains and has had work accepted, who stands by)."""
        if not self.coordinator.running:
            await self.serve()
        for name in ("ann", "bob"):
            if name not in self.boxes or not self.boxes[name].running:
                await self.join(name)
        roles: list[Box] = []

        async def settled() -> bool:
            roles[:] = []
            for box in self.boxes.values():
                assert box.running, f"{box.name} ended: {box.words()[-3000:]}"
                status = await box.status()
                if status.get("state") == "training" and status.get("step") and status.get("online"):
                    roles.insert(0, box)
                elif status.get("state") == "idle" and status.get("online"):
                    roles.append(box)
            states = [(await box.status()).get("state") for box in roles]
            return states == ["training", "idle"]

        await until(settled, "one box to train and one to stand by")
        holder, standby = roles
        await self.coordinator.accepts(1, author=await owner(holder))
        return holder, standby

    async def taken_over(self, by: Box, seconds: float = PATIENCE) -> None:
        """Until `by` trains and its work is accepted."""
        await by.until(seconds, state="training")
        await self.coordinator.accepts(1, author=await owner(by), seconds=seconds)


async def owner(box: Box) -> str:
    return (await box.until(owner=lambda key: key))["owner"]


async def caught(see: Callable[[], Any], stop: Callable[[], Any], go: Callable[[], Any], what: str) -> None:
    """Stop somebody in the middle of something: `see` it begun, `stop`, and still see it a while later; else `go` on.

    What takes milliseconds is caught like this sooner or later, without a guess how long it takes.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while loop.time() < deadline:
        while not see():
            assert loop.time() < deadline, f"never saw {what}"
            await asyncio.sleep(GLANCE)
        stop()
        if all([await seen_later(see) for _ in range(10)]):
            return
        go()
    raise AssertionError(f"never stopped in the middle of {what}")


GLANCE = 0.003
"""Seconds between two looks for something that takes milliseconds."""


async def seen_later(see: Callable[[], Any]) -> bool:
    await asyncio.sleep(POLL)
    return bool(see())


def torn(incoming: Path) -> list[Path]:
    """Transfers of which some chunks have arrived and some have not."""
    found = []
    for marks in incoming.glob("partial/*/arrived"):
        try:
            chunks = marks.read_bytes().count(b"\1")
            if 0 < chunks < (marks.with_name("data").stat().st_size + CHUNK - 1) // CHUNK:
                found.append(marks.parent)
        except FileNotFoundError:
            continue
    return found


def parts(folder: Path) -> list[Path]:
    """Files and folders that are being written below `folder`."""
    try:
        return [path for path in (*folder.glob("*.part"), *folder.glob(".*.part"), *folder.glob("*/.*.part")) if path.exists()]
    except OSError:
        return []
