"""The results that lanes offer, trained for real before the coordinator starts: then only its own work is measured.

The merge is a function of its sources, so the epoch from which the lanes train next is known before the coordinator makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.toy_data import training_clips
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.lanes.merge import FILES, LaneFiles, merge_lanes
from lutetia.models.training.replay import made_with
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import CheckpointRecord


def author(lane: int) -> Identity:
    """Who trains a lane."""
    return Identity.derived(f"lane {lane}")


@dataclass
class Preparation:
    """Trains all lanes of one shard, epoch after epoch.

    Args:
        manifest: the run.
        store: where the files of all results are, to be served.
        folder: for files that are being written.
    """

    manifest: Manifest
    store: BlobStore
    folder: Path

    def epochs(self, count: int) -> Iterator[list[CheckpointRecord]]:
        """The results of each epoch, by lane; their addresses are still to be filled in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data, parent = training_clips(0), None
        trainers = [ExpertTrainer(self.manifest, 0, data, lane=lane) for lane in range(self.manifest.lanes)]
        for _ in range(count):
            results = [self._train(trainer, parent) for trainer in trainers]
            yield results
            parent = self._merged(results, parent) if self.manifest.team else results[0]

    def _train(self, trainer: ExpertTrainer, parent: CheckpointRecord | None) -> CheckpointRecord:
        if parent:
            trainer.restore(parent.epoch, self.store.path(parent.weights.digest), self.store.path(parent.state.digest))
        trainer.step()
        while not trainer.at_epoch_end:
            trainer.step()
        snapshot = trainer.snapshot()
        files = {name: self.folder / name for name in FILES}
        write_weights(snapshot, files["weights"])
        write_state(snapshot, files["state"], ema=False)
        write_tensors(files["trace"], {"trace": torch.tensor(snapshot.trace)})
        refs: dict[str, Any] = {name: self.store.add_file(path, move=True) for name, path in files.items()}
        owner, epoch = author(trainer.lane), snapshot.epoch
        return CheckpointRecord(
            run=self.manifest.run_id, owner=owner.public_key, issued=1.0, shard=0, epoch=epoch, parent=parent and parent.digest,
            **refs, samples=epoch * self.manifest.checkpoint_samples, loss=sum(snapshot.trace) / len(snapshot.trace),
            peer_id=owner.peer_id, made=made_with("cpu", snapshot.precision, snapshot.micro_batch), lane=trainer.lane,
        )  # fmt: skip

    def _merged(self, results: list[CheckpointRecord], parent: CheckpointRecord | None) -> CheckpointRecord:
        """The epoch that the coordinator will make of them, as it will name it."""
        batch = self.manifest.optimisation.batch
        lanes = [
            LaneFiles(
                result.lane, self.manifest.lane_steps(result.lane) * batch,
                *(self.store.path(ref.digest) for ref in (result.weights, result.state, result.trace)),
            )
            for result in results
        ]  # fmt: skip
        files = parent and (self.store.path(parent.weights.digest), self.store.path(parent.state.digest))
        merge_lanes(self.manifest, 0, results[0].epoch, lanes, self.folder, parent=files)
        refs = {name: self.store.add_file(self.folder / name, move=True) for name in FILES}
        return results[0].model_copy(update={**refs, "owner": self.manifest.coordinators[0], "lane": 0})
