"""The pictures of a study: learning curves over FLOPs, and real clips beside those of both sides for the same prompts."""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lutetia.models.data.cluster.contact_sheets import LETTERS, fitted
from lutetia.models.study.results import CurvePoint, StudyResults, curve, main_distance
from lutetia.system.errors import ConfigError, plain
from lutetia.system.files import atomic_path, write_atomic
from lutetia.system.letters import font

COLOURS = {"monolith": "#b64a5f", "mixture": "#3b6fb6"}
RIVALS = "#c9922e", "#6a8f4f", "#7a6fa8", "#888888"
_SIDE, _SHOWN, _GAP, _LINE = 64, 4, 8, 14
Frames = NDArray[np.uint8]


def require_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib, which draws the curves, is not installed; run: pip install 'lutetia[study]'")


def draw_curves(results: StudyResults, path: Path) -> None:
    """Write a PNG with distance and held-out loss of the arms of the headline over FLOPs: a dot per seed, the floor dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = main_distance(results)
    colours = {**COLOURS, **dict(zip(results.config["controls"].get("full", ()), itertools.cycle(RIVALS), strict=False))}
    curves = {arm: curve(results, arm, name) for arm in colours}
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for arm, points in curves.items():
        _line(left, arm, colours[arm], points, [[figure.value for figure in point.figures] for point in points])
        _line(right, arm, colours[arm], points, [list(point.losses) for point in points])
    floors = [point.floor.value for points in curves.values() for point in points if point.floor]
    if floors:
        left.axhline(float(np.mean(floors)), linestyle="--", linewidth=1, color="#555555", label="real against real")
    count = results.config["evaluation"]["curve_clips"]
    for axes, label in ((left, f"{name} (N = {count}), lower is better"), (right, "held-out loss")):
        axes.set_xlabel("training FLOPs, router included")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylim(bottom=0)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)


def _line(axes, arm: str, colour: str, points: Sequence[CurvePoint], values: Sequence[Sequence[float]]) -> None:
    kept = [(point.flops, list(by_seed)) for point, by_seed in zip(points, values, strict=True) if by_seed]
    if not kept:
        return
    axes.plot([x for x, _ in kept], [np.mean(by_seed) for _, by_seed in kept], color=colour, label=arm)
    for x, by_seed in kept:
        axes.plot([x] * len(by_seed), by_seed, "o", markersize=3, color=colour, alpha=0.6)


def write_grid(path: Path, prompts: Sequence[str], columns: Mapping[str, Sequence[Frames]]) -> None:
    """Write a PNG with one row per prompt: a few frames of the clip (uint8 [F, H, W, 3]) of each column."""
    block = _SHOWN * _SIDE + _GAP
    sheet = Image.new("RGB", (len(columns) * block + _GAP, _LINE + len(prompts) * (_SIDE + _LINE + 4)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.font = font(LETTERS)
    for column, (name, clips) in enumerate(columns.items()):
        left = _GAP + column * block
        draw.text((left, 1), plain(name), fill=(0, 0, 0))
        for row, clip in enumerate(clips):
            top = _LINE + row * (_SIDE + _LINE + 4)
            for place, index in enumerate(np.linspace(0, len(clip) - 1, _SHOWN).round().astype(int)):
                picture = Image.fromarray(clip[index]).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
                sheet.paste(picture, (left + place * _SIDE, top))
    for row, prompt in enumerate(prompts):
        below = (_GAP, _LINE + row * (_SIDE + _LINE + 4) + _SIDE + 1)
        draw.text(below, fitted(draw, prompt, sheet.width - 2 * _GAP), fill=(60, 60, 60))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
