"""Random requests whose prompts begin alike: in groups, or as turns of sessions."""

from __future__ import annotations

from hypothesis import strategies as st

from chairlift.sim.workload.trace import Trace
from kit.worlds import trace_of

arrivals = st.one_of(st.integers(0, 40).map(lambda k: k * 1000), st.integers(0, 60_000))
rows = st.lists(
    st.tuples(arrivals, st.integers(1, 60), st.integers(1, 50), st.integers(-1, 2), st.integers(0, 40)),
    min_size=1,
    max_size=22,
)


def grouped(table: list[tuple[int, int, int, int, int]]) -> Trace:
    """Prompts of one group share their first tokens."""
    group = [g for *_, g, _ in table]
    shared = [min(s, p) if g >= 0 else 0 for _, p, _, g, s in table]
    priority = [(7 * i) % 3 for i in range(len(table))]
    return trace_of([r[:3] for r in table], prefix_group=group, prefix_tokens=shared, priority=priority)


def in_sessions(table: list[tuple[int, int, int, int, int]]) -> Trace:
    """Prompts of one session grow: each continues the last prompt and answer, or forgets them."""
    length: dict[int, int] = {}
    turns = []
    for at, prompt, output, session, forget in table:
        if session >= 0 and forget > 8:
            prompt = min(prompt + length.get(session, 0), 150)
        length[session] = prompt + output
        turns.append((at, prompt, output))
    return trace_of(turns, session=[s for *_, s, _ in table])
