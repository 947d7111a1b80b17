"""The gallery of each mixture, the training clips beside it, and the shards' contact sheets: documents, files and routes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError

from lutetia.coordinator.galleries import LIST, REAL, kept_galleries
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.answers import SAFE, Answers
from lutetia.coordinator.web.api.history import History
from lutetia.coordinator.web.api.source import RunSource
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import MOST_SHARDS

_CLIP = re.compile(r"[0-9]{3,6}\.gif")
_SHEET = re.compile(r"[0-9]{3,6}\.png")
_MIXTURE = r"[0-9a-f]{64}"
_LARGEST_LIST = 16 << 20
_MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such thing"}}
_LASTING = {**SAFE, "Cache-Control": "public, max-age=86400"}


class RealClip(Frozen):
    """The training clip that fits a prompt best, as the run's autoencoder shows it."""

    url: str = Field(description="Where it is, relative to the server's root")
    caption: str = Field(description="Its caption")
    same: bool = Field(description="Whether its caption is the prompt; otherwise it is the nearest by the text encoder's vectors")
    similarity: float = Field(description="Cosine of the two texts' vectors; 1: the same caption")
    shard: int = Field(description="Index of the shard that it is in")


class GalleryClip(Frozen):
    """A sampled clip of a fixed prompt."""

    prompt: str = Field(description="The prompt")
    file: str = Field(description="Name of the file")
    url: str = Field(description="Where it is, relative to the server's root")
    seed: int = Field(description="Seed of its noise")
    experts: tuple[tuple[tuple[int, float], ...], ...] = Field(
        default=(), description="Of each step, from noise to clip: the experts that drew it and their shares, the largest first"
    )
    real: RealClip | None = Field(default=None, description="The training clip that fits the prompt best; null: none was chosen")


class GalleryStitch(Frozen):
    """A mixture whose gallery is kept."""

    mixture: str = Field(description="Digest of the mixture")
    event: int = Field(description="Number of the event that stitched it")
    time: float = Field(description="When it was stitched, in Unix seconds")
    epochs: tuple[int, ...] = Field(description="Accepted epoch of each shard in it")


class GalleryDocument(Frozen):
    """Clips of one mixture's gallery."""

    mixture: str | None = Field(description="Digest of the mixture; null: not known, or none yet")
    clips: tuple[GalleryClip, ...] = Field(description="One clip per fixed prompt")
    stitches: tuple[GalleryStitch, ...] = Field(default=(), description="All mixtures whose galleries are kept, oldest first")


def gallery_document(folder: RunFolder, history: History, mixture: str | None = None) -> GalleryDocument:
    """The gallery of `mixture`, or the newest; without clips while there is none."""
    place = folder.galleries / mixture if mixture else folder.gallery
    listed = _listed(place)
    stitches = gallery_stitches(folder, history)
    shown = mixture or listed.get("mixture")
    root = f"/api/v1/galleries/{shown}" if shown in {stitch.mixture for stitch in stitches} else "/api/v1/gallery"
    real = {clip.get("prompt"): clip for clip in _listed(folder.galleries / REAL).get("clips", ())}
    clips = [clip for entry in listed.get("clips", ()) if (clip := _clip(entry, root, real.get(entry.get("prompt"))))]
    return GalleryDocument(mixture=shown, clips=tuple(clips), stitches=stitches)


def gallery_stitches(folder: RunFolder, history: History) -> tuple[GalleryStitch, ...]:
    kept = kept_galleries(folder)
    newest = {point.mixture: point for point in history.mixtures if point.mixture in kept}
    ordered = sorted(newest.values(), key=lambda point: point.event)
    return tuple(
        GalleryStitch(mixture=point.mixture, event=point.event, time=point.time, epochs=point.epochs) for point in ordered
    )


def shards_with_sheets(folder: RunFolder) -> frozenset[int]:
    """The shards that have a contact sheet."""
    try:
        return frozenset(int(path.stem) for path in folder.sheets.iterdir() if _SHEET.fullmatch(path.name))
    except OSError:
        return frozenset()


def _clip(entry: dict[str, Any], root: str, real: dict[str, Any] | None) -> GalleryClip | None:
    """None if the list that earlier software wrote says something else."""
    try:
        chosen = (
            None
            if not real
            else RealClip(
                url=f"/api/v1/galleries/{REAL}/{real['file']}",
                **{name: real[name] for name in ("caption", "same", "similarity", "shard")},
            )
        )
        file = entry["file"]
        return GalleryClip(
            prompt=entry["prompt"], file=file, url=f"{root}/{file}", seed=entry.get("seed", 0),
            experts=entry.get("experts", ()), real=chosen,
        )  # fmt: skip
    except (KeyError, TypeError, ValidationError):
        return None


def _listed(folder: Path) -> dict[str, Any]:
    try:
        path = folder / LIST
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_LIST else {}
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _changed(path: Path) -> int:
    """Changes when the file is replaced; 0: there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def add_pictures(router: APIRouter, source: RunSource, answers: Answers) -> None:
    """Add the routes of the pictures to those of the API."""
    folder = source.folder

    def tag() -> str:
        times = (_changed(folder.gallery / LIST), _changed(folder.galleries), _changed(folder.galleries / REAL / LIST))
        return "-".join([source.tag(), *(f"{time:x}" for time in times)])

    @router.get("/gallery", response_model=GalleryDocument)
    async def gallery(request: Request) -> Response:
        """Clips of the fixed prompts, sampled from the last mixture whose gallery is done, and all mixtures with a gallery."""
        history = await source.up_to_date()
        return answers.answer(request, tag(), lambda: gallery_document(folder, history))

    @router.get("/gallery/{file}", response_class=FileResponse, responses=_MISSING)
    async def gallery_clip(file: Annotated[str, PathParameter(max_length=32)]) -> FileResponse:
        """One clip of the newest gallery, as a GIF."""
        return _file(folder.gallery, file, SAFE)

    @router.get("/galleries/{mixture}", response_model=GalleryDocument, responses=_MISSING)
    async def earlier(request: Request, mixture: Annotated[str, PathParameter(pattern=f"^{_MIXTURE}$")]) -> Response:
        """Clips of the fixed prompts, sampled from this mixture."""
        history = await source.up_to_date()
        if mixture not in kept_galleries(folder):
            raise HTTPException(404, "the gallery of this mixture is not kept")
        return answers.answer(request, tag(), lambda: gallery_document(folder, history, mixture))

    @router.get("/galleries/{mixture}/{file}", response_class=FileResponse, responses=_MISSING)
    async def earlier_clip(
        mixture: Annotated[str, PathParameter(pattern=f"^({_MIXTURE}|{REAL})$")],
        file: Annotated[str, PathParameter(max_length=32)],
    ) -> FileResponse:
        """One clip of a mixture's gallery, or of `real`, the training clips beside them, as a GIF."""
        return _file(folder.galleries / mixture, file, SAFE if mixture == REAL else _LASTING)

    @router.get("/shards/{index}/sheet.png", response_class=FileResponse, responses=_MISSING)
    async def sheet(index: Annotated[int, PathParameter(ge=0, lt=MOST_SHARDS)]) -> FileResponse:
        """The contact sheet of a shard: training clips that show what its expert learns, as a PNG."""
        path = folder.sheets / f"{index:03d}.png"
        if not path.is_file():
            raise HTTPException(404, "this run has no contact sheet of the shard")
        return FileResponse(path, media_type="image/png", headers=_LASTING)


def _file(folder: Path, file: str, headers: dict[str, str]) -> FileResponse:
    if not _CLIP.fullmatch(file) or not (folder / file).is_file():
        raise HTTPException(404, "the gallery has no such clip")
    return FileResponse(folder / file, media_type="image/gif", headers=headers)
