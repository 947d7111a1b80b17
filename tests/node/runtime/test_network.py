"""The records that a node publishes, over real p2pd."""

from __future__ import annotations

import time
from pathlib import Path

from lutetia.node.runtime.network import NodeNetwork
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity, peer_id_of
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, Hardware, NodeRecord, node_key
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.hivemind.transport import connect_hivemind
from tests.node.tiny_run import OWNER, make_run

NODE = Identity.derived("a node with odd addresses")


async def test_addresses_unfit_for_records_are_left_out(tmp_path: Path):
    run = make_run(tmp_path / "run")
    good = "/ip4/127.0.0.1/tcp/41000"
    transport = await connect_hivemind(
        NODE, listen="/ip4/127.0.0.1/tcp/0", check=record_check(run.manifest, time.time), state_folder=tmp_path / "node",
        announce=(f"{good}/p2p/{NODE.peer_id}", "/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/41000", good),
    )  # fmt: skip
    try:
        assert len(transport.addresses()) > 1
        ticket = Ticket(run=run.manifest.run_id, owner=OWNER.public_key, addresses=(f"{good}/p2p/{NODE.peer_id}",))
        network = NodeNetwork(NODE, transport, run.manifest, ticket, BlobStore(tmp_path / "blobs"))
        await network.publish_node("idle", Hardware(device="cpu", memory_bytes=1, cores=1), 1.0, None)
        [(record, _)] = await read_records(transport, node_key(run.manifest.run_id, NODE.public_key))
        assert isinstance(record, NodeRecord)
        assert record.addresses == (f"{good}/p2p/{NODE.peer_id}",)
        assert network.has_accepted_work(peer_id_of(run.manifest.coordinators[0]))
        assert not network.has_accepted_work(NODE.peer_id)
        coordinator, lane = run.manifest.coordinators[0], Identity.derived("author of a lane")
        merged = AcceptanceRecord(
            run=run.manifest.run_id, owner=coordinator, issued=1.0, shard=0, epoch=1, checkpoint="1" * 64, parent=None,
            weights=BlobRef(digest="2" * 64, size=1), state=BlobRef(digest="3" * 64, size=1), samples=8, author=coordinator,
            tenure_until=2.0, holdout_loss=0.5, lanes=(1,), authors=(lane.public_key,),
        )  # fmt: skip
        network.acceptances[0] = merged
        assert network.has_accepted_work(lane.peer_id), "a place among the inbound streams is kept for it"
    finally:
        await transport.close()
