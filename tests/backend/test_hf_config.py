"""Shapes read from the config.json files of published models: those of the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chairlift.backend import hf_config
from chairlift.backend.specs import MODELS, model

COMMON: dict[str, Any] = {
    "architectures": ["X"], "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "attention_dropout": 0.0, "rope_theta": 10000,
    "tie_word_embeddings": False, "transformers_version": "4.55.0",
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "vocab_size": 32000, "router_aux_loss_coef": 0.02, "sliding_window": None,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "max_position_embeddings": 40960, "max_window_layers": 48, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936, "attention_bias": False, "rope_scaling": None,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "experts_per_token": 4, "attention_bias": True, "sliding_window": 128,
        "initial_context_length": 4096, "max_position_embeddings": 131072, "vocab_size": 201088, "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention"] * 18, "output_router_logits": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                       "lm_head"],
        },
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8,
        "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 2.5,
        "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "vocab_size": 129280,
        "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "attention_bias": False,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
        "quantization_config": BLOCKS,
    },
    "glm-4.5": {
        "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 131072, "vocab_size": 151552, "n_group": 1, "topk_group": 1, "rope_scaling": None,
    },
    "minimax-m2": {
        "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256,
        "num_experts_per_tok": 8, "use_qk_norm": True, "qk_norm_type": "per_layer", "rotary_dim": 64,
        "attn_type_list": [1] * 62, "scoring_func": "sigmoid", "use_routing_bias": True, "use_mtp": True,
        "num_mtp_modules": 3, "max_position_embeddings": 196608, "vocab_size": 200064, "quantization_config": BLOCKS,
    },
    "llama-4-maverick": {
        "model_type": "llama4", "boi_token_index": 200080, "image_token_index": 200092, "vision_config": {"x": 1},
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "max_position_embeddings": 1048576,
            "no_rope_layers": [], "vocab_size": 202048, "use_qk_norm": False, "for_llm_compressor": False,
        },
    },
    "gemma-3-27b": {
        "model_type": "gemma3", "mm_tokens_per_image": 256, "boi_token_index": 255999, "vision_config": {"x": 1},
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 1024,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 168, "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 262208,
            "tie_word_embeddings": True,
        },
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
        "max_position_embeddings": 32768, "vocab_size": 32000,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_gives_the_row_of_the_table(name: str) -> None:
    row = MODELS[name]
    found = hf_config.model(COMMON | CONFIGS[name], name)
    assert replace(found, source=row.source, other_parameters=row.other_parameters) == row


def compressed(weights: dict[str, Any], inputs: object, ignore: list[str], **more: Any) -> dict[str, Any]:
    group = {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ignore, **more}


DENSE = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("told", "quantization", "gib"),
    [
        ({"quant_method": "fp8"}, "fp8", 67.66),
        (BLOCKS, "fp8_block", 67.68),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "int4", 37.04),
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, "int4", 37.04),
        (compressed(FLOAT8, {"num_bits": 8}, ["lm_head"]), "fp8", 67.66),
        (compressed(INT4, None, ["lm_head"]), "int4", 37.04),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "nvfp4", 39.77),
    ],
)
def test_a_quantized_config_narrows_its_layers(told: dict[str, Any], quantization: str, gib: float) -> None:
    # 68.45e9 parameters in the layers' matrices, 2.1e9 in embedding and head
    shape = hf_config.model(COMMON | DENSE | {"quantization_config": told}, "x")
    assert shape.quantization == quantization
    assert shape.weight_bytes / 2**30 == pytest.approx(gib, abs=0.02)


def test_what_a_config_leaves_unquantized_keeps_its_width() -> None:
    # Kimi-K2.5: experts in INT4, attention, shared experts and the dense layer in bfloat16
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    config = COMMON | CONFIGS["deepseek-v3"] | {"quantization_config": compressed(INT4, None, ignore)}
    assert hf_config.model(config, "x").quantized == "experts"
    # a list of single layers' modules that names the attention of a few layers leaves it narrow
    few = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    told = compressed(FLOAT8, {"num_bits": 8}, ["lm_head", *few])
    assert hf_config.model(COMMON | DENSE | {"quantization_config": told}, "x").attention_bytes_per_param is None


def test_a_cache_scheme_narrows_the_cache() -> None:
    told = compressed(FLOAT8, {"num_bits": 8}, ["lm_head"], kv_cache_scheme={"num_bits": 8, "type": "float"})
    shape = hf_config.model(COMMON | DENSE | {"quantization_config": told}, "x")
    assert shape.kv_bytes_per_token == model("llama-3.1-70b").kv_bytes_per_token // 2


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 131072),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}, 262144),
        ({"type": "linear", "factor": 2.0}, 262144),
    ],
)
def test_rope_scaling_sets_the_length(rope: dict[str, Any] | None, length: int) -> None:
    assert hf_config.model(COMMON | DENSE | {"rope_scaling": rope}, "x").max_model_len == length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_num_key_heads": 16}, "x: not understood: linear_num_key_heads"),
        ({"num_zero_experts": 4, "ngram_vocab": 9}, "x: not understood: ngram_vocab, num_zero_experts"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes' is not modelled"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W9"}}, "quant_algo W9 is not modelled"),
        ({"model_type": "minimax_m2", "attn_type_list": [0, 1]}, "layers of linear attention are not modelled"),
    ],
)
def test_what_would_change_a_result_and_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_config.model(COMMON | DENSE | change, "x")
