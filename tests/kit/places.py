"""Where things lie: the checkout, and the data beside it that tests skip without."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ROOT / ".package"  # the folder that makes the checkout importable as `chairlift`
TESTS = ROOT / "tests"
SHARED = ROOT.parent / "shared"
TRACES = SHARED / "traces"
TRUTH = SHARED / "truth"


def with_tests() -> dict[str, str]:
    """The environment of a process that is to import `chairlift` and `kit`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (IMPORTS, TESTS)))}


def copied(folder: Path) -> Path:
    """Copies the package into ``folder``, which need not exist, to be changed there; what to put on ``PYTHONPATH``."""
    for name in (IMPORTS.name, "sim", "backend", "policies", "scenarios"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / IMPORTS.name
