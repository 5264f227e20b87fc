"""The key `speculate`: what it may say, what comes of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from chairlift.policies.vllm import Vllm
from chairlift.sim.bad_input import BadInput
from chairlift.sim.cli.bench import fingerprint
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario.load import load
from chairlift.sim.scenario.resolved import relocated
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Setup
from kit.command import chairlift
from kit.serving import commands, flags

BASE = """\
model: llama-3.1-8b
gpu: h200
policy: vllm
workload: {requests: 40, arrivals: {poisson: {rate_per_s: 20}}, prompt_tokens: 200, output_tokens: 50}
"""
EAGLE = "speculate: {method: eagle3, tokens: 3, acceptance: {length: 2.4}, draft: {vocab: 32000}}\n"


def setup(folder: Path, more: str, *assignments: str) -> Setup:
    (folder / "s.yaml").write_text(BASE + more)
    [found] = load(folder / "s.yaml", assignments).setups
    return found


def refusals(folder: Path, more: str, *assignments: str) -> list[str]:
    with pytest.raises(BadInput) as caught:
        setup(folder, more, *assignments)
    return [f"{problem.path}: {problem.rule}" for problem in caught.value.problems]


def test_no_drafts_are_the_run_without_the_key(tmp_path: Path) -> None:
    plain = simulate(setup(tmp_path, ""))
    none = simulate(setup(tmp_path, "speculate: {method: eagle3, tokens: 0, acceptance: {length: 1}}\n"))

    assert fingerprint(none) == fingerprint(plain)
    assert none.assumptions == plain.assumptions
    assert {**none.summary, "wall_s": 0, "requests_per_wall_s": 0} == {
        **plain.summary,
        "wall_s": 0,
        "requests_per_wall_s": 0,
    }


FROM_FILE = "speculate: {method: eagle3, tokens: 2, acceptance: {file: 'own/al.yaml:off'}, draft: {vocab: 32000}}\n"


def test_a_curve_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "al.yaml").write_text("m:\n  on: {1: 1.9, 2: 2.7}\n  off: {1: 1.8, 2: 2.3, 3: 2.5}\n")
    from_file = setup(tmp_path, FROM_FILE)
    inline = setup(tmp_path, FROM_FILE.replace("file: 'own/al.yaml:off'", "lengths: [1.8, 2.3, 2.5]"))

    assert from_file.speculate is not None
    assert from_file.speculate.acceptance.of(2) == pytest.approx([0.8, 0.5])
    assert fingerprint(simulate(from_file)) == fingerprint(simulate(inline))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("off: {1: 1.8}\n", "own/al.yaml: lengths end at 1 drafts (tokens is 2)"),
        ("off: {1: 1.8, 3: 2}\n", "own/al.yaml: a curve must have the lengths with 1, 2"),
        ("on: {1: 1.8, 2: 2}\n", "own/al.yaml: does not hold one curve off (got on)"),
        ("off: {1: 0.8, 2: 2}\n", "own/al.yaml: lengths.0 must be greater than or equal to 1 (got 0.8)"),
        ("off: {1: 1.8, 2: 4}\n", "own/al.yaml: lengths must be at most 3 with 2 drafts (got 4)"),
    ],
)
def test_a_file_without_the_curve_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    (tmp_path / "own").mkdir()
    if text is not None:
        (tmp_path / "own" / "al.yaml").write_text(text)

    [told] = refusals(tmp_path, FROM_FILE)
    assert said in told


def test_drafts_shorten_answers_and_are_told(tmp_path: Path) -> None:
    plain, drafted = simulate(setup(tmp_path, "")), simulate(setup(tmp_path, EAGLE))

    assert drafted.summary["median_tpot_ms"] < 0.6 * plain.summary["median_tpot_ms"]
    assert drafted.summary["accepted_length"] == pytest.approx(2.4, abs=0.1)
    assert "accepted_length" not in plain.summary
    assert drafted.assumptions["drafts"] == "3 by eagle3, kept in 66%, 44%, 29% of the steps (as given)"
    assert "a pass of llama-3.1-8b eagle3 (vocab 32000) takes" in drafted.assumptions["drafting"]
    assert drafted.setup.groups[0].blocks < plain.setup.groups[0].blocks  # KV and weights of the layer that drafts


def test_on_stages_the_same_drafts_are_kept_and_the_last_stage_makes_them(tmp_path: Path) -> None:
    one, two = (simulate(setup(tmp_path, EAGLE, *more)) for more in ((), ("parallel={pipeline: 2}",)))
    told = two.assumptions

    assert list(two.requests.extra["accepted_tokens"]) == list(one.requests.extra["accepted_tokens"])
    assert two.summary["completed"] == 40
    assert told["pipeline"].endswith("2 stages, which take equal times, the last one its passes that draft besides")
    assert told["drafting"] == one.assumptions["drafting"]  # on the GPUs of one stage
    assert two.setup.groups[0].blocks > 2 * one.setup.groups[0].blocks  # half of the layers on each GPU
    assert 0 < two.summary["bubble_share"] < 1


def test_variants_with_drafts_and_without_make_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(f"{BASE}compare: [{{name: plain}}, {{name: drafted, {EAGLE.strip()}}}]\n")
    study = load(tmp_path / "s.yaml")
    with Writer(tmp_path / "out", study) as writer:
        for each in study.setups:
            writer.add(simulate(each))

    rows = pq.read_table(tmp_path / "out" / "requests.parquet").to_pylist()
    accepted = {name: sum(r["accepted_tokens"] for r in rows if r["variant"] == name) for name in ("plain", "drafted")}
    assert accepted["plain"] == 0
    assert accepted["drafted"] > 500


@pytest.mark.parametrize(
    ("version", "caching", "method", "prefix"),
    [
        ("0.33", True, "eagle3", "lookahead"),
        ("0.26", True, "mtp", "drop"),
        ("0.33", False, "eagle3", "plain"),
        ("0.33", True, "draft_model", "plain"),
    ],
)
def test_the_prefix_cache_looks_ahead_for_layers_that_read_states(
    version: str, caching: bool, method: str, prefix: str
) -> None:
    told = Vllm(version=version, enable_prefix_caching=caching).speculation(method, 3)

    assert (told.prefix, told.lookahead) == (prefix, 3)
    assert Vllm().speculation("ngram", 3).lookahead == 0


@pytest.mark.parametrize(
    ("more", "assignments", "said"),
    [
        (
            EAGLE,
            ["backend=torch", "speculate.method=mtp"],
            "speculate: must not be given with this backend, which executes",
        ),
        (EAGLE, ["policy=sarathi"], "speculate: is modelled with the policy vllm only"),
        (
            EAGLE,
            ["backend=h200-llama-3.1-8b-eagle3-vllm-0.26", "speculate.method=mtp"],
            "speculate: profile h200-llama-3.1-8b-eagle3-vllm-0.26 was measured with 3 drafts by eagle3, not with",
        ),
        (EAGLE, ["backend=h200-opt-13b-vllm-0.23"], "speculate: profile h200-opt-13b-vllm-0.23 is of opt-13b, not of"),
        (
            "",
            ["backend=h200-llama-3.1-8b-eagle3-vllm-0.26"],
            "backend: profile h200-llama-3.1-8b-eagle3-vllm-0.26 was measured with 3 drafts by eagle3, not without any",
        ),
        (
            EAGLE,
            ["parallel={pipeline: 2}", "policy={name: vllm, async_scheduling: false}"],
            "speculate: must not be given with pipeline stages and async_scheduling: false, by which vLLM 0.33",
        ),
        (
            EAGLE,
            ["parallel={pipeline: 2}", "policy={name: vllm, version: 0.31}"],
            "speculate: must not be given with pipeline stages and vLLM 0.31: of its decisions with both no ledger",
        ),
        (
            EAGLE,
            ["parallel={pipeline: 2}", "model=gpt-oss-20b", "speculate.draft=null"],
            "speculate: must not be given with pipeline stages where layers have windows",
        ),
        (
            EAGLE,
            ["parallel={pipeline: 2}", "backend=torch"],
            "speculate: must not be given with pipeline stages and a backend that executes steps",
        ),
        (EAGLE, ["speculate.method=ngram"], "speculate: draft must not be given with ngram"),
        (EAGLE, ["speculate.acceptance={length: 5}"], "speculate: length must be at most 1 + tokens, 4 (got 5)"),
        (EAGLE, ["speculate.acceptance={}"], "speculate.acceptance: exactly one of"),
        (EAGLE, ["speculate.draft=qwen2.5-0.5b"], "speculate.draft: must be numbers of the drafting layer"),
        (EAGLE, ["speculate.draft={vocabulary: 3}"], "speculate.draft.vocabulary: "),
        (EAGLE, ["speculate.tokens=33"], "speculate.tokens: must be"),
        (
            EAGLE.replace("eagle3", "draft_model").replace("{vocab: 32000}", "nobodys"),
            [],
            "speculate.draft: unknown model",
        ),
        (
            "speculate: {method: ngram, tokens: 2, acceptance: {length: 2}}\n",
            [],
            "speculate: method ngram needs policy.async_scheduling: false",
        ),
        (
            EAGLE,
            ["model=gpt-oss-20b", "speculate.draft=null", "policy={name: vllm, version: 0.31}"],
            "speculate: is not modelled with vLLM 0.31 where layers give KV back and prefixes are cached: 0.33 is",
        ),
        (
            EAGLE + "link: {gb_per_s: 50}\n",
            ["replicas=[{count: 1, role: prefill}, {count: 1, role: decode}]"],
            "speculate: must not be given with prefill and decode replicas",
        ),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, more: str, assignments: list[str], said: str) -> None:
    assert any(text.startswith(said) for text in refusals(tmp_path, more, *assignments)), refusals(
        tmp_path, more, *assignments
    )


def test_a_drafting_layer_is_kept_beside_the_layers_that_look_back_on_all(tmp_path: Path) -> None:
    """Gemma 3 27B: 52 layers with a window and 10 without are 6 groups and 1; with 11, 5 groups and 1."""
    plain = setup(tmp_path, "", "model=gemma-3-27b").groups[0].kv_groups
    drafted = setup(tmp_path, EAGLE, "model=gemma-3-27b").groups[0].kv_groups

    assert plain is not None
    assert drafted is not None
    assert [len(groups.windows) for groups in (plain, drafted)] == [7, 6]
    assert [groups.windows.count(0) for groups in (plain, drafted)] == [1, 1]


def test_variants_are_compared_by_what_they_keep_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(BASE + f"compare:\n  - {{name: none}}\n  - {{name: three, {EAGLE.strip()}}}\n")
    told = chairlift("run", "s.yaml", "--out", "out").out.splitlines()
    _, three = json.loads((tmp_path / "out" / "comparison.json").read_text())
    kept = [f"{three['accepted_length']:.2f}", f"{three['drafts_wasted']:.0%}"]

    assert next(line for line in told if "tokens/s " in line).split()[-2:] == ["accepted", "wasted"]
    assert [line.split()[-2:] for line in told if line.strip().startswith(("none ", "three "))][:2] == [
        ["–", "–"],
        kept,
    ]


def test_a_life_is_told_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drafted = setup(tmp_path, EAGLE)
    assert chairlift("run", "s.yaml", "--events", "--out", "out").status == 0
    outputs = int(simulate(drafted).requests.messages()[7])

    told = " ".join(chairlift("explain", "7", "--in", "out").out.split())
    assert f"decodes in {outputs - 1} steps, with drafts kept, in" in told


def test_a_model_that_drafts_is_priced_and_kept_as_it_is(tmp_path: Path) -> None:
    small = EAGLE.replace("eagle3", "draft_model").replace("{vocab: 32000}", "qwen2.5-0.5b")
    outcome = simulate(setup(tmp_path, small))
    sizes: dict[str, Any] = outcome.summary

    assert "a pass of qwen2.5-0.5b takes" in outcome.assumptions["drafting"]
    assert sizes["completed"] == 40


def test_the_engines_line_says_the_drafts(tmp_path: Path) -> None:
    lines = commands(setup(tmp_path, EAGLE))

    assert flags(lines[-1])["speculative_config"] == '{"method": "eagle3", "num_speculative_tokens": 3}'
    assert any('say the checkpoint that drafts as "model" in --speculative-config' in line for line in lines)


def test_a_drafting_models_file_is_one_that_the_run_reads(tmp_path: Path) -> None:
    """A scenario that is put elsewhere still finds it."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 8, "intermediate_size": 1024, "vocab_size": 128256, "torch_dtype": "bfloat16"}
    config |= {"num_key_value_heads": 8, "max_position_embeddings": 131072}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    told = EAGLE.replace("eagle3", "draft_model").replace("{vocab: 32000}", "small/config.json")
    outcome = simulate(setup(tmp_path, told))
    study = load(tmp_path / "s.yaml")

    assert "a pass of small takes" in outcome.assumptions["drafting"]
    assert relocated(study.resolved, tmp_path / "runs" / "s")["speculate"]["draft"] == "../../small/config.json"
