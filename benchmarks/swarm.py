"""A served run with the demo's expert, as real processes, for benchmarks."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutetia.cli.local.poller import ask_node, polls, read_status
from lutetia.cli.local.processes import LocalSwarm, free_port
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data import recipe
from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.ingest.synthetic import make_clips
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.manifest import Manifest, SignedManifest

CLIPS = 160
POLL = 0.1


@dataclass
class Site:
    """A run's folder, manifest, training data and the processes around it."""

    folder: Path
    ticket: str
    manifest: Manifest
    data: ShardData
    swarm: LocalSwarm

    async def join(self, name: str) -> Path:
        """Start a node with one thread; returns its state folder."""
        state = self.folder / name
        await self.swarm.join(name, self.ticket, state, "--threads", "1")
        return state

    async def until(self, state: Path, condition) -> dict[str, Any]:
        """The node's first status document for which `condition` holds."""
        async for _ in polls(self.swarm, POLL):
            status = await ask_node(state)
            if status and condition(status):
                return status
        raise AssertionError("polls() does not end")


@contextlib.asynccontextmanager
async def site(**run: Any) -> AsyncIterator[Site]:
    """A run with one shard of the demo's clips and the demo's expert, being served; `run` overrides its settings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_clips(folder / "clips", CLIPS, 0, recipe.CLIPS["frames"], recipe.CLIPS["size"])
        build_data(folder / "clips", folder / "data", BuildSettings(**{**recipe.DATA, "experts": 1, "cache": folder / "cache"}))
        address = f"127.0.0.1:{free_port()}"
        created = create_run(folder / "data", folder / "run", RunSettings(preset="demo", experts=1, addresses=(address,), **run))
        manifest = SignedManifest.model_validate(json.loads((folder / "run/manifest.json").read_bytes())).manifest
        data = load_shard(next((folder / "data/shards").glob("*train.safetensors")), manifest.latent)
        async with LocalSwarm(folder / "logs") as swarm:
            await swarm.serve(folder / "run")
            async for _ in polls(swarm, POLL):
                if read_status(folder / "run"):
                    break
            yield Site(folder, created.ticket, manifest, data, swarm)
