"""Large inputs cost what their size says: twice the size, twice the time, and never more than some lines of output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario import yaml_document
from chairlift.sim.scenario.load import load
from chairlift.sim.scenario.yaml_document import read
from kit.command import SCENARIO, chairlift
from kit.places import ROOT

SIZES = (2_000, 16_000)
GROWTH = 3 * SIZES[1] / SIZES[0]  # a quadratic step would make it 64 times


def cpu(do: Callable[[], object]) -> float:
    started = time.process_time()
    do()
    return time.process_time() - started


def many(line: str, count: int) -> str:
    return "".join(line.replace("#", str(i)) for i in range(count))


LARGE: dict[str, tuple[str, str]] = {
    "unknown keys": ("", "key_#: 1\n"),
    "unknown keys below": ("slo:\n", "  key_#: 1\n"),
    "unknown keys of a policy": ("router:\n  name: round_robin\n", "  key_#: 1\n"),
    "one key again": ("", "seed: 1\n"),
    "items": ("baseline:\n", "- name_#\n"),
    "items of another kind": ("compare:\n", "- #\n"),
    "variants without a name": ("compare:\n", "- {note: a}\n"),
    "merged keys": ("provenance:\n  <<:\n", "    key_#: 1\n"),
}


@pytest.mark.parametrize("what", LARGE)
def test_what_is_wrong_with_a_large_file_is_told_in_linear_time(what: str, tmp_path: Path) -> None:
    head, line = LARGE[what]
    took = []
    for count in SIZES:
        path = tmp_path / f"{count}.yaml"
        path.write_text(SCENARIO + head + many(line, count))

        def told(path: Path = path) -> None:
            if what == "merged keys":
                load(path)
                return
            with pytest.raises(BadInput) as raised:
                load(path)
            assert len(raised.value.told()) <= 101
            assert str(raised.value).endswith(" more problems")

        took.append(cpu(told))
    assert took[1] < GROWTH * max(took[0], 0.1)


def test_many_mistakes_are_some_lines_and_their_number(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SCENARIO + many("key_#: 1\n", 250))
    result = chairlift("run", str(path))
    lines = result.err.splitlines()
    assert (result.status, len(lines)) == (2, 101)
    assert lines[0].startswith(f"error: {path}:12: key_0: unknown key – allowed: ")
    assert lines[100] == f"error: {path}: and 150 more problems"


@pytest.mark.parametrize("kind", ["compare", "cases"])
def test_many_variants_and_cases_are_read_and_written_in_linear_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = {"compare": "- {name: v#, max_model_len: 1#}\n", "cases": "- {name: v#, set: {max_model_len: 1#}}\n"}[kind]
    took = []
    few, more = 60, 480
    for count in (few, more):
        Path("s.yaml").write_text(SCENARIO.replace("requests: 30", "requests: 1") + f"{kind}:\n" + many(line, count))
        took.append(cpu(lambda: chairlift("run", "s.yaml", "-q")))
        assert len(json.loads(Path("runs/s/comparison.json").read_text())) == count
    assert took[1] < 2.5 * more / few * took[0]


# ---- the quick reader of YAML reads what PyYAML's own does ----


def plainly(text: str) -> object:
    reader = yaml_document._Reader()
    node = yaml.compose(text, yaml_document._Loader)
    return None if node is None else (reader.value(node, ()), reader.lines, reader.problems)


def quickly(text: str) -> object:
    reader = yaml_document._Reader()
    node = yaml.compose(text, yaml_document._Quick)
    return None if node is None else (reader.value(node, ()), reader.lines, reader.problems)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_both_read_every_shipped_file_alike() -> None:
    files = [*(ROOT / "scenarios").rglob("*.yaml"), *(ROOT / "backend").glob("*.yaml"), *ROOT.glob("tests/data/*.yaml")]
    assert len(files) > 40
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert quickly(text) == plainly(text), path


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=12,
)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
@given(data=VALUES, style=st.sampled_from([None, '"', "'", "|", ">"]), flow=st.sampled_from([None, True, False]))
def test_both_read_any_document_alike(data: object, style: str | None, flow: bool | None) -> None:
    text = yaml.safe_dump(data, default_style=style, default_flow_style=flow, allow_unicode=True)
    try:
        plain = plainly(text)
    except (yaml.YAMLError, yaml_document._Refused, ValueError):
        return  # PyYAML cannot read what it wrote, or a key stands twice: the words are PyYAML's either way
    assert quickly(text) == plain


def test_a_document_that_is_nested_too_deeply_ends_no_process(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for text in ("[" * 200_000, "{a: " * 200_000, "- " * 200_000, "a: " + "[" * 5_000 + "]" * 5_000):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"nested too deeply|not YAML"):
            read(path)
