"""What was promised of latencies, and how many requests of one run were served so, in the order they came.

A percentile is a share: p99 of TTFT is at most 500 ms exactly where at least 99 % of requests have a TTFT of at most
500 ms. So every promise is a share of requests (of gaps between tokens, for ITL) that meet limits, and a run tells
how many of each of its `BINS` parts did. `sim.plan.verdict` judges many runs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from chairlift.sim.results.catalogue import LATENCY
from chairlift.sim.results.metrics import inter_token_gaps, request_latencies
from chairlift.sim.results.records import RequestRecords, RunRecords, Status
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.strict import Spec

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BINS = 100  # parts of a run, of equally many requests: fine enough to cut a warm-up off
CAP = 4.0  # times its limit at which a latency stops to count as worse, so that one straggler is no warm-up
Limit = Annotated[float, Field(gt=0, le=1e10, description="Milliseconds.")]


class Promise(Spec):
    """At least a share of the requests meets all the limits given: a percentile, or a share of goodput."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="Of requests, such as 0.99.")
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = Field(
        default=None, description="The same in percent: 99 says that the p99 is within the limit."
    )
    ttft_ms: Limit | None = Field(default=None, description="Time to the first token.")
    tpot_ms: Limit | None = Field(default=None, description="Mean time per further token; alone: of longer answers.")
    itl_ms: Limit | None = Field(default=None, description="Every gap between two tokens; stands alone.")
    e2el_ms: Limit | None = Field(default=None, description="Time to the last token.")
    tenant: str | None = Field(default=None, description="Only of this tenant's requests.")
    priority: int | None = Field(default=None, description="Only of requests of this priority.")

    @model_validator(mode="after")
    def _one_share_some_limits(self) -> Promise:
        if (self.share is None) == (self.percentile is None):
            raise ValueError("must have exactly one of share and percentile")
        limits = self.limits()
        if not limits:
            raise ValueError("must have a limit: ttft_ms, tpot_ms, itl_ms or e2el_ms")
        if self.itl_ms is not None and (len(limits) > 1 or self.tenant is not None or self.priority is not None):
            raise ValueError("itl_ms is of all gaps between tokens: it must stand alone, in a promise of its own")
        return self

    @property
    def wanted(self) -> float:
        """The share, 0 to 1."""
        return self.share if self.share is not None else (self.percentile or 0) / 100

    def limits(self) -> dict[str, float]:
        """Metric → most milliseconds."""
        found = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "itl": self.itl_ms, "e2el": self.e2el_ms}
        return {metric: limit for metric, limit in found.items() if limit is not None}

    def __str__(self) -> str:
        limits = self.limits()
        of = f" of {self.tenant}" if self.tenant is not None else ""
        of += f" of priority {self.priority}" if self.priority is not None else ""
        if len(limits) == 1:
            [(metric, limit)] = limits.items()
            return f"p{100 * self.wanted:g} {LATENCY[metric].label}{of} ≤ {limit:g} ms"
        told = " and ".join(f"{LATENCY[metric].label} ≤ {limit:g} ms" for metric, limit in limits.items())
        return f"{100 * self.wanted:g} % of requests{of}: {told}"


class Sample(NamedTuple):
    """One run, as far as promises go. Lists of `BINS` values (B) in order of arrival, for each of J promises."""

    starts_s: list[float]  # (B,) arrival of a bin's first request
    end_s: float  # the last arrival
    stay_s: float  # 99 of 100 requests (of sessions: from their start) were answered within so much time
    severity: list[float]  # (B,) mean of the worst latency as a part of its limit, at most `CAP`
    eligible: list[list[int]]  # (J, B) requests (gaps) that a promise is of
    met: list[list[int]]  # (J, B) those that met its limits
    figures: dict[str, float]  # percentiles and the like, for people to read
    simulated_s: float
    wall_s: float = 0.0


class Latency(NamedTuple):
    """Columns of requests in order of arrival, shape (n,); seconds and ms. What was not served has infinite times."""

    arrival_s: Floats
    ttft: Floats
    tpot: Floats  # 0 where there is one token only, as vLLM counts goodput
    e2el: Floats
    several: Bools  # has more than one token
    tenant: npt.NDArray[Any] | None = None  # names
    priority: npt.NDArray[np.int64] | None = None


class Gaps(NamedTuple):
    """Gaps between tokens, shape (g,) each."""

    at_s: Floats
    ms: Floats
    often: npt.NDArray[np.int64]


def sample_of(
    promises: Sequence[Promise],
    times: Latency,
    gaps: Gaps | None = None,
    wall_s: float = 0.0,
    since_s: Floats | None = None,
) -> Sample:
    """``times`` in bins; at least `BINS` requests. ``since_s``: when the session of each started, if it has one."""
    n = len(times.arrival_s)
    edges = np.linspace(0, n, BINS + 1).astype(np.int64)
    worst = np.zeros(n)
    eligible, met = [], []
    for promise in promises:
        limits = promise.limits()
        if "itl" in limits:
            assert gaps is not None
            bins = np.searchsorted(times.arrival_s[edges[:-1]], gaps.at_s, side="right") - 1
            bins = np.clip(bins, 0, BINS - 1)
            good = gaps.ms <= limits["itl"]
            eligible.append(np.bincount(bins, gaps.often, BINS).astype(np.int64).tolist())
            met.append(np.bincount(bins, gaps.often * good, BINS).astype(np.int64).tolist())
            worst = np.maximum(worst, times.tpot / limits["itl"])  # by request there is but the mean gap
            continue
        which = _which(promise, times)
        good = np.ones(n, dtype=bool)
        for metric, limit in limits.items():
            values = getattr(times, metric)
            good &= values <= limit
            worst = np.maximum(worst, np.where(which, values / limit, 0))
        eligible.append(np.add.reduceat(which.astype(np.int64), edges[:-1]).tolist())
        met.append(np.add.reduceat((which & good).astype(np.int64), edges[:-1]).tolist())
    done = np.isfinite(times.e2el)
    served = times.e2el[done] / 1e3
    if since_s is not None:
        served = served + (times.arrival_s - since_s)[done]
    stay = float(np.percentile(served, 99)) if len(served) else 0.0
    end = float(times.arrival_s[-1])
    severity = np.add.reduceat(np.minimum(worst, CAP), edges[:-1]) / np.diff(edges)
    figures = _figures(promises, times, gaps, stay, end)
    last = end + (float(times.e2el[done].max()) / 1e3 if len(served) else 0.0)
    return Sample(
        times.arrival_s[edges[:-1]].tolist(), end, stay, severity.tolist(), eligible, met, figures, last, wall_s
    )


def _which(promise: Promise, times: Latency) -> Bools:
    which = np.ones(len(times.arrival_s), dtype=bool)
    if list(promise.limits()) == ["tpot"]:
        which &= times.several  # as percentiles of TPOT are
    if promise.tenant is not None and times.tenant is not None:
        which &= times.tenant == promise.tenant
    if promise.priority is not None and times.priority is not None:
        which &= times.priority == promise.priority
    return which


def _figures(
    promises: Sequence[Promise], times: Latency, gaps: Gaps | None, stay: float, end: float
) -> dict[str, float]:
    """The percentiles that were promised, over the middle of the run, and p50 and p99 of all metrics."""
    begin, close = window(float(times.arrival_s[0]), end, stay)
    middle = (times.arrival_s >= begin) & (times.arrival_s <= close)
    wanted = {(metric, q) for metric in ("ttft", "tpot", "e2el") for q in (50.0, 99.0)}
    wanted |= {(metric, 100 * p.wanted) for p in promises if len(p.limits()) == 1 for metric in p.limits()}
    found = {}
    for metric, q in sorted(wanted):
        if metric == "itl":
            continue
        values = getattr(times, metric)[middle & times.several if metric == "tpot" else middle]
        if len(values):
            value = float(np.percentile(values, q, method="lower" if not np.isfinite(values).all() else "linear"))
            found[f"p{q:g}_{metric}_ms"] = value if np.isfinite(value) else 1e12
    if gaps is not None and len(gaps.ms):
        order = np.argsort(gaps.ms)
        below = np.cumsum(gaps.often[order])
        for q in sorted({50.0, 99.0} | {q for metric, q in wanted if metric == "itl"}):
            at = min(int(np.searchsorted(below, q / 100 * below[-1])), len(order) - 1)
            found[f"p{q:g}_itl_ms"] = float(gaps.ms[order[at]])
    return found


def window(begin: float, end: float, stay: float) -> tuple[float, float]:
    """Arrivals between these times met a system that the first requests had left, and further arrivals behind them.

    At most a quarter of the run is cut off at either end.
    """
    cut = min(stay, (end - begin) / 4)
    return begin + cut, end - cut


def measured(promises: Sequence[Promise], requests: RequestRecords, runs: list[RunRecords], wall_s: float) -> Sample:
    """The sample of a simulated run."""
    columns = requests.columns()
    arrival = np.asarray(columns["arrival_ps"])
    done = np.asarray(columns["status"]) == Status.FINISHED
    several = np.asarray(columns["output_tokens"]) > 1
    found = request_latencies(requests)
    ttft, tpot, e2el = (np.where(done, np.nan_to_num(found[name]), np.inf) for name in ("ttft", "tpot", "e2el"))
    trace = requests.trace
    order = np.argsort(arrival, kind="stable")
    tenant = None if trace.tenant is None else np.array(trace.tenants)[trace.tenant][order]
    priority = None if trace.priority is None else trace.priority[order].astype(np.int64)
    times = Latency(arrival[order] / PS_PER_S, ttft[order], tpot[order], e2el[order], several[order], tenant, priority)
    gaps = _gaps(runs) if any("itl" in promise.limits() for promise in promises) else None
    since = None
    if trace.follows is not None:
        root = np.arange(len(trace))
        for i in np.flatnonzero(trace.follows >= 0).tolist():
            root[i] = root[trace.follows[i]]  # an earlier row
        since = (arrival[root] / PS_PER_S)[order]
    return sample_of(promises, times, gaps, wall_s, since)


def _gaps(runs: list[RunRecords]) -> Gaps:
    """All gaps between tokens with the time of the run of steps they fell into, replica by replica.

    Gaps that no run shows carry no time; they come in order of time, and are put at equal distances.
    """
    parts = []
    for each in runs:
        ms, count = inter_token_gaps([each])
        table = each.runs()
        keep = table["decodes"] > 0
        starts, more = table["start_ps"][keep] / PS_PER_S, table["steps"][keep] - 1
        weights = [table["decodes"][keep] - table["late_decodes"][keep], np.repeat(table["decodes"][keep], more)]
        late = each.gaps()["count"]
        last = float(starts[-1]) if len(starts) else 0.0
        at = np.concatenate([starts, np.repeat(starts, more), np.linspace(0, last, len(late))])
        at = at[np.concatenate([*weights, late]) > 0]  # `inter_token_gaps` leaves out what never occurs
        parts.append(Gaps(at, ms, count))
    return Gaps(*(np.concatenate(column) for column in zip(*parts, strict=True)))
