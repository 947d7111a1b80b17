"""A process with a p2pd, which its parent kills without warning. It prints p2pd's pid and address, then waits."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.hivemind.transport import connect_hivemind


async def main() -> None:
    transport = await connect_hivemind(
        Identity.derived("lonely"), listen="/ip4/127.0.0.1/tcp/0", check=lambda *_: "", state_folder=Path(sys.argv[1])
    )
    await transport.serve("/test/any", lambda stream: stream.close())
    print(transport._daemon.process.pid, *transport.addresses(), flush=True)
    await asyncio.Event().wait()


uvloop.run(main())
