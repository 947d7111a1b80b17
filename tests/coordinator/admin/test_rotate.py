"""A new key for the coordinator: a rotation that is interrupted is finished or undone, and the old key no longer counts.

`test_upgrade_live` has a real node that continues under the new key.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lutetia.coordinator.admin.create import CreatedRun
from lutetia.coordinator.admin.rotate import rotate_run, settle_rotation
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.signed_head import read_head
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.mixing.description import verify_mixture
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord, RecordRefused, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import AuthorisationError, ConfigError, IdentityError
from tests.coordinator.admin.test_backup import advance
from tests.coordinator.test_serve import make_run


def check_signatures(run: CreatedRun, old: Identity, ticket: str) -> None:
    """Everything is signed by the new key, and what the old key signs is refused."""
    folder = RunFolder(run.folder)
    manifest = folder.read_manifest(time.time()).manifest
    fresh = Identity.load(folder.coordinator_key)
    assert manifest.coordinators == (fresh.public_key,)
    assert Ticket.decode(ticket).addresses[0].endswith(f"/p2p/{fresh.peer_id}")
    verify_mixture(folder.mixture, manifest.coordinators)
    head = read_head(folder.head)
    assert head
    assert head.holds(run.run, manifest.coordinators)
    ledger = Ledger.open(folder.ledger, run.run)
    ledger.close()
    accepted = ledger.state.shards[0].acceptance
    assert accepted
    now = time.time()
    check = record_check(manifest, time.time)
    for signer, refused in ((old, True), (fresh, False)):
        record = AcceptanceRecord.model_validate({**accepted.model_dump(), "owner": signer.public_key, "issued": now, "epoch": 9})
        data = seal(record, signer, now + 600)
        if refused:
            with pytest.raises(RecordRefused, match="not a coordinator of this run"):
                check(record.key(), signer.public_key, data, now + 600)
        else:
            assert check(record.key(), signer.public_key, data, now + 600) == record.key()


def test_interrupted_rotation_is_finished_or_undone(tmp_path: Path):
    """The old key stays until the owner's signature is on disk; then the new key is used, at the latest after a restart."""
    run = make_run(tmp_path, shards=1)
    advance(run)
    folder = RunFolder(run.folder)
    old = Identity.load(folder.coordinator_key)
    Identity.generate().save(folder.next_key)
    settle_rotation(folder)
    assert not folder.next_key.exists(), "the owner had not signed it"
    assert Identity.load(folder.coordinator_key) == old
    done = rotate_run(folder)
    fresh = Identity.load(folder.coordinator_key)
    assert (fresh.public_key, done.manifest.version) == (done.new, 2)
    fresh.save(folder.next_key)  # as after a crash right before the key was replaced
    old.save(folder.coordinator_key)
    settle_rotation(folder)
    assert Identity.load(folder.coordinator_key) == fresh
    assert Ticket.decode(folder.ticket.read_text()).addresses[0].endswith(fresh.peer_id)
    head = read_head(folder.head)
    assert head
    assert head.holds(run.run, done.manifest.coordinators)
    assert rotate_run(folder).manifest.version == 3


def test_rotation_by_another_key_is_refused(tmp_path: Path):
    run = make_run(tmp_path, shards=1)
    folder = RunFolder(run.folder)
    before, key = folder.manifest.read_bytes(), folder.coordinator_key.read_bytes()
    Identity.derived("mallory").save(tmp_path / "mallory.key")
    with pytest.raises(AuthorisationError, match="another owner"):
        rotate_run(folder, tmp_path / "mallory.key")
    settle_rotation(folder)
    assert (folder.manifest.read_bytes(), folder.coordinator_key.read_bytes()) == (before, key)
    folder.owner_key.rename(tmp_path / "offline.key")
    with pytest.raises(IdentityError):
        rotate_run(folder)
    assert rotate_run(folder, tmp_path / "offline.key").manifest.version == 2


def test_rotation_without_a_run_makes_nothing(tmp_path: Path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no run"):
            rotate_run(RunFolder(place))
    assert not list(tmp_path.iterdir())
