"""Lines between the coordinator and its worker process: typed, finite or not, cut or malformed."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import get_args

import pytest

from lutetia.coordinator.worker.client import WorkerClient, WorkerFailed
from lutetia.coordinator.worker.messages import (
    AnyAnswer,
    AnyJob,
    JobDone,
    LossMeasured,
    MeasureSizes,
    encode,
    read_from_worker,
)
from lutetia.system.forked import TEMPLATE
from lutetia.system.process import Child
from tests.coordinator.worker.worker_site import LIMIT

HALTING = """
import os, signal
os.write(1, b'{"text": "whole"}\\n{"text": "ha')
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_half_a_line_of_a_killed_child_ends_its_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TEMPLATE)  # which would not look for modules elsewhere
    (tmp_path / "halting.py").write_text(HALTING)
    child = await Child.start("halting", environment={"PYTHONPATH": str(tmp_path)})
    assert [message async for message in child.messages()] == [{"text": "whole"}]
    assert await child.process.wait() == -signal.SIGKILL


async def test_each_job_has_the_answer_of_its_own_name():
    answers = {answer.model_fields["job"].default: answer for answer in get_args(get_args(AnyAnswer)[0])}
    jobs = get_args(get_args(AnyJob)[0])
    assert len(jobs) == len(answers)
    for job in jobs:
        [base] = [base for base in job.__mro__ if base.__name__.startswith("Job[")]
        assert base.__pydantic_generic_metadata__["args"] == (answers[job.name()],)


async def test_numbers_that_are_not_finite_survive_the_line():
    answer = LossMeasured(loss=math.nan, by_time=(None, math.inf))
    message = read_from_worker(json.loads(json.dumps(encode(JobDone(id=1, answer=answer)))))
    assert isinstance(message, JobDone)
    assert isinstance(message.answer, LossMeasured)
    assert math.isnan(message.answer.loss)
    assert message.answer.by_time == (None, math.inf)


ODD = """
import sys
sys.stdin.readline()
print('LINE', flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "line", ["[]", '{"kind": "done", "id": 1}', '{"kind": "done", "id": 1, "answer": {"job": "inspect"}}', "no JSON"]
)
async def test_malformed_answer_fails_the_job_and_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str):
    (tmp_path / "odd.py").write_text(ODD.replace("LINE", line))
    start = Child.start
    monkeypatch.delenv(TEMPLATE)
    monkeypatch.setattr(Child, "start", lambda *_, **__: start("odd", environment={"PYTHONPATH": str(tmp_path)}))
    worker = WorkerClient(tmp_path / "manifest.json", name="odd", threads=1, nice=0)
    with pytest.raises(WorkerFailed, match="answer to the job sizes cannot be read"):
        await worker.ask(MeasureSizes(), limit=LIMIT)
    assert worker.pid is None
    await worker.close()
