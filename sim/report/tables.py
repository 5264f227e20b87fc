"""What people see of a study: tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chairlift.sim.report.sparkline import inside, sparkline
from chairlift.sim.results import loops
from chairlift.sim.results.catalogue import LATENCIES, LATENCY, REPLICAS, SERVED, SIMULATION, Metric, has_latency, shown
from chairlift.sim.results.claims import checked as checked_claims
from chairlift.sim.results.fairness import by_tenant
from chairlift.sim.results.metrics import Latencies, request_latencies
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.study import Study

COMPARED = ("ttft", "tpot", "itl", "e2el")  # latencies that fit beside one another into 80 columns
CDF_PERCENT = (5, 10, 25, 50, 75, 90, 95, 99, 100)


def show(console: Console, study: Study, outcomes: Sequence[Outcome]) -> None:
    """Print what ``study`` asked to see of its outcomes."""
    if study.question:
        console.print(Text(study.question.strip(), style="italic"))
    scaled = any("scaled, not measured" in outcome.assumptions for outcome in outcomes)
    for each in renderables(study, outcomes):
        if scaled and isinstance(each, Table):
            each.caption = "step costs are scaled, not measured: see below"
        console.print()
        console.print(each)


def renderables(study: Study, outcomes: Sequence[Outcome]) -> Iterator[RenderableType]:
    """The tables of a study, one after the other."""
    if len(outcomes) == 1:
        yield single(study, outcomes[0])
    else:
        if "throughput" in study.tables:
            yield throughput(study, outcomes)
        if study.waterfall:
            yield waterfall(study, outcomes)
        if "latency" in study.tables:
            yield latency(study, outcomes)
        if "fleet" in study.tables:
            yield fleet(study, outcomes)
        if "tenants" in study.tables:
            yield tenants(study, outcomes)
        if "cdf" in study.tables:
            yield cdf(study, outcomes)
        if study.claims:
            yield claims(study, outcomes)
    yield assumptions(outcomes)
    if warning := loops.warning([(_called(o), o.setup.loop) for o in outcomes]):
        yield Text(f"warning: {warning}", style="yellow")


def single(study: Study, outcome: Outcome) -> Table:
    """All metrics of the catalogue that one run has."""
    summary = outcome.summary
    table = Table(title=escape(study.name), title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for metric in SERVED:
        _add(table, metric, summary)
        if metric.name == "duration":
            table.add_row("requests inside, over that time", _load(outcome))
    table.add_section()
    for metric in LATENCIES:
        if has_latency(summary, metric.name):
            table.add_row(f"{metric.label} p50 / p90 / p99", _percentiles(summary, metric.name))
    for part in (REPLICAS, SIMULATION):
        table.add_section()
        for metric in part:
            _add(table, metric, summary)
    return table


def _add(table: Table, metric: Metric, summary: dict[str, float | None]) -> None:
    if shown(metric, summary):
        table.add_row(metric.label, metric.text(summary[metric.name]))


def throughput(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """Tokens per second of every variant, as ratios to the study's baselines, beside the published ratio.

    Where drafts are verified: tokens that a request gets from a step, and the share of drafts that are rejected.
    """
    baselines = study.baseline or [outcomes[0].setup.variant]
    published = any(o.setup.published is not None for o in outcomes)
    table = comparison(f"{study.name}: tokens/s, prompts and outputs counted")
    table.add_column("", no_wrap=True)
    table.add_column("tokens/s", justify="right")
    for name in baselines:
        table.add_column(f"× {escape(name)}", justify="right")
    if published:
        table.add_column("published", justify="right")
    drafted = any(o.setup.speculate is not None for o in outcomes)
    piped = any("bubble_share" in o.summary for o in outcomes)
    more = (*(("accepted", "wasted") if drafted else ()), *(("bubbles",) if piped else ()))
    for label in ("output/s", "running", "KV used", "preempt.", *more):
        table.add_column(label, justify="right")
    for members in _sections(table, outcomes):
        base = {o.setup.variant: o.summary["total_token_throughput"] for o in members}
        for outcome in members:
            s = outcome.summary
            rate = s["total_token_throughput"]
            row = [escape(outcome.setup.variant), f"{rate:,.0f}"]
            row += [f"{rate / base[name]:.2f}" if base.get(name) else "–" for name in baselines]
            if published:
                value = outcome.setup.published
                row.append("" if value is None else f"{value:g}")
            row += [f"{s['output_throughput']:,.0f}", f"{s['mean_running']:.1f}"]
            row += [f"{s['kv_utilization']:.0%}", f"{s['preemptions']:,}"]
            if drafted:
                length, wasted = s.get("accepted_length"), s.get("drafts_wasted")
                row += ["–" if length is None else f"{length:.2f}", "–" if wasted is None else f"{wasted:.0%}"]
            if piped:
                row.append(f"{s['bubble_share']:.0%}" if "bubble_share" in s else "–")
            table.add_row(*row)
    return table


def waterfall(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What each rung gains over the one before, for the last case; the factors multiply to the whole."""
    case, members = list(by_case(outcomes))[-1]
    rate = {o.setup.variant: o.summary["total_token_throughput"] for o in members}
    steps = {o.setup.variant: o.summary["steps"] for o in members}
    names = [rung.variant for rung in study.waterfall]
    title = f"where the {_ratio(rate[names[-1]], rate[names[0]], 1)} comes from" + (f" ({case})" if case else "")
    table = comparison(title)
    table.add_column("from → to", no_wrap=True)
    table.add_column("because")
    for label in ("tokens/s", "engine steps", "factor", "so far"):
        table.add_column(label, justify="right")
    table.add_row(escape(names[0]), "", f"{rate[names[0]]:,.0f}", f"{steps[names[0]]:,}", "", "1.00×")
    for before, rung in zip(names, study.waterfall[1:], strict=False):
        name = rung.variant
        factors = (_ratio(rate[name], rate[base], 2) for base in (before, names[0]))
        table.add_row(f"→ {escape(name)}", escape(rung.because), f"{rate[name]:,.0f}", f"{steps[name]:,}", *factors)
    return table


def latency(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """Latency of every variant, median and 99th percentile."""
    goodput = any(o.summary["request_goodput"] is not None for o in outcomes)
    table = comparison(f"{study.name}: latency, p50 / p99")
    table.add_column("", overflow="fold")
    for name in COMPARED:
        table.add_column(LATENCY[name].label, justify="right", no_wrap=True)
    table.add_column("req/s", justify="right", no_wrap=True)
    if goodput:
        table.add_column("good/s", justify="right", no_wrap=True)
    for members in _sections(table, outcomes):
        for outcome in members:
            s = outcome.summary
            row = [_percentiles(s, name, ("median", "p99")) for name in COMPARED]
            row.append(f"{s['request_throughput']:,.2f}")
            if goodput:
                row.append("" if s["request_goodput"] is None else f"{s['request_goodput']:,.2f}")
            table.add_row(escape(outcome.setup.variant), *row)
    return table


def fleet(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What the replicas' time went into, and what became of the requests."""
    moved = any("median_transfer_ms" in o.summary for o in outcomes)
    table = comparison(f"{study.name}: replica hours, prefix hits, what became of the requests")
    table.add_column("", overflow="fold")
    labels = ["hours", "in steps", "hits", "done", "refused", "timed out", "failed", "preempt."]
    for label in (*labels, *(["KV transfer"] * moved)):
        table.add_column(label, justify="right")
    for members in _sections(table, outcomes):
        for outcome in members:
            s = outcome.summary
            row = [f"{s['replica_hours']:.2f}", f"{s['utilization']:.0%}", f"{s['prefix_hit_rate']:.0%}"]
            row += [f"{s[key]:,}" for key in ("completed", "rejected", "timed_out", "failed", "preemptions")]
            if moved:
                row.append(_percentiles(s, "transfer", ("median", "p99")) if "median_transfer_ms" in s else "")
            table.add_row(escape(outcome.setup.variant), *row)
    return table


def tenants(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What each tenant got of every variant, and how far apart they were while all had requests waiting."""
    table = comparison(f"{study.name}: tenants; weighted: a prompt token counts 1, an output token 2")
    table.add_column("", overflow="fold")
    for label in ("tenant", "requests", "TTFT p50", "E2E p50", "weighted tokens/s", "most / least"):
        table.add_column(label, justify="right")
    for members in _sections(table, outcomes):
        for outcome in members:
            ratio = outcome.summary.get("service_ratio")
            for i, served in enumerate(by_tenant(outcome.requests, request_latencies(outcome.requests))):
                mine = (escape(outcome.setup.variant), "–" if ratio is None else f"{ratio:.2f}") if i == 0 else ("", "")
                times = (f"{_number(ms)} ms" for ms in (served.ttft_ms, served.e2el_ms))
                table.add_row(
                    mine[0],
                    escape(served.tenant),
                    f"{served.completed:,}",
                    *times,
                    f"{served.service_rate:,.0f}",
                    mine[1],
                )
    return table


def cdf(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """The distribution of end-to-end latency, seconds at each percentage of requests."""
    table = comparison(f"{study.name}: E2E seconds within which this share of requests is done")
    table.add_column("", overflow="fold")
    for percent in CDF_PERCENT:
        table.add_column(f"{percent}%", justify="right")
    for members in _sections(table, outcomes):
        for outcome in members:
            values = Latencies(outcome.requests).of("e2el")
            row = [f"{v / 1000:.1f}" for v in np.percentile(values, CDF_PERCENT)] if len(values) else []
            table.add_row(escape(outcome.setup.variant), *row)
    return table


def claims(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What was published, what came out here, and why the two differ."""
    found = Table(title=f"{escape(study.name)}: published and simulated", title_justify="left", box=box.SIMPLE_HEAD)
    found.add_column("")
    for label in ("published", "simulated", "ratio"):
        found.add_column(label, justify="right", no_wrap=True)
    for claim in checked_claims(study.claims, outcomes):
        published, value = claim["published"], claim["simulated"]
        said = f"{published:g}" if isinstance(published, float) else f"{published[0]:g}–{published[1]:g}"
        sign = {"at least": "≥ ", "at most": "≤ ", "about": "~ "}.get(claim["bound"], "")
        ours = "–" if value is None else f"{sign}{value:.3g}"
        found.add_row(Text(claim["says"]), said, ours, _beside(published, value))
        if claim["because"]:
            found.add_row(Text(claim["because"], style="dim"))
    return found


def _beside(published: float | tuple[float, float], value: float | None) -> str:
    """Simulated over published; of a range, over its nearer end, and a word inside it."""
    if value is None:
        return "–"
    if isinstance(published, float):
        return f"{value / published:.2f}" if published else "–"
    low, high = published
    if low <= value <= high:
        return "inside"
    return f"{value / (low if value < low else high):.2f}"


def assumptions(outcomes: Sequence[Outcome]) -> Group:
    """What the numbers rest on; said once where all variants share it."""
    lines: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for key, text in outcome.assumptions.items():
            lines.setdefault(f"{key}: {text}", []).append(outcome)
    parts = [Text(said + _whose(members, outcomes), style="dim") for said, members in lines.items()]
    notes = {o.setup.variant: o.setup.note for o in outcomes if o.setup.note}
    parts += [Text(f"{variant}: {note}", style="dim") for variant, note in notes.items()]
    return Group(*parts)


def _whose(members: Sequence[Outcome], outcomes: Sequence[Outcome]) -> str:
    """`` [cases, variants]`` that a line holds for; nothing if it holds for all."""
    said = []
    for pick in (lambda o: o.setup.case, lambda o: o.setup.variant):
        here = list(dict.fromkeys(map(pick, members)))
        if len(here) < len(set(map(pick, outcomes))):
            said.append(", ".join(here))
    return f" [{'; '.join(said)}]" if said else ""


def _called(outcome: Outcome) -> str:
    """The variant, or the case where no variants are compared."""
    return outcome.setup.variant or outcome.setup.case


def _load(outcome: Outcome) -> str:
    level = inside(np.array(outcome.requests.arrival), np.array(outcome.requests.finished))
    return f"{sparkline(level)} ≤ {level.max():,.0f}"


def comparison(title: str) -> Table:
    """An empty comparison that fits 80 columns as far as it can."""
    return Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _sections(table: Table, outcomes: Sequence[Outcome]) -> Iterator[list[Outcome]]:
    """The outcomes of each case, under a section of ``table`` that its name heads."""
    for case, members in by_case(outcomes):
        if case:
            table.add_section()
            table.add_row(Text(case, style="bold"))
        yield members


def by_case(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    """Outcomes grouped by case, in order."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.setup.case, []).append(outcome)
    yield from groups.items()


def _percentiles(summary: dict[str, float | None], name: str, which: Sequence[str] = ("median", "p90", "p99")) -> str:
    values = [summary[f"{q}_{name}_ms"] for q in which]
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return "–"
    unit = "s" if max(numbers) >= 10_000 else "ms"
    return "/".join(_number(v / 1000 if unit == "s" else v) for v in numbers) + f" {unit}"


def _ratio(rate: float, base: float, digits: int) -> str:
    return f"{rate / base:.{digits}f}×" if base else "–"


def _number(value: float) -> str:
    """About three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
