"""Step costs calibrated on a real engine: a small physical form with residual tables, and the host's share.

GPU time of a step that computes T tokens (padded to a CUDA graph's size where one is replayed) for N sequences::

    (weights^p + (token · T)^p)^(1/p) · residual(T)   the matmuls: from memory- to compute-bound
    + sequence · N                                    LM head and sampler
    + kv · residual(N) · Σ context                    decodes' attention (another rate beside chunks)
    + pair · Σ query–key pairs + chunk + request · n  n chunks' attention

Host time: scheduling and updating, each fixed + per request + per token; launching, by how the step runs (one CUDA
graph, piecewise graphs, or kernel by kernel); taking requests in. `backend.fitting.fit` fits all of it to recordings.
Everything that the engine adds up is an integer number of picoseconds, affine in the context, so it leaps exactly.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
from annotated_types import Ge

from chairlift.backend.base import FOREVER, WHOLE, Backend, Batch, Host, StepCost
from chairlift.backend.shapes import GPU, Model

PS = 10**12
SHIPPED = Path(__file__).resolve().parent / "profiles"
FORMAT = 1
GRAPH_TOKENS = 512  # the largest CUDA graph that vLLM 0.23 captures, and our own engine too
Floats = npt.NDArray[np.float64]
Knots = tuple[tuple[int, float], ...]  # (tokens, factor), ascending


class ProfileError(ValueError):
    """A profile that cannot be used; one sentence."""


def between(residual: Knots, at: Floats) -> Floats:
    """The factor at ``at``: linear in its logarithm between knots, constant outside."""
    knots, factors = np.array(residual, dtype=np.float64).T
    found: Floats = np.interp(np.log(np.maximum(at, 1)), np.log(knots), factors)
    return found


@dataclass(frozen=True)
class GpuTime:
    """The GPU's part, seconds; see the module's docstring for the form."""

    weights_s: float  # one pass over the weights
    token_s: float  # matmuls of one token where they are compute-bound
    sharpness: float  # p: how abruptly one bound takes over from the other
    sequence_s: float
    kv_s: float  # a token of context, decode-only steps
    kv_mixed_s: float  # the same beside chunks
    pair_s: float
    chunk_s: float  # a step with any chunk
    request_s: float  # each chunk
    decode_residual: Knots = ((1, 1.0),)
    chunk_residual: Knots = ((1, 1.0),)
    kv_residual: Knots = ((1, 1.0),)  # by decodes, decode-only steps

    def matmuls(self, tokens: Floats, residual: Knots) -> Floats:
        """Seconds of the token-wise work of ``tokens`` tokens; linear in log tokens between a residual's knots."""
        p = self.sharpness
        bound = (self.weights_s**p + (self.token_s * tokens) ** p) ** (1 / p)
        found: Floats = bound * between(residual, tokens)
        return found

    def scaled(self, compute: float, bandwidth: float) -> GpuTime:
        """For a GPU of ``compute`` × the FLOP/s and ``bandwidth`` × the bytes/s; fixed parts stay."""
        return replace(
            self,
            weights_s=self.weights_s / bandwidth,
            kv_s=self.kv_s / bandwidth,
            kv_mixed_s=self.kv_mixed_s / bandwidth,
            token_s=self.token_s / compute,
            sequence_s=self.sequence_s / min(compute, bandwidth),
            pair_s=self.pair_s / compute,
        )


@dataclass(frozen=True)
class HostTime:
    """The host's part, seconds."""

    schedule_s: float
    schedule_request_s: float  # each running request
    schedule_token_s: float  # each prompt token
    update_s: float
    update_request_s: float
    arrival_s: float  # taking a request in
    arrival_token_s: float  # each token of its prompt
    graph_s: float  # launch of one whole CUDA graph
    piecewise_s: float  # launch of a step with a chunk that fits the captured graphs
    eager_s: float  # launch of a larger step
    tail_s: float  # GPU work that waits for the end of such a launch


class Spread(TypedDict):
    """By how much steps of one regime and length were off, in runs that the fit had not seen."""

    upto_s: float | None  # predicted to take at most so long, s; None: the longest
    runs: int  # how many tell
    rms: float  # of the logarithm of recorded ÷ predicted, over whole runs
    steps: list[float]  # quantiles of the same over steps, each beside its run's; at `residuals.QUANTILES`


@dataclass(frozen=True)
class Profile:
    """A calibrated cost model with where it comes from and how far off it was."""

    name: str
    model: str
    gpu: str
    engine: str
    gpu_time: GpuTime
    host: HostTime
    graph_tokens: int = GRAPH_TOKENS  # the largest captured CUDA graph
    piecewise: bool = True  # whether steps with chunks are padded to a captured size too; else they run as they are
    tensor_parallel: int = 1
    provenance: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)  # held out, relative: `steps` by regime, `runs` by experiment
    spread: dict[str, list[Spread]] = field(default_factory=dict)  # by regime, rising lengths of steps
    scaled: str = ""  # how it was derived from a measured one; "" if it was measured
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The profile's file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """Twelve hex digits that say which numbers these are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def load(choice: str) -> Profile:
    """The profile ``choice`` names: a path ending in .json, or a shipped one. Raises `ProfileError`."""
    path = Path(choice) if choice.endswith(".json") else SHIPPED / f"{choice}.json"
    if not path.is_file():
        if choice.endswith(".json"):
            raise ProfileError(f"{path}: no such file")
        near = get_close_matches(choice, shipped(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(shipped())}"
        raise ProfileError(f"no profile {choice!r} – {hint}")
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path}: not a profile: {error}") from None


def shipped() -> list[str]:
    """Names of the profiles that come with Chairlift."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def parse(data: Any) -> Profile:
    """A profile from its JSON; raises ValueError or TypeError, one sentence."""
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ProfileError(f"format must be {FORMAT}")
    parts = {"gpu_time": GpuTime, "host": HostTime}
    for key, kind in (*parts.items(), ("", Profile)):
        given = data.get(key) if key else data
        known = [f.name for f in fields(kind)]
        if not isinstance(given, dict):
            raise ProfileError(f"{key} must be an object")
        for name in given.keys() - known:
            raise ProfileError(f"{key + '.' if key else ''}{name} is unknown")
        for name, value in given.items():
            if key and not name.endswith("residual") and not (isinstance(value, int | float) and 0 <= value < 1e6):
                raise ProfileError(f"{key}.{name} must be a number, at least 0 (got {value!r})")
    gpu_time = dict(data["gpu_time"])
    for name in ("decode_residual", "chunk_residual", "kv_residual"):
        gpu_time[name] = tuple((int(at), float(factor)) for at, factor in gpu_time.get(name, [(1, 1.0)]))
    data = {**data, "gpu_time": GpuTime(**gpu_time), "host": HostTime(**data["host"])}
    for each in [each for lengths in data.get("spread", {}).values() for each in lengths]:
        if each.keys() != Spread.__annotations__.keys():
            raise ProfileError(f"spread must list {', '.join(Spread.__annotations__)} (got {', '.join(each)})")
    data["notes"] = tuple(data.get("notes", ()))
    return Profile(**data)


def graph_limit(limits: Mapping[str, int]) -> int:
    """The largest CUDA graph of an engine with these settings, in tokens: as it says, or what vLLM 0.23 captures."""
    usual = min(GRAPH_TOKENS, 2 * limits["max_num_seqs"], limits["max_num_batched_tokens"])
    return limits.get("graph_tokens", usual)


@cache
def graph_sizes(limit: int) -> tuple[int, ...]:
    """Batch sizes that vLLM 0.23 captures, by default, up to ``limit``."""
    return tuple(n for n in (1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16)) if n <= limit)


def padded(tokens: int, limit: int) -> int:
    """Tokens that a step of ``tokens`` computes: a captured size, or just those beyond the largest."""
    sizes = graph_sizes(limit)
    i = bisect_left(sizes, tokens)
    return sizes[i] if i < len(sizes) else tokens


class Calibrated(Backend):
    """Prices steps by a `Profile`; exact integers throughout."""

    name = "profile"

    def __init__(self, profile: Profile, graph_tokens: int | None = None) -> None:
        self.profile = profile
        self.limit = profile.graph_tokens if graph_tokens is None else graph_tokens
        gpu, host = profile.gpu_time, profile.host
        self._gpu = gpu
        self._kv_mixed = _ps(gpu.kv_mixed_s)
        self._pair_fs = round(gpu.pair_s * PS * 1000)
        self._sequence = _ps(gpu.sequence_s)
        self._chunk, self._request = _ps(gpu.chunk_s), _ps(gpu.request_s)
        self._schedule = _ps(host.schedule_s), _ps(host.schedule_request_s), _ps(host.schedule_token_s)
        self._update = _ps(host.update_s), _ps(host.update_request_s)
        self._launch = {"graph": _ps(host.graph_s), "piecewise": _ps(host.piecewise_s), "eager": _ps(host.eager_s)}
        self._tail = _ps(host.tail_s)
        self.arrival, self.arrival_token = _ps(host.arrival_s), _ps(host.arrival_token_s)
        self._decodes: dict[int, tuple[int, int, Host]] = {}
        self._matmuls: dict[int, int] = {}

    def step(self, batch: Batch) -> StepCost:
        """The cost of ``batch``; a decode-only batch vouches for as long as its members stay."""
        if batch.prefills:
            return self._with_chunks(batch)
        slots = batch.decodes + batch.padded
        found = self._decodes.get(slots)
        if found is None:
            found = self._decodes[slots] = self._decode_only(slots)
        fixed, kv, host = found
        return StepCost(fixed + kv * batch.context, kv * slots, FOREVER, host)

    def _decode_only(self, slots: int) -> tuple[int, int, Host]:
        """Fixed ps, ps a token of context, and the host's time."""
        tokens = padded(slots, self.limit)
        seconds = float(self._gpu.matmuls(np.array([tokens], dtype=np.float64), self._gpu.decode_residual)[0])
        fixed = max(1, round(seconds * PS)) + self._sequence * slots
        whole = tokens <= self.limit
        schedule, update = self._schedule, self._update
        host = Host(
            schedule[0] + schedule[1] * slots,
            self._launch["graph" if whole else "eager"],
            update[0] + update[1] * slots,
            WHOLE if whole else self._tail,
        )
        kv = _ps(self._gpu.kv_s * float(between(self._gpu.kv_residual, np.array([slots]))[0]))
        return fixed, kv, host

    def _with_chunks(self, batch: Batch) -> StepCost:
        tokens = pairs = 0
        for start, length in batch.prefills:
            tokens += length
            pairs += length * (2 * start + length + 1) // 2
        chunks = len(batch.prefills)
        sequences = batch.decodes + chunks
        all_tokens = tokens + batch.decodes + batch.padded
        computed = padded(all_tokens, self.limit) if self.profile.piecewise else all_tokens
        matmuls = self._matmuls.get(computed)
        if matmuls is None:
            seconds = float(self._gpu.matmuls(np.array([computed], dtype=np.float64), self._gpu.chunk_residual)[0])
            matmuls = self._matmuls[computed] = max(1, round(seconds * PS))
        gpu = matmuls + self._sequence * sequences + self._kv_mixed * batch.context
        gpu += pairs * self._pair_fs // 1000 + self._chunk + self._request * chunks
        schedule, update = self._schedule, self._update
        host = Host(
            schedule[0] + schedule[1] * sequences + schedule[2] * tokens,
            self._launch["piecewise" if computed <= self.limit and self.profile.piecewise else "eager"],
            update[0] + update[1] * sequences,
            self._tail,
        )
        return StepCost(gpu, 0, 1, host)

    def assumptions(self) -> dict[str, str]:
        """Where the numbers come from, how far off they were, and what is not measured."""
        profile = self.profile
        lines = {"cost model": f"profile {profile.name} ({profile.digest}): {profile.engine}, {profile.model}"}
        if profile.scaled:
            lines["scaled, not measured"] = profile.scaled
        for key, what in (("gpu", "GPU time"), ("steps", "step, launches included")):
            if found := profile.errors.get(key):
                told = ", ".join(f"{regime} {100 * e['median']:.1f} %" for regime, e in found.items())
                lines[f"held-out error, {what}"] = f"{told} (median{', before scaling' if profile.scaled else ''})"
        for i, note in enumerate(profile.notes):
            lines["profile" if i == 0 else f"profile, {i + 1}"] = note
        return lines


@dataclass(frozen=True)
class Settings:
    """Step costs calibrated on a real engine: a shipped profile's name, or a .json file."""

    profile: str
    graph_tokens: Annotated[int, Ge(1)] | None = None  # the largest captured CUDA graph; None: as recorded
    draw: Annotated[int, Ge(0)] = 0  # which draw of its errors to add; 0: none

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Calibrated:
        """The cost model; scaled by roofline ratios where the GPU is not the profile's, which it then says."""
        profile = load(self.profile)
        if profile.model != model.name:
            raise ProfileError(f"profile {profile.name} is of {profile.model}, not of {model.name}")
        if profile.tensor_parallel != tensor_parallel:
            raise ProfileError(f"profile {profile.name} is of {profile.tensor_parallel} GPUs, not of {tensor_parallel}")
        if profile.gpu != gpu.name:
            profile = scaled(profile, gpu)
        if self.draw:
            from chairlift.backend.calibrated.resampled import Resampled

            return Resampled(profile, self.graph_tokens, self.draw)
        return Calibrated(profile, self.graph_tokens)


def scaled(profile: Profile, gpu: GPU) -> Profile:
    """``profile`` for another GPU, by the ratios of data-sheet peaks. A guess, and marked as one."""
    from chairlift.backend.specs import gpu as find

    own = find(profile.gpu)
    compute, bandwidth = gpu.bf16_tflops / own.bf16_tflops, gpu.hbm_gb_per_s / own.hbm_gb_per_s
    return replace(
        profile,
        name=f"{gpu.name}-{profile.name} (scaled)",
        gpu=gpu.name,
        gpu_time=profile.gpu_time.scaled(compute, bandwidth),
        scaled=f"{profile.gpu} → {gpu.name}: compute × {compute:.3g}, bandwidth × {bandwidth:.3g}; host time as there",
    )


def _ps(seconds: float) -> int:
    return round(seconds * PS)


@dataclass(frozen=True)
class Given:
    """Settings that hold a profile itself, not its name."""

    profile: Profile
    graph_tokens: int | None = None

    def build(self, model: Model, gpu: GPU, tensor_parallel: int) -> Calibrated:
        """The cost model, whatever the GPU."""
        return Calibrated(self.profile, self.graph_tokens)
