"""`lutetia init`: look at clips and machine, choose, and write the settings file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lutetia.cli.arguments import read_config, settings_of
from lutetia.cli.init.proposal import BudgetChoice, ClipFacts, DataChoice, Measured, choose_budget, choose_data
from lutetia.cli.init.settings_file import render
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.models.data.decode.cut import ClipLook, ClipRefused
from lutetia.models.data.decode.pool import DecoderPool, in_pool
from lutetia.models.data.ingest.listing import Listing, read_listing
from lutetia.node.trainer.devices import Accelerators, choose_device
from lutetia.system.errors import ConfigError, DataError
from lutetia.system.files import write_atomic

_LOOKED_AT = 200  # clips at most
_WORKERS = 2
_MOST_NAMED = 5  # files in a refusal

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class InitReport:
    """What was found and chosen. `bad` are sentences on clips that cannot be used, `unused` counts other files."""

    data: DataChoice
    budget: BudgetChoice
    measured: Measured
    bad: tuple[str, ...]
    unused: int


def write_settings(clips: Path, file: Path, on_progress: Progress, pipeline: str | None = None) -> InitReport:
    """Write `file` for the clips in the folder `clips`, and for experts that start from a diffusers pipeline if one is named.

    Raises ConfigError (the file exists, the pipeline cannot be used), DataError (no clips, or too few), DiskError.
    """
    if file.exists():
        raise ConfigError(f"{file} exists already and is not overwritten; name another file with --out")
    listing = read_listing(clips)
    facts, refused = _look(listing, on_progress)
    left_out = tuple(each.reason for each in listing.bad) + refused
    try:
        choose_data(facts, has_accelerator=False)  # raises before the slow imports
    except DataError as error:
        named = [*left_out, *(f"{each.name}: {each.reason}" for each in listing.unused)]
        more = f"; and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        raise DataError(f"{error}. Not used: {'; '.join(named[:_MOST_NAMED])}{more}" if named else str(error)) from error
    from lutetia.cli.init.machine import latent_of, measure
    from lutetia.cli.init.pipeline import cost_of, fit_pipeline
    from lutetia.models.data.build_settings import BuildSettings

    device, _ = choose_device("auto", Accelerators.seen())
    data = choose_data(facts, device != "cpu")
    on_progress("machine", 0, 1)
    part = None
    if pipeline is None:
        measured = measure(latent_of(data), data.batch, device)
    else:
        data, latent, expert, pipeline = fit_pipeline(data, pipeline)
        part = expert.noise_part and expert.noise_part.side
        measured = cost_of(expert, latent, data.batch, measure(latent, data.batch, device))
    budget = choose_budget(measured, data.batch)
    on_progress("machine", 1, 1)
    write_atomic(file, render(clips, file, data, budget, measured, pipeline, part).encode())
    for model, table in ((BuildSettings, "data"), (RunSettings, "run"), (ServeSettings, "serve")):
        settings_of(model, str(file), read_config(file, table))  # what was written must be readable
    return InitReport(data, budget, measured, left_out, len(listing.unused))


def _look(listing: Listing, on_progress: Progress) -> tuple[ClipFacts, tuple[str, ...]]:
    """Look at some of the clips; those that cannot be read count as none."""
    places = np.unique(np.linspace(0, len(listing.clips) - 1, min(_LOOKED_AT, len(listing.clips))).round().astype(int))
    chosen = [listing.clips[place] for place in places] if listing.clips else []
    looks: list[ClipLook] = []
    refused: list[str] = []
    with DecoderPool() as pool:
        outcomes = in_pool(chosen, lambda clip: pool.look(clip.path), _WORKERS, pool.close)
        for done, (_, outcome) in enumerate(outcomes, 1):
            if isinstance(outcome, ClipRefused):
                refused.append(str(outcome))
            else:
                looks.append(outcome)
            on_progress("clips", done, len(chosen))
    training = sum(clip.split == "train" for clip in listing.clips) - len(refused)
    return ClipFacts(training, looks, len(chosen) == len(listing.clips)), tuple(refused)
