"""A check of your own over built shards, before you spend a swarm on them: `python examples/check_data.py DATA`.

This one lists clips that hardly move. Replace `motion` by whatever your clips must satisfy.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

from lutetia.models.data.description import DATA_FILE, DataDescription
from lutetia.models.data.parts.reader import load_shard


def motion(latents: Tensor) -> Tensor:
    """How much each clip moves: mean absolute difference of neighbouring frames. `latents [clips, C, F, H, W]` -> [clips]."""
    return latents.diff(dim=2).abs().flatten(1).mean(1)


def main(data: Path, least: float = 0.01) -> None:
    description = DataDescription.model_validate_json((data / DATA_FILE).read_text())
    for shard in description.shards:
        clips = load_shard(data / shard.train.path, description.latent)
        moved = motion(clips.latents)
        still = [caption for caption, value in zip(clips.captions, moved.tolist(), strict=True) if value < least]
        print(f"shard {shard.index} {shard.name}: {len(clips)} clips, mean motion {moved.mean():.3f}, {len(still)} still")
        for caption in still:
            print(f"  hardly moves: {caption}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
