"""From a folder of captioned clips to shards: `python examples/build_data.py CLIPS OUT`.

CLIPS is any folder of videos with a `metadata.jsonl` (see docs/guide/runs.md). Where it does not exist, small clips are drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lutetia.models.data.build import build_data
from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.ingest.synthetic import make_clips


def main(clips: Path, out: Path, count: int = 72) -> None:
    if not clips.exists():
        make_clips(clips, count, seed=0, frames=8, size=32)
        print(f"drew {count} clips in {clips}")
    settings = BuildSettings(
        experts=3,
        frames=8,
        height=16,
        width=16,
        latents="pixels",  # no autoencoder; for real clips name one by folder or hub id
        smallest=4,
        cache=out.parent / "cache",
    )
    report = build_data(clips, out, settings)
    for shard, cluster in zip(report.description.shards, report.description.clustering.clusters, strict=True):
        print(f"shard {shard.index} {shard.name}: {cluster.clips} clips, purity {cluster.purity}, {', '.join(cluster.keywords)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
