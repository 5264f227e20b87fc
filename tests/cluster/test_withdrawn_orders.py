"""Orders of replicas that are withdrawn, schedules that cannot be kept, and outages of replicas that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import prepare
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Autoscale, Failures, Outage, Planned

BASE = {
    "model": "llama-3.1-8b",
    "gpu": "h100",
    "policy": "vllm",
    "router": "round_robin",
    "workload": {
        "requests": 120,
        "arrivals": {"constant": {"rate_per_s": 1}},
        "prompt_tokens": 128,
        "output_tokens": 20,
    },
}


def served(**keys: Any) -> Any:
    return simulate(prepare(Document(BASE | keys, {}, "case.yaml"), Path()))


def used(outcome: Any) -> dict[int, int]:
    replicas, counts = np.unique(np.array(outcome.requests.replica), return_counts=True)
    return dict(zip(replicas.tolist(), counts.tolist(), strict=True))


def plan(*entries: tuple[float, int], most: int = 8, provision_s: float = 60) -> dict[str, Any]:
    schedule = [{"at_s": at, "replicas": count} for at, count in entries]
    return {"autoscale": {"max": most, "provision_s": provision_s, "schedule": schedule}}


def test_an_order_withdrawn_before_it_comes_never_comes() -> None:
    outcome = served(**plan((10, 8), (40, 1)))

    assert used(outcome) == {0: 120}
    assert outcome.summary["replica_hours"] == pytest.approx(120 / 3600, rel=0.01)


def test_of_orders_the_last_are_withdrawn() -> None:
    # Two more are ordered for 70 s, two further ones for 80 s; at 75 s the second two are withdrawn.
    outcome = served(**plan((10, 3), (20, 5), (75, 3)))

    assert set(used(outcome)) == {0, 1, 2}
    assert outcome.summary["replica_hours"] == pytest.approx((120 + 2 * 50) / 3600, rel=0.01)


def test_what_is_ordered_again_comes_by_the_second_order() -> None:
    # Ordered at 10 s for 70 s, withdrawn at 20 s, ordered at 50 s for 110 s: nobody is there at 70 s.
    outcome = served(**plan((10, 2), (20, 1), (50, 2)))
    second = np.array(outcome.requests.arrival)[np.array(outcome.requests.replica) == 1] / 1e12

    assert second.min() >= 110
    assert outcome.summary["replica_hours"] == pytest.approx((120 + 10) / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("entries", "rule"),
    [
        ([(0, 9)], "9 replicas from 0 s on are not between min, 2, and max, 8"),
        ([(0, 1)], "1 replicas from 0 s on are not between min, 2, and max, 8"),
        ([(5, 3), (5, 4)], "two entries are for 5 s"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(entries: list[tuple[float, int]], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Autoscale(min=2, max=8, schedule=[Planned(at_s=at, replicas=count) for at, count in entries])


def test_looks_are_no_part_of_a_schedule() -> None:
    with pytest.raises(ValidationError, match="every_s must not be given with a schedule"):
        Autoscale(max=2, every_s=5, schedule=[Planned(at_s=0, replicas=1)])


@pytest.mark.parametrize(
    ("outages", "rule"),
    [
        ([(0, 5, None), (0, 9, 1)], "replica 0 cannot fail at 9 s: it is away from 5 s on, for good"),
        ([(1, 5, 10), (0, 6, 1), (1, 14, 1)], "replica 1 cannot fail at 14 s: it is away from 5 s on, until 15 s"),
        ([], "must have mtbf_s and mttr_s, or a schedule"),
    ],
)
def test_an_outage_of_a_replica_that_is_away_is_refused(outages: list[Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Failures(schedule=[Outage(replica=r, at_s=at, for_s=away) for r, at, away in outages])


def test_an_outage_of_a_replica_that_does_not_exist_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"failures\.schedule\.0\.replica: no such replica: there are 2, numbered from 0"
    ):
        served(replicas=2, failures={"schedule": [{"replica": 2, "at_s": 1}]})


def test_an_outage_while_a_replica_starts_is_refused() -> None:
    outages = [{"replica": 0, "at_s": 5, "for_s": 5}, {"replica": 0, "at_s": 15, "for_s": 5}]
    with pytest.raises(BadInput, match="replica 0 is still starting then, until 20 s"):
        served(replicas=2, failures={"schedule": outages}, start_up_s=10)


def test_an_outage_of_a_replica_that_is_not_up_is_told_of() -> None:
    outcome = served(**plan((10, 2), provision_s=20), failures={"schedule": [{"replica": 5, "at_s": 50, "for_s": 5}]})

    assert outcome.assumptions["outages"] == "replica 5 could not fail at 50 s: it was not up"
