"""The contract of a parser: take the bytes or refuse them by a typed error of one plain sentence, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lutetia.system.errors import LutetiaError

LONGEST_SENTENCE = 2000

Outcome = Literal["taken", "refused"]


@dataclass(frozen=True)
class Target:
    """A parser under its name. `also` are the error types besides LutetiaError that its contract names.

    `most_bytes` is the limit of its caller; longer inputs are cut.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    also: tuple[type[Exception], ...] = ()
    most_bytes: int = 1 << 16

    def hold(self, data: bytes) -> Outcome:
        """Parse `data`. Raises any exception that the contract does not allow, and AssertionError for a bad sentence."""
        try:
            self.parse(data[: self.most_bytes])
        except LutetiaError as error:
            check_sentence(str(error))
            return "refused"
        except self.also:
            return "refused"
        return "taken"


def check_sentence(text: str) -> None:
    """One line that can be printed on any terminal: an error may quote a peer, but must not send control characters."""
    assert text, "an error without text"
    assert len(text) <= LONGEST_SENTENCE, f"a sentence of {len(text)} characters"
    odd = sorted({character for character in text if not character.isprintable()})
    assert not odd, f"a sentence with {odd!r}"
    text.encode()
