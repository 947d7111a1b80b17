"""What every text encoder gives, and the loader of text models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lutetia.models.data.build_settings import MAX_TOKENS
from lutetia.models.networks.model_ref import ModelRef, hub_errors
from lutetia.protocol.schema.model.pipeline_spec import TextRecipe

CLIP_TOKENS = 77
BATCH = 16


class TextEncoder(ABC):
    """Captions to `tokens` [N, L, D], zero beyond the end of a caption, and `pooled` [N, P]; float32 on the CPU.

    The empty caption gives zeros in both, unless a pipeline encodes it (`null`). Weights are loaded on first use.

    Attributes:
        ref: reference of the encoder.
        tokens: length L.
        width: of a token vector, D.
        pooled_width: of the pooled vector, P.
        longest: the most tokens that it can give.
        recipe: how a pipeline uses it; None: as `encode` says.
    """

    ref: str
    tokens: int
    width: int
    pooled_width: int
    longest: int = MAX_TOKENS
    recipe: TextRecipe | None = None

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embed captions; long ones are truncated. Raises ConfigError if the files of the encoder cannot be used."""

    @abstractmethod
    def count(self, captions: Sequence[str]) -> int:
        """The number of tokens of the longest of `captions`; it may exceed `longest`."""

    def null(self) -> tuple[Tensor, Tensor] | None:
        """Tokens [L, D] and pooled vector [P] of the null condition; None: zeros."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes with the encoder: a part of the keys of the cache."""

    @property
    def module(self) -> nn.Module | None:
        """The transformers model of the tokens; None without weights."""
        return None


def load_text_model(model: ModelRef, model_type: str, device: str) -> Any:
    """The text model that `model` refers to, in float32, without gradients, on `device`. Raises ConfigError."""
    import transformers

    kinds = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
    loader = getattr(transformers, kinds.get(model_type, "AutoModel"))
    with hub_errors("text encoder", model):
        loaded = loader.from_pretrained(model.location, use_safetensors=True, dtype=torch.float32, **model.options)
    return loaded.eval().requires_grad_(False).to(device)
