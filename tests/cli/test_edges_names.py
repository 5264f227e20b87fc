"""A name in a YAML never leads out of ``runs``: what somebody else wrote must not overwrite anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.command import SCENARIO, chairlift

SWEEP = "base: s.yaml\nseeds: 2\naxes: {policy: [vllm]}\n"
PLAN = "base: s.yaml\nslo: [{percentile: 99, ttft_ms: 500}]\nrate_per_s: [1]\naxes: {replicas: [1]}\n"
NAMES = ("../../escaped", "/tmp/escaped", "a/b", "..", ".", "", "a\\b", "C:x", '"a\\0b"', '"a\\nb"', "y" * 201, '" a"')


@pytest.fixture(autouse=True)
def _deep_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b" / "c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("command", "text"), [("run", SCENARIO), ("sweep", SWEEP), ("plan", PLAN)])
def test_a_name_that_is_no_folder_is_refused_and_nothing_is_written(
    command: str, text: str, name: str, tmp_path: Path
) -> None:
    Path("s.yaml").write_text(SCENARIO)
    said = name if name.startswith('"') else f"'{name}'"
    Path("x.yaml").write_text(f"name: {said}\n{text}")
    before = everything(tmp_path)
    result = chairlift(command, "x.yaml", "--quiet")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: x.yaml:1: name: must be ")
    assert "results go to runs/<name>" in result.err
    assert "\0" not in result.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["8b on H100, ×2 [tuned]", "...", ":x:", "-q", "y" * 200])
def test_any_other_name_is_a_folder_in_runs(name: str) -> None:
    Path("s.yaml").write_text(f"name: '{name}'\n{SCENARIO}")
    assert chairlift("run", "s.yaml", "--quiet").status == 0
    assert [folder.name for folder in Path("runs").iterdir()] == [name]


def test_a_file_without_a_name_of_its_own_needs_one() -> None:
    Path("a\\b.yaml").write_text(SCENARIO)
    result = chairlift("run", "a\\b.yaml", "--quiet")
    assert (result.status, result.out) == (2, "")
    assert "name: must be a folder's name" in result.err
