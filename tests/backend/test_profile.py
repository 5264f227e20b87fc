"""A profile's prices: exact integers in their stated form, padding to CUDA graphs, files, scaling to another GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from chairlift.backend import specs
from chairlift.backend.base import WHOLE, Batch, Chunk
from chairlift.backend.calibrated import profile, settings
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import GpuTime, HostTime, Profile
from chairlift.backend.cuda_graphs import graph_limit, padded
from chairlift.policies.vllm import Vllm
from chairlift.sim.scenario.plugins import BACKENDS
from kit.command import chairlift
from kit.worlds import check_books, play, trace_of

MS = 10**9
GPU_TIME = GpuTime(
    weights_s=0.004,
    token_s=10e-6,
    sharpness=2.0,
    sequence_s=2e-6,
    kv_s=30e-9,
    kv_mixed_s=50e-9,
    pair_s=1e-12,
    chunk_s=0.0005,
    request_s=20e-6,
    decode_residual=((1, 1.0), (256, 2.0)),
)
HOST = HostTime(
    schedule_s=100e-6,
    schedule_request_s=10e-6,
    schedule_token_s=0.1e-6,
    update_s=50e-6,
    update_request_s=5e-6,
    arrival_s=200e-6,
    arrival_token_s=0.2e-6,
    graph_s=0.0005,
    piecewise_s=0.006,
    eager_s=0.014,
    tail_s=0.0003,
)
MADE = Profile("made", "opt-13b", "h200", "vllm 0.23.0", GPU_TIME, HOST)


def test_a_decode_step_is_padded_weighted_and_priced_in_picoseconds() -> None:
    cost = Calibrated(MADE).step(Batch((), 16, 16000))

    # √(4² + 0.16²) ms, times 1.5 halfway to the knot in log tokens; 16 × 2 µs; 30 ns a token of context
    assert cost.first == pytest.approx((4.0031987 * 1.5 + 0.032 + 0.48) * MS, rel=1e-6)
    assert (cost.slope, cost.steps > 10**9) == (16 * 30_000, True)
    assert cost.host == (260_000_000, 500_000_000, 130_000_000, WHOLE, 0)


def test_batches_of_one_graph_cost_alike_but_for_their_sequences() -> None:
    backend = Calibrated(MADE)
    nine, sixteen = (backend.step(Batch((), n, 0)).first for n in (9, 16))

    assert sixteen - nine == 7 * 2_000_000


def test_a_mixed_step_by_hand() -> None:
    backend = Calibrated(replace(MADE, gpu_time=replace(GPU_TIME, token_s=4e-6)))

    cost = backend.step(Batch((Chunk(100, 50), Chunk(0, 944)), 6, 10_000))

    # 1000 tokens, eager: √(4² + 4²) ms; 8 sequences; pairs 50·100 + 50·51/2 + 944·945/2
    assert cost.first == pytest.approx((5.6568542 + 0.016 + 0.5 + 0.452315e-3 + 0.5 + 0.04) * MS, rel=1e-6)
    assert (cost.slope, cost.steps) == (0, 1)
    assert cost.host == (279_400_000, 14 * MS, 90_000_000, 300_000_000, 0)


def test_whole_tiles_are_computed_two_at_a_time() -> None:
    tiled = replace(GPU_TIME, token_s=4e-6, tile_tokens=128, odd_tiles=1.25)
    backend = Calibrated(replace(MADE, gpu_time=tiled))

    def matmuls(tokens: int) -> float:
        rest = GPU_TIME.pair_s * tokens * (tokens + 1) / 2 + GPU_TIME.chunk_s + GPU_TIME.request_s
        return backend.step(Batch((Chunk(0, tokens),), 0, 0)).first / 1e12 - rest - GPU_TIME.sequence_s

    # √(4² + (4e-3 · 1024)²) ms for eight tiles; nine tiles for one token more, and another quarter: they are ten
    assert matmuls(1024) == pytest.approx(5.7250e-3, rel=1e-3)
    assert matmuls(1025) == pytest.approx(1.25 * 6.1012e-3, rel=1e-3)
    assert matmuls(1152) == pytest.approx(matmuls(1025), rel=1e-9)


def test_whole_pairs_of_tiles_are_computed_and_an_empty_last_one_takes_longer() -> None:
    pairs = replace(GPU_TIME, token_s=4e-6, tile_tokens=128, odd_tiles=1.25, empty_pair_s=2e-3)
    backend = Calibrated(replace(MADE, gpu_time=pairs))

    def matmuls(tokens: int) -> float:
        rest = GPU_TIME.pair_s * tokens * (tokens + 1) / 2 + GPU_TIME.chunk_s + GPU_TIME.request_s
        return backend.step(Batch((Chunk(0, tokens),), 0, 0)).first / 1e12 - rest - GPU_TIME.sequence_s

    # √(4² + (4e-3 · 1024)²) ms for four full pairs; of five pairs, √(4² + (4e-3 · 1280)²) ms, the last is half empty
    # with 1152 tokens: half of a quarter longer, and half of 2 ms; a single tile has no empty half
    assert matmuls(1024) == pytest.approx(5.7250e-3, rel=1e-3)
    assert matmuls(1280) == pytest.approx(6.4973e-3, rel=1e-3)
    assert matmuls(1152) == pytest.approx(1.125 * 6.4973e-3 + 1e-3, rel=1e-3)
    assert matmuls(128) == pytest.approx(matmuls(100), rel=1e-9)
    assert matmuls(128) == pytest.approx(4.0327e-3, rel=1e-3)


def test_a_captured_size_may_have_kernels_of_its_own() -> None:
    plain = Calibrated(replace(MADE, gpu_time=replace(GPU_TIME, token_s=4e-6)))
    slow = Calibrated(replace(MADE, gpu_time=replace(GPU_TIME, token_s=4e-6, size_factors=((432, 0.9), (448, 1.3)))))

    def longer(tokens: int) -> float:
        batch = Batch((Chunk(0, tokens),), 0, 0)
        return (slow.step(batch).first - plain.step(batch).first) / 1e12

    # 440 tokens are padded to 448, whose matmuls take √(4² + (4e-3 · 448)²) = 4.3831 ms
    assert longer(448) == longer(440) == pytest.approx(0.3 * 4.3831e-3, rel=1e-3)
    assert longer(432) == pytest.approx(-0.1 * 4.3575e-3, rel=1e-3)
    assert longer(464) == longer(416) == longer(4480) == 0


@pytest.mark.parametrize(
    ("tokens", "limit", "computed"),
    [
        (1, 512, 1),
        (3, 512, 4),
        (5, 512, 8),
        (250, 512, 256),
        (257, 512, 272),
        (512, 512, 512),
        (513, 512, 513),
        (1009, 4096, 1024),
        (1025, 4096, 1280),  # our own engine's, with experts
        (4097, 4096, 4097),
        (65, 64, 65),
    ],
)
def test_steps_are_padded_as_vllm_captures_graphs(tokens: int, limit: int, computed: int) -> None:
    assert padded(tokens, limit) == computed


@pytest.mark.parametrize(("seqs", "tokens", "limit"), [(256, 8192, 512), (32, 8192, 64), (256, 128, 128)])
def test_the_largest_graph_follows_from_the_limits(seqs: int, tokens: int, limit: int) -> None:
    assert graph_limit({"max_num_seqs": seqs, "max_num_batched_tokens": tokens}) == limit


@hypothesis_settings(max_examples=40)
@given(
    table=st.lists(
        st.tuples(st.integers(0, 200).map(lambda ms: ms * MS), st.integers(1, 3000), st.integers(1, 200)),
        min_size=1,
        max_size=15,
    ),
    name=st.sampled_from(profile.shipped()),
    draw=st.integers(0, 2),
    ahead=st.booleans(),
)
def test_leap_equals_step(table: list[tuple[int, int, int]], name: str, draw: int, ahead: bool) -> None:
    trace = trace_of(sorted(table))
    loaded = profile.load(name)

    def backend() -> Calibrated:
        drafts = loaded.drafts  # which are then none
        return settings.Settings(name, draw=draw).build(
            specs.model(loaded.model), specs.gpu("h200"), loaded.parallel, drafts
        )

    leapt, stepped = (
        play(trace, lambda: Vllm(async_scheduling=ahead), backend, blocks=600, leap=leap) for leap in (True, False)
    )

    assert leapt.outcome() == stepped.outcome()
    for world in (leapt, stepped):
        check_books(world)


@pytest.mark.parametrize("name", profile.shipped())
def test_a_shipped_profile_says_where_it_comes_from_and_how_far_it_was_off(name: str) -> None:
    loaded = profile.load(name)

    assert loaded.name == name
    assert profile.parse(loaded.to_json()) == loaded
    assert {"gpu", "date", "experiments", "rows", "command"} <= loaded.provenance.keys()
    assert not loaded.provenance["command"].count("/")
    assert {"steps", "gpu", "runs"} == loaded.errors.keys()
    said = Calibrated(loaded).assumptions()
    assert loaded.digest in said["cost model"]
    assert any(key.startswith("held-out error") for key in said)


def test_profiles_are_a_backend_by_name() -> None:
    assert "profile" in BACKENDS
    assert {"h200-llama-3.1-8b-vllm-0.23", "h200-opt-13b-vllm-0.23"} <= set(profile.shipped())


SCENARIO = """\
model: opt-13b
gpu: {gpu}
policy: vllm
backend: {backend}
workload: {{requests: 20, arrivals: {{poisson: {{rate_per_s: 5}}}}, prompt_tokens: 100, output_tokens: 10}}
"""


def run(folder: Path, backend: str, *more: str, gpu: str = "h200") -> tuple[int, str]:
    path = folder / "mine.yaml"
    path.write_text(SCENARIO.format(backend=backend, gpu=gpu), encoding="utf-8")
    done = chairlift("run", str(path), "--out", str(folder / "out"), *more)
    return done.status, " ".join((done.out + done.err).split())


def test_a_scenario_names_a_profile_either_way(tmp_path: Path) -> None:
    name = "h200-opt-13b-vllm-0.23"
    long, short = (run(tmp_path, b, "--json") for b in (f"{{name: profile, profile: {name}}}", name))
    told = run(tmp_path, "roofline", "--json", "--backend", name)

    def strip(text: str) -> dict[str, object]:
        found = json.loads(text)
        return {key: value for key, value in found.items() if "wall" not in key}

    assert long[0] == short[0] == told[0] == 0
    assert strip(long[1]) == strip(short[1]) == strip(told[1])


def test_another_gpu_is_scaled_and_says_so(tmp_path: Path) -> None:
    status, text = run(tmp_path, "h200-opt-13b-vllm-0.23", gpu="h100")

    assert status == 0
    assert "step costs are scaled, not measured" in text
    said = " ".join(text.split())
    assert (
        "scaled, not measured: opt-13b on 1 × h200 → opt-13b on 1 × h100: weights × 1.37, products × 1, context" in said
    )
    assert "no other GPU was recorded), steps were off by decode-only" in said


@pytest.mark.parametrize(
    ("backend", "more", "message"),
    [
        ("h200-opt-13b-vllm-0.22", (), "no such backend – did you mean 'h200-opt-13b-vllm-0.23'?"),
        ("{name: profile}", (), "backend.profile: is required"),
        ("{name: profile, profile: nothing.json}", (), "nothing.json: no such file"),
        ("h200-llama-3.1-8b-vllm-0.23", (), "is of llama-3.1-8b, not of opt-13b"),
        ("h200-opt-13b-vllm-0.23", ("--set", "tensor_parallel=2"), "is of 1 GPUs, not of 2"),
        ("roofline", ("--uncertainty", "2"), "--uncertainty: needs a calibrated profile"),
    ],
)
def test_bad_profiles_are_refused(tmp_path: Path, backend: str, more: tuple[str, ...], message: str) -> None:
    status, text = run(tmp_path, backend, *more)

    assert status == 2
    assert message in text


def test_damaged_profile_files_are_refused(tmp_path: Path) -> None:
    good = json.loads(MADE.to_json())
    cases = [
        ({**good, "format": 9}, "format must be 1"),
        ({**good, "speed": 1}, "speed is unknown"),
        (
            {**good, "gpu_time": {**good["gpu_time"], "kv_s": -1}},
            "gpu_time.kv_s must be greater than or equal to 0 (got -1)",
        ),
        ({**good, "host": {**good["host"], "sleep_s": 1}}, "host.sleep_s is unknown"),
        ({key: value for key, value in good.items() if key != "host"}, "host is required"),
    ]
    for data, message in cases:
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(profile.ProfileError) as raised:
            profile.load(str(path))
        assert message in str(raised.value)
