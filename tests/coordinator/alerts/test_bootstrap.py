"""The coordinator finds out which addresses of the ticket do not answer."""

from __future__ import annotations

from pathlib import Path

from lutetia.coordinator.alerts.bootstrap import LOOKS, BootstrapWatch, says_something, ticket_addresses
from lutetia.coordinator.alerts.causes import LEAST_DISK, causes_of
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ticket import Ticket
from tests.cli.sample_documents import NOW, status
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual


def test_addresses_that_do_not_answer_are_down_until_they_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        network, owner = MemoryNetwork(latency=0.001), Identity.derived("coordinator")
        here = network.peer(owner, lambda *given: "")
        other = network.peer(Identity.derived("bootstrap"), lambda *given: "")
        places = tuple(f"/ip4/8.8.4.{host}/tcp/4001/p2p/{peer.peer_id}" for host, peer in ((1, here), (2, other)))
        ticket = Ticket(run="a" * 64, owner=owner.public_key, addresses=places)
        (tmp_path / "ticket").write_text(ticket.encode() + "\n")
        listens = False

        async def probe(address: str) -> bool:
            assert address == places[0], "others are asked for their key, too"
            return listens

        watch = BootstrapWatch(here, ticket_addresses(tmp_path / "ticket"), probe)
        await watch.look_once()
        assert watch.known == {}, "a router may not lead the coordinator back to itself, while peers are there"
        network.kill(other)
        for look in range(LOOKS):
            assert watch.faults() == (), look
            await watch.look_once()
        assert [fault.address for fault in watch.faults()] == list(places)
        causes = causes_of(status().model_copy(update={"nodes": ()}), 1e9, NOW + 1e9, 2 * LEAST_DISK, watch.faults())
        assert [name for name in causes if name.startswith("bootstrap/")] == [f"bootstrap/{place}" for place in places]
        assert "nothing accepts a connection there" in causes[f"bootstrap/{places[0]}"]
        listens = True
        await watch.look_once()
        assert [fault.address for fault in watch.faults()] == [places[1]]

    run_virtual(scenario)


def test_own_private_address_says_something_whoever_is_connected() -> None:
    assert says_something("/ip4/192.168.1.2/tcp/4001/p2p/x", connected=3)
    assert says_something("/ip4/127.0.0.1/tcp/4001/p2p/x", connected=3)
    assert not says_something("/ip4/8.8.4.4/tcp/4001/p2p/x", connected=3)
    assert not says_something("/dns/training.example.org/tcp/4001/p2p/x", connected=3)
    assert says_something("/dns/training.example.org/tcp/4001/p2p/x", connected=0)


def test_lost_ticket_names_no_address(tmp_path: Path) -> None:
    assert ticket_addresses(tmp_path / "nothing") == ()
    (tmp_path / "ticket").write_text("lutetia1broken")
    assert ticket_addresses(tmp_path / "ticket") == ()
