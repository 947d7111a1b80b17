"""Attacks on the audit stream, over real p2pd: floods from one address, oversized reports, silent streams."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from lutetia.coordinator.acceptance.intake.rate_limits import RateWindow
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.runtime.audit_service import AuditService
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.audit_request import AUDIT, AuditAnswer, AuditRequest, ask_audit
from lutetia.protocol.rpc.framing import framed
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, ResetRecord
from lutetia.protocol.transport.base import Transport
from tests.attacks.hivemind_swarm import manifest_of_now, network
from tests.coordinator.acceptance import judge_driver
from tests.coordinator.runtime.test_check_runner import ScriptedCheckIO  # pyright: ignore[reportMissingImports]


def test_audit_requests_of_one_origin_are_limited_for_a_minute() -> None:
    pace = RateWindow(per_minute=5)
    assert [pace.wait("203.0.113.5", second / 10) is None for second in range(8)] == [True] * 5 + [False] * 3
    assert pace.wait("203.0.113.5", 10.0) == pytest.approx(50.0)
    assert pace.wait("198.51.100.7", 10.0) is None
    assert pace.wait("203.0.113.5", 61.0) is None


def desk_of(folder: Path, transport: Transport, pace: RateWindow) -> AuditService:
    """A coordinator's audit desk with its judge. No audit is due."""

    async def publish(record: AcceptanceRecord | ResetRecord) -> None: ...

    manifest, store = manifest_of_now(), BlobStore(folder / "blobs")
    tools = NetworkCheckRunner(transport, manifest, store, store, None, None, 1.0, None)  # pyright: ignore[reportArgumentType]
    ledger = Ledger.create(folder / "ledger.sqlite", judge_driver.first_event(manifest, time.time()))
    rules = JudgeRules(manifest, judge_driver.COORDINATOR.public_key, b"secret")
    bench = JudgeLoop(rules, ledger, ScriptedCheckIO(), publish, transport.now, lambda state: None)
    return AuditService(transport, bench, tools, list, pace)


@pytest.mark.timeout(300)
async def test_hostile_audit_requests_leave_others_served(tmp_path: Path) -> None:
    """Three identities at one address ask forty times at once; one also sends an oversized report and one holds streams open."""

    def ask(peer: Transport, name: str) -> asyncio.Task[AuditAnswer]:
        asked = AuditRequest(owner=Identity.derived(name).public_key)
        return asyncio.create_task(ask_audit(peer, coordinator.peer_id, asked))

    async with network(tmp_path, manifest_of_now()) as start:
        coordinator = await start("coordinator")
        desk = desk_of(tmp_path, coordinator, RateWindow(per_minute=20))
        await desk.serve()
        judging = asyncio.create_task(desk.judge_loop.run())
        names = [f"sybil {number}" for number in range(3)]
        sybils = [await start(name, bootstrap=coordinator.addresses(), host="127.0.0.2") for name in names]
        honest = await start("honest", bootstrap=coordinator.addresses(), host="127.0.0.3")

        giant = await sybils[0].open_stream(coordinator.peer_id, AUDIT)
        await giant.write(framed(bytes(4096 + 26 * desk.manifest.steps_per_epoch + 1)))
        with pytest.raises(ConnectionError):
            await giant.read_exactly(1)  # closed without being read
        silent = [await sybils[1].open_stream(coordinator.peer_id, AUDIT) for _ in range(6)]

        replies = await asyncio.gather(*(ask(peer, name) for peer, name in zip(sybils, names, strict=True) for _ in range(10)))
        late = [reply for reply in replies if "this address" in reply.text]
        assert len(late) == 10, "twenty a minute for all identities at that address together"
        assert all(reply.retry_after > 20 for reply in late)
        answered = await ask(honest, "honest")
        assert (answered.text, answered.job) == ("", None)
        assert answered.retry_after > 0
        for stream in silent:
            await stream.close()
        judging.cancel()
        await asyncio.gather(judging, return_exceptions=True)
