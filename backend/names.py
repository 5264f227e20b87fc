"""What to say of a name that nobody knows: the nearest known one, or all of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def hint(word: str, known: Iterable[str]) -> str:
    """``did you mean 'h100'?``, or ``known: a, b`` where no name is near; names that begin with ``word`` come first.

    Letters count as equal whatever their case.
    """
    names = {name.casefold(): name for name in reversed(list(known))}
    folded = word.casefold()
    begun = [name for name in reversed(names) if folded and name.startswith(folded)]
    near = get_close_matches(folded, begun or list(reversed(names)), n=1, cutoff=0.0 if begun else 0.5)
    return f"did you mean {names[near[0]]!r}?" if near else f"known: {', '.join(reversed(names.values()))}"
