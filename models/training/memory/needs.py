"""What a node needs for a run, in numbers and in sentences. Imports no torch: a node's supervisor says them, too."""

from __future__ import annotations

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen

_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_FLOPS = 30e12
"""Operations per second that a card of 24 GB reaches in such training, about a third of what it is sold with."""
_LINE_MBIT = 100
"""Megabits per second of the line by which the hours of a download are told."""
_STATE = 20
"""Bytes of a trained number on the device in plain training: weight, gradient, two moments and average in float32."""


class RunNeeds(Frozen):
    """What one shard of a run takes of disk, line and time. Sizes in bytes."""

    parameters: int = Field(description="Numbers of the expert, its base included")
    trained: int = Field(description="Numbers that training changes")
    weights: int = Field(description="An epoch's weights file")
    checkpoint: int = Field(description="All of an epoch's checkpoint: what crosses the wire")
    local: int = Field(description="A local state on the node's disk")
    data: int = Field(description="The shard's training data")
    base: int = Field(default=0, description="Files of the base that the expert adapts")
    epochs: int = Field(description="Epochs of the shard's budget")
    samples: int = Field(description="Samples of the shard's budget")
    flops: float = Field(description="Operations of the shard's budget")

    @property
    def node_disk(self) -> int:
        """Parent, own checkpoint, one more in the making, a local state and its successor, the data and the base."""
        return 3 * self.checkpoint + 2 * self.local + self.data + self.base

    @property
    def guessed_rate(self) -> float:
        """Samples per second of a card of 24 GB."""
        return self.samples * _FLOPS / self.flops

    def size_line(self) -> str:
        return f"expert: {self.parameters / 1e6:.4g} million parameters, {self.trained / 1e6:.4g} million trained"

    def disk_line(self) -> str:
        return (
            f"a checkpoint: {size_text(self.checkpoint)} on the wire, {self.epochs} of each shard; "
            f"a node's disk: {size_text(self.node_disk)}"
        )

    def hours_line(self, rate: float | None = None) -> str:
        """How long the shard's budget takes. `rate`: samples per second that the probe measured; None: not measured."""
        if rate:
            return f"a shard's budget: {hours_text(self.samples / rate / 3600)} at {rate:.3g} samples/s, as probed here"
        return f"a shard's budget: {hours_text(self.flops / _FLOPS / 3600)} at {_FLOPS / 1e12:.0f} TFLOP/s"

    def base_line(self, *, here: bool) -> str:
        """What is fetched of the base before anything is trained; empty for a run without adapters."""
        if not self.base:
            return ""
        size = f"the base: {size_text(self.base)}"
        if here:
            return f"{size}, on this machine already"
        hours = 8 * self.base / (_LINE_MBIT * 1e6) / 3600
        return f"{size} to fetch once, {hours_text(hours)} at {_LINE_MBIT} Mbit/s"

    def two_lines(self, device: str, memory: tuple[int, int] | None, rate: float | None, *, base_here: bool) -> tuple[str, str]:
        """All of it in two lines, for who joins.

        Args:
            device: where it is trained.
            memory: bytes on it and in main memory beside it, as planned; None: not counted, because it is small.
            rate: samples per second that the probe measured.
            base_here: whether the base's files are on this machine.
        """
        held = f"{size_text(_STATE * self.trained)} and what a pass keeps, small beside its memory"
        if memory:
            held = f"{size_text(memory[0])}" + (f" and {size_text(memory[1])} of main memory" if memory[1] else "")
        later = filter(None, (self.disk_line(), self.hours_line(rate), self.base_line(here=base_here)))
        return f"{self.size_line()}; on {device}: {held}", "; ".join(later)


def size_text(count: float) -> str:
    """A number of bytes with its decimal unit, three digits."""
    unit, divisor = next(((unit, divisor) for unit, divisor in _UNITS if count >= divisor), ("B", 1))
    return f"{count / divisor:.3g} {unit}"


def hours_text(hours: float) -> str:
    """A time that something takes, in words."""
    if hours >= 1:
        return f"about {hours:.3g} hours"
    minutes = round(60 * hours)
    return f"about {minutes} minutes" if minutes > 1 else "about a minute" if minutes else "less than a minute"
