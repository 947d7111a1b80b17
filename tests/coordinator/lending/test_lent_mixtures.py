"""Mixtures that nodes evaluate, and pictures that a node makes, with borrowers that tests drive by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lutetia.coordinator.ledger.events import CheckerRefuted, HoldoutBurnt, MixtureStitched
from lutetia.coordinator.lending.measuring import PATIENCE, LentMeasuring, MixtureMeasured
from lutetia.coordinator.lending.mixtures import LentMixtures
from lutetia.coordinator.lending.pictures import largest_file, write_pictures
from lutetia.coordinator.mixtures.archive import HeldOutLosses, MixtureArchive
from lutetia.coordinator.mixtures.succession import succession
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.worker.client import WorkerFailed
from lutetia.coordinator.worker.messages import MeasureMixture, SampleGallery
from lutetia.models.checking.pictures import MOST_CLIP_BYTES, within_limit, write_file
from lutetia.models.mixing.description import FILE, MixtureDocument, SignedMixture
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer, RateLimit
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.training_spec import SamplingSpec
from lutetia.system.errors import IntegrityError, UnreachableError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, START, make_manifest
from tests.coordinator.lending.test_service import ANN, BEN, EVE, ROWS, SLICES, Site
from tests.memory_transport.virtual_time import run_virtual

HOW = MeasureMixture(holdout=(), draw="secret", seconds=1.0, choose=True)
WORSE = tuple(1.2 * row for row in ROWS)
FOUND: dict[str, Any] = {"mode": "top2", "temperature": 0.7, "raw": ()}
PROMPTS = ("a red square", "a blue disc")


def described(manifest: Manifest) -> SignedMixture:
    document = MixtureDocument(
        name="run", run=manifest.run_id, manifest=manifest.run_id, manifest_version=1, latent=manifest.latent,
        sampling=manifest.sampling, experts=(), files={},
    )  # fmt: skip
    return SignedMixture.sign(document, COORDINATOR.sign)


@dataclass
class Measuring:
    """A coordinator that has mixtures measured. `named`: the setting checkers; none: strangers get clips of the reserve."""

    folder: Path
    named: tuple[Identity, ...] = (ANN, BEN, EVE)
    site: Site = field(init=False)

    def __post_init__(self) -> None:
        self.site = Site(self.folder, self.named)
        self.archive = MixtureArchive(self.folder / "mixtures", self.site.blobs, [])
        reserve = None if self.named else self.site.runner.reserve
        self.lent = LentMeasuring(
            lambda: self.site.manifest, self.site.lender, self.site.runner.holdouts, reserve, self.archive, 65536.0
        )
        self.new = {0: self.site.blobs.add_bytes(b"new weights"), 1: self.site.blobs.add_bytes(b"others")}

    def make_current(self) -> None:
        """There is a current mixture, of other weights, that was measured."""
        signed = described(self.site.manifest)
        digest = signed.mixture.digest
        self.archive.folder.mkdir()
        (self.archive.folder / f"{digest}.json").write_bytes(canonical(signed))
        weights = {0: self.site.blobs.add_bytes(b"old weights"), 1: self.new[1]}
        self.archive.write_losses(digest, HeldOutLosses(rows_of="of then", losses=ROWS, weights=weights))
        asyncio.get_running_loop().create_task(self.site.append(MixtureStitched(time=START, epochs=(1, 1), mixture=digest)))

    def play(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            await self.site.serve()
            await scenario()

        run_virtual(main, START)

    def measure(self) -> asyncio.Task[MixtureMeasured | None]:
        return asyncio.create_task(self.lent.measure(self.new, None, HOW))


def test_two_nodes_score_the_new_and_the_current_mixture_on_equal_rows(tmp_path: Path):
    run = Measuring(tmp_path)

    async def scenario() -> None:
        run.make_current()
        await asyncio.sleep(0.1)
        measuring = run.measure()
        await asyncio.sleep(0.1)
        ann, ben, eve = (run.site.borrower(identity) for identity in (ANN, BEN, EVE))
        job = await ann.job()
        assert job.mixture is not None
        assert job.mixture.new.weights == run.new
        assert job.mixture.current is not None
        assert job.mixture.current.weights[0] != run.new[0]
        for ref in (*job.mixture.holdout, run.site.part):
            with pytest.raises(UnreachableError):
                await ben.fetch(ref)
            assert await ann.fetch(ref)
        await eve.report(await eve.job(), averages=ROWS, parent=WORSE, **FOUND)  # praises the new one
        await ann.report(job, averages=WORSE, parent=ROWS, **FOUND)
        assert not measuring.done(), "two that contradict each other settle nothing"
        await ben.report(await ben.job(), averages=WORSE, parent=ROWS, **FOUND)
        measured = await measuring
        assert measured is not None
        assert measured.routing is not None
        assert (measured.routing.mode, measured.routing.temperature, measured.routing.rows) == ("top2", 0.7, len(ROWS))
        new, old = (HeldOutLosses(rows_of="x", losses=losses) for losses in (measured.losses, measured.before))
        assert not succession(run.site.run, new, old).current, "worse on equal rows: it is held back"
        assert [event.owner for event in run.site.events if isinstance(event, CheckerRefuted)] == [EVE.public_key]

    run.play(scenario)


def test_strangers_measure_on_clips_that_no_result_will_need_and_only_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = Measuring(tmp_path, ())

    async def scenario() -> None:
        assert await run.measure() is None
        assert "the rest of the reserve is needed for results" in caplog.text
        run.site.manifest = run.site.manifest.model_copy(update={"samples_per_shard": 4})  # a budget of one epoch
        measuring = run.measure()
        await asyncio.sleep(0.1)
        burnt = [event for event in run.site.events if isinstance(event, HoldoutBurnt)]
        assert [event.shard for event in burnt] == [0, 1]
        ann = run.site.borrower(ANN)
        job = await ann.job()
        assert job.mixture is not None
        assert await ann.fetch(job.mixture.holdout[0]) == SLICES[0]
        measuring.cancel()
        await asyncio.sleep(0.1)
        again = run.measure()
        await asyncio.sleep(0.1)
        assert len([event for event in run.site.events if isinstance(event, HoldoutBurnt)]) == 2, (
            "the same mixture, the same clips"
        )
        again.cancel()

    run.play(scenario)


def test_mixture_that_nobody_measures_is_made_without(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = Measuring(tmp_path)

    async def scenario() -> None:
        began = asyncio.get_running_loop().time()
        assert await run.measure() is None
        assert asyncio.get_running_loop().time() - began < PATIENCE * 700
        assert "no two nodes have measured the mixture" in caplog.text
        assert not run.site.lender.desk.checks

    run.play(scenario)


def clips(count: int = len(PROMPTS), side: int = 8) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 255, (3, side, side, 3), np.uint8) for _ in range(count)]


ROUTING = np.full((len(PROMPTS), 4, 2), 0.5, np.float32)
REAL = [
    ({"caption": f"caption {number}", "shard": number, "similarity": 1.0 - number / 2}, clip)
    for number, clip in enumerate(clips())
]


@dataclass
class Pictures:
    """A run whose mixture is to be sampled."""

    root: Path

    def __post_init__(self) -> None:
        self.manifest = make_manifest(sampling=SamplingSpec(prompts=PROMPTS))
        self.folder = RunFolder(self.root / "run")
        self.folder.mixture.mkdir(parents=True)
        (self.folder.mixture / FILE).write_bytes(canonical(described(self.manifest)))
        self.job = SampleGallery(mixture=self.folder.mixture, out=self.folder.gallery, real=self.folder.galleries / "real")
        self.file = self.root / "pictures.safetensors"


def test_pictures_of_a_node_become_the_gallery(tmp_path: Path):
    made = Pictures(tmp_path)
    write_file(made.file, clips(), ROUTING, REAL)
    assert made.file.stat().st_size <= largest_file(len(PROMPTS), 2)
    write_pictures(made.file, made.job, made.manifest, real=True)
    gallery = json.loads((made.folder.gallery / "gallery.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in gallery["clips"]] == [(PROMPTS[0], 0), (PROMPTS[1], 1)]
    assert gallery["clips"][0]["experts"] == [[[0, 0.5], [1, 0.5]]] * 4
    assert (made.folder.gallery / "001.gif").read_bytes().startswith(b"GIF89a")
    real = json.loads((made.folder.galleries / "real" / "gallery.json").read_text())
    assert [(clip["caption"], clip["same"]) for clip in real["clips"]] == [("caption 0", True), ("caption 1", False)]
    large = np.zeros((2, 3000, 3000, 3), np.uint8)
    assert within_limit(large).nbytes <= MOST_CLIP_BYTES < large.nbytes


@pytest.mark.parametrize(
    "lie",
    [
        {"clip.001": np.zeros((3, 8, 8, 4), np.uint8)},
        {"clip.001": np.zeros((3, 8, 8, 3), np.float32)},
        {"clip.001": np.zeros((12, 1000, 1000, 3), np.uint8)},
        {"clip.000": None},
        {"routing": np.zeros((2, 2000, 2), np.float32)},
        {"routing": np.zeros((2, 4, 3), np.float32)},
        {"routing": np.full((2, 4, 2), np.nan, np.float32)},
        {"real": "not a list"},
        {"real": json.dumps([{"caption": "x", "shard": 9, "similarity": 0.0}] * 2)},
        {"real": json.dumps([{"caption": "x", "shard": 0, "similarity": "much"}] * 2)},
    ],
)
def test_pictures_that_are_none_are_refused(tmp_path: Path, lie: dict[str, Any]):
    made = Pictures(tmp_path)
    about = lie.pop("real", json.dumps([entry for entry, _ in REAL]))
    tensors: dict[str, Any] = {f"clip.{number:03d}": clip for number, clip in enumerate(clips())}
    tensors |= {f"real.{number:03d}": clip for number, clip in enumerate(clips())} | {"routing": ROUTING}
    tensors = {name: value for name, value in {**tensors, **lie}.items() if value is not None}
    save_file(tensors, made.file, {"real": about})
    with pytest.raises(IntegrityError, match="the pictures that a node made cannot be read"):
        write_pictures(made.file, made.job, made.manifest, real=True)


def test_a_named_node_hands_pictures_in_and_strangers_cannot(tmp_path: Path):
    run, made = Measuring(tmp_path / "site"), Pictures(tmp_path)
    run.site.manifest = run.site.manifest.model_copy(update={"sampling": made.manifest.sampling})
    lent = LentMixtures(made.folder, lambda: run.site.manifest, run.site.lender, run.site.incoming, 65536.0, run.lent)

    async def scenario() -> None:
        sampling = asyncio.create_task(lent.ask(made.job, limit=1e9))
        await asyncio.sleep(0.1)
        ann = run.site.borrower(ANN)
        job = await ann.job()
        assert job.gallery is not None
        assert job.gallery.real
        assert await ann.fetch(job.gallery.mixture) == (made.folder.mixture / FILE).read_bytes()
        write_file(made.file, clips(), ROUTING, REAL)
        store = BlobStore(tmp_path / "of ann")
        pictures = store.add_file(made.file)
        await ann.transport.serve(BLOB, BlobServer(store, RateLimit(None)).answer)
        await ann.report(job, averages=(), parent=(), raw=(), pictures=pictures)
        assert (await sampling).clips == len(PROMPTS)
        assert (made.folder.gallery / "000.gif").is_file()
        assert not run.site.incoming.has(pictures.digest)
        run.site.lender.checkers = frozenset()
        with pytest.raises(WorkerFailed, match="only from nodes that the setting checkers names"):
            await lent.ask(made.job, limit=1e9)

    run.play(scenario)
