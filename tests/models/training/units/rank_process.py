"""Both ranks of a unit of two processors, one after another for each of RUNS: `rank_process.py FOLDER`. It prints losses.

It forks, so that the libraries are imported once. Each run trains two epochs of six steps; `again` goes on from a state that
`float32` wrote in its second epoch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.units.split import Split, joined
from lutetia.models.training.units.split_trainer import SplitTrainer
from lutetia.protocol.schema.capabilities import COMPACT, FIRST_FRAME
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs
from tests.models.tiny_experts import WAN, tiny_data, tiny_manifest

RUNS = ("float32", "again", "compact", "pictures")


def manifest_of(run: str) -> Manifest:
    """`pictures`: half of the clips are given their first frame."""
    if run == "pictures":
        expert = WAN.model_copy(update={"inputs": ExpertInputs(first_frame=0.5)})
        return tiny_manifest(expert=expert, needs=(FIRST_FRAME,))
    return tiny_manifest(checkpoints="compact", needs=(COMPACT,)) if run == "compact" else tiny_manifest()


def lead(trainer: SplitTrainer, name: str, folder: Path) -> None:
    while not (trainer.epoch == 1 and trainer.at_epoch_end):
        print(name, trainer.step(), flush=True)
        if trainer.at_epoch_end:
            snapshot = trainer.live_snapshot()
            write_weights(snapshot, folder / f"weights-{name}-{snapshot.epoch}")
            write_state(snapshot, folder / f"state-{name}-{snapshot.epoch}", ema=False)
        elif (trainer.epoch, trainer.step_in_epoch) == (1, 3):
            write_state(trainer.live_snapshot(), folder / f"local-{name}")
    trainer.end()


def train(split: Split, name: str, folder: Path) -> None:
    trainer = SplitTrainer(split, manifest_of(name), 1, tiny_data(), micro_batch=1)
    if name == "again":
        trainer.restore(1, local=folder / "local-float32")
    else:
        trainer.restore(0)
    if split.rank == 0:
        lead(trainer, name, folder)
    else:
        trainer.follow()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    follower = os.fork()
    rank = 0 if follower else 1
    for name in RUNS:
        with joined(rank, 2, folder / f"meeting-{name}", "cpu") as split:
            train(split, name, folder)
    if follower:
        assert os.waitpid(follower, 0)[1] == 0


if __name__ == "__main__":
    main()
