"""The autoencoder that a study trains for itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.protocol.schema.canonical import canonical
from lutetia.system.files import write_atomic

if TYPE_CHECKING:
    from lutetia.models.study.config import StudyConfig

Progress = Callable[[str, int, int], None]


def own_latents(config: StudyConfig, clips: Path, cache: Path, on_progress: Progress) -> tuple[str, dict[str, float]]:
    """What makes the latents, and the PSNR in dB by kind of the study's own autoencoder, trained where the cache has none."""
    if config.autoencoder is None:
        return config.data.latents, {}
    size = min(config.data.height, config.data.width)
    wanted = {"clips": config.clips.model_dump(mode="json"), "tune": config.tune_share, "size": size,
              "as": config.autoencoder.model_dump()}  # fmt: skip
    if config.clips.kind == "folder":  # whose content may have changed since; its metadata name every file by digest
        wanted["content"] = hashlib.sha256((clips / "metadata.jsonl").read_bytes()).hexdigest()
    folder = cache / f"autoencoder-{hashlib.sha256(canonical(wanted)).hexdigest()[:12]}"
    report = folder.with_suffix(".json")
    if not folder.is_dir():
        from lutetia.models.data.encode.autoencoder_training import train_autoencoder

        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        found = train_autoencoder(
            part, **config.autoencoder.model_dump(), size=size, clips=clips,
            on_progress=lambda done, total, _: on_progress("autoencoder", done, total),
        )  # fmt: skip
        write_atomic(report, json.dumps(found, indent=1).encode())
        part.rename(folder)
    return str(folder), json.loads(report.read_bytes())["psnr_db"]
