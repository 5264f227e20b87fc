"""Leaping changes nothing where layers have windows: prefixes, chunks, preemptions, priorities, steps planned ahead."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.policies.base import KvGroups
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica.hybrid_pool import HybridPool
from kit.leaping import backends
from kit.prefixes import grouped, in_sessions, rows
from kit.worlds import Affine, World, check_books, play

MAX_LEN = 120  # tokens of prompt and answer


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of vLLM's with a small pool's worth of requests in mind."""
    return {
        "version": draw(st.sampled_from(["0.23", "0.26", "0.33", "0.33"])),
        "max_num_batched_tokens": draw(st.sampled_from([7, 16, 64])),
        "max_num_seqs": draw(st.sampled_from([1, 3, 7])),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 5])),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
        "scheduler_reserve_full_isl": draw(st.booleans()),
        "enable_prefix_caching": draw(st.sampled_from([True, True, False])),
        "async_scheduling": draw(st.booleans()),
        "prefix_cache_retention_interval": draw(st.sampled_from([None, 0, 32, "dense"])),
    }


@st.composite
def layers(draw: st.DrawFn) -> KvGroups:
    """Groups of layers with one window, or chunks, some of them looking back on everything."""
    if draw(st.sampled_from([False, False, True])):
        return KvGroups((16,) * draw(st.integers(1, 2)) + (0,), chunked=True)
    window = draw(st.sampled_from([1, 5, 16, 17, 31, 64]))
    return KvGroups((window,) * draw(st.integers(1, 3)) + (0,) * draw(st.integers(0, 2)))


def pools(world: World) -> list[HybridPool]:
    return [engine.pool for engine in world.engines if isinstance(engine.pool, HybridPool)]


def check_pool(pool: HybridPool) -> None:
    """All blocks are free, once each, and exactly those with a key can be found; or all are free by count."""
    assert pool.free == pool.total
    assert pool.spared == 0
    assert not pool._held
    assert not pool._odd
    if pool._identity is None:
        assert not pool._queue
        assert not pool._keys
        return
    stale = dict(pool._stale)
    free = []
    for block in pool._queue:
        if stale.get(block):
            stale[block] -= 1
        else:
            free.append(block)
    assert sorted(free) == list(range(pool.total))
    assert not any(stale.values())
    assert set(pool._users) == set(pool._keys)
    assert not any(pool._users.values())
    found = {block: key for key, block in pool._cached.items()}
    found |= {block: key for key, copies in pool._copies.items() for block in copies}
    assert found == pool._keys


@settings(max_examples=150)
@given(
    table=rows,
    sessions=st.booleans(),
    policy=policies(),
    groups=layers(),
    backend=backends,
    more=st.integers(0, 60),
    block_size=st.sampled_from([4, 16]),
    replicas=st.integers(1, 2),
)
def test_leap_equals_step(
    table: list[tuple[int, int, int, int, int]],
    sessions: bool,
    policy: dict[str, Any],
    groups: KvGroups,
    backend: Affine,
    more: int,
    block_size: int,
    replicas: int,
) -> None:
    trace = in_sessions(sorted(table)) if sessions else grouped(sorted(table))
    blocks = len(groups.windows) * (MAX_LEN // block_size + 2) + more

    def once(leap: bool) -> World:
        return play(
            *(trace, lambda: Vllm(**policy), lambda: backend, blocks, block_size, replicas, leap),
            max_model_len=MAX_LEN,
            groups=groups,
        )

    leapt, stepped = once(True), once(False)

    assert leapt.outcome() == stepped.outcome()
    for one, other in zip(pools(leapt), pools(stepped), strict=True):
        assert list(one._queue) == list(other._queue)
        assert one._keys == other._keys
    for world in (leapt, stepped):
        check_books(world)
        assert len(pools(world)) == replicas
        for pool in pools(world):
            check_pool(pool)
