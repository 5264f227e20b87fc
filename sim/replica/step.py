"""The step that a policy plans: the verbs of `policies.base.Step`, checked, over one replica's requests and blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from chairlift.backend.base import Backend, Batch, Chunk
from chairlift.policies.base import NEVER, PolicyError, Preemption, Request, Running, Scheduler, Step
from chairlift.sim.replica.counting_pool import CountingPool, Decodes
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.waiting_queue import OrderedQueue
from chairlift.sim.results.records import RequestRecords


class ReplicaStep(Step):
    """One replica's requests, the blocks they hold, and the plan that its policy is making."""

    __slots__ = (  # beyond thirty attributes a dict is slow
        *("_admissions", "_admitted_before", "_outputs", "_requests", "admitted", "backend", "batch", "chunks"),
        *("decoded_at", "evicted", "fresh", "group", "host", "kv_tokens", "max_model_len", "more_arrivals", "now"),
        *("padding", "parked", "pool", "preempted", "prefills", "promised", "ran", "rejected", "released", "releases"),
        *("resumed", "running", "scheduler", "slept", "taken", "tokens", "waiting", "wake", "whole"),
    )

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        pool: CountingPool,
        requests: RequestRecords,
        outputs: Sequence[int],
        max_model_len: int,
        host: HostMemory | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.backend = backend
        self.releases = type(backend).release is not Backend.release  # it wants to know who loses their KV
        self.pool = pool
        self.host = host or HostMemory()
        self.group = Decodes(pool.block_size, pool.tracks)
        self.cached_tokens = pool.hit  # type: ignore[method-assign]  # no detour on the hot path
        self._requests = requests
        self._outputs = outputs  # true lengths by request id: never shown to a policy
        self.waiting: deque[Request] | OrderedQueue = OrderedQueue(scheduler) if scheduler.sorts() else deque()
        self.now = 0
        self.more_arrivals = True
        self.max_model_len = max_model_len
        self.admitted: dict[int, Request] = {}  # in order of admission
        self.running: Running = self.admitted.values()
        self.prefills: dict[int, Request] = {}  # of those: still lacking known tokens
        self.parked: dict[int, Request] = {}  # of those: decoding, but left out of the latest decode step
        self.batch: list[Request] = []  # finished, keeping their slot
        self.kv_tokens = 0  # tokens stored
        self.promised = 0  # reserved tokens that will be filled
        self.decoded_at = NEVER  # when the group emitted last
        self.fresh: dict[int, Request] = {}  # joined the group since
        self._admissions = self._admitted_before = 0  # ever, and by earlier plans
        # the plan
        self.chunks: list[tuple[Request, int]] = []
        self.ran: dict[int, Request] = {}  # decodes chosen one by one
        self.whole = False  # decode_all was granted
        self.tokens = 0  # tokens planned
        self.padding = 0  # dead tokens planned beside them, dead slots apart
        self.taken = 0  # blocks taken for this step's decodes
        self.preempted = self.slept = 0
        self.resumed = False  # somebody computes again who lacks but one token
        self.wake: int | None = None
        self.rejected: list[Request] = []
        self.released: list[Request] = []
        self.evicted: list[Request] = []  # preempted while planning: those that decoded

    def open(self, now: int) -> None:
        """Start a new plan."""
        self.now = now
        self._admitted_before = self._admissions
        self.chunks = []
        if self.ran:
            self.ran = {}
        if self.preempted:
            self.preempted = 0
            self.evicted = []
        if self.rejected:
            self.rejected = []
        self.whole = self.resumed = False
        self.tokens = self.padding = self.taken = self.slept = 0
        self.wake = None

    # what a policy sees

    @property
    def decodes(self) -> int:  # noqa: D102 - documented in the contract, as all below
        return self.group.live + len(self.parked)

    @property
    def prefilling(self) -> Sequence[Request]:  # noqa: D102
        return list(self.prefills.values()) if self.prefills else []

    @property
    def decode_steps(self) -> int:  # noqa: D102
        return self.group.steps

    @property
    def held(self) -> int:  # noqa: D102
        return len(self.batch)

    @property
    def free_blocks(self) -> int:  # noqa: D102
        return self.pool.free

    @property
    def free_host_blocks(self) -> int:  # noqa: D102
        return self.host.free

    @property
    def total_blocks(self) -> int:  # noqa: D102
        return self.pool.total

    @property
    def block_size(self) -> int:  # noqa: D102
        return self.pool.block_size

    def cached_tokens(self, request: Request) -> int:  # noqa: D102 - see `__init__`
        return self.pool.hit(request)

    def fits(self, request: Request, tokens: int) -> bool:  # noqa: D102
        return self.pool.need(request, tokens) <= self.pool.free

    def price(self, chunks: Sequence[tuple[int, int]] = (), decodes: int | None = None) -> int:  # noqa: D102
        group = self.group
        count = group.live if decodes is None else decodes
        context = group.context * count // group.live if group.live else 0
        cost = self.backend.step(Batch(tuple(Chunk(*c) for c in chunks), count, context))
        return cost.spacing(self.scheduler.asynchronous)[0]

    # what a policy does

    def decode_all(self) -> bool:  # noqa: D102
        if self.parked:
            for request in self.parked.values():
                self.join(request)
            self.parked = {}
        group = self.group
        if self.ran or self.whole:
            self._fail("decode_all after decodes were chosen already")
        if group.live == 0 and group.dead == 0:
            return True
        need = group.phases[-group.steps % group.block_size] if group.growing else 0
        if need > self.pool.free:
            return False
        self.tokens += group.live
        if group.members is not None:
            self.pool.decode_all(group, range(1))
        else:
            self.pool.free -= need
        self.taken = need
        self.whole = True
        return True

    def run(self, request: Request, tokens: int) -> bool:  # noqa: D102
        if request.id not in self.admitted:
            self._fail(f"run of {request}, which is not running")
        if not 1 <= tokens <= request.remaining:
            self._fail(f"run of {tokens} tokens of {request}: {request.remaining} remain")
        pool = self.pool
        if request.id in self.prefills:
            if self.chunks and any(chosen is request for chosen, _ in self.chunks):
                self._fail(f"run of {request} twice in one step")
            upto = request._offset + tokens
            if not pool.extend(request, upto):
                return False
            self.tokens += tokens
            if pool.tracks:
                pool.computed(request, upto)
            self.resumed |= tokens == 1 and request._emitted > 0 and request.remaining == 1
            self.chunks.append((request, tokens))
            return True
        if self.whole or request.id in self.ran:
            self._fail(f"run of {request} twice in one step")
        need = self._next_block(request)
        if need > pool.free:
            return False
        self.tokens += 1
        pool.decode_one(request, need)
        self.taken += need
        self.ran[request.id] = request
        return True

    def admit(self, request: Request, tokens: int, reserve: int | None = None, pad: int = 0) -> bool:  # noqa: D102
        pool = self.pool
        hit = pool.hit(request) if pool.tracks else request._loaded
        if not 1 <= tokens <= request.prompt_tokens + request._emitted - hit:
            self._fail(f"admit with {tokens} tokens of {request}: {request.remaining - hit} remain")
        if pad < 0:
            self._fail(f"a padding of {pad} tokens")
        upto = hit + tokens
        if reserve is not None:
            if reserve < upto:
                self._fail(f"a reservation of {reserve} tokens for {upto} tokens of {request}")
            upto = reserve
            if pool.blocks(upto) > pool.total:
                self.reject(request)
                return False
        if pool.need(request, upto) > pool.free:
            return False
        self.tokens += tokens
        if hit:
            self._resume(request, hit)
        waiting = self.waiting
        if waiting and waiting[0] is request and not request.swapped:
            waiting.popleft()
        else:
            self._leave_queue(request)
        pool.open(request, upto)
        if pool.tracks:
            pool.computed(request, hit + tokens)
        request._offset = hit
        self._admissions += 1
        request._seq = self._admissions
        records = self._requests
        if records.admitted[request.id] < 0:
            records.admitted[request.id] = self.now
            records.cached_tokens[request.id] = hit
        self.kv_tokens += hit
        self.admitted[request.id] = request
        self.prefills[request.id] = request
        if reserve is not None:
            request._reserved = request._blocks * pool.block_size
            self.promised += self._promise(request, hit)
        if pad:
            request.pad = pad
            self.padding += pad
        self.chunks.append((request, tokens))
        return True

    def preempt(self, request: Request, how: Preemption = "recompute") -> None:  # noqa: D102
        if self.admitted.pop(request.id, None) is None:
            self._fail(f"preempt of {request}, which is not running")
        for other in self.pool.leaning(request, self.admitted):
            self.preempt(other)
        planned = self._unplan(request)
        need = self._next_block(request) if planned else 0
        self.taken -= need
        decoding = request.id not in self.prefills
        if decoding and (request._counter is not None or request._drains):
            self.evicted.append(request)
        self.pool.preempted(request, decoding, planned)
        self.vacate(request, need)
        computed, request._offset, request._loaded = request._offset, 0, 0
        if how == "swap":
            self._swap(request, computed)
        elif how != "recompute":
            self._fail(f"preempt of {request} by {how!r}; 'recompute' or 'swap'")
        request.preemptions += 1
        request.pad = 0
        if self.releases:
            self.backend.release(request.id)
        self.preempted += 1
        self.waiting.appendleft(request)

    def reject(self, request: Request) -> None:  # noqa: D102
        self._leave_queue(request)
        self.rejected.append(request)

    def release(self) -> None:  # noqa: D102
        for request in self.batch:
            computed = request.prompt_tokens + self._outputs[request.id] - 1
            if request._counter is not None:
                self.group.bury(request, computed)
            self.kv_tokens -= computed
            self.pool.close(request, request._blocks)
        self.released += self.batch
        self.batch = []

    def pause(self, ps: int) -> None:  # noqa: D102
        if ps < 0:
            self._fail(f"a pause of {ps} ps")
        self.slept += ps

    def wake_at(self, ps: int) -> None:  # noqa: D102
        if ps <= self.now:
            self._fail(f"wake_at {ps} ps: it is {self.now} ps already")
        self.wake = ps

    def _resume(self, request: Request, hit: int) -> None:
        """A request starts whose first ``hit`` tokens are computed."""
        self.resumed |= request._emitted > 0 and request.remaining == hit + 1
        if request.swapped:
            self._requests.moved(request, request.swapped)
            self.host.fetch(request)

    def _swap(self, request: Request, computed: int) -> None:
        """Keep what a request has computed in host memory, if there is room."""
        if self.scheduler.asynchronous:
            self._fail(f"preempt of {request} by swap while a step is under way")
        if self.host.put(request, computed):
            self._requests.moved(request, computed, out=True)

    # what the engine does with it

    def arrange(self) -> None:
        """Make the decode group what the plan chose one by one: park the rest, take the chosen in."""
        for request in self.admitted.values():
            chosen = request.id in self.ran
            if chosen and request._counter is None:
                del self.parked[request.id]
                self.join(request)
            elif not chosen and request._counter is not None:
                self.park(request)

    def join(self, request: Request) -> None:
        """Let a request decode with the group from the next step on."""
        self.group.join(request, self._outputs[request.id] - request._emitted)
        self.fresh[request.id] = request

    def park(self, request: Request) -> None:
        """Take a decoding request out of the group; it stays admitted."""
        blocks = self._blocks_of(request)
        if request.id not in self.fresh:
            request._last = self.decoded_at
        self.group.leave(request)
        request._blocks = blocks
        self.parked[request.id] = request

    def withdraw(self, request: Request) -> None:
        """Take a waiting request out that has ended."""
        self.waiting.remove(request)
        self.host.drop(request)

    def drain(self, request: Request) -> None:
        """Take a member out of the group whose last token is under way; it keeps its blocks until that is in."""
        group = self.group
        if not request._reserved:
            request._blocks = -(-(request._offset + group.steps) // group.block_size)
        group.leave(request)

    def dismiss(self, request: Request) -> None:
        """Take back all that a drained request holds."""
        if request._reserved:
            self.promised -= self._promise(request, request._offset)
            request._reserved = 0
        self.kv_tokens -= request._offset
        self.pool.close(request, request._blocks)

    def vacate(self, request: Request, planned: int = 0) -> None:
        """Take back all that a request holds, which runs no more, ``planned`` blocks for this step's token too."""
        blocks = self._blocks_of(request) + planned
        if request._counter is not None:
            if request.id not in self.fresh:
                request._last = self.decoded_at
            self.group.leave(request)
        else:
            self.prefills.pop(request.id, None)
            self.parked.pop(request.id, None)
        if request._reserved:
            self.promised -= self._promise(request, request._offset)
            request._reserved = 0
        self.kv_tokens -= request._offset
        self.pool.close(request, blocks)

    def _blocks_of(self, request: Request) -> int:
        grows = request._counter is not None and not request._reserved
        return self.pool.blocks(request.computed) if grows else request._blocks

    def _next_block(self, request: Request) -> int:
        """Blocks that a decoding request takes for one more token."""
        return int(request.computed % self.pool.block_size == 0 and request.computed >= request._reserved)

    def _promise(self, request: Request, computed: int) -> int:
        final = request.prompt_tokens + self._outputs[request.id] - 1
        return max(0, min(request._reserved, final) - computed)

    def _unplan(self, request: Request) -> bool:
        """Take a request out of the plan under way; whether a decode was planned for it."""
        if request.id in self.ran:
            del self.ran[request.id]
        elif self.whole and request._counter is not None:
            self.whole = self.group.live > 1 or self.group.dead > 0
        else:
            for i, (chosen, tokens) in enumerate(self.chunks):
                if chosen is request:
                    self.tokens -= tokens
                    if request._seq > self._admitted_before:  # only its first chunk is padded
                        self.padding -= request.pad
                    del self.chunks[i]
                    break
            return False
        self.tokens -= 1
        return True

    def _leave_queue(self, request: Request) -> None:
        if request.swapped:
            self.host.drop(request)
        try:
            self.waiting.remove(request)
        except ValueError:
            self._fail(f"{request} is not waiting")

    def _fail(self, what: str) -> NoReturn:
        raise PolicyError(f"policy {type(self.scheduler).__name__}: {what}")
