"""Every policy with settings that make it busy, and random requests and costs: what leap ≡ step is tried on."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from chairlift.backend.base import NO_HOST, WHOLE, Host
from chairlift.policies.base import Scheduler
from chairlift.policies.deadline import Deadline
from chairlift.policies.fair import Fair
from chairlift.policies.mlfq import Mlfq
from chairlift.policies.orca import Orca
from chairlift.policies.priority import Priority
from chairlift.policies.sarathi import Sarathi
from chairlift.policies.sglang import Sglang
from chairlift.policies.sjf import Sjf, Srpt
from chairlift.policies.slo import Slo
from chairlift.policies.static import Static
from chairlift.policies.tgi import Tgi
from chairlift.policies.vllm import Vllm
from chairlift.policies.vllm_v0 import VllmV0
from kit.worlds import Affine

POLICIES: dict[str, Callable[[int], Scheduler]] = {
    "static": lambda n: Static(batch=n),
    "static-global": lambda n: Static(batch=n, pad_to="global", pause_ms=0.000001),
    "static-impatient": lambda n: Static(batch=n, start="impatient"),
    "static-window": lambda n: Static(batch=n, max_wait_ms=0.00001),
    "orca-declared": lambda n: Orca(max_batch=n, reserve="declared"),
    "orca-pow2": lambda n: Orca(max_batch=n, reserve="pow2"),
    "orca-oracle": lambda n: Orca(max_batch=n, reserve="oracle"),
    "orca-buddy": lambda n: Orca(max_batch=n * 2, reserve="declared", allocator="buddy"),
    "tgi": lambda n: Tgi(max_batch_total_tokens=n * 60, max_waiting_tokens=3),
    "tgi-eager": lambda n: Tgi(max_batch_total_tokens=200, waiting_served_ratio=0.3, max_batch_prefill_tokens=64),
    "vllm": lambda n: Vllm(
        async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=n
    ),
    "vllm-tight": lambda n: Vllm(
        async_scheduling=False, max_num_batched_tokens=7, max_num_seqs=n * 4, long_prefill_token_threshold=5
    ),
    "vllm-whole": lambda n: Vllm(
        async_scheduling=False, max_num_batched_tokens=2000, max_num_seqs=n, enable_chunked_prefill=False
    ),
    "vllm-eager": lambda n: Vllm(
        async_scheduling=False, enable_prefix_caching=False, max_num_batched_tokens=48, scheduler_reserve_full_isl=False
    ),
    "vllm-turns-away": lambda n: Vllm(
        max_num_batched_tokens=64, max_num_seqs=n, max_num_queued_reqs=3 * n, max_num_queued_tokens=90
    ),
    "vllm-cadence": lambda n: Vllm(
        enable_prefix_caching=False, max_num_batched_tokens=20, prefill_schedule_interval=n, async_scheduling=n > 3
    ),
    "vllm-fair-share": lambda n: Vllm(
        enable_prefix_caching=False,
        max_num_batched_tokens=30,
        long_prefill_token_threshold=n,
        long_prefill_token_threshold_adaptive=True,
        max_num_active_seqs=2 * n,
        scheduler_reserve_full_isl=False,
        watermark=0.05 * n,
    ),
    "vllm-async": lambda n: Vllm(enable_prefix_caching=False, max_num_batched_tokens=64, max_num_seqs=n),
    "vllm-async-tight": lambda n: Vllm(
        enable_prefix_caching=False, max_num_batched_tokens=7, max_num_seqs=n * 4, long_prefill_token_threshold=5
    ),
    "vllm-async-priority": lambda n: Vllm(max_num_batched_tokens=32, max_num_seqs=n, scheduling_policy="priority"),
    "sarathi": lambda n: Sarathi(budget=9, max_batch=n),
    "sarathi-cache": lambda n: Sarathi(budget=40, max_batch=n, watermark=0.2, enable_prefix_caching=True),
    "vllm-v0": lambda n: VllmV0(max_num_seqs=n * 3),
    "vllm-v0-swap": lambda n: VllmV0(max_num_seqs=n * 3, preemption_mode="swap", watermark=0),
    "sglang": lambda n: Sglang(chunked_prefill_size=30, max_running_requests=n * 3),
    "sglang-bold": lambda n: Sglang(chunked_prefill_size=11, schedule_conservativeness=0, enable_mixed_chunk=n > 3),
    "sjf": lambda n: Sjf(budget=20, max_batch=n, predictions="noisy", tau=0.5),
    "sjf-patient": lambda n: Sjf(max_batch=n, starvation_steps=5),
    "srpt": lambda n: Srpt(budget=30, max_batch=n, keep_from=1.0),
    "srpt-swap": lambda n: Srpt(max_batch=n * 2, preemption="swap", predictions="buckets", buckets=3, accuracy=0.8),
    "srpt-patient": lambda n: Srpt(max_batch=n, preemption="swap", starvation_steps=6, quantum=5),
    "fair-tenants": lambda n: Fair(budget=20, max_batch=n),
    "deadline-priority": lambda n: Deadline(budget=40, max_batch=n, tpot_ms=3e-6, ttft_ms=[5e-6, 2e-5], least_chunk=3),
    "slo": lambda n: Slo(budget=40, max_batch=n, tpot_ms=2.5e-6, least_chunk=2),
    "classes-priority": lambda n: Priority(budget=20, max_batch=n),
    "classes-swap-priority": lambda n: Priority(budget=50, max_batch=n * 2, preemption="swap", age_s=1e-8),
    "mlfq": lambda n: Mlfq(max_batch=n, quantum=3),
    "mlfq-promote": lambda n: Mlfq(max_batch=n * 3, quantum=2, levels=4, promote_steps=7),
    "mlfq-recompute": lambda n: Mlfq(max_batch=n, quantum=5, ratio=3, preemption="recompute"),
    "vllm-priority": lambda n: Vllm(
        async_scheduling=False, max_num_batched_tokens=32, max_num_seqs=n, scheduling_policy="priority"
    ),
}


# few distinct arrival times, so that ties with step boundaries and with each other are common
arrivals = st.one_of(st.integers(0, 40).map(lambda k: k * 1000), st.integers(0, 60_000))


rows = st.lists(st.tuples(arrivals, st.integers(1, 50), st.integers(1, 60)), min_size=1, max_size=25)


backends = st.builds(
    Affine,
    fixed=st.sampled_from([1, 1000, 997]),
    token=st.sampled_from([0, 10]),
    context=st.sampled_from([0, 1, 3]),
    host=st.sampled_from([NO_HOST, Host(), Host(schedule=5, launch=40, update=7), Host(200, 600, 400)]),
    each=st.sampled_from([0, 0, 30]),
    chunk_launch=st.sampled_from([0, 3000]),
    chunk_tail=st.sampled_from([WHOLE, 0, 700]),
    decode_tail=st.sampled_from([WHOLE, WHOLE, 500]),
    late=st.booleans(),
    arrival=st.sampled_from([0, 0, 90, 2500]),
    arrival_token=st.sampled_from([0, 0, 2]),
    vouch=st.sampled_from([1, 3, 1 << 60]),
    cap=st.sampled_from([40, 200, 1 << 60]),
)
