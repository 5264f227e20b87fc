"""One run of the suite, and what two runs say of each other."""

from __future__ import annotations

import inspect
import random
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from chairlift.policies.base import NoProgress, PolicyError, PolicyRaised, Replicas, Request, Router, Scheduler, Step
from chairlift.sim.conformance.cases import PS_PER_MS, Case, Row, setup
from chairlift.sim.conformance.promises import RAISES, Broken, Promise, Stopped
from chairlift.sim.results.metrics import inter_token_gaps
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.records import Status
from chairlift.sim.simulate import simulate

ALLOWED = Promise("allowed", "it asks only for what can be: budget, memory, membership, at least one step vouched for")
SERVES = Promise("serves", "it makes progress: every request ends, once, with all its tokens")
BOOKS = Promise("books", "it leaves nothing behind: no block, no swapped block, no token without its gap")
REPEATS = Promise("repeats", "the same seed gives the same bytes, whatever other random numbers are drawn")

PLANS_A_TOKEN = 5  # plans for each token of the workload (and 200), after which nothing comes of it any more
HANG_S = 10  # of CPU time, of one run that should take a tenth of a second
WAITS = 6  # times as long by the clock: machines are shared


class AStep(NamedTuple):
    """One engine step of one replica."""

    start_ps: int
    prefill_tokens: int
    decodes: int
    padded: int

    def __str__(self) -> str:
        parts = ((self.prefill_tokens, "prompt token"), (self.decodes, "decode"), (self.padded, "dead slot"))
        held = " and ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in parts if count)
        return f"{held} at {in_ms(self.start_ps)}"


@dataclass
class Subject:
    """The policy or router that is checked."""

    kind: type[Any]
    settings: dict[str, Any]


class Hangs(BaseException):
    """The subject takes longer than `HANG_S`. Not even a policy that catches every Exception catches this."""


class _Endless(Exception):
    pass


class _Watch:
    """How far a run has come."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # plans
        self.plans = 0
        self.routed = 0
        self.now = 0

    def router(self, kind: type[Router]) -> type[Router]:
        """``kind``, counting the requests that it has routed."""
        watch = self

        class Watched(kind):  # type: ignore[misc, valid-type]
            def route(self, request: Request, replicas: Replicas) -> int:
                watch.routed += 1
                watch.now = replicas.now
                chosen: int = super().route(request, replicas)
                return chosen

        return _called_as(kind, Watched)

    def policy(self, kind: type[Scheduler]) -> type[Scheduler]:
        """``kind``, counting its plans; over the limit it raises."""
        watch = self

        class Watched(kind):  # type: ignore[misc, valid-type]
            def schedule(self, step: Step) -> int:
                watch.plans += 1
                watch.now = step.now
                if watch.plans > watch.limit:
                    raise _Endless
                vouched: int = super().schedule(step)
                return vouched

        return _called_as(kind, Watched)

    def __str__(self) -> str:
        what = f"plan {self.plans}" if self.plans else f"request {self.routed}"
        return f"{what} of the run, at {in_ms(self.now)}"


def _called_as(kind: type[Any], made: type[Any]) -> type[Any]:
    """``made``, by whose name messages call it, as ``kind`` is called."""
    made.__name__, made.__qualname__, made.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return made


def serve(
    subject: Subject, case: Case, rows: Sequence[Row], leap: bool = True, seed: int = 1, other_answers: bool = False
) -> Outcome:
    """Serve ``rows`` in ``case``.

    ``seed`` is that of all random numbers that are none of the simulator's. ``other_answers``: answers have other
    lengths, of which no client declares anything. Raises `Stopped` where the run comes to no end.
    """
    given = _answered_otherwise(rows) if other_answers else rows
    watch = _Watch(PLANS_A_TOKEN * sum(row.prompt_tokens + row.output_tokens for row in rows) + 200)
    arguments: dict[str, Any]
    if issubclass(subject.kind, Scheduler):
        arguments = {"policy": watch.policy(subject.kind), "policy_settings": subject.settings}
    else:
        arguments = {"router": watch.router(subject.kind), "router_settings": subject.settings}

    def stop(promise: Promise, what: str, lasts: bool = False) -> Stopped:
        return Stopped(Broken(promise, what, case, tuple(rows), lasts=lasts))

    try:
        with _other_chance(seed), patience():
            return simulate(setup(case, given, **arguments), leap)
    except PolicyRaised as raised:
        cause = raised.__cause__ or raised
        what = f"{_blamed(cause, subject.kind)}: {type(cause).__name__}: {cause} ({watch})"
        raise stop(RAISES, what) from raised
    except PolicyError as error:
        raise stop(SERVES if isinstance(error, NoProgress) else ALLOWED, f"{error} ({watch})") from error
    except _Endless:
        what = f"nothing comes of {watch.limit} plans for {len(rows)} requests: {_name(subject)} plans on and on"
        raise stop(SERVES, f"{what} ({watch})") from None
    except Hangs:
        raise stop(SERVES, f"{_name(subject)} {hanging()} ({watch})", lasts=True) from None
    except Exception as error:
        where = _blamed(error, subject.kind)
        if where:
            raise stop(RAISES, f"{where}: {type(error).__name__}: {error} ({watch})") from error
        if isinstance(error, AssertionError):  # of the audit after each run
            raise stop(BOOKS, f"{error} (after {watch})") from error
        raise


def _answered_otherwise(rows: Sequence[Row]) -> list[Row]:
    """The same requests, each with any answer that its client allows, but none shorter than the shortest was.

    Turns of a session keep their answers: the prompts of later turns repeat them, for everybody to see.
    """
    chance = random.Random(len(rows))
    shortest = min(row.output_tokens for row in rows)
    return [
        row._replace(output_tokens=chance.randint(shortest, row.max_tokens)) if row.session < 0 else row for row in rows
    ]


def _name(subject: Subject) -> str:
    kind = "policy" if issubclass(subject.kind, Scheduler) else "router"
    return f"{kind} {subject.kind.__name__}"


def _blamed(error: BaseException, kind: type[Any]) -> str:
    """``file:line`` of the last line of the subject's own that ``error`` passed; "" if it passed none."""
    files = {inspect.getsourcefile(each) for each in kind.__mro__ if each.__module__ not in ("builtins", "abc")}
    files -= {inspect.getsourcefile(Scheduler), __file__}
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f"{passed[-1].filename}:{passed[-1].lineno}" if passed else ""


@contextmanager
def _other_chance(seed: int) -> Iterator[None]:
    """Let the random numbers of the whole process be those of ``seed`` for a while."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a policy may use these, wrongly
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def hanging() -> str:
    """What is said of a subject that `Hangs`."""
    return f"does not return within {HANG_S} s"


@contextmanager
def patience(seconds: float | None = None) -> Iterator[None]:
    """Raise `Hangs` after ``seconds`` of CPU time, or `WAITS` times that by the clock: waiting takes no CPU time.

    Only where the platform has timers and this is the main thread. None: `HANG_S`.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise Hangs

    most = HANG_S if seconds is None else seconds
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, most), signal.ITIMER_REAL: (signal.SIGALRM, WAITS * most)}
    before = {number: signal.signal(number, late) for number, _ in timers.values()}
    try:
        for timer, (_, after) in timers.items():
            signal.setitimer(timer, after)
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def endings(outcome: Outcome, impatient: bool) -> str:
    """What is wrong with how requests ended; "" if nothing is."""
    columns = {name: column.tolist() for name, column in outcome.requests.columns().items()}
    allowed = {Status.FINISHED, Status.REJECTED} | ({Status.TIMED_OUT} if impatient else set())
    for i, status in enumerate(columns["status"]):
        if status not in allowed:
            return f"request {i} is {Status(status).name.lower()}"
        emitted, output = columns["emitted_tokens"][i], columns["output_tokens"][i]
        if status == Status.FINISHED and emitted != output:
            return f"request {i} has {emitted} of its {output} tokens"
    return ""


def refused(outcome: Outcome) -> int:
    """How many requests the policy refused: the pool has room for each of them alone, so it need not."""
    return outcome.requests.status.count(Status.REJECTED)


def difference(one: Outcome, other: Outcome, names: tuple[str, str]) -> str:
    """The first thing in which two runs differ that should be one; ``names`` say which run is which. "" if none."""
    if found := first_step(one, other, names):
        return found
    columns = one.requests.columns(), other.requests.columns()
    for name in columns[0]:
        mine, theirs = (each[name].tolist() for each in columns)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a != b:
                return f"request {i}: {name} is {a} {names[0]} and {b} {names[1]}"
    if _gaps(one) != _gaps(other):
        return "the gaps between tokens differ"
    return ""


def first_step(
    one: Outcome, other: Outcome, names: tuple[str, str], until: Callable[[int], bool] = lambda _start: True
) -> str:
    """The first engine step in which two runs differ, of those that start at a time that ``until`` takes."""
    for replica, (mine, theirs) in enumerate(zip(steps(one), steps(other), strict=True)):
        for i in range(max(len(mine), len(theirs))):
            a = mine[i] if i < len(mine) else None
            b = theirs[i] if i < len(theirs) else None
            if not any(until(each.start_ps) for each in (a, b) if each is not None):
                break
            if a != b:
                told = "; ".join(f"{name}, {step or 'none'}" for step, name in zip((a, b), names, strict=True))
                return f"step {i + 1} of replica {replica}: {told}"
    return ""


def steps(outcome: Outcome) -> list[list[AStep]]:
    """Every engine step of each replica, in order."""
    found = []
    for records in outcome.runs:
        runs = records.runs()
        names = ("start_ps", "first_ps", "slope_ps", "steps", "prefill_tokens", "decodes", "padded")
        each: list[AStep] = []
        for start, first, slope, count, prefill, decodes, padded in zip(
            *(runs[name].tolist() for name in names), strict=True
        ):
            for _ in range(count):
                each.append(AStep(start, prefill, decodes, padded))
                start, first = start + first, first + slope
        found.append(each)
    return found


def earliest_end(outcome: Outcome) -> int:
    """A time, ps, before which no answer of this run can be complete, of however many replicas.

    An answer of n tokens takes n - 1 steps after the one that brings its first token.
    """
    starts = [[step.start_ps for step in each] for each in steps(outcome)]
    columns = outcome.requests.columns()
    found = [int(columns["finished_ps"].max())]
    for replica, first, output in zip(
        *(columns[name].tolist() for name in ("replica", "first_token_ps", "output_tokens")), strict=True
    ):
        if first >= 0:
            after = [start for start in starts[replica] if start >= first]
            found.append(first if output == 1 else after[output - 2] if len(after) > output - 2 else found[0])
    return min(found)


def _gaps(outcome: Outcome) -> dict[float, int]:
    found: dict[float, int] = {}
    for gap, count in zip(*(column.tolist() for column in inter_token_gaps(outcome.runs)), strict=True):
        found[gap] = found.get(gap, 0) + count
    return found


def in_ms(ps: int) -> str:
    """``12.34 ms``."""
    return f"{ps / PS_PER_MS:,.2f} ms"
