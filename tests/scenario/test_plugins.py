"""Policies, routers and backends of installed packages: found by name, listed with where they come from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chairlift.sim.scenario import plugins
from kit.command import POLICY, ROUTER, SCENARIO, Result, chairlift, replaced

BACKEND = '''\
from dataclasses import dataclass

from chairlift import Backend, Batch, StepCost


class Flat(Backend):
    def __init__(self, ps: int) -> None:
        self.ps = ps

    def step(self, batch: Batch) -> StepCost:
        return StepCost(self.ps)

    def assumptions(self) -> dict[str, str]:
        return {"cost model": "every step takes as long"}


@dataclass(frozen=True)
class Clock:
    """Every step takes as long."""

    step_ms: float = 1.0

    def build(self, model: object, gpu: object, parallel: object) -> Flat:
        return Flat(round(self.step_ms * 1e9))
'''

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("fast-policies", "policies", "mine = fast:Mine", fast=POLICY)``: a package that plugs in."""
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SCENARIO)
    before = set(sys.modules)
    known: list[str] = []

    def put(name: str, group: str, line: str, version: str = "1.2", **files: str) -> None:
        site = tmp_path / "site" / name
        information = site / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(f"[chairlift.{group}]\n{line}\n")
        for module, code in files.items():
            (site / module).parent.mkdir(exist_ok=True)
            (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        known.extend(files)

    yield put
    for module in set(sys.modules) - before:
        if module in known:
            del sys.modules[module]


def run(text: str, *arguments: str) -> Result:
    Path("s.yaml").write_text(text)
    return chairlift("run", "s.yaml", "--quiet", "--out", "out", *arguments)


def fields(name: str = "out/summary.json") -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(name).read_text())
    return found


def test_a_policy_of_an_installed_package_is_named_like_any_other_and_needs_no_trust(install: Install) -> None:
    install("fast-policies", "policies", "mine = fast:Mine", fast=POLICY)

    assert run(replaced("{name: vllm}", "{name: mine, budget: 500}")).status == 0
    by_name = Path("out/requests.parquet").read_bytes()
    Path("mine.py").write_text(POLICY)
    assert run(replaced("{name: vllm}", "{name: mine.py, budget: 500}"), "--trust").status == 0
    assert Path("out/requests.parquet").read_bytes() == by_name


def test_its_settings_are_checked(install: Install) -> None:
    install("fast-policies", "policies", "mine = fast:Mine", fast=POLICY)

    result = run(replaced("{name: vllm}", "{name: mine, bugdet: 500}"))
    assert (result.status, result.err) == (
        2,
        "error: s.yaml:5: policy.bugdet: unknown key – did you mean 'budget'?\n",
    )


def test_a_router_and_a_backend_of_installed_packages(install: Install) -> None:
    install("my-routers", "routers", "last = my_routers:Last", my_routers=ROUTER)
    install("my-backends", "backends", "clock = my_clock:Clock", my_clock=BACKEND)

    text = SCENARIO + "replicas: 2\nrouter: last\nbackend: {name: clock, step_ms: 2}\n"
    assert run(text.replace("poisson: {rate_per_s: 2}", "burst: {}")).status == 0
    summary = fields()
    assert summary["assumptions"]["cost model"] == "every step takes as long"  # type: ignore[index]
    assert summary["min_itl_ms" if "min_itl_ms" in summary else "median_itl_ms"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("kind", "group", "line", "code", "said"),
    [
        (
            "policies",
            "policies",
            "mine = fast:Mine",
            POLICY,
            ["Decode everybody", "(fast-policies 1.2)", "budget: int"],
        ),
        ("routers", "routers", "last = fast:Last", ROUTER, ["The last replica", "(fast-policies 1.2)", "step: int"]),
        ("backends", "backends", "clock = fast:Clock", BACKEND, ["Every step takes as long. (fast-policies 1.2)"]),
    ],
)
def test_the_list_says_where_each_comes_from(
    install: Install, kind: str, group: str, line: str, code: str, said: list[str]
) -> None:
    before = chairlift("list", kind)
    install("fast-policies", group, line, fast=code)
    after = chairlift("list", kind)

    assert (after.status, after.err) == (0, "")
    words = " ".join(after.out.split())
    assert [each for each in said if each not in words] == []
    assert "fast-policies" not in before.out


def test_the_schema_has_them(install: Install) -> None:
    install("fast-policies", "policies", "mine = fast:Mine", fast=POLICY)

    policy = json.loads(chairlift("schema").out)["properties"]["policy"]["anyOf"]
    assert "mine" in policy[0]["enum"]
    assert any(
        "budget" in each.get("properties", {}) and each["properties"]["name"] == {"const": "mine"} for each in policy
    )


BROKEN = {
    "does not import": (
        "mine = fast:Mine",
        "import nothing_of_the_kind\n",
        "the policy plug-in of fast-policies 1.2 cannot be imported: ModuleNotFoundError: No module named "
        "'nothing_of_the_kind' (got 'mine')",
    ),
    "has no such class": (
        "mine = fast:Mein",
        POLICY,
        "the policy plug-in of fast-policies 1.2 cannot be imported: AttributeError: module 'fast' has no attribute "
        "'Mein' (got 'mine')",
    ),
    "is a router": (
        "mine = fast:Last",
        ROUTER,
        "the policy plug-in of fast-policies 1.2 is no Scheduler subclass: fast:Last (got 'mine')",
    ),
    "is no class": (
        "mine = fast:x",
        "x = 1\n",
        "the policy plug-in of fast-policies 1.2 is no Scheduler subclass: fast:x (got 'mine')",
    ),
    "has settings of no type": (
        "mine = fast:Mine",
        POLICY.replace("Positive = 2048", "'Whatever' = 3"),
        "the policy plug-in of fast-policies 1.2: the settings of Mine cannot be read: NameError: name 'Whatever' is "
        "not defined (got 'mine')",
    ),
}


@pytest.mark.parametrize(("line", "code", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plug_in_is_one_line_and_in_the_way_only_of_those_who_ask_for_it(
    install: Install, line: str, code: str, said: str
) -> None:
    install("fast-policies", "policies", line, fast=code)

    listed = chairlift("list", "policies")
    assert (listed.status, listed.err) == (0, f"left out: {said}\n")
    assert "vllm" in listed.out
    assert run(SCENARIO).err == ""
    asked = run(replaced("{name: vllm}", "{name: mine}"))
    assert (asked.status, asked.err) == (2, f"error: s.yaml:5: policy.name: {said}\n")


def test_a_plug_in_does_not_take_the_name_of_a_shipped_one(install: Install) -> None:
    install("fast-policies", "policies", "vllm = fast:Mine", fast=POLICY)

    listed = chairlift("list", "policies")
    assert listed.err == (
        "left out: the policy plug-in of fast-policies 1.2 takes the name of a shipped policy (got 'vllm')\n"
    )
    assert "Decode everybody" not in listed.out
    assert "max_num_batched_tokens" in listed.out
    assert run(SCENARIO, "--set", "policy.max_num_seqs=3").status == 0


def test_two_packages_with_one_name_are_refused_where_it_is_asked_for(install: Install) -> None:
    install("one", "policies", "mine = one_module:Mine", one_module=POLICY)
    install("two", "policies", "mine = two_module:Mine", version="3", two_module=POLICY)

    said = "several packages have a policy of this name: one 1.2 and two 3 (got 'mine')"
    assert chairlift("list", "policies").err == f"left out: {said}\n"
    assert run(SCENARIO, "--policy", "mine").err == f"error: --policy mine: policy: {said}\n"


def test_a_wrong_name_may_mean_a_plug_in(install: Install) -> None:
    install("fast-policies", "policies", "quickest = fast:Mine", fast=POLICY)

    assert "did you mean 'quickest'?" in run(SCENARIO, "--policy", "quickets").err


def test_a_plug_in_that_crashes_is_named_with_its_line(install: Install) -> None:
    code = POLICY.replace("step.decode_all()", "step.decode_everybody()")
    install("fast-policies", "policies", "mine = fast:Mine", fast=code)

    result = run(SCENARIO, "--policy", "mine")
    assert result.status == 2
    assert "fast.py:15: raised AttributeError: " in result.err
    assert result.err.count("\n") == 1


def test_versions_tell_package_version_and_code_and_import_nothing(install: Install) -> None:
    assert plugins.versions() == {}
    install("fast-policies", "policies", "mine = fast:Mine", fast=POLICY)
    install("my-formats", "formats", "odd = odd_format", version="0.3", odd_format="raise SystemExit('imported')\n")

    found = plugins.versions()
    assert sorted(found) == ["fast-policies", "my-formats"]
    assert found["fast-policies"].startswith("1.2+")
    assert found["my-formats"].startswith("0.3+")
    assert "fast" not in sys.modules


def test_a_change_of_code_is_a_change_of_version(install: Install, tmp_path: Path) -> None:
    install("fast-policies", "policies", "mine = fast.inner:Mine", **{"fast/__init__": "", "fast/inner": POLICY})
    before = plugins.versions()
    (tmp_path / "site" / "fast-policies" / "fast" / "inner.py").write_text(POLICY + "# changed\n")
    plugins._versions.cache_clear()

    assert plugins.versions() != before
