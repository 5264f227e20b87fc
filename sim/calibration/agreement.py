"""Whether a prediction chooses as the measurement does: two result folders of the same study, system by system.

For each case there are three answers: how far each metric of each system is off; Kendall's τ between the two orders of
the systems; and the regret of choosing by the prediction. Regret is how much worse the system that the prediction calls
best was measured to be than the best one. For example: p99 TTFT of A and B are predicted 139 and 142 ms, and measured
150 and 125 ms. The prediction chooses A, and its regret is 150 / 125 − 1 = 20 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from chairlift.backend.checked import json_of
from chairlift.sim.bad_input import BadInput, Problem, reading
from chairlift.sim.results import catalogue
from chairlift.sim.results.reader import held

METRICS = ("total_token_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "mean_e2el_ms", "p99_e2el_ms")


@dataclass(frozen=True)
class Agreement:
    """One metric of one case over all systems."""

    case: str
    metric: str
    measured: dict[str, float]  # by variant
    predicted: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """Predicted over measured, less one."""
        return {name: self.predicted[name] / value - 1 for name, value in self.measured.items() if value}

    @property
    def tau(self) -> float:
        """Kendall's τ-a: pairs of systems in the same order less those in the other, over all pairs."""
        pairs = list(combinations(self.measured, 2))
        signs = [
            _sign(self.measured[a] - self.measured[b]) * _sign(self.predicted[a] - self.predicted[b]) for a, b in pairs
        ]
        return sum(signs) / len(pairs)

    @property
    def regret(self) -> float:
        """By how much the system predicted to be best was measured worse than the best one, relative; 0: as good."""
        best = max if catalogue.sign(self.metric) > 0 else min
        chosen = best(self.predicted, key=lambda name: self.predicted[name])
        top = best(self.measured.values())
        return abs(self.measured[chosen] / top - 1)

    def json(self) -> dict[str, Any]:
        """A row of ``agree --json``."""
        return {**vars(self), "kendall_tau": self.tau, "regret": self.regret}


def agreements(measured: Path, predicted: Path, metrics: Sequence[str] = METRICS) -> list[Agreement]:
    """Every metric of every case that both folders hold. Raises `BadInput` where they do not match."""
    ours, theirs = _runs(measured), _runs(predicted)
    if ours.keys() != theirs.keys():
        only = sorted(" / ".join(filter(None, key)) for key in ours.keys() ^ theirs.keys())
        raise BadInput(Problem(f"the two folders hold different runs: {', '.join(only)}", file=str(predicted)))
    found = []
    for case in dict.fromkeys(case for case, _ in ours):
        names = [variant for each, variant in ours if each == case]
        if len(names) < 2:
            raise BadInput(Problem("needs at least two systems to rank", file=str(measured), value=case))
        for metric in metrics:
            columns = [{n: _metric(runs[case, n], metric) for n in names} for runs in (ours, theirs)]
            if missing := [n for column in columns for n, value in column.items() if math.isnan(value)]:
                raise BadInput(Problem(f"no {metric} of {missing[0]}", file=str(measured)))
            found.append(Agreement(case, metric, columns[0], columns[1]))
    return found


def _runs(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    path = folder if folder.suffix == ".json" else folder / "comparison.json"
    if path != folder and folder.is_file():
        raise BadInput(Problem("is a file, neither a results folder nor a comparison.json", file=str(folder)))
    if not path.exists() and (other := held(folder)):
        raise BadInput(Problem(other, file=str(folder)))
    with reading(path):
        rows = json_of(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "variant" in row for row in rows):
        raise BadInput(Problem("must be the comparison.json of a run that compares systems", file=str(path)))
    for row in rows:
        for key in ("case", "variant"):
            if not isinstance(row.get(key, ""), str):
                raise BadInput(Problem("must be text", file=str(path), path=key, value=row[key]))
        for name, value in row.items():
            if name in catalogue.FIELDS and not (value is None or _is_number(value)):
                raise BadInput(Problem("must be a finite number", file=str(path), path=name, value=value))
    found = {(row.get("case", ""), row["variant"]): row for row in rows}
    if len(found) < len(rows):
        raise BadInput(Problem("holds a run twice", file=str(path)))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= catalogue.MOST


def _metric(row: dict[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if value else math.nan


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
