"""The description of a trace, against numbers computed elsewhere."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from chairlift.sim.workload.describe import describe, prefix_reuse, table
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.trace import HashIds, Trace
from chairlift.sim.workload.workload import build
from kit.made import SYNTHETIC, needs_traces, workload
from kit.places import TRACES


@pytest.fixture(scope="module")
def stats():
    return json.loads((TRACES / "stats.json").read_text())


@needs_traces
@pytest.mark.parametrize(
    ("file", "family", "member"),
    [
        ("AzureLLMInferenceTrace_conv.csv.gz", "azure2023", "conv"),
        ("AzureLLMInferenceTrace_code.csv.gz", "azure2023", "code"),
        ("mooncake_conversation_trace.jsonl.gz", "mooncake", "conversation"),
        ("mooncake_synthetic_trace.jsonl.gz", "mooncake", "synthetic"),
    ],
)
def test_real_traces_are_described_as_computed_elsewhere(file, family, member, stats):
    truth, said = stats[family][member], describe(load(TRACES / file))

    assert said["requests"] == truth["rows"]
    assert said["rate_per_s"] == pytest.approx(truth["arr"]["rate"], rel=1e-9)
    assert said["gap_cv"] == pytest.approx(truth["arr"]["gap_cv"], rel=1e-8)
    for window in (1, 10, 60):
        # The synthetic trace ends 2 s into a minute, which the other computation counted as a whole one.
        if (member, window) != ("synthetic", 60):
            assert said["dispersion"][f"{window}s"] == pytest.approx(truth["arr"][f"iod_{window}s"])
    for ours, theirs in (("prompt_tokens", "inp"), ("output_tokens", "out")):
        for key in ("mean", "p50", "p90", "p99", "max"):
            assert said[ours][key] == pytest.approx(truth[theirs][key])
    assert said["correlation"]["pearson"] == pytest.approx(truth["corr"]["pearson"])
    assert said["correlation"]["spearman"] == pytest.approx(truth["corr"]["spearman"])
    if "prefix" in truth:
        assert said["prefix"]["token_hit"] == pytest.approx(truth["prefix"]["token_hit"], abs=1e-9)
        assert said["prefix"]["unique_blocks"] == truth["prefix"]["unique_blocks"]
        assert said["prefix"]["requests_with_hit"] == pytest.approx(truth["prefix"]["req_with_hit"])


def test_prefix_hits_are_the_leading_run_only():
    # Row 1 repeats 1, 2 and adds 3. Row 2 breaks at its first id, though it repeats 2. Row 3 has no ids.
    # Row 4 is row 1 again, whose last block holds 1 token. An id repeated within a row (row 0) is no hit.
    rows = [[1, 2, 2], [1, 2, 3], [9, 2], [], [1, 2, 3]]
    ids = HashIds(np.array([1, 2, 2, 1, 2, 3, 9, 2, 1, 2, 3]), np.cumsum([0] + [len(row) for row in rows]))
    made = Trace(
        arrival_ps=[0] * 5,
        prompt_tokens=[12, 9, 8, 5, 9],
        output_tokens=[1] * 5,
        hash_ids=ids,
        hash_block=4,
    )

    reuse = prefix_reuse(made)

    assert reuse["token_hit"] == (8 + 9) / 43
    assert reuse["block_hit"] == 5 / 11
    assert reuse["requests_with_hit"] == 2 / 5
    assert reuse["unique_blocks"] == 4


def test_prefix_groups_hit_what_an_earlier_member_had():
    made = Trace(
        arrival_ps=[0] * 5,
        prompt_tokens=[100] * 5,
        output_tokens=[1] * 5,
        prefix_group=[0, 0, 1, -1, 0],
        prefix_tokens=[10, 30, 50, 0, 20],
    )

    assert prefix_reuse(made)["token_hit"] == (0 + 10 + 0 + 0 + 20) / 500


def test_a_trace_of_one_request_is_described_without_rates():
    said = describe(Trace(arrival_ps=[5], prompt_tokens=[3], output_tokens=[4]))

    json.dumps(said, allow_nan=False)
    assert (said["rate_per_s"], said["gap_cv"], said["correlation"]["pearson"]) == (None, None, None)


def test_the_table_shows_the_numbers_that_are_known():
    made = build(workload(**SYNTHETIC), 0)
    sessions = Trace(made.arrival_ps, made.prompt_tokens, made.output_tokens, session=np.arange(50) // 2)
    out = Console(file=io.StringIO(), width=120)
    out.print(table(sessions, "mine"))
    text = out.file.getvalue()

    assert "512 mean" in text
    assert "25  2 requests each" in text
    assert "prefix" not in text
    assert "None" not in text
