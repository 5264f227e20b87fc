"""``chairlift report``: what stands in the page, against ``summary.json`` and the tables it was made from."""

from __future__ import annotations

import io
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from chairlift.sim.cli import run as cli
from chairlift.sim.cli import terminal as progress
from chairlift.sim.report import figures
from chairlift.sim.report import slot_data as slotview
from chairlift.sim.report.html import swatch
from chairlift.sim.report.slots import GLYPHS, seat
from chairlift.sim.report.sparkline import inside, sparkline
from chairlift.sim.report.timeline import REQUEST_COLUMNS, cdf, timeline, work
from chairlift.sim.results import reader as results
from chairlift.sim.results.catalogue import FIELDS, LATENCIES, text
from chairlift.sim.results.catalogue import shown as is_shown
from chairlift.sim.scenario.load import load
from kit.command import SCENARIO, chairlift, replaced
from kit.pages import Page

TWO = SCENARIO + (
    "slo: {ttft_ms: 900, tpot_ms: 80}\nbaseline: [b]\nwaterfall: [{variant: b}, {variant: a, because: paging}]\n"
    "compare:\n  - {name: a, note: <i>odd</i> & said}\n  - {name: b, policy: orca, published: 1}\n"
    "cases:\n  - {name: few, set: {workload.requests: 10}}\n  - {name: many}\n"
)
LIMIT = 6_000_000  # bytes of a page


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(scenario: str, *arguments: str, ends: tuple[int, str] = (0, "")) -> Page:
    Path("small.yaml").write_text(scenario)
    result = chairlift("run", "small.yaml", "--out", "out", "--report", *arguments)
    assert (result.status, result.err) == ends
    assert "out/report.html (" in result.out
    return Page(Path("out/report.html"))


def number(words: str) -> float:
    """What a formatted number says, in the summary's unit."""
    digits = float(re.sub(r"[^\d.]", "", words))
    return digits / 100 if "%" in words else digits


def check_numbers(found: list[tuple[str, dict[str, str], str]], summary: dict[str, Any]) -> None:
    for key, attributes, words in found:
        value = summary[key]
        if value is None:
            assert (attributes["value"], words) == ("", "–")
            continue
        assert float(attributes["value"]) == value, key
        shown = number(words) * (1000 if key.endswith("_ms") and words.endswith(" s") else 1)
        assert shown == pytest.approx(value, rel=0.006, abs=0.006), (key, words)


def test_all_numbers_on_the_page_are_those_of_the_summary() -> None:
    page = made(SCENARIO)
    summary = json.loads(Path("out/summary.json").read_text())
    found = [(key, attributes, words) for _, key, attributes, words in page.data if key]

    keys = {key for key, _, _ in found}
    always = {name for name, metric in FIELDS.items() if is_shown(metric, summary)}
    assert always <= keys <= set(summary)
    check_numbers(found, summary)


def test_a_comparison_shows_every_run_with_its_own_numbers() -> None:
    page = made(TWO)
    comparison = json.loads(Path("out/comparison.json").read_text())

    assert [each["variant"] for each in comparison] == ["a", "b", "a", "b"]
    for i, summary in enumerate(comparison):
        mine = [(key, attributes, words) for run, key, attributes, words in page.data if run == str(i) and key]
        assert len(mine) > 35
        check_numbers(mine, summary)
    html = Path("out/report.html").read_text()
    assert "&lt;i&gt;odd&lt;/i&gt; &amp; said" in html
    assert "<i>odd" not in html


def test_every_field_that_is_shown_has_a_definition() -> None:
    assert all(metric.meaning.endswith(".") for metric in (*FIELDS.values(), *LATENCIES))


def test_the_page_needs_nothing_from_outside() -> None:
    page = made(TWO)

    assert page.links == []
    code = page.scripts["code"] + Path("out/report.html").read_text().partition("</style>")[0]
    assert not re.search(r"https?://|@import|url\(", code)
    assert Path("out/report.html").stat().st_size < LIMIT
    assert "plotly.js v" in page.unpacked("plotly")[:200]


def test_all_figures_are_valid_plotly_figures() -> None:
    import plotly.graph_objects as go

    figures = json.loads(made(TWO).unpacked("data"))["figures"]

    assert len(figures) > 15
    for figure in figures.values():
        plain = json.loads(re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure)))
        go.Figure(plain)  # raises where a property or a value is none of plotly's
        assert figure["data"]
        assert all(len(trace["x"]) > 0 for trace in figure["data"])


def test_distributions_agree_with_the_summary_and_slo_lines_stand_where_they_should() -> None:
    figures = json.loads(made(SCENARIO + "slo: {ttft_ms: 900, tpot_ms: 80}\n").unpacked("data"))["figures"]
    summary = json.loads(Path("out/summary.json").read_text())
    named = {f["layout"]["xaxis"]["title"]["text"]: f for f in figures.values() if "xaxis" in f["layout"]}

    for key, title, limit in (("ttft", "TTFT, ms", 900), ("tpot", "TPOT, ms", 80), ("e2el", "E2E, ms", None)):
        curve = named[title]["data"][0]
        ranked = np.interp(0.5, curve["y"], curve["x"])
        assert ranked == pytest.approx(summary[f"median_{key}_ms"], rel=0.1)
        assert [shape["x0"] for shape in named[title]["layout"]["shapes"]] == ([] if limit is None else [limit])
    good = sum(row["ttft_ms"] <= 900 for row in pq.read_table("out/requests.parquet").to_pylist()) / 30
    assert f"SLO 900 ms: {good:.1%}" in named["TTFT, ms"]["layout"]["annotations"][0]["text"]


def test_an_slo_line_is_said_in_the_unit_of_its_axis() -> None:
    for ms, said, at, title in (
        (900.0, "SLO 1500 ms: 100.0%", 1500, "TTFT, ms"),
        (90_000.0, "SLO 1.5 s: 0.0%", 1.5, "TTFT, s"),
    ):
        layout = figures.latency("ttft", [("a", np.array([ms]))], 1500)["layout"]
        assert (layout["annotations"][0]["text"], layout["shapes"][0]["x0"]) == (said, at)
        assert layout["xaxis"]["title"]["text"] == title


def test_a_legend_tells_apart_systems_that_share_a_colour() -> None:
    """A page has eight colours; the ninth system has the first one's, and dashes."""
    marks = [swatch(i) for i in range(32)]
    assert len(set(marks)) == 32
    assert marks[0] == "var(--v0)"
    assert marks[8].startswith("repeating-linear-gradient(90deg, var(--v0) ")
    systems = "".join(f"  - {{name: s{i}, policy: {{name: vllm, max_num_seqs: {i + 1}}}}}\n" for i in range(9))
    made(replaced("policy: {name: vllm}\n", "") + "compare:\n" + systems)
    page = Path("out/report.html").read_text()
    legend = page[page.index("<h2>Latency</h2>") :]
    assert f'style="background:{marks[0]}"></span>s0</li>' in legend
    assert f'style="background:{marks[8]}"></span>s8</li>' in legend


def test_areas_under_the_curves_are_the_totals() -> None:
    small = replaced("max_model_len: 2048", "max_model_len: 448", replaced("tokens: 4000", "tokens: 450"))
    made(small + "replicas: 2\n", "--set", "workload.arrivals={burst: {}}")
    run = results.read(Path("out")).runs[0]
    requests = run.requests(*REQUEST_COLUMNS)
    line = timeline(run, requests)
    width = np.diff(line.edges)
    summary = run.summary
    steps = pq.read_table("out/steps.parquet").to_pylist()
    busy = sum(each.busy_s for each in line.totals)

    assert busy == pytest.approx(summary["busy_s"])
    assert (line.curves["prompt"] * width).sum() == pytest.approx(sum(row["prefill_tokens"] for row in steps))
    assert (line.curves["running"] * width).sum() / busy == pytest.approx(summary["mean_running"])
    capacity = sum(r.kv_tokens for r in run.replicas)
    share = (line.curves["kv"] * width).sum() * capacity / sum(e.busy_s * e.replica.kv_tokens for e in line.totals)
    assert share == pytest.approx(summary["kv_utilization"])
    assert sum(each.steps for each in line.totals) == summary["steps"]
    assert sum(each.preemptions for each in line.totals) == summary["preemptions"] > 0
    again = (
        sum(requests["emitted_tokens"])
        - (requests["first_token_ps"] >= 0).sum()
        - sum(e.computed_decode for e in line.totals)
    )  # tokens that came with a prompt computed again
    emitted = (line.curves["output"] * width).sum() + again
    assert emitted == pytest.approx(summary["total_output_tokens"])
    tokens = work(run, requests, line.totals)
    assert tokens["prompts"] == summary["total_input_tokens"]
    assert tokens["again"] > 0
    assert tokens["prompts"] + tokens["again"] == sum(row["prefill_tokens"] for row in steps)


@pytest.mark.parametrize("kept", [0, 1])
def test_tokens_of_drafts_are_told_by_what_becomes_of_them(kept: int) -> None:
    """Two, one after the other, each with 10 tokens of prompt and 9 of answer, of which one comes with the prompt.

    With 3 drafts that are all kept the other 8 take 2 steps; with none kept 8, each beside 3 rejected. Beside a run
    without drafts, which has no such tokens.
    """
    scenario = f"""
        model: llama-3.1-8b
        gpu: h200
        policy: {{name: vllm, async_scheduling: false}}
        workload: {{requests: 2, clients: {{concurrency: 1}}, prompt_tokens: 10, output_tokens: 9}}
        compare:
          - {{name: none}}
          - {{name: drafted, speculate: {{method: eagle3, tokens: 3, acceptance: {{rates: [{kept}, {kept}, {kept}]}}}}}}
    """
    made(textwrap.dedent(scenario))
    plain, drafted = results.read(Path("out")).runs
    told = []
    for run in (plain, drafted):
        requests = run.requests(*REQUEST_COLUMNS)
        line = timeline(run, requests)
        told.append(work(run, requests, line.totals))
        assert (line.curves["output"] * np.diff(line.edges)).sum() == pytest.approx(18)

    same = {"prompts": 20, "again": 0, "answers": 16, "padding": 0}
    assert told == [{**same, "rejected": 0}, {**same, "rejected": 0 if kept else 2 * 8 * 3}]
    bars = [bar["name"] for bar in figures.work(["none", "drafted"], told)["data"]]
    assert ("drafts rejected" in bars) == (not kept)


def test_no_curve_is_ever_below_nothing() -> None:
    made(replaced("rate_per_s: 2", "rate_per_s: 20").replace("requests: 30", "requests: 200"))
    run = results.read(Path("out")).runs[0]
    line = timeline(run, run.requests(*REQUEST_COLUMNS))

    assert {name: float(curve.min()) for name, curve in line.curves.items() if curve.min() < 0} == {}


def test_waiting_counts_those_who_wait_while_the_replica_idles() -> None:
    # two requests a second apart, and a batch of two: the first waits alone for a second on an idle replica
    text = "arrivals: {constant: {rate_per_s: 1}}"
    made(
        replaced("arrivals: {poisson: {rate_per_s: 2}}", text)
        .replace("requests: 30", "requests: 2")
        .replace("tokens: 4000", "tokens: 8000")
        .replace("{name: vllm}", "{name: static, batch: 2}")
    )
    run = results.read(Path("out")).runs[0]
    requests = run.requests(*REQUEST_COLUMNS)
    line = timeline(run, requests)
    waited = (requests["admitted_ps"] - requests["arrival_ps"]).sum() / 1e12

    assert waited == pytest.approx(1)
    assert (line.curves["waiting"] * np.diff(line.edges)).sum() == pytest.approx(waited)


def test_replicas_and_tenants_have_their_rows() -> None:
    page = made(SCENARIO.replace("requests: 30", "requests: 60\n  tenants: {big: 3, <small>: 1}") + "replicas: 3\n")
    html = Path("out/report.html").read_text()
    counts = [int(attributes["value"]) for _, key, attributes, _ in page.data if not key]

    assert len(counts) == 3
    assert sum(counts) == json.loads(Path("out/summary.json").read_text())["completed"] == 60
    tenants = pq.read_table("out/requests.parquet").to_pylist()
    for name, shown in (("big", "big"), ("<small>", "&lt;small&gt;")):
        index = ["big", "<small>"].index(name)
        mine = sum(row["tenant"] == index for row in tenants)
        assert f"<th>{shown}</th><td>{mine}</td><td>{mine}</td>" in html


def test_a_run_without_a_journal_says_what_to_do_for_its_slots() -> None:
    page = made(SCENARIO, "--no-events")

    assert not Path("out/events.parquet").exists()
    assert json.loads(page.unpacked("data"))["slots"] == {}
    assert "Run it again with --events" in Path("out/report.html").read_text()


def test_a_later_run_without_a_journal_leaves_none_of_an_earlier_one() -> None:
    made(SCENARIO)
    assert chairlift("run", "small.yaml", "--out", "out", "--quiet", "--no-events").status == 0

    assert sorted(p.name for p in Path("out").iterdir()) == [
        *("requests.parquet", "scenario.yaml", "steps.parquet", "study.json", "summary.json")
    ]
    assert chairlift("report", "out").status == 0


def test_large_runs_keep_no_journal_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chairlift.sim.cli.run.FEW", 29)
    Path("small.yaml").write_text(SCENARIO)
    for arguments, kept in (([], False), (["--events"], True), (["--report"], True)):
        assert chairlift("run", "small.yaml", "--out", "out", "--quiet", *arguments).status == 0
        assert Path("out/events.parquet").exists() == kept


def test_quiet_and_json_print_nothing_of_the_report() -> None:
    Path("small.yaml").write_text(SCENARIO)
    assert chairlift("run", "small.yaml", "--out", "out", "--report", "--quiet").out == ""
    result = chairlift("run", "small.yaml", "--out", "out", "--report", "--json")

    assert json.loads(result.out)["completed"] == 30
    assert Path("out/report.html").exists()


def replayed(diagram: dict[str, Any]) -> list[str]:
    """The grid of what a page is given, worked out apart from the page's own code."""
    starts = np.cumsum(diagram["stay"]["begin"]).tolist()
    chunks = set(zip(np.cumsum(diagram["chunk"]["stay"]).tolist(), diagram["chunk"]["row"], strict=True))
    lines = [["."] * sum(diagram["steps"]) for _ in range(diagram["slots"])]
    first = np.concatenate(([0], np.cumsum(diagram["steps"]))).tolist()
    for i, (slot, begin, length) in enumerate(
        zip(diagram["stay"]["slot"], starts, diagram["stay"]["length"], strict=True)
    ):
        for row in range(begin, begin + length):
            glyph = "~"
            if diagram["stay"]["done"][i] <= row:
                glyph = "#"
            elif (i, row) in chunks:
                glyph = "P"
            elif row >= diagram["stay"]["ready"][i] and diagram["decoding"][row]:
                glyph = "D"
            lines[slot][first[row] : first[row + 1]] = glyph * diagram["steps"][row]
    return ["".join(line) for line in lines]


@pytest.mark.parametrize("policy", ["static", "vllm", "tgi"])
def test_the_page_is_given_the_slots_as_they_were(policy: str) -> None:
    diagram = json.loads(made(SCENARIO, "--policy", policy).unpacked("data"))["slots"]["0"][0]
    run = results.read(Path("out")).runs[0]
    steps = next(run.steps("steps", "decodes"))

    assert replayed(diagram) == seat(next(run.events()), steps).grid()


def test_a_run_that_is_too_long_for_a_page_shows_a_stretch_and_the_whole_in_bins() -> None:
    made(SCENARIO)
    run = results.read(Path("out")).runs[0]
    steps = next(run.steps(*slotview.STEP_COLUMNS))
    whole = seat(next(run.events()), steps)
    part = next(slotview.diagrams(run, rows=20))
    begin = part["begin"]

    assert (part["rows"], len(part["steps"])) == (len(steps["steps"]), 20)
    grid = [line[whole.first_step[begin] : whole.first_step[begin + 20]] for line in whole.grid()]
    assert replayed(part) == grid
    assert begin <= int(np.argmax(steps["waiting"])) < begin + 20
    cells = part["overview"]["cells"]
    assert (len(cells), {len(line) for line in cells}) == (whole.count, {slotview.BINS})
    at = np.linspace(part["overview"]["from"], part["overview"]["to"], slotview.BINS + 1)
    middle = (at[:-1] + at[1:]) / 2 * 1e12
    agree = total = 0
    for line, glyphs in zip(cells, whole.grid(), strict=True):
        for k, when in enumerate(middle):  # the state at the middle of a bin is mostly that of the bin
            row = int(np.searchsorted(steps["start_ps"], when, side="right")) - 1
            step = (when - steps["start_ps"][row]) / steps["first_ps"][row]
            if step >= steps["steps"][row]:
                continue  # nothing runs
            exact = glyphs[int(whole.first_step[row] + step)]
            agree += GLYPHS[int(line[k])] == exact
            total += 1
    assert agree > 0.9 * total


def test_a_replica_that_is_away_has_idle_slots_in_the_whole() -> None:
    """Requests are lost at 5 s, and the replica comes back at 9 s: in between no slot is used."""
    failing = "replicas: 2\nfailures: {schedule: [{replica: 0, at_s: 5, for_s: 4}]}\n"
    made(SCENARIO.replace("rate_per_s: 2", "rate_per_s: 8").replace("requests: 30", "requests: 100") + failing)
    run = results.read(Path("out")).runs[0]
    steps, events = next(run.steps(*slotview.STEP_COLUMNS)), next(run.events())
    whole = slotview.overview(seat(events, steps), steps)
    edges = np.linspace(whole["from"], whole["to"], slotview.BINS + 1)
    away = np.flatnonzero((edges[:-1] > 5.01) & (edges[1:] < 9))

    assert len(away) > 30
    assert {line[k] for line in whole["cells"] for k in away} == {"0"}
    before = np.flatnonzero((edges[:-1] > 4) & (edges[1:] < 5))
    assert "2" in {line[k] for line in whole["cells"] for k in before}


APART = """\
replicas: [{count: 1, role: prefill}, {count: 1, role: decode}]
link: {gb_per_s: 50}
"""


def test_prefill_and_decode_replicas_are_drawn_in_the_whole() -> None:
    """The last hand-over comes after the last step of a prefill replica that plans ahead."""
    made(SCENARIO + APART)
    run = results.read(Path("out")).runs[0]
    last = []
    for steps, events in zip(run.steps(*slotview.STEP_COLUMNS), run.events(), strict=True):
        last.append(int(events["run"].max()) - len(steps["steps"]))
        slots = seat(events, steps)
        whole = slotview.overview(slots, steps)

        assert slots.end.max() <= len(steps["steps"])
        assert {len(line) for line in whole["cells"]} == {slotview.BINS}
    assert max(last) > 0  # so it does here


def test_a_stretch_can_be_asked_for() -> None:
    made(SCENARIO)
    assert chairlift("report", "out", "--from", "2", "--to", "4", "--out", "part.html").status == 0
    diagram = json.loads(Page(Path("part.html")).unpacked("data"))["slots"]["0"][0]
    starts = np.cumsum(diagram["start"]) / 1e9

    assert len(diagram["steps"]) < diagram["rows"]
    assert starts[0] <= 2 or starts[0] == pytest.approx(2, abs=0.1)
    assert starts[-1] < 4


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (None, "ms", "–"),
        (0.1234, "%", "12.3%"),
        (12.345, "ms", "12.35 ms"),
        (9999.0, "ms", "9,999 ms"),
        (12_345.6, "ms", "12.35 s"),
        (1234567, "", "1,234,567"),
        (0.5, "h", "0.50 h"),
        (0.0534, "/s", "0.053"),
    ],
)
def test_numbers_are_written_with_their_units(value: float | None, unit: str, words: str) -> None:
    assert text(value, unit) == words


def test_a_distribution_of_few_is_exact_and_of_many_keeps_its_percentiles() -> None:
    values, shares = cdf(np.array([3.0, 1.0, np.nan, 2.0]))
    assert (values.tolist(), shares.tolist()) == ([1, 1, 2, 3], pytest.approx([0, 1 / 3, 2 / 3, 1]))
    many = np.random.default_rng(0).lognormal(size=10_000)
    values, shares = cdf(many)

    assert len(values) < 300
    for share in (0, 0.5, 0.9, 0.95, 0.99, 1):
        assert values[np.flatnonzero(np.isclose(shares, share))[0]] == pytest.approx(np.quantile(many, share))


# ---- the terminal ----


def test_a_sparkline_shows_who_is_inside() -> None:
    # one request from 0 to 4 s, another from 2 to 3 s
    level = inside(np.array([0, 2 * 10**12]), np.array([4 * 10**12, 3 * 10**12]), bins=4)

    assert level.tolist() == pytest.approx([1, 1, 2, 1])
    assert sparkline(level) == "▅▅█▅"
    assert sparkline(np.zeros(3)) == "   "


def test_tables_have_no_colours_in_pipes() -> None:
    Path("small.yaml").write_text(SCENARIO)
    result = chairlift("run", "small.yaml", "--out", "out")

    assert "\x1b" not in result.out + result.err
    assert re.search(r"requests inside, over that time +[ ▁▂▃▄▅▆▇█]{40} ≤ \d+", result.out)


@pytest.mark.parametrize("tokens", [16, 4000])
def test_nobody_served_and_one_request_have_a_page_too(tokens: int) -> None:
    why = "1 larger than the KV pool of 16 tokens (prompt and output; the longest 165 + 37 = 202)"
    nobody = (1, f"small: no request was completed: 1 rejected ({why})\n")
    scenario = replaced("tokens: 4000", f"tokens: {tokens}").replace("requests: 30", "requests: 1")
    scenario = scenario.replace("max_model_len: 2048\n", "")  # vLLM would not start with a length that it is told
    page = made(scenario, ends=nobody if tokens == 16 else (0, ""))
    html = Path("out/report.html").read_text()
    figures = json.loads(page.unpacked("data"))["figures"]

    served = json.loads(Path("out/summary.json").read_text())["completed"]
    assert served == (tokens == 4000)
    assert ("No request was completed." in html, "No step was run." in html) == (not served, not served)
    curves = [
        f for f in figures.values() if f["layout"].get("xaxis", {}).get("title", {}).get("text", "").startswith("TTFT")
    ]
    assert [curve["data"][0]["y"] for curve in curves] == ([[0, 1]] if served else [])


def test_a_folder_of_another_version_is_named() -> None:
    made(SCENARIO)
    Path("out/study.json").write_text('{"name": "x", "runs": []}')
    result = chairlift("report", "out")

    assert (result.status, result.err) == (
        2,
        "error: out/study.json: is damaged, or of another version of Chairlift: run the scenario again: "
        "question is required\n",
    )


def shown(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What the progress of a run writes to a terminal."""
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("small.yaml").write_text(SCENARIO)
    study = load(Path("small.yaml"))
    terminal = progress.console()
    terminal.file, terminal._force_terminal, terminal.is_interactive, terminal.width = io.StringIO(), True, True, 140
    with progress.progress(study, terminal, silent=False) as advance:
        advance(10, "small", 5.0)
        advance(30, "small", 1234.0)
    return terminal.file.getvalue()


def test_progress_says_how_far_it_is_and_keeps_silent_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch)
    assert "30/30 requests" in written
    assert "simulated 1,234 s" in written
    assert shown(monkeypatch, CI="true") == ""


def test_no_color_takes_the_colours_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[\d;]*3[1-7]")
    assert not colour.search(shown(monkeypatch, NO_COLOR="1"))


def test_an_interrupted_comparison_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("two.yaml").write_text(TWO)
    real, count = cli.simulate, 0

    def stopped(*parts: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return real(*parts, **more)

    monkeypatch.setattr(cli, "simulate", stopped)
    assert chairlift("run", "two.yaml", "--out", "out", "--quiet").status == 130
    result = chairlift("report", "out")

    assert (result.status, result.err) == (0, "")
    assert Path("out/report.html").read_text().count("<section data-run=") == 3
