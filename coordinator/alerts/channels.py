"""Brings one message to a command, a webhook or a mail server, each in a process of its own that is ended at its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence

from lutetia.coordinator.settings import AlertSettings
from lutetia.protocol.schema.canonical import canonical

SECONDS = 30.0
"""Deadline of a message: whatever hangs, the coordinator does not wait longer, and it waits for nothing else meanwhile."""


def channels_of(settings: AlertSettings) -> tuple[str, ...]:
    """The names of the channels that are set."""
    given = {"command": settings.command, "webhook": settings.webhook, "mail": settings.mail}
    return tuple(name for name, value in given.items() if value is not None)


async def deliver(channel: str, settings: AlertSettings, run: str, causes: Sequence[str], seconds: float = SECONDS) -> str:
    """Bring the message to one channel. Returns why it failed; empty: it was delivered.

    Args:
        channel: command, webhook or mail.
        settings: where to.
        run: name of the run.
        causes: a line each.
        seconds: the deadline.
    """
    text = "\n".join((f"Run {run}: {len(causes)} {'thing needs' if len(causes) == 1 else 'things need'} you.", *causes))
    if channel == "command":
        try:
            words = shlex.split(settings.command or "")
        except ValueError as error:
            return f"cannot read the command: {error}"
        return await _run(words, text.encode(), {"LUTETIA_ALERT": text}, seconds)
    order = {"channel": channel, "settings": settings.model_dump(mode="json"), "run": run, "text": text, "causes": list(causes)}
    return await _run([sys.executable, "-m", "lutetia.coordinator.alerts"], canonical(order), {}, seconds)


async def _run(words: Sequence[str], given: bytes, environment: Mapping[str, str], seconds: float) -> str:
    """Run a program with `given` on its standard input. Returns why it failed, by its last line of errors."""
    if not words:
        return "the command is empty"
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"cannot start {words[0]}: {error.strerror}"
    try:
        async with asyncio.timeout(seconds):
            _, errors = await process.communicate(given)
    except TimeoutError:
        return f"it took longer than {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.returncode == 0:
        return ""
    last = errors[-4096:].decode(errors="replace").strip().splitlines()[-1:]
    return f"it ended with code {process.returncode}{f': {last[0][:300]}' if last else ''}"
