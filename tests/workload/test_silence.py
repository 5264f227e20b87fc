"""Nothing that a file says is passed over in silence, an empty cell is no value, and digits are 0 to 9."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput, did_you_mean
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.formats.text_tables import decimal, whole

CSV = {
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,5,6"),
    "burstgpt": ("Timestamp,Request tokens,Response tokens", "5,5,6"),
    "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens", "0,5,6"),
}
JSONL = {
    "mooncake": {"timestamp": 0, "input_length": 5, "output_length": 6, "hash_ids": [1]},
    "vllm_timed_trace": {"timestamp": 0, "input_length": 5, "output_length": 6},
    "bailian": {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0, "input_length": 5, "output_length": 6},
    "aiperf": {"session_id": "a", "timestamp": 0, "input_length": 5, "output_length": 6},
    "dynamo": {"session_id": "a", "timestamp": 0, "input_length": 5, "output_length": 6},
}
NAMES = st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=12)


@pytest.mark.parametrize("format", CSV)
@given(name=NAMES)
def test_a_column_more_is_named_in_a_note(tmp_path_factory: pytest.TempPathFactory, format: str, name: str) -> None:
    header, row = CSV[format]
    if name in (*header.split(","), "Session ID"):
        return
    path = tmp_path_factory.getbasetemp() / "more.csv"
    path.write_text(f"{header},{name}\n{row},1\n", encoding="utf-8")

    assert load(path, format).notes[-1].startswith(f"columns not used: {name}")


@pytest.mark.parametrize("format", JSONL)
@given(name=NAMES)
def test_a_key_more_in_any_row_is_named_in_a_note(
    tmp_path_factory: pytest.TempPathFactory, format: str, name: str
) -> None:
    name = f"x{name}"  # no key of any format
    path = tmp_path_factory.getbasetemp() / "more.jsonl"
    first = JSONL[format]
    second = {**first, "timestamp": 1, name: 3} | ({"chat_id": 2} if format == "bailian" else {})
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second)), encoding="utf-8")

    assert load(path, format).notes[-1] == f"columns not used: {name}"


def test_our_own_format_refuses_a_column_more(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,Tennant\n0,1,1,a\n")

    with pytest.raises(BadInput, match="no such column – did you mean 'tenant'"):
        load(path)


def test_a_misspelt_column_is_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Sesion ID,Request tokens,Response tokens\n0,a,1,1\n")

    assert load(path).notes[-1] == "columns not used: Sesion ID – did you mean 'Session ID'?"


def test_images_are_said_not_to_be_used(tmp_path: Path) -> None:
    path = tmp_path / "lmm.csv"
    path.write_text("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 07:28:08.6530000,1,1000,63\n")

    assert load(path).notes == ("columns not used: NumImages",)


# ---- an empty cell is none ----


def test_empty_sessions_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Timestamp,Session ID,Request tokens,Response tokens\n0,,1,1\n1,a,1,1\n2,  ,1,1\n3,a,1,1\n")

    session = load(path).session
    assert session is not None
    assert session.tolist() == [-1, 0, -1, 0]


def test_empty_cells_of_our_own_format_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens,session,tenant,prefix_group,prefix_tokens,follows,think_s\n"
        "0,9,9,,,,,,\n0,9,9,3,acme,1,4,0,2\n"
    )
    trace = load(path)

    found = {name: getattr(trace, name).tolist() for name in ("session", "prefix_group", "prefix_tokens", "follows")}
    assert found == {"session": [-1, 3], "prefix_group": [-1, 1], "prefix_tokens": [0, 4], "follows": [-1, 0]}
    assert trace.tenants == ("", "acme")


def test_an_empty_number_of_tokens_is_still_wrong(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,,1\n")

    with pytest.raises(BadInput, match=r"t\.csv:2: prompt_tokens: must be a whole number \(got ''\)"):
        load(path)


# ---- digits ----


@pytest.mark.parametrize("cell", ["１２", "١٢", "1_000", "0x10", "12e99999", "", "1e5.0", "½", "nan", "inf", "1,5"])
def test_other_digits_are_no_numbers(cell: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        whole(cell)
    with pytest.raises(ValueError, match="must be"):
        decimal(cell)


@given(st.integers(-(10**18), 10**18))
def test_plain_digits_are_numbers(number: int) -> None:
    assert whole(str(number)) == whole(f" {number} ") == whole(f"{number}.0") == number


# ---- rows of 0 tokens ----


@pytest.mark.parametrize("format", ["azure", "vidur"])
def test_rows_of_0_tokens_are_refused_or_dropped_on_request(tmp_path: Path, format: str) -> None:
    header, row = CSV[format]
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n{row}\n{row.replace(',5,6', ',5,0')}\n")

    with pytest.raises(BadInput, match="must be at least 1"):
        load(path)
    trace = load(path, options={"drop_empty": True})
    assert len(trace) == 1
    assert "1 rows without prompt or output tokens dropped" in trace.notes


def test_names_are_near_whatever_their_case() -> None:
    assert did_you_mean("vLLM", ["vllm", "sglang"]) == " – did you mean 'vllm'?"
    assert did_you_mean("TTFT_MS", ["ttft_ms", "tpot_ms"]) == " – did you mean 'ttft_ms'?"
