"""ITL of the requests that were answered: gaps between tokens, without those of requests that were given up.

A run of steps counts its decodes and does not name them, so `all_gaps` pools the gaps of all requests. A request that
was given up (its client lost patience, its replica failed) took part in every step with decodes between its first
token and its end, unless it was preempted. So its gaps are known, and `gaps_of_finished` takes them out of the pool.

Example: steps end at 10, 20, 30 and 45. Request a has tokens at all four and is answered; request b has its first token
at 20 and is given up at 40. The pool holds the gaps 10, 10, 15 of a and 10 of b; without b's it holds 10, 10, 15.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.records import RequestRecords, RunRecords, Status

Ints = npt.NDArray[np.int64]


class Gaps(NamedTuple):
    """Gaps between tokens, ps, and how often each occurs; shape (gaps,) each, in no order."""

    ps: Ints
    often: npt.NDArray[np.signedinteger]
    of_others: int = 0  # requests that were not answered whose gaps are among these, for nobody can tell them apart


class _Steps(NamedTuple):
    """The steps of a replica in which requests decoded, one a row, in order of time."""

    ends: Ints  # ps
    durations: Ints  # ps


def all_gaps(runs: list[RunRecords]) -> Gaps:
    """Every gap between two tokens of any request.

    A run of 3 steps with a first of 100 ps, a slope of 2 ps, 5 decodes and 1 late decode has the gaps 100 (4 times,
    for the late decode's first gap stands in `RunRecords.gaps`), 102 (5 times) and 104 (5 times).
    """
    counts = [_gap_counts(each) for each in runs]
    total = sum(map(sum, counts))
    gaps, often = np.empty(total, np.int64), np.empty(total, np.int32)

    def put(begin: int, values: Ints, count: Ints) -> int:
        end = begin + len(values)
        gaps[begin:end], often[begin:end] = values, count
        return end

    begin = 0
    for each, (firsts, others, _) in zip(runs, counts, strict=True):
        at, more_at = begin, begin + firsts
        for table in each.run_parts():
            keep = table["decodes"] > 0
            first, slope, decodes, more = (table[name][keep] for name in ("first_ps", "slope_ps", "decodes", "steps"))
            more = more - 1  # the steps after the first: every decode emitted at the one before
            on_time = decodes - table["late_decodes"][keep]
            at = put(at, first[on_time > 0], on_time[on_time > 0])
            nth = np.arange(int(more.sum())) - np.repeat(np.cumsum(more) - more, more) + 1
            more_at = put(more_at, np.repeat(first, more) + nth * np.repeat(slope, more), np.repeat(decodes, more))
        late = each.gaps()
        begin = put(begin + firsts + others, late["gap_ps"], late["count"])
    return Gaps(gaps, often)


def _gap_counts(records: RunRecords) -> tuple[int, int, int]:
    """How many gaps a replica's runs begin with, how many their further steps have, and how many no run shows."""
    firsts = others = 0
    for table in records.run_parts():
        decodes = table["decodes"]
        firsts += int(np.count_nonzero(decodes > table["late_decodes"]))
        others += int((table["steps"] - 1)[decodes > 0].sum())
    return firsts, others, len(records.gap_rows)


def gaps_of_finished(requests: RequestRecords, runs: list[RunRecords]) -> Gaps:
    """The gaps of the requests that finished. `Gaps.of_others` counts requests that could not be taken out."""
    columns = requests.columns()
    pool = all_gaps(runs)
    given_up = (np.asarray(columns["status"]) != Status.FINISHED) & (requests.messages() > 1)
    if not given_up.any():
        return pool
    taken: list[tuple[Ints, Ints]] = []  # gaps, and how often each is to be taken out
    left = 0
    replica = np.asarray(columns["replica"])
    for index, each in enumerate(runs):
        mine = np.flatnonzero(given_up & (replica == index))
        if not len(mine):
            continue
        steps = _steps(each)
        first, end = (np.asarray(columns[name])[mine].astype(np.int64) for name in ("first_token_ps", "finished_ps"))
        emitted = requests.messages()[mine]
        begin = np.searchsorted(steps.ends, first, side="right")
        # A step that had begun by the end counts its decodes to the full, whoever left meanwhile.
        stop = np.searchsorted(steps.ends - steps.durations, end, side="left")
        # One that had all its tokens and was held back in a static batch decoded no longer.
        held = (stop - begin > emitted) & (np.asarray(columns["preemptions"])[mine] == 0)
        stop = np.where(held, begin + emitted - 1, stop)
        plain = (stop - begin >= emitted - 1) & (stop - begin <= emitted) & (first >= 0)
        left += int(np.count_nonzero(~plain))
        begin, stop, first = begin[plain], stop[plain], first[plain]
        taken.append((steps.ends[begin] - first, np.ones(len(begin), np.int64)))
        change = np.zeros(len(steps.ends) + 1, np.int64)
        np.add.at(change, begin + 1, 1)
        np.add.at(change, stop, -1)
        # From one step with decodes to the next, whatever steps without decodes lay between.
        taken.append((np.diff(steps.ends, prepend=0), np.cumsum(change)[:-1]))
    return _without(pool, taken, left, int(np.count_nonzero(given_up)))


def _steps(records: RunRecords) -> _Steps:
    table = records.runs()
    keep = table["decodes"] > 0
    start, first, slope, steps = (table[name][keep] for name in ("start_ps", "first_ps", "slope_ps", "steps"))
    row = np.repeat(np.arange(len(steps)), steps)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)  # of the step in its run, from 0
    durations = first[row] + nth * slope[row]
    ends = start[row] + (nth + 1) * first[row] + slope[row] * (nth * (nth + 1) // 2)
    return _Steps(ends, durations)


def _without(pool: Gaps, taken: list[tuple[Ints, Ints]], left: int, given_up: int) -> Gaps:
    """``pool`` without the gaps ``taken``; all of it if it does not hold them, for then some were told wrongly."""
    gaps = np.concatenate([pool.ps, *(values for values, _ in taken)])
    often = np.concatenate([pool.often, *(-count for _, count in taken)])
    values, which = np.unique(gaps, return_inverse=True)
    rest = np.zeros(len(values), np.int64)
    np.add.at(rest, which, often)
    if (rest < 0).any():
        return pool._replace(of_others=given_up)
    return Gaps(values[rest > 0], rest[rest > 0], left)
