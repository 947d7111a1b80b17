"""`lutetia generate`: make clips with a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lutetia.cli.arguments import documented_by, setting
from lutetia.cli.output import JsonFlag, emit

Mode = Literal["top1", "top2", "full", "sticky"]


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command(cls=documented_by("lutetia.models.mixing.options:SamplingOptions"))(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the clip shows, in words the run was trained on.", metavar="PROMPT")],
    mixture: Annotated[Path, setting("MIXTURE", "The mixture's folder.")],
    out: Annotated[Path, setting("GENERATE_OUT", "File to write, .mp4 or .gif.")] = Path("clip.mp4"),
    mode: Annotated[Mode | None, setting("MODE")] = None,
    steps: Annotated[int | None, setting("STEPS", min=1)] = None,
    guidance: Annotated[float | None, setting("GUIDANCE", min=0.0)] = None,
    seed: Annotated[int, setting("SEED", "Same seed, same clip.")] = 0,
    hub: Annotated[
        bool, setting("HUB", "Download the text encoder or autoencoder if the mixture names one by a hub id. It runs no code.")
    ] = False,
    n: Annotated[int, setting("N", "Number of clips; several get numbered files.", "--n", min=1, max=64)] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Generate a clip from a prompt."""
    from lutetia.cli.local.gallery import check_ending, write_clip
    from lutetia.cli.local.sampler import MixtureLoader
    from lutetia.cli.workspace import ready

    check_ending(out)
    ready(out.parent)

    sampler = MixtureLoader(mixture, hub=hub)
    sampled = sampler.sample([prompt] * n, seed=seed, mode=mode, steps=steps, guidance=guidance)
    files = numbered(out, n)
    for file, clip in zip(files, sampled.clips, strict=True):
        write_clip(clip, file, sampler.fps)
    document = {"files": [str(file) for file in files], "seed": seed, "experts": sampled.experts}
    emit(document, as_json, lambda: f"wrote {', '.join(document['files'])}; experts used: {usage(sampled.experts[0])}")


def numbered(out: Path, n: int) -> list[Path]:
    """The files of `n` clips: `out` itself, or `out` with `-1`, `-2`, … before its ending."""
    return [out] if n == 1 else [out.with_name(f"{out.stem}-{index + 1}{out.suffix}") for index in range(n)]


def usage(chosen: Sequence[dict[str, float]]) -> str:
    """The experts that had the largest weight in one clip's steps: `digits in 23 of 25 steps, shapes in 2 of 25 steps`."""
    counts: dict[str, int] = {}
    for step in chosen:
        best = max(step, key=lambda name: step[name])
        counts[best] = counts.get(best, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} in {count} of {len(chosen)} steps" for name, count in ordered)
