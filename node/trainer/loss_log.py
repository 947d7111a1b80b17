"""Exports what a trainer measures, step by step: to a file of JSON lines, to TensorBoard, or to trackio."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lutetia.system.errors import ConfigError

PLACES = "a file that ends in .jsonl, tensorboard:FOLDER, or trackio:PROJECT"
_FLUSH_STEPS = 20


class LossLog(Protocol):
    """A place for figures of one shard's training; a step that is trained again after a restart is written again."""

    def step(self, number: int, figures: Mapping[str, float]) -> None:
        """Write the figures of step `number` (0, 1, … of the shard's budget)."""
        ...

    def clips(self, number: int, prompts: Sequence[str], pictures: Any, fps: float) -> None:
        """Write clips, uint8 `[N, F, H, W, 3]`, that the expert made of `prompts` before step `number`."""
        ...

    def close(self) -> None: ...


def parse_place(place: str) -> tuple[str, str]:
    """(kind, where) of the setting `losses`. Raises ConfigError."""
    kind, found, where = place.partition(":")
    if found and kind in ("tensorboard", "trackio") and where.strip():
        return kind, where
    if place.endswith(".jsonl"):
        return "jsonl", place
    raise ConfigError(f"losses: {place!r} is no place for losses; give {PLACES}")


def open_log(place: str, run: str, shard: int, lane: int = 0) -> LossLog:
    """The log of one lane of a shard of a run. Raises ConfigError when `place` names none, or its package is not installed."""
    kind, where = parse_place(place)
    name = f"shard-{shard}-lane-{lane}" if lane else f"shard-{shard}"
    try:
        match kind:
            case "jsonl":
                return JsonLines(Path(where).expanduser(), {"run": run, "shard": shard} | ({"lane": lane} if lane else {}), name)
            case "tensorboard":
                return TensorBoard(Path(where).expanduser(), f"{run[:12]}-{name}")
        return Trackio(where, f"{run[:12]}-{name}")
    except ImportError as error:
        raise ConfigError(f"losses: {kind} is not installed here; run: pip install 'lutetia[{kind}]'") from error
    except OSError as error:
        raise ConfigError(f"losses: cannot write to {where}: {error.strerror or error}; name another place") from error


class JsonLines:
    """One object a line, appended: `place` (run, shard), `step` and the figures; clips as GIFs in a folder beside the file."""

    def __init__(self, path: Path, place: Mapping[str, str | int], name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._pictures = path.with_suffix("")
        self._place, self._name = place, name
        self._waiting = 0

    def step(self, number: int, figures: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({**self._place, "step": number, **values}) + "\n")
        self._waiting += 1
        if self._waiting >= _FLUSH_STEPS:
            self._flush()

    def clips(self, number: int, prompts: Sequence[str], pictures: Any, fps: float) -> None:
        from PIL import Image

        from lutetia.models.video_files import write_gif

        self._pictures.mkdir(exist_ok=True)
        files = [self._pictures / f"{self._name}-step-{number}-{place}.gif" for place in range(len(prompts))]
        for file, clip in zip(files, pictures, strict=True):
            write_gif([Image.fromarray(frame) for frame in clip], file, fps)
        clips = [{"prompt": prompt, "file": str(file)} for prompt, file in zip(prompts, files, strict=True)]
        self._file.write(json.dumps({**self._place, "step": number, "clips": clips}, ensure_ascii=False) + "\n")
        self._flush()

    def _flush(self) -> None:
        self._waiting = 0
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars, and clips as strips of frames, in a folder of event files of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / name))

    def step(self, number: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, number)

    def clips(self, number: int, prompts: Sequence[str], pictures: Any, fps: float) -> None:
        for prompt, clip in zip(prompts, pictures, strict=True):
            strip = clip.transpose(1, 0, 2, 3).reshape(clip.shape[1], -1, 3)
            self._writer.add_image(f"clips/{prompt[:60]}", strip, number, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A project of trackio; clips are not written there."""

    def __init__(self, project: str, name: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run = trackio.init(project=project, name=name, resume="allow", embed=False)

    def step(self, number: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=number)

    def clips(self, number: int, prompts: Sequence[str], pictures: Any, fps: float) -> None:
        """Not written: trackio keeps media in a format of its own."""

    def close(self) -> None:
        self._run.finish()
