"""Metrics against hand-computed runs, against NumPy, and against identities that hold on every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.policies.base import Scheduler
from chairlift.policies.orca import Orca
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.metrics import Latencies, Pool, inter_token_gaps, summarise
from chairlift.sim.results.records import Status
from chairlift.sim.results.weighted import weighted_statistics
from chairlift.sim.study import Slo
from kit.worlds import Affine, World, play, sync_vllm, trace_of

MS = 10**9  # ps
STATISTICS = ("mean", "median", "std", "p90", "p95", "p99")

POLICIES: dict[str, Callable[[], Scheduler]] = {
    "static": lambda: Static(batch=4),
    "static, globally padded": lambda: Static(batch=4, pad_to="global", start="impatient"),
    "orca": lambda: Orca(reserve="declared"),
    "orca pow2": lambda: Orca(reserve="pow2"),
    "tgi": lambda: Tgi(max_batch_total_tokens=900),
    "vllm": lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=64),
    "vllm whole prompts": lambda: Vllm(
        async_scheduling=False, max_num_batched_tokens=2048, enable_chunked_prefill=False
    ),
}
CONTINUOUS = [name for name in POLICIES if "static" not in name]


def milliseconds() -> Affine:
    """A step costs 1 ms, and 0.1 ms for each token in it."""
    return Affine(fixed=MS, token=MS // 10, context=0)


def summary_of(world: World, slo: Slo | None = None, wall_s: float = 2.0) -> dict[str, Any]:
    pools = [Pool(engine.pool.total, engine.pool.block_size) for engine in world.engines]
    return summarise(world.requests, [engine.records for engine in world.engines], pools, slo or Slo(), wall_s)


def statistics(summary: dict[str, Any], name: str) -> list[float]:
    return [summary[f"{s}_{name}_ms"] for s in STATISTICS]


def numpy_statistics(values: Any) -> list[float]:
    return [np.mean(values), np.median(values), np.std(values), *np.percentile(values, (90, 95, 99))]


def three_requests(start_ms: float = 0.0) -> World:
    """Prompts of 4, 2 and 8, outputs of 3, 1 and 2 tokens, arriving at 0, 0.5 and 10 ms.

    Steps: 0–1.4 prompt A · 1.4–2.7 decode A, prompt B · 2.7–3.8 decode A · idle · 10–11.8 prompt C · 11.8–12.9
    decode C.
    """
    start = round(start_ms * MS)
    trace = trace_of([(start, 4, 3), (start + MS // 2, 2, 1), (start + 10 * MS, 8, 2)])
    return play(trace, sync_vllm, milliseconds, blocks=10, block_size=4)


# ---- by hand ----


def test_latencies_by_hand() -> None:
    summary = summary_of(three_requests())

    assert statistics(summary, "ttft") == pytest.approx(numpy_statistics([1.4, 2.2, 1.8]))
    assert statistics(summary, "e2el") == pytest.approx(numpy_statistics([3.8, 2.2, 2.9]))
    assert statistics(summary, "itl") == pytest.approx(numpy_statistics([1.3, 1.1, 1.1]))
    assert statistics(summary, "normalized_latency") == pytest.approx(numpy_statistics([3.8 / 3, 2.2, 2.9 / 2]))


def test_requests_of_one_token_are_left_out_of_tpot() -> None:
    world = three_requests()

    assert statistics(summary_of(world), "tpot") == pytest.approx(numpy_statistics([1.2, 1.1]))
    assert Latencies(world.requests).values("tpot") == pytest.approx([1.2, np.nan, 1.1], nan_ok=True)


def test_counts_and_rates_by_hand() -> None:
    summary = summary_of(three_requests())

    assert (summary["completed"], summary["rejected"], summary["preemptions"], summary["steps"]) == (3, 0, 0, 5)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (14, 6)
    assert summary["duration"] == pytest.approx(0.0129)
    assert summary["request_throughput"] == pytest.approx(3 / 0.0129)
    assert summary["output_throughput"] == pytest.approx(6 / 0.0129)
    assert summary["total_token_throughput"] == pytest.approx(20 / 0.0129)
    assert (summary["wall_s"], summary["requests_per_wall_s"]) == (2.0, 1.5)


def test_occupancy_by_hand() -> None:
    summary = summary_of(three_requests())

    assert summary["busy_s"] == pytest.approx(0.0067)
    assert summary["mean_running"] == pytest.approx((1.4 + 2 * 1.3 + 1.1 + 1.8 + 1.1) / 6.7)
    assert summary["peak_running"] == 2
    # stored as each step starts: 0, A's 4, A's 5, 0, C's 8; held once it has its blocks: 1, 3, 2, 2, 3
    stored = 1.3 * 4 + 1.1 * 5 + 1.1 * 8
    held = 4 * (1.4 * 1 + 1.3 * 3 + 1.1 * 2 + 1.8 * 2 + 1.1 * 3)
    assert summary["kv_utilization"] == pytest.approx(stored / (6.7 * 40))
    assert summary["kv_reserved"] == 0
    assert summary["kv_internal"] == pytest.approx((held - stored) / (6.7 * 40))
    assert summary["kv_free"] == pytest.approx(1 - held / (6.7 * 40))


def test_time_before_the_first_arrival_does_not_count() -> None:
    early, late = summary_of(three_requests()), summary_of(three_requests(start_ms=5000))

    assert late == pytest.approx(early)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=2), 2),  # B waits 2.2 ms
        (Slo(ttft_ms=1.8), 2),  # a limit met exactly is met
        (Slo(tpot_ms=1.15), 2),  # A takes 1.2; B, of one token, has nothing to miss
        (Slo(e2el_ms=3), 2),
        (Slo(ttft_ms=2, tpot_ms=1.15), 1),
        (Slo(ttft_ms=2, tpot_ms=1.15, e2el_ms=2), 0),
        (Slo(ttft_ms=10, tpot_ms=10, e2el_ms=10), 3),
    ],
)
def test_goodput_counts_who_meets_all_of_the_slo(slo: Slo, good: int) -> None:
    assert summary_of(three_requests(), slo)["request_goodput"] == pytest.approx(good / 0.0129)


def test_goodput_is_none_without_an_slo() -> None:
    assert summary_of(three_requests())["request_goodput"] is None


def test_a_static_batch_answers_together() -> None:
    """Prompt step 0–1.4, two decodes of two slots each (one then dead) 1.2 ms: all is answered at 3.8."""
    world = play(trace_of([(0, 2, 1), (0, 2, 3)]), lambda: Static(batch=2), milliseconds, max_model_len=20)
    summary = summary_of(world)

    assert statistics(summary, "ttft") == pytest.approx(numpy_statistics([1.4, 1.4]))
    assert statistics(summary, "e2el") == pytest.approx(numpy_statistics([3.8, 3.8]))
    assert statistics(summary, "tpot") == pytest.approx(numpy_statistics([1.2]))


def test_nothing_but_rejections() -> None:
    world = play(trace_of([(0, 500, 5), (MS, 500, 5)]), sync_vllm, milliseconds, blocks=10, block_size=4)
    summary = summary_of(world, Slo(ttft_ms=1))

    assert list(world.requests.status) == [Status.REJECTED] * 2
    assert (summary["completed"], summary["rejected"], summary["duration"], summary["steps"]) == (0, 2, 0, 0)
    assert (summary["request_throughput"], summary["request_goodput"]) == (0, 0)
    assert {summary[f"{s}_{m}_ms"] for m in ("ttft", "tpot", "itl", "e2el") for s in STATISTICS} == {None}
    assert summary["mean_leap"] is None


def test_rejected_requests_count_in_no_latency() -> None:
    rows = [(0, 4, 3), (MS // 2, 2, 1), (5 * MS, 500, 5), (10 * MS, 8, 2)]
    world = play(trace_of(rows), sync_vllm, milliseconds, blocks=10, block_size=4)
    summary, without = summary_of(world), summary_of(three_requests())

    assert summary["rejected"] == 1
    other = ("rejected", "offered_rate", "wall_s", "requests_per_wall_s")
    assert {k: v for k, v in summary.items() if k not in other} == pytest.approx(
        {k: v for k, v in without.items() if k not in other}
    )


# ---- against NumPy ----


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6, allow_nan=False), st.integers(1, 40)),
        min_size=1,
        max_size=30,
    )
)
def test_weighted_statistics_are_numpys_on_the_list_written_out(pairs: list[tuple[float, int]]) -> None:
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])
    expected = numpy_statistics(np.repeat(values, weights))
    assert weighted_statistics(values, weights) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_weighted_statistics_of_nothing() -> None:
    assert weighted_statistics(np.array([]), np.array([], dtype=np.int64)) == [None] * len(STATISTICS)


# ---- on every run ----

ROWS = st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25).map(
    sorted
)


def check_shares(summary: dict[str, Any]) -> None:
    shares = [summary[f"kv_{name}"] for name in ("utilization", "reserved", "internal", "free")]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25)
@given(rows=ROWS, replicas=st.integers(1, 2))
def test_identities(policy: str, rows: list[tuple[int, int, int]], replicas: int) -> None:
    world = play(trace_of(rows), POLICIES[policy], blocks=60, block_size=16, replicas=replicas, max_model_len=200)
    summary = summary_of(world)
    requests = world.requests
    done = [i for i, status in enumerate(requests.status) if status == Status.FINISHED]
    outputs, prompts = summary["total_output_tokens"], summary["total_input_tokens"]
    if not done:
        return

    assert summary["completed"] + summary["rejected"] == len(rows)
    assert summary["request_throughput"] * summary["duration"] == pytest.approx(len(done))
    assert summary["output_throughput"] * summary["duration"] == pytest.approx(outputs)
    assert summary["total_token_throughput"] == pytest.approx(summary["output_throughput"] * (1 + prompts / outputs))
    assert summary["mean_running"] <= summary["peak_running"]
    check_shares(summary)

    _, weights = inter_token_gaps([engine.records for engine in world.engines])
    assert weights.sum() == outputs - len(done)
    times = Latencies(requests)
    ttft, e2el, tpot = (times.values(name) for name in ("ttft", "e2el", "tpot"))
    assert (ttft <= e2el).all()
    assert e2el == pytest.approx(ttft + np.nan_to_num(tpot) * (times.outputs - 1)) or "static" in policy


@pytest.mark.parametrize("policy", CONTINUOUS)
@settings(max_examples=25)
@given(rows=ROWS, replicas=st.integers(1, 2))
def test_littles_law(policy: str, rows: list[tuple[int, int, int]], replicas: int) -> None:
    """Requests in service × time = Σ residence, to the picosecond.

    For whoever is admitted runs in steps until finished (a continuous replica never idles then), and leaves only by
    finishing or by preemption: without preemption Σ over runs of duration × running = Σ finished − admitted.
    """
    world = play(trace_of(rows), POLICIES[policy], blocks=400, block_size=16, replicas=replicas, max_model_len=200)
    requests = world.requests
    assert sum(requests.preemptions) == 0
    lanes = 0
    for engine in world.engines:
        table = engine.records.runs()
        names = ("first_ps", "slope_ps", "steps", "running")
        for first, slope, steps, running in zip(*(table[name].tolist() for name in names), strict=True):
            lanes += running * (steps * first + slope * (steps * (steps - 1) // 2))
    residence = sum(
        requests.finished[i] - requests.admitted[i]
        for i, status in enumerate(requests.status)
        if status == Status.FINISHED
    )

    assert lanes == residence
    summary = summary_of(world)
    assert summary["mean_running"] * summary["busy_s"] * 1e12 == pytest.approx(residence)


def test_shares_add_up_where_memory_is_short() -> None:
    """Preemptions and chunks as well."""
    rows = [(i * 500, 30 + 7 * i % 40, 20 + 11 * i % 60) for i in range(40)]
    for blocks in (10, 20, 200):
        world = play(
            trace_of(rows),
            lambda: Vllm(async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=48),
            blocks=blocks,
            block_size=16,
        )
        summary = summary_of(world)
        check_shares(summary)
        assert summary["rejected"] == 0
        assert (summary["preemptions"] > 0) == (blocks < 200)
