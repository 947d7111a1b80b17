"""Curves of a run as PNG files: held-out loss of each expert over accepted epochs, router accuracy over noise levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.system.errors import plain
from lutetia.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lutetia.coordinator.ledger.events import Event

COLOURS = ("#3b6fb6", "#d1743a", "#4a9a5d", "#9a5aa6", "#8a6d3b", "#5a8f99", "#b64a5f", "#7a7a7a")


@dataclass(frozen=True)
class LossCurve:
    """Held-out loss of one expert, one entry for the start and one for every accepted checkpoint.

    `times` are Unix seconds; `authors` are public keys, empty for the start.
    """

    shard: int
    name: str
    epochs: tuple[int, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]
    authors: tuple[str, ...]


def loss_curves(events: Iterable[Event], names: Sequence[str]) -> list[LossCurve]:
    """Make one curve per shard from the ledger's events. A shard without points gets an empty curve."""
    points: dict[int, dict[int, tuple[float, float, str]]] = {shard: {} for shard in range(len(names))}
    for event in events:
        match event.kind:
            case "baseline-measured":
                points[event.shard][0] = (event.loss, event.time, "")
            case "checkpoint-accepted":
                acceptance = event.acceptance
                points[acceptance.shard][acceptance.epoch] = (acceptance.holdout_loss, event.time, acceptance.author)
            case _:
                continue
    curves = []
    for shard, name in enumerate(names):
        ordered = sorted(points[shard].items())
        columns = [(epoch, *point) for epoch, point in ordered]
        epochs, losses, times, authors = zip(*columns, strict=True) if columns else ((), (), (), ())
        curves.append(LossCurve(shard, name, tuple(epochs), tuple(losses), tuple(times), tuple(authors)))
    return curves


def draw_losses(curves: Sequence[LossCurve], path: Path, takeover: tuple[int, int] | None = None) -> None:
    """Draw held-out losses as a PNG. `takeover` (shard, epoch) marks where another node continued."""

    def paint(axes: Axes) -> None:
        for curve in curves:
            colour = COLOURS[curve.shard % len(COLOURS)]
            axes.plot(
                curve.epochs,
                curve.losses,
                marker="o",
                markersize=4,
                color=colour,
                label=f"expert {curve.shard}: {plain(curve.name)}",
            )
        if takeover:
            shard, epoch = takeover
            curve = curves[shard]
            if epoch in curve.epochs:
                loss = curve.losses[curve.epochs.index(epoch)]
                axes.annotate(
                    "node killed,\nanother continues", (epoch, loss), textcoords="offset points", xytext=(14, 26), fontsize=8,
                    arrowprops={"arrowstyle": "->", "color": "#555555"},
                )  # fmt: skip
        axes.set_xlabel("accepted checkpoints (epochs)")
        axes.set_ylabel("held-out loss")
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(1 + max((epoch for curve in curves for epoch in curve.epochs), default=0)))
        axes.legend(frameon=False, fontsize=8)

    _draw(path, paint)


def draw_router(accuracy_by_time: Sequence[float], experts: int, path: Path) -> None:
    """Draw the router's held-out accuracy in equal bins of t (0 clean, 1 noise) as a PNG; the dashed line is guessing."""

    def paint(axes: Axes) -> None:
        width = 1 / max(1, len(accuracy_by_time))
        centres = [width * (index + 0.5) for index in range(len(accuracy_by_time))]
        axes.bar(centres, [100 * value for value in accuracy_by_time], width=0.9 * width, color=COLOURS[0])
        axes.axhline(100 / experts, linestyle="--", linewidth=1, color="#555555", label=f"guessing among {experts}")
        axes.set_xlabel("t (0: clean clip, 1: pure noise)")
        axes.set_ylabel("right expert, % of held-out clips")
        axes.set_ylim(0, 105)
        axes.legend(frameon=False, fontsize=8, loc="lower left")

    _draw(path, paint)


def _draw(path: Path, paint: Callable[[Axes], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # dollars in a cluster's name are no formula
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        paint(axes)
        with atomic_path(path) as part:
            figure.savefig(part, format="png", dpi=110)
