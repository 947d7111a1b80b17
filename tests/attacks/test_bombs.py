"""Small documents that unpack to large ones: what they cost in memory and CPU time, in a process of their own.

The error texts are tested in tests/fuzz, safetensors headers in tests/coordinator/worker/test_process.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MIB, MOST_SECONDS = 200, 10.0
CODE = r"""
import base64, json, resource, time, zlib
from benchmarks.fuzz import examples
from benchmarks.fuzz.targets import target
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES
from lutetia.protocol.schema.ticket import MAX_TICKET_CHARACTERS, PREFIX

def ticket(content):
    body = zlib.compress(content, 9)
    word = PREFIX + base64.b32encode(body + zlib.crc32(body).to_bytes(4, "big")).decode().lower().rstrip("=")
    assert len(word) <= MAX_TICKET_CHARACTERS, len(word)
    return word.encode()

whole = examples.signed_manifest()
inside = whole.index(b'"config":{') + len(b'"config":{')
def manifest(config):
    return whole[:inside] + config[: MAX_MANIFEST_BYTES - len(whole)] + whole[inside:]

bombs = [
    ("ticket", ticket(bytes(4 << 20))),
    ("ticket", ticket(b'{"addresses":[' + b'"",' * 900_000)),
    ("ticket", ticket(b"[" * 4_000_000)),
    ("manifest", manifest(b'"a":' + b"[" * 1_000_000)),
    ("manifest", manifest(b'"a":[' + b"[]," * 330_000 + b"0],")),
    ("manifest", manifest(b"".join(b'"k%d":{},' % n for n in range(80_000)))),
    ("manifest", manifest(b'"a":' + b"9" * 1_000_000)),
    ("manifest", manifest(b'"a":[' + b"9" * 4000 + b"," + b"1e9999," * 100_000 + b"0],")),
    ("record", b'{"record":' * 800),
    ("mixture", b'{"mixture":{"files":{' + b'"a":{},' * 500_000),
    ("control-answer", b'{"ok":true,"answer":{"a":' + b"[" * 500_000),
    ("status", b'{"shards":[' + b"{}," * 1_300_000),
]
for name, seeds in (("ticket", 1), ("manifest", 1), ("mixture", 1)):
    target(name).hold(target(name).seeds()[0])
before, report = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for name, data in bombs:
    begun = time.process_time()
    outcome = target(name).hold(data)
    report.append([name, len(data), outcome, time.process_time() - begun])
print(json.dumps({"kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "bombs": report}))
"""


def test_compressed_bombs_are_refused() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["kib"] < MOST_MIB * 1024, found
    assert sum(seconds for *_, seconds in found["bombs"]) < MOST_SECONDS, found
    assert {outcome for _, _, outcome, _ in found["bombs"]} == {"refused"}, found
