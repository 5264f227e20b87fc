"""Read a YAML or JSON document and validate it, every mistake at once: ``file:line: path: rule (got value)``.

The YAML is read as YAML 1.2 does where 1.1 surprises: only ``true`` and ``false`` are booleans (``on``,
``off``, ``yes`` and ``no`` are text), ``1e6`` is a number, ``1:30`` and dates are text. Keys are text. No tag
makes it build anything but text, numbers, booleans, null, lists and mappings.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from chairlift.backend.checked import MOST_TEXT, text_of
from chairlift.sim.bad_input import NOTHING, BadInput, Problem, reading
from chairlift.sim.scenario.messages import Path, complaints

T = TypeVar("T")

NAMING = ("model", "gpu", "policy", "router", "backend")  # keys whose value is a name, perhaps with settings
MAX_NODES = 200_000  # values in a document, aliases counted as often as used: a bound against "billion laughs"


@dataclass
class Document:
    """A mapping read from a file, and where each of its values stands."""

    data: dict[str, Any]
    lines: dict[Path, int]  # 1-based line of each key (or list item)
    path: str  # of the file, as the user named it
    overrides: dict[Path, str] = field(default_factory=dict)  # what --set (or the like) put there, in words

    def set(self, assignments: Sequence[str], origin: str = "--set") -> None:
        """Apply ``--set`` options in order: ``policy.batch=8``, ``compare.0.name=fast``, ``loads=[1, 2]``.

        The value is YAML; an integer indexes a list; missing mappings are made. ``origin`` says in messages
        where the assignments come from. Raises BadInput with every one that cannot be applied, and then
        changes nothing.
        """
        after = self.copy()
        problems = []
        for text in assignments:
            try:
                after._assign(text, f"{origin} {text}")
            except _Refused as refusal:
                problems.append(Problem(str(refusal), file=f"{origin} {text}"))
        if problems:
            raise BadInput(problems)
        self.data, self.lines, self.overrides = after.data, after.lines, after.overrides

    def copy(self, without: str | None = None) -> Document:
        """A copy of its own, without the top-level key ``without``."""
        data, lines, overrides = self.data, dict(self.lines), dict(self.overrides)
        if without is not None:
            data = {key: value for key, value in data.items() if key != without}
            lines = {at: line for at, line in lines.items() if at[:1] != (without,)}
            overrides = {at: text for at, text in overrides.items() if at[:1] != (without,)}
        return Document(pickle.loads(pickle.dumps(data)), lines, self.path, overrides)

    def put(self, key: str, value: object, origin: str) -> None:
        """Let ``value`` stand at the top-level ``key``; ``origin`` says in messages where it came from."""
        self.data[key] = value
        self._overwrite((key,), origin)

    def check(self, model: type[T], data: object = NOTHING, at: Path = ()) -> T:
        """``data`` (default: what stands at ``at``) as a ``model``: a pydantic model, a dataclass, any type.

        Raises BadInput with all mistakes, in the order of their lines.
        """
        if data is NOTHING:
            data = self.value(at)
        try:
            checked: T = _adapter(model).validate_python(data)  # type: ignore[arg-type]  # a class is hashable
        except ValidationError as error:
            raise BadInput(problems_from(error, self, model, data, at)) from None
        return checked

    def value(self, at: Path) -> Any:
        """What stands at ``at``; KeyError or IndexError where nothing does."""
        here: Any = self.data
        for part in at:
            here = here[part]
        return here

    def problem(self, at: Path, rule: str, value: object = NOTHING) -> Problem:
        """A mistake at ``at`` with its file and line. It is for rules that no pydantic model can state."""
        file, line = self._origin(at)
        return Problem(rule, file, line, _dotted(at), value)

    def _origin(self, at: Path) -> tuple[str, int | None]:
        for length in range(len(at), -1, -1):
            if (text := self.overrides.get(at[:length])) is not None:
                return text, None
            if (line := self.lines.get(at[:length])) is not None:
                return self.path, line
        return self.path, None

    def _assign(self, text: str, origin: str) -> None:
        target, equals, source = text.partition("=")
        names = target.strip().split(".")
        if not equals or not all(names):
            raise _Refused("must be KEY=VALUE, such as policy.batch=8")
        self._place(names, _parse_value(source), origin)

    def assign(self, key: str, value: object, origin: str) -> None:
        """Let ``value`` stand at the dotted ``key``, as `set` does; ``origin`` says in messages where it came from.

        Raises BadInput if there is no such place.
        """
        try:
            self._place(key.split("."), value, origin)
        except _Refused as refusal:
            raise BadInput(Problem(str(refusal), file=origin)) from None

    def _place(self, names: list[str], value: object, origin: str) -> None:
        here: Any = self.data
        at: Path = ()
        for name in names[:-1]:
            part = _part(here, name, at)
            at += (part,)
            if part in NAMING and isinstance(here, dict) and isinstance(here.get(part), str):
                here[part] = {"name": here[part]}  # a name makes room for settings
                self._overwrite(at, origin)
            elif isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
                self._overwrite(at, origin)
            here = here[part]
        part = _part(here, names[-1], at)
        here[part] = value
        self._overwrite((*at, part), origin)

    def _overwrite(self, at: Path, text: str) -> None:
        for known in (self.lines, self.overrides):
            for path in [path for path in known if path[: len(at)] == at]:
                del known[path]
        self.overrides[at] = text


@cache
def _adapter(model: type[Any]) -> TypeAdapter[Any]:
    """What validates data as ``model``: its schema takes pydantic some ms, and a sweep checks each of its runs."""
    return TypeAdapter(model)


def read(path: FilePath) -> Document:
    """The document in the YAML or JSON file ``path``.

    Raises BadInput: no such file, not UTF-8, not YAML, not a mapping, duplicate keys, tags.
    """
    name = str(path)
    with reading(path):
        text = text_of(path, MOST_TEXT)
        if path.suffix == ".json":
            json.loads(text or "null")
    if path.suffix == ".json":
        text = text.replace("\t", " ")  # JSON may be indented with tabs, YAML may not; neither has them in strings
    try:
        node = _composed(text)
        if node is None:
            raise BadInput(Problem("is empty: expected keys and values", name))
        if not isinstance(node, yaml.MappingNode):
            raise BadInput(
                Problem(
                    "must hold keys and values at its top level",
                    name,
                    _line(node),
                    value=_Reader().value(node, ()),
                )
            )
        reader = _Reader()
        data = reader.value(node, ())
    except _Refused as refusal:
        raise BadInput(Problem(str(refusal), name, refusal.line)) from None
    except RecursionError:
        raise BadInput(Problem("is nested too deeply", name)) from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # the latter two: an escape such as "\U99999999" names no character
        raise BadInput(_syntax_problem(error, name, text)) from None
    if reader.problems:
        raise BadInput(problem._replace(file=name) for problem in reader.problems)
    return Document(data, reader.lines, name)


def problems_from(
    error: ValidationError, document: Document, model: Any = None, data: object = NOTHING, at: Path = ()
) -> list[Problem]:
    """``error``, raised on validating ``data`` (default: what stands at ``at``), as located problems.

    ``model``, the type validated against, gives the key names to suggest. Ordered by line; what ``--set``
    brought in comes last.
    """
    if data is NOTHING:
        data = document.value(at)
    problems = []
    for one in complaints(error, model, data):
        path = (*at, *one.path)
        file, line = document._origin(path[:-1] if one.absent else path)
        problems.append(Problem(one.rule, file, line, _dotted(path), one.value))
    return sorted(problems, key=lambda p: (p.line is None, p.line or 0))


class _Refused(Exception):
    """A document or an assignment that cannot be used, at ``line``."""

    def __init__(self, rule: str, line: int | None = None) -> None:
        super().__init__(rule)
        self.line = line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's idea of what a plain word is."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute


_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "int": (re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+"), "-+0123456789"),
    "float": (
        re.compile(
            r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
    "merge": (re.compile(r"<<"), "<"),
}
for _kind, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern.pattern})$"), list(_first))


if yaml.__with_libyaml__:

    class _Quick(yaml.composer.Composer, yaml.CSafeLoader):
        """The same loader with libyaml's events, ten times as fast. The tree is composed in Python, never in C, where a
        document that is nested too deeply would end the process.
        """

        yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

        def __init__(self, stream: str) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            yaml.composer.Composer.__init__(self)


def _composed(text: str) -> yaml.Node | None:
    """The tree of the one document in ``text``; what is wrong with it is said in the words of PyYAML's own parser."""
    if yaml.__with_libyaml__:
        with suppress(yaml.YAMLError, ValueError, OverflowError):
            return yaml.compose(text, _Quick)
    return yaml.compose(text, _Loader)


class _Reader:
    """Builds values from YAML nodes. It notes the line of each value, and collects mistakes."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self._told: set[tuple[str, int | None, str]] = set()
        self._nodes = 0

    def value(self, node: yaml.Node, at: Path, inside: tuple[int, ...] = ()) -> Any:
        self.lines.setdefault(at, _line(node))
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Refused(f"must hold at most {MAX_NODES} values, aliases counted as often as used", _line(node))
        if id(node) in inside:
            raise _Refused("an alias must not refer to what it stands in", _line(node))
        inside += (id(node),)
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, at, inside)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, (*at, index), inside) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            if kind == "str" or kind == "merge":
                return _whole_characters(node.value)
            if kind in _PLAIN and _PLAIN[kind][0].fullmatch(node.value):
                try:
                    return _scalar(kind, node.value)
                except ValueError:  # more digits than Python turns into an int
                    self._complain("must be a number of reasonable size", node, at)
                    return None
        tag = node.tag.replace(_TAG, "!!")
        value = node.value if isinstance(node, yaml.ScalarNode) and kind in _PLAIN else NOTHING
        self._complain(f"tag {tag} is not allowed here", node, at, value)
        return None

    def _mapping(self, node: yaml.MappingNode, at: Path, inside: tuple[int, ...]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key, below in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._complain("a key must be text", key, at)
            elif key.tag == _TAG + "merge":
                merged += below.value if isinstance(below, yaml.SequenceNode) else [below]
            elif key.value in first:
                rule = f"duplicate key, first given on line {first[key.value]}"
                self._complain(rule, key, (*at, key.value))
            else:
                first[key.value] = self.lines[(*at, key.value)] = _line(key)
                data[key.value] = self.value(below, (*at, key.value), inside)
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                self._complain("<< must be given a mapping", other, at)
                continue
            reader = _Reader()
            reader._nodes, reader.problems, reader._told = self._nodes, self.problems, self._told
            new = {name: value for name, value in reader.value(other, at, inside).items() if name not in data}
            data |= new
            depth = len(at)
            self.lines |= {p: n for p, n in reader.lines.items() if len(p) > depth and p[depth] in new}
            self._nodes = reader._nodes
        return data

    def _complain(self, rule: str, node: yaml.Node, at: Path, value: object = NOTHING) -> None:
        problem = Problem(rule, line=_line(node), path=_dotted(at), value=value)
        told = rule, problem.line, problem.path
        if told not in self._told:  # an alias is read as often as it is used
            self._told.add(told)
            self.problems.append(problem)


def _scalar(kind: str, text: str) -> bool | int | float | None:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    if kind == "int":
        return int(digits, {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10))
    return float(re.sub(r"\.(?=[inIN])", "", digits))  # .inf and .nan


def _whole_characters(text: str) -> str:
    """JSON writes a character beyond the first 65,536 as two escapes, which YAML takes for two characters."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _syntax_problem(error: Exception, file: str, text: str) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        said = getattr(error, "problem", None) or getattr(error, "context", None) or "syntax error"
        rule = f"not YAML: {said}"
        if "'\\t'" in rule:
            rule += "; indent with spaces, not tabs"
        return Problem(rule, file, int(mark.line) + 1)
    if not isinstance(error, yaml.YAMLError):
        return Problem("not YAML: an escape that names no character", file)
    position = getattr(error, "position", 0)  # a character that YAML does not allow at all
    line = text.count("\n", 0, position) + 1
    return Problem("not YAML: a control character", file, line, value=text[position : position + 1])


def _parse_value(source: str) -> Any:
    try:
        node = _composed(source)
        if node is None:
            return None
        reader = _Reader()
        value = reader.value(node, ())
    except RecursionError:
        raise _Refused("its value is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        said = getattr(error, "problem", None) or "an escape names no character"
        raise _Refused(f"its value is not YAML: {said}; quote text that has special characters") from None
    if reader.problems:
        raise _Refused(reader.problems[0].rule)
    return value


def _part(here: Any, name: str, at: Path) -> str | int:
    """The key or index that ``name`` is in ``here``, which stands at ``at``."""
    if isinstance(here, dict):
        return name
    where = _dotted(at)
    if not isinstance(here, list):
        raise _Refused(f"{where} is not a mapping or a list, so has no {name!r}")
    if not (name.isascii() and name.isdigit()):
        raise _Refused(f"{where} is a list: {name!r} must be an index from 0 to {len(here) - 1}")
    if int(name) >= len(here):
        raise _Refused(f"index {name} is out of range: {where} has {len(here)} item{'s' * (len(here) != 1)}")
    return int(name)
