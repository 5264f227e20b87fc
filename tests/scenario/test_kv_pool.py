"""How large a replica's KV pool is: what the policy's settings fix, then what the scenario says, then what fits."""

from __future__ import annotations

from pathlib import Path

import pytest

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
