"""Which loop an engine runs, and that policies which are compared run the same one.

A synchronous engine plans a step once the step before has ended. An asynchronous one plans it a step ahead, so that the
GPU never waits for the plan. That is worth some percent of latency whatever the policy decides, so a comparison of
policies must not mix the two unawares. Some policies let a setting say it; `vllm` and `sglang` plan ahead by default,
as vLLM and SGLang do. Where another policy of the comparison plans no step ahead, `same_loop` takes that default back.
A policy whose setting is given keeps it: ``policy: {name: vllm, async_scheduling: true}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chairlift.policies.base import Scheduler
from chairlift.sim.scenario.plugins import fields
from chairlift.sim.study import Setup

# vLLM's and SGLang's names for it → the value with which no step is planned ahead
SETTINGS = {"async_scheduling": False, "disable_overlap_schedule": True}


def is_said(choice: Any) -> bool:
    """Whether ``choice``, what a scenario says of a policy, says which loop it runs."""
    return isinstance(choice, Mapping) and any(choice.get(name) is not None for name in SETTINGS)


def may_differ(policies: Sequence[tuple[type[Scheduler], Mapping[str, Any]]]) -> bool:
    """Whether some of ``policies``, classes with their settings, plan ahead and some do not."""
    return len({kind(**settings).asynchronous for kind, settings in policies}) > 1


def same_loop(setups: Sequence[Setup]) -> None:
    """Let ``setups``, which are compared, run the same loop as far as their policies leave it open."""
    groups = [group for setup in setups for group in setup.groups]
    if may_differ([(group.scheduler, group.scheduler_settings) for group in groups]):
        for setup in setups:
            synchronous(setup)


def synchronous(setup: Setup) -> None:
    """Let the policies of ``setup`` plan no step ahead, but for those whose settings say that they do."""
    for group in setup.groups:
        found = {name: value for name, value in SETTINGS.items() if name in fields(group.scheduler)}
        if not group.loop_is_said:
            group.scheduler_settings = {**group.scheduler_settings, **found}
