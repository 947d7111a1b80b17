"""`lutetia init --from`: the settings file names the pipeline, and data and run are made of it."""

from __future__ import annotations

from pathlib import Path

from lutetia.cli.arguments import read_config, settings_of
from lutetia.cli.init.run import write_settings
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.sources.data_settings import with_pipeline
from tests.pipelines.tiny_clips import write_clips
from tests.pipelines.tiny_pipelines import pipeline_folder


def test_init_from_a_pipeline_proposes_clips_that_it_takes(tmp_path: Path) -> None:
    clips, file = write_clips(tmp_path / "clips", count=8), tmp_path / "lutetia.toml"
    report = write_settings(clips, file, lambda *_: None, str(pipeline_folder("ltx")))
    data = settings_of(BuildSettings, "file", read_config(file, "data"))
    run = settings_of(RunSettings, "file", read_config(file, "run"))
    assert data.pipeline == run.pipeline == str(pipeline_folder("ltx"))
    assert (data.frames, report.data.frames) == (9, 9), "LTX takes 4n + 1 frames here, not 8"
    found, text, _ = with_pipeline(data)
    assert text is not None
    assert found.text_tokens == 128
    write_settings(clips, tmp_path / "other.toml", lambda *_: None, str(pipeline_folder("wan22-a14b")))
    assert settings_of(RunSettings, "file", read_config(tmp_path / "other.toml", "run")).part == "high"
