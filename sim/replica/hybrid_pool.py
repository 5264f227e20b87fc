"""The KV pool of a model whose layers look back differently far, as vLLM's hybrid memory manager keeps it.

Source: vLLM 0.33.0 and 0.26.0, `vllm/v1/core/kv_cache_coordinator.py`, `single_type_kv_cache_manager.py`,
`kv_cache_manager.py` and `block_pool.py`; `tests/ledger.py` holds it to both.

The layers form groups of equally many, each with the same window or without one. A block holds ``block_size`` tokens of
the layers of one group, so a request has a table of blocks for each group. All groups draw on one queue of free blocks.
In a group with a window a request gives back the blocks that have slid out of it. In three steps, with blocks of 4
tokens, a window of 4, and one group with it and one without:

1. A prompt of 8 tokens is computed: two blocks in each group.
2. Token 8, the next, looks back on tokens 5 to 8. Before it opens a block in each group, the block with the window that
   holds tokens 0 to 3 goes back: the request then holds three blocks and two.
3. Tokens 9 to 11 need no block; token 11 looks back on tokens 8 to 11, so tokens 4 to 7 go back before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chairlift.policies.base import HybridCache, KvGroups
from chairlift.sim.replica.counting_pool import CountingPool, PrefixCacheMatters
from chairlift.sim.replica.decode_group import NOBODY_ELSE, Decodes, admission
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import Growth


class _Found(NamedTuple):
    """What a waiting request finds."""

    request: int
    tables: list[list[int]]  # of each group, the blocks that it would hold; none where they are counted
    hits: int  # leading blocks that need no computing, those that have slid out included
    gone: int  # leading blocks that have slid out
    free: int  # of those in ``tables``, the ones that nobody holds
    junction: int  # tokens that the groups without a window know of it, if those with one know fewer; else 0


class _Held:
    """The blocks of a running request."""

    __slots__ = ("done", "gone", "kept", "length", "public", "tables")

    def __init__(self, tables: list[list[int]], gone: int, hits: int, length: int, kept: list[range]) -> None:
        self.tables = tables  # of each group, if blocks are not only counted; with a window, all but the first ``gone``
        self.gone = gone
        self.length = length  # blocks in each group, those that are gone included
        self.done = hits  # full blocks of known tokens, as far as the pool was told
        self.public = hits  # of those, the ones whose content others can find
        self.kept = kept  # where blocks with a window are kept for others


class HybridPool(CountingPool):
    """``total`` blocks of ``block_size`` tokens of one group of layers each.

    ``identity``: which blocks hold the same tokens; None without prefix caching. Then it does not matter which block is
    whose, and blocks are only counted. ``max_model_len``: tokens that a request may have. ``late`` and
    ``uncached_first`` are as in `PrefixPool`. A block has a hash once it is full and its tokens are known; with a
    window it must also be one that is kept (`HybridCache.retention`).

    A prefix is found as far as all groups know it: a group without a window must know all of it, one with a window only
    what the next token looks back on. Raises ValueError where chunks are not whole blocks, or no layer looks back
    further.
    """

    __slots__ = (
        *("_cached", "_chunked", "_copies", "_edge", "_found", "_full", "_held", "_identity", "_keys", "_late", "_odd"),
        *("_most", "_own", "_queue", "_retention", "_sliding", "_span", "_stale", "_uncached_first", "_users"),
        "_window",
    )

    def __init__(
        self,
        total: int,
        block_size: int,
        groups: KvGroups,
        cache: HybridCache,
        max_model_len: int,
        late: bool = False,
        uncached_first: bool = True,
        identity: Identity | None = None,
    ) -> None:
        super().__init__(total, block_size)
        self.tracks = self.follows = self.windowed = True
        self.tables = len(groups.windows)
        self._full = [i for i, window in enumerate(groups.windows) if not window]
        self._sliding = [i for i, window in enumerate(groups.windows) if window]
        [window] = {window for window in groups.windows if window}
        chunked = groups.chunked
        if chunked and (window % block_size or not self._full):
            raise ValueError(f"chunks of {window} tokens must be whole blocks, beside layers that look back further")
        self._window, self._chunked = window, chunked
        self._edge = 0 if chunked else (window - 1) % block_size  # a block slides out at so many processed tokens
        self._span = -(-(window - 1) // block_size)  # blocks that the next token looks back on
        self._retention = None if chunked else cache.retention
        self._most = cache.most(groups, block_size, max_model_len)
        self.room = cache.room(groups, total, block_size, max_model_len)
        self._identity = identity
        self._late = late
        self._uncached_first = uncached_first
        self._queue = deque(range(0 if identity is None else total))  # free blocks in the order of their reuse
        self._stale: dict[int, int] = {}  # block that has a key → its first so many entries in the queue count no more
        self._users: dict[int, int] = {}  # such a block → requests that hold it
        self._keys: dict[int, int] = {}  # block → key of its content and group
        self._cached: dict[int, int] = {}  # such a key → the block with that content, the first of several
        self._copies: dict[int, dict[int, None]] = {}  # such a key → the others, in order of caching
        self.publishes = identity is not None and identity.answers_too
        self._own = 0  # blocks in each group of all requests, those that are gone or shared included
        self._held: dict[int, _Held] = {}
        self._odd: dict[int, Live] = {}  # whose blocks slide out in another rhythm than one every ``block_size`` tokens
        self._found: _Found | None = None  # the latest look-up

    @property
    def spared(self) -> int:  # noqa: D102 - documented in `CountingPool`, as all below
        return self._own * self.tables - (self.total - self.free)

    def hit(self, request: Live) -> int:  # noqa: D102
        return max(request.loaded, self._look_up(request).hits * self.block_size)

    def need(self, request: Live, tokens: int, in_chunks: bool = False) -> int:  # noqa: D102
        found = self._look_up(request)
        blocks = with_window = -(-tokens // self.block_size)
        if in_chunks:
            with_window = min(blocks, self._most)
        need = len(self._full) * max(0, blocks - found.hits)
        need += len(self._sliding) * max(0, with_window - max(found.hits, found.gone))
        return need + found.free

    def open(self, request: Live, tokens: int) -> None:  # noqa: D102
        number = request.row
        found = self._look_up(request)
        self._found = None  # its lists are the request's from here on
        users, stale = self._users, self._stale
        for table in found.tables:
            for block in table:
                if not users[block]:
                    stale[block] = stale.get(block, 0) + 1
                users[block] += 1
        self.free -= found.free
        length = -(-tokens // self.block_size)
        kept = [self._kept(request.prompt - 1), self._kept(found.junction)]
        self._held[number] = _Held(found.tables, found.gone, found.hits, length, kept)
        self._own += length
        self._odd[number] = request
        if self._identity is None:
            self.free -= length * self.tables - found.gone * len(self._sliding)
            return
        for i, table in enumerate(found.tables):
            gone = found.gone if i in self._sliding else 0
            table += self._take(length - gone - len(table))

    def extend(self, request: Live, tokens: int) -> bool:  # noqa: D102
        self._odd[request.row] = request
        self.shed(request)
        held = self._held[request.row]
        more = -(-tokens // self.block_size) - held.length
        if more * self.tables > self.free:
            return False
        if more > 0:
            self._grow(held, more)
        return True

    def shed(self, request: Live) -> None:  # noqa: D102
        self._slide(request, request.computed - self._flying(request))

    def decode_one(self, request: Live, need: int) -> None:  # noqa: D102
        if need:
            self._grow(self._held[request.row], 1)
        if self.publishes:
            self.computed(request, request.computed if self._late else request.computed + 1)

    def decode_all(self, group: Decodes, steps: range, fresh: Mapping[int, Live] = NOBODY_ELSE) -> None:  # noqa: D102
        members, odd, size, late, publishes = group.members, self._odd, self.block_size, self._late, self.publishes
        assert members is not None
        for step in range(group.steps + steps.start, group.steps + steps.stop):
            opening = members[-step % size]
            acting = members[(self._edge + late - step) % size] | opening
            begins = late and step == group.steps  # else the step before is in flight, with a token of each
            if begins:
                acting |= fresh
                if self.flight is None or not self.flight.decoding:
                    acting = {number: r for phase in members for number, r in phase.items()}
            if odd:
                acting |= {number: r for number, r in odd.items() if r.group is group}
            for request in sorted(acting.values(), key=admission):
                number, computed = request.row, request.offset + step
                flying = int(late)
                if begins:
                    flying = self._flying(request, number in fresh)
                self._slide(request, computed - flying)
                if flying == late:
                    odd.pop(number, None)
                if number in opening:
                    self._grow(self._held[number], 1)
                    if publishes and late:
                        self.computed(request, computed)
            if publishes and not late:
                for request in members[(-step - 1) % size].values():
                    self.computed(request, request.offset + step + 1)

    def leap(self, group: Decodes, steps: int, within: int) -> Growth:  # noqa: D102
        held, spared = self.total - self.free, self.spared
        sums = [0, 0, 0, 0]
        for step in range(1, steps):
            self.decode_all(group, range(step, step + 1))
            if step < within:
                more, apart = self.total - self.free - held, self.spared - spared
                for i, value in enumerate((more, step * more, apart, step * apart)):
                    sums[i] += value
        return Growth(*sums)

    def lasts(self, group: Decodes, steps: int, taken: int, waits: bool) -> int:
        """As in `CountingPool`; and if a request ``waits``, until the blocks that it lacks could be there.

        They could because others give blocks back, or because less of its prefix is found: one block that is forgotten
        makes a prefix shorter in all groups, and the next chunk then needs fewer blocks. What slides out is counted
        twice: ``low`` leaves out what others may hold as well, ``high`` does not.
        """
        if waits and self._found is not None and self._found.hits:
            return 1
        size, tables, sliding, phases = self.block_size, self.tables, len(self._sliding), group.phases
        low = high = free = self.free  # the first step has taken its blocks
        if not waits and (steps // size + 1) * group.growing * tables <= low:
            return steps
        assert group.members is not None
        for step in range(1, steps):
            clock = group.steps + step
            need = tables * phases[-clock % size]
            low -= need
            high -= need
            if low < 0:
                return step
            out = own = 0
            for request in group.members[(self._edge + self._late - clock) % size].values():
                gone = self._skipped(request.offset + clock - self._late)
                before = self._skipped(request.offset + clock - self._late - size)
                out += gone - before
                if request.row not in self._odd:
                    own += max(0, gone - max(before, self._held[request.row].public))
            if step == 1:
                for request in self._odd.values():
                    if request.group is group:
                        gone = self._skipped(request.offset + clock - self._late)
                        out += max(0, gone - self._held[request.row].gone)
            low += sliding * own
            high += sliding * out
            if waits and high > free:
                return step
        return steps

    def computed(self, request: Live, tokens: int) -> None:  # noqa: D102
        held = self._held[request.row]
        full = tokens // self.block_size
        if full > held.done:
            held.done = full
            if self._identity is not None and (shareable := self._identity.shareable[request.row]):
                self._publish(request.row, held, min(full, shareable))

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        held = self._held[request.row]
        if decoding:
            held.done = max(held.done, (request.computed + planned - self._late) // self.block_size)
        if self._identity is not None:
            self._publish(request.row, held, held.done)

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        held = self._held.pop(request.row)
        self._own -= held.length
        self._odd.pop(request.row, None)
        if self._identity is None:
            self.free += held.length * self.tables - held.gone * len(self._sliding)
            return
        done = max(held.done, (tokens - self._late) // self.block_size)
        kept = self._kept_of(held, held.gone, held.length)
        for i, table in enumerate(held.tables):
            if i in self._sliding:
                self._release(held, held.gone, table, done, kept)
            else:
                self._release(held, 0, table, done)

    def held(self) -> list[int]:
        """Of each group, the blocks that all requests hold together; one that several hold counts for each."""
        full, sliding = (sum(h.length - gone * h.gone for h in self._held.values()) for gone in (0, 1))
        return [sliding if i in self._sliding else full for i in range(self.tables)]

    # the blocks of a request

    def _flying(self, request: Live, joined: bool = False) -> int:
        """Tokens of a running request that are in flight; ``joined``: it has joined its decode group since then."""
        flight = self.flight
        if flight is None:
            return 0
        if request.group is not None and not joined and flight.decoding and request.row not in self._odd:
            return 1
        for other, tokens in flight.chunks:
            if other is request:
                return tokens
        return int(request.group is not None and not joined and flight.decoding)

    def _skipped(self, processed: int) -> int:
        """Leading blocks that no token from number ``processed`` on looks back on, with a window."""
        if self._chunked:
            return processed // self._window * (self._window // self.block_size)
        return max(0, processed - self._window + 1) // self.block_size

    def _slide(self, request: Live, processed: int) -> None:
        """Give back what slides out of the windows once ``processed`` tokens are."""
        held = self._held[request.row]
        gone = min(self._skipped(processed), held.length)
        count = gone - held.gone
        if count <= 0:
            return
        if self._identity is None:
            self.free += count * len(self._sliding)
            held.gone = gone
            return
        kept = self._kept_of(held, held.gone, gone)
        if kept is None or kept:
            self._publish(request.row, held, gone)
        for i in self._sliding:
            table = held.tables[i]
            out = table[:count]
            del table[:count]
            self._release(held, held.gone, out, gone, kept)
        held.gone = gone

    def _grow(self, held: _Held, blocks: int) -> None:
        """Take ``blocks`` more in each group."""
        if self._identity is None:
            self.free -= blocks * self.tables
        else:
            for table in held.tables:
                table += self._take(blocks)
        held.length += blocks
        self._own += blocks

    def _kept(self, tokens: int) -> range:
        """The blocks that a request which knows ``tokens`` tokens looks back on."""
        end = tokens // self.block_size
        return range(max(0, end - self._span), end)

    def _kept_of(self, held: _Held, first: int, end: int) -> set[int] | None:
        """Of the blocks ``first`` to ``end - 1`` with a window, those that others can find once full; None: all."""
        if self._retention is None:
            return None
        found = {i for each in held.kept for i in range(max(first, each.start), min(end, each.stop))}
        if every := self._retention // self.block_size:
            found.update(i for i in range(first, end) if i % every >= every - self._span)
        return found

    # all blocks

    def _take(self, count: int) -> list[int]:
        """The first ``count`` blocks of the queue, which nobody finds from here on."""
        queue, stale, keys = self._queue, self._stale, self._keys
        taken: list[int] = []
        while len(taken) < count:
            block = queue.popleft()
            if block in keys:
                if block in stale:
                    stale[block] -= 1
                    if not stale[block]:
                        del stale[block]
                    continue
                self._forget(block)
            taken.append(block)
        self.free -= count
        return taken

    def _release(self, held: _Held, first: int, blocks: list[int], done: int, kept: set[int] | None = None) -> None:
        """A request gives back these blocks of a group, number ``first`` and after, of which ``done`` in all are full.

        ``kept``: of those, the ones that others can find; None: all of them.
        """
        public = held.public if kept is None else max([held.public, *(i + 1 for i in kept)])
        split = min(max(0, public - first), len(blocks))  # from here on, all blocks are this request's alone
        full = split
        if kept is None:
            full = min(max(split, done - first), len(blocks))
        plain, hashed = blocks[full:], blocks[split:full]
        plain.reverse()  # a sequence's tail is reused before its head
        hashed.reverse()
        users = self._users
        for index in range(first + split - 1, first - 1, -1):
            block = blocks[index - first]
            if block in users:
                users[block] -= 1
                if not users[block]:
                    hashed.append(block)
            elif index < done and (kept is None or index in kept):
                hashed.append(block)
            else:
                plain.append(block)
        self.free += len(plain) + len(hashed)
        if self._uncached_first:
            plain.reverse()
            self._queue.extendleft(plain)
        else:
            self._queue.extend(plain)
        self._queue.extend(hashed)
        self._found = None

    def _publish(self, number: int, held: _Held, upto: int) -> None:
        """Let the first ``upto`` blocks of a request be found from here on, those that are kept."""
        public = held.public
        if upto <= public or self._identity is None:
            return
        held.public = upto
        keys, cached, tables = self._keys, self._cached, self.tables
        kept = self._kept_of(held, public, upto)
        for index, content in enumerate(self._identity.keys(number, public, upto), public):
            for i, table in enumerate(held.tables):
                at = index
                if i in self._sliding:
                    at -= held.gone
                    if at < 0 or not (kept is None or index in kept):
                        continue
                block, key = table[at], content * tables + i
                keys[block], self._users[block] = key, 1
                if key in cached:
                    self._copies.setdefault(key, {})[block] = None
                else:
                    cached[key] = block
        self._found = None

    def _forget(self, block: int) -> None:
        """Nobody can find ``block`` from here on."""
        self._found = None
        del self._users[block]
        key = self._keys.pop(block)
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

    # what a waiting request finds

    def _look_up(self, request: Live) -> _Found:
        found = self._found
        if found is not None and found.request == request.row:
            return found
        number, size, tables = request.row, self.block_size, self.tables
        keys = self._keys_of(request)
        hits = known = self._run(keys, self._full) if self._full else len(keys)
        if self._chunked:
            begin = self._skipped(hits * size)
            hits = begin + self._run(keys[begin:hits], self._sliding)
        else:
            hits = self._latest(keys[:hits])
        gone = self._skipped(max(request.loaded, hits * size))
        cached = self._cached
        blocks = []
        for i in range(tables):
            first = gone if i in self._sliding else 0
            blocks.append([cached[key * tables + i] for key in keys[first:hits]])
        free = sum(not self._users[block] for table in blocks for block in table)
        junction = known * size if self._full and known > hits else 0
        self._found = found = _Found(number, blocks, hits, gone, free, junction)
        return found

    def _keys_of(self, request: Live) -> Sequence[int]:
        """Of the full blocks that a waiting request could find; the last known token is computed in any case."""
        if self._identity is None:
            return ()
        full = (request.prompt + request.produced - 1) // self.block_size
        if not request.lost:
            full = min(full, self._identity.shareable[request.row])
        return self._identity.keys(request.row, 0, full) if full else ()

    def _run(self, keys: Sequence[int], groups: Sequence[int]) -> int:
        """How many leading ``keys`` all of the groups know."""
        for count, key in enumerate(keys):
            if not self._known(key, groups):
                return count
        return len(keys)

    def _latest(self, keys: Sequence[int]) -> int:
        """Up to where groups with windows know all that is looked back on; or what they know from block 0 on."""
        run = 0
        for index in range(len(keys) - 1, -1, -1):
            if self._known(keys[index], self._sliding):
                run += 1
                if run >= self._span:
                    return index + run
            else:
                run = 0
        return run

    def _known(self, key: int, groups: Sequence[int]) -> bool:
        first = key * self.tables
        return all(first + i in self._cached for i in groups)


class DraftedHybridPool(HybridPool):
    """The same where drafts are verified: told what is known, it publishes nothing beyond that (`DraftedPool`).

    What slides out is told by the tokens that are processed: those in flight, drafts among them, are not.
    ``stands_in``: without a prefix cache in place of one with it, as `HybridStandIn`.
    """

    __slots__ = ("_stands_in", "under_way")

    def __init__(
        self,
        total: int,
        block_size: int,
        groups: KvGroups,
        cache: HybridCache,
        max_model_len: int,
        late: bool = False,
        uncached_first: bool = True,
        identity: Identity | None = None,
        stands_in: bool = False,
    ) -> None:
        super().__init__(total, block_size, groups, cache, max_model_len, late, uncached_first, identity)
        self._stands_in = stands_in
        self.under_way: dict[int, int] = {}  # request → its tokens in flight

    def lacks(self, request: Live, tokens: int) -> int:  # noqa: D102
        return self.tables * max(0, -(-tokens // self.block_size) - self._held[request.row].length)

    def computed(self, request: Live, tokens: int) -> None:  # noqa: D102
        ahead = 0 if self._identity is None else self._identity.ahead
        super().computed(request, min(tokens, request.prompt + request.produced - ahead))

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        super().close(request, 0)

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        if self._stands_in:
            raise PrefixCacheMatters
        super().preempted(request, False, planned)

    def _flying(self, request: Live, joined: bool = False) -> int:
        return self.under_way.get(request.row, 0)


class HybridStandIn(HybridPool):
    """Without a prefix cache in place of one with it, for as long as that cannot matter (`StandInPool`)."""

    __slots__ = ()

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102 - as above
        raise PrefixCacheMatters
