"""The research scenarios, reduced, show what their questions say."""

from __future__ import annotations

from functools import cache
from typing import Any

from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from kit.places import ROOT

RESEARCH = ROOT / "scenarios" / "research"


@cache
def summaries(name: str, requests: int, case: str = "") -> dict[str, dict[str, Any]]:
    """Variant → summary, of one case."""
    study = load(RESEARCH / f"{name}.yaml", [f"workload.requests={requests}"])
    return {s.variant: simulate(s).summary for s in study.setups if s.case == case}


def test_policy_zoo() -> None:
    light, heavy = (summaries("policy_zoo", 1500, case) for case in ("12/s", "26/s"))

    for summary in (*light.values(), *heavy.values()):
        assert summary["completed"] == 1500
    assert heavy["sarathi 512"]["p99_itl_ms"] < heavy["sarathi 2048"]["p99_itl_ms"] < heavy["vllm_v0"]["p99_itl_ms"]
    for found in (light, heavy):  # equal load, the tail of gaps between tokens
        assert found["sarathi 512"]["p99_itl_ms"] < found["vllm_v0"]["p99_itl_ms"]
        assert found["slo"]["p99_itl_ms"] < 50.1 < found["sglang"]["p99_itl_ms"]
    for prefill_first in ("vllm_v0", "sglang"):
        assert light[prefill_first]["median_ttft_ms"] < light["sarathi 2048"]["median_ttft_ms"]
    assert light["sarathi 2048"]["median_ttft_ms"] < light["sarathi 512"]["median_ttft_ms"]
    best = sorted(heavy, key=lambda v: -heavy[v]["request_goodput"])[:2]
    assert set(best) == {"slo", "deadline"}


def test_chunk_size() -> None:
    found = summaries("chunk_size", 1200)
    sizes = [512, 1024, 2048, 4096, 8192]
    tails = [found[f"budget {size}"]["p99_itl_ms"] for size in sizes]

    assert tails == sorted(tails)
    assert found["budget 8192"]["median_ttft_ms"] < found["budget 512"]["median_ttft_ms"]
    assert found["budget 128"]["median_ttft_ms"] > 10 * found["budget 512"]["median_ttft_ms"]
    assert found["slo 40 ms"]["p99_itl_ms"] < 40.1


def test_fairness() -> None:
    found = summaries("fairness", 500)

    assert found["first come"]["service_ratio"] > 2.5  # three times the requests
    assert found["fair (VTC)"]["service_ratio"] < 1.2
    assert found["fair (VTC)"]["output_throughput"] > 0.97 * found["first come"]["output_throughput"]


def test_prefix_cache() -> None:
    few, many, crowd = (summaries("prefix_cache", 500, case) for case in ("4 prefixes", "30 prefixes", "250 clients"))

    assert few["sglang no cache"]["prefix_hit_rate"] == 0
    assert few["sglang lpm"]["prefix_hit_rate"] > 0.75
    assert few["sglang fcfs"]["request_throughput"] > 3 * few["sglang no cache"]["request_throughput"]
    gain = [case["sglang lpm"]["prefix_hit_rate"] - case["sglang fcfs"]["prefix_hit_rate"] for case in (many, crowd)]
    assert gain[0] > 0.15
    assert many["sglang lpm"]["mean_e2el_ms"] < 0.7 * many["sglang fcfs"]["mean_e2el_ms"]
    assert gain[1] < gain[0] / 2  # SGLang orders by prefix only while at most 128 wait


def test_preemption() -> None:
    found = summaries("preemption", 500, "long prompts")

    assert found["recompute"]["swaps"] == 0
    assert found["swap"]["swaps"] == found["swap"]["preemptions"] > 50
    assert 0 < found["swap in 256 MiB"]["swaps"] < found["swap in 256 MiB"]["preemptions"]
    assert found["swap"]["mean_e2el_ms"] < found["recompute"]["mean_e2el_ms"]
    assert found["reserve true lengths"]["preemptions"] == 0


def test_length_prediction() -> None:
    found = summaries("length_prediction", 2500)
    mean = {variant: s["mean_e2el_ms"] for variant, s in found.items()}

    assert mean["τ 1"] == mean["oracle"]
    assert mean["τ 1"] < mean["τ 0.5"] < mean["τ 0"]
    assert mean["τ 0"] > 0.9 * mean["first come"]
    kept = (mean["τ 0"] - mean["τ 0.5"]) / (mean["τ 0"] - mean["oracle"])
    assert kept > 0.5


def test_disaggregation_ratio() -> None:
    chat, code = (summaries("disaggregation_ratio", 3000, case) for case in ("chat", "code"))

    def best(found: dict[str, dict[str, Any]]) -> str:
        apart = {variant: s for variant, s in found.items() if "prefill" in variant}
        return max(apart, key=lambda v: apart[v]["request_goodput"])

    assert best(chat) in ("4 prefill, 4 decode", "5 prefill, 3 decode")
    assert best(code) == "7 prefill, 1 decode"


def test_speculation() -> None:
    """The best number of drafts falls with the load; all of them pay alone, and many lose at a full one."""
    alone, half, full = (
        summaries("speculation", requests, case)
        for requests, case in ((2, "1 client"), (128, "64 clients"), (512, "256 clients"))
    )
    gains = [
        {name: summary["output_throughput"] / found["none"]["output_throughput"] for name, summary in found.items()}
        for found in (alone, half, full)
    ]
    best = [max(gain, key=lambda name: gain[name]) for gain in gains]

    assert best[0] in ("K 3", "K 5", "K 7")
    assert best[1:] == ["K 3", "K 1"]
    assert min(gain for name, gain in gains[0].items() if name != "none") > 1.4
    assert gains[2]["K 7"] < gains[2]["K 5"] < 1


def test_pipeline() -> None:
    """Alone, stages only add up; a crowd that fills them makes up for it with two stages."""
    alone, crowd = summaries("pipeline", 2, "1 client"), summaries("pipeline", 600, "256 clients")
    rates = [{name: summary["output_throughput"] for name, summary in found.items()} for found in (alone, crowd)]

    assert rates[0]["PP 4"] < 0.4 * rates[0]["TP 4"]
    assert 0.4 * rates[0]["TP 4"] < rates[0]["TP 2 PP 2"] < 0.7 * rates[0]["TP 4"]
    assert rates[1]["TP 2 PP 2"] > 0.95 * rates[1]["TP 4"]
    assert rates[1]["PP 4"] > 0.7 * rates[1]["TP 4"]
