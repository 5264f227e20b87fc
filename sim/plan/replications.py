"""The simulations behind a plan: each replication is run once, written to the journal, and found there afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, cast

from chairlift.sim.bad_input import BadInput, Problem
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Measure
from chairlift.sim.plan.pacing import paced, replayed, replays, turned
from chairlift.sim.plan.promises import Promise, Sample, measured
from chairlift.sim.scenario.load import prepare
from chairlift.sim.simulate import simulate
from chairlift.sim.sweep.journal import Journal
from chairlift.sim.sweep.runs import OF_THE_MACHINE, Executor, Row, Run, failure


@dataclass(frozen=True, eq=False)
class Replication(Run):
    """One run of a candidate at one rate, with one seed."""

    promises: tuple[Promise, ...] = ()
    rate_per_s: float = 1.0
    requests: int = 0
    replay: bool = False  # whether the workload is a recorded file with its own times, to be `turned`

    @cached_property
    def key(self) -> str:
        """The run's content address: as `Run.key`, with the promises, rate, number of requests and seed in it."""
        wanted = [promise.model_dump() for promise in self.promises]
        text = json.dumps([super().key, wanted, self.rate_per_s, self.requests, self.replay, self.seed])
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

    def of(self, candidate: Candidate, cv: float | None = None) -> Measure:
        """How a search measures ``candidate``; ``cv``: with gaps of that coefficient of variation."""

        def measure(rate: float, requests: int, replications: int) -> Sequence[Sample]:
            runs = [self._replication(candidate, rate, requests, i, cv) for i in range(replications)]
            return self._samples(candidate, runs, requests)

        return measure

    def _replication(self, candidate: Candidate, rate: float, requests: int, i: int, cv: float | None) -> Replication:
        """The replication with the ``i``-th seed."""
        seed, base = self.seed + i, candidate.document
        replay = replays(base) and cv is None
        document = replayed(base, seed) if replay else paced(base, rate, requests, cv, seed)
        return Replication(
            document, candidate.folder, candidate.labels, seed, candidate.trust, self.promises, rate, requests, replay
        )

    def _samples(self, candidate: Candidate, runs: list[Replication], requests: int) -> list[Sample]:
        """The sample of each of ``runs``; what the journal lacks is simulated. Raises `BadInput` if that fails."""
        found: dict[str, Sample] = {}
        waiting = []
        for run in runs:
            entry = self.journal.get(run.key)
            if entry is not None and not entry.get("error"):
                try:
                    found[run.key] = Sample(*entry["sample"])
                except (KeyError, TypeError):
                    rule = "is damaged: an entry has no sample; move the file away to start anew"
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


def replicate(run: Run) -> Result:
    """Simulate one `Replication`. An error is in the result, not raised, but for those of `OF_THE_MACHINE`."""
    assert isinstance(run, Replication)
    started = time.perf_counter()
    try:
        setup = prepare(run.document, run.folder, run.trust)
        if run.replay:
            setup = dataclasses.replace(setup, trace=turned(setup.trace, run.seed, run.requests, run.rate_per_s))
        outcome = simulate(setup)
        wall = time.perf_counter() - started
        return Result(run.key, "", measured(run.promises, outcome.requests, outcome.runs, wall))
    except OF_THE_MACHINE:
        raise
    except Exception as wrong:
        return Result(run.key, failure(wrong), None)


def _lost(run: Run, why: str) -> Result:
    """The result of a replication whose process died."""
    return Result(run.key, why, None)
