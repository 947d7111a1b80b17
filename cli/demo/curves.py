"""The curves of a run as pictures: held-out loss per expert over accepted epochs, router accuracy per part of the noise scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lutetia.coordinator.ledger.events import Event

COLOURS = ("#3b6fb6", "#d1743a", "#4a9a5d", "#9a5aa6", "#8a6d3b", "#5a8f99", "#b64a5f", "#7a7a7a")


@dataclass(frozen=True)
class LossCurve:
    """Held-out loss of one expert: (epoch, loss, author) for the start and every accepted checkpoint, and its clock times."""

    shard: int
    name: str
    epochs: tuple[int, ...]
    losses: tuple[float, ...]
    times: tuple[float, ...]
    authors: tuple[str, ...]


def loss_curves(events: Iterable[Event], names: Sequence[str]) -> list[LossCurve]:
    """One curve per shard from the ledger's events; shards without any point give an empty one."""
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
    """PNG of held-out losses; `takeover` (shard, epoch) marks where another worker went on."""

    def paint(axes: Axes) -> None:
        for curve in curves:
            colour = COLOURS[curve.shard % len(COLOURS)]
            axes.plot(
                curve.epochs, curve.losses, marker="o", markersize=4, color=colour, label=f"expert {curve.shard}: {curve.name}"
            )
        if takeover:
            shard, epoch = takeover
            curve = curves[shard]
            if epoch in curve.epochs:
                loss = curve.losses[curve.epochs.index(epoch)]
                axes.annotate(
                    "worker killed,\nanother goes on", (epoch, loss), textcoords="offset points", xytext=(14, 26), fontsize=8,
                    arrowprops={"arrowstyle": "->", "color": "#555555"},
                )  # fmt: skip
        axes.set_xlabel("accepted checkpoints (epochs)")
        axes.set_ylabel("held-out loss")
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(1 + max((epoch for curve in curves for epoch in curve.epochs), default=0)))
        axes.legend(frameon=False, fontsize=8)

    _picture(path, paint)


def draw_router(accuracy_by_time: Sequence[float], experts: int, path: Path) -> None:
    """PNG of the router's held-out accuracy in equal bins of t (0 clean, 1 noise); the dashed line is guessing."""

    def paint(axes: Axes) -> None:
        width = 1 / max(1, len(accuracy_by_time))
        centres = [width * (index + 0.5) for index in range(len(accuracy_by_time))]
        axes.bar(centres, [100 * value for value in accuracy_by_time], width=0.9 * width, color=COLOURS[0])
        axes.axhline(100 / experts, linestyle="--", linewidth=1, color="#555555", label=f"guessing among {experts}")
        axes.set_xlabel("t (0: clean clip, 1: pure noise)")
        axes.set_ylabel("right expert, % of held-out clips")
        axes.set_ylim(0, 105)
        axes.legend(frameon=False, fontsize=8, loc="lower left")

    _picture(path, paint)


def _picture(path: Path, paint: Callable[[Axes], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    paint(axes)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110)
