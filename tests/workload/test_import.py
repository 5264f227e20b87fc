"""``chairlift trace import``: anybody's log as a trace; and what is said of files that no format reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from chairlift.sim.workload.formats.read import load
from kit.command import chairlift
from kit.places import TRACES

NAMED = ("--arrival", "ts", "--prompt", "prompt_tokens", "--output", "completion_tokens")
CSV = "id,ts,prompt_tokens,completion_tokens,user\n"
ROWS = ((0, 120, 30, "a"), (750, 320, 32, "b"), (1500, 220, 31, "a"))  # ms, prompt, output, tenant


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stamps(kind: str) -> list[str]:
    """The times of `ROWS` from 2026-01-05 08:00:00.5 UTC on, which is a Unix time of 1,767,600,000.5 s."""
    if kind.startswith("iso"):
        forms = {
            "iso z": ("2026-01-05T08:00:00.500Z", "2026-01-05T08:00:01.25Z", "2026-01-05T08:00:02Z"),
            "iso zone": ("2026-01-05T09:30:00.5+01:30", "2026-01-05T03:00:01.25-0500", "2026-01-05 08:00:02+00:00"),
            "iso plain": ("2026-01-05 08:00:00.500000000", "2026-01-05 08:00:01.250000000", "2026-01-05 08:00:02"),
        }
        return list(forms[kind])
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind]
    return [str((1_767_600_000_500 + ms) * factor // 1000) for ms, *_ in ROWS] if kind != "s" else [
        f"{1_767_600_000.5 + ms / 1000:.2f}" for ms, *_ in ROWS
    ]  # fmt: skip


def check(path: str = "log.trace.csv") -> None:
    trace = load(path)

    assert [ps / 1e9 for ps in trace.arrival_ps.tolist()] == [ms for ms, *_ in ROWS]
    assert trace.prompt_tokens.tolist() == [prompt for _, prompt, *_ in ROWS]
    assert trace.output_tokens.tolist() == [output for _, _, output, _ in ROWS]
    if trace.tenant is not None:
        assert [trace.tenants[i] for i in trace.tenant.tolist()] == [tenant for *_, tenant in ROWS]


@pytest.mark.parametrize("kind", ["iso z", "iso zone", "iso plain", "s", "ms", "us", "ns"])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_times_are_told_from_what_is_in_the_file(kind: str, separator: str) -> None:
    lines = [
        f"{i},{stamp},{prompt},{output},{user}\n"
        for i, (stamp, (_, prompt, output, user)) in enumerate(zip(stamps(kind), ROWS, strict=True))
    ]
    Path("log.csv").write_text((CSV + "".join(reversed(lines))).replace(",", separator))
    result = chairlift("trace", "import", "log.csv", *NAMED, "--tenant", "user")

    assert (result.status, result.err) == (0, "")
    assert "3 requests in log.trace.csv; in a scenario: workload: {file: log.trace.csv}" in result.out
    assert "columns not used: id" in result.out
    assert "rows brought in order of time" in result.out
    if not kind.startswith("iso"):
        words = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
        assert f"ts read as {words[kind]}" in result.out
    check()


def test_keys_within_keys_of_json_have_dots() -> None:
    rows = [
        {"ts": stamp, "usage": {"prompt_tokens": prompt, "completion_tokens": output}, "who": {"team": tenant}}
        for stamp, (_, prompt, output, tenant) in zip(stamps("iso z"), ROWS, strict=True)
    ]
    with gzip.open("log.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    named = ("--arrival", "ts", "--prompt", "usage.prompt_tokens", "--output", "usage.completion_tokens")
    for name in ("t.csv", "t.csv.gz", "t.parquet"):
        result = chairlift("trace", "import", "log.jsonl.gz", *named, "--tenant", "who.team", "--to", name)
        assert (result.status, result.err) == (0, "")
        check(name)
    Path("rows.json").write_text(json.dumps(rows, indent=1))
    assert chairlift("trace", "import", "rows.json", *named, "--tenant", "who.team").status == 0
    check("rows.trace.csv")


def test_a_benchmarks_lists_are_requests_too() -> None:
    """As ``vllm bench serve --save-result --save-detailed`` writes them; its times count from no known point."""
    result = {
        **{"date": "20260105-080000", "backend": "vllm", "num_prompts": 3, "request_rate": 1.5},
        **{"start_times": [7.5, 8.25, 9.0], "input_lens": [120, 320, 220], "output_lens": [30, 32, 31]},
        **{"ttfts": [0.1, 0.2, 0.3], "itls": [[0.1], [0.1], []]},
    }
    Path("bench.json").write_text(json.dumps(result))
    told = chairlift("run", "x.yaml", "--set", "workload.file=bench.json")
    assert told.status == 2
    named = ("--arrival", "start_times", "--prompt", "input_lens", "--output", "output_lens")
    unit = chairlift("trace", "import", "bench.json", *named)
    assert "start_times: numbers from 7.5 to 9 are no Unix times: say their unit, --time-unit" in unit.err

    assert chairlift("trace", "import", "bench.json", *named, "--time-unit", "s").status == 0
    check("bench.trace.csv")
    timeless = chairlift("trace", "import", "bench.json", *named[2:], "--to", "timeless.csv")
    assert "no times: all requests arrive at once" in " ".join(timeless.out.split())
    assert load("timeless.csv").arrival_ps.tolist() == [0, 0, 0]


def test_rows_without_tokens_are_left_out_when_asked() -> None:
    Path("log.csv").write_text(f"{CSV}0,1767600000.5,120,30,a\n1,1767600001,,,a\n2,1767600001,9,0,a\n")
    refused = chairlift("trace", "import", "log.csv", *NAMED)
    assert refused.status == 2
    assert "log.csv:3: prompt_tokens: must be a whole number (got '')" in refused.err

    told = chairlift("trace", "import", "log.csv", *NAMED, "--drop-empty")
    assert "2 rows without prompt or output tokens dropped" in told.out
    assert load("log.trace.csv").prompt_tokens.tolist() == [120]


GOOD = CSV + "0,1767600000,5,5,a\n"
LISTS = ["--prompt", "a", "--output", "b"]


@pytest.mark.parametrize(
    ("file", "text", "options", "said"),
    [
        ("a.csv", GOOD, ["--arrival", "tss", *NAMED[2:]], "tss: missing column – did you mean 'ts'?"),
        ("a.csv", CSV + "0,12:30,5,5,a\n", NAMED, "ts: must hold numbers, or times like 2023-11-16T18:17:03.97Z"),
        ("a.csv", GOOD + "1,soon,5,5,a\n", NAMED, "a.csv:3: ts: must be a number of seconds (got 'soon')"),
        ("a.csv", GOOD + "1,3,5,5,a\n", NAMED, "ts: numbers from 3 to 1767600000 are no Unix times"),
        ("a.csv", CSV + "0,2026-01-05T08:00:00Z,5,5,a\n", [*NAMED, "--time-unit", "s"], "--time-unit: must not be"),
        ("a.csv", CSV + "0,1767600000,5,five,a\n", NAMED, "a.csv:2: completion_tokens: must be a whole number"),
        ("a.csv", GOOD, NAMED[:4], "--output: must be given; this looks like CSV with id, ts"),
        ("a.csv", "", NAMED, "a.csv: the file is empty"),
        ("a.jsonl", '{"ts": 1767600000, "n": 5}\n', ["--prompt", "n", "--output", "m"], "a.jsonl:1: m: missing key"),
        ("a.json", '{"a": [1, 2],\n "b": [1]}', LISTS, "must be of one length (a 2, b 1)"),
        ("a.json", "[1,\n2]", LISTS, "must be a list of requests, or lists of their numbers"),
        ("a.csv", GOOD, [*NAMED, "--to", "a.csv"], "--to: is the file that is read"),
        ("a.csv", GOOD, [*NAMED, "--to", "a.txt"], "a.txt: must end in .csv, .csv.gz or .parquet"),
        ("a.db", "SQLite format 3\0", NAMED, "this is an SQLite database: write its rows as CSV"),
    ],
)
def test_what_cannot_be_imported_is_said(file: str, text: str, options: list[str], said: str) -> None:
    Path(file).write_text(text)
    result = chairlift("trace", "import", file, *options)

    assert (result.status, result.out) == (2, "")
    assert said in result.err


IMPORT = "say which are which: chairlift trace import f --arrival"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            CSV + "0,1,2,3,a\n",
            "looks like CSV with id, ts, prompt_tokens, completion_tokens, user; "
            f"{IMPORT} ts --prompt prompt_tokens --output completion_tokens",
        ),
        (
            '{"created": 5, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n',
            "looks like JSON lines with created, usage.prompt_tokens, usage.completion_tokens; "
            f"{IMPORT} created --prompt usage.prompt_tokens --output usage.completion_tokens",
        ),
        ("when;in;out\n", f"{IMPORT} COLUMN --prompt COLUMN --output COLUMN"),
        ('{"date": "x", "num_prompts": 3, "input_lens": [5]}', "a result of a serving benchmark (vllm bench serve, "),
        ("# HELP vllm:num_requests_running Number of requests\n", "Prometheus' text"),
        ("<!DOCTYPE html>\n<html>", "an HTML or XML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ('[{"id": "a", "conversations": [{"from": "human"}]}]', "ShareGPT's conversations"),
        ('{"custom_id": "1", "body": {"messages": [{"role": "user"}]}}\n', "texts without token counts"),
        ("PK\x03\x04abc", "a zip archive, as Excel's files are"),
        ("some words\nmore words\n", "looks like no table with a row a request"),
    ],
)
def test_a_file_that_nobody_reads_is_named_for_what_it_looks_like(text: str, said: str) -> None:
    Path("f").write_text(text)
    result = chairlift("trace", "describe", "f")

    assert result.status == 2
    assert said in result.err


def test_a_wrong_format_is_told_the_right_one() -> None:
    Path("t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    result = chairlift("trace", "describe", "t.csv", "--format", "burstgpt")

    assert result.status == 2
    assert "t.csv: format: this file looks like azure (got 'burstgpt')" in result.err


@pytest.mark.skipif(not TRACES.exists(), reason="../shared/traces is not here")
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("AzureLLMInferenceTrace_code.csv.gz", ("TIMESTAMP", "ContextTokens", "GeneratedTokens")),
        ("mooncake_conversation_trace.jsonl.gz", ("timestamp", "input_length", "output_length", "--time-unit", "ms")),
    ],
)
def test_a_published_trace_by_its_columns_is_what_its_own_format_reads(file: str, options: tuple[str, ...]) -> None:
    arrival, prompt, output, *unit = options
    named = ("--arrival", arrival, "--prompt", prompt, "--output", output)
    assert chairlift("trace", "import", str(TRACES / file), *named, *unit, "--to", "t.parquet").status == 0
    ours, theirs = load("t.parquet"), load(TRACES / file)

    assert ours.arrival_ps.tolist() == theirs.arrival_ps.tolist()
    assert ours.prompt_tokens.tolist() == theirs.prompt_tokens.tolist()
    assert ours.output_tokens.tolist() == theirs.output_tokens.tolist()
