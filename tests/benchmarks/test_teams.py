"""What nodes on one expert are worth: the merge, the bare loops, the order of the cells and the reading of the worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.runs import clips_of, manifest_of
from benchmarks.teams.arms import Arms, Cell, Result
from benchmarks.teams.clips import LATENT, TeamClips
from benchmarks.teams.grid import grid
from benchmarks.teams.loop import Node
from benchmarks.teams.main import main
from benchmarks.teams.merge import OuterStep, State, mean_state, packed, unpacked
from benchmarks.teams.sizes import SIZES
from benchmarks.teams.table import LINES, read_cells, write_cell
from benchmarks.teams.worth import Worth, worth
from lutetia.models.tensor_files import TensorFile, write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.lanes.merge import LaneFiles, merge_lanes
from lutetia.models.training.trainer import ExpertTrainer, initial_seed
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.model.team_spec import TeamSpec

CURVE = [(100, 0.9), (200, 0.8), (400, 0.6)]
ONE = Cell("toy", "one", 2, 6, 1.0, 0)
TWO_LANES = replace(ONE, arm="lanes", nodes=2, interval=3)


@pytest.fixture(scope="module")
def clips() -> TeamClips:
    train, held_out = clips_of(LATENT, 40), clips_of(LATENT, 8, seed=2)
    features = train.latents.mean((2, 3, 4)).numpy(), held_out.latents.mean((2, 3, 4)).numpy()
    return TeamClips(train, held_out, train, features)


def test_loop_of_one_node_trains_as_the_trainer_does() -> None:
    manifest = manifest_of(SIZES["toy"].expert, LATENT, batch=2, steps=5, epochs=1, learning_rate=3e-3, warmup_steps=2)
    trainer = ExpertTrainer(manifest, 0, clips_of(LATENT))
    node = Node(manifest, clips_of(LATENT), 3e-3, 5, initial_seed(manifest, 0))
    for _ in range(5):
        trainer.step()
    node.train(0, 5)
    snapshot, state = trainer.snapshot(), node.state()
    for expected, found in (
        (snapshot.parameters, state.parameters), (snapshot.ema, state.averages), (snapshot.moments, state.moments),
    ):  # fmt: skip
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_one_lane_is_one_node_whatever_the_interval(clips: TeamClips, tmp_path: Path) -> None:
    arms = Arms(clips, tmp_path)
    alone = arms.run(ONE).loss
    assert arms.run(replace(TWO_LANES, nodes=1, interval=4)).loss == pytest.approx(alone, abs=1e-6)
    assert arms.run(TWO_LANES).loss != pytest.approx(alone, abs=1e-6)


def test_branches_and_parents_give_a_loss_for_every_held_out_clip(clips: TeamClips, tmp_path: Path) -> None:
    arms, branches = Arms(clips, tmp_path), replace(ONE, arm="branches", nodes=2, parent=2)
    first = arms.run(branches)
    assert 0 < first.loss < 3
    assert arms.run(branches).loss == first.loss  # with the parent that is kept
    assert (tmp_path / "parent-toy-2-0.safetensors").exists()


def test_mean_of_states_weighs_lanes_by_their_samples() -> None:
    states = [
        State({"w": torch.tensor([value])}, {"m": torch.tensor([2 * value])}, {"w": -torch.tensor([value])})
        for value in (1.0, 4.0)
    ]
    mean = mean_state(states, [20, 10])
    assert [part.item() for part in (mean.parameters["w"], mean.moments["m"], mean.averages["w"])] == [2.0, 4.0, -2.0]
    again = unpacked(packed(mean))
    assert (again.parameters, again.moments, again.averages) == (mean.parameters, mean.moments, mean.averages)


def test_mean_of_states_is_what_the_coordinator_merges(tmp_path: Path) -> None:
    plain = manifest_of(SIZES["toy"].expert, LATENT, batch=2, steps=2, epochs=1)
    manifest = plain.model_copy(update={"team": TeamSpec(lanes=2), "needs": (LANES,)})
    states, files = list[State](), list[LaneFiles]()
    for lane in range(2):
        trainer = ExpertTrainer(manifest, 0, clips_of(LATENT), lane=lane)
        trainer.step()
        trainer.step()
        snapshot, paths = trainer.snapshot(), [tmp_path / f"{part}{lane}" for part in ("weights", "state", "trace")]
        write_weights(snapshot, paths[0])
        write_state(snapshot, paths[1], ema=False)
        write_tensors(paths[2], {"trace": torch.tensor(snapshot.trace)})
        states.append(State(snapshot.parameters, snapshot.moments, snapshot.ema))
        files.append(LaneFiles(lane, 4, *paths))
    (tmp_path / "merged").mkdir()
    merge_lanes(manifest, 0, 1, files, tmp_path / "merged")
    mean = mean_state(states, [4, 4])
    with TensorFile(tmp_path / "merged" / "state") as state, TensorFile(tmp_path / "merged" / "weights") as weights:
        assert all(torch.equal(state[f"param.{name}"], value) for name, value in mean.parameters.items())
        assert all(torch.equal(state[name], value) for name, value in mean.moments.items())
        assert all(torch.equal(weights[name], value) for name, value in mean.averages.items())


def test_outer_step_is_nesterov_of_torch_on_the_changes() -> None:
    outer = OuterStep(0.7, 0.9)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    ours, velocity = {"w": parameter.detach().clone()}, dict[str, Tensor]()
    for change in (torch.tensor([0.1, 0.2]), torch.tensor([-0.3, 0.1]), torch.tensor([0.2, 0.2])):
        parameter.grad = -change
        reference.step()
        ours, velocity = outer.apply(ours, {"w": ours["w"] + change}, velocity)
        torch.testing.assert_close(ours["w"], parameter.detach())


def test_outer_step_of_rate_one_without_momentum_is_the_mean() -> None:
    moved, velocity = OuterStep().apply({"w": torch.tensor(3.0)}, {"w": torch.tensor(5.0)}, {})
    assert moved["w"] == 5
    moved, _ = OuterStep().apply(moved, {"w": torch.tensor(4.0)}, velocity)
    assert moved["w"] == 4


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.9, Worth(1.0)),
        (0.7, Worth(2.0 * 2**0.5)),
        (0.6, Worth(4.0)),
        (0.59, Worth(4.0, ">")),
        (0.91, Worth(1.0, "<")),
    ],
)  # fmt: skip
def test_worth_is_read_between_points_in_log_steps(loss: float, expected: Worth) -> None:
    found = worth(CURVE, 100, loss)
    assert found is not None
    assert (found.bound, pytest.approx(found.nodes)) == (expected.bound, expected.nodes)


def test_worth_on_a_curve_that_rises_reads_the_lowest_so_far() -> None:
    risen = [(100, 0.9), (200, 0.95), (400, 0.6)]
    assert str(worth(risen, 100, 0.75)) == "2.00"
    assert worth(CURVE[:1], 100, 0.9) is None


def test_grid_tries_all_rates_once_and_goes_on_at_the_best() -> None:
    done = measured(lambda cell: abs(cell.rate - 2) + 1 / (cell.steps * cell.nodes))
    assert {cell.rate for cell in done if cell.steps > 500 or cell.seed} == {2}
    assert {cell.rate for cell in done if cell.arm == "lanes" and cell.batch == 2} == {1, 2, 4}
    assert {cell.nodes for cell in done} == {1, 2, 4, 8}
    assert {cell.interval for cell in done} == {0, 10, 50, 250}


def test_grid_trains_one_node_only_until_its_loss_is_below_the_teams() -> None:
    longest = {gain: max(cell.steps for cell in measured(lambda cell, g=gain: loss_of(cell, g))) for gain in (1.0, 1.5, 3.0, 9.0)}
    assert longest == {1.0: 500, 1.5: 1000, 3.0: 2000, 9.0: 4000}


def loss_of(cell: Cell, gain: float) -> float:
    """The loss where every team is worth `gain` nodes."""
    return 1 / (cell.steps * (1 if cell.arm == "one" else gain))


def measured(loss: Callable[[Cell], float]) -> dict[Cell, Result]:
    """All cells of 0.16 M with two seeds, as if they had these losses."""
    done: dict[Cell, Result] = {}
    while (cell := next((each for each in grid(done, frozenset({"0.16M"}), 2) if each not in done), None)) is not None:
        done[cell] = Result(loss(cell), 0.0)
    return done


def test_table_is_made_from_the_lines_of_a_killed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, loss in CURVE:
        write_cell(tmp_path, replace(ONE, steps=steps), Result(loss, 1.0))
    for rate, loss in ((1.0, 0.85), (2.0, 0.8), (4.0, 0.95)):
        write_cell(tmp_path, replace(TWO_LANES, steps=100, rate=rate), Result(loss, 1.0))
    with (tmp_path / LINES).open("a") as lines:
        lines.write(json.dumps(asdict(ONE))[:20])
    assert len(read_cells(tmp_path)) == 6
    main(["--out", str(tmp_path), "--table"])
    row = "| toy | first weights | 2 | 2 lanes, H = 3 | 100 | 2 | 0.8000 | 2.00 | 1 |"
    assert row in capsys.readouterr().out
    assert (tmp_path / "worth.png").stat().st_size > 1000


def test_lines_of_an_earlier_call_are_not_written_over(tmp_path: Path) -> None:
    write_cell(tmp_path, ONE, Result(1.0, 1.0))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--size", "toy"])
