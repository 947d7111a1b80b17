"""The pictures of a run's page: the gallery of every mixture, within a bound of bytes, and the shards' contact sheets."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.video_files import write_gif
from lutetia.system.files import disk_errors, make_folder, replace_folder

_log = logging.getLogger(__name__)

LIST = "gallery.json"
REAL = "real"
"""The folder, beside those of the mixtures, of the training clips that fit the prompts."""
MOST_KEPT = 400
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PIXELS = 128
"""Small clips are enlarged to about this side."""
_LEAST_SHARE = 0.01
_MOST_EXPERTS = 8
"""Of each step at most so many experts are named, those with the largest shares, and none below one percent."""


def to_drop(times: Sequence[float], sizes: Sequence[int], most_bytes: int, most: int = MOST_KEPT) -> list[int]:
    """Which galleries to remove so that the rest fits: those between the nearest neighbours, so that the rest is spread evenly.

    The newest is always kept, and the first as long as two fit.

    Args:
        times: when each was made, ascending.
        sizes: bytes of each.
        most_bytes: bytes of all that are kept.
        most: how many are kept.
    """
    kept, dropped, total = list(range(len(times))), [], sum(sizes)
    while len(kept) > 1 and (total > most_bytes or len(kept) > most):
        inner = range(1, len(kept) - 1)
        place = min(inner, key=lambda at: times[kept[at + 1]] - times[kept[at - 1]], default=0)
        total -= sizes[kept[place]]
        dropped.append(kept.pop(place))
    return dropped


def keep_gallery(folder: RunFolder, most_bytes: int) -> None:
    """Keep the present gallery under its mixture's digest, and remove earlier ones beyond `most_bytes`. Raises DiskError."""
    with disk_errors(folder.galleries):
        mixture = json.loads((folder.gallery / LIST).read_text()).get("mixture", "")
        if not _DIGEST.fullmatch(mixture):
            return
        folder.galleries.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{mixture}.", suffix=".part", dir=folder.galleries))
        try:
            shutil.copytree(folder.gallery, part, dirs_exist_ok=True)
            replace_folder(part, folder.galleries / mixture)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        kept = sorted(kept_galleries(folder).items(), key=lambda item: (item[1], item[0]))
        sizes = [sum(file.stat().st_size for file in (folder.galleries / name).iterdir()) for name, _ in kept]
        for place in to_drop([made for _, made in kept], sizes, most_bytes):
            _log.info("removing the gallery of mixture %s: all galleries may have %d bytes", kept[place][0][:12], most_bytes)
            shutil.rmtree(folder.galleries / kept[place][0], ignore_errors=True)


def kept_galleries(folder: RunFolder) -> dict[str, float]:
    """Digest of each mixture whose gallery is kept -> when it was sampled (Unix seconds)."""
    found = {}
    try:
        names = [path.name for path in folder.galleries.iterdir() if _DIGEST.fullmatch(path.name)]
    except OSError:
        return {}
    for name in names:
        try:
            found[name] = (folder.galleries / name / LIST).stat().st_mtime
        except OSError:
            continue  # it is being removed
    return found


def copy_sheets(data: Path, sheets: Path) -> None:
    """The contact sheets of the training clips, for the run's page; data of other makers have none."""
    for path in sorted((data / "sheets").glob("[0-9][0-9][0-9]-*.png")):
        make_folder(sheets)
        shutil.copyfile(path, sheets / f"{path.name[:3]}.png")


def experts_of(routing: Sequence[Sequence[float]]) -> list[list[tuple[int, float]]]:
    """Of each step, from noise to clip: the experts that drew it and their shares, the largest first.

    `routing`: weights of all experts at each step, [steps][K].
    """
    steps = []
    for weights in routing:
        ranked = sorted(enumerate(weights), key=lambda item: -item[1])[:_MOST_EXPERTS]
        steps.append([(expert, round(share, 3)) for expert, share in ranked if share >= _LEAST_SHARE])
    return steps


def written_prompts(folder: Path) -> list[str] | None:
    """The prompts whose training clips are in `folder`; None where there are none."""
    try:
        return json.loads((folder / LIST).read_text())["prompts"]
    except (OSError, ValueError, KeyError):
        return None


def write_gallery(
    out: Path, entries: Sequence[Mapping[str, Any]], clips: Iterable[Any], fps: float, about: Mapping[str, Any]
) -> None:
    """Replace the folder `out` by one GIF per entry and `gallery.json`, which is `about` and the entries with their files.

    `clips`: uint8 [F, H, W, 3] each.
    """
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        listed = []
        for index, (entry, clip) in enumerate(zip(entries, clips, strict=True)):
            factor = max(1, _PIXELS // max(clip.shape[1:3]))
            pictures = [Image.fromarray(frame).resize((frame.shape[1] * factor, frame.shape[0] * factor), 0) for frame in clip]
            file = f"{index:03d}.gif"
            write_gif(pictures, part / file, fps, shared_palette=False)
            listed.append({**entry, "file": file})
        (part / LIST).write_text(json.dumps({**about, "clips": listed}, ensure_ascii=False))
        part.chmod(0o755)
        replace_folder(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
