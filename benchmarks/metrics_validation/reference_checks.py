"""Sections of the validation: networks, distances and intervals against published values, other code and known truth."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.linalg import sqrtm

from benchmarks.metrics_validation.i3d_jax import second_i3d
from lutetia.models.metrics.motion import METHOD, MotionExtractor
from lutetia.models.metrics.stats.frechet import (
    Array,
    Gaussian,
    frechet,
    frechet_at_infinity,
    frechet_debiased,
    frechet_of_rows,
    gaussian,
    polynomial_mmd,
)
from lutetia.models.metrics.stats.intervals import percentile, subsampling
from lutetia.models.networks.assets import EFFICIENTNET_FILE, I3D_FILE, asset, load_tensors
from lutetia.models.networks.efficientnet import EfficientNetLite0
from lutetia.models.networks.i3d import I3DExtractor, preprocess
from lutetia.models.networks.sentences import MiniLM

CARD = (0.695, 0.943, 0.257)  # cosines from the model card of all-MiniLM-L6-v2


def networks(i3d: I3DExtractor, real: torch.Tensor) -> Iterator[list[str]]:
    """Rows that compare I3D, MiniLM, EfficientNet and the optical flow with known values."""
    black = torch.zeros(1, 15, 64, 64, 3, dtype=torch.uint8)
    value = frechet_of_rows(*(i3d(clip)["logits"].double().expand(16, -1).numpy() for clip in (black, ~black)))
    yield [
        "FVD, 16 black against 16 white clips, 15 frames",
        f"{value:.3f}",
        "“around 131” (its authors' example)",
        f"{value - 131:+.1f}",
    ]
    second = second_i3d(load_tensors(asset(I3D_FILE)))
    if second is None:
        yield ["I3D against i3d-jax", "–", "i3d-jax, jax and flax are not installed", "–"]
    else:
        second_value = frechet_of_rows(*(np.repeat(second(preprocess(clip)), 16, axis=0) for clip in (black, ~black)))
        yield ["the same by i3d-jax", f"{value:.3f}", f"{second_value:.3f}", f"{value - second_value:+.1e}"]
        few = torch.cat([real[:3], _noise_clip()])
        logits, second_logits = i3d(few)["logits"].double().numpy(), second(preprocess(few))
        yield [
            "I3D logits, 3 real clips and 1 of noise",
            f"up to {np.abs(logits).max():.1f}",
            "i3d-jax",
            f"{np.abs(logits - second_logits).max():.1e}",
        ]
    vectors = MiniLM()(["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"])
    cosines = (vectors @ vectors[0])[1:].numpy()
    difference = np.abs(cosines - CARD).max()
    measured, published = (", ".join(f"{value:.3f}" for value in row) for row in (cosines, CARD))
    yield ["MiniLM, happy person against dog / very happy / sunny", measured, f"{published} (model card)", f"{difference:.1e}"]
    yield _efficientnet_row()
    texture = _gliding(2.0)
    speed = float(MotionExtractor()(texture)["speed"])
    yield [f"optical flow ({METHOD}) of a texture at 2 px/frame", f"{speed:.3f}", "2", f"{speed - 2:+.3f}"]


def distances_table(x: Array, y: Array) -> Iterator[list[str]]:
    """Rows that compute one Fréchet distance in three ways on real features with N < D, where covariances are singular."""
    a, b = gaussian(x), gaussian(y)
    root = np.asarray(sqrtm(a.covariance @ b.covariance))
    slow = float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real)
    for name, value in (
        ("eigvalsh of the symmetrised product", frechet(a, b)),
        ("singular values, no covariances", frechet_of_rows(x, y)),
    ):
        yield [name, f"{value:.4f}", f"{slow:.4f}", f"{value - slow:+.1e}"]


def floors(rows: Array) -> Iterator[list[str]]:
    """Rows with the distance of two halves of the real set at growing N: the bias that is left."""
    generator = np.random.default_rng(0)
    for count, earlier in ((25, "–"), (50, "489"), (100, "294"), (130, "–")):
        drawn = [generator.permutation(len(rows)) for _ in range(5)]
        pairs = [(rows[order[:count]], rows[order[count : 2 * count]]) for order in drawn]
        cells = [
            np.mean([f(x, y) for x, y in pairs]) for f in (frechet_of_rows, frechet_at_infinity, frechet_debiased, polynomial_mmd)
        ]
        yield [str(count), *(f"{cell:.1f}" for cell in cells[:3]), f"{cells[3]:.2f}", earlier]


def known_truth() -> Iterator[list[str]]:
    """Rows for Gaussians of 400 dimensions whose true distance is known."""
    generator = np.random.default_rng(0)
    spread = 3 / np.arange(1, 401) ** 0.5
    for name, scale, shift in (("equal", 1.0, 0.0), ("shifted", 1.0, 1.0), ("half as wide, shifted", 0.5, 2.0)):
        mean = np.where(np.arange(400) < 20, shift, 0)
        truth = frechet(Gaussian(0 * mean, np.diag(spread**2), 1), Gaussian(mean, np.diag((spread * scale) ** 2), 1))
        for count, repeats in ((64, 6), (256, 2)):
            pairs = [
                (_normal(generator, count, spread), _normal(generator, count, spread * scale) + mean) for _ in range(repeats)
            ]
            cells = [np.mean([f(x, y) for x, y in pairs]) for f in (frechet_of_rows, frechet_at_infinity, frechet_debiased)]
            yield [name, str(count), f"{truth:.1f}", *(f"{cell:.1f}" for cell in cells)]


def coverage(repeats: int = 60) -> Iterator[list[str]]:
    """Rows with how often a 95 % interval holds the expected distance at this N (Gaussians, D = 100, N = 64)."""
    generator = np.random.default_rng(1)
    spread = 5 / np.arange(1, 101) ** 0.7
    shift = np.where(np.arange(100) < 10, 1.0, 0.0)
    draws = [(_normal(generator, 64, spread), _normal(generator, 64, 1.2 * spread) + shift) for _ in range(300)]
    truth = np.mean([frechet_of_rows(x, y) for x, y in draws])
    for name, interval in (("subsets of 80 % (used here)", subsampling), ("bootstrap percentiles", percentile)):
        figures = [
            interval(lambda i, j, x=x, y=y: frechet_of_rows(x[i], y[j]), [64, 64], resamples=60, seed=number)
            for number, (x, y) in enumerate(draws[:repeats])
        ]
        coverage_share = np.mean([figure.low <= truth <= figure.high for figure in figures])
        yield [name, f"{coverage_share:.0%}", f"{np.mean([figure.high - figure.low for figure in figures]):.1f}"]


def _efficientnet_row() -> list[str]:
    name = "EfficientNet-lite0 logits on noise"
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return [name, "–", "efficientnet-lite-pytorch is not installed", "–"]
    tensors = load_tensors(asset(EFFICIENTNET_FILE))
    second: Any = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    second.load_state_dict(tensors)
    noise = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, second_logits = EfficientNetLite0(tensors).classify(noise), second.eval()(noise)
    difference = float((logits - second_logits).abs().max())
    return [name, f"up to {float(logits.abs().max()):.1f}", "efficientnet-lite-pytorch", f"{difference:.1e}"]


def _gliding(speed: float) -> torch.Tensor:
    y, x = np.mgrid[:64, :64]
    frames = [128 + 50 * np.sin((x - speed * t) / 4) * np.cos(y / 5) + 50 * np.sin((x - speed * t + 2 * y) / 7) for t in range(8)]
    return torch.from_numpy(np.stack(frames).round().astype(np.uint8))[None, ..., None].expand(-1, -1, -1, -1, 3)


def _normal(generator: np.random.Generator, count: int, spread: Array) -> Array:
    return generator.normal(size=(count, len(spread))) * spread


def _noise_clip() -> torch.Tensor:
    """One clip of noise, uint8 [1, 16, 64, 64, 3]."""
    return torch.randint(0, 256, (1, 16, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
