"""Every metric of a run: what it is called, its unit, which way is better, and what it means exactly.

A new metric is its computation in `sim.results.metrics` and one row here. Tables, report pages, comparisons, races of
a sweep, claims and promises of a plan all take their metrics from these rows. Names are the fields of
``summary.json``; a latency NAME stands for the six fields ``mean_NAME_ms``, ``median_NAME_ms``, ``std_NAME_ms``,
``p90_NAME_ms``, ``p95_NAME_ms`` and ``p99_NAME_ms``. The names are those of vLLM's serving benchmark where it has the
metric (`vllm/benchmarks/serve.py`, vLLM 0.23).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean


class Metric(NamedTuple):
    """One row of the catalogue.

    ``unit`` says how `text` writes a value: "" is a count, "x" a plain number, "%" a share from 0 to 1, "/s" a rate,
    "s", "ms" and "h" are times. ``better`` is "" where neither more nor less is better. A ``quiet`` metric is left
    out of tables and pages where it is 0.
    """

    name: str
    label: str
    unit: Literal["", "x", "%", "/s", "s", "ms", "h"]
    better: Literal["more", "less", ""]
    meaning: str
    quiet: bool = False

    def text(self, value: float | None) -> str:
        """``value`` for people, with the unit."""
        return text(value, self.unit)


SERVED = (  # what clients got
    Metric("completed", "requests completed", "", "more", "Requests that got their whole answer."),
    Metric(
        "rejected", "rejected", "", "less", "Requests that could never fit, met a full queue, or were refused.", True
    ),
    Metric("timed_out", "timed out", "", "less", "Requests whose client gave up.", True),
    Metric("failed", "failed", "", "less", "Requests lost with a replica that nobody took over.", True),
    Metric("duration", "duration", "s", "less", "From the first arrival to the last answer, in simulated time."),
    Metric("offered_rate", "requests/s arriving", "/s", "", "Arrivals after the first ÷ the time that they span."),
    Metric("request_throughput", "requests/s", "/s", "more", "Completed requests ÷ duration."),
    Metric(
        "request_goodput",
        "goodput, requests/s",
        "/s",
        "more",
        "Completed requests that met all of the SLO ÷ duration.",
    ),
    Metric("slo_missed", "SLO missed", "%", "less", "Share of completed requests that did not meet all of the SLO."),
    Metric("output_throughput", "output tokens/s", "/s", "more", "Output tokens of completed requests ÷ duration."),
    Metric(
        "total_token_throughput",
        "tokens/s",
        "/s",
        "more",
        "Prompt and output tokens of completed requests ÷ duration.",
    ),
    Metric("total_input_tokens", "prompt tokens", "", "", "Prompt tokens of completed requests."),
    Metric("total_output_tokens", "output tokens", "", "", "Output tokens of completed requests."),
    Metric(
        "service_gap",
        "weighted tokens, most − least",
        "x",
        "less",
        "Tokens (prompt 1, output 2) by which the tenant served most is ahead of the one served least, over the "
        "longest time in which all have requests waiting.",
    ),
    Metric(
        "service_ratio",
        "weighted tokens, most ÷ least",
        "x",
        "less",
        "Tokens (prompt 1, output 2) of the tenant served most ÷ those of the one served least, over the longest time "
        "in which all have requests waiting.",
    ),
)
REPLICAS = (  # what replicas did for it
    Metric(
        "mean_running", "running, mean", "x", "", "Admitted requests per replica, averaged over the time with steps."
    ),
    Metric("peak_running", "running, peak", "", "", "The most requests that one replica ran at once."),
    Metric(
        "kv_utilization", "KV used", "%", "more", "Tokens stored ÷ tokens of the KV pool, over the time with steps."
    ),
    Metric(
        "kv_reserved",
        "KV reserved",
        "%",
        "less",
        "Set aside for tokens still to come ÷ the pool, over the time with steps.",
    ),
    Metric(
        "kv_internal", "KV internal waste", "%", "less", "Held and never filled ÷ the pool, over the time with steps."
    ),
    Metric("kv_free", "KV free", "%", "", "Held by nobody ÷ the pool, over the time with steps."),
    Metric(
        "prefix_hit_rate",
        "prefix hits",
        "%",
        "more",
        "Prompt tokens found in the prefix cache ÷ prompt tokens of admitted requests.",
        True,
    ),
    Metric(
        "accepted_length",
        "accepted length",
        "x",
        "more",
        "Tokens a step that verifies drafts: 1 + drafts that became tokens of an answer ÷ such steps of a request.",
        True,
    ),
    Metric("draft_tokens", "drafts verified", "", "", "Drafts of tokens that steps verified, kept or not.", True),
    Metric("drafts_wasted", "drafts wasted", "%", "less", "Drafts that became no token ÷ drafts verified.", True),
    Metric("preemptions", "preemptions", "", "less", "Times that a running request lost its KV to make room."),
    Metric("swaps", "swapped", "", "less", "Preemptions whose KV went to host memory.", True),
    Metric("swapped_tokens", "tokens swapped", "", "less", "Tokens whose KV moved to host memory or back.", True),
    Metric(
        "utilization",
        "time in steps",
        "%",
        "",
        "Time in which replicas ran steps ÷ time in which they were up. No measure of load: a step for one request "
        "counts like a full one. Running requests and KV used say how full the steps were.",
    ),
    Metric(
        "bubble_share",
        "bubbles",
        "%",
        "less",
        "Of a pipeline: time in which a stage computes nothing while another one computes ÷ time in which any does, "
        "averaged over stages.",
        True,
    ),
    Metric(
        "engine_stops",
        "engine stops",
        "",
        "less",
        "Times that the engine itself would have stopped, by an assertion, where the simulation goes on: vLLM until "
        "0.26 as a token comes that it does not expect, of a pipeline's request that was preempted in flight.",
        True,
    ),
    Metric("busy_s", "busy time", "s", "less", "Time in which replicas ran steps, summed over replicas."),
    Metric("replica_hours", "replica hours", "h", "less", "Hours in which replicas were up, summed over replicas."),
    Metric("steps", "engine steps", "", "less", "Forward passes of all replicas."),
)
SIMULATION = (  # how it was simulated; only the first two are the same on every machine
    Metric("runs", "runs of steps", "", "", "Stretches of equal steps that the simulation took at once."),
    Metric("mean_leap", "steps a run", "x", "more", "Engine steps ÷ runs of steps."),
    Metric("wall_s", "simulated in", "s", "less", "Wall-clock time of the simulation on the machine that ran it."),
    Metric(
        "requests_per_wall_s",
        "requests/s simulated",
        "/s",
        "more",
        "Requests of the trace ÷ wall-clock time of the simulation.",
    ),
)
LATENCIES = (
    Metric("ttft", "TTFT", "ms", "less", "Time to first token: arrival → first token."),
    Metric(
        "tpot", "TPOT", "ms", "less", "Time per output token: (E2E − TTFT) ÷ (output tokens − 1), if there are several."
    ),
    Metric(
        "itl",
        "ITL",
        "ms",
        "less",
        "Inter-token latency: every gap between two tokens of a request, pooled. Tokens that come together, as kept "
        "drafts do, come in one message: one gap, as vLLM's benchmark counts it.",
    ),
    Metric("e2el", "E2E", "ms", "less", "End to end: arrival → last token (a static batch: its return)."),
    Metric("normalized_latency", "E2E per token", "ms", "less", "E2E ÷ output tokens."),
    Metric(
        "transfer",
        "KV transfer",
        "ms",
        "less",
        "End of the prompt on its prefill replica → its KV lies ready on the decode side.",
    ),
)
STATISTICS = {"mean": "mean", "median": "p50", "std": "std", "p90": "p90", "p95": "p95", "p99": "p99"}  # → their labels
PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}


def fields(latency: str) -> list[str]:
    """The fields of ``summary.json`` that a latency of that name has, in the order of `STATISTICS`."""
    return [f"{statistic}_{latency}_ms" for statistic in STATISTICS]


LATENCY = {metric.name: metric for metric in LATENCIES}
FIELDS: dict[str, Metric] = {metric.name: metric for metric in (*SERVED, *REPLICAS, *SIMULATION)} | {
    name: metric._replace(name=name, label=f"{metric.label} {label}")
    for metric in LATENCIES
    for name, label in zip(fields(metric.name), STATISTICS.values(), strict=True)
}  # of `summary.json`, by name


MOST = 1e18  # of a value in a file that is compared; one of an axis too

_OF_SOME = {  # what only some have: several tenants, drafts, stages, a hand-over of KV; the last two since version 0.2
    *("service_gap", "service_ratio", "accepted_length", "draft_tokens", "drafts_wasted", "bubble_share"),
    *("engine_stops", *fields("transfer")),
    *("offered_rate", "slo_missed"),
}
_MAYBE_NONE = {  # what a run may have no value of: nothing arrived later, nobody was promised anything, no steps
    *("offered_rate", "request_goodput", "slo_missed", "service_gap", "service_ratio", "accepted_length"),
    *("drafts_wasted", "mean_leap", "requests_per_wall_s"),
    *(name for metric in LATENCIES for name in fields(metric.name)),
}


def unsound(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The first field of a summary that was read back that is wrong, and why; two empty texts if all are sound."""
    for name in (*FIELDS, "assumptions"):
        if name not in summary and name not in _OF_SOME:
            return name, "it is missing"
    for name, value in summary.items():
        if name in ("case", "variant"):
            wrong = "" if isinstance(value, str) else "it must be text"
        elif name == "assumptions":
            texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
            wrong = "" if texts else "it must hold texts"
        elif name not in FIELDS:
            wrong = f"no such metric{did_you_mean(name, list(FIELDS))}"
        elif value is None:
            wrong = "" if name in _MAYBE_NONE else "it must be a number"
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            wrong = "" if number and abs(value) <= sys.float_info.max else "it must be a number"
        if wrong:
            return name, wrong
    return "", ""


def shown(metric: Metric, summary: Mapping[str, Any]) -> bool:
    """Whether tables and pages show ``metric`` of the run that has this ``summary``."""
    value = summary.get(metric.name)
    return value is not None and not (metric.quiet and not value)


def has_latency(summary: Mapping[str, Any], latency: str) -> bool:
    """Whether a run measures the latency at all: without a hand-over of KV there is no ``transfer``."""
    return fields(latency)[0] in summary


def sign(name: str, option: str = "") -> int:
    """1 if more of the field ``name``, said by the command's ``option``, is better, -1 if less is.

    Raises `BadInput` where neither is, or where the catalogue has no such field.
    """
    path = "" if option else "metric"
    if name not in FIELDS:
        raise BadInput(Problem(f"no such metric{did_you_mean(name, list(FIELDS))}", option, path=path, value=name))
    better = FIELDS[name].better
    if not better:
        raise BadInput(Problem("neither more nor less of it is better: choose another", option, path=path, value=name))
    return 1 if better == "more" else -1


def title(name: str) -> str:
    """What a plot of the field ``name`` is headed: label and unit, or the bare name if the catalogue has none."""
    metric = FIELDS.get(name)
    if metric is None:
        return name
    return f"{metric.label}, {metric.unit}" if metric.unit in ("ms", "s", "h") else metric.label


def text(value: float | None, unit: str) -> str:
    """``value`` in ``unit`` for people: two digits or more; 10,000 ms and more are written in s."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{value:.1%}"
    if unit == "ms":
        return f"{_digits(value / 1000)} s" if abs(value) >= 10_000 else f"{_digits(value)} ms"
    if unit == "":
        return f"{value:,.0f}"
    number = _digits(value)
    return f"{number} {unit}" if unit in ("s", "h") else number


def _digits(value: float) -> str:
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or not size else f"{value:.2g}"
