"""Import torch and the experts' classes in half the processor time, for children that train or check and do nothing else."""

from __future__ import annotations

import gc


def import_experts() -> None:
    """To be called before anything else of diffusers is imported.

    Two things take the time. The collector looks, again and again, at a million objects none of which is garbage: it rests
    meanwhile. And importing any of diffusers' transformers also imports what loads text encoders (transformers) and samples
    schedules (scipy): this process is told that there are none, so nothing in it can load a text encoder.
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
    gc.freeze()  # what was imported stays: the collector need not look at it again
