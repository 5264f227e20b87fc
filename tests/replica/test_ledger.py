"""Our vLLM policy makes the decisions of the real vLLM 0.23.0 scheduler, step for step.

``data/vllm-0.23.0.jsonl.gz`` holds varied cases of vLLM's own `Scheduler` and `AsyncScheduler`, driven on the CPU with
made-up outputs: preemption, prefix hits, chunks, priorities, asynchronous scheduling.
"""

from __future__ import annotations

import copy
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ledger
from kit.places import IMPORTS, ROOT, TESTS, TRUTH

CASES = list(ledger.cases(TESTS / "data" / "vllm-0.23.0.jsonl.gz"))
ALL = TRUTH / "ledgers" / "vllm-0.23.0.jsonl.gz"


def told(case: dict[str, Any]) -> str:
    kind = ["async" if case["async_scheduling"] else "sync", case["policy"]]
    kind += ["cache"] * case["prefix_caching"]
    return f"{case['seed']}-{'-'.join(kind)}"


@pytest.mark.parametrize("case", CASES, ids=told)
def test_every_decision_is_vllms(case: dict[str, Any]) -> None:
    assert ledger.difference(case) is None


def test_the_cases_are_varied() -> None:
    rows = [row for case in CASES for row in case["ledger"]]

    assert len(CASES) >= 40
    assert sum(len(row.get("preempted", ())) for row in rows) > 100
    assert sum(cached > 0 for row in rows for _, cached in row.get("new", ())) > 50
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 20
    for setting in ("async_scheduling", "prefix_caching", "reserve_full_isl", "policy", "block_size"):
        assert len({case[setting] for case in CASES}) > 1


@pytest.mark.skipif(not ALL.is_file(), reason="needs the 400 cases in ../shared/truth/ledgers")
def test_all_recorded_cases_are_identical() -> None:
    assert {case["seed"]: found for case in ledger.cases(ALL) if (found := ledger.difference(case))} == {}


def spoil(column: str, value: object) -> tuple[dict[str, Any], int]:
    """A case whose ledger was changed in its fifth row, and that row's step."""
    case = copy.deepcopy(CASES[0])
    row = case["ledger"][4]
    row[column] = value
    return case, row["step"]


@pytest.mark.parametrize("column", ledger.COLUMNS)
def test_a_difference_in_any_column_is_found_at_its_step(column: str) -> None:
    case, step = spoil(column, 7 if column == "free_blocks" else [[10_000, 1]])

    assert (ledger.difference(case) or "").startswith(f"step {step}: ")
    assert column in (ledger.difference(case) or "")


def test_a_ledger_that_is_cut_short_differs() -> None:
    case = copy.deepcopy(CASES[0])
    del case["ledger"][-1]

    assert "theirs has ended" in (ledger.difference(case) or "")


def test_the_tool_counts_and_its_status_says_whether_all_are_identical(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(case) + "\n" for case in CASES[:2]))
    bad = tmp_path / "bad.jsonl.gz"
    with gzip.open(bad, "wt") as file:
        file.write(json.dumps(spoil("scheduled", [[3, 1]])[0]))

    def run(*files: Path) -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, str(TESTS / "ledger.py"), *map(str, files)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={"PYTHONPATH": str(IMPORTS), "PATH": ""},
        )
        return done.returncode, done.stdout.splitlines()

    assert run(good) == (0, ["2 of 2 cases identical"])
    status, lines = run(good, bad)
    assert status == 1
    assert lines[-1] == "2 of 3 cases identical"
    assert "request 3: scheduled: theirs request 3 1 tokens" in lines[0]
    assert run(tmp_path / "missing.jsonl")[0] == 2
