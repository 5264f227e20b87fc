"""The step that a policy plans: the verbs of `policies.base.Step`, checked, over one replica's requests and blocks."""

# A policy hands back requests that it was shown, all of which are `Live`.
# mypy: disable-error-code="override"

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from operator import index
from typing import Any, NoReturn, TypeAlias

from mypy_extensions import mypyc_attr

from chairlift.backend.base import Backend, Batch, Chunk, Executor
from chairlift.policies.base import PolicyError, Preemption, PrefixNode, Running, Scheduler, Speculation, Step
from chairlift.sim.replica.counting_pool import CountingPool
from chairlift.sim.replica.decode_group import Decodes
from chairlift.sim.replica.host_memory import HostMemory
from chairlift.sim.replica.pipeline import InFlight
from chairlift.sim.replica.request import DRAINING, NEVER, PARKED, PREFILLING, WAITING, Live, Phase
from chairlift.sim.replica.users_code import name_of
from chairlift.sim.replica.waiting_queue import LONG, OpenQueue, OrderedQueue
from chairlift.sim.results.records import Kind

DENIALS = 8  # noted of one plan
END_OF_TIME = 1 << 62  # ps, 53 days: times are kept in 64 bits
Queue: TypeAlias = deque[Live] | OrderedQueue | OpenQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class ReplicaStep(Step):
    """One replica's requests, the blocks they hold, and the plan that its policy is making.

    A policy can reach everything that this object refers to. So nothing here knows a true length, or refers to what
    does: verbs whose consequences depend on one only write down what they did, and `Planner.ask` draws those
    consequences once the policy has returned. In three steps: a policy admits A with a reservation of 100 tokens; the
    step keeps ``(A, 100, 0, 1)`` in ``pledges``; the planner looks A's true length up, 70 tokens in all, and adds
    70 to the tokens that are promised.
    """

    __slots__ = (  # a dict is slow beyond thirty attributes
        *("_admissions", "_admitted_before", "_denied", "_more_arrivals", "_needy", "_now", "_running", "_scattered"),
        *("_speculation", "_stages", "_windowed", "admitted", "backend", "batch", "chunks", "decoded_at", "evicted"),
        *("flights", "fresh", "group", "host", "kv_tokens", "longest", "moved", "notes", "padding", "parked"),
        *("pledges", "pool", "preempted", "prefills", "queue", "ran", "rejected", "rejoined", "released"),
        *("releases", "resumed", "scheduler", "slept", "started", "taken", "tokens", "wake", "whole"),
    )

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        pool: CountingPool,
        max_model_len: int,
        host: HostMemory | None = None,
        stages: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.backend = backend
        self.releases = type(backend).release is not Backend.release  # it wants to know who loses their KV
        self.pool = pool
        self.host = host or HostMemory()
        self.group = Decodes(pool.block_size, pool.follows)
        self._stages = stages
        self._speculation: Speculation | None = None
        overtakes = scheduler.overtakes_flight and not isinstance(backend, Executor)
        self.flights = InFlight(stages, scheduler.asynchronous, overtakes) if stages > 1 else None
        self._windowed = pool.windowed
        self.queue: Queue = OrderedQueue(scheduler) if scheduler.sorts() else deque()
        self._scattered = False  # somebody was taken from the middle of a long deque
        self._now = 0
        self._more_arrivals = True
        self.longest = max_model_len
        self.admitted: dict[int, Live] = {}  # in order of admission
        self._running: Running = self.admitted.values()
        self.prefills: dict[int, Live] = {}  # of those: still lacking known tokens
        self.parked: dict[int, Live] = {}  # of those: decoding, but left out of the latest decode step
        self.batch: list[Live] = []  # finished, keeping their slot
        self.kv_tokens = 0  # tokens stored
        self.decoded_at = NEVER  # when the group emitted last
        self.fresh: dict[int, Live] = {}  # joined the group since
        self._admissions = self._admitted_before = 0  # ever, and by earlier plans
        # the plan
        self.chunks: list[tuple[Live, int]] = []
        self.ran: dict[int, Live] = {}  # decodes chosen one by one
        self.whole = False  # decode_all was granted
        self.tokens = 0  # tokens planned
        self.padding = 0  # dead tokens planned beside them, dead slots apart
        self.taken = 0  # blocks taken for this step's decodes
        self.preempted = self.slept = 0
        self.resumed = False  # a chunk is the one token that a preempted request lacks: a kernel sees a decode
        self.wake: int | None = None
        self.rejected: list[Live] = []
        self.released: list[Live] = []
        self.evicted: list[Live] = []  # preempted while planning: those that decoded
        self.rejoined: list[Live] = []  # parked before, in the group again
        self.started: list[tuple[Live, int]] = []  # admitted, and their tokens that need no computing
        self.moved: list[tuple[Live, int, bool]] = []  # whose KV moves, tokens, whether out to host memory
        self.notes: list[tuple[Kind, int, int, int]] | None = None  # what a journal is to hear; None without one
        self._denied = 0  # of this plan
        self._needy = -1  # for whom room is sought, -1: all decodes
        self.pledges: list[tuple[Live, int, int, int]] = []  # whose, its reservation, computed; 1 made, -1 given up

    def open(self, now: int) -> None:
        """Start a new plan."""
        self._now = now
        self._admitted_before = self._admissions
        self.chunks = []
        if self.ran:
            self.ran = {}
        if self.preempted:
            self.preempted = 0
            self.evicted = []
        if self.rejected:
            self.rejected = []
        if self.started:
            self.started = []
            if self._scattered:  # only now: a policy may hold on to the queue while it plans
                self.queue, self._scattered = OpenQueue(self.queue), False
        if self.notes is not None:
            self.notes, self._denied, self._needy = [], 0, -1
        self.whole = self.resumed = False
        self.tokens = self.padding = self.taken = self.slept = 0
        self.wake = None
        if self.flights is not None:
            self.flights.turn()

    def expect(self, arrivals: bool) -> None:
        """Say whether requests will arrive yet."""
        self._more_arrivals = arrivals

    # what a policy sees, and cannot write; the simulator reads what these return, which is faster

    @property
    def now(self) -> int:  # noqa: D102 - documented in the contract, as all below
        return self._now

    @property
    def running(self) -> Running:  # noqa: D102
        return self._running

    @property
    def waiting(self) -> Queue:  # noqa: D102
        return self.queue

    @property
    def more_arrivals(self) -> bool:  # noqa: D102
        return self._more_arrivals

    @property
    def max_model_len(self) -> int:  # noqa: D102
        return self.longest

    @property
    def stages(self) -> int:  # noqa: D102
        return self._stages

    @property
    def speculation(self) -> Speculation | None:  # noqa: D102
        return self._speculation

    @property
    def windowed(self) -> bool:  # noqa: D102
        return self._windowed

    @property
    def decodes(self) -> int:  # noqa: D102
        return self.group.live + len(self.parked)

    @property
    def prefilling(self) -> Sequence[Live]:  # noqa: D102
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

    def ready(self, request: Live) -> bool:  # noqa: D102
        return self.flights is None or self.flights.ready(request, request.row in self.admitted)

    def ready_running(self) -> Sequence[Live]:  # noqa: D102
        running = self.admitted.values()
        return list(running) if self.flights is None else self.flights.ready_of(running)

    def cached_tokens(self, request: Live) -> int:  # noqa: D102
        return self.pool.hit(request)

    def need(self, request: Live, tokens: int) -> int:  # noqa: D102
        return self.pool.need(request, tokens)

    def prefix(self, request: Live) -> PrefixNode:  # noqa: D102
        return self.pool.prefix(request)

    def opening(self, request: Live, tokens: int) -> Hashable:  # noqa: D102
        return self.pool.opening(request, tokens)

    def publish(self, request: Live) -> None:  # noqa: D102
        if request.phase is not PREFILLING:
            self._fail(f"publish of {request}, which computes no prompt")
        self.keep(request)

    def keep(self, request: Live) -> None:
        """What has been computed of a request can be found by others from here on."""
        if self.pool.landed(request) and (table := self.pool.table(request.row)) is not None:
            self.backend.retable(request.row, table)

    def evict(self, blocks: int) -> None:  # noqa: D102
        self.pool.evict(blocks)

    def reorder(self, requests: Sequence[Live]) -> None:  # noqa: D102
        if isinstance(self.queue, OrderedQueue) or len(requests) != len(self.queue):
            self._fail(f"reorder of {len(requests)} requests, where {len(self.queue)} wait")
        if {*requests} != {*self.queue}:
            self._fail("reorder of other requests than those that wait, or of one twice")
        self.queue = deque(requests)

    def fits(self, request: Live, tokens: int, spare: int = 0) -> bool:  # noqa: D102
        if self.pool.need(request, tokens, in_chunks=True) + spare <= self.pool.free:
            return True
        self._note_denial(request, tokens, spare, in_chunks=True)
        return False

    def price(self, chunks: Sequence[tuple[int, int]] = (), decodes: int | None = None) -> int:  # noqa: D102
        group = self.group
        count = group.live if decodes is None else decodes
        context = group.context * count // group.live if group.live else 0
        cost = self.backend.step(Batch(tuple(Chunk(*c) for c in chunks), count, context))
        return cost.spacing(self.scheduler.asynchronous)[0]

    # what a policy does

    def decode_all(self) -> bool:  # noqa: D102
        group, parked, pool = self.group, self.parked, self.pool
        if self.ran or self.whole:
            self._fail("decode_all after decodes were chosen already")
        need = group.phases[-group.steps % group.block_size] * pool.tables if group.growing else 0
        if parked:
            need += sum(map(self._next_block, parked.values()))
        if need > pool.free:
            self._needy = -1
            return False
        if parked:
            for request in parked.values():
                self.join(request)
                self._note(Kind.JOIN, request, -1, 0)
            self.rejoined += parked.values()
            self.parked = {}
        elif group.live == 0 and group.dead == 0:
            return True
        self.tokens += group.live
        if pool.tracks:
            pool.decode_all(group, range(1), self.fresh)
        else:
            pool.free -= need
        self.taken = need
        self.whole = True
        return True

    # What users' code gives as a number may be anything, and is looked at here; compiled code would refuse it before.

    def run(self, request: Live, tokens: Any) -> bool:  # noqa: D102
        if request.row not in self.admitted:
            self._fail(f"run of {request}, which is not running")
        if self.flights is not None and not self.flights.ready(request, True):
            self._fail(f"run of {request}, whose token is in flight")
        if type(tokens) is not int:
            tokens = self._whole(f"run of {request}", tokens)
        if not 1 <= tokens <= request.remaining:
            self._fail(f"run of {tokens} tokens of {request}: {request.remaining} remain")
        pool = self.pool
        if request.phase is PREFILLING:
            if self.chunks and any(chosen is request for chosen, _ in self.chunks):
                self._fail(f"run of {request} twice in one step")
            upto = request.stored + tokens
            if not pool.extend(request, upto):
                self._needy = request.row
                return False
            self.tokens += tokens
            if pool.tracks:
                pool.computed(request, upto if self.flights is None else self.flights.known(request, upto))
            self.resumed |= tokens == 1 and request.produced > 0 and request.remaining == 1
            self.chunks.append((request, tokens))
            return True
        if self.whole or request.row in self.ran:
            self._fail(f"run of {request} twice in one step")
        if pool.windowed:
            pool.shed(request)
        need = self._next_block(request)
        if need > pool.free:
            self._needy = request.row
            return False
        self.tokens += 1
        pool.decode_one(request, need)
        if pool.tracks and self.flights is not None and not self.flights.tokens(request):
            pool.computed(request, request.computed + 1)  # the token it computes is known, however late others may be
        self.taken += need
        self.ran[request.row] = request
        return True

    def admit(  # noqa: D102
        self, request: Live, tokens: Any, reserve: Any = None, pad: Any = 0, spare: Any = 0
    ) -> bool:
        pool = self.pool
        hit = pool.hit(request) if pool.tracks else request.loaded
        if type(tokens) is not int or reserve is not None or pad or spare:
            what = f"admit of {request}"
            tokens, pad, spare = (self._whole(what, number) for number in (tokens, pad, spare))
            reserve = None if reserve is None else self._whole(what, reserve)
        computed: int = tokens  # whole numbers by now
        dead: int = pad
        free: int = spare
        if not 1 <= computed <= request.prompt + request.produced - hit:
            self._fail(f"admit with {computed} tokens of {request}: {request.remaining - hit} remain")
        if not 0 <= dead <= self.longest:
            self._fail(f"a padding of {dead} tokens: 0 to {self.longest}, the longest request, are possible")
        if free < 0:
            self._fail(f"{free} blocks to be left free: at least 0 are possible")
        upto = hit + computed
        if reserve is not None:
            if reserve < upto:
                self._fail(f"a reservation of {reserve} tokens for {upto} tokens of {request}")
            upto = reserve
            if pool.blocks(upto) > pool.total:
                self.reject(request)
                return False
        if pool.need(request, upto) + free > pool.free:
            self._note_denial(request, upto, free)
            return False
        if self.notes is not None:
            self._note(Kind.ADMIT, request, request.remaining - hit, hit)
        self.tokens += computed
        if hit:
            self._resume(request, hit)
        waiting = self.queue
        if waiting and waiting[0] is request and not request.in_host:
            waiting.popleft()
        else:
            self._leave_queue(request)
        pool.open(request, upto)
        if pool.tracks:
            pool.computed(request, hit + computed)
        reserved = 0
        if reserve is not None:
            reserved = pool.blocks(reserve) * pool.block_size
            self.pledges.append((request, reserved, hit, 1))
        self._admissions += 1
        request.admit(hit, self._admissions, reserved, dead)
        self.padding += dead
        self.started.append((request, hit))
        self.kv_tokens += hit
        self.admitted[request.row] = request
        self.prefills[request.row] = request
        self.chunks.append((request, computed))
        if self.flights is not None:
            self.flights.joined(request)
        return True

    def preempt(self, request: Live, how: Preemption = "recompute") -> None:  # noqa: D102
        if self.admitted.pop(request.row, None) is None:
            self._fail(f"preempt of {request}, which is not running")
        for other in self.pool.leaning(request, self.admitted):
            self.preempt(other)
        planned = self._unplan(request)
        if planned:
            self.taken -= self._next_block(request)
        if request.group is not None or request.phase is DRAINING:
            self.evicted.append(request)
        self.pool.preempted(request, request.phase is not PREFILLING, planned)
        self.vacate(request, WAITING, planned)
        computed = request.requeue()
        if self.flights is not None:
            self.flights.preempted(request)
        if how == "swap":
            self._swap(request, computed)
        elif how != "recompute":
            self._fail(f"preempt of {request} by {how!r}; 'recompute' or 'swap'")
        if self.releases:
            self.backend.release(request.row)
        self._note(Kind.PREEMPT, request, self._needy, computed)
        self.preempted += 1
        if self.scheduler.requeues_last:
            self.queue.append(request)
        else:
            self.queue.appendleft(request)

    def reject(self, request: Live) -> None:  # noqa: D102
        self._leave_queue(request)
        self.rejected.append(request)

    def release(self) -> None:  # noqa: D102
        for request in self.batch:
            self.group.bury(request)
            self.kv_tokens -= request.stored
            self.pool.close(request, request.stored)
            request.depart()
        self.released += self.batch
        self.batch = []

    def pause(self, ps: Any) -> None:  # noqa: D102
        ps = self._whole("a pause", ps)
        if not 0 <= ps <= END_OF_TIME - self.now - self.slept:
            self._fail(f"a pause of {ps} ps at {self.now} ps: 0 ps is the shortest, and a run ends by {END_OF_TIME} ps")
        self.slept += ps

    def wake_at(self, ps: Any) -> None:  # noqa: D102
        ps = self._whole("wake_at", ps)
        if ps <= self.now:
            self._fail(f"wake_at {ps} ps: it is {self.now} ps already")
        if ps > END_OF_TIME:
            self._fail(f"wake_at {ps} ps: a run ends by {END_OF_TIME} ps")
        self.wake = ps

    def _resume(self, request: Live, hit: int) -> None:
        """A request starts whose first ``hit`` tokens are computed."""
        self.resumed |= request.produced > 0 and request.remaining == hit + 1
        if request.in_host:
            self.moved.append((request, request.in_host, False))
            self.host.fetch(request)

    def _swap(self, request: Live, computed: int) -> None:
        """Keep what a request has computed in host memory, if there is room."""
        if self.scheduler.asynchronous:
            self._fail(f"preempt of {request} by swap while a step is under way")
        if self.host.put(request, computed):
            self.moved.append((request, computed, True))

    # what the engine does with it

    def arrange(self) -> None:
        """Make the decode group what the plan chose one by one: park the rest, take the chosen in."""
        ran = self.ran
        for request in [r for r in self.admitted.values() if (r.row in ran) is (r.group is None)]:
            if request.group is None:
                del self.parked[request.row]
                self.join(request)
                self.rejoined.append(request)
            else:
                self.park(request)

    def join(self, request: Live) -> None:
        """Let a request decode with the group from the next step on."""
        self.group.join(request)
        self.fresh[request.row] = request

    def park(self, request: Live) -> None:
        """Take a decoding request out of the group; it stays admitted."""
        self.part(request, PARKED)
        self.parked[request.row] = request

    def withdraw(self, request: Live) -> None:
        """Take a waiting request out that has ended."""
        self._take_out(request)
        self.host.drop(request)

    def hold(self, request: Live) -> None:
        """A member of the group has its answer, and keeps its slot until its batch returns."""
        self.group.die(request)
        del self.admitted[request.row]
        self.batch.append(request)

    def dismiss(self, request: Live) -> None:
        """Take back all that a drained request holds."""
        if request.reserved:
            self.pledges.append((request, request.reserved, request.stored, -1))
        self.kv_tokens -= request.stored
        self.pool.close(request, request.stored)

    def vacate(self, request: Live, phase: Phase, planned: bool = False) -> None:
        """Take back all that a request holds, which runs no more; of this step's token too if that was ``planned``."""
        if request.group is not None:
            self.part(request, phase)
        else:
            self.prefills.pop(request.row, None)
            self.parked.pop(request.row, None)
        if request.reserved:
            self.pledges.append((request, request.reserved, request.stored, -1))
        self.kv_tokens -= request.stored
        stray = self.flights is not None and request.row in self.flights.strays
        self.pool.close(request, 0 if stray else request.stored + planned)  # a stray has told its pool of all

    def part(self, request: Live, phase: Phase) -> None:
        """Take a member out of the group; its latest token is the group's, unless it has joined since."""
        self.group.leave(request, phase, None if request.row in self.fresh else self.decoded_at)

    def _note(self, kind: Kind, request: Live, other: int, value: int) -> None:
        """Write down for the journal what happened to a request, if there is one."""
        if self.notes is not None:
            self.notes.append((kind, request.row, other, value))

    def _note_denial(self, request: Live, tokens: int, spare: int, in_chunks: bool = False) -> None:
        """Write down that there was no room, the first few times of a plan: a policy may try its whole queue."""
        self._denied += 1
        if self.notes is not None and self._denied <= DENIALS:
            free = self.pool.free
            self._note(Kind.DENY, request, free, self.pool.need(request, tokens, in_chunks) + spare - free)

    def _next_block(self, request: Live) -> int:
        """Blocks that a decoding request takes for one more token."""
        computed = request.computed
        return self.pool.tables if computed % self.pool.block_size == 0 and computed >= request.reserved else 0

    def _unplan(self, request: Live) -> bool:
        """Take a request out of the plan under way; whether a decode was planned for it."""
        if request.row in self.ran:
            del self.ran[request.row]
        elif self.whole and request.group is not None:
            self.whole = self.group.live > 1 or self.group.dead > 0
        else:
            for i, (chosen, tokens) in enumerate(self.chunks):
                if chosen is request:
                    self.tokens -= tokens
                    if request.rank > self._admitted_before:  # only its first chunk is padded
                        self.padding -= request.padded
                    del self.chunks[i]
                    break
            return False
        self.tokens -= 1
        return True

    def _leave_queue(self, request: Live) -> None:
        if request.in_host:
            self.host.drop(request)
        try:
            self._take_out(request)
        except ValueError:
            self._fail(f"{request} is not waiting")

    def _take_out(self, request: Live) -> None:
        """Take a request out of the queue, wherever it stands. Raises ValueError if it is not there."""
        waiting = self.queue
        waiting.remove(request)
        self._scattered |= len(waiting) > LONG and isinstance(waiting, deque)

    def _whole(self, what: str, number: Any) -> int:
        """``number``, which a policy has given for ``what``, as an int. Raises PolicyError if it is no whole number."""
        try:
            return index(number)
        except TypeError:
            self._fail(f"{what}: {number!r} is not a whole number")

    def _fail(self, what: str) -> NoReturn:
        raise PolicyError(what, name_of(self.scheduler))
