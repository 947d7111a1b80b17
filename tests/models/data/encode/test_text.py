"""Text encoders by reference: hashed words, and transformers models with small tokenizers in the format of the hub."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lutetia.models.data.encode.text import TransformersEncoder, load_text_encoder, split_words
from lutetia.system.errors import ConfigError

CAPTIONS = ["a red ball rolls", "a blue ball", "", "green stripes slide down the wall"]
VOCABULARY = {
    word: index
    for index, word in enumerate(
        ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for caption in CAPTIONS for word in caption.split()})]
    )
}
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tokenizer(folder: Path, begin: bool) -> None:
    """Save a word tokenizer that ends every caption with </s>, in the format of the hub."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>" if begin else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=24
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    size = len(VOCABULARY)
    text = transformers.CLIPTextConfig(
        vocab_size=size, max_position_embeddings=24, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES
    )
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SIZES)
    small_t5: dict[str, Any] = {
        "vocab_size": size,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
    }
    made = {
        "clip_text": transformers.CLIPTextModel(text),
        "clip": transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())),
        "t5": transformers.T5EncoderModel(transformers.T5Config(**small_t5)),
        "umt5": transformers.UMT5EncoderModel(transformers.UMT5Config(**small_t5)),
        "bert": transformers.BertModel(transformers.BertConfig(vocab_size=size, max_position_embeddings=24, **SIZES)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, begin=name.startswith("clip"))
    return folder


@pytest.mark.parametrize("name", ["clip_text", "clip", "t5", "umt5", "bert"])
def test_model_from_folder_gives_tokens_and_pooled_vector(saved: Path, name: str) -> None:
    encoder = load_text_encoder(str(saved / name), 10)
    tokens, pooled = encoder.encode(CAPTIONS)
    assert tuple(tokens.shape) == (4, 10, encoder.width) == (4, 10, 16)
    assert tuple(pooled.shape) == (4, encoder.pooled_width)
    begin = name.startswith("clip")
    assert [(row.abs().sum(-1) > 0).sum().item() for row in tokens] == [4 + 1 + begin, 3 + 1 + begin, 0, 6 + 1 + begin]
    assert not tokens[2].any()
    assert not pooled[2].any()
    assert len({tuple(row.tolist()) for row in pooled}) == 4
    assert encoder.count(CAPTIONS) == 6 + 1 + begin


@pytest.mark.parametrize("name", ["clip", "t5", "umt5", "bert"])
def test_embedding_equals_that_of_the_model(saved: Path, name: str) -> None:
    encoder = load_text_encoder(str(saved / name), 10)
    assert isinstance(encoder, TransformersEncoder)
    ids = encoder.tokenizer([CAPTIONS[3]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = encoder.module(input_ids=ids)
    tokens, pooled = encoder.encode([CAPTIONS[3]])
    torch.testing.assert_close(tokens[0, : ids.shape[1]], output.last_hidden_state[0], atol=1e-5, rtol=1e-4)
    expected = output.pooler_output[0] if name == "clip" else output.last_hidden_state[0].mean(0)
    if name == "bert":
        expected = 4 * expected / expected.norm()
    torch.testing.assert_close(pooled[0], expected, atol=1e-5, rtol=1e-4)


def test_embedding_does_not_depend_on_other_captions(saved: Path) -> None:
    encoder = load_text_encoder(str(saved / "bert"), 10)
    many, alone = encoder.encode(CAPTIONS * 9), encoder.encode(CAPTIONS[:1])
    assert torch.equal(many[0][:1], alone[0])
    assert torch.equal(many[1][:1], alone[1])


def test_pair_takes_tokens_of_one_and_pooled_of_the_other(saved: Path) -> None:
    pair = load_text_encoder(f"{saved / 't5'}+{saved / 'clip'}", 10)
    first, second = load_text_encoder(str(saved / "t5"), 10), load_text_encoder(str(saved / "clip"), 10)
    tokens, pooled = pair.encode(CAPTIONS)
    assert torch.equal(tokens, first.encode(CAPTIONS)[0])
    torch.testing.assert_close(pooled, second.encode(CAPTIONS)[1])


def test_pair_pools_over_the_whole_caption(saved: Path) -> None:
    """The second encoder needs one token more than the first, which determines the number of tokens."""
    captions = ["a red ball rolls", "a red ball wall"]
    tokens = load_text_encoder(str(saved / "t5"), 1).count(captions)
    pair, alone = load_text_encoder(f"{saved / 't5'}+{saved / 'clip'}", tokens), load_text_encoder(str(saved / "clip"), 24)
    assert alone.count(captions) > tokens
    pooled = pair.encode(captions)[1]
    assert not torch.equal(*pooled)
    torch.testing.assert_close(pooled, alone.encode(captions)[1])


def test_word_vectors_are_the_same_on_every_machine() -> None:
    encoder = load_text_encoder("builtin:words", 5)
    tokens, pooled = encoder.encode(["A red, RED ball", "", "a a a a a a a"])
    assert (tuple(tokens.shape), tuple(pooled.shape)) == ((3, 5, 64), (3, 64))
    assert not tokens[1].any()
    assert not pooled[1].any()
    assert not tokens[0, 4].any()  # four words
    assert tokens[2].any(-1).all()  # the caption is truncated
    torch.testing.assert_close(tokens[0, :4].norm(dim=-1), torch.full((4,), 8.0), atol=1.5, rtol=0)
    same = torch.nn.functional.cosine_similarity(tokens[0, 1], tokens[0, 2], dim=0)
    other = torch.nn.functional.cosine_similarity(tokens[0, 1], tokens[0, 3], dim=0)
    assert same > 0.9 > 0.6 > other
    # fixed for ever: shards and mixtures made elsewhere depend on it
    torch.testing.assert_close(encoder.encode(["ball"])[1][0, :3], torch.tensor(BALL), atol=1e-5, rtol=0)


BALL = [-0.831422, 2.504477, 0.772266]


def test_split_words_ignores_case_and_punctuation() -> None:
    assert split_words("The cat's 2 hats, ÉTÉ—naïve!") == ["the", "cat", "s", "2", "hats", "été", "naïve"]


def test_unusable_text_encoders_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    shutil.copytree(saved / "bert", tmp_path / "bare")
    (tmp_path / "bare/model.safetensors").unlink()
    for ref, tokens, words in (
        ("builtin:glove", 5, "no text encoder 'builtin:glove'; use builtin:words, a folder or owner/name"),
        ("builtin:words", 0, "cannot give 0 tokens"),
        (str(tmp_path / "gone"), 5, "neither a folder nor a hub id"),
        (str(tmp_path / "gpt"), 5, "of type gpt2, which is not supported"),
        (str(saved / "clip"), 30, "takes at most 24 tokens, not 30"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_text_encoder(ref, tokens)
    with pytest.raises(ConfigError, match="cannot load text encoder .*; check the folder"):
        load_text_encoder(str(tmp_path / "bare"), 5).encode(["x"])


MINILM = Path(os.environ.get("LUTETIA_ASSETS", Path(__file__).parents[5] / "shared/assets")) / "minilm"


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"{MINILM} is not there")
def test_real_minilm_ranks_captions_by_meaning(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(MINILM / name, tmp_path / name)
    (tmp_path / "model.safetensors").symlink_to(next(MINILM.glob("*.safetensors")))
    encoder = load_text_encoder(str(tmp_path), 16)
    _, pooled = encoder.encode(
        ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    )
    similar = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    torch.testing.assert_close(similar, torch.tensor([0.695, 0.943, 0.257]), atol=5e-3, rtol=0)  # the model card's figures
    torch.testing.assert_close(pooled.square().mean(-1), torch.ones(4), atol=1e-3, rtol=0)


def test_split_words_gives_one_result_for_every_normal_form() -> None:
    for text in ("caméra à l'été", "Ἀθῆναι", "한국어 자막", "हिन्दी कविता", "İstanbul"):
        assert len({tuple(split_words(unicodedata.normalize(form, text))) for form in ("NFC", "NFD")}) == 1
    assert split_words(unicodedata.normalize("NFD", "caméra")) == ["caméra"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("हिन्दी कविता", 2), ("தமிழ் மொழி", 2), ("عَرَبِيّ", 1), ("שָׁלוֹם עולם", 2), ("می\u200cروم", 1), ("猫が走る", 4), ("a 猫 runs", 3)],
)
def test_split_words_keeps_marks_with_their_letters(text: str, count: int) -> None:
    assert len(split_words(text)) == count


@pytest.mark.parametrize("text", ["\U0001f600\U0001f389", "\u2764\ufe0f", "\u200b", "!?…", " "])
def test_signs_are_no_words(text: str) -> None:
    assert split_words(text) == []
    assert load_text_encoder("builtin:words", 4).count([text]) == 0
