"""Statistics of values that occur several times each, a million at a time: a long run has tens of millions of gaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from chairlift.sim.results.catalogue import PERCENTILES, STATISTICS

Values = npt.NDArray[Any]  # integers or floats
Counts = npt.NDArray[np.signedinteger]

AT_ONCE = 1 << 20  # values
_BINS = 1 << 16


def weighted_statistics(values: Values, often: Counts, unit: float = 1) -> list[float | None]:
    """The `STATISTICS` of ``values`` ÷ ``unit``, which occur ``often`` times each; None each where there are no values.

    Percentiles are linear between ranks, as NumPy's of the list written out: of the values 1 and 4 that occur 3 times
    and once (1, 1, 1, 4) the median is 1 and P90, at rank 0.9 · 3 = 2.7, is 1 + 0.7 · (4 - 1) = 3.1.
    """
    n = len(values)
    if n == 0:
        return [None] * len(STATISTICS)
    total = int(often.sum())
    mean = _total(lambda rows: values[rows] / unit * often[rows], 0, n) / total
    variance = _total(lambda rows: (values[rows] / unit - mean) ** 2 * often[rows], 0, n) / total
    ranks = [percent / 100 * (total - 1) for percent in PERCENTILES.values()]
    lower = [int(rank) for rank in ranks]
    found = at_ranks(values, often, np.array([*lower, *(min(low + 1, total - 1) for low in lower)])) / unit
    below, above = found[: len(ranks)].tolist(), found[len(ranks) :].tolist()
    between = [b + (a - b) * (rank - low) for b, a, rank, low in zip(below, above, ranks, lower, strict=True)]
    known = {"mean": mean, "std": float(np.sqrt(variance)), **dict(zip(PERCENTILES, between, strict=True))}
    return [known[statistic] for statistic in STATISTICS]


def at_ranks(values: Values, often: Counts, ranks: npt.NDArray[np.int64]) -> Values:
    """The values at ``ranks``, from 0, in the sorted list in which each of ``values`` stands ``often`` times.

    Sorting tens of millions of values takes several times their memory. So where there are many, they are counted in
    bins first, and only the bins that hold the ranks are looked into.
    """
    if len(values) <= AT_ONCE:
        order = np.argsort(values)
        last = np.cumsum(often[order]) - 1  # rank of the last copy of each value
        sought: Values = values[order[np.searchsorted(last, ranks)]]
        return sought
    low, high = values.min(), values.max()
    if low == high:
        return np.full(len(ranks), low)
    scale = (_BINS - 1) / float(high - low)

    def bins(rows: slice) -> npt.NDArray[np.intp]:
        places: npt.NDArray[np.intp] = ((values[rows] - low) * scale).astype(np.intp)
        return places  # they rise with the values, however the product is rounded

    pieces = [slice(begin, begin + AT_ONCE) for begin in range(0, len(values), AT_ONCE)]
    counts = sum(np.bincount(bins(rows), often[rows], _BINS) for rows in pieces)
    upto = np.cumsum(counts).astype(np.int64)  # ranks that lie in a bin or in those before it
    where = np.searchsorted(upto, ranks, side="right")
    found = np.empty(len(ranks), values.dtype)
    for place in np.unique(where).tolist():
        inside = np.concatenate([np.flatnonzero(bins(rows) == place) + rows.start for rows in pieces])
        mine = where == place
        before = upto[place - 1] if place else 0
        found[mine] = at_ranks(values[inside], often[inside], ranks[mine] - before)
    return found


def _total(values: Callable[[slice], npt.NDArray[np.float64]], begin: int, end: int) -> float:
    """The sum of what ``values`` says of the rows from ``begin`` to ``end``: as NumPy's of all at once, to the bit.

    NumPy too adds the sums of two halves, cut at a multiple of 8.
    """
    if end - begin <= AT_ONCE:
        return float(values(slice(begin, end)).sum())
    half = (end - begin) // 2
    half -= half % 8
    return _total(values, begin, begin + half) + _total(values, begin + half, end)
