"""``plan.html``: a plan's answer on one page that needs no network, with its plots."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.plan.answer import Answer
from chairlift.sim.plan.capacity import Capacity
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.tables import feasible, interval, latency_name, said_of
from chairlift.sim.plan.verdict import Verdict

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c564b", "#7f7f7f")
_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right}"
    "td,th{border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}td:not(:first-child):not(:last-child){white-space:nowrap}"
    "pre{background:#f4f4f4;padding:1em;white-space:pre-wrap}"
    ".answer{font-size:1.25em;border-left:4px solid #0072B2;padding:.4em 1em;margin:1em 0}.no{border-color:#D55E00}"
    "details{margin:1em 0}small,li{color:#555}"
)
MOST_CURVES = 6


def write(answer: Answer, path: Path) -> None:
    """Write the page. Raises OSError."""
    from plotly.offline import get_plotlyjs  # here: it takes long to import

    plan = answer.plan
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{_(plan.name)} · Chairlift plan</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script><h1>{_(plan.name)}</h1><p>{_(plan.spec.question or '')}</p>",
        "<p>Promised: " + "; ".join(_(str(p)) for p in plan.spec.slo) + ".</p>",
        *_headlines(answer),
        *_capacities(answer),
        *_headroom(answer),
        *_races(answer),
        *_front(answer),
        "<h2>What this rests on</h2><ul>",
        *(f"<li><b>{_(name)}</b>: {_(line)}</li>" for name, line in answer.assumptions.items()),
        "</ul>",
    ]
    if answer.commands and not answer.failed:
        parts.append("<h2>Run it</h2><pre>" + _("\n".join(answer.commands)) + "</pre>")
    path.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")


def _headlines(answer: Answer) -> Iterator[str]:
    for race in answer.races:
        if race.winner is None:
            told = "<br>".join(_(line) for line in feasible(race))
            lost = f"No system keeps the promises at {race.rate_per_s:g}/s."
            yield f'<p class="answer no">{lost}<br><small>{told}</small></p>'
        else:
            best = race.winner.candidate
            gpus = f"{best.gpus} GPU{'s' * (best.gpus > 1)}"
            yield (
                f'<p class="answer">{race.rate_per_s:g}/s: <b>{_(best.name)}</b>, ${best.usd_per_hour:,.2f} an hour '
                f"({gpus})<br><small>{_(race.winner.why)}; steps: {_(best.backend)}</small></p>"
            )
    for candidate, capacity in answer.capacities[:3]:
        kind = "answer" if capacity.reached else "answer no"
        told = "<br>".join(_(line) for line in said_of(candidate, capacity))
        found = f"{_(candidate.name)}: <b>{interval(capacity)}</b> {answer.plan.unit}/s"
        yield f'<p class="{kind}">{found}<br><small>{told}</small></p>'


def _capacities(answer: Answer) -> Iterator[str]:
    if not answer.capacities:
        return
    yield "<h2>Max sustainable rate</h2>"
    rows = [
        (c.name, interval(k), f"{c.usd_per_hour:,.2f}", str(k.limiting or ""), f"{k.simulated_s / 3600:,.1f}")
        for c, k in answer.capacities
    ]
    yield _table(("system", "rate [interval], /s", "$/h", "limited by", "hours simulated"), rows)
    unit = f"{answer.plan.unit}/s"
    yield from _curves([(c.name, k) for c, k in answer.capacities], answer.plan.spec.slo, unit)


def _curves(capacities: list[tuple[str, Capacity]], promises: list[Promise], unit: str) -> Iterator[str]:
    """Rate against each promise's share, and against its percentile."""
    import plotly.graph_objects as go

    drawn = capacities[:MOST_CURVES]
    for j, promise in enumerate(promises):
        figure = go.Figure()
        for i, (name, capacity) in enumerate(drawn):
            near = _near(capacity)
            shares = [v.kept[j] for v in near]
            bars = {
                "type": "data",
                "symmetric": False,
                "array": [100 * (k.high - k.share) for k in shares],
                "arrayminus": [100 * (k.share - k.low) for k in shares],
            }
            x, y = [v.rate_per_s for v in near], [100 * k.share for k in shares]
            figure.add_scatter(x=x, y=y, error_y=bars, name=name, mode="lines+markers", line_color=_COLOURS[i])
            _interval(figure, capacity, _COLOURS[i])
        figure.add_hline(y=100 * promise.wanted, line_dash="dot", annotation_text="promised")
        yield _drawn(figure, str(promise), unit, "% that met it")
        limits = promise.limits()
        figure_name = f"p{100 * promise.wanted:g}_{next(iter(limits))}_ms"
        if len(limits) > 1 or not any(figure_name in v.figures for _, k in drawn for v in k.verdicts):
            continue
        [limit] = limits.values()
        figure = go.Figure()
        for i, (name, capacity) in enumerate(drawn):
            near = [v for v in _near(capacity) if figure_name in v.figures and v.figures[figure_name][0] < 50 * limit]
            found = [v.figures[figure_name] for v in near]
            bars = {"type": "data", "array": [high - mean for mean, _, high in found]}
            x, y = [v.rate_per_s for v in near], [mean for mean, _, _ in found]
            figure.add_scatter(x=x, y=y, error_y=bars, name=name, mode="lines+markers", line_color=_COLOURS[i])
            _interval(figure, capacity, _COLOURS[i])
        figure.add_hline(y=limit, line_dash="dot")  # an annotation of plotly's would stand at 10 to the power of it
        figure.update_yaxes(type="log")
        yield _drawn(figure, f"{latency_name(figure_name)} over the rate (dotted: promised)", unit, "ms")


def _near(capacity: Capacity) -> list[Verdict]:
    """Rates up to twice the capacity: beyond, queues only grow."""
    most = 2 * capacity.rate_per_s if capacity.reached else math.inf
    return [v for v in capacity.verdicts if v.rate_per_s <= most and v.replications > 1]


def _interval(figure: Any, capacity: Capacity, colour: str) -> None:
    if 0 < capacity.low < capacity.high < math.inf:
        figure.add_vrect(x0=capacity.low, x1=capacity.high, fillcolor=colour, opacity=0.15, line_width=0)


def _headroom(answer: Answer) -> Iterator[str]:
    if not answer.headroom:
        return
    import plotly.graph_objects as go

    today = answer.plan.spec.rates[0]
    times = list(answer.headroom[0].growth)
    yield f"<h2>Headroom over today's {today:g}/s</h2>"
    rows = [
        (h.stress, interval(h.capacity), f"{h.capacity.rate_per_s / today:.2f}", *(h.growth[t] for t in times))
        for h in answer.headroom
    ]
    yield _table(("under", "rate [interval], /s", "× today", *(f"× {t:g}" for t in times)), rows)
    figure = go.Figure()
    rates = [h.capacity.rate_per_s for h in answer.headroom]
    highs = [h.capacity.high if math.isfinite(h.capacity.high) else h.capacity.rate_per_s for h in answer.headroom]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - rate for high, rate in zip(highs, rates, strict=True)],
        "arrayminus": [h.capacity.rate_per_s - h.capacity.low for h in answer.headroom],
    }
    figure.add_bar(x=[h.stress for h in answer.headroom], y=rates, error_y=bars, marker_color=_COLOURS[0])
    figure.add_hline(y=today, line_dash="dot", annotation_text="today")
    yield _drawn(figure, "max sustainable rate under stress", "", f"{answer.plan.unit}/s")


def _races(answer: Answer) -> Iterator[str]:
    if not answer.races:
        return
    import plotly.graph_objects as go

    won = [race for race in answer.races if race.winner is not None]
    yield "<h2>Cheapest system</h2>"
    if len(won) > 1:
        figure = go.Figure()
        usd = [race.winner.candidate.usd_per_hour for race in won if race.winner]
        names = [race.winner.candidate.name for race in won if race.winner]
        x = [race.rate_per_s for race in won]
        line = {"shape": "vh", "color": _COLOURS[0]}
        figure.add_scatter(x=x, y=usd, text=names, mode="lines+markers", line=line)
        figure.update_yaxes(rangemode="tozero")
        yield _drawn(figure, "price of the cheapest that keeps the promises", f"{answer.plan.unit}/s", "$ an hour")
    for race in answer.races:
        simulated = [entry for entry in race.entries if entry.verdict is not None]
        rows = [(e.candidate.name, f"{e.candidate.usd_per_hour:,.2f}", e.outcome, e.why) for e in simulated]
        dearer = len(race.of("dearer"))
        yield (
            f"<h3>{race.rate_per_s:g}/s</h3><p>Of {len(race.entries)} systems {len(simulated)} were simulated, "
            f"{len(race.of('excluded'))} excluded by bounds, {dearer} dearer than what will do.</p>"
        )
        yield _table(("simulated, cheapest first", "$/h", "outcome", "share that met it [interval]"), rows)
        barred = [(e.candidate, e.why) for e in race.of("excluded")]
        excluded = [(c.name, f"{c.usd_per_hour:,.2f}" if c.setup else "–", why) for c, why in barred]
        if excluded:
            table = _table(("excluded", "$/h", "why"), excluded)
            yield f"<details><summary>what bounds exclude, and why</summary>{table}</details>"


def _front(answer: Answer) -> Iterator[str]:
    if not answer.front:
        return
    import plotly.graph_objects as go

    name = latency_name(answer.front[0].latency_name)
    yield "<h2>Price × latency × capacity</h2>"
    rows = []
    for p in answer.front:
        row = (p.candidate.name, "yes" if p.is_best else "", f"{p.candidate.usd_per_hour:,.2f}", f"{p.latency_ms:,.4g}")
        rows.append((*row, interval(p.capacity)))
    yield _table(("system", "on the front", "$/h", f"{name}, ms", "rate [interval], /s"), rows)
    figure = go.Figure()
    figure.add_scatter(
        x=[p.candidate.usd_per_hour for p in answer.front],
        y=[p.latency_ms for p in answer.front],
        text=[f"{p.candidate.name}: {interval(p.capacity)}/s" for p in answer.front],
        mode="markers",
        marker={
            "size": 12,
            "color": [p.capacity.rate_per_s for p in answer.front],
            "colorscale": "Viridis",
            "colorbar": {"title": f"{answer.plan.unit}/s"},
            "symbol": ["circle" if p.is_best else "circle-open" for p in answer.front],
        },
    )
    yield _drawn(
        figure, f"price and {name} at {answer.races[-1].rate_per_s:g}/s (filled: on the front)", "$ an hour", "ms"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    made = "".join("<tr>" + "".join(f"<td>{_(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_(cell)}</th>' for cell in head)}</tr>{made}</table>"


def _drawn(figure: Any, title: str, x: str, y: str) -> str:
    lines = sum(trace.showlegend is not False and bool(trace.name) for trace in figure.data)
    below = lines * 19 if lines > 1 else 0  # pixels: one name a line
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=380 + below)
    figure.update_layout(margin={"t": 50, "b": 45 + below}, legend={"orientation": "v", "yref": "container", "y": 0})
    figure.update_layout(legend={"yanchor": "bottom", "x": 0})
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _(text: str) -> str:
    return html.escape(text)
