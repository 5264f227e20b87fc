"""Memory of a GPU against what vLLM's logs say it found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chairlift.backend import memory
from chairlift.backend.memory import TOKENS, kv_blocks, reserve, weight_bytes
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import GIB, Model
from chairlift.backend.specs import gpu, model
from kit.places import TRUTH


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
    fit = kv_blocks(shape, gpu("h100"), Parallel(tensor=4))
    assert fit.weight_bytes == shape.weight_bytes // 4
    assert fit.kv_bytes_per_token == shape.kv_bytes_per_token // 4
    assert "on each of 4 GPUs" in fit.explain()


def test_kv_heads_are_replicated_when_there_are_more_gpus() -> None:
    shape = replace(model("qwen2.5-1.5b"), heads=16, kv_heads=2)
    assert shape.kv_bytes_per_token_on(8) == shape.kv_bytes_per_token // 2


@pytest.mark.parametrize("tensor_parallel", [0, 3, -1, 64])
def test_heads_that_cannot_be_shared_out_are_refused(tensor_parallel: int) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel must divide the 32 heads of llama-3\.1-8b"):
        kv_blocks(model("llama-3.1-8b"), gpu("h100"), Parallel(tensor=tensor_parallel))


def test_kv_heads_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide the 4 KV heads"):
        kv_blocks(replace(model("qwen2.5-7b"), heads=12), gpu("h100"), Parallel(tensor=6))


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


# kv_blocks of the engines recorded on H200s, utilisation 0.9, 8192 tokens and 256 requests a step, blocks of 16 tokens
HEAD = replace(model("llama-3.1-8b"), name="eagle3", layers=1, vocab=32000, tied_embeddings=True)  # about its shape
RECORDED = {
    "llama-3.1-8b of 0.23": ("llama-3.1-8b", Parallel(), None, 56_057),
    "opt-13b of 0.23": ("opt-13b", Parallel(), None, 8_240),
    "llama-3.1-8b": ("llama-3.1-8b", Parallel(), None, 56_057),
    "llama-3.1-8b-fp8": ("llama-3.1-8b-fp8", Parallel(), None, 59_349),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", Parallel(), None, 45_781),
    "qwen3-30b-a3b-tp2-ep": ("qwen3-30b-a3b", Parallel(tensor=2, expert=2), None, 130_397),
    "gpt-oss-120b": ("gpt-oss-120b", Parallel(), None, 106_049),
    "llama-3.1-70b-fp8-tp2": ("llama-3.1-70b-fp8", Parallel(tensor=2), None, 37_148),
    "llama-3.1-8b-eagle3": ("llama-3.1-8b", Parallel(), HEAD, 53_794),
}


@pytest.mark.parametrize("name", RECORDED)
def test_blocks_are_near_those_of_the_recorded_engines(name: str) -> None:
    shape, parallel, draft, blocks = RECORDED[name]
    fit = kv_blocks(model(shape), gpu("h200"), parallel, draft=draft)
    assert fit.engine_blocks == pytest.approx(blocks, rel=0.03)


def test_the_recordings_are_those_of_the_table() -> None:
    truth = TRUTH / "h200-vllm-0.26"
    if not truth.is_dir():
        pytest.skip("../shared is not here")
    for file in truth.glob("*_summary.json"):
        told = json.loads(file.read_text(encoding="utf-8"))["engine"]
        assert told["kv_blocks"] == RECORDED[file.name.removesuffix("_summary.json")][3]


# What vLLM 0.11 logged on an H100 (llm-d-planner, Apache-2.0): GiB of weights, activation and KV; GPUs, utilisation.
# gpt-oss-120b is said to have run at 0.9, where its KV would not fit: its own sum gives 0.95. Mistral-Small-3.2 is left
# out: its images were profiled too.
LOGGED = {
    "gpt-oss-20b": (13.47, 7.38, 50.28, 1, 0.90),
    "gpt-oss-120b": (64.38, 7.38, 3.33, 1, 0.95),
    "llama-3.3-70b-fp8": (33.88, 4.84, 32.00, 2, 0.90),
    "llama-3.1-8b": (14.99, 4.76, 51.38, 1, 0.90),
    "qwen3-0.6b": (1.12, 5.56, 64.45, 1, 0.90),
    "qwen3-32b": (61.03, 5.64, 4.45, 1, 0.90),
}


@pytest.mark.parametrize("name", LOGGED)
def test_the_sum_is_that_of_vllms_logs(name: str) -> None:
    weights, activation, kv, gpus, utilization = LOGGED[name]
    shape, parallel = model(name), Parallel(tensor=gpus)
    parts = reserve(shape, gpu("h100"), parallel, utilization, TOKENS, 1024)
    assert weight_bytes(shape, parallel) / GIB == pytest.approx(weights, rel=0.01)
    assert parts.get("sampler") == pytest.approx(activation, rel=0.01)
    left = gpu("h100").memory_gib * utilization - weights - sum(parts.values()) + parts["graphs"]  # 0.11 left them out
    assert left == pytest.approx(kv, abs=0.1)


def test_the_pool_falls_with_the_tokens_that_a_step_may_have() -> None:
    # The log of a 24 GB card whose engine profiled whole prompts: Llama-3.1-8B, utilisation 0.9
    card = replace(gpu("l4"), memory_gib=23.58)
    for tokens, blocks in ((20_000, 1_952), (29_000, 1_478)):
        fit = kv_blocks(model("llama-3.1-8b"), card, tokens=tokens)
        assert fit.blocks == pytest.approx(blocks, rel=0.04)
        assert "activations" in fit.explain()


def test_the_reserve_of_before_holds_where_a_step_needs_no_more() -> None:
    for name in ("llama-3.1-8b", "opt-13b", "mistral-7b"):
        for card in ("a100-80gb", "h100", "h200"):
            assert kv_blocks(model(name), gpu(card)).reserve_bytes == round(1.9 * GIB)


def small(**more: object) -> Model:
    """Four layers of 64, two KV heads of 16: 2 · 2 · 16 · 2 B = 128 B a token and layer."""
    return replace(Model("small", 4, 64, 4, 2, 16, 256, 512, 4096), **more)  # type: ignore[arg-type]


MIXTURE = {"experts": 8, "experts_per_token": 2, "expert_ffn": 128}
EXPERT = 3 * 64 * 128  # parameters
REST = 4 * (64 * (2 * 64 + 2 * 32)) + 2 * 64 * 512 + 9 * 64  # attention, embedding and head, norms
ROUTER = 4 * 64 * 8


@pytest.mark.parametrize(
    ("parallel", "parameters"),
    [
        (Parallel(), REST + ROUTER + 4 * 8 * EXPERT),
        (Parallel(tensor=2), REST / 2 + ROUTER + 4 * 8 * EXPERT / 2),  # half of each expert
        (Parallel(tensor=2, expert=2), REST / 2 + ROUTER + 4 * 4 * EXPERT),  # half of the experts
        (Parallel(data=2, expert=2), REST + ROUTER + 4 * 4 * EXPERT),  # attention whole on each
        (Parallel(tensor=2, data=2, expert=4), REST / 2 + ROUTER + 4 * 2 * EXPERT),
    ],
)
def test_experts_are_shared_out_over_all_gpus_and_attention_over_those_of_a_rank(
    parallel: Parallel, parameters: float
) -> None:
    assert weight_bytes(small(**MIXTURE), parallel) == pytest.approx(2 * parameters, abs=1)


def test_stages_of_a_pipeline_share_the_layers_and_one_has_a_table() -> None:
    one, two = (weight_bytes(small(), Parallel(pipeline=stages)) for stages in (1, 2))
    tables = 2 * 2 * 64 * 512
    assert two == pytest.approx((one - tables) / 2 + tables / 2, abs=1)
    fit = kv_blocks(small(), replace(gpu("l4"), memory_gib=4), Parallel(pipeline=2), reserve_gib=1)
    assert fit.kv_bytes_per_token == 2 * 128


def test_an_expert_is_padded_on_each_gpu() -> None:
    # 100 wide, in halves of 50: to 64 each
    shape = small(**MIXTURE | {"expert_ffn": 100}, expert_ffn_multiple=64)
    plain = small(**MIXTURE | {"expert_ffn": 128})
    assert weight_bytes(shape, Parallel(tensor=2)) == weight_bytes(plain, Parallel(tensor=2))


def test_ranks_of_dp_attention_add_their_pools_up() -> None:
    card = replace(gpu("l4"), memory_gib=4)
    alone = kv_blocks(small(**MIXTURE), card, reserve_gib=1)
    both = kv_blocks(small(**MIXTURE), card, Parallel(data=2), reserve_gib=1)
    assert both.blocks == 2 * both.engine_blocks > 2 * alone.blocks  # each has half of the experts only


@pytest.mark.parametrize(
    ("name", "size", "windows"),
    [  # as get_kv_cache_groups of vLLM 0.33.0 forms them
        ("gpt-oss-20b", 12, (128, 0)),
        ("gpt-oss-120b", 18, (128, 0)),
        ("gemma-3-4b", 5, (1024,) * 6 + (0,)),  # 29 layers with a window: 5 groups of 5, and one of 4
        ("gemma-3-12b", 8, (1024,) * 5 + (0,)),
        ("gemma-3-27b", 10, (1024,) * 6 + (0,)),
        ("llama-4-scout", 12, (8192,) * 3 + (0,)),
        ("mistral-7b-v0.1", 32, (4096,)),
        ("llama-3.1-8b", 32, (0,)),
    ],
)
def test_layers_are_grouped_as_vllm_groups_them(name: str, size: int, windows: tuple[int, ...]) -> None:
    shape = model(name)
    assert memory.windows(shape) == windows
    assert memory.grouped(shape.kv_groups())[0] == size


def test_groups_take_in_a_few_layers_more_than_their_kind_has() -> None:
    """12 layers with a window, and 13 with a drafter's: two groups of 13, not one of 12 and two."""
    assert memory.grouped(small(layers=25, window=64, window_layers=12).kv_groups()) == (13, [1, 1])
    assert memory.grouped(small(layers=30, window=64, window_layers=12).kv_groups()) == (12, [2, 1])


def test_the_sum_says_what_a_block_is() -> None:
    told = kv_blocks(model("gpt-oss-120b"), gpu("h200")).explain(by_group=True)
    assert told.endswith("blocks, each of 16 tokens of one of 2 groups of 18 layers")
    assert kv_blocks(model("mistral-7b-v0.1"), gpu("h200")).explain(by_group=True).endswith("16 tokens of all layers")


def test_windows_are_kept_for_every_running_request_and_the_rest_is_for_full_layers() -> None:
    # 3 layers of 4 with a window of 64: groups of one layer, 1 full and 3 windowed. 1 GiB over blocks of 16 · 128 B
    shape = small(window=64, window_layers=3)
    card = replace(gpu("l4"), memory_gib=4)
    fit = kv_blocks(shape, card, reserve_gib=2.6, sequences=100)
    assert fit.engine_blocks == fit.kv_bytes // (16 * 128)
    assert fit.blocks == fit.engine_blocks - 100 * 3 * (64 // 16 + 1)
    many = kv_blocks(shape, card, reserve_gib=2.6, sequences=10**6)
    assert many.blocks == many.engine_blocks // 4  # never fewer than if all layers kept everything


@pytest.mark.parametrize(
    ("shape", "parallel", "message"),
    [
        (small(), Parallel(expert=2, tensor=2), "expert must be 1: small has no experts"),
        (small(), Parallel(data=2), "data must be 1: small has no experts, so its ranks are replicas"),
        (small(), Parallel(pipeline=5), "pipeline must be at most the 4 layers of small"),
        (small(**MIXTURE), Parallel(tensor=2, expert=4), r"expert must divide tensor × data, 2 \(got 4\)"),
        (small(**MIXTURE | {"experts": 9}), Parallel(tensor=2, expert=2), "expert must divide the 9 experts"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(shape: Model, parallel: Parallel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_blocks(shape, gpu("h100"), parallel)
