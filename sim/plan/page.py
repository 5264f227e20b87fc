"""``plan.html``: a plan's answer on one page that needs no network, with its plots.

This module says what stands where; ``sim/report/assets/plan.html`` says how it looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chairlift.sim.plan.answer import Answer
from chairlift.sim.plan.capacity import Capacity
from chairlift.sim.plan.cheapest import Race
from chairlift.sim.plan.costs import cost_of
from chairlift.sim.plan.flips import SWING, Change
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.tables import (
    CHANGING,
    FLIPS,
    OUTCOMES,
    bought,
    feasible,
    flips,
    interval,
    latency_name,
    said_of,
    sentence,
    told_apart,
)
from chairlift.sim.plan.verdict import Verdict
from chairlift.sim.report.html import Figure, Page, curve, error_bars, hue, level, note, swatch, ticks

MOST_CURVES = 6
HEIGHT = 300  # pixels of a figure
SCALE = ((0.0, "#3b7dd8"), (0.5, "#9a62c7"), (1.0, "#d9622b"))  # of a number: seen on light and on dark paper

Keys = list[tuple[str, str]]  # of a legend: colour, label
Drawn = tuple[str, Figure, Keys]  # a title, the figure, its legend


def write(answer: Answer, path: Path) -> None:
    """Write the page. Raises OSError."""
    plan = answer.plan
    Page().write(
        path,
        "plan.html",
        kind="plan",
        name=plan.name,
        question=plan.spec.question or "",
        source=path.resolve().parent.name,
        promises=[str(promise) for promise in plan.spec.slo],
        sentence=sentence(answer),
        asked=answer.asked,
        headlines=list(_headlines(answer)),
        changes=_changes(answer) if answer.changes else None,
        capacities=_capacities(answer) if answer.capacities else None,
        headroom=_headroom(answer) if answer.headroom else None,
        races=[_race(race, answer.plan.unit) for race in answer.races],
        prices=_prices(answer),
        front=_front(answer) if answer.front else None,
        assumptions=answer.assumptions,
        outcomes=OUTCOMES,
        commands=answer.commands if not answer.failed else [],
    )


def _headlines(answer: Answer) -> Iterator[dict[str, Any]]:
    """The answers in a line each: words before, in and after the bold part, and smaller lines below."""
    for race in answer.races:
        rate = f"{race.rate_per_s:g} {answer.plan.unit}/s"
        if race.winner is None:
            lost = f"No system keeps the promises at {rate}."
            yield {"good": False, "before": lost, "main": "", "after": "", "lines": list(feasible(race))}
        else:
            best = race.winner.candidate
            after = f", ${race.winner.usd_per_hour:,.2f} an hour ({best.gpus} GPU{'s' * (best.gpus > 1)})"
            lines = [f"{race.winner.why}; steps: {best.backend}", *bought(answer, race)]
            yield {"good": True, "before": f"{rate}: ", "main": best.name, "after": after, "lines": lines}
    for candidate, capacity in answer.capacities[:3]:
        yield {
            "good": capacity.reached,
            "before": f"{candidate.name}: ",
            "main": interval(capacity),
            "after": f" {answer.plan.unit}/s",
            "lines": list(said_of(candidate, capacity)),
        }


def _capacities(answer: Answer) -> dict[str, Any]:
    return {
        "head": (
            *(
                "system",
                f"rate [interval], {answer.plan.unit}/s",
                "$/h",
                "$ per million tokens",
                "hours simulated",
                "limited by",
            ),
        ),
        "rows": [
            (
                *(c.name, interval(k), f"{c.usd_per_hour:,.2f}"),
                f"{cost_of(c, k.rate_per_s, answer.plan.prices).all:,.3g}" if k.reached else "–",
                *(f"{k.simulated_s / 3600:,.1f}", str(k.limiting or "")),
            )
            for c, k in answer.capacities
        ],
        "figures": list(
            _curves([(c.name, k) for c, k in answer.capacities], answer.plan.spec.slo, f"{answer.plan.unit}/s")
        ),
    }


def _curves(capacities: list[tuple[str, Capacity]], promises: list[Promise], unit: str) -> Iterator[Drawn]:
    """Rate against each promise's share, and against its percentile."""
    drawn = capacities[:MOST_CURVES]
    keys = [(swatch(i), name) for i, (name, _) in enumerate(drawn)]
    bands = [band for i, (_, capacity) in enumerate(drawn) for band in _band(capacity, hue(i))]
    for j, promise in enumerate(promises):
        traces = []
        for i, (name, capacity) in enumerate(drawn):
            near = _near(capacity)
            shares = [v.kept[j] for v in near]
            bars = error_bars([100 * (k.high - k.share) for k in shares], [100 * (k.share - k.low) for k in shares])
            traces.append(curve(i, name, [v.rate_per_s for v in near], [100 * k.share for k in shares], error_y=bars))
        figure = _figure(traces, unit, "% that met it", [level(100 * promise.wanted), *bands])
        figure["layout"]["annotations"] = [note("promised", 1, 100 * promise.wanted, "paper", "y", "right")]
        yield str(promise), figure, keys
        limits = promise.limits()
        name = f"p{100 * promise.wanted:g}_{next(iter(limits))}_ms"
        of_all = promise.tenant is None and promise.priority is None  # as figures are
        if len(limits) > 1 or not of_all or not any(name in v.figures for _, k in drawn for v in k.verdicts):
            continue
        [limit] = limits.values()
        traces = []
        for i, (system, capacity) in enumerate(drawn):
            near = [v for v in _near(capacity) if name in v.figures and v.figures[name][0] < 50 * limit]
            found = [v.figures[name] for v in near]
            bars = error_bars([high - mean for mean, _, high in found])
            traces.append(curve(i, system, [v.rate_per_s for v in near], [mean for mean, _, _ in found], error_y=bars))
        figure = _figure(traces, unit, "ms", [level(limit), *bands])
        seen = [value for trace in traces for value in trace["y"]]
        figure["layout"]["yaxis"] |= logarithmic(min([limit, *seen]), max([limit, *seen]))
        yield f"{latency_name(name)} over the rate (dotted: promised)", figure, keys


def logarithmic(low: float, high: float) -> Figure:
    """An axis for values from ``low`` to ``high``, each tick with its whole number: not 2 and 5 between 10 and 100.

    Ticks are at 1, 2 and 5 times the powers of ten, over more than three of them at the powers alone.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    parts = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [part * 10.0**power for power in range(first, last + 1) for part in parts]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.10g}" for tick in ticks]}


def _near(capacity: Capacity) -> list[Verdict]:
    """Rates up to twice the capacity: beyond, queues only grow."""
    most = 2 * capacity.rate_per_s if capacity.reached else math.inf
    return [v for v in capacity.verdicts if v.rate_per_s <= most and v.replications > 1]


def _band(capacity: Capacity, colour: str) -> list[Figure]:
    """The interval of a capacity as a shape behind the curves, if it has both ends."""
    if not 0 < capacity.low < capacity.high < math.inf:
        return []
    span = {"x0": capacity.low, "x1": capacity.high, "yref": "paper", "y0": 0, "y1": 1}
    return [{"type": "rect", **span, "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}, "layer": "below"}]


def _headroom(answer: Answer) -> dict[str, Any]:
    today = answer.plan.spec.given[0]
    times = list(answer.headroom[0].growth)
    rates = [h.capacity.rate_per_s for h in answer.headroom]
    highs = [h.capacity.high if math.isfinite(h.capacity.high) else h.capacity.rate_per_s for h in answer.headroom]
    bars = error_bars(
        [high - rate for high, rate in zip(highs, rates, strict=True)],
        [h.capacity.rate_per_s - h.capacity.low for h in answer.headroom],
    )
    bar = {"type": "bar", "x": [h.stress for h in answer.headroom], "y": rates, "error_y": bars, "width": 0.5}
    figure = _figure([bar | {"marker": {"color": hue(0)}}], "", f"{answer.plan.unit}/s", [level(today)])
    figure["layout"]["annotations"] = [note("today", 1, today, "paper", "y", "right")]
    return {
        "today": f"{today:g}",
        "head": ("under", f"rate [interval], {answer.plan.unit}/s", "× today", *(f"× {t:g}" for t in times)),
        "rows": [
            (h.stress, interval(h.capacity), f"{h.capacity.rate_per_s / today:.2f}", *(h.growth[t] for t in times))
            for h in answer.headroom
        ],
        "figures": [("max sustainable rate under stress", figure, [])],
    }


def _prices(answer: Answer) -> list[Drawn]:
    """The price of the cheapest system over the rate, if there are several rates."""
    won = [(race.rate_per_s, race.winner.candidate) for race in answer.races if race.winner is not None]
    if len(won) < 2:
        return []
    usd = [race.winner.usd_per_hour for race in answer.races if race.winner is not None]
    steps = {"color": hue(0), "width": 2, "shape": "vh"}
    trace = curve(0, "", [rate for rate, _ in won], usd, text=[best.name for _, best in won], line=steps)
    trace["hovertemplate"] = "%{x:g}/s: $%{y:.2f} an hour, %{text}<extra></extra>"
    figure = _figure([trace], f"{answer.plan.unit}/s", "$ an hour")
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    figure["layout"]["xaxis"] |= ticks([rate for rate, _ in won])
    return [("price of the cheapest that keeps the promises", figure, [])]


def _race(race: Race, unit: str) -> dict[str, Any]:
    simulated = [entry for entry in race.entries if entry.verdict is not None]
    excluded = race.of("excluded")
    return {
        "title": f"{race.rate_per_s:g} {unit}/s",
        "said": f"{told_apart(race).capitalize()}.",
        "simulated": [(e.candidate.name, f"{e.usd_per_hour:,.2f}", e.outcome, e.why) for e in simulated],
        "excluded": [
            (e.candidate.name, f"{e.candidate.usd_per_hour:,.2f}" if e.candidate.setup else "–", e.why)
            for e in excluded
        ],
    }


def _front(answer: Answer) -> dict[str, Any]:
    name = latency_name(answer.front[0].latency_name)
    points = answer.front
    trace = curve(
        *(0, "", [p.candidate.usd_per_hour for p in points], [p.latency_ms for p in points]),
        mode="markers",
        text=[f"{p.candidate.name}: {interval(p.capacity)} {answer.plan.unit}/s" for p in points],
        hovertemplate="%{text}<br>$%{x:.2f} an hour, %{y:.4g} ms<extra></extra>",
        marker={
            "size": 12,
            "color": [p.capacity.rate_per_s for p in points],
            "colorscale": SCALE,
            "showscale": True,
            "colorbar": {"title": {"text": f"{answer.plan.unit}/s"}, "thickness": 14, "outlinewidth": 0},
            "symbol": ["circle" if p.is_best else "circle-open" for p in points],
            "line": {"width": [0 if p.is_best else 3 for p in points]},
        },
    )
    title = f"price and {name} at {answer.races[-1].rate_per_s:g}/s (filled: on the front)"
    rows: Sequence[tuple[str, ...]] = [
        (
            *(p.candidate.name, "yes" if p.is_best else "", f"{p.candidate.usd_per_hour:,.2f}"),
            *(f"{usd:,.3g}" for usd in cost_of(p.candidate, answer.races[-1].rate_per_s, answer.plan.prices)),
            *(f"{p.latency_ms:,.4g}", interval(p.capacity)),
        )
        for p in points
    ]
    return {
        "head": (
            *("system", "on the front", "$/h", "$ per million tokens", "in", "out"),
            *(f"{name}, ms", f"rate [interval], {answer.plan.unit}/s"),
        ),
        "rows": rows,
        "figures": [(title, _figure([trace], "$ an hour", "ms"), [])],
    }


def _changes(answer: Answer) -> dict[str, Any]:
    """What would change the answer: a table, and a tornado of the price at each assumption's swing."""
    figures = tornado(answer.races[-1], answer.changes)
    return {"head": FLIPS, "rows": flips(answer), "said": CHANGING, "figures": figures}


def tornado(race: Race, changes: Sequence[Change]) -> list[Drawn]:
    """Bars from what the answer costs to what it would cost at each assumption's swing, if any differs."""
    now = race.winner
    assert now is not None
    told = sorted((c for c in changes if c.swing > 0), key=lambda c: c.swing)  # the widest bar at the top
    bars: list[Figure] = []
    none = "nothing will do"  # beside the widest bar too: neither cut off at the axis nor at the figure's edge
    for i, words in enumerate((f"÷ {SWING:g}", f"× {SWING:g}")):
        # a bar of no length carries the words: Plotly draws none of a bar without a value
        reach = [c.usd[i] - now.usd_per_hour if math.isfinite(c.usd[i]) else 0.0 for c in told]
        text = ["" if math.isfinite(c.usd[i]) else none for c in told]
        bar: Figure = {"type": "bar", "orientation": "h", "name": words, "x": reach, "y": [c.what for c in told]}
        bar |= {
            "base": now.usd_per_hour,
            "marker": {"color": hue(i)},
            "text": text,
            "textposition": "outside",
            "cliponaxis": False,
        }
        bar |= {"customdata": [c.usd[i] if math.isfinite(c.usd[i]) else None for c in told]}
        bar["hovertemplate"] = f"%{{y}} {words}: $%{{customdata:.2f}} an hour<extra></extra>"
        bars.append(bar)
    figure = _figure(bars, "$ an hour", "")
    figure["layout"] |= {"barmode": "overlay", "height": 90 + 34 * len(told)}
    figure["layout"]["yaxis"] = {"automargin": True}
    if any(none in bar["text"] for bar in bars):
        figure["layout"]["margin"] |= {"r": 8 * len(none)}
    title = (
        f"price of the answer where an assumption is {SWING:g} times as large or as small; now ${now.usd_per_hour:,.2f}"
    )
    keys = [(hue(i), f"{sign} {SWING:g}") for i, sign in enumerate("÷×")]
    return [(title, figure, keys)] if told else []


def _figure(traces: list[Figure], x: str, y: str, shapes: Sequence[Figure] = ()) -> Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return {"data": traces, "layout": {"height": HEIGHT, "shapes": list(shapes), "margin": {"t": 18}, **axes}}
