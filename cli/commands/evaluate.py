"""`lutetia evaluate`: measure the clips of a mixture against held-out real clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lutetia.cli.arguments import documented_by, given, read_config, require_device, setting, settings_of
from lutetia.cli.output import JsonFlag, emit, say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lutetia.models.metrics.report import MetricsReport


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    settings = "lutetia.models.metrics.settings"
    models = ("lutetia.models.mixing.options:SamplingOptions", f"{settings}:EvaluateSettings", f"{settings}:EvaluatorSettings")
    app.command(cls=documented_by(*models, metric="metrics", cache=""))(evaluate)


def evaluate(
    mixture: Annotated[Path, typer.Argument(help="A mixture's folder, or a folder of clips with captions.", metavar="MIXTURE")],
    data: Annotated[
        Path, typer.Argument(help="Real clips with captions; those of split test are the reference.", metavar="DATA")
    ],
    config: Annotated[Path | None, setting("EVALUATE_CONFIG", "Settings as TOML; flags override them.")] = None,
    out: Annotated[Path | None, setting("EVALUATE_OUT", "Folder for report.json and report.md.")] = None,
    clips: Annotated[int | None, setting("EVALUATE_CLIPS", min=20)] = None,
    spare: Annotated[int | None, setting("EVALUATE_SPARE")] = None,
    fit_clips: Annotated[int | None, setting("EVALUATE_FIT", min=20)] = None,
    seed: Annotated[int | None, setting("EVALUATE_SEED")] = None,
    prompts: Annotated[Literal["natural", "stratified"] | None, setting("EVALUATE_PROMPTS")] = None,
    metric: Annotated[list[str] | None, setting("EVALUATE_METRICS")] = None,
    mode: Annotated[Literal["top1", "top2", "full", "sticky"] | None, setting("MODE")] = None,
    expert: Annotated[int | None, setting("EXPERT", min=0)] = None,
    steps: Annotated[int | None, setting("STEPS", min=1)] = None,
    guidance: Annotated[float | None, setting("GUIDANCE", min=0.0)] = None,
    frames: Annotated[int | None, setting("FRAMES", "Frames of a clip, if MIXTURE is a folder of clips.", min=1)] = None,
    fps: Annotated[float | None, setting("FPS", "Frames per second, if MIXTURE is a folder of clips.", min=0.01)] = None,
    size: Annotated[int | None, setting("SIZE", "Height and width in pixels, if MIXTURE is a folder of clips.", min=8)] = None,
    i3d: Annotated[Path | None, setting("I3D")] = None,
    clip: Annotated[str | None, setting("CLIP")] = None,
    aesthetic: Annotated[Path | None, setting("AESTHETIC")] = None,
    cache: Annotated[Path | None, setting("EVALUATE_CACHE", "Folder that keeps samples and features between calls.")] = None,
    device: Annotated[str | None, setting("DEVICE")] = None,
    hub: Annotated[bool | None, setting("HUB", "", "--hub")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a mixture on held-out clips.

    It samples the prompts of held-out clips and measures Fréchet video distance,
    motion, agreement with the prompts and the held-out loss. Each figure has its N,
    its interval, and the figure of real clips. Metrics without weights on this
    machine are listed as left out. An interrupted call resumes when repeated.
    Needs the extra `study`.
    """
    from lutetia.cli.progress import progress
    from lutetia.cli.workspace import ready
    from lutetia.models.metrics.motion import require_opencv
    from lutetia.models.metrics.report import evaluate as evaluate_mixture
    from lutetia.models.metrics.settings import EvaluateSettings
    from lutetia.system.paths import default_cache_folder

    table = read_config(config)
    flags = given(
        clips=clips, spare=spare, fit_clips=fit_clips, seed=seed, prompts=prompts, hub=hub, complete=True if metric else None
    )
    parts = {
        "sampling": given(mode=mode, expert=expert, steps=steps, guidance=guidance),
        "evaluator": given(metrics=metric, i3d=i3d, clip=clip, aesthetic=aesthetic, cache=cache, device=device),
        "shape": _shape(frames, fps, size),
    }
    for name, values in parts.items():
        table[name] = {**table.get(name, {}), **values}
    table["evaluator"].setdefault("cache", default_cache_folder() / "metrics")
    if not table["shape"]:
        del table["shape"]
    settings = settings_of(EvaluateSettings, str(config or "options"), {**table, **flags})
    if "motion" in settings.evaluator.metrics:
        require_opencv()
    require_device(settings.evaluator.device)
    if out is not None:
        ready(out)
    with progress("evaluation") as on_progress:
        report = evaluate_mixture(mixture, data, settings, on_progress)
    if out is not None:
        write_report(report, out)
    emit(report, as_json, lambda: render(report))


def _shape(frames: int | None, fps: float | None, size: int | None) -> dict[str, Any]:
    return given(frames=frames, fps=fps, height=size, width=size)


def write_report(report: MetricsReport, out: Path) -> None:
    """Write `report.json` for programs and `report.md` for people."""
    from lutetia.system.files import write_atomic

    write_atomic(out / "report.json", report.model_dump_json(indent=1).encode() + b"\n")
    write_atomic(out / "report.md", report.markdown().encode())
    say(f"wrote {out / 'report.md'} and {out / 'report.json'}")


def render(report: MetricsReport) -> RenderableType:
    """The figures as a table, with their setting and what was left out."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    table = Table("METRIC", "FIGURE [95 %]", "REAL CLIPS", "NOTE", box=None, pad_edge=False, header_style="bold")
    for entry in report.entries:
        real = f"{entry.real} (N = {entry.real.n})" if entry.real else "-"
        table.add_row(entry.name + arrows[entry.better], str(entry.figure), real, entry.note)
    head = Text(
        f"{report.evaluated} on {report.data}: {report.clips} clips of {report.shape} against {report.reference_clips} held-out "
        f"real ones ({report.prompts} prompts), seed {report.seed}; {report.hardware}; {report.seconds:.0f} s\n"
    )
    parts: list[RenderableType] = [head, table]
    if report.routing:
        load = ", ".join(f"{share:.1%}" for share in report.routing.load)
        parts.append(Text(f"\nrouting: load {load}; {report.routing.switches:.1f} changes of expert per clip"))
    parts += [Text(f"held-out loss of {name}: {loss.loss:.4f}") for name, loss in report.losses.items()]
    parts += [Text(f"left out: {name}: {reason}") for name, reason in report.left_out.items()]
    return Group(*parts)
