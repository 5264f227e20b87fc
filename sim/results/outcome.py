"""What one run leaves behind: what tables, reports, recordings and result folders are made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chairlift.sim.results.records import RequestRecords, RunRecords
from chairlift.sim.study import Setup


@dataclass
class Outcome:
    """What one run left behind."""

    setup: Setup
    requests: RequestRecords
    runs: list[RunRecords]  # one a replica
    summary: dict[str, Any]
    assumptions: dict[str, str]
    engine: dict[str, str] = field(default_factory=dict)  # of an executed run: the GPU and the software
