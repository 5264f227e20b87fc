"""Where things lie: the checkout, and the data beside it that tests skip without."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ROOT / ".package"  # the folder that makes the checkout importable as `chairlift`
TESTS = ROOT / "tests"
SHARED = ROOT.parent / "shared"
TRACES = SHARED / "traces"
TRUTH = SHARED / "truth"
