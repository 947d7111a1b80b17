"""The whole service over real libp2p on loopback: check results, kill, restart, finish the run, exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lutetia.cli.doctor.run_needs import check_run
from lutetia.cli.fetch_mixture import fetch_mixture
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.describe import tell
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.serve import serve_run
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.coordinator.snapshot.document import header_of, parts_of, write_snapshot
from lutetia.coordinator.web.api.history import History
from lutetia.models.mixing.description import FILE, SignedMixture, read_mixture, verify_mixture
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import ConfigError, IdentityError, IntegrityError, UnreachableError, UsageError
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, free_port, joined, until
from tests.coordinator.tiny_data import build_tiny


def make_run(root: Path, shards: int = 2, **settings: Any) -> CreatedRun:
    own = {"preset": "tiny", "name": "loopback", "addresses": (f"127.0.0.1:{free_port()}",), "samples_per_shard": 16}
    return create_run(build_tiny(root / "data", shards), root / "run", RunSettings(**{**own, **settings}))


async def up(coordinator: Coordinator) -> None:
    """Wait for the first status of a (re)started coordinator."""
    (coordinator.folder / "status.json").unlink(missing_ok=True)

    async def written() -> bool:
        assert coordinator.process.returncode is None, "the coordinator ended"
        return (coordinator.folder / "status.json").exists()

    await until(written, "the coordinator's first status")


async def holdouts_are_kept(peer: ScriptedNode, http: int) -> None:
    """The coordinator serves training clips, and to nobody the held-out ones, whose digest the manifest names."""
    shard, coordinator = peer.signed.manifest.shards[0], Provider(peer.coordinator, tuple(peer.ticket.addresses))
    assert (await fetch_blob(peer.transport, peer.store, shard.train, [coordinator])).stat().st_size == shard.train.size
    with pytest.raises(UnreachableError):
        await fetch_blob(peer.transport, peer.store, shard.holdout, [coordinator])
    async with httpx.AsyncClient(timeout=60) as client:
        assert (await client.get(f"http://127.0.0.1:{http}/blobs/{shard.holdout.digest}")).status_code == 404


@pytest.mark.timeout(900)
async def test_run_from_first_offer_to_finish(tmp_path: Path):
    run = make_run(tmp_path)
    http = free_port()
    settings = json.dumps({"http": f"127.0.0.1:{http}", "refresh_seconds": 0.5})
    coordinator = await Coordinator.start(run.folder, settings)
    await up(coordinator)
    async with (
        joined("ann", Ticket.decode(run.ticket), tmp_path) as ann,
        joined("bob", Ticket.decode(run.ticket), tmp_path) as bob,
    ):
        assert [shard.state for shard in (await ann.status()).shards] == ["unclaimed", "unclaimed"]
        await refusals(ann, bob)
        await holdouts_are_kept(ann, http)
        first = ann.train(0)
        assert (await ann.offer(first)).verdict == "queued"
        assert (await ann.verdict(first)).verdict == "accepted"
        await published(ann, 0, 1)
        by_poll = bob.train(1)
        await bob.file(by_poll)
        await published(ann, 1, 1)
        assert (await bob.verdict(by_poll)).verdict == "accepted"

        last = ann.train(0)
        assert (await ann.offer(last)).verdict == "queued"
        await coordinator.end(signal.SIGKILL)
        before = event_lines(run.folder)
        torn = run.folder / ".status.json.x.part"  # as a kill during a write leaves it
        torn.write_bytes(b"{")
        write_lying_snapshot(RunFolder(run.folder))
        coordinator = await Coordinator.start(run.folder, settings)
        await up(coordinator)
        assert not torn.exists()
        await published(bob, 0, 2)  # it was not offered again: the ledger has it
        assert event_lines(run.folder)[: len(before)] == before
        await until(lambda: tells_of_snapshot(ann), "the red line about the snapshot")
        assert (await ann.verdict(last)).verdict == "accepted"

        final = bob.train(1)
        assert (await bob.verdict(final)).verdict == "accepted"
        await until(lambda: finished(ann), "the final mixture")
        async with httpx.AsyncClient(timeout=60) as client:

            async def shown() -> bool:
                return (await client.get(f"http://127.0.0.1:{http}/status.json")).json()["finished"]

            await until(shown, "the page, which is told of it up to half a second later")
        await asyncio.to_thread(check_fetching, run, tmp_path / "fetched")
    assert await coordinator.end(signal.SIGTERM) == 0
    check_the_end(run, coordinator, http)


def event_lines(folder: Path) -> list[str]:
    """The lines of events, without the summary."""
    return [line for line in tell(folder) if line.startswith("20")]


async def refusals(ann: ScriptedNode, bob: ScriptedNode) -> None:
    """What a hostile peer may try before there is honest work."""

    def poison(tensors) -> None:
        tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")

    bad = bob.train(0, poison)
    forged = seal(bad, Identity.derived("mallory"), ann.transport.now() + 600)
    reply = await bob.offer(bad, forged)
    assert (reply.verdict, reply.check) == ("invalid", "signature")
    reply = await ann.offer(bad, seal(bad, bob.identity, ann.transport.now() + 600))
    assert (reply.verdict, reply.check) == ("invalid", "signature"), "another peer's result over my connection"
    reply = await bob.verdict(bad)
    assert (reply.verdict, reply.check) == ("invalid", "numbers")
    assert "NaN" in reply.text
    status = await ann.status()
    assert [(refusal.check, refusal.verdict) for refusal in status.refusals] == [("numbers", "invalid")]
    bob.trainers.clear()


async def published(peer: ScriptedNode, shard: int, epoch: int) -> None:
    async def there() -> bool:
        return [acceptance.epoch for acceptance in await peer.accepted(shard)] == [epoch]

    await until(there, f"the acceptance of epoch {epoch} of shard {shard} in the DHT")


def write_lying_snapshot(folder: RunFolder) -> None:
    """A snapshot under the coordinator's key in which 77 results more are accepted than the ledger says."""
    key, history = Identity.load(folder.coordinator_key), History()
    with contextlib.closing(Ledger.open(folder.ledger, to_read=True)) as ledger:
        for row in ledger.rows():
            history.add(row.id, row.event())
        state = replace(ledger.state, accepted=ledger.state.accepted + 77)
        parts = parts_of(state, history)
        write_snapshot(folder.snapshot, header_of(state.run, *ledger.head, parts, key.public_key), parts, key)


async def tells_of_snapshot(peer: ScriptedNode) -> bool:
    return any(stall.kind == "ledger" for stall in (await peer.status()).stalls)


async def finished(peer: ScriptedNode) -> bool:
    return (await peer.status()).finished


def check_fetching(run: CreatedRun, out: Path) -> None:
    """`swarm fetch` takes the files that a mixture needs, by its digest, too, and refuses what a hostile coordinator signs."""

    def fetch(digest: str | None = None) -> set[str]:
        fetch_mixture(Ticket.decode(run.ticket), out, 60.0, lambda done, total: None, digest)
        verify_mixture(out, run.manifest.coordinators)
        return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}

    served, key = run.folder / "mixture" / FILE, Identity.load(run.folder / "coordinator.key")
    signed, document = served.read_bytes(), read_mixture(run.folder / "mixture").mixture
    code = ChunkTable.of_bytes(b"print('code of the mixture ran')").ref

    def serve(**files: BlobRef) -> None:
        changed = document.model_copy(update={"files": {**document.files, **files}})
        served.write_bytes(canonical(SignedMixture.sign(changed, key.sign)))

    assert fetch() == {*document.files, FILE}
    found = check_run(Ticket.decode(run.ticket), out.parent / "node")
    assert found.verdict == "ok", found.seen
    assert "here on " in found.seen
    serve(**{"vae/evil.py": code, "expert_000/diffusion_pytorch_model.bin": code})
    assert fetch() == {*document.files, FILE}, "its blobs are nowhere, and nobody asked for them"
    before = (out / FILE).read_bytes()
    serve(**{"pipeline.py": code})
    with pytest.raises(IntegrityError, match=r"pipeline\.py is not Lutetia's"):
        fetch()
    assert (out / FILE).read_bytes() == before, "the mixture that was fetched before stays"
    served.write_bytes(signed)
    earlier = [path.stem for path in (run.folder / "mixtures").glob("*.json") if path.stem != document.digest]
    assert earlier, "several were stitched"
    for digest in (earlier[0], document.digest[:12]):
        fetch(digest)
        assert read_mixture(out).mixture.digest.startswith(digest)
    with pytest.raises(UnreachableError, match="made no mixture 0000"):
        fetch("0" * 64)
    with pytest.raises(UsageError, match="at least 12"):
        fetch("xyz")


def check_the_end(run: CreatedRun, coordinator: Coordinator, http: int) -> None:
    status = coordinator.status()
    assert status.finished
    assert status.accepted == 4, "the lying snapshot was dropped"
    ledger = Ledger.open(run.folder / "ledger.sqlite", run.run)
    made = ledger.state.stitched
    ledger.close()
    assert made
    assert (made.epochs, made.rows > 0) == ((2, 2), True)
    assert "equal rows" in made.text, "it was compared with the one before"
    assert (status.mixture == made.mixture) is (status.held_mixture is None) is made.current
    assert status.router is not None
    assert status.router.epochs == (1, 0), "trained once, after the first acceptance"
    assert [shard.audit for shard in status.shards] == ["valid"] * 2, "finishing waited for the audits"
    assert verify_mixture(run.folder / "mixture", run.manifest.coordinators).digest == status.mixture
    assert (run.folder / "gallery" / "000.gif").exists()
    assert list((run.folder / "incoming").glob("??/*")) == [], "nothing undecided is left"
    ledger = Ledger.open(run.folder / "ledger.sqlite", run.run)
    assert ledger.state.accepted == 4
    assert ledger.state.finished
    ledger.close()
    for port in (http, int(Ticket.decode(run.ticket).addresses[0].split("/")[4])):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)
    assert [entry.name for entry in run.folder.iterdir() if entry.name.endswith(".part")] == []


async def test_folder_that_cannot_be_served_is_refused_in_one_sentence(tmp_path: Path):
    run = make_run(tmp_path)
    port = int(Ticket.decode(run.ticket).addresses[0].split("/")[4])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UnreachableError, match=str(port)) as caught:
            await serve_run(run.folder)
        assert "\n" not in str(caught.value)
        with pytest.raises(UnreachableError, match="cannot serve HTTP"):
            await serve_run(run.folder, ServeSettings(http=f"127.0.0.1:{port}"))
    with pytest.raises(ConfigError, match="holds no run"):
        await serve_run(tmp_path)


async def test_second_coordinator_on_a_folder_is_refused(tmp_path: Path):
    run = make_run(tmp_path)
    coordinator = await Coordinator.start(run.folder)
    await up(coordinator)
    with pytest.raises(IdentityError, match=f"process {coordinator.process.pid}"):
        await serve_run(run.folder)
    assert await coordinator.end(signal.SIGHUP) == 0
