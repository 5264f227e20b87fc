"""Whole runs with drafts: against runs without, closed forms, and whatever happens to requests meanwhile."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.backend.base import Batch, StepCost
from chairlift.policies.base import KvGroups, Step
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica.decode_group import NOBODY_ELSE
from chairlift.sim.results.metrics import Pool, summarise
from chairlift.sim.results.records import DRAFT_COLUMNS
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Failures, Limits, Outage, Slo
from chairlift.sim.workload.acceptance import Draws
from kit import crowds
from kit.crowds import check_a_journal_changes_nothing, check_those_who_leave, drafts, mixed, table, tight
from kit.leaping import backends
from kit.places import TRUTH
from kit.worlds import Affine, check_books, play, trace_of

RECORDED = TRUTH / "h200-vllm-0.26" / "llama-3.1-8b-eagle3_requests.csv.gz"
TIMES = ("first_token_s", "last_token_s")


@dataclass
class WithDeadTokens(Affine):
    """As `Affine`, each decode with so many dead tokens beside its own, which lie in its context too."""

    dead: int = 3

    def step(self, batch: Batch) -> StepCost:
        dead = self.dead * batch.decodes
        return super().step(batch._replace(context=batch.context + dead, drafts=dead))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@settings(max_examples=8)
@given(seed=st.integers(0, 99), tokens=st.integers(1, 7))
def test_drafts_of_which_none_is_kept_are_dead_tokens(asynchronous: bool, cached: bool, seed: int, tokens: int) -> None:
    """With room for all, a run is the plain one with so many dead tokens a decode."""
    trace = trace_of(table(seed, 20, 20_000))

    def policy() -> Vllm:
        return Vllm(async_scheduling=asynchronous, enable_prefix_caching=cached, max_num_batched_tokens=100_000)

    plain = play(trace, policy, lambda: WithDeadTokens(dead=tokens), leap=False)
    drafted = play(trace, policy, Affine, speculate=drafts(tokens, rates=[0] * tokens))

    # all but how full the pool was: slots are taken ahead of drafts
    assert drafted.outcome()[:-1] == plain.outcome()[:-1]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_request_alone_takes_a_step_for_each_output(asynchronous: bool, share: float) -> None:
    """1,000 ps a step, whatever is in it: from first token to last as many steps as outputs."""
    speculate = drafts(4, rates=[share] * 4)
    accepts = Draws((share,) * 4, 0)
    world = play(
        trace_of([(0, 30, 200)]),
        lambda: Vllm(async_scheduling=asynchronous),
        lambda: Affine(token=0, context=0),
        speculate=speculate,
    )
    r = world.requests
    counts = {name: r.extra[name][0] for name in DRAFT_COLUMNS}
    outputs = (r.finished[0] - r.first_token[0]) // 1000

    assert counts["verifications"] == outputs == r.messages()[0] - 1
    assert counts["draft_tokens"] == 4 * outputs
    assert counts["accepted_tokens"] == 199 - outputs
    if share in (0.0, 1.0):
        assert outputs == {0.0: 199, 1.0: -(-199 // 5)}[share]
        assert accepts(0, 1, 4) == 4 * share


def test_the_same_drafts_are_kept_whatever_the_policy_does() -> None:
    trace = trace_of(table(1, 60, 20_000))
    speculate = drafts(3, length=2.4)
    worlds = [
        play(trace, lambda n=n, a=a: Vllm(max_num_seqs=n, async_scheduling=a), speculate=speculate)  # type: ignore[misc]
        for n, a in ((64, False), (5, False), (5, True))
    ]

    assert len({tuple(world.requests.finished) for world in worlds}) > 1
    assert len({tuple(world.requests.extra["accepted_tokens"]) for world in worlds}) == 1


def test_the_accepted_length_is_the_one_asked_for() -> None:
    world = play(trace_of([(0, 20, 2000) for _ in range(20)]), Vllm, speculate=drafts(3, length=2.4))
    summary = summarise(world.requests, [e.records for e in world.engines], [Pool(1000, 16, 1)], Slo(), 1.0)

    # 20 answers of some 833 outputs; a standard error of 1.2 / sqrt(16,660) is 0.01
    assert summary["accepted_length"] == pytest.approx(2.4, abs=0.03)
    assert summary["drafts_wasted"] == pytest.approx(1 - 1.4 / 3, abs=0.01)
    assert summary["draft_tokens"] == sum(world.requests.extra["draft_tokens"])


OF_ANY = {**crowds.OF_ANY, "asynchronous": st.booleans()}


@settings(max_examples=25)
@given(
    **OF_ANY,
    **crowds.SHORT_OF_MEMORY,
)
def test_books_balance_however_tight_memory_is(
    seed: int,
    tokens: int,
    asynchronous: bool,
    cached: bool,
    priority: bool,
    blocks: int,
    budget: int,
    method: str,
) -> None:
    """Every token comes once, every gap is counted, no block is left: `audit` and `check_books`."""
    policy = tight(asynchronous, cached, priority, budget)
    check_books(
        play(mixed(seed), policy, blocks=blocks, max_model_len=112, speculate=drafts(tokens, method, length=1.6))
    )


@pytest.mark.parametrize("asynchronous", [False, True])
@settings(max_examples=12)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 7), blocks=st.integers(8, 30))
def test_windows_as_wide_as_all_requests_take_a_block_in_each_group(
    asynchronous: bool, seed: int, tokens: int, blocks: int
) -> None:
    """Where nothing slides out, two groups of layers on twice the blocks are one group, preemptions included."""
    trace = trace_of(table(seed, 30))

    def policy() -> Vllm:
        return Vllm(async_scheduling=asynchronous, enable_prefix_caching=False, max_num_batched_tokens=100)

    more: dict[str, Any] = {"max_model_len": 112, "speculate": drafts(tokens, length=1.6)}
    one = play(trace, policy, blocks=blocks, **more)
    two = play(trace, policy, blocks=2 * blocks, groups=KvGroups((0, 4096)), **more)

    assert two.outcome()[:-1] == one.outcome()[:-1]


@pytest.mark.parametrize("asynchronous", [False, True])
@settings(max_examples=8)
@given(seed=st.integers(0, 99), tokens=st.integers(1, 7), window=st.integers(4, 60))
def test_with_windows_drafts_of_which_none_is_kept_are_dead_tokens(
    asynchronous: bool, seed: int, tokens: int, window: int
) -> None:
    """With room for all, a run is the plain one with so many dead tokens a decode; it gives back what slides out."""
    trace, groups = trace_of(table(seed, 20, 20_000)), KvGroups((window, 0))

    def policy() -> Vllm:
        return Vllm(async_scheduling=asynchronous, enable_prefix_caching=False, max_num_batched_tokens=100_000)

    plain = play(trace, policy, lambda: WithDeadTokens(dead=tokens), leap=False, groups=groups)
    drafted = play(trace, policy, Affine, speculate=drafts(tokens, rates=[0] * tokens), groups=groups)

    assert drafted.outcome()[:-1] == plain.outcome()[:-1]
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    if longest > window + 2 * drafted.engines[0].pool.block_size:  # two blocks lie before every window at its end
        assert drafted.engines[0].records.runs()["spared_blocks"].max() > 0


@settings(max_examples=25)
@given(
    **OF_ANY,
    blocks=st.integers(20, 60),
    window=st.integers(4, 40),
)
def test_books_balance_where_layers_give_blocks_back(
    seed: int, tokens: int, asynchronous: bool, cached: bool, priority: bool, blocks: int, window: int
) -> None:
    policy = tight(asynchronous, cached, priority, 40)
    groups, speculate = KvGroups((window, 0)), drafts(tokens, "draft_model" if seed % 2 else "eagle3", length=1.6)
    check_books(play(mixed(seed), policy, blocks=blocks, max_model_len=112, groups=groups, speculate=speculate))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    requests=st.integers(1, 16),
    longest=st.integers(10, 400),
    tokens=st.integers(1, 7),
    kept=st.sampled_from([1.0, 1.3, 2.0]),
    asynchronous=st.booleans(),
    cached=st.booleans(),
    priority=st.sampled_from([False, False, True]),
    blocks=st.integers(8, 300),
    budget=st.integers(16, 300),
    method=st.sampled_from(["eagle3", "draft_model"]),
    model_len=st.sampled_from([128, 300, 1 << 20]),
    backend=backends,
    outage=st.booleans(),
)
def test_those_that_verify_together_do_what_each_does_alone(
    seed: int,
    requests: int,
    longest: int,
    tokens: int,
    kept: float,
    asynchronous: bool,
    cached: bool,
    priority: bool,
    blocks: int,
    budget: int,
    method: str,
    model_len: int,
    backend: Affine,
    outage: bool,
) -> None:
    """Leap ≡ step with drafts, to the picosecond: each request at its own place of its own draws."""
    draw = np.random.default_rng(seed)
    arrivals = np.sort(draw.integers(0, requests * 20_000, requests))
    room = min(model_len, 16 * blocks)  # a server does not start with a longer model
    rows = []
    for at in arrivals:
        prompt = int(draw.integers(2, min(60, room - 8)))
        rows.append((int(at), prompt, int(draw.integers(1, min(longest, room - prompt)))))
    trace = trace_of(
        rows,
        priority=[i % 3 for i in range(requests)],
        prefix_group=np.arange(requests) % 4,
        prefix_tokens=np.minimum(np.array([prompt for _, prompt, _ in rows]), 20),
        max_tokens=np.array([output for *_, output in rows]) + (np.arange(requests) % 2) * 3,
    )
    more: dict[str, Any] = {}
    if outage:
        failures = Failures(schedule=[Outage(replica=0, at_s=1e-8 * requests, for_s=1e-8)])
        more = {"replicas": 2, "limits": Limits(timeout_s=6e-8 * longest), "failures": failures}
    speculate = drafts(tokens, method, length=min(kept, 1 + tokens * 0.9))
    policy = tight(asynchronous, cached, priority, budget)
    leapt, stepped = (
        play(trace, policy, lambda: backend, blocks, leap=leap, max_model_len=room, speculate=speculate, **more)
        for leap in (True, False)
    )

    assert leapt.outcome() == stepped.outcome()
    assert NOBODY_ELSE == {}  # which all plans share
    assert {name: list(leapt.requests.extra[name]) for name in DRAFT_COLUMNS} == {
        name: list(stepped.requests.extra[name]) for name in DRAFT_COLUMNS
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_steps_of_a_steady_group_are_planned_many_at_a_time(asynchronous: bool) -> None:
    """8 answers of 4,000 tokens: some 1,250 steps of a group; each kind of step and each end is a plan of its own."""
    plans: list[int] = []

    class Counted(Vllm):
        def schedule(self, step: Step) -> int:
            plans.append(len(step.running))
            return super().schedule(step)

    policy = partial(Counted, async_scheduling=asynchronous, enable_prefix_caching=False)
    trace = trace_of([(0, 20, 4000) for _ in range(8)])
    world = play(trace, policy, lambda: Affine(), 4000, speculate=drafts(3, synthetic=3.2))

    steps = sum(engine.planner.steps for engine in world.engines)
    assert steps > 1200
    assert len(plans) < steps / 5


@pytest.mark.parametrize("asynchronous", [False, True])
@settings(max_examples=25)
@given(seed=st.integers(0, 999), timeout=st.floats(5e-9, 2e-7), at=st.floats(1e-9, 3e-7))
def test_clients_that_give_up_and_replicas_that_fail(asynchronous: bool, seed: int, timeout: float, at: float) -> None:
    check_those_who_leave(table(seed, 25, 5000), asynchronous, timeout, at, speculate=drafts(3, length=2))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_journal_changes_nothing(asynchronous: bool) -> None:
    check_a_journal_changes_nothing(asynchronous, blocks=8, speculate=drafts(3, length=2))


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recordings in ../shared/truth")
def test_a_recorded_run_with_drafts_is_predicted(tmp_path: Path) -> None:
    """vLLM 0.26 on an H200, Llama-3.1-8B with an EAGLE3 head, 3 drafts, synthetic acceptance of 2.4, 6 requests/s.

    Nothing is fitted to runs of it: drafting costs what one cell of the decode grid showed, a request of 128 tokens
    (`Shares.draft_us`).
    """
    with gzip.open(RECORDED, "rt") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == "conv_poisson_q6"]
    names = ("arrival_s", "prompt_tokens", "output_tokens")
    lines = [",".join(names), *(",".join(row[name] for name in names) for row in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "s.yaml").write_text(
        "model: llama-3.1-8b\ngpu: h200\nmax_model_len: 16384\nbackend: {name: roofline, by_part: true}\n"
        "policy: {name: vllm, version: 0.26, max_num_batched_tokens: 8192, max_num_seqs: 256, num_gpu_blocks: 53794}\n"
        "speculate: {method: eagle3, tokens: 3, acceptance: {synthetic: 2.4}, draft: {vocab: 32000}}\n"
        "workload: {file: t.csv, max_tokens: exact}\n"
    )
    [found] = load(tmp_path / "s.yaml").setups
    summary = simulate(found).summary
    times = {name: np.array([float(row[name]) for row in rows]) for name in ("arrival_s", *TIMES)}
    outputs = np.array([int(row["output_tokens"]) for row in rows])
    tpot = (times["last_token_s"] - times["first_token_s"])[outputs > 1] * 1e3 / (outputs[outputs > 1] - 1)

    assert summary["duration"] == pytest.approx(times["last_token_s"].max() - times["arrival_s"].min(), rel=0.03)
    assert summary["median_tpot_ms"] == pytest.approx(np.median(tpot), rel=0.06)
    e2e = (times["last_token_s"] - times["arrival_s"]) * 1e3
    assert summary["median_e2el_ms"] == pytest.approx(np.median(e2e), rel=0.06)
