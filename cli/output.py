"""Output of the commands: JSON with --json, tables otherwise, diagnostics on stderr."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lutetia.system.errors import plain_lines

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

WIDE = 132  # columns of a table that is written to a file or pipe, which have no width

JsonFlag = Annotated[bool, typer.Option("--json", envvar="LUTETIA_JSON", help="Print one JSON document, also for errors.")]


_NEAREST = {
    "█": "#",
    "░": "-",
    "…": "...",
    "–": "-",
    "—": "-",
    "×": "x",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
    "’": "'",
    "“": '"',
    "”": '"',
}


def _nearest(error: UnicodeError) -> tuple[str, int]:
    """The handler of letters that a stream's encoding lacks: the nearest ASCII ones, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_NEAREST.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def print_whatever_the_encoding() -> None:
    """Let stdout and stderr take every text, also where they are not UTF-8, as pipes on Windows or in an old locale."""
    codecs.register_error("nearest", _nearest)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not _is_utf8(stream):
            stream.reconfigure(errors="nearest")


def _is_utf8(stream: TextIO | None) -> bool:
    return stream is not None and (stream.encoding or "").lower().replace("-", "").startswith("utf")


def console(stderr: bool = False) -> Console:
    """A rich console for texts of others: nothing in a string is read as markup, and no letter of it controls the terminal.

    It prints colours and spinners only on a terminal and without NO_COLOR.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Printer(Console):
        def on_broken_pipe(self) -> None:
            raise  # main() handles it, as it does for `print`

        def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().render_str(plain_lines(text), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(plain_lines(segment.text), segment.style)

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDE
    return Printer(stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def as_values(document: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """The document as JSON values."""
    return dict(document) if isinstance(document, Mapping) else document.model_dump(mode="json")


def as_json_text(document: Mapping[str, Any], indent: int | None = None) -> str:
    """The document as JSON that is safe on a terminal and whole on a stream of any encoding."""
    text = json.dumps(document, indent=indent, ensure_ascii=not _is_utf8(sys.stdout))
    return "".join(letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text)


def emit(document: BaseModel | Mapping[str, Any], as_json: bool, view: Callable[[], RenderableType | None]) -> None:
    """Print `document` as JSON, or what `view` returns. Text is never wrapped, so that it can be pasted.

    Args:
        document: what --json prints.
        as_json: print the document.
        view: makes text, a rich renderable or None (it has printed by itself).
    """
    if as_json:
        print(as_json_text(as_values(document), indent=2))
    elif isinstance(renderable := view(), str):
        show(renderable)
    elif renderable is not None:
        console().print(renderable)


def show(text: str) -> None:
    """Print lines on stdout. What others wrote in them controls nothing."""
    print(plain_lines(text), flush=True)


def say(text: str) -> None:
    """Print lines on stderr, apart from the output that scripts read."""
    print(plain_lines(text), file=sys.stderr, flush=True)


def json_wanted(arguments: list[str]) -> bool:
    """Whether to print errors as JSON. Works also for arguments that do not parse."""
    return "--json" in arguments or os.environ.get("LUTETIA_JSON", "").lower() in {"1", "true", "yes", "on"}
