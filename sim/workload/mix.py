"""Mixes: the requests of several traces, each of which is a tenant or several tenants of one system."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.workload.clients import sent
from chairlift.sim.workload.shared_prefix import reblocked
from chairlift.sim.workload.trace import COLUMNS, HashIds, Trace, offsets_of

_NUMBERED = ("session", "prefix_group", "follows")  # columns of numbers that begin anew in every part; -1: none


def merged(parts: Mapping[str, Trace]) -> Trace:
    """The requests of all ``parts``, in order of time.

    A part without tenants becomes a tenant of its name; a tenant ``a`` of part ``p`` becomes ``p/a``. Sessions, prefix
    groups and blocks of two parts are never the same.

    Raises:
        BadInput: some parts declare ``max_tokens`` and others do not; or block ids of two parts cover such different
            numbers of tokens that their common blocks are too many.
    """
    traces = list(parts.values())
    block = math.gcd(*(trace.hash_block for trace in traces if trace.hash_ids is not None)) or 512
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
        hash_ids=_ids(traces, block),
        hash_block=block,
        source="mix of " + "; ".join(f"{name}: {trace.source}" for name, trace in parts.items()),
        notes=tuple(f"{name}: {note}" for name, trace in parts.items() for note in trace.notes),
    )
    if together.follows is not None and together.think_ps is not None:
        return sent(together, times, together.follows, together.think_ps)
    alone = sent(together, times, np.full(len(times), -1, np.int64), np.zeros(len(times), np.int64))
    return dataclasses.replace(alone, follows=None, think_ps=None)


def _shifted(traces: list[Trace], column: str) -> list[Any]:
    """The column of each trace; numbers that begin anew in every part are moved past those of the parts before.

    Example: parts with the sessions 0, 1, 1 and -1, 0 give 0, 1, 1 and -1, 2.
    """
    values = []
    past = 0
    for trace in traces:
        own = getattr(trace, column)
        if own is None:
            absent = past if column == "tenant" else -1 if column in _NUMBERED else 0
            values.append(np.full(len(trace), absent, np.int64))
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


def _ids(traces: list[Trace], block: int) -> HashIds | None:
    """The ids of all traces, of blocks of ``block`` tokens, numbered anew from 0; None if no trace has any."""
    if all(trace.hash_ids is None for trace in traces):
        return None
    values: list[Any] = []
    counts: list[Any] = []
    codes = 0
    for trace in traces:
        if trace.hash_ids is None:
            counts.append(np.zeros(len(trace), np.int64))
            continue
        ids = trace.hash_ids
        if trace.hash_block != block:
            ids = reblocked(ids, trace.hash_block, trace.prompt_tokens, block)
        own, numbers = np.unique(ids.values, return_inverse=True)
        values.append(numbers + codes)
        counts.append(np.diff(ids.offsets))
        codes += len(own)
    return HashIds(np.concatenate(values).astype(np.int64), offsets_of(np.concatenate(counts)))
