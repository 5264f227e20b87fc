"""A calibrated profile: the numbers of a fitted cost model, where they come from, and how far off they were.

GPU time of a step that computes T tokens (padded to a CUDA graph's size where one is replayed) for N sequences::

    (weights^p + (token · T)^p)^(1/p) · residual(T)   the matmuls: from memory- to compute-bound
    + sequence · N                                    LM head and sampler
    + kv · residual(N) · Σ context                    decodes' attention (another rate beside chunks)
    + pair · Σ query–key pairs + chunk + request · n  n chunks' attention

Host time: scheduling and updating, each fixed + per request + per token; launching, by how the step runs (one CUDA
graph, piecewise graphs, or kernel by kernel); taking requests in. `backend.fitting.fit` fits all of it to a recording,
`backend.calibrated.pricing` prices steps by it. The file is JSON, `FORMAT` 1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from chairlift.backend.cuda_graphs import GRAPH_TOKENS
from chairlift.backend.names import hint

SHIPPED = Path(__file__).resolve().parent / "profiles"
FORMAT = 1
REGIMES = ("decode-only", "chunk-only", "mixed")  # kinds of steps, each with errors of its own
QUANTILES = (0.005, 0.025, *np.arange(0.05, 1.0, 0.05).round(2).tolist(), 0.975, 0.995)  # of a `Spread`'s ``steps``
Floats = npt.NDArray[np.float64]
Knots = tuple[tuple[int, float], ...]  # (tokens, factor), ascending


class ProfileError(ValueError):
    """A profile that cannot be used; the message is one sentence."""


def between(residual: Knots, at: Floats) -> Floats:
    """The factor of ``residual`` at each of ``at``: linear in log ``at`` between knots, constant outside them."""
    knots, factors = np.array(residual, dtype=np.float64).T
    found: Floats = np.interp(np.log(np.maximum(at, 1)), np.log(knots), factors)
    return found


@dataclass(frozen=True)
class GpuTime:
    """The coefficients of GPU time, seconds; the module's docstring has the form."""

    weights_s: float  # to read the weights once
    token_s: float  # a token's matmuls where they are compute-bound
    sharpness: float  # p: how abruptly one bound takes over from the other
    sequence_s: float  # LM head and sampler, each sequence
    kv_s: float  # each token of context, in steps of decodes alone
    kv_mixed_s: float  # the same in steps with chunks
    pair_s: float  # each pair of a query and a key of a chunk
    chunk_s: float  # once in a step with chunks
    request_s: float  # each chunk
    decode_residual: Knots = ((1, 1.0),)
    chunk_residual: Knots = ((1, 1.0),)
    kv_residual: Knots = ((1, 1.0),)  # by decodes, decode-only steps

    def matmuls(self, tokens: Floats, residual: Knots) -> Floats:
        """Seconds of the matmuls of ``tokens`` tokens, corrected by ``residual``."""
        p = self.sharpness
        bound = (self.weights_s**p + (self.token_s * tokens) ** p) ** (1 / p)
        found: Floats = bound * between(residual, tokens)
        return found

    def scaled(self, compute: float, bandwidth: float) -> GpuTime:
        """The coefficients on a GPU of ``compute`` × the FLOP/s and ``bandwidth`` × the bytes/s; fixed times stay."""
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
    """The coefficients of host time, seconds."""

    schedule_s: float
    schedule_request_s: float  # each running request
    schedule_token_s: float  # each prompt token
    update_s: float
    update_request_s: float
    arrival_s: float  # taking a request in
    arrival_token_s: float  # each token of its prompt
    graph_s: float  # launch of one whole CUDA graph
    piecewise_s: float  # launch of a step with chunks that fits the captured graphs
    eager_s: float  # launch of a larger step, kernel by kernel
    tail_s: float  # GPU work left once such a launch has ended, however short the step


class Spread(TypedDict):
    """By how much steps of one regime and length were off, in runs left out of the fit.

    Off is the logarithm of recorded ÷ predicted: of a run's total time, and of single steps relative to their run's.
    """

    upto_s: float | None  # steps predicted to take at most so many seconds; None: the longest steps
    runs: int  # how many runs had such steps
    rms: float  # root mean square of the runs' logarithms
    steps: list[float]  # quantiles of the steps' logarithms, at `QUANTILES`


@dataclass(frozen=True)
class Profile:
    """A calibrated cost model: its coefficients, where they come from, and how far off it was."""

    name: str
    model: str
    gpu: str
    engine: str
    gpu_time: GpuTime
    host: HostTime
    graph_tokens: int = GRAPH_TOKENS  # tokens of the largest captured CUDA graph
    piecewise: bool = True  # whether small steps with chunks replay graphs too, and so are padded to a captured size
    tensor_parallel: int = 1
    provenance: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)  # relative, left out of the fit: by regime, and by experiment
    spread: dict[str, list[Spread]] = field(default_factory=dict)  # by regime; the shortest steps first
    scaled: str = ""  # how the numbers were derived from a measured profile's; "" if they were measured
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The profile's file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """Twelve hex digits of a hash of the file, which results quote: it changes with any number."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


def load(choice: str) -> Profile:
    """The profile that ``choice`` names: a path that ends in ``.json``, or a shipped one. Raises `ProfileError`."""
    path = Path(choice) if choice.endswith(".json") else SHIPPED / f"{choice}.json"
    if not path.is_file():
        if choice.endswith(".json"):
            raise ProfileError(f"{path}: no such file")
        raise ProfileError(f"no profile {choice!r} – {hint(choice, shipped())}")
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ProfileError(f"{path}: not a profile: {error}") from None


def shipped() -> list[str]:
    """Names of the profiles that come with Chairlift."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def parse(data: Any) -> Profile:
    """The profile in decoded JSON ``data``, which is used up. Raises ValueError or TypeError, one sentence."""
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
