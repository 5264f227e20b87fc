"""The KV pool that knows each block: a hash chain over full blocks, reference counts, and LRU reuse, as in vLLM V1.

Source: vLLM 0.23.0, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`; `tests/ledger.py` holds it to that.
The null block is not here: of vLLM's ``num_gpu_blocks`` one is never usable.

A trace has no token ids. What two blocks need to be equal, they and all before them, is told from what a trace does
say: ids of its own (Mooncake), a shared prefix of a group, or a session whose next prompt begins with the last one
and its answer. Every other block is its request's own, found again only by itself after a preemption.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from policies.base import Request
from sim.kv import CountingPool, Decodes, admission
from sim.trace import Trace

OWN, GROUP, SESSION, HASHED = range(4)
INDEX_BITS = 24  # blocks a request can have


class Identity:
    """Which blocks of a trace's requests are equal: `key` gives equal ones, in equal places, the same integer."""

    def __init__(self, trace: Trace, block_size: int) -> None:
        self._size = block_size
        n = len(trace)
        self._prompt: list[int] = trace.prompt_tokens.tolist()
        self._group: list[int] = [-1] * n if trace.prefix_group is None else trace.prefix_group.tolist()
        self._shared: list[int] = [0] * n if trace.prefix_tokens is None else trace.prefix_tokens.tolist()
        self._stream = _streams(trace)
        self._hash_block = trace.hash_block
        self._hashes: list[int] = []
        self._offsets: list[int] | None = None
        if trace.hash_ids is not None:
            self._hashes = trace.hash_ids.values.tolist()
            self._offsets = trace.hash_ids.offsets.tolist()

    @staticmethod
    def shares(trace: Trace) -> bool:
        """Whether any two requests of ``trace`` can have a block in common."""
        if trace.hash_ids is not None and len(np.unique(trace.hash_ids.values)) < len(trace.hash_ids.values):
            return True
        if trace.prefix_group is not None and _repeats(trace.prefix_group):
            return True
        return trace.session is not None and _repeats(trace.session)

    def key(self, request: int, block: int) -> int:
        """An integer for block number ``block`` (from 0, full) of a request, its row in the trace."""
        end = (block + 1) * self._size
        if self._offsets is not None and end <= self._prompt[request]:
            at = self._offsets[request] + (end - 1) // self._hash_block
            if at < self._offsets[request + 1]:  # an id stands for all before it too
                return (self._hashes[at] << INDEX_BITS | block) << 2 | HASHED
        if self._stream is not None and self._stream[request] >= 0:
            return (self._stream[request] << INDEX_BITS | block) << 2 | SESSION
        if end <= self._shared[request] and self._group[request] >= 0:
            return (self._group[request] << INDEX_BITS | block) << 2 | GROUP
        return (request << INDEX_BITS | block) << 2 | OWN


class PrefixPool(CountingPool):
    """``total`` blocks, each with its content's key, its users, and its place in the queue of free blocks.

    ``late``: asynchronous scheduling knows the token of a step one step later, so a block that decoding fills can be
    found from the next step on.
    """

    tracks = True

    __slots__ = ("_cached", "_done", "_found", "_identity", "_key", "_late", "_queue", "_tables", "_users")

    def __init__(self, total: int, block_size: int, identity: Identity, late: bool = False) -> None:
        super().__init__(total, block_size)
        self._identity = identity
        self._late = late
        self._queue = OrderedDict.fromkeys(range(total))  # free blocks, the next to be reused first
        self._users = [0] * total
        self._key = [-1] * total  # of a block's content, if it can be found
        self._cached: dict[int, int | dict[int, None]] = {}  # key → the block, or blocks in order of caching
        self._tables: dict[int, list[int]] = {}  # request → its blocks
        self._done: dict[int, int] = {}  # request → how many of them can be found, or once could
        self._found: tuple[int, list[int], int] | None = None  # the latest look-up: request, blocks, how many are free

    def hit(self, request: Request) -> int:  # noqa: D102 - documented in `CountingPool`, as all below
        return len(self._look_up(request)[1]) * self.block_size

    def need(self, request: Request, tokens: int) -> int:  # noqa: D102
        _, blocks, free = self._look_up(request)
        return -(-tokens // self.block_size) - len(blocks) + free

    def open(self, request: Request, tokens: int) -> None:  # noqa: D102
        blocks = self._look_up(request)[1]
        users, queue = self._users, self._queue
        for block in blocks:
            if users[block] == 0:
                del queue[block]
                self.free -= 1
            users[block] += 1
        self._tables[request.id] = blocks
        self._done[request.id] = len(blocks)
        request._blocks = -(-tokens // self.block_size)
        self._take(blocks, request._blocks - len(blocks))

    def extend(self, request: Request, tokens: int) -> bool:  # noqa: D102
        more = -(-tokens // self.block_size) - request._blocks
        if more > self.free:
            return False
        if more > 0:
            self._take(self._tables[request.id], more)
            request._blocks += more
        return True

    def decode_one(self, request: Request, need: int) -> None:  # noqa: D102
        computed = request.computed
        if need:
            self._take(self._tables[request.id], 1)
        self.computed(request, computed if self._late else computed + 1)

    def decode_all(self, group: Decodes, steps: range) -> None:  # noqa: D102
        members = group.members
        assert members is not None
        size = self.block_size
        late = self._late
        tables = self._tables
        for step in range(group.steps + steps.start, group.steps + steps.stop):
            starting = members[-step % size]  # their next token opens a block
            if starting:
                order = sorted(starting.values(), key=admission) if len(starting) > 1 else starting.values()
                for request in order:
                    self._take(tables[request.id], 1)
                    if late:
                        self.computed(request, request._offset + step)
            if not late:
                filling = members[(-step - 1) % size]  # their next token fills one
                for request in filling.values():
                    self.computed(request, request._offset + step + 1)

    def computed(self, request: Request, tokens: int) -> None:  # noqa: D102
        full = tokens // self.block_size
        done = self._done[request.id]
        if full <= done:
            return
        table, keys, cached = self._tables[request.id], self._key, self._cached
        key_of, number = self._identity.key, request.id
        for index in range(done, full):
            block, key = table[index], key_of(number, index)
            keys[block] = key
            others = cached.get(key)
            if others is None:
                cached[key] = block
            elif isinstance(others, dict):
                others[block] = None
            else:
                cached[key] = {others: None, block: None}
        self._done[request.id] = full
        self._found = None

    def close(self, request: Request, blocks: int) -> None:  # noqa: D102
        users, queue = self._users, self._queue
        for block in reversed(self._tables.pop(request.id)):  # so that a sequence's tail is reused before its head
            users[block] -= 1
            if users[block] == 0:
                queue[block] = None
                self.free += 1
        del self._done[request.id]
        request._blocks = 0
        self._found = None

    def _look_up(self, request: Request) -> tuple[int, list[int], int]:
        """The blocks that hold a waiting request's leading tokens; the last known token is computed in any case."""
        found = self._found
        if found is not None and found[0] == request.id:
            return found
        blocks: list[int] = []
        free = 0
        cached, key_of, number, users = self._cached, self._identity.key, request.id, self._users
        for index in range((request.prompt_tokens + request._emitted - 1) // self.block_size):
            block = cached.get(key_of(number, index))
            if block is None:
                break
            if isinstance(block, dict):
                block = next(iter(block))
            blocks.append(block)
            if users[block] == 0:
                free += 1
        self._found = found = (request.id, blocks, free)
        return found

    def _take(self, table: list[int], count: int) -> None:
        """Move ``count`` blocks from the head of the queue to ``table``; what they held is forgotten."""
        queue, keys, cached = self._queue, self._key, self._cached
        for _ in range(count):
            block, _nothing = queue.popitem(last=False)
            key = keys[block]
            if key >= 0:
                keys[block] = -1
                others = cached[key]
                if isinstance(others, dict):
                    del others[block]
                    if not others:
                        del cached[key]
                else:
                    del cached[key]
            self._users[block] = 1
            table.append(block)
        self.free -= count
        self._found = None


def _repeats(column: np.ndarray[tuple[int], np.dtype[np.signedinteger]]) -> bool:
    given = column[column >= 0]
    return len(np.unique(given)) < len(given)


def _streams(trace: Trace) -> list[int] | None:
    """For each request the number of the token stream it continues, -1 without a session.

    A turn continues its session's stream if its prompt is at least as long as the last prompt and answer together;
    else the session has dropped some of its context and starts a new one.
    """
    if trace.session is None:
        return None
    latest: dict[int, tuple[int, int]] = {}  # session → its stream and the tokens in it
    streams = []
    count = 0
    for session, prompt, output in zip(
        trace.session.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True
    ):
        if session < 0:
            streams.append(-1)
            continue
        stream, length = latest.get(session, (-1, 0))
        if stream < 0 or prompt < length:
            stream = count
            count += 1
        latest[session] = (stream, prompt + output)
        streams.append(stream)
    return streams
