"""Import torch and the experts' classes in half the processor time, for child processes that only train or check."""

from __future__ import annotations

import gc


def import_experts() -> None:
    """Import diffusers' transformers. Call this before anything else of diffusers is imported.

    It saves time in two places. The garbage collector would walk a million live objects again and again: it is paused. And
    importing any of diffusers' transformers also imports the libraries transformers (text encoders) and scipy (schedules):
    diffusers is told that they are not installed, so no text encoder can be loaded in this process.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        from diffusers.utils import import_utils

        for library in ("transformers", "scipy"):
            setattr(import_utils, f"_{library}_available", False)
        import diffusers.models.transformers  # noqa: F401
    finally:
        if collecting:
            gc.enable()
    gc.freeze()  # imported objects are never freed: the collector can skip them
