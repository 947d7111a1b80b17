"""How the settings name devices, and what each may take."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lutetia.node.device_settings import choose, named_device, read_cap, read_devices
from lutetia.node.settings import load_settings
from lutetia.node.trainer.probe import available_memory
from lutetia.system.errors import ConfigError
from tests.child_environment import child_environment


def test_several_devices_share_the_cores_unless_the_volunteer_says_otherwise():
    cpu, cuda = choose(("cpu:0", "cuda:1"), {"cuda:1": 3}, {"cuda:1": 10**9}, 100, cores=8)
    assert (cpu.threads, cpu.memory, cpu.local_bytes_per_day, cpu.torch_name) == (4, None, 50, "cpu")
    assert (cuda.threads, cuda.memory, cuda.torch_name) == (3, 10**9, "cuda:1")
    assert [choice.threads for choice in choose(("cuda:0",), None, None, 100, cores=8)] == [None], "as torch chooses"
    assert [choice.memory for choice in choose(("cuda:0", "cuda:1"), 2, 5, 100)] == [5, 5]


def test_settings_name_devices_and_limits():
    settings, _ = load_settings(
        {"ticket": "x", "device": "cuda, cuda:2", "threads": "cuda:0=4", "memory_limit": {"cuda:2": "20GB"}}
    )
    assert (settings.devices, settings.threads, settings.memory_limit) == (
        ("cuda:0", "cuda:2"), {"cuda:0": 4}, {"cuda:2": 20 * 10**9},
    )  # fmt: skip
    assert read_devices("auto") == ("auto",)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"device": "cpu,cpu:0"}, "cpu:0 is named twice"),
        ({"device": "cuda:0,auto"}, "is not allowed"),
        ({"device": "cuda:0", "threads": "cuda:1=4"}, "threads: it names cuda:1, which is not among the devices cuda:0"),
        ({"threads": "gpu=4"}, "'gpu' is no device"),
        ({"threads": "0"}, "'0' is no number of threads between 1 and 1024"),
        ({"memory_limit": "cuda:0=much"}, "'much' is no number of bytes, like 20GB"),
    ],
)
def test_wrong_devices_and_limits_are_explained(values: dict[str, str], says: str):
    with pytest.raises(ConfigError, match="options: ") as caught:
        load_settings({"ticket": "x", **values})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_device_is_named_by_its_number_where_that_is_clear():
    names = ("cuda:0", "cuda:2", "xpu:2", "cpu")
    assert [named_device(text, names) for text in ("cuda", "cuda:2", "xpu:2", "cpu")] == ["cuda:0", "cuda:2", "xpu:2", "cpu"]
    assert named_device("1", ("cpu:0", "cpu:1")) == "cpu:1"
    with pytest.raises(ValueError, match="2 may mean cuda:2 or xpu:2"):
        named_device("2", names)
    with pytest.raises(ValueError, match="no device 7; its devices are cuda:0, cuda:2"):
        named_device("7", names)
    assert read_cap(None) is None


def test_memory_of_a_device_is_limited():
    assert available_memory("cpu", 1000) == 1000
    text = (
        "from lutetia.node.trainer.devices import _limit_process; _limit_process(1 << 26); kept = bytearray(1 << 24)\n"
        "try:\n    bytearray(1 << 28)\nexcept MemoryError:\n    print('short')"
    )
    if sys.platform.startswith("linux"):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=child_environment(), check=True)
        assert done.stdout == "short\n"
