"""When a step's end tells of the GPU, and when of the launch of the step after it or of a host kept busy, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chairlift.backend.fitting.steps import EAGER, GRAPH, PIECEWISE, Steps, Waits, chunk_times


def run(kinds: list[int], schedule_ms: list[float], done_ms: list[float], drafts: int) -> Steps:
    """Steps without rests between them, which take no time to schedule; each of them verifies so many drafts.

    All but graphs have a chunk.
    """
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
        "chunks": (np.array(kinds) != GRAPH).astype(float),
        "gpu": np.full(n, np.nan),
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


@pytest.mark.parametrize(
    ("done_ms", "left_ms", "told_ms"),
    [
        (43.0, 20.0, [23.0]),
        (45.0, 18.0, [25.0]),  # decodes differ by as much
        (46.0, 17.0, []),  # decodes of 20 ms are done 17 ms later, so the chunk was computed before 46 ms
        (46.0, 20.0, [26.0]),
    ],
)
def test_an_output_that_comes_late_does_not_tell_when_the_gpu_ended(
    done_ms: float, left_ms: float, told_ms: list[float]
) -> None:
    """Decodes take 20 ms. A chunk's launch takes 8, and that of decodes 2.3, both while the step before runs."""
    kinds = [GRAPH, PIECEWISE, GRAPH, GRAPH]
    steps = run(kinds, [0, 3, 22, done_ms + 2], [20, done_ms, done_ms + left_ms, done_ms + left_ms + 20], drafts=0)
    decode_s = np.where(steps.kind == GRAPH, 0.020, 0.0)

    rows, seconds, led = chunk_times(steps, decode_s, np.array([[0.0023, 0.008, 0.018]]))

    assert rows.tolist() == [1] * len(told_ms)
    assert (1e3 * seconds).tolist() == pytest.approx(told_ms)
    assert not led.any()
