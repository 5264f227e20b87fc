"""Several workloads at once, each with arrivals and lengths of its own: tenants of one system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.clients import sent
from chairlift.sim.workload.trace import COLUMNS, HashIds, Trace

_NEITHER = {"session": -1, "prefix_group": -1, "follows": -1}  # what a column says of rows that have none; else 0
_NUMBERED = ("session", "prefix_group", "follows")  # numbers that restart in every part


def merged(parts: Mapping[str, Trace]) -> Trace:
    """The requests of all ``parts`` in order of time; a part's name is its tenants' name, or begins it.

    Sessions, prefix groups and blocks of two parts are never the same. Raises `BadInput` where parts with block ids
    differ in the tokens that an id covers.
    """
    traces = list(parts.values())
    sizes = {trace.hash_block for trace in traces if trace.hash_ids is not None}
    if len(sizes) > 1:
        rule = f"parts must have block ids of one size (got {', '.join(map(str, sorted(sizes)))} tokens)"
        raise BadInput(Problem(rule, path="mix"))
    tenants: list[str] = []
    for name, trace in parts.items():
        tenants += [f"{name}/{own}" for own in trace.tenants] or [name]
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        if column == "max_tokens" and any(trace.max_tokens is None for trace in traces):
            if any(trace.max_tokens is not None for trace in traces):
                raise BadInput(Problem("parts must all declare max_tokens, or none", path="mix"))
            continue
        if column == "tenant" or any(getattr(trace, column) is not None for trace in traces):
            columns[column] = np.concatenate(_shifted(traces, column))
    times = columns.pop("arrival_ps")
    together = Trace(
        arrival_ps=np.zeros_like(times),
        **columns,
        tenants=tuple(tenants),
        hash_ids=_ids(traces),
        hash_block=max(sizes, default=512),
        source="mix of " + "; ".join(f"{name}: {trace.source}" for name, trace in parts.items()),
        notes=tuple(f"{name}: {note}" for name, trace in parts.items() for note in trace.notes),
    )
    if together.follows is not None and together.think_ps is not None:
        return sent(together, times, together.follows, together.think_ps)
    alone = sent(together, times, np.full(len(times), -1, np.int64), np.zeros(len(times), np.int64))
    return dataclasses.replace(alone, follows=None, think_ps=None)


def _shifted(traces: list[Trace], column: str) -> list[Any]:
    """The column of each trace, its numbers moved past those of the traces before."""
    values = []
    past = 0
    for trace in traces:
        own = getattr(trace, column)
        if own is None:
            values.append(np.full(len(trace), past if column == "tenant" else _NEITHER.get(column, 0), np.int64))
        elif column in (*_NUMBERED, "tenant"):
            values.append(np.where(own >= 0, own.astype(np.int64) + past, -1))
        else:
            values.append(own.astype(np.int64))
        if column == "follows":
            past += len(trace)
        elif column == "tenant":
            past += max(1, len(trace.tenants))
        elif own is not None:
            past += int(own.max()) + 1
    return values


def _ids(traces: list[Trace]) -> HashIds | None:
    if all(trace.hash_ids is None for trace in traces):
        return None
    values: list[Any] = []
    counts: list[Any] = []
    codes = 0
    for trace in traces:
        if trace.hash_ids is None:
            counts.append(np.zeros(len(trace), np.int64))
            continue
        own, numbers = np.unique(trace.hash_ids.values, return_inverse=True)
        values.append(numbers + codes)
        counts.append(np.diff(trace.hash_ids.offsets))
        codes += len(own)
    offsets = list(accumulate(np.concatenate(counts).tolist(), initial=0))
    return HashIds(np.concatenate(values).astype(np.int64), np.array(offsets, np.int64))
