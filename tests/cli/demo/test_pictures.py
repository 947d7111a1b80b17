"""Gallery, clips, curves and report, from hand-made frames and documents."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from lutetia.cli.demo.curves import LossCurve, loss_curves
from lutetia.cli.demo.report import DemoPhase, DemoReport, write_report
from lutetia.cli.demo.takeover import Takeover
from lutetia.cli.local.gallery import GalleryRow, compose, wrap, write_clip
from lutetia.coordinator.ledger.events import BaselineMeasured, CheckpointAccepted
from lutetia.models.video_files import write_gif, write_mp4
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.system.errors import UsageError
from lutetia.system.letters import font
from tests.cli.sample_documents import NOW, PEERS, manifest, status


def clip(colour: tuple[int, int, int], frames: int = 4, side: int = 16) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (frames, side, side, 3)).copy()


@pytest.fixture
def rows() -> list[GalleryRow]:
    prompts = ("a red square", "a green square that stands still on a long and winding description of nothing at all")
    return [GalleryRow(prompt, (clip((200, 30, 30)), clip((30, 200, 30)), clip((30, 30, 200)))) for prompt in prompts]


def test_gallery_puts_clips_side_by_side(rows: list[GalleryRow], tmp_path: Path) -> None:
    pictures = compose(rows, ("real clip", "mixture", "expert 0 alone"), cell=64)
    assert len(pictures) == 4
    pixels = np.asarray(pictures[0])
    found = [
        np.argwhere(abs(pixels.astype(int) - colour).sum(-1) < 12) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))
    ]
    left = [places[:, 1].min() for places in found]
    assert all(len(places) == 2 * 64 * 64 for places in found)
    assert left[0] < left[1] < left[2]


def test_gif_and_mp4_hold_every_frame(rows: list[GalleryRow], tmp_path: Path) -> None:
    pictures = compose(rows, ("a", "b", "c"), cell=32)
    write_gif(pictures, tmp_path / "samples.gif", fps=8)
    write_mp4(pictures, tmp_path / "samples.mp4", fps=8, seconds=1.0)
    with Image.open(tmp_path / "samples.gif") as image:
        assert image.size == pictures[0].size
        assert image.info["loop"] == 0
    with av.open(str(tmp_path / "samples.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert frames[0].shape[:2] == pictures[0].size[::-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.gif", "samples.mp4"]


def test_clip_format_follows_file_name(tmp_path: Path) -> None:
    for ending in ("gif", "mp4"):
        write_clip(clip((9, 99, 199), side=15), tmp_path / f"clip.{ending}", fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    assert frame.width >= 128
    with pytest.raises(UsageError, match=r"\.mp4 or \.gif"):
        write_clip(clip((0, 0, 0)), tmp_path / "clip.avi", fps=8)


def test_wrapped_text_fits() -> None:
    lines = wrap("the camera pans right over a very long and unusual temple", font(15), 120)
    assert len(lines) > 1
    assert all(font(15).getlength(line) <= 120 for line in lines)
    assert " ".join(lines) == "the camera pans right over a very long and unusual temple"


def acceptance(shard: int, epoch: int, loss: float) -> CheckpointAccepted:
    blob = BlobRef(digest="2" * 64, size=10)
    record = AcceptanceRecord(
        run="b4" * 32,
        owner=PEERS[0].public_key,
        issued=NOW,
        shard=shard,
        epoch=epoch,
        checkpoint="3" * 64,
        parent=None,
        weights=blob,
        state=blob,
        samples=1600 * epoch,
        author=PEERS[shard].public_key,
        tenure_until=NOW + 9,
        holdout_loss=loss,
    )
    return CheckpointAccepted(time=NOW + epoch, acceptance=record, parent_loss=1.0)


def test_curves_come_from_the_ledger() -> None:
    events = [BaselineMeasured(time=NOW, shard=0, loss=1.1), acceptance(0, 1, 0.8), acceptance(1, 1, 0.7), acceptance(0, 2, 0.6)]
    curves = loss_curves(events, ("digits", "shapes", "cameras"))
    assert [(curve.epochs, curve.losses) for curve in curves] == [((0, 1, 2), (1.1, 0.8, 0.6)), ((1,), (0.7,)), ((), ())]


def test_report_covers_experts_router_kill_and_machine(tmp_path: Path) -> None:
    takeover = Takeover("worker-3", PEERS[2].public_key, 2, "cameras", 2, 130.0, 640, 136.2, 137.0, "worker-1", 140.1, 171.3)
    curves = [
        LossCurve(k, name, (0, 1, 2), (1.0, 0.8, 0.6), (0.0, 1.0, 2.0), ("", *[PEERS[k].public_key] * 2))
        for k, name in enumerate(("digits", "shapes", "cameras"))
    ]
    report = DemoReport(
        manifest(),
        status(),
        curves,
        [DemoPhase("make clips", 12.2), DemoPhase("train", 200.0)],
        takeover.timeline(),
        {peer.public_key: f"worker-{k + 1}" for k, peer in enumerate(PEERS)},
        {"worker-1": "all of the time"},
        takeover,
        single="expert 0",
    )
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "3:32 minutes",
        "samples.gif",
        "| 2 | cameras | 500 |",
        "95.7 %",
        "worker-1 claimed expert 2",
        "640 samples",
        "cores",
    ):
        assert words in text
    for name in ("held-out-loss.png", "router-accuracy.png"):
        assert name in text
        with Image.open(tmp_path / name) as image:
            assert image.width > 500


def test_font_draws_accents_quotes_and_alphabets() -> None:
    def drawn(letter: str) -> bytes:
        picture = Image.new("L", (24, 24))
        ImageDraw.Draw(picture).text((4, 4), letter, fill=255, font=font(12))
        return picture.tobytes()

    missing = drawn("\uffff")
    assert all(drawn(letter) != missing for letter in "éïñß’“”—…·ЖΩ")
