"""An executor of vLLM's without a model; only a program that has vLLM imports this, see `vllm_on_cpu`."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm_on_cpu import STEP_S


class MadeUp(Executor):  # type: ignore[misc]
    """Answers each step with made-up tokens, `STEP_S` after it was handed over."""

    uses_ray = False
    supports_pp = False

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def _init_executor(self) -> None:
        self.is_failed = False
        self._pool = ThreadPoolExecutor(1)
        self._plan: Any = None
        self._done: dict[str, list[int]] = {}  # computed tokens and prompt tokens of each request

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        size = self.vllm_config.cache_config.block_size
        spec = FullAttentionSpec(block_size=size, num_kv_heads=2, head_size=32, dtype=torch.float16)
        if method == "get_supported_kv_cache_layouts":
            from vllm.v1.kv_cache_interface import KVCacheLayout

            return [[each.name for each in KVCacheLayout]]
        answers = {
            "get_kv_cache_spec": {"layer": spec},
            "determine_available_memory": 8192 * 64 * 16,
            "get_supported_tasks": ("generate",),
        }
        return [answers.get(method if isinstance(method, str) else method.__name__)]

    def compile_or_warm_up_model(self) -> None:
        pass

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        pass

    def check_health(self) -> None:
        pass

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        self._plan = scheduler_output
        found: Future[Any] = Future()
        found.set_result(None if scheduler_output.total_num_scheduled_tokens else self._output([], []))
        return found if non_block else found.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        plan = self._plan
        for new in plan.scheduled_new_reqs:
            self._done[new.req_id] = [new.num_computed_tokens, len(new.prompt_token_ids)]
        names, tokens = list(plan.num_scheduled_tokens), []
        for name in names:
            done = self._done[name]
            done[0] += plan.num_scheduled_tokens[name]
            tokens.append([7] if done[0] >= done[1] else [])

        def later() -> Any:
            time.sleep(STEP_S)
            return self._output(names, tokens)

        return self._pool.submit(later) if non_block else later()

    def _output(self, names: list[str], tokens: list[list[int]]) -> Any:
        index = {name: i for i, name in enumerate(names)}
        empty: dict[str, Any] = {"logprobs": None, "prompt_logprobs_dict": {}, "pooler_output": []}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=index, sampled_token_ids=tokens, **empty)
