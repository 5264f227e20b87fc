"""Who decodes under SGLang's scheduler, what their answers may still take, and what a step of prompts may.

`policies.sglang.Sglang` decides, and has the settings, the versions and the sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Final

from chairlift.policies.base import PolicyError, Request, Step

CLIP: Final = 4096  # tokens of answer that a request is reckoned with at most (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)


class Answers:
    """What the answers of some requests may still take: the sum of min(tokens left, CLIP), as decode steps go by.

    Tokens in flight count as seen. Each request gets one token a step, so what is left of it is a number that stays
    less the steps.
    """

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}  # request → tokens left, and steps, when it came
        self._long: set[int] = set()  # of those: with more than CLIP tokens left
        self._heap: list[tuple[int, int]] = []  # those, by when that ends; and stale entries
        self._sum = 0  # of the ends of the others

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, request: Request, steps: int) -> None:
        """A request has come."""
        left = request.max_tokens - request.emitted
        self._ends[request.id] = end = left + steps
        if left > CLIP:
            self._long.add(request.id)
            heappush(self._heap, (end, request.id))
        else:
            self._sum += end

    def remove(self, request: Request) -> None:
        """A request has left, if it was here."""
        end = self._ends.pop(request.id, None)
        if end is None:
            return
        if request.id in self._long:
            self._long.discard(request.id)
        else:
            self._sum -= end

    def total(self, steps: int) -> int:
        """The sum after so many steps."""
        heap = self._heap
        while heap and heap[0][0] - steps <= CLIP:
            end, i = heappop(heap)
            if i in self._long and self._ends[i] == end:
                self._long.discard(i)
                self._sum += end
        long = len(self._long)
        return self._sum - (len(self._ends) - long) * steps + long * CLIP


STOP, FULL, GO = "stop", "full", "go"  # why admission ends: a step's budget is spent, memory is; or it goes on


class RunningBatch:
    """Who decodes, in order, and what SGLang knows of their answers."""

    def __init__(self, ratio: float, counts_whole: bool, leaves_at_once: bool) -> None:
        self.requests: dict[int, Request] = {}
        self.ratio = ratio  # share of the answers still allowed that is reckoned with
        self.flying: set[int] | None = set()  # requests with a token in flight; None: all that run
        self.done: dict[int, Request] = {}  # ended since the last turn
        self.steps = 0  # decode steps that all this has seen
        self._counts_whole = counts_whole  # whether the whole answer counts of those that ignore EOS
        self._leaves_at_once = leaves_at_once
        self._by_ratio = Answers()
        self._whole = Answers()

    def join(self, requests: Iterable[Request]) -> None:
        """These decode from here on."""
        for request in requests:
            self.requests[request.id] = request
            answers = self._whole if request.ignore_eos and self._counts_whole else self._by_ratio
            answers.add(request, self.steps)

    def drop(self, requests: Iterable[Request]) -> None:
        """These decode no more."""
        for request in requests:
            del self.requests[request.id]
            self._by_ratio.remove(request)
            self._whole.remove(request)

    def replace(self, requests: list[Request]) -> None:
        """These decode, in this order, and nobody else."""
        self.drop(list(self.requests.values()))
        self.join(requests)

    def drop_done(self) -> bool:
        """Those that have ended leave; whether there were any."""
        gone = [r for i, r in self.done.items() if i in self.requests]
        self.done = {}
        self.drop(gone)
        return bool(gone)

    def out(self, request: Request) -> int:
        """Tokens of its answer that have been seen."""
        if request.id in self.done:
            return request.emitted
        return request.emitted - (self.flying is None or request.id in self.flying)

    def left(self, request: Request) -> float:
        """Tokens of its answer that a request is reckoned with."""
        left = min(request.max_tokens - self.out(request), CLIP)
        return left * (1.0 if request.ignore_eos and self._counts_whole else self.ratio)

    def total(self) -> float:
        """Tokens of all answers that are reckoned with."""
        return sum(map(self.left, self.requests.values()))

    def between(self) -> tuple[float, float]:
        """What `total` is between, without looking at each: nobody has more than one token in flight."""
        least = self._whole.total(self.steps) + self._by_ratio.total(self.steps) * self.ratio - 1
        most = least + len(self._whole) + len(self._by_ratio) * self.ratio + 2
        if not self._leaves_at_once:  # tokens that those who have ended did not get
            return least - len(self.requests), most + 3 * len(self.requests)
        return least, most


class Adder:
    """What one step of prompts may still take: tokens of the step, and memory now and later (SGLang's PrefillAdder).

    ``chunk``, ``inputs``: tokens that a step may hold; ``mixed``: decodes that go along.
    """

    def __init__(
        self,
        step: Step,
        running: RunningBatch,
        rules: frozenset[str],
        chunk: int | None,
        inputs: int,
        mixed: int,
        no_cache: bool,
    ) -> None:
        self.batch: list[Request] = []
        self.new: list[Request] = []  # of the batch: those from the queue
        self.cut: Request | None = None
        self.tokens = 0
        self.taken = 0  # pages taken for the batch so far; SGLang takes them at the end
        self._step, self._running, self._rules, self._no_cache = step, running, rules, no_cache
        self._page = step.block_size
        self._states: list[tuple[float, int]] | None = None
        self._inputs = inputs - mixed
        self._chunk = None if chunk is None else chunk - mixed
        least, most = running.between()
        self._least, self._most = mixed + least, mixed + most  # what the running will take is between
        self._exact = False  # whether `_later` is known
        self._later = 0.0  # tokens that the running and the batch will take
        self._charged = 0  # of those: the batch's
        self._now = self._mixed = mixed

    def _up(self, tokens: int) -> int:
        return -(-tokens // self._page) * self._page

    @property
    def _room(self) -> int:
        """Tokens that nobody holds, as before this step took any."""
        return (self._step.free_blocks + self.taken) * self._page

    def total(self) -> float:
        """Room that the running and the batch will leave."""
        if not self._exact:
            self._exact = True
            self._later = self._mixed + self._running.total() + self._charged
        return self._room - self._later

    def relieve(self, tokens: float) -> None:
        """A running request will not take these after all."""
        self._later -= tokens

    def _exceeds(self, tokens: int) -> bool:
        """Whether `total` is more than ``tokens``."""
        if not self._exact:
            spare = self._room - self._charged - tokens
            if spare > self._most:
                return True
            if spare <= self._least:
                return False
        return self.total() > tokens

    def spent(self) -> bool:
        """Whether the step's tokens are spent, and memory is not."""
        return self._verdict() == STOP

    def _verdict(self) -> str:
        if self._room <= self._now or not self._exceeds(0):
            return FULL
        return STOP if self._inputs <= 0 or (self._chunk is not None and self._chunk <= 0) else GO

    def _charge(self, tokens: int, answer: int) -> None:
        pages = self._up(tokens)
        self._charged += pages + self._page + answer
        self._later += pages + self._page + answer
        self._now += pages + self._page
        self._inputs -= pages
        if self._chunk is not None:
            self._chunk -= pages

    def _plan(self, request: Request, start: int, tokens: int) -> None:
        self.batch.append(request)
        self.tokens += tokens
        self.taken += (self._up(start + tokens) - self._up(start)) // self._page

    def go_on(self, request: Request) -> bool:
        """Compute more of the cut prompt; whether that completes it."""
        assert self._chunk is not None
        room = self._chunk
        if not self._exceeds(room):
            room = min(room, int(self.total()))
            if room <= 0:
                room = self._chunk
        want, start = request.remaining, request.computed
        tokens = min(want, room, self._room + self._up(start) - start)  # where memory is too short SGLang breaks down
        if tokens > 0 and self._step.run(request, tokens):
            self._plan(request, start, tokens)
            self._charge(tokens, min(request.max_tokens, CLIP) if want == tokens else 0)
        return want == tokens

    def add(self, request: Request, known: int, hit: int) -> str:
        """Start a waiting request if there is room, of whose ``known`` tokens ``hit`` are cached; how to go on."""
        if request.ignore_eos and self._no_cache:
            return self._add_exactly(request, known)
        page, want = self._page, known - hit
        need = want + min(max(request.max_tokens - request.emitted, 0), CLIP) + page
        beyond = self._chunk is None and bool(self.batch) and self._up(want) >= self._inputs
        if beyond and self._exceeds(need) and "a spent budget ends admission before a look-up" not in self._rules:
            return STOP
        # its own prefix cannot be dropped for it
        if not self._exceeds(need + (self._step.need(request, hit) * page if hit else 0)):
            return FULL
        if beyond:
            return STOP
        if self._chunk is not None and self._up(want) > self._chunk:
            tokens = (hit + self._chunk // page * page) // page * page - hit
            return STOP if tokens <= 0 else self._take(request, hit, tokens, 0, True)
        return self._take(request, hit, want, min(request.max_tokens, CLIP), False)

    def _take(self, request: Request, hit: int, tokens: int, answer: int, cut: bool) -> str:
        if not self._step.admit(request, tokens):
            raise PolicyError(f"no room for {tokens} tokens of {request}")
        self._plan(request, hit, tokens)
        self.new.append(request)
        if cut:
            self.cut = request
        self._charge(tokens, answer)
        return self._verdict()

    def _add_exactly(self, request: Request, want: int) -> str:
        """Without the cache, and where the answers' lengths are known: whether all can end, the shortest first."""
        running = self._running
        paged = self._up(want)
        if "a page a request in the exact test" in self._rules:
            paged += self._page
        now = self._room - self._now
        if paged > min(now, self.total()):
            return FULL

        def state(other: Request) -> tuple[float, int]:
            out = running.out(other) if other.id in running.requests else other.emitted
            return other.max_tokens * (1.0 if other.ignore_eos else running.ratio) - out, other.prompt_tokens + out

        states = self._states
        if states is None:
            found = map(state, [request, *running.requests.values(), *self.batch])
            self._states = states = sorted((s for s in found if s[0] > 0), key=lambda s: s[0])
        else:
            own = state(request)
            if own[0] > 0:  # the longest goes before the last
                at = next((i for i, s in enumerate(states) if own[0] <= s[0]), max(0, len(states) - 1))
                states.insert(at, own)
        have = now - paged
        for i, (left, occupied) in enumerate(states):
            n = len(states) - i
            if have - left * n <= n:
                return FULL
            have += occupied
        if self._chunk is None or want <= self._chunk:
            return self._take(request, 0, want, min(request.max_tokens, CLIP), False)
        if self._chunk <= 0 or self.cut is not None:  # SGLang forgets a prompt cut before: it never computes the rest
            return STOP
        return self._take(request, 0, self._chunk, 0, True)
