"""Reading the shape of a model from a Hugging Face ``config.json``.

Every key of the file is either read, or known to change neither sizes nor times, or refused: a model of another shape
must not be priced as this one. Keys that may be absent take the default of transformers' own configuration classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from chairlift.backend.names import hint
from chairlift.backend.shapes import BadShape, Model

Config = Mapping[str, Any]


class Family(NamedTuple):
    """How the files of one ``model_type`` differ from Llama's."""

    biases: Literal["none", "qkv", "attention", "all"] = "none"  # where the file says nothing of them
    qk_norm: bool = False
    head_size: int | None = None  # default of head_dim
    experts: str = ""  # the key of their number; "": dense
    expert_ffn: str = "moe_intermediate_size"
    tied: bool = False
    latent: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "ministral3": Family(),
    "qwen2": Family(biases="qkv"),
    "qwen3": Family(qk_norm=True, head_size=128),
    "opt": Family(biases="all", tied=True),
    "gemma3_text": Family(qk_norm=True, head_size=256, tied=True),
    "mixtral": Family(experts="num_local_experts", expert_ffn="intermediate_size"),
    "qwen2_moe": Family(biases="qkv", experts="num_experts"),
    "qwen3_moe": Family(qk_norm=True, experts="num_experts"),
    "gpt_oss": Family(biases="attention", head_size=64, experts="num_local_experts", expert_ffn="intermediate_size"),
    "deepseek_v3": Family(experts="n_routed_experts", latent=True),
    "kimi_k2": Family(experts="n_routed_experts", latent=True),
    "llama4_text": Family(experts="num_local_experts", expert_ffn="intermediate_size", head_size=128),
    "glm4_moe": Family(experts="n_routed_experts"),
    "minimax_m2": Family(qk_norm=True, experts="num_local_experts", expert_ffn="intermediate_size"),
}
WRAPPED = {  # model_type of a file that holds a text model beside a vision tower: that of its text_config, if not given
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "mistral3": "mistral",
    "kimi_k25": "kimi_k2",
}
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# Keys that change numbers' values, training, or the tokens produced, and neither sizes nor times.
_HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "auto_map",
        "torch_dtype",
        "dtype",
        "return_dict",
        "problem_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "torchscript",
        "use_bfloat16",
        "id2label",
        "label2id",
        "use_cache",
        "is_encoder_decoder",
        "is_decoder",
        "chunk_size_feed_forward",
        "pruned_heads",
        "tie_encoder_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "finetuning_task",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
        "decoder_start_token_id",
        "prefix_token_id",
        "sep_token_id",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "diversity_penalty",
        "early_stopping",
        "output_scores",
        "return_dict_in_generate",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "tf_legacy_loss",
        "initializer_range",
        "init_std",
        "pretraining_tp",
        "hidden_act",
        "activation_function",
        "hidden_activation",
        "rms_norm_eps",
        "layer_norm_eps",
        "attention_dropout",
        "dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "layerdrop",
        "rope_theta",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_interleave",
        "rope_layout",
        "partial_rotary_factor",
        "rotary_dim",
        "rotary_emb_base",
        "original_max_position_embeddings",
        "initial_context_length",
        "swiglu_limit",
        "swiglu_alpha",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "aux_loss_alpha",
        "seq_aux",
        "router_z_loss_coef",
        "norm_topk_prob",
        "scoring_func",
        "topk_method",
        "topk_group",
        "n_group",
        "routed_scaling_factor",
        "ep_size",
        "moe_layer_freq",
        "use_routing_bias",
        "shared_moe_mode",
        "head_dtype",
        "max_window_layers",
        "experts_per_token",
        "qk_norm_type",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "attn_scale",
        "attn_temperature_tuning",
        "floor_scale",
        "no_rope_layers",
        "no_rope_layer_interval",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
        "layer_norm_elementwise_affine",
        "cache_implementation",
        "use_bidirectional_attention",
        "unsloth_fixed",
        "use_flash_attention",
        "attn_implementation",
        "_attn_implementation_autoset",
        "for_llm_compressor",
        "language_model_only",
        "qk_head_dim",
        "mtp_transformer_layers",
        "layernorm_full_attention_alpha",
        "layernorm_full_attention_beta",
        "layernorm_mlp_alpha",
        "layernorm_mlp_beta",
        "mlp_intermediate_size",
        "moe_router_topk_scaling_factor",
    ]
)
_READ = frozenset(
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "ffn_dim",
        "intermediate_size_mlp",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "qkv_bias",
        "mlp_bias",
        "enable_bias",
        "use_qk_norm",
        "word_embed_proj_dim",
        "quantization_config",
        "compression_config",
        "sliding_window",
        "use_sliding_window",
        "layer_types",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "attention_chunk_size",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_intermediate_size",
        "n_shared_experts",
        "shared_intermediate_size",
        "shared_expert_intermediate_size",
        "first_k_dense_replace",
        "mlp_only_layers",
        "decoder_sparse_step",
        "moe_layers",
        "interleave_moe_layer_step",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "num_nextn_predict_layers",
        "num_mtp_modules",
        "use_mtp",
        "attn_type_list",
    ]
)
_OF_A_WRAPPER = frozenset(
    [
        "text_config",
        "vision_config",
        "audio_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "vision_feature_layer",
        "spatial_merge_size",
        "media_placeholder_token_id",
        "ignore_index",
        "video_placeholder",
        "use_unified_vision_chunk",
    ]
)


def model(config: Config, name: str = "") -> Model:
    """The model that ``config`` describes: a decoder of one of `FAMILIES`, alone or as the text model of a wrapper.

    A vision tower is left out: give ``other_parameters``.
    Raises ValueError naming every key that is missing or not understood, or what is not modelled.
    """
    name = name or str(config.get("_name_or_path") or "config.json")
    try:
        return _Reader(_text_config(config), name).model()
    except BadShape:
        raise
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except (AttributeError, LookupError, OverflowError, TypeError) as error:  # such as a mapping where a text belongs
        raise ValueError(f"{name}: a value is of another kind than it must be: {error}") from None


def _text_config(config: Config) -> Config:
    """The part of ``config`` that describes the text model, with what stands beside it."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    kind = str(config.get("model_type"))
    if kind not in WRAPPED:
        raise ValueError(f"model_type {kind!r} is not modelled – {hint(kind, [*FAMILIES, *WRAPPED])}")
    outer = {key: value for key, value in config.items() if key not in _OF_A_WRAPPER and key != "model_type"}
    return {"model_type": WRAPPED[kind], **outer, **text}


class _Reader:
    """Reads one file, key by key."""

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._name = config, name
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise ValueError(f"model_type {kind!r} is not modelled – modelled: {', '.join(sorted(FAMILIES))}")
        self._kind = str(kind)
        self._family = FAMILIES[self._kind]
        self._check_keys()

    def _check_keys(self) -> None:
        known = _READ | _HARMLESS
        given = [key for key, value in self._config.items() if value not in (None, False)]
        if strange := sorted(key for key in given if key not in known):
            raise ValueError(
                f"not understood: {', '.join(strange)}; a key that changes neither sizes nor times can be deleted"
            )
        family = self._family
        experts = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if self._config.get(key)]
        if experts and not family.experts:
            raise ValueError(f"model_type {self._kind} has no experts (got {experts[0]})")
        if self._config.get("kv_lora_rank") and not family.latent:
            raise ValueError(f"model_type {self._kind} has no latent attention (got kv_lora_rank)")
        if self._config.get("mlp_bias"):
            raise ValueError("MLP biases are not modelled (key mlp_bias)")
        if set(self._config.get("attn_type_list") or [1]) != {1}:
            raise ValueError("layers of linear attention are not modelled (key attn_type_list)")

    def _size(self, key: str, default: int = 0) -> int:
        value = self._config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be a whole number (got {value!r})")
        return value

    def model(self) -> Model:
        """The whole of it."""
        config, family, size = self._config, self._family, self._size
        opt = self._kind == "opt"
        ffn = "ffn_dim" if opt else "intermediate_size"
        needed = ["num_hidden_layers", "hidden_size", "num_attention_heads", ffn, "vocab_size"]
        needed += ["max_position_embeddings"]
        needed += ["num_key_value_heads"] * (self._kind not in ("llama", "opt") and not family.latent)
        if family.experts:
            count = "num_local_experts" if config.get("num_local_experts") is not None else family.experts
            top = "num_experts_per_token" if config.get("num_experts_per_token") is not None else "num_experts_per_tok"
            needed += [count, top, family.expert_ffn]
        if family.latent:
            needed += ["kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"]
        if missing := [key for key in dict.fromkeys(needed) if config.get(key) is None]:
            raise ValueError(f"missing {', '.join(missing)}")
        hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
        if opt and size("word_embed_proj_dim", hidden) != hidden:
            raise ValueError("word_embed_proj_dim other than hidden_size is not modelled")
        if heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1 (got {heads})")
        head_size = size("head_dim", family.head_size or hidden // heads)
        width = self._width()
        shape: dict[str, Any] = {
            "name": self._name,
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads if opt or family.latent else size("num_key_value_heads", heads),
            "head_size": size("qk_nope_head_dim") if family.latent else head_size,
            "ffn": size("intermediate_size_mlp") or size(ffn),
            "vocab": size("vocab_size"),
            "max_model_len": self._length(),
            "gated_mlp": not opt,
            "tied_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
            "biases": self._biases(),
            "qk_norm": bool(config.get("use_qk_norm", family.qk_norm)),
            "learned_positions": size("max_position_embeddings") + 2 if opt else 0,
            "bytes_per_param": width,
            "kv_bytes_per_element": width,
            "bytes_per_activation": width,
            "source": "config.json",
        }
        if family.experts:
            shape |= self._experts(size(count), size(top))
        if family.latent:
            shape |= {
                "latent": size("kv_lora_rank"),
                "latent_query": size("q_lora_rank"),
                "rope_size": size("qk_rope_head_dim"),
                "value_size": size("v_head_dim"),
            }
        shape |= self._window(layers)
        shape |= self._quantization(layers, width)
        if self._kind == "gpt_oss":
            shape["expert_ffn_multiple"] = 256  # vLLM pads MXFP4 experts so: 2880 → 3072
        return Model(**shape)

    def _width(self) -> int:
        dtype = str(self._config.get("torch_dtype") or self._config.get("dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in _DTYPE_BYTES:
            raise ValueError(f"torch_dtype {dtype!r} is not modelled – modelled: {', '.join(_DTYPE_BYTES)}")
        return _DTYPE_BYTES[dtype]

    def _biases(self) -> Literal["none", "qkv", "attention", "all"]:
        if self._kind == "opt":
            return "all" if self._config.get("enable_bias", True) else "none"
        if self._family.biases == "qkv":
            return "qkv" if self._config.get("qkv_bias", True) else "none"
        attention = self._config.get("attention_bias")
        if self._kind == "glm4_moe":  # its output projection has none
            return "qkv" if attention else "none"
        return "attention" if (self._family.biases == "attention" if attention is None else attention) else "none"

    def _length(self) -> int:
        """Tokens of a sequence as vLLM derives them: the positions, stretched as ``rope_scaling`` says.

        YaRN stretches the positions of before, and Llama 3's rule and LongRoPE state the length they reach.
        """
        positions = self._size("max_position_embeddings")
        rope = {**(self._config.get("rope_scaling") or {})} or {**(self._config.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("default", "llama3", "longrope", "su", "mrope") or self._kind == "gemma3_text":
            return positions
        if kind not in ("linear", "dynamic", "yarn", "deepseek_yarn"):
            known = "default, linear, dynamic, yarn, llama3, longrope"
            raise ValueError(f"rope_scaling {kind!r} is not modelled – modelled: {known}")
        factor = rope.get("factor")
        if not isinstance(factor, int | float) or isinstance(factor, bool) or factor <= 0:
            raise ValueError(f"rope_scaling.factor must be a number above 0 (got {factor!r})")
        before = rope.get("original_max_position_embeddings", positions) if "yarn" in kind else positions
        return int(before * factor)

    def _experts(self, count: int, top: int) -> dict[str, Any]:
        config, size, layers = self._config, self._size, self._size("num_hidden_layers")
        width = size(self._family.expert_ffn)
        shared = size("shared_expert_intermediate_size") or size("shared_intermediate_size")
        shared = shared or size("n_shared_experts") * width
        if self._kind == "llama4_text":
            shared = width  # one, as wide as an expert
        dense = size("first_k_dense_replace")
        if config.get("mlp_only_layers"):
            dense += len(config["mlp_only_layers"])
        if (every := size("decoder_sparse_step", 1)) > 1:
            dense += layers - layers // every
        if self._kind == "llama4_text":
            with_experts = config.get("moe_layers")
            every = size("interleave_moe_layer_step", 1)
            dense = layers - (len(with_experts) if with_experts else layers // every)
        mtp = size("num_nextn_predict_layers")
        return {
            "experts": count,
            "experts_per_token": top,
            "expert_ffn": width,
            "shared_ffn": shared,
            "dense_layers": dense,
            "mtp_layers": mtp,
        }

    def _window(self, layers: int) -> dict[str, Any]:
        config = self._config
        chunked = self._kind == "llama4_text"
        window = self._size("attention_chunk_size" if chunked else "sliding_window")
        if not window or (config.get("use_sliding_window") is False):
            return {}
        kinds = config.get("layer_types")
        pattern = self._size("sliding_window_pattern") or self._size("_sliding_window_pattern")
        if kinds:
            if unknown := set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"}:
                raise ValueError(f"layer_types {', '.join(sorted(unknown))} are not modelled")
            windows = sum(kind != "full_attention" for kind in kinds[:layers])
        elif self._kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
            if not config.get("use_sliding_window"):
                return {}
            windows = layers - min(layers, self._size("max_window_layers", 28))
        elif self._kind == "gpt_oss":
            windows = layers - layers // 2
        elif self._kind == "gemma3_text":
            windows = layers - layers // (pattern or 6)
        elif chunked:
            windows = layers - layers // self._size("no_rope_layer_interval", 4)
        else:
            windows = layers - (layers // pattern if pattern else 0)
        if windows and window >= self._length():
            return {}  # never reached
        if not windows:
            return {}
        return {"window": window, "window_layers": windows} | ({"chunked": True} if chunked else {})

    def _quantization(self, layers: int, width: int) -> dict[str, Any]:
        told = self._config.get("quantization_config") or self._config.get("compression_config")
        if not told:
            return {}
        if not isinstance(told, Mapping):
            raise ValueError(f"quantization_config must be a mapping (got {told!r})")
        method = str(told.get("quant_method", "")).replace("_", "-").lower()
        found: dict[str, Any]
        if method in ("fp8", "fbgemm-fp8"):
            found = {"quantization": "fp8_block" if told.get("weight_block_size") else "fp8"}
        elif method in ("awq", "gptq", "awq-marlin", "gptq-marlin", "auto-round"):
            found = _weight_only(told.get("bits", told.get("w_bit", told.get("num_bits"))))
        elif method == "mxfp4":
            found = {"quantization": "mxfp4"}
        elif method in ("compressed-tensors", "modelopt", "modelopt-fp4", "modelopt-fp8"):
            found = _compressed(told)
        else:
            known = "fp8, fbgemm_fp8, awq, gptq, mxfp4, compressed-tensors, modelopt"
            raise ValueError(f"quantization_config.quant_method {method!r} is not modelled – modelled: {known}")
        skipped = [str(each) for key in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
                   for each in told.get(key) or []]  # fmt: skip
        if _mostly(skipped, r"attn|attention", layers):
            found["attention_bytes_per_param"] = width
        if _mostly(skipped, r"shared_expert|mlp\W*\(?(gate_|up|gate\||down)", layers):
            found["mlp_bytes_per_param"] = width
        if self._family.experts and found.keys() >= {"attention_bytes_per_param", "mlp_bytes_per_param"}:
            found = {**{key: found[key] for key in found if "_bytes_per_param" not in key}, "quantized": "experts"}
        elif self._kind == "gpt_oss" and method == "mxfp4":
            found = {"quantization": "mxfp4", "quantized": "experts"}
        cache = told.get("kv_cache_scheme") or told.get("kv_cache_quant_algo")
        if isinstance(cache, Mapping):
            found["kv_bytes_per_element"] = _number(cache.get("num_bits"), "kv_cache_scheme.num_bits") / 8
        elif isinstance(cache, str) and cache.upper() == "FP8":
            found["kv_bytes_per_element"] = 1
        elif cache:
            raise ValueError(f"quantization_config: KV cache in {cache!r} is not modelled")
        return found


def _mostly(skipped: list[str], pattern: str, layers: int) -> bool:
    """Whether the modules ``skipped`` leave a part as it is in at least half of all layers."""
    hits = [each for each in skipped if re.search(pattern, each) and not re.search("vision|visual|mm_", each)]
    named = {found.group(1) for each in hits if (found := re.search(r"layers\\?\.(\d+)\\?\.", each))}
    return any(not re.search(r"layers\\?\.(\d+)\\?\.", each) for each in hits) or 2 * len(named) >= layers > 0


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"quantization_config: {key} must be a number above 0 (got {value!r})")
    return value


def _weight_only(bits: object) -> dict[str, Any]:
    count = _number(bits, "bits")
    if count == 4:
        return {"quantization": "int4"}
    if count == 8:
        return {"quantization": "int8", "arithmetic": "bf16"}
    raise ValueError(f"quantization_config: weights of {bits} bits are not modelled – modelled: 4, 8")


def _compressed(told: Config) -> dict[str, Any]:
    """What ``compressed-tensors`` and ModelOpt say of the weights: in one scheme for all layers that have one."""
    algorithm = str(told.get("quant_algo") or "").upper()
    by_name = {"FP8": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4", "FP8_PB_WO": "fp8_block", "W4A16_AWQ": "int4"}
    if algorithm:
        if algorithm not in by_name:
            raise ValueError(f"quantization_config.quant_algo {algorithm} is not modelled – {', '.join(by_name)} are")
        return {"quantization": by_name[algorithm]}
    schemes = []
    for group in (told.get("config_groups") or {}).values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        bits, kind = weights.get("num_bits"), weights.get("type")
        if kind == "float" and bits == 8:
            scheme: dict[str, Any] = {"quantization": "fp8_block" if weights.get("strategy") == "block" else "fp8"}
            scheme |= {} if inputs else {"arithmetic": "bf16"}
        elif kind == "float" and bits == 4:
            scheme = {"quantization": "mxfp4" if weights.get("group_size") == 32 else "nvfp4"}
            scheme |= {} if inputs or scheme["quantization"] == "mxfp4" else {"arithmetic": "bf16"}
        elif kind == "int" and bits == 8 and inputs:
            scheme = {"quantization": "int8"}
        else:
            scheme = _weight_only(bits)
        schemes.append(scheme)
    if not schemes:
        raise ValueError("quantization_config has neither config_groups nor quant_algo")
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError("quantization_config: groups in different formats are not modelled")
    return schemes[0]
