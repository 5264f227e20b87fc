"""What pydantic found wrong, in a user's words: where in the document, which rule, which value."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from chairlift.sim.bad_input import MOST_TOLD, NOTHING, did_you_mean

Path = tuple[str | int, ...]  # keys and list indices from the top of a document


class Complaint(NamedTuple):
    """One broken rule and its place in the document. The line of that place is not known here."""

    path: Path
    rule: str
    value: object = NOTHING
    absent: bool = False  # nothing stands at ``path``; its parent is the place to show


def complaints(error: ValidationError, model: Any, data: object) -> list[Complaint]:
    """Every mistake in ``error``, which validating ``data`` as ``model`` (a type, or None: unknown) raised.

    pydantic's locations also name union members and validators; here only real keys and indices are left.
    A value that fits no member of a union gives one complaint, or those of the member it is nearest to.
    """
    settled = _settle([_Found(e, _steps(e, data)) for e in error.errors(include_url=False)], 0)
    return [_complaint(found, model, data, hint=i < MOST_TOLD) for i, found in enumerate(settled)]


class _Step(NamedTuple):
    part: str | int
    real: bool  # a key or an index, not the name of a union member or validator


class _Found(NamedTuple):
    error: ErrorDetails
    steps: tuple[_Step, ...]
    also: tuple[ErrorDetails, ...] = ()  # the same value as other members of a union see it

    @property
    def path(self) -> Path:
        return tuple(step.part for step in self.steps if step.real)


_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_OWN_WORDS = ("value_error", "assertion_error")


def _steps(error: ErrorDetails, data: object) -> tuple[_Step, ...]:
    """Tell keys from names pydantic put in: of all readings of the location, the one that leads to the input.

    A name may coincide with a key (a union tagged ``vllm`` around a mapping with a key ``vllm``), so being
    there is not enough.
    """
    location = error["loc"]
    last = location[-1:] if error["type"] in _MISSING else ()
    body = location[:-1] if last else location
    here = data
    for part in body:  # mostly every part is real
        here = _child(here, part)
    if here is error["input"]:
        return tuple(_Step(part, True) for part in location)

    def readings(here: object, at: int) -> Iterable[tuple[bool, tuple[_Step, ...]]]:
        if at == len(body):
            yield here is error["input"], ()
            return
        part = body[at]
        if (below := _child(here, part)) is not NOTHING:
            for right, steps in readings(below, at + 1):
                yield right, (_Step(part, True), *steps)
        if isinstance(part, str):
            for right, steps in readings(here, at + 1):
                yield right, (_Step(part, False), *steps)

    def merit(reading: tuple[bool, tuple[_Step, ...]]) -> tuple[bool, int, list[bool]]:
        right, steps = reading
        real = [step.real for step in steps]
        return right, sum(real), real[::-1]  # names stand before the key they concern

    best = max(readings(data, 0), key=merit, default=None)
    steps = best[1] if best else tuple(_Step(part, True) for part in body)
    return steps + tuple(_Step(part, True) for part in last)


def _child(here: object, part: str | int) -> object:
    if isinstance(here, Mapping):
        return here.get(part, NOTHING)
    if isinstance(here, Sequence) and not isinstance(here, str) and isinstance(part, int) and part < len(here):
        return here[part]
    return NOTHING


def _settle(found: list[_Found], start: int) -> list[_Found]:
    """``found`` with one account for each union in the place of one for each of the union's members.

    Steps before ``start`` are settled already. Of a value that is a mapping with a wrong key, say, the members that
    take mappings complain about the key and the others about the kind of value; the account of the former is kept.
    """
    unions: dict[tuple[_Step, ...], dict[str | int, list[_Found]]] = {}
    plain: list[_Found] = []
    for one in found:
        tag = next((i for i in range(start, len(one.steps)) if not one.steps[i].real), None)
        if tag is None:
            plain.append(one)
        else:
            unions.setdefault(one.steps[:tag], {}).setdefault(one.steps[tag].part, []).append(one)
    for prefix, members in unions.items():
        accounts = [_settle(member, len(prefix) + 1) for member in members.values()]
        depth = sum(step.real for step in prefix)

        def distance(account: list[_Found], depth: int = depth) -> tuple[int, int]:
            if all(one.error["type"] in _OWN_WORDS for one in account):
                return 0, len(account)  # the shape fits
            return (1 if all(len(one.path) > depth for one in account) else 2), len(account)

        nearest = min(accounts, key=distance)
        if distance(nearest)[0] < 2:
            plain += nearest
        else:  # no member takes a value of this kind: "must be a whole number or 'auto'"
            every = [one for account in accounts for one in account]
            plain.append(every[0]._replace(also=tuple(one.error for one in every[1:])))
    return plain


def _complaint(found: _Found, model: Any, data: object, hint: bool = True) -> Complaint:
    """``hint``: look for the key that an unknown one may be meant for, which takes its time."""
    error, path = found.error, found.path
    kind, value = error["type"], error["input"]
    if kind in _MISSING:
        return Complaint(path, "is required", absent=True)
    if kind in _UNKNOWN:
        if not hint:
            return Complaint(path, "unknown key")
        names = _names_at(model, path[:-1], data)
        return Complaint(path, "unknown key" + (did_you_mean(str(path[-1]), names) or " – allowed: none"))
    if kind.startswith("union_tag"):
        context = error.get("ctx", {})
        key = str(context.get("discriminator", "")).strip("'")
        if key.isidentifier():
            path += (key,)
        if kind == "union_tag_not_found":
            return Complaint(path, "is required", absent=True)
        return Complaint(path, _one_of(str(context["expected_tags"]), context["tag"]), context["tag"])
    rules = list(dict.fromkeys(_rule(each) for each in (error, *found.also)))
    rule = " or ".join([rules[0], *(other.removeprefix("must be ") for other in rules[1:])])
    if kind in _OWN_WORDS and isinstance(value, (Mapping, list)):
        return Complaint(path, rule)  # about several keys: the text says which
    return Complaint(path, rule, value)


_RULES: dict[str, str | Callable[[dict[str, Any]], str]] = {
    "greater_than": lambda c: f"must be above {_plain(c['gt'])}",
    "greater_than_equal": lambda c: f"must be at least {_plain(c['ge'])}",
    "less_than": lambda c: f"must be below {_plain(c['lt'])}",
    "less_than_equal": lambda c: f"must be at most {_plain(c['le'])}",
    "multiple_of": lambda c: f"must be a multiple of {c['multiple_of']}",
    "finite_number": "must be a finite number",
    "too_short": lambda c: f"must have at least {c['min_length']} item{'s' * (c['min_length'] != 1)}",
    "too_long": lambda c: f"must have at most {c['max_length']} item{'s' * (c['max_length'] != 1)}",
    "string_too_short": lambda c: f"must have at least {c['min_length']} character{'s' * (c['min_length'] != 1)}",
    "string_too_long": lambda c: f"must have at most {c['max_length']} character{'s' * (c['max_length'] != 1)}",
    "string_pattern_mismatch": lambda c: f"must match {c['pattern']}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("string_type", "path_type"), "must be text"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "must be a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"),
        "must be a mapping of keys to values",
    ),
    "none_required": "must be empty",
}


def _rule(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] in _OWN_WORDS:
        return str(context["error"])
    if error["type"] in ("literal_error", "enum"):
        return _one_of(str(context["expected"]), error["input"])
    rule = _RULES.get(error["type"])
    if rule is None:
        text = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
        return text[:1].lower() + text[1:]
    return rule if isinstance(rule, str) else rule(context)


def _plain(bound: object) -> object:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound  # "above 0", not "above 0.0"


def _one_of(expected: str, value: object) -> str:
    """``expected`` as pydantic writes it: ``'a', 'b' or 'c'``."""
    several = "', '" in expected or "' or '" in expected or " or " in expected
    hint = did_you_mean(value, expected.split("'")[1::2]) if isinstance(value, str) else ""
    return f"must be {'one of ' * several}{expected}" + (hint if "did you mean" in hint else "")


def _names_at(model: Any, path: Path, data: object) -> list[str]:
    """The keys that may stand in the mapping at ``path``, over all members of unions on the way."""
    kinds = _members(model, data)
    for part in path:
        data = _child(data, part)
        kinds = [member for kind in kinds for below in _below(kind, part) for member in _members(below, data)]
    return list(dict.fromkeys(name for kind in kinds for name in _fields(kind)))


def _members(kind: Any, data: object) -> list[Any]:
    """The types that ``kind`` stands for, without Annotated: itself, or the members of a union.

    Members of a tagged union whose tag is not that of ``data`` are left out.
    """
    kind = getattr(kind, "__value__", kind)  # a type alias
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _members(typing.get_args(kind)[0], data)
    if origin is not typing.Union and origin is not types.UnionType:
        return [kind]
    members = [member for arg in typing.get_args(kind) for member in _members(arg, data)]
    return [member for member in members if _tagged(member, data)] or members


def _tagged(kind: Any, data: object) -> bool:
    return all(
        typing.get_origin(annotation) is not typing.Literal or _child(data, name) in typing.get_args(annotation)
        for name, annotation in _fields(kind).items()
        if _child(data, name) is not NOTHING
    )


def _fields(kind: Any) -> dict[str, Any]:
    """Key → annotation of a pydantic model or a dataclass; empty for anything else."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return {}


def _below(kind: Any, part: str | int) -> list[Any]:
    args = typing.get_args(kind)
    if fields := _fields(kind):
        return [fields[part]] if part in fields else []
    if isinstance(part, str):
        return [args[1]] if len(args) == 2 else []  # a mapping's values
    if typing.get_origin(kind) is tuple and Ellipsis not in args:
        return [args[part]] if part < len(args) else []
    return [args[0]] if args else []
