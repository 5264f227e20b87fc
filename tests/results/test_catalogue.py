"""The catalogue of metrics: it names all that a run says of itself, and one row is all that a new metric takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.results.catalogue import FIELDS, LATENCIES, sign, title
from kit.command import SCENARIO, chairlift
from kit.pages import Page
from kit.places import IMPORTS, copied

COUNT = '    Metric("odd", "odd prompts", "", "more", "Completed requests with an odd number of prompt tokens."),\n'
DELAY = '    Metric("delay", "delay", "ms", "less", "Arrival → admission."),\n'
TWO = (
    SCENARIO + "compare: [{name: a}, {name: b, policy: orca}]\nclaims: [{says: x, published: 3, of: a, metric: odd}]\n"
)
SWEEP = "base: s.yaml\nseeds: 4\nset: {compare: [], claims: []}\naxes: {policy: [vllm, {name: static, batch: 1}]}\n"


def inserted(text: str, before: str, more: str) -> str:
    assert text.count(before) == 1, before
    return text.replace(before, more + before)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has a count and a latency more."""
    folder = tmp_path_factory.mktemp("extended")
    copied(folder)
    catalogue, metrics = (folder / f"sim/results/{name}.py" for name in ("catalogue", "metrics"))
    rows = inserted(catalogue.read_text(), ")\nREPLICAS = (", COUNT)
    catalogue.write_text(inserted(rows, ")\nSTATISTICS = ", DELAY))
    code = inserted(
        metrics.read_text(), '        "output_throughput": ', '        "odd": int((times.prompts % 2).sum()),\n'
    )
    delay = '    "delay": lambda m: (m.admitted - m.arrival) / PS_PER_MS,\n'
    metrics.write_text(inserted(code, '    "e2el": lambda m', delay))
    return folder


def of_extended(folder: Path, *arguments: str) -> str:
    """What ``chairlift ARGUMENTS`` of the copy prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder / IMPORTS.name), "COLUMNS": "200"}
    command = [sys.executable, "-m", "chairlift", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_metric_is_its_computation_and_one_row(extended: Path) -> None:
    (extended / "s.yaml").write_text(SCENARIO)
    told = of_extended(extended, "run", "s.yaml", "--report", "--out", "out")
    summary = json.loads((extended / "out/summary.json").read_text())
    page = Page(extended / "out/report.html")
    numbers = {key: (attributes["value"], words) for _, key, attributes, words in page.data}

    assert 0 < summary["odd"] < 30
    assert f"odd prompts {summary['odd']}" in " ".join(told.split())
    assert numbers["odd"] == (str(summary["odd"]), str(summary["odd"]))
    assert "delay p50 / p90 / p99" in told
    assert float(numbers["p99_delay_ms"][0]) == summary["p99_delay_ms"] > 0


def test_a_new_metric_can_be_claimed_raced_for_and_compared(extended: Path) -> None:
    (extended / "s.yaml").write_text(TWO)
    of_extended(extended, "run", "s.yaml", "--quiet", "--out", "claimed")
    comparison = json.loads((extended / "claimed/comparison.json").read_text())
    [claim] = json.loads((extended / "claimed/claims.json").read_text())
    (extended / "w.yaml").write_text(SWEEP)
    raced = of_extended(extended, "sweep", "w.yaml", "-j1", "--out", "w", "--race", "p99_delay_ms")
    compared = json.loads(
        of_extended(extended, "compare", "w", "--metric", "odd", "--metric", "p99_delay_ms", "--json")
    )

    assert claim["simulated"] == comparison[0]["odd"]
    assert "race: 1 of 2 points out" in raced
    assert {each["metric"]: each["verdict"] for each in compared["differences"]} == {
        "odd": "same",
        "p99_delay_ms": "worse",
    }


PLAN = """\
base:
  model: opt-13b
  backend: roofline
  policy: vllm
  workload: {arrivals: {poisson: {rate_per_s: 1}}, prompt_tokens: 100, output_tokens: 20}
slo: [{percentile: 90, delay_ms: 800}]
rate_per_s: 8
axes: {gpu: [a100-40gb]}
search: {requests: 300, most_requests: 600, precision: 0.2}
"""


def test_a_new_latency_can_be_promised(extended: Path) -> None:
    (extended / "p.yaml").write_text(PLAN)
    of_extended(extended, "plan", "p.yaml", "-j1", "--quiet", "--out", "planned")
    told = json.loads((extended / "planned/plan.json").read_text())
    [system] = told["cheapest"][0]["systems"]

    assert told["slo"] == ["p90 delay ≤ 800 ms"]
    assert system["outcome"] == "kept"
    assert 0 < system["verdict"]["figures"]["p90_delay_ms"]["mean"] < 800


def test_every_number_of_a_summary_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO.replace("requests: 30", "requests: 30\n  tenants: {a: 1, b: 1}"))
    assert chairlift("run", "s.yaml", "--out", "out", "--quiet").status == 0
    summary = json.loads(Path("out/summary.json").read_text())

    assert summary.keys() - FIELDS.keys() == {"assumptions"}


def test_a_name_stands_once() -> None:
    labels = [metric.label for metric in FIELDS.values()]

    assert len(set(labels)) == len(labels) == len(FIELDS)
    assert not FIELDS.keys() & {metric.name for metric in LATENCIES}


def test_which_way_is_better() -> None:
    assert (sign("request_goodput"), sign("p99_ttft_ms"), sign("slo_missed")) == (1, -1, -1)
    with pytest.raises(BadInput, match="neither more nor less of it is better"):
        sign("mean_running")
    with pytest.raises(BadInput, match="did you mean 'p99_ttft_ms'"):
        sign("p99_tft_ms")


def test_plots_are_headed_by_label_and_unit() -> None:
    assert (title("p99_ttft_ms"), title("kv_utilization"), title("own")) == ("TTFT p99, ms", "KV used", "own")
