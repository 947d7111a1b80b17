"""The demo's report: what ran, the results, and what the killed node cost, as one markdown page with pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from lutetia.cli.demo.curves import LossCurve, draw_losses, draw_router
from lutetia.cli.demo.takeover import Takeover
from lutetia.cli.formatting import clock, short, size, thousands
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.files import write_atomic

LOSSES, ROUTER = "held-out-loss.png", "router-accuracy.png"


@dataclass(frozen=True)
class DemoPhase:
    """A phase of the demo and its seconds."""

    name: str
    seconds: float


@dataclass
class DemoReport:
    """What goes into the report. `timeline` holds (seconds since the start, sentence)."""

    manifest: Manifest
    status: SwarmStatus
    curves: Sequence[LossCurve]
    phases: Sequence[DemoPhase]
    timeline: Sequence[tuple[float, str]]
    workers: dict[str, str]  # public key -> name
    speeds: dict[str, str]  # name -> what limits it
    takeover: Takeover | None = None
    prompts: Sequence[str] = ()
    single: str = ""
    preset: str = "demo"
    parts: dict[str, int] = field(default_factory=dict)  # part of the mixture -> bytes


def write_report(report: DemoReport, folder: Path) -> None:
    """Write `report.md` and its pictures into `folder`."""
    takeover = report.takeover
    draw_losses(report.curves, folder / LOSSES, (takeover.shard, takeover.epoch) if takeover else None)
    if report.status.router and report.status.router.accuracy_by_time:
        draw_router(report.status.router.accuracy_by_time, len(report.manifest.shards), folder / ROUTER)
    sections = (
        _title(report),
        _samples(report),
        _experts(report),
        _router(report),
        _killed_node(report),
        _phases(report),
        _machine(),
        _next_steps(report),
    )
    write_atomic(folder / "report.md", ("\n\n".join(filter(None, sections)) + "\n").encode())


def _table(*rows: Sequence[object]) -> str:
    header, *body = [[str(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in body])


def _title(report: DemoReport) -> str:
    total = sum(phase.seconds for phase in report.phases)
    when = datetime.fromtimestamp(report.status.time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    tiny = (
        "\n\nThis was the tiny preset, which shows only that the parts work together: its clips are noise."
        if report.preset == "tiny"
        else ""
    )
    return (
        f"# A swarm trained {len(report.manifest.shards)} experts in {clock(total)} minutes\n\n"
        f"Run `{report.manifest.run_id[:12]}` of {when}: one coordinator and {len(report.workers)} nodes, each a process, "
        "over libp2p on this machine's loopback. The nodes exchanged no gradients, parameters or activations: each trained "
        f"on one cluster of the clips, and a router learned which expert suits a noisy clip and its prompt.{tiny}"
    )


def _samples(report: DemoReport) -> str:
    return (
        "## Samples\n\n![real clip, mixture and single expert for every prompt](samples.gif)\n\n"
        "Per prompt: the held-out real clip with the nearest caption, the mixture's clip, and the clip of "
        f"{report.single} alone from the same noise. As a video: [samples.mp4](samples.mp4). "
        "The manifest fixed the prompts before the training."
    )


def _experts(report: DemoReport) -> str:
    rows: list[Sequence[object]] = [
        ("expert", "cluster", "clips", "share", "held-out loss, start", "end", "epochs", "samples", "trained by")
    ]
    for shard, curve, now in zip(report.manifest.shards, report.curves, report.status.shards, strict=True):
        authors = list(dict.fromkeys(report.workers.get(author, short(author)) for author in curve.authors if author))
        losses = [f"{loss:.4f}" for loss in curve.losses] or ["-"]
        rows.append(
            (shard.index, shard.name, shard.clips, f"{100 * shard.prior:.0f} %", losses[0], losses[-1],
             f"{now.epoch}/{now.epochs}", thousands(now.samples), ", then ".join(authors) or "-")
        )  # fmt: skip
    return f"## Experts\n\n{_table(*rows)}\n\n![held-out loss per expert over accepted epochs]({LOSSES})"


def _router(report: DemoReport) -> str:
    router = report.status.router
    if router is None:
        return "## Router\n\nNo router was trained."
    picture = f"\n\n![router accuracy per bin of t]({ROUTER})" if router.accuracy_by_time else ""
    right = f"{100 * router.accuracy:.1f} %"
    return f"## Router\n\nIt names the right expert for {right} of held-out noisy clips, over all noise levels.{picture}"


def _killed_node(report: DemoReport) -> str:
    takeover = report.takeover
    if takeover is None:
        return "## The killed node\n\nNo node was killed: the work was done before there was a node to kill."
    rows = [("seconds after the kill", "what happened")]
    rows += [(f"{at - takeover.killed:.1f}", text) for at, text in takeover.timeline()]
    lost = (
        f"Lost: {thousands(takeover.samples_lost)} samples since the last accepted checkpoint; the successor trained them again."
    )
    return f"## The killed node\n\n{_table(*rows)}\n\n{lost} A lease here is {report.manifest.timing.lease:.0f} s."


def _phases(report: DemoReport) -> str:
    rows: list[Sequence[object]] = [("phase", "time")]
    rows += [(phase.name, clock(phase.seconds)) for phase in report.phases]
    rows.append(("**all**", f"**{clock(sum(phase.seconds for phase in report.phases))}**"))
    workers = "\n".join(f"- {name}: {limit}" for name, limit in report.speeds.items())
    events = "\n".join(f"- {clock(at)} {text}" for at, text in report.timeline)
    return f"## Time\n\n{_table(*rows)}\n\nThe nodes were limited to different speeds:\n\n{workers}\n\n{events}"


def _machine() -> str:
    return f"## Machine\n\n{machine()}"


def machine() -> str:
    """Processor, cores, memory and system of this machine, in one line."""
    import psutil

    processor = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in facts.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{processor}, {cores} cores, {size(psutil.virtual_memory().total)} memory, {system}"


def _next_steps(report: DemoReport) -> str:
    prompt = report.prompts[0] if report.prompts else "a purple star spins"
    return f"""## Next steps

```sh
lutetia generate "{prompt}" --mixture mixture --out clip.mp4
```

```python
from lutetia.models.pipeline import LutetiaPipeline

pipeline = LutetiaPipeline.from_pretrained("mixture")
clips = pipeline(["{prompt}"], seed=0).frames  # float32 in 0…1, [clips, frames, height, width, 3]
```"""
