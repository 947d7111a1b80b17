"""The experts that are measured: networks from 0.16 M to more than 20 M parameters, and adapters on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.gpu.runs import NO_BLOB, OWNER
from benchmarks.teams.clips import LATENT
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.manifest import Manifest, ShardSpec
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseSpec
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation

POSITIONS = 18
"""Position channels that every network gets beside those of the latents."""


def network(heads: int, width: int, hidden: int, layers: int) -> ExpertSpec:
    """A transformer of `layers` blocks with `heads` heads of `width` numbers."""
    return ExpertSpec(
        config={
            "patch_size": [1, 4, 4], "num_attention_heads": heads, "attention_head_dim": width,
            "in_channels": LATENT.channels + POSITIONS, "out_channels": LATENT.channels, "text_dim": LATENT.text_width,
            "freq_dim": 64, "ffn_dim": hidden, "num_layers": layers, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One size of expert.

    Attributes:
        expert: its network.
        rate: the learning rate that the rates of the cells are multiples of.
        base_steps: steps for which the base of its adapters is trained; 0: the whole network is trained.
        base_rate: learning rate of that training.
    """

    expert: ExpertSpec
    rate: float
    base_steps: int = 0
    base_rate: float = 2.5e-3


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "0.16M": Size(network(4, 16, 160, 2), 5e-3),
        "1.25M": Size(network(4, 32, 512, 4), 2.5e-3),
        "21M": Size(network(8, 64, 1536, 5), 6e-4),
        "adapters": Size(network(4, 32, 512, 4), 5e-3, base_steps=1500),
        "toy": Size(network(2, 12, 32, 1), 5e-3),
    }
)
"""By the name on the command line. `toy` is for tests."""


def adapter_on(expert: ExpertSpec, base: Path, rank: int = 8) -> ExpertSpec:
    """Adapters on the network whose weights file is `base`."""
    spec = BaseSpec(source="benchmark", files={base.name: ChunkTable.of_file(base).ref}, dtype="float32")
    return expert.model_copy(update={"adapter": AdapterSpec(rank=rank, alpha=float(rank), base=spec)})


def run_of(expert: ExpertSpec, batch: int, clips: int, seed: int) -> Manifest:
    """A run that fixes the order of clips, noise and times of one shard. Rates and budgets are not its own: loops give them."""
    shard = ShardSpec(index=0, name="digits", train=NO_BLOB, holdout=NO_BLOB, clips=clips, holdout_clips=1, prior=1.0)
    optimisation = Optimisation(
        batch=batch, beta2=0.95, weight_decay=0.01, warmup_steps=30, ema_decay=0.98, text_dropout=0.1
    )  # fmt: skip
    return Manifest(
        name=f"teams {seed}", owner=OWNER.public_key, coordinators=(OWNER.public_key,), created=1.0, expires=4e9,
        latent=LATENT, expert=expert, shards=(shard,), samples_per_shard=batch, checkpoint_samples=batch,
        optimisation=optimisation,
    )  # fmt: skip
