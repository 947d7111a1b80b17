"""The trainer process: `python -m lutetia.node.trainer [--memory BYTES]`. It trains one shard under the node's supervisor.

Orders come on stdin, reports go to stdout (`node.trainer.messages`). When stdin ends, it stops and saves.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import NoReturn

from lutetia.node.trainer.assignment import EXIT_CODES
from lutetia.node.trainer.logging_setup import log_to_stderr
from lutetia.system.process import ParentChannel, give_way

NICENESS = 5  # the daemon's heartbeats come before training


def memory_limit(arguments: list[str]) -> int | None:
    """The bytes of `--memory BYTES`, which the process may take of its device; None without it."""
    return int(arguments[1]) if arguments[:1] == ["--memory"] else None


def main() -> NoReturn:
    """Ends with `os._exit`, because a thread may still be reading stdin."""
    channel = ParentChannel()  # before the heavy imports: the daemon may die in the seconds that they take
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager may send it to all processes; only the daemon acts on it
    give_way(NICENESS)
    log_to_stderr()
    code = EXIT_CODES["crash"]
    try:
        from lutetia.models.fast_import import import_experts

        import_experts()
        from lutetia.node.trainer.loop import work

        code = EXIT_CODES[work(channel, memory_limit(sys.argv[1:]))]
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
