"""Sweep files: a base scenario, the keys that vary, and seeds. `read_sweep` makes the runs of one."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, model_validator

from chairlift.backend.machine import check_memory
from chairlift.sim.bad_input import BadInput, Problem, did_you_mean
from chairlift.sim.scenario import load
from chairlift.sim.scenario.loops import may_differ
from chairlift.sim.scenario.policy_files import Trust, file_and_class
from chairlift.sim.scenario.schema import Case, FolderName, results_name
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.sweep.axes import MOST_RUNS, Grid, Scalar, Value, same_as
from chairlift.sim.sweep.runs import Run

BYTES_A_RUN = 3000  # beside its scenario; measured: 3,300 with a scenario of 250
SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"


def shipped_file(name: str, folder: Path, what: str) -> Path:
    """The file that ``name`` means: a path, or the ``what`` of that name shipped in ``folder``. Raises `BadInput`."""
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return path
    shipped = folder / f"{name}.yaml"
    if not shipped.is_file():
        known = [p.stem for p in folder.glob("*.yaml")]
        raise BadInput(Problem(f"no such file, and no {what} of that name{did_you_mean(name, known)}", value=name))
    return shipped


Seed = Annotated[int, Field(ge=0)]

_SAID = (
    "name",
    "question",
    "compare",
    "cases",
    "baseline",
    "waterfall",
    "tables",
    "provenance",
)  # of a scenario, not of a run
_VARIANT = ("name", "note", "published")


class Based(Grid):
    """Axes over a base scenario: what sweeps and plans have in common."""

    name: FolderName | None = Field(default=None, description="Results go to runs/<name>. Default: the file's name.")
    question: str | None = Field(default=None, description="What this answers.")
    base: str | dict[str, Any] = Field(
        description="A scenario file (a relative path starts at this file's folder), the name of a shipped one, or "
        "the scenario itself. What it compares becomes an axis: variant, case."
    )
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted key → value, for all runs, as with --set.")


class SweepFile(Based):
    """What a sweep YAML may say."""

    seeds: Annotated[int, Field(ge=1, le=10**5)] | Annotated[list[Seed], Field(min_length=1)] = Field(
        default=1,
        description="Replications: how many seeds, from the scenario's own on, or a list. All points share them.",
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> SweepFile:
        if isinstance(self.seeds, list) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice in seeds: a replication must draw anew")
        return self


@dataclass
class Plan:
    """The runs of a sweep and what they are called."""

    name: str
    question: str
    axes: list[str]  # columns that tell points apart, in order
    seeds: list[int]
    points: list[dict[str, Scalar]]  # labels of each point, by axis
    runs: list[list[Run]]  # a list a point, a run a seed
    data: dict[str, Any]  # the file's content


def read_sweep(path: Path, assignments: Sequence[str] = (), policies: Sequence[str] = (), trust: bool = False) -> Plan:
    """The sweep in the file ``path``.

    ``assignments`` (``KEY=VALUE``) change keys of the base scenario, for all runs. ``policies``, names or files, are
    added to the axis ``policy``; the code of those files may run, and with ``trust`` that of files that the YAML names.

    Raises `BadInput`: every value of every axis is tried once against the scenario's rules.
    """
    document = read(path)
    of_another_kind(document, "sweep")
    spec = document.check(SweepFile)
    base, folder = base_of(document, spec, path)
    for key, value in spec.set.items():
        base.assign(key, value, origin_of(document, ("set", key)))
    base.set(assignments)
    seeds = _seeds(document, spec, base)
    if isinstance(spec.seeds, list) and (
        overruled := [at for key, at in _given(document, spec, assignments) if key == "seed"]
    ):
        rule = "has no effect: seeds lists those of all runs"
        raise BadInput([at._replace(rule=rule) for at in overruled])
    added = [Value(str(Path(p).resolve()) if ".py" in p else p, p, f"--policy {p}") for p in policies]
    named = frozenset(Path(file[0]).resolve() for p in policies if (file := file_and_class(p)) is not None)
    allowed = True if trust else named
    known = {*map(same_as, _values_of(spec, "policy", base))}
    for value in added:
        if (text := same_as(value.value)) in known:
            raise BadInput(Problem("stands in the axis policy already", file=value.origin))
        known.add(text)
    own = spec.points()
    if problems := hidden_by_axes(document, spec, assignments, [key for point in own for key in point]):
        raise BadInput(problems)
    points = _with_policies(own, base, added)
    once = _with_policies(spec.each_alone(), base, added)
    keys = list(dict.fromkeys(key for point in points for key in point))
    for key in keys:
        variants = base.data.get("compare")
        hidden = (
            [isinstance(v, dict) and v.get(key) is not None for v in variants] if isinstance(variants, list) else []
        )
        if hidden and all(hidden):
            rule = f"each variant that the base compares says its own {key}; leave them out with set: {{compare: []}}"
            raise BadInput(document.problem(("axes", key), rule))
    total = len(points) * len(seeds) * max(1, len(_named(base, "cases"))) * max(1, len(_named(base, "compare")))
    if total > MOST_RUNS:
        rule = f"at most {MOST_RUNS:,} runs: its points, seeds, variants and cases make {total:,}"
        raise BadInput(Problem(rule, file=document.path))
    check_memory(total * (BYTES_A_RUN + len(pickle.dumps(base.data))), f"{total:,} runs")
    plan = Plan(results_name(spec.name, path), spec.question or "", keys, seeds, [], [], document.data)
    documents: list[Document] = []  # of each point, with the first seed
    for labels, system in _systems(
        base, [(key, spec.set[key], origin_of(document, ("set", key))) for key in spec.set], assignments
    ):
        plan.axes = [*labels, *keys]
        for point in once:
            try:
                load.check(scenario_at(system, point, seeds[0], document), folder, allowed)
            except BadInput as error:
                problems += error.problems
        for point in points:
            names: dict[str, Scalar] = {**labels, **{key: value.label for key, value in point.items()}}
            plan.points.append(names)
            at_seeds = [scenario_at(system, point, seed, document) for seed in seeds]
            documents.append(at_seeds[0])
            plan.runs.append([Run(d, folder, names, s, allowed) for s, d in zip(seeds, at_seeds, strict=True)])
    if problems:
        raise BadInput({str(p): p for p in problems}.values())
    if _loops_differ(documents, folder, allowed):
        plan.runs = [[replace(run, synchronous=True) for run in runs] for runs in plan.runs]
    return plan


def of_another_kind(document: Document, kind: str) -> None:
    """Raise `BadInput` where a file that is to be a "sweep" or a "plan" is a scenario, or a plan."""
    if "base" not in document.data and "workload" in document.data:
        rule = f"is a key of scenarios: run this file with chairlift run, or name it as the base of a {kind}"
        raise BadInput(document.problem(("workload",), rule))
    if kind == "sweep" and "base" in document.data and "slo" in document.data:
        raise BadInput(document.problem(("slo",), "is a key of plans: run this file with chairlift plan"))
    if kind == "plan" and "seeds" in document.data:
        raise BadInput(document.problem(("seeds",), "is a key of sweeps: run this file with chairlift sweep"))


def _given(document: Document, spec: Based, assignments: Sequence[str]) -> list[tuple[str, Problem]]:
    """The keys that ``set:`` and ``--set`` change, each with its place: a problem without a rule yet."""
    of_file = [(key, document.problem(("set", key), "")) for key in spec.set]
    return of_file + [(text.partition("=")[0].strip(), Problem("", f"--set {text}")) for text in assignments]


def hidden_by_axes(document: Document, spec: Based, assignments: Sequence[str], axes: Iterable[str]) -> list[Problem]:
    """What ``set:`` and ``--set`` say of keys whose every value an axis of ``axes`` says: it has no effect."""
    found = []
    for key, problem in _given(document, spec, assignments):
        axis = next((axis for axis in dict.fromkeys(axes) if f"{key}.".startswith(f"{axis}.")), None)
        if axis is not None:
            found.append(
                problem._replace(rule=f"has no effect: {axis} is an axis, and its values take this one's place")
            )
    return found


def _loops_differ(documents: list[Document], folder: Path, trust: Trust) -> bool:
    """Whether policies that plan a step ahead are compared with policies that do not."""
    distinct = {json.dumps([d.data.get("policy"), d.data.get("replicas")], sort_keys=True): d for d in documents}
    return may_differ([policy for d in distinct.values() for policy in load.policies_of(d, folder, trust)])


def base_of(document: Document, spec: Based, path: Path) -> tuple[Document, Path]:
    """The base scenario, and the folder that its relative paths start from."""
    if isinstance(spec.base, dict):
        lines = {at[1:]: line for at, line in document.lines.items() if at[0:1] == ("base",)}
        return Document(copy.deepcopy(spec.base), lines, document.path), path.parent.resolve()
    file = path.parent / spec.base
    if not file.is_file():
        shipped = SCENARIOS / f"{spec.base}.yaml"
        if shipped.is_file():
            file = shipped
        elif not file.exists():  # else reading it says what it is
            known = [p.stem for p in SCENARIOS.glob("*.yaml")]
            rule = f"no such file, and no scenario of that name{did_you_mean(spec.base, known)}"
            raise BadInput(document.problem(("base",), rule, spec.base))
    base = read(file)
    load.of_another_kind(base)
    return base, file.parent.resolve()


def _seeds(document: Document, spec: SweepFile, base: Document) -> list[int]:
    if isinstance(spec.seeds, list):
        return spec.seeds
    first = base.data.get("seed", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise BadInput(base.problem(("seed",), "must be a whole number of at least 0", first))
    return [first + i for i in range(spec.seeds)]


def _with_policies(points: list[dict[str, Value]], base: Document, added: list[Value]) -> list[dict[str, Value]]:
    """``points``, and once more with each of ``added`` as their policy."""
    if not added:
        return points
    apart = [{key: value for key, value in point.items() if key != "policy"} for point in points]
    known = points
    if not any("policy" in point for point in points):
        own = base.data.get("policy")
        mine = Value(own, origin=origin_of(base, ("policy",)))
        known = [] if own is None else [point | {"policy": mine} for point in points]
    rest = list({tuple((k, json.dumps(v.value)) for k, v in point.items()): point for point in apart}.values())
    return [*known, *({**point, "policy": value} for value in added for point in rest)]


def _values_of(spec: Based, key: str, base: Document) -> list[object]:
    """What ``key`` is over all points: the values of its axis, or else the base's own."""
    found = [point[key].value for point in spec.each_alone() if key in point]
    return found or [base.data.get(key)]


def _systems(
    base: Document, set_: Sequence[tuple[str, Any, str]], assignments: Sequence[str]
) -> Iterator[tuple[dict[str, Scalar], Document]]:
    """Labels and scenario of every variant of every case of the base; just the base if it compares nothing."""
    cases, variants = _named(base, "cases"), _named(base, "compare")
    for i, case in cases or [(0, "")]:
        changed = base.copy()
        if case:
            for key, value in base.check(Case, at=("cases", i)).set.items():
                changed.assign(key, value, origin_of(base, ("cases", i, "set", key)))
            for key, value, origin in set_:  # what the sweep says has the last word
                changed.assign(key, value, origin)
            changed.set(assignments)
        for j, variant in variants or [(0, "")]:
            one = changed.copy()
            for key, value in (changed.data["compare"][j] if variant else {}).items():
                if key not in _VARIANT and value is not None:
                    one.data[key] = value
                    one.lines = _folded(one.lines, j, key)
                    one.overrides = _folded(one.overrides, j, key)
            for key in _SAID:
                one.data.pop(key, None)
            yield {**({"case": case} if case else {}), **({"variant": variant} if variant else {})}, one


T = TypeVar("T")


def _folded(known: dict[tuple[str | int, ...], T], variant: int, key: str) -> dict[tuple[str | int, ...], T]:
    """What is known of places in the document, where a variant's ``key`` now stands at the top."""
    kept = {at: said for at, said in known.items() if at[:1] != (key,)}
    return kept | {at[2:]: said for at, said in known.items() if at[:3] == ("compare", variant, key)}


def scenario_at(system: Document, point: dict[str, Value], seed: int, document: Document) -> Document:
    """The scenario of one run: ``system`` with the keys of ``point`` changed, shorter keys first."""
    one = system.copy()
    for key in sorted(point, key=lambda key: key.count(".")):
        one.assign(key, point[key].value, point[key].origin or _place(document, key))
    one.data["seed"] = seed
    return one


def _place(document: Document, key: str) -> str:
    """Where the axis ``key`` stands in the sweep, for messages."""
    known = document.data
    if key in (known.get("axes") or {}):
        return origin_of(document, ("axes", key))
    for i, group in enumerate(known.get("zip") or []):
        if key in group:
            return origin_of(document, ("zip", i, key))
    if known.get("random") and key in known["random"]["keys"]:
        return origin_of(document, ("random", "keys", key))
    raise AssertionError(f"{key} is no axis")


def _named(base: Document, key: str) -> list[tuple[int, str]]:
    items = base.data.get(key) or []
    if not isinstance(items, list):
        raise BadInput(base.problem((key,), "must be a list", items))
    found: list[tuple[int, str]] = []
    for i, item in enumerate(items):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or not name:
            raise BadInput(base.problem((key, i, "name"), "is required, a name"))
        if name in [known for _, known in found]:
            raise BadInput(base.problem((key, i, "name"), "stands twice", name))
        found.append((i, name))
    return found


def origin_of(document: Document, at: tuple[str | int, ...]) -> str:
    """``file:line: path``, for messages about what came from there."""
    line = document.problem(at, "").line
    return f"{document.path}:{line}: {'.'.join(map(str, at))}"
