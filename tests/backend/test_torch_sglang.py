"""SGLang's decisions executed on the CPU: the tokens are those of a plain forward pass, whatever was retracted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as given_
from hypothesis import strategies as st

from kit.executions import Rows, Ticking, made

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")

from chairlift.policies.sglang import Sglang  # noqa: E402
from chairlift.sim.replica import executing  # noqa: E402
from chairlift.sim.replica.session_prompts import Turns  # noqa: E402
from chairlift.sim.study import Limits  # noqa: E402
from kit.tiny import LONGEST, MODEL, answers, check_greedy, save  # noqa: E402 - torch may be absent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights."""
    return save(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module", autouse=True)
def _steady() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "time", Ticking())
        yield


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The prompts as the engine was given them, by request."""
    seen: dict[int, list[int]] = {}
    plain = Turns.prompt

    def prompt(turns: Turns, request: int) -> list[int]:
        found = plain(turns, request)
        seen[request] = [int(n) % MODEL.vocab for n in found]
        return found

    monkeypatch.setattr(Turns, "prompt", prompt)
    return seen


@pytest.mark.parametrize("version", ["0.5.17", "0.5.23"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_retracted_requests_are_computed_again(folder: Path, version: str, overlap: bool, cache: bool) -> None:
    options = {"version": version, "page_size": 16, "schedule_conservativeness": 0.0, "chunked_prefill_size": 48}
    options |= {"disable_overlap_schedule": not overlap, "disable_radix_cache": not cache}
    rows = [(30 * i, 10 + i, 60 - i) for i in range(5)]  # one by one: each finds room by the guess
    more = {"max_tokens": [61] * 5}  # they end by EOS: with overlap they decode once more
    got = answers(folder, made(rows, **more), Sglang, options, blocks=10)

    assert sum(got.served.columns()["preemptions"]) >= 1
    check_greedy(got)


def test_pages_that_two_requests_computed_are_given_back_once(folder: Path) -> None:
    """Both start in one step, so neither finds the other's prefix; the one that lands last takes the first's pages."""
    options = {"page_size": 16, "chunked_prefill_size": 512}
    rows = [(0, 60, 30), (0, 60, 30), (0, 75, 30), (200, 64, 10)]
    got = answers(folder, made(rows, 1, 48), Sglang, options)

    assert got.served.columns()["cached_tokens"] == [0, 0, 0, 48]
    held = got.served.engines[0].records.runs()["held_blocks"].tolist()
    assert held[:3] == [
        4 + 4 + 5,
        4 + 4 + 5,
        4 + 4 + 5 - 3 - 3,
    ]  # with overlap the second is planned before the first lands
    check_greedy(got)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given_(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 9, 40]), st.integers(1, 90), st.integers(1, 30)), min_size=3, max_size=7
    ),
    prefix=st.integers(0, 90),
    sessions=st.booleans(),
    pages=st.integers(13, 30),
    policy=st.fixed_dictionaries(
        {
            "version": st.sampled_from(["0.5.17", "0.5.23"]),
            "page_size": st.sampled_from([16, 32]),
            "schedule_policy": st.sampled_from(["fcfs", "lpm", "dfs-weight", "lof"]),
            "schedule_conservativeness": st.sampled_from([0.0, 1.0]),
            "chunked_prefill_size": st.sampled_from([-1, 32, 64, 512]),
            "max_running_requests": st.sampled_from([2, 20]),
            "enable_mixed_chunk": st.booleans(),
            "disable_overlap_schedule": st.booleans(),
            "disable_radix_cache": st.sampled_from([False, False, True]),
        }
    ),
    eos=st.booleans(),
    timeout=st.sampled_from([None, None, 0.08]),
)
def test_tokens_are_those_of_a_plain_forward_pass(
    folder: Path,
    given: dict[int, list[int]],
    rows: Rows,
    prefix: int,
    sessions: bool,
    pages: int,
    policy: dict[str, Any],
    eos: bool,
    timeout: float | None,
) -> None:
    given.clear()
    rows = sorted(rows)
    more: dict[str, Any] = {"max_tokens": [o + 20 * eos for _, _, o in rows]}
    if sessions:
        at, lengths, table = 0, 0, []
        for gap, prompt, output in rows:
            at += gap
            prompt = prompt if lengths + prompt + output + 30 > LONGEST else lengths + prompt
            lengths = prompt + output
            table.append((at, prompt, output))
        trace = made(table, session=[0] * len(rows), **more)
    else:
        trace = made(rows, 1, prefix, **more)
    blocks = pages * 16 // policy["page_size"]
    got = answers(
        folder, trace, Sglang, policy, blocks=blocks, block_size=policy["page_size"], limits=Limits(timeout_s=timeout)
    )

    check_greedy(got, given=[given.get(i, []) for i in range(len(trace))])
