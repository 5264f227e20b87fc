"""Racing: a point that another point clearly beats gets no more seeds.

All points run under one seed before any point runs under the next. From the third seed on, a point is out when another
point of its group is better in every metric of the race, by one-sided paired t tests. Each test gets an equal part of
the risk (Bonferroni), over all pairs and all rounds: a whole race drops a point wrongly with that probability at most,
as far as differences are normal. Example: 3 points that compete in one group make 6 ordered pairs; with 5 seeds there
are 2 rounds of decisions, so at a risk of 1 % each test has 0.01 / 12.

Sources: Maron and Moore, *Hoeffding Races*, NIPS 1993; with paired t tests Birattari et al., *F-Race*, GECCO 2002.
A decision depends on results alone, so an interrupted race goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.results.catalogue import sign
from chairlift.sim.sweep.axes import Scalar
from chairlift.sim.sweep.runs import Row, Run
from chairlift.sim.sweep.statistics import surely_below

RISK = 0.01
AFTER = 3  # seeds before the first decision
Runner = Callable[[Iterable[Run]], Iterator[tuple[Run, Row]]]


@dataclass
class Race:
    """A race between points. Raises `BadInput`: a metric of which neither more nor less is better, or no such axis."""

    runs: Sequence[Sequence[Run]]  # a list for each point, a run for each seed
    labels: Sequence[dict[str, Scalar]]  # axis → value, for each point
    metrics: Sequence[str]  # a point is beaten that is worse in all of these
    over: Sequence[str]  # axes whose values compete; points that differ in another axis do not
    after: int = AFTER
    risk: float = RISK  # probability that the race drops any point wrongly

    def __post_init__(self) -> None:
        for metric in self.metrics:
            sign(metric, "--race")
        known = list(dict.fromkeys(key for point in self.labels for key in point))
        for axis in self.over:
            if axis not in known:
                raise BadInput(Problem(f"no such axis{did_you_mean(axis, known)}", file="--race-over", value=axis))
        if self.after < 2:
            raise BadInput(Problem("must be at least 2: one seed tells no spread", value=self.after))
        self.out: dict[int, str] = {}  # point → why it is out
        self._figures: list[list[list[float]]] = [[] for _ in self.runs]  # point → seed → metrics, less is better
        groups: dict[tuple[tuple[str, Scalar], ...], list[int]] = {}
        for i, point in enumerate(self.labels):
            apart = tuple((key, value) for key, value in point.items() if key not in self.over)
            groups.setdefault(apart, []).append(i)
        self._groups = list(groups.values())

    def run(self, runner: Runner) -> Generator[tuple[Run, Row], None, None]:
        """The runs with their rows, as they end; ``runner`` does what `sim.sweep.runs.results` does.

        Meanwhile `out` gets the points that are beaten or fail. Raises `BadInput`: a row does not have the metric.
        """
        seeds = max(map(len, self.runs))
        pairs = sum(len(group) * (len(group) - 1) for group in self._groups)
        risk = self.risk / max(1, pairs * max(1, seeds - self.after))
        for number in range(seeds):
            place = {id(runs[number]): i for i, runs in enumerate(self.runs) if i not in self.out}
            ended: dict[int, Row] = {}
            for run, row in runner([self.runs[i][number] for i in place.values()]):
                ended[place[id(run)]] = row
                yield run, row
            for i in sorted(ended):
                self._note(i, ended[i])
            if self.after <= number + 1 < seeds:
                for group in self._groups:
                    self._decide(group, number + 1, risk)

    def _note(self, i: int, row: Row) -> None:
        figures = [row.metrics.get(metric) for metric in self.metrics]
        if row.error:
            self.out[i] = f"failed: {row.error}"
            return
        for metric, figure in zip(self.metrics, figures, strict=True):
            if metric not in row.metrics:
                raise BadInput(
                    Problem(f"no such metric{did_you_mean(metric, list(row.metrics))}", file="--race", value=metric)
                )
            if figure is None:
                self.out[i] = f"{metric} is not defined"
                return
        self._figures[i].append([-sign(m) * f for m, f in zip(self.metrics, figures, strict=True) if f is not None])

    def _decide(self, group: list[int], seeds: int, risk: float) -> None:
        alive = [i for i in group if i not in self.out]
        beaten: dict[int, str] = {}
        for i in alive:
            for j in alive:
                columns = zip(zip(*self._figures[j], strict=True), zip(*self._figures[i], strict=True), strict=True)
                if i != j and all(surely_below(theirs, ours, risk) for theirs, ours in columns):
                    names = ", ".join(f"{axis} {self.labels[j].get(axis)}" for axis in self.over)
                    beaten[i] = f"{names} is better in {' and '.join(self.metrics)} after {seeds} seeds"
                    break
        self.out |= beaten
