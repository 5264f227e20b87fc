"""Everything that can be reached from an object by its attributes: what a policy that looks around would find."""

from __future__ import annotations

import types
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

SKIPPED = (type, types.ModuleType, str, bytes, float, complex, type(None))
CONTAINERS = (list, tuple, set, frozenset, deque, Set)
CODE = ("__closure__", "__self__", "__func__", "__wrapped__", "__defaults__", "__kwdefaults__", "cell_contents")


def numbers(root: object) -> Iterator[tuple[int, str]]:
    """Every integer that can be reached from ``root``, and the path to it.

    Attributes of all kinds: slots, private ones, properties (which are asked), what bound methods are bound to, what
    functions close over. Classes and modules are left out: they are the same in every run.
    """
    seen: set[int] = set()
    kept: list[object] = []  # so that no id is used twice
    todo: list[tuple[object, str]] = [(root, "step")]
    while todo:
        found, path = todo.pop()
        if isinstance(found, (bool, *SKIPPED)):
            continue
        if isinstance(found, (int, np.integer)):
            yield int(found), path
            continue
        if id(found) in seen:
            continue
        seen.add(id(found))
        kept.append(found)
        if isinstance(found, (array, np.ndarray, range, bytearray)):
            yield from ((int(value), f"{path}[…]") for value in found if isinstance(value, (int, np.integer)))
            continue
        if isinstance(found, (Mapping, types.MappingProxyType)):
            todo += [(key, f"{path} key") for key in found]
            todo += [(value, f"{path}[{key!r:.20}]") for key, value in found.items()]
        elif isinstance(found, CONTAINERS) or type(found).__name__ in ("dict_values", "dict_items", "dict_keys"):
            todo += [(value, f"{path}[{i}]") for i, value in enumerate(found)]  # type: ignore[arg-type]
        todo += list(_attributes(found, path))


def _attributes(found: object, path: str) -> Iterator[tuple[Any, str]]:
    names = [name for name in dir(found) if not name.startswith("__")]
    for name in (*names, *CODE):
        try:
            value = getattr(found, name)
        except (AttributeError, ValueError):  # a slot or a cell without content
            continue
        yield value, f"{path}.{name}"
