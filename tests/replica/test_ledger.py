"""Our policies make the decisions of the real schedulers, step for step, version by version.

``data/*.jsonl.gz`` hold varied cases of vLLM's own `Scheduler` and `AsyncScheduler`, driven on the CPU with made-up
outputs: preemption, prefix hits, chunks, priorities, asynchronous scheduling, and the settings that came since 0.23.
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
from chairlift.policies.base import Speculation
from chairlift.policies.vllm_turn import VllmTurn
from chairlift.policies.vllm_versions import RULES, VERSIONS, Rule
from chairlift.sim.replica.pipeline import InFlight
from kit import vllm_replay
from kit.places import IMPORTS, ROOT, TESTS, TRUTH

HERE = sorted((TESTS / "data").glob("vllm-*.jsonl.gz"))
CASES = [(path, case) for path in HERE for case in ledger.cases(path)]
OF_0_23 = [case for path, case in CASES if "0.23.0" in path.name]
ALL = sorted(TRUTH.glob("ledgers/vllm-*.jsonl.gz"))
PLAIN = [path for path in HERE if not any(kind in path.name for kind in ("hybrid", "pipeline", "speculation"))]
PIPELINED = [case for path, case in CASES if "pipeline" in path.name and "0.33" in path.name]
OVERTAKING = [case for path, case in CASES if "0.26.0-pipeline" in path.name]
DRAFTED = [case for path, case in CASES if "speculation" in path.name]
BOTH = [case for path, case in CASES if "speculation-pipeline" in path.name]
SIZING = {"largest_gpus", "retains_little", "null_block_apart"}  # rules that a ledger's own settings overrule
WINDOWED = [path for path in HERE if "hybrid" in path.name and "speculation" not in path.name]
SLIDING = [case for path, case in CASES if "speculation-hybrid" in path.name]


def told(value: Any) -> str:
    if isinstance(value, Path):
        return value.name.removesuffix(".jsonl.gz")
    kind = ["async" if value["async_scheduling"] else "sync", value["policy"]]
    kind += ["cache"] * value["prefix_caching"]
    return f"{value['seed']}-{'-'.join(kind)}"


@pytest.mark.parametrize(("path", "case"), CASES, ids=told)
def test_every_decision_is_the_engines(path: Path, case: dict[str, Any]) -> None:
    assert ledger.difference(case, *ledger.engine_of(case, path)) is None


@pytest.mark.parametrize("path", WINDOWED, ids=told)
def test_the_cases_with_windows_are_varied(path: Path) -> None:
    cases = list(ledger.cases(path))
    rows = [row for case in cases for row in case["ledger"]]

    assert len(cases) >= 12
    assert sum(len(row.get("preempted", ())) for row in rows) > 200
    assert sum(cached > 0 for row in rows for _, cached in row.get("new", ())) > 30
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 50
    assert len({case["layers"] for case in cases}) > 5
    for setting in ("async_scheduling", "prefix_caching", "reserve_full_isl", "policy", "window", "retention_interval"):
        assert len({case[setting] for case in cases}) > 1
    if "0.33" in path.name:
        kinds = {tuple(sorted({group["type"] for group in case["groups"]})) for case in cases}
        assert kinds == {("full", "sliding"), ("chunked", "full"), ("sliding",)}


@pytest.mark.parametrize("path", PLAIN, ids=told)
def test_the_cases_are_varied(path: Path) -> None:
    cases = list(ledger.cases(path))
    rows = [row for case in cases for row in case["ledger"]]

    assert len(cases) >= 30
    assert sum(len(row.get("preempted", ())) for row in rows) > 30
    assert sum(cached > 0 for row in rows for _, cached in row.get("new", ())) > 50
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 10
    for setting in ("async_scheduling", "prefix_caching", "reserve_full_isl", "policy", "block_size"):
        assert len({case[setting] for case in cases}) > 1


def test_settings_since_0_23_are_varied() -> None:
    cases = [case for path, case in CASES if "settings" in path.name]
    for setting in ("watermark", "max_num_active_seqs", "prefill_schedule_interval"):
        assert len({case[setting] for case in cases}) > 2


def concerns(rule: str, case: dict[str, Any]) -> bool:
    """Whether a rule can act in a case: some act with drafts, under priority, or in a pipeline alone."""
    if rule in ("pads_joining", "skips_drafts", "finds_kept_drafts"):
        return "num_speculative_tokens" in case
    if rule in ("any_victim_shifts", "on_after_itself"):
        return case["policy"] == "priority"
    return rule != "waits_for_flight" or "pipeline_parallel_size" in case


@pytest.mark.parametrize(
    "rule", sorted(RULES.keys() - {"largest_gpus", "retains_little", "null_block_apart", "hashes_ahead"})
)
def test_without_a_rule_some_case_differs(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine does what the table says: without a rule, a ledger of a version that has it differs."""
    since = RULES[rule].since
    monkeypatch.setitem(RULES, rule, Rule("", since=VERSIONS[-1], until=VERSIONS[0]))
    concerned = [(case, ledger.engine_of(case, path)) for path, case in CASES if concerns(rule, case)]
    having = [(case, name) for case, name in concerned if name[1].rpartition(".")[0] >= since]

    assert any(ledger.difference(case, *name) for case, name in having)


def test_the_cases_with_pipelines_are_varied() -> None:
    rows = [row for case in PIPELINED for row in case["ledger"]]

    assert sum(len(row.get("preempted", ())) for row in rows) > 20
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 5
    for setting in ("async_scheduling", "prefix_caching", "policy", "pipeline_parallel_size"):
        assert len({case[setting] for case in PIPELINED}) > 1


def test_the_cases_with_pipelines_of_0_26_are_varied() -> None:
    rows = [row for case in OVERTAKING for row in case["ledger"]]

    assert len(OVERTAKING) >= 20
    assert sum(len(row.get("preempted", ())) for row in rows) > 100
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 10
    assert sum("stops" in case for case in OVERTAKING) > 3
    for setting in ("async_scheduling", "prefix_caching", "reserve_full_isl", "policy", "pipeline_parallel_size"):
        assert len({case[setting] for case in OVERTAKING}) > 1


def test_until_0_26_nobody_waits_for_tokens_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of later versions each of these cases differs."""
    monkeypatch.setitem(RULES, "waits_for_flight", Rule(""))

    assert all(ledger.difference(case, "vllm", "0.26.0") for case in OVERTAKING)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_without_the_worker_s_rule_of_strays_some_case_differs(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk brings a token once it reaches what its worker was sent, not what the scheduler counts by then."""
    monkeypatch.setattr(InFlight, "compute", lambda _, request, tokens, when: request.compute(tokens, when))
    cases = [case for case in OVERTAKING if case["async_scheduling"] is asynchronous]

    assert any(ledger.difference(case, "vllm", "0.26.0") for case in cases)


def test_the_cases_with_pipelines_and_drafts_are_varied() -> None:
    rows = [row for case in BOTH for row in case["ledger"]]

    assert len(BOTH) >= 25
    assert all(case["async_scheduling"] for case in BOTH)
    assert sum(len(row.get("preempted", ())) for row in rows) > 50
    assert sum(len(row.get("padded", ())) for row in rows) > 20
    assert sum(cached > 0 for row in rows for _, cached in row.get("new", ())) > 20
    assert sum(case["totals"]["stale_outputs"] for case in BOTH) > 50
    for setting in ("prefix_caching", "policy", "num_speculative_tokens", "pipeline_parallel_size"):
        assert len({case[setting] for case in BOTH}) > 1
    assert {case["prefix_mode"] for case in BOTH} == {"lookahead", "drop", "plain"}
    assert {bool(case["k_by_batch"]) for case in BOTH} == {True, False}


def test_the_cases_with_windows_and_drafts_are_varied() -> None:
    rows = [row for case in SLIDING for row in case["ledger"]]

    assert len(SLIDING) >= 15
    assert sum(len(row.get("preempted", ())) for row in rows) > 100
    assert sum(len(row.get("padded", ())) for row in rows) > 10
    assert sum(cached > 0 for row in rows for _, cached in row.get("new", ())) > 30
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 30
    assert sum(case["totals"]["stale_outputs"] for case in SLIDING) > 50
    assert len({case["layers"] for case in SLIDING}) > 5
    for setting in ("async_scheduling", "prefix_caching", "policy", "num_speculative_tokens", "retention_interval"):
        assert len({case[setting] for case in SLIDING}) > 1


def test_who_is_passed_over_in_flight_does_not_hold_off_the_cadence_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that rule of `prefill_schedule_interval` a case with a pipeline differs."""
    monkeypatch.setattr(VllmTurn, "_deferred", property(lambda self: set(), lambda self, value: None), raising=False)
    cases = [case for case in PIPELINED if case.get("prefill_schedule_interval", 1) > 1]

    assert any(ledger.difference(case, "vllm", "0.33.0") for case in cases)


def without(monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    """Whoever is ``running``, or waits, may be in any step, whatever of theirs is in flight."""
    rule = InFlight.ready
    monkeypatch.setattr(InFlight, "ready", lambda self, request, runs: runs is running or rule(self, request, runs))
    if running:
        monkeypatch.setattr(InFlight, "ready_of", lambda _, requests: list(requests))


@pytest.mark.parametrize("running", [True, False], ids=["too soon after its latest", "preempted in flight"])
def test_without_a_rule_of_pipelines_some_case_with_drafts_differs(
    running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, running)

    assert any(ledger.difference(case, "vllm", "0.33.0") for case in BOTH)


@pytest.mark.parametrize(
    ("running", "asynchronous"),
    [(True, False), (True, True), (False, False)],
    ids=["a token in flight", "too soon after its latest", "preempted in flight"],
)
def test_without_a_rule_of_pipelines_some_case_differs(
    running: bool, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, running)
    cases = [case for case in PIPELINED if case["async_scheduling"] is asynchronous]

    assert any(ledger.difference(case, "vllm", "0.33.0") for case in cases)


def test_the_cases_with_drafts_are_varied() -> None:
    rows = [row for case in DRAFTED for row in case["ledger"]]

    assert len(DRAFTED) >= 20
    assert sum(len(row.get("preempted", ())) for row in rows) > 20
    assert sum(len(row.get("padded", ())) for row in rows) > 20
    assert sum(cached > 0 for row in rows for _, cached in row.get("resumed", ())) > 5
    assert sum(case["totals"]["stale_outputs"] for case in DRAFTED) > 5
    for setting in ("async_scheduling", "prefix_caching", "prefix_mode", "policy", "num_speculative_tokens"):
        assert len({case[setting] for case in DRAFTED}) > 1
    assert {bool(case["k_by_batch"]) for case in DRAFTED} == {True, False}


@pytest.mark.parametrize(
    "other",
    [{"lookahead": 0}, {"by_batch": ()}, {"prefix": "plain"}],
    ids=["slots for all drafts", "drafts by batch size", "the token behind a block"],
)
def test_without_a_rule_of_speculation_some_case_differs(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = vllm_replay.speculation_of

    def changed(case: dict[str, Any], version: str) -> Speculation | None:
        told = rule(case, version)
        return None if told is None else told._replace(**other)

    monkeypatch.setattr(vllm_replay, "speculation_of", changed)

    assert any(ledger.difference(case, "vllm", "0.33.0") for case in DRAFTED)


@pytest.mark.skipif(not ALL, reason="needs the ledgers in ../shared/truth/ledgers")
@pytest.mark.parametrize("path", ALL, ids=told)
def test_all_recorded_cases_are_identical(path: Path) -> None:
    """Those that lie here too have been replayed above."""
    assert ledger.differences(path, but=[case for other, case in CASES if other.name == path.name]) == {}


def spoil(column: str, value: object) -> tuple[dict[str, Any], int]:
    """A case whose ledger was changed in its fifth row, and that row's step."""
    case = copy.deepcopy(OF_0_23[0])
    row = case["ledger"][4]
    row[column] = value
    return case, row["step"]


@pytest.mark.parametrize("column", ledger.ENGINES["vllm"].columns)
def test_a_difference_in_any_column_is_found_at_its_step(column: str) -> None:
    case, step = spoil(column, 7 if column == "free_blocks" else [[10_000, 1]])

    found = ledger.difference(case, "vllm", "0.23.0") or ""
    assert found.startswith(f"step {step}: ")
    assert column in found


def test_a_ledger_that_is_cut_short_differs() -> None:
    case = copy.deepcopy(OF_0_23[0])
    del case["ledger"][-1]

    assert "theirs has ended" in (ledger.difference(case, "vllm", "0.23.0") or "")


def test_the_tool_counts_and_its_status_says_whether_all_are_identical(tmp_path: Path) -> None:
    good = tmp_path / "vllm-0.23.0.jsonl"
    good.write_text("".join(json.dumps(case) + "\n" for case in OF_0_23[:2]))
    bad = tmp_path / "vllm-0.23.0-bad.jsonl.gz"
    with gzip.open(bad, "wt") as file:
        file.write(json.dumps(spoil("scheduled", [[3, 1]])[0]))

    def run(*files: Path | str) -> tuple[int, list[str]]:
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

    nameless = good.rename(tmp_path / "good.jsonl")
    assert run(nameless)[0] == 2
    assert run("--engine", "vllm-0.23.0", nameless) == (0, ["2 of 2 cases identical"])
    assert run("--engine", "vllm-0.22.0", nameless)[0] == 2
