"""Published numbers beside simulated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from chairlift.sim.bad_input import Problem, did_you_mean
from chairlift.sim.results.metrics import QUANTILES
from chairlift.sim.scenario.schema import Scenario
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.study import Claim

if TYPE_CHECKING:
    from chairlift.sim.results.outcome import Outcome
    from chairlift.sim.study import Study

SERIES = ("ttft", "tpot", "itl", "e2el", "normalized_latency")
METRICS = (
    "offered_rate",  # requests a second that arrive
    "slo_missed",  # share of the finished requests that do not meet the SLO
    *("duration", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("mean_running", "peak_running", "kv_utilization", "kv_reserved", "kv_internal", "kv_free", "prefix_hit_rate"),
    *("preemptions", "swaps", "steps", "completed", "rejected", "utilization", "service_gap", "service_ratio"),
    *(f"{q}_{name}_ms" for name in SERIES for q in ("mean", "median", "std", *(f"p{p}" for p in QUANTILES[1:]))),
)


def wrong_names(document: Document, scenario: Scenario) -> list[Problem]:
    """Claims about variants, cases or metrics that there are not."""
    variants = [variant.name for variant in scenario.compare]
    cases = [case.name for case in scenario.cases]
    problems = []
    for i, claim in enumerate(scenario.claims):
        looked_up: list[tuple[str, str | None, Sequence[str], str]] = [
            ("of", claim.of, variants, "variant"),
            ("over", claim.over, variants, "variant"),
            ("case", claim.case, cases, "case"),
            ("metric", claim.metric, METRICS, "metric"),
            *(("within", metric, METRICS, "metric") for metric in claim.within),
        ]
        for key, name, known, kind in looked_up:
            if name is not None and name not in known:
                rule = f"no such {kind}{did_you_mean(name, list(known))}"
                problems.append(document.problem(("claims", i, key), rule, name))
    return problems


def checked(claims: Sequence[Claim], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """``claims.json``: each claim with the ``simulated`` number; None where the runs do not tell.

    ``bound``: "at least" where the highest case still is within the limits, "at most" where the lowest is not.
    """
    found = []
    for claim in claims:
        value, bound = _value(claim, claim.of, outcomes)
        if claim.over is not None:
            other, other_bound = _value(claim, claim.over, outcomes)
            value = value / other if value is not None and other else None
            opposite = {"at least": "at most", "at most": "at least", "": ""}[other_bound]
            bound = bound or opposite if not (bound and opposite and bound != opposite) else "about"
        found.append(
            {
                "says": claim.says,
                "of": claim.of,
                "over": claim.over,
                "metric": claim.metric,
                "published": claim.published,
                "simulated": value,
                "bound": bound,
                "because": claim.because,
            }
        )
    return found


def measure(outcome: Outcome, metric: str) -> float | None:
    """One number of one run."""
    summary = outcome.summary
    if metric == "offered_rate":
        trace = outcome.setup.trace
        return (len(trace) - 1) / trace.duration_s if trace.duration_s else None
    if metric == "slo_missed":
        good, done = summary["request_goodput"], summary["request_throughput"]
        return 1 - good / done if good is not None and done else None
    value = summary.get(metric)
    return None if value is None else float(value)


def table(study: Study, outcomes: Sequence[Outcome]) -> Table:
    """What was published, what came out here, and why the two differ."""
    found = Table(title=f"{study.name}: published and simulated", title_justify="left", box=box.SIMPLE_HEAD)
    found.add_column("")
    for label in ("published", "simulated", "ratio"):
        found.add_column(label, justify="right", no_wrap=True)
    for claim in checked(study.claims, outcomes):
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


def _value(claim: Claim, variant: str, outcomes: Sequence[Outcome]) -> tuple[float | None, str]:
    members = [o for o in outcomes if o.setup.variant == variant]
    if not claim.within:
        chosen = [o for o in members if o.setup.case == claim.case] if claim.case else members[-1:]
        return (measure(chosen[0], claim.metric), "") if chosen else (None, "")
    points = []
    for outcome in members:
        at = measure(outcome, claim.metric)
        over = [value / limit for name, limit in claim.within.items() if (value := measure(outcome, name)) is not None]
        if at is not None and over:
            points.append((at, max(over)))
    return capacity(sorted(points))


def capacity(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """Where the second number first crosses 1, linear between points in order of the first; and what bounds it."""
    if not points:
        return None, ""
    last: tuple[float, float] | None = None
    for at, over in points:
        if over > 1:
            if last is None:
                return at, "at most"
            return last[0] + (at - last[0]) * (1 - last[1]) / (over - last[1]), ""
        last = (at, over)
    return points[-1][0], "at least"
