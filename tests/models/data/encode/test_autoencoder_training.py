"""Train an autoencoder on the user's clips: on frames of the split train only, and usable by a build."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lutetia.models.data.encode.autoencoder_training import train_autoencoder
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.system.errors import ConfigError, DataError, DiskError


def with_splits(folder: Path, tested: int) -> Path:
    """Drawn clips of which the last `tested` are held out and unreadable, so that opening them fails."""
    make_clips(folder, 60, 0, 4, 16)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "test" if number >= len(rows) - tested else "train"
        if row["split"] == "test":
            (folder / row["file_name"]).write_bytes(b"no video")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_training_uses_split_train_only_and_gives_latents(tmp_path: Path) -> None:
    clips = with_splits(tmp_path / "clips", 12)
    report = train_autoencoder(tmp_path / "ae", 0, steps=2, channels=5, size=32, clips=clips)
    assert report["steps"] == 2
    assert set(report["psnr_db"]) <= {"camera", "digit", "shape"}
    latents = load_latents(str(tmp_path / "ae"))
    assert latents.shape_of(3, 64, 64) == (5, 3, 8, 8)
    frames = np.zeros((1, 3, 64, 64, 3), np.uint8)
    assert latents.decode(latents.encode(frames)).shape == frames.shape
    mean, std = latents.shipped_statistics or ((), ())
    assert len(mean) == len(std) == 5


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", 3, 0, 4, 16)
    with pytest.raises(DataError, match=r"too few for an autoencoder"):
        train_autoencoder(tmp_path / "ae", 0, steps=2, clips=tmp_path / "clips")
    assert not (tmp_path / "ae").exists()


def test_scale_four_gives_larger_latents(tmp_path: Path) -> None:
    train_autoencoder(tmp_path / "ae", 0, steps=2, channels=3, scale=4, size=32, clips=with_splits(tmp_path / "clips", 12))
    assert load_latents(str(tmp_path / "ae")).shape_of(5, 32, 32) == (3, 5, 8, 8)


def test_size_that_is_no_multiple_of_eight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a multiple of 8"):
        train_autoencoder(tmp_path / "ae", 0, steps=2, size=36)


def test_existing_output_is_never_overwritten(tmp_path: Path) -> None:
    """It is refused before the training: `clips`, which do not exist, are not read."""
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "config.json").write_text("mine")
    file.write_text("mine")
    for out in (used, file):
        with pytest.raises(DataError, match="name a new folder"):
            train_autoencoder(out, 0, steps=1, size=16, clips=tmp_path / "nowhere")
    with pytest.raises(DiskError, match="a file is where a folder should be"):
        train_autoencoder(file / "x", 0, steps=1, size=16, clips=tmp_path / "nowhere")
    assert (used / "config.json").read_text() == file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "used"]


def test_output_folder_may_be_empty_or_new(tmp_path: Path) -> None:
    empty, clips = tmp_path / "empty", with_splits(tmp_path / "clips", 12)
    empty.mkdir()
    train_autoencoder(empty, 0, steps=1, size=16, clips=clips)
    train_autoencoder(tmp_path / "new" / "ae", 0, steps=1, size=16, clips=clips)
    kept = [sorted(path.name for path in folder.iterdir()) for folder in (empty, tmp_path / "new" / "ae")]
    assert kept == [["config.json", "diffusion_pytorch_model.safetensors"]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "empty", "new"]
    assert empty.stat().st_mode & 0o777 == 0o755
