"""What every command prints: a document as JSON on request, tables for people, diagnostics on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

WIDE = 132  # columns of a table that goes into a file or pipe, where nothing tells the width

JsonFlag = Annotated[bool, typer.Option("--json", envvar="LUTETIA_JSON", help="Print one JSON document, also for errors.")]


def console(stderr: bool = False) -> Console:
    """A rich console: colours and spinners only on a terminal without NO_COLOR."""
    from rich.console import Console

    class Printer(Console):
        def on_broken_pipe(self) -> None:
            raise  # the command line ends by it, as it does where `print` meets it

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDE
    return Printer(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def plain(document: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The document as JSON values."""
    return dict(document) if isinstance(document, Mapping) else document.model_dump(mode="json")


def emit(document: BaseModel | Mapping[str, Any], as_json: bool, view: Callable[[], RenderableType | None]) -> None:
    """Print `document` as JSON, or what `view` makes of it for people. Text is never wrapped, so that it can be pasted."""
    if as_json:
        print(json.dumps(plain(document), indent=2, ensure_ascii=False))
    elif isinstance(renderable := view(), str):
        print(renderable)
    elif renderable is not None:
        console().print(renderable)


def say(text: str) -> None:
    """A line for people on stderr, kept apart from what scripts read."""
    print(text, file=sys.stderr, flush=True)


def json_wanted(arguments: list[str]) -> bool:
    """Whether errors are to be JSON too, also when the arguments do not parse."""
    return "--json" in arguments or os.environ.get("LUTETIA_JSON", "").lower() in {"1", "true", "yes", "on"}
