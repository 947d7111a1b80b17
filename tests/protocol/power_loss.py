"""What a disk may hold after a power loss: a program's system calls, recorded by strace, and every prefix of them replayed.

The model is the strictest reading of POSIX: bytes are safe after fsync of their file, names after fsync of their folder, neither
before. What is not safe may still be there, in any mixture. `DISKS` are the extreme mixtures.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed: it records the order of system calls")

_CALLS = (
    "openat,write,pwrite64,lseek,ftruncate,fallocate,fsync,fdatasync,close,rename,renameat,renameat2,link,linkat,unlink,unlinkat,"
    "mkdir,mkdirat,rmdir"
)
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')

Disk = Literal["all", "synced", "names", "zeros"]
DISKS: tuple[Disk, ...] = ("all", "synced", "names", "zeros")
"""`all`: everything arrived (SIGKILL); `synced`: only what was synced; `names`: all names, of the bytes only what was synced;
`zeros`: all names and sizes, zeros where bytes were not synced."""


@dataclass(eq=False)
class _File:
    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""

    def on(self, disk: Disk) -> bytes:
        match disk:
            case "all":
                return bytes(self.now)
            case "zeros":
                return (self.safe + bytes(len(self.now)))[: len(self.now)]
        return self.safe


@dataclass(eq=False)
class _Folder:
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    safe: dict[str, _File | _Folder] = field(default_factory=dict)


@dataclass
class _Open:
    node: _File | _Folder | None
    at: int = 0


class Model:
    """The file tree below `root`: its current and its safe state."""

    def __init__(self, root: Path) -> None:
        self._prefix = os.fspath(root)
        self.root = _Folder()
        self._open: dict[int, _Open] = {}
        self.marks: list[str] = []
        self._said = ""

    def apply(self, call: str, arguments: str, result: int) -> bool:
        """Replay one recorded call. Returns whether it could change anything."""
        if result < 0:
            return False
        texts = [bytes.fromhex(found.replace("\\x", "")) for found in _TEXT.findall(arguments)]
        plain = [part.strip() for part in _TEXT.sub("''", arguments).split(",")]
        match call:
            case "openat" if texts[0].decode() == self._prefix:
                self._open[result] = _Open(self.root)
                return False
            case "openat":
                return self._opened(self._place(plain[0], texts[0]), plain[2], result)
            case "close":
                self._open.pop(int(plain[0]), None)
                return False
            case "write" if plain[0] == "1":
                *lines, self._said = (self._said + texts[0].decode()).split("\n")
                self.marks += [line[1:].strip() for line in lines if line.startswith("@")]
                return False
            case "mkdir" | "mkdirat":
                where = self._place("AT_FDCWD" if call == "mkdir" else plain[0], texts[0])
                return self._put(where, _Folder())
            case "rename" | "renameat" | "renameat2":
                folders = ("AT_FDCWD",) * 2 if call == "rename" else (plain[0], plain[2])
                return self._moved(*(self._place(at, text) for at, text in zip(folders, texts, strict=True)))
            case "link" | "linkat":
                folders = ("AT_FDCWD",) * 2 if call == "link" else (plain[0], plain[2])
                source, target = (self._place(at, text) for at, text in zip(folders, texts, strict=True))
                return source is not None and self._put(target, source[0].now[source[1]])
            case "unlink" | "unlinkat" | "rmdir":
                where = self._place(plain[0] if call == "unlinkat" else "AT_FDCWD", texts[0])
                return where is not None and where[0].now.pop(where[1], None) is not None
        return self._file_call(call, plain, texts, result)

    def _file_call(self, call: str, plain: list[str], texts: list[bytes], result: int) -> bool:
        opened = self._open.get(int(plain[0]))
        if opened is None or opened.node is None:
            return False
        node = opened.node
        if call in ("fsync", "fdatasync"):
            node.safe = dict(node.now) if isinstance(node, _Folder) else bytes(node.now)  # type: ignore[assignment]
            return True
        assert isinstance(node, _File), call
        match call:
            case "write":
                self._written(node, opened.at, texts[0][:result])
                opened.at += result
            case "pwrite64":
                self._written(node, int(plain[3]), texts[0][:result])
            case "lseek":
                opened.at = result
                return False
            case "ftruncate":
                size = int(plain[1])
                node.now[:] = (node.now + bytes(max(0, size - len(node.now))))[:size]
            case "fallocate":
                node.now += bytes(max(0, int(plain[2]) + int(plain[3]) - len(node.now)))
        return True

    @staticmethod
    def _written(node: _File, at: int, data: bytes) -> None:
        node.now += bytes(max(0, at - len(node.now)))
        node.now[at : at + len(data)] = data

    def _place(self, at: str, text: bytes) -> tuple[_Folder, str] | None:
        """(folder, name) of a path below the root. None for the root itself and paths outside."""
        path = text.decode()
        if path.startswith(self._prefix + "/"):
            node, parts = self.root, path[len(self._prefix) + 1 :].split("/")
        elif not path.startswith("/") and at != "AT_FDCWD" and isinstance((o := self._open.get(int(at))) and o.node, _Folder):
            node, parts = self._open[int(at)].node, path.split("/")
        else:
            return None
        parts = [part for part in parts if part not in ("", ".")]
        for part in parts[:-1]:
            assert isinstance(node, _Folder)
            node = node.now[part]
        assert isinstance(node, _Folder)
        return (node, parts[-1]) if parts else None

    def _opened(self, where: tuple[_Folder, str] | None, flags: str, descriptor: int) -> bool:
        self._open[descriptor] = _Open(None)
        if where is None:
            return False
        folder, name = where
        made = name not in folder.now
        if made:
            assert "O_CREAT" in flags, name
            folder.now[name] = _File()
        node = folder.now[name]
        cut = "O_TRUNC" in flags and isinstance(node, _File) and bool(node.now)
        if cut:
            node.now.clear()  # type: ignore[union-attr]
        self._open[descriptor] = _Open(node, len(node.now) if "O_APPEND" in flags else 0)
        return made or cut

    @staticmethod
    def _put(where: tuple[_Folder, str] | None, node: _File | _Folder) -> bool:
        if where is None:
            return False
        where[0].now[where[1]] = node
        return True

    def _moved(self, source: tuple[_Folder, str] | None, target: tuple[_Folder, str] | None) -> bool:
        if source is None:
            return False
        node = source[0].now.pop(source[1])
        self._put(target, node)
        return True

    def image(self, disk: Disk) -> dict[str, bytes | None]:
        """Relative path -> bytes, None for a folder."""
        found: dict[str, bytes | None] = {}

        def walk(folder: _Folder, prefix: str) -> None:
            for name, node in (folder.safe if disk == "synced" else folder.now).items():
                if isinstance(node, _Folder):
                    found[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    found[prefix + name] = node.on(disk)

        walk(self.root, "")
        return found


def record(script: str, root: Path, *arguments: str) -> list[tuple[str, str, int]]:
    """Run a Python `script` on the empty folder `root` (its first argument) under strace. Returns its calls in order."""
    root.mkdir()
    trace = root.with_name(root.name + ".trace")
    done = subprocess.run(
        [STRACE or "", "-f", "-qq", "--seccomp-bpf", "-xx", "-s", str(1 << 22), "-e", f"trace={_CALLS}", "-e", "signal=none",
         "-o", str(trace), sys.executable, "-c", script, str(root), *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    if "ptrace" in done.stderr.lower() and "not permitted" in done.stderr.lower():
        pytest.skip("this machine forbids tracing")
    assert done.returncode == 0, done.stderr[-3000:]
    return list(_calls(trace))


def _calls(trace: Path) -> Iterator[tuple[str, str, int]]:
    """The calls in the order in which they returned. The two halves of an interrupted line are joined."""
    begun: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            pid, _, rest = line.partition(" ")
            rest = rest.strip()
            if rest.endswith("<unfinished ...>"):
                begun[pid] = rest.removesuffix("<unfinished ...>")
                continue
            if rest.startswith("<..."):
                rest = begun.pop(pid) + rest.partition("resumed>")[2].lstrip()
            if found := _LINE.match(f"{pid} {rest}"):
                yield found[2], found[3], int(found[4])


def every_power_loss(
    calls: list[tuple[str, str, int]], root: Path, scratch: Path, check: Callable[[Path, list[str]], None]
) -> int:
    """Call `check(folder, marks)` for every distinct disk that a power loss after any call may leave. Returns their number.

    `marks` are the lines starting with @ that the script had printed by then.
    """
    model, seen = Model(root), set()
    for call, arguments, result in calls:
        before = len(model.marks)
        if not model.apply(call, arguments, result) and len(model.marks) == before:
            continue
        for disk in DISKS:
            image = model.image(disk)
            name = hashlib.sha256(repr((sorted(image.items(), key=lambda item: item[0]), model.marks)).encode()).digest()
            if name in seen:
                continue
            seen.add(name)
            folder = scratch / f"{len(seen):04d}-{disk}"
            _write(folder, image)
            try:
                check(folder, model.marks)
            except AssertionError as error:
                raise AssertionError(
                    f"after {call}({arguments[:300]}) with {disk} on disk, marks {model.marks}: {error}"
                ) from error
            shutil.rmtree(folder)
    return len(seen)


def _write(folder: Path, image: dict[str, bytes | None]) -> None:
    folder.mkdir(parents=True)
    for name in sorted(image):
        data = image[name]
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
