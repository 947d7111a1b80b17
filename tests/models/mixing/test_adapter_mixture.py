"""Mixtures of adapters: one base in memory, experts switched by adapter, and folders that stock diffusers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.families import call_expert, full_config
from lutetia.models.experts.trained import load_trained, trained_parameters
from lutetia.models.mixing.adapter_experts import SHARE_OF_BASE, AdapterExperts
from lutetia.models.mixing.description import read_mixture, verify_mixture
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.pipeline import load_pipeline
from lutetia.models.tensor_files import write_tensors
from lutetia.models.warm_start import find_sources
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError, IntegrityError
from tests.cli.command_runner import failure, lutetia
from tests.models.experts.tiny_base import FILE, adapting, tiny_base
from tests.models.mixing.tiny_mixture import PIXELS, signed_anew
from tests.models.tiny_experts import CONFIGS, LATENT, OWNER, WAN, tiny_data, tiny_manifest

WAN_PIXELS = ExpertSpec(config={**CONFIGS["WanTransformer3DModel"], "in_channels": 3, "out_channels": 3, "text_dim": 64})


@dataclass(frozen=True)
class Stitched:
    folder: Path
    base: dict[str, Path]
    spec: ExpertSpec
    adapters: list[dict[str, Tensor]]


def stitched(root: Path, dora: bool = False, spec: ExpertSpec = WAN, latent=LATENT, experts: int = 3) -> Stitched:
    """Adapters with random numbers, as if they had been trained."""
    base = tiny_base(root / "base", spec)
    adapter = adapting(base, spec, rank=4, alpha=6.0, dora=dora)
    manifest = tiny_manifest(experts, expert=adapter, latent=latent, sampling={"steps": 2, "guidance": 2.0, "mode": "full"})
    adapters, files = [], []
    for shard in range(experts):
        generator = torch.Generator().manual_seed(shard)
        first = trained_parameters(load_expert(adapter, shard, base))
        moved = {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in first.items()}
        write_tensors(root / f"weights{shard}", moved)
        adapters.append(moved)
        files.append(root / f"weights{shard}")
    stitch(root / "mixture", manifest, files, build_router(manifest), (), OWNER.sign)
    return Stitched(root / "mixture", base, adapter, adapters)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Stitched:
    return stitched(tmp_path_factory.mktemp("adapters"))


def load(made: Stitched) -> MixtureTransformer:
    return MixtureTransformer.from_pretrained(made.folder / "transformer", base=made.base[FILE].parent)


@torch.no_grad()
def test_experts_share_one_base_and_answer_as_if_each_were_alone(mixture) -> None:
    """Rows that go to different experts are grouped, also where several experts are weighed."""
    loaded, data, t = load(mixture), tiny_data(3), torch.tensor([0.2, 0.5, 0.9])
    alone = []
    for tensors in mixture.adapters:
        model = load_expert(mixture.spec, 0, mixture.base)
        load_trained(model, tensors)
        alone.append(call_expert(model, data.latents[:3], t, data.tokens[:3]))
    assert torch.dist(alone[0], alone[1]) > 0.1
    for weights in (torch.eye(3), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [0.2, 0.3, 0.5]])):
        expected = torch.stack([sum(weights[row, k] * alone[k][row] for k in range(3)) for row in range(3)])  # pyright: ignore
        for _ in range(2):  # and after they were switched
            given = loaded(data.latents[:3], 1000 * t, data.tokens[:3], weights=weights, return_dict=False)[0]
            assert torch.allclose(given, expected, rtol=0, atol=1e-6)
    read = loaded._read
    assert isinstance(read, AdapterExperts)
    assert read._resident() is read._resident()
    size = sum(tensor.nbytes for tensor in mixture.adapters[0].values())
    assert size > SHARE_OF_BASE * read._base_bytes, "only one adapter of so small a base may be held"
    assert len(read._adapters) == 1
    loaded.experts_in_memory = 2
    for k in range(3):
        loaded.expert(k)(data.latents[:1], t[:1], data.tokens[:1], None)
    assert list(read._adapters) == [1, 2], "those that were used last"
    read._make_room(size)
    read._make_room(size)
    assert list(read._adapters) == [2]
    held = {tensor.data_ptr() for tensor in read._adapters[2].values()}
    assert {slot.data_ptr() for slot in read._slots.values()} == held, "the place of the adapter has no memory of its own"
    loaded.experts_in_memory = None
    loaded.free_experts()
    assert read._model is None, "the base is freed with the experts"
    again = loaded(data.latents[:3], 1000 * t, data.tokens[:3], weights=torch.eye(3), return_dict=False)[0]
    assert torch.allclose(again, torch.stack([alone[k][k] for k in range(3)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_stock_pipeline_with_a_loaded_adapter_gives_the_mixtures_latents(dora, mixture, tmp_path, monkeypatch) -> None:
    made = stitched(tmp_path, dora=True, experts=2) if dora else mixture
    loaded, data = load(made), tiny_data(2)
    network: Any = WanTransformer3DModel.from_config(full_config(made.spec))
    stock: Any = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=network)  # pyright: ignore
    network.load_state_dict(WanTransformer3DModel.from_pretrained(_as_transformer(made)).state_dict())
    stock.load_lora_weights(str(made.folder / "expert_000"))
    ours: Any = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer=loaded)  # pyright: ignore
    latents, first = [], torch.eye(len(made.adapters))[:1]
    for pipe, options in ((stock, {}), (ours, {"attention_kwargs": {"routing_text": torch.zeros(2, 8), "mode": "top1"}})):
        if pipe is ours:
            monkeypatch.setattr(loaded, "route", lambda x, *_, **__: first.expand(len(x), -1))
        pipe.set_progress_bar_config(disable=True)
        latents.append(pipe(
            prompt_embeds=data.tokens, negative_prompt_embeds=data.tokens * 0, guidance_scale=2.0, height=64, width=64,
            num_frames=13, num_inference_steps=3, output_type="latent", return_dict=False, latents=data.latents.clone(),
            **options,
        )[0])  # fmt: skip
    apart = torch.dist(*latents) / latents[0].norm()
    assert apart <= 1e-6, apart


def _as_transformer(made: Stitched) -> Path:
    folder = made.base[FILE].parent
    (folder / "config.json").write_text(json.dumps({"_class_name": made.spec.class_name, **full_config(made.spec)}))
    return folder


def test_folder_describes_base_and_adapters_and_is_verified(mixture) -> None:
    document = verify_mixture(mixture.folder, [OWNER.public_key])
    assert document.network is not None
    assert document.network.adapter == mixture.spec.adapter
    names = {path.relative_to(mixture.folder).as_posix() for path in (mixture.folder / "expert_000").iterdir()}
    assert names == {"expert_000/pytorch_lora_weights.safetensors"}
    assert "load_lora_weights" in (mixture.folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="holds adapters, not whole experts"):
        find_sources(str(mixture.folder), ["a", "b", "c"], None)


def test_base_that_is_missing_or_another_is_refused_before_sampling(mixture, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"adapt tiny/base@0123456 .* not on this machine; name its folder .* or allow to"):
        load_pipeline(mixture.folder)
    other = tiny_base(tmp_path, seed=12)
    with pytest.raises(ConfigError, match=rf"{other[FILE]} is not {FILE} of the run's base tiny/base@0123456: its digest is"):
        load_pipeline(mixture.folder, base=tmp_path)
    with pytest.raises(ConfigError, match="lacks diffusion_pytorch_model.safetensors"):
        load_pipeline(mixture.folder, base=tmp_path / "nowhere")


def test_export_writes_one_adapter_as_a_single_file(mixture, tmp_path) -> None:
    run = lutetia("swarm", "export", mixture.folder, tmp_path / "lora.safetensors", "--expert", "shard 1", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["base"] == "tiny/base@0123456"
    written = load_file(tmp_path / "lora.safetensors")
    name = "blocks.0.attn1.to_q.lora_B.weight"
    assert torch.allclose(written["diffusion_model.blocks.0.self_attn.q.lora_B.weight"], mixture.adapters[1][name] * 1.5)
    unknown = lutetia("swarm", "export", mixture.folder, tmp_path / "none.safetensors", "--expert", "9", "--json")
    assert "has no expert '9'; it has shard 0, shard 1, shard 2" in failure(unknown)["message"]


def test_pipeline_samples_from_adapters_and_follows_a_change_of_dtype(tmp_path) -> None:
    made = stitched(tmp_path, spec=WAN_PIXELS, latent=PIXELS, experts=2)
    pipe = load_pipeline(made.folder, base=made.base[FILE].parent)

    def sampled() -> Tensor:
        return torch.from_numpy(pipe(["a red square"], expert=1, seed=0).frames)

    exact = sampled()
    pipe.to(torch.bfloat16)
    assert 0 < torch.dist(exact, sampled()) / exact.norm() < 0.1
    pipe.to(torch.float32)
    assert torch.equal(sampled(), exact)


def test_adapter_of_another_form_in_a_signed_mixture_is_refused(tmp_path) -> None:
    made = stitched(tmp_path, experts=2)
    write_tensors(made.folder / "expert_000" / "pytorch_lora_weights.safetensors", {"transformer.x": torch.zeros(3)})
    signed_anew(made.folder)
    with pytest.raises(IntegrityError, match="does not hold the adapter"):
        load(made).expert(0)
    assert read_mixture(made.folder).mixture.network
