"""Mistakes that users make: each is one clear message and exit status 2, never a traceback."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kit.command import POLICY, ROUTER, SCENARIO, Result, chairlift, replaced

UP_TO_WORKLOAD = SCENARIO[: SCENARIO.index("workload:")]
HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(text: str, *arguments: str) -> Result:
    Path("s.yaml").write_text(text)
    return chairlift("run", "s.yaml", "--quiet", "--out", "out", *arguments)


def refused(result: Result, *problems: str) -> None:
    """Exactly these problems, in this order, and nothing else."""
    assert result.err.splitlines() == [f"error: {problem}" for problem in problems]
    assert (result.status, result.out) == (2, "")


def summary() -> Any:
    return json.loads(Path("out/summary.json").read_text(), parse_constant=pytest.fail)


# ---- the file ----


def test_no_such_file() -> None:
    refused(chairlift("run", "none.yaml"), "none.yaml: no such file")


def test_no_such_shipped_scenario() -> None:
    refused(
        chairlift("run", "anyscale_23"),
        "no such file, and no scenario of that name – did you mean 'anyscale_23x'? (got 'anyscale_23')",
    )


def test_a_folder() -> None:
    Path("folder.yaml").mkdir()

    refused(chairlift("run", "folder.yaml"), "folder.yaml: is a folder, not a file")
    refused(chairlift("run", "."), ".: is a folder, not a file")


def test_an_empty_file() -> None:
    refused(run(""), "s.yaml: is empty: expected keys and values")


def test_not_yaml() -> None:
    result = run(replaced("{name: vllm}", "{name: vllm"))

    assert result.status == 2
    assert result.err.startswith("error: s.yaml:6: not YAML: ")
    assert result.err.count("\n") == 1


# ---- its keys and values: (old, new, what is said) ----

KEYS = {
    "unknown key": ("seed: 7", "sede: 7", "s.yaml:6: sede: unknown key – did you mean 'seed'?"),
    "unknown key below": (
        "requests: 30",
        "requests: 30\n  reqests: 30",
        "s.yaml:9: workload.reqests: unknown key – did you mean 'requests'?",
    ),
    "wrong type": ("seed: 7", "seed: many", "s.yaml:6: seed: must be a whole number (got 'many')"),
    "a number for a mapping": (
        "{tokens: 4000}",
        "4000",
        "s.yaml:3: kv: must be a mapping of keys to values (got 4000)",
    ),
    "a list for a policy": (
        "{name: vllm}",
        "[vllm]",
        "s.yaml:5: policy: must be text or a mapping of keys to values (got ['vllm'])",
    ),
    "negative rate": (
        "rate_per_s: 2",
        "rate_per_s: -2",
        "s.yaml:9: workload.arrivals.poisson.rate_per_s: must be at least 1e-09 (got -2)",
    ),
    "NaN rate": (
        "rate_per_s: 2",
        "rate_per_s: .nan",
        "s.yaml:9: workload.arrivals.poisson.rate_per_s: must be a finite number (got nan)",
    ),
    "infinite rate": (
        "rate_per_s: 2",
        "rate_per_s: .inf",
        "s.yaml:9: workload.arrivals.poisson.rate_per_s: must be a finite number (got inf)",
    ),
    "zero requests": ("requests: 30", "requests: 0", "s.yaml:8: workload.requests: must be at least 1 (got 0)"),
    "no replicas": ("seed: 7", "replicas: 0", "s.yaml:6: replicas: must be at least 1 or a list (got 0)"),
    "negative SLO": ("seed: 7", "slo: {ttft_ms: -1}", "s.yaml:6: slo.ttft_ms: must be above 0 (got -1)"),
    "no model": ("model: opt-13b\n", "", "s.yaml:1: model: is required"),
    "unknown model": (
        "opt-13b",
        "opt-13c",
        "s.yaml:1: model: unknown model 'opt-13c' – did you mean 'opt-13b'?",
    ),
    "unknown GPU": (
        "a100-40gb",
        "a100-40g",
        "s.yaml:2: gpu: unknown GPU 'a100-40g' – did you mean 'a100-40gb'?",
    ),
    "unknown policy": (
        "{name: vllm}",
        "vlm",
        "s.yaml:5: policy: no such policy – did you mean 'vllm'? (got 'vlm')",
    ),
    "unknown policy with settings": (
        "{name: vllm}",
        "{name: stattic, batch: 3}",
        "s.yaml:5: policy.name: no such policy – did you mean 'static'? (got 'stattic')",
    ),
    "policy without a name": ("{name: vllm}", "{batch: 3}", "s.yaml:5: policy.name: is required, a name"),
    "unknown router": (
        "seed: 7",
        "router: round_robbin",
        "s.yaml:6: router: no such router – did you mean 'round_robin'? (got 'round_robbin')",
    ),
    "unknown backend": (
        "seed: 7",
        "backend: {name: rooflin}",
        "s.yaml:6: backend.name: no such backend – did you mean 'roofline'? (got 'rooflin')",
    ),
    "unknown backend setting": (
        "seed: 7",
        "backend: {name: roofline, mfuu: 0.5}",
        "s.yaml:6: backend.mfuu: unknown key – did you mean 'mfu'?",
    ),
    "policy setting out of range": (
        "{name: vllm}",
        "\n  name: vllm\n  max_num_seqs: 0",
        "s.yaml:7: policy.max_num_seqs: must be above 0 (got 0)",
    ),
    "policy setting of the wrong type": (
        "{name: vllm}",
        "\n  name: static\n  batch: two",
        "s.yaml:7: policy.batch: must be a whole number (got 'two')",
    ),
    "policy setting outside its choice": (
        "{name: vllm}",
        "{name: orca, reserve: maxx}",
        "s.yaml:5: policy.reserve: must be one of 'max', 'declared', 'pow2' or 'oracle' – did you mean 'max'?"
        " (got 'maxx')",
    ),
    "unknown policy setting": (
        "{name: vllm}",
        "{name: vllm, max_num_seq: 5}",
        "s.yaml:5: policy.max_num_seq: unknown key – did you mean 'max_num_seqs'?",
    ),
    "settings that do not fit the model": (
        "{name: vllm}",
        "{name: vllm, enable_chunked_prefill: false, max_num_batched_tokens: 1000}",
        "s.yaml:5: policy.max_num_batched_tokens: must be at least the model's 2048 tokens without chunked prefill"
        " (got 1000)",
    ),
    "blocks and tokens": (
        "{tokens: 4000}",
        "{tokens: 4000, blocks: 250}",
        "s.yaml:3: kv: give blocks or tokens, not both",
    ),
    "tokens for no block": (
        "{tokens: 4000}",
        "{tokens: 15}",
        "s.yaml:3: kv: tokens must hold at least one block of 16 (got 15)",
    ),
    "GPUs that do not share the heads": (
        "seed: 7",
        "tensor_parallel: 3",
        "s.yaml:6: tensor_parallel: tensor_parallel must divide the 40 heads of opt-13b (got 3)",
    ),
    "two variants of one name": (
        "seed: 7",
        "compare:\n  - {name: a}\n  - {name: b}\n  - {name: a}",
        "s.yaml:9: compare.2.name: two variants have this name (got 'a')",
    ),
    "a waterfall over no variant": (
        "seed: 7",
        "compare: [{name: fast}, {name: slow}]\nwaterfall:\n  - {variant: fast}\n  - {variant: slw}",
        "s.yaml:9: waterfall.1.variant: no such variant – did you mean 'slow'? (got 'slw')",
    ),
    "a baseline that is no variant": (
        "seed: 7",
        "compare: [{name: fast}, {name: slow}]\nbaseline: [fst]",
        "s.yaml:7: baseline.0: no such variant – did you mean 'fast'? (got 'fst')",
    ),
    "two cases of one name": (
        "seed: 7",
        "cases:\n  - {name: a}\n  - {name: a}",
        "s.yaml:8: cases.1.name: two cases have this name (got 'a')",
    ),
    "a case that sets what is not there": (
        "seed: 7",
        "cases:\n  - name: a\n    set: {kv.tokns: 3}",
        "s.yaml:8: cases.0.set kv.tokns=3: kv.tokns: unknown key – did you mean 'tokens'?",
    ),
    "a case that sets what cannot be": (
        "seed: 7",
        "cases:\n  - name: a\n    set:\n      policy.max_num_seqs: 0",
        "s.yaml:9: cases.0.set policy.max_num_seqs=0: policy.max_num_seqs: must be above 0 (got 0)",
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), KEYS.values(), ids=KEYS)
def test_mistake_in_a_scenario(old: str, new: str, said: str) -> None:
    refused(run(replaced(old, new)), said)


def test_unknown_workload() -> None:
    refused(
        run(UP_TO_WORKLOAD + "workload: {name: sharegp, requests: 10, rate_per_s: 1}\n"),
        "s.yaml:7: workload.name: no such workload – did you mean 'sharegpt'? (got 'sharegp')",
    )


def test_no_workload() -> None:
    refused(run(UP_TO_WORKLOAD), "s.yaml:1: workload: is required")


def test_a_model_that_does_not_fit_shows_the_sum() -> None:
    result = run(replaced("a100-40gb", "l4", replaced("kv: {tokens: 4000}\n", "")))

    assert result.status == 2
    assert result.err.startswith("error: s.yaml:2: gpu: no room for KV: opt-13b on l4: 22.49 GiB × 0.9 − 23.94 weights")
    assert "= -5.60 GiB for KV" in result.err
    assert result.err.count("\n") == 1


def test_all_mistakes_at_once_in_order_of_lines() -> None:
    text = """\
model: opt-13c
gpu: a100-40g
policy: {name: static, batch: 0, bach: 4}
replicas: 0
sede: 3
workload:
  requests: 0
  arrivals: {poisson: {rate_per_s: -2}}
  prompt_tokens: 100
  output_tokens: 100
compare:
  - name: a
    router: round_robbin
"""
    refused(
        run(text),
        "s.yaml:1: model: unknown model 'opt-13c' – did you mean 'opt-13b'?",
        "s.yaml:2: gpu: unknown GPU 'a100-40g' – did you mean 'a100-40gb'?",
        "s.yaml:3: policy.batch: must be above 0 (got 0)",
        "s.yaml:3: policy.bach: unknown key – did you mean 'batch'?",
        "s.yaml:4: replicas: must be at least 1 or a list (got 0)",
        "s.yaml:5: sede: unknown key – did you mean 'seed'?",
        "s.yaml:7: workload.requests: must be at least 1 (got 0)",
        "s.yaml:8: workload.arrivals.poisson.rate_per_s: must be at least 1e-09 (got -2)",
        "s.yaml:13: compare.0.router: no such router – did you mean 'round_robin'? (got 'round_robbin')",
    )


def test_all_mistakes_at_once_where_only_names_are_wrong() -> None:
    text = """\
workload: {file: none.csv}
policy: {name: static, batch: 0}
model: opt-13c
gpu: a100-40gb
compare: [{name: x}, {name: x, policy: vlm}]
waterfall: [{variant: y}]
"""
    refused(
        run(text),
        "s.yaml:2: policy.batch: must be above 0 (got 0)",
        "s.yaml:3: model: unknown model 'opt-13c' – did you mean 'opt-13b'?",
        "s.yaml:5: compare.1.policy: no such policy – did you mean 'vllm'? (got 'vlm')",
        "s.yaml:5: compare.1.name: two variants have this name (got 'x')",
        "s.yaml:6: waterfall.0.variant: no such variant – allowed: x, x (got 'y')",
        "none.csv: no such file",
    )


def test_a_mistake_that_every_case_shares_is_shown_once() -> None:
    text = replaced("seed: 7", "cases: [{name: a}, {name: b}, {name: c}]")

    refused(
        run(replaced("vllm", "vlm", text)), "s.yaml:5: policy.name: no such policy – did you mean 'vllm'? (got 'vlm')"
    )


# ---- what is not a mistake ----


def test_a_prompt_that_can_never_fit_is_rejected_and_counted() -> None:
    Path("t.csv").write_text(HEADER + "0,100,10\n1,4100,10\n2,100,10\n")
    text = replaced("{name: vllm}", "sarathi", replaced("2048", "9000", UP_TO_WORKLOAD))  # vLLM would not start
    text = replaced("model: opt-13b", "model: {name: opt-13b, max_model_len: 9000}", text)
    result = run(text + "workload: {file: t.csv}\n")

    assert (result.status, result.err) == (0, "")
    assert (summary()["completed"], summary()["rejected"]) == (2, 1)
    assert pq.read_table("out/requests.parquet")["status"].to_pylist() == ["finished", "rejected", "finished"]
    table = chairlift("run", "s.yaml", "--set", "workload.limit=2")
    assert "requests completed 1 rejected 1 " in " ".join(table.out.split())


@pytest.mark.parametrize("policy", ["static", "orca", "tgi", "vllm"])
@pytest.mark.parametrize(
    "more", ["", "slo: {ttft_ms: 100}\n", "compare: [{name: a}, {name: b}]\ntables: [latency, cdf]\n"]
)
def test_a_run_that_rejects_everything_goes_to_its_end(policy: str, more: str) -> None:
    text = replaced("low: 10, high: 300", "low: 2050, high: 3000")  # longer than max_model_len
    result = run(replaced("vllm", policy, text) + more)

    assert result.status == 1
    assert "no request was completed: " in result.err
    found = summary()
    assert (found["completed"], found["rejected"], found["request_throughput"]) == (0, 30, 0)
    assert {found[f"{s}_{m}_ms"] for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "p99")} == {None}
    assert found["request_goodput"] == (0 if "slo" in more else None)
    assert chairlift("run", "s.yaml").status == 1  # the table as well


def test_a_waterfall_over_nothing_is_no_crash() -> None:
    text = replaced("low: 10, high: 300", "low: 2050, high: 3000")
    text += "compare: [{name: a}, {name: b}]\nwaterfall: [{variant: a}, {variant: b}]\n"
    Path("s.yaml").write_text(text)
    result = chairlift("run", "s.yaml")

    assert result.status == 1
    assert "no request was completed: " in result.err


def test_a_policy_that_refuses_a_burst_of_thousands() -> None:
    """Each refusal asks for a new plan; that must not nest."""
    text = replaced("{tokens: 4000}", "{tokens: 1000}", replaced("vllm", "orca"))
    text = replaced("{poisson: {rate_per_s: 2}}", "{burst: {}}", replaced("requests: 30", "requests: 3000", text))
    result = run(text)

    assert result.status == 1
    assert "no request was completed: " in result.err
    assert summary()["rejected"] == 3000


# ---- traces ----

TRACES = {
    "empty": ("", "t.csv: the file is empty"),
    "blank": ("\n\n", "t.csv: the file is empty"),
    "only a header": (HEADER, "t.csv: no requests below the header"),
    "unsorted": (
        HEADER + "0,10,10\n2,10,10\n1,10,10\n",
        "t.csv:4: arrival_s: arrivals must be in order of time: sort the rows (1 are earlier than the row above)"
        " (got '1')",
    ),
    "NaN": (HEADER + "nan,10,10\n", "t.csv:2: arrival_s: must be a number of seconds (got 'nan')"),
    "negative": (HEADER + "0,-4,10\n", "t.csv:2: prompt_tokens: must be at least 1 (got '-4')"),
    "no format": ("a,b\n1,2\n", None),
}


@pytest.mark.parametrize(("content", "said"), TRACES.values(), ids=TRACES)
def test_mistake_in_a_trace(content: str, said: str | None) -> None:
    Path("t.csv").write_text(content)
    results = run(UP_TO_WORKLOAD + "workload: {file: t.csv}\n"), chairlift("trace", "describe", "t.csv")

    for result in results:
        if said is not None:
            refused(result, said)
        assert result.status == 2
        assert result.err.startswith("error: t.csv")


def test_a_gzip_that_is_cut_short() -> None:
    rows = "".join(f"{i},{i * i * 7919 % 5000 + 1},10\n" for i in range(2000))
    packed = gzip.compress((HEADER + rows).encode())
    Path("t.csv.gz").write_bytes(packed[: len(packed) // 2])

    refused(run(UP_TO_WORKLOAD + "workload: {file: t.csv.gz}\n"), "t.csv.gz: the gzip file is cut short")
    refused(chairlift("trace", "describe", "t.csv.gz"), "t.csv.gz: the gzip file is cut short")


def test_no_such_trace() -> None:
    refused(run(UP_TO_WORKLOAD + "workload: {file: t.csv}\n"), "t.csv: no such file")
    refused(chairlift("trace", "describe", "t.csv"), "t.csv: no such file")
    refused(chairlift("trace", "describe", "."), ".: is a folder, not a file")


def test_unknown_trace_format() -> None:
    Path("t.csv").write_text(HEADER + "0,1,1\n")
    result = chairlift("trace", "describe", "t.csv", "--format", "azur")

    assert result.status == 2
    assert "did you mean 'azure'?" in result.err


@pytest.mark.parametrize(
    "content", [b"0,10,5\r\n1,20,5\r\n", b"0,10,5\r\n1,20,5", b"0,10,5\n1,20,5", b"0,10,5\n\n1,20,5\n\n"]
)
def test_line_ends_do_not_matter(content: bytes) -> None:
    Path("t.csv").write_bytes(
        HEADER.strip().encode() + b"\r\n" * (b"\r" in content) + b"\n" * (b"\r" not in content) + content
    )
    result = run(UP_TO_WORKLOAD + "workload: {file: t.csv}\n")

    assert (result.status, result.err) == (0, "")
    assert (summary()["completed"], summary()["total_input_tokens"]) == (2, 30)


def test_a_scenario_with_carriage_returns_and_no_last_line_end() -> None:
    Path("s.yaml").write_bytes(SCENARIO.rstrip().replace("\n", "\r\n").encode())

    assert chairlift("run", "s.yaml", "--quiet").status == 0
    Path("s.yaml").write_bytes(replaced("seed: 7", "sede: 7").rstrip().replace("\n", "\r\n").encode())
    refused(chairlift("run", "s.yaml"), "s.yaml:6: sede: unknown key – did you mean 'seed'?")


# ---- options ----

SETS = {
    "a": "--set a: must be KEY=VALUE, such as policy.batch=8",
    "=3": "--set =3: must be KEY=VALUE, such as policy.batch=8",
    "policy..a=3": "--set policy..a=3: must be KEY=VALUE, such as policy.batch=8",
    "seed=x": "--set seed=x: seed: must be a whole number (got 'x')",
    "seed.a=3": None,
    "workload.requests=0": "--set workload.requests=0: workload.requests: must be at least 1 (got 0)",
    "polcy.batch=8": "--set polcy.batch=8: polcy: unknown key – did you mean 'policy'?",
    "policy.batch=8": "--set policy.batch=8: policy.batch: unknown key",
    "policy.name=vlm": "--set policy.name=vlm: policy.name: no such policy – did you mean 'vllm'? (got 'vlm')",
    "compare.0.name=x": None,
    "policy=[": None,
}


@pytest.mark.parametrize(("option", "said"), SETS.items())
def test_set_that_cannot_be(option: str, said: str | None) -> None:
    result = run(SCENARIO, "--set", option)

    assert result.status == 2
    assert result.err.startswith(f"error: {said or f'--set {option}: '}")
    assert result.err.count("\n") == 1


def test_set_beyond_a_list() -> None:
    refused(
        run(SCENARIO + "compare: [{name: a}]\n", "--set", "compare.1.name=x", "--set", "compare.one.name=x"),
        "--set compare.1.name=x: index 1 is out of range: compare has 1 item",
        "--set compare.one.name=x: compare is a list: 'one' must be an index from 0 to 0",
    )


def test_unknown_policy_or_backend_on_the_command_line() -> None:
    refused(
        run(SCENARIO, "--policy", "vlm"),
        "--policy vlm: policy: no such policy – did you mean 'vllm'? (got 'vlm')",
    )
    refused(
        run(SCENARIO, "--backend", "rooflin"),
        "--backend rooflin: backend: no such backend – did you mean 'roofline'? (got 'rooflin')",
    )


def test_unwritable_folder_for_results() -> None:
    Path("file").write_text("")
    Path("out/requests.parquet").mkdir(parents=True)
    Path("s.yaml").write_text(SCENARIO)

    refused(chairlift("run", "s.yaml", "--out", "file"), "file: cannot be written: file is no folder")
    refused(chairlift("run", "s.yaml", "--out", "file/below"), "file/below: cannot be written: file is no folder")
    result = chairlift("run", "s.yaml", "--out", "out")
    assert result.status == 2
    assert result.err.startswith("error: out: cannot be written: ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_folder_without_permission() -> None:
    Path("s.yaml").write_text(SCENARIO)
    Path("locked").mkdir(mode=0o500)

    refused(chairlift("run", "s.yaml", "--out", "locked/out"), "locked/out: cannot be written: Permission denied")


def test_unknown_list() -> None:
    refused(chairlift("list", "policy"), "no such list – did you mean 'policies'? (got 'policy')")


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["rnu"], ["run", "s.yaml", "--nonsense"], ["list"], ["trace", "describe", "t", "--limit", "0"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = chairlift(*arguments)

    assert result.status == 2
    assert result.out == ""
    assert result.err


# ---- policies of the user's own ----


def with_policy(body: str, *arguments: str) -> Result:
    """Run a policy whose ``schedule`` starts on line 12 with ``body``."""
    head, _, _ = POLICY.partition("    def schedule")
    Path("mine.py").write_text(head + "    def schedule(self, step: Step) -> int:\n" + body)
    assert (head.count("\n"), body[:8]) == (12, " " * 8)
    return run(replaced("{poisson: {rate_per_s: 2}}", "{burst: {}}"), "--policy", "mine.py", *arguments)


ADMIT_ALL = "        for request in list(step.waiting):\n            step.admit(request, request.prompt_tokens)\n"

FILES = {
    "missing": (None, "mine.py: no such file"),
    "not Python": (
        "x = 1\ndef f(:\n",
        "mine.py:2: cannot be imported: SyntaxError: invalid syntax",
    ),
    "fails": ("x = 1\ny = x / 0\n", "mine.py:2: cannot be imported: ZeroDivisionError: division by zero"),
    "imports what is not there": (
        "\nimport nothing_of_the_kind\n",
        "mine.py:2: cannot be imported: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
    ),
    "imports by the former name": (
        "x = 1\nfrom policies.base import NotNegative, Scheduler, Step\nraise SystemExit('run')\n",
        "mine.py:2: Chairlift's packages are under one name now: write `from chairlift import Scheduler, Step` and "
        "`from chairlift.policies.base import NotNegative`",
    ),
    "imports a module by the former name": (
        "import backend.roofline, json\n",
        "mine.py:1: Chairlift's packages are under one name now: write `import chairlift.backend.roofline`",
    ),
    "no policy": ("x = 1\n", "mine.py: holds no Scheduler subclass"),
    "several": (
        POLICY + POLICY[POLICY.index("@dataclass") :].replace("Mine", "Other"),
        "mine.py: holds several policies (Mine, Other): say which, as mine.py:Class",
    ),
    "settings of no type": (
        POLICY.replace("Positive = 2048", "'Whatever' = 3"),
        "mine.py: the settings of Mine cannot be read: NameError: name 'Whatever' is not defined",
    ),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_policy_file_that_cannot_be_used(content: str | None, said: str) -> None:
    if content is not None:
        Path("mine.py").write_text(content)

    refused(run(SCENARIO, "--policy", "mine.py"), said)


def test_every_import_by_a_former_name_is_told_though_such_a_folder_lies_on_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("policies", "sim"):
        Path(name).mkdir()
        for module in ("__init__", "base"):
            Path(name, f"{module}.py").write_text("raise SystemExit('the wrong package')\n")
    monkeypatch.syspath_prepend(".")
    Path("mine.py").write_text(
        "from policies.base import Scheduler\n\ndef later():\n    from sim.run import simulate\n"
        "from .policies import base\nfrom policies_of_mine import other\n"
    )

    refused(
        run(SCENARIO, "--policy", "mine.py"),
        "mine.py:1: Chairlift's packages are under one name now: write `from chairlift import Scheduler`",
        "mine.py:4: Chairlift's packages are under one name now: write `from chairlift import simulate`",
    )


# ---- routers of the user's own ----

NO_ROUTER = {
    "missing": (None, "mine.py: no such file"),
    "a policy": (POLICY, "mine.py: holds no Router subclass"),
    "several": (
        ROUTER + ROUTER[ROUTER.index("@dataclass") :].replace("Last", "Other"),
        "mine.py: holds several routers (Last, Other): say which, as mine.py:Class",
    ),
    "imports by the former name": (
        "from policies.base import Replicas, Router\n",
        "mine.py:1: Chairlift's packages are under one name now: write `from chairlift import Router` and "
        "`from chairlift.policies.base import Replicas`",
    ),
    "settings of no type": (
        ROUTER.replace("Positive = 1", "'Whatever' = 1"),
        "mine.py: the settings of Last cannot be read: NameError: name 'Whatever' is not defined",
    ),
}


@pytest.mark.parametrize(("content", "said"), NO_ROUTER.values(), ids=NO_ROUTER)
def test_router_file_that_cannot_be_used(content: str | None, said: str) -> None:
    if content is not None:
        Path("mine.py").write_text(content)

    refused(run(SCENARIO, "--router", "mine.py"), said)


def test_settings_of_a_router_file_are_checked() -> None:
    Path("mine.py").write_text(ROUTER)

    refused(
        run(SCENARIO + "router: {name: mine.py, step: 0, stop: 1}\n", "--trust"),
        "s.yaml:12: router.step: must be above 0 (got 0)",
        "s.yaml:12: router.stop: unknown key – did you mean 'step'?",
    )


@pytest.mark.parametrize("answer", ["2", "-1", "1.0", "None"])
def test_router_that_names_no_replica(answer: str) -> None:
    Path("mine.py").write_text(ROUTER.replace("len(replicas.indices) - self.step", answer))

    refused(
        run(SCENARIO + "replicas: 2\n", "--router", "mine.py"),
        f"router Last: position {answer}: there are 2 replicas, from 0",
    )


def test_router_that_crashes_is_named_with_its_line() -> None:
    Path("mine.py").write_text(ROUTER.replace("self.step", "self.steps"))

    [line] = run(SCENARIO + "replicas: 2\n", "--router", "mine.py").err.splitlines()
    assert line.startswith("error: mine.py:14: raised AttributeError: ")


def test_policy_file_without_that_class() -> None:
    Path("mine.py").write_text(POLICY)

    refused(
        run(SCENARIO, "--policy", "mine.py:Mien"),
        "mine.py: holds no policy of that name – did you mean 'Mine'? (got 'Mien')",
    )


def test_settings_of_a_policy_file_are_checked() -> None:
    Path("mine.py").write_text(POLICY)

    refused(
        run(replaced("{name: vllm}", "{name: mine.py, budget: 0, bugdet: 1}"), "--trust"),
        "s.yaml:5: policy.budget: must be above 0 (got 0)",
        "s.yaml:5: policy.bugdet: unknown key – did you mean 'budget'?",
    )


def test_policy_that_overspends_its_budget() -> None:
    result = with_policy(ADMIT_ALL + "        return 1\n")

    assert result.status == 2
    name, number, limit = "policy Mine: step 1: a step of ", " tokens: its ", "budget is 2048\n"
    assert result.err.startswith(f"error: {name}")
    assert result.err.endswith(number + limit)
    assert int(result.err.removeprefix(f"error: {name}").removesuffix(number + limit)) > 2048


BROKEN_RULES = {
    "plans nothing": (
        "        return 1\n",
        "policy Mine: 30 requests are never served (0, 1, 2, 3, 4, …): it plans nothing with 0 running, 30 waiting",
    ),
    "admits twice": (
        "        request = step.waiting[0]\n" + 2 * "        step.admit(request, 1)\n" + "        return 1\n",
        "policy Mine: step 1: Request(0, prompt ",
    ),
    "vouches for nothing": (
        "        step.decode_all()\n"
        "        if not step.running:\n            step.admit(step.waiting[0], step.waiting[0].remaining)\n"
        "        return 0\n",
        "policy Mine: step 1: vouched for 0 steps",
    ),
}


@pytest.mark.parametrize(("body", "said"), BROKEN_RULES.values(), ids=BROKEN_RULES)
def test_policy_that_breaks_a_rule(body: str, said: str) -> None:
    result = with_policy(body)

    assert result.status == 2
    assert result.err.startswith(f"error: {said}")
    assert result.err.count("\n") == 1


CRASHES = {
    "divides by zero": (
        "        return 1 // len(step.running)\n",
        "mine.py:14: raised ZeroDivisionError: integer division or modulo by zero",
    ),
    "misspells a verb": (
        "        request = step.waiting[0]\n        step.admitt(request, 1)\n        return 1\n",
        "mine.py:15: raised AttributeError: ",
    ),
    "hands over nonsense": (
        "        step.admit(step.waiting[0], 'all')\n        return 1\n",
        "policy Mine: step 1: admit of Request(0, ",
    ),
    "crashes as it is made": (
        "        return 1\n\n    def __post_init__(self) -> None:\n        self.room = self.bugdet\n",
        "mine.py:17: raised AttributeError: ",
    ),
    "crashes on an arrival": (
        "        step.decode_all()\n        step.admit(step.waiting[0], 1)\n        return 1\n\n"
        "    def order(self, request: object) -> None:\n        raise KeyError('x')\n",
        "mine.py:19: raised KeyError: 'x'",
    ),
}


@pytest.mark.parametrize(("body", "said"), CRASHES.values(), ids=CRASHES)
def test_policy_that_crashes_is_named_with_its_line(body: str, said: str) -> None:
    result = with_policy(body)

    assert result.status == 2
    assert result.err.startswith(f"error: {said}")
    assert result.err.count("\n") == 1


def test_policy_that_forgets_to_return() -> None:
    result = with_policy(
        "        step.decode_all()\n"
        "        if not step.running:\n            step.admit(step.waiting[0], step.waiting[0].remaining)\n"
    )

    assert result.status == 2
    assert result.err.startswith("error: policy Mine: ")


def test_a_crash_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("chairlift.sim.cli.run.simulate", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        run(SCENARIO)


def test_what_ran_before_a_crash_is_on_disk() -> None:
    body = "        return 1 // len(step.running)\n"
    result = with_policy(body, "--policy", "vllm")
    assert result.status == 2  # the crash comes first: nothing ran before it

    Path("s.yaml").write_text(SCENARIO)
    result = chairlift("run", "s.yaml", "--out", "out", "--quiet", "--policy", "vllm", "--policy", "mine.py")
    assert result.status == 2
    assert [each["variant"] for each in json.loads(Path("out/comparison.json").read_text())] == ["vllm"]
    assert len(pq.read_table("out/requests.parquet")) == 30


def test_a_vllm_setting_that_is_not_modelled_is_refused_not_ignored(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "model: opt-13b",
            "gpu: a100-40gb",
            "policy:",
            "  name: vllm",
            "  enable_lora: true",
            "  max_num_seq: 8",
            "workload: {requests: 1, arrivals: {burst: {}}, prompt_tokens: 5, output_tokens: 5}",
        ]
    )
    (tmp_path / "s.yaml").write_text(text)
    result = chairlift("run", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"))

    assert result.status == 2
    assert "s.yaml:5: policy.enable_lora: not modelled: LoRA adapters (got True)" in result.err
    assert "s.yaml:6: policy.max_num_seq: unknown key – did you mean 'max_num_seqs'?" in result.err
