"""Racing: clearly beaten points stop, others never do for want of luck."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.yaml_document import Document
from chairlift.sim.sweep.racing import Race
from chairlift.sim.sweep.runs import Row, Run

SEEDS = 12


def contest(points: list[dict[str, str]], metrics: list[str], over: list[str], **options: float) -> Race:
    runs = [
        [Run(Document({"point": i}, {}, ""), Path(), dict(p), s) for s in range(SEEDS)] for i, p in enumerate(points)
    ]
    return Race(runs, points, metrics, over, **options)  # type: ignore[arg-type]


def ended(race: Race, figures: dict[tuple[int, int], dict[str, float]]) -> list[tuple[int, int]]:
    """(point, seed) of all runs made; ``figures`` by the same."""
    made = []

    def runner(runs: Iterable[Run]) -> Iterator[tuple[Run, Row]]:
        for run in runs:
            at = run.document.data["point"], run.seed
            made.append(at)
            yield run, Row("", "" if at in figures else "it broke", figures.get(at, {}), 0.0, 0.0)

    assert [(run.document.data["point"], run.seed) for run, _ in race.run(runner)] == made
    return made


def drawn(means: list[float], noise: float, seed: int = 0) -> dict[tuple[int, int], dict[str, float]]:
    """Common noise large, each point's own small: what common random numbers give."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 50, SEEDS)
    return {
        (i, s): {"p99_ttft_ms": 1000 + mean + common[s] + rng.normal(0, noise), "request_goodput": 5.0}
        for i, mean in enumerate(means)
        for s in range(SEEDS)
    }


def test_the_clearly_worse_stops_after_some_seeds_and_the_close_ones_run_on() -> None:
    race = contest([{"policy": p} for p in "abc"], ["p99_ttft_ms"], ["policy"])
    made = ended(race, drawn([0, 0.1, 300], 2))

    assert set(race.out) == {2}
    assert "policy a is better in p99_ttft_ms after 3 seeds" in race.out[2] or "policy b" in race.out[2]
    assert [s for p, s in made if p == 2] == [0, 1, 2]
    assert [s for p, s in made if p == 0] == [s for p, s in made if p == 1] == list(range(SEEDS))


def test_more_is_better_where_it_is() -> None:
    race = contest([{"policy": p} for p in "ab"], ["request_goodput"], ["policy"])
    figures = {(i, s): {"request_goodput": 5.0 + i + s / 100 + (i * s % 3) / 50} for i in (0, 1) for s in range(SEEDS)}
    ended(race, figures)

    assert set(race.out) == {0}


def test_only_points_that_differ_where_they_compete_are_beaten() -> None:
    points = [{"policy": p, "load": load} for load in ("low", "high") for p in "ab"]
    race = contest(points, ["p99_ttft_ms"], ["policy"])
    ended(race, drawn([0, 0.1, 900, 900.1], 2))

    assert race.out == {}


def test_better_in_one_metric_alone_beats_nobody() -> None:
    race = contest([{"policy": p} for p in "ab"], ["p99_ttft_ms", "request_goodput"], ["policy"])
    figures = drawn([0, 300], 2)
    for s in range(SEEDS):
        figures[1, s]["request_goodput"] = 6.0 + s / 10
    ended(race, figures)

    assert race.out == {}


def test_a_race_between_equals_drops_somebody_as_seldom_as_it_says() -> None:
    dropped = 0
    for seed in range(400):
        race = contest([{"policy": p} for p in "abcd"], ["p99_ttft_ms"], ["policy"], risk=0.05)
        ended(race, drawn([0, 0, 0, 0], 10, seed))
        dropped += bool(race.out)

    assert dropped <= 400 * 0.05 + 4 * (400 * 0.05 * 0.95) ** 0.5


def test_what_fails_is_out() -> None:
    race = contest([{"policy": p} for p in "ab"], ["p99_ttft_ms"], ["policy"])
    figures = {at: row for at, row in drawn([0, 0], 1).items() if at != (1, 1)}
    made = ended(race, figures)

    assert race.out == {1: "failed: it broke"}
    assert [s for p, s in made if p == 1] == [0, 1]


@pytest.mark.parametrize(
    ("metric", "over", "rule"),
    [
        ("kv_free", "policy", "neither more nor less"),
        ("seed", "policy", "no such metric"),
        ("p99_ttft_ms", "polic", "did you mean 'policy'"),
    ],
)
def test_wrong_races_are_refused(metric: str, over: str, rule: str) -> None:
    with pytest.raises(BadInput, match=rule):
        contest([{"policy": "a"}], [metric], [over])
