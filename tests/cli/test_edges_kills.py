"""The fast part of ``make kills``, and whether it would see what it looks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kills import kills
from kit.kills import _grows, _old_or_new, finished, reset, victims

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and groups of processes are POSIX's")


def test_a_killed_command_loses_and_mixes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []

    counts = kills(6, 4, victims(("run", "sweep")), told.append)

    assert told == []
    assert counts.total() == 6


def test_what_is_mixed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [run] = victims(("run",))
    Path("out/scenario.yaml").write_text("of another run")

    assert run.sound(run.state(), run.whole, run.known) == "neither what was there nor what should be"
    reset(run)
    assert run.sound(run.state(), run.whole, run.known) == ""
    assert finished(run) == ""
    Path("out/requests.parquet").write_bytes(b"")
    assert run.state() != run.whole


def test_what_is_lost_is_seen() -> None:
    whole = {"journal": {"a": "1", "b": "2"}, "rows": ["x", "y"]}
    sound, known = _grows("rows"), dict[str, int]()

    assert sound({"journal": {"a": "1", "b": "2"}, "rows": None}, whole, known) == ""
    assert sound({"journal": {"a": "1"}, "rows": None}, whole, known) == "1 entries of 2 that were written down"
    assert "not those" in sound({"journal": {"a": "9", "b": "2"}, "rows": None}, whole, known)
    assert "not that" in sound({"journal": dict(whole["journal"]), "rows": ["z"]}, whole, known)
    assert _old_or_new("old")("old", "new", known) == _old_or_new("old")("new", "new", known) == ""
    assert _old_or_new("old")("ol", "new", known) != ""
