"""GPUs and models that are not in the tables: a row more, a user's own numbers, a known one changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chairlift.backend import specs
from chairlift.backend.base import Batch, Chunk
from chairlift.backend.calibrated import settings
from chairlift.backend.parallel import ONE
from chairlift.backend.roofline import Roofline
from kit.command import chairlift
from kit.places import IMPORTS, copied

OWN = {"bf16_tflops": 400, "hbm_gb_per_s": 2000, "memory_gib": 48}  # all that a GPU needs
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SCENARIO = """\
model: {model}
gpu: {gpu}
policy: {policy}
tensor_parallel: {degree}
workload: {{requests: 20, arrivals: {{poisson: {{rate_per_s: 5}}}}, prompt_tokens: 100, output_tokens: 10}}
"""


def scenario(folder: Path, gpu: str = "h100", model: str = "opt-13b", policy: str = "vllm", degree: int = 1) -> Path:
    path = folder / "s.yaml"
    path.write_text(SCENARIO.format(model=model, gpu=gpu, policy=policy, degree=degree), encoding="utf-8")
    return path


def run(folder: Path, **choices: str | int) -> tuple[int, str]:
    path = scenario(folder, **choices)  # type: ignore[arg-type]
    done = chairlift("run", str(path), "--out", str(folder / "out"))
    return done.status, " ".join((done.out + done.err).split())


# a row more


GPU_ROW = """
v100:
  {bf16_tflops: 125, hbm_gb_per_s: 900, memory_gib: 31.7, source: NVIDIA V100 data sheet, also: [v100-32gb]}
"""
MODEL_ROW = """
smollm2-1.7b:
  {layers: 24, hidden: 2048, heads: 32, kv_heads: 32, head_size: 64, ffn: 8192, vocab: 49152, max_model_len: 8192,
   tied_embeddings: true, source: HuggingFaceTB/SmolLM2-1.7B config.json}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, copied, with a row more for a GPU and for a model."""
    folder = tmp_path_factory.mktemp("copy")
    copied(folder)
    for file, row in (("gpus.yaml", GPU_ROW), ("models.yaml", MODEL_ROW)):
        with (folder / "backend" / file).open("a", encoding="utf-8") as table:
            table.write(row)
    return folder


def in_copy(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / IMPORTS.name), "COLUMNS": "200"}
    command = [sys.executable, "-m", "chairlift", *arguments]
    return subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("choices", [{"gpu": "v100"}, {"gpu": "NVIDIA-V100-32GB"}, {"model": "SmolLM2-1.7B-Instruct"}])
def test_one_row_more_is_a_gpu_or_a_model_more(copy: Path, tmp_path: Path, choices: dict[str, str]) -> None:
    done = in_copy(copy, "run", str(scenario(tmp_path, **choices)), "--out", str(tmp_path / "out"))

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["completed"] == 20


def test_a_row_more_is_listed(copy: Path) -> None:
    [row] = [line for line in in_copy(copy, "list", "gpus").stdout.splitlines() if line.split()[:1] == ["v100"]]

    assert row.split()[:6] == ["v100", "125", "900", "31.7", "–", "–"]  # links and price are unknown
    assert "smollm2-1.7b" in in_copy(copy, "list", "models").stdout


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("gpus.yaml", "x:\n  bf16_tflops: 1\n  hbm_gb_per_s: -2\n  memory_gib: 3\n  source: s\n",
         "gpus.yaml:4: x.hbm_gb_per_s: must be above 0 (got -2)"),
        ("gpus.yaml", "x: {bf16_tflops: 1, memory_gib: 3, source: s}\n", "gpus.yaml:2: x.hbm_gb_per_s: is required"),
        ("gpus.yaml", "x: {bf16_tflops: 1, hbm_gb_per_s: 2, memory_gib: 3}\n", "gpus.yaml:2: x.source: is required"),
        ("gpus.yaml", "x: {bf16_tflops: 1, hbm_gb_per_s: 2, memory_gib: 3, source: s, usd: 3}\n",
         "gpus.yaml:2: x.usd: unknown key – did you mean 'usd_per_gpu_hour'?"),
        ("gpus.yaml", "x: {bf16_tflops: true, hbm_gb_per_s: .nan, memory_gib: '3', source: s}\n",
         "gpus.yaml:2: x.bf16_tflops: must be a number (got True)"),
        ("gpus.yaml", "h100: {bf16_tflops: 1, hbm_gb_per_s: 2, memory_gib: 3, source: s}\n",
         "gpus.yaml:2: h100: is a second row of that name"),
        ("gpus.yaml", "x: {bf16_tflops: 1, hbm_gb_per_s: 2, memory_gib: 3, source: s, name: y, also: z}\n",
         "gpus.yaml:2: x.also: must be a list of names (got 'z')"),
        ("gpus.yaml", "x: 3\n", "gpus.yaml:2: x: must be a mapping of keys to values"),
        ("gpus.yaml", "x: {\n", "gpus.yaml:3: not YAML: "),
        ("models.yaml", "x: {layers: 1.5, hidden: 8, heads: 4, kv_heads: 3, head_size: 2, ffn: 8, vocab: 0,"
         " max_model_len: 9, biases: some, source: s}\n",
         "models.yaml:2: x.biases: must be one of 'none', 'qkv', 'attention', 'all' (got 'some')\n"
         "FILE:2: x.kv_heads: must divide heads, 4 (got 3)\n"
         "FILE:2: x.layers: must be a whole number (got 1.5)\n"
         "FILE:2: x.vocab: must be at least 1 (got 0)"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, file: str, row: str, said: str) -> None:
    path = tmp_path / file
    good = "h100: {bf16_tflops: 989, hbm_gb_per_s: 3350, memory_gib: 80, source: s}\n"
    path.write_text((good if file == "gpus.yaml" else "# a comment\n") + row, encoding="utf-8")
    kind = specs.GPU if file == "gpus.yaml" else specs.Model

    with pytest.raises(specs.BadTable) as raised:
        list(specs.Table(path, kind, "thing"))

    assert said.replace("FILE", str(path)) in str(raised.value)


def test_a_bad_table_is_one_message_and_status_2(copy: Path, tmp_path: Path) -> None:
    broken = tmp_path / "copy"
    shutil.copytree(copy, broken, symlinks=True)
    with (broken / "backend" / "gpus.yaml").open("a", encoding="utf-8") as table:
        table.write("x: {bf16_tflops: 1, source: s, hbm_gb_per_s: 2, memory_gib: 0}\n")

    for command in (("list", "gpus"), ("run", str(scenario(tmp_path)), "--out", str(tmp_path / "out"))):
        done = in_copy(broken, *command)
        assert done.returncode == 2
        assert "x.memory_gib: must be above 0 (got 0)" in done.stderr
        assert "Traceback" not in done.stderr


# numbers of a user's own


def test_a_gpu_needs_its_peaks_and_its_memory_only(tmp_path: Path) -> None:
    status, text = run(tmp_path, gpu=json.dumps({"name": "mine", **OWN}))

    assert status == 0, text
    assert "mine: 48.00 GiB" in text
    assert run(tmp_path, gpu=json.dumps(OWN))[0] == 0  # not even a name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{memory_gib: 94}", ["2: gpu.bf16_tflops: is required", "2: gpu.hbm_gb_per_s: is required"]),
        ("{name: h10, memory_gib: 94}", ["gpu.bf16_tflops: is required: unknown GPU 'h10' – did you mean 'h100'?"]),
        ("{name: h100, memory: 94}", ["2: gpu.memory: unknown key – did you mean 'memory_gib'?"]),
        ("{name: h100, memory_gib: -94}", ["2: gpu.memory_gib: must be above 0 (got -94)"]),
        ("\n  name: h100\n  memory_gib: much\n", ["4: gpu.memory_gib: must be a number (got 'much')"]),
        ("{name: 5, memory_gib: 94}", ["2: gpu.name: must be text (got 5)"]),
    ],
)
def test_wrong_numbers_are_told_where_they_stand(tmp_path: Path, given: str, said: list[str]) -> None:
    status, text = run(tmp_path, gpu=given)

    assert status == 2
    for each in said:
        assert each in text, text


@pytest.mark.parametrize(
    ("choices", "key"),
    [
        ({"degree": 2}, "tensor parallelism depends on nvlink_gb_per_s of mine, which is unknown: give it"),
        ({"policy": "{name: mlfq}"}, "swapping KV depends on host_gb_per_s of mine, which is unknown: give it"),
        (
            {"policy": "{name: vllm_v0, preemption_mode: swap}"},
            "swapping KV depends on host_gb_per_s of mine, which is unknown: give it",
        ),
    ],
)
def test_what_is_unknown_is_refused_where_a_result_depends_on_it(
    tmp_path: Path, choices: dict[str, str], key: str
) -> None:
    status, text = run(tmp_path, gpu=json.dumps({"name": "mine", **OWN}), **choices)
    whole = {"name": "mine", **OWN, "nvlink_gb_per_s": 0, "host_gb_per_s": 31.5}

    assert status == 2
    assert key in text
    assert run(tmp_path, gpu=json.dumps(whole), **choices)[0] == 0


PLAN = """\
base: s.yaml
slo: [{percentile: 99, ttft_ms: 500}]
rate_per_s: 4
axes: {replicas: [1, 2]}
"""


def test_a_plan_asks_for_the_price_that_is_unknown(tmp_path: Path) -> None:
    scenario(tmp_path, gpu=json.dumps({"name": "mine", **OWN}))
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN, encoding="utf-8")
    refused = chairlift("plan", str(path), "--dry-run")
    path.write_text(f"{PLAN}prices: {{mine: 1.5}}\n", encoding="utf-8")

    assert refused.status == 2
    assert "has no price for mine: add mine: {usd_per_gpu_hour: …}" in refused.err
    assert chairlift("plan", str(path), "--dry-run").status == 0


SWAPPER = """\
from dataclasses import dataclass
from chairlift.policies.base import Scheduler, Step


@dataclass
class Swapper(Scheduler):
    \"\"\"Swap a request out at the first chance.\"\"\"

    def schedule(self, step: Step) -> int:
        if step.running and not step.prefilling:
            step.preempt(next(iter(step.running)), "swap")
        step.decode_all()
        for request in list(step.waiting):
            step.admit(request, request.remaining)
        return 1
"""


def test_a_policy_of_ones_own_cannot_swap_over_a_link_that_nobody_gave(tmp_path: Path) -> None:
    (tmp_path / "swapper.py").write_text(SWAPPER, encoding="utf-8")
    path = scenario(tmp_path, gpu=json.dumps(OWN))

    done = chairlift("run", str(path), "--policy", str(tmp_path / "swapper.py"), "--out", str(tmp_path / "out"))

    assert done.status == 2
    assert "host_gb_per_s of the GPU is unknown" in done.err


# a known one, changed


def test_a_known_gpu_is_changed_in_one_number(tmp_path: Path) -> None:
    status, text = run(tmp_path, gpu="{name: NVIDIA H100 80GB HBM3, memory_gib: 94}")
    changed = specs.gpu({"name": "h100", "memory_gib": 94})

    assert status == 0, text
    assert "h100 (memory_gib 94): 94.00 GiB" in text
    assert changed.memory_gib == 94
    assert vars(changed) | {"name": "h100", "memory_gib": specs.GPUS["h100"].memory_gib} == vars(specs.GPUS["h100"])
    assert specs.gpu({"name": "h100"}) is specs.GPUS["h100"]
    assert specs.gpu({"name": "h100", "hbm_gb_per_s": 3350}) is specs.GPUS["h100"]


def test_a_known_model_is_changed_in_one_number(tmp_path: Path) -> None:
    status, text = run(tmp_path, model="{name: facebook/opt-13b, bytes_per_param: 1}")

    assert status == 0, text
    assert "11.97 weights" in text  # GiB: 12,853,473,280 parameters, a byte each
    assert "opt-13b (bytes_per_param 1)" in text


def test_a_config_json_is_changed_in_one_number(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    status, text = run(tmp_path, model="{name: small/config.json, kv_bytes_per_element: 1}")

    assert status == 0, text
    assert "small (kv_bytes_per_element 1) on h100" in text


def test_a_profile_holds_for_other_memory_and_is_scaled_for_another_bandwidth() -> None:
    profile = settings.Settings("h200-opt-13b-vllm-0.23")
    batch = Batch((Chunk(0, 300),), 20, 20_000)
    model, own = specs.model("opt-13b"), profile.build(specs.model("opt-13b"), specs.gpu("h200"), ONE)
    roomy = profile.build(model, specs.gpu({"name": "h200", "memory_gib": 200}), ONE)
    fast = profile.build(model, specs.gpu({"name": "h200", "hbm_gb_per_s": 9600}), ONE)

    assert roomy.step(batch) == own.step(batch)
    here, there = own.profile.gpu_time, fast.profile.gpu_time
    assert there.kv_s == pytest.approx(here.kv_s / 2)
    # 25.7 GB at 0.8 of 4.8 and of 9.6 TB/s; ten kernels in each of 40 layers take 3 us each, whatever the memory
    assert there.weights_s / here.weights_s == pytest.approx((3.347 + 1.2) / (6.695 + 1.2), rel=0.01)
    assert "scaled, not measured" in fast.assumptions()


def test_a_changed_model_has_no_profile() -> None:
    model = specs.model({"name": "opt-13b", "bytes_per_param": 1})

    with pytest.raises(ValueError, match=r"is of opt-13b, not of opt-13b \(bytes_per_param 1\)"):
        settings.Settings("h200-opt-13b-vllm-0.23").build(model, specs.gpu("h200"), ONE)


def test_own_numbers_and_a_row_are_read_alike() -> None:
    row = specs.GPUS["h100"]

    assert specs.gpu({**vars(row), "name": "mine"}) == row.__class__(**{**vars(row), "name": "mine"})
    one = Roofline(specs.model("opt-13b"), row).step(Batch((), 3, 3000))
    assert (
        Roofline(specs.model("opt-13b"), specs.gpu({**OWN, **{k: getattr(row, k) for k in OWN}})).step(
            Batch((), 3, 3000)
        )
        == one
    )


def test_an_editor_accepts_a_changed_gpu() -> None:
    schema = json.loads(chairlift("schema").out)

    for key in ("gpu", "model"):
        [numbers] = [each for each in schema["properties"][key]["anyOf"] if "properties" in each]
        assert "required" not in numbers
        assert numbers["additionalProperties"] is False
