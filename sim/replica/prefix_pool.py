"""The KV pool that knows each block: a hash chain over full blocks, reference counts, and LRU reuse, as in vLLM V1.

Source: vLLM 0.23.0, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`; `tests/ledger.py` holds it to that.
The null block is not here: of vLLM's ``num_gpu_blocks`` one is never usable.

A trace has no token ids. What two blocks need to be equal, they and all before them, is told from what a trace does
say: ids of its own (Mooncake), a shared prefix of a group, or a session whose next prompt begins with the last one
and its answer. Every other block is its request's own, found again only by itself after a preemption.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from chairlift.policies.base import FOREVER
from chairlift.sim.replica.counting_pool import CountingPool, Decodes, admission
from chairlift.sim.replica.request import Live
from chairlift.sim.workload.trace import Trace

OWN, GROUP, SESSION, HASHED = range(4)
INDEX_BITS = 24  # blocks a request can have


class Identity:
    """Which blocks of a trace's requests are equal: `key` gives equal ones, in equal places, the same integer.

    The blocks that another request can have too come first in a request; ``shareable[i]`` counts those of row i.
    """

    def __init__(self, trace: Trace, block_size: int) -> None:
        self.block_size = block_size
        n = len(trace)
        self._group: list[int] = [-1] * n if trace.prefix_group is None else trace.prefix_group.tolist()
        self._stream = _streams(trace)
        self._hash_block = trace.hash_block
        self._hashes: list[int] = []
        self._offsets: list[int] = [0] * (n + 1)
        shareable = np.zeros(n, dtype=np.int64)
        if trace.prefix_group is not None and trace.prefix_tokens is not None:
            shareable = np.where(trace.prefix_group >= 0, trace.prefix_tokens, 0) // block_size
        self._hashed: list[int] = [0] * n  # leading blocks that an id of the trace names
        if trace.hash_ids is not None:
            self._hashes = trace.hash_ids.values.tolist()
            self._offsets = trace.hash_ids.offsets.tolist()
            covered = np.minimum(np.diff(trace.hash_ids.offsets) * trace.hash_block, trace.prompt_tokens) // block_size
            self._hashed = covered.tolist()
            shareable = np.maximum(shareable, covered)
        if self._stream is not None:
            shareable = np.where(np.array(self._stream) >= 0, 1 << INDEX_BITS, shareable)
        self.shareable: list[int] = shareable.tolist()

    @property
    def answers_too(self) -> bool:
        """Whether blocks with generated tokens can be shared: only sessions do so."""
        return self._stream is not None

    def streams(self, request: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A request's tokens, prompt and answer, as streams and where each stops: as (1, 2), (512, 4096).

        Two requests have the same token at a place if they are on the same stream there. The last stream has no end.
        """
        size = self.block_size
        streams, stops = [], []
        named = self._hashed[request] * size
        for at in range(0, named, self._hash_block):
            streams.append(self._hashes[self._offsets[request] + at // self._hash_block] << 2 | HASHED)
            stops.append(min(at + self._hash_block, named))
        shared = self.shareable[request] * size
        if shared > named:
            stream = -1 if self._stream is None else self._stream[request]
            streams.append(stream << 2 | SESSION if stream >= 0 else self._group[request] << 2 | GROUP)
            stops.append(shared)
        streams.append(request << 2 | OWN)
        stops.append(FOREVER)
        return tuple(streams), tuple(stops)

    @staticmethod
    def shares(trace: Trace) -> bool:
        """Whether any two requests of ``trace`` can have a block in common."""
        if trace.hash_ids is not None and len(np.unique(trace.hash_ids.values)) < len(trace.hash_ids.values):
            return True
        if trace.prefix_group is not None and _repeats(trace.prefix_group):
            return True
        return trace.session is not None and _repeats(trace.session)

    def tokens(self, request: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Numbers for the first ``count`` tokens of a request: equal in two requests where their blocks' keys are."""
        size = self.block_size
        keys = np.array([self.key(request, block) for block in range(-(-count // size))], dtype=np.uint64)
        each = (np.repeat(keys, size)[:count] << np.uint64(8)) + np.arange(count, dtype=np.uint64) % np.uint64(size)
        each = (each ^ (each >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's mixing (Steele 2014)
        each = (each ^ (each >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers: np.ndarray[tuple[int], np.dtype[np.int64]] = (each >> np.uint64(1)).astype(np.int64)
        return numbers

    def named(self, request: int) -> int:
        """Leading tokens of a request whose blocks ids of the trace name."""
        return self._hashed[request] * self.block_size

    def earlier_turns(self) -> dict[int, list[int]]:
        """For each request whose prompt repeats earlier ones of its session and their answers: those, in order."""
        found: dict[int, list[int]] = {}
        latest: dict[int, int] = {}  # stream → its latest request
        for request, stream in enumerate(self._stream or ()):
            if stream >= 0:
                if (before := latest.get(stream)) is not None:
                    found[request] = [*found.get(before, ()), before]
                latest[stream] = request
        return found

    def share(self, request: int, blocks: int) -> None:
        """Let others have only the first ``blocks`` blocks of a request, and those that ids of the trace name."""
        self.shareable[request] = max(blocks, self._hashed[request])

    def key(self, request: int, block: int) -> int:
        """An integer for block number ``block`` (from 0, full) of a request, its row in the trace."""
        if block < self._hashed[request]:  # an id stands for all before it too
            at = self._offsets[request] + ((block + 1) * self.block_size - 1) // self._hash_block
            return (self._hashes[at] << INDEX_BITS | block) << 2 | HASHED
        if block >= self.shareable[request]:
            return (request << INDEX_BITS | block) << 2 | OWN
        if self._stream is not None and self._stream[request] >= 0:
            return (self._stream[request] << INDEX_BITS | block) << 2 | SESSION
        return (self._group[request] << INDEX_BITS | block) << 2 | GROUP


class PrefixPool(CountingPool):
    """``total`` blocks, each with its content's key, its users, and its place in the queue of free blocks.

    Only blocks that somebody could find are looked after one by one: those that another request can share, and those
    of a preempted request, for itself. All others pass from the queue to a request and back, whole tables at a time.

    ``late``: asynchronous scheduling knows the token of a step one step later, so a block that decoding fills can be
    found from the next step on.

    Blocks can be found once the step that fills them is planned. If that plan is taken back (a request is preempted in
    the very step) vLLM 0.23.0 leaves them in its cache all the same, though nothing was computed: `allocate_slots`
    caches, `Scheduler._preempt_request` only frees. Whoever finds them then reads what was there before. With
    ``forgets`` they are forgotten instead, and whoever was to find them in that plan (`leaning`) is preempted with it:
    where steps really run, wrong tokens would come of it.
    """

    tracks = by_phase = True

    __slots__ = (
        "_cached",
        "_done",
        "_forgets",
        "_found",
        "_identity",
        "_keys",
        "_late",
        "_public",
        "_queue",
        "_stale",
        "_tables",
        "_users",
    )

    def __init__(
        self, total: int, block_size: int, identity: Identity, late: bool = False, forgets: bool = False
    ) -> None:
        super().__init__(total, block_size)
        self._identity = identity
        self._late = late
        self._forgets = forgets
        self._queue = deque(range(total))  # free blocks, the next to be reused first; and stale entries
        self._stale: dict[int, int] = {}  # block → its first so many entries in the queue count no more
        self._keys: dict[int, int] = {}  # findable block → its content's key
        self._users: dict[int, int] = {}  # findable block → requests that hold it
        self._cached: dict[int, int | dict[int, None]] = {}  # key → the block, or blocks in order of caching
        self._tables: dict[int, list[int]] = {}  # request → its blocks
        self._done: dict[int, int] = {}  # request → full blocks at the head of its table, as far as it was told
        self._public: dict[int, int] = {}  # request → findable blocks at the head of its table
        self._found: tuple[int, list[int], int] | None = None  # the latest look-up: request, blocks, how many are free

    @property
    def publishes(self) -> bool:  # type: ignore[override]  # noqa: D102 - documented in `CountingPool`
        return self._identity.answers_too

    def hit(self, request: Live) -> int:  # noqa: D102 - documented in `CountingPool`, as all below
        return max(request.loaded, len(self._look_up(request)[1]) * self.block_size)

    def need(self, request: Live, tokens: int) -> int:  # noqa: D102
        _, blocks, free = self._look_up(request)
        return -(-tokens // self.block_size) - len(blocks) + free

    def open(self, request: Live, tokens: int) -> None:  # noqa: D102
        table = self._look_up(request)[1]
        users, stale = self._users, self._stale
        for block in table:
            if users[block] == 0:
                stale[block] = stale.get(block, 0) + 1
                self.free -= 1
            users[block] += 1
        number = request.id
        self._tables[number] = table
        self._done[number] = self._public[number] = len(table)
        self._take(table, -(-tokens // self.block_size) - len(table))

    def extend(self, request: Live, tokens: int) -> bool:  # noqa: D102
        table = self._tables[request.id]
        more = -(-tokens // self.block_size) - len(table)
        if more > self.free:
            return False
        if more > 0:
            self._take(table, more)
        return True

    def decode_one(self, request: Live, need: int) -> None:  # noqa: D102
        computed = request.computed
        if need:
            self._take(self._tables[request.id], 1)
        if self._identity.answers_too:
            self.computed(request, computed if self._late else computed + 1)

    def decode_all(self, group: Decodes, steps: range) -> None:  # noqa: D102
        members = group.members
        assert members is not None
        size = self.block_size
        late = self._late
        tables = self._tables
        publish = self._identity.answers_too
        for step in range(group.steps + steps.start, group.steps + steps.stop):
            starting = members[-step % size]  # their next token opens a block
            if starting:
                order = sorted(starting.values(), key=admission) if len(starting) > 1 else starting.values()
                for request in order:
                    self._take(tables[request.id], 1)
                    if late and publish:
                        self.computed(request, request.offset + step)
            if publish and not late:
                filling = members[(-step - 1) % size]  # their next token fills one
                for request in filling.values():
                    self.computed(request, request.offset + step + 1)

    def computed(self, request: Live, tokens: int) -> None:  # noqa: D102
        full = tokens // self.block_size
        number = request.id
        if full > self._done[number]:
            self._done[number] = full
            shareable = self._identity.shareable[number]
            if shareable:
                self._publish(number, min(full, shareable))

    def leaning(self, request: Live, admitted: dict[int, Live]) -> Iterator[Live]:  # noqa: D102
        number = request.id
        begin, end = request.computed // self.block_size, self._public[number]
        if self._forgets and begin < end:
            tables = self._tables
            for block in tables[number][begin:end]:
                while self._users[block] > 1:
                    yield next(r for r in reversed(admitted.values()) if block in tables[r.id])

    def preempted(self, request: Live, decoding: bool, planned: bool) -> None:  # noqa: D102
        number = request.id
        full = self._done[number]
        if decoding:
            full = max(full, (request.computed + planned - self._late) // self.block_size)
        if self._forgets:
            full = min(full, request.computed // self.block_size)
            self._take_back(request, full)
        self._publish(number, full)

    def table(self, request: int) -> list[int]:  # noqa: D102
        return self._tables[request]

    def close(self, request: Live, tokens: int) -> None:  # noqa: D102
        number = request.id
        table = self._tables.pop(number)
        public = self._public.pop(number)
        del self._done[number]
        queue = self._queue  # a sequence's tail is reused before its head
        if public == 0:
            queue.extend(reversed(table))
            self.free += len(table)
        else:
            users = self._users
            queue.extend(reversed(table[public:]))
            self.free += len(table) - public
            for block in reversed(table[:public]):
                users[block] -= 1
                if users[block] == 0:
                    queue.append(block)
                    self.free += 1
        self._found = None

    def _publish(self, number: int, upto: int) -> None:
        """Let the first ``upto`` blocks of a request be found from here on."""
        public = self._public[number]
        if upto <= public:
            return
        table, keys, users, cached = self._tables[number], self._keys, self._users, self._cached
        key_of = self._identity.key
        for index in range(public, upto):
            block, key = table[index], key_of(number, index)
            keys[block] = key
            users[block] = 1
            others = cached.get(key)
            if others is None:
                cached[key] = block
            elif isinstance(others, dict):
                others[block] = None
            else:
                cached[key] = {others: None, block: None}
        self._public[number] = upto
        self._found = None

    def _take_back(self, request: Live, full: int) -> None:
        """Let only the first ``full`` blocks of a request be found; the others will not be filled."""
        number = request.id
        for block in self._tables[number][full : self._public[number]]:
            assert self._users[block] == 1
            self._forget(block)
            self._found = None
        self._public[number] = min(self._public[number], full)

    def _look_up(self, request: Live) -> tuple[int, list[int], int]:
        """The blocks that hold a waiting request's leading tokens; the last known token is computed in any case."""
        found = self._found
        if found is not None and found[0] == request.id:
            return found
        blocks: list[int] = []
        free = 0
        number = request.id
        full = (request.prompt_tokens + request.produced - 1) // self.block_size
        if not request.preemptions:
            full = min(full, self._identity.shareable[number])
        cached, key_of, users = self._cached, self._identity.key, self._users
        for index in range(full):
            block = cached.get(key_of(number, index))
            if block is None:
                break
            if isinstance(block, dict):
                block = next(iter(block))
            blocks.append(block)
            if users[block] == 0:
                free += 1
        self._found = found = (number, blocks, free)
        return found

    def _take(self, table: list[int], count: int) -> None:
        """Move ``count`` blocks from the head of the queue to ``table``; what they held is forgotten."""
        self.free -= count
        self._found = None
        pop = self._queue.popleft
        if not self._users:
            table.extend([pop() for _ in range(count)])
            return
        stale, users = self._stale, self._users
        while count:
            block = pop()
            if block in users:
                if block in stale:
                    stale[block] -= 1
                    if not stale[block]:
                        del stale[block]
                    continue
                self._forget(block)
            table.append(block)
            count -= 1

    def _forget(self, block: int) -> None:
        del self._users[block]
        key = self._keys.pop(block)
        others = self._cached[key]
        if isinstance(others, dict):
            del others[block]
            if others:
                return
        del self._cached[key]


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
