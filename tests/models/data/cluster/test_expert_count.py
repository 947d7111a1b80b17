"""The number of experts by the data: groups of points are found, sizes and budget limit it, and every choice gives its reason."""

from __future__ import annotations

import numpy as np

from lutetia.models.data.build_settings import ClusterSettings
from lutetia.models.data.cluster.expert_count import SAMPLES_PER_EXPERT, Candidate, Proposal, choose, propose_experts

SETTINGS = ClusterSettings()


def propose(groups: int, each: int, samples: int | None = None, spread: float = 0.05) -> Proposal:
    """The proposal for `groups` groups of `each` points around the corners of a simplex."""
    generator = np.random.default_rng(0)
    centres = np.eye(max(groups, 8))[:groups]
    points = np.concatenate([centre + spread * generator.standard_normal((each, centres.shape[1])) for centre in centres])
    keys = [str(row) for row in range(len(points))]
    return propose_experts(points.astype(np.float32), keys, ["" for _ in keys], SETTINGS, samples)


def test_groups_of_points_are_counted() -> None:
    for groups in (2, 4):
        proposal = propose(groups, 60)
        assert proposal.experts == groups
        assert "clusters of 60 to 60 clips" in proposal.reason


def test_points_without_groups_get_one_expert() -> None:
    generator = np.random.default_rng(0)
    points = generator.standard_normal((200, 64)).astype(np.float32)
    proposal = propose_experts(points, [str(row) for row in range(200)], [""] * 200, SETTINGS, None)
    assert proposal.experts == 1
    assert "no clusters" in proposal.reason


def test_budget_limits_the_number_and_more_budget_allows_more() -> None:
    chosen = [propose(6, 40, budget * SAMPLES_PER_EXPERT).experts for budget in (1, 3, 5, 6, 40)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[1] <= 3
    assert chosen[-1] == 6


def test_too_few_clips_for_two_experts_is_said() -> None:
    proposal = propose(3, 2)
    assert proposal.experts == 1
    assert "not enough for two" in proposal.reason


def test_of_close_silhouettes_the_fewest_experts_win() -> None:
    tried = [Candidate(2, 0.29, 50, 90), Candidate(3, 0.307, 30, 60), Candidate(4, 0.313, 20, 40), Candidate(8, 0.07, 4, 20)]
    assert choose(tried, 140, None).experts == 3
    assert choose([*tried[:2], Candidate(4, impossible="too uneven")], 140, None).experts == 2
