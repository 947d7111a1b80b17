from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.schema.ticket import PREFIX, Ticket
from lutetia.system.errors import ConfigError
from tests.protocol.example_documents import OWNER, PEER, RUN

TICKET = Ticket(run=RUN, owner=OWNER.public_key, addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER.peer_id}",))
WORD = TICKET.encode()


def packed(document: bytes) -> str:
    body = zlib.compress(document, 9)
    return PREFIX + base64.b32encode(body + zlib.crc32(body).to_bytes(4, "big")).decode().lower().rstrip("=")


def test_a_ticket_with_whitespace_around_it_decodes() -> None:
    assert Ticket.decode(f"  {WORD}\n") == TICKET


PASTES = {
    "wrapped": "\n".join(WORD[start : start + 30] for start in range(0, len(WORD), 30)),
    "wrapped by Windows": "\r\n".join(WORD[start : start + 30] for start in range(0, len(WORD), 30)),
    "quoted mail": "> " + "\n> ".join(WORD[start : start + 30] for start in range(0, len(WORD), 30)),
    "quoted-printable": "=\n".join(WORD[start : start + 76] for start in range(0, len(WORD), 76)),
    "spaces": " ".join(WORD),
    "quotes": f'"{WORD}"',
    "curly quotes": f"\u201c{WORD}\u201d.",
    "backticks": f"`{WORD}`",
    "angle brackets": f"<{WORD}>",
    "byte order mark": f"\ufeff{WORD}",
    "zero width": "\u200b".join((WORD[:20], WORD[20:])),
    "no-break space": f"\u00a0{WORD}\u00a0",
    "command": f"lutetia join {WORD}",
    "prompt": f"$ lutetia join '{WORD}'",
    "variable": f"LUTETIA_TICKET={WORD}",
    "capitals": WORD.upper(),
}


@pytest.mark.parametrize("name", PASTES)
def test_a_pasted_ticket_decodes(name: str) -> None:
    assert Ticket.decode(PASTES[name]) == TICKET


@given(st.integers(min_value=0, max_value=len(WORD) - 1))
def test_a_truncated_ticket_is_refused(length: int) -> None:
    with pytest.raises(ConfigError):
        Ticket.decode(WORD[:length])


@given(st.integers(min_value=len(PREFIX), max_value=len(WORD) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567!"))
def test_a_mistyped_ticket_is_refused(place: int, letter: str) -> None:
    typed = WORD[:place] + letter + WORD[place + 1 :]
    if typed == WORD:
        return
    try:
        assert Ticket.decode(typed) == TICKET  # the spare bits at the end of base32 carry no data
    except ConfigError:
        return
    assert place == len(WORD) - 1


@given(st.text(max_size=300))
def test_arbitrary_text_is_refused_or_decoded_but_never_crashes(text: str) -> None:
    for candidate in (text, PREFIX + text):
        with pytest.raises(ConfigError):
            Ticket.decode(candidate)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b"{}", "run"),
        (b'{"run":"' + b"a" * 64 + b'","owner":"' + b"b" * 64 + b'","addresses":["http://evil"]}', "addresses"),
        (TICKET.model_dump_json().replace('"run"', '"more":[[[[[1]]]]],"run"').encode(), "nested"),
        (b"[" * 60_000, "malformed"),
        (b" " * 1_000_000, "64 KiB"),
    ],
    ids=["empty", "no multiaddr", "deep unknown field", "deep nesting", "bomb"],
)
def test_a_valid_encoding_of_a_wrong_document_is_refused(document: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Ticket.decode(packed(document))


def test_an_endless_ticket_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ConfigError, match="characters"):
        Ticket.decode(PREFIX + "a" * 100_000)
