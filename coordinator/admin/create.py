"""`run create`: make a run's folder from built data and settings, whole or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lutetia.coordinator.addresses import multiaddr, split_address
from lutetia.coordinator.admin.base import keep_base, with_base
from lutetia.coordinator.admin.pipeline_settings import check_first_frame, pipeline_needs, with_first_frame, with_pipeline
from lutetia.coordinator.admin.upgrade import published
from lutetia.coordinator.galleries import copy_sheets
from lutetia.coordinator.holdouts import holdout_store
from lutetia.coordinator.ledger.events import RunCreated
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import Endpoint, RunFolder
from lutetia.coordinator.settings import RunSettings, small_expert, tiny_expert
from lutetia.models.data.description import DataDescription, DataFile, files_of, read_data
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.audit_request import MAX_STEPS
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import CAPTIONS, COMPACT, LANES, PICTURES, SHARD_PARTS
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, ShardSpec, SignedManifest, first_problem, needed_capabilities
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import ConfigError, IntegrityError
from lutetia.system.files import disk_errors, fsync_folder, make_folder, write_atomic

if TYPE_CHECKING:
    from lutetia.models.warm_start import InitialWeights

_log = logging.getLogger(__name__)
_DAY = 86400.0
_SEEDED_TIME = 1_767_225_600.0  # 2026-01-01, when all seeded runs are created


@dataclass(frozen=True)
class CreatedRun:
    """What `create_run` made. `ticket` is the text that volunteers paste."""

    run: str
    folder: Path
    ticket: str
    manifest: Manifest


@dataclass(frozen=True)
class RunSecrets:
    """What makes two runs of equal settings differ: their keys and their time of creation (Unix seconds)."""

    owner: Identity
    coordinator: Identity
    time: float

    @classmethod
    def now(cls) -> RunSecrets:
        """New keys, for every real run."""
        return cls(Identity.generate(), Identity.generate(), time.time())

    @classmethod
    def of_seed(cls, seed: str) -> RunSecrets:
        """The same keys for the same seed, so that equal data give equal weights. Anyone can forge them: for loopback only."""
        return cls(Identity.derived(f"owner|{seed}"), Identity.derived(f"coordinator|{seed}"), _SEEDED_TIME)


def create_run(data: Path, folder: Path, settings: RunSettings | None = None, birth: RunSecrets | None = None) -> CreatedRun:
    """Make `folder` a run on the built data in `data`: keys, signed manifest, blobs, ticket, ledger.

    After an error `folder` is as before.

    Raises:
        ConfigError: the folder exists, the number of experts is not that of clusters, a shard is smaller than a batch, epochs are
            too long for audits, the expert or its first weights do not fit, or the preset is unknown.
        DataError: there is no built data.
        IntegrityError: a shard file has changed since it was built.
        DiskError: the disk cannot be written.
    """
    settings = (settings or RunSettings()).resolved()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; a run is never overwritten, name a new folder")
    description = read_data(data)
    _check_experts(settings, description)
    settings = _with_batch_that_fits(settings, description)
    birth = birth or RunSecrets.now()
    owner, coordinator = birth.owner, birth.coordinator
    settings, base = with_base(settings)
    settings = with_pipeline(settings, description.latent)
    sources = _warm_start(settings, description)
    manifest = _manifest(settings, description, owner, coordinator, birth.time, sources)
    _check_epochs(manifest)
    _check_expert(manifest)
    with disk_errors(folder):
        make_folder(folder.absolute().parent)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.absolute().parent))
        try:
            manifest = _warmed(manifest, sources, part)
            ticket = _fill(RunFolder(part), data, description, manifest, owner, coordinator, settings)
            keep_base(RunFolder(part), manifest, base)
            part.chmod(0o755)
            os.rename(part, folder)  # replaces at most an empty folder; otherwise it fails
            fsync_folder(folder.absolute().parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return CreatedRun(manifest.run_id, folder, ticket.encode(), manifest)


def _check_experts(settings: RunSettings, description: DataDescription) -> None:
    clusters = len(description.shards)
    if settings.experts is not None and settings.experts != clusters:
        more = "more" if settings.experts > clusters else "fewer"
        raise ConfigError(
            f"the settings want {settings.experts} experts, {more} than the data have clusters ({clusters}); "
            f"build the data with --experts {settings.experts} or drop the setting"
        )


def _with_batch_that_fits(settings: RunSettings, description: DataDescription) -> RunSettings:
    """The settings; the default batch is made as small as the smallest shard needs. A batch that was set is kept."""
    optimisation, smallest = settings.optimisation, min(shard.train.clips for shard in description.shards)
    if "batch" in optimisation.model_fields_set or optimisation.batch <= smallest:
        return settings
    batch = next(size for size in range(smallest, 0, -1) if settings.checkpoint_samples % size == 0)
    _log.warning("the batch is %d instead of %d, because a shard has %d training clips", batch, optimisation.batch, smallest)
    changed = {**{name: getattr(optimisation, name) for name in optimisation.model_fields_set}, "batch": batch}
    return settings.model_copy(update={"optimisation": Optimisation(**changed)})


def _check_epochs(manifest: Manifest) -> None:
    """Raises ConfigError when an epoch has more steps than an audit may replay."""
    audited = manifest.audit.audits
    if audited and (steps := manifest.steps_per_epoch) > MAX_STEPS:
        raise ConfigError(
            f"an epoch of {steps} steps is too long for its audits, which replay at most {MAX_STEPS}; "
            f"set checkpoint_samples to at most {MAX_STEPS * manifest.optimisation.batch}"
        )


def _check_expert(manifest: Manifest) -> None:
    """Raises ConfigError when an expert cannot take the latents: better now than on a volunteer's machine."""
    from lutetia.models.experts.families import check_fits

    for spec in {canonical(spec): spec for spec in (manifest.expert_of(shard.index) for shard in manifest.shards)}.values():
        for latent in manifest.latent.of_buckets:
            check_fits(spec, latent)
        if spec.first_frame is not None:
            check_first_frame(manifest.latent)


def _warm_start(settings: RunSettings, description: DataDescription) -> tuple[InitialWeights, ...]:
    """The first weights of each shard's expert; empty when all start from random weights."""
    if settings.warm_start is None:
        return ()
    from lutetia.models.warm_start import find_sources

    wanted = settings.expert if isinstance(settings.expert, ExpertSpec) else None
    return find_sources(settings.warm_start, [shard.name for shard in description.shards], wanted)


def _warmed(manifest: Manifest, sources: Sequence[InitialWeights], part: Path) -> Manifest:
    """Add the sources' weights to the store of `part`, and return the manifest that names them. Each source is read once."""
    if not sources:
        return manifest
    from lutetia.models.warm_start import warm, write_weights

    store, added = BlobStore(RunFolder(part).blobs), {}
    for source in sources:
        if source.model not in added:
            path = part / "warm-start.safetensors"
            write_weights(source, path)
            added[source.model] = store.add_file(path, move=True)
    return warm(manifest, [added[source.model] for source in sources])


def _expert(settings: RunSettings, latent: LatentSpec, sources: Sequence[InitialWeights]) -> ExpertSpec:
    if sources:
        return sources[0].spec
    if isinstance(settings.expert, ExpertSpec):
        return settings.expert
    return tiny_expert(latent) if settings.preset == "tiny" else small_expert(latent)


def _manifest(
    settings: RunSettings, description: DataDescription, owner: Identity, coordinator: Identity, now: float,
    sources: Sequence[InitialWeights],
) -> Manifest:  # fmt: skip
    total = sum(shard.prior for shard in description.shards)
    specs = [with_first_frame(source.spec, settings) for source in sources]
    experts = specs if any(spec != specs[0] for spec in specs) else [None] * len(description.shards)
    shards = tuple(
        ShardSpec(
            index=shard.index, name=shard.name, train=shard.train.blob, holdout=shard.holdout.blob,
            clips=shard.train.clips, holdout_clips=shard.holdout.clips, prior=shard.prior / total, expert=experts[shard.index],
            data_bytes=shard.train.bytes,
        )
        for shard in description.shards
    )  # fmt: skip
    from lutetia.models.training.memory.forecast import checkpoint_form

    expert = with_first_frame(_expert(settings, description.latent, sources), settings)
    form, why = checkpoint_form(settings.checkpoints, expert)
    _log.info("checkpoints are published in the form %s: %s", form, why)
    try:
        return Manifest(
            name=settings.name, owner=owner.public_key, coordinators=(coordinator.public_key,),
            created=now, expires=now + settings.valid_days * _DAY, latent=description.latent,
            expert=expert, shards=shards, optimisation=settings.optimisation,
            samples_per_shard=settings.samples_per_shard, checkpoint_samples=settings.checkpoint_samples,
            holdout_tolerance=settings.holdout_tolerance, raw_tolerance=settings.raw_tolerance, router=settings.router,
            sampling=settings.sampling,
            timing=settings.timing, audit=settings.audit, hardware=settings.hardware, allowlist=settings.allowlist,
            needs=(
                SHARD_PARTS, *needed_capabilities(expert, settings.optimisation),
                *pipeline_needs(expert, description.latent, settings.sampling), *([COMPACT] * (form == "compact")),
                *([LANES] * (settings.team is not None)), *([PICTURES] * (description.latent.picture is not None)),
                *([CAPTIONS] * any(shard.train.captions > 1 for shard in description.shards)),
            ),
            checkpoints=form, team=settings.team,
            card=settings.card,
        )  # fmt: skip
    except ValidationError as error:
        raise ConfigError(f"the run's settings do not fit the data: {first_problem(error)}") from error


def _fill(
    run: RunFolder, data: Path, description: DataDescription, manifest: Manifest, owner: Identity, coordinator: Identity,
    settings: RunSettings,
) -> Ticket:  # fmt: skip
    endpoint, ticket = _addresses(settings, manifest, coordinator)
    owner.save(run.owner_key)
    coordinator.save(run.coordinator_key)
    served, holdouts = BlobStore(run.blobs), holdout_store(run)
    for shard in description.shards:
        _import(served, data, shard.train)
        _import(holdouts, data, shard.holdout)
    copy_sheets(data, run.sheets)
    write_atomic(run.manifest, SignedManifest.sign(manifest, owner).to_bytes())
    write_atomic(run.endpoint, canonical(endpoint))
    write_atomic(run.ticket, ticket.encode().encode() + b"\n")
    _begin_ledger(run, manifest)
    return ticket


def _begin_ledger(run: RunFolder, manifest: Manifest) -> None:
    from lutetia.models.study.flops import training_flops

    when = manifest.created
    created = RunCreated(
        time=when, run=manifest.run_id, name=manifest.name, owner=manifest.owner, coordinator=manifest.coordinators[0],
        shards=len(manifest.shards), epochs=manifest.epochs, flops=training_flops(manifest),
    )  # fmt: skip
    ledger = Ledger.create(run.ledger, created)
    ledger.append([published(manifest, manifest.coordinators[0], when)])
    ledger.close()


def _import(store: BlobStore, data: Path, file: DataFile) -> None:
    for path, blob in files_of(data / file.path, file.blob):
        if store.add_file(path) != blob:
            raise IntegrityError(f"{path} has changed since it was built; build the data again")


def _addresses(settings: RunSettings, manifest: Manifest, coordinator: Identity) -> tuple[Endpoint, Ticket]:
    """Listen on loopback when the first address is one, else on all interfaces; the ticket names all addresses."""
    places = [multiaddr(address) for address in settings.addresses]
    host, port = split_address(settings.addresses[0])
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if address is not None and address.is_loopback:
        listen = places[0]
    else:
        listen = f"/ip6/::/tcp/{port}" if address is not None and address.version == 6 else f"/ip4/0.0.0.0/tcp/{port}"
    ticket = Ticket(
        run=manifest.run_id,
        owner=manifest.owner,
        addresses=tuple(f"{place}/p2p/{coordinator.peer_id}" for place in places),
    )
    return Endpoint(listen=listen, announce=tuple(place for place in places if place != listen)), ticket
