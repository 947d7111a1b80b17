"""The owner's commands on a run's folder: orders are signed, a wrong one is refused in a sentence, and runs are listed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from lutetia.cli.owner.runs import found_runs
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.joining import MANIFEST_FILE
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest, open_manifest
from tests.cli.command_runner import each, failure, ticket
from tests.cli.sample_documents import shard, status
from tests.coordinator.acceptance.judge_driver import OWNER, PEERS, first_event, make_manifest


def make_run(folder: Path, name: str = "tiny") -> RunFolder:
    """A run's folder with what its owner needs."""
    manifest = make_manifest(name=name, created=time.time() - 60, expires=time.time() + 1e6)
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.manifest.write_bytes(SignedManifest.sign(manifest, OWNER).to_bytes())
    OWNER.save(run.owner_key)
    Ledger.create(run.ledger, first_event(manifest)).close()
    run.status.write_bytes(canonical(status(shard(0, 3, "training"))))
    return run


def test_orders_are_signed_into_the_folder_and_wrong_ones_refused(tmp_path: Path) -> None:
    run, peer, stranger = make_run(tmp_path / "run"), PEERS[0], tmp_path / "stranger.key"
    Identity.derived("mallory").save(stranger)
    folder = str(run.root)
    paused, again, banned, nobody, long, key, remote, hidden = each([
        ["run", "pause", folder, "--reason", "moving house", "--json"],
        ["run", "pause", folder, "--json"],
        ["run", "ban", folder, peer.peer_id, "--reason", "spam"],
        ["run", "ban", folder, "0123abcd", "--json"],
        ["run", "ban", folder, peer.peer_id, "--reason", "x" * 201, "--json"],
        ["run", "resume", folder, "--owner-key", str(stranger), "--json"],
        ["run", "resume", ticket(), "--json"],
        ["run", "hide-name", folder, peer.public_key, "--json"],
    ])  # fmt: skip
    assert json.loads(paused.stdout)["version"] == 2
    assert (failure(again)["code"], "paused already; resume it" in failure(again)["message"]) == (10, True)
    assert f"refuses peer {peer.peer_id} from now on. What it had accepted stays." in " ".join(banned.stdout.split())
    assert "0 peers of the run begin with 0123abcd" in failure(nobody)["message"]
    assert failure(long)["code"] == 2
    assert failure(key)["code"] == 40
    assert "give its file with --owner-key" in failure(remote)["message"]
    assert json.loads(hidden.stdout)["version"] == 4
    orders = open_manifest(run.manifest.read_bytes(), now=0.0).manifest.orders
    assert orders.paused is not None
    assert (orders.paused.text, orders.refusal_of(peer.public_key)) == (
        "moving house",
        "the run's owner has banned this peer: spam",
    )
    assert orders.hidden_names == (peer.public_key,)
    assert [run.version(number).exists() for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_runs_of_this_machine_are_listed(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "runs" / "one", "one"), make_run(tmp_path / "runs" / "two", "two")
    second.owner_key.unlink()
    second.status.unlink()
    joined = tmp_path / "node" / "runs" / "abc"
    joined.mkdir(parents=True)
    (joined / MANIFEST_FILE).write_bytes(first.manifest.read_bytes())
    (joined / "contributions.json").write_text('{"accepted": 7}')
    (tmp_path / "runs" / "junk").mkdir()
    (tmp_path / "runs" / "junk" / "manifest.json").write_text("{")
    now = first.status.stat().st_mtime + 1
    found = list(found_runs([tmp_path / "runs", tmp_path / "runs" / "one", tmp_path / "node"], now))
    assert [(run.name, run.role, run.state, run.accepted) for run in found] == [
        ("one", "owner", "served", 10),
        ("two", "coordinator", "stopped", None),
        ("one", "node", "joined", 7),
    ]
    later = next(iter(found_runs([first.root], now + 60)))
    assert later.state == "stopped"
    shown, empty = each([["run", "list", str(tmp_path / "runs")], ["run", "list", str(tmp_path / "runs" / "junk")]])
    assert "coordinator" in shown.stdout
    assert "No run is in these folders" in empty.stdout
