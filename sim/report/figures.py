"""The curves and bars of a report as Plotly figures: plain dictionaries, drawn by the plotly.js in the page.

Colours are CSS variables such as ``var(--decode)``, which the page replaces: a figure follows light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.report.html import INK, MUTED, Figure, dash, hue, note
from chairlift.sim.report.timeline import Timeline, cdf
from chairlift.sim.results.catalogue import LATENCY
from chairlift.sim.results.reader import RunResults

Floats = npt.NDArray[np.float64]
Part = tuple[str, str, Sequence[float], Sequence[str]]  # label, colour, a share a bar, more words a bar

WIDE = 50  # times from a distribution's 1st to its 99th percentile from which on the axis is logarithmic
ROW = 20  # pixels of a bar
LONG = 0.6  # of the longest bar: from there on its text stands inside it
STATES = {  # what a slot does → how it is named
    "decoding": ("decode", "decode"),
    "prefilling": ("prefill", "prefill"),
    "stalled": ("stalled", "stalled"),
    "padding": ("padding", "padding"),
}

KV = (  # label, colour, metric
    ("used", "decode", "kv_utilization"),
    ("reserved", "prefill", "kv_reserved"),
    ("never filled", "padding", "kv_internal"),
    ("free", "idle", "kv_free"),
)
WORK = (  # label, colour, key of `timeline.work`
    ("prompts", "prefill", "prompts"),
    ("computed again", "last", "again"),
    ("answers", "decode", "answers"),
    ("drafts rejected", "stalled", "rejected"),  # only where there are any
    ("padding", "padding", "padding"),
)


def rounded(values: npt.NDArray[Any]) -> list[float]:
    """Five digits: more than a screen shows."""
    return [float(f"{v:.5g}") for v in values.tolist()]


def latency(metric: str, runs: Sequence[tuple[str, Floats]], limit: float | None) -> Figure:
    """Cumulative shares of one latency: a curve for each (name, ms) of ``runs``, and the SLO ``limit`` as a line."""
    curves = [(name, *cdf(values)) for name, values in runs]
    drawn = [values for _, values, _ in curves if len(values)]
    longest = max((float(v[-1]) for v in drawn), default=0.0)
    seconds = longest >= 10_000
    scale, unit = (1000, "s") if seconds else (1, "ms")
    low = min((float(v[int(0.01 * len(v))]) for v in drawn), default=0.0)
    high = max((float(v[int(0.99 * len(v)) - 1]) for v in drawn), default=0.0)
    logarithmic = low > 0 and high / low > WIDE
    traces = []
    for i, (name, values, shares) in enumerate(curves):
        keep = values > 0 if logarithmic else np.ones(len(values), dtype=bool)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": rounded(values[keep] / scale),
                "y": rounded(shares[keep]),
                "line": {"color": hue(i), "width": 2, "dash": dash(i), "shape": "hv"},
                "hovertemplate": f"%{{y:.1%}} ≤ %{{x:.4g}} {unit}<extra>{escape(name)}</extra>",
            }
        )
    shapes, notes = [], []
    if limit is not None:
        x = limit / scale
        shapes.append(_line(x, "x"))
        met = ""
        if len(runs) == 1 and len(runs[0][1]):
            good = runs[0][1][~np.isnan(runs[0][1])]
            met = f": {np.mean(good <= limit):.1%}" if len(good) else ""
        notes.append(note(f"SLO {x:g} {unit}{met}", float(np.log10(x)) if logarithmic else x, 1.0))
    axis: Figure = {"title": {"text": f"{LATENCY[metric].label}, {unit}"}, "type": "log" if logarithmic else "linear"}
    if logarithmic:
        axis["dtick"] = 1
    else:
        axis["rangemode"] = "tozero"
    return {
        "data": traces,
        "layout": {
            "height": 280,
            "xaxis": axis,
            "yaxis": {"range": [0, 1.02], "tickformat": ".0%", "dtick": 0.25},
            "shapes": shapes,
            "annotations": notes,
            "margin": {"t": 22 if notes else 8},
        },
    }


def throughput(names: Sequence[str], runs: Sequence[RunResults], baseline: str) -> Figure:
    """Tokens per second of every run, as multiples of ``baseline``'s too, beside published multiples."""
    rates = [run.summary["total_token_throughput"] for run in runs]
    base = rates[names.index(baseline)] if baseline in names else rates[0]
    texts = [f"{rate:,.0f}" + (f"   {rate / base:.1f}×" if base else "") for rate in rates]
    for i, run in enumerate(runs):
        if run.published is not None:
            texts[i] += f" ({run.published:g}×)"
    traces: list[Figure] = [
        {
            "type": "bar",
            "orientation": "h",
            "y": list(names),
            "x": rates,
            "text": texts,
            "textposition": ["inside" if rate > LONG * max(rates) else "outside" for rate in rates],
            "insidetextanchor": "end",
            "insidetextfont": {"color": "var(--paper)"},
            "constraintext": "none",
            "cliponaxis": False,
            "marker": {"color": [hue(i) for i in range(len(runs))]},
            "hovertemplate": "%{y}: %{x:,.1f} tokens/s<extra></extra>",
        }
    ]
    layout = _bars(len(runs), "tokens/s", [0, max(rates) * 1.2 or 1])
    return {"data": traces, "layout": layout}


def waterfall(runs: Sequence[RunResults], rungs: Sequence[dict[str, str]]) -> Figure | None:
    """What each rung gains over the one before, on a logarithmic axis, where equal factors are equally long."""
    rate = {run.variant: run.summary["total_token_throughput"] for run in runs}
    steps = [(rung["variant"], rung["because"], rate[rung["variant"]]) for rung in rungs if rate.get(rung["variant"])]
    if len(steps) < 2:
        return None
    labels = [steps[0][0], *(because or name for name, because, _ in steps[1:]), steps[-1][0]]
    befores = [None, *(rate for _, _, rate in steps[:-1]), None]
    afters = [rate for _, _, rate in steps] + [steps[-1][2]]
    floor = min(afters) / 1.6
    texts, hovers, colours, bases, sizes = [], [], [], [], []
    for i, (before, after) in enumerate(zip(befores, afters, strict=True)):
        bases.append(before or floor)
        sizes.append(after - (before or floor))
        if before is None:
            texts.append(f"{after:,.0f} tokens/s" + (f" = {after / afters[0]:.1f}×" if i else ""))
            hovers.append(f"{after:,.1f} tokens/s")
            colours.append("var(--stalled)")
        else:
            texts.append(f"× {after / before:.2f}")
            hovers.append(f"{steps[i - 1][0]} → {steps[i][0]}: {before:,.1f} → {after:,.1f} tokens/s")
            colours.append("var(--decode)" if after >= before else "var(--padding)")
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": [f"{i}" for i in range(len(labels))],
        "base": bases,
        "x": sizes,
        "text": texts,
        "textposition": ["outside"] * (len(labels) - 1) + ["inside"],
        "insidetextanchor": "end",
        "insidetextfont": {"color": "var(--on-mark)"},
        "cliponaxis": False,
        "customdata": hovers,
        "marker": {"color": colours},
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    layout = _bars(len(labels), "tokens/s, logarithmic", [np.log10(floor), np.log10(max(afters) * 3)])
    layout["xaxis"]["type"] = "log"
    layout["xaxis"]["dtick"] = 1
    layout["yaxis"].update(tickvals=bar["y"], ticktext=[escape(label) for label in labels])
    return {"data": [bar], "layout": layout}


def shares(names: Sequence[str], parts: Sequence[Part], title: str) -> Figure:
    """Stacked bars to 100 %."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label,
            "y": list(names),
            "x": list(values),
            "customdata": list(words),
            "text": [f"{v:.0%}" if v >= 0.12 else "" for v in values],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "insidetextfont": {"color": MUTED if colour == "idle" else "var(--on-mark)", "size": 11},
            "constraintext": "none",
            "marker": {"color": f"var(--{colour})"},
            "hovertemplate": f"%{{y}}: {label} %{{x:.1%}}%{{customdata}}<extra></extra>",
        }
        for label, colour, values, words in parts
    ]
    layout = _bars(len(names), title, [0, 1])
    layout["xaxis"].update(tickformat=".0%", dtick=0.25)
    layout["margin"]["r"] = 24  # half of the last label
    layout["barmode"] = "stack"
    return {"data": traces, "layout": layout}


def memory(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> Figure:
    """What the KV pools held, by `KV`: a bar a run."""
    parts = [(label, colour, [each[key] for each in summaries], [""] * len(names)) for label, colour, key in KV]
    return shares(names, parts, "share of the KV pools")


def work(names: Sequence[str], works: Sequence[dict[str, int]]) -> Figure:
    """What tokens were computed for, by `WORK`: a bar a run."""
    parts = []
    for label, colour, key in WORK:
        if key == "rejected" and not any(each[key] for each in works):
            continue
        told = [each[key] / max(1, sum(each.values())) for each in works]
        parts.append((label, colour, told, [f" ({each[key]:,} tokens)" for each in works]))
    return shares(names, parts, "share of token slots")


def over_time(line: Timeline) -> Figure:
    """Throughput, what the batch does, who waits and how full the KV pools are, above one another."""
    edges, curves = line.edges, line.curves
    x = rounded((edges[:-1] + edges[1:]) / 2)
    traces: list[Figure] = []

    def add(row: int, name: str, label: str, colour: str, unit: str, fill: bool = False, stack: bool = False) -> None:
        trace: Figure = {
            "type": "scatter",
            "mode": "lines",
            "name": label,
            "x": x,
            "y": rounded(curves[name]),
            "yaxis": f"y{row}" if row > 1 else "y",
            "line": {
                "color": f"var(--{colour})",
                "width": 0.5 if stack else 1.5,
                "shape": "hvh" if stack else "linear",
            },
            "hovertemplate": f"{label} %{{y:{unit}}}<extra></extra>",
        }
        if fill:
            trace["fill"] = "tozeroy"
        if stack:
            trace.update(stackgroup=f"s{row}", fillcolor=f"var(--{colour})")
            trace["line"].update(width=0.5, shape="hvh")
        traces.append(trace)

    add(1, "prompt", "prompt tokens/s", "prefill", ",.0f")
    add(1, "output", "output tokens/s", "decode", ",.0f")
    for name, (label, colour) in STATES.items():
        if curves[name].any():
            add(2, name, label, colour, ".1f", stack=True)
    add(3, "waiting", "waiting", "ink", ".1f", fill=True)
    add(4, "held", "held", "stalled", ".1%")
    add(4, "kv", "used", "decode", ".1%", fill=True)
    titles = (
        "<b>tokens/s</b>   " + _key(("output", "decode"), ("prompt", "prefill")),
        "<b>slots</b>   " + _key(*(named for name, named in STATES.items() if curves[name].any())),
        "<b>requests waiting</b>",
        "<b>KV pools</b>   " + _key(("used", "decode"), ("held", "stalled")),
    )
    layout: Figure = {
        "height": 620,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "simulated time, s"}, "anchor": "y4", "range": [float(edges[0]), float(edges[-1])]},
        "annotations": [],
    }
    height, gap = 0.19, 0.08
    for i, title in enumerate(titles):
        top = 1 - i * (height + gap)
        axis: Figure = {"domain": [max(0, top - height), top], "rangemode": "tozero", "nticks": 4}
        if i == 3:
            axis["tickformat"] = ".2~%"
        layout["yaxis" + (str(i + 1) if i else "")] = axis
        layout["annotations"].append(
            {"text": title, "x": 0, "xref": "paper", "xanchor": "left", "y": top, "yref": "paper", "yanchor": "bottom"}
            | {"showarrow": False, "align": "left"}
        )
    return {"data": traces, "layout": layout}


def _key(*entries: tuple[str, str]) -> str:
    return "  ".join(f'<span style="color:var(--{colour})">■</span> {label}' for label, colour in entries)


def _bars(count: int, title: str, span: list[float]) -> Figure:
    return {
        "height": 74 + count * (ROW + 10),
        "bargap": 0.3,
        "xaxis": {"title": {"text": title}, "range": [float(v) for v in span]},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False, "ticks": "", "type": "category"},
        "margin": {"l": 10, "t": 8},
    }


def _line(at: float, axis: str) -> Figure:
    return {
        "type": "line",
        "xref": axis,
        "yref": "paper",
        "x0": at,
        "x1": at,
        "y0": 0,
        "y1": 1,
        "line": {"color": INK, "width": 1.2, "dash": "dash"},
    }
