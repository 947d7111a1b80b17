"""Pieces of Markdown: tables, code, docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence

_SECTION = re.compile(r"(Args|Arguments|Parameters|Shape|Returns|Yields|Raises|Examples?):")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; `|` and line breaks in its cells are escaped. Empty without rows."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines]) if lines else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: object) -> str:
    return f"`{text}`"


def join(*parts: str) -> str:
    """Blocks, with a blank line between them."""
    return "\n\n".join(filter(None, parts))


def sentence(text: str) -> str:
    """`text` with a full stop."""
    text = text.strip()
    return text if not text or text[-1] in ".!?…:" else f"{text}."


def summary(documented: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return escaped((inspect.getdoc(documented) or "").split("\n\n")[0].replace("\n", " "))


def docstring(documented: object) -> str:
    """A docstring as Markdown: its sections (Args, Raises, …) become lists."""
    blocks, section = [], False
    for paragraph in (inspect.getdoc(documented) or "").split("\n\n"):
        lines = paragraph.split("\n")
        if match := _SECTION.fullmatch(lines[0].strip()):
            section = True
            blocks.append(f"**{match[1]}**")
            lines = lines[1:]
        if section and lines and lines[0].startswith(" "):
            blocks.append(_items(lines))
        elif lines:
            section = False
            blocks.append(_text(lines))
    return join(*blocks)


def _text(lines: Sequence[str]) -> str:
    """A paragraph; one that is indented or set in columns is code."""
    text = "\n".join(lines)
    if all(line.startswith("    ") for line in lines):
        return f"```python\n{inspect.cleandoc(text)}\n```"
    return f"```text\n{text}\n```" if re.search(r"\S {3,}\S", text) else escaped(text)


def escaped(text: str) -> str:
    """`text` without what Markdown would take for tags or emphasis; code in it stays as it is."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def _items(lines: Sequence[str]) -> str:
    """List items: a line at the least indentation begins one, deeper lines continue it."""
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    items: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) > least and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    return "\n".join(f"- {_named(escaped(item))}" for item in items)


def _named(item: str) -> str:
    """`name: text` with its name as code."""
    name, colon, text = item.partition(": ")
    return f"`{name}`: {text}" if colon and re.fullmatch(r"[\w\[\], ]+", name) else item
