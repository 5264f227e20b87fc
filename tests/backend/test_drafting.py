"""What drafts cost, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from chairlift.backend.automatic import Auto, chosen
from chairlift.backend.base import Backend, Batch, Chunk, StepCost
from chairlift.backend.by_part import ByPart
from chairlift.backend.calibrated.pricing import LAUNCH_US
from chairlift.backend.calibrated.profile import Drafts, ProfileError
from chairlift.backend.calibrated.settings import Settings
from chairlift.backend.draft_shapes import head_of, in_memory
from chairlift.backend.drafting import WithDrafts
from chairlift.backend.memory import kv_blocks
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency, Roofline
from chairlift.backend.specs import MODELS, gpu, model

PS = 10**12
IDEAL = Efficiency(mfu=1, bandwidth=1, link=1, host="none")
LLAMA = model("llama-3.1-8b")
H200 = gpu("h200")
EAGLE3 = Drafts("eagle3", 3)


def verify(decodes: int, context: int, drafts: int, proposes: int = 0) -> Batch:
    return Batch((), decodes, context, 0, None, drafts, proposes)


def test_few_drafts_are_verified_in_the_time_of_reading_the_weights() -> None:
    roofline = Roofline(LLAMA, H200, ONE, IDEAL)

    assert roofline.step(verify(1, 104, 3)).first == roofline.step(Batch((), 1, 104)).first


def test_many_are_bound_by_the_products_of_all_their_tokens() -> None:
    """256 decodes with 3 drafts each: 1,024 tokens, of which each goes through all matrices and the head."""
    cost = Roofline(LLAMA, H200, ONE, IDEAL).step(verify(256, 256 * 104, 768))
    flops = 2 * (LLAMA.matmul_parameters + LLAMA.head_parameters) * 1024 + 4 * 32 * 32 * 128 * 104 * 1024

    assert cost.first / PS == pytest.approx(flops / (H200.bf16_tflops * 1e12), rel=1e-3)
    assert (cost.slope, cost.steps) == (0, 1)


def test_beside_prompts_drafts_are_tokens_like_those() -> None:
    """Full overlap, all bound by products: the longer of 2,000 tokens of prompts and 1,200 of decodes with drafts."""
    roofline = Roofline(LLAMA, H200, ONE, replace(IDEAL, mixed_overlap=1))
    chunk = (Chunk(0, 2000),)

    alone = roofline.step(Batch(chunk, 0, 0)).first
    assert roofline.step(Batch(chunk, 300, 300, 0, None, 900)).first == alone
    assert roofline.step(Batch(chunk, 600, 600, 0, None, 1800)).first > alone


def test_by_part_kv_is_read_once_for_all_tokens_of_a_decode() -> None:
    by_part = ByPart(LLAMA, H200, ONE, Efficiency())
    plain, drafted = (by_part.explain(verify(64, 64 * 2000, drafts)) for drafts in (0, 192))
    bytes_of, flops_of = ({p.name: getattr(p, what) for p in drafted} for what in ("bytes", "flops"))

    assert bytes_of["KV"] == {p.name: p.bytes for p in plain}["KV"]
    assert flops_of["KV"] == 4 * {p.name: p.flops for p in plain}["KV"]
    assert flops_of["MLP"] == 4 * {p.name: p.flops for p in plain}["MLP"]
    assert flops_of["head"] == 4 * {p.name: p.flops for p in plain}["head"]
    total = sum(part.seconds for part in drafted)
    assert by_part.step(verify(64, 64 * 2000, 192)).first / PS == pytest.approx(total)


def test_more_tokens_than_the_graphs_hold_are_launched_kernel_by_kernel() -> None:
    by_part = ByPart(LLAMA, H200, ONE, Efficiency(graph_tokens=512, prepare_ms=0, eager_us=1000))

    assert by_part.step(verify(128, 128 * 10, 384)).first < 32 * PS // 1000
    assert by_part.step(verify(129, 129 * 10, 387)).first == 32 * PS // 1000


def test_experts_see_all_tokens_of_a_decode() -> None:
    by_part = ByPart(model("qwen3-30b-a3b"), H200, ONE, Efficiency())
    read = {
        tokens: {p.name: p.bytes for p in by_part.explain(batch)}["experts"]
        for tokens, batch in ((2, verify(2, 20, 0)), (8, verify(2, 20, 6)))
    }

    # in expectation 128 · (1 − (1 − 8/128)^T)
    assert read[8] / read[2] == pytest.approx((1 - (15 / 16) ** 8) / (1 - (15 / 16) ** 2))


class Counts(Backend):
    """A token costs 1 ps, of context too, and a step 1,000."""

    prices_drafts = True

    def step(self, batch: Batch) -> StepCost:
        tokens = sum(chunk.length for chunk in batch.prefills) + batch.decodes + batch.drafts
        return StepCost(1000 + tokens + batch.context)


@dataclass
class Made:
    """Settings of `Counts`."""

    kind: type[Backend] = Counts

    def build(self, *_: object) -> Backend:
        return self.kind()


def test_each_draft_takes_a_pass_of_what_drafts() -> None:
    """2 decodes with 6 drafts and a prompt of 100, then 3 drafts: one pass over 108 tokens, two over 3."""
    settings = Made()
    backend = WithDrafts(settings, LLAMA, EAGLE3).build(LLAMA, H200, ONE)
    batch = Batch((Chunk(0, 100),), 2, 50, 0, None, 6, 3)

    assert backend.step(batch).first == 2 * (1000 + 108 + 50) + 2 * (1000 + 3 + 150)
    assert backend.step(batch._replace(proposes=1)).first == 2 * (1000 + 108 + 50)
    assert backend.step(batch._replace(proposes=0)).first == 1000 + 108 + 50
    assert WithDrafts(settings, None, EAGLE3).build(LLAMA, H200, ONE).step(batch).first == 1000 + 108 + 50


def test_a_pass_takes_as_long_as_measured() -> None:
    """vLLM 0.26 on an H200: a decode of one request with 3 drafts took 6.30 ms, of 4 requests 6.37, of 8 6.55."""
    settings = Efficiency(by_part=True)
    backend = WithDrafts(settings, replace(head_of(LLAMA, "eagle3"), vocab=32_000), EAGLE3).build(LLAMA, H200, ONE)

    for decodes, measured in ((1, 6.30), (4, 6.37), (8, 6.55)):
        cost = backend.step(verify(decodes, decodes * 140, 3 * decodes, 3))
        assert cost.first / 1e9 == pytest.approx(measured, rel=0.03)


class Blind(Counts):
    """It looks at no drafts."""

    prices_drafts = False


def test_a_backend_that_knows_no_drafts_is_refused() -> None:
    settings = Made(Blind)

    with pytest.raises(ValueError, match="does not price the verification of drafts: use roofline"):
        WithDrafts(settings, None, EAGLE3).build(LLAMA, H200, ONE)


def test_a_profile_measured_with_drafts_holds_their_passes() -> None:
    settings = WithDrafts(Auto(), replace(head_of(LLAMA, "eagle3"), vocab=32_000), EAGLE3)
    backend = settings.build(LLAMA, H200, ONE)

    assert backend.assumptions()["cost model"].startswith("profile h200-llama-3.1-8b-eagle3-vllm-0.26")
    # vLLM 0.26 on an H200: a decode of one request with 3 drafts took 6.30 ms, of 4 requests 6.37, of 8 6.55
    for decodes, measured in ((1, 6.30), (4, 6.37), (8, 6.55)):
        cost = backend.step(verify(decodes, decodes * 140, 3 * decodes, 3))
        assert cost.first / 1e9 == pytest.approx(measured, rel=0.03)


def test_other_numbers_of_drafts_take_as_many_passes_more_to_run_and_to_launch() -> None:
    settings = WithDrafts(Auto(), head_of(LLAMA, "eagle3"), Drafts("eagle3", 5))
    backend = settings.build(LLAMA, H200, ONE)
    three, five = (backend.step(verify(8, 800, 24, proposes)) for proposes in (3, 5))

    # 0.48 ms a pass, as 3 were measured; 1.4 ms to launch it
    assert (five.first - three.first) / 1e9 == pytest.approx(2 * 0.48, rel=0.05)
    assert five.host.launch - three.host.launch == 2 * LAUNCH_US * 10**6
    assert "measured with 3 drafts by eagle3" in backend.assumptions()["drafting"]


def test_beside_a_profile_without_drafts_their_passes_are_priced_apart() -> None:
    """Then the same steps, of which the profile of the plain engine says how long their verification takes."""
    plain = Settings("h200-llama-3.1-8b-vllm-0.26")
    apart = WithDrafts(plain, replace(head_of(LLAMA, "eagle3"), vocab=32_000), EAGLE3).build(LLAMA, H200, ONE)

    for decodes, measured in ((1, 6.30), (4, 6.37), (8, 6.55)):
        cost = apart.step(verify(decodes, decodes * 140, 3 * decodes, 3))
        assert cost.first / 1e9 == pytest.approx(measured, rel=0.06)
    bare = plain.build(LLAMA, H200, ONE)
    host, alone = apart.step(verify(1, 140, 3, 3)).host, bare.step(verify(1, 140, 3)).host
    assert (host.launch - alone.launch, host.head) == (3 * LAUNCH_US * 10**6, alone.launch)


@pytest.mark.parametrize("drafts", [None, Drafts("mtp", 3)])
def test_a_profile_of_another_way_of_drafting_is_refused(drafts: Drafts | None) -> None:
    settings = Settings("h200-llama-3.1-8b-eagle3-vllm-0.26")

    with pytest.raises(ProfileError, match="was measured with 3 drafts by eagle3, not"):
        settings.build(LLAMA, H200, ONE, drafts)
    assert not (chosen(LLAMA, H200, ONE, drafts) or "").startswith(settings.profile)


def test_the_layer_that_drafts() -> None:
    """A dense layer as wide as the model's for EAGLE3, with one row of KV in 33; an own one for MTP."""
    eagle = head_of(LLAMA, "eagle3")
    assert (eagle.layers, eagle.kv_bytes_per_token * 32) == (1, LLAMA.kv_bytes_per_token)
    moe = model("qwen3-30b-a3b")
    assert (head_of(moe, "eagle3").experts, head_of(moe, "mtp").experts) == (0, moe.experts)
    shared = in_memory(head_of(moe, "mtp"), "mtp")
    assert shared.weight_bytes < head_of(moe, "mtp").weight_bytes - 2 * moe.hidden * (moe.vocab - 1)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_every_shipped_model_has_one(name: str, method: str) -> None:
    head = head_of(model(name), method)

    assert (head.layers, head.hidden, head.window_layers) == (1, model(name).hidden, 0)
    assert head.weight_bytes < model(name).weight_bytes / 2


def test_its_weights_and_kv_are_on_the_same_gpus() -> None:
    """vLLM 0.26 on an H200, Llama-3.1-8B with an EAGLE3 head: 53,794 blocks, 56,057 without it."""
    head = replace(head_of(LLAMA, "eagle3"), vocab=32_000)
    with_it = kv_blocks(LLAMA, H200, Parallel(), draft=head, reserve_gib=1.92).blocks
    without = kv_blocks(LLAMA, H200, Parallel(), reserve_gib=1.92).blocks

    assert with_it / without == pytest.approx(53_794 / 56_057, rel=0.01)


def test_on_a_pipeline_the_last_stage_has_all_of_it() -> None:
    """Llama-3.1-8B on two GPUs: half of 32 layers each, and one table of 128,256 rows of 4,096 numbers of 2 bytes.

    The last one has the model's head, the layer that drafts with its head, and a copy of the input embedding, which
    lies on the first; so 17 rows of KV a token, of 4,096 bytes.
    """
    stages, head = Parallel(pipeline=2), replace(head_of(LLAMA, "eagle3"), vocab=32_000)
    table, norms = 128_256 * 4096 * 2, 2 * 4096
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336 + norms)
    kept = in_memory(head, "eagle3", LLAMA)
    fit = kv_blocks(LLAMA, H200, stages, draft=kept, reserve_gib=1.92)

    last = 16 * layer + table + layer + 32_000 * 4096 * 2 + table
    assert fit.weight_bytes == pytest.approx(last, abs=6 * 4096)  # the norms before the heads
    assert sum(group.bytes_per_token for group in fit.groups) == 17 * 4096
    assert in_memory(head, "draft_model", LLAMA) == head  # a model of its own has its own embedding


def test_passes_of_a_pipeline_are_those_of_one_stage() -> None:
    """On two stages of 2 GPUs each a pass takes what it takes on 2 GPUs, though a layer cannot be shared by stages."""
    layer, stages = head_of(LLAMA, "eagle3"), Parallel(tensor=2, pipeline=2)
    both, one = (
        (WithDrafts(Efficiency(), layer, EAGLE3).build(LLAMA, H200, p), Efficiency().build(LLAMA, H200, p))
        for p in (stages, Parallel(tensor=2))
    )
    batch = verify(8, 16_000, 24, 3)
    passes = [drafted.step(batch).first - plain.step(batch).first for drafted, plain in (both, one)]

    assert passes[0] == passes[1] > 3 * 290_000_000


def test_a_dense_draft_is_each_ranks_own() -> None:
    """Of 8 ranks with equal work, a pass takes what it takes on one GPU alone."""
    shape, parallel = model("deepseek-v3"), Parallel(data=8, expert=8)
    layer = head_of(shape, "eagle3")
    backend, one = (
        WithDrafts(Efficiency(by_part=True), layer, EAGLE3).build(shape, H200, parallel),
        Efficiency(by_part=True, step_ms=0.0, request_us=0.0, prepare_ms=0.0).build(layer, H200, ONE),
    )
    chunks = tuple(Chunk(0, length) for length in (100, 200, 300, 400, 500, 600, 700, 800))
    plain = Efficiency(by_part=True).build(shape, H200, parallel)
    own, spread = verify(4, 4000, 12, 3), Batch(chunks, 32, 32_000, 0, None, 96, 3)

    passes = one.step(own).first + 2 * one.step(Batch((), 4, 4000)).first + 3 * 290_000_000
    assert backend.together([own] * 8).first - plain.together([own] * 8).first == passes
    longest = own._replace(prefills=(Chunk(0, 800),))
    passes = one.step(longest).first + 2 * one.step(Batch((), 5, 4450)).first + 3 * 290_000_000
    assert backend.step(spread).first - plain.step(spread).first == passes


def test_ranks_with_equal_work_draft_as_one_batch_that_is_spread_over_them() -> None:
    shape, parallel = model("deepseek-v3"), Parallel(data=8, expert=8)
    backend = WithDrafts(Efficiency(), head_of(shape, "mtp"), Drafts("mtp", 3)).build(shape, H200, parallel)
    own, spread = verify(4, 4000, 12, 3), verify(32, 32_000, 96, 3)

    assert backend.together([own] * 8) == backend.step(spread)
    # one rank alone with drafts sets the pace of all: its 16 tokens, and one for nothing on each other rank
    alone = backend.together([own, *[Batch((), 0, 0)] * 7])
    plain = backend.together([Batch((), 4, 4000), *[Batch((), 0, 0)] * 7])
    assert plain.first < alone.first < backend.step(spread).first
    assert (alone.slope, alone.steps) == (0, 1)
