"""I3D: the padding of TensorFlow, the published output, and refused input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lutetia.models.metrics.stats.frechet import frechet_of_rows
from lutetia.models.networks.assets import I3D_FILE, asset
from lutetia.models.networks.i3d import I3D, I3DExtractor, Unit, max_pool_same, preprocess, same_padding
from lutetia.system.errors import DataError, IntegrityError
from tests.models.small_networks import write_assets


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        ((16, 224, 224), (7, 7, 7), (2, 2, 2), [2, 3, 2, 3, 2, 3]),  # odd padding: the larger half behind
        ((15, 7, 7), (3, 3, 3), (2, 2, 2), [1, 1, 1, 1, 1, 1]),
        ((8, 28, 28), (3, 3, 3), (2, 2, 2), [0, 1, 0, 1, 0, 1]),
        ((4, 14, 14), (1, 1, 1), (1, 1, 1), [0, 0, 0, 0, 0, 0]),
        ((3, 14, 14), (2, 2, 2), (2, 2, 2), [0, 0, 0, 0, 0, 1]),
    ],
)
def test_same_padding_matches_tensorflow(size, kernel, stride, pads) -> None:
    assert same_padding(size, kernel, stride) == pads


def test_max_pool_ignores_padding() -> None:
    negative = -torch.rand(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0)) - 1
    pooled = max_pool_same(negative, (3, 3, 3), (2, 2, 2))
    assert pooled.shape == (1, 2, 3, 3, 4)
    assert (pooled <= -1).all()
    assert pooled[0, 0, 0, 0, 0] == negative[0, 0, :2, :3, :2].max()  # padding in front: one for 5 and for 7, none for 6


def test_folded_unit_equals_convolution_and_normalisation() -> None:
    tensors = {
        "u/w": torch.randn(4, 3, 3, 3, 3),
        "u/beta": torch.randn(4),
        "u/mean": torch.randn(4),
        "u/var": torch.rand(4) + 0.1,
    }
    x = torch.randn(2, 3, 5, 6, 6)
    raw = F.conv3d(F.pad(x, same_padding((5, 6, 6), (3, 3, 3), (2, 2, 2))), tensors["u/w"], stride=2)
    mean, var, beta = (tensors[f"u/{name}"].view(1, 4, 1, 1, 1) for name in ("mean", "var", "beta"))
    expected = torch.relu((raw - mean) / torch.sqrt(var + 1e-3) + beta)
    assert torch.allclose(Unit(tensors, "u", (2, 2, 2))(x), expected, atol=1e-5)


def test_preprocess_maps_to_minus_one_to_one() -> None:
    black_and_white = torch.stack([torch.zeros(10, 8, 8, 3), torch.full((10, 8, 8, 3), 255)]).to(torch.uint8)
    ready = preprocess(black_and_white)
    assert ready.shape == (2, 3, 10, 224, 224)
    assert (ready[0] == -1).all()
    assert torch.allclose(ready[1], torch.ones(()), atol=1e-6)


def test_black_against_white_has_the_published_distance(asset_or_skip: Callable[[str], Path]) -> None:
    """The example of the original code ("should be around 131"); an independent port with the same weights gives 133.908."""
    extractor = I3DExtractor(asset_or_skip(I3D_FILE))
    black = torch.zeros(1, 15, 64, 64, 3, dtype=torch.uint8)
    embedded = [extractor(clip)["logits"].expand(16, -1).numpy() for clip in (black, ~black)]
    assert frechet_of_rows(*embedded) == pytest.approx(133.908, abs=0.02)


def test_nine_frames_are_refused(asset_or_skip: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(asset_or_skip(I3D_FILE).parent))
    with pytest.raises(DataError, match=r"9 frames is too short for I3D, which needs 10"):
        I3DExtractor()(torch.zeros(1, 9, 16, 16, 3, dtype=torch.uint8))


def test_missing_or_foreign_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path / I3D_FILE} do not exist; set LUTETIA_ASSETS"):
        I3DExtractor()
    with pytest.raises(DataError, match=r"mine.safetensors do not exist; give another path"):
        asset(I3D_FILE, tmp_path / "mine.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(IntegrityError, match=r"cut.safetensors is not a complete safetensors file"):
        I3DExtractor(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(IntegrityError, match=r"not the weights of I3D: Conv3d_1a_7x7/w is missing"):
        I3DExtractor(tmp_path / "other.safetensors")
    with pytest.raises(IntegrityError):
        I3D({"Conv3d_1a_7x7/w": torch.from_numpy(np.zeros((64, 3, 7, 7, 7), np.float32))})


def test_bfloat16_is_close_and_has_its_own_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(write_assets(tmp_path / "assets", ["a"])))
    clips = torch.randint(0, 255, (2, 10, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    whole, half = I3DExtractor(), I3DExtractor(precision="bfloat16")
    assert whole.tag != half.tag
    exact, near = whole(clips), half(clips)
    for name in ("logits", "pooled"):
        assert near[name].dtype == torch.float32
        assert not torch.equal(near[name], exact[name])
        assert torch.allclose(near[name], exact[name], atol=0.1 * float(exact[name].abs().max()))
