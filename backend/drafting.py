"""What drafting costs: the layers that guess the next tokens, beside the steps that verify their guesses.

After a step, the drafting layers pass over all of its tokens, which fills their KV and gives the first draft of each
request; each further draft takes a pass over one token of each request. Source: vLLM 0.33,
`vllm/v1/worker/gpu/spec_decode` (EAGLE, MTP, draft models).

A pass also takes what does not shrink with its work: preparing it, sampling its tokens, and its part of the rejection
sampler. `Shares.draft_us` is measured: vLLM 0.26 on an H200 took 6.30 ms for a decode of Llama-3.1-8B with 3 drafts of
an EAGLE3 head, 4.79 without; of those 1.51 ms the parts that are priced explain 0.64, which leaves 290 µs a pass.

A profile of an engine with drafts has all of that measured. One of an engine without prices the verification, and the
passes are priced apart, as beside the roofline; each takes the host `LAUNCH_US` to launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from chairlift.backend.automatic import Auto
from chairlift.backend.base import WHOLE, Backend, Batch, Settings, StepCost
from chairlift.backend.calibrated.pricing import LAUNCH_US, Calibrated
from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.calibrated.settings import Settings as Profiled
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GPU, Model

OF_A_STEP = (
    "floor_ms",
    "overhead_ms",
    "step_ms",
    "request_us",
    "prepare_ms",
)  # settings that hold once for a step, not for each pass


@dataclass(frozen=True)
class WithDrafts:
    """The backend of ``settings`` with a ``draft`` model beside the one served; None: drafts cost nothing.

    ``drafts``: how an engine speculates, by which a profile of such an engine is known. Its steps hold the drafting.
    """

    settings: Settings
    draft: Model | None
    drafts: Drafts

    @property
    def executes(self) -> bool:
        """Whether steps, and passes with them, really run instead of being priced."""
        return bool(getattr(self.settings, "executes", False))

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """The cost model. Raises ValueError as that of ``settings`` does, and where that cannot price drafts."""
        settings: Any = self.settings
        if self.executes:
            executor: Backend = settings.build(model, gpu, parallel, self.draft, self.drafts.tokens)
            return executor
        if isinstance(settings, Auto):
            settings = settings.settings(model, gpu, parallel, self.drafts)
        if isinstance(settings, Profiled):
            return self._profiled(settings.build(model, gpu, parallel, self.drafts), gpu, parallel)
        backend = settings.build(model, gpu, parallel)
        if not backend.prices_drafts:
            raise ValueError(f"{backend.name} does not price the verification of drafts: use roofline")
        if self.draft is None:
            return Drafting(backend)
        known = {field.name for field in fields(settings)}
        own = {name: 0.0 for name in OF_A_STEP if name in known}
        each = round(getattr(settings, "draft_us", 0.0) * 10**6)
        return Drafting(backend, self._passes(replace(settings, **own), gpu, parallel), self.draft.name, each)

    def _profiled(self, target: Calibrated, gpu: GPU, parallel: Parallel) -> Backend:
        """``target``, whose steps hold the passes or else get them: priced by the roofline, launched as measured."""
        if target.profile.drafts is not None:
            return target
        if self.draft is None:
            return Drafting(target)
        by_part = Efficiency(by_part=True, step_ms=0.0, request_us=0.0, prepare_ms=0.0)
        passes = self._passes(by_part, gpu, parallel)
        return Drafting(target, passes, self.draft.name, round(by_part.draft_us * 10**6), LAUNCH_US * 10**6)

    def _passes(self, settings: Settings, gpu: GPU, parallel: Parallel) -> Backend:
        """What prices the passes of the draft: without experts each rank of DP-attention has a draft of its own.

        Of the stages of a pipeline the last one does them all (`sim.replica.stages`).
        """
        assert self.draft is not None
        parallel = replace(parallel, pipeline=1)
        if self.draft.experts or (parallel.data, parallel.expert) == (1, 1):
            return settings.build(self.draft, gpu, parallel)
        return EachRank(settings.build(self.draft, gpu, Parallel(parallel.tensor)), parallel.data)


class EachRank(Backend):
    """Steps of ``ranks`` ranks that share nothing: the slowest tells."""

    def __init__(self, one: Backend, ranks: int) -> None:
        self.one, self.ranks, self.name = one, ranks, one.name

    def step(self, batch: Batch) -> StepCost:
        """That of the rank with most of ``batch``, which is spread evenly: of the chunks every so many-th by length."""
        longest = sorted(batch.prefills, key=lambda chunk: -chunk.length)
        decodes, drafts, padded = (-(-n // self.ranks) for n in (batch.decodes, batch.drafts, batch.padded))
        context = batch.context * decodes // max(1, batch.decodes)
        return self.one.step(Batch(tuple(longest[:: self.ranks]), decodes, context, padded, None, drafts))

    def together(self, batches: Sequence[Batch]) -> StepCost:
        """The slowest of the ranks' own."""
        return self.one.together(batches)


def _further(batch: Batch) -> Batch:
    """The pass after the first over the requests of ``batch``: a token of each."""
    context = batch.context + sum(chunk.start + chunk.length for chunk in batch.prefills)
    return Batch((), batch.decodes + len(batch.prefills), context)


class Drafting(Backend):
    """Prices steps as ``target`` does, and the passes of the ``draft`` after them; None: those cost nothing.

    ``called``: the drafting model's name. ``each``: ps of a pass besides; ``launch``: of the host, to launch it.
    """

    prices_drafts = True

    def __init__(
        self, target: Backend, draft: Backend | None = None, called: str = "", each: int = 0, launch: int = 0
    ) -> None:
        self.target, self.draft, self._called, self._each, self._launch = target, draft, called, each, launch
        self.name = target.name
        self.arrival, self.arrival_token = target.arrival, target.arrival_token
        self.remembers = target.remembers

    def ran(self, tokens: int, gpu: int, slope: int, count: int) -> None:
        """Tell the target's cost model what ran; passes that draft are no prompts."""
        self.target.ran(tokens, gpu, slope, count)

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch`` and of the `Batch.proposes` drafts after it."""
        cost = self.target.step(batch)
        if self.draft is None or not batch.proposes:
            return cost
        further = self.draft.step(_further(batch)).first if batch.proposes > 1 else 0
        return self._with_passes(cost, self.draft.step(batch).first, further, batch.proposes)

    def together(self, batches: Sequence[Batch]) -> StepCost:
        """As `step`, of a step of all ranks; a rank passes over its tokens as often as any other."""
        cost, proposes = self.target.together(batches), max(batch.proposes for batch in batches)
        if self.draft is None or not proposes:
            return cost
        further = self.draft.together([_further(batch) for batch in batches]).first if proposes > 1 else 0
        return self._with_passes(cost, self.draft.together(batches).first, further, proposes)

    def _with_passes(self, cost: StepCost, first: int, further: int, passes: int) -> StepCost:
        """``cost`` and that of ``passes`` passes: ``first`` ps of the first one, ``further`` of each after it."""
        host = cost.host
        if self._launch:  # the GPU works off the step, which is launched first, meanwhile
            head, tail = (host.launch, 0) if host.tail == WHOLE else (host.head, host.tail)
            host = host._replace(launch=host.launch + passes * self._launch, head=head, tail=tail)
        return StepCost(cost.first + first + (passes - 1) * further + passes * self._each, 0, 1, host)

    def assumptions(self) -> dict[str, str]:
        """Those of the cost model within, and what drafting costs."""
        said = "drafts cost nothing"
        if self.draft is not None:
            one = (self.draft.step(Batch((), 1, 1)).first + self._each) / 1e9
            said = f"a pass of {self._called} takes {one:.2f} ms at least, one for each draft"
        return {**self.target.assumptions(), "drafting": said}
