"""The process that decodes clips for a `DecoderPool`: `python -m lutetia.models.data.decode.process MEMORY SECONDS`.

It reads one request per line from its standard input, and answers with a line of JSON and the frames. A file that takes more
memory or time than allowed, or that breaks the decoder, ends at most this process.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lutetia.models.data.decode.clip import decode_clip, look_at
from lutetia.models.data.decode.cut import ClipRefused, PlainCut
from lutetia.models.data.ingest.webdataset import TarMember

_GRACE = 5  # seconds after the deadline, at which the pool has long ended this process, unless the pool itself is gone


def main() -> None:
    memory, seconds = int(sys.argv[1]), int(float(sys.argv[2])) + _GRACE
    _limit_memory(memory)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _answer(answers, {"ready": True})
    for line in requests:
        signal.alarm(seconds)
        _handle(json.loads(line), answers)
        signal.alarm(0)


def _handle(request: dict[str, Any], answers: BinaryIO) -> None:
    try:
        if request["cut"] is None:
            _answer(answers, {"look": asdict(look_at(_source(request)))})
            return
        frames = decode_clip(_source(request), PlainCut(**request["cut"]))
    except ClipRefused as refusal:
        _answer(answers, {"refused": str(refusal)})
        return
    _answer(answers, {"bytes": frames.nbytes}, np.ascontiguousarray(frames).data)


def _source(request: dict[str, Any]) -> Path | TarMember:
    path = Path(request["path"])
    return TarMember(path, **request["member"]) if request["member"] else path


def _answer(answers: BinaryIO, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    answers.write(json.dumps(header).encode() + b"\n")
    answers.write(payload)
    answers.flush()


def _limit_memory(allowed: int) -> None:
    """Limit the address space to what the imports take and `allowed` bytes, where the system can."""
    with contextlib.suppress(OSError, ValueError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + allowed, taken + allowed))


if __name__ == "__main__":
    main()
