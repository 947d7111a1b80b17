"""Where a part of the GPU benchmark runs, and the figures that it leaves: each is written when it is known."""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from lutetia.models.device import free_cached_memory


def processes(device: str) -> BaseContext:
    """Choose how to start processes that use `device`: by a fork for a CPU, as new interpreters for a card.

    A forked process cannot use a card if its parent has touched the driver, and some packages do so when they are imported.
    """
    return multiprocessing.get_context("fork" if device == "cpu" else "spawn")


@dataclass(frozen=True)
class Figure:
    """One line of the table. `value` is a number, or words where a number would not do."""

    part: str
    what: str
    value: float | str
    unit: str = ""
    detail: str = ""


@dataclass
class Site:
    """What a part may use.

    Attributes:
        part: its name.
        device: cpu, cuda:N, xpu:N or mps.
        small: whether to use sizes that a CPU manages in seconds.
        folder: an empty folder for its files.
        lines: the file to which its figures are appended.
        seconds: its time limit; it is killed then.
    """

    part: str
    device: str
    small: bool
    folder: Path
    lines: Path
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def put(self, what: str, value: float | str, unit: str = "", detail: str = "") -> None:
        """Leave a figure. What was left stays when the part is killed."""
        figure = Figure(self.part, what, value, unit, detail)
        with self.lines.open("a") as file:
            file.write(json.dumps(asdict(figure)) + "\n")

    def wait(self) -> None:
        """Wait until the device has done everything that it was asked to."""
        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)

    def clean(self) -> None:
        """Free what the last measurement left, and forget its peak."""
        gc.collect()
        free_cached_memory(self.device)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """Most memory of the device that tensors held since `clean`, GB; None where that is not counted."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.cuda else None


def read_figures(lines: Path) -> list[Figure]:
    """The figures of a file that parts wrote; a last line that was cut off is left out."""
    if not lines.exists():
        return []
    return [Figure(**json.loads(line)) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]


def first_line(error: BaseException) -> str:
    """The error in one line, for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
