"""``chairlift diff-engines``: what another engine, or another version of one, changes for a load, and by which rule."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from chairlift.sim.cli import completion
from chairlift.sim.cli.shipped import complete, find_scenario
from chairlift.sim.cli.terminal import console, status
from chairlift.sim.report import tables
from chairlift.sim.results import loops
from chairlift.sim.results.catalogue import FIELDS, Metric, text
from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.writer import Writer
from chairlift.sim.scenario.engines import Engine, engines_of, of_engines
from chairlift.sim.scenario.resolved import relocated
from chairlift.sim.simulate import simulate
from chairlift.sim.study import Study
from chairlift.sim.sweep.ablation import COUNTS, EFFECTS, MECHANISMS, Effect, Finding, Trial, findings, trials_between
from chairlift.sim.units import PS_PER_MS

WIDTH = 120  # columns of tables in a pipe
DEFAULT = "vllm-0.23,vllm-0.33,sglang-0.5.23"
ONE_LOAD = "one load, one seed: chairlift sweep, with these policies as an axis, tells differences from chance"

out = console(least=WIDTH)


def diff_engines(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A scenario file, a shipped one's name, or a trace file.", autocompletion=complete
        ),
    ],
    engines: Annotated[
        str,
        typer.Option(
            metavar="A,B,…",
            help="vllm-0.23 … vllm-0.33, sglang-0.5.17, sglang-0.5.23; without a version the newest. "
            "All are compared with the first.",
        ),
    ] = DEFAULT,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the scenario. Repeatable.",
            autocompletion=completion.keys,
        ),
    ] = None,
    case: Annotated[str | None, typer.Option(metavar="NAME", help="Which case of the scenario.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose settings count, of a comparison; default: the first of an engine."),
    ] = None,
    rules: Annotated[
        bool,
        typer.Option(
            "--rules/--no-rules",
            help="Switch each rule alone, to see which act (two more runs a rule); or only compare.",
        ),
    ] = True,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep the engines' runs there, for report and explain.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let policy and router files named in the YAML run their code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Say what another engine, or another version of one, changes for your load, and by which rule.

    The scenario's requests, model, GPUs and memory stay; each engine's scheduler serves them in turn. The settings of
    your policy are carried over: max_num_seqs of vLLM is max_running_requests of SGLang, and so on. What was
    translated, and what an engine has nothing for, is said below the table.

    Versions of an engine differ by named rules. Each is switched alone, off in the newer and on in the older engine,
    and the load is simulated again: "yes" stands where results change. Of vLLM and SGLang, which share no rules, you
    see a figure for each mechanism, and runs in which a setting takes one away.

    [bold]chairlift diff-engines my.yaml --engines vllm-0.23,vllm-0.33,sglang-0.5.23[/bold]

    [bold]chairlift diff-engines trace.csv --set model=llama-3.1-8b --set gpu=h100[/bold]
    """
    wanted = engines_of(engines)
    study = of_engines(find_scenario(scenario), wanted, set_ or [], case, variant, trust)
    with status(quiet or as_json) as told:
        outcomes = []
        for engine, setup in zip(wanted, study.setups, strict=True):
            told(engine.name)
            outcomes.append(simulate(setup, journal=out_dir is not None))
        found = _Evidence(wanted, outcomes, told) if rules else None
    if out_dir is not None:
        study.resolved = relocated(study.resolved, out_dir)
        with Writer(out_dir, study) as writer:
            for outcome in outcomes:
                writer.add(outcome)
    if as_json:
        sys.stdout.write(json.dumps(_as_json(study, wanted, outcomes, found), indent=2, allow_nan=False) + "\n")
        return
    out.print(_table(study, outcomes))
    if found is not None:
        found.show(outcomes)
    out.print()
    out.print(tables.assumptions(outcomes))
    out.print(ONE_LOAD, style="dim")
    if hint := _hint(wanted, study):
        out.print(hint, style="yellow")
    if warning := _warning(outcomes):
        out.print(f"warning: {escape(warning)}", style="yellow")
    if out_dir is not None:
        out.print(f"runs in {escape(str(out_dir))}: chairlift report, explain --variant {wanted[-1].name}", style="dim")


class _Evidence:
    """What rules and mechanisms did: every engine beside the first."""

    def __init__(self, engines: Sequence[Engine], outcomes: Sequence[Outcome], told: Callable[[str], None]) -> None:
        self.base = engines[0]
        self.rules: list[tuple[Engine, list[Finding]]] = []
        self.trials: list[tuple[Engine, list[Trial]]] = []
        for other, run in zip(engines[1:], outcomes[1:], strict=True):
            runs = outcomes[0], run
            if other.family == self.base.family:
                self.rules.append((other, findings(self.base, other, runs, told)))
            else:
                self.trials.append((other, trials_between(self.base, other, runs, told)))

    def show(self, outcomes: Sequence[Outcome]) -> None:
        """Print the rules of each pair, the mechanisms, and what single runs with something switched show."""
        for other, found in self.rules:
            out.print()
            if not found:
                out.print(f"{self.base.name} and {other.name}: no rule tells the two apart", style="bold")
                continue
            out.print(_rule_table(self.base, other, found))
            if effects := _effects(self.base, other, found):
                out.print()
                out.print(_effect_table("what each of these does alone", effects))
        if self.trials:
            out.print()
            out.print(_mechanism_table(outcomes))
        for other, tried in self.trials:
            out.print()
            title = f"with one mechanism taken away: {self.base.name} and {other.name}"
            out.print(_effect_table(title, [(_tried(trial), trial.effect) for trial in tried]))


# The one table: rows are figures, columns are engines


@dataclass
class _Row:
    metric: Metric
    values: Sequence[float | None]


def _rows(outcomes: Sequence[Outcome]) -> list[_Row]:
    found = []
    for name in (
        *("completed", "rejected", "timed_out", "failed", "request_throughput", "request_goodput", "output_throughput"),
        *("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms"),
        *("median_e2el_ms", "p99_e2el_ms"),
    ):
        found.append(_Row(FIELDS[name], [outcome.summary[name] for outcome in outcomes]))
    waits = [_waits(outcome) for outcome in outcomes]
    for percent in (50, 99):
        meaning = "Arrival → taken up by the scheduler, of the requests that were."
        metric = Metric(f"p{percent}_queue_ms", f"queue p{percent}", "ms", "less", meaning)
        found.append(_Row(metric, [float(np.percentile(w, percent)) if len(w) else None for w in waits]))
    for name in ("mean_running", "peak_running", "preemptions", "prefix_hit_rate", "kv_utilization", "kv_internal"):
        found.append(_Row(FIELDS[name], [outcome.summary[name] for outcome in outcomes]))
    pools = [float(sum(g.count * g.blocks * g.block_size for g in outcome.setup.groups)) for outcome in outcomes]
    found.append(_Row(Metric("kv_tokens", "KV pool, tokens", "", "", "Tokens that all replicas' pools hold."), pools))
    found.append(_Row(FIELDS["steps"], [outcome.summary["steps"] for outcome in outcomes]))
    return [
        row
        for row in found
        if any(value is not None for value in row.values) and (not row.metric.quiet or any(row.values))
    ]


def _waits(outcome: Outcome) -> np.ndarray:
    """Time from arrival to being taken up, ms, of the requests that were."""
    columns = outcome.requests.columns()
    admitted, arrival = np.asarray(columns["admitted_ps"]), np.asarray(columns["arrival_ps"])
    found: np.ndarray = ((admitted - arrival) / PS_PER_MS)[admitted >= 0]
    return found


def _table(study: Study, outcomes: Sequence[Outcome]) -> Table:
    table = tables.comparison(f"{study.name}: what each engine makes of the same load")
    table.add_column("", no_wrap=True)
    for outcome in outcomes:
        table.add_column(escape(outcome.setup.variant), justify="right", no_wrap=True)
    for row in _rows(outcomes):
        base = row.values[0]
        cells = [row.metric.text(base)]
        cells += [_beside(row.metric, base, value) for value in row.values[1:]]
        table.add_row(row.metric.label, *cells)
    return table


def _beside(metric: Metric, base: float | None, value: float | None) -> str:
    """A value and how far it is from the first engine's, green where it is better."""
    said = metric.text(value)
    if base is None or value is None:
        return said
    if value == base:
        return f"{said} [dim]=[/dim]"
    more = value - base
    told = f"{100 * more:+.1f} pts" if metric.unit == "%" else _share(more / base if base else None) or f"{more:+,.4g}"
    style = "dim" if not metric.better else "green" if (more > 0) == (metric.better == "more") else "red"
    return f"{said} [{style}]{told}[/]"


def _share(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:+.1f} %" if share < 4 else f"×{1 + share:.3g}"


# By which rule


def _rule_table(base: Engine, other: Engine, found: Sequence[Finding]) -> Table:
    table = tables.comparison(f"by which rule: {base.name} → {other.name}")
    table.add_column("rule", style="bold", overflow="fold", max_width=40)
    for label in ("since", "acted"):
        table.add_column(label, no_wrap=True)
    table.add_column("what", overflow="fold")
    for finding in found:
        acted = finding.acted
        said = f"[dim]{acted}[/dim]" if acted == "no" else acted
        table.add_row(escape(finding.rule.name), finding.rule.since, said, escape(finding.rule.does))
    if not any(finding.tried for finding in found):
        table.caption = "all results are the same to the picosecond, so no rule was tried alone"
    return table


def _effects(base: Engine, other: Engine, found: Sequence[Finding]) -> list[tuple[str, Effect]]:
    """Of the rules that acted, each run with one switched, and what it shows."""
    return [
        (f"{engine.name} {word} {finding.rule.name}", effect)
        for finding in found
        if finding.acted != "no"
        for engine, word, effect in ((base, "with", finding.added), (other, "without", finding.removed))
        if effect is not None
    ]


def _effect_table(title: str, effects: Sequence[tuple[str, Effect]]) -> Table:
    """What single runs with something switched show, each beside the same engine's own run."""
    table = tables.comparison(title)
    table.add_column("", overflow="fold")
    for label in ("changed", "from", *(FIELDS[name].label for name in EFFECTS), "preempt."):
        table.add_column(label, justify="right", no_wrap=True)
    for said, effect in effects:
        cells = [f"{effect.changed:,}", "" if effect.first_s is None else text(effect.first_s, "s")]
        for name, share in effect.shares.items() if effect.any else ():
            style = "dim" if not share else "green" if (share > 0) == (FIELDS[name].better == "more") else "red"
            cells.append(f"[{style}]{_share(share) or '–'}[/]")
        more = effect.counts["preemptions"]
        table.add_row(escape(said), *cells, *([f"{more:+,}" if more else ""] if effect.any else []))
    table.caption = "beside the same engine's own run; changed: requests of which anything is different, and from when"
    return table


def _mechanism_table(outcomes: Sequence[Outcome]) -> Table:
    table = tables.comparison("by which mechanism: vLLM and SGLang")
    columns = ([each.subject, each.vllm, each.sglang, each.figure] for each in MECHANISMS)
    for label, cells in zip(("", "vLLM", "SGLang", "to be seen in"), zip(*columns, strict=True), strict=True):
        longest = max(len(word) for cell in cells for word in cell.split())  # a setting's name stays in one piece
        table.add_column(label, overflow="fold", min_width=longest)
    for outcome in outcomes:
        table.add_column(escape(outcome.setup.variant), justify="right", overflow="fold")
    for each in MECHANISMS:
        figures = [text(each.of(outcome), each.unit) for outcome in outcomes]
        table.add_row(each.subject, each.vllm, each.sglang, each.figure, *figures)
    return table


def _tried(trial: Trial) -> str:
    settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in trial.settings.items())
    return f"{trial.engine.name} {settings}: {trial.does}"


def _hint(engines: Sequence[Engine], study: Study) -> str:
    """What makes SGLang look worse than it need: it reserves room for answers that nobody bounds."""
    bounded = study.setups[0].trace.max_tokens is not None
    if bounded or all(engine.family != "sglang" for engine in engines):
        return ""
    return (
        "no request declares max_tokens, so SGLang reckons with an answer as long as the model allows, 4,096 tokens at"
        " most: workload.max_tokens says what your clients ask for"
    )


def _warning(outcomes: Sequence[Outcome]) -> str:
    return loops.warning([(outcome.setup.variant, outcome.setup.loop) for outcome in outcomes])


# JSON


def _as_json(
    study: Study, engines: Sequence[Engine], outcomes: Sequence[Outcome], found: _Evidence | None
) -> dict[str, Any]:
    """All of it, ready for JSON; shares are of the first engine's values, or of the engine that was switched."""
    rows = _rows(outcomes)
    evidence = found or _Evidence(engines[:1], outcomes[:1], lambda _: None)
    return {
        "scenario": study.name,
        "baseline": engines[0].name,
        "engines": [
            {
                "name": engine.name,
                "note": outcome.setup.note,
                "loop": outcome.setup.loop,
                "settings": [group.scheduler_settings for group in outcome.setup.groups],
                "assumptions": outcome.assumptions,
                "figures": {row.metric.name: row.values[i] for row in rows},
                "mechanisms": {each.figure: each.of(outcome) for each in MECHANISMS},
            }
            for i, (engine, outcome) in enumerate(zip(engines, outcomes, strict=True))
        ],
        "rules": [
            {
                "from": engines[0].name,
                "to": other.name,
                "rule": each.rule.name,
                "does": each.rule.does,
                "since": each.rule.since,
                "acted": each.acted,
                "added_to_first": _effect_json(each.added),
                "removed_from_second": _effect_json(each.removed),
            }
            for other, each_found in evidence.rules
            for each in each_found
        ],
        "trials": [
            {
                "from": engines[0].name,
                "to": other.name,
                "engine": each.engine.name,
                "settings": dict(each.settings),
                "does": each.does,
                "effect": _effect_json(each.effect),
            }
            for other, tried in evidence.trials
            for each in tried
        ],
        "warning": _warning(outcomes),
        "hint": _hint(engines, study),
    }


def _effect_json(effect: Effect | None) -> dict[str, Any] | None:
    if effect is None:
        return None
    return {
        "requests_changed": effect.changed,
        "requests": effect.requests,
        "first_s": effect.first_s,
        **{f"{name}_share": share for name, share in effect.shares.items()},
        **{f"{name}_more": effect.counts[name] for name in COUNTS},
    }
