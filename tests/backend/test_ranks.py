"""One replica over two processes, on the CPU: the same tokens as on one, and one clear error when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chairlift.backend.base import Batch, Prompt
from chairlift.backend.shapes import Model

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")

from chairlift.backend.gpu import collective_times  # noqa: E402 - torch may be absent
from chairlift.backend.gpu.engine import TorchEngine  # noqa: E402
from chairlift.backend.gpu.options import Options  # noqa: E402
from chairlift.backend.gpu.ranks import Ranks, Team, indivisible  # noqa: E402
from kit.at_work import lives, wait_until  # noqa: E402
from kit.clusters import GPU  # noqa: E402
from kit.executions import Working  # noqa: E402
from kit.forked import fork_engines  # noqa: E402
from kit.places import with_tests  # noqa: E402

DENSE = Model("dense", 2, 32, 4, 2, 16, 48, 96, 160)
EXPERTS = replace(DENSE, name="experts", experts=8, experts_per_token=3, expert_ffn=24, qk_norm=True)
OPTIONS = Options(device="cpu", max_batch=6, seed=2)


def engine_on(gpus: int, model: Model, options: Options = OPTIONS) -> TorchEngine:
    engine = TorchEngine(model, GPU, options, gpus)
    engine.prepare(600, 1, 160, named=False)
    return engine


def step(engine: TorchEngine, prompts: list[Prompt], decodes: list[int]) -> None:
    engine.launch(Batch((), 0, 0, 0, Working(prompts, decodes)))
    engine.wait()


def steps(engine: TorchEngine, count: int) -> None:
    for _ in range(count):
        step(engine, [], [0])


def generated(gpus: int, model: Model, options: Options = OPTIONS) -> dict[int, list[int]]:
    """Prompts whole and in chunks, decodes beside them, and decodes alone."""
    engine = engine_on(gpus, model, options)
    step(engine, [Prompt(0, 0, 20, 0, True), Prompt(1, 0, 9, 0, False)], [])
    step(engine, [Prompt(1, 9, 24, 0, True)], [0])
    for _ in range(12):
        step(engine, [], [0, 1])
    engine.close()
    return engine.generated


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_engines(monkeypatch)


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("model", [DENSE, EXPERTS, replace(DENSE, kv_heads=1), replace(DENSE, tied_embeddings=True)])
@pytest.mark.parametrize("graphs", [True, False])
def test_two_processes_choose_the_tokens_that_one_does(model: Model, graphs: bool) -> None:
    options = replace(OPTIONS, graphs=graphs)
    one = generated(1, model, options)

    assert [len(tokens) for tokens in one.values()] == [14, 13]
    assert len({token for tokens in one.values() for token in tokens}) > 1
    assert generated(2, model, options) == one


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("model", [DENSE, EXPERTS])  # of two KV heads, each of which two processes have
def test_four_processes_choose_the_tokens_that_one_does(model: Model) -> None:
    assert generated(4, model) == generated(1, model)


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("model", [DENSE, EXPERTS])
def test_eight_bit_weights_are_shared_out_too(model: Model) -> None:
    one, two = (generated(gpus, model, replace(OPTIONS, quantization="fp8")) for gpus in (1, 2))

    same = [a == b for i in one for a, b in zip(one[i], two[i], strict=True)]
    assert same[0]
    assert sum(same) > len(same) / 4  # each process scales its own share of a row, so that some roundings differ


def test_a_process_that_dies_is_one_clear_error_and_none_is_left() -> None:
    engine = engine_on(2, DENSE)
    step(engine, [Prompt(0, 0, 20, 0, True)], [])
    team: Any = engine._team
    [process] = team._processes
    lost: list[bool] = []
    team.on_loss = lambda: lost.append(True)  # on a GPU kernels wait for the other process: they are let go
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the process of GPU 1 has died \(exit code -9\)"):
        steps(engine, 100)
    assert time.monotonic() - began < 10
    assert lost == [True]
    assert not process.is_alive()
    engine.close()  # else the next engine of this process finds the group of this one


def test_a_process_that_dies_before_it_begins_is_not_waited_for(tmp_path: Path) -> None:
    """As those of a script do that runs an engine on two GPUs without asking whether it is the main module."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from chairlift.backend.gpu.ranks import Team\nfrom kit.at_work import stuck\nTeam(2, 'cpu', stuck)\n"
    )
    done = subprocess.run([sys.executable, str(script)], env=with_tests(), capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert "DeviceError: the process of GPU 1 has died (exit code 1)" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
def test_no_process_outlives_a_parent_that_was_killed() -> None:
    script = (
        "from chairlift.backend.gpu.ranks import Team\nfrom kit.at_work import stuck\n"
        "team = Team(2, 'cpu', stuck)\nprint(team._processes[0].pid, flush=True)\nteam.ready()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=with_tests(), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert lives(pid)
        parent.kill()
    wait_until(lambda: not lives(pid), 10)


def test_a_model_that_the_machine_has_no_memory_for_is_refused_before_any_is_taken() -> None:
    large = replace(DENSE, layers=1000, hidden=1 << 16, ffn=1 << 18)  # 2.8 PiB
    for gpus in (1, 2):
        engine = TorchEngine(large, GPU, OPTIONS, gpus)
        with pytest.raises(MemoryError, match=r"^dense with a KV pool of .* take some .* GiB, and this machine has "):
            engine.prepare(600, 1, 160, named=False)


def test_what_cannot_be_shared_out_says_why() -> None:
    for model, words in (
        (replace(DENSE, heads=3, kv_heads=3), "3 (query heads) cannot be shared out over 2 GPUs"),
        (replace(DENSE, vocab=97), "97 (vocabulary)"),
        (replace(EXPERTS, experts=7), "7 (experts)"),
    ):
        with pytest.raises(ValueError, match="cannot be shared out") as raised:
            TorchEngine(model, GPU, OPTIONS, 2)
        assert words in str(raised.value)
    assert indivisible(32, 4, 1024, 1024, 0, 8) is None
    assert indivisible(32, 6, 1024, 1024, 0, 4) == "6 KV heads cannot be shared out over 4 GPUs"


def test_the_largest_captured_step_is_said_to_recordings() -> None:
    """Dense layers would compute rows that fill a step up, experts do not; GPUs that share a step make it short."""
    fp8 = replace(OPTIONS, quantization="fp8")
    engines = (DENSE, OPTIONS, 2), (DENSE, fp8, 1), (EXPERTS, OPTIONS, 1), (EXPERTS, OPTIONS, 2)
    largest = [TorchEngine(m, GPU, options, n).facts()["graph_tokens"] for m, options, n in engines]

    assert largest == ["1024", "2048", "2048", "4096"]


def test_parts_cover_everything_once_and_few_heads_stand_on_several_gpus() -> None:
    parts = [list(range(64))[Ranks(rank, 4).part(8, 8)] for rank in range(4)]

    assert [i for part in parts for i in part] == list(range(64))
    assert [list(range(16))[Ranks(rank, 4).part(2, 8)] for rank in range(4)] == [
        *[list(range(8))] * 2,
        *[list(range(8, 16))] * 2,
    ]


@pytest.mark.usefixtures("_forked")
def test_collectives_that_are_timed_do_what_they_are_called() -> None:
    """Three processes give 1, 2 and 3; the first one's sum, gathered shares and received parts are known."""
    team = Team(3, "cpu", collective_times.Times)
    try:
        own = collective_times.Times(Ranks(0, 3), torch.device("cpu"))
        team.ready()
        gathered, parted = [1.0] * 6 + [2.0] * 6 + [3.0] * 6, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
        wanted = {"all_reduce": [6.0] * 6, "all_gather": gathered, "all_to_all": parted}
        for kind in collective_times.KINDS:
            team.tell("once", kind, 12)  # bytes: six numbers
            assert own.once(kind, 12).tolist() == wanted[kind]
            team.tell("measure", kind, 12, False)
            assert own.measure(kind, 12, False) > 0
    finally:
        team.close()
