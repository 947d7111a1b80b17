"""A run with its coordinators and boxes, all real processes, and the invariants that hold whatever happens to them."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lutetia.coordinator.admin.create import CreatedRun, create_run
from lutetia.coordinator.ledger.events import CheckpointAccepted, Event, read_event
from lutetia.coordinator.settings import RunSettings, tiny_expert
from lutetia.models.training.checkpoint_checks import check_state, check_weights
from lutetia.node.control import ask
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import AuditPolicy, Manifest, Timing
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import LutetiaError
from tests.coordinator.tiny_data import build_tiny, latent_spec
from tests.faults.world.processes import PATIENCE, Member, litter, relatives, start, until

HEARTBEAT = 3.0
LEASE = 3 * HEARTBEAT
STEPS = 20
EPOCHS = 4000
MODEST = ("--device", "cpu", "--threads", "1", "--duty", "0.2")
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_run(folder: Path, address: str, *, shards: int = 1, bulky: bool = False, **settings: Any) -> CreatedRun:
    """A run of small experts that goes on for hours. With `bulky`, a training state is of several chunks (2.6 MB, else 0.2)."""
    data = build_tiny(folder / "data", shards)
    fields: dict[str, Any] = {
        "name": "faults", "addresses": (address,), "samples_per_shard": EPOCHS * STEPS * 2, "checkpoint_samples": STEPS * 2,
        "optimisation": Optimisation(batch=2, learning_rate=1e-4, warmup_steps=2, ema_decay=0.5), "holdout_tolerance": 10.0,
        "timing": Timing(heartbeat=HEARTBEAT, tenure=60.0), "expert": bulky_expert() if bulky else None,
        "audit": AuditPolicy(replay_steps=0, whole_epoch=0.0),  # tested elsewhere; here they would take the processor
    }  # fmt: skip
    return create_run(data, folder / "disk" / "run", RunSettings(preset="tiny", **{**fields, **settings}))


def bulky_expert() -> ExpertSpec:
    """Many parameters and little arithmetic."""
    config = tiny_expert(latent_spec()).config
    return ExpertSpec(config={**config, "ffn_dim": 4096})


def _ledger(run: Path) -> contextlib.closing[sqlite3.Connection]:
    """To be read beside whoever writes it."""
    return contextlib.closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True, timeout=30))


def events(run: Path) -> list[Event]:
    """The ledger as it stands on disk."""
    with _ledger(run) as connection:
        return [read_event(text) for (text,) in connection.execute("SELECT event FROM events ORDER BY id")]


def accepted(run: Path, shard: int = 0, author: str | None = None) -> int:
    """How many results of a shard (by `author`) the ledger has accepted; cheap, for those who ask often."""
    kind = "event ->> '$.kind' = 'checkpoint-accepted'"
    question = f"SELECT count(*) FROM events WHERE {kind} AND event ->> '$.acceptance.shard' = ?"
    with _ledger(run) as connection:
        if author is None:
            return connection.execute(question, (shard,)).fetchone()[0]
        return connection.execute(f"{question} AND event ->> '$.acceptance.author' = ?", (shard, author)).fetchone()[0]


def acceptances(run: Path, shard: int = 0) -> list[AcceptanceRecord]:
    """Of one shard, oldest first."""
    given = [event.acceptance for event in events(run) if isinstance(event, CheckpointAccepted)]
    return [acceptance for acceptance in given if acceptance.shard == shard]


@dataclass
class Coordinator(Member):
    """`lutetia coordinator serve` on the folder `run`."""

    run: Path

    def status(self) -> SwarmStatus:
        return SwarmStatus.model_validate_json((self.run / "status.json").read_bytes())

    def health(self, owner: str) -> str | None:
        return next((node.health for node in self.status().nodes if node.owner == owner), None)

    async def accepts(self, more: int = 1, *, author: str | None = None, shard: int = 0, seconds: float = PATIENCE) -> None:
        """Until `more` further results (of `author`) are accepted."""
        goal = accepted(self.run, shard, author) + more
        what = f"{more} acceptances of {author or 'anybody'}"
        await until(lambda: self.alive() and accepted(self.run, shard, author) >= goal, what, seconds)

    def alive(self) -> bool:
        assert self.running, f"the coordinator ended: {self.words()[-3000:]}"
        return True


@dataclass
class Box(Member):
    """`lutetia join` on a state folder of its own."""

    state: Path

    @property
    def work(self) -> Path:
        """The folder of its work on shard 0."""
        return next(self.state.glob("runs/*/work"), self.state / "none") / "0000"

    async def status(self) -> dict[str, Any]:
        """The local status; empty while the daemon does not answer."""
        with contextlib.suppress(LutetiaError, OSError):
            return await ask(self.state, "status")
        return {}

    async def until(self, seconds: float = PATIENCE, **wanted: Any) -> dict[str, Any]:
        """The first local status in which every field is as wanted (or, for a callable, makes it true)."""
        last: dict[str, Any] = {}

        async def come() -> dict[str, Any] | None:
            nonlocal last
            assert self.running, f"{self.name} ended: {self.words()[-3000:]}"
            last = await self.status() or last
            fits = all(want(last.get(key)) if callable(want) else last.get(key) == want for key, want in wanted.items())
            return last if last and fits else None

        try:
            return await until(come, f"{self.name} to be {wanted}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\nlast: {last}\n{self.words()[-3000:]}") from error

    async def says(self, text: str, start: int = 0) -> None:
        """Until its log has `text`."""
        await until(lambda: text in self.words(start), f"{self.name} to say {text!r}")


@dataclass
class World:
    """One run under `folder`. Its processes are started here and ended by `close`, which also looks for what they left."""

    folder: Path
    run: CreatedRun
    members: dict[str, Member] = field(default_factory=dict)

    async def coordinator(self, prefix: Sequence[str] = ()) -> Coordinator:
        """Serve the run; returns when the first status is there."""
        run, config = self.run.folder, self.folder / "coordinator.toml"
        config.write_text('stitch = "end"\ngallery = false\noffers_per_minute = 1000\n')
        (run / "status.json").unlink(missing_ok=True)
        arguments = ["coordinator", "serve", run, "--config", config]
        member = await start(Coordinator, "coordinator", self.folder, arguments, prefix=prefix, run=run)
        self.members[member.name] = member
        await until(lambda: member.alive() and (run / "status.json").exists(), "the coordinator's first status")
        return member

    async def box(
        self, name: str, *, state: Path | None = None, listen: str = LOOPBACK, prefix: Sequence[str] = (),
        program: Sequence[str | Path] = ("-m", "lutetia.cli"), environment: Mapping[str, str] | None = None,
    ) -> Box:  # fmt: skip
        """A box joins, or comes back with the state that it had."""
        state = state or self.folder / name
        arguments = ["join", self.run.ticket, "--state-folder", state, "--listen", listen, *MODEST]
        settings = {"LUTETIA_SAVE_EVERY": "1", **(environment or {})}
        member = await start(Box, name, self.folder, arguments, environment=settings, prefix=prefix, program=program, state=state)
        self.members[name] = member
        return member

    def check(self) -> None:
        """I1 and I6, wherever the run stands now; I2 and I3 for what was accepted last."""
        check_lineage(self.run.folder)
        check_bytes(self.run.folder, self.run.manifest)
        check_health(self.run.folder)

    async def close(self) -> None:
        """End everything, then I5: no process, port, socket, temporary or half-written file is left."""
        try:
            for member in self.members.values():
                if member.running:
                    member.signal_all(signal.SIGCONT)
                    await member.end(signal.SIGTERM if isinstance(member, Coordinator) else signal.SIGKILL)
            await until(lambda: not relatives(self.folder), "no process to be left")
            self.check_remains()
        finally:
            for member in self.members.values():
                if member.running:
                    for one in member.family():
                        one.kill()
                    await member.process.wait()

    def check_remains(self) -> None:
        check_lineage(self.run.folder)
        for member in self.members.values():
            if isinstance(member, Coordinator) and member.process.returncode == 0:  # who is killed leaves it to the next start
                assert not (left := litter(member.run)), left
        left = [path for path in (self.folder / "tmp").rglob("*") if not path.is_dir()]
        assert not left, f"temporary files are left: {left}"
        if self.port:
            with socket.create_server(("127.0.0.1", self.port)):
                pass  # the port is free again

    @property
    def port(self) -> int:
        """The coordinator's, where it is on loopback; else 0."""
        address = Ticket.decode(self.run.ticket).addresses[0].split("/")
        return int(address[4]) if address[2] == "127.0.0.1" else 0


def check_lineage(run: Path) -> None:
    """I1: one accepted checkpoint per (shard, epoch), each on its predecessor."""
    lineages: dict[int, list[AcceptanceRecord]] = defaultdict(list)
    for event in events(run):
        if isinstance(event, CheckpointAccepted):
            lineages[event.acceptance.shard].append(event.acceptance)
    for lineage in lineages.values():
        assert [one.epoch for one in lineage] == list(range(1, len(lineage) + 1))
        assert [one.parent for one in lineage] == [None, *(one.checkpoint for one in lineage[:-1])]


def check_bytes(run: Path, manifest: Manifest) -> None:
    """I2 and I3: what was accepted last is here whole, hashes to its name and has the manifest's shapes."""
    store = BlobStore(run / "blobs")
    for shard in range(len(manifest.shards)):
        if lineage := acceptances(run, shard):
            last = lineage[-1]
            store.verify(last.weights.digest)
            store.verify(last.state.digest)
            check_weights(store.path(last.weights.digest), manifest.expert_of(shard))
            check_state(store.path(last.state.digest), manifest.expert_of(shard), manifest.optimisation)


def check_health(run: Path) -> None:
    """I6: nobody is called working whose last accepted work is older than what is due."""
    status = SwarmStatus.model_validate_json((run / "status.json").read_bytes())
    for node in status.nodes:
        if node.health == "working":
            assert node.last_accepted is not None
            assert node.shard is not None
            due = status.shards[node.shard].due
            assert due is None or status.time <= due + 1


@contextlib.asynccontextmanager
async def world(folder: Path, address: str | None = None, **settings: Any) -> AsyncIterator[World]:
    """A run without processes yet; none is left at the end."""
    place = World(folder, make_run(folder, address or f"127.0.0.1:{free_port()}", **settings))
    try:
        yield place
    finally:
        await place.close()
