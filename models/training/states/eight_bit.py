"""Numbers in eight bits, by blocks of 256 with one power of two each: what optimisers and checkpoints keep in little memory.

Blocks as in 8-bit optimisers (Dettmers et al., arXiv 2110.02861, section 2.1). The codes are number formats that torch has, so
every device rounds alike, and the scales are powers of two, by which multiplication is exact: what was decoded once gives the
same numbers when it is encoded and decoded again.

- `pack_steps`: 255 equal steps, for differences whose largest entries matter most. Error at most 1/128 of the block's largest.
- `pack_float`: float8 e4m3. Error at most 1/16 of the number itself down to 1/16,000 of the block's largest, for moments.
- `pack_root`: the roots of numbers from 0 in the same format, none rounded to 0: Adam divides by the roots of second moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 256
LEAST_EXPONENT, _MOST = -126, 127  # of float32
_STEPS = 127.0
_FLOAT_TOP = 8  # float8 e4m3 reaches 448; the largest of a block lies in (128, 256]
_FLOAT_FLOOR = 2.0**-9
"""The smallest float8 e4m3 above 0."""
_POWERS = torch.tensor([2.0**exponent for exponent in range(LEAST_EXPONENT, _MOST + 1)])


@dataclass(frozen=True)
class Packed:
    """A tensor in eight bits a number. `codes` int8 or float8 e4m3, in the tensor's shape; `exponents` int8, one per block."""

    codes: Tensor
    exponents: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.exponents.nbytes

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.codes.to(device), self.exponents.to(device))


def blocks(count: int) -> int:
    """The number of blocks of a tensor of `count` numbers."""
    return -(-count // BLOCK)


def pack_steps(values: Tensor) -> Packed:
    """`values` (float32, finite) as multiples, from -127 to 127, of each block's power of two."""
    rows = _rows(values)
    exponents = _exponents(rows.abs().amax(1) / _STEPS)
    codes = (rows / _powers(exponents)[:, None]).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
    return Packed(_shaped(codes, values), exponents)


def pack_float(values: Tensor) -> Packed:
    """`values` (float32, finite) as float8 e4m3 times each block's power of two."""
    rows = _rows(values)
    exponents = _exponents(rows.abs().amax(1) / 2.0**_FLOAT_TOP)
    return Packed(_shaped((rows / _powers(exponents)[:, None]).to(torch.float8_e4m3fn), values), exponents)


def pack_root(values: Tensor) -> Packed:
    """The roots of `values` (float32, finite, from 0) as `pack_float` packs them, but none that is above 0 becomes 0."""
    rows = _rows(values).sqrt()
    exponents = _exponents(rows.amax(1) / 2.0**_FLOAT_TOP)
    scaled = rows / _powers(exponents)[:, None]
    scaled = torch.where(rows > 0, scaled.clamp(min=_FLOAT_FLOOR), scaled)
    return Packed(_shaped(scaled.to(torch.float8_e4m3fn), values), exponents)


def unpack(packed: Packed) -> Tensor:
    """The float32 numbers of `pack_steps` or `pack_float`."""
    rows = _rows(packed.codes.float()) * _powers(packed.exponents)[:, None]
    return _shaped(rows, packed.codes)


def unpack_root(packed: Packed) -> Tensor:
    """The float32 numbers of `pack_root`."""
    return unpack(packed).square_()


def _rows(values: Tensor) -> Tensor:
    """`values` as rows of one block each, filled up with zeros: [blocks, BLOCK]."""
    flat = values.detach().reshape(-1)
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1)[: like.numel()].reshape(like.shape)


def _exponents(scales: Tensor) -> Tensor:
    """The smallest e with 2^e >= each of `scales`, as int8."""
    mantissas, exponents = torch.frexp(scales)  # a mantissa lies in [0.5, 1)
    exponents = exponents - (mantissas == 0.5).int()
    return torch.where(scales > 0, exponents, LEAST_EXPONENT).clamp_(LEAST_EXPONENT, _MOST).to(torch.int8)


def _powers(exponents: Tensor) -> Tensor:
    return _POWERS.to(exponents.device)[exponents.long() - LEAST_EXPONENT]
