"""The suite of promises, on policies and routers that each break one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chairlift.policies.base import Router, Scheduler
from chairlift.sim.conformance import serving
from chairlift.sim.conformance.cases import POLICY_CASES, read_rows, trace_of
from chairlift.sim.conformance.policy import PROMISES, check_policy
from chairlift.sim.conformance.promises import Checklist
from chairlift.sim.conformance.router import PROMISES as ROUTER_PROMISES
from chairlift.sim.conformance.router import check_router
from chairlift.sim.scenario import plugins
from chairlift.sim.workload.formats.chairlift import save
from kit.command import ROUTER, replaced

GOOD = """\
import random
import sys
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from chairlift import Scheduler, Step
from chairlift.policies.base import FOREVER


@dataclass
class Mine(Scheduler):
    budget: int = 128
    order_of: Literal["arrival", "prompt"] = "arrival"
    at_most: int = 1000
    steps: int = field(default=0, init=False)

    def schedule(self, step: Step) -> int:
        # before
        while not step.decode_all():
            step.preempt(next(reversed(step.running)))
        room = self.budget - step.decodes
        waiting = list(step.waiting)
        if self.order_of == "prompt":
            waiting.sort(key=lambda request: request.prompt_tokens)
        for request in waiting:
            if request.remaining > room or not step.admit(request, request.remaining):
                break
            room -= request.remaining
        return 1
"""

# What a policy must not do, though Python cannot keep it from doing so: find the trace in the simulator's own frames.
PEEK = """\
frame = sys._getframe()
        while not (hasattr(frame.f_locals.get("setup"), "trace")):
            frame = frame.f_back
        truth = frame.f_locals["setup"].trace.output_tokens
"""

BROKEN: dict[str, tuple[str, str, str, str]] = {  # promise, what stands there, what instead, what is said of it
    "cannot be made": (
        "settings",
        "    def schedule",
        "    def __post_init__(self) -> None:\n        self.budget = self.bugdet\n\n    def schedule",
        "Mine() raises AttributeError",
    ),
    "reads a private slot": (
        "public",
        "# before",
        "(lambda: sum(r._offset for r in step.running))",
        "mine.py:18: _offset is private",
    ),
    "writes a private slot": ("public", "# before", "step._hidden = 1", "mine.py:18: _hidden is private"),
    "divides by zero": ("raises", "# before", "1 // (len(step.running) - 2)", "mine.py:18: ZeroDivisionError"),
    "overspends": ("allowed", "request.remaining > room or", "", "tokens: its budget is 128 (plan "),
    "admits twice": (
        "allowed",
        "            room -= request.remaining",
        "            step.admit(request, 1)",
        "is not waiting (plan ",
    ),
    "vouches for nothing": ("allowed", "return 1", "return 0", "policy Mine: step 1: vouched for 0 steps (plan "),
    "leaves a tenant waiting": (
        "serves",
        "list(step.waiting)",
        "[r for r in step.waiting if r.tenant == 0]",
        "are never served (",
    ),
    "plans on and on": (
        "serves",
        "# before",
        "for request in list(step.running):\n            step.preempt(request)",
        "requests: policy Mine plans on and on (plan ",
    ),
    "draws its own numbers": ("repeats", "# before", "self.budget = random.randint(60, 128)", "the first time, "),
    "remembers the run before": (
        "repeats",
        "    steps: int = field(default=0, init=False)",
        "    ever: ClassVar[list[int]] = []\n    steps: int = 0",
        "the first time, ",
    ),
    "vouches for more than it may": (
        "leaps",
        "return 1\n",
        "return FOREVER\n\n    def heeds_arrival(self, step: Step) -> bool:\n        return False\n",
        "as it vouched, ",
    ),
    "counts its calls": (
        "leaps",
        "# before",
        "self.steps += 1\n        self.budget = 128 if self.steps % 5 else 50",
        "as it vouched, ",
    ),
    "knows the answers": (
        "blind",
        "waiting = list(step.waiting)",
        PEEK + "        waiting = sorted(step.waiting, key=lambda r: truth[r.id])",
        "with others, of which nobody can have seen the end by then, ",
    ),
}
FURTHER = {  # what else must change for the promise to be broken in a way that shows
    "remembers the run before": ("# before", "self.ever.append(1)\n        self.budget = 100 + len(self.ever) % 28"),
    "counts its calls": ("return 1\n", "return FOREVER\n"),
    "plans on and on": ("step.admit(request, request.remaining)", "step.admit(request, 1)"),
}


def made(code: str, folder: Path, *kinds: plugins.Kind) -> type[Any]:
    path = folder / "mine.py"
    path.write_text(code)
    return plugins.from_file(path, None, *kinds)


def checked(code: str, folder: Path, **settings: Any) -> Checklist:
    return check_policy(made(code, folder, plugins.POLICY), settings)


def test_the_good_one_keeps_all(tmp_path: Path) -> None:
    assert [verdict.state for verdict in checked(GOOD, tmp_path)] == ["kept"] * len(PROMISES)


@pytest.mark.parametrize("which", BROKEN)
def test_a_policy_that_breaks_one_promise(which: str, tmp_path: Path) -> None:
    promise, old, new, said = BROKEN[which]
    code = replaced(old, new, GOOD)
    if which in FURTHER:
        code = replaced(*FURTHER[which], code)
    kind = made(code, tmp_path, plugins.POLICY)

    found = check_policy(kind)

    [broken] = found.broken
    assert broken.promise.name == promise
    assert said in broken.what
    if broken.case is not None:  # the requests that it shows are few, and break the promise again
        assert 1 <= len(broken.rows) <= 12
    if broken.case is not None and which != "remembers the run before":  # it has forgotten nothing of them
        again = check_policy(kind, {**broken.settings}, [broken.case], broken.rows, variants=False)
        assert [each.promise.name for each in again.broken] == [promise]


def test_every_promise_of_a_policy_is_broken_by_one() -> None:
    by_hand = {"books"}
    assert {promise for promise, *_ in BROKEN.values()} | by_hand == {promise.name for promise in PROMISES}


def test_what_the_audit_finds_is_a_broken_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def audited(*_: object) -> None:
        raise AssertionError("replica 0: blocks are left behind")

    monkeypatch.setattr(serving, "simulate", audited)

    broken = checked(GOOD, tmp_path).broken[0]
    assert broken.promise.name == "books"
    assert broken.what.startswith("replica 0: blocks are left behind")


def test_a_defect_of_ours_is_no_broken_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(serving, "simulate", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        checked(GOOD, tmp_path)


def test_a_policy_that_never_returns_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "HANG_S", 0.2)
    code = replaced("# before", "while step.waiting and self.steps == 0:\n            pass", GOOD)

    found = check_policy(made(code, tmp_path, plugins.POLICY), cases=POLICY_CASES[:1], variants=False)
    [broken] = found.broken
    assert broken.promise.name == "serves"
    assert "policy Mine does not return within 0.2 s (plan 1 of the run, at " in broken.what
    assert [verdict.state for verdict in found][:3] == ["kept", "kept", "unchecked"]


def test_a_promise_that_only_one_choice_of_a_setting_breaks_names_it(tmp_path: Path) -> None:
    code = replaced("return 1\n", "return 1 if self.order_of == 'arrival' else 0\n", GOOD)

    [broken] = checked(code, tmp_path).broken
    assert (broken.promise.name, broken.settings) == ("allowed", {"order_of": "prompt"})
    assert checked(code, tmp_path, order_of="arrival").broken == []


REFUSES = (
    "    def __post_init__(self) -> None:\n        if self.order_of == 'prompt' and self.at_most > 9:\n            "
)


def test_a_choice_that_the_policy_refuses_is_left_out_and_one_that_it_stumbles_over_is_not(tmp_path: Path) -> None:
    refuses = replaced("    def schedule", REFUSES + "raise ValueError('no')\n\n    def schedule", GOOD)
    stumbles = refuses.replace("ValueError", "KeyError")

    assert checked(refuses, tmp_path).broken == []
    with pytest.raises(ValueError, match="no"):
        checked(refuses, tmp_path, order_of="prompt")
    [broken] = checked(stumbles, tmp_path).broken
    assert broken.promise.name == "settings"
    assert broken.what == "Mine(order_of='prompt') raises KeyError: 'no'"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("    oracle = True\n", "it says that it is an oracle"),
        (
            "    predictor = property(lambda self: __import__('chairlift').policies.base.Predictor())\n",
            "it asks for predictions, which the simulator makes from the truth",
        ),
    ],
)
def test_whoever_may_see_lengths_is_not_asked_whether_it_does(line: str, why: str, tmp_path: Path) -> None:
    code = replaced("    budget: int = 128\n", f"{line}    budget: int = 128\n", GOOD)

    verdicts = {verdict.promise.name: verdict for verdict in checked(code, tmp_path)}
    assert (verdicts["blind"].state, verdicts["blind"].why) == ("unchecked", why)
    assert {name for name, verdict in verdicts.items() if verdict.state == "kept"} == set(verdicts) - {"blind"}


def test_refusals_are_counted(tmp_path: Path) -> None:
    code = replaced(
        "# before", "if step.waiting and step.waiting[0].id % 7 == 3:\n            step.reject(step.waiting[0])", GOOD
    )

    found = checked(code, tmp_path)
    assert found.broken == []
    assert found.refused > 0


def test_requests_are_written_and_read_as_they_were(tmp_path: Path) -> None:
    for case in POLICY_CASES:
        rows = case.rows()
        save(trace_of(rows), tmp_path / "rows.csv")
        assert read_rows(tmp_path / "rows.csv") == rows


# ---- routers ----

ROUTERS: dict[str, tuple[str, str, str]] = {  # promise, what `route` does instead, what is said of it
    "cannot be made": ("settings", "return 0\n\n    def __post_init__(self):\n        1 // 0", "cannot be made"),
    "reads a private slot": ("public", "return (lambda: 0, lambda: request._offset)[0]()", "_offset is private"),
    "divides by zero": ("raises", "return 1 // (len(replicas.indices) - 2)", "ZeroDivisionError"),
    "misses the last": ("range", "return len(replicas.indices)", "positions are 0 to "),
    "counts from the end": ("range", "return -1", "its answer is -1"),
    "answers by half": ("range", "return 0.0", "its answer is 0.0"),
    "writes on the board": ("looks", "replicas.outstanding[0] += 1\n        return 0", "it changed the replicas"),
    "waits for the third": (
        "serves",
        "while len(replicas.indices) < 3 and type(replicas).__name__ != 'View':\n            pass\n        return 0",
        "router Last does not return within",
    ),
    "never answers": ("serves", "while True:\n            pass", "it does not return within"),
    "draws its own numbers": ("repeats", "return random.randrange(len(replicas.indices))", "the first time, "),
    "knows the answers": (
        "blind",
        "if type(replicas).__name__ == 'View':\n            return 0\n        "
        + PEEK
        + "        return int(truth[request.id]) % len(replicas.indices)",
        "if answers have other lengths",
    ),
}


@pytest.mark.parametrize("which", ROUTERS)
def test_a_router_that_breaks_one_promise(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HANG_S", 0.5)
    promise, body, said = ROUTERS[which]
    code = "import random\nimport sys\n" + replaced("return len(replicas.indices) - self.step", body, ROUTER)
    kind = made(code, tmp_path, plugins.ROUTER)

    found = check_router(kind)

    assert promise in [broken.promise.name for broken in found.broken]
    broken = next(broken for broken in found.broken if broken.promise.name == promise)
    assert said in broken.what
    if promise not in ("range", "raises"):  # a position that there is not also stops the clusters
        assert len(found.broken) == 1
    if broken.case is not None:
        again = check_router(kind, cases=[broken.case], rows=broken.rows)
        assert promise in [each.promise.name for each in again.broken]


def test_every_promise_of_a_router_is_broken_by_one() -> None:
    assert {promise for promise, *_ in ROUTERS.values()} == {promise.name for promise in ROUTER_PROMISES}


@pytest.mark.parametrize(("find", "check"), [(plugins.POLICY, check_policy), (plugins.ROUTER, check_router)])
def test_the_shipped_ones_read_nothing_private(find: plugins.Kind, check: Callable[..., Checklist]) -> None:
    for kind in plugins.shipped(find).values():
        assert issubclass(kind, Scheduler | Router)
        found = {verdict.promise.name: verdict.state for verdict in check(kind, cases=())}
        assert found["public"] == "kept", kind
