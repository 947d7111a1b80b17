"""The router: a small DiT classifier that tells from (noisy latent, t, pooled text) which shard a clip comes from.

The flow of all data is the sum of the clusters' flows weighted by p(cluster | x_t, t, text) (DDM, arXiv 2501.05450). So the
router must be *calibrated*, not only accurate: it is trained by cross-entropy on shards drawn by their priors (never balanced),
and its accuracy and calibration error are reported per bin of t.

At t = 1 the latent is pure noise and carries no information, so the router's input is weighted by 1 - t, the share of data in it.
The first decision of a path, which the later ones tend to follow, then depends on the text alone (on the priors, without text).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lutetia.models.experts.families import TIMESTEPS
from lutetia.models.tensor_files import read_document, write_tensors
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import RouterSpec
from lutetia.system.errors import IntegrityError

MAX_PATCHES = 32  # keeps the router's cost near a tenth of an expert's, even for tiny experts


class VideoRouter(ModelMixin, ConfigMixin):
    """Logits over experts `[B, K]` from noisy latents `[B, C, F, H, W]`, flow time `[B]` and pooled text `[B, P]`.

    Saves and loads like every diffusers model.

    Args:
        experts: K.
        channels: C.
        latent_size: (F, H, W) of the first bucket; latents of other buckets are resized.
        patch_size: frames, height and width of a patch; each divides the latent's.
        pooled_width: P; 0 makes a router that does not read the text.
        hidden: width of the blocks.
        layers: number of blocks.
        weighted: multiply the latents by 1 - t. Saved routers without this entry were trained without it.
    """

    @register_to_config
    def __init__(
        self,
        experts: int,
        channels: int,
        latent_size: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        pooled_width: int = 0,
        hidden: int = 96,
        layers: int = 3,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        self.weighted, self.latent_size = weighted, tuple(latent_size)
        heads = max(1, hidden // 32)
        patches = math.prod(size // patch for size, patch in zip(latent_size, patch_size, strict=True))
        p_t, p_h, p_w = patch_size  # a list if it was read from a file
        self.embed = nn.Conv3d(channels, hidden, (p_t, p_h, p_w), (p_t, p_h, p_w))
        self.place = nn.Parameter(torch.randn(1, patches, hidden) * 0.02)
        self.wave = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time = TimestepEmbedding(64, hidden)
        self.text = nn.Sequential(nn.RMSNorm(pooled_width, eps=1e-6), nn.Linear(pooled_width, hidden)) if pooled_width else None
        self.blocks = nn.ModuleList(_Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(2 * hidden, experts)

    def forward(self, hidden_states: Tensor, time: Tensor, pooled: Tensor | None = None) -> Tensor:
        condition = self.time(self.wave(time * TIMESTEPS).to(hidden_states.dtype))
        if self.text is not None and pooled is not None:
            condition = condition + self.text(pooled)
        hidden_states = resized(hidden_states, self.latent_size)
        if self.weighted:
            hidden_states = hidden_states * (1 - time).to(hidden_states.dtype).view(-1, 1, 1, 1, 1)
        x = self.embed(hidden_states).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x, condition)
        return self.head(torch.cat([self.norm(x).mean(1), condition], dim=1))


def resized(latents: Tensor, size: tuple[int, ...]) -> Tensor:
    """Latents [B, C, F, H, W] of any bucket in the size (F, H, W) of the first one.

    Every value is one of the latents (nearest neighbours), because averages would have less noise than their time says.
    """
    if tuple(latents.shape[2:]) == tuple(size):
        return latents
    return nn.functional.interpolate(latents, size=tuple(size), mode="nearest-exact")


class _Block(nn.Module):
    """A DiT block (adaLN-zero) at half the usual MLP width."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(hidden, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        nn.init.zeros_(self.modulation[1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.modulation[1].bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def build_router(manifest: Manifest, seed: int = 0) -> VideoRouter:
    """The run's router, newly initialised."""
    return router_of(manifest.latent, manifest.router, len(manifest.shards), seed)


def router_of(latent: LatentSpec, spec: RouterSpec, experts: int, seed: int = 0, weighted: bool = True) -> VideoRouter:
    """A newly initialised router among `experts` experts for such latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoRouter(
            experts=experts,
            channels=latent.channels,
            latent_size=latent.shape[1:],
            patch_size=_patch_size(latent.shape[1:]),
            pooled_width=latent.pooled_width if spec.text_conditioned else 0,
            hidden=spec.hidden,
            layers=spec.layers,
            weighted=weighted,
        )


def write_router(router: VideoRouter, path: Path) -> None:
    """Write the router's weights to one file, whole or not at all. Raises DiskError."""
    write_tensors(path, {name: tensor.cpu() for name, tensor in router.state_dict().items()}, {"weighted": router.weighted})


def read_router(manifest: Manifest, path: Path) -> VideoRouter:
    """The run's router with weights written by `write_router`. Raises IntegrityError if they are of another model."""
    try:
        with safe_open(path, "pt") as file:
            weighted = bool(read_document(file.metadata()).get("weighted", False))
        router = router_of(manifest.latent, manifest.router, len(manifest.shards), weighted=weighted)
        router.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"{path.name} is not the router of this run; train it again") from error
    return router.eval()


def _patch_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """A patch that gives at most MAX_PATCHES: divide the longest axis by its smallest factor until it does."""
    counts, patch = list(size), [1, 1, 1]
    while math.prod(counts) > MAX_PATCHES:
        axis = max(range(3), key=lambda a: counts[a])
        factor = next(n for n in range(2, counts[axis] + 1) if counts[axis] % n == 0)
        patch[axis], counts[axis] = patch[axis] * factor, counts[axis] // factor
    return patch[0], patch[1], patch[2]
