"""Strategies for what peers, people and disks may hand us: valid documents from their schemas, and mutations of real ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from benchmarks.fuzz import examples
from benchmarks.fuzz.mutator import mutate
from benchmarks.fuzz.targets import target
from lutetia.protocol.schema.capabilities import CAPABILITIES
from lutetia.protocol.schema.manifest import Manifest

Json = dict[str, Any]
_ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_LATER = _ANY.filter(lambda value: len(text := json.dumps(value)) < 200 and text.count("[") + text.count("{") <= 3)
_PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
_SETTING = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | st.text(_PRINTABLE, max_size=9)
"""A value of a network's configuration."""


def of_schema(schema: Json, root: Json) -> st.SearchStrategy[Any]:
    """JSON values that the JSON schema `schema` (as pydantic writes it; references point into `root`) allows."""
    if "$ref" in schema:
        return of_schema(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([of_schema(each, root) for each in schema[union]])
    makers: dict[str | None, Callable[[], st.SearchStrategy[Any]]] = {
        "null": st.none,
        "boolean": st.booleans,
        "integer": lambda: st.integers(*_integer_range(schema)),
        "number": lambda: _numbers(schema),
        "string": lambda: _strings(schema),
        "array": lambda: _arrays(schema, root),
        "object": lambda: _objects(schema, root),
        None: lambda: _ANY,
    }
    return makers[schema.get("type")]()


def _integer_range(schema: Json) -> tuple[int, int]:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -(2**53)))
    most = schema.get("maximum", 2**53)
    return int(least) + ("exclusiveMinimum" in schema), int(most)


def _numbers(schema: Json) -> st.SearchStrategy[float]:
    return st.floats(
        schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum")),
        allow_nan=False, allow_infinity=False,
        exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
    )  # fmt: skip


def _strings(schema: Json) -> st.SearchStrategy[str]:
    least, most = schema.get("minLength", 0), schema.get("maxLength", 12)
    pattern = schema.get("pattern")
    if pattern is None:
        return st.text(_PRINTABLE, min_size=least, max_size=min(most, 12))
    if found := re.fullmatch(r"\^\[0-9a-f\]\{(\d+)\}\$", pattern):
        return st.binary(min_size=int(found[1]) // 2, max_size=int(found[1]) // 2).map(bytes.hex)
    if pattern.endswith(r"/p2p/[A-Za-z0-9]+$"):
        hosts = st.sampled_from(("ip4/10.1.2.3", "ip6/::1", "dns4/example.org"))
        return st.tuples(hosts, st.integers(1, 65535)).map(lambda at: f"/{at[0]}/tcp/{at[1]}/p2p/{examples.PEER.peer_id}")
    if r"\P{C}" in pattern:
        return st.text(_PRINTABLE, max_size=min(most, 12))
    bare = re.sub(r"\{(\d+),(\d+)\}", lambda span: f"{{{span[1]},{min(int(span[2]), int(span[1]) + 8)}}}", pattern).strip("^$")
    return st.from_regex(bare, fullmatch=True, alphabet=st.characters(codec="ascii"))


def _arrays(schema: Json, root: Json) -> st.SearchStrategy[list[Any]]:
    if items := schema.get("prefixItems"):
        return st.tuples(*(of_schema(item, root) for item in items)).map(list)
    least = schema.get("minItems", 0)
    return st.lists(of_schema(schema.get("items", {}), root), min_size=least, max_size=min(schema.get("maxItems", 3), least + 2))


def _objects(schema: Json, root: Json) -> st.SearchStrategy[Json]:
    if "properties" not in schema:
        inner, keys, least = schema.get("additionalProperties"), st.text(max_size=5), schema.get("minProperties", 0)
        for pattern, named in schema.get("patternProperties", {}).items():
            inner, keys = named, _strings({"pattern": pattern})
        values = of_schema(inner, root) if isinstance(inner, dict) else _SETTING
        return st.dictionaries(keys, values, min_size=least, max_size=least + 3)
    fields = {name: of_schema(each, root) for name, each in schema["properties"].items()}
    told_apart = [name for name, each in schema["properties"].items() if "const" in each]  # a union needs its tag
    needed = {name: fields.pop(name) for name in dict.fromkeys((*schema.get("required", ()), *told_apart))}
    if schema.get("additionalProperties") is True:  # a field of a later version
        fields["of_a_later_version"] = _LATER
    return st.fixed_dictionaries(needed, optional=fields)


def documents(kind: type[BaseModel] | TypeAdapter[Any]) -> st.SearchStrategy[bytes]:
    """The JSON of a valid document of `kind`."""
    schema = kind.json_schema() if isinstance(kind, TypeAdapter) else kind.model_json_schema()
    return of_schema(schema, schema).map(lambda value: json.dumps(value).encode())


def _consistent(value: Json) -> Json:
    """What a manifest's schema cannot say."""
    count, batch = len(value["shards"]), value["optimisation"]["batch"]
    for index, shard in enumerate(value["shards"]):
        shard |= {"index": index, "prior": 1 / count, "clips": max(shard["clips"], batch)}
        shard["expert"] = None  # the adapters of a run are alike, on one base
    latent, created = value["latent"], value["created"]
    channels = latent["channels"] if latent["channels"] <= 8 else 0
    latent |= {"mean": [0.5] * channels, "std": [1.5] * channels}
    value |= {"checkpoint_samples": 2 * batch, "samples_per_shard": 6 * batch, "expires": created + abs(created) + 1}
    if latent.get("picture"):
        value["sampling"]["prompts"] = []
    value["needs"] = list(CAPABILITIES)  # some settings need one, and an unknown one is a reason to refuse
    value.pop("team", None)  # it needs a capability that no version has yet
    value["run"] = None if value["version"] == 1 else value.get("run") or "a" * 64
    return value


def manifests() -> st.SearchStrategy[Manifest]:
    schema = Manifest.model_json_schema()
    small = {"version": st.just(1) | st.integers(1, 9), "created": st.floats(-1e9, 1e10), "samples_per_shard": st.just(1)}
    every = {name: of_schema(each, schema) for name, each in schema["properties"].items()} | small
    batch = st.integers(1, 1000).map(lambda size: {"batch": size})
    return st.fixed_dictionaries({**every, "optimisation": batch}).map(
        lambda value: Manifest.model_validate_json(json.dumps(_consistent(value)), strict=True)
    )


@st.composite
def mutations(draw: st.DrawFn, name: str) -> bytes:
    """A real document of the parser `name`, changed: within its JSON, or byte by byte, or cut and lengthened."""
    data = draw(st.sampled_from(target(name).seeds()))
    random = Random(draw(st.integers(0, 2**32)))
    way = draw(st.sampled_from(("json", "json", "flip", "cut", "splice", "any")))
    if way == "json":
        changed = mutate(data, random)
        if changed is not None:
            return changed
    return _bytewise(data, way, random, draw)


def _bytewise(data: bytes, way: str, random: Random, draw: st.DrawFn) -> bytes:
    place = random.randrange(len(data) + 1)
    match way:
        case "cut":
            return data[:place]
        case "splice":
            return data[:place] + draw(st.binary(max_size=40)) + data[random.randrange(len(data) + 1) :]
        case "any":
            return draw(st.binary(max_size=200))
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 10))):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)
