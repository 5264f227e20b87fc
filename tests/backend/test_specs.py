"""Shapes against published parameter counts, and KV sizes against what vLLM measured."""

from dataclasses import replace

import pytest

from chairlift.backend import hf_config
from chairlift.backend.specs import GPUS, MODELS, gpu, model

# Totals of the published weights (a tied LM head counted once), as the files' index says them, to the parameter.
COUNTS = {
    "opt-13b": 12_853_473_280,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
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
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-2507": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-235b-a22b-2507": 235_093_634_560,
}
# From papers, model cards and the files' index, in billions: all parameters, those of layers for further tokens and
# vision towers included where the card counts them.
BILLIONS = {
    "opt-30b": 29.97,
    "opt-66b": 65.7,
    "opt-175b": 174.6,
    "qwen3-0.6b": 0.596,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v3": 684.53,
    "kimi-k2": 1026.4,
    "kimi-k2.5": 1026.4,
    "glm-4.5": 358.34,
    "glm-4.6": 356.79,
    "glm-4.5-air": 110.47,
    "minimax-m2": 228.70,
    "llama-4-scout": 108.64,
    "llama-4-maverick": 401.58,
    "gemma-3-1b": 1.000,
    "gemma-3-4b": 4.300,
    "gemma-3-12b": 12.187,
    "gemma-3-27b": 27.432,
}
# Parameters that a token is computed with, in billions, as the cards say them; roundly, and each counts in its own way.
ACTIVE = {
    "mixtral-8x7b": 12.9, "mixtral-8x22b": 39, "qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "deepseek-v3": 37,
    "kimi-k2": 32, "glm-4.5": 32, "glm-4.5-air": 12, "llama-4-scout": 17, "llama-4-maverick": 17, "minimax-m2": 10,
}  # fmt: skip

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
    assert MODELS[name].published_parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_is_computed_with_the_published_part_of_them(name: str) -> None:
    shape = MODELS[name]
    without_tables = shape.active_parameters - shape.head_parameters - shape.embedding_parameters
    assert without_tables / 1e9 < ACTIVE[name] * 1.03
    assert shape.active_parameters / 1e9 > ACTIVE[name] * 0.99


def test_every_model_has_a_published_count() -> None:
    assert set(MODELS) == set(COUNTS) | set(BILLIONS)
    assert all(name == shape.name and shape.source for name, shape in MODELS.items())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("opt-13b", 819_200),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("qwen2.5-7b", 57_344),
        ("deepseek-v3", 576 * 61 * 2),  # one latent vector of 512 and a key of 64 with position, in each of 61 layers
        ("kimi-k2", 576 * 61 * 2),
        ("gpt-oss-120b", 36 * 2 * 8 * 64 * 2),
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, size: int) -> None:
    assert MODELS[name].kv_bytes_per_token == size


def test_matmul_head_and_embedding_parameters_make_up_nearly_all() -> None:
    for shape in MODELS.values():
        tables = (1 if shape.tied_embeddings else 2) * shape.head_parameters
        matrices = sum(part.parameters for part in shape.weights if part.part != "head")
        rest = shape.parameters - shape.other_parameters - matrices - tables
        assert 0 < rest < 0.002 * shape.parameters


def test_layers_with_a_window_cache_apart_from_the_others() -> None:
    # gpt-oss-120b: 18 layers of each kind, 8 KV heads of 64, keys and values of 2 bytes
    full, windowed = model("gpt-oss-120b").kv_groups()
    assert full == (18, 18 * 2 * 8 * 64 * 2, 0)
    assert windowed == (18, 18 * 2 * 8 * 64 * 2, 128)
    # Gemma-3-27B: 52 of 62 layers look back on 1024 tokens
    assert [(group.layers, group.window) for group in model("gemma-3-27b").kv_groups()] == [(10, 0), (52, 1024)]


def test_a_latent_vector_is_whole_on_each_gpu() -> None:
    assert model("deepseek-v3").kv_bytes_per_token_on(8) == 576 * 61 * 2


@pytest.mark.parametrize(
    ("asked", "quantization", "gb"),
    [
        # Qwen3-32B: 31.2e9 parameters in its layers' matrices, 0.78e9 each in embedding and head, of 2 bytes
        ("Qwen/Qwen3-32B-FP8", "fp8_block", 31.21 + 2 * 1.556),
        ("RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", "fp8", 68.45 + 2 * 2.101),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "fp8", 6.98 + 2 * 1.051),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "int4", 70.21 * (0.5 + 2.5 / 128) + 2 * 2.49),
        ("nvidia/Llama-3.3-70B-Instruct-FP4", "nvfp4", 68.45 * 0.5625 + 2 * 2.101),
        ("openai/gpt-oss-120b", "mxfp4", 114.66 * 0.53125 + 2 * (116.79 - 114.66)),
        ("deepseek-ai/DeepSeek-V3", "fp8_block", 669.1 + 2 * 1.9),
    ],
)
def test_a_format_narrows_the_matrices_of_the_layers(asked: str, quantization: str, gb: float) -> None:
    shape = model(asked)
    assert shape.quantization == quantization
    assert shape.weight_bytes / 1e9 == pytest.approx(gb, rel=0.003)


def test_parts_may_have_widths_of_their_own() -> None:
    narrow = replace(model("mixtral-8x7b"), expert_bytes_per_param=0.5, head_bytes_per_param=1)
    experts = 32 * 8 * 3 * 4096 * 14336
    saved = round(1.5 * experts) + 4096 * 32000
    assert model("mixtral-8x7b").weight_bytes - narrow.weight_bytes == saved


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"experts": 8}, "experts_per_token is required where there are experts"),
        ({"experts": 8, "experts_per_token": 9, "expert_ffn": 64}, "experts_per_token must be at most experts, 8"),
        ({"shared_ffn": 64}, "shared_ffn must not be given without experts"),
        ({"quantized": "experts"}, "quantized must be layers where there are no experts"),
        ({"window": 128}, "window_layers and window must be given together"),
        ({"window": 128, "window_layers": 33}, "window_layers must be at most layers, 32"),
        ({"latent": 512}, "rope_size and latent must be given together"),
        ({"quantization": "fp7"}, "quantization must be one of 'none', 'fp8'"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(model("llama-3.1-8b"), **numbers)  # type: ignore[arg-type]


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


# FP32 peak outside tensor cores, TFLOP/s, as reviews quote NVIDIA, and how many times faster BF16 is with FP32 sums:
# 4 times on the professional lines of these chips, and by NVIDIA's choice 2 times on GeForce cards.
FP32 = {"a6000": (38.7, 4), "rtx-4090": (82.58, 2), "rtx-5090": (104.8, 2), "rtx-pro-6000": (125, 4), "l40s": (91.6, 4)}


@pytest.mark.parametrize("name", sorted(FP32))
def test_a_bf16_peak_is_a_multiple_of_the_fp32_peak(name: str) -> None:
    fp32, times = FP32[name]

    assert gpu(name).bf16_tflops == pytest.approx(times * fp32, rel=0.013)  # the L40S' runs at 2.49 GHz, not 2.52


# Cores (SMs, CUs), GHz at which the peak is told, dense BF16 FLOPs a core and cycle; bits of the memory bus, Gb/s a pin
CLOCKS = {
    "a100-40gb": (108, 1.410, 2048, 5120, 2.430),
    "a100-80gb": (108, 1.410, 2048, 5120, 3.186),
    "h100": (132, 1.830, 4096, 5120, 5.239),
    "h200": (132, 1.830, 4096, 6144, 6.250),
    "l4": (58, 2.040, 1024, 192, 12.5),
    "a10g": (80, 1.710, 512, 384, 12.5),
    "mi300x": (304, 2.100, 2048, 8192, 5.2),
}


@pytest.mark.parametrize("name", sorted(CLOCKS))
def test_peaks_and_bandwidths_are_those_of_cores_and_clocks(name: str) -> None:
    cores, ghz, flops, bits, rate = CLOCKS[name]

    assert gpu(name).bf16_tflops == pytest.approx(cores * ghz * flops / 1e3, rel=0.002)
    assert gpu(name).hbm_gb_per_s == pytest.approx(bits * rate / 8, rel=0.006)


@pytest.mark.parametrize(("lanes", "gigatransfers", "generation"), [(16, 16, 31.5), (16, 32, 63)])
def test_a_host_link_is_pcie_after_its_encoding(lanes: int, gigatransfers: int, generation: float) -> None:
    assert generation == pytest.approx(lanes * gigatransfers / 8 * 128 / 130, rel=0.001)
    assert {g.host_gb_per_s for g in GPUS.values()} == {31.5, 63, 450}  # or NVLink-C2C, of a GB200


@pytest.mark.parametrize("name", list(GPUS))
def test_half_the_bits_are_twice_the_peak(name: str) -> None:
    """So it is in every data sheet, but for two peaks that round: 733 of 362.05, and 242 of 121."""
    known = gpu(name)
    before = known.bf16_tflops
    for peak in (known.fp8_tflops, known.fp4_tflops):
        if peak is not None:
            assert peak == pytest.approx(2 * before, rel=0.013) or (name, peak) == ("rtx-5090", 1676)
            before = peak
    # the 5090's FP8 peak is with FP32 sums, its FP4 peak twice that with FP16 sums
    assert known.fp4_tflops is None or known.fp8_tflops is not None


def test_a_gpu_of_a_rack_is_a_part_of_the_rack() -> None:
    """GB200 NVL72's data sheet: 360 PFLOP/s of sparse BF16, 720 of FP8, 1440 of FP4, 576 TB/s, NVLink 130 TB/s."""
    one = gpu("gb200")

    assert 72 * 2 * one.bf16_tflops == 360_000
    assert one.fp8_tflops is not None
    assert one.fp4_tflops is not None
    assert (72 * 2 * one.fp8_tflops, 72 * 2 * one.fp4_tflops) == (720_000, 1_440_000)
    assert 72 * one.hbm_gb_per_s == 576_000
    assert 72 * one.nvlink_gb_per_s == pytest.approx(130_000, rel=0.005)


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
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b-2507"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
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
    assert replace(hf_config.model(config, name), source=MODELS[name].source) == MODELS[name]


def test_a_config_without_optional_keys_takes_their_defaults() -> None:
    config = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "torch_dtype")}
    shape = hf_config.model(config | {"dtype": "float32"}, "x")
    assert (shape.kv_heads, shape.head_size, shape.bytes_per_param) == (32, 128, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None, "vocab_size": None}, "x: missing hidden_size, vocab_size"),
        ({"model_type": "mamba2"}, "x: model_type 'mamba2' is not modelled – modelled: deepseek_v3, "),
        ({"num_local_experts": 8}, "x: model_type llama has no experts"),
        ({"kv_lora_rank": 512}, "x: model_type llama has no latent attention"),
        ({"mlp_bias": True}, "x: MLP biases are not modelled"),
        ({"num_memory_layers": 3}, "x: not understood: num_memory_layers"),
        ({"quantization_config": {"bits": 4}}, "x: quantization_config.quant_method '' is not modelled"),
        ({"quantization_config": {"quant_method": "awq", "bits": 3}}, "x: .* weights of 3 bits are not modelled"),
        ({"rope_scaling": {"rope_type": "other", "factor": 2}}, "x: rope_scaling 'other' is not modelled"),
        ({"hidden_size": "4096"}, "x: hidden_size must be a whole number"),
        ({"num_hidden_layers": 0}, "x: layers must be at least 1"),
        ({"num_attention_heads": 0}, "x: num_attention_heads must be at least 1"),
        ({"num_key_value_heads": 5}, "x: kv_heads must divide heads"),
        ({"torch_dtype": "int3"}, "x: torch_dtype 'int3' is not modelled"),
    ],
)
def test_a_config_that_is_not_modelled_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_config.model(LLAMA | change, "x")
