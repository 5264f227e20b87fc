"""What a GPU and a language model are to a cost model: a handful of numbers, the rest counted from them.

`gpus.yaml` and `models.yaml` hold a row for each known one, and a scenario may describe one of its own with the same
keys: `described` reads both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt

from chairlift.backend import names

GIB = 2**30
ABSENT = object()  # the value of a number that is not given

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]


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


@dataclass(frozen=True)
class Model:
    """The shape of a dense decoder-only transformer; everything else about it is counted from this.

    Weights and KV in other widths: ``dataclasses.replace(model, bytes_per_param=1, kv_bytes_per_element=1)``.
    Raises `BadShape` for a number out of its range, or if the KV heads do not divide the query heads.
    """

    name: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_size: Count
    ffn: Count  # width inside the MLP
    vocab: Count
    max_model_len: Count  # tokens of prompt and output together
    gated_mlp: bool = True  # three matrices (gate, up, down), else two
    tied_embeddings: bool = False  # the LM head is the input embedding
    biases: Literal["none", "qkv", "attention", "all"] = "none"  # counted; "all": norms and MLP as well
    qk_norm: bool = False  # a norm on each query and key head (Qwen3)
    learned_positions: Annotated[int, Ge(0)] = 0  # rows of the position table (OPT: 2 more than positions)
    bytes_per_param: Positive = 2
    kv_bytes_per_element: Positive = 2
    bytes_per_activation: Positive = 2  # of what the layers hand on, which tensor parallelism adds up
    experts: Annotated[int, Ge(0)] = 0  # in a layer; 0: all layers are dense
    experts_per_token: Annotated[int, Ge(0)] = 0
    expert_ffn: Annotated[int, Ge(0)] = 0  # width inside one expert
    shared_ffn: Annotated[int, Ge(0)] = 0
    dense_layers: Annotated[int, Ge(0)] = 0
    source: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, object], name: str = "") -> Model:
        """The model a Hugging Face ``config.json`` describes (llama, mistral, qwen2, qwen3 and opt).

        Keys that may be absent take the default of transformers' own configuration classes. A sliding
        window is read as full attention. Raises ValueError naming every key missing, or what is not
        modelled: other architectures, mixtures of experts, latent attention (MLA), quantised weights.
        """
        name = name or str(config.get("_name_or_path") or "config.json")
        kind = config.get("model_type")
        for keys, what in _NOT_MODELLED:
            if found := [key for key in keys if config.get(key)]:
                raise ValueError(f"{name}: {what} not modelled (key {found[0]})")
        if kind not in ("llama", "mistral", "qwen2", "qwen3", "opt", "qwen3_moe", "mixtral"):
            raise ValueError(
                f"{name}: model_type {kind!r} is not modelled – modelled: llama, mistral, opt, qwen2, qwen3"
            )
        opt = kind == "opt"
        ffn = "ffn_dim" if opt else "intermediate_size"
        needed = ["num_hidden_layers", "hidden_size", "num_attention_heads", ffn, "vocab_size"]
        needed += ["max_position_embeddings"] + ["num_key_value_heads"] * (kind not in ("llama", "opt"))
        if missing := [key for key in needed if config.get(key) is None]:
            raise ValueError(f"{name}: missing {', '.join(missing)}")

        def size(key: str, default: int = 0) -> int:
            value = config.get(key)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: {key} must be a whole number (got {value!r})")
            return value

        hidden, heads, positions = (
            size(key) for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")
        )
        if opt and size("word_embed_proj_dim", hidden) != hidden:
            raise ValueError(f"{name}: word_embed_proj_dim other than hidden_size is not modelled")
        if heads < 1:
            raise ValueError(f"{name}: num_attention_heads must be at least 1 (got {heads})")
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in _DTYPE_BYTES:
            raise ValueError(f"{name}: torch_dtype {dtype!r} is not modelled – modelled: {', '.join(_DTYPE_BYTES)}")
        biases: Literal["none", "qkv", "attention", "all"] = (
            "all" if opt and config.get("enable_bias", True) else "none"
        )
        if kind == "qwen2":
            biases = "qkv"
        elif not opt and config.get("attention_bias"):
            biases = "attention"
        return cls(
            name=name,
            layers=size("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=heads if opt else size("num_key_value_heads", heads),
            head_size=size("head_dim", 128 if kind in ("qwen3", "qwen3_moe") else hidden // heads),
            experts=int(str(config.get("num_experts") or config.get("num_local_experts") or 0)),
            experts_per_token=int(str(config.get("num_experts_per_tok") or 0)),
            expert_ffn=int(str(config.get("moe_intermediate_size") or config["intermediate_size"]))
            if kind in ("qwen3_moe", "mixtral")
            else 0,
            ffn=size(ffn),
            vocab=size("vocab_size"),
            max_model_len=positions,
            gated_mlp=not opt,
            tied_embeddings=bool(config.get("tie_word_embeddings", opt)),
            biases=biases,
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            learned_positions=positions + 2 if opt else 0,
            bytes_per_param=_DTYPE_BYTES[dtype],
            kv_bytes_per_element=_DTYPE_BYTES[dtype],
            bytes_per_activation=_DTYPE_BYTES[dtype],
            source="config.json",
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights every token of a step is multiplied with: attention and MLP matrices of all layers.

        Without the LM head, which only the tokens that are sampled go through (``head_parameters``).
        """
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = self.hidden * (2 * query + 2 * kv)  # q and o, k and v
        mlp = (
            3 * self.hidden * self.expert_ffn * self.experts
            if self.experts
            else (3 if self.gated_mlp else 2) * self.hidden * self.ffn
        )
        return self.layers * (attention + mlp)

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head, whether or not it shares memory with the input embedding."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All weights, biases and norms; a tied LM head counts once."""
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        norm = self.hidden * (2 if self.biases == "all" else 1)  # LayerNorm has a bias, RMSNorm none
        layer = 2 * norm + 2 * self.head_size * self.qk_norm
        if self.biases != "none":
            layer += query + 2 * kv
        if self.biases in ("attention", "all"):
            layer += self.hidden
        if self.biases == "all":
            layer += self.hidden + self.ffn * (2 if self.gated_mlp else 1)
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return (
            self.matmul_parameters
            + self.layers * layer
            + norm  # the last one, before the LM head
            + embeddings
            + self.learned_positions * self.hidden
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return round(self.parameters * self.bytes_per_param)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers and heads (all GPUs together)."""
        return self._kv_bytes(self.kv_heads)

    def kv_bytes_per_token_on(self, tensor_parallel: int) -> int:
        """Bytes of one token's keys and values on each of ``tensor_parallel`` GPUs.

        The GPUs share the KV heads out; where there are fewer heads than GPUs each holds a whole one.
        Raises ValueError when query or KV heads cannot be dealt out evenly.
        """
        if tensor_parallel < 1 or self.heads % tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide the {self.heads} heads of {self.name} (got {tensor_parallel})"
            )
        if self.kv_heads % tensor_parallel and tensor_parallel % self.kv_heads:
            raise ValueError(
                f"tensor_parallel must divide the {self.kv_heads} KV heads of {self.name} or be a multiple of"
                f" them (got {tensor_parallel})"
            )
        return self._kv_bytes(max(1, self.kv_heads // tensor_parallel))

    def _kv_bytes(self, kv_heads: int) -> int:
        return round(2 * self.layers * kv_heads * self.head_size * self.kv_bytes_per_element)


_NOT_MODELLED = (
    (("n_routed_experts",), "mixture of experts is"),
    (("kv_lora_rank",), "latent attention (MLA) is"),
    (("quantization_config",), "quantised weights are"),
    (("mlp_bias",), "MLP biases are"),
)
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


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
    return wrong


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
    return None
