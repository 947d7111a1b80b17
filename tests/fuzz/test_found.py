"""What fuzzing has found so far, each as it was found: once an exception that no contract names, or a sentence that was none."""

from __future__ import annotations

import json
import math
import struct

import pytest

from benchmarks.fuzz import examples
from benchmarks.fuzz.targets import target
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import RecordLimits, RecordRefused, open_record

NINES = b"9" * 5000


@pytest.mark.parametrize(
    ("name", "data", "outcome"),
    [
        ("worker-settings", b'disk_limit = "' + NINES + b' GB"', "refused"),  # OverflowError
        ("worker-settings", b"a = " + b"[" * 20_000, "refused"),  # RecursionError
        ("worker-settings", b"micro_batch = " + NINES, "refused"),  # ValueError: too many digits
        ("worker-settings", b'state_folder = "~nobody-here/x"', "refused"),  # RuntimeError: no such home
        ("run-settings", b"a = " + b"[" * 20_000, "refused"),
        ("run-settings", b'"\\u001b[2J" = 1', "refused"),  # a key that clears the reader's terminal
        ("run-settings", b'"a\\nb" = 1', "refused"),
        ("manifest", b'{"\\u0000":1}', "refused"),
        ("mixture", b'{"\\u202ea":1}', "refused"),
        ("record", b'{"record":{"kind":"\\u001b]0;x\\u0007"}}', "refused"),
        ("control-answer", b'{"ok":false,"error":{"code":2,"message":"\\u0000"}}', "refused"),
        ("control-answer", b"[" * 60_000, "refused"),  # RecursionError
        ("events", canonical(examples.all_events()[0]).replace(b'"shards":2', b'"shards":2000000000'), "refused"),  # for ever
        ("control-answer", b"{}", "refused"),  # KeyError
        ("control-answer", b'{"ok":false,"error":{"code":2,"message":""}}', "refused"),  # an error without words
        ("listing-jsonl", b'{"file_name":"a.mp4","caption":"\\ud800"}', "taken"),  # listed as bad; once UnicodeEncodeError later
        ("listing-jsonl", b'{"file_name":"a.mp4","caption":"x","kind":"\\ud800"}', "taken"),
        ("listing-jsonl", b'{"file_name":"\\u0000\\u001b.mp4","caption":"x"}', "taken"),
        ("listing-jsonl", b'{"file_name":"%s.mp4","caption":"x"}' % (b"9" * 300), "taken"),  # OSError: file name too long
    ],
)
def test_it_is_refused_in_a_plain_sentence_now(name: str, data: bytes, outcome: str) -> None:
    assert target(name).hold(data) == outcome


@pytest.mark.parametrize("expires", [math.nan, math.inf, -math.inf])
def test_a_record_must_say_when_it_expires(expires: float) -> None:
    """The DHT's own field, outside what is signed: NaN passed every comparison and broke the signature's canonical bytes."""
    record = examples.all_records()[1]
    with pytest.raises(RecordRefused):
        open_record(
            examples.sealed(record), key=None, subkey=record.owner, expires=expires, now=examples.NOW, limits=RecordLimits(2.0)
        )


def with_document(data: bytes, document: str) -> bytes:
    """The safetensors file `data` with another document in its metadata."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["lutetia"] = document
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data[8 + length :]


@pytest.mark.parametrize(
    "document", ["[" * 100_000, '{"samples":1e999,"shard":1,"epoch":1,"step":0,"micro_batch":1}', "9" * 5000]
)
def test_a_hostile_place_in_a_training_state(document: str) -> None:
    """RecursionError and OverflowError ended the worker process, and the trainer of the node that continued from it."""
    from benchmarks.fuzz.tensors import state_file

    assert target("state").hold(with_document(state_file(), document)) == "refused"


@pytest.mark.parametrize("document", ["[" * 100_000, "9" * 5000, '{"captions":["\\ud800"]}'])
def test_hostile_metadata_of_a_shard(document: str) -> None:
    from benchmarks.fuzz.tensors import shard_file

    assert target("shard").hold(with_document(shard_file(), document)) == "refused"


def test_a_ledger_whose_damage_is_no_text() -> None:
    """SQLite quoted the damaged bytes, and Python could not read them: UnicodeDecodeError."""
    data = bytearray(target("ledger").seeds()[0])
    place = data.index(b"CREATE TABLE events")
    data[place : place + 6] = b"\xff\xfe\x01\x00\xff\xff"
    assert target("ledger").hold(bytes(data)) == "refused"


def test_a_ledger_with_a_row_that_claims_to_be_longer_than_any_may_be() -> None:
    """SQLite: `string or blob too big`, which is no operational error."""
    data = bytearray(target("ledger").seeds()[0])
    (cell,) = struct.unpack(">H", data[108:110])  # the first of the root page: lengths of row and header, then of each column
    data[cell : cell + 12] = bytes.fromhex("8bc2ddde24 e36f 70 d0a5f4a3")
    assert target("ledger").hold(bytes(data)) == "refused"
