"""Progress of one long step: a bar on a terminal, a line every ten per cent elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

OnProgress = Callable[..., None]


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yield `report(stage, done, total)`; everything goes to stderr."""
    from .output import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield _lines(title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=out, transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda stage, done, total: bars.update(task, description=f"{title}: {stage}", completed=done, total=total)


def _lines(title: str) -> Callable[[str, int, int], None]:
    last: dict[str, int] = {}

    def report(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if tenth != last.get(stage):
            last[stage] = tenth
            print(f"{title}: {stage} {done}/{total}", file=sys.stderr, flush=True)

    return report
