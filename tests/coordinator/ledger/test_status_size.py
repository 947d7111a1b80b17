"""The status document never grows beyond what its readers take, whoever is online and whatever they call themselves."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from lutetia.cli.status_table import render_status
from lutetia.coordinator.ledger.lanes.status import LANES_FOR_A_NODE, LANES_SHOWN
from lutetia.coordinator.ledger.reducer import REMEMBERED_REFUSALS
from lutetia.coordinator.ledger.stalls import (
    AUDITS_EXPLAINED,
    LINEAGES_EXPLAINED,
    MERGES_EXPLAINED,
    NODES_EXPLAINED,
    SHARDS_EXPLAINED,
)
from lutetia.coordinator.ledger.status_builder import NODES_SHOWN, QUARANTINED_SHOWN, LiveView, shown_nodes, status
from lutetia.coordinator.web.metrics import metrics_text
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.fields import MOST_SHARDS
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.status import (
    MAX_STATUS_BYTES,
    CheckStatus,
    LaneStatus,
    MergeStatus,
    NodeStatus,
    QuarantineStatus,
    RefusalStatus,
    RouterStatus,
    ShardStatus,
    StallStatus,
    SwarmStatus,
)
from lutetia.protocol.schema.verdicts import CHECK_NAMES
from tests.coordinator.acceptance.judge_driver import PEERS, drive_judge
from tests.coordinator.ledger.test_status_builder import accept, claim, node

WIDEST_NUMBER, WIDEST_TIME, WIDEST_LETTER = -1.2345678901234567e-100, 1_800_000_000.1234567, "😀"


def largest(kind: type[BaseModel]) -> int:
    """Bytes of the largest document of `kind`, one entry in each of its lists."""
    schema = kind.model_json_schema(by_alias=False, mode="serialization")
    return len(canonical(_largest(schema, schema)))


def _largest(schema: dict[str, Any], root: dict[str, Any]) -> Any:
    if "$ref" in schema:
        return _largest(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if options := schema.get("anyOf"):
        return max((_largest(each, root) for each in options), key=lambda value: len(canonical({"": value})))
    match schema.get("type"):
        case "integer":
            return schema.get("const", schema.get("maximum"))
        case "number":
            return WIDEST_TIME if schema.get("maximum") == 1e11 else WIDEST_NUMBER
        case "string":
            if pattern := schema.get("pattern"):
                return "x" * schema.get("maxLength", 1 + max(map(int, re.findall(r"(\d+)\}", pattern)), default=10_000_000))
            return WIDEST_LETTER * schema["maxLength"]
        case "array":
            return [_largest(schema["items"], root)]
        case "object":
            return {name: _largest(each, root) for name, each in schema["properties"].items()}
    return schema.get("const")


def test_largest_run_in_the_largest_swarm_fits() -> None:
    counts: dict[type[BaseModel], int] = {
        max(LaneStatus, MergeStatus, key=largest): LANES_SHOWN, NodeStatus: NODES_SHOWN - LANES_SHOWN // LANES_FOR_A_NODE,
        RefusalStatus: REMEMBERED_REFUSALS,
        QuarantineStatus: QUARANTINED_SHOWN, CheckStatus: 3 * len(CHECK_NAMES), RouterStatus: 1, SignedHead: 1,
        StallStatus: SHARDS_EXPLAINED + LINEAGES_EXPLAINED + MERGES_EXPLAINED + AUDITS_EXPLAINED + NODES_EXPLAINED,
    }  # fmt: skip
    lanes = len('"lanes":[],"merge":,')  # of the shards whose lanes are shown
    shards = MOST_SHARDS * (largest(ShardStatus) - largest(LaneStatus) - largest(MergeStatus) - lanes + 1) + LANES_SHOWN * lanes
    epochs = shards + 2 * MOST_SHARDS * len("1000000000,") + MOST_SHARDS * len("4095,")
    assert largest(SwarmStatus) + epochs + sum(count * (largest(kind) + 1) for kind, count in counts.items()) < MAX_STATUS_BYTES


def test_crowd_of_made_up_nodes_hides_neither_work_nor_claims() -> None:
    driver = drive_judge()
    accept(driver, PEERS[0])
    run, now = driver.manifest.run_id, driver.now
    crowd = [node(run, Identity.derived(f"made up {index}"), now, "idle", since=0.0) for index in range(NODES_SHOWN + 50)]
    worker, holder, late = (node(run, peer, now) for peer in PEERS[:3])
    view = LiveView([*crowd, late, holder, worker], [claim(run, PEERS[1], now, shard=1)])
    document = status(driver.state.run, driver.manifest, view, now)
    shown = {entry.owner for entry in document.nodes}
    assert (len(shown), document.nodes_not_shown) == (NODES_SHOWN, 53)
    assert {PEERS[0].public_key, PEERS[1].public_key} <= shown, "accepted work, and a shard"
    assert PEERS[2].public_key not in shown, "the newest comes last"
    assert [entry.owner for entry in document.nodes] == sorted(shown)
    console = Console(width=160)
    with console.capture() as printed:
        console.print(render_status(document, now))
    assert "53 more nodes are online" in printed.get()
    assert f"nodes {NODES_SHOWN + 53} " in printed.get()
    assert "53 more are online" in render_page(document)
    assert b"lutetia_peers_not_shown 53.0" in metrics_text(document)


def test_few_nodes_are_all_shown() -> None:
    driver = drive_judge()
    nodes = [node(driver.manifest.run_id, peer, driver.now) for peer in PEERS]
    assert len(shown_nodes(driver.state.run, nodes, ())) == len(PEERS)
    assert [entry.record.owner for entry in shown_nodes(driver.state.run, nodes, (PEERS[2].public_key,), most=1)] == [
        PEERS[2].public_key
    ]
