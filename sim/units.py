"""Picoseconds, the unit of the clock. Everything in a run counts integers of them; other units appear at the edges."""

from __future__ import annotations

PS_PER_NS = 10**3
PS_PER_US = 10**6
PS_PER_MS = 10**9
PS_PER_S = 10**12


def picoseconds(seconds: float) -> int:
    """Seconds on the clock, rounded to the nearest picosecond."""
    return round(seconds * PS_PER_S)
