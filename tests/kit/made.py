"""What the tests of traces and workloads share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chairlift.sim.workload.lengths import Lengths
from chairlift.sim.workload.spec import Workload
from chairlift.sim.workload.trace import Trace
from kit.places import TRACES

needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def lengths(spec: object) -> Lengths:
    return Lengths.model_validate(spec)


def trace(**columns: Any) -> Trace:
    return Trace(**({"arrival_ps": [0, 5, 9], "prompt_tokens": [7, 8, 9], "output_tokens": [1, 2, 3]} | columns))


def workload(**keys: Any) -> Workload:
    return Workload.model_validate(keys)


SYNTHETIC = {
    "requests": 50,
    "arrivals": {"poisson": {"rate_per_s": 4.0}},
    "prompt_tokens": 512,
    "output_tokens": {"exponential": {"mean": 128, "cap": 512}},
}
