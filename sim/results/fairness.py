"""How evenly a run served its tenants.

Service is counted as in Sheng et al. (VTC), OSDI 2024: a prompt token counts 1 when its request is admitted, an output
token counts 2. The output tokens of a request are taken to come evenly between its first and its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.units import PS_PER_S

PROMPT, OUTPUT = 1, 2  # the paper's w_p and w_q

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def between_tenants(requests: RequestRecords) -> dict[str, Any]:
    """``service_gap`` and ``service_ratio`` of the catalogue; an empty mapping without two tenants.

    Both compare tenants over the longest time in which every tenant has requests waiting, and are None where there is
    no such time. The ratio is None too where a tenant got nothing.
    """
    tenants = _tenants(requests)
    if len(tenants) < 2:
        return {}
    columns = requests.columns()
    arrival, admitted = (np.asarray(columns[c], dtype=np.int64) for c in ("arrival_ps", "admitted_ps"))
    left = np.where(admitted >= 0, admitted, np.asarray(columns["finished_ps"], dtype=np.int64))
    begin, end = _longest_common([(arrival[rows], left[rows]) for rows in tenants.values()])
    got = [service(requests, rows, end) - service(requests, rows, begin) for rows in tenants.values()]
    if end <= begin:
        return {"service_gap": None, "service_ratio": None}
    least, most = min(got), max(got)
    return {"service_gap": most - least, "service_ratio": most / least if least > 0 else None}


def service(requests: RequestRecords, rows: Ints, at: int) -> float:
    """Weighted tokens that the requests in ``rows`` have got by the time ``at``, ps."""
    columns = requests.columns()
    admitted, first, last = (
        np.asarray(columns[c], dtype=np.int64)[rows] for c in ("admitted_ps", "first_token_ps", "finished_ps")
    )
    prompt = np.asarray(columns["prompt_tokens"], dtype=np.int64)[rows]
    emitted = np.asarray(columns["emitted_tokens"], dtype=np.int64)[rows]
    begun = (first >= 0) & (first <= at)
    span = np.maximum(last - first, 1).astype(np.float64)
    share = np.clip((at - first) / span, 0, 1)
    tokens = np.where(begun, 1 + (emitted - 1) * share, 0)
    return float(PROMPT * prompt[(admitted >= 0) & (admitted <= at)].sum() + OUTPUT * tokens.sum())


class Served(NamedTuple):
    """What one tenant got of a run."""

    tenant: str
    completed: int
    ttft_ms: float  # median; 0 where nothing was completed, as the next
    e2el_ms: float
    service_rate: float  # weighted tokens a second of the whole run


def by_tenant(requests: RequestRecords, latencies: Mapping[str, Floats]) -> Iterator[Served]:
    """What each tenant got; ``latencies`` are those of `sim.results.metrics.request_latencies`."""
    columns = requests.columns()
    begin, end = (np.asarray(columns[c], dtype=np.int64) for c in ("arrival_ps", "finished_ps"))
    span_s = max(1, int(end.max() - begin.min())) / PS_PER_S
    for tenant, rows in _tenants(requests).items():
        done = rows[np.asarray(columns["status"])[rows] == Status.FINISHED]
        ttft, e2el = (float(np.median(latencies[name][done])) if len(done) else 0.0 for name in ("ttft", "e2el"))
        rate = service(requests, rows, int(end.max())) / span_s
        yield Served(requests.trace.tenants[tenant], len(done), ttft, e2el, rate)


def _tenants(requests: RequestRecords) -> dict[int, Ints]:
    """Tenant → its rows."""
    column = requests.trace.tenant
    if column is None:
        return {}
    return {int(tenant): np.flatnonzero(column == tenant) for tenant in np.unique(column)}


def _longest_common(waits: list[tuple[Ints, Ints]]) -> tuple[int, int]:
    """The longest time, as (begin, end), in which every tenant has at least one interval open.

    ``waits`` holds two arrays a tenant: when its intervals begin, and when they end.
    """
    times = np.unique(np.concatenate([edge for pair in waits for edge in pair]))
    everybody = np.ones(len(times), dtype=bool)
    for begins, ends in waits:
        open_now = np.searchsorted(np.sort(begins), times, "right") - np.searchsorted(np.sort(ends), times, "right")
        everybody &= open_now > 0
    best = (0, 0)
    start: int | None = None
    for time, all_wait in zip(times.tolist(), everybody.tolist(), strict=True):
        if all_wait and start is None:
            start = time
        elif not all_wait and start is not None:
            best = max(best, (start, time), key=lambda pair: pair[1] - pair[0])
            start = None
    return best
