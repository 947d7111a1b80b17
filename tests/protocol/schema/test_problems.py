"""What is wrong in settings is said in one sentence, without a word of pydantic's."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lutetia.cli.arguments import settings_of
from lutetia.coordinator.settings import RunSettings, ServeSettings
from lutetia.models.study.config import StudyConfig
from lutetia.node.settings import load_settings
from lutetia.protocol.schema.problems import unknown_key
from lutetia.system.errors import ConfigError

ROOT = Path(__file__).parents[3]
TECHNICAL = ("should", "pattern", "^", "Input", "Value error", "valid tuple", "parse", "pydantic", "\n", "string_")

RUN: list[tuple[dict[str, Any], str]] = [
    ({"addresses": ["0.0.0.0:41000"]}, "addresses.0: 0.0.0.0 is where a machine listens, not where others reach it"),
    ({"addresses": ["[::]:41000"]}, "is where a machine listens"),
    ({"addresses": ["my_host:41000"]}, "'my_host' is no host name"),
    ({"addresses": ["myhost"]}, "'myhost' is not host:port; write it like 203.0.113.5:41000"),
    ({"addresses": ["999.1.1.1:41000"]}, "999.1.1.1 is no IP address; write host:port"),
    ({"addresses": ["2001:db8::1:41000"]}, "is not host:port"),
    ({"addresses": ["a.example:0"]}, "port 0, which nobody can dial"),
    ({"addresses": ["a.example:70000"]}, "no port between 0 and 65535"),
    ({"addresses": "a.example:1"}, "addresses: must be a list, not 'a.example:1'"),
    ({"namee": "x"}, "namee: is unknown; did you mean name?"),
    ({"timing": {"heartbeet": 1}}, "timing.heartbeet: is unknown; did you mean heartbeat?"),
    ({"preset": "tin"}, "preset: must be 'tiny' or 'demo', not 'tin'"),
    ({"samples_per_shard": -1}, "samples_per_shard: must be at least 1, not -1"),
    ({"holdout_tolerance": "x"}, "holdout_tolerance: must be a number, not 'x'"),
    ({"allowlist": ["xyz"]}, "allowlist.0: 'xyz' is not allowed (Public keys that may take part"),
]
SERVE: list[tuple[dict[str, Any], str]] = [
    ({"stitch": "never"}, "stitch: must be 'refresh' or 'end', not 'never'"),
    ({"threads": 0}, "threads: must be at least 1, not 0"),
    ({"listen": "1.2.3.4:5"}, "listen: '1.2.3.4:5' is not allowed (Multiaddress to listen on, as /ip4/0.0.0.0/tcp/41000"),
    ({"gallery": "perhaps"}, "gallery: must be true or false, not 'perhaps'"),
    ({"http": "8080"}, "http: '8080' is not host:port"),
]
NODE: list[tuple[dict[str, Any], str]] = [
    ({"device": "tpu"}, "device: 'tpu' is not allowed (Devices to train on: auto"),
    ({"disk_limit": "lots"}, "disk_limit: 'lots' is not allowed (Most disk space for blobs, like 50GB"),
    ({"duty": 2}, "duty: must be at most 1, not 2"),
    ({"precision": "f"}, "precision: must be 'auto', 'float32', 'bfloat16' or 'float16', not 'f'"),
]


def one_sentence(caught: pytest.ExceptionInfo[ConfigError], says: str) -> None:
    text = str(caught.value)
    assert text.startswith("options: ")
    assert says in text
    assert not any(word in text for word in TECHNICAL)


@pytest.mark.parametrize(("values", "says"), RUN, ids=str)
def test_a_wrong_setting_of_a_run_is_explained(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(RunSettings, "options", values)
    one_sentence(caught, says)


@pytest.mark.parametrize(("values", "says"), SERVE, ids=str)
def test_a_wrong_setting_of_a_coordinator_is_explained(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(ServeSettings, "options", values)
    one_sentence(caught, says)


@pytest.mark.parametrize(("values", "says"), NODE, ids=str)
def test_a_wrong_setting_of_a_node_is_explained(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"ticket": "x", **values})
    one_sentence(caught, says)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_every_key_of_the_shipped_studies_is_known(path: Path) -> None:
    assert unknown_key(tomllib.loads(path.read_text()), StudyConfig) is None


def test_an_unknown_key_is_found_in_unions_and_not_in_free_tables() -> None:
    class Cat(BaseModel):
        lives: int = 9

    class Dog(BaseModel):
        tricks: dict[str, Cat] = {}

    class Owner(BaseModel):
        pet: Cat | Dog | None = None

    assert unknown_key({"pet": {"tricks": {"any name": {"lives": 1}}}}, Owner) is None
    assert unknown_key({"pet": {"lifes": 1}}, Owner) == "pet.lifes: is unknown; did you mean lives?"
