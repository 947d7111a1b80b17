"""A peer with a real p2pd, and what its processes could leave behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from tests.protocol.networks import LOOPBACK, honest

ANNA, BEN = Identity.derived("anna"), Identity.derived("ben")


async def peer(
    name: str, folder: Path, run: Manifest, listen: str = LOOPBACK, bootstrap: list[str] | None = None
) -> HivemindTransport:
    return await connect_hivemind(
        Identity.derived(name), listen=listen, bootstrap=bootstrap or [], check=honest(run), state_folder=folder / name
    )


def litter() -> set[str]:
    return {path.name for pattern in ("hivemind-*", "lutetia-*") for path in Path(tempfile.gettempdir()).glob(pattern)}
