"""SGLang's scheduler, decision for decision: prompts before decodes, a radix tree, a guess of memory, retraction.

Equal to SGLang 0.5.23's scheduler and 0.5.17's, with and without overlap (`tests/ledger.py` replays their ledgers).
Sources: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, for the tree
and the order by prefix; `python/sglang/srt/managers/{scheduler,schedule_batch,schedule_policy}.py` for the rest.

Words of SGLang's: a *turn* is one pass of its event loop, and at most one step; the *running batch* is who decodes; a
step *extends* (computes prompts), decodes, or is *mixed*; a *cut* prompt goes on in the next step.

Not modelled, and refused as settings: what `Sglang.not_modelled` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

from chairlift.policies.base import (
    FOREVER,
    Deployment,
    NotNegative,
    NotNegativeFloat,
    PolicyError,
    Positive,
    PrefixNode,
    RadixCache,
    Request,
    Scheduler,
    Step,
)
from chairlift.policies.sglang_batches import CLIP, FULL, GO, Adder, RunningBatch

GIB = 1 << 30
CHUNKS = {  # by version: GPU memory below so many GiB, its default
    "0.5.17": ((35, 2048), (60, 4096), (160, 8192), (float("inf"), 16384)),
    "0.5.23": ((20, 2048), (60, 4096), (160, 8192), (float("inf"), 16384)),
}
GRAPHS = (  # GPU memory below so many GiB, requests of the largest CUDA graph with fewer than 4 GPUs and with more
    *((20, 8, 8), (35, 48, 160), (60, 32, 160), (160, 256, 512)),
    (float("inf"), 512, 512),
)
MIB = 1 << 20
MOST_REQUESTS = 4096  # that run at once, if the pool has room for them
FIRST_RATIO, LEAST_SHARE, DECAY_STEPS = 0.7, 0.14, 600  # of the guess: at first, its floor as a share of that, steps
RANKS_RATIO = 0.3  # of `schedule_conservativeness`, with ranks of DP-attention (`ServerArgs`)
SPARE_INPUT = 5  # tokens that a prompt must leave of what a request may have
RETRACT_STEPS = 20  # steps of room that a retraction makes
SORT_LIMIT = 128  # waiting requests beyond which no order looks at prefixes
SHARED_OPENING = 32  # tokens that a request shares with one before it in the queue, to wait for that one's prefix
TOUCH_EVERY = 32  # sorts of an order that looks at no prefixes, from one refreshing of waiting prefixes to the next

# Rules that 0.5.17 has not. Nobody looked at which release between the two each came with.
RULES = {
    "a request that ignores EOS is reckoned with its whole answer": "0.5.23",
    "finished requests leave the running batch at once": "0.5.23",  # before, with the next decode
    "an empty running batch is not full": "0.5.23",  # no recorded case tells
    "a spent budget ends admission before a look-up": "0.5.23",
    "a cut prompt's slot counts as a place": "0.5.23",
    "who ends by length is left out of the next decode": "0.5.23",  # with overlap
    "waiting prefixes are refreshed": "0.5.23",
    "a page a request in the exact test": "0.5.23",
    "unified radix cache": "0.5.23",
}
SETTINGS = {"prefill_decode_interval": "0.5.23"}  # that 0.5.17 has not
VERSIONS = ("0.5.17", "0.5.23")
Order = Literal["fcfs", "lpm", "dfs-weight", "lof", "hrrn"]


@dataclass
class Sglang(Scheduler):
    """Prefill first, in chunks, then decode; start requests while a guess of what answers will take has room.

    The guess falls with every decode step and rises when requests had to be retracted. Prefixes, answers among them,
    are kept in a radix tree. It gives up the gaps between tokens to prompts. Settings bear SGLang's names and, but for
    those that it sizes by the GPU, its defaults.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "mem_fraction_static": "memory here: it is kv.memory_utilization",
        "max_total_tokens": "memory here: it is kv.tokens",
        "context_length": "the model's length here: it is the scenario's max_model_len",
        "tp_size": "parallelism here: it is the scenario's tensor_parallel",
        "pp_size": "pipeline parallelism",
        "dp_size": "parallelism here: it is the scenario's parallel.data",
        "enable_dp_attention": "parallelism here: it is the scenario's parallel.data",
        "ep_size": "parallelism here: it is the scenario's parallel.expert",
        "kv_cache_dtype": "quantised KV: give the model's kv_bytes_per_element instead",
        "speculative_algorithm": "speculative decoding",
        "speculative_num_steps": "speculative decoding",
        "speculative_num_draft_tokens": "speculative decoding",
        "enable_hierarchical_cache": "cache tiers",
        "hicache_ratio": "cache tiers",
        "enable_lora": "LoRA adapters",
        "max_loras_per_batch": "LoRA adapters",
        "disaggregation_mode": "disaggregation here: it is the cluster's prefill and decode roles",
        "radix_eviction_policy": "an eviction order other than SGLang's default, least recently used",
        "swa_full_tokens_ratio": "sliding windows, Mamba and other layers without full attention",
        "disable_chunked_prefix_cache": "kernels: a matter of the cost model, not of the scheduler",
        "disable_cuda_graph": "CUDA graphs: a matter of the cost model, not of the scheduler",
        "cuda_graph_max_bs": "CUDA graphs: a matter of the cost model, not of the scheduler",
        "enable_two_batch_overlap": "two batches at once",
        "enable_dynamic_chunking": "chunks sized by a predictor (pipeline parallelism)",
        "max_queued_requests": "a full queue here: it is the scenario's limits.queue",
        "abort_on_priority_when_disabled": "answers to wrong requests",
        "default_priority_value": "a priority of requests without one: give all of them one",
        "stream_interval": "streaming: a client sees each token",
        "num_continuous_decode_steps": "several decode steps a turn",
        "grammar_backend": "structured outputs",
    }

    switched: ClassVar[Mapping[str, bool]] = {}  # rules of `RULES` that hold, or not, whatever the version

    version: Literal["0.5.17", "0.5.23"] = "0.5.23"
    schedule_policy: Order = "fcfs"
    schedule_conservativeness: NotNegativeFloat = 1.0
    page_size: Positive = 1
    chunked_prefill_size: int | None = None  # tokens of prompts a step; -1: whole; None: by the GPU
    max_prefill_tokens: Positive = 16384  # tokens of prompts a step, beyond the first where prompts are whole
    max_running_requests: Positive | None = None  # None: by the pool, as SGLang does
    prefill_max_requests: Positive | None = None  # requests a step that extends
    prefill_decode_interval: NotNegative = 0  # turns without prompts after each step with some
    enable_mixed_chunk: bool = False  # decodes go along with prompts
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False  # plan a step when the output of the one before is in
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    disable_priority_preemption: bool = False
    retraction_policy: Literal["length", "priority"] = "length"

    requeues_last: ClassVar[bool] = True
    drops_flight: ClassVar[bool] = True
    ranks_in_turn: ClassVar[bool] = True  # its load_balance_method round_robin

    _joining: list[Request] | None = field(default=None, init=False, repr=False)  # of the last step, if it extended
    _joining_tokens: int = field(default=0, init=False, repr=False)  # tokens of that step
    _cut: Request | None = field(default=None, init=False, repr=False)
    _published: int = field(default=-1, init=False, repr=False)  # tokens of the cut prompt that are in the tree
    _full: bool = field(default=False, init=False, repr=False)  # nobody more fits until somebody leaves
    _idle: bool = field(default=False, init=False, repr=False)  # the last turn had nothing to do
    _defer: int = field(default=0, init=False, repr=False)  # turns without prompts to come
    _batches: tuple[list[Request], list[Request]] = field(default=([], []), init=False, repr=False)  # last, and before
    _sorts: int = field(default=0, init=False, repr=False)
    _extended: int = field(default=0, init=False, repr=False)  # tokens of the prompts that the running batch began as
    _processed: int = field(default=0, init=False, repr=False)
    _entered: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)  # when, tokens processed
    _entries: int = field(default=0, init=False, repr=False)
    _looked: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)  # known tokens, found

    def __post_init__(self) -> None:
        self._rules = frozenset(rule for rule in RULES if self.holds(rule, self.version))
        self._leaves_at_once = "finished requests leave the running batch at once" in self._rules
        self._first = min(1.0, FIRST_RATIO * self.schedule_conservativeness)
        self._least = min(1.0, self._first * LEAST_SHARE)
        self._fall = (self._first - self._least) / DECAY_STEPS
        counts_whole = "a request that ignores EOS is reckoned with its whole answer" in self._rules
        self._running = RunningBatch(self._first, counts_whole, self._leaves_at_once)
        size = 8192 if self.chunked_prefill_size is None else self.chunked_prefill_size
        self._chunk = size if size > 0 else None
        self._mixes = self.enable_mixed_chunk and self._chunk is not None
        self._sign = 1 if self.schedule_low_priority_values_first else -1
        self._preempts = self.enable_priority_scheduling and not self.disable_priority_preemption
        by_prefix = self.schedule_policy in ("lpm", "dfs-weight", "hrrn")
        self._order: Order = "fcfs" if self.disable_radix_cache and by_prefix else self.schedule_policy
        self._stamps = self.enable_priority_scheduling or self._order == "hrrn"
        self._slots = self.max_running_requests or 0
        self.block_tokens = self.page_size  # type: ignore[misc]  # of the object; the class fixes none

    # what a scenario asks

    @classmethod
    def holds(cls, rule: str, version: str) -> bool:
        """Whether ``version`` has the rule of `RULES`, unless a subclass has `switched` it to see what it does."""
        return cls.switched.get(rule, VERSIONS.index(version) >= VERSIONS.index(RULES[rule]))

    @classmethod
    def refused(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """What is not modelled, and what the version lacks."""
        found = super().refused(given)
        for key, since in SETTINGS.items():
            if given.get("version") == VERSIONS[0] and given.get(key):
                found[key] = f"exists since SGLang {since}, and the version is {VERSIONS[0]}"
        return found

    @classmethod
    def sized(cls, given: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
        """Chunks as SGLang's server sets them by the memory of the GPU (`ServerArgs`).

        Ranks of DP-attention share the tokens of a chunk, and are less conservative. What is given is of each rank.
        """
        gib = deployment.gpu_bytes / GIB
        chunk = next(size for room, size in CHUNKS[given.get("version", VERSIONS[-1])] if gib < room)
        if (ranks := deployment.ranks) > 1:
            return {"chunked_prefill_size": max(chunk // ranks, 1), "schedule_conservativeness": RANKS_RATIO, **given}
        return {"chunked_prefill_size": chunk, **given}

    def static_share(self, gpu_bytes: int, gpus: int, latent: bool) -> float:
        """Its ``mem_fraction_static``: `handle_gpu_memory_settings` of SGLang 0.5.23, `srt/arg_groups/memory_hook.py`.

        What it sets aside grows with the tokens of a chunk and the requests of a CUDA graph, not with
        `max_running_requests`. On an H100 that is 13.6 GiB, on an H200 as much: shares of 0.830 and 0.903.
        """
        gib = gpu_bytes / GIB
        few, many = next(each for room, *each in GRAPHS if gib < room)
        requests = min(few if gpus < 4 else many, self.max_running_requests or MOST_REQUESTS)
        tokens = max(self.max_prefill_tokens if self._chunk is None else self._chunk, 2048)
        graphs = 1536.0 if latent else 8.0 * _prefill_graphs(tokens)
        mib = 512 + 1.5 * tokens + gpus * 128 + 2 * requests + graphs
        if gib > 60:
            mib = max(mib, 10 * 1024)
        return round(1 - mib * MIB / gpu_bytes, 3)

    def misfits(self, deployment: Deployment) -> Iterator[tuple[str, str]]:
        """SGLang's own checks, by which it does not start (`ServerArgs.check_server_args`)."""
        if self._chunk is not None and self._chunk % self.page_size:
            yield "chunked_prefill_size", f"must be a multiple of page_size, {self.page_size} (got {self._chunk})"
        if self.enable_priority_scheduling and self.schedule_policy not in ("fcfs", "lof"):
            yield "schedule_policy", f"must be fcfs or lof with priority scheduling (got {self.schedule_policy})"
        if self.schedule_policy == "hrrn" and self.version == VERSIONS[0]:
            yield "schedule_policy", f"hrrn is not there in SGLang {self.version}"

    def assumptions(self) -> dict[str, str]:
        """The version, and the limits that its server sizes by the GPU."""
        chunks = "whole prompts" if self._chunk is None else f"{self._chunk} tokens of prompts"
        overlap = "without" if self.disable_overlap_schedule else "with"
        return {"scheduler": f"SGLang {self.version}, {chunks} a step, pages of {self.page_size}, {overlap} overlap"}

    # what the replica asks

    @property
    def asynchronous(self) -> bool:
        """Unless `disable_overlap_schedule`."""
        return not self.disable_overlap_schedule

    @property
    def overshoots(self) -> Literal["never", "eos", "always"]:
        """With overlap: whoever ends by EOS, and in 0.5.17 everybody."""
        return "eos" if "who ends by length is left out of the next decode" in self._rules else "always"

    @property
    def prefix_caching(self) -> bool:
        """Unless `disable_radix_cache`."""
        return not self.disable_radix_cache

    @property
    def radix(self) -> RadixCache:
        """SGLang's tree."""
        return RadixCache(unified="unified radix cache" in self._rules)

    @property
    def sequence_limit(self) -> int:
        """As `max_running_requests` says, or what it is at most."""
        return self.max_running_requests or MOST_REQUESTS

    def allowed(self, request: Request, max_model_len: int, blocks: int, block_size: int) -> int:
        """As SGLang clips max_new_tokens when a request comes, and refuses prompts that are too long."""
        prompt, pool = request.prompt_tokens, blocks * block_size
        most = min(max_model_len, pool) - 1
        if prompt >= most - SPARE_INPUT:
            return 0
        pages = -(-prompt // block_size) + 1
        return max(0, min(request.max_tokens, most - prompt - 1, pool - pages * block_size - 1))

    def ended(self, request: Request) -> None:
        """Remember it until the next turn."""
        self._running.done[request.id] = request

    def landing(self, requests: list[Request]) -> list[Request]:
        """In the order of the step's batch."""
        if len(requests) < 2:
            return requests
        members = set(requests)
        return [r for r in self._batches[self.asynchronous] if r in members]

    def heeds_arrival(self, step: Step) -> bool:
        """A full batch hears nothing, unless priorities can make room, or the order counts what waits have seen."""
        if self._preempts or self._order == "hrrn":
            return True
        return not self._full and self._places(step, 0, 0) > 0

    # a turn

    def schedule(self, step: Step) -> int:
        """One turn: prompts if any can go on or start, else a step of decodes."""
        if not self._slots:
            self._slots = _slots(step.total_blocks * step.block_size, step.max_model_len)
        before = len(self._running.requests), self._full, self._defer
        self._catch_up(step)
        self._merge(step)
        self._batches = ([], self._batches[0])
        batch: list[Request] = []
        if self._defer:
            self._defer -= 1
        else:
            batch = self._prefill(step)
        if batch:
            self._defer = self.prefill_decode_interval
            vouched = 1
        else:
            batch, vouched = self._decode(step)
        self._batches = (batch, self._batches[1])
        if batch:
            return vouched
        self._running.flying = set()
        if step.running or (self._batches[1] and self.asynchronous):
            return 0
        if step.waiting:  # a request that nothing will ever make room for waits for others: SGLang spins
            return int(before == (len(self._running.requests), self._full, self._defer))
        self._idle = True
        return 1

    def _catch_up(self, step: Step) -> None:
        """Take in what has happened since the last turn: decode steps that it vouched for, and arrivals."""
        running = self._running
        if self._idle:
            self._idle = False
            running.ratio = self._first
        more = step.decode_steps - running.steps
        if more:
            running.steps += more
            self._processed += more * self._extended
            while more and running.ratio != self._least:
                running.ratio = max(running.ratio - self._fall, self._least)
                more -= 1
        if self._stamps:
            new = []
            for request in reversed(step.waiting):
                if request.id in self._entered:
                    break
                new.append(request)
            for request in reversed(new):
                self._enter(request)

    def _enter(self, request: Request) -> None:
        """A request joins the queue."""
        if self._stamps:
            self._entries += 1
            self._entered[request.id] = self._entries, self._processed

    def _merge(self, step: Step) -> None:
        """The last step's prompts join the running batch; those that have ended leave it."""
        running, cut = self._running, self._cut
        done = running.done
        if cut is not None and (cut.id in done or cut.computed == 0):
            self._cut = cut = None
        if cut is not None and cut.computed > self._published:
            step.publish(cut)
            self._published = cut.computed
        if self._joining is not None:
            joining = [r for r in self._joining if r.id not in done and r is not cut]
            if len(joining) < len(self._joining):
                self._full = False
            if joining:
                if not running.requests:
                    self._extended = self._joining_tokens
                    self._full = False
                running.join(joining)
            self._joining = None
        if done:
            for i in done:
                self._entered.pop(i, None)
                self._looked.pop(i, None)
            if self._leaves_at_once or not running.requests:
                self._full = not running.drop_done() and self._full

    def _places(self, step: Step, held: int, new: int) -> int:
        """Requests that may still start; ``held`` slots are the batch's own already, ``new`` it has taken since."""
        free = self._slots - len(step.running) + new
        if "a cut prompt's slot counts as a place" in self._rules:
            free += held
        return min(self._slots - len(self._running.requests), free)

    def _prefill(self, step: Step) -> list[Request]:
        """Plan a step of prompts; its batch in order, empty if there is none."""
        running, rules = self._running, self._rules
        if self._preempts or (not running.requests and "an empty running batch is not full" in rules):
            self._full = False
        cut = self._cut
        if (self._full or not step.waiting) and cut is None:
            return []
        if cut is None and not self._preempts and self._places(step, 0, 0) <= 0:
            self._full = True
            return []
        self._sort(step)
        mixed = len(running.requests) if self._mixes else 0
        adder = Adder(step, running, rules, self._chunk, self.max_prefill_tokens, mixed, self.disable_radix_cache)
        if cut is not None:
            if adder.go_on(cut):
                self._cut = None
            elif not adder.batch:
                return []
        victims: set[int] = set()
        for _ in range(len(step.waiting)):  # whoever starts has left the queue, and who does not ends the walk
            request = step.waiting[0]
            if adder.spent() and "a spent budget ends admission before a look-up" in rules:
                break
            if len(adder.batch) >= self._places(step, cut is not None, len(adder.new)):
                self._full = True
            if self._full and not (self._preempts and self._make_room(step, adder, request, victims)):
                break
            known, hit = request.prompt_tokens + request.emitted, step.cached_tokens(request)
            if self._preempts:
                self._looked[request.id] = known, hit
            if self.prefill_max_requests is not None and len(adder.batch) >= self.prefill_max_requests:
                break
            verdict = adder.add(request, known, hit)
            if verdict != GO:
                if verdict == FULL:
                    roomy = "an empty running batch is not full" in rules
                    self._full = not roomy or bool(adder.batch) or bool(running.requests)
                break
        batch = adder.batch
        if not batch:
            return []
        if adder.cut is not None:
            self._cut, self._published = adder.cut, -1
        size = step.block_size
        step.evict(-(-adder.tokens // size) + (len(batch) if size > 1 else 0) - adder.taken)
        flying = {r.id for r in batch if r is not self._cut}
        tokens = adder.tokens
        if mixed:
            self._drop_ending(step)
            running.drop_done()
            if running.requests and step.decode_all():
                decodes = list(running.requests.values())
                tokens += len(decodes)
                if self._preempts:
                    self._looked.update({r.id: (r.prompt_tokens + running.out(r), 0) for r in decodes})
                flying |= running.requests.keys()
                batch = [*batch, *decodes]
                running.replace([])
                running.steps += 1
                self._extended = 0
        self._processed += tokens
        self._joining, self._joining_tokens = batch, tokens
        running.flying = flying if self.asynchronous else set()
        return batch

    def _drop_ending(self, step: Step) -> int:
        """Those whose last token is in flight, by their limit, leave the running batch; how many."""
        running = self._running
        if step.decodes == len(running.requests) or not self.asynchronous:
            return 0
        ending = [r for i, r in running.requests.items() if r.remaining == 0 and i not in running.done]
        if ending:
            self._full = False
            running.drop(ending)
        return len(ending)

    def _decode(self, step: Step) -> tuple[list[Request], int]:
        """Plan a decode step, after retracting whom it has no room for; its batch, and for how many steps it holds."""
        running = self._running
        if not running.requests:
            return [], 1
        ending = self._drop_ending(step)
        if running.done and running.drop_done():
            self._full = False
        if not running.requests:
            self._full = False
            return [], 1
        retracted = False
        if step.decode_all():
            running.ratio = max(running.ratio - self._fall, self._least)
        elif ending:
            step.evict(FOREVER)
            self._full = False
            return [], 1
        else:
            self._retract(step)
            retracted = True
            if not step.decode_all():
                raise PolicyError("the last running request has no room left")
        running.steps += 1
        running.flying = None if self.asynchronous else set()
        self._processed += self._extended
        waits = self._preempts or not self._full
        lasting = not (retracted or self._defer or self._cut or (waits and step.waiting))
        return list(running.requests.values()), FOREVER if lasting else 1

    def _retract(self, step: Step) -> None:
        """Preempt the shortest answers, of equals the longest prompts, until the rest has room for a step."""
        running, size = self._running, step.block_size

        def fits(keep: Sequence[Request]) -> bool:
            need = sum(r.computed % size == 0 for r in keep)
            step.evict(need)
            return need <= step.free_blocks

        def length(request: Request) -> tuple[int, int]:
            return running.out(request), -request.prompt_tokens

        keep = list(running.requests.values())
        if self.retraction_policy == "length":
            keep.sort(key=length, reverse=True)
        else:
            keep.sort(key=lambda r: (r.priority * -self._sign, *length(r)), reverse=True)
        fits(keep)
        while len(keep) > 1:
            self._requeue(step, keep.pop(), len(keep), 0)
            if fits(keep):
                break
        seen, most = sum(map(running.out, keep)), sum(r.max_tokens for r in keep)
        running.ratio = min(1.0, (seen + RETRACT_STEPS * len(keep)) / (most + 1))
        running.replace(keep)
        self._full = False

    def _requeue(self, step: Step, request: Request, rest: int, taken: int) -> None:
        """Take a running request's pages, and make room for some steps of the ``rest`` that stay."""
        if self._preempts:
            self._looked[request.id] = self._looked[request.id][0], 0
        step.preempt(request)
        step.evict(-(-rest * RETRACT_STEPS // step.block_size) - taken)
        self._enter(request)

    def _make_room(self, step: Step, adder: Adder, request: Request, before: set[int]) -> bool:
        """Preempt those of less priority for a waiting request, the least first; False if they are too few.

        ``before``: who was preempted in this turn.
        """
        running, sign = self._running, self._sign
        known, hit = self._looked.get(request.id, (0, 0))
        need = known - hit + min(request.max_tokens, CLIP) - adder.total()
        victims: set[int] = set()
        candidates = [r for i, r in running.requests.items() if i not in before and i not in running.done]
        for other in sorted(candidates, key=lambda r: (r.priority * -sign, -self._entered[r.id][0])):
            if (request.priority - other.priority) * -sign <= self.priority_scheduling_preemption_threshold:
                break
            victims.add(other.id)
            need -= running.left(other)
            if need <= 0:
                break
        if not victims or need > 0:
            return False
        rest = len(running.requests)
        for other in [r for i, r in running.requests.items() if i in victims]:
            adder.relieve(running.left(other))
            rest -= 1
            self._requeue(step, other, rest, adder.taken)
            running.drop([other])
        before |= victims
        return True

    # the order of the queue

    def _sort(self, step: Step) -> None:
        """Put the queue in order, for good."""
        order = self._order
        if order in ("lpm", "hrrn") and len(step.waiting) > SORT_LIMIT:
            order = "fcfs"
        if order in ("lpm", "dfs-weight", "hrrn"):
            self._sort_by_prefix(step, list(step.waiting), order)
            return
        sign = self._sign
        if self._order == "fcfs" and self.enable_priority_scheduling:
            step.reorder(sorted(step.waiting, key=lambda r: r.priority * sign))
        elif order == "lof":
            if self.enable_priority_scheduling:
                step.reorder(sorted(step.waiting, key=lambda r: (r.priority * sign, -r.max_tokens)))
            else:
                step.reorder(sorted(step.waiting, key=lambda r: -r.max_tokens))
        if step.waiting and not self.disable_radix_cache and "waiting prefixes are refreshed" in self._rules:
            if self._sorts % TOUCH_EVERY == 0:
                for request in reversed(list(islice(step.waiting, SORT_LIMIT))):
                    step.prefix(request)
            self._sorts += 1

    def _sort_by_prefix(self, step: Step, waiting: list[Request], order: Order) -> None:
        """The orders that look at prefixes; whoever shares its opening with one before it goes last."""
        hits: dict[int, int] = {}
        nodes: dict[int, PrefixNode] = {}
        later: set[int] = set()
        openings = set()
        for request in waiting:
            known = request.prompt_tokens + request.emitted
            nodes[request.id] = node = step.prefix(request)
            hits[request.id] = min(node.stop, known - 1)
            if node.stop <= SHARED_OPENING <= known:
                opening = step.opening(request, SHARED_OPENING)
                if opening in openings:
                    later.add(request.id)
                else:
                    openings.add(opening)
        last = float("inf")
        if order == "lpm":
            waiting.sort(key=lambda r: last if r.id in later else -hits[r.id])
        elif order == "hrrn":

            def ratio(request: Request) -> tuple[float, str]:
                if request.id in later:
                    return last, str(request.id)
                todo = max(0, request.prompt_tokens - hits[request.id])
                waited = max(0, self._processed - self._entered[request.id][1])
                return (-last if todo <= 0 else -waited / todo), str(request.id)

            waiting.sort(key=ratio)
        else:
            waiting = _by_subtree(waiting, nodes)
        step.reorder(waiting)


def _prefill_graphs(tokens: int) -> int:
    """CUDA graphs of prompts, one for each size (`generate_prefill_cuda_graph_batch_sizes`)."""
    steps = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256), (4608, tokens, 512))
    return sum(len(range(first, min(last, tokens) + 1, step)) for first, last, step in steps)


def _slots(pool_tokens: int, context: int) -> int:
    """SGLang's `max_running_requests` if none is given."""
    return max(1, min(max(2048, min(int(pool_tokens / context * 512), MOST_REQUESTS)), pool_tokens // 2))


def _by_subtree(waiting: list[Request], nodes: dict[int, PrefixNode]) -> list[Request]:
    """The waiting requests in a walk of the radix tree, the subtree with most of them first, a node's own last."""
    if not waiting:
        return []
    at: dict[int, list[Request]] = {}
    for request in waiting:
        at.setdefault(id(nodes[request.id]), []).append(request)
    root = nodes[waiting[0].id]
    while root.parent is not None:
        root = root.parent
    weight: dict[int, int] = {}
    walk = [root]
    for node in walk:
        walk.extend(node.children.values())
    for node in reversed(walk):
        weight[id(node)] = len(at.get(id(node), ())) + sum(weight[id(child)] for child in node.children.values())
    order: list[Request] = []
    stack = [(root, False)]
    while stack:
        node, left = stack.pop()
        if left:
            order.extend(at.get(id(node), ()))
            continue
        stack.append((node, True))
        children = sorted(node.children.values(), key=lambda child: -weight[id(child)])
        stack.extend((child, False) for child in reversed(children))
    return order
