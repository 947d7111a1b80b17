"""What the tutorials and README quote as output is what the code prints."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.test_walls import FILES, ROOT

QUOTED = (
    "looking for a shard", "from the local state", "before leaving", "checkpoint is accepted; leaving", "applies now",
    "left the run; all its processes have ended", "by the volunteer", "small beside the memory", "wrote the secret key of",
    "anybody who has it can act as this node", "it signs the run", "may differ by", "right on held-out noisy clips",
    "stitched from epochs", "of it new", "held-out loss is", "experts used", "Volunteers join with:",
    "Status page:", "with the same ticket", "only this machine can join: the ticket names", "Only this machine can join",
    "coordinator ok", "finishing the current checkpoint, then leaving", "continues", "useful share", "coordinator events an hour",
    "all held", "VIOLATED", "The shortest plan that causes it", "Run it again:", "checkpoint in", "hours of one core",
)  # fmt: skip
PAGES = ("README.md", "docs/tutorials/volunteer.md", "docs/tutorials/owner.md", "docs/tutorials/researcher.md")


@cache
def source() -> str:
    """The source tree with the quotes and line breaks between the parts of a long text taken out."""
    return re.sub(r"[\"'](\s|f|\))*[\"']", "", "\n".join(path.read_text() for path in FILES))


@pytest.mark.parametrize("text", QUOTED)
def test_quoted_output_is_printed_by_the_code(text: str) -> None:
    assert text in source()
    assert any(text in (ROOT / page).read_text() for page in PAGES)
