"""A profile carried to another GPU, number of GPUs, format or model: each of its parts by what the roofline says of it.

A part is what one coefficient of a profile prices: reading the weights, reading all experts, a token's products, a
token of context, and so on. `backend.parts` prices each of them for any model on any GPUs, by shares of the peaks that
measured kernels reach and measured collectives, so the ratio of two such prices carries what was measured here to
where nothing was. For example: on an H100, whose memory is 0.70 times as fast, reading Llama-3.1-8B's weights takes
1.43 times as long, but its 320 kernels take what they do on an H200, so together 1.35 times.

What is carried was not measured, and says so. How far off that was is in `carried.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml

from chairlift.backend import collectives, specs
from chairlift.backend.calibrated.profile import REGIMES, GpuTime, HostTime, Profile, ProfileError
from chairlift.backend.cuda_graphs import GRAPH_TOKENS
from chairlift.backend.hosts import pace
from chairlift.backend.parallel import Parallel
from chairlift.backend.parts import Costs
from chairlift.backend.roofline import Efficiency
from chairlift.backend.shapes import GPU, Model

MANY = 8192  # tokens of a step that is bound by products, and reads all experts
# A kernel of decode attention gives each sequence and KV head a block of its own. So what a sequence costs besides its
# context goes by KV heads, where they are many: by vLLM 0.23 a sequence of Llama-3.1-8B (8) takes 3 µs, and one of
# OPT-13B (40) 34. With 2 to 8 on a GPU recorded engines show no such order.
KV_HEADS = 8
WORKERS_S = 0.0004  # to hand a step to worker processes, which launch it: 0.3 to 0.7 ms of vLLM 0.26
HOST = "vllm-0.26"  # whose hosts launch on one GPU and on several


@dataclass(frozen=True)
class Seconds:
    """What the parts of a model's steps take on the GPUs of a replica, seconds."""

    read: float  # once: the weights that every token uses, the kernels, the collectives of one token
    experts: float  # once: all experts
    token: float  # products of a token, and its share of collectives
    sequence: float  # a sampled token's head, and its attention but for what context takes
    kv: float  # a token of context
    pair: float  # a query and a key of a prompt


def seconds(model: Model, gpu: GPU, parallel: Parallel) -> Seconds:
    """Those of ``model``. Raises ValueError where a number is needed that is unknown, or it cannot be shared out so."""
    e = Efficiency()
    costs = Costs(model, gpu, parallel.check(model), e)
    parts = {part.name: part for part in costs.linear(MANY, MANY, MANY)}
    experts, head = parts.pop("experts", None), parts["head"]

    def reduced(tokens: int) -> float:
        size = tokens * model.hidden * model.bytes_per_activation
        graph = tokens <= GRAPH_TOKENS
        return 1e-6 * 2 * model.layers * collectives.all_reduce_us(gpu, parallel.tensor, size, graph)

    blocks = 1.0 if model.latent else max(1.0, model.kv_heads / parallel.tensor / KV_HEADS)
    few, many = reduced(1), reduced(MANY)
    products = sum(part.compute_s for name, part in parts.items() if name != "head")
    products += experts.compute_s if experts else 0.0
    return Seconds(
        read=sum(part.memory_s for part in parts.values()) + 1e-6 * e.kernel_us * costs.kernels() + few,
        experts=experts.memory_s if experts else 0.0,
        token=(products + many - few) / MANY,
        sequence=head.compute_s / MANY + 1e-6 * e.attention_us * model.layers * blocks,
        kv=max(costs.kv_bytes / costs.byte_rate, costs.decode_pair / costs.attention_rate()),
        pair=costs.prompt_pair / costs.attention_rate(),
    )


def carried(profile: Profile, model: Model, gpu: GPU, parallel: Parallel) -> Profile:
    """``profile``, which was measured, for ``model`` on the GPUs of a replica; itself where those are its own.

    Host time stays, but for launches: those grow with the layers, and with several GPUs their processes launch, which
    sets a floor to GPU time. Raises ValueError as `seconds` does, and for stages of a pipeline or ranks of
    DP-attention, of which no profile tells.
    """
    if parallel.gpus > parallel.tensor:
        raise ProfileError(f"profile {profile.name} cannot be carried to {parallel}: only tensor and expert are known")
    try:
        own = model if model.name == profile.model else specs.model(profile.model)
        source = gpu if gpu.name == profile.gpu else specs.gpu(profile.gpu)
    except LookupError as error:
        raise ProfileError(f"profile {profile.name} cannot be carried: {error.args[0]}") from None
    if (own, source, profile.parallel) == (model, gpu, parallel):
        return profile
    here, there = seconds(own, source, profile.parallel), seconds(model, gpu, parallel)
    ratio = {name: getattr(there, name) / (value or 1.0) for name, value in vars(here).items()}
    times = profile.gpu_time
    experts = times.experts_s * ratio["experts"] if here.experts else there.experts
    layers = model.layers / own.layers
    eager = (model.layers + model.expert_layers) / (own.layers + own.expert_layers)
    gpu_time = replace(
        times,
        weights_s=times.weights_s * ratio["read"],
        empty_pair_s=times.empty_pair_s * ratio["read"],
        size_factors=(),  # of kernels for these very matrices on this GPU
        experts_s=experts,
        expert_share=model.experts_per_token / max(1, model.experts),
        token_s=times.token_s * ratio["token"],
        hot_token_s=times.hot_token_s * ratio["token"],
        sequence_s=times.sequence_s * ratio["sequence"],
        kv_s=times.kv_s * ratio["kv"],
        kv_mixed_s=times.kv_mixed_s * ratio["kv"],
        pair_s=times.pair_s * ratio["pair"],
        whole_pair_s=times.whole_pair_s * ratio["pair"],
        chunk_s=times.chunk_s * layers,
        request_s=times.request_s * layers,
        drafting=times.drafting
        and replace(
            times.drafting,
            token_s=times.drafting.token_s * ratio["token"],
            verify_s=times.drafting.verify_s * layers,
            kv_s=times.drafting.kv_s * ratio["kv"],
        ),
    )
    gpu_time, host = _launched(gpu_time, profile.host, layers, eager, profile.parallel.gpus, parallel.gpus)
    said = {"weights": "read", "products": "token", "context": "kv", "pairs": "pair"}
    if here.experts and there.experts:
        said["experts"] = "experts"
    parts = ", ".join(f"{name} × {ratio[key]:.3g}" for name, key in said.items())
    changes = _changes(own, model) + ["numbers of GPUs"] * (profile.parallel != parallel) + ["GPUs"] * (source != gpu)
    ends = [f"{m.name} on {p.gpus} × {g.name}" for m, p, g in ((own, profile.parallel, source), (model, parallel, gpu))]
    return replace(
        profile,
        name=f"{gpu.name}-{model.name}{parallel.label} from {profile.name}",
        model=model.name,
        gpu=gpu.name,
        gpu_time=gpu_time,
        host=host,
        tensor_parallel=parallel.tensor,
        expert_parallel=parallel.expert,
        scaled=f"{ends[0]} → {ends[1]}: {parts}; launches × {layers:.3g}",
        notes=(*profile.notes, measured(changes)),
    )


def _changes(own: Model, model: Model) -> list[str]:
    """What differs between two models: their shape, the format of their weights."""
    shapes = [(m.layers, m.hidden, m.ffn, m.experts) for m in (own, model)]
    formats = [(m.quantization, m.bytes_per_param, m.kv_bytes_per_element) for m in (own, model)]
    return ["models"] * (shapes[0] != shapes[1]) + ["formats"] * (formats[0] != formats[1])


class Off(NamedTuple):
    """How far off a carried profile was, in steps of each of `REGIMES` that an engine was recorded making, percent."""

    source: str  # the profile that was carried
    target: str  # that of the recording
    changes: tuple[str, ...]  # "models", "formats", "numbers of GPUs", "versions"
    median: tuple[float, ...]  # of the absolute errors of single steps
    total: tuple[float, ...]  # of the sum of all steps


@cache
def known() -> tuple[Off, ...]:
    """What carrying between the shipped profiles came to."""
    rows = yaml.safe_load(Path(__file__).resolve().with_name("carried.yaml").read_text(encoding="utf-8"))
    lists = ("changes", "median", "total")
    return tuple(Off(row["source"], row["target"], *(tuple(row[name]) for name in lists)) for row in rows)


def measured(changes: Sequence[str]) -> str:
    """How far off carrying was where ``changes`` were recorded on both sides, a sentence."""
    rows = [row for row in known() if set(row.changes) & set(changes)]
    if not rows:  # no other GPU was recorded
        rows = [row for row in known() if "versions" not in row.changes]
    told = []
    for i, regime in enumerate(REGIMES):
        off, all_steps = [row.median[i] for row in rows], [row.total[i] for row in rows]
        told.append(f"{regime} {median(off):.0f} % (sums {min(all_steps):+.0f} to {max(all_steps):+.0f} %)")
    kinds = sorted({each for row in rows for each in row.changes} & set(changes))
    what = " and ".join(kinds) or "models, formats and numbers of GPUs; no other GPU was recorded"
    return f"carried {len(rows)} times between recorded engines (to other {what}), steps were off by {', '.join(told)}"


def _launched(
    times: GpuTime, host: HostTime, layers: float, eager: float, before: int, after: int
) -> tuple[GpuTime, HostTime]:
    """``times`` and ``host`` with launches of so many times the layers, by a host of so many GPUs."""
    one, other = pace(HOST, before), pace(HOST, after)
    workers = times.eager_floor_s > 0
    # An idle engine's workers are done `tail_s` after a step was handed to them, which begins with `head_s`.
    piecewise_s = host.piecewise_s + (host.tail_s - host.head_s if workers else 0.0)
    piecewise_s = max(times.piecewise_floor_s, piecewise_s)
    piecewise_s *= layers * other.launch_us / one.launch_us
    eager_s = max(times.eager_floor_s, host.eager_s) * (eager * other.eager_us / one.eager_us)
    if after > 1:
        times = replace(times, piecewise_floor_s=0.0, eager_floor_s=eager_s)
        tail_s = max(0.0, piecewise_s + host.head_s - WORKERS_S)
        return times, replace(host, piecewise_s=WORKERS_S, eager_s=WORKERS_S, tail_s=tail_s)
    times = replace(times, piecewise_floor_s=0.0, eager_floor_s=0.0)
    tail_s = 0.0 if workers else host.tail_s * layers
    return times, replace(host, piecewise_s=piecewise_s, eager_s=eager_s, tail_s=tail_s)
