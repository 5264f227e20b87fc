"""The shipped scenarios of the continuous-batching post, from their files, against figures worked out apart.

The figures come from a roofline account of the post on paper, made before the simulator: MFU 0.55, 80 % of the
bandwidth, Hugging Face's step fitted to 81 tokens/s. It prices mixed steps and padding more coarsely than the
simulator does, hence the margins.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from chairlift.sim.report import tables as report
from chairlift.sim.results.metrics import Latencies
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.scenario.load import load
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Study
from kit.places import ROOT

CAPS = ("cap 32", "cap 128", "cap 512", "cap 1536")
NAIVE, HONEST, FASTER, WORST_TGI, TGI, ORCA, VLLM_HF, VLLM = (
    "naive static",
    "honest static",
    "FasterTransformer",
    "worst-case TGI",
    "TGI / Ray Serve",
    "Orca (max)",
    "vLLM at HF speed",
    "vLLM",
)


@cache
def ran(name: str) -> tuple[Study, list[Outcome]]:
    study = load(ROOT / "scenarios" / f"{name}.yaml")
    return study, [simulate(setup) for setup in study.setups]


@cache
def rates() -> dict[tuple[str, str], float]:
    """(case, variant) → tokens/s, prompts counted."""
    _, outcomes = ran("anyscale_23x")
    return {(o.setup.case, o.setup.variant): o.summary["total_token_throughput"] for o in outcomes}


def text(width: int, show: Callable[[Console], None]) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    show(console)
    return console.export_text()


@pytest.mark.parametrize(
    ("variant", "tokens_per_s", "margin"),
    [(NAIVE, 81, 0.02), (HONEST, 250, 0.08), (FASTER, 350, 0.08), (TGI, 1156, 0.08), (VLLM, 2130, 0.08)],
)
def test_tokens_per_second_at_the_largest_cap(variant: str, tokens_per_s: float, margin: float) -> None:
    assert rates()["cap 1536", variant] == pytest.approx(tokens_per_s, rel=margin)


@pytest.mark.parametrize("cap", CAPS)
def test_order_of_the_ladder(cap: str) -> None:
    rate = {variant: rates()[cap, variant] for variant in (NAIVE, HONEST, FASTER, WORST_TGI, TGI, VLLM_HF, VLLM)}

    assert rate[NAIVE] <= rate[HONEST]
    assert (rate[FASTER] < rate[NAIVE]) == (cap == "cap 32")  # a sleep of 1 s costs most where batches are short
    assert rate[WORST_TGI] <= rate[TGI]
    assert rate[HONEST] < rate[TGI] < rate[VLLM] < rate[VLLM_HF]


def test_everybody_serves_everything() -> None:
    _, outcomes = ran("anyscale_23x")

    assert len(outcomes) == 8 * len(CAPS)
    assert {(o.summary["completed"], o.summary["rejected"]) for o in outcomes} == {(1000, 0)}
    for cap in CAPS:  # common random numbers: one workload for all
        assert len({o.summary["total_output_tokens"] for o in outcomes if o.setup.case == cap}) == 1


def test_orca_runs_seven_lanes() -> None:
    """15,700 slots hold seven reservations of 2048."""
    _, outcomes = ran("anyscale_23x")
    orca = [o.summary for o in outcomes if o.setup.variant == ORCA]

    assert {s["peak_running"] for s in orca} == {15_700 // 2048} == {7}
    assert all(s["mean_running"] == pytest.approx(7, abs=0.1) for s in orca)


def test_waterfall_multiplies_to_the_whole() -> None:
    study, outcomes = ran("anyscale_23x")
    names = [rung.variant for rung in study.waterfall]
    rate = [rates()["cap 1536", name] for name in names]
    factors = [after / before for before, after in pairwise(rate)]

    assert (names[0], names[-1]) == (NAIVE, VLLM)
    assert math.prod(factors) == pytest.approx(rate[-1] / rate[0])
    printed = text(120, lambda console: console.print(report.waterfall(study, outcomes)))
    assert f"{rate[-1] / rate[0]:.1f}×" in printed  # the whole, in the title
    for factor, rung in zip(factors, study.waterfall[1:], strict=True):
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"→ {rung.variant}  "))
        assert f"{factor:.2f}×" in line
        assert rung.because in line
    shown = [float(line.split("×")[0].split()[-1]) for line in printed.splitlines() if line.strip().startswith("→")]
    assert math.prod(shown) == pytest.approx(rate[-1] / rate[0], rel=0.02)  # two digits each


def test_output_says_what_is_fitted() -> None:
    study, outcomes = ran("anyscale_23x")
    said = " ".join(text(200, lambda console: report.show(console, study, outcomes)).split())

    for words in ("fitted to 81 tokens/s", "MFU 0.55", "no step below 37.2 ms", "declare their exact output lengths"):
        assert words in said


# median, 90th and 99th percentile of E2E latency in seconds, 100 requests
LATENCY = {
    ("1 request/s", "static at HF speed"): (106, 173, 179),
    ("1 request/s", FASTER): (67, 93, 103),
    ("1 request/s", TGI): (3.5, 11.8, 21),
    ("1 request/s", VLLM): (3.0, 10.1, 18),
    ("4 requests/s", "static at HF speed"): (142, 236, 248),
    ("4 requests/s", FASTER): (89, 151, 159),
    ("4 requests/s", TGI): (9.2, 16.9, 26),
    ("4 requests/s", VLLM): (3.7, 11.8, 21),
}


@pytest.mark.parametrize(("case", "variant"), LATENCY, ids=str)
def test_latency(case: str, variant: str) -> None:
    _, outcomes = ran("anyscale_latency")
    (outcome,) = (o for o in outcomes if (o.setup.case, o.setup.variant) == (case, variant))
    seconds = Latencies(outcome.requests).of("e2el") / 1000

    assert len(seconds) == 100
    assert np.percentile(seconds, (50, 90, 99)) == pytest.approx(LATENCY[case, variant], rel=0.15)


def test_paged_batching_hardly_notices_four_times_the_load() -> None:
    _, outcomes = ran("anyscale_latency")
    median = {(o.setup.case, o.setup.variant): o.summary["median_e2el_ms"] for o in outcomes}

    assert median["4 requests/s", VLLM] < 1.4 * median["1 request/s", VLLM]
    assert median["4 requests/s", TGI] > 2 * median["1 request/s", TGI]
