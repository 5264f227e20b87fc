"""Where the memory of a GPU goes: weights, what the engine works with, and KV for the rest.

The engine's part is what vLLM measures when it starts, put together from its causes: what the driver keeps, the
process and its communicators, and the larger of two peaks. One is the forward pass of a whole token budget, the other
the sampler's warm-up with as many requests as may run. Each number says which log it closes the sum of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.shapes import GIB, GPU, KvGroup, Model

RESERVE_GIB = 1.9
"""GiB a GPU keeps at least besides weights and KV.

What closes the sum for vLLM 0.23 on an H200 at utilisation 0.90 with 8192 batched tokens: 1.92 GiB with Llama-3.1-8B
(56,057 blocks), 1.83 GiB with OPT-13B (8,240 blocks).
"""
DRIVER_GIB, DRIVER_SHARE = 0.3, 0.002
"""What the driver keeps of the memory that nvidia-smi shows: 0.46 GiB of an H100's 79.65, 0.59 of an H200's 140.40."""
PROCESS_GIB, COMMUNICATING_GIB = 0.13, 0.54
"""Of a process besides PyTorch's own: alone, and with NCCL (vLLM 0.11 on H100, column Non-torch: 0.13 and 0.55)."""
SAMPLER_BYTES = 38.4
"""Of the sampler's warm-up, a request and entry of the vocabulary: 38.3 to 38.6 B for vocabularies of 128,256, 151,936
and 201,088 in vLLM 0.11's logs (1,024 requests, H100), some ten float32 copies of the logits."""
GRAPHS_GIB = 0.4
"""CUDA graphs of models with experts, which vLLM sets aside since 0.2x; those of dense models are within the rest."""
TOKENS, SEQUENCES = 8192, 256  # a step's tokens and requests, where the policy has no such limit


@dataclass(frozen=True)
class KVFit:
    """The sum behind a KV cache size, for one of the GPUs that share the model (the one with most on it)."""

    model: str
    gpu: str
    parallel: Parallel
    block_size: int  # tokens
    memory_utilization: float
    total_bytes: int
    weight_bytes: int
    reserve_bytes: int
    groups: tuple[KvGroup, ...]  # of the layers on this GPU
    sequences: int = SEQUENCES  # that may run at a time: each holds blocks of its windows
    reserve_parts: str = ""  # of what the reserve is made up, if it is not given

    @property
    def kv_bytes(self) -> int:
        """Bytes left for KV; negative when the weights do not fit."""
        return int(self.total_bytes * self.memory_utilization) - self.weight_bytes - self.reserve_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's KV on this GPU, while the token is in all windows."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def engine_blocks(self) -> int:
        """Blocks as vLLM counts them.

        Where some layers have a window, groups of equally many layers share one pool: a block is a block of one group.
        """
        size, _ = grouped(self.groups)
        of_a_layer = self.groups[0].bytes_per_token // self.groups[0].layers
        return max(0, self.kv_bytes // (size * of_a_layer * self.block_size))

    @property
    def blocks(self) -> int:
        """Whole blocks of all layers for the replica: a token's KV in each. The ranks of DP-attention add up.

        Where some layers have a window, every running request keeps the blocks of its windows, and what is left is
        for the other layers. That is never fewer than if all layers kept everything.
        """
        if len(self.groups) == 1:
            return self.engine_blocks * self.parallel.data
        _, (full, windowed) = grouped(self.groups)
        kept = self.sequences * windowed * (self.groups[1].window // self.block_size + 1)
        longest = (self.engine_blocks - kept) // full
        return max(longest, self.engine_blocks // (full + windowed), 0) * self.parallel.data

    @property
    def tokens(self) -> int:
        """Token slots in those blocks."""
        return self.blocks * self.block_size

    def explain(self, by_group: bool = False) -> str:
        """The sum on one line, in GiB, so that a reader sees what was assumed.

        ``by_group``: the pool is told in blocks of one group of layers.
        """
        gpus = self.parallel.gpus
        on = f" on each of {gpus} GPUs" if gpus > 1 else ""
        on += "" if self.parallel.only_tensor else f" ({self.parallel})"
        reserve = f" reserve ({self.reserve_parts})" if self.reserve_parts else " reserve"
        if by_group:
            blocks, (size, counts) = self.engine_blocks * self.parallel.data, grouped(self.groups)
            tables = sum(counts)
            of = f"of one of {tables} groups of {size} layers" if tables > 1 else "of all layers"
            pools = f"{blocks:,} blocks, each of {self.block_size} tokens {of}"
        else:
            pools = f"{self.blocks:,} blocks of {self.block_size} tokens"
            if len(self.groups) > 1:
                kept = f"windows kept for {self.sequences}"
                pools = f"{self.engine_blocks:,} blocks of one group of layers, {kept} = {pools}"
            elif self.parallel.data > 1:
                pools = f"{self.engine_blocks:,} blocks a rank = {pools}"
            pools += f" = {self.tokens:,} tokens"
        return (
            f"{self.model} on {self.gpu}{on}:"
            f" {self.total_bytes / GIB:.2f} GiB × {self.memory_utilization:g}"
            f" − {self.weight_bytes / GIB:.2f} weights − {self.reserve_bytes / GIB:.2f}{reserve}"
            f" = {self.kv_bytes / GIB:.2f} GiB for KV = {pools}"
        )


def kv_blocks(
    model: Model,
    gpu: GPU,
    parallel: Parallel = ONE,
    block_size: int = 16,
    memory_utilization: float = 0.9,
    reserve_gib: float | None = None,
    tokens: int = TOKENS,
    sequences: int = SEQUENCES,
    draft: Model | None = None,
    static: bool = False,
) -> KVFit:
    """How many KV blocks of ``block_size`` tokens fit beside ``model`` on the GPUs of one replica.

    Per GPU: memory × utilisation (vLLM's ``gpu_memory_utilization``) − `weight_bytes` − reserve. The reserve is
    `reserve` of a step of ``tokens`` tokens and ``sequences`` requests, and `RESERVE_GIB` at least, unless
    ``reserve_gib`` gives it. ``draft``: a model that drafts tokens, on the same GPUs, those of the last stage.
    ``static``: the share is of what is free before weights are loaded, and all of it is theirs and KV's, as SGLang has
    it (``mem_fraction_static``). A measured block count is better
    where there is one. Raises ValueError for settings out of range, for a model that cannot be shared out so, and, with
    the sum, for one that leaves no room for a single block.
    """
    if not 0 < memory_utilization <= 1:
        raise ValueError(f"memory_utilization must be above 0 and at most 1 (got {memory_utilization})")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 (got {block_size})")
    if reserve_gib is not None and not 0 <= reserve_gib < math.inf:
        raise ValueError(f"reserve_gib must be at least 0 (got {reserve_gib})")
    parallel.check(model)
    kept, parts = RESERVE_GIB if reserve_gib is None else reserve_gib, ""
    if reserve_gib is None and static:
        used = _before_weights(gpu, parallel, memory_utilization)
        kept, parts = sum(used.values()), ", ".join(f"{name} {gib:.2f}" for name, gib in used.items())
    elif reserve_gib is None and (modelled := reserve(model, gpu, parallel, memory_utilization, tokens, sequences)):
        needed = sum(modelled.values())
        if needed > RESERVE_GIB:
            kept, parts = needed, ", ".join(f"{name} {gib:.2f}" for name, gib in modelled.items() if gib >= 0.005)
    weights = weight_bytes(model, parallel)
    groups = _beside(_groups(model, parallel), draft, parallel)
    if draft is not None:
        weights += weight_bytes(draft, replace(parallel, pipeline=1))
    fit = KVFit(
        model=model.name,
        gpu=gpu.name,
        parallel=parallel,
        block_size=block_size,
        memory_utilization=memory_utilization,
        total_bytes=gpu.memory_bytes,
        weight_bytes=weights,
        reserve_bytes=round(kept * GIB),
        groups=tuple(groups),
        sequences=sequences,
        reserve_parts=parts,
    )
    if not fit.blocks:
        raise ValueError(f"no room for KV: {fit.explain()}; use more or larger GPUs, or narrower weights")
    return fit


def grouped(groups: Sequence[KvGroup]) -> tuple[int, list[int]]:
    """Layers of a group as vLLM forms them, and into how many of those each of ``groups`` is cut.

    `_get_kv_cache_groups_uniform_page_size` of vLLM makes each as large as the smaller of ``groups``, or as the larger
    if that is less than half as large again.
    """
    layers = [group.layers for group in groups]
    size = max(layers) if max(layers) < 1.5 * min(layers) else min(layers)
    return size, [-(-count // size) for count in layers]


def windows(model: Model, parallel: Parallel = ONE, draft: Model | None = None) -> tuple[int, ...]:
    """Of each such group its window, 0: none; in vLLM's order if the model's first layer has one.

    ``draft``: a model that drafts tokens, whose layers are cached beside those without a window.
    """
    groups = _beside(model.kv_groups(parallel.tensor), draft, parallel)
    _, counts = grouped(groups)
    return tuple(g.window for g, count in reversed([*zip(groups, counts, strict=True)]) for _ in range(count))


def _beside(groups: Sequence[KvGroup], draft: Model | None, parallel: Parallel) -> list[KvGroup]:
    """``groups`` with the layers of ``draft`` among those without a window."""
    if draft is None:
        return [*groups]
    own = draft.kv_groups(parallel.tensor)[0]
    more = (own.layers, own.bytes_per_token)
    return [
        group if group.window else KvGroup(group.layers + more[0], group.bytes_per_token + more[1], 0)
        for group in groups
    ]


def _groups(model: Model, parallel: Parallel) -> list[KvGroup]:
    """What is cached on the GPU with most layers."""
    groups = model.kv_groups(parallel.tensor)
    if parallel.pipeline == 1:
        return groups
    found = []
    for group in groups:
        layers = -(-group.layers // parallel.pipeline)
        found.append(KvGroup(layers, layers * (group.bytes_per_token // group.layers), group.window))
    return found


def weight_bytes(model: Model, parallel: Parallel = ONE) -> int:
    """Bytes of weights on each GPU of the replica; on the one with most of them, where stages differ.

    Attention, dense MLPs, shared experts, embedding and head are shared out over the ``tensor`` GPUs of a rank, experts
    over all of a stage's GPUs. Each GPU holds the router and the projections to the latent vectors whole.
    """
    tp = parallel.tensor
    if parallel.only_tensor and not (model.experts or model.latent):
        return -(-model.weight_bytes // tp)
    stage = -(-model.layers // parallel.pipeline) / model.layers
    layers = 0.0
    for part in model.weights:
        if part.part == "head":
            continue
        count = part.parameters * part.bytes_each
        if part.part == "experts":
            width = model.expert_ffn / parallel.expert_tensor
            padded = math.ceil(width / model.expert_ffn_multiple) * model.expert_ffn_multiple
            layers += count / parallel.ranks * padded / width
        elif part.part == "router":
            layers += count
        else:
            whole = 0.0
            if part.part == "attention" and model.latent:
                rows = model.latent_query + model.latent + model.rope_size
                whole = model.layers * model.hidden * rows * part.bytes_each
            layers += whole + (count - whole) / tp
    head = next(part for part in model.weights if part.part == "head")
    tables = head.parameters * head.bytes_each / tp
    embedding = model.embedding_parameters * model.bytes_per_param / tp
    tables = tables + embedding if parallel.pipeline == 1 else max(tables, embedding)
    listed = sum(part.parameters for part in model.weights) + model.embedding_parameters
    rest = (model.parameters - listed) * model.bytes_per_param / tp
    return math.ceil(layers * stage + tables + rest * stage)


def _before_weights(gpu: GPU, parallel: Parallel, share: float) -> dict[str, float]:
    """GiB that are in use before weights are loaded, as far as a ``share`` of all memory counts them, by cause."""
    process = PROCESS_GIB if parallel.gpus == 1 else COMMUNICATING_GIB
    return {"driver": share * (DRIVER_GIB + DRIVER_SHARE * gpu.memory_gib), "process": share * process}


def reserve(
    model: Model,
    gpu: GPU,
    parallel: Parallel = ONE,
    memory_utilization: float = 0.9,
    tokens: int = TOKENS,
    sequences: int = SEQUENCES,
) -> dict[str, float]:
    """GiB that vLLM takes of a GPU besides weights and KV, by cause."""
    driver = memory_utilization * (DRIVER_GIB + DRIVER_SHARE * gpu.memory_gib)
    forward = tokens * _bytes_per_token(model, parallel)
    stream = tokens * model.hidden * model.bytes_per_activation  # the residual, kept while the sampler warms up
    sampler = sequences * model.vocab * SAMPLER_BYTES + stream
    return {
        "driver": driver,
        "process": PROCESS_GIB if parallel.gpus == 1 else COMMUNICATING_GIB,
        "activations" if forward >= sampler else "sampler": max(forward, sampler) / GIB,
        "graphs": GRAPHS_GIB if model.experts else 0.0,
    }


def _bytes_per_token(model: Model, parallel: Parallel) -> float:
    """Bytes of activations that a token of a forward pass has at its peak, in the MLP.

    Input and output of the activation function, and three times the residual's width. Llama-3.1-8B: 110,592 B, and
    113,000 B between the two pools of an engine that profiled 20,000 and 29,000 tokens. Experts see a token
    ``experts_per_token`` times.
    """
    width = model.ffn / parallel.tensor
    inside = (3 if model.gated_mlp else 2) * width
    if model.experts:
        each = 3 * model.expert_ffn / parallel.expert_tensor + model.hidden
        shared = 3 * model.shared_ffn / parallel.tensor
        inside = max(inside if model.dense_layers else 0, model.experts_per_token * each + shared)
    return (inside + 3 * model.hidden) * model.bytes_per_activation
