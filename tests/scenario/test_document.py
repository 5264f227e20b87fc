"""Documents: what YAML means here, and every mistake at its file and line."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.yaml_document import Document, problems_from, read


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Static(Strict):
    name: Literal["static"]
    batch: int = Field(default=8, ge=1)


class Continuous(Strict):
    name: Literal["vllm"]
    budget: int = Field(default=2048, ge=1)
    vllm: int = 0  # as a key, what the union calls this member

    @model_validator(mode="after")
    def _budget_is_even(self) -> "Continuous":
        if self.budget % 2:
            raise ValueError("budget must be even")
        return self


class Arrivals(Strict):
    rate_per_s: float = Field(gt=0, allow_inf_nan=False)
    kind: Literal["poisson", "burst", "uniform"] = "poisson"


class Variant(Strict):
    policy: Annotated[Static | Continuous, Field(discriminator="name")]


class Scenario(Strict):
    seed: int = 0
    arrivals: Arrivals
    blocks: int | Literal["auto"] = "auto"
    compare: list[Variant] = []
    replicas: int | list[int] | None = None
    weights: dict[str, float] = {}
    router: Static | Arrivals | str = "random"
    trace: str | None = None

    @field_validator("trace")
    @classmethod
    def _trace_is_known(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(".csv"):
            raise ValueError("must be a .csv file")
        return value


def document(tmp_path: Path, text: str, name: str = "s.yaml") -> Document:
    (tmp_path / name).write_text(text, encoding="utf-8")
    document = read(tmp_path / name)
    document.path = name
    return document


def complaints(tmp_path: Path, text: str, *sets: str, model: type[Any] = Scenario) -> list[str]:
    """What is wrong with ``text``, with the file's folder cut off."""

    def attempt() -> None:
        it = document(tmp_path, text)
        it.set(sets)
        it.check(model)

    with pytest.raises(BadInput) as caught:
        attempt()
    return [str(problem).replace(f"{tmp_path}{os.sep}", "") for problem in caught.value.problems]


def test_a_good_document_is_its_model(tmp_path: Path) -> None:
    it = document(tmp_path, "seed: 3\narrivals:\n  rate_per_s: 2.5\ncompare:\n- policy: {name: static, batch: 4}\n")
    scenario = it.check(Scenario)
    assert (scenario.seed, scenario.arrivals.rate_per_s) == (3, 2.5)
    assert it.lines[("arrivals", "rate_per_s")] == 3
    assert it.lines[("compare", 0, "policy", "batch")] == 5
    assert it.check(Arrivals, at=("arrivals",)).rate_per_s == 2.5


def test_plain_words_are_read_as_yaml_1_2_does(tmp_path: Path) -> None:
    text = """
a: 1e6
b: 1e-3
c: 1_000
d: .5
e: on
f: no
off: y
g: true
h: 2026-01-02
i: 1:30
j: ~
k: "1"
l: 0x10
m: -1.5E+3
n: 010
o: 1_0.5
p: <<
8: 1e6x
"""
    assert document(tmp_path, text).data == {
        "a": 1e6, "b": 1e-3, "c": 1000, "d": 0.5, "e": "on", "f": "no", "off": "y", "g": True,
        "h": "2026-01-02", "i": "1:30", "j": None,
        "k": "1", "l": 16, "m": -1500.0, "n": 10, "o": 10.5, "p": "<<", "8": "1e6x",
    }  # fmt: skip


def test_anchors_and_merges_copy(tmp_path: Path) -> None:
    it = document(tmp_path, "a: &a\n  x: 1\n  y: 2\nb:\n  <<: *a\n  y: 3\nc: *a\nd:\n  <<: [{z: 1}, *a]\n")
    assert it.data["b"] == {"y": 3, "x": 1}
    assert it.data["d"] == {"z": 1, "x": 1, "y": 2}
    assert (it.lines[("b", "x")], it.lines[("b", "y")]) == (2, 6)
    it.set(["c.x=9"])
    assert it.data["a"]["x"] == 1


def test_json_is_read_too(tmp_path: Path) -> None:
    it = document(tmp_path, '{\n\t"seed": 1,\n\t"arrivals": {"rate_per_s": 1E3}\n}\n', "s.json")
    assert it.check(Scenario).arrivals.rate_per_s == 1000
    assert it.lines[("arrivals",)] == 3
    assert document(tmp_path, '{"a": "\\ud83d\\ude00"}', "s.json").data == {"a": "😀"}
    with pytest.raises(BadInput, match=r"s\.json:2: not JSON: "):
        document(tmp_path, '{"a": 1,\n}', "s.json")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: x\n", "s.yaml:1: seed: must be a whole number (got 'x')"),
        ("seed: 1.5\n", "s.yaml:1: seed: must be a whole number (got 1.5)"),
        ("arrivals:\n  rate_per_s: fast\n", "s.yaml:2: arrivals.rate_per_s: must be a number (got 'fast')"),
        ("arrivals:\n  rate_per_s: 0\n", "s.yaml:2: arrivals.rate_per_s: must be above 0 (got 0)"),
        (
            "arrivals:\n  rate_per_s: .nan\n",
            "s.yaml:2: arrivals.rate_per_s: must be a finite number (got nan)",
        ),
        (
            "arrivals:\n  rate_per_s: -.inf\n",
            "s.yaml:2: arrivals.rate_per_s: must be a finite number (got -inf)",
        ),
        ("\narrivals:\n  kind: burst\n", "s.yaml:2: arrivals.rate_per_s: is required"),
        ("seed: 1\n", "s.yaml:1: arrivals: is required"),
        ("arrivals: 3\n", "s.yaml:1: arrivals: must be a mapping of keys to values (got 3)"),
        ("arrivals:\n", "s.yaml:1: arrivals: must be a mapping of keys to values (got None)"),
        ("compare: 3\n", "s.yaml:1: compare: must be a list (got 3)"),
        ("weights:\n  a: 1\n  b: x\n", "s.yaml:3: weights.b: must be a number (got 'x')"),
        ("trace: 5\n", "s.yaml:1: trace: must be text (got 5)"),
        ("trace: a.txt\n", "s.yaml:1: trace: must be a .csv file (got 'a.txt')"),
        (
            "arrivals:\n  rate_per_s: 1\n  rate_per_sec: 2\n",
            "s.yaml:3: arrivals.rate_per_sec: unknown key – did you mean 'rate_per_s'?",
        ),
        ("arrivals:\n  xyz: 2\n", "s.yaml:2: arrivals.xyz: unknown key – allowed: kind, rate_per_s"),
        ("sede: 2\n", "s.yaml:1: sede: unknown key – did you mean 'seed'?"),
        (
            "arrivals:\n  kind: poison\n",
            "s.yaml:2: arrivals.kind: must be one of 'poisson', 'burst' or 'uniform'"
            " – did you mean 'poisson'? (got 'poison')",
        ),
        ("blocks: many\n", "s.yaml:1: blocks: must be a whole number or 'auto' (got 'many')"),
        ("replicas: x\n", "s.yaml:1: replicas: must be a whole number or a list (got 'x')"),
        ("replicas:\n- 1\n- x\n", "s.yaml:3: replicas.1: must be a whole number (got 'x')"),
        ("router:\n  name: static\n  batch: 0\n", "s.yaml:3: router.batch: must be at least 1 (got 0)"),
    ],
)
def test_a_mistake_is_shown_at_its_line(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in complaints(tmp_path, text)


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("{name: static, batch: 0}", "compare.0.policy.batch: must be at least 1 (got 0)"),
        ("{name: static, bach: 1}", "compare.0.policy.bach: unknown key – did you mean 'batch'?"),
        ("{name: static, xyz: 1}", "compare.0.policy.xyz: unknown key – allowed: batch, name"),
        ("{name: vllm, vllm: x}", "compare.0.policy.vllm: must be a whole number (got 'x')"),
        ("{name: vllm, vllm: 0, budget: 0}", "compare.0.policy.budget: must be at least 1 (got 0)"),
        ("{name: vllm, budget: 3}", "compare.0.policy: budget must be even"),
        (
            "{name: statik}",
            "compare.0.policy.name: must be one of 'static', 'vllm' – did you mean 'static'? (got 'statik')",
        ),
        ("{batch: 1}", "compare.0.policy.name: is required"),
        ("static", "compare.0.policy: must be a mapping of keys to values (got 'static')"),
    ],
)
def test_a_tagged_union_shows_only_keys(tmp_path: Path, policy: str, problem: str) -> None:
    text = f"arrivals: {{rate_per_s: 1}}\ncompare:\n- policy:\n    {policy}\n"
    [shown] = complaints(tmp_path, text)
    assert shown.partition(": ")[2] == problem
    assert shown.startswith(("s.yaml:3: ", "s.yaml:4: "))


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
sede: 1
blocks: auto
arrivals:
  rate_per_s: -1
  kind: none
compare:
- policy: {name: static, batch: x}
- policy: {name: vllm}
- polcy: 1
"""
    assert complaints(tmp_path, text) == [
        "s.yaml:1: sede: unknown key – did you mean 'seed'?",
        "s.yaml:4: arrivals.rate_per_s: must be above 0 (got -1)",
        "s.yaml:5: arrivals.kind: must be one of 'poisson', 'burst' or 'uniform' (got 'none')",
        "s.yaml:7: compare.0.policy.batch: must be a whole number (got 'x')",
        "s.yaml:9: compare.2.policy: is required",
        "s.yaml:9: compare.2.polcy: unknown key – did you mean 'policy'?",
    ]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "seed: 1\na:\n  x: 1\n  x: 2\nseed: 2\n",
            [
                "s.yaml:4: a.x: duplicate key, first given on line 3",
                "s.yaml:5: seed: duplicate key, first given on line 1",
            ],
        ),
        ("", ["s.yaml: is empty: expected keys and values"]),
        ("# nothing\n", ["s.yaml: is empty: expected keys and values"]),
        ("\n- 1\n", ["s.yaml:2: must hold keys and values at its top level (got [1])"]),
        ("seed\n", ["s.yaml:1: must hold keys and values at its top level (got 'seed')"]),
        (
            "a: !!python/object/apply:os.system ['true']\nb: !mine 3\n",
            [
                "s.yaml:1: a: tag !!python/object/apply:os.system is not allowed here",
                "s.yaml:2: b: tag !mine is not allowed here",
            ],
        ),
        ("a: !!int x\n", ["s.yaml:1: a: tag !!int is not allowed here (got 'x')"]),
        ("? [1, 2]\n: x\n", ["s.yaml:1: a key must be text"]),
        ("a: &a\n  b: *a\n", ["s.yaml:1: an alias must not refer to what it stands in"]),
        ("a: *b\n", ["s.yaml:1: not YAML: found undefined alias 'b'"]),
        ("a:\n  <<: 3\n", ["s.yaml:2: a: << must be given a mapping"]),
        ("a: 1\n---\na: 2\n", ["s.yaml:2: not YAML: but found another document"]),
        ("a: \x07\n", ["s.yaml:1: not YAML: a control character (got '\\x07')"]),
        ("a: " + "9" * 5000, ["s.yaml:1: a: must be a number of reasonable size"]),
        ('a: "\\U99999999"', ["s.yaml: not YAML: an escape that names no character"]),
        ("a: " + "[" * 5000, ["s.yaml: is nested too deeply"]),
    ],
)  # fmt: skip
def test_a_document_that_cannot_be_read(tmp_path: Path, text: str, problems: list[str]) -> None:
    assert complaints(tmp_path, text) == problems


def test_syntax_errors_name_their_line(tmp_path: Path) -> None:
    [tab] = complaints(tmp_path, "a: 1\nb:\n\tc: 2\n")
    assert tab.startswith("s.yaml:3: not YAML: ")
    assert tab.endswith("; indent with spaces, not tabs")
    [bracket] = complaints(tmp_path, "a: 1\nb: [1, 2\nc: 3\n")
    assert bracket.startswith("s.yaml:3: not YAML: ")


def test_aliases_cannot_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    [problem] = complaints(tmp_path, "\n".join(lines))
    assert "must hold at most 200000 values" in problem


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml: no such file$"):
        read(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="is a folder, not a file"):
        read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(BadInput, match=r"latin\.yaml:2: must be UTF-8 text \(got b'\\xe9'\)"):
        read(tmp_path / "latin.yaml")


def test_set_changes_values_and_makes_mappings(tmp_path: Path) -> None:
    it = document(tmp_path, "seed: 1\ncompare:\n- policy: {name: static}\n")
    it.set(["seed=2", "arrivals.rate_per_s=1e3", "compare.0.policy.batch=4", "weights={a: 1}", "trace=x=y.csv"])
    scenario = it.check(Scenario)
    assert (scenario.seed, scenario.arrivals.rate_per_s, scenario.trace) == (2, 1000, "x=y.csv")
    assert scenario.compare[0].policy.model_dump() == {"name": "static", "batch": 4}
    assert scenario.weights == {"a": 1}
    it.set(["trace="])
    assert it.check(Scenario).trace is None


def test_a_mistake_of_an_override_names_the_option(tmp_path: Path) -> None:
    text = "seed: x\narrivals:\n  rate_per_s: 1\ncompare:\n- policy: {name: static}\n"
    assert complaints(tmp_path, text, "compare.0.policy.batch=0", "arrivals.knd=burst") == [
        "s.yaml:1: seed: must be a whole number (got 'x')",
        "--set arrivals.knd=burst: arrivals.knd: unknown key – did you mean 'kind'?",
        "--set compare.0.policy.batch=0: compare.0.policy.batch: must be at least 1 (got 0)",
    ]
    assert complaints(tmp_path, "seed: 1\n", "arrivals.kind=burst") == [
        "--set arrivals.kind=burst: arrivals.rate_per_s: is required"
    ]
    assert complaints(tmp_path, text, "seed=1", "arrivals={rate_per_s: x}") == [
        "--set arrivals={rate_per_s: x}: arrivals.rate_per_s: must be a number (got 'x')"
    ]
    assert complaints(tmp_path, "arrivals:\n  rate_per_s: 1\n", "seed=y", "seed=z") == [
        "--set seed=z: seed: must be a whole number (got 'z')"
    ]


@pytest.mark.parametrize(
    ("assignment", "rule"),
    [
        ("seed", "must be KEY=VALUE, such as policy.batch=8"),
        ("=3", "must be KEY=VALUE, such as policy.batch=8"),
        ("a..b=3", "must be KEY=VALUE, such as policy.batch=8"),
        ("compare.1.policy=x", "index 1 is out of range: compare has 1 item"),
        ("compare.-1=x", "compare is a list: '-1' must be an index from 0 to 0"),
        ("compare.first.policy=x", "compare is a list: 'first' must be an index from 0 to 0"),
        ("seed.x=1", "seed is not a mapping or a list, so has no 'x'"),
        ("seed=!!python/none x", "tag !!python/none is not allowed here"),
    ],
)
def test_a_set_that_cannot_be_applied(tmp_path: Path, assignment: str, rule: str) -> None:
    it = document(tmp_path, "seed: 1\ncompare:\n- policy: {name: static}\n")
    with pytest.raises(BadInput) as caught:
        it.set(["seed=5", assignment, "compare.9=1"])
    assert [str(problem) for problem in caught.value.problems] == [
        f"--set {assignment}: {rule}",
        "--set compare.9=1: index 9 is out of range: compare has 1 item",
    ]
    assert it.data["seed"] == 1


@pytest.mark.parametrize("value", ["[1", "@x", "*x", "{a: 1, a: 2}", "[" * 5000])
def test_a_set_whose_value_is_not_yaml(tmp_path: Path, value: str) -> None:
    it = document(tmp_path, "seed: 1\n")
    with pytest.raises(BadInput, match="--set seed="):
        it.set([f"seed={value}"])


@dataclass
class Settings:
    """A policy's own settings, as users write them."""

    budget: Annotated[int, Field(ge=1)] = 2048
    long_prefill: float = 0.5

    __pydantic_config__ = ConfigDict(extra="forbid")


def test_settings_of_a_dataclass_are_checked_where_they_stand(tmp_path: Path) -> None:
    it = document(tmp_path, "compare:\n- policy:\n    budget: 0\n    long_prefil: 1\n")
    at = ("compare", 0, "policy")
    expected = [
        "s.yaml:3: compare.0.policy.budget: must be at least 1 (got 0)",
        "s.yaml:4: compare.0.policy.long_prefil: unknown key – did you mean 'long_prefill'?",
    ]
    with pytest.raises(BadInput) as caught:
        it.check(Settings, at=at)
    assert list(map(str, caught.value.problems)) == expected
    with pytest.raises(ValidationError) as error:
        TypeAdapter(Settings).validate_python(it.value(at))
    assert list(map(str, problems_from(error.value, it, Settings, at=at))) == expected


def test_a_rule_no_model_can_state_is_located(tmp_path: Path) -> None:
    it = document(tmp_path, "seed: 1\narrivals:\n  rate_per_s: 2\n")
    assert str(it.problem(("arrivals", "kind"), "is odd", 3)) == "s.yaml:2: arrivals.kind: is odd (got 3)"
