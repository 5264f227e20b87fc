"""The numbers that people look for first: what each is called, how it is written, and what it means exactly."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple


class Headline(NamedTuple):
    """One field of ``summary.json``."""

    key: str
    label: str
    unit: str  # "", "ms" (shown as s where long), "s", "h", "/s", "%" of a share, "x" for plain decimals
    meaning: str


SERVED = (
    Headline("completed", "requests completed", "", "Requests that got their whole answer."),
    Headline("rejected", "rejected", "", "Requests that could never fit, met a full queue, or were refused."),
    Headline("timed_out", "timed out", "", "Requests whose client gave up."),
    Headline("failed", "failed", "", "Requests lost with a replica that nobody took over."),
    Headline("duration", "duration", "s", "From the first arrival to the last answer, in simulated time."),
    Headline("request_throughput", "requests/s", "/s", "Completed requests ÷ duration."),
    Headline("request_goodput", "goodput, requests/s", "/s", "Completed requests that met all of the SLO ÷ duration."),
    Headline("output_throughput", "output tokens/s", "/s", "Output tokens of completed requests ÷ duration."),
    Headline("total_token_throughput", "tokens/s", "/s", "Prompt and output tokens of completed requests ÷ duration."),
    Headline("total_input_tokens", "prompt tokens", "", "Prompt tokens of completed requests."),
    Headline("total_output_tokens", "output tokens", "", "Output tokens of completed requests."),
)
REPLICAS = (
    Headline("mean_running", "running, mean", "x", "Admitted requests per replica, averaged over busy time."),
    Headline("peak_running", "running, peak", "", "The most requests that one replica ran at once."),
    Headline("kv_utilization", "KV used", "%", "Tokens stored ÷ tokens of the KV pool, over busy time."),
    Headline("kv_reserved", "KV reserved", "%", "Set aside for tokens still to come ÷ the pool, over busy time."),
    Headline("kv_internal", "KV internal waste", "%", "Held and never filled ÷ the pool, over busy time."),
    Headline("kv_free", "KV free", "%", "Held by nobody ÷ the pool, over busy time."),
    Headline(
        "prefix_hit_rate", "prefix hits", "%", "Prompt tokens found in the prefix cache ÷ those of admitted requests."
    ),
    Headline("preemptions", "preemptions", "", "Times that a running request lost its KV to make room."),
    Headline("utilization", "replicas busy", "%", "Time in which replicas ran steps ÷ time in which they were up."),
    Headline("replica_hours", "replica hours", "h", "Hours in which replicas were up, summed."),
    Headline("steps", "engine steps", "", "Forward passes of all replicas."),
    Headline("wall_s", "simulated in", "s", "Wall-clock time that the simulation took on the machine that ran it."),
)
LATENCIES = (
    Headline("ttft", "TTFT", "ms", "Time to first token: arrival → first token."),
    Headline("tpot", "TPOT", "ms", "Time per output token: (E2E − TTFT) ÷ (output tokens − 1), if there are several."),
    Headline("itl", "ITL", "ms", "Inter-token latency: every gap between two tokens of a request, pooled."),
    Headline("e2el", "E2E", "ms", "End to end: arrival → last token (a static batch: its return)."),
    Headline("normalized_latency", "E2E per token", "ms", "E2E ÷ output tokens."),
)
STATISTICS = (("mean", "mean"), ("median", "p50"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99"))
QUIET_ZERO = ("rejected", "timed_out", "failed", "prefix_hit_rate")  # not worth a place where they are 0


def text(value: float | None, unit: str) -> str:
    """``value`` for people: three digits or more, with its unit."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{value:.1%}"
    if unit == "ms":
        return f"{_digits(value / 1000)} s" if abs(value) >= 10_000 else f"{_digits(value)} ms"
    if unit == "":
        return f"{value:,.0f}"
    number = _digits(value)
    return {"s": f"{number} s", "h": f"{number} h"}.get(unit, number)


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def datum(summary: dict[str, Any], key: str, unit: str) -> str:
    """The HTML of one number: what it is exactly stands in ``value``."""
    value = summary.get(key)
    raw = "" if value is None else repr(value)
    return f'<data data-key="{key}" value="{raw}">{escape(text(value, unit))}</data>'


def hint(meaning: str) -> str:
    """Attributes that show a definition on hover and on focus."""
    return f'class="term" tabindex="0" data-meaning="{escape(meaning, quote=True)}"'


def cards(summary: dict[str, Any], headlines: tuple[Headline, ...]) -> str:
    """A grid of numbers."""
    cells = []
    for key, label, unit, meaning in headlines:
        value = summary.get(key)
        if value is None or (key in QUIET_ZERO and not value):
            continue
        term = f"<dt><span {hint(meaning)}>{escape(label)}</span></dt>"
        cells.append(f"<div>{term}<dd>{datum(summary, key, unit)}</dd></div>")
    return f'<dl class="cards">{"".join(cells)}</dl>'


def latency_table(summary: dict[str, Any]) -> str:
    """Mean and percentiles of every latency."""
    head = "".join(f"<th>{label}</th>" for _, label in STATISTICS)
    rows = []
    for key, label, unit, meaning in LATENCIES:
        cells = "".join(f"<td>{datum(summary, f'{statistic}_{key}_ms', unit)}</td>" for statistic, _ in STATISTICS)
        rows.append(f"<tr><th><span {hint(meaning)}>{label}</span></th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
