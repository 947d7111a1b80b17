"""Results read from the DHT: their owners must answer a dial before anything is fetched. And the whole intake under attack."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lutetia.coordinator.acceptance.intake.rate_limits import DIALS_AT_ONCE, Admission, OwnerDials, may_become_candidate
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.runtime.offer_service import OfferService
from lutetia.coordinator.worker.messages import MeasureSizes, SizesMeasured
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.checkpoint_offer import offer_checkpoint
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord, seal
from lutetia.protocol.transport.base import Stream
from tests.coordinator.acceptance.judge_driver import (
    COORDINATOR,
    PEERS,
    START,
    blob,
    drive_judge,
    first_event,
    make_manifest,
    make_record,
)
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual

CHECK_SECONDS = 6.0
"""Of the one check that takes time here."""


# --- the decisions ----------------------------------------------------------------------------------------------------------


def found(name: str, host: str = "") -> CheckpointRecord:
    who = Identity.derived(name)
    host = host or f"198.51.100.{int.from_bytes(name.encode(), 'big') % 251}"
    return make_record(MANIFEST, who, addresses=(f"/ip4/{host}/tcp/4001/p2p/{who.peer_id}",))


MANIFEST = make_manifest()


def test_few_owners_are_dialled_at_a_time_and_one_at_each_host():
    dials = OwnerDials()
    for index in range(20):
        dials.add(found(f"tarpit {index}", "203.0.113.9"))
        dials.add(found(f"spread {index}", f"198.51.100.{index}"))
    started = dials.start(START)
    assert len(started) == DIALS_AT_ONCE
    assert sum("203.0.113.9" in record.addresses[0] for record in started) == 1
    assert dials.start(START) == []


def test_owner_that_did_not_answer_waits_twice_as_long_each_time():
    dials, record, waits = OwnerDials(), found("silent"), []
    now = START
    for _ in range(4):
        dials.add(record)
        began = now
        while not dials.start(now):
            now += 1.0
        waits.append(now - began)
        dials.ended(record, False, now)
    assert waits == [0.0, 20.0, 40.0, 80.0]


def test_owners_that_were_not_tried_come_first():
    dials = OwnerDials()
    for index in range(DIALS_AT_ONCE):
        dials.add(found(f"silent {index}", f"198.51.100.{index}"))
    for record in dials.start(START):
        dials.ended(record, False, START)
        dials.add(record)
    fresh = found("fresh", "203.0.113.1")
    dials.add(fresh)
    assert dials.start(START + 60)[0] == fresh


def test_decided_or_outdated_results_are_not_looked_at():
    driver = drive_judge(epochs=9)
    first = make_record(driver.manifest, PEERS[0])
    assert may_become_candidate(driver.state.run, first)
    driver.offer(first)
    assert not may_become_candidate(driver.state.run, first), "it waits already"
    driver.verdict(first)
    assert not may_become_candidate(driver.state.run, make_record(driver.manifest, PEERS[1]))
    assert not may_become_candidate(driver.state.run, make_record(driver.manifest, PEERS[1], 9))
    assert not may_become_candidate(driver.state.run, make_record(driver.manifest, PEERS[1], 0, 2, "e" * 64))


# --- the shell, on a network in memory and in virtual time ------------------------------------------------------------------


class _Worker:
    """Finds every file in order."""

    async def ask(self, job, *, limit, sign=None):
        sizes: dict[int, tuple[int, int]] = dict.fromkeys(range(2), (1 << 24, 1))
        return SizesMeasured(weights=sizes, state=sizes) if isinstance(job, MeasureSizes) else None


class _Runner(NetworkCheckRunner):
    """Fetches for real; each held-out loss takes a third of CHECK_SECONDS."""

    async def _losses(self, record, weights, raw=False):
        await asyncio.sleep(CHECK_SECONDS / 3)
        return (0.4, 0.4)


async def _silent(stream: Stream) -> None:
    await asyncio.sleep(3600)


class Intake:
    """A coordinator's offer service, judge loop and check runner, and the peers that it meets."""

    def __init__(self, root: Path) -> None:
        self.root, self.network = root, MemoryNetwork(latency=0.01)
        self.check = record_check(MANIFEST, self.network.now)
        self.transport = self.network.peer(COORDINATOR, self.check)
        self.accepted = asyncio.Event()
        blobs = BlobStore(root / "blobs")
        self.ledger = Ledger.create(root / "ledger.sqlite", first_event(MANIFEST))
        runner = _Runner(
            self.transport, MANIFEST, blobs, BlobStore(root / "incoming"), _Worker(), _Worker(), 65536.0, None  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        self.manifest = MANIFEST
        self.judge_loop = JudgeLoop(
            JudgeRules(MANIFEST, COORDINATOR.public_key, b"s"), self.ledger, runner, self._published, self.network.now
        )
        self.service = OfferService(self.transport, self.judge_loop, Admission())

    async def _published(self, record: object) -> None:
        self.accepted.set()

    async def honest(self, name: str, serving: bool = True) -> CheckpointRecord:
        """A peer with a result that it serves."""
        who, store = Identity.derived(name), BlobStore(self.root / name)
        transport = self.network.peer(who, self.check)
        if serving:
            await serve_blobs(transport, store)
        weights, state, trace = (store.add_bytes(f"{kind} of {name}".encode() * 100) for kind in ("weights", "state", "trace"))
        place = {"addresses": tuple(transport.addresses()), "issued": self.network.now()}
        return make_record(MANIFEST, who, weights=weights, state=state, trace=trace, **place)  # pyright: ignore[reportArgumentType]

    async def offer(self, record: CheckpointRecord, name: str) -> str:
        sender = self.network.find(record.peer_id)
        assert sender
        expires = self.network.now() + 60
        reply = await offer_checkpoint(sender, COORDINATOR.peer_id, seal(record, Identity.derived(name), expires), expires)
        return reply.verdict

    async def stall(self, name: str, offers: bool = True) -> CheckpointRecord:
        """A peer with a result whose blobs never come."""
        who = Identity.derived(name)
        transport = self.network.peer(who, self.check)
        transport._address = f"/ip4/198.51.100.7/tcp/4001/p2p/{who.peer_id}"  # all of them behind one address
        await transport.serve(BLOB, _silent)
        record = make_record(MANIFEST, who, addresses=tuple(transport.addresses()), issued=self.network.now(), weights=blob(name))
        if offers:
            assert await self.offer(record, name) == "queued"
        return record


@asynccontextmanager
async def intake(root: Path) -> AsyncIterator[Intake]:
    room = Intake(root)
    await room.service.serve()
    tasks = [asyncio.create_task(work) for work in (room.judge_loop.run(), room.service.dial_owners())]
    try:
        yield room
        assert not any(task.done() for task in tasks), tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        room.ledger.close()


def seconds_to_acceptance(root: Path, stalled: int) -> float:
    """Virtual seconds from an honest offer to its acceptance, when `stalled` keys of one address have offered before."""

    async def main() -> float:
        async with intake(root) as room:
            for index in range(stalled):
                await room.stall(f"sybil {index}")
            record = await room.honest("honest")
            began = room.network.now()
            assert await room.offer(record, "honest") == "queued"
            await asyncio.wait_for(room.accepted.wait(), 300)
            assert room.judge_loop.state.run.shards[0].accepted == record.digest
            return room.network.now() - began

    return run_virtual(main, START)


def test_stalled_results_of_one_address_do_not_delay_an_acceptance(tmp_path: Path):
    usual = seconds_to_acceptance(tmp_path / "usual", 0)
    assert usual >= CHECK_SECONDS
    assert seconds_to_acceptance(tmp_path / "attacked", 8) <= 1.5 * usual


@pytest.mark.parametrize("answers", [True, False])
def test_dht_record_of_a_stranger_counts_once_its_owner_answers(tmp_path: Path, answers: bool):
    async def main() -> None:
        async with intake(tmp_path) as room:
            record = await room.honest("honest", serving=answers)
            await room.service.offer_found(record)
            if answers:
                await asyncio.wait_for(room.accepted.wait(), 300)
            else:
                await asyncio.sleep(30)
            assert (room.judge_loop.state.run.shards[0].accepted == record.digest) == answers
            assert (room.ledger.state.events > 1) == answers, "a record alone is not even written down"

    run_virtual(main, START)


def test_cancelled_fetches_of_discarded_results_leave_nothing(tmp_path: Path):
    async def main() -> None:
        async with intake(tmp_path) as room:
            await room.stall("sybil")
            await room.offer(await room.honest("honest"), "honest")
            await asyncio.wait_for(room.accepted.wait(), 300)
            await asyncio.sleep(1)
            assert not room.judge_loop._fetches
            assert not room.judge_loop.state.fetching

    run_virtual(main, START)
