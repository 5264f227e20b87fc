"""The simulations behind a plan: each replication is run once, written to the journal, and found there afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.deciding import Measure
from chairlift.sim.plan.errors import drawn
from chairlift.sim.plan.pacing import looped, paced, unloaded
from chairlift.sim.plan.promises import BINS, Promise, Sample, measured, sample_read
from chairlift.sim.plan.stretches import Stretch, recorded, stretched
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.loops import synchronous
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.runs import OF_THE_MACHINE, Executor, Row, Run, failure
from chairlift.sim.units import PS_PER_S
from chairlift.sim.workload.clients import Seconds

EACH = 16  # requests of a client in a closed loop, at least: the first are its warm-up, the last are left out


@dataclass(frozen=True, eq=False)
class Replication(Run):
    """One run of a candidate at one rate, with one seed."""

    promises: tuple[Promise, ...] = ()
    rate_per_s: float = 1.0
    requests: int = 0
    draw: int = 0  # of the step costs' errors, see `chairlift.sim.plan.errors`; 0: none

    @cached_property
    def key(self) -> str:
        """The run's content address: as `Run.key`, with the promises, rate, number of requests and seed in it."""
        wanted = [promise.model_dump() for promise in self.promises]
        text = json.dumps([super().key, wanted, self.rate_per_s, self.requests, self.seed, self.draw])
        return hashlib.sha256(text.encode()).hexdigest()


class Result(NamedTuple):
    """What became of one replication."""

    key: str
    error: str  # "" if it went well
    sample: Sample | None  # None if it did not


@dataclass
class Simulations:
    """Where replications are run, which results are known, and how much was simulated."""

    journal: Journal
    executor: Executor
    promises: tuple[Promise, ...]
    seed: int = 0  # of the first replication; the others follow
    simulated: int = field(default=0, init=False)  # requests, by this process
    known: int = field(default=0, init=False)  # requests of results that were in the journal before
    simulated_s: float = field(default=0.0, init=False)  # seconds of both, on the replicas' clocks
    _counted: set[str] = field(default_factory=set, init=False)  # keys of replications that the three figures hold

    def of(
        self,
        candidate: Candidate,
        cv: float | None = None,
        draw: int = 0,
        promises: Sequence[Promise] | None = None,
        think_s: Seconds | None = None,
    ) -> Measure:
        """How a search measures ``candidate``.

        ``cv``: with gaps of that coefficient of variation. ``draw``: with that draw of its step costs' errors.
        ``promises``: other ones than the plan's. ``think_s``: by clients in a closed loop, who think so long; what
        `Measure` takes for a rate is their number then, and each has at least `EACH` requests.
        """
        judged = self.promises if promises is None else tuple(promises)

        def measure(rate: float, requests: int, replications: int) -> Sequence[Sample]:
            if think_s is None:
                requests = max(requests, math.ceil(rate * candidate.least_s))
            else:
                rate = max(1, round(rate))
                requests = max(requests, EACH * round(rate))
            runs = [
                self._replication(candidate, judged, rate, requests, i, cv, draw, think_s) for i in range(replications)
            ]
            return self._samples(candidate, runs, requests)

        return measure

    def _replication(
        self,
        candidate: Candidate,
        promises: tuple[Promise, ...],
        rate: float,
        requests: int,
        i: int,
        cv: float | None,
        draw: int,
        think_s: Seconds | None,
    ) -> Replication:
        """The replication with the ``i``-th seed."""
        seed = self.seed + i
        if think_s is None:
            document = paced(candidate.document, rate, requests, cv, seed)
        else:
            thought = think_s.model_dump(exclude_none=True)
            document = looped(candidate.document, round(rate), requests, thought, seed)
        folder, labels, trust = candidate.folder, candidate.labels, candidate.trust
        of_plan = promises, rate, requests, draw
        return Replication(document, folder, labels, seed, trust, *of_plan, synchronous=candidate.synchronous)

    def _samples(self, candidate: Candidate, runs: list[Replication], requests: int) -> list[Sample]:
        """The sample of each of ``runs``; what the journal lacks is simulated. Raises `BadInput` if that fails."""
        found: dict[str, Sample] = {}
        waiting = []
        for run in runs:
            entry = self.journal.get(run.key)
            if entry is not None and not entry.get("error"):
                try:
                    found[run.key] = sample_read(entry.get("sample"), len(run.promises))
                except ValueError as error:
                    rule = f"is damaged: of an entry, {error}; move the file away to start anew"
                    raise BadInput(Problem(rule, file=str(self.journal.path))) from None
                self.known += requests if run.key not in self._counted else 0
            else:
                waiting.append(run)
        function = cast("Callable[[Run], Row]", replicate)  # an executor only passes tasks and rows on
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


def prepared(run: Replication) -> tuple[Setup, list[Stretch]]:
    """The system and the requests of a replication, and the stretches of recorded files that those requests are.

    Raises `BadInput` where there are too few requests to judge.
    """
    parts: list[Stretch] = []
    if recorded(run.document):
        setup = prepare(unloaded(run.document), run.folder, run.trust)
        trace, parts = stretched(run.document, run.folder, run.seed)
        setup = dataclasses.replace(setup, trace=trace)
    else:
        setup = prepare(run.document, run.folder, run.trust)
    if run.synchronous:
        synchronous(setup)
    if len(setup.trace) < BINS:
        rule = f"makes {len(setup.trace)} requests, of {run.requests} wanted: a plan needs {BINS} at least"
        raise BadInput(Problem(rule, path="workload"))
    return drawn(setup, run.draw), parts


def replicate(run: Run) -> Result:
    """Simulate one `Replication`. An error is in the result, not raised, but for those of `OF_THE_MACHINE`."""
    assert isinstance(run, Replication)
    started = time.perf_counter()
    try:
        setup, parts = prepared(run)
        outcome = simulate(setup)
        sample = measured(run.promises, outcome.requests, outcome.runs, time.perf_counter() - started)
        shared = [list(part) for part in parts]
        return Result(run.key, "", sample._replace(stretches=shared, replicas=_paid(outcome, sample.simulated_s)))
    except OF_THE_MACHINE:
        raise
    except Exception as wrong:
        return Result(run.key, failure(wrong), None)


def _paid(outcome: Outcome, seconds: float) -> list[float]:
    """Replicas of each group that were paid for on average; none where none come and go."""
    setup = outcome.setup
    if not any(setup.scale_of(group) for group in setup.groups):
        return []
    found, first = [], 0
    for group in setup.groups:
        last = first + setup.most(group)
        found.append(sum(outcome.up_ps[first:last]) / PS_PER_S / seconds)
        first = last
    return found


def _lost(run: Run, why: str) -> Result:
    """The result of a replication whose process died."""
    return Result(run.key, why, None)
