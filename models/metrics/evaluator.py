"""All metrics of a report: set up once on real clips, then applied to any number of generated sets.

The retrieval probe and the word classifier are fitted on real training clips. The reference of the distances and the candidate
prompts are held-out real clips. Generated clips never change a metric.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.features import Extractor, FeatureCache
from lutetia.models.metrics.fvd import distances
from lutetia.models.metrics.motion import METHOD, MotionExtractor
from lutetia.models.metrics.settings import EvaluatorSettings, Name
from lutetia.models.metrics.stats.classifier import CLASSIFIER_NAME, WORDS_NAME, Accuracy, classify, fit_classifier
from lutetia.models.metrics.stats.intervals import Figure, mean
from lutetia.models.metrics.stats.retrieval import PROBE_NAME, Retrieval, fit_probe, retrieve
from lutetia.models.networks.clip import AestheticHead, ClipModel
from lutetia.models.networks.efficientnet import EfficientNetExtractor
from lutetia.models.networks.i3d import I3DExtractor
from lutetia.models.networks.sentences import MiniLM
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import ConfigError, DataError

Better = Literal["lower", "higher", "neither"]
Array = NDArray[np.float64]
Step = Callable[[str, int, int], None]
"""(stage, clips done, clips in all)."""
logger = logging.getLogger(__name__)


class MetricEntry(Frozen):
    """One line of a report."""

    name: str = Field(description="name of the metric, as printed")
    better: Better = Field(description="which direction is better")
    figure: Figure = Field(description="the metric on the evaluated clips, in its own unit")
    real: Figure | None = Field(
        default=None, description="the metric on real held-out clips; for distances, the distance of real clips from real clips"
    )
    note: str = Field(default="", description="how the figure was measured")


Metric = Callable[[ClipSet, tuple[int, ...]], list[MetricEntry]]
"""(clips, seeds of their sampling) to the entries of the report."""


class FeaturePair(NamedTuple):
    """The two sides of a distance: `reference` features [M, D], and a function from clips to features [N, D]."""

    reference: Array
    features: Callable[[ClipSet], Array]


class Evaluator:
    """The metrics that this machine has weights for.

    Attributes:
        left_out: metric to the reason why it cannot be measured here.
        views: distances by name; lower is better.
        values: metrics of one number per clip, by name; higher is better. `comparison.py` compares two sides by `views` and
            `values`.
    """

    def __init__(
        self,
        fit: ClipSet,
        reference: ClipSet,
        spare: ClipSet | None,
        settings: EvaluatorSettings,
        on_progress: Step | None = None,
    ) -> None:
        """Load the networks and fit the probes.

        Args:
            fit: real training clips, to fit the probe and the classifier on.
            reference: real held-out clips; their captions are also the candidate prompts.
            spare: more real held-out clips, for floors and for the scores of real clips. Without them, floors come from two
                halves of the reference.
            settings: metrics and weights.
            on_progress: called after every few clips that go through a network.
        """
        self.settings, self.reference, self.spare, self.on_progress = settings, reference, spare, on_progress
        self.cache = FeatureCache(settings.cache)
        self.candidates = tuple(dict.fromkeys(reference.captions + (spare.captions if spare else ())))
        self.left_out: dict[str, str] = {}
        self.views: dict[str, FeaturePair] = {}
        self.values: dict[str, Callable[[ClipSet], Array]] = {}
        self._metrics: list[Metric] = []
        makers: dict[Name, Callable[[ClipSet], Metric]] = {
            "fvd": self._fvd,
            "motion": self._motion,
            "retrieval": self._retrieval,
            "classifier": self._classifier,
            "clip": self._clip,
        }
        for name in settings.metrics:
            try:
                self._metrics.append(makers[name](fit))
            except (DataError, ConfigError) as error:
                self.left_out[name] = str(error)
                logger.warning("metric %s is left out: %s", name, error)

    def evaluate(self, clips: ClipSet, seeds: Sequence[int] = ()) -> list[MetricEntry]:
        """The entries of every metric for `clips`. Their captions must be among those of the reference or the spare clips."""
        return [entry for metric in self._metrics for entry in metric(clips, tuple(seeds))]

    def features(self, extractor: Extractor, clips: ClipSet, name: str, stage: str) -> Array:
        """Cached features [N, D], float64; `stage` is what progress shows."""
        report = self.on_progress
        step = (lambda done, total: report(stage, done, total)) if report else None
        return self.cache.extract(extractor, clips.frames, step)[name].double().numpy()

    def _distance(self, extractor: Extractor, key: str, label: str, note: str) -> Metric:
        reference = self.features(extractor, self.reference, key, label)
        spare = self.features(extractor, self.spare, key, label) if self.spare else None

        self.views[label] = FeaturePair(reference, lambda clips: self.features(extractor, clips, key, label))

        def measure(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            rows = self.features(extractor, clips, key, label)
            distance = distances(reference, rows, spare=spare, resamples=self.settings.resamples, seeds=seeds)
            return [
                MetricEntry(name=label, better="lower", figure=distance.plain, real=distance.floor, note=note),
                MetricEntry(
                    name=f"{label}, debiased", better="lower", figure=distance.debiased, note="0 for equal distributions at any N"
                ),
                MetricEntry(
                    name=f"{label}, N to infinity", better="lower", figure=distance.at_infinity, note="too high where N < 400"
                ),
                MetricEntry(name=f"{label}, kernel distance", better="lower", figure=distance.kernel, real=distance.kernel_floor),
            ]

        return measure

    def _fvd(self, fit: ClipSet) -> Metric:
        self.i3d = self._network()
        exact = "" if self.i3d.precision == "float32" else f" in {self.i3d.precision}"
        return self._distance(self.i3d, "logits", "FVD", f"I3D Kinetics-400 logits{exact}, 224 px; compare at equal N only")

    def _network(self) -> I3DExtractor:
        return I3DExtractor(self.settings.i3d, self.settings.device, precision=self.settings.i3d_precision)

    def _motion(self, fit: ClipSet) -> Metric:
        extractor = MotionExtractor()
        note = f"Fréchet distance of optical-flow fields ({METHOD}); colours and shapes do not enter"
        distance = self._distance(extractor, "field", "motion distance", note)
        real = mean(self.features(extractor, self.reference, "speed", "motion")[:, 0])

        def measure(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            speed = mean(self.features(extractor, clips, "speed", "motion")[:, 0], seeds=seeds)
            size = f"{clips.frames.shape[3]}x{clips.frames.shape[2]} px, {METHOD}"
            return [
                *distance(clips, seeds),
                MetricEntry(name="motion, px/frame", better="neither", figure=speed, real=real, note=size),
            ]

        return measure

    def _retrieval(self, fit: ClipSet) -> Metric:
        extractor, encode = self._network(), MiniLM(self.settings.minilm)
        probe = fit_probe(self.features(extractor, fit, "pooled", PROBE_NAME), encode(fit.captions).numpy())
        vectors = encode(self.candidates).numpy()

        def retrieval_of(clips: ClipSet, seeds: tuple[int, ...] = ()) -> Retrieval:
            rows = self.features(extractor, clips, "pooled", PROBE_NAME)
            return retrieve(probe, rows, clips.captions, self.candidates, vectors, seeds)

        self.values[f"{PROBE_NAME}, R@1"] = lambda clips: (retrieval_of(clips).ranks <= 1).astype(float)
        self.values[f"{PROBE_NAME}, MRR"] = lambda clips: 1 / retrieval_of(clips).ranks
        real = retrieval_of(self._real)

        def measure(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            retrieval = retrieval_of(clips, seeds)
            note = f"stand-in, not CLIP; fitted on {probe.pairs} real pairs; {retrieval.candidates} candidates"
            return [
                MetricEntry(name=f"{PROBE_NAME}, {label}", better="higher", figure=figure, real=of_real, note=note)
                for label, figure, of_real in (
                    ("R@1", retrieval.recall_1, real.recall_1),
                    ("R@5", retrieval.recall_5, real.recall_5),
                    ("MRR", retrieval.mrr, real.mrr),
                )
            ]

        return measure

    def _classifier(self, fit: ClipSet) -> Metric:
        extractor = EfficientNetExtractor(self.settings.efficientnet, self.settings.device)

        def rows_of(clips: ClipSet) -> Array:
            parts = [self.features(extractor, clips, part, CLASSIFIER_NAME) for part in ("mean", "deviation")]
            return np.concatenate(parts, axis=1)

        classifier = fit_classifier(rows_of(fit), fit.captions)

        def accuracy_of(clips: ClipSet, seeds: tuple[int, ...] = ()) -> Accuracy:
            return classify(classifier, rows_of(clips), clips.captions, self.candidates, seeds)

        self.values[f"{CLASSIFIER_NAME}, R@1"] = lambda clips: (accuracy_of(clips).retrieval.ranks <= 1).astype(float)
        self.values[WORDS_NAME] = lambda clips: accuracy_of(clips).per_clip
        real = accuracy_of(self._real)

        def measure(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            accuracy = accuracy_of(clips, seeds)
            note = (
                f"{len(classifier.vocabulary)} words, fitted on {classifier.pairs} real pairs; {len(self.candidates)} candidates"
            )
            named = (
                (f"{CLASSIFIER_NAME}, R@1", accuracy.retrieval.recall_1, real.retrieval.recall_1),
                (f"{CLASSIFIER_NAME}, R@5", accuracy.retrieval.recall_5, real.retrieval.recall_5),
                (WORDS_NAME, accuracy.words, real.words),
            )
            return [MetricEntry(name=name, better="higher", figure=a, real=b, note=note) for name, a, b in named]

        return measure

    def _clip(self, fit: ClipSet) -> Metric:
        ref = self.settings.clip
        if ref is None:
            raise ConfigError("no CLIP is set; name a folder or hub id, for instance openai/clip-vit-large-patch14")
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

        def measure(clips: ClipSet, seeds: tuple[int, ...]) -> list[MetricEntry]:
            return [
                MetricEntry(name=name, better="higher", figure=mean(score(clips), seeds=seeds), real=real[name], note=ref)
                for name, score in scores.items()
            ]

        return measure

    @property
    def _real(self) -> ClipSet:
        return self.spare or self.reference
