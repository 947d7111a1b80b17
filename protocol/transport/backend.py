"""Which network backend Lutetia uses. The one place that names it; it is imported when it is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import RecordCheck, Transport
from lutetia.protocol.transport.dial_policy import DialPolicy


async def start_transport(identity: Identity, *, listen: str, state_folder: Path, announce: Sequence[str] = ()) -> Transport:
    """Start the backend, without the DHT. Arguments and errors are those of `base.StartTransport`."""
    from lutetia.protocol.transport.hivemind.transport import HivemindTransport

    return await HivemindTransport.start(identity, listen=listen, state_folder=state_folder, announce=announce)


async def connect_transport(
    identity: Identity,
    *,
    listen: str,
    state_folder: Path,
    check: RecordCheck,
    bootstrap: Sequence[str] = (),
    announce: Sequence[str] = (),
    policy: DialPolicy | None = None,
) -> Transport:
    """Start the backend and enter its DHT, for a peer that knows the run's record check from the start.

    `policy` limits what it dials; None follows from `listen`.

    Raises what `base.StartTransport` and `Transport.enter_dht` raise.
    """
    from lutetia.protocol.transport.hivemind.transport import connect_hivemind

    return await connect_hivemind(
        identity, listen=listen, bootstrap=bootstrap, check=check, announce=announce, state_folder=state_folder, policy=policy
    )  # fmt: skip
