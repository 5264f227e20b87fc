"""Random streams: each purpose has a generator of its own, so that another policy never changes the workload."""

from __future__ import annotations

import numpy as np


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on nothing but the scenario's ``seed`` (>= 0) and the name of the ``purpose``.

    ``stream(0, "arrivals")`` and ``stream(0, "lengths")`` are independent. The same pair always gives the same draws:
    the generator is seeded by a NumPy ``SeedSequence`` whose spawn key is the name.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())))
