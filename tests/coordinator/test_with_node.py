"""One real coordinator and one real node, each a process of its own, train a tiny run to its end over loopback."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.ledger.describe import read_events, tell
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import TINY, AdaptedExpert, AdapterSettings, tiny_expert
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.experts.families import build_expert
from lutetia.models.mixing.description import verify_mixture
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from tests.child_environment import child_environment
from tests.coordinator.scripted_node import Coordinator, free_port, until
from tests.coordinator.test_serve import make_run, up
from tests.coordinator.tiny_data import latent_spec
from tests.pipelines.made_pipeline import apart, draw_mixture, draw_stock, stitched
from tests.pipelines.tiny_clips import build, run_settings, write_clips

SAMPLED = TINY["sampling"]


async def start_node(
    ticket: str, folder: Path, threads: int = 1, device: str = "cpu", **environment: str
) -> asyncio.subprocess.Process:
    arguments = ["join", ticket, "--state-folder", str(folder), "--listen", "/ip4/127.0.0.1/tcp/0", "--device", device]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lutetia.cli", *arguments, "--threads", str(threads), start_new_session=True,
        env=child_environment(OMP_NUM_THREADS=str(threads), **environment),
    )  # fmt: skip


async def run_to_its_end(run: CreatedRun, folder: Path) -> tuple[Coordinator, set[str]]:
    """A coordinator that exits with its run, and one node; also returns every health that the status showed for the node."""
    coordinator = await Coordinator.start(run.folder, json.dumps({"exit_when_done": True, "stitch": "end"}))
    await up(coordinator)
    node = await start_node(run.ticket, folder)
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
    return coordinator, healths


@pytest.mark.timeout(900)
async def test_a_node_and_a_coordinator_finish_a_run(tmp_path: Path):
    """Of adapters, whose base the node fetches from the coordinator. One shard has no router, so the test is short."""
    build_expert(tiny_expert(latent_spec()), 7).save_pretrained(tmp_path / "given")  # pyright: ignore[reportCallIssue]
    adapter = AdapterSettings(base=str(tmp_path / "given"), rank=2, alpha=2.0, dtype="fp8", serve=True)
    audit = AuditPolicy(whole_epoch=1.0)
    run = make_run(tmp_path, shards=1, expert=AdaptedExpert(adapter=adapter), audit=audit, sampling=SAMPLED)
    shutil.rmtree(tmp_path / "given")
    coordinator, healths = await run_to_its_end(run, tmp_path / "node")
    status = coordinator.status()
    assert status.finished
    assert status.accepted == 2
    # which of them is seen depends on timing: on a fast machine one is over before the status is written again
    assert healths <= {"starting", "working", "standby"}, "never offline, never called idle while it worked"
    assert [(peer.accepted, peer.rejected, peer.health) for peer in status.nodes] == [(2, 0, "standby")], "its shard is done"
    mixture = verify_mixture(run.folder / "mixture", run.manifest.coordinators)
    assert mixture.digest == status.mixture
    assert mixture.network == run.manifest.expert
    assert {path.name for path in (run.folder / "mixture" / "expert_000").iterdir()} == {"pytorch_lora_weights.safetensors"}
    assert (run.folder / "gallery" / "000.gif").exists(), "sampled from the adapters"
    weights, adapted = BlobStore(tmp_path / "node" / "blobs"), run.manifest.expert.adapter
    assert adapted is not None
    assert all(weights.has(ref.digest) for ref in adapted.base.files.values()), "the node fetched the base"
    kinds = [event.kind for event in read_events(run.folder)]
    assert kinds[-1] == "coordinator-stopped"
    assert kinds.count("checkpoint-accepted") == 2
    outcomes = [event.outcome for event in read_events(run.folder) if event.kind == "audit-done"]
    assert outcomes == ["valid"] * 2, "\n".join(tell(run.folder))


@pytest.mark.timeout(900)
async def test_run_from_a_pipeline_is_checked_audited_and_stitched(tmp_path: Path):
    """Its experts start from the pipeline's weights and learn to continue pictures, as that pipeline does."""
    build("ltx-i2v", write_clips(tmp_path / "clips"), tmp_path)
    short = {"addresses": (f"127.0.0.1:{free_port()}",), "samples_per_shard": 8, "audit": AuditPolicy(whole_epoch=1.0)}
    run = create_run(tmp_path / "data", tmp_path / "run", run_settings("ltx-i2v", preset="tiny", **short))
    coordinator, _ = await run_to_its_end(run, tmp_path / "node")
    assert coordinator.status().accepted == 2
    history, events = "\n".join(tell(run.folder)), list(read_events(run.folder))
    assert [event.outcome for event in events if event.kind == "audit-done"] == ["valid"] * 2, history
    first = next(event for event in events if event.kind == "checkpoint-accepted")
    init = run.manifest.expert.init
    assert init is not None
    secret = Identity.load(RunFolder(run.folder).coordinator_key).secret_for("held-out draws")
    draw = Holdouts(BlobStore(run.folder / "holdouts"), secret).draw(first.acceptance.checkpoint)
    holdout = open_shard(tmp_path / "data" / "shards" / "000.holdout.safetensors", run.manifest.latent)
    before = [
        holdout_loss(run.manifest, 0, weights, holdout, draw=draw).loss
        for weights in (BlobStore(run.folder / "blobs").path(init.digest), None)
    ]
    assert first.parent_loss == pytest.approx(before[0], rel=1e-5), "compared with the pipeline's weights"
    assert abs(before[0] - before[1]) > 1e-3, "which are others than the seeded ones"
    made = stitched("ltx-i2v", tmp_path, run.manifest, run.folder / "mixture")
    theirs = draw_stock(made)
    assert apart(draw_mixture(made), theirs) < 1e-5
    assert apart(draw_stock(made, made.mixture.transformer), theirs) < 1e-5
