"""The settings of the roofline: what share of the peaks an engine reaches, and what does not shrink with the work."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Le

from chairlift.backend import hosts

Share = Annotated[float, Interval(gt=0, le=1)]
_WHOLE = ("mixed_overlap", "link", "allreduce_us")  # settings that count where a step is priced as a whole,
_LINKED = ("link", "allreduce_us")  # these of them on several GPUs;
_PARTS = ("gemm_mfu", "kernel_us", "attention_us", "skew", "expert_rows")  # where it is priced by part,
_EXPERTS = ("skew", "expert_rows")  # these of them for models with experts


@dataclass(frozen=True)
class Shares:
    """How far below the data sheet a real engine stays; "by part" and "whole": where a step is priced so only."""

    mfu: Share = 0.55  # of the peak FLOP/s, prompt work (0.4–0.7 is usual)
    bandwidth: Share = 0.80  # of the HBM bandwidth, reading weights and KV (0.6–0.9 is usual)
    link: Share = 0.70  # of one direction of the links, all-reduce
    mixed_overlap: Annotated[float, Interval(ge=0, le=1)] = 0.5  # of the shorter of prompt and decode work
    host: Literal["vllm-0.26", "vllm-0.23", "chairlift-0.1", "none"] = "vllm-0.26"  # whose process no step outruns
    step_ms: Annotated[float, Ge(0)] | None = None  # no step of decodes is shorter; None: as of ``host``, also below
    request_us: Annotated[float, Ge(0)] | None = None  # nor shorter than so much more for each of its requests
    prepare_ms: Annotated[float, Ge(0)] | None = None  # nor a step with prompts than so much,
    launch_us: Annotated[float, Ge(0)] | None = None  # and than so much more for each layer;
    eager_us: Annotated[float, Ge(0)] | None = None  # beyond the graphs than so much; experts take as much again
    floor_ms: Annotated[float, Ge(0)] = 0.0  # no step at all is shorter
    overhead_ms: Annotated[float, Ge(0), Le(1e6)] = 0.0  # host time added to every step
    allreduce_us: Annotated[float, Ge(0)] = 8.0  # latency of one all-reduce, tensor parallelism only
    by_part: bool | None = (
        None  # None: but for a dense model of one width on one GPU; false: or on several, if it can be
    )
    gemm_mfu: Share = 0.70  # by part: of the peak FLOP/s, products with weights but experts' (0.80 measured on H200)
    kernel_us: Annotated[float, Ge(0)] = 3.0  # by part: of each kernel, besides its work
    attention_us: Annotated[float, Ge(0)] = 0.25  # by part: of each sequence and layer, besides its work
    graph_tokens: Annotated[int, Ge(0)] = 512  # of the largest captured graph
    draft_us: Annotated[float, Ge(0)] = 290.0  # of each pass that drafts, besides its work (see `drafting`)
    skew: Annotated[float, Interval(ge=0, le=4)] = 0.0  # by part: of the experts' popularity, a power law; 0: uniform
    expert_rows: Annotated[int, Ge(1)] = 1  # by part: to which a kernel pads each expert's tokens; DeepGEMM: 128

    def pace(self, gpus: int) -> hosts.Pace:
        """What a step takes the host of a replica of ``gpus``: that of ``host``, and what is set beside."""
        own = {each.name: getattr(self, each.name) for each in fields(hosts.Pace)}
        return replace(hosts.pace(self.host, gpus), **{name: value for name, value in own.items() if value is not None})

    def unused(self, by_part: bool, several: bool, experts: bool) -> str:
        """``; not used: link 0.5`` where settings differ from their defaults and change nothing; else "".

        ``by_part``: how steps are priced; ``several``: on more than one GPU; ``experts``: the model has some.
        """
        if by_part:
            idle = {*_WHOLE, *(() if experts else _EXPERTS), *(("by_part",) if self.by_part is False else ())}
        else:
            idle = {*_PARTS, *(() if several else _LINKED)}
        told = [
            f"{each.name} {str(value).lower() if isinstance(value, bool) else f'{value:g}'}"
            for each in fields(self)
            if each.name in idle and (value := getattr(self, each.name)) != each.default
        ]
        return f"; not used: {', '.join(told)}" if told else ""
