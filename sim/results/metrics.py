"""What a run comes to, computed from its records. Names and definitions are those of vLLM's serving benchmark.

TTFT is first token − arrival, E2EL last token − arrival (a static batch: its return), TPOT (E2EL − TTFT) ÷
(output − 1) over requests of more than one token, ITL every gap between two tokens of a request, pooled; goodput
the requests per second that meet all of the SLO. ``duration`` runs from the first arrival to the last answer.
Source: `vllm/benchmarks/serve.py`, vLLM 0.23.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.fairness import between_tenants
from chairlift.sim.results.records import RequestRecords, RunRecords, Status
from chairlift.sim.units import PS_PER_MS, PS_PER_S

if TYPE_CHECKING:
    from chairlift.sim.study import Slo

Floats = npt.NDArray[np.float64]

QUANTILES = (50, 90, 95, 99)


class Latencies:
    """Milliseconds of the finished requests, one value a request, in order of arrival."""

    def __init__(self, requests: RequestRecords) -> None:
        columns = requests.columns()
        self.done = columns["status"] == Status.FINISHED
        arrival = np.asarray(columns["arrival_ps"])[self.done]
        self.outputs = np.asarray(columns["output_tokens"])[self.done].astype(np.int64)
        self.prompts = np.asarray(columns["prompt_tokens"])[self.done].astype(np.int64)
        first = np.asarray(columns["first_token_ps"])[self.done]
        finished = np.asarray(columns["finished_ps"])[self.done]
        self.ttft: Floats = (first - arrival) / PS_PER_MS
        self.e2el: Floats = (finished - arrival) / PS_PER_MS
        several = self.outputs > 1
        self.tpot_all: Floats = np.zeros(len(self.ttft))  # 0 where there is one token only, as vLLM counts goodput
        self.tpot_all[several] = (finished - first)[several] / PS_PER_MS / (self.outputs[several] - 1)
        self.tpot: Floats = self.tpot_all[several]
        self.normalized: Floats = self.e2el / self.outputs
        self.span_s = float(finished.max() - requests.arrival[0]) / PS_PER_S if len(finished) else 0.0

    def good(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which finished requests meet all of ``slo``."""
        good = np.ones(len(self.ttft), dtype=bool)
        for limit, values in (
            (slo.ttft_ms, self.ttft),
            (slo.tpot_ms, self.tpot_all),
            (slo.e2el_ms, self.e2el),
        ):
            if limit is not None:
                good &= values <= limit
        return good


def summarise(
    requests: RequestRecords, runs: list[RunRecords], pools: list[tuple[int, int]], slo: Slo, wall_s: float
) -> dict[str, Any]:
    """``summary.json`` of one run.

    ``pools`` holds (blocks, tokens a block) of each replica, in the order of ``runs``. Shares are of the KV pool,
    averaged over the time in which a replica runs steps.
    """
    times = Latencies(requests)
    n = len(times.ttft)
    span = times.span_s
    status = np.frombuffer(requests.status, dtype=np.uint8)
    prompts, outputs = int(times.prompts.sum()), int(times.outputs.sum())
    given = slo.ttft_ms is not None or slo.tpot_ms is not None or slo.e2el_ms is not None
    rate = 1 / span if span > 0 else 0.0
    summary: dict[str, Any] = {
        "completed": n,
        **{
            s.name.lower(): int(np.count_nonzero(status == s))
            for s in (Status.REJECTED, Status.TIMED_OUT, Status.FAILED)
        },
        "duration": span,
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "request_throughput": n * rate,
        "request_goodput": int(times.good(slo).sum()) * rate if given else None,
        "output_throughput": outputs * rate,
        "total_token_throughput": (prompts + outputs) * rate,
    }
    series = {
        "ttft": times.ttft,
        "tpot": times.tpot,
        "e2el": times.e2el,
        "normalized_latency": times.normalized,
    }
    for name, values in series.items():
        summary.update(_describe(name, values))
    summary.update(_describe_weighted("itl", *inter_token_gaps(runs)))
    summary.update(occupancy(runs, pools))
    summary["prefix_hit_rate"] = _hit_rate(requests)
    summary.update(_transfers(requests))
    summary.update(between_tenants(requests))
    summary["preemptions"] = int(sum(requests.preemptions))
    summary["swaps"], summary["swapped_tokens"] = sum(requests.swaps), sum(requests.swapped_tokens)
    summary["wall_s"] = wall_s
    summary["requests_per_wall_s"] = len(requests.status) / wall_s if wall_s > 0 else None
    return summary


def fleet(summary: dict[str, Any], up_ps: list[int]) -> dict[str, Any]:
    """What the replicas' time was used for, given how long each was up, ps."""
    up_s = sum(up_ps) / PS_PER_S
    return {"replica_hours": up_s / 3600, "utilization": summary["busy_s"] / up_s if up_s else 0.0}


def _hit_rate(requests: RequestRecords) -> float:
    """Share of the prompt tokens of admitted requests that were in a prefix cache already."""
    admitted = np.frombuffer(requests.admitted, dtype=np.int64) >= 0
    prompts = int(requests.trace.prompt_tokens[admitted].sum())
    return sum(requests.cached_tokens) / prompts if prompts else 0.0


def _transfers(requests: RequestRecords) -> dict[str, float | None]:
    """From the end of the prompt on its prefill replica until its KV lies ready at the decode side, ms."""
    if "taken_over_ps" not in requests.extra:
        return {}
    sent, come = (np.frombuffer(requests.extra[c], dtype=np.int64) for c in ("handed_over_ps", "taken_over_ps"))
    done = come >= 0
    return _describe("transfer", (come[done] - sent[done]) / PS_PER_MS)


def inter_token_gaps(runs: list[RunRecords]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Every gap between two tokens, ms, with how often it occurs; shape (gaps,) each, in no order."""
    values: list[npt.NDArray[np.int64]] = []
    weights: list[npt.NDArray[np.int64]] = []
    for each in runs:
        table = each.runs()
        keep = table["decodes"] > 0
        first, slope, steps, decodes, late = (
            table[name][keep] for name in ("first_ps", "slope_ps", "steps", "decodes", "late_decodes")
        )
        values.append(first)
        weights.append(decodes - late)
        more = steps - 1  # the steps after the first: every decode emitted at the one before
        nth = np.arange(int(more.sum())) - np.repeat(np.cumsum(more) - more, more) + 1
        values.append(np.repeat(first, more) + nth * np.repeat(slope, more))
        weights.append(np.repeat(decodes, more))
        gaps = each.gaps()
        values.append(gaps["gap_ps"])
        weights.append(gaps["count"])
    gap, weight = np.concatenate(values), np.concatenate(weights)
    return gap[weight > 0] / PS_PER_MS, weight[weight > 0]


def occupancy(runs: list[RunRecords], pools: list[tuple[int, int]]) -> dict[str, Any]:
    """How full replicas were while they ran steps: requests, and KV split into useful and wasted."""
    busy = total_steps = total_runs = 0.0
    running = useful = held = promised = capacity = 0.0
    peak = 0
    for each, (blocks, block_size) in zip(runs, pools, strict=True):
        table = each.runs()
        steps = table["steps"].astype(np.float64)
        if len(steps) == 0:
            continue
        time = steps * table["first_ps"] + table["slope_ps"] * (steps * (steps - 1) / 2)
        growth = table["decodes"] * (steps - 1) / 2  # tokens stored on average beyond the first step
        tokens = table["kv_tokens"] + growth
        busy += float(time.sum())
        total_steps += float(steps.sum())
        total_runs += len(steps)
        running += float((time * table["running"]).sum())
        useful += float((time * tokens).sum())
        reserved_ahead = np.maximum(table["promised_tokens"] - growth, 0)
        promised += float((time * reserved_ahead).sum())
        held_tokens = np.maximum(table["held_blocks"] * block_size, tokens + reserved_ahead)
        held += float((time * held_tokens).sum())
        capacity += float(time.sum()) * blocks * block_size
        peak = max(peak, int(table["running"].max()))
    share = 1 / capacity if capacity else 0.0
    return {
        "steps": int(total_steps),
        "runs": int(total_runs),
        "mean_leap": total_steps / total_runs if total_runs else None,
        "busy_s": busy / PS_PER_S,
        "mean_running": running / busy if busy else 0.0,
        "peak_running": peak,
        "kv_utilization": useful * share,  # tokens stored
        "kv_reserved": promised * share,  # set aside, to be filled later
        "kv_internal": max(0.0, held - useful - promised) * share,  # held, never filled
        "kv_free": max(0.0, capacity - held) * share,
    }


def _describe(name: str, values: Floats) -> dict[str, float | None]:
    if len(values) == 0:
        return dict.fromkeys(_names(name))
    numbers = [values.mean(), np.median(values), values.std(), *np.percentile(values, QUANTILES[1:])]
    return dict(zip(_names(name), map(float, numbers), strict=True))


def _describe_weighted(name: str, values: Floats, weights: npt.NDArray[np.int64]) -> dict[str, float | None]:
    """As `_describe`, for values that occur ``weights`` times each; percentiles as NumPy's, linear between ranks."""
    total = int(weights.sum())
    if total == 0:
        return dict.fromkeys(_names(name))
    mean = float((values * weights).sum() / total)
    std = float(np.sqrt(max(0.0, ((values - mean) ** 2 * weights).sum() / total)))
    order = np.argsort(values)
    values = values[order]
    last = np.cumsum(weights[order]) - 1  # rank of the last copy of each value
    found = []
    for q in QUANTILES:
        rank = q / 100 * (total - 1)
        low = int(rank)
        below, above = (values[np.searchsorted(last, r)] for r in (low, min(low + 1, total - 1)))
        found.append(float(below + (above - below) * (rank - low)))
    return dict(zip(_names(name), [mean, found[0], std, *found[1:]], strict=True))


def _names(name: str) -> list[str]:
    return [f"{what}_{name}_ms" for what in ("mean", "median", "std", *(f"p{q}" for q in QUANTILES[1:]))]
