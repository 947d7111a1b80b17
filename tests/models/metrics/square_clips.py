"""Small clips that are quick to measure: a coloured square that moves over a dark ground."""

from __future__ import annotations

import torch

from lutetia.models.metrics.clips import ClipSet

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (240, 240, 240)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def square_clips(count: int, seed: int = 0, frames: int = 10, size: int = 32) -> ClipSet:
    """`count` clips of `frames` frames of `size` x `size` px; the caption names the colour and the direction."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 40, (count, 1, size, size, 3), generator=generator).expand(-1, frames, -1, -1, -1).clone()
    captions = []
    for clip in pictures:
        colour, direction = (sorted(options)[int(torch.randint(4, (), generator=generator))] for options in (COLOURS, DIRECTIONS))
        top, left = (int(v) for v in torch.randint(frames, size - frames - 8, (2,), generator=generator))
        for number, frame in enumerate(clip):
            y, x = top + number * DIRECTIONS[direction][0], left + number * DIRECTIONS[direction][1]
            frame[y : y + 8, x : x + 8] = torch.tensor(COLOURS[colour])
        captions.append(f"a {colour} square moving {direction}")
    return ClipSet(pictures.to(torch.uint8), tuple(captions), ("squares",) * count)
