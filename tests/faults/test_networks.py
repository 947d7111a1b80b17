"""What may happen between boxes: partitions, loss, delay, one-way links. Each process sits in a network namespace of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.world.network_namespaces import network, why_not
from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import until
from tests.faults.world.world import check_lineage, world

_SKIP = why_not()
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900), pytest.mark.skipif(bool(_SKIP), reason=_SKIP or "-"),
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _far_apart(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with network("hub", "ann", "bob") as net:
        address = f"{net.address('hub')}:41000"
        async with world(tmp_path_factory.mktemp("far") / "world", address) as place:
            pair = Pair(place, net)
            await pair.serve()
            yield pair


@pytest_asyncio.fixture(loop_scope="module")
async def apart(_far_apart: Pair) -> AsyncIterator[Pair]:
    """A coordinator and two boxes with a perfect network between them; it is perfect again after each test."""
    assert _far_apart.network
    await _far_apart.network.heal()
    yield _far_apart
    await _far_apart.network.heal()
    _far_apart.world.check()


async def test_a_partition_and_its_healing(apart: Pair) -> None:
    """F6. Both sides train, and after the partition one of the two gives way.

    As a rule the lost side. But training is deterministic, so both sides have the same epochs bit by bit, and what the heir had
    accepted is the lost side's work as well. If the lost side is ahead, its next epoch is accepted first, and the heir gives way.
    """
    assert apart.network
    holder, standby = await apart.ready()
    lost, heir = await owner(holder), await owner(standby)
    assert lost != heir
    await apart.network.around(holder.name, cut=True)
    await apart.taken_over(standby)
    assert (await holder.status())["state"] == "training", "work that may be wasted harms nobody"
    await apart.network.heal()
    winner, other = await apart.ready()
    assert {await owner(winner), await owner(other)} == {lost, heir}
    check_lineage(apart.coordinator.run)


async def test_a_third_of_all_packets_is_lost(apart: Pair) -> None:
    """F7. The work goes on, slower."""
    assert apart.network
    holder, _ = await apart.ready()
    await apart.network.around(holder.name, loss=0.3)
    await apart.coordinator.accepts(1)


async def test_half_a_second_of_delay_and_as_much_jitter(apart: Pair) -> None:
    """F7. Heartbeats arrive late, and whoever holds the shard, work is accepted."""
    assert apart.network
    await apart.ready()
    for one, other in (("hub", "ann"), ("hub", "bob"), ("ann", "bob")):
        await apart.network.both(one, other, delay=0.5, jitter=0.5)
    await apart.coordinator.accepts(1)


async def test_a_link_that_is_bad_one_way(apart: Pair) -> None:
    """F7. What the box sends is slow and lossy, what it receives is not."""
    assert apart.network
    holder, _ = await apart.ready()
    await apart.network.oneway(holder.name, "hub", delay=0.3, loss=0.2)
    await apart.coordinator.accepts(1)


async def test_a_box_that_nobody_can_dial(apart: Pair) -> None:
    """F7. Behind a NAT: its own connections carry what others want of it, also its checkpoints."""
    assert apart.network
    holder, standby = await apart.ready()
    for other in ("hub", standby.name):
        await apart.network.oneway(other, holder.name, dials=False)
    holder.child("p2pd").kill()  # so that every connection is made anew, from its side
    await holder.until(online=False)
    await holder.until(online=True)
    await apart.coordinator.accepts(2, author=await owner(holder))


async def test_a_box_at_one_kibibyte_a_second(apart: Pair) -> None:
    """F7. Its checkpoints never arrive in time; that holds up nobody: the shard goes to one who can."""
    assert apart.network
    holder, standby = await apart.ready()
    await apart.network.around(holder.name, rate=1024.0)
    await until(lambda: apart.coordinator.status().time, "the coordinator to go on telling")
    await apart.coordinator.accepts(1, author=await owner(standby))
