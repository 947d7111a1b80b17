"""Authors of merged lanes count as authors of accepted work."""

from dataclasses import replace

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import is_known
from lutetia.coordinator.acceptance.messages import CheckDone
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.protocol.claims import trained
from lutetia.protocol.schema.fields import MOST_LANES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AUTHOR_MARK, MAX_RECORD_BYTES, MOST_AUTHORS, MOST_MORE_AUTHORS, seal
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, make_record
from tests.coordinator.acceptance.lanes.lanes_driver import LanesDriver


def test_acceptance_of_a_merge_names_the_authors_of_its_lanes() -> None:
    driver = LanesDriver()
    for lane in (3, 0, 2):
        driver.result(lane, peer=lane)
    driver.merged()
    accepted = driver.shard.acceptance
    assert accepted
    assert accepted.authors == tuple(PEERS[lane].public_key for lane in (0, 2, 3))
    run = driver.judge.state.run
    assert all(run.has_accepted_work(author) and is_known(run, author) for author in accepted.authors)
    assert not run.has_accepted_work(PEERS[1].public_key)
    assert all(run.pace(author, 0) is not None for author in accepted.authors)
    full = {"authors": (PEERS[0].public_key,) * MOST_AUTHORS, "more_authors": "f" * AUTHOR_MARK * MOST_MORE_AUTHORS}
    numbers = {"epoch": 10**9, "samples": 10**15, "holdout_loss": -1.2345678901234567e-300, "term": 10**9, "parent": "f" * 64}
    large = BlobRef(digest="f" * 64, size=1 << 40)
    most = accepted.model_copy(update={"lanes": tuple(range(MOST_LANES)), **full, **numbers, "weights": large, "state": large})
    assert len(seal(most, COORDINATOR, START + 1e6)) <= MAX_RECORD_BYTES


def test_every_author_of_64_lanes_is_credited_shown_and_keeps_its_lane() -> None:
    driver = LanesDriver(lanes=64, quorum=1.0)
    peers = [Identity.derived(f"lane {lane}") for lane in range(64)]
    for lane, peer in enumerate(peers):
        record = make_record(driver.judge.manifest, peer, text=f"{lane}", lane=lane)
        driver.judge.offer(record)
        driver.judge.verdict(record, 0.4)
    run = driver.judge.state.run
    shown = status(run, driver.judge.manifest, LiveView(), driver.judge.now)
    assert [lane.owner for lane in shown.shards[0].lanes] == [peer.public_key for peer in peers]
    driver.merged()
    run, accepted = driver.judge.state.run, driver.shard.acceptance
    assert accepted
    assert accepted.lanes == tuple(range(64))
    assert all(trained(accepted, lane, peer.public_key) for lane, peer in enumerate(peers))
    assert not any(trained(accepted, lane, peers[lane - 1].public_key) for lane in range(64))
    assert all(run.credit[peer.public_key][0].standing and run.has_accepted_work(peer.public_key) for peer in peers)


def test_lane_that_exceeds_its_bound_is_accepted_at_once_after_a_proof_of_the_shard() -> None:
    driver = LanesDriver()
    for lane in range(3):
        driver.result(lane)
    driver.merged()
    before = driver.judge.state.run
    link = driver.shard.lineage[-1]
    proved = replace(link, sources=tuple(replace(source, proved=source.lane == 2) for source in link.sources))
    peers = before.peers.set(PEERS[0].public_key, before.peer(PEERS[0].public_key).updated(audited=1))
    shards = before.shards.set(0, driver.shard.updated(lineage=(proved,)))
    driver.with_run(peers=peers, shards=shards)
    record = make_record(driver.judge.manifest, PEERS[0], 0, 2, driver.shard.accepted, text="0", lane=0)
    assert driver.judge.offer(record).verdict == "queued"
    failed = Verdict("invalid", "holdout", "its held-out loss 0.45 is above 0.41", 0.45, 0.4, over=0.1)
    driver.judge.send(CheckDone(record, failed, driver.judge.now))
    assert driver.shard.gathered[0].acceptance.checkpoint == record.digest
    assert driver.shard.gathered[0].proved
