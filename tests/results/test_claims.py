"""Published numbers beside ours, and how even a run is among tenants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chairlift.policies.sarathi import Sarathi
from chairlift.sim.results.catalogue import FIELDS
from chairlift.sim.results.claims import capacity
from chairlift.sim.results.fairness import between_tenants, service
from kit.by_hand import serve
from kit.command import chairlift

SCENARIO: dict[str, Any] = {
    "model": "opt-13b",
    "gpu": "a100-40gb",
    "workload": {
        "requests": 60,
        "arrivals": {"poisson": {"rate_per_s": 1}},
        "prompt_tokens": 100,
        "output_tokens": 50,
    },
    "compare": [
        {"name": "orca", "policy": {"name": "orca", "reserve": "max"}},
        {"name": "vllm", "policy": "vllm_v0"},
    ],
    "cases": [{"name": f"{rate}/s", "set": {"workload.arrivals.poisson.rate_per_s": rate}} for rate in (1, 4, 16, 64)],
    "claims": [
        {"says": "lanes", "published": 7, "metric": "mean_running", "of": "orca", "case": "64/s"},
        {"says": "a ratio", "published": [1, 9], "metric": "output_throughput", "of": "vllm", "over": "orca"},
        {
            "says": "capacity",
            "published": 3,
            "metric": "offered_rate",
            "of": "vllm",
            "within": {"p90_ttft_ms": 200, "median_tpot_ms": 40},
        },
    ],
}


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(**changes: Any) -> Any:
    Path("s.json").write_text(json.dumps(SCENARIO | changes), encoding="utf-8")
    return chairlift("run", "s.json", "--out", "out")


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([(1, 0.5), (2, 0.9), (4, 1.1)], (3.0, "")),  # half of the way from 0.9 to 1.1
        ([(1, 0.5), (2, 0.9)], (2, "at least")),
        ([(1, 1.5), (2, 1.9)], (1, "at most")),
        ([(1, 0.5), (2, 1.5), (3, 0.5)], (1.5, "")),  # the first crossing counts
        ([], (None, "")),
    ],
)
def test_capacity_is_where_the_limit_is_crossed(
    points: list[tuple[float, float]], found: tuple[float | None, str]
) -> None:
    assert (
        capacity(points) == pytest.approx(found) if found[0] is None else capacity(points)[0] == pytest.approx(found[0])
    )
    assert capacity(points)[1] == found[1]


def test_claims_are_checked_against_the_runs() -> None:
    result = run()
    found = json.loads(Path("out/claims.json").read_text(encoding="utf-8"))
    runs = {(r["case"], r["variant"]): r for r in json.loads(Path("out/comparison.json").read_text(encoding="utf-8"))}

    assert result.status == 0
    assert "published and simulated" in result.out
    assert found[0]["simulated"] == runs["64/s", "orca"]["mean_running"]
    last = [runs["64/s", name]["output_throughput"] for name in ("vllm", "orca")]
    assert found[1]["simulated"] == pytest.approx(last[0] / last[1])
    assert 4 < found[2]["simulated"] < 64


def test_every_metric_that_a_claim_may_name_is_in_the_summary() -> None:
    drafts = {"method": "mtp", "tokens": 1, "acceptance": {"length": 1.5}}
    workload = SCENARIO["workload"] | {"tenants": {"a": 1, "b": 1}}
    said: set[str] = set()
    for more in ({"speculate": drafts}, {"parallel": {"pipeline": 2}}):  # which do not go together
        run(slo={"ttft_ms": 500}, workload=workload, compare=[], claims=[], policy="vllm", **more)
        said |= json.loads(Path("out/summary.json").read_text(encoding="utf-8")).keys()

    assert {name for name in FIELDS if "transfer" not in name} <= said


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"of": "orce"}, "claims.0.of: no such variant – did you mean 'orca'? (got 'orce')"),
        ({"of": "orca", "over": "v"}, "claims.0.over: no such variant"),
        ({"of": "orca", "case": "2/s"}, "claims.0.case: no such case"),
        ({"of": "orca", "metric": "mean_run"}, "claims.0.metric: no such metric – did you mean 'mean_running'?"),
        ({"of": "orca", "within": {"p90_tft_ms": 1}}, "no such metric – did you mean 'p90_ttft_ms'?"),
        ({"of": "orca", "case": "1/s", "within": {"p90_ttft_ms": 1}}, "case and within must not both be given"),
    ],
)
def test_a_claim_about_nothing_is_refused(claim: dict[str, Any], message: str) -> None:
    result = run(claims=[{"says": "x", "published": 1} | claim])

    assert result.status == 2
    assert message in result.err.replace("\n", " ")


def test_service_is_counted_by_tenant_while_all_wait() -> None:
    # One at a time, 100 ps a step and 1 ps a token. a: (4, 1) at 0, 1, 2, 3; b: (8, 2) at 5, 5.
    #   0  a 104 -> 104, -> 208, -> 312, -> 416; b 108, 101 -> 625; -> 834
    # a waits until 312, b from 5 on: from 5 to 312 a gets three prompts of 4 and three answers, b nothing.
    world = serve(
        [(0, 4, 1)] * 4 + [(5, 8, 2)] * 2, lambda: Sarathi(max_batch=1), tenant=[0] * 4 + [1] * 2, tenants=("a", "b")
    )
    found = between_tenants(world.requests)
    assert found == {"service_gap": 3 * 4 + 3 * 2, "service_ratio": None}
    assert service(world.requests, np.array([4, 5]), 524) == 8 + 2  # b's first token of two, at 416 + 108
    assert service(world.requests, np.array([4, 5]), 834) == 2 * (8 + 2 * 2)
