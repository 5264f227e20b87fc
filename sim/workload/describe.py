"""What a trace is like: rates, burstiness, lengths and prefix reuse, as numbers and as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.trace import HashIds, Trace

WINDOWS_S = (1, 10, 60)


def describe(trace: Trace) -> dict[str, Any]:
    """Statistics of a trace, ready for JSON. A number that the trace does not define is None.

    - Arrivals are those of requests that follow no other. ``rate_per_s``: the number of gaps over the time from the
      first arrival to the last. ``gap_cv``: the standard deviation over the mean of the gaps. ``dispersion``: the
      variance over the mean of the number of arrivals in windows of 1, 10 and 60 s (1 for Poisson; the last, partial
      window is left out).
    - ``prompt_tokens``, ``output_tokens``: mean, p50, p90, p99 (linear between ranks), max and total.
    - ``correlation``: of prompt with output tokens, Pearson's and Spearman's (ties share their mean rank).
    - ``prefix``: what an infinite cache of prompts would hit, see `prefix_reuse`; None without prefixes.
    - ``sessions``: how many, the mean number of requests in a session, and the share of all requests that are not
      the first of their session.
    """
    times = trace.arrival_ps if trace.follows is None else trace.arrival_ps[trace.follows < 0]
    gaps = np.diff(times) / PS_PER_S
    duration = trace.duration_s
    prompt, output = trace.prompt_tokens.astype(float), trace.output_tokens.astype(float)
    return {
        "source": trace.source,
        "notes": list(trace.notes),
        "requests": len(trace),
        "first_arrival_s": int(trace.arrival_ps[0]) / PS_PER_S,
        "duration_s": duration,
        "rate_per_s": _ratio(len(gaps), duration),
        "gap_cv": _ratio(float(gaps.std()), float(gaps.mean())) if len(gaps) else None,
        "dispersion": {f"{window}s": _dispersion(times, window) for window in WINDOWS_S},
        "prompt_tokens": _spread(prompt),
        "output_tokens": _spread(output),
        "prompt_tokens_per_s": _ratio(float(prompt.sum()), duration),
        "output_tokens_per_s": _ratio(float(output.sum()), duration),
        "correlation": {
            "pearson": _correlation(prompt, output),
            "spearman": _correlation(_ranks(prompt), _ranks(output)),
        },
        "prefix": prefix_reuse(trace),
        "sessions": _sessions(trace),
        "tenants": len(trace.tenants) or None,
    }


def prefix_reuse(trace: Trace) -> dict[str, Any] | None:
    """What a cache that never forgets a prompt would spare; blocks that decoding fills are not counted.

    With hash ids, a request hits the leading run of its ids that earlier requests had. ``token_hit`` is the share of
    all prompt tokens that lie in such runs, ``block_hit`` the share of ids, and ``requests_with_hit`` the share of
    requests that have such a run. With prefix groups alone, a request hits as much of its prefix as an earlier request
    of its group had.

    Example: the ids ``[1, 2]``, ``[1, 3]`` and ``[1, 3, 4]`` have leading runs of 0, 1 and 2 ids, so ``block_hit`` is
    3 of 7.
    """
    if trace.hash_ids is not None:
        ids, rows = _leading_hits(trace.hash_ids), len(trace)
        hit = np.minimum(ids * trace.hash_block, trace.prompt_tokens)
        blocks = len(trace.hash_ids.values)
        unique = len(np.unique(trace.hash_ids.values))
        extra: dict[str, Any] = {"block_tokens": trace.hash_block, "blocks": blocks, "unique_blocks": unique}
        extra["block_hit"] = _ratio(int(ids.sum()), blocks)
    elif trace.prefix_group is not None and trace.prefix_tokens is not None:
        hit, rows = _group_hits(trace.prefix_group, trace.prefix_tokens), len(trace)
        extra = {"groups": len(np.unique(trace.prefix_group[trace.prefix_group >= 0]))}
    else:
        return None
    return {
        "token_hit": int(hit.sum()) / int(trace.prompt_tokens.sum(dtype=np.int64)),
        "mean_request_hit": float(np.mean(hit / trace.prompt_tokens)),
        "requests_with_hit": int(np.count_nonzero(hit)) / rows,
        **extra,
    }


def table(trace: Trace, title: str = "") -> Table:
    """The statistics of `describe` as a table of two columns, for the terminal."""
    said = describe(trace)
    shown = Table(title=title or None, show_header=False)
    shown.add_column(style="bold")
    shown.add_column()

    def add(name: str, *numbers: tuple[object, str]) -> None:
        """Add a row of numbers, each followed by its unit or word; numbers that are None are left out."""
        parts = [f"{_short(number)}{unit}" for number, unit in numbers if number is not None]
        if parts:
            shown.add_row(name, "  ".join(parts))

    add("source", (said["source"] or None, ""))
    for note in said["notes"]:
        add("note", (note, ""))
    add("requests", (said["requests"], ""))
    add("duration", (said["duration_s"], " s"))
    add("rate", (said["rate_per_s"], " requests/s"))
    add("gaps, CV", (said["gap_cv"], ""))
    add("dispersion of counts", *((value, f" in {window}") for window, value in said["dispersion"].items()))
    for key, name in (("prompt_tokens", "prompt tokens"), ("output_tokens", "output tokens")):
        spread = said[key]
        add(name, *((spread[word], f" {word}") for word in ("mean", "p50", "p90", "p99", "max")))
        add(f"{name}/s", (said[f"{key}_per_s"], ""))
    add("prompt–output correlation", *((value, f" {name}") for name, value in said["correlation"].items()))
    if prefix := said["prefix"]:
        add("prefix hit, infinite cache", (f"{prefix['token_hit']:.1%}", " of prompt tokens"))
        add("requests with a hit", (f"{prefix['requests_with_hit']:.1%}", ""))
        add("blocks", (prefix.get("blocks"), ""), (prefix.get("unique_blocks"), " unique"))
        add("prefix groups", (prefix.get("groups"), ""))
    if sessions := said["sessions"]:
        add("sessions", (sessions["count"], ""), (sessions["mean_requests"], " requests each"))
    add("tenants", (said["tenants"], ""))
    return shown


def _short(number: object) -> str:
    if isinstance(number, float):
        return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"
    return f"{number:,}" if isinstance(number, int) else str(number)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _spread(tokens: npt.NDArray[np.float64]) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in np.percentile(tokens, (50, 90, 99)))
    total = int(tokens.sum())
    return {
        "mean": float(tokens.mean()),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": int(tokens.max()),
        "total": total,
    }


def _dispersion(times: npt.NDArray[np.int64], window_s: int) -> float | None:
    """The variance over the mean of the number of arrivals in the whole windows from the first arrival on."""
    window = ((times - times[0]) // (window_s * PS_PER_S)).astype(np.int64)
    last = int(window[-1])
    if last < 2:
        return None
    _, sizes = np.unique(window[window < last], return_counts=True)
    mean = sizes.sum() / last  # windows without an arrival count as well, but need no memory
    return float((sizes**2).sum() / last - mean**2) / float(mean)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _leading_hits(hash_ids: HashIds) -> npt.NDArray[np.int64]:
    """How many of each request's leading ids earlier requests had. Shape: ``(n,)``."""
    values, offsets = hash_ids
    counts = np.diff(offsets)
    row = np.repeat(np.arange(len(counts)), counts)
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    seen = row[first][which] < row
    # The run of a request ends at its first id that was not seen before, or else with its last id.
    misses = np.flatnonzero(~seen)
    next_miss = np.append(misses, len(values))[np.searchsorted(misses, offsets[:-1])]
    hits: npt.NDArray[np.int64] = np.minimum(next_miss, offsets[1:]) - offsets[:-1]
    return hits


def _group_hits(group: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """How many tokens of each request's prefix an earlier request of its group had. Shape: ``(n,)``."""
    had: dict[int, int] = {}
    hits = np.zeros(len(group), np.int64)
    for i, (g, n) in enumerate(zip(group.tolist(), tokens.tolist(), strict=True)):
        if g >= 0:
            before = had.get(g, 0)
            hits[i] = min(before, n)
            had[g] = max(before, n)
    return hits


def _sessions(trace: Trace) -> dict[str, Any] | None:
    if trace.session is None or not (trace.session >= 0).any():
        return None
    inside = trace.session[trace.session >= 0]
    count = len(np.unique(inside))
    return {
        "count": count,
        "mean_requests": len(inside) / count,
        "followups": (len(inside) - count) / len(trace),
    }
