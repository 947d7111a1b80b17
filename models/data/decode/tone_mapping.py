"""Tone mapping: pictures of HDR video (PQ or HLG) as a screen of standard range shows them.

Light of 100 cd/m², the white of a standard screen (ITU-R BT.1886), becomes white, as it does in FFmpeg's zscale. Light up to
three quarters of it stays as it is; what is brighter is compressed, so that highlights keep their hue and their detail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lutetia.models.data.decode.cut import Frames

PQ, HLG, BT2020 = 16, 18, 9  # codes of ITU-T H.273, which FFmpeg uses: two transfers and a set of primaries
_WHITE = 100.0  # cd/m²
_PEAK = 1000.0  # cd/m²: of the screen that HLG is made for, and of most screens on which PQ is graded
_HLG_WHITE = (_WHITE / _PEAK) ** (1 / 1.2)  # scene light that such a screen shows at 100 cd/m²: its system gamma is 1.2
_KNEE = 0.75  # of white
_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)

Light = NDArray[np.floating]  # 1 is white


def to_standard_range(picture: NDArray[np.uint16], transfer: int, primaries: int) -> Frames:
    """The picture uint16 [H, W, 3] (R′G′B′, full range) as uint8 [H, W, 3] with the transfer and primaries of BT.709.

    Args:
        picture: decoded, as its matrix says.
        transfer: PQ or HLG.
        primaries: of the file; those that are not BT.2020 are left as they are.
    """
    signal = picture.astype(np.float32) / 65535
    light = _compress(_light_of_pq(signal) if transfer == PQ else _light_of_hlg(signal))
    if primaries == BT2020:
        light = light @ _TO_BT709.T
    light = np.clip(light, 0, 1)
    encoded = np.where(light < 0.018, 4.5 * light, 1.099 * np.power(light, 0.45) - 0.099)
    return (encoded * 255 + 0.5).astype(np.uint8)


def _light_of_pq(signal: Light) -> Light:
    """SMPTE ST 2084."""
    root = np.power(signal, 1 / 78.84375)
    return 10_000 / _WHITE * np.power(np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root), 1 / 0.1593017578125)


def _light_of_hlg(signal: Light) -> Light:
    """Scene light, without the gamma of the screen, which would darken strong colours (ITU-R BT.2100)."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return scene / _HLG_WHITE


def _compress(light: Light) -> Light:
    """Scale each pixel so that its brightest channel is at most white (Reinhard's curve above the knee)."""
    brightest = np.maximum(light.max(-1, keepdims=True), 1e-6)
    room = 1 - _KNEE
    excess, most = np.maximum(brightest - _KNEE, 0) / room, (_PEAK / _WHITE - _KNEE) / room
    compressed = _KNEE + room * excess * (1 + excess / most**2) / (1 + excess)
    return light * np.where(brightest > _KNEE, np.minimum(compressed, 1) / brightest, 1)
