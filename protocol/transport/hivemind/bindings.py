"""hivemind's DHT and p2pd bindings, without the rest of hivemind.

`import hivemind` also imports its averagers and optimisers, and with them torch and scipy: 3 s and 280 MB. The DHT needs none of
them (0.3 s, 40 MB). The package and two of its folders are therefore registered as plain namespaces first, filled with what the
DHT uses. If hivemind is imported already, that import is used. If a release has another layout, all of it is imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from typing import Any

log = logging.getLogger(__name__)

_SCHEMA = "libp2p.crypto.pb.crypto_pb2"
_UTILITIES = ("logging", "serializer", "timed_storage", "asyncio")


def _share_key_schema() -> None:
    """hivemind and py-libp2p both register the protobuf schema crypto.pb, and protobuf refuses the second.

    Both are copies of one schema and libp2p's is newer, so both use that one where it is installed.
    """
    spec = importlib.util.find_spec("libp2p")
    if _SCHEMA not in sys.modules and spec and spec.submodule_search_locations:
        path = f"{spec.submodule_search_locations[0]}/crypto/pb/crypto_pb2.py"
        schema = importlib.util.spec_from_file_location(_SCHEMA, path)
        if schema and schema.loader and os.path.exists(path):
            sys.modules[_SCHEMA] = importlib.util.module_from_spec(schema)
            schema.loader.exec_module(sys.modules[_SCHEMA])
    if _SCHEMA in sys.modules:
        sys.modules["hivemind.proto.crypto_pb2"] = sys.modules[_SCHEMA]


def _import_lightly() -> None:
    spec = importlib.util.find_spec("hivemind")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("hivemind is not installed; install lutetia with its dependencies (on Windows there is no hivemind)")
    root = spec.submodule_search_locations[0]
    for name in ("hivemind", "hivemind.utils", "hivemind.dht"):
        place = importlib.machinery.ModuleSpec(name, None, is_package=True)
        place.submodule_search_locations = ["/".join([root, *name.split(".")[1:]])]
        sys.modules[name] = importlib.util.module_from_spec(place)
    for name in _UTILITIES:
        module = importlib.import_module(f"hivemind.utils.{name}")
        vars(sys.modules["hivemind.utils"]).update({k: v for k, v in vars(module).items() if not k.startswith("_")})
    importlib.import_module("hivemind.dht.protocol")


def _import() -> None:
    _share_key_schema()
    if "hivemind" in sys.modules:
        return
    before = set(sys.modules)
    try:
        _import_lightly()
    except (ImportError, AttributeError) as error:
        log.warning("hivemind has a new layout (%s); importing all of it, which takes longer", error)
        for name in [name for name in set(sys.modules) - before if name.partition(".")[0] == "hivemind"]:
            del sys.modules[name]


_import()

from hivemind.dht.protocol import DHTProtocol  # noqa: E402
from hivemind.dht.routing import DHTID, KBucket, RoutingTable  # noqa: E402
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue  # noqa: E402
from hivemind.dht.validation import DHTRecord  # noqa: E402
from hivemind.hivemind_cli import __path__ as _binaries  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.proto import dht_pb2 as _dht_pb2  # noqa: E402
from hivemind.proto import p2pd_pb2 as _p2pd_pb2  # noqa: E402
from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.timed_storage import TimedStorage, ValueWithExpiration  # noqa: E402

use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")  # hivemind has renamed it for the whole process
P2PD = f"{_binaries[0]}/p2pd"
messages: Any = _p2pd_pb2
"""The protobuf messages of p2pd's control socket. Any, because protobuf makes the classes at import."""
dht_messages: Any = _dht_pb2
"""The protobuf messages of the DHT's calls."""

__all__ = [
    "DHTID",
    "P2P",
    "P2PD",
    "DHTLocalStorage",
    "DHTProtocol",
    "DHTRecord",
    "DictionaryDHTValue",
    "KBucket",
    "Multiaddr",
    "PeerID",
    "RoutingTable",
    "TimedStorage",
    "ValueWithExpiration",
    "dht_messages",
    "messages",
]
