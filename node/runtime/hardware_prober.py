"""The daemon's side of probing: a trainer child that may crash or hang, a time box, and a memory of what was found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil

from pydantic import ValidationError

from lutetia.node.runtime.trainer_process import TrainerProcess
from lutetia.node.runtime.workspace import RunPaths
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.probe import SECONDS, ProbeQuestion, ProbeResult, question_digest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import DiskError, HardwareError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)


class HardwareProber:
    """The first `find` may reuse what an earlier daemon found on the same question (manifest, wishes, software); later ones ask
    the probe, for the hardware may have changed. `finding` stays until there is a newer one: trainers may be started meanwhile.
    """

    def __init__(self, settings: NodeSettings, places: RunPaths, hands: TrainerProcess) -> None:
        self.settings, self.places, self.hands = settings, places, hands
        self.finding: ProbeResult | None = None
        self._first = True
        self._asking = asyncio.Lock()

    async def find(self, manifest: Manifest) -> ProbeResult:
        """One at a time. Raises HardwareError when the device is missing, or the probe crashed or took too long."""
        async with self._asking:
            finding = await self._find(manifest)
        self.finding = finding
        return finding

    async def _find(self, manifest: Manifest) -> ProbeResult:
        settings = self.settings
        free = shutil.disk_usage(settings.state_folder).free
        question = ProbeQuestion(
            manifest=self.places.manifest, device=settings.device, precision=settings.precision,
            micro_batch=settings.micro_batch, threads=settings.threads,
            free_disk=min(free, settings.disk_limit) if settings.disk_limit else free,
        )  # fmt: skip
        first, self._first = self._first, False
        finding = await asyncio.to_thread(self._remembered, question, manifest) if first else None
        if finding is None:
            finding = await self._ask(question)
            await asyncio.to_thread(self._remember, finding)
        return finding

    def _remembered(self, question: ProbeQuestion, manifest: Manifest) -> ProbeResult | None:
        with contextlib.suppress(OSError, ValidationError):
            finding = ProbeResult.model_validate_json(self.places.finding.read_bytes())
            fits = any(fit.fitness > 0 for fit in finding.shards.values())
            if fits and finding.question == question_digest(question) and question.free_disk >= manifest.hardware.disk_bytes:
                log.info("this box was probed before: %s; %s", finding.device, finding.precision_reason)
                return finding
        return None

    def _remember(self, finding: ProbeResult) -> None:
        with contextlib.suppress(DiskError, OSError):
            write_atomic(self.places.finding, canonical(finding))

    async def _ask(self, question: ProbeQuestion) -> ProbeResult:
        child = await self.hands.take()
        finding: ProbeResult | None = None
        try:
            async with asyncio.timeout(SECONDS):
                await child.send({"do": "probe", "question": question.model_dump(mode="json")})
                message = await anext(child.messages(), None)
            if message and message["say"] == "finding":
                finding = ProbeResult.model_validate(message["finding"])
        except TimeoutError as error:
            raise HardwareError(f"probing the hardware took longer than {SECONDS:.0f} s; look at the driver") from error
        except ConnectionError as error:
            raise HardwareError("the probe of the hardware crashed; look at the log") from error
        finally:
            await (self.hands.give_back(child) if finding else child.kill())
        if finding is None:
            crashed = f"the probe crashed (exit code {child.process.returncode}); look at the log"
            raise HardwareError(message["text"] if message else crashed)
        return finding
