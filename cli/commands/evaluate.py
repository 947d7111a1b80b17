"""`lutetia evaluate`: how good the clips of a mixture are, against held-out real ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lutetia.cli.arguments import given, read_config, require_device, setting, settings_of
from lutetia.cli.output import JsonFlag, emit, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.models.metrics.report import MetricsReport


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command()(evaluate)


def evaluate(
    mixture: Annotated[Path, typer.Argument(help="A mixture's folder, or a folder of clips with captions.", metavar="MIXTURE")],
    data: Annotated[
        Path, typer.Argument(help="Real clips with captions; those of split test are judged against.", metavar="DATA")
    ],
    config: Annotated[Path | None, setting("EVALUATE_CONFIG", "Settings as TOML; flags win.")] = None,
    out: Annotated[Path | None, setting("EVALUATE_OUT", "Folder for report.json and report.md.")] = None,
    clips: Annotated[int | None, setting("EVALUATE_CLIPS", "Prompts, and as many real clips.", min=20)] = None,
    spare: Annotated[int | None, setting("EVALUATE_SPARE", "Further real clips, for the real-against-real floor.")] = None,
    fit_clips: Annotated[int | None, setting("EVALUATE_FIT", "Real training clips to fit probes on.", min=20)] = None,
    seed: Annotated[int | None, setting("EVALUATE_SEED", "Which clips, and which noise.")] = None,
    prompts: Annotated[
        Literal["natural", "stratified"] | None, setting("EVALUATE_PROMPTS", "As they come, or equally many of each kind.")
    ] = None,
    metric: Annotated[
        list[str] | None, setting("EVALUATE_METRICS", "fvd, motion, retrieval, classifier, clip; again for more.")
    ] = None,
    mode: Annotated[
        Literal["top1", "top2", "full", "sticky"] | None, setting("MODE", "How experts are chosen; the mixture's way without.")
    ] = None,
    expert: Annotated[int | None, setting("EXPERT", "Judge this expert alone.", min=0)] = None,
    steps: Annotated[int | None, setting("STEPS", "Steps of the ODE solver.", min=1)] = None,
    guidance: Annotated[float | None, setting("GUIDANCE", "Strength of the prompt.", min=0.0)] = None,
    frames: Annotated[int | None, setting("FRAMES", "Frames of a clip, where MIXTURE is a folder of clips.", min=1)] = None,
    fps: Annotated[float | None, setting("FPS", "Frames per second, likewise.", min=0.01)] = None,
    size: Annotated[int | None, setting("SIZE", "Height and width in pixels, likewise.", min=8)] = None,
    i3d: Annotated[Path | None, setting("I3D", "I3D's weights, if not in LUTETIA_ASSETS.")] = None,
    clip: Annotated[str | None, setting("CLIP", "CLIP for text-video similarity: folder or hub id.")] = None,
    aesthetic: Annotated[Path | None, setting("AESTHETIC", "LAION's aesthetic head for that CLIP (safetensors).")] = None,
    cache: Annotated[Path | None, setting("EVALUATE_CACHE", "Folder that keeps clips and features between calls.")] = None,
    device: Annotated[str | None, setting("DEVICE", "cpu, cuda or cuda:1.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge a mixture by held-out clips.

    It samples their prompts and measures Fréchet video distance, motion, agreement
    with the prompts and the held-out loss, each with N, interval and the figure
    of real clips. What this box has no weights for is named as left out.
    Cut short, the same call goes on where it was.
    """
    from lutetia.cli.progress import progress
    from lutetia.cli.workspace import ready
    from lutetia.models.data.build import default_cache
    from lutetia.models.metrics.report import EvaluateSettings
    from lutetia.models.metrics.report import evaluate as judge

    table = read_config(config)
    own = given(clips=clips, spare=spare, fit_clips=fit_clips, seed=seed, prompts=prompts, complete=True if metric else None)
    parts = {
        "sampling": given(mode=mode, expert=expert, steps=steps, guidance=guidance),
        "judges": given(metrics=metric, i3d=i3d, clip=clip, aesthetic=aesthetic, cache=cache, device=device),
        "shape": _shape(frames, fps, size),
    }
    for name, flags in parts.items():
        table[name] = {**table.get(name, {}), **flags}
    table["judges"].setdefault("cache", default_cache().parent / "metrics")
    if not table["shape"]:
        del table["shape"]
    settings = settings_of(EvaluateSettings, str(config or "options"), {**table, **own})
    require_device(settings.judges.device)
    if out is not None:
        ready(out)
    with progress("judging") as on_progress:
        report = judge(mixture, data, settings, on_progress)
    if out is not None:
        write_report(report, out)
    emit(report, as_json, lambda: render(report))


def _shape(frames: int | None, fps: float | None, size: int | None) -> dict[str, Any]:
    return given(frames=frames, fps=fps, height=size, width=size)


def write_report(report: MetricsReport, out: Path) -> None:
    """`report.json` for programs and `report.md` for people."""
    from lutetia.system.files import write_atomic

    write_atomic(out / "report.json", report.model_dump_json(indent=1).encode() + b"\n")
    write_atomic(out / "report.md", report.markdown().encode())
    say(f"wrote {out / 'report.md'} and {out / 'report.json'}")


def render(report: MetricsReport) -> RenderableType:
    """The figures as a table, what they rest on, and what is missing."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    table = Table("METRIC", "FIGURE [95 %]", "REAL CLIPS", "NOTE", box=None, pad_edge=False, header_style="bold")
    for entry in report.entries:
        real = f"{entry.real} (N = {entry.real.n})" if entry.real else "-"
        table.add_row(entry.name + arrows[entry.better], str(entry.figure), real, entry.note)
    head = Text(
        f"{report.judged} on {report.data}: {report.clips} clips of {report.shape} against {report.reference_clips} held-out "
        f"real ones ({report.prompts} prompts), seed {report.seed}; {report.hardware}; {report.seconds:.0f} s\n"
    )
    parts: list[RenderableType] = [head, table]
    if report.routing:
        load = ", ".join(f"{share:.1%}" for share in report.routing.load)
        parts.append(Text(f"\nrouting: load {load}; {report.routing.switches:.1f} changes of expert per clip"))
    parts += [Text(f"held-out loss of {name}: {loss.loss:.4f}") for name, loss in report.losses.items()]
    parts += [Text(f"left out: {name}: {reason}") for name, reason in report.left_out.items()]
    return Group(*parts)
