"""The trainer child: `python -m lutetia.node.trainer`. It trains one shard and talks to the daemon in JSON lines.

It hears `probe` (a Question), `start` (an Assignment), `allow` (until), `duty` (share) and `stop` (save); the end of the channel
means stop with save. It says `finding` or `failed`, `ready`, `progress` (at most four a second), `saved`, `checkpoint`, `disk`
(full or not) and at last `exit` with a reason, which its exit code repeats (`assignment.EXIT_CODES`).
A child that waits for `start` is warm.
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

NICENESS = 5  # the daemon's heartbeats go before training


def main() -> NoReturn:
    """Ends by `os._exit`: a thread may still be reading the channel."""
    channel = ParentChannel()  # before the heavy imports: they take seconds in which the daemon may die
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager may tell all processes; the daemon decides what it means
    give_way(NICENESS)
    log_to_stderr()
    code = EXIT_CODES["crash"]
    try:
        from lutetia.models.fast_import import import_experts

        import_experts()
        from lutetia.node.trainer.loop import work

        code = EXIT_CODES[work(channel)]
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
