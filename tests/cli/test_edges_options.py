"""An option that would change nothing beside the others is refused, and so is what no option may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.command import SCENARIO, chairlift

PLAN = """\
base: s.yaml
slo: [{percentile: 99, ttft_ms: 500}]
rate_per_s: 1
axes: {replicas: [1, 2]}
"""
WITHOUT = "must not be given without"
DRY = "must not be given with --dry-run, which simulates nothing"
COST = ("explain-cost", "llama-3.1-8b", "--gpu", "h100")  # of a model that takes 131,072 tokens
IMPORT = ("trace", "import", "t.csv", "--prompt", "prompt_tokens", "--output")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    Path("p.yaml").write_text(PLAN)
    Path("t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,20\n0.5,20,5\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("explain", "3"), "explain: say which run, by --in DIR: this folder holds none"),
        (("explain", "3", "--in", "t.csv"), "t.csv: is a file, not a results folder"),
        (("report", "t.csv"), "t.csv: is a file, not a results folder"),
        (("agree", "t.csv", "t.csv"), "t.csv: is a file, neither a results folder nor a comparison.json"),
        (("explain", "3", "--by", "ttft"), f"--by: {WITHOUT} --slowest (got 'ttft')"),
        (("plan", "p.yaml", "--dry-run", "--json"), f"--json: {DRY}"),
        (("plan", "p.yaml", "--dry-run", "--emit", "k8s"), f"--emit: {DRY}"),
        (("plan", "p.yaml", "--dry-run", "--what-would-change"), f"--what-would-change: {DRY}"),
        (("plan", "p.yaml", "--json", "--emit", "shell"), "--emit: must not be given beside --json"),
        (("validate", "s.yaml", "--bench", "b.json", "--recorded-host"), "--recorded-host: must not be given beside"),
        ((*COST, "--past", "5"), f"--past: {WITHOUT} --prompt (got 5)"),
        ((*COST, "--context", "131073"), "--context: must be at most the 131072 tokens that llama-3.1-8b takes"),
        ((*COST, "--prompt", "131072", "--past", "1"), "--prompt: must be at most the 131072 tokens"),
        ((*IMPORT, "prompt_tokens"), "--output: must be another column than --prompt's"),
        ((*IMPORT, "output_tokens", "--time-unit", "ms"), f"--time-unit: {WITHOUT} --arrival (got 'ms')"),
        (("check", "vllm", "--requests", "t.csv"), "t.csv: prompt_tokens: must be at most 49"),
    ],
)
def test_an_option_without_effect_is_refused(words: tuple[str, ...], says: str) -> None:
    before = sorted(Path().iterdir())

    result = chairlift(*words)

    assert (result.status, result.err.count("\n")) == (2, 1), result
    assert result.err.startswith(f"error: {says}")
    assert sorted(Path().iterdir()) == before


def test_the_longest_context_is_priced() -> None:
    assert chairlift(*COST, "--context", "131072", "--prompt", "131071", "--past", "1").status == 0


def test_requests_of_the_cases_own_sizes_are_checked_anew() -> None:
    """The shipped policy keeps its promises on anybody's requests that are no longer than the cases' own."""
    Path("t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,49,49\n0.1,1,49\n")
    assert chairlift("check", "vllm", "--case", "room", "--requests", "t.csv").status == 0
    Path("t.csv").write_text("arrival_s,prompt_tokens,output_tokens,follows,think_s\n0,9,9,-1,0\n0,9,9,0,1\n")
    assert "t.csv: follows: a check serves no such column" in chairlift("check", "vllm", "--requests", "t.csv").err


def test_a_report_of_a_time_at_which_nothing_runs_is_refused() -> None:
    assert chairlift("run", "s.yaml", "-q", "--out", "o").status == 0
    for words, says in (
        (("--from", "9999"), "--from: must be at most"),
        (("--to", "0.000001"), "--to: must be at least"),
    ):
        for way in ((), ("--perfetto",)):
            result = chairlift("report", "o", *words, *way)
            assert (result.status, result.err.count("\n")) == (2, 1)
            assert result.err.startswith(f"error: {says}")
    assert not Path("o/report.html").exists()
    assert chairlift("report", "o", "--from", "1", "--to", "2").status == 0
