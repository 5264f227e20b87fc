"""The whole answer to a plan: capacities, the cheapest systems, headroom, the front, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.plan.bounds import Bound, Bounds
from chairlift.sim.plan.candidates import Candidate, price_of
from chairlift.sim.plan.capacity import Capacity, Errors, find
from chairlift.sim.plan.cheapest import Entry, Race, race
from chairlift.sim.plan.costs import tokens_of
from chairlift.sim.plan.crowd import Crowd, crowd
from chairlift.sim.plan.deciding import Measure
from chairlift.sim.plan.emit import shell
from chairlift.sim.plan.errors import assumed, errors, kept, likely, prices
from chairlift.sim.plan.errors import described as errors_of
from chairlift.sim.plan.file import BuyingPlan
from chairlift.sim.plan.flips import Ask, Change, changes
from chairlift.sim.plan.headroom import Beside, Headroom, Margin, bracket, fewer, headroom, margin
from chairlift.sim.plan.launch import Launch, beside, kv_of, launches
from chairlift.sim.plan.pacing import SAMPLE, paced
from chairlift.sim.plan.promises import Promise
from chairlift.sim.plan.questions import said, taker
from chairlift.sim.plan.replications import Simulations
from chairlift.sim.plan.spot import OnSpot, cheapest_on_spot
from chairlift.sim.plan.stretches import described, recorded
from chairlift.sim.plan.verdict import Verdict
from chairlift.sim.results import loops
from chairlift.sim.scenario import load
from chairlift.sim.simulate import LOOPS
from chairlift.sim.sweep.statistics import undominated

MOST_CAPACITIES = 64  # systems whose capacity is looked for where there is no rate to buy for
ROUGH = 0.1  # precision of the capacities of a front's systems
PART = 0.5  # of the width by errors: where the plan names no precision, chance is not made smaller than that
MOST_ON_FRONT = 8  # systems


@dataclass
class Point:
    """A system that will do, with what the front compares: price, latency and capacity."""

    candidate: Candidate
    latency_ms: float  # the figure `latency_name`, at the highest rate to buy for
    latency_name: str
    capacity: Capacity
    is_best: bool = True  # on the front: no other system is at least as good in all three, and better in one


@dataclass
class Answer:
    """What a plan came to; parts that are not yet answered, or not asked for, are empty."""

    plan: BuyingPlan
    capacities: list[tuple[Candidate, Capacity]] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)
    margins: dict[float, Margin] = field(default_factory=dict)  # rate → of the cheapest system for it
    on_spot: dict[float, list[OnSpot]] = field(default_factory=dict)  # rate → by replicas, the last is the answer
    crowds: list[Crowd] = field(default_factory=list)  # clients in a closed loop, of the answers' systems
    headroom: list[Headroom] = field(default_factory=list)
    front: list[Point] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)  # what would change the answer at the highest rate, if asked
    assumptions: dict[str, str] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)  # of the chosen system
    beside: list[str] = field(default_factory=list)  # what has to be set up beside its engines

    @property
    def commands(self) -> list[str]:
        """The lines that start the chosen system; what they do not say begins with #."""
        return shell(self.launches, self.beside)

    @property
    def asked(self) -> list[str]:
        """What the plan's further questions come to, a line each."""
        spec = self.plan.spec
        lines = list(said(spec.ask, spec.given, self.plan.unit, self.races, self.capacities))
        for rate, found in self.on_spot.items():
            lines += [f"at {rate:g} {self.plan.unit}/s {spec.ask.spot}: {each}" for each in found[-1:]]
        if (loop := spec.ask.clients) is not None:
            thinking = f"in a closed loop, thinking {loop.mean_s:.3g} s on average"
            lines += [f"{thinking}: {each}" for each in self.crowds]
        return lines

    @property
    def chosen(self) -> Candidate | None:
        """The system that the commands and assumptions describe: the answer at the highest rate, if there is one."""
        if self.races:
            return next((r.winner.candidate for r in reversed(self.races) if r.winner), None)
        if self.plan.spec.ask.tenant is not None:
            return taker(self.capacities)
        found = [candidate for candidate, capacity in self.capacities if capacity.reached]
        return found[0] if found else self.plan.today

    @property
    def failed(self) -> bool:
        """Whether no system of the plan will do for one of its questions."""
        if self.plan.spec.ask.tenant is not None:
            return taker(self.capacities) is None
        lost = any(race.winner is None for race in self.races)
        return lost or (bool(self.capacities) and not any(c.reached for _, c in self.capacities))


def check_promises(plan: BuyingPlan) -> None:
    """Raise `BadInput` where a promise is about a tenant or a priority that no request has."""
    setup = next((c.setup for c in [*plan.candidates, plan.today] if c is not None and c.setup is not None), None)
    if setup is None:
        return
    problems = []
    for j, promise in enumerate(plan.spec.slo):
        if promise.tenant is not None and promise.tenant not in setup.trace.tenants:
            hint = did_you_mean(promise.tenant, list(setup.trace.tenants))
            problems.append(plan.document.problem(("slo", j, "tenant"), f"no such tenant{hint}", promise.tenant))
        known = set() if setup.trace.priority is None else set(setup.trace.priority.tolist())
        if promise.priority is not None and promise.priority not in known:
            rule = f"no request has this priority – there are {', '.join(map(str, sorted(known))) or 'none'}"
            problems.append(plan.document.problem(("slo", j, "priority"), rule, promise.priority))
    if problems:
        raise BadInput(problems)


def answers(
    plan: BuyingPlan, runs: Simulations, told: Callable[[str], None], changing: bool = False
) -> Iterator[Answer]:
    """The answer, yielded again after each part; every time, what it holds is final.

    ``changing``: also what would change it.
    """
    for answer in _parts(plan, runs, told):
        conclude(answer, runs)
        yield answer
    if changing and not plan.spec.ask.spares and answer.races and (best := answer.races[-1].winner) is not None:
        rate = answer.races[-1].rate_per_s
        ask, margin_of_it = _ask(plan, runs, told), answer.margins.get(rate)
        for change in changes(plan.candidates, plan.spec.slo, rate, best, ask, margin_of_it):
            told(f"what would change the answer: {change.what}")
            answer.changes = sorted([*answer.changes, change], key=lambda each: (each.nearest, -each.swing))
            conclude(answer, runs)
            yield answer


def _ask(plan: BuyingPlan, runs: Simulations, told: Callable[[str], None]) -> Ask:
    """How candidates are raced under other promises, or at other rates, than the plan's."""
    known: dict[tuple[str, ...], Bounds] = {}

    def ask(candidates: Sequence[Candidate], promises: Sequence[Promise], rate: float) -> Race:
        bounds = known.setdefault(tuple(map(str, promises)), Bounds(promises))

        def measure(each: Candidate) -> Measure:
            return runs.of(each, promises=promises)

        return race(candidates, bounds, measure, promises, rate, plan.effort(), told=told, fine=_fine(plan))

    return ask


def _parts(plan: BuyingPlan, runs: Simulations, told: Callable[[str], None]) -> Iterator[Answer]:
    """As `answers`, without what the answer rests on."""
    answer = Answer(plan)
    spec, promises, effort = plan.spec, plan.spec.slo, plan.effort()
    bounds = Bounds(promises)
    fitting = [candidate for candidate in plan.candidates if candidate.setup is not None]
    if not fitting and plan.today is None:
        raise BadInput(nowhere(plan))
    check_promises(plan)
    if plan.today is not None and spec.rates:
        today = plan.today
        rate = spec.given[0]
        capacity = _capacity(today, rate, plan, runs, bounds, told)
        answer.capacities = [(today, capacity)]
        yield answer
        effort = replace(effort, precision=_precision(plan, capacity.errors))
        answer.headroom = headroom(
            today, rate, capacity, spec.headroom, promises, bounds, lambda c, cv: runs.of(c, cv), effort, told
        )
        yield answer
        effort = plan.effort()
    elif plan.today is not None or not spec.rates:
        systems = [plan.today] if plan.today is not None else fitting
        if len(systems) > MOST_CAPACITIES:
            rule = f"is required to choose from {len(systems)} systems: the load to buy for"
            raise BadInput(plan.document.problem(("rate_per_s",), rule))
        for candidate in systems:
            told(candidate.name)
            guess = bounds(candidate).rate_per_s / 2
            answer.capacities.append((candidate, _capacity(candidate, guess, plan, runs, bounds, told)))
            answer.capacities.sort(key=lambda each: _usd_per_rate(*each))
            yield answer
    yield from _crowds(answer, runs, told)
    if not spec.rates or (plan.today is not None and not spec.keys()):
        yield answer
        return
    for rate in spec.rates:
        told(f"{rate:g}/s")
        wanted = MOST_ON_FRONT if spec.front and rate == spec.rates[-1] else 1  # the front is of the last
        spared = _spared(plan, runs, bounds)
        found = race(plan.candidates, *spared, promises, rate, effort, wanted, told=told, fine=_fine(plan))
        answer.races.append(found)
        yield answer
        if (best := found.winner) is not None:
            told(f"{rate:g}/s: how much more {best.candidate.name} takes")
            hard = replace(effort, precision=_fine(plan)(best.candidate))
            beside_it = Beside(rate, promises, bounds, runs.of, hard)
            spare = margin(best.candidate, beside_it)
            assert best.candidate.setup is not None
            priced = prices(best.candidate.setup)
            sound = kept(_drawing(runs, best.candidate), rate, promises, effort, effort.draws, priced)
            answer.margins[rate] = replace(spare, draws=effort.draws, draws_kept=sound)
            yield answer
        if best is not None and spec.ask.spot is not None:
            told(f"{rate:g}/s: on spot")
            beside_it = Beside(rate, promises, bounds, runs.of, replace(effort, precision=_fine(plan)(best.candidate)))
            answer.on_spot[rate] = cheapest_on_spot(plan.candidates, best.candidate, spec.ask.spot, beside_it)
            yield answer
    yield from _crowds(answer, runs, told)
    if spec.front and answer.races[-1].winner is not None:
        for entry in answer.races[-1].of("kept")[:MOST_ON_FRONT]:
            told(f"front: {entry.candidate.name}")
            answer.front.append(_point(entry, promises, runs, bounds, plan))
            mark(answer.front)
            yield answer


def _crowds(answer: Answer, runs: Simulations, told: Callable[[str], None]) -> Iterator[Answer]:
    """The answer with the clients in a closed loop of each capacity's system, or of the last race's, if asked for."""
    loop, known = answer.plan.spec.ask.clients, {id(each.candidate) for each in answer.crowds}
    if loop is None:
        return
    found: list[tuple[Candidate, Verdict | None, float]] = []
    for candidate, capacity in answer.capacities:
        if (rate := capacity.rate_per_s) > 0:
            found.append((candidate, min(capacity.verdicts, key=lambda v: abs(v.rate_per_s - rate)), rate))
    for last in answer.races[-1:]:
        if (best := last.winner) is not None:
            spare = answer.margins.get(last.rate_per_s)
            found.append((best.candidate, best.verdict, last.rate_per_s * (1.0 if spare is None else spare.kept)))
    for candidate, verdict, rate in found:
        if id(candidate) not in known and verdict is not None:
            known.add(id(candidate))
            stay_s = verdict.figures["p50_e2el_ms"][0] / 1e3
            told(f"{candidate.name}: clients in a closed loop")
            measure = runs.of(candidate, think_s=loop.think_s)
            guess = rate * (stay_s + loop.mean_s)  # the interactive response time law
            answer.crowds.append(crowd(candidate, measure, answer.plan.spec.slo, guess, answer.plan.effort(), told))
            yield answer


def _spared(
    plan: BuyingPlan, runs: Simulations, bounds: Callable[[Candidate], Bound]
) -> tuple[Callable[[Candidate], Bound], Callable[[Candidate], Measure]]:
    """How systems are bounded and measured without the spares that the plan asks for."""
    gone, known = plan.spec.ask.spares, dict[str, Candidate | None]()
    if not gone:
        return bounds, runs.of

    def left(candidate: Candidate) -> Candidate | None:
        if candidate.name not in known:
            try:
                known[candidate.name] = candidate if candidate.scales else fewer(candidate, gone)
            except BadInput:
                known[candidate.name] = None
        return known[candidate.name]

    def bounded(candidate: Candidate) -> Bound:
        rest = left(candidate)
        return Bound(0.0, f"without {gone} of its replicas nothing is left") if rest is None else bounds(rest)

    def measured(candidate: Candidate) -> Measure:
        return runs.of(left(candidate) or candidate)

    return bounded, measured


def _drawing(runs: Simulations, candidate: Candidate) -> Callable[[int], Measure]:
    """How the candidate is measured with a draw of its step costs' errors."""
    return lambda draw: runs.of(candidate, draw=draw)


def _capacity(
    candidate: Candidate,
    guess: float,
    plan: BuyingPlan,
    runs: Simulations,
    bounds: Callable[[Candidate], Bound],
    told: Callable[[str], None],
) -> Capacity:
    """The capacity of a candidate that has a setup, with what errors of its step costs do to it.

    The errors are looked at first: chance is then made no smaller than is worth while beside them.
    """
    assert candidate.setup is not None
    effort, promises, likely_at = plan.effort(), plan.spec.slo, likely(candidate.setup)
    known: list[Errors | None] = []

    def fine(rough: Capacity) -> float:
        told(f"{candidate.name}: errors of the step costs")
        known.append(errors(_drawing(runs, candidate), rough, promises, effort, effort.draws, likely_at))
        return _precision(plan, known[0])

    found = find(runs.of(candidate), promises, guess, bounds(candidate).rate_per_s, effort, told, fine=fine)
    off = known[0] if known else None
    if off is not None and found.low > 0 and math.isfinite(found.high):
        found.errors = replace(off, simulated=math.log(found.high / found.low) / 2)
    return found


def _precision(plan: BuyingPlan, off: Errors | None) -> float:
    """The precision of a capacity whose step costs are off by so much: the plan's, or what is fine enough."""
    named = "precision" in plan.spec.search.model_fields_set
    return (
        plan.effort().precision if named or off is None else max(plan.effort().precision, min(PART * off.half, ROUGH))
    )


def _fine(plan: BuyingPlan) -> Callable[[Candidate], float]:
    """The precision of a candidate whose capacity is not looked for, by its step costs' likely errors."""
    draws, confidence = plan.spec.search.draws, plan.spec.search.confidence

    def fine(candidate: Candidate) -> float:
        setup = candidate.setup
        return _precision(plan, None if setup is None else assumed(setup, draws, confidence))

    return fine


def _usd_per_rate(candidate: Candidate, capacity: Capacity) -> float:
    """Dollars an hour for each request per second that the system sustains; infinite if it sustains none."""
    return candidate.usd_per_hour / capacity.rate_per_s if capacity.reached else math.inf


def _point(
    entry: Entry,
    promises: list[Promise],
    runs: Simulations,
    bounds: Callable[[Candidate], Bound],
    plan: BuyingPlan,
) -> Point:
    """The point of a system that keeps the promises."""
    assert entry.verdict is not None
    most = bounds(entry.candidate).rate_per_s
    capacity = bracket(runs.of(entry.candidate), promises, entry.verdict, most, plan.effort(), ROUGH)
    name = latency_of(promises)
    mean = entry.verdict.figures.get(name, (math.inf, 0, 0))[0]
    return Point(entry.candidate, mean, name, capacity)


def latency_of(promises: list[Promise]) -> str:
    """The figure that stands for latency on a front: the first promised percentile, else p99 of the first limit."""
    for promise in promises:
        if len(limits := promise.limits()) == 1:
            return f"p{100 * promise.wanted:g}_{next(iter(limits))}_ms"
    return f"p99_{next(iter(promises[0].limits()))}_ms"


def mark(front: list[Point]) -> None:
    """Set `Point.is_best` of all points, by comparing each with all others."""
    scores = [(-p.candidate.usd_per_hour, -p.latency_ms, p.capacity.rate_per_s) for p in front]
    for point, best in zip(front, undominated(scores), strict=True):
        point.is_best = best


def nowhere(plan: BuyingPlan) -> list[Problem]:
    """What to say where no system can be: each reason once, six at most."""
    reasons = dict.fromkeys(candidate.misfit for candidate in plan.candidates)
    head = plan.document.problem(("axes",), f"none of {len(plan.candidates)} systems can be")
    return [head, *(Problem(reason, file=plan.document.path) for reason in list(reasons)[:6])]


def conclude(answer: Answer, runs: Simulations) -> None:
    """Fill in the commands that start the chosen system, and the assumptions that the answer rests on."""
    plan, chosen = answer.plan, answer.chosen
    lines: dict[str, str] = {f"promise {j + 1}": str(p) for j, p in enumerate(plan.spec.slo)}
    if chosen is not None and chosen.setup is not None:
        setup = chosen.setup
        answer.launches = launches(setup, kv_of(chosen.document, len(setup.groups)))
        answer.beside = beside(setup)
        lines["system"] = "; ".join((chosen.name, *chosen.notes))
        won = [race.rate_per_s for race in answer.races if race.winner is not None]
        rates, trace = won[-1:] or plan.spec.rates, setup.trace
        if plan.unit == "sessions" and rates and not recorded(chosen.document):  # a trace says its rate, then
            trace = load.prepare(paced(chosen.document, rates[-1], SAMPLE), chosen.folder, chosen.trust).trace
        lines["workload"] = described(chosen.document, trace, rates, plan.unit)
        if plan.unit == "sessions":
            lines["rate"] = "sessions that start each second, not requests"
        lines |= {} if setup.speculate is None else setup.speculate.said
        lines["engine loop"] = LOOPS[setup.loop]
        if chosen.synchronous and setup.loop == "synchronous":
            lines["engine loop"] += "; with async_scheduling: true a vllm would plan ahead beside policies that do not"
        ran = [(str(c.labels.get("policy", c.name)), c.setup.loop) for c in plan.candidates if c.setup is not None]
        if warning := loops.warning(ran):
            lines["engine loops differ"] = warning
        for group in setup.groups:
            backend = group.make_backend(setup.model)
            lines |= backend.assumptions() | group.make_scheduler().assumptions() | group.said
            what = f"KV pool, {group.count} × {group.role}" if len(setup.groups) > 1 else "KV pool"
            lines[what] = f"{group.blocks:,} blocks of {group.block_size} tokens: {group.kv_source}"
            price = price_of(plan.prices, group.gpu.name)
            if price is not None:
                seen = ", ".join(filter(None, (price.date and f"seen {price.date}", price.source)))
                lines[f"price of {group.gpu.name}"] = f"${price.usd_per_gpu_hour:g} a GPU-hour" + (
                    f" ({seen})" * bool(seen)
                )
        each = tokens_of(chosen)
        lines["cost"] = (
            f"the hour's price over the tokens served, {each.into:,.0f} in and {each.out:,.0f} out a "
            f"{plan.unit.removesuffix('s')}; in and out by the least time that prompts and answers take"
        )
    kinds = {candidate.backend for candidate in plan.candidates if candidate.setup is not None}
    if len(kinds) > 1:
        lines["cost models differ"] = f"{'; '.join(sorted(kinds))}: systems of different ones compare less surely"
    lines["simulated"] = (
        f"{runs.simulated_s / 3600:,.1f} hours of service; {runs.simulated + runs.known:,} requests, "
        f"{runs.known:,} of them by an earlier run of this plan"
    )
    lines["seeds"] = f"{plan.spec.search.seed} and on, the same requests for every system and rate"
    lines["intervals"] = (
        f"{100 * plan.spec.search.confidence:g} %: at the low end all promises are proven kept, at the high end one is "
        "proven broken, by Student's t over independent replications"
    )
    if chosen is not None and chosen.setup is not None and plan.spec.search.draws:
        lines["step costs' errors"] = (
            f"{errors_of(chosen.setup)}; {plan.spec.search.draws} draws, a width of their own beside the simulation's"
        )
    verdicts = [race.winner.verdict for race in answer.races if race.winner is not None]
    verdicts += [verdict for _, capacity in answer.capacities for verdict in capacity.verdicts]
    shared = [verdict for verdict in verdicts if verdict is not None and verdict.worth < verdict.replications]
    if shared:
        last = max(shared, key=lambda verdict: verdict.replications)
        lines["recorded file"] = (
            f"its {plan.rows or 0:,} requests serve several times over: {last.replications} stretches of "
            f"{last.requests:,} are worth {last.worth:.1f} independent ones, and intervals are as wide as for so many"
        )
    answer.assumptions = lines
