"""Sentence vectors for the retrieval probe: all-MiniLM-L6-v2, or another BERT in the same file layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lutetia.models.networks.assets import MINILM_FOLDER, asset, load_tensors
from lutetia.system.errors import DataError

MAX_TOKENS = 128


class SentenceEncoder(Protocol):
    """Sentences to unit vectors [N, D], float32 on the CPU."""

    def __call__(self, sentences: Sequence[str]) -> Tensor: ...


class MiniLM:
    """all-MiniLM-L6-v2: the mean of the last hidden states over the tokens, scaled to unit length, as it was trained."""

    def __init__(self, folder: Path | None = None) -> None:
        """Load config.json, tokenizer.json and the only safetensors file of `folder` (default: the asset). Raises DataError."""
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        location = asset(MINILM_FOLDER, folder)
        weights = sorted(location.glob("*.safetensors"))
        if len(weights) != 1:
            raise DataError(
                f"{location} holds {len(weights)} safetensors files instead of one; name the folder of one sentence encoder"
            )
        tensors = {name: value.float() for name, value in load_tensors(weights[0]).items() if not name.endswith("position_ids")}
        self.tokenizer = Tokenizer.from_file(str(asset("tokenizer.json", location / "tokenizer.json")))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        config = BertConfig.from_json_file(str(asset("config.json", location / "config.json")))
        self.model = BertModel(config, add_pooling_layer=False)
        missing = self.model.load_state_dict(tensors, strict=False).missing_keys
        if missing:
            raise DataError(
                f"{weights[0]} lacks {missing[0]} and {len(missing) - 1} more tensors; use BERT weights that fit its config.json"
            )
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors [N, 384], float32 on the CPU; equal sentences are computed once."""
        distinct = sorted(set(sentences))
        parts = [self._encode(distinct[start : start + 64]) for start in range(0, len(distinct), 64)]
        vectors = torch.cat(parts)
        place = {sentence: number for number, sentence in enumerate(distinct)}
        return vectors[torch.tensor([place[sentence] for sentence in sentences])]

    def _encode(self, sentences: Sequence[str]) -> Tensor:
        encoded = self.tokenizer.encode_batch(list(sentences))
        ids = torch.tensor([item.ids for item in encoded])
        mask = torch.tensor([item.attention_mask for item in encoded])
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
