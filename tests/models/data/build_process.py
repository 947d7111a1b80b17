"""Builds data and kills itself during the build: `python build_process.py CLIPS OUT CACHE STAGE COUNT`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings


def main() -> None:
    clips, out, cache, stage, count = sys.argv[1:]

    def on_progress(at: str, done: int, total: int) -> None:
        if at == stage and done == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    build_data(Path(clips), Path(out), BuildSettings(**SMALL, cache=Path(cache)), on_progress)


SMALL: dict[str, Any] = {"experts": 3, "height": 32, "width": 32, "latents": "pixels", "smallest": 12, "workers": 2}

if __name__ == "__main__":
    main()
