"""When a step's end tells of the GPU and when of the launch of the step after it, worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chairlift.backend.fitting.steps import EAGER, GRAPH, Steps, Waits


def run(kinds: list[int], schedule_ms: list[float], done_ms: list[float], drafts: int) -> Steps:
    """Steps without rests between them, which take no time to schedule; each of them verifies so many drafts."""
    n = len(kinds)
    made: dict[str, Any] = {name: np.zeros(n) for name in Steps.__dataclass_fields__}
    made |= {name: np.zeros(n, dtype=bool) for name in ("first", "last", "woke", "stalled")}
    made["first"][0] = made["last"][-1] = True
    made |= {
        "experiment": np.zeros(n, dtype=np.int64),
        "kind": np.array(kinds),
        "schedule": np.array(schedule_ms) / 1e3,
        "done": np.array(done_ms) / 1e3,
        "drafts": np.full(n, float(drafts)),
    }
    return Steps(**made)


@pytest.mark.parametrize(
    ("before", "room_ms", "sure"),
    [
        (GRAPH, 6.2, True),  # behind decodes such launches differ little: 1.25 × 4.5 ms are enough
        (GRAPH, 5.5, False),
        (EAGER, 6.2, False),  # behind prompts the host may be in a slow spell: 6.2 ms after 4.5 are a launch's end
        (EAGER, 7.8, False),
        (EAGER, 8.0, True),  # 1.75 × 4.5 ms
    ],
)
def test_behind_prompts_a_launch_with_drafts_may_take_as_long_as_any(before: int, room_ms: float, sure: bool) -> None:
    steps = run([before, GRAPH, GRAPH], [0.0, 20.0, 40.0], [20.0 + room_ms, 50.0, 60.0], drafts=12)

    assert Waits.of(steps, np.array([[0.0045, 0.015, 0.033]])).sure.tolist() == [sure, True, True]
