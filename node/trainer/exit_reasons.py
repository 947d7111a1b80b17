"""Maps errors to the exit reasons that the supervisor acts on."""

from __future__ import annotations

import torch

from lutetia.models.training.trainer import TrainingDiverged
from lutetia.node.machine.messages import Exit
from lutetia.system.errors import DataError, DiskError, IntegrityError, LutetiaError


class TrainerEnded(LutetiaError):
    """The trainer cannot continue, for `reason`."""

    def __init__(self, reason: Exit, text: str) -> None:
        super().__init__(text)
        self.reason: Exit = reason


def reason_of(error: BaseException) -> tuple[Exit, str] | None:
    """(exit reason, text) of `error`; None: an unexpected error, which is a bug."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    match error:
        case TrainerEnded():
            return error.reason, str(error)
        case DiskError():
            return "disk-full", str(error)
        case IntegrityError() | DataError():
            return "bad-shard", str(error)
        case TrainingDiverged():
            return "crash", str(error)
        case torch.OutOfMemoryError() | MemoryError():
            return "out-of-memory", text
        case RuntimeError() if "can't allocate memory" in text or "out of memory" in text:
            return "out-of-memory", text
        case torch.AcceleratorError():
            return "hardware", text
        case RuntimeError() if "CUDA error" in text or "CUDA driver" in text:
            return "hardware", text
    return None
