"""The names of the acceptance checks, as records, ledger events and the status document use them."""

from __future__ import annotations

from typing import Literal, get_args

CheckName = Literal["signature", "quarantine", "lineage", "size", "transfer", "format", "numbers", "holdout", "raw", "audit"]
"""One acceptance check. `coordinator.acceptance.checks` says what each requires."""

CHECK_NAMES: tuple[CheckName, ...] = get_args(CheckName)
"""All of them, in the order in which they run: cheapest first."""
