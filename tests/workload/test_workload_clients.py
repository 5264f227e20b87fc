"""Clients that wait for their answers, sessions of several turns, and whose a request is."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.clients import Seconds, restarted, sent, weighted
from chairlift.sim.workload.formats.chairlift import save
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import HashIds, Trace
from chairlift.sim.workload.workload import build

SECOND = 10**12
LENGTHS = {"prompt_tokens": {"uniform": {"low": 1, "high": 90}}, "output_tokens": {"uniform": {"low": 1, "high": 70}}}
POISSON = {"poisson": {"rate_per_s": 4.0}}


def rng(seed=0):
    return np.random.default_rng(seed)


def workload(**keys):
    return Workload.model_validate(keys)


def seconds(spec):
    return Seconds.model_validate(spec)


def columns(trace, *names):
    return [getattr(trace, name).tolist() for name in names]


# ---- times to think ----


def test_a_number_of_seconds_is_exact_to_the_picosecond():
    assert seconds(0.1).sample_ps(2, rng()).tolist() == [10**11, 10**11]
    assert seconds({"constant": {"seconds": 0}}).sample_ps(1, rng()).tolist() == [0]
    assert seconds(3).sample_ps(1, rng()).dtype == np.int64


def test_exponential_times_have_their_mean_and_no_memory():
    times = seconds({"exponential": {"mean_s": 8.0}}).sample_ps(200_000, rng()) / SECOND

    assert times.mean() == pytest.approx(8.0, rel=5 / math.sqrt(200_000))
    for age in (0.0, 5.0):
        assert np.mean(times[times > age] > age + 8.0) == pytest.approx(math.exp(-1), abs=0.006)


def test_lognormal_times_have_their_median_and_mean():
    times = seconds({"lognormal": {"mu": 2.0, "sigma": 0.5}}).sample_ps(200_000, rng()) / SECOND

    assert np.median(times) == pytest.approx(math.exp(2.0), rel=0.01)
    assert times.mean() == pytest.approx(math.exp(2.0 + 0.125), rel=0.01)


def test_a_time_past_the_clock_is_refused():
    with pytest.raises(BadInput, match="over 106 days"):
        seconds({"lognormal": {"mu": 16, "sigma": 10}}).sample_ps(1000, rng())


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        (-1, "greater than or equal to 0"),
        (1e7, "less than or equal to 9000000"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        ({"exponential": {"mean_s": 0}}, "greater than 0"),
        ({"exponential": {"mean": 3}}, "Extra inputs"),
        ({"constant": {"seconds": 1}, "exponential": {"mean_s": 1}}, "exactly one of constant, exponential, lognormal"),
        ({}, "exactly one of"),
        (True, "a number of seconds, or one distribution"),
        ("3", "a number of seconds, or one distribution"),
    ],
)
def test_a_wrong_time_is_refused(spec, rule):
    with pytest.raises(ValidationError, match=rule):
        seconds(spec)


# ---- clients ----


def test_client_c_sends_every_nth_request():
    made = build(workload(requests=7, clients={"concurrency": 3, "think_s": 2}, **LENGTHS), 0)

    assert columns(made, "arrival_ps", "follows") == [[0] * 7, [-1, -1, -1, 0, 1, 2, 3]]
    assert made.think_ps.tolist() == [0] * 3 + [2 * SECOND] * 4


def test_clients_without_a_think_time_send_at_once_and_may_be_more_than_requests():
    made = build(workload(requests=3, clients={"concurrency": 9}, **LENGTHS), 0)

    assert columns(made, "follows", "think_ps") == [[-1] * 3, [0] * 3]


def test_a_ramp_sorts_rows_by_client():
    lengths = {"prompt_tokens": {"values": [10, 11, 12, 13, 14, 15, 16]}, "output_tokens": 1}
    made = build(workload(requests=7, clients={"concurrency": 3, "think_s": 2, "ramp_s": 6}, **lengths), 0)

    assert (made.arrival_ps // SECOND).tolist() == [0, 0, 0, 2, 2, 4, 4]
    assert made.prompt_tokens.tolist() == [10, 13, 16, 11, 14, 12, 15]
    assert made.follows.tolist() == [-1, 0, 1, -1, 3, -1, 5]


@settings(max_examples=100)
@given(st.integers(1, 60), st.integers(1, 80), st.sampled_from([0.0, 1e-12, 3e-12, 0.5, 9e6]), st.integers(0, 99))
def test_clients_have_one_request_at_a_time_and_keep_their_requests(n, concurrency, ramp_s, seed):
    think = {"exponential": {"mean_s": 3}}
    clients = {"concurrency": concurrency, "think_s": think, "ramp_s": ramp_s}
    made = build(workload(requests=n, clients=clients, **LENGTHS), seed)
    plain = build(workload(requests=n, arrivals={"burst": {}}, **LENGTHS), seed)
    follows = made.follows.tolist()

    followed = [row for row in follows if row >= 0]
    assert len(set(followed)) == len(followed)  # no two requests wait for the same one
    assert follows.count(-1) == min(n, concurrency)
    first = []  # the row at the start of each row's chain
    for i, row in enumerate(follows):
        assert row < i
        first.append(i if row < 0 else first[row])
        assert made.arrival_ps[i] == made.arrival_ps[first[i]]
    # Each client sends the requests of the plain workload that are its own, in their order.
    pairs = list(zip(made.prompt_tokens.tolist(), made.output_tokens.tolist(), strict=True))
    mine = [[pairs[i] for i in range(n) if first[i] == start] for start in range(n) if first[start] == start]
    theirs = list(zip(plain.prompt_tokens.tolist(), plain.output_tokens.tolist(), strict=True))
    assert sorted(mine) == sorted(theirs[c::concurrency] for c in range(min(n, concurrency)))


def test_clients_replace_the_times_of_a_name_and_of_a_file(tmp_path):
    named = build(workload(name="sharegpt", requests=4, clients={"concurrency": 2}), 0)
    assert columns(named, "arrival_ps", "follows") == [[0] * 4, [-1, -1, 0, 1]]

    ids = HashIds(np.array([1, 2, 3, 1, 9]), np.array([0, 2, 3, 5]))
    save(Trace([5, 6, 7], [600, 300, 700], [1, 2, 3], hash_ids=ids, session=[4, 5, 4]), tmp_path / "t.csv")
    clients = {"concurrency": 2, "ramp_s": 2}
    made = build(workload(file="t.csv", clients=clients), 0, tmp_path)

    assert columns(made, "arrival_ps", "follows", "session") == [[0, 0, SECOND], [-1, 0, -1], [4, 4, 5]]
    assert [made.hash_ids.row(i).tolist() for i in range(3)] == [[1, 2], [1, 9], [3]]
    assert "replaced by 2 clients" in made.notes[-1]
    (tmp_path / "lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n5,6\n7,8\n")
    assert build(workload(file="lengths.csv", clients=clients), 0, tmp_path).prompt_tokens.tolist() == [5, 7]


# ---- sessions ----


def test_prompts_grow_by_the_last_answer_and_the_new_tokens():
    made = build(
        workload(
            requests=5,
            arrivals={"constant": {"rate_per_s": 0.5}},
            prompt_tokens={"values": [10, 20, 30, 40, 50]},
            output_tokens={"values": [1, 2, 3, 4, 5]},
            sessions={"turns": {"values": [3, 1]}, "think_s": 1.5},
        ),
        0,
    )

    assert made.session.tolist() == [0, 0, 0, 1, 2]
    assert made.prompt_tokens.tolist() == [10, 10 + 1 + 20, 31 + 2 + 30, 40, 50]
    assert made.output_tokens.tolist() == [1, 2, 3, 4, 5]
    assert (made.arrival_ps // SECOND).tolist() == [2, 2, 2, 4, 6]
    assert made.follows.tolist() == [-1, 0, 1, -1, -1]
    assert (made.think_ps / SECOND).tolist() == [0, 1.5, 1.5, 0, 0]


def test_a_first_prompt_of_its_own_is_that_of_first_turns_only():
    sessions = {"turns": 2, "think_s": 0, "first_prompt_tokens": {"values": [100, 200]}}
    made = build(workload(requests=4, arrivals=POISSON, prompt_tokens=7, output_tokens=3, sessions=sessions), 0)

    assert made.prompt_tokens.tolist() == [100, 110, 200, 210]


def test_a_session_ends_before_the_turn_that_is_too_long():
    sessions = {"turns": 9, "think_s": 0, "max_context_tokens": 26}
    made = build(workload(requests=5, arrivals=POISSON, prompt_tokens=10, output_tokens=3, sessions=sessions), 0)

    assert made.session.tolist() == [0, 0, 1, 1, 2]  # 10 + 3, 23 + 3, but not 36 + 3
    assert made.prompt_tokens.tolist() == [10, 23, 10, 23, 10]
    assert made.notes == ("2 sessions end early, at max_context_tokens 26",)


def test_a_session_whose_first_turn_is_too_long_is_left_out():
    sessions = {"turns": 1, "think_s": 0, "max_context_tokens": 30}
    prompts = {"values": [10, 50, 20, 60]}
    made = build(workload(requests=3, arrivals=POISSON, prompt_tokens=prompts, output_tokens=3, sessions=sessions), 0)

    assert columns(made, "session", "prompt_tokens") == [[0, 1, 2], [10, 20, 10]]
    assert made.notes == ("2 sessions left out: their first turn is over max_context_tokens 30",)


def test_answers_that_end_at_max_tokens_do_so_in_later_prompts_too():
    sessions = {"turns": 2, "think_s": 0}
    keys = {"prompt_tokens": 10, "output_tokens": {"values": [9, 2]}, "sessions": sessions, "max_tokens": 4}
    made = build(workload(requests=4, arrivals=POISSON, **keys), 0)

    assert columns(made, "prompt_tokens", "output_tokens") == [[10, 24, 10, 24], [4, 2, 4, 2]]
    assert made.notes == ("2 outputs end at max_tokens 4",)


def test_arrivals_and_lengths_of_first_turns_are_those_without_sessions():
    plain = build(workload(requests=40, arrivals=POISSON, **LENGTHS), 3)
    single = build(workload(requests=40, arrivals=POISSON, sessions={"turns": 1, "think_s": 5}, **LENGTHS), 3)

    for name in ("arrival_ps", "prompt_tokens", "output_tokens"):
        assert columns(single, name) == columns(plain, name)


def test_the_rate_of_a_named_workload_is_that_of_its_sessions():
    sessions = {"turns": 5, "think_s": 2}
    made = build(workload(name="sharegpt", requests=50_000, rate_per_s=4.0, sessions=sessions), 0)

    assert made.session[-1] == 9_999
    assert made.duration_s == pytest.approx(10_000 / 4, rel=0.05)


@settings(max_examples=100)
@given(
    n=st.integers(1, 80),
    turns=st.sampled_from([1, 4, {"uniform": {"low": 1, "high": 6}}, {"exponential": {"mean": 3}}]),
    first=st.sampled_from([None, 50]),
    limit=st.sampled_from([None, 120, 300]),
    cap=st.sampled_from([None, "exact", 20]),
    seed=st.integers(0, 1000),
)
def test_sessions_are_what_they_say(n, turns, first, limit, cap, seed):
    think = {"lognormal": {"mu": 1, "sigma": 1}}
    sessions = {"turns": turns, "think_s": think, "first_prompt_tokens": first, "max_context_tokens": limit}
    keys = LENGTHS | {"requests": n, "arrivals": POISSON, "sessions": sessions, "max_tokens": cap}
    made = build(workload(**keys), seed)
    arrival, prompt, output, session, follows, thinks = columns(
        made, "arrival_ps", "prompt_tokens", "output_tokens", "session", "follows", "think_ps"
    )

    assert len(made) == n
    starts = build(workload(requests=session[-1] + 1, arrivals=POISSON, **LENGTHS), seed).arrival_ps
    assert arrival == starts[session].tolist()
    assert session[0] == 0
    for i in range(n):
        assert limit is None or prompt[i] + output[i] <= limit
        assert (follows[i], thinks[i] == 0) == ((-1, True) if i == 0 or session[i] > session[i - 1] else (i - 1, False))
        if follows[i] < 0:
            assert i == 0 or session[i] == session[i - 1] + 1
            assert prompt[i] == first or (first is None and prompt[i] <= 90)
        else:
            assert 1 <= prompt[i] - prompt[i - 1] - output[i - 1] <= 90
    again = build(workload(**keys), seed)
    assert columns(again, "prompt_tokens", "think_ps") == [prompt, thinks]


def test_the_turns_of_uncut_sessions_have_their_distribution():
    sessions = {"turns": {"uniform": {"low": 1, "high": 6}}, "think_s": 0}
    made = build(workload(requests=70_000, arrivals=POISSON, sessions=sessions, **LENGTHS), 0)
    counts = np.bincount(np.bincount(made.session)[:-1], minlength=7)

    assert counts[0] == 0
    assert counts[1:] / counts.sum() == pytest.approx([1 / 6] * 6, abs=0.015)


def test_a_context_that_hardly_a_turn_fits_in_is_refused():
    sessions = {"turns": 1, "think_s": 0, "max_context_tokens": 12}
    said = workload(requests=5, arrivals=POISSON, prompt_tokens=10, output_tokens=3, sessions=sessions)

    with pytest.raises(BadInput, match=r"sessions.max_context_tokens: of 10240 turns drawn only 0 fit.*\(got 12\)"):
        build(said, 0)


def test_prompts_that_outgrow_the_trace_are_refused():
    sessions = {"turns": 9, "think_s": 0}
    said = workload(requests=5, arrivals=POISSON, prompt_tokens=10**9, output_tokens=1, sessions=sessions)

    with pytest.raises(BadInput, match="sessions: prompts grow past 2147483647 tokens: give max_context_tokens"):
        build(said, 0)


# ---- files whose requests follow one another ----


@pytest.fixture
def folder(tmp_path):
    rows = ["1,10,1,-1,0", "1,20,2,0,3", "1,30,3,-1,0", "1,40,4,1,4", "3,50,5,-1,0", "3,60,6,4,5"]
    head = "arrival_s,prompt_tokens,output_tokens,follows,think_s\n"
    (tmp_path / "t.csv").write_text(head + "\n".join(rows) + "\n")
    return tmp_path


def test_new_arrivals_are_those_of_requests_that_follow_none(folder):
    made = build(workload(file="t.csv", arrivals={"constant": {"rate_per_s": 1}}), 0, folder)

    assert (made.arrival_ps // SECOND).tolist() == [1, 1, 1, 2, 3, 3]
    assert made.prompt_tokens.tolist() == [10, 20, 40, 30, 50, 60]
    assert made.follows.tolist() == [-1, 0, 1, -1, -1, 4]
    assert (made.think_ps // SECOND).tolist() == [0, 3, 4, 0, 0, 5]


def test_stretching_keeps_what_follows_together(folder):
    scaled = build(workload(file="t.csv", time_scale=0.1), 0, folder)
    rated = build(workload(file="t.csv", rate_per_s=2.0), 0, folder)

    assert scaled.arrival_ps.tolist() == [10**11] * 4 + [3 * 10**11] * 2
    assert rated.duration_s == pytest.approx(1.0)  # two gaps of three arrivals
    assert scaled.follows.tolist() == rated.follows.tolist() == [-1, 0, -1, 1, -1, 4]


@settings(max_examples=80)
@given(st.data())
def test_reordering_keeps_every_request_with_its_columns_and_its_predecessor(data):
    n = data.draw(st.integers(1, 12))
    follows = [data.draw(st.integers(-1, i - 1)) for i in range(n)]
    think = [0 if row < 0 else 7 + i for i, row in enumerate(follows)]
    counts = [data.draw(st.integers(0, 3)) for _ in range(n)]
    ids = HashIds(np.arange(sum(counts)), np.cumsum([0, *counts]))
    size = np.arange(n) + 2000
    made = Trace([0] * n, size, [1] * n, follows=follows, think_ps=think, hash_ids=ids)
    starts = sorted(data.draw(st.lists(st.integers(0, 9), min_size=follows.count(-1), max_size=follows.count(-1))))
    moved = restarted(made, np.array(starts, np.int64))
    old = (moved.prompt_tokens - 2000).tolist()  # which row each was

    assert sorted(old) == list(range(n))
    assert [t for t, row in zip(moved.arrival_ps.tolist(), moved.follows, strict=True) if row < 0] == starts
    for i, was in enumerate(old):
        assert (-1 if moved.follows[i] < 0 else old[moved.follows[i]]) == follows[was]
        assert moved.think_ps[i] == think[was]
        assert moved.hash_ids.row(i).tolist() == ids.row(was).tolist()


def test_rows_of_the_same_time_keep_their_order():
    made = sent(Trace([0] * 4, [1, 2, 3, 4], [1] * 4), np.array([5, 0, 5, 0]), np.full(4, -1), np.zeros(4, np.int64))

    assert columns(made, "arrival_ps", "prompt_tokens") == [[0, 0, 5, 5], [2, 4, 1, 3]]


# ---- whose a request is ----


def test_groups_are_uniform_or_zipf():
    share = np.bincount(workload_groups(0.0), minlength=4) / 200_000
    assert share == pytest.approx([0.25] * 4, abs=0.005)
    share = np.bincount(workload_groups(2.0), minlength=4) / 200_000
    assert share == pytest.approx(np.array([1, 1 / 4, 1 / 9, 1 / 16]) / (205 / 144), abs=0.005)


def workload_groups(zipf):
    prefix = {"groups": 4, "tokens": 60, "zipf": zipf}
    made = build(workload(requests=200_000, arrivals=POISSON, prefix=prefix, **LENGTHS), 0)
    assert made.prefix_tokens.tolist() == [min(60, n) for n in made.prompt_tokens.tolist()]
    return made.prefix_group


def test_tenants_and_priorities_go_by_weight():
    keys = {"tenants": {"a": 1, "none": 0, "b": 3}, "priority": {"weights": [0, 1.5, 0.5, 0]}}
    made = build(workload(requests=100_000, arrivals=POISSON, **LENGTHS, **keys), 0)

    assert made.tenants == ("a", "none", "b")
    assert np.bincount(made.tenant) / 100_000 == pytest.approx([0.25, 0, 0.75], abs=0.01)
    assert np.bincount(made.priority) / 100_000 == pytest.approx([0, 0.75, 0.25], abs=0.01)


def test_a_session_has_one_tenant_and_one_priority():
    keys = {"tenants": {"a": 1, "b": 1}, "priority": {"weights": [1, 1]}, "sessions": {"turns": 4, "think_s": 0}}
    made = build(workload(requests=400, arrivals=POISSON, **LENGTHS, **keys), 0)

    for column in (made.tenant, made.priority):
        by_session = column.reshape(100, 4)
        assert (by_session == by_session[:, :1]).all()
        assert set(column.tolist()) == {0, 1}


def test_labels_do_not_change_what_arrives():
    plain = build(workload(requests=50, arrivals=POISSON, **LENGTHS), 0)
    keys = {"prefix": {"groups": 3, "tokens": 5}, "tenants": {"a": 1}, "priority": {"weights": [1]}}
    made = build(workload(requests=50, arrivals=POISSON, **LENGTHS, **keys), 0)

    assert columns(made, "arrival_ps", "prompt_tokens") == columns(plain, "arrival_ps", "prompt_tokens")
    assert (plain.tenant, plain.priority, plain.prefix_group) == (None, None, None)


@given(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 1e12]), min_size=1, max_size=6).filter(any), st.integers(0, 99))
def test_weight_zero_is_never_drawn(weights, seed):
    assert all(weights[i] > 0 for i in weighted(weights, 50, rng(seed)))


# ---- what is refused ----

BASE = {"requests": 5, "arrivals": POISSON, **LENGTHS}
LOOP = {"requests": 5, "clients": {"concurrency": 2}, **LENGTHS}
CHAT = {"turns": 3, "think_s": 1}


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        (BASE | {"clients": {"concurrency": 2}}, "clients and arrivals must not both be given: each says when"),
        (LOOP | {"sessions": CHAT}, "sessions and clients must not both be given"),
        ({"name": "sharegpt", "requests": 5, "clients": {"concurrency": 2}, "rate_per_s": 1}, "clients and rate_per_s"),
        ({"file": "x", "clients": {"concurrency": 2}, "time_scale": 2.0}, "clients and time_scale must not both"),
        ({"file": "x", "sessions": CHAT}, "sessions must not be given with a file"),
        (BASE | {"sessions": CHAT | {"tool_s": 1}}, "requests_per_turn and tool_s must be given together"),
        (BASE | {"sessions": CHAT | {"requests_per_turn": 2}}, "requests_per_turn and tool_s must be given together"),
        (BASE | {"sessions": CHAT | {"tool_tokens": 9}}, "tool_tokens must not be given without requests_per_turn"),
        ({"requests": 5, **LENGTHS}, r"a synthetic workload must have arrivals \(or clients\) as well"),
        ({"name": "sharegpt", "requests": 5, "sessions": CHAT}, "arrivals or rate_per_s must be given"),
        (LOOP | {"clients": {"concurrency": 0}}, "greater than or equal to 1"),
        (LOOP | {"clients": {"concurrency": 1, "ramp_s": -1}}, "greater than or equal to 0"),
        (LOOP | {"clients": {"think_s": 1}}, "Field required"),
        (LOOP | {"clients": {"concurrency": 1, "think": 1}}, "Extra inputs"),
        (BASE | {"sessions": {"turns": 3}}, "Field required"),
        (BASE | {"sessions": CHAT | {"turns": 0}}, "greater than or equal to 1"),
        (BASE | {"sessions": CHAT | {"max_context_tokens": 0}}, "greater than or equal to 1"),
        (BASE | {"prefix": {"groups": 0, "tokens": 1}}, "greater than or equal to 1"),
        (BASE | {"tenants": {}}, "at least 1 item"),
        (BASE | {"tenants": {"a": 0}}, "must have a weight above 0"),
        (BASE | {"tenants": {"a": -1}}, "greater than or equal to 0"),
        (BASE | {"priority": {"weights": []}}, "at least 1 item"),
        (BASE | {"priority": {"weights": [0, 0]}}, "must have a weight above 0"),
    ],
)
def test_senders_that_cannot_be_are_refused(keys, rule):
    with pytest.raises(ValidationError, match=rule):
        workload(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        LOOP | {"clients": {"concurrency": 2, "think_s": {"exponential": {"mean_s": 1}}, "ramp_s": 2}},
        BASE | {"sessions": CHAT | {"first_prompt_tokens": 9}, "tenants": {"a": 1}, "priority": {"weights": [1]}},
    ],
)
def test_the_resolved_workload_can_be_read_back(keys):
    said = workload(**keys)

    assert Workload.model_validate(said.model_dump()) == said
    assert Workload.model_validate_json(said.model_dump_json(exclude_none=True)) == said
