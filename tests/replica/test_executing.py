"""A replica whose steps run: books, times and decisions, on made-up hardware whose clock a test winds by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chairlift.backend.base import Backend, Batch, Executor, Host, Prompt, StepCost
from chairlift.backend.roofline import Efficiency
from chairlift.policies.base import Scheduler, Step
from chairlift.policies.orca import Orca
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.sim.replica import executing
from chairlift.sim.results.records import RUN_COLUMNS, Status
from chairlift.sim.scenario import plugins
from chairlift.sim.study import Limits, Setup
from kit.clusters import (
    Served,
    check_endings,
    check_gap_time,
    check_nothing_left,
    check_tokens,
    group,
    s,
    serve,
    setup_of,
)
from kit.command import chairlift, replaced
from kit.journals import check_lives, check_slots, seats, story
from kit.leaping import POLICIES
from kit.worlds import Affine, trace_of

NS = 1000  # ps
SYNC = {"async_scheduling": False, "enable_prefix_caching": False}
AHEAD = {"async_scheduling": True, "enable_prefix_caching": False}


class Clock:
    """What `sim.replica.executing` takes for the wall clock, ns."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(executing, "time", found)
    return found


class Modelled(Affine):
    """Every step takes whole nanoseconds, as a wall clock tells them."""

    def step(self, batch: Batch) -> StepCost:
        first, slope, steps, host = super().step(batch)
        return StepCost(first * NS, slope * NS, steps, host)


@dataclass
class Sequence:
    """What hardware knows of a request."""

    known: int  # tokens of its prompt, and those it was given
    computed: int = 0  # tokens in KV
    pad: int = 0


class Hardware(Executor):
    """Runs one step behind the other, each for as long as ``cost`` says; launching one takes ``launching`` ns.

    Keeps books of its own on every request, which each step's members must agree with.
    """

    name = "made up"

    def __init__(self, clock: Clock, cost: Backend, launching: int = 0, releasing: int = 0) -> None:
        self.clock, self.cost, self.launching, self.releasing = clock, cost, launching, releasing
        self.prompts: dict[int, int] = {}  # request → tokens of its prompt, to be set by the test
        self.launched = 0
        self.closed = False

    def prepare(self, blocks: int, block_size: int, max_model_len: int, named: bool) -> None:
        self.blocks, self.block_size, self.named = blocks, block_size, named
        self.flights: deque[tuple[int, int]] = deque()  # when it is done, how long it takes; ns
        self.free_at = 0
        self.sequences: dict[int, Sequence] = {}
        self.given: dict[int, int] = {}  # request → tokens it was given, those under way included

    def step(self, batch: Batch) -> StepCost:
        assert batch.members is None  # an estimate
        return self.cost.step(batch)

    def launch(self, batch: Batch) -> None:
        assert len(self.flights) < 2
        self._check(batch)
        self.launched += 1
        took = self.cost.step(batch).first // NS
        self.clock.now += self.launching
        self.free_at = max(self.free_at, self.clock.now) + took
        self.flights.append((self.free_at, took))

    def wait(self) -> int:
        end, took = self.flights.popleft()
        self.clock.now = max(self.clock.now, end)
        return took * NS

    def release(self, request_id: int) -> None:
        self.clock.now += self.releasing
        self.sequences.pop(request_id, None)

    def drop(self, request_id: int) -> None:
        assert self.flights
        self.given[request_id] -= 1

    def close(self) -> None:
        assert not self.flights
        self.closed = True

    def _check(self, batch: Batch) -> None:
        members = batch.members
        assert members is not None
        alone = [len(batch.prefills) < len(members.prompts) and self._resumes(p) for p in members.prompts]
        chunks = [(p.start, p.length) for p, one in zip(members.prompts, alone, strict=True) if not one]
        resumed = [p.start + 1 for p, one in zip(members.prompts, alone, strict=True) if one]  # priced as decodes
        assert chunks == [(c.start, c.length) for c in batch.prefills]
        assert len(members.decodes) + len(resumed) == batch.decodes
        everybody = [*(p.request for p in members.prompts), *members.decodes, *members.dead]
        assert len(set(everybody)) == len(everybody)
        context = sum(resumed)
        for request in (*members.decodes, *members.dead):
            sequence = self.sequences[request]
            sequence.computed += 1
            context += sequence.computed + sequence.pad
            if request in members.decodes:
                assert sequence.computed == sequence.known  # its latest token is what it computes
                sequence.known += 1
                self.given[request] += 1
        assert context == batch.context
        assert sum(p.pad for p in members.prompts) + len(members.dead) == batch.padded
        for prompt in members.prompts:
            self._check_prompt(prompt)
            assert len(members.tokens(prompt.request)) == self.prompts[prompt.request]
        for request in (*(p.request for p in members.prompts), *members.decodes):
            table = members.table(request)
            assert (table is not None) == self.named
            if table is not None:
                needed = -(-self.sequences[request].computed // self.block_size)
                assert len(set(table[:needed])) == needed
                assert all(0 <= block < self.blocks for block in table)

    def _resumes(self, prompt: Prompt) -> bool:
        """Whether a chunk is an answer's latest token and nothing else: it was preempted and has found the rest."""
        return prompt.length == 1 and prompt.emits and self.given.get(prompt.request, 0) > 0

    def _check_prompt(self, prompt: Prompt) -> None:
        request, start, length, pad, emits, _ = prompt
        if request not in self.sequences:  # new, or it has lost its KV
            known = self.prompts[request] + self.given.setdefault(request, 0)
            assert start % self.block_size == 0  # what the prefix cache had
            assert start == 0 or self.named
            self.sequences[request] = Sequence(known, start, pad)
        sequence = self.sequences[request]
        assert start == sequence.computed
        assert pad in (0, sequence.pad)
        sequence.computed += length
        assert sequence.computed <= sequence.known
        assert emits == (sequence.computed == sequence.known)
        if emits:
            sequence.known += 1
            self.given[request] += 1


def run_on(hardware: Hardware, setup: Setup, journal: bool = False) -> Served:
    hardware.prompts = dict(enumerate(setup.trace.prompt_tokens.tolist()))
    served = serve(setup, leap=False, journal=journal)
    check_endings(served)
    check_nothing_left(served)
    check_tokens(served)
    assert hardware.closed
    assert hardware.sequences == {}
    engine = served.engines[0]
    runs, events = engine.records.runs(), engine.records.events()
    assert hardware.launched == len(runs["steps"])
    assert journal == (len(events["run"]) > 0)
    if journal:
        gaps = check_lives(served.requests.columns(), runs, events, engine.scheduler.batch_synchronous)
        assert sorted(gaps.items()) == served.gaps()[0]
        check_slots(seats(engine), runs, engine.scheduler.asynchronous)
    return served


class Runs(Efficiency):
    """Settings that say that steps run: a prefix cache then forgets what was planned and taken back (`PrefixPool`)."""

    executes = True


def setup_on(backend: Backend, trace: Any, policy: Callable[[], Scheduler], blocks: int, size: int, limits: Any) -> Any:
    sample = policy()
    chosen = {field.name: getattr(sample, field.name) for field in fields(sample) if field.init}
    one = group(type(sample), chosen, blocks=blocks, block_size=size, cost=backend)
    one.backend = Runs()
    one.host_gib = 0  # hardware has none to swap to
    return setup_of(trace, [one], limits=limits)


arrivals = st.one_of(st.just(0), st.integers(0, 40).map(lambda k: k * 1000), st.integers(0, 60_000))
seconds = st.one_of(st.none(), st.integers(1_000, 60_000).map(lambda ns: s(ns * NS)))


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=10)
@given(
    table=st.lists(st.tuples(arrivals, st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=12),
    cost=st.builds(Modelled, fixed=st.sampled_from([1, 1000, 997]), token=st.sampled_from([0, 10])),
    size=st.integers(1, 6),
    blocks=st.integers(8, 40),
    block_size=st.sampled_from([4, 16]),
    shares=st.booleans(),
    timeout=seconds,
    queue_timeout=seconds,
    journal=st.booleans(),
)
def test_hardware_that_takes_what_the_model_says_makes_the_modelled_run(
    name: str,
    table: list[tuple[int, int, int]],
    cost: Modelled,
    size: int,
    blocks: int,
    block_size: int,
    shares: bool,
    timeout: float | None,
    queue_timeout: float | None,
    journal: bool,
) -> None:
    table = sorted((at * NS, prompt, output) for at, prompt, output in table)
    n = len(table)
    prefixes = {"prefix_group": [i % 2 for i in range(n)], "prefix_tokens": [min(20, p) for _, p, _ in table]}
    trace = trace_of(
        table,
        max_tokens=[o for _, _, o in table],
        priority=[(7 * i) % 3 for i in range(n)] if "priority" in name else None,
        **(prefixes if shares else {}),
    )
    limits = Limits(timeout_s=timeout, queue_timeout_s=queue_timeout)
    if (own := POLICIES[name](size).block_tokens) is not None:
        blocks, block_size = blocks * block_size // own, own
    parts = (trace, lambda: POLICIES[name](size), blocks, block_size, limits)
    modelled = serve(setup_on(cost, *parts), leap=False, journal=journal)
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(executing, "time", clock)
        hardware = Hardware(clock, cost)
        executed = run_on(hardware, setup_on(hardware, *parts), journal)

    assert executed.columns() == modelled.columns()
    assert executed.gaps() == modelled.gaps()
    one, other = (served.engines[0].records for served in (executed, modelled))
    assert one.event_rows == other.event_rows
    ours, theirs = one.runs(), other.runs()
    for column in RUN_COLUMNS:
        assert column == "slope_ps" or ours[column].tolist() == theirs[column].tolist(), column


# runs of all kinds, by hand


def hand(clock: Clock, rows: list[tuple[int, int, int]], policy: Callable[[], Scheduler], **more: Any) -> Served:
    """Run rows (arrival ns, prompt, output); steps take 100 ns and launches 10 unless ``more`` says otherwise."""
    took, launching, releasing = more.pop("took", 100), more.pop("launching", 10), more.pop("releasing", 0)
    blocks, size, limits = more.pop("blocks", 1000), more.pop("size", 16), more.pop("limits", Limits())
    hardware = Hardware(clock, Modelled(fixed=took, token=0, context=more.pop("context", 0)), launching, releasing)
    trace = trace_of([(at * NS, prompt, output) for at, prompt, output in rows], **more)
    return run_on(hardware, setup_on(hardware, trace, policy, blocks, size, limits), journal=True)


def nanoseconds(served: Served, *names: str) -> list[list[int]]:
    return [[value // NS for value in served.columns()[name]] for name in names]


def gaps(served: Served) -> list[tuple[int, int]]:
    return [(gap // NS, count) for gap, count in served.gaps()[0]]


def column(served: Served, name: str) -> list[int]:
    found: list[int] = served.engines[0].records.runs()[name].tolist()
    return found


def test_a_held_request_whose_client_gives_up(clock: Clock) -> None:
    # prefill of both [1000, 1110]: request 0 has its answer and pays for a slot; its client gives up at 1115 and
    # leaves at once, as in a modelled run, and the batch goes on to the end of the other's answer with a dead slot
    rows = [(0, 4, 1), (1000, 4, 5)]
    served = hand(clock, rows, lambda: Static(batch=2), limits=Limits(timeout_s=s(1115 * NS)))

    assert served.columns()["status"] == [Status.TIMED_OUT, Status.FINISHED]
    assert nanoseconds(served, "finished_ps") == [[1115, 1550]]
    assert column(served, "padded") == [0, 1, 1, 1, 1]


def test_gaps_add_up_for_a_request_that_is_preempted_twice_running(clock: Clock) -> None:
    served = hand(
        clock,
        [(0, 1, 11), (0, 2, 16), (0, 4, 10)],
        lambda: Vllm(**AHEAD, max_num_batched_tokens=7, max_num_seqs=4, long_prefill_token_threshold=5),
        blocks=8,
        size=4,
        took=1,
        context=1,  # ns a token
        launching=0,
    )

    assert max(served.columns()["preemptions"]) >= 2
    check_gap_time(served)


# times by hand: steps of 100 ns on the hardware, 10 ns to launch one


def test_a_synchronous_engine_takes_turns_with_the_hardware(clock: Clock) -> None:
    served = hand(clock, [(5, 4, 3), (5, 6, 1)], lambda: Vllm(**SYNC))

    assert nanoseconds(served, "admitted_ps", "first_token_ps", "finished_ps") == [[5, 5], [115, 115], [335, 115]]
    assert gaps(served) == [(110, 2)]
    assert column(served, "start_ps") == [5 * NS, 115 * NS, 225 * NS]
    assert column(served, "asked_ps") == column(served, "start_ps")
    assert column(served, "launch_ps") == [10 * NS] * 3
    assert column(served, "gpu_ps") == [100 * NS] * 3
    assert column(served, "prefill_pairs") == [1 + 2 + 3 + 4 + 1 + 2 + 3 + 4 + 5 + 6, 0, 0]
    assert column(served, "planning_ps") == column(served, "update_ps") == [0, 0, 0]


def test_an_asynchronous_engine_launches_while_the_hardware_works(clock: Clock) -> None:
    # launched at 10, 20 and 120; done at 110, 210 and 310
    served = hand(clock, [(0, 4, 3)], lambda: Vllm(**AHEAD))

    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[110], [310]]
    assert gaps(served) == [(100, 2)]
    assert column(served, "start_ps") == [0, 110 * NS, 210 * NS]
    assert column(served, "first_ps") == [110 * NS, 100 * NS, 100 * NS]
    assert column(served, "asked_ps") == [0, 10 * NS, 110 * NS]


def test_the_host_sets_the_pace_where_it_is_the_slower(clock: Clock) -> None:
    # launched at 150, 300, 450 and 600, each done 100 later; a step's tokens are taken in once the next is launched
    served = hand(clock, [(0, 4, 4)], lambda: Vllm(**AHEAD), launching=150)

    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[300], [700]]
    assert gaps(served) == [(100, 1), (150, 2)]


@pytest.mark.parametrize("ahead", [False, True])
def test_taking_tokens_in_delays_the_next_step_but_no_arrival(clock: Clock, ahead: bool) -> None:
    # letting request 0 go takes 30 ns, during which nothing runs but the step in flight; request 1 comes to an idle
    # replica, whose clock has not gone on
    rows = [(0, 4, 1), (0, 4, 2), (10_000, 4, 1)]
    served = hand(clock, rows, lambda: Vllm(**(AHEAD if ahead else SYNC)), releasing=30)

    second = 210 if ahead else 110 + 30 + 110
    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[110, 110, 10_110], [110, second, 10_110]]
    assert column(served, "update_ps") == [30 * NS] * 3


def test_a_pause_of_the_launcher_is_slept_in_simulated_time(clock: Clock) -> None:
    served = hand(clock, [(0, 4, 2)], lambda: Static(batch=1, pause_ms=0.002))

    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[2110], [2220]]


def test_a_prefill_that_pauses_decodes_makes_late_gaps(clock: Clock) -> None:
    # 0 [0, 110] prompt of 0; [110, 220] decode; request 1 arrives at 150; [220, 330] its prompt; [330, 440] both
    rows = [(0, 4, 3), (150, 6, 2)]
    served = hand(clock, rows, lambda: Tgi(waiting_served_ratio=0.0), max_tokens=[3, 2])

    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[110, 330], [440, 440]]
    assert gaps(served) == [(110, 2), (220, 1)]
    assert column(served, "late_decodes") == [0, 0, 0, 1]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_preempted_request_waits_for_its_next_token_since_its_last(clock: Clock, ahead: bool) -> None:
    # 10 blocks of one token. Step 1: both prompts, 8 blocks; 2: both decode, 10; 3: request 1 is preempted, with its
    # second token in flight if planned ahead; 3, 4, 5: request 0 alone, 5 tokens; 6: request 1 computes 4 + 2 tokens
    # again and gets its third; 7: its fourth.
    served = hand(clock, [(0, 4, 5), (0, 4, 4)], lambda: Vllm(**(AHEAD if ahead else SYNC)), blocks=10, size=1)

    assert served.columns()["preemptions"] == [0, 1]
    assert column(served, "prefill_tokens") == [8, 0, 0, 0, 0, 6, 0]
    assert column(served, "decodes") == [0, 2, 1, 1, 1, 0, 1]
    assert column(served, "preempted") == [0, 0, 1, 0, 0, 0, 0]
    if ahead:  # boundaries at 110, 210, 310, 410, 510; nothing in flight then: launched at 520, done at 620, 720
        assert nanoseconds(served, "first_token_ps", "finished_ps") == [[110, 110], [510, 720]]
        assert gaps(served) == [(100, 4 + 2), (620 - 210, 1)]
    else:  # boundaries every 110
        assert nanoseconds(served, "first_token_ps", "finished_ps") == [[110, 110], [550, 770]]
        assert gaps(served) == [(110, 4 + 2), (660 - 220, 1)]


@pytest.mark.parametrize(("ahead", "boundary"), [(False, 330), (True, 310)])
def test_a_client_that_gives_up_gets_what_has_come_by_the_next_boundary(
    clock: Clock, ahead: bool, boundary: int
) -> None:
    policy = lambda: Vllm(**(AHEAD if ahead else SYNC))  # noqa: E731
    served = hand(clock, [(0, 4, 100)], policy, limits=Limits(timeout_s=s(250 * NS)))

    assert served.columns()["status"] == [Status.TIMED_OUT]
    assert served.columns()["emitted_tokens"] == [3]
    assert nanoseconds(served, "finished_ps") == [[boundary]]
    assert len(column(served, "start_ps")) == (4 if ahead else 3)  # one more was in flight, for nobody


def test_a_price_is_an_estimate_and_runs_nothing(clock: Clock) -> None:
    prices: list[int] = []

    @dataclass
    class Asks(Orca):
        def schedule(self, step: Step) -> int:
            clock.now += 7
            prices.append(step.price([(0, 5)], 0))
            return super().schedule(step)

    served = hand(clock, [(0, 4, 3)], Asks)  # `run_on` sees that as many steps are launched as are in the records

    assert set(prices) == {100 * NS}
    assert column(served, "planning_ps") == [7 * NS] * 3
    assert nanoseconds(served, "first_token_ps", "finished_ps") == [[117], [3 * 117]]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_clock_that_runs_back_makes_no_time_negative(clock: Clock, ahead: bool) -> None:
    """As where a thread moves to a processor whose counter is behind: here by 60 ns as each launch ends."""

    class Behind(Hardware):
        def launch(self, batch: Batch) -> None:
            super().launch(batch)
            clock.now -= 60

    hardware = Behind(clock, Modelled(fixed=100, token=0), launching=10)
    trace = trace_of([(0, 4, 6), (300 * NS, 6, 4)])
    policy = lambda: Vllm(**(AHEAD if ahead else SYNC))  # noqa: E731
    served = run_on(hardware, setup_on(hardware, trace, policy, 1000, 16, Limits()), journal=True)

    for each in ("planning_ps", "launch_ps", "update_ps", "first_ps"):
        assert min(column(served, each)) >= 0, each
    asked = column(served, "asked_ps")
    assert asked == sorted(asked)


# the same decisions as a modelled run, whatever steps take

AT_ONCE = {
    "orca": lambda: Orca(max_batch=6),
    "static": lambda: Static(batch=4),
    "static-global": lambda: Static(batch=4, pad_to="global"),
    "tgi": lambda: Tgi(max_batch_total_tokens=300, max_waiting_tokens=3),
    "vllm": lambda: Vllm(max_num_batched_tokens=48, async_scheduling=False),
    "vllm-async": lambda: Vllm(max_num_batched_tokens=48),
    "vllm-async-no-cache": lambda: Vllm(max_num_batched_tokens=48, enable_prefix_caching=False),
}
DECISIONS = (
    "chunks",
    "prefill_tokens",
    "decodes",
    "padded",
    "context",
    "running",
    "waiting",
    "held_blocks",
    "preempted",
)


@pytest.mark.parametrize("name", AT_ONCE)
def test_steps_are_those_of_a_modelled_run_when_all_arrive_at_once(name: str, clock: Clock) -> None:
    rng = np.random.default_rng(11)
    rows = [(0, int(p), int(o)) for p, o in zip(rng.integers(1, 90, 25), rng.integers(1, 40, 25), strict=True)]
    more = {"max_tokens": [o for _, _, o in rows], "prefix_group": [i % 3 for i in range(25)]}
    trace = trace_of(rows, **more, prefix_tokens=[min(p, 40) for _, p, _ in rows])
    size = 1 if AT_ONCE[name]().block_tokens == 1 else 16
    parts = (trace, AT_ONCE[name], 24 * 16 // size if "vllm" in name else 200 * 16, size, Limits())
    modelled = serve(setup_on(Modelled(host=Host(schedule=1, launch=2, update=3)), *parts), leap=False, journal=True)
    hardware = Hardware(clock, Modelled(fixed=12_345, token=7), launching=77, releasing=5)  # another pace altogether
    executed = run_on(hardware, setup_on(hardware, *parts), journal=True)

    for each in DECISIONS:
        assert column(executed, each) == column(modelled, each), each
    one, other = (story(served.engines[0].records.events()) for served in (executed, modelled))
    assert one == other
    assert executed.steps() == modelled.steps()
    assert (max(column(executed, "preempted")) > 0) == ("vllm" in name)
    assert (sum(executed.columns()["cached_tokens"]) > 0) == (name in ("vllm", "vllm-async"))
    first, last, arrival = (executed.columns()[c] for c in ("first_token_ps", "finished_ps", "arrival_ps"))
    assert all(a < f <= e for a, f, e in zip(arrival, first, last, strict=True))


# what is written


@dataclass(frozen=True)
class Made:
    """Settings of the hardware above."""

    executes = True

    def build(self, *_: Any) -> Backend:
        hardware = Hardware(Clock(), Modelled(fixed=50_000_000))
        hardware._check = lambda batch: None  # type: ignore[method-assign]
        executing.time = hardware.clock  # type: ignore[assignment]
        return hardware


def test_a_row_a_step_with_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "time", None)  # put back afterwards
    monkeypatch.setitem(plugins.BACKENDS, "made-up", Made)
    file = tmp_path / "s.yaml"
    file.write_text(replaced("policy: {name: vllm}", "policy: {name: vllm}\nbackend: made-up"))
    result = chairlift("run", str(file), "--quiet", "--out", str(tmp_path / "out"))
    assert (result.status, result.err) == (0, "")

    steps = pq.read_table(tmp_path / "out" / "steps.parquet").to_pydict()
    measured = ("asked_ps", "planning_ps", "launch_ps", "gpu_ps", "prefill_pairs", "drafts", "update_ps")
    assert list(steps)[-7:] == list(measured)
    assert set(steps["steps"]) == {1}
    assert min(steps["gpu_ps"]) >= 50_000_000 * NS
    assert all(start >= asked for start, asked in zip(steps["start_ps"], steps["asked_ps"], strict=True))
    requests = pq.read_table(tmp_path / "out" / "requests.parquet").to_pydict()
    pairs = sum(p * (p + 1) // 2 for p in requests["prompt_tokens"])
    assert requests["preemptions"] == [0] * 30
    assert sum(steps["prefill_pairs"]) == pairs
    assert all(t <= e for t, e in zip(requests["ttft_ms"], requests["e2el_ms"], strict=True))
