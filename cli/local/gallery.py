"""Clips side by side under their prompts, as one gif and one mp4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from lutetia.system.files import atomic_path
from lutetia.system.letters import font

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw

    from lutetia.system.letters import Font

    Frames = NDArray[np.uint8]  # [frames, height, width, 3]

CELL, GAP, MARGIN, LINE = 128, 6, 14, 19  # pixels
GROUND, INK, FAINT = (24, 26, 32), (240, 240, 236), (150, 154, 164)
MP4_SECONDS = 10.0  # short clips are repeated up to about this length


@dataclass(frozen=True)
class GalleryRow:
    """One prompt and its clips in the order of the headings; all clips have the same number of frames."""

    prompt: str
    clips: tuple[Frames, ...]


def compose(rows: Sequence[GalleryRow], headings: Sequence[str], cell: int = CELL, columns: int = 0) -> list[Image.Image]:
    """One picture per frame: a block per prompt, title above, clips side by side. `columns` of blocks, 0 chooses."""
    from PIL import Image, ImageDraw

    columns = columns or (1 if len(rows) <= 4 else 2)
    sheet = _Sheet.fitting(rows, headings, cell, columns)
    ground = Image.new("RGB", (sheet.width, sheet.height), GROUND)
    sheet.draw_words(ImageDraw.Draw(ground), rows, headings)
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
    """Where everything stands on the page."""

    cell: int
    columns: int
    clips: int
    lines: int  # of the longest wrapped prompt
    count: int

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

    def draw_words(self, draw: ImageDraw.ImageDraw, rows: Sequence[GalleryRow], headings: Sequence[str]) -> None:
        for block in range(min(self.columns, len(rows))):
            for clip, heading in enumerate(headings):
                left, _ = self.place(block, clip)
                draw.text((left + self.cell / 2, MARGIN), heading, fill=FAINT, font=font(13), anchor="mm")
        for index, row in enumerate(rows):
            left, top = self.corner(index)
            lines = wrap(row.prompt, font(15), self.block_width)
            for number, line in enumerate(lines):
                draw.text((left, top + (self.lines - len(lines) + number) * LINE), line, fill=INK, font=font(15))


def _even(length: int) -> int:
    """H.264 with 4:2:0 colour needs even sides."""
    return length + length % 2


def wrap(text: str, face: Font, width: float) -> list[str]:
    """`text` in lines no wider than `width` pixels; a single longer word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def enlarge(frame: Frames, cell: int) -> Image.Image:
    """The frame as a square-fitted picture of `cell` pixels on its longer side's box."""
    from PIL import Image

    picture = Image.fromarray(frame)
    scale = cell / max(picture.size)
    fitted = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    if fitted.size == (cell, cell):
        return fitted
    box = Image.new("RGB", (cell, cell), GROUND)
    box.paste(fitted, ((cell - fitted.width) // 2, (cell - fitted.height) // 2))
    return box


def write_gif(pictures: Sequence[Image.Image], path: Path, fps: float) -> None:
    """An endless gif with one palette for all frames, so that colours do not flicker."""
    from PIL import Image

    strip = Image.new("RGB", (pictures[0].width, pictures[0].height * min(4, len(pictures))))
    for slot in range(min(4, len(pictures))):
        strip.paste(pictures[slot * len(pictures) // min(4, len(pictures))], (0, slot * pictures[0].height))
    palette = strip.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    with atomic_path(path) as part:
        frames[0].save(
            part, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, optimize=False
        )


def write_mp4(pictures: Sequence[Image.Image], path: Path, fps: float, seconds: float = MP4_SECONDS) -> None:
    """H.264 that every player shows; the clip is repeated up to about `seconds`."""
    import av

    repeats = max(1, round(seconds * fps / len(pictures)))
    with atomic_path(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = pictures[0].width, pictures[0].height, "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast", "threads": "2"}
        for picture in list(pictures) * repeats:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def check_ending(path: Path) -> None:
    """Raises UsageError unless `path` ends like a file that `write_clip` writes."""
    from lutetia.system.errors import UsageError

    if path.suffix.lower() not in (".gif", ".mp4"):
        raise UsageError(f"cannot write a clip as {path.suffix or path.name!r}; end --out with .mp4 or .gif")


def write_clip(frames: Frames, path: Path, fps: float) -> None:
    """One clip as gif or mp4 by the ending of `path`. Raises UsageError for another."""
    check_ending(path)
    largest = max(frames.shape[1:3])
    side = largest * max(1, CELL * 2 // largest)
    pictures = [_evenly(enlarge_plain(frame, side / largest)) for frame in frames]
    if path.suffix.lower() == ".gif":
        write_gif(pictures, path, fps)
    else:
        write_mp4(pictures, path, fps, seconds=len(pictures) / fps)


def enlarge_plain(frame: Frames, scale: float) -> Image.Image:
    from PIL import Image

    picture = Image.fromarray(frame)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def _evenly(picture: Image.Image) -> Image.Image:
    return picture.crop((0, 0, picture.width - picture.width % 2, picture.height - picture.height % 2))
