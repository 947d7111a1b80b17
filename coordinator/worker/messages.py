"""What the coordinator and its worker process say to each other: one type per job, and the type of its answer.

Each message is one JSON line. The coordinator sends a JobRequest and gets back a JobDone or a JobRefused with the same id. In
between the worker process may send JobProgress, and a SignatureRequest, because no key enters it; the coordinator sends a
SignatureReply.
A line that is none of these is a ValueError at either end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lutetia.protocol.schema.manifest import first_problem
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, TrainedWith
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.process import Message

A = TypeVar("A")
T = TypeVar("T")


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Line, Generic[A]):
    """Something for the worker process to do; `A` is the type of its answer."""

    @classmethod
    def name(cls) -> str:
        """The name of the job in logs and errors."""
        return cls.model_fields["job"].default


class SizesMeasured(_Line):
    """For each shard (bytes of all tensors, number of tensors), of its weights and of its training state."""

    job: Literal["sizes"] = "sizes"
    weights: dict[int, tuple[int, int]]
    state: dict[int, tuple[int, int]]


class MeasureSizes(Job[SizesMeasured]):
    """How large the files of a checkpoint may be, from the manifest's expert."""

    job: Literal["sizes"] = "sizes"


class CostMeasured(_Line):
    """FLOPs of training one sample, by shard."""

    job: Literal["cost"] = "cost"
    flops: tuple[int, ...]


class MeasureCost(Job[CostMeasured]):
    """What training one sample takes, from the manifest's experts."""

    job: Literal["cost"] = "cost"


class FilesInspected(_Line):
    """Nothing is wrong with the files; otherwise the job is refused."""

    job: Literal["inspect"] = "inspect"


class InspectFiles(Job[FilesInspected]):
    """Whether a checkpoint's three files are what the manifest says, and belong together.

    `lanes`: the lane that trained it, or those that were merged into it.
    """

    job: Literal["inspect"] = "inspect"
    shard: int
    epoch: int
    weights: Path
    state: Path
    trace: Path
    lanes: tuple[int, ...] = (0,)


class LossMeasured(_Line):
    """A held-out loss, NaN where training diverged; `by_time` in ten equal bins of the noise time, None for an empty bin.

    `rows` has the loss of each held-out clip with each of its noises, in a fixed order. `drawn`: of the first ones of a drawn
    order, because not all of them fitted into the time.
    """

    job: Literal["loss"] = "loss"
    loss: float
    by_time: tuple[float | None, ...]
    rows: tuple[float, ...] = ()
    drawn: bool = False


class MeasureLoss(Job[LossMeasured]):
    """The held-out loss of `weights`; without them, of the shard's initial model. `raw`: `weights` is a training state, which in
    the compact form is read with the `averages` beside it.

    `draw` fixes the noise, the times and the order in which rows are scored where not all of them fit into `seconds` (None: no
    limit). At least `fewest` rows are scored. `count`, `drawn` and `known`: `models.training.holdout_loss.RowLimits`.
    """

    job: Literal["loss"] = "loss"
    shard: int
    weights: Path | None
    holdout: Path
    draw: str
    raw: bool = False
    averages: Path | None = None
    seconds: float | None = None
    fewest: int = 1
    count: int | None = None
    drawn: bool | None = None
    known: tuple[float, ...] = ()


class TraceRead(_Line):
    """The loss of each step."""

    job: Literal["trace"] = "trace"
    losses: tuple[float, ...]


class ReadTrace(Job[TraceRead]):
    """The losses in a trace file."""

    job: Literal["trace"] = "trace"
    path: Path


class NoiseBounds(_Line):
    """Between which drifts the epoch's own noise is measured, and whether by the coarser way (`models.training.replay`)."""

    near: float
    far: float
    coarse: bool


class EpochReplayed(_Line):
    """The author's losses and the replayed ones (None where training diverged) of the same steps; `made`: with what they were.

    `drift` is the distance between the two ends, measured on the `farthest` part of them, and `noise` that between two replays
    (`models.training.replay`).
    """

    job: Literal["replay"] = "replay"
    published: tuple[float, ...]
    losses: tuple[float | None, ...]
    drift: float | None
    noise: float | None
    made: TrainedWith
    farthest: Literal["parameters", "averages", "moments"] | None = None


class ReplayEpoch(Job[EpochReplayed]):
    """Train the first `steps` steps after `epoch` again, in the author's lane and under a budget of `epochs`.

    With `end` (weights, state) all steps are trained.
    """

    job: Literal["replay"] = "replay"
    shard: int
    lane: int = 0
    epoch: int
    data: Path
    weights: Path | None
    state: Path | None
    trace: Path
    precision: Literal["float32", "bfloat16"]
    moments: Literal["float32", "8bit"] = "float32"
    kept_weights: Literal["float32", "bfloat16"] = "float32"
    steps: int
    epochs: int
    end: tuple[Path, Path] | None = None
    doubt: NoiseBounds | None = None


class EpochMerged(_Line):
    """The files of the merged epoch, which lie as `weights`, `state` and `trace` in the job's folder; its mean training loss."""

    job: Literal["merge"] = "merge"
    weights: BlobRef
    state: BlobRef
    trace: BlobRef
    loss: float


class MergeSource(_Line):
    """An accepted result of one lane. `samples`: what the lane trained, its weight in the mean."""

    lane: int
    samples: int
    weights: Path
    state: Path
    trace: Path


class MergeLanes(Job[EpochMerged]):
    """Write `epoch` of a shard, merged from its lanes, into the empty `folder`.

    `parent`: weights and state of the epoch before it.
    """

    job: Literal["merge"] = "merge"
    shard: int
    epoch: int
    sources: tuple[MergeSource, ...]
    parent: tuple[Path, Path] | None = None
    folder: Path


class RouterReady(_Line):
    """How often the router is right on held-out noisy clips, in all and by noise time; `calibration_error` is its ECE."""

    job: Literal["router"] = "router"
    accuracy: float
    accuracy_by_time: tuple[float, ...]
    calibration_error: float


class TrainRouter(Job[RouterReady]):
    """Train the router on the shards' data and write it to `out`."""

    job: Literal["router"] = "router"
    train: tuple[Path, ...]
    holdout: tuple[Path, ...]
    out: Path


class MixtureReady(_Line):
    """The digest of the mixture that was written; its held-out losses row by row, and how it routes and why, if measured.

    `before`: losses of the current mixture on the same rows, where both were scored at once, on the rows that `rows_of` names.
    """

    job: Literal["stitch"] = "stitch"
    digest: str
    losses: tuple[float, ...] = ()
    routing: str = ""
    before: tuple[float, ...] = ()
    rows_of: str = ""


class MeasureMixture(_Line):
    """Score the mixture on held-out clips before it is written. `choose`: choose its routing by that, too."""

    holdout: tuple[Path, ...]
    draw: str
    seconds: float
    choose: bool


class StitchMixture(Job[MixtureReady]):
    """Replace the mixture in `folder`; `weights` are the files of `accepted`, in the same order. `measure` None: unmeasured."""

    job: Literal["stitch"] = "stitch"
    folder: Path
    weights: tuple[Path, ...]
    accepted: tuple[AcceptanceRecord, ...]
    router: Path | None
    measure: MeasureMixture | None = None


class PartsPrepared(_Line):
    """The parts were written."""

    job: Literal["parts"] = "parts"


class PrepareParts(Job[PartsPrepared]):
    """Write the parts of a mixture that need no weights into the new folder `folder`."""

    job: Literal["parts"] = "parts"
    folder: Path


class GallerySampled(_Line):
    """How many clips were written."""

    job: Literal["gallery"] = "gallery"
    clips: int


class SampleGallery(Job[GallerySampled]):
    """Sample the manifest's prompts from the mixture and replace the folder `out`.

    `real` gets the training clip of `train` (a file per shard) that fits each prompt best, unless it has those already.
    """

    job: Literal["gallery"] = "gallery"
    mixture: Path
    out: Path
    train: tuple[Path, ...] = ()
    real: Path | None = None


AnyJob = Annotated[
    MeasureSizes
    | MeasureCost
    | InspectFiles
    | MeasureLoss
    | ReadTrace
    | ReplayEpoch
    | MergeLanes
    | TrainRouter
    | StitchMixture
    | PrepareParts
    | SampleGallery,
    Field(discriminator="job"),
]
AnyAnswer = Annotated[
    SizesMeasured
    | CostMeasured
    | FilesInspected
    | LossMeasured
    | TraceRead
    | EpochReplayed
    | EpochMerged
    | RouterReady
    | MixtureReady
    | PartsPrepared
    | GallerySampled,
    Field(discriminator="job"),
]


class JobRequest(_Line):
    """To the worker process: do this."""

    kind: Literal["job"] = "job"
    id: int
    job: AnyJob


class SignatureReply(_Line):
    """To the worker process: the signature that it asked for."""

    kind: Literal["signature"] = "signature"
    signature: str


class JobDone(_Line):
    """From the worker process: the answer of the job with this id."""

    kind: Literal["done"] = "done"
    id: int
    answer: AnyAnswer


class JobRefused(_Line):
    """From the worker process: what the job was given is wrong. `check` is the check that a checkpoint's file failed."""

    kind: Literal["refused"] = "refused"
    id: int
    text: str
    check: CheckName | None = None


class LibraryLoaded(_Line):
    """From the worker process, before its first job: its start goes on, which takes minutes on a busy machine."""

    kind: Literal["loaded"] = "loaded"


class JobProgress(_Line):
    """From the worker process, within a job: it goes on. `rows`: the losses of the rows that it has scored, if it scores rows."""

    kind: Literal["progress"] = "progress"
    id: int
    drawn: bool = False
    rows: tuple[float, ...] = ()


class SignatureRequest(_Line):
    """From the worker process, within a job: sign this."""

    kind: Literal["sign"] = "sign"
    message: str


ToWorker = JobRequest | SignatureReply
FromWorker = LibraryLoaded | JobDone | JobRefused | JobProgress | SignatureRequest
_TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])
_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="kind")])


def encode(message: ToWorker | FromWorker) -> Message:
    """`message` as the JSON object that a line carries. NaN and infinity are kept."""
    return message.model_dump(mode="json")


def read_to_worker(line: Any) -> ToWorker:
    """Raises ValueError when `line` is no message to the worker process."""
    return _read(_TO_WORKER, line)


def read_from_worker(line: Any) -> FromWorker:
    """Raises ValueError when `line` is no message from the worker process."""
    return _read(_FROM_WORKER, line)


def _read(adapter: TypeAdapter[T], line: Any) -> T:
    try:
        return adapter.validate_python(line)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
