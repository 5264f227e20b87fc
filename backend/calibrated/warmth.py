"""How far the clock of a GPU has sunk under prompts, from 0 to 1: what it did in the last tenths of a second tells.

Matrix products of prompts draw more power than a GPU may, so its clock sinks; decodes that read memory let it rise
again. vLLM's steps on H200s show both: steps with chunks take 6 % longer where the GPU has computed prompts all the
time than behind decodes, and decodes right behind chunks up to 9 % longer than those that come half a second later.

The warmth nears 1 while prompts are computed and 0 else, each by the factor e in `HEAT_PS` and `COOL_PS`. For example:
a GPU that has idled computes prompts for 50 ms, and is at 1 - 1/e = 0.63; 0.1 s of decodes later it is at 0.23. Within
a step both alternate, layer by layer: products of prompts, then attention of the decodes beside them. Where prompts
take 0.86 of each step, as beside 190 decodes of OPT-13B, the warmth nears 0.92, not 1.
"""

from __future__ import annotations

import math

from chairlift.backend.base import FOREVER, PS

HEAT_PS, COOL_PS = PS // 20, PS // 10
LEVELS = 4  # that steps of decodes tell apart, so that most of them are an arithmetic series


def towards(share: float) -> tuple[float, float]:
    """The warmth that a GPU nears which computes prompts for ``share`` of the time, and by how many e a second."""
    heats, cools = share * PS / HEAT_PS, (1.0 - share) * PS / COOL_PS
    return heats / (heats + cools), heats + cools


class Warmth:
    """That of one GPU. What it was told in one sum or in many makes no difference, so that a run of steps may leap."""

    __slots__ = ("_ends", "_since", "_then")

    def __init__(self) -> None:
        self._then = 0.0  # when prompts were computed last
        self._since = 0  # ps from then on
        self._ends: list[int] = []  # of each level from 1 on: the ps after which it is left for the one below

    @property
    def now(self) -> float:
        """From 0 to 1."""
        return self._then * math.exp(-self._since / COOL_PS) if self._then else 0.0

    def heat(self, ps: int, share: float = 1.0) -> None:
        """A step of ``ps`` computes prompts for that ``share`` of its time, layer by layer."""
        level, rate = towards(share)
        self._then = level + (self.now - level) * math.exp(-ps * rate / PS)
        self._since = 0
        self._ends = [
            round(COOL_PS * math.log(self._then * LEVELS / (level - 0.5)))
            for level in range(1, LEVELS + 1)
            if self._then * LEVELS > level - 0.5
        ]

    def mean(self, ps: int, share: float) -> float:
        """What it will be over such a step, on average."""
        level, rate = towards(share)
        change = ps * rate / PS
        return level + (self.now - level) * -math.expm1(-change) / change if change else self.now

    def cool(self, ps: int) -> None:
        """None are for ``ps``."""
        self._since += ps
        ends = self._ends
        while ends and ends[-1] <= self._since:
            ends.pop()

    @property
    def level(self) -> int:
        """`now` in `LEVELS`, rounded."""
        return len(self._ends)

    def steps(self, first: int, slope: int) -> int:
        """How many steps of ``first``, ``first + slope`` … ps begin before the level is left; at least 1."""
        if not self._ends:
            return FOREVER
        left = self._ends[-1] - self._since
        if slope == 0:
            return -(-left // first)
        # the least n with n · first + slope · n (n - 1) / 2 ≥ left
        n = max(1, int((slope / 2 - first + math.sqrt((first - slope / 2) ** 2 + 2.0 * slope * left)) / slope))
        while n * first + slope * n * (n - 1) // 2 < left:
            n += 1
        while n > 1 and (n - 1) * first + slope * (n - 1) * (n - 2) // 2 >= left:
            n -= 1
        return n
