"""Sizes of video autoencoders that their configs do not name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ltx_ratios(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels of a side and frames per latent of AutoencoderKLLTXVideo, from its config, as its class computes them."""
    scaled = vae.get("spatio_temporal_scaling", (True, True, True, False))
    space = vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * 2 ** sum(map(bool, scaled))
    time = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * 2 ** sum(map(bool, scaled))
    return int(space), int(time)
