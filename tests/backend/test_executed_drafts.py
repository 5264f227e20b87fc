"""Speculation executed on the CPU: the steps of the modelled run, and tokens of plain forward passes of model and head.

How many drafts are kept is drawn as a scenario says, so an answer is what the model likes best only where no draft was
kept; where one was, it is what the head likes best. `PlainHead` computes that anew, in double precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.draft_shapes import head_of
from chairlift.backend.drafting import WithDrafts
from chairlift.backend.fitting.recording import read
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.policies.vllm import Vllm
from chairlift.sim.results.records import DRAFT_COLUMNS, Status
from chairlift.sim.study import Limits, Speculate
from chairlift.sim.workload.acceptance import Acceptance, Draws
from chairlift.sim.workload.random_streams import stream
from chairlift.sim.workload.trace import Trace
from kit.clusters import Served, serve
from kit.command import chairlift
from kit.executions import Rows, Ticking, made, many
from kit.plain_head import PlainHead

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")

from chairlift.backend.base import Verified  # noqa: E402
from chairlift.backend.gpu import weights as random  # noqa: E402
from chairlift.backend.gpu.engine import TorchEngine  # noqa: E402
from chairlift.backend.gpu.settings import Torch  # noqa: E402
from chairlift.sim.replica import executing  # noqa: E402
from kit.tiny import (  # noqa: E402 - torch may be absent
    CLOSE,
    CONFIG,
    GPU,
    MODEL,
    Answers,
    Kept,
    answers,
    executed,
    plain,
    prompts,
    save,
    system,
    weights,
)

HEAD = replace(head_of(MODEL, "eagle3"), vocab=48)  # each stands for the model's token of twice its number
COLUMNS = ("emitted_tokens", "status", "preemptions", "cached_tokens", *DRAFT_COLUMNS)
STEPS = (
    "chunks",
    "prefill_tokens",
    "decodes",
    "context",
    "running",
    "waiting",
    "held_blocks",
    "kv_tokens",
    "preempted",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights."""
    return save(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", autouse=True)
def _steady() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "time", Ticking())
        patch.setattr(random, "STD", 0.25)  # so large that every draft depends on all before it
        yield


@dataclass
class Run:
    """A run with drafts, its answers, the head that drafted, and what each request's decodes verified."""

    served: Served
    tokens: dict[int, list[int]]
    head: Any
    verified: dict[int, list[Verified]]


def speculated(
    folder: Path,
    trace: Trace,
    options: dict[str, Any],
    speculate: Speculate,
    graphs: bool = True,
    **more: Any,
) -> tuple[Run, Served]:
    """``trace`` on the tiny model's engine with drafts, and the same modelled: all come at once, so steps are alike."""
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=32, graphs=graphs))
    told = Drafts(speculate.method, speculate.tokens)
    found = []
    verified: dict[int, list[Verified]] = {}
    launch = TorchEngine.launch

    def watched(engine: TorchEngine, batch: Any) -> None:
        heads.append(engine.head)
        for each in batch.members.verified:
            verified.setdefault(each.request, []).append(each)
        launch(engine, batch)

    heads: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "launch", watched)
        for backend in (kept, Efficiency()):
            told_with: Any = WithDrafts(backend, HEAD, told)  # type: ignore[arg-type]
            setup = system(trace, Vllm, options, told_with, speculate=speculate, **more)
            [group] = setup.groups
            group.speculation = group.make_scheduler().speculation(speculate.method, speculate.tokens)
            found.append(executed(setup) if backend is kept else serve(setup, leap=False))
    run, modelled = found
    return Run(run, kept.built[-1].generated, heads[-1], verified), modelled


def _plain_head(head: Any, tokens: list[int]) -> PlainHead:
    """It reads the third of the model's two layers, the middle one and the third from the end, as far as there are."""
    inputs: list[Any] = []
    plain(tokens[:-1], inputs=inputs)
    shape = (MODEL.heads, MODEL.kv_heads, MODEL.head_size)
    numbers = (float(CONFIG["rms_norm_eps"]), float(CONFIG["rope_theta"]))
    return PlainHead(
        head, [inputs[i] for i in (1, 1, 0)], tokens, weights()["model.embed_tokens.weight"], shape, *numbers
    )


def check(run: Run) -> int:
    """Each token is one that model or head likes best, by what was kept; how many drafts were kept."""
    trace, [group] = run.served.setup.trace, run.served.setup.groups
    cached = group.scheduler_settings.get("enable_prefix_caching", True)
    ahead = cached and group.speculation is not None and group.speculation.prefix == "lookahead"
    every = prompts(Answers(run.served, run.tokens), group.block_size if cached else 16, int(ahead))
    block, preemptions = group.block_size, run.served.columns()["preemptions"]
    total = 0
    for i, status in enumerate(run.served.requests.status):
        if status != Status.FINISHED:
            continue
        prompt, answer = every[i], run.tokens[i]
        assert len(answer) == trace.output_tokens[i], f"request {i}"
        by_head: set[int] = set()
        plainly = _plain_head(run.head, prompt + answer) if len(answer) > 1 else None
        for each in run.verified.get(i, []):
            place = each.start + 1 - len(prompt)  # of the first draft in the answer
            assert each.kept <= each.drafts
            if not each.kept or place >= len(answer):  # it was planned before the answer was known to be whole
                continue
            drafts = answer[place : place + each.kept]
            assert plainly is not None
            assert all(draft % 2 == 0 for draft in drafts)
            by_head |= set(range(place, place + each.kept))
            # Where hashes know nothing of the token behind a block, whoever comes back may find one that another
            # request has computed, before another token: the head's keys are of that, as in vLLM before 0.33.
            others = (other[:block] for j, other in enumerate(every) if j != i)
            if cached and not ahead and preemptions[i] and prompt[:block] in others:
                continue
            for draft, likes in zip(drafts, plainly.drafts(each.start, drafts), strict=False):
                assert float(likes.max() - likes[draft // 2]) <= CLOSE, f"request {i}: drafts at {place}"
        logits = plain(prompt + answer)[len(prompt) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        wrong = [n for n in range(len(answer)) if n not in by_head and short[n] > CLOSE]
        assert wrong == [], f"request {i}: token {wrong[0]} of {len(answer)}"
        total += len(by_head)
    return total


def check_alike(run: Run, modelled: Served) -> None:
    """Steps and counts of the executed run are those of the modelled one."""
    for name in COLUMNS:
        assert run.served.columns()[name] == modelled.columns()[name], name
    steps = [
        [engine.records.runs()[name].tolist() for name in STEPS] for engine in (*run.served.engines, *modelled.engines)
    ]
    assert steps[0] == steps[1]


def accepting(tokens: int, *rates: float) -> Speculate:
    return Speculate(method="eagle3", tokens=tokens, acceptance=Acceptance(rates=list(rates)))


@pytest.mark.parametrize(
    ("ahead", "cache", "graphs"), [(False, False, False), (True, False, True), (False, True, True), (True, True, False)]
)
def test_drafts_are_those_of_a_plain_head_and_steps_those_of_a_modelled_run(
    folder: Path, ahead: bool, cache: bool, graphs: bool
) -> None:
    options = {"async_scheduling": ahead, "enable_prefix_caching": cache, "max_num_batched_tokens": 50}
    run, modelled = speculated(folder, made(many(5, 1), 2, 40), options, accepting(3, 0.8, 0.7, 0.6), graphs)

    assert check(run) > 40
    check_alike(run, modelled)


@example(
    rows=[(0, 26, 18), (0, 67, 9), (0, 22, 17)],
    tokens=3,
    rate=0.6,
    ahead=False,
    cache=True,
    graphs=False,
    blocks=12,
    block_size=16,
    budget=23,
    prefix=16,
    version="0.31",
)
@settings(max_examples=12)
@given(
    rows=st.lists(st.tuples(st.just(0), st.integers(1, 90), st.integers(1, 50)), min_size=1, max_size=5),
    tokens=st.integers(1, 5),
    rate=st.sampled_from([0.0, 0.6, 1.0]),
    ahead=st.booleans(),
    cache=st.booleans(),
    graphs=st.booleans(),
    blocks=st.integers(12, 30),
    block_size=st.sampled_from([16, 32]),
    budget=st.integers(12, 100),
    prefix=st.integers(0, 60),
    version=st.sampled_from(["0.31", "0.33"]),
)
def test_whatever_happens_to_requests_meanwhile(
    folder: Path,
    rows: Rows,
    tokens: int,
    rate: float,
    ahead: bool,
    cache: bool,
    graphs: bool,
    blocks: int,
    block_size: int,
    budget: int,
    prefix: int,
    version: str,
) -> None:
    """Preempted, found in the cache, at the end of what the model can hold: tokens and steps are as they must be."""
    options = {"async_scheduling": ahead, "enable_prefix_caching": cache, "max_num_batched_tokens": budget}
    trace = made(rows, 2, prefix)
    parts = (folder, trace, {**options, "version": version}, accepting(tokens, *[rate] * tokens), graphs)
    run, modelled = speculated(*parts, blocks=blocks * 16 // block_size, block_size=block_size)

    kept = check(run)
    check_alike(run, modelled)
    if rate == 0:
        assert kept == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_requests_lose_their_drafts(folder: Path, ahead: bool) -> None:
    options = {"async_scheduling": ahead, "max_num_batched_tokens": 60}
    rows = [(0, 17 + 5 * i, 40 - i) for i in range(5)]
    run, modelled = speculated(folder, made(rows), options, accepting(2, 0.9, 0.8), blocks=13)

    assert sum(run.served.columns()["preemptions"]) >= 2
    assert check(run) > 20
    check_alike(run, modelled)


def test_a_run_of_which_no_draft_is_kept_has_the_tokens_of_a_run_without(folder: Path) -> None:
    trace, options = made(many(6, 2)), {"enable_prefix_caching": False}
    run, _ = speculated(folder, trace, options, accepting(3, 0, 0, 0))

    assert run.tokens == answers(folder, trace, Vllm, options).tokens
    assert sum(run.served.columns()["accepted_tokens"]) == 0 < sum(run.served.columns()["draft_tokens"])


@pytest.mark.parametrize("version", ["0.31", "0.33"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_next_turn_finds_its_last_answer_in_the_cache(folder: Path, ahead: bool, version: str) -> None:
    """20 tokens and an answer of 30; then a prompt of 70 that begins with them: 49 of these 50 are in KV.

    0.31 computes the last block found once more. Where it plans behind a step's output, it finds of drafts that were
    kept what the next step's plan finds: none plans on after the last one, which completed the third block.
    """
    options = {"async_scheduling": ahead, "version": version}
    run, _ = speculated(
        folder, made([(0, 20, 30), (10_000, 70, 15)], session=[0, 0]), options, accepting(3, 1, 0.5, 0.5)
    )

    found = 48 if version == "0.33" else 32 if ahead else 16
    assert run.served.columns()["cached_tokens"] == [0, found]
    assert check(run) > 10


def test_answers_end_where_the_model_can_hold_no_more(folder: Path) -> None:
    run, modelled = speculated(folder, made([(0, 100, 60), (0, 157, 3), (0, 159, 1)]), {}, accepting(4, 1, 1, 1, 1))

    assert [len(run.tokens[i]) for i in range(3)] == [60, 3, 1]
    assert check(run) >= 40
    check_alike(run, modelled)


def test_how_many_are_kept_is_what_the_scenario_draws(folder: Path) -> None:
    """Of a request alone: by the draws at each position that a step begins with."""
    run, _ = speculated(folder, made([(0, 20, 100)]), {}, accepting(3, 0.8, 0.6, 0.4))
    setup = run.served.setup
    draws = Draws(setup.speculate.acceptance.of(3), int(stream(setup.seed, "acceptance").integers(1 << 62)))

    at, accepted = 1, 0
    for each in run.verified[0]:
        if at == 100:
            break
        assert each.start == 20 + at - 1
        kept = min(draws(0, at, each.drafts), 100 - at - 1)
        assert each.kept == kept
        at, accepted = at + 1 + kept, accepted + kept
    assert at == 100
    assert run.served.columns()["accepted_tokens"] == [accepted]


def test_clients_that_give_up_leave_the_others_alone(folder: Path) -> None:
    trace = made([(0, 20, 3), (0, 20, 100), (5, 30, 4), (5, 9, 100)])
    run, _ = speculated(folder, trace, {}, accepting(2, 0.5, 0.5), limits=Limits(timeout_s=0.1))

    assert run.served.columns()["status"] == [1, 3, 1, 3]
    check(run)


def test_a_head_of_another_shape_is_refused() -> None:
    parts = (MODEL, GPU, ONE)
    for change, told in (({"heads": 8}, "has heads 4 \\(got 8\\)"), ({"vocab": 98}, "at most 97 tokens \\(got 98\\)")):
        with pytest.raises(ValueError, match=told):
            Torch(device="cpu").build(*parts, replace(HEAD, **change), 3)
    with pytest.raises(ValueError, match="drafts are verified on one GPU \\(got 2\\)"):
        Torch(device="cpu").build(MODEL, GPU, Parallel(tensor=2), HEAD, 3)


SCENARIO = """
model: {name: tiny, layers: 1, hidden: 32, heads: 2, kv_heads: 2, head_size: 16, ffn: 48, vocab: 97, max_model_len: 160}
gpu: h200
kv: {blocks: 40}
backend: {name: torch, device: cpu}
policy: {name: vllm}
speculate: {method: eagle3, tokens: 3, acceptance: {synthetic: 2.4}, draft: {vocab: 48}}
workload: {requests: 4, arrivals: {burst: {}}, prompt_tokens: 20, output_tokens: 30}
"""


def test_a_recording_says_what_was_verified(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SCENARIO)
    result = chairlift("run", str(tmp_path / "s.yaml"), "--quiet", "--out", str(tmp_path / "out"))
    assert (result.status, result.err) == (0, "")

    recording = read(tmp_path / "out" / "recording", "tiny-eagle3")
    assert (recording.drafts, recording.accepted, recording.shape) == (Drafts("eagle3", 3), 2.4, "tiny")
    [experiment] = recording.experiments.values()
    steps = experiment.steps
    requests = pq.read_table(tmp_path / "out" / "requests.parquet").to_pydict()
    assert (steps["decode_tokens"] - steps["decode_requests"]).sum() >= sum(requests["draft_tokens"]) > 100
    assert (steps["decode_tokens"] == 4 * steps["decode_requests"]).mean() > 0.8
    said = json.loads((tmp_path / "out" / "summary.json").read_text())["assumptions"]
    assert "drafts by a head of random weights for 48 tokens" in said["engine"]
    assert said["drafts"].startswith("3 by eagle3")


def test_a_method_that_is_not_executed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SCENARIO)
    result = chairlift("run", str(tmp_path / "s.yaml"), "--set", "speculate.method=mtp", "--out", str(tmp_path / "out"))

    assert result.status == 2
    assert "which executes steps: it drafts by eagle3 only (got mtp)" in result.err
