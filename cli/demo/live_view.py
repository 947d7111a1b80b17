"""The demo's progress: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lutetia.cli.formatting import bar, clock, number, rate
from lutetia.cli.local.poller import LocalWorker, busy_worker, samples_done
from lutetia.cli.output import console
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import plain

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

LINE_EVERY = 10.0  # seconds between plain progress lines
_STATE_STYLE = {"training": "green", "done": "cyan", "claimed": "yellow", "unclaimed": "red", "overdue": "red"}


@dataclass(frozen=True)
class ShardRow:
    """One row of the table. `share` of the budget counts accepted and current work; `eta` is in seconds."""

    shard: int
    name: str
    state: str
    worker: str
    epoch: int
    epochs: int
    share: float
    loss: float | None
    holdout_loss: float | None
    samples_per_second: float
    eta: float | None


def shard_rows(status: SwarmStatus, workers: Mapping[str, LocalWorker]) -> list[ShardRow]:
    """Join what the coordinator accepted with the nodes' own states (by public key)."""
    rows = []
    for shard in status.shards:
        worker = workers.get(shard.owner or "")
        busy, done = busy_worker(shard, workers), samples_done(shard, workers)
        left = shard.samples_budget - done
        speed = busy.samples_per_second if busy else 0.0
        rows.append(
            ShardRow(
                shard.shard, shard.name, shard.state, worker.name if worker else "-", shard.epoch, shard.epochs,
                done / shard.samples_budget, busy.loss if busy else None, shard.holdout_loss, speed,
                left / speed if speed > 0 else None,
            )
        )  # fmt: skip
    return rows


def line(row: ShardRow) -> str:
    """A row as a plain line."""
    parts = [
        f"expert {row.shard} {row.name}: {row.state}",
        row.worker,
        f"epoch {row.epoch}/{row.epochs}",
        f"{100 * row.share:.0f} %",
    ]
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4f}")
    if row.holdout_loss is not None:
        parts.append(f"held-out {row.holdout_loss:.4f}")
    if row.samples_per_second:
        parts.append(f"{rate(row.samples_per_second)} samples/s")
    if row.eta is not None:
        parts.append(f"ETA {clock(row.eta)}")
    return ", ".join(parts)


@dataclass
class LiveTable:
    """What the demo prints. `timeline` keeps its events as (seconds since the start, sentence)."""

    out: Console
    live: Live | None = None
    phase: str = ""
    rows: Sequence[ShardRow] = ()
    at: float = 0.0
    timeline: list[tuple[float, str]] = field(default_factory=list)
    _last_line: float = float("-inf")

    def start_phase(self, at: float, phase: str) -> None:
        """Show that `phase` begins, `at` seconds after the start."""
        self.phase, self.at = phase, at
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            self.out.print(f"[{clock(at)}] {phase}")

    def log_event(self, at: float, sentence: str) -> None:
        """Show an event and keep it in the timeline."""
        self.timeline.append((at, sentence))
        self.at = at
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            self.out.print(f"[{clock(at)}]   {sentence}")

    def update(self, at: float, rows: Sequence[ShardRow]) -> None:
        """Show the experts' states; without a terminal only every LINE_EVERY seconds."""
        self.rows, self.at = rows, at
        if self.live:
            self.live.update(self.table(), refresh=True)
        elif at - self._last_line >= LINE_EVERY:
            self._last_line = at
            for row in rows:
                self.out.print(f"[{clock(at)}]   {line(row)}")

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(plain(f"lutetia demo   {clock(self.at)}   {self.phase}"), style="bold")]
        if self.rows:
            parts.append(_rows_table(self.rows))
        parts += [Text(plain(f"  {clock(at)}  {sentence}"), style="dim") for at, sentence in self.timeline]
        return Group(*parts)


def _rows_table(rows: Sequence[ShardRow]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("EXPERT", "NODE", "PROGRESS", "EPOCH", "LOSS", "HELD OUT", "SAMPLES/S", "ETA", "STATE"):
        table.add_column(name, justify="right" if name in ("LOSS", "HELD OUT", "SAMPLES/S", "ETA") else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.shard} {plain(row.name)}", row.worker, f"{bar(row.share)} {100 * row.share:3.0f} %",
            f"{row.epoch}/{row.epochs}", number(row.loss), number(row.holdout_loss),
            f"{row.samples_per_second:.1f}" if row.samples_per_second else "-", clock(row.eta),
            Text(row.state, style=_STATE_STYLE.get(row.state, "")),
        )  # fmt: skip
    return table


@contextlib.contextmanager
def live_view() -> Iterator[LiveTable]:
    """Yield a LiveTable on stdout: live on a terminal, lines elsewhere."""
    out = console()
    if not out.is_terminal:
        yield LiveTable(out)
        return
    from rich.live import Live

    view = LiveTable(out)
    with Live(view.table(), console=out, auto_refresh=False, vertical_overflow="visible") as live:
        view.live = live
        yield view
