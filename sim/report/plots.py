"""The figures of a report for a notebook: what a page draws with its own script, as `plotly.graph_objects.Figure`.

Each takes one or more outcomes of `simulate`, or runs of a results folder (``*read(Path("runs/my")).runs``), and draws
them in the same axes. ``my.yaml`` of the examples is the scenario of the README, which compares two policies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from chairlift.sim.report import figures
from chairlift.sim.report.html import ASSETS
from chairlift.sim.report.html import Figure as Drawing
from chairlift.sim.report.timeline import REQUEST_COLUMNS, TIMES, timeline, work
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.reader import RunResults

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HEAD = 34  # pixels above a figure, for its title


def plot_latency(*runs: Outcome | RunResults, metric: str = "ttft", dark: bool = False) -> Figure:
    """Which share of the requests waited at most how long: a curve a run, and a line where all have the same SLO.

    ``metric`` is "ttft", "tpot" or "e2el". Raises ValueError: no such metric, or no run.

    >>> from chairlift import load, plot_latency, simulate
    >>> outcomes = [simulate(setup) for setup in load("my.yaml", assignments=["workload.requests=300"]).setups]
    >>> figure = plot_latency(*outcomes, metric="tpot")
    >>> [curve.name for curve in figure.data], figure.layout.xaxis.title.text
    (['vllm', 'orca'], 'TPOT, ms')
    """
    if metric not in TIMES:
        raise ValueError(f"no such latency of a request: {metric!r}; there are {', '.join(TIMES)}")
    read = _read(runs)
    limits = {run.slo.get(f"{metric}_ms") for run in read}
    values = [run.requests(f"{metric}_ms")[f"{metric}_ms"].astype(np.float64) for run in read]
    limit = limits.pop() if len(limits) == 1 else None
    drawn = figures.latency(metric, list(zip(_names(read), values, strict=True)), limit)
    return _figure(drawn, "share of requests that waited at most so long", dark, legend=len(read) > 1)


def plot_throughput(*runs: Outcome | RunResults, dark: bool = False) -> Figure:
    """Tokens a second, prompts and outputs counted, and multiples of the first run: a bar a run.

    Raises ValueError: no run.

    >>> from chairlift import load, plot_throughput, simulate
    >>> outcomes = [simulate(setup) for setup in load("my.yaml", assignments=["workload.requests=300"]).setups]
    >>> [bars] = plot_throughput(*outcomes).data
    >>> list(bars.x) == [outcome.summary["total_token_throughput"] for outcome in outcomes]
    True
    """
    read = _read(runs)
    names = _names(read)
    title = "prompts and outputs counted" + (f"; multiples of {names[0]}" if len(read) > 1 else "")
    return _figure(figures.throughput(names, read, names[0]), title, dark)


def plot_over_time(run: Outcome | RunResults, dark: bool = False) -> Figure:
    """Throughput, what the batch does, who waits and how full the KV pools are, over the simulated time of one run.

    >>> from chairlift import load, plot_over_time, simulate
    >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
    >>> [curve.name for curve in plot_over_time(outcome).data][:2]
    ['prompt tokens/s', 'output tokens/s']
    """
    [read] = _read([run])
    drawn = figures.over_time(timeline(read, read.requests(*REQUEST_COLUMNS)))
    return _figure(drawn, _names([read])[0], dark)


def plot_memory(*runs: Outcome | RunResults, dark: bool = False) -> Figure:
    """What the KV pools held over busy time, in shares that add up to 1: a bar a run. Raises ValueError: no run.

    >>> from chairlift import load, plot_memory, simulate
    >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
    >>> {bar.name: bar.x[0] for bar in plot_memory(outcome).data}["used"] == outcome.summary["kv_utilization"]
    True
    """
    read = _read(runs)
    drawn = figures.memory(_names(read), [run.summary for run in read])
    return _figure(drawn, "KV memory, over busy time", dark, legend=True, above=True)


def plot_work(*runs: Outcome | RunResults, dark: bool = False) -> Figure:
    """What tokens were computed for, in shares that add up to 1: a bar a run. Raises ValueError: no run.

    >>> from chairlift import load, plot_work, simulate
    >>> outcome = simulate(load("my.yaml", assignments=["workload.requests=300"]).setups[0])
    >>> [bar.name for bar in plot_work(outcome).data]
    ['prompts', 'computed again', 'answers', 'padding']
    """
    read = _read(runs)
    done = []
    for run in read:
        requests = run.requests(*REQUEST_COLUMNS)
        done.append(work(run, requests, timeline(run, requests).totals))
    return _figure(figures.work(_names(read), done), "tokens computed", dark, legend=True, above=True)


def _read(runs: Sequence[Outcome | RunResults]) -> list[RunResults]:
    if not runs:
        raise ValueError("there is no run to draw: give outcomes of simulate(), or runs of a results folder")
    return [run.as_read() if isinstance(run, Outcome) else run for run in runs]


def _names(runs: Sequence[RunResults]) -> list[str]:
    """What each run is called, each differently: its case and variant, or its policy."""
    names: list[str] = []
    for run in runs:
        name = run.label or run.replicas[0].policy
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _figure(drawing: Drawing, title: str, dark: bool, legend: bool = False, above: bool = False) -> Figure:
    """``drawing`` in the colours of a page, as page.js dresses it; its legend beside it, or ``above``."""
    from plotly.graph_objects import Figure  # here: half a second

    layout = {
        "paper_bgcolor": "var(--paper)",
        "plot_bgcolor": "var(--paper)",
        "font": {"size": 12, "color": "var(--ink)"},
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}},
        "showlegend": legend,
        "title": {"text": title, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top"},
        **drawing["layout"],
    }
    layout["title"] |= {"pad": {"t": 10}, "font": {"size": 14}}
    if above:
        layout["legend"] = {"orientation": "h", "traceorder": "normal"} | {
            **{"xref": "container", "x": 1, "xanchor": "right", "yref": "container", "y": 1, "yanchor": "top"},
        }
    own = layout.get("margin", {})
    layout["margin"] = {"l": 48, "r": 16, "b": 44, **own, "t": own.get("t", 26) + HEAD}
    layout["height"] += HEAD
    for key in layout:
        if re.fullmatch(r"[xy]axis\d*", key):
            layout[key] = _axis(layout[key])
    return Figure(_painted({"data": drawing["data"], "layout": layout}, _colours(dark)))


def _axis(own: Drawing) -> Drawing:
    dressed = {
        **{"gridcolor": "var(--line)", "zeroline": False, "linecolor": "var(--line)", "tickcolor": "var(--line)"},
        **{"ticks": "outside", "ticklen": 4, "automargin": True},
        **own,
    }
    dressed["title"] = {"standoff": 8, "font": {"size": 12, "color": "var(--muted)"}, **own.get("title", {})}
    return dressed


def _painted(value: Any, colours: dict[str, str]) -> Any:
    """``value`` with each ``var(--name)`` in its texts made the colour of that name."""
    if isinstance(value, str):
        return re.sub(r"var\((--[\w-]+)\)", lambda found: colours[found[1]], value)
    if isinstance(value, dict):
        return {key: _painted(each, colours) for key, each in value.items()}
    if isinstance(value, list):
        return [_painted(each, colours) for each in value]
    return value


@cache
def _colours(dark: bool) -> dict[str, str]:
    """The palette of `page.css`: name of a variable → colour."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    parts = [r":root \{", *([r':root\[data-theme="dark"\] \{'] if dark else [])]
    found: dict[str, str] = {}
    for head in parts:
        block = re.search(head + r"(.*?)\}", css, re.DOTALL)
        found |= dict(re.findall(r"(--[\w-]+): (#\w+);", block[1])) if block else {}
    return found
