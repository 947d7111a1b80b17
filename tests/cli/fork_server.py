"""A process that has imported what most commands need and forks for each command.

A `lutetia` process spends seconds importing torch and diffusers before it does milliseconds of work. The fork is a process of
its own, with its own arguments, folder, environment, output and exit code; only the imports are shared.

It reads requests as JSON lines on stdin ({"arguments", "cwd", "environment", "out", "err", "seconds"}) and answers each with
{"code"}: the exit code, or minus the number of the signal that ended the command.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from typing import Any, NoReturn

PRELOADED = (
    "lutetia.cli.main",
    "lutetia.models.pipeline",
    "lutetia.models.mixing.stitch",
    "lutetia.models.data.build",
    "lutetia.models.metrics.report",
    "lutetia.coordinator.admin.create",
    "lutetia.cli.study.stages",
)


def main() -> None:
    gc.disable()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def become(request: dict[str, Any]) -> NoReturn:
    """Turn this fork into the command, and end with it."""
    signal.alarm(int(request["seconds"]))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.argv = ["lutetia", *request["arguments"]]
    from lutetia.cli.main import main as lutetia

    code = 70
    try:
        lutetia()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
