"""The worker process on real files: each wrong checkpoint fails its check, and a crash or hang ends one job only."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused, _Pauses
from lutetia.coordinator.worker.messages import (
    FromWorker,
    JobDone,
    JobRequest,
    LibraryLoaded,
    MeasureLoss,
    MeasureMixture,
    MeasureSizes,
    ReadTrace,
    ReplayEpoch,
    SampleGallery,
    StitchMixture,
    TrainRouter,
    encode,
    read_from_worker,
)
from lutetia.coordinator.worker.process import WorkerProcess, resolved_device
from lutetia.models.mixing.description import read_mixture, verify_mixture
from lutetia.models.tensor_files import write_tensors
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import ConfigError
from lutetia.system.process import Child, ParentChannel
from tests.coordinator.scripted_node import until
from tests.coordinator.tiny_data import WORDS, build_tiny
from tests.coordinator.worker.worker_site import LIMIT, Site, mutated, train_epoch
from tests.models.emulated_device import DEVICE as EMULATED
from tests.models.emulated_device import emulated_device

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("worker")
    created = create_run(build_tiny(root / "data"), root / "run", RunSettings(preset="tiny"))
    (root / "files").mkdir()
    for shard in range(2):
        train_epoch(created.manifest, shard, root / "files")
    run = RunFolder(created.folder)
    worker = WorkerClient(run.manifest, name="test", threads=1, nice=3)
    yield Site(run, created.manifest, root / "files", worker)
    await worker.close()


async def test_right_checkpoint_passes_and_improves_on_initial_model(site: Site):
    sizes = await site.worker.ask(MeasureSizes(), limit=LIMIT)
    size, tensors = sizes.weights[0]
    assert site.weights().stat().st_size - 1024 * tensors < size <= site.weights().stat().st_size
    assert site.state().stat().st_size < sizes.state[0][0] + (1 << 20)
    await site.inspect(site.weights(), site.state())
    before, after, again = await site.loss(None), await site.loss(site.weights()), await site.loss(site.weights())
    assert after.loss < before.loss
    assert after == again, "same noise, same timesteps"
    assert site.worker.pid
    nice = min(19, psutil.Process().nice() + 3)
    assert psutil.Process(site.worker.pid).nice() == nice
    assert session_niceness(site.worker.pid) in (None, nice), "its own value weighs nothing against other sessions"


async def test_subnormal_weights_cost_no_more_than_others(site: Site, tmp_path: Path):
    """Processors take several times as long for them; half of the weights were enough to make a check four times as slow."""
    weights, draw = load_file(site.weights()), torch.Generator().manual_seed(1)
    for tensor in weights.values():
        tensor[torch.rand(tensor.shape, generator=draw) < 0.5] = 1e-39
    save_file(weights, tmp_path / "subnormal")

    async def seconds(file: Path) -> float:
        await site.loss(file)  # starts the process, if none runs
        process = psutil.Process(site.worker.pid)
        before = process.cpu_times().user
        for _ in range(12):
            await site.loss(file)
        return process.cpu_times().user - before

    assert await seconds(tmp_path / "subnormal") < 1.5 * await seconds(site.weights())


def session_niceness(pid: int) -> int | None:
    """None when the kernel has no autogroups, or this session began before they were switched on: the file is empty then."""
    file = Path(f"/proc/{pid}/autogroup")
    text = file.read_text() if file.exists() else ""
    return int(text.split()[-1]) if text else None


async def test_give_way_leaves_a_session_of_another_leader_alone():
    code = "from lutetia.system.process import give_way; give_way(1)"
    before = session_niceness(os.getpid())
    assert not await (await asyncio.create_subprocess_exec(sys.executable, "-c", code)).wait()
    assert session_niceness(os.getpid()) == before


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        ("missing", "format", "lacks 1 tensors"),
        ("extra", "format", "backdoor"),
        ("nan", "numbers", "NaN or infinity"),
        ("infinite", "numbers", "NaN or infinity"),
        ("huge", "numbers", "root mean square"),
        ("shape", "format", "has shape"),
        ("dtype", "format", "F64 instead of F32"),
        ("state of another epoch", "format", "epoch 2"),
        ("state of another shard", "format", "not of shard 0 of this run"),
        ("a sample too many", "format", "names a place that this run does not have"),
        ("no number of samples", "format", "does not say where it belongs"),
        ("no micro-batch", "format", "names a place that this run does not have"),
        ("no moments", "format", "no moments of the optimiser"),
        ("other averages", "numbers", "not the published one"),
        ("nan in state", "numbers", "NaN or infinity"),
        ("empty state", "format", "lacks"),
    ],
)
async def test_wrong_checkpoint_is_refused_at_its_check(site: Site, tmp_path: Path, kind: str, check: str, words: str):
    weights, state = mutated(site, kind, tmp_path)
    with pytest.raises(WorkerRefused, match=words) as caught:
        await site.inspect(weights, state)
    assert caught.value.check == check
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trace", "check", "words"),
    [
        ({"trace": torch.zeros(3)}, "format", "3 losses; an epoch has 4"),
        ({"trace": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "numbers", "NaN or infinity"),
        ({"trace": torch.zeros(2, 2)}, "format", "not one row"),
        ({"losses": torch.zeros(4)}, "format", "not one row"),
    ],
)
async def test_trace_without_a_finite_loss_per_step_is_refused(
    site: Site, tmp_path: Path, trace: dict[str, torch.Tensor], check: str, words: str
):
    save_file(trace, tmp_path / "t.safetensors")
    with pytest.raises(WorkerRefused, match=words) as caught:
        await site.inspect(site.weights(), site.state(), tmp_path / "t.safetensors")
    assert caught.value.check == check


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (1 << 20).to_bytes(8, "little") + b'{"a":' * (1 << 18),
        b"not safetensors at all, but long enough to look at",
    ],
)
async def test_header_bomb_is_refused_and_the_process_lives(site: Site, tmp_path: Path, data: bytes):
    bomb = tmp_path / "bomb.safetensors"
    bomb.write_bytes(data)
    pid = site.worker.pid
    with pytest.raises(WorkerRefused) as caught:
        await site.inspect(bomb, site.state())
    assert caught.value.check == "format"
    assert site.worker.pid == pid


async def test_router_mixture_and_gallery_are_made_and_signed(site: Site, tmp_path: Path):
    trains, holdouts = (site.train(0), site.train(1)), (site.holdout(0), site.holdout(1))
    router = tmp_path / "router.safetensors"
    report = await site.worker.ask(TrainRouter(train=trains, holdout=holdouts, out=router), limit=LIMIT)
    assert 0 <= report.accuracy <= 1
    assert len(report.accuracy_by_time) == 10
    coordinator = Identity.load(site.run.coordinator_key)
    accepted = (acceptance(site, coordinator, 0), acceptance(site, coordinator, 1))
    asked: list[bytes] = []

    def sign(message: bytes) -> str:
        asked.append(message)
        return coordinator.sign(message)

    folder = tmp_path / "mixture"
    measure = MeasureMixture(holdout=holdouts, draw="secret", seconds=60.0, choose=True)
    job = StitchMixture(
        folder=folder, weights=(site.weights(0), site.weights(1)), accepted=accepted, router=router, measure=measure
    )
    answer = await site.worker.ask(job, limit=LIMIT, sign=sign)
    assert len(asked) == 1
    assert read_mixture(folder).mixture.digest == answer.digest
    assert verify_mixture(folder, site.manifest.coordinators).digest == answer.digest
    routing = read_mixture(folder).mixture.routing
    assert routing
    assert (routing.text, routing.rows) == (answer.routing, len(answer.losses))
    assert routing.loss == pytest.approx(sum(answer.losses) / len(answer.losses))
    real = tmp_path / "galleries" / "real"
    job = SampleGallery(mixture=folder, out=tmp_path / "gallery", train=trains, real=real)
    await site.worker.ask(job, limit=LIMIT)
    written = json.loads((tmp_path / "gallery" / "gallery.json").read_text())
    assert written["mixture"] == answer.digest
    assert [(clip["prompt"], (tmp_path / "gallery" / clip["file"]).read_bytes()[:4]) for clip in written["clips"]] == [
        (prompt, b"GIF8") for prompt in site.manifest.sampling.prompts
    ]
    for clip in written["clips"]:  # by the way of routing that was chosen
        assert len(clip["experts"]) == site.manifest.sampling.steps
        assert all({expert for expert, _ in step} <= {0, 1} for step in clip["experts"])
        assert all(sum(weight for _, weight in step) == pytest.approx(1, abs=0.01) for step in clip["experts"])
    beside = json.loads((real / "gallery.json").read_text())["clips"]
    assert [clip["same"] for clip in beside] == [clip["caption"] == clip["prompt"] for clip in beside]
    assert {clip["caption"] for clip in beside} <= set(WORDS[:2])
    assert all((real / clip["file"]).read_bytes()[:4] == b"GIF8" for clip in beside)
    chosen = (real / "000.gif").stat().st_mtime_ns
    await site.worker.ask(job, limit=LIMIT)
    assert (real / "000.gif").stat().st_mtime_ns == chosen, "chosen once"


def acceptance(site: Site, coordinator: Identity, shard: int) -> AcceptanceRecord:
    from lutetia.protocol.blobs.chunk_table import ChunkTable

    weights, state = (ChunkTable.of_file(path).ref for path in (site.weights(shard), site.state(shard)))
    assert isinstance(weights, BlobRef)
    return AcceptanceRecord(
        run=site.manifest.run_id, owner=coordinator.public_key, issued=0.0, shard=shard, epoch=1, checkpoint=f"{shard:064x}",
        parent=None, weights=weights, state=state, samples=8, author=coordinator.public_key, tenure_until=0.0, holdout_loss=1.0,
    )  # fmt: skip


async def test_crash_fails_one_job_and_the_next_succeeds(site: Site):
    await site.worker.ask(MeasureSizes(), limit=LIMIT)
    pid = site.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="crashed"):
        await site.inspect(site.weights(), site.state())
    await site.inspect(site.weights(), site.state())
    assert site.worker.pid not in (None, pid)


async def test_answer_longer_than_a_line_fails_the_job(site: Site, tmp_path: Path):
    """As in a run whose epochs are longer than `run create` allows today."""
    write_tensors(tmp_path / "long.safetensors", {"trace": torch.rand(80_000)})
    await site.worker.ask(MeasureSizes(), limit=LIMIT)
    pid = site.worker.pid
    assert pid is not None
    with pytest.raises(WorkerFailed, match="answer to the job trace cannot be read"):
        await site.worker.ask(ReadTrace(path=tmp_path / "long.safetensors"), limit=LIMIT)
    assert not psutil.pid_exists(pid)
    assert len((await site.worker.ask(ReadTrace(path=site.trace()), limit=LIMIT)).losses) == 4


async def test_replay_of_some_steps_returns_their_published_losses(site: Site):
    job = ReplayEpoch(
        shard=0, epoch=0, data=site.train(), weights=None, state=None, trace=site.trace(), precision="float32", steps=2, epochs=3
    )  # fmt: skip
    answer = await site.worker.ask(job, limit=LIMIT)
    assert answer.published == answer.losses
    assert len(answer.losses) == 2


async def test_idle_process_ends_and_the_next_job_starts_another(site: Site):
    worker = WorkerClient(site.run.manifest, name="rare", threads=1, nice=3, idle=0.2)
    await worker.ask(MeasureSizes(), limit=LIMIT)
    assert (first := worker.pid) is not None

    async def ended() -> bool:
        return worker.pid is None

    await until(ended, "the idle child ended")
    assert not psutil.pid_exists(first)
    await worker.ask(MeasureSizes(), limit=LIMIT)
    assert worker.pid not in (None, first)
    await worker.close()


async def test_each_library_that_is_loaded_moves_the_deadline_on(site: Site):
    child = await Child.start("lutetia.coordinator.worker", str(site.run.manifest), "making", "cpu")
    try:
        await child.send(encode(JobRequest(id=7, job=MeasureSizes())))
        lines: list[FromWorker] = []
        async for line in child.messages():
            lines.append(read_from_worker(line))
            if isinstance(lines[-1], JobDone):
                break
    finally:
        await child.kill()
    assert [type(line) for line in lines] == [LibraryLoaded, LibraryLoaded, JobDone]
    longest = dict[str, float]()
    async with asyncio.timeout(10) as deadline:
        began = asyncio.get_running_loop().time()
        _Pauses(longest, "sizes", deadline, 1000.0).went_on()
        await asyncio.sleep(0)
        assert (deadline.when() or 0) >= began + 1000
    assert not longest, "a slow start says nothing of the job"


async def test_hanging_process_is_ended(site: Site):
    await site.worker.ask(MeasureSizes(), limit=LIMIT)
    pid = site.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailed, match="showed no progress for 1 s"):
        await site.worker.ask(MeasureSizes(), limit=1.0)
    assert not psutil.pid_exists(pid)


class Lines:
    """A channel whose parent sends these lines; it keeps what is sent back."""

    def __init__(self, *lines: Any) -> None:
        self.lines, self.sent = lines, list[Any]()

    def messages(self) -> Iterator[Any]:
        return iter(self.lines)

    def send(self, message: Any) -> None:
        self.sent.append(message)


async def test_losses_on_an_accelerator_are_those_of_the_cpu(site: Site):
    job = MeasureLoss(shard=0, weights=site.weights(), holdout=site.holdout(), draw="one")
    channel = cast(ParentChannel, Lines())
    expected = WorkerProcess(site.manifest, channel).loss(job)
    with emulated_device():
        found = WorkerProcess(site.manifest, channel, EMULATED).loss(job)
    assert found.rows == pytest.approx(expected.rows, rel=1e-6)


async def test_device_that_is_not_there_is_refused_in_one_sentence():
    assert (resolved_device("cpu"), resolved_device(EMULATED)) == ("cpu", EMULATED)
    for wanted in ("cuda:90", "xpu:90"):
        kind = wanted.partition(":")[0].upper()
        with pytest.raises(ConfigError, match=rf"^device {wanted} is set, but torch sees \d+ {kind} devices; check the driver"):
            resolved_device(wanted)
    assert ServeSettings(device="xpu:1").device == "xpu:1"


@pytest.mark.parametrize(
    "line", [{"kind": "job", "id": 1, "job": {"job": "shell"}}, {"kind": "signature", "signature": ""}, [], 1]
)
async def test_line_that_is_no_job_ends_the_process(site: Site, line: Any):
    with pytest.raises(ValueError, match=r".+"):
        WorkerProcess(site.manifest, cast(ParentChannel, Lines(line))).run()
