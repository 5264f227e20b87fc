"""A plan's answer in tables on the terminal, as ``plan.json`` and as ``plan.parquet``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chairlift.sim.atomic import replacing, write_text
from chairlift.sim.plan.answer import Answer
from chairlift.sim.plan.candidates import Candidate
from chairlift.sim.plan.capacity import Capacity
from chairlift.sim.plan.cheapest import Entry, Race
from chairlift.sim.plan.costs import cost_of
from chairlift.sim.plan.file import BuyingPlan
from chairlift.sim.plan.flips import FAR, SWING, Flip
from chairlift.sim.plan.headroom import Margin
from chairlift.sim.plan.promises import UNSERVED_MS
from chairlift.sim.plan.questions import for_a_day
from chairlift.sim.plan.verdict import Verdict
from chairlift.sim.results.catalogue import LATENCY
from chairlift.sim.scenario.resolved import relocated, resolved

SHOWN = 12  # systems of a race on the terminal
OUTCOMES = (
    "kept: the whole interval meets what is wanted; broken: the whole interval misses it; "
    "open: the interval holds what is wanted, so these requests cannot tell"
)
REASONS = 6  # kinds of reasons why systems are excluded


def show(out: Console, answer: Answer) -> None:
    """Print the answer."""
    plan = answer.plan
    if plan.spec.question:
        out.print(escape(plan.spec.question), style="italic")
    out.print(f"[bold]{escape(sentence(answer))}[/bold]")
    if answer.capacities:
        out.print(_capacities(answer))
        for candidate, capacity in answer.capacities:
            for line in said_of(candidate, capacity):
                out.print(escape(line))
    if answer.headroom:
        out.print(_headroom(answer))
    for each in answer.races:
        _show_race(out, each, answer)
    for line in answer.asked:
        out.print(escape(line))
    if answer.front:
        out.print(_front(answer))
    if answer.changes:
        out.print(_changes(answer))
        out.print(CHANGING, style="dim")
    out.print("\n[bold]What this rests on[/bold]")
    for name, line in answer.assumptions.items():
        out.print(f"  {escape(name)}: {escape(line)}", style="dim")
    if answer.commands and not answer.failed:
        out.print("\n[bold]Run it[/bold]")
        for command in answer.commands:
            out.print(escape(command), soft_wrap=True)


def sentence(answer: Answer) -> str:
    """The answer in one sentence."""
    plan, kept = answer.plan, " and ".join(map(str, answer.plan.spec.slo))
    if answer.races:
        race = answer.races[-1]
        at = f"at {race.rate_per_s:g} {plan.unit}/s"
        if gone := plan.spec.ask.spares:
            at += f" with {gone} replica{'s' * (gone > 1)} gone"
        if race.winner is None:
            return f"None of {len(race.entries)} systems keeps {kept} {at}."
        best = race.winner
        return f"The cheapest that keeps {kept} {at} is {best.candidate.name}, for ${best.usd_per_hour:,.2f} an hour."
    if not answer.capacities:
        return ""
    if plan.spec.ask.tenant is not None and answer.asked:
        told = f"{answer.asked[-1][0].upper()}{answer.asked[-1][1:]}"
        return f"{told}." if answer.failed else f"{told}, which keeps {kept} with it."
    if (usd := plan.spec.ask.budget_usd_per_day) is not None:
        found = [(for_a_day(usd, *each), each[0].name) for each in answer.capacities if each[1].reached]
        (copies, served), name = max(found, key=lambda each: each[0][1], default=((0, 0.0), ""))
        if not copies:
            return f"${usd:,g} a day pay for none of {len(answer.capacities)} systems that keeps {kept}."
        return f"${usd:,g} a day serve most with {copies} × {name}: {served:,.0f} {plan.unit} a day, keeping {kept}."
    candidate, capacity = answer.capacities[0]
    if not capacity.reached:
        return f"{candidate.name} does not keep {kept} at any load."
    return f"{candidate.name} keeps {kept} up to {interval(capacity)} {plan.unit}/s."


def interval(capacity: Capacity) -> str:
    """A capacity in words: ``12.3 [12.1, 12.5]``, or ``none``."""
    if not capacity.reached:
        return "none"
    high = f"{capacity.high:.4g}" if math.isfinite(capacity.high) else "∞"
    return f"{capacity.rate_per_s:.4g} [{capacity.low:.4g}, {high}]"


def bought(answer: Answer, race: Race) -> Iterator[str]:
    """What a reader must know of the cheapest system of a race, a line each: its cost by tokens, and its margin."""
    assert race.winner is not None
    best = race.winner
    yield f"{cost_of(best.candidate, race.rate_per_s, answer.plan.prices, best.usd_per_hour)}"
    if best.verdict is not None and best.verdict.replicas:
        told = " + ".join(f"{count:.3g}" for count in best.verdict.replicas)
        yield f"{told} replicas were paid for on average, loading included"
    if (spare := answer.margins.get(race.rate_per_s)) is not None:
        yield str(spare)


def latency_name(figure: str) -> str:
    """A figure's name in words: ``p99 of TTFT`` for ``p99_ttft_ms``."""
    quantile, metric, _ = figure.split("_")
    return f"{quantile} of {LATENCY[metric].label}"


def said_of(candidate: Candidate, capacity: Capacity) -> Iterator[str]:
    """What a reader must know of a capacity besides its interval, a line each."""
    if not capacity.reached and capacity.limiting is not None:
        verdict = capacity.verdicts[0]
        found = ", ".join(
            f"{n.removesuffix('_ms')} {v[0]:,.4g} ms"
            if v[0] < UNSERVED_MS / 1e3
            else f"{n.removesuffix('_ms')} not served"
            for n, v in verdict.figures.items()
        )
        yield f"{candidate.name}: {capacity.limiting} breaks at any load; at {verdict.rate_per_s:.3g}/s: {found}"
        yield "  what would help: a limit above that, a faster GPU, more tensor parallelism, or shorter prompts"
    if (off := capacity.errors) is not None:
        low, high = off.whole(capacity.rate_per_s)
        widths = f"± {100 * off.half:.2g} % by errors of the step costs, ± {100 * off.simulated:.2g} % by chance"
        which = (
            "the errors dominate" if off.dominate else "chance dominates: a smaller search.precision would narrow it"
        )
        yield f"{candidate.name}: {capacity.rate_per_s:.4g} [{low:.4g}, {high:.4g}] in all: {widths}; {which}"
    if capacity.islands:
        rates = ", ".join(f"{rate:.4g}" for rate in capacity.islands)
        yield f"{candidate.name}: kept again at {rates}/s: attainment does not only fall as load rises"
    for note in capacity.notes:
        yield f"{candidate.name}: {note}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _capacities(answer: Answer) -> Table:
    unit = answer.plan.unit
    title = f"max sustainable rate, {unit}/s"
    columns = ("system", "#", "rate [interval]", "$/h", f"$ per 1,000 {unit}", "$/M tokens", "in", "out", "limited by")
    table = _table(title, *columns)
    for candidate, capacity in answer.capacities:
        usd = cost_of(candidate, capacity.rate_per_s, answer.plan.prices) if capacity.reached else ()
        by_token = [f"{each:,.3g}" for each in usd] or ["–"] * 3
        cost = candidate.usd_per_hour / 3.6 / capacity.rate_per_s if capacity.reached else math.inf
        limit = str(capacity.limiting) if capacity.limiting else ""
        cost_text = f"{cost:,.4f}" if capacity.reached else "–"
        row = (interval(capacity), f"{candidate.usd_per_hour:,.2f}", cost_text, *by_token, limit)
        table.add_row(escape(candidate.name), str(answer.plan.number(candidate)), *row)
    return table


def _headroom(answer: Answer) -> Table:
    rate = answer.plan.spec.given[0]
    times = list(answer.headroom[0].growth)
    table = _table(
        f"headroom over today's {rate:g} {answer.plan.unit}/s",
        "under",
        "rate [interval]",
        "× today",
        *(f"× {t:g}" for t in times),
    )
    for each in answer.headroom:
        factor = f"{each.capacity.rate_per_s / rate:.2f}"
        table.add_row(each.stress, interval(each.capacity), factor, *(each.growth[t] for t in times))
    return table


def _show_race(out: Console, race: Race, answer: Answer) -> None:
    plan = answer.plan
    unit = plan.unit
    if race.winner is None:
        out.print(f"\n[bold]No system keeps the promises at {race.rate_per_s:g} {unit}/s.[/bold]")
        for line in feasible(race):
            out.print(f"  {escape(line)}")
    else:
        best = race.winner.candidate
        price = f"${race.winner.usd_per_hour:,.2f}/h"
        out.print(
            f"\n[bold]Cheapest for {race.rate_per_s:g} {unit}/s: {escape(best.name)}, {price}[/bold]"
            f" ({best.gpus} GPU{'s' * (best.gpus > 1)}; {escape(best.backend)}); {escape(race.winner.why)}"
        )
        for line in bought(answer, race):
            out.print(escape(line))
    table = _table("simulated, cheapest first", "system", "#", "$/h", "outcome", "share that met it [interval]")
    simulated = [entry for entry in race.entries if entry.verdict is not None]
    shown = _worth_showing(race, simulated)
    for entry in shown:
        row = (f"{entry.usd_per_hour:,.2f}", entry.outcome, escape(entry.why))
        table.add_row(escape(entry.candidate.name), str(plan.number(entry.candidate)), *row)
    if len(simulated) > len(shown):
        table.caption = f"and {len(simulated) - len(shown)} more, in plan.html"
        table.caption_justify = "left"
    if simulated:
        out.print(table)
        out.print(OUTCOMES, style="dim")
    counts: dict[str, list[Entry]] = {}
    for entry in race.of("excluded"):
        counts.setdefault(_kind(entry.why), []).append(entry)
    out.print(told_apart(race))
    for kind, entries in list(counts.items())[:REASONS]:
        out.print(f"  {kind}: {len(entries)}; e.g. {escape(entries[-1].candidate.name)}: {escape(entries[-1].why)}")


def told_apart(race: Race) -> str:
    """How many systems were simulated, and why the others were not."""
    counts = {outcome: len(race.of(outcome)) for outcome in ("excluded", "dearer", "behind")}
    simulated = sum(entry.verdict is not None for entry in race.entries)
    verb = "was" if simulated == 1 else "were"
    line = f"of {len(race.entries)} systems {simulated} {verb} simulated, {counts['excluded']} excluded by bounds, "
    line += f"{counts['dearer']} dearer than what will do"
    return line + f", {counts['behind']} behind in short runs at the same price" * bool(counts["behind"])


def _worth_showing(race: Race, simulated: list[Entry]) -> list[Entry]:
    """The systems next to the answer: the dearest of those that cost no more and failed, and those that will do."""
    if race.winner is None:
        return sorted(simulated, key=lambda e: e.verdict.gap if e.verdict else math.inf)[:SHOWN]
    price = race.winner.usd_per_hour
    cheaper = [e for e in simulated if e.outcome != "kept" and e.usd_per_hour <= price]
    kept = [e for e in simulated if e.outcome == "kept"]
    return [*cheaper[-SHOWN // 3 :], *kept[: SHOWN - SHOWN // 3]]


def _kind(why: str) -> str:
    """Which kind of bound excluded a system, by `Entry.why`."""
    if "cannot serve more" in why:
        return "too little throughput"
    return "too slow even alone" if "even by a request that is alone" in why else "does not fit"


def feasible(race: Race) -> Iterator[str]:
    """What would help where no system keeps the promises, a line each."""
    tried = [entry for entry in race.entries if entry.verdict is not None]
    if tried:
        best = min(tried, key=lambda e: e.verdict.gap if e.verdict else math.inf)
        yield f"nearest: {best.candidate.name}, ${best.usd_per_hour:,.2f}/h: {best.why}"
    excluded = race.of("excluded")
    rates = [entry for entry in excluded if "cannot serve more" in entry.why]
    if rates:
        most = max(rates, key=lambda e: e.candidate.usd_per_hour)
        yield f"throughput: {most.candidate.name} {most.why}: add replicas or faster GPUs to the axes"
    alone = [entry for entry in excluded if "even by a request that is alone" in entry.why]
    if alone:
        help_ = "raise the limit, or add faster GPUs or tensor_parallel"
        yield f"latency: {alone[0].candidate.name}: {alone[0].why}: {help_}"
    memory = [entry for entry in excluded if _kind(entry.why) == "does not fit"]
    if memory:
        yield f"memory: {memory[0].candidate.name}: {memory[0].why}"
    if tried and not rates:
        yield "more replicas, or a lower rate_per_s, or a looser slo would do"


def _front(answer: Answer) -> Table:
    name, rate = latency_name(answer.front[0].latency_name), answer.races[-1].rate_per_s
    columns = ("", "system", "$/h", "$/M tokens", "in", "out", f"{name}, ms", "rate [interval]")
    table = _table("front of price × latency × capacity (• on it)", *columns)
    for point in answer.front:
        row = [escape(point.candidate.name), f"{point.candidate.usd_per_hour:,.2f}"]
        row += [f"{usd:,.3g}" for usd in cost_of(point.candidate, rate, answer.plan.prices)]
        table.add_row("•" if point.is_best else "", *row, f"{point.latency_ms:,.4g}", interval(point.capacity))
    return table


def flips(answer: Answer) -> list[tuple[str, ...]]:
    """A row for each assumption: its name, the price at its swing, and the nearest changes that flip the answer."""

    def usd(value: float) -> str:
        return f"{value:,.2f}" if math.isfinite(value) else "nothing"

    return [(c.what, usd(c.usd[0]), usd(c.usd[1]), str(c.less or "–"), str(c.more or "–")) for c in answer.changes]


FLIPS = ("assumption", f"$/h at ÷ {SWING:g}", f"$/h at × {SWING:g}", "flips when smaller", "flips when greater")
CHANGING = (
    "the answer flips where the cheapest that will do has another price; what both answers cost is said at the flip; "
    f"load and limits are tried from half to {FAR:g} times what they are, and flips found to within 4.4 %"
)


def _changes(answer: Answer) -> Table:
    table = _table(f"what would change the answer at {answer.races[-1].rate_per_s:g} {answer.plan.unit}/s", *FLIPS)
    for row in flips(answer):
        table.add_row(*map(escape, row))
    return table


def as_json(answer: Answer, folder: Path) -> dict[str, Any]:
    """All of the answer, as ``plan.json`` in ``folder`` has it; a number that is not finite is null."""
    plan = answer.plan

    def _system(candidate: Candidate) -> dict[str, Any]:
        return {
            "number": plan.number(candidate),
            "system": candidate.name,
            "axes": candidate.labels,
            "gpus": candidate.gpus or None,  # None for a system that cannot be
            "usd_per_hour": candidate.usd_per_hour or None,
            "priced_by": candidate.backend,
        }

    return {
        "name": plan.name,
        "question": plan.spec.question or "",
        "rates_are": f"{plan.unit}/s",
        "slo": [str(promise) for promise in plan.spec.slo],
        "promises": [promise.model_dump(exclude_none=True) for promise in plan.spec.slo],
        "seed": plan.spec.search.seed,
        "requests": plan.effort().requests,
        "spares": plan.spec.ask.spares,
        "asked": answer.asked,
        "systems": [
            {**_system(each), "notes": each.notes, "synchronous": each.synchronous, "scenario": _scenario(each, folder)}
            for each in plan.systems
        ],
        "capacities": [
            {**_system(c), **_cost(c, capacity.rate_per_s, plan), **_of_capacity(capacity)}
            for c, capacity in answer.capacities
        ],
        "headroom": [
            {"under": h.stress, **_of_capacity(h.capacity), "growth": {f"{k:g}": v for k, v in h.growth.items()}}
            for h in answer.headroom
        ],
        "cheapest": [
            {
                "rate_per_s": race.rate_per_s,
                "winner": None
                if race.winner is None
                else {
                    **_system(race.winner.candidate),
                    "usd_per_hour": race.winner.usd_per_hour,
                    "replicas": list(race.winner.verdict.replicas) if race.winner.verdict else [],
                    **_cost(race.winner.candidate, race.rate_per_s, plan, race.winner.usd_per_hour),
                    "margin": _margin(answer.margins.get(race.rate_per_s)),
                },
                "would_help": list(feasible(race)) if race.winner is None else [],
                "systems": [
                    {
                        **_system(e.candidate),
                        "outcome": e.outcome,
                        "why": e.why,
                        **({} if e.verdict is None else {"verdict": _of_verdict(e.verdict)}),
                    }
                    for e in race.entries
                ],
            }
            for race in answer.races
        ],
        "front": [
            {
                **_system(p.candidate),
                p.latency_name: _finite(p.latency_ms),
                **_cost(p.candidate, answer.races[-1].rate_per_s, plan),
                **_of_capacity(p.capacity),
                "on_it": p.is_best,
            }
            for p in answer.front
        ],
        "changes": [
            {
                "what": c.what,
                "less": _of_flip(c.less),
                "more": _of_flip(c.more),
                "usd_per_hour": [_finite(usd) for usd in c.usd],
            }
            for c in answer.changes
        ],
        "assumptions": answer.assumptions,
        "commands": answer.commands,
    }


def _scenario(candidate: Candidate, folder: Path) -> dict[str, Any]:
    """The scenario of a system, its files named as they are seen from ``folder``; its load is not the plan's."""
    data = resolved(candidate.document, candidate.folder / "base.yaml", [], [], [], None)
    return {key: value for key, value in relocated(data, folder).items() if key not in ("name", "question")}


def _cost(
    candidate: Candidate, rate_per_s: float, plan: BuyingPlan, usd_per_hour: float | None = None
) -> dict[str, Any]:
    """Dollars a million tokens of a load; None where nothing is served."""
    cost = cost_of(candidate, rate_per_s, plan.prices, usd_per_hour) if rate_per_s > 0 else None
    told = None if cost is None else {"all": cost.all, "in": cost.into, "out": cost.out}
    return {"usd_per_million_tokens": told}


def _margin(margin: Margin | None) -> dict[str, Any] | None:
    if margin is None:
        return None
    return {
        "kept": margin.kept,
        "broken": _finite(margin.broken),
        "one_less": margin.one_less or None,
        "draws": margin.draws,
        "draws_kept": margin.draws_kept,
    }


def _of_flip(flip: Flip | None) -> dict[str, Any] | None:
    if flip is None:
        return None
    return {**flip._asdict(), "to": flip.to or None, "to_usd": _finite(flip.to_usd)}


def _of_capacity(capacity: Capacity) -> dict[str, Any]:
    return {
        "rate_per_s": capacity.rate_per_s,
        "low": capacity.low,
        "high": _finite(capacity.high),
        "limited_by": str(capacity.limiting) if capacity.limiting else None,
        "with_errors": _errors(capacity),
        "islands": capacity.islands,
        "notes": capacity.notes,
        "rates": [_of_verdict(verdict) for verdict in capacity.verdicts],
    }


def _errors(capacity: Capacity) -> dict[str, Any] | None:
    off = capacity.errors
    if off is None:
        return None
    low, high = off.whole(capacity.rate_per_s)
    widths = {"by_step_costs": off.half, "by_chance": off.simulated}
    return {"low": low, "high": high, **widths, "dominate": off.dominate, "draws": list(off.shifts)}


def _of_verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "rate_per_s": verdict.rate_per_s,
        "requests": verdict.requests,
        "replications": verdict.replications,
        "proof": verdict.proof,
        "warm_up_percent": verdict.warm_up,
        "shares": [{"share": k.share, "low": k.low, "high": k.high} for k in verdict.kept],
        "first": {name: _finite(value) for name, value in verdict.first.items()},
        "figures": {name: {"mean": m, "low": low, "high": high} for name, (m, low, high) in verdict.figures.items()},
        "simulated_s": verdict.simulated_s,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def write(answer: Answer, folder: Path) -> None:
    """``plan.json`` and, a row for each system and rate looked at, ``plan.parquet`` in ``folder``. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(answer, folder), indent=2, allow_nan=False, default=str) + "\n"
    write_text(folder / "plan.json", text)
    rows = list(_rows(answer))
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with replacing(folder / "plan.parquet") as partial:
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), partial)


def _rows(answer: Answer) -> Iterator[dict[str, Any]]:
    """The rows of ``plan.parquet``."""
    looks: list[tuple[str, Candidate, Verdict, str]] = []
    looks += [("capacity", c, v, "") for c, capacity in answer.capacities for v in capacity.verdicts]
    if answer.plan.today is not None:
        looks += [(h.stress, answer.plan.today, v, "") for h in answer.headroom for v in h.capacity.verdicts]
    looks += [("cheapest", e.candidate, e.verdict, e.outcome) for r in answer.races for e in r.entries if e.verdict]
    looks += [("front", p.candidate, v, "") for p in answer.front for v in p.capacity.verdicts]
    for part, candidate, verdict, outcome in looks:
        row: dict[str, Any] = {"part": part, "system": candidate.name}
        row |= {axis: str(value) for axis, value in candidate.labels.items()}
        row |= {"gpus": candidate.gpus, "usd_per_hour": candidate.usd_per_hour, "rate_per_s": verdict.rate_per_s}
        row |= {"outcome": outcome, "proof": verdict.proof, "requests": verdict.requests}
        row["replications"] = verdict.replications
        for j, kept in enumerate(verdict.kept):
            row |= {f"share_{j + 1}": kept.share, f"share_{j + 1}_low": kept.low, f"share_{j + 1}_high": kept.high}
        row |= {name: mean for name, (mean, _, _) in verdict.figures.items()}
        yield row
