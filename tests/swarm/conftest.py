"""Puts this folder's and the command line tests' helpers where the tests find them."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cli")]
