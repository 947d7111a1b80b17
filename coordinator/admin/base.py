"""The base of a run of adapters: taken from the owner's settings when the run is created, found again when it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import AdaptedExpert, RunSettings
from lutetia.models.experts.adapters.base_sources import check_files, find_base, missing_base, read_paths, write_paths
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError


def with_base(settings: RunSettings) -> tuple[RunSettings, dict[str, Path]]:
    """The settings with the adapted expert as the manifest describes it, and the files of its base; none without an adapter.

    Raises ConfigError when the base cannot be found or used.
    """
    expert = settings.expert
    if not isinstance(expert, AdaptedExpert):
        return settings, {}
    if settings.warm_start is not None:
        raise ConfigError("adapters start from their base; leave warm_start out, or train whole experts without expert.adapter")
    from lutetia.models.experts.adapters.describe import adapted, describe_base

    wanted = expert.adapter
    network, base, files = describe_base(
        wanted.base, wanted.dtype, wanted.serve, "transformer_2" if settings.part == "low" else "transformer"
    )
    spec = adapted(network, base, wanted.rank, wanted.alpha, wanted.targets, wanted.dora)
    spec = spec.model_copy(update={"prediction": expert.prediction, "noise_schedule": expert.noise_schedule})
    return settings.model_copy(update={"expert": ExpertSpec.model_validate(spec.model_dump())}), files


def keep_base(run: RunFolder, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Put the base's files into the blobs if they are to be served, and write down where they are. Raises DiskError."""
    if manifest.adapter is None:
        return
    if manifest.adapter.base.served:
        store = BlobStore(run.blobs)
        for path in files.values():
            store.add_file(path)
    else:
        write_paths(run.base, files)


def settle_base(run: RunFolder, manifest: Manifest, folder: Path | None) -> None:
    """Find the base before the run is served, and write down where it is for the worker processes.

    Raises ConfigError when it is not on this machine, or `folder` holds another.
    """
    if manifest.adapter is None:
        return
    base = manifest.adapter.base
    files = find_base(base, folder, BlobStore(run.blobs))
    if files is None:
        if not run.base.exists():
            raise missing_base(base)
        files = read_paths(run.base)
        check_files(base, files)
    write_paths(run.base, files)
