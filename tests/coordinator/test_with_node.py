"""One real coordinator and one real node, each a process of its own, train a tiny run to its end over loopback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from lutetia.coordinator.story import read_events, tell
from lutetia.models.mixture_document import verify_mixture
from test_serve import make_run, up
from volunteer import Coordinator, until


async def start_node(ticket: str, folder: Path, threads: int = 1) -> asyncio.subprocess.Process:
    arguments = ["join", ticket, "--state-folder", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0", "--device", "cpu"]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lutetia.cli", *arguments, "--threads", str(threads), start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip


@pytest.mark.timeout(900)
async def test_a_node_and_a_coordinator_finish_a_run(tmp_path: Path):
    run = make_run(tmp_path, shards=1)  # no router either, so that the test is short
    coordinator = await Coordinator.start(run.folder, json.dumps({"exit_when_done": True, "stitch": "end"}))
    await up(coordinator)
    node = await start_node(run.ticket, tmp_path / "node")
    healths: set[str] = set()

    async def ended() -> bool:
        assert node.returncode is None or coordinator.process.returncode is not None, "the node ended before the run"
        if (run.folder / "status.json").exists():
            healths.update(entry.health for entry in coordinator.status().nodes)
        return coordinator.process.returncode is not None

    try:
        await until(ended, "the coordinator to end by itself")
    finally:
        for process in (node, coordinator.process):
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(node.wait(), 300)
        await asyncio.wait_for(coordinator.process.wait(), 300)
    assert coordinator.process.returncode == 0, "\n".join(tell(run.folder))
    status = coordinator.status()
    assert status.finished
    assert status.accepted == 2
    # which of them a look meets is chance: on a quick box one is over before the status is next written
    assert healths <= {"starting", "working", "standby"}, "never offline, never called idle while it worked"
    assert [(peer.accepted, peer.rejected, peer.health) for peer in status.nodes] == [(2, 0, "standby")], "its shard is done"
    assert verify_mixture(run.folder / "mixture", run.manifest.coordinators).digest == status.mixture
    kinds = [event.kind for event in read_events(run.folder)]
    assert kinds[-1] == "coordinator-stopped"
    assert kinds.count("checkpoint-accepted") == 2
