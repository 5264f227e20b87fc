"""Sweeps: every point under every seed, each run once, whatever happens in between."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from pathlib import Path

import pytest

from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.journal import Journal
from kit.command import POLICY, SCENARIO, chairlift, replaced
from kit.sweeping import SWEEP, started, stopped, table, written, written_down


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def swept(*arguments: str, status: int = 0) -> str:
    result = chairlift("sweep", "sweep.yaml", "--out", "out", *arguments)
    assert result.status == status, result.err
    return result.out + result.err


def test_a_row_is_what_chairlift_run_gives_at_that_point(tmp_path: Path) -> None:
    written(tmp_path)
    swept("--jobs", "2")
    rows = table(tmp_path / "out").to_pylist()
    points = itertools.product(["vllm", "{name: orca, reserve: max}"], [1, 4], [7, 8, 9])

    assert len(rows) == 12
    for row, (policy, rate, seed) in zip(rows, points, strict=True):
        said = "{name: vllm, async_scheduling: false}" if policy == "vllm" else policy  # the loop of the other, orca
        changed = [f"policy={said}", f"workload.arrivals.poisson.rate_per_s={rate}", f"seed={seed}"]
        [setup] = load(tmp_path / "base.yaml", changed).setups
        summary = simulate(setup).summary
        assert row["policy"] == ("vllm" if policy == "vllm" else "orca reserve=max")
        assert (row["workload.arrivals.poisson.rate_per_s"], row["seed"], row["error"]) == (rate, seed, "")
        for metric in ("completed", "mean_ttft_ms", "p99_itl_ms", "steps", "kv_utilization", "replica_hours"):
            assert row[metric] == summary[metric], metric


def test_all_points_share_the_random_numbers_of_a_seed(tmp_path: Path) -> None:
    written(tmp_path)
    swept("--jobs", "1")
    totals: dict[int, set[tuple[int, int]]] = {}
    for row in table(tmp_path / "out").to_pylist():
        totals.setdefault(row["seed"], set()).add((row["total_input_tokens"], row["total_output_tokens"]))

    assert all(len(found) == 1 for found in totals.values())
    assert len(set.union(*totals.values())) == 3


def test_nothing_is_run_twice_and_more_points_run_only_what_is_new(tmp_path: Path) -> None:
    written(tmp_path)

    assert "12 new, 0 known" in swept("--jobs", "1")
    before = table(tmp_path / "out")
    assert "0 new, 12 known" in swept("--jobs", "1")
    assert table(tmp_path / "out").equals(before, check_metadata=True)
    written(tmp_path, SWEEP.replace("[1, 4]", "[1, 2, 4]").replace("seeds: 3", "seeds: [9, 7]"))
    assert "4 new, 8 known" in swept("--jobs", "1")


def test_names_do_not_change_what_a_run_is_but_the_files_it_names_do(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    base = replaced("policy: {name: vllm}", "policy: mine.py")
    written(tmp_path, "base: base.yaml\n", base)

    assert "1 new" in swept("--trust", "-j1")
    written(tmp_path, "base: base.yaml\nname: other\nquestion: why?\n", "question: who?\n" + base)
    assert "0 new, 1 known" in swept("--trust", "-j1")
    (tmp_path / "mine.py").write_text(POLICY.replace("2048", "2047"))
    assert "1 new" in swept("--trust", "-j1")


def test_a_policy_on_the_command_line_lets_no_file_in_the_yaml_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)
    (tmp_path / "yours.py").write_text(POLICY)
    written(tmp_path, "base: base.yaml\n", replaced("policy: {name: vllm}", "policy: yours.py"))

    assert "yours.py" in swept("-j1", "--policy", str(tmp_path / "mine.py"), status=2)
    assert "2 new" in swept("-j1", "--policy", str(tmp_path / "mine.py"), "--trust")
    written(tmp_path, "base: base.yaml\n", replaced("policy: {name: vllm}", "policy: mine.py"))
    assert "0 new" in swept("-j1", "--policy", str(tmp_path / "mine.py"))


def test_a_folder_counts_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chunk-0-trace.csv").write_text("0,2,1,Gamma,1,0.5\n600,2,1,Gamma,1,0.5\n")
    lengths = tmp_path / "model" / "chunk-0-dataset.json"
    lengths.write_text('{"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{5: 1.0}"}}')
    base = SCENARIO.partition("workload:")[0] + "workload: {servegen: {file: model}, requests: 20}\n"
    written(tmp_path, "base: base.yaml\n", base)

    assert "1 new" in swept("-j1")
    assert "0 new" in swept("-j1")
    lengths.write_text(lengths.read_text().replace("10", "11"))
    assert "1 new" in swept("-j1")
    assert table(tmp_path / "out").to_pylist()[0]["total_input_tokens"] == 220


def test_without_ray_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    written(tmp_path)

    assert "pip install 'chairlift[ray]'" in swept("--executor", "ray", status=2)
    assert "must not be given with --executor ray" in swept("--executor", "ray", "--jobs", "2", status=2)


def test_variants_and_cases_of_the_base_are_axes(tmp_path: Path) -> None:
    compare = (
        "compare:\n  - {name: small, kv: {tokens: 3000}}\n  - {name: orca, policy: {name: orca, reserve: max}}\n"
        "cases:\n  - {name: slow, set: {workload.arrivals.poisson.rate_per_s: 1}}\n  - {name: fast, set: {seed: 3}}\n"
    )
    written(
        tmp_path,
        "base: base.yaml\naxes: {policy.max_num_seqs: [4, 64]}\nset: {compare.1.policy: vllm}\n",
        SCENARIO + compare,
    )
    swept("-j1")
    rows = table(tmp_path / "out").to_pylist()

    assert [(r["case"], r["variant"], r["policy.max_num_seqs"]) for r in rows] == list(
        itertools.product(["slow", "fast"], ["small", "orca"], [4, 64])
    )
    changed = ["workload.arrivals.poisson.rate_per_s=1", "kv.tokens=3000", "policy.max_num_seqs=4", "compare=[]"]
    setup = load(tmp_path / "base.yaml", changed).setups[0]  # of the first case, which says the same
    assert rows[0]["p99_e2el_ms"] == simulate(setup).summary["p99_e2el_ms"]


def test_a_policy_from_the_command_line_joins_the_others(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "mine.py").write_text(POLICY)
    swept("--policy", "mine.py", "-j2")
    rows = table(tmp_path / "out").to_pylist()

    assert {row["policy"] for row in rows} == {"vllm", "orca reserve=max", "mine.py"}
    assert len(rows) == 18
    assert {row["completed"] for row in rows} == {30}


def test_a_failing_run_is_a_row_with_its_error_and_stops_nothing(tmp_path: Path) -> None:
    written(tmp_path, "base: base.yaml\naxes: {tensor_parallel: [1, 7, 2]}\n")
    said = swept("-j2", status=1)
    rows = table(tmp_path / "out").to_pylist()

    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "7" in rows[1]["error"]
    assert rows[1]["completed"] is None
    assert "failed:" in said
    assert "0 new, 3 known before, 1 failed" in swept("-j2", status=1)
    assert "1 new" not in swept("-j2", status=1)
    assert "1 failed" in swept("-j2", "--retry-failed", status=1)


def test_a_run_that_kills_its_process_is_given_up_and_the_others_end(tmp_path: Path) -> None:
    deadly = "    def schedule(self, step: Step) -> int:\n"
    (tmp_path / "deadly.py").write_text(
        POLICY.replace(
            deadly, deadly + "        if self.budget == 999:\n            import os\n            os.abort()\n"
        )
    )
    base = replaced("policy: {name: vllm}", "policy: {name: deadly.py}")
    written(tmp_path, "base: base.yaml\naxes: {policy.budget: [2000, 2001, 999, 2002, 2003, 2004]}\n", base)
    swept("-j2", "--trust", status=1)
    errors = {row["policy.budget"]: row["error"] for row in table(tmp_path / "out").to_pylist()}

    assert errors == dict.fromkeys((2000, 2001, 2002, 2003, 2004), "")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, how: signal.Signals) -> None:
    slow = replaced("requests: 30", "requests: 600")
    written(tmp_path, SWEEP.replace("seeds: 3", "seeds: 12"), slow)
    process = started("sweep", "sweep.yaml", "--out", "out", "--jobs", "2")
    stopped(process, tmp_path / "out", how)
    if how == signal.SIGINT:
        assert 5 <= len(table(tmp_path / "out")) < 48
    known = len(written_down(tmp_path / "out"))

    assert 5 <= known < 48
    assert f"{48 - known} new, {known} known" in swept("--jobs", "2")
    assert chairlift("sweep", "sweep.yaml", "--out", "whole", "--jobs", "2").status == 0
    assert table(tmp_path / "out").equals(table(tmp_path / "whole"), check_metadata=True)


@pytest.mark.parametrize("command", [("sweep", "chat_knee"), ("plan", "chat_8b")])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--address", "x"), "--address: must not be given without --executor ray"),
        (("--address", "x", "--dry-run"), "--address: must not be given without --executor ray"),
        (("--executor", "ray", "--jobs", "2"), "--jobs: must not be given with --executor ray"),
    ],
)
def test_options_that_do_not_go_together_are_told_before_anything_is_written(
    tmp_path: Path, command: tuple[str, str], options: tuple[str, ...], said: str
) -> None:
    result = chairlift(*command, "--out", str(tmp_path / "out"), *options)

    assert (result.status, said in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


def test_a_sweep_where_another_writes_or_where_the_journal_is_foreign_is_refused_in_one_line(tmp_path: Path) -> None:
    written(tmp_path)
    with Journal(tmp_path / "out"):
        assert swept(status=2).splitlines()[1:] == ["error: out/journal.sqlite: another process is writing here"]
    (tmp_path / "out" / "journal.sqlite").write_text("{}\n")
    [_, said] = swept(status=2).splitlines()
    assert "out/journal.sqlite: is no journal of a sweep, or damaged" in said


def test_a_dry_run_checks_and_counts_and_writes_nothing(tmp_path: Path) -> None:
    written(tmp_path)

    assert "4 points × 3 seeds = 12 runs" in swept("--dry-run")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sweep", "rule"),
    [
        ("axes: {policy: [vllm]}", "sweep.yaml:1: base: is required"),
        ("base: nothing", "sweep.yaml:1: base: no such file, and no scenario of that name"),
        ("base: base.yaml\naxis: {}", "sweep.yaml:2: axis: unknown key – did you mean 'axes'?"),
        ("base: base.yaml\naxes:\n  policy: [vllm, vlm]", "sweep.yaml:3: axes.policy: policy: no such policy"),
        ("base: base.yaml\naxes:\n  polcy: [1, 2]", "unknown key – did you mean 'policy'?"),
        ("base: base.yaml\naxes:\n  kv.tokens: [40, x]", "sweep.yaml:3: axes.kv.tokens: kv.tokens: must be a whole"),
        ("base: base.yaml\naxes: {seed: [1, 2]}", "seed is no axis"),
        ("base: base.yaml\naxes: {tables: [[latency], [cdf]]}", "tables is no axis: it says what is shown of a run"),
        ("base: base.yaml\nzip: [{question: [a, b]}]", "question is no axis: it says what is shown of a run"),
        ("base: base.yaml\nset: {seed: 4}\nseeds: [1, 2]", "has no effect: seeds lists those of all runs"),
        ("base: base.yaml\naxes: {gpu: []}", "must have at least 1 item"),
        ("base: base.yaml\naxes: {gpu: h100}", "must be a list of values"),
        ("base: base.yaml\naxes: {kv.tokens: {log: {low: 0, high: 5, points: 3}}}", "must be above 0"),
        ("base: base.yaml\nzip:\n  - {gpu: [h100, h200], kv.tokens: [1]}", "equally many values (gpu has 2, kv.tokens"),
        ("base: base.yaml\naxes: {gpu: [h100]}\nzip: [{gpu: [h200]}]", "gpu stands in several axes"),
        ("base: base.yaml\nseeds: [1, 1]", "a seed stands twice"),
        ("base: base.yaml\nseeds: 0", "must be at least 1"),
        ("base: base.yaml\nset: {policy.nme: 3}", "sweep.yaml:2: set.policy.nme: policy.nme"),
        ("base: base.yaml\naxes: {a: {linear: {low: 0, high: 1, points: 9999}}, b: {linear: {low: 0, high: 1, "
         "points: 9999}}}", "99,980,001 points"),
        ("base: {model: opt-13b, gpu: a100}", "sweep.yaml:1: gpu: unknown GPU"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_sweep_is_said_with_its_line(tmp_path: Path, sweep: str, rule: str) -> None:
    written(tmp_path, sweep + "\n")
    result = chairlift("sweep", "sweep.yaml", "--out", "out")

    assert result.status == 2
    assert rule in result.err
    assert not (tmp_path / "out").exists()


def test_an_axis_that_every_variant_would_hide_is_refused(tmp_path: Path) -> None:
    compare = "compare:\n  - {name: a, policy: vllm}\n  - {name: b, policy: {name: orca, reserve: max}}\n"
    written(tmp_path, SWEEP, SCENARIO + compare)

    assert "sweep.yaml:4: axes.policy: each variant that the base compares says its own policy" in swept(status=2)
    assert "4 points × 3 seeds" in swept("--dry-run", "--set", "compare=[]")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--race", "p99_ttf_ms"), "--race: no such metric – did you mean 'p99_ttft_ms'"),
        (("--race", "mean_running"), "--race: neither more nor less"),
        (("--race", "p99_ttft_ms", "--race-over", "polic"), "--race-over: no such axis – did you mean 'policy'"),
        (("--race-over", "policy"), "must not be given without --race"),
        (("--address", "localhost:1"), "must not be given without --executor ray"),
        (("--policy", "nobody"), "--policy"),
        (("--set", "kv=1"), "--set kv=1"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: tuple[str, ...], rule: str) -> None:
    written(tmp_path, SWEEP.replace("seeds: 3", "seeds: 4"))

    assert rule in swept("-j1", *options, status=2)


def test_a_race_needs_seeds_to_judge_by(tmp_path: Path) -> None:
    written(tmp_path)

    assert "--race: needs more than 3 seeds" in swept("--race", "p99_ttft_ms", status=2)


def test_the_schema_of_sweeps_is_for_editors() -> None:
    schema = json.loads(chairlift("schema", "--sweep").out)

    assert (schema["title"], schema["additionalProperties"], schema["required"]) == ("Chairlift sweep", False, ["base"])
    assert {"base", "set", "seeds", "axes", "zip", "random", "name", "question"} == set(schema["properties"])
    assert schema["$defs"]["Axis"]["anyOf"][0] == {"type": "array", "minItems": 1}
    assert all("description" in each for each in schema["properties"].values())


def test_numbers_below_a_mapping_are_columns_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chairlift.sim import simulate as run

    real = run.fleet
    more = {"served": {"a": 1, "b": {"c": None}}, "said": "nothing", "each": [1]}
    monkeypatch.setattr(run, "fleet", lambda *arguments: {**real(*arguments), **more})
    written(tmp_path)
    swept("-j1")
    [row, *_] = table(tmp_path / "out").to_pylist()

    assert (row["served.a"], row["served.b.c"]) == (1, None)
    assert not {"said", "each", "served"} & set(row)


def test_the_journal_has_an_entry_a_run_with_all_that_the_table_has(tmp_path: Path) -> None:
    written(tmp_path)
    swept("-j1")
    entries = written_down(tmp_path / "out")
    rows = {row["key"]: row for row in table(tmp_path / "out").to_pylist()}

    assert len(rows) == 12
    assert entries.keys() == rows.keys()
    for key, entry in entries.items():
        assert all(rows[key][name] == value for name, value in entry["metrics"].items())
