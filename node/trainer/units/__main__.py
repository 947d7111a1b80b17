"""One rank of a unit: `python -m lutetia.node.trainer.units`. Its order comes on stdin (`RankOrder`)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from lutetia.node.trainer.assignment import EXIT_CODES
from lutetia.node.trainer.logging_setup import log_to_stderr
from lutetia.system.process import give_way

log = logging.getLogger(__name__)

NICENESS, LOOK_SECONDS = 5, 0.2


def main() -> NoReturn:
    """Ends with `os._exit`: a thread of a collective operation may still wait."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    give_way(NICENESS)
    log_to_stderr()
    code = EXIT_CODES["crash"]
    try:
        from lutetia.models.fast_import import import_experts

        import_experts()
        code = work(sys.stdin.buffer.read())
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def work(text: bytes) -> int:
    """Carry out an order; returns the exit code."""
    import torch

    from lutetia.models.training.units.split import joined
    from lutetia.node.device_settings import torch_cards
    from lutetia.node.trainer.devices import use_device
    from lutetia.node.trainer.exit_reasons import reason_of
    from lutetia.node.trainer.units.ranks import RankOrder

    torch.set_flush_denormal(True)
    order = RankOrder.model_validate_json(text)
    task = order.assignment or order.trial
    assert task
    cards = torch_cards(task.device)
    use_device(cards[order.rank], order.limit)
    if task.threads:
        torch.set_num_threads(task.threads)
    try:
        with joined(order.rank, len(cards), order.meeting, cards[order.rank]) as split:
            if order.assignment:
                from lutetia.node.trainer.loop import build

                build(order.assignment, wait_for_file, split).follow()  # pyright: ignore[reportAttributeAccessIssue]
            elif order.trial:
                from lutetia.node.trainer.units.trials import try_unit

                sys.stdout.write(f"{try_unit(order.trial, split)}\n")
    except Exception as error:  # an error that the node knows becomes its exit code; any other goes on
        known = reason_of(error)
        if known is None:
            raise
        log.error("%s", known[1])
        return EXIT_CODES[known[0]]
    return 0


def wait_for_file(number: int, path: Path) -> None:
    """Wait for a part of the data: rank 0 has seen it, or asks for it."""
    while not path.is_file():
        time.sleep(LOOK_SECONDS)  # the supervisor tells rank 0 alone of new files


if __name__ == "__main__":
    main()
