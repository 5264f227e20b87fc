"""Recorded files as loads of a plan: replications are stretches of the file, and what those are worth together.

A file is recorded once, so its replications are stretches of it: seed by seed from another row on, and after the last
row from the first one again. Stretches that overlap have rows in common and are no independent replications. `worth`
says how many independent ones they stand for, and `chairlift.sim.plan.verdict` judges them as that many. `MOST_SHARE`
keeps a stretch short enough that the file holds a few which do not overlap; a file that is too short is refused.

Worked example: of 3000 rows, replications of 375 rows begin at the rows 0, 1854, 708, … Eight of them barely overlap;
32 use each row four times, and are worth 8 replications, not 32.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.clients import restarted, starts
from chairlift.sim.workload.mix import merged
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import COLUMNS, IntArray, Trace
from chairlift.sim.workload.workload import build

MOST_SHARE = 4  # a stretch is at most this part of its file
FIRST_SHARE = 8  # and at most this part of it to begin with
LEAST = 200  # requests of a replication
_GOLDEN = 0.6180339887498949  # steps of this fraction of a circle are spread evenly, however many there are
_TIMED = ("requests", "duration_s", "rate_per_s", "time_scale", "arrivals")  # keys that say when and how many come


class Stretch(NamedTuple):
    """Which part of a recorded file a replication served. Rows are sessions where the file holds sessions."""

    first: int  # row, from 0
    rows: int
    of: int  # rows of the file


def recorded(document: Document) -> bool:
    """Whether the workload, or a part of its mix, is a recorded file."""
    workload = document.data.get("workload")
    return isinstance(workload, dict) and any("file" in part for part in _parts(workload).values())


def rows_of(document: Document, folder: Path) -> int:
    """Requests in the recorded file of a scenario's workload; of several files, in the shortest."""
    parts = _parts(document.data["workload"]).values()
    return min(len(_whole(_text(part), folder)) for part in parts if "file" in part)


def whole(document: Document, folder: Path) -> Trace | None:
    """All that the one recorded file of a scenario's workload says, at its own times; None where it is a mix."""
    workload = document.data["workload"]
    return None if workload.get("mix") is not None else _whole(_text(workload), folder)


def described(document: Document, trace: Trace, rates: Sequence[float], unit: str) -> str:
    """A scenario's workload in words, as a plan serves it at ``rates``; ``trace`` is a sample, or the whole file.

    ``unit``: what rates count, ``requests`` or ``sessions``.
    """
    workload = document.data["workload"]
    at = f"{' and '.join(f'{rate:g}' for rate in rates)} {unit}/s" if rates else "each rate that is looked at"
    words = [trace.source]
    if not recorded(document):
        words += [note for note in trace.notes if not note.startswith("arrival times stretched")]
        listed = [key for key in ("prompt_tokens", "output_tokens") if isinstance(workload.get(key), dict)]
        if any("values" in workload[key] for key in listed):
            words.append("the lengths listed, in their order, in every replication")
        return "; ".join([*words, f"at {at}"])
    words += trace.notes
    if workload.get("mix") is None:
        words += [f"{len(trace):,} requests, going round; each replication is another stretch of them"]
    drawn = all(part.get("arrivals") is not None for part in _parts(workload).values())
    return "; ".join([*words, f"arrival times drawn at {at}" if drawn else f"arrival times stretched to {at}"])


def stretched(document: Document, folder: Path, seed: int) -> tuple[Trace, list[Stretch]]:
    """The requests of a `recorded` workload that is `paced`, and which stretch of each of its files they are.

    Where the workload says ``arrivals``, times are drawn; else the file's own gaps are stretched. Raises `BadInput`
    where a file cannot be stretched so.
    """
    at_rate: dict[str, Any] = document.data["workload"]
    if at_rate.get("mix") is None:
        trace, part = _stretch_of(at_rate, folder, seed)
        return trace, [part]
    seeds = {name: int(stream(seed, f"mix {name}").integers(2**62)) for name in at_rate["mix"]}  # as `build` has them
    traces, parts = {}, []
    for name, each in at_rate["mix"].items():
        if "file" in each:
            traces[name], part = _stretch_of(each, folder, seed)
            parts.append(part)
        else:
            traces[name] = build(Workload.model_validate(each), seeds[name], folder)
    return merged(traces).head(at_rate["requests"]), parts


def _stretch_of(workload: dict[str, Any], folder: Path, seed: int) -> tuple[Trace, Stretch]:
    """The stretch that ``seed`` chooses of a workload that has a file, ``requests``, and a rate or arrivals."""
    trace = _whole(_text(workload), folder)
    requests = workload["requests"]
    if workload.get("arrivals") is None:
        return turned(trace, seed, requests, workload["rate_per_s"])
    rows, part = _rows(trace, seed, requests)
    found = _taken(trace, rows)
    times = Arrivals.model_validate(workload["arrivals"]).times_ps(starts(found), stream(seed, "arrivals"))
    return dataclasses.replace(restarted(found, times), notes=(*trace.notes, "arrival times replaced")), part


def turned(trace: Trace, seed: int, requests: int, rate_per_s: float) -> tuple[Trace, Stretch]:
    """``requests`` rows of ``trace``, from a row that ``seed`` chooses on, with gaps stretched to a mean rate.

    After the last row comes the first again. Seeds begin at rows far from one another, so that replications of one
    recorded day are different stretches of it: of 1000 rows, the seeds 0, 1, 2 begin at rows 0, 618 and 236. Raises
    `BadInput` where requests follow one another, or all arrive at once.
    """
    if trace.follows is not None or trace.session is not None:
        rule = "a file whose requests follow one another cannot be replayed at another rate: give workload.arrivals"
        raise BadInput(Problem(rule, path="workload.file"))
    n = len(trace)
    span = int(trace.arrival_ps[-1] - trace.arrival_ps[0])
    if n < 2 or span == 0:
        raise BadInput(Problem("all requests of the file arrive at once: give workload.arrivals", path="workload.file"))
    rows, part = _rows(trace, seed, requests)
    gaps = np.diff(trace.arrival_ps, prepend=trace.arrival_ps[0]).astype(np.float64)
    gaps[0] = span / (n - 1)  # from the last row around to the first
    factor = (n - 1) / (span / PS_PER_S) / rate_per_s
    times = np.cumsum(gaps[rows] * factor).astype(np.int64)
    notes = (*trace.notes, f"arrival times stretched to {rate_per_s:g} requests/s")
    return dataclasses.replace(_taken(trace, rows), arrival_ps=times, notes=notes), part


def worth(parts: Sequence[Stretch]) -> float:
    """How many independent replications equally long stretches of one file stand for, by Kish's effective size.

    A row that c stretches have in common counts c times in their mean, so that the variance of the mean is that of
    (Σc)² / Σc² rows, of which ``rows`` make one replication. Stretches that do not overlap are worth their number; any
    number of them is worth no more than the file holds.

    Example: of the stretches 0–99 and 50–149, 100 rows count once and 50 twice: 200² / (100 + 4 · 50) = 133 rows, worth
    1.33 replications.
    """
    of, total = parts[0].of, sum(part.rows for part in parts)
    changes: dict[int, int] = {0: 0, of: 0}
    for part in parts:
        rounds, left = divmod(part.rows, of)  # whole ones of a file that is shorter than the stretch
        changes[0] += rounds
        end = part.first + left
        for first, last in ((part.first, min(end, of)), (0, end - of)):
            if first < last:
                changes[first] = changes.get(first, 0) + 1
                changes[last] = changes.get(last, 0) - 1
    squares, count = 0, 0
    for place, following in itertools.pairwise(sorted(changes)):
        count += changes[place]
        squares += count * count * (following - place)
    return total * len(parts) / squares


def _parts(workload: dict[str, Any]) -> dict[str, Any]:
    """The parts of a mix by name; of another workload, the workload itself."""
    mix = workload.get("mix")
    parts = mix if isinstance(mix, dict) else {"": workload}
    return {name: part for name, part in parts.items() if isinstance(part, dict)}


def _text(workload: dict[str, Any]) -> str:
    """A workload as `_whole` takes it: the whole file, whatever the rate."""
    kept = {key: value for key, value in workload.items() if key not in _TIMED}
    if workload.get("arrivals") is not None:
        kept["arrivals"] = {"burst": {}}  # times that are drawn later
    return json.dumps(kept, sort_keys=True)


@lru_cache(maxsize=8)
def _whole(text: str, folder: Path) -> Trace:
    """All requests of a file, read once; tenants and the like that are laid over it belong to its rows for good."""
    return build(Workload.model_validate(json.loads(text)), 0, folder)


def _rows(trace: Trace, seed: int, requests: int) -> tuple[IntArray, Stretch]:
    """The rows of a stretch of ``requests`` requests; of sessions, whole ones but for the last."""
    if trace.follows is None:
        n = len(trace)
        first = int((seed * _GOLDEN) % 1 * n)
        return (first + np.arange(requests)) % n, Stretch(first, requests, n)
    order, begins = _sessions(trace.follows)
    n = len(begins) - 1
    first = int((seed * _GOLDEN) % 1 * n)
    sizes = np.diff(begins)
    around = (first + np.arange(n)) % n
    count = min(n, int(np.searchsorted(np.cumsum(sizes[around]), requests)) + 1)
    rows = np.concatenate([order[begins[i] : begins[i + 1]] for i in around[:count].tolist()])
    return rows[:requests], Stretch(first, count, n)


def _sessions(follows: IntArray) -> tuple[IntArray, IntArray]:
    """Rows session by session, in order, and where each session begins among them; shape (n,) and (sessions + 1,)."""
    root = np.where(follows < 0, np.arange(len(follows)), follows)
    while np.any((before := root[root]) != root):
        root = before
    order: IntArray = np.argsort(root, kind="stable")
    begins = np.flatnonzero(np.diff(root[order], prepend=-1))
    return order, np.append(begins, len(follows)).astype(np.int64)


def _taken(trace: Trace, rows: IntArray) -> Trace:
    """The rows of ``trace`` in the order of ``rows``, all arriving at time 0; those that follow another still do."""
    columns: dict[str, Any] = {"arrival_ps": np.zeros(len(rows), np.int64)}
    for name in COLUMNS.keys() - {"arrival_ps", "follows"}:
        if (column := getattr(trace, name)) is not None:
            columns[name] = column[rows]
    if trace.follows is not None:
        place = np.full(len(trace), -1, np.int64)
        place[rows] = np.arange(len(rows))
        before = trace.follows[rows]
        columns["follows"] = np.where(before < 0, -1, place[before])
    if trace.hash_ids is not None:
        columns["hash_ids"] = trace.hash_ids.taken(rows)
    return dataclasses.replace(trace, **columns)
