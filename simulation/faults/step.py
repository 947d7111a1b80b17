"""One thing that happens to the swarm from outside. A plan is a list of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Step:
    """At `at` seconds `what` happens to the boxes `who`; `value` and `word` say how much and of which kind."""

    at: float
    what: str
    who: tuple[int, ...] = ()
    value: float = 0.0
    word: str = ""

    @property
    def sentence(self) -> str:
        machines = ", ".join(map(str, self.who[:8])) + (f" … ({len(self.who)})" if len(self.who) > 8 else "")
        parts = [self.what, f"boxes {machines}" if machines else "", self.word, f"{self.value:g}" if self.value else ""]
        return " ".join(part for part in parts if part)
