"""A card is added to a running node, and another one is lost: real trainer processes, a network in memory."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from lutetia.node.contributions import Contributions
from lutetia.node.machine.messages import UserVerb
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.devices.inventory import Inventory
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.runtime.status_fields import status_fields
from lutetia.node.settings import NodeSettings
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.records import ClaimRecord, claim_key, node_key
from lutetia.protocol.transport.base import Transport
from tests.node.runtime.test_tasks import NODE, NodeSetup
from tests.node.scripted_coordinator import eventually
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


def make_node(setup: NodeSetup, folder: Path) -> NodeShell:
    """A node that finds its devices itself; the test says which there are."""

    async def rejoin() -> Transport:
        raise ConnectionError("not used in this test")

    settings = NodeSettings(ticket="", state_folder=folder, threads=1, hang_after=600)
    node = NodeShell(settings, setup.tasks.network, setup.workspace, Contributions(folder / "contributions.json"), rejoin)
    assert not node.devices
    assert status_fields(node, 0.0)["reason"] == "looking for cards that torch can use"
    node.inventory = Inventory(folder / "devices.json", node.hardware_seen, find=False)
    return node


def trains(device: DeviceShell) -> bool:
    return device.state.phase == "training" and device.trainer.report is not None and device.trainer.report.step > 0


async def test_added_card_gets_a_shard_and_lost_card_hands_its_shard_back(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=50, steps=2000, heartbeat=1.0)
    setup = await NodeSetup.create(run, tmp_path / "node")
    node, network = make_node(setup, tmp_path / "node"), setup.tasks.network
    at_work = asyncio.create_task(node.run())

    async def training(*names: str) -> bool:
        assert not at_work.done(), at_work.result()
        return set(node.devices) == set(names) and all(map(trains, node.devices.values()))

    async def claims() -> dict[int, str]:
        found: dict[int, str] = {}
        for shard in (0, 1):
            for record, _ in await read_records(network.transport, claim_key(run.manifest.run_id, shard)):
                assert isinstance(record, ClaimRecord)
                found[shard] = record.state
        return found

    try:
        await asyncio.sleep(0)
        node.hardware_seen(("cpu:0",), None)
        await eventually(lambda: training("cpu:0"))
        process = node.devices["cpu:0"].trainer
        node.hardware_seen(("cpu:0", "cpu:1"), None)
        await eventually(lambda: training("cpu:0", "cpu:1"))
        first, second = (node.devices[name].state.work for name in ("cpu:0", "cpu:1"))
        assert first
        assert second
        assert {first.shard, second.shard} == {0, 1}
        assert node.devices["cpu:0"].trainer is process, "the first card has not noticed"
        assert set(node.workspace.at_work) == {0, 1}
        node.hardware_seen(("cpu:1",), None)
        await eventually(lambda: training("cpu:1"))
        [left] = [device.state.work for device in node.devices.values()]
        assert left
        assert left.shard == second.shard, "the other card goes on"
        assert node.devices["cpu:1"].state.taken == frozenset()
        assert (await claims())[first.shard] == "released"
        [record] = [each for each, _ in await read_records(network.transport, node_key(run.manifest.run_id, NODE.public_key))]
        assert record.owner == NODE.public_key
    finally:
        node.feed(UserVerb(time.time(), "leave"))
        await at_work


async def test_device_that_is_leaving_does_not_hear_of_the_others(tmp_path: Path):
    """Telling it again and again, because it takes nothing in any more, once ended the node."""
    run = make_run(tmp_path / "run", epochs=50, steps=2000, heartbeat=1.0)
    setup = await NodeSetup.create(run, tmp_path / "node")
    node = make_node(setup, tmp_path / "node")
    at_work = asyncio.create_task(node.run())
    try:
        await asyncio.sleep(0)
        node.hardware_seen(("cpu:0", "cpu:1"), None)
        leaving, other = node.devices["cpu:0"], node.devices["cpu:1"]

        async def both_train() -> bool:
            assert not at_work.done(), at_work.result()
            return trains(leaving) and trains(other)

        async def other_has_no_shard() -> bool:
            assert not at_work.done(), at_work.result()
            return not other.slots_in_use

        await eventually(both_train)
        async with leaving._ordered_lock:  # its last work takes long
            node.hardware_seen(("cpu:1",), None)
            assert leaving.state.phase == "left"
            other.feed(UserVerb(time.time(), "pause", None))
            await eventually(other_has_no_shard)
            assert leaving.state.taken, "as it was when it left"
    finally:
        node.feed(UserVerb(time.time(), "leave"))
        await at_work
