"""Measures kernels: `python -m lutetia.node.trainer.kernels`. The order comes on stdin, a trial a line goes to stdout.

A process of its own, because a kernel or a compiler may crash, hang, or leave a card unusable for the process that called it.
"""

from __future__ import annotations

import signal
import sys

from lutetia.node.trainer.logging_setup import log_to_stderr
from lutetia.system.process import give_way

NICENESS = 5


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    give_way(NICENESS)
    log_to_stderr()
    from lutetia.models.fast_import import import_experts

    import_experts()
    from lutetia.node.trainer.kernels.measuring import KernelOrder
    from lutetia.node.trainer.kernels.trials import trials

    for trial in trials(KernelOrder.model_validate_json(sys.stdin.buffer.read())):
        sys.stdout.write(f"{trial.model_dump_json()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
