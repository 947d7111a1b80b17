"""Documents of pieces that are compressed once and joined without compressing again.

Each piece is a run of deflate blocks that ends on a byte and refers to nothing before it (RFC 1951), so that pieces in any order,
a header and a trailer make one member of gzip (RFC 1952). Its checksum is made of those of the pieces, as zlib's `crc32_combine`
does: crc(AB) = crc(A) x^(8 |B|) + crc(B) modulo the polynomial of CRC-32. Some readers stop after the first member of a gzip
file, so whole members cannot be joined.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

_LEVEL = 5
_POLYNOMIAL = 0xEDB88320
_ONE, _BYTE = 1 << 31, 1 << 23
"""x^0 and x^8: the highest bit is the lowest power."""
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_END = b"\x03\x00"
"""An empty block that is marked as the last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a document.

    Args:
        blocks: the bytes as deflate blocks, none of them the last.
        crc: CRC-32 of the bytes.
        length: how many there are.
        shift: x^(8 length) modulo the polynomial.
    """

    blocks: bytes
    crc: int
    length: int
    shift: int


def piece_of(data: bytes) -> Piece:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    blocks = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)
    return Piece(blocks, zlib.crc32(data), len(data), _shift(len(data)))


def gzip_of(pieces: Iterable[Piece]) -> bytes:
    """One gzip member that holds the pieces' bytes."""
    crc, length, blocks = 0, 0, [_HEADER]
    for piece in pieces:
        crc, length = _product(piece.shift, crc) ^ piece.crc, length + piece.length
        blocks.append(piece.blocks)
    return b"".join([*blocks, _END, crc.to_bytes(4, "little"), (length & 0xFFFFFFFF).to_bytes(4, "little")])


def around(document: bytes, name: str) -> tuple[bytes, bytes]:
    """What stands before and after the members of the list `name`, which is empty in the JSON `document`.

    No text of the document can be taken for the list: quotes within a text are escaped.
    """
    before, found, after = document.partition(f'"{name}":['.encode())
    assert found
    assert after.startswith(b"]")
    return before + found, after


def _shift(length: int) -> int:
    found, power = _ONE, _BYTE
    while length:
        if length & 1:
            found = _product(power, found)
        power, length = _product(power, power), length >> 1
    return found


def _product(a: int, b: int) -> int:
    """a b modulo the polynomial."""
    found, bit = 0, _ONE
    while a:
        if a & bit:
            found, a = found ^ b, a ^ bit
        bit, b = bit >> 1, (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return found
