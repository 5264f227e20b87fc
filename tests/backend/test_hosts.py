"""The host's floor under the roofline: as the shipped profiles say that it was measured, and never below it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chairlift.backend import hosts, specs
from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated.profile import Profile, load, shipped
from chairlift.backend.fitting.recording import read
from chairlift.backend.fitting.steps import GRAPH, USUAL_LAUNCH, steps_of
from chairlift.backend.parallel import ONE, Parallel
from chairlift.backend.roofline import Efficiency
from kit.places import ROOT, TRUTH

TABLE = yaml.safe_load((ROOT / "backend" / "hosts.yaml").read_text(encoding="utf-8"))
H200 = specs.gpu("h200")
SMALL, LLAMA = specs.model("qwen2.5-0.5b"), specs.model("llama-3.1-8b")


def recorded(engine: str, several: bool) -> list[Profile]:
    """The profiles of an engine that does not speculate, on one GPU or several."""
    name, version = engine.rsplit("-", 1)
    found = [load(each) for each in shipped() if each.endswith(f"-{name}-{version}")]
    return [each for each in found if each.drafts is None and (each.tensor_parallel > 1) == several]


def layers(profile: Profile) -> int:
    return specs.model(profile.model).layers


def piecewise(profile: Profile) -> float:
    # on an idle engine workers are done `tail_s` after they were handed a step, whose first kernel comes after `head_s`
    by_workers = profile.host.tail_s - profile.host.head_s if profile.gpu_time.eager_floor_s else 0.0
    return max(profile.host.piecewise_s + by_workers, profile.gpu_time.piecewise_floor_s)


def eager(profile: Profile) -> float:
    return max(profile.host.eager_s, profile.gpu_time.eager_floor_s)


@pytest.mark.parametrize(("engine", "gpus"), [(engine, gpus) for engine in TABLE for gpus in TABLE[engine]])
def test_the_table_is_the_median_of_what_was_recorded(engine: str, gpus: str) -> None:
    of = recorded(engine, gpus == "several")
    row = TABLE[engine][gpus]

    def told(value: Callable[[Profile], float], profiles: list[Profile] = of) -> float:
        return median(value(each) for each in profiles)

    graph = told(lambda p: p.host.graph_s) if engine.startswith("chairlift") else USUAL_LAUNCH[GRAPH]
    step = told(lambda p: p.host.schedule_s + p.host.update_s) + graph
    request = told(lambda p: p.host.schedule_request_s + p.host.update_request_s)
    assert row["step_ms"] == pytest.approx(1e3 * step, rel=0.03)
    assert row["request_us"] == pytest.approx(1e6 * request, rel=0.03, abs=0.06)
    own = 1e-3 * row["prepare_ms"]
    assert own + 1e-6 * row["launch_us"] * median(map(layers, of)) == pytest.approx(told(piecewise), rel=0.15)
    bound = [p for p in of if any("kernel by kernel in" in note for note in p.notes)]  # the GPU hides these launches
    shown = [p for p in of if p not in bound]
    each = told(lambda p: (eager(p) - own) / (layers(p) + specs.model(p.model).expert_layers), shown)
    assert row["eager_us"] == pytest.approx(1e6 * each, rel=0.03)


def test_a_small_model_answers_no_faster_than_the_host_plans_launches_and_processes_steps() -> None:
    # 0.49 billion weights of 2 bytes at 0.8 of 4.8 TB/s are 0.26 ms; vLLM's loop takes 2.56 ms and 31 us a request
    backend = Efficiency().build(SMALL, H200, ONE)
    assert backend.step(Batch((), 1, 100)).first == 2_591_000_000
    assert backend.step(Batch((), 64, 6400)).first == 2_560_000_000 + 64 * 31_000_000
    free = Efficiency(host="none").build(SMALL, H200, ONE).step(Batch((), 1, 100)).first
    assert free == pytest.approx(0.26e9, rel=0.05)


def test_a_prompt_waits_for_its_launch_layer_by_layer() -> None:
    # 32 layers: 2 + 32 * 0.309 ms in pieces of graphs, 2 + 32 * 0.813 kernel by kernel beyond 512 tokens
    backend = Efficiency().build(LLAMA, H200, ONE)
    assert backend.step(Batch((Chunk(0, 32),), 0, 0)).first == 11_888_000_000
    assert backend.step(Batch((Chunk(0, 513),), 0, 0)).first == 28_016_000_000
    assert backend.step(Batch((Chunk(0, 500),), 30, 3000)).first == 28_016_000_000  # 530 tokens
    assert backend.step(Batch((Chunk(0, 8192),), 0, 0)).first > 100_000_000_000  # the GPU's work


@pytest.mark.parametrize("by_part", [False, True])
@pytest.mark.parametrize("parallel", [ONE, Parallel(tensor=2)])
def test_a_replica_of_several_gpus_has_the_hosts_of_worker_processes(by_part: bool, parallel: Parallel) -> None:
    backend = Efficiency(by_part=by_part).build(LLAMA, H200, parallel)
    row = TABLE["vllm-0.26"]["one" if parallel is ONE else "several"]
    short = backend.step(Batch((Chunk(0, 1),), 0, 0)).first
    assert short == round(1e9 * row["prepare_ms"]) + 32 * round(1e6 * row["launch_us"])
    assert f"{row['step_ms']:g} ms + N · {row['request_us']:g} µs" in backend.assumptions()["host"]


def test_each_number_can_be_set_and_the_engine_chosen() -> None:
    one = Batch((), 1, 1)
    assert Efficiency(step_ms=5).build(SMALL, H200, ONE).step(one).first == 5_031_000_000
    assert Efficiency(step_ms=5, request_us=0).build(SMALL, H200, ONE).step(one).first == 5_000_000_000
    assert Efficiency(host="vllm-0.23").build(SMALL, H200, ONE).step(one).first == 2_541_000_000
    assert Efficiency(host="none", floor_ms=3).build(SMALL, H200, ONE).step(one).first == 3_000_000_000
    said = Efficiency(host="none").build(SMALL, H200, ONE).assumptions()
    assert said["host"] == "takes no time (assumed)"


@given(
    st.sampled_from(sorted(TABLE)), st.integers(1, 600), st.integers(1, 10**6), st.booleans(), st.sampled_from([1, 300])
)
def test_a_run_of_decodes_ends_where_the_gpu_outlasts_the_host(
    host: str, slots: int, context: int, by_part: bool, steps: int
) -> None:
    backend = Efficiency(host=host, by_part=by_part).build(SMALL, H200, ONE)  # type: ignore[arg-type]
    cost = backend.step(Batch((), slots, context))
    for i in {1, min(steps, cost.steps - 1)} - {0}:
        further = backend.step(Batch((), slots, context + i * slots))
        assert further.first == cost.first + i * cost.slope


def test_every_engine_of_the_table_can_be_named() -> None:
    for name in [*TABLE, hosts.NONE]:
        assert Efficiency(host=name).pace(1) == hosts.pace(name, 1)


@pytest.mark.skipif(not TRUTH.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize(
    ("version", "model"),
    [("0.23", "llama-3.1-8b"), ("0.26", "llama-3.1-8b"), ("0.26", "llama-3.1-8b-fp8")],
)
def test_a_graphs_launch_took_what_the_table_says(version: str, model: str) -> None:
    """Grids with small budgets: a prompt's chunk is done long before the graph of few decodes after it is launched."""
    recording = read(TRUTH / f"h200-vllm-{version}", model)
    seen = []
    for budget in (64, 128, 256, 512):
        experiment = recording.experiments.get(f"grid_mixed_budget{budget}")
        if experiment is not None:
            steps = steps_of([experiment])
            follows = (steps.chunks > 0)[:-1] & (steps.kind[1:] == GRAPH) & ~steps.woke[1:]
            waited = steps.done[:-1] - steps.schedule[1:] - steps.schedule_cpu[1:]
            seen += (waited[follows & (steps.decodes[1:] <= 20) & (waited < 0.005)] * 1e3).tolist()
    assert len(seen) >= 20
    assert median(seen) == pytest.approx(1e3 * USUAL_LAUNCH[GRAPH], abs=0.25)
