"""What single steps of our own engine show, by its GPU's clock, and how its profiles price that (measured on H200s)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import Profile, load
from chairlift.backend.fitting.fit import fit
from chairlift.backend.fitting.recording import read
from chairlift.backend.fitting.steps import EAGER, GRAPH, PIECEWISE, Spans, Steps, predicted, steps_of
from chairlift.backend.whole_prompts import dense, filled, pairs
from kit.places import ROOT

MEASURED = ROOT / "backend" / "gpu" / "measured"
EXPERTS = ("qwen3-30b-a3b", "qwen3-30b-a3b-tp2-ep")
TODAYS = ("llama-3.1-8b", "llama-3.1-8b-fp8", "opt-13b", "qwen3-30b-a3b")  # since one kernel attends for all prompts


def profile_of(model: str) -> Profile:
    return load(f"h200-{model}-chairlift-0.1")


def recorded(model: str, folder: str = "grid", names: list[str] | None = None) -> Steps:
    steps = steps_of(read(MEASURED / folder, model).select(names), profile_of(model).gpu_time.hot_token_s)
    assert steps.gpu_known
    return steps


@pytest.mark.parametrize("model", EXPERTS)
def test_padding_reads_no_experts(model: str) -> None:
    """Steps of 9 to 16 decodes replay one graph, and those of 9 read far fewer experts."""
    steps, gpu = recorded(model, "hardware_check"), profile_of(model).gpu_time
    of = {n: np.median(steps.gpu[(steps.kind == GRAPH) & (steps.decodes == n)]) for n in (9, 16)}
    priced = predicted(gpu, steps)

    share = [1 - (1 - 1 / 16) ** n for n in (9, 16)]  # 8 of 128 experts see a token
    read = gpu.experts_s * (share[1] - share[0])

    assert set(steps.computed[(steps.kind == GRAPH) & np.isin(steps.decodes, (9, 16))].tolist()) == {16.0}
    assert of[16] - of[9] == pytest.approx(read, rel=0.25)
    for n in (9, 12, 16):
        mine = (steps.kind == GRAPH) & (steps.decodes == n)
        assert np.median(priced[mine] / steps.gpu[mine]) == pytest.approx(1, abs=0.045), n


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        ([], False),
        ([1023], False),
        ([1024], True),
        ([3561], False),  # filled up to 4,096, that is by 15.02 %
        ([3562], True),  # by 14.99 %
        ([4097], False),
        ([16 * 1024], True),
        ([16 * 1024 + 1], False),
        ([1024, 4096], True),
        ([1024, 4095], False),  # of several none is filled up
    ],
)
def test_which_prompts_go_to_the_other_kernel(whole: Sequence[int], expected: bool) -> None:
    assert dense(whole) is expected


def test_a_prompt_costs_the_pairs_of_its_filled_up_length() -> None:
    assert filled(3562) == 4096
    assert pairs([3562, 1024]) == 4096 * 4097 // 2 + 1024 * 1025 // 2


def test_a_recording_tells_whole_prompts() -> None:
    """Of prompts that come one at a time those are such that no graph holds; of 12,000 tokens the first chunk is."""
    steps = recorded("qwen3-30b-a3b-tp2-ep", "grid", ["grid_prefill"])

    told = steps.prompt[steps.whole > 0]

    assert sorted(set(told.astype(int).tolist())) == [6144, 8190, 8192]
    assert (steps.kind[steps.whole > 0] == EAGER).all()


@pytest.mark.parametrize("model", TODAYS)
def test_an_engine_with_one_kernel_for_all_prompts_is_known_by_its_recording(model: str) -> None:
    steps = recorded(model, "grid", ["grid_prefill"])

    assert ((steps.kind == EAGER) & (steps.prompt >= 2047)).any()
    assert not steps.whole.any()
    assert profile_of(model).gpu_time.whole_pair_s == 0


def test_whole_prompts_take_less_for_a_pair() -> None:
    """Prompts of more than 4,096 tokens go to another kernel, shorter ones are part of a graph."""
    model = "qwen3-30b-a3b-tp2-ep"
    steps, gpu = recorded(model, "grid", ["grid_prefill"]), profile_of(model).gpu_time
    off = steps.gpu / predicted(gpu, steps)

    assert gpu.whole_pair_s < 0.7 * gpu.pair_s
    for mine in (steps.whole > 0, (steps.whole == 0) & (steps.prompt > 3000)):
        assert mine.sum() >= 9
        assert np.median(off[mine]) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("model", TODAYS)
def test_a_pair_of_a_prompt_takes_half_of_what_it_took_in_november(model: str) -> None:
    """Without the prompts that cuDNN attended to then: the kernel alone took 1,704 µs for 8,192 tokens, today's 950."""
    then = {"llama-3.1-8b": 1.756e-9, "llama-3.1-8b-fp8": 1.801e-9, "opt-13b": 2.565e-9, "qwen3-30b-a3b": 2.582e-9}

    assert profile_of(model).gpu_time.pair_s / then[model] == pytest.approx(950 / 1704, rel=0.15)


def test_a_profile_prices_whole_prompts_as_its_fit_does() -> None:
    model = "qwen3-30b-a3b-tp2-ep"
    profile, steps = profile_of(model), recorded(model, "grid", ["grid_prefill"])
    cold = Calibrated(replace(profile, gpu_time=replace(profile.gpu_time, hot_chunk=0.0, hot_kv=0.0)))
    told = predicted(cold.profile.gpu_time, steps)

    rows = np.flatnonzero((steps.kind == EAGER) & (steps.chunks == 1) & (steps.whole > 0))

    assert len(rows) >= 9
    for row in rows:
        cost = cold.step(Batch((Chunk(0, int(steps.prompt[row])),), 0, 0))
        assert cost.first / 1e12 == pytest.approx(told[row], rel=1e-6)


def test_behind_silence_a_small_steps_time_holds_its_launch() -> None:
    """The same prompts came three times, and by how much they took longer is by how much their launches did."""
    steps = recorded("llama-3.1-8b", "grid", ["grid_prefill"])
    small = steps.woke & (steps.kind == PIECEWISE) & (steps.prompt <= 128)
    gpu, launch = (
        np.array([each[small & (steps.prompt == n)] for n in (16, 32, 64, 96, 128)])
        for each in (steps.gpu, steps.launch)
    )

    gpu, launch = gpu - gpu.mean(axis=1, keepdims=True), launch - launch.mean(axis=1, keepdims=True)

    slope = (gpu * launch).sum() / (launch * launch).sum()
    assert gpu.shape == (5, 3)
    assert 0.5 < slope < 1.1
    assert np.corrcoef(gpu.ravel(), launch.ravel())[0, 1] > 0.9


def test_times_of_the_gpu_count_from_the_launch_or_the_step_before() -> None:
    steps = recorded("llama-3.1-8b", "grid", ["grid_mixed_8192"])
    spans = Spans.timed(steps, np.full((1, 3), 0.02))
    woke = np.flatnonzero(steps.woke)
    busy = np.flatnonzero(~steps.woke & ~steps.first)

    assert np.isneginf(spans.free[woke]).all()
    assert (spans.begun[woke] == 0).all()
    behind = spans.begun[busy, 0] < 0  # launched while the step before ran
    assert behind.mean() > 0.95
    assert (spans.free[busy][behind] == 0).all()
    np.testing.assert_allclose(
        spans.begun[busy, 0][behind],
        (steps.schedule + steps.schedule_cpu)[busy][behind] - steps.done[busy - 1][behind],
        atol=1e-9,
    )


def made(folder: Path, engine: str) -> Steps:
    """Two prompts, 8,192 and 64 tokens, 1,000 s apart by the clock of ``engine``."""
    limits = {"num_gpu_blocks": 1000, "max_num_batched_tokens": 8192, "max_num_seqs": 8, "block_size": 16}
    summary = {"engine": {"gpu": "NVIDIA H200", engine: "0.23.0"}, "experiments": [{"name": "made", "engine": limits}]}
    (folder / "m_summary.json").write_text(json.dumps(summary))
    requests = (
        "experiment,index,arrival_s,added_s,prompt_tokens,output_tokens,prefix_group,first_token_s,last_token_s\n"
    )
    requests += "made,0,0,0,8192,1,-1,0.2,0.2\nmade,1,1000,1000,64,1,-1,1000.005,1000.005\n"
    names = "schedule_s,done_s,schedule_cpu_s,update_cpu_s,prefill_requests,prefill_tokens,prefill_pairs"
    steps = f"experiment,{names},decode_requests,decode_context_tokens,running,waiting,preempted\n"
    steps += "made,0,0.2,0,0,1,8192,33558528,0,0,1,0,0\nmade,1000,1000.005,0,0,1,64,2080,0,0,1,0,0\n"
    for name, text in (("requests", requests), ("steps", steps)):
        with gzip.open(folder / f"m_{name}.csv.gz", "wt") as file:
            file.write(text)
    return steps_of(read(folder, "m").select(None), 24e-6)


def test_where_the_clock_jumps_over_silence_the_gpu_has_not_cooled(tmp_path: Path) -> None:
    """Our own engine's does: a wave of its grid comes right behind the one before."""
    for engine in ("vllm", "chairlift"):
        (tmp_path / engine).mkdir()
    cool, warm = (made(tmp_path / engine, engine) for engine in ("vllm", "chairlift"))

    assert cool.rest.tolist() == pytest.approx([0, 999.8])
    assert warm.rest.tolist() == [0, 0]
    assert cool.warmth[1] < 0.1
    assert warm.warmth[1] > 0.8


def test_light_and_heavy_loads_are_priced_alike() -> None:
    """The grid tells how much longer steps of a warm GPU take: in runs left out, cool and warm ones are off alike."""
    steps, gpu = recorded("llama-3.1-8b", "hardware_check"), profile_of("llama-3.1-8b").gpu_time
    off = np.log(steps.gpu / predicted(gpu, steps))
    chunked = (steps.chunks > 0) & ~steps.woke
    cool, warm = chunked & (steps.warmth < 0.5), chunked & (steps.warmth > 0.75)

    assert min(cool.sum(), warm.sum()) > 100
    assert abs(np.median(off[cool]) - np.median(off[warm])) < 0.02


def test_passes_in_one_graph_take_the_host_little() -> None:
    """Another two than three take a third each of a launch that is as short as a pass, not 1.4 ms; vLLM's take that."""
    for engine in ("chairlift-0.1", "vllm-0.26"):
        profile = load(f"h200-llama-3.1-8b-eagle3-{engine}")
        three, five = (
            Calibrated(profile).step(Batch((), 8, 8000, 0, None, 8 * k, k)).host.launch / 1e9 for k in (3, 5)
        )

        assert three == pytest.approx(profile.host.graph_s * 1e3, abs=1e-6)
        assert five - three == pytest.approx(2 * min(1.4, three / 3), abs=0.01), engine
        assert (three / 3 < 1.4) is (engine == "chairlift-0.1")


def test_fits_of_engines_that_do_not_time_their_gpu_know_no_such_things() -> None:
    found = fit(without_clock(recorded("qwen3-30b-a3b")), 1 / 16).gpu

    assert (found.live_experts, found.whole_pair_s) == (False, 0.0)


def without_clock(steps: Steps) -> Steps:
    unknown = np.full(len(steps), np.nan)
    return replace(steps, gpu=unknown, launch=unknown)
