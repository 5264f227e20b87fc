"""Workloads: a `Trace` is what arrives, as numpy columns; a `Workload` says in a scenario file where it comes from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sim import formats, named
from sim.arrivals import Arrivals
from sim.lengths import Lengths, Spec, Tokens
from sim.problems import BadInput, Problem, did_you_mean
from sim.streams import stream
