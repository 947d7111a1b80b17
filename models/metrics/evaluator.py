"""All metrics of a report, set up once on real clips and then asked about any number of generated sets.

What is fitted (the retrieval probe, the word classifier) is fitted on real training clips; what is compared with (the reference
of the distances, the candidate prompts) are held-out real clips. Generated clips never change a judge.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lutetia.models.device import Device
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.features import Extractor, FeatureCache
from lutetia.models.metrics.fvd import distances
from lutetia.models.metrics.motion import METHOD, MotionExtractor
from lutetia.models.metrics.stats.classifier import CLASSIFIER_NAME, WORDS_NAME, Accuracy, classify, fit_classifier
from lutetia.models.metrics.stats.intervals import Figure, mean
from lutetia.models.metrics.stats.retrieval import PROBE_NAME, Retrieval, fit_probe, retrieve
from lutetia.models.networks.clip import AestheticHead, ClipModel
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.models.networks.i3d import I3DExtractor, Precision
from lutetia.models.networks.sentences import MiniLM
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import ConfigError, DataError

Better = Literal["lower", "higher", "neither"]
Name = Literal["fvd", "motion", "retrieval", "classifier", "clip"]
Array = NDArray[np.float64]
Step = Callable[[str, int, int], None]
logger = logging.getLogger(__name__)


class MetricEntry(Frozen):
    """One line of a report. `real`: the same metric on real held-out clips, or for distances the real-vs-real floor."""

    name: str
    better: Better
    figure: Figure
    real: Figure | None = None
    note: str = ""


class EvaluatorSettings(Frozen):
    """Where weights lie (None: the assets), and what to leave out. `clip` and `aesthetic` are the user's and have no default."""

    metrics: tuple[Name, ...] = ("fvd", "motion", "retrieval", "classifier", "clip")
    cache: Path | None = None
    i3d: Path | None = None
    efficientnet: Path | None = None
    minilm: Path | None = None
    clip: str | None = None
    aesthetic: Path | None = None
    device: Device = "cpu"
    i3d_precision: Precision = "float32"
    resamples: int = 60


class FeaturePair(NamedTuple):
    """What a distance compares: `reference` features [M, D] with `features` [N, D] of clips."""

    reference: Array
    features: Callable[[ClipSet], Array]


class Evaluator:
    """The metrics that this machine has weights for. `left_out` says of the others why.

    `views` (for distances, lower is better) and `values` (one number per clip, higher is better) are the parts of which
    comparisons of two sides are made, see `compare.py`.
    """

    def __init__(
        self,
        fit: ClipSet,
        reference: ClipSet,
        spare: ClipSet | None,
        settings: EvaluatorSettings,
        on_progress: Step | None = None,
    ) -> None:
        """`fit`: real training clips. `reference`: real held-out clips, whose captions are the candidates too. `spare`: further
        real held-out clips for floors and for the scores of real clips; without them floors come from halves of the reference.
        """
        self.settings, self.reference, self.spare, self.on_progress = settings, reference, spare, on_progress
        self.cache = FeatureCache(settings.cache)
        self.candidates = tuple(dict.fromkeys(reference.captions + (spare.captions if spare else ())))
        self.left_out: dict[str, str] = {}
        self.views: dict[str, FeaturePair] = {}
        self.values: dict[str, Callable[[ClipSet], Array]] = {}
        self._judges: list[Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]] = []
        makers: dict[Name, Callable[[ClipSet], Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]]] = {
            "fvd": self._fvd,
            "motion": self._motion,
            "retrieval": self._retrieval,
            "classifier": self._classifier,
            "clip": self._clip,
        }
        for name in settings.metrics:
            try:
                self._judges.append(makers[name](fit))
            except (DataError, ConfigError) as error:
                self.left_out[name] = str(error)
                logger.warning("metric %s is left out: %s", name, error)

    def judge(self, clips: ClipSet, seeds: Sequence[int] = ()) -> list[MetricEntry]:
        """Every metric's entries for `clips`, whose captions must be among the reference's (or the spare clips')."""
        return [entry for judge in self._judges for entry in judge(clips, tuple(seeds))]

    def features(self, extractor: Extractor, clips: ClipSet, name: str, what: str) -> Array:
        """Cached features [N, D]."""
        report = self.on_progress
        step = (lambda done, total: report(what, done, total)) if report else None
        return self.cache.extract(extractor, clips.frames, step)[name].double().numpy()

    def _distance(
        self, extractor: Extractor, key: str, label: str, note: str
    ) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        reference = self.features(extractor, self.reference, key, label)
        spare = self.features(extractor, self.spare, key, label) if self.spare else None

        self.views[label] = FeaturePair(reference, lambda clips: self.features(extractor, clips, key, label))

        def judge(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            rows = self.features(extractor, clips, key, label)
            found = distances(reference, rows, spare=spare, resamples=self.settings.resamples, seeds=seeds)
            return [
                MetricEntry(name=label, better="lower", figure=found.plain, real=found.floor, note=note),
                MetricEntry(
                    name=f"{label}, debiased", better="lower", figure=found.debiased, note="0 for equal distributions at any N"
                ),
                MetricEntry(
                    name=f"{label}, N to infinity", better="lower", figure=found.at_infinity, note="too high where N < 400"
                ),
                MetricEntry(name=f"{label}, kernel distance", better="lower", figure=found.kernel, real=found.kernel_floor),
            ]

        return judge

    def _fvd(self, fit: ClipSet) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        self.i3d = self._network()
        exact = "" if self.i3d.precision == "float32" else f" in {self.i3d.precision}"
        return self._distance(self.i3d, "logits", "FVD", f"I3D Kinetics-400 logits{exact}, 224 px; compare at equal N only")

    def _network(self) -> I3DExtractor:
        return I3DExtractor(self.settings.i3d, self.settings.device, precision=self.settings.i3d_precision)

    def _motion(self, fit: ClipSet) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        extractor = MotionExtractor()
        note = f"Fréchet distance of optical-flow fields ({METHOD}); colours and shapes do not enter"
        distance = self._distance(extractor, "field", "motion distance", note)
        real = mean(self.features(extractor, self.reference, "speed", "motion")[:, 0])

        def judge(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            speed = mean(self.features(extractor, clips, "speed", "motion")[:, 0], seeds=seeds)
            size = f"{clips.frames.shape[3]}x{clips.frames.shape[2]} px, {METHOD}"
            return [
                *distance(clips, seeds),
                MetricEntry(name="motion, px/frame", better="neither", figure=speed, real=real, note=size),
            ]

        return judge

    def _retrieval(self, fit: ClipSet) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        extractor, encode = self._network(), MiniLM(self.settings.minilm)
        probe = fit_probe(self.features(extractor, fit, "pooled", PROBE_NAME), encode(fit.captions).numpy())
        vectors = encode(self.candidates).numpy()

        def found_in(clips: ClipSet, seeds: tuple[int, ...] = ()) -> Retrieval:
            rows = self.features(extractor, clips, "pooled", PROBE_NAME)
            return retrieve(probe, rows, clips.captions, self.candidates, vectors, seeds)

        self.values[f"{PROBE_NAME}, R@1"] = lambda clips: (found_in(clips).ranks <= 1).astype(float)
        self.values[f"{PROBE_NAME}, MRR"] = lambda clips: 1 / found_in(clips).ranks
        real = found_in(self._real)

        def judge(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            found = found_in(clips, seeds)
            note = f"stand-in, not CLIP; fitted on {probe.pairs} real pairs; {found.candidates} candidates"
            return [
                MetricEntry(name=f"{PROBE_NAME}, {label}", better="higher", figure=figure, real=of_real, note=note)
                for label, figure, of_real in (
                    ("R@1", found.recall_1, real.recall_1),
                    ("R@5", found.recall_5, real.recall_5),
                    ("MRR", found.mrr, real.mrr),
                )
            ]

        return judge

    def _classifier(self, fit: ClipSet) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        extractor = EfficientNetExtractor(self.settings.efficientnet, self.settings.device)

        def rows_of(clips: ClipSet) -> Array:
            parts = [self.features(extractor, clips, part, CLASSIFIER_NAME) for part in ("mean", "deviation")]
            return np.concatenate(parts, axis=1)

        classifier = fit_classifier(rows_of(fit), fit.captions)

        def found_in(clips: ClipSet, seeds: tuple[int, ...] = ()) -> Accuracy:
            return classify(classifier, rows_of(clips), clips.captions, self.candidates, seeds)

        self.values[f"{CLASSIFIER_NAME}, R@1"] = lambda clips: (found_in(clips).retrieval.ranks <= 1).astype(float)
        self.values[WORDS_NAME] = lambda clips: found_in(clips).per_clip
        real = found_in(self._real)

        def judge(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            found = found_in(clips, seeds)
            note = (
                f"{len(classifier.vocabulary)} words, fitted on {classifier.pairs} real pairs; {len(self.candidates)} candidates"
            )
            named = (
                (f"{CLASSIFIER_NAME}, R@1", found.retrieval.recall_1, real.retrieval.recall_1),
                (f"{CLASSIFIER_NAME}, R@5", found.retrieval.recall_5, real.retrieval.recall_5),
                (WORDS_NAME, found.words, real.words),
            )
            return [MetricEntry(name=name, better="higher", figure=a, real=b, note=note) for name, a, b in named]

        return judge

    def _clip(self, fit: ClipSet) -> Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]:
        ref = self.settings.clip
        if ref is None:
            raise ConfigError("no CLIP is named; give a folder or hub id, for instance openai/clip-vit-large-patch14")
        clip = ClipModel(ref, self.settings.device)
        head = AestheticHead(self.settings.aesthetic) if self.settings.aesthetic else None

        def images(clips: ClipSet) -> Tensor:
            flat = self.cache.extract(clip, clips.frames)["frames"]
            return flat.unflatten(1, (min(clip.frames, clips.frames.shape[1]), -1))

        scores: dict[str, Callable[[ClipSet], Array]] = {
            "CLIP text-video similarity": lambda clips: clip.similarity(images(clips), clip.text(clips.captions)).double().numpy()
        }
        if head:
            scores["aesthetic score"] = lambda clips: head(images(clips)).double().numpy()
        self.values.update(scores)
        real = {name: mean(score(self._real)) for name, score in scores.items()}

        def judge(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            return [
                MetricEntry(name=name, better="higher", figure=mean(score(clips), seeds=seeds), real=real[name], note=ref)
                for name, score in scores.items()
            ]

        return judge

    @property
    def _real(self) -> ClipSet:
        return self.spare or self.reference
