"""What to say of a name that nobody knows: the nearest known one, or all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from re import findall


def hint(word: str, known: Iterable[str]) -> str:
    """``did you mean 'h100'?``, or ``known: a, b`` where no name is near; names that begin with ``word`` come first."""
    names = list(known)
    size = _size(word)
    alike = [name for name in names if not size or _size(name) in ((), size)]  # a model of another size is another
    begun = [name for name in names if word and name.startswith(word)]
    near = get_close_matches(word, begun or alike, n=1, cutoff=0.0 if begun else 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def _size(name: str) -> tuple[str, ...]:
    """The sizes in a model's name: ``("30b", "3b")`` of ``qwen3-30b-a3b``."""
    return tuple(findall(r"\d+(?:\.\d+)?[bm](?![a-z0-9])", name.lower()))
