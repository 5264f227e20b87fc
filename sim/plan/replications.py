"""The simulations behind a plan: a sample of each replication, run once, written down, resumed as sweeps are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.capacity import Measure
from chairlift.sim.plan.file import Candidate, paced, replays
from chairlift.sim.plan.promises import Promise, Sample, measured
from chairlift.sim.scenario.load import prepare
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.runs import Executor, Row, Run, failure
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.trace import Trace

_GOLDEN = 0.6180339887498949  # steps of it around a circle are spread evenly, however many there are


@dataclass(frozen=True, eq=False)
class Replication(Run):
    """One run of a candidate at one rate."""

    promises: tuple[Promise, ...] = ()
    rate_per_s: float = 1.0
    requests: int = 0  # of a replayed file: how many, from some row on
    replay: bool = False

    @cached_property
    def key(self) -> str:
        """As `Run.key`, and what is wanted of the run."""
        wanted = [promise.model_dump() for promise in self.promises]
        text = json.dumps([super().key, wanted, self.rate_per_s, self.requests, self.replay, self.seed])
        return hashlib.sha256(text.encode()).hexdigest()


class Result(NamedTuple):
    """What became of one replication."""

    key: str
    error: str
    sample: Sample | None


@dataclass
class Simulations:
    """Where replications take place, and which are known."""

    journal: Journal
    executor: Executor
    promises: tuple[Promise, ...]
    seed: int = 0
    told: Callable[[str], None] = lambda _: None
    simulated: int = field(default=0, init=False)  # requests
    known: int = field(default=0, init=False)  # requests that an earlier process had simulated
    simulated_s: float = field(default=0.0, init=False)  # of both, on the replicas' clocks
    _counted: set[str] = field(default_factory=set, init=False)

    def of(self, candidate: Candidate, cv: float | None = None) -> Measure:
        """Replications of ``candidate``; ``cv``: with burstier arrivals."""

        def measure(rate: float, requests: int, replications: int) -> Sequence[Sample]:
            runs = [self._replication(candidate, rate, requests, i, cv) for i in range(replications)]
            return self._samples(candidate, runs, requests)

        return measure

    def _replication(self, candidate: Candidate, rate: float, requests: int, i: int, cv: float | None) -> Replication:
        seed = self.seed + i
        replay = replays(candidate.document) and cv is None
        document = paced(candidate.document, rate, requests, cv, seed)
        if replay:
            document.data["workload"] = {
                k: v for k, v in document.data["workload"].items() if k not in ("requests", "rate_per_s")
            }
        return Replication(
            document, candidate.folder, candidate.labels, seed, candidate.trust, self.promises, rate, requests, replay
        )

    def _samples(self, candidate: Candidate, runs: list[Replication], requests: int) -> list[Sample]:
        found: dict[str, Sample] = {}
        waiting = []
        for run in runs:
            entry = self.journal.get(run.key)
            if entry is not None and not entry["error"]:
                found[run.key] = Sample(*entry["sample"])
                self.known += requests if run.key not in self._counted else 0
            else:
                waiting.append(run)
        function = cast("Callable[[Run], Row]", replicate)  # executors hand on what they get, by its key
        for row in self.executor(function, waiting, cast("Callable[[Run, str], Row]", _lost)) if waiting else ():
            result = cast("Result", row)
            if result.error or result.sample is None:
                raise BadInput(Problem(f"cannot be simulated: {result.error}", file=candidate.name))
            self.journal.add(result.key, {"error": "", "sample": list(result.sample)})
            found[result.key] = result.sample
            self.simulated += requests
        self.simulated_s += sum(sample.simulated_s for key, sample in found.items() if key not in self._counted)
        self._counted.update(found)
        return [found[run.key] for run in runs]


def replicate(run: Run) -> Result:
    """Simulate one `Replication`. Whatever goes wrong is in the result, not raised."""
    assert isinstance(run, Replication)
    started = time.perf_counter()
    try:
        setup = prepare(run.document, run.folder, run.trust)
        if run.replay:
            setup = dataclasses.replace(setup, trace=turned(setup.trace, run.seed, run.requests, run.rate_per_s))
        outcome = simulate(setup)
        wall = time.perf_counter() - started
        return Result(run.key, "", measured(run.promises, outcome.requests, outcome.runs, wall))
    except Exception as wrong:
        return Result(run.key, failure(wrong), None)


def _lost(run: Run, why: str) -> Result:
    return Result(run.key, why, None)


def turned(trace: Trace, seed: int, requests: int, rate_per_s: float) -> Trace:
    """``requests`` rows of ``trace`` from some row on, round and round, its gaps stretched to a mean rate.

    Seeds begin at rows far from one another: replications of one recorded day are stretches of it. Raises `BadInput`
    where requests follow others.
    """
    if trace.follows is not None or trace.session is not None:
        rule = "a file whose requests follow one another cannot be replayed at another rate: give workload.arrivals"
        raise BadInput(Problem(rule, path="workload.file"))
    n = len(trace)
    span = int(trace.arrival_ps[-1] - trace.arrival_ps[0])
    if n < 2 or span == 0:
        raise BadInput(Problem("all requests of the file arrive at once: give workload.arrivals", path="workload.file"))
    rows = (int((seed * _GOLDEN) % 1 * n) + np.arange(requests)) % n
    gaps = np.diff(trace.arrival_ps, prepend=trace.arrival_ps[0]).astype(np.float64)
    gaps[0] = span / (n - 1)  # from the last row around to the first
    stretch = (n - 1) / (span / PS_PER_S) / rate_per_s
    columns: dict[str, Any] = {"arrival_ps": np.cumsum(gaps[rows] * stretch).astype(np.int64)}
    for name in ("prompt_tokens", "output_tokens", "max_tokens", "priority", "tenant", "prefix_group", "prefix_tokens"):
        if (column := getattr(trace, name)) is not None:
            columns[name] = column[rows]
    if trace.hash_ids is not None:
        parts = [trace.hash_ids.row(int(i)) for i in rows]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        columns["hash_ids"] = type(trace.hash_ids)(np.concatenate(parts), offsets)
    return dataclasses.replace(trace, **columns)
