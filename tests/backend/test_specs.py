"""Shapes against published parameter counts, and KV sizes against what vLLM measured."""

from dataclasses import replace

import pytest

from chairlift.backend.specs import GIB, GPUS, MODELS, Model, gpu, kv_blocks, model

# Totals of the published weights (a tied LM head counted once).
COUNTS = {
    "opt-13b": 12_853_473_280,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# From papers and model cards.
BILLIONS = {"opt-30b": 29.97, "opt-66b": 65.7, "opt-175b": 174.6, "qwen3-0.6b": 0.596}

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
    "num_attention_heads": 40, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 5120, "torch_dtype": "float16",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_published_count(name: str) -> None:
    assert MODELS[name].parameters == COUNTS[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_round_to_the_published_billions(name: str) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.002)


def test_every_model_has_a_published_count() -> None:
    assert set(MODELS) == set(COUNTS) | set(BILLIONS)
    assert all(name == shape.name and shape.source for name, shape in MODELS.items())


@pytest.mark.parametrize(
    ("name", "size"),
    [("opt-13b", 819_200), ("llama-3.1-8b", 131_072), ("llama-3.1-70b", 327_680), ("qwen2.5-7b", 57_344)],
)
def test_kv_bytes_per_token(name: str, size: int) -> None:
    assert MODELS[name].kv_bytes_per_token == size


def test_matmul_head_and_embedding_parameters_make_up_nearly_all() -> None:
    for shape in MODELS.values():
        tables = (1 if shape.tied_embeddings else 2) * shape.head_parameters
        rest = shape.parameters - shape.matmul_parameters - tables
        assert 0 < rest < 0.002 * shape.parameters


def test_widths_scale_bytes() -> None:
    fp8 = replace(model("llama-3.1-8b"), bytes_per_param=1, kv_bytes_per_element=1)
    assert fp8.weight_bytes == 8_030_261_248
    assert fp8.kv_bytes_per_token == 65_536


def test_a_gpu_has_sane_numbers_and_says_where_from() -> None:
    for name, shape in GPUS.items():
        assert name == shape.name
        assert shape.source
        priced = shape.usd_per_gpu_hour is not None
        assert (bool(shape.price_date), bool(shape.price_source)) == (priced, priced)
        assert 20 < shape.memory_gib < 300
        assert shape.usd_per_gpu_hour is None or 0 < shape.usd_per_gpu_hour < 20
        # FLOP a byte at which a kernel turns from memory-bound to compute-bound
        assert (30 if name == "h20" else 100) < shape.bf16_tflops * 1e3 / shape.hbm_gb_per_s < 500


# Data sheets: dense bf16 TFLOP/s, GB/s, all links of one GPU in GB/s, W; and the total that nvidia-smi shows, MiB.
SHEETS = {
    "a100-40gb": (312, 1555, 600, 400, 40960),
    "a100-80gb": (312, 2039, 600, 400, 81920),
    "h100": (989, 3350, 900, 700, 81559),
    "h200": (989, 4800, 900, 700, 143771),
    "b200": (2250, 8000, 1800, 1000, 183359),
    "l4": (121, 300, 0, 72, 23034),
    "a10g": (70, 600, 0, 300, 23028),
    "mi300x": (1307, 5300, 896, 750, 196592),
    "l40s": (362, 864, 0, 350, 46068),
    "a6000": (154.8, 768, 112.5, 300, 49140),
    "rtx-4090": (165.2, 1008, 0, 450, 24564),
    "rtx-5090": (209.5, 1792, 0, 575, 32607),
    "rtx-pro-6000": (503.8, 1792, 0, 600, 97887),
    "h20": (148, 4000, 900, 400, 97871),
    "h100-pcie": (756, 2039, 600, 350, 81559),
    "h100-nvl": (835, 3938, 600, 400, 95830),
    "gb200": (2500, 8000, 1800, 1200, 189471),
    "mi325x": (1307, 6000, 896, 1000, 262128),
}


def test_a_gpu_has_the_numbers_of_its_data_sheet() -> None:
    found = {
        name: (g.bf16_tflops, g.hbm_gb_per_s, g.nvlink_gb_per_s, g.tdp_w, g.memory_gib * 1024)
        for name, g in GPUS.items()
    }
    assert found == SHEETS


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("A100-40", "a100-40gb"),
        ("a100_80gb", "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_gpu_names(asked: str, name: str) -> None:
    assert gpu(asked) is GPUS[name]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("facebook/opt-13b", "opt-13b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
    ],
)
def test_model_names(asked: str, name: str) -> None:
    assert model(asked) is MODELS[name]


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(LookupError, match=r"unknown GPU 'H10' – did you mean 'h100'\?"):
        gpu("H10")
    with pytest.raises(LookupError, match=r"unknown model 'llama-3\.1-8' – did you mean 'llama-3\.1-8b'\?"):
        model("llama-3.1-8")
    with pytest.raises(LookupError, match="unknown GPU 'abacus' – known: a100-40gb, "):
        gpu("abacus")


def test_a_pcie_card_is_not_taken_for_the_faster_one() -> None:
    assert gpu("NVIDIA H100 PCIe").name == "h100-pcie"
    with pytest.raises(LookupError):
        gpu("NVIDIA A100 PCIe")


@pytest.mark.parametrize(
    ("config", "name"),
    [(LLAMA, "llama-3.1-8b"), (OPT, "opt-13b"), (QWEN2, "qwen2.5-7b"), (QWEN3, "qwen3-32b")],
)
def test_a_config_json_gives_the_shape_in_the_table(config: dict[str, object], name: str) -> None:
    assert replace(Model.from_hf_config(config, name), source=MODELS[name].source) == MODELS[name]


def test_a_config_without_optional_keys_takes_their_defaults() -> None:
    config = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "torch_dtype")}
    shape = Model.from_hf_config(config | {"dtype": "float32"}, "x")
    assert (shape.kv_heads, shape.head_size, shape.bytes_per_param) == (32, 128, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None, "vocab_size": None}, "x: missing hidden_size, vocab_size"),
        ({"model_type": "mixtral"}, "x: model_type 'mixtral' is not modelled – modelled: llama, "),
        ({"num_local_experts": 8}, "x: mixture of experts is not modelled"),
        ({"kv_lora_rank": 512}, r"x: latent attention \(MLA\) is not modelled"),
        ({"quantization_config": {"bits": 4}}, "x: quantised weights are not modelled"),
        ({"hidden_size": "4096"}, "x: hidden_size must be a whole number"),
        ({"num_hidden_layers": 0}, "x: layers must be at least 1"),
        ({"num_attention_heads": 0}, "x: num_attention_heads must be at least 1"),
        ({"num_key_value_heads": 5}, "x: kv_heads must divide heads"),
        ({"torch_dtype": "int3"}, "x: torch_dtype 'int3' is not modelled"),
    ],
)
def test_a_config_that_is_not_modelled_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_hf_config(LLAMA | change, "x")


@pytest.mark.parametrize(
    ("name", "on", "utilization", "tokens"),
    [
        ("llama-3.1-8b", "h200", 0.90, 56_057 * 16),  # vLLM 0.23, 8192 batched tokens
        ("opt-13b", "h200", 0.90, 8_240 * 16),  # the same
        ("opt-13b", "a100-40gb", 0.95, 15_700),  # vLLM of 2023, arXiv:2309.06180, table 1
    ],
)
def test_kv_size_is_near_what_vllm_found(name: str, on: str, utilization: float, tokens: int) -> None:
    fit = kv_blocks(model(name), gpu(on), memory_utilization=utilization)
    assert fit.tokens == pytest.approx(tokens, rel=0.03)


def test_the_sum_is_explained() -> None:
    fit = kv_blocks(model("opt-13b"), gpu("a100-40gb"), reserve_gib=2)
    assert fit.explain() == (
        "opt-13b on a100-40gb: 40.00 GiB × 0.9 − 23.94 weights − 2.00 reserve = 10.06 GiB for KV"
        " = 823 blocks of 16 tokens = 13,168 tokens"
    )
    assert fit.tokens * fit.kv_bytes_per_token <= fit.kv_bytes < (fit.tokens + 16) * fit.kv_bytes_per_token


def test_tensor_parallel_shares_weights_and_kv_heads() -> None:
    shape = model("llama-3.1-70b")
    fit = kv_blocks(shape, gpu("h100"), tensor_parallel=4)
    assert fit.weight_bytes == shape.weight_bytes // 4
    assert fit.kv_bytes_per_token == shape.kv_bytes_per_token // 4
    assert "on each of 4 GPUs" in fit.explain()


def test_kv_heads_are_replicated_when_there_are_more_gpus() -> None:
    shape = replace(model("qwen2.5-1.5b"), heads=16, kv_heads=2)
    assert shape.kv_bytes_per_token_on(8) == shape.kv_bytes_per_token // 2


@pytest.mark.parametrize("tensor_parallel", [0, 3, -1, 64])
def test_heads_that_cannot_be_shared_out_are_refused(tensor_parallel: int) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel must divide the 32 heads of llama-3\.1-8b"):
        kv_blocks(model("llama-3.1-8b"), gpu("h100"), tensor_parallel=tensor_parallel)


def test_kv_heads_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide the 4 KV heads"):
        kv_blocks(replace(model("qwen2.5-7b"), heads=12), gpu("h100"), tensor_parallel=6)


def test_a_model_that_does_not_fit_shows_the_sum() -> None:
    with pytest.raises(ValueError, match=r"no room for KV: opt-66b on h100: 79\.65 GiB × 0\.9 − 122\.\d+ weights"):
        kv_blocks(model("opt-66b"), gpu("h100"))


@pytest.mark.parametrize(
    "settings",
    [{"memory_utilization": 0.0}, {"memory_utilization": 1.1}, {"memory_utilization": float("nan")},
     {"reserve_gib": -1.0}, {"reserve_gib": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        kv_blocks(model("opt-13b"), gpu("h100"), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        kv_blocks(model("opt-13b"), gpu("h100"), block_size=0)


def test_memory_is_binary() -> None:
    assert gpu("a100-40gb").memory_bytes == 40 * GIB
