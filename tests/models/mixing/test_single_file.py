"""Single files of adapters, read back by diffusers' own loader of the original names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from safetensors.torch import load_file

from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.adapters.lora_file import write_lora
from lutetia.models.experts.adapters.single_file import write_single_file
from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.experts.trained import load_trained, trained_parameters
from lutetia.models.tensor_files import write_tensors
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError
from tests.models.experts.tiny_base import adapting, tiny_base
from tests.models.tiny_experts import CONFIGS, tiny_data

ALL = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")


@pytest.mark.parametrize(
    ("class_name", "pipeline", "targets"),
    [("WanTransformer3DModel", WanPipeline, ALL), ("LTXVideoTransformer3DModel", LTXPipeline, ALL)],
)
@torch.no_grad()
def test_single_file_gives_a_stock_pipeline_the_same_network(class_name, pipeline, targets, tmp_path) -> None:
    network = ExpertSpec(class_name=class_name, config=CONFIGS[class_name])
    base = tiny_base(tmp_path / "base", network)
    spec = adapting(base, network, rank=4, alpha=6.0, targets=targets)
    expert = load_expert(spec, 0, base)
    moved = {name: p + 0.1 * torch.randn_like(p) for name, p in trained_parameters(expert).items()}
    load_trained(expert, moved)
    write_tensors(tmp_path / "weights", moved)
    assert spec.adapter
    write_lora(tmp_path / "weights", tmp_path / "lora.safetensors", spec.adapter)
    write_single_file(tmp_path / "lora.safetensors", tmp_path / "single.safetensors", spec)
    assert all(name.startswith("diffusion_model.") for name in load_file(tmp_path / "single.safetensors"))
    stock = build_expert(network, 11)
    state = pipeline.lora_state_dict(str(tmp_path / "single.safetensors"))
    pipeline.load_lora_into_transformer(state, stock)
    data, t = tiny_data(2), torch.tensor([0.3, 0.8])
    ours, theirs = (call_expert(model, data.latents, t, data.tokens) for model in (expert, stock))
    assert torch.dist(ours, theirs) <= 1e-6 * ours.norm()
    assert torch.dist(ours, call_expert(build_expert(network, 11), data.latents, t, data.tokens)) > 1e-2 * ours.norm()


@pytest.mark.parametrize(
    ("class_name", "options", "text"),
    [
        ("CogVideoXTransformer3DModel", {}, "have no single-file form"),
        ("WanTransformer3DModel", {"dora": True}, "disagree on how a DoRA is read"),
    ],
)
def test_adapter_without_a_single_file_form_is_refused(class_name, options, text, tmp_path) -> None:
    network = ExpertSpec(class_name=class_name, config=CONFIGS[class_name])
    spec = adapting({"a.safetensors": Path(__file__)}, network, **options)
    with pytest.raises(ConfigError, match=text):
        write_single_file(tmp_path / "none", tmp_path / "out", spec)
