"""Chairlift replays LLM request traces against serving schedulers, modelled or on a real GPU.

What a script or a policy file needs is here::

    from chairlift import load, simulate            # run a scenario
    from chairlift import plot_latency              # draw what came of it; also plot_throughput, plot_over_time, …
    from chairlift import Scheduler, Step, Request  # write a policy

``load(path, assignments=())`` reads a scenario file into a `Study`; ``simulate(setup)`` runs one of its `Setup` objects
and returns an `Outcome`, with ``summary``, ``to_arrow()`` and ``to_pandas()``. ``plot_latency``, ``plot_throughput``,
``plot_over_time``, ``plot_memory`` and ``plot_work`` draw outcomes as plotly figures. `BadInput` says what is wrong
with a file. `Scheduler`, `Router` and `Backend` are the contracts of policies, routers and cost models; `Step`,
`Request`, `Batch` and `StepCost` are what those are given and return.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for true, as they take that of `typing`, whose import takes time
if TYPE_CHECKING:
    from chairlift.backend.base import Backend, Batch, StepCost
    from chairlift.policies.base import Request, Router, Scheduler, Step
    from chairlift.sim.bad_input import BadInput
    from chairlift.sim.report.plots import plot_latency, plot_memory, plot_over_time, plot_throughput, plot_work
    from chairlift.sim.results.outcome import Outcome
    from chairlift.sim.scenario.load import load
    from chairlift.sim.simulate import simulate
    from chairlift.sim.study import Setup, Study

__all__ = [
    "Backend",
    "BadInput",
    "Batch",
    "Outcome",
    "Request",
    "Router",
    "Scheduler",
    "Setup",
    "Step",
    "StepCost",
    "Study",
    "load",
    "plot_latency",
    "plot_memory",
    "plot_over_time",
    "plot_throughput",
    "plot_work",
    "simulate",
]

_HOMES = {  # where each name is defined; imported at its first use, so that a policy file loads no simulator
    "Backend": "backend.base",
    "BadInput": "sim.bad_input",
    "Batch": "backend.base",
    "Outcome": "sim.results.outcome",
    "Request": "policies.base",
    "Router": "policies.base",
    "Scheduler": "policies.base",
    "Setup": "sim.study",
    "Step": "policies.base",
    "StepCost": "backend.base",
    "Study": "sim.study",
    "load": "sim.scenario.load",
    "plot_latency": "sim.report.plots",
    "plot_memory": "sim.report.plots",
    "plot_over_time": "sim.report.plots",
    "plot_throughput": "sim.report.plots",
    "plot_work": "sim.report.plots",
    "simulate": "sim.simulate",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'chairlift' has no attribute {name!r}")
    from importlib import import_module  # here, so that the command (`__main__`) is ready for Ctrl-C the sooner

    value = getattr(import_module(f"chairlift.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
