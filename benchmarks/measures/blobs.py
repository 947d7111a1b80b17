"""A blob fetched from another process over libp2p, verified and written to disk, compared with plain TCP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.report import Row
from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from lutetia.system.process import die_with_parent

MEBIBYTES, RUNS = 200, 5
LISTEN = "/ip4/127.0.0.1/tcp/0"


async def serve(folder: Path) -> None:
    """The other process: serve one random blob over libp2p and plain TCP, and print the addresses."""
    store = BlobStore(folder / "store")
    source = folder / "random"
    source.write_bytes(os.urandom(MEBIBYTES << 20))
    ref = store.add_file(source)
    transport = await HivemindTransport.start(Identity.derived("server"), listen=LISTEN, state_folder=folder / "state")
    await serve_blobs(transport, store)

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                writer.write(chunk)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(send, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    where = {"ref": ref.model_dump(), "peer_id": transport.peer_id, "addresses": transport.addresses(), "port": port}
    print(json.dumps(where), flush=True)
    await asyncio.Event().wait()


async def _raw(port: int, target: Path | None) -> float:
    """Seconds to read everything over plain TCP; with `target` each MiB is hashed and written as well."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4 * CHUNK)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(target.open("wb")) if target else None
        try:
            while True:
                chunk = await reader.readexactly(CHUNK)
                if file:
                    hashlib.sha256(chunk).digest()
                    file.write(chunk)
        except asyncio.IncompleteReadError:
            writer.close()
    return time.perf_counter() - start


async def _measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.measures.blobs",
            str(folder / "server"),
            str(os.getpid()),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        where = json.loads(await process.stdout.readline())
        ref, provider = BlobRef(**where["ref"]), Provider(where["peer_id"], tuple(where["addresses"]))
        transport = await HivemindTransport.start(Identity.derived("client"), listen=LISTEN, state_folder=folder / "client")
        plain, checked, ours = [], [], []
        for run in range(RUNS + 1):
            plain.append(await _raw(where["port"], None))
            checked.append(await _raw(where["port"], folder / "raw"))
            start = time.perf_counter()
            await fetch_blob(transport, BlobStore(folder / f"store{run}"), ref, [provider])
            ours.append(time.perf_counter() - start)
        await transport.close()
        process.kill()
        await process.wait()
    plain, checked, ours = plain[1:], checked[1:], ours[1:]  # the first round warms up
    pairs = list(zip(plain, checked, ours, strict=True))
    return [
        Row.of("libp2p, verified, on disk ÷ plain TCP, only read", [p / o for p, _, o in pairs], "×", "≥ 0.5"),
        Row.of("libp2p, verified, on disk ÷ plain TCP, hashed and written", [c / o for _, c, o in pairs], "×"),
        Row.of("libp2p, verified, on disk", [MEBIBYTES / o for o in ours], "MiB/s", detail=f"{MEBIBYTES} MiB, two processes"),
        Row.of("plain TCP on uvloop, only read", [MEBIBYTES / p for p in plain], "MiB/s"),
    ]


def run() -> list[Row]:
    return uvloop.run(_measure())


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    folder = Path(sys.argv[1])
    folder.mkdir()
    uvloop.run(serve(folder))
