"""The light client is quick, imports neither hivemind nor torch, and verifies the peer that it talks to."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.introduction import STATUS, serve_document
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from tests.protocol.example_documents import COORDINATOR, OWNER, RUN, STRANGER
from tests.protocol.networks import LOOPBACK

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENT = bytes(range(256)) * 1500
ASK = """
import json, resource, sys, time
from lutetia.protocol.light_client.documents import fetch_document
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import LutetiaError
ticket, protocol, limit = json.loads(sys.argv[1])
answer = {}
try:
    answer["size"] = len(fetch_document(Ticket.decode(ticket), protocol, limit_bytes=limit))
except LutetiaError as error:
    answer["error"], answer["code"] = str(error), error.code
answer["heavy"] = [name for name in ("hivemind", "torch", "aioquic.quic.connection", "httpx", "grpc") if name in sys.modules]
used = resource.getrusage(resource.RUSAGE_SELF)
answer["seconds"] = used.ru_utime + used.ru_stime
print(json.dumps(answer))
"""
FETCH = """
import json, os, sys
from pathlib import Path
from lutetia.protocol.light_client.blobs import fetch_blobs
from lutetia.protocol.light_client.transfer import ArrivingFolder
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.ticket import Ticket
ticket, folder, path, digest, size, kill_at = json.loads(sys.argv[1])
ref, seen = BlobRef(digest=digest, size=size), []
def count(done, total):
    seen.append(done)
    if done >= kill_at:
        os.kill(os.getpid(), 9)
with ArrivingFolder(Path(folder), [ref]) as blobs:
    fetch_blobs(Ticket.decode(ticket), [ref], blobs, on_bytes=count)
    blobs.move_into({Path(path): ref})
print(seen[0])
"""

ORDER = """
import json, sys
from lutetia.protocol.light_client.documents import fetch_document
from lutetia.protocol.schema.ticket import Ticket
dialled, late = [], []
def heard(event, arguments):
    if event == "socket.connect":
        dialled.append(arguments[1])
    elif event == "import" and dialled:
        late.append(arguments[0])
sys.addaudithook(heard)
ticket, protocol = json.loads(sys.argv[1])
fetch_document(Ticket.decode(ticket), protocol)
libraries = ("libp2p", "noise", "cryptography", "lutetia")
print(json.dumps([len(dialled), [name for name in late if name.partition(".")[0] in libraries]]))
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[HivemindTransport]:
    folder = tmp_path_factory.mktemp("peer")
    transport = await connect_hivemind(COORDINATOR, listen=LOOPBACK, check=lambda *_: "", state_folder=folder)
    await serve_document(transport, STATUS, lambda: DOCUMENT)
    await serve_blobs(transport, BlobStore(folder / "blobs"))
    yield transport
    await transport.close()


def ticket(*addresses: str) -> str:
    return Ticket(run=RUN, owner=OWNER.public_key, addresses=addresses).encode()


def command(code: str, *arguments: Any) -> list[str]:
    return [sys.executable, "-c", code, json.dumps(arguments)]


async def run(line: list[str]) -> str:
    """Run a process while the event loop of this one answers it."""
    process = await asyncio.create_subprocess_exec(*line, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def ask(*addresses: str, protocol: str = STATUS, limit: int = 1 << 20) -> dict[str, Any]:
    return json.loads(await run(command(ASK, ticket(*addresses), protocol, limit)))


async def test_a_document_takes_under_two_seconds_and_light_imports(peer: HivemindTransport) -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    answer = await ask(dead, *peer.addresses())
    assert answer["size"] == len(DOCUMENT)
    assert answer["heavy"] == []
    assert answer["seconds"] < 1.6, "the whole command has two seconds, which include the start of python and the table"


async def test_no_open_connection_waits_for_a_library_to_load(peer: HivemindTransport) -> None:
    """p2pd closes a connection that is not secure within 15 s. Loading py-libp2p took that long on a busy machine."""
    assert json.loads(await run(command(ORDER, ticket(*peer.addresses()), STATUS))) == [1, []]


async def test_each_address_is_named_with_its_reason(peer: HivemindTransport) -> None:
    refused = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    wrong = peer.addresses()[0].replace(peer.peer_id, STRANGER.peer_id)
    answer = await ask(refused, wrong)
    assert answer["code"] == 30
    assert f"{refused}: connection refused" in answer["error"]
    assert f"{wrong}: a peer other than the address names answers there" in answer["error"]


async def test_a_document_that_is_not_offered_or_too_large_is_refused(peer: HivemindTransport) -> None:
    assert "does not offer this" in (await ask(*peer.addresses(), protocol="/test/none"))["error"]
    assert "larger than 1000" in (await ask(*peer.addresses(), limit=1000))["error"]


async def test_killed_fetch_of_blobs_goes_on_from_several_peers(peer: HivemindTransport, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "store")
    data = random.Random(time.time_ns()).randbytes(40 << 20)
    ref = store.add_bytes(data)
    await serve_blobs(peer, store)
    refused = f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}"
    places = ticket(refused, *peer.addresses(), peer.addresses()[0].replace("/ip4/127.0.0.1", "/dns4/localhost"))
    folder, path = str(tmp_path / "arriving"), str(tmp_path / "fetched")
    killed = await asyncio.create_subprocess_exec(*command(FETCH, places, folder, path, ref.digest, ref.size, 0.9 * ref.size))
    assert await killed.wait() == -9
    assert not (tmp_path / "fetched").exists()
    kept = int(await run(command(FETCH, places, folder, path, ref.digest, ref.size, 2 * ref.size)))
    assert kept >= 0.9 * ref.size, "at most a tenth is fetched again"
    assert (tmp_path / "fetched").read_bytes() == data
    assert not (tmp_path / "arriving").exists()
