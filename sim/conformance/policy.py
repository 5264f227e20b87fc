"""What every policy promises, and the trial of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from chairlift.policies.base import Deployment, Scheduler
from chairlift.sim.conformance.cases import MODEL_LEN, POLICY_CASES, Case, Row
from chairlift.sim.conformance.private_names import private_reads
from chairlift.sim.conformance.promises import PUBLIC, RAISES, SETTINGS, Broken, Checklist, Promise, Stopped, shrunk
from chairlift.sim.conformance.serving import (
    ALLOWED,
    BOOKS,
    REPEATS,
    SERVES,
    Subject,
    difference,
    earliest_end,
    endings,
    first_step,
    refused,
    serve,
)
from chairlift.sim.results.outcome import Outcome

LEAPS = Promise("leaps", "it vouches only for steps that it would plan alike: leaping and single steps agree")
BLIND = Promise("blind", "it does not see how long an answer will be")
PROMISES = (SETTINGS, PUBLIC, RAISES, ALLOWED, SERVES, BOOKS, REPEATS, LEAPS, BLIND)


def check_policy(
    kind: type[Scheduler],
    settings: dict[str, Any] | None = None,
    cases: Sequence[Case] = POLICY_CASES,
    rows: Sequence[Row] | None = None,
    variants: bool = True,
    told: Callable[[str], None] = lambda _what: None,
) -> Checklist:
    """Try every promise on ``kind`` with ``settings``, in each of ``cases``.

    ``variants``: also with each other choice of every setting that has only a few. ``rows``: these requests instead of
    the cases' own. ``told`` hears which case is tried. Raises ValueError if the policy refuses these settings, or says
    that they suit no model of `cases.MODEL_LEN` tokens.
    """
    settings = settings or {}
    found = Checklist(PROMISES)
    for file, line, name in private_reads(kind):
        found.broke(Broken(PUBLIC, f"{file}:{line}: {name} is private to the simulator"))
    found.keep(PUBLIC)

    def unmakable(error: Exception, given: dict[str, Any]) -> Broken:
        return Broken(SETTINGS, f"{kind.__name__}({_shown(given)}) raises {type(error).__name__}: {error}")

    try:
        sample = kind(**settings)
    except Exception as error:
        if settings and isinstance(error, ValueError):  # these do not go together, and the policy says so
            raise
        found.broke(unmakable(error, settings))
        return found
    deployment = Deployment("any GPU", 80 * 2**30, MODEL_LEN)
    for setting, rule in sample.misfits(deployment):
        raise ValueError(f"{setting} {rule}")
    if sample.oracle:
        found.leave(BLIND, "it says that it is an oracle")
    elif sample.predictor is not None:
        found.leave(BLIND, "it asks for predictions, which the simulator makes from the truth")
    found.keep(SETTINGS)
    for more in [{}, *(_variants(kind, settings) if variants else ())]:
        try:
            if any(kind(**settings, **more).misfits(deployment)):
                continue
        except ValueError:  # these do not go together, and the policy says so
            continue
        except Exception as error:
            found.broke(unmakable(error, {**settings, **more}))
            continue
        for case in cases:
            told(" ".join((case.name, _shown(more))).strip())
            _try(found, kind, {**settings, **more}, more, case, case.rows() if rows is None else rows)
    if not found.holds(REPEATS):
        for promise in (LEAPS, BLIND):
            found.leave(promise, "two runs of it differ anyhow")
    return found


def _try(
    found: Checklist,
    kind: type[Scheduler],
    settings: dict[str, Any],
    more: dict[str, Any],
    case: Case,
    rows: Sequence[Row],
) -> None:
    subject = Subject(kind, settings)
    blind = not (sample := kind(**settings)).oracle and sample.predictor is None

    def trial(some: Sequence[Row]) -> list[Broken]:
        return [*_trial(subject, case, some, blind, lambda *_: None, lambda _outcome: None)]

    def count(outcome: Outcome) -> None:
        found.refused += refused(outcome)

    for broken in _trial(subject, case, rows, blind, found.keep, count):
        if found.holds(broken.promise):
            small = broken if broken.lasts else shrunk(broken, trial)
            found.broke(dataclasses.replace(small, settings=more))


def _trial(
    subject: Subject,
    case: Case,
    rows: Sequence[Row],
    blind: bool,
    keep: Callable[..., None],
    ran: Callable[[Outcome], None],
) -> Iterator[Broken]:
    """What ``rows`` show. ``keep`` hears of promises that hold here, ``ran`` of the run by which they do."""

    def broken(promise: Promise, what: str) -> Broken:
        return Broken(promise, what, case, tuple(rows))

    try:
        leapt = serve(subject, case, rows)
        ran(leapt)
        if wrong := endings(leapt, case.timeout_ms is not None):
            yield broken(SERVES, wrong)
        if wrong := difference(leapt, serve(subject, case, rows, seed=2), ("the first time", "the second time")):
            yield broken(REPEATS, wrong)
            return  # nothing else can be told from two of its runs
        stepped = serve(subject, case, rows, leap=False)
        if wrong := difference(leapt, stepped, ("as it vouched", "asked before each step")):
            yield broken(LEAPS, wrong)
        if blind:
            other = serve(subject, case, rows, leap=False, other_answers=True)
            end = min(earliest_end(stepped), earliest_end(other))
            names = ("with these answers", "with others, of which nobody can have seen the end by then")
            if wrong := first_step(stepped, other, names, lambda start: start < end):
                yield broken(BLIND, wrong)
            keep(BLIND)
    except Stopped as stop:
        yield stop.broken
        return
    keep(RAISES, ALLOWED, SERVES, BOOKS, REPEATS, LEAPS)


def _variants(kind: type[Scheduler], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each other choice of every setting that has only a few, alone; those in ``settings`` stay."""
    if not dataclasses.is_dataclass(kind):
        return
    hints = get_type_hints(kind)
    for setting in dataclasses.fields(kind):
        if setting.init and setting.name not in settings:
            hint = hints[setting.name]
            choices = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
            yield from ({setting.name: choice} for choice in choices if choice != setting.default)


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
