"""A trainer for the kill test: writes its local state after every step, prints the samples done, and resumes from that state."""

import sys
from pathlib import Path

import torch

from lutetia.models.training.trainer import ExpertTrainer, write_state, write_weights
from tests.models.tiny_experts import tiny_data, tiny_manifest

torch.set_num_threads(1)
folder, optimizer, micro_batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
manifest = tiny_manifest(optimisation={"optimizer": optimizer})
trainer = ExpertTrainer(manifest, 1, tiny_data(), micro_batch=micro_batch)
local = folder / "local.safetensors"
if local.exists():
    trainer.restore(int((folder / "epoch").read_text()), local=local)
while trainer.samples < manifest.samples_per_shard:
    trainer.step()
    snapshot = trainer.snapshot()
    write_state(snapshot, local)
    (folder / "epoch").write_text(str(snapshot.epoch))
    print(trainer.samples, flush=True)
write_weights(trainer.snapshot(), folder / "weights.safetensors")
