"""``chairlift explain``: lives told in words, against timelines worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chairlift.policies.static import Static
from chairlift.policies.vllm import Vllm
from chairlift.sim.bad_input import BadInput
from chairlift.sim.report.explain import explain, slowest
from chairlift.sim.results import reader as results
from chairlift.sim.results.writer import Writer
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Failures, Limits, Outage, Setup, Study
from kit.clusters import group, link, s, setup_of
from kit.command import SCENARIO, chairlift
from kit.journals import Steady
from kit.worlds import trace_of


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """What is said of a request of a setup, as (ps, words)."""

    def tell(setup: Setup, request: int, journal: bool = True) -> list[tuple[int, str]]:
        study = Study("hand", "", [setup])
        writer = Writer(tmp_path / "out", study)
        outcome = simulate(setup, journal=journal)
        writer.add(outcome)
        writer.close()
        life = explain(results.read(tmp_path / "out").runs[0], [request])[0]
        return [(moment.time_ps, moment.words) for moment in life.moments]

    return tell


MS = 10**9


class Millisecond(Steady):
    """Every step takes 1 ms."""

    def step(self, batch: Any) -> Any:
        return super().step(batch)._replace(first=MS)


COST = Millisecond()


def test_a_request_that_waits_for_a_full_batch_is_chunked_and_decodes(told: Any) -> None:
    # two at a time, 4 tokens a step. A runs from 0 to 5 ms, B to 2 ms; C is admitted at 2 ms with the 3 tokens left
    # beside A's decode, has its last 3 prompt tokens a step later, at 4 ms its first token and at 6 ms its third
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 4, "async_scheduling": False, "enable_prefix_caching": False}
    trace = trace_of([(0, 1, 5), (0, 1, 2), (MS // 2, 6, 3)])

    assert told(setup_of(trace, [group(Vllm, limits, cost=COST)]), 2) == [
        (MS // 2, "arrives at replica 0"),
        (
            MS // 2,
            "queued for 1.50 ms: 1.00 ms because the batch was full (2 requests); "
            "0.50 ms until what was under way had ended",
        ),
        (2 * MS, "admitted"),
        (2 * MS, "chunk 1 of 2: 3 tokens in a step of 1.00 ms, beside 1 decode"),
        (3 * MS, "chunk 2 of 2: 3 tokens in a step of 1.00 ms, beside 1 decode"),
        (4 * MS, "first token, 3.50 ms after its arrival"),
        (4 * MS, "decodes 2 tokens in 2.00 ms, one every 1.00 ms"),
        (6 * MS, "finished: 3 tokens in 5.50 ms"),
    ]


def test_a_preemption_names_its_reason_and_what_is_lost(told: Any) -> None:
    # as in test_journal: B loses 2 + 2 tokens after 3 ms, waits until A has ended at 6 ms, and ends at 9 ms
    setup = setup_of(trace_of([(0, 2, 6), (0, 2, 6)]), [group(Vllm, cost=COST, blocks=4, block_size=2)])

    assert told(setup, 1) == [
        (0, "arrives at replica 0, 1 waiting there before it"),
        (0, "admitted"),
        (0, "prefill: 2 tokens in a step of 1.00 ms, beside 1 other prompt"),
        (1 * MS, "first token, 1.00 ms after its arrival"),
        (1 * MS, "decodes 2 tokens in 2.00 ms, one every 1.00 ms"),
        (
            3 * MS,
            "preempted: the pool has no block left for the next tokens of the running requests; "
            "4 tokens of KV are lost and computed again",
        ),
        (
            3 * MS,
            "queued for 3.00 ms: 2.00 ms because the KV pool had too few free blocks for it; "
            "1.00 ms because others had just been preempted",
        ),
        (6 * MS, "admitted"),
        (6 * MS, "prefill: 5 tokens in a step of 1.00 ms"),
        (7 * MS, "decodes 2 tokens in 2.00 ms, one every 1.00 ms"),
        (9 * MS, "finished: 6 tokens in 9.00 ms"),
    ]


def test_a_static_batch_holds_its_slots(told: Any) -> None:
    setup = setup_of(trace_of([(0, 2, 1), (0, 2, 3), (0, 2, 1)]), [group(Static, {"batch": 2}, cost=COST)])

    assert told(setup, 0)[-2:] == [
        (1 * MS, "has its answer; its slot is held, and paid for, until the batch returns"),
        (3 * MS, "finished: 1 token in 3.00 ms"),
    ]
    assert told(setup, 2)[1] == (0, "queued for 3.00 ms because a batch was under way, which returns as a whole")


def test_a_lost_replica_and_a_hand_over_are_told(told: Any) -> None:
    one = setup_of(
        trace_of([(0, 2, 5), (0, 2, 5)]),
        [group(Vllm, count=2, cost=COST)],
        failures=Failures(schedule=[Outage(replica=1, at_s=s(2.5 * MS), for_s=None)]),
    )
    groups = [group(Vllm, role="prefill", cost=COST), group(Vllm, role="decode", cost=COST)]
    other = setup_of(trace_of([(0, 2, 3)]), groups, link=link(1000))

    lost = [words for _, words in told(one, 1)]
    assert "replica 1 fails, and what was computed here is lost" in lost
    assert lost.index("arrives at replica 1") < lost.index("arrives at replica 0")
    moved = [words for _, words in told(other, 0)]
    assert "its prompt is done; its KV goes to a decode replica" in moved
    assert "admitted: 2 tokens of KV are there already, 1 to compute" in moved


@pytest.mark.parametrize(
    ("setup", "last"),
    [
        (
            setup_of(trace_of([(0, 2, 9)]), [group(Vllm, cost=COST)], limits=Limits(timeout_s=s(2.5 * MS))),
            (3 * MS, "its client gives up, with 3 of 9 tokens"),
        ),
        (
            setup_of(trace_of([(0, 5000, 9)]), [group(Vllm, cost=COST)]),
            (0, "refused: prompt 5,000 + output 9 = 5,009 tokens, over the model's 2,000"),
        ),
    ],
    ids=["timeout", "too long"],
)
def test_how_it_ended_otherwise(told: Any, setup: Setup, last: tuple[int, str]) -> None:
    assert told(setup, 0)[-1] == last


def test_without_a_journal_it_says_what_to_do(told: Any) -> None:
    with pytest.raises(BadInput, match="kept no journal of its requests: run it again with --events"):
        told(setup_of(trace_of([(0, 2, 3)]), [group(Vllm)]), 0, journal=False)


# ---- the command ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(SCENARIO + "compare: [{name: a}, {name: b, policy: orca}]\n")
    assert chairlift("run", "two.yaml", "--out", "out", "--quiet").status == 0
    return Path("out")


def test_explain_tells_one_request(folder: Path) -> None:
    result = chairlift("explain", "3", "--in", "out", "--variant", "a")

    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("request 3  prompt ")
    for words in ("arrives at replica 0", "admitted", "first token", "finished:"):
        assert words in result.out


def test_slowest_are_the_slowest(folder: Path) -> None:
    result = chairlift("explain", "--slowest", "3", "--by", "ttft", "--in", "out", "--variant", "b", "--json")
    run = results.read(folder).pick(None, "b")
    ttft = run.requests("ttft_ms")["ttft_ms"]

    found = json.loads(result.out)
    assert [each["ttft_ms"] for each in found] == sorted(ttft, reverse=True)[:3]
    assert [each["request"] for each in found] == slowest(run, 3, "ttft")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3"], "--variant: there are several runs here, say which: 'a', 'b'"),
        (["3", "--variant", "c"], "--variant: there is no such run – allowed: a, b (got 'c')"),
        (["30", "--variant", "a"], "REQUEST_ID: requests are numbered from 0 to 29 (got 30)"),
        (["--variant", "a"], "explain: give a request's number, or --slowest N"),
        (["3", "--variant", "a", "--by", "e2e"], "--by: no such order – did you mean 'e2el'? (got 'e2e')"),
    ],
)
def test_mistakes_are_named(folder: Path, arguments: list[str], message: str) -> None:
    result = chairlift("explain", *arguments, "--in", "out")

    assert (result.status, result.out, result.err) == (2, "", f"error: {message}\n")


def test_a_folder_without_results_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()

    assert chairlift("explain", "1", "--in", "empty").err == "error: empty: has no study.json: not a results folder\n"
    assert chairlift("report", "none").err == "error: none: no such folder\n"
