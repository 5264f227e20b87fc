"""A new policy and a new router are one file each: dropped into ``policies/``, they are found by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.command import POLICY, ROUTER, replaced
from kit.places import ROOT


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with two files more."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (".package", "sim", "backend", "policies", "scenarios"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "policies" / "mine.py").write_text(POLICY)
    (folder / "policies" / "last.py").write_text(ROUTER)
    (folder / "s.yaml").write_text(
        replaced("{name: vllm}", "{name: mine, budget: 500}") + "replicas: 2\nrouter: {name: last, step: 2}\n"
    )
    return folder


def command(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / ".package"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "chairlift", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_both_are_listed_with_their_settings(copy: Path) -> None:
    assert "budget: int = 2048" in command(copy, "list", "policies").partition("Decode everybody")[2]
    assert "step: int = 1" in command(copy, "list", "routers").partition("The last replica")[2]


def test_both_serve_a_scenario_by_name(copy: Path) -> None:
    summary = json.loads(command(copy, "run", "s.yaml", "--json"))

    assert summary["completed"] == 30


def test_both_can_be_checked(copy: Path) -> None:
    assert command(copy, "check", "last").startswith("router Last of last\n")
