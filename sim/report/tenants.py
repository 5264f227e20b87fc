"""What each tenant of a run got."""

from __future__ import annotations

from typing import Any

import numpy as np

from chairlift.sim.report.timeline import TIMES, finished
from chairlift.sim.results.catalogue import LATENCY, text
from chairlift.sim.results.reader import Columns, RunResults

SHOWN = 20  # tenants, those with the most requests


def tenant_rows(run: RunResults, requests: Columns) -> dict[str, Any] | None:
    """``head`` and ``rows`` of a table, a row a tenant, the largest first, and how many are ``known``.

    None if there are not two tenants.
    """
    if "tenant" not in requests:
        return None
    tenants = requests["tenant"]
    known, counts = np.unique(tenants[tenants >= 0], return_counts=True)
    if len(known) < 2:
        return None
    done = finished(requests)
    tokens = int(requests["emitted_tokens"].sum()) or 1
    head = ["tenant", "requests", "completed", "output tokens", "share"]
    for name in TIMES:
        head += [f"{LATENCY[name].label} p50", "p99"]
    rows = []
    for tenant in known[np.argsort(-counts, kind="stable")][:SHOWN].tolist():
        mine = tenants == tenant
        emitted = int(requests["emitted_tokens"][mine].sum())
        cells = [run.tenants[tenant] if tenant < len(run.tenants) else str(tenant)]
        cells += [text(int(mine.sum()), ""), text(int((mine & done).sum()), ""), text(emitted, "")]
        cells += [text(emitted / tokens, "%")]
        for name in TIMES:
            values = requests[f"{name}_ms"][mine]
            values = values[~np.isnan(values)]
            cells += [text(v, "ms") for v in (np.percentile(values, (50, 99)) if len(values) else (None, None))]
        rows.append(cells)
    return {"head": head, "rows": rows, "known": len(known)}
