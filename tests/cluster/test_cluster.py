"""Random small clusters: leaping changes nothing, and whatever happens every request ends exactly once."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.backend.base import NO_HOST, WHOLE, Host
from chairlift.policies import routers
from chairlift.policies.base import Router, Scheduler
from chairlift.policies.deadline import Deadline
from chairlift.policies.fair import Fair
from chairlift.policies.mlfq import Mlfq
from chairlift.policies.orca import Orca
from chairlift.policies.priority import Priority
from chairlift.policies.sarathi import Sarathi
from chairlift.policies.sglang import Sglang
from chairlift.policies.sjf import Sjf, Srpt
from chairlift.policies.slo import Slo
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_v0 import VllmV0
from chairlift.sim.results.records import Status
from chairlift.sim.study import Autoscale, Failures, Limits, Outage, Planned, Saturation, Setup
from chairlift.sim.workload.trace import HashIds, Trace
from kit.clusters import (
    check_endings,
    check_gap_time,
    check_nothing_left,
    check_tokens,
    group,
    link,
    s,
    same,
    serve,
    setup_of,
)
from kit.worlds import Affine, trace_of

EXAMPLES = int(os.environ.get("CHAIRLIFT_EXAMPLES", "300"))  # 10,000 have been run
GRID = 1000  # ps: times are multiples of it, and so are many steps, so that ties are common
HASH_BLOCK = 8

Draw = Callable[[st.SearchStrategy[Any]], Any]

ROUTERS: list[tuple[type[Router], dict[str, Any]]] = [
    (routers.RoundRobin, {}),
    (routers.RandomChoice, {}),
    (routers.LeastOutstanding, {}),
    (routers.LeastTokens, {}),
    (routers.ShortestQueue, {}),
    (routers.PowerOfTwo, {}),
    (routers.SessionSticky, {}),
    (routers.PrefixAffinity, {"slack": 1}),
]


def policy(draw: Draw, closed: bool) -> tuple[type[Scheduler], dict[str, Any]]:
    """``closed``: arrivals wait for answers, so nobody may wait for arrivals."""
    size = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["vllm", "vllm", "vllm", "static", "orca", "tgi", "zoo", "zoo", "zoo"]))
    if kind == "zoo":
        return draw(st.sampled_from(zoo(size)))
    if kind == "static":
        start = "impatient" if closed else draw(st.sampled_from(["full", "impatient"]))
        pad_to = draw(st.sampled_from(["batch", "global"]))
        wait = draw(st.sampled_from([None, 3e-6]))
        return Static, {"batch": size, "start": start, "pad_to": pad_to, "max_wait_ms": wait}
    if kind == "orca":
        return Orca, {"max_batch": size, "reserve": draw(st.sampled_from(["declared", "pow2", "oracle"]))}
    if kind == "tgi":
        return Tgi, {"max_batch_total_tokens": 100 * size + 100, "max_waiting_tokens": 3}
    return Vllm, {
        "async_scheduling": draw(st.booleans()),
        "enable_prefix_caching": draw(st.booleans()),
        "max_num_batched_tokens": draw(st.sampled_from([7, 40])),
        "max_num_seqs": 2 * size,
        "scheduling_policy": draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
    }


def zoo(size: int) -> list[tuple[type[Scheduler], dict[str, Any]]]:
    """Policies that preempt, swap, reorder or ask for predictions."""
    return [
        (Sarathi, {"budget": 12, "max_batch": 2 * size, "enable_prefix_caching": True}),
        (VllmV0, {"max_num_seqs": 2 * size, "preemption_mode": "swap", "watermark": 0}),
        (VllmV0, {"max_num_seqs": 2 * size, "enable_prefix_caching": True}),
        (Sglang, {"page_size": 16, "chunked_prefill_size": 16, "max_running_requests": 2 * size}),
        (Sglang, {"page_size": 16, "schedule_conservativeness": 0.0, "enable_mixed_chunk": True}),
        (Sjf, {"max_batch": size, "predictions": "noisy", "tau": 0.5, "starvation_steps": 6}),
        (Srpt, {"max_batch": size, "predictions": "noisy", "tau": 0.5, "preemption": "swap", "budget": 20}),
        (Priority, {"max_batch": size, "preemption": "swap", "enable_prefix_caching": True}),
        (Slo, {"tpot_ms": 5e-6, "budget": 30, "max_batch": 2 * size}),
        (Deadline, {"tpot_ms": 5e-6, "ttft_ms": [1e-5, 5e-5], "max_batch": 2 * size}),
        (Fair, {"max_batch": size, "budget": 20}),
        (Mlfq, {"max_batch": 2 * size, "quantum": 3, "promote_steps": 15}),
        (Orca, {"max_batch": size, "reserve": "declared", "allocator": "buddy"}),
    ]


def trace_for(draw: Draw, closed: bool) -> Trace:
    """Requests, or chains of requests of which each follows an earlier one."""
    requests = st.tuples(st.integers(1, 40), st.integers(1, 40))
    kind = draw(st.sampled_from(["plain", "groups", "sessions", "hashes"]))
    rows: list[tuple[int, int, int]] = []
    follows: list[int] = []
    think: list[int] = []
    family: list[int] = []
    starts = sorted(
        draw(st.lists(st.integers(0, 30).map(lambda k: k * GRID), min_size=1, max_size=6 if closed else 14))
    )
    for number, at in enumerate(starts):
        head = len(rows)
        length = 0
        for turn in range(draw(st.integers(1, 4)) if closed else 1):
            prompt, output = draw(requests)
            if kind == "sessions":
                prompt = min(prompt + length, 80)
                length = prompt + output
            follows.append(draw(st.integers(head, len(rows) - 1)) if turn else -1)
            think.append(draw(st.sampled_from([0, GRID, 3 * GRID])) if turn else 0)
            rows.append((at, prompt, output))
            family.append(number % 3)
    columns: dict[str, Any] = {"max_tokens": [o + (3 * o) % 5 for _, _, o in rows]}
    columns["priority"] = [(7 * i) % 3 for i in range(len(rows))]
    if closed:
        columns |= {"follows": follows, "think_ps": think}
    if kind == "groups":
        columns |= {"prefix_group": family, "prefix_tokens": [min(p, 16) for _, p, _ in rows]}
    elif kind == "sessions":
        columns["session"] = family
    elif kind == "hashes":
        ids, offsets = [], [0]
        for (_, prompt, _), f in zip(rows, family, strict=True):
            ids += [100 * f + j for j in range(prompt // HASH_BLOCK)]
            offsets.append(len(ids))
        columns |= {"hash_ids": HashIds(np.array(ids, dtype=np.int64), np.array(offsets)), "hash_block": HASH_BLOCK}
    return trace_of(rows, **columns)


@st.composite
def clusters(draw: Draw, disaggregated: bool | None = None, safe: bool = False) -> Setup:
    """A cluster and its trace. ``safe``: no failures and no limits, so that everybody is served."""
    closed = draw(st.booleans())
    trace = trace_for(draw, closed)
    apart = draw(st.sampled_from([False, False, True])) if disaggregated is None else disaggregated
    failing = not safe and draw(st.booleans())
    on_failure = draw(st.sampled_from(["retry", "fail"])) if failing else "fail"
    cost = Affine(
        fixed=draw(st.sampled_from([GRID, GRID, 997])),
        token=draw(st.sampled_from([0, 10, GRID])),
        context=draw(st.sampled_from([0, 0, 1])),
        host=draw(st.sampled_from([NO_HOST, NO_HOST, Host(schedule=5, launch=40, update=7), Host(200, 600, 400)])),
        each=draw(st.sampled_from([0, 0, 30])),
        chunk_launch=draw(st.sampled_from([0, 0, 3000])),
        chunk_tail=draw(st.sampled_from([WHOLE, 0, 700])),
        decode_tail=draw(st.sampled_from([WHOLE, WHOLE, 500])),
        late=draw(st.booleans()),
        arrival=draw(st.sampled_from([0, 0, 90, 2500])),
    )
    block_size = draw(st.sampled_from([4, 16]))

    def some(role: str, count: int) -> Any:
        scheduler, chosen = policy(draw, closed)
        blocks = draw(st.integers(-(-85 // block_size), 200 // block_size))
        ranks = draw(st.sampled_from([1, 1, 2, 3]))  # of DP-attention
        if closed and scheduler is Static:  # a batch returns while its replica plans: too late for ranks that have
            ranks = 1
        return group(scheduler, chosen, count, role, blocks, block_size, cost, ranks)

    more: dict[str, Any] = {"seed": draw(st.integers(0, 3))}
    if apart:
        groups = [some("prefill", draw(st.integers(1, 2))), some("decode", draw(st.integers(1, 2)))]
        more["link"] = link(draw(st.sampled_from([10, GRID])), draw(st.sampled_from([0, GRID])), draw(st.booleans()))
    elif draw(st.booleans()):
        groups = [some("mixed", 1), some("mixed", draw(st.integers(1, 3)))]
    else:
        groups = [some("mixed", draw(st.integers(1, 4)))]
        if draw(st.booleans()):
            more["autoscale"] = autoscale(draw, groups[0].count)
    count = sum(g.count for g in groups) if "autoscale" not in more else more["autoscale"].max
    if failing:
        keep = {0, count - 1}  # of each role one that comes back
        more["failures"] = failures(draw, count, keep, on_failure)
        more["start_up_ps"] = draw(st.sampled_from([0, 2 * GRID]))
    if not safe and draw(st.booleans()):
        ticks = st.sampled_from([None, s(5 * GRID), s(20 * GRID), s(60 * GRID)])
        queue = draw(st.sampled_from([None, 1, 3]))
        more["limits"] = Limits(queue=queue, queue_timeout_s=draw(ticks), timeout_s=draw(ticks))
    router, chosen = draw(st.sampled_from(ROUTERS))
    more["router_stale_ps"] = draw(st.sampled_from([0, 0, 5 * GRID]))
    return setup_of(trace, groups, router, router_settings=chosen, **more)


def autoscale(draw: Draw, count: int) -> Autoscale:
    rule = draw(
        st.sampled_from(
            [
                {"target_outstanding": 2},
                {"target_waiting": 1},
                {"target_queued": 1.5, "tolerance": 0.1},
                {"target_kv": 0.4},
                {"saturation": Saturation(queue=2, spare_queue=1)},
                {"schedule": [(k * 7 * GRID, n) for k, n in enumerate([3, 1, 2])]},
            ]
        )
    )
    most = max(count, draw(st.integers(1, 4)))
    provision = s(draw(st.sampled_from([0, GRID, 9 * GRID])))
    every = draw(st.sampled_from([2, 10]))
    if "schedule" in rule:
        planned = [Planned(at_s=s(at), replicas=min(n, most)) for at, n in rule["schedule"]]
        return Autoscale(max=most, provision_s=provision, schedule=planned)
    ticks = st.sampled_from([0, 0, GRID, 20 * GRID])
    more: dict[str, Any] = {f"stabilise_{way}_s": s(draw(ticks)) for way in ("up", "down")}
    more |= {"load_s": s(draw(ticks)), "most_up": draw(st.sampled_from([None, 1]))}
    if draw(st.booleans()):
        more |= {"min": 0, "idle_s": s(draw(ticks))}
    return Autoscale(max=most, every_s=s(every * GRID), provision_s=provision, **rule, **more)


def failures(draw: Draw, count: int, keep: set[int], on_failure: Any) -> Failures:
    if draw(st.booleans()):
        mtbf, mttr = (s(draw(st.sampled_from(choices)) * GRID) for choices in ([60, 200], [5, 30]))
        return Failures(mtbf_s=mtbf, mttr_s=mttr, on_failure=on_failure)
    schedule = []
    for _ in range(draw(st.integers(1, 4))):
        replica = draw(st.integers(0, count - 1))
        away = draw(st.sampled_from([GRID, 10 * GRID] if replica in keep else [GRID, 10 * GRID, None]))
        at = draw(st.integers(0, 60)) * GRID
        schedule.append(Outage(replica=replica, at_s=s(at), for_s=None if away is None else s(away)))
    try:
        return Failures(schedule=schedule, on_failure=on_failure)
    except ValidationError:  # a replica would fail that is away
        return Failures(schedule=schedule[:1], on_failure=on_failure)


def batched(setup: Setup) -> bool:
    """Whether answers may come back later than their last tokens."""
    return any(g.scheduler.batch_synchronous for g in setup.groups)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(clusters())
def test_leap_equals_step_and_every_request_ends_once(setup: Setup) -> None:
    leapt, stepped = serve(setup), serve(setup, leap=False)

    same(leapt, stepped)
    assert leapt.endings == stepped.endings
    assert leapt.gaps() == stepped.gaps()
    assert leapt.steps() == stepped.steps()
    for served in (leapt, stepped):
        check_endings(served)
        check_nothing_left(served)
        check_tokens(served)
        if not batched(setup):
            check_gap_time(served)


@settings(max_examples=max(20, EXAMPLES // 10), suppress_health_check=list(HealthCheck))
@given(clusters())
def test_same_seed_same_bytes(setup: Setup) -> None:
    one, other = serve(setup), serve(setup)

    assert {name: c.tobytes() for name, c in one.requests.columns().items()} == {
        name: c.tobytes() for name, c in other.requests.columns().items()
    }
    for mine, theirs in zip(one.engines, other.engines, strict=True):
        assert mine.records.rows == theirs.records.rows
        assert mine.records.gap_rows == theirs.records.gap_rows


@settings(max_examples=max(50, EXAMPLES // 3), suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20),
    replicas=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    block_size=st.sampled_from([1, 4]),
    ahead=st.booleans(),
    cached=st.booleans(),
    shared=st.booleans(),
    token_ps=st.sampled_from([1, 10 * GRID]),
)
def test_pools_just_big_enough_for_the_largest_request_never_deadlock(
    rows: list[tuple[int, int, int]],
    replicas: tuple[int, int],
    block_size: int,
    ahead: bool,
    cached: bool,
    shared: bool,
    token_ps: int,
) -> None:
    chosen = {"async_scheduling": ahead, "enable_prefix_caching": cached, "max_num_batched_tokens": 16}
    prefill = max(-(-prompt // block_size) for _, prompt, _ in rows)  # the first token leaves with the request
    decode = max(-(-(prompt + output - 1) // block_size) for _, prompt, output in rows)
    setup = setup_of(
        trace_of(sorted((at * GRID, prompt, output) for at, prompt, output in rows)),
        [
            group(Vllm, chosen, replicas[0], "prefill", prefill, block_size),
            group(Vllm, chosen, replicas[1], "decode", decode, block_size),
        ],
        routers.LeastOutstanding,
        link=link(token_ps, GRID, shared),
    )

    served = serve(setup)

    assert set(served.requests.status) == {Status.FINISHED}
    check_endings(served)
    check_nothing_left(served)
    check_tokens(served)
    check_gap_time(served)
