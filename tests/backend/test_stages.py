"""One replica as stages of a pipeline, a process each, on the CPU: the tokens are those of one stage."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chairlift.backend.base import Batch, Prompt
from chairlift.backend.parallel import Parallel
from chairlift.backend.shapes import Model
from chairlift.policies.vllm import Vllm
from kit.executions import Working, made

torch = pytest.importorskip("torch", reason="the engine that executes steps needs torch")

from chairlift.backend.gpu.engine import TorchEngine  # noqa: E402 - torch may be absent
from chairlift.backend.gpu.options import Options  # noqa: E402
from chairlift.backend.gpu.ranks import Stage  # noqa: E402
from chairlift.backend.gpu.settings import Torch  # noqa: E402
from kit.clusters import GPU  # noqa: E402
from kit.forked import fork_engines  # noqa: E402
from kit.tiny import MODEL, Answers, answers, check_greedy, save  # noqa: E402

DEEP = replace(MODEL, name="deep", layers=5)
EXPERTS = replace(
    DEEP, name="experts", experts=8, experts_per_token=3, expert_ffn=24, qk_norm=True, tied_embeddings=True
)
OPT = replace(DEEP, name="opt", kv_heads=4, gated_mlp=False, biases="all", learned_positions=170)
OPTIONS = Options(device="cpu", max_batch=6, seed=4)


def engine_of(stages: int, model: Model, options: Options = OPTIONS) -> TorchEngine:
    engine = TorchEngine(model, GPU, options, stages=stages)
    engine.prepare(600, 1, 160, named=False)
    return engine


def launch(engine: TorchEngine, prompts: list[Prompt], decodes: list[int]) -> None:
    engine.launch(Batch((), 0, 0, 0, Working(prompts, decodes)))


def steps(engine: TorchEngine, count: int) -> None:
    for _ in range(count):
        launch(engine, [Prompt(0, 0, 20, 0, True)], [])
        engine.wait()


def generated(stages: int, model: Model, options: Options = OPTIONS) -> dict[int, list[int]]:
    """Two steps in flight: a prompt whole and one in chunks, then two requests that decode in turn."""
    engine = engine_of(stages, model, options)
    launch(engine, [Prompt(0, 0, 20, 0, True)], [])
    launch(engine, [Prompt(1, 0, 9, 0, False)], [])
    engine.wait()
    launch(engine, [Prompt(1, 9, 24, 0, True)], [0])
    for turn in range(12):
        engine.wait()
        launch(engine, [], [turn % 2])
    engine.wait()
    engine.wait()
    engine.close()
    return engine.generated


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_engines(monkeypatch)


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize("model", [DEEP, EXPERTS, OPT], ids=lambda model: model.name)
def test_stages_choose_the_tokens_that_one_does(model: Model) -> None:
    one = generated(1, model)

    assert [len(tokens) for tokens in one.values()] == [8, 7]
    assert len({token for tokens in one.values() for token in tokens}) > 1
    assert generated(2 if model is OPT else 3, model) == one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of four layers."""
    return save(tmp_path_factory.mktemp("weights"), layers=4)


def served(folder: Path, stages: int, ahead: bool, version: str) -> Answers:
    """Prompts in chunks that share a prefix, on a pool so small that some are preempted."""
    rows = [(0, 37 + 5 * i, 28 - i) for i in range(5)]
    options = {"async_scheduling": ahead, "max_num_batched_tokens": 40, "max_num_seqs": 5, "version": version}
    more = {"model": replace(MODEL, layers=4), "blocks": 12, "parallel": Parallel(pipeline=stages)}
    got = answers(folder, made(rows, 1, 32), Vllm, options, **more)
    check_greedy(got)
    return got


@pytest.mark.usefixtures("_forked")
@pytest.mark.parametrize(
    ("stages", "ahead", "version"), [(2, True, "0.33"), (4, True, "0.33"), (4, False, "0.33"), (4, False, "0.26")]
)
def test_whole_runs_have_the_tokens_of_one_stage(folder: Path, stages: int, ahead: bool, version: str) -> None:
    one, several = served(folder, 1, ahead, version), served(folder, stages, ahead, version)

    for run in (one, several):
        assert sum(run.served.columns()["preemptions"]) > 0
        assert sum(run.served.columns()["cached_tokens"]) > 0
    assert several.tokens == one.tokens


def test_the_first_stage_goes_on_while_the_second_computes() -> None:
    """The second stage's process stands still: two steps pass the first one nevertheless, and none is done."""
    engine = engine_of(2, MODEL)
    team: Any = engine._team
    [second] = team._processes
    launch(engine, [Prompt(0, 0, 20, 0, True)], [])
    engine.wait()
    os.kill(second.pid, signal.SIGSTOP)
    try:
        launch(engine, [], [0])
        launch(engine, [Prompt(1, 0, 9, 0, True)], [])
        first: Any = engine._runner
        assert len(first._coming) == 2
        assert not any(coming.work.is_completed() for coming in first._coming)
    finally:
        os.kill(second.pid, signal.SIGCONT)
    engine.wait()
    engine.wait()
    engine.close()

    assert [len(tokens) for tokens in engine.generated.values()] == [2, 1]


def test_a_stage_that_dies_is_one_clear_error() -> None:
    engine = engine_of(2, MODEL)
    team: Any = engine._team
    [process] = team._processes
    os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^the process of GPU 1 has died \(exit code -9\)"):
        steps(engine, 9)
    assert time.monotonic() - began < 10
    engine.close()


@pytest.mark.usefixtures("_forked")
def test_a_stage_has_the_weights_and_the_kv_of_its_own_layers() -> None:
    engine = engine_of(2, DEEP)
    net, cache = engine._runner.net, engine._runner._cache
    engine.close()

    assert (len(net.layers), len(cache)) == (3, 3)
    assert net.embedding is not None
    assert net.head is None


@pytest.mark.parametrize(
    ("layers", "widths"),
    [
        (7, [2, 3, 2]),
        (43, [4, 4, 4, 4, 4, 4, 5, 5, 5, 4]),
        (5, [3, 2]),
        (8, [2, 2, 2, 2]),
        (11, [3, 3, 3, 2]),
        (2, [2]),
    ],
)
def test_layers_are_shared_out_as_vllm_does(layers: int, widths: list[int]) -> None:
    """The first two are of users of its ``get_pp_indices`` who say what it gives, the others follow from its rule."""
    stages = [Stage(i, len(widths)).layers(layers) for i in range(len(widths))]

    assert [len(own) for own in stages] == widths
    assert [i for own in stages for i in own] == list(range(layers))


def test_what_does_not_go_with_stages_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"shares a replica out by tensors and experts, or by stages .*TP 2, PP 2"):
        Torch(device="cpu").build(DEEP, GPU, Parallel(tensor=2, pipeline=2))
