"""What a coordinator without worker processes needs from torch: one makes it, and ends before anybody is served."""

from __future__ import annotations

import logging
import shutil

from lutetia.coordinator.lending.reserve import files_left, read_reserve
from lutetia.coordinator.lending.runner import read_sizes
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.settings import ServeSettings
from lutetia.coordinator.worker.client import WorkerClient, WorkerRefused
from lutetia.coordinator.worker.messages import MeasureSizes, PrepareParts, SizesMeasured
from lutetia.coordinator.worker.time_limits import patience_for
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import ConfigError
from lutetia.system.files import write_atomic

_log = logging.getLogger(__name__)


def check_lending(folder: RunFolder, settings: ServeSettings) -> None:
    """Raises ConfigError when nobody may be given held-out clips."""
    if settings.checkers:
        return
    reserve = read_reserve(folder)
    if reserve is None:
        raise ConfigError(
            f"lend_checks: nobody may see the held-out clips of {folder.root}; name nodes in the setting checkers, or draw a "
            "reserve with `lutetia coordinator reserve`"
        )
    _log.info("the reserve of held-out clips is good for %s more checks of each shard", list(files_left(reserve, {})))


async def prepare_lending(folder: RunFolder, manifest: Manifest, settings: ServeSettings) -> SizesMeasured:
    """The sizes of all files; they and the mixture's parts are made when the run is first served so, and after an upgrade.

    Raises ConfigError, WorkerFailed.
    """
    digest = digest_of(manifest)
    if folder.parts_of.exists() and folder.parts_of.read_text() == digest:
        return read_sizes(folder.sizes)
    worker = WorkerClient(folder.manifest, name="making", threads=settings.threads, nice=settings.nice)
    _log.info("describing the experts once, in a process that ends before peers are served")
    try:
        sizes = await worker.ask(MeasureSizes(), limit=patience_for(0))
        shutil.rmtree(folder.parts, ignore_errors=True)
        await worker.ask(PrepareParts(folder=folder.parts), limit=patience_for(0))
    except WorkerRefused as error:
        raise ConfigError(str(error)) from error
    finally:
        await worker.close()
    write_atomic(folder.sizes, sizes.model_dump_json().encode())
    write_atomic(folder.parts_of, digest.encode())
    return sizes
