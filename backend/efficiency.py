"""The settings of the roofline: what share of the peaks an engine reaches, and what does not shrink with the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval, Le

Share = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True)
class Shares:
    """How far below the data sheet a real engine stays; "by part" and "whole": where a step is priced so only."""

    mfu: Share = 0.55  # of the peak FLOP/s, prompt work (0.4–0.7 is usual)
    bandwidth: Share = 0.80  # of the HBM bandwidth, reading weights and KV (0.6–0.9 is usual)
    link: Share = 0.70  # of one direction of the links, all-reduce
    mixed_overlap: Annotated[float, Interval(ge=0, le=1)] = 0.5  # of the shorter of prompt and decode work
    floor_ms: Annotated[float, Ge(0)] = 0.0  # no step is shorter, because the host cannot launch faster
    overhead_ms: Annotated[float, Ge(0), Le(1e6)] = 0.0  # host time added to every step
    allreduce_us: Annotated[float, Ge(0)] = 8.0  # latency of one all-reduce, tensor parallelism only
    by_part: bool | None = (
        None  # None: but for a dense model of one width on one GPU; false: or on several, if it can be
    )
    gemm_mfu: Share = 0.70  # by part: of the peak FLOP/s, products with weights but experts' (0.80 measured on H200)
    kernel_us: Annotated[float, Ge(0)] = 3.0  # by part: of each kernel, besides its work
    attention_us: Annotated[float, Ge(0)] = 0.25  # by part: of each sequence and layer, besides its work
    launch_us: Annotated[float, Ge(0)] = 240.0  # by part: no layer of a step with prompts is launched faster
    prepare_ms: Annotated[float, Ge(0)] = 2.0  # by part: nor a step with prompts without so much on top
    eager_us: Annotated[float, Ge(0)] = 750.0  # by part: likewise beyond the graphs; experts take as much again
    graph_tokens: Annotated[int, Ge(0)] = 512  # by part: tokens of the largest captured graph
    draft_us: Annotated[float, Ge(0)] = 290.0  # of each pass that drafts, besides its work (see `drafting`)
    skew: Annotated[float, Interval(ge=0, le=4)] = 0.0  # by part: of the experts' popularity, a power law; 0: uniform
    expert_rows: Annotated[int, Ge(1)] = 1  # by part: to which a kernel pads each expert's tokens; DeepGEMM: 128
