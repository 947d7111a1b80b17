"""One coverage-guided run in a process of its own: `python -m benchmarks.fuzz.process NAME FINDINGS [libFuzzer arguments]`.

A violation of the contract does not end the run: it is written to FINDINGS once per kind, and the run continues.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from random import Random

import atheris  # pyright: ignore[reportMissingImports]

from benchmarks.fuzz.mutator import mutate
from benchmarks.fuzz.targets import target

INSTRUMENTED = ("lutetia.", "json.", "tomllib.", "csv", "base64")
SLOW_SECONDS = 1.0


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            members = [getattr(member, "__func__", member) for member in vars(value).values()]
            yield from (member for member in members if isinstance(member, types.FunctionType))
        else:
            inner = inspect.unwrap(value) if callable(value) else value
            if isinstance(inner, types.FunctionType) and inner.__module__ == module.__name__:
                yield inner


def instrument() -> int:
    """Give libFuzzer coverage of this project's parsers and of the Python parsers they use. Returns the number of functions."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.startswith(INSTRUMENTED) and isinstance(module, types.ModuleType):
            for function in _functions(module):
                if id(function) not in seen:
                    seen.add(id(function))
                    atheris.instrument_func(function)  # pyright: ignore[reportAttributeAccessIssue]
    return len(seen)


class Findings:
    """Violations of the contract, one file per kind."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._known = folder, set[str]()
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, kind: str, data: bytes, text: str) -> None:
        if kind in self._known:
            return
        self._known.add(kind)
        name = hashlib.sha256(kind.encode()).hexdigest()[:12]
        (self._folder / f"{name}.bin").write_bytes(data)
        (self._folder / f"{name}.json").write_text(json.dumps({"kind": kind, "text": text, "bytes": len(data)}))


def _kind(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzz/contract" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    place = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.name}"


def main() -> None:
    name, findings = sys.argv[1], Findings(Path(sys.argv[2]))
    chosen = target(name)
    chosen.hold(chosen.seeds()[0])  # imports what it imports late, so that this is instrumented, too
    instrument()

    def one(data: bytes) -> None:
        begun = time.process_time()  # the machine may be busy with other things
        try:
            chosen.hold(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the fuzzer looks for everything that the contract does not allow
            findings.note(_kind(error), data, "".join(traceback.format_exception(error))[-3000:])
        if (seconds := time.process_time() - begun) > SLOW_SECONDS:
            findings.note("slow", data, f"{seconds:.1f} s")

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        """Two times out of three as JSON where it is some, else libFuzzer's own way."""
        random = Random(seed)
        changed = mutate(data, random) if random.random() < 0.67 else None
        return atheris.Mutate(data, most) if changed is None or len(changed) > most else changed

    atheris.Setup([sys.argv[0], *sys.argv[3:]], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
