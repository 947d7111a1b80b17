"""Environment variables that nothing reads are named."""

from __future__ import annotations

import pytest

from lutetia.cli.main import app
from lutetia.cli.variables import warn_of_unknown


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("LUTETIA_DEVCE", "did you mean LUTETIA_DEVICE?"),
        ("LUTETIA_STOPWITHIN", "did you mean LUTETIA_STOP_WITHIN?"),
        ("LUTETIA_TICKETS", "did you mean LUTETIA_TICKET?"),
        ("LUTETIA_QQQQQ", "lists all variables"),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown(app, {name: "1", "LUTETIA_LOG": "info", "HOME": "/"})
    text = capsys.readouterr().err
    assert text.startswith(f"lutetia: the variable {name} is unknown and has no effect; ")
    assert says in text
    assert text.count("\n") == 1


def test_a_level_of_the_log_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_unknown(app, {"LUTETIA_LOG": "verbose"})
    assert capsys.readouterr().err == "lutetia: LUTETIA_LOG='verbose' is none of debug, info, warning; info is used\n"


def test_variables_of_options_settings_and_processes_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    known = ("DEVICE", "HANG_AFTER", "RUN_ADDRESS", "COORDINATOR_LISTEN", "TICKET", "STATE_FOLDER", "HOME", "PARENT", "TEMPLATE")
    warn_of_unknown(app, {f"LUTETIA_{name}": "1" for name in known})
    assert capsys.readouterr().err == ""
