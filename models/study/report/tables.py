"""The results of a study as Markdown: setting, compute, headline, other arms, curves, controls, trainings and clusters."""

from __future__ import annotations

from collections.abc import Sequence

from lutetia.models.metrics.comparison import comparison_table
from lutetia.models.metrics.routing import loss_table
from lutetia.models.study.config import StudyConfig
from lutetia.models.study.evaluation import EvaluatedReading
from lutetia.models.study.report.compute_table import compute_section
from lutetia.models.study.report.markdown import table
from lutetia.models.study.results import PAPER, StudyResults, curve, entry, headline_ratio, main_distance, specialisation
from lutetia.models.study.trainings import Reading, Training


def report(results: StudyResults, pictures: Sequence[str] = (), sheets: Sequence[str] = ()) -> str:
    """The whole page. `pictures` and `sheets` (the contact sheet of each cluster) are files beside it."""
    parts = [f"# Study {results.name}", _setting(results), compute_section(results), _headline(results)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += [
        _rivals(results),
        _curves(results),
        _controls(results),
        _specialisation(results),
        _losses(results),
        _routers(results),
    ]
    parts += [_trainings(results), _clusters(results)]
    parts += [f"![what is in a cluster]({name})" for name in sheets]
    parts.append(_left_out(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(results: StudyResults) -> str:
    clips, data = results.clips, results.config["data"]
    evaluated_on = results.config["evaluation"]["on"]
    sizes = "; ".join(
        f"{role}: " + ", ".join(f"{n} {kind or 'clips'}" for kind, n in kinds.items()) for role, kinds in clips.roles.items()
    )
    psnr = ", ".join(f"{kind or 'clips'} {value:.1f} dB" for kind, value in results.autoencoder_psnr.items())
    latents = f"by the study's own autoencoder (PSNR on frames it has not seen: {psnr})" if psnr else f"`{data['latents']}`"
    base = _base(results)
    caveat = "" if evaluated_on == "test" else ", on which recipes are chosen: these figures prove nothing"
    return (
        f"Clips of {data['frames']} frames of {data['width']}x{data['height']} px, latents {latents}, text "
        f"`{data['text']}`, clusters by `{data['features']}`. {sizes}; left out because their prompt or file has another role: "
        f"{clips.known_prompts} and {clips.copies}. Evaluated on the clips of **{evaluated_on}**{caveat}. {base}"
        f"{results.hardware}; {results.seconds / 3600:.2f} h of swarm time in total."
    )


def _base(results: StudyResults) -> str:
    """What all arms start from."""
    base = results.config.get("base")
    if base is None:
        return ""
    trained = results.plan.of("base", "frames")
    if not trained:
        return f"**All arms start from the weights `{base['weights']}`**, whose training counts for none of them. "
    spent = f"{trained[0].samples_per_shard:,} single frames of the training clips ({trained[0].flops:.3g} FLOPs)"
    return f"**All arms start from one image model**, trained on {spent}, which count for none of them. "


def _headline(results: StudyResults) -> str:
    lines = ["## Monolith against mixture, equal data and equal FLOPs"]
    for prompts, rows in results.headline.items():
        ratio = headline_ratio(results, prompts)
        lines.append(f"### {prompts} prompts, N = {rows[0].first.n}, seeds {', '.join(map(str, rows[0].first.seeds))}")
        if ratio is not None:
            name, over = main_distance(results), _over(rows[0].first.seeds)
            lines.append(f"{name} of the monolith ÷ {name} of the mixture: **{ratio}** ({over}).")
        lines.append(comparison_table(rows, "monolith", "mixture").rstrip())
        lines += _rebuilt(results, prompts) + _kinds(results, prompts)
    rows = [[name, f"{a:g}", f"{b:g}", f"{a / b:.2f}"] for name, (a, b) in PAPER.items()]
    lines.append("For comparison, Paris 2.0 reports (3 experts of 11 B, 256 px, N = 2,048; other data, so only ratios compare):")
    lines.append(table(["metric", "monolith", "mixture", "monolith ÷ mixture"], rows))
    return "\n\n".join(lines)


def _rivals(results: StudyResults) -> str:
    """Other arms of the whole budget, each against the mixture."""
    lines = []
    for arm, compared in results.rivals.items():
        for prompts, rows in compared.items():
            seeds = ", ".join(map(str, rows[0].first.seeds))
            lines.append(f"### {arm} against mixture, {prompts} prompts, N = {rows[0].first.n}, seeds {seeds}")
            lines.append(comparison_table(rows, arm, "mixture").rstrip())
    return "\n\n".join(["## Other arms of the whole budget", *lines]) if lines else ""


def _rebuilt(results: StudyResults, prompts: str) -> list[str]:
    """The loss of quality by the autoencoder alone."""
    name = main_distance(results)
    rebuilt = entry(results.rebuilt.get(prompts, ()), name)
    if rebuilt is None:
        return []
    original = f"; as they are, {rebuilt.real}" if rebuilt.real else ""
    figures = f"{name} {rebuilt.figure} (N = {rebuilt.figure.n}){original}"
    lines = [f"Other real clips, encoded and decoded again by the autoencoder, have {figures}."]
    beyond = next((row for row in results.beyond.get(prompts, ()) if row.name == name), None)
    if beyond and beyond.ratio:
        sides = f"{beyond.first} for the monolith and {beyond.second} for the mixture, ratio {beyond.ratio}"
        lines.append(
            f"Measured from real clips after encoding and decoding, without the blur that both sides share, {name} is {sides}."
        )
    return lines


def _kinds(results: StudyResults, prompts: str) -> list[str]:
    """The headline by kind: where the gain comes from."""
    rows = []
    for kind, (plain, debiased) in results.kinds.get(prompts, {}).items():
        figures = (plain.first, plain.second, plain.ratio, debiased.first, debiased.second)
        rows.append([kind, str(plain.first.n), *map(str, figures), plain.second_is])
    if not rows:
        return []
    name = main_distance(results)
    sides = [f"{what}, {side}" for what in (name, "debiased") for side in ("monolith", "mixture")]
    head = ["clips of", "N", *sides[:2], "ratio", *sides[2:], "mixture is"]
    return ["By kind, at its own N:", table(head, rows)]


def _over(seeds: Sequence[int]) -> str:
    """What the interval covers."""
    return "95 % over clips and seeds" if len(seeds) > 1 else "95 % over clips only: one training of each side"


def _curves(results: StudyResults) -> str:
    name = main_distance(results)
    rows = []
    for arm in ("monolith", "mixture", *results.config["controls"].get("full", ())):
        for point in curve(results, arm, name):
            seeds = ", ".join(f"{figure.value:.4g}" for figure in point.figures)
            loss = f"{sum(point.losses) / len(point.losses):.4f}" if point.losses else "–"
            floor = f"{point.floor.value:.4g}" if point.floor else "–"
            rows.append([arm, f"{point.flops:.3g}", f"{point.value:.4g}", seeds, floor, loss])
    if not rows:
        return ""
    count = results.config["evaluation"]["curve_clips"]
    head = ["side", "FLOPs", f"{name} (mean of seeds)", "by seed", "real against real", "held-out loss"]
    note = f"N = {count}; checkpoints as accepted during training, before the learning rate had fallen"
    return f"## Learning curves ({note})\n\n{table(head, rows)}"


def _controls(results: StudyResults) -> str:
    name, rows, metrics = main_distance(results), [], _metrics(results)
    config = StudyConfig.model_validate(results.config)
    for training, reading in results.plan.controls(config):
        if evaluated := results.of(reading):
            cells, ratio = [_figure(evaluated, metric) for metric in metrics], results.against.get(reading.name)
            sizes = _sizes(training)
            rows.append([_label(training, reading), sizes[0], cells[0], str(ratio or "–"), *cells[1:], *sizes[1:]])
    if not rows:
        return ""
    head = ["arm", "seed", name, f"{name} ÷ the mixture's", *metrics[1:-1], "held-out loss"]
    head += ["total / active parameters", "training FLOPs"]
    note = f"N = {config.controls.clips}, {config.evaluation.prompts[0]} prompts; 95 % over clips only: one training of each arm."
    return (
        f"## Controls at {config.controls.share:g} of the budget\n\n{note}\n\n{table(head, rows)}\n\n"
        f"{name}: lower is better, so an arm with a ratio above 1 is worse than the mixture; retrieval and words: higher."
    )


def _metrics(results: StudyResults) -> list[str]:
    """The metrics with a column of their own; the last is the held-out loss."""
    name = main_distance(results)
    first = next(iter(results.evaluated.values()), None)
    higher = [each.name for each in first.entries if each.better == "higher" and not each.name.endswith("R@5")] if first else []
    motion = [] if name == "motion distance" else ["motion distance"]
    return [name, f"{name}, debiased", *motion, *higher, "held-out loss"]


def _figure(evaluated: EvaluatedReading, metric: str) -> str:
    if metric == "held-out loss":
        return f"{evaluated.losses['mixture'].loss:.4f}" if "mixture" in evaluated.losses else "–"
    measured = entry(evaluated.entries, metric)
    return str(measured.figure) if measured else "–"


def _label(training: Training, reading: Reading) -> str:
    parts = [training.arm]
    if reading.expert is not None:
        parts.append(f"expert {reading.expert} alone")
    elif reading.route != "router":
        parts.append({"oracle": "oracle routing", "text-blind": "text-blind router"}[reading.route])
    elif reading.mode:
        parts.append(reading.mode)
    return ", ".join(parts)


def _sizes(training: Training) -> list[str]:
    total, active = training.parameters / 1e6, training.active_parameters / 1e6
    return [str(training.seed), f"{total:.2f} M / {active:.2f} M", f"{training.flops:.3g}"]


def _specialisation(results: StudyResults) -> str:
    rows = [[str(row.expert), row.metric, str(row.own), str(row.other)] for row in specialisation(results)]
    if not rows:
        return ""
    return f"## Each expert alone\n\n{table(['expert', 'metric', 'prompts of its own cluster', 'all other prompts'], rows)}"


def _losses(results: StudyResults) -> str:
    losses = {}
    for tier in ("headline", "control"):
        for training in (each for each in results.plan.trainings if each.tier == tier):
            for reading in results.plan.readings_of(training):
                evaluated = results.of(reading)
                if not evaluated or not evaluated.losses or reading.epoch != training.epochs:
                    continue
                if f"{training.name}: mixture" not in losses:
                    losses.update({f"{training.name}: {name}": loss for name, loss in evaluated.losses.items()})
    return f"## Held-out loss by timestep (0 data, 1 noise)\n\n{loss_table(losses).rstrip()}" if losses else ""


def _routers(results: StudyResults) -> str:
    rows = []
    for name, trained in results.trainings.items():
        if trained.router:
            by_time = " ".join(f"{value:.2f}" for value in trained.router.get("accuracy_by_time", ()))
            ece = trained.router.get("calibration_error")
            rows.append([name, f"{trained.router['accuracy']:.3f}", "–" if ece is None else f"{ece:.3f}", by_time])
    head = ["router of", "held-out accuracy", "calibration error", "accuracy in ten bins of t, 0 data to 1 noise"]
    return f"## Routers\n\n{table(head, rows)}" if rows else ""


def _trainings(results: StudyResults) -> str:
    rows = []
    for training in results.plan.trainings:
        trained = results.trainings.get(training.name)
        if trained:
            steps = training.samples_per_shard // training.batch
            rows.append(
                [
                    training.name,
                    str(training.experts),
                    str(training.batch),
                    f"{steps:,}",
                    f"{training.samples_per_shard:,}",
                    f"{training.flops:.4g}",
                    f"{training.router_flops / training.flops:.1%}",
                    f"{training.pass_flops:.3g}",
                    f"{trained.seconds:.0f} s",
                ]
            )
    head = [
        "training",
        "experts",
        "batch each",
        "steps each",
        "samples each",
        "FLOPs, router included",
        "router's share",
        "FLOPs of a top-1 step",
        "swarm time",
    ]
    return f"## Trainings\n\n{table(head, rows)}" if rows else ""


def _clusters(results: StudyResults) -> str:
    rows = [
        [
            name, ", ".join(f"{each['name']} {each['clips']}" for each in report["clusters"]), f"{report['silhouette']:.3f}",
            "–" if report["purity"] is None else f"{report['purity']:.3f}",
            "–" if report["nmi"] is None else f"{report['nmi']:.3f}", f"{report['largest_uncapped']:.2f}",
        ]
        for name, report in results.clusters.items()
    ]  # fmt: skip
    head = ["clustering", "clusters and clips", "silhouette", "purity", "NMI with kinds", "largest share without splitting"]
    return f"## Clusters\n\n{table(head, rows)}" if rows else ""


def _left_out(results: StudyResults) -> str:
    reasons = {name: reason for evaluated in results.evaluated.values() for name, reason in evaluated.left_out.items()}
    return "\n".join(f"Left out: {name}: {reason}." for name, reason in reasons.items())
