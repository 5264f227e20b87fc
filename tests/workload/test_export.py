"""``chairlift trace export``: what a benchmark reads of the file is the workload that was simulated."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.replica.prefix_identity import Identity
from chairlift.sim.workload.export import TOOLS, block_ids, command, export
from chairlift.sim.workload.formats.read import load
from chairlift.sim.workload.trace import HashIds, Trace
from chairlift.sim.workload.workload import build
from kit.command import chairlift
from kit.made import workload

READ_AS = {"vllm-bench": "vllm_timed_trace", "mooncake": "mooncake", "guidellm": "vllm_timed_trace"}
PREFIXES = {
    "requests": 40,
    "arrivals": {"poisson": {"rate_per_s": 7}},
    "prompt_tokens": {"uniform": {"low": 20, "high": 1300}},
    "output_tokens": {"uniform": {"low": 1, "high": 60}},
    "prefix": {"groups": 3, "tokens": 600},
}
TURNS = Trace(
    arrival_ps=[0, 1, 2, 3, 4],
    prompt_tokens=[40, 30, 64, 100, 20],
    output_tokens=[8, 5, 4, 6, 1],
    session=[1, 2, 1, 1, -1],
)
NAMED = Trace(
    arrival_ps=[0, 0, 5],
    prompt_tokens=[70, 64, 90],
    output_tokens=[1, 1, 1],
    hash_ids=HashIds.of([[5, 6, 7], [5, 6], [5, 8]]),
    hash_block=32,
)


def drawn(**more: Any) -> Trace:
    return build(workload(**{**PREFIXES, **more}), 3)


def test_blocks_by_hand() -> None:
    shared = Trace([0, 0], [40, 50], [1, 1], prefix_group=[4, 4], prefix_tokens=[32, 32])

    assert list(block_ids(shared, 16)) == [[0, 1, 2], [0, 1, 3, 4]]
    assert list(block_ids(shared, 512)) == [[0], [1]]
    # the third turn repeats 64 + 4 tokens, of which the second sent 64; the first sent 40, and 32 in whole blocks
    assert list(block_ids(TURNS, 16)) == [
        [0, 1, 2],
        [3, 4],
        [0, 1, 5, 6],
        [0, 1, 5, 6, 7, 8, 9],
        [10, 11],
    ]
    # blocks of 32 halved: 5 is shared by all three, 6 by two of them
    assert list(block_ids(NAMED, 16)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 5, 6, 7, 8]]


@pytest.mark.parametrize("trace", [drawn(), TURNS, NAMED], ids=["groups", "sessions", "ids"])
def test_prompts_have_ids_in_common_where_a_replica_finds_blocks_in_common(trace: Trace) -> None:
    identity = Identity(trace, 16)
    tokens = [identity.tokens(row, count) for row, count in enumerate(trace.prompt_tokens.tolist())]
    ids = list(block_ids(trace, 16))
    hits = 0
    for one, other in itertools.combinations(range(len(trace)), 2):
        size = min(len(tokens[one]), len(tokens[other]))
        whole = int(np.cumprod(tokens[one][:size] == tokens[other][:size]).sum()) // 16
        common = [a == b for a, b in zip(ids[one], ids[other], strict=False)]
        exported = [*common, False].index(False)
        # the last part of a prompt is a block here, and none in a cache
        assert exported in (whole, whole + 1), (one, other)
        assert exported == whole or trace.prompt_tokens[one] == trace.prompt_tokens[other] or trace.hash_ids is not None
        hits += whole
    assert hits


@pytest.mark.parametrize("name", TOOLS)
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    tool, path = TOOLS[name], tmp_path / "w.jsonl"
    trace = drawn()
    export(trace, path, tool)
    back = load(path, READ_AS[name])

    assert (back.arrival_ps - (trace.arrival_ps - trace.arrival_ps[0])).tolist() == [0] * 40
    assert back.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert back.output_tokens.tolist() == trace.output_tokens.tolist()
    assert back.hash_ids is not None
    assert back.hash_block == tool.block


def test_what_a_file_does_not_say_is_told(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    shared = Trace([0, 0], [40, 50], [1, 1], prefix_group=[4, 4], prefix_tokens=[30, 30], priority=[1, 2])

    assert export(shared, path, TOOLS["vllm-bench"]) == [
        "28 shared prompt tokens lie beyond whole blocks of 16 tokens, so they are not shared there",
        "priority is left out: the tool's requests have none",
    ]
    [told] = export(TURNS, path, TOOLS["guidellm"])
    assert told.startswith("2 later turns of sessions share their session's prompts, but not its answers")
    [told] = export(Trace([0], [4], [2], max_tokens=[9]), path, TOOLS["mooncake"])
    assert told.startswith("caps on outputs (max_tokens) are left out")
    assert export(Trace([7], [4], [2]), path, TOOLS["mooncake"]) == []
    assert json.loads(path.read_text()) == {"timestamp": 0, "input_length": 4, "output_length": 2, "hash_ids": [0]}


def test_requests_that_wait_for_others_are_refused(tmp_path: Path) -> None:
    loop = drawn(arrivals=None, prefix=None, clients={"concurrency": 4})
    with pytest.raises(BadInput, match="requests that wait for others"):
        export(loop, tmp_path / "w.jsonl", TOOLS["vllm-bench"])
    assert not (tmp_path / "w.jsonl").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_the_command_names_file_model_and_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text(json.dumps({"model": "llama-3.1-8b", "workload": PREFIXES}))
    result = chairlift("trace", "export", "s.json", "my work.jsonl", "--to", tool)

    assert (result.status, result.err) == (0, "")
    words = shlex.split(result.out.splitlines()[-1])
    for word in ("my work.jsonl", "meta-llama/Llama-3.1-8B", "http://localhost:8000"):
        assert any(word in each for each in words), word
    assert words == shlex.split(command(TOOLS[tool], "meta-llama/Llama-3.1-8B", Path("my work.jsonl"), 40))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["s.json", "t.csv", "--to", "mooncake"], "t.csv: must end in .jsonl"),
        (["s.json", "t.jsonl", "--to", "moncake"], "--to: no such tool – did you mean 'mooncake'?"),
        (["s.json", "no/t.jsonl", "--to", "guidellm"], "cannot be written"),
        (["no.yaml", "t.jsonl", "--to", "guidellm"], "no.yaml: no such file"),
    ],
)
def test_what_cannot_be_exported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text(json.dumps({"workload": PREFIXES}))
    result = chairlift("trace", "export", *arguments)

    assert result.status == 2
    assert rule in result.err


class Letters:
    """A tokenizer whose tokens are single letters, as the tools take it from Hugging Face's."""

    all_special_ids = ()

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(26)}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 26 for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids)


def needs(module: str) -> Any:
    """A module of a tool; the test is skipped where the tool is not installed."""
    return pytest.importorskip(module, exc_type=ImportError)


def sent(trace: Trace, prompts: list[str], block: int) -> None:
    """Checks the prompts that a tool made up: lengths, and which blocks they have in common."""
    assert [len(prompt) for prompt in prompts] == trace.prompt_tokens.tolist()
    ids = list(block_ids(trace, block))
    for one, other in itertools.combinations(range(len(trace)), 2):
        same = [a == b for a, b in zip(prompts[one], prompts[other], strict=False)]
        common = [a == b for a, b in zip(ids[one], ids[other], strict=False)]
        assert [*same, False].index(False) // block == [*common, False].index(False)


@pytest.mark.filterwarnings("ignore")
def test_vllm_sends_what_was_simulated(tmp_path: Path) -> None:
    datasets = needs("vllm.benchmarks.datasets.datasets")
    trace, path = drawn(), tmp_path / "w.jsonl"
    export(trace, path, TOOLS["vllm-bench"])
    labels = {f"timed_trace_label_{key}": key for key in ("timestamp", "input_length", "output_length", "hash_ids")}
    rows = datasets.TimedTrace(dataset_path=str(path), random_seed=0, **labels).sample(Letters(), len(trace))

    assert [row.timestamp for row in rows] == pytest.approx((trace.arrival_ps - trace.arrival_ps[0]) / 1e12)
    assert [row.expected_output_len for row in rows] == trace.output_tokens.tolist()
    sent(trace, [row.prompt for row in rows], 16)


@pytest.mark.filterwarnings("ignore")
def test_guidellm_sends_what_was_simulated(tmp_path: Path) -> None:
    formats = needs("guidellm.data.deserializers.trace_mooncake")
    arguments = importlib.import_module("guidellm.schemas.data.deserializers")
    dataset = importlib.import_module("datasets").Dataset
    faker = importlib.import_module("faker").Faker()
    trace, path = drawn(), tmp_path / "w.jsonl"
    export(trace, path, TOOLS["guidellm"])
    words = TOOLS["guidellm"].command("m", str(path), len(trace))
    given = json.loads(words[words.index("--data") + 1])
    config = arguments.MooncakeTraceFormatArgs.model_validate(given)
    made = formats.MooncakeTraceFormat(config, dataset.from_json(str(path), cache_dir=str(tmp_path)))
    rows = [each[0] for each in made]
    for row in rows:
        made.validate_row(row)

    assert [row["timestamp"] for row in rows] == pytest.approx((trace.arrival_ps - trace.arrival_ps[0]) / 1e12)
    sent(trace, [made.create_prompt(row, Letters(), faker) for row in rows], 16)


@pytest.mark.filterwarnings("ignore")
def test_aiperf_reads_what_was_simulated(tmp_path: Path) -> None:
    models = needs("aiperf.dataset.loader.models")
    trace, path = drawn(), tmp_path / "w.jsonl"
    export(trace, path, TOOLS["mooncake"])
    rows = [models.MooncakeTrace.model_validate_json(line) for line in path.read_text().splitlines()]

    assert [row.timestamp for row in rows] == pytest.approx((trace.arrival_ps - trace.arrival_ps[0]) / 1e9)
    assert [row.output_length for row in rows] == trace.output_tokens.tolist()
    assert [row.input_length for row in rows] == trace.prompt_tokens.tolist()
    assert [len(row.hash_ids) for row in rows] == (-(-trace.prompt_tokens // 512)).tolist()
