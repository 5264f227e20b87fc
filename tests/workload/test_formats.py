"""Trace files: every format read as published, every mistake named with its line."""

import gzip
from fractions import Fraction

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.workload.formats.read import load
from kit.made import needs_traces
from kit.places import TRACES

OWN = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(path, **options):
    with pytest.raises(BadInput) as caught:
        load(path, **options)
    assert all(problem.file == str(path) for problem in caught.value.problems)
    return [(p.line, p.path, p.rule, p.value) for p in caught.value.problems]


# ---- formats, as published ----


AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 23:59:59.9799601,4808,10\r\n"
    b"2023-11-16 23:59:59.9799602,3180,8\r\n"
    b"2023-11-17 00:00:00.0000000,110,27"
)


@pytest.mark.parametrize("packed", [False, True])
def test_azure_stamps_are_exact_to_100_ns_and_cross_midnight(write, packed):
    trace = load(write(gzip.compress(AZURE, mtime=0) if packed else AZURE))

    assert trace.arrival_ps.tolist() == [0, 100_000, 200_399 * 100_000]
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]
    assert trace.output_tokens.tolist() == [10, 8, 27]
    assert trace.source == "trace.csv (azure format)"


def test_azure_2024_stamps_have_a_zone_and_may_lack_the_fraction(write):
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows = "2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:01+00:00,2,2\n2024-05-10 02:00:02+02:00,3,3\n"

    assert load(write(header + rows)).arrival_ps.tolist() == [0, 990_070_000_000, 1_990_070_000_000]


def test_one_azure_stamp_may_have_a_zone(write):
    """It has as many characters as the others, so it is noticed late."""
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    rows = "2023-11-16 18:15:46.6805900,1,1\n2023-11-16 19:15:50.9+01:00,2,2\n"

    assert load(write(header + rows)).arrival_ps.tolist() == [0, 4_219_410_000_000]


def test_burstgpt_drops_failures_and_says_so(write):
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "5,ChatGPT,0,0,0,Conversation log\n45,GPT-4,472,18,490,Conversation log\n118,GPT-4,7,9,16,API log\n"
    trace = load(write(header + rows))

    assert trace.arrival_ps.tolist() == [0, 73 * 10**12]
    assert trace.notes[0] == "1 failed requests (0 tokens) dropped"
    assert "at 45 s in the file" in trace.notes[1]


def test_burstgpt_2_is_read_by_name_and_keeps_sessions(write):
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = "19440110.5,b,43,A,906,446,1352,x\n19440161.0,a,2,A,36,29,65,x\n19440192.0,b,8,A,9,3,12,x\n"
    trace = load(write(header + rows))

    assert trace.arrival_ps.tolist() == [0, 50_500 * 10**9, 81_500 * 10**9]
    assert trace.prompt_tokens.tolist() == [906, 36, 9]
    assert trace.session.tolist() == [0, 1, 0]


MOONCAKE = (
    '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 27, "input_length": 512, "output_length": 6, "hash_ids": [0]}\n'
)


def test_mooncake_times_are_milliseconds_and_blocks_are_512(write):
    trace = load(write(MOONCAKE, "trace.jsonl"))

    assert trace.arrival_ps.tolist() == [0, 27 * 10**9]
    assert trace.hash_block == 512
    assert [trace.hash_ids.row(i).tolist() for i in range(2)] == [[0, 1], [0]]


def test_vidur_times_are_exact_decimals(write):
    trace = load(write("arrived_at,num_prefill_tokens,num_decode_tokens\n0.1,5,6\n0.30000000000000004,7,8\n"))

    assert trace.arrival_ps.tolist() == [10**11, 3 * 10**11]


def test_lengths_alone_are_read_only_when_times_are_not_needed(write):
    path = write("num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n")

    assert load(path, times=False).arrival_ps.tolist() == [0]
    [(line, column, rule, _)] = refused(path)
    assert (line, column) == (1, "arrived_at")
    assert "lengths only" in rule


def test_own_columns_of_every_kind(write):
    text = (
        "tenant,arrival_s,prompt_tokens,output_tokens,max_tokens,priority,session,prefix_group,prefix_tokens,"
        "hash_ids,hash_block\n"
        '"b, Inc.",0.000000000001,100,5,9,-1,7,0,64,5 6,64\n'
        "a,1e1,64,6.0,6,2,-1,-1,0,,64\n"
    )
    trace = load(write(text))

    assert trace.arrival_ps.tolist() == [1, 10 * 10**12]
    assert [trace.tenants[i] for i in trace.tenant] == ["b, Inc.", "a"]
    assert (trace.priority.tolist(), trace.max_tokens.tolist()) == ([-1, 2], [9, 6])
    assert [trace.hash_ids.row(i).tolist() for i in range(2)] == [[5, 6], []]
    assert trace.hash_block == 64


def test_the_first_rows_alone_are_read_under_a_limit(write):
    path = write(OWN + "0,1,1\n1,2,2\n2,never,looked at\n")

    assert len(load(path, limit=2)) == 2
    assert len(load(write(MOONCAKE + "{", "m.jsonl"), limit=2)) == 2
    with pytest.raises(BadInput, match="limit: must be at least 1"):
        load(path, limit=0)


def test_a_byte_order_mark_and_blank_lines_are_let_through(write):
    trace = load(write(b"\xef\xbb\xbf" + OWN.encode() + b"\n0,1,1\n\n1,2,2\n\n"))

    assert trace.prompt_tokens.tolist() == [1, 2]


# ---- mistakes ----


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_bad_cell_is_named_with_its_line(write, end, packed):
    rows = [
        "arrival_s,prompt_tokens,output_tokens",
        "0,1,1",
        "nan,x,1",
        "",
        "2,0,-3",
        "3,1.5,1,9",
        "inf,9,9",
        "4,5,",
    ]
    content = end.join(rows).encode()
    found = refused(write(gzip.compress(content, mtime=0) if packed else content))

    assert [(line, column, value) for line, column, _, value in found] == [
        (3, "arrival_s", "nan"),
        (3, "prompt_tokens", "x"),
        (5, "prompt_tokens", "0"),
        (5, "output_tokens", "-3"),
        (6, "", 4),
        (7, "arrival_s", "inf"),
        (8, "output_tokens", ""),
    ]


def test_cells_out_of_range_are_named_with_their_line(write):
    found = refused(write(OWN + "0,1,1\n-2,0,1\n1,1,3000000000\n2,1,0"))

    assert [(line, column, value) for line, column, _, value in found] == [
        (3, "prompt_tokens", "0"),
        (3, "arrival_s", "-2"),
        (4, "output_tokens", "3000000000"),
        (5, "output_tokens", "0"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "column", "cell"),
    [
        (OWN + "5,1,1\n\n4,1,1\n6,1,1\n3,1,1\n", 4, "arrival_s", "4"),
        (AZURE + b"\r\n2023-11-16 00:00:00.0000000,1,1\r\n", 5, "TIMESTAMP", "2023-11-16 00:00:00.0000000"),
        (MOONCAKE + MOONCAKE, 3, "timestamp", 0),
    ],
)
def test_times_out_of_order_name_the_first_row_and_say_to_sort(write, content, line, column, cell):
    [(at, name, rule, value)] = refused(write(content))

    assert (at, name, value) == (line, column, cell)
    assert "sort the rows" in rule


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "the file is empty"),
        (b"  \n \n", "the file is empty"),
        (OWN, "no requests below the header"),
        (gzip.compress(b"", mtime=0), "the file is empty"),
        (gzip.compress(AZURE * 50, mtime=0)[:-9], "cut short"),
        (gzip.compress(AZURE, mtime=0)[:30] + b"\x00" * 30, "gzip file is damaged|cut short"),
        (b"\x1f\x8bnonsense", "damaged"),
        (OWN.encode() + b"0,1,1\n1,\xff,1\n", "trace.csv:3: must be UTF-8 text"),
        (
            b"time,prompt,answer\n1,2,3\n",
            r"trace.csv:1: not a trace format Chairlift knows .*got 'time,prompt",
        ),
        (OWN + '0,"1,1\n1,1,1\n', "not CSV"),
        (OWN.replace("\n", "\r") + "0,1,1\r", "not CSV"),
        (
            "arrival_s,prompt_tokens,prompt_tokens\n0,1,1\n",
            "prompt_tokens: the header names this column twice",
        ),
        ("arrival_s,prompt_tokens,output_token\n0,1,1\n", "no such column – did you mean 'output_tokens'"),
        (
            "arrival_s,prompt_tokens,output_token\n0,1,1\n",
            "output_tokens: missing column – did you mean 'output_token'",
        ),
        (
            "TIMESTAMP,ContextTokens,Generated\n0,1,1\n",
            "GeneratedTokens: missing column – did you mean 'Generated'",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1.5,1,1\n", "2: TIMESTAMP: must be a time like"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-30 00:00:00,1,1\n", "2: TIMESTAMP"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-03 00:60:00,1,1\n",
            "2: TIMESTAMP: must be a time of",
        ),
        ("Timestamp,Request tokens,Response tokens\n1,0,0\n", "every request in the file failed"),
        (OWN + "0,1,1\n9999999,1,1\n", "3: arrival_s: must be within 106 days"),
        (OWN + "0,1,1\n1e999999999,1,1\n", "3: arrival_s: must be a number of seconds"),
        (OWN + f"0,{'9' * 5000},1\n", "2: prompt_tokens: must be a whole number"),
        (OWN[:-1] + ",max_tokens\n0,1,5,4\n", "2: max_tokens: must be at least the row's output tokens"),
        (OWN[:-1] + ",hash_ids\n0,1,5,1 x\n", "2: hash_ids: must be a whole number"),
        (OWN[:-1] + ",hash_ids\n0,1,5,1 2\n", "2: hash_ids: at most one id for each 512"),
        (OWN[:-1] + ",hash_block\n0,1,5,64\n1,1,1,32\n", "3: hash_block: must be the same"),
        ('{"timestamp": 0, "input_length": 5\n', "trace.csv:1: not JSON"),
        (MOONCAKE + "[1]\n", "3: must be a JSON object"),
        (MOONCAKE + "[" * 100_000, "3: not JSON"),
        (MOONCAKE.replace("27", "NaN"), "2: timestamp: must be a number of milliseconds"),
        (MOONCAKE.replace("27", '"a"'), "2: timestamp: must be a number of milliseconds"),
        (MOONCAKE.replace("27", "true"), "2: timestamp: must be a number of milliseconds"),
        (MOONCAKE.replace("512", "1e400"), "2: input_length: must be a whole number"),
        (MOONCAKE.replace("[0]", "[0, 1]"), "2: hash_ids: must have an id for each 512 of the 512 tokens"),
        (MOONCAKE.replace("[0]", "5"), "2: hash_ids: must be a list"),
        (
            MOONCAKE.replace("output_length", "outputlength"),
            "1: output_length: missing key – did you mean 'outputl",
        ),
        (MOONCAKE.replace(', "hash_ids": [0]', ""), "2: hash_ids: missing key"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(write, content, rule):
    path = write(content)
    with pytest.raises(BadInput, match=rule) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"passage_id": 0, "token_length": 84}\n', "RAGPulse"),
        (b"0.0,1.5,1.1,Gamma,0.8,1.2\n", "ServeGen"),
        (b'{"timestamp": 1, "input": "hello", "output": "world"}\n', "texts"),
        (b"PK\x03\x04", "zip"),
    ],
)
def test_formats_known_but_not_read_are_refused_by_name(write, content, what):
    [(_, _, rule, _)] = refused(write(content))

    assert what in rule
    assert "not a format Chairlift reads yet" in rule


def test_files_that_are_not_there_or_are_no_files(tmp_path):
    assert refused(tmp_path / "none.csv")[0][2] == "no such file"
    assert refused(tmp_path)[0][2] == "is a folder, not a file"


def test_an_unknown_format_gets_a_suggestion(write):
    with pytest.raises(BadInput, match="did you mean 'mooncake'"):
        load(write(OWN), format="mooncak")


def test_a_format_given_is_not_guessed(write):
    assert "missing column" in refused(write(OWN + "0,1,1\n"), format="azure")[0][2]


def test_twenty_problems_are_shown_and_the_rest_counted(write):
    found = refused(write(OWN + "0,x,1\n" * 33))

    assert [line for line, *_ in found[:20]] == list(range(2, 22))
    assert "13 more" in found[20][2]


# ---- the public files ----


@needs_traces
@pytest.mark.parametrize("kind", ["code", "conv"])
def test_azures_rows_are_vidurs_copy_of_them(kind):
    azure = load(TRACES / f"AzureLLMInferenceTrace_{kind}.csv.gz")
    vidur = load(TRACES / f"vidur_splitwise_{kind}.csv.gz")

    assert azure.prompt_tokens.tolist() == vidur.prompt_tokens.tolist()
    assert azure.output_tokens.tolist() == vidur.output_tokens.tolist()
    # The copy keeps microseconds; the stamps have tenths of them.
    assert np.abs(azure.arrival_ps - vidur.arrival_ps).max() <= 10**6


@needs_traces
def test_an_azure_stamp_deep_in_the_file_is_exact():
    trace = load(TRACES / "AzureLLMInferenceTrace_conv.csv.gz")
    span = Fraction("19") * 3600 + 14 * 60 + Fraction("8.4025270") - (18 * 3600 + 15 * 60 + Fraction("46.6805900"))

    assert int(trace.arrival_ps[-1]) == span * 10**12


@needs_traces
@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("burstgpt_1_head42_format_fixture.csv.gz", 38),
        ("burstgpt_3_head4_format_fixture.csv.gz", 4),
        ("mooncake_conversation_trace.jsonl.gz", 12_031),
        ("mooncake_synthetic_trace.jsonl.gz", 3_993),
        ("etalon_bwb_stats_llama2_tokenizer_filtered_v2.csv.gz", 33_768),
        ("vidur_arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz", 28_257),
    ],
)
def test_public_files_are_read_whole(file, rows):
    assert len(load(TRACES / file, times=False)) == rows


@needs_traces
@pytest.mark.parametrize("pattern", ["servegen_*", "ragpulse_[1-5]*", "splitwise_sim_*"])
def test_public_files_not_read_yet_say_so(pattern):
    paths = sorted(TRACES.glob(pattern))

    assert paths
    for path in paths:
        assert "not a format Chairlift reads yet" in refused(path)[0][2]
