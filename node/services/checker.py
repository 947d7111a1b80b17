"""Checks by an idle node: ask the coordinator for one, fetch what it needs, carry it out in a trainer process, send a report.

What is fetched for a check lies in a store of its own that is never served: held-out clips and undecided results are nobody
else's business. It is removed when the check ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lutetia.models.data.parts.index import parts_of
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell, is_free
from lutetia.node.services.auditor import NodeAuditor, made_with
from lutetia.node.services.borrowing import (
    Borrowing,
    borrow_when_free,
    clean_up,
    fetch_blob_of,
    fetch_data,
    in_time,
    send_until_taken,
)
from lutetia.node.trainer.checking.questions import CheckQuestion, RouterQuestion
from lutetia.node.trainer.messages import (
    CheckFinished,
    FromTrainer,
    RequestFailed,
    RouterFinished,
    RunCheck,
    RunRouter,
    parse_report,
)
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.check_request import (
    KINDS,
    CheckAnswer,
    CheckJob,
    CheckReport,
    CheckRequest,
    ReplayCheck,
    ResultCheck,
    ask_check,
    sign_check_report,
)
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)

Findings = dict[str, Any]
"""The fields of a CheckReport that a check fills."""


async def run_checks(node: NodeShell, borrowing: Borrowing, store: BlobStore) -> None:
    """Carry out lent checks whenever a device of the node has nothing else to do, until cancelled.

    Only coordinators that lend checks are asked. `store`: for what a check needs; it is emptied first.
    """
    await asyncio.to_thread(empty, store)

    async def once(device: DeviceShell) -> float:
        return await NodeChecker(device, borrowing, store).once()

    await borrow_when_free(node, borrowing, "check", once, lambda: bool(borrowing.lenders))


class NodeChecker:
    """Carries out checks on one device, while it has no work of its own.

    Args:
        shell: the device.
        borrowing: shared with audits.
        store: for what a check needs. It is emptied at the end.
    """

    def __init__(self, shell: DeviceShell, borrowing: Borrowing, store: BlobStore) -> None:
        self.shell, self.borrowing, self.store = shell, borrowing, store
        self._fetched_data: dict[int, list[BlobRef]] = {}

    async def once(self) -> float:
        """Carry out one check if there is one. Returns the seconds until the next question."""
        wait = 0.0
        for peer, addresses in self.shell.network.coordinators:
            if peer not in self.borrowing.lenders:
                continue
            answer = await self._ask(peer, addresses)
            if answer.job is None:
                wait = answer.retry_after
                continue
            await self._carry_out(answer.job, peer, addresses)
            return 0.0
        return wait

    async def _ask(self, peer: str, addresses: tuple[str, ...]) -> CheckAnswer:
        result, network = self.shell.prober.result, self.shell.network
        fit = tuple(sorted(shard for shard, fit in result.shards.items() if fit.fitness > 0)) if result else ()
        request = CheckRequest(owner=network.identity.public_key, kinds=KINDS, shards=fit)
        return await ask_check(network.transport, peer, request, addresses)

    async def _carry_out(self, job: CheckJob, peer: str, addresses: tuple[str, ...]) -> None:
        network, began = self.shell.network, time.monotonic()
        until = [job.until]

        async def still_lent() -> bool:
            """Asking again prolongs the loan. A coordinator that is away or busy ends nothing."""
            try:
                answer = await self._ask(peer, addresses)
            except ConnectionError:
                return True
            if answer.job and answer.job.id == job.id:
                until[0] = answer.job.until
                return True
            return bool(answer.text)

        try:
            findings = await in_time(self._found(job), lambda: is_free(self.shell), lambda: until[0], still_lent)
            if findings is None:
                return
            report = CheckReport(
                run=network.manifest.run_id, owner=network.identity.public_key, id=job.id, seconds=time.monotonic() - began,
                **{"outcome": "done", **findings},
            )  # fmt: skip
            signed = sign_check_report(report, network.identity)

            async def send() -> tuple[float, str]:
                answer = await ask_check(network.transport, peer, signed, addresses)
                return answer.retry_after, answer.text

            await send_until_taken(
                send, lambda attempt: self.shell.rules.backoff(attempt, "check"), until[0], "report of a check"
            )
            log.info("carried out a check (%s) of shard %d for the coordinator: %s", job.kind, job.shard, report.outcome)
        finally:
            await asyncio.to_thread(empty, self.store)
            for shard, blobs in self._fetched_data.items():
                await clean_up(self.shell, shard, blobs)
            self._fetched_data.clear()

    async def _found(self, job: CheckJob) -> Findings:
        """What the check found; a check that cannot be carried out is a finding, too."""
        try:
            if job.result:
                return await self._check_result(job, job.result)
            if job.replay:
                return await self._replay(job.replay)
            return await self._route(job)
        except LutetiaError as error:
            return {"outcome": "failed", "text": str(error)}

    async def _check_result(self, job: CheckJob, asked: ResultCheck) -> Findings:
        named = ("weights", "state", "trace", "holdout", "parent")
        files = await self._fetched({name: getattr(asked, name) for name in named})
        parts = await asyncio.to_thread(parts_of, files["holdout"])
        await self._fetched({str(number): part.blob for number, part in enumerate(parts)})
        model = self.shell.workspace.model_blobs()
        for blob in model:
            await fetch_blob_of(self.shell, blob, {*self.shell.served(), *(ref.digest for ref in model)})
        numbers = asked.model_dump(include={"draw", "rows", "fewest", "seconds"})
        base = self.shell.workspace.base_model()
        values = {**self._common(), **files, **numbers, "shard": job.shard, "epoch": job.epoch, "base": base}
        question = CheckQuestion.model_validate(values)
        report = await self._in_child(RunCheck(question=question).to_wire())
        if not isinstance(report, CheckFinished):
            return _failed(report)
        found = report.findings
        if found.check:
            return {"outcome": "refused", "check": found.check, "text": found.text}
        return {"parent": found.parent, "averages": found.averages, "raw": found.raw}

    async def _replay(self, asked: ReplayCheck) -> Findings:
        replayed = await NodeAuditor(self.shell).replay(asked.audit, (asked.near, asked.far, asked.coarse))
        if replayed is None:
            return _failed(None)
        done = replayed[0]
        return {"losses": done.losses, "drift": done.drift, "noise": done.noise, "made": made_with(done)}

    async def _route(self, job: CheckJob) -> Findings:
        shards = self.shell.network.manifest.shards
        files = await self._fetched({"router": job.router})
        train = tuple([await self._data(shard.index) for shard in shards])
        question = RouterQuestion(
            **self._common(), train=train, router=files.get("router"), out=self.store.root / "router.safetensors"
        )
        report = await self._in_child(RunRouter(question=question).to_wire())
        if not isinstance(report, RouterFinished):
            return _failed(report)
        if job.router is None:  # served from now on, for the coordinator to fetch
            await asyncio.to_thread(self._forget_made)
            self.borrowing.made.append(await asyncio.to_thread(self.shell.network.store.add_file, question.out, True))
        found = report.findings
        return {
            "router": job.router or self.borrowing.made[-1], "accuracy": found.accuracy,
            "accuracy_by_time": found.accuracy_by_time, "calibration_error": found.calibration_error,
        }  # fmt: skip

    async def _data(self, shard: int) -> Path:
        """A shard's training data, which the node keeps only as long as it needs them."""
        path, blobs = await fetch_data(self.shell, shard)
        self._fetched_data[shard] = blobs
        return path

    def _common(self) -> dict[str, Any]:
        result = self.shell.prober.result
        assert result
        return {
            "manifest": self.shell.workspace.paths.manifest, "device": result.device, "threads": self.shell.choice.threads,
        }  # fmt: skip

    async def _fetched(self, refs: dict[str, BlobRef | None]) -> dict[str, Path]:
        wanted = {name: ref for name, ref in refs.items() if ref is not None}
        await asyncio.to_thread(self._make_room, wanted.values())
        return {name: await self.shell.network.fetch_into(self.store, ref) for name, ref in wanted.items()}

    def _make_room(self, refs: Iterable[BlobRef]) -> None:
        """Under a disk limit both stores share it. Blocks on the disk."""
        served = self.shell.network.store
        need = sum(ref.size for ref in refs if not served.has(ref.digest))
        self.shell.workspace.make_room(need, {*self.shell.served(), *(ref.digest for ref in refs)})
        if served.limit_bytes is not None:
            self.store.limit_bytes = max(0, served.limit_bytes - served.used_bytes())

    async def _in_child(self, order: dict[str, Any]) -> FromTrainer | None:
        """The answer of a trainer process, which is ended when the check is cancelled; None if it crashed."""
        trainer, message = self.shell.trainer, None
        child = await trainer.take()
        try:
            await child.send(order)
            message = await anext(child.messages(), None)
        finally:
            await (trainer.give_back(child) if message else child.kill())
        return parse_report(message) if message else None

    def _forget_made(self) -> None:
        """Routers of earlier checks: the coordinator has fetched them, or does not want them. Blocks on the disk."""
        while self.borrowing.made:
            self.shell.network.store.remove(self.borrowing.made.pop().digest)


def empty(store: BlobStore) -> None:
    """Remove what was fetched for a check. Blocks on the disk."""
    for digest in {*store.digests(), *store.arriving()}:
        store.remove(digest)
    (store.root / "router.safetensors").unlink(missing_ok=True)


def _failed(report: FromTrainer | None) -> Findings:
    text = report.text if isinstance(report, RequestFailed) else "the process that checks crashed"
    log.warning("could not carry out a check: %s", text)
    return {"outcome": "failed", "text": text}
