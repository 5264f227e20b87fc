"""The KV pool by counting, and the group of requests that decode together.

The counting pool knows numbers of blocks only, not which block is whose: enough wherever prefix caching cannot
matter, and O(1) for any number of steps. `sim.replica.prefix_pool` has the pool that knows each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from chairlift.policies.base import FOREVER, Request


def admission(request: Request) -> int:
    """A sort key: the order of running."""
    return request._seq


class CountingPool:
    """``total`` blocks of ``block_size`` tokens, ``free`` of them nobody's; `Request._blocks` says who has them."""

    tracks = False  # whether the decode group must know its members by phase
    publishes = False  # whether decoding can make blocks that others find

    __slots__ = ("block_size", "free", "total")

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs at least one block of one token: {total} blocks of {block_size}")
        self.total = total
        self.block_size = block_size
        self.free = total

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens occupy."""
        return -(-tokens // self.block_size)

    def hit(self, request: Request) -> int:
        """Leading known tokens of a waiting request that need no computing: stored here, or loaded from elsewhere."""
        return request._loaded

    def need(self, request: Request, tokens: int) -> int:
        """Free blocks that a waiting request must find for its first ``tokens`` tokens."""
        return -(-tokens // self.block_size)

    def open(self, request: Request, tokens: int) -> None:
        """Give a waiting request the blocks of its first ``tokens`` tokens; `need` of them are free."""
        request._blocks = -(-tokens // self.block_size)
        self.free -= request._blocks

    def extend(self, request: Request, tokens: int) -> bool:
        """See to it that a request's blocks cover ``tokens`` tokens; False, and nothing done, if too few are free."""
        more = -(-tokens // self.block_size) - request._blocks
        if more > 0:
            if more > self.free:
                return False
            self.free -= more
            request._blocks += more
        return True

    def decode_one(self, request: Request, need: int) -> None:
        """A decoding request computes one token, for which it takes ``need`` blocks (0 or 1)."""
        self.free -= need

    def decode_all(self, group: Decodes, steps: range) -> None:
        """The group does these steps, counted from now; there is room."""
        first, last = steps.start, steps.stop
        if group.growing and last > first:
            self.free -= group.blocks_needed(last) - (group.blocks_needed(first) if first else 0)

    def computed(self, request: Request, tokens: int) -> None:
        """The request's first ``tokens`` tokens are known and will be in its blocks when this step has run."""

    def table(self, request: int) -> list[int] | None:
        """The blocks of a request, in order, not to be changed; None from a pool that only counts them."""
        return None

    def close(self, request: Request, blocks: int) -> None:
        """A request gives its ``blocks`` blocks back."""
        self.free += blocks
        request._blocks = 0

    def leaning(self, request: Request, admitted: dict[int, Request]) -> Iterator[Request]:
        """Of ``admitted``, those that were to find what ``request`` computes in the plan under way, one at a time.

        Each is to be preempted before the next is asked for, and all before ``request``.
        """
        return iter(())

    def preempted(self, request: Request, decoding: bool, planned: bool) -> None:
        """A request is about to lose its blocks, and will look its known tokens up once more.

        ``planned``: a decode of this step had been planned for it.
        """


class PrefixCacheMatters(Exception):
    """A run that was counted without a prefix cache would have used it; run it again with one."""


class StandInPool(CountingPool):
    """Counts in place of a prefix cache for as long as that cannot matter.

    Where no two requests share a block, only a preempted request can find blocks: its own. The first preemption
    raises `PrefixCacheMatters`.
    """

    def preempted(self, request: Request, decoding: bool, planned: bool) -> None:  # noqa: D102 - as above
        raise PrefixCacheMatters


class Decodes:
    """The requests that get one token a step, all together: a step costs O(1) however many they are.

    ``steps`` counts the decode steps the group has done. A member's tokens in KV are ``offset + steps``, so nothing
    about it is touched while it decodes: its finish is a key on the counter, and whether it needs a block is a
    matter of ``offset mod block_size``, of which only a histogram is kept.
    """

    __slots__ = ("block_size", "context", "dead", "ends", "growing", "live", "members", "phases", "reserved", "steps")

    def __init__(self, block_size: int, track: bool = False) -> None:
        self.block_size = block_size
        self.steps = 0
        self.live = 0  # members that produce a token a step
        self.dead = 0  # finished members whose slot is still paid for
        self.context = 0  # KV tokens that the next step reads, its own included; dead slots' too
        self.growing = 0  # live members without a reservation ahead of them
        self.reserved = 0  # live members with one
        self.phases = [0] * block_size  # growing members by offset mod block_size
        self.members: list[dict[int, Request]] | None = [{} for _ in range(block_size)] if track else None
        self.ends: list[tuple[int, int, Request]] = []  # a heap of (steps at the end, id, member), stale ones too

    def join(self, request: Request, left: int) -> None:
        """Add a request that has ``left`` >= 1 tokens to emit."""
        computed = request._offset
        offset = computed - self.steps
        request._offset = offset
        request._counter = self
        self.live += 1
        self.context += computed + 1 + request.pad
        end = self.steps + left
        ahead = request._reserved - computed
        if ahead > 0:
            self.reserved += 1
            if ahead < left:  # the reservation runs out before the answer does
                end = self.steps + ahead
        else:
            request._reserved = 0
            self._grows(request)
        request._end = end
        heappush(self.ends, (end, request.id, request))

    def leave(self, request: Request) -> None:
        """Take a live member out; its tokens in KV become a number of its own again."""
        computed = request._offset + self.steps
        self._stops(request)
        self.context -= computed + 1 + request.pad
        request._emitted = computed - request.prompt_tokens + 1
        request._offset = computed
        request._counter = None
        request._end = 0

    def die(self, request: Request) -> None:
        """A live member has finished but keeps its slot."""
        self._stops(request)
        self.dead += 1

    def bury(self, request: Request, computed: int) -> None:
        """Take a dead member out, whose own tokens in KV were ``computed`` when it finished."""
        self.dead -= 1
        self.context -= request._offset + self.steps + 1 + request.pad
        request._emitted = computed - request.prompt_tokens + 1
        request._offset = computed
        request._counter = None
        request._end = 0

    def _grows(self, request: Request) -> None:
        phase = request._offset % self.block_size
        self.growing += 1
        self.phases[phase] += 1
        if self.members is not None:
            self.members[phase][request.id] = request

    def _stops(self, request: Request) -> None:
        """A member produces no tokens any more."""
        self.live -= 1
        if request._reserved:
            self.reserved -= 1
            return
        phase = request._offset % self.block_size
        self.growing -= 1
        self.phases[phase] -= 1
        if self.members is not None:
            del self.members[phase][request.id]

    def horizon(self) -> int:
        """Steps until the next member's end; `FOREVER` without members."""
        heap = self.ends
        while heap:
            end, _, request = heap[0]
            if request._end == end and request._counter is self:
                return end - self.steps
            heappop(heap)  # preempted since, or already dead
        return FOREVER

    def outgrow(self, request: Request, left: int) -> None:
        """Its reservation is used up: from here it grows block by block, ``left`` tokens more."""
        self.reserved -= 1
        request._reserved = 0
        self._grows(request)
        request._end = self.steps + left
        heappush(self.ends, (request._end, request.id, request))

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
