"""Captioned clips of three visibly different kinds, drawn by rules from pictures that come with pip packages.

* `digit`  (45 %): a coloured handwritten digit moves over dark ground;
* `shape`  (30 %): a coloured shape spins, grows, shrinks or bounces on light ground;
* `camera` (25 %): the camera pans over or zooms on a photograph.

Every kind has its own words. Some combinations of words never occur in training (`HELD_OUT`): their clips have
the split `test`. Pictures and their licences: digits from scikit-learn (UCI, CC BY 4.0); temple and flower
from scikit-learn (CC BY 2.0, danielbuechele and vultilion on Flickr); cat and coffee from scikit-image (CC0);
rocket (SpaceX) and astronaut (NASA) from scikit-image (public domain).
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutetia.models.video_files import write_training_mp4
from lutetia.system.errors import ConfigError

Frames = NDArray[np.uint8]  # [frames, height, width, 3]
Plane = NDArray[np.floating[Any]]

KINDS: dict[str, float] = {"digit": 0.45, "shape": 0.30, "camera": 0.25}
FPS = 8
TEST_SHARE = 0.08

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_COLOURS = {
    "red": (240, 60, 50),
    "green": (70, 220, 90),
    "blue": (80, 130, 255),
    "yellow": (250, 220, 70),
}
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}

SHAPES = ("triangle", "square", "star", "heart")
SHAPE_COLOURS = {
    "orange": (240, 130, 20),
    "purple": (130, 50, 180),
    "pink": (245, 110, 170),
    "black": (35, 35, 40),
}
ACTIONS = ("spins", "grows", "shrinks", "bounces")

MOVES = ("pans left over", "pans right over", "zooms in on", "zooms out from")
SUBJECTS: dict[str, tuple[str, str, float, float]] = {  # caption noun: package, file, centre x and y (0..1)
    "a temple": ("sklearn.datasets.images", "china.jpg", 0.34, 0.50),
    "a flower": ("sklearn.datasets.images", "flower.jpg", 0.48, 0.54),
    "a cat": ("skimage.data", "chelsea.png", 0.47, 0.52),
    "a cup of coffee": ("skimage.data", "coffee.png", 0.47, 0.47),
    "a rocket": ("skimage.data", "rocket.jpg", 0.50, 0.60),
    "an astronaut": ("skimage.data", "astronaut.png", 0.48, 0.36),
}

HELD_OUT = frozenset(
    {
        "a red handwritten three moves to the left",
        "a blue handwritten seven moves up",
        "a yellow handwritten five moves down",
        "a green handwritten zero moves to the right",
        "a purple star bounces",
        "an orange heart grows",
        "a black triangle spins",
        "the camera pans right over a flower",
    }
)


@dataclass(frozen=True)
class SyntheticClip:
    """One clip to draw.

    Attributes:
        kind: digit, shape or camera.
        words: the words of its caption, in order.
        split: train or test.
        seed: of all that the words leave open.
    """

    kind: str
    words: tuple[str, str, str]
    split: str
    seed: int

    @property
    def caption(self) -> str:
        first, second, third = self.words
        match self.kind:
            case "digit":
                return f"a {first} handwritten {second} moves {third}"
            case "shape":
                return f"{'an' if first[0] in 'aeiou' else 'a'} {first} {second} {third}"
            case _:
                return f"the camera {first} {second}"


def plan(count: int, seed: int) -> list[SyntheticClip]:
    """`count` clips in the proportions of KINDS, shuffled. Within a kind, every combination of words is equally frequent.

    So the colour does not predict the digit: a model must learn subject and look separately.
    """
    rng = np.random.default_rng(seed)
    clips: list[SyntheticClip] = []
    for kind, number in _split_count(count).items():
        combinations = list(product(*_slots(kind)))
        order = rng.permutation(len(combinations))
        for place in range(number):
            clip = SyntheticClip(kind, combinations[order[place % len(order)]], "train", int(rng.integers(2**31)))
            clips.append(replace(clip, split="test") if clip.caption in HELD_OUT or rng.random() < TEST_SHARE else clip)
    return [clips[i] for i in rng.permutation(len(clips))]


def draw(clip: SyntheticClip, frames: int, size: int) -> Frames:
    """The pixels of the clip, uint8 [frames, size, size, 3]; a pure function of its arguments."""
    rng = np.random.default_rng(clip.seed)
    painter = {"digit": _draw_digit, "shape": _draw_shape, "camera": _draw_camera}[clip.kind]
    picture = painter(rng, clip.words, frames, size)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def require_photographs(extra: str = "demo") -> None:
    """Raises ConfigError if scikit-image is not installed; `extra` is the extra to install."""
    if find_spec("skimage") is None:
        raise ConfigError(
            f"scikit-image, which holds photographs for the clips, is not installed; run: pip install 'lutetia[{extra}]'"
        )


def make_clips(folder: Path, count: int, seed: int, frames: int, size: int) -> None:
    """Write `count` mp4 files and `metadata.jsonl` (file_name, caption, kind, split) into `folder`.

    Args:
        folder: created if it does not exist.
        count: number of clips.
        seed: of all clips.
        frames: frames of a clip.
        size: height and width, px.

    Raises ConfigError if scikit-image is not installed.
    """
    require_photographs()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number, clip in enumerate(plan(count, seed)):
            name = f"{clip.kind}-{number:05d}.mp4"
            write_training_mp4(draw(clip, frames, size), folder / name, FPS)
            row = {"file_name": name, "caption": clip.caption, "kind": clip.kind, "split": clip.split}
            lines.write(json.dumps(row) + "\n")


def _split_count(count: int) -> dict[str, int]:
    """Clips per kind; the first kind gets the rounding error."""
    numbers = {kind: int(count * share) for kind, share in KINDS.items()}
    numbers[next(iter(numbers))] += count - sum(numbers.values())
    return numbers


def _slots(kind: str) -> tuple[tuple[str, ...], ...]:
    match kind:
        case "digit":
            return tuple(DIGIT_COLOURS), DIGIT_NAMES, tuple(DIRECTIONS)
        case "shape":
            return tuple(SHAPE_COLOURS), SHAPES, ACTIONS
        case _:
            return MOVES, tuple(SUBJECTS), ("",)


def _draw_digit(rng: np.random.Generator, words: tuple[str, str, str], frames: int, size: int) -> Plane:
    colour, name, direction = words
    glyphs = _digit_glyphs()[DIGIT_NAMES.index(name)]
    glyph = glyphs[rng.integers(len(glyphs))]
    heading = np.array(DIRECTIONS[direction], np.float32)
    reach, drift = rng.uniform(0.16, 0.21), rng.uniform(-0.03, 0.03)
    along = np.linspace(-reach, reach, frames, dtype=np.float32)[:, None]
    centre = 0.5 + along * heading + drift * heading[::-1]
    half = rng.uniform(0.34, 0.38)
    x, y = _grid(size)
    mask = np.stack([_lookup(glyph, (x - cx) / half, (y - cy) / half) for cx, cy in centre])
    ground = np.array([14, 16, 28], np.float32) + 10 * y[None, :, :, None]
    return ground + (np.array(DIGIT_COLOURS[colour], np.float32) - ground) * mask[..., None]


def _draw_shape(rng: np.random.Generator, words: tuple[str, str, str], frames: int, size: int) -> Plane:
    colour, shape, action = words
    pace = np.linspace(0, 1, frames, dtype=np.float32)
    radius = np.full(frames, rng.uniform(0.27, 0.31), np.float32)
    angle = np.full(frames, rng.uniform(-0.12, 0.12), np.float32)
    cx, cy = (np.full(frames, 0.5 + rng.uniform(-0.04, 0.04), np.float32) for _ in range(2))
    match action:
        case "spins":
            angle = angle + pace * np.float32(0.6 * np.pi)
        case "grows" | "shrinks":
            radius = radius * (0.45 + 0.85 * (pace if action == "grows" else 1 - pace))
        case _:
            cy = 0.72 - 0.44 * np.abs(np.cos(np.pi * pace))
            radius = radius * 0.9
    x, y = _grid(size)
    points = (_turn((x - u) / r, (y - v) / r, a) for u, v, r, a in zip(cx, cy, radius, angle, strict=True))
    mask = np.stack([_lookup(_shape_mask(shape), *point) for point in points])
    ground = np.array([244, 238, 222], np.float32) - 22 * y[None, :, :, None]
    return ground + (np.array(SHAPE_COLOURS[colour], np.float32) - ground) * mask[..., None]


def _draw_camera(rng: np.random.Generator, words: tuple[str, str, str], frames: int, size: int) -> Plane:
    move, subject, _ = words
    photo = _photograph(subject, int(size * 1.35))
    height, width, _ = photo.shape
    *_, centre_x, centre_y = SUBJECTS[subject]
    pace = np.linspace(-1, 1, frames, dtype=np.float32) * rng.uniform(0.85, 1.0)
    view = np.full(frames, height * rng.uniform(0.66, 0.72), np.float32)
    middle_x, middle_y = (np.full(frames, c + rng.uniform(-0.02, 0.02), np.float32) for c in (centre_x, centre_y))
    if move.startswith("pans"):
        middle_x = middle_x + 0.24 * pace * (1 if "right" in move else -1) * height / width
    else:
        view = view * 1.1 * np.exp2(-0.42 * pace * (1 if "in" in move.split() else -1))
    x, y = _grid(size)
    pictures = []
    for u, v, side in zip(middle_x * width, middle_y * height, view, strict=True):
        left = np.clip(u - side / 2, 0, width - side)
        top = np.clip(v - side / 2, 0, height - side)
        pictures.append(_bilinear(photo, left + x * side - 0.5, top + y * side - 0.5))
    return np.stack(pictures)


@cache
def _grid(size: int) -> tuple[Plane, Plane]:
    """Pixel centres, x and y in 0..1, each [size, size]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


@cache
def _digit_glyphs() -> tuple[Plane, ...]:
    """The 8x8 digits of scikit-learn, enlarged to masks with smooth edges: ten arrays [examples, 64, 64] in 0..1."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    padded = np.pad(pixels.reshape(-1, 8, 8).astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    large = np.asarray(zoom(padded, (1, 6.4, 6.4), order=3, mode="grid-constant", grid_mode=True))
    masks = np.clip((large - 0.38) / 0.22, 0, 1).astype(np.float32)
    return tuple(_typical(masks[targets == number]) for number in range(10))


def _typical(masks: Plane, share: float = 0.3) -> Plane:
    """The `share` of masks [n, h, w] nearest to their mean: unusual handwriting is hard to read, for people too."""
    distance = ((masks - masks.mean(0)) ** 2).sum((1, 2))
    return masks[np.argsort(distance, kind="stable")[: round(len(masks) * share)]]


@cache
def _shape_mask(shape: str) -> Plane:
    """The shape inside the unit circle as a mask [64, 64] with smooth edges, in 0..1."""
    from PIL import Image, ImageDraw

    side, turn = 512, 2 * np.pi * np.arange(60) / 60
    match shape:
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) - 2
            corners = np.stack([x, y], 1) / 17.5
        case "star":
            angle, radius = np.pi * np.arange(10) / 5, np.where(np.arange(10) % 2, 0.45, 0.96)
            corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)
        case _:
            number = 3 if shape == "triangle" else 4
            angle = 2 * np.pi * (np.arange(number) + (0.5 if number == 4 else 0)) / number
            corners = 0.94 * np.stack([np.sin(angle), -np.cos(angle)], 1)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).polygon([(u, v) for u, v in ((corners + 1) / 2 * side).tolist()], fill=255)
    return np.asarray(canvas.resize((64, 64), Image.Resampling.BOX), np.float32) / 255


@cache
def _photograph(subject: str, height: int) -> Plane:
    """The photograph of `subject`, scaled to `height` rows: [height, width, 3] in 0..255."""
    from PIL import Image

    package, name, *_ = SUBJECTS[subject]
    with files(package).joinpath(name).open("rb") as stream, Image.open(stream) as picture:
        width = round(picture.width * height / picture.height)
        scaled = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(scaled, np.float32)


def _turn(x: Plane, y: Plane, angle: float | np.floating[Any]) -> tuple[Plane, Plane]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _lookup(mask: Plane, x: Plane, y: Plane) -> Plane:
    """Sample `mask` [n, n] at x, y in -1..1; 0 outside."""
    side = mask.shape[0]
    column, row = (x + 1) / 2 * side - 0.5, (y + 1) / 2 * side - 0.5
    inside = (np.abs(x) < 1) & (np.abs(y) < 1)
    return _bilinear(mask[..., None], column, row)[..., 0] * inside


def _bilinear(picture: Plane, column: Plane, row: Plane) -> Plane:
    """Sample `picture` [h, w, c] at real-valued columns and rows, edges repeated."""
    height, width, _ = picture.shape
    column, row = np.clip(column, 0, width - 1.001), np.clip(row, 0, height - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    fx, fy = (column - left)[..., None], (row - top)[..., None]
    upper = picture[top, left] * (1 - fx) + picture[top, left + 1] * fx
    lower = picture[top + 1, left] * (1 - fx) + picture[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy
