"""A coordinator without a worker process and real nodes finish a run: nodes check, replay, route, evaluate and sample."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.settings import RunSettings
from lutetia.models.mixing.description import verify_mixture
from lutetia.models.pipeline import load_pipeline
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from tests.coordinator.scripted_node import Coordinator, free_port, until
from tests.coordinator.test_serve import up
from tests.coordinator.test_with_node import start_node
from tests.coordinator.tiny_data import build_tiny

SHARDS, CHECKERS = 2, 2
MOST_BYTES = 300 << 20


def named_identity(folder: Path) -> Identity:
    """The key of a node that has not started yet."""
    folder.mkdir()
    identity = Identity.generate()
    identity.save(folder / "identity.key")
    return identity


@pytest.mark.timeout(900)
async def test_a_run_whose_coordinator_computes_nothing_finishes(tmp_path: Path):
    settings = RunSettings(
        preset="tiny", name="lean", addresses=(f"127.0.0.1:{free_port()}",), samples_per_shard=8,
        sampling=SamplingSpec(steps=2, prompts=("red square goes left",)),
    )  # fmt: skip
    run = create_run(build_tiny(tmp_path / "data", SHARDS, holdout=8), tmp_path / "run", settings)
    folders = [tmp_path / f"node {number}" for number in range(SHARDS + CHECKERS)]
    keys = [named_identity(folder).public_key for folder in folders]
    options = {"lend_checks": True, "stitch": "end", "exit_when_done": True, "checkers": keys}
    coordinator = await Coordinator.start(run.folder, json.dumps(options))
    nodes: list[asyncio.subprocess.Process] = []
    largest, children = [0], set[str]()

    async def ended() -> bool:
        for process in coordinator.family():
            try:
                command = " ".join(process.cmdline())
                children.add("p2pd" if "p2pd" in command else "worker" if "coordinator.worker" in command else "other")
                if "p2pd" not in command:
                    largest[0] = max(largest[0], process.memory_info().rss)
            except psutil.Error:
                pass
        return coordinator.process.returncode is not None

    try:
        await up(coordinator)
        nodes += [await start_node(run.ticket, folder) for folder in folders]
        await until(ended, "the coordinator to end by itself")
    finally:
        for process in (*nodes, coordinator.process):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(asyncio.wait_for(process.wait(), 300) for process in (*nodes, coordinator.process)))
    history, status = "\n".join(tell(run.folder)), coordinator.status()
    assert coordinator.process.returncode == 0, history
    assert (status.finished, status.accepted, status.rejected) == (True, SHARDS, 0), history
    assert "worker" not in children
    assert largest[0] < MOST_BYTES, f"{largest[0] >> 20} MiB"
    outcomes = [event.outcome for event in read_events(run.folder) if event.kind == "audit-done"]
    assert outcomes == ["valid"] * SHARDS, history
    mixture = verify_mixture(run.folder / "mixture", run.manifest.coordinators)
    assert mixture.digest == status.mixture
    assert mixture.routing, history
    assert mixture.routing.rows >= 8, "two nodes have measured it on held-out clips"
    gallery = json.loads((run.folder / "gallery" / "gallery.json").read_text())
    assert gallery["mixture"] == mixture.digest
    assert [clip["prompt"] for clip in gallery["clips"]] == ["red square goes left"]
    assert (run.folder / "gallery" / gallery["clips"][0]["file"]).read_bytes().startswith(b"GIF89a")
    [real] = json.loads((run.folder / "galleries" / "real" / "gallery.json").read_text())["clips"]
    assert real["shard"] in range(SHARDS)
    frames = load_pipeline(run.folder / "mixture")(["red square goes left"], seed=0, return_dict=False)[0]
    assert frames.shape[0] == 1, "a mixture that was put together without torch loads as any other"
