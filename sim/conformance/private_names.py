"""Private names of others in a source file: what a policy must not touch, found without running it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

PUBLIC_ALL_THE_SAME = {"_asdict", "_fields", "_getframe", "_make", "_replace"}  # of the standard library


def private_reads(kind: type[Any]) -> list[tuple[str, int, str]]:
    """``(file, line, name)`` of each ``x._name`` in the file of ``kind``.

    Those of ``self``, ``cls`` and ``super()`` are left out, and names that the file itself defines.
    """
    file = inspect.getsourcefile(kind)
    if file is None:
        return []
    tree = ast.parse(Path(file).read_bytes())
    own = {*_defined(tree), *PUBLIC_ALL_THE_SAME}
    return [
        (file, node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not _is_own(node.value)
        and node.attr not in own
    ]


def _is_own(value: ast.expr) -> bool:
    if isinstance(value, ast.Name):
        return value.id in ("self", "cls")
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"


def _defined(tree: ast.Module) -> list[str]:
    """Names that classes of the file give their objects, and functions and classes of the file."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            found.append(node.attr)
    return found
