"""The scripts of recipes/study, which are no package, are imported as they import each other."""

from __future__ import annotations

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "study"), str(RECIPES / "paper")]
