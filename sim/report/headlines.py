"""Numbers of a run as HTML, with what each means."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from chairlift.sim.results.catalogue import LATENCIES, STATISTICS, Metric, fields, has_latency, shown, text


def datum(summary: dict[str, Any], key: str, unit: str) -> str:
    """The HTML of one number: what it is exactly stands in ``value``."""
    value = summary.get(key)
    raw = "" if value is None else repr(value)
    return f'<data data-key="{key}" value="{raw}">{escape(text(value, unit))}</data>'


def hint(meaning: str) -> str:
    """Attributes that show a definition on hover and on focus."""
    return f'class="term" tabindex="0" data-meaning="{escape(meaning, quote=True)}"'


def cards(summary: dict[str, Any], metrics: Sequence[Metric]) -> str:
    """A grid of numbers."""
    cells = []
    for metric in metrics:
        if shown(metric, summary):
            term = f"<dt><span {hint(metric.meaning)}>{escape(metric.label)}</span></dt>"
            cells.append(f"<div>{term}<dd>{datum(summary, metric.name, metric.unit)}</dd></div>")
    return f'<dl class="cards">{"".join(cells)}</dl>'


def latency_table(summary: dict[str, Any]) -> str:
    """Mean and percentiles of every latency."""
    head = "".join(f"<th>{label}</th>" for label in STATISTICS.values())
    rows = []
    for metric in LATENCIES:
        if has_latency(summary, metric.name):
            cells = "".join(f"<td>{datum(summary, field, metric.unit)}</td>" for field in fields(metric.name))
            rows.append(f"<tr><th><span {hint(metric.meaning)}>{metric.label}</span></th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
