"""The messages between supervisor and trainer process: what each end reads of what the other sends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.messages import (
    AllowTraining,
    CheckpointWritten,
    DiskReport,
    ExitReport,
    FromTrainer,
    LocalStateSaved,
    ProgressReport,
    ReplayFinished,
    ReplayQuestion,
    RequestFailed,
    RunProbe,
    RunReplay,
    SetDutyCycle,
    StartTraining,
    StopTraining,
    ToTrainer,
    TrainerReady,
    parse_order,
    parse_report,
)
from lutetia.node.trainer.probe import ProbeQuestion
from lutetia.protocol.schema.records import TrainedWith
from tests.node.checkpoint_files import kept

ORDERS: list[ToTrainer] = [
    RunProbe(question=ProbeQuestion(manifest=Path("/run/manifest.json"), free_disk=1)),
    RunReplay(
        question=ReplayQuestion(
            manifest=Path("/m"), shard=0, epoch=1, epochs=2, steps=3, data=Path("/d"), precision="float32", device="cpu"
        )
    ),
    StartTraining(
        assignment=Assignment(
            manifest=Path("/m"), shard=0, data=Path("/d"), folder=Path("/f"), epoch=0, parent=None, until=2, device="cpu"
        )
    ),
    AllowTraining(until=3),
    SetDutyCycle(share=0.5),
    StopTraining(save=True),
]
REPORTS: list[FromTrainer] = [
    ReplayFinished(losses=(0.5, None), drift=None, made=TrainedWith()),
    RequestFailed(text="no such device"),
    TrainerReady(epoch=1, step=2, device="cpu"),
    ProgressReport(epoch=1, step=2, steps=10, samples=8, loss=0.5, rate=1.0),
    LocalStateSaved(epoch=1, step=2),
    CheckpointWritten(kept=kept(1, None)),
    DiskReport(full=True, text="no space"),
    ExitReport(reason="stopped", text=""),
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.do)
def test_order_survives_the_wire(order: ToTrainer):
    assert parse_order(json.loads(json.dumps(order.to_wire()))) == order


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.say)
def test_report_survives_the_wire(report: FromTrainer):
    assert parse_report(json.loads(json.dumps(report.to_wire()))) == report


def test_unknown_kinds_and_fields_are_ignored():
    assert parse_order({"do": "dance"}) is None
    assert parse_report({"say": ["no", "kind"]}) is None
    assert parse_order({"do": "allow", "until": 3, "since": 1}) == AllowTraining(until=3)


def test_missing_field_raises():
    with pytest.raises(ValueError, match="until"):
        parse_order({"do": "allow"})


def test_messages_import_no_torch():
    script = "import sys, lutetia.node.trainer.messages; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
