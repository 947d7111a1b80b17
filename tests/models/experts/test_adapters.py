"""Experts that are adapters: only the adapter is trained, published, checked and replayed, on a base that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lutetia.models.experts.adapters.base_model import build_base
from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.adapters.frozen_linear import FrozenLinear
from lutetia.models.experts.families import build_expert, call_expert, construct, weight_schema
from lutetia.models.experts.trained import trained_parameters
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError
from tests.models.experts.tiny_base import FILE, adapting, tiny_base
from tests.models.tiny_experts import CONFIGS, LATENT, WAN, tiny_data

DTYPES = ["float32", "bfloat16", "fp8", "nf4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Path]:
    return tiny_base(tmp_path_factory.mktemp("base"))


def answer(model: torch.nn.Module, **autocast: Any) -> torch.Tensor:
    data = tiny_data(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        return call_expert(model, data.latents, torch.tensor([0.3, 0.8]), data.tokens, data.pooled)


def trained_a_little(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("class_name", sorted(CONFIGS))
def test_new_adapter_of_each_class_answers_like_its_base(class_name, tmp_path) -> None:
    spec = ExpertSpec(class_name=class_name, config=CONFIGS[class_name])
    files = tiny_base(tmp_path, spec)
    model = load_expert(adapting(files, spec), 1, files)
    expected = answer(build_expert(spec, 11))
    assert torch.allclose(answer(model), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(answer(trained_a_little(model)), expected, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_schema_names_only_what_is_trained(dora, base) -> None:
    spec = adapting(base, dora=dora)
    model = load_expert(spec, 1, base)
    parameters = trained_parameters(model)
    assert weight_schema(spec) == {name: (tuple(p.shape), torch.float32) for name, p in parameters.items()}
    assert len(parameters) == 8 * (3 if dora else 2)
    assert all(".lora_" in name and "default" not in name for name in parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_reach_the_adapter_through_a_base_of_any_dtype(dtype, dora, base) -> None:
    """The same gradients as through ordinary layers with the unpacked weights, in float32 and under autocast."""
    spec = adapting(base, dtype=dtype, dora=dora)
    model, plain = (trained_a_little(load_expert(spec, 1, base)) for _ in range(2))
    frozen = [layer for layer in plain.modules() if isinstance(layer, FrozenLinear)]
    assert bool(frozen) == (dtype != "float32")
    for parent in list(plain.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, FrozenLinear):
                linear = torch.nn.Linear(layer.in_features, layer.out_features)
                linear.load_state_dict({"weight": layer.weight, "bias": layer.bias})
                setattr(parent, name, linear.requires_grad_(False))
    for autocast in ({}, {"on": True}):
        for each in (model, plain):
            each.zero_grad()
            answer(each, **autocast).square().mean().backward()
        for name, parameter in trained_parameters(model).items():
            other = trained_parameters(plain)[name].grad
            assert parameter.grad is not None
            assert other is not None
            tolerance = 0.05 if autocast else 1e-5
            assert torch.dist(parameter.grad, other) <= tolerance * other.norm(), name


def test_dtype_of_the_base_is_part_of_the_function(base) -> None:
    answers = {dtype: answer(load_expert(adapting(base, dtype=dtype), 1, base)) for dtype in DTYPES}
    apart = {dtype: (torch.dist(answers[dtype], answers["float32"]) / answers["float32"].norm()).item() for dtype in DTYPES}
    assert apart["float32"] == 0 < apart["bfloat16"] < apart["fp8"] < apart["nf4"] < 0.3


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_base_keeps_its_dtype_when_the_model_is_cast(dtype, base) -> None:
    model = load_expert(adapting(base, dtype=dtype), 1, base)
    layer = next(layer for layer in model.modules() if isinstance(layer, FrozenLinear))
    before = layer.weight
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight, before)
    assert next(iter(trained_parameters(model).values())).dtype == torch.bfloat16


def _cut(weights):
    del weights["proj_out.weight"]


def _shape(weights):
    weights["blocks.0.attn1.to_q.weight"] = torch.zeros(3, 3)


def _foreign(weights):
    weights["backdoor"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("damage", "text"), [(_cut, "lacks 1 tensors"), (_shape, r"has shape \[3, 3\]"), (_foreign, "'backdoor'")]
)
def test_base_of_another_network_is_refused(damage, text, base, tmp_path) -> None:
    weights = load_file(base[FILE])
    damage(weights)
    save_file(weights, tmp_path / FILE)
    with pytest.raises(ConfigError, match=text):
        build_base(lambda: construct(WAN), {FILE: tmp_path / FILE}, "bfloat16")


def test_expert_without_its_base_is_refused(base) -> None:
    with pytest.raises(ConfigError, match=r"adapts tiny/base@0123456, which was not given"):
        load_expert(adapting(base), 1, None)


@pytest.mark.parametrize(("target", "text"), [("to_x", "names no layer"), ("attn1", "is not a linear layer")])
def test_target_that_cannot_be_adapted_is_refused(target, text, base) -> None:
    with pytest.raises(ConfigError, match=text):
        weight_schema(adapting(base, targets=(target,)))


def test_random_base_needs_no_files() -> None:
    spec = adapting({FILE: Path(__file__)}, dtype="fp8")
    assert answer(load_expert(spec, 1, "random")).shape == (2, *LATENT.shape)
