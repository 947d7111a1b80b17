"""A small run on disk for the tests of the web API: a real ledger that a real judge filled, with hostile texts in it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import JudgeTick, Merged, StartMerge
from lutetia.coordinator.galleries import LIST, REAL, keep_gallery
from lutetia.coordinator.ledger.events import Event, MixtureStitched, RouterTrained, RunCreated
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.answers import RequestLimit
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.web.listener import bind
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import CheckpointRecord, ClaimRecord, Hardware, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, JudgeDriver, blob, drive_judge, make_record

HOSTILE = "tensor <script>alert(1)</script> is not finite"
STEP = 600.0
"""Seconds between two results."""


@dataclass
class RecordedRun:
    """The run, what is shown of it, and a judge that can add to it."""

    source: RunSource
    driver: JudgeDriver
    written: int = 0

    def write(self, *more: Event) -> None:
        """Append what the judge decided since the last call, and `more`."""
        events = self.driver.events[self.written :]
        self.written = len(self.driver.events)
        self.source.ledger.append([*events, *more])
        self.source.notify()

    def accept(self, peer: int, shard: int = 0) -> CheckpointRecord:
        """That peer's result for the next epoch is accepted, some minutes later."""
        self.driver.now += STEP
        return self.driver.accept(PEERS[peer], shard)


def _empty_run(folder: Path, driver: JudgeDriver, online: int, lanes: Collection[int] = ()) -> RecordedRun:
    """A run of which nothing but its creation is in the ledger; the first `online` volunteers, or else peer 0, are online.

    `lanes`: of shard 0, at which the peer of the same number works.
    """
    root = RunFolder(folder)
    root.gallery.mkdir(parents=True)
    root.ticket.write_text("lutetia1" + "qpzry9x8gf2tvdw0s3jn54khce6mua7l" * 8 + "\n")
    created = driver.events[0]
    assert isinstance(created, RunCreated)
    ledger = Ledger.create(root.ledger, created)
    here = [Identity.derived(f"volunteer {index}") for index in range(online)] or PEERS[:1]

    def show() -> SwarmStatus:
        nodes = [
            NodeRecord(
                run=driver.manifest.run_id, owner=peer.public_key, issued=driver.now, peer_id=peer.peer_id,
                samples_per_second=3.0, software="0.1", state="training", name="Adas lab",
                hardware=Hardware(device="cpu", memory_bytes=1, cores=2),
            )
            for peer in here
        ]  # fmt: skip
        claims = [
            ClaimRecord(
                run=driver.manifest.run_id, owner=PEERS[lane].public_key, issued=driver.now, shard=0, lane=lane, epoch=0,
                samples=0, state="training",
            )
            for lane in lanes
        ]  # fmt: skip
        view = LiveView(
            [Sighting(node, driver.now + 9, driver.now) for node in nodes],
            [Sighting(claim, driver.now + 60, driver.now) for claim in claims], at_work={0: frozenset(lanes)} if lanes else None,
            merging=frozenset(source for merge in driver.state.merging.values() for source in merge.sources),
        )  # fmt: skip
        return status(ledger.state, driver.manifest, view, driver.now + 1, software="0.1")

    return RecordedRun(RunSource(root, ledger, lambda: driver.manifest, show), driver, written=1)


def record_run(folder: Path) -> RecordedRun:
    """Three accepted results of two peers in two shards, one of a third peer refused with a hostile text, a router, a gallery."""
    run = _empty_run(folder, drive_judge(epochs=9, name="recorded run"), 0)
    run.source.folder.ticket.write_text("lutetia1example\n")
    write_clips(run.source.folder.gallery, ["a <b>cat</b>"])
    first = run.accept(0)
    run.accept(1, shard=1)
    run.driver.refuse(make_record(run.driver.manifest, PEERS[2], epoch=2, parent=first.digest), HOSTILE)
    run.accept(1)
    by_time = (1.0, 0.8)
    run.write(
        RouterTrained(time=run.driver.now, epochs=(2, 1), router=blob("router"), accuracy=0.9, accuracy_by_time=by_time)
    )  # fmt: skip
    return run


def record_lane_run(folder: Path) -> RecordedRun:
    """A shard of four lanes, three of them claimed; an epoch was merged from two, and one result of the next is there."""
    team, unaudited = TeamSpec(lanes=4, quorum=0.5, deadline=900.0), AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.0)
    driver = drive_judge(shards=1, epochs=9, team=team, needs=(LANES,), audit=unaudited, name="A run with lanes")
    run = _empty_run(folder, driver, 0, lanes=range(3))
    accept_lane(run, 0)
    accept_lane(run, 1)
    [merge] = [action for action in driver.actions if isinstance(action, StartMerge)]
    sources = tuple(source.acceptance.checkpoint for source in merge.sources)
    made = make_record(driver.manifest, COORDINATOR, text="merged")
    driver.send(Merged(0, sources, made, Verdict("valid", "holdout", "", 0.39, 0.5), driver.now))
    driver.send(JudgeTick(driver.now, None, {0: frozenset(range(3))}))
    accept_lane(run, 0)
    run.write()
    return run


def accept_lane(run: RecordedRun, lane: int) -> None:
    """The result of that lane of shard 0 for the next epoch, by the peer of the same number, is accepted."""
    ledger = run.driver.state.run.shards[0]
    record = make_record(run.driver.manifest, PEERS[lane], 0, ledger.epoch + 1, ledger.accepted, text=f"{lane}", lane=lane)
    assert run.driver.offer(record).verdict == "queued"
    run.driver.verdict(record)


@asynccontextmanager
async def serving(run: RecordedRun, limit: RequestLimit | None = None, port: int = 0) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the real server that shows `run`; `limit`: of requests, None: the usual one."""
    listener = bind(f"127.0.0.1:{port}")
    app = build_app(run.source.status, BlobStore(run.source.folder.blobs), RateLimit(None), run.source, limit)
    task = asyncio.create_task(serve_http(listener, app))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        yield client
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def record_long_run(folder: Path, *, shards: int = 6, epochs: int = 12, peers: int = 40) -> RecordedRun:
    """A run whose shards are at unlike epochs, with refusals and a router; all `peers` are online."""
    run = _empty_run(folder, drive_judge(shards=shards, epochs=epochs, name="Moving things"), peers)
    driver, people = run.driver, [Identity.derived(f"volunteer {index}") for index in range(peers)]
    generator = random.Random(7)
    lost = {shard: 0.9 + 0.05 * shard for shard in range(shards)}
    for step in range(shards * epochs * 2 // 3):
        shard = min(range(shards), key=lambda index: (driver.state.run.shards[index].epoch + index // 2, generator.random()))
        driver.now += STEP * generator.uniform(0.2, 1.2)
        state = driver.state.run.shards[shard]
        if step % 11 == 10:
            refused = make_record(driver.manifest, people[step % peers], shard, state.epoch + 1, state.accepted, f"{step}")
            driver.refuse(refused, HOSTILE)
            continue
        record = make_record(driver.manifest, people[(3 * shard + step // 9) % peers], shard, state.epoch + 1, state.accepted)
        assert driver.offer(record).verdict == "queued"
        lost[shard] *= generator.uniform(0.9, 0.97)
        driver.verdict(record, lost[shard])
    bins = tuple(min(1.0, 0.99 - 0.05 * index) for index in range(10))
    epochs_now = tuple(driver.state.run.shards[shard].epoch for shard in range(shards))
    run.write(
        RouterTrained(time=driver.now, epochs=epochs_now, router=blob("router"), accuracy=0.87, accuracy_by_time=bins)
    )  # fmt: skip
    return run


def write_clips(folder: Path, prompts: Sequence[str], mixture: str = "", shade: int = 0, experts: int = 0) -> None:
    """Small GIFs that play, one per prompt, and their list; with `experts` those drew the steps, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for index, prompt in enumerate(prompts):
        frames = [
            Image.new("RGB", (48, 48), (40 * index % 255, 20 * frame, (200 - 20 * frame + shade) % 256)) for frame in range(6)
        ]
        frames[0].save(folder / f"{index:03d}.gif", save_all=True, append_images=frames[1:], duration=120, loop=0)
        drawn = [[[(step // 2 + index) % experts, 1.0]] for step in range(8)] if experts else []
        clips.append({"prompt": prompt, "file": f"{index:03d}.gif", "seed": index, "experts": drawn})
    (folder / "gallery.json").write_text(json.dumps({"mixture": mixture, "clips": clips}))


def write_galleries(run: RecordedRun, prompts: Sequence[str], stitches: int = 3, experts: int = 2) -> list[str]:
    """So many mixtures are stitched and have a gallery, with training clips beside it; returns their digests."""
    folder, digests = run.source.folder, [digest_of({"mixture": number}) for number in range(stitches)]
    for number, digest in enumerate(digests):
        write_clips(folder.gallery, prompts, digest, 60 * number, experts)
        keep_gallery(folder, 1 << 30)
        shards = run.driver.state.run.shards
        epochs = tuple(max(0, shards[shard].epoch - stitches + 1 + number) for shard in range(len(shards)))
        run.write(MixtureStitched(time=run.driver.now, epochs=epochs, mixture=digest))
    real = folder.galleries / REAL
    write_clips(real, prompts, shade=120)
    listed = json.loads((real / LIST).read_text())
    for index, clip in enumerate(listed["clips"]):
        same = index % 2 == 0
        clip |= {"caption": clip["prompt"] if same else HOSTILE, "same": same, "similarity": 1.0 if same else 0.7, "shard": 0}
    (real / LIST).write_text(json.dumps(listed))
    folder.sheets.mkdir(exist_ok=True)
    Image.new("RGB", (96, 48), (30, 90, 60)).save(folder.sheets / "000.png")
    return digests
