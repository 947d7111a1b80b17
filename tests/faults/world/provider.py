"""`python provider.py FOLDER STORE HOW`: a peer that serves the blobs of STORE over real libp2p, until it is killed.

HOW: `well`, `NUMBER` (at most that many bytes a second) or `trickle` (answers every request in the right form, one KiB a second).
It prints the address to dial.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import ACK, BLOB, OK, REQUEST_BYTES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.hivemind.transport import HivemindTransport


async def main(folder: Path, store: BlobStore, how: str) -> None:
    transport = await HivemindTransport.start(Identity.generate(), listen="/ip4/127.0.0.1/tcp/0", state_folder=folder)

    async def trickle(stream: Stream) -> None:
        while True:
            request = await stream.read_exactly(REQUEST_BYTES)
            digest, first, count = request[:32].hex(), int.from_bytes(request[32:36], "big"), int.from_bytes(request[36:], "big")
            chunks = [store.read_chunk(digest, number) for number in range(first, first + count)]
            answer = b"".join(chunks) if count else store.table(digest).hashes
            await stream.write(bytes([OK]) + len(answer).to_bytes(8, "big"))
            for start in range(0, len(answer), 1024):
                await stream.write(answer[start : start + 1024])
                await asyncio.sleep(1.0 if len(answer) > CHUNK // 2 else 0.0)
            assert await stream.read_exactly(1) == ACK

    if how == "trickle":
        await transport.serve(BLOB, trickle)
    else:
        await serve_blobs(transport, store, None if how == "well" else float(how))
    print(transport.addresses()[0], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), BlobStore(Path(sys.argv[2])), sys.argv[3]))
