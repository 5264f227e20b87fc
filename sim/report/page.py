"""``report.html``: one file that needs nothing else, made from a results folder.

Numbers stand in the HTML itself, each in a ``<data>`` element with its exact value. This module says what stands where;
``assets/report.html`` says how it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chairlift.sim.report import figures, slot_data
from chairlift.sim.report.figures import Floats
from chairlift.sim.report.html import Figure, Page, swatch
from chairlift.sim.report.tenants import tenant_rows
from chairlift.sim.report.timeline import REQUEST_COLUMNS, TIMES, ReplicaTotals, timeline, work
from chairlift.sim.results import loops
from chairlift.sim.results.catalogue import FIELDS, LATENCY, REPLICAS, SERVED, SIMULATION, Metric
from chairlift.sim.results.reader import Columns, Results, RunResults
from chairlift.sim.study import loop_of

COMPARED = ("request_throughput", "request_goodput", "total_token_throughput")
COMPARED_LATENCIES = ("ttft", "tpot")
COMPARED_MORE = ("mean_running", "kv_utilization", "preemptions")

Keys = list[tuple[str, str]]  # of a legend: colour, label
Titled = tuple[str, Figure]
Keyed = tuple[str, Keys, Figure]


class _Run(NamedTuple):
    """One run with what figures of several runs need of it."""

    results: RunResults
    latencies: dict[str, Floats]
    work: dict[str, int]


def write(results: Results, path: Path, span_s: tuple[float, float] | None = None) -> int:
    """Write the report of ``results`` to ``path``; its size in bytes.

    ``span_s`` chooses the seconds that slot diagrams show step by step where the whole is too much. Raises OSError.
    """
    total = sum(run.rows["steps"] for run in results.runs if run.has_events)
    running = sum(len(run.replicas) for run in results.runs if run.has_events)
    rows = max(1000, slot_data.ROWS // max(1, running)) if total > slot_data.ROWS else total
    page = Page(("slots.js", "page.js"))
    known, told = [], []
    for i, run in enumerate(results.runs):
        one, facts = _run(run, i)
        if run.has_events and (made := list(slot_data.diagrams(run, rows, span_s))):
            page.slots[str(i)] = made
        facts["diagrams"] = [each["replica"] for each in page.slots.get(str(i), [])] if run.has_events else None
        if not results.compares:
            facts |= {"cdfs": _cdfs([one]), "waste": _waste([one])}
        known.append(one)
        told.append(facts)
    return page.write(
        path,
        "report.html",
        kind="report",
        name=results.name,
        question=results.question,
        source=results.folder.resolve().name,
        cases=results.cases,
        case_choices=[(case, case) for case in results.cases],
        comparisons=[_comparison(results, case, known) for case in results.cases] if results.compares else [],
        numbers=(SERVED, REPLICAS, SIMULATION),
        runs=told,
    )


def _run(run: RunResults, index: int) -> tuple[_Run, dict[str, Any]]:
    """One run, and what the page says of it apart from others."""
    requests = run.requests(*REQUEST_COLUMNS, *(["tenant"] if run.has_column("tenant") else []))
    line = timeline(run, requests)
    latencies = {name: requests[f"{name}_ms"].astype(np.float64) for name in TIMES}
    facts = {
        "index": str(index),
        "note": ": ".join(filter(None, (run.variant, run.note))) if run.note else "",
        "summary": run.summary,
        "over_time": figures.over_time(line),
        "bins": len(line.edges) - 1,
        "bin_s": float(line.edges[1] - line.edges[0]),
        "replicas": _replicas(requests, line.totals) if len(run.replicas) > 1 else [],
        "tenants": tenant_rows(run, requests),
    }
    return _Run(run, latencies, work(run, requests, line.totals)), facts


def _comparison(results: Results, case: str, known: Sequence[_Run]) -> dict[str, Any]:
    """What the page says of the runs of one case together."""
    members = [(i, one) for i, one in enumerate(known) if one.results.case == case]
    runs = [one.results for _, one in members]
    names = [run.variant for run in runs]
    baseline = results.baseline[0] if results.baseline else names[0]
    ran = [(run.variant or run.case, loop_of(replica.asynchronous for replica in run.replicas)) for run in runs]
    published = " In brackets: as published." if any(run.published is not None for run in runs) else ""
    return {
        "case": case,
        "choices": [(str(i), one.results.variant) for i, one in members],
        "columns": _columns(runs),
        "warning": loops.warning(ran),
        "loop": ran[0][1] if len({loop for _, loop in ran}) == 1 else "",
        "rows": [(run.variant, run.summary) for run in runs],
        "throughput": figures.throughput(names, runs, baseline),
        "multiples": f"Prompts and outputs counted; multiples of {baseline}.{published}",
        "waterfall": figures.waterfall(runs, results.waterfall) if results.waterfall else None,
        "best": results.waterfall[-1]["variant"] if results.waterfall else "",
        "legend": [(swatch(i), name) for i, name in enumerate(names)],
        "cdfs": _cdfs([one for _, one in members]),
        "waste": _waste([one for _, one in members]),
    }


def _columns(runs: Sequence[RunResults]) -> list[tuple[str, Metric | None, str]]:
    """Columns of the table of a comparison: head, the metric that explains it, field of the summary."""
    found: list[tuple[str, Metric | None, str]] = [
        (FIELDS[name].label, FIELDS[name], name)
        for name in COMPARED
        if any(run.summary.get(name) is not None for run in runs)
    ]
    for name in COMPARED_LATENCIES:
        found += [(f"{LATENCY[name].label} p50", LATENCY[name], f"median_{name}_ms"), ("p99", None, f"p99_{name}_ms")]
    return [*found, *((FIELDS[name].label, FIELDS[name], name) for name in COMPARED_MORE)]


def _cdfs(runs: Sequence[_Run]) -> list[Titled]:
    """Distributions of latencies; nothing where no request was completed."""
    if not any(run.results.summary["completed"] for run in runs):
        return []
    found = []
    for name in TIMES:
        limits = {run.results.slo.get(f"{name}_ms") for run in runs}
        limit = limits.pop() if len(limits) == 1 else None
        curves = [(run.results.variant or "share", run.latencies[name]) for run in runs]
        found.append((LATENCY[name].label, figures.latency(name, curves, limit)))
    return found


def _waste(runs: Sequence[_Run]) -> list[Keyed]:
    """What memory and compute went into; nothing where no step was run."""
    if not any(run.results.summary["steps"] for run in runs):
        return []
    names = [run.results.variant for run in runs]
    memory = figures.memory(names, [run.results.summary for run in runs])
    tokens = figures.work(names, [run.work for run in runs])
    return [
        ("KV memory, over busy time", _keys(figures.KV), memory),
        ("Tokens computed, in all steps", _keys(figures.WORK), tokens),
    ]


def _keys(parts: Sequence[tuple[str, str, str]]) -> Keys:
    return [(f"var(--{colour})", label) for label, colour, _ in parts]


def _replicas(requests: Columns, totals: Sequence[ReplicaTotals]) -> list[dict[str, Any]]:
    """A row a replica."""
    busiest = max(each.busy_s for each in totals) or 1.0
    rows = []
    for each in totals:
        replica = each.replica
        here = requests["replica"] == replica.index
        ttft = requests["ttft_ms"][here]
        ttft = ttft[~np.isnan(ttft)]
        median, tail = np.percentile(ttft, (50, 99)).tolist() if len(ttft) else (None, None)
        rows.append(
            {
                "name": f"{replica.index}" + ("" if replica.role == "mixed" else f" {replica.role}"),
                "gpus": replica.gpu + (f" × {count}" if (count := replica.gpus or replica.tensor_parallel) > 1 else ""),
                "busy_s": each.busy_s,
                "share": 100 * each.busy_s / busiest,
                "steps": each.steps,
                "requests": int(here.sum()),
                "output_tokens": int(requests["emitted_tokens"][here].sum()),
                "running": each.mean_running,
                "kv_share": each.kv_share,
                "preemptions": each.preemptions,
                "median_ms": median,
                "p99_ms": tail,
            }
        )
    return rows
