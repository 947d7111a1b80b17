"""Introductions between this version, the one before and later ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lutetia.protocol.rpc.introduction import (
    HELLO,
    HELLO_1,
    OLDEST_PROTOCOL,
    PROTOCOL_VERSION,
    Hello,
    ask_document,
    ask_hello,
    serve_document,
    serve_introduction,
)
from lutetia.protocol.rpc.manifest_sync import version_at
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import CAPABILITIES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.transport.base import Stream
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual
from tests.protocol.example_documents import NOW, OWNER, manifest
from tests.protocol.networks import Anything

RECORDED = Path(__file__).parents[1] / "recorded" / "0.1"
HELLO_OF_0_1 = json.loads((RECORDED / "messages.json").read_text())["hello"].encode()
FIELDS_OF_0_1 = json.loads((RECORDED / "fields.json").read_text())["Hello"]


def pair() -> tuple[MemoryTransport, MemoryTransport]:
    network = MemoryNetwork()
    return network.peer(Identity.derived("asked"), Anything()), network.peer(Identity.derived("asking"), Anything())


def hello(**fields: Any) -> Hello:
    return Hello.model_validate({**json.loads(HELLO_OF_0_1), **fields})


def test_peers_of_this_version_say_what_they_can_do():
    async def scenario() -> None:
        asked, asking = pair()
        await serve_introduction(asked, lambda: SignedManifest.sign(manifest(), OWNER))
        found = (await ask_hello(asking, asked.peer_id)).hello
        assert (found.protocol, found.oldest, found.capabilities) == (PROTOCOL_VERSION, OLDEST_PROTOCOL, CAPABILITIES)
        assert found.understood

    run_virtual(scenario, NOW)


def test_peer_of_the_version_before_is_asked_in_its_own_way():
    async def scenario() -> None:
        asked, asking = pair()
        await serve_document(asked, HELLO_1, lambda: HELLO_OF_0_1)
        answer = await ask_hello(asking, asked.peer_id)
        assert (answer.hello.protocol, answer.hello.capabilities, answer.hello.understood) == (1, (), True)
        assert await version_at(asking, asked.peer_id) == (answer.hello.run, 1)

    run_virtual(scenario, NOW)


def test_peer_of_the_version_before_gets_no_field_that_it_would_refuse():
    async def scenario() -> None:
        asked, asking = pair()
        await serve_introduction(asked, lambda: SignedManifest.sign(manifest(), OWNER))
        document = json.loads(await ask_document(asking, asked.peer_id, HELLO_1))
        assert sorted(document) == FIELDS_OF_0_1
        assert document["protocol"] == 1, "it joins only peers of its own number"

    run_virtual(scenario, NOW)


def test_slow_peer_is_not_asked_twice():
    async def scenario() -> None:
        asked, asking = pair()

        async def silent(stream: Stream) -> None:
            await stream.read_exactly(1)

        for protocol in (HELLO, HELLO_1):
            await asked.serve(protocol, silent)
        start = asking.now()
        with pytest.raises(ConnectionError, match="within 10 s"):
            await ask_hello(asking, asked.peer_id)
        assert asking.now() - start == pytest.approx(10, abs=1)

    run_virtual(scenario, NOW)


@pytest.mark.parametrize(
    ("protocol", "oldest", "understood"),
    [(1, None, True), (2, 1, True), (3, 2, True), (9, 1, True), (3, 3, False), (3, None, False), (0, None, False)],
)
def test_versions_that_share_a_number_understand_each_other(protocol: int, oldest: int | None, understood: bool):
    assert hello(protocol=protocol, oldest=oldest).understood is understood


def test_unknown_and_odd_capabilities_are_passed_over():
    odd = ["time-travel", "Ünknown", "[/x]", "", 7, None, {"a": 1}, "x" * 33, *[f"more-{index}" for index in range(99)]]
    found = hello(capabilities=odd, mood="fine").capabilities
    assert found[0] == "time-travel"
    assert len(found) == 32
    assert all(word.startswith(("time", "more")) for word in found)


def test_introduction_of_the_version_before_is_the_same_bytes():
    assert canonical(Hello.model_validate_json(HELLO_OF_0_1)) == HELLO_OF_0_1
