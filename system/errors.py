"""The errors that people see: one sentence that says what, where and what to do, and a documented exit code."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import ClassVar

_LONGEST = 2000


def plain(text: str) -> str:
    """`text` on one line, with unprintable characters escaped, cut at 2000 characters.

    An error may quote another peer, which must not be able to control the reader's terminal or forge lines of a log.
    """
    text = _printable(text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def plain_lines(text: str) -> str:
    """`text` with its lines kept, and every other unprintable character escaped."""
    return text if text.isprintable() else "\n".join(map(_printable, text.split("\n")))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return " " if letter == "\n" else letter.encode("unicode_escape").decode()


def disk_reason(error: OSError) -> str:
    """What is wrong with a file or folder, in a few words."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file is where a folder should be"
    return os.strerror(error.errno or 0).lower()


class LutetiaError(Exception):
    """Base of all expected errors. `str(error)` is the whole sentence, `code` the exit code of the process."""

    code: ClassVar[int] = 70
    name: ClassVar[str] = "internal"

    def __str__(self) -> str:
        return plain(super().__str__())


class UsageError(LutetiaError):
    """The command line is invalid."""

    code, name = 2, "usage"


class ConfigError(LutetiaError):
    """A configuration file, environment variable, manifest or ticket is unknown, malformed, expired or of another run."""

    code, name = 10, "config"


class IdentityError(LutetiaError):
    """The key of this node cannot be read, or two daemons use one identity or state folder."""

    code, name = 11, "identity"


class DataError(LutetiaError):
    """Clips, captions or shards cannot be used."""

    code, name = 12, "data"


class HardwareError(LutetiaError):
    """No device of this machine fits the run."""

    code, name = 20, "hardware"


class DiskError(LutetiaError):
    """The disk is full or read-only, or a file or folder cannot be used."""

    code, name = 21, "disk"


class BootstrapError(LutetiaError):
    """None of the ticket's bootstrap peers answered."""

    code, name = 30, "bootstrap"


class UnreachableError(LutetiaError):
    """A port is taken, or a peer that must be reached is not."""

    code, name = 31, "unreachable"


class AuthorisationError(LutetiaError):
    """The run's allowlist or the pinned keys refuse this peer or document."""

    code, name = 40, "authorisation"


class IntegrityError(LutetiaError):
    """Bytes do not match their name, tensors do not match the manifest, or a mixture is damaged."""

    code, name = 50, "integrity"


class InvariantError(LutetiaError):
    """A promise was broken in a simulation."""

    code, name = 60, "invariant"


EXIT_CODES: dict[int, str] = {
    error.code: (error.__doc__ or "").split(".")[0]
    for error in (
        UsageError, ConfigError, IdentityError, DataError, HardwareError, DiskError,
        BootstrapError, UnreachableError, AuthorisationError, IntegrityError, InvariantError, LutetiaError,
    )
}  # fmt: skip


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Raise the first expected error of an exception group by itself, so that people see one sentence."""
    try:
        yield
    except BaseExceptionGroup as group:
        expected = group.subgroup(LutetiaError)
        while isinstance(expected, BaseExceptionGroup):
            expected = expected.exceptions[0]
        if expected is None:
            raise
        raise expected from group
