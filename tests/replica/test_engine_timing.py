"""When an asynchronous engine's steps come: vLLM's loop, by hand and against a second implementation."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.backend.base import NO_HOST, WHOLE, Backend, Batch, Host, StepCost
from chairlift.policies.base import Step
from chairlift.policies.vllm import Vllm
from kit.loop import Loop, Work
from kit.worlds import Affine, play, trace_of


@dataclass
class Told(Backend):
    """A step with a chunk, and a decode-only step: GPU time and host work as told."""

    chunk: StepCost
    decode: StepCost

    def step(self, batch: Batch) -> StepCost:
        return self.chunk if batch.prefills else self.decode


CHUNK = StepCost(100, 0, 1, Host(schedule=10, launch=200, update=5, tail=20))


def times(decode: StepCost, leap: bool, chunk: StepCost = CHUNK, output: int = 4) -> tuple[int, int, list[int]]:
    trace = trace_of([(1000, 8, output)])
    world = play(trace, lambda: Vllm(enable_prefix_caching=False), lambda: Told(chunk, decode), leap=leap)
    rows = world.engines[0].records.runs()
    ends = (rows["start_ps"] + rows["first_ps"]).tolist()
    return world.requests.first_token[0], world.requests.finished[0], ends


def test_a_gpu_that_is_slower_sets_the_pace() -> None:
    decode = StepCost(50, 0, 1 << 60, Host(schedule=10, launch=20, update=5))

    # 1210 launched, 1230 the chunk's GPU work ends; 1240 the decode is launched, then the chunk is processed
    first, finished, ends = times(decode, leap=False)

    assert first == 1240 + 5
    # the decode starts once launched: 1290, 1340 and 1390 on the GPU
    assert ends == [1245, 1295, 1345, 1395]
    assert finished == 1395


def test_a_host_that_is_slower_sets_the_pace() -> None:
    decode = StepCost(20, 0, 1 << 60, Host(schedule=30, launch=40, update=10))

    first, finished, ends = times(decode, leap=False)

    # chunk: launched 1210, GPU 1230; decode launched 1280, chunk processed until 1285
    assert first == 1285
    # next launched 1285 + 70 = 1355, processed until 1365; 1365 + 70 = 1435, 1445; the last has no successor: its
    # GPU work began at 1435 and is done at 1455
    assert ends == [1285, 1365, 1445, 1465]
    assert finished == 1465


def test_a_launch_outlasts_the_decode_before_it() -> None:
    decode = StepCost(50, 0, 1 << 60, Host(schedule=1, launch=2, update=3))
    trace = trace_of([(0, 8, 10), (300, 8, 2)])

    world = play(trace, lambda: Vllm(enable_prefix_caching=False), lambda: Told(CHUNK, decode))

    rows = world.engines[0].records.runs()
    alone = (rows["decodes"] == 1) & (rows["steps"] == 1) & (rows["chunks"] == 0)
    stretched = rows["first_ps"][alone].max()
    # scheduled 3 after the step before was done, 10 + 200 to launch, 3 to process: the decode in flight comes that late
    assert stretched == 10 + 200 + 3


def test_arrivals_wait_for_the_loop_and_cost_it_time() -> None:
    backend = Affine(fixed=1000, token=0, context=0, arrival=70, arrival_token=3)
    trace = trace_of([(500, 10, 1), (500, 20, 1)])

    world = play(trace, lambda: Vllm(enable_prefix_caching=False), lambda: backend)

    assert list(world.requests.first_token) == [500 + 2 * 70 + 30 * 3 + 1000] * 2


@dataclass
class Logged(Affine):
    """A made-up cost that remembers what it was asked."""

    log: list[StepCost] = field(default_factory=list)

    def step(self, batch: Batch) -> StepCost:
        cost = super().step(batch)
        self.log.append(cost)
        return cost


@dataclass
class Asked(Vllm):
    """vLLM's policy, and when it was asked for a plan."""

    asked: list[tuple[int, int]] = field(default_factory=list, init=False)

    def schedule(self, step: Step) -> int:
        before = step.now
        answer = super().schedule(step)
        self.asked.append((before, step.tokens))  # type: ignore[attr-defined]  # of the engine's own step
        return answer


@settings(max_examples=200)
@given(
    table=st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=12),
    fixed=st.sampled_from([300, 1000]),
    host=st.sampled_from([Host(5, 40, 7), Host(200, 600, 400), Host(0, 0, 90)]),
    each=st.sampled_from([0, 30]),
    chunk_launch=st.sampled_from([0, 3000]),
    chunk_tail=st.sampled_from([WHOLE, 0, 700]),
    decode_tail=st.sampled_from([WHOLE, 500]),
    late=st.booleans(),
    arrival=st.sampled_from([0, 90]),
)
def test_boundaries_are_those_of_the_loop(
    table: list[tuple[int, int, int]],
    fixed: int,
    host: Host,
    each: int,
    chunk_launch: int,
    chunk_tail: int,
    decode_tail: int,
    late: bool,
    arrival: int,
) -> None:
    table = sorted(table)
    backend = Logged(
        fixed=fixed,
        host=host,
        each=each,
        chunk_launch=chunk_launch,
        chunk_tail=chunk_tail,
        decode_tail=decode_tail,
        late=late,
        arrival=arrival,
    )
    policy = Asked(enable_prefix_caching=False, max_num_batched_tokens=32, max_num_seqs=4)

    world = play(trace_of(table), lambda: policy, lambda: backend, leap=False)

    costs = iter(backend.log)
    arrivals = [a for a, _, _ in table]
    taken = 0
    loop = Loop()
    done: list[float] = []
    for now, tokens in policy.asked:
        if loop.flying is None:
            assert now >= loop.now  # it may have been idle
            loop.now = now
        assert now == loop.now
        come = sum(a <= now for a in arrivals)
        work = None
        if tokens:
            first, _, _, (schedule, launch, update, tail, head) = next(costs)
            work = Work(schedule + arrival * (come - taken), launch, update, first, tail, head)
        taken = come
        if loop.turn(work) is not None:
            done.append(loop.now)
    assert loop.flying is None
    rows = world.engines[0].records.runs()
    assert (rows["start_ps"] + rows["first_ps"]).tolist() == done


def test_no_host_time_is_the_gpu_alone() -> None:
    plain = times(StepCost(50, 0, 1 << 60, NO_HOST), True, StepCost(100, 0, 1, NO_HOST))
    zero = times(StepCost(50, 0, 1 << 60, Host()), True, StepCost(100, 0, 1, Host()))

    assert plain[:2] == zero[:2] == (1100, 1250)
