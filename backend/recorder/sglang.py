"""A plug-in of SGLang 0.5.17 to 0.5.23 that records what its scheduler does: ``CHAIRLIFT_RECORDING=DIR``, no patch.

SGLang finds `plug_in` by its entry point, in every process that it starts. Unless ``CHAIRLIFT_RECORDING`` in the
environment names a folder, nothing happens. Else SGLang's own registry of hooks wraps the methods in `HOOKS`, which
are the same in all these versions. The scheduler decides as it does without, and writes what happens into the folder.

Of a step, planning is `Scheduler.get_next_batch_to_run` and the launch is `Scheduler.run_batch`. Its output is done
when the processor of results has waited for the copy of its tokens, and its update ends with
`Scheduler.process_batch_result`. The overlapped event loop plans and launches the next step in between; the normal one
does not. What the batch holds is read when the launch has ended, for the GPU is busy then.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chairlift.backend.recorder.journal import Journal

FOLDER = "CHAIRLIFT_RECORDING"
FIRST, LAST = (0, 5, 17), (0, 5, 23)
SETTINGS = (  # of SGLang, that change what its scheduler decides
    *("schedule_policy", "schedule_conservativeness", "prefill_max_requests", "prefill_decode_interval"),
    *("enable_mixed_chunk", "disable_radix_cache", "enable_priority_scheduling", "schedule_low_priority_values_first"),
    *("priority_scheduling_preemption_threshold", "disable_priority_preemption", "retraction_policy"),
    *("max_prefill_tokens", "max_running_requests", "page_size", "disable_overlap_schedule", "chunked_prefill_size"),
)
_WITHOUT = f"unset {FOLDER} to serve without a recording"


class _Recorder:
    """What is written of the one scheduler of this process."""

    def __init__(self, scheduler: Any, folder: Path) -> None:
        self.journal = Journal(folder, _engine(scheduler))
        self._scheduler = scheduler
        self._pages: int = scheduler.page_size
        self._wall = time.time() - time.perf_counter()  # SGLang's stamps are of the latter clock
        self._planned = (0.0, 0.0)  # when planning the latest step began and ended
        self._preempted = 0  # requests that went back to the queue since the last step
        self._processing = 0.0  # when the processing of the output at hand began
        self._kept = False  # whether something was written since the last rest

    def planned(self, begun: float) -> None:
        self._planned = (begun, time.monotonic())

    def queued(self, request: Any) -> None:
        """A request is at the end of the queue, for the first time or again."""
        if self.journal.knows(request.rid):
            self._preempted += 1
            return
        stats = request.time_stats
        stamp = stats.created_time or stats.scheduler_recv_time or time.perf_counter()
        asked = request.sampling_params
        prompt = len(request.origin_input_ids)
        self.journal.added(request.rid, stamp + self._wall, prompt, asked.max_new_tokens, bool(asked.ignore_eos))

    def launched(self, batch: Any, result: Any) -> None:
        launched = time.monotonic()
        contents = _contents(batch)
        if contents is not None:
            scheduler = self._scheduler
            free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
            others = scheduler.running_batch
            running = len(batch.reqs) + (0 if others is batch else len(others.reqs))
            queues = (running, len(scheduler.waiting_queue), free // self._pages, self._preempted)
            self.journal.holds(result, (*self._planned, launched), (*contents, *queues, contents[3]))
            self._preempted = 0

    def waited(self, result: Any) -> None:
        """Wait for the tokens of a step as SGLang would next, and note when they are there."""
        copied = result.copy_done
        if copied is not None:
            copied.synchronize()
        else:  # the normal loop: SGLang waits by copying the tokens
            stream = getattr(self._scheduler.device_module, "current_stream", None)
            wait = None if stream is None else getattr(stream(), "synchronize", None)
            if wait is not None:
                wait()
        self._processing = time.monotonic()

    def processed(self, batch: Any, result: Any) -> None:
        self.journal.counted(result, self._processing, batch.reqs, "FINISH_ABORT")
        self._kept = True

    def rested(self) -> None:
        if self._kept:
            self.journal.rest()
            self._kept = False


def _contents(batch: Any) -> tuple[int, int, int, int, int] | None:
    """Chunks, their tokens and query-key pairs, decodes and their context; None for a step that computes nothing."""
    mode = batch.forward_mode
    count = len(batch.reqs)
    if mode.is_decode():
        return (0, 0, 0, count, int(batch.seq_lens_cpu.sum())) if count else None
    if not mode.is_extend() or not count:
        return None
    decodes = len(batch.decoding_reqs or ()) if mode.is_mixed() else 0  # they stand behind the chunks
    chunks = count - decodes
    lengths, before = batch.extend_lens, batch.prefix_lens
    tokens = pairs = 0
    for length, start in zip(lengths[:chunks], before[:chunks], strict=True):
        tokens += length
        pairs += length * start + length * (length + 1) // 2
    return chunks, tokens, pairs, decodes, sum(before[chunks:]) + decodes


_recorder: _Recorder | None = None  # of this process, while its event loop runs


def _run(original: Callable[..., Any], scheduler: Any, *given: Any, **named: Any) -> Any:
    """`Scheduler.run_event_loop`: everything is set up; it ends with the server."""
    global _recorder
    parallel = _context(scheduler, "get_parallel")
    ranks = [getattr(parallel, name, 0) for name in ("tp_rank", "attn_tp_rank", "pp_rank", "attn_cp_rank")]
    if why := _refused(scheduler, parallel):
        raise SystemExit(f"error: Chairlift's recorder of SGLang: {why}; {_WITHOUT}")
    if any(ranks):  # the first of the ranks that share a model writes for all
        return original(scheduler, *given, **named)
    _recorder = _Recorder(scheduler, Path(os.environ[FOLDER]))
    try:
        return original(scheduler, *given, **named)
    finally:
        _recorder.journal.close()
        _recorder = None


def _plan(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if _recorder is None:
        return original(*given, **named)
    begun = time.monotonic()
    found = original(*given, **named)
    _recorder.planned(begun)
    return found


def _launch(original: Callable[..., Any], scheduler: Any, batch: Any, *given: Any, **named: Any) -> Any:
    result = original(scheduler, batch, *given, **named)
    if _recorder is not None:
        _recorder.launched(batch, result)
    return result


def _wait(original: Callable[..., Any], processor: Any, batch: Any, result: Any, *given: Any, **named: Any) -> Any:
    if _recorder is not None:
        _recorder.waited(result)
    return original(processor, batch, result, *given, **named)


def _process(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any, *given: Any, **named: Any) -> Any:
    found = original(scheduler, batch, result, *given, **named)
    if _recorder is not None:
        _recorder.processed(batch, result)
    return found


def _queue(original: Callable[..., Any], scheduler: Any, request: Any, *given: Any, **named: Any) -> Any:
    found = original(scheduler, request, *given, **named)
    if _recorder is not None and scheduler.waiting_queue and scheduler.waiting_queue[-1] is request:
        _recorder.queued(request)
    return found


def _abort(original: Callable[..., Any], scheduler: Any, asked: Any, *given: Any, **named: Any) -> Any:
    found = original(scheduler, asked, *given, **named)
    if _recorder is not None:  # SGLang takes the name for the beginning of names
        _recorder.journal.dropped(_recorder.journal.names("" if asked.abort_all else asked.rid))
    return found


def _idle(original: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if _recorder is not None:
        _recorder.rested()
    return original(*given, **named)


def _stamped(original: Callable[..., Any], stats: Any, *given: Any, **named: Any) -> Any:
    """The state that goes to the scheduler's process, with when the front end got the request."""
    state = original(stats, *given, **named)
    if stats.created_time:
        state["created_time"] = stats.created_time
    return state


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_STATS = "sglang.srt.observability.req_time_stats"
HOOKS: dict[str, Callable[..., Any]] = {  # each gets what it wraps first
    f"{_SCHEDULER}.run_event_loop": _run,
    f"{_SCHEDULER}.get_next_batch_to_run": _plan,
    f"{_SCHEDULER}.run_batch": _launch,
    f"{_SCHEDULER}.process_batch_result": _process,
    f"{_SCHEDULER}._add_request_to_queue": _queue,
    f"{_SCHEDULER}.abort_request": _abort,
    f"{_SCHEDULER}.on_idle": _idle,
    f"{_PROCESSOR}.process_batch_result_prefill": _wait,
    f"{_PROCESSOR}.process_batch_result_decode": _wait,
    f"{_STATS}.APIServerReqTimeStats.__getstate__": _stamped,
    f"{_STATS}.DPControllerReqTimeStats.__getstate__": _stamped,
}


def plug_in() -> None:
    """Register the hooks, if a recording is asked for.

    Raises:
        SystemExit: this version of SGLang was not looked at. It says so in a line.
    """
    if FOLDER not in os.environ:
        return
    told = version("sglang")
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", told)
    if numbers is None or not FIRST <= tuple(map(int, numbers.groups())) <= LAST:
        known = " to ".join(".".join(map(str, each)) for each in (FIRST, LAST))
        raise SystemExit(f"error: Chairlift records SGLang {known}, and this is {told}; {_WITHOUT}")
    hooks = import_module("sglang.srt.plugins.hook_registry")
    for target, hook in HOOKS.items():
        hooks.HookRegistry.register(target, hook, hooks.HookType.AROUND)


def _context(scheduler: Any, name: str) -> Any:
    """What SGLang resolved of its arguments, ``get_schedule`` or ``get_parallel``; else the arguments themselves."""
    try:
        return getattr(import_module("sglang.srt.runtime_context"), name)()
    except (ImportError, AttributeError):
        return scheduler.server_args


def _refused(scheduler: Any, parallel: Any) -> str:
    """Why steps of this scheduler are no rows of a recording; "" if they are."""
    if not scheduler.is_generation:
        return "the model generates nothing"
    if not scheduler.spec_algorithm.is_none():
        return "speculative decoding is not recorded"
    if getattr(parallel, "pp_size", 1) > 1:
        return "of several pipeline stages' steps many run at a time, none has a time of its own"
    ranks = getattr(parallel, "attn_dp_size", 1) or 1
    if ranks > 1 or getattr(scheduler.server_args, "enable_dp_attention", False):
        return "ranks of DP-attention step together, and each knows its own requests alone"
    if scheduler.disaggregation_mode.value not in (None, "null"):
        return "servers with a role of prefill or decode are not recorded"
    if scheduler.enable_pdmux or scheduler.dllm_config is not None:
        return "neither multiplexed prefills nor diffusion models are recorded"
    return ""


def _engine(scheduler: Any) -> dict[str, Any]:
    """What the engine is, as a recording's summary says it."""
    schedule, parallel = _context(scheduler, "get_schedule"), _context(scheduler, "get_parallel")
    given = scheduler.server_args
    limits = {name: getattr(schedule, name, getattr(given, name, None)) for name in SETTINGS}
    chunk = scheduler.chunked_prefill_size or -1
    limits |= {
        "page_size": scheduler.page_size,
        "chunked_prefill_size": chunk,
        "max_prefill_tokens": scheduler.max_prefill_tokens,
        "max_running_requests": scheduler.max_running_requests,
        "disable_overlap_schedule": not scheduler.enable_overlap,
        "block_size": scheduler.page_size,
        "num_gpu_blocks": scheduler.max_total_num_tokens // scheduler.page_size + 1,  # one spare, as vLLM counts
        "max_num_batched_tokens": chunk if chunk > 0 else scheduler.max_prefill_tokens,
        "max_num_seqs": scheduler.max_running_requests,
        "async_scheduling": bool(scheduler.enable_overlap),
    }
    graphs = getattr(given, "cuda_graph_config", None)
    if graphs is not None:
        limits["piecewise_graphs"] = graphs.prefill.backend != "disabled"
        if graphs.decode.backend != "disabled" and graphs.decode.max_bs:
            limits["graph_tokens"] = int(graphs.decode.max_bs)
    tensor, expert = (int(getattr(parallel, name, 1) or 1) for name in ("tp_size", "ep_size"))
    return {
        "gpu": str(getattr(scheduler.device_module, "get_device_name", lambda: scheduler.device)()),
        "torch": version("torch"),
        "sglang": version("sglang"),
        "model": str(given.model_path),
        "extra": {"tensor_parallel_size": tensor, "enable_expert_parallel": expert > 1},
        "limits": {name: value for name, value in limits.items() if value is not None},
    }
