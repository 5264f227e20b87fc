"""The roofline by part against arithmetic done by hand, and its promise that a run of steps is an arithmetic series."""

from __future__ import annotations

import csv
import gzip
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chairlift.backend import collectives
from chairlift.backend.base import FOREVER, Batch, Chunk
from chairlift.backend.by_part import ByPart
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.parts import (
    EXPERTS,
    WITH_EXPERTS,
    WITH_MXFP4,
    experts_read,
    in_window,
    popularity,
    tiles_computed,
)
from chairlift.backend.roofline import Efficiency, Roofline
from chairlift.backend.shapes import GPU, Model
from chairlift.backend.specs import MODELS, gpu, model
from kit.places import TRUTH

PS = 10**12
MXFP4_TABLE = TRUTH / "outside" / "operators_h200" / "moe_gptoss_h200_vllm0.24.0.csv.gz"
IDEAL = Efficiency(
    mfu=1, bandwidth=1, gemm_mfu=1, kernel_us=0, attention_us=0, host="none"
)  # but for the experts, whose shares of the peaks are a table's


def decode(decodes: int, context: int, padded: int = 0) -> Batch:
    return Batch((), decodes, context, padded)


def prompt(*chunks: tuple[int, int], decodes: int = 0, context: int = 0) -> Batch:
    return Batch(tuple(Chunk(*chunk) for chunk in chunks), decodes, context)


def ideal(shape: Model, on: str = "h200", parallel: Parallel = ONE) -> ByPart:
    return ByPart(shape, gpu(on), parallel, IDEAL)


# dense, in one format or another


def test_a_dense_decode_step_is_its_weights_and_its_kv_over_the_bandwidth() -> None:
    # Llama-3.1-8B: 6,979,321,856 weights in the layers' matrices, 525,336,576 in the head; 131,072 B of KV a token
    cost = ideal(model("llama-3.1-8b")).step(decode(1, 1000))
    weights = 2 * (6_979_321_856 + 525_336_576) / 4800e9
    assert cost.first / PS == pytest.approx(weights + 1000 * 131_072 / 4800e9, rel=1e-6)
    assert cost.slope == round(131_072 / 4800e9 * PS)
    assert cost.steps == FOREVER


def test_fp8_reads_half_of_the_layers_and_all_of_the_head() -> None:
    cost = ideal(model("llama-3.1-8b-fp8")).step(decode(1, 1))
    assert cost.first / PS == pytest.approx((6_979_321_856 + 2 * 525_336_576 + 131_072) / 4800e9, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "on", "tflops"),
    [
        ("llama-3.1-8b", "h200", 989),
        ("llama-3.1-8b-fp8", "h200", 1979),
        ("llama-3.1-8b-awq", "h200", 989),  # widened before it is multiplied
        ("llama-3.1-8b-fp8", "a100-80gb", 312),  # which has no FP8 tensor cores
        ("llama-3.1-8b-nvfp4", "b200", 9000),
        ("llama-3.1-8b-nvfp4", "h200", 1979),  # no FP4: FP8
    ],
)
def test_a_long_prompt_is_multiplied_at_the_peak_of_its_format(name: str, on: str, tflops: float) -> None:
    backend = ideal(model(name), on)
    linear = 2 * 6_979_321_856 * 8192 / (tflops * 1e12)
    attention = 4 * 32 * 4096 * (8192 * 8193 // 2) / (gpu(on).bf16_tflops * 1e12)
    head = model(name).head_parameters * 2 / (gpu(on).hbm_gb_per_s * 1e9)  # read for the one token sampled
    assert backend.step(prompt((0, 8192))).first / PS == pytest.approx(linear + attention + head, rel=1e-6)


def test_each_part_takes_the_longer_of_reading_and_multiplying() -> None:
    # 400 tokens: products take longer than reading the weights, attention of decodes reads
    backend = ideal(model("llama-3.1-8b"))
    parts = {part.name: part for part in backend.explain(decode(400, 400_000))}
    assert parts["MLP"].compute_s > parts["MLP"].memory_s
    assert parts["KV"].memory_s > parts["KV"].compute_s
    longer = sum(max(part.memory_s, part.compute_s) for part in parts.values())
    assert backend.step(decode(400, 400_000)).first / PS == pytest.approx(longer, rel=1e-6)


def test_kernels_and_launches_come_on_top_of_the_work() -> None:
    # Llama-3.1-8B: 32 layers of 10 kernels, 0.25 us a sequence and layer; FP8 quantises activations, 4 kernels more
    for name, kernels in (("llama-3.1-8b", 10), ("llama-3.1-8b-fp8", 14)):
        real = ByPart(model(name), gpu("h200"), ONE, replace(IDEAL, kernel_us=3, attention_us=0.25))
        more = real.step(decode(8, 800)).first - ideal(model(name)).step(decode(8, 800)).first
        assert more / PS == pytest.approx(32 * kernels * 3e-6 + 8 * 32 * 0.25e-6, rel=1e-6)
    real = ByPart(model("llama-3.1-8b"), gpu("h200"), ONE, Efficiency())
    assert real.step(prompt((0, 16))).first == round((2e-3 + 32 * 309e-6) * PS)  # launched in pieces of a graph
    assert real.step(prompt((0, 513))).first == round((2e-3 + 32 * 813e-6) * PS)  # kernel by kernel


# experts


def test_experts_read_are_those_that_random_choices_touch() -> None:
    # 8 of 128 experts a token, 8 tokens: 128 (1 - (1 - 1/16)^8) = 51.6, two fifths of them
    assert experts_read(128, 8, 8) == pytest.approx(51.61, abs=0.01)
    assert experts_read(128, 8, 1) == pytest.approx(8)
    assert experts_read(128, 8, 10_000) == pytest.approx(128)
    assert experts_read(8, 8, 3) == 8
    random = np.random.default_rng(1)
    drawn = [len({e for _ in range(8) for e in random.choice(128, 8, replace=False)}) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(experts_read(128, 8, 8), rel=0.01)


def test_popular_experts_are_touched_more_often_and_the_others_less() -> None:
    chances = popularity(128, 8, 1.1)
    assert sum(chances) == pytest.approx(8)
    assert max(chances) <= 1
    assert chances == sorted(chances, reverse=True)
    assert experts_read(128, 8, 64, 1.1) < experts_read(128, 8, 64)
    assert experts_read(128, 8, 64, 1e-9) == pytest.approx(experts_read(128, 8, 64))


def experts_of(backend: ByPart, batch: Batch) -> Any:
    return next(part for part in backend.explain(batch) if part.name == "experts")


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_a_step_reads_the_experts_that_its_tokens_touch(tokens: int) -> None:
    # Qwen3-30B-A3B: 48 layers, experts of 3 * 2048 * 768 weights of 2 bytes
    part = experts_of(ideal(model("qwen3-30b-a3b")), decode(tokens, tokens * 100))
    touched = 128 * (1 - (1 - 8 / 128) ** tokens)
    assert part.bytes == pytest.approx(48 * touched * 3 * 2048 * 768 * 2, rel=1e-9)
    assert part.flops == pytest.approx(2 * tokens * 8 * 48 * 3 * 2048 * 768, rel=1e-9)
    assert part.memory_s == pytest.approx(part.bytes / (EXPERTS["none"].bandwidth * 4800e9))


@pytest.mark.parametrize("tokens", [1, 16])
def test_padded_rows_make_a_step_read_all_experts_and_their_activations(tokens: int) -> None:
    # Qwen3-235B in FP8 on two GPUs: 94 layers, 128 experts of 3 * 4096 * 768 weights on each, of one byte and four for
    # each block of 128 * 128. 128 rows of each expert and 8 of each token: 4096 B in, 2 * 1536 B out and in, 768 B
    # out and in, 2 * 4096 B out
    shape, parallel = model("qwen3-235b-a22b-fp8"), Parallel(tensor=2)
    padded = ByPart(shape, gpu("h200"), parallel, replace(IDEAL, expert_rows=128))
    part, plain = (experts_of(each, decode(tokens, tokens * 100)) for each in (padded, ideal(shape, "h200", parallel)))
    rows, weights = 128 * 128 + 8 * tokens, 128 * 3 * 4096 * 768 * (1 + 4 / 128**2)
    assert part.bytes == pytest.approx(94 * (weights + rows * (4096 + 4 * 1536 + 2 * 768 + 2 * 4096)))
    assert part.flops == plain.flops
    assert part.bytes > plain.bytes


def test_the_tokens_of_a_prompt_touch_experts_beside_those_of_decodes() -> None:
    backend = ideal(model("qwen3-30b-a3b"))
    mixed, alone = prompt((0, 24), decodes=40, context=4000), decode(64, 6400)
    assert experts_of(backend, mixed).bytes == experts_of(backend, alone).bytes


def test_groups_of_experts_wait_for_the_hottest() -> None:
    # 2 groups of 64 experts, 8 tokens: 25.8 touched on average, the larger of two about a standard deviation more
    part = experts_of(ideal(model("qwen3-30b-a3b"), parallel=Parallel(tensor=2, expert=2)), decode(8, 800))
    one = 48 * 3 * 2048 * 768 * 2
    assert 25.8 * one < part.bytes < 32 * one
    random = np.random.default_rng(2)
    drawn = []
    for _ in range(3000):
        touched = {e for _ in range(8) for e in random.choice(128, 8, replace=False)}
        drawn.append(max(sum(e < 64 for e in touched), sum(e >= 64 for e in touched)))
    assert part.bytes / one == pytest.approx(np.mean(drawn), rel=0.06)
    # a great many tokens touch all experts of both
    part = experts_of(ideal(model("qwen3-30b-a3b"), parallel=Parallel(tensor=2, expert=2)), decode(2000, 2000))
    assert part.bytes == pytest.approx(64 * one, rel=1e-3)


def test_shared_experts_and_dense_layers_see_every_token() -> None:
    # DeepSeek-V3: 3 dense layers of 18,432, a shared expert of 2048 in the other 58
    parts = {part.name: part for part in ideal(model("deepseek-v3")).explain(decode(4, 400))}
    assert parts["MLP"].flops == 2 * 4 * 3 * 3 * 7168 * 18432
    assert parts["shared experts"].flops == 2 * 4 * 58 * 3 * 7168 * 2048


def test_mxfp4_reads_what_its_padding_and_scales_take() -> None:
    part = experts_of(ideal(model("gpt-oss-120b")), decode(1, 100))
    assert part.bytes == pytest.approx(36 * 4 * 3 * 2880 * 3072 * (0.5 + 1 / 32), rel=1e-9)


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize(("tokens", "rows"), [(64, 16), (256, 16), (512, 16), (1024, 32)])
def test_tiles_hold_the_rows_that_random_choices_send(tokens: int, rows: int, skew: float) -> None:
    """4 of 128 experts a token, as independent choices with these chances send them."""
    chances = np.array(popularity(128, 4, skew) if skew else [4 / 128] * 128)
    counts = np.random.default_rng(3).binomial(tokens, chances, size=(2000, 128))
    assert tiles_computed(128, 4, tokens, skew, rows) == pytest.approx(np.ceil(counts / rows).sum(1).mean(), rel=0.02)


def test_a_tile_more_reads_its_expert_again() -> None:
    """MXFP4: 16 tokens need no second tile of any expert, 512 need one for half of the 128, of 16 rows on average."""
    backend = ideal(model("gpt-oss-120b"))
    few, many = (experts_of(backend, decode(tokens, tokens * 100)) for tokens in (16, 512))
    assert few.seconds == pytest.approx(few.memory_s)
    assert many.bytes == pytest.approx(36 * 128 * 3 * 2880 * 3072 * (0.5 + 1 / 32), rel=1e-6)
    assert many.seconds == pytest.approx(many.memory_s * tiles_computed(128, 4, 512, 0, 16) / 128)
    assert 1.4 < many.seconds / many.memory_s < 1.5


@pytest.mark.skipif(not MXFP4_TABLE.is_file(), reason="needs the operator tables in ../shared/truth")
@pytest.mark.parametrize("routing", ["power_law_1.01", "power_law_1.2"])
def test_mxfp4_experts_take_as_long_as_measured_where_routing_is_skewed(routing: str) -> None:
    """NVIDIA AIConfigurator's table of one layer on an H200 (Apache-2.0, vLLM 0.24), from 32 to 4,096 tokens.

    A popularity that falls as the power 0.85 of the rank is as uneven as the table's power laws.
    """
    backend = ByPart(model("gpt-oss-120b"), gpu("h200"), Parallel(), Efficiency(skew=0.85))
    kernels = (WITH_EXPERTS + WITH_MXFP4 + 2) * 3e-6  # those of a layer's experts, which take 3 us each
    errors = []
    with gzip.open(MXFP4_TABLE, "rt") as file:
        for row in csv.DictReader(file):
            shape = row["num_experts"], row["moe_tp_size"], row["moe_ep_size"], row["distribution"]
            tokens = int(row["num_tokens"])
            if shape == ("128", "1", "1", routing) and 32 <= tokens <= 4096:
                told = experts_of(backend, decode(tokens, tokens)).seconds / 36 + kernels
                errors.append(told / (float(row["latency"]) * 1e-3) - 1)
    assert len(errors) > 10
    assert np.median(np.abs(errors)) < 0.07
    assert np.abs(errors).max() < 0.18


# attention that does not read everything by head


def test_a_window_stops_growing_when_it_is_full() -> None:
    # gpt-oss-120b: 18 layers read all, 18 the last 128 tokens: 2 * 8 * 64 * 2 B = 2048 B a token and layer
    backend = ideal(model("gpt-oss-120b"))
    each = 18 * 2048 / 4800e9 * PS
    cost = backend.step(decode(4, 4 * 100))
    assert cost.slope == 2 * 4 * round(each)
    assert cost.steps == 29  # contexts of 100 to 128
    full = backend.step(decode(4, 4 * 129))
    assert (full.slope, full.steps) == (4 * round(each), FOREVER)
    assert full.first == cost.first + 28 * cost.slope + full.slope


def test_pairs_in_a_window_are_those_counted_one_by_one() -> None:
    for start in (0, 3, 9, 20):
        for length in (1, 5, 17):
            counted = sum(min(position + 1, 10) for position in range(start, start + length))
            assert in_window(start, length, 10) == counted


def test_latent_attention_reads_one_vector_and_multiplies_in_its_space() -> None:
    # DeepSeek-V3: 61 layers, 128 heads; a decode multiplies 576 numbers a key and 512 a value, reads 576 of 2 bytes
    backend = ideal(model("deepseek-v3"))
    flops, read = 2 * 61 * 128 * (576 + 512), 61 * 576 * 2
    assert backend.step(decode(1, 1000)).slope == round(max(flops / 989e12, read / 4800e9) * PS)
    # a prompt unpacks keys of 192 and values of 128
    part = next(p for p in backend.explain(prompt((0, 100))) if p.name == "attention of prompts")
    assert part.flops == 2 * 61 * 128 * (192 + 128) * (100 * 101 // 2)


# several GPUs


def test_collectives_are_those_of_the_table() -> None:
    assert collectives.all_reduce_us(gpu("h200"), 8, 1_048_576, True) == pytest.approx(18.1)
    assert collectives.all_reduce_us(gpu("h200"), 2, (65536 + 262144) / 2, True) == pytest.approx((4.8 + 6.3) / 2)
    assert collectives.all_reduce_us(gpu("h200"), 1, 10**6, True) == 0
    # half of the bandwidth: twice of what a message takes beyond the smallest
    slow = replace(gpu("h200"), name="slow", nvlink_gb_per_s=450)
    assert collectives.all_reduce_us(slow, 8, 1_048_576, True) == pytest.approx(4.8 + 2 * (18.1 - 4.8))
    with pytest.raises(ValueError, match="tensor must be at most 8"):
        collectives.all_reduce_us(gpu("h200"), 16, 1, True)
    # 64 tokens of 7168 to 8 experts; half as wide: half of what is beyond the smallest
    assert collectives.all_to_all_us(gpu("h200"), 8, 64, 7168, 8, True) == pytest.approx(61.8)
    assert collectives.all_to_all_us(gpu("h200"), 8, 64, 3584, 8, True) == pytest.approx(24.5 + (61.8 - 24.5) / 2)
    # beyond one host the network is slower than the links: 1024 tokens * 8 * 7168 * 3 B, half of them, at 50 GB/s
    far = collectives.all_to_all_us(gpu("h200"), 16, 1024, 7168, 8, False)
    assert far == pytest.approx(20 + 1024 * 8 * 7168 * 3 / 2 / 50e3)


def test_two_gpus_halve_the_work_and_reduce_twice_a_layer() -> None:
    shape = model("llama-3.1-70b-fp8")
    one, two = ideal(shape), ideal(shape, parallel=Parallel(tensor=2))
    reduce = collectives.all_reduce_us(gpu("h200"), 2, 4 * 8192 * 2, True) * 1e-6
    halved = one.step(decode(4, 4000)).first / PS / 2
    assert two.step(decode(4, 4000)).first / PS == pytest.approx(halved + 160 * reduce, rel=1e-6)


def test_ranks_of_dp_attention_end_with_the_one_that_has_most() -> None:
    backend = ideal(model("deepseek-v3"), parallel=Parallel(data=8, expert=8))
    kv = {n: next(p for p in backend.explain(decode(n, n * 1000)) if p.name == "KV") for n in (1, 8, 9)}
    assert kv[1].bytes == kv[8].bytes == 1000 * 61 * 576 * 2  # a ninth request makes two on one rank
    assert kv[9].bytes == 2 * kv[8].bytes
    # chunks are dealt out, each to one rank: the longest sets the pace
    one = backend.step(prompt((0, 4096))).first
    assert backend.step(prompt((0, 4096), (0, 1024), (0, 512))).first < 1.25 * one
    assert one < backend.step(prompt((0, 4096), *[(0, 1024)] * 7)).first
    dealt = next(p for p in backend.explain(prompt(*[(0, 1000)] * 9)) if p.name == "attention of prompts")
    alone = next(p for p in backend.explain(prompt((0, 1000), (0, 1000))) if p.name == "attention of prompts")
    assert dealt.flops == 2 * alone.flops


def test_a_step_of_ranks_ends_with_the_slowest_and_its_experts_see_all_tokens() -> None:
    # DeepSeek-V3 on 8 ranks, of which rank 2 has 4 decodes on 9000 tokens of KV and rank 5 one on 5000; the others run
    # a token for nothing, so that experts see 4 + 1 + 6 tokens. Rank 2 is the slowest: 9000 * 61 * 576 * 2 B of KV
    backend = ideal(model("deepseek-v3"), parallel=Parallel(data=8, expert=8))
    batches = [decode(0, 0)] * 8
    batches[2], batches[5] = decode(4, 9000), decode(1, 5000)
    cost = backend.together(batches)

    def seconds(tokens: int, context: int, *names: str) -> float:
        parts = backend.explain(decode(tokens, context))
        return sum(part.seconds for part in parts if part.name in names)

    own = ("attention", "MLP", "shared experts", "router", "head", "kernels", "collectives")
    known = {part.name for part in backend.explain(decode(32, 72_000))}
    assert known <= {*own, "experts", "KV"}
    alone = seconds(32, 72_000, *own)  # spread evenly: 4 decodes on 9000 tokens on each rank
    experts = experts_of(backend, decode(11, 11)).seconds
    kv = 9000 * 61 * 576 * 2 / 4800e9
    flops = 2 * 61 * 128 * (2 * 512 + 64) * 9000 / (989e12)
    assert cost.first / PS == pytest.approx(alone + experts + max(kv, flops), rel=1e-5)
    assert cost.slope == 4 * backend.together([decode(1, 1), *batches[:1] * 7]).slope
    # a prompt on one rank is what all wait for
    batches[5] = prompt((0, 4096))
    assert backend.together(batches).first > backend.together([decode(0, 0), *batches[3:], decode(0, 0)]).first
    assert backend.together(batches).steps == 1


def test_a_pipeline_passes_all_stages_and_hands_on_in_between() -> None:
    shape = model("llama-3.1-70b-fp8")
    one, four = (ideal(shape, parallel=Parallel(pipeline=stages)) for stages in (1, 4))
    handed = 3 * (10e-6 + 2 * 8192 * 2 / 450e9)
    more = (four.step(decode(2, 2000)).first - one.step(decode(2, 2000)).first) / PS
    assert more == pytest.approx(handed, rel=1e-3)


# which form prices what


def test_a_dense_model_of_one_width_on_one_gpu_is_priced_as_a_whole_unless_asked() -> None:
    dense, card = model("llama-3.1-8b"), gpu("h100")
    assert isinstance(Efficiency().build(dense, card, ONE), Roofline)
    assert isinstance(Efficiency(by_part=True).build(dense, card, ONE), ByPart)
    assert isinstance(Efficiency().build(dense, card, Parallel(tensor=2)), ByPart)
    assert isinstance(Efficiency(by_part=False).build(dense, card, Parallel(tensor=2)), Roofline)
    for name in ("llama-3.1-8b-fp8", "qwen3-30b-a3b", "gemma-3-27b", "deepseek-v3"):
        assert isinstance(Efficiency().build(model(name), card, ONE), ByPart)
        assert isinstance(Efficiency(by_part=False).build(model(name), card, ONE), ByPart)  # it cannot be as a whole


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_priced_and_says_what_it_assumes(name: str) -> None:
    shape = model(name)
    parallel = Parallel(tensor=2, data=2, expert=4) if shape.experts else Parallel(tensor=2)
    if shape.heads % 2 or (shape.kv_heads % 2 and shape.kv_heads != 1):
        parallel = ONE
    backend = ByPart(shape, gpu("b200"), parallel, Efficiency())
    for batch in (decode(1, 1), decode(100, 100_000), prompt((0, 700)), prompt((512, 512), decodes=9, context=9000)):
        cost = backend.step(batch)
        assert 0 < cost.first < 10 * PS
        assert sum(part.seconds for part in backend.explain(batch)) == pytest.approx(cost.first / PS, rel=1e-6)
    said = backend.assumptions()
    assert ("experts" in said) == bool(shape.experts)
    assert ("windows" in said) == bool(shape.window_layers)
    assert ("weights" in said) == (shape.quantization != "none")
    assert ("DP-attention" in said) == (parallel.data > 1)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_pairs_within_chunks_are_those_counted_one_by_one(window: int) -> None:
    for start in range(10):
        for length in range(1, 20):
            pairs = sum(token % window + 1 for token in range(start, start + length))
            assert in_window(start, length, window, chunked=True) == pairs
            pairs = sum(min(token + 1, window) for token in range(start, start + length))
            assert in_window(start, length, window) == pairs


def test_a_chunk_begins_anew() -> None:
    """Llama 4 in chunks of 100: at 101 tokens its layers with chunks read one token of each sequence, not 100."""
    shape = replace(model("llama-4-scout"), window=100)
    backend = ideal(shape, parallel=Parallel(tensor=8))

    def read(context: int) -> float:
        return next(part for part in backend.explain(decode(2, 2 * context)) if part.name == "KV").bytes

    full, inside = (group.bytes_per_token for group in shape.kv_groups(8))
    assert read(100) == 2 * (100 * full + 100 * inside)
    assert read(101) == 2 * (101 * full + 1 * inside)
    assert read(350) == 2 * (350 * full + 50 * inside)


# an arithmetic series, exactly

MOST = 300  # steps walked one by one


def small(tflops: float, gb_per_s: float, kind: str, floor_us: float, data: int, tensor: int, skew: float) -> ByPart:
    """A model so small, on a GPU so odd, that windows fill and floors end within some hundred tokens of context."""
    more: dict[str, Any] = {
        "experts": {},
        "window": {"window": 24, "window_layers": 1},
        "all windows": {"window": 40, "window_layers": 2},
        "chunks": {"window": 24, "window_layers": 1, "chunked": True},
        "latent": {"latent": 16, "rope_size": 4, "value_size": 8, "latent_query": 8},
        "fp8": {"quantization": "fp8"},
    }[kind]
    shape = replace(
        Model("small", 2, 64, 8, 4, 8, 256, 512, 4096, experts=8, experts_per_token=2, expert_ffn=32), **more
    )
    odd = GPU("odd", tflops, gb_per_s, 1, 100, 31.5)
    efficiency = Efficiency(
        host="none", floor_ms=floor_us / 1000, overhead_ms=0.003, graph_tokens=32, eager_us=20, skew=skew
    )
    return ByPart(shape, odd, Parallel(tensor=tensor, data=data, expert=data), efficiency)


backends = st.builds(
    small,
    tflops=st.floats(0.001, 10),
    gb_per_s=st.floats(0.1, 100),
    kind=st.sampled_from(["experts", "window", "all windows", "chunks", "latent", "fp8"]),
    floor_us=st.sampled_from([0.0, 10.0, 100.0, 1000.0]),
    data=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2]),
    skew=st.sampled_from([0.0, 1.2]),
)


@given(backends, st.integers(0, 64), st.integers(0, 8), st.integers(1, 200), st.integers(0, 63))
def test_vouched_steps_cost_what_each_costs_on_its_own(
    backend: ByPart, decodes: int, padded: int, each: int, odd: int
) -> None:
    assume(decodes + padded > 0)
    batch = decode(decodes, (decodes + padded) * each + odd, padded)
    cost = backend.step(batch)
    assert cost.steps >= 1
    assert cost.slope >= 0
    for i in {*range(min(cost.steps, MOST)), min(cost.steps, 1 << 30) - 1}:
        later = batch._replace(context=batch.context + i * (decodes + padded))
        alone = backend.step(later)
        assert (alone.first, alone.host) == (cost.first + cost.slope * i, cost.host)


@given(backends, st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), min_size=4, max_size=4))
def test_vouched_steps_of_ranks_cost_what_each_costs_on_its_own(backend: ByPart, ranks: list[tuple[int, int]]) -> None:
    batches = [decode(decodes, decodes * each) for decodes, each in ranks[: backend.parallel.data]]
    assume(any(batch.decodes for batch in batches))
    cost = backend.together(batches)
    assert cost.steps >= 1
    for i in {*range(min(cost.steps, MOST)), min(cost.steps, 1 << 30) - 1}:
        alone = backend.together([b._replace(context=b.context + i * b.decodes) for b in batches])
        assert (alone.first, alone.host) == (cost.first + cost.slope * i, cost.host)


def test_hottest_group_is_never_beyond_what_there_is() -> None:
    for tokens in (1, 2, 1000):
        part = experts_of(ideal(model("mixtral-8x7b"), parallel=Parallel(tensor=8, expert=8)), decode(tokens, tokens))
        assert part.bytes <= 32 * 3 * 4096 * 14336 * 2 * (1 + 1e-9)
        assert math.isfinite(part.flops)
