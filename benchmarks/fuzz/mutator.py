"""Mutations that stay JSON: a parser in Rust gives a fuzzer no coverage to find its way into documents by single bytes.

A node of the document is replaced by something awkward, removed, doubled or moved; text that is itself JSON is entered.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

_DOUBLE = "@twice@"
_RAW = {"@nan@": "NaN", "@inf@": "-Infinity", "@huge@": "1e999", "@zero@": "-0.0", "@half@": "0.5000000000000001e0"}
_RAW |= {"@digits@": "9" * 4400, "@long@": "9" * 4200, "@surrogate@": '"\\ud800"', "@nul@": '"\\u0000"', "@dup@": '{"a":1,"a":2}'}
_RAW |= {"@deep@": "[" * 400 + "]" * 400, "@deeper@": '{"a":' * 5000 + "0" + "}" * 5000}
AWKWARD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, -1e308, 5e-324, "", " ", "a", "0", "1", "\n", "\x1b[2J",
    "../../../etc/passwd", "/etc/passwd", "a/./b", "..", "C:\\x", "\u202egnp", "１２", "é", "e\u0301", "ß", "ﬀ", "\U0001f600",
    "a" * 300, "f" * 64, "0" * 64, "F" * 64, "Ａ" * 64, [], {}, [[]], [None], {"": None}, {"a": {}}, *_RAW,
)  # fmt: skip


def mutate(data: bytes, random: Random) -> bytes | None:
    """One to three changes of the JSON document `data`; of JSON lines, in one of them. None when it is no JSON."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines)) if len(lines) > 1 else 0
    try:
        document = json.loads(lines[place] if len(lines) > 1 else data)
    except (ValueError, RecursionError):
        return None
    for _ in range(random.choice((1, 1, 2, 3))):
        document = _changed(document, random)
    text = _text(document)
    return b"\n".join([*lines[:place], text, *lines[place + 1 :]]) if len(lines) > 1 else text


def _text(document: Any) -> bytes:
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    for word, raw in _RAW.items():
        text = text.replace(json.dumps(word), raw)
    return text.replace(_DOUBLE, "").encode("utf-8", "surrogatepass")


def _changed(node: Any, random: Random) -> Any:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    children = list(inner)
    if not children or random.random() < 0.15:
        return _replaced(node, random)
    key, child = random.choice(children)
    copy = dict(node) if isinstance(node, dict) else list(node)
    if random.random() < 0.7:
        copy[key] = _changed(child, random)
        return copy
    return _rearranged(copy, key, child, random)


def _rearranged(copy: Any, key: Any, child: Any, random: Random) -> Any:
    """Without the child, with it twice, with another under its key, or in its place."""
    match random.randrange(4):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[f"{_DOUBLE}{key}"] = random.choice(AWKWARD)
        case 1:
            copy.insert(random.randrange(len(copy) + 1), child)
        case 2 if isinstance(copy, dict):
            copy[str(random.choice(AWKWARD))[:40]] = child
        case 2:
            copy.extend([child] * random.choice((1, 3, 30)))
        case _:
            return child
    return copy


def _replaced(node: Any, random: Random) -> Any:
    if isinstance(node, str):
        if (
            node[:1] in "{["
            and random.random() < 0.8
            and (inner := mutate(node.encode("utf-8", "surrogatepass"), random)) is not None
        ):
            return inner.decode("utf-8", "replace")
        if node and random.random() < 0.3:
            place = random.randrange(len(node))
            return node[:place] + random.choice("0aZ/.\\\n\0é-: ") + node[place + random.randrange(2) :]
    if isinstance(node, (int, float)) and not isinstance(node, bool) and abs(node) < 1e300 and random.random() < 0.4:
        return random.choice((node + 1, node - 1, -node, node * 2, node / 3, float(node), 10 * node))
    return random.choice(AWKWARD)
