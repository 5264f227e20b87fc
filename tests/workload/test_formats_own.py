"""Chairlift's own trace files: what is written is read back exactly."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.formats.chairlift import save
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.trace import COLUMNS, HashIds, Trace


def refused(path, **options):
    with pytest.raises(BadInput) as caught:
        load(path, **options)
    assert all(problem.file == str(path) for problem in caught.value.problems)
    return [(p.line, p.path, p.rule, p.value) for p in caught.value.problems]


def same(a, b):
    for name in COLUMNS:
        left, right = getattr(a, name), getattr(b, name)
        if name == "tenant" and left is not None:  # numbered anew, in order of appearance
            assert [a.tenants[i] for i in left] == [b.tenants[i] for i in right]
        else:
            assert (left is None) == (right is None), name
            assert left is None or left.tolist() == right.tolist(), name
    assert (a.hash_ids is None) == (b.hash_ids is None)
    if a.hash_ids is not None:
        assert a.hash_block == b.hash_block
        assert [a.hash_ids.row(i).tolist() for i in range(len(a))] == [
            b.hash_ids.row(i).tolist() for i in range(len(b))
        ]


@st.composite
def traces(draw):
    n = draw(st.integers(1, 8))

    def column(low, high):
        return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    columns = {
        "arrival_ps": sorted(draw(st.sampled_from([column(0, 2**63 - 1), column(0, 2)]))),
        "prompt_tokens": column(1, 2**31 - 1),
        "output_tokens": column(1, 2**31 - 1),
    }
    if draw(st.booleans()):
        columns["max_tokens"] = [min(n + 5, 2**31 - 1) for n in columns["output_tokens"]]
    if draw(st.booleans()):
        columns["priority"] = column(-(2**31), 2**31 - 1)
    if draw(st.booleans()):
        columns["session"] = column(-1, 2**63 - 1)
    if draw(st.booleans()):
        columns["prefix_group"] = column(-1, 2**31 - 1)
        columns["prefix_tokens"] = [n // 2 for n in columns["prompt_tokens"]]
    if draw(st.booleans()):
        times = columns["arrival_ps"]
        earlier = [[j for j in range(i) if times[j] == times[i]] for i in range(n)]
        columns["follows"] = [draw(st.sampled_from([-1, *rows])) for rows in earlier]
        columns["think_ps"] = [0 if row < 0 else draw(st.integers(0, 2**63 - 1)) for row in columns["follows"]]
    if draw(st.booleans()):
        # Text as people write it, with what CSV must quote; line ends are not part of a name.
        names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=6)
        names = names.map(lambda name: name if name.strip() else "")  # nothing but spaces is no name
        columns["tenants"] = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
        columns["tenant"] = column(0, len(columns["tenants"]) - 1)
    if draw(st.booleans()):
        columns["hash_block"] = draw(st.integers(1, 1024))
        most = [min(3, -(-n // columns["hash_block"])) for n in columns["prompt_tokens"]]
        rows = [draw(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), max_size=m)) for m in most]
        values = np.array([i for row in rows for i in row], np.int64)
        columns["hash_ids"] = HashIds(values, np.cumsum([0, *(len(row) for row in rows)]))
    return Trace(**columns)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
@settings(max_examples=60)
@given(trace=traces())
def test_what_is_saved_is_loaded_back_exactly(tmp_path, name, trace):
    save(trace, tmp_path / name)

    same(trace, load(tmp_path / name))


def test_what_follows_reads_as_people_write_it(tmp_path):
    rows = ["0.5,5,5,-1,0", "0.5,6,6,0,1.25", "0.5,7,7,1,0.000000000001"]
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,follows,think_s\n" + "\n".join(rows) + "\n")
    trace = load(tmp_path / "t.csv")
    save(trace, tmp_path / "again.csv")

    assert trace.follows.tolist() == [-1, 0, 1]
    assert trace.think_ps.tolist() == [0, 1_250_000_000_000, 1]
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "t.csv").read_text()
    assert load(tmp_path / "t.csv", limit=2).follows.tolist() == [-1, 0]


def test_what_follows_wrongly_is_named_with_its_line(tmp_path):
    head = "arrival_s,prompt_tokens,output_tokens,follows,think_s\n"
    (tmp_path / "t.csv").write_text(head + "0,5,5,-1,2\n0,5,5,1,0\n1,5,5,0,1e9\n0.5,5,5,-1,x\n")
    assert refused(tmp_path / "t.csv") == [
        (4, "think_s", "must be at most 106 days", "1e9"),
        (5, "think_s", "must be a number of seconds", "x"),
    ]

    (tmp_path / "t.csv").write_text(head + "0,5,5,-1,2\n0,5,5,1,0\n1,5,5,0,3\n")
    assert refused(tmp_path / "t.csv") == [
        (2, "think_s", "must be 0 where follows is -1", "2"),
        (3, "follows", "must be the row, counted from 0, of an earlier request, or -1", "1"),
        (4, "arrival_s", "must be that of the row it follows", "1"),
    ]


@pytest.mark.parametrize("given", [("follows", "-1"), ("think_s", "0")])
def test_follows_without_think_s_is_refused(tmp_path, given):
    (tmp_path / "t.csv").write_text(f"arrival_s,prompt_tokens,output_tokens,{given[0]}\n0,5,5,{given[1]}\n")

    assert refused(tmp_path / "t.csv")[0][2] == "follows and a think time go together"


def test_think_ps_is_no_column_of_a_file(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens,follows,think_ps\n0,5,5,-1,0\n")

    assert "did you mean 'think_s'" in refused(tmp_path / "t.csv")[0][2]


def test_a_parquet_file_of_floats_is_read_as_they_print(tmp_path):
    table = pa.table({"arrival_s": [0.1, 0.3], "prompt_tokens": [5.0, 6.0], "output_tokens": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")

    assert load(tmp_path / "t.parquet").arrival_ps.tolist() == [10**11, 3 * 10**11]


@pytest.mark.parametrize("cell", [None, float("nan"), 5.5])
def test_a_parquet_file_names_the_row_and_column_at_fault(tmp_path, cell):
    table = pa.table({"arrival_s": [0.0, 1.0], "prompt_tokens": [5, cell], "output_tokens": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")

    [(line, column, rule, _)] = refused(tmp_path / "t.parquet")
    assert (line, column, rule) == (2, "prompt_tokens", "must be a whole number")


def test_a_parquet_file_is_of_no_other_format(tmp_path):
    save(Trace([0], [1], [1]), tmp_path / "t.parquet")

    assert "holds Chairlift's own format, not azure" in refused(tmp_path / "t.parquet", format="azure")[0][2]
    assert len(load(tmp_path / "t.parquet", "chairlift")) == 1


def test_a_parquet_file_cut_short_is_refused(tmp_path):
    pq.write_table(pa.table({"arrival_s": [0.0]}), tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:100])

    assert "cannot be read: " in refused(tmp_path / "t.parquet")[0][2]


def test_a_folder_that_is_not_there_cannot_be_saved_to(tmp_path):
    with pytest.raises(BadInput, match="cannot be written"):
        save(Trace([0], [1], [1]), tmp_path / "none" / "t.csv")
