"""One shard of a small run: honest training of every kind, and the real checks and replay."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.fuzz.examples import LATENT, OWNER, WAN
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, secret_steps
from lutetia.coordinator.acceptance.checks import Verdict, run_checks
from lutetia.coordinator.holdouts import Holdouts
from lutetia.coordinator.runtime.check_runner import CHECK_SECONDS, NetworkCheckRunner, finding_of, noise_bounds
from lutetia.coordinator.worker.client import WorkerClient, WorkerRefused
from lutetia.coordinator.worker.messages import AnyJob, EpochReplayed, JobRefused, JobRequest, ReplayEpoch
from lutetia.coordinator.worker.process import WorkerProcess
from lutetia.models.data.description import files_of
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.data.shards import ShardData
from lutetia.models.device import Precision
from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import Snapshot, write_state, write_weights
from lutetia.models.training.replay import made_with
from lutetia.models.training.states.compact import packed_state
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.blobs.chunk_table import ChunkTable
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.capabilities import COMPACT
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy, Manifest, ShardSpec
from lutetia.protocol.schema.model.adapter import AdapterSpec, BaseSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, TrainedWith
from lutetia.system.process import Message, ParentChannel

STEPS, BATCH, EPOCHS = 16, 4, 4
SHORT = 4
RATES = {False: 2e-3, True: 1e-2}
"""Learning rates: of experts that are trained whole, and of adapters."""
_DRAWS = 2000
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""Of adapters: all linear layers of the blocks."""
DRAWN = {
    steps: count / _DRAWS
    for steps, count in Counter(secret_steps((n + 0.5) / _DRAWS, SHORT, STEPS) for n in range(_DRAWS)).items()
}
"""How often an audit replays so many first steps."""


@dataclass(frozen=True)
class Honest:
    """How an honest node differs from others."""

    seed: int = 0
    threads: int = 1
    micro_batch: int = BATCH
    clips: int = 32
    holdout: int = 16
    noise: float = 0.1
    precision: Precision = "float32"
    adapter: bool = False
    """Whether its experts are adapters on a base that was trained on other clips."""
    compact: bool = False
    """Whether checkpoints are published in the compact form."""
    muon: bool = False
    """Whether Muon trains the hidden matrices."""


def clips(seed: int, count: int, noise: float) -> ShardData:
    """A pattern that can be learnt, with a different motion in each clip and `noise` added; equal seeds share the pattern."""
    pattern, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7919 * seed + count)
    base = torch.nn.functional.avg_pool3d(torch.randn(1, *LATENT.shape, generator=pattern), 3, 1, 1) * 4
    motion = torch.nn.functional.avg_pool3d(torch.randn(count, *LATENT.shape, generator=draw), 3, 1, 1)
    latents = base + motion + noise * torch.randn(count, *LATENT.shape, generator=draw)
    tokens = torch.randn(1, LATENT.text_tokens, LATENT.text_width, generator=pattern).expand(count, -1, -1)
    tokens = tokens + 0.3 * torch.randn(count, LATENT.text_tokens, LATENT.text_width, generator=draw)
    return ShardData(latents.half().float(), tokens.half().float(), tokens.mean(1)[:, : LATENT.pooled_width].half().float(),
                     [f"clip {n}" for n in range(count)], [""] * count)  # fmt: skip


def _packed(snapshot: Snapshot) -> Snapshot:
    """`snapshot` in the compact form, whatever a liar has changed in it."""

    def numbers(tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        return {name: lambda tensor=tensor: snapshot.values(tensor).float() for name, tensor in tensors.items()}

    averages = {name: snapshot.values(tensor).bfloat16().float() for name, tensor in snapshot.ema.items()}
    packed, sources = packed_state(numbers(snapshot.parameters), averages, numbers(snapshot.moments))
    return replace(snapshot, packed=packed, sources={**snapshot.sources, **sources})


class _Quiet:
    """A channel without messages: the worker's methods are called directly."""

    def messages(self) -> Iterator[Message]:
        return iter(())

    def send(self, message: Message) -> None:
        """Progress of a job, which nobody waits for here."""


class _Direct:
    """The worker within this process."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker

    async def ask(self, job: AnyJob, *, limit: float) -> Any:
        reply = self._worker.answer(JobRequest(id=0, job=job))
        if isinstance(reply, JobRefused):
            raise WorkerRefused(reply.text, reply.check)
        return reply.answer


@dataclass
class Result:
    """What a peer published: its files, and with what it says they were made."""

    weights: Path
    state: Path
    trace: Path
    made: TrainedWith
    epoch: int


@dataclass(frozen=True)
class Audited:
    """`first` is what a replay of the first SHORT steps finds, `whole` one of the epoch.

    `chance`: the probability that an audit of a secret number of first steps convicts.
    """

    first: AuditFinding
    chance: float
    whole: AuditFinding
    drift: float | None
    noise: float | None

    @property
    def begun_short(self) -> str:
        """The outcome of an audit that begins with a few steps and replays the whole epoch when their losses are unclear."""
        return self.whole.outcome if self.first.closer else self.first.outcome


@dataclass
class Lab:
    """A run of one shard in `folder`, with its data.

    Args:
        check_seconds: what scoring one result may take; 0: the fewest rows.
        clock: seconds, by which that is measured.
        audit: which results the run's coordinator audits.
        tolerance: by what share the held-out loss may exceed the parent's.
    """

    folder: Path
    setting: Honest
    check_seconds: float = CHECK_SECONDS
    clock: Callable[[], float] = time.monotonic
    audit: AuditPolicy = AuditPolicy()
    tolerance: float = 0.02
    manifest: Manifest = field(init=False)
    train: ShardData = field(init=False)
    holdout: ShardData = field(init=False)
    worker: WorkerProcess = field(init=False)
    check_runner: NetworkCheckRunner = field(init=False)
    base: dict[str, Path] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = BlobStore(self.folder / "blobs")
        self.train = clips(self.setting.seed, self.setting.clips, self.setting.noise)
        self.holdout = clips(self.setting.seed, self.setting.holdout, self.setting.noise)
        files = {"train": self.train, "holdout": self.holdout}
        refs: dict[str, Any] = {name: self._shard(name, data) for name, data in files.items()}
        shard = ShardSpec(
            index=0, name="shard 0", **refs, clips=self.setting.clips, holdout_clips=self.setting.holdout,
            prior=1.0,
        )  # fmt: skip
        self.manifest = Manifest(
            name=f"lab {self.setting.seed}", owner=OWNER.public_key, coordinators=(OWNER.public_key,), created=1.0, expires=2.0,
            latent=LATENT, expert=self._expert(), shards=(shard,), samples_per_shard=EPOCHS * STEPS * BATCH,
            checkpoint_samples=STEPS * BATCH,
            optimisation=Optimisation(
                batch=BATCH, learning_rate=RATES[self.setting.adapter], ema_decay=0.9,
                optimizer="muon" if self.setting.muon else "adamw",
            ),
            checkpoints="compact" if self.setting.compact else "float32", needs=(COMPACT,) if self.setting.compact else (),
            audit=self.audit, holdout_tolerance=self.tolerance,
        )  # fmt: skip
        self.worker = WorkerProcess(self.manifest, cast(ParentChannel, _Quiet()), clock=self.clock, base=self.base)
        direct = cast(WorkerClient, _Direct(self.worker))
        nobody, holdouts = cast(Any, None), Holdouts(self.store, b"lab")
        self.check_runner = NetworkCheckRunner(
            nobody, self.manifest, self.store, self.store, direct, direct, 1e9, holdouts, check_seconds=self.check_seconds
        )
        self._names = itertools.count()
        self._known: dict[Path, list[tuple[TrainedWith, EpochReplayed]]] = {}

    def _expert(self) -> ExpertSpec:
        """The expert; with an adapter its base too, whole training of the same network on clips of another pattern."""
        whole = ExpertSpec(config=WAN)
        if not self.setting.adapter:
            return whole
        pattern = replace(self.setting, seed=self.setting.seed + 500, adapter=False)
        lab = Lab(self.folder / "base", pattern)
        result = None
        for _ in range(EPOCHS):
            result, _ = lab.honest(result)
        assert result
        self.base = {"diffusion_pytorch_model.safetensors": result.weights}
        refs = {name: ChunkTable.of_file(path).ref for name, path in self.base.items()}
        base = BaseSpec(source="lab/base@0000000", files=refs, dtype="float32")
        return whole.model_copy(update={"adapter": AdapterSpec(rank=4, alpha=16.0, targets=TARGETS, base=base)})

    def _shard(self, name: str, data: ShardData) -> BlobRef:
        path = self.folder / f"{name}.safetensors"
        ref = write_shard(path, data, LATENT, split="train" if name == "train" else "holdout").blob
        for file, _ in files_of(path, ref):
            self.store.add_file(file)
        return ref

    def trainer(self, parent: Result | None, setting: Honest | None = None, data: ShardData | None = None) -> ExpertTrainer:
        """A trainer for the epoch after `parent`, as on a node with `setting`."""
        setting = setting or self.setting
        torch.set_num_threads(setting.threads)
        trainer = ExpertTrainer(
            self.manifest, 0, data or self.train, micro_batch=setting.micro_batch, precision=setting.precision, base=self.base
        )
        if parent:
            trainer.restore(parent.epoch, parent.weights, parent.state)
        return trainer

    def honest(self, parent: Result | None, setting: Honest | None = None) -> tuple[Result, Snapshot]:
        """An honestly trained epoch."""
        trainer = self.trainer(parent, setting)
        for _ in range(STEPS):
            trainer.step()
        snapshot = trainer.snapshot()
        return self.publish(snapshot), snapshot

    def publish(self, snapshot: Snapshot, made: TrainedWith | None = None) -> Result:
        if self.setting.compact:
            snapshot = _packed(snapshot)
        place = self.folder / f"result{next(self._names):03d}"
        files = [place / f"{name}.safetensors" for name in ("weights", "state", "trace")]
        write_weights(snapshot, files[0])
        write_state(snapshot, files[1], ema=False)
        write_tensors(files[2], {"trace": torch.tensor(snapshot.trace)})
        return Result(
            files[0],
            files[1],
            files[2],
            made or made_with("cpu", snapshot.precision, snapshot.micro_batch),
            snapshot.epoch,
        )

    async def judged(self, result: Result, parent: Result | None) -> Verdict:
        """The verdict of all the coordinator's checks on the epoch after `parent`."""
        torch.set_num_threads(1)
        accepted = parent and self.accepted(parent)
        return await run_checks(self.record(result), accepted, self.manifest, self.check_runner, time.monotonic)

    def record(self, result: Result) -> CheckpointRecord:
        """What the author of `result` offers."""
        refs: dict[str, Any] = {name: self.store.add_file(getattr(result, name)) for name in ("weights", "state", "trace")}
        peer = Identity.derived("author")
        return CheckpointRecord(
            run=self.manifest.run_id, owner=peer.public_key, issued=1.0, shard=0, epoch=result.epoch,
            parent=None if result.epoch == 1 else "0" * 64, **refs, samples=result.epoch * STEPS * BATCH, loss=0.5,
            peer_id=peer.peer_id, made=result.made,
        )  # fmt: skip

    def accepted(self, result: Result) -> AcceptanceRecord:
        """What the coordinator signed of `result`, had it accepted it."""
        record = self.record(result)
        return AcceptanceRecord(
            run=record.run, owner=OWNER.public_key, issued=1.0, shard=0, epoch=record.epoch, checkpoint=record.digest,
            parent=record.parent, weights=record.weights, state=record.state, samples=record.samples, author=record.owner,
            tenure_until=1.0, holdout_loss=0.5,
        )  # fmt: skip

    def audited(self, result: Result, parent: Result | None, claimed: TrainedWith | None = None) -> Audited:
        """What a replay of the first SHORT steps finds, and a replay of the whole epoch, with one thread and whole batches.

        `claimed`: what the author says about its device, if that is not the truth.
        """
        author = claimed or result.made
        replayed = self._replayed(result, parent, author)
        whole, by_steps = finding_of(replayed, author), {}
        for steps in range(SHORT, STEPS + 1):
            few = replayed.model_copy(update={"losses": replayed.losses[:steps], "drift": None, "noise": None})
            by_steps[steps] = finding_of(few, author)
        convicts = {steps: (whole if found.closer else found).outcome == "invalid" for steps, found in by_steps.items()}
        chance = sum(share for steps, share in DRAWN.items() if convicts[steps])
        return Audited(by_steps[SHORT], chance, whole, replayed.drift, replayed.noise)

    def _replayed(self, result: Result, parent: Result | None, author: TrainedWith) -> EpochReplayed:
        """The worker's answer; an earlier one, where it would be the same."""
        bounds = noise_bounds(author)
        for made, known in self._known.get(result.weights, []):
            clear = known.drift is None or not bounds.near < known.drift <= bounds.far
            same = known.noise is not None and noise_bounds(made).coarse == bounds.coarse
            if made.precision == author.precision and (clear or same):
                return known
        torch.set_num_threads(1)
        job = ReplayEpoch(
            shard=0, epoch=result.epoch - 1, data=self.store.path(self.manifest.shards[0].train.digest),
            weights=parent and parent.weights, state=parent and parent.state, trace=result.trace, precision=author.precision,
            steps=SHORT, epochs=EPOCHS, end=(result.weights, result.state), doubt=bounds,
        )  # fmt: skip
        replayed = self.worker.replay(job)
        self._known.setdefault(result.weights, []).append((author, replayed))
        return replayed
