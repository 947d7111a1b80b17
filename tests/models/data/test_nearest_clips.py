"""The training clip beside a prompt: the same caption in any shard and part, else the nearest one, within a bound."""

from __future__ import annotations

from pathlib import Path

import torch

from lutetia.models.data.nearest_clips import latents_of, nearest_clips
from lutetia.models.data.parts.reader import open_shard
from lutetia.models.data.parts.writer import write_shard
from tests.models.data.old_format import write_old_shard
from tests.models.data.parts.test_reader import LATENT, some_data


def test_same_caption_wins_and_another_prompt_gets_the_nearest(tmp_path: Path) -> None:
    parted, old = some_data(20, texts=7), some_data(3, texts=3)
    old.captions = ["an old clip", "another", "a third"]
    write_shard(tmp_path / "000.train.safetensors", parted, LATENT, name="digits", size=400)
    write_old_shard(tmp_path / "001.train.safetensors", old, LATENT)
    shards = [open_shard(tmp_path / f"00{number}.train.safetensors", LATENT) for number in range(2)]
    vectors = torch.stack([-parted.pooled[0], parted.pooled[5] * 3, torch.ones(7), torch.ones(7)])
    prompts = ["caption 4", "something near caption 5", "another", " another "]
    found = nearest_clips(prompts, vectors, shards)
    assert [(each.shard, each.caption, each.same) for each in found] == [
        (0, "caption 4", True), (0, "caption 5", False), (1, "another", True), (1, "another", True),
    ]  # fmt: skip
    assert found[1].similarity > 0.99
    assert torch.equal(latents_of(found[0], shards), parted.latents[4:5])
    assert torch.equal(latents_of(found[2], shards), old.latents[1:2])
    assert nearest_clips(["another"], vectors[2:3], shards, most=7)[0].shard == 0
