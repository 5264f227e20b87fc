"""What vLLM's scheduler does since, or until, which version: the table by which `policies.vllm` tells them apart.

Found by replaying ledgers of the real schedulers of 0.23.0, 0.26.0, 0.28.0, 0.31.0 and 0.33.0 (`tests/ledger.py`), and
in the source of every minor version from 0.23 to 0.33: `vllm/v1/core/sched/scheduler.py`, `vllm/v1/core/block_pool.py`,
`vllm/config/scheduler.py` and `vllm/engine/arg_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

VERSIONS = ("0.23", "0.24", "0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33")
NEWEST = VERSIONS[-1]


class Rule(NamedTuple):
    """A rule of the scheduler, or a setting, and the versions that have it."""

    does: str  # one sentence
    since: str = VERSIONS[0]
    until: str = NEWEST
    sizes: bool = False  # it says what a setting is where none is given: it acts before anything runs

    def holds(self, version: str) -> bool:
        """Whether ``version`` has it."""
        return VERSIONS.index(self.since) <= VERSIONS.index(version) <= VERSIONS.index(self.until)

    def span(self) -> str:
        """``since vLLM 0.24``, ``until vLLM 0.26``."""
        return f"since vLLM {self.since}" if self.since != VERSIONS[0] else f"until vLLM {self.until}"


RULES = {
    "uncached_first": Rule("Freed blocks without a hash are reused before all others.", since="0.24"),
    "pads_joining": Rule(
        "With drafts of fixed number, a request that joins with one token to compute is padded to their width.",
        since="0.25",
    ),
    "any_victim_shifts": Rule(
        "Under priority, a victim that stood before the request at hand shifts the loop's index, scheduled or not.",
        since="0.28",
    ),
    "waits_for_flight": Rule(
        "Of a pipeline, who was preempted joins again once no tokens of it are in flight.", since="0.27"
    ),
    "largest_gpus": Rule("GPUs of at least 160 GiB get a budget of 16384 tokens by default.", since="0.28", sizes=True),
    "retains_little": Rule(
        "Of layers with windows, prefixes are kept only where prompts end or part, unless a setting says more.",
        since="0.29",
    ),
    # not in 0.26, and merged after 0.28 was cut (vLLM #47272)
    "null_block_apart": Rule(
        "Beside layers with windows, the longest request must fit without the null block.", since="0.29"
    ),
    "uncapped_alone": Rule("A request that is alone is not held to long_prefill_token_threshold.", since="0.31"),
    # the next three: `Scheduler.schedule`, `update_from_output` and the block hashes of 0.27 to 0.32 have none of them
    "skips_drafts": Rule(
        "Drafting layers are not run after a step of which nobody can use their drafts.", since="0.33"
    ),
    "finds_kept_drafts": Rule(
        "Blocks that kept drafts complete can be found with their step's output, without asynchronous scheduling too.",
        since="0.33",
    ),
    "hashes_ahead": Rule(
        "With EAGLE's or MTP's drafts, a cached block is one with the token behind it, and the last one found is kept.",
        since="0.33",
    ),
    "on_after_itself": Rule(
        "Under priority, the loop goes on after a request that had to preempt itself.", since="0.33"
    ),
}

SETTINGS = {
    "watermark": Rule("Share of all blocks to keep free when a request joins others.", since="0.24"),
    "max_num_scheduled_tokens": Rule("Tokens a step, if fewer than max_num_batched_tokens.", since="0.26"),
    "max_num_queued_reqs": Rule("Unfinished requests beyond which new ones are refused (HTTP 503).", since="0.29"),
    "max_num_queued_tokens": Rule("Prompt tokens not prefilled at which new requests are refused.", since="0.29"),
    "max_num_active_seqs": Rule("Requests that may run, if fewer than max_num_seqs.", since="0.31"),
    "long_prefill_token_threshold_adaptive": Rule(
        "The cap on a long prompt is at least an equal share of the budget.", since="0.31"
    ),
    # a setting since 0.24, without effect but for ranks of data parallelism before 0.33
    "prefill_schedule_interval": Rule("Steps from one that carries prefill to the next, outside DP.", since="0.33"),
    "max_num_partial_prefills": Rule("Prompts computed in part at a time.", until="0.26"),
    "max_long_partial_prefills": Rule("Of those, long ones.", until="0.26"),
}


def nearest(version: str, known: Sequence[str] = VERSIONS) -> str:
    """The newest of the ``known`` that is not newer than ``version``, such as ``0.26.0``; the oldest if all are."""

    def numbers(told: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", told)[: known[0].count(".") + 1]]

    older = [each for each in known if numbers(each) <= numbers(version)]
    return older[-1] if older else known[0]


def named(version: str | float) -> str:
    """The minor version that ``version`` means: ``0.33``, ``0.33.0`` or, as YAML reads it, the number 0.33.

    Raises ValueError, one sentence, for a version that is not in `VERSIONS`.
    """
    told = f"{version:.2f}" if isinstance(version, float) else str(version)
    minor = ".".join(told.split(".")[:2])
    if minor not in VERSIONS:
        raise ValueError(f"version must be one of vLLM's from {VERSIONS[0]} to {NEWEST} (got {version})")
    return minor
