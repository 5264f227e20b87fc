"""Priority classes.

Source: fixed priorities with preemption, as `scheduling_policy: priority` of vLLM; the linear ageing is Kleinrock's
accumulating priority, *Naval Research Logistics Quarterly* 11, 1964.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chairlift.policies.base import NotNegativeFloat, Request
from chairlift.policies.preemptive import Preemptive

PS_PER_S = 10**12


@dataclass
class Priority(Preemptive):
    """The most urgent class first (smaller numbers, as in vLLM), displacing less urgent requests.

    It gives up the lower classes: without ageing they starve for as long as the upper ones fill the replica.
    """

    age_s: NotNegativeFloat | None = None  # a class is worth so much waiting; None: nothing makes up for a class

    def urgency(self, request: Request) -> Any:
        """Its class, or its arrival put off by ``age_s`` for every class."""
        if self.age_s is None:
            return request.priority
        return request.arrival + round(request.priority * self.age_s * PS_PER_S)
