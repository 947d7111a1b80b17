"""py-libp2p's TCP stream, noise, yamux and protocol negotiation, without the rest of py-libp2p.

`import libp2p` also imports QUIC, WebSocket, DNS-over-HTTPS, relays and certificate tools, which takes half a second: too long
for a command that asks one question. The packages above the needed modules are therefore registered as plain namespaces. If
py-libp2p is imported already, that import is used. If a release has another layout, all of it is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types

log = logging.getLogger(__name__)

_PACKAGES = ("libp2p", "libp2p.network", "libp2p.transport", "libp2p.transport.quic")
_NEEDED = (
    "libp2p.security.noise.transport",
    "libp2p.stream_muxer.yamux.yamux",
    "libp2p.protocol_muxer.multiselect_client",
    "libp2p.protocol_muxer.multiselect_communicator",
    "libp2p.network.connection.raw_connection",
    "libp2p.io.trio",
    "libp2p.crypto.ed25519",
    "libp2p.crypto.x25519",
)


def _import_lightly() -> None:
    spec = importlib.util.find_spec("libp2p")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("py-libp2p is not installed; install lutetia with its dependencies")
    root = spec.submodule_search_locations[0]
    for name in _PACKAGES:
        place = importlib.machinery.ModuleSpec(name, None, is_package=True)
        place.submodule_search_locations = ["/".join([root, *name.split(".")[1:]])]
        sys.modules[name] = importlib.util.module_from_spec(place)
    quic = types.ModuleType("libp2p.transport.quic.stream")  # one annotation names its class
    quic.QUICStream = type("QUICStream", (), {})  # type: ignore[attr-defined]
    sys.modules[quic.__name__] = quic
    for name in _NEEDED:
        importlib.import_module(name)


def _import() -> None:
    if "libp2p" in sys.modules:
        return
    before = set(sys.modules)
    try:
        _import_lightly()
    except (ImportError, AttributeError) as error:
        log.info("py-libp2p has a new layout (%s); importing all of it, which takes longer", error)
        for name in [name for name in set(sys.modules) - before if name.partition(".")[0] == "libp2p"]:
            del sys.modules[name]


_import()

import trio  # noqa: E402
from cryptography.exceptions import InvalidTag  # noqa: E402
from google.protobuf.message import DecodeError  # noqa: E402
from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: E402
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair  # noqa: E402
from libp2p.custom_types import TProtocol  # noqa: E402
from libp2p.exceptions import BaseLibp2pError  # noqa: E402
from libp2p.io.trio import TrioTCPStream  # noqa: E402
from libp2p.network.connection.raw_connection import RawConnection  # noqa: E402
from libp2p.peer.id import ID  # noqa: E402
from libp2p.protocol_muxer.multiselect_client import MultiselectClient  # noqa: E402
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator  # noqa: E402
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE  # noqa: E402
from libp2p.security.noise.transport import Transport as Noise  # noqa: E402
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX  # noqa: E402
from libp2p.stream_muxer.yamux.yamux import Yamux  # noqa: E402
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError  # noqa: E402

FAILURES = (
    BaseLibp2pError, NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError, InvalidTag, DecodeError,
    trio.BrokenResourceError, trio.ClosedResourceError, ValueError, RuntimeError,
)  # fmt: skip
"""What py-libp2p raises when a peer misbehaves or a connection breaks."""

logging.getLogger("libp2p").setLevel(logging.CRITICAL)  # it logs failed dials as errors; our callers report them

__all__ = [
    "ID",
    "NOISE",
    "FAILURES",
    "YAMUX",
    "MultiselectClient",
    "MultiselectCommunicator",
    "Noise",
    "RawConnection",
    "TProtocol",
    "TrioTCPStream",
    "Yamux",
    "create_new_key_pair",
    "create_noise_key_pair",
]
