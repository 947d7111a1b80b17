"""The `lutetia` command: assembles the command groups and reports every failure as one sentence and an exit code."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import sys
import traceback
from types import TracebackType
from typing import Annotated, NoReturn

import typer

from lutetia.cli.commands import (
    coordinator,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    identity,
    run,
    simulate,
    study,
    swarm,
    volunteer,
)
from lutetia.cli.output import as_json_text, json_wanted, print_whatever_the_encoding, say, show
from lutetia.cli.variables import warn_of_unknown
from lutetia.system.errors import EXIT_CODES, DiskError, LutetiaError, disk_reason, plain
from lutetia.system.notify import ending_signals

_EPILOG = "Exit codes: `lutetia help exit-codes`. Each option has an environment variable too; the option overrides it."

app = typer.Typer(
    name="lutetia",
    help="Train a video diffusion model together: each volunteer trains one expert, and a router combines the experts.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels would take half the time of --help
)
_INTERRUPTED = 130
help_app = typer.Typer(help="Explain the exit codes.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show(f"lutetia {version('lutetia')}")
        raise typer.Exit()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def exit_code_rows() -> list[tuple[int, str]]:
    """Every exit code with its meaning, in order."""
    rows = {0: "Success", **EXIT_CODES, 70: "Unexpected: a bug", _INTERRUPTED: "Interrupted by Ctrl-C"}
    rows |= {129: "Ended by SIGHUP, the terminal was closed", 143: "Ended by SIGTERM"}
    return sorted(rows.items())


@help_app.command("exit-codes")
def exit_codes() -> None:
    """Print the meaning of every exit code."""
    for code, meaning in exit_code_rows():
        show(f"{code:>4}  {meaning}")


for _module in (demo, data, volunteer, generate, evaluate, study, simulate, doctor):
    _module.register(app)
for _group, _name in (
    (swarm.app, "swarm"),
    (run.app, "run"),
    (coordinator.app, "coordinator"),
    (data.app, "data"),
    (identity.app, "identity"),
):
    app.add_typer(_group, name=_name)
app.add_typer(help_app, name="help")


class _Reported(contextlib.AbstractContextManager["_Reported"]):
    """Reports an error that leaves the block in one sentence, and exits with its code."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def _exit(self, code: int, name: str, sentence: str) -> None:
        with contextlib.suppress(OSError):  # the exit code still reports it
            if self.as_json:
                show(as_json_text({"error": {"name": name, "code": code, "message": sentence}}))
            else:
                say(f"lutetia: {plain(sentence)}")
        raise SystemExit(code)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, SystemExit) and error.code == 1 and isinstance(error.__context__, BrokenPipeError):
            error = error.__context__  # typer turned it into an exit
        if os.environ.get("LUTETIA_DEBUG") and not isinstance(error, SystemExit | None):
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
        match error:
            case None | SystemExit():
                return
            case LutetiaError():
                self._exit(error.code, error.name, str(error))
            case typer.TyperException():
                self._exit(2, "usage", _usage_sentence(error))
            case KeyboardInterrupt() | typer.Abort():
                self._exit(_INTERRUPTED, "interrupted", "interrupted")
            case BrokenPipeError() if _reader_left():
                raise SystemExit(0) from error  # the reader of the pipe has closed it (| head)
            case OSError() if error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._exit(DiskError.code, DiskError.name, plain(_disk_sentence(error)))
            case _:
                first = error
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                text = f"{type(first).__name__}: {first}".splitlines()[0]
                self._exit(70, "internal", f"unexpected {text}; this is a bug, run again with LUTETIA_DEBUG=1 for the traceback")


def _usage_sentence(error: typer.TyperException) -> str:
    """typer's message, and which help to read. For a group without a command typer gives its whole help instead of a message."""
    path = getattr(getattr(error, "ctx", None), "command_path", "lutetia")
    from lutetia.protocol.schema.problems import plain_words

    text = plain_words(error.format_message().rstrip("."))
    return f"name a command; see {path} --help" if "\n" in text else f"{text[:1].lower()}{text[1:]}; see {path} --help"


def _disk_sentence(error: OSError) -> str:
    if error.filename is None:
        return f"cannot write: {disk_reason(error)}; free space"
    return f"cannot use {error.filename}: {disk_reason(error)}; name another path or change its permissions"


def _reader_left() -> bool:
    """Whether the broken pipe is this process's own output, and not that of a child."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return bool(poll.poll(0))


def _drop_unprinted() -> None:
    """Discard output that could not be printed. The interpreter would try again at exit, complain and change the exit code."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main() -> None:
    """Run the command line. Always raises SystemExit."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        with _Reported(json_wanted(arguments)):
            print_whatever_the_encoding()
            for number in ending_signals():
                if number != signal.SIGINT:  # Python raises KeyboardInterrupt
                    signal.signal(number, _exit_on_signal)
            os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its warnings are for programmers, not for volunteers
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it where it is installed
            _tie_to_parent()
            warn_of_unknown(app, os.environ)
            code = app(args=arguments, prog_name="lutetia", standalone_mode=False)
            if code == _INTERRUPTED:  # typer turned Ctrl-C into an exit
                raise KeyboardInterrupt
            with contextlib.suppress(BrokenPipeError):  # the reader has gone; the exit code stays
                if sys.stdout:
                    sys.stdout.flush()
            raise SystemExit(code if isinstance(code, int) else 0)
    finally:
        _drop_unprinted()


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    """Turn SIGTERM and SIGHUP into an exception, so that workspaces and children are cleaned up. Services have own handlers."""
    raise SystemExit(128 + number)


def _tie_to_parent() -> None:
    """Die with the parent where another `lutetia` command started this one (the processes of the demo's swarm)."""
    if parent := os.environ.pop("LUTETIA_PARENT", None):
        from lutetia.system.process import die_with_parent

        die_with_parent(int(parent))
