"""What a fit takes for kernels of a size, and what for launches by worker processes, worked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from chairlift.backend.calibrated.profile import GpuTime, HostTime, Sizes
from chairlift.backend.fitting.fit import _sizes
from chairlift.backend.fitting.residuals import by_workers, on_gpu
from chairlift.backend.fitting.steps import EAGER, GRAPH, PIECEWISE, Floats, Steps, launch_times, predicted

GPU = GpuTime(
    weights_s=4e-3,
    token_s=20e-6,
    sharpness=3.0,
    sequence_s=0.0,
    kv_s=0.0,
    kv_mixed_s=0.0,
    pair_s=0.0,
    chunk_s=1e-3,
    request_s=0.0,
)
WORKERS = HostTime(
    schedule_s=0.0,
    schedule_request_s=0.0,
    schedule_token_s=0.0,
    update_s=0.0,
    update_request_s=0.0,
    arrival_s=0.0,
    arrival_token_s=0.0,
    graph_s=2e-3,
    piecewise_s=0.5e-3,
    eager_s=0.5e-3,
    tail_s=14.5e-3,
    head_s=3e-3,
)


def steps(computed: list[int], kind: list[int], **columns: Any) -> Steps:
    """Steps of one run, each with a chunk unless it is a graph of decodes."""
    n = len(computed)
    made: dict[str, Any] = {name: np.zeros(n) for name in Steps.__dataclass_fields__}
    made |= {name: np.zeros(n, dtype=bool) for name in ("served", "first", "last", "woke", "stalled")}
    made |= {"gpu": np.full(n, np.nan), "launch": np.full(n, np.nan)}
    made |= {"experiment": np.zeros(n, dtype=np.int64), "kind": np.array(kind), "computed": np.array(computed, float)}
    made |= {"chunks": (np.array(kind) != GRAPH).astype(float), "decodes": np.ones(n)}
    return Steps(**made | columns)


def timed(computed: list[int], longer: list[float]) -> tuple[Steps, Floats]:
    """Steps whose GPU time was measured; their matmuls took so many times as long as those of `GPU`."""
    of = steps(computed, [PIECEWISE] * len(computed))
    gpu = predicted(GPU, of) + (np.array(longer) - 1) * GPU.chunk_matmuls(of.computed)
    return replace(of, gpu=gpu, launch=np.full(len(computed), 1e-3)), np.full((1, 3), 1e-3)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ((), {448: 1.3}),
        # of 432 two steps are too few to tell, of 464 all four say that it is as usual, and 16 was not seen
        (((16, 0.9), (432, 1.2), (464, 1.4)), {16: 0.9, 432: 1.2, 448: 1.3}),
    ],
)
def test_a_size_has_kernels_of_its_own_where_enough_of_its_steps_clearly_say_so(
    known: Sizes, found: dict[int, float]
) -> None:
    noise = [0.99, 1.0, 1.0, 1.01]
    longer = [*noise, *(1.3 * each for each in noise), 1.3, 1.3, *(0.03 + each for each in noise)]
    measured, launch = timed([416] * 4 + [448] * 4 + [432] * 2 + [464] * 4, longer)

    assert dict(_sizes(GPU, measured, launch, known)) == pytest.approx(found, rel=1e-6)


def test_a_size_whose_steps_differ_as_much_as_from_others_is_no_case_of_its_own() -> None:
    noise = [0.8, 0.95, 1.05, 1.2]
    measured, launch = timed([416] * 4 + [448] * 4, [*noise, *(0.1 + each for each in noise)])

    assert _sizes(GPU, measured, launch, ()) == ()


def test_no_output_waits_for_a_launch_by_workers() -> None:
    # decodes, and a prompt behind them whose step was scheduled at 6 ms; the decodes' output came 9 ms later than the
    # GPU's 5 ms foresee. One process would have launched for 13 ms until then.
    run = steps(
        [8, 8, 512],
        [GRAPH, GRAPH, PIECEWISE],
        schedule=np.array([0.0, 1e-3, 6e-3]),
        done=np.array([5e-3, 19e-3, 34e-3]),
        first=np.array([True, False, False]),
        last=np.array([False, False, True]),
    )
    gpu_s = np.array([5e-3, 5e-3, 14e-3])

    for eager_s, rows in ((18e-3, [2]), (0.5e-3, [])):
        found, seconds = launch_times(run, gpu_s, np.array([[2.3e-3, 8e-3, eager_s]]))
        assert found.tolist() == rows
        assert seconds.tolist() == pytest.approx([13e-3] * len(rows))


def test_steps_that_workers_are_not_done_launching_tell_nothing_of_the_gpu() -> None:
    # by `GPU` 512 tokens take ∛(4³ + 10.24³) + 1 = 11.4 ms, 1024 take 21.5 and 8192 165; workers launch in pieces of
    # graphs in 15 ms, kernel by kernel in 90
    profile = replace(GPU, eager_floor_s=90e-3)
    cases = [
        (8, GRAPH, False, False),  # decodes alone: a graph
        (512, PIECEWISE, False, False),  # behind them: launched meanwhile
        (512, PIECEWISE, False, True),  # behind a step that was launched alike: 11.4 < 15
        (1024, EAGER, False, True),  # 21.5 < 90
        (8192, EAGER, False, False),  # 165 > 1.15 · 90
        (512, PIECEWISE, True, True),  # on an idle engine: 3 + 11.4 < 15
    ]
    run = steps([case[0] for case in cases], [case[1] for case in cases], woke=np.array([case[2] for case in cases]))

    assert by_workers(profile, WORKERS, run).tolist() == [case[3] for case in cases]
    assert not by_workers(profile, replace(WORKERS, eager_s=26e-3), run).any()  # its own process launches


def test_errors_of_gpu_times_leave_launches_by_workers_out() -> None:
    profile = replace(GPU, eager_floor_s=90e-3)
    ends = np.array([5.0, 16.4, 110.0, 275.0]) * 1e-3  # the third took its launch, the last 165 ms of the GPU
    run = steps(
        [8, 512, 1024, 8192],
        [GRAPH, PIECEWISE, EAGER, EAGER],
        schedule=np.array([-1.0, 0.0, 5.5, 17.0]) * 1e-3,
        done=ends,
        first=np.array([True, False, False, False]),
        last=np.array([False, False, False, True]),
    )

    shown = on_gpu(profile, WORKERS, run)

    assert shown.recorded.tolist() == pytest.approx([11.4e-3, 165e-3])
    assert shown.error.tolist() == pytest.approx([0.0, 0.0], abs=0.01)


@pytest.mark.parametrize(("took_ms", "tells"), [(36, False), (50, False), (55, True), (172, True)])
def test_on_an_idle_engine_a_step_tells_of_the_gpu_only_where_no_launch_takes_so_long(
    took_ms: int, tells: bool
) -> None:
    """Launches take 30 ms, and in a slow spell of the host 48; 52.5 = 1.75 x 30 ms are none. The GPU waits for 3."""
    one = replace(WORKERS, piecewise_s=8e-3, eager_s=30e-3, tail_s=0.0)
    both = np.ones(2, dtype=bool)
    run = steps(
        [1024, 1024],
        [EAGER, EAGER],
        schedule=np.array([0.0, 1.0]),
        done=np.array([0.0, 1.0]) + took_ms / 1e3,
        first=np.array([True, False]),
        last=np.array([False, True]),
        woke=both,
    )

    assert on_gpu(GPU, one, run).recorded.tolist() == pytest.approx([(took_ms - 3) / 1e3] * 2 * tells)
