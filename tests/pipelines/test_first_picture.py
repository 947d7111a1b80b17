"""Which pipelines begin clips with a picture, and whose autoencoders allow it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.description import DATA_FILE, read_data
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.sources.pipeline import open_pipeline
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import FIRST_FRAME
from lutetia.system.errors import ConfigError
from tests.coordinator.tiny_data import build_tiny
from tests.pipelines.tiny_clips import build_settings
from tests.pipelines.tiny_pipelines import pipeline_folder

TINY = RunSettings(preset="tiny", addresses=("127.0.0.1:41777",))


@pytest.mark.parametrize(
    ("name", "alone"),
    [("wan21", True), ("wan22-ti2v", True), ("ltx", True), ("mochi", True), ("cogvideox-2b", False), ("hunyuan", False)],
)
def test_first_latent_frame_is_that_of_the_picture_alone(name: str, alone: bool, tmp_path: Path) -> None:
    """Bit by bit; of Mochi, whose experts take no pictures, but for rounding."""
    settings, latents = build_settings(name, tmp_path), load_latents(str(pipeline_folder(name) / "vae"))
    shape = (1, 3, settings.frames, settings.height, settings.width)
    clip = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
    first, picture = latents.encode_pictures(clip)[:, :, :1], latents.encode_pictures(clip[:, :, :1])
    assert latents.begins_with_picture == alone
    apart = ((first - picture).norm() / picture.norm()).item()
    assert apart < 1e-5 if alone else apart > 1e-3
    assert torch.equal(first, picture) or name not in ("wan21", "wan22-ti2v", "ltx")


def test_image_to_video_pipelines_are_trained_with_pictures_unless_the_run_says_otherwise() -> None:
    shares = {name: open_pipeline(str(pipeline_folder(name))).expert(8).first_frame for name in ("wan22-i2v", "ltx-i2v")}
    assert shares == {"wan22-i2v": 0.9, "ltx-i2v": 0.9}
    assert open_pipeline(str(pipeline_folder("wan22-ti2v"))).expert(8).first_frame is None


def test_run_with_first_frames_on_an_autoencoder_that_mixes_frames_is_refused(tmp_path: Path) -> None:
    data, settings = build_tiny(tmp_path / "data"), TINY.model_copy(update={"first_frame": 0.5})
    manifest = create_run(data, tmp_path / "run", settings).manifest
    assert (manifest.expert.first_frame, FIRST_FRAME in manifest.needs) == (0.5, True)
    description = read_data(data)
    latent = description.latent.model_copy(update={"vae": str(pipeline_folder("cogvideox-2b") / "vae")})
    (data / DATA_FILE).write_bytes(canonical(description.model_copy(update={"latent": latent})))
    with pytest.raises(ConfigError, match="mix the first picture of a clip with later ones.*leave first_frame out, or build"):
        create_run(data, tmp_path / "other", settings)
    assert not (tmp_path / "other").exists()
    create_run(data, tmp_path / "other", TINY)
