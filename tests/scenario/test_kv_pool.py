"""How large a replica's KV pool is: what the policy's settings fix, then what the scenario says, then what fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from chairlift.backend import specs
from chairlift.policies.base import Deployment
from chairlift.policies.sglang import Sglang
from chairlift.sim.bad_input import BadInput
from chairlift.sim.scenario.load import load
from kit.command import replaced

OWN = """\
from dataclasses import dataclass

from chairlift.policies.base import Scheduler, Step


@dataclass
class Pinned(Scheduler):
    \"\"\"Serves nobody: its pool is all that a test looks at.\"\"\"

    pages: int = 30

    @property
    def pool_blocks(self) -> int | None:
        return self.pages

    @property
    def pool_block_size(self) -> int | None:
        return 64

    def schedule(self, step: Step) -> int:
        return 1
"""


def pool(folder: Path, policy: str, kv: str = "{tokens: 4000}") -> tuple[int, int]:
    """Blocks, and tokens a block."""
    text = replaced("policy: {name: vllm}", f"policy: {policy}")
    text = replaced("max_model_len: 2048\n", "", text)  # a pool that holds less would be refused
    (folder / "s.yaml").write_text(replaced("kv: {tokens: 4000}", f"kv: {kv}", text))
    [group] = load(folder / "s.yaml", trust=True).setups[0].groups
    return group.blocks, group.block_size


def test_the_scenario_says_it_where_the_policy_does_not(tmp_path: Path) -> None:
    assert pool(tmp_path, "vllm") == (250, 16)
    assert pool(tmp_path, "vllm", "{blocks: 77, block_size: 8}") == (77, 8)
    assert pool(tmp_path, "orca") == (4000, 1)  # KV by the slot


def test_of_vllms_blocks_one_is_the_null_block(tmp_path: Path) -> None:
    assert pool(tmp_path, "{name: vllm, num_gpu_blocks: 101, block_size: 32}") == (100, 32)
    assert pool(tmp_path, "{name: vllm, num_gpu_blocks: 2}") == (1, 16)
    with pytest.raises(BadInput, match=r"policy\.num_gpu_blocks: must be at least 2 \(got 1\)"):
        pool(tmp_path, "{name: vllm, num_gpu_blocks: 1}")


def test_a_users_own_policy_fixes_its_pool(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)

    assert pool(tmp_path, "mine.py:Pinned") == (30, 64)
    assert pool(tmp_path, "{name: mine.py:Pinned, pages: 40}") == (40, 64)
    with pytest.raises(BadInput, match=r"policy Pinned must have at least one block of KV \(got 0\)"):
        pool(tmp_path, "{name: mine.py:Pinned, pages: 0}")


@pytest.mark.parametrize(
    ("gpu", "version", "gpus", "share"),
    [  # of an H100 and an H200 as SGLang 0.5.23 itself worked it out; the others by hand from its source
        ("h100", "0.5.23", 1, 0.830),
        ("h200", "0.5.23", 1, 0.903),
        ("h100", "0.5.23", 4, 0.819),  # 512 + 12,288 + 512 + 1,024 + 464 = 14,800 MiB of 81,559
        ("b200", "0.5.23", 8, 0.849),  # 512 + 24,576 + 1,024 + 1,024 + 592 = 27,728 MiB of 183,359
        ("l4", "0.5.23", 1, 0.684),  # 512 + 6,144 + 128 + 96 + 400 = 7,280 MiB of 23,034
    ],
)
def test_sglang_gives_weights_and_kv_a_share_by_the_gpu(gpu: str, version: str, gpus: int, share: float) -> None:
    card = specs.gpu(gpu)
    settings = Sglang.sized({"version": version}, Deployment(card.name, card.memory_bytes, 4096))
    assert Sglang(**settings).static_share(card.memory_bytes, gpus, latent=False) == share


def test_the_pool_of_sglang_does_not_depend_on_how_many_may_run(tmp_path: Path) -> None:
    """vLLM warms its sampler up with as many requests as may run; SGLang keeps a share, whatever runs."""
    few, _ = pool(tmp_path, "{name: sglang, max_running_requests: 256}", "{}")
    many, _ = pool(tmp_path, "{name: sglang}", "{}")
    assert few == many
    some = pool(tmp_path, "{name: vllm, max_num_seqs: 256}", "{}")
    assert some > pool(tmp_path, "{name: vllm, max_num_seqs: 2048}", "{}")


def test_a_share_that_is_given_is_sglangs_mem_fraction_static(tmp_path: Path) -> None:
    least, _ = pool(tmp_path, "sglang", "{memory_utilization: 0.8}")
    more, _ = pool(tmp_path, "sglang", "{memory_utilization: 0.9}")
    card = specs.gpu("a100-40gb")
    free = card.memory_gib - 0.3 - 0.002 * card.memory_gib - 0.13  # before weights are loaded
    each = specs.model("opt-13b").kv_bytes_per_token
    assert more - least == pytest.approx(0.1 * free * 2**30 / each, abs=16)  # whole blocks
