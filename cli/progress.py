"""Progress of a long step: a bar on a terminal, elsewhere a line every tenth and every minute; both with rate and time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from lutetia.cli.output import say

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
        if done <= first or seconds <= 0:
            return ""
        rate = (done - first) / seconds
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        return f" ({rate:.3g}/s{left})"
