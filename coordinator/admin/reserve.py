"""`coordinator reserve`: split the held-out clips of a run into files that may be given to strangers, one for each check."""

from __future__ import annotations

import secrets
from pathlib import Path

from lutetia.coordinator.holdouts import holdout_store
from lutetia.coordinator.lending.reserve import Reserve, read_reserve
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import ConfigError
from lutetia.system.files import write_atomic


def draw_reserve(root: Path, clips: int) -> Reserve:
    """Draw the reserve of the run in `root`, once. The order of the clips is random and stays on this machine.

    Args:
        root: the run's folder.
        clips: held-out clips for each check.

    Raises ConfigError: no run there, a reserve exists, or a shard has fewer held-out clips than a check takes.
    """
    from lutetia.models.data.parts.index import part_path, parts_of
    from lutetia.models.data.parts.reader import load_shard
    from lutetia.models.data.parts.writer import write_shard

    folder = RunFolder(root)
    manifest = folder.read_manifest(now=0.0).manifest
    with folder.locked():
        if read_reserve(folder):
            raise ConfigError(f"{folder.reserve} exists: the reserve of a run is drawn once, so that no clip is given twice")
        if small := [shard for shard in manifest.shards if shard.holdout_clips < clips]:
            raise ConfigError(
                f"shard {small[0].index} has {small[0].holdout_clips} held-out clips; take --clips {clips} or fewer"
            )
        store, shards = holdout_store(folder), list[tuple[BlobRef, ...]]()
        for shard in manifest.shards:
            data = load_shard(store.path(shard.holdout.digest), manifest.latent)
            order = list(range(len(data)))
            secrets.SystemRandom().shuffle(order)
            files = []
            for start in range(0, len(order) - clips + 1, clips):
                index = folder.root / "reserve.part.safetensors"
                picked = data.take(order[start : start + clips])
                write_shard(index, picked, manifest.latent, name=shard.name, split="holdout")
                for number, part in enumerate(parts_of(index)):
                    store.add_file(part_path(index, number, part.blob), move=True)
                files.append(store.add_file(index, move=True))
                index.with_suffix("").rmdir()
            shards.append(tuple(files))
        reserve = Reserve(clips=clips, shards=tuple(shards))
        write_atomic(folder.reserve, canonical(reserve))
    return reserve
