"""A run in progress gets a new version of its manifest: real coordinator, real node, no restart.

The node is a unit of two processors, which is killed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lutetia.cli.owner.actions import send_next
from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.admin.upgrade import upgrade_run
from lutetia.coordinator.ledger.events import ManifestPublished
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.owner.orders import order_run, ordered
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.serve import serve_run
from lutetia.coordinator.settings import RunSettings
from lutetia.node.control import ask
from lutetia.protocol.joining import MANIFEST_FILE, join_swarm
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.owner.orders import Order
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import AuthorisationError, ConfigError, IdentityError, LutetiaError
from tests.child_environment import child_environment
from tests.coordinator.admin.test_rotate import check_signatures
from tests.coordinator.scripted_node import Coordinator, free_port, until
from tests.coordinator.test_serve import make_run, up
from tests.coordinator.test_with_node import start_node
from tests.coordinator.tiny_data import build_tiny
from tests.node.scripted_coordinator import all_gone, children_of

UNIT, UNIT_PATIENCE = "cpu:0+cpu:1", 600.0
"""The ranks of a unit import torch in processes of their own, which takes minutes on a busy machine."""
SETTINGS = json.dumps({"stitch": "end", "gallery": False})


async def command(*words: str) -> tuple[int, dict[str, Any]]:
    """`lutetia … --json` in a process of its own: exit code and document."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lutetia.cli", *words, "--json", stdout=asyncio.subprocess.PIPE, env=child_environment()
    )
    output, _ = await process.communicate()
    return process.returncode or 0, json.loads(output)


async def node_says(folder: Path) -> dict[str, Any]:
    try:
        return await ask(folder, "status")
    except LutetiaError:
        return {"state": "not there yet", "manifest_version": None}


def unaudited_run(root: Path, samples: int) -> CreatedRun:
    """One shard and no audits: they are not tested here, and replays take time."""
    settings = RunSettings(
        preset="tiny", addresses=(f"127.0.0.1:{free_port()}",), samples_per_shard=samples,
        audit=AuditPolicy(replay_steps=0, whole_epoch=0.0),
    )  # fmt: skip
    return create_run(build_tiny(root / "data", 1), root / "run", settings)


@pytest.mark.timeout(1500)
async def test_a_finished_run_trains_on_when_its_budget_is_raised_and_its_coordinators_key_is_new(tmp_path: Path):
    run = unaudited_run(tmp_path, 8)
    coordinator = await Coordinator.start(run.folder, SETTINGS)
    await up(coordinator)
    node = await start_node(run.ticket, tmp_path / "node", device=UNIT)

    async def finished_with(accepted: int) -> bool:
        assert node.returncode is None
        status = coordinator.status()
        return status.finished and status.accepted == accepted

    async def accepted_again() -> bool:
        assert node.returncode is None
        return coordinator.status().accepted >= 3

    async def idle_under(version: int) -> bool:
        status = await node_says(tmp_path / "node")
        return (status["state"], status["manifest_version"]) == ("idle", version)

    try:
        await until(lambda: finished_with(1), "the end of the first budget", patience=UNIT_PATIENCE)
        await until(lambda: idle_under(1), "the node to stand by")
        assert await command("run", "upgrade", str(run.folder), "--set", "checkpoint_samples=4") == (
            10,
            {"error": {"name": "config", "code": 10, "message": refusal("checkpoint_samples")}},
        )
        code, answer = await command("run", "upgrade", str(run.folder), "--set", "samples_per_shard=16")
        assert (code, answer["version"], answer["epochs"]) == (0, 2, 2)
        await until(lambda: finished_with(2), "the end of the raised budget")
        await until(lambda: idle_under(2), "the node to stand by again")
        check_ledger(run)
        await refuse_the_older_version(run, tmp_path)
        await orders_from_another_machine(run, coordinator, tmp_path)

        refused, _ = await command("run", "rotate", str(run.folder))
        assert refused == IdentityError.code, "not while it is served"
        old = Identity.load(RunFolder(run.folder).coordinator_key)
        assert await coordinator.end(signal.SIGTERM) == 0
        code, answer = await command("run", "rotate", str(run.folder))
        assert (code, answer["version"], answer["old"]) == (0, 7, old.public_key)
        upgrade_run(RunFolder(run.folder), {"samples_per_shard": 1600})
        coordinator = await Coordinator.start(run.folder, SETTINGS)
        await up(coordinator)
        await until(accepted_again, "the node to train on for the new key")
        assert (await node_says(tmp_path / "node"))["manifest_version"] == 8
        assert coordinator.status().coordinator == answer["new"]
        check_signatures(run, old, answer["ticket"])
        node = await killed_and_started_again(node, tmp_path / "node", answer["ticket"], coordinator)
        await ask(tmp_path / "node", "leave")
    finally:
        for process in (node, coordinator.process):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(node.wait(), 300) == 0
        assert await asyncio.wait_for(coordinator.process.wait(), 300) == 0


async def killed_and_started_again(
    node: asyncio.subprocess.Process, folder: Path, ticket: str, coordinator: Coordinator
) -> asyncio.subprocess.Process:
    """The unit goes on from what it had: what it trains afterwards is accepted, on top of what it had trained before."""

    async def training() -> bool:
        status = await node_says(folder)
        return (status["state"], status.get("device")) == ("training", UNIT) and bool(status["step"])

    await until(training, "the unit to train")
    family = children_of(node.pid)
    node.kill()
    await node.wait()
    await all_gone(family)
    trained = max([coordinator.status().accepted, *epochs_in(folder)])
    again = await start_node(ticket, folder, device=UNIT)

    async def trained_on() -> bool:
        assert again.returncode is None
        return coordinator.status().accepted > trained

    await until(trained_on, "an epoch that was trained after the kill", patience=UNIT_PATIENCE)
    return again


def epochs_in(state: Path) -> list[int]:
    """The whole checkpoints that a node has in its folder."""
    [work] = state.glob("runs/*/work")
    return [int(path.parent.name.removeprefix("epoch-")) for path in work.glob("0000/epoch-*/checkpoint.json")]


async def orders_from_another_machine(run: CreatedRun, coordinator: Coordinator, root: Path) -> None:
    """The owner has only the ticket and the key: the node hears of the pause and of its ban, and obeys at once."""
    key, stranger = root / "elsewhere" / "owner.key", root / "stranger.key"
    Identity.load(RunFolder(run.folder).owner_key).save(key)
    Identity.derived("mallory").save(stranger)
    node = root / "node"

    async def node_says_why(state: str, words: str) -> bool:
        status = await node_says(node)
        return status["state"] == state and words in status["reason"]

    async def paused_in_the_status() -> bool:
        paused = coordinator.status().paused
        return paused is not None and paused.text == "moving house"

    code, answer = await command("run", "pause", run.ticket, "--reason", "moving house", "--owner-key", str(key))
    assert (code, answer["version"], answer["order"]) == (0, 3, "pause")
    await until(lambda: node_says_why("idle", "paused by its owner: moving house"), "the node to say why it stands by")
    await until(paused_in_the_status, "the status to name the pause")
    with pytest.raises(AuthorisationError, match="another owner"):
        await asyncio.to_thread(send_next, run.ticket, lambda old: ordered(old, Order("resume"), time.time()), stranger, 20.0)
    peer = Identity.load(node / "identity.key").public_key
    order_run(RunFolder(run.folder), Order("ban", peer, "a test"))
    await until(lambda: node_says_why("paused", "the run's owner has banned this node: a test"), "the node to hear of its ban")

    async def banned_in_the_status() -> bool:
        return [ban.owner for ban in coordinator.status().banned] == [peer]

    await until(banned_in_the_status, "the status to name the ban")
    await asyncio.to_thread(send_next, run.ticket, lambda old: ordered(old, Order("unban", peer), time.time()), key, 20.0)
    await until(lambda: node_says_why("idle", "paused by its owner"), "the node to hear that its ban is lifted")
    code, answer = await command("run", "resume", str(run.folder))
    assert (code, answer["version"]) == (0, 6)
    await until(lambda: node_says_why("idle", "the run is complete"), "the node to go on")
    with contextlib.closing(Ledger.open(run.folder / "ledger.sqlite", run.run, to_read=True)) as ledger:
        told = [order for row in ledger.rows() if isinstance(event := row.event(), ManifestPublished) for order in event.orders]
    assert [order.order for order in told] == ["pause", "ban", "unban", "resume"]


def refusal(field: str) -> str:
    return f"{field} cannot change in a run, because all epochs of a lineage must mean the same; create a new run"


def check_ledger(run: CreatedRun) -> None:
    ledger = Ledger.open(run.folder / "ledger.sqlite", run.run)
    kinds = [row.event().kind for row in ledger.rows()]
    ledger.close()
    assert kinds.count("manifest-published") == 2
    assert kinds.count("coordinator-started") == 1, "the coordinator was not restarted"
    assert kinds.count("run-finished") == 2
    state = ledger.state
    assert (state.epochs, state.manifest_version, state.finished) == (2, 2, True)
    assert RunFolder(run.folder).version(1).exists(), "the version before is kept"


async def refuse_the_older_version(run: CreatedRun, root: Path) -> None:
    """Version 1 is put back by hand: the coordinator stays with version 2, and so does a node that has seen it."""
    folder = RunFolder(run.folder)
    newest = folder.manifest.read_bytes()
    visit = root / "visit"
    transport, signed = await join_swarm(
        Identity.derived("visitor"), Ticket.decode(run.ticket), listen="/ip4/127.0.0.1/tcp/0", state_folder=visit
    )
    await transport.close()
    assert signed.manifest.version == 2
    assert (visit / MANIFEST_FILE).read_bytes() == newest
    folder.manifest.write_bytes(folder.version(1).read_bytes())
    with pytest.raises(ConfigError, match=r"version 1, older than version 2 that the ledger has published"):
        await serve_run_beside(run.folder)
    folder.manifest.write_bytes(newest)


async def serve_run_beside(folder: Path) -> None:
    """A coordinator on a copy of this folder is refused; the running one holds the lock of its own folder."""
    from shutil import copytree, ignore_patterns

    copy = folder.with_name("copy")
    copytree(folder, copy, ignore=ignore_patterns("*.lock", "network"))
    await serve_run(copy)


def test_upgrade_by_another_key_is_refused(tmp_path: Path):
    run = make_run(tmp_path, shards=1)
    other_key = tmp_path / "other.key"
    Identity.derived("mallory").save(other_key)
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(AuthorisationError, match="another owner"):
        upgrade_run(RunFolder(run.folder), {"holdout_tolerance": 9.0}, other_key)
    with pytest.raises(ConfigError, match="no change is given"):
        upgrade_run(RunFolder(run.folder), {})
    assert (run.folder / "manifest.json").read_bytes() == before
