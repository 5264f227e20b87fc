"""Runs: steps of the same members, one after the other, and how long they take in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt

from policies.base import Request


def duration(first: int, slope: int, steps: int) -> int:
    """Picoseconds of ``steps`` steps that cost ``first``, ``first + slope``, …"""
    return steps * first + slope * (steps * (steps - 1) // 2)


def steps_to_reach(span: int, first: int, slope: int) -> int:
    """The fewest steps (>= 1) whose duration is at least ``span`` ps; ``first`` > 0, ``slope`` >= 0."""
    if span <= first:
        return 1
    if slope == 0:
        return -(-span // first)
    # the root of slope/2·n² + (first − slope/2)·n = span, then the integer fix-up
    b = 2 * first - slope
    n = max(1, (isqrt(b * b + 8 * slope * span) - b) // (2 * slope))
    while duration(first, slope, n) >= span and n > 1:
        n -= 1
    while duration(first, slope, n) < span:
        n += 1
    return n


@dataclass(slots=True)
class Plan:
    """Steps of the same members, as the policy arranged them."""

    first: int  # ps from boundary to boundary, the first step's; pauses and host work included
    slope: int  # ps that each further step takes longer
    count: int  # steps it may last
    chunks: list[tuple[Request, int]]
    decoding: bool
    taken: int  # blocks that its first step's decodes have taken
    row: tuple[int, ...]  # RUN_COLUMNS from `chunks` on
    emitting: list[Request] = field(default_factory=list)  # their prompt is done with it: a token comes
    ending: list[Request] = field(default_factory=list)  # their last token comes with it
