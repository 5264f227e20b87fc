"""Fits recover what a recording was made with, and refuse data that cannot tell."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated import profile
from chairlift.backend.calibrated.pricing import Calibrated
from chairlift.backend.cuda_graphs import padded
from chairlift.backend.fitting import fit as calibrate
from chairlift.backend.fitting import residuals
from chairlift.backend.fitting.recording import Recording, RecordingError, read
from chairlift.backend.fitting.steps import steps_of
from chairlift.sim.calibration import fit as fitting
from kit.command import chairlift
from kit.synthetic import Log, Planted, record, write

MODEL = "llama-3.1-8b"
PLANTED = Planted()


@pytest.fixture(scope="module")
def log() -> Log:
    return record(PLANTED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, log: Log) -> Path:
    return write(tmp_path_factory.mktemp("made"), [log])


@pytest.fixture(scope="module")
def fit(folder: Path) -> calibrate.Fit:
    return calibrate.fit(steps_of(read(folder, MODEL).select(None)))


def made(folder: Path, log: Log) -> Path:
    return write(folder, [log])


@pytest.mark.parametrize(
    ("part", "name", "planted", "within"),
    [
        ("gpu", "pair_s", PLANTED.pair, 0.15),
        ("host", "schedule_s", PLANTED.schedule, 0.1),
        ("host", "schedule_request_s", PLANTED.schedule_request, 0.1),
        ("host", "update_s", PLANTED.update, 0.1),
        ("host", "update_request_s", PLANTED.update_request, 0.1),
        ("host", "piecewise_s", PLANTED.piecewise, 0.05),
        ("host", "eager_s", PLANTED.eager, 0.05),
    ],
)
def test_a_planted_coefficient_is_found(
    fit: calibrate.Fit, part: str, name: str, planted: float, within: float
) -> None:
    assert getattr(getattr(fit, part), name) == pytest.approx(planted, rel=within)


def test_a_clock_that_sinks_is_found_and_none_where_none_does(fit: calibrate.Fit, tmp_path: Path) -> None:
    hot = Planted(hot_computed=0.12, hot_kv=0.4)
    found = calibrate.fit(steps_of(read(write(tmp_path / "hot", [record(hot)]), MODEL).select(None))).gpu

    assert found.hot_computed == pytest.approx(hot.hot_computed, rel=0.25)
    assert found.hot_kv == pytest.approx(hot.hot_kv, rel=0.25)
    assert max(fit.gpu.hot_computed, fit.gpu.hot_kv) < 0.03


@pytest.mark.parametrize("decodes", [1, 8, 64, 256])
def test_planted_context_cost_is_found(fit: calibrate.Fit, decodes: int) -> None:
    factor = float(profile.between(fit.gpu.kv_residual, np.array([float(decodes)]))[0])

    assert fit.gpu.kv_s * factor == pytest.approx(PLANTED.kv, rel=0.12)
    assert fit.gpu.kv_mixed_s == pytest.approx(PLANTED.kv_mixed, rel=0.12)


@pytest.mark.parametrize("tokens", [1, 16, 128, 200, 256])
def test_planted_decode_steps_are_found(fit: calibrate.Fit, tokens: int) -> None:
    context, computed = 400 * tokens, padded(tokens, 512)
    priced = Calibrated(profile.Profile("made", MODEL, "h200", "vllm", fit.gpu, fit.host))

    cost = priced.step(Batch((), tokens, context))

    assert cost.first / 1e12 == pytest.approx(PLANTED.gpu(computed, tokens, context, 0, False), rel=0.05)


@pytest.mark.parametrize("tokens", [600, 1024, 3000, 7000])
def test_planted_chunks_are_found(fit: calibrate.Fit, tokens: int) -> None:
    gpu = fit.gpu
    found = gpu.matmuls(np.array([float(tokens)]), gpu.chunk_residual)[0] + gpu.chunk_s + gpu.request_s + gpu.sequence_s
    found += gpu.pair_s * tokens * (tokens + 1) / 2

    assert found == pytest.approx(PLANTED.gpu(tokens, 0, 0, tokens * (tokens + 1) // 2, True), rel=0.03)


DRAFTS = replace(PLANTED, drafts=3, each_pass=0.6e-3, draft_token=1e-6, draft=4e-6, graph=0.004, eager=0.02)
SPECULATIVE = {"method": "eagle3", "num_speculative_tokens": 3, "synthetic_acceptance_length": 2.4}


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("drafted"), [record(DRAFTS)], f"{MODEL}-eagle3", **SPECULATIVE)


def test_what_drafts_add_is_found(fit: calibrate.Fit, drafted: Path, tmp_path: Path) -> None:
    recording = read(drafted, f"{MODEL}-eagle3")
    found = calibrate.fit_drafts(steps_of(recording.select(None)), fit.gpu)

    assert (recording.shape, recording.drafts, recording.accepted) == (MODEL, profile.Drafts("eagle3", 3), 2.4)
    added = found.gpu.drafting
    assert added is not None
    assert added.pass_s == pytest.approx(DRAFTS.each_pass, rel=0.1)
    assert added.token_s == pytest.approx(DRAFTS.draft_token, rel=0.15)
    priced = Calibrated(profile.Profile("made", MODEL, "h200", "vllm", found.gpu, found.host))
    for decodes in (4, 32, 64, 128):
        cost = priced.step(Batch((), decodes, decodes * 400, 0, None, 3 * decodes, 3))
        planted = DRAFTS.gpu(4 * decodes, decodes, decodes * 400, 0, False)
        assert cost.first / 1e12 == pytest.approx(planted, rel=0.04), decodes
    for tokens in (1024, 4000):
        cost = priced.step(Batch((Chunk(0, tokens),), 0, 0, proposes=3))
        planted = DRAFTS.gpu(tokens, 0, 0, tokens * (tokens + 1) // 2, True)
        assert cost.first / 1e12 == pytest.approx(planted, rel=0.04), tokens
    assert replace(found.gpu, drafting=None) == fit.gpu
    for name, planted in (("graph_s", DRAFTS.graph), ("piecewise_s", DRAFTS.piecewise), ("eager_s", DRAFTS.eager)):
        assert getattr(found.host, name) == pytest.approx(planted, rel=0.1), name
    other = write(tmp_path, [record(DRAFTS, seed=2, name="other")], f"{MODEL}-eagle3", **SPECULATIVE)
    steps = steps_of(read(other, f"{MODEL}-eagle3").select(None))
    for regime, off in residuals.summary([residuals.foresee(found.gpu, found.host, steps)]).items():
        assert off["median"] < 0.03, regime


def test_steps_with_drafts_are_priced_by_the_form(fit: calibrate.Fit) -> None:
    """64 decodes that verify 3 drafts each: 256 tokens; then 3 passes."""
    drafting = profile.DraftTime(pass_s=0.5e-3, token_s=2e-6, draft_s=3e-6)
    gpu = replace(fit.gpu, drafting=drafting, sequence_s=1e-6, kv_s=0.0, hot_computed=0.0)
    priced = Calibrated(profile.Profile("made", MODEL, "h200", "vllm", gpu, fit.host))
    dead = 192  # tokens for nothing, which go through the same matmuls
    for chunks, tokens, sequences in (((), 256, dead), ((Chunk(0, 1000),), 1256, 0)):
        alone = priced.step(Batch(chunks, 64, 64_000, padded=dead))
        cost = priced.step(Batch(chunks, 64, 64_000, 0, None, 192, 3))
        more = 3 * 0.5e-3 + tokens * 2e-6 + 192 * 3e-6 - sequences * 1e-6
        assert (cost.first - alone.first) / 1e12 == pytest.approx(more, abs=1e-9)
        assert (cost.slope, cost.steps) == (0, 1)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"method": 3}, "engine.extra.speculative needs a method"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be a whole number from 1 to 32 (got 0)"),
    ],
)
def test_what_a_recording_says_of_drafts_is_checked(tmp_path: Path, change: dict[str, object], rule: str) -> None:
    folder = write(tmp_path, [record(DRAFTS)], MODEL, **{**SPECULATIVE, **change})

    with pytest.raises(RecordingError, match=re.escape(rule)):
        read(folder, MODEL)


def test_steps_of_several_stages_are_not_fitted() -> None:
    recording = Recording(Path("r"), f"{MODEL}-pp2", {"extra": {"pipeline_parallel_size": 2}}, {})
    with pytest.raises(RecordingError, match=r"^r: engine\.extra\.pipeline_parallel_size must be 1: .* \(got 2\)$"):
        _ = recording.parallel

    done = chairlift("calibrate", "--backend", "torch", "--model", f"{MODEL}-pp2")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: --model: must name no stages")
    assert f"(got '{MODEL}-pp2')" in done.err


def test_unseen_steps_are_foreseen(fit: calibrate.Fit, tmp_path: Path) -> None:
    other = write(tmp_path, [record(PLANTED, seed=2, name="other")])

    steps = steps_of(read(other, MODEL).select(None))
    ahead = residuals.summary([residuals.foresee(fit.gpu, fit.host, steps)])
    on_gpu = residuals.summary([residuals.on_gpu(fit.gpu, fit.host, steps)])

    for regime in ("decode-only", "chunk-only", "mixed"):
        assert ahead[regime]["median"] < 0.03, regime
        assert on_gpu[regime]["median"] < 0.03, regime
    assert on_gpu["decode-only"]["p95"] < 0.05


def test_stalls_do_not_move_the_fit(fit: calibrate.Fit, log: Log, tmp_path: Path) -> None:
    stalled = Log("stalled", [list(row) for row in log.steps], log.requests)
    late = 0.0
    for i, row in enumerate(stalled.steps):
        row[0] += late
        late += 0.05 if i % 150 == 149 else 0.0
        row[1] += late

    other = calibrate.fit(steps_of(read(made(tmp_path, stalled), MODEL).select(None)))

    assert other.gpu.kv_s == pytest.approx(fit.gpu.kv_s, rel=0.1)
    assert other.host.eager_s == pytest.approx(fit.host.eager_s, rel=0.1)


def test_too_few_steps_are_refused(log: Log, tmp_path: Path) -> None:
    short = Log("short", log.steps[:150], log.requests)

    done = chairlift("calibrate", "--recording", str(made(tmp_path, short)), "--model", MODEL)

    assert done.status == 2
    assert "150 steps are too few: at least 200 are needed" in done.err


def test_a_term_that_nothing_tells_is_refused(log: Log, tmp_path: Path) -> None:
    decodes = Log("decodes", [row for row in log.steps if not row[5]], log.requests)

    done = chairlift("calibrate", "--recording", str(made(tmp_path, decodes)), "--model", MODEL)

    assert done.status == 2
    assert "cannot be identified" in done.err
    assert "record" in done.err


def test_one_batch_size_does_not_tell_the_context(log: Log, tmp_path: Path) -> None:
    rows = [list(row) for row in log.steps]
    for row in rows:
        row[8] = 640
    same = Log("same", rows, log.requests)

    with pytest.raises(calibrate.CalibrationError, match=r"kv_s cannot be identified: .* at least a factor of two"):
        calibrate.fit(steps_of(read(made(tmp_path, same), MODEL).select(None)))


def broken(folder: Path, what: str, text: str) -> Path:
    (folder / f"{MODEL}_{what}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_damaged_recordings_are_refused(log: Log, tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        return made(tmp_path / name, log)

    good = gzip.decompress((fresh("good") / f"{MODEL}_steps.csv.gz").read_bytes()).decode()
    lines = good.splitlines()
    cells = lines[5].split(",")
    cases = [
        (broken(fresh("a"), "steps", good.replace("done_s", "ended_s", 1)), "steps.csv.gz: lacks the columns done_s"),
        (
            broken(fresh("b"), "steps", "\n".join([*lines[:5], ",".join([*cells[:2], "soon", *cells[3:]])])),
            "steps.csv.gz:6: done_s must be a number (got 'soon')",
        ),
        (
            broken(fresh("c"), "steps", "\n".join([*lines[:5], ",".join([*cells[:6], "-4", *cells[7:]])])),
            "steps.csv.gz:6: prefill_tokens must be at least 0 (got -4)",
        ),
        (broken(fresh("d"), "steps", "\n".join([lines[0], *reversed(lines[1:])])), "made: done_s runs back at step"),
    ]
    (fresh("e") / f"{MODEL}_steps.csv.gz").write_bytes(b"\x1f\x8bnot gzip")
    cases.append((tmp_path / "e", "steps.csv.gz: cannot be read: "))
    (fresh("f") / f"{MODEL}_requests.csv.gz").unlink()
    cases.append((tmp_path / "f", "requests.csv.gz: no such file"))
    (fresh("g") / f"{MODEL}_summary.json").write_text("{", encoding="utf-8")
    cases.append((tmp_path / "g", "summary.json:1: not JSON: "))
    summary = {"engine": {}, "experiments": [{"name": "made", "engine": {"max_num_seqs": 256}}]}
    (fresh("h") / f"{MODEL}_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    cases.append((tmp_path / "h", "made lacks num_gpu_blocks, max_num_batched_tokens, block_size"))
    cases.append((tmp_path / "nowhere", "no such folder"))

    for folder, message in cases:
        done = chairlift("calibrate", "--recording", str(folder), "--model", MODEL)
        assert done.status == 2, message
        assert message in done.err.replace("\n", " "), done.err

    with pytest.raises(RecordingError, match=r"no recording of 'opt-13b': it has llama-3\.1-8b"):
        read(fresh("i"), "opt-13b")
    with pytest.raises(RecordingError, match=r"no experiment 'maid' of .* did you mean 'made'"):
        read(fresh("j"), MODEL).select(["maid"])


def test_the_command_writes_a_profile_that_runs(folder: Path, log: Log, tmp_path: Path) -> None:
    write(tmp_path / "two", [log, record(PLANTED, seed=3, name="more")])
    target, plot = tmp_path / "mine.json", tmp_path / "parity.html"

    done = chairlift(
        *("calibrate", "--recording", str(tmp_path / "two"), "--model", MODEL),
        *("--out", str(target), "--plot", str(plot)),
    )

    assert (done.status, done.err) == (0, "")
    assert "steps of experiments left out of the fit" in done.out
    assert plot.read_text(encoding="utf-8").startswith("<!doctype html>")
    loaded = profile.load(str(target))
    assert loaded.gpu == "h200"
    assert loaded.provenance["experiments"] == ["made", "more"]
    assert set(loaded.errors["steps"]) == {"decode-only", "chunk-only", "mixed"}
    scenario = tmp_path / "mine.yaml"
    scenario.write_text(
        f"model: {MODEL}\ngpu: h200\npolicy: vllm\nbackend: mine.json\n"
        "workload: {requests: 20, arrivals: {poisson: {rate_per_s: 5}}, prompt_tokens: 100, output_tokens: 10}\n",
        encoding="utf-8",
    )

    run = chairlift("run", str(scenario), "--out", str(tmp_path / "out"), "--uncertainty", "3")

    assert (run.status, run.err) == (0, "")
    assert f"profile {loaded.name} ({loaded.digest})" in run.out.replace("\n", " ")
    [spread] = json.loads((tmp_path / "out" / "uncertainty.json").read_text(encoding="utf-8"))
    assert spread["draws"] == 3
    low, middle, high = spread["intervals"]["mean_tpot_ms"].values()
    assert low < middle < high


def test_a_profile_has_the_graphs_of_the_engine_that_was_recorded(log: Log, tmp_path: Path) -> None:
    """Read as of an engine whose graphs end at 1,024 tokens, steps of 513 to 1,024 count as graphs."""
    source = read(write(tmp_path, [log], graph_tokens=1024), MODEL)

    steps = steps_of(source.select(None))
    found = fitting.fitted(source, source.select(None))

    tokens = np.array([row[7] + row[5] for row in log.steps])
    assert ((steps.kind == 2) == (tokens > 1024)).all()
    assert found.graph_tokens == 1024


def test_more_noise_makes_wider_intervals() -> None:
    from chairlift.backend.base import Batch, Chunk
    from chairlift.backend.calibrated.resampled import Resampled

    shipped = profile.load("h200-opt-13b-vllm-0.23")
    calm = {
        k: [each | {"rms": 0.0, "steps": [0.0] * len(each["steps"])} for each in v] for k, v in shipped.spread.items()
    }
    sure = replace(shipped, spread=calm)
    batch = Batch((Chunk(0, 900),), 20, 9000)
    plain = Calibrated(shipped).step(batch).first

    assert {Resampled(sure, None, i).step(batch).first for i in range(1, 5)} == {plain}
    assert len({Resampled(shipped, None, i).step(batch).first for i in range(1, 9)}) > 4
    assert Resampled(shipped, None, 3).step(batch) == Resampled(shipped, None, 3).step(batch)
