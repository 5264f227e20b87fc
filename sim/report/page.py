"""``report.html``: one file that needs nothing else, made from a results folder.

Numbers stand in the HTML itself, each in a ``<data>`` element with its exact value; figures are drawn by plotly.js,
which lies compressed in the page beside their data.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from chairlift.sim.report import figures
from chairlift.sim.report import slot_data as slotview
from chairlift.sim.report.figures import Figure, Floats, Part
from chairlift.sim.report.headlines import LATENCIES, REPLICAS, SERVED, cards, datum, hint, latency_table, text
from chairlift.sim.report.tenants import tenant_table
from chairlift.sim.report.timeline import REQUEST_COLUMNS, ReplicaTotals, timeline, work
from chairlift.sim.results.reader import Columns, Results, RunResults

ASSETS = Path(__file__).resolve().parent / "assets"
COMPARED = ("total_token_throughput", "request_throughput", "request_goodput")
METRICS = ("ttft", "tpot", "e2el")
KV = (
    ("used", "decode", "kv_utilization"),
    ("reserved", "prefill", "kv_reserved"),
    ("never filled", "padding", "kv_internal"),
    ("free", "idle", "kv_free"),
)
WORK = (
    ("prompts", "prefill", "prompts"),
    ("computed again", "last", "again"),
    ("answers", "decode", "answers"),
    ("padding", "padding", "padding"),
)


@dataclass
class _Page:
    """A page in the making."""

    results: Results
    rows: int  # of runs, that a slot diagram may hold
    span_s: tuple[float, float] | None
    figures: dict[str, Figure] = field(default_factory=dict)
    slots: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    latencies: dict[int, dict[str, Floats]] = field(default_factory=dict)  # by run
    work: dict[int, dict[str, int]] = field(default_factory=dict)

    def place(self, figure: Figure) -> str:
        """Where a figure will be drawn."""
        name = f"f{len(self.figures)}"
        self.figures[name] = figure
        height = figure["layout"]["height"]
        return f'<div class="figure" data-figure="{name}" style="height:{height}px"></div>'


def write(results: Results, path: Path, span_s: tuple[float, float] | None = None) -> int:
    """Write the report of ``results`` to ``path``; its size in bytes.

    ``span_s`` chooses the seconds that slot diagrams show step by step where the whole is too much. Raises OSError.
    """
    total = sum(run.rows["steps"] for run in results.runs if run.has_events)
    running = sum(len(run.replicas) for run in results.runs if run.has_events)
    share = max(1000, slotview.ROWS // max(1, running)) if total > slotview.ROWS else total
    page = _Page(results, share, span_s)
    html = _document(page)
    path.write_text(html, encoding="utf-8")
    return len(html.encode())


def _document(page: _Page) -> str:
    from plotly.offline import get_plotlyjs  # half a second, and only reports need it

    results = page.results
    details = [_run(page, i, run) for i, run in enumerate(results.runs)]
    body = [_header(results)]
    if results.compares:
        for case in results.cases:
            body.append(_comparison(page, case))
        body.append("<h2>One run</h2>")
        body += [_picker(results, case) for case in results.cases]
    body += details
    data = json.dumps({"figures": page.figures, "slots": page.slots}, separators=(",", ":"), allow_nan=False)
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("slots.js", "page.js"))
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(results.name)} · Chairlift</title>",
            f"<style>{(ASSETS / 'page.css').read_text(encoding='utf-8')}</style></head><body><main>",
            *body,
            _footer(results),
            "</main>",
            _packed("plotly", get_plotlyjs()),
            _packed("data", data),
            f"<script>{script}</script></body></html>\n",
        )
    )


def _packed(name: str, content: str) -> str:
    packed = base64.b64encode(gzip.compress(content.encode(), 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def _header(results: Results) -> str:
    parts = [
        '<header><div class="over">Chairlift report</div>',
        '<button id="theme" title="light or dark">◐</button>',
        f"<h1>{escape(results.name)}</h1>",
        f"<p>{escape(results.question)}</p>" if results.question else "",
        "</header>",
        '<div id="trouble" class="card" hidden>The figures cannot be drawn: this browser is too old '
        "(it lacks DecompressionStream).</div>",
    ]
    if len(results.cases) > 1:
        last = results.cases[-1]
        parts.append(_buttons("case", [(case, case, case == last) for case in results.cases], "case"))
    return "".join(parts)


def _buttons(kind: str, choices: list[tuple[str, str, bool]], what: str) -> str:
    made = "".join(
        f'<button data-choose="{kind}" value="{escape(value)}" aria-pressed="{str(on).lower()}">'
        f"{escape(label)}</button>"
        for value, label, on in choices
    )
    return f'<div class="controls"><span class="what">{what}</span>{made}</div>'


def _members(results: Results, case: str) -> list[tuple[int, RunResults]]:
    return [(i, run) for i, run in enumerate(results.runs) if run.case == case]


def _picker(results: Results, case: str) -> str:
    members = _members(results, case)
    choices = [(str(i), run.variant, i == members[-1][0]) for i, run in members]
    hidden = " hidden" if case != results.cases[-1] else ""
    return f'<div data-case="{escape(case)}"{hidden}>{_buttons("run", choices, "variant")}</div>'


def _comparison(page: _Page, case: str) -> str:
    results = page.results
    members = _members(results, case)
    runs = [run for _, run in members]
    names = [run.variant for run in runs]
    hidden = " hidden" if case != results.cases[-1] else ""
    baseline = results.baseline[0] if results.baseline else names[0]
    bars = page.place(figures.throughput(runs, baseline))
    published = " In brackets: as published." if any(run.published is not None for run in runs) else ""
    notes = f"Multiples of {escape(baseline)}.{published}"
    parts = [
        f'<section data-case="{escape(case)}"{hidden}>',
        "<h2>Compared</h2>",
        f'<div class="card">{_comparison_table(runs)}</div><div class="pair">',
        f'<div class="card"><h3>Throughput</h3>{bars}<p class="caption">{notes}</p></div>',
    ]
    falls = figures.waterfall(runs, results.waterfall) if results.waterfall else None
    if falls is not None:
        title = escape(f"Where the gain of {results.waterfall[-1]['variant']} comes from")
        said = "Each bar begins where the one before ended; the factors multiply to the whole."
        parts.append(f'<div class="card"><h3>{title}</h3>{page.place(falls)}<p class="caption">{said}</p></div>')
    latencies = [(i, run, page.latencies[i]) for i, run in members]
    parts += ["</div><h2>Latency</h2>", _legend(names), _cdfs(page, latencies), "<h2>Waste</h2>"]
    parts += [_waste(page, members), "</section>"]
    return "".join(parts)


def _comparison_table(runs: list[RunResults]) -> str:
    headlines = [h for h in SERVED if h.key in COMPARED and any(run.summary.get(h.key) is not None for run in runs)]
    more = [h for h in REPLICAS if h.key in ("mean_running", "kv_utilization", "preemptions")]
    head = [f"<th><span {hint(h.meaning)}>{escape(h.label)}</span></th>" for h in headlines]
    head += [f"<th><span {hint(h.meaning)}>{h.label} p50</span></th><th>p99</th>" for h in LATENCIES[:2]]
    head += [f"<th><span {hint(h.meaning)}>{escape(h.label)}</span></th>" for h in more]
    rows = []
    for i, run in enumerate(runs):
        cells = [datum(run.summary, h.key, h.unit) for h in headlines]
        cells += [datum(run.summary, f"{q}_{h.key}_ms", "ms") for h in LATENCIES[:2] for q in ("median", "p99")]
        cells += [datum(run.summary, h.key, h.unit) for h in more]
        name = f'<span class="swatch" style="background:{figures.hue(i)}"></span>{escape(run.variant)}'
        rows.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th></th>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _legend(names: list[str]) -> str:
    return _keys([(f"v{i % figures.HUES}", name) for i, name in enumerate(names)])


def _cdfs(page: _Page, runs: list[tuple[int, RunResults, dict[str, Floats]]]) -> str:
    if not any(run.summary["completed"] for _, run, _ in runs):
        return '<p class="caption">No request was completed.</p>'
    cells = []
    for metric in METRICS:
        limits = {run.slo.get(f"{metric}_ms") for _, run, _ in runs}
        limit = limits.pop() if len(limits) == 1 else None
        figure = figures.latency(metric, [(run.variant or "share", values[metric]) for _, run, values in runs], limit)
        cells.append(f'<div class="card"><h3>{figures.LATENCY_NAMES[metric]}</h3>{page.place(figure)}</div>')
    said = "Share of finished requests that were at least as fast."
    return f'<div class="triple">{"".join(cells)}</div><p class="caption">{said}</p>'


def _waste(page: _Page, members: list[tuple[int, RunResults]]) -> str:
    if not any(run.summary["steps"] for _, run in members):
        return '<p class="caption">No step was run.</p>'
    names = [run.variant for _, run in members]
    blank = [""] * len(members)
    kv = [(label, colour, [run.summary[key] for _, run in members], blank) for label, colour, key in KV]
    tokens = []
    for label, colour, key in WORK:
        counts = [page.work[i][key] for i, _ in members]
        totals = [max(1, sum(page.work[i].values())) for i, _ in members]
        shares = [count / total for count, total in zip(counts, totals, strict=True)]
        tokens.append((label, colour, shares, [f" ({count:,} tokens)" for count in counts]))
    made = _shares(page, "KV memory", names, kv, "share of the KV pools, over busy time")
    made += _shares(page, "Tokens computed", names, tokens, "share of the token slots of all steps")
    return f'<div class="pair">{made}</div>'


def _shares(page: _Page, title: str, names: list[str], parts: Sequence[Part], said: str) -> str:
    keys = [(colour, label) for label, colour, *_ in parts]
    figure = page.place(figures.shares(names, parts, said))
    return f'<div class="card"><h3>{title}</h3>{_keys(keys)}{figure}</div>'


def _keys(entries: Sequence[tuple[str, str]], more: str = "") -> str:
    items = (f'<li><span class="swatch" style="background:var(--{c})"></span>{escape(t)}</li>' for c, t in entries)
    return f'<ul class="legend">{"".join(items)}{more}</ul>'


def _run(page: _Page, i: int, run: RunResults) -> str:
    results = page.results
    requests = run.requests(*REQUEST_COLUMNS, *(["tenant"] if run.has_column("tenant") else []))
    line = timeline(run, requests)
    page.work[i] = work(run, requests, line.totals)
    page.latencies[i] = {metric: requests[f"{metric}_ms"].astype(np.float64) for metric in METRICS}
    hidden = " hidden" if results.compares and i != len(results.runs) - 1 else ""
    parts = [f'<section data-run="{i}"{hidden}>']
    if run.note:
        parts.append(f'<p class="caption">{escape(run.variant)}: {escape(run.note)}</p>')
    numbers = cards(run.summary, SERVED) + cards(run.summary, REPLICAS)
    parts.append(f'<div class="card">{numbers}</div><div class="card">{latency_table(run.summary)}</div>')
    parts.append(f"<h2>The batch, slot by slot</h2>{_slots(page, i, run)}")
    if not results.compares:
        parts += ["<h2>Latency</h2>", _cdfs(page, [(i, run, page.latencies[i])])]
    parts.append(f'<h2>Over time</h2><div class="card">{page.place(figures.over_time(line))}')
    width = float(line.edges[1] - line.edges[0])
    parts.append(
        f'<p class="caption">Averages over {len(line.edges) - 1} bins of {width:.3g} s; all replicas.</p></div>'
    )
    if not results.compares:
        parts += ["<h2>Waste</h2>", _waste(page, [(i, run)])]
    if len(run.replicas) > 1:
        parts.append(f'<h2>Replicas</h2><div class="card">{_replica_table(run, requests, line.totals)}</div>')
    tenants = tenant_table(run, requests)
    if tenants:
        parts.append(f'<h2>Tenants</h2><div class="card">{tenants}</div>')
    said = "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in run.summary["assumptions"].items())
    parts.append(f'<h2>What the numbers rest on</h2><ul class="assumptions">{said}</ul></section>')
    return "".join(parts)


def _slots(page: _Page, i: int, run: RunResults) -> str:
    if not run.has_events:
        return (
            '<div class="card"><p class="caption">This run kept no journal of its requests, so there is no slot '
            "diagram; <i>slots</i> below says what the batch did. Run it again with --events.</p></div>"
        )
    made = list(slotview.diagrams(run, page.rows, page.span_s))
    if not made:
        return '<div class="card"><p class="caption">No step was run.</p></div>'
    page.slots[str(i)] = made
    keys = [("prefill", "prefill"), ("decode", "decode"), ("last", "last token")]
    keys += [("stalled", "stalled: on a slot, not in the step"), ("padding", "padding: answered, slot paid for")]
    legend = _keys([*keys, ("idle", "idle")], "<li>✕ preempted, or lost with its replica</li>")
    acts = [("whole", "whole run"), ("steps", "single steps"), ("closer", "closer"), ("wider", "wider")]
    acts += [("left", "◀"), ("right", "▶"), ("axis", "axis: time")]
    buttons = "".join(f'<button data-act="{act}">{label}</button>' for act, label in acts)
    replicas = ""
    if len(made) > 1:
        choices = "".join(
            f'<button data-act="replica" value="{k}" aria-pressed="{str(k == 0).lower()}">{each["replica"]}</button>'
            for k, each in enumerate(made)
        )
        replicas = f'<div class="controls"><span class="what">replica</span>{choices}</div>'
    return (
        f'<div class="card">{legend}{replicas}<div class="controls">{buttons}</div>'
        f'<div class="figure" data-slots="{i}" style="min-height:152px"></div><div class="tip" hidden></div>'
        '<p class="telling"></p></div>'
    )


def _replica_table(run: RunResults, requests: Columns, totals: list[ReplicaTotals]) -> str:
    busiest = max(each.busy_s for each in totals) or 1.0
    head = (
        "replica",
        "GPU",
        "busy",
        "steps",
        "requests",
        "output tokens",
        "running",
        "KV used",
        "preempted",
        "TTFT p50",
        "p99",
    )
    rows = []
    for each in totals:
        replica = each.replica
        here = requests["replica"] == replica.index
        ttft = requests["ttft_ms"][here]
        ttft = ttft[~np.isnan(ttft)]
        median, tail = np.percentile(ttft, (50, 99)) if len(ttft) else (None, None)
        role = "" if replica.role == "mixed" else f" {replica.role}"
        gpus = replica.gpu + (f" × {count}" if (count := replica.gpus or replica.tensor_parallel) > 1 else "")
        bar = f'<td class="bar" style="--share:{100 * each.busy_s / busiest:.1f}">{text(each.busy_s, "s")}</td>'
        cells = [
            *(text(each.steps, ""), f'<data data-replica-requests value="{here.sum()}">{here.sum():,}</data>'),
            *(text(int(requests["emitted_tokens"][here].sum()), ""), text(each.mean_running, "x")),
            *(text(each.kv_share, "%"), text(each.preemptions, ""), text(median, "ms"), text(tail, "ms")),
        ]
        named = f"<tr><th>{replica.index}{role}</th><td>{escape(gpus)}</td>{bar}"
        rows.append(named + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="caption">Requests count for the replica that they '
        "were on last.</p>"
    )


def _footer(results: Results) -> str:
    try:
        made = f"Chairlift {version('chairlift')}"
    except PackageNotFoundError:
        made = "Chairlift"
    where = escape(results.folder.resolve().name)
    return f"<footer>Made by {made} from {where}. Hover over a dotted word for what it means.</footer>"
