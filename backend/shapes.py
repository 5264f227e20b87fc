"""What a GPU and a language model are to a cost model: a handful of numbers, the rest counted from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One accelerator as its data sheet gives it: peaks, which no kernel reaches."""

    name: str
    bf16_tflops: float  # dense tensor-core peak, 1e12 FLOP/s
    hbm_gb_per_s: float  # memory bandwidth, 1e9 B/s
    memory_gib: float  # what nvidia-smi calls total, 2**30 B (ECC and firmware already off)
    nvlink_gb_per_s: float  # all links of one GPU, both directions added, 1e9 B/s; 0: none
    host_gb_per_s: float  # PCIe, one direction, line rate, 1e9 B/s
    tdp_w: float
    usd_per_gpu_hour: float  # one on-demand price out of a wide range
    price_date: str  # when that price was seen
    price_source: str  # whose price, and the range seen
    source: str  # of the other numbers

    @property
    def memory_bytes(self) -> int:
        """Total memory in bytes."""
        return round(self.memory_gib * GIB)


@dataclass(frozen=True)
class Model:
    """The shape of a dense decoder-only transformer; everything else about it is counted from this.

    Weights and KV in other widths: ``dataclasses.replace(model, bytes_per_param=1, kv_bytes_per_element=1)``.
    Raises ValueError when a size is not positive or the KV heads do not divide the query heads.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int  # width inside the MLP
    vocab: int
    max_model_len: int  # tokens of prompt and output together
    gated_mlp: bool = True  # three matrices (gate, up, down), else two
    tied_embeddings: bool = False  # the LM head is the input embedding
    biases: Literal["none", "qkv", "attention", "all"] = "none"  # counted; "all": norms and MLP as well
    qk_norm: bool = False  # a norm on each query and key head (Qwen3)
    learned_positions: int = 0  # rows of the position table (OPT: 2 more than positions)
    bytes_per_param: float = 2
    kv_bytes_per_element: float = 2
    source: str = ""

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "vocab", "max_model_len")
        wrong = [f"{size} must be at least 1 (got {value})" for size in sizes if (value := getattr(self, size)) < 1]
        if not wrong and self.heads % self.kv_heads:
            wrong = [f"kv_heads must divide heads (got {self.kv_heads} and {self.heads})"]
        if wrong:
            raise ValueError(f"model {self.name}: " + "; ".join(wrong))

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
        if kind not in ("llama", "mistral", "qwen2", "qwen3", "opt"):
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
            head_size=size("head_dim", 128 if kind == "qwen3" else hidden // heads),
            ffn=size(ffn),
            vocab=size("vocab_size"),
            max_model_len=positions,
            gated_mlp=not opt,
            tied_embeddings=bool(config.get("tie_word_embeddings", opt)),
            biases=biases,
            qk_norm=kind == "qwen3",
            learned_positions=positions + 2 if opt else 0,
            bytes_per_param=_DTYPE_BYTES[dtype],
            kv_bytes_per_element=_DTYPE_BYTES[dtype],
            source="config.json",
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights every token of a step is multiplied with: attention and MLP matrices of all layers.

        Without the LM head, which only the tokens that are sampled go through (``head_parameters``).
        """
        query, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = self.hidden * (2 * query + 2 * kv)  # q and o, k and v
        return self.layers * (attention + (3 if self.gated_mlp else 2) * self.hidden * self.ffn)

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
    (("num_local_experts", "num_experts", "n_routed_experts"), "mixture of experts is"),
    (("kv_lora_rank",), "latent attention (MLA) is"),
    (("quantization_config",), "quantised weights are"),
    (("mlp_bias",), "MLP biases are"),
)
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
