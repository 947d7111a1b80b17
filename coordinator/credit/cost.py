"""What one sample of each shard costs: written at the creation of a run; of an older run measured once, in a worker process."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lutetia.coordinator.ledger.events import SampleCostMeasured
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed, WorkerRefused
from lutetia.coordinator.worker.messages import MeasureCost
from lutetia.coordinator.worker.time_limits import patience_for

_log = logging.getLogger(__name__)


async def measure_missing_cost(judge_loop: JudgeLoop, worker: Callable[[], WorkerClient]) -> None:
    """Write the cost of samples to a ledger that lacks it. Until then no credit is shown, and none is lost.

    Args:
        judge_loop: writes the event.
        worker: makes a worker process, which is ended here.
    """
    if judge_loop.state.run.flops:
        return
    client = worker()
    try:
        cost = await client.ask(MeasureCost(), limit=patience_for(0))
    except (WorkerFailed, WorkerRefused) as error:
        _log.warning("the credit of peers is not shown, because the cost of a sample cannot be measured: %s", error)
    else:
        await judge_loop.append(SampleCostMeasured(time=judge_loop.now(), flops=cost.flops))
    finally:
        await client.close()
