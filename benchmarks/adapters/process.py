"""What experts on one base take, in a process of its own: `python -m … STAGE FOLDER RANK DTYPE PRECISION`, JSON on stdout.

The stages: `make` writes base and mixture into the folder, `alone` loads the base, `mixture` the mixture.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.fuzz.examples import LATENT, OWNER, blob
from lutetia.models.experts.adapters.base_model import build_base
from lutetia.models.experts.families import build_expert, call_expert, construct, weight_schema
from lutetia.models.mixing.adapter_experts import cast_parameters
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.tensor_files import write_tensors
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseDtype, BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

Figures = dict[str, float | list[float]]
COUNTS = (1, 2, 4, 8)
SWITCHES = 10
"""Between two experts in memory, and through all, some of which are read again."""
NETWORK = ExpertSpec(
    config={
        "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4,
        "text_dim": 16, "freq_dim": 256, "ffn_dim": 3072, "num_layers": 17, "rope_max_seq_len": 64,
    }
)  # fmt: skip
_FILE = "diffusion_pytorch_model.safetensors"


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def run_of(spec: ExpertSpec) -> Manifest:
    experts = max(COUNTS)
    shards = tuple(
        ShardSpec(index=k, name=f"shard {k}", train=blob(), holdout=blob(), clips=8, holdout_clips=8, prior=1 / experts)
        for k in range(experts)
    )
    return Manifest(
        name="adapters", owner=OWNER.public_key, coordinators=(OWNER.public_key,), created=1.0, expires=2.0, latent=LATENT,
        expert=spec, shards=shards, samples_per_shard=8, checkpoint_samples=8, optimisation=Optimisation(batch=4),
    )  # fmt: skip


def make(folder: Path, rank: int, dtype: BaseDtype) -> Figures:
    """Write a base and a mixture of adapters on it."""
    model = build_expert(NETWORK, 0)
    parameters = sum(p.numel() for p in model.parameters())
    write_tensors(folder / _FILE, {key: tensor.contiguous() for key, tensor in model.state_dict().items()})
    del model
    base = BaseSpec(source="base", files={_FILE: ChunkTable.of_file(folder / _FILE).ref}, dtype=dtype)
    spec = NETWORK.model_copy(update={"adapter": AdapterSpec(rank=rank, alpha=rank, base=base)})
    schema = weight_schema(spec)
    for k in range(max(COUNTS)):
        write_tensors(folder / f"weights{k}", {key: 0.01 * torch.randn(shape) for key, (shape, _) in schema.items()})
    manifest = run_of(spec)
    stitch(folder / "mixture", manifest, [folder / f"weights{k}" for k in range(max(COUNTS))], build_router(manifest))
    return {"parameters": parameters, "adapter": sum(torch.Size(shape).numel() for shape, _ in schema.values())}


@torch.no_grad()
def alone(folder: Path, dtype: BaseDtype, precision: torch.dtype) -> Figures:
    """What the base takes without any adapter, after it was asked once: what is read from a file counts once it is used."""
    before = resident()
    model = cast_parameters(build_base(lambda: construct(NETWORK), {_FILE: folder / _FILE}, dtype).eval(), precision)
    x, t, tokens = _question(precision)
    call_expert(model, x, t, tokens)
    return {"base": resident() - before}


@torch.no_grad()
def mixture(folder: Path, precision: torch.dtype) -> Figures:
    """What the mixture takes when 1, 2, … of its experts have been asked, and how long a switch between experts takes."""
    before = resident()
    loaded = MixtureTransformer.from_pretrained(folder / "mixture" / "transformer", base=folder, torch_dtype=precision)
    x, t, tokens = _question(precision)

    def ask(k: int) -> float:
        began = time.perf_counter()
        loaded.expert(k)(x, t, tokens, None)
        return time.perf_counter() - began

    def more(k: int) -> float:
        """Seconds that asking another expert takes more than asking it again: one after the other, so that load hits both."""
        switched = ask(k)
        return switched - ask(k)

    experts = []
    for k in range(max(COUNTS)):
        ask(k)
        if k + 1 in COUNTS:
            experts.append(resident() - before)
    ask(0)
    held = [more(k % 2) for k in range(1, SWITCHES + 1)]
    return {"experts": experts, "switch": held, "read": [more(k % max(COUNTS)) for k in range(2, SWITCHES + 2)]}


def _question(precision: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *LATENT.shape, generator=generator)
    tokens = torch.randn(1, LATENT.text_tokens, LATENT.text_width, generator=generator)
    return x.to(precision), torch.tensor([0.5]), tokens.to(precision)


def main(stage: str, folder: Path, rank: int, dtype: BaseDtype, precision: str) -> Figures:
    """The figures of a stage; `precision` is the data type of the mixture, in which adapters are held."""
    if stage == "make":
        return make(folder, rank, dtype)
    return alone(folder, dtype, getattr(torch, precision)) if stage == "alone" else mixture(folder, getattr(torch, precision))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])))  # pyright: ignore[reportArgumentType]
