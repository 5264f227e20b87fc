"""From a scenario file to runs ready to simulate: every name looked up, every setting checked.

`load` reads a file, applies ``--set`` and returns the `Setup` of every variant of every case, or raises one
`BadInput` with all that is wrong, line by line.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backend import specs
from backend.roofline import Efficiency
from policies.base import Scheduler
from sim import plugins
from sim.document import Document, problems_from, read
from sim.problems import BadInput, Problem, did_you_mean
from sim.rules import Path as KeyPath
from sim.scenario import Case, Kv, Scenario, Slo, Variant
from sim.setup import Setup, Study
from sim.trace import Trace

_NAMING = ("model", "gpu", "policy", "router", "backend")  # keys whose value is a name, perhaps with settings
BACKENDS = {"roofline": Efficiency}  # name → the class whose fields are its settings


def load(
    path: Path,
    assignments: Sequence[str] = (),
    policies: Sequence[str] = (),
    backend: str | None = None,
    trust: bool = False,
) -> Study:
    """The study in the scenario file ``path``.

    ``policies`` (names or files; these may run code) take the place of the file's own comparison. With ``trust`` a
    policy file named inside the YAML may run its code too. Raises `BadInput` with all mistakes at once.
    """
    if twice := sorted({p for p in policies if policies.count(p) > 1}):
        raise BadInput(Problem("is given twice", file="--policy", value=twice[0]))
    document = read(path)
    resolved = copy.deepcopy(document)
    resolved.set(assignments)
    setups: list[Setup] = []
    scenario: Scenario | None = None
    problems: list[Problem] = []
    for case, changed in _cases(document, assignments, problems):
        if policies:
            changed.data["compare"] = []
        if backend is not None:
            changed.put("backend", backend, f"--backend {backend}")
        resolver = _Resolver(changed, path.parent, policies, trust)
        try:
            scenario = changed.check(Scenario)
            if policies:
                scenario = scenario.model_copy(update={"waterfall": [], "baseline": []})
            setups += resolver.setups(scenario, case)
        except BadInput as error:
            problems += error.problems
            if scenario is None:
                problems += resolver.names()
    if scenario is not None:
        problems += _wrong_names(document, scenario)
    if problems or scenario is None:
        once = {str(p): p for p in problems}.values()
        raise BadInput(sorted(once, key=lambda p: (p.file != document.path, p.file, p.line or 0)))
    return Study(
        name=scenario.name or path.stem,
        question=scenario.question or "",
        setups=setups,
        baseline=scenario.baseline,
        waterfall=scenario.waterfall,
        tables=list(scenario.tables),
        resolved=resolved.data,
    )


def _cases(document: Document, assignments: Sequence[str], problems: list[Problem]) -> list[tuple[str, Document]]:
    """The document once for every case, ``--set`` applied last: the command line has the final word.

    What is wrong with the cases themselves is added to ``problems``.
    """
    cases = document.data.get("cases")
    if not isinstance(cases, list) or not cases:
        changed = copy.deepcopy(document)
        changed.set(assignments)
        return [("", changed)]
    found: list[tuple[str, Document]] = []
    for i in range(len(cases)):
        changed = copy.deepcopy(document)
        try:
            case = document.check(Case, at=("cases", i))
            for key, value in case.set.items():
                line = document.problem(("cases", i, "set", key), "").line
                changed.set([f"{key}={json.dumps(value)}"], f"{document.path}:{line}: cases.{i}.set")
        except BadInput as error:
            problems += error.problems
            continue
        if case.name in [name for name, _ in found]:
            problems.append(document.problem(("cases", i, "name"), "two cases have this name", case.name))
        changed.set(assignments)
        found.append((case.name, changed))
    return found or [("", copy.deepcopy(document))]


def _wrong_names(document: Document, scenario: Scenario) -> list[Problem]:
    """Variants that share a name, and mentions of variants that there are not."""
    names = [variant.name for variant in scenario.compare]
    problems = []
    for i, name in enumerate(names):
        if name in names[:i]:
            problems.append(document.problem(("compare", i, "name"), "two variants have this name", name))
    wanted: list[tuple[KeyPath, str]] = [(("baseline", i), name) for i, name in enumerate(scenario.baseline)]
    wanted += [(("waterfall", i, "variant"), rung.variant) for i, rung in enumerate(scenario.waterfall)]
    for at, name in wanted:
        if name not in names:
            problems.append(document.problem(at, f"no such variant{did_you_mean(name, names)}", name))
    return problems


class _Resolver:
    """Looks the names of one document up, collecting what is wrong."""

    def __init__(self, document: Document, folder: Path, policies: Sequence[str], trust: bool) -> None:
        self._document = document
        self._folder = folder
        self._policies = policies
        self._trust = trust
        self._problems: list[Problem] = []

    def setups(self, scenario: Scenario, case: str) -> list[Setup]:
        """One a variant; raises `BadInput`."""
        trace = self._try((), lambda: self._trace(scenario))
        found: list[Setup | None] = []
        if self._policies:
            for name in self._policies:
                self._document.put("policy", name, f"--policy {name}")
                found.append(self._setup(scenario, case, trace, Variant(name=name, policy=name), None))
            if len(found) == 1 and found[0] is not None:
                found[0].variant = ""
        elif scenario.compare:
            for i, variant in enumerate(scenario.compare):
                found.append(self._setup(scenario, case, trace, variant, ("compare", i)))
        else:
            found.append(self._setup(scenario, case, trace, None, ()))
        if self._problems:
            raise BadInput(self._problems)
        return [setup for setup in found if setup is not None]

    def names(self) -> list[Problem]:
        """What is wrong with the names and settings in a document that is no `Scenario`, as far as one can tell."""
        data = self._document.data
        systems: list[tuple[KeyPath, Any]] = [((), data)]
        if isinstance(variants := data.get("compare"), list):
            systems += [(("compare", i), variant) for i, variant in enumerate(variants)]
        for at, system in systems:
            for key in _NAMING:
                if key == "policy" and self._policies:
                    continue  # the command line names others
                if isinstance(system, dict) and isinstance(choice := system.get(key), str | dict):
                    self._find(key, choice, (*at, key))
        return self._problems

    def _trace(self, scenario: Scenario) -> Trace:
        try:
            return scenario.workload.build(scenario.seed, self._folder)
        except BadInput as error:
            at = ("workload",)
            raise BadInput(
                p if p.file else self._document.problem((*at, *p.path.split(".")) if p.path else at, p.rule, p.value)
                for p in error.problems
            ) from None

    def _setup(
        self,
        scenario: Scenario,
        case: str,
        trace: Trace | None,
        variant: Variant | None,
        at: KeyPath | None,
    ) -> Setup | None:
        """``at`` is where the variant stands in the document; None if the command line made it."""
        before = len(self._problems)

        def pick(key: str, default: Any = None) -> tuple[Any, KeyPath]:
            if variant is not None and (value := getattr(variant, key)) is not None:
                return value, (*(at or ()), key)
            value = getattr(scenario, key)
            return (default if value is None else value), (key,)

        def need(key: str) -> tuple[Any, KeyPath]:
            value, where = pick(key)
            if value is None:
                self._problems.append(self._document.problem(where, "is required"))
            return value, where

        model = self._find("model", *need("model"))
        gpu = self._find("gpu", *need("gpu"))
        policy = self._find("policy", *need("policy"), from_file=at is not None)
        router = self._find("router", *pick("router", "round_robin"))
        backend = self._find("backend", *pick("backend", "roofline"))
        if trace is None or len(self._problems) > before or not (model and gpu and policy and router and backend):
            return None
        (scheduler, settings), policy_at = policy, pick("policy")[1]
        tensor_parallel, tp_at = pick("tensor_parallel", 1)
        max_model_len, _ = pick("max_model_len", model.max_model_len)
        sample = self._try(policy_at, lambda: scheduler(**settings))
        kv, kv_at = pick("kv")
        fit = None
        if sample is not None and self._try(tp_at, lambda: model.kv_bytes_per_token_on(tensor_parallel)):
            fit_at = pick("gpu")[1] if kv is None else kv_at
            fit = self._try(fit_at, lambda: _pool(kv or Kv(), sample, model, gpu, tensor_parallel))
        if sample is not None and (misfit := sample.misfit(max_model_len)):
            self._problems.append(self._document.problem(policy_at, misfit))
        if len(self._problems) > before or fit is None:
            return None
        return Setup(
            variant=variant.name if variant else "",
            case=case,
            trace=trace,
            model=model,
            gpu=gpu,
            tensor_parallel=tensor_parallel,
            max_model_len=max_model_len,
            replicas=pick("replicas", 1)[0],
            scheduler=scheduler,
            scheduler_settings=settings,
            router=router[0],
            router_settings=router[1],
            efficiency=backend[0](**backend[1]),
            blocks=fit[0],
            block_size=fit[1],
            kv_source=fit[2],
            slo=pick("slo", Slo())[0],
            seed=scenario.seed,
            note=(variant.note if variant else None) or "",
            published=variant.published if variant else None,
        )

    def _find(self, key: str, choice: Any, at: KeyPath, from_file: bool = True) -> Any:
        """What ``choice``, the value of ``key``, names; as `_look_up`."""
        if key == "model":
            return self._look_up(choice, at, self._model)
        if key == "gpu":
            return self._look_up(choice, at, _gpu)
        if key == "router":
            return self._look_up(choice, at, plugins.router, True)
        if key == "backend":
            return self._look_up(choice, at, _backend, True)
        folder = self._folder if from_file else Path()
        trust = self._trust or not from_file
        return self._look_up(choice, at, lambda name: plugins.scheduler(name, trust, folder), True)

    def _look_up(self, choice: Any, at: KeyPath, find: Any, with_settings: bool = False) -> Any:
        """What ``choice`` names; with settings: a class and its checked settings. None if it is wrong."""
        if choice is None:
            return None
        if isinstance(choice, str):
            found = self._try(at, lambda: find(choice))
            return (found, self._settings(found, {}, at)) if with_settings and found else found
        if not with_settings:
            return self._try(at, lambda: find(choice))
        rest = dict(choice)
        name = rest.pop("name", None)
        if not isinstance(name, str):
            self._problems.append(self._document.problem((*at, "name"), "is required, a name"))
            return None
        found = self._try((*at, "name"), lambda: find(name))
        if found is None:
            return None
        settings = self._settings(found, rest, at)
        return None if settings is None else (found, settings)

    def _refused(self, kind: type[Any], given: dict[str, Any], at: KeyPath) -> dict[str, Any]:
        """``given`` without the settings that ``kind`` knows but does not model; those are noted as mistakes."""
        refused: dict[str, str] = getattr(kind, "not_modelled", {})
        for key in sorted(given.keys() & refused.keys()):
            self._problems.append(self._document.problem((*at, key), f"not modelled: {refused[key]}", given[key]))
        return {key: value for key, value in given.items() if key not in refused}

    def _settings(self, kind: type[Any], given: dict[str, Any], at: KeyPath) -> dict[str, Any] | None:
        model = plugins.settings(kind)  # type: ignore[arg-type]  # a class is hashable
        given = self._refused(kind, given, at)
        checked = self._try(at, lambda: self._document.check(model, given, at))
        return None if checked is None else checked.model_dump()

    def _model(self, choice: str | dict[str, Any]) -> specs.Model:
        if isinstance(choice, dict):
            return specs.Model(**plugins.settings(specs.Model)(**choice).model_dump())
        if not choice.endswith(".json"):
            return specs.model(choice)
        config = read(self._folder / choice).data
        return specs.Model.from_hf_config(config, Path(choice).parent.name or choice)

    def _try(self, at: KeyPath, what: Any) -> Any:
        """The result of ``what()``; None, with the problem noted at ``at``, where it raises."""
        try:
            return what()
        except ValidationError as error:
            kind = specs.Model if "model" in at else specs.GPU
            self._problems += problems_from(error, self._document, plugins.settings(kind), at=at)
        except BadInput as error:
            self._problems += [
                p if p.file else self._document.problem((*at, *filter(None, p.path.split("."))), p.rule, p.value)
                for p in error.problems
            ]
        except (LookupError, ValueError, TypeError) as error:
            self._problems.append(self._document.problem(at, str(error.args[0] if error.args else error)))
        return None


def _gpu(choice: str | dict[str, Any]) -> specs.GPU:
    if isinstance(choice, dict):
        return specs.GPU(**plugins.settings(specs.GPU)(**choice).model_dump())
    return specs.gpu(choice)


def _backend(name: str) -> type[Any]:
    if name not in BACKENDS:
        raise BadInput(Problem(f"no such backend{did_you_mean(name, list(BACKENDS))}", value=name))
    return BACKENDS[name]


def _pool(kv: Kv, policy: Scheduler, model: specs.Model, gpu: specs.GPU, tensor_parallel: int) -> tuple[int, int, str]:
    """Usable blocks, tokens a block, and where the number comes from."""
    block_size = getattr(policy, "block_size", None) or kv.block_size
    own = getattr(policy, "num_gpu_blocks", None)
    if kv.blocks is not None and kv.tokens is not None:
        raise ValueError("give blocks or tokens, not both")
    if own is not None:
        blocks, source = own - 1, f"policy.num_gpu_blocks {own}, one of them vLLM's null block"
        if blocks < 1:
            raise ValueError(f"num_gpu_blocks must be at least 2: one is vLLM's null block (got {own})")
    elif kv.blocks is not None:
        blocks, source = kv.blocks, "given"
    elif kv.tokens is not None:
        blocks, source = kv.tokens // block_size, "given"
        if blocks < 1:
            raise ValueError(f"tokens must hold at least one block of {block_size} (got {kv.tokens})")
    else:
        fit = specs.kv_blocks(model, gpu, tensor_parallel, block_size, kv.memory_utilization, kv.reserve_gib)
        blocks, source = fit.blocks, fit.explain()
    if policy.block_tokens is not None:  # the policy's own granularity over the same memory
        if own is None and kv.tokens is not None:
            return kv.tokens // policy.block_tokens, policy.block_tokens, source
        return blocks * block_size // policy.block_tokens, policy.block_tokens, source
    return blocks, block_size, source
