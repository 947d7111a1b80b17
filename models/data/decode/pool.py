"""Decode clips in processes of their own, each with a limit of memory and a deadline, and do work on them in threads."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from lutetia.models.data.decode.cut import ClipLook, ClipRefused, Cut, Frames
from lutetia.models.data.ingest.webdataset import TarMember
from lutetia.system.errors import HardwareError

Item = TypeVar("Item")
Result = TypeVar("Result")

CLIP_SECONDS = 120.0
CLIP_MEMORY = 2048  # MiB
_START_SECONDS = 60.0
_HEADER = 1 << 14  # bytes


def memory_of_a_clip(workers: int) -> int:
    """MiB for each of `workers`, which together get at most half of the machine's memory; at least 256."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return max(256, min(CLIP_MEMORY, machine // 2 // workers))


class DecoderPool:
    """Decodes clips in child processes that are started when they are needed, and again when one had to be ended.

    Safe to use from several threads, each of which has a child to itself. Use it in a `with` block, which ends the children.
    """

    def __init__(self, seconds: float = CLIP_SECONDS, memory: int = CLIP_MEMORY) -> None:
        """
        Args:
            seconds: deadline of one clip.
            memory: limit of one child, MiB, beyond what it takes when idle.
        """
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._is_closed = False

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all children, also those that decode: their clips are then refused."""
        with self._lock:
            self._is_closed = True
            idle, busy = self._idle, self._all.difference(self._idle)
            self._idle, self._all = [], set()
        for child in busy:
            child.stop()
        for child in idle:
            child.kill()

    def decode(self, path: Path | TarMember, cut: Cut) -> Frames:
        """The clip as uint8 [F, H, W, 3]. Raises ClipRefused, as `decode_clip` does, and at a limit; HardwareError."""
        _, payload = self._ask(path, cut)
        return np.frombuffer(payload, np.uint8).reshape(cut.frames, cut.height, cut.width, 3)

    def look(self, path: Path | TarMember) -> ClipLook:
        """Size and duration of a clip, from its packets alone. Raises ClipRefused, HardwareError."""
        header, _ = self._ask(path, None)
        return ClipLook(**header["look"])

    def _ask(self, path: Path | TarMember, cut: Cut | None) -> tuple[dict[str, Any], bytearray]:
        child = self._take()
        try:
            header, payload = child.ask(_request(path, cut), cut, self._seconds)
        except TimeoutError as error:
            self._drop(child)
            raise ClipRefused(
                f"{path.name} takes longer than {self._seconds:g} s to decode; remove it or raise clip_seconds"
            ) from error
        except (OSError, ValueError, EOFError) as error:
            self._drop(child)
            raise ClipRefused(
                f"{path.name} cannot be decoded (its decoder failed within {self._memory} MiB); remove it or encode it again"
            ) from error
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                self._idle.append(child)
        if is_closed:
            self._drop(child)
        if "refused" in header:
            raise ClipRefused(str(header["refused"]))
        return header, payload

    def _take(self) -> _Child:
        with self._lock:
            if self._is_closed:
                raise ClipRefused("decoding was interrupted; run the command again")
            if self._idle:
                return self._idle.pop()
            child = _Child(self._memory << 20, self._seconds)
            self._all.add(child)
        try:
            child.wait_until_ready()
        except (OSError, ValueError, EOFError) as error:
            self._drop(child)
            raise HardwareError("no process that decodes clips can be started; free memory, or use fewer workers") from error
        return child

    def _drop(self, child: _Child) -> None:
        child.kill()
        with self._lock:
            self._all.discard(child)


def _request(path: Path | TarMember, cut: Cut | None) -> bytes:
    is_file = isinstance(path, Path)
    member = None if is_file else {"member": path.member, "offset": path.offset, "size": path.size}
    fields = ("frames", "fps", "height", "width", "start", "short")
    values = cut and {name: getattr(cut, name) for name in fields}
    return json.dumps({"path": os.path.abspath(path if is_file else path.archive), "member": member, "cut": values}).encode()


class _Child:
    """A decoder process."""

    def __init__(self, memory: int, seconds: float) -> None:
        # -P: a file named av.py in the working folder must not be imported; one thread of BLAS: more would only take memory
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lutetia.models.data.decode.process", str(memory), str(seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._waiting = bytearray()

    def wait_until_ready(self) -> None:
        self._header(time.monotonic() + _START_SECONDS)

    def ask(self, request: bytes, cut: Cut | None, seconds: float) -> tuple[dict[str, Any], bytearray]:
        """Raises TimeoutError after `seconds`; OSError, ValueError or EOFError if the child has failed."""
        until = time.monotonic() + seconds
        assert self._process.stdin is not None
        self._process.stdin.write(request + b"\n")
        header = self._header(until)
        if "refused" in header or (cut is None and isinstance(header.get("look"), dict)):
            return header, bytearray()
        size = 0 if cut is None else cut.frames * cut.height * cut.width * 3
        if header.get("bytes") != size:
            raise ValueError("not the answer to the request")
        return header, self._take(size, until)

    def stop(self) -> None:
        """End the process; the thread that waits for its answer then gets an EOFError."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def kill(self) -> None:
        """End the process and free what belongs to it. No thread may wait for its answer."""
        self.stop()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

    def _header(self, until: float) -> dict[str, Any]:
        while b"\n" not in self._waiting:
            if len(self._waiting) > _HEADER:
                raise ValueError("an endless header")
            self._read(until)
        line, _, rest = self._waiting.partition(b"\n")
        self._waiting = rest
        header = json.loads(line)
        if not isinstance(header, dict):
            raise ValueError("not a header")
        return header

    def _take(self, size: int, until: float) -> bytearray:
        while len(self._waiting) < size:
            self._read(until)
        payload, self._waiting = self._waiting[:size], self._waiting[size:]
        return payload

    def _read(self, until: float) -> None:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
        data = os.read(self._process.stdout.fileno(), 1 << 20)
        if not data:
            raise EOFError
        self._waiting += data


def in_pool(
    items: Iterable[Item], work: Callable[[Item], Result], workers: int, stop: Callable[[], None] = lambda: None
) -> Iterator[tuple[Item, Result | ClipRefused]]:
    """Yield (item, result or refusal) in the order of `items`, computed by `workers` threads a few items ahead.

    Threads are enough: decoding is done in other processes, and hashing and torch release the interpreter lock.

    Args:
        items: what to work on.
        work: called with each.
        workers: number of threads.
        stop: called if the caller stops early or fails, so that running work ends soon.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="clips") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * workers:
                    yield _outcome(*waiting.popleft())
            while waiting:
                yield _outcome(*waiting.popleft())
        except BaseException:
            for _, future in waiting:
                future.cancel()
            stop()
            raise


def _outcome(item: Item, future: Future[Result]) -> tuple[Item, Result | ClipRefused]:
    try:
        return item, future.result()
    except ClipRefused as refusal:
        return item, refusal
