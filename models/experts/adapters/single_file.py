"""An adapter as one file in the names of the model's original release, which ComfyUI and programs like it read. Imports no torch.

Each of its tensors is called `diffusion_model.<layer>.lora_A.weight` or `….lora_B.weight`; alpha / rank is multiplied into B, so
that no reader has to know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from lutetia.models.experts.adapters.lora_file import published_of
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError
from lutetia.system.files import atomic_path

_PREFIX = "diffusion_model."
_NAMES: Mapping[str, Mapping[str, str]] = {
    "WanTransformer3DModel": {
        ".attn1.": ".self_attn.", ".attn2.": ".cross_attn.", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.",
        ".to_out.0.": ".o.", ".add_k_proj.": ".k_img.", ".add_v_proj.": ".v_img.", ".ffn.net.0.proj.": ".ffn.0.",
        ".ffn.net.2.": ".ffn.2.",
    },
    "LTXVideoTransformer3DModel": {},
}  # fmt: skip
"""Parts of a layer's name in diffusers, and in the original release, whose names LTX shares. Only layers of blocks are named."""


def write_single_file(lora: Path, target: Path, network: ExpertSpec) -> None:
    """Write the adapter of a mixture's expert as a single file.

    Args:
        lora: its checked `pytorch_lora_weights.safetensors`.
        target: the file to write.
        network: the mixture's network, with its adapter.

    Raises ConfigError when the network's class has no such form, or the adapter is a DoRA; DiskError.
    """
    adapter, names = network.adapter, _NAMES.get(network.class_name)
    if adapter is None or names is None:
        raise ConfigError(
            f"adapters of {network.class_name} have no single-file form that other programs read; use its folder with diffusers' "
            "load_lora_weights"
        )
    if adapter.dora:
        raise ConfigError("programs disagree on how a DoRA is read from a single file; use its folder with load_lora_weights")
    with safe_open(lora, framework="numpy") as file:
        tensors = {published_of(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    scale = adapter.alpha / adapter.rank
    named = {_original(name, names): tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    with atomic_path(target) as temporary:
        save_file(named, temporary, metadata={"format": "pt"})


def _original(name: str, names: Mapping[str, str]) -> str:
    if "blocks." not in name:
        raise ConfigError(f"{name.partition('.lora_')[0]} lies outside the blocks and has no agreed name in single files")
    for part, original in names.items():
        name = name.replace(part, original)
    return _PREFIX + name
