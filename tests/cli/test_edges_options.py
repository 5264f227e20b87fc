"""An option that would change nothing beside the others is refused, and so is what no option may be."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
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
        (
            ("calibrate", "--recording", ".", "--model", "m", "--name", "../m"),
            "--name: must be a file's name, without /",
        ),
        (
            ("calibrate", "--recording", ".", "--model", "m", "--name", "C:m"),
            "--name: must be a file's name, without /",
        ),
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("report", "runs/s", "--out"),
            "x.txt: must end in .html, for it is a page; with --perfetto a trace is written",
        ),
        (
            ("report", "runs/s", "--perfetto", "--out"),
            "x.txt: must end in .json or .json.gz, for it is a trace; a page",
        ),
        (("compare", "runs/s", "--html"), "x.txt: must end in .html\n"),
        (("agree", "runs/s", "runs/s", "--json"), "x.txt: must end in .json\n"),
        (("validate", "s.yaml", "--bench", "b.json", "--json"), "x.txt: must end in .json\n"),
        (("calibrate", "--recording", "r", "--model", "opt-13b", "--plot"), "x.txt: must end in .html\n"),
        (("calibrate", "--recording", "r", "--model", "opt-13b", "--out"), "x.txt: must end in .json, by which a"),
        ((*IMPORT, "output_tokens", "--to"), "x.txt: must end in .csv, .csv.gz or .parquet\n"),
        (("trace", "write", "s.yaml"), "x.txt: must end in .csv, .csv.gz or .parquet\n"),
        (("trace", "export", "s.yaml", "--to", "mooncake"), "x.txt: must end in .jsonl\n"),
    ],
)
def test_a_file_is_not_written_by_the_name_of_another_kind(words: tuple[str, ...], says: str) -> None:
    """Before anything is read: neither the run nor the recording is there."""
    result = chairlift(*words, "x.txt")

    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"error: {says}")
    assert not Path("x.txt").exists()


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


def notes(*assignments: str, text: str = SCENARIO) -> str:
    """What the command prints below its tables, in one line."""
    Path("s.yaml").write_text(text)
    result = chairlift("run", "s.yaml", *(word for each in assignments for word in ("--set", each)))
    assert result.status == 0, result.err
    return " ".join(result.out.split())


TWO = SCENARIO + "tensor_parallel: 2\n"
MOE = SCENARIO.replace("opt-13b", "qwen3-30b-a3b").replace("a100-40gb", "h100")
FAILING = ("failures={schedule: [{replica: 0, at_s: 3, for_s: 1}]}",)


@pytest.mark.parametrize(
    ("assignments", "text", "unused"),
    [
        (("backend={name: roofline, link: 0.5, kernel_us: 9}",), SCENARIO, "not used: link 0.5, kernel_us 9 "),
        (("backend={name: roofline, by_part: false, link: 0.5, skew: 1}",), TWO, "not used: skew 1 "),
        (("backend={name: roofline, link: 0.5, mixed_overlap: 1}",), TWO, "not used: link 0.5, mixed_overlap 1 "),
        (("backend={name: roofline, by_part: false, skew: 1}",), MOE, "not used: by_part false "),
        (("backend={name: roofline, by_part: true, expert_rows: 2}",), SCENARIO, "not used: expert_rows 2 "),
        (("backend={name: roofline, mfu: 0.4, mixed_overlap: 0.2}",), SCENARIO, ""),
        (
            ("router=least_tokens", "router_stale_ms=9"),
            SCENARIO,
            "router LeastTokens (one replica); router_stale_ms 9 ",
        ),
        (("router=least_tokens", "router_stale_ms=9", "replicas=2"), SCENARIO, ""),
        (("start_up_s=2",), SCENARIO, "not used: start_up_s 2 (no failures) "),
        (("start_up_s=2", *FAILING), SCENARIO, ""),
        (
            ("router=least_tokens", "autoscale={min: 1, max: 2, every_s: 5, provision_s: 1, target_outstanding: 3}"),
            SCENARIO,
            "",
        ),
    ],
)
def test_a_setting_without_effect_is_named(assignments: tuple[str, ...], text: str, unused: str) -> None:
    said = notes(*assignments, text=text)
    assert unused in said
    assert ("not used" in said) == bool(unused)


@pytest.mark.parametrize(
    ("text", "without", "beside"),
    [
        (SCENARIO, "", ", link: 0.5, allreduce_us: 1, gemm_mfu: 0.3, kernel_us: 9, attention_us: 9, skew: 1"),
        (TWO, ", by_part: false", ", gemm_mfu: 0.3, kernel_us: 9, attention_us: 9, skew: 1, expert_rows: 9"),
        (TWO, "", ", mixed_overlap: 1, link: 0.1, allreduce_us: 99, skew: 1, expert_rows: 9"),
        (MOE, "", ", by_part: false, mixed_overlap: 1, link: 0.1, allreduce_us: 99"),
    ],
)
def test_what_is_named_as_not_used_changes_no_request(text: str, without: str, beside: str) -> None:
    found = []
    for more in (without, without + beside):
        said = notes(f"backend={{name: roofline{more}}}", text=text)
        found.append(pq.read_table("runs/s/requests.parquet"))
    assert found[0].equals(found[1])
    named = said[said.index("not used: ") :]
    assert all(f"{each.split(':')[0]} " in named for each in beside[2:].split(", "))


def test_prompts_shorter_than_their_prefix_are_counted() -> None:
    """Prompts of 10 to 300 tokens: none is shorter than 10, all but those of 300 are shorter than that."""
    assert "shorter than the prefix" not in notes("workload.prefix={groups: 2, tokens: 10}")
    fixed = SCENARIO.replace("prompt_tokens: {uniform: {low: 10, high: 300}}", "prompt_tokens: {values: [20, 30]}")
    said = notes("workload.prefix={groups: 2, tokens: 25}", text=fixed)
    rows = pq.read_table("runs/s/requests.parquet")["prompt_tokens"].to_pylist()
    assert f"{rows.count(20)} of 30 prompts are shorter than the prefix, so all of them is shared" in said
