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
from lutetia.protocol.schema.manifest import Manifest
from tests.models.tiny_experts import tiny_data, tiny_manifest

RUNS = ("float32", "again", "compact")


def manifest_of(form: str) -> Manifest:
    return tiny_manifest(checkpoints=form, needs=("compact-checkpoints",) if form == "compact" else ())


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
    trainer = SplitTrainer(split, manifest_of("compact" if name == "compact" else "float32"), 1, tiny_data(), micro_batch=1)
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
