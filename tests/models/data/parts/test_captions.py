"""Clips with several captions: each step draws one by its place in the run; a shard with one caption a clip is as before."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.parts.index import ShardIndex, read_index, write_index
from lutetia.models.data.parts.order import next_uses, parts_used
from lutetia.models.data.parts.reader import PartedShard, open_shard
from lutetia.models.data.parts.writer import ShardWriter, text_of
from lutetia.models.mixing.router_training import train_router
from lutetia.models.training.batches import Batch, Batches
from lutetia.models.training.replay import ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.capabilities import CAPABILITIES, CAPTIONS
from lutetia.protocol.schema.manifest import Manifest, open_manifest
from lutetia.system.errors import ConfigError, DataError, IntegrityError
from tests.models.data.clip_files import write_video
from tests.models.tiny_experts import LATENT, tiny_data, tiny_manifest

CLIPS = 12


def captions_of(clip: int) -> list[int]:
    """The texts of a clip: one, two or three, of which the last is that of another clip, too."""
    return [clip, CLIPS + clip, (clip + 1) % CLIPS][: 1 + clip % 3]


def written(folder: Path, most: int = 3) -> Path:
    """A shard of clips with their first `most` captions."""
    data, path = tiny_data(2 * CLIPS), folder / f"{most}.safetensors"
    writer = ShardWriter(path, LATENT, "kind", "train", part_bytes=5000)
    for clip in range(CLIPS):
        first, *more = (text_of(f"text {text}", data.tokens[text], data.pooled[text]) for text in captions_of(clip)[:most])
        writer.add(data.latents[clip], first, "kind", more=more)
    assert writer.finish().captions == most
    return path


@pytest.fixture
def shard(tmp_path: Path) -> PartedShard:
    opened = open_shard(written(tmp_path), LATENT)
    assert isinstance(opened, PartedShard)
    assert len(opened.index.parts) > 4
    return opened


def text_in(batch: Batch, row: int) -> int:
    pooled = tiny_data(2 * CLIPS).pooled.half().float()
    return int((pooled - batch.pooled[row]).abs().sum(1).argmin())


def test_captions_are_read_by_their_place(shard: PartedShard) -> None:
    data = tiny_data(2 * CLIPS)
    for place in (0.0, 0.2, 0.5, 0.8, 0.999):
        taken = shard.take(range(CLIPS), captions=torch.full((CLIPS,), place))
        texts = [captions_of(clip)[int(place * len(captions_of(clip)))] for clip in range(CLIPS)]
        assert torch.equal(taken.tokens, data.tokens[texts].half().float())
        assert torch.equal(taken.pooled, data.pooled[texts].half().float())
        assert torch.equal(taken.latents, data.latents[:CLIPS].half().float())
    first = shard.take([5, 2])
    assert torch.equal(first.pooled, data.pooled[[5, 2]].half().float())
    assert shard.clip_with(int(shard.index.texts[4])) == 4
    assert shard.index.more is not None
    assert shard.clip_with(int(shard.index.more[1, 0])) == 1, "a text that is no clip's first"
    with pytest.raises(DataError, match="clips have several captions, which cannot be read at once"):
        shard.load()


def test_each_step_draws_one_caption_of_each_clip(shard: PartedShard, tmp_path: Path) -> None:
    manifest = tiny_manifest(1, optimisation={"text_dropout": 0.0})
    batches, steps = Batches(manifest, 0, shard), 30 * CLIPS // 4
    drawn: dict[int, list[int]] = {clip: [] for clip in range(CLIPS)}
    latents = tiny_data(2 * CLIPS).latents[:CLIPS].half().float()
    for step in range(steps):
        batch = batches.at(0, step)
        for row in range(len(batch)):
            clip = int((latents - batch.latents[row]).abs().flatten(1).sum(1).argmin())
            drawn[clip].append(text_in(batch, row))
    for clip, texts in drawn.items():
        counts = [texts.count(text) for text in captions_of(clip)]
        assert (len(texts), sum(counts)) == (30, 30)
        assert min(counts) > 30 / len(counts) / 4, "each caption is drawn about equally often"
    again = Batches(manifest, 0, shard).at(0, 7)
    assert torch.equal(again.tokens, batches.at(0, 7).tokens)
    others = Batches(manifest, 0, open_shard(written(tmp_path, 1), LATENT)).at(0, 7)
    for name in ("latents", "noise", "time"):
        assert torch.equal(getattr(again, name), getattr(others, name)), "captions are drawn apart from all else"


def test_replay_and_router_see_what_training_sees(shard: PartedShard, tmp_path: Path) -> None:
    manifest, first = tiny_manifest(1), open_shard(written(tmp_path, 1), LATENT)
    trainers = [ExpertTrainer(manifest, 0, each) for each in (shard, first)]
    several, one = ([trainer.step() for _ in range(3)] for trainer in trainers)
    assert several != one
    assert list(replay(manifest, 0, shard, ReplayParent(0), 3).losses) == several
    two = tiny_manifest(2)
    routers = [train_router(two, [each, first], seed=0, steps=2)[0] for each in (shard, first)]
    assert any(not torch.equal(a, b) for a, b in zip(routers[0].parameters(), routers[1].parameters(), strict=True))


def test_all_parts_with_captions_of_a_clip_are_fetched_before_it(shard: PartedShard) -> None:
    manifest: Manifest = tiny_manifest(1)
    index = shard.index
    assert next_uses(manifest, 0, index, 0).max() < 2 * CLIPS
    needed, places = set(parts_used(manifest, 0, index, 0, 4)), index.parts_of(np.arange(CLIPS))
    assert places.shape == (CLIPS, 4)
    clips = Batches(manifest, 0, shard)._order.clips(0)
    assert needed == set(places[clips].flatten().tolist())


def _gap(more: np.ndarray) -> None:
    more[1] = [-1, 0]


def _beyond(more: np.ndarray) -> None:
    more[2, 1] = 3 * CLIPS


@pytest.mark.parametrize(
    ("harm", "says"), [(_gap, "further texts of a clip are not its first entries"), (_beyond, "a further text beyond the")]
)
def test_index_whose_further_texts_contradict_it_is_refused(shard: PartedShard, tmp_path: Path, harm, says: str) -> None:
    assert shard.index.more is not None
    more = shard.index.more.copy()
    harm(more)
    write_index(tmp_path / "other", replace(shard.index, more=more))
    with pytest.raises(IntegrityError, match=says):
        read_index(tmp_path / "other")
    wide: ShardIndex = replace(shard.index, more=np.zeros((CLIPS, 16), dtype=np.int32))
    write_index(tmp_path / "wide", wide)
    with pytest.raises(IntegrityError, match="not 1 to 15 whole numbers"):
        read_index(tmp_path / "wide")


def test_build_keeps_all_captions_of_training_clips(tmp_path: Path) -> None:
    clips, lines = tmp_path / "clips", []
    for number, pictures in enumerate(np.random.default_rng(0).integers(0, 255, (6, 4, 16, 16, 3), dtype=np.uint8)):
        write_video(clips / f"{number}.mp4", pictures)
        captions = {"caption": "a red ball", "captions": ["a  ball", "a red ball", f"ball {number}"][: number % 2 * 3]}
        lines.append(json.dumps({"file_name": f"{number}.mp4", **captions}))
    (clips / "metadata.jsonl").write_text("\n".join(lines))
    settings = BuildSettings(
        frames=4, height=16, width=16, latents="pixels", features="builtin", experts=1, smallest=1, holdout=0.34, workers=1,
        cache=tmp_path / "cache",
    )  # fmt: skip
    description = build_data(clips, tmp_path / "data", settings).description
    (built,) = description.shards
    assert (built.train.captions, built.holdout.captions) == (3, 1)
    shard = open_shard(tmp_path / "data" / built.train.path, description.latent)
    assert isinstance(shard, PartedShard)
    found = [caption for _, captions, _ in shard.texts() for caption in captions]
    rows = [json.loads(line) for line in (tmp_path / "data" / "clips.jsonl").read_text().splitlines()]
    expected = {"a red ball"}
    for row in rows:
        number = int(row["file_name"][0])
        assert row.get("captions") == (["a red ball", "a ball", f"ball {number}"] if number % 2 else None)
        expected |= set(row.get("captions", ())) if row["split"] == "train" else set()
    assert sorted(found) == sorted(expected), "each once, and none of a held-out clip alone"

    run = RunSettings(preset="tiny", addresses=("127.0.0.1:41777",))
    manifest = create_run(tmp_path / "data", tmp_path / "run", run).manifest
    assert CAPTIONS in manifest.needs
    sealed = RunFolder(tmp_path / "run").manifest.read_bytes()
    with pytest.raises(ConfigError, match="the run needs captions"):
        open_manifest(sealed, now=time.time(), known=[word for word in CAPABILITIES if word != CAPTIONS])
