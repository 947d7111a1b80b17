"""Accepted checkpoints survive the loss of their author and of the coordinator: real daemons, p2pd and SIGKILL."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from lutetia.node.control import ask
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.dht_records import publish
from lutetia.protocol.rpc.accepted_checkpoints import live_nodes, newest_of
from lutetia.protocol.schema.records import acceptance_key
from tests.child_environment import child_environment
from tests.node.scripted_coordinator import DaemonProcess, ScriptedCoordinator, eventually, scripted_coordinator
from tests.node.tiny_run import COORDINATOR, TinyRun, make_run


async def holders(coordinator: ScriptedCoordinator, shard: int) -> set[str]:
    nodes = {node.owner for node in await live_nodes(coordinator.transport, coordinator.run.manifest.run_id)}
    found = await newest_of(coordinator.transport, coordinator.run.manifest, shard, nodes)
    return set(found.holders) if found else set()


async def holders_of_both(coordinator: ScriptedCoordinator) -> list[set[str]]:
    return [await holders(coordinator, 0), await holders(coordinator, 1)]


async def renew(coordinator: ScriptedCoordinator) -> None:
    """Publish the acceptances again, as a coordinator does every lease, so that later nodes hold them too."""
    for shard in (0, 1):
        for record in await coordinator.records(acceptance_key(coordinator.run.manifest.run_id, shard)):
            assert await publish(
                coordinator.transport, COORDINATOR, record.model_copy(update={"issued": coordinator.transport.now()}), 3600
            )


@pytest.mark.timeout(900)
async def test_copies_are_made_and_serve_without_the_coordinator(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=1, steps=10, heartbeat=1.0)
    async with (
        scripted_coordinator(run, tmp_path / "coordinator") as coordinator,
        DaemonProcess.running(coordinator, tmp_path / "ann") as ann,
    ):
        ticket = coordinator.ticket.encode()
        await ann.until(state="idle", accepted=2)
        author = (await ask(ann.state, "status"))["owner"]
        async with DaemonProcess.running(coordinator, tmp_path / "bob") as bob:
            keeper = (await bob.until(state="idle"))["owner"]

            async def both_hold() -> bool:
                return await holders_of_both(coordinator) == [{author, keeper}] * 2

            await eventually(both_hold, 200)
            ann.process.send_signal(signal.SIGKILL)
            await ann.process.wait()
            async with DaemonProcess.running(coordinator, tmp_path / "cid") as cid:
                third = (await cid.until(state="idle"))["owner"]

                async def others_hold() -> bool:
                    return await holders_of_both(coordinator) == [{keeper, third}] * 2

                await eventually(others_hold, 200)
                await renew(coordinator)
                address = (await ask(cid.state, "status"))["addresses"][0]
                await coordinator.transport.close()  # its blobs are gone too
                await fetch_from(address, ticket, run, tmp_path / "saved")


async def fetch_from(address: str, ticket: str, run: TinyRun, out: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lutetia.cli", "swarm", "fetch", ticket, "--checkpoints", "--peer", address, "--out", str(out),
        "--json", stdout=asyncio.subprocess.PIPE, env=child_environment(NO_COLOR="1"),
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    assert [found["epoch"] for found in json.loads(output)["checkpoints"]] == [1, 1]
    for shard in (0, 1):
        folder = out / f"shard-{shard:04d}"
        accepted = json.loads((folder / "acceptance.json").read_bytes())
        for name in ("weights", "state"):
            assert ChunkTable.of_file(folder / f"{name}.safetensors").ref.digest == accepted[name]["digest"]
