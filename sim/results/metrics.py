"""What a run comes to, computed from its records. `sim.results.catalogue` names and explains every metric.

Definitions are those of vLLM's serving benchmark (`vllm/benchmarks/serve.py`, vLLM 0.23), each written once, here:
`REQUEST_LATENCIES` and `per_output_token` (TTFT, TPOT, E2E), `inter_token_gaps` (ITL), `Latencies.good` (goodput),
`durations_ps` and `ends_ps` (how long a run of steps took).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.catalogue import LATENCIES, PERCENTILES, STATISTICS, fields
from chairlift.sim.results.fairness import between_tenants
from chairlift.sim.results.records import DRAFT_COLUMNS, Growth, RequestRecords, RunRecords, Status
from chairlift.sim.results.token_gaps import all_gaps, gaps_of_finished
from chairlift.sim.results.weighted import weighted_statistics
from chairlift.sim.units import PS_PER_MS, PS_PER_S

if TYPE_CHECKING:
    from chairlift.sim.study import Slo

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Integers = npt.NDArray[Any]  # int64, or Python integers where those do not do

_INT64 = 1 << 63
AREA_COLUMNS = (  # of a run of steps: what `areas` needs
    *("first_ps", "slope_ps", "steps", *Growth._fields, "decodes", "held_blocks", "spared_blocks"),
    *("kv_tokens", "promised_tokens", "promised_decodes"),
)


def per_output_token(span: Floats, output_tokens: Ints) -> Floats:
    """TPOT: ``span`` from first to last token ÷ (output tokens − 1), in the unit of ``span``; shape (n,) each.

    An answer of one token has no TPOT, and gets NaN.
    """
    return np.where(output_tokens > 1, span / np.maximum(output_tokens - 1, 1), np.nan)


class Moments(NamedTuple):
    """When things happened to each request, ps, and its output tokens; shape (n,) each. -1 where it did not happen."""

    arrival: Ints
    admitted: Ints
    first_token: Ints
    last_token: Ints
    output_tokens: Ints


# Latencies of a request in ms, by their name in the catalogue. Their values of unfinished requests are thrown away.
REQUEST_LATENCIES: dict[str, Callable[[Moments], Floats]] = {
    "ttft": lambda m: (m.first_token - m.arrival) / PS_PER_MS,
    "tpot": lambda m: per_output_token((m.last_token - m.first_token) / PS_PER_MS, m.output_tokens),
    "e2el": lambda m: (m.last_token - m.arrival) / PS_PER_MS,
    "normalized_latency": lambda m: (m.last_token - m.arrival) / PS_PER_MS / m.output_tokens,
}


def request_latencies(requests: RequestRecords) -> dict[str, Floats]:
    """`REQUEST_LATENCIES` of every request, ms, shape (n,), in the order of the trace.

    NaN where a request has none: all latencies of one that did not finish, TPOT of an answer of one token.
    """
    moments = _moments(requests)
    finished = np.asarray(requests.columns()["status"]) == Status.FINISHED
    return {name: np.where(finished, of(moments), np.nan) for name, of in REQUEST_LATENCIES.items()}


def _moments(requests: RequestRecords) -> Moments:
    columns = requests.columns()
    names = ("arrival_ps", "admitted_ps", "first_token_ps", "finished_ps", "output_tokens")
    return Moments(*(np.asarray(columns[name]).astype(np.int64, copy=False) for name in names))


class Latencies:
    """What the finished requests waited, one value a request, in the order of the trace.

    Each latency is computed when asked for and not kept: of a million requests one takes 8 MB.
    """

    def __init__(self, requests: RequestRecords) -> None:
        self._requests = requests
        columns = requests.columns()
        self.done = np.asarray(columns["status"]) == Status.FINISHED
        finished = np.asarray(columns["finished_ps"])[self.done]
        self.span_s = float(finished.max() - requests.arrival[0]) / PS_PER_S if len(finished) else 0.0
        self._count = len(finished)

    def __len__(self) -> int:
        """Finished requests."""
        return self._count

    @property
    def outputs(self) -> Ints:
        """Output tokens, shape (finished,)."""
        found: Ints = self._requests.trace.output_tokens[self.done].astype(np.int64)
        return found

    @property
    def prompts(self) -> Ints:
        """Prompt tokens, shape (finished,)."""
        found: Ints = self._requests.trace.prompt_tokens[self.done].astype(np.int64)
        return found

    def values(self, name: str) -> Floats:
        """The latency ``name``, ms, shape (finished,), with NaN for the TPOT of an answer of one token."""
        found: Floats = REQUEST_LATENCIES[name](_moments(self._requests))[self.done]
        return found

    def of(self, name: str) -> Floats:
        """The latency ``name``, ms, of the requests that have it."""
        values = self.values(name)
        found: Floats = values[~np.isnan(values)]
        return found

    def good(self, slo: Slo) -> npt.NDArray[np.bool_]:
        """Which finished requests meet all of ``slo``. An answer of one token meets any TPOT, as in vLLM's goodput."""
        good = np.ones(len(self), dtype=bool)
        for name, limit in limits(slo).items():
            good &= ~(self.values(name) > limit)
        return good


def limits(slo: Slo) -> dict[str, float]:
    """Name of a latency → the most ms that ``slo`` allows; without those that it leaves open."""
    return {name.removesuffix("_ms"): limit for name, limit in slo.model_dump().items() if limit is not None}


def durations_ps(runs: Mapping[str, Ints]) -> Ints:
    """How long each run of steps took, ps, from columns of `RunRecords.runs`; shape (rows,).

    A run of n steps takes n · first + slope · n (n − 1) / 2, since each step takes ``slope_ps`` longer than the one
    before: 3 steps with a first of 100 and a slope of 2 take 100 + 102 + 104 = 306.
    """
    steps = runs["steps"]
    found: Ints = steps * runs["first_ps"] + runs["slope_ps"] * (steps * (steps - 1) // 2)
    return found


def ends_ps(runs: Mapping[str, Ints]) -> Ints:
    """When each run of steps ended, ps; shape (rows,)."""
    found: Ints = runs["start_ps"] + durations_ps(runs)
    return found


def summarise(
    requests: RequestRecords, runs: list[RunRecords], pools: Sequence[Pool], slo: Slo, wall_s: float
) -> dict[str, Any]:
    """``summary.json`` of one run: a field for each metric of the catalogue that the run has.

    ``runs`` holds the records of each replica, ``pools`` its KV pool in the same order. ``wall_s`` is how long the
    simulation took.
    """
    times = Latencies(requests)
    n = len(times)
    span = times.span_s
    status = np.frombuffer(requests.status, dtype=np.uint8)
    prompts, outputs = int(times.prompts.sum()), int(times.outputs.sum())
    rate = 1 / span if span > 0 else 0.0
    good = int(times.good(slo).sum()) if limits(slo) else None
    sent = np.array(requests.arrival, dtype=np.int64)  # one that follows another comes later than its trace says
    arrivals_s = float(sent.max() - sent.min()) / PS_PER_S
    summary: dict[str, Any] = {
        "completed": n,
        **{
            s.name.lower(): int(np.count_nonzero(status == s))
            for s in (Status.REJECTED, Status.TIMED_OUT, Status.FAILED)
        },
        "duration": span,
        "total_input_tokens": prompts,
        "total_output_tokens": outputs,
        "offered_rate": (len(status) - 1) / arrivals_s if arrivals_s else None,
        "request_throughput": n * rate,
        "request_goodput": None if good is None else good * rate,
        "slo_missed": 1 - good / n if good is not None and n else None,
        "output_throughput": outputs * rate,
        "total_token_throughput": (prompts + outputs) * rate,
    }
    moved = _transfers(requests)
    for latency in LATENCIES:
        name = latency.name
        if name == "itl":
            gaps = gaps_of_finished(requests, runs)
            found = weighted_statistics(gaps.ps, gaps.often, PS_PER_MS)
            del gaps  # of a long run they are most of the memory
        elif name in REQUEST_LATENCIES:
            found = _statistics(times.of(name))
        elif name in moved:
            found = _statistics(moved[name])
        else:
            continue
        summary.update(zip(fields(name), found, strict=True))
    summary.update(occupancy(runs, pools))
    summary["prefix_hit_rate"] = _hit_rate(requests)
    summary.update(_drafts(requests))
    summary.update(bubbles(runs))
    if "bubble_share" in summary:
        summary["engine_stops"] = sum(each.stops for each in runs)
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


def _drafts(requests: RequestRecords) -> dict[str, float | int | None]:
    """What verifying drafts came to; nothing where none are."""
    if DRAFT_COLUMNS[0] not in requests.extra:
        return {}
    steps, drafts, accepted = (sum(requests.extra[name]) for name in DRAFT_COLUMNS)
    return {
        "accepted_length": 1 + accepted / steps if steps else None,
        "draft_tokens": drafts,
        "drafts_wasted": 1 - accepted / drafts if drafts else None,
    }


def bubbles(runs: Sequence[RunRecords]) -> dict[str, float]:
    """How much of a pipeline idles while a step is in another stage; nothing where no steps of stages are modelled."""
    piped = sum(each.piped_ps for each in runs)
    return {"bubble_share": 1 - sum(each.stage_ps for each in runs) / piped} if piped else {}


def _transfers(requests: RequestRecords) -> dict[str, Floats]:
    """The latency ``transfer`` of the requests that were handed over; nothing where no replica hands over."""
    if "taken_over_ps" not in requests.extra:
        return {}
    sent, come = (np.frombuffer(requests.extra[c], dtype=np.int64) for c in ("handed_over_ps", "taken_over_ps"))
    done = come >= 0
    return {"transfer": (come[done] - sent[done]) / PS_PER_MS}


def inter_token_gaps(runs: list[RunRecords]) -> tuple[Floats, npt.NDArray[np.signedinteger]]:
    """ITL: every gap between two tokens of any request, ms, and how often it occurs; shape (gaps,) each."""
    gaps = all_gaps(runs)
    return gaps.ps / PS_PER_MS, gaps.often


class Pool(NamedTuple):
    """The KV pool of a replica."""

    blocks: int
    block_size: int  # tokens, of the layers of one group
    tables: int = 1  # groups of layers: a token has a place in a block of each


class Areas(NamedTuple):
    """What each run of steps holds of a pool, summed over the run's time: places · ps, exact integers; shape (rows,).

    A place is that of one token in one group of layers: a block has ``block_size`` places.
    """

    stored: Integers  # places with a token's KV
    promised: Integers  # places set aside for tokens that will come
    held: Integers  # places of the blocks that are held


def areas(runs: Mapping[str, Ints], pool: Pool) -> Areas:
    """The areas under the curves of a replica's ``runs``, step by step: the same however steps are grouped in runs.

    Step k of a run has ``decodes`` · k tokens more than its first step, and takes ``first_ps`` + k · ``slope_ps``; the
    blocks come by `Growth`. ``kv_tokens`` counts the tokens of a shared block for each request that shares it, and
    those that have slid out of a window: what ``spared_blocks`` would hold is taken off. In three steps, in blocks of
    4 tokens: A and B share 8 tokens and have 2 and 3 of their own. They have 21 tokens of KV, in 4 blocks; 2 blocks are
    spared, so 21 - 8 = 13 of 16 places hold a token.
    """
    blocks, block_size, tables = pool
    first, slope, steps = runs["first_ps"], runs["slope_ps"], runs["steps"]
    tokens = int(runs["kv_tokens"].max(initial=0)) + int((runs["decodes"] * steps).max(initial=0))
    time = int(durations_ps(runs).max(initial=0))
    most = time * max(tokens * tables, blocks * block_size, int(steps.max(initial=0)), 1)
    if most >= _INT64 // 4:  # beyond 64 bits: Python's integers
        runs = {name: runs[name].astype(object) for name in AREA_COLUMNS}
        first, slope, steps = runs["first_ps"], runs["slope_ps"], runs["steps"]
    pairs = steps * (steps - 1) // 2
    time_ps = steps * first + slope * pairs
    delays = pairs * first + slope * (pairs * (2 * steps - 1) // 3)  # Σ k · duration of step k
    held = runs["held_blocks"] * time_ps + runs["held_sum"] * first + runs["held_moment"] * slope
    spared = runs["spared_blocks"] * time_ps + runs["spared_sum"] * first + runs["spared_moment"] * slope
    known = runs["kv_tokens"] * time_ps + runs["decodes"] * delays
    promised = runs["promised_tokens"] * time_ps - runs["promised_decodes"] * delays
    return Areas(known * tables - spared * block_size, promised * tables, held * block_size)


def exact_sum(values: Integers) -> int:
    """The sum of ``values``, int64 or Python integers; it may outgrow 64 bits."""
    if values.dtype == object:
        return int(values.sum())
    return int((values >> 32).sum()) * (1 << 32) + int((values & 0xFFFFFFFF).sum())


def occupancy(runs: list[RunRecords], pools: Sequence[Pool]) -> dict[str, Any]:
    """How full replicas were, averaged over the time in which they ran steps; ``pools`` as for `summarise`."""
    busy = steps = rows = running = stored = promised = held = capacity = peak = 0
    for each, pool in zip(runs, pools, strict=True):
        for part in each.run_parts():
            if not len(part["steps"]):
                continue
            time = durations_ps(part)
            part_ps = exact_sum(time)
            busy += part_ps
            capacity += part_ps * pool.blocks * pool.block_size
            steps += int(part["steps"].sum())
            rows += len(time)
            running += exact_sum(time * part["running"])
            peak = max(peak, int(part["running"].max()))
            area = areas(part, pool)
            stored += exact_sum(area.stored)
            promised += exact_sum(area.promised)
            held += exact_sum(area.held)
    return {
        "steps": steps,
        "runs": rows,
        "mean_leap": steps / rows if rows else None,
        "busy_s": busy / PS_PER_S,
        "mean_running": running / busy if busy else 0.0,
        "peak_running": peak,
        "kv_utilization": stored / capacity if capacity else 0.0,  # tokens stored
        "kv_reserved": promised / capacity if capacity else 0.0,  # set aside, to be filled later
        "kv_internal": (held - stored - promised) / capacity if capacity else 0.0,  # held, never filled
        "kv_free": (capacity - held) / capacity if capacity else 0.0,
    }


def _statistics(values: Floats) -> list[float | None]:
    """The `STATISTICS` of ``values``; None each where there are none. Percentiles are linear between ranks."""
    if len(values) == 0:
        return [None] * len(STATISTICS)
    ranked = [float(np.median(values)), *np.percentile(values, list(PERCENTILES.values())[1:]).tolist()]
    known = {"mean": float(values.mean()), "std": float(values.std()), **dict(zip(PERCENTILES, ranked, strict=True))}
    return [known[statistic] for statistic in STATISTICS]
