"""Train the autoencoder of a study."""

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
    """The reference of the autoencoder, and kind to its PSNR in dB if it is the study's own.

    The study's own autoencoder is trained if the cache does not hold it.

    Args:
        config: the study.
        clips: folder of training clips.
        cache: folder that several studies can share.
        on_progress: called with stage, done and total.
    """
    if config.autoencoder is None:
        return config.data.latents, {}
    size = min(config.data.height, config.data.width)
    key = {"clips": config.clips.model_dump(mode="json"), "tune": config.tune_share, "size": size,
              "as": config.autoencoder.model_dump()}  # fmt: skip
    if config.clips.kind == "folder":  # its content may change; the metadata contain the digest of every file
        key["content"] = hashlib.sha256((clips / "metadata.jsonl").read_bytes()).hexdigest()
    folder = cache / f"autoencoder-{hashlib.sha256(canonical(key)).hexdigest()[:12]}"
    report = folder.with_suffix(".json")
    if not folder.is_dir():
        from lutetia.models.data.encode.autoencoder_training import train_autoencoder

        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        trained = train_autoencoder(
            part, **config.autoencoder.model_dump(), size=size, clips=clips,
            on_progress=lambda done, total, _: on_progress("autoencoder", done, total),
        )  # fmt: skip
        write_atomic(report, json.dumps(trained, indent=1).encode())
        part.rename(folder)
    return str(folder), json.loads(report.read_bytes())["psnr_db"]
