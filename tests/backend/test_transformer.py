"""Our transformers against those of `transformers`, on the same weights; and folders of weights that are no good."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models are made of torch tensors")
transformers = pytest.importorskip("transformers", reason="the models are held to those of transformers")

from chairlift.backend import hf_config  # noqa: E402
from chairlift.backend.gpu.kernels.experts import Experts, mixture  # noqa: E402
from chairlift.backend.gpu.paged_attention import Heads, Paging, Spans, new_cache  # noqa: E402
from chairlift.backend.gpu.settings import Torch  # noqa: E402
from chairlift.backend.gpu.transformer import Arithmetic, Tokens, Transformer  # noqa: E402
from chairlift.backend.gpu.weights import read_config, saved_weights  # noqa: E402
from chairlift.backend.parallel import ONE  # noqa: E402
from chairlift.backend.shapes import Model  # noqa: E402
from chairlift.policies.vllm import Vllm  # noqa: E402
from kit.tiny import Kept, executed, prompt_of, system  # noqa: E402 - torch may be absent
from kit.worlds import trace_of  # noqa: E402

CPU = torch.device("cpu")
LONGEST = 128
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 56,
    "vocab_size": 89,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.25,  # so large that every token depends on all before it
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


def family(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SIZES, **more})


FAMILIES = {
    "llama": family("Llama", rms_norm_eps=1e-3, **rope(rope_type="default")),
    "llama, one KV head a head": family("Llama", num_key_value_heads=4, head_dim=12),
    "llama, tied, biases of attention": family("Llama", tie_word_embeddings=True, attention_bias=True),
    "llama 3.1": family("Llama", **rope(rope_type="llama3", **LLAMA3)),
    "llama, linear scaling": family("Llama", **rope(rope_type="linear", factor=4.0)),
    "mistral": family("Mistral", sliding_window=None),
    "qwen2": family("Qwen2"),
    "qwen2, tied": family("Qwen2", tie_word_embeddings=True),
    "qwen3": family("Qwen3"),
    "qwen3, tied": family("Qwen3", tie_word_embeddings=True, head_dim=32),
    "qwen3 moe": family(
        "Qwen3Moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3 moe, weights as they are": family(
        "Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=False
    ),
    "mixtral": family("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=56,
        vocab_size=89,
        max_position_embeddings=LONGEST,
        word_embed_proj_dim=48,
        init_std=0.25,
        dropout=0.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def saved(config: Any, folder: Path) -> Any:
    """A `transformers` model with random weights, norms and biases among them, saved to ``folder``."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if name.endswith("weight") else 0.0))
    model.save_pretrained(folder, safe_serialization=True)
    return model


def loaded(folder: Path) -> Transformer:
    config = read_config(folder)
    weight = saved_weights(folder, torch.float32, CPU)
    model = hf_config.model(config, "tiny")
    return Transformer(model, Arithmetic.from_hf_config(config), torch.float32, CPU, weight, 16, 2, LONGEST)


def integers(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


class Fed:
    """One sequence in the cache of one of our models, fed piece by piece."""

    def __init__(self, net: Transformer) -> None:
        m = net.model
        self.net = net
        self.cache = new_cache(m.layers, 9, 16, Heads(m.heads, m.kv_heads, m.head_size), torch.float32, CPU)
        self.table = integers(5, 2, 8, 0, 3, 1, 7, 4)
        self.length = 0

    def _slots(self, start: int, stop: int) -> Any:
        at = torch.arange(start, stop)
        return (self.table[at // 16] * 16 + at % 16).to(torch.int32)

    def chunk(self, tokens: list[int]) -> Any:
        """Logits after each token of a chunk of the prompt."""
        start, n = self.length, len(tokens)
        self.length = stop = start + n
        spans = Spans(integers(0, n, stop, 0, 0)[None], self.table[None])
        positions = torch.arange(start, stop, dtype=torch.int32)
        return self.net.forward(Tokens(integers(*tokens), positions, None, self._slots(start, stop), spans), self.cache)

    def decode(self, token: int) -> Any:
        """Logits after one more token."""
        self.length += 1
        paging = Paging(self.table[None], integers(0), integers(self.length), integers(0))
        step = Tokens(integers(token), integers(self.length - 1), paging)
        return self.net.forward(step, self.cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = saved(FAMILIES[name](), tmp_path)
    net = loaded(tmp_path)
    tokens = torch.randint(0, 89, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        wanted = theirs(torch.tensor([tokens]), use_cache=False).logits[0]
    assert wanted.std() > 0.3  # nothing vanishes

    fed = Fed(net)
    pieces = [fed.chunk(tokens[:37]), fed.chunk(tokens[37:80]), *(fed.decode(token) for token in tokens[80:])]
    for found in (Fed(net).chunk(tokens), torch.cat(pieces)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))

    trace = trace_of([(0, 20, 12), (0, 70, 9)])
    kept = Kept(Torch(device="cpu", weights=str(tmp_path), max_batch=4))
    policy = {"max_num_batched_tokens": 33}
    executed(system(trace, Vllm, policy, kept, model=net.model, max_model_len=LONGEST))
    for request, (_, prompt, output) in enumerate([(0, 20, 12), (0, 70, 9)]):
        numbers = torch.tensor([prompt_of(trace, request, 16, net.model.vocab)])
        made = theirs.generate(numbers, do_sample=False, max_new_tokens=output, attention_mask=torch.ones_like(numbers))
        assert kept.built[0].generated[request] == made[0, prompt:].tolist()


def test_all_three_bands_of_llama_3_scaling_are_in_the_test() -> None:
    # wave lengths 2π·1000^(i/8) for i = 0 … 7 are 6.3 … 2650; short: below 64/4, long: above 64/1
    waves = 2 * np.pi * 1000.0 ** (np.arange(8) / 8)
    bands = [int((waves < 16).sum()), int(((waves >= 16) & (waves <= 64)).sum()), int((waves > 64).sum())]

    assert bands == [2, 1, 5]


@pytest.mark.parametrize("name", ["llama", "llama 3.1", "llama, linear scaling"])
def test_rope_is_read_from_older_configurations_too(name: str) -> None:
    new = FAMILIES[name]().to_dict() | rope(**FAMILIES[name]().rope_parameters)
    scaling = dict(new["rope_parameters"])
    base = {key: value for key, value in new.items() if key != "rope_parameters"} | {
        "rope_theta": scaling.pop("rope_theta")
    }
    plain = scaling["rope_type"] == "default"
    old = base | {"rope_scaling": None if plain else scaling}
    older = base | {"rope_scaling": None if plain else {**scaling, "type": scaling["rope_type"]}}
    if not plain:
        del older["rope_scaling"]["rope_type"]

    read = Arithmetic.from_hf_config(new)
    assert read.rope_theta == 1000.0
    assert read == Arithmetic.from_hf_config(old) == Arithmetic.from_hf_config(older)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_scaling_of_rope_is_refused(kind: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"RoPE scaling '{kind}' is not built; default, linear and llama3 are"):
        Arithmetic.from_hf_config({key: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not built; silu is"),
        ("opt", {"activation_function": "gelu"}, "activation_function 'gelu' is not built; relu is"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before false is not built"),
        (
            "mistral",
            {"sliding_window": 159},
            "sliding_window 159 is not built; a max_model_len of up to 159 needs none",
        ),
        ("qwen2", {"sliding_window": 159, "use_sliding_window": True}, "sliding_window 159 is not built"),
    ],
)
def test_layers_that_are_not_built_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arithmetic.from_hf_config(FAMILIES[name]().to_dict() | change, 160)


def test_other_names_and_windows_of_layers_that_are_built() -> None:
    swish = FAMILIES["llama"]().to_dict() | {"hidden_act": "swish"}
    wide = FAMILIES["mistral"]().to_dict() | {"sliding_window": 160}
    unused = FAMILIES["qwen2"]().to_dict() | {"sliding_window": 8, "use_sliding_window": False}

    assert Arithmetic.from_hf_config(swish, 160) == Arithmetic.from_hf_config(FAMILIES["llama"]().to_dict())
    assert Arithmetic.from_hf_config(wide, 160) == Arithmetic.from_hf_config(FAMILIES["mistral"]().to_dict())
    assert Arithmetic.from_hf_config(unused, 160) == Arithmetic.from_hf_config(FAMILIES["qwen2"]().to_dict())


# folders of weights that are no good


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("good")
    saved(FAMILIES["llama"](), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "weights"))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def prepared(folder: Path, model: Model | None = None) -> None:
    """Get an engine with these weights ready."""
    from kit.tiny import GPU

    model = model or hf_config.model(FAMILIES["llama"]().to_dict(), "tiny")
    engine: Any = Torch(device="cpu", weights=str(folder), max_batch=2).build(model, GPU, ONE)
    engine.prepare(8, 16, LONGEST, True)


def test_good_weights_are_taken(folder: Path) -> None:
    prepared(folder)


def test_a_missing_weight(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda tensors: tensors.pop(name))

    with pytest.raises(ValueError, match=rf"weights: {name} is missing"):
        prepared(folder)


def test_a_weight_of_another_shape(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    changed(folder, lambda tensors: tensors.update({name: torch.zeros(32, 47)}))

    with pytest.raises(ValueError, match=rf"weights: {name} must be \[32, 48\] \(got \[32, 47\]\)"):
        prepared(folder)


@pytest.mark.parametrize("size", ["num_hidden_layers", "vocab_size", "intermediate_size"])
def test_weights_of_another_model(folder: Path, size: str) -> None:
    other = {**FAMILIES["llama"]().to_dict(), size: 3}
    field = {"num_hidden_layers": "layers", "vocab_size": "vocab", "intermediate_size": "ffn"}[size]

    with pytest.raises(ValueError, match=rf"weights: {field} {SIZES[size]}, but the model has 3"):
        prepared(folder, hf_config.model(other, "other"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 0.5}, "hidden_size must be a whole number (got 0.5)"),
        ({"head_dim": "many"}, "head_dim must be a whole number (got 'many')"),
        ({"rope_theta": True, "rope_parameters": None}, "rope_theta must be a number above 0 (got True)"),
        ({"intermediate_size": 0}, "ffn must be at least 1 (got 0)"),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "missing 'factor'"),
    ],
)
def test_a_config_that_says_nonsense_is_named(folder: Path, change: dict[str, Any], says: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))

    with pytest.raises(ValueError, match=re.escape(str(folder / "config.json")) + ".*" + re.escape(says)):
        prepared(folder, hf_config.model(config, "tiny"))


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()

    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        prepared(folder)


@pytest.mark.parametrize(
    ("text", "problem"), [("{", r"config\.json:1: not JSON: "), ("[1]", r"config\.json: must be a mapping")]
)
def test_a_config_that_is_none(folder: Path, text: str, problem: str) -> None:
    (folder / "config.json").write_text(text)

    with pytest.raises(ValueError, match=problem):
        prepared(folder)


def test_scaling_that_is_not_built(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="RoPE scaling 'yarn' is not built"):
        prepared(folder)


def test_no_safetensors(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()

    with pytest.raises(ValueError, match=r"no \*\.safetensors in .*weights"):
        prepared(folder)


def test_safetensors_that_are_none(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"half a file")

    with pytest.raises(ValueError, match=r"\.safetensors: cannot be read: "):
        prepared(folder)


def test_drawn_experts_are_as_even_as_asked_for_and_rows_of_nobody_are_zero() -> None:
    rng = torch.Generator().manual_seed(3)
    router = torch.randn((16, 24), generator=rng)
    up, down = torch.randn((16, 20, 24), generator=rng), torch.randn((16, 24, 10), generator=rng)
    x = torch.randn((4000, 24), generator=rng)
    counts = {}
    for skew in (0.0, 1.5):
        seen = torch.zeros(16)
        for i in range(16):  # only expert i gives anything
            only = torch.zeros_like(down)
            only[i] = down[i]
            made = mixture(x, Experts(router, up, only, 2, True, 0, skew), None)
            seen[i] = (made.abs().amax(-1) > 0).sum()
        counts[skew] = seen.sort(descending=True).values
        assert seen.sum() == 2 * len(x)
    assert counts[0.0][0] / counts[0.0][-1] < 1.25  # 500 each, give or take 4 standard deviations
    assert counts[1.5][0] / counts[1.5][-1] > 10
    some = mixture(x[:9], Experts(router, up, down, 2, True, 0, None), torch.tensor([5]))
    assert torch.equal(some[:5], mixture(x[:5], Experts(router, up, down, 2, True, 0, None), None))
    assert not some[5:].any()


def test_experts_in_8_bit_floats_are_off_by_what_their_rounding_costs() -> None:
    rng = torch.Generator().manual_seed(5)
    router = torch.randn((16, 64), generator=rng)
    up, down = torch.randn((16, 96, 64), generator=rng) / 8, torch.randn((16, 64, 48), generator=rng) / 7
    x = torch.randn((200, 64), generator=rng)
    exact = Experts(router, up, down, 3, True, 0, None)
    narrow = exact.quantised()
    values, scale = narrow.up
    assert values.dtype == torch.float8_e4m3fn
    assert (values.float().abs().amax(-1) == 448).all()  # of each row of each expert
    wanted, found = mixture(x, exact, None), mixture(x, narrow, None)

    assert 0.02 < ((values.float() * scale[..., None] - up).norm() / up.norm()) < 0.04
    assert 0.02 < (found - wanted).norm() / wanted.norm() < 0.1


def test_weights_in_8_bit_floats_change_logits_by_what_their_rounding_costs(tmp_path: Path) -> None:
    """Against a plain pass of the rounded weights: what is left is the rounding of the products' inputs."""
    saved(FAMILIES["llama"](), tmp_path)
    config, weight = read_config(tmp_path), saved_weights(tmp_path, torch.float32, CPU)
    model, arithmetic = hf_config.model(config, "tiny"), Arithmetic.from_hf_config(config)
    eights = Transformer(model, arithmetic, torch.float32, CPU, weight, 16, 2, LONGEST, eights=True)
    rounded = loaded(tmp_path)
    for layer, narrow in zip(rounded.layers, eights.layers, strict=True):
        for name in ("qkv", "out", "up", "down"):
            values, scale = getattr(narrow, name)
            assert values.dtype == torch.float8_e4m3fn
            whole = values.float() * scale[:, None]
            error = (whole - getattr(layer, name)).norm() / getattr(layer, name).norm()
            assert 0.01 < error < 0.04  # 3 bits after the first: evenly spread, 0.036 of the norm
            setattr(layer, name, whole)
    tokens = torch.randint(0, 89, (60,), generator=torch.Generator().manual_seed(2)).tolist()
    wanted, found = Fed(rounded).chunk(tokens), Fed(eights).chunk(tokens)

    assert 0.005 < (found - wanted).norm() / wanted.norm() < 0.15


def test_weights_in_8_bit_floats_are_not_built_for_opt(tmp_path: Path) -> None:
    saved(FAMILIES["opt"](), tmp_path)
    config, weight = read_config(tmp_path), saved_weights(tmp_path, torch.float32, CPU)
    with pytest.raises(ValueError, match="FP8 are built for gated models"):
        Transformer(
            *(hf_config.model(config, "tiny"), Arithmetic.from_hf_config(config), torch.float32, CPU, weight),
            *(16, 2, LONGEST, True),
        )
