"""Output of the commands: JSON with --json, tables otherwise, diagnostics on stderr."""

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

WIDE = 132  # columns of a table that is written to a file or pipe, which have no width

JsonFlag = Annotated[bool, typer.Option("--json", envvar="LUTETIA_JSON", help="Print one JSON document, also for errors.")]


def console(stderr: bool = False) -> Console:
    """A rich console. It prints colours and spinners only on a terminal and without NO_COLOR."""
    from rich.console import Console

    class Printer(Console):
        def on_broken_pipe(self) -> None:
            raise  # main() handles it, as it does for `print`

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDE
    return Printer(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def plain(document: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The document as JSON values."""
    return dict(document) if isinstance(document, Mapping) else document.model_dump(mode="json")


def emit(document: BaseModel | Mapping[str, Any], as_json: bool, view: Callable[[], RenderableType | None]) -> None:
    """Print `document` as JSON, or what `view` returns. Text is never wrapped, so that it can be pasted.

    Args:
        document: what --json prints.
        as_json: print the document.
        view: makes text, a rich renderable or None (it has printed by itself).
    """
    if as_json:
        print(json.dumps(plain(document), indent=2, ensure_ascii=False))
    elif isinstance(renderable := view(), str):
        print(renderable)
    elif renderable is not None:
        console().print(renderable)


def say(text: str) -> None:
    """Print a line on stderr, apart from the output that scripts read."""
    print(text, file=sys.stderr, flush=True)


def json_wanted(arguments: list[str]) -> bool:
    """Whether to print errors as JSON. Works also for arguments that do not parse."""
    return "--json" in arguments or os.environ.get("LUTETIA_JSON", "").lower() in {"1", "true", "yes", "on"}
