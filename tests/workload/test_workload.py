"""Traces, the workloads that make them, and the named ones."""

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload import named
from chairlift.sim.workload.describe import describe
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import HashIds, Trace
from chairlift.sim.workload.workload import build
from kit.made import SYNTHETIC, needs_traces, trace, workload
from kit.places import TRACES

# ---- Trace ----


def test_a_trace_keeps_small_read_only_columns():
    made = trace(session=[0, 0, -1])

    assert (made.arrival_ps.dtype, made.prompt_tokens.dtype, made.session.dtype) == (
        np.int64,
        np.int32,
        np.int64,
    )
    assert made.duration_s == pytest.approx(9e-12)
    with pytest.raises(ValueError, match="read-only"):
        made.prompt_tokens[0] = 1


def test_making_a_trace_leaves_the_callers_array_writable():
    mine = np.array([0, 1, 2], np.int64)
    trace(arrival_ps=mine)
    mine[0] = 0


@pytest.mark.parametrize(
    ("columns", "rule"),
    [
        ({"arrival_ps": [], "prompt_tokens": [], "output_tokens": []}, "no requests"),
        ({"arrival_ps": [0, 9, 5]}, r"arrival_ps\[2\]: arrivals must be in order of time.*\(got 5\)"),
        ({"arrival_ps": [-1, 0, 1]}, r"arrival_ps\[0\]: must be at least 0 \(got -1\)"),
        ({"arrival_ps": [0.0, math.nan, 1.0]}, r"arrival_ps\[1\]: must be a whole number.*nan"),
        ({"arrival_ps": [0.0, 1.0, math.inf]}, r"arrival_ps\[2\]: must be a whole number.*inf"),
        ({"arrival_ps": [0.0, 1.0, 2.0**63]}, r"arrival_ps\[2\]: must be a whole number"),
        ({"prompt_tokens": [1, 0, 1]}, r"prompt_tokens\[1\]: must be at least 1 \(got 0\)"),
        ({"prompt_tokens": [1, 2**31, 1]}, r"prompt_tokens\[1\]: must be at most 2147483647"),
        ({"prompt_tokens": [1.5, 2, 3]}, r"prompt_tokens\[0\]: must be a whole number"),
        ({"prompt_tokens": ["a", "b", "c"]}, "must be a row of whole numbers"),
        ({"output_tokens": [1, 2, 0]}, r"output_tokens\[2\]: must be at least 1"),
        ({"output_tokens": [1, 2]}, r"output_tokens: must have 3 values, one a request \(got 2\)"),
        ({"max_tokens": [1, 1, 9]}, r"max_tokens\[1\]: must be at least the row's output tokens \(got 1\)"),
        ({"tenant": [0, 1, 0], "tenants": ("a",)}, r"tenant\[1\]: must be below the 1 tenants"),
        ({"prefix_tokens": [7, 8, 10], "prefix_group": [0, 0, 0]}, r"prefix_tokens\[2\]: must be at most"),
        ({"prefix_tokens": [1, 1, 1]}, "go together"),
        ({"follows": [-1, -1, -1]}, "follows and a think time go together"),
        ({"think_ps": [0, 0, 0]}, "follows and a think time go together"),
        ({"follows": [-2, -1, -1], "think_ps": [0, 0, 0]}, r"follows\[0\]: must be at least -1 \(got -2\)"),
        (
            {"follows": [-1, 1, -1], "think_ps": [0, 0, 0]},
            r"follows\[1\]: must be the row.* of an earlier request.*got 1",
        ),
        ({"follows": [-1, 2**40, -1], "think_ps": [0, 0, 0]}, r"follows\[1\]: must be the row"),
        ({"follows": [-1, -1, -1], "think_ps": [0, 4, 0]}, r"think_ps\[1\]: must be 0 where follows is -1 \(got 4\)"),
        ({"follows": [-1, -1, -1], "think_ps": [0, 0, -4]}, r"think_ps\[2\]: must be at least 0"),
        (
            {"follows": [-1, -1, 0], "think_ps": [0, 0, 4]},
            r"arrival_ps\[2\]: must be that of the row it follows \(got 9\)",
        ),
        (
            {"hash_ids": HashIds(np.arange(4), np.array([0, 2, 3, 4]))},
            r"hash_ids\[0\]: at most one id for each 512 tokens",
        ),
        ({"hash_ids": HashIds(np.arange(4), np.array([0, 2, 3]))}, "offsets must run"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(columns, rule):
    with pytest.raises(BadInput, match=rule):
        trace(**columns)


def test_many_mistakes_are_listed_up_to_twenty_and_counted():
    with pytest.raises(BadInput) as caught:
        Trace(arrival_ps=np.zeros(50), prompt_tokens=np.zeros(50), output_tokens=np.ones(50))

    assert len(caught.value.problems) == 21
    assert "30 more" in str(caught.value.problems[-1])


def test_head_and_slice_cut_every_column():
    ids = HashIds(np.array([5, 5, 6, 7]), np.array([0, 1, 3, 4]))
    whole = trace(prompt_tokens=[512, 600, 9], hash_ids=ids, tenant=[0, 1, 1], tenants=("a", "b"))
    cut = whole.slice(1, 3)

    assert len(whole.head(2)) == 2
    assert whole.head(99) is whole
    assert cut.arrival_ps.tolist() == [5, 9]
    assert [cut.hash_ids.row(i).tolist() for i in range(2)] == [[5, 6], [7]]
    with pytest.raises(BadInput, match="no requests"):
        whole.slice(3, 3)


def test_a_trace_that_follows_is_cut_from_its_start_only():
    whole = trace(arrival_ps=[3, 3, 3], follows=[-1, 0, 0], think_ps=[0, 5, 0])

    assert (whole.follows.dtype, whole.think_ps.dtype) == (np.int64, np.int64)
    assert whole.head(2).follows.tolist() == [-1, 0]
    assert whole.slice(0, -1).think_ps.tolist() == [0, 5]
    for start in (1, -2):
        with pytest.raises(ValueError, match=f"must be cut from row 0 on, not from {start}"):
            whole.slice(start, 3)
    assert trace().slice(1, 3).arrival_ps.tolist() == [5, 9]


# ---- Workload ----


def test_a_synthetic_workload_is_the_same_for_the_same_seed():
    first, again, other = (build(workload(**SYNTHETIC), seed) for seed in (7, 7, 8))

    assert first.arrival_ps.tolist() == again.arrival_ps.tolist()
    assert first.output_tokens.tolist() == again.output_tokens.tolist()
    assert first.output_tokens.tolist() != other.output_tokens.tolist()
    assert set(first.prompt_tokens.tolist()) == {512}


def test_arrivals_do_not_change_the_lengths():
    burst = build(workload(**SYNTHETIC | {"arrivals": {"burst": {}}}), 1)
    poisson = build(workload(**SYNTHETIC), 1)

    assert burst.output_tokens.tolist() == poisson.output_tokens.tolist()


def test_max_tokens_exact_declares_the_true_length():
    made = build(workload(**SYNTHETIC, max_tokens="exact"), 0)

    assert made.max_tokens.tolist() == made.output_tokens.tolist()
    assert build(workload(**SYNTHETIC), 0).max_tokens is None


def test_outputs_end_at_a_max_tokens_below_them():
    made = build(workload(**SYNTHETIC, max_tokens=64), 0)
    free = build(workload(**SYNTHETIC), 0)

    assert made.output_tokens.tolist() == [min(64, n) for n in free.output_tokens.tolist()]
    assert set(made.max_tokens.tolist()) == {64}
    assert "end at max_tokens 64" in made.notes[0]


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"requests": 5}, "exactly one of prompt_tokens with output_tokens, name, file, servegen, or mix, not none"),
        ({"name": "azure-conv-2023", "file": "x", "requests": 5}, "not name and file"),
        ({"requests": 5, "prompt_tokens": 5}, r"must have arrivals \(or clients\) and output_tokens as well"),
        ({"name": "azure-conv-2023"}, "must have requests"),
        ({"name": "sharegpt", "requests": 5}, "arrivals or rate_per_s must be given"),
        ({"name": "azure-conv", "requests": 5}, "did you mean 'azure-conv-2023'"),
        ({"file": "x", "time_scale": 2.0, "rate_per_s": 1.0}, "time_scale and rate_per_s must not both"),
        (
            {"file": "x", "arrivals": {"burst": {}}, "rate_per_s": 1.0},
            "rate_per_s and arrivals must not both",
        ),
        (SYNTHETIC | {"rate_per_s": 4.0}, "rate_per_s must not be given without a name or a file"),
        (SYNTHETIC | {"limit": 4}, "limit must not be given without a file"),
        (SYNTHETIC | {"time_scale": 4.0}, "time_scale must not be given without a file"),
        (SYNTHETIC | {"requests": 0}, "greater than or equal to 1"),
        (SYNTHETIC | {"requests": True}, "valid integer"),
        (SYNTHETIC | {"arrivals": {"poisson": {"rate_per_s": math.inf}}}, "finite"),
        (SYNTHETIC | {"arrivals": {"poisson": {"rate_per_s": 0}}}, "greater than"),
        (SYNTHETIC | {"arrivals": {"gamma": {"rate_per_s": 1, "cv": 0}}}, "greater than"),
        (SYNTHETIC | {"max_tokens": "exat"}, "exact, a whole number"),
        (SYNTHETIC | {"ordering": "fifo"}, "Extra inputs"),
    ],
)
def test_a_workload_that_says_too_much_or_too_little_is_refused(keys, rule):
    with pytest.raises(ValidationError, match=rule):
        workload(**keys)


def test_the_resolved_workload_can_be_read_back():
    said = workload(**SYNTHETIC)

    assert Workload.model_validate(said.model_dump()) == said
    assert Workload.model_validate_json(said.model_dump_json(exclude_none=True)) == said


def test_every_key_of_the_schema_is_described():
    schema = Workload.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    models += [part for model in models for part in model.get("anyOf", [])]

    for model in models:
        for name, field in model.get("properties", {}).items():
            assert field.get("description"), f"{model.get('title')}.{name}"


FILE = "arrival_s,prompt_tokens,output_tokens\n1,10,1\n2,20,2\n5,30,3\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.csv").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "seconds"),
    [
        ({}, [1, 2, 5]),
        ({"limit": 2}, [1, 2]),
        ({"requests": 2}, [1, 2]),
        ({"time_scale": 0.5}, [0.5, 1, 2.5]),
        ({"rate_per_s": 2.0}, [0.25, 0.5, 1.25]),  # two gaps in one second
        ({"arrivals": {"constant": {"rate_per_s": 1.0}}}, [1, 2, 3]),
    ],
)
def test_a_file_is_replayed_stretched_or_given_new_times(folder, keys, seconds):
    made = build(workload(file="mine.csv", **keys), 0, folder)

    assert (made.arrival_ps / 1e12).tolist() == seconds
    assert made.prompt_tokens.tolist() == [10, 20, 30][: len(seconds)]


def test_fewer_rows_than_wanted_are_noted(folder):
    assert "9 requests wanted, 3 read" in build(workload(file="mine.csv", requests=9), 0, folder).notes


def test_a_file_that_arrives_at_once_has_no_rate_to_stretch_to(tmp_path):
    (tmp_path / "burst.csv").write_text("arrival_s,prompt_tokens,output_tokens\n3,1,1\n3,1,1\n")
    with pytest.raises(BadInput, match="arrive at once"):
        build(workload(file="burst.csv", rate_per_s=1.0), 0, tmp_path)


def test_lengths_without_times_need_arrivals(tmp_path):
    (tmp_path / "lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n5,6\n7,8\n")
    said = workload(file="lengths.csv", arrivals={"constant": {"rate_per_s": 2}})

    assert build(said, 0, tmp_path).arrival_ps.tolist() == [5 * 10**11, 10**12]
    with pytest.raises(BadInput, match="must say arrivals of its own"):
        build(workload(file="lengths.csv"), 0, tmp_path)


# ---- named workloads ----


@pytest.fixture(scope="module")
def stats():
    return json.loads((TRACES / "stats.json").read_text())


STATS = {
    "azure-conv-2023": ("azure2023", "conv"),
    "azure-code-2023": ("azure2023", "code"),
    "mooncake-conversation": ("mooncake", "conversation"),
    "sharegpt": ("lengths_only", "etalon_sharegpt8k"),
    "arxiv-summarization": ("lengths_only", "vidur_arxiv"),
}


def test_every_named_workload_says_where_it_comes_from():
    assert set(named.names()) == {*STATS, "claude-code-sessions", "ragpulse", "servegen-deepseek-r1"}
    for name in named.names():
        assert "Source: github.com/" in named.describe(name)
        assert "Licence: " in named.describe(name)
    with pytest.raises(BadInput, match="did you mean 'sharegpt'"):
        named.describe("sharegtp")


@needs_traces
@pytest.mark.parametrize("name", STATS)
def test_a_named_workload_is_like_its_trace(name, stats):
    family, member = STATS[name]
    truth = stats[family][member]
    made = build(workload(name=name, requests=300_000, arrivals={"burst": {}}), 0)

    for column, key in ((made.prompt_tokens, "inp"), (made.output_tokens, "out")):
        assert column.mean() == pytest.approx(truth[key]["mean"], rel=0.03)
        assert np.percentile(column, [50, 90]) == pytest.approx([truth[key]["p50"], truth[key]["p90"]], rel=0.05)
    if named.get(name).arrivals is not None:
        drawn = describe(build(workload(name=name, requests=300_000), 0))
        assert drawn["rate_per_s"] == pytest.approx(truth["arr"]["rate"], rel=0.03)


def test_rate_per_s_replaces_a_named_rate():
    for name in named.names():
        made = build(workload(name=name, requests=100_000, rate_per_s=7.0), 0)
        assert describe(made)["rate_per_s"] == pytest.approx(7.0, rel=0.05)
