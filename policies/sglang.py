"""SGLang's scheduler: prompts before decodes, the longest cached prefix first, a running guess of memory, retraction.

Source: Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024, for the order;
`python/sglang/srt/managers/{scheduler,schedule_batch,schedule_policy}.py` of SGLang 0.4 for the rest. Not modelled:
overlap scheduling, in-batch prefix priority, prefixes shorter than the scenario's ``kv.block_size`` (its page size).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chairlift.policies.base import FOREVER, NotNegativeFloat, Positive, Request, Scheduler, Step

CLIP = 4096  # output tokens that a request is reckoned with at most (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)
FIRST_RATIO, LEAST_SHARE, DECAY_STEPS = 0.7, 0.14, 600  # of the guess: at first, its floor as a share of that, steps
RETRACT_STEPS = 20  # steps of room that a retraction makes
LPM_LIMIT = 128  # waiting requests beyond which the order is first come, first served


@dataclass
class Sglang(Scheduler):
    """Prefill first, in chunks, those with the longest prefix in the cache before others; decode when nobody can start.

    Requests start while a share of the output that they may still produce has room, a share that falls as long as the
    guess holds. It gives up the gaps between tokens to prompts, and fairness to requests whose prefix is not cached.
    """

    not_modelled: ClassVar[dict[str, str]] = {
        "page_size": "page_size here: it is the scenario's kv.block_size",
        "mem_fraction_static": "memory here: it is kv.memory_utilization",
        "disable_overlap_schedule": "overlap scheduling: steps are planned one after the other",
        "speculative_algorithm": "speculative decoding",
        "enable_hierarchical_cache": "cache tiers",
    }

    schedule_policy: Literal["lpm", "fcfs"] = "lpm"
    schedule_conservativeness: NotNegativeFloat = 1.0
    chunked_prefill_size: Positive = 8192  # tokens of prompts a step
    max_prefill_tokens: Positive = 16384  # a second limit of the same, for whole prompts
    max_running_requests: Positive = 256
    enable_mixed_chunk: bool = False  # decodes go along with prompts
    disable_radix_cache: bool = False

    _full: bool = field(default=False, init=False, repr=False)  # nobody more fits until somebody leaves
    _running: int = field(default=0, init=False, repr=False)  # at the last plan
    _ratio_from: float = field(default=0.0, init=False, repr=False)
    _ratio_at: int = field(default=0, init=False, repr=False)  # decode step at which it was that

    def __post_init__(self) -> None:
        self._ratio_from = min(1.0, FIRST_RATIO * self.schedule_conservativeness)
        self._least = self._ratio_from * LEAST_SHARE
        self._decay = (self._ratio_from - self._least) / DECAY_STEPS

    @property
    def prefix_caching(self) -> bool:
        """Unless `disable_radix_cache`."""
        return not self.disable_radix_cache

    @property
    def sequence_limit(self) -> int:
        """As `max_running_requests` says."""
        return self.max_running_requests

    def schedule(self, step: Step) -> int:
        """A step of prompts if any can go on or start, else one of decodes."""
        if len(step.running) < self._running:
            self._full = False
        if self._prefill(step):
            if self.enable_mixed_chunk:
                self._decode(step)
            vouched = 1
        else:
            vouched = 1 if self._decode(step) else FOREVER
        self._running = len(step.running)
        return vouched

    def heeds_arrival(self, step: Step) -> bool:
        """A full batch hears nothing."""
        return not self._full and len(step.running) < self.max_running_requests

    def _ratio(self, step: Step) -> float:
        """Share of the output still allowed to the running that is reckoned with."""
        return max(self._least, self._ratio_from - self._decay * (step.decode_steps - self._ratio_at))

    def _prefill(self, step: Step) -> bool:
        """Go on with the prompt cut off last, then start others; whether anything was planned."""
        room = min(self.chunked_prefill_size, self.max_prefill_tokens)
        planned = False
        for request in step.prefilling:
            tokens = min(request.remaining, room)
            if tokens and step.run(request, tokens):
                room -= tokens
                planned = True
        if self._full or not step.waiting or len(step.running) >= self.max_running_requests:
            return planned
        ratio = self._ratio(step)
        tokens_left = step.free_blocks * step.block_size
        left = tokens_left - sum(ratio * min(r.max_tokens - r.emitted, CLIP) for r in step.running)
        for request in self._ordered(step):
            known, cached = request.remaining, step.cached_tokens(request)
            total = known - cached + min(max(0, request.max_tokens - request.emitted), CLIP)
            alone = not step.running
            if (total >= left and not alone) or len(step.running) >= self.max_running_requests:
                self._full = True
                break
            tokens = min(known - cached, room)
            if tokens < 1:
                break
            if not step.fits(request, known) or not step.admit(request, tokens, reserve=known):
                self._full = bool(step.running)
                break
            room -= tokens
            left -= total
            planned = True
        return planned

    def _ordered(self, step: Step) -> list[Request]:
        waiting = list(step.waiting)
        if self.schedule_policy == "fcfs" or not self.prefix_caching or len(waiting) > LPM_LIMIT:
            return waiting
        return sorted(waiting, key=lambda r: -step.cached_tokens(r))

    def _decode(self, step: Step) -> bool:
        """Decode everyone; if that has no room, retract until some steps have; whether anybody was retracted."""
        if step.decode_all():
            return False
        # the fewest tokens of answer go first, and of equals the longest prompt
        keep = sorted(
            (r for r in step.running if r.decoding), key=lambda r: (r.emitted, -r.prompt_tokens), reverse=True
        )
        first = True
        while len(keep) > 1 and (first or step.free_blocks * step.block_size < len(keep) * RETRACT_STEPS):
            first = False
            step.preempt(keep.pop())
        while not step.decode_all():
            step.preempt(keep.pop())
        emitted = sum(r.emitted for r in keep)
        allowed = max(1, sum(r.max_tokens for r in keep))
        self._ratio_from = min(1.0, (emitted + RETRACT_STEPS * len(keep)) / allowed)
        self._ratio_at = step.decode_steps
        self._full = False
        return True
