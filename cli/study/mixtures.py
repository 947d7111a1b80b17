"""Mixtures of a finished training: from its accepted checkpoints at any epoch, or with a router that does not see the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.system.errors import IntegrityError
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.models.study.trainings import Reading, Training
    from lutetia.protocol.schema.manifest import Manifest


def mixture_of(reading: Reading, training: Training, folder: Path) -> Path:
    """The folder of the mixture that `reading` samples, stitched on first use below `folder`, that of the training."""
    if reading.route == "text-blind":
        return _blind(folder / "run", folder / "mixtures" / "text-blind", training)
    return mixture_at(reading.epoch, training, folder)


def mixture_at(epoch: int, training: Training, folder: Path) -> Path:
    """The folder of the mixture of `training` at `epoch`, stitched on first use."""
    run = folder / "run"
    if epoch == training.epochs:
        return run / "mixture"
    target = folder / "mixtures" / f"epoch-{epoch}"
    if not (target / "mixture.json").is_file():
        from lutetia.models.mixing.stitch import stitch

        manifest = _manifest(run)
        stitch(target, manifest, weights_at(run, manifest, epoch), _router(run) if training.experts > 1 else None)
    return target


def weights_at(run: Path, manifest: Manifest, epoch: int) -> list[Path]:
    """The files of the accepted weights of every shard at `epoch`. Raises IntegrityError if the ledger has none of a shard."""
    from lutetia.coordinator.ledger.describe import read_events
    from lutetia.protocol.blobs.store import BlobStore

    digests = {}
    for event in read_events(run):
        if event.kind == "checkpoint-accepted" and event.acceptance.epoch == epoch:
            digests[event.acceptance.shard] = event.acceptance.weights.digest
    missing = [shard.index for shard in manifest.shards if shard.index not in digests]
    if missing:
        raise IntegrityError(
            f"the ledger of {run} has no accepted epoch {epoch} of shard {missing[0]}; remove the run and train it again"
        )
    store = BlobStore(run / "blobs")
    return [store.path(digests[shard.index]) for shard in manifest.shards]


def accepted_losses(run: Path) -> dict[int, list[tuple[int, float]]]:
    """Shard to (epoch, held-out loss on that shard), as the coordinator measured them."""
    from lutetia.coordinator.ledger.describe import read_events

    losses: dict[int, dict[int, float]] = {}
    for event in read_events(run):
        if event.kind == "checkpoint-accepted":
            losses.setdefault(event.acceptance.shard, {})[event.acceptance.epoch] = event.acceptance.holdout_loss
    return {shard: sorted(points.items()) for shard, points in losses.items()}


def router_figures(run: Path) -> dict[str, object] | None:
    """Accuracy, accuracy by timestep and calibration error of the router of the run; None for a monolith."""
    from lutetia.coordinator.ledger.describe import read_events

    trained = [event for event in read_events(run) if event.kind == "router-trained"]
    if not trained:
        return None
    last = trained[-1]
    return {
        "accuracy": last.accuracy,
        "accuracy_by_time": list(last.accuracy_by_time),
        "calibration_error": last.calibration_error,
    }


def _blind(run: Path, target: Path, training: Training) -> Path:
    """The mixture of the same experts with a router of the same size that sees only the noisy clip and its time."""
    if (target / "mixture.json").is_file():
        return target
    from lutetia.coordinator.holdouts import data_files, holdout_files
    from lutetia.coordinator.run_folder import RunFolder
    from lutetia.models.data.parts.reader import open_shard
    from lutetia.models.mixing.router_training import train_router
    from lutetia.models.mixing.stitch import stitch

    manifest = _manifest(run)
    blind = manifest.model_copy(update={"router": manifest.router.model_copy(update={"text_conditioned": False})})
    files = data_files(RunFolder(run), manifest), holdout_files(RunFolder(run), manifest)
    shards, holdouts = ([open_shard(path, manifest.latent) for path in split] for split in files)
    router, report = train_router(blind, shards, seed=0, holdouts=holdouts)
    figures = {
        "accuracy": report.accuracy,
        "accuracy_by_time": list(report.accuracy_by_time),
        "calibration_error": report.ece,
    }
    write_atomic(target.with_name("text-blind.json"), json.dumps(figures).encode())
    stitch(target, blind, weights_at(run, manifest, training.epochs), router)
    return target


def _manifest(run: Path) -> Manifest:
    from lutetia.coordinator.run_folder import RunFolder

    return RunFolder(run).read_manifest(now=0.0).manifest


def _router(run: Path) -> Path:
    """The file of the router of the run."""
    from lutetia.coordinator.ledger.describe import read_events
    from lutetia.protocol.blobs.store import BlobStore

    trained = [event.router.digest for event in read_events(run) if event.kind == "router-trained"]
    if not trained:
        raise IntegrityError(f"the ledger of {run} has no router; remove the run and train it again")
    return BlobStore(run / "blobs").path(trained[-1])
