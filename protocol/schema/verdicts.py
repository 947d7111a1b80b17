"""The acceptance checks by name, cheapest first, as records and the status document name them."""

from __future__ import annotations

from typing import Literal, get_args

CheckName = Literal["signature", "quarantine", "lineage", "size", "transfer", "format", "numbers", "holdout", "raw", "audit"]
"""The acceptance ladder, cheapest first."""


CHECK_NAMES: tuple[CheckName, ...] = get_args(CheckName)
