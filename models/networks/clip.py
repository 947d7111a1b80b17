"""CLIP text-video similarity and the aesthetic score, loaded by transformers and from safetensors.

Similarity is the cosine between the CLIP embeddings of the prompt and of each frame, averaged over frames. The aesthetic score is
LAION's predictor, one linear layer or a small stack of them on the unit image embedding, averaged over frames.
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
    """A CLIP model from a folder or hub id."""

    def __init__(self, ref: str, device: str = "cpu", frames: int = 8, batch: int = 32) -> None:
        """Load the model.

        Args:
            ref: folder or hub id.
            device: cpu, cuda or cuda:N.
            frames: evenly spaced frames of each clip that are used.
            batch: prompts or frames per forward pass.

        Raises ConfigError if it cannot be loaded.
        """
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        model_ref = parse_ref(ref, "CLIP", ())
        with hub_errors("CLIP", model_ref):
            model: Any = CLIPModel.from_pretrained(model_ref.location, use_safetensors=True, **model_ref.options)
            # the processor of the saved model: sizes and means differ between CLIP models
            self.processor: Any = CLIPImageProcessor.from_pretrained(model_ref.location, **model_ref.options)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model_ref.location, trust_remote_code=False, **model_ref.options)
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.device, self.frames, self.batch = device, frames, batch
        self.tag = f"clip-image/{frames}/{fingerprint(model_ref)}"

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of the prompts, float32 on the CPU. Long prompts are truncated, as in CLIP."""
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
    """LAION's aesthetic predictor on unit CLIP image vectors: one linear layer (v1), or several without activations (v2)."""

    def __init__(self, path: Path) -> None:
        """Load the layers from a safetensors file, in the order of their numbers. Raises DataError or IntegrityError."""
        super().__init__()
        tensors = load_tensors(asset(path.name, path))
        weights = sorted((name for name in tensors if name.endswith("weight")), key=_numbers)
        layers = []
        for name in weights:
            weight, bias = tensors[name].float(), tensors.get(name.removesuffix("weight") + "bias")
            if weight.ndim != 2 or (layers and weight.shape[1] != layers[-1].out_features):
                raise IntegrityError(
                    f"{path}: {name} of shape {list(weight.shape)} does not fit the layer before it; use a stack of linear layers"
                )
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.weight.data = weight
            if bias is not None:
                layer.bias.data = bias.float()
            layers.append(layer)
        if not layers or layers[-1].out_features != 1:
            raise IntegrityError(f"{path} is not an aesthetic head: its last layer must have one output; use LAION's predictor")
        self.layers = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """The frame-averaged score [N] of frame vectors [N, frames, D]. Raises IntegrityError on another width."""
        wanted = self.layers[0].in_features
        if images.shape[-1] != wanted:
            raise IntegrityError(
                f"the aesthetic head takes vectors of {wanted}, not of {images.shape[-1]}; use the CLIP that it was trained on"
            )
        return self.layers(F.normalize(images, dim=-1)).squeeze(-1).mean(dim=1)


def spread(available: int, wanted: int) -> Tensor:
    """The indices of `wanted` evenly spaced frames, each from the middle of its part; all frames if there are fewer."""
    count = min(available, wanted)
    return ((torch.arange(count) + 0.5) * available / count).long()


def _vectors(output: Any) -> Tensor:
    # transformers returns a tensor up to version 4, and an output object with `pooler_output` since 5
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=-1).cpu()


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]
