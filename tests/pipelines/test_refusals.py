"""What cannot be used of a pipeline is refused with one sentence before a clip is decoded; hub ids are pinned and cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lutetia.coordinator.admin.base import with_base
from lutetia.coordinator.admin.pipeline_settings import with_pipeline
from lutetia.models.data.build import build_data
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shards import ShardData
from lutetia.models.networks.model_ref import parse_ref
from lutetia.models.sources.conventions import CONVENTIONS, OTHER_TASKS
from lutetia.models.sources.data_settings import with_pipeline as data_settings
from lutetia.models.sources.pipeline import open_pipeline
from lutetia.models.warm_start import find_sources
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, SamplingSpec, TimeSampling
from lutetia.system.errors import ConfigError, IntegrityError, LutetiaError
from tests.pipelines.tiny_clips import build_settings, run_settings
from tests.pipelines.tiny_pipelines import pipeline_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def altered(folder: Path, name: str = "wan21") -> Path:
    shutil.copytree(pipeline_folder(name), folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def of_another_class(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")


def with_pickled_weights(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).rename(folder / "vae" / "diffusion_pytorch_model.bin")


def without_vae(folder: Path) -> None:
    edit(folder / "model_index.json", vae=[None, None])


def with_another_transformer(folder: Path) -> None:
    edit(folder / "model_index.json", transformer=["diffusers", "WanVACETransformer3DModel"])


def with_another_text_width(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", text_dim=4096)


def with_other_latents(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", in_channels=48, out_channels=48)


def with_a_second_transformer(folder: Path) -> None:
    edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])


def of_pictures_without_an_encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    altered(folder, "wan21-i2v")
    edit(folder / "model_index.json", image_encoder=[None, None])


def with_cosine_betas(folder: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", use_flow_sigmas=False, prediction_type="epsilon", beta_schedule="x")


def without_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (of_another_class, "is a StableDiffusionPipeline, which is not supported; use one of CogVideoXImageToVideoPipeline"),
        (with_pickled_weights, "the vae of pipeline .* has pickled weights only"),
        (without_vae, "has no vae; name a whole pipeline"),
        (with_another_transformer, "WanVACETransformer3DModel' is not supported: it needs a control clip"),
        (with_another_text_width, "text_dim is 4096 but the run's data need 32"),
        (with_other_latents, "in_channels is 48 but the run's latents have 16"),
        (with_a_second_transformer, "has a boundary_ratio of None between its two transformers"),
        (of_pictures_without_an_encoder, "has no image_encoder, but its transformer needs one; name a whole pipeline"),
        (with_cosine_betas, "noise schedule 'x' of the scheduler is not supported"),
        (without_tokenizer, "cannot load the tokenizer of text encoder"),
    ],
)
def test_pipeline_that_cannot_be_used_is_refused_before_clips_are_read(
    harm: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = altered(tmp_path / "pipeline")
    harm(folder)
    with pytest.raises(ConfigError, match=says) as caught:
        build_data(tmp_path / "no clips", tmp_path / "out", build_settings("wan21", tmp_path, pipeline=str(folder)))
    assert "\n" not in str(caught.value)


def test_run_says_which_of_two_transformers_it_trains(tmp_path: Path) -> None:
    latent = latent_of("wan22-a14b", tmp_path)
    low = with_pipeline(run_settings("wan22-a14b", part="low"), latent)
    assert low.warm_start == f"{pipeline_folder('wan22-a14b')}/transformer_2"
    adapter = {"base": f"{pipeline_folder('wan22-a14b')}/transformer", "dtype": "float32"}
    for settings, says in (
        (
            run_settings("wan22-a14b", part=None),
            "has two transformers, one for high .*; say which with part",
        ),
        (run_settings("wan21", part="low"), "has one transformer for all noise levels; leave part"),
        (run_settings("wan21", part="low", pipeline=None), "part was set without a pipeline"),
        (
            with_base(run_settings("wan22-a14b", part="low", expert={"adapter": adapter}))[0],
            "the adapter's base is the transformer of .*, but the run trains the transformer_2 of .*; set expert.adapter.base",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            with_pipeline(settings, latent)


@pytest.mark.parametrize("name", sorted(OTHER_TASKS))
def test_pipeline_classes_that_people_may_try_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    folder = altered(tmp_path / "pipeline")
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(ConfigError, match=f"is a {name}, which is not supported: {OTHER_TASKS[name]}"):
        build_data(tmp_path / "no clips", tmp_path / "out", build_settings("wan21", tmp_path, pipeline=str(folder)))


def test_warm_start_from_two_transformers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has two transformers"):
        find_sources(str(pipeline_folder("wan22-a14b")), ["a"], None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 8}, r"need 4n\+1 frames, not 8; use 9 frames"),
        ({"width": 40}, "the expert's patch of 2 does not divide the latent's width of 5"),
        ({"latents": "pixels"}, "both pipeline and latents were set"),
        ({"text_tokens": 600}, "text_tokens"),
    ],
)
def test_clips_that_do_not_fit_are_refused_before_they_are_read(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises((LutetiaError, ValueError), match=says):
        build_data(tmp_path / "no clips", tmp_path / "out", build_settings("wan21", tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_tokens": 200}, "with an image encoder takes 512 text tokens, not 200; leave text_tokens out"),
        (
            {"buckets": ((1, 32, 32),)},
            "continues pictures, so clips of one frame teach it nothing; leave out frames and buckets of 1",
        ),
    ],
)
def test_clips_that_cannot_begin_with_a_picture_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        build_data(tmp_path / "no clips", tmp_path / "out", build_settings("wan21-i2v", tmp_path, **changes))


def test_data_without_pictures_are_refused_for_experts_that_take_them(tmp_path: Path) -> None:
    latent = latent_of("wan21-i2v", tmp_path)
    assert latent.picture is not None
    assert (latent.picture.mask, latent.picture.vision_tokens, latent.picture.vision_width) == (4, 5, 16)
    without = latent.model_copy(update={"picture": None})
    with pytest.raises(ConfigError, match="the data hold no first pictures of clips, but WanImageToVideoPipeline needs"):
        with_pipeline(run_settings("wan21-i2v"), without)


def latent_of(name: str, tmp_path: Path) -> LatentSpec:
    settings, text, picture = data_settings(build_settings(name, tmp_path))
    channels, frames, height, width = load_latents(settings.latents).shape_of(settings.frames, settings.height, settings.width)
    return LatentSpec(
        channels=channels, frames=frames, height=height, width=width, vae=settings.latents, pixel_frames=settings.frames,
        pixel_height=settings.height, pixel_width=settings.width, fps=settings.fps, text_encoder=settings.text,
        text_tokens=settings.text_tokens or 1, text_width=32, pooled_width=32, text=text,
        picture=picture,
    )  # fmt: skip


def test_data_of_other_models_are_refused(tmp_path: Path) -> None:
    latent = latent_of("wan21", tmp_path)
    with pytest.raises(ConfigError, match=r"the data's latents were made by .*wan21/vae, but the pipeline has .*ltx/vae; build"):
        with_pipeline(run_settings("ltx"), latent)
    other = latent.model_copy(update={"text": None})
    with pytest.raises(ConfigError, match="text embeddings were made in another way than WanPipeline makes them"):
        with_pipeline(run_settings("wan21"), other)


def test_run_takes_what_was_not_set_from_the_pipeline(tmp_path: Path) -> None:
    latent = latent_of("wan21", tmp_path)
    found = with_pipeline(run_settings("wan21", sampling=SamplingSpec(mode="top2")), latent)
    assert (found.sampling.steps, found.sampling.guidance, found.sampling.mode) == (50, 5.0, "top2")
    assert found.sampling.scheduler is not None
    assert found.sampling.scheduler.class_name == "UniPCMultistepScheduler"
    assert found.optimisation.time == TimeSampling(shift=3.0), "the pipeline's flow shift"
    assert found.warm_start == f"{pipeline_folder('wan21')}/transformer"
    chosen = Optimisation(batch=2, time=TimeSampling(shift=1.5))
    kept = with_pipeline(run_settings("wan21", optimisation=chosen, sampling=SamplingSpec(steps=7)), latent)
    assert (kept.optimisation, kept.sampling.steps) == (chosen, 7)
    with pytest.raises(ConfigError, match="both pipeline and expert were set"):
        with_pipeline(run_settings("wan21", expert=ExpertSpec(config={})), latent)


def test_shift_that_depends_on_the_size_is_that_of_these_latents(tmp_path: Path) -> None:
    latent = latent_of("ltx", tmp_path)
    shift = with_pipeline(run_settings("ltx"), latent).optimisation.time.shift
    assert shift == pytest.approx(2.718281828 ** (0.95 + (2.05 - 0.95) * (3 * 4 * 4 - 1024) / (4096 - 1024)), rel=1e-6)


def test_settings_of_data_come_from_the_pipeline(tmp_path: Path) -> None:
    settings, text, _ = data_settings(build_settings("hunyuan", tmp_path).model_copy(update={"text_tokens": None}))
    assert settings.text_tokens == CONVENTIONS["HunyuanVideoPipeline"].tokens == 256
    assert text is not None
    assert (text.crop, text.layer, text.pooled_encoder) == (95, 2, "text_encoder_2")
    assert settings.normalisation == "shipped"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that cannot be reached, of which one pipeline was downloaded before."""
    cache = tmp_path / "hub"
    snapshots = cache / "models--owner--wan" / "snapshots" / COMMIT
    shutil.copytree(pipeline_folder("wan21"), snapshots)
    (snapshots.parents[1] / "refs").mkdir()
    (snapshots.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return cache


@pytest.mark.usefixtures("hub")
def test_pipeline_of_a_hub_that_is_away_comes_from_the_cache_and_names_its_commit() -> None:
    source = open_pipeline("owner/wan", weights=("vae", "transformer"))
    assert source.model.text == f"owner/wan@{COMMIT}"
    assert source.part("vae") == f"owner/wan/vae@{COMMIT}"
    assert parse_ref(source.part("vae"), "latents", ()).options["subfolder"] == "vae"
    assert open_pipeline(f"owner/wan@{COMMIT}", hub=False).model.text == source.model.text


@pytest.mark.usefixtures("hub")
def test_parts_of_a_cached_pipeline_are_read_without_the_hub(tmp_path: Path) -> None:
    settings, text, _ = data_settings(build_settings("wan21", tmp_path, pipeline="owner/wan"))
    assert (settings.latents, settings.text) == (f"owner/wan/vae@{COMMIT}", f"owner/wan@{COMMIT}")
    assert load_latents(settings.latents).module is not None
    tokens, _ = load_text_encoder(settings.text, 8, text).encode(["a red ball"])
    own, _ = load_text_encoder(str(pipeline_folder("wan21")), 8, text).encode(["a red ball"])
    assert torch.equal(tokens, own)


@pytest.mark.usefixtures("hub")
def test_pipeline_that_no_hub_and_no_cache_has_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="cannot load pipeline 'owner/other': .*check the id and the connection") as caught:
        open_pipeline("owner/other")
    assert "\n" not in str(caught.value)


def test_index_with_another_null_condition_than_its_text_needs_is_refused(tmp_path: Path) -> None:
    latent = latent_of("wan21", tmp_path)
    zeros = torch.zeros
    null = zeros(latent.text_tokens, latent.text_width), zeros(latent.pooled_width)
    shape = (2, *latent.shape)
    data = ShardData(zeros(*shape), zeros(2, *null[0].shape), zeros(2, latent.pooled_width), ["a", "b"], ["", ""], null)
    write_shard(tmp_path / "whole.safetensors", data, latent)
    assert load_shard(tmp_path / "whole.safetensors", latent).null is not None
    for name, spec, given, says in (
        ("missing", latent, None, "the null condition of its text is missing"),
        ("needless", latent.model_copy(update={"text": None}), null, "a null condition that its text does not need"),
    ):
        write_shard(tmp_path / f"{name}.safetensors", replace(data, null=given), spec)
        with pytest.raises(IntegrityError, match=says):
            load_shard(tmp_path / f"{name}.safetensors", spec)
