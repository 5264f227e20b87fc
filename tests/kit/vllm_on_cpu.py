"""vLLM's own engine over an executor without a model, as a program: ``python vllm_on_cpu.py FOLDER``.

The engine runs in its own process, as in a server; each request and step gets one made-up token, 4 ms after it was
planned. A platform plug-in lets it start where no GPU is. Prints the tokens that the clients got.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

PLUGIN = "fake_platform"  # the module that `prepare` writes
STEP_S = 0.004
SHAPE = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32000},
    **{"max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "torch_dtype": "float16"},
}
PROMPTS = [100 + 20 * i for i in range(30)]
OUTPUT = 20


def prepare(folder: Path) -> None:
    """Write a model's description, and the plug-in of a platform that is a CPU and leaves the engine loop as it is."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / f"{PLUGIN}.py").write_text('def platform():\n    return "fake_cpu.Platform"\n')
    (folder / "fake_cpu.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n\n\n"
        "class Platform(CpuPlatform):\n"
        "    @classmethod\n"
        "    def check_and_update_config(cls, vllm_config):\n"
        "        wanted = vllm_config.scheduler_config.async_scheduling\n"
        "        super().check_and_update_config(vllm_config)\n"
        "        vllm_config.scheduler_config.async_scheduling = wanted\n"
    )
    info = folder / "fake-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1\n")
    points = f"[vllm.platform_plugins]\nfake = {PLUGIN}:platform\n"
    points += "[vllm.stat_logger_plugins]\nchairlift = chairlift.backend.recorder.vllm_stats:StepLogger\n"
    (info / "entry_points.txt").write_text(points)


def serve(folder: Path, scheduler: str, **more: Any) -> int:
    """Serve `PROMPTS` at once; the number of tokens that the clients got."""
    from made_up_executor import MadeUp
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float16",
        max_model_len=4096,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        block_size=16,
        enforce_eager=True,
        distributed_executor_backend=MadeUp,
        scheduler_cls=f"chairlift.backend.recorder.vllm.{scheduler}",
        **more,
    )

    async def one(engine: Any, i: int) -> int:
        count = 0
        prompt = {"prompt_token_ids": [(i * 31 + j) % 30000 for j in range(PROMPTS[i])]}
        params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
        async for each in engine.generate(prompt, params, request_id=str(i)):
            count = len(each.outputs[0].token_ids)
        return count

    async def run() -> int:
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            return sum(await asyncio.gather(*[one(engine, i) for i in range(len(PROMPTS))]))
        finally:
            engine.shutdown()

    return asyncio.run(run())


if __name__ == "__main__":
    given = Path(sys.argv[1])
    settings = {"async_scheduling": False} if sys.argv[2].startswith("Sync") else {}
    if sys.argv[3:] == ["details"]:
        settings["enable_logging_iteration_details"] = True
    sys.stdout.write(f"\ntokens {serve(given, sys.argv[2], **settings)}\n")
