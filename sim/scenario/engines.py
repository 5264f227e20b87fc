"""One scenario on several serving engines: the same requests, model, GPUs and memory, and each engine's scheduler.

An engine is a name with a version, such as ``vllm-0.33`` or ``sglang-0.5.23``. `of_engines` makes a scenario into a
comparison of engines. The settings that the scenario gives its own policy are carried over: to another version of the
same engine as they are, to the other engine under its own name for the same thing (`COUNTERPARTS`). What an engine has
no counterpart of is left out. Each variant's ``note`` says what was translated and what was left out.

Example: ``policy: {name: vllm, max_num_seqs: 64, watermark: 0.05}`` is, for vllm-0.23,
``{name: vllm, version: "0.23", max_num_seqs: 64}`` with the note "left out: watermark 0.05 (exists since vLLM 0.24)",
and for sglang-0.5.23 ``{name: sglang, version: 0.5.23, max_running_requests: 64}``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chairlift.policies import sglang, vllm_versions
from chairlift.policies.sglang import Sglang
from chairlift.policies.vllm import Vllm
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.scenario.load import is_of_cases, study_of
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.policy_files import Trust
from chairlift.sim.scenario.resolve import Lookup
from chairlift.sim.scenario.resolved import each_case
from chairlift.sim.scenario.schema import System
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.study import ReplicaGroup, Setup, Study

OPTION = "--engines"
SCENARIO_FILES = (".yaml", ".yml", ".json")
BLOCK = 16  # tokens a block, as a scenario's kv has it where it says nothing


class Family(NamedTuple):
    """What the versions of an engine have in common."""

    title: str
    scheduler: type[Vllm | Sglang]
    versions: tuple[str, ...]


FAMILIES = {
    "vllm": Family("vLLM", Vllm, vllm_versions.VERSIONS),
    "sglang": Family("SGLang", Sglang, sglang.VERSIONS),
}


class Engine(NamedTuple):
    """An engine in one version."""

    family: str  # of `FAMILIES`; also what a scenario calls its policy
    version: str

    @property
    def name(self) -> str:
        """``vllm-0.33``."""
        return f"{self.family}-{self.version}"

    @property
    def title(self) -> str:
        """``vLLM 0.33``."""
        return f"{FAMILIES[self.family].title} {self.version}"


def known() -> list[str]:
    """The names of all engines, oldest versions first."""
    return [f"{name}-{version}" for name, family in FAMILIES.items() for version in family.versions]


def engine(name: str) -> Engine:
    """The engine of that name; a family alone means its newest version, and vLLM's patch releases mean their minor one.

    Raises `BadInput` for a name that is none.
    """
    family, _, version = name.partition("-")
    if family in FAMILIES:
        versions = FAMILIES[family].versions
        minor = ".".join(version.split(".")[:2]) if family == "vllm" else version
        if not version or minor in versions:
            return Engine(family, minor or versions[-1])
    raise BadInput(Problem(f"no such engine{did_you_mean(name, known())}", file=OPTION, value=name))


def engines_of(names: str) -> list[Engine]:
    """The engines in a list with commas, at least two. Raises `BadInput` for anything else."""
    found = [engine(name.strip()) for name in names.split(",") if name.strip()]
    if twice := [one.name for i, one in enumerate(found) if one in found[:i]]:
        raise BadInput(Problem("is given twice", file=OPTION, value=twice[0]))
    if len(found) < 2:
        raise BadInput(Problem("must name at least two engines, such as vllm-0.23,vllm-0.33", file=OPTION, value=names))
    return found


def of_engines(
    path: Path,
    engines: Sequence[Engine],
    assignments: Sequence[str] = (),
    case: str | None = None,
    variant: str | None = None,
    trust: Trust = False,
) -> Study:
    """A study with a setup for each of ``engines``: the scenario at ``path`` with that engine's scheduler.

    ``path`` may be a trace file; then ``assignments`` say the model and the GPU. Of a scenario with cases ``case`` is
    the one that runs. Of one with variants ``variant`` says whose keys and settings count (default: the first whose
    policy is one of the engines'). Raises `BadInput` with all mistakes.
    """
    document = _document(path)
    of_cases = [text for text in assignments if is_of_cases(text)]
    document.set(of_cases)
    rest = [text for text in assignments if text not in of_cases]
    one = _one_system(_one_case(document, case), rest, variant)
    policies = _Policies(one, path.parent, trust)
    variants = [policies.variant(each) for each in engines]
    policies.settle()
    for key in ("waterfall", "baseline", "claims"):
        one.data.pop(key, None)
    one.put("compare", variants, OPTION)
    for i, each in enumerate(engines):
        one.overrides["compare", i] = f"{OPTION} {each.name}"
    study = study_of(one, path, trust=trust)
    if any(setup.executes for setup in study.setups):
        rule = "must price steps, so that a run can be repeated: what is executed never takes the same time twice"
        raise BadInput(one.problem(("backend",), rule))
    return study


def _document(path: Path) -> Document:
    """The scenario at ``path``, or one that is nothing but the trace file there."""
    if path.suffix in SCENARIO_FILES or not path.is_file():
        return read(path)
    return Document({"workload": {"file": str(path.resolve())}}, {}, str(path))


def _one_case(document: Document, name: str | None) -> Document:
    """The document as it is in the case ``name``."""
    told = document.data.get("cases")
    names = [str(each.get("name")) for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    if name is None:
        if len(names) > 1:
            raise BadInput(document.problem(("cases",), f"choose one of them with --case: {', '.join(names)}"))
        return each_case(document)[0]
    if name not in names:
        rule = f"no such case{did_you_mean(name, names)}" if names else "the scenario has no cases"
        raise BadInput(Problem(rule, file="--case", value=name))
    return each_case(document)[names.index(name)]


def _one_system(document: Document, assignments: Sequence[str], name: str | None) -> Document:
    """The document with the keys of its variant ``name`` in place of its own, and without variants."""
    document.set(assignments)
    told = document.data.pop("compare", None)
    variants = [each for each in told if isinstance(each, dict)] if isinstance(told, list) else []
    names = [str(each.get("name")) for each in variants]
    if name is not None and name not in names:
        rule = f"no such variant{did_you_mean(name, names)}" if names else "the scenario compares nothing"
        raise BadInput(Problem(rule, file="--variant", value=name))
    if not variants:
        return document
    chosen = 0 if name is None else names.index(name)
    if name is None:
        policies = [each.get("policy", document.data.get("policy")) for each in variants]
        chosen = next((i for i, policy in enumerate(policies) if _called(policy) in FAMILIES), 0)
    for key in System.model_fields.keys() & variants[chosen].keys():
        if variants[chosen][key] is None:
            continue
        if key in ("parallel", "tensor_parallel"):  # one says the other
            document.data.pop("parallel", None)
            document.data.pop("tensor_parallel", None)
        place = document.problem(("compare", chosen, key), "")
        where = f"{place.file}:{place.line}" if place.line is not None else place.file
        document.put(key, variants[chosen][key], f"{where}: compare.{chosen}")
    return document


def _called(choice: Any) -> str:
    """The name in ``choice``, what a document says of a policy."""
    return str(choice.get("name") if isinstance(choice, dict) else choice)


Settings = dict[str, Any]


class Counterpart(NamedTuple):
    """A setting of vLLM and the one of SGLang that means the same, with the value of one made from the other's."""

    vllm: str
    sglang: str
    to_sglang: Callable[[Any], Any] = lambda value: value
    to_vllm: Callable[[Any], Any] = lambda value: value


COUNTERPARTS = (
    Counterpart("max_num_seqs", "max_running_requests"),
    Counterpart("max_num_batched_tokens", "chunked_prefill_size"),  # of prompts alone in SGLang
    Counterpart("block_size", "page_size"),
    Counterpart("enable_prefix_caching", "disable_radix_cache", lambda on: not on, lambda off: not off),
    Counterpart("async_scheduling", "disable_overlap_schedule", lambda on: not on, lambda off: not off),
    Counterpart(  # steps from one with prompts to the next; turns without prompts between them
        "prefill_schedule_interval", "prefill_decode_interval", lambda steps: steps - 1, lambda turns: turns + 1
    ),
)
# limits of vLLM that hold beside another one, if they are tighter
TIGHTER = {"max_num_scheduled_tokens": "max_num_batched_tokens", "max_num_active_seqs": "max_num_seqs"}


class _Policies(Lookup):
    """The policies that a document names, made into those of engines. Mistakes are collected, `settle` raises them."""

    def variant(self, engine: Engine) -> Settings:
        """The document's variant for ``engine``."""
        data = self._document.data
        notes: dict[str, None] = {}
        found: Settings = {"name": engine.name}
        groups = data.get("replicas")
        groups = groups if isinstance(groups, list) else []
        if data.get("policy") is not None or not groups or any(_of_group(group) is None for group in groups):
            found |= self._system(data, (), engine, notes)
        if any(_of_group(group) is not None for group in groups):
            found["replicas"] = [
                group if _of_group(group) is None else {**group, **self._system(group, ("replicas", i), engine, notes)}
                for i, group in enumerate(groups)
            ]
        if notes:
            found["note"] = "; ".join(notes)
        return found

    def settle(self) -> None:
        """Raise `BadInput` with the mistakes found, each once."""
        if self._problems:
            raise BadInput({str(problem): problem for problem in self._problems}.values())

    def _system(self, system: Mapping[str, Any], at: KeyPath, engine: Engine, notes: dict[str, None]) -> Settings:
        """The keys ``policy`` and, where the policy fixed the pool, ``kv`` of ``system``, which stands at ``at``."""
        choice = system.get("policy")
        made: Settings = {"name": engine.family, "version": engine.version}
        found = self._find("policy", choice, (*at, "policy")) if isinstance(choice, str | dict) else None
        if found is None:
            return {"policy": made}
        kind, settings = found
        given = {key: settings[key] for key in choice if key in settings} if isinstance(choice, dict) else {}
        given.pop("version", None)
        family = next((name for name, each in FAMILIES.items() if issubclass(kind, each.scheduler)), None)
        if family is None:
            if given:
                notes[f"settings of policy {_called(choice)} left out: it is none of the engines'"] = None
            return {"policy": made}
        other: Settings = {}
        if family != engine.family:
            turn = _to_sglang if engine.family == "sglang" else _to_vllm
            try:
                given, other = turn(given, system.get("kv"), notes)
            except ValueError as error:
                key, rule = error.args
                self._problems.append(self._document.problem((*at, "policy", key), rule, given[key]))
                return {"policy": made}
        lacking = FAMILIES[engine.family].scheduler.refused({**given, "version": engine.version})
        for key in [key for key in given if key in lacking]:
            notes[f"left out: {_told(key, given[key])} ({lacking[key].partition(',')[0]})"] = None
        return {"policy": made | {key: value for key, value in given.items() if key not in lacking}, **other}


def _of_group(group: Any) -> Any:
    return group.get("policy") if isinstance(group, dict) else None


def _told(key: str, value: Any) -> str:
    return f"{key} {str(value).lower() if isinstance(value, bool) else value}"


Turned = tuple[Settings, Settings]  # settings of the other engine; other keys of the scenario that replace its own


def _to_sglang(given: Settings, kv: Any, notes: dict[str, None]) -> Turned:
    """Settings of vLLM for SGLang."""
    left = dict(given)
    found: Settings = {}
    for tighter, limit in TIGHTER.items():
        if left.get(tighter) is not None:
            left[limit] = min(left.pop(tighter), left.get(limit, given[tighter]))
    for pair in COUNTERPARTS:
        if left.get(pair.vllm) is not None:
            _turn(left, pair.vllm, found, pair.sglang, pair.to_sglang, notes)
    if left.pop("enable_chunked_prefill", True) is False:
        found["chunked_prefill_size"] = -1
        notes["enable_chunked_prefill false → chunked_prefill_size -1"] = None
    if left.pop("scheduling_policy", "fcfs") == "priority":
        found |= {"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}
        notes["scheduling_policy priority → enable_priority_scheduling, schedule_low_priority_values_first"] = None
    other: Settings = {}
    if (blocks := left.pop("num_gpu_blocks", None)) is not None:
        size = given.get("block_size") or (kv or {}).get("block_size", BLOCK)
        rest = {key: value for key, value in (kv or {}).items() if key not in ("blocks", "tokens")}
        other["kv"] = {**rest, "tokens": (blocks - 1) * size}
        notes[f"num_gpu_blocks {blocks} → kv.tokens {(blocks - 1) * size}"] = None
    _leave_out(left, Vllm, "SGLang", notes)
    return found, other


def _to_vllm(given: Settings, kv: Any, notes: dict[str, None]) -> Turned:
    """Settings of SGLang for vLLM. Raises ValueError(setting, rule) where vLLM would do the opposite."""
    left = dict(given)
    found: Settings = {}
    if (left.get("chunked_prefill_size") or 1) < 0:
        notes[f"chunked_prefill_size {left.pop('chunked_prefill_size')} → enable_chunked_prefill false"] = None
        found["enable_chunked_prefill"] = False
    if left.get("page_size") == 1:
        notes["left out: page_size 1 (vLLM's blocks have more tokens)"] = None
        del left["page_size"]
    for pair in COUNTERPARTS:
        if left.get(pair.sglang) is not None:
            _turn(left, pair.sglang, found, pair.vllm, pair.to_vllm, notes)
    low_first = left.pop("schedule_low_priority_values_first", False)
    if left.pop("enable_priority_scheduling", False):
        if not low_first:
            rule = "vLLM serves low values first: say schedule_low_priority_values_first: true, or leave it out"
            raise ValueError("enable_priority_scheduling", rule)
        found["scheduling_policy"] = "priority"
        notes["enable_priority_scheduling → scheduling_policy priority"] = None
    _leave_out(left, Sglang, "vLLM", notes)
    return found, {}


def _turn(
    left: Settings, name: str, found: Settings, other: str, made: Callable[[Any], Any], notes: dict[str, None]
) -> None:
    value = left.pop(name)
    found[other] = made(value)
    notes[f"{_told(name, value)} → {_told(other, found[other])}"] = None


def _leave_out(left: Settings, kind: type[Vllm | Sglang], title: str, notes: dict[str, None]) -> None:
    """Note what has no counterpart; a value that is the default anyhow says nothing."""
    for key, value in left.items():
        if value != getattr(kind, key):
            notes[f"left out: {_told(key, value)} ({title} has none)"] = None


LATER = {**{name: rule.since for name, rule in vllm_versions.SETTINGS.items()}, **sglang.SETTINGS}  # setting → since


class Rule(NamedTuple):
    """A rule by which two versions of an engine differ."""

    name: str
    does: str  # a sentence; "" where the name says it
    since: str  # version
    sizes: bool = False  # it acts on defaults that follow from the GPU, before anything runs


def newest(one: Engine, other: Engine) -> Engine:
    """The newer of two versions of an engine."""
    versions = FAMILIES[one.family].versions
    return max(one, other, key=lambda each: versions.index(each.version))


def rules_between(one: Engine, other: Engine) -> list[Rule]:
    """The named rules that one of two versions of an engine has and the other has not; none of different engines."""
    if one.family != other.family:
        return []
    kind = FAMILIES[one.family].scheduler
    if kind is Vllm:
        rules = [Rule(name, rule.does, rule.since, rule.sizes) for name, rule in vllm_versions.RULES.items()]
    else:
        rules = [Rule(name, "", since) for name, since in sglang.RULES.items()]
    return [rule for rule in rules if kind.holds(rule.name, one.version) != kind.holds(rule.name, other.version)]


def only_one_has(setup: Setup, other: Setup) -> dict[str, tuple[Any, Any]]:
    """Settings that one of two versions of an engine was given and the other lacks → their values in the two."""
    found: dict[str, tuple[Any, Any]] = {}
    for group, theirs in zip(setup.groups, other.groups, strict=True):
        for key in LATER:
            values = group.scheduler_settings.get(key), theirs.scheduler_settings.get(key)
            if values[0] != values[1]:
                found[key] = values
    return found


def as_other(setup: Setup, other: Setup, rules: Sequence[Rule]) -> Setup:
    """``setup``, an engine's, with ``rules`` as ``other`` has them, which is the same engine in another version."""
    groups = [_as_other(group, theirs, rules) for group, theirs in zip(setup.groups, other.groups, strict=True)]
    return dataclasses.replace(setup, groups=groups)


def _as_other(group: ReplicaGroup, other: ReplicaGroup, rules: Sequence[Rule]) -> ReplicaGroup:
    kind = group.scheduler
    assert issubclass(kind, Vllm | Sglang)
    version = str(other.scheduler_settings["version"])
    switched = {rule.name: kind.holds(rule.name, version) for rule in rules}
    made = type(kind.__name__, (kind,), {"switched": {**kind.switched, **switched}, "__doc__": kind.__doc__})
    if not any(rule.sizes for rule in rules):
        return dataclasses.replace(group, scheduler=made)
    sized = {key: other.scheduler_settings[key] for key in ("max_num_batched_tokens", "max_num_seqs")}
    return dataclasses.replace(
        group,
        scheduler=made,
        scheduler_settings={**group.scheduler_settings, **sized},
        blocks=other.blocks,  # what is left beside the memory that steps of that size take
        block_size=other.block_size,
        kv_source=other.kv_source,
    )


def with_settings(setup: Setup, changed: Mapping[str, Any], page: int | None = None) -> Setup | None:
    """``setup`` with these settings of its policies, and with the same memory in blocks of ``page`` tokens.

    None where the engine would not start so.
    """
    groups = []
    for group in setup.groups:
        size = page or group.block_size
        settings = {**group.scheduler_settings, **changed}
        made = dataclasses.replace(
            group, scheduler_settings=settings, block_size=size, blocks=group.blocks * group.block_size // size
        )
        if made.blocks < 1 or _misfits(made):
            return None
        groups.append(made)
    return dataclasses.replace(copy.copy(setup), groups=groups)


def _misfits(group: ReplicaGroup) -> bool:
    """Whether SGLang would refuse a chunk that is no whole number of pages."""
    chunk, page = (group.scheduler_settings.get(key) for key in ("chunked_prefill_size", "page_size"))
    return bool(chunk and page and chunk > 0 and chunk % page)
