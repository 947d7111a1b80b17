"""Which packages a machine needs for the GPU benchmark besides a torch that drives its card."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

ROOTS = (
    "diffusers", "transformers", "accelerate", "safetensors", "pydantic", "pydantic-settings", "cryptography", "typer", "rich",
    "platformdirs", "psutil", "scipy", "pillow", "scikit-learn", "scikit-image",
)  # fmt: skip
THERE = ("torch", "numpy")
"""What comes with the machine's own torch."""


def wheels() -> list[str]:
    """`name==version` of all packages to carry, in the versions that are installed here."""
    carried = closure(ROOTS) - closure(THERE)
    return sorted(f"{name}=={version(name)}" for name in carried)


def closure(names: Iterable[str]) -> set[str]:
    """The packages and all that they require here, without extras; those that are not installed are not needed here."""
    waiting, found = [_normal(name) for name in names], set[str]()
    while waiting:
        name = waiting.pop()
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [_normal(re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0]) for line in wanted if "extra ==" not in line]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
