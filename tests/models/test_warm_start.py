"""Sources of initial weights: folders as diffusers and Lutetia write them; anything else is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lutetia.models.experts.families import build_expert
from lutetia.models.mixing.layout import WEIGHTS
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.training.checkpoint_checks import check_weights
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.models.warm_start import find_sources, warm
from lutetia.models.warm_start import write_weights as write_given
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError, IntegrityError
from tests.models.tiny_experts import CONFIGS, WAN, tiny_data, tiny_manifest

NAMES = ("cats", "dogs")


def saved(folder: Path, spec: ExpertSpec = WAN, seed: int = 7, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """A transformer with random weights, as diffusers saves it."""
    build_expert(spec, seed).to(dtype).save_pretrained(folder, **options)  # pyright: ignore[reportCallIssue]
    return folder


@pytest.mark.parametrize("class_name", CONFIGS)
def test_transformer_of_any_class_starts_all_shards(class_name: str, tmp_path: Path) -> None:
    spec = ExpertSpec(class_name=class_name, config=CONFIGS[class_name])
    sources = find_sources(str(saved(tmp_path / "given", spec)), NAMES, None)
    assert len(sources) == 2
    assert sources[0] == sources[1]
    write_given(sources[0], tmp_path / "weights")
    check_weights(tmp_path / "weights", spec)
    expected, written = build_expert(spec, 7).state_dict(), load_file(tmp_path / "weights")
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_split_half_precision_weights_become_one_float32_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "given", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    write_given(find_sources(str(folder), NAMES, None)[0], tmp_path / "weights")
    written = load_file(tmp_path / "weights")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    expected = build_expert(WAN, 7).to(torch.bfloat16).state_dict()
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in expected.items())


def test_pipeline_source_uses_its_transformer(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (source, _) = find_sources(str(tmp_path / "pipeline"), NAMES, WAN.model_copy(update={"prediction": "sample"}))
    assert source.model.location.endswith("transformer")
    assert source.spec.prediction == "sample", "a transformer's config does not tell what it predicts: the settings do"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    epsilon = ExpertSpec(config=WAN.config, prediction="epsilon", noise_schedule="vp_cosine")
    manifest = tiny_manifest(experts={1: epsilon})
    files = [tmp_path / f"weights{shard}" for shard in range(2)]
    for shard, file in enumerate(files):
        write_weights(ExpertTrainer(manifest, shard, tiny_data()).snapshot(), file)
    stitch(tmp_path / "mixture", manifest, files, build_router(manifest))
    return tmp_path / "mixture"


def test_damaged_mixture_source_is_refused(mixture: Path) -> None:
    (mixture / "expert_001" / WEIGHTS).write_bytes(bytes(9))
    with pytest.raises(IntegrityError, match="expert_001 of the mixture .* is damaged"):
        find_sources(str(mixture), ("shard 0", "shard 1"), None)


def test_mixture_source_starts_each_shard_from_its_expert(mixture: Path, tmp_path: Path) -> None:
    sources = find_sources(str(mixture), ("shard 0", "shard 1"), None)
    assert [source.spec.prediction for source in sources] == ["velocity", "epsilon"]
    for shard, source in enumerate(sources):
        write_given(source, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / f"weights{shard}").read_bytes()
    with pytest.raises(
        ConfigError, match=r"experts of .* are shard 0, shard 1, but the data's shards are cats, dogs; name the folder"
    ):
        find_sources(str(mixture), NAMES, None)
    alone = find_sources(str(mixture / "expert_001"), ("cats", "dogs", "birds"), None)
    assert len(alone) == 3
    assert {source.model.location for source in alone} == {str(mixture / "expert_001")}


def test_manifest_names_the_initial_weights_of_each_shard() -> None:
    one, other = BlobRef(digest="a" * 64, size=1), BlobRef(digest="b" * 64, size=2)
    manifest = tiny_manifest()
    same, apart = warm(manifest, [one, one]), warm(manifest, [one, other])
    assert same.expert.init == one
    assert all(shard.expert is None for shard in same.shards)
    assert apart.expert.init is None
    assert [apart.expert_of(shard).init for shard in range(2)] == [one, other]
    assert len({manifest.run_id, same.run_id, apart.run_id}) == 3


def with_other_class(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


def with_malformed_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_one_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("proj_out.bias")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (with_other_class, "UNet2DModel, which is not supported"),
        (with_malformed_config, "cannot load warm start"),
        (without_one_tensor, r"1 missing keys, among them proj_out\.bias"),
        (with_nan, r"proj_out\.bias of its weights holds NaN"),
        (as_pickle, r"has pickled weights only \(diffusion_pytorch_model\.bin\), which are never read; save it with"),
        (cut_short, "cannot load warm start"),
    ],
)
def test_unusable_source_raises_one_sentence(harm, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "given")
    harm(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        write_given(find_sources(str(folder), NAMES, None)[0], tmp_path / "weights")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_or_mismatched_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a folder nor a hub id; use a folder or owner/name"):
        find_sources(str(tmp_path / "nothing"), NAMES, None)
    folder = str(saved(tmp_path / "given"))
    deeper = ExpertSpec(config={**WAN.config, "num_layers": 2})
    with pytest.raises(ConfigError, match=r"has num_layers 1, but the settings' expert 2; leave the settings' expert out"):
        find_sources(folder, NAMES, deeper)
    assert find_sources(folder, NAMES, ExpertSpec(config={**WAN.config, "eps": 1e-6}))[0].spec.config["num_layers"] == 1
