"""`lutetia generate`: make clips with a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lutetia.cli.arguments import documented_by, setting
from lutetia.cli.output import JsonFlag, emit, say
from lutetia.system.errors import UsageError, disk_reason

Mode = Literal["top1", "top2", "full", "sticky"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MOST_PROMPTS = 1000
MOST_PROMPT_BYTES = 1 << 22


def register(app: typer.Typer) -> None:
    """Add the command to the top level."""
    app.command(cls=documented_by("lutetia.models.mixing.options:SamplingOptions"))(generate)


def generate(
    mixture: Annotated[Path, setting("MIXTURE", "The mixture's folder.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What the clip shows, in words the run was trained on.", metavar="[PROMPT]")
    ] = None,
    prompts: Annotated[Path | None, setting("PROMPTS", "File with a prompt on every line, instead of PROMPT.")] = None,
    negative: Annotated[str | None, setting("NEGATIVE", "What the clips should not show, in words.")] = None,
    image: Annotated[
        Path | None, setting("IMAGE", "Picture that the clips begin with, cut to their shape; of a mixture with first frames.")
    ] = None,
    other: Annotated[
        Path | None,
        setting(
            "OTHER", "Mixture for the other part of the noise levels, of a run from a pipeline with two transformers; default: "
            "the pipeline's own.",
        ),
    ] = None,
    out: Annotated[Path, setting("GENERATE_OUT", "File to write, .mp4 or .gif.")] = Path("clip.mp4"),
    mode: Annotated[Mode | None, setting("MODE")] = None,
    steps: Annotated[int | None, setting("STEPS", min=1)] = None,
    guidance: Annotated[float | None, setting("GUIDANCE", min=0.0)] = None,
    size: Annotated[
        str | None,
        setting("SIZE", "Width and height in pixels of one of the run's buckets; default: the first.", metavar="WxH"),
    ] = None,
    frames: Annotated[
        int | None, setting("FRAMES", "Frames of a clip, of one of the run's buckets; default: the first that fits.", min=1)
    ] = None,
    seed: Annotated[int, setting("SEED", "Same seed, same clip.")] = 0,
    device: Annotated[
        str, setting("DEVICE", "Device to compute on: auto (the best one), cpu, mps, cuda, cuda:N, xpu or xpu:N.")
    ] = "auto",
    dtype: Annotated[Dtype, setting("DTYPE", "Data type of router and experts; auto takes what the device is fast in.")] = "auto",
    experts_in_memory: Annotated[
        int | None,
        setting("EXPERTS_IN_MEMORY", "Most experts held at a time; default: as many as fit into half of the free memory.", min=1),
    ] = None,
    batch: Annotated[int | None, setting("BATCH", "Clips sampled at once; default: by their size, at most 8.", min=1)] = None,
    tiling: Annotated[
        bool | None,
        setting(
            "TILING", "Decode in overlapping tiles, which takes less memory; default: for frames above 512 × 512 pixels.",
            "--tiling/--no-tiling", show_default=False,
        ),
    ] = None,
    hub: Annotated[
        bool,
        setting("HUB", "Download the text encoder, autoencoder or base that the mixture names by a hub id. It runs no code."),
    ] = False,
    base: Annotated[
        Path | None, setting("BASE", "Folder of the base of a mixture of adapters; default: what was downloaded before.")
    ] = None,
    n: Annotated[int, setting("N", "Number of clips of each prompt; several get numbered files.", "--n", min=1, max=64)] = 1,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Generate clips from prompts."""
    from lutetia.cli.local.first_picture import read_picture
    from lutetia.cli.local.gallery import check_ending, write_clip
    from lutetia.cli.local.sampler import MixtureLoader
    from lutetia.cli.local.sampling_plan import bucket_of, clips_at_once, plan_sampling
    from lutetia.cli.progress import progress
    from lutetia.cli.workspace import ready
    from lutetia.models.mixing.description import read_mixture

    texts = [text for text in wanted_prompts(prompt, prompts) for _ in range(n)]
    check_ending(out)
    ready(out.parent)
    document = read_mixture(mixture).mixture
    bucket = bucket_of(document.latent, size, frames)
    document = document.model_copy(update={"latent": bucket})
    first = None if image is None else read_picture(image, bucket.pixel_width, bucket.pixel_height)
    plan = plan_sampling(document, device=device, dtype=dtype, experts_in_memory=experts_in_memory, tiling=tiling)
    say(plan.reason)
    sampler = MixtureLoader(mixture, hub=hub, plan=plan, base=base)
    if other:
        sampler.pipeline.pair_with(other, base)
    _ = sampler.pipeline.other_part  # refuses before the long work begins
    files, experts = numbered(out, len(texts)), []
    with progress("generate") as report:
        clips = sampler.generate(
            texts, negative=negative, seed=seed, batch=batch or clips_at_once(document.latent), mode=mode, steps=steps,
            guidance=guidance, bucket=bucket, image=first,
            on_cut=lambda problem: say(f"warning: {problem}; its end is cut, as in training"),
            on_step=lambda done, total: report("steps", done, total),
        )  # fmt: skip
        for file, clip in zip(files, clips, strict=True):
            write_clip(clip.frames, file, sampler.fps)
            experts.append(clip.experts)
            report("clips written", len(experts), len(texts))
    emit_result(files, seed, texts, experts, as_json)


def emit_result(
    files: Sequence[Path], seed: int, texts: Sequence[str], experts: list[list[dict[str, float]]], as_json: bool
) -> None:
    """Print which files were written and which experts made the first clip, or all of it as JSON."""
    document = {"files": [str(file) for file in files], "seed": seed, "prompts": list(texts), "experts": experts}
    emit(document, as_json, lambda: f"wrote {', '.join(document['files'])}; experts used: {usage(experts[0])}")


def wanted_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompts: the one of the command line, or the lines of `file` that are not empty. Raises UsageError."""
    if (prompt is None) == (file is None):
        raise UsageError("give a prompt, or a file of prompts by --prompts, and not both")
    if file is None:
        return [prompt or ""]
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_PROMPT_BYTES + 1)
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise UsageError(f"cannot read prompts from {file}: {disk_reason(error)}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not text in UTF-8; save it so") from error
    texts = [line for line in lines if line]
    if not texts or len(texts) > MOST_PROMPTS or len(data) > MOST_PROMPT_BYTES:
        raise UsageError(f"{file} must hold 1 to {MOST_PROMPTS} prompts in at most 4 MiB, one on each line, not {len(texts)}")
    return texts


def numbered(out: Path, n: int) -> list[Path]:
    """The files of `n` clips: `out` itself, or `out` with `-1`, `-2`, … before its ending."""
    return [out] if n == 1 else [out.with_name(f"{out.stem}-{index + 1}{out.suffix}") for index in range(n)]


def usage(chosen: Sequence[dict[str, float]]) -> str:
    """The experts that had the largest weight in one clip's steps: `digits in 23 of 25 steps, shapes in 2 of 25 steps`.

    A step without experts was made by a model of the other part of the noise levels.
    """
    counts: dict[str, int] = {}
    for step in chosen:
        best = max(step, key=lambda name: step[name]) if step else "the other part"
        counts[best] = counts.get(best, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} in {count} of {len(chosen)} steps" for name, count in ordered)
