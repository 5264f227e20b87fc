"""Swapping KV to host memory: what it costs, what it keeps, and what happens where there is no room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from chairlift.backend import specs
from chairlift.backend.base import Batch, Chunk, StepCost
from chairlift.policies.base import PolicyError, Preemption, Scheduler, Step
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_v0 import VllmV0
from chairlift.sim.replica.host_memory import HostMemory, host_memory
from chairlift.sim.replica.request import Live
from chairlift.sim.results.records import Status
from chairlift.sim.study import Limits
from kit.by_hand import TokenAPs, finished, first, rows, serve
from kit.clusters import group, setup_of
from kit.clusters import serve as serve_cluster
from kit.worlds import Affine, play, trace_of

KV = 7  # ps to move a block


@dataclass
class OutOnce(Scheduler):
    """Serves everybody; in its third plan it lets the first go, by ``how``."""

    how: Preemption = "swap"
    overlaps: bool = False
    plans: int = 0

    def schedule(self, step: Step) -> int:
        self.plans += 1
        step.decode_all()
        if self.plans == 3:
            step.preempt(next(iter(step.running)), self.how)
            return 1
        while step.waiting:
            request = step.waiting[0]
            if not step.admit(request, request.remaining - step.cached_tokens(request)):
                break
        return 1


class OutOnceBeside(OutOnce):
    """The same with moves beside the steps."""

    overlaps_swaps = True


def played(policy: Callable[[], Scheduler], host: tuple[int, int]) -> Any:
    # A(6, 4) and B(6, 4), blocks of 4.
    return serve([(0, 6, 4), (0, 6, 4)], policy, blocks=9, block_size=4, host=host)


def test_a_swapped_request_keeps_what_it_computed_and_pays_for_both_ways() -> None:
    #   0  prompts            112 -> 112  A1 B1
    # 112  A B                102 -> 214  A2 B2
    # 214  A out, 7 tokens in 2 blocks: 14; B 101 -> 329  B3
    # 329  A in: 14; A's latest token, a decode; B  102 -> 445  A3 B4
    # 445  A                  101 -> 546  A4
    world = played(OutOnce, (9, KV))

    assert first(world) == [112, 112]
    assert finished(world) == [546, 445]
    assert list(world.requests.swaps) == [1, 0]
    assert list(world.requests.swapped_tokens) == [7 + 7, 0]
    assert list(world.requests.preemptions) == [1, 0]
    assert rows(world, "first_ps", "prefill_tokens") == [(112, 12), (102, 0), (115, 0), (116, 1), (101, 0)]


def test_a_resumed_request_is_priced_as_the_decode_that_it_is() -> None:
    # it lacks but its latest token: no prompt work, and the KV it reads counts as everybody's
    seen: list[Batch] = []

    class Watching(TokenAPs):
        def step(self, batch: Batch) -> StepCost:
            seen.append(batch)
            return super().step(batch)

    trace = trace_of([(0, 6, 4), (0, 6, 4)])
    play(trace, OutOnce, Watching, blocks=9, block_size=4, leap=False, host=(9, KV))

    assert [(len(b.prefills), b.decodes, b.context) for b in seen] == [
        (2, 0, 0),
        (0, 2, 7 + 7),
        (0, 1, 8),  # B alone
        (0, 2, 8 + 9),  # A reads the 7 tokens that came back and its own, B its 9
        (0, 1, 9),
    ]


def test_the_last_token_of_a_recompute_in_chunks_is_priced_as_the_decode_that_it_is() -> None:
    # Five blocks of 4. B is preempted with 8 tokens computed and 3 emitted, computes 8 again, and then its latest
    # token alone: nobody is admitted in that step.
    seen: list[Batch] = []

    class Watching(TokenAPs):
        def step(self, batch: Batch) -> StepCost:
            seen.append(batch)
            return super().step(batch)

    policy = Vllm(
        version="0.30",  # since 0.31 it would not be held to 8 tokens while it is alone
        long_prefill_token_threshold=8,
        async_scheduling=False,
        enable_prefix_caching=False,
    )
    play(trace_of([(0, 6, 4), (0, 6, 4)]), lambda: policy, Watching, blocks=5, block_size=4, leap=False)

    assert [(b.prefills, b.decodes, b.context) for b in seen] == [
        ((Chunk(0, 6), Chunk(0, 6)), 0, 0),
        ((), 2, 7 + 7),
        ((), 2, 8 + 8),
        ((), 1, 9),  # A alone
        ((Chunk(0, 8),), 0, 0),
        ((), 1, 9),
    ]


def test_without_swapping_all_its_tokens_are_computed_again() -> None:
    # 214  B 101 -> 315; 315  6 + 2 tokens of A, B  109 -> 424; 424  A 101 -> 525
    world = played(lambda: OutOnce("recompute"), (9, KV))

    assert finished(world) == [525, 424]
    assert list(world.requests.swaps) == [0, 0]
    assert list(world.requests.preemptions) == [1, 0]


def test_where_host_memory_has_no_room_a_swap_is_a_recompute() -> None:
    short = played(OutOnce, (1, KV))  # A needs two blocks there

    assert finished(short) == [525, 424]
    assert list(short.requests.swaps) == [0, 0]


def test_moves_beside_the_steps_cost_only_what_exceeds_them() -> None:
    # Two blocks at 40 ps are done within a step of 101; at 60 ps the steps with moves take 120.
    assert finished(played(OutOnceBeside, (9, 40))) == [214 + 101 + 102 + 101, 214 + 101 + 102]
    assert finished(played(OutOnceBeside, (9, 60))) == [214 + 120 + 120 + 101, 214 + 120 + 120]


def test_moving_a_block_takes_its_bytes_over_the_host_link() -> None:
    # OPT-13B: 2 · 40 layers · 5120 · 2 bytes = 819,200 bytes a token; 16 tokens at 25.2e9 B/s
    model, gpu = specs.model("opt-13b"), specs.gpu("a100-40gb")
    host = host_memory(4, model.kv_bytes_per_token_on(1), gpu.host_gb_per_s * 0.8, 16)

    assert host.block_ps == pytest.approx(16 * 819_200 / 25.2e9 * 1e12, abs=1)
    assert host.blocks == 4 * 2**30 // (16 * 819_200)
    two = host_memory(4, model.kv_bytes_per_token_on(2), gpu.host_gb_per_s * 0.8, 16)  # each moves its half, to its own
    assert two.block_ps == pytest.approx(host.block_ps / 2, abs=1)
    assert two.blocks == 4 * 2**30 // (16 * 409_600)


def test_host_memory_gives_back_what_it_took() -> None:
    host = HostMemory(blocks=3, block_ps=10, block_size=4)
    one, other = (Live(i, 0, 20, 10) for i in range(2))

    assert host.put(one, 9)  # 3 blocks
    assert not host.put(other, 1)
    assert not host.put(other, 0)  # nothing to keep
    assert (host.free, one.swapped, other.swapped) == (0, 9, 0)
    assert (host.delay(5), host.busy) == (30, False)
    host.fetch(one)
    assert (host.free, one.swapped) == (3, 0)
    assert host.delay(5) == 30


def test_vllm_v0_swaps_the_last_arrived_and_takes_it_back_before_anything_new() -> None:
    # 4 blocks of 4. A(6, 8) B(3, 4) at 0, C(1, 1) at 400. V0 wants a free block for each decode in its turn.
    #   0  prompts, 2 + 1 blocks                  109 -> 109  A1 B1
    # 109  a7 b4                                  102 -> 211  A2 B2
    # 211  a8 b5: B takes the last block          102 -> 313  A3 B3
    # 313  none is free for A: B out, 5 tokens in 2 blocks 14; a9 takes one  101 -> 428  A4
    # 428  a10, a11, a12; B needs 2 for 6 + 1 tokens, C is not looked at     303 -> 731  A7
    # 731  a13 takes the last                     101 -> 832  A8, done
    # 832  B in 14, b6                            101 -> 947  B4, done
    # 947  C                                      101 -> 1048
    world = serve(
        [(0, 6, 8), (0, 3, 4), (400, 1, 1)],
        lambda: VllmV0(preemption_mode="swap"),
        blocks=4,
        block_size=4,
        host=(4, KV),
    )

    assert first(world) == [109, 109, 1048]
    assert finished(world) == [832, 947, 1048]
    assert list(world.requests.swapped_tokens) == [0, 10, 0]


def test_vllm_v0_recomputes_by_default() -> None:
    # As above to 313; then a9 101 -> 414, a10 ... a12 303 -> 717, a13 101 -> 818; 6 tokens of B and C 107 -> 925
    world = serve([(0, 6, 8), (0, 3, 4), (400, 1, 1)], VllmV0, blocks=4, block_size=4, host=(4, KV))

    assert finished(world) == [818, 925, 925]
    assert list(world.requests.swaps) == [0, 0, 0]


def test_vllm_v0_takes_back_whoever_fits_an_empty_pool_and_refuses_who_never_will() -> None:
    # 3 blocks of 4 and A(9, 5), which stores 13 tokens at most but is asked for 12 of them here: B(9, 4) does.
    #   0  prompt, 3 blocks                       109 -> 109  1
    # 109  no block is free: out 21, in 21; b10   101 -> 252  2; the same again -> 395  3, -> 538  4, done
    swap = {"preemption_mode": "swap"}
    tight = {"blocks": 3, "block_size": 4, "host": (3, KV)}
    world = serve([(0, 9, 4)], lambda: VllmV0(**swap, watermark=0), **tight)  # type: ignore[arg-type]
    assert first(world) == [109]
    assert list(world.requests.swaps) == [3]

    # With a watermark of a block nobody starts or comes back with more than 8 tokens: A(8, 3) starts, and is refused
    # once it is out with 10. B(1, 1) then pays for A's way out.
    #   0  A's prompt, 2 blocks                   108 -> 108  A1
    # 108  a9 takes the last block                101 -> 209  A2
    # 209  no block is free: A out, refused; B    101 + 21 -> 331
    world = serve([(0, 8, 3), (150, 1, 1)], lambda: VllmV0(**swap, watermark=0.34), **tight)  # type: ignore[arg-type]
    assert list(world.requests.status) == [Status.REJECTED, Status.FINISHED]
    assert finished(world)[1] == 331


def test_an_asynchronous_policy_cannot_swap() -> None:
    class Ahead(OutOnce):
        asynchronous = True  # type: ignore[assignment]

    with pytest.raises(PolicyError, match=r"step 3: preempt of Request\(0, .* by swap while a step is under way"):
        played(Ahead, (9, KV))


def test_a_preemption_of_another_kind_is_refused() -> None:
    with pytest.raises(PolicyError, match="'drop'; 'recompute' or 'swap'"):
        played(lambda: OutOnce("drop"), (9, KV))  # type: ignore[arg-type]


# in a cluster

TABLE = [(0, 30, 60), (0, 30, 60), (0, 30, 60), (100, 30, 60)]


def crowded(**more: Any) -> Any:
    replicas = group(VllmV0, {"preemption_mode": "swap", "watermark": 0}, blocks=14, cost=Affine())
    return setup_of(trace_of(TABLE), [replicas], **more)


@pytest.mark.parametrize("leap", [True, False])
def test_a_client_that_gives_up_a_swapped_request_frees_its_host_memory(leap: bool) -> None:
    whole = serve_cluster(crowded(), leap)
    assert sum(whole.requests.swaps) > 0
    end = max(whole.requests.finished)
    for share in (0.3, 0.5, 0.7, 0.9):  # `audit` fails if host blocks are left behind
        served = serve_cluster(crowded(limits=Limits(timeout_s=end * share / 1e12)), leap)
        assert Status.TIMED_OUT in served.requests.status


def test_a_replica_that_fails_loses_its_host_memory_too() -> None:
    from chairlift.sim.study import Failures, Outage

    whole = serve_cluster(crowded())
    end = max(whole.requests.finished)
    for share in (0.3, 0.5, 0.7):
        outage = Outage(replica=0, at_s=end * share / 1e12, for_s=1e-9)
        served = serve_cluster(crowded(failures=Failures(schedule=[outage])))
        assert set(served.requests.status) == {Status.FINISHED}
        assert list(served.requests.emitted) == [output for _, _, output in TABLE]
