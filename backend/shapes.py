"""What a GPU and a language model are to a cost model: a handful of numbers, the rest counted from them.

`gpus.yaml` and `models.yaml` hold a row for each known one, and a scenario may describe one of its own with the same
keys: `described` reads both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from chairlift.backend import names

GIB = 2**30
ABSENT = object()  # the value of a number that is not given

MOST = 10**15  # of any number: parameters of a model, FLOP/s of a GPU in units of 1e12; products stay finite
Count = Annotated[int, Ge(1), Le(MOST)]
Positive = Annotated[float, Gt(0), Le(MOST)]
NotNegative = Annotated[float, Ge(0), Le(MOST)]
WholeNumber = Annotated[int, Ge(0), Le(MOST)]


class Wrong(NamedTuple):
    """One mistake in the numbers of a GPU or a model."""

    key: str
    rule: str  # what should hold, as a sentence fragment
    value: object = ABSENT

    def __str__(self) -> str:
        return f"{self.key} {self.rule}" + ("" if self.value is ABSENT else f" (got {self.value!r})")


class BadShape(ValueError):
    """Numbers that no GPU or model can have; ``wrong`` holds all mistakes."""

    def __init__(self, what: str, wrong: Sequence[Wrong]) -> None:
        super().__init__(f"{what}: " + "; ".join(map(str, wrong)))
        self.wrong = list(wrong)


@dataclass(frozen=True)
class GPU:
    """One accelerator as its data sheet gives it: peaks, which no kernel reaches.

    Peaks and memory are required. What else is unknown is None, and refused by `needed` where a result depends on it.
    Raises `BadShape` for a number out of its range.
    """

    name: str
    bf16_tflops: Positive  # dense tensor-core peak, 1e12 FLOP/s
    hbm_gb_per_s: Positive  # memory bandwidth, 1e9 B/s
    memory_gib: Positive  # what nvidia-smi calls total, 2**30 B (ECC and firmware already off)
    nvlink_gb_per_s: NotNegative | None = None  # all links of one GPU, both directions added, 1e9 B/s; 0: it has none
    host_gb_per_s: Positive | None = None  # PCIe, one direction, line rate, 1e9 B/s
    tdp_w: Positive | None = None
    usd_per_gpu_hour: Positive | None = None  # one on-demand price out of a wide range
    price_date: str = ""  # when that price was seen
    price_source: str = ""  # whose price, and the range seen
    source: str = ""  # of the other numbers
    fp8_tflops: Positive | None = None  # dense peak of FP8 tensor cores, 1e12 FLOP/s; None: it has none
    fp4_tflops: Positive | None = None  # likewise of FP4

    def __post_init__(self) -> None:
        _check(self)

    @property
    def memory_bytes(self) -> int:
        """Total memory in bytes."""
        return round(self.memory_gib * GIB)

    def needed(self, key: Literal["nvlink_gb_per_s", "host_gb_per_s"], what: str) -> float:
        """The number called ``key``, on which ``what`` depends. Raises ValueError, which says so, if it is unknown."""
        value: float | None = getattr(self, key)
        if value is None:
            raise ValueError(f"{what} depends on {key} of {self.name}, which is unknown: give it")
        return value


Quantization = Literal["none", "fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4"]
Arithmetic = Literal["bf16", "fp8", "fp4"]


class Format(NamedTuple):
    """How a format of quantised weights stores and multiplies them."""

    bytes: float  # a weight, its share of the scales included
    arithmetic: Arithmetic  # of the tensor cores that multiply it; weight-only formats are multiplied as bfloat16


FORMATS: dict[str, Format] = {
    "fp8": Format(1.0, "fp8"),  # one scale a tensor, or a channel
    "fp8_block": Format(1 + 4 / 128**2, "fp8"),  # a float32 scale for 128 × 128 weights
    "int8": Format(1.0, "fp8"),  # W8A8: the tensor cores' INT8 peak is that of FP8
    "int4": Format(0.5 + 2.5 / 128, "bf16"),  # AWQ, GPTQ: a float16 scale and a 4-bit zero for 128 weights
    "mxfp4": Format(0.5 + 1 / 32, "bf16"),  # a byte of scale for 32 weights; multiplied as bfloat16 (W4A16)
    "nvfp4": Format(0.5 + 1 / 16, "fp4"),  # a byte of scale for 16 weights
}
_NONE = Format(0, "bf16")


class KvGroup(NamedTuple):
    """Layers whose KV cache is alike."""

    layers: int
    bytes_per_token: int  # of one token in all these layers, on all GPUs together
    window: int  # tokens that a query looks back on, itself included; 0: all


class Weights(NamedTuple):
    """The weights of one part of the model."""

    part: str
    parameters: int  # of all layers
    active: int  # that a token is multiplied with
    bytes_each: float
    arithmetic: Arithmetic


@dataclass(frozen=True)
class Model:
    """The shape of a decoder-only transformer; everything else about it is counted from this.

    Layers have an MLP of width ``ffn``, or, if there are ``experts``, all but ``dense_layers`` of them a router and
    experts of width ``expert_ffn``. Keys and values are cached by head, or as one latent vector a token
    (``latent``). Weights and KV in other widths: ``dataclasses.replace(model, quantization="fp8")``, or
    ``bytes_per_param=1, kv_bytes_per_element=1``. Raises `BadShape` for a number out of its range, or numbers that
    contradict each other.
    """

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_size: Count  # of a query and a key; with latent attention the part of it without position
    ffn: Count  # width inside the MLP
    vocab: Count
    max_model_len: Count  # tokens of prompt and output together
    gated_mlp: bool = True  # three matrices (gate, up, down), else two
    tied_embeddings: bool = False  # the LM head is the input embedding
    biases: Literal["none", "qkv", "attention", "all"] = "none"  # counted; "all": norms and MLP as well
    qk_norm: bool = False  # a norm on each query and key head (Qwen3)
    learned_positions: WholeNumber = 0  # rows of the position table (OPT: 2 more than positions)
    bytes_per_param: Positive = 2
    kv_bytes_per_element: Positive = 2
    bytes_per_activation: Positive = 2  # of what the layers hand on, which tensor parallelism adds up
    experts: WholeNumber = 0  # in a layer; 0: all layers are dense
    experts_per_token: WholeNumber = 0
    expert_ffn: WholeNumber = 0  # width inside one expert
    shared_ffn: WholeNumber = 0  # width inside all shared experts together, which see every token
    dense_layers: WholeNumber = 0  # that have an MLP of width ffn instead of experts
    window: WholeNumber = 0  # tokens that the layers with a window look back on
    window_layers: WholeNumber = 0
    chunked: bool = False  # a window is a chunk of so many tokens: a query looks back to where its chunk begins
    latent: WholeNumber = 0  # numbers of the latent vector that is cached for keys and values; 0: by head
    latent_query: WholeNumber = 0  # rank of the query projection; 0: a full matrix
    rope_size: WholeNumber = 0  # of a latent key: the part with position, cached beside the latent vector
    value_size: WholeNumber = 0  # of a latent value's head
    quantization: Quantization = "none"  # of the layers' matrices; norms, router, embeddings and head stay as they are
    quantized: Literal["layers", "experts"] = "layers"  # all matrices of the layers, or the experts' only
    attention_bytes_per_param: Positive | None = None  # these three: None as quantization says
    mlp_bytes_per_param: Positive | None = None  # of dense MLPs and shared experts
    expert_bytes_per_param: Positive | None = None
    head_bytes_per_param: Positive | None = None  # None: bytes_per_param
    arithmetic: Arithmetic | None = None  # of the quantised matrices' products; None: as quantization says
    expert_ffn_multiple: Count = 1  # the engine pads an expert's width on each GPU to a multiple of this
    other_parameters: WholeNumber = 0  # in memory and not run for text: a vision tower
    mtp_layers: WholeNumber = 0  # layers that predict further tokens, published with the model and not loaded
    source: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def repository(self) -> str | None:
        """The published checkpoint that ``source`` names, as Hugging Face has it; None if it names none."""
        repository, found, _ = self.source.partition(" config.json")
        return repository if found and "/" in repository else None

    @property
    def plain(self) -> bool:
        """Whether the model is dense, attends to everything by head, and has one width for all of its weights."""
        return self.one_width and not (self.experts or self.latent or self.window_layers or self.other_parameters)

    @property
    def one_width(self) -> bool:
        """Whether all weights have the width ``bytes_per_param``."""
        widths = (self.attention_bytes_per_param, self.mlp_bytes_per_param, self.expert_bytes_per_param)
        named = {*widths, self.head_bytes_per_param, self.arithmetic}
        return named == {None} and self.quantization == "none"

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert in one layer."""
        return (3 if self.gated_mlp else 2) * self.hidden * self.expert_ffn

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention matrices."""
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        if not self.latent:
            return self.hidden * (2 * query + 2 * kv)  # q and o, k and v
        query += self.heads * self.rope_size
        rank = self.latent_query
        asked = self.hidden * rank + rank * query if rank else self.hidden * query
        cached = self.hidden * (self.latent + self.rope_size)
        unpacked = self.latent * self.heads * (self.head_size + self.value_size)
        return asked + cached + unpacked + self.heads * self.value_size * self.hidden

    @property
    def weights(self) -> list[Weights]:
        """The matrices of all layers and the LM head, part by part."""
        matrices = 3 if self.gated_mlp else 2
        kind = FORMATS.get(self.quantization, _NONE)
        by_token = self.arithmetic or kind.arithmetic
        narrow = kind.bytes or self.bytes_per_param
        rest = narrow if self.quantized == "layers" else self.bytes_per_param
        rest_by: Arithmetic = by_token if self.quantized == "layers" else "bf16"
        mlp = self.mlp_bytes_per_param or rest
        with_mlp, with_experts = self.layers - self.expert_layers, self.expert_layers
        attention = self.layers * self.attention_parameters
        dense = with_mlp * matrices * self.hidden * self.ffn
        shared = with_experts * matrices * self.hidden * self.shared_ffn
        router = with_experts * self.hidden * self.experts
        experts = with_experts * self.expert_parameters
        head = self.head_parameters
        found = [
            Weights("attention", attention, attention, self.attention_bytes_per_param or rest, rest_by),
            Weights("MLP", dense, dense, mlp, rest_by),
            Weights("shared experts", shared, shared, mlp, rest_by),
            Weights("router", router, router, self.bytes_per_param, "bf16"),
            Weights(
                "experts",
                experts * self.experts,
                experts * self.experts_per_token,
                self.expert_bytes_per_param or narrow,
                by_token,
            ),
            Weights("head", head, head, self.head_bytes_per_param or self.bytes_per_param, "bf16"),
        ]
        return [part for part in found if part.parameters]

    @property
    def matmul_parameters(self) -> int:
        """Weights every token of a step is multiplied with: attention, MLP and its experts' matrices, all layers.

        Without the LM head, which only the tokens that are sampled go through (``head_parameters``).
        """
        return sum(part.active for part in self.weights if part.part != "head")

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head, whether or not it shares memory with the input embedding."""
        return self.hidden * self.vocab

    @property
    def _small(self) -> int:
        """Norms, biases and learned positions."""
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        norm = self.hidden * (2 if self.biases == "all" else 1)  # LayerNorm has a bias, RMSNorm none
        layer = 2 * norm + 2 * self.head_size * self.qk_norm + self.latent + self.latent_query
        if self.biases != "none":
            layer += query + 2 * kv
        if self.biases in ("attention", "all"):
            layer += self.hidden
        if self.biases == "all":
            layer += self.hidden + self.ffn * (2 if self.gated_mlp else 1)
        return self.layers * layer + norm + self.learned_positions * self.hidden  # + the norm before the LM head

    @property
    def embedding_parameters(self) -> int:
        """Rows of the input embedding that are not the LM head as well."""
        return 0 if self.tied_embeddings else self.head_parameters

    @property
    def parameters(self) -> int:
        """All weights, biases and norms; a tied LM head counts once, layers for further tokens not at all."""
        matrices = sum(part.parameters for part in self.weights)
        return matrices + self._small + self.embedding_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Of `parameters`, those that one token is computed with, embeddings and head included."""
        return sum(part.active for part in self.weights) + self._small + self.embedding_parameters

    @property
    def published_parameters(self) -> int:
        """`parameters`, and the layers for further tokens as they are published: each a layer, a matrix, two tables."""
        layer = self.attention_parameters + 2 * self.hidden**2 + 2 * self.head_parameters
        layer += self.hidden * self.experts + self.experts * self.expert_parameters
        layer += (3 if self.gated_mlp else 2) * self.hidden * self.shared_ffn
        return self.parameters + self.mtp_layers * layer

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        if self.plain:
            return round(self.parameters * self.bytes_per_param)
        matrices = sum(part.parameters * part.bytes_each for part in self.weights)
        rest = self._small + self.embedding_parameters + self.other_parameters
        return round(matrices + rest * self.bytes_per_param)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers and heads (all GPUs together), while in all windows."""
        return self._kv_bytes(self.kv_heads, self.layers)

    def kv_bytes_per_token_on(self, tensor_parallel: int) -> int:
        """Bytes of one token's keys and values on each of ``tensor_parallel`` GPUs.

        The GPUs share the KV heads out; where there are fewer heads than GPUs each holds a whole one. Each holds
        all of a latent vector. Raises ValueError when query or KV heads cannot be dealt out evenly.
        """
        return sum(group.bytes_per_token for group in self.kv_groups(tensor_parallel))

    def kv_groups(self, tensor_parallel: int = 1) -> list[KvGroup]:
        """What is cached on each of ``tensor_parallel`` GPUs, layers without a window first. Raises as above."""
        if tensor_parallel < 1 or self.heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide the {self.heads} heads of {self.name} (got {tensor_parallel})"
            )
        if not self.latent and self.kv_heads % tensor_parallel and tensor_parallel % self.kv_heads:
            raise ValueError(
                f"tensor_parallel must divide the {self.kv_heads} KV heads of {self.name} or be a multiple of"
                f" them (got {tensor_parallel})"
            )
        heads = max(1, self.kv_heads // tensor_parallel)
        full = self.layers - self.window_layers
        groups = [(full, 0), (self.window_layers, self.window)]
        return [KvGroup(count, self._kv_bytes(heads, count), window) for count, window in groups if count]

    def _kv_bytes(self, kv_heads: int, layers: int) -> int:
        numbers = self.latent + self.rope_size if self.latent else 2 * kv_heads * self.head_size
        return round(layers * numbers * self.kv_bytes_per_element)


Shape = TypeVar("Shape", GPU, Model)


def described(kind: type[Shape], given: Mapping[str, object], hint: str = "") -> Shape:
    """The GPU or model with the numbers ``given``, field → value, as a row of a data file or a scenario has them.

    ``hint`` follows what is said of a number that is missing. Raises `BadShape` with every mistake.
    """
    known = {field.name: field for field in fields(kind)}
    wrong = [Wrong(key, f"unknown key – {names.hint(key, known)}") for key in given if key not in known]
    required = [name for name, field in known.items() if field.default is MISSING]
    wrong += [Wrong(name, f"is required{hint}") for name in required if name not in given]
    wrong += _mistakes(kind, {key: value for key, value in given.items() if key in known})
    if wrong:
        raise BadShape(str(given.get("name", kind.__name__)), wrong)
    return kind(**dict(given))  # type: ignore[arg-type]  # just checked


def _check(shape: GPU | Model) -> None:
    """Raise `BadShape` unless ``shape`` keeps the rules of its fields."""
    if wrong := _mistakes(type(shape), vars(shape)):
        raise BadShape(f"{type(shape).__name__} {shape.name}", wrong)


def _mistakes(kind: type[GPU] | type[Model], given: Mapping[str, object]) -> list[Wrong]:
    rules = _annotations(kind)  # type: ignore[arg-type]  # a class is hashable
    broken = {key: _broken(rules[key], value) for key, value in given.items()}
    wrong = [Wrong(key, rule, given[key]) for key, rule in broken.items() if rule is not None]
    heads, kv_heads = (given.get(key) if broken.get(key) is None else None for key in ("heads", "kv_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        wrong.append(Wrong("kv_heads", f"must divide heads, {heads}", kv_heads))
    return wrong if wrong or kind is GPU else [*_contradictions(given)]


def _contradictions(given: Mapping[str, object]) -> Iterator[Wrong]:
    """What of a model's numbers does not go together; each is in its range."""

    def number(key: str) -> int:
        value = given.get(key, 0)
        return value if isinstance(value, int) else 0

    layers, experts = number("layers"), number("experts")
    for key in ("experts_per_token", "expert_ffn"):
        if bool(experts) != bool(number(key)):
            rule = "is required where there are experts" if experts else "must not be given without experts"
            yield Wrong(key, rule, ABSENT if experts else given[key])
    if number("experts_per_token") > experts:
        yield Wrong("experts_per_token", f"must be at most experts, {experts}", given["experts_per_token"])
    for key in ("shared_ffn", "dense_layers"):
        if number(key) and not experts:
            yield Wrong(key, "must not be given without experts", given[key])
    if experts and number("dense_layers") >= layers:
        yield Wrong("dense_layers", f"must be fewer than layers, {layers}", given["dense_layers"])
    if given.get("quantized") == "experts" and not experts:
        yield Wrong("quantized", "must be layers where there are no experts", "experts")
    if bool(number("window")) != bool(number("window_layers")):
        yield Wrong("window_layers", "and window must be given together", number("window_layers"))
    if given.get("chunked") and not number("window"):
        yield Wrong("chunked", "must not be given without window", True)
    if number("window_layers") > layers:
        yield Wrong("window_layers", f"must be at most layers, {layers}", given["window_layers"])
    for key in ("rope_size", "value_size"):
        if bool(number("latent")) != bool(number(key)):
            yield Wrong(key, "and latent must be given together", number(key))
    if number("latent_query") and not number("latent"):
        yield Wrong("latent_query", "must not be given without latent", given["latent_query"])
    if number("latent") and number("window_layers"):
        yield Wrong("window_layers", "of latent attention are not modelled", given["window_layers"])


@cache
def _annotations(kind: type[GPU] | type[Model]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


_TYPES: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}


def _broken(rule: Any, value: Any) -> str | None:
    """What ``value`` must be by the annotation ``rule``, if it is not."""
    bounds: Sequence[Any] = ()
    if type(None) in get_args(rule):
        if value is None:
            return None
        [rule] = (member for member in get_args(rule) if member is not type(None))
    if get_origin(rule) is Annotated:
        rule, *bounds = get_args(rule)
    if get_origin(rule) is Literal:
        allowed = get_args(rule)
        return None if value in allowed else f"must be one of {', '.join(map(repr, allowed))}"
    accepted, words = _TYPES[rule]
    if not isinstance(value, accepted) or (isinstance(value, bool) and rule is not bool):
        return f"must be {words}"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            return "must be a finite number"
        for bound in bounds:
            if isinstance(bound, Gt) and not value > bound.gt:  # type: ignore[operator]  # bounds are numbers here
                return f"must be above {bound.gt}"
            if isinstance(bound, Ge) and not value >= bound.ge:  # type: ignore[operator]
                return f"must be at least {bound.ge}"
            if isinstance(bound, Le) and not value <= bound.le:  # type: ignore[operator]
                return f"must be at most {bound.le}"
    return None
