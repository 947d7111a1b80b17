"""The fixes for hivemind's client of p2pd, with real p2pd."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.hivemind.bindings import PeerID, dht_messages, messages
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from tests.protocol.networks import LOOPBACK, honest, manifest_of_now


async def peer(name: str, folder: Path, bootstrap: list[str] | None = None) -> HivemindTransport:
    return await connect_hivemind(
        Identity.derived(name),
        listen=LOOPBACK,
        bootstrap=bootstrap or [],
        check=honest(manifest_of_now()),
        state_folder=folder / name,
    )


async def test_a_call_cancelled_with_its_answer_keeps_the_reader(tmp_path: Path) -> None:
    anna = await peer("anna", tmp_path)
    ben = await peer("ben", tmp_path, anna.addresses())
    control, call_id = calls_of(ben), uuid.uuid4()
    control._pending_calls[call_id] = cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()  # its caller removes it in the next iteration of the event loop
    ping = messages.CallUnaryRequest(
        peer=PeerID.from_base58(anna.peer_id).to_bytes(),
        proto="DHTProtocol.rpc_ping",
        data=dht_messages.PingRequest().SerializeToString(),
    )
    await control._pending_messages.put(messages.PersistentConnectionRequest(callId=call_id.bytes, callUnary=ping))
    assert ben._dht
    for _ in range(3):
        assert await ben._dht.meet(anna.peer_id)
    assert ben.alive()
    await ben.close()
    await anna.close()


async def test_finished_calls_are_forgotten(tmp_path: Path) -> None:
    anna = await peer("anna", tmp_path)
    kept = calls_of(anna)._handler_tasks

    async def fail() -> None:
        raise ValueError("an answer that does not fit")

    tasks = [asyncio.ensure_future(action) for action in (asyncio.Event().wait(), fail(), asyncio.Event().wait())]
    for task in tasks:
        kept[uuid.uuid4()] = task
    tasks[0].cancel()  # before it started
    await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert list(kept.values()) == tasks[2:]
    tasks[2].cancel()
    await anna.close()


async def test_a_peer_whose_calls_fail_is_not_alive(tmp_path: Path) -> None:
    anna = await peer("anna", tmp_path)
    assert anna.alive()
    reader = calls_of(anna)._read_task
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert not anna.alive()
    with pytest.raises(ConnectionError, match="off the network"):
        await anna.get("any/claims/0")
    await anna.close()


def calls_of(transport: HivemindTransport) -> Any:
    """hivemind's client of p2pd."""
    assert transport._dht
    client: Any = transport._dht._p2p._client
    return client.control
