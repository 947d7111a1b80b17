"""A node that fakes training in a real swarm: its loss is accepted, the audit catches it, and its epoch is rolled back."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.ledger.events import AuditDone, CheckpointAccepted, LineageRolledBack, PeerQuarantined
from lutetia.coordinator.settings import RunSettings
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.records import CheckpointRecord, QuarantineRecord, TrainedWith, quarantine_key
from lutetia.protocol.schema.ticket import Ticket
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, free_port, joined, until
from tests.coordinator.test_serve import up
from tests.coordinator.test_with_node import start_node
from tests.coordinator.tiny_data import build_tiny, clips


def fake(peer: ScriptedNode, honest: ScriptedNode, parent: CheckpointRecord) -> CheckpointRecord:
    """The parent's averages with tiny changes, and an invented trace: it costs nothing and scores like the parent."""
    manifest = peer.signed.manifest
    trainer = ExpertTrainer(manifest, 0, clips(0, 6, 5))
    trainer.restore(1, honest.store.path(parent.weights.digest), honest.store.path(parent.state.digest))
    snapshot = trainer.snapshot()
    draw = torch.Generator().manual_seed(1)
    for tensors in (snapshot.ema, snapshot.parameters):
        for tensor in tensors.values():
            tensor += 1e-5 * torch.randn(tensor.shape, generator=draw)
    trace = [1.40 - 0.01 * step for step in range(manifest.steps_per_epoch)]
    snapshot = replace(snapshot, epoch=2, step=0, samples=2 * manifest.checkpoint_samples, trace=trace)
    files = [peer.folder / f"{name}.safetensors" for name in ("weights", "state", "trace")]
    write_weights(snapshot, files[0])
    write_state(snapshot, files[1], ema=False)
    write_tensors(files[2], {"trace": torch.tensor(snapshot.trace)})
    refs = dict(zip(("weights", "state", "trace"), (peer.store.add_file(path, move=True) for path in files), strict=True))
    return CheckpointRecord(
        run=manifest.run_id, owner=peer.identity.public_key, issued=peer.transport.now(), shard=0, epoch=2, parent=parent.digest,
        **refs, samples=snapshot.samples, loss=1.385,
        peer_id=peer.transport.peer_id, addresses=tuple(peer.transport.addresses()),
        made=TrainedWith(device="other", precision="bfloat16"),
    )  # fmt: skip


@pytest.mark.timeout(900)
async def test_faked_training_is_rolled_back_and_trained_again(tmp_path: Path):
    settings = RunSettings(preset="tiny", name="cheated", addresses=(f"127.0.0.1:{free_port()}",))
    run = create_run(build_tiny(tmp_path / "data", 1), tmp_path / "run", settings)
    coordinator = await Coordinator.start(run.folder, json.dumps({"exit_when_done": True, "stitch": "end", "gallery": False}))
    node: asyncio.subprocess.Process | None = None
    try:
        await up(coordinator)
        async with (
            joined("ann", Ticket.decode(run.ticket), tmp_path) as ann,
            joined("mallory", Ticket.decode(run.ticket), tmp_path) as mallory,
        ):
            first = ann.train(0)
            assert (await ann.verdict(first)).verdict == "accepted"
            faked = fake(mallory, ann, first)
            reply = await mallory.verdict(
                faked
            )  # its held-out loss is as good as the parent's; an audit may come before the reply
            assert reply.verdict == "accepted" or reply.check == "quarantine", reply

            async def caught() -> bool:
                return bool((await ann.status()).quarantined)

            await until(caught, "the audit of the faked epoch")
            status = await ann.status()
            assert [why.owner for why in status.quarantined] == [mallory.identity.public_key]
            assert (status.shards[0].epoch, status.shards[0].term) == (1, 1)
            reply = await mallory.offer(faked)
            assert (reply.verdict, reply.check) == ("invalid", "quarantine")

            async def shown() -> bool:
                accepted = [(given.epoch, given.term, given.checkpoint) for given in await ann.accepted(0)]
                records = await read_records(ann.transport, quarantine_key(run.run))
                convicts = [peer for record, _ in records if isinstance(record, QuarantineRecord) for peer in record.peers]
                return accepted == [(1, 1, first.digest)] and convicts == [mallory.identity.public_key]

            await until(shown, "the DHT to show the lower epoch of the higher term, and who is quarantined")
            node = await start_node(run.ticket, tmp_path / "node", threads=2)

            async def ended() -> bool:
                over = coordinator.process.returncode is not None
                assert over or (node and node.returncode is None), "the node ended before the run"
                return over

            await until(ended, "an honest worker to finish the shard, and the coordinator to end by itself")
    finally:
        for process in (node, coordinator.process):
            if process and process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await asyncio.wait_for(process.wait(), 300)
    history = "\n".join(tell(run.folder))
    assert coordinator.process.returncode == 0, history
    check_history(run.folder, mallory.identity.public_key, history)


def check_history(folder: Path, mallory: str, history: str) -> None:
    events = list(read_events(folder))
    accepted = [event.acceptance for event in events if isinstance(event, CheckpointAccepted)]
    assert [(given.epoch, given.term) for given in accepted] == [(1, 0), (2, 0), (2, 1), (3, 1)], history
    assert [event.owner for event in events if isinstance(event, PeerQuarantined)] == [mallory]
    assert [(event.epoch, event.dropped) for event in events if isinstance(event, LineageRolledBack)] == [(1, 1)]
    audits = [(event.owner == mallory, event.outcome, event.closer) for event in events if isinstance(event, AuditDone)]
    assert [outcome for own, outcome, _ in audits if not own] == ["valid"] * 3, f"one and two threads alike\n{history}"
    *doubtful, sure = [(outcome, closer) for own, outcome, closer in audits if own]
    assert sure == ("invalid", False), history
    assert set(doubtful) <= {("inconclusive", True)}, "plausible losses of an unknown device ask for the whole epoch"
