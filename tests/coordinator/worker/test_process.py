"""The workshop on real files: each wrong checkpoint is refused at its rung, and a crash or hang is survived."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import RunSettings
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.models.mixing.description import read_mixture, verify_mixture
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import BlobRef, Manifest
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.process import Child
from tests.coordinator.scripted_node import until
from tests.coordinator.tiny_data import build_tiny, clips

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMIT = 120.0


@dataclass
class Site:
    """A tiny run, one trained epoch of each shard, and a living workshop."""

    run: RunFolder
    manifest: Manifest
    files: Path
    shop: WorkerClient

    def weights(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.weights.safetensors"

    def state(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.state.safetensors"

    def trace(self, shard: int = 0) -> Path:
        return self.files / f"{shard}.trace.safetensors"

    def holdout(self, shard: int = 0) -> str:
        digest = self.manifest.shards[shard].holdout.digest
        return str(self.run.blobs / digest[:2] / digest)

    async def inspect(self, weights: Path, state: Path, trace: Path | None = None) -> None:
        read = trace or self.trace()
        await self.shop.ask("inspect", limit=LIMIT, shard=0, epoch=1, weights=str(weights), state=str(state), trace=str(read))


def train_epoch(manifest: Manifest, shard: int, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = ExpertTrainer(manifest, shard, clips(shard, 6, 5))
    while not trainer.at_epoch_end:
        trainer.step()
    snapshot = trainer.snapshot()
    write_weights(snapshot, folder / f"{shard}.weights.safetensors")
    write_state(snapshot, folder / f"{shard}.state.safetensors")
    write_tensors(folder / f"{shard}.trace.safetensors", {"trace": torch.tensor(snapshot.trace)})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("workshop")
    created = create_run(build_tiny(root / "data"), root / "run", RunSettings(preset="tiny"))
    (root / "files").mkdir()
    for shard in range(2):
        train_epoch(created.manifest, shard, root / "files")
    run = RunFolder(created.folder)
    shop = WorkerClient(run.manifest, name="test", threads=1, nice=3)
    yield Site(run, created.manifest, root / "files", shop)
    await shop.close()


async def test_a_right_checkpoint_passes_and_improves_on_the_initial_model(site: Site):
    limits = await site.shop.ask("limits", limit=LIMIT)
    size, tensors = limits["shards"]["0"]["weights"]
    assert site.weights().stat().st_size - 1024 * tensors < size <= site.weights().stat().st_size
    assert site.state().stat().st_size < limits["shards"]["0"]["state"][0] + (1 << 20)
    await site.inspect(site.weights(), site.state())
    before = await site.shop.ask("loss", limit=LIMIT, shard=0, weights=None, holdout=site.holdout())
    after = await site.shop.ask("loss", limit=LIMIT, shard=0, weights=str(site.weights()), holdout=site.holdout())
    again = await site.shop.ask("loss", limit=LIMIT, shard=0, weights=str(site.weights()), holdout=site.holdout())
    assert after["loss"] < before["loss"]
    assert after == again, "same noise, same timesteps"
    assert site.shop.pid
    nice = min(19, psutil.Process().nice() + 3)
    assert psutil.Process(site.shop.pid).nice() == nice
    assert session_niceness(site.shop.pid) in (None, nice), "its own value weighs nothing against other sessions"


def session_niceness(pid: int) -> int | None:
    """None where the kernel does not weigh sessions, or this one is older than its doing so: the file is empty then."""
    file = Path(f"/proc/{pid}/autogroup")
    said = file.read_text() if file.exists() else ""
    return int(said.split()[-1]) if said else None


async def test_a_session_that_it_only_belongs_to_is_left_alone():
    code = "from lutetia.system.process import give_way; give_way(1)"
    before = session_niceness(os.getpid())
    assert not await (await asyncio.create_subprocess_exec(sys.executable, "-c", code)).wait()
    assert session_niceness(os.getpid()) == before


def mutated(site: Site, kind: str, folder: Path) -> tuple[Path, Path]:
    """Weights and state with one thing wrong."""
    weights, state, metadata = load_file(site.weights()), load_file(site.state()), header_of(site.state())
    name = sorted(weights)[0]
    good = {key: value.clone() for key, value in weights.items()}
    match kind:
        case "missing":
            del good[name]
        case "extra":
            good["backdoor"] = torch.zeros(3)
        case "nan":
            good[name].view(-1)[0] = float("nan")
        case "infinite":
            good[name].view(-1)[0] = float("inf")
        case "huge":
            good[name] *= 1e6
        case "shape":
            good[name] = good[name].reshape(-1)[:-1].clone()
        case "dtype":
            good[name] = good[name].double()
        case "state of another epoch":
            said = json.loads(metadata["lutetia"])
            metadata["lutetia"] = json.dumps({**said, "epoch": 2, "samples": 2 * said["samples"]})
        case "a sample too many":
            said = json.loads(metadata["lutetia"])
            metadata["lutetia"] = json.dumps({**said, "samples": said["samples"] + 1})
        case "no number of samples":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "samples": "x"})
        case "no micro-batch":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "micro_batch": 0})
        case "no moments":
            state = {key: tensor for key, tensor in state.items() if not key.startswith(("adamw.", "muon."))}
        case "state of another shard":
            metadata["lutetia"] = json.dumps({**json.loads(metadata["lutetia"]), "shard": 1})
        case "other averages":
            state["ema." + name] = state["ema." + name] + 1e-3
        case "nan in state":
            state["param." + name].view(-1)[0] = float("nan")
        case "empty state":
            state = {}
    save_file(good, folder / "w.safetensors", metadata={"format": "pt"})
    save_file(state, folder / "s.safetensors", metadata=metadata)
    return folder / "w.safetensors", folder / "s.safetensors"


def header_of(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]


@pytest.mark.parametrize(
    ("kind", "rung", "words"),
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
async def test_each_wrong_checkpoint_is_refused_at_its_rung(site: Site, tmp_path: Path, kind: str, rung: str, words: str):
    weights, state = mutated(site, kind, tmp_path)
    with pytest.raises(WorkerRefused, match=words) as caught:
        await site.inspect(weights, state)
    assert caught.value.rung == rung
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trace", "rung", "words"),
    [
        ({"trace": torch.zeros(3)}, "format", "3 losses; an epoch has 4"),
        ({"trace": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "numbers", "NaN or infinity"),
        ({"trace": torch.zeros(2, 2)}, "format", "not one row"),
        ({"losses": torch.zeros(4)}, "format", "not one row"),
    ],
)
async def test_a_trace_has_one_finite_loss_per_step(
    site: Site, tmp_path: Path, trace: dict[str, torch.Tensor], rung: str, words: str
):
    save_file(trace, tmp_path / "t.safetensors")
    with pytest.raises(WorkerRefused, match=words) as caught:
        await site.inspect(site.weights(), site.state(), tmp_path / "t.safetensors")
    assert caught.value.rung == rung


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
async def test_header_bombs_are_refused_and_the_workshop_lives(site: Site, tmp_path: Path, data: bytes):
    bomb = tmp_path / "bomb.safetensors"
    bomb.write_bytes(data)
    pid = site.shop.pid
    with pytest.raises(WorkerRefused) as caught:
        await site.inspect(bomb, site.state())
    assert caught.value.rung == "format"
    assert site.shop.pid == pid


async def test_router_mixture_and_gallery_are_made_and_signed_by_the_parent(site: Site, tmp_path: Path):
    shards = site.manifest.shards
    trains = [str(site.run.blobs / s.train.digest[:2] / s.train.digest) for s in shards]
    holdouts = [site.holdout(shard) for shard in range(2)]
    router = tmp_path / "router.safetensors"
    report = await site.shop.ask("router", limit=LIMIT, out=str(router), train=trains, holdout=holdouts)
    assert 0 <= report["accuracy"] <= 1
    assert len(report["accuracy_by_time"]) == 10
    coordinator = Identity.load(site.run.coordinator_key)
    accepted = [acceptance(site, coordinator, shard).model_dump(mode="json") for shard in range(2)]
    weights = [str(site.weights(shard)) for shard in range(2)]
    asked: list[bytes] = []

    def sign(message: bytes) -> str:
        asked.append(message)
        return coordinator.sign(message)

    folder = tmp_path / "mixture"
    answer = await site.shop.ask(
        "stitch", limit=LIMIT, sign=sign, folder=str(folder), weights=weights, accepted=accepted, router=str(router)
    )
    assert len(asked) == 1
    assert read_mixture(folder).mixture.digest == answer["digest"]
    assert verify_mixture(folder, site.manifest.coordinators).digest == answer["digest"]
    await site.shop.ask("gallery", limit=LIMIT, mixture=str(folder), out=str(tmp_path / "gallery"))
    listed = json.loads((tmp_path / "gallery" / "gallery.json").read_text())["clips"]
    assert [(clip["prompt"], (tmp_path / "gallery" / clip["file"]).read_bytes()[:4]) for clip in listed] == [
        (prompt, b"GIF8") for prompt in site.manifest.sampling.prompts
    ]


def acceptance(site: Site, coordinator: Identity, shard: int) -> AcceptanceRecord:
    from lutetia.protocol.blobs.chunk_table import ChunkTable

    weights, state = (ChunkTable.of_file(path).ref for path in (site.weights(shard), site.state(shard)))
    assert isinstance(weights, BlobRef)
    return AcceptanceRecord(
        run=site.manifest.run_id, owner=coordinator.public_key, issued=0.0, shard=shard, epoch=1, checkpoint=f"{shard:064x}",
        parent=None, weights=weights, state=state, samples=8, author=coordinator.public_key, tenure_until=0.0, holdout_loss=1.0,
    )  # fmt: skip


async def test_a_crash_is_survived(site: Site):
    await site.shop.ask("limits", limit=LIMIT)
    pid = site.shop.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match="crashed"):
        await site.inspect(site.weights(), site.state())
    await site.inspect(site.weights(), site.state())
    assert site.shop.pid not in (None, pid)


async def test_an_answer_too_long_for_a_line_is_a_failed_job(site: Site, tmp_path: Path):
    """Of a run whose epochs are longer than those that `run create` makes today."""
    write_tensors(tmp_path / "long.safetensors", {"trace": torch.rand(80_000)})
    await site.shop.ask("limits", limit=LIMIT)
    pid = site.shop.pid
    assert pid is not None
    with pytest.raises(WorkerFailed, match="answer to trace cannot be read"):
        await site.shop.ask("trace", limit=LIMIT, path=str(tmp_path / "long.safetensors"))
    assert not psutil.pid_exists(pid)
    assert len((await site.shop.ask("trace", limit=LIMIT, path=str(site.trace())))["losses"]) == 4


async def test_a_replay_of_some_steps_tells_what_was_published_of_these(site: Site):
    train = site.manifest.shards[0].train.digest
    answer = await site.shop.ask(
        "replay", limit=LIMIT, shard=0, epoch=0, data=str(site.run.blobs / train[:2] / train), weights=None, state=None,
        trace=str(site.trace()), precision="float32", steps=2, epochs=3, end=None,
    )  # fmt: skip
    assert answer["published"] == answer["losses"]
    assert len(answer["losses"]) == 2


HALTING = """
import os, signal
os.write(1, b'{"say": "whole"}\\n{"say": "ha')
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_half_a_line_of_a_killed_child_is_its_end(tmp_path: Path):
    (tmp_path / "halting.py").write_text(HALTING)
    child = await Child.start("halting", environment={"PYTHONPATH": str(tmp_path)})
    assert [message async for message in child.messages()] == [{"say": "whole"}]
    assert await child.process.wait() == -signal.SIGKILL


async def test_a_long_idle_child_ends_and_the_next_job_starts_another(site: Site):
    shop = WorkerClient(site.run.manifest, name="rare", threads=1, nice=3, idle=0.2)
    await shop.ask("limits", limit=LIMIT)
    assert (first := shop.pid) is not None

    async def ended() -> bool:
        return shop.pid is None

    await until(ended, "the idle child ended")
    assert not psutil.pid_exists(first)
    await shop.ask("limits", limit=LIMIT)
    assert shop.pid not in (None, first)
    await shop.close()


async def test_a_hang_is_ended(site: Site):
    await site.shop.ask("limits", limit=LIMIT)
    pid = site.shop.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerFailed, match="longer than 1 s"):
        await site.shop.ask("limits", limit=1.0)
    assert not psutil.pid_exists(pid)
