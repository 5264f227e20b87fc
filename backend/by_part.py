"""The roofline part by part: experts, formats of weights, windows, latent attention and several GPUs.

Each linear layer takes the longer of reading its weights and multiplying the step's tokens, decode attention the longer
of reading KV and multiplying it, and a step the sum of its parts. To that come what does not shrink with the work: the
kernels themselves, collectives, and the host that launches a step with prompts layer by layer. All that grows from one
decode step to the next is the context, so costs are affine in it between breakpoints: where the windows are full, and
where a floor of the step ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chairlift.backend import collectives
from chairlift.backend.base import FOREVER, NO_HOST, PS, Backend, Batch, Chunk, Host, StepCost, slowest
from chairlift.backend.efficiency import Shares
from chairlift.backend.hosts import floors, told
from chairlift.backend.parallel import Parallel
from chairlift.backend.parts import Costs, Part, in_window
from chairlift.backend.shapes import GPU, Model

MS = 10**9
US = 1e-6
PIPELINE_US = 10  # of handing a step's activations to the next stage (assumed)


class Rank(NamedTuple):
    """What a rank of DP-attention does in a step, and what of the others it waits for; with one rank, all there is."""

    prefills: tuple[Chunk, ...]
    slots: int  # decodes and padded slots
    padded: int  # padding of prompts, tokens
    context: int
    most: int  # tokens of the rank that has most
    all_tokens: int  # of all ranks, which go to experts
    drafts: int = 0  # tokens of the decodes beside one each

    @property
    def tokens(self) -> int:
        """Tokens that it computes."""
        return self.slots + self.drafts + self.padded + sum(chunk.length for chunk in self.prefills)


class ByPart(Backend):
    """Step costs of ``model`` on the GPUs of one replica, part by part.

    `step` spreads its batch evenly over the ranks of DP-attention, `together` has one for each. Assumed: contexts are
    equally long where windows matter, and one step passes through all stages of a pipeline before the next one begins.
    Not modelled: kernel tile effects, overlap of collectives with other work, balancing of experts. Raises ValueError
    where the model cannot be shared out so, or a number that is needed is unknown.
    """

    name = "roofline"
    prices_drafts = True

    def __init__(self, model: Model, gpu: GPU, parallel: Parallel, efficiency: Shares) -> None:
        self.model, self.gpu, self.parallel, self.efficiency = model, gpu, parallel.check(model), efficiency
        e = efficiency
        self._costs = costs = Costs(model, gpu, parallel, e)
        self._kernels = costs.kernels() * e.kernel_us * US
        rate = costs.attention_rate()
        # a token of context takes the longer of the two, in every layer alike
        self._token = max(1, round(max(costs.kv_bytes / costs.byte_rate, costs.decode_pair / rate) * PS))
        inside = max(costs.window_bytes / costs.byte_rate, costs.window_pair / rate)
        self._in_window = max(1, round(inside * PS)) if model.window_layers else 0
        if costs.kv_bytes == 0:
            self._token = 0
        self._floor = round(e.floor_ms * MS)
        self._pace = e.pace(parallel.gpus)
        self._floors = floors(self._pace, model, e.graph_tokens)
        self._host = Host(launch=round(e.overhead_ms * MS)) if e.overhead_ms else NO_HOST
        self._collectives(1, 1)  # raises here what it would raise later
        self._fixed: dict[tuple[int, int, int], int] = {}  # of decode steps, by slots: all but attention

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; that of decodes alone holds until their windows are full, or a floor has ended."""
        if batch.prefills or batch.drafts:
            rank = self._rank(batch)
            first = self._ps(self._parts(rank))
            floor = self._floor_of(rank.most, bool(batch.prefills))
            return StepCost(max(first, floor), 0, 1, self._host)
        all_slots = batch.decodes + batch.padded
        slots = -(-all_slots // self.parallel.data)
        first, slope, steps = self._decodes(slots, batch.context * slots // all_slots, slots, all_slots)
        return self._not_below(self._floor_of(slots, False), first, slope, steps)

    def together(self, batches: Sequence[Batch]) -> StepCost:
        """As `Backend.together`: experts see the tokens of all ranks, and a rank without any computes one for nothing.

        Tokens go to their experts when the rank with most of them is ready, and a step without a CUDA graph on one rank
        has none on any, as in vLLM.
        """
        counts = [self._tokens(batch) or 1 for batch in batches]
        most, all_tokens = max(counts), sum(counts)
        if any(batch.prefills or batch.drafts for batch in batches):
            first = max(self._ps(self._parts(self._own(batch, most, all_tokens))) for batch in batches)
            floor = self._floor_of(most, any(batch.prefills for batch in batches))
            return StepCost(max(first, floor), 0, 1, self._host)
        each = zip(counts, batches, strict=True)
        costs = [StepCost(*self._decodes(slots, batch.context, most, all_tokens)) for slots, batch in each]
        first, slope, steps, _ = slowest(costs)
        return self._not_below(self._floor_of(most, False), first, slope, steps)

    def _decodes(self, slots: int, context: int, most: int, all_slots: int) -> tuple[int, int, int]:
        """First, slope and steps of decodes on a rank, as if there were no floor."""
        key = (slots, most, all_slots)
        fixed = self._fixed.get(key)
        if fixed is None:
            fixed = self._fixed[key] = self._ps(self._parts(Rank((), slots, 0, 0, most, all_slots), attention=False))
        slope = self._token * slots
        first, steps = fixed + self._token * context, FOREVER
        if self._in_window:
            inside, room = self._inside(context, slots)
            first += self._in_window * inside
            if room >= 0:
                slope += self._in_window * slots
                steps = room // slots + 1
        return first, slope, steps

    def _floor_of(self, most: int, prompts: bool) -> int:
        """No step whose rank with most tokens has so many, some of ``prompts``, is shorter, ps."""
        floors = self._floors
        return max(self._floor, floors.prompts(most) if prompts else floors.decodes(most))

    def _not_below(self, floor: int, first: int, slope: int, steps: int) -> StepCost:
        if floor > first:
            return StepCost(floor, 0, min(steps, -(-(floor - first) // slope)) if slope else steps, self._host)
        return StepCost(first, slope, steps, self._host)

    def _inside(self, context: int, slots: int) -> tuple[int, int]:
        """Tokens that ``slots`` equally long contexts have in their windows, and how many more those can hold.

        Chunks begin anew: with chunks of 4 tokens a context of 4 has all in its chunk, and one of 5 has one.
        """
        most = self.model.window * slots
        if self.model.chunked:
            inside = (context - 1) % most + 1 if context else 0
            return inside, most - inside
        return min(context, most), most - context

    def explain(self, batch: Batch) -> list[Part]:
        """The parts of the first step of ``batch``, on the GPU that takes longest; their times add up to its cost."""
        parts = self._parts(self._rank(batch))
        short = (self.step(batch).first - self._ps(parts)) / PS
        if short > 0.5 / PS * len(parts) + 1e-9:
            parts.append(Part("waiting for the host", 0, 0, 0, 0, short))
        return parts

    def _decode_attention(self, rank: Rank) -> Part:
        costs, context = self._costs, rank.context
        inside, _ = self._inside(context, rank.slots) if rank.slots else (0, 0)
        read = costs.kv_bytes * context + costs.window_bytes * inside
        flops = costs.decode_pair * context + costs.window_pair * inside
        taken = (self._token * context + self._in_window * inside) / PS
        rate = costs.attention_rate()
        if rank.drafts:  # KV is read once for all tokens of a decode
            flops *= (rank.slots + rank.drafts) / rank.slots
            return Part("KV", read, flops, read / costs.byte_rate, flops / rate)
        bound = flops / rate > read / costs.byte_rate
        memory, compute = (read / costs.byte_rate, taken) if bound else (taken, flops / rate)
        return Part("KV", read, flops, memory, compute)

    def _tokens(self, batch: Batch) -> int:
        return sum(chunk.length for chunk in batch.prefills) + batch.decodes + batch.padded + batch.drafts

    def _own(self, batch: Batch, most: int, all_tokens: int) -> Rank:
        """``batch`` as that of one rank, which computes a token for nothing where it has none."""
        slots = batch.decodes + (0 if batch.prefills else batch.padded)
        padded = batch.padded if batch.prefills else 0
        slots = slots if slots or batch.prefills else 1
        return Rank(batch.prefills, slots, padded, batch.context, most, all_tokens, batch.drafts)

    def _rank(self, batch: Batch) -> Rank:
        """The rank with most work: its share of the decodes, and the chunks dealt out, longest first."""
        ranks, all_tokens = self.parallel.data, self._tokens(batch)
        if ranks == 1:
            return self._own(batch, all_tokens, all_tokens)
        all_slots = batch.decodes + (0 if batch.prefills else batch.padded)
        padded = batch.padded if batch.prefills else 0
        slots = -(-all_slots // ranks)
        context = batch.context * slots // all_slots if all_slots else 0
        dealt: list[list[Chunk]] = [[] for _ in range(ranks)]
        load = [0] * ranks
        for chunk in sorted(batch.prefills, key=lambda chunk: -chunk.length):
            least = load.index(min(load))
            dealt[least].append(chunk)
            load[least] += chunk.length
        drafts = -(-batch.drafts // ranks)
        rank = Rank(tuple(dealt[load.index(max(load))]), slots, -(-padded // ranks), context, 0, all_tokens, drafts)
        return rank._replace(most=rank.tokens)

    def _parts(self, rank: Rank, attention: bool = True) -> list[Part]:
        """All parts of a step on a rank; without the KV that decodes read, if not ``attention``."""
        costs, e = self._costs, self.efficiency
        parts = costs.linear(rank.tokens, rank.all_tokens, rank.slots + rank.drafts + len(rank.prefills))
        if rank.prefills:
            parts.append(self._prompt_attention(rank.prefills))
        if rank.slots and attention:
            parts.append(self._decode_attention(rank))
        sequences = (rank.slots + len(rank.prefills)) * self.model.layers * e.attention_us * US
        parts.append(Part("kernels", 0, 0, 0, 0, self._kernels + sequences))
        parts.append(Part("collectives", 0, 0, 0, 0, self._collectives(rank.tokens, rank.most)))
        return parts

    def _prompt_attention(self, prefills: tuple[Chunk, ...]) -> Part:
        costs, model = self._costs, self.model
        pairs = inside = history = recent = 0
        for start, length in prefills:
            pairs += length * (2 * start + length + 1) // 2
            inside += in_window(start, length, model.window, model.chunked)
            history += start
            recent += start % model.window if model.chunked else min(start, model.window)
        flops = costs.prompt_pair * pairs + costs.window_pair * inside + costs.unpacking * history
        read = costs.kv_bytes * history + costs.window_bytes * recent
        return Part("attention of prompts", read, flops, read / costs.byte_rate, flops / costs.attention_rate())

    def _collectives(self, tokens: int, most: int) -> float:
        """Seconds of a step's collectives: two all-reduces a layer; between ranks, one and a way to the experts.

        ``tokens``: of this rank; ``most``: of the rank with most of them.
        """
        model, parallel, gpu = self.model, self.parallel, self.gpu
        graph = most <= self.efficiency.graph_tokens
        size = tokens * model.hidden * model.bytes_per_activation
        reduce = collectives.all_reduce_us(gpu, parallel.tensor, size, graph)
        spread = model.expert_layers if parallel.data > 1 else 0  # layers whose tokens go to experts of other ranks
        taken = (2 * model.layers - spread) * reduce
        if spread:
            share = -(-most // parallel.tensor)
            each = (gpu, parallel.ranks, share, model.hidden, model.experts_per_token, graph)
            taken += spread * collectives.all_to_all_us(*each)
        if parallel.pipeline > 1:
            rate = collectives.one_way_gb_per_s(gpu, "pipeline parallelism") * 1e3  # bytes a µs
            taken += (parallel.pipeline - 1) * (PIPELINE_US + size / rate)
        return taken * US

    def _ps(self, parts: list[Part]) -> int:
        return sum(round(part.seconds * PS) for part in parts)

    def assumptions(self) -> dict[str, str]:
        """Everything that is assumed, not measured, of the model on these GPUs."""
        e, model, parallel = self.efficiency, self.model, self.parallel
        lines = {
            "cost model": f"roofline by part: {model.name} on {parallel.gpus} × {self.gpu.name}"
            + (f" ({parallel})" if parallel.gpus > 1 else ""),
            "efficiency": f"MFU {e.gemm_mfu:g}, of attention {e.mfu:g}, bandwidth {e.bandwidth:g} (assumed);"
            f" {e.kernel_us:g} µs a kernel, {e.attention_us:g} µs a sequence and layer of attention"
            + e.unused(by_part=True, several=parallel.gpus > 1, experts=bool(model.experts)),
            "host": told(e.host, self._pace, self._floors),
        }
        if model.experts:
            popular = f"popularity a power law of {e.skew:g}" if e.skew else "chosen uniformly at random"
            lines["experts"] = f"{model.experts_per_token} of {model.experts} a token, {popular}" + (
                "; the step waits for the hottest group" if parallel.expert > 1 else ""
            )
            if e.expert_rows > 1:
                lines["experts"] += f"; every step reads all of them and {e.expert_rows} rows of activations of each"
        if model.window_layers:
            back = f"within chunks of {model.window} tokens" if model.chunked else f"on {model.window} tokens"
            lines["windows"] = f"{model.window_layers} of {model.layers} layers look back {back};"
            lines["windows"] += " contexts of a step count as equally long"
        if model.quantization != "none":
            lines["weights"] = f"{model.quantization} ({model.quantized}), multiplied as {self._multiplied()}"
        if parallel.gpus > 1:
            lines["collectives"] = "as measured on 8 × H200, scaled by the links' bandwidth; none overlaps other work"
        if parallel.data > 1:
            lines["DP-attention"] = (
                "each rank has its own requests and KV; a step ends with the slowest, idle ones run a token for nothing"
            )
        if e.floor_ms or e.overhead_ms:
            lines["host, besides"] = f"no step below {e.floor_ms:g} ms, {e.overhead_ms:g} ms added to each"
        return lines

    def _multiplied(self) -> str:
        asked = {part.arithmetic for part in self.model.weights if part.bytes_each != self.model.bytes_per_param}
        peaks = {"fp8": self.gpu.fp8_tflops, "fp4": self.gpu.fp4_tflops, "bf16": self.gpu.bf16_tflops}
        said = [name if peaks[name] else f"{name}, which {self.gpu.name} widens" for name in sorted(asked)]
        return ", ".join(said) or "bf16"
