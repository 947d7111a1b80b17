"""`python -m benchmarks document-attacks [--tries N] [--honest M]`: what hostile documents do to those who read them.

Each attack is tried N times with other values; what is counted is how often it ended, delayed or misled its reader. Honest
records and manifests, also of a later version, go the same ways M times; what is counted is how often one is refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

from benchmarks.fuzz import examples
from benchmarks.fuzz.decisions import ready, rules, show_swarm
from benchmarks.report import Machine
from lutetia.coordinator.acceptance.judge_isolation import judge_isolated
from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.status import MAX_STATUS_BYTES
from lutetia.system.errors import ConfigError

MADE_UP_NODES = 8192
MOST_SECONDS = 5.0
HOSTILE = "[]<>&\\\"'`${}\x00\x07\x1b\n\r\u202e\u2066\u2028/xA😀é"
DEVICES = ("NVIDIA GeForce RTX 4090", "Apple M3 Max", "AMD Radeon RX 7900 XTX", "Intel(R) Core(TM) i7-8700K CPU @ 3.20GHz", "cpu")
SIZES: dict[str, tuple[Any, ...]] = {
    "num_layers": (100_000, 10**9, -1, 257), "patch_size": ([1, 0, 4], [0, 4, 4], [1, 4, -4]), "ffn_dim": (0, 10**9, 10**30),
    "num_attention_heads": (0, 60_000, 10**9), "in_channels": (0, -4, 10**9), "freq_dim": (0, -2), "eps": ([[[[[1]]]]],),
}  # fmt: skip


def sealed(record: r.Record, fields: dict[str, Any]) -> bytes:
    """`record` with `fields` that its class may not know or allow, signed as its owner would."""
    value = record.model_dump(mode="json") | fields
    signed = canonical({"key": record.key(), "expires": examples.NOW + 5, "record": value})
    return canonical({"record": value, "signature": examples.PEER.sign(b"lutetia-record-1\n" + signed)})


def opened(data: bytes) -> r.Record | None:
    """The record as any peer reads it; None: refused."""
    try:
        return r.open_record(
            data, key=None, subkey=examples.PEER.public_key, expires=examples.NOW + 5, now=examples.NOW,
            limits=r.RecordLimits(2.0),
        )  # fmt: skip
    except r.RecordRefused:
        return None


def ended_the_coordinator(record: r.CheckpointRecord) -> bool:
    """Whether judging `record`, by stream or from the DHT, raises an error that nothing catches."""
    return any(judge_isolated(rules(), ready(), Offered(record, examples.NOW, via)).error for via in ("offer", "poll"))


def absurd_number(draw: Random) -> bool:
    """A number of up to 3,000 digits in a signed result; it ends or misleads the coordinator when it is read as it is."""
    field = draw.choice(("epoch", "samples", "loss", "shard"))
    record = opened(sealed(examples.checkpoint(), {field: 10 ** draw.randrange(100, 3000)}))
    return isinstance(record, r.CheckpointRecord) and (ended_the_coordinator(record) or abs(record.loss) > 1e39)


def hostile_words(draw: Random) -> bool:
    """Markup and control characters in the words of a node record, shown in every view."""
    text = "".join(draw.choice(HOSTILE) for _ in range(64))
    hardware = {"device": text, "name": text, "memory_bytes": 1, "cores": 1}
    record = opened(sealed(examples.all_records()[0], {"hardware": hardware, "software": text}))
    if record is None:
        return False
    try:
        show_swarm([record])
    except AssertionError:
        return True
    return False


def unknown_fields(draw: Random) -> bool:
    """Unknown fields that are many, deep, long or endless; anything but a refusal within a second counts."""
    fields = draw.choice((
        {f"f{index}": index for index in range(draw.randrange(33, 200))},
        {"f": json.loads("[" * 60 + "]" * 60)},
        {"f": 10 ** draw.randrange(20, 3000)}, {"shard": "x", "peer_id": 7, "addresses": 7}, {"key": 1, "digest": 2, "kind": "x"},
    ))  # fmt: skip
    began = time.process_time()
    found = opened(sealed(examples.all_records()[1], fields))
    return found is not None or time.process_time() - began > 1


@cache
def crowd() -> tuple[Identity, ...]:
    return tuple(Identity.derived(f"made up {number}") for number in range(MADE_UP_NODES))


def made_up_nodes(draw: Random) -> bool:
    """8,192 made-up nodes beside one with accepted work: the status grows too large for its readers, or hides the worker."""
    sample, run = examples.all_records()[0], examples.run_state()
    assert isinstance(sample, r.NodeRecord)
    words = sample.hardware.model_copy(update={"device": "x" * 64})
    nodes = [
        Sighting(sample.model_copy(update={"owner": peer.public_key, "hardware": words}), examples.NOW + 5, draw.random())
        for peer in crowd()
    ]
    nodes.insert(draw.randrange(len(nodes)), Sighting(sample, examples.NOW + 5, examples.NOW))
    document = status(run, examples.manifest(), LiveView(nodes), examples.NOW)
    return len(canonical(document)) > MAX_STATUS_BYTES or sample.owner not in {node.owner for node in document.nodes}


def costly_expert(draw: Random) -> bool:
    """A manifest's expert with a size of zero or far beyond any: looking at it raises another error, or takes five seconds."""
    from lutetia.models.experts.families import check_fits

    name = draw.choice(list(SIZES))
    began = time.process_time()
    try:
        check_fits(ExpertSpec(config={**examples.WAN, name: draw.choice(SIZES[name])}), examples.LATENT)
    except (ConfigError, ValueError):  # pydantic's refusal of the document is a ValueError
        return time.process_time() - began > MOST_SECONDS
    return True


def honest_record(draw: Random) -> bool:
    """Whether an honest record is refused or read otherwise than written, half of them with a field of a later version."""
    device = draw.choice(DEVICES)
    later = draw.choice(({}, {"mood": {"level": draw.random(), "since": draw.randrange(2**53)}}))
    hardware = {"device": device, "name": device, "memory_bytes": draw.randrange(1 << 40), "cores": draw.randrange(1, 257)}
    fields = {"hardware": hardware, "samples_per_second": draw.random() * 1e4, "software": "0.1.0", **later}
    found = opened(sealed(examples.all_records()[0], fields))
    return found is None or {**found.model_dump(mode="json"), **fields} != found.model_dump(mode="json")


def honest_expert(draw: Random) -> bool:
    """Whether the configuration of a real expert is refused before its network is built."""
    from lutetia.models.experts.config_bounds import check_config

    layers, heads, width = draw.choice(((30, 12, 128), (40, 40, 128), (60, 24, 128), (28, 32, 64), (42, 48, 64)))
    config = {**examples.WAN, "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width, "ffn_dim": 13824}
    try:
        check_config(ExpertSpec(config=config))
    except ConfigError:
        return True
    return False


ATTACKS: dict[str, Callable[[Random], bool]] = {
    "absurd number": absurd_number, "hostile words": hostile_words, "unknown fields": unknown_fields,
    "made-up nodes": made_up_nodes, "costly expert": costly_expert,
}  # fmt: skip
HONEST: dict[str, Callable[[Random], bool]] = {"record": honest_record, "expert": honest_expert}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks document-attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=20, help="tries of each attack; default 20")
    parser.add_argument("--honest", type=int, default=200, help="honest documents of each kind; default 200")
    given = parser.parse_args(arguments)
    print(f"{Machine.this()}\n\n| attack | succeeded | seconds a try |\n|---|---|---|")
    for name, attack in {**ATTACKS, **{f"honest {name}, refused": check for name, check in HONEST.items()}}.items():
        tries, began = given.honest if name.startswith("honest") else given.tries, time.monotonic()
        found = sum(attack(Random(seed)) for seed in range(tries))
        print(f"| {name} | {found} of {tries} | {(time.monotonic() - began) / tries:.2f} |", flush=True)
