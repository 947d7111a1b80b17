"""All reference pages by file name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from docs.generate import api, cli, protocol, settings, status

FOLDER = Path(__file__).parents[1] / "reference"
_NOTE = "<!-- Made from the code by `make reference`. Change the code, not this page. -->\n\n"


@cache
def pages() -> dict[str, str]:
    """The text of every page, by its name in FOLDER."""
    makers = {"cli": cli.page, "settings": settings.page, "protocol": protocol.page, "status": status.page, "api": api.page}
    return {f"{name}.md": _NOTE + make().rstrip() + "\n" for name, make in makers.items()}
