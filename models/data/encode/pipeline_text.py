"""Captions as a diffusers pipeline encodes them: its own tokenizers, template, padding, masks and null prompt (`TextRecipe`)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from lutetia.models.data.build_settings import MAX_TOKENS
from lutetia.models.data.encode.text_encoder import BATCH, CLIP_TOKENS, TextEncoder, load_text_model
from lutetia.models.networks.model_ref import ModelRef, fingerprint, hub_errors, read_config, snapshot
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.pipeline_spec import TextRecipe
from lutetia.system.errors import ConfigError

TOKEN_MODELS = ("t5", "umt5", "llama")
POOLED_MODELS = ("clip", "clip_text_model")


@dataclass(frozen=True)
class _Part:
    """A text model of the pipeline with its tokenizer."""

    model: ModelRef
    words: ModelRef
    device: str
    model_type: str
    width: int

    @classmethod
    def of(cls, pipeline: ModelRef, model: str, words: str, device: str, known: Sequence[str]) -> _Part:
        ref = pipeline.part(model)
        config = read_config("text encoder", ref)
        config = config.get("text_config") or config
        model_type = str(config.get("model_type"))
        if model_type not in known:
            raise ConfigError(
                f"text encoder {ref.text!r} is of type {model_type}, which is not supported; use one of {', '.join(known)}"
            )
        width = config.get("d_model") or config.get("hidden_size") or 0
        return cls(ref, pipeline.part(words), device, model_type, int(width))

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with hub_errors("the tokenizer of text encoder", self.words):
            tokenizer = AutoTokenizer.from_pretrained(self.words.location, trust_remote_code=False, **self.words.options)
        if tokenizer.padding_side != "right":
            raise ConfigError(f"the tokenizer {self.words.text!r} pads on the left, which is not supported; set it to the right")
        return tokenizer

    @cached_property
    def module(self) -> Any:
        return load_text_model(self.model, self.model_type, self.device)

    def ids(self, texts: Sequence[str], length: int) -> Any:
        """Ids and attention mask, each [N, length]."""
        return self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, add_special_tokens=True, return_tensors="pt"
        ).to(self.device)  # fmt: skip


class PipelineEncoder(TextEncoder):
    """The text encoder of a diffusers pipeline. Tokens of padding are zero unless the pipeline lets its experts read them."""

    recipe: TextRecipe  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, ref: str, pipeline: ModelRef, recipe: TextRecipe, tokens: int, device: str = "cpu") -> None:
        self.ref, self.tokens, self.recipe, self._device = ref, tokens, recipe, device
        if pipeline.folder is None:  # from here on from the disk: a tokenizer's loader asks a hub for files that are not there
            encoders = [part for part in (recipe.encoder, recipe.pooled_encoder) if part]
            pipeline = replace(pipeline, location=str(snapshot("text encoder", pipeline, encoders)[0]))
        self._main = _Part.of(pipeline, recipe.encoder, recipe.tokenizer, device, TOKEN_MODELS)
        self._second = None
        if recipe.pooled_encoder:
            words = recipe.pooled_tokenizer or recipe.tokenizer
            self._second = _Part.of(pipeline, recipe.pooled_encoder, words, device, POOLED_MODELS)
        self.width = self._main.width
        self.pooled_width = self._second.width if self._second else self.width
        self.longest = MAX_TOKENS

    @property
    def module(self) -> nn.Module | None:
        return self._main.module

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        parts = [part for part in (self._main, self._second) if part]
        return "+".join(
            [*(fingerprint(each) for part in parts for each in (part.model, part.words)), str(canonical(self.recipe))]
        )

    def count(self, captions: Sequence[str]) -> int:
        texts = [self._text(caption) for caption in captions]
        ids = self._main.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return max((len(row) - self.recipe.crop for row in ids), default=1)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not captions:
            return torch.zeros(0, self.tokens, self.width), torch.zeros(0, self.pooled_width)
        # batches of one size: the embedding of a caption must not depend on the number of captions
        padded = [*captions, *[""] * (-len(captions) % BATCH)]
        parts = [self._encode(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
        tokens, pooled = (torch.cat([part[side] for part in parts])[: len(captions)] for side in (0, 1))
        if self.recipe.null == "zeros":
            kept = torch.tensor([caption != "" for caption in captions])
            tokens, pooled = tokens * kept[:, None, None], pooled * kept[:, None]
        return tokens, pooled

    def null(self) -> tuple[Tensor, Tensor] | None:
        if self.recipe.null == "zeros":
            return None
        tokens, pooled = self.encode([""])
        return tokens[0], pooled[0]

    def _text(self, caption: str) -> str:
        return self.recipe.template.replace("{}", mended(caption) if self.recipe.cleaned else caption)

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        batch = self._main.ids([self._text(caption) for caption in captions], self.tokens + recipe.crop)
        output = self._main.module(
            input_ids=batch["input_ids"],
            attention_mask=None if recipe.attends_padding else batch["attention_mask"],
            output_hidden_states=recipe.layer > 0,
        )
        hidden = output.hidden_states[-(recipe.layer + 1)] if recipe.layer else output.last_hidden_state
        hidden, mask = hidden[:, recipe.crop :].float(), batch["attention_mask"][:, recipe.crop :, None].float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        if self._second:
            pooled = self._second.module(self._second.ids(captions, CLIP_TOKENS)["input_ids"]).pooler_output.float()
        return (hidden if recipe.keeps_padding else hidden * mask).cpu(), pooled.cpu()


def mended(caption: str) -> str:
    """The caption as Wan's pipeline mends it: broken letters repaired, HTML entities resolved, white space joined."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split())
