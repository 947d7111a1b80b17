"""Text encoders: captions to token vectors, which the experts attend to, and to one pooled vector, which the router sees.

A reference is `builtin:words`, which needs no weights, or a folder or hub id that transformers loads: CLIP, T5, UMT5, BERT and
MiniLM. `A+B` takes the tokens from A and the pooled vector from B, as Paris 2.0 does with T5 and CLIP.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lutetia.models.data.build_settings import MAX_TOKENS
from lutetia.models.data.encode.pipeline_text import PipelineEncoder
from lutetia.models.data.encode.text_encoder import BATCH, CLIP_TOKENS, TextEncoder, load_text_model
from lutetia.models.networks.model_ref import ModelRef, fingerprint, hub_errors, parse_ref, read_config
from lutetia.protocol.schema.model.pipeline_spec import TextRecipe
from lutetia.system.errors import ConfigError

BUILTIN_TEXT = ("builtin:words",)
MODEL_TYPES = ("clip", "clip_text_model", "t5", "umt5", "bert", "roberta", "xlm-roberta", "distilbert", "mpnet")
WORD_WIDTH = 64


def load_text_encoder(
    ref: str, tokens: int, recipe: TextRecipe | None = None, *, device: str = "cpu", hub: bool = True
) -> TextEncoder:
    """Load the encoder that `ref` names, for captions of up to `tokens` tokens. Raises ConfigError.

    With a `recipe`, `ref` is a diffusers pipeline, whose text encoder is used as that pipeline uses it. `hub` says whether a hub
    id may be downloaded; otherwise only what was downloaded before is used.
    """
    if tokens < 1 or tokens > MAX_TOKENS:
        raise ConfigError(f"a text encoder cannot give {tokens} tokens; use 1 to {MAX_TOKENS}")
    if recipe is not None:
        return PipelineEncoder(ref, parse_ref(ref, "text encoder", BUILTIN_TEXT, hub), recipe, tokens, device)
    if ref == "builtin:words":
        return WordEncoder(tokens)
    if "+" in ref and not Path(ref).expanduser().is_dir():
        first, second = ref.split("+", 1)
        longest = load_text_encoder(second, 1, hub=hub).longest  # a caption may have more tokens there than in the first
        return PairEncoder(
            load_text_encoder(first, tokens, device=device, hub=hub), load_text_encoder(second, longest, device=device, hub=hub)
        )
    if ref.startswith("builtin:"):
        raise ConfigError(f"there is no text encoder {ref!r}; use {', '.join(BUILTIN_TEXT)}, a folder or owner/name")
    return TransformersEncoder(ref, parse_ref(ref, "text encoder", BUILTIN_TEXT, hub), tokens, device)


class WordEncoder(TextEncoder):
    """Hashed words: each word has a fixed random direction, plus a small sinusoid of its position. It needs no weights.

    It knows no synonyms and no grammar: use it only for captions with a small vocabulary.
    """

    ref, width, pooled_width = "builtin:words", WORD_WIDTH, WORD_WIDTH
    fingerprint = "words-2"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    _POSITION = 0.3  # weight of the position in a token, relative to the word

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = np.zeros((len(captions), self.tokens, self.width), np.float32)
        pooled = np.zeros((len(captions), self.width), np.float32)
        positions = _positions(self.tokens)
        for row, caption in enumerate(captions):
            words = split_words(caption)[: self.tokens]
            if not words:
                continue
            vectors = np.stack([_word(word) for word in words])
            tokens[row, : len(words)] = (vectors + self._POSITION * positions[: len(words)]) / math.sqrt(1 + self._POSITION**2)
            pooled[row] = vectors.sum(0) / math.sqrt(len(words))
        scale = math.sqrt(self.width)  # unit variance per coordinate
        return torch.from_numpy(tokens * scale), torch.from_numpy(pooled * scale)

    def count(self, captions: Sequence[str]) -> int:
        return max((len(split_words(caption)) for caption in captions), default=1)


def split_words(text: str) -> list[str]:
    """The words and numbers of `text` in lower case, without punctuation, equal for equal texts in any normal form of Unicode.

    Vowel signs and accents belong to their letter. Scripts that put no spaces between words give a word per character: that
    keeps something in common between captions.
    """
    composed = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    without_joiners = composed.translate({0x200C: None, 0x200D: None})
    spaced = _UNSPACED.sub(lambda match: f" {match[0]} ", without_joiners)
    return "".join(each if _is_of_word(each) else " " for each in spaced).split()


_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Kana and Han characters."""


def _is_of_word(letter: str) -> bool:
    """Letters, marks, numbers, and the underscore and its like, but no emoji: their variation selectors are marks."""
    return letter.isalnum() or letter == "_" or (unicodedata.category(letter)[0] == "M" and not "\ufe00" <= letter <= "\ufe0f")


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> np.ndarray[Any, Any]:
    """The unit vector [64] of a word, the same on every machine: Philox keyed by the SHA-256 of the word."""
    key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:16], "little")
    vector = np.random.Generator(np.random.Philox(key)).standard_normal(WORD_WIDTH)
    return vector / np.linalg.norm(vector)


@lru_cache
def _positions(tokens: int) -> np.ndarray[Any, Any]:
    """Unit vectors [tokens, 64] of sinusoids of the positions."""
    angle = np.arange(tokens)[:, None] / 100 ** (2 * np.arange(WORD_WIDTH // 2) / WORD_WIDTH)
    sinusoids = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(tokens, WORD_WIDTH)
    return sinusoids / np.linalg.norm(sinusoids, axis=1, keepdims=True)


class TransformersEncoder(TextEncoder):
    """A text model that transformers loads.

    Tokens are the last hidden states, zero beyond the caption. The pooled vector is CLIP's pooled state (of the end token), or
    for other models the mean over the tokens; for the BERT family the mean is scaled to unit variance per coordinate.
    """

    def __init__(self, ref: str, model: ModelRef, tokens: int, device: str = "cpu") -> None:
        self.ref, self.tokens, self._model, self._device = ref, tokens, model, device
        config = read_config("text encoder", model)
        self.model_type = str(config.get("model_type"))
        if self.model_type not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ConfigError(f"text encoder {ref!r} is of type {self.model_type}, which is not supported; use one of {known}")
        text = config.get("text_config") or config
        self.width = int(text.get("d_model") or text.get("dim") or text.get("hidden_size") or 512)
        self.pooled_width = self.width
        longest = text.get("max_position_embeddings") or (CLIP_TOKENS if self.is_clip else None)
        self.longest = min(int(longest), MAX_TOKENS) if longest and not self.is_t5 else MAX_TOKENS
        if tokens > self.longest:
            raise ConfigError(f"text encoder {ref!r} takes at most {self.longest} tokens, not {tokens}; use fewer text tokens")

    @property
    def is_clip(self) -> bool:
        return self.model_type.startswith("clip")

    @property
    def is_t5(self) -> bool:
        return self.model_type in ("t5", "umt5")

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return fingerprint(self._model)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with hub_errors("the tokenizer of text encoder", self._model):
            return AutoTokenizer.from_pretrained(self._model.location, trust_remote_code=False, **self._model.options)

    @cached_property
    def module(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return load_text_model(self._model, self.model_type, self._device)

    def count(self, captions: Sequence[str]) -> int:
        ids = self.tokenizer(list(captions), verbose=False)["input_ids"] if captions else []
        return max((len(row) for row in ids), default=1)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not captions:
            return torch.zeros(0, self.tokens, self.width), torch.zeros(0, self.pooled_width)
        # batches of one size: the embedding of a caption must not depend on the number of captions
        captions = [unicodedata.normalize("NFC", caption) for caption in captions]
        padded = [*captions, *[""] * (-len(captions) % BATCH)]
        parts = [self._encode(padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
        tokens = torch.cat([part[0] for part in parts])[: len(captions)]
        pooled = torch.cat([part[1] for part in parts])[: len(captions)]
        not_empty = torch.tensor([bool(caption.strip()) for caption in captions])
        return tokens * not_empty[:, None, None], pooled * not_empty[:, None]

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self._device)  # fmt: skip
        output = self.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mask = batch["attention_mask"][..., None].float()
        tokens = output.last_hidden_state.float() * mask
        if self.is_clip:
            pooled = output.pooler_output.float()
        else:
            pooled = tokens.sum(1) / mask.sum(1).clamp(min=1)
            if not self.is_t5:
                pooled = nn.functional.normalize(pooled, dim=-1) * math.sqrt(self.width)
        return tokens.cpu(), pooled.cpu()


class PairEncoder(TextEncoder):
    """Tokens of one encoder, pooled vector of another."""

    def __init__(self, first: TextEncoder, second: TextEncoder) -> None:
        self.first, self.second = first, second
        self.ref, self.tokens, self.longest = f"{first.ref}+{second.ref}", first.tokens, first.longest
        self.width, self.pooled_width = first.width, second.pooled_width

    @property
    def fingerprint(self) -> str:
        return f"{self.first.fingerprint}+{self.second.fingerprint}@{self.second.tokens}"

    @property
    def module(self) -> nn.Module | None:
        return self.first.module

    def count(self, captions: Sequence[str]) -> int:
        return self.first.count(captions)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.first.encode(captions)[0], self.second.encode(captions)[1]
