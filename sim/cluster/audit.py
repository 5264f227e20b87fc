"""What must hold of every run, and is checked after every run. A failure is a defect of ours, never of the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.cluster.cluster import Cluster
from chairlift.sim.replica.engine import Engine
from chairlift.sim.results.metrics import durations_ps, ends_ps, exact_sum

Columns = dict[str, npt.NDArray[Any]]


def audit(cluster: Cluster) -> None:
    """Check a cluster that has served its trace; raises AssertionError, with the law that is broken and its numbers."""
    columns = cluster.requests.columns()
    _littles_law(columns, cluster.request_time)
    _a_gap_for_each_token(columns, int(cluster.requests.messages().sum()), cluster.engines)
    _gaps_add_up(cluster.requests.spoken_ps, cluster.engines)
    for engine in cluster.engines:
        _one_step_at_a_time(engine)
        _nothing_left(engine)


def _littles_law(columns: Columns, request_time: int) -> None:
    """Little's law, exactly: the requests inside, summed over time as the cluster counted them, is the time that each
    spent there, summed over requests as the records tell.
    """
    stays = columns["finished_ps"] - columns["arrival_ps"]
    inside = exact_sum(stays)
    assert inside == request_time, f"Little's law: {inside} ps by the records, {request_time} ps by the clock"


def _a_gap_for_each_token(columns: Columns, tokens: int, engines: list[Engine]) -> None:
    """Every token that a client got ends one gap, but for first tokens; those that come together count as one."""
    firsts = int((columns["first_token_ps"] >= 0).sum())
    gaps = 0
    for engine in engines:
        gaps += int(engine.records.gaps()["count"].sum())
        for runs in engine.records.run_parts():
            gaps += int((runs["decodes"] * runs["steps"] - runs["late_decodes"]).sum())
    assert gaps == tokens - firsts, f"{tokens} tokens, {firsts} of them first ones, {gaps} gaps"


def _gaps_add_up(spoken_ps: int, engines: list[Engine]) -> None:
    """The gaps between tokens, all together, are the times from requests' first tokens to their latest.

    In three tokens: they come at 100, 130 and 190 ps; their gaps are 30 and 60 ps, and 30 + 60 = 190 - 100.
    """
    gaps = 0
    for engine in engines:
        more = engine.records.gaps()
        gaps += exact_sum(more["gap_ps"] * more["count"])
        for runs in engine.records.run_parts():
            gaps += exact_sum(runs["decodes"] * durations_ps(runs)) - exact_sum(runs["late_decodes"] * runs["first_ps"])
    assert gaps == spoken_ps, f"gaps of {gaps} ps in all, {spoken_ps} ps from first tokens to latest"


def _one_step_at_a_time(engine: Engine) -> None:
    """No replica runs two steps at once."""
    before = np.zeros(1, np.int64)  # the end of the step before
    for runs in engine.records.run_parts():
        ends = np.concatenate([before, ends_ps(runs)])
        assert (runs["start_ps"] >= ends[:-1]).all(), f"replica {engine.index}: two steps at once"
        before = ends[-1:]


def _nothing_left(engine: Engine) -> None:
    """No blocks are left, of the KV pool or of host memory."""
    assert engine.pool.free == engine.pool.total, f"replica {engine.index}: blocks are left behind"
    host = engine.state.host
    assert host.free == host.blocks, f"replica {engine.index}: swapped blocks are left behind"
