"""Leaping changes nothing of what SGLang's scheduler does: prefixes, evictions, priorities, retractions, overlap."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.policies.sglang import Sglang
from chairlift.sim.replica.radix_pool import Node, RadixPool
from kit.leaping import arrivals, backends
from kit.worlds import Affine, World, check_books, play, trace_of

ORDERS = ["fcfs", "fcfs", "lpm", "dfs-weight", "lof", "hrrn"]


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of SGLang's with a small pool's worth of requests in mind."""
    version = draw(st.sampled_from(["0.5.17", "0.5.23", "0.5.23"]))
    priorities = draw(st.booleans())
    page = draw(st.sampled_from([1, 1, 4, 16]))
    order = draw(st.sampled_from(["fcfs", "lof"] if priorities else ORDERS[: 5 if version == "0.5.17" else 6]))
    return {
        "version": version,
        "schedule_policy": order,
        "schedule_conservativeness": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "page_size": page,
        "chunked_prefill_size": draw(st.sampled_from([-1, page * 2, page * 8, 64])),
        "max_prefill_tokens": draw(st.sampled_from([40, 16384])),
        "max_running_requests": draw(st.integers(1, 12)),
        "prefill_max_requests": draw(st.sampled_from([None, None, 1, 3])),
        "prefill_decode_interval": draw(st.sampled_from([0, 0, 0, 2])) if version == "0.5.23" else 0,
        "enable_mixed_chunk": draw(st.booleans()),
        "disable_radix_cache": draw(st.sampled_from([False, False, True])),
        "disable_overlap_schedule": draw(st.booleans()),
        "enable_priority_scheduling": priorities,
        "priority_scheduling_preemption_threshold": draw(st.sampled_from([0, 1])),
        "schedule_low_priority_values_first": draw(st.booleans()),
        "disable_priority_preemption": draw(st.booleans()),
        "retraction_policy": draw(st.sampled_from(["length", "priority"])),
    }


# arrival ps, prompt, output, prefix group, prefix tokens (as a share of the prompt), who declares how much, priority
requests = st.lists(
    st.tuples(
        arrivals,
        st.integers(1, 70),
        st.integers(1, 60),
        st.integers(-1, 2),
        st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        st.sampled_from(["exact", "more", "ignores EOS"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=300)
@given(
    table=requests,
    policy=policies(),
    backend=backends,
    tokens=st.integers(180, 600),
    sessions=st.booleans(),
    replicas=st.integers(1, 2),
)
def test_leap_equals_step(
    table: list[tuple[int, int, int, int, float, str, int]],
    policy: dict[str, Any],
    backend: Affine,
    tokens: int,
    sessions: bool,
    replicas: int,
) -> None:
    table = sorted(table)
    columns: dict[str, Any] = {
        "max_tokens": [r[2] + 30 * (r[5] == "more") for r in table],
        "ignore_eos": [int(r[5] == "ignores EOS") for r in table],
        "priority": [r[6] for r in table],
    }
    if sessions:
        columns["session"] = [r[3] for r in table]
    else:
        columns |= {"prefix_group": [r[3] for r in table], "prefix_tokens": [int(r[1] * r[4]) for r in table]}
    trace = trace_of([r[:3] for r in table], **columns)
    blocks = max(8, tokens // policy["page_size"])

    leapt, stepped = (
        play(trace, lambda: Sglang(**policy), lambda: backend, blocks, replicas=replicas, leap=leap, max_model_len=300)
        for leap in (True, False)
    )

    assert leapt.outcome() == stepped.outcome()
    assert trees(leapt) == trees(stepped)
    for world in (leapt, stepped):
        check_books(world)
        for engine in world.engines:
            check_tree(engine.pool)


def trees(world: World) -> list[list[Any]]:
    """The nodes of each replica's tree, the least recently used first."""
    found = []
    for engine in world.engines:
        nodes: list[Node] = [engine.pool._root] if isinstance(engine.pool, RadixPool) else []
        for node in nodes:
            nodes.extend(node.children.values())
        found.append([(n.start, n.stop, n.head, len(n.children)) for n in sorted(nodes[1:], key=lambda n: n.time)])
    return found


def check_tree(pool: Any) -> None:
    """Nobody holds a node, nodes follow one another without gaps, and the pages add up."""
    if not isinstance(pool, RadixPool):
        return
    pages, stack = 0, [pool._root]
    while stack:
        node: Node = stack.pop()
        for child in node.children.values():
            assert child.parent is node
            assert child.start == node.stop < child.stop
            assert child.locks == 0
            pages += (child.stop - child.start) // pool.block_size
            stack.append(child)
    assert pages == pool.cached <= pool.total
