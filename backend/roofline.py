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

from chairlift.backend.base import NO_HOST, PS, Backend, Batch, Host, StepCost
from chairlift.backend.by_part import ByPart
from chairlift.backend.efficiency import Shares
from chairlift.backend.hosts import floors, told
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.rates import Rates
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
    Tensor parallelism divides FLOPs and bytes and adds two all-reduces a layer (a ring's volume, and a latency). No
    step outruns its host (`backend.hosts`).
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
        self._pace = e.pace(parallel.gpus)
        self._floors = floors(self._pace, model, e.graph_tokens)
        flops = e.mfu * gpu.bf16_tflops * 1e12 * tp
        byte_rate = e.bandwidth * gpu.hbm_gb_per_s * 1e9
        self._weights = round(model.weight_bytes / tp / byte_rate * PS)
        reduce_fixed, reduce_token = self._all_reduce()
        apart = 1 - Fraction(e.mixed_overlap).limit_denominator(1000)  # of the shorter part, what does not overlap
        self._rates = Rates(
            token=round(2 * model.matmul_parameters / flops * PS),
            sequence=round(2 * model.head_parameters / flops * PS),
            pair=round(4 * model.layers * model.heads * model.head_size / flops * PS),  # QK and PV
            weights=self._weights,
            kv=max(1, round(kv_bytes / byte_rate * PS)),
            reduce_fixed=reduce_fixed,
            reduce_token=reduce_token,
            floor=round(e.floor_ms * MS),
            **self._floors._asdict(),
            apart=apart.numerator,
            apart_of=apart.denominator,
            host=Host(launch=round(e.overhead_ms * MS)) if e.overhead_ms else NO_HOST,
        )

        if type(self).step is Roofline.step:  # no detour at every step
            self.step = self._rates.step  # type: ignore[method-assign]

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; that of decodes alone holds until another bound of the roofline takes over."""
        return self._rates.step(batch)

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
            f" mixed steps overlap {e.mixed_overlap:g} of the shorter part"
            + e.unused(by_part=False, several=self.parallel.gpus > 1, experts=False),
            "decode floor": f"{self._weights / MS:.2f} ms to read the weights once",
            "host": told(e.host, self._pace, self._floors),
        }
        if e.floor_ms or e.overhead_ms:
            lines["host, besides"] = f"no step below {e.floor_ms:g} ms, {e.overhead_ms:g} ms added to each"
        return lines
