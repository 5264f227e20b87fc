"""A calibrated profile: the numbers of a fitted cost model, where they come from, and how far off they were.

GPU time of a step that computes T tokens (padded to a CUDA graph's size where one is replayed) for N sequences::

    (weights^p + (token · T)^p)^(1/p) · residual(T)   the matmuls: from memory- to compute-bound; of a mixture of
                                                      experts, weights + experts · (1 − (1 − share)^T)
    + sequence · N                                    LM head and sampler
    + kv · residual(N) · Σ context                    decodes' attention (another rate beside chunks)
    + pair · Σ query–key pairs + chunk + request · n  n chunks' attention (another rate where cuDNN's kernel does it:
                                                      `backend.whole_prompts`)

Matmuls of steps with chunks may compute whole tiles, or pairs of them, and a size may have kernels of its own
(`GpuTime.chunk_matmuls`). On a GPU whose clock has sunk all the way (`backend.calibrated.warmth`), a step with chunks
computes ``1 + hot_computed`` times as long: its ``token · T`` and its attention, while weights are read as fast as
before. The attention of decodes alone takes ``1 + hot_kv`` times as long. Where a profile has ``hot_chunk`` instead, as
those of our own engine and of experts do, the whole of a step with chunks takes ``1 + hot_chunk`` times as long. Where
worker processes launch, one step after the other, a step takes at least the floor of its kind, and ends no sooner than
`HostTime.tail_s` after it was handed to them.

Of an engine that speculates, T counts the drafts that decodes verify, and to a step come (`DraftTime`)::

    pass · K                                          the passes that make K drafts after it
    + token · T                                       the first of them goes over all of its tokens
    + draft · D                                       head and sampler of the D drafts that it verifies
    + verify + kv · Σ context                         where decodes alone verify: how far their kernels are from those
                                                      of decodes without drafts

vLLM sends a step's output on its way before those passes, so recorded times from one output to the next hold the passes
of the step before (`backend.fitting.steps`).

Host time: scheduling and updating, each fixed + per request + per token; launching, by how the step runs (one CUDA
graph, piecewise graphs, or kernel by kernel); taking requests in. `backend.fitting.fit` fits all of it to a recording,
`backend.calibrated.pricing` prices steps by it. The file is JSON, `FORMAT` 1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from chairlift.backend.checked import MOST_TEXT, once, reading, text_of, wrong
from chairlift.backend.cuda_graphs import GRAPH_TOKENS
from chairlift.backend.names import hint
from chairlift.backend.parallel import Parallel

SHIPPED = Path(__file__).resolve().parent / "profiles"
FORMAT = 1
REGIMES = ("decode-only", "chunk-only", "mixed")  # kinds of steps, each with errors of its own
HOST = "host"  # what a `Spread` is of beside those: launches
QUANTILES = (0.005, 0.025, *np.arange(0.05, 1.0, 0.05).round(2).tolist(), 0.975, 0.995)  # of a `Spread`'s ``steps``
Floats = npt.NDArray[np.float64]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def _rising(knots: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if any(after[0] <= before[0] for before, after in pairwise(knots)):
        raise ValueError("must list its tokens in rising order")
    return knots


def _sorted(quantiles: list[float]) -> list[float]:
    if quantiles != sorted(quantiles):
        raise ValueError("must be quantiles, in rising order")
    return quantiles


Seconds = Annotated[float, Field(ge=0, le=100)]  # of a step's part: the longest step ever recorded took under a second
Some = Annotated[float, Field(ge=1e-15, le=100)]  # seconds of what cannot be free
Sharpness = Annotated[float, Field(ge=1, le=100)]  # 1: both bounds add up; ∞: the larger one alone
Factor = Annotated[float, Field(ge=0.01, le=100)]
Hot = Annotated[float, Field(ge=0, le=10)]
Tokens = Annotated[int, Field(ge=1, le=10**9)]
Knots = Annotated[tuple[tuple[Tokens, Factor], ...], Field(min_length=1), AfterValidator(_rising)]  # tokens, ascending
Sizes = Annotated[tuple[tuple[Tokens, Factor], ...], Field(max_length=200), AfterValidator(_rising)]
Text = Annotated[str, Field(max_length=1000)]
Relative = Annotated[float, Field(ge=-1e6, le=1e6)]


class ProfileError(ValueError):
    """A profile that cannot be used; the message is one sentence."""


def between(residual: Knots, at: Floats) -> Floats:
    """The factor of ``residual`` at each of ``at``: linear in log ``at`` between knots, constant outside them."""
    knots, factors = np.array(residual, dtype=np.float64).T
    found: Floats = np.interp(np.log(np.maximum(at, 1)), np.log(knots), factors)
    return found


@with_config(_STRICT)
@dataclass(frozen=True)
class DraftTime:
    """What drafts add to GPU time, seconds; the module's docstring has the form."""

    pass_s: Seconds  # each pass that makes a draft of every sequence
    token_s: Seconds  # each token of the step
    draft_s: Seconds  # each draft that is verified
    verify_s: Seconds = 0.0  # a step that verifies beside no chunk: other kernels than those of plain decodes
    kv_s: Seconds = 0.0  # each token of context that it reads, beside what a plain decode takes for it


@with_config(_STRICT)
@dataclass(frozen=True)
class GpuTime:
    """The coefficients of GPU time, seconds; the module's docstring has the form."""

    weights_s: Some  # to read once the weights that every token uses
    token_s: Some  # a token's matmuls where they are compute-bound
    sharpness: Sharpness  # p: how abruptly one bound takes over from the other
    sequence_s: Seconds  # LM head and sampler, each sequence
    kv_s: Seconds  # each token of context, in steps of decodes alone
    kv_mixed_s: Seconds  # the same in steps with chunks
    pair_s: Seconds  # each pair of a query and a key of a chunk
    chunk_s: Seconds  # once in a step with chunks
    request_s: Seconds  # each chunk
    decode_residual: Knots = ((1, 1.0),)
    chunk_residual: Knots = ((1, 1.0),)
    kv_residual: Knots = ((1, 1.0),)  # by decodes, decode-only steps
    experts_s: Seconds = 0.0  # to read all experts once
    expert_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # of the experts that one token is sent to
    piecewise_floor_s: Seconds = 0.0  # of a step with chunks that fits the captured graphs
    eager_floor_s: Seconds = 0.0  # of a larger one
    tile_tokens: Annotated[int, Field(ge=1, le=1024)] = 1  # matmuls of steps with chunks compute whole tiles of so many
    odd_tiles: Factor = 1.0  # by which an odd number of tiles takes longer: tiles are computed in pairs
    # If any, more than one tile are computed in whole pairs. For a last pair that is all but empty, matmuls take
    # `odd_tiles` times as long as with a full one, and so much longer.
    empty_pair_s: Seconds = 0.0
    size_factors: Sizes = ()  # by which matmuls of steps with chunks of just so many tokens take longer: other kernels
    drafting: DraftTime | None = None  # of an engine that speculates
    hot_chunk: Hot = 0.0  # by so much a step with chunks takes longer once prompts have made the GPU's clock sink
    hot_computed: Hot = 0.0  # likewise all that it computes: attention, and products as far as no memory bounds them
    hot_token_s: Seconds = 0.0  # a token of a step with chunks makes the GPU warm for so long; 0: for ``token_s``
    hot_kv: Hot = 0.0  # likewise attention of decodes alone; their matmuls wait for the memory, whatever the clock
    whole_pair_s: Seconds = 0.0  # each pair of whole prompts for which an engine has another kernel; 0: it has none
    live_experts: bool = False  # whether tokens that only pad a step to a graph's size are sent to no expert

    def chunk_matmuls(self, tokens: Floats, live: Floats | None = None, slower: Floats | float = 1.0) -> Floats:
        """Seconds of the matmuls of steps with chunks, as `matmuls`."""
        tiles, odd = self.tiles(tokens)
        whole = self.matmuls(tiles * self.tile_tokens, self.chunk_residual, live, slower)
        whole = whole * (1 + (self.odd_tiles - 1) * odd) + self.empty_pair_s * odd
        found: Floats = whole * self.of_size(tokens)
        return found

    def of_size(self, tokens: Floats) -> Floats:
        """The factor of `size_factors` of each of ``tokens``; 1 where there is none."""
        if not self.size_factors:
            return np.ones(len(tokens))
        sizes, factors = np.array(self.size_factors, dtype=np.float64).T
        at = np.minimum(np.searchsorted(sizes, tokens), len(sizes) - 1)
        found: Floats = np.where(sizes[at] == tokens, factors[at], 1.0)
        return found

    def tiles(self, tokens: Floats) -> tuple[Floats, Floats]:
        """Tiles that matmuls of steps with chunks compute of ``tokens`` tokens, and how odd their number is, 0 to 1.

        An odd number of tiles is 1. Where only whole pairs are computed it is the empty share of the last pair, and 0
        of a single tile, which has kernels of its own.
        """
        tiles = np.ceil(tokens / self.tile_tokens)
        if self.empty_pair_s:
            whole = np.where(tiles > 1, 2 * np.ceil(tiles / 2), tiles)
            return whole, np.where(tiles > 1, (whole - tokens / self.tile_tokens) / 2, 0.0)
        return tiles, tiles % 2 * (self.tile_tokens > 1)

    def matmuls(
        self, tokens: Floats, residual: Knots, live: Floats | None = None, slower: Floats | float = 1.0
    ) -> Floats:
        """Seconds of the matmuls of ``tokens`` tokens, of which ``live`` (None: all) are no padding.

        They are corrected by ``residual``. The GPU computes ``slower`` times as long, and reads as fast as ever.
        """
        p = self.sharpness
        read = self.weights_s + self.experts_s * self.experts_read(tokens, live)
        bound = (read**p + (self.token_s * slower * tokens) ** p) ** (1 / p)
        found: Floats = bound * between(residual, tokens)
        return found

    def experts_read(self, tokens: Floats, live: Floats | None = None) -> Floats:
        """The share of the experts that a step reads, in expectation; the arguments are those of `matmuls`."""
        sent = tokens if live is None or not self.live_experts else live
        found: Floats = 1 - (1 - self.expert_share) ** sent
        return found


@with_config(_STRICT)
@dataclass(frozen=True)
class HostTime:
    """The coefficients of host time, seconds."""

    schedule_s: Seconds
    schedule_request_s: Seconds  # each running request
    schedule_token_s: Seconds  # each prompt token
    update_s: Seconds
    update_request_s: Seconds
    arrival_s: Seconds  # taking a request in
    arrival_token_s: Seconds  # each token of its prompt
    graph_s: Seconds  # launch of one whole CUDA graph
    piecewise_s: Seconds  # launch of a step with chunks that fits the captured graphs
    eager_s: Seconds  # launch of a larger step, kernel by kernel
    tail_s: Seconds  # GPU work left once such a launch has ended, however short the step; of workers, their own launch
    head_s: Seconds = 0.0  # from the start of such a launch until an idle GPU gets its first kernel
    schedule_chunk_s: Seconds = 0.0  # scheduling each chunk

    def at(self, pace: float) -> HostTime:
        """That of a host that takes ``pace`` times as long for everything."""
        return HostTime(**{name: seconds * pace for name, seconds in vars(self).items()})


@with_config(_STRICT)
@dataclass(frozen=True)
class Drafts:
    """How an engine speculated when it was measured."""

    method: Annotated[str, Field(min_length=1, max_length=100)]  # "eagle3", …
    tokens: Annotated[int, Field(ge=1, le=32)]  # drafts of a request and step

    def __str__(self) -> str:
        """In a sentence: how an engine serves."""
        return f"with {self.tokens} drafts by {self.method}"


@with_config(_STRICT)
class Spread(TypedDict):
    """By how much steps of one regime and length were off, in runs left out of the fit.

    Off is the logarithm of recorded ÷ predicted: of a run's total time, and of single steps relative to their run's.
    Where launches show, that is of GPU times, and launches have an entry of their own (`HOST`), whatever their length.
    """

    upto_s: Seconds | None  # steps predicted to take at most so many seconds; None: the longest steps
    runs: Annotated[int, Field(ge=1, le=10**6)]  # how many runs had such steps
    rms: Annotated[float, Field(ge=0, le=10)]  # root mean square of the runs' logarithms
    steps: Annotated[  # quantiles of the steps' logarithms, at `QUANTILES`
        list[Annotated[float, Field(ge=-10, le=10)]],
        Field(min_length=len(QUANTILES), max_length=len(QUANTILES)),
        AfterValidator(_sorted),
    ]


@with_config(_STRICT)
class Off(TypedDict):
    """How far off single steps of one regime were, in runs left out of the fit; relative to what was recorded."""

    steps: Annotated[int, Field(ge=0, le=10**12)]  # how many were predicted
    median: Relative  # of the errors' sizes
    p95: Relative
    total: Relative  # of the sum of all steps


Regime = Annotated[str, Field(pattern=f"^({'|'.join(REGIMES)})$")]
Spreading = Annotated[str, Field(pattern=f"^({'|'.join((*REGIMES, HOST))})$")]


@with_config(_STRICT)
class Errors(TypedDict, total=False):
    """How far off a profile was where it was left out of the fit; nothing if that was not looked at."""

    steps: dict[Regime, Off]  # launches included
    gpu: dict[Regime, Off]  # GPU time
    runs: dict[str, dict[str, Relative]]  # end to end: experiment → metric → relative error


@with_config(_STRICT)
@dataclass(frozen=True)
class Profile:
    """A calibrated cost model: its coefficients, where they come from, and how far off it was."""

    name: Text
    model: Text
    gpu: Text
    engine: Text
    gpu_time: GpuTime
    host: HostTime
    graph_tokens: Tokens = GRAPH_TOKENS  # tokens of the largest captured CUDA graph
    piecewise: bool = True  # whether small steps with chunks replay graphs too, and so are padded to a captured size
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    expert_parallel: Annotated[int, Field(ge=1, le=1024)] = 1  # groups of GPUs that hold different experts
    drafts: Drafts | None = None  # that its steps verify; None: the engine did not speculate
    provenance: dict[str, Any] = field(default_factory=dict)
    errors: Errors = field(default_factory=Errors)  # relative, left out of the fit
    spread: dict[Spreading, list[Spread]] = field(default_factory=dict)  # the shortest steps first
    scaled: Text = ""  # how the numbers were derived from a measured profile's; "" if they were measured
    notes: tuple[Text, ...] = ()
    errors_of: Text = ""  # `numbers` of the profile whose errors these are

    def to_json(self) -> str:
        """The profile's file."""
        return json.dumps(self._said(), indent=1) + "\n"

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of a hash of the file, which results quote: it changes with any number."""
        said = self._said()
        del said["errors_of"]  # says nothing that the rest does not
        return hashlib.sha256((json.dumps(said, indent=1) + "\n").encode()).hexdigest()[:12]

    @property
    def parallel(self) -> Parallel:
        """How its GPUs shared the model."""
        return Parallel(tensor=self.tensor_parallel, expert=self.expert_parallel)

    @property
    def numbers(self) -> str:
        """Twelve hex digits of a hash of all that prices depend on."""
        priced = ("model", "gpu", "gpu_time", "host", "graph_tokens", "piecewise", "tensor_parallel", "expert_parallel")
        said = self._said()
        words = [said[name] for name in (*priced, *(["drafts"] if self.drafts else []))]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]

    def _said(self) -> dict[str, Any]:
        said = {"format": FORMAT, **asdict(self)}
        if self.drafts is None:  # as before there were any
            del said["drafts"], said["gpu_time"]["drafting"]
        for name in ("verify_s", "kv_s"):  # likewise
            if self.gpu_time.drafting and self.drafts and not getattr(self.gpu_time.drafting, name):
                del said["gpu_time"]["drafting"][name]
        if not self.host.schedule_chunk_s:  # likewise
            del said["host"]["schedule_chunk_s"]
        for name in (
            *("hot_chunk", "hot_computed", "hot_token_s", "hot_kv"),
            *("empty_pair_s", "size_factors", "whole_pair_s", "live_experts"),
        ):
            if not said["gpu_time"][name]:
                del said["gpu_time"][name]
        return said


def load(choice: str) -> Profile:
    """The profile that ``choice`` names: a path that ends in ``.json``, or a shipped one. Raises `ProfileError`."""
    path = Path(choice) if choice.endswith(".json") else SHIPPED / f"{choice}.json"
    if not choice.endswith(".json") and not path.is_file():
        raise ProfileError(f"no profile {choice!r} – {hint(choice, shipped())}")
    with reading(path, ProfileError):
        text = text_of(path, MOST_TEXT)
    try:
        return parse(text)
    except ProfileError as error:
        raise ProfileError(f"{path}: not a profile: {error}") from None


def shipped() -> list[str]:
    """Names of the profiles that come with Chairlift."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


_PROFILE = TypeAdapter(Profile)


@lru_cache(maxsize=32)  # the runs of a sweep or a plan read the same few
def parse(text: str) -> Profile:
    """The profile in the JSON ``text``, which is not to be changed. Raises `ProfileError`, one sentence.

    Errors that the file holds of other numbers than its own are left out, and a note says so.
    """
    try:
        data = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"not JSON: {error}") from None
    told = data.pop("format", None) if isinstance(data, dict) else None
    if isinstance(told, bool) or told != FORMAT:
        raise ProfileError(f"format must be {FORMAT}")
    try:
        made = _PROFILE.validate_json(json.dumps(data))  # as JSON, in which lists may become tuples
    except ValidationError as error:
        raise ProfileError(wrong(error)) from None
    for regime, lengths in made.spread.items():
        ends = [each["upto_s"] for each in lengths[:-1]]
        if None in ends or ends != sorted(ends, key=lambda end: end or 0.0):
            raise ProfileError(f"spread.{regime} must list steps by length, the shortest first")
    if (made.errors or made.spread) and made.errors_of != made.numbers:
        note = "the errors in its file are not of these numbers, so left out: chairlift calibrate measures them"
        return replace(made, errors=Errors(), spread={}, notes=(*made.notes, note))
    return made
