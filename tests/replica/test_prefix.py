"""The pool that knows each block: what is shared, what is found, what is reused; and that it leaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.policies.base import Scheduler
from chairlift.policies.vllm import Vllm
from chairlift.sim.cluster import build
from chairlift.sim.replica.counting_pool import PrefixCacheMatters, StandInPool
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.prefix_pool import PrefixPool
from chairlift.sim.replica.request import Live
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.workload.formats import read as formats
from chairlift.sim.workload.trace import HashIds, Trace
from kit.places import TRACES
from kit.prefixes import grouped, in_sessions, rows
from kit.worlds import Affine, World, check_books, play, trace_of

with_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="needs the public traces in ../shared/traces")

POLICIES: dict[str, Callable[[int], Scheduler]] = {
    "sync": lambda n: Vllm(max_num_batched_tokens=64, max_num_seqs=n, async_scheduling=False),
    "async": lambda n: Vllm(max_num_batched_tokens=64, max_num_seqs=n),
    "async-tight": lambda n: Vllm(max_num_batched_tokens=9, max_num_seqs=n * 3, long_prefill_token_threshold=5),
    "sync-priority": lambda n: Vllm(
        max_num_batched_tokens=48, max_num_seqs=n, scheduling_policy="priority", async_scheduling=False
    ),
    "async-priority": lambda n: Vllm(max_num_batched_tokens=48, max_num_seqs=n, scheduling_policy="priority"),
    "async-eager": lambda n: Vllm(max_num_batched_tokens=64, max_num_seqs=n, scheduler_reserve_full_isl=False),
    "0.23-async": lambda n: Vllm(version="0.23", max_num_batched_tokens=64, max_num_seqs=n),
    "0.23-priority": lambda n: Vllm(
        version="0.23", max_num_batched_tokens=48, max_num_seqs=n, scheduling_policy="priority", async_scheduling=n > 3
    ),
    "watermark": lambda n: Vllm(max_num_batched_tokens=64, max_num_seqs=n, watermark=0.1 * n, async_scheduling=n > 2),
    "interval": lambda n: Vllm(
        max_num_batched_tokens=40, max_num_seqs=9, prefill_schedule_interval=n + 1, async_scheduling=n > 2
    ),
    "all-settings-priority": lambda n: Vllm(
        max_num_batched_tokens=48,
        max_num_seqs=9,
        max_num_scheduled_tokens=40,
        max_num_active_seqs=n,
        long_prefill_token_threshold=7,
        long_prefill_token_threshold_adaptive=True,
        prefill_schedule_interval=3,
        watermark=0.1,
        scheduler_reserve_full_isl=n > 2,
        max_num_queued_reqs=15,
        max_num_queued_tokens=200,
        scheduling_policy="priority" if n > 3 else "fcfs",
    ),
}


def check_pool(world: World) -> None:
    """All blocks are free, and exactly those with a key can be found."""
    for engine in world.engines:
        pool = engine.pool
        assert isinstance(pool, PrefixPool)
        assert pool.free == pool.total
        findable = [entry for entry in pool._queue if entry >= 0]
        names = range(len(pool._users))
        keys = {name: pool._keys[name] for name in names if name not in pool._unused}
        assert set(findable) == set(keys)
        assert len(findable) == len(keys) + sum(pool._stale)
        assert pool._front - sum(entry for entry in pool._queue if entry < 0) == pool.total - len(keys)
        assert len(keys) + len(pool._unused) == len(names)
        assert len(pool._users) <= pool.total
        assert not any(pool._users)
        assert not pool._heads
        found = {block: key for key, block in pool._cached.items()}
        found |= {block: key for key, copies in pool._copies.items() for block in copies}
        assert found == keys


@pytest.mark.parametrize("kind", [grouped, in_sessions], ids=["groups", "sessions"])
@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=40)
@given(
    table=rows,
    size=st.integers(1, 6),
    blocks=st.integers(10, 60),
    block_size=st.sampled_from([4, 8, 16]),
    replicas=st.integers(1, 2),
    context=st.sampled_from([0, 3]),
)
def test_leap_equals_step(
    name: str,
    kind: Callable[[list[tuple[int, int, int, int, int]]], Trace],
    table: list[tuple[int, int, int, int, int]],
    size: int,
    blocks: int,
    block_size: int,
    replicas: int,
    context: int,
) -> None:
    trace = kind(sorted(table))
    backend = Affine(context=context)
    leapt, stepped = (
        play(trace, lambda: POLICIES[name](size), lambda: backend, blocks, block_size, replicas, leap, 500)
        for leap in (True, False)
    )

    assert leapt.outcome() == stepped.outcome()
    for world in (leapt, stepped):
        check_books(world)
        check_pool(world)


def one_by_one(trace: Trace, blocks: int = 100, block_size: int = 4) -> list[int]:
    """Tokens that each request finds when it is served alone, after all before it."""
    policy = Vllm(max_num_batched_tokens=10**6, async_scheduling=False)
    world = play(trace, lambda: policy, Affine, blocks, block_size)
    return list(world.requests.cached_tokens)


def test_a_group_shares_its_full_blocks() -> None:
    # Blocks of 4. Ten shared tokens fill two blocks; the third holds two shared and two of the request's own.
    far = 10**9
    trace = trace_of(
        [(0, 20, 3), (far, 20, 3), (2 * far, 9, 3), (3 * far, 8, 3), (4 * far, 20, 3)],
        prefix_group=[0, 0, 0, 0, 1],
        prefix_tokens=[10, 10, 9, 8, 10],
    )

    # the fourth asks for 8 tokens, all stored: its last block is computed once more
    assert one_by_one(trace) == [0, 8, 8, 4, 0]


def test_a_turn_finds_the_last_prompt_and_answer() -> None:
    # Blocks of 4. Turn 1 stores 10 + 7 - 1 = 16 tokens (the last one is never stored): four blocks. Turn 2 asks for
    # 25 and finds 16; it stores 25 + 5 - 1 = 29, seven blocks. Turn 3 has forgotten: 20 < 30, so it finds nothing.
    # Turn 4 goes on from turn 3, which stored 20 + 2 - 1 = 21 tokens in five full blocks.
    far = 10**9
    trace = trace_of([(0, 10, 7), (far, 25, 5), (2 * far, 20, 2), (3 * far, 40, 2)], session=[3, 3, 3, 3])

    assert one_by_one(trace) == [0, 16, 0, 20]


@pytest.mark.parametrize("forgets", [False, True])
def test_blocks_of_a_plan_that_was_taken_back_stay_in_the_cache_of_vllm(
    forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven blocks of 16. A computes 32 tokens a step; B, more urgent, comes in the second. In the third A's last two
    # blocks are planned, then B's first decode needs one: A is preempted, and its tail is what B takes. A's fifth
    # block, never filled, is found (80 tokens, 20 to compute) unless it is forgotten (64 tokens; 32 and 4).
    make = build.make_pool
    monkeypatch.setattr(build, "make_pool", lambda *parts: make(*parts[:5], executes=forgets))
    policy = Vllm(
        version="0.23",  # since 0.31 A would not be held to 32 tokens while it is alone
        max_num_batched_tokens=64,
        long_prefill_token_threshold=32,
        scheduling_policy="priority",
        async_scheduling=False,
    )
    trace = trace_of([(0, 100, 3), (1, 16, 2)], priority=[9, 0], max_tokens=[3, 2])
    world = play(trace, lambda: policy, Affine, blocks=7)

    assert list(world.requests.preemptions) == [1, 0]
    runs = world.engines[0].records.runs()
    assert runs["prefill_tokens"][runs["chunks"] > 0].tolist() == [32, 32 + 16, *([32, 4] if forgets else [20])]


def test_an_id_stands_for_all_before_it() -> None:
    # Ids cover 8 tokens, blocks 4. B shares A's first id; C shares both; D's 12 tokens end inside its second id.
    far = 10**9
    ids = HashIds(np.array([1, 2, 1, 3, 1, 2, 1, 2]), np.array([0, 2, 4, 6, 8]))
    trace = trace_of([(i * far, p, 2) for i, p in enumerate((16, 16, 16, 12))], hash_ids=ids, hash_block=8)

    assert one_by_one(trace) == [0, 8, 12, 8]


def test_the_least_recently_used_block_goes_first_and_a_tail_before_its_head() -> None:
    # Six blocks of 4. A holds four (two prompt tokens more than 12, so three are full and kept), then frees them, tail
    # first: the queue is [never used 4, 5, A's 3 2 1 0]. B takes three: 4, 5 and A's tail, which holds no full block.
    # C, A's prompt again, still finds A's first three blocks; had B taken four, it would find two.
    far = 10**9
    for tokens_of_b, found in ((12, 12), (13, 8)):
        trace = trace_of(
            [(0, 14, 1), (far, tokens_of_b, 1), (2 * far, 14, 1)], prefix_group=[0, 1, 0], prefix_tokens=[14, 0, 14]
        )

        assert one_by_one(trace, blocks=6)[2] == found


def test_what_two_requests_use_is_counted_once() -> None:
    # Both run at once: 3 shared blocks, and one more each for the 13th token on. 12 shared of 13 prompt tokens.
    trace = trace_of([(0, 13, 40), (1, 13, 40)], prefix_group=[0, 0], prefix_tokens=[12, 12])
    world = play(trace, lambda: Vllm(async_scheduling=False), Affine, blocks=100, block_size=4)

    held = world.engines[0].records.runs()["held_blocks"].tolist()
    assert held[0] == 4
    assert held[1] == 4 + 1
    assert list(world.requests.cached_tokens) == [0, 12]


def lru_block_hits(trace: Trace, blocks: int) -> float:
    """Share of block references found, each request stored and freed before the next; partial blocks count whole."""
    assert trace.hash_ids is not None
    counts = np.diff(trace.hash_ids.offsets)
    whole = Trace(
        arrival_ps=trace.arrival_ps,
        prompt_tokens=counts * trace.hash_block,
        output_tokens=np.ones(len(trace), np.int64),
        hash_ids=trace.hash_ids,
    )
    pool = PrefixPool(blocks, trace.hash_block, Identity(whole, trace.hash_block))
    found = 0
    for i, prompt in enumerate(whole.prompt_tokens.tolist()):
        request = Live(i, 0, prompt, 1)
        request.produced = 1  # so that a full hit counts all of its blocks
        found += pool.hit(request)
        pool.open(request, prompt)
        pool.computed(request, prompt)
        pool.close(request, prompt)
    return found / int(whole.prompt_tokens.sum())


@with_traces
@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_hit_rates_by_cache_size_are_those_of_the_mooncake_traces(name: str) -> None:
    trace = formats.load(TRACES / f"mooncake_{name}_trace.jsonl.gz")
    published = json.loads((TRACES / "stats.json").read_text())["mooncake"][name]["prefix"]["lru_block_hit"]

    for size, hit in published.items():
        blocks = min(int(size), 300_000)  # more than the traces have
        assert lru_block_hits(trace, blocks) == pytest.approx(hit, abs=0.001), size


@with_traces
@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_an_endless_cache_finds_what_the_traces_share(name: str) -> None:
    trace = formats.load(TRACES / f"mooncake_{name}_trace.jsonl.gz")
    published = json.loads((TRACES / "stats.json").read_text())["mooncake"][name]["prefix"]["token_hit"]
    pool = PrefixPool(2_000_000, 64, Identity(trace, 64))
    found = 0
    for i, prompt in enumerate(trace.prompt_tokens.tolist()):
        request = Live(i, 0, prompt, 1)
        found += pool.hit(request)
        pool.open(request, prompt)
        pool.computed(request, prompt)
        pool.close(request, prompt)

    assert found / int(trace.prompt_tokens.sum()) == pytest.approx(published, abs=0.002)


SCENARIO = """
model: opt-13b
gpu: a100-40gb
max_model_len: 2048
kv: {{blocks: {blocks}}}
policy: vllm
workload:
  requests: 60
  arrivals: {{burst: {{}}}}
  prompt_tokens: 200
  output_tokens: {{uniform: {{low: 20, high: 300}}}}
"""


@pytest.mark.parametrize("blocks", [2000, 300], ids=["roomy", "preempting"])
def test_counting_stands_in_for_the_cache_only_until_somebody_is_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO.format(blocks=blocks))
    [setup] = load(file).setups
    quick = simulate(setup)
    monkeypatch.setattr(Identity, "shares", lambda trace: True)
    exact = simulate(setup)

    assert (sum(quick.requests.preemptions) > 0) == (blocks == 300)
    for column, values in exact.requests.columns().items():
        assert np.array_equal(quick.requests.columns()[column], values), column
    if blocks == 300:
        with pytest.raises(PrefixCacheMatters):
            StandInPool(10, 16).preempted(Live(0, 0, 1, 1), True, True)
