"""The group of requests that decode together: a step costs O(1) however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final

from chairlift.policies.base import FOREVER
from chairlift.sim.replica.request import DECODING, HELD, Live, Phase, When
from chairlift.sim.results.records import NO_GROWTH, Growth

NOBODY_ELSE: Final[dict[int, Live]] = {}
ROW_BITS: Final = 32  # of an entry of `Ends`; so many steps fit beside them that entries stay machine words
_ROWS: Final = (1 << ROW_BITS) - 1


def admission(request: Live) -> int:
    """A sort key: the order of running."""
    return request.rank


class Decodes:
    """The requests that get one token a step, all together: a step costs O(1) however many they are.

    ``steps`` counts the decode steps that the group has done. A member's tokens in KV are ``offset + steps``, so a step
    touches no member. A member takes a block when ``offset + steps`` is a multiple of the block size: a histogram of
    ``offset mod block_size`` says how many members do so at a step. `Ends` knows when each member has its answer.

    In three steps, with blocks of 4 tokens: A joins with 6 tokens in KV when ``steps == 1``, so its offset is 5 and its
    phase 1. At ``steps == 3`` A has 8 tokens, two full blocks: ``-3 % 4 == 1`` is A's phase, and A takes a block. At
    ``steps == 7`` A has 12 tokens, ``-7 % 4 == 1`` again, and A takes the next.
    """

    __slots__ = ("block_size", "context", "dead", "growing", "live", "members", "phases", "reserved", "steps")

    def __init__(self, block_size: int, track: bool = False) -> None:
        self.block_size = block_size
        self.steps = 0
        self.live = 0  # members that produce a token a step
        self.dead = 0  # finished members whose slot is still paid for
        self.context = 0  # KV tokens that the next step reads, its own included; dead slots' too
        self.growing = 0  # live members without a reservation ahead of them
        self.reserved = 0  # live members with one
        self.phases = [0] * block_size  # growing members by offset mod block_size
        self.members: list[dict[int, Live]] | None = [{} for _ in range(block_size)] if track else None

    def join(self, request: Live) -> None:
        """Add a request; what is left of its reservation (`Live.reserved`) is used before it grows."""
        computed = request.stored
        request.group = self
        request.phase = DECODING
        request.offset = computed - self.steps
        self.live += 1
        self.context += computed + 1 + request.padded
        if request.reserved > computed:
            self.reserved += 1
        else:
            request.reserved = 0
            self._grows(request)

    def leave(self, request: Live, phase: Phase, when: When | None) -> None:
        """Take a live member out, which is in ``phase`` from here on.

        ``when`` holds the time of its latest token; None if that came before it joined.
        """
        computed = request.offset + self.steps
        self.context -= computed + 1 + request.padded
        self._stops(request, computed)
        request.phase = phase
        if when is not None:
            request.before, request.last = request.last, when

    def die(self, request: Live) -> None:
        """A live member has its answer and keeps its slot, which reads one token more each step."""
        self._stops(request, request.offset + self.steps)
        self.dead += 1
        request.phase = HELD

    def bury(self, request: Live) -> None:
        """Take a dead member out."""
        self.dead -= 1
        self.context -= request.offset + self.steps + 1 + request.padded

    def outgrow(self, request: Live) -> None:
        """A member's reservation is used up: from here it grows block by block."""
        self.reserved -= 1
        request.reserved = 0
        self._grows(request)

    def _grows(self, request: Live) -> None:
        phase = request.offset % self.block_size
        self.growing += 1
        self.phases[phase] += 1
        if self.members is not None:
            self.members[phase][request.row] = request

    def _stops(self, request: Live, computed: int) -> None:
        """A member produces no tokens any more; it has ``computed`` tokens in KV."""
        request.group = None
        request.stored = computed
        request.produced = computed - request.prompt + 1
        self.live -= 1
        if request.reserved:
            self.reserved -= 1
            return
        phase = request.offset % self.block_size
        self.growing -= 1
        self.phases[phase] -= 1
        if self.members is not None:
            del self.members[phase][request.row]

    def blocks_needed(self, steps: int) -> int:
        """Blocks that the next ``steps`` steps take from the pool."""
        if not self.growing:
            return 0
        size = self.block_size
        whole, rest = divmod(steps, size)
        need = whole * self.growing
        if rest:
            phases = self.phases
            first = -self.steps % size
            for back in range(rest):  # a member needs a block when offset + steps is a multiple of the size
                need += phases[first - back]
        return need

    def growth(self, steps: int) -> Growth:
        """Blocks that the next ``steps`` steps hold beyond what the first of them holds, where a member has one table.

        A block that step j takes is held in steps j, j + 1, …, ``steps`` - 1: it adds ``steps`` - j to the sum, and
        j + (j + 1) + … to the moment.
        """
        if steps < 2 or not self.growing:
            return NO_GROWTH
        size, phases = self.block_size, self.phases
        held = moment = 0
        whole = steps * (steps - 1)
        for j in range(1, min(steps, size + 1)):
            taking = phases[-(self.steps + j) % size]
            if taking:  # in steps j, j + size, j + 2 size, …
                times = (steps - 1 - j) // size + 1
                pairs = times * (times - 1)
                sums = times * j + size * pairs // 2
                squares = times * j * j + size * j * pairs + size * size * pairs * (2 * times - 1) // 6
                held += taking * (times * steps - sums)
                moment += taking * (times * whole - squares + sums)
        return Growth(held, moment // 2, 0, 0)

    def steps_within(self, steps: int, free: int) -> int:
        """How many of the next ``steps`` steps ``free`` blocks cover."""
        growing = self.growing
        size = self.block_size
        if not growing or (steps // size + 1) * growing <= free:
            return steps
        whole = min(steps // size, free // growing)
        done = whole * size
        free -= whole * growing
        phases = self.phases
        first = -self.steps % size
        while done < steps:  # at most one block size of rounds
            free -= phases[first - done % size]
            if free < 0:
                break
            done += 1
        return done


class Ends:
    """When each member of a group gets its last token: true lengths, which nothing that a policy can reach refers to.

    ``admitted``: the members, among others, by row. ``outputs``: true lengths by row. A heap holds what comes next to
    each member, by the group's steps: its answer ends, or its reservation does. An entry is one number, the step and
    the request's row (`ROW_BITS`): heaps compare numbers several times sooner than tuples. Members that leave are not
    looked for in the heap; an entry is dropped when it comes up and its request does not decode here, or has another
    entry by now.
    """

    __slots__ = ("_admitted", "_entries", "_group", "_own", "heap", "outputs")

    def __init__(self, group: Decodes, admitted: dict[int, Live], outputs: Sequence[int]) -> None:
        self.outputs = outputs
        self._own = False  # whether nobody else reads `outputs`
        self._group = group
        self._admitted = admitted
        self._entries: dict[int, int] = {}  # the latest of each row, until it comes up
        self.heap: list[int] = []  # steps of the group at which something is due << ROW_BITS | the request's row

    def shorten(self, request: int, tokens: int) -> None:
        """A request may not have more than so many tokens of answer."""
        if self.outputs[request] > tokens:
            if not self._own:
                self.outputs, self._own = list(self.outputs), True
            self.outputs[request] = tokens  # type: ignore[index]

    def add(self, request: Live) -> None:
        """A request has joined the group."""
        offset = request.offset
        end = request.prompt + self.outputs[request.row] - 1 - offset
        if request.reserved and request.reserved - offset < end:  # the reservation runs out before the answer does
            end = request.reserved - offset
        row = request.row
        self._entries[row] = entry = end << ROW_BITS | row
        heappush(self.heap, entry)

    def horizon(self) -> int:
        """Steps until the next member's end; `FOREVER` without members."""
        heap, group = self.heap, self._group
        while heap:
            first = heap[0]
            row = first & _ROWS
            latest = self._entries.get(row) == first
            if latest and (request := self._admitted.get(row)) is not None and request.group is group:
                return (first >> ROW_BITS) - group.steps
            heappop(heap)
            if latest:
                del self._entries[row]
        return FOREVER

    def due(self) -> Live | None:
        """Take what comes first out of the heap, which is due: a member that has its last token now, or None.

        None if the entry was of a member that has left, or of one whose reservation ends, which goes on without.
        """
        entry, group = heappop(self.heap), self._group
        row = entry & _ROWS
        if self._entries.get(row) != entry:
            return None
        del self._entries[row]
        request = self._admitted.get(row)
        if request is None or request.group is not group:
            return None
        if request.reserved and request.offset + group.steps < request.prompt + self.outputs[row] - 1:
            group.outgrow(request)
            self.add(request)
            return None
        return request
