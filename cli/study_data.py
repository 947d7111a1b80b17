"""What a study trains on: latents by an autoencoder of its own, and shards by every way of clustering."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..protocol.canonical import canonical
from ..system.files import write_atomic

if TYPE_CHECKING:
    from ..models.data.build import BuildSettings
    from ..models.study.config import StudyConfig
    from ..models.study.plan import Training

Progress = Callable[[str, int, int], None]


def latents(config: StudyConfig, clips: Path, cache: Path, on_progress: Progress) -> tuple[str, dict[str, float]]:
    """What makes the latents, and the PSNR in dB by kind of the study's own autoencoder, trained where the cache has none."""
    if config.autoencoder is None:
        return config.data.latents, {}
    size = min(config.data.height, config.data.width)
    wanted = {"clips": config.clips.model_dump(mode="json"), "tune": config.tune_share, "size": size,
              "as": config.autoencoder.model_dump()}  # fmt: skip
    folder = cache / f"autoencoder-{hashlib.sha256(canonical(wanted)).hexdigest()[:12]}"
    report = folder.with_suffix(".json")
    if not folder.is_dir():
        from ..models.data.stand_in import train_autoencoder

        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        found = train_autoencoder(
            part, **config.autoencoder.model_dump(), size=size, clips=clips,
            on_progress=lambda done, total, _: on_progress("autoencoder", done, total),
        )  # fmt: skip
        write_atomic(report, json.dumps(found, indent=1).encode())
        part.rename(folder)
    return str(folder), json.loads(report.read_bytes())["psnr_db"]


def build(clips: Path, target: Path, settings: BuildSettings, training: Training, on_progress: Progress) -> None:
    """The shards that `training` wants."""
    from ..models.data.build import build_data

    build_data(clips, target, settings.model_copy(update={"experts": training.experts, "method": training.method}), on_progress)


def balanced(clustered: Path, target: Path) -> None:
    """One shard of all clusters, each met equally often."""
    from ..models.data.balance import balance

    balance(clustered, target)
