"""Our SGLang policy makes the decisions of the real scheduler, turn for turn, version by version.

``data/sglang-*.jsonl.gz`` hold varied cases of SGLang's own event loop, driven on the CPU with made-up outputs: with
and without overlap, pages of 1, 16 and 64 tokens, cut prompts, mixed steps, every order, priorities, retraction.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import ledger
from chairlift.policies import sglang
from kit.places import TESTS, TRUTH

HERE = sorted((TESTS / "data").glob("sglang-*.jsonl.gz"))
CASES = [(path, case) for path in HERE for case in ledger.cases(path)]
ALL = sorted(TRUTH.glob("ledgers/sglang-*.jsonl.gz"))


def told(value: Any) -> str:
    if isinstance(value, Path):
        return value.name.removesuffix(".jsonl.gz")
    kind = ["sync" if value["disable_overlap_schedule"] else "overlap", value["schedule_policy"]]
    return f"{value['seed']}-{'-'.join(kind)}"


@pytest.mark.parametrize(("path", "case"), CASES, ids=told)
def test_every_decision_is_the_engines(path: Path, case: dict[str, Any]) -> None:
    assert ledger.difference(case, *ledger.engine_of(case, path)) is None


@pytest.mark.parametrize("path", HERE, ids=told)
def test_the_cases_are_varied(path: Path) -> None:
    cases = list(ledger.cases(path))
    rows = [row for case in cases for row in case["ledger"]]

    assert len(cases) == 30
    assert {case["page_size"] for case in cases} == {1, 16, 64}
    assert {case["schedule_policy"] for case in cases} >= {"fcfs", "lpm", "dfs-weight", "lof"}
    for setting in ("disable_overlap_schedule", "disable_radix_cache", "enable_mixed_chunk", "retraction_policy"):
        assert len({case[setting] for case in cases}) == 2
    assert {request["ignore_eos"] for case in cases for request in case["requests"]} == {False, True}
    assert {row["kind"] for row in rows} == {"extend", "mixed", "decode", "none", "idle"}
    assert sum(len(row["retracted"]) for row in rows) > 10
    assert sum(cached > 0 for row in rows for _, cached in row.get("prefix", ())) > 50
    assert sum(row["chunked"] is not None for row in rows) > 100


NOT_TOLD = ("an empty running batch is not full",)  # by no recorded case


@pytest.mark.parametrize("rule", [rule for rule in sglang.RULES if rule not in NOT_TOLD])
def test_without_a_rule_some_case_differs(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang does what the table says: 0.5.23 without a rule that came after 0.5.17 is not 0.5.23."""
    monkeypatch.delitem(sglang.RULES, rule)

    assert any(ledger.difference(case, "sglang", "0.5.23") for path, case in CASES if "0.5.23" in path.name)


@pytest.mark.skipif(not ALL, reason="needs the ledgers in ../shared/truth/ledgers")
@pytest.mark.parametrize("path", ALL, ids=told)
def test_all_recorded_cases_are_identical(path: Path) -> None:
    """Those that lie here too have been replayed above."""
    assert ledger.differences(path, but=[case for other, case in CASES if other.name == path.name]) == {}


@pytest.mark.parametrize("column", ledger.ENGINES["sglang"].columns)
def test_a_difference_in_any_column_is_found(column: str) -> None:
    case = copy.deepcopy(CASES[0][1])
    row = next(row for row in case["ledger"][4:] if column in row)
    row[column] = {"kind": "?", "ratio": 7.0, "full": not row["full"]}.get(column, [[10_000, 1]])

    found = ledger.difference(case, "sglang", case["sglang"]) or ""
    assert found.startswith(f"step {row['step']}: ")
    assert column in found
