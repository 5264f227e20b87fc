"""Which rules of an engine act on a load: each is switched alone, and the run is simulated again.

Nothing is guessed. Two versions of an engine differ by named rules (`sim.scenario.engines.rules_between`). For each
rule the older engine runs once more with that rule of the newer one, and the newer engine without it. A rule acted if
either run differs from its engine's own in what became of any request: when it was admitted, got its first token and
ended, how often it was preempted, what it found in the cache. Two engines of different make have no rules in common to
switch; `trials_between` changes settings of theirs instead, each of which takes one mechanism away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from chairlift.sim.results.outcome import Outcome
from chairlift.sim.results.records import Status
from chairlift.sim.scenario.engines import (
    LATER,
    Engine,
    Rule,
    as_other,
    newest,
    only_one_has,
    rules_between,
    with_settings,
)
from chairlift.sim.simulate import simulate
from chairlift.sim.units import PS_PER_S

EFFECTS = ("request_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "p99_e2el_ms")
COUNTS = ("preemptions", "steps")  # whose effect is a difference, and no share

_FATES = ("status", "replica", "emitted_tokens", "preemptions", "cached_tokens", "swaps", "swapped_tokens")
_TIMES = ("admitted_ps", "first_token_ps", "finished_ps")

Tell = Callable[[str], None]


class Effect(NamedTuple):
    """How a run differs from another one of the same requests."""

    changed: int  # requests of which anything is different
    requests: int
    first_s: float | None  # simulated time of the first difference; None: there is none
    steps: int  # engine steps more
    shares: dict[str, float | None]  # of `EFFECTS`: change as a share of the other run's value; None: it has none
    counts: dict[str, int]  # of `COUNTS`: how many more

    @property
    def any(self) -> bool:
        """Whether the two runs differ at all."""
        return bool(self.changed or self.steps)


class Finding(NamedTuple):
    """What switching one rule shows."""

    rule: Rule
    added: Effect | None  # to the first engine; None: not tried
    removed: Effect | None  # from the second engine; None: not tried

    @property
    def tried(self) -> bool:
        """Whether it was switched at all."""
        return self.added is not None or self.removed is not None

    @property
    def acted(self) -> str:
        """``yes``, ``no``, or where only one of two trials shows something, ``with the others`` or ``alone``.

        A rule that was not tried did nothing: then the runs of the two engines are the same.
        """
        tried = {name: each for name, each in (("alone", self.added), ("with the others", self.removed)) if each}
        shown = [name for name, each in tried.items() if each.any]
        if len(shown) == len(tried):
            return "yes" if shown else "no"
        return shown[0] if shown else "no"


class Trial(NamedTuple):
    """An engine run once more with one setting changed, which takes a mechanism away."""

    engine: Engine
    settings: Mapping[str, Any]
    does: str
    effect: Effect


def effect(before: Outcome, after: Outcome) -> Effect:
    """How ``after`` differs from ``before``; both served the same trace."""
    old, new = before.requests.columns(), after.requests.columns()
    names = [name for name in (*_FATES, *_TIMES, *before.requests.extra) if name in old and name in new]
    unlike = {name: np.asarray(old[name]) != np.asarray(new[name]) for name in names}
    changed = np.logical_or.reduce(list(unlike.values()))
    first = min((_first(np.asarray(old[n]), np.asarray(new[n]), unlike[n]) for n in _TIMES), default=np.inf)
    if np.isinf(first) and changed.any():  # the same times, and another fate
        first = float(np.asarray(new["admitted_ps"])[changed].min())
    a, b = before.summary, after.summary
    return Effect(
        int(np.count_nonzero(changed)),
        len(changed),
        None if np.isinf(first) else first / PS_PER_S,
        b["steps"] - a["steps"],
        {name: b[name] / a[name] - 1 if a[name] and b[name] is not None else None for name in EFFECTS},
        {name: b[name] - a[name] for name in COUNTS},
    )


def _first(old: np.ndarray, new: np.ndarray, unlike: np.ndarray) -> float:
    """The earliest of the times that are ``unlike``; -1 is no time."""
    both = np.concatenate([old[unlike], new[unlike]])
    both = both[both >= 0]
    return float(both.min()) if len(both) else np.inf


def findings(one: Engine, other: Engine, runs: tuple[Outcome, Outcome], tell: Tell) -> list[Finding]:
    """What each rule between two versions of an engine did to the load of ``runs``, their own runs."""
    rules = rules_between(one, other)
    settings = only_one_has(runs[0].setup, runs[1].setup)
    if not effect(*runs).any:
        rules += [Rule(key, "", LATER[key]) for key in settings]
        return [Finding(rule, None, None) for rule in rules]
    found = []
    for rule in rules:
        tell(f"{one.name} with {rule.name}")
        added = effect(runs[0], simulate(as_other(runs[0].setup, runs[1].setup, [rule])))
        tell(f"{other.name} without {rule.name}")
        removed = effect(runs[1], simulate(as_other(runs[1].setup, runs[0].setup, [rule])))
        found.append(Finding(rule, added, removed))
    for key, values in settings.items():
        newer = one.name == newest(one, other).name
        engine, run, value = (one, runs[0], values[1]) if newer else (other, runs[1], values[0])
        tell(f"{engine.name} without {key}")
        setup = with_settings(run.setup, {key: value})
        shown = None if setup is None else effect(run, simulate(setup))
        said = f"{json.dumps(values[not newer])}, a setting that only {engine.name} has."
        found.append(Finding(Rule(key, said, LATER[key]), *((shown, None) if newer else (None, shown))))
    return found


def trials_between(one: Engine, other: Engine, runs: tuple[Outcome, Outcome], tell: Tell) -> list[Trial]:
    """What single mechanisms of two engines of different make did to the load of ``runs``, their own runs."""
    if one.family == other.family:
        return []
    found = []
    for engine, run, peer in ((one, runs[0], runs[1]), (other, runs[1], runs[0])):
        for settings, page, does in _changes(engine, run, peer):
            setup = with_settings(run.setup, settings, page)
            if setup is not None:
                tell(f"{engine.name} with {', '.join(settings)}")
                found.append(Trial(engine, settings, does, effect(run, simulate(setup))))
    return found


def _changes(engine: Engine, run: Outcome, peer: Outcome) -> Iterator[tuple[dict[str, Any], int | None, str]]:
    """Settings that take one mechanism away from ``engine``, the block size that follows, and what is then gone."""
    settings, page = run.setup.groups[0].scheduler_settings, peer.setup.groups[0].block_size
    if engine.family == "vllm":
        if settings["enable_prefix_caching"]:
            yield {"enable_prefix_caching": False}, None, "no prefix cache"
        return
    chunks = settings["chunked_prefill_size"]
    if not settings["enable_mixed_chunk"] and chunks is not None and chunks > 0:
        yield {"enable_mixed_chunk": True}, None, "decodes go along with prompts, as in vLLM"
    if settings["schedule_conservativeness"]:
        yield {"schedule_conservativeness": 0.0}, None, "no guess of the answers' memory when requests start"
    if settings["page_size"] != page:
        yield {"page_size": page}, page, "pages as large as vLLM's blocks"
    if not settings["disable_radix_cache"]:
        yield {"disable_radix_cache": True}, None, "no prefix cache"


class Mechanism(NamedTuple):
    """Something that vLLM and SGLang do each in its own way, and a figure of a run that shows it."""

    subject: str
    vllm: str
    sglang: str
    figure: str
    of: Callable[[Outcome], float | None]
    unit: str  # as the catalogue's


def _prompt_steps(outcome: Outcome) -> tuple[int, int, int]:
    """Steps with prompts, those of them in which somebody decodes, and prompt tokens; of all replicas."""
    steps = mixed = tokens = 0
    for runs in outcome.runs:
        for part in runs.run_parts():
            prompts = part["chunks"] > 0
            steps += int(np.count_nonzero(prompts))
            mixed += int(np.count_nonzero(prompts & (part["decodes"] > 0)))
            tokens += int(part["prefill_tokens"].sum())
    return steps, mixed, tokens


def _with_decodes(outcome: Outcome) -> float | None:
    steps, mixed, _ = _prompt_steps(outcome)
    return mixed / steps if steps else None


def _prompt_tokens(outcome: Outcome) -> float | None:
    steps, _, tokens = _prompt_steps(outcome)
    return tokens / steps if steps else None


def _cut_short(outcome: Outcome) -> float | None:
    columns = outcome.requests.columns()
    done = np.asarray(columns["status"]) == Status.FINISHED
    short = np.asarray(columns["emitted_tokens"]) < np.asarray(columns["output_tokens"])
    return float(np.count_nonzero(done & short))


def _summary(name: str) -> Callable[[Outcome], float | None]:
    return lambda outcome: outcome.summary[name]


MECHANISMS = (
    Mechanism(
        "prompts and decodes",
        "share a step, decodes first, under one budget",
        "prompts have steps of their own, decodes wait; together only with enable_mixed_chunk",
        "steps with prompts in which somebody decodes",
        _with_decodes,
        "%",
    ),
    Mechanism(
        "tokens a step",
        "max_num_batched_tokens, decodes counted",
        "chunked_prefill_size, prompts alone",
        "prompt tokens of a step with prompts, mean",
        _prompt_tokens,
        "",
    ),
    Mechanism(
        "who starts",
        "the head of the queue, if its known tokens have room",
        "whoever has room beside a guess of all answers to come (new-token ratio)",
        "running, mean",
        _summary("mean_running"),
        "x",
    ),
    Mechanism(
        "memory runs out",
        "the last admitted is preempted, to the queue's head",
        "the shortest answers are retracted, to the queue's end, with room for 20 steps",
        "preemptions",
        _summary("preemptions"),
        "",
    ),
    Mechanism(
        "prefix cache",
        "hashes of whole blocks, evicted block by block",
        "a radix tree, answers too, evicted by whole nodes; nothing of the batch at hand",
        "prefix hits",
        _summary("prefix_hit_rate"),
        "%",
    ),
    Mechanism(
        "blocks",
        "block_size",
        "page_size",
        "held and never filled",
        _summary("kv_internal"),
        "%",
    ),
    Mechanism(
        "intake",
        "an answer may be as long as the model's length allows",
        "max_tokens is clipped to what context and pool can hold",
        "answers cut short",
        _cut_short,
        "",
    ),
)
