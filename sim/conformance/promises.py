"""What a check comes to: promises, those that are broken, and the fewest requests that show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from chairlift.sim.conformance.cases import Case, Row

ATTEMPTS = 250  # smaller workloads that are tried to make a counterexample small


class Promise(NamedTuple):
    """One thing that holds of every policy, or of every router."""

    name: str
    says: str


SETTINGS = Promise("settings", "its fields can be read as settings, and it can be made from them")
PUBLIC = Promise("public", "it reads and writes only what the contract names")
RAISES = Promise("raises", "it raises nothing")


@dataclass(frozen=True)
class Broken:
    """A broken promise: what happened, and where."""

    promise: Promise
    what: str  # one or two sentences with the step, the number and the limit
    case: Case | None = None
    rows: tuple[Row, ...] = ()  # the requests that show it
    settings: dict[str, Any] = field(default_factory=dict)  # given beside the user's own
    lasts: bool = False  # it takes long to show, so nobody tries fewer requests


class Stopped(Exception):
    """A run came to no end, for a promise is broken."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.what)
        self.broken = broken


@dataclass
class Verdict:
    """What the suite found out about one promise."""

    promise: Promise
    state: Literal["kept", "broken", "unchecked"] = "unchecked"
    broken: Broken | None = None
    why: str = "a broken promise came before it"  # it is unchecked


class Checklist:
    """The verdicts on all ``promises``, filled while the suite runs."""

    def __init__(self, promises: Sequence[Promise]) -> None:
        self._verdicts = {promise: Verdict(promise) for promise in promises}
        self.refused = 0  # requests that the policy refused

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self._verdicts.values())

    @property
    def broken(self) -> list[Broken]:
        """All broken promises."""
        return [verdict.broken for verdict in self if verdict.broken is not None]

    def keep(self, *promises: Promise) -> None:
        """Nothing speaks against these so far."""
        for promise in promises:
            if self._verdicts[promise].state == "unchecked":
                self._verdicts[promise].state = "kept"

    def leave(self, promise: Promise, why: str) -> None:
        """This one cannot be checked, whatever seemed so far."""
        self._verdicts[promise] = Verdict(promise, why=why)

    def broke(self, broken: Broken) -> None:
        """This one is broken; of several accounts the first stays."""
        verdict = self._verdicts[broken.promise]
        if verdict.broken is None:
            verdict.state, verdict.broken = "broken", broken

    def holds(self, promise: Promise) -> bool:
        """Whether nothing has broken that promise so far."""
        return self._verdicts[promise].broken is None


Trial = Callable[[Sequence[Row]], list[Broken]]  # what a workload shows


def shrunk(broken: Broken, trial: Trial) -> Broken:
    """The same broken promise, shown by fewer and plainer requests if `ATTEMPTS` tries find some."""
    best = broken
    left = ATTEMPTS

    def shows(rows: Sequence[Row]) -> bool:
        nonlocal best, left
        if not rows or left <= 0:
            return False
        left -= 1
        found = next((each for each in trial(rows) if each.promise == broken.promise), None)
        if found is not None:
            best = found
        return found is not None

    size = len(best.rows) // 2
    while size:  # leave out half of them, a quarter, … one
        start = 0
        while start < len(best.rows):
            if not shows(best.rows[:start] + best.rows[start + size :]):
                start += size
        size //= 2
    for begin in (best.rows[0].arrival_ms if best.rows else 0, 10**9):
        shows([row._replace(arrival_ms=max(0, row.arrival_ms - begin)) for row in best.rows])
    for i in range(len(best.rows)):
        for change in _plainer(best.rows[i]):
            before, changed = best.rows[i], best.rows[i]._replace(**change)
            if changed != before and (changed.prompt_tokens, changed.output_tokens) <= before[1:3]:
                shows((*best.rows[:i], changed, *best.rows[i + 1 :]))
    return dataclasses.replace(best, settings=broken.settings)


def _plainer(row: Row) -> Iterator[dict[str, Any]]:
    yield {"prefix_group": -1, "prefix_tokens": 0}
    yield {"priority": 0}
    yield {"session": -1}
    yield {"tenant": "a"}
    spare = row.max_tokens - row.output_tokens
    for tokens in (1, 2, 5, 10, 20):
        if tokens < row.prompt_tokens:
            yield {"prompt_tokens": tokens, "prefix_group": -1, "prefix_tokens": 0}
        if tokens < row.output_tokens:
            yield {"output_tokens": tokens, "max_tokens": tokens + spare}
