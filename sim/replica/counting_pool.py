"""The KV pool by counting.

The counting pool knows numbers of blocks only, not which block is whose: enough wherever prefix caching cannot
matter, and O(1) for any number of steps. `sim.replica.prefix_pool` has the pool that knows each block.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Protocol

from mypy_extensions import mypyc_attr

from chairlift.policies.base import PrefixNode
from chairlift.sim.replica.decode_group import NOBODY_ELSE, Decodes
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import Growth


class _Root:
    """The root of a radix tree without anything in it."""

    def __init__(self) -> None:
        self.parent: PrefixNode | None = None
        self.children: Mapping[Hashable, PrefixNode] = {}
        self.stop = 0


NO_PREFIX: PrefixNode = _Root()


class Flight(Protocol):
    """A step that is planned and not processed yet."""

    chunks: list[tuple[Live, int]]  # of prompts, and their tokens
    decoding: bool  # whether it holds a token of each member of the decode group


@mypyc_attr(allow_interpreted_subclasses=True)
class CountingPool:
    """``total`` blocks of ``block_size`` tokens, ``free`` of them nobody's.

    The pool keeps how many blocks each request was given ahead of its tokens. What the decode group takes it only
    counts: a request holds what it was given, or what its tokens need if that is more.
    """

    __slots__ = (  # what a pool is like is kept by it, not by its class, where Python looks it up more slowly
        *("_given", "block_size", "flight", "follows", "free", "keeps", "publishes", "room", "tables", "total"),
        *("tracks", "windowed"),
    )

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs at least one block of one token: {total} blocks of {block_size}")
        self.tracks = False  # whether it must be told who computes what
        self.follows = False  # whether it must be told which members of the decode group start a block
        self.publishes = False  # whether decoding can make blocks that others find
        self.keeps = False  # whether it wants to know which prompts a step has computed: `landed`
        self.windowed = False  # whether requests give blocks back while they run: `shed`, `flight`
        self.tables = 1  # tables of blocks that a request has: 16 more tokens take a block in each
        self.total = total
        self.block_size = block_size
        self.free = total
        self.room = total * block_size  # tokens that a request may have in KV
        self.flight: Flight | None = None  # kept only of a pool that is ``windowed``
        self._given: dict[int, int] = {}  # request → blocks that `open` and `extend` gave it

    @property
    def spared(self) -> int:
        """Blocks that requests would hold beyond those that are held: of each its own, and none slid out."""
        return 0

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens occupy."""
        return -(-tokens // self.block_size)

    def hit(self, request: Live) -> int:
        """Leading known tokens of a waiting request that need no computing: stored here, or loaded from elsewhere."""
        return request.loaded

    def need(self, request: Live, tokens: int, in_chunks: bool = False) -> int:
        """Free blocks that a waiting request must find for its first ``tokens`` tokens.

        ``in_chunks``: they are computed in several steps, between which blocks slide out of windows.
        """
        return -(-tokens // self.block_size)

    def open(self, request: Live, tokens: int) -> None:
        """Give a waiting request the blocks of its first ``tokens`` tokens; `need` of them are free."""
        self._given[request.row] = blocks = -(-tokens // self.block_size)
        self.free -= blocks

    def extend(self, request: Live, tokens: int) -> bool:
        """See to it that a request's blocks cover ``tokens`` tokens; False, and nothing done, if too few are free."""
        blocks = -(-tokens // self.block_size)
        more = blocks - self._given[request.row]
        if more > 0:
            if more > self.free:
                return False
            self.free -= more
            self._given[request.row] = blocks
        return True

    def lacks(self, request: Live, tokens: int) -> int:
        """Blocks that `extend` would take."""
        return max(0, -(-tokens // self.block_size) - self._given[request.row])

    def holds(self, request: Live) -> int:
        """Blocks that `open` and `extend` gave a request."""
        return self._given[request.row]

    def grow(self, blocks: int) -> None:
        """Requests take so many blocks more, which are free; whose they are is told by `cover` once that matters."""
        self.free -= blocks

    def cover(self, request: Live, blocks: int) -> None:
        """A request has so many blocks, those that it took by `grow` included."""
        self._given[request.row] = blocks

    def settled(self, request: Live) -> bool:
        """Whether nothing that the request's decodes fill can be found by others."""
        return True

    def shed(self, request: Live) -> None:
        """A decoding request is about to compute a token: it gives back what slides out of its windows."""

    def decode_one(self, request: Live, need: int) -> None:
        """A decoding request computes one token, for which it takes ``need`` blocks (one in each table, or none)."""
        self.free -= need

    def decode_all(self, group: Decodes, steps: range, fresh: Mapping[int, Live] = NOBODY_ELSE) -> None:
        """The group does these steps, counted from now; there is room.

        ``fresh``: members that have not decoded with the group since they joined.
        """
        first, last = steps.start, steps.stop
        if group.growing and last > first:
            self.free -= group.blocks_needed(last) - (group.blocks_needed(first) if first else 0)

    def leap(self, group: Decodes, steps: int, within: int) -> Growth:
        """The group does its steps 1 to ``steps`` - 1, and has done step 0; there is room.

        What the first ``within`` of those steps, step 0 among them, hold beyond what is held now.
        """
        growth = group.growth(within)
        self.decode_all(group, range(1, steps))
        return growth

    def lasts(self, group: Decodes, steps: int, taken: int, waits: bool) -> int:
        """For how many of ``steps`` steps of the group there is room; for the first it has ``taken`` blocks already.

        ``waits``: somebody may wait for blocks.
        """
        return group.steps_within(steps, self.free + taken)

    def computed(self, request: Live, tokens: int) -> None:
        """The request's first ``tokens`` tokens are known and will be in its blocks when this step has run."""

    def another_known(self, request: Live) -> None:
        """A waiting request has one more known token."""

    def prefix(self, request: Live) -> PrefixNode:
        """Where a waiting request's known tokens leave the radix tree."""
        return NO_PREFIX

    def opening(self, request: Live, tokens: int) -> Hashable:
        """Equal for two requests if their first ``tokens`` tokens are."""
        return request.row

    def evict(self, blocks: int) -> None:
        """Forget what is cached and not held until ``blocks`` blocks are neither; a pool may do so when it likes."""

    def landed(self, request: Live) -> bool:
        """The step that computed a request's tokens so far is done, or its next is planned: they can be kept.

        Whether the request has other blocks now for some of them.
        """
        return False

    def table(self, request: int) -> list[int] | None:
        """The blocks of a request, in order, not to be changed; None from a pool that only counts them."""
        return None

    def close(self, request: Live, tokens: int) -> None:
        """A request gives all its blocks back; it had taken them for ``tokens`` tokens."""
        blocks = -(-tokens // self.block_size)
        given = self._given.pop(request.row)
        self.free += given if given > blocks else blocks

    def leaning(self, request: Live, admitted: dict[int, Live]) -> Iterator[Live]:
        """Of ``admitted``, those that were to find what ``request`` computes in the plan under way, one at a time.

        In three steps, where blocks hold 16 tokens: the plan computes 32 tokens of A, so A's first two blocks can be
        found; the same plan admits B, which finds them; then the policy preempts A, whose 32 tokens are not computed.
        B leans on A: B must be preempted first, before the next one is asked for.
        """
        return iter(())

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:
        """A request is about to lose its blocks, and will look its known tokens up once more.

        ``planned``: a decode of this step had been planned for it.
        """


class PrefixCacheMatters(Exception):
    """A run that was counted without a prefix cache would have used it; run it again with one."""


@mypyc_attr(allow_interpreted_subclasses=True)
class StandInPool(CountingPool):
    """Counts in place of a prefix cache for as long as that cannot matter.

    Where no two requests share a block, only a preempted request can find blocks: its own. The first preemption
    raises `PrefixCacheMatters`.
    """

    __slots__ = ()

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102 - as above
        raise PrefixCacheMatters
