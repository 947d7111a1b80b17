"""Adapters in the files that diffusers' `load_lora_weights` reads. Imports no torch.

A checkpoint names tensors as the trained parameters; this layout puts `transformer.` before them and carries rank, alpha and
targets in the header, written here from the manifest, because a file's own header comes from a volunteer.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from lutetia.protocol.schema.model.adapter import AdapterSpec

LORA_FILE = "pytorch_lora_weights.safetensors"
_PREFIX, _LENGTHS = "transformer.", ".lora_magnitude_vector"
_METADATA = "lora_adapter_metadata"


def layout_name(name: str) -> str:
    """The name of a published tensor in a LoRA file."""
    name = name.removesuffix(".weight") if name.endswith(f"{_LENGTHS}.weight") else name
    return _PREFIX + name


def published_of(name: str) -> str:
    """The published name of a tensor of a LoRA file."""
    name = name.removeprefix(_PREFIX)
    return f"{name}.weight" if name.endswith(_LENGTHS) else name


def write_lora(weights: Path, target: Path, adapter: AdapterSpec) -> None:
    """Write the checked weights of a checkpoint as a LoRA file, with equal bytes for equal weights."""
    with safe_open(weights, framework="numpy") as file:
        tensors = {layout_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    settings = {
        "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": list(adapter.targets), "use_dora": adapter.dora,
    }  # fmt: skip
    metadata = {_PREFIX + name: value for name, value in settings.items()}
    save_file(tensors, target, metadata={_METADATA: json.dumps(metadata, sort_keys=True)})
