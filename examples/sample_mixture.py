"""Sample a mixture and write a video: `python examples/sample_mixture.py MIXTURE PROMPT OUT.mp4`.

`export_to_video` needs imageio-ffmpeg: `pip install imageio-ffmpeg`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers.utils import export_to_video

from lutetia.models.pipeline import LutetiaPipeline


def main(mixture: Path, prompt: str, out: Path) -> None:
    pipeline = LutetiaPipeline.from_pretrained(mixture)
    result = pipeline(prompt, seed=0)
    export_to_video(list(result.frames[0]), str(out), fps=int(pipeline.fps))  # float 0…1 [frames, height, width, 3]
    shares = result.routing.mean(dim=(0, 1)).tolist()
    print(f"wrote {out}; experts were used for {', '.join(f'{share:.0%}' for share in shares)} of the steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
