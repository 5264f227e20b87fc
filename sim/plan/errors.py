"""How far a plan's answer moves where the step costs are wrong: a second width, beside that of the simulation's chance.

`drawn` makes a system whose step costs are off as they might be. A profile that was measured on this GPU errs as it did
on runs that were left out of its fit (`chairlift.backend.calibrated.resampled`). Of a profile carried from another GPU
and of the roofline there is no such record: all their steps are off by one factor, whose logarithm is normal with
standard deviation `ASSUMED`.

`errors` looks for the rate at which each draw begins to break a promise, and the plan's own system too, all by short
runs of the same requests: what such runs are wrong about, they are wrong about alike. The draws' shifts are the
logarithms of their rates over the own system's, and Student's t over them says how far the real system may lie from the
simulated one.

Worked example: short runs of the own system begin to break a promise at 22/s, those of a draw with costs some 5 %
higher at 20.9/s. Its shift is ln(20.9 / 22) = −5.1 %, whatever the capacity itself is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated.profile import Profile
from chairlift.backend.slowed import Slower
from chairlift.sim.plan.capacity import NEAR, Capacity, Errors
from chairlift.sim.plan.deciding import SCREEN, STEEP, Effort, Measure
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.verdict import judge
from chairlift.sim.study import ReplicaGroup, Setup

ASSUMED = 0.17
"""Standard deviation of a cost model's factor where nothing was measured on this GPU.

Of 252 measured servers the roofline's median absolute error of TPOT is 11.2 % (``backend/README.md``): 0.112 / 0.6745
for a normal error. Nobody has measured profiles carried from another GPU; they count the same.
"""
LOOKS = 6  # verdicts of one draw, at most
PAIRED = 2  # replications of a look where draws are compared by the same requests, and
MISSES = 20  # requests in it that may miss each promise, at least; else a look has `SCREEN` replications
NEAR_ENOUGH = 0.03  # between a rate that holds and one that breaks, in the logarithm
MOST = 0.2  # of the logarithm of the rate from one look to the next, before the capacity is between two
LEAST = 0.02
_GOLDEN = 0.6180339887498949


def drawn(setup: Setup, draw: int) -> Setup:
    """``setup`` with the ``draw``-th draw of its step costs' errors; 0: as it is."""
    if not draw:
        return setup
    return dataclasses.replace(setup, groups=[_drawn(setup, group, draw) for group in setup.groups])


def _drawn(setup: Setup, group: ReplicaGroup, draw: int) -> ReplicaGroup:
    settings = group.backend
    profile = _profile(setup, group)
    if profile is not None and profile.spread:
        settings = dataclasses.replace(settings, draw=draw)  # type: ignore[type-var]  # settings are dataclasses
    if profile is None or not profile.spread or profile.scaled:
        settings = Slower(settings, math.exp(ASSUMED * _normal(draw)))
    return dataclasses.replace(group, backend=settings)


def _normal(draw: int) -> float:
    """A standard normal number; those of the first few draws are spread evenly over its distribution."""
    from scipy.special import ndtri  # here: costs a second to import

    return float(ndtri((0.5 + draw * _GOLDEN) % 1))


def described(setup: Setup) -> str:
    """What is known of the errors of a system's step costs, and what measurement would say more."""
    kinds = []
    for group in setup.groups:
        profile = _profile(setup, group)
        gpu = group.gpu.name
        if profile is None or not profile.spread:
            told = f"{100 * ASSUMED:g} % assumed, since nothing is measured: calibrate {setup.model.name} on it"
        elif profile.scaled:
            carried = f"{100 * ASSUMED:g} % assumed, since it is carried"
            told = f"the profile's own, and {carried}: calibrate {setup.model.name} on it"
        else:
            told = "the profile's own on runs left out of its fit: more recorded runs would narrow them"
        kinds.append(f"of {gpu}: {told}")
    return "; ".join(dict.fromkeys(kinds))


def _profile(setup: Setup, group: ReplicaGroup) -> Profile | None:
    """The profile that prices a group's steps; None: none does."""
    found = getattr(group.make_backend(setup.model), "profile", None)
    return found if isinstance(found, Profile) else None


def errors(
    measure: Callable[[int], Measure],
    capacity: Capacity,
    promises: Sequence[Promise],
    effort: Effort,
    draws: int,
    guess: Callable[[int], float] = lambda _: 0.0,
) -> Errors | None:
    """The errors of a capacity, by ``draws`` draws; ``measure(d)`` simulates the d-th. None where there is none to say.

    The system keeps the promises at no load, or no load breaks them: then there is no capacity whose error one could
    give. ``guess(d)``: about where the d-th draw's shift lies, see `likely`.
    """
    if not (draws and capacity.reached and capacity.low > 0 and math.isfinite(capacity.high)):
        return None
    own, slope = _crossing(measure(0), 0.0, capacity, _slope(capacity), True, promises, effort)
    found = (
        _crossing(measure(draw), own + guess(draw), capacity, slope, False, promises, effort)
        for draw in range(1, draws + 1)
    )
    shifts = tuple(crossing - own for crossing, _ in found)
    return Errors(shifts, math.log(capacity.high / capacity.low) / 2, effort.confidence)


Prices = Callable[[int], tuple[float, ...]]  # draw → logarithm of what some steps cost in it, over what they cost


def prices(setup: Setup) -> Prices:
    """What draws make of the costs of some steps: decodes alone, and a prompt with them, for each group of replicas."""
    trace = setup.trace
    prompt, context = int(trace.prompt_tokens.mean()), int((trace.prompt_tokens + trace.output_tokens / 2).mean())
    steps = [Batch((), 16, 16 * context), Batch((Chunk(0, max(1, prompt)),), 16, 16 * context)]
    here = [[group.make_backend(setup.model).step(step).first for step in steps] for group in setup.groups]

    def priced(draw: int) -> tuple[float, ...]:
        there = (group.make_backend(setup.model) for group in drawn(setup, draw).groups)
        costs = ([backend.step(step).first for step in steps] for backend in there)
        return tuple(np.log(np.concatenate(list(costs)) / np.concatenate(here)).tolist())

    return priced


def likely(setup: Setup) -> Callable[[int], float]:
    """About where the shift of a draw lies: as far as the draw's prices of some steps are off, the other way."""
    priced = prices(setup)
    return lambda draw: -float(np.mean(priced(draw)))


def assumed(setup: Setup, draws: int, confidence: float) -> Errors | None:
    """The errors of a capacity that is not known yet, by what draws make of prices alone; None without draws."""
    guess = likely(setup)
    return Errors(tuple(guess(draw) for draw in range(1, draws + 1)), 0.0, confidence) if draws else None


def _crossing(
    measure: Measure,
    guess: float,
    capacity: Capacity,
    slope: float,
    between: bool,
    promises: Sequence[Promise],
    effort: Effort,
) -> tuple[float, float]:
    """Logarithm of the rate at which short runs begin to break a promise, over the capacity, and the gap's slope there.

    Secants between a rate that is seen to hold and one that is seen to break, which are looked for from ``guess`` on.
    Unless it must lie ``between`` two, a rate will do from which it is no further than `NEAR_ENOUGH` by ``slope``.
    """
    shift, replications = guess, _paired(promises, effort.requests)
    low: tuple[float, float] | None = None  # the largest shift that is seen to hold, and its gap
    high: tuple[float, float] | None = None  # the smallest that is seen to break
    for look in range(LOOKS):
        rate = float(f"{capacity.rate_per_s * math.exp(shift):.6g}")
        samples = measure(rate, effort.requests, replications)
        found = judge(promises, samples, rate, effort.requests, effort.confidence).gap
        if abs(found) < slope * NEAR_ENOUGH and not between:
            return shift - found / slope, slope
        if found > 0:
            high = shift, found
        else:
            low = shift, found
        if low is not None and high is not None:
            slope = max((high[1] - low[1]) / (high[0] - low[0]), 1.0)
            if high[0] - low[0] < NEAR_ENOUGH:
                break
            part = min(max(-low[1] / max(high[1] - low[1], 1e-9), 0.15), 0.85)  # the gap bends: stay off the ends
            shift = low[0] + part * (high[0] - low[0])
        else:
            step = min(max(abs(found) / slope, LEAST * 2**look), MOST)
            shift -= math.copysign(step, found)
    if low is not None and high is not None:
        shift = low[0] + (high[0] - low[0]) * min(1.0, max(0.0, -low[1] / max(high[1] - low[1], 1e-9)))
    return shift, slope


def _paired(promises: Sequence[Promise], requests: int) -> int:
    """How many replications of so many requests a look has that is compared with others of the same requests."""
    fewest = min(1 - promise.wanted for promise in promises) * PAIRED * requests
    return PAIRED if fewest >= MISSES else SCREEN


def _slope(capacity: Capacity) -> float:
    """Slope of the gap over the logarithm of the rate near the capacity."""
    near = [v for v in capacity.verdicts if abs(math.log(v.rate_per_s / capacity.rate_per_s)) < 2 * NEAR]
    if len(near) < 2:
        return STEEP
    x, y = [math.log(v.rate_per_s) for v in near], [v.gap for v in near]
    return max(float(np.polyfit(x, y, 1)[0]), 1.0)


def kept(
    measure: Callable[[int], Measure],
    rate_per_s: float,
    promises: Sequence[Promise],
    effort: Effort,
    draws: int,
    priced: Prices | None = None,
) -> int:
    """In how many draws of the errors the promises seem kept at a rate.

    ``priced``: the `prices` of draws. Where a draw keeps the promises, so does one in which every step is cheaper, and
    where it breaks one, so does one in which every step is dearer: those are not simulated. The dearest comes first,
    and then the one in the middle of those that are left.
    """
    costs = {draw: () if priced is None else priced(draw) for draw in range(1, draws + 1)}
    left = sorted(costs, key=lambda draw: sum(costs[draw]))
    holding, at = 0, len(left) - 1
    while left:
        draw = left.pop(at)
        samples = measure(draw)(rate_per_s, effort.requests, SCREEN)
        holds = judge(promises, samples, rate_per_s, effort.requests, effort.confidence).holds
        same = {other for other in left if priced is not None and _is_dearer(costs[draw], costs[other], holds)}
        holding += holds * (1 + len(same))
        left = [other for other in left if other not in same]
        at = len(left) // 2
    return holding


def _is_dearer(one: tuple[float, ...], other: tuple[float, ...], than: bool) -> bool:
    """Whether each price of ``one`` is at least the ``other``'s; with ``than`` false, at most."""
    return all(a >= b if than else a <= b for a, b in zip(one, other, strict=True))
