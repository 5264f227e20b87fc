"""SGLang's own scheduler over a worker without a model, as a program: ``python sglang_on_cpu.py FOLDER [normal]``.

Everything of the scheduler's process is SGLang's (arguments, plug-ins, event loop, batches, memory, results) but its
model worker and the socket that requests come from. Each step's tokens are made up, and ready `STEP_S` after its
launch, as a GPU's would be. Prints the tokens that the requests got, and SGLang's version.
"""

from __future__ import annotations

import json
import os
import sys
import time
from array import array
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEP_S = 0.004
CONTEXT = 4096
POOL, CHUNK, SLOTS = 16384, 512, 16  # tokens of KV, tokens of prompts a step, requests at once
SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32000},
    **{"max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "torch_dtype": "float16"},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
PROMPTS = [100 + 20 * i for i in range(30)]
OUTPUT = 20
TOKEN = 7


def prepare(folder: Path) -> None:
    """Write a model's description, and the entry point by which SGLang finds the recorder."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    info = folder / "fake-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1\n")
    points = "[sglang.srt.plugins]\nchairlift = chairlift.backend.recorder.sglang:plug_in\n"
    (info / "entry_points.txt").write_text(points)


class Ready:
    """In place of a CUDA event: tokens that are there from a moment on."""

    def __init__(self, at: float) -> None:
        self._at = at

    def synchronize(self) -> None:
        time.sleep(max(0.0, self._at - time.monotonic()))


class Ended(BaseException):
    """All requests have their answers."""


def scheduler_class() -> Any:
    """SGLang's scheduler, on a made-up worker."""
    import torch
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers import scheduler as theirs
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
    from sglang.srt.runtime_context import get_context, get_parallel

    class OnCpu(theirs.Scheduler):  # type: ignore[misc]
        _gpu_free = 0.0  # when the made-up GPU has done all that was launched

        def init_startup_timing_summary(self) -> None:
            pass

        def init_model_worker(self) -> None:
            half = torch.float16
            sizes = {"size": POOL, "page_size": 1, "dtype": half, "head_num": 1, "head_dim": 1, "layer_num": 1}
            keys = MHATokenToKVPool(**sizes, device="cpu", enable_memory_saver=False)
            slots = TokenToKVPoolAllocator(POOL, half, "cpu", keys, False)
            rows = ReqToTokenPool(SLOTS, CONTEXT + 4, "cpu", False)
            stream = torch.cpu.Stream()
            runner = SimpleNamespace(
                token_to_kv_pool=keys,
                req_to_token_pool=rows,
                token_to_kv_pool_allocator=slots,
                model_config=self.model_config,
                mtp_draft_device_pools=(),
                mtp_draft_mamba_pools=(),
                spec_algorithm=self.spec_algorithm,
                canary_manager=None,
                attn_backend=SimpleNamespace(),
                prefill_aware_swa=False,
                ngram_embedding_manager=SimpleNamespace(prepare_for_forward=lambda batch, chunked_req=None: batch),
                forward_stream=stream,
                shared_read_done_event=None,
                is_hybrid_swa=False,
            )
            self.tp_worker = self.model_worker = SimpleNamespace(
                model_runner=runner,
                is_hybrid_swa=False,
                get_memory_pool=lambda: (rows, slots),
                model_config=self.model_config,
                forward_batch_generation=self._forward,
                last_shared_read_runner=runner,
            )
            for name in ("draft_worker", "external_corpus_manager", "min_free_slots_delayer", "pad_input_ids_func"):
                setattr(self, name, None)
            self.schedule_stream, self.forward_stream = torch.cpu.Stream(), stream
            self.max_total_num_tokens, self.max_prefill_tokens = POOL, 16384
            self.max_running_requests, self.max_queued_requests = SLOTS, None
            self.max_req_len = CONTEXT - 1
            self.max_req_input_len = self.max_req_len - 5
            self.random_seed, self.device, self.startup_available_gpu_memory_gb = 1, "cpu", 0
            get_context().override("test", pp_max_micro_batch_size=SLOTS)
            if hasattr(self, "ps"):  # before 0.5.21
                from sglang.srt.distributed import bootstrap, get_pp_group, get_tp_group, get_world_group

                told = {"server_args": self.server_args, "model_config": self.model_config, "ps": self.ps}
                told |= {"device": "cpu", "dist_port": self.nccl_port, "is_draft_worker": False}
                bootstrap.init_torch_distributed(**told, local_omp_cpuid=None)
                groups = (get_tp_group(), get_pp_group(), get_world_group(), get_tp_group())
                own = get_parallel()
            else:
                own = get_parallel()
                ranks_group = getattr(theirs, "get_dp_tp_group", lambda: own.tp_group)()  # not in 0.5.21
                groups = (own.tp_group, own.pp_group, own.world_group, ranks_group)
            self.tp_group, self.pp_group, self.world_group, self.dp_tp_group = groups
            self.attn_tp_group, self.attn_cp_group = own.attn_tp_group, own.attn_cp_group
            for name in ("tp", "attn_tp", "attn_cp", "dp_tp"):
                setattr(self, f"{name}_cpu_group", getattr(self, f"{name}_group").cpu_group)

        def _forward(self, batch: Any, **_others: Any) -> Any:
            logits = LogitsProcessorOutput(next_token_logits=None)
            tokens = torch.full((len(batch.reqs),), TOKEN, dtype=torch.int64)
            return GenerationBatchResult(logits_output=logits, next_token_ids=tokens, can_run_cuda_graph=False)

        def run_batch(self, batch: Any, *others: Any, **named: Any) -> Any:
            result = super().run_batch(batch, *others, **named)
            self._gpu_free = max(self._gpu_free, time.monotonic()) + STEP_S
            result.copy_done = Ready(self._gpu_free)
            return result

    return OnCpu


def serve(folder: Path, normal: bool) -> int:
    """Serve `PROMPTS` at once; the number of tokens that they got."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import PortArgs, ServerArgs

    arguments = ServerArgs(
        model_path=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        mem_fraction_static=0.5,
        page_size=1,
        max_total_tokens=POOL,
        chunked_prefill_size=CHUNK,
        max_prefill_tokens=16384,
        max_running_requests=SLOTS,
        disable_overlap_schedule=normal,
        random_seed=1,
        log_level="error",
    )
    ranks: dict[str, Any] = {}
    if hasattr(runtime_context, "SpawnRanks"):
        spawn = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
        runtime_context.publish(arguments, role="scheduler", ranks=spawn)
    else:
        runtime_context.publish(arguments, role="scheduler")
        names = ("gpu_id", "tp_rank", "moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank")
        ranks = {**dict.fromkeys(names, 0), "dp_rank": None}
    made = scheduler_class()(arguments, PortArgs.init_new(arguments), **ranks)

    def request(i: int) -> Any:
        sampling = SamplingParams(max_new_tokens=OUTPUT, ignore_eos=True, temperature=0.0)
        sampling.normalize(None)
        return TokenizedGenerateReqInput(
            rid=str(i),
            input_text="",
            input_ids=array("q", [(i * 31 + j) % 30000 + 10 for j in range(PROMPTS[i])]),
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
            input_embeds=None,
        )

    arriving = [request(i) for i in range(len(PROMPTS))]
    seen: dict[str, Any] = {}
    idle = made.on_idle

    def receive(local_reqs: Any = None) -> list[Any]:
        found, arriving[:] = list(arriving), []
        return found

    def on_idle() -> None:
        idle()
        if seen and all(each.finished() for each in seen.values()):
            raise Ended

    queue = made._add_request_to_queue

    def queued(req: Any, *others: Any, **named: Any) -> None:
        seen[req.rid] = req
        queue(req, *others, **named)

    made.request_receiver = SimpleNamespace(recv_requests=receive)
    made.on_idle, made._add_request_to_queue = on_idle, queued
    with suppress(Ended):
        made.run_event_loop()
    return sum(len(each.output_ids) for each in seen.values())


if __name__ == "__main__":
    import sglang

    found = serve(Path(sys.argv[1]), sys.argv[2:] == ["normal"])
    sys.stdout.write(f"\ntokens {found} sglang {sglang.__version__}\n")
    sys.stdout.flush()
    os._exit(0)  # the scheduler's own threads would go on
