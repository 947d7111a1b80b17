"""Galleries: clips side by side under their prompts, as pictures; and one clip as a GIF or MP4 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.models.video_files import write_gif, write_mp4
from lutetia.system.errors import UsageError, plain
from lutetia.system.letters import font

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from lutetia.models.video_files import Frames
    from lutetia.system.letters import Font

CELL, GAP, MARGIN, LINE = 128, 6, 14, 19  # pixels
GROUND, INK, FAINT = (24, 26, 32), (240, 240, 236), (150, 154, 164)
MP4_SECONDS = 10.0  # a gallery of short clips is repeated up to about this length


@dataclass(frozen=True)
class GalleryRow:
    """One prompt and its clips, uint8 [frames, height, width, 3], in the order of the headings; shorter clips are repeated."""

    prompt: str
    clips: tuple[Frames, ...]


def compose(rows: Sequence[GalleryRow], headings: Sequence[str], cell: int = CELL, columns: int = 0) -> list[Image.Image]:
    """One picture per frame, with a block per prompt: the prompt above, its clips side by side.

    Args:
        rows: the prompts and their clips.
        headings: one per clip of a row.
        cell: side of a clip's square, pixels.
        columns: columns of blocks. 0: one for up to four prompts, else two.
    """
    from PIL import Image, ImageDraw

    columns = columns or (1 if len(rows) <= 4 else 2)
    sheet = _Sheet.fitting(rows, headings, cell, columns)
    ground = Image.new("RGB", (sheet.width, sheet.height), GROUND)
    sheet.draw_texts(ImageDraw.Draw(ground), rows, headings)
    pictures = []
    for frame in range(max(len(clip) for row in rows for clip in row.clips)):
        picture = ground.copy()
        for index, row in enumerate(rows):
            for column, clip in enumerate(row.clips):
                picture.paste(enlarge(clip[frame % len(clip)], cell), sheet.place(index, column))
        pictures.append(picture)
    return pictures


@dataclass(frozen=True)
class _Sheet:
    """The layout of a gallery, in pixels."""

    cell: int
    columns: int
    clips: int  # per prompt
    lines: int  # of the longest wrapped prompt
    count: int  # of prompts

    @classmethod
    def fitting(cls, rows: Sequence[GalleryRow], headings: Sequence[str], cell: int, columns: int) -> _Sheet:
        block = len(headings) * cell + (len(headings) - 1) * GAP
        lines = max(len(wrap(row.prompt, font(15), block)) for row in rows)
        return cls(cell, columns, len(headings), lines, len(rows))

    @property
    def block_width(self) -> int:
        return self.clips * self.cell + (self.clips - 1) * GAP

    @property
    def block_height(self) -> int:
        return self.lines * LINE + 4 + self.cell + 2 * GAP

    @property
    def width(self) -> int:
        return _even(2 * MARGIN + self.columns * self.block_width + (self.columns - 1) * 2 * MARGIN)

    @property
    def height(self) -> int:
        return _even(2 * MARGIN + LINE + -(-self.count // self.columns) * self.block_height)

    def corner(self, index: int) -> tuple[int, int]:
        row, column = divmod(index, self.columns)
        return MARGIN + column * (self.block_width + 2 * MARGIN), MARGIN + LINE + row * self.block_height

    def place(self, index: int, clip: int) -> tuple[int, int]:
        left, top = self.corner(index)
        return left + clip * (self.cell + GAP), top + self.lines * LINE + 4

    def draw_texts(self, draw: ImageDraw.ImageDraw, rows: Sequence[GalleryRow], headings: Sequence[str]) -> None:
        for block in range(min(self.columns, len(rows))):
            for clip, heading in enumerate(headings):
                left, _ = self.place(block, clip)
                draw.text((left + self.cell / 2, MARGIN), plain(heading), fill=FAINT, font=font(13), anchor="mm")
        for index, row in enumerate(rows):
            left, top = self.corner(index)
            lines = wrap(row.prompt, font(15), self.block_width)
            for number, line in enumerate(lines):
                draw.text((left, top + (self.lines - len(lines) + number) * LINE), line, fill=INK, font=font(15))


def _even(length: int) -> int:
    """H.264 with 4:2:0 colour needs even sides."""
    return length + length % 2


def wrap(text: str, face: Font, width: float) -> list[str]:
    """`text` in printable lines no wider than `width` pixels; a single longer word stays whole."""
    lines: list[str] = []
    for word in map(plain, text.split()):
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def enlarge(frame: Frames, cell: int) -> Image.Image:
    """The frame scaled to fit a square of `cell` pixels, centred on the ground colour."""
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = cell / max(picture.size)
    fitted = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    if fitted.size == (cell, cell):
        return fitted
    square = Image.new("RGB", (cell, cell), GROUND)
    square.paste(fitted, ((cell - fitted.width) // 2, (cell - fitted.height) // 2))
    return square


def check_ending(path: Path) -> None:
    """Raises UsageError unless the ending of `path` is one that `write_clip` writes."""
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise UsageError(f"cannot write a clip as {path.suffix or path.name!r}; end --out with .mp4 or .gif")


def write_clip(frames: Frames, path: Path, fps: float) -> None:
    """Write one clip as GIF or MP4, by the ending of `path`, small clips enlarged. Raises UsageError for another ending."""
    check_ending(path)
    largest = max(frames.shape[1:3])
    side = largest * max(1, CELL * 2 // largest)
    pictures = [_cropped_even(_scaled(frame, side / largest)) for frame in frames]
    if path.suffix.lower() == ".gif":
        write_gif(pictures, path, fps)
    else:
        write_mp4(pictures, path, fps)


def _scaled(frame: Frames, scale: float) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(frame)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _cropped_even(picture: Image.Image) -> Image.Image:
    return picture.crop((0, 0, picture.width - picture.width % 2, picture.height - picture.height % 2))
