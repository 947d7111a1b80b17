"""`run create --from`: what a run takes from the diffusers pipeline that its experts start from."""

from __future__ import annotations

import logging

from lutetia.coordinator.settings import RunSettings
from lutetia.protocol.schema.capabilities import PIPELINES
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import Optimisation, SamplingSpec, TimeSampling
from lutetia.system.errors import ConfigError

_log = logging.getLogger(__name__)


def with_pipeline(settings: RunSettings, latent: LatentSpec) -> RunSettings:
    """The settings with expert, first weights, sampling and time shift of their pipeline, where nothing else was set.

    Raises ConfigError: the pipeline cannot be used, a setting contradicts it, or the data were made by other models.
    """
    if settings.pipeline is None:
        if settings.part is not None:
            raise ConfigError(
                "part was set without a pipeline; set pipeline (--from) to one with two transformers, or leave it out"
            )
        return settings
    from lutetia.models.sources.pipeline import mismatch, open_pipeline, sampling_of, time_shift, transformer_of

    given = settings.expert
    for name in ("expert", "warm_start"):
        if name in settings.model_fields_set and not (given and given.adapter):
            raise ConfigError(f"both pipeline and {name} were set; leave {name} out to use the pipeline's transformer")
    source = open_pipeline(settings.pipeline)
    part = source.noise_part(settings.part)
    name = transformer_of(part)
    if isinstance(given, ExpertSpec) and given.adapter:
        _check_base(given.adapter.base.source, name, settings.pipeline)
    else:
        source = open_pipeline(source.model.text, weights=(name,))
    if problem := mismatch(source, latent):
        raise ConfigError(f"{problem}; build the data with --from {settings.pipeline}")
    optimisation, shift = settings.optimisation, time_shift(source, latent)
    if "time" not in optimisation.model_fields_set:
        chosen = {name: getattr(optimisation, name) for name in optimisation.model_fields_set}
        optimisation = Optimisation(**{**chosen, "time": TimeSampling(shift=shift)})
    sampling = sampling_of(source, settings.sampling)
    _log.info(
        "from pipeline %s (%s): %s, training times shifted by %.3g, sampled in %d steps by %s with guidance %g",
        source.model.text, source.class_name, name, optimisation.time.shift, sampling.steps,
        sampling.scheduler.class_name if sampling.scheduler else "Euler steps", sampling.guidance,
    )  # fmt: skip
    expert, start = source.expert(latent.fps, part), source.part(name)
    if given and given.adapter:  # its base holds the weights; the pipeline says how it is called
        kind = {name: getattr(expert, name) for name in ("prediction", "noise_schedule", "betas", "inputs")}
        expert, start = given.model_copy(update=kind), None
    return settings.model_copy(update={"expert": expert, "warm_start": start, "sampling": sampling, "optimisation": optimisation})


def _check_base(base: str, transformer: str, pipeline: str) -> None:
    """Raises ConfigError if the base of an adapter is the pipeline's other transformer."""
    name = base.partition("@")[0].rpartition("/")[2]
    if name in ("transformer", "transformer_2") and name != transformer:
        raise ConfigError(
            f"the adapter's base is the {name} of {base}, but the run trains the {transformer} of {pipeline}; "
            f"set expert.adapter.base to the pipeline, or to its {transformer}"
        )


def with_first_frame(expert: ExpertSpec, settings: RunSettings) -> ExpertSpec:
    """The expert, trained with as many first frames as the settings say."""
    if settings.first_frame is None:
        return expert
    from lutetia.models.experts.families import family_of

    inputs = expert.inputs or family_of(expert.class_name).inputs
    return expert.model_copy(update={"inputs": inputs.model_copy(update={"first_frame": settings.first_frame})})


def check_first_frame(latent: LatentSpec) -> None:
    """Raises ConfigError if the autoencoder of the data cannot encode the first picture of a clip alone."""
    from lutetia.models.data.encode.latents import load_latents

    if not load_latents(latent.vae).begins_with_picture:
        raise ConfigError(
            f"latents {latent.vae!r} mix the first picture of a clip with later ones, so that no picture can begin a clip; leave "
            "first_frame out, or build the data with an autoencoder that does not, such as Wan's or LTX-Video's"
        )


def pipeline_needs(expert: ExpertSpec, latent: LatentSpec, sampling: SamplingSpec) -> tuple[str, ...]:
    """The capabilities that a run needs because of what it takes from a pipeline."""
    taken = (expert.betas, expert.inputs, latent.text, sampling.scheduler, sampling.embedded_guidance)
    return (PIPELINES,) if any(value is not None for value in taken) else ()
