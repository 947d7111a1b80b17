"""The commented TOML that `lutetia init` writes, from which `data build`, `run create` and `coordinator serve` run."""

from __future__ import annotations

import json
from pathlib import Path

from lutetia.cli.init.proposal import BudgetChoice, DataChoice, Measured
from lutetia.models.training.memory.needs import hours_text

DATA, RUN = "data", "run"  # folders in the commands below
_COLUMN = 33  # of the comments


def commands(clips: Path, file: Path) -> tuple[str, str, str]:
    """The commands that build the data, create the run and serve it."""
    return (
        f"lutetia data build {_word(clips)} {DATA} --config {_word(file)}",
        f"lutetia run create {DATA} {RUN} --config {_word(file)}",
        f"lutetia coordinator serve {RUN} --config {_word(file)}",
    )


def _word(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def render(
    clips: Path, file: Path, choice: DataChoice, budget: BudgetChoice, measured: Measured, pipeline: str | None = None,
    part: str | None = None,
) -> str:  # fmt: skip
    """The content of the file; `part` of the noise levels is written if the pipeline has two transformers."""
    why, file_text = choice.why, []
    for group in (_head(clips, file), _data(choice, why) + _encoders(pipeline), _run(choice, budget, measured, pipeline, part)):
        file_text += [*map(_line, group), ""]
    return "\n".join([*file_text, "[serve]", '# http = "127.0.0.1:8080"         # status page and metrics', ""])


def _line(entry: tuple[str, str]) -> str:
    setting, comment = entry
    return f"{setting:<{_COLUMN}}# {comment}" if setting and comment else setting or f"# {comment}"


def _head(clips: Path, file: Path) -> list[tuple[str, str]]:
    return [
        ("", _comment(f"Settings of a run on the clips in {clips}, proposed by `lutetia init`. Change what you like. Then:")),
        *(("", f"  {_comment(command)}") for command in commands(clips, file)),
        ("", "All keys are in docs/reference/settings.md."),
    ]


def _data(choice: DataChoice, why: dict[str, str]) -> list[tuple[str, str]]:
    return [
        ("[data]", "lutetia data build"),
        (f"experts = {choice.experts}", why["experts"]),
        (f"smallest = {choice.smallest}", f"fewest clips in a shard: {why['smallest']}"),
        (f"frames = {choice.frames}", "of a clip"),
        (f"fps = {choice.fps:g}", why["fps"]),
        (f"height = {choice.side}", f"px; {why['height']}"),
        (f"width = {choice.side}", "px"),
        (f"short = {json.dumps(choice.short)}", why["short"]),
        ("skip_bad = true", "clips that cannot be used are left out and listed"),
    ]


def _encoders(pipeline: str | None) -> list[tuple[str, str]]:
    if pipeline:
        return [(f"pipeline = {json.dumps(pipeline)}", "autoencoder, text encoder and token count are taken from it")]
    return [
        (
            "",
            'latents = "builtin:demo"       # a stand-in, made for the demo: name an autoencoder, by folder or hub id',
        ),
        (
            "",
            'text = "builtin:words"         # a stand-in that knows no meaning of words: name a CLIP or T5, by folder or hub id',
        ),
    ]


def _run(
    choice: DataChoice, budget: BudgetChoice, measured: Measured, pipeline: str | None, part: str | None
) -> list[tuple[str, str]]:
    million = measured.parameters / 1e6
    return [
        ("[run]", "lutetia run create"),
        ('name = "run"', "shown to people"),
        *([(f"pipeline = {json.dumps(pipeline)}", "the experts start from its transformer")] if pipeline else []),
        *(
            [(f"part = {json.dumps(part)}", "of the noise levels: high or low; a run trains one of the two transformers")]
            if part
            else []
        ),
        ('addresses = ["127.0.0.1:41000"]', "where volunteers reach the coordinator; this one is for this machine only"),
        (
            f"samples_per_shard = {budget.samples}",
            f"budget of each expert: {hours_text(budget.hours)} on this machine ({measured.device})",
        ),
        (f"checkpoint_samples = {budget.checkpoint}", f"an epoch, after which a node uploads {budget.upload_gb:.2f} GB"),
        ("", f"Each expert has {million:.1f} million parameters. A card needs {budget.memory_gb:.1f} GB for the whole batch;"),
        ("", "where less memory is free, a node takes part of the batch at a time."),
        ("[run.optimisation]", ""),
        (f"batch = {choice.batch}", choice.why["batch"]),
    ]


def _comment(text: str) -> str:
    """Text that stays on its line of a comment."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
