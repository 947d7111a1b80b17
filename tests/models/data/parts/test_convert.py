"""Data of release 0.1 are refused with the command that converts them, and keep their clips, texts and order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lutetia.cli.main import app
from lutetia.models.data.description import read_data
from lutetia.models.data.parts.convert import convert
from lutetia.models.data.parts.reader import PartedShard, load_shard, open_shard
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.system.errors import DataError, IntegrityError
from tests.coordinator.tiny_data import build_tiny, clips
from tests.models.data.old_format import write_old_shard


def old_data(folder: Path) -> Path:
    """The folder of `build_tiny` as release 0.1 wrote it."""
    description = read_data(build_tiny(folder))
    document = json.loads((folder / "data.json").read_bytes()) | {"format": "lutetia-data-1"}
    for shard in document["shards"]:
        for split in ("train", "holdout"):
            path = folder / shard[split]["path"]
            for part in path.with_suffix("").iterdir():
                part.unlink()
            path.with_suffix("").rmdir()
            data = clips(shard["index"], shard[split]["clips"], len(split))
            write_old_shard(path, data, description.latent, shard["name"], split, tuple(f"{n:064x}" for n in range(len(data))))
            shard[split] = {**shard[split], "blob": ChunkTable.of_file(path).ref.model_dump(mode="json")}
            del shard[split]["bytes"]
    (folder / "data.json").write_text(json.dumps(document))
    (folder / "clips.jsonl").write_text("{}\n")
    (folder / "sheets").mkdir()
    (folder / "sheets" / "000.png").write_bytes(b"a sheet")
    return folder


def test_old_data_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    old, new = old_data(tmp_path / "old"), tmp_path / "new"
    with pytest.raises(DataError, match=rf"built by release 0.1; convert it: lutetia data convert {old} NEW_FOLDER"):
        read_data(old)
    result = CliRunner().invoke(app, ["data", "convert", str(old), str(new)])
    assert result.exit_code == 0, result.output
    description = read_data(new)
    for shard in description.shards:
        for file in (shard.train, shard.holdout):
            before, after = (load_shard(folder / file.path, description.latent) for folder in (old, new))
            assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("latents", "tokens", "pooled"))
            assert (before.captions, before.kinds) == (after.captions, after.kinds)
            converted = open_shard(new / file.path, description.latent)
            assert isinstance(converted, PartedShard)
            assert converted.metadata(0).sources[1] == f"{1:064x}"
    assert (new / "clips.jsonl").read_text() == "{}\n"
    assert (new / "sheets" / "000.png").read_bytes() == b"a sheet"


def test_data_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    old = old_data(tmp_path / "old")
    document = json.loads((old / "data.json").read_bytes())
    with pytest.raises(DataError, match="was not built by release 0.1"):
        convert(build_tiny(tmp_path / "today"), tmp_path / "new")
    with pytest.raises(DataError, match=r"holds no readable data.json"):
        convert(tmp_path, tmp_path / "new")
    document["shards"][0]["train"]["path"] = "shards/../../000.train.safetensors"
    (old / "data.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"data.json cannot be read \(path"):
        convert(old, tmp_path / "new")
    document["shards"][0]["train"]["path"] = "shards/001.train.safetensors"
    (old / "data.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="has changed since it was built"):
        convert(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()
