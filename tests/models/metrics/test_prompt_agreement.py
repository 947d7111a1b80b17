"""Agreement of clips with their prompts: retrieval by probe and by words, CLIP and the aesthetic head."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lutetia.models.metrics.evaluator import Evaluator
from lutetia.models.metrics.settings import EvaluatorSettings
from lutetia.models.metrics.stats.classifier import classify, fit_classifier, words
from lutetia.models.metrics.stats.retrieval import fit_probe, load_probe, rank, retrieve, save_probe
from lutetia.models.networks.clip import AestheticHead, ClipModel, spread
from lutetia.models.networks.sentences import MiniLM
from lutetia.system.errors import ConfigError, DataError, IntegrityError
from tests.models.metrics.square_clips import square_clips

NOUNS, VERBS = ["cat", "dog", "owl", "bee", "elk", "fox"], ["runs", "sleeps", "jumps", "hides"]
PROMPTS = [f"a {noun} that {verb}" for noun in NOUNS for verb in VERBS]


def features_of(captions: list[str], seed: int, noise: float = 0.3) -> np.ndarray:
    """Features in which each word has its own random direction."""
    generator, basis = np.random.default_rng(seed), np.random.default_rng(99)
    direction = {word: basis.normal(size=40) for word in NOUNS + VERBS}
    rows = [sum(direction[word] for word in caption.split() if word in direction) for caption in captions]
    return np.array(rows) + generator.normal(size=(len(captions), 40)) * noise


def vectors_of(captions: list[str]) -> np.ndarray:
    return np.array([[float(word in caption.split()) for word in NOUNS + VERBS] for caption in captions])


def test_rank_starts_at_one_and_ties_rank_half_before() -> None:
    scores = [[0.9, 0.1, 0.5], [0.2, 0.2, 0.2], [0.1, 0.9, 0.9]]
    assert rank(scores, [0, 1, 0]).tolist() == [1, 2, 3]
    assert rank(scores, [2, 0, 1]).tolist() == [2, 2, 2]


def test_probe_fitted_on_real_pairs_retrieves_prompts(tmp_path: Path) -> None:
    real = PROMPTS * 4
    probe = fit_probe(features_of(real, 0), vectors_of(real))
    save_probe(tmp_path / "probe.safetensors", probe)
    probe = load_probe(tmp_path / "probe.safetensors")
    assert probe.pairs == 96
    good = retrieve(probe, features_of(PROMPTS, 1), PROMPTS, PROMPTS + PROMPTS[:3], vectors_of(PROMPTS + PROMPTS[:3]))
    assert good.candidates == 24
    assert good.recall_1.value > 0.9
    wrong = retrieve(probe, features_of(PROMPTS[1:] + PROMPTS[:1], 1), PROMPTS, PROMPTS, vectors_of(PROMPTS))
    assert wrong.recall_1.value < 0.1
    assert good.mrr.low > wrong.mrr.high
    with pytest.raises(DataError, match=r"'a yak' is not among the 24 candidates"):
        retrieve(probe, features_of(PROMPTS[:1], 1), ["a yak"], PROMPTS, vectors_of(PROMPTS))
    with pytest.raises(DataError, match=r"20 or more real pairs"):
        fit_probe(features_of(PROMPTS[:5], 0), vectors_of(PROMPTS[:5]))


def test_word_classifier_retrieves_unseen_compositions() -> None:
    held = PROMPTS[::5]
    seen = [prompt for prompt in PROMPTS if prompt not in held] * 5
    classifier = fit_classifier(features_of(seen, 0), seen, min_count=5)
    assert set(classifier.vocabulary) == {*NOUNS, *VERBS}  # "a" and "that" are in every caption
    agreement = classify(classifier, features_of(held, 1), held, PROMPTS)
    assert agreement.retrieval.recall_1.value > 0.7
    assert agreement.words.low > 0.7
    shuffled = classify(classifier, features_of(held[1:] + held[:1], 1), held, PROMPTS)
    assert shuffled.retrieval.recall_1.value < 0.4
    assert words("A red-haired Fox, 2!") == {"a", "red", "haired", "fox", "2"}
    with pytest.raises(DataError, match=r"no word is in 50"):
        fit_classifier(features_of(seen, 0), seen, min_count=50)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, saved in the format of the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 12, "projection_dim": 8, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 39}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 8}
    model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate([*NOUNS, *VERBS, "a", "that", "<unk>"])} | {"<s>": 38, "</s>": 39}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("<s>", 38), ("</s>", 39)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=12
    )
    fast.save_pretrained(folder)
    processor: Any = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


def test_clip_loads_from_hub_format(tiny_clip: Path) -> None:
    clip = ClipModel(str(tiny_clip), frames=4)
    clips = square_clips(3).frames
    images, text = clip.images(clips), clip.text(["a cat that runs", "an owl", "a fox that hides " * 20])
    assert images.shape == (3, 4, 8)
    assert text.shape == (3, 8)
    assert torch.allclose(images.norm(dim=-1), torch.ones(3, 4), atol=1e-5)
    similarity = clip.similarity(images, text)
    by_hand = [float((images[row] @ text[row]).mean()) for row in range(3)]
    assert torch.allclose(similarity, torch.tensor(by_hand), atol=1e-6)
    assert clip(clips)["frames"].shape == (3, 32)
    reference = clip.model(
        pixel_values=clip.processor(images=[clips[0, spread(10, 4)[0]].numpy()], return_tensors="pt")["pixel_values"],
        **clip.tokenizer(["a cat that runs"], return_tensors="pt"),
    )
    cosine = reference.logits_per_image.item() / clip.model.logit_scale.exp().item()
    assert float(images[0, 0] @ text[0]) == pytest.approx(cosine, abs=1e-5)


def test_clip_and_aesthetic_scores_are_in_the_report(tiny_clip: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.randn(1, 8), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    settings = EvaluatorSettings(metrics=("clip",), clip=str(tiny_clip), aesthetic=tmp_path / "head.safetensors", cache=tmp_path)
    clips = square_clips(6)
    evaluator = Evaluator(clips, clips, None, settings)
    similarity, aesthetic = evaluator.evaluate(clips)
    assert (similarity.name, aesthetic.name) == ("CLIP text-video similarity", "aesthetic score")
    assert similarity.real == similarity.figure
    assert -1 <= similarity.figure.low <= similarity.figure.high <= 1
    assert 3 < aesthetic.figure.value < 7


def test_clip_from_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load CLIP"):
        ClipModel(str(tmp_path))
    with pytest.raises(ConfigError, match=r"neither a folder nor a hub id"):
        ClipModel("/nowhere/at all")


def test_aesthetic_head_reads_both_forms(tmp_path: Path) -> None:
    images = torch.nn.functional.normalize(torch.randn(2, 3, 8), dim=-1)
    weight, bias = torch.randn(1, 8), torch.tensor([5.0])
    save_file({"weight": weight, "bias": bias}, tmp_path / "linear.safetensors")
    linear = AestheticHead(tmp_path / "linear.safetensors")(images)
    assert torch.allclose(linear, (images @ weight[0]).mean(1) + 5, atol=1e-5)
    sizes = [8, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1]
    layers = {f"layers.{2 * k}.weight": torch.randn(sizes[k + 1], sizes[k]) for k in range(10)}
    layers |= {f"layers.{2 * k}.bias": torch.randn(sizes[k + 1]) for k in range(10)}
    save_file(layers, tmp_path / "stack.safetensors")
    x = images
    for k in range(10):  # "layers.10" comes after "layers.2"
        x = x @ layers[f"layers.{2 * k}.weight"].T + layers[f"layers.{2 * k}.bias"]
    assert torch.allclose(AestheticHead(tmp_path / "stack.safetensors")(images), x.squeeze(-1).mean(1), atol=1e-5)
    with pytest.raises(IntegrityError, match=r"takes vectors of 8, not of 16"):
        AestheticHead(tmp_path / "linear.safetensors")(torch.randn(1, 2, 16))
    save_file({"weight": torch.randn(2, 8)}, tmp_path / "two.safetensors")
    with pytest.raises(IntegrityError, match=r"must have one output"):
        AestheticHead(tmp_path / "two.safetensors")


def test_minilm_reproduces_published_similarities(asset_or_skip: Callable[[str], Path]) -> None:
    encode = MiniLM(asset_or_skip("minilm"))
    sentences = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    vectors = encode([*sentences, sentences[0]])
    assert (vectors @ vectors[0])[1:4].tolist() == pytest.approx([0.695, 0.943, 0.257], abs=2e-3)
    assert torch.allclose(vectors[4], vectors[0], atol=1e-5), "the same sentence in another row"
    assert math.isclose(float(vectors[1].norm()), 1, abs_tol=1e-5)
