"""A tiny base in files, and experts that adapt it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lutetia.models.experts.families import build_expert
from lutetia.models.tensor_files import write_tensors
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from tests.models.tiny_experts import WAN

FILE = "diffusion_pytorch_model.safetensors"


def tiny_base(folder: Path, spec: ExpertSpec = WAN, seed: int = 11) -> dict[str, Path]:
    """Random weights of the network of `spec` in a file, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / FILE, {name: tensor.contiguous() for name, tensor in build_expert(spec, seed).state_dict().items()})
    return {FILE: folder / FILE}


def adapting(files: dict[str, Path], spec: ExpertSpec = WAN, dtype: Any = "float32", **fields: Any) -> ExpertSpec:
    """`spec` as an adapter on the base in `files`; `fields` are those of AdapterSpec."""
    refs = {name: ChunkTable.of_file(path).ref for name, path in files.items()}
    base = BaseSpec(source="tiny/base@0123456", files=refs, dtype=dtype)
    return spec.model_copy(update={"adapter": AdapterSpec(**{"rank": 4, "alpha": 8.0, **fields}, base=base)})
