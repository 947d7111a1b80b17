"""Lanes draw their own batches and noise; a merge is a function of the lanes' files, whatever the threads."""

import hashlib
from pathlib import Path

import pytest
import torch

from lutetia.models.checking.result import ResultFiles, inspect_result
from lutetia.models.tensor_files import TensorFile, write_tensors
from lutetia.models.training.batches import Batches
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.lanes.merge import LaneFiles, merge_lanes
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.capabilities import COMPACT, LANES
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.system.errors import IntegrityError
from tests.models.tiny_experts import tiny_data, tiny_manifest

FILES = ("weights", "state", "trace")


def team_manifest(**fields) -> Manifest:
    team = TeamSpec(**{"lanes": 2, "shares": (1.0, 0.5), **fields.pop("team", {})})
    return tiny_manifest(team=team, needs=(LANES, *fields.pop("needs", ())), **fields)


def train_lane(manifest: Manifest, lane: int, folder: Path, parent: Path | None = None, epoch: int = 0) -> LaneFiles:
    """One epoch of a lane, from its parent's files to its own in `folder`."""
    trainer = ExpertTrainer(manifest, 0, tiny_data(), lane=lane)
    trainer.restore(epoch, parent and parent / "weights", parent and parent / "state")
    trainer.step()
    while not trainer.at_epoch_end:
        trainer.step()
    folder.mkdir()
    snapshot = trainer.snapshot()
    write_weights(snapshot, folder / "weights")
    write_state(snapshot, folder / "state", ema=False)
    write_tensors(folder / "trace", {"trace": torch.tensor(snapshot.trace)})
    return LaneFiles(lane, 4 * len(snapshot.trace), *(folder / name for name in FILES))


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES]


def test_lanes_draw_disjoint_clips_and_own_noise_and_lane_zero_of_one_is_todays() -> None:
    plain, team = tiny_manifest(), team_manifest(run=tiny_manifest().run_id, version=2)
    data = tiny_data()
    today, first, second = Batches(plain, 0, data), Batches(team, 0, data), Batches(team, 0, data, lane=1)
    assert torch.equal(today.at(0, 0).latents, first.at(0, 0).latents)
    assert torch.equal(today.at(0, 0).noise, first.at(0, 0).noise)
    assert torch.equal(today.at(0, 1).latents, second.at(0, 0).latents)  # the lanes take the batches in turn
    assert not torch.equal(first.at(0, 0).noise, second.at(0, 0).noise)
    assert not torch.equal(first.at(0, 0).time, second.at(0, 0).time)


@pytest.mark.parametrize("form", ["float32", "compact"])
def test_merge_is_the_weighted_mean_whatever_the_threads(form, tmp_path) -> None:
    manifest = team_manifest(checkpoints=form, needs=[COMPACT] * (form == "compact"))
    lanes = [train_lane(manifest, lane, tmp_path / f"lane {lane}") for lane in (0, 1)]
    assert [part.samples for part in lanes] == [24, 12]
    threads = torch.get_num_threads()
    for name, count, order in (("one", 1, lanes), ("many", 3, lanes[::-1])):
        (tmp_path / name).mkdir()
        torch.set_num_threads(count)
        try:
            merged = merge_lanes(manifest, 0, 1, order, tmp_path / name)
        finally:
            torch.set_num_threads(threads)
    assert digests(tmp_path / "one") == digests(tmp_path / "many")
    files = ResultFiles(0, 1, *(tmp_path / "one" / name for name in FILES))
    inspect_result(manifest, files, lambda: None)  # what the coordinator checks of every result holds of a merged one, too
    with TensorFile(files.weights) as weights, TensorFile(lanes[0].weights) as a, TensorFile(lanes[1].weights) as b:
        for name in weights:
            expected = ((a[name].double() * 24 + b[name].double() * 12) / 36).float().to(weights[name].dtype)
            assert torch.equal(weights[name], expected), name
    with TensorFile(files.trace) as trace, TensorFile(lanes[0].trace) as long, TensorFile(lanes[1].trace) as short:
        means = (long["trace"][:3].double() + short["trace"].double()) / 2
        assert torch.equal(trace["trace"], torch.cat([means.float(), long["trace"][3:]]))
        assert merged.loss == trace["trace"].double().mean().item()
    following = ExpertTrainer(manifest, 0, tiny_data(), lane=1)
    assert "accepted epoch 1" in following.restore(1, files.weights, files.state)
    assert following.samples == 24  # of the shard's budget, of which each epoch takes its whole interval


def test_lane_alone_keeps_its_numbers_and_the_outer_rate_scales_its_change(tmp_path) -> None:
    manifest, doubled = team_manifest(), team_manifest(team={"outer_rate": 2.0})
    first = train_lane(manifest, 0, tmp_path / "parent")
    second = train_lane(manifest, 1, tmp_path / "next", tmp_path / "parent", epoch=1)
    (tmp_path / "alone").mkdir()
    merge_lanes(manifest, 0, 2, [second], tmp_path / "alone")
    assert digests(tmp_path / "alone")[0] == digests(tmp_path / "next")[0]
    with TensorFile(tmp_path / "alone" / "state") as merged, TensorFile(second.state) as state:
        assert all(torch.equal(merged[name], state[name]) for name in state)
    (tmp_path / "doubled").mkdir()
    merge_lanes(doubled, 0, 2, [second], tmp_path / "doubled", parent=(first.weights, first.state))
    with TensorFile(tmp_path / "doubled" / "weights") as far, TensorFile(first.weights) as old, TensorFile(second.weights) as new:
        assert all(torch.allclose(far[name] - new[name], new[name] - old[name], atol=1e-6) for name in far)
    with pytest.raises(IntegrityError, match="parent is needed"):
        merge_lanes(doubled, 0, 2, [second], tmp_path / "doubled")
    with pytest.raises(IntegrityError, match="each is needed once"):
        merge_lanes(manifest, 0, 2, [second, second], tmp_path / "alone")


def test_replay_of_a_lane_repeats_its_losses_and_no_other_lanes(tmp_path) -> None:
    manifest = team_manifest()
    lane = train_lane(manifest, 1, tmp_path / "lane")
    with TensorFile(lane.trace) as trace:
        published = trace["trace"].tolist()
    end = ReplayEnd(lane.weights, lane.state)
    same = replay(manifest, 0, tiny_data(), ReplayParent(0), 6, end=end, lane=1)
    other = replay(manifest, 0, tiny_data(), ReplayParent(0), 3, lane=0)
    assert list(same.losses) == pytest.approx(published, abs=0)
    assert same.drift == 0
    assert list(other.losses) != published


def test_lane_stopped_within_its_share_resumes_to_equal_bytes(tmp_path) -> None:
    manifest = team_manifest()
    whole = train_lane(manifest, 1, tmp_path / "whole")
    trainer = ExpertTrainer(manifest, 0, tiny_data(), lane=1)
    trainer.step()
    write_state(trainer.snapshot(), tmp_path / "local")
    successor = ExpertTrainer(manifest, 0, tiny_data(), lane=1)
    successor.restore(0, local=tmp_path / "local")
    while not successor.at_epoch_end:
        successor.step()
    write_weights(successor.snapshot(), tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == whole.weights.read_bytes()
