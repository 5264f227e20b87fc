"""Profiles carried to other GPUs, numbers of GPUs, formats and models: against arithmetic, and against recordings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from chairlift.backend import specs
from chairlift.backend.calibrated.carry import Off, carried, known, measured, seconds
from chairlift.backend.calibrated.profile import REGIMES, Profile, ProfileError, load
from chairlift.backend.calibrated.settings import Settings
from chairlift.backend.fitting import residuals
from chairlift.backend.fitting.recording import read
from chairlift.backend.fitting.steps import steps_of
from chairlift.backend.parallel import ONE, Parallel, labelled
from kit.command import chairlift
from kit.places import TRUTH

H200, H100 = specs.gpu("h200"), specs.gpu("h100")
LLAMA = load("h200-llama-3.1-8b-vllm-0.26")


def shape(profile: Profile) -> specs.Model:
    return specs.model(profile.model)


def test_another_gpu_reads_at_its_bandwidth_and_multiplies_at_its_peak() -> None:
    # An H100 has the H200's tensor cores and 3350 of its 4800 GB/s. 7.5 billion weights of 2 bytes at 0.8 of those take
    # 3.91 and 5.60 ms; 32 layers of 10 kernels of 3 us take 0.96 ms on both.
    found = carried(LLAMA, shape(LLAMA), H100, ONE)
    old, new = LLAMA.gpu_time, found.gpu_time
    weights = 2 * (shape(LLAMA).matmul_parameters + shape(LLAMA).head_parameters)
    expected = (weights / 0.8 / 3350e9 + 0.96e-3) / (weights / 0.8 / 4800e9 + 0.96e-3)

    assert new.weights_s / old.weights_s == pytest.approx(expected)
    assert new.kv_s / old.kv_s == pytest.approx(4800 / 3350)
    assert (new.token_s, new.pair_s, new.chunk_s) == (old.token_s, old.pair_s, old.chunk_s)
    assert found.host == LLAMA.host
    assert old.size_factors
    assert new.size_factors == ()  # which kernels a library takes for a size is another matter there
    assert "no other GPU was recorded" in found.notes[-1]


def test_on_two_gpus_each_has_half_of_the_work_and_their_processes_launch() -> None:
    qwen = load("h200-qwen3-30b-a3b-vllm-0.26")
    found = carried(qwen, shape(qwen), H200, Parallel(tensor=2, expert=2))

    assert found.gpu_time.experts_s == pytest.approx(qwen.gpu_time.experts_s / 2, rel=0.05)
    assert found.gpu_time.kv_s == pytest.approx(qwen.gpu_time.kv_s / 2)
    assert found.gpu_time.pair_s == pytest.approx(qwen.gpu_time.pair_s / 2)
    assert found.gpu_time.weights_s > qwen.gpu_time.weights_s / 2  # kernels are as many, and collectives come to them
    assert found.gpu_time.eager_floor_s == pytest.approx(qwen.host.eager_s * 989 / 813)
    assert found.host.eager_s < 0.001
    launch = qwen.host.piecewise_s * 187 / 309  # by workers, once the first kernel has come to an idle GPU
    assert found.host.piecewise_s + found.host.tail_s - found.host.head_s == pytest.approx(launch)
    assert found.parallel == Parallel(tensor=2, expert=2)


def test_half_the_bytes_of_fp8_are_read_and_multiplied_in_half_the_time() -> None:
    fp8 = specs.model("llama-3.1-8b-fp8")
    here, there = seconds(shape(LLAMA), H200, ONE), seconds(fp8, H200, ONE)

    assert there.token / here.token == pytest.approx(989.5 / 1979, rel=0.01)
    # the head stays bfloat16, and activations are quantised by four kernels more a layer
    matrices, head = shape(LLAMA).matmul_parameters, shape(LLAMA).head_parameters
    extra = 32 * 4 * 3e-6 - matrices / 0.8 / 4800e9
    assert there.read - here.read == pytest.approx(extra, rel=0.01)
    assert there.sequence == pytest.approx(here.sequence)
    assert head > 0


def test_what_a_profile_was_measured_for_stays_as_it_is() -> None:
    assert carried(LLAMA, shape(LLAMA), H200, ONE) is LLAMA


def test_experts_of_a_dense_profile_are_the_rooflines() -> None:
    qwen = specs.model("qwen3-30b-a3b")
    found = carried(LLAMA, qwen, H200, ONE)

    assert found.gpu_time.experts_s == seconds(qwen, H200, ONE).experts
    assert found.gpu_time.expert_share == 8 / 128
    back = carried(load("h200-qwen3-30b-a3b-vllm-0.26"), shape(LLAMA), H200, ONE)
    assert (back.gpu_time.experts_s, back.gpu_time.expert_share) == (0, 0)


def test_it_is_asked_for_and_says_so(tmp_path: Path) -> None:
    backend = "{name: profile, profile: h200-llama-3.1-8b-vllm-0.26, carry: true}"
    scenario = tmp_path / "s.yaml"
    text = f"model: llama-3.1-70b\ntensor_parallel: 4\ngpu: h100\npolicy: vllm\nbackend: {backend}\n"
    text += "workload: {name: azure-conv-2023, requests: 20, rate_per_s: 2}\n"
    scenario.write_text(text)
    told = chairlift("run", str(scenario), "--out", str(tmp_path / "out"))

    assert told.status == 0, told.err
    said = " ".join(told.out.split())
    assert "scaled, not measured: llama-3.1-8b on 1 × h200 → llama-3.1-70b on 4 × h100: weights × " in said
    assert "steps were off by decode-only" in said
    scenario.write_text(text.replace(", carry: true", ""))
    told = chairlift("run", str(scenario), "--out", str(tmp_path / "out"))
    assert told.status == 2
    assert "is of llama-3.1-8b, not of llama-3.1-70b (carry: true carries it over)" in told.err


def test_what_cannot_be_carried_is_said() -> None:
    qwen = specs.model("qwen3-30b-a3b")
    with pytest.raises(ProfileError, match="cannot be carried to TP 2, DP 2"):
        carried(LLAMA, qwen, H200, Parallel(tensor=2, data=2))
    with pytest.raises(ValueError, match="depends on nvlink_gb_per_s"):
        carried(LLAMA, shape(LLAMA), replace(H200, name="odd", nvlink_gb_per_s=None), Parallel(tensor=2))
    settings = Settings("h200-llama-3.1-8b-vllm-0.26", carry=True)
    assert settings.build(qwen, H200, ONE).profile.model == "qwen3-30b-a3b"


def test_errors_are_told_of_what_changes() -> None:
    rows = [row for row in known() if "numbers of GPUs" in row.changes]
    said = measured(["numbers of GPUs"])

    assert f"carried {len(rows)} times between recorded engines (to other numbers of GPUs)" in said
    for i, regime in enumerate(REGIMES):
        told = re.search(f"{regime} (\\d+) %", said)
        assert told is not None
        assert float(told[1]) == pytest.approx(median(row.median[i] for row in rows), abs=0.5)


def found(row: Off) -> Off:
    """What carrying the row's profile comes to on the recorded steps of its target; repeats are left out."""
    model, version = row.target.removeprefix("h200-").split("-vllm-")
    source = read(TRUTH / f"h200-vllm-{version}", model)
    profile = carried(load(row.source), specs.model(labelled(model)[0]), H200, source.parallel)
    runs = [each for each in source.experiments.values() if not each.repeats]
    steps = steps_of(runs, profile.gpu_time.hot_token_s)
    errors = residuals.summary([residuals.foresee(profile.gpu_time, profile.host, steps)])
    mine = [tuple(round(100 * errors[regime][key], 1) for regime in REGIMES) for key in ("median", "total")]
    return row._replace(median=mine[0], total=mine[1])


@pytest.mark.skipif(not TRUTH.is_dir(), reason="../shared is not here")
def test_the_table_is_what_carrying_between_recorded_engines_comes_to() -> None:
    rows = [found(row) for row in known()]
    text = "\n".join(
        f"- {{source: {r.source}, target: {r.target}, changes: [{', '.join(r.changes)}],"
        f" median: {list(r.median)}, total: {list(r.total)}}}"
        for r in rows
    )
    assert rows == list(known()), text
