"""How often the coordinator reads who is there."""

from __future__ import annotations

from lutetia.coordinator.lookout import FULL_PACE, nodes_pause

HEARTBEAT = 20.0


def test_the_node_records_of_a_large_swarm_are_read_less_often_but_twice_in_their_life():
    assert nodes_pause(FULL_PACE, HEARTBEAT) == 0
    assert nodes_pause(3 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 4
    assert nodes_pause(1000 * FULL_PACE, HEARTBEAT) == 3 * HEARTBEAT / 2
