"""`lutetia run why` reads the status that a coordinator wrote into its run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.status import StallStatus
from tests.cli.command_runner import failure, lutetia
from tests.cli.sample_documents import NOW, shard, status

WHY, REMEDY = "No node holds it, and none stands by.", "Find more volunteers: `lutetia join TICKET` on another machine."


def test_why_says_what_holds_a_shard_up_and_what_to_do(tmp_path: Path) -> None:
    stalls = (StallStatus(kind="shard", shard=1, since=NOW - 90, why=WHY, remedy=REMEDY),)
    document = status(shard(0, 3, "training"), shard(1, 2, "unclaimed"))
    document = document.model_copy(update={"stalls": stalls, "stalled_shards": (1,)})
    (tmp_path / "status.json").write_bytes(canonical(document))
    text = lutetia("run", "why", tmp_path, "1").stdout
    assert f": {WHY} {REMEDY}" in text
    found = json.loads(lutetia("run", "why", tmp_path, "1", "--json").stdout)
    assert (found["state"], found["since"], found["why"], found["remedy"]) == ("stalled", NOW - 90, WHY, REMEDY)
    assert "Nothing holds it up: training, 3 of 6 epochs" in lutetia("run", "why", tmp_path, "0").stdout
    assert failure(lutetia("run", "why", tmp_path, "7", "--json"))["code"] == 2
    nowhere = failure(lutetia("run", "why", tmp_path / "no", "0", "--json"))
    assert (nowhere["code"], "cannot read" in nowhere["message"]) == (10, True)
