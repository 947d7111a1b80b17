"""The ticket: run id, the owner's key and bootstrap addresses, as one word with a checksum that can be pasted."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from typing import Annotated

from pydantic import Field, ValidationError

from lutetia.protocol.schema.canonical import WireDocument, canonical
from lutetia.protocol.schema.fields import Digest, PublicKey
from lutetia.protocol.schema.manifest import first_problem
from lutetia.system.errors import ConfigError

PREFIX = "lutetia1"
MAX_TICKET_CHARACTERS = 8192

_NOISE = re.compile(r"[\s'\"`<>\\=“”‘’«»\u00ad\u200b-\u200f\u2028\u2029\u2060\ufeff]+")
"""What mail, chat, terminals and editors put into or around a pasted word. No letter of a ticket is among it."""
_COMMAND = re.compile(r"[$#%]?(lutetia_ticket|lutetiajoin|lutetiaswarmstatus)?:?")
"""What may stand before a ticket that was pasted with its command, without spaces."""

PORT = r"([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
"""A TCP port. Written with [0-9], because the digit class also matches digits of other scripts."""
_HOST = r"/(ip4|ip6|dns|dns4|dns6)/[A-Za-z0-9.:_-]+"
Place = Annotated[str, Field(pattern=rf"^{_HOST}/tcp/{PORT}$", max_length=256)]
"""Where a peer listens, for instance /ip4/203.0.113.5/tcp/41000"""
Address = Annotated[str, Field(pattern=rf"^{_HOST}/tcp/{PORT}/p2p/[A-Za-z0-9]+$", max_length=256)]


def pasted(text: str) -> str:
    """The word in a pasted text, without what was pasted around or into it."""
    word = _NOISE.sub("", text[: 4 * MAX_TICKET_CHARACTERS]).lower()
    before, prefix, rest = word.partition(PREFIX)
    return prefix + rest.rstrip(".,;") if prefix and _COMMAND.fullmatch(before) else word


class Ticket(WireDocument):
    """What a volunteer needs to join a run."""

    run: Digest = Field(description="Run id")
    owner: PublicKey = Field(description="Public key that signs the run's manifest")
    addresses: tuple[Address, ...] = Field(
        min_length=1,
        max_length=16,
        description="Multiaddrs with peer id of bootstrap peers, for instance /ip4/203.0.113.5/tcp/41000/p2p/12D3…",
    )

    def encode(self) -> str:
        body = zlib.compress(canonical(self), 9)
        packed = body + zlib.crc32(body).to_bytes(4, "big")
        return PREFIX + base64.b32encode(packed).decode().lower().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Ticket:
        """Read a ticket as it was pasted: line breaks, spaces, quotes and the command before it do not matter.

        Raises ConfigError when `text` is not a ticket, was cut short or was mistyped.
        """
        text = pasted(text)
        if not text.startswith(PREFIX):
            raise ConfigError(
                f"this is not a ticket: it must start with {PREFIX!r}; paste the whole word that `lutetia run create` printed"
            )
        if len(text) > MAX_TICKET_CHARACTERS:
            raise ConfigError(f"this ticket has {len(text)} characters, more than {MAX_TICKET_CHARACTERS}; refused")
        encoded = text[len(PREFIX) :].upper()
        try:
            packed = base64.b32decode(encoded + "=" * (-len(encoded) % 8))
        except (binascii.Error, ValueError) as error:
            raise ConfigError("the ticket was cut short or mistyped; paste it whole") from error
        body, checksum = packed[:-4], packed[-4:]
        if len(packed) < 8 or zlib.crc32(body).to_bytes(4, "big") != checksum:
            raise ConfigError("the ticket was cut short or mistyped (its checksum differs); paste it whole")
        try:
            inflate = zlib.decompressobj()
            document = inflate.decompress(body, 1 << 16)
            if inflate.unconsumed_tail:
                raise ConfigError("the ticket unpacks to more than 64 KiB; refused")
            return cls.model_validate_json(document, strict=True)
        except zlib.error as error:
            raise ConfigError("the ticket does not unpack; paste it whole") from error
        except ValidationError as error:
            raise ConfigError(f"the ticket is malformed: {first_problem(error)}") from error
