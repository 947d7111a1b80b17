"""Tiny stitched mixtures for tests, and what a hostile or careless hand does to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from lutetia.models.mixing.description import FILE, SignedMixture, read_mixture
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.training.trainer import ExpertTrainer, write_weights
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentShape, LatentSpec
from tests.models.tiny_experts import CONFIGS, OWNER, tiny_data, tiny_manifest

PIXELS = LatentSpec(
    channels=3, frames=4, height=8, width=8, vae="pixels", pixel_frames=4, pixel_height=8, pixel_width=8, fps=6,
    text_encoder="builtin:words", text_tokens=6, text_width=64, pooled_width=64,
)  # fmt: skip
WAN_PIXELS = ExpertSpec(config={**CONFIGS["WanTransformer3DModel"], "in_channels": 9, "out_channels": 3, "text_dim": 64})


def pixel_mixture(root: Path, buckets: tuple[LatentShape, ...] = ()) -> Path:
    """Two experts on pixels, with position channels and the text encoder that needs no weights."""
    latent = PIXELS.model_copy(update={"buckets": buckets})
    return _stitched(root, 2, WAN_PIXELS, latent, {"steps": 2, "guidance": 2.0})


def compressed_mixture(root: Path, shards: int = 1) -> Path:
    """Experts on latents; the autoencoder was a local folder that no longer exists."""
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    autoencoder.save_pretrained(root / "autoencoder")
    (root / "autoencoder" / "README.md").write_text("not needed")
    size = {"pixel_height": 16, "pixel_width": 16, "mean": (0.5,) * 4, "std": (2.0,) * 4}
    latent = PIXELS.model_copy(update={"channels": 4, "vae": str(root / "autoencoder"), **size})
    spec = ExpertSpec(config={**CONFIGS["WanTransformer3DModel"], "text_dim": 64})
    folder = _stitched(root, shards, spec, latent, {"steps": 2})
    shutil.rmtree(root / "autoencoder")
    return folder


def _stitched(root: Path, shards: int, spec: ExpertSpec, latent: LatentSpec, sampling: dict[str, Any]) -> Path:
    manifest = tiny_manifest(shards, expert=spec, latent=latent, sampling=sampling)
    files = [root / f"weights{shard}" for shard in range(shards)]
    for shard, file in enumerate(files):
        write_weights(ExpertTrainer(manifest, shard, tiny_data(latent=latent)).snapshot(), file)
    stitch(root / "mixture", manifest, files, build_router(manifest) if shards > 1 else None, (), OWNER.sign)
    return root / "mixture"


def signed_anew(folder: Path) -> None:
    """Describe and sign the files as they are, as a hostile coordinator would."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    files = {name: ChunkTable.of_file(folder / name).ref for name in names}
    document = read_mixture(folder).mixture.model_copy(update={"files": files})
    (folder / FILE).write_text(SignedMixture.sign(document, OWNER.sign).model_dump_json())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
