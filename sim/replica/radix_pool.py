"""The KV pool whose prefixes lie in a radix tree, as SGLang has them: locks, and eviction by least recent whole nodes.

Source: SGLang 0.5.23, `python/sglang/srt/mem_cache/unified_radix_cache` and, for 0.5.17, `radix_cache.py`;
`tests/ledger.py` holds it to both.

A trace has no token ids. `Identity.streams` says which stream each token of a request is on, and two tokens are equal
if they are at the same place of the same stream. So to compare two prefixes costs O(streams), not O(tokens).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping
from heapq import heappop, heappush, heapreplace
from typing import Protocol

from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.decode_group import NOBODY_ELSE, Decodes
from chairlift.sim.replica.request import Live

Streams = tuple[tuple[int, ...], tuple[int, ...]]  # stream, and where it stops, from one token to the next
_TICK = 1 << 20  # of the tree's clock: nodes that a path can have


class Contents(Protocol):
    """What is known of requests' tokens."""

    def streams(self, request: int) -> Streams:
        """The streams of a request's tokens, prompt and answer, and where each stops."""


class Node:
    """A node of the tree: the tokens from its parent's ``stop`` to its own, which lie on ``streams``."""

    __slots__ = ("children", "head", "locks", "pages", "parent", "queued", "start", "stop", "streams", "time")

    def __init__(self, streams: Streams, start: int, stop: int, parent: Node | None, head: Hashable, time: int) -> None:
        self.streams = streams
        self.start = start
        self.stop = stop
        self.parent = parent
        self.head = head  # what its first page is: its key among its parent's children
        self.time = time
        self.locks = 0  # running requests whose prefix ends here or below
        self.children: dict[Hashable, Node] = {}
        self.queued = False  # whether the queue of leaves has it
        self.pages: list[int] = []  # their numbers, where the pool has numbers for them


def opening(streams: Streams, at: int, tokens: int) -> Hashable:
    """Equal for two requests if their ``tokens`` tokens from ``at`` on are equal."""
    names, stops = streams
    end = at + tokens
    i = 0 if at < stops[0] else bisect_right(stops, at)
    if stops[i] >= end:
        return names[i]
    parts = []
    while stops[i] < end:
        parts.append((names[i], stops[i]))
        i += 1
    return (*parts, (names[i], end))


def agree(a: Streams, b: Streams, at: int, end: int) -> int:
    """Up to where two requests that agree before ``at`` go on to do so, ``end`` at most."""
    if a is b:
        return end
    (names, stops), (others, bounds) = a, b
    i, j = bisect_right(stops, at), bisect_right(bounds, at)
    while at < end:
        if names[i] != others[j]:
            return at
        at = min(stops[i], bounds[j])
        i += stops[i] == at
        j += bounds[j] == at
    return end


class RadixPool(CountingPool):
    """``total`` pages of ``block_size`` tokens; a request holds some for itself, and locks a path of the tree.

    ``free`` counts the pages that nobody holds, of which ``cached`` lie in the tree. A page leaves the tree only when
    the pages that are neither are too few (`evict`). A request's prompt enters the tree when it is computed
    (`landed`); all that it has computed, its answer too, when it is done.

    In three steps, with pages of one token: A, of 10 tokens, is computed and enters the tree, locked: nothing is
    cached. A ends with an answer of 5: 14 tokens lie in the tree, in two nodes, and 14 pages are free and cached. B
    comes with A's prompt and 3 tokens more: it finds 10 tokens, locks the first node, and takes 3 pages.

    With ``unified`` a prompt ends a node, and of a path that is used its end counts as used last; so SGLang does it
    since it has `UnifiedRadixCache`.

    With ``numbered`` each page has a number, for steps that really run. Tables are filled when they are asked for: by
    then a plan has evicted what it needs.
    """

    __slots__ = (
        *("_contents", "_dropping", "_found", "_leaves", "_locked", "_owned", "_pushes", "_root", "_spare"),
        *("_own", "_streams", "_tables", "_time", "_unified", "cached"),
    )

    def __init__(
        self, total: int, block_size: int, contents: Contents, unified: bool = True, numbered: bool = False
    ) -> None:
        super().__init__(total, block_size)
        self.tracks = self.keeps = True
        self.follows = numbered
        self._tables: dict[int, list[int]] | None = {} if numbered else None  # request → its pages
        self._spare = list(range(total)) if numbered else []  # pages that nobody holds and that are not cached
        self._own = 0  # pages of all requests, those of the tree for each that locks them
        self.cached = 0  # pages of the tree that nobody holds
        self._contents = contents
        self._unified = unified
        self._streams: dict[int, Streams] = {}  # of the requests that wait or run
        self._owned: dict[int, int] = {}  # request → pages of its table that lie in the tree
        self._locked: dict[int, Node] = {}  # request → the node where they end
        self._dropping = False  # whether the request that gives its pages back lets nobody have them
        self._found: tuple[int, bool, Node, int] | None = None  # the latest look-up: request, whole, node, tokens
        self._time = 0
        self._root = Node(((), ()), 0, 0, None, None, 0)
        self._root.locks = 1
        self._leaves: list[tuple[int, int, Node]] = []  # unlocked leaves by time, as it was; and stale entries
        self._pushes = 0

    @property
    def spared(self) -> int:  # noqa: D102 - documented in `CountingPool`, as all below
        return self._own - (self.total - self.free)

    def hit(self, request: Live) -> int:  # noqa: D102
        found = self._look_up(request, False)
        return max(request.loaded, found[3])

    def need(self, request: Live, tokens: int, in_chunks: bool = False) -> int:  # noqa: D102
        _, _, node, hit = self._look_up(request, False)
        pages = -(-tokens // self.block_size) - hit // self.block_size
        walk: Node | None = node
        while walk is not None and walk.locks == 0:
            pages += (walk.stop - walk.start) // self.block_size
            walk = walk.parent
        return pages

    def prefix(self, request: Live) -> Node:  # noqa: D102
        return self._look_up(request, True)[2]

    def opening(self, request: Live, tokens: int) -> Hashable:  # noqa: D102
        return opening(self._streams_of(request.row), 0, tokens)

    def open(self, request: Live, tokens: int) -> None:  # noqa: D102
        _, _, node, hit = self._look_up(request, False)
        number = request.row
        self._given[number] = pages = -(-tokens // self.block_size)
        self._own += pages
        self._owned[number] = owned = hit // self.block_size
        self._locked[number] = node
        self._lock(node)
        self.free -= pages - owned
        if self._tables is not None:
            self._tables[number] = self._path(node)
            self._streams[number] = self._contents.streams(number)

    def extend(self, request: Live, tokens: int) -> bool:  # noqa: D102
        free = self.free
        fits = super().extend(request, tokens)
        self._own += free - self.free
        return fits

    def decode_one(self, request: Live, need: int) -> None:  # noqa: D102
        self.evict(need)
        self.free -= need
        self._own += need
        self._given[request.row] += need

    def decode_all(self, group: Decodes, steps: range, fresh: Mapping[int, Live] = NOBODY_ELSE) -> None:
        """The group does these steps; there is room. Before each a page for every member is neither held nor cached."""
        members = group.live
        done, last = steps.start, steps.stop
        taken = group.blocks_needed(done) if done else 0
        while done < last:
            spare = self.free - self.cached - members
            if spare < 0 and self.cached:
                self.evict(members)
                spare = self.free - self.cached - members
            upto = last if spare < 0 else min(last, group.steps_within(last, spare + taken) + 1)
            need = group.blocks_needed(upto)
            self.free -= need - taken
            self._own += need - taken
            done, taken = upto, need
        if group.members is not None:
            for step in range(group.steps + steps.start, group.steps + last):
                for request in group.members[-step % self.block_size]:
                    self._given[request] += 1

    def landed(self, request: Live) -> bool:  # noqa: D102
        return self._store(request, request.computed)

    def table(self, request: int) -> list[int] | None:  # noqa: D102
        if self._tables is None:
            return None
        table = self._tables[request]
        more = self._given[request] - len(table)
        if more > 0:
            table += self._spare[-more:]
            del self._spare[-more:]
        return table

    def evict(self, blocks: int) -> None:  # noqa: D102
        leaves, size = self._leaves, self.block_size
        while self.free - self.cached < blocks and leaves:
            time, _, node = leaves[0]
            if node.locks or node.children:
                heappop(leaves)
                node.queued = False
            elif node.time != time:
                self._pushes += 1
                heapreplace(leaves, (node.time, self._pushes, node))
            else:
                heappop(leaves)
                parent = node.parent
                assert parent is not None
                del parent.children[node.head]
                self.cached -= (node.stop - node.start) // size
                self._spare += node.pages
                self._found = None
                if not (parent.locks or parent.children):
                    self._enqueue(parent)

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        self._dropping = True

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        number = request.row
        dropped, self._dropping = self._dropping, False
        if not dropped:
            self._store(request, tokens, done=True)
        del self._given[number]
        owned = self._owned.pop(number)
        pages = -(-tokens // self.block_size)
        self._own -= pages
        self.free += pages - owned
        self._unlock(self._locked.pop(number))
        if self._tables is not None:
            self._spare += self._tables.pop(number)[owned:]
        if not dropped:
            del self._streams[number]

    # the tree

    def _streams_of(self, number: int) -> Streams:
        streams = self._streams.get(number)
        if streams is None:
            streams = self._contents.streams(number)
            if self._tables is None:  # else what is known of them may change until they start
                self._streams[number] = streams
        return streams

    def _look_up(self, request: Live, whole: bool) -> tuple[int, bool, Node, int]:
        """Where a waiting request's known tokens leave the tree; but for ``whole`` the last one is computed anyhow."""
        found = self._found
        if found is None or found[0] != request.row or found[1] is not whole or self._tables is not None:
            known = request.prompt + request.produced
            node = self._match(self._streams_of(request.row), known if whole else known - 1)
            self._found = found = (request.row, whole, node, node.stop)
        return found

    def _match(self, streams: Streams, tokens: int) -> Node:
        """The longest path of whole pages that the first ``tokens`` tokens go; it becomes the latest used."""
        size, node, at = self.block_size, self._root, 0
        end = tokens // size * size
        if end <= 0:
            return node
        self._time = now = self._time + _TICK
        while at < end:
            child = node.children.get(opening(streams, at, size))
            if child is None:
                break
            at = agree(child.streams, streams, at, min(child.stop, end)) // size * size
            if not self._unified:
                child.time = now
            if at < child.stop:
                node = self._split(child, at)
                break
            node = child
        if self._unified:
            self._time = now = self._time + _TICK
            walk: Node | None = node
            while walk is not None:
                walk.time = now
                now -= 1
                walk = walk.parent
        return node

    def _insert(self, streams: Streams, end: int) -> tuple[int, Node]:
        """Put the first ``end`` tokens, whole pages, into the tree: how many were there, and the last node."""
        size, node, at = self.block_size, self._root, 0
        self._time = now = self._time + _TICK
        while at < end:
            head = opening(streams, at, size)
            child = node.children.get(head)
            if child is None:
                break
            if self._unified:
                self._time = now = self._time + _TICK
            child.time = now
            at = agree(child.streams, streams, at, min(child.stop, end)) // size * size
            node = self._split(child, at) if at < child.stop else child
        found = at
        if at < end:
            self._time += _TICK
            leaf = node.children[head] = Node(streams, at, end, node, head, self._time)
            self.cached += (end - at) // size
            self.free += (end - at) // size
            self._enqueue(leaf)
            node = leaf
        return found, node

    def _split(self, node: Node, at: int) -> Node:
        """End a node at ``at``; the rest of it follows. The node that ends there."""
        parent = node.parent
        assert parent is not None
        self._time += _TICK
        top = Node(node.streams, node.start, at, parent, node.head, self._time)
        top.locks = node.locks
        parent.children[node.head] = top  # in the same place among the others
        node.head = opening(node.streams, at, self.block_size)
        node.start, node.parent = at, top
        top.children[node.head] = node
        if node.pages:
            pages = (at - top.start) // self.block_size
            top.pages, node.pages = node.pages[:pages], node.pages[pages:]
        if self._unified:
            self._time += _TICK
            node.time = self._time
        return top

    def _path(self, node: Node) -> list[int]:
        """The pages from the root to a node."""
        parts = []
        walk: Node | None = node
        while walk is not None:
            parts.append(walk.pages)
            walk = walk.parent
        return [page for part in reversed(parts) for page in part]

    def _store(self, request: Live, tokens: int, done: bool = False) -> bool:
        """Put what a request has computed into the tree: it then holds a lock on it instead of the pages.

        Whether some of its pages are others now: two had computed the same.
        """
        number, size = request.row, self.block_size
        streams = self._streams_of(number)
        end = min(tokens, request.prompt + request.emitted) // size * size
        found, node = self._insert(streams, end)
        pages, owned, before = end // size, self._owned[number], found // size
        table = self.table(number)
        if table is not None:
            if before > owned:
                self._spare += table[owned:before]
                found_there = node if before == pages else node.parent
                assert found_there is not None
                table[:before] = self._path(found_there)
            if before < pages:
                node.pages = table[before:pages]
        if self._unified:
            prompt = request.prompt // size * size
            if 0 < prompt < end:
                self._insert(streams, prompt)  # a node ends where the answer begins
        elif not done:
            self._match(streams, end)
        self.free += max(0, before - owned)  # they were computed twice
        self._owned[number] = pages
        last = self._locked[number]
        self._locked[number] = node
        self._lock(node)
        self._unlock(last)
        self._found = None
        return before > owned

    def _lock(self, node: Node) -> None:
        size = self.block_size
        walk: Node | None = node
        while walk is not None and walk is not self._root:
            if walk.locks == 0:
                pages = (walk.stop - walk.start) // size
                self.cached -= pages
                self.free -= pages
            walk.locks += 1
            walk = walk.parent

    def _unlock(self, node: Node) -> None:
        size = self.block_size
        walk: Node | None = node
        while walk is not None and walk is not self._root:
            walk.locks -= 1
            if walk.locks == 0:
                pages = (walk.stop - walk.start) // size
                self.cached += pages
                self.free += pages
                if not walk.children:
                    self._enqueue(walk)
            walk = walk.parent

    def _enqueue(self, node: Node) -> None:
        if not node.queued and node is not self._root:
            node.queued = True
            self._pushes += 1
            heappush(self._leaves, (node.time, self._pushes, node))
