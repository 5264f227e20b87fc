"""What each part of a model costs in a step on one GPU of a replica: FLOPs, bytes and the time of the slower.

Linear layers read their weights once a step, or multiply all of the step's tokens with them. Of the experts a step of T
tokens reads E · (1 − (1 − k/E)^T) in expectation, if routing is uniform. Everything here depends on numbers that a run
of decode steps keeps, so a run costs an arithmetic series.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from chairlift.backend.efficiency import Shares
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GPU, Model, Weights


class Rates(NamedTuple):
    """What share of the data sheet's peaks a kernel reaches."""

    bandwidth: float
    mfu: float


# Grouped products of experts: shares of an H200's peaks in NVIDIA AIConfigurator's tables (Apache-2.0; vLLM 0.22, MXFP4
# 0.24), balanced routing. Bandwidth where 64 tokens read all experts of a layer: bfloat16 308 µs for 1.21 GB; FP8 183
# to 195 µs for 0.60 GB, 631 µs for 2.42, 899 µs for 3.62 and 2,740 µs for 11.27 (0.65 to 0.86: the wider, the better);
# MXFP4 665 µs for 1.80 GB (padded). FLOP/s at 8,192 tokens: 400, 650 (FP8), 450 (FP8 in blocks) and 555 of 1e12. INT4
# and NVFP4 have no table: as MXFP4, and as FP8.
EXPERTS = {
    "none": Rates(0.82, 0.41),
    "fp8": Rates(0.75, 0.33),
    "fp8_block": Rates(0.75, 0.24),
    "int8": Rates(0.75, 0.33),
    "int4": Rates(0.56, 0.41),
    "mxfp4": Rates(0.56, 0.56),
    "nvfp4": Rates(0.75, 0.33),
}

# The kernel of MXFP4 experts computes the rows of an expert in tiles, and widens the expert's weights anew for each: at
# 64, 128, 256 and 512 tokens it takes 508, 584, 747 and 1,067 µs where routing is skewed (power law 1.2), but 665 µs
# throughout where it is balanced, up to 16 rows an expert. Tiles have as many rows as experts have on average, rounded
# up to a power of two, from 16 to 128. Balanced, tiles of 16, 32, 64 and 128 rows take 5.2, 6.6, 8.1 and 11.7 µs: a
# row beyond the sixteenth takes 58 ns, which is 0.87 of the peak.
TILES = {"mxfp4": (16, 128)}
TILE_MFU = 0.87

# Kernels of a layer, each of which takes `Efficiency.kernel_us` besides its work: norm, QKV, rotation, cache write,
# attention, output, norm, up, activation, down. FP8 activations are quantised before each of four products. Experts
# take nine in place of the MLP's three: router, top k, sorting (2), up, activation, down, weighting, sum; MXFP4's take
# five more (60.9 µs at one token in the table above, 20.7 of them to read its experts). Latent attention adds five: two
# projections down and one up with their norms.
KERNELS, QUANTIZING, WITH_EXPERTS, WITH_MXFP4, WITH_LATENT = 10, 4, 6, 5, 5


class Part(NamedTuple):
    """One part of a step."""

    name: str
    bytes: float  # read on one GPU
    flops: float  # done on one GPU
    memory_s: float  # to read those bytes
    compute_s: float  # to do those FLOPs
    fixed_s: float = 0.0  # latencies, which come on top

    @property
    def seconds(self) -> float:
        """The slower of the two, and the latencies."""
        return max(self.memory_s, self.compute_s) + self.fixed_s


def experts_read(experts: int, per_token: int, tokens: float, skew: float = 0.0) -> float:
    """How many of ``experts`` a step of ``tokens`` tokens reads in expectation, ``per_token`` of them chosen by each.

    ``skew``: popularity falls as a power of the rank with this exponent; 0: uniform.
    """
    if skew == 0:
        return experts * -math.expm1(tokens * math.log1p(-per_token / experts)) if per_token < experts else experts
    return sum(-math.expm1(tokens * math.log1p(-p)) if p < 1 else 1.0 for p in popularity(experts, per_token, skew))


@lru_cache(maxsize=4096)
def tiles_computed(experts: int, per_token: int, tokens: float, skew: float, rows: int) -> float:
    """How many tiles of ``rows`` rows hold the rows of all experts in expectation; the rest as in `experts_read`.

    An expert whose rows number n takes n / rows tiles, rounded up. With 4 of 128 experts a token, 64 tokens take 111
    tiles of 16 rows, no more than there are experts read; 512 tokens take 186, for half of the experts have more than
    16 rows. (n is binomial; whether it is beyond the first tile is told by the normal distribution.)
    """
    chances = popularity(experts, per_token, skew) if skew else [per_token / experts]
    found = 0.0
    for chance in chances:
        mean = tokens * chance
        deviation = math.sqrt(2 * mean * (1 - chance))
        upto = rows
        while deviation and (below := (upto + 0.5 - mean) / deviation) < 4:
            found += math.erfc(below) / 2
            upto += rows
        if not deviation:
            found += max(0, math.ceil(mean / rows) - 1)
    return found * experts / len(chances) + experts_read(experts, per_token, tokens, skew)


def popularity(experts: int, per_token: int, skew: float) -> list[float]:
    """The chance of each expert to be chosen by a token: a power law, at most 1 each, ``per_token`` in total."""
    weights = [rank**-skew for rank in range(1, experts + 1)]
    left, chances = float(per_token), []
    for i, weight in enumerate(weights):
        chances.append(min(1.0, left * weight / sum(weights[i:])))
        left -= chances[-1]
    return chances


def hottest(mean: float, deviation: float, groups: int, most: float) -> float:
    """The largest of ``groups`` alike and nearly normal numbers in expectation, ``most`` at most."""
    return min(most, mean + deviation * math.sqrt(2 * math.log(groups))) if groups > 1 else mean


class Costs:
    """The parts of a step of ``model`` on each GPU of a replica that shares it as ``parallel`` says.

    ``efficiency``: what share of the peaks other kernels than the experts' reach.
    """

    def __init__(self, model: Model, gpu: GPU, parallel: Parallel, efficiency: Shares) -> None:
        self.model, self.gpu, self.parallel, self.skew = model, gpu, parallel, efficiency.skew
        self._expert_rows = efficiency.expert_rows
        self.byte_rate = efficiency.bandwidth * gpu.hbm_gb_per_s * 1e9
        self._mfu, self._gemm_mfu = efficiency.mfu, efficiency.gemm_mfu
        self._weights = {part.part: part for part in model.weights}
        groups = model.kv_groups(parallel.tensor)
        self.kv_bytes = sum(group.bytes_per_token for group in groups if not group.window)
        self.window_bytes = sum(group.bytes_per_token for group in groups if group.window)
        heads = model.heads / parallel.tensor
        full = model.layers - model.window_layers
        if model.latent:  # decodes attend in the latent space, prompts unpack keys and values
            decode, prompt = 2 * model.latent + model.rope_size, model.head_size + model.rope_size + model.value_size
        else:
            decode = prompt = 2 * model.head_size
        self.decode_pair, self.prompt_pair = (2 * full * heads * each for each in (decode, prompt))  # FLOPs
        self.window_pair = 2 * model.window_layers * heads * prompt
        self.unpacking = (
            2 * model.layers * heads * model.latent * (model.head_size + model.value_size)
        )  # a token of past

    def flop_rate(self, arithmetic: str, mfu: float) -> float:
        """FLOP/s that a GPU reaches; where it has no such tensor cores, weights are widened to the next format."""
        gpu = self.gpu
        peaks = {"bf16": gpu.bf16_tflops, "fp8": gpu.fp8_tflops, "fp4": gpu.fp4_tflops}
        peak = peaks[arithmetic] or (gpu.fp8_tflops if arithmetic == "fp4" else None) or gpu.bf16_tflops
        return mfu * peak * 1e12

    def kernels(self) -> int:
        """Kernels of a step, all layers."""
        model = self.model
        eight = any(part.arithmetic == "fp8" for part in model.weights)
        each = KERNELS + QUANTIZING * eight + WITH_LATENT * bool(model.latent)
        mxfp4 = WITH_MXFP4 * (model.quantization == "mxfp4")
        return model.layers * each + model.expert_layers * (WITH_EXPERTS + mxfp4)

    def linear(self, tokens: int, all_tokens: int, sampled: int) -> list[Part]:
        """The linear layers in a step of ``tokens`` on this GPU's rank and ``all_tokens`` on all of them.

        ``sampled``: requests of this rank whose next token is computed, which go through the head.
        """
        found = []
        for name, part in self._weights.items():
            if name == "experts":
                found.append(self._experts(part, all_tokens))
                continue
            shared = 1 if name == "router" else self.parallel.tensor
            rows = sampled if name == "head" else tokens
            count = part.parameters / shared
            read = count * part.bytes_each if rows else 0.0
            flops = 2 * count * rows
            found.append(self._part(name, part, read, flops, self.byte_rate, self._gemm_mfu))
        return found

    def _experts(self, part: Weights, tokens: int) -> Part:
        """On the GPU with most to read and to do."""
        model, groups = self.model, self.parallel.expert
        local = model.experts / groups
        chance = model.experts_per_token / model.experts
        read = experts_read(model.experts, model.experts_per_token, tokens, self.skew) / groups
        touched = read / local
        spread = math.sqrt(max(0.0, read * (1 - touched) * (1 - 1 / groups)))
        read = hottest(read, spread, groups, min(local, tokens * model.experts_per_token))
        load = tokens * model.experts_per_token / groups
        variance = load * (1 - 1 / groups) * (1 - chance)
        if self.skew and groups > 1:  # popular experts fall to groups by chance
            squares = sum(p * p for p in popularity(model.experts, model.experts_per_token, self.skew))
            even = model.experts_per_token * chance
            variance += tokens**2 * max(0.0, squares - even) / groups * (1 - 1 / groups)
        load = hottest(load, math.sqrt(variance), groups, tokens * min(local, model.experts_per_token))
        width = model.expert_ffn / self.parallel.expert_tensor
        padded = math.ceil(width / model.expert_ffn_multiple) * model.expert_ffn_multiple
        one = model.expert_layers * model.expert_parameters / self.parallel.expert_tensor * padded / width
        kind = model.quantization if part.bytes_each != model.bytes_per_param else "none"
        rates = EXPERTS[kind]
        byte_rate = rates.bandwidth * self.gpu.hbm_gb_per_s * 1e9
        moved = read * one * part.bytes_each
        if kind in TILES:
            least, most = TILES[kind]
            rows = min(most, max(least, 1 << math.ceil(math.log2(max(1.0, tokens * chance)))))
            each = tiles_computed(model.experts, model.experts_per_token, tokens, self.skew, rows)
            each *= read / max(1e-9, experts_read(model.experts, model.experts_per_token, tokens, self.skew))  # here
            taken = one * part.bytes_each / byte_rate
            taken += 2 * one * (rows - least) / self.flop_rate(part.arithmetic, TILE_MFU)
            return Part("experts", moved, 2 * one * load, moved / byte_rate, each * taken)
        if self._expert_rows > 1:
            moved = local * one * part.bytes_each + self._padded(part, local * self._expert_rows + load, padded)
        return self._part("experts", part, moved, 2 * one * load, byte_rate, rates.mfu)

    def _padded(self, part: Weights, rows: float, width: float) -> float:
        """Bytes that ``rows`` rows of activations move through experts of ``width``, all layers.

        A grouped product over rows sorted by expert, each expert's padded to a whole number of tiles, spans all of its
        buffer whatever the batch. It reads its inputs, its two products write 2 · width and the hidden size in 16 bits,
        and between them the activation reads the first and writes width inputs of the second.
        """
        model = self.model
        narrow = 1 if part.arithmetic == "fp8" else model.bytes_per_activation
        each = model.hidden * (narrow + 2) + width * (2 * 2 * 2 + 2 * narrow)
        return model.expert_layers * rows * each

    def _part(self, name: str, part: Weights, read: float, flops: float, byte_rate: float, mfu: float) -> Part:
        return Part(name, read, flops, read / byte_rate, flops / self.flop_rate(part.arithmetic, mfu))

    def attention_rate(self) -> float:
        """FLOP/s of attention, which multiplies bfloat16."""
        return self.flop_rate("bf16", self._mfu)


def in_window(start: int, length: int, window: int, chunked: bool = False) -> int:
    """Query–key pairs of ``length`` tokens after ``start``, each looking back on ``window`` tokens.

    ``chunked``: or to where its chunk of so many begins.
    """
    if chunked:
        ends = (start, start + length)
        before, upto = (
            end // window * (window * (window + 1) // 2) + in_window(0, end % window, window) for end in ends
        )
        return upto - before
    whole = max(0, min(length, window - start))  # tokens that see everything
    return whole * (2 * start + whole + 1) // 2 + (length - whole) * window
