"""Records that name addresses of third parties: who dials them, how often, and what is said of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.attacks.network import third_party
from benchmarks.fuzz import examples
from lutetia.coordinator.run_folder import Endpoint, RunFolder
from lutetia.coordinator.serve import connect
from lutetia.coordinator.settings import ServeSettings
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.joining import PEERS_FILE, enter_swarm
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.introduction import serve_introduction
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import Hardware, NodeRecord, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.dial_policy import DIALS_PER_HOST, FAILING_PER_HOST, DialPolicy
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.system.errors import UnreachableError
from tests.attacks.hivemind_swarm import LOOPBACK, manifest_of_now, network

JOINER = Identity.derived("joiner")
SSH = b"SSH-2.0-OpenSSH_9.9\r\n"
NOWHERE = BlobRef(digest="7" * 64, size=1000)


def made_up_node(run: Manifest, name: str, ports: list[int]) -> tuple[Identity, NodeRecord]:
    who = Identity.derived(name)
    addresses = tuple(f"/ip4/127.0.0.99/tcp/{port}/p2p/{who.peer_id}" for port in ports)
    record = NodeRecord(
        run=run.run_id, owner=who.public_key, issued=time.time(), peer_id=who.peer_id, addresses=addresses,
        hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="0.1.0", state="idle",
    )  # fmt: skip
    return who, record


async def publish_made_up_nodes(liar: HivemindTransport, run: Manifest, ports: list[int], count: int) -> list[NodeRecord]:
    nodes = [made_up_node(run, f"reflected {number}", ports) for number in range(count)]
    for who, record in nodes:
        expires = time.time() + 30
        assert await liar.store(record.key(), who.public_key, seal(record, who, expires), expires)
    return [record for _, record in nodes]


async def test_made_up_nodes_make_nobody_dial_a_third_party(tmp_path: Path) -> None:
    """32 node records name eight ports of a third party. A peer that joins, and joins again, dials none of them."""
    run = manifest_of_now()
    async with network(tmp_path, run) as start, third_party(8, SSH) as (ports, dialled):
        coordinator = await start("coordinator")
        await serve_introduction(coordinator, lambda: SignedManifest.sign(run, examples.OWNER))
        liar = await start("liar", bootstrap=coordinator.addresses(), host="127.0.0.2")
        await publish_made_up_nodes(liar, run, ports, 32)
        ticket = Ticket(run=run.run_id, owner=run.owner, addresses=tuple(coordinator.addresses()))
        for _ in range(2):
            joined, _ = await enter_swarm(JOINER, ticket, listen=LOOPBACK, state_folder=tmp_path / "joiner")
            await joined._maintain()  # type: ignore[attr-defined]  # as it does every 20 seconds
            await joined.close()
        assert dialled == []
        assert not [address for address in Peerstore(tmp_path / "joiner" / PEERS_FILE).load() if "127.0.0.99" in address]


async def test_addresses_that_never_answer_are_dialled_a_few_times(tmp_path: Path) -> None:
    """A peer is made to call 32 made-up nodes, twice over: four addresses of their host are dialled, once each."""
    run = manifest_of_now()
    async with network(tmp_path, run) as start, third_party(8, SSH) as (ports, dialled):
        caller = await start("caller")
        for _ in range(2):
            for number in range(32):
                who, record = made_up_node(run, f"reflected {number}", ports[number % 8 :][:1])
                with pytest.raises(ConnectionError):
                    await caller.open_stream(who.peer_id, "/lutetia/hello/1", record.addresses)
        assert len(dialled) == FAILING_PER_HOST
        poison = made_up_node(run, "cached", ports)[1].addresses
        refused = await caller.dial_each(poison)
        assert set(refused.values()) == {"no answer a moment ago"}


async def test_p2pd_dials_by_itself_only_where_the_policy_allows(tmp_path: Path) -> None:
    """A liar announces a third party's addresses, which p2pd remembers and dials past all of this peer's own rules."""
    announced = Identity.derived("announcer")
    async with network(tmp_path, manifest_of_now()) as start, third_party(2) as (ports, dialled):
        victim = await start("victim")
        for run_is_public in (True, False):
            victim.limit_dials(DialPolicy.of(["/ip4/8.8.4.4/tcp/4001" if run_is_public else LOOPBACK]))
            liar = await HivemindTransport.start(
                announced, listen="/ip4/127.0.0.2/tcp/0", state_folder=tmp_path / "liar",
                announce=[f"/ip4/127.0.0.99/tcp/{port}" for port in ports],
            )  # fmt: skip
            await liar.open_stream(victim.peer_id, "/ipfs/ping/1.0.0", victim.addresses())
            await liar.close()
            await victim._daemon.control.disconnect(announced.peer_id)
            with pytest.raises(ConnectionError):  # as the DHT calls peers
                await victim._daemon.control.open_stream(announced.peer_id, "/lutetia/hello/2")
            assert bool(dialled) != run_is_public, "without the filter p2pd does dial the third party"


async def test_a_public_run_scans_no_private_network(tmp_path: Path) -> None:
    """Providers name open, closed and foreign ports of this machine: nothing is dialled, and all failures read alike."""
    run, who = manifest_of_now(), Identity.derived("scanner")
    async with network(tmp_path, run) as start, third_party(1, SSH) as ((ssh,), dialled):
        reader = await start("reader")
        reader.limit_dials(DialPolicy.of(["/ip4/8.8.4.4/tcp/4001/p2p/x"]))
        said = set[str]()
        for host, port in (("ip4/127.0.0.99", ssh), ("ip4/127.0.0.99", 9), ("dns4/localhost", ssh), ("ip4/192.168.0.1", 80)):
            provider = Provider(who.peer_id, (f"/{host}/tcp/{port}/p2p/{who.peer_id}",))
            with pytest.raises(UnreachableError) as caught:
                await fetch_blob(reader, BlobStore(tmp_path / "blobs"), NOWHERE, [provider])
            said.add(str(caught.value))
        assert dialled == []
        assert len(said) == 1


async def test_what_a_dial_finds_out_is_not_published(tmp_path: Path) -> None:
    """Also in a run of this network: an open port, a closed one and another protocol give the same text."""
    run = manifest_of_now()
    async with network(tmp_path, run) as start, third_party(1, SSH) as ((ssh,), dialled):
        reader, said = await start("reader"), set[str]()
        who = Identity.derived("scanner")
        for host, port in (("127.0.0.99", ssh), ("127.0.0.98", 9)):
            provider = Provider(who.peer_id, (f"/ip4/{host}/tcp/{port}/p2p/{who.peer_id}",))
            with pytest.raises(UnreachableError) as caught:
                await fetch_blob(reader, BlobStore(tmp_path / "blobs"), NOWHERE, [provider])
            said.add(str(caught.value))
        assert len(dialled) == 1
        assert len(said) == 1
        (text,) = said
        assert not any(word in text for word in ("refused", "negotiate", "127.0.0", str(ssh)))


async def test_a_restarted_coordinator_forgets_poisoned_addresses(tmp_path: Path) -> None:
    """Its cache names a peer that lives, and 64 made-up ones at a third party: it dials a few of those, once.

    Others of a host may be under way when the first ones fail.
    """
    run = manifest_of_now()
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.endpoint.write_bytes(canonical(Endpoint(listen=LOOPBACK)))
    async with network(tmp_path, run) as start, third_party(8, SSH) as (ports, dialled):
        friend = await start("friend")
        made_up = [made_up_node(run, f"cached {number}", ports)[1].addresses[number % 8] for number in range(64)]
        folder.peers.write_text(json.dumps([*friend.addresses(), *made_up]))
        live = LiveManifest(SignedManifest.sign(run, examples.OWNER))
        coordinator = await connect(live, examples.COORDINATOR, folder, ServeSettings())
        try:
            assert Peerstore(folder.peers).load() == friend.addresses()
            for _ in range(3):
                await coordinator._maintain()  # type: ignore[attr-defined]  # as it does every 20 seconds
        finally:
            await coordinator.close()
        assert len(dialled) < FAILING_PER_HOST + DIALS_PER_HOST
