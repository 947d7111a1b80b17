"""Names sent by peers become paths only for the files of a mixture.

Listings of clips that lead outside their folder: tests/models/data. Blob names that are not hex:
tests/coordinator/web/test_app.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.fuzz import examples
from lutetia.cli.fetch_mixture import read_description
from lutetia.models.data.description import DataFile
from lutetia.models.mixing.description import SignedMixture, signed_document
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import ShardSpec
from lutetia.system.errors import AuthorisationError, IntegrityError

TRICKS = [
    "../x", "/etc/passwd", "a/../../b", "a/..", "..", ".", "", "a//b", "a/", "/", "~/x", "a\\..\\b", "C:\\x", "C:x", "a\0b",
    "a\nb", ".hidden", "a/.ssh/x", "a/b/c/d/e", "\u2024\u2024/x", "\uff0e\uff0e/x", "a\u2215..\u2215b", "e\u0301", "\u202ex",
    "a b", "a%2e%2e", "$HOME", "`id`", "-rf", "a" * 5000 + "/../x",
]  # fmt: skip


def described(name: str) -> bytes:
    document = json.loads(examples.signed_mixture())
    document["mixture"]["files"] = {name: document["mixture"]["files"]["model_index.json"]}
    return json.dumps(document).encode()


@pytest.mark.parametrize("name", TRICKS)
def test_a_hostile_file_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(IntegrityError, match="refused|malformed"):
        read_description(described(name))


@given(st.text(max_size=30) | st.text("./\\a~-_ %\0", max_size=12))
def test_an_accepted_name_lies_below_its_folder(name: str) -> None:
    try:
        (passed,) = read_description(described(name)).mixture.files
    except IntegrityError:
        return
    folder = Path("/somewhere/mixture")
    path = folder / passed
    assert path.is_relative_to(folder)
    assert ".." not in path.parts
    assert path.as_posix().isascii()


def test_files_without_a_coordinators_signature_are_not_fetched() -> None:
    """A forged description could name a terabyte, so its signature is checked before the first byte is fetched."""
    signed = read_description(examples.signed_mixture())
    assert signed_document(signed, [examples.COORDINATOR.public_key], "x") == signed.mixture
    stranger = Identity.derived("stranger")
    forged = SignedMixture.sign(signed.mixture, stranger.sign)
    for other in (forged, signed.model_copy(update={"signature": None})):
        with pytest.raises(AuthorisationError, match="not signed"):
            signed_document(other, [examples.COORDINATOR.public_key], "x")


@pytest.mark.parametrize("name", TRICKS)
def test_hostile_names_in_built_data_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        DataFile(path=name, blob=examples.blob(), clips=1, bytes=1)
    if "/" in name or "\\" in name or not name.isprintable():
        with pytest.raises(ValidationError):
            ShardSpec(index=0, name=name, train=examples.blob(), holdout=examples.blob(), clips=1, holdout_clips=1, prior=1.0)
