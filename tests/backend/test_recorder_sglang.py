"""The recorder of SGLang: a made-up scheduler of its shape by hand, and its own one where that is installed."""

from __future__ import annotations

import gzip
import importlib.util
import os
import subprocess
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chairlift.backend.fitting.recording import Experiment, RecordingError, read
from chairlift.backend.recorder import journal
from chairlift.backend.recorder import sglang as recorder
from chairlift.backend.recorder.folder import convert
from kit import sglang_on_cpu
from kit.places import IMPORTS, TESTS

POOL = 100  # pages of two tokens


class Clock:
    """A clock that is set by hand. Both of SGLang's clocks are the same on Linux."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def time(self) -> float:
        return self.now + 1000


class FINISH_ABORT:
    pass


class Length:
    """The reason of an answer that has all its tokens."""


@dataclass(eq=False)
class Req:
    rid: str
    prompt: int
    output: int
    created: float = 0.0
    received: float = 0.0
    computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    finished_reason: object | None = None

    @property
    def sampling_params(self) -> Any:
        """As a client's that asks for one more than it gets, or for exactly that many if it tells when it came."""
        return SimpleNamespace(max_new_tokens=self.output + (not self.created), ignore_eos=True)

    @property
    def origin_input_ids(self) -> range:
        return range(self.prompt)

    @property
    def time_stats(self) -> Any:
        return SimpleNamespace(created_time=self.created, scheduler_recv_time=self.received)


@dataclass(frozen=True)
class Mode:
    name: str

    def is_decode(self) -> bool:
        return self.name == "decode"

    def is_extend(self) -> bool:
        return self.name in ("extend", "mixed")

    def is_mixed(self) -> bool:
        return self.name == "mixed"


@dataclass(eq=False)
class Batch:
    forward_mode: Mode
    reqs: list[Req]
    extend_lens: list[int] = field(default_factory=list)
    prefix_lens: list[int] = field(default_factory=list)
    decoding_reqs: list[Req] | None = None
    seq_lens_cpu: Any = None

    def copy(self) -> Batch:
        return Batch(self.forward_mode, list(self.reqs), decoding_reqs=self.decoding_reqs)


@dataclass
class Result:
    copy_done: Any


def scheduler_of(clock: Clock) -> Any:
    """A scheduler of SGLang's shape, whose GPU takes 1 s a step: prompts first, in chunks of 8 tokens, then decodes."""

    class Ready:
        def __init__(self, at: float) -> None:
            self._at = at

        def synchronize(self) -> None:
            clock.now = max(clock.now, self._at)

    class Processor:
        def __init__(self) -> None:
            self.waited: list[float] = []

        def process_batch_result_prefill(self, batch: Batch, result: Result) -> None:
            self._process(batch, result)

        def process_batch_result_decode(self, batch: Batch, result: Result) -> None:
            self._process(batch, result)

        def _process(self, batch: Batch, result: Result) -> None:
            result.copy_done.synchronize()
            self.waited.append(clock.now)
            for req in batch.reqs:
                done = req.computed >= req.prompt + len(req.output_ids)
                if req.finished_reason is None and done:
                    req.output_ids.append(7)
                    if len(req.output_ids) == req.output:
                        req.finished_reason = Length()
            clock.now += 0.0625

    class Scheduler:
        chunk = 8

        def __init__(self, arriving: list[tuple[float, Req]], overlap: bool = True, mixed: bool = False) -> None:
            self.arriving, self.enable_overlap, self.mixed = arriving, overlap, mixed
            self.page_size, self.max_total_num_tokens, self.chunked_prefill_size = 2, 2 * POOL, self.chunk
            self.max_prefill_tokens, self.max_running_requests, self.device = 64, 4, "cpu"
            self.server_args = SimpleNamespace(model_path="m", tp_size=1, schedule_policy="fcfs")
            self.spec_algorithm = SimpleNamespace(is_none=lambda: True)
            self.disaggregation_mode = SimpleNamespace(value="null")
            self.is_generation, self.enable_pdmux, self.dllm_config = True, False, None
            self.device_module = SimpleNamespace()
            self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 2 * POOL - 11)
            self.tree_cache = SimpleNamespace(evictable_size=lambda: 4)
            self.waiting_queue: list[Req] = []
            self.running_batch = Batch(Mode("decode"), [])
            self.joining: list[Req] = []  # of the step before, if it computed prompts
            self.processor = Processor()
            self.gpu_free = 0.0
            self.idled = 0

        def run_event_loop(self) -> None:
            pending: deque[tuple[Batch, Result]] = deque()
            while True:
                while self.arriving and self.arriving[0][0] <= clock.now:
                    self._add_request_to_queue(self.arriving.pop(0)[1])
                batch = self.get_next_batch_to_run()
                if batch is not None:
                    result = self.run_batch(batch)
                    pending.append((batch.copy(), result))
                if len(pending) > (self.enable_overlap and batch is not None):
                    self.process_batch_result(*pending.popleft())
                elif batch is None:
                    self.on_idle()
                    if not self.arriving:
                        return
                    clock.now = max(clock.now, self.arriving[0][0])

        def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
            self.waiting_queue.append(req)

        def get_next_batch_to_run(self) -> Batch | None:
            clock.now += 0.25
            running = self.running_batch.reqs
            running += [r for r in self.joining if r.computed >= r.prompt]
            running[:] = [r for r in running if not r.finished_reason and r.computed < r.prompt + r.output - 1]
            left = self.chunk
            chunks: list[tuple[Req, int, int]] = []
            for req in [*self.waiting_queue]:
                length = min(left, req.prompt - req.computed)
                if length:
                    chunks.append((req, req.computed, length))
                    req.computed += length
                    left -= length
                if req.computed == req.prompt:
                    self.waiting_queue.remove(req)
            decodes = list(running) if self.mixed or not chunks else []
            for req in decodes:
                req.computed += 1
            self.joining = []
            if chunks:
                tail = [(req, req.computed - 1, 1) for req in decodes]
                reqs, before, lengths = map(list, zip(*chunks, *tail, strict=True))
                self.joining = reqs
                if decodes:  # all go into the mixed batch, and come back with the next plan
                    self.running_batch = Batch(Mode("decode"), [])
                mode = Mode("mixed" if decodes else "extend")
                return Batch(mode, reqs, lengths, before, decodes or None)
            if decodes:
                self.running_batch.seq_lens_cpu = np.array([r.computed for r in decodes])
                return self.running_batch
            return None

        def run_batch(self, batch: Batch) -> Result:
            clock.now += 0.125
            self.gpu_free = max(self.gpu_free, clock.now) + 1.0
            return Result(Ready(self.gpu_free))

        def process_batch_result(self, batch: Batch, result: Result) -> None:
            if batch.forward_mode.is_decode():
                self.processor.process_batch_result_decode(batch, result)
            else:
                self.processor.process_batch_result_prefill(batch, result)

        def abort_request(self, asked: Any) -> None:
            self.waiting_queue = [r for r in self.waiting_queue if not r.rid.startswith(asked.rid)]

        def on_idle(self) -> None:
            self.idled += 1

    owners = {"Scheduler": Scheduler, "SchedulerBatchResultProcessor": Processor}
    for target, hook in recorder.HOOKS.items():
        *_, owner, name = target.split(".")
        if owner in owners:
            setattr(owners[owner], name, _around(getattr(owners[owner], name), hook))
    return Scheduler


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    """As SGLang's registry wraps a method."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    made = Clock()
    monkeypatch.setattr(journal, "time", made)
    monkeypatch.setattr(recorder, "time", made)
    monkeypatch.setattr(recorder, "version", lambda name: {"sglang": "0.5.23", "torch": "2.11.0"}[name])
    monkeypatch.setenv(recorder.FOLDER, str(tmp_path))
    return made


def recorded(folder: Path) -> Experiment:
    convert(folder, "m")
    return read(folder, "m").experiments["served"]


def two() -> list[tuple[float, Req]]:
    """a, of 5 tokens, whose front end says when it came; and b, of 10, of which the scheduler knows alone."""
    return [(50.0, Req("a", 5, 3, created=49.5)), (50.0, Req("b", 10, 2, received=50.0))]


def test_the_normal_loop_by_hand(tmp_path: Path, clock: Clock) -> None:
    """Steps: 5 + 3 of b's tokens; the other 7; a and b decode; a decodes. Each plans 0.25 s, launches 0.125, runs 1."""
    made = scheduler_of(clock)(two(), overlap=False)
    made.run_event_loop()
    found = recorded(tmp_path)
    requests, steps = found.requests, found.steps

    a_step = 0.25 + 0.125 + 1 + 0.0625
    assert steps["schedule_s"] == pytest.approx(0.5 + a_step * np.arange(4))
    assert steps["done_s"] == pytest.approx(0.5 + a_step * np.arange(4) + 1.375)
    for column, seconds in (("schedule_cpu", 0.25), ("launch_call", 0.125), ("wait", 1.0), ("update_cpu", 0.0625)):
        assert steps[f"{column}_s"] == pytest.approx([seconds] * 4)
    assert steps["prefill_requests"].tolist() == [2, 1, 0, 0]
    assert steps["prefill_tokens"].tolist() == [8, 7, 0, 0]
    assert steps["prefill_pairs"].tolist() == [sum(range(6)) + sum(range(4)), sum(range(4, 11)), 0, 0]
    assert steps["decode_requests"].tolist() == steps["decode_tokens"].tolist() == [0, 0, 2, 1]
    assert steps["decode_context_tokens"].tolist() == [0, 0, 6 + 11, 7]
    assert steps["waiting"].tolist() == [1, 0, 0, 0]
    assert steps["running"].tolist() == [2, 2, 2, 1]
    assert steps["free_blocks"].tolist() == [(2 * POOL - 7) // 2] * 4
    assert requests["arrival_s"].tolist() == [0.0, 0.5]
    assert requests["added_s"].tolist() == [0.5, 0.5]
    assert requests["prompt_tokens"].tolist() == [5, 10]
    assert requests["output_tokens"].tolist() == [3, 2]
    assert requests["max_tokens"].tolist() == [3, 3]
    assert requests["ignore_eos"].tolist() == [1, 0]  # b ended before its limit, by whatever
    assert requests["first_token_s"] == pytest.approx([0.5 + a_step, 0.5 + 2 * a_step])
    assert requests["last_token_s"] == pytest.approx([0.5 + 4 * a_step, 0.5 + 3 * a_step])
    assert made.processor.waited == pytest.approx(49.5 + steps["done_s"])  # nobody waits longer for being recorded
    limits = found.limits
    assert (limits["num_gpu_blocks"], limits["block_size"], limits["max_num_seqs"]) == (POOL + 1, 2, 4)
    assert (limits["max_num_batched_tokens"], limits["async_scheduling"]) == (8, False)


def test_the_overlapped_loop_by_hand(tmp_path: Path, clock: Clock) -> None:
    """The second step is planned and launched before the first one's output is processed, and so on."""
    scheduler_of(clock)(two(), overlap=True).run_event_loop()
    steps = recorded(tmp_path).steps

    assert steps["schedule_s"][:2] == pytest.approx([0.5, 0.875])
    assert steps["done_s"] == pytest.approx(0.875 + np.array([1, 2, 3, 4]))  # the GPU never rests
    assert steps["wait_s"][:2] == pytest.approx([1.0, 1.625])
    assert steps["schedule_s"][2:] == pytest.approx(steps["done_s"][:2] + 0.0625)
    assert steps["prefill_tokens"].tolist() == [8, 7, 0, 0]
    assert steps["decode_context_tokens"].tolist() == [0, 0, 17, 7]


def test_decodes_of_a_mixed_step_are_told_from_its_chunks(tmp_path: Path, clock: Clock) -> None:
    scheduler_of(clock)(two(), overlap=False, mixed=True).run_event_loop()
    steps = recorded(tmp_path).steps

    assert steps["prefill_requests"].tolist() == [2, 1, 0]
    assert steps["prefill_tokens"].tolist() == [8, 7, 0]
    assert steps["prefill_pairs"].tolist() == [21, sum(range(4, 11)), 0]
    assert steps["decode_requests"].tolist() == [0, 1, 2]
    assert steps["decode_context_tokens"].tolist() == [0, 6, 7 + 11]
    assert steps["running"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("3, 2", "it has 3 tokens, and its limits are 3 and 2"),
        ("2, 1", "it has 3 tokens, and its limits are 2 and 1"),
        ("3", "not enough values to unpack"),
    ],
)
def test_limits_that_do_not_fit_are_said(tmp_path: Path, clock: Clock, row: str, rule: str) -> None:
    scheduler_of(clock)(two()).run_event_loop()
    [path] = tmp_path.glob("raw-*.requests.jsonl")
    b, a = path.read_text().splitlines()
    path.write_text(f"{b}\n{a.removesuffix('3, 1]')}{row}]\n")

    with pytest.raises(RecordingError, match=f"requests.jsonl:2: not a request of the recorder's: {rule}"):
        convert(tmp_path, "m")


def test_a_recordings_limits_are_checked(tmp_path: Path, clock: Clock) -> None:
    scheduler_of(clock)(two()).run_event_loop()
    convert(tmp_path, "m")
    path = tmp_path / "m_requests.csv.gz"
    header, a, b = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert header.endswith("max_tokens,ignore_eos")
    assert a.endswith(",3,1")

    for row, rule in (
        (a.removesuffix(",3,1") + ",2,1", "max_tokens are less than its output"),
        (a.removesuffix(",3,1") + ",4,1", "a request that ignores EOS must have max_tokens tokens"),
        (a.removesuffix(",3,1") + ",3.5,1", "max_tokens and ignore_eos must be whole numbers"),
        (a.removesuffix(",3,1") + ",3,7", "ignore_eos is not 0 or 1"),
    ):
        path.write_bytes(gzip.compress("\n".join([header, row, b, ""]).encode()))
        with pytest.raises(RecordingError, match=rule):
            read(tmp_path, "m")


def test_who_comes_back_to_the_queue_was_preempted_and_who_aborts_is_left_out(tmp_path: Path, clock: Clock) -> None:
    made = scheduler_of(clock)([*two(), (50.0, Req("c1", 3, 2)), (50.0, Req("d", 3, 3))], overlap=False)
    plan, turns = type(made).get_next_batch_to_run, []

    def meddled(self: Any) -> Any:
        turns.append(len(turns))
        if turns[-1] == 1:
            self.abort_request(SimpleNamespace(rid="c", abort_all=False))
        if turns[-1] == 3:  # a goes back, with all that it has computed
            [back] = [each for each in self.running_batch.reqs if each.rid == "a"]
            self.running_batch.reqs.remove(back)
            back.computed = 0
            self._add_request_to_queue(back, is_retracted=True)
        if turns[-1] == 5:
            for each in self.running_batch.reqs:
                if each.rid == "d":
                    each.finished_reason = FINISH_ABORT()
        return plan(self)

    type(made).get_next_batch_to_run = meddled
    made.run_event_loop()
    found = recorded(tmp_path)

    assert found.steps["preempted"].sum() == 1
    assert sorted(found.requests["prompt_tokens"].tolist()) == [5, 10]
    assert sorted(found.requests["output_tokens"].tolist()) == [2, 3]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"is_generation": False}, "the model generates nothing"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, "speculative decoding is not recorded"),
        ({"server_args": SimpleNamespace(pp_size=2)}, "several pipeline stages"),
        ({"server_args": SimpleNamespace(enable_dp_attention=True)}, "ranks of DP-attention"),
        ({"disaggregation_mode": SimpleNamespace(value="prefill")}, "a role of prefill or decode"),
        ({"enable_pdmux": True}, "multiplexed prefills"),
    ],
)
def test_what_is_no_row_of_a_recording_is_refused(clock: Clock, changed: dict[str, Any], why: str) -> None:
    made = scheduler_of(clock)([])
    for name, value in changed.items():
        setattr(made, name, value)

    with pytest.raises(SystemExit, match=f"{why}.*; unset CHAIRLIFT_RECORDING"):
        made.run_event_loop()


def test_ranks_but_the_first_write_nothing(tmp_path: Path, clock: Clock) -> None:
    made = scheduler_of(clock)(two())
    made.server_args.tp_rank = 1
    made.run_event_loop()

    assert made.idled == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[Any, str]]]:
    """SGLang's registry of hooks, made up: target → hook and kind."""
    found: dict[str, tuple[Any, str]] = {}
    hooks = types.ModuleType("sglang.srt.plugins.hook_registry")
    register = lambda target, hook, kind: found.update({target: (hook, kind)})  # noqa: E731
    hooks.HookRegistry = SimpleNamespace(register=register)  # type: ignore[attr-defined]
    hooks.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
    return found


@pytest.mark.parametrize("told", ["0.5.17", "0.5.20.post1", "0.5.23"])
def test_versions_that_are_known_get_the_hooks(
    clock: Clock, registry: dict[str, tuple[Any, str]], monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setattr(recorder, "version", lambda _: told)
    recorder.plug_in()

    assert registry == {target: (hook, "around") for target, hook in recorder.HOOKS.items()}


@pytest.mark.parametrize("told", ["0.5.16", "0.5.24", "0.6.0", "unknown"])
def test_other_versions_are_refused_in_a_line(
    clock: Clock, registry: dict[str, tuple[Any, str]], monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setattr(recorder, "version", lambda _: told)
    with pytest.raises(SystemExit, match=f"error: Chairlift records SGLang 0.5.17 to 0.5.23, and this is {told};"):
        recorder.plug_in()

    assert registry == {}


def test_without_a_folder_nothing_happens(
    clock: Clock, registry: dict[str, tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(recorder.FOLDER)
    monkeypatch.setattr(recorder, "version", lambda _: "0.1")
    recorder.plug_in()

    assert registry == {}


def test_the_front_end_tells_when_a_request_came() -> None:
    stats = SimpleNamespace(created_time=12.5)
    hook = partial(recorder.HOOKS["sglang.srt.observability.req_time_stats.APIServerReqTimeStats.__getstate__"])

    assert hook(lambda _: {"a": 1}, stats) == {"a": 1, "created_time": 12.5}
    assert hook(lambda _: {"a": 1}, SimpleNamespace(created_time=0.0)) == {"a": 1}


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
@pytest.mark.parametrize("loop", ["overlap", "normal"])
def test_a_real_scheduler_is_recorded(tmp_path: Path, loop: str) -> None:
    """What 30 prompts come to is known in closed form, whatever the steps: tokens, pairs and contexts."""
    sglang_on_cpu.prepare(tmp_path)
    out = tmp_path / "out"
    paths = [str(tmp_path), str(IMPORTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment[recorder.FOLDER] = str(out)
    program = [sys.executable, str(TESTS / "kit" / "sglang_on_cpu.py"), str(tmp_path), *["normal"] * (loop == "normal")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    prompts, output = sglang_on_cpu.PROMPTS, sglang_on_cpu.OUTPUT
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"SGLang's scheduler does not start here: {done.stderr.splitlines()[-1]}")
    assert f"tokens {len(prompts) * output}" in done.stdout, done.stderr[-2000:]

    found = recorded(out)
    requests, steps = found.requests, found.steps
    assert sorted(requests["prompt_tokens"].tolist()) == prompts
    assert requests["output_tokens"].tolist() == [output] * len(prompts)
    assert steps["prefill_tokens"].sum() == sum(prompts)
    assert steps["prefill_pairs"].sum() == sum(n * (n + 1) // 2 for n in prompts)
    # an overlapped loop may plan one more for a request whose last token it has not seen
    spare = len(prompts) if loop == "overlap" else 0
    decodes, contexts = len(prompts) * (output - 1), sum(sum(range(n + 1, n + output)) for n in prompts)
    assert decodes <= steps["decode_requests"].sum() <= decodes + spare
    assert contexts <= steps["decode_context_tokens"].sum() <= contexts + spare * (max(prompts) + output)
    assert (steps["prefill_tokens"] + steps["decode_requests"]).max() <= sglang_on_cpu.CHUNK
    assert (steps["decode_requests"] + steps["prefill_requests"]).max() <= sglang_on_cpu.SLOTS
    assert np.median(np.diff(steps["done_s"])) >= sglang_on_cpu.STEP_S
    assert found.limits["num_gpu_blocks"] == sglang_on_cpu.POOL + 1
    assert found.limits["async_scheduling"] == (loop == "overlap")
