"""Schedulers that record: ``vllm serve … --scheduler-cls chairlift.backend.recorder.vllm.RecordingScheduler``.

They decide as vLLM's own, whose methods they call, and write what happens into the folder that ``CHAIRLIFT_RECORDING``
in the environment names (default: ``chairlift-recording``). `RecordingScheduler` is vLLM's asynchronous scheduler, its
default; `SynchronousRecordingScheduler` goes with ``--no-async-scheduling``. Only what is the same from vLLM 0.23 to
0.33 is touched: ``schedule``, ``get_grammar_bitmask`` (called once a step was handed over), ``update_from_output``,
``add_request``, ``finish_requests`` and ``shutdown``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from chairlift.backend.recorder.journal import Journal

FOLDER = "CHAIRLIFT_RECORDING"
SCHEDULER_LIMITS = (  # of vLLM's SchedulerConfig
    *("max_num_batched_tokens", "max_num_seqs", "async_scheduling", "long_prefill_token_threshold"),
    *("scheduler_reserve_full_isl", "max_num_scheduled_tokens"),
)
QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting")  # of requests that wait, in one version or another


Own: Any = object  # in whose place stands a scheduler of vLLM's


class _Recording(Own):
    """What is added to a scheduler of vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._journal = Journal(Path(os.environ.get(FOLDER, "chairlift-recording")), _engine(self))

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        self._journal.added(request.request_id, request.arrival_time, request.num_prompt_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.monotonic()
        plan = super().schedule(*args, **kwargs)
        waiting = sum(len(getattr(self, queue, ())) for queue in QUEUES)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        queues = (len(self.running), waiting, free, len(getattr(plan, "preempted_req_ids", None) or ()))
        drafts = getattr(plan, "scheduled_spec_decode_tokens", None) or {}
        self._journal.scheduled(plan, begun, plan.num_scheduled_tokens, self.requests, drafts, queues)
        return plan

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        self._journal.launched(scheduler_output)
        return super().get_grammar_bitmask(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        begun = time.monotonic()
        found = super().update_from_output(scheduler_output, model_runner_output)
        self._journal.done(scheduler_output, begun, _answers(found))
        if not self.running:
            self._journal.rest()
        return found

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().finish_requests(request_ids, *args, **kwargs)
        names = self.requests if request_ids is None else request_ids
        self._journal.dropped([names] if isinstance(names, str) else list(names))
        return found

    def shutdown(self) -> None:
        self._journal.close()
        super().shutdown()


def _answers(found: Any) -> Iterator[tuple[str, int, bool]]:
    for client in found.values():
        for each in client.outputs:
            yield each.request_id, len(each.new_token_ids), each.finish_reason is not None


def _engine(scheduler: Any) -> dict[str, Any]:
    """What the engine is, as a recording's summary says it."""
    config = scheduler.vllm_config
    limits = {name: getattr(config.scheduler_config, name, None) for name in SCHEDULER_LIMITS}
    limits |= {name: getattr(config.cache_config, name) for name in ("num_gpu_blocks", "block_size")}
    limits["enable_prefix_caching"] = bool(config.cache_config.enable_prefix_caching)
    sizes = config.compilation_config.cudagraph_capture_sizes
    if sizes:
        limits["graph_tokens"] = max(sizes)
    parallel = config.parallel_config
    drafts = getattr(config, "speculative_config", None)
    told: dict[str, Any] = {} if drafts is None else {"speculative": _speculative(drafts)}
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"):
        told[name] = getattr(parallel, name)
    return {
        "gpu": current_platform.get_device_name(),
        "torch": version("torch"),
        "vllm": version("vllm"),
        "model": str(config.model_config.model),
        "extra": told,
        "limits": {name: value for name, value in limits.items() if value is not None},
    }


def _speculative(drafts: Any) -> dict[str, Any]:
    """How the engine speculates, by vLLM's names."""
    return {"method": str(drafts.method), "num_speculative_tokens": int(drafts.num_speculative_tokens)}


class RecordingScheduler(_Recording, AsyncScheduler):
    """vLLM's asynchronous scheduler, which records."""


class SynchronousRecordingScheduler(_Recording, Scheduler):
    """vLLM's synchronous scheduler, which records."""
