"""What every router promises, and the trial of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from chairlift.policies.base import Request, Router
from chairlift.sim.conformance.cases import ROUTER_CASES, Case, Row
from chairlift.sim.conformance.private_names import private_reads
from chairlift.sim.conformance.promises import PUBLIC, RAISES, SETTINGS, Broken, Checklist, Promise, Stopped, shrunk
from chairlift.sim.conformance.serving import (
    ALLOWED,
    REPEATS,
    SERVES,
    Hangs,
    Subject,
    difference,
    earliest_end,
    endings,
    hanging,
    patience,
    serve,
)
from chairlift.sim.replica.request import Live

IN_RANGE = Promise("range", "its answer is the position of a replica, whichever of them are there")
LOOKS = Promise("looks", "it only looks: requests and replicas are as before")
BLIND = Promise("blind", "it does not see how long an answer will be")
PROMISES = (SETTINGS, PUBLIC, RAISES, IN_RANGE, LOOKS, SERVES, REPEATS, BLIND)

_ASKED = 400  # requests that a router is shown in made-up clusters


@dataclass
class View:
    """`policies.base.Replicas` as written down."""

    now: int
    indices: list[int]
    outstanding: list[int]
    outstanding_tokens: list[int]
    waiting: list[int]


def check_router(
    kind: type[Router],
    settings: dict[str, Any] | None = None,
    cases: Sequence[Case] = ROUTER_CASES,
    rows: Sequence[Row] | None = None,
    told: Callable[[str], None] = lambda _what: None,
) -> Checklist:
    """Try every promise on ``kind`` with ``settings``: in made-up clusters, and in each of ``cases``.

    ``rows``: these requests instead of the cases' own. ``told`` hears which case is tried.
    """
    settings = settings or {}
    found = Checklist(PROMISES)
    for file, line, name in private_reads(kind):
        found.broke(Broken(PUBLIC, f"{file}:{line}: {name} is private to the simulator"))
    found.keep(PUBLIC)
    try:
        kind(**settings)
    except Exception as error:
        found.broke(Broken(SETTINGS, f"{kind.__name__} cannot be made: {type(error).__name__}: {error}"))
        return found
    found.keep(SETTINGS)
    told("made-up clusters")
    for broken in _asked(kind, settings, found.keep):
        found.broke(broken)
    for case in cases if found.holds(SERVES) else ():
        told(case.name)
        subject = Subject(kind, settings)

        def trial(some: Sequence[Row], subject: Subject = subject, case: Case = case) -> list[Broken]:
            return [*_trial(subject, case, some, lambda *_: None)]

        for broken in _trial(subject, case, case.rows() if rows is None else rows, found.keep):
            if found.holds(broken.promise):
                found.broke(broken if broken.lasts else shrunk(broken, trial))
    if not found.holds(REPEATS):
        found.leave(BLIND, "two runs of it differ anyhow")
    return found


def _asked(kind: type[Router], settings: dict[str, Any], keep: Callable[..., None]) -> Iterator[Broken]:
    """What it answers in clusters that nobody runs: any loads, one to four replicas, some of them away."""
    chance = Random(1)
    router = kind(**settings)
    router.random = Random(3)
    for number in range(_ASKED):
        prompt, session = chance.randint(1, 49), chance.randint(-1, 5)
        seen = [chance.randint(0, 5) for _ in range(chance.randint(0, 4))]
        request = Live(number, number * 10**9, prompt, 62, session=session, hash_ids=seen)
        view = _view(chance, number * 10**9)
        before = copy.deepcopy(view), _public(request)
        told = f"{request!r} of session {request.session}, hash_ids {request.hash_ids}, and {view}"
        try:
            with patience():
                answer = router.route(request, view)
        except Hangs:
            yield Broken(SERVES, f"{told}: it {hanging()}")
            return
        except Exception as error:
            yield Broken(RAISES, f"{told}: {type(error).__name__}: {error}")
            return
        if not isinstance(answer, int) or not 0 <= answer < len(view.indices):
            yield Broken(IN_RANGE, f"{told}: its answer is {answer!r}; positions are 0 to {len(view.indices) - 1}")
            return
        if (view, _public(request)) != before:
            yield Broken(LOOKS, f"{told}: it changed {'the replicas' if view != before[0] else 'the request'}")
            return
    keep(RAISES, IN_RANGE, LOOKS)


def _view(chance: Random, now: int) -> View:
    """Some of four replicas, at least one, with any loads."""
    there = sorted(chance.sample(range(4), chance.randint(1, 4)))
    waiting = [chance.randint(0, 9) for _ in there]
    outstanding = [n + chance.randint(0, 9) for n in waiting]
    return View(now, there, outstanding, [n * chance.randint(1, 49) for n in outstanding], waiting)


def _public(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name, kind in vars(Request).items() if isinstance(kind, property)}


def _trial(subject: Subject, case: Case, rows: Sequence[Row], keep: Callable[..., None]) -> Iterator[Broken]:
    """What ``rows`` show. ``keep`` hears of promises that hold here."""

    def broken(promise: Promise, what: str) -> Broken:
        return Broken(promise, what, case, tuple(rows))

    try:
        once = serve(subject, case, rows)
        if wrong := endings(once, case.timeout_ms is not None):
            yield broken(SERVES, wrong)
        if wrong := difference(once, serve(subject, case, rows, seed=2), ("the first time", "the second time")):
            yield broken(REPEATS, wrong)
            return
        other = serve(subject, case, rows, other_answers=True)
        end = min(earliest_end(once), earliest_end(other))
        columns = once.requests.columns(), other.requests.columns()
        for i, at in enumerate(columns[0]["arrival_ps"].tolist()):
            mine, theirs = (int(each["replica"][i]) for each in columns)
            if at < end and mine != theirs and not case.away:  # else these are where it ended, not where it was sent
                what = f"request {i} goes to replica {mine}, and to {theirs} if answers have other lengths"
                yield broken(BLIND, f"{what}, of which nobody can have seen the end by then")
                break
    except Stopped as stop:
        account = stop.broken
        if account.promise == ALLOWED:  # the position that the cluster was given
            account = Broken(IN_RANGE, account.what, account.case, account.rows)
        yield account
        return
    keep(SERVES, REPEATS, BLIND)
