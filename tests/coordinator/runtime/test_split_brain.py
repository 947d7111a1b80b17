"""Whose word is it, signed by our own key? A coordinator stops when its ledger does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lutetia.coordinator.ledger.events import CheckpointAccepted
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.runtime.split_brain import refuse_split_brain
from lutetia.protocol.dht_records import publish
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.protocol.transport.memory import MemoryNetwork
from lutetia.protocol.transport.virtual_time import run_virtual
from lutetia.system.errors import IdentityError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, first_event, make_manifest, make_record

MANIFEST = make_manifest(epochs=3)


def anything(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


def acceptance(epoch: int, parent: str | None, text: str = "", by: Identity = COORDINATOR) -> AcceptanceRecord:
    record = make_record(MANIFEST, PEERS[0], epoch=epoch, parent=parent, text=text)
    return AcceptanceRecord(
        run=record.run, owner=by.public_key, issued=START, shard=0, epoch=epoch, checkpoint=record.digest, parent=parent,
        weights=record.weights, state=record.state, samples=record.samples, author=record.owner, tenure_until=START,
        holdout_loss=0.5,
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path):
    """It has accepted two epochs of shard 0."""
    ledger = Ledger.create(tmp_path / "ledger.sqlite", first_event(MANIFEST))  # pyright: ignore[reportArgumentType]
    first = acceptance(1, None)
    second = acceptance(2, first.checkpoint)
    ledger.append([CheckpointAccepted(time=START, acceptance=given, parent_loss=0.6) for given in (first, second)])
    yield ledger
    ledger.close()


def heard(ledger: Ledger, word: AcceptanceRecord, by: Identity) -> Callable[[], None]:
    """Look for a rival in a swarm that holds `word`."""

    async def scenario() -> None:
        network = MemoryNetwork(seed=1)
        other, ours = (network.peer(Identity.derived(name), anything) for name in ("other", "ours"))
        assert await publish(other, by, word, 600)
        await refuse_split_brain(ours, ledger, COORDINATOR.public_key)

    return lambda: run_virtual(scenario)


def test_what_the_ledger_has_accepted_is_no_rivals_word(ledger: Ledger) -> None:
    heard(ledger, acceptance(1, None), COORDINATOR)()
    heard(ledger, acceptance(2, acceptance(1, None).checkpoint), COORDINATOR)()


@pytest.mark.parametrize(("epoch", "text"), [(2, "another result"), (3, "")], ids=["a second word", "a later word"])
def test_what_it_does_not_know_stops_it(ledger: Ledger, epoch: int, text: str) -> None:
    with pytest.raises(IdentityError, match="does not know: another coordinator is at work, or this folder is an old copy"):
        heard(ledger, acceptance(epoch, "ab" * 32, text), COORDINATOR)()


def test_the_word_of_another_coordinator_of_the_manifest_is_its_own(ledger: Ledger) -> None:
    colleague = Identity.derived("colleague")
    heard(ledger, acceptance(3, "ab" * 32, by=colleague), colleague)()


def test_nobody_to_ask_is_no_rival(ledger: Ledger) -> None:
    async def scenario() -> None:
        ours = MemoryNetwork(seed=1).peer(COORDINATOR, anything)
        await refuse_split_brain(ours, ledger, COORDINATOR.public_key)
        await ours.close()
        await refuse_split_brain(ours, ledger, COORDINATOR.public_key)

    run_virtual(scenario)
