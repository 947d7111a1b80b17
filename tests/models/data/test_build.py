"""Builds from real mp4 files: shards, held-out clips, test split, cache, interruption and refused input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lutetia.models.data.build import BuildReport, build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.cluster.balance import balance
from lutetia.models.data.description import read_data
from lutetia.models.data.encode.latents import demo_autoencoder, load_latents
from lutetia.models.data.output import output_folder
from lutetia.models.data.parts.reader import PartedShard, load_shard, open_shard
from lutetia.models.networks.model_ref import anchored
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.system.errors import ConfigError, DataError, LutetiaError
from tests.models.data.build_process import SMALL
from tests.models.data.clip_files import look, make_folder, write_rows, write_video

COUNTS = {"ball": 30, "bars": 24, "noise": 18}
TEST_CLIPS = (0, 1, 30, 31, 54)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("clips"), COUNTS, TEST_CLIPS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(clips: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build_data(clips, tmp_path_factory.mktemp("built") / "data", BuildSettings(**SMALL, cache=cache))


def settings(cache: Path, **changes: Any) -> BuildSettings:
    return BuildSettings.model_validate({**SMALL, "cache": cache, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_build_makes_one_shard_per_natural_kind(built: BuildReport) -> None:
    description = read_data(built.out)
    assert description == built.description
    assert [shard.name for shard in description.shards] == ["ball", "bars", "noise"]
    assert description.clustering.purity == 1.0
    assert sum(shard.prior for shard in description.shards) == pytest.approx(1)
    assert [shard.prior for shard in description.shards] == pytest.approx([28 / 67, 22 / 67, 17 / 67])
    assert (built.train + built.holdout, built.test) == (67, 5)
    for shard in description.shards:
        for file in (shard.train, shard.holdout, shard.test):
            assert file is not None
            assert ChunkTable.of_file(built.out / file.path).ref == file.blob
            data = load_shard(built.out / file.path, description.latent)
            assert len(data) == file.clips
            assert set(data.kinds) == {shard.name}


def sources(built: BuildReport, path: str) -> list[str]:
    """The digests of the files of a shard's clips."""
    shard = open_shard(built.out / path, built.description.latent)
    assert isinstance(shard, PartedShard)
    return [digest for number in range(len(shard.index.parts)) for digest in shard.metadata(number).sources]


def test_latents_are_normalised_and_decode_to_the_clips(built: BuildReport) -> None:
    spec = built.description.latent
    shards = [load_shard(built.out / shard.train.path, spec) for shard in built.description.shards]
    latents = torch.cat([shard.latents for shard in shards])
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(3), atol=2e-3, rtol=0)
    lines = [json.loads(line) for line in (built.out / "clips.jsonl").read_text().splitlines()]
    number = {line["sha256"]: int(line["file_name"].split("-")[1][:3]) for line in lines}
    source = sources(built, "shards/000.train.safetensors")[0]
    decoded = load_latents("pixels", spec).decode(shards[0].latents[:1])[0]
    assert np.abs(decoded.astype(int) - look("ball", number[source])).mean() < 3


def test_no_file_is_in_two_splits(built: BuildReport) -> None:
    sides: dict[str, set[str]] = {"train": set(), "holdout": set(), "test": set()}
    for shard in built.description.shards:
        for file in filter(None, (shard.train, shard.holdout, shard.test)):
            sides[file.path.split(".")[1]] |= set(sources(built, file.path))
    assert not sides["train"] & sides["holdout"]
    assert not (sides["train"] | sides["holdout"]) & sides["test"]
    lines = [json.loads(line) for line in (built.out / "clips.jsonl").read_text().splitlines()]
    assert {line["sha256"] for line in lines if line["split"] == "test"} == sides["test"]
    assert len(lines) == 72


def test_every_cluster_has_a_contact_sheet(built: BuildReport) -> None:
    for name in ("000-ball", "001-bars", "002-noise"):
        with Image.open(built.out / f"sheets/{name}.png") as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("RGB")).std() > 20


def test_second_build_gives_the_same_bytes_from_the_cache(clips: Path, cache: Path, built: BuildReport, tmp_path: Path) -> None:
    again = build_data(clips, tmp_path / "again", settings(cache))
    assert again.cached == 72
    fresh = build_data(clips, tmp_path / "fresh", settings(tmp_path / "cache", workers=1))
    assert fresh.cached == 0
    assert content(again.out) == content(fresh.out) == content(built.out)


def test_automatic_number_of_experts_gives_the_bytes_of_that_number(
    clips: Path, cache: Path, built: BuildReport, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    automatic = build_data(clips, tmp_path / "auto", settings(cache, experts="auto"))
    assert content(automatic.out) == content(built.out)
    assert "3 experts: silhouette" in caplog.text


def test_held_out_clips_do_not_depend_on_cluster_count(clips: Path, cache: Path, tmp_path: Path) -> None:
    held = []
    for experts in (1, 2):
        build_data(clips, tmp_path / str(experts), settings(cache, experts=experts, holdout=0.3, largest_share=1.0))
        lines = [json.loads(line) for line in (tmp_path / str(experts) / "clips.jsonl").read_text().splitlines()]
        held.append({line["file_name"] for line in lines if line["split"] == "holdout"})
    assert held[0]
    assert held[0] <= held[1]
    assert len(held[1]) <= len(held[0]) + 5  # small clusters get a few more


@pytest.mark.parametrize(("stage", "count"), [("clips", 70), ("captions", 3), ("shards", 2)])
def test_killed_build_leaves_no_output_and_can_be_resumed(
    clips: Path, built: BuildReport, tmp_path: Path, stage: str, count: int
) -> None:
    child = Path(__file__).with_name("build_process.py")
    arguments = [str(clips), str(tmp_path / "out"), str(tmp_path / "cache"), stage, str(count)]
    ended = subprocess.run([sys.executable, str(child), *arguments], env={"OMP_NUM_THREADS": "1", "PATH": ""}, timeout=600)
    assert ended.returncode == -9
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob(".*")) or stage == "clips"
    report = build_data(clips, tmp_path / "out", settings(tmp_path / "cache"))
    assert report.cached >= 64
    assert content(report.out) == content(built.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_interrupted_build_leaves_the_earlier_result(clips: Path, cache: Path, tmp_path: Path) -> None:
    build_data(clips, tmp_path / "out", settings(cache))
    before = content(tmp_path / "out")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_data(clips, tmp_path / "out", settings(cache, seed=1, experts=2), interrupt)
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    build_data(clips, tmp_path / "out", settings(cache, experts=2))
    assert len(read_data(tmp_path / "out").shards) == 2


def test_foreign_folder_is_never_overwritten(clips: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds thesis.txt, which no build wrote, and is not overwritten; name a new folder"):
        build_data(clips, tmp_path / "mine", settings(cache))
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not a folder"):
        build_data(clips, tmp_path / "file", settings(cache))
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_build_into_an_empty_folder(clips: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert build_data(clips, tmp_path / "out", settings(cache)).train > 0


def test_second_build_of_the_same_folder_is_refused(clips: Path, cache: Path, tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"), pytest.raises(DataError, match="another build is writing .*out; wait for it"):
        build_data(clips, tmp_path / "out", settings(cache))


@pytest.fixture
def faulty(clips: Path, tmp_path: Path) -> Path:
    """The clips, one of them undecodable and one without a caption."""
    folder = tmp_path / "faulty"
    shutil.copytree(clips, folder)
    (folder / "ball-003.mp4").write_bytes(b"not a video")
    write_video(folder / "zz.mp4", look("ball", 99))
    return folder


def test_bad_clips_are_refused_or_left_out_and_reported(faulty: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="zz.mp4 has no caption; add a row .*; or leave such clips out with --skip-bad"):
        build_data(faulty, tmp_path / "out", settings(cache))
    (faulty / "zz.mp4").unlink()
    with pytest.raises(DataError, match="ball-003.mp4 cannot be decoded .*; or leave such clips out with --skip-bad"):
        build_data(faulty, tmp_path / "out", settings(cache))
    assert [path.name for path in tmp_path.iterdir()] == ["faulty"]
    report = build_data(faulty, tmp_path / "out", settings(cache, skip_bad=True))
    assert [name for name, _ in report.skipped] == ["ball-003.mp4"]
    assert (report.train + report.holdout, report.description.skipped) == (66, 1)
    assert "cannot be decoded" in json.loads((report.out / "clips.jsonl").read_text().splitlines()[-1])["left_out"]


def test_nothing_left_is_one_sentence(clips: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    for path in folder.glob("*.mp4"):
        path.write_bytes(path.name.encode() * 40)
    with pytest.raises(DataError, match="no clip is left: all 72 were left out, the first because ball-000.mp4 cannot"):
        build_data(folder, tmp_path / "out", settings(cache, skip_bad=True))
    for path in folder.glob("*.mp4"):
        path.unlink()
    with pytest.raises(DataError, match="no clip is left: all 72 were left out, the first because .* does not exist"):
        build_data(folder, tmp_path / "out", settings(cache, skip_bad=True))


def test_counts_are_checked_before_decoding(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"use at most 2 experts \(--experts\), .* or a smaller minimum \(--smallest\)"):
        build_data(clips, tmp_path / "out", settings(tmp_path / "cache", smallest=30))
    assert not list((tmp_path / "cache").glob("*.safetensors"))


@pytest.fixture(scope="module")
def few(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty clips with captions, three of which hold no word, and two other files."""
    folder = tmp_path_factory.mktemp("few")
    for number, path in enumerate(sorted(clips.glob("*.mp4"))[2:62:2]):
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text("\U0001f600\U0001f389" if number < 3 else "a red ball rolls")
    (folder / "notes.doc").write_text("x")
    (folder / "cover.jpg").write_text("x")
    return folder


def test_thirty_clips_build_with_default_sizes_and_warnings(few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = {"height": 32, "width": 32, "workers": 2, "cache": tmp_path / "cache"}
    report = build_data(few, tmp_path / "out", BuildSettings.model_validate(chosen))
    assert min(shard.train.clips + shard.holdout.clips for shard in report.description.shards) >= 5
    assert report.description.latent.text_tokens == 32, "room for prompts that are longer than all captions"
    assert report.round_trip_db is not None
    assert 5 < report.round_trip_db < 50
    assert f"it rebuilds these clips at {report.round_trip_db:.1f} dB" in caplog.text
    assert "text builtin:words is a stand-in" in caplog.text
    assert "3 of 30 captions hold no words (the first is of ball-002.mp4)" in caplog.text
    assert "that were not used: 1 .jpg, 1 .doc" in caplog.text
    lines = [json.loads(line) for line in (report.out / "clips.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines if "not_used" in line] == ["cover.jpg", "notes.doc"]


def test_chosen_stand_ins_are_not_warned_of(few: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = {**SMALL, "smallest": None, "text": "builtin:words", "cache": tmp_path / "cache"}
    assert build_data(few, tmp_path / "out", BuildSettings.model_validate(chosen)).round_trip_db is None
    assert "stand-in" not in caplog.text


def test_truncated_captions_are_counted_in_the_log(
    clips: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_data(clips, tmp_path / "out", settings(cache, text_tokens=3))
    assert "2 of 3 captions are longer than 3 tokens and are truncated" in caplog.text


def test_relative_path_of_autoencoder_is_made_absolute(
    clips: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo_autoencoder(), tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    latent = build_data(clips, tmp_path / "out", settings(cache, latents="vae")).description.latent
    assert latent.vae == str(tmp_path / "vae")
    assert anchored("vae+owner/name") == f"{tmp_path / 'vae'}+owner/name"
    assert anchored("builtin:words") == "builtin:words"


def test_training_copy_of_a_test_clip_is_left_out(clips: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    shutil.copy(folder / "ball-000.mp4", folder / "copy.mp4")
    (folder / "copy.txt").write_text("a red ball rolls")
    report = build_data(folder, tmp_path / "out", settings(cache))
    assert (report.repeated, report.test, report.train + report.holdout) == (1, 5, 67)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"experts": 9}, DataError, "67 clips are too few for 9 experts of at least 12 clips each; use at most 5 experts"),
        ({"frames": 12}, DataError, r"ball-000.mp4 is too short: 1.00 s instead of 1.50 s \(12 frames at 8 fps\)"),
        ({"latents": "builtin:vae"}, ConfigError, "there are no latents 'builtin:vae'"),
        ({"text": "builtin:vae"}, ConfigError, "there is no text encoder 'builtin:vae'"),
        ({"normalisation": "shipped"}, ConfigError, "latents 'pixels' have no mean and std"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    clips: Path, cache: Path, tmp_path: Path, changes: dict[str, object], error: type[LutetiaError], words: str
) -> None:
    with pytest.raises(error, match=words):
        build_data(clips, tmp_path / "out", settings(cache, **changes))
    assert list(tmp_path.iterdir()) == []


def test_folder_of_test_clips_only_is_refused(tmp_path: Path, cache: Path) -> None:
    write_video(tmp_path / "clips/a.mp4", look("ball", 0))
    write_rows(tmp_path / "clips", [{"file_name": "a.mp4", "caption": "x", "split": "test"}])
    with pytest.raises(DataError, match="no clip is left for training"):
        build_data(tmp_path / "clips", tmp_path / "out", settings(cache))


def test_read_data_refuses_changed_files(built: BuildReport, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "data")
    (tmp_path / "data/shards/001.holdout/0000.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="001.holdout/0000.safetensors is not the file that data.json describes"):
        read_data(tmp_path / "data")
    (tmp_path / "data/shards/001.holdout/0000.safetensors").unlink()
    with pytest.raises(DataError, match=r"001.holdout/0000.safetensors is missing; build the data again"):
        read_data(tmp_path / "data")
    (tmp_path / "data/shards/001.holdout.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="001.holdout.safetensors is not the file that data.json describes"):
        read_data(tmp_path / "data")
    (tmp_path / "data/shards/001.holdout.safetensors").unlink()
    with pytest.raises(DataError, match=r"001.holdout.safetensors is missing; build the data again"):
        read_data(tmp_path / "data")
    (tmp_path / "data/data.json").write_text("{}")
    with pytest.raises(DataError, match=r"data.json cannot be read \(latent: is missing\)"):
        read_data(tmp_path / "data")
    with pytest.raises(DataError, match="holds no data.json; name a folder that `lutetia data build` wrote"):
        read_data(tmp_path)


def test_balance_makes_clusters_equally_frequent(built: BuildReport, tmp_path: Path) -> None:
    made = balance(built.out, tmp_path / "balanced")
    assert made == read_data(tmp_path / "balanced")
    (shard,) = made.shards
    shards = {
        split: load_shard(tmp_path / "balanced" / getattr(shard, split).path, made.latent) for split in ("train", "holdout")
    }
    parts = [load_shard(built.out / part.train.path, made.latent) for part in built.description.shards]
    most = max(map(len, parts))
    assert Counter(shards["train"].kinds) == dict.fromkeys(COUNTS, most)
    assert Counter(shards["holdout"].kinds) == {part.name: part.holdout.clips for part in built.description.shards}
    counts = Counter(clip.numpy().tobytes() for clip in shards["train"].latents)
    for part in parts:
        times = [counts[clip.numpy().tobytes()] for clip in part.latents]
        assert {most // len(part)} <= set(times) <= {most // len(part), -(-most // len(part))}, (
            "all clips of a cluster equally often"
        )
    assert balance(built.out, tmp_path / "again") == made
    with pytest.raises(DataError, match="holds no data.json"):
        balance(tmp_path / "nothing", tmp_path / "out")


def test_clips_go_to_buckets_by_shape_and_length(tmp_path: Path, cache: Path) -> None:
    """Wide, square and short clips: three shapes in each shard, counted in the report; equal clips give equal bytes."""
    clips, rows = tmp_path / "clips", []
    for number in range(36):
        frames, shape = look("ball", number), number % 3
        kept = np.repeat(frames, 2, axis=2) if shape == 1 else frames[:1] if shape == 2 else frames
        write_video(clips / f"{number:02d}.mp4", kept)
        rows.append({"file_name": f"{number:02d}.mp4", "caption": f"a ball {shape}", "split": "train"})
    write_rows(clips, rows)
    first = settings(cache).clip_shape
    wide, still = (first.frames, first.height, 2 * first.width), (1, first.height, first.width)
    mixed = settings(cache, experts=1, buckets=[wide, still])
    report = build_data(clips, tmp_path / "data", mixed)
    names = [f"{frames}×{height}×{width}" for frames, height, width in ((first.frames, first.height, first.width), wide, still)]
    assert report.buckets == tuple((name, 12) for name in names)
    latent = report.description.latent
    assert [(each.pixel_frames, each.pixel_height, each.pixel_width) for each in latent.buckets] == [wide, still]
    shard = open_shard(tmp_path / "data" / report.description.shards[0].train.path, latent)
    assert sum(shard.sizes) == report.train
    assert min(shard.sizes) > 4
    shapes = [tuple(shard.take([start]).latents.shape[1:]) for start in np.cumsum([0, *shard.sizes[:-1]]).tolist()]
    assert shapes == [each.shape for each in latent.of_buckets]
    build_data(clips, tmp_path / "again", mixed)
    assert content(tmp_path / "again") == content(tmp_path / "data")
    with pytest.raises(DataError, match=r"no training clip goes to the bucket 4×.*; leave that shape out"):
        build_data(clips, tmp_path / "none", settings(cache, experts=1, buckets=[wide, still, (4, 512, 8)]))
