"""An analytic step cost: what the FLOPs and the bytes of a whole step take at stated efficiencies.

Prompts are computed at a fraction of the peak FLOP/s (``mfu``), decodes read weights and KV at a fraction of the memory
bandwidth, and a step that has both overlaps them in part: the form that explains the figures of the continuous-batching
post. `by_part` prices what this form cannot tell apart: experts, narrow weights, windows, latent attention, several
GPUs. Costs are integer picoseconds, and affine in the context length between breakpoints, so that a run of steps can be
added up exactly in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from chairlift.backend.base import FOREVER, NO_HOST, PS, Backend, Batch, Host, StepCost, new
from chairlift.backend.by_part import ByPart
from chairlift.backend.efficiency import Shares
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.shapes import GPU, Model

MS = 10**9


@dataclass(frozen=True)
class Efficiency(Shares):
    """How far below the data sheet a real engine stays. Assumptions, not measurements: print them."""

    def build(self, model: Model, gpu: GPU, parallel: Parallel) -> Backend:
        """The cost model with these efficiencies. Raises ValueError where it needs a number that is unknown."""
        can = model.plain and parallel.only_tensor
        wanted = not self.by_part if self.by_part is not None else parallel.gpus == 1
        if not (can and wanted):
            return ByPart(model, gpu, parallel, self)
        return Roofline(model, gpu, parallel, self)


class Roofline(Backend):
    """Step costs of ``model`` on ``tensor_parallel`` × ``gpu``.

    Prompt work: max(FLOPs ÷ (mfu · peak), bytes ÷ (bandwidth · HBM)). Decode work: the same maximum, its bytes the
    weights and every context. A step with both takes the longer and the share of the shorter that does not overlap.
    Tensor parallelism divides FLOPs and bytes and adds two all-reduces a layer (a ring's volume, and a latency).
    Not modelled here: experts, quantised arithmetic, windows, latent attention, other parallelism (`ByPart` does),
    kernel tile effects, sampling.
    """

    name = "roofline"
    prices_drafts = True

    def __init__(self, model: Model, gpu: GPU, parallel: Parallel = ONE, efficiency: Efficiency | None = None) -> None:
        self.model, self.gpu, self.parallel = model, gpu, parallel
        self.efficiency = e = efficiency or Efficiency()
        tp = parallel.tensor
        kv_bytes = model.kv_bytes_per_token_on(tp)  # also checks tp
        flops = e.mfu * gpu.bf16_tflops * 1e12 * tp
        byte_rate = e.bandwidth * gpu.hbm_gb_per_s * 1e9
        self._token = round(2 * model.matmul_parameters / flops * PS)
        self._sequence = round(2 * model.head_parameters / flops * PS)
        self._pair = round(4 * model.layers * model.heads * model.head_size / flops * PS)  # QK and PV
        self._weights = round(model.weight_bytes / tp / byte_rate * PS)
        self._kv = max(1, round(kv_bytes / byte_rate * PS))
        self._reduce_fixed, self._reduce_token = self._all_reduce()
        self._floor = round(e.floor_ms * MS)
        apart = 1 - Fraction(e.mixed_overlap).limit_denominator(1000)  # of the shorter part, what does not overlap
        self._apart, self._apart_of = apart.numerator, apart.denominator
        self._host = Host(launch=round(e.overhead_ms * MS)) if e.overhead_ms else NO_HOST

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; that of decodes alone holds until another bound of the roofline takes over."""
        prefills, decodes, context, padded, _, drafts, _ = batch
        if prefills:
            return self._with_prompts(batch)
        if drafts:
            return self._verifying(batch)
        slots = decodes + padded
        reduce = self._reduce_fixed + self._reduce_token * slots
        compute_slope = self._pair * slots
        compute = slots * (self._token + self._sequence) + self._pair * context + reduce
        memory_slope = self._kv * slots
        memory = self._weights + self._kv * context + reduce
        floor = self._floor
        if floor > memory and floor > compute:
            steps = min(_until(floor, 0, memory, memory_slope), _until(floor, 0, compute, compute_slope))
            return StepCost(floor, 0, steps, self._host)
        if memory >= compute:
            steps = _until(memory, memory_slope, compute, compute_slope)
            return new(StepCost, (memory, memory_slope, steps, self._host))
        steps = _until(compute, compute_slope, memory, memory_slope)
        return new(StepCost, (compute, compute_slope, steps, self._host))

    def _verifying(self, batch: Batch) -> StepCost:
        """Decodes with drafts: each reads its context once, and multiplies it with all of its tokens."""
        tokens = batch.decodes + batch.drafts
        compute = tokens * (self._token + self._sequence) + self._pair * batch.context * tokens // batch.decodes
        memory = self._weights + self._kv * batch.context
        first = max(compute, memory) + self._reduce_fixed + self._reduce_token * tokens
        return StepCost(max(first, self._floor), 0, 1, self._host)

    def _with_prompts(self, batch: Batch) -> StepCost:
        prefills, decodes, context, padded, _, drafts, _ = batch
        tokens = pairs = history = 0
        for start, length in prefills:
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
            history += start
        padded += tokens
        compute = padded * self._token + pairs * self._pair + len(prefills) * self._sequence
        memory = self._weights + history * self._kv
        prompt = compute if compute >= memory else memory
        if decodes:
            memory = self._weights + self._kv * context
            compute = (decodes + drafts) * (self._token + self._sequence)
            compute += self._pair * context * (decodes + drafts) // decodes
            decode = compute if compute >= memory else memory
            longer, shorter = (prompt, decode) if prompt >= decode else (decode, prompt)
            prompt = longer + shorter * self._apart // self._apart_of
        prompt += self._reduce_fixed + self._reduce_token * (padded + decodes + drafts)
        return new(StepCost, (prompt if prompt >= self._floor else self._floor, 0, 1, self._host))

    def _all_reduce(self) -> tuple[int, int]:
        """Picoseconds of a step's all-reduces: a fixed part, and a part for each token.

        A ring of n GPUs moves 2 (n − 1) / n of the reduced bytes over each link: the activations of a token, hidden
        wide.
        """
        tp, e = self.parallel.tensor, self.efficiency
        if tp == 1:
            return 0, 0
        what = "tensor parallelism"
        one_way = self.gpu.needed("nvlink_gb_per_s", what) / 2 or self.gpu.needed("host_gb_per_s", what)
        one_way = one_way * 1e9 * e.link  # bytes a second
        count = 2 * self.model.layers
        volume = 2 * (tp - 1) / tp * self.model.hidden * self.model.bytes_per_activation  # bytes a token
        return round(count * e.allreduce_us * 1e-6 * PS), round(count * volume / one_way * PS)

    def assumptions(self) -> dict[str, str]:
        """The efficiencies, and the time in which the weights are read once."""
        e = self.efficiency
        lines = {
            "cost model": f"roofline: {self.model.name} on {self.parallel.gpus} × {self.gpu.name}",
            "efficiency": f"MFU {e.mfu:g}, bandwidth {e.bandwidth:g} (assumed, not measured);"
            f" mixed steps overlap {e.mixed_overlap:g} of the shorter part",
            "decode floor": f"{self._weights / MS:.2f} ms to read the weights once",
        }
        if e.floor_ms or e.overhead_ms:
            lines["host"] = f"no step below {e.floor_ms:g} ms, {e.overhead_ms:g} ms added to each"
        return lines


def _until(bound: int, slope: int, other: int, other_slope: int) -> int:
    """For how many steps the line ``other`` stays at or below the line ``bound``, where it is now."""
    if other_slope <= slope:
        return FOREVER
    return (bound - other) // (other_slope - slope) + 1
