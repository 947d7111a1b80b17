"""Sample a mixture and write a video: `python examples/sample_mixture.py MIXTURE PROMPT OUT.mp4`.

diffusers' own `export_to_video` writes `pipeline(prompt).frames[0]`, too; it needs `pip install "lutetia[export]"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lutetia.models.pipeline import LutetiaPipeline
from lutetia.models.video_files import write_mp4


def main(mixture: Path, prompt: str, out: Path) -> None:
    pipeline = LutetiaPipeline.from_pretrained(mixture)
    result = pipeline(prompt, seed=0, output_type="pil")
    write_mp4(result.frames[0], out, pipeline.fps)
    shares = result.routing.mean(dim=(0, 1)).tolist()
    print(f"wrote {out}; experts were used for {', '.join(f'{share:.0%}' for share in shares)} of the steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
