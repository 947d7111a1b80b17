"""The typed changes of a transition have the fields of the classes that they change."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from lutetia.node.machine import changes, state
from lutetia.protocol.stalled_claims import ClaimHistory


@pytest.mark.parametrize(
    ("changed", "typed"), [(state.MachineState, changes.MachineChanges), (state.ShardWork, changes.WorkChanges)]
)
def test_changes_have_the_fields_and_types_of_their_class(changed: type, typed: type):
    known = {"ClaimHistory": ClaimHistory}  # an alias names it before it is defined
    assert get_type_hints(typed, localns=known) == get_type_hints(changed, localns=known)


def test_evolve_with_an_unknown_field_raises():
    with pytest.raises(TypeError, match="has no \\['phaze'\\]"):
        state.evolve(state.MachineState(), phaze="idle")
