"""The fast part of ``make fuzz``: mutated files are read or refused, in time, and no misspelt key passes."""

from __future__ import annotations

import random

from fuzz import FILES, fuzz, misspelt


def test_no_mutation_is_a_traceback_a_hang_or_accepted_in_silence() -> None:
    told: list[str] = []

    counts = fuzz(40, 3, told.append)

    assert told == []
    assert set(counts) <= {"accepted", "refused"}
    assert counts["refused"] > 0 < counts["accepted"]


def test_a_misspelt_key_is_another() -> None:
    data = FILES["s.yaml"].encode()

    assert misspelt(data, random.Random(1)) != data
    assert misspelt(b"0.5,30,1\n", random.Random(1)) == b"0.5,30,1\n"
