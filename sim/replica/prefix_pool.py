"""The KV pool that knows each block: a hash chain over full blocks, reference counts, and LRU reuse, as in vLLM V1.

Source: vLLM 0.23.0, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`; `tests/ledger.py` holds it to that.
The null block is not here: of vLLM's ``num_gpu_blocks`` one is never usable.

Which blocks are equal says `sim.replica.prefix_identity`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.decode_group import Decodes, admission
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.replica.request import Live


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

    tracks = True

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
