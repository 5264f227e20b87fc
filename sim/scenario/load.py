"""From a scenario file to runs that are ready to simulate: every name is looked up, every setting is checked.

`load` reads a file, applies ``--set`` and returns the `Setup` of every variant of every case, or raises one
`BadInput` with all that is wrong, line by line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from chairlift.backend.calibrated.profile import Drafts
from chairlift.backend.draft_shapes import in_memory
from chairlift.backend.drafting import WithDrafts
from chairlift.backend.machine import check_memory
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import Model
from chairlift.policies.base import Deployment, Scheduler
from chairlift.policies.vllm_versions import NEWEST
from chairlift.sim.bad_input import MOST_TOLD, BadInput, Problem, did_you_mean
from chairlift.sim.results import catalogue
from chairlift.sim.scenario.loops import is_said, same_loop
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.policy_files import Trust
from chairlift.sim.scenario.resolve import Lookup, find_draft, kv_pool, with_lengths
from chairlift.sim.scenario.resolved import named_systems, resolved
from chairlift.sim.scenario.schema import Case, Group, Scenario, System, Variant, results_name
from chairlift.sim.scenario.yaml_document import NAMING, Document, read
from chairlift.sim.study import Autoscale, Kv, Limits, ReplicaGroup, Setup, Slo, Speculate, Study
from chairlift.sim.workload.trace import Trace
from chairlift.sim.workload.workload import build

MOST_REQUESTS = 10**8
LEAST_MTBF_S = 1.0  # mean seconds between two failures of a replica
LEAST_LOOK_S = 1e-3  # between two looks of an autoscaler
_BYTES = 8 * 10  # of a request's records: ten columns of numbers of 8 bytes, `RequestRecords`
Pick = Callable[..., tuple[Any, KeyPath]]


def load(
    path: Path | str,
    assignments: Sequence[str] = (),
    policies: Sequence[str] = (),
    backend: str | None = None,
    trust: Trust = False,
    routers: Sequence[str] = (),
) -> Study:
    """The study in the scenario file ``path``: a `Setup` for each variant of each case.

    ``assignments`` change keys, as ``--set`` does.
    ``policies`` and ``routers`` (names or files; these may run code) take the place of the file's own comparison:
    each policy with each router. With ``trust`` a policy's or router's file named inside the YAML may run its code too.
    Raises `BadInput` with all mistakes at once.

    >>> from chairlift import load
    >>> study = load("my.yaml", assignments=["workload.requests=300", "slo.ttft_ms=300"])
    >>> [(setup.variant, len(setup.trace), setup.slo.ttft_ms) for setup in study.setups]
    [('vllm', 300, 300.0), ('orca', 300, 300.0)]
    >>> [setup.variant for setup in load("my.yaml", policies=["vllm", "sarathi"]).setups]
    ['vllm', 'sarathi']
    """
    path = Path(path)
    for option, names in (("--policy", policies), ("--router", routers)):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadInput(Problem("is given twice", file=option, value=twice[0]))
    return study_of(read(path), path, assignments, policies, backend, trust, routers)


def of_another_kind(document: Document) -> None:
    """Raise `BadInput` where a file that is to be a scenario is a sweep or a plan."""
    if "base" in document.data and "workload" not in document.data:
        verb = "plan" if "slo" in document.data else "sweep"
        rule = f"is a key of sweeps and plans, not of scenarios: run this file with chairlift {verb}"
        raise BadInput(document.problem(("base",), rule))


def study_of(
    document: Document,
    path: Path,
    assignments: Sequence[str] = (),
    policies: Sequence[str] = (),
    backend: str | None = None,
    trust: Trust = False,
    routers: Sequence[str] = (),
) -> Study:
    """The study in ``document``, which was read from ``path``: its files lie beside that. All else as for `load`."""
    of_cases = [text for text in assignments if is_of_cases(text)]
    of_another_kind(document)
    document.set(of_cases)
    assignments = [text for text in assignments if text not in of_cases]
    setups: list[Setup] = []
    scenario: Scenario | None = None
    options = {"policy": policies, "router": routers, "backend": [] if backend is None else [backend]}
    problems = list(_beside_options(assignments, options))
    named = {key: names[0] for key, names in options.items() if len(names) == 1}
    for case, changed in _cases(document, assignments, named, problems):
        if policies or routers:
            changed.data["compare"] = []
        resolver = _Resolver(changed, path.parent, trust, policies, routers)
        try:
            scenario = changed.check(Scenario)
            if policies or routers:
                scenario = scenario.model_copy(update={"waterfall": [], "baseline": [], "claims": []})
            setups += resolver.setups(scenario, case)
        except BadInput as error:
            problems += error.problems
            if scenario is None:
                problems += resolver.names()
    if scenario is not None:
        problems += _wrong_names(document, scenario)
    if problems or scenario is None:
        once = {p[:4]: p for p in problems}.values()
        raise BadInput(sorted(once, key=lambda p: (p.file != document.path, p.file, p.line or 0)))
    same_loop(setups)
    return Study(
        name=results_name(scenario.name, path),
        question=scenario.question or "",
        setups=setups,
        baseline=scenario.baseline,
        waterfall=scenario.waterfall,
        claims=scenario.claims,
        tables=list(scenario.tables),
        resolved=resolved(document, path, assignments, policies, routers, backend),
    )


def is_of_cases(assignment: str) -> bool:
    """Whether a ``--set`` option changes the cases themselves, and not what each of them is of."""
    return assignment.partition("=")[0].strip().partition(".")[0] == "cases"


def policies_of(document: Document, folder: Path, trust: Trust = False) -> list[tuple[type[Scheduler], dict[str, Any]]]:
    """Policies that a document without ``cases`` and ``compare`` names, with their settings; wrong ones left out."""
    groups = document.data.get("replicas")
    own = [group.get("policy") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else [None]
    lookup = _Resolver(document, folder, trust)
    choices = [choice if choice is not None else document.data.get("policy") for choice in own]
    found = [lookup._find("policy", choice, ("policy",)) for choice in choices if isinstance(choice, str | dict)]
    return [policy for policy in found if policy is not None]


def prepare(document: Document, folder: Path, trust: Trust = False) -> Setup:
    """The one run of a document without ``cases`` and ``compare``; ``folder`` is where its relative paths start.

    Raises `BadInput` with all mistakes at once.
    """
    [setup] = _Resolver(document, folder, trust).setups(document.check(Scenario), "")
    return setup


def check(document: Document, folder: Path, trust: Trust = False) -> None:
    """Check keys, types, names and settings, without looking whether model and GPU fit or reading a trace.

    Raises `BadInput` with all mistakes at once.
    """
    problems: list[Problem] = []
    try:
        document.check(Scenario)
    except BadInput as error:
        problems += error.problems
    else:
        problems += _lacking(document)
    problems += _Resolver(document, folder, trust).names()
    if problems:
        raise BadInput({str(p): p for p in problems}.values())


def _lacking(document: Document) -> Iterator[Problem]:
    """What a document without ``compare`` must say and does not: a key that each of its groups of replicas lacks."""
    groups = document.data.get("replicas")
    parts = groups if isinstance(groups, list) and groups else [{}]
    for key in () if document.data.get("compare") else ("model", "gpu", "policy"):
        if document.data.get(key) is None and any(not isinstance(g, dict) or g.get(key) is None for g in parts):
            yield document.problem((key,), "is required")


def _beside_options(assignments: Sequence[str], options: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """``--set`` of what an option such as ``--policy`` names, where that would have no effect, or an unclear one."""
    for text in assignments:
        key = text.partition("=")[0].strip()
        root, dot, _ = key.partition(".")
        names = options.get(root, ())
        rule = ""
        if root == "compare" and (options["policy"] or options["router"]):
            rule = "must not be given beside --policy or --router, which say what is compared"
        elif len(names) == 1 and not dot:
            rule = f"must not be given beside --{root}: each says the {root}"
        elif len(names) > 1:
            rule = f"must not be given beside several --{root}: say each one's settings in compare"
        if rule:
            yield Problem(rule, file=f"--set {text}")


def _without_effect(document: Document, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those of ``keys``, dotted, that every variant of ``compare`` says for itself; and what to say of each."""
    variants = document.data.get("compare")
    if not isinstance(variants, list) or not variants or not all(isinstance(each, dict) for each in variants):
        return
    for key in keys:
        root = key.partition(".")[0]
        if root in System.model_fields and all(each.get(root) is not None for each in variants):
            yield key, f"has no effect: every variant of compare says its own {root}; set compare.0.{key}, or others"


def _cases(
    document: Document, assignments: Sequence[str], named: Mapping[str, str], problems: list[Problem]
) -> list[tuple[str, Document]]:
    """Each case by its name, with the document as it is in that case; one case without a name if there are none.

    A case's ``set`` comes first, then what ``--policy`` and other options have ``named``, and ``--set`` last, so that
    it can change a setting of that policy: the command line has the final word.

    What is wrong with the cases themselves, or has no effect, is added to ``problems``.
    """

    def apply(changed: Document) -> None:
        for option, name in named.items():
            changed.put(option, name, f"--{option} {name}")
        changed.set(assignments)
        if named.keys() & {"policy", "router"}:
            return  # nothing that the file compares is left
        keys = {text.partition("=")[0].strip(): text for text in assignments}
        problems.extend(Problem(rule, file=f"--set {keys[key]}") for key, rule in _without_effect(changed, keys))

    cases = document.data.get("cases")
    if not isinstance(cases, list) or not cases:
        changed = document.copy()
        apply(changed)
        return [("", changed)]
    whole = document.copy(without="cases")
    found: list[tuple[str, Document]] = []
    names: set[str] = set()
    for i in range(len(cases)):
        changed = whole.copy()
        try:
            case = document.check(Case, at=("cases", i))
            for key, value in case.set.items():
                line = document.problem(("cases", i, "set", key), "").line
                changed.set([f"{key}={json.dumps(value)}"], f"{document.path}:{line}: cases.{i}.set")
            for key, rule in _without_effect(changed, case.set):
                problems.append(document.problem(("cases", i, "set", key), rule))
        except BadInput as error:
            problems += error.problems
            continue
        if case.name in names:
            problems.append(document.problem(("cases", i, "name"), "two cases have this name", case.name))
        apply(changed)
        found.append((case.name, changed))
        names.add(case.name)
    return found or [("", document.copy())]


def _wrong_names(document: Document, scenario: Scenario) -> list[Problem]:
    """Two variants of one name, and names of variants that do not exist."""
    names = [variant.name for variant in scenario.compare]
    problems = []
    known: set[str] = set()
    for i, name in enumerate(names):
        if name in known:
            problems.append(document.problem(("compare", i, "name"), "two variants have this name", name))
        known.add(name)
    wanted: list[tuple[KeyPath, str]] = [(("baseline", i), name) for i, name in enumerate(scenario.baseline)]
    wanted += [(("waterfall", i, "variant"), rung.variant) for i, rung in enumerate(scenario.waterfall)]
    for at, name in wanted:
        if name not in known:
            hint = did_you_mean(name, names) if len(problems) < MOST_TOLD else ""
            problems.append(document.problem(at, f"no such variant{hint}", name))
    return problems + _wrong_claims(document, scenario)


def _wrong_claims(document: Document, scenario: Scenario) -> list[Problem]:
    """Claims about variants, cases or metrics that there are not."""
    variants = [variant.name for variant in scenario.compare]
    cases = [str(case.get("name")) for case in document.data.get("cases") or [] if isinstance(case, dict)]
    metrics = list(catalogue.FIELDS)
    problems = []
    for i, claim in enumerate(scenario.claims):
        looked_up: list[tuple[str, str | None, list[str], str]] = [
            ("of", claim.of, variants, "variant"),
            ("over", claim.over, variants, "variant"),
            ("case", claim.case, cases, "case"),
            ("metric", claim.metric, metrics, "metric"),
            *(("within", metric, metrics, "metric") for metric in claim.within),
        ]
        for key, name, known, kind in looked_up:
            if name is not None and name not in known:
                rule = f"no such {kind}{did_you_mean(name, known)}"
                problems.append(document.problem(("claims", i, key), rule, name))
    return problems


class _Resolver(Lookup):
    """Makes a document's variants ready to run.

    ``policies`` and ``routers`` are those that the command line names instead of the document's.
    """

    def __init__(
        self,
        document: Document,
        folder: Path,
        trust: Trust,
        policies: Sequence[str] = (),
        routers: Sequence[str] = (),
    ) -> None:
        super().__init__(document, folder, trust)
        self._policies = policies
        self._routers = routers

    def setups(self, scenario: Scenario, case: str) -> list[Setup]:
        """One setup for each variant of ``case``. Raises `BadInput` with all mistakes of all variants."""
        trace = self._try((), lambda: self._trace(scenario))
        found: list[Setup | None] = []
        if self._policies or self._routers:
            systems = named_systems(self._policies, self._routers)
            for chosen in systems:
                for key in chosen.keys() & {"policy", "router"}:
                    self._document.put(key, chosen[key], f"--{key} {chosen[key]}")
                variant = Variant.model_validate(chosen) if len(systems) > 1 else None
                found.append(self._setup(scenario, case, trace, variant, None))
        elif scenario.compare:
            for i, variant in enumerate(scenario.compare):
                found.append(self._setup(scenario, case, trace, variant, ("compare", i)))
        else:
            found.append(self._setup(scenario, case, trace, None, ()))
        if self._problems:
            raise BadInput(self._problems)
        return [setup for setup in found if setup is not None]

    def names(self) -> list[Problem]:
        """The wrong names and settings in a document that is no valid `Scenario`: all that can be told of it."""
        data = self._document.data
        systems: list[tuple[KeyPath, Any]] = [((), data)]
        if isinstance(variants := data.get("compare"), list):
            systems += [(("compare", i), variant) for i, variant in enumerate(variants)]
        for at, system in systems:
            for key in NAMING:
                if (key == "policy" and self._policies) or (key == "router" and self._routers):
                    continue  # the command line names others
                if isinstance(system, dict) and isinstance(choice := system.get(key), str | dict):
                    self._find(key, choice, (*at, key))
        return self._problems

    def _trace(self, scenario: Scenario) -> Trace:
        if (count := scenario.workload.requests or 0) > MOST_REQUESTS:
            gib = count * _BYTES / 2**30
            rule = f"must be at most {MOST_REQUESTS:,}: their records alone would take {gib:,.0f} GiB of memory"
            raise BadInput(self._document.problem(("workload", "requests"), rule, count))
        check_memory(count * _BYTES, f"the records of {count:,} requests")
        try:
            return build(scenario.workload, scenario.seed, self._folder)
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
        """The setup of one variant; None if something is wrong with it, which is then noted.

        ``at`` is where the variant stands in the document. It is None if the command line made the variant.
        """
        before = len(self._problems)

        def pick(key: str, default: Any = None) -> tuple[Any, KeyPath]:
            if variant is not None and (value := getattr(variant, key)) is not None:
                return value, (*(at or ()), key)
            value = getattr(scenario, key)
            return (default if value is None else value), (key,)

        def need(key: str) -> tuple[Any, KeyPath]:
            value, where = pick(key)
            if value is None:
                rule = "is required"
                if key == "policy" and self._routers and not self._policies:
                    rule += ": --router takes the place of compare, so name a policy too, with --policy"
                self._problems.append(self._document.problem(where, rule))
            return value, where

        model = self._find("model", *need("model"))
        router = self._find("router", *pick("router", "round_robin"), from_file=not self._routers)
        replicas, replicas_at = pick("replicas", 1)
        groups: list[ReplicaGroup | None] = []
        longest, longest_at = pick("max_model_len", model.max_model_len if model else 1)
        if model and longest > model.max_model_len:
            rule = f"must be at most the model's own {model.max_model_len} tokens"
            self._problems.append(self._document.problem(longest_at, rule, longest))
        speculate, speculate_at = pick("speculate")
        drafted = None
        if speculate is not None:
            acceptance_at = (*speculate_at, "acceptance", "file")
            speculate = self._try(acceptance_at, lambda: with_lengths(speculate, self._folder))
        if speculate is not None and speculate.tokens and model:
            found = self._try((*speculate_at, "draft"), lambda: (speculate, find_draft(speculate, model, self._folder)))
            drafted = found or None
        for i, group in enumerate(replicas if isinstance(replicas, list) else [Group(count=replicas)]):
            from_file = group.policy is not None or not self._policies
            groups.append(self._group(model, longest, group, (*replicas_at, i), need, pick, from_file, drafted))
        if drafted is not None and model:
            self._add_drafts(drafted, speculate_at, model, groups)
        self._check_roles(replicas, replicas_at, pick)
        self._check_outages(replicas, pick)
        self._check_predictors([group for group in groups if group is not None], pick)
        if trace is None or len(self._problems) > before or not (model and router):
            return None
        return Setup(
            variant=variant.name if variant else "",
            case=case,
            trace=trace,
            model=model,
            max_model_len=longest,
            groups=[group for group in groups if group is not None],
            router=router[0],
            router_settings=router[1],
            router_stale_ps=round(pick("router_stale_ms", 0)[0] * 1e9),
            link=pick("link")[0],
            failures=pick("failures")[0],
            start_up_ps=round(pick("start_up_s", 0)[0] * 1e12),
            autoscale=pick("autoscale")[0],
            speculate=None if drafted is None else drafted[0],
            limits=pick("limits", Limits())[0],
            slo=pick("slo", Slo())[0],
            seed=scenario.seed,
            note=(variant.note if variant else None) or "",
            published=variant.published if variant else None,
        )

    def _group(
        self,
        model: Any,
        longest: int,
        group: Group,
        at: KeyPath,
        need: Pick,
        pick: Pick,
        from_file: bool,
        drafted: tuple[Speculate, Model | None] | None,
    ) -> ReplicaGroup | None:
        """One group of replicas; None if something is wrong with it, which is then noted.

        ``group`` stands at ``at``. Keys that it leaves out come from the variant, or else from the scenario.
        ``drafted``: how the scenario speculates, and what drafts for the model.
        """
        before = len(self._problems)

        def own(key: str, otherwise: tuple[Any, KeyPath]) -> tuple[Any, KeyPath]:
            value = getattr(group, key)
            return otherwise if value is None else (value, (*at, key))

        gpu_choice, gpu_at = (group.gpu, (*at, "gpu")) if group.gpu is not None else need("gpu")
        gpu = self._find("gpu", gpu_choice, gpu_at)
        choice, policy_at = (group.policy, (*at, "policy")) if group.policy is not None else need("policy")
        policy = self._find("policy", choice, policy_at, from_file)
        backend_choice, backend_at = own("backend", pick("backend", "roofline"))
        backend = self._find("backend", backend_choice, backend_at)
        parallel, parallel_at = self._parallel(group, at, pick)
        kv, kv_at = own("kv", pick("kv"))
        if len(self._problems) > before or not (model and gpu and policy and backend):
            return None
        draft = None
        if drafted is not None and drafted[1] is not None:
            draft = in_memory(drafted[1], drafted[0].method, model if parallel.pipeline > 1 else None)
        scheduler, settings = policy
        given = {key: settings[key] for key in choice if key in settings} if isinstance(choice, dict) else {}
        deployment = Deployment(gpu.name, gpu.memory_bytes, longest, ranks=parallel.data)
        settings = settings | (self._try(policy_at, lambda: scheduler.sized(given, deployment)) or {})
        sample = self._try(policy_at, lambda: scheduler(**settings)) if len(self._problems) == before else None
        fit = None
        if sample is not None and self._try(parallel_at, lambda: parallel.check(model)):
            fit_at = gpu_at if kv is None else kv_at
            fit = self._try(fit_at, lambda: kv_pool(kv or Kv(), sample, model, gpu, parallel, longest, draft))
        if getattr(backend[0], "executes", False):
            self._check_executes(group, at, pick)
        elif fit is not None and draft is None:  # else `_add_drafts` tries it, with those
            self._try(backend_at, lambda: backend[0](**backend[1]).build(model, gpu, parallel))
        made: ReplicaGroup | None = None
        if sample is not None and fit is not None and len(self._problems) == before:
            made = ReplicaGroup(
                count=group.count,
                role=group.role,
                gpu=gpu,
                parallel=parallel,
                scheduler=scheduler,
                scheduler_settings=settings,
                backend=backend[0](**backend[1]),
                blocks=fit.blocks,
                block_size=fit.block_size,
                kv_source=fit.source,
                kv_groups=fit.groups,
                host_gib=(kv or Kv()).host_gib,
                host_link=(kv or Kv()).host_link,
                autoscale=group.autoscale,
                loop_is_said=is_said(choice),
            )
            sliding = fit.groups is not None and not fit.groups.chunked
            deployment = replace(deployment, pool_tokens=made.room(longest), block_size=fit.block_size, sliding=sliding)
        for key, rule in () if sample is None else sample.misfits(deployment):
            asked, asked_at = pick("max_model_len")
            if made is not None and key == "max_model_len" and asked is None:
                made.caution = f"the engine itself does not start without a max_model_len: it {rule}"
                continue
            problem = self._document.problem(asked_at if key == "max_model_len" else (*policy_at, key), rule)
            if problem not in self._problems:  # another group may have it too
                self._problems.append(problem)
        return None if len(self._problems) > before else made

    def _add_drafts(
        self,
        drafted: tuple[Speculate, Model | None],
        at: KeyPath,
        model: Model,
        groups: Sequence[ReplicaGroup | None],
    ) -> None:
        """Let ``groups`` serve with drafts: what these cost, and how policies plan them; what cannot be is noted."""
        speculate, draft = drafted
        for group in groups:
            if group is None:
                continue
            if rule := _no_drafts(speculate, group):
                self._problems.append(self._document.problem(at, rule))
                continue
            group.speculation = group.make_scheduler().speculation(speculate.method, speculate.tokens)
            group.backend = WithDrafts(group.backend, draft, Drafts(speculate.method, speculate.tokens))
            if not group.backend.executes:  # else it is built where it runs
                self._try(at, partial(group.make_backend, model))

    def _parallel(self, group: Group, at: KeyPath, pick: Pick) -> tuple[Parallel, KeyPath]:
        """How the GPUs of one replica share the model: as the group says, or else the variant, or else the scenario.

        ``tensor_parallel`` is short for ``parallel.tensor``; it is noted where one place says both.
        """
        places = [((*at, key), getattr(group, key)) for key in ("parallel", "tensor_parallel")]
        given = [(where, value) for where, value in places if value is not None]
        if not given:
            picked = [
                (where, value) for value, where in (pick("parallel"), pick("tensor_parallel")) if value is not None
            ]
            deepest = max((len(where) for where, _ in picked), default=0)
            given = [(where, value) for where, value in picked if len(where) == deepest]
        if len(given) > 1:
            self._problems.append(self._document.problem(given[1][0], "must not be given beside parallel", given[1][1]))
        if not given:
            return Parallel(), ("tensor_parallel",)
        where, value = given[0]
        return value if isinstance(value, Parallel) else Parallel(tensor=value), where

    def _check_executes(self, group: Group, at: KeyPath, pick: Pick) -> None:
        """Note it where a backend that executes steps is to serve several replicas, or one that goes away."""
        replicas, where = pick("replicas", 1)
        if group.count != 1 or (isinstance(replicas, list) and len(replicas) > 1):
            self._problems.append(self._document.problem(where, "a backend that executes steps serves one replica"))
        for key in ("failures", "autoscale"):
            value, where = pick(key)
            if value is not None:
                rule = "must not be given with a backend that executes steps: it serves one replica that stays"
                self._problems.append(self._document.problem(where, rule))

    def _check_outages(self, replicas: Any, pick: Pick) -> None:
        """Note it where a replica is to fail that does not exist, or one that is still starting after a repair."""
        failures, where = pick("failures")
        scale, _ = pick("autoscale")
        if failures is None:
            return
        groups = replicas if isinstance(replicas, list) else [Group(count=replicas)]
        scales = [scale or group.autoscale for group in groups]
        count = sum(g.count if own is None else own.max for g, own in zip(groups, scales, strict=True))
        start_up, _ = pick("start_up_s", 0)
        back: dict[int, float] = {}  # replica → when it takes requests again
        for i, outage in sorted(enumerate(failures.schedule), key=lambda each: each[1].at_s):
            at = (*where, "schedule", i)
            if outage.replica >= count:
                rule = f"no such replica: there are {count}, numbered from 0"
                self._problems.append(self._document.problem((*at, "replica"), rule, outage.replica))
            if outage.at_s < back.get(outage.replica, 0):
                rule = f"replica {outage.replica} is still starting then, until {back[outage.replica]:g} s"
                self._problems.append(self._document.problem((*at, "at_s"), rule, outage.at_s))
            if outage.for_s is not None:
                back[outage.replica] = outage.at_s + outage.for_s + start_up

    def _check_predictors(self, groups: list[ReplicaGroup], pick: Pick) -> None:
        """Note it where policies want guesses of lengths of several kinds: a request has one."""
        wanted = {predictor for group in groups if (predictor := group.make_scheduler().predictor) is not None}
        if len(wanted) > 1:
            _, where = pick("replicas", 1)
            rule = "the policies of all groups must want the same predicted lengths: a request has one"
            self._problems.append(self._document.problem(where, rule))

    def _check_roles(self, replicas: Any, at: KeyPath, pick: Pick) -> None:
        """Note it where prefill and decode replicas lack each other or a link, or stand beside mixed replicas."""
        roles = {group.role for group in replicas} if isinstance(replicas, list) else {"mixed"}
        link, link_at = pick("link")
        problem = self._document.problem
        if isinstance(replicas, list) and not replicas:
            self._problems.append(problem(at, "must have at least one group"))
        elif roles not in ({"mixed"}, {"prefill", "decode"}):
            told = ", ".join(sorted(roles))
            self._problems.append(
                problem(at, f"prefill and decode replicas must come together, without mixed ones (got {told})")
            )
        elif roles != {"mixed"} and link is None:
            self._problems.append(problem(link_at, "is required between prefill and decode replicas"))
        elif roles == {"mixed"} and link is not None:
            self._problems.append(problem(link_at, "must not be given without prefill and decode replicas"))
        scale, scale_at = pick("autoscale")
        failures, failures_at = pick("failures")
        if failures is not None and (failures.mtbf_s or LEAST_MTBF_S) < LEAST_MTBF_S:
            rule = f"must be at least {LEAST_MTBF_S:g}: a replica that fails sooner answers nobody"
            self._problems.append(problem((*failures_at, "mtbf_s"), rule, failures.mtbf_s))
        if scale is not None:
            total = sum(group.count for group in replicas) if isinstance(replicas, list) else replicas
            if roles != {"mixed"} or (isinstance(replicas, list) and len(replicas) > 1):
                rule = "must not be given for groups that differ: give each group its own"
                self._problems.append(problem(scale_at, rule))
            else:
                self._check_scale(scale, scale_at, total)
        own = [(i, group) for i, group in enumerate(replicas) if group.autoscale] if isinstance(replicas, list) else []
        for i, group in own:
            where = (*at, i, "autoscale")
            if scale is not None:
                self._problems.append(problem(where, "must not be given beside the scenario's own autoscale"))
            elif sum(other.role == group.role for other in replicas) > 1:
                self._problems.append(problem(where, f"must not be given where another group is {group.role} too"))
            else:
                self._check_scale(group.autoscale, where, group.count)

    def _check_scale(self, scale: Autoscale, at: KeyPath, count: int) -> None:
        """Note it where an autoscaler looks too often, or does not begin within its limits."""
        if scale.every_s < LEAST_LOOK_S:
            rule = f"must be at least {LEAST_LOOK_S:g}: each look is an event of its own"
            self._problems.append(self._document.problem((*at, "every_s"), rule, scale.every_s))
        if not scale.min <= count <= scale.max:
            rule = f"must start from replicas between min and max (got {count})"
            self._problems.append(self._document.problem(at, rule))


def _no_drafts(speculate: Speculate, group: ReplicaGroup) -> str:
    """Why a group cannot serve with drafts; "" if it can."""
    scheduler = group.make_scheduler()
    if not scheduler.verifies_drafts:
        return "is modelled with the policy vllm only"
    if getattr(group.backend, "executes", False):
        known = getattr(group.backend, "drafts_by", ())
        if speculate.method not in known:
            by = f"drafts by {', '.join(known)} only" if known else "verifies no drafts"
            return f"must not be given with this backend, which executes steps: it {by} (got {speculate.method})"
    if group.role != "mixed":
        return "must not be given with prefill and decode replicas: that is not modelled"
    if group.parallel.pipeline > 1 and (rule := _no_drafts_in_stages(group, scheduler)):
        return f"must not be given with pipeline stages {rule}"
    if group.kv_groups is not None and scheduler.speculation(speculate.method, 1).prefix == "drop":
        version = getattr(scheduler, "version", "")
        return f"is not modelled with vLLM {version} where layers give KV back and prefixes are cached: 0.33 is"
    if speculate.method == "ngram" and scheduler.asynchronous:
        return "method ngram needs policy.async_scheduling: false; vLLM refuses both together"
    return ""


def _no_drafts_in_stages(group: ReplicaGroup, scheduler: Scheduler) -> str:
    """Why the stages of a group's pipeline cannot serve with drafts; "" if they can."""
    if getattr(group.backend, "executes", False):
        return "and a backend that executes steps"
    if group.stages == 1:
        return "where layers have windows, or ranks requests of their own: one step at a time is modelled there"
    if not scheduler.asynchronous:
        return "and async_scheduling: false, by which vLLM 0.33 takes up drafts of a step whose output is not in"
    version = getattr(scheduler, "version", NEWEST)
    if version != NEWEST:
        return f"and vLLM {version}: of its decisions with both no ledger is there to hold it to, of {NEWEST}'s one is"
    return ""
