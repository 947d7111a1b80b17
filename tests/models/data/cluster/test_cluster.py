"""Clusters: natural kinds are found, sizes stay within bounds, and names are valid in a manifest."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from lutetia.models.data.build_settings import ClusterSettings
from lutetia.models.data.cluster.kmeans import cluster, merge, smallest_cluster
from lutetia.models.data.cluster.report import keywords, summarise
from lutetia.models.data.encode.features import BuiltinFeatures, Joiner, load_features, wants_text
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.networks.assets import I3D_FILE
from lutetia.system.errors import ConfigError, DataError
from tests.models.data.clip_files import WORDS, look
from tests.models.small_networks import write_assets


def points(sizes: list[int], spread: float = 0.1, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Gaussian blobs at the corners of a simplex, with keys and kinds."""
    rng = np.random.default_rng(seed)
    vectors = np.concatenate([rng.normal(0, spread, (size, 12)) + np.eye(12)[i] for i, size in enumerate(sizes)])
    kinds = [f"kind {i}" for i, size in enumerate(sizes) for _ in range(size)]
    order = rng.permutation(len(vectors))
    return vectors[order].astype(np.float32), [f"{i:064x}" for i in order], [kinds[i] for i in order]


def test_separate_blobs_are_found_and_numbered_by_size() -> None:
    vectors, keys, kinds = points([40, 100, 60])
    clustering = cluster(vectors, keys, kinds, ClusterSettings(experts=3))
    assert np.bincount(clustering.labels).tolist() == [100, 60, 40]
    report = summarise(clustering, vectors, kinds, kinds)
    assert report.purity == report.nmi == 1.0
    assert report.silhouette > 0.5
    assert (clustering.place(vectors) == clustering.labels).all()


def test_same_arguments_give_the_same_clusters() -> None:
    vectors, keys, kinds = points([40, 100, 60], spread=0.6)
    labels = [cluster(vectors, keys, kinds, ClusterSettings(experts=3, seed=1)).labels for _ in range(2)]
    assert (labels[0] == labels[1]).all()


def test_catch_all_cluster_is_split() -> None:
    vectors, keys, kinds = points([30, 300, 30, 40])
    loose = cluster(vectors, keys, kinds, ClusterSettings(experts=4, largest_share=1.0))
    assert np.bincount(loose.labels).max() == 300
    tight = cluster(vectors, keys, kinds, ClusterSettings(experts=4, largest_share=0.5))
    assert np.bincount(tight.labels).max() <= 200
    assert tight.uncapped_share == 0.75
    with_default = cluster(vectors, keys, kinds, ClusterSettings(experts=4))
    assert np.bincount(with_default.labels).max() <= 0.55 * 400


def test_no_cluster_stays_below_the_minimum() -> None:
    vectors, keys, kinds = points([120, 100, 5])
    clustering = cluster(vectors, keys, kinds, ClusterSettings(experts=3, smallest=30))
    assert np.bincount(clustering.labels).min() >= 30


def test_ward_merge_uses_weights() -> None:
    places = np.array([[0.0], [1.0], [2.2]])
    assert merge(places, np.array([1.0, 1.0, 1.0]), 2, cap=9).tolist() == [0, 0, 1]
    assert merge(places, np.array([9.0, 9.0, 1.0]), 2, cap=99).tolist() == [0, 1, 1]
    assert merge(places, np.array([1.0, 1.0, 1.0]), 2, cap=1).tolist() == [0, 0, 1]  # impossible caps are passed over


def test_copies_of_a_file_get_the_same_cluster() -> None:
    vectors, keys, kinds = points([50, 50])
    keys = [keys[row // 5 * 5] for row in range(100)]
    for method in ("random", "kmeans"):
        same = vectors[[row // 5 * 5 for row in range(100)]]
        labels = cluster(same, keys, kinds, ClusterSettings(experts=2, smallest=5, method=method)).labels
        assert all(len(set(labels[row : row + 5].tolist())) == 1 for row in range(0, 100, 5))


def test_random_clusters_are_equal_in_size() -> None:
    vectors, keys, kinds = points([100, 100, 100])
    clustering = cluster(vectors, keys, kinds, ClusterSettings(experts=3, method="random"))
    report = summarise(clustering, vectors, kinds, kinds)
    assert np.bincount(clustering.labels).tolist() == [100, 100, 100]
    assert report.purity is not None
    assert report.purity < 0.5
    other = cluster(vectors, keys, kinds, ClusterSettings(experts=3, method="random", seed=1))
    assert (other.labels != clustering.labels).mean() > 0.4


def test_kinds_can_be_the_clusters() -> None:
    vectors, keys, kinds = points([40, 30], spread=5)
    clustering = cluster(vectors, keys, kinds, ClusterSettings(experts=2, method="kinds"))
    assert summarise(clustering, vectors, kinds, kinds).purity == 1.0
    with pytest.raises(DataError, match="needs one kind per expert: 3 experts, but the kinds are kind 0, kind 1"):
        cluster(vectors, keys, kinds, ClusterSettings(experts=3, smallest=10, method="kinds"))


def test_more_experts_than_clips_or_features_are_refused() -> None:
    vectors, keys, kinds = points([30, 30])
    with pytest.raises(DataError, match="60 clips are too few for 3 experts of at least 24 clips each; use at most 2 experts"):
        cluster(vectors, keys, kinds, ClusterSettings(experts=3, smallest=24))
    same = np.repeat(vectors[:2], 40, axis=0)
    with pytest.raises(DataError, match="1 clip is too few for 1 expert of at least 9 clips each; use more clips, or a smaller"):
        smallest_cluster(ClusterSettings(experts=1, smallest=9), 1)
    with pytest.raises(DataError, match="only 2 distinct features, too few for 3 experts; use at most 2"):
        cluster(same, [str(i) for i in range(80)], ["x"] * 80, ClusterSettings(experts=3))


def test_cluster_names_come_from_kinds_or_keywords() -> None:
    captions = ["a red digit"] * 30 + ["a blue digit"] * 30 + ["the camera pans over a cat"] * 30
    vectors = np.eye(3, dtype=np.float32)[np.repeat([0, 1, 2], 30)]
    for kinds, expected in (
        (["digit"] * 60 + ["camera"] * 30, {"digit-red", "digit-blue", "camera"}),
        ([""] * 90, {"red-digit", "blue-digit", "camera-cat"}),
        (["Ziffern & Zähler"] * 60 + ["电影"] * 30, {"ziffern-zahler-red", "ziffern-zahler-blue", "camera-cat"}),
    ):
        clustering = cluster(vectors, [str(i) for i in range(90)], kinds, ClusterSettings(experts=3))
        names = {summary.name for summary in summarise(clustering, vectors, captions, kinds).clusters}
        assert names == expected
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", name) for name in names)


def test_clusters_without_words_have_distinct_names() -> None:
    vectors, keys, _ = points([40, 40])
    report = summarise(cluster(vectors, keys, [""] * 80, ClusterSettings(experts=2)), vectors, ["跑"] * 80, [""] * 80)
    assert [summary.name for summary in report.clusters] == ["cluster", "cluster-2"]
    assert report.purity is None


def test_keywords_are_frequent_inside_and_rare_outside() -> None:
    groups = [["a red ball rolls", "the red ball jumps"], ["a blue ball rolls", "the blue cube rolls"]]
    assert [words[0] for words in keywords(groups)] == ["red", "blue"]


def test_builtin_features_separate_natural_kinds() -> None:
    latents, features = load_latents("pixels"), BuiltinFeatures()
    kinds = [kind for kind in WORDS for _ in range(30)]
    clips = [look(kind, seed) for seed, kind in enumerate(kinds)]
    vectors = Joiner(blocks := [np.stack([features.of(clip, latents.encode(clip[None])[0]) for clip in clips])])(blocks)
    clustering = cluster(vectors, [str(i) for i in range(90)], kinds, ClusterSettings(experts=3))
    assert summarise(clustering, vectors, [WORDS[kind] for kind in kinds], kinds).purity == 1.0


def test_builtin_feature_names_win_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text", "builtin+text", "dino+more"):
        Path(name).mkdir()
    assert wants_text("text")
    assert load_features("text") == []
    assert wants_text("builtin+text")
    with pytest.raises(ConfigError, match=r"dino\+more"):  # a folder, and no model
        load_features("dino+more")


def test_features_load_by_reference(tmp_path: Path) -> None:
    assert [features.name for features in load_features("builtin+text")] == ["builtin"]
    assert wants_text("builtin + text")
    assert not wants_text("builtin")
    assert load_features("text") == []
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=28
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    (dino,) = load_features(str(tmp_path / "dino"))
    clip = look("ball", 0)
    vector = dino.of(clip, torch.zeros(3, 8, 4, 4))
    assert (vector.shape, vector.dtype) == ((16,), np.float32)
    assert np.abs(vector - dino.of(look("bars", 0), torch.zeros(3, 8, 4, 4))).max() > 1e-3
    with pytest.raises(ConfigError, match="neither a folder nor a hub id; use builtin, text, i3d, efficientnet"):
        load_features("colour")
    transformers.BertModel(
        transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="of type bert; use builtin, text, i3d, efficientnet or a dinov2 model"):
        load_features(str(tmp_path / "bert"))


def test_joined_blocks_have_equal_weight() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(5, 100, (200, 2)), rng.normal(0, 0.01, (200, 50))
    wide[:, 7] = 3  # a constant coordinate says nothing
    joined = Joiner([narrow, wide])([narrow, wide])
    assert joined.shape == (200, 51)
    assert abs(joined[:, :2].var(0).sum() - joined[:, 2:].var(0).sum()) < 1e-3


def test_text_features_separate_captions() -> None:
    pooled = load_text_encoder("builtin:words", 6).encode(list(WORDS.values()))[1].numpy()
    assert np.linalg.matrix_rank(pooled) == 3


def test_networks_of_the_metrics_serve_as_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(write_assets(tmp_path / "assets", ["a"])))
    video, image = load_features("i3d+efficientnet+text")
    assert wants_text("i3d+efficientnet+text")
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 255, (10, 16, 16, 3), np.uint8)
    features = video.of(clip, torch.zeros(1, 1, 1, 1))
    assert features.shape == (64,)
    assert np.array_equal(features, video.of(clip, torch.zeros(1, 1, 1, 1)))
    assert image.of(clip, torch.zeros(1, 1, 1, 1)).shape == (1280,)
    assert video.fingerprint != image.fingerprint
    (named,) = load_features(f"i3d:{tmp_path / 'assets' / I3D_FILE}")
    assert named.fingerprint == video.fingerprint  # it depends on the weights, not on their path
    with pytest.raises(DataError, match=r"a clip of 8 frames is too short for I3D, which needs 10"):
        video.of(clip[:8], torch.zeros(1, 1, 1, 1))
    with pytest.raises(DataError, match=r"gone.safetensors do not exist"):
        load_features(f"efficientnet:{tmp_path / 'gone.safetensors'}")
