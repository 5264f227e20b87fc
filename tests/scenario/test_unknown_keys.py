"""A key that nobody knows is an error with a suggestion, wherever in a scenario it stands."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import load

FULL = """
name: all
question: what?
model: {name: llama-3.1-8b, max_model_len: 8000}
gpu: {name: h100, memory_gib: 80}
tensor_parallel: 1
replicas: 2
router: {name: round_robin}
policy: {name: vllm, max_num_seqs: 64}
backend: {name: roofline, mfu: 0.5}
kv: {block_size: 16, memory_utilization: 0.9}
limits: {queue: 50, timeout_s: 30}
slo: {ttft_ms: 500}
failures: {mtbf_s: 100, mttr_s: 5, schedule: [{replica: 0, at_s: 2, for_s: 1}]}
start_up_s: 1
seed: 3
workload:
  requests: 20
  arrivals: {gamma: {rate_per_s: 5, cv: 2}}
  prompt_tokens: {mixture: {weights: [1, 2], parts: [{constant: {tokens: 20}}, {normal: {mean: 50, std: 5}}]}}
  output_tokens: {exponential: {mean: 20, cap: 90}}
  prefix: {groups: 2, tokens: 8}
  priority: {weights: [1, 1]}
  tenants: {a: 1, b: 2}
compare:
  - {name: one, note: x}
  - {name: two, policy: {name: sarathi, budget: 256}, autoscale: {max: 3, target_waiting: 2}, limits: {queue: 9}}
baseline: [one]
waterfall: [{variant: one}, {variant: two, because: y}]
claims: [{says: z, published: 2, of: one, within: {median_ttft_ms: 900}}]
cases: [{name: c, set: {seed: 4}}]
tables: [latency]
"""
SESSIONS = """
model: opt-13b
gpu: a100-40gb
max_model_len: 2000
policy: {name: vllm}
replicas: [{count: 1, role: prefill, kv: {blocks: 500}}, {count: 1, role: decode, kv: {tokens: 8000}}]
link: {gb_per_s: 25, latency_us: 5}
workload:
  duration_s: 20
  arrivals: {stages: {type: poisson, interval: 1, stages: [{rate: 1, duration: 9}, {rate: 1, to: 2, duration: 5}]}}
  sessions: {turns: 2, think_s: {exponential: {mean_s: 3}}, first_prompt_tokens: {uniform: {low: 5, high: 9}}}
  prompt_tokens: {lognormal: {mu: 3, sigma: 1, cap: 90}}
  output_tokens: {quantiles: {levels_pct: [0, 100], tokens: [1, 30]}}
"""
CLIENTS = """
model: opt-13b
gpu: a100-40gb
max_model_len: 2000
policy: vllm
workload:
  mix:
    chat:
      requests: 5
      clients: {concurrency: 2, ramp_s: 1, think_s: {lognormal: {mu: 0, sigma: 1}}}
      prompt_tokens: 9
      output_tokens: {values: [3, 4]}
    batch: {name: sharegpt, requests: 5, arrivals: {spikes: {rate_per_s: 1, factor: 2, every_s: 9, for_s: 1}}}
"""
FREE = {
    ("workload", "tenants"),
    ("workload", "mix"),
    ("cases", 0, "set"),
    ("claims", 0, "within"),
}  # keys are the user's

Place = tuple[str | int, ...]


def mappings(here: Any, at: Place = ()) -> Iterator[Place]:
    """The places of all mappings whose keys are known."""
    if isinstance(here, dict):
        if at not in FREE:
            yield at
        for key, below in here.items():
            yield from mappings(below, (*at, key))
    elif isinstance(here, list):
        for i, below in enumerate(here):
            yield from mappings(below, (*at, i))


DOCUMENTS = [yaml.safe_load(text) for text in (FULL, SESSIONS, CLIENTS)]
PLACES = [(i, place) for i, document in enumerate(DOCUMENTS) for place in mappings(document)]


def refusals(document: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    try:
        load(path)
    except BadInput as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize("document", DOCUMENTS, ids=["all", "sessions", "clients"])
def test_the_documents_themselves_are_right(document: dict[str, Any], tmp_path: Path) -> None:
    assert refusals(document, tmp_path) == []


@settings(max_examples=150)
@given(
    st.sampled_from(PLACES),
    st.text(st.characters(categories=["Ll", "Lu", "Nd"], max_codepoint=0x17F), min_size=2, max_size=12),
    st.sampled_from([None, 1, "x", {"a": 1}, []]),
)
def test_an_unknown_key_is_refused_with_a_suggestion(
    tmp_path_factory: pytest.TempPathFactory, where: tuple[int, Place], key: str, value: Any
) -> None:
    number, place = where
    document = copy.deepcopy(DOCUMENTS[number])
    here = document
    for part in place:
        here = here[part]
    key = f"{key}_zz"  # no key of any mapping
    here[key] = value
    dotted = ".".join(map(str, (*place, key)))
    said = refusals(document, tmp_path_factory.getbasetemp())

    about = [text for text in said if dotted in text or key in text]
    assert about, said
    assert any(
        "did you mean" in text or "allowed:" in text or "known:" in text or "exactly one of" in text for text in about
    ), about


def misspelt(key: str) -> str:
    """``key`` with two of its letters exchanged."""
    return key[0] + key[2] + key[1] + key[3:]


KNOWN = [
    (number, place, key)
    for number, place in PLACES
    for document in [DOCUMENTS[number]]
    for here in [document if not place else None]
    for key in (document if here is not None else [])
    if len(key) > 3 and misspelt(key) != key
]


@pytest.mark.parametrize(("number", "place", "key"), KNOWN, ids=lambda part: str(part))
def test_a_misspelt_key_is_guessed(number: int, place: Place, key: str, tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENTS[number])
    document[misspelt(key)] = document.pop(key)

    assert any(f"did you mean '{key}'" in text for text in refusals(document, tmp_path))


def test_case_is_ignored(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENTS[0])
    document["Policy"] = document.pop("policy")
    assert any("did you mean 'policy'" in text for text in refusals(document, tmp_path))
    document["policy"] = "vLLM"
    assert any("did you mean 'vllm'" in text for text in refusals(document, tmp_path))
