"""An outcome in a notebook: its rows as tables, its figures; examples in docstrings are run."""

from __future__ import annotations

import doctest
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plotly.graph_objects import Figure

from chairlift import Outcome, load, plot_latency, plot_memory, plot_over_time, plot_throughput, plot_work, simulate
from chairlift.sim.results.reader import read
from house.test_readme import named
from kit.command import SCENARIO, chairlift

EXAMPLES = ("results.outcome", "report.plots", "simulate", "scenario.load")  # modules of sim with examples
# One request alone: a prompt of 100 tokens, then four more steps of one token.
ALONE = SCENARIO.replace("requests: 30", "requests: 1").replace("{uniform: {low: 10, high: 300}}", "100")
ALONE = ALONE.replace("{uniform: {low: 1, high: 50}}", "5")
TWO = SCENARIO + "slo: {ttft_ms: 900}\ncompare: [{name: a}, {name: b, policy: orca}]\n"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(named("yaml")["my.yaml"])
    Path("two.yaml").write_text(TWO)


def outcomes() -> list[Outcome]:
    return [simulate(setup, journal=True) for setup in load("two.yaml").setups]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings_hold(module: str) -> None:
    if module == "results.outcome":
        pytest.importorskip("pandas", reason="pandas is not installed (the notebook extra has it)")
    found = doctest.testmod(import_module(f"chairlift.sim.{module}"))

    assert found.attempted > 0
    assert found.failed == 0


def test_the_rows_are_those_of_the_files() -> None:
    made = outcomes()
    assert chairlift("run", "two.yaml", "--events", "-q").status == 0

    for rows in ("requests", "steps", "events"):
        file = pq.read_table(Path("runs/two") / f"{rows}.parquet")
        for outcome in made:
            name = outcome.setup.variant
            theirs = file.filter(pa.compute.equal(file["variant"], name)).drop_columns(["case", "variant"])
            ours = outcome.to_arrow(rows)
            assert ours.column_names == theirs.column_names
            assert ours.to_pylist() == theirs.to_pylist()


def test_a_request_alone_by_hand() -> None:
    Path("alone.yaml").write_text(ALONE)
    outcome = simulate(load("alone.yaml").setups[0])
    [row] = outcome.to_arrow().to_pylist()

    assert (row["prompt_tokens"], row["output_tokens"], row["emitted_tokens"], row["status"]) == (100, 5, 5, "finished")
    assert row["ttft_ms"] == (row["first_token_ps"] - row["arrival_ps"]) / 1e9
    assert row["tpot_ms"] == pytest.approx((row["finished_ps"] - row["first_token_ps"]) / 4e9, rel=1e-12)
    assert sum(row["steps"] for row in outcome.to_arrow("steps").to_pylist()) == 5
    assert repr(outcome) == "<Outcome: 1 requests completed>"


def test_a_data_frame_has_the_same_numbers() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed (the notebook extra has it)")
    outcome = outcomes()[0]
    frame = outcome.to_pandas()

    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 30
    assert frame.e2el_ms.quantile(0.99) == pytest.approx(outcome.summary["p99_e2el_ms"], rel=1e-9)
    assert len(outcome.to_pandas("events")) == len(outcome.to_arrow("events"))


def test_without_pandas_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ImportError, match=r"to_pandas needs pandas: pip install 'chairlift\[notebook\]'"):
        outcomes()[0].to_pandas()


def test_what_cannot_be_had_is_said() -> None:
    outcome = simulate(load("two.yaml").setups[0])

    with pytest.raises(ValueError, match="no such rows: 'request'; there are requests, steps, events"):
        outcome.to_arrow("request")
    with pytest.raises(ValueError, match="kept no events: simulate"):
        outcome.to_arrow("events")
    with pytest.raises(ValueError, match="no such latency of a request: 'itl'; there are ttft, tpot, e2el"):
        plot_latency(outcome, metric="itl")
    with pytest.raises(ValueError, match="no run to draw"):
        plot_memory()


def test_figures_draw_what_the_tables_say() -> None:
    a, b = outcomes()
    latency = plot_latency(a, b, metric="ttft")
    ttft = np.sort(a.to_arrow()["ttft_ms"].to_numpy())

    assert [curve.name for curve in latency.data] == ["a", "b"]
    assert list(latency.data[0].x[1:]) == pytest.approx(ttft.tolist(), rel=1e-4)
    assert list(latency.data[0].y[1:]) == pytest.approx([(i + 1) / 30 for i in range(30)], rel=1e-4)
    assert [shape.x0 for shape in latency.layout.shapes] == [900]  # the SLO

    assert list(plot_throughput(a, b).data[0].x) == [each.summary["total_token_throughput"] for each in (a, b)]
    memory = {bar.name: list(bar.x) for bar in plot_memory(a, b).data}
    assert memory["used"] == [a.summary["kv_utilization"], b.summary["kv_utilization"]]
    for figure in (plot_memory(a, b), plot_work(a, b)):
        assert [sum(bar.x[i] for bar in figure.data) for i in range(2)] == pytest.approx([1, 1], abs=1e-9)
    over_time = {curve.name: curve for curve in plot_over_time(a).data}
    seconds = np.diff(over_time["output tokens/s"].x)[0]
    assert np.sum(over_time["output tokens/s"].y) * seconds == pytest.approx(a.summary["total_output_tokens"], rel=1e-3)


def test_runs_of_a_folder_are_drawn_alike() -> None:
    made = outcomes()
    assert chairlift("run", "two.yaml", "-q").status == 0
    runs = read(Path("runs/two")).runs

    for plot in (plot_latency, plot_throughput, plot_memory, plot_work):
        assert plot(*runs) == plot(*made)
    assert plot_over_time(runs[0]) == plot_over_time(made[0])


@pytest.mark.parametrize("dark", [False, True])
def test_figures_have_colours_of_their_own(dark: bool) -> None:
    a, b = outcomes()
    paper = "#1c2026" if dark else "#ffffff"
    for figure in (
        *(plot(a, b, dark=dark) for plot in (plot_latency, plot_throughput, plot_memory, plot_work)),
        plot_over_time(a, dark=dark),
    ):
        assert isinstance(figure, Figure)
        assert "var(" not in figure.to_json()
        assert figure.layout.paper_bgcolor == paper


def test_runs_of_one_name_are_told_apart() -> None:
    [setup] = load("two.yaml", policies=["vllm"]).setups
    bars = plot_throughput(*[simulate(setup) for _ in range(3)]).data[0]

    assert list(bars.y) == ["Vllm", "Vllm (2)", "Vllm (3)"]
