"""A tiny run with a worker process, and checkpoints with one thing wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.worker.client import WorkerClient
from lutetia.coordinator.worker.messages import (
    InspectFiles,
    LossMeasured,
    MeasureLoss,
)
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from tests.coordinator.tiny_data import clips

LIMIT = 120.0
"""Seconds for a job."""


@dataclass
class Site:
    """A tiny run, one trained epoch of each shard, and a running worker process."""

    run: RunFolder
    manifest: Manifest
    files: Path
    worker: WorkerClient

    def weights(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.weights.safetensors"

    def state(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.state.safetensors"

    def trace(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.trace.safetensors"

    def train(self, shard: int = 0) -> Path:
        return self._blob(self.manifest.shards[shard].train, self.run.blobs)

    def holdout(self, shard: int = 0) -> Path:
        return self._blob(self.manifest.shards[shard].holdout, self.run.holdouts)

    def _blob(self, ref: BlobRef, store: Path) -> Path:
        return store / ref.digest[:2] / ref.digest

    async def inspect(self, weights: Path, state: Path, trace: Path | None = None) -> None:
        job = InspectFiles(shard=0, epoch=1, weights=weights, state=state, trace=trace or self.trace())
        await self.worker.ask(job, limit=LIMIT)

    async def loss(self, weights: Path | None, draw: str = "one") -> LossMeasured:
        return await self.worker.ask(MeasureLoss(shard=0, weights=weights, holdout=self.holdout(), draw=draw), limit=LIMIT)


def train_epoch(manifest: Manifest, shard: int, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = ExpertTrainer(manifest, shard, clips(shard, 6, 5))
    while not trainer.at_epoch_end:
        trainer.step()
    snapshot = trainer.snapshot()
    write_weights(snapshot, folder / f"{shard}.weights.safetensors")
    write_state(snapshot, folder / f"{shard}.state.safetensors")
    write_tensors(folder / f"{shard}.trace.safetensors", {"trace": torch.tensor(snapshot.trace)})


def mutated(site: Site, kind: str, folder: Path) -> tuple[Path, Path]:
    """Weights and state with one thing wrong."""
    weights, state, metadata = load_file(site.weights()), load_file(site.state()), header_of(site.state())
    name = sorted(weights)[0]
    good = {key: value.clone() for key, value in weights.items()}
    match kind:
        case "missing":
            del good[name]
        case "extra":
            good["backdoor"] = torch.zeros(3)
        case "nan":
            good[name].view(-1)[0] = float("nan")
        case "infinite":
            good[name].view(-1)[0] = float("inf")
        case "huge":
            good[name] *= 1e6
        case "shape":
            good[name] = good[name].reshape(-1)[:-1].clone()
        case "dtype":
            good[name] = good[name].double()
        case "state of another epoch":
            place = json.loads(metadata["lutetia"])
            metadata["lutetia"] = json.dumps({**place, "epoch": 2, "samples": 2 * place["samples"]})
        case "a sample too many":
            place = json.loads(metadata["lutetia"])
            metadata["lutetia"] = json.dumps({**place, "samples": place["samples"] + 1})
        case "no number of samples":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "samples": "x"})
        case "no micro-batch":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "micro_batch": 0})
        case "no moments":
            state = {key: tensor for key, tensor in state.items() if not key.startswith(("adamw.", "muon."))}
        case "state of another shard":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "shard": 1})
        case "other averages":
            state["ema." + name] = state["ema." + name] + 1e-3
        case "nan in state":
            state["param." + name].view(-1)[0] = float("nan")
        case "empty state":
            state = {}
    save_file(good, folder / "w.safetensors", metadata={"format": "pt"})
    save_file(state, folder / "s.safetensors", metadata=metadata)
    return folder / "w.safetensors", folder / "s.safetensors"


def header_of(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
