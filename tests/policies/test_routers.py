"""Which replica each router chooses, and what all routers have in common."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chairlift.policies import routers
from chairlift.policies.base import PolicyError, Replicas, Request, Router
from chairlift.policies.routers import (
    LeastOutstanding,
    LeastTokens,
    PowerOfTwo,
    PrefixAffinity,
    RandomChoice,
    RoundRobin,
    SessionSticky,
    ShortestQueue,
    least,
)
from chairlift.sim.conformance.router import PROMISES, check_router
from chairlift.sim.replica.request import Live
from chairlift.sim.study import Failures, Outage
from chairlift.sim.workload.trace import HashIds
from kit.clusters import check_endings, check_nothing_left, group, s, serve, setup_of
from kit.command import ROUTER, SCENARIO
from kit.places import copied
from kit.worlds import Affine, trace_of

ALL = [cls for _, cls in inspect.getmembers(routers, inspect.isclass) if issubclass(cls, Router) and cls is not Router]
STEP = 1000


@dataclass
class View:
    """`policies.base.Replicas` as written down."""

    outstanding: list[int]
    outstanding_tokens: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    now: int = 0

    def __post_init__(self) -> None:
        n = len(self.outstanding)
        self.outstanding_tokens = self.outstanding_tokens or [0] * n
        self.waiting = self.waiting or [0] * n
        self.indices = self.indices or list(range(n))


def request(session: int = -1, hash_ids: list[int] | None = None, number: int = 0) -> Request:
    return Live(number, 0, 16, 16, session=session, hash_ids=hash_ids or [])


def ready(router: Router) -> Any:
    router.random = Random(3)
    return router


# all of them


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@given(
    loads=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=5),
    who=st.lists(st.tuples(st.integers(-1, 2), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=10),
    gone=st.integers(0, 4),
)
def test_a_position_in_range_whatever_the_loads_and_whoever_is_gone(
    cls: type[Router], loads: list[tuple[int, int, int]], who: list[tuple[int, list[int]]], gone: int
) -> None:
    router = ready(cls())
    everyone = list(enumerate(loads))
    some = [e for e in everyone if e[0] != gone] or everyone[:1]

    for session, ids in who:
        for part in (everyone, some):
            counts, tokens, waiting = (list(c) for c in zip(*(load for _, load in part), strict=True))
            view = View(counts, tokens, waiting, [index for index, _ in part])
            chosen = router.route(request(session, ids), view)
            assert type(chosen) is int
            assert 0 <= chosen < len(part)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("replicas", [1, 3])
def test_every_router_serves_a_trace(cls: type[Router], replicas: int) -> None:
    trace = trace_of(
        [(k * 300, 8, 5) for k in range(30)],
        session=[k % 4 for k in range(30)],
        hash_ids=HashIds(np.array([k % 4 for k in range(30)]), np.arange(31)),
    )

    served = serve(setup_of(trace, [group(count=replicas)], cls))

    check_endings(served)
    check_nothing_left(served)
    assert len(set(served.columns()["replica"])) == replicas


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_router_keeps_its_promises(cls: type[Router]) -> None:
    found = check_router(cls)

    assert [verdict.state for verdict in found] == ["kept"] * len(PROMISES)


# one by one


def test_round_robin_deals_in_turn_and_goes_on_from_its_place_when_one_is_gone() -> None:
    router = ready(RoundRobin())
    three, two = View([0] * 3), View([9, 0])

    assert [router.route(request(), three) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [router.route(request(), two) for _ in range(3)] == [0, 1, 0]


def test_random_choice_is_uniform() -> None:
    # chi-square with 3 degrees of freedom: 16.3 is exceeded once in a thousand
    router, n = ready(RandomChoice()), 20_000
    counts = Counter(router.route(request(), View([0, 5, 50, 500])) for _ in range(n))

    assert sum((counts[i] - n / 4) ** 2 / (n / 4) for i in range(4)) < 16.3


def test_least_outstanding_takes_the_first_of_the_fewest() -> None:
    assert ready(LeastOutstanding()).route(request(), View([3, 1, 2, 1])) == 1


def test_least_tokens_takes_the_first_of_the_fewest_whatever_the_requests() -> None:
    assert ready(LeastTokens()).route(request(), View([1, 5, 5], [900, 40, 40])) == 1


def test_shortest_queue_looks_at_who_waits_and_then_at_who_is_there() -> None:
    router = ready(ShortestQueue())

    assert router.route(request(), View([2, 9, 5, 5], waiting=[1, 0, 2, 1])) == 1
    assert router.route(request(), View([9, 7, 7], waiting=[0, 0, 0])) == 1
    assert router.route(request(), View([0, 3, 3], waiting=[2, 1, 1])) == 1


def test_power_of_two_takes_the_better_of_each_pair() -> None:
    # of the six pairs of four replicas the best is in three, the second in two, the third in one, the worst in none
    router, n = ready(PowerOfTwo()), 12_000
    counts = Counter(router.route(request(), View([4, 2, 8, 6])) for _ in range(n))

    assert counts[2] == 0
    for position, share in ((1, 3 / 6), (0, 2 / 6), (3, 1 / 6)):
        assert counts[position] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_power_of_two_with_as_many_choices_as_replicas_takes_the_best() -> None:
    router = ready(PowerOfTwo(choices=9))

    assert {router.route(request(), View([4, 2, 8])) for _ in range(20)} == {1}


def test_a_session_stays_where_it_is_however_busy() -> None:
    router = ready(SessionSticky())

    assert router.route(request(7), View([1, 0])) == 1
    assert router.route(request(7), View([0, 99])) == 1
    assert router.route(request(), View([0, 99])) == 0
    assert router.route(request(8), View([0, 99])) == 0


def test_a_session_moves_when_its_replica_is_gone_and_stays_there_when_it_returns() -> None:
    router = ready(SessionSticky())
    router.route(request(7), View([1, 0, 1]))  # replica 1

    assert router.route(request(7), View([5, 0], indices=[0, 2])) == 1  # replica 2, in place 1 for now
    assert router.route(request(7), View([0, 0, 9])) == 2


def test_a_session_whose_replica_was_gone_for_others_only_finds_it_back() -> None:
    router = ready(SessionSticky())
    router.route(request(7), View([1, 1, 0]))  # replica 2
    router.route(request(8), View([1, 0], indices=[0, 1]))

    assert router.route(request(7), View([0, 9], indices=[1, 2])) == 1


def test_prefixes_are_sent_to_where_most_of_them_went() -> None:
    router = ready(PrefixAffinity())
    router.route(request(hash_ids=[1, 2, 3]), View([0, 1, 1]))
    router.route(request(hash_ids=[1, 9]), View([9, 0, 9]))  # too busy at 0: replica 1 has [1, 9] now

    assert router.route(request(hash_ids=[1, 2, 3, 4]), View([5, 0, 0])) == 0  # 3 ids against 1
    assert router.route(request(hash_ids=[1, 9, 9]), View([0, 5, 0])) == 1
    assert router.route(request(hash_ids=[8, 2]), View([5, 5, 0])) == 2  # not from the start: no match
    assert router.route(request(hash_ids=[]), View([5, 5, 0])) == 2


def test_a_prefix_yields_to_imbalance() -> None:
    # at most 1.5 times the fewest requests, and 8
    router = ready(PrefixAffinity())
    router.route(request(hash_ids=[1, 2]), View([0, 1]))  # replica 0

    assert router.route(request(hash_ids=[1, 2]), View([11, 2])) == 0
    assert router.route(request(hash_ids=[1, 2]), View([12, 2])) == 1


def test_of_equal_matches_the_one_with_the_fewest_requests_is_taken_and_of_those_the_first() -> None:
    router = ready(PrefixAffinity())
    for position in range(3):  # each is sent [1, 2] while the others are too busy
        router.route(request(hash_ids=[1, 2]), View([0 if i == position else 99 for i in range(3)]))

    assert router.route(request(hash_ids=[1, 2, 3]), View([5, 4, 2, 0])) == 2
    assert router.route(request(hash_ids=[1, 2]), View([5, 4, 4, 0])) == 1


def test_a_longer_match_is_worth_more_requests() -> None:
    router = ready(PrefixAffinity())
    router.route(request(hash_ids=[1, 2]), View([0, 1]))  # replica 0
    router.route(request(hash_ids=[1]), View([99, 0]))  # replica 1

    assert router.route(request(hash_ids=[1, 2]), View([7, 0])) == 0
    assert router.route(request(hash_ids=[1, 5]), View([7, 0])) == 1  # one id on both


def test_prefixes_sent_long_ago_are_forgotten() -> None:
    router = ready(PrefixAffinity(blocks=2))
    router.route(request(hash_ids=[1, 2]), View([0, 1]))  # replica 0
    router.route(request(hash_ids=[3, 4]), View([0, 1]))  # there 1 and 2 go

    assert router.route(request(hash_ids=[1, 2]), View([5, 0])) == 1


def test_of_a_prefix_the_end_is_forgotten_first_for_it_is_of_no_use_without_the_beginning() -> None:
    router = ready(PrefixAffinity(blocks=3))
    router.route(request(hash_ids=[1, 2, 3]), View([0, 1]))  # replica 0
    router.route(request(hash_ids=[9]), View([0, 1]))  # there 3 goes

    assert router.route(request(hash_ids=[1, 2, 3]), View([5, 0])) == 0


def test_what_a_replica_was_sent_is_known_by_its_index_not_its_position() -> None:
    router = ready(PrefixAffinity())
    router.route(request(hash_ids=[1]), View([1, 1, 0]))  # replica 2

    assert router.route(request(hash_ids=[1]), View([0, 5], indices=[0, 2])) == 1
    assert router.route(request(hash_ids=[1]), View([5, 0], indices=[0, 1])) == 1  # replica 1, which takes it from now
    assert router.route(request(hash_ids=[1]), View([0, 2, 3])) == 1  # on both: the one with fewer requests


# in a cluster


LONG = 100  # tokens of an answer that outlasts all arrivals


@pytest.mark.parametrize(
    ("router", "replicas"), [(PrefixAffinity, [0, 1, 2, 0, 2, 1]), (LeastOutstanding, [0, 1, 2, 0, 1, 2])]
)
def test_prompts_of_a_group_go_to_where_its_prefix_went(router: type[Router], replicas: list[int]) -> None:
    # Groups A B C A C B, one prompt every 10 ps. The first three find no match: the fewest requests, 0, 1 and 2. Then
    # each replica has one or two, and whoever looks at prefixes sends A to 0, C to 2 and B to 1.
    rows = [(10 * k, 40, LONG) for k in range(6)]
    trace = trace_of(rows, prefix_group=[0, 1, 2, 0, 2, 1], prefix_tokens=[32] * 6)

    assert serve(setup_of(trace, [group(count=3)], router)).columns()["replica"] == replicas


def test_a_prefix_shorter_than_a_block_is_no_reason_to_go_anywhere() -> None:
    rows = [(10 * k, 40, LONG) for k in range(6)]
    trace = trace_of(rows, prefix_group=[0, 1, 2, 0, 2, 1], prefix_tokens=[15] * 6)

    assert serve(setup_of(trace, [group(count=3)], PrefixAffinity)).columns()["replica"] == [0, 1, 2, 0, 1, 2]


def test_of_two_prefixes_of_a_group_the_longer_match_counts() -> None:
    # Prompts of one group with 16, 48 and 48 tokens of its prefix; room for one request on each replica by slack 1.
    # 0: nothing known, replica 0. 1: one block known at 0, which has 1 request against none, at most 0 * 0 + 1: there.
    # 2: replica 0 has two, too many: replica 1. 3: three blocks known on both, replica 1 has fewer requests.
    rows = [(10 * k, 60, LONG) for k in range(4)]
    trace = trace_of(rows, prefix_group=[0] * 4, prefix_tokens=[16, 48, 48, 48])
    settings = {"imbalance": 0.0, "slack": 1}

    served = serve(setup_of(trace, [group(count=2)], PrefixAffinity, router_settings=settings))

    assert served.columns()["replica"] == [0, 0, 1, 1]


@pytest.mark.parametrize("router", [PrefixAffinity, SessionSticky])
def test_the_turns_of_a_session_go_to_where_the_first_went(router: type[Router]) -> None:
    # sessions A B C A C B, the second turns longer than the first and its answer
    rows = [(10 * k, 40 if k < 3 else 200, LONG) for k in range(6)]
    trace = trace_of(rows, session=[0, 1, 2, 0, 2, 1])

    assert serve(setup_of(trace, [group(count=3)], router)).columns()["replica"] == [0, 1, 2, 0, 2, 1]


def test_a_session_that_dropped_its_context_is_a_new_prefix_but_the_same_session() -> None:
    # the second turn of session A is shorter than the first and its answer: what it begins with is unknown
    rows = [(0, 40, LONG), (10, 40, LONG), (20, 40, LONG), (30, 90, LONG), (40, 40, LONG)]
    trace = trace_of(rows, session=[0, 1, 2, -1, 0])

    def replicas(router: type[Router]) -> list[int]:
        return serve(setup_of(trace, [group(count=3)], router)).columns()["replica"]

    assert replicas(PrefixAffinity) == [0, 1, 2, 0, 1]
    assert replicas(SessionSticky) == [0, 1, 2, 0, 0]


def test_ids_of_the_trace_itself_come_first() -> None:
    # by groups it would be A B A B; the trace's own ids say A A B B
    rows = [(10 * k, 40, LONG) for k in range(4)]
    ids = HashIds(np.array([5, 5, 6, 6]), np.arange(5))
    trace = trace_of(rows, hash_ids=ids, hash_block=16, prefix_group=[0, 1, 0, 1], prefix_tokens=[32] * 4)

    assert serve(setup_of(trace, [group(count=2)], PrefixAffinity)).columns()["replica"] == [0, 0, 1, 1]


@pytest.mark.parametrize("position", [-1, 2])
def test_a_router_that_names_no_replica_is_told_so(position: int) -> None:
    @dataclass
    class Astray(Router):
        def route(self, request: Request, replicas: Replicas) -> int:
            return position

    with pytest.raises(PolicyError, match=rf"^router Astray: position {position}: there are 2 replicas, from 0$"):
        serve(setup_of(trace_of([(0, 4, 2)]), [group(count=2)], Astray))


def test_a_session_that_began_while_one_replica_was_up_stays_on_it() -> None:
    # replica 0 is away until 2000; later it is idle, but the session is at home on replica 1
    away = Failures(schedule=[Outage(replica=0, at_s=0, for_s=s(2000))])
    trace = trace_of([(500, 4, 50), (3000, 4, 5)], session=[1, 1])

    served = serve(setup_of(trace, [group(count=2)], SessionSticky, failures=away))

    assert served.columns()["replica"] == [1, 1]


@pytest.mark.parametrize(("stale", "replicas"), [(0, [0, 1, 0, 1]), (10_000, [0, 0, 0, 1])])
def test_a_stale_view_is_that_of_the_last_look(stale: int, replicas: list[int]) -> None:
    # Long answers; arrivals at 0, 4000, 9000 and 10,000. The look at 0 showed nobody anywhere and serves until then;
    # the next one, at 10,000, shows three on replica 0.
    trace = trace_of([(at, 4, 100) for at in (0, 4000, 9000, 10_000)])
    cost = Affine(fixed=STEP, token=0, context=0)

    served = serve(setup_of(trace, [group(count=2, cost=cost)], LeastOutstanding, router_stale_ps=stale))

    assert served.columns()["replica"] == replicas


def test_a_stale_view_of_queues_is_stale_too() -> None:
    # One request at a time on each replica. At 0 nobody waits; B and C, behind A on replica 0, go unseen until 5000.
    one = {"async_scheduling": False, "enable_prefix_caching": False, "max_num_seqs": 1}
    trace = trace_of([(at, 4, 100) for at in (0, 1000, 2000, 5000)])

    served = serve(setup_of(trace, [group(settings=one, count=2)], ShortestQueue, router_stale_ps=5000))

    assert served.columns()["replica"] == [0, 0, 0, 1]


def test_tokens_outstanding_are_those_of_whom_a_replica_has_not_answered() -> None:
    # 100 tokens to replica 0, then 30, 30 and 30 to replica 1 until it has 90; the next makes it 120, so 0 again
    trace = trace_of([(k, p, 50) for k, p in enumerate([100, 30, 30, 30, 30, 30])])

    served = serve(setup_of(trace, [group(count=2)], LeastTokens))

    assert served.columns()["replica"] == [0, 1, 1, 1, 1, 0]


def test_a_router_is_one_file_of_the_package(tmp_path: Path) -> None:
    imports = copied(tmp_path)
    (tmp_path / "policies" / "last.py").write_text(ROUTER)
    (tmp_path / "s.yaml").write_text(SCENARIO + "replicas: 3\nrouter: {name: last, step: 2}\n")
    (tmp_path / "both.py").write_text(
        "import sys\n"
        "from chairlift.sim.cli.main import main\n"
        "for command in (['list', 'routers'], ['run', 's.yaml', '--quiet', '--out', 'out']):\n"
        "    sys.argv[1:] = command\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(imports), "COLUMNS": "200"}
    command = [sys.executable, "both.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stderr) == (0, "")
    assert "The last replica, whatever its load." in done.stdout
    assert set(pq.read_table(tmp_path / "out/requests.parquet")["replica"].to_pylist()) == {1}


@given(st.lists(st.integers(0, 5) | st.integers(0, 2**62), min_size=1, max_size=200))
def test_the_least_of_many_is_the_first_of_the_least(counts: list[int]) -> None:
    expected = next(i for i, count in enumerate(counts) if all(count <= other for other in counts))

    assert least(array("q", counts)) == least(counts) == expected
