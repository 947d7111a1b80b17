"""Names of peers that are away: kept for those with accepted work, and forgotten when they are taken back."""

from __future__ import annotations

import json
from pathlib import Path

from lutetia.coordinator.owner.names import MOST_NAMES, PeerNames
from lutetia.coordinator.web.api.people import People
from lutetia.protocol.schema.owner.orders import OwnerOrders
from lutetia.protocol.schema.records import Hardware, NodeRecord
from tests.coordinator.acceptance.judge_driver import PEERS, START


def node(place: int, name: str) -> NodeRecord:
    peer = PEERS[place]
    return NodeRecord(
        run="0" * 64, owner=peer.public_key, issued=START, peer_id=peer.peer_id, samples_per_second=1.0, software="0.1",
        state="idle", hardware=Hardware(device="cpu", memory_bytes=1, cores=1), name=name,
    )  # fmt: skip


def test_names_are_kept_until_they_are_taken_back_or_hidden(tmp_path: Path) -> None:
    book = PeerNames(tmp_path / "names.json")
    known = {PEERS[0].public_key, PEERS[1].public_key}
    assert book.note([node(0, "Ada"), node(1, ""), node(2, "stranger")], known)
    assert not book.note([node(0, "Ada")], known)
    book.write()
    again = PeerNames(tmp_path / "names.json")
    assert again.names == {PEERS[0].public_key: "Ada"}
    hidden = People(names=again.names, orders=OwnerOrders(hidden_names=(PEERS[0].public_key,)))
    assert (hidden.name(PEERS[0].public_key), People(names=again.names).name(PEERS[0].public_key)) == ("", "Ada")
    assert again.note([node(0, "")], known)
    assert again.names == {}


def test_damaged_or_endless_file_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    for text in ("{", "[]", json.dumps({"a": "<b>", "b": 7})):
        path.write_text(text)
        assert PeerNames(path).names == {}
    path.write_text(json.dumps({str(number): "Ada" for number in range(2 * MOST_NAMES)}))
    assert len(PeerNames(path).names) == MOST_NAMES
