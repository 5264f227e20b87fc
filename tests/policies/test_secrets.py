"""What no policy can find out: true output lengths, by whatever attribute of what it is given."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chairlift.policies import base
from chairlift.policies.base import Request, Scheduler, Step
from chairlift.policies.sjf import Sjf
from kit.leaping import POLICIES
from kit.reach import numbers
from kit.worlds import Affine, play, trace_of

ROOT = Path(base.__file__).resolve().parent
CALLS = 12  # of a policy, before and after each of which it looks around
LONG = 10_007  # tokens, more than anything else that is counted here


class Enough(Exception):
    """The policy has looked around as often as it was to, or so long that counts of steps begin to equal lengths."""


def looking(scheduler: Scheduler, look: Callable[[Step], None]) -> Scheduler:
    """``scheduler`` with a ``look`` at the step before and after each plan, and as it is asked about arrivals."""
    kind = type(scheduler)
    calls = 0

    def schedule(self: Any, step: Step) -> int:
        nonlocal calls
        calls += 1
        if calls > CALLS or step.decode_steps > LONG // 2:
            raise Enough
        look(step)
        vouched = kind.schedule(self, step)
        look(step)
        return vouched

    def heeds_arrival(self: Any, step: Step) -> bool:
        look(step)
        return kind.heeds_arrival(self, step)

    scheduler.__class__ = type(kind.__name__, (kind,), {"schedule": schedule, "heeds_arrival": heeds_arrival})
    return scheduler


def told_by(request: Request, output: int) -> set[int]:
    """Numbers that give the length of an answer away."""
    final = request.prompt_tokens + output
    left = output - request.emitted
    return {output, output - 1, final, final - 1, left, left - 1, final - 1 - request.computed}


# some short answers, so that requests come and go; of the long ones each length is like nothing else
OUTPUTS = [LONG + 101 * i if i % 3 else 3 + i for i in range(12)]
SECRET = {name for name in POLICIES if not POLICIES[name](2).oracle and POLICIES[name](2).predictor is None}


def look_for_lengths(name: str, **world: Any) -> list[str]:
    found: list[str] = []
    seen: set[int] = set()

    def look(step: Step) -> None:
        everybody = (*step.running, *step.waiting)
        here = [r for r in everybody if OUTPUTS[r.id] >= LONG]
        seen.update(r.id for r in here)
        steps = (0, step.decode_steps)  # by which counts of a decode group are shifted
        secrets = {number + n: r.id for r in here for number in told_by(r, OUTPUTS[r.id]) for n in steps}
        for value, path in numbers(step):
            if value in secrets:
                found.append(f"{path} = {value} tells of request {secrets[value]}")

    rows = [(10**9 * i, 5 + 7 * i, output) for i, output in enumerate(OUTPUTS)]
    n = len(rows)
    groups = {"prefix_group": np.arange(n) % 2, "prefix_tokens": np.full(n, 4), "tenant": np.arange(n) % 3}
    trace = trace_of(rows, **groups, tenants=("a", "b", "c"))
    blocks, size = (6000, 16) if POLICIES[name](2).block_tokens is None else (96_000, 1)
    world = {"blocks": blocks, "block_size": size, "max_model_len": 15_000, **world}
    with suppress(Enough):
        play(trace, lambda: looking(POLICIES[name](2), look), lambda: Affine(fixed=10**9), **world)
    assert len(seen) >= 2
    return found


@pytest.mark.parametrize("name", sorted(SECRET))
def test_no_length_is_within_reach_of_a_policy(name: str) -> None:
    assert look_for_lengths(name) == []


@pytest.mark.parametrize("name", ["static", "vllm-async", "vllm-v0-swap"])
def test_nor_where_a_journal_is_kept(name: str) -> None:
    assert look_for_lengths(name, journal=True) == []


def test_the_search_finds_what_is_hidden_in_any_way() -> None:
    secret = 123_457

    class Slotted:
        __slots__ = ("_deep",)

        def __init__(self) -> None:
            self._deep = {"a": [(1, {secret})]}

        def method(self) -> None: ...

    def closed(value: int = 3) -> int:
        return secret + value

    held = SimpleNamespace(secret=secret)
    ways: dict[str, object] = {
        "a private slot, dicts, lists, tuples and sets": Slotted(),
        "what a method is bound to": SimpleNamespace(call=Slotted().method),
        "a closure": SimpleNamespace(call=closed),
        "a view of a dict": SimpleNamespace(view={1: held}.values()),
        "an array": SimpleNamespace(column=np.array([1, secret])),
        "a built-in method": SimpleNamespace(append=[secret].append),
    }
    for way, root in ways.items():
        assert secret in {value for value, _ in numbers(root)}, way


def test_an_oracle_is_given_lengths() -> None:
    seen: set[int | None] = set()
    trace = trace_of([(0, 5, 7), (0, 5, 9)])

    play(trace, lambda: looking(Sjf(), lambda step: seen.update(r.output_tokens for r in step.running)))

    assert seen == {7, 9}


POLICY_FILES = sorted(path for path in ROOT.glob("*.py") if path.name != "base.py")


@pytest.mark.parametrize("path", POLICY_FILES, ids=lambda path: path.stem)
def test_policies_use_no_private_name_of_others(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    private = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"_(?!_.*__$)", node.attr)
    ]
    own = ("self", "cls", "super")
    others = [node for node in private if not (isinstance(node.value, ast.Name) and node.value.id in own)]
    others = [n for n in others if not (isinstance(n.value, ast.Call) and getattr(n.value.func, "id", "") == "super")]

    assert [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in others] == []


@pytest.mark.parametrize("name", [name for name in vars(Request) if not name.startswith("_")])
def test_a_request_is_read_only_in_the_contract(name: str) -> None:
    declared = vars(Request)[name]

    assert isinstance(declared, property)
    assert declared.fset is None
