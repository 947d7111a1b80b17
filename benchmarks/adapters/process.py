"""Measures in a process of its own what experts on one base take: `python -m … RANK DTYPE PRECISION`, JSON on stdout."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from benchmarks.fuzz.examples import LATENT, OWNER, blob
from lutetia.models.experts.families import build_expert, call_expert, weight_schema
from lutetia.models.experts.trained import trained_parameters
from lutetia.models.mixing.adapter_experts import AdapterExperts
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.tensor_files import write_tensors
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseDtype, BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

COUNTS = (1, 2, 4, 8)
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


@torch.no_grad()
def main(rank: int, dtype: BaseDtype, precision: str) -> dict[str, float | list[float]]:
    """The figures; `precision` is that of the mixture, in which adapters are held."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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
        before = resident()
        mixture = MixtureTransformer.from_pretrained(
            folder / "mixture" / "transformer", base=folder, torch_dtype=getattr(torch, precision)
        )
        x, tokens = torch.randn(1, *LATENT.shape), torch.randn(1, LATENT.text_tokens, LATENT.text_width)
        x, tokens, t = x.to(mixture.dtype), tokens.to(mixture.dtype), torch.tensor([0.5])

        def ask(k: int) -> float:
            began = time.perf_counter()
            mixture.expert(k)(x, t, tokens, None)
            return time.perf_counter() - began

        assert isinstance(mixture._read, AdapterExperts)
        model = mixture._read._resident()
        call_expert(model, x, t, tokens)  # what is read from a file counts once it is used
        slot = sum(p.numel() * p.element_size() for p in trained_parameters(model).values())
        base_bytes = resident() - before - slot
        shares = []
        for k in range(max(COUNTS)):
            ask(k)
            if k + 1 in COUNTS:
                shares.append((resident() - before) / base_bytes)
        again = [ask(0) for _ in range(5)]
        switched = [ask(k % 2 + 1) for k in range(10)]
    adapter = sum(torch.Size(shape).numel() for shape, _ in schema.values())
    return {
        "parameters": parameters, "adapter": adapter, "base": base_bytes, "shares": shares,
        "switch": sorted(switched)[5] - sorted(again)[2],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], sys.argv[3])))  # pyright: ignore[reportArgumentType]
