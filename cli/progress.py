"""Progress of a long step: a bar on a terminal, elsewhere a line every tenth and every minute; both with rate and time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lutetia.cli.formatting import ago, bar, rate
from lutetia.cli.output import say
from lutetia.system.log_format import StatusLineHandler

OnProgress = Callable[[str, int, int], None]
_LINE_SECONDS = 60.0


@contextlib.contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Yield `report(stage, done, total)`, which prints to stderr. Each stage has its own rate and time left."""
    from lutetia.cli.output import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield ProgressLines(title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=out, transient=True) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < bars.tasks[tasks[stage]].completed:  # new, or started again
                tasks[stage] = bars.add_task(f"{title}: {stage}", total=total, rate="")
            speed = bars.tasks[tasks[stage]].speed
            bars.update(tasks[stage], completed=done, total=total, rate=f"{speed:.3g}/s" if speed else "", visible=done < total)

        yield report


class ProgressLines:
    """Prints a line at the first and last item of a stage, at every tenth, and after a minute without a line."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._clock = title, clock
        self._tenth: dict[str, int] = {}
        self._printed_at: dict[str, float] = {}
        self._start: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, tenth, last = self._clock(), 10 * done // max(1, total), self._tenth.get(stage)
        if tenth == last and now - self._printed_at[stage] < _LINE_SECONDS:
            return
        if last is not None and tenth < last:  # the stage starts again
            del self._start[stage]
        self._tenth[stage], self._printed_at[stage] = tenth, now
        began, first = self._start.setdefault(stage, (now, done))
        say(f"{self._title}: {stage} {done}/{total}{self._pace(began, first, done, total)}")

    def _pace(self, began: float, first: int, done: int, total: int) -> str:
        """The rate since the first report of a stage, and the time left at that rate; empty while there is no rate."""
        seconds = self._clock() - began
        if done <= first or seconds <= 0 or total == 1:
            return ""
        pace = (done - first) / seconds
        left = f", {(total - done) / pace:.0f} s left" if done < total else ""
        return f" ({pace:.3g}/s{left})"


class TrainingProgress:
    """Shows a node's own progress: a line that changes in place on a terminal, elsewhere a line of the log now and then.

    Args:
        line: the terminal's line; None without a terminal.
        log: writes a line of the log.
        clock: Unix seconds.
    """

    def __init__(
        self, line: StatusLineHandler | None, log: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:  # fmt: skip
        self._line, self._log, self._clock = line, log, clock
        self._logged: dict[str | None, tuple[float, Any]] = {}

    def __call__(self, status: Mapping[str, Any]) -> None:
        """Show the progress in the daemon's status document, that of each device if there are several."""
        now, devices = self._clock(), status.get("devices") or ()
        if self._line and len(devices) < 2:
            text = training_line(status, now)
            self._line.set_status(text and f"{bar(status['step'] / status['steps'], 20)} {text}")
        elif self._line:
            self._line.set_status(" | ".join(_short(each) for each in devices))
        else:
            for each in devices if len(devices) > 1 else (status,):
                self._log_line(each, f"{each['device']}: " if len(devices) > 1 else "", now)

    def _log_line(self, status: Mapping[str, Any], where: str, now: float) -> None:
        text, work = training_line(status, now), (status["shard"], status["epoch"])
        logged_at, logged = self._logged.get(status["device"], (float("-inf"), None))
        if text and (now - logged_at >= _LINE_SECONDS or work != logged):
            self._logged[status["device"]] = now, work
            self._log(where + text)


def _short(device: Mapping[str, Any]) -> str:
    """One of several devices, in a few words."""
    if device["shard"] is None or not device["steps"]:
        return f"{device['device']} {device['state']}"
    done = f"epoch {current_epoch(device)}/{device['epochs']} step {device['step']}/{device['steps']}"
    return f"{device['device']} expert {device['shard']} {done}"


def current_epoch(status: Mapping[str, Any]) -> int:
    """The number of the epoch under way, from 1: after those that are accepted and those that wait for a verdict."""
    return min(status["epochs"], status["epoch"] + status["pending"] + 1)


def expert_of(status: Mapping[str, Any]) -> str:
    """The shard that a device or node works on, and its lane, in words."""
    name, lane = f"expert {status['shard']} {status['shard_name'] or ''}".strip(), status.get("lane")
    return name if lane is None else f"{name}, lane {lane}"


def training_line(status: Mapping[str, Any], now: float) -> str:
    """Expert, epoch, step, loss, rate and time left of a training node in one line; empty while it does not train."""
    step, steps = status["step"], status["steps"]
    if status["state"] != "training" or not steps or step is None or status["loss"] is None:
        return ""
    epoch = current_epoch(status)
    parts = [
        expert_of(status),
        f"epoch {epoch} of {status['epochs']}",
        f"step {step} of {steps}",
        f"loss {status['loss']:.4f}",
    ]
    if status["samples_per_second"] and status["due"]:
        left = max(0.0, status["due"] - now)
        further = (status["epochs"] - epoch) * left / max(1, steps - step) * steps
        parts += [f"{rate(status['samples_per_second'])} samples/s", f"checkpoint in {ago(left)}, all in {ago(left + further)}"]
    return ", ".join(parts)
