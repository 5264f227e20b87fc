"""``chairlift compare``: held to SciPy's paired t test and to hand-made results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep import plots
from chairlift.sim.sweep.compare import Comparison
from chairlift.sim.sweep.runs import Row, Run
from chairlift.sim.sweep.statistics import interval, student, surely_below, undominated
from chairlift.sim.sweep.table import read, write
from kit.command import chairlift
from kit.pages import Page
from kit.sweeping import written

SEEDS = 6


def made(folder: Path, figures: dict[tuple[str, float], dict[str, list[float | None]]]) -> Path:
    """Results with axes policy and workload.rate_per_s; ``figures``: metric → a number a seed."""
    rows = []
    for (policy, rate), metrics in figures.items():
        for seed in range(max(map(len, metrics.values()))):
            run = Run(Document({}, {}, ""), folder, {"policy": policy, "workload.rate_per_s": rate}, seed)
            rows.append((run, Row("k", "", {m: values[seed] for m, values in metrics.items()}, 0.1, 0.1)))
    write(folder / "results.parquet", "hand-made", ["policy", "workload.rate_per_s"], rows)
    return folder / "results.parquet"


def noisy() -> dict[tuple[str, float], dict[str, list[float | None]]]:
    rng = np.random.default_rng(4)
    figures: dict[tuple[str, float], dict[str, list[float | None]]] = {}
    for rate in (1.0, 2.0):
        common = rng.normal(0, 100, SEEDS)
        for i, policy in enumerate(("a", "b", "c")):
            own = 500 * rate + common + 5 * i + rng.normal(0, 3, SEEDS)
            figures[policy, rate] = {"p99_ttft_ms": own.tolist(), "request_goodput": (20 + i + own / 90).tolist()}
    return figures


@pytest.mark.parametrize("level", [0.5, 0.9, 0.975, 0.9875, 0.9999, 1 - 1e-9])
def test_student_is_the_quantile_of_its_distribution(level: float) -> None:
    assert [student(level, n) for n in (1, 2, 3, 10, 200)] == [stats.t.ppf(level, n) for n in (1, 2, 3, 10, 200)]
    assert student(0.975, 4) == pytest.approx(2.776, abs=5e-4)  # printed tables


def test_differences_are_scipys_paired_t_intervals(tmp_path: Path) -> None:
    figures = noisy()
    found = Comparison(read(made(tmp_path, figures)), confidence=0.9).differences()

    assert len(found) == 2 * 2 * 2
    for d in found:
        [rate], [policy] = d.setting, d.system
        ours = np.array(figures[policy, rate][d.metric], float)
        base = np.array(figures["a", rate][d.metric], float)
        truth = stats.ttest_rel(ours, base).confidence_interval(0.9)
        assert (d.gain.low, d.gain.high) == pytest.approx((truth.low, truth.high))
        assert d.gain.mean == pytest.approx((ours - base).mean())
        assert d.percent().mean == pytest.approx(100 * (ours - base).mean() / base.mean())


def test_pairing_shows_what_the_noise_of_the_seeds_hides(tmp_path: Path) -> None:
    figures = noisy()
    c = Comparison(read(made(tmp_path, figures)), metrics=["p99_ttft_ms"])
    verdicts = {(d.setting[0], d.system[0]): d.verdict for d in c.differences()}

    assert verdicts[1.0, "c"] == verdicts[2.0, "c"] == "worse"
    apart = stats.ttest_ind(figures["a", 1.0]["p99_ttft_ms"], figures["c", 1.0]["p99_ttft_ms"])
    assert apart.pvalue > 0.5


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(3, 2, 5).tolist(), 0.9) for _ in range(4000)]

    assert np.mean([i.low <= 3 <= i.high for i in found]) == pytest.approx(0.9, abs=4 * (0.09 / 4000) ** 0.5)


def test_surely_below_is_scipys_one_sided_test() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        a, b = rng.normal(0, 1, 6), rng.normal(0.5, 1, 6)
        p = stats.ttest_rel(a, b, alternative="less").pvalue
        assert surely_below(a.tolist(), b.tolist(), 0.05) == (p < 0.05)
    assert surely_below([1, 1], [2, 2], 0.01)
    assert not surely_below([1], [2], 0.5)


HAND: dict[tuple[str, float], dict[str, list[float | None]]] = {
    ("a", 1): {"p99_ttft_ms": [10, 20], "request_goodput": [5, 5], "mean_tpot_ms": [1, None]},
    ("b", 1): {"p99_ttft_ms": [12, 22], "request_goodput": [7, 7], "mean_tpot_ms": [2, 3]},
    ("c", 1): {"p99_ttft_ms": [30, 40], "request_goodput": [6, 6], "mean_tpot_ms": [2, 2]},
    ("a", 2): {"p99_ttft_ms": [10, 20], "request_goodput": [5, 5], "mean_tpot_ms": [None, None]},
    ("b", 2): {"p99_ttft_ms": [10, 20], "request_goodput": [5, 5], "mean_tpot_ms": [5, 6]},
    ("c", 2): {"p99_ttft_ms": [9, 19], "request_goodput": [5, 5], "mean_tpot_ms": [7, 8]},
}


def test_ranks_by_hand(tmp_path: Path) -> None:
    ranks = Comparison(read(made(tmp_path, HAND)), metrics=["p99_ttft_ms", "request_goodput", "mean_tpot_ms"]).ranks()

    assert ranks[("a",)] == {"p99_ttft_ms": (1 + 2.5) / 2, "request_goodput": (3 + 2) / 2, "mean_tpot_ms": (1 + 3) / 2}
    assert ranks[("b",)] == {"p99_ttft_ms": (2 + 2.5) / 2, "request_goodput": (1 + 2) / 2, "mean_tpot_ms": 3.5 / 2}
    assert ranks[("c",)]["p99_ttft_ms"] == (3 + 1) / 2


def test_the_front_of_four_points_by_hand() -> None:
    assert undominated([(1, 2), (2, 1), (2, 1), (1, 1)]) == [True, True, True, False]
    assert undominated([]) == []


def test_fronts_by_hand(tmp_path: Path) -> None:
    c = Comparison(read(made(tmp_path, HAND)))

    assert c.fronts(["p99_ttft_ms", "request_goodput"]) == {(1,): [("a",), ("b",)], (2,): [("c",)]}


def test_seeds_that_only_one_has_do_not_count(tmp_path: Path) -> None:
    figures = {("a", 1.0): {"p99_ttft_ms": [10.0, 20.0, 99.0]}, ("b", 1.0): {"p99_ttft_ms": [11.0, 22.0]}}
    [d] = Comparison(read(made(tmp_path, figures))).differences()  # type: ignore[arg-type]

    assert (d.gain.n, d.gain.mean, d.base.mean) == (2, 1.5, 15)


def test_another_axis_and_another_baseline(tmp_path: Path) -> None:
    c = Comparison(read(made(tmp_path, HAND)), ["workload.rate_per_s"], ["p99_ttft_ms"], "2")

    assert c.aside == ["policy"]
    assert {(d.setting, d.gain.mean) for d in c.differences()} == {(("a",), 0), (("b",), 2), (("c",), 21)}
    assert len(Comparison(c.results, ["policy", "workload.rate_per_s"]).systems) == 6


def test_tables_and_json_and_plots_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(made(tmp_path, noisy()))
    options = ["--pareto", "p99_ttft_ms", "--pareto", "request_goodput"]
    shown = chairlift("compare", file, *options, "--html", "plots/c.html")
    told: dict[str, Any] = json.loads(chairlift("compare", file, *options, "--json").out)
    page = Page(Path("plots/c.html"))
    figures = json.loads(page.unpacked("data"))["figures"]

    assert shown.status == 0, shown.err
    for d in told["differences"]:
        assert f"{d['percent']:+.1f} %" in shown.out
        assert (d["verdict"] == "same") == (d["low"] <= 0 <= d["high"])
    assert [p["front"] for p in told["pareto"]] == [[{"policy": p} for p in "abc"]] * 2
    assert len(figures) == 2 * 2 + 1
    assert page.links == []  # nothing from the network
    assert "<h3>TTFT p99: difference from a, %</h3>" in Path("plots/c.html").read_text()
    drawn = {
        (trace["name"], x): y for trace in figures["f1"]["data"] for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert figures["f1"]["layout"]["xaxis"]["title"]["text"] == "workload.rate_per_s, 1/s"
    ttft = [d for d in told["differences"] if d["metric"] == "p99_ttft_ms"]
    assert drawn == {(d["system"]["policy"], d["setting"]["workload.rate_per_s"]): d["percent"] for d in ttft}


def test_a_sweep_is_found_by_its_name_and_its_race_is_fair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(
        tmp_path,
        "base: base.yaml\nseeds: 12\nset: {workload.arrivals: {burst: {}}}\n"
        "axes: {policy: [vllm, {name: static, batch: 1}]}\n",
    )
    race = chairlift("sweep", "sweep.yaml", "-j1", "--race", "mean_e2el_ms")
    result = chairlift("compare", "sweep", "--metric", "mean_e2el_ms", "--json")
    [difference] = json.loads(result.out)["differences"]

    assert "1 of 2 points out" in race.out, race.err
    assert difference["verdict"] == "worse"
    assert 3 <= difference["seeds"] < 12


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--over", "polcy"], "no such axis – did you mean 'policy'"),
        (["--metric", "p99_ttf_ms"], "no such metric – did you mean 'p99_ttft_ms'"),
        (["--baseline", "d"], "no such system"),
        (["--pareto", "p99_ttft_ms"], "needs at least two"),
        (["--pareto", "p99_ttft_ms", "--pareto", "x"], "no such metric"),
        (["--confidence", "1"], "must be from 0.5 to below 1"),
        (["--x", "policy"], "must not be given without --html"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: list[str], rule: str) -> None:
    result = chairlift("compare", str(made(tmp_path, HAND)), *options)

    assert result.status == 2
    assert rule in result.err


def test_there_is_no_front_of_a_metric_that_no_run_has(tmp_path: Path) -> None:
    """Without an slo there is no goodput, and a plot of it would have axes of its own invention."""
    figures = {(policy, 1.0): {"p99_ttft_ms": [5.0, 6.0], "request_goodput": [None, None]} for policy in "ab"}
    asked = ("--pareto", "p99_ttft_ms", "--pareto", "request_goodput", "--html", str(tmp_path / "c.html"))
    result = chairlift("compare", str(made(tmp_path, figures)), *asked)

    assert result.status == 2
    assert "has no value in any run" in result.err
    assert not (tmp_path / "c.html").exists()


def test_what_is_no_result_of_a_sweep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")

    assert "cannot be read: Could not open Parquet" in chairlift("compare", str(tmp_path / "x.parquet")).err
    assert "run chairlift sweep first" in chairlift("compare", str(tmp_path)).err
    one = {key: value for key, value in HAND.items() if key[0] == "a"}
    with pytest.raises(BadInput, match="nothing to compare"):
        Comparison(read(made(tmp_path, one)))


@pytest.mark.parametrize(
    ("metric", "values", "scale"),
    [
        ("p99_ttft_ms", [100, 200, 6000], "log"),  # more than 50 times the least
        ("p99_ttft_ms", [100, 200, 4000], None),
        ("p99_ttft_ms", [0, 200, 60000], None),  # 0 has no place there
        ("p99_ttft_ms", [100, None, 6000], "log"),
        ("request_goodput", [0.1, 20], None),  # what is good is large, and seen
    ],
)
def test_one_bad_latency_does_not_press_the_good_ones_flat(
    metric: str, values: list[float | None], scale: str | None
) -> None:
    made = plots._wide({"data": [{"x": [1, 2, 3], "y": values}], "layout": {"yaxis": {}}}, "y", metric)

    assert made["layout"]["yaxis"].get("type") == scale
