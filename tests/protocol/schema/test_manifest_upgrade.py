"""Which later versions of a manifest are allowed, and with what reason others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.manifest import Manifest, SignedManifest, open_manifest
from lutetia.protocol.schema.manifest_upgrade import CHANGEABLE, UpgradeRefused, check_upgrade, next_version, training_changed
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.system.errors import AuthorisationError, ConfigError
from tests.protocol.example_documents import NOW, OWNER, manifest

FIRST = manifest()
LATER = NOW + 50
CHANGES = {
    "samples_per_shard": 2 * FIRST.samples_per_shard,
    "holdout_tolerance": 0.5,
    "raw_tolerance": 0.75,
    "timing.heartbeat": 7.5,
    "audit.streak": 3,
    "sampling.prompts": ["a green square"],
    "hardware.memory_bytes": 1 << 30,
    "allowlist": ["ab" * 32],
    "coordinators": ["cd" * 32],
    "expires": NOW + 1e7,
    "needs": ["unknown-fields"],
    "card.license": "apache-2.0",
    "orders.hidden_names": ["ef" * 32],
}
"""One change of every changeable field."""


def test_every_changeable_field_has_an_example():
    assert {name.partition(".")[0] for name in CHANGES} | {"team"} == CHANGEABLE


@given(st.sets(st.sampled_from(sorted(CHANGES)), min_size=1))
def test_a_changeable_field_changes_alone(names: set[str]):
    new = next_version(FIRST, {name: CHANGES[name] for name in names}, LATER)
    assert (new.version, new.run_id, new.epochs) == (
        2,
        FIRST.run_id,
        FIRST.epochs * (2 if "samples_per_shard" in names else 1),
    )
    changed = {name for name in Manifest.model_fields if getattr(new, name) != getattr(FIRST, name)}
    assert changed - {"run", "version"} == {name.partition(".")[0] for name in names}
    check_upgrade(FIRST, open_manifest(SignedManifest.sign(new, OWNER).to_bytes(), now=LATER).manifest)


@pytest.mark.parametrize("field", sorted(Manifest.model_fields.keys() - CHANGEABLE - {"run", "version"}))
def test_a_field_of_the_lineage_cannot_change(field: str):
    with pytest.raises(UpgradeRefused, match=f"^{field} cannot change") as caught:
        next_version(FIRST, {field: "anything"}, LATER)
    assert (caught.value.reason, caught.value.field, caught.value.code) == ("lineage", field, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lanes", 4), ("shares", [0.5]), ("inner_rate", 2.0), ("outer_rate", 0.5), ("quorum", 0.5), ("deadline", 60)],
)
def test_of_a_team_only_the_time_of_its_merges_changes(field: str, value: object):
    first = manifest(team=TeamSpec(lanes=3), needs=(LANES,))
    if field in ("quorum", "deadline"):
        team = next_version(first, {f"team.{field}": value}, LATER).team
        assert team
        assert getattr(team, field) == value
    else:
        with pytest.raises(UpgradeRefused, match=rf"^team\.{field} cannot change"):
            next_version(first, {f"team.{field}": value}, LATER)
    with pytest.raises(UpgradeRefused, match="^team cannot change"):
        next_version(first, {"team": None}, LATER)
    with pytest.raises(UpgradeRefused, match="^team cannot change"):
        next_version(FIRST, {"team": {"lanes": 2}, "needs": [LANES]}, LATER)


def test_a_signed_version_that_breaks_the_lineage_is_refused(tmp_path: Path):
    """The owner's signature alone is not enough: a peer refuses a version that breaks the lineage of its work."""
    broken = FIRST.model_copy(update={"run": FIRST.run_id, "version": 2, "checkpoint_samples": FIRST.samples_per_shard})
    live = LiveManifest(SignedManifest.sign(FIRST, OWNER), tmp_path / "manifest.json")
    with pytest.raises(UpgradeRefused, match="checkpoint_samples cannot change"):
        live.adopt(SignedManifest.sign(broken, OWNER).to_bytes(), LATER)
    assert live.version == 1
    assert not (tmp_path / "manifest.json").exists()


def test_an_invalid_value_is_refused_by_its_field():
    for changes, words in (
        ({"samples_per_shard": FIRST.samples_per_shard + 1}, "must divide"),
        ({"timing.heartbeat": -1}, "timing.heartbeat"),
        ({"timing.hartbeat": 1}, "has no 'hartbeat'"),
        ({"budget": 3}, "no 'budget'"),
        ({"valid_days": 0}, "above 0"),
        ({"samples_per_shard": "many"}, "samples_per_shard"),
    ):
        with pytest.raises(UpgradeRefused, match=words) as caught:
            next_version(FIRST, changes, LATER)
        assert caught.value.reason == "value"


def test_a_budget_below_the_accepted_samples_is_refused():
    bigger = next_version(FIRST, {"samples_per_shard": 4 * FIRST.checkpoint_samples}, LATER)
    assert next_version(bigger, {"samples_per_shard": 3 * FIRST.checkpoint_samples}, LATER, accepted_epochs=3).epochs == 3
    with pytest.raises(UpgradeRefused, match="samples accepted already") as caught:
        next_version(bigger, {"samples_per_shard": 3 * FIRST.checkpoint_samples}, LATER, accepted_epochs=4)
    assert caught.value.reason == "budget"


def test_a_live_manifest_moves_forward_and_is_saved_first(tmp_path: Path):
    path = tmp_path / "manifest.json"
    second = next_version(FIRST, {"holdout_tolerance": 0.5}, LATER)
    third = next_version(second, {"holdout_tolerance": 0.6}, LATER)
    versions = {m.version: SignedManifest.sign(m, OWNER).to_bytes() for m in (FIRST, second, third)}
    live = LiveManifest(SignedManifest.sign(FIRST, OWNER), path)
    assert not live.adopt(versions[1], LATER)
    assert live.adopt(versions[3], LATER), "a peer that was offline may skip a version"
    assert path.read_bytes() == versions[3]
    for older in (1, 2):
        with pytest.raises(ConfigError, match="older than 3, seen before"):
            live.adopt(versions[older], LATER)
    forged = versions[3].replace(b'"holdout_tolerance":0.6', b'"holdout_tolerance":0.7')
    with pytest.raises(AuthorisationError):
        live.adopt(forged, LATER)
    assert (live.version, live().holdout_tolerance) == (3, 0.6)


def test_only_a_cosine_schedule_changes_the_training():
    longer = next_version(FIRST, {"samples_per_shard": 2 * FIRST.samples_per_shard}, LATER)
    assert training_changed(FIRST, longer) == (FIRST.optimisation.schedule == "cosine")
    constant = FIRST.optimisation.model_copy(update={"schedule": "constant"})
    flat = FIRST.model_copy(update={"optimisation": constant})
    assert not training_changed(flat, next_version(flat, {"samples_per_shard": 2 * flat.samples_per_shard}, LATER))
    assert not training_changed(FIRST, next_version(FIRST, {"timing.heartbeat": 3.0}, LATER))
