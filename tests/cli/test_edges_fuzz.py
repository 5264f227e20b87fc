"""The fast part of ``make fuzz``: mutated files are read or refused, in time, and no misspelt key passes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz import FILES, fuzz, misspelt
from kit.command import chairlift


def test_no_mutation_is_a_traceback_a_hang_or_accepted_in_silence() -> None:
    told: list[str] = []

    counts = fuzz(40, 3, told.append)

    assert told == []
    assert set(counts) <= {"accepted", "refused"}
    assert counts["refused"] > 0 < counts["accepted"]


def test_a_misspelt_key_is_another() -> None:
    data = FILES["s.yaml"].encode()

    assert misspelt(data, random.Random(1)) != data
    assert misspelt(b"0.5,30,1\n", random.Random(1)) == b"0.5,30,1\n"


def test_a_summary_holds_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what `make fuzz` found: a list in place of a number was a traceback
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(FILES["s.yaml"])
    assert chairlift("run", "s.yaml", "-q").status == 0
    path = Path("runs/s/summary.json")
    path.write_text(path.read_text().replace('"completed": 3', '"completed": [3]'))

    result = chairlift("report", "runs/s")

    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "runs/s/summary.json: completed: is damaged" in result.err
