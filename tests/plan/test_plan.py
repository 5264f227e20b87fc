"""`chairlift plan`: pruning keeps the answer, errors say what would help, and what is printed can be run."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from chairlift.sim.plan.bounds import bound
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.cheapest import race
from chairlift.sim.plan.deciding import decide
from chairlift.sim.plan.file import read_plan
from chairlift.sim.plan.pacing import paced
from chairlift.sim.plan.promises import BINS, Latency, Promise, sample_of
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.plan.verdict import judge
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.local import Local
from kit.command import POLICY, Result, chairlift
from kit.pages import Page
from kit.places import ROOT
from kit.serving import serve_line
from kit.sweeping import started, stopped, written_down

PLANS = sorted((ROOT / "scenarios" / "plans").glob("*.yaml"))

PLAN = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: roofline
  max_model_len: 4096
  policy: vllm
  workload:
    arrivals: {poisson: {rate_per_s: 1}}
    prompt_tokens: {uniform: {low: 100, high: 900}}
    output_tokens: {uniform: {low: 5, high: 40}}
slo:
  - {percentile: 95, ttft_ms: 400}
  - {share: 0.9, ttft_ms: 800, tpot_ms: 40}
rate_per_s: 60
search: {requests: 200, most_requests: 1600, precision: 0.05}
axes:
  gpu: [h100, a100-80gb, l4]
  replicas: [1, 2, 3, 4]
"""


def written(folder: Path, text: str = PLAN) -> str:
    path = folder / "my.yaml"
    path.write_text(text)
    return str(path)


def changed(folder: Path, *pairs: tuple[str, str]) -> str:
    text = PLAN
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return written(folder, text)


# ---- the answer ----


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of `PLAN`'s results, not to be changed, and what the command said."""
    folder = tmp_path_factory.mktemp("answered")
    return folder / "out", chairlift("plan", written(folder), "--out", str(folder / "out"), "--jobs", "1")


def test_the_pruned_answer_is_that_of_brute_force(tmp_path: Path, answered: tuple[Path, Result]) -> None:
    plan = read_plan(Path(written(tmp_path)))
    promises = plan.spec.slo
    effort = plan.spec.search.effort()
    shutil.copytree(answered[0], tmp_path / "out")
    with Journal(tmp_path / "out") as journal:
        runs = Simulations(journal, Local(1), tuple(promises))

        def bounds(candidate: Candidate):  # type: ignore[no-untyped-def]
            return bound(candidate, promises)

        pruned = race(plan.candidates, bounds, runs.of, promises, 60.0, effort)
        before = runs.simulated
        brute = race(plan.candidates, bounds, runs.of, promises, 60.0, effort, prune=False)

    assert pruned.winner is not None
    assert brute.winner is not None
    assert pruned.winner.candidate.name == brute.winner.candidate.name
    truth = {entry.candidate.name: entry for entry in brute.entries}
    excluded = pruned.of("excluded")
    assert excluded
    assert all(truth[entry.candidate.name].outcome == "broken" for entry in excluded)
    assert all(entry.verdict is None for entry in pruned.entries if entry.outcome in ("excluded", "dearer"))
    assert before == 0  # the answer simulated no more than the pruned race
    assert runs.simulated > 0  # pruning spared something
    kept = [entry for entry in brute.entries if entry.outcome == "kept"]
    assert min(entry.candidate.usd_per_hour for entry in kept) == pruned.winner.candidate.usd_per_hour


def test_a_plan_is_answered_and_resumed(tmp_path: Path, answered: tuple[Path, Result]) -> None:
    out, first = answered
    assert first.status == 0, first.err
    shutil.copytree(out, out := tmp_path / "out")
    told = json.loads((out / "plan.json").read_text())
    before = written_down(out)
    second = chairlift("plan", written(tmp_path), "--out", str(out), "--jobs", "1", "--json")

    assert "Cheapest for 60 requests/s" in first.out
    assert "vllm serve meta-llama/Llama-3.1-8B --tensor-parallel-size 1 --max-model-len 4096" in first.out
    assert "--max-num-batched-tokens 8192" in first.out  # the server's default on this GPU
    assert written_down(out) == before
    assert json.loads(second.out)["cheapest"] == told["cheapest"]
    [cheapest] = told["cheapest"]
    assert len(cheapest["systems"]) == 12
    assert {"kept", "excluded", "dearer"} <= {system["outcome"] for system in cheapest["systems"]}
    for word in ("KV pool", "efficiency", "price of", "simulated", "seeds", "intervals", "promise 1"):
        assert any(name.startswith(word) for name in told["assumptions"]), word
    table = pq.read_table(out / "plan.parquet")
    assert table.num_rows == sum("verdict" in system for system in cheapest["systems"])
    page = (out / "plan.html").read_text()
    assert Page(out / "plan.html").links == []
    assert "vllm serve" in page
    assert f"<b>{cheapest['winner']['system']}</b>, ${cheapest['winner']['usd_per_hour']:,.2f} an hour" in page


def test_today_has_a_capacity_and_headroom(tmp_path: Path) -> None:
    plan = changed(
        tmp_path,
        ("axes:\n  gpu: [h100, a100-80gb, l4]\n  replicas: [1, 2, 3, 4]\n", "today: {replicas: 2}\n"),
        ("rate_per_s: 60", "rate_per_s: 80\nheadroom: {growth: [1.2, 4], burst_cvs: [2]}"),
        ("{uniform: {low: 100, high: 900}}", "{uniform: {low: 50, high: 450}}"),
        ("most_requests: 1600, precision: 0.05", "most_requests: 800, precision: 0.2, budget_requests: 50000"),
    )
    out = tmp_path / "out"
    result = chairlift("plan", plan, "--out", str(out), "--jobs", "1", "--quiet")
    assert result.status == 0, result.err
    told = json.loads((out / "plan.json").read_text())
    by = {entry["under"]: entry for entry in told["headroom"]}

    assert list(by) == ["as it is", "N − 1 replicas", "gaps of CV 2"]
    whole, less, bursts = by.values()
    assert less["rate_per_s"] < 0.6 * whole["rate_per_s"]  # two queues share a load a little better than one
    assert bursts["rate_per_s"] < whole["rate_per_s"]
    assert whole["growth"]["1"] == "kept"
    assert whole["growth"]["4"] == "broken"
    assert told["capacities"][0]["low"] <= whole["rate_per_s"] <= told["capacities"][0]["high"]
    assert any(entry["proof"] == 1 for entry in whole["rates"])
    assert "prices" not in told["assumptions"]


def test_the_best_system_comes_first_and_sessions_are_called_so(tmp_path: Path) -> None:
    turns, short = "{turns: 2, think_s: 0.1}", "{uniform: {low: 20, high: 200}}"
    plan = changed(
        tmp_path,
        ("rate_per_s: 60\n", ""),
        ("  gpu: [h100, a100-80gb, l4]\n  replicas: [1, 2, 3, 4]\n", "  gpu: [l4, h100]\n"),
        ("most_requests: 1600, precision: 0.05", "most_requests: 400, precision: 0.5, budget_requests: 20000"),
        ("    prompt_tokens: {uniform: {low: 100, high: 900}}", f"    sessions: {turns}\n    prompt_tokens: {short}"),
        ("policy: vllm", "policy: {name: vllm, enable_prefix_caching: false}"),
    )
    result = chairlift("plan", plan, "--out", str(tmp_path / "out"), "--jobs", "1")
    told = json.loads((tmp_path / "out" / "plan.json").read_text())

    assert [c["axes"]["gpu"] for c in told["capacities"]] == ["h100", "l4"]
    assert told["assumptions"]["system"] == "gpu h100"
    assert "max sustainable rate, sessions/s" in result.out
    assert "$ per 1,000 sessions" in " ".join(result.out.split())


def test_recorded_loads_that_met_the_promise_are_said_to(tmp_path: Path) -> None:
    """vLLM 0.23 on an H200 had a p99 TTFT of 110 ms at 6/s and 419 ms at 20/s of Azure's chat."""
    plan = written(
        tmp_path,
        "base:\n  model: llama-3.1-8b\n  gpu: h200\n  max_model_len: 16384\n  kv: {blocks: 56056}\n"
        "  policy: {name: vllm, max_num_batched_tokens: 8192}\n"
        "  workload: {name: azure-conv-2023, arrivals: {poisson: {rate_per_s: 6}}}\n"
        "slo: [{percentile: 99, ttft_ms: 1000}]\n",
    )
    read = read_plan(Path(plan))
    [candidate] = read.candidates

    assert candidate.backend == "profile, measured"
    assert candidate.setup is not None
    told = candidate.setup.groups[0].make_backend(candidate.setup.model).assumptions()
    assert told["cost model"].startswith("profile h200-llama-3.1-8b-vllm-0.26")  # not our own engine's
    with Journal(tmp_path) as journal:
        measure = Simulations(journal, Local(1), tuple(read.spec.slo)).of(candidate)
        for rate, proof in ((6, 1), (20, 1), (40, -1)):
            assert decide(measure, read.spec.slo, rate, read.spec.search.effort()).proof == proof


# ---- bounds ----


def test_a_bound_is_one(tmp_path: Path) -> None:
    """No rate at which hardly anybody waits lies above the bound on the rate."""
    plan = read_plan(Path(written(tmp_path)))
    candidate = next(c for c in plan.candidates if c.labels == {"gpu": "h100", "replicas": 1})
    limit = bound(candidate, plan.spec.slo).rate_per_s
    with Journal(tmp_path) as journal:
        measure = Simulations(journal, Local(1), tuple(plan.spec.slo)).of(candidate)
        verdict = judge(plan.spec.slo, measure(limit * 1.05, 3000, 2), limit * 1.05, 3000)
        served = sum(s.simulated_s for s in measure(limit * 1.05, 3000, 2)) / 2

    assert verdict.proof == -1
    assert 3000 / served < limit


# ---- shares ----


def test_shares_by_hand() -> None:
    n = BINS * 2
    ttft = np.where(np.arange(n) % 4 == 0, 200.0, 50.0)
    tpot = np.where(np.arange(n) % 2 == 0, 30.0, 0.0)
    several = np.arange(n) % 2 == 0
    promises = [
        Promise(percentile=50, ttft_ms=100),
        Promise(share=0.5, tpot_ms=20),
        Promise(share=0.5, ttft_ms=100, tpot_ms=20),
    ]
    times = Latency(np.arange(n) / 10, {"ttft": ttft, "tpot": tpot, "e2el": ttft + 100}, several)
    sample = sample_of(promises, times)

    assert [sum(e) for e in sample.eligible] == [n, n // 2, n]  # TPOT alone: only of answers that have one
    assert [sum(m) for m in sample.met] == [n * 3 // 4, 0, n // 2]
    assert max(sample.severity) == pytest.approx((2.0 + 0.5) / 2)


def test_sessions_that_last_as_long_as_a_run_show_no_long_run() -> None:
    n = BINS * 2
    promises = [Promise(percentile=50, e2el_ms=5000)]
    ms = {"ttft": np.full(n, 50.0), "tpot": np.zeros(n), "e2el": np.full(n, 100.0)}
    times = Latency(np.arange(n) / 10, ms, np.zeros(n, dtype=bool))
    short = sample_of(promises, times)
    long = sample_of(promises, times, since_s=np.zeros(n))  # all of them begun at once

    assert short.stay_s == pytest.approx(0.1)
    assert long.stay_s == pytest.approx(0.1 + 0.99 * (n - 1) / 10)
    assert not judge(promises, [short, short], 10, n).is_short
    assert judge(promises, [long, long], 10, n).is_short


def test_a_share_of_a_mix_keeps_its_proportion(tmp_path: Path) -> None:
    plan = changed(
        tmp_path,
        (
            "    arrivals: {poisson: {rate_per_s: 1}}\n    prompt_tokens: {uniform: {low: 100, high: 900}}\n"
            "    output_tokens: {uniform: {low: 5, high: 40}}\n",
            "    mix:\n"
            "      chat: {name: azure-conv-2023, requests: 5, rate_per_s: 3}\n"
            "      code: {name: azure-code-2023, requests: 5, arrivals: {poisson: {rate_per_s: 1}}}\n",
        ),
        ("ttft_ms: 400}", "ttft_ms: 400, tenant: chat}"),
    )
    read = read_plan(Path(plan))
    workload = paced(read.candidates[0].document, 20, 1000).data["workload"]

    assert workload["requests"] == 1000
    assert workload["mix"]["chat"]["rate_per_s"] == pytest.approx(15)
    assert workload["mix"]["code"]["arrivals"]["poisson"]["rate_per_s"] == pytest.approx(5)
    assert read.candidates[0].setup is not None


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("[h100, a100-80gb, l4]", "[]")], "axes.gpu"),
        ([("[h100, a100-80gb, l4]", "[h1000]")], "unknown GPU 'h1000'"),
        ([("slo:", "prices: {h100: 3}\nslo:")], "has no price for a100-80gb"),
        ([("ttft_ms: 400", "tfft_ms: 400")], "did you mean 'ttft_ms'"),
        ([("arrivals: {poisson: {rate_per_s: 1}}", "clients: {concurrency: 4}")], "closed loop"),
        ([("percentile: 95, ttft_ms: 400", "percentile: 95, ttft_ms: 400, tenant: you")], "no such tenant"),
        ([("model: llama-3.1-8b", "model: llama-3.1-70b"), ("[h100, a100-80gb, l4]", "[l4, a10g]")], "no room for KV"),
        ([("rate_per_s: 60", "rate_per_s: 60\ntoday: {gpu: h100, tensor_parallel: 3}")], "tensor_parallel must divide"),
    ],
    ids=["empty", "unknown GPU", "no price", "typo", "closed loop", "tenant", "fits nowhere", "today"],
)
def test_bad_input_is_told(tmp_path: Path, pairs: list[tuple[str, str]], said: str) -> None:
    result = chairlift("plan", changed(tmp_path, *pairs), "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 2
    assert said in result.err.replace("\n", " "), result.err


def test_a_promise_that_nothing_keeps_is_told_with_what_would_help(tmp_path: Path) -> None:
    plan = changed(tmp_path, ("percentile: 95, ttft_ms: 400", "percentile: 95, ttft_ms: 3"))
    result = chairlift("plan", plan, "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 1
    text = " ".join(result.out.split())
    assert "No system keeps the promises at 60 requests/s" in text
    assert "cannot be kept even by a request that is alone: p95 TTFT is at least" in text
    assert "raise the limit" in text
    assert "vllm serve" not in text


def test_a_rate_beyond_the_space_is_told_with_what_would_help(tmp_path: Path) -> None:
    result = chairlift("plan", written(tmp_path), "--rate", "5000", "--out", str(tmp_path / "out"), "--jobs", "1")

    assert result.status == 1
    assert "add replicas or faster GPUs" in " ".join(result.out.split())


def test_the_schema_of_plans_is_for_editors() -> None:
    schema = json.loads(chairlift("schema", "--plan").out)

    assert schema["title"] == "Chairlift plan"
    assert {"slo", "axes", "prices", "today", "headroom", "search"} <= schema["properties"].keys()


# ---- shipped plans ----


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_is_sound(path: Path) -> None:
    plan = read_plan(path)
    result = chairlift("plan", path.stem, "--dry-run")

    assert plan.name == path.stem
    assert "?" in str(plan.spec.question)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert any(candidate.setup is not None for candidate in plan.candidates)
    assert path.stem in chairlift("list", "plans").out
    assert result.status == 0, result.err
    assert "however scheduled" in " ".join(result.out.split())


# ---- interruption ----


def longer(folder: Path) -> str:
    """`PLAN` with answers so long that one H100 needs dozens of replications: there is time to stop it."""
    return changed(folder, ("{low: 5, high: 40}", "{low: 20, high: 120}"), ("requests: 1600", "requests: 800"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Of a `longer` plan that nobody stopped: the keys of its replications, and the answer."""
    folder = tmp_path_factory.mktemp("whole")
    done = chairlift("plan", longer(folder), "--out", str(folder), "--jobs", "1", "--json")
    return sorted(written_down(folder)), json.loads(done.out)


@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGKILL, "1"), (signal.SIGINT, "2")])
def test_a_plan_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, how: signal.Signals, jobs: str, whole: tuple[list[str], dict[str, Any]]
) -> None:
    plan, out = longer(tmp_path), tmp_path / "out"
    process = started("plan", plan, "--out", str(out), "--jobs", jobs)
    _, err = stopped(process, out, how)
    if how == signal.SIGINT:
        assert "interrupted: what was found is in" in err
    known = len(written_down(out))
    again = chairlift("plan", plan, "--out", str(out), "--jobs", "1", "--json")

    assert 5 <= known < len(whole[0])
    assert sorted(written_down(out)) == whole[0]  # nothing twice
    first, second = (
        {**answer, "assumptions": dict(answer["assumptions"])} for answer in (whole[1], json.loads(again.out))
    )
    assert "by an earlier run" in second["assumptions"]["simulated"]
    for answer in (first, second):
        del answer["assumptions"]["simulated"]
    assert first == second
    assert first["cheapest"][0]["winner"] is not None


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "llama-3.1-8b-fp8"])
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_shipped_plan_answers_for_a_mixture_of_experts_and_for_fp8(path: Path, model: str, tmp_path: Path) -> None:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys["base"]["model"] = model
    if model == "llama-3.1-8b-fp8":  # dense: no ranks, no groups of experts
        keys.get("axes", {}).pop("parallel", None)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")

    assert any(candidate.setup is not None for candidate in read_plan(tmp_path / "p.yaml").candidates)
    result = chairlift("plan", str(tmp_path / "p.yaml"), "--dry-run")
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    "key",
    [
        *("slo.ttft_ms", "slo", "seed", "workload.requests", "workload.mix.chat.requests", "workload.rate_per_s"),
        *("workload.time_scale", "workload.arrivals.poisson.rate_per_s"),
    ],
)
def test_what_a_plan_says_itself_is_refused_in_its_base(key: str, tmp_path: Path) -> None:
    value = {"slo.ttft_ms": 1, "slo": {"ttft_ms": 1}}.get(key, 1)
    plan = {**yaml.safe_load(PLAN), "axes": {"replicas": [1]}}
    for part in ({"axes": {key: [value]}}, {"set": {key: value}}, {"today": {key: value}}, {}):
        path = written(tmp_path, json.dumps({**plan, **part}))
        given = [] if part else ["--set", f"{key}={json.dumps(value)}"]
        result = chairlift("plan", path, "--dry-run", *given)
        assert result.status == 2, (part, result)
        assert ("own" in result.err and "says it" in result.err) or key == "seed", result.err


def test_the_command_says_how_weights_and_kv_are_quantised(tmp_path: Path) -> None:
    shape = {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8, "head_size": 64, "ffn": 2048, "vocab": 32000}
    plan = yaml.safe_load(PLAN)
    wide = {"name": "mine", "max_model_len": 8192, **shape}
    for model, flags in (
        (wide, []),
        ({**wide, "bytes_per_param": 1}, ["--quantization fp8"]),
        ({**wide, "kv_bytes_per_element": 1}, ["--kv-cache-dtype fp8"]),
        ({**wide, "quantization": "fp8"}, ["--quantization fp8"]),
        ("deepseek-v3", []),
    ):
        system = {"model": model, "gpu": "h200", "parallel": {"tensor": 8}, "policy": "vllm", "max_model_len": 4096}
        workload = plan["base"]["workload"]
        setup = prepare(Document({**system, "workload": {**workload, "requests": 9}}, {}, "test"), Path())
        line = serve_line(setup)
        told = [flag for flag in ("--quantization fp8", "--kv-cache-dtype fp8") if flag in line]
        assert told == flags
        assert "--quantization" not in line or "--quantization fp8" in flags


LOOPS = """\
base:
  model: llama-3.1-8b
  gpu: h100
  backend: h200-llama-3.1-8b-vllm-0.23
  max_model_len: 4096
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 300, output_tokens: 60}
slo: [{percentile: 90, ttft_ms: 900}]
rate_per_s: [2]
axes:
  policy: {named: {a: {name: vllm}, b: {name: vllm, async_scheduling: false}, own: mine.py, ahead: AHEAD}}
search: {requests: 200, most_requests: 200}
"""


def test_systems_of_a_plan_run_the_same_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm` beside a policy that plans no step ahead gets the times that it has without planning ahead."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(POLICY)
    Path("p.yaml").write_text(LOOPS.replace(", ahead: AHEAD", ""))
    result = chairlift("plan", "p.yaml", "--trust", "-j1")
    plan = read_plan(Path("p.yaml"), trust=True)
    with Journal(tmp_path / "two") as journal:
        runs = Simulations(journal, Local(1), tuple(plan.spec.slo))
        [a], [b] = (runs.of(each)(2.0, 200, 1) for each in plan.candidates[:2])

    assert result.status == 0, result.err
    assert a.figures == b.figures != {}
    assert "engine loop: synchronous" in result.out
    assert "engine loops differ" not in result.out
    assert [c.setup.loop for c in plan.candidates if c.setup] == ["synchronous"] * 3


def test_a_loop_that_is_said_is_kept_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(POLICY)
    Path("p.yaml").write_text(LOOPS.replace("AHEAD", "{name: vllm, async_scheduling: true}"))
    result = chairlift("plan", "p.yaml", "--trust", "-j1")

    assert result.status == 0, result.err
    assert "not all run the same engine loop (synchronous: a, b, own; asynchronous: ahead)" in " ".join(
        result.out.split()
    )


def test_systems_of_one_policy_keep_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(LOOPS.replace("b: {name: vllm, async_scheduling: false}, own: mine.py, ahead: AHEAD", ""))

    assert [c.setup.loop for c in read_plan(Path("p.yaml")).candidates if c.setup] == ["asynchronous"]
