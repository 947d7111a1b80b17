"""What a newcomer believes when most peers that it meets lie: real libp2p, real joins.

Manifests by other keys, of other runs, older or expired ones: tests/protocol/test_joining.py. Records forged, prolonged, dated
into the future or stored elsewhere, over real p2pd: tests/protocol/transport/test_contract.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.fuzz import examples
from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.joining import PEERS_FILE, join_swarm
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.rpc.checkpoint_offer import offer_checkpoint
from lutetia.protocol.rpc.introduction import serve_introduction
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, acceptance_key, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.system.errors import BootstrapError
from tests.attacks.hivemind_swarm import LOOPBACK, Start, anything, manifest_of_now, network

JOINER, LIAR = Identity.derived("joiner"), Identity.derived("liar 0")


def accepted(run: Manifest, by: Identity, epoch: int) -> AcceptanceRecord:
    return AcceptanceRecord(
        run=run.run_id, owner=by.public_key, issued=time.time(), shard=0, epoch=epoch, checkpoint="5" * 64, parent=None,
        weights=examples.blob("w"), state=examples.blob("s"), samples=24 * epoch, author=LIAR.public_key,
        tenure_until=time.time() + 60, holdout_loss=0.1,
    )  # fmt: skip


async def liars(start: Start, run: Manifest) -> list[HivemindTransport]:
    """Two peers that serve the run's true manifest and invent acceptances. Their DHT accepts anything."""
    first = await start("liar 0", check=anything)
    second = await start("liar 1", check=anything, bootstrap=first.addresses())
    for liar in (first, second):
        await serve_introduction(liar, lambda: SignedManifest.sign(run, examples.OWNER))
    forged, expires = accepted(run, LIAR, 9), time.time() + 600
    await first.store(forged.key(), forged.owner, seal(forged, LIAR, expires), expires)
    return [first, second]


def ticket(run: Manifest, addresses: list[str]) -> Ticket:
    return Ticket(run=run.run_id, owner=run.owner, addresses=tuple(addresses))


@pytest.mark.timeout(900)
async def test_one_honest_peer_among_liars_is_enough(tmp_path: Path) -> None:
    run = manifest_of_now()
    async with network(tmp_path, run) as start:
        false = await liars(start, run)
        addresses = [address for liar in false for address in liar.addresses()]

        alone, signed = await join_swarm(JOINER, ticket(run, addresses), listen=LOOPBACK, state_folder=tmp_path / "eclipsed")
        try:  # it is in, with the true manifest; it believes no unsigned acceptance, and does not see the coordinator
            assert signed.manifest == run
            assert await read_records(alone, acceptance_key(run.run_id, 0)) == []
            with pytest.raises(ConnectionError):
                await offer_checkpoint(alone, examples.COORDINATOR.peer_id, b"{}", time.time() + 60)
        finally:
            await alone.close()

        honest = await start("coordinator")
        await serve_introduction(honest, lambda: SignedManifest.sign(run, examples.OWNER))
        assert await publish(honest, examples.COORDINATOR, accepted(run, examples.COORDINATOR, 1), 600)
        among = ticket(run, [*addresses, *honest.addresses()])
        joined, _ = await join_swarm(JOINER, among, listen=LOOPBACK, state_folder=tmp_path / "among")
        try:
            ((found, _),) = await read_records(joined, acceptance_key(run.run_id, 0))
            assert isinstance(found, AcceptanceRecord)
            assert (found.owner, found.epoch) == (examples.COORDINATOR.public_key, 1)
        finally:
            await joined.close()


@pytest.mark.timeout(900)
async def test_a_poisoned_peerstore_costs_only_time(tmp_path: Path) -> None:
    """It names impossible hosts, dead ones, and a peer of another run, which is asked and not believed."""
    run = manifest_of_now()
    other = manifest_of_now(name="another run")
    async with network(tmp_path, run) as start:
        stranger = await start("stranger", check=anything)
        await serve_introduction(stranger, lambda: SignedManifest.sign(other, examples.OWNER))
        honest = await start("coordinator")
        await serve_introduction(honest, lambda: SignedManifest.sign(run, examples.OWNER))
        state = tmp_path / "joiner"
        cache = Peerstore(state / PEERS_FILE)
        peer = Identity.derived("nobody").peer_id
        poison = [f"/ip4/999.1.1.1/tcp/1/p2p/{peer}", f"/ip4/127.0.0.1/tcp/1/p2p/{peer}", "/ip4/127.0.0.1/tcp/2/p2p/0OIl"]
        cache.remember([*poison, *stranger.addresses()])

        joined, signed = await join_swarm(JOINER, ticket(run, honest.addresses()), listen=LOOPBACK, state_folder=state)
        await joined.close()
        assert signed.manifest == run
        assert cache.load()[0] == honest.addresses()[0]

        dead = [f"/ip4/127.0.0.1/tcp/1/p2p/{examples.COORDINATOR.peer_id}"]
        cache.path.unlink()
        cache.remember(poison)
        with pytest.raises(BootstrapError, match="none of the"):
            await join_swarm(JOINER, ticket(run, dead), listen=LOOPBACK, state_folder=state)
