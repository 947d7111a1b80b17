"""Import torch and the experts' classes in half the processor time, for child processes that only train or check."""

from __future__ import annotations

import gc
import sys

_ABSENT = ("transformers", "scipy", "peft", "bitsandbytes")


def import_experts() -> None:
    """Import diffusers' transformers. Call this before anything else of diffusers is imported.

    It saves time in two places. The garbage collector would walk a million live objects again and again: it is paused. And
    importing any of diffusers' transformers also imports the libraries transformers (text encoders), scipy (schedules),
    peft and bitsandbytes (adapters): diffusers is told that they are not installed, and where it tries nevertheless, the import
    fails as if they were not. Afterwards they can be imported: an expert that is an adapter does so.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import diffusers.utils
        from diffusers.utils import import_utils

        diffusers.utils.USE_PEFT_BACKEND = False  # pyright: ignore[reportPrivateImportUsage] (each forward pass would import peft)
        for library in _ABSENT:
            setattr(import_utils, f"_{library}_available", False)
        blocked = [library for library in _ABSENT if sys.modules.setdefault(library, None) is None]  # type: ignore[arg-type]
        import diffusers.models.transformers

        for library in blocked:
            del sys.modules[library]
    finally:
        if collecting:
            gc.enable()
    gc.freeze()  # imported objects are never freed: the collector can skip them
