"""Runs: steps of the same members, one after the other, and how long they take in closed form."""

from __future__ import annotations

from bisect import bisect_left
from math import isqrt
from typing import Final

from mypy_extensions import mypyc_attr

from chairlift.backend.base import Host
from chairlift.sim.replica.decode_group import NOBODY_ELSE
from chairlift.sim.replica.request import NEVER, Live, When
from chairlift.sim.results.records import Growth, row_after


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


@mypyc_attr(allow_interpreted_subclasses=True)
class Course:
    """Steps of the same members whose costs and contexts form no series: each keeps another number of drafts."""

    __slots__ = ("ends", "gpus", "rows")

    def __init__(self, ends: list[int], gpus: list[int], rows: list[tuple[int, ...]]) -> None:
        self.ends = ends  # of each step: ps from the beginning of the first one to its end
        self.gpus = gpus  # ps on the GPU
        self.rows = rows  # the fields of a `StepRow`


NOBODY: Final[list[Live]] = []
NO_GAPS: Final[list[int]] = []


@mypyc_attr(allow_interpreted_subclasses=True)
class Plan:
    """Steps of the same members, as the policy arranged them."""

    __slots__ = (
        "begun",
        "chunks",
        "count",
        "course",
        "decoded_before",
        "decoding",
        "emitting",
        "ending",
        "first",
        "fresh",
        "gpu",
        "gpu_slope",
        "growth",
        "held",
        "host",
        "intake",
        "late_gaps",
        "row",
        "slope",
        "spared",
        "undelivered",
        "when",
    )

    def __init__(
        self,
        first: int,
        slope: int,
        count: int,
        chunks: list[tuple[Live, int]],
        decoding: bool,
        row: tuple[int, ...],
        late_gaps: list[int],
        gpu: int,
        gpu_slope: int,
        host: Host,
    ) -> None:
        self.first = first  # ps from boundary to boundary, the first step's; pauses and host work included
        self.slope = slope  # ps that each further step takes longer
        self.count = count  # steps it may last
        self.course: Course | None = None  # of its steps, where they form no series
        self.chunks = chunks
        self.decoding = decoding
        self.row = row  # the fields of a `StepRow`
        # decodes that did not emit just before: flat rows of (time of their last token, how many)
        self.late_gaps = late_gaps
        self.gpu = gpu  # ps on the GPU, the first step's; pauses included
        self.gpu_slope = gpu_slope
        self.host = host
        self.intake = 0  # ps of host time for requests that have come
        self.when = When()  # its last step brings its tokens; known once that step is done, or the one after it planned
        self.decoded_before = NEVER  # when the group emitted before its last step
        self.fresh = NOBODY_ELSE  # decodes of its last step that had joined the group since then
        self.undelivered = 0  # decodes of its last step whose token is nobody's: the client gave up, or has all
        self.growth: Growth  # of its steps but the one in flight, set when several are committed, as the next two
        self.held: int  # blocks, as its last step's `StepRow` has them
        self.spared: int  # likewise
        self.begun: int  # ps, when its last step began; of a step in flight
        self.emitting = NOBODY  # set when committed: their prompt is done with it, a token comes
        self.ending = NOBODY  # likewise: their last token comes with it

    def span(self, count: int) -> int:
        """Picoseconds of its first ``count`` steps."""
        if self.course is None:  # as `duration`, without the detour
            return count * self.first + self.slope * (count * (count - 1) // 2)
        return self.course.ends[count - 1] if count else 0

    def reaching(self, span: int) -> int:
        """The fewest steps (>= 1) that take at least ``span`` ps."""
        if self.course is None:
            return steps_to_reach(span, self.first, self.slope)
        return bisect_left(self.course.ends, span) + 1

    def leave_to_last(self, before: When, steps: int) -> None:
        """The plan is from here on its last step alone: the ``steps`` steps before that one were done at ``before``."""
        self.decoded_before = before
        if self.course is None:
            self.fresh = NOBODY_ELSE
            self.row = row_after(self.row, steps, self.held, self.spared)
        else:
            self.fresh = {}  # its own: whoever leaves the group meanwhile is written down there
            self.row, self.gpu, self.gpu_slope = self.course.rows[steps], self.course.gpus[steps], 0

    def lose_gap(self, last_ps: int) -> None:
        """A token of the plan's last step reaches no client; the client got the token before that one at ``last_ps``.

        So the step ends one gap less. The gap of a late decode stands in ``late_gaps``, and is taken out there; every
        other decode has the step's duration as its gap, and is counted as ``undelivered``.
        """
        late = self.late_gaps
        for i in range(0, len(late), 2):
            if late[i] == last_ps:
                late[i + 1] -= 1
                if not late[i + 1]:
                    del late[i : i + 2]
                return
        self.undelivered += 1
