"""The roofline against arithmetic done by hand, and its promise that a run of steps is an arithmetic series."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chairlift.backend.base import FOREVER, Batch, Chunk, StepCost
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency, Roofline
from chairlift.backend.shapes import GPU, Model
from chairlift.backend.specs import gpu, model

PS = 10**12
IDEAL = Efficiency(mfu=1, bandwidth=1, link=1, host="none")


def decode(decodes: int, context: int, padded: int = 0) -> Batch:
    return Batch((), decodes, context, padded)


def prompt(*chunks: tuple[int, int]) -> Batch:
    return Batch(tuple(Chunk(*chunk) for chunk in chunks), 0, 0)


def ideal(name: str, on: str, tensor_parallel: int = 1) -> Roofline:
    return Roofline(model(name), gpu(on), Parallel(tensor=tensor_parallel), IDEAL)


# hand formulas: OPT-13B is 40 layers of hidden size 5120 with a feed-forward of 20480, fp16

OPT_MATMUL = 40 * (4 * 5120**2 + 2 * 5120 * 20480)  # 12.58e9: q, k, v, o and two matrices of the MLP
OPT_HEAD = 5120 * 50272
OPT_BIASES = 40 * (4 * 5120 + 20480 + 5120 + 4 * 5120) + 2 * 5120  # linear layers, two norms a layer, the last norm
OPT_BYTES = 2 * (OPT_MATMUL + OPT_HEAD + 2050 * 5120 + OPT_BIASES)


def test_decode_floor_of_opt_13b_on_an_a100_is_its_weights_over_the_bandwidth() -> None:
    # 25.7 GB at 1555 GB/s: 16.5 ms; the one token of context adds half a microsecond
    cost = ideal("opt-13b", "a100-40gb").step(decode(1, 1))

    assert pytest.approx(25.71e9, rel=1e-3) == OPT_BYTES
    assert cost.first / PS == pytest.approx(16.53e-3, rel=1e-3)
    assert cost.first == round(OPT_BYTES / 1555e9 * PS) + round(819_200 / 1555e9 * PS)


def test_a_token_of_opt_13b_costs_its_819_200_bytes_in_every_later_decode_step() -> None:
    # K and V, 40 layers, 5120 wide, 2 bytes: 2 * 40 * 5120 * 2 = 819,200 B = 527 ns at 1555 GB/s
    cost = ideal("opt-13b", "a100-40gb").step(decode(1, 500))

    assert cost.slope == round(2 * 40 * 5120 * 2 / 1555e9 * PS) == 526_817
    assert cost.steps == FOREVER  # more context only makes memory the tighter bound


def test_every_slot_of_a_batch_dead_ones_too_adds_a_token_of_context_a_step() -> None:
    backend = ideal("opt-13b", "a100-40gb")

    assert backend.step(decode(3, 900, padded=5)).slope == 8 * backend.step(decode(1, 900)).slope
    assert backend.step(decode(3, 900, padded=5)) == backend.step(decode(8, 900))


def test_half_the_bandwidth_takes_twice_the_time() -> None:
    half = Roofline(model("opt-13b"), gpu("a100-40gb"), ONE, Efficiency(mfu=1, bandwidth=0.5))
    whole = ideal("opt-13b", "a100-40gb")

    assert half.step(decode(4, 4000)).first == pytest.approx(2 * whole.step(decode(4, 4000)).first, rel=1e-6)


def test_prefill_of_512_tokens_takes_the_flops_at_the_stated_share_of_the_peak() -> None:
    # 2 FLOP a weight and token, 4 a layer, head dimension and query-key pair, and the head for the one token sampled:
    # 12.88 + 0.11 + 0.0005 TFLOP at 0.55 * 312 TFLOP/s = 75.7 ms (77 ms where embeddings count as weights)
    backend = Roofline(model("opt-13b"), gpu("a100-40gb"), ONE, Efficiency(mfu=0.55))
    pairs = 512 * 513 // 2
    flops = 2 * OPT_MATMUL * 512 + 4 * 40 * 5120 * pairs + 2 * OPT_HEAD

    cost = backend.step(prompt((0, 512)))

    assert cost.first / PS == pytest.approx(flops / (0.55 * 312e12), rel=1e-6)
    assert cost.first / PS == pytest.approx(77e-3, rel=0.02)
    assert cost.steps == 1


def test_a_short_prompt_is_bound_by_reading_the_weights() -> None:
    backend = ideal("opt-13b", "a100-40gb")

    assert backend.step(prompt((0, 1))).first == round(OPT_BYTES / 1555e9 * PS)


def test_chunks_of_a_prompt_cost_the_pairs_they_look_back_on() -> None:
    # in one go or in two chunks: the same pairs, n (n + 1) / 2, but each chunk samples (or would) once
    backend = ideal("opt-13b", "a100-40gb")
    whole = backend.step(prompt((0, 1000))).first
    first, second = backend.step(prompt((0, 600))).first, backend.step(prompt((600, 400))).first
    head = round(2 * OPT_HEAD / 312e12 * PS)

    assert first + second == whole + head


def test_two_prompts_in_a_step_cost_their_work_and_padding_costs_a_token_less_its_pairs() -> None:
    backend = ideal("opt-13b", "a100-40gb")
    token = round(2 * OPT_MATMUL / 312e12 * PS)
    one = backend.step(prompt((0, 600))).first

    assert backend.step(prompt((0, 600), (0, 600))).first == 2 * one
    assert backend.step(Batch((Chunk(0, 600),), 0, 0, padded=50)).first == one + 50 * token


# prompts and decodes together


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("chunk", [20, 200, 2000])
def test_a_mixed_step_is_the_longer_part_and_what_of_the_shorter_does_not_overlap(share: float, chunk: int) -> None:
    backend = Roofline(model("opt-13b"), gpu("a100-40gb"), ONE, Efficiency(mixed_overlap=share))
    prompts = backend.step(prompt((0, chunk))).first
    decodes = backend.step(decode(30, 30_000)).first

    mixed = backend.step(Batch((Chunk(0, chunk),), 30, 30_000)).first

    left = min(prompts, decodes) * (1 - share)
    assert mixed == max(prompts, decodes) + int(left)


def test_a_floor_holds_for_every_kind_of_step_and_overhead_comes_on_top() -> None:
    backend = Roofline(model("opt-13b"), gpu("a100-40gb"), ONE, Efficiency(floor_ms=500, overhead_ms=10))

    for batch in (decode(4, 4000), prompt((0, 512)), Batch((Chunk(0, 512),), 4, 4000)):
        cost = backend.step(batch)
        assert cost.first == PS // 2
        assert cost.spacing(ahead=False) == (PS // 2 + PS // 100, 0)
        assert cost.spacing(ahead=True) == (PS // 2, 0)


# tensor parallelism


def test_two_gpus_halve_the_bytes_and_add_two_all_reduces_a_layer() -> None:
    # A ring of two moves 2 * (2 - 1) / 2 = one hidden vector of 5120 * 2 B a token, at 300 GB/s one way;
    # 80 all-reduces a step: 80 * 8 us fixed, 80 * 10,240 B / 300 GB/s = 2.73 us a token
    one = ideal("opt-13b", "a100-40gb").step(decode(4, 4000))
    two = ideal("opt-13b", "a100-40gb", 2).step(decode(4, 4000))

    fixed = round(80 * 8e-6 * PS)
    token = round(80 * 5120 * 2 / 300e9 * PS)
    # rounded apart: the weights within 1 ps, and each of the 4000 tokens of context
    assert two.first == pytest.approx(one.first / 2 + fixed + 4 * token, abs=4001)
    assert two.slope == pytest.approx(one.slope / 2, abs=4)


def test_two_gpus_halve_the_prompt_work_and_reduce_every_token_of_it() -> None:
    one = ideal("opt-13b", "a100-40gb").step(prompt((0, 1000))).first
    two = ideal("opt-13b", "a100-40gb", 2).step(prompt((0, 1000))).first

    assert two / PS == pytest.approx(one / PS / 2 + 80 * 8e-6 + 1000 * 80 * 5120 * 2 / 300e9, rel=1e-6)


def test_all_reduces_go_over_pcie_where_there_are_no_links() -> None:
    # L4: 31.5 GB/s one way; 64 all-reduces of 4096 * 2 B for the one token, and no latency asked for
    backend = Roofline(
        model("llama-3.1-8b"), gpu("l4"), Parallel(tensor=2), Efficiency(mfu=1, bandwidth=1, link=1, allreduce_us=0)
    )
    alone = ideal("llama-3.1-8b", "l4")

    per_token = (backend.step(decode(1, 100)).first - alone.step(decode(1, 100)).first / 2) / PS
    assert per_token == pytest.approx(64 * 4096 * 2 / 31.5e9, rel=1e-3)


@pytest.mark.parametrize("width", [2, 1, 0.5])
def test_all_reduces_carry_activations_whatever_the_width_of_the_weights(width: float) -> None:
    # Llama-3.1-70B on 4 × H100: a ring moves 2 * 3/4 * 8192 numbers of 2 B = 24,576 B for a token, in 54.6133 ns at
    # 450 GB/s one way; 160 all-reduces take 8,738,133 ps. Weights of one byte (FP8) or of half a byte change nothing.
    backend = Roofline(replace(model("llama-3.1-70b"), bytes_per_param=width), gpu("h100"), Parallel(tensor=4), IDEAL)

    one, two = (backend.step(decode(slots, 1000)).first for slots in (1, 2))

    assert two - one == 8_738_133


def test_all_reduces_are_wider_where_activations_are() -> None:
    wide = replace(model("llama-3.1-70b"), bytes_per_activation=4)
    backend = Roofline(wide, gpu("h100"), Parallel(tensor=4), IDEAL)

    assert backend.step(decode(2, 1000)).first - backend.step(decode(1, 1000)).first == 2 * 8_738_133 + 1


# grouped-query attention


def test_grouped_queries_read_the_bytes_of_the_kv_heads_only() -> None:
    # Llama-3.1-8B: 2 * 32 layers * 8 KV heads * 128 * 2 B = 131,072 B a token, a quarter of its 32 query heads'
    cost = ideal("llama-3.1-8b", "h100").step(decode(1, 1000))

    assert cost.slope == round(2 * 32 * 8 * 128 * 2 / 3350e9 * PS) == round(131_072 / 3350e9 * PS)


def test_more_gpus_than_kv_heads_each_read_a_whole_head() -> None:
    # Qwen2.5-3B: 16 query heads on 2 KV heads, 36 layers of head size 128. On 2, 4 and 8 GPUs a token is one head:
    # 2 * 36 * 128 * 2 B = 18,432 B on each.
    slopes = {tp: ideal("qwen2.5-3b", "h100", tp).step(decode(1, 1000)).slope for tp in (1, 2, 4, 8)}

    assert slopes[1] == round(36_864 / 3350e9 * PS)
    assert slopes[2] == slopes[4] == slopes[8] == round(18_432 / 3350e9 * PS)


def test_a_gpu_count_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must divide the 40 heads of opt-13b \(got 3\)"):
        ideal("opt-13b", "a100-40gb", 3)


# an arithmetic series, exactly

MOST = 300  # steps walked one by one


def small(tflops: float, gb_per_s: float, heads: int, kv_heads: int, floor_us: float, overhead_us: float) -> Roofline:
    """A model so small, on a GPU so odd, that all three bounds cross within some hundred tokens of context."""
    shape = Model("small", 2, 64, heads, kv_heads, 8, 256, 512, 4096)
    odd = GPU("odd", tflops, gb_per_s, 1, 0, 31.5, 100, 1, "", "", "")
    return Roofline(shape, odd, ONE, Efficiency(host="none", floor_ms=floor_us / 1000, overhead_ms=overhead_us / 1000))


backends = st.builds(
    small,
    tflops=st.floats(0.001, 10),
    gb_per_s=st.floats(0.1, 100),
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 8]),
    floor_us=st.sampled_from([0.0, 1.0, 10.0, 100.0, 1000.0]),
    overhead_us=st.sampled_from([0.0, 3.0]),
)


def later(batch: Batch, steps: int) -> Batch:
    """The batch after ``steps`` steps of the same members."""
    return batch._replace(context=batch.context + steps * (batch.decodes + batch.padded))


def vouched(cost: StepCost, step: int) -> int:
    return cost.first + cost.slope * step


@given(backends, st.integers(0, 64), st.integers(0, 8), st.integers(1, 200))
def test_vouched_steps_cost_what_each_costs_on_its_own(backend: Roofline, decodes: int, padded: int, each: int) -> None:
    # static batches may hold dead slots alone, but never none
    assume(decodes + padded > 0)
    batch = decode(decodes, (decodes + padded) * each, padded)
    cost = backend.step(batch)
    assert cost.steps >= 1
    assert cost.slope >= 0

    walked = {*range(min(cost.steps, MOST)), min(cost.steps, 1 << 30) - 1}
    for i in walked:
        alone = backend.step(later(batch, i))
        assert (alone.first, alone.host) == (vouched(cost, i), cost.host)


@given(backends, st.integers(1, 64), st.integers(0, 8), st.integers(1, 200))
def test_a_backend_vouches_up_to_the_very_step_where_another_bound_takes_over(
    backend: Roofline, decodes: int, padded: int, each: int
) -> None:
    # At the crossing itself the two bounds may be equal; from the first step beyond it the price is above the series.
    batch = decode(decodes, (decodes + padded) * each, padded)
    cost = backend.step(batch)
    assume(cost.steps < FOREVER)

    assert backend.step(later(batch, cost.steps - 1)).first == vouched(cost, cost.steps - 1)
    assert backend.step(later(batch, cost.steps)).first > vouched(cost, cost.steps)


def test_floor_then_compute_then_memory_are_three_runs_that_meet_where_the_arithmetic_says() -> None:
    # 4 slots at 1.1 GFLOP/s (0.55 * 2) and 0.8 GB/s (0.80 * 1), no step below 1300 us. For a context of c tokens:
    #   compute  4 * 2 * (131,072 + 32,768) FLOP + 4 * 2 * 8 * 8 c FLOP  = 1191.56 us + 0.46545 us * c
    #   memory   2 * 196,928 B + 2 * 2 * 8 * 8 * 2 c B                   =  492.32 us + 0.64000 us * c
    # Compute passes the floor beyond c = 232.97, memory passes compute beyond c = 4006.08. From c = 4, four a step:
    #   c = 4 ... 232, 58 steps at the floor; c = 236 ... 4004, 943 steps of compute; then memory for good.
    backend = small(0.002, 1.0, 8, 8, 1300.0, 0.0)
    runs = []
    context = 4
    while not runs or runs[-1][0] < FOREVER:
        cost = backend.step(decode(4, context))
        runs.append((cost.steps, cost.slope))
        context += 4 * cost.steps

    compute, memory = round(512 / 1.1e9 * PS), round(512 / 0.8e9 * PS)
    assert runs == [(58, 0), (943, 4 * compute), (FOREVER, 4 * memory)]
