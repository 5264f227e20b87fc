"""``chairlift calibrate --bench``: parts of a profile from what clients measured, steps hidden."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from chairlift.backend import specs
from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated import carry
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.calibrated.profile import Profile, between, load
from chairlift.backend.fitting.recording import read
from chairlift.sim.calibration import bench
from chairlift.sim.calibration.bench_parts import CHUNKS, CLIENT, DECODES, PARTS, changed, precision, taken
from chairlift.sim.calibration.from_bench import Run, fit, nearest
from chairlift.sim.calibration.validate import setup_of
from chairlift.sim.results.metrics import Latencies, inter_token_gaps
from chairlift.sim.scenario.load import load as load_scenario
from chairlift.sim.workload.formats.vllm_bench import Result, result
from kit.benched import result_of
from kit.command import chairlift
from kit.places import TRUTH

H200 = specs.gpu("h200")
START = "h200-llama-3.1-8b-vllm-0.26"
SCENARIO = {
    "model": "llama-3.1-8b",
    "gpu": "h200",
    "policy": {"name": "vllm", "max_num_batched_tokens": 4096, "max_num_seqs": 128},
}
needs_truth = pytest.mark.skipif(not TRUTH.is_dir(), reason="no recordings beside the checkout")


def recorded_runs(folder: Path, names: tuple[str, ...], profile: Profile) -> list[Run]:
    """Results made of recorded requests alone, for the recorded limits."""
    recording = read(TRUTH / "h200-vllm-0.23", "llama-3.1-8b")
    runs = []
    for name in names:
        experiment = recording.experiments[name]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result_of(experiment.requests, experiment.itl_s)))
        found = result(path)
        runs.append(Run(found, bench.replayed(setup_of(experiment, recording, profile), found)))
    return runs


def off(run: Run, profile: Profile) -> dict[str, float]:
    """Relative errors of a prediction, by metric."""
    predicted, measured = run.predicted(profile).metrics(), bench.recorded(run.result).metrics()
    return {name: abs(predicted[name] / value - 1) for name, value in measured.items() if value}


@needs_truth
def test_a_run_that_was_not_seen_is_predicted_by_another_versions_profile(tmp_path: Path) -> None:
    """From vLLM 0.26's profile to 0.23: fitted at 6 a second and to a burst, judged at 20 a second."""
    start = load(START)
    *seen, unseen = recorded_runs(tmp_path, ("conv_poisson_q6", "seed_burst", "conv_poisson_q20"), start)
    found = fit(seen, start, H200, hold_out=False)
    errors = off(unseen, found.profile)

    assert errors["duration"] <= 0.03
    for quantile in ("median", "p90", "p99"):
        assert errors[f"{quantile}_ttft_ms"] <= 0.12
        assert errors[f"{quantile}_tpot_ms"] <= 0.12
    # what a burst of 256 sequences tells: scheduling took 21 µs a request in 0.23, and takes 30 in 0.26
    host = found.parts[PARTS.index("scheduling and updating")]
    assert host.told
    assert host.low < 21 / 30 < host.high


def served(rate_per_s: float, profile: Profile) -> Run:
    """What clients would measure of a simulated server that has the steps of ``profile``."""
    Path("s.json").write_text(json.dumps(SCENARIO | {"workload": load_of(rate_per_s)}))
    [setup] = load_scenario("s.json").setups
    outcome = Run(cast(Result, None), setup).outcome(profile)
    times = Latencies(outcome.requests)
    gaps = np.repeat(*inter_token_gaps(outcome.runs))
    count = len(setup.trace)
    seen = times.of("ttft") / 1e3, times.of("e2el") / 1e3, gaps / 1e3
    return Run(Result(Path(f"q{rate_per_s}"), setup.trace, np.arange(count), count, *seen, None, None), setup)


def load_of(rate_per_s: float) -> dict[str, Any]:
    return {
        "requests": 150,
        "arrivals": {"poisson": {"rate_per_s": rate_per_s}},
        "prompt_tokens": {"uniform": {"low": 50, "high": 900}},
        "output_tokens": {"uniform": {"low": 20, "high": 200}},
    }


def test_planted_factors_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated server whose decode steps take 1.1 times as long, and launches 1.3 times, at two rates."""
    monkeypatch.chdir(tmp_path)
    planted = np.zeros(len(PARTS))
    planted[: len(DECODES)] = np.log(1.1)
    planted[PARTS.index("launches by graph pieces")] = np.log(1.3)
    truth = changed(load(START), planted)
    found = fit([served(rate, truth) for rate in (3, 12)], load(START), H200, hold_out=False)
    parts = {each.part: each for each in found.parts}

    for part, true in (("decode steps of 16", 1.1), ("launches by graph pieces", 1.3)):
        assert parts[part].told, part
        assert parts[part].low <= true <= parts[part].high, part
    assert abs(parts["decode steps of 16"].factor / 1.1 - 1) < 0.06
    # Two runs' paces of a width as that of launches could be a third of it: 1/2 against 1.
    assert 1.3 ** (2 / 3) < parts["launches by graph pieces"].factor < 1.3 * 1.06
    held = [each.low <= factor <= each.high for each, factor in zip(found.parts, np.exp(planted).tolist(), strict=True)]
    assert sum(held[:CLIENT]) >= CLIENT - 2  # 9 in 10 of the intervals are to hold
    unseen = served(7, truth)
    errors = off(unseen, found.profile)
    # a part of the launches is taken for the pace of both runs' hosts, which this one's is not taken to have
    assert max(errors[f"{q}_tpot_ms"] for q in ("median", "p90")) < 0.04
    assert max(errors[f"{q}_ttft_ms"] for q in ("median", "p90")) < 0.12  # it jumps by a launch


def test_a_slow_day_of_one_host_is_not_taken_for_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same server twice at the same rate, and the second time with a host that takes 1.6 times as long for all."""
    monkeypatch.chdir(tmp_path)
    usual = load(START)
    slow = replace(usual, host=usual.host.at(1.6))
    found = fit([served(8, usual), served(8, slow)], usual, H200, hold_out=False)
    parts = {each.part: each for each in found.parts}

    for each in found.parts:
        if each.part.startswith(("decode steps", "steps with chunks", "attention")):
            assert not each.told or each.factor == pytest.approx(1, abs=0.04), each
    # more hosts are slow for a while than fast, and the first one's takes as long as the profile says
    # (at 6, 8, 10 and 12 requests a second its launches are found to be 0.97 to 1.05 times as long)
    assert parts["launches by graph pieces"].factor == pytest.approx(1, abs=0.06)
    first, second = cast(list[float], found.profile.provenance["paces"])
    assert first == pytest.approx(1, abs=0.05)
    assert second == pytest.approx(1.6, rel=0.1)
    assert any("the host of q8 took 1." in note for note in found.profile.notes)


def test_a_factor_bends_its_part_alone() -> None:
    profile = load(START)
    logs = np.zeros(len(PARTS))
    logs[len(DECODES) + 1 + CHUNKS.index(1024)] = np.log(1.5)
    bent = changed(profile, logs)
    at = np.array([128.0, 1024.0, 8192.0, 362.0387])  # the last lies in the middle between 128 and 1,024
    factors = between(bent.gpu_time.chunk_residual, at) / between(profile.gpu_time.chunk_residual, at)

    assert factors[:3] == pytest.approx([1, 1.5, 1])
    assert factors[3] == pytest.approx(1.5**0.5, rel=0.01)
    assert replace(bent, gpu_time=profile.gpu_time) == profile
    assert changed(profile, np.zeros(len(PARTS))).host == profile.host
    assert len(PARTS) - 1 == CLIENT


@pytest.mark.parametrize("another", [False, True])
@pytest.mark.parametrize("start", [0, 512])
def test_attention_of_all_prompts_has_one_factor(another: bool, start: int) -> None:
    """Of a whole prompt of 4,096 tokens, for which our engine of November had another kernel, and behind 512 others."""
    profile = load("h200-opt-13b-chairlift-0.1" if another else START)
    if another:
        profile = replace(profile, gpu_time=replace(profile.gpu_time, whole_pair_s=profile.gpu_time.pair_s / 2))
    cool = replace(profile, gpu_time=replace(profile.gpu_time, hot_chunk=0.0, hot_computed=0.0))
    logs = np.zeros(len(PARTS))
    logs[PARTS.index("attention of prompts")] = np.log(3)
    once, thrice = (
        Calibrated(each).step(Batch((Chunk(start, 4096),), 0, 0)).first / 1e12 for each in (cool, changed(cool, logs))
    )

    pairs = 4096 * start + 4096 * 4097 / 2
    taken = pairs * profile.gpu_time.pair_s / (2 if another and not start else 1)
    assert thrice - once == pytest.approx(2 * taken, rel=1e-4)


def test_parts_of_carried_profiles_are_off_by_what_was_seen_of_their_steps() -> None:
    """Decode steps, whose sum `carried.yaml` has of recordings, are the sum of parts: as far off as some of these."""
    for seen in carry.known():
        if "versions" not in seen.changes:  # then nothing is carried
            own = load(seen.target)
            there = carry.carried(load(seen.source), specs.model(own.model), specs.gpu(own.gpu), own.parallel)
            parts = np.log(taken(there) / taken(own))[: len(DECODES) + 1]
            assert parts.min() - 0.02 < np.log1p(seen.total[0] / 100) < parts.max() + 0.02, seen


def test_what_is_known_beforehand_is_what_other_engines_showed() -> None:
    start, model = load(START), specs.model("qwen3-30b-a3b")
    other, older, alike = (
        np.linalg.inv(precision(start, model, H200, 1, "0.26")),
        np.linalg.inv(precision(start, specs.model("llama-3.1-8b"), H200, 1, "0.23")),
        np.linalg.inv(precision(start, specs.model("llama-3.1-8b"), H200, 1, "0.26")),
    )
    decodes, host = slice(0, len(DECODES)), slice(CLIENT - 3, CLIENT)
    reading = slice(len(DECODES) + 1, len(DECODES) + 3)  # steps with chunks of 128 and 1,024 tokens; 8,192 compute
    # carrying to another model misses more than another version does, and that more than another host
    assert (np.diag(other)[decodes] > np.diag(older)[decodes]).all()
    assert (np.diag(older)[host] > np.diag(alike)[host]).all()
    # experts of gpt-oss-120b read for twice as long as Qwen3's: parts that read them are wrong together
    for parts in (decodes, reading):
        block = other[parts, parts]
        assert (block / np.sqrt(np.outer(np.diag(block), np.diag(block))) > 0.05).all()


def test_the_nearest_profile_is_of_the_model_the_gpu_and_the_version() -> None:
    model = specs.model("llama-3.1-8b")

    assert nearest(model, H200, 1, "0.23").name == "h200-llama-3.1-8b-vllm-0.23"
    assert nearest(model, specs.gpu("h100"), 1, "0.26").name == "h200-llama-3.1-8b-vllm-0.26"


@pytest.mark.parametrize(
    ("model", "gpus", "profile"),
    [
        ("qwen3-8b", 1, "llama-3.1-8b"),  # 16 GB a token, as the Llama; the OPT has 26, gpt-oss and Qwen have experts
        ("qwen3-32b-fp8", 1, "llama-3.1-8b-fp8"),
        ("mixtral-8x7b", 1, "qwen3-30b-a3b"),  # experts in bfloat16
        ("qwen3-30b-a3b-fp8", 1, "qwen3-30b-a3b"),  # gpt-oss-120b's weights are as wide, but in MXFP4
        ("gpt-oss-20b", 1, "gpt-oss-120b"),
        ("qwen3-32b", 2, "llama-3.1-70b-fp8-tp2"),  # the only one of two GPUs without experts
        ("qwen3-235b-a22b", 2, "qwen3-30b-a3b-tp2-ep"),
    ],
)
def test_of_a_model_without_a_profile_the_nearest_is_of_one_alike(model: str, gpus: int, profile: str) -> None:
    assert nearest(specs.model(model), H200, gpus, "0.26").name == f"h200-{profile}-vllm-0.26"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--bench", "b.json"], "give either --scenario S, or --model M and --gpu G"),
        (["b.json", "--model", "opt-13b", "--gpu", "h200"], "b.json: results are given with --bench"),
        (["--bench", "no.json", "--model", "opt-13b", "--gpu", "h200"], "no.json: no such file"),
        (["--bench", "b.json", "--model", "opt-31b", "--gpu", "h200"], "opt-31b"),
        (["--bench", "b.json", "--model", "opt-13b", "--gpu", "h200", "--from", "x"], "no profile 'x'"),
        (
            ["--bench", "b.json", "./b.json", "--model", "opt-13b", "--gpu", "h200"],
            "b.json: is given twice",
        ),
        (
            ["--bench", "b.json", "c.json", "--model", "opt-13b", "--gpu", "h200"],
            "c.json: model_id: must be of one model with b.json, whose server calls it 'm' (got 'other')",
        ),
        (
            ["--bench", "long.json", "--model", "opt-13b", "--gpu", "h200"],
            "long.json: the deployment does not answer 1 of its 2 requests: the longest has 9,003 tokens, max_model",
        ),
        (
            ["--bench", "b.json", "none.json", "--model", "opt-13b", "--gpu", "h200"],
            "none.json: none of its 2 requests was answered",
        ),
        (
            ["--bench", "b.json", "--model", "opt-13b", "--recording", "r"],
            "--recording: must not be given beside --bench",
        ),
        (["--from", "x", "--model", "opt-13b"], "--from: goes with --bench"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = {"arrival_s": [0.0, 1.0], "first_token_s": [0.5, 1.5], "last_token_s": [1.0, 2.0]}
    lengths = {"prompt_tokens": [5, 6], "output_tokens": [3, 3]}
    document = result_of({name: np.array(v) for name, v in {**columns, **lengths}.items()})
    failed = {"output_lens": [0, 0], "ttfts": [0.0, 0.0], "itls": [[], []], "errors": ["x", "x"], "completed": 0}
    for name, changes in (
        ("b", {}),
        ("c", {"model_id": "other"}),
        ("none", failed),
        ("long", {"input_lens": [5, 9000]}),
    ):
        Path(f"{name}.json").write_text(json.dumps(document | changes))
    found = chairlift("calibrate", *arguments)

    assert found.status == 2
    assert rule in found.err
