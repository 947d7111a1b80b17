"""The committed reference pages are those that the code makes."""

from __future__ import annotations

import re

import pytest

from docs.generate.cli import commands, root
from docs.generate.markdown import docstring, table
from docs.generate.pages import FOLDER, pages
from lutetia.cli.arguments import DocumentedCommand


def test_pages_are_current() -> None:
    stale = [name for name, text in pages().items() if not (FOLDER / name).is_file() or (FOLDER / name).read_text() != text]
    assert not stale, f"run `make reference`: {', '.join(stale)}"


def test_no_other_page_is_in_the_folder() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(pages())


def test_every_option_has_a_help_text() -> None:
    missing = []
    for path, command in commands(root(), "lutetia"):
        if isinstance(command, DocumentedCommand):
            command.describe_options()
        missing += [f"{path} {option.name}" for option in command.params if not getattr(option, "help", None)]
    assert not missing


def test_table_escapes_bars() -> None:
    assert table(("a",), [("x|y\nz",)]).endswith("| x\\|y z |")
    assert not table(("a",), [])


def test_docstring_sections_become_lists() -> None:
    def documented() -> None:
        """Do it, <now>.

        Args:
            first: the first
                value.
            second: `a * b`.

        Raises:
            ValueError: never.
        """

    text = docstring(documented)
    assert "Do it, &lt;now>." in text
    assert "**Args**\n\n- `first`: the first value.\n- `second`: `a * b`." in text
    assert text.endswith("**Raises**\n\n- `ValueError`: never.")


@pytest.mark.parametrize("page", ["cli.md", "settings.md", "protocol.md", "status.md", "api.md"])
def test_links_lead_to_headings(page: str) -> None:
    every = pages()
    for target, anchor in re.findall(r"\]\(([a-z]*(?:\.md)?)#([a-z0-9]+)\)", every[page]):
        headings = re.findall(r"^#+ (\w+)$", every[target or page], re.MULTILINE)
        assert anchor in {heading.lower() for heading in headings}, f"{page}: {target}#{anchor}"
