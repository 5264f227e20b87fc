"""What a step costs by a profile: the form of `backend.calibrated.profile`, in integer picoseconds.

Every price is a whole number of picoseconds and affine in the context length, so that the simulator can add up a run of
decode steps in closed form and get what it would get step by step.
"""

from __future__ import annotations

import numpy as np

from chairlift.backend.base import FOREVER, PS, WHOLE, Backend, Batch, Host, StepCost
from chairlift.backend.calibrated.profile import DraftTime, Profile, between
from chairlift.backend.calibrated.warmth import LEVELS, Warmth
from chairlift.backend.cuda_graphs import padded
from chairlift.backend.whole_prompts import dense
from chairlift.backend.whole_prompts import pairs as whole_pairs

# Of launching a pass that drafts, where it shows: vLLM 0.26 on an H200 launched a step of Llama-3.1-8B with 3 drafts of
# an EAGLE3 head in 14.9 ms, without in 10.7, in pieces of a graph; kernel by kernel in 33 and 26.
LAUNCH_US = 1400


class Calibrated(Backend):
    """Prices steps by ``profile``, whose largest CUDA graph ``graph_tokens`` replaces if it is given."""

    name = "profile"
    prices_drafts = True

    def __init__(self, profile: Profile, graph_tokens: int | None = None) -> None:
        self.profile = profile
        self.limit = profile.graph_tokens if graph_tokens is None else graph_tokens
        gpu, host = profile.gpu_time, profile.host
        self._gpu = gpu
        self._kv_mixed = _ps(gpu.kv_mixed_s)
        self._pair_fs, self._whole_pair_fs = round(gpu.pair_s * PS * 1000), round(gpu.whole_pair_s * PS * 1000)
        self._sequence = _ps(gpu.sequence_s)
        drafting = gpu.drafting or DraftTime(0.0, 0.0, gpu.sequence_s)
        self._pass, self._draft = _ps(drafting.pass_s), _ps(drafting.draft_s)
        self._draft_token, self._verify, self._kv_verify = map(
            _ps, (drafting.token_s, drafting.verify_s, drafting.kv_s)
        )
        self._chunk, self._request = _ps(gpu.chunk_s), _ps(gpu.request_s)
        self._schedule = _ps(host.schedule_s), _ps(host.schedule_request_s), _ps(host.schedule_token_s)
        self._schedule_chunk = _ps(host.schedule_chunk_s)
        self._update = _ps(host.update_s), _ps(host.update_request_s)
        self._launch = {"graph": _ps(host.graph_s), "piecewise": _ps(host.piecewise_s), "eager": _ps(host.eager_s)}
        self._tail = _ps(host.tail_s)
        self._head = {kind: min(_ps(host.head_s), launch) for kind, launch in self._launch.items()}
        self._floor = {"piecewise": _ps(gpu.piecewise_floor_s), "eager": _ps(gpu.eager_floor_s)}
        self.arrival, self.arrival_token = _ps(host.arrival_s), _ps(host.arrival_token_s)
        self._decodes: dict[int, tuple[int, int, Host]] = {}
        self._verifying: dict[tuple[int, int, int], tuple[int, int, Host]] = {}
        self._matmuls: dict[tuple[int, int], tuple[int, int]] = {}
        self.remembers = max(gpu.hot_chunk, gpu.hot_computed, gpu.hot_kv) > 0
        self._warmth = Warmth()
        self._token = _ps(gpu.hot_token_s or gpu.token_s)

    def ran(self, tokens: int, gpu: int, slope: int, count: int) -> None:
        """Remember how warm prompts made the GPU."""
        if tokens:
            self._warmth.heat(*self._prompts(tokens, gpu, self._kind(tokens)))
        else:
            self._warmth.cool(gpu * count + slope * (count * (count - 1) // 2))

    def _kind(self, tokens: int) -> str:
        """How a step with chunks of so many tokens is launched."""
        return "piecewise" if tokens <= self.limit and self.profile.piecewise else "eager"

    def _prompts(self, tokens: int, gpu: int, kind: str) -> tuple[int, float]:
        """How many ps a step with chunks takes at least, and the share of that in which it computes prompts.

        A launch that outlasts the GPU's work lets it cool meanwhile.
        """
        took = max(gpu, self._launch[kind], 1)
        return took, min(1.0, self._token * tokens / took)

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; that of decodes alone holds for as long as the batch keeps its members."""
        if batch.prefills:
            return self._with_chunks(batch)
        if batch.drafts or batch.proposes:
            return self._with_drafts(batch)
        slots = batch.decodes + batch.padded
        found = self._decodes.get(slots)
        if found is None:
            found = self._decodes[slots] = self._decode_only(slots)
        fixed, kv, host = found
        level = self._warmth.level if self.remembers else 0
        if not level:
            return StepCost(fixed + kv * batch.context, kv * slots, FOREVER, host)
        kv = round(kv * (1 + self._gpu.hot_kv * level / LEVELS))
        first, slope = fixed + kv * batch.context, kv * slots
        return StepCost(first, slope, self._warmth.steps(first, slope), host)

    def _with_drafts(self, batch: Batch) -> StepCost:
        """The cost of decodes with drafts alone; how far contexts grow until the next step is not known."""
        key = batch.decodes + batch.padded, batch.drafts, batch.proposes
        found = self._verifying.get(key)
        if found is None:
            found = self._verifying[key] = self._decode_only(*key)
        fixed, kv, host = found
        if self.remembers:
            kv = round(kv * (1 + self._gpu.hot_kv * self._warmth.now))
        return StepCost(fixed + kv * batch.context, 0, 1, host)

    def _decode_only(self, slots: int, drafts: int = 0, proposes: int = 0) -> tuple[int, int, Host]:
        """Of a step of ``slots`` decodes alone: its fixed ps, its ps a token of context, and the host's time.

        ``drafts``: tokens that they verify beside one each; ``proposes``: drafts of each after it.
        """
        tokens = padded(slots + drafts, self.limit)
        both = np.array([[tokens], [slots + drafts]], dtype=np.float64)
        seconds = float(self._gpu.matmuls(both[0], self._gpu.decode_residual, both[1])[0])
        fixed = max(1, round(seconds * PS)) + self._sequence * slots
        if drafts or proposes:
            fixed += self._draft * drafts + self._pass * proposes + self._draft_token * tokens * (proposes > 0)
        graph = tokens <= self.limit
        whole = graph and self.profile.drafts is None  # with drafts, the passes that make them follow the graph
        kind = "graph" if graph else "eager"
        schedule, update = self._schedule, self._update
        host = Host(
            schedule[0] + schedule[1] * slots,
            self._launch_of(kind, proposes),
            update[0] + update[1] * slots,
            WHOLE if whole else self._tail,
            0 if whole else self._head[kind],
        )
        kv = _ps(self._gpu.kv_s * float(between(self._gpu.kv_residual, np.array([slots]))[0]))
        return fixed + self._verify * (drafts > 0), kv + self._kv_verify * (drafts > 0), host

    def _launch_of(self, kind: str, proposes: int) -> int:
        """The host's ps to launch such a step, with the passes that make other than the measured number of drafts.

        Each pass takes `LAUNCH_US`, or its part of the whole launch where that is less: our own engine's passes are one
        graph.
        """
        launch, drafts = self._launch[kind], self.profile.drafts
        if drafts is not None and proposes:
            launch += (proposes - drafts.tokens) * min(LAUNCH_US * 10**6, launch // drafts.tokens)
        return launch

    def _with_chunks(self, batch: Batch) -> StepCost:
        tokens = pairs = 0
        for start, length in batch.prefills:
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
        chunks = len(batch.prefills)
        sequences = batch.decodes + chunks
        all_tokens = tokens + batch.decodes + batch.padded + batch.drafts
        computed = padded(all_tokens, self.limit) if self.profile.piecewise else all_tokens
        live = all_tokens if self._gpu.live_experts else computed
        matmuls, warmer = self._matmuls.get((computed, live)) or self._chunk_matmuls(computed, live)
        kv = self._kv_mixed * batch.context
        gpu = matmuls + self._sequence * sequences + kv
        if batch.drafts or batch.proposes:
            gpu += self._draft * batch.drafts + self._pass * batch.proposes
            gpu += self._draft_token * computed * (batch.proposes > 0)
        kind = self._kind(all_tokens)
        attention = pairs * self._pair_fs
        if self._whole_pair_fs and kind == "eager" and not (self.profile.drafts and batch.decodes):
            whole = [length for start, length in batch.prefills if not start]
            if len(whole) == chunks and dense(whole):
                attention = whole_pairs(whole) * self._whole_pair_fs
        gpu += attention // 1000 + self._chunk + self._request * chunks
        if self.remembers:
            warmth = self._warmth.mean(*self._prompts(all_tokens, gpu, kind))
            longer = warmer + self._gpu.hot_computed * (attention // 1000 + kv)
            gpu = round((gpu + longer * warmth) * (1 + self._gpu.hot_chunk * warmth))
        schedule, update = self._schedule, self._update
        host = Host(
            schedule[0] + schedule[1] * sequences + schedule[2] * tokens + self._schedule_chunk * chunks,
            self._launch_of(kind, batch.proposes),
            update[0] + update[1] * sequences,
            self._tail,
            self._head[kind],
        )
        return StepCost(max(gpu, self._floor[kind]), 0, 1, host)

    def _chunk_matmuls(self, computed: int, live: int) -> tuple[int, int]:
        """The ps of the matmuls of a step with chunks, and by how many more they are on a GPU that is warm all the way.

        Between a cool and a warm GPU a price is linear in the warmth, as matmuls of Llama-3.1-8B are to within 0.1 %.
        """
        tokens, sent = np.array([[computed] * 2, [live] * 2], dtype=np.float64)
        slower = np.array([1.0, 1 + self._gpu.hot_computed])
        cool, warm = self._gpu.chunk_matmuls(tokens, sent, slower).tolist()
        found = self._matmuls[computed, live] = max(1, round(cool * PS)), round((warm - cool) * PS)
        return found

    def assumptions(self) -> dict[str, str]:
        """Which profile prices the steps, how far off it was on steps left out of its fit, and what it assumes."""
        profile = self.profile
        lines = {"cost model": f"profile {profile.name} ({profile.digest}): {profile.engine}, {profile.model}"}
        if profile.scaled:
            lines["scaled, not measured"] = profile.scaled
        if profile.drafts:
            lines["drafting"] = (
                f"measured {profile.drafts} of its own layer: a pass of {self._pass / 1e9:.2f} ms for each draft"
            )
        errors = profile.errors
        for found, what in (
            (errors.get("gpu"), "GPU time"),
            (errors.get("steps"), "step, launches included"),
        ):
            if found:
                told = ", ".join(f"{regime} {100 * e['median']:.1f} %" for regime, e in found.items())
                lines[f"held-out error, {what}"] = f"{told} (median{', before scaling' if profile.scaled else ''})"
        for i, note in enumerate(profile.notes):
            lines["profile" if i == 0 else f"profile, {i + 1}"] = note
        return lines


def _ps(seconds: float) -> int:
    return round(seconds * PS)
