"""Random streams: one independent generator per purpose, so that changing a policy never changes the workload."""

from __future__ import annotations

import numpy as np


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator that depends on the scenario's ``seed`` (>= 0) and the ``purpose``'s name alone.

    ``stream(0, "arrivals")`` and ``stream(0, "lengths")`` are independent; the same pair always gives the
    same draws (NumPy ``SeedSequence`` with the name as spawn key).
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())))
