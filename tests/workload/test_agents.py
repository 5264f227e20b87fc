"""Loads of agents, worked out by hand: tool gaps, prefixes that sessions share, and what a rate counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chairlift.sim.bad_input import BadInput
from chairlift.sim.cli.schema import scenario_schema
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.workload.formats.chairlift import save
from chairlift.sim.workload.formats.read import load as load_trace
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build
from kit.command import chairlift

SECOND = 10**12
AGENT: dict[str, Any] = {
    "requests": 8,
    "arrivals": {"constant": {"rate_per_s": 0.01}},
    "prompt_tokens": 10,
    "output_tokens": 3,
    "sessions": {"turns": 2, "think_s": 60, "requests_per_turn": 2, "tool_s": 2.5, "tool_tokens": 100},
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(**keys: Any) -> Trace:
    return build(Workload.model_validate(AGENT | keys), 0)


def ids(trace: Trace) -> list[list[int]]:
    assert trace.hash_ids is not None
    return [trace.hash_ids.row(i).tolist() for i in range(len(trace))]


# ---- tool gaps ----


def test_an_agents_turn_is_several_requests_with_tool_gaps_between_them() -> None:
    trace = made()

    assert trace.prompt_tokens.tolist() == [10, 113, 126, 229] * 2
    assert trace.follows is not None
    assert trace.think_ps is not None
    assert trace.follows.tolist() == [-1, 0, 1, 2, -1, 4, 5, 6]
    assert [ps / SECOND for ps in trace.think_ps.tolist()] == [0, 2.5, 60, 2.5] * 2
    assert [ps / SECOND for ps in trace.arrival_ps.tolist()] == [100] * 4 + [200] * 4


def test_results_are_as_long_as_prompts_unless_said_otherwise() -> None:
    sessions = {key: value for key, value in AGENT["sessions"].items() if key != "tool_tokens"}

    assert made(sessions=sessions).prompt_tokens.tolist() == [10, 23, 36, 49] * 2


def test_a_session_ends_in_the_middle_of_a_turn_where_its_context_is_full() -> None:
    """The second turn's request with a tool's result would hold 229 + 3 tokens; prompts of 10, 113 and 126 fit."""
    trace = made(requests=7, sessions=AGENT["sessions"] | {"max_context_tokens": 231})

    assert trace.prompt_tokens.tolist() == [10, 113, 126, 10, 113, 126, 10]
    assert "2 sessions end early, at max_context_tokens 231" in trace.notes


def test_one_request_a_turn_is_a_chat_whatever_the_tools() -> None:
    chat = {"turns": {"uniform": {"low": 1, "high": 5}}, "think_s": {"exponential": {"mean_s": 3}}}
    plain = made(requests=50, sessions=chat)
    agents = made(requests=50, sessions=chat | {"requests_per_turn": 1, "tool_s": {"exponential": {"mean_s": 9}}})

    for name in ("prompt_tokens", "output_tokens", "follows", "think_ps", "arrival_ps"):
        assert getattr(plain, name).tolist() == getattr(agents, name).tolist()


def test_gaps_are_drawn_from_the_distribution() -> None:
    sessions = {"turns": 1, "think_s": 1000, "requests_per_turn": 5, "tool_s": {"exponential": {"mean_s": 4}}}
    trace = made(requests=50_000, arrivals={"constant": {"rate_per_s": 10}}, sessions=sessions)
    assert trace.think_ps is not None
    assert trace.follows is not None
    gaps = trace.think_ps[trace.follows >= 0] / SECOND

    assert len(gaps) == 40_000
    assert gaps.mean() == pytest.approx(4, rel=0.02)
    assert np.mean(gaps > 4) == pytest.approx(np.exp(-1), abs=0.01)  # no memory


def scenario(workload: dict[str, Any], **more: Any) -> Path:
    keys = {"model": "llama-3.1-8b", "gpu": "h100", "policy": "vllm", "workload": workload, **more}
    Path("s.yaml").write_text(json.dumps(keys))
    return Path("s.yaml")


def test_a_request_arrives_a_gap_after_the_one_before_has_ended() -> None:
    outcome = simulate(load(scenario(AGENT)).setups[0])
    rows = outcome.to_arrow().to_pydict()
    waits = [rows["arrival_ps"][i] - rows["finished_ps"][i - 1] for i in (1, 2, 3, 5, 6, 7)]

    assert [ps / SECOND for ps in waits] == [2.5, 60, 2.5, 2.5, 60, 2.5]


# ---- prefixes that sessions share ----

SHARED = AGENT | {
    "requests": 4,
    "prompt_tokens": 32,
    "output_tokens": 16,
    "sessions": {"turns": 2, "think_s": 10, "first_prompt_tokens": 96},
}


@pytest.mark.parametrize(("prefix", "found"), [(None, [0, 96, 0, 96]), (64, [0, 96, 64, 96]), (70, [0, 96, 64, 96])])
def test_a_sessions_first_turn_finds_the_prefix_and_its_second_all_of_the_first(
    prefix: int | None, found: list[int]
) -> None:
    """Prompts of 96 and 96 + 16 + 32 = 144 tokens, blocks of 16. The last token of an answer is never computed, so of
    96 + 15 tokens six blocks are full. Another session has 64 tokens in common with the first, four blocks."""
    shared = {} if prefix is None else {"prefix": {"groups": 1, "tokens": prefix}}
    outcome = simulate(load(scenario(SHARED | shared)).setups[0])
    rows = outcome.to_arrow().to_pydict()

    assert rows["prompt_tokens"] == [96, 144, 96, 144]
    assert rows["cached_tokens"] == found


def test_all_turns_of_a_session_have_its_group() -> None:
    trace = made(**SHARED | {"requests": 400, "prefix": {"groups": 5, "tokens": 64}})
    assert trace.session is not None
    groups = [row[0] for row in ids(trace)]

    assert trace.hash_block == 64
    assert {len(row) for row in ids(trace)} == {1}
    assert set(groups) == set(range(5))
    assert len({(session, group) for session, group in zip(trace.session.tolist(), groups, strict=True)}) == 200


def test_a_first_prompt_that_is_shorter_than_the_prefix_is_all_prefix() -> None:
    """Sessions begin with 40 or 96 tokens, and the prefix has 64: of the later turns of a short one 40 tokens are
    shared, two blocks of 16, and of a long one 64, four blocks."""
    first = {"values": [40, 96]}
    shared = SHARED | {"requests": 100, "prefix": {"groups": 1, "tokens": 64}}
    trace = made(**shared | {"sessions": SHARED["sessions"] | {"first_prompt_tokens": first}})
    assert trace.session is not None
    begins = trace.prompt_tokens[trace.session * 2].tolist()  # each session has two turns

    assert trace.hash_block == 16
    assert set(begins) == {40, 96}
    assert ids(trace) == [[0, 1] if begin == 40 else [0, 1, 2, 3] for begin in begins]


def test_agents_with_different_prefixes_mix() -> None:
    parts = {
        name: SHARED | {"requests": 20, "prefix": {"groups": 1, "tokens": tokens}}
        for name, tokens in (("a", 64), ("b", 96))
    }
    trace = build(Workload.model_validate({"mix": parts}), 0)
    assert trace.tenant is not None
    rows = ids(trace)
    kinds = {
        tenant: {tuple(row) for row, of in zip(rows, trace.tenant.tolist(), strict=True) if of == tenant}
        for tenant in (0, 1)
    }

    assert trace.hash_block == 32
    assert [len(next(iter(kinds[tenant]))) for tenant in (0, 1)] == [2, 3]
    assert [len(kinds[tenant]) for tenant in (0, 1)] == [1, 1]


def test_a_file_may_say_both_too() -> None:
    """Rows 0 and 2 are a session of group 4, row 1 is another, row 3 is nobody's, row 4 of the group alone."""
    head = "arrival_s,prompt_tokens,output_tokens,session,prefix_group,prefix_tokens\n"
    Path("t.csv").write_text(f"{head}0,96,16,1,4,64\n1,96,16,2,4,64\n2,144,16,1,4,64\n3,96,16,,,\n4,80,9,,4,64\n")
    assert load_trace("t.csv").prefix_group is not None
    trace = build(Workload(file="t.csv"), 0)

    assert (trace.hash_block, trace.prefix_group) == (64, None)
    assert ids(trace) == [[4], [4], [4], [], [4]]
    rows = simulate(load(scenario({"file": "t.csv"})).setups[0]).to_arrow().to_pydict()
    assert rows["cached_tokens"] == [0, 64, 96, 0, 64]
    save(trace, "again.csv")
    assert ids(load_trace("again.csv")) == ids(trace)


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        (
            "0,96,16,1,4,64\n1,96,16,1,5,64\n",
            r"t.csv: prefix_group: must be that of the session's first request, 4 \(got 5",
        ),
        (
            "0,96,16,1,4,64\n1,96,16,1,,\n",
            r"t.csv: prefix_group: must be that of the session's first request, 4 \(got -1",
        ),
    ],
)
def test_a_session_of_two_groups_is_refused(rows: str, rule: str) -> None:
    head = "arrival_s,prompt_tokens,output_tokens,session,prefix_group,prefix_tokens\n"
    Path("t.csv").write_text(head + rows)

    with pytest.raises(BadInput, match=rule):
        build(Workload(file="t.csv"), 0)


def test_prefixes_are_laid_over_a_file_with_sessions() -> None:
    Path("t.csv").write_text("arrival_s,prompt_tokens,output_tokens,session\n0,96,16,1\n1,96,16,2\n2,144,16,1\n")
    trace = build(Workload.model_validate({"file": "t.csv", "prefix": {"groups": 1, "tokens": 64}}), 0)

    assert ids(trace) == [[0], [0], [0]]


def test_affinity_goes_by_the_session_beyond_the_prefix() -> None:
    """Two replicas, everybody's first 64 tokens are the same: a turn goes where its session was."""
    load_ = SHARED | {"requests": 1000, "arrivals": {"poisson": {"rate_per_s": 10}}, "output_tokens": 160}
    load_ |= {"prefix": {"groups": 1, "tokens": 64}, "sessions": SHARED["sessions"] | {"turns": 5, "think_s": 1}}
    path = scenario(load_, replicas=2, router={"name": "prefix_affinity", "slack": 8})
    setup = load(path).setups[0]
    rows = simulate(setup).to_arrow().to_pydict()
    homes: dict[int, set[int]] = {}
    for session, replica in zip(setup.trace.session.tolist(), rows["replica"], strict=True):  # type: ignore[union-attr]
        homes.setdefault(session, set()).add(replica)

    assert set(rows["replica"]) == {0, 1}
    assert np.mean([len(each) == 1 for each in homes.values()]) > 0.8


# ---- what a rate counts ----


def test_a_run_says_what_its_rate_counts() -> None:
    assert chairlift("run", str(scenario(AGENT)), "-q").status == 0
    said = "0.01 sessions/s start, of 4 requests each, in all 0.04 requests/s where they are served in time"

    assert said in json.loads(Path("runs/s/summary.json").read_text())["assumptions"]["workload"]
    resolved = yaml.safe_load(Path("runs/s/scenario.yaml").read_text())
    assert said in resolved["provenance"]["traces"]["workload"]


def test_a_files_rate_is_of_sessions_where_requests_wait_for_others() -> None:
    save(made(), "t.csv")
    trace = build(Workload(file="t.csv", rate_per_s=4), 0)

    assert "arrival times stretched to 4 sessions/s" in trace.notes
    assert (trace.arrival_ps[-1] - trace.arrival_ps[0]) / SECOND == 0.25  # between the starts of two sessions


def test_arrivals_are_counted_when_they_are_sent() -> None:
    """Eight requests, of which the last is sent when its session, that began at 200 s, has waited 2.5 + 60 + 2.5 s."""
    outcome = simulate(load(scenario(AGENT)).setups[0])
    rows = outcome.to_arrow().to_pydict()

    assert rows["arrival_ps"][-1] / SECOND == pytest.approx(265, abs=1)
    assert outcome.summary["offered_rate"] == pytest.approx(7 / (rows["arrival_ps"][-1] / SECOND - 100), rel=1e-9)


def test_the_schema_says_what_each_rate_counts() -> None:
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                if key in ("rate_per_s", "rate") and isinstance(each, dict) and "description" in each:
                    found.append(each["description"])
                look(each)
        elif isinstance(value, list):
            for each in value:
                look(each)

    look(scenario_schema())
    assert len(found) >= 8
    assert [said for said in found if "sessions/s" not in said or "equests/s" not in said] == []


def test_a_plan_says_what_its_rates_count() -> None:
    base = {"model": "llama-3.1-8b", "gpu": "h100", "policy": "vllm", "workload": AGENT}
    plan = {"base": base, "slo": [{"percentile": 90, "ttft_ms": 5000}], "rate_per_s": 0.5, "axes": {"replicas": [1]}}
    Path("p.yaml").write_text(json.dumps(plan | {"search": {"requests": 400, "most_requests": 400}}))
    result = chairlift("plan", "p.yaml", "-j1")
    said = " ".join(result.out.split())

    assert result.status == 0, result.err
    assert "Cheapest for 0.5 sessions/s" in said
    assert "0.5 sessions/s start, of 4 requests each, in all 2 requests/s" in said
    assert json.loads(Path("runs/p/plan.json").read_text())["rates_are"] == "sessions/s"
