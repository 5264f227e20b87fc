"""The command line, called from Python: what its tests share."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from chairlift.sim.cli import main as cli

SCENARIO = """\
model: opt-13b
gpu: a100-40gb
kv: {tokens: 4000}
max_model_len: 2048
policy: {name: vllm}
seed: 7
workload:
  requests: 30
  arrivals: {poisson: {rate_per_s: 2}}
  prompt_tokens: {uniform: {low: 10, high: 300}}
  output_tokens: {uniform: {low: 1, high: 50}}
"""

POLICY = """\
from dataclasses import dataclass

from chairlift import Scheduler, Step
from chairlift.policies.base import Positive


@dataclass
class Mine(Scheduler):
    \"\"\"Decode everybody; start as many as fit.\"\"\"

    budget: Positive = 2048

    def schedule(self, step: Step) -> int:
        room = self.budget - step.decodes
        step.decode_all()
        for request in list(step.waiting):
            if request.remaining > room or not step.admit(request, request.remaining, request.prompt_tokens + 60):
                break
            room -= request.prompt_tokens
        return 1
"""


ROUTER = """\
from dataclasses import dataclass

from chairlift import Request, Router
from chairlift.policies.base import Positive, Replicas


@dataclass
class Last(Router):
    \"\"\"The last replica, whatever its load.\"\"\"

    step: Positive = 1

    def route(self, request: Request, replicas: Replicas) -> int:
        return len(replicas.indices) - self.step
"""


@dataclass
class Result:
    """What one command came to."""

    status: int
    out: str
    err: str


def chairlift(*arguments: str) -> Result:
    """Run ``chairlift ARGUMENTS`` in this process, as the console script does. A traceback raises."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", ["chairlift", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Result(status, out.getvalue(), err.getvalue())


def replaced(old: str, new: str, text: str = SCENARIO) -> str:
    """``text`` with ``old``, which stands in it once, made ``new``."""
    assert text.count(old) == 1, old
    return text.replace(old, new)
