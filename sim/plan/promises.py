"""Promises about latency, and how many requests of one simulated run met each of them.

A percentile is a share: the p99 of TTFT is at most 500 ms exactly where at least 99 % of the requests have a TTFT of at
most 500 ms. So every promise here is a share of requests that meet some limits (for ITL: a share of the gaps between
tokens). `sample_of` cuts a run into `BINS` parts of equally many requests, in order of arrival, and counts for each
part and each promise how many requests the promise is about, and how many of those met its limits. Counts by part let
`sim.plan.verdict` leave out the warm-up and add up replications.

Three requests in three parts, with TTFTs of 400, 600 and 450 ms, give the promise "p99 TTFT ≤ 500 ms" the counts
``eligible = [1, 1, 1]`` and ``met = [1, 0, 1]``: a share of 2/3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator

from chairlift.backend.checked import wrong
from chairlift.sim.results.catalogue import LATENCIES, LATENCY
from chairlift.sim.results.metrics import REQUEST_LATENCIES, inter_token_gaps, request_latencies
from chairlift.sim.results.records import RequestRecords, RunRecords, Status
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.strict import Spec

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BINS = 100  # parts of a run: a warm-up is cut off to within 1 % of the run
UNSERVED_MS = 1e12  # stands in figures for a request that was not served
CAP = 4.0  # severity counts no latency beyond this multiple of its limit: one straggler must not look like a warm-up
PROMISED = tuple(metric.name for metric in LATENCIES if metric.name in REQUEST_LATENCIES or metric.name == "itl")
TOLD = ("e2el", "itl", "tpot", "ttft")  # latencies of which every answer tells p50 and p99
Limit = Annotated[float, Field(gt=0, le=1e10, description="Milliseconds.")]


def _described(name: str) -> str:
    more = {"itl": " Stands alone.", "tpot": " Alone: of answers of several tokens."}.get(name, "")
    return LATENCY[name].meaning + more


if TYPE_CHECKING:
    _Limited = Spec
else:  # a key a latency, so that a new row of the catalogue can be promised
    _limits = {f"{name}_ms": (Limit | None, Field(default=None, description=_described(name))) for name in PROMISED}
    _Limited = create_model("_Limited", __base__=Spec, **_limits)


class Promise(_Limited):
    """At least a given share of the requests meets all the limits given.

    One limit makes it a percentile ("p99 TTFT ≤ 500 ms"); several make it a share of goodput ("90 % of requests: TTFT ≤
    800 ms and TPOT ≤ 40 ms").
    """

    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="Of requests, such as 0.99.")
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = Field(
        default=None, description="The same in percent: 99 says that the p99 is within the limit."
    )
    tenant: str | None = Field(default=None, description="Only of this tenant's requests.")
    priority: int | None = Field(default=None, description="Only of requests of this priority.")

    @model_validator(mode="after")
    def _one_share_some_limits(self) -> Promise:
        if (self.share is None) == (self.percentile is None):
            raise ValueError("must have exactly one of share and percentile")
        limits = self.limits()
        if not limits:
            known = [f"{name}_ms" for name in PROMISED]
            raise ValueError(f"must have a limit: {', '.join(known[:-1])} or {known[-1]}")
        if "itl" in limits and (len(limits) > 1 or self.tenant is not None or self.priority is not None):
            raise ValueError("itl_ms is of all gaps between tokens: it must stand alone, in a promise of its own")
        return self

    @property
    def wanted(self) -> float:
        """The share of requests that must meet the limits, between 0 and 1."""
        return self.share if self.share is not None else (self.percentile or 0) / 100

    def limits(self) -> dict[str, float]:
        """Metric (one of `PROMISED`) → its limit in milliseconds, for the limits that are given."""
        found = {name: getattr(self, f"{name}_ms") for name in PROMISED}
        return {name: limit for name, limit in found.items() if limit is not None}

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
    """What one run says about J promises. Lists of B = `BINS` values run over the parts in order of arrival."""

    starts_s: list[float]  # (B,) arrival of each part's first request
    end_s: float  # arrival of the last request
    stay_s: float  # 99 % of the requests left within this time of their arrival (of their session's start, if in one)
    severity: list[float]  # (B,) mean over a part's requests of the worst ratio of latency to limit, at most `CAP`
    eligible: list[list[int]]  # (J, B) requests (for ITL: gaps between tokens) that the promise is about
    met: list[list[int]]  # (J, B) those of them that met the promise's limits
    figures: dict[str, float]  # percentiles in ms by name (``p99_ttft_ms``), for the answer's tables
    simulated_s: float  # from the start to the last answer, on the replicas' clocks
    wall_s: float = 0.0  # that the simulation took
    replicas: Sequence[float] = ()  # of each group, paid for on average; none where none come and go
    stretches: Sequence[Sequence[int]] = ()  # of recorded files, what was served: `chairlift.sim.plan.stretches`


_SAMPLE = TypeAdapter(Sample, config=ConfigDict(strict=True))


def sample_read(told: object, promises: int) -> Sample:
    """The `Sample` of so many promises in ``told``, a list that was read back.

    Raises ValueError, a few words, if it is none: a file may be damaged.
    """
    if not isinstance(told, list):
        raise ValueError("it has no sample")
    try:
        found = _SAMPLE.validate_python(told)
    except ValidationError as error:
        raise ValueError(f"its sample: {wrong(error)}") from None
    counts = np.array([[len(row) for row in rows] for rows in (found.eligible, found.met)])
    if counts.shape != (2, promises) or not (counts == BINS).all():
        raise ValueError(f"its sample must have counts of {promises} promises in {BINS} parts")
    if not (np.array(found.met) >= 0).all() or not (np.array(found.met) <= np.array(found.eligible)).all():
        raise ValueError("its sample has more requests that a promise was kept to than it is about")
    numbers = np.array([*found.severity, *found.starts_s, found.end_s, found.stay_s, found.simulated_s, found.wall_s])
    if (
        len(found.severity) != BINS
        or len(found.starts_s) != BINS
        or not (numbers >= 0).all()
        or np.isinf(numbers).any()
    ):
        raise ValueError(f"its sample must have times and severities from 0 on of {BINS} parts")
    return found


class Latency(NamedTuple):
    """Columns of a run's requests in order of arrival, shape (n,). A request that was not served has infinite times."""

    arrival_s: Floats
    ms: dict[str, Floats]  # by name of the latency; TPOT 0 for an answer of one token, as vLLM counts goodput
    several: Bools  # whether the answer has more than one token
    tenant: npt.NDArray[Any] | None = None  # names
    priority: npt.NDArray[np.int64] | None = None


class Gaps(NamedTuple):
    """Gaps between consecutive tokens of an answer, equal ones of a step counted together; shape (g,) each."""

    at_s: Floats  # when the step began that ended them
    ms: Floats  # length
    often: npt.NDArray[np.int64]  # how many gaps of this length there are


def sample_of(
    promises: Sequence[Promise],
    times: Latency,
    gaps: Gaps | None = None,
    wall_s: float = 0.0,
    since_s: Floats | None = None,
) -> Sample:
    """The sample of a run with at least `BINS` requests.

    ``gaps`` is needed where a promise limits ITL. ``since_s``, shape (n,), says when each request's session started; a
    request without a session starts at its own arrival. None: there are no sessions.
    """
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
            worst = np.maximum(worst, times.ms["tpot"] / limits["itl"])  # by request there is only a mean gap
            continue
        which = _which(promise, times)
        good = np.ones(n, dtype=bool)
        for metric, limit in limits.items():
            values = times.ms[metric]
            good &= values <= limit
            worst = np.maximum(worst, np.where(which, values / limit, 0))
        eligible.append(np.add.reduceat(which.astype(np.int64), edges[:-1]).tolist())
        met.append(np.add.reduceat((which & good).astype(np.int64), edges[:-1]).tolist())
    done = np.isfinite(times.ms["e2el"])
    served = times.ms["e2el"][done] / 1e3
    longest = float(served.max()) if len(served) else 0.0
    if since_s is not None:
        served = served + (times.arrival_s - since_s)[done]
    stay = float(np.percentile(served, 99)) if len(served) else 0.0
    end = float(times.arrival_s[-1])
    severity = np.add.reduceat(np.minimum(worst, CAP), edges[:-1]) / np.diff(edges)
    figures = _figures(promises, times, gaps, stay, end)
    return Sample(
        times.arrival_s[edges[:-1]].tolist(),
        end,
        stay,
        severity.tolist(),
        eligible,
        met,
        figures,
        end + longest,
        wall_s,
    )


def _which(promise: Promise, times: Latency) -> Bools:
    """Which requests a promise is about, shape (n,)."""
    which = np.ones(len(times.arrival_s), dtype=bool)
    if list(promise.limits()) == ["tpot"]:
        which &= times.several  # a percentile of TPOT is over answers that have one
    if promise.tenant is not None and times.tenant is not None:
        which &= times.tenant == promise.tenant
    if promise.priority is not None and times.priority is not None:
        which &= times.priority == promise.priority
    return which


def _figures(
    promises: Sequence[Promise], times: Latency, gaps: Gaps | None, stay: float, end: float
) -> dict[str, float]:
    """Percentiles by name over the middle of the run: those that were promised, and p50 and p99 of `TOLD`."""
    begin, close = window(float(times.arrival_s[0]), end, stay)
    middle = (times.arrival_s >= begin) & (times.arrival_s <= close)
    wanted: dict[str, set[float]] = {metric: {50.0, 99.0} for metric in TOLD}
    for promise in promises:
        if len(promise.limits()) == 1:
            [metric] = promise.limits()
            wanted.setdefault(metric, set()).add(100 * promise.wanted)
    found: dict[str, float] = {}
    for metric in sorted(wanted.keys() - {"itl"}):
        values = times.ms[metric][middle & times.several if metric == "tpot" else middle]
        if len(values):
            levels = sorted(wanted[metric])
            method: Literal["linear", "lower"] = (
                "linear" if np.isfinite(values).all() else "lower"
            )  # there is no line to an infinite latency
            for q, value in zip(levels, np.percentile(values, levels, method=method).tolist(), strict=True):
                found[f"p{q:g}_{metric}_ms"] = value if np.isfinite(value) else UNSERVED_MS
    if gaps is not None and len(gaps.ms):
        order = np.argsort(gaps.ms)
        below = np.cumsum(gaps.often[order])
        for q in sorted(wanted["itl"]):
            at = min(int(np.searchsorted(below, q / 100 * below[-1])), len(order) - 1)
            found[f"p{q:g}_itl_ms"] = float(gaps.ms[order[at]])
    return found


def window(begin: float, end: float, stay: float) -> tuple[float, float]:
    """From when to when (s) a run of arrivals from ``begin`` to ``end`` shows the system under its lasting load.

    Before it the first requests had not yet left, so the system was still filling up; after it no further requests
    came behind those that were measured. Either cut is ``stay`` long, and at most a quarter of the run.
    """
    cut = min(stay, (end - begin) / 4)
    return begin + cut, end - cut


def measured(promises: Sequence[Promise], requests: RequestRecords, runs: list[RunRecords], wall_s: float) -> Sample:
    """The sample of a simulated run: ``runs`` has the records of each replica."""
    columns = requests.columns()
    arrival = np.asarray(columns["arrival_ps"])
    done = np.asarray(columns["status"]) == Status.FINISHED
    several = np.asarray(columns["output_tokens"]) > 1
    trace = requests.trace
    order = np.argsort(arrival, kind="stable")
    if trace.follows is not None and trace.session is None:
        order = order[arrival[order] <= _all_there(arrival, trace.follows)]
    tenant = None if trace.tenant is None else np.array(trace.tenants)[trace.tenant][order]
    priority = None if trace.priority is None else trace.priority[order].astype(np.int64)
    found = {name: np.where(done, np.nan_to_num(ms), np.inf)[order] for name, ms in request_latencies(requests).items()}
    times = Latency(arrival[order] / PS_PER_S, found, several[order], tenant, priority)
    gaps = _gaps(runs) if any("itl" in promise.limits() for promise in promises) else None
    since = None
    if trace.follows is not None and trace.session is not None:
        root = np.arange(len(trace))
        for i in np.flatnonzero(trace.follows >= 0).tolist():
            root[i] = root[trace.follows[i]]  # a request follows an earlier row, whose root is known by now
        since = (arrival[root] / PS_PER_S)[order]
    return sample_of(promises, times, gaps, wall_s, since)


def _all_there(arrival_ps: npt.NDArray[np.int64], follows: npt.NDArray[np.int64]) -> int:
    """Until when (ps) no client of a closed loop has sent its last request: later there are fewer clients."""
    last = np.ones(len(follows), dtype=bool)
    last[follows[follows >= 0]] = False
    return int(arrival_ps[last].min())


def _gaps(runs: list[RunRecords]) -> Gaps:
    """All gaps between tokens, replica by replica, at the time when the run of steps began that they fell into.

    The records keep those gaps apart that no run of steps shows, in order of time but without the time itself. Each
    replica's are spread evenly from the start to its last run.
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
        at = at[np.concatenate([*weights, late]) > 0]  # as `inter_token_gaps`, which leaves out gaps that never occur
        parts.append(Gaps(at, ms, count))
    return Gaps(*(np.concatenate(column) for column in zip(*parts, strict=True)))
