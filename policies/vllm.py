"""vLLM's V1 scheduler, decision for decision: paged growth, one token budget, recompute preemption, prefix caching.

Equal to the `Scheduler` and `AsyncScheduler` of vLLM 0.23 to 0.33 (`tests/ledger.py` replays their ledgers);
`policies.vllm_versions` says by which rules they differ. Sources: Kwon et al., SOSP 2023, for paging;
`vllm/v1/core/sched/scheduler.py` for the order of things.

Not modelled, and refused as settings: what `Vllm.not_modelled` lists, and what the version at hand lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval

from chairlift.policies.base import (
    FOREVER,
    Deployment,
    HybridCache,
    NotNegative,
    Positive,
    Request,
    Scheduler,
    Speculation,
    Step,
)
from chairlift.policies.vllm_versions import NEWEST, RULES, SETTINGS, named

GIB = 2**30


@dataclass
class Vllm(Scheduler):
    """Serve running requests first under one token budget, then admit; preempt when blocks run out.

    Settings bear vLLM's names and its server's defaults; `sized` says which of them depend on the GPU. ``block_size``
    and ``num_gpu_blocks`` override the scenario's ``kv``; of ``num_gpu_blocks`` one is vLLM's null block.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "enable_lora": "LoRA adapters",
        "max_loras": "LoRA adapters",
        "speculative_config": "drafts here: they are the scenario's speculate",
        "num_speculative_tokens": "drafts here: they are the scenario's speculate",
        "num_lookahead_slots": "drafts here: they are the scenario's speculate",
        "kv_transfer_config": "KV connectors and offloading",
        "kv_connector": "KV connectors and offloading",
        "cpu_offload_gb": "KV connectors and offloading",
        "swap_space": "swapping: V1 only recomputes",
        "preemption_mode": "swapping: V1 only recomputes",
        "max_num_encoder_input_tokens": "multimodal encoders and their budget",
        "encoder_cache_size": "multimodal encoders and their budget",
        "limit_mm_per_prompt": "multimodal encoders and their budget",
        "max_num_partial_prefills": "concurrent partial prefills, which V1 takes as a setting only",
        "max_long_partial_prefills": "concurrent partial prefills, which V1 takes as a setting only",
        "num_scheduler_steps": "multi-step scheduling of V0",
        "pipeline_parallel_size": "parallelism here: it is the scenario's parallel.pipeline",
        "data_parallel_size": "parallelism here: it is the scenario's parallel.data",
        "decode_context_parallel_size": "context parallelism",
        "prefill_context_parallel_size": "context parallelism",
        "mamba_cache_mode": "Mamba and other layers without attention",
        "kv_cache_dtype": "quantised KV: give the model's kv_bytes_per_element instead",
        "prefix_caching_hash_algo": "hash collisions",
        "scheduler_cls": "schedulers of vLLM's users: write a policy",
        "scheduler_delay_factor": "the delay factor of V0",
        "structured_outputs_config": "structured outputs",
        "enforce_eager": "CUDA graphs: a matter of the cost model, not of the scheduler",
        "gpu_memory_utilization": "memory here: it is kv.memory_utilization",
        "max_model_len": "the model's length here: it is the scenario's max_model_len",
        "tensor_parallel_size": "parallelism here: it is the scenario's tensor_parallel",
    }

    fills_pipelines: ClassVar[bool] = True
    verifies_drafts: ClassVar[bool] = True
    switched: ClassVar[Mapping[str, bool]] = {}  # rules of `RULES` that hold, or not, whatever the version

    version: str | float = NEWEST  # of vLLM, by whose rules it decides: 0.23 … 0.33
    max_num_batched_tokens: Positive = 2048  # tokens a step
    max_num_seqs: Positive = 256
    block_size: Positive | None = None
    num_gpu_blocks: Annotated[int, Ge(2)] | None = None  # one of them is the null block
    enable_chunked_prefill: bool = True  # False: a prompt that exceeds the budget left waits for the next step
    long_prefill_token_threshold: NotNegative = 0  # tokens of one prompt a step; 0: no limit
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    scheduler_reserve_full_isl: bool = True  # admit only where all known tokens would fit
    enable_prefix_caching: bool = True
    disable_hybrid_kv_cache_manager: bool = False  # layers with windows keep KV as all others
    prefix_cache_retention_interval: NotNegative | Literal["dense"] | None = None  # see `hybrid`
    async_scheduling: bool = True  # plan step n+1 before step n's output is in
    watermark: Annotated[float, Interval(ge=0, lt=1)] = 0.0  # of all blocks stay free when a request joins others
    max_num_scheduled_tokens: Positive | None = None  # tokens a step, if fewer than max_num_batched_tokens
    max_num_active_seqs: Positive | None = None  # requests that may run; None: max_num_seqs
    long_prefill_token_threshold_adaptive: bool = False  # the threshold is at least an equal share of the budget
    prefill_schedule_interval: Positive = 1  # steps from one with prefill to the next, while others decode
    max_num_queued_reqs: NotNegative | None = None  # unfinished requests, at which new ones are refused
    max_num_queued_tokens: NotNegative | None = None  # tokens of prompts not computed yet, at which they are refused

    def __post_init__(self) -> None:
        self.version = version = named(self.version)
        for name, rule in SETTINGS.items():
            if not rule.holds(version) and getattr(self, name, None) != getattr(type(self), name, None):
                raise ValueError(f"{name} exists {rule.span()} (version is {version})")
        self._by_priority = self.scheduling_policy == "priority"
        self._budget = min(self.max_num_batched_tokens, self.max_num_scheduled_tokens or self.max_num_batched_tokens)
        self._limit = min(self.max_num_seqs, self.max_num_active_seqs or self.max_num_seqs)
        self._uncapped_alone = self.holds("uncapped_alone", version)
        self._any_victim_shifts = self.holds("any_victim_shifts", version)
        self._on_after_itself = self.holds("on_after_itself", version)
        # Where blocks without a hash are reused first, it matters that the first decodes take their blocks before a
        # victim gives its own back: the running then take their turns one by one. So they do where layers have windows,
        # because those before the victim give blocks back as well.
        self._one_by_one = self.enable_prefix_caching and self.uncached_first
        self._threshold = self.long_prefill_token_threshold  # as it counts in the step at hand
        self._cadence = Cadence(self.prefill_schedule_interval) if self.prefill_schedule_interval > 1 else None

    @classmethod
    def holds(cls, rule: str, version: str) -> bool:
        """Whether ``version`` has the rule of `RULES`, unless a subclass has `switched` it to see what it does."""
        return cls.switched.get(rule, RULES[rule].holds(version))

    @classmethod
    def refused(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """What is not modelled, and what the version lacks."""
        found = super().refused(given)
        try:
            version = named(given.get("version", NEWEST))
        except ValueError:
            return found  # `__post_init__` says so
        for name in given.keys() & SETTINGS.keys():
            if not SETTINGS[name].holds(version):
                found[name] = f"exists {SETTINGS[name].span()}, and the version is {version}"
        return found

    @classmethod
    def sized(cls, given: Mapping[str, Any], deployment: Deployment) -> dict[str, Any]:
        """Budget and sequences as vLLM's API server sets them: `EngineArgs.get_batch_defaults` and what follows it."""
        version = named(given.get("version", NEWEST))
        if deployment.gpu_bytes >= 160 * GIB and cls.holds("largest_gpus", version):
            tokens, sequences = 16384, 1024
        elif deployment.gpu_bytes >= 70 * GIB and "a100" not in deployment.gpu.lower():
            tokens, sequences = 8192, 1024
        else:
            tokens, sequences = 2048, 256
        if not given.get("enable_chunked_prefill", True):
            tokens = max(tokens, deployment.max_model_len)
        sequences = given.get("max_num_seqs", sequences)
        tokens = given.get("max_num_batched_tokens", min(tokens, sequences * deployment.max_model_len))
        sequences = given.get("max_num_seqs", min(sequences, tokens))
        return {**given, "version": version, "max_num_batched_tokens": tokens, "max_num_seqs": sequences}

    def assumptions(self) -> dict[str, str]:
        """The version, and the limits that its server sizes by the GPU."""
        limits = f"at most {self._budget} tokens and {self._limit} requests a step"
        return {"scheduler": f"vLLM {self.version}, {limits}"}

    @property
    def uncached_first(self) -> bool:
        """Since 0.24."""
        return self.holds("uncached_first", str(self.version))

    @property
    def asynchronous(self) -> bool:
        """As `async_scheduling` says."""
        return self.async_scheduling

    @property
    def prefix_caching(self) -> bool:
        """As `enable_prefix_caching` says."""
        return self.enable_prefix_caching

    @property
    def hybrid(self) -> HybridCache | None:
        """With `prefix_cache_retention_interval`: ``dense`` is vLLM's null; None: 0 since 0.29, before that dense."""
        if self.disable_hybrid_kv_cache_manager:
            return None
        version = str(self.version)
        retention = self.prefix_cache_retention_interval
        if retention is None:
            retention = 0 if self.holds("retains_little", version) else "dense"
        in_flight = self.max_num_batched_tokens * (2 if self.async_scheduling else 1)
        null_counts = not self.holds("null_block_apart", version)
        return HybridCache(in_flight, None if retention == "dense" else retention, null_counts)

    @property
    def token_limit(self) -> int:
        """Tokens a step."""
        return self._budget

    @property
    def sequence_limit(self) -> int:
        """As `max_num_seqs` and `max_num_active_seqs` say."""
        return self._limit

    @property
    def pool_blocks(self) -> int | None:
        """`num_gpu_blocks` without vLLM's null block."""
        return None if self.num_gpu_blocks is None else self.num_gpu_blocks - 1

    @property
    def pool_block_size(self) -> int | None:
        """As `block_size` says."""
        return self.block_size

    def misfits(self, deployment: Deployment) -> Iterator[tuple[str, str]]:
        """vLLM's own checks, by which it does not start: `SchedulerConfig.verify_max_model_len`, and
        `_check_enough_kv_cache_memory`, by which one request of ``max_model_len`` tokens must fit the pool.

        Without chunks a sequence must fit a step, or it can never be computed again after a preemption.
        """
        tokens, longest = self.max_num_batched_tokens, deployment.max_model_len
        if not self.enable_chunked_prefill and tokens < longest:
            rule = f"must be at least the model's {longest} tokens without chunked prefill (got {tokens})"
            yield "max_num_batched_tokens", rule
        if tokens < self.max_num_seqs:
            yield "max_num_batched_tokens", f"must be at least max_num_seqs, {self.max_num_seqs} (got {tokens})"
        if (active := self.max_num_active_seqs or 0) > self.max_num_seqs:
            yield "max_num_active_seqs", f"must be at most max_num_seqs, {self.max_num_seqs} (got {active})"
        if (threshold := self.long_prefill_token_threshold) > longest:
            yield "long_prefill_token_threshold", f"must be at most max_model_len, {longest} (got {threshold})"
        if (pool := deployment.pool_tokens) is not None and longest > pool:
            yield "max_model_len", f"must be at most the {pool} tokens that the KV pool holds (got {longest})"

    def speculation(self, method: str, drafts: int) -> Speculation:
        """Slots ahead for layers that draft (`num_lookahead_tokens`). For those of EAGLE and MTP, which read states of
        the model, the prefix cache looks a token ahead (`num_hash_lookahead_tokens`), or gives a block less.
        """
        lookahead = 0 if method == "ngram" else drafts
        if method not in ("eagle3", "mtp") or not self.enable_prefix_caching:
            return Speculation(drafts, lookahead)
        ahead = self.holds("hashes_ahead", str(self.version))
        return Speculation(drafts, lookahead, prefix="lookahead" if ahead else "drop")

    @property
    def limits_arrivals(self) -> bool:
        """With either limit of the queue."""
        return self.max_num_queued_reqs is not None or self.max_num_queued_tokens is not None

    def turns_away(self, unfinished: int, prompt_tokens: int) -> bool:
        """`AsyncLLM.check_admission`, with an API server for each replica."""
        requests, tokens = self.max_num_queued_reqs, self.max_num_queued_tokens
        return (requests is not None and unfinished >= requests) or (tokens is not None and prompt_tokens >= tokens)

    def schedule(self, step: Step) -> int:
        """Running first, in order; then the head of the queue, unless somebody was preempted."""
        unfinished = step.prefilling
        if self.long_prefill_token_threshold:
            self._threshold = self._cap(len(step.running) + len(step.waiting))
        cadence = self._cadence
        held = cadence is not None and cadence.holds(step, len(step.running) > len(unfinished))
        budget = self._budget
        decodes = step.decodes
        preempted = prefills = False
        alone = held or not unfinished  # decodes are all that there is to run
        # whether the running always take their turns one by one
        one_each = self._by_priority or step.stages > 1 or step.speculation is not None
        in_one_go = decodes <= budget and not one_each and (alone or _in_one_go(step, unfinished))
        granted = in_one_go and step.decode_all()
        if granted and alone:
            budget -= decodes  # by far the most common step
        elif granted or (in_one_go and not held and not (self._one_by_one or step.windowed)):
            budget, preempted, prefills = self._run_all(step, budget, granted)
        else:
            budget, preempted, prefills = self._run_each(step, budget, {r.id for r in unfinished}, held)
        if not preempted:
            budget, admitted = self._admit(step, budget, held, prefills)
            prefills |= admitted
            if cadence is not None and not held:
                cadence.saturated = bool(step.waiting)
        if cadence is not None:
            cadence.planned(budget < self._budget, prefills)
            if held:
                return 1 if preempted else cadence.left()
        return 1 if preempted else FOREVER

    def _cap(self, requests: int) -> int:
        """The threshold that counts in a step with so many requests; 0: none."""
        if requests <= 1 and self._uncapped_alone:
            return 0
        if self.long_prefill_token_threshold_adaptive:
            return max(self.long_prefill_token_threshold, self.max_num_batched_tokens // max(1, requests))
        return self.long_prefill_token_threshold

    def _admit(self, step: Step, budget: int, held: bool, beside: bool) -> tuple[int, bool]:
        """Admit the head of the queue for as long as it fits: budget left, whether anybody had a prompt to compute.

        ``held``: nobody who has may join. ``beside``: prompts of the running are computed in the step.
        """
        waiting, running, whole = step.waiting, step.running, self.scheduler_reserve_full_isl
        prefills = False
        staged = step.stages > 1
        padding = 0 if beside else self._padding(step.speculation)
        joins = budget < self._budget  # some of the running are in the step
        place = 0  # behind those that were preempted while in flight, and still are
        while len(waiting) > place and budget > 0 and len(running) < self._limit:
            request = waiting[place]
            if staged and not step.ready(request):
                place += 1
                continue
            known = request.remaining
            left = tokens = known - step.cached_tokens(request)
            if held and left > 1:
                break
            if padding and left == 1 and (joins or known > 1) and known + padding < step.max_model_len:
                tokens += padding
                if tokens > budget:
                    break
            if 0 < self._threshold < tokens:
                tokens = self._threshold
            if tokens > budget:
                if not self.enable_chunked_prefill:
                    break
                tokens = budget
            spare = 0
            if self.watermark and running:
                spare = int(self.watermark * (step.total_blocks + 1))  # vLLM counts its null block
            if tokens < left and whole and not step.fits(request, known, spare):  # else `admit` asks for just this room
                break
            if not step.admit(request, tokens, spare=spare):
                break
            budget -= tokens
            prefills |= left > 1
        return budget, prefills

    def _padding(self, speculation: Speculation | None) -> int:
        """Drafts that are made up for a request that joins with one token to compute, as wide as the decodes then."""
        if speculation is None or speculation.by_batch or not self.holds("pads_joining", str(self.version)):
            return 0
        return speculation.drafts

    def heeds_arrival(self, step: Step) -> bool:
        """Behind a blocked head of the queue, or a full batch, nobody joins."""
        if self._cadence is not None or self.long_prefill_token_threshold_adaptive:
            return True  # that somebody waits changes how others are served
        if len(step.running) >= self._limit:
            return False
        return not step.waiting or self._by_priority

    def order(self, request: Request) -> Any:
        """Priority, if that is the policy; ties go to the earlier arrival."""
        return request.priority

    def sorts(self) -> bool:
        """Only under the priority policy."""
        return self._by_priority

    def _chunk(self, tokens: int, budget: int) -> int:
        threshold = self._threshold
        if 0 < threshold < tokens:
            tokens = threshold
        return tokens if tokens < budget else budget

    def _run_all(self, step: Step, budget: int, granted: bool) -> tuple[int, bool, bool]:
        """All decodes, then the prompts: budget left, whether anybody was preempted, whether any prompt is computed.

        ``granted``: the decodes are planned already.
        """
        preempted = prefills = False
        while not granted:
            step.preempt(_last(step))
            preempted = True
            granted = step.decode_all()
        budget -= step.decodes
        gone: set[int] = set()
        for request in step.prefilling:
            tokens = self._chunk(request.remaining, budget)
            if tokens == 0 or request.id in gone:
                break
            while not step.run(request, tokens):
                victim = _last(step)
                step.preempt(victim)
                gone.add(victim.id)
                if victim is request:
                    return budget, True, prefills
            prefills = True
            budget -= tokens
        return budget, preempted or bool(gone), prefills

    def _run_each(self, step: Step, budget: int, unfinished: set[int], held: bool) -> tuple[int, bool, bool]:
        """vLLM's loop as it stands, its index too; returns what `_run_all` does.

        ``held``: those of ``unfinished`` are passed over. Until 0.27, a victim that the loop has passed over (its last
        token is under way) does not move the index back, so that whoever comes after the request at hand is passed
        over as well.
        """
        running = list(step.running)
        planned: dict[int, int] = {}
        preempted = prefills = False
        staged = step.stages > 1
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            index += 1
            if held and request.id in unfinished:
                continue
            if staged and not step.ready(request):
                continue
            tokens = self._chunk(request.remaining, budget)
            if step.speculation is not None:  # drafts may reach beyond what the model can hold
                tokens = min(tokens, step.max_model_len - 1 - request.computed)
            if tokens == 0:
                continue
            while not step.run(request, tokens):
                victim = self._victim(step)
                at = running.index(victim)
                del running[at]
                if victim.id in planned or (self._any_victim_shifts and at < index - 1):
                    budget += planned.pop(victim.id, 0)
                    index -= 1
                step.preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                planned[request.id] = tokens
                budget -= tokens
                prefills |= request.id in unfinished
                continue
            if not (self._on_after_itself and self._by_priority):
                break
            index -= 1  # the next one has moved to its place
        return budget, preempted, prefills

    def _victim(self, step: Step) -> Request:
        if self._by_priority:
            return max(step.running, key=lambda r: (r.priority, r.arrival, r.id))
        return _last(step)


class Cadence:
    """When prompts may be computed again under `Vllm.prefill_schedule_interval`, in executed steps.

    In three steps, with an interval of 3: step 1 computes a prompt; steps 2 and 3 are held to decodes; step 4 may
    compute prompts again. Nothing is held while nobody decodes, nor after a step that was not held left somebody
    waiting.
    """

    def __init__(self, interval: int) -> None:
        self.saturated = False  # the latest step that was not held left somebody waiting
        self._interval = interval
        self._steps = 0  # executed before the plan at hand
        self._prefilled = -interval  # the latest of them that computed part of a prompt
        self._decoded = 0  # the replica's decode steps by then
        self._ran = False  # the latest plan ran something

    def holds(self, step: Step, decodes: bool) -> bool:
        """Whether the plan at hand is held to decodes; ``decodes``: somebody decodes."""
        done = step.decode_steps
        self._steps += done - self._decoded or self._ran  # a plan with decodes may have run many times
        self._decoded = done
        return decodes and not self.saturated and self.left() > 0

    def left(self) -> int:
        """Steps that are to be held, from the one at hand on."""
        return self._prefilled + self._interval - self._steps - 1

    def planned(self, runs: bool, prefills: bool) -> None:
        """Whether the plan at hand runs something, and whether it computes part of a prompt."""
        self._ran = runs
        if prefills:
            self._prefilled = self._steps + runs


def _in_one_go(step: Step, unfinished: Sequence[Request]) -> bool:
    """Whether the order of the running cannot matter but for who is preempted, the last admitted.

    So it is where all decodes fit the budget and whoever lacks prompt tokens was admitted after all of them.
    """
    return all(map(is_, reversed(unfinished), reversed(step.running)))


def _last(step: Step) -> Request:
    """The request admitted last."""
    return next(reversed(step.running))
