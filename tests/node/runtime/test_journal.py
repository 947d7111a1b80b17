"""The journal of a node's page: bounded, and small enough for one answer of the control socket."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lutetia.node.control import MAX_ANSWER
from lutetia.node.journal import (
    LONGEST_TEXT,
    MOST_LOSSES,
    MOST_VERDICTS,
    NodeJournal,
    NodeVerdict,
    TrainingLoss,
    VerdictBook,
    last_lines,
    with_loss,
)


def at(samples: int, shard: int = 0) -> TrainingLoss:
    return TrainingLoss(time=1e9 + samples + 1 / 3, shard=shard, samples=samples, loss=1 / 3)


def test_losses_are_thinned_out_evenly_and_follow_a_rollback() -> None:
    losses: list[TrainingLoss] = []
    for samples in range(1, 1000):
        losses = with_loss(losses, at(samples), most=10)
        assert len(losses) <= 10
        assert losses[-1].samples == samples
    gaps = [after.samples - before.samples for before, after in zip(losses, losses[1:], strict=False)]
    assert losses[0].samples == 1
    assert max(gaps) <= 300
    assert [each.samples for each in with_loss([at(8), at(16), at(24), at(99, 1)], at(16))] == [8, 99, 16]


def test_largest_journal_fits_into_an_answer(tmp_path: Path) -> None:
    book = VerdictBook(tmp_path / "verdicts.json")
    for epoch in range(MOST_VERDICTS + 5):
        book.add(NodeVerdict(time=1e9 + 1 / 3, shard=63, epoch=epoch, outcome="refused", text="\u20ac" * LONGEST_TEXT))
    assert [verdict.epoch for verdict in VerdictBook(book.path).verdicts][:2] == [5, 6]
    with last_lines() as lines:
        for number in range(500):
            logging.getLogger("lutetia.anything").warning("%d %s", number, "\u20ac" * 900)
    losses = tuple(at(samples) for samples in range(MOST_LOSSES))
    journal = NodeJournal(verdicts=book.verdicts, losses=losses, log=tuple(lines.lines))
    assert len(journal.log) == 200
    assert " 499 " in journal.log[-1]
    assert len(json.dumps({"ok": True, "answer": journal.model_dump(mode="json")})) < MAX_ANSWER
