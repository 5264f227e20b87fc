"""How evenly a run served its tenants.

Service is counted as in Sheng et al. (VTC), OSDI 2024: a prompt token 1, when it is admitted, an output token 2. A
request's output tokens are taken to come evenly from its first to its last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.records import RequestRecords, Status
from chairlift.sim.units import PS_PER_MS, PS_PER_S

PROMPT, OUTPUT = 1, 2  # the paper's w_p and w_q

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def between_tenants(requests: RequestRecords) -> dict[str, Any]:
    """Over the longest time in which every tenant has requests waiting, and nothing without two tenants.

    ``service_gap``: weighted tokens by which the tenant served most is ahead of the one served least;
    ``service_ratio``: the two as a ratio. None if there is no such time, or somebody got nothing.
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
    """Weighted tokens that the requests ``rows`` have got by time ``at``, ps."""
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


def by_tenant(requests: RequestRecords) -> Iterator[tuple[str, int, float, float, float]]:
    """Name, finished requests, median TTFT and E2EL in ms, weighted tokens a second of the whole run."""
    columns = requests.columns()
    arrival, first, last = (
        np.asarray(columns[c], dtype=np.int64) for c in ("arrival_ps", "first_token_ps", "finished_ps")
    )
    finished = np.asarray(columns["status"]) == Status.FINISHED
    span_s = max(1, int(last.max() - arrival.min())) / PS_PER_S
    for tenant, rows in _tenants(requests).items():
        done = rows[finished[rows]]
        waits = (first - arrival)[done] / PS_PER_MS, (last - arrival)[done] / PS_PER_MS
        ttft, e2el = (float(np.median(ms)) if len(ms) else 0.0 for ms in waits)
        yield requests.trace.tenants[tenant] or "(none)", len(done), ttft, e2el, service(requests, rows, int(last.max())) / span_s


def _tenants(requests: RequestRecords) -> dict[int, Ints]:
    """Tenant → its rows."""
    column = requests.trace.tenant
    if column is None:
        return {}
    return {int(tenant): np.flatnonzero(column == tenant) for tenant in np.unique(column)}


def _longest_common(waits: list[tuple[Ints, Ints]]) -> tuple[int, int]:
    """The longest time in which of each pair of arrays, begins and ends, one interval at least is open."""
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
