"""Four nodes on two shards of two lanes, as real processes over libp2p: one is killed, one offers another lane's training."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.ledger.events import AuditDone, LaneAccepted, LanesMerged, PeerQuarantined
from lutetia.node.control import ask
from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import ClaimRecord
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import LutetiaError
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, joined, until
from tests.coordinator.test_serve import make_run, up
from tests.coordinator.test_with_node import start_node

TEAM = TeamSpec(lanes=2, quorum=1.0, deadline=3600.0)


@pytest.mark.timeout(900)
async def test_epochs_are_merged_without_the_killed_node_and_the_liar(tmp_path: Path) -> None:
    run = make_run(tmp_path, team=TEAM, checkpoint_samples=80, samples_per_shard=160)
    coordinator = await Coordinator.start(run.folder, json.dumps({"stitch": "end", "gallery": False}))
    nodes: list[asyncio.subprocess.Process] = []
    try:
        await up(coordinator)
        async with joined("mallory", Ticket.decode(run.ticket), tmp_path) as mallory, claiming(mallory) as held:
            nodes.append(await start_node(run.ticket, tmp_path / "eve", LUTETIA_DUTY="0.01"))  # minutes for her lane
            await until(
                shows(nodes[0], tmp_path / "eve", shard=1, lane=1, state="training"), "eve to train the lane that is free"
            )
            await release(mallory, held, (0, 0), (1, 0))
            nodes += [await start_node(run.ticket, tmp_path / name) for name in ("ann", "bob")]
            await until(gathered(run.folder, (0, 0), (1, 0)), "results of ann and bob", every=1.0)
            nodes[0].kill()
            lie = mallory.train(0, lane=0, said=1)
            assert (await mallory.verdict(lie)).verdict in ("gathered", "invalid")

            async def caught() -> bool:
                return [each.owner for each in (await mallory.status()).quarantined] == [mallory.identity.public_key]

            await until(caught, "the audit of another lane's training")
            await until(merged_without(run.folder, mallory.identity.public_key), "a merge without the liar", every=1.0)
    finally:
        for process in (*nodes, coordinator.process):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                await asyncio.wait_for(process.wait(), 300)
    assert coordinator.process.returncode == 0, "\n".join(tell(run.folder))
    check_history(run.folder, mallory.identity.public_key, Identity.load(tmp_path / "eve" / "identity.key").public_key)


def check_history(folder: Path, mallory: str, killed: str) -> None:
    events, history = list(read_events(folder)), "\n".join(tell(folder))
    results = [event for event in events if isinstance(event, LaneAccepted)]
    assert mallory in {event.acceptance.author for event in results}, history
    assert [event.owner for event in events if isinstance(event, PeerQuarantined)] == [mallory]
    assert {event.outcome for event in events if isinstance(event, AuditDone) and event.owner != mallory} <= {"valid"}, history
    [merged] = [
        event for event in events
        if isinstance(event, LanesMerged) and (event.acceptance.shard, event.acceptance.epoch) == (1, 1)
    ]  # fmt: skip
    assert killed not in merged.acceptance.authors
    first = min(event.time for event in results if event.acceptance.shard == 1)
    assert merged.time - first < TEAM.deadline / 10, "as soon as its claim ended, or when the node that took its lane was done"


@asynccontextmanager
async def claiming(peer: ScriptedNode) -> AsyncIterator[set[tuple[int, int]]]:
    """The peer claims the lanes that are in the set, at first all but lane 1 of shard 1."""
    held = {(0, 0), (1, 0), (0, 1)}

    async def renew() -> None:
        while True:
            for place in tuple(held):
                await claim(peer, *place, "training")
            await asyncio.sleep(peer.signed.manifest.timing.heartbeat / 2)

    for place in held:
        await claim(peer, *place, "training")
    renewing = asyncio.create_task(renew())
    try:
        yield held
    finally:
        renewing.cancel()


async def release(peer: ScriptedNode, held: set[tuple[int, int]], *lanes: tuple[int, int]) -> None:
    held.difference_update(lanes)
    for place in lanes:
        await claim(peer, *place, "released")


async def claim(peer: ScriptedNode, shard: int, lane: int, state: Literal["training", "released"]) -> None:
    timing = peer.signed.manifest.timing
    record = ClaimRecord(
        run=peer.signed.manifest.run_id, owner=peer.identity.public_key, issued=peer.transport.now(), shard=shard, lane=lane,
        epoch=0, samples=0, state=state,
    )  # fmt: skip
    await publish(peer.transport, peer.identity, record, timing.lease, skew=timing.maximum_clock_skew)


def shows(node: asyncio.subprocess.Process, folder: Path, **wanted: Any) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        assert node.returncode is None
        try:
            status = await ask(folder, "status")
        except LutetiaError:
            return False
        return all(status[name] == value for name, value in wanted.items())

    return holds


def gathered(folder: Path, *lanes: tuple[int, int]) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        found = [event.acceptance for event in read_events(folder) if isinstance(event, LaneAccepted)]
        return {*lanes} <= {(each.shard, *each.lanes) for each in found}

    return holds


def merged_without(folder: Path, liar: str) -> Callable[[], Awaitable[bool]]:
    """Whether the first epochs of both shards are there, of others' results alone."""

    async def holds() -> bool:
        authors = merged_authors(folder)
        return authors.keys() >= {(0, 1), (1, 1)} and liar not in authors[0, 1]

    return holds


def merged_authors(folder: Path) -> dict[tuple[int, int], set[str]]:
    """Whose results are merged into each epoch of each shard, as it is now."""
    results: dict[str, str] = {}
    authors: dict[tuple[int, int], set[str]] = {}
    for event in read_events(folder):
        if isinstance(event, LaneAccepted):
            results[event.acceptance.checkpoint] = event.acceptance.author
        elif isinstance(event, LanesMerged):
            authors[event.acceptance.shard, event.acceptance.epoch] = {results[each] for each in event.sources}
    return authors
