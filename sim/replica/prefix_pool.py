"""The KV pool that knows each block: a hash chain over full blocks, reference counts, and LRU reuse, as in vLLM V1.

Source: vLLM 0.23.0 to 0.33.0, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`; `tests/ledger.py` holds it to
that.
The null block is not here: of vLLM's ``num_gpu_blocks`` one is never usable.

Which blocks are equal is told by `sim.replica.prefix_identity`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from mypy_extensions import mypyc_attr

from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.decode_group import NOBODY_ELSE, Decodes, admission
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixPool(CountingPool):
    """``total`` blocks: those that somebody could find one by one, with content, users and place in the queue.

    Those are the blocks that another request can share, and those of a preempted request, for itself. They come first
    in a request's blocks. All others are only counted: a run of them in the queue of free blocks is one entry.

    ``late``: asynchronous scheduling knows the token of a step one step later, so a block that decoding fills can be
    found from the next step on.

    ``uncached_first``: of what a request gives back, the blocks without a hash are reused before all others (vLLM since
    0.24), and a cached block is lost only once no other is free. Else all queue up, a sequence's tail before its head.
    A block has its hash once it is full and its tokens are known, whether or not another request could find it. In
    three steps, with blocks of 4 tokens: A has computed 10 tokens, so its first two blocks have a hash and its third
    has none; A ends; the third is the next to be reused, and the second and the first, in that order, are the last.

    Blocks can be found once the step that fills them is planned. If that plan is taken back (a request is preempted in
    the very step) vLLM leaves them in its cache all the same, though nothing was computed: `allocate_slots` caches,
    `Scheduler._preempt_request` only frees. Whoever finds them then reads what was there before.
    """

    __slots__ = (
        *(
            "_cached",
            "_copies",
            "_done",
            "_found",
            "_front",
            "_heads",
            "_identity",
            "_keys",
            "_late",
            "_queue",
            "_stale",
        ),
        *("_shared", "_uncached_first", "_unused", "_users"),
    )

    def __init__(
        self, total: int, block_size: int, identity: Identity, late: bool = False, uncached_first: bool = False
    ) -> None:
        super().__init__(total, block_size)
        self.tracks = True
        self.publishes = self.follows = identity.answers_too
        self._shared = 0  # blocks that requests hold beyond the first that holds each
        self._identity = identity
        self._late = late
        self._uncached_first = uncached_first
        # Free blocks in the order of their reuse: `_front` of those that are only counted, then the queue's entries. An
        # entry is a findable block, or the number of such as are only counted, negative.
        self._front = total
        self._queue: deque[int] = deque()
        self._unused: list[int] = []  # names that no findable block has any more
        self._users: list[int] = []  # of each name: requests that hold its block
        self._keys: list[int] = []  # of each name: its block's content's key
        self._stale: list[int] = []  # of each name: its first so many entries in the queue count no more
        self._cached: dict[int, int] = {}  # key → the block with that content, of several the first that was cached
        self._copies: dict[int, dict[int, None]] = {}  # key → the others, in order of caching
        self._heads: dict[int, list[int]] = {}  # request → its findable blocks
        self._done: dict[int, int] = {}  # request → its full blocks, as far as the pool was told
        self._found: tuple[int, list[int], int] | None = None  # the latest look-up: request, blocks, how many are free

    @property
    def spared(self) -> int:  # noqa: D102 - documented in `CountingPool`, as all below
        return self._shared

    def hit(self, request: Live) -> int:  # noqa: D102
        return max(request.loaded, len(self._look_up(request)[1]) * self.block_size)

    def need(self, request: Live, tokens: int, in_chunks: bool = False) -> int:  # noqa: D102
        _, blocks, free = self._look_up(request)
        return -(-tokens // self.block_size) - len(blocks) + free

    def open(self, request: Live, tokens: int) -> None:  # noqa: D102
        number = request.row
        _, head, free = self._look_up(request)
        self._found = None  # its list is the request's from here on
        users, stale = self._users, self._stale
        if free:
            for block in head:
                if not users[block]:
                    stale[block] += 1
            self.free -= free
        for block in head:
            users[block] += 1
        self._shared += len(head) - free
        self._heads[number] = head
        self._done[number] = len(head)
        self._given[number] = blocks = -(-tokens // self.block_size)
        self._take(blocks - len(head))

    def extend(self, request: Live, tokens: int) -> bool:  # noqa: D102
        blocks = -(-tokens // self.block_size)
        more = blocks - self._given[request.row]
        if more > 0:
            if more > self.free:
                return False
            self._take(more)
            self._given[request.row] = blocks
        return True

    def grow(self, blocks: int) -> None:  # noqa: D102
        self._take(blocks)

    def settled(self, request: Live) -> bool:  # noqa: D102
        number = request.row
        return self._identity.shareable[number] <= self._done[number]

    def decode_one(self, request: Live, need: int) -> None:  # noqa: D102
        if need:
            self._take(need)
        if self._identity.answers_too:
            self.computed(request, request.computed if self._late else request.computed + 1)

    def decode_all(self, group: Decodes, steps: range, fresh: Mapping[int, Live] = NOBODY_ELSE) -> None:  # noqa: D102
        if group.members is None:
            if group.growing:
                first = group.blocks_needed(steps.start) if steps.start else 0
                self._take(group.blocks_needed(steps.stop) - first)
            return
        size = self.block_size
        for step in range(group.steps + steps.start, group.steps + steps.stop):
            starting = group.members[-step % size]  # their next token opens a block
            if starting:
                self._take(len(starting))
                self._started(starting)
            if not self._identity.answers_too:
                continue
            if self._late:
                for request in sorted(starting.values(), key=admission):
                    self.computed(request, request.offset + step)
            else:
                filling = group.members[(-step - 1) % size]  # their next token fills one
                for request in filling.values():
                    self.computed(request, request.offset + step + 1)

    def computed(self, request: Live, tokens: int) -> None:  # noqa: D102
        full = tokens // self.block_size
        number = request.row
        if full > self._done[number]:
            self._done[number] = full
            shareable = self._identity.shareable[number]
            if shareable:
                self._publish(number, min(full, shareable))

    def another_known(self, request: Live) -> None:  # noqa: D102
        self._found = None

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        number = request.row
        self._done[number] = full = self._hashed(request, decoding, planned)
        self._publish(number, full)

    def _hashed(self, request: Live, decoding: bool, planned: bool) -> int:
        """Blocks of a request about to be preempted that have a hash."""
        full = self._done[request.row]
        if decoding:
            full = max(full, (request.computed + planned - self._late) // self.block_size)
        return full

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        number = request.row
        head = self._heads.pop(number)
        done = self._done.pop(number)
        own = max(self._given.pop(number), -(-tokens // self.block_size)) - len(head)
        self.free += own
        if self._uncached_first:
            hashed = max(done, (tokens - self._late) // self.block_size) - len(head)
            self._front += own - hashed
            own = hashed
        if own:
            self._queue.append(-own)
        if head:
            users, queue = self._users, self._queue
            self._found = None
            head.reverse()  # a sequence's tail is reused before its head
            for block in head:
                others = users[block] - 1
                users[block] = others
                if others:
                    self._shared -= 1
                else:
                    queue.append(block)
                    self.free += 1

    def _publish(self, number: int, upto: int) -> None:
        """Let the first ``upto`` blocks of a request be found from here on."""
        head = self._heads[number]
        public = len(head)
        if upto <= public:
            return
        keys, users, cached = self._keys, self._users, self._cached
        for index, key in enumerate(self._identity.keys(number, public, upto), public):
            block = self._name(number, index)
            head.append(block)
            keys[block] = key
            users[block] = 1
            if key in cached:
                self._copies.setdefault(key, {})[block] = None
            else:
                cached[key] = block
        self._found = None

    def _look_up(self, request: Live) -> tuple[int, list[int], int]:
        """The blocks that hold a waiting request's leading tokens; the last known token is computed in any case."""
        found = self._found
        if found is not None and found[0] == request.row:
            return found
        blocks = self._findable(request)
        free = 0
        if blocks:
            users = self._users
            free = [users[block] for block in blocks].count(0)
        self._found = found = (request.row, blocks, free)
        return found

    def _findable(self, request: Live) -> list[int]:
        """The cached blocks that a waiting request's leading tokens are in."""
        blocks: list[int] = []
        number = request.row
        full = (request.prompt + request.produced - 1) // self.block_size
        if not request.lost:
            full = min(full, self._identity.shareable[number])
        cached = self._cached
        if full and self._identity.key(number, 0) in cached:
            found_or_none = [*map(cached.get, self._identity.keys(number, 0, full))]
            end = found_or_none.index(None) if None in found_or_none else full
            blocks = found_or_none[:end]  # type: ignore[assignment]  # None is not among them
        return blocks

    def _take(self, count: int) -> None:
        """Take ``count`` blocks from the head of the queue; what they held is forgotten."""
        self.free -= count
        front, queue, stale = self._front, self._queue, self._stale
        while count > front:
            entry = queue.popleft()
            if entry < 0:
                front -= entry
            elif stale[entry]:
                stale[entry] -= 1
            else:
                self._forget(entry)
                self._drop(entry)
                front += 1
        self._front = front - count

    def _forget(self, block: int) -> None:
        """Nobody can find ``block`` from here on."""
        self._found = None
        key = self._keys[block]
        copies = self._copies.get(key)
        if copies is None:
            del self._cached[key]
            return
        if block in copies:
            del copies[block]
        else:
            self._cached[key] = next(iter(copies))
            del copies[self._cached[key]]
        if not copies:
            del self._copies[key]

    # where blocks have numbers of their own, these know them

    def _name(self, number: int, index: int) -> int:
        """A name for block ``index`` of a request, which can be found from here on."""
        if self._unused:
            return self._unused.pop()
        self._users.append(0)  # a name for each block from the start would cost a replica a millisecond and a megabyte
        self._keys.append(0)
        self._stale.append(0)
        return len(self._users) - 1

    def _drop(self, block: int) -> None:
        """A free block can be found no more."""
        self._unused.append(block)

    def _started(self, starting: dict[int, Live]) -> None:
        """Each of these members of the decode group has taken a block."""


@mypyc_attr(allow_interpreted_subclasses=True)
class TablePool(PrefixPool):
    """Where steps really run: the pool that knows which block is whose.

    The order in which blocks are reused is `PrefixPool`'s; which of the blocks that nobody can find a request gets is
    all the same. In three steps, of 4 blocks: A takes two, 3 and 2, and B takes 1; A's first, 3, can be found; A ends,
    so 2 is spare, beside 0, and 3 is findable until the queue reaches it.

    Blocks of a plan that was taken back are forgotten, and whoever was to find them in that plan (`leaning`) is
    preempted with it: wrong tokens would come of them.
    """

    __slots__ = ("_spare", "_tables")

    def __init__(
        self, total: int, block_size: int, identity: Identity, late: bool = False, uncached_first: bool = False
    ) -> None:
        super().__init__(total, block_size, identity, late, uncached_first)
        self.follows = True
        self._users, self._keys, self._stale = ([0] * self.total for _ in range(3))
        self._spare = list(range(self.total))  # blocks that are free and cannot be found
        self._tables: dict[int, list[int]] = {}  # request → its blocks

    def open(self, request: Live, tokens: int) -> None:  # noqa: D102 - documented in `CountingPool`, as all below
        super().open(request, tokens)
        self._tables[request.row] = [*self._heads[request.row]]
        self._cover(request.row)

    def extend(self, request: Live, tokens: int) -> bool:  # noqa: D102
        fits = super().extend(request, tokens)
        self._cover(request.row)
        return fits

    def decode_one(self, request: Live, need: int) -> None:  # noqa: D102
        super().decode_one(request, need)
        if need:
            self._tables[request.row].append(self._spare.pop())

    def leaning(self, request: Live, admitted: dict[int, Live]) -> Iterator[Live]:  # noqa: D102
        heads = self._heads
        for block in heads[request.row][request.computed // self.block_size :]:
            while self._users[block] > 1:
                yield next(r for r in reversed(admitted.values()) if block in heads[r.row])

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        number = request.row
        full = min(self._hashed(request, decoding, planned), request.computed // self.block_size)
        head = self._heads[number]
        for block in head[full:]:
            assert self._users[block] == 1
            self._forget(block)
        del head[full:]
        self._done[number] = full
        self._publish(number, full)

    def table(self, request: int) -> list[int]:  # noqa: D102
        return self._tables[request]

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        self._spare += self._tables.pop(request.row)[len(self._heads[request.row]) :]
        super().close(request, tokens)

    def _cover(self, number: int) -> None:
        """Bring a request's table up to the blocks that it was given."""
        table = self._tables[number]
        while len(table) < self._given[number]:
            table.append(self._spare.pop())

    def _name(self, number: int, index: int) -> int:
        return self._tables[number][index]

    def _drop(self, block: int) -> None:
        self._spare.append(block)

    def _started(self, starting: dict[int, Live]) -> None:
        for number in starting:
            self._tables[number].append(self._spare.pop())
