"""Whatever a policy or router of one's own does, one line names it, the step, the number and the limit."""

from __future__ import annotations

import pickle
import re
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from chairlift.policies.base import PolicyError, PolicyRaised, Request, Scheduler, Step
from chairlift.sim.cluster.replica import WAKINGS
from chairlift.sim.replica.planner import FRUITLESS
from chairlift.sim.replica.step import END_OF_TIME
from kit.command import POLICY, ROUTER, SCENARIO, Result, chairlift
from kit.worlds import play, trace_of

HEAD = POLICY[: POLICY.index("        room = ")]  # its `schedule` begins on line 14
AT = r"Request\(0, prompt "


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_policy(*lines: str, after: str = "") -> Result:
    """Run a policy whose ``schedule`` is these lines; ``after``: what its class holds besides."""
    Path("mine.py").write_text(HEAD + "".join(f"        {line}\n" for line in lines) + after)
    Path("s.yaml").write_text(SCENARIO)
    return chairlift("run", "s.yaml", "-q", "--policy", "mine.py")


def line_of(result: Result) -> str:
    """The only line of standard error, and nothing is written."""
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1), result.err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())
    return result.err.removeprefix("error: ").removesuffix("\n")


FIRST = "first = step.waiting[0]"
NUMBERS = {
    "a part of a token": ("step.admit(first, 1.5)", f"admit of {AT}.*: 1.5 is not a whole number"),
    "tokens as text": ("step.admit(first, '7')", f"admit of {AT}.*: '7' is not a whole number"),
    "no tokens": ("step.admit(first, 0)", f"admit with 0 tokens of {AT}.*: [0-9]+ remain"),
    "a part of a reservation": ("step.admit(first, 1, reserve=99.5)", f"admit of {AT}.*: 99.5 is not a whole number"),
    "a part of padding": ("step.admit(first, 1, pad=0.5)", f"admit of {AT}.*: 0.5 is not a whole number"),
    "endless padding": (
        "step.admit(first, 1, pad=10**30)",
        "a padding of 1000000000000000000000000000000 tokens: 0 to 2048, the longest request, are possible",
    ),
    "fewer than no blocks to spare": (
        "step.admit(first, 1, spare=-5)",
        "-5 blocks to be left free: at least 0 are possible",
    ),
    "a part of a running token": (
        "step.admit(first, 1) and step.run(first, 0.5)",
        f"run of {AT}.*: 0.5 is not a whole number",
    ),
    "a pause without end": (
        "step.pause(10**30)",
        f"a pause of {10**30} ps at [0-9]+ ps: .* {END_OF_TIME} ps",
    ),
    "pauses without end": ("for _ in range(9): step.pause(10**18)", f"a pause of {10**18} ps .* {END_OF_TIME} ps"),
    "a part of a pause": ("step.pause(0.5)", "a pause: 0.5 is not a whole number"),
    "a pause backwards": ("step.pause(-1)", "a pause of -1 ps at [0-9]+ ps: 0 ps is the shortest, .*"),
    "a time that never comes": ("step.wake_at(10**30)", f"wake_at {10**30} ps: a run ends by {END_OF_TIME} ps"),
    "a time that is no number": ("step.wake_at(step.now + 0.5)", "wake_at: [0-9.]+ is not a whole number"),
    "one request twice": (
        "step.reorder([first] * len(step.waiting))",
        "reorder of other requests than those that wait, or of one twice",
    ),
    "a part of a step": ("return 1.5", "vouched for 1.5 steps: a whole number from 0 on is possible"),
    "nothing vouched for": ("return None", "vouched for None steps: .*"),
    "steps backwards": ("return -1", "vouched for -1 steps: .*"),
}


@pytest.mark.parametrize(("verb", "says"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_cannot_be_is_named_with_policy_step_and_limit(verb: str, says: str) -> None:
    # the second request arrives alone too, so that two wait where one would not do
    line = line_of(with_policy("if len(step.waiting) < 1: return 1", FIRST, verb, "return 1"))

    assert re.fullmatch(rf"policy Mine: step 1: {says}", line), line


def test_the_step_is_that_of_the_replica() -> None:
    lines = ("step.decode_all()", "if step.decode_steps == 5: step.pause(-7)", "for each in list(step.waiting):")
    line = line_of(with_policy(*lines, "    step.admit(each, each.remaining)", "return 1"))

    # five decode steps, and those before and between them that hold prompts alone
    found = re.match(r"policy Mine: step (\d+): a pause of -7 ps", line)
    assert found, line
    assert int(found[1]) >= 6


def test_a_whole_number_of_another_type_is_one() -> None:
    lines = ("import numpy as np", "step.decode_all()", "for each in list(step.waiting):")
    result = with_policy(*lines, "    step.admit(each, np.int64(each.remaining), spare=np.int32(0))", "return 1")

    assert (result.status, result.err) == (0, "")


REQUEST = (
    *("prompt_tokens", "max_tokens", "id", "arrival", "priority", "tenant", "session", "swapped", "pad", "hash_ids"),
    *("output_tokens", "predicted_tokens", "ignore_eos", "preemptions", "computed", "emitted", "remaining", "decoding"),
)
STEP = (
    *("now", "running", "waiting", "more_arrivals", "stages", "max_model_len", "windowed", "speculation"),
    *("free_blocks", "total_blocks", "decodes", "prefilling", "held", "block_size", "decode_steps", "free_host_blocks"),
)


def test_every_field_of_a_request_and_of_a_step_is_tried() -> None:
    def fields(contract: type) -> set[str]:
        declared = {name for name, kind in vars(contract).items() if isinstance(kind, property)}
        return declared | set(vars(contract).get("__annotations__", ()))

    assert set(REQUEST) == fields(Request)
    assert set(STEP) == fields(Step)


@pytest.mark.parametrize("field", [*(f"step.waiting[0].{name}" for name in REQUEST), *(f"step.{n}" for n in STEP)])
def test_a_field_that_is_only_read_cannot_be_written(field: str) -> None:
    line = line_of(with_policy(f"{field} = 1", "return 1"))

    assert line.startswith("mine.py:14: raised AttributeError: ")
    assert line.endswith("(policy Mine, step 1)")


RAISES = {
    "an exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "an exit with another status": ("raise SystemExit(7)", "SystemExit: 7"),
    "an error": ("1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
    "an error that is no Exception": ("raise GeneratorExit('x')", "GeneratorExit: x"),
    "a stop": ("raise StopIteration", "StopIteration: "),
    "an error of many lines": ("raise ValueError('a\\nb')", "ValueError: a b"),
    "recursion": ("self.schedule(step)", "RecursionError: maximum recursion depth exceeded.*"),
}


@pytest.mark.parametrize(("statement", "says"), RAISES.values(), ids=RAISES)
def test_what_a_policy_raises_is_told_with_its_line(statement: str, says: str) -> None:
    line = line_of(with_policy(statement, "return 1"))

    assert re.fullmatch(rf"mine.py:14: raised {says} \(policy Mine, step 1\)", line), line


HOOKS = {
    "heeds_arrival": "(self, step)",
    "order": "(self, request)",
    "allowed": "(self, request, max_model_len, blocks, block_size)",
    "ended": "(self, request)",
    "__post_init__": "(self)",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exit_in_a_hook_is_no_exit_of_the_run(hook: str) -> None:
    served = ("step.decode_all()", "for each in list(step.waiting): step.admit(each, each.remaining)", "return 9")
    body = f"\n    def {hook}{HOOKS[hook]}:\n        raise SystemExit(0)\n"

    line = line_of(with_policy(*served, after=body))

    assert line.startswith("mine.py:19: raised SystemExit: 0")


def test_an_exit_in_a_file_that_is_read_is_no_exit_of_the_run() -> None:
    Path("mine.py").write_text("import sys\nsys.exit(0)\n")
    Path("s.yaml").write_text(SCENARIO)

    line = line_of(chairlift("run", "s.yaml", "-q", "--policy", "mine.py"))

    assert line == "mine.py:2: cannot be imported: SystemExit: 0"


def test_an_exit_of_a_router_is_told() -> None:
    Path("mine.py").write_text(ROUTER.replace("return len", "raise SystemExit(0) or len"))
    Path("s.yaml").write_text(SCENARIO + "replicas: 2\n")

    line = line_of(chairlift("run", "s.yaml", "-q", "--router", "mine.py"))

    assert line == "mine.py:14: raised SystemExit: 0 (router Last)"


def test_an_exit_is_a_row_of_a_sweep_and_ends_nothing_else() -> None:
    Path("mine.py").write_text(HEAD + "        raise SystemExit(0)\n")
    Path("s.yaml").write_text(SCENARIO)
    axes = {"axes": {"policy": [{"name": "mine.py"}, {"name": "vllm"}]}}
    Path("w.yaml").write_text(yaml.safe_dump({"base": "s.yaml", **axes}))

    result = chairlift("sweep", "w.yaml", "--trust", "-j", "1", "-q")

    assert "mine.py:14: raised SystemExit: 0 (policy Mine, step 1)" in result.err
    assert result.status == 1
    rows = pq.read_table("runs/w/results.parquet").to_pylist()
    assert [bool(row["error"]) for row in rows] == [True, False]


ENDLESS = {
    "preempts everybody": (
        ("for each in list(step.running): step.preempt(each)", "for each in list(step.waiting): step.admit(each, 1)"),
        f"no token came of the latest {FRUITLESS:,} plans that preempted: [0-9]+ requests are here",
    ),
    "preempts every other step": (
        (
            "self.odd = not getattr(self, 'odd', False)",
            "for each in list(step.running): step.preempt(each) if self.odd else step.run(each, 1)",
            "for each in list(step.waiting): step.admit(each, 1)",
        ),
        f"no token came of the latest {FRUITLESS:,} plans that preempted: [0-9]+ requests are here",
    ),
    "wakes for ever": (
        ("step.wake_at(step.now + 10**12)",),
        f"it asks to be woken {WAKINGS:,} times in a row, and runs nothing for 30 requests",
    ),
    "wakes soon, for ever": (
        ("step.wake_at(step.now + 1)",),
        f"it asks to be woken {WAKINGS:,} times in a row, and runs nothing for 1 requests",
    ),
    "asks again for ever": (("return 0",), "nothing runs at [0-9]+ ps, however often it is asked"),
    "refuses nobody and runs nothing": (("pass",), "30 requests are never served .*"),
}


@pytest.mark.parametrize(("lines", "says"), ENDLESS.values(), ids=ENDLESS)
def test_a_policy_that_makes_no_progress_is_stopped(lines: tuple[str, ...], says: str) -> None:
    before = time.process_time()
    line = line_of(with_policy(*lines, "return 1"))

    assert re.fullmatch(rf"policy Mine: (step [\d,]+: )?{says}", line), line
    assert time.process_time() - before < 10


class Hesitant(Scheduler):
    """Preempts whoever it has begun, many times, and then serves everybody."""

    def __init__(self, times: int) -> None:
        self.times = times

    def schedule(self, step: Step) -> int:
        step.decode_all()
        for request in list(step.running) if self.times else ():
            if not request.decoding:
                self.times -= 1
                step.preempt(request)
        for request in list(step.waiting):
            step.admit(request, 1 if self.times else request.remaining)
        return 1


@pytest.mark.parametrize(("times", "ends"), [(FRUITLESS - 1, True), (FRUITLESS, False)])
def test_hesitation_ends_at_the_limit(times: int, ends: bool) -> None:
    trace = trace_of([(0, 9, 3)])
    if ends:
        assert play(trace, lambda: Hesitant(times)).requests.preemptions[0] == times
        return
    with pytest.raises(PolicyError, match=f"policy Hesitant: step {FRUITLESS + 1:,}: no token came"):
        play(trace, lambda: Hesitant(times))


def test_an_error_says_the_same_after_it_was_sent_between_processes() -> None:
    for error in (PolicyError("a pause of -1 ps", "policy Mine", 3), PolicyRaised("mine.py:1: raised KeyError: 1")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
    assert str(PolicyError("a pause of -1 ps", "policy Mine", 3)) == "policy Mine: step 3: a pause of -1 ps"
