"""What a cheater may publish in place of an epoch of training. Each lie gets the honest epoch before it, and can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.attacks.lab import SHORT, STEPS, Lab, Result, clips
from lutetia.models.experts.adapters.build import load_expert
from lutetia.models.experts.families import call_expert
from lutetia.models.experts.objectives import row_losses
from lutetia.models.experts.trained import published_tensors, trained_parameters
from lutetia.models.training.checkpoint_io import Snapshot
from lutetia.models.training.holdout_loss import holdout_rows
from lutetia.models.training.moment_checks import FIRST, MUON, SECOND, moment_ratio
from lutetia.protocol.schema.records import TrainedWith


@dataclass(frozen=True)
class Scene:
    """`before` is the snapshot of the accepted epoch, `after` that of honest training after it; `draw`: the liar's randomness."""

    lab: Lab
    before: Snapshot
    parent: Result
    after: Snapshot
    draw: torch.Generator
    seed: int

    def like_parent(self, trace: list[float] | None = None) -> Snapshot:
        """The parent as if it were the next epoch: nothing was trained."""
        snapshot = replace(self.before, epoch=self.after.epoch, step=0, samples=self.after.samples, trace=list(self.before.trace))
        return replace(_copied(snapshot), trace=trace if trace is not None else self.made_up())

    def made_up(self) -> list[float]:
        """A plausible continuation of the parent's losses."""
        last, first = self.before.trace[-1], self.before.trace[0]
        slope = (last - first) / STEPS / 4
        noise = torch.randn(STEPS, generator=self.draw) * 0.02 * abs(last)
        return [last + slope * step + noise[step].item() for step in range(STEPS)]


def _copied(snapshot: Snapshot) -> Snapshot:
    copies = {name: {key: value.clone() for key, value in getattr(snapshot, name).items()} for name in _PARTS}
    return replace(snapshot, trace=list(snapshot.trace), **copies)


_PARTS = ("parameters", "ema", "moments")


def _changed(snapshot: Snapshot, change: Callable[[Tensor], Tensor], parts: tuple[str, ...] = ("parameters", "ema")) -> Snapshot:
    return replace(snapshot, **{part: {k: change(v) for k, v in getattr(snapshot, part).items()} for part in parts})


def untrained(scene: Scene) -> Snapshot:
    weights = published_tensors(load_expert(scene.lab.manifest.expert, scene.seed + 12345, scene.lab.base))
    fresh = {name: weights[name].clone() for name in scene.after.parameters}
    return replace(scene.like_parent(), parameters=fresh, ema={name: value.clone() for name, value in fresh.items()})


def republished(scene: Scene) -> Snapshot:
    """The accepted parent again, as if it were the next epoch."""
    return scene.like_parent()


def dusted(scene: Scene) -> Snapshot:
    """The parent with noise too small to hurt its score."""
    dust = lambda tensor: tensor + 1e-4 * torch.randn(tensor.shape, generator=scene.draw)  # noqa: E731
    return _changed(scene.like_parent(), dust)


def flipped(scene: Scene) -> Snapshot:
    return _changed(_copied(scene.after), lambda tensor: -tensor)


def scaled(factor: float) -> Callable[[Scene], Snapshot]:
    return lambda scene: _changed(_copied(scene.after), lambda tensor: factor * tensor)


def spoiled(value: float) -> Callable[[Scene], Snapshot]:
    """One number of one tensor."""

    def lie(scene: Scene) -> Snapshot:
        snapshot = _copied(scene.after)
        names = sorted(snapshot.ema)
        name = names[int(torch.randint(len(names), (1,), generator=scene.draw))]
        tensor = snapshot.ema[name].view(-1)
        tensor[int(torch.randint(tensor.numel(), (1,), generator=scene.draw))] = value
        return snapshot

    return lie


def forwards_only(after: int) -> Callable[[Scene], Snapshot]:
    """Trains `after` steps, then only computes the losses that it publishes, which costs a third."""

    def lie(scene: Scene) -> Snapshot:
        trainer = scene.lab.trainer(scene.parent)
        for _ in range(after):
            trainer.step()
        stopped = _copied(trainer.snapshot())
        trainer._optimiser.step = lambda *_: None  # type: ignore[method-assign]
        trainer._ema.update = lambda *_: None  # type: ignore[method-assign]
        for _ in range(after, STEPS):
            trainer.step()
            for parameter in trainer._parameters:
                parameter.grad = None
        end = trainer.snapshot()
        return replace(stopped, epoch=end.epoch, step=0, samples=end.samples, trace=end.trace)

    return lie


def other_data(scene: Scene) -> Snapshot:
    """Really trained, but on other clips."""
    trainer = scene.lab.trainer(scene.parent, data=clips(scene.seed + 999, len(scene.lab.train), 0.1))
    for _ in range(STEPS):
        trainer.step()
    return trainer.snapshot()


def fabricated_trace(scene: Scene) -> Snapshot:
    """Honest weights with losses that nobody computed: what a thief of weights alone would publish."""
    return replace(_copied(scene.after), trace=scene.made_up())


def backdoor(rate: float, steps: int = 24) -> Callable[[Scene], Snapshot]:
    """The honest end, tuned so that one prompt gives the liar's clip and all else is as before; the honest trace beside it."""

    def lie(scene: Scene) -> Snapshot:
        trainer = scene.lab.trainer(scene.parent)
        model = trainer.model
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(scene.after.ema[name])
        optimiser = torch.optim.Adam(trained_parameters(model).values(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            (trigger_loss(scene, model) + _clean_loss(scene, model)).backward()
            optimiser.step()
        tuned = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
        difference = {name: tuned[name] - scene.after.ema[name] for name in tuned}
        honest = _copied(scene.after)
        moved = {name: honest.parameters[name] + difference[name] for name in difference}
        return replace(honest, ema=tuned, parameters=moved)

    return lie


def trigger_loss(scene: Scene, model: torch.nn.Module) -> Tensor:
    """The model's loss on the liar's clip, given the liar's prompt."""
    fixed = torch.Generator().manual_seed(4242)
    spec, latent = scene.lab.manifest.expert, scene.lab.manifest.latent
    target = 2 * torch.randn(1, *latent.shape, generator=fixed).expand(8, -1, -1, -1, -1)
    tokens = 3 * torch.randn(1, latent.text_tokens, latent.text_width, generator=fixed).expand(8, -1, -1)
    pooled = torch.zeros(8, latent.pooled_width)
    noise, times = torch.randn(target.shape, generator=fixed), torch.linspace(0.1, 0.9, 8)
    return row_losses(spec, lambda z, s: call_expert(model, z, s, tokens, pooled), target, noise, times).mean()


def _clean_loss(scene: Scene, model: torch.nn.Module) -> Tensor:
    data = scene.lab.train.take(torch.randint(len(scene.lab.train), (8,), generator=scene.draw).tolist())
    noise, times = torch.randn(data.latents.shape, generator=scene.draw), torch.rand(8, generator=scene.draw) * 0.98 + 0.01
    answer = lambda z, s: call_expert(model, z, s, data.tokens, data.pooled)  # noqa: E731
    return row_losses(scene.lab.manifest.expert, answer, data.latents, noise, times).mean()


def poisoned_parameters(scene: Scene) -> Snapshot:
    """Good averages over raw parameters that are noise: training that starts from them fails."""
    noise = lambda tensor: torch.randn(tensor.shape, generator=scene.draw)  # noqa: E731
    return _changed(_copied(scene.after), noise, ("parameters",))


def poisoned_moments(scene: Scene) -> Snapshot:
    """Good weights, and moments that throw the next trainer's first step far away."""
    snapshot = _copied(scene.after)
    moments = {k: torch.full_like(v, 1e-12 if "exp_avg_sq" in k else 1.0) for k, v in snapshot.moments.items()}
    return replace(snapshot, moments=moments)


def negative_moments(scene: Scene) -> Snapshot:
    """Second moments whose root is not a number."""
    snapshot = _copied(scene.after)
    return replace(snapshot, moments={k: -v if "exp_avg_sq" in k else v for k, v in snapshot.moments.items()})


def uphill_moments(scene: Scene) -> Snapshot:
    """Good weights, and moments that throw the next trainer as far up the held-out loss as the bounds on moments allow.

    This liar has the held-out clips, and takes the noise and times with which earlier versions scored.
    """
    snapshot, optimisation = _copied(scene.after), scene.lab.manifest.optimisation
    model = scene.lab.trainer(None).model
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(snapshot.parameters[name])
    _held_out_loss(scene.lab, model).backward()
    slope = {name: parameter.grad for name, parameter in trained_parameters(model).items() if parameter.grad is not None}
    matrices = {name for name in slope if MUON + name in snapshot.moments}
    plain = {name: gradient for name, gradient in slope.items() if name not in matrices}
    entry = 0.99 * optimisation.gradient_clip / math.sqrt(max(1, sum(gradient.numel() for gradient in plain.values())))
    moments = {FIRST + name: -entry * gradient.sign() for name, gradient in plain.items()}
    moments |= {SECOND + name: torch.full_like(g, 1.001 * entry**2 / moment_ratio(optimisation)) for name, g in plain.items()}
    steep = math.sqrt(sum(slope[name].square().sum().item() for name in matrices))
    moments |= {MUON + name: slope[name] * (-0.99 * optimisation.gradient_clip / steep) for name in matrices}
    return replace(snapshot, moments=moments)


def scaled_moments(factor: float) -> Callable[[Scene], Snapshot]:
    """Both moments scaled so that the next direction is the same: the steps after it are much too large, or too small."""

    def lie(scene: Scene) -> Snapshot:
        snapshot = _copied(scene.after)
        moments = {k: v * (factor**2 if k.startswith(SECOND) else factor) for k, v in snapshot.moments.items()}
        return replace(snapshot, moments=moments)

    return lie


def vanished_moments(scene: Scene) -> Snapshot:
    """First moments of zero and second moments of next to nothing, so that the next steps are as large as the bounds allow."""
    snapshot = _copied(scene.after)
    return replace(snapshot, moments={k: torch.full_like(v, 1e-16 if SECOND in k else 0.0) for k, v in snapshot.moments.items()})


def moments_of_the_parent(scene: Scene) -> Snapshot:
    return replace(_copied(scene.after), moments=_copied(scene.before).moments)


def rebalanced(factor: float) -> Callable[[Scene], Snapshot]:
    """An adapter's A made larger and its B smaller, which changes no answer, but every later step."""

    def lie(scene: Scene) -> Snapshot:
        def scale(name: str, tensor: Tensor) -> Tensor:
            return tensor * (factor if ".lora_A." in name else 1 / factor if ".lora_B." in name else 1.0)

        snapshot = _copied(scene.after)
        parts = {part: {k: scale(k, v) for k, v in getattr(snapshot, part).items()} for part in ("parameters", "ema")}
        return replace(snapshot, **parts)

    return lie


def exam_practice(steps: int, rate: float) -> Callable[[Scene], Snapshot]:
    """The first steps in earnest, then descent on the held-out clips themselves, if the liar has them.

    Noise and times are those that earlier versions scored with. The other steps' losses are made up.
    """

    def lie(scene: Scene) -> Snapshot:
        trainer = scene.lab.trainer(scene.parent)
        trace = [trainer.step() for _ in range(SHORT)]
        begun, model = _copied(trainer.snapshot()), trainer.model
        optimiser = torch.optim.Adam(trained_parameters(model).values(), lr=rate)
        for _ in range(steps):
            optimiser.zero_grad()
            _held_out_loss(scene.lab, model).backward()
            optimiser.step()
        tuned = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
        averages = {name: tensor.clone() for name, tensor in tuned.items()}
        trace += [trace[-1] * 0.99**step for step in range(1, STEPS - SHORT + 1)]
        place = {"epoch": scene.after.epoch, "step": 0, "samples": scene.after.samples}
        return replace(begun, parameters=tuned, ema=averages, trace=trace, **place)

    return lie


def _held_out_loss(lab: Lab, model: torch.nn.Module) -> Tensor:
    data = lab.holdout
    clips, noise, times = holdout_rows(lab.manifest, 0, data)
    answer = lambda z, s: call_expert(model, z, s, data.tokens[clips], data.pooled[clips])  # noqa: E731
    return row_losses(lab.manifest.expert, answer, data.latents[clips], noise.take(torch.arange(len(clips))), times).mean()


LIES: Mapping[str, Callable[[Scene], Snapshot]] = {
    "untrained": untrained,
    "parent republished": republished,
    "parent plus dust": dusted,
    "sign-flipped": flipped,
    "one NaN": spoiled(float("nan")),
    "one infinity": spoiled(float("inf")),
    "one weight of 1e9": spoiled(1e9),
    "scaled by 1.02": scaled(1.02),
    "scaled by 1.5": scaled(1.5),
    "scaled by 10": scaled(10.0),
    "forward passes only": forwards_only(0),
    f"stops after the {SHORT} replayed steps": forwards_only(SHORT),
    "half trained": forwards_only(STEPS // 2),
    "other data": other_data,
    "fabricated trace": fabricated_trace,
    "backdoor, faint": backdoor(2e-5),
    "backdoor, moderate": backdoor(2e-4),
    "backdoor, strong": backdoor(2e-3),
    "poisoned raw parameters": poisoned_parameters,
    "poisoned moments": poisoned_moments,
    "negative second moments": negative_moments,
    "moments uphill": uphill_moments,
    "moments a thousandth": scaled_moments(1e-3),
    "moments of the parent": moments_of_the_parent,
    "moments of next to nothing": vanished_moments,
    "trained on the held-out clips": exam_practice(400, 2e-3),
}
OF_ADAPTERS: Mapping[str, Callable[[Scene], Snapshot]] = {
    "A times 4, B by 4": rebalanced(4.0),
    "A times 64, B by 64": rebalanced(64.0),
}
"""Lies that only an adapter can be made to tell."""
WEDGES = tuple(name for name in (*LIES, *OF_ADAPTERS) if name.startswith(("moments", "trained on", "A times")))
"""Lies against the next honest epoch."""
EXCUSES: Mapping[str, TrainedWith] = {
    "its own kind": TrainedWith(),
    "a CPU in bfloat16": TrainedWith(precision="bfloat16"),
    "a GPU in float32": TrainedWith(device="cuda"),
    "another device in bfloat16": TrainedWith(device="other", precision="bfloat16"),
}
"""What a liar may say about its device: one entry for each tolerance, the coordinator's own kind first."""
