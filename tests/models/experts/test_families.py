"""Every supported diffusers class is built, called, trained and saved as itself; misfitting configs are refused."""

import json
import time

import diffusers
import pytest
import torch

from lutetia.models.experts.classes.registry import FAMILIES, REFUSED
from lutetia.models.experts.families import build_expert, call_expert, check_fits, position_channels, weight_schema
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError
from tests.models.tiny_experts import CONFIGS, LATENT, tiny_data, tiny_manifest

NO_VIDEO = {"LongCatAudioDiTTransformer", "PriorTransformer", "RFD4ProteinaTransformer"}
"""Transformers of sound, of embeddings of single pictures, and of proteins."""


@pytest.fixture(params=sorted(CONFIGS))
def spec(request) -> ExpertSpec:
    return ExpertSpec(class_name=request.param, config=CONFIGS[request.param])


def test_prediction_has_the_latent_shape_and_uses_all_inputs(spec) -> None:
    model = build_expert(spec, seed=1).eval()
    data = tiny_data(3)
    t = torch.tensor([0.2, 0.5, 0.9])
    base = call_expert(model, data.latents, t, data.tokens, data.pooled)
    assert base.shape == data.latents.shape
    assert not torch.allclose(base, call_expert(model, data.latents + 1, t, data.tokens, data.pooled))
    assert not torch.allclose(base, call_expert(model, data.latents, t * 0.5, data.tokens, data.pooled))
    assert not torch.allclose(base, call_expert(model, data.latents, t, data.tokens * 0, data.pooled))
    assert torch.allclose(base[1:2], call_expert(model, data.latents[1:2], t[1:2], data.tokens[1:2], data.pooled[1:2]), atol=1e-5)


def test_latent_patches_return_to_their_place(spec) -> None:
    """In every class's packing, changing one corner of the input changes mostly that corner of the prediction."""
    model = build_expert(spec, seed=1).eval()
    x, tokens, t = torch.zeros(1, *LATENT.shape), torch.zeros(1, 5, 16), torch.tensor([0.5])
    changed = x.clone()
    changed[:, :, 3, 4:, :4] = torch.randn(4, 4, 4) * 10
    change = (call_expert(model, changed, t, tokens) - call_expert(model, x, t, tokens)).abs().mean(1)[0]
    corner = change[3, 4:, :4].mean()
    change[3, 4:, :4] = 0
    assert corner > 3 * change.sum() / (4 * 64 - 16)


def test_every_class_learns_and_its_weights_load_by_its_own_class(spec, device, tmp_path) -> None:
    trainer = ExpertTrainer(tiny_manifest(expert=spec, optimisation={"learning_rate": 5e-3}), 0, tiny_data(), device=device)
    before = trainer.snapshot().weights
    losses = [trainer.step() for _ in range(6)]
    assert all(0 < loss < 100 for loss in losses)
    after = trainer.snapshot()
    assert after.weights.keys() == weight_schema(spec).keys()
    assert any(not torch.equal(before[name], after.weights[name]) for name in before)
    write_weights(after, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": spec.class_name, **spec.config}))
    alone = getattr(diffusers, spec.class_name).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in alone.state_dict().items())


def test_every_video_transformer_of_diffusers_is_supported_or_refused_with_a_reason() -> None:
    found = {name for name in dir(diffusers) if "Transformer" in name and not name.endswith(("1DModel", "2DModel"))} - NO_VIDEO
    assert found == {*FAMILIES, *REFUSED} & found, "a new class of diffusers: describe it, or say why it is refused"
    assert not {*FAMILIES} & {*REFUSED}
    assert len(found & {*FAMILIES}) >= 12
    assert set(CONFIGS) == set(FAMILIES), "each is built, called, trained and saved below"
    for name in found & {*REFUSED}:
        with pytest.raises(ConfigError, match=f"is not supported: {REFUSED[name]}; use one of"):
            build_expert(ExpertSpec(class_name=name, config={}))


def test_build_expert_is_seeded_apart_from_torchs_generator() -> None:
    spec = ExpertSpec(config=CONFIGS["WanTransformer3DModel"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b, c = build_expert(spec, 1), build_expert(spec, 1), build_expert(spec, 2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.get_parameter("proj_out.weight"), c.get_parameter("proj_out.weight"))


def test_position_channels_tell_a_rotary_model_its_place() -> None:
    """Stock Wan gives equal predictions for equal tokens at all places; with six position channels it does not."""
    plain = CONFIGS["WanTransformer3DModel"]
    x, tokens, t = torch.zeros(1, *LATENT.shape), torch.zeros(1, 5, 16), torch.tensor([1.0])
    blind = call_expert(build_expert(ExpertSpec(config=plain), 1), x, t, tokens)
    assert torch.allclose(blind[..., :4, :4], blind[..., 4:, 4:], atol=1e-5)
    seeing_spec = ExpertSpec(config={**plain, "in_channels": 4 + 6})
    check_fits(seeing_spec, LATENT)
    seeing = call_expert(build_expert(seeing_spec, 1), x, t, tokens)
    assert seeing.shape == x.shape
    assert not torch.allclose(seeing[..., :4, :4], seeing[..., 4:, 4:], atol=1e-3)
    assert position_channels(12, 4, 8, 8).shape == (12, 4, 8, 8)


@pytest.mark.parametrize(
    ("class_name", "change", "says"),
    [
        ("UNet2DModel", {}, "not supported; use one of AllegroTransformer3DModel"),
        ("WanTransformer3DModel", {"num_layres": 2}, r"unknown keys \['num_layres'\]"),
        ("WanTransformer3DModel", {"num_attention_heads": "many"}, "refuses its config"),
        ("HunyuanVideoTransformer3DModel", {"image_condition_type": "psychic"}, "refuses its config"),
        ("WanTransformer3DModel", {"in_channels": 3}, "in_channels is 3"),
        ("WanTransformer3DModel", {"in_channels": 9}, "plus a multiple of 6"),
        ("WanTransformer3DModel", {"out_channels": 8}, "out_channels is 8 but the run's data need 4"),
        ("WanTransformer3DModel", {"text_dim": 8}, "text_dim is 8 but the run's data need 16"),
        ("WanTransformer3DModel", {"patch_size": [1, 3, 3]}, "patch of 3 does not divide the latent's height of 8"),
        ("WanTransformer3DModel", {"rope_max_seq_len": 1}, "cannot take the run's latents"),
        ("CogVideoXTransformer3DModel", {"max_text_seq_length": 226}, "max_text_seq_length is 226"),
        ("HunyuanVideoTransformer3DModel", {"pooled_projection_dim": 768}, "pooled_projection_dim is 768"),
        ("WanTransformer3DModel", {"in_channels": 4 + 6 * 17}, "at most 96"),
        ("WanTransformer3DModel", {"num_layers": 100_000}, "num_layers of 100000; allowed is from 0 to 65536"),
        ("WanTransformer3DModel", {"num_layers": 257}, "257 layers; allowed is at most 256"),
        ("HunyuanVideoTransformer3DModel", {"num_layers": 200, "num_single_layers": 57}, "258 layers|259 layers"),
        ("WanTransformer3DModel", {"patch_size": [1, 0, 4]}, "patch_size of 0; allowed is from 1"),
        ("WanTransformer3DModel", {"patch_size": [1, -4, 4]}, "patch_size of -4"),
        ("WanTransformer3DModel", {"ffn_dim": 10**9}, "ffn_dim of 1000000000"),
        ("WanTransformer3DModel", {"num_attention_heads": 60_000}, "num_attention_heads times attention_head_dim of 720000"),
        ("LTXVideoTransformer3DModel", {"patch_size_t": 0}, "patch_size_t of 0"),
        ("CogVideoXTransformer3DModel", {"patch_size": 0}, "patch_size of 0"),
        ("CogVideoXTransformer3DModel", {"sample_width": 60_000, "sample_height": 60_000}, "for its positions"),
        ("CogVideoXTransformer3DModel", {"dropout": 0.1}, "has dropout, whose masks cannot be replayed"),
    ],
)
def test_misfitting_config_raises_one_sentence(class_name: str, change: dict, says: str) -> None:
    spec = ExpertSpec(class_name=class_name, config={**CONFIGS.get(class_name, {}), **change})
    begun = time.process_time()
    with pytest.raises(ConfigError, match=says) as refusal:
        check_fits(spec, LATENT)
    assert time.process_time() - begun < 5
    assert "\n" not in str(refusal.value)
