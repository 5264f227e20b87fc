"""What a run did over time, and how its latencies are distributed: the numbers behind the curves of a report.

Time is cut into `BINS`. A bin holds the average over its time of what the runs of engine steps say, so the area under
a curve is the total: nothing is lost by binning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.metrics import AREA_COLUMNS, Pool, areas, durations_ps
from chairlift.sim.results.reader import Columns, Replica, RunResults
from chairlift.sim.results.records import Status
from chairlift.sim.units import PS_PER_S

Floats = npt.NDArray[np.float64]

BINS = 300  # of time: two to three pixels each
RANKS = np.unique(np.concatenate((np.linspace(0, 1, 201), np.linspace(0.99, 1, 51), [0.95, 0.999])))
STEP_COLUMNS = (
    *("start_ps", "chunks", "prefill_tokens", "padded", "running", "waiting", "preempted"),
    *AREA_COLUMNS,
)
TIMES = ("ttft", "tpot", "e2el")  # latencies that have a column in ``requests.parquet``
REQUEST_COLUMNS = (
    *("arrival_ps", "prompt_tokens", "output_tokens", "status", "replica", "admitted_ps", "first_token_ps"),
    *("finished_ps", "emitted_tokens", "preemptions", "cached_tokens", *(f"{name}_ms" for name in TIMES)),
)


@dataclass
class ReplicaTotals:
    """Totals and averages of one replica over the run."""

    replica: Replica
    busy_s: float
    steps: int
    computed_prefill: int  # tokens
    computed_decode: int
    padded: int
    mean_running: float  # over its busy time
    kv_share: float  # tokens stored, of the pool, over its busy time
    preemptions: int


@dataclass
class Timeline:
    """Curves of one run, all replicas together; `edges` in seconds, one more than there are values."""

    edges: Floats
    curves: dict[str, Floats]
    totals: list[ReplicaTotals]


def timeline(run: RunResults, requests: Columns) -> Timeline:
    """The curves of ``run``: tokens per second, requests running and waiting, shares of the KV pools.

    Where decodes verify drafts each is drawn with the run's mean of tokens: what is kept is known by request alone.
    """
    arrival, finished = requests["arrival_ps"], requests["finished_ps"]
    edges = np.linspace(float(arrival.min()), float(max(finished.max(), arrival.min() + 1)), BINS + 1)
    width_s = (edges[1] - edges[0]) / PS_PER_S
    names = ("prompt", "output", "running", "waiting", "kv", "held", "prefilling", "decoding", "padding")
    sums = {name: np.zeros(BINS) for name in names}
    totals = []
    for replica, steps in zip(run.replicas, run.steps(*STEP_COLUMNS), strict=True):
        count = steps["steps"].astype(np.float64)
        start = steps["start_ps"].astype(np.float64)
        time = durations_ps(steps).astype(np.float64)
        area = areas(steps, Pool(replica.kv_blocks, replica.block_size, replica.kv_tables))
        held = area.held.astype(np.float64) / replica.kv_tables  # token · ps
        stored = np.minimum(area.stored.astype(np.float64) / replica.kv_tables, held)  # older folders tell no sharing
        padding = np.where(steps["chunks"] > 0, 0, steps["padded"])  # beside a chunk it is the prompts' padding
        bins = _Binner(start, time, edges)
        sums["prompt"] += bins.spread(steps["prefill_tokens"]) / width_s
        sums["output"] += bins.spread(steps["decodes"] * count) / width_s
        for name, level in (
            *(("running", steps["running"]), ("waiting", steps["waiting"]), ("prefilling", steps["chunks"])),
            *(("decoding", steps["decodes"]), ("padding", padding)),
        ):
            sums[name] += bins.spread(level * time) / width_s / PS_PER_S
        for name, level_ps in (("kv", stored), ("held", held)):
            sums[name] += bins.spread(level_ps) / width_s / PS_PER_S
        here = requests["replica"] == replica.index
        sums["waiting"] += bins.idle(_queue(requests, here, edges), edges) / width_s / PS_PER_S
        busy = float(time.sum())
        totals.append(
            ReplicaTotals(
                replica,
                busy_s=busy / PS_PER_S,
                steps=int(count.sum()),
                computed_prefill=int(steps["prefill_tokens"].sum()),
                computed_decode=int((steps["decodes"] * steps["steps"]).sum()),
                padded=int((steps["padded"] * steps["steps"]).sum()),
                mean_running=float((steps["running"] * time).sum()) / busy if busy else 0.0,
                kv_share=float(stored.sum()) / busy / replica.kv_tokens if busy else 0.0,
                preemptions=int(steps["preempted"].sum()),
            )
        )
    first = requests["first_token_ps"]
    if drafts_of(run)[0]:
        decodes = sum(each.computed_decode for each in totals)
        sums["output"] *= (requests["emitted_tokens"].sum() - (first >= 0).sum()) / max(1, decodes)
    sums["output"] += np.histogram(first[first >= 0], edges)[0] / width_s
    capacity = sum(replica.kv_tokens for replica in run.replicas)
    sums["kv"] /= capacity
    sums["held"] = np.maximum(sums["held"] / capacity, sums["kv"])
    sums["arrivals"] = np.histogram(arrival, edges)[0] / width_s
    sums["stalled"] = np.maximum(sums["running"] - sums["prefilling"] - sums["decoding"], 0)
    return Timeline(edges / PS_PER_S, sums, totals)


class _Binner:
    """Spreads an amount of each row evenly over the row's time, and sums what falls into each bin."""

    def __init__(self, start: Floats, time: Floats, edges: Floats) -> None:
        self._edges = edges
        self._ends = np.empty(2 * len(start))
        self._ends[0::2] = start
        self._ends[1::2] = start + time

    def spread(self, amounts: npt.NDArray[Any]) -> Floats:
        """What of ``amounts``, one a row, falls into each bin; shape (bins,)."""
        if len(amounts) == 0:
            return np.zeros(len(self._edges) - 1)
        so_far = np.cumsum(amounts, dtype=np.float64)
        sums = np.empty(2 * len(so_far))
        sums[0::2] = so_far - amounts
        sums[1::2] = so_far
        return np.diff(np.interp(self._edges, self._ends, sums, left=0.0, right=so_far[-1]))

    def idle(self, integral: tuple[Floats, Floats], edges: Floats) -> Floats:
        """What of a curve falls into the gaps between rows, given its ``integral`` as (times, values), by bin."""
        times, values = integral
        start, end = self._ends[0::2], self._ends[1::2]
        if len(start) == 0:
            return np.diff(np.interp(edges, times, values))
        at = np.interp(self._ends, times, values)
        inside = np.concatenate(([0.0], np.cumsum(at[1::2] - at[0::2])))  # of the rows before each
        row = np.searchsorted(start, edges, side="right") - 1  # the last that has begun, -1: none
        under_way = (row >= 0) & (edges < end[row])
        reached = np.where(under_way, at[0::2][row], np.interp(edges, times, values))
        return np.maximum(np.diff(reached - inside[row + 1 - under_way]), 0)  # but for rounding it never falls


def _queue(requests: Columns, here: npt.NDArray[np.bool_], edges: Floats) -> tuple[Floats, Floats]:
    """The integral over time of how many requests wait to be admitted for the first time, as (times, values)."""
    arrival = requests["arrival_ps"][here].astype(np.float64)
    admitted = requests["admitted_ps"][here].astype(np.float64)
    left = np.where(admitted >= 0, admitted, requests["finished_ps"][here])
    times = np.concatenate((arrival, left))
    change = np.concatenate((np.ones(len(arrival)), -np.ones(len(left))))
    order = np.argsort(times, kind="stable")
    times = times[order]
    level = np.cumsum(change[order])
    area = np.concatenate(([0.0], np.cumsum(level[:-1] * np.diff(times)))) if len(times) else np.zeros(0)
    return np.concatenate(([edges[0]], times, [edges[-1]])), np.concatenate(
        ([0.0], area, [area[-1] if len(area) else 0.0])
    )


def cdf(values: Floats) -> tuple[Floats, Floats]:
    """The distribution of ``values`` without NaN as (values, shares from 0 to 1), in at most some 250 points."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return values, values
    if len(values) <= len(RANKS):
        ranked = np.sort(values)
        return np.concatenate((ranked[:1], ranked)), np.arange(len(values) + 1) / len(values)
    return np.quantile(values, RANKS), RANKS


def drafts_of(run: RunResults) -> tuple[int, int]:
    """Drafts that a run verified, and those of them that are tokens of answers; made-up ones of joining requests not.

    A run without drafts has a column all the same where it stands beside one with drafts.
    """
    if not run.has_column("draft_tokens"):
        return 0, 0
    found = run.requests("draft_tokens", "accepted_tokens")
    verified, kept = (int(np.maximum(found[name], 0).sum()) for name in ("draft_tokens", "accepted_tokens"))
    return verified, kept


def work(run: RunResults, requests: Columns, totals: list[ReplicaTotals]) -> dict[str, int]:
    """Tokens computed, by what they were computed for.

    ``prompts`` is the first computation of prompts, ``again`` repeats what a preemption or failure lost, ``answers``
    are decodes and the drafts that they kept, ``rejected`` the drafts that they did not, ``padding`` is computed for
    nothing.
    """
    admitted = requests["admitted_ps"] >= 0
    asked = int((requests["prompt_tokens"] - requests["cached_tokens"])[admitted].sum())
    moved = int((run.requests("taken_over_ps")["taken_over_ps"] >= 0).sum()) if run.has_column("taken_over_ps") else 0
    prefill = sum(each.computed_prefill for each in totals)
    # a decode replica computes one token to take a request in
    decode = sum(each.computed_decode for each in totals) + moved
    again = max(0, prefill - moved - asked)
    verified, kept = drafts_of(run)
    return {
        "prompts": prefill - moved - again,
        "again": again,
        "answers": decode + kept,
        "rejected": verified - kept,
        "padding": sum(each.padded for each in totals),
    }


def finished(requests: Columns) -> npt.NDArray[np.bool_]:
    """Which requests got their answer."""
    return np.asarray(requests["status"] == Status.FINISHED)
