"""The page of the protocol: ticket, manifest, records of the DHT and streams, with their bounds."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import get_args

from pydantic import BaseModel

from docs.generate.markdown import code, docstring, join, summary, table
from docs.generate.models import Model, section, sections
from lutetia.protocol import blobs, rpc
from lutetia.protocol.schema import manifest as manifests
from lutetia.protocol.schema import records, ticket
from lutetia.protocol.schema.manifest import SignedManifest, Timing
from lutetia.protocol.schema.records import MAX_RECORD_BYTES, RecordLimits
from lutetia.protocol.schema.ticket import MAX_TICKET_CHARACTERS, PREFIX, Ticket

_STREAM = re.compile(r"/lutetia/[a-z-]+/\d+")
_LIMIT = re.compile(r"BYTES|SECONDS|TIMEOUT|MAX_|MOST_|_PIECE$|^PIECE$")
_PAGE = "protocol.md"


def record_models() -> tuple[Model, ...]:
    return get_args(get_args(records.Record)[0])


def roots() -> list[Model]:
    return [Ticket, SignedManifest, *record_models(), *(model for module in stream_modules() for model in messages(module))]


def stream_modules() -> list[ModuleType]:
    """The modules that define a stream protocol."""
    found = []
    for package in (rpc, blobs):
        for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(each.name)
            if any(_STREAM.fullmatch(value) for _, value, _ in constants(module) if isinstance(value, str)):
                found.append(module)
    return found


def constants(module: ModuleType) -> Iterator[tuple[str, object, str]]:
    """(name, value, docstring below it) of the constants that a module assigns."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.Assign):
            text = following.value if isinstance(following, ast.Expr) else None
            comment = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            for target in statement.targets:
                if isinstance(target, ast.Name) and target.id.lstrip("_").isupper():
                    yield target.id, getattr(module, target.id), comment.replace("\n", " ")


def messages(module: ModuleType) -> list[Model]:
    """The documents that a module defines."""
    members = vars(module).values()
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel) and m.__module__ == module.__name__]


def page() -> str:
    """docs/reference/protocol.md."""
    return join(
        "# Protocol",
        "Documents are canonical JSON (sorted keys, no spaces, UTF-8). Fields that a reader does not know are carried, "
        "within bounds: [compatibility](../explanation/compatibility.md) says what may change how.",
        "## The ticket",
        docstring(ticket),
        f"A ticket is `{PREFIX}` followed by the packed document below, at most {MAX_TICKET_CHARACTERS:,} characters.",
        section(Ticket, _PAGE, level="###"),
        "## The manifest",
        docstring(manifests),
        f"A signed manifest has at most {_size(manifests.MAX_MANIFEST_BYTES)}.",
        *sections([SignedManifest], _PAGE, level="###"),
        "## Records of the DHT",
        docstring(records),
        f"A sealed record has at most {MAX_RECORD_BYTES:,} bytes. It lives at most as long as the table says, at the default "
        f"heartbeat of {Timing().heartbeat:g} s.",
        _records(),
        *(part for model in record_models() for part in sections([model], _PAGE, level="###") if _new(model, part)),
        "## Streams",
        "A message is a length of four bytes, big-endian, and that many bytes. Limits are those of the module that defines the "
        "stream.",
        *(_stream(module) for module in stream_modules()),
    )


def _new(model: Model, part: str) -> bool:
    """Whether `part` is not already printed: models that several records share come with the manifest or the first record."""
    name = part.partition("\n")[0].removeprefix("### ")
    printed = {"SignedManifest", *(each.__name__ for each in _before(model))}
    return name not in printed


def _before(model: Model) -> Iterator[Model]:
    from docs.generate.models import closure

    yield from closure([Ticket, SignedManifest])
    every = record_models()
    yield from closure(every[: every.index(model)])


def _records() -> str:
    limits = RecordLimits(Timing().heartbeat)
    rows = []
    for model in record_models():
        kind = model.model_fields["kind"].default
        rows.append((code(kind), f"[{model.__name__}](#{model.__name__.lower()})", f"{limits.longest(kind):g} s", _signer(kind)))
    return table(("kind", "document", "longest life", "signed by"), rows)


def _signer(kind: str) -> str:
    return "a coordinator" if kind in records.COORDINATORS_ONLY else "its owner"


def _stream(module: ModuleType) -> str:
    every = list(constants(module))
    streams = [(name, value, text) for name, value, text in every if isinstance(value, str) and _STREAM.fullmatch(value)]
    limits = [
        (code(name.lstrip("_")), _amount(name, value), text)
        for name, value, text in every
        if isinstance(value, int | float) and _LIMIT.search(name)
    ]
    return join(
        f"### {', '.join(code(value) for _, value, _ in streams)}",
        summary(module),
        "\n".join(f"- {code(value)}: {text}" for _, value, text in streams if text),
        table(("limit", "value", "meaning"), limits),
        *(section(model, _PAGE, level="####") for model in messages(module)),
    )


def _amount(name: str, value: int | float) -> str:
    if "BYTES" in name or "PIECE" in name:
        return _size(int(value))
    return f"{value:g} s" if "SECONDS" in name or "TIMEOUT" in name else f"{value:,}"


def _size(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,} bytes"
