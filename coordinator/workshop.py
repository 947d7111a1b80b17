"""The coordinator's heavy work, in a child process: `python -m lutetia.coordinator.workshop MANIFEST`.

Here alone the coordinator imports torch. It takes one job at a time as a JSON line `{"id", "verb", …}` and answers
`{"id", "done"}` or `{"id", "refused": {"rung"?, "text"}}`. Files are named by path. An unexpected error ends the process; the
parent starts a new one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..protocol.manifest import Manifest, SignedManifest
from ..system.errors import LutetiaError
from ..system.process import Message, ParentChannel

if TYPE_CHECKING:
    from ..models.data.shards import ShardData

_NUMBER_REASONS = ("non-finite", "norm")


class Workshop:
    """The verbs. Each takes the message's other fields and returns what `done` carries."""

    def __init__(self, manifest: Manifest, channel: ParentChannel) -> None:
        self.manifest = manifest
        self._channel = channel

    def limits(self) -> dict[str, Any]:
        """Per shard: most bytes of weights, training state and trace."""
        from ..models.checkpoints import state_schema
        from ..models.experts import weight_schema

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

    def inspect(self, shard: int, weights: str, state: str) -> dict[str, Any]:
        """Weights and training state must be exactly what the manifest says."""
        from ..models.checkpoints import check_state, check_weights

        spec = self.manifest.expert_of(shard)
        check_weights(Path(weights), spec)
        check_state(Path(state), spec, self.manifest.optimisation)
        return {}

    def loss(self, shard: int, weights: str | None, holdout: str) -> dict[str, Any]:
        """Held-out loss of weights, or of the shard's initial model."""
        from ..models.evaluation import holdout_loss

        result = holdout_loss(self.manifest, shard, Path(weights) if weights else None, self._holdout(holdout))
        return {"loss": result.loss, "by_time": list(result.by_time)}

    def _holdout(self, path: str) -> ShardData:
        from ..models.data.shards import load_shard

        if path not in self._holdouts:
            if len(self._holdouts) > 16:
                self._holdouts.clear()
            self._holdouts[path] = load_shard(Path(path), self.manifest.latent)
        return self._holdouts[path]

    @cached_property
    def _holdouts(self) -> dict[str, ShardData]:
        return {}


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _answer(shop: Workshop, message: Message) -> Message:
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
    os.nice(int(os.environ.get("LUTETIA_WORKSHOP_NICE", "0")))
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    manifest = SignedManifest.model_validate_json(Path(sys.argv[1]).read_bytes()).manifest
    shop = Workshop(manifest, channel)
    channel.send({"ready": os.getpid()})
    for message in channel.messages():
        channel.send(_answer(shop, message))


if __name__ == "__main__":
    main()
