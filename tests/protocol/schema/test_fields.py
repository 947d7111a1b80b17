"""Words, sentences and reported numbers: made to fit where they are made and where they are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema import records as r
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.fields import LONGEST_SENTENCE, sentence, word
from lutetia.protocol.schema.status import RefusalStatus, ShardStatus
from tests.protocol.example_documents import NOW, records
from tests.protocol.schema.test_unknown_fields import opened, sealed_with

REFUSAL: dict[str, Any] = {
    "time": NOW, "shard": 0, "epoch": 1, "owner": "a" * 64, "checkpoint": "b" * 64, "verdict": "invalid", "text": "worse",
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.20GHz", "Intel(R) Core(TM) i7-8700K CPU @ 3.20GHz"),
        ("AMD Radeon™ café", "AMD RadeonTM cafe"),
        ("[/x][red]", "?/x??red?"),
        ("<b>&\"'`$\\", "?b???????"),
        ("\x1b]0;title\x07\u202e\n", "??0;title???"),
        ("显卡", "??"),
        ("x" * 90, "x" * 64),
    ],
)
def test_a_word_is_inert(said: str, shown: str) -> None:
    assert word(said) == shown
    assert r.Hardware(device=said, memory_bytes=1, cores=1).device == shown


@given(st.text())
def test_any_text_becomes_a_word_and_a_sentence_once(text: str) -> None:
    assert word(word(text)) == word(text)
    assert sentence(sentence(text)) == sentence(text)
    assert sentence(text).isprintable()


def test_words_of_older_peers_break_no_signature() -> None:
    """They are verified as they were sent, and kept as they are shown."""
    record = records()["node"]
    found = opened(sealed_with(record, {"device": "[/x]\x1b[2J"}, "hardware"), record)
    assert isinstance(found, r.NodeRecord)
    assert found.hardware.device == "?/x???2J"


def test_absurd_reports_of_older_ledgers_are_cut() -> None:
    sound = json.loads(canonical(records()["checkpoint"]))
    sound["loss"] = 1e300
    sound["made"]["micro_batch"] = 10**300
    found = r.CheckpointRecord.model_validate_json(json.dumps(sound))
    assert (found.loss, found.made.micro_batch) == (1e39, 1 << 20)
    with pytest.raises(ValidationError):
        r.CheckpointRecord.model_validate_json(json.dumps({**sound, "epoch": 10**300}))


@given(st.text(min_size=LONGEST_SENTENCE, max_size=3 * LONGEST_SENTENCE))
def test_no_reply_fails_its_own_schema(text: str) -> None:
    reply = OfferReply(verdict="invalid", check="lineage", text=text)
    assert OfferReply.model_validate_json(canonical(reply), strict=True) == reply
    assert len(reply.text) <= LONGEST_SENTENCE


def test_a_refusal_is_read_under_its_old_and_its_new_name() -> None:
    """Before release 0.1 the check of a refusal was called `rung`; readers of that time require it."""
    old = RefusalStatus.model_validate_json(canonical({**REFUSAL, "rung": "holdout"}))
    new = RefusalStatus.model_validate_json(canonical({**REFUSAL, "check": "holdout"}))
    assert old == new
    written = json.loads(canonical(new))
    assert (written["check"], written["rung"]) == ("holdout", "holdout")
    assert RefusalStatus.model_validate_json(canonical(new)) == new


def test_words_of_later_versions_are_read_as_they_are() -> None:
    assert RefusalStatus.model_validate({**REFUSAL, "check": "colour", "verdict": "postponed"}).check == "colour"
    assert OfferReply.model_validate({"verdict": "invalid", "check": "colour"}).check == "colour"
    shard = {"shard": 0, "name": "a", "epoch": 0, "epochs": 1, "samples": 0, "samples_budget": 1, "state": "dreaming"}
    assert ShardStatus.model_validate(shard).state == "dreaming"
    for odd in ("[/x]", "A", "", "x" * 40):
        with pytest.raises(ValidationError):
            ShardStatus.model_validate({**shard, "state": odd})
