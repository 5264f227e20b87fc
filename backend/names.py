"""What to say of a name that nobody knows: the nearest known one, or all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from re import findall


def hint(word: str, known: Iterable[str]) -> str:
    """``did you mean 'h100'?``, or ``known: a, b`` where no name is near; names that begin with ``word`` come first.

    Letters count as equal whatever their case. A model of another size is not meant.
    """
    names = {name.casefold(): name for name in reversed(list(known))}
    folded, size = word.casefold(), _size(word)
    alike = [name for name in reversed(names) if not size or _size(name) in ((), size)]
    begun = [name for name in reversed(names) if folded and name.startswith(folded)]
    near = get_close_matches(folded, begun or alike, n=1, cutoff=0.0 if begun else 0.5)
    return f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(reversed(names.values()))}"


def _size(name: str) -> tuple[str, ...]:
    """The sizes in a model's name: ``("30b", "3b")`` of ``qwen3-30b-a3b``."""
    return tuple(findall(r"\d+(?:\.\d+)?[bm](?![a-z0-9])", name.lower()))
