"""The choice of device, precision and micro-batch, each with its reason."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.trainer.devices import (
    Accelerators,
    CudaDevice,
    DeviceMissing,
    XpuDevice,
    choose_device,
    choose_precision,
    missing_code,
    use_device,
)
from lutetia.node.trainer.exit_reasons import TrainerEnded, reason_of
from lutetia.node.trainer.loop import answer_probe
from lutetia.node.trainer.messages import ProbeFinished, RequestFailed
from lutetia.node.trainer.probe import ProbeQuestion, largest_working, probe, question_digest, unmet_need
from lutetia.node.trainer.units.trials import probe_data
from lutetia.protocol.schema.capabilities import PIPELINES
from lutetia.protocol.schema.manifest import HardwareNeeds
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs
from lutetia.protocol.schema.records import Hardware
from lutetia.system.errors import DataError, DiskError, HardwareError
from tests.models.tiny_experts import CONFIGS, tiny_manifest
from tests.node.tiny_run import make_run


def test_largest_micro_batch_that_works():
    tried = []

    def up_to(limit: int):
        return lambda size: tried.append(size) or size <= limit

    assert largest_working(16, up_to(16)) == 16
    assert largest_working(16, up_to(5)) == 4
    assert largest_working(12, up_to(1)) == 1
    assert largest_working(16, up_to(0)) is None
    assert tried[:1] == [16]
    assert tried[-5:] == [16, 8, 4, 2, 1]


NOTHING = Accelerators()
TWO_GPUS = Accelerators(cuda=(CudaDevice("NVIDIA H100", (9, 0)), CudaDevice("Tesla T4", (7, 5))))


def test_device_without_an_accelerator_is_the_cpu():
    assert choose_device("auto", NOTHING) == ("cpu", "cpu: no accelerator that torch can use")
    assert choose_precision("cpu", "auto", NOTHING) == ("float32", "float32: CPU")
    assert choose_precision("cpu", "bfloat16", NOTHING) == ("bfloat16", "bfloat16: as set")
    for wanted in ("cuda", "cuda:3", "mps"):
        with pytest.raises(HardwareError, match=wanted):
            choose_device(wanted, NOTHING)


def test_device_and_precision_follow_the_accelerators():
    assert choose_device("auto", TWO_GPUS) == ("cuda:0", "cuda:0: NVIDIA H100")
    assert choose_device("cuda:1", TWO_GPUS)[0] == "cuda:1"
    assert choose_precision("cuda:0", "auto", TWO_GPUS) == ("bfloat16", "bfloat16: CUDA SM 90")
    assert choose_precision("cuda:1", "auto", TWO_GPUS) == ("float16", "float16 with a scaled loss: CUDA SM 75 has no bfloat16")
    old = Accelerators(cuda=(CudaDevice("GTX 1080", (6, 1)),))
    assert choose_precision("cuda:0", "auto", old) == ("float32", "float32: CUDA SM 61 has neither bfloat16 nor fast float16")
    assert choose_device("auto", Accelerators(mps=True)) == ("mps", "mps: Apple GPU")
    with pytest.raises(HardwareError, match="sees 2 CUDA devices"):
        choose_device("cuda:2", TWO_GPUS)


def test_card_without_code_in_this_torch_is_refused_with_the_reason():
    built_for = ["sm_75", "sm_80", "sm_90", "compute_90"]
    assert missing_code((8, 6), built_for) == missing_code((12, 0), built_for) == missing_code((9, 0), ["gfx90a"]) == ""
    assert missing_code((12, 0), built_for[:-1]).startswith("SM 120, but this torch has code for SM 75 to 90 only")
    old = Accelerators(cuda=(CudaDevice("GTX 1080", (6, 1), missing_code((6, 1), built_for)), CudaDevice("T4", (7, 5))))
    assert choose_device("auto", old) == ("cuda:1", "cuda:1: T4")
    assert choose_device("auto", Accelerators(cuda=old.cuda[:1]))[1].startswith("cpu: GTX 1080 has SM 61")
    with pytest.raises(DeviceMissing, match="GTX 1080 has SM 61, but this torch .* or use cpu"):
        choose_device("cuda", old)


def test_intel_card_is_chosen_and_numbered():
    two = Accelerators(xpu=(XpuDevice("Arc A770"), XpuDevice("Iris Xe", bfloat16=False)))
    assert choose_device("auto", two) == ("xpu:0", "xpu:0: Arc A770")
    assert choose_device("xpu:1", two)[0] == "xpu:1"
    assert choose_precision("xpu:0", "auto", two) == ("bfloat16", "bfloat16: Arc A770")
    assert choose_precision("xpu:1", "auto", two) == ("float32", "float32: Iris Xe has no bfloat16")
    with pytest.raises(DeviceMissing, match="sees 2 XPU devices"):
        choose_device("xpu:2", two)


def test_devices_seen_by_torch_can_be_chosen():
    seen = Accelerators.seen()
    device, _ = choose_device("auto", seen)
    assert torch.ones(2, device=device).sum().item() == 2
    assert len(seen.cuda) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_unmet_need_of_the_run():
    hardware = Hardware(device="cpu", memory_bytes=8 * 10**9, cores=4)
    assert unmet_need(HardwareNeeds(), hardware, 0) is None
    assert "CUDA" in str(unmet_need(HardwareNeeds(cuda=True), hardware, 0))
    assert "16.0 GB of memory" in str(unmet_need(HardwareNeeds(memory_bytes=16 * 10**9), hardware, 0))
    assert "2.0 GB of disk" in str(unmet_need(HardwareNeeds(disk_bytes=2 * 10**9), hardware, 10**9))


def test_probe_runs_the_real_expert(tmp_path: Path):
    run = make_run(tmp_path)
    result = probe(ProbeQuestion(manifest=run.manifest_file, device="cpu", threads=1, free_disk=10**9))
    assert result.fitness == {0: 1.0, 1: 1.0}
    assert result.shards[0].micro_batch == 4
    assert result.samples_per_second > 0
    first, second = result.lines(base_here=False)
    assert "on cpu: " in first
    assert f" at {result.samples_per_second:.3g} samples/s, as probed here" in second
    assert result.hardware.cores >= 1
    poor = make_run(tmp_path / "poor", hardware=HardwareNeeds(cuda=True))
    refused = probe(ProbeQuestion(manifest=poor.manifest_file, device="cpu", free_disk=10**9))
    assert refused.fitness == {0: 0.0, 1: 0.0}
    assert refused.lines(base_here=False) == ()
    assert refused.shards[0].reason == "the run needs a CUDA device"


def test_a_missing_device_is_told_apart_from_a_failed_probe(tmp_path: Path):
    run = make_run(tmp_path)
    answer = answer_probe(ProbeQuestion(manifest=run.manifest_file, device="cuda:63", free_disk=10**9))
    assert isinstance(answer, RequestFailed)
    assert answer.device_missing
    assert "cuda:63" in answer.text
    torn = answer_probe(ProbeQuestion(manifest=run.manifest_file, device="cpu", threads=1, free_disk=10**9))
    assert isinstance(torn, ProbeFinished)


@pytest.mark.parametrize("device", ["cuda:63", "xpu:63"])
def test_missing_card_is_left_to_the_probe_to_report(device: str) -> None:
    use_device(device, None)
    use_device(device, 1 << 30)


MISSING = DeviceMissing("device cuda is set, but torch sees 0 CUDA devices; check the driver, or use cpu")


async def test_only_a_device_that_never_was_there_ends_the_daemon():
    fed = []

    class Prober:
        result: object = None

        async def probe(self, manifest: object) -> None:
            raise MISSING

    node = SimpleNamespace(device_missing=lambda: fed.append("missing"))
    shell = SimpleNamespace(prober=Prober(), manifest=None, feed=fed.append, found=False, node=node)
    with pytest.raises(HardwareError, match="torch sees 0 CUDA devices"):
        await DeviceShell._probe(shell)  # type: ignore[arg-type]
    shell.prober.result = "an earlier finding"
    await DeviceShell._probe(shell)  # type: ignore[arg-type]
    assert [getattr(event, "reason", event) for event in fed] == ["missing", str(MISSING)]


def test_expert_unfit_for_the_latents_has_fitness_zero(tmp_path: Path):
    run = make_run(tmp_path, expert=ExpertSpec(class_name="NoSuchTransformer3DModel", config={}))
    result = probe(ProbeQuestion(manifest=run.manifest_file, device="cpu", threads=1, free_disk=10**9))
    assert result.fitness == {0: 0.0, 1: 0.0}
    assert "NoSuchTransformer3DModel" in result.shards[0].reason


def test_question_digest_depends_on_the_question(tmp_path: Path):
    run = make_run(tmp_path)
    question = ProbeQuestion(manifest=run.manifest_file, free_disk=1)
    assert question_digest(question) == question_digest(question.model_copy(update={"free_disk": 2}))
    assert question_digest(question) != question_digest(question.model_copy(update={"device": "cpu"}))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out-of-memory"),
        (MemoryError(), "out-of-memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), "out-of-memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "hardware"),
        (DiskError("full"), "disk-full"),
        (TrainerEnded("bad-shard", "torn"), "bad-shard"),
    ],
)
def test_reason_of_known_errors(error: Exception, reason: str):
    known = reason_of(error)
    assert known is not None
    assert known[0] == reason


def test_reason_of_unknown_errors_is_none():
    assert reason_of(RuntimeError("shapes do not match")) is None
    assert reason_of(DataError("of a shard")) == ("bad-shard", "of a shard")


def test_probe_of_an_expert_that_is_told_its_padding_takes_dropped_texts():
    expert = ExpertSpec(
        class_name="HunyuanVideoTransformer3DModel", config=CONFIGS["HunyuanVideoTransformer3DModel"],
        inputs=ExpertInputs(masked=True),
    )  # fmt: skip
    manifest = tiny_manifest(expert=expert, optimisation={"text_dropout": 1.0}, needs=(PIPELINES,))
    trainer = ExpertTrainer(manifest, 0, probe_data(manifest), base="random")
    assert math.isfinite(trainer.step())
