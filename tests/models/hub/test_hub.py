"""A mixture goes to a hub and comes back by its id, and from the cache when the hub cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lutetia.models.mixing.card import UNSTATED, model_card
from lutetia.models.mixing.description import FILE, ExpertEntry, read_mixture
from lutetia.models.pipeline import LutetiaPipeline, load_pipeline
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.card_spec import CardSpec
from lutetia.system.errors import ConfigError, IntegrityError
from tests.models.hub.fake_hub import fake_hub
from tests.models.mixing.tiny_mixture import pixel_mixture
from tests.models.tiny_experts import tiny_manifest

ID = "somebody/digits"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pixel_mixture(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which no hub id is a folder, and a token that no test needs."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    return tmp_path / "cache"


def test_pushed_mixture_comes_back_by_its_id_and_from_the_cache(
    mixture: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(mixture)
    expected = pipe("a ball", seed=1, output_type="latent").frames
    with fake_hub(monkeypatch) as hub:
        address = pipe.push_to_hub(ID)
        names = {path.relative_to(mixture).as_posix() for path in mixture.rglob("*") if path.is_file()}
        assert hub.repositories[ID].keys() == names
        assert all(hub.repositories[ID][name] == (mixture / name).read_bytes() for name in names), "as they are signed"
        assert address == f"{hub.address}/{ID}/commit/{hub.commit(ID)}"
        assert hub.messages == [f"Upload the mixture {read_mixture(mixture).mixture.digest[:12]}"]
        again = LutetiaPipeline.from_pretrained(ID, cache_dir=elsewhere)
        assert torch.equal(again("a ball", seed=1, output_type="latent").frames, expected)
    for options in ({}, {"local_files_only": True}):  # the hub is gone
        cached = LutetiaPipeline.from_pretrained(ID, cache_dir=elsewhere, **options)
        assert torch.equal(cached("a ball", seed=1, output_type="latent").frames, expected)


def test_mixture_that_no_hub_has_is_refused_in_one_sentence(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(monkeypatch), pytest.raises(ConfigError, match="cannot load mixture 'nobody/nothing'.* check the id"):
        LutetiaPipeline.from_pretrained("nobody/nothing", cache_dir=elsewhere)
    with pytest.raises(ConfigError, match="cannot load mixture 'nobody/nothing'"):
        LutetiaPipeline.from_pretrained("nobody/nothing", cache_dir=elsewhere, local_files_only=True)
    with pytest.raises(ConfigError, match="holds no mixture"):
        LutetiaPipeline.from_pretrained("./nothing")


def test_changed_file_on_a_hub_is_refused(mixture: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub(monkeypatch) as hub:
        files = {path.relative_to(mixture).as_posix(): path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
        hub.repositories[ID] = {**files, "pipeline.py": b"raise SystemExit('code of the hub ran')"}
        LutetiaPipeline.from_pretrained(ID, cache_dir=elsewhere)("a ball", seed=1)  # it is not run
        hub.repositories[ID] = {**files, "router/config.json": b"{}"}
        with pytest.raises(IntegrityError, match="router of the mixture"):
            LutetiaPipeline.from_pretrained(ID, cache_dir=elsewhere)


def test_changed_mixture_is_not_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    folder = pixel_mixture(tmp_path / "own")
    pipe = load_pipeline(folder)
    (folder / "README.md").write_text("another card")
    with fake_hub(monkeypatch) as hub, pytest.raises(IntegrityError, match=r"README\.md"):
        pipe.push_to_hub(ID)
    assert not hub.requests


def card_of(manifest: Manifest, **changes: object) -> str:
    entries = [
        ExpertEntry(
            name=shard.name, folder=f"expert_{shard.index:03d}", class_name=manifest.expert_of(shard.index).class_name,
            prediction="velocity", noise_schedule="linear", prior=shard.prior, epoch=3, samples=72, checkpoint="c" * 64,
        )
        for shard in manifest.shards
    ]  # fmt: skip
    return model_card(manifest.model_copy(update=changes), entries)


def test_card_tells_base_data_recipe_lineage_and_licences() -> None:
    card = card_of(
        tiny_manifest(),
        card=CardSpec(license="apache-2.0", base_license="openrail", data="Drawn by rules.", data_license="cc0-1.0"),
    )
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "text-to-video"
    for line in (
        "## Base", "- `WanTransformer3DModel`, from random weights", "Drawn by rules\\.".replace("\\.", "."),
        "20 clips of 4 frames at 8 a second, 8 × 8 pixels, in 2 clusters.", "| shard 0 | 10 | 50.0% |",
        "| optimiser | adamw, learning rate 0.001, cosine schedule, 2 steps of warm-up |",
        f"| `expert_001` | shard 1 | 3 | 72 | `{'c' * 64}` |", "- these weights: apache\\-2.0", "- the data: cc0\\-1.0",
    ):  # fmt: skip
        assert line in card


def test_card_without_words_of_the_owner_says_so() -> None:
    card = card_of(tiny_manifest())
    assert card.count(UNSTATED) == 3
    assert "license" not in yaml.safe_load(card.split("---")[1])


def test_texts_of_others_do_not_become_markup_or_metadata() -> None:
    hostile = '"] \n---\nlicense: mit\n# <img src=x onerror=y> | `code` [link](http://x)'
    manifest = tiny_manifest()
    card = card_of(manifest, card=CardSpec(description=hostile, license='mit"\\x', data=hostile, data_license="a | b"))
    head = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert head["license"] == 'mit"\\x'
    body = card.split("\n---\n", 1)[1]
    assert "\n---" not in body
    assert "\nlicense:" not in body
    assert "<img" not in body.replace("\\<", "")
    assert "](http" not in body.replace("\\]", "")
    assert all(line.count("|") - line.count("\\|") in (0, 3, 4, 6) for line in body.splitlines())


def test_card_is_a_file_of_the_mixture(mixture: Path) -> None:
    text = (mixture / "README.md").read_text()
    assert "## Lineage" in text
    assert "README.md" in json.loads((mixture / FILE).read_text())["mixture"]["files"]
