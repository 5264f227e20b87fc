"""What an engine writes down while it serves: a line a step and a line a request, cheap enough to leave on.

One `Journal` belongs to one engine process, number N, and writes three files into a folder: ``raw-N.json`` (what the
engine is), ``raw-N.steps.csv`` and ``raw-N.requests.jsonl``. `chairlift.backend.recorder.folder` makes a recording of
them. Times are seconds of the machine's monotonic clock.
"""

from __future__ import annotations

import base64
import json
import os
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

STEP_COLUMNS = (
    *("schedule_s", "done_s", "schedule_cpu_s", "update_cpu_s", "launch_call_s", "wait_s"),
    *("prefill_requests", "prefill_tokens", "prefill_pairs", "decode_requests", "decode_context_tokens"),
    *("running", "waiting", "free_blocks", "preempted", "decode_tokens"),
)
BUFFER = 1 << 18  # bytes that are kept before a file is written to


class Scheduled(Protocol):
    """What is read of a request that is served; vLLM's has it in all versions."""

    num_prompt_tokens: int
    num_computed_tokens: int


class Counting(Protocol):
    """What is read of a request that holds its own answer; SGLang's has it in all versions."""

    rid: str
    output_ids: Sequence[int]
    finished_reason: object | None  # None: its answer goes on


class Journal:
    """The files of one engine process, in ``folder``. ``engine`` says what the engine is."""

    def __init__(self, folder: Path, engine: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"raw-{os.getpid()}"
        Path(f"{stem}.json").write_text(json.dumps(engine, indent=1) + "\n", encoding="utf-8")
        # both stay open for as long as the engine serves
        self._steps = Path(f"{stem}.steps.csv").open("w", buffering=BUFFER, encoding="utf-8")  # noqa: SIM115
        self._requests = Path(f"{stem}.requests.jsonl").open("w", buffering=BUFFER, encoding="utf-8")  # noqa: SIM115
        self._steps.write(",".join(STEP_COLUMNS) + "\n")
        self._begun: dict[int, list[Any]] = {}  # steps that were scheduled and are not done, by the id of their plan
        # arrival, taken in, prompt, tokens' times, and what else is to be written of it
        self._known: dict[str, tuple[float, float, int, array[float], str]] = {}
        self._wall = time.time() - time.monotonic()

    def added(
        self, name: str, arrival: float, prompt_tokens: int, max_tokens: int | None = None, ignore_eos: bool = False
    ) -> None:
        """A request is taken in, which arrived at the Unix time ``arrival``.

        ``max_tokens``, its answer's limit, and ``ignore_eos``, whether nothing else ends it, are for engines whose
        decisions rest on them.
        """
        more = "" if max_tokens is None else f", {max_tokens}, {ignore_eos:d}"
        self._known[name] = (arrival - self._wall, time.monotonic(), prompt_tokens, array("d"), more)

    def knows(self, name: str) -> bool:
        """Whether the request was taken in, and has not ended."""
        return name in self._known

    def names(self, beginning: str = "") -> list[str]:
        """Of the requests that it knows, those whose name begins so."""
        return [name for name in self._known if name.startswith(beginning)]

    def dropped(self, names: Iterable[str]) -> None:
        """Requests end without an answer: their clients went away."""
        for name in names:
            self._known.pop(name, None)

    def scheduled(
        self,
        plan: object,
        begun: float,
        tokens: Mapping[str, int],
        requests: Mapping[str, Scheduled],
        drafts: Mapping[str, object],
        queues: tuple[int, int, int, int],
    ) -> None:
        """A step is planned.

        Args:
            plan: the engine's own object for the step, which comes back in `launched` and `done`.
            begun: when planning began.
            tokens: of each request, how many the step computes.
            requests: those that the engine serves. Their computed tokens count this step's already.
            drafts: those whose drafted tokens the step verifies.
            queues: running and waiting requests, free blocks, and requests that the plan preempted.
        """
        ended = time.monotonic()
        prefills = prompt = pairs = decodes = context = decoded = 0
        for name, count in tokens.items():
            request = requests[name]
            before = request.num_computed_tokens - count
            if before >= request.num_prompt_tokens and (count == 1 or name in drafts):
                decodes += 1
                decoded += count
                context += before + count
            else:  # of a prompt, or of what is computed again after a preemption
                prefills += 1
                prompt += count
                pairs += count * before + count * (count + 1) // 2
        if tokens:
            row = (prefills, prompt, pairs, decodes, context, *queues, decoded)
            self.holds(plan, (begun, ended, ended), row)

    def holds(self, plan: object, times: tuple[float, float, float], contents: Sequence[int]) -> None:
        """A step is planned, and known by what it holds.

        Args:
            plan: as in `scheduled`.
            times: when planning began and ended, and when the launch ended.
            contents: the columns of `STEP_COLUMNS` from ``prefill_requests`` on.
        """
        self._begun[id(plan)] = [*times, *contents]

    def launched(self, plan: object) -> None:
        """The step was handed to the GPU's process, or launched where that is the engine's own."""
        row = self._begun.get(id(plan))
        if row is not None:
            row[2] = time.monotonic()

    def done(self, plan: object, begun: float, answers: Iterable[tuple[str, int, bool]]) -> None:
        """A step's output was processed.

        Args:
            plan: as in `scheduled`.
            begun: when processing began.
            answers: of each request that got tokens: its name, how many, and whether they are its last.
        """
        now = time.monotonic()
        known = self._known
        for name, count, last in answers:
            entry = known.get(name)
            if entry is None:
                continue
            times = entry[3]
            if count == 1:
                times.append(now)
            else:
                times.extend([now] * count)
            if last:
                self._finished(known.pop(name))
        self._written(plan, begun, now)

    def counted(self, plan: object, begun: float, requests: Iterable[Counting], aborted: str) -> None:
        """As `done`, where requests hold their answers: what is new in them came with this step.

        ``aborted`` names the class of the reasons that stand for a client that went away.
        """
        now = time.monotonic()
        known = self._known
        for request in requests:
            entry = known.get(request.rid)
            if entry is None:
                continue
            times, reason = entry[3], request.finished_reason
            new = len(request.output_ids) - len(times)
            if new == 1:
                times.append(now)
            elif new:
                times.extend([now] * new)
            if reason is not None:
                del known[request.rid]
                if type(reason).__name__ != aborted:
                    self._finished(entry)
        self._written(plan, begun, now)

    def _written(self, plan: object, begun: float, now: float) -> None:
        row = self._begun.pop(id(plan), None)
        if row is None:
            return
        start, ended, launched, *rest = row
        head = f"{start:.6f},{begun:.6f},{ended - start:.6f},{now - begun:.6f},{launched - ended:.6f}"
        self._steps.write(f"{head},{max(0.0, begun - launched):.6f},{','.join(map(str, rest))}\n")

    def _finished(self, entry: tuple[float, float, int, array[float], str]) -> None:
        arrival, added, prompt, times, more = entry
        if times:
            packed = base64.b64encode(times.tobytes()).decode()
            self._requests.write(f'[{arrival:.6f}, {added:.6f}, {prompt}, "{packed}"{more}]\n')

    def rest(self) -> None:
        """Write what is kept: the engine has nothing to do."""
        self._steps.flush()
        self._requests.flush()

    def close(self) -> None:
        """Write what is kept: the engine ends."""
        self._steps.close()
        self._requests.close()
