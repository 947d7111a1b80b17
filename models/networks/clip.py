"""CLIP text-video similarity and the aesthetic score, by their real loaders.

Similarity: cosine between the prompt's and each frame's CLIP embedding, averaged over frames. Aesthetic: LAION's predictor, one
linear layer or a small stack of them on the unit image embedding, read from safetensors; averaged over frames too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutetia.models.networks.assets import asset, load_tensors
from lutetia.models.networks.model_ref import fingerprint, hub_errors, parse_ref
from lutetia.system.errors import IntegrityError


class ClipModel:
    """A CLIP model from a folder or hub id. Raises ConfigError when it cannot be loaded."""

    def __init__(self, ref: str, device: str = "cpu", frames: int = 8, batch: int = 32) -> None:
        """`frames` evenly spaced frames of every clip are looked at."""
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        found = parse_ref(ref, "CLIP", ())
        with hub_errors("CLIP", found):
            model: Any = CLIPModel.from_pretrained(found.location, use_safetensors=True, **found.options)
            # the processor of the saved model itself, since sizes and means differ between CLIPs
            self.processor: Any = CLIPImageProcessor.from_pretrained(found.location, **found.options)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(found.location, **found.options)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device, self.frames, self.batch = device, frames, batch
        self.tag = f"clip-image/{frames}/{fingerprint(found)}"

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of the prompts, float32 on the CPU; longer prompts lose their end, as in CLIP."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            tokens = self.tokenizer(
                list(prompts[start : start + self.batch]), padding=True, truncation=True, return_tensors="pt"
            ).to(self.device)
            parts.append(_vectors(self.model.get_text_features(**tokens)))
        return torch.cat(parts)

    @torch.inference_mode()
    def images(self, clips: Tensor) -> Tensor:
        """Unit vectors [N, frames, D] of evenly spaced frames of clips uint8 [N, F, H, W, 3]."""
        chosen = clips[:, spread(clips.shape[1], self.frames)]
        flat = chosen.flatten(0, 1)
        parts = []
        for start in range(0, len(flat), self.batch):
            pictures = list(flat[start : start + self.batch].numpy())
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
            parts.append(_vectors(self.model.get_image_features(pixel_values=pixels)))
        return torch.cat(parts).unflatten(0, chosen.shape[:2])

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        """For the cache of features: {"frames": [N, frames * D]}."""
        return {"frames": self.images(clips).flatten(1)}

    def similarity(self, images: Tensor, text: Tensor) -> Tensor:
        """Frame-averaged cosine [N] of frame vectors [N, frames, D] with one prompt vector each [N, D]."""
        return torch.einsum("nfd,nd->nf", images, text).mean(dim=1)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor on unit CLIP image vectors: one linear layer (v1) or a stack without activations (v2)."""

    def __init__(self, path: Path) -> None:
        """Read the layers, in the order of their numbers, from a safetensors file. Raises DataError or IntegrityError."""
        super().__init__()
        tensors = load_tensors(asset(path.name, path))
        weights = sorted((name for name in tensors if name.endswith("weight")), key=_numbers)
        layers = []
        for name in weights:
            weight, bias = tensors[name].float(), tensors.get(name.removesuffix("weight") + "bias")
            if weight.ndim != 2 or (layers and weight.shape[1] != layers[-1].out_features):
                raise IntegrityError(
                    f"{path}: {name} of shape {list(weight.shape)} does not follow; use a stack of linear layers"
                )
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias.float()
            layers.append(layer)
        if not layers or layers[-1].out_features != 1:
            raise IntegrityError(f"{path} is not an aesthetic head: its last layer must give one score; use LAION's predictor")
        self.layers = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """The frame-averaged score [N] of unit frame vectors [N, frames, D]. Raises IntegrityError on another width."""
        wanted = self.layers[0].in_features
        if images.shape[-1] != wanted:
            raise IntegrityError(
                f"the aesthetic head reads vectors of {wanted}, not of {images.shape[-1]}; use the CLIP it was made for"
            )
        return self.layers(F.normalize(images, dim=-1)).squeeze(-1).mean(dim=1)


def spread(available: int, wanted: int) -> Tensor:
    """The indices of `wanted` evenly spaced frames, each from the middle of its part; all of them when there are fewer."""
    count = min(available, wanted)
    return ((torch.arange(count) + 0.5) * available / count).long()


def _vectors(output: Any) -> Tensor:
    # transformers gave a tensor up to version 4 and gives an output object with `pooler_output` since 5
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=-1).cpu()


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
