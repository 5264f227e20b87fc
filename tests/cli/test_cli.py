"""``chairlift run``, ``list``, ``schema`` and ``trace describe`` as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from chairlift.sim.cli.main import COMMANDS, Commands
from chairlift.sim.cli.shipped import find_scenario
from kit.command import POLICY, ROUTER, SCENARIO, chairlift, replaced
from kit.places import IMPORTS, ROOT

STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")
# the field names of vLLM's serving benchmark, then ours
FIELDS = (
    "completed",
    "duration",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    *(f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in STATISTICS),
    "preemptions",
    "steps",
    "mean_running",
    "kv_utilization",
    "wall_s",
    "requests_per_wall_s",
)
WALL = ("wall_s", "requests_per_wall_s")
POLICIES = ("static", "orca", "tgi", "vllm")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SCENARIO)


def run(*arguments: str, scenario: str = "small.yaml", out: str = "out") -> Path:
    result = chairlift("run", scenario, "--out", out, "--quiet", *arguments)
    assert (result.status, result.out, result.err) == (0, "", "")
    return Path(out)


def load(path: Path) -> Any:
    return json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def rows(folder: Path, table: str = "requests") -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{table}.parquet").to_pylist()


# ---- run ----


def test_run_prints_a_table_and_says_where_the_results_are() -> None:
    result = chairlift("run", "small.yaml")

    assert (result.status, result.err) == (0, "")
    for words in ("completed", "TTFT p50 / p90 / p99", "output tokens/s", "KV pool", "results in runs/small"):
        assert words in result.out
    assert Path("runs/small/summary.json").is_file()


def test_summary_has_every_field_of_the_benchmark() -> None:
    folder = run("--set", "slo={ttft_ms: 1000}")

    summary = load(folder / "summary.json")
    assert [name for name in FIELDS if name not in summary] == []
    assert [name for name in FIELDS if not isinstance(summary[name], int | float)] == []
    assert summary["completed"] == 30
    assert 0 < summary["request_goodput"] <= summary["request_throughput"]
    assert "roofline" in summary["assumptions"]["cost model"]


def test_goodput_is_null_without_an_slo() -> None:
    assert load(run() / "summary.json")["request_goodput"] is None


def test_requests_table_has_a_row_a_request() -> None:
    found = rows(run())

    assert [row["id"] for row in found] == list(range(30))
    for row in found:
        assert row["status"] == "finished"
        assert row["arrival_ps"] <= row["admitted_ps"] < row["first_token_ps"] <= row["finished_ps"]
        assert row["ttft_ms"] == (row["first_token_ps"] - row["arrival_ps"]) / 1e9
        assert row["e2el_ms"] == (row["finished_ps"] - row["arrival_ps"]) / 1e9
        if row["output_tokens"] == 1:
            assert row["tpot_ms"] is None
        else:
            assert row["tpot_ms"] == pytest.approx((row["e2el_ms"] - row["ttft_ms"]) / (row["output_tokens"] - 1))


def test_steps_table_adds_up_to_the_summary() -> None:
    folder = run()

    steps = rows(folder, "steps")
    assert sum(row["steps"] for row in steps) == load(folder / "summary.json")["steps"]
    assert sum(row["prefill_tokens"] for row in steps) == sum(row["prompt_tokens"] for row in rows(folder))


def test_resolved_scenario_runs_again() -> None:
    first = run("--set", "seed=11", "--set", "policy.max_num_seqs=3")
    resolved = yaml.safe_load((first / "scenario.yaml").read_text())
    assert (resolved["seed"], resolved["policy"]) == (11, {"name": "vllm", "max_num_seqs": 3})
    provenance = resolved["provenance"]
    assert provenance["made_by"].startswith("chairlift")
    assert "given" in provenance["kv"]["kv"]
    again = run(scenario="out/scenario.yaml", out="again")
    assert (again / "requests.parquet").read_bytes() == (first / "requests.parquet").read_bytes()


def test_compare_writes_a_summary_for_each_variant() -> None:
    Path("two.yaml").write_text(SCENARIO + "compare:\n  - {name: plain}\n  - {name: one by one, policy: static}\n")
    folder = run(scenario="two.yaml")

    comparison = load(folder / "comparison.json")
    assert [each["variant"] for each in comparison] == ["plain", "one by one"]
    assert [(each["variant"], name) for each in comparison for name in FIELDS if name not in each] == []
    found = rows(folder)
    assert [row["variant"] for row in found] == ["plain"] * 30 + ["one by one"] * 30
    workload = [[(r["arrival_ps"], r["prompt_tokens"], r["output_tokens"]) for r in found[i : i + 30]] for i in (0, 30)]
    assert workload[0] == workload[1]  # common random numbers
    table = chairlift("run", "two.yaml").out
    assert "plain" in table
    assert "one by one" in table


def test_cases_run_the_comparison_once_each() -> None:
    Path("cases.yaml").write_text(
        SCENARIO + "compare: [{name: a}, {name: b, policy: orca}]\n"
        "cases:\n  - name: few\n    set: {workload.requests: 5}\n  - name: many\n"
    )
    folder = run(scenario="cases.yaml")

    found = [(each["case"], each["variant"], each["completed"]) for each in load(folder / "comparison.json")]
    assert found == [("few", "a", 5), ("few", "b", 5), ("many", "a", 30), ("many", "b", 30)]


def test_set_changes_one_key_and_the_last_word_counts() -> None:
    folder = run("--set", "workload.requests=3", "--set", "workload.requests=5", "--set", "slo={ttft_ms: 1}")

    summary = load(folder / "summary.json")
    assert summary["completed"] == 5
    assert summary["request_goodput"] is not None


def test_set_reaches_into_a_variant() -> None:
    Path("two.yaml").write_text(SCENARIO + "compare: [{name: a, policy: {name: static, batch: 4}}, {name: b}]\n")
    exact = ("--set", "workload.max_tokens=exact")
    runs = [run(*exact, "--set", f"compare.0.policy.batch={n}", scenario="two.yaml", out=f"{n}") for n in (1, 8)]

    one, eight = (load(folder / "comparison.json") for folder in runs)
    assert one[0]["mean_running"] == pytest.approx(1)
    assert eight[0]["peak_running"] == 8
    assert one[1]["steps"] == eight[1]["steps"]


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_by_name(policy: str) -> None:
    folder = run("--policy", policy)

    assert load(folder / "summary.json")["completed"] == 30
    assert not (folder / "comparison.json").exists()


@pytest.mark.parametrize("suffix", ["", ":Mine"])
def test_policy_from_a_file(suffix: str) -> None:
    Path("mine.py").write_text(POLICY)

    assert load(run("--policy", f"mine.py{suffix}") / "summary.json")["completed"] == 30


def test_policy_from_a_folder_with_py_in_its_name() -> None:
    folder = Path(".python") / "my.pyfiles"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(POLICY)

    assert load(run("--policy", f"{folder}/mine.py:Mine") / "summary.json")["completed"] == 30


def test_several_policies_are_compared() -> None:
    Path("mine.py").write_text(POLICY)
    folder = run("--policy", "vllm", "--policy", "mine.py", "--policy", "static")

    found = load(folder / "comparison.json")
    assert [each["variant"] for each in found] == ["vllm", "mine.py", "static"]
    assert {each["completed"] for each in found} == {30}


def test_policy_takes_the_place_of_a_comparison() -> None:
    text = SCENARIO + "compare: [{name: a}, {name: b}]\nwaterfall: [{variant: a}, {variant: b}]\nbaseline: [b]\n"
    Path("two.yaml").write_text(text)
    folder = run("--policy", "orca", scenario="two.yaml")

    assert not (folder / "comparison.json").exists()
    assert load(folder / "summary.json")["completed"] == 30


def test_policy_file_named_in_the_scenario_needs_trust() -> None:
    code = "from pathlib import Path\nPath('ran').touch()\n" + POLICY
    Path("sub").mkdir()
    Path("sub/mine.py").write_text(code)  # found from the scenario's folder, as a trace file is
    Path("sub/own.yaml").write_text(replaced("{name: vllm}", "{name: mine.py, budget: 500}"))
    refused = chairlift("run", "sub/own.yaml")

    assert refused.status == 2
    assert refused.err == (
        "error: sub/own.yaml:5: policy.name: a policy from a file runs its code: name it with --policy, or allow it "
        "with --trust (got 'mine.py')\n"
    )
    assert not Path("ran").exists()
    assert load(run("--trust", scenario="sub/own.yaml") / "summary.json")["completed"] == 30
    assert Path("ran").exists()


def test_router_from_a_file() -> None:
    Path("mine.py").write_text(ROUTER)
    found = rows(run("--router", "mine.py:Last", "--set", "replicas=3"))

    assert {row["replica"] for row in found} == {2}


def test_router_file_named_in_the_scenario_needs_trust() -> None:
    Path("sub").mkdir()
    Path("sub/mine.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + ROUTER)
    Path("sub/own.yaml").write_text(SCENARIO + "replicas: 3\nrouter: {name: mine.py, step: 2}\n")
    refused = chairlift("run", "sub/own.yaml")

    assert refused.status == 2
    assert refused.err == (
        "error: sub/own.yaml:13: router.name: a router from a file runs its code: name it with --router, or allow it "
        "with --trust (got 'mine.py')\n"
    )
    assert not Path("ran").exists()
    assert {row["replica"] for row in rows(run("--trust", scenario="sub/own.yaml"))} == {1}


def test_a_router_on_the_command_line_does_not_trust_the_policy_file_of_the_scenario() -> None:
    Path("mine.py").write_text(POLICY + ROUTER)
    Path("own.yaml").write_text(replaced("{name: vllm}", "mine.py"))
    result = chairlift("run", "own.yaml", "--router", "mine.py")

    assert (result.status, result.out) == (2, "")
    assert "own.yaml:5: policy: a policy from a file runs its code" in result.err


def test_several_routers_are_compared_each_with_each_policy() -> None:
    Path("mine.py").write_text(ROUTER)
    many = ("--router", "round_robin", "--router", "mine.py")
    alone = run(*many, "--set", "replicas=2", out="alone")
    both = run(*many, "--set", "replicas=2", "--policy", "vllm", "--policy", "orca", out="both")

    assert [each["variant"] for each in load(alone / "comparison.json")] == ["round_robin", "mine.py"]
    assert [each["variant"] for each in load(both / "comparison.json")] == [
        *("vllm round_robin", "vllm mine.py", "orca round_robin", "orca mine.py")
    ]
    used = {(row["variant"], row["replica"]) for row in rows(both)}
    assert used == {
        (f"{p} {r}", n) for p in ("vllm", "orca") for r, n in [("round_robin", 0), ("round_robin", 1), ("mine.py", 1)]
    }


def test_backend_can_be_named() -> None:
    assert load(run("--backend", "roofline") / "summary.json")["completed"] == 30


@pytest.mark.parametrize("policy", POLICIES)
def test_no_leap_gives_the_same_requests(policy: str) -> None:
    leaped, stepped = run("--policy", policy, out="leap"), run("--policy", policy, "--no-leap", out="step")

    assert (leaped / "requests.parquet").read_bytes() == (stepped / "requests.parquet").read_bytes()
    summaries = [load(folder / "summary.json") for folder in (leaped, stepped)]
    assert summaries[0]["steps"] == summaries[1]["steps"] == summaries[1]["runs"]
    assert summaries[0]["runs"] < summaries[1]["runs"]
    assert summaries[0]["p99_itl_ms"] == summaries[1]["p99_itl_ms"]


def test_same_seed_same_bytes() -> None:
    Path("two.yaml").write_text(SCENARIO + "compare: [{name: a}, {name: b, policy: tgi}]\ntables: [cdf]\n")
    one, two = run(scenario="two.yaml", out="one"), run(scenario="two.yaml", out="two")

    for name in ("requests.parquet", "steps.parquet", "scenario.yaml", "cdf.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("summary.json", "comparison.json"):
        lines = [
            [line for line in (folder / name).read_text().splitlines() if not any(f'"{w}"' in line for w in WALL)]
            for folder in (one, two)
        ]
        assert lines[0] == lines[1], name


def test_another_seed_another_workload() -> None:
    one, two = (rows(run("--set", f"seed={seed}", out=f"{seed}")) for seed in (1, 2))

    assert [row["arrival_ps"] for row in one] != [row["arrival_ps"] for row in two]


def test_a_shorter_second_run_leaves_nothing_of_the_first() -> None:
    run("--policy", "vllm", "--policy", "tgi")
    run()

    assert len(rows(Path("out"))) == 30
    assert not list(Path("out").glob("*.partial"))


def test_json_prints_nothing_else() -> None:
    single = chairlift("run", "small.yaml", "--json", "--out", "one")
    both = chairlift("run", "small.yaml", "--json", "--out", "two", "--policy", "vllm", "--policy", "orca")

    assert (single.status, single.err, both.err) == (0, "", "")
    assert json.loads(single.out) == load(Path("one/summary.json"))
    assert [each["variant"] for each in json.loads(both.out)] == ["vllm", "orca"]


def test_quiet_prints_nothing() -> None:
    result = chairlift("run", "small.yaml", "--quiet")

    assert (result.status, result.out, result.err) == (0, "", "")


def test_shipped_scenario_by_name() -> None:
    folder = run(scenario="anyscale_latency")

    assert len(load(folder / "comparison.json")) == 8
    assert (folder / "cdf.csv").read_text().count("\n") == 1 + 8 * 100


def test_a_file_of_that_name_goes_before_a_shipped_scenario() -> None:
    Path("anyscale_latency").write_text(SCENARIO)

    assert load(run(scenario="anyscale_latency") / "summary.json")["completed"] == 30


# ---- list, schema, trace describe ----


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("policies", ["static", "orca", "tgi", "vllm", "max_num_batched_tokens", "'fcfs' | 'priority'"]),
        ("routers", ["round_robin"]),
        ("models", ["opt-13b", "llama-2-70b", "KV B/token"]),
        ("gpus", ["a100-40gb", "h200", "mi300x"]),
        ("scenarios", ["anyscale_23x", "anyscale_latency"]),
        ("backends", ["roofline"]),
        ("workloads", ["azure-conv-2023", "azure-code-2023", "mooncake-conversation", "sharegpt"]),
    ],
)
def test_list(kind: str, some: list[str]) -> None:
    result = chairlift("list", kind)

    assert (result.status, result.err) == (0, "")
    assert [words for words in some if words not in result.out] == []


def test_every_kind_of_list_is_in_the_help() -> None:
    text = chairlift("list", "--help").out

    for kind in ("policies", "models", "gpus", "scenarios", "backends", "workloads", "routers"):
        assert kind in text


def test_help_is_shown_for_every_command() -> None:
    for command in ([], ["run"], ["list"], ["schema"], ["trace"], ["trace", "describe"]):
        result = chairlift(*command, "--help")
        assert result.status == 0
        assert "Usage" in result.out


def test_schema_knows_every_setting_of_policies_routers_and_backends() -> None:
    result = chairlift("schema")
    schema = json.loads(result.out)

    assert (result.status, result.err) == (0, "")
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["type"], schema["additionalProperties"], schema["required"]) == ("object", False, ["workload"])
    for holder in (schema, schema["$defs"]["Variant"]):
        settings = {
            choice["properties"]["name"]["const"]: choice
            for choice in holder["properties"]["policy"]["anyOf"]
            if "properties" in choice
        }
        assert set(POLICIES) <= set(settings)
        assert {"max_num_batched_tokens", "max_num_seqs", "block_size"} <= set(settings["vllm"]["properties"])
        assert settings["static"]["properties"]["pad_to"]["enum"] == ["batch", "global"]
        assert not settings["static"]["additionalProperties"]
        assert "mfu" in json.dumps(holder["properties"]["backend"])
        assert "round_robin" in json.dumps(holder["properties"]["router"])
        assert "opt-13b" in holder["properties"]["model"]["anyOf"][0]["enum"]


def test_schema_is_whole() -> None:
    schema = json.loads(chairlift("schema").out)

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                target = schema
                assert reference.startswith("#/")
                for part in reference[2:].split("/"):
                    target = target[part]  # KeyError: the reference leads nowhere
            if "anyOf" in node:
                assert isinstance(node["anyOf"], list)
                assert node["anyOf"]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(schema)


def test_scenarios_in_folders_are_listed_and_found_by_either_name() -> None:
    listed = chairlift("list", "scenarios").out

    assert "research/policy_zoo" in listed
    assert "papers/vllm_lanes" in listed
    assert find_scenario("research/fairness") == find_scenario("fairness")
    assert find_scenario("fairness").name == "fairness.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios").rglob("*.yaml")), ids=lambda path: path.stem)
def test_schema_has_the_keys_of_shipped_scenarios(path: Path) -> None:
    options = {"sweeps": ["--sweep"], "plans": ["--plan"]}.get(path.parent.name, [])
    schema = json.loads(chairlift("schema", *options).out)
    scenario = yaml.safe_load(path.read_text())

    assert set(scenario) <= set(schema["properties"])
    for each in scenario.get("compare", []):
        assert set(each) <= set(schema["$defs"]["Variant"]["properties"])


def test_trace_describe() -> None:
    Path("trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,300,20\n4,200,30\n")
    table = chairlift("trace", "describe", "trace.csv")
    facts = chairlift("trace", "describe", "trace.csv", "--json")
    first = chairlift("trace", "describe", "trace.csv", "--json", "--limit", "2")

    assert (table.status, table.err, facts.err) == (0, "", "")
    assert "trace.csv" in table.out
    assert "prompt tokens" in table.out
    assert json.loads(facts.out) != json.loads(first.out)
    assert '"requests": 3' in facts.out
    assert '"requests": 2' in first.out


# ---- as a process of its own ----


def process(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(IMPORTS), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_python_m_chairlift_is_the_same_command(tmp_path: Path) -> None:
    result = process("-m", "chairlift", "run", "small.yaml", "--json", cwd=tmp_path)
    bad = process("-m", "chairlift", "run", "none.yaml", cwd=tmp_path)

    assert (result.returncode, result.stderr) == (0, "")
    mine = load(run() / "summary.json")
    theirs = json.loads(result.stdout)
    assert {k: v for k, v in theirs.items() if k not in WALL} == {k: v for k, v in mine.items() if k not in WALL}
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "error: none.yaml: no such file\n")


def test_folders_of_the_user_do_not_shadow_ours(tmp_path: Path) -> None:
    """The console script leaves the working directory off the import path, as ``-P`` does."""
    for name in ("chairlift", "sim", "policies", "backend"):
        (tmp_path / name).mkdir()
        for module in ("__init__", "cli", "base"):
            (tmp_path / name / f"{module}.py").write_text("raise SystemExit('the wrong package')\n")
    Path("policies/mine.py").write_text(POLICY)
    script = "from chairlift.sim.cli.main import main; main()"
    result = process("-P", "-c", script, "run", "small.yaml", "--quiet", "--policy", "policies/mine.py", cwd=tmp_path)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert load(Path("runs/small/summary.json"))["completed"] == 30


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name: str) -> None:
    command = Commands(name="chairlift").get_command(None, name)

    assert command.name == name
    assert " ".join((command.help or "").split("\n\n")[0].split()) == COMMANDS[name][2]


def test_help_imports_nothing_that_simulates() -> None:
    script = (
        "import sys; from chairlift.sim.cli.main import app; app(['--help'], standalone_mode=False);"
        "print([name for name in ('numpy', 'pydantic', 'pyarrow', 'simpy', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(IMPORTS)}, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(name in done.stdout for name in COMMANDS)
