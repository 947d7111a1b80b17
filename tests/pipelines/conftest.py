"""Each tiny pipeline goes the whole way once: data build, run create, an epoch of training, stitch, load."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.models.mixing.stitch import stitch
from tests.pipelines.made_pipeline import Made, stitched, train
from tests.pipelines.tiny_clips import build, create, create_by_command, write_clips
from tests.pipelines.tiny_pipelines import PIPELINES


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session", params=sorted(PIPELINES))
def made(request: pytest.FixtureRequest, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    build(name, clips, folder)
    if name == "wan22-ti2v":
        manifest = create_by_command(name, folder / "data", folder / "run", "--first-frame", "0.5")
    else:
        manifest = create(name, folder).manifest
    train(manifest, folder)
    stitch(folder / "mixture", manifest, [folder / "weights.safetensors"], None)
    return stitched(name, folder, manifest, folder / "mixture")
