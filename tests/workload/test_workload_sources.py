"""Rates that change with time, mixes of tenants, ServeGen's clients, and named sessions."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload import named
from chairlift.sim.workload.arrivals import Arrivals
from chairlift.sim.workload.clients import Seconds
from chairlift.sim.workload.describe import describe
from chairlift.sim.workload.formats.chairlift import save
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build
from kit.made import SYNTHETIC, needs_traces, rng, workload
from kit.places import TRACES

SECOND = 10**12


def times(spec: dict[str, Any], n: int, seed: int = 0) -> Any:
    return Arrivals.model_validate(spec).times_ps(n, rng(seed)) / SECOND


# ---- rates that change ----


def test_diurnal_rates_are_a_cosine() -> None:
    found = times({"diurnal": {"rate_per_s": 50, "swing": 0.8, "period_s": 1000, "peak_at_s": 250}}, 500_000)
    whole = found[found < 9000]
    counts, _ = np.histogram(whole % 1000, bins=20, range=(0, 1000))
    middles = (np.arange(20) + 0.5) * 50
    # the mean of the cosine over a bin of 50 s is its middle times sin(x)/x
    shrink = math.sin(math.pi * 0.05) / (math.pi * 0.05)
    expected = 9 * 50 * 50 * (1 + 0.8 * shrink * np.cos(2 * math.pi * (middles - 250) / 1000))

    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert (np.diff(found) >= 0).all()


def test_without_a_swing_it_is_poisson_draw_for_draw() -> None:
    assert times({"diurnal": {"rate_per_s": 3, "swing": 0}}, 1000) == pytest.approx(
        times({"poisson": {"rate_per_s": 3}}, 1000)
    )
    assert times({"spikes": {"rate_per_s": 3, "factor": 1, "every_s": 50, "for_s": 5}}, 1000) == pytest.approx(
        times({"poisson": {"rate_per_s": 3}}, 1000)
    )


def test_spikes_have_their_rate_in_and_between() -> None:
    spec = {"spikes": {"rate_per_s": 4, "factor": 20, "every_s": 100, "for_s": 10, "first_at_s": 30}}
    found = times(spec, 300_000)
    end = 30 + 100 * int((found[-1] - 30) // 100)
    whole = found[(found >= 30) & (found < end)]
    inside = np.count_nonzero((whole - 30) % 100 < 10)
    cycles = (end - 30) / 100

    assert inside == pytest.approx(cycles * 800, abs=5 * math.sqrt(cycles * 800))
    assert len(whole) - inside == pytest.approx(cycles * 360, abs=5 * math.sqrt(cycles * 360))
    assert np.count_nonzero(found < 30) == pytest.approx(120, abs=55)


@given(
    rate=st.floats(0.1, 100),
    spec=st.sampled_from(
        [
            {"diurnal": {"rate_per_s": 7.0, "swing": 0.9, "period_s": 60.0}},
            {"spikes": {"rate_per_s": 7.0, "factor": 9.0, "every_s": 30.0, "for_s": 3.0}},
        ]
    ),
)
def test_another_mean_rate_keeps_the_clock(rate: float, spec: dict[str, Any]) -> None:
    before = Arrivals.model_validate(spec)
    found = before.rescaled(rate).times_ps(20_000, rng(1)) / SECOND

    assert len(found) / found[-1] == pytest.approx(rate, rel=0.05 + 60 * rate / 20_000)
    assert type(before.rescaled(rate).chosen) is type(before.chosen)
    (own,) = spec.values()
    again = before.rescaled(rate).model_dump(exclude_none=True)
    assert {k: v for k, v in next(iter(again.values())).items() if k in own and k != "rate_per_s"} == {
        k: v for k, v in own.items() if k != "rate_per_s"
    }


def test_wrong_rates_are_refused() -> None:
    with pytest.raises(ValidationError, match="for_s must be below every_s"):
        Arrivals.model_validate({"spikes": {"rate_per_s": 1, "factor": 2, "every_s": 5, "for_s": 5}})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Arrivals.model_validate({"diurnal": {"rate_per_s": 1, "swing": 1.1}})


# ---- mixes ----

CHAT = {**SYNTHETIC, "requests": 30, "tenants": {"free": 1.0, "paid": 2.0}}
TURNS = {
    **SYNTHETIC,
    "requests": 20,
    "sessions": {"turns": 4, "think_s": 3.0},
    "priority": {"weights": [0, 0, 1.0]},
}


def test_a_mix_is_all_of_its_parts_in_order_of_time() -> None:
    parts = {"chat": CHAT, "agents": TURNS, "more": TURNS}
    made = build(workload(mix=parts), 3)

    assert len(made) == 70
    assert made.tenants == ("chat/free", "chat/paid", "agents", "more")
    assert made.tenant is not None
    assert made.session is not None
    assert made.follows is not None
    assert made.priority is not None
    by_part = [np.isin(made.tenant, t) for t in ([0, 1], [2], [3])]
    assert [int(mine.sum()) for mine in by_part] == [30, 20, 20]
    assert (made.session[by_part[0]] == -1).all()
    assert not set(made.session[by_part[1]]) & set(made.session[by_part[2]])
    assert set(made.priority[by_part[0]]) == {0}
    assert set(made.priority[by_part[1]]) == {2}
    follows = made.follows
    assert (made.session[follows >= 0] == made.session[follows[follows >= 0]]).all()
    # a part draws on its own: what the others are does not matter, and equal parts differ
    alone = build(workload(mix={"agents": TURNS}), 3)
    assert made.prompt_tokens[by_part[1]].tolist() == alone.prompt_tokens.tolist()
    assert made.arrival_ps[by_part[1]].tolist() == alone.arrival_ps.tolist()
    assert made.arrival_ps[by_part[2]].tolist() != alone.arrival_ps.tolist()


def test_block_ids_of_two_parts_are_never_the_same(tmp_path: Path) -> None:
    row = '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0, 1]}\n'
    (tmp_path / "m.jsonl").write_text(row * 2)
    made = build(workload(mix={"a": {"file": "m.jsonl"}, "b": {"file": "m.jsonl"}, "c": CHAT}), 0, tmp_path)

    assert made.hash_ids is not None
    assert made.tenant is not None
    rows = {t: [tuple(made.hash_ids.row(i)) for i in np.flatnonzero(made.tenant == t)] for t in (0, 1, 2)}
    assert len(set(rows[0])) == len(set(rows[1])) == 1
    assert not set(rows[0][0]) & set(rows[1][0])
    assert set(rows[2]) == {()}


def test_parts_with_blocks_of_two_sizes_get_common_blocks(tmp_path: Path) -> None:
    """Blocks of 16 and of 24 tokens have blocks of 8 in common; the last ends with its prompt."""
    own = Trace(arrival_ps=[0], prompt_tokens=[9], output_tokens=[1])
    save(own, tmp_path / "own.csv")
    head = "arrival_s,prompt_tokens,output_tokens,hash_ids,hash_block\n"
    (tmp_path / "a.csv").write_text(f"{head}0,40,1,1 2,16\n1,32,1,1 3,16\n")
    (tmp_path / "b.csv").write_text(f"{head}2,25,1,5 6,24\n")
    made = build(workload(mix={"a": {"file": "a.csv"}, "b": {"file": "b.csv"}}), 0, tmp_path)

    assert made.hash_ids is not None
    assert made.hash_block == 8
    rows = [made.hash_ids.row(i).tolist() for i in range(3)]
    assert [len(row) for row in rows] == [4, 4, 4]  # 2 × 16 tokens twice; 24 and 1
    assert rows[0][:2] == rows[1][:2]
    assert not set(rows[0][2:]) & set(rows[1][2:])
    assert not set(rows[2]) & {*rows[0], *rows[1]}
    assert len(build(workload(mix={"a": {"file": "a.csv"}, "b": {"file": "own.csv"}}), 0, tmp_path)) == 3


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"mix": {}}, "at least 1 item"),
        ({"mix": {"a": CHAT}, "rate_per_s": 3.0}, "rate_per_s must not be given beside mix"),
        ({"mix": {"a": CHAT}, "tenants": {"a": 1.0}}, "tenants must not be given with mix"),
        ({"mix": {"a": CHAT}, "name": "sharegpt"}, "not name and mix"),
        ({"mix": {"a": {"requests": 3}}}, "mix.a\n.*exactly one of"),
        ({"servegen": {"file": "x"}}, "servegen must have requests"),
        ({"name": "claude-code-sessions", "requests": 5}, "no arrivals of its sessions"),
        ({"name": "claude-code-sessions", "requests": 5, "clients": {"concurrency": 2}}, "sessions and clients"),
    ],
)
def test_wrong_sources_are_refused(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        workload(**keys)


# ---- ServeGen ----

WINDOWS = "0,0,0,,0,0\n600,2,1,Gamma,1.0,0.5\n1200,8,3,Gamma,0.25,0.5\n1800,4,0.5,Weibull,2.0,0.28\n"
LENGTHS = {
    "0": {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{5: 1.0}"},
    "1200": {"input_tokens": "{30: 1.0}", "output_tokens": "{7: 0.5, 9: 0.5}"},
}


def chunks(folder: Path, packed: bool = False, **more: str) -> str:
    files = {
        "chunk-0-trace.csv": WINDOWS,
        "chunk-0-dataset.json": json.dumps(LENGTHS),
        "chunk-7-trace.csv": "0,1,1,Gamma,1,1\n",
        **more,
    }
    if not packed:
        (folder / "model").mkdir()
        for name, text in files.items():
            (folder / "model" / name).write_text(text)
        return "model"
    with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"data/x/model/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return "model.tar.gz"


@pytest.mark.parametrize("packed", [False, True])
def test_a_client_sends_at_its_rates_with_the_lengths_of_the_time(tmp_path: Path, packed: bool) -> None:
    file = chunks(tmp_path, packed)
    counts = np.zeros((200, 4))
    for seed in range(200):
        trace = build(workload(servegen={"file": file}, requests=7000), seed, tmp_path)
        counts[seed] = np.bincount(trace.arrival_ps // (600 * SECOND), minlength=4)
        early = trace.arrival_ps < 1200 * SECOND
        assert set(trace.prompt_tokens[early]) == {10, 20}
        assert set(trace.prompt_tokens[~early]) == {30}
        assert set(trace.output_tokens[~early]) == {7, 9}

    assert trace.tenants == ("chunk-0",)
    assert "1 clients left out" in trace.notes[0]
    assert (counts[:, 0] == 0).all()
    # a renewal process in equilibrium has exactly rate × time on average; its variance is CV² times Poisson's
    for window, rate, cv in ((1, 2, 1), (2, 8, 2)):
        mean = 600 * rate
        assert counts[:, window].mean() == pytest.approx(mean, abs=5 * cv * math.sqrt(mean / 200))
        assert counts[:, window].std() == pytest.approx(cv * math.sqrt(mean), rel=0.3)


def test_another_rate_scales_all_clients_and_keeps_the_clock(tmp_path: Path) -> None:
    file = chunks(tmp_path)
    trace = build(workload(servegen={"file": file, "start_s": 600.0}, requests=800, rate_per_s=0.5), 1, tmp_path)
    # from 600 s on the client's mean rate is 14/3, so its second window has 8 × 0.5 / (14/3) requests/s
    second = np.count_nonzero((trace.arrival_ps >= 600 * SECOND) & (trace.arrival_ps < 1200 * SECOND))

    assert second == pytest.approx(600 * 8 * 0.5 / (14 / 3), abs=5 * 2 * math.sqrt(515))
    assert trace.arrival_ps[0] < 60 * SECOND


def test_the_largest_clients_draw_the_same_whoever_else_there_is(tmp_path: Path) -> None:
    more = {"chunk-3-trace.csv": "0,9,1,Gamma,1,1\n600,9,1,,0,0\n", "chunk-3-dataset.json": json.dumps(LENGTHS)}
    file = chunks(tmp_path, **more)
    both = build(workload(servegen={"file": file}, requests=9000), 2, tmp_path)
    one = build(workload(servegen={"file": file, "clients": 1}, requests=7000), 2, tmp_path)

    assert both.tenants == ("chunk-3", "chunk-0")
    assert both.tenant is not None
    mine = both.arrival_ps[both.tenant == 0]
    assert one.tenants == ("chunk-3",)
    both_have = min(len(mine), len(one))
    assert both_have > 6000
    assert mine.tolist()[:both_have] == one.arrival_ps.tolist()[:both_have]


@pytest.mark.parametrize(
    ("more", "keys", "rule"),
    [
        ({"chunk-0-trace.csv": "0,1,1,Gama,1,1\n"}, {}, "chunk-0-trace.csv:1: must be a window's start"),
        ({"chunk-0-trace.csv": WINDOWS + "1,2\n"}, {}, "chunk-0-trace.csv:5: must be a window's start"),
        ({"chunk-0-dataset.json": "{"}, {}, "chunk-0-dataset.json: not a dataset"),
        ({}, {"requests": 10**6}, "requests: the clients send only about 8,"),
        ({}, {"servegen": {"file": "none"}}, "none: no such file"),
        ({}, {"servegen": {"file": "."}}, "holds no chunk-N-trace.csv"),
        ({}, {"servegen": {"file": "model", "start_s": 1e6}}, "no client sends anything from then on"),
    ],
)
def test_what_is_wrong_with_a_table_of_clients_is_said(
    tmp_path: Path, more: dict[str, str], keys: dict[str, Any], rule: str
) -> None:
    file = chunks(tmp_path, **more)
    with pytest.raises(BadInput, match=rule):
        build(workload(**{"servegen": {"file": file}, "requests": 100, **keys}), 0, tmp_path)


@needs_traces
def test_the_real_clients_of_servegen_send_as_their_tables_say() -> None:
    truth = json.loads((TRACES / "stats.json").read_text())["servegen"]["reason/deepseek-r1"]
    file = str(TRACES / "servegen_deepseek-r1.tar.gz")
    made = build(workload(servegen={"file": file}, requests=1_350_000), 4)
    hourly = np.bincount(made.arrival_ps // (3600 * SECOND))[:23] / 3600

    assert hourly == pytest.approx(truth["hour_of_day_rate"][:23], rel=0.06)
    for ours, theirs in ((made.prompt_tokens, "input_tokens"), (made.output_tokens, "output_tokens")):
        assert ours.mean() == pytest.approx(truth["fields"][theirs]["mean"], rel=0.03)
        assert np.percentile(ours, 90) == pytest.approx(truth["fields"][theirs]["p90"], rel=0.05)
    share = np.bincount(made.tenant).max() / len(made)  # type: ignore[arg-type]
    assert share == pytest.approx(truth["client_share_top1"], rel=0.03)


@needs_traces
@pytest.mark.parametrize("file", ["servegen_m-large_top.tar.gz", "servegen_mm-image.tar.gz"])
def test_the_other_real_archives_are_read(file: str) -> None:
    made = build(workload(servegen={"file": str(TRACES / file)}, requests=20_000, rate_per_s=5.0), 0)

    assert len(made) == 20_000
    if "mm-image" in file:  # text, and 1.59 images of 650 tokens each: the traces' README
        assert made.prompt_tokens.mean() == pytest.approx(572 + 1.59 * 650, rel=0.1)


# ---- named ----


def test_named_sessions_have_the_turns_and_thoughts_that_were_fitted() -> None:
    made = build(workload(name="claude-code-sessions", requests=60_000, rate_per_s=0.1), 1)

    assert made.session is not None
    assert made.think_ps is not None
    turns = np.bincount(made.session)[:-1]
    assert np.log(turns).mean() == pytest.approx(3.675, abs=5 * 1.16 / math.sqrt(len(turns)) + 0.02)
    thoughts = made.think_ps[made.think_ps > 0] / SECOND
    assert np.log(thoughts).mean() == pytest.approx(2.838, abs=0.03)
    assert np.log(thoughts).std() == pytest.approx(1.571, abs=0.03)
    assert "Mean tokens: 791 in" in named.describe("claude-code-sessions")
    own = build(
        workload(
            name="claude-code-sessions",
            requests=50,
            rate_per_s=1.0,
            sessions={"turns": 5, "think_s": 1.0, "first_prompt_tokens": 100},
        ),
        0,
    )
    assert own.session is not None
    assert np.bincount(own.session).max() == 5


@needs_traces
def test_the_fit_of_claude_code_is_that_of_the_file() -> None:
    trace = load(TRACES / "kvcachetester_requests_derived.csv.gz")
    known = named.get("claude-code-sessions")

    assert trace.think_ps is not None
    assert known.sessions is not None
    thoughts = np.log(trace.think_ps[trace.think_ps > 0] / SECOND)
    fit = Seconds.model_validate({"lognormal": {"mu": 2.838, "sigma": 1.571}})
    assert known.sessions.think_s == fit
    assert thoughts.mean() == pytest.approx(2.838, abs=0.05)
    assert thoughts.std() == pytest.approx(1.571, abs=0.05)
    counts = np.bincount(trace.session)  # type: ignore[arg-type]
    assert np.log(counts).mean() == pytest.approx(3.675, abs=0.01)
    assert np.log(counts).std() == pytest.approx(1.160, abs=0.01)
    assert known.output_tokens.mean_tokens() == pytest.approx(trace.output_tokens.mean(), rel=0.05)


@needs_traces
@pytest.mark.parametrize("name", ["ragpulse", "servegen-deepseek-r1"])
def test_named_lengths_have_the_mean_of_their_source(name: str) -> None:
    stats = json.loads((TRACES / "stats.json").read_text())
    fields = stats["servegen"]["reason/deepseek-r1"]["fields"]
    truth = {
        "ragpulse": (stats["ragpulse"]["inp"], stats["ragpulse"]["out"]),
        "servegen-deepseek-r1": (fields["input_tokens"], fields["output_tokens"]),
    }[name]
    known = named.get(name)

    assert known.prompt_tokens.mean_tokens() == pytest.approx(truth[0]["mean"], rel=0.06)
    assert known.output_tokens.mean_tokens() == pytest.approx(truth[1]["mean"], rel=0.06)


def test_all_named_workloads_can_be_drawn_and_described() -> None:
    for name in named.names():
        made = build(workload(name=name, requests=200, rate_per_s=2.0), 0)
        assert describe(made)["requests"] == 200
        assert name in named.describe(name)
