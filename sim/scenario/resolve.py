"""Looking up what a scenario file names: models, GPUs, policies, routers, backends, KV pools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from chairlift.backend import hf_config, memory, specs
from chairlift.backend.calibrated.profile import shipped
from chairlift.backend.checked import wrong
from chairlift.backend.draft_shapes import head_of
from chairlift.backend.parallel import Parallel
from chairlift.policies.base import KvGroups, Scheduler
from chairlift.sim.bad_input import NOTHING, BadInput, Problem
from chairlift.sim.scenario import plugins
from chairlift.sim.scenario.messages import Path as KeyPath
from chairlift.sim.scenario.policy_files import Trust
from chairlift.sim.scenario.yaml_document import Document, read
from chairlift.sim.study import Kv, Speculate
from chairlift.sim.workload.acceptance import Acceptance, curve_in, named_curve


class Lookup:
    """Looks up what one document names. Mistakes are collected, not raised."""

    def __init__(self, document: Document, folder: Path, trust: Trust) -> None:
        self._document = document
        self._folder = folder
        self._trust = trust
        self._problems: list[Problem] = []

    def _find(self, key: str, choice: Any, at: KeyPath, from_file: bool = True) -> Any:
        """What ``choice``, the value of ``key``, names; as `_look_up`.

        ``from_file``: the scenario file names it, so that a policy's or router's file lies beside that, and runs only
        with ``--trust``. Otherwise the command line does.
        """
        if key == "model":
            return self._look_up(choice, at, lambda given: find_model(given, self._folder))
        if key == "gpu":
            return self._look_up(choice, at, specs.gpu)
        if key == "backend":
            others = list(shipped())
            return self._look_up(
                self._profile(choice), at, lambda name: plugins.find(plugins.BACKEND, name, others=others), True
            )
        kind = plugins.POLICY if key == "policy" else plugins.ROUTER
        folder = self._folder if from_file else Path()
        trust = self._trust if from_file else True
        return self._look_up(choice, at, lambda name: plugins.find(kind, name, trust, folder), True)

    def _profile(self, choice: Any) -> Any:
        """``choice`` of a backend, written out: a profile's name alone means the backend ``profile`` with it.

        A profile's file may lie beside the scenario.
        """
        if isinstance(choice, str) and (choice in shipped() or choice.endswith(".json")):
            choice = {"name": "profile", "profile": choice}
        if isinstance(choice, dict) and isinstance(name := choice.get("profile"), str) and name.endswith(".json"):
            beside = self._folder / name
            return {**choice, "profile": str(beside)} if beside.is_file() else choice
        return choice

    def _look_up(self, choice: Any, at: KeyPath, find: Any, with_settings: bool = False) -> Any:
        """What ``find`` returns for the name in ``choice``; None if something is wrong, which is then noted.

        ``with_settings``: ``find`` returns a class, and the result is that class and its settings, checked.
        """
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
        """``given`` without the settings that ``kind`` says it does not take; each of those is noted as a mistake."""
        refused: dict[str, str] = kind.refused(given) if issubclass(kind, Scheduler) else {}
        for key, why in sorted(refused.items()):
            self._problems.append(self._document.problem((*at, key), why, given[key]))
        return {key: value for key, value in given.items() if key not in refused}

    def _settings(self, kind: type[Any], given: dict[str, Any], at: KeyPath) -> dict[str, Any] | None:
        model = plugins.settings(kind)
        given = self._refused(kind, given, at)
        checked = self._try(at, lambda: self._document.check(model, given, at))
        return None if checked is None else checked.model_dump()

    def _try(self, at: KeyPath, what: Any) -> Any:
        """The result of ``what()``. Where it raises, the result is None and the mistake is noted at ``at``."""
        try:
            return what()
        except specs.BadShape as error:
            self._problems += [
                self._document.problem((*at, key), rule, NOTHING if value is specs.ABSENT else value)
                for key, rule, value in error.wrong
            ]
        except BadInput as error:
            self._problems += [
                p if p.file else self._document.problem((*at, *filter(None, p.path.split("."))), p.rule, p.value)
                for p in error.problems
            ]
        except (LookupError, ValueError, TypeError) as error:
            self._problems.append(self._document.problem(at, str(error.args[0] if error.args else error)))
        return None


def find_model(choice: str | dict[str, Any], folder: Path) -> specs.Model:
    """The model of that name, of a ``config.json``, or with numbers of its own or changed ones.

    A file's path is relative to ``folder``.
    """
    name = choice.get("name") if isinstance(choice, dict) else choice
    if not (isinstance(name, str) and name.endswith(".json")):
        return specs.model(choice)
    config = read(folder / name).data
    found = hf_config.model(config, Path(name).parent.name or name)
    return specs.changed(found, choice) if isinstance(choice, dict) else found


def find_draft(speculate: Speculate, model: specs.Model, folder: Path) -> specs.Model | None:
    """The model, or the layer, that drafts for ``model``; None if none does. Raises as `find_model`, or ValueError."""
    told = speculate.draft
    if speculate.method == "ngram":
        return None
    if speculate.method == "draft_model":
        assert told is not None
        return find_model(told, folder)
    own = head_of(model, speculate.method)
    if told is None:
        return own
    if isinstance(told, str):
        raise ValueError(f"must be numbers of the drafting layer, such as {{vocab: 32000}} (got {told})")
    return specs.changed(own, told)


def with_lengths(speculate: Speculate, folder: Path) -> Speculate:
    """``speculate`` with the lengths of the file that its acceptance names. Raises as `read`, or ValueError."""
    told = speculate.acceptance.file
    if told is None:
        return speculate
    name, label = named_curve(told)
    data = read(folder / name).data
    try:
        found = Acceptance(lengths=curve_in(data, label))
        found.of(speculate.tokens)
    except ValidationError as error:
        raise ValueError(f"{name}: {wrong(error)}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error.args[0]}") from None
    return speculate.model_copy(update={"acceptance": found})


def step_limits(policy: Scheduler, max_model_len: int) -> tuple[int, int]:
    """Tokens and requests of a step at most, of one rank: what its memory is kept for.

    A policy without a limit of its own counts as `memory.TOKENS` and `memory.SEQUENCES`.
    """
    tokens = getattr(policy, "max_num_batched_tokens", policy.token_limit or memory.TOKENS)
    tokens = max(max_model_len, 2048) if tokens is None else tokens  # vLLM's first version: a whole prompt
    sequences = policy.sequence_limit or memory.SEQUENCES
    return tokens, sequences


def kv_groups(
    policy: Scheduler, model: specs.Model, parallel: Parallel, draft: specs.Model | None = None
) -> KvGroups | None:
    """The groups of layers that the pool of ``policy`` tells apart; None if it does not, or all layers are alike."""
    if policy.hybrid is None or not model.window_layers:
        return None
    return KvGroups(memory.windows(model, parallel, draft), model.chunked)


class Pool(NamedTuple):
    """The KV pool of one replica; the pools of its ranks of DP-attention, added up."""

    blocks: int  # that requests can use
    block_size: int  # tokens
    source: str  # where these numbers come from, in words; and which settings have no effect
    groups: KvGroups | None  # of layers, if a block is of one of several


def kv_pool(
    kv: Kv,
    policy: Scheduler,
    model: specs.Model,
    gpu: specs.GPU,
    parallel: Parallel,
    max_model_len: int,
    draft: specs.Model | None = None,
) -> Pool:
    """The KV pool of one replica. ``draft``: a model beside the one served, which has weights and KV of its own.

    A number of blocks or tokens that is given is that of one rank of DP-attention.

    Raises ValueError, one sentence, where the settings contradict each other, where no block fits, or where the policy
    swaps KV over a link of unknown speed.
    """
    if policy.swaps:
        gpu.needed("host_gb_per_s", "swapping KV")
    block_size = policy.pool_block_size or kv.block_size
    if kv.blocks is not None and kv.tokens is not None:
        raise ValueError("give blocks or tokens, not both")
    if getattr(policy, "disable_hybrid_kv_cache_manager", False):
        model = replace(model, window=0, window_layers=0, chunked=False)
    own, groups, ranks = policy.pool_blocks, kv_groups(policy, model, parallel, draft), parallel.data
    if own is not None:
        blocks, source = own, f"a setting of policy {type(policy).__name__}"
        if blocks < 1:
            raise ValueError(f"policy {type(policy).__name__} must have at least one block of KV (got {blocks})")
    elif kv.blocks is not None:
        blocks, source = kv.blocks, "given"
    elif kv.tokens is not None:
        blocks, source = kv.tokens // block_size * (1 if groups is None else len(groups.windows)), "given"
        if blocks < 1:
            raise ValueError(f"tokens must hold at least one block of {block_size} (got {kv.tokens})")
    else:
        tokens, sequences = step_limits(policy, max_model_len)
        share, static = kv.memory_utilization, policy.static_share(gpu.memory_bytes, parallel.gpus, bool(model.latent))
        if static is not None and "memory_utilization" not in kv.model_fields_set:
            share = static
        sizes = (kv.reserve_gib, tokens, sequences, draft, static is not None)
        fit = memory.kv_blocks(model, gpu, parallel, block_size, share, *sizes)
        blocks, source = fit.blocks // ranks, fit.explain()
        if groups is not None:
            blocks, source = fit.engine_blocks, fit.explain(by_group=True)
    if ranks > 1 and source == "given":
        source = f"given, for each of {ranks} ranks"
    if idle := _without_effect(kv, policy, block_size):
        source += f"; not used: {', '.join(idle)}"
    if policy.block_tokens is not None:  # the same memory, in blocks of the size that the policy fixes
        blocks = blocks * block_size if own is not None or kv.tokens is None else kv.tokens
        blocks, block_size = blocks // policy.block_tokens, policy.block_tokens
    return Pool(blocks * ranks, block_size, source, groups)


def _without_effect(kv: Kv, policy: Scheduler, block_size: int) -> list[str]:
    """The settings of ``kv`` that were given and that the policy or another setting overrules, each with its value."""
    overruled = set()
    if policy.pool_blocks is not None:
        overruled |= {"blocks", "tokens"}
    if policy.pool_blocks is not None or kv.blocks is not None or kv.tokens is not None:
        overruled |= {"memory_utilization", "reserve_gib"}
    if kv.block_size not in (block_size, policy.block_tokens):
        overruled.add("block_size")
    if not policy.swaps:
        overruled |= {"host_gib", "host_link"}
    given = kv.model_fields_set & overruled
    return [f"{name} {getattr(kv, name)}" for name in type(kv).model_fields if name in given]
