"""Contact sheets: one picture per cluster that shows what its expert will learn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lutetia.models.data.decode.cut import Frames
from lutetia.system.errors import plain
from lutetia.system.files import write_atomic
from lutetia.system.letters import font

_COLUMNS, _SIDE, _STRIP, _MARGIN, _LINE = 4, 72, 3, 6, 14
SHEET_CLIPS = 24
LETTERS = 10  # height of the text under a picture, px


def write_sheet(path: Path, title: str, clips: Sequence[Frames], captions: Sequence[str]) -> None:
    """Write a PNG with the first, middle and last frame of each clip above its caption; up to 24 clips."""
    cell_width, cell_height = _STRIP * _SIDE + _MARGIN, _SIDE + _LINE + _MARGIN
    rows = -(-len(clips) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * cell_width + _MARGIN, rows * cell_height + 2 * _LINE), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    draw.font = font(LETTERS)
    draw.text((_MARGIN, _LINE // 3), plain(title), fill=(255, 255, 255))
    for place, (frames, caption) in enumerate(zip(clips, captions, strict=True)):
        row, column = divmod(place, _COLUMNS)
        left, top = _MARGIN + column * cell_width, 2 * _LINE + row * cell_height
        for part, index in enumerate(np.linspace(0, len(frames) - 1, _STRIP).round().astype(int)):
            sheet.paste(_thumbnail(frames[index]), (left + part * _SIDE, top))
        draw.text((left, top + _SIDE), fitted(draw, caption, _STRIP * _SIDE), fill=(200, 200, 200))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def _thumbnail(picture: Frames) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((_SIDE, _SIDE))
    if max(image.size) < _SIDE:
        scale = _SIDE / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    return image


def fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """`text` on one printable line, truncated to `width` px."""
    text = plain(text)
    while len(text) > 3 and draw.textlength(text) > width:
        text = text[: -2 if text.endswith("…") else -1].rstrip() + "…"
    return text
