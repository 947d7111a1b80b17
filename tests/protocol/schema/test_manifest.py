from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import MAX_MANIFEST_BYTES, Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.system.errors import AuthorisationError, ConfigError, LutetiaError
from tests.protocol.example_documents import NOW, OWNER, STRANGER, manifest

SIGNED = SignedManifest.sign(manifest(), OWNER)


def changed(**fields: Any) -> bytes:
    """The signed bytes with fields of the manifest overwritten, its signature kept."""
    document = json.loads(SIGNED.to_bytes())
    document["manifest"].update(fields)
    return json.dumps(document).encode()


def test_round_trip_keeps_the_run_id() -> None:
    opened = open_manifest(SIGNED.to_bytes(), now=NOW, run=SIGNED.manifest.run_id, owner=OWNER.public_key)
    assert opened == SIGNED


def test_a_later_version_keeps_the_run_id_of_the_first() -> None:
    first = SIGNED.manifest
    second = first.model_copy(update={"version": 2, "run": first.run_id, "expires": NOW + 7200})
    opened = open_manifest(SignedManifest.sign(Manifest(**second.model_dump()), OWNER).to_bytes(), now=NOW, run=first.run_id)
    assert opened.manifest.run_id == first.run_id


@pytest.mark.parametrize(
    ("data", "pins", "error", "says"),
    [
        (b"not json", {}, ConfigError, "malformed"),
        (b" " * (MAX_MANIFEST_BYTES + 1), {}, ConfigError, "larger"),
        (changed(name="another"), {}, AuthorisationError, "signature"),
        (changed(surprise=1), {}, AuthorisationError, "signature"),
        (changed(expires=float("1e999")), {}, ConfigError, "malformed"),
        (SIGNED.to_bytes(), {"run": "c" * 64}, ConfigError, "is of run"),
        (SIGNED.to_bytes(), {"owner": STRANGER.public_key}, AuthorisationError, "ticket pins"),
        (SIGNED.to_bytes(), {"at_least_version": 2}, ConfigError, "older"),
        (SIGNED.to_bytes(), {"now": NOW + 3600}, ConfigError, "expired"),
    ],
)
def test_an_invalid_manifest_is_refused_with_its_reason(
    data: bytes, pins: dict[str, Any], error: type[LutetiaError], says: str
) -> None:
    with pytest.raises(error, match=says):
        open_manifest(data, **{"now": NOW, **pins})


def test_another_key_cannot_sign_in_the_owners_name() -> None:
    with pytest.raises(AuthorisationError, match="owner"):
        SignedManifest.sign(manifest(), STRANGER)
    forged = SignedManifest(manifest=manifest(), signature=STRANGER.sign(canonical(manifest())))
    with pytest.raises(AuthorisationError, match="signature"):
        open_manifest(forged.to_bytes(), now=NOW)


def test_a_run_that_needs_what_this_version_lacks_is_refused() -> None:
    able, unable = (manifest(needs=needs) for needs in (("unknown-fields",), ("unknown-fields", "time-travel")))
    assert open_manifest(SignedManifest.sign(able, OWNER).to_bytes(), now=NOW).manifest.needs == ("unknown-fields",)
    with pytest.raises(ConfigError, match="the run needs time-travel, which this version of lutetia cannot do; install a newer"):
        open_manifest(SignedManifest.sign(unable, OWNER).to_bytes(), now=NOW)


def reshaped(**changes: Any) -> tuple[Any, ...]:
    return tuple(shard.model_copy(update=changes) for shard in manifest().shards)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shards": reshaped(clips=3)}, "fewer than a batch"),
        ({"shards": reshaped(index=1)}, "numbered"),
        ({"shards": reshaped(prior=0.4)}, "add up to 1"),
        ({"optimisation": Optimisation(batch=3)}, "divide"),
        ({"expires": NOW - 1}, "expires"),
        ({"version": 2}, "run id"),
        ({"unknown": [[[[[1]]]]]}, "nested"),
    ],
)
def test_an_inconsistent_manifest_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        manifest(**changes)
