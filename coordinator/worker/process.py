"""The coordinator's heavy work, in a child process: `python -m lutetia.coordinator.workshop MANIFEST NAME`.

Here alone the coordinator imports torch. It takes one job at a time as a JSON line `{"id", "verb", …}` and answers
`{"id", "done"}` or `{"id", "refused": {"rung"?, "text"}}`. Files are named by path. An unexpected error ends the process; the
parent starts a new one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import LutetiaError
from lutetia.system.files import replace_folder
from lutetia.system.process import Message, ParentChannel, give_way

if TYPE_CHECKING:
    from lutetia.models.data.shards import ShardData
    from lutetia.models.training.checkpoint_io import Precision

_GALLERY_PIXELS = 128  # small clips are enlarged to about this side
LEAN = ("checking", "auditing")
"""Workshops of these names never load a text encoder, and start in half the time."""
_NUMBER_REASONS = ("non-finite", "norm")


class WorkerProcess:
    """The verbs. Each takes the message's other fields and returns what `done` carries."""

    def __init__(self, manifest: Manifest, channel: ParentChannel) -> None:
        self.manifest = manifest
        self._channel = channel
        self._messages = channel.messages()
        self._holdouts: dict[str, ShardData] = {}

    def run(self) -> None:
        """Take jobs until the parent closes the channel."""
        for message in self._messages:
            self._channel.send(_answer(self, message))

    def limits(self) -> dict[str, Any]:
        """Per shard: most bytes of weights, training state and trace."""
        from lutetia.models.experts.families import weight_schema
        from lutetia.models.training.checkpoint_checks import state_schema

        def form(schema: Any) -> list[int]:
            sizes = [_product(shape) * dtype.itemsize for shape, dtype in schema.values() if -1 not in shape]
            return [sum(sizes), len(schema)]

        limits, known = {}, {}
        for shard in self.manifest.shards:
            spec = self.manifest.expert_of(shard.index)
            name = spec.model_dump_json()
            if name not in known:
                required, optional = state_schema(spec, self.manifest.optimisation)
                known[name] = {"weights": form(weight_schema(spec)), "state": form({**required, **optional})}
            limits[str(shard.index)] = known[name]
        return {"shards": limits}

    def inspect(self, shard: int, epoch: int, weights: str, state: str, trace: str) -> dict[str, Any]:
        """Weights and training state must be exactly what the manifest says, and belong together; a trace has a loss per step."""
        from lutetia.models.training.checkpoint_checks import CheckpointMisfit, check_state, check_weights
        from lutetia.models.training.moment_checks import check_moments
        from lutetia.models.training.replay import read_trace

        spec = self.manifest.expert_of(shard)
        check_weights(Path(weights), spec)
        check_state(Path(state), spec, self.manifest.optimisation)
        check_moments(Path(state), self.manifest.optimisation)
        _check_agreement(self.manifest, shard, epoch, Path(weights), Path(state))
        if (steps := len(read_trace(Path(trace)))) != self.manifest.steps_per_epoch:
            text = f"its trace has {steps} losses; an epoch has {self.manifest.steps_per_epoch} steps"
            raise CheckpointMisfit("shape", text)
        return {}

    def loss(self, shard: int, weights: str | None, holdout: str, raw: bool = False) -> dict[str, Any]:
        """Held-out loss of weights, of a state's raw parameters, or of the shard's initial model."""
        from lutetia.models.training.holdout_loss import holdout_loss

        result = holdout_loss(self.manifest, shard, Path(weights) if weights else None, self._holdout(holdout), raw=raw)
        return {"loss": result.loss, "by_time": list(result.by_time)}

    def trace(self, path: str) -> dict[str, Any]:
        """The losses in a trace."""
        from lutetia.models.training.replay import read_trace

        return {"losses": read_trace(Path(path))}

    def replay(
        self, shard: int, epoch: int, data: str, weights: str | None, state: str | None, trace: str, precision: Precision,
        steps: int, epochs: int, end: list[str] | None, doubt: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Replay the first `steps` steps after `epoch` under a budget of `epochs`, or with `end` (weights, state) all of them."""
        from lutetia.models.data.shards import load_shard
        from lutetia.models.training.replay import ReplayDoubt, ReplayEnd, ReplayParent, read_trace, replay, under_budget

        published = read_trace(Path(trace))
        parent = ReplayParent(epoch, *(Path(path) if path else None for path in (weights, state)))
        found = replay(
            under_budget(self.manifest, epochs), shard, load_shard(Path(data), self.manifest.latent), parent, steps,
            end=ReplayEnd(Path(end[0]), Path(end[1])) if end else None, precision=precision, doubt=ReplayDoubt(**doubt) if
            doubt else None,
        )  # fmt: skip
        losses = [loss if math.isfinite(loss) else None for loss in found.losses]
        made = found.made.model_dump()
        said = published[: len(losses)]
        return {"published": said, "losses": losses, "drift": found.drift, "noise": found.noise, "made": made}

    def router(self, train: list[str], holdout: list[str], out: str) -> dict[str, Any]:
        """Train the router on all shards and write it to `out`."""
        from lutetia.models.data.shards import load_shard
        from lutetia.models.mixing.router import train_router, write_router

        def lean(paths: list[str]) -> list[ShardData]:  # all shards are in memory at once
            return [load_shard(Path(path), self.manifest.latent).lean() for path in paths]

        shards, holdouts = lean(train), lean(holdout)
        router, report = train_router(self.manifest, shards, seed=0, holdouts=holdouts)
        write_router(router, Path(out))
        return {"accuracy": report.accuracy, "accuracy_by_time": list(report.accuracy_by_time), "ece": report.ece}

    def stitch(self, folder: str, weights: list[str], accepted: list[dict[str, Any]], router: str | None) -> dict[str, Any]:
        """Replace the mixture folder; the parent signs its description, since no key enters this process."""
        from lutetia.models.mixing.stitch import stitch

        digest = stitch(
            Path(folder), self.manifest, [Path(path) for path in weights], Path(router) if router else None,
            [AcceptanceRecord.model_validate(record, strict=False) for record in accepted], self._signed_by_parent,
        )  # fmt: skip
        return {"digest": digest}

    def _signed_by_parent(self, message: bytes) -> str:
        self._channel.send({"sign": message.decode()})
        return next(self._messages)["signature"]

    def gallery(self, mixture: str, out: str) -> dict[str, Any]:
        """Sample the manifest's prompts, each from its own fixed noise, and replace the folder `out`."""
        from lutetia.models.pipeline import load_pipeline
        from lutetia.models.video_files import to_uint8

        pipeline = load_pipeline(mixture, experts_in_memory=2)
        prompts = list(self.manifest.sampling.prompts)
        frames, _ = pipeline(prompts, seed=0, return_dict=False)
        write_gallery(Path(out), prompts, to_uint8(frames), pipeline.fps)
        return {"clips": len(prompts)}

    def _holdout(self, path: str) -> ShardData:
        from lutetia.models.data.shards import load_shard

        if path not in self._holdouts:
            if len(self._holdouts) > 16:
                self._holdouts.clear()
            self._holdouts[path] = load_shard(Path(path), self.manifest.latent)
        return self._holdouts[path]


def _check_agreement(manifest: Manifest, shard: int, epoch: int, weights: Path, state: Path) -> None:
    """The state must start this shard's next epoch, and its averages be the published weights: whoever goes on needs both.

    Tensor by tensor, so that large experts fit a small coordinator. Raises CheckpointRefused.
    """
    import torch
    from safetensors import safe_open

    from lutetia.models.training.checkpoint_checks import CheckpointMisfit
    from lutetia.models.training.checkpoint_io import read_place

    place = read_place(state, manifest, shard)
    if (place["epoch"], place["step"]) != (epoch, 0):
        raise CheckpointMisfit("header", f"the state is of epoch {place['epoch']}, step {place['step']}; refused")
    with safe_open(state, framework="pt") as states, safe_open(weights, framework="pt") as published:
        for name in states.keys():  # noqa: SIM118 (not a dictionary)
            own = name.removeprefix("ema.")
            if own != name and not torch.equal(states.get_tensor(name), published.get_tensor(own)):
                raise CheckpointMisfit("norm", f"{own} in the state's averages is not the published one; refused")


def write_gallery(out: Path, prompts: list[str], frames: Any, fps: float) -> None:
    """One GIF per prompt from uint8 `frames` [N, F, H, W, 3], and `gallery.json` that names them."""
    from PIL import Image

    from lutetia.models.video_files import write_gif

    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        listed = []
        for index, (prompt, clip) in enumerate(zip(prompts, frames, strict=True)):
            factor = max(1, _GALLERY_PIXELS // max(clip.shape[1:3]))
            pictures = [Image.fromarray(frame).resize((frame.shape[1] * factor, frame.shape[0] * factor), 0) for frame in clip]
            name = f"{index:03d}.gif"
            write_gif(pictures, part / name, fps, shared_palette=False)
            listed.append({"prompt": prompt, "file": name, "seed": index})
        (part / "gallery.json").write_text(json.dumps({"clips": listed}, indent=1, ensure_ascii=False))
        part.chmod(0o755)
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _answer(shop: WorkerProcess, message: Message) -> Message:
    fields = {name: value for name, value in message.items() if name not in ("id", "verb")}
    verb: Callable[..., dict[str, Any]] = getattr(shop, message["verb"])
    try:
        return {"id": message["id"], "done": verb(**fields)}
    except LutetiaError as error:
        refusal: Message = {"text": str(error)}
        if (reason := getattr(error, "reason", None)) is not None:
            refusal["rung"] = "numbers" if reason in _NUMBER_REASONS else "format"
        return {"id": message["id"], "refused": refusal}


def main() -> None:
    """Take jobs until the parent closes the channel."""
    channel = ParentChannel()
    give_way(int(os.environ.get("LUTETIA_WORKSHOP_NICE", "0")))
    if sys.argv[2] in LEAN:
        from lutetia.models.fast_import import import_experts

        import_experts()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    manifest = SignedManifest.model_validate_json(Path(sys.argv[1]).read_bytes()).manifest
    WorkerProcess(manifest, channel).run()
