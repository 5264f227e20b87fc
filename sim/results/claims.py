"""Published numbers beside simulated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chairlift.sim.results.outcome import Outcome
    from chairlift.sim.study import Claim


def checked(claims: Sequence[Claim], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """``claims.json``: each claim with the ``simulated`` number, None where the runs do not tell it.

    ``bound`` is "at least" where the highest case is still within the limits, "at most" where the lowest is not.
    """
    found = []
    for claim in claims:
        value, bound = _value(claim, claim.of, outcomes)
        if claim.over is not None:
            other, other_bound = _value(claim, claim.over, outcomes)
            value = value / other if value is not None and other else None
            opposite = {"at least": "at most", "at most": "at least", "": ""}[other_bound]
            bound = bound or opposite if not (bound and opposite and bound != opposite) else "about"
        found.append(
            {
                "says": claim.says,
                "of": claim.of,
                "over": claim.over,
                "metric": claim.metric,
                "published": claim.published,
                "simulated": value,
                "bound": bound,
                "because": claim.because,
            }
        )
    return found


def _value(claim: Claim, variant: str, outcomes: Sequence[Outcome]) -> tuple[float | None, str]:
    members = [o for o in outcomes if o.setup.variant == variant]
    if not claim.within:
        chosen = [o for o in members if o.setup.case == claim.case] if claim.case else members[-1:]
        return (_measured(chosen[0], claim.metric), "") if chosen else (None, "")
    points = []
    for outcome in members:
        at = _measured(outcome, claim.metric)
        shares = ((_measured(outcome, name), limit) for name, limit in claim.within.items())
        over = [value / limit for value, limit in shares if value is not None]
        if at is not None and over:
            points.append((at, max(over)))
    return capacity(sorted(points))


def _measured(outcome: Outcome, metric: str) -> float | None:
    value = outcome.summary.get(metric)
    return None if value is None else float(value)


def capacity(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """The load at which a limit is first exceeded, and what bounds it: "", "at least" or "at most".

    ``points`` are (load, worst metric ÷ its limit) in order of load. Between two points the second number is taken to
    be linear: (2, 0.9) and (4, 1.1) cross 1 at 3.
    """
    if not points:
        return None, ""
    last: tuple[float, float] | None = None
    for at, over in points:
        if over > 1:
            if last is None:
                return at, "at most"
            return last[0] + (at - last[0]) * (1 - last[1]) / (over - last[1]), ""
        last = (at, over)
    return points[-1][0], "at least"
