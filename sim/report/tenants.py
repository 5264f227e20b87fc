"""What each tenant of a run got."""

from __future__ import annotations

from html import escape

import numpy as np

from chairlift.sim.report.timeline import finished
from chairlift.sim.results.catalogue import text
from chairlift.sim.results.reader import Columns, RunResults

SHOWN = 20  # tenants, those with the most requests


def tenant_table(run: RunResults, requests: Columns) -> str:
    """A row a tenant as HTML, the largest first; empty if there are not two."""
    if "tenant" not in requests:
        return ""
    tenants = requests["tenant"]
    known, counts = np.unique(tenants[tenants >= 0], return_counts=True)
    if len(known) < 2:
        return ""
    done = finished(requests)
    tokens = int(requests["emitted_tokens"].sum()) or 1
    head = (
        "tenant",
        "requests",
        "completed",
        "output tokens",
        "share",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "E2E p50",
        "p99",
    )
    rows = []
    for tenant in known[np.argsort(-counts, kind="stable")][:SHOWN].tolist():
        mine = tenants == tenant
        name = run.tenants[tenant] if tenant < len(run.tenants) else str(tenant)
        emitted = int(requests["emitted_tokens"][mine].sum())
        cells = [text(int(mine.sum()), ""), text(int((mine & done).sum()), ""), text(emitted, "")]
        cells += [text(emitted / tokens, "%")]
        for metric in ("ttft", "tpot", "e2el"):
            values = requests[f"{metric}_ms"][mine]
            values = values[~np.isnan(values)]
            cells += [text(v, "ms") for v in (np.percentile(values, (50, 99)) if len(values) else (None, None))]
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    more = f'<p class="caption">The {SHOWN} largest of {len(known):,} tenants.</p>' if len(known) > SHOWN else ""
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{more}"
    )
