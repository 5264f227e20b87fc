"""The engine on the CPU: whatever a policy does to a request, its tokens are those of a plain forward pass.

Tokens are chosen greedily. `tiny.plain` computes everything anew, in double precision, from the weights alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

from kit.command import Result, chairlift
from kit.executions import POLICIES, Rows, Ticking, made, many
from kit.places import IMPORTS

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")

from chairlift.backend import machine  # noqa: E402
from chairlift.backend.fitting.recording import Recording  # noqa: E402
from chairlift.backend.gpu import runner, step_graphs  # noqa: E402
from chairlift.backend.gpu.engine import TorchEngine  # noqa: E402
from chairlift.backend.gpu.settings import Torch  # noqa: E402
from chairlift.backend.parallel import ONE, Parallel  # noqa: E402
from chairlift.policies.base import PolicyError, Scheduler, Step  # noqa: E402
from chairlift.policies.orca import Orca  # noqa: E402
from chairlift.policies.static import Static  # noqa: E402
from chairlift.policies.tgi import Tgi  # noqa: E402
from chairlift.policies.vllm import Vllm  # noqa: E402
from chairlift.sim.replica import executing  # noqa: E402
from chairlift.sim.replica.session_prompts import Turns  # noqa: E402
from chairlift.sim.study import Limits  # noqa: E402
from kit.tiny import (  # noqa: E402 - torch may be absent
    GPU,
    LONGEST,
    MODEL,
    Answers,
    Kept,
    answers,
    check_greedy,
    executed,
    plain,
    prompt_of,
    save,
    system,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights."""
    return save(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", autouse=True)
def _steady() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "time", Ticking())
        yield


def column(got: Answers, name: str) -> np.ndarray[Any, Any]:
    return got.served.engines[0].records.runs()[name]


# a plain forward pass


def test_every_token_of_the_plain_forward_pass_depends_on_all_before_it() -> None:
    tokens = list(range(40))
    logits = plain(tokens)
    for i in (0, 7, 38):
        other = plain([*tokens[:i], 96, *tokens[i + 1 :]])
        assert torch.equal(other[:i], logits[:i])
        assert ((other[i:] - logits[i:]).abs().amax(-1) > 0.01).all()


# whatever a policy does


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=4)
@given_(
    rows=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 90), st.integers(1, 40)), min_size=2, max_size=5),
    size=st.integers(2, 4),
    blocks=st.integers(9, 20),
    block_size=st.sampled_from([16, 32]),
    budget=st.integers(5, 100),
    prefix=st.integers(0, 60),
    graphs=st.booleans(),
)
def test_greedy_tokens_are_those_of_a_plain_forward_pass(
    folder: Path, name: str, rows: Rows, size: int, blocks: int, block_size: int, budget: int, prefix: int, graphs: bool
) -> None:
    scheduler, chosen = POLICIES[name]
    options = chosen(size)
    if scheduler is Vllm:
        options |= {"max_num_batched_tokens": max(budget, size)}
    else:  # set aside and padded: a batch must fit
        blocks = 4 * 9
    got = answers(folder, made(rows, 2, prefix), scheduler, options, graphs, blocks=blocks, block_size=block_size)

    cached = scheduler is Vllm and options.get("enable_prefix_caching", True)
    check_greedy(got, block_size if cached else 16)
    assert all(status == 1 for status in got.served.requests.status)


# what must really have happened


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_preempted_requests_are_computed_again(folder: Path, ahead: bool, cache: bool, block_size: int) -> None:
    options = {"async_scheduling": ahead, "enable_prefix_caching": cache, "max_num_batched_tokens": 40}
    rows = [(0, 17 + 5 * i, 40 - i) for i in range(5)]
    got = answers(folder, made(rows), Vllm, options, blocks=12 * 16 // block_size, block_size=block_size)

    assert sum(got.served.columns()["preemptions"]) >= 2
    check_greedy(got, block_size if cache else 16)


@pytest.mark.parametrize("ahead", [False, True])
def test_cached_blocks_are_reused(folder: Path, ahead: bool) -> None:
    rows = [(0, 60, 5), (0, 90, 20), (0, 70, 3), (100, 65, 9), (100, 33, 4), (200, 80, 2)]
    got = answers(folder, made(rows, 1, 55), Vllm, {"async_scheduling": ahead, "max_num_batched_tokens": 64})

    assert got.served.columns()["cached_tokens"] == [0, 48, 48, 48, 32, 48]  # whole blocks, but for the first request
    computed = sum(prompt for _, prompt, _ in rows) - 48 * 4 - 32
    assert column(got, "prefill_tokens").sum() == computed
    check_greedy(got)


@pytest.mark.parametrize("room", [1024, 1])
def test_prompts_are_computed_in_chunks_beside_decodes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Their blocks enter the tables in the graph of the step; without ``room`` for all, before it."""
    monkeypatch.setattr(runner, "CELLS", room)
    options = {"max_num_batched_tokens": 16, "async_scheduling": False, "enable_prefix_caching": False}
    got = answers(folder, made([(0, 10, 30), (0, 90, 5), (0, 33, 5)]), Vllm, options)

    assert column(got, "chunks").sum() >= 1 + 6 + 2
    assert ((column(got, "chunks") > 0) & (column(got, "decodes") > 0)).sum() >= 6
    check_greedy(got)


@pytest.mark.parametrize("pad_to", ["batch", "global"])
def test_a_static_batch_is_really_padded(folder: Path, pad_to: str) -> None:
    # prompts of 3, 50 and 17 are padded to 50; answers of 1, 7 and 30 end apart; the second batch's are 2, 2 and 5
    rows = [(0, 3, 1), (0, 50, 7), (0, 17, 30), (0, 20, 2), (0, 21, 2), (0, 1, 5)]
    got = answers(folder, made(rows), Static, {"batch": 3, "pad_to": pad_to})

    padded = column(got, "padded")
    assert padded[0] == 47 + 33
    assert padded[1:30].tolist() == [1] * 6 + [2] * 23
    assert padded[30] == 1 + 20
    assert padded[31:].tolist() == [0, 2, 2, 2] + ([3] * 25 if pad_to == "global" else [])  # as long as the first batch
    check_greedy(got)


def test_a_prefill_of_tgi_is_padded(folder: Path) -> None:
    got = answers(folder, made([(0, 3, 20), (0, 50, 7), (40, 5, 9), (40, 31, 2)]), Tgi, {"waiting_served_ratio": 0.0})

    assert column(got, "padded").tolist()[0] == 47
    assert column(got, "padded").sum() == 47 + 26
    check_greedy(got)


@dataclass
class PaddedChunks(Scheduler):
    """Prompts with padding in front, 9 tokens of each a step."""

    block_tokens = 1

    def schedule(self, step: Step) -> int:
        step.decode_all()
        for request in step.prefilling:
            step.run(request, min(9, request.remaining))
        for request in list(step.waiting):
            step.admit(request, min(9, request.remaining), request.prompt_tokens + request.max_tokens, pad=11)
        return 1


def test_a_padded_prompt_may_be_computed_in_chunks(folder: Path) -> None:
    got = answers(folder, made([(0, 30, 6), (0, 9, 5), (0, 1, 9), (60, 40, 4)]), PaddedChunks, {})

    assert column(got, "chunks").sum() == 4 + 1 + 1 + 5
    assert column(got, "padded").tolist()[0] == 3 * 11
    check_greedy(got)


@dataclass
class CachedPadding(Vllm):
    """Padding in front of prompts that others find in the cache."""

    enable_prefix_caching: bool = True
    async_scheduling: bool = False

    def schedule(self, step: Step) -> int:
        step.decode_all()
        for request in list(step.waiting):
            step.admit(request, request.remaining - step.cached_tokens(request), pad=21)
        return 1


def test_a_padded_prompt_can_be_found_in_the_cache(folder: Path) -> None:
    got = answers(folder, made([(0, 60, 9), (100, 60, 20)], 1, 60), CachedPadding, {})

    assert got.served.columns()["cached_tokens"] == [0, 48]
    check_greedy(got)


@dataclass
class WidePadding(Orca):
    """More padding than a sequence can be long."""

    pad: int = LONGEST + 1

    def schedule(self, step: Step) -> int:
        step.decode_all()
        for request in list(step.waiting):
            step.admit(request, request.remaining, pad=self.pad)
        return 1


def test_padding_as_long_as_the_longest_sequence_and_longer(folder: Path) -> None:
    trace = made([(0, 90, 70), (0, 3, 20)])
    check_greedy(answers(folder, trace, WidePadding, {"pad": LONGEST}))

    with pytest.raises(PolicyError, match="WidePadding: step 1: a padding of 161 tokens: 0 to 160, the longest"):
        answers(folder, trace, WidePadding, {})


def test_whatever_the_policy_the_answers_are_the_same(folder: Path) -> None:
    trace = made(many(6, 2))
    found = [answers(folder, trace, scheduler, chosen(3), blocks=60).tokens for scheduler, chosen in POLICIES.values()]

    assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("policy", [Vllm, Orca])
def test_clients_that_give_up_leave_the_others_alone(folder: Path, policy: type[Scheduler]) -> None:
    got = answers(
        folder, made([(0, 20, 3), (0, 20, 40), (5, 30, 4), (5, 9, 39)]), policy, {}, limits=Limits(timeout_s=0.1)
    )

    assert got.served.columns()["status"] == [1, 3, 1, 3]
    assert all(0 < n < 39 for n in got.served.columns()["emitted_tokens"][1::2])
    check_greedy(got)


def test_a_larger_batch_than_there_are_rows(folder: Path) -> None:
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=2))
    setup = system(made([(0, 5, 5)] * 3), Orca, {"reserve": "declared"}, kept)

    with pytest.raises(
        (RuntimeError, PolicyError), match="more than 2 sequences at once: raise the backend's max_batch"
    ):
        executed(setup)


# defects


@pytest.mark.parametrize("pad_to", ["batch", "global"])
def test_padding_may_reach_beyond_the_longest_sequence(folder: Path, pad_to: str) -> None:
    # each fits 160 tokens; the first, dead and padded, goes on to 100 + 149
    got = answers(folder, made([(0, 100, 5), (0, 5, 150)]), Static, {"batch": 2, "pad_to": pad_to})

    check_greedy(got)


def test_the_padding_of_tgi_does_not_use_the_pool_up(folder: Path) -> None:
    # TGI sets nothing aside for padding: Σ prompt + max_tokens is 318 of 336 slots; padded to 90 it would be 743
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=8))
    trace = made([(0, 5, 40)] * 5 + [(0, 90, 3)])
    served = executed(system(trace, Tgi, {}, kept, blocks=21))

    check_greedy(Answers(served, kept.built[-1].generated))


@pytest.mark.parametrize("shared", [False, True])
def test_a_chunk_that_was_taken_back_is_not_in_the_cache(folder: Path, shared: bool) -> None:
    # Request 0 computes 32 tokens a step. In the third its chunk is planned (blocks 5 and 6 of 7), then request 1,
    # which is more urgent, needs a block: request 0 is preempted, and block 5 is never filled, so it must not be found.
    # (Since vLLM 0.31 request 0 would not be held to 32 tokens while it is alone.)
    options = {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 32, "scheduling_policy": "priority"}
    options["version"] = "0.30"
    prefix = {"prefix_group": [0, -1], "prefix_tokens": [96, 0]} if shared else {}
    trace = made([(0, 100, 3), (1, 16, 2)], priority=[9, 0], **prefix)
    got = answers(folder, trace, Vllm, {**options, "async_scheduling": False}, blocks=7)

    assert got.served.columns()["preemptions"] == [1, 0]
    assert column(got, "prefill_tokens").sum() == 32 + 32 + 16 + 36  # four blocks are found
    check_greedy(got)


@dataclass
class Fickle(Vllm):
    """Runs and admits whoever fits; then, in the plans ``regrets``, preempts the oldest of them after all."""

    async_scheduling: bool = False
    chunk: int = 64
    regrets: tuple[int, ...] = (0,)
    plans: int = 0

    def schedule(self, step: Step) -> int:
        while not step.decode_all():
            step.preempt(list(step.running)[-1])
        for request in step.prefilling:
            step.run(request, min(self.chunk, request.remaining))
        for request in list(step.waiting):
            left = request.remaining - step.cached_tokens(request)
            if not step.admit(request, min(self.chunk, left), request.prompt_tokens + request.max_tokens):
                break
        if self.plans in self.regrets and len(step.running) > 1:
            step.preempt([*step.prefilling, *step.running][0])
        self.plans += 1
        return 1


def test_a_preempted_request_takes_those_with_it_that_were_to_find_what_it_computes(folder: Path) -> None:
    # 1 is admitted on 64 tokens that 0 is to compute in this plan, 2 on those and 16 that 1 is to compute; 3 is another
    prefixes = {"prefix_group": [0, 0, 0, -1], "prefix_tokens": [96, 90, 95, 0]}
    trace = made([(0, 100, 4), (0, 90, 5), (0, 95, 6), (0, 30, 7)], **prefixes)
    got = answers(folder, trace, Fickle, {}, blocks=60)
    columns = got.served.columns()

    assert columns["preemptions"] == [1, 1, 1, 0]
    assert columns["cached_tokens"] == [0, 64, 80, 0]
    assert column(got, "prefill_tokens").tolist()[:2] == [30, 64 + 26 + 15]
    assert column(got, "running").tolist()[:2] == [1, 4]
    check_greedy(got)


def test_a_next_turn_finds_its_last_answer_in_the_cache(folder: Path) -> None:
    # 20 tokens and an answer of 30; then a prompt of 70 that begins with them: 48 are cached, 28 of them generated
    got = answers(folder, made([(0, 20, 30), (10_000, 70, 5)], session=[0, 0]), Vllm, {})

    assert got.served.columns()["cached_tokens"] == [0, 48]
    check_greedy(got)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The prompts that the engine was given, each the same whenever it was."""
    found: dict[int, list[int]] = {}
    make = Turns.prompt

    def prompt(turns: Turns, request: int) -> list[int]:
        tokens = [n % MODEL.vocab for n in make(turns, request)]
        assert found.setdefault(request, tokens) == tokens
        return tokens

    monkeypatch.setattr(Turns, "prompt", prompt)
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_a_turn_that_comes_before_the_answer_it_repeats(folder: Path, given: dict[int, list[int]], ahead: bool) -> None:
    # Turn 2 repeats 20 + 100 tokens, but comes when some ten are there. Turn 3 comes when all is done, and goes on
    # from the whole of turn 1's answer: it must not find what turn 2 stored in its stead.
    trace = made([(0, 20, 100), (30, 125, 4), (10_000, 140, 3)], session=[0, 0, 0])
    got = answers(folder, trace, Vllm, {"async_scheduling": ahead})

    [first, second, third] = [got.tokens[i] for i in range(3)]
    same = [a == b for a, b in zip(given[1][20:120], first, strict=True)]
    assert 3 < same.index(False) < 40  # as far as it was known, then made up
    assert given[1][:20] == given[0]
    assert given[2][:120] == given[0] + first
    assert given[2][125:129] == second
    assert got.served.columns()["cached_tokens"][1] in (16, 32, 48)
    assert got.served.columns()["cached_tokens"][2] == 112  # 119 tokens are stored, and the answer of turn 2 is apart
    assert len(third) == 3
    check_greedy(got, given=[given[i] for i in range(3)])


@settings(max_examples=15)
@given_(
    rows=st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 30), st.integers(-1, 1)),
        min_size=2,
        max_size=7,
    ),
    ahead=st.booleans(),
    priority=st.booleans(),
    blocks=st.integers(11, 24),
    timeout=st.sampled_from([None, 0.08]),
)
def test_turns_of_sessions_have_the_tokens_of_a_plain_forward_pass(
    folder: Path,
    given: dict[int, list[int]],
    rows: list[tuple[int, int, int, int]],
    ahead: bool,
    priority: bool,
    blocks: int,
    timeout: float | None,
) -> None:
    given.clear()
    lengths: dict[int, int] = {}
    at, table = 0, []
    for gap, more, output, session in rows:
        at += gap
        prompt = more if session < 0 else lengths.get(session, 0) + more
        prompt = more if prompt + output > LONGEST else prompt  # it has forgotten
        lengths[session] = prompt + output
        table.append((at, prompt, output))
    options = {"async_scheduling": ahead, "max_num_batched_tokens": 64, "max_num_seqs": 3}
    options |= {"scheduling_policy": "priority" if priority else "fcfs", "long_prefill_token_threshold": 32}
    trace = made(table, session=[s for *_, s in rows], priority=[(5 * i) % 3 for i in range(len(rows))])
    got = answers(folder, trace, Vllm, options, blocks=blocks, limits=Limits(timeout_s=timeout))

    check_greedy(got, given=[given.get(i, []) for i in range(len(rows))])


@settings(max_examples=20)
@given_(
    rows=st.lists(st.tuples(st.sampled_from([0, 9]), st.integers(1, 90), st.integers(1, 20)), min_size=3, max_size=7),
    prefix=st.integers(16, 90),
    sessions=st.booleans(),
    blocks=st.integers(11, 40),
    ahead=st.booleans(),
    chunk=st.sampled_from([16, 40, 160]),
    regrets=st.sets(st.integers(0, 6), min_size=1),
)
def test_whoever_is_preempted_in_whichever_plan(
    folder: Path,
    given: dict[int, list[int]],
    rows: Rows,
    prefix: int,
    sessions: bool,
    blocks: int,
    ahead: bool,
    chunk: int,
    regrets: set[int],
) -> None:
    given.clear()
    if sessions:
        turns = [(10 * i, 20 + 30 * i, 6) for i in range(4)]
        trace = made(turns + [(30, p, o) for _, p, o in rows], session=[0] * 4 + [-1] * len(rows))
    else:
        trace = made(rows, 1, prefix)
    options = {"async_scheduling": ahead, "chunk": chunk, "regrets": tuple(regrets)}
    got = answers(folder, trace, Fickle, options, blocks=blocks)

    check_greedy(got, given=[given[i] for i in range(len(trace))])


# tokens


def run_once(**options: Any) -> Mapping[int, list[int]]:
    kept = Kept(Torch(device="cpu", max_batch=4, **options))
    executed(system(made([(0, 9, 8), (0, 30, 8)]), Vllm, {}, kept))
    tokens: dict[int, list[int]] = kept.built[-1].generated
    return tokens


def test_a_step_is_filled_up_to_a_larger_size_whose_graph_is_faster() -> None:
    """Times as of Llama-3.1-8B's gates and ups, whose product is slow for 448 rows; what is nearly as fast stays."""
    times = {384: 126.0, 416: 151.0, 448: 266.0, 464: 161.0, 480: 162.0, 512: 159.0, 544: 191.0}
    found = step_graphs.through(times)
    assert found == {384: 384, 416: 416, 448: 464, 464: 464, 480: 480, 512: 512, 544: 544}
    assert step_graphs.through({1: 9.0, 2: 8.0, 4: 3.0, 8: 5.0}) == {1: 4, 2: 4, 4: 4, 8: 8}


def test_a_step_tells_how_many_tokens_its_rows_see() -> None:
    """Four rows of a whole prompt see 1, 2, 3, 4 tokens; two with 9 behind 5 of padding before them see 10 and 11."""
    none = np.zeros(0, np.int32)
    spans = np.array([[0, 4, 4, 0, 0], [4, 2, 16, 5, 1]], np.int32)
    flat = step_graphs.Flat(np.zeros((7, 6), np.int32), spans, none, none)
    assert flat.seen() == pytest.approx((1 + 2 + 3 + 4 + 10 + 11) / 6)
    assert flat._replace(spans=none).seen() == 0


def test_random_weights_are_those_of_the_seed() -> None:
    assert run_once(seed=1) == run_once(seed=1)
    assert run_once(seed=1) != run_once(seed=2)


def test_at_a_temperature_tokens_are_drawn_in_proportion(folder: Path) -> None:
    torch.manual_seed(4)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 20_000
    for temperature in (0.5, 2.0):
        engine = Torch(device="cpu", temperature=temperature).build(MODEL, GPU, ONE)
        assert isinstance(engine, TorchEngine)
        engine.prepare(4, 16, 64, named=False)
        drawn = torch.bincount(engine._runner.sample(logits.expand(n, 4)).long(), minlength=4).double() / n
        wanted = (logits.double() / temperature).softmax(-1)
        error = (wanted * (1 - wanted) / n).sqrt()
        assert ((drawn - wanted).abs() < 5 * error).all()


def test_prompts_are_equal_where_the_trace_says_so() -> None:
    trace = made([(0, 60, 1), (0, 50, 1), (0, 60, 1)], 1, 40)
    first, second, third = (prompt_of(trace, i, 16) for i in range(3))

    assert first[:32] == second[:32] == third[:32]  # whole blocks
    assert first[32:50] != second[32:50]
    assert len(set(first)) > 30


def test_a_model_whose_layers_are_in_fp8_is_served_so() -> None:
    engine = Torch(device="cpu").build(replace(MODEL, quantization="fp8"), GPU, ONE)

    assert isinstance(engine, TorchEngine)
    assert engine.options.quantization == "fp8"
    assert "layers' products in FP8" in engine.assumptions()["engine"]
    assert engine.dtype.itemsize == 4  # what is not in FP8


def test_assumptions_say_that_steps_were_executed(folder: Path) -> None:
    kept = Kept(Torch(device="cpu", weights=str(folder), max_batch=2))
    executed(system(made([(0, 5, 2)]), Orca, {}, kept))

    lines = kept.built[0].assumptions()
    assert lines["engine"] == f"executed, not modelled: tiny, float32, weights of {folder.name}, on the CPU"
    assert lines["software"].startswith(f"torch {torch.__version__}")


# messages

SCENARIO = f"""\
model: {{name: tiny, layers: 1, hidden: 32, heads: 2, kv_heads: 2, head_size: 16, ffn: 48, vocab: 97,
         max_model_len: {LONGEST}}}
gpu: h200
kv: {{blocks: 40}}
backend: {{name: torch, device: cpu}}
policy: {{name: vllm}}
workload: {{requests: 4, arrivals: {{burst: {{}}}}, prompt_tokens: 20, output_tokens: 3}}
"""


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    Path("s.yaml").write_text(SCENARIO)
    return chairlift("run", "s.yaml", "--quiet", "--out", "out", *arguments)


def refused(result: Result, *words: str) -> None:
    """One line with all these words, status 2, and nothing else."""
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    for word in words:
        assert word in result.err


in_a_folder_of_its_own = pytest.mark.usefixtures("_in_a_folder_of_its_own")


@in_a_folder_of_its_own
def test_the_command_runs_the_engine() -> None:
    result = run()

    assert (result.status, result.err) == (0, "")
    assert "executed, not modelled: tiny, float32, random weights, on the CPU" in Path("out/summary.json").read_text()
    [recorded] = json.loads(Path("out/recording/tiny_summary.json").read_text())["experiments"]
    assert recorded["engine"]["graph_tokens"] == 1024  # the largest step that is a graph, `chairlift.backend.gpu`


@in_a_folder_of_its_own
def test_a_recording_says_how_many_gpus_shared_the_model() -> None:
    result = run("--set", "tensor_parallel=2", "--set", "model.vocab=96")

    assert (result.status, result.err) == (0, "")
    summary = json.loads(Path("out/recording/tiny-tp2_summary.json").read_text())
    recorded = Recording(Path(), "tiny-tp2", summary["engine"], {})
    assert recorded.parallel == Parallel(tensor=2)
    assert recorded.shape == "tiny"
    assert len(summary["experiments"]) == 1


@in_a_folder_of_its_own
@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["tensor_parallel=2"], ["tiny: 97 (vocabulary) cannot be shared out over 2 GPUs"]),
        (["kv.block_size=8"], ["blocks hold a multiple of 16 tokens (got 8)"]),
        (["backend.weights=nowhere"], ["nowhere/config.json: no such file"]),
        (["replicas=2"], ["replicas", "one replica"]),
        (['replicas=[{"count": 1}, {"count": 1}]'], ["replicas", "one replica"]),
        (['failures={"mtbf_s": 5, "mttr_s": 1}'], ["failures", "one replica"]),
        (['autoscale={"max": 2, "target_waiting": 3}'], ["autoscale", "one replica"]),
        (
            ['replicas=[{"count": 1, "role": "prefill"}, {"count": 1, "role": "decode"}]', 'link={"gb_per_s": 50}'],
            ["replicas", "one replica"],
        ),
    ],
    ids=lambda value: value[0][:24] if isinstance(value, list) else None,
)
def test_what_the_engine_cannot_serve(assignments: list[str], words: list[str]) -> None:
    arguments = [part for assignment in assignments for part in ("--set", assignment)]

    refused(run(*arguments), *words)


@in_a_folder_of_its_own
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_weights_beyond_the_memory_of_the_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("meminfo").write_text("MemTotal:         2048 kB\nMemAvailable:        1 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", Path("meminfo"))

    refused(run(), "not enough memory: 4 requests and 40 blocks of a prefix cache would take some")
    Path("meminfo").write_text("MemTotal:         2048 kB\nMemAvailable:       60 kB\n")

    refused(run(), "not enough memory: tiny with a KV pool of 40 blocks would take some")


@in_a_folder_of_its_own
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there() -> None:
    refused(run("--set", "backend.device=cuda"), "torch sees no CUDA device here; device: cpu runs tiny models")


@in_a_folder_of_its_own
def test_settings_are_checked() -> None:
    refused(run("--set", "backend.device=gpu"), "backend.device", "cuda")
    refused(run("--set", "backend.max_batch=0"), "backend.max_batch: must be at least 1 (got 0)")
    refused(run("--set", "backend.temperature=-1"), "backend.temperature: must be at least 0")
    refused(run("--set", "backend.weight=x"), "backend.weight", "did you mean 'weights'?")


@pytest.mark.parametrize("missing", ["torch", "safetensors"])
def test_without_the_extra(tmp_path: Path, folder: Path, missing: str) -> None:
    (tmp_path / "s.yaml").write_text(SCENARIO)
    weights = f"sys.argv += ['--set', 'backend.weights={folder}']" if missing == "safetensors" else ""
    model = f"sys.argv += ['--set', 'model={folder / 'config.json'}', '--set', 'kv.blocks=20']" if weights else ""
    script = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["chairlift", "run", "s.yaml", "--quiet", "--out", "out"]
{weights}
{model}
from chairlift.sim.cli.main import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*needs {missing}: pip install 'chairlift\[gpu\]'\n", done.stderr)


def test_a_bare_checkout_on_a_gpu_machine_can_measure() -> None:
    """There torch, CuPy, NumPy, PyYAML and annotated-types are enough: nothing of the simulator's is imported."""
    script = """
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pydantic", "simpy", "pyarrow", "typer", "rich", "scipy", "joblib", "plotly"}:
            raise ImportError(name + " is blocked")
        if name.startswith(("chairlift.sim", "chairlift.policies")):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import torch
torch.cuda.is_available = lambda: False
from chairlift.backend import specs
assert specs.model("llama-3.1-8b").layers == 32 and specs.gpu("h200").memory_gib > 140
sys.argv = ["bench", "attention"]
runpy.run_module("chairlift.backend.gpu.bench", run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(IMPORTS)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )

    assert (done.returncode, done.stderr) == (2, "error: torch sees no CUDA device here\n")
