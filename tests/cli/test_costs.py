"""``chairlift explain-cost`` and ``fit-check``."""

from __future__ import annotations

import re

import pytest

from chairlift.backend.base import Batch, Chunk
from chairlift.backend.memory import kv_blocks
from chairlift.backend.parallel import Parallel
from chairlift.backend.roofline import Efficiency
from chairlift.backend.specs import gpu, model
from kit.command import chairlift


def test_explain_cost_shows_parts_that_add_up_to_the_step() -> None:
    result = chairlift("explain-cost", "qwen3-30b-a3b", "--gpu", "h200", "--tokens", "64", "--context", "1024")
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if re.search(r"\d %", line)]
    assert [re.split(r"  +", line)[0] for line in lines[:5]] == ["attention", "router", "experts", "head", "KV"]
    assert max(lines, key=lambda line: line.count("█")).startswith("experts")
    shown = sum(float(found.group(1)) for line in lines if (found := re.search(r"([\d.]+) +\d+ %", line)))
    price = Efficiency().build(model("qwen3-30b-a3b"), gpu("h200"), Parallel()).step(Batch((), 64, 65_536)).first
    assert shown == pytest.approx(price / 1e9, abs=0.01)
    assert f"one step: {price / 1e9:.2f} ms" in result.out
    assert "8 of 128 a token, chosen uniformly at random" in result.out


def test_explain_cost_prices_a_prompt_beside_decodes_on_several_gpus() -> None:
    degrees = ("--tensor", "2", "--data", "2", "--expert", "4")
    work = ("--tokens", "10", "--context", "500", "--prompt", "700", "--past", "300")
    result = chairlift("explain-cost", "deepseek-ai/DeepSeek-V3", "--gpu", "b200", *degrees, *work)
    assert result.status == 0, result.err
    backend = Efficiency().build(model("deepseek-v3"), gpu("b200"), Parallel(tensor=2, data=2, expert=4))
    price = backend.step(Batch((Chunk(300, 700),), 10, 5000)).first
    assert f"one step: {price / 1e9:.2f} ms" in result.out
    assert "attention of prompts" in result.out
    assert "DP-attention" in result.out


def test_explain_cost_says_where_a_scenario_prices_otherwise() -> None:
    result = chairlift("explain-cost", "llama-3.1-8b", "--gpu", "h100", "--set", "bandwidth=0.9")
    whole = Efficiency(bandwidth=0.9).build(model("llama-3.1-8b"), gpu("h100"), Parallel()).step(Batch((), 1, 1024))
    assert f"unless it says by_part: true: {whole.first / 1e9:.2f} ms" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain-cost", "lama-3.1-8b", "--gpu", "h100"), "did you mean 'llama-3.1-8b'?"),
        (("explain-cost", "llama-3.1-8b", "--gpu", "h1000"), "unknown GPU 'h1000'"),
        (("explain-cost", "llama-3.1-8b", "--gpu", "h100", "--expert", "2"), "llama-3.1-8b has no experts"),
        (("explain-cost", "llama-3.1-8b", "--gpu", "h100", "--tokens", "0"), "must be at least 1"),
        (("explain-cost", "llama-3.1-8b", "--gpu", "h100", "--set", "mfuu=2"), "mfuu: unknown key"),
        (("explain-cost", "llama-3.1-8b", "--gpu", "h100", "--set", "mfu=2"), "mfu"),
        (("explain-cost", "llama-3.1-405b", "--gpu", "h100", "--tensor", "16"), "tensor must be at most 8"),
        (("fit-check", "nothing"), "unknown model 'nothing'"),
        (("fit-check", "nowhere/config.json"), "nowhere/config.json"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = chairlift(*arguments)
    assert result.status == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_fit_check_shows_what_fits_with_the_sum() -> None:
    result = chairlift("fit-check", "llama-3.3-70b", "--gpu", "h100", "--gpu", "h200", "--context", "8192")
    assert result.status == 0, result.err
    rows = {tuple(line.split()[:2]): line for line in result.out.splitlines() if re.match(r"h[12]00 ", line)}
    assert rows["h100", "1"].rstrip().endswith("no")
    assert rows["h100", "4"].rstrip().endswith("yes")
    said = " ".join(result.out.split())
    assert "no: no room for KV: llama-3.3-70b on h100: 79.65 GiB × 0.9 − 131.42 weights" in said
    fit = kv_blocks(model("llama-3.3-70b"), gpu("h200"), Parallel(tensor=2))
    assert fit.explain() in said
    assert f"{fit.tokens:,}" in rows["h200", "2"]
    assert f" {fit.blocks // 512:,} " in rows["h200", "2"]


def test_fit_check_of_every_gpu_says_why_not() -> None:
    result = chairlift("fit-check", "gpt-oss-20b", "--tensor", "1", "--step-tokens", "2048")
    assert result.status == 0, result.err
    assert "l4" in result.out
    assert "20.9 billion parameters" in result.out
    assert "0.53125 and 2 B a weight" in " ".join(result.out.split())
