"""After a power loss at any moment of training, checkpoints are complete and the newest local state can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from lutetia.node.trainer.checkpoint_folder import FILES, CheckpointFolder
from lutetia.protocol.blobs.chunk_table import ChunkTable
from tests.node.tiny_run import make_run
from tests.protocol.power_loss import every_power_loss, needs_strace, record

STEPS = 3
TRAIN = """
import sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder
from lutetia.node.trainer.checkpoint_writer import CheckpointWriter
from lutetia.protocol.schema.manifest import SignedManifest
root, run = Path(sys.argv[1]), Path(sys.argv[2])
manifest = SignedManifest.model_validate_json((run / "manifest.json").read_bytes()).manifest
trainer = ExpertTrainer(manifest, 0, load_shard(run / "0.train.safetensors", manifest.latent))
written = threading.Event()
def send(report):
    if report.say == "saved":
        print("@saved", report.epoch, report.step, flush=True)
    elif report.say == "checkpoint":
        print("@checkpoint", report.kept.epoch, flush=True)
    written.set()
writer = CheckpointWriter(CheckpointFolder(root / "work", manifest.run_id, 0), None, send)
def write(whole):
    written.clear()
    assert writer.submit(trainer.snapshot(), whole=whole)
    assert written.wait(60)
for step in range(1, 7):
    trainer.step()
    write(step % 3 == 0)
assert writer.close()
"""


@needs_strace
@pytest.mark.timeout(900)
def test_power_loss_at_any_moment_loses_no_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=2, steps=STEPS, batch=2)

    def check(folder: Path, marks: list[str]) -> None:
        work = CheckpointFolder(folder / "work", run.manifest.run_id, 0)
        kept = work.kept()
        for item in kept:
            for name, ref in zip(FILES, item.refs, strict=True):
                assert ChunkTable.of_file(work.epoch_folder(item.epoch) / f"{name}.safetensors").ref == ref, f"incomplete {name}"
        places = [item.epoch * STEPS for item in kept]
        if local := work.local():
            assert loads(work.path / local.file), f"{local.file} is named and cannot be loaded"
            places.append(local.epoch * STEPS + local.step)
        assert max(places, default=0) >= max(map(reported, marks), default=0), "a state reported as saved is gone"
        work.sweep()

    calls = record(TRAIN, tmp_path / "root", str(run.folder))
    assert every_power_loss(calls, tmp_path / "root", tmp_path / "disks", check) > 100


def reported(mark: str) -> int:
    """Steps that the trainer has reported as saved."""
    words = mark.split()
    return int(words[1]) * STEPS + (int(words[2]) if words[0] == "saved" else 0)


def loads(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 (not a dictionary)
    except SafetensorError:
        return False
