"""The internals of hivemind that Lutetia uses, sets or overrides. When one is missing, the pinned release has changed.

`pyproject.toml` pins hivemind below its next minor version for their sake. Before the pin moves, this file must pass.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.hivemind.bindings import (
    DHTID,
    P2P,
    DHTLocalStorage,
    DHTProtocol,
    DictionaryDHTValue,
    KBucket,
    Multiaddr,
    RoutingTable,
    TimedStorage,
)
from lutetia.protocol.transport.hivemind.dht.routing_table import DiverseRoutingTable, PlacementProtocol
from lutetia.protocol.transport.hivemind.dht.rpc_server import RpcServer
from lutetia.protocol.transport.hivemind.dht.storage import KeyRecords
from lutetia.protocol.transport.hivemind.p2pd_process import P2pdProcess
from tests.protocol.networks import LOOPBACK

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTROL = ("_pending_calls", "_handler_tasks", "_read_task", "_write_task")
"""Of hivemind's client of p2pd: `p2p_fixes.py` replaces the first two and watches the others."""
PROTOCOL = (
    *("node_id", "node_info", "routing_table", "storage", "cache", "bucket_size", "num_replicas", "serializer"),
    *("IS_DICTIONARY", "call_ping", "call_find", "call_store", "_collect_rpc_handlers"),
)
"""Of a DHTProtocol: `dht/node.py` replaces the table and both storages and gives the object another class."""
BUCKET = ("size", "nodes_to_peer_id", "replacement_nodes")
TABLE = ("buckets", "peer_id_to_uid", "get_bucket_index", "get_nearest_neighbors")
STORAGE = ("data", "expiration_heap", "key_to_heap")
OVERRIDDEN = (
    *((DHTProtocol, PlacementProtocol, name) for name in ("update_routing_table",)),
    *((DHTProtocol, RpcServer, name) for name in ("rpc_ping", "rpc_find", "rpc_store")),
    *((DHTProtocol, RpcServer, name) for name in ("_validate_record", "_validate_dictionary")),
    *((RoutingTable, DiverseRoutingTable, name) for name in ("add_or_update_node", "__delitem__")),
    (TimedStorage, KeyRecords, "store"),
)
"""(hivemind's class, ours, method). A renamed method would no longer be called: records would go unchecked."""


@dataclass
class Plain:
    """hivemind's own objects, as it makes them."""

    p2p: P2P
    protocol: DHTProtocol


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plain]:
    folder: Path = tmp_path_factory.mktemp("p2pd")
    daemon = await P2pdProcess.start(Identity.derived("plain"), LOOPBACK, folder)
    p2p = await P2P.replicate(Multiaddr(daemon.control.address))
    protocol = await DHTProtocol.create(p2p, DHTID.generate(), 20, 5, 5, 3.0, client_mode=True)
    yield Plain(p2p, protocol)
    await p2p.shutdown()
    await daemon.close()


def missing(thing: Any, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if not hasattr(thing, name)]


async def test_the_client_of_p2pd_has_its_private_names(plain: Plain) -> None:
    assert not missing(plain.p2p, ("_client", "peer_id", "add_protobuf_handler"))
    client: Any = plain.p2p._client
    assert not missing(client, ("control",))
    assert not missing(client.control, CONTROL)


async def test_the_calls_are_kept_in_plain_dictionaries(plain: Plain) -> None:
    client: Any = plain.p2p._client
    assert type(client.control._pending_calls) is dict
    assert type(client.control._handler_tasks) is dict


async def test_the_protocol_has_its_private_names(plain: Plain) -> None:
    assert not missing(plain.protocol, PROTOCOL)
    assert isinstance(plain.protocol.storage, DHTLocalStorage)
    assert isinstance(plain.protocol.cache, DHTLocalStorage)


async def test_the_routing_table_has_its_private_names(plain: Plain) -> None:
    assert not missing(plain.protocol.routing_table, TABLE)
    (bucket,) = plain.protocol.routing_table.buckets
    assert isinstance(bucket, KBucket)
    assert not missing(bucket, BUCKET)


async def test_storages_have_their_private_names() -> None:
    assert not missing(TimedStorage(), STORAGE)
    assert not missing(DictionaryDHTValue(), (*STORAGE, "latest_expiration_time"))


@pytest.mark.parametrize(("theirs", "ours", "name"), OVERRIDDEN, ids=lambda part: getattr(part, "__name__", part))
async def test_an_overridden_method_exists_with_these_parameters(theirs: type, ours: type, name: str) -> None:
    assert hasattr(theirs, name)
    expected = list(inspect.signature(getattr(theirs, name)).parameters)
    assert list(inspect.signature(getattr(ours, name)).parameters) == expected
