"""Checks by an idle node: ask the coordinator for one, fetch what it needs, carry it out in a trainer process, send a report.

What is fetched for a check lies in a store of its own that is never served: held-out clips and undecided results are nobody
else's business. It is removed when the check ends.
"""

from __future__ import annotations

import asyncio
import logging
import time

from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell, is_free
from lutetia.node.services.auditor import NodeAuditor, made_with
from lutetia.node.services.borrowing import (
    Borrowing,
    borrow_when_free,
    in_time,
    send_until_taken,
)
from lutetia.node.services.check_files import ROUTER, CheckFiles, Findings, empty, failed
from lutetia.node.services.lent_mixture import sample_gallery, score_mixture
from lutetia.node.trainer.checking.questions import CheckQuestion, RouterQuestion
from lutetia.node.trainer.messages import (
    CheckFinished,
    RouterFinished,
    RunCheck,
    RunRouter,
)
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.check_request import (
    KINDS,
    OF_ALL_SHARDS,
    CheckAnswer,
    CheckJob,
    CheckReport,
    CheckRequest,
    ReplayCheck,
    ResultCheck,
    ask_check,
    sign_check_report,
)
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)


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
        self.shell, self.borrowing, self.files = shell, borrowing, CheckFiles(shell, borrowing, store)

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
        whole = len(fit) == len(network.manifest.shards)
        kinds = KINDS if whole else tuple(kind for kind in KINDS if kind not in OF_ALL_SHARDS)
        request = CheckRequest(owner=network.identity.public_key, kinds=kinds, shards=fit)
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
            self.shell.contributions.count_help(time.time(), "checks")
            log.info("carried out a check (%s) of shard %d for the coordinator: %s", job.kind, job.shard, report.outcome)
        finally:
            await self.files.end()

    async def _found(self, job: CheckJob) -> Findings:
        """What the check found; a check that cannot be carried out is a finding, too."""
        try:
            if job.result:
                return await self._check_result(job, job.result)
            if job.replay:
                return await self._replay(job.replay)
            if job.mixture:
                return await score_mixture(self.files, job.mixture)
            if job.gallery:
                return await sample_gallery(self.files, job.gallery)
            return await self._route(job)
        except LutetiaError as error:
            return {"outcome": "failed", "text": str(error)}

    async def _check_result(self, job: CheckJob, asked: ResultCheck) -> Findings:
        named = ("weights", "state", "trace", "holdout", "parent")
        files = await self.files.fetched({name: getattr(asked, name) for name in named})
        await self.files.fetch_parts(files["holdout"])
        await self.files.fetch_base()
        numbers = asked.model_dump(include={"draw", "rows", "fewest", "seconds"})
        place = {"shard": job.shard, "epoch": job.epoch, "lanes": asked.lanes or (0,)}
        values = {**self.files.common(), **files, **numbers, **place, "base": self.files.base()}
        question = CheckQuestion.model_validate(values)
        report = await self.files.in_child(RunCheck(question=question).to_wire())
        if not isinstance(report, CheckFinished):
            return failed(report)
        found = report.findings
        if found.check:
            return {"outcome": "refused", "check": found.check, "text": found.text}
        return {"parent": found.parent, "averages": found.averages, "raw": found.raw}

    async def _replay(self, asked: ReplayCheck) -> Findings:
        replayed = await NodeAuditor(self.shell).replay(asked.audit, (asked.near, asked.far, asked.coarse))
        if replayed is None:
            return failed(None)
        done = replayed[0]
        return {"losses": done.losses, "drift": done.drift, "noise": done.noise, "made": made_with(done)}

    async def _route(self, job: CheckJob) -> Findings:
        shards = self.shell.network.manifest.shards
        files = await self.files.fetched({"router": job.router})
        train = tuple([await self.files.data(shard.index) for shard in shards])
        question = RouterQuestion(
            **self.files.common(), train=train, router=files.get("router"), out=self.files.store.root / ROUTER
        )
        report = await self.files.in_child(RunRouter(question=question).to_wire())
        if not isinstance(report, RouterFinished):
            return failed(report)
        if job.router is None:
            await self.files.serve_made(question.out)
        found = report.findings
        return {
            "router": job.router or self.borrowing.made[-1], "accuracy": found.accuracy,
            "accuracy_by_time": found.accuracy_by_time, "calibration_error": found.calibration_error,
        }  # fmt: skip
