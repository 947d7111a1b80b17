"""The supervisor's side of probing: a trainer process that may crash or hang, a time limit, and a file with the last result."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable

from pydantic import ValidationError

from lutetia.node.device_settings import DeviceChoice
from lutetia.node.runtime.devices.inventory import hardware_mark
from lutetia.node.runtime.devices.trainer_process import TrainerProcess
from lutetia.node.runtime.workspace import RunPaths
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.devices import DeviceMissing
from lutetia.node.trainer.messages import ProbeFinished, RequestFailed, RunProbe, parse_report
from lutetia.node.trainer.probe import PROBE_SECONDS, ProbeQuestion, ProbeResult, question_digest
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import DiskError, HardwareError
from lutetia.system.files import write_atomic

log = logging.getLogger(__name__)


class HardwareProber:
    """Probes the hardware, one probe at a time.

    The first probe may reuse the result of an earlier daemon with the same question (manifest, settings, software, and the cards,
    processors and drivers of this machine). Later ones run: something is wrong then. `result` stays until there is a newer one:
    trainers may start meanwhile.

    Args:
        settings: the volunteer's settings.
        choice: the device and what it may take.
        paths: the run's paths.
        trainer: where processes come from.
        hardware: names this machine's hardware; see `hardware_mark`.
    """

    def __init__(
        self,
        settings: NodeSettings,
        choice: DeviceChoice,
        paths: RunPaths,
        trainer: TrainerProcess,
        hardware: Callable[[], str] = hardware_mark,
    ) -> None:
        self.settings, self.choice, self.paths, self.trainer, self._hardware = settings, choice, paths, trainer, hardware
        self.result: ProbeResult | None = None
        self._first = True
        self._probing = asyncio.Lock()

    async def probe(self, manifest: Manifest) -> ProbeResult:
        """Raises DeviceMissing, or HardwareError when the probe crashed or took longer than PROBE_SECONDS."""
        async with self._probing:
            result = await self._probe(manifest)
        self.result = result
        return result

    async def _probe(self, manifest: Manifest) -> ProbeResult:
        settings = self.settings
        free = shutil.disk_usage(settings.state_folder).free
        question = ProbeQuestion(
            manifest=self.paths.manifest, device=self.choice.torch_name, precision=settings.precision,
            micro_batch=settings.micro_batch, threads=self.choice.threads, memory=self.choice.memory,
            kernels=settings.kernels,
            hardware=await asyncio.to_thread(self._hardware),
            free_disk=min(free, settings.disk_limit) if settings.disk_limit else free,
        )  # fmt: skip
        first, self._first = self._first, False
        result = await asyncio.to_thread(self._saved, question, manifest) if first else None
        if result is None:
            result = await self._run(question)
            await asyncio.to_thread(self._save, result)
        return result

    def _saved(self, question: ProbeQuestion, manifest: Manifest) -> ProbeResult | None:
        with contextlib.suppress(OSError, ValidationError):
            result = ProbeResult.model_validate_json(self.paths.probe_result(self.choice.name).read_bytes())
            fits = any(fit.fitness > 0 and fit.result_bytes for fit in result.shards.values())
            if fits and result.question == question_digest(question) and question.free_disk >= manifest.hardware.disk_bytes:
                log.info("using the saved probe result: %s; %s", result.device, result.precision_reason)
                return result
        return None

    def _save(self, result: ProbeResult) -> None:
        with contextlib.suppress(DiskError, OSError):
            write_atomic(self.paths.probe_result(self.choice.name), canonical(result))

    async def _run(self, question: ProbeQuestion) -> ProbeResult:
        child = await self.trainer.take()
        result: ProbeResult | None = None
        report = None
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await child.send(RunProbe(question=question).to_wire())
                message = await anext(child.messages(), None)
            report = parse_report(message) if message else None
            if isinstance(report, ProbeFinished):
                result = report.finding
        except TimeoutError as error:
            raise HardwareError(f"the hardware probe took longer than {PROBE_SECONDS:.0f} s; check the driver") from error
        except ConnectionError as error:
            raise HardwareError("the hardware probe crashed; look at the log") from error
        finally:
            await (self.trainer.give_back(child) if result else child.kill())
        if result is None:
            crashed = f"the hardware probe crashed (exit code {child.process.returncode}); look at the log"
            if isinstance(report, RequestFailed) and report.device_missing:
                raise DeviceMissing(report.text)
            raise HardwareError(report.text if isinstance(report, RequestFailed) else crashed)
        return result
