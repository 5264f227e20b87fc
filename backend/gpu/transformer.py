"""Decoder-only transformers for the GPU engine: the Llama family (Llama, Mistral, Qwen2, Qwen3), dense or with experts
(Qwen3-MoE, Mixtral), and OPT.

One forward pass takes a flat batch of tokens, decodes first and chunks of prompts after them, as in Orca's selective
batching (Yu et al., OSDI 2022): everything but attention sees a matrix of tokens. Shapes are `backend.shapes.Model`s;
the layers' arithmetic is that of `transformers`, to which the tests hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chairlift.backend.gpu.kernels.experts import Experts, mixture
from chairlift.backend.gpu.kernels.layers import (
    Eights,
    Product,
    Share,
    gated_e4m3,
    head_norm,
    linear,
    linear_e4m3,
    product,
    quantised,
    residual_norm,
    residual_norm_e4m3,
)
from chairlift.backend.gpu.paged_attention import Heads, PagedAttention, Paging, Shared, Spans
from chairlift.backend.gpu.ranks import ALONE, ONLY, Ranks, Stage
from chairlift.backend.shapes import Model

if TYPE_CHECKING:
    from chairlift.backend.gpu.exchange import Exchange


@dataclass(frozen=True)
class Arithmetic:
    """What a shape does not say of a model's layers; the defaults are Llama's."""

    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    llama3_scaling: tuple[float, float, float, float] | None = (
        None  # factor, low and high frequency factor, old context
    )
    linear_scaling: float = 1.0
    mixture_name: str = "mlp"  # of a layer's experts; what one's matrices are called: gates, ups, downs
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_norm: bool = True  # the weights of a token's experts add up to 1

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], longest: int = 0) -> Arithmetic:
        """As a Hugging Face ``config.json`` says; sequences have at most ``longest`` tokens.

        Raises ValueError for layers that are not built: another RoPE scaling, activation or order of norms, or a
        window of attention that is shorter than the longest sequence.
        """
        opt = config.get("model_type") == "opt"
        key, built = ("activation_function", ("relu",)) if opt else ("hidden_act", ("silu", "swish"))
        if (activation := config.get(key) or built[0]) not in built:
            raise ValueError(f"{key} {activation!r} is not built; {built[0]} is")
        if opt and not config.get("do_layer_norm_before", True):
            raise ValueError("do_layer_norm_before false is not built; norms before attention and MLP are")
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        if window and window < longest:
            raise ValueError(f"sliding_window {window} is not built; a max_model_len of up to {window} needs none")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ValueError("layers without experts among those with them are not built")
        mixtral = config.get("model_type") == "mixtral"
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "llama3", "linear"):
            raise ValueError(f"RoPE scaling {kind!r} is not built; default, linear and llama3 are")
        llama3 = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            factor, low, high, old = (_above_0(rope, name) for name in names)
            llama3 = (factor, low, high, old)
        return cls(
            norm_epsilon=_given(cls.norm_epsilon, (config, "rms_norm_eps"), (config, "layer_norm_eps")),
            rope_theta=_given(cls.rope_theta, (rope, "rope_theta"), (config, "rope_theta")),
            llama3_scaling=llama3,
            linear_scaling=_above_0(rope, "factor") if kind == "linear" else 1.0,
            mixture_name="block_sparse_moe" if mixtral else "mlp",
            expert_names=("w1", "w3", "w2") if mixtral else cls.expert_names,
            expert_norm=mixtral or bool(config.get("norm_topk_prob", False)),
        )

    def rotation(self, positions: int, size: int, device: torch.device) -> Tensor:
        """Cosine and sine of RoPE's angles: float32 ``[positions, size / 2, 2]``."""
        frequency = 1.0 / self.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        frequency = frequency / self.linear_scaling
        if self.llama3_scaling is not None:  # long waves stretched, short ones left (Llama 3.1, `rope_scaling`)
            factor, low, high, old = self.llama3_scaling
            wave = 2 * math.pi / frequency
            smooth = ((old / wave - low) / (high - low)).clamp(0, 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency[None, :]
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(device=device, dtype=torch.float32)


def _above_0(told: Mapping[str, Any], key: str) -> float:
    """The number ``key`` of a ``config.json``. Raises ValueError if it is none above 0, KeyError if it is missing."""
    value = told[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a number above 0 (got {value!r})")
    return float(value)


def _given(default: float, *places: tuple[Mapping[str, Any], str]) -> float:
    """The first of these numbers that is given."""
    return next((_above_0(told, key) for told, key in places if told.get(key) is not None), default)


@dataclass
class Layer:
    """Weights of one layer, ``[out, in]``; None where the family has none."""

    norm: Tensor
    norm_bias: Tensor | None
    qkv: Tensor | Eights  # queries, keys, values
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: Tensor | Eights
    out_bias: Tensor | None
    mlp_norm: Tensor
    mlp_norm_bias: Tensor | None
    up: Tensor | Eights | None  # gated: gates first; None where there are experts
    up_bias: Tensor | None
    down: Tensor | Eights | None
    down_bias: Tensor | None
    experts: Experts | None = None


class Tokens(NamedTuple):
    """One step's flat batch: rows of decodes, then rows of chunks. Integers are int32 on the model's device."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows], from 0
    paging: Paging | None  # of the first rows, the decodes; rows of length 0 are nobody's
    slots: Tensor | None = None  # [rows]: where keys and values of chunks go; `NOWHERE`, as of decodes
    spans: Spans | None = None  # which rows are whose chunks
    sampled: Tensor | None = None  # rows whose next token is wanted; None: all
    live: Tensor | None = None  # [1] int32: rows that are somebody's, the first ones; None: all
    live_sampled: Tensor | None = None  # likewise of the sampled ones
    hidden: Tensor | None = None  # [rows, hidden]: what the stage before has made of them; None: they enter here


class Transformer:
    """A model with its weights on one device; or the layers of one stage of a pipeline, and what else that stage needs.

    Tokens are embedded by the first stage, the last one has the norm after the layers and the head.
    """

    def __init__(
        self,
        model: Model,
        arithmetic: Arithmetic,
        dtype: torch.dtype,
        device: torch.device,
        weight: Callable[..., Tensor],
        block: int,
        max_batch: int,
        max_positions: int,
        eights: bool = False,
        skew: float | None = None,
        ranks: Ranks = ALONE,
        stage: Stage = ONLY,
    ) -> None:
        """``weight(name, *shape)`` gives each tensor, named as in `transformers`; all are asked for, on every stage.

        With ``eights`` the layers' matrices are 8-bit floats with a scale a row, and so are their inputs, scaled anew
        each step; embedding, head and attention are not. ``skew`` is as in `Experts`. Raises as `PagedAttention`, and
        for layers that are not built.
        """
        if eights and (not model.gated_mlp or model.biases == "attention"):
            raise ValueError(
                f"{model.name}: weights in FP8 are built for gated models (Llama, Mistral, Qwen), without a bias after"
                " attention"
            )
        if model.experts > 256 or model.experts_per_token > 16 or model.shared_ffn or model.dense_layers:
            raise ValueError(
                f"{model.name}: built are up to 256 experts a layer, 16 of them a token, none shared by all"
            )
        self._arithmetic, self._skew = arithmetic, skew
        self.ranks = ranks
        self.exchange: Exchange | None = None  # of several GPUs: where sums of small steps are taken, if not by NCCL
        self.model = model
        self.heads = heads = ranks.heads(Heads(model.heads, model.kv_heads, model.head_size))
        self.dtype = dtype
        self.device = device
        self.epsilon = arithmetic.norm_epsilon
        self._opt = model.learned_positions > 0
        self._activation = "gated" if model.gated_mlp else "relu"
        rotation = None if self._opt else arithmetic.rotation(max_positions, model.head_size, device)
        self.attention = PagedAttention(heads, block, dtype, device, rotation, max_batch)
        root = "model.decoder." if self._opt else "model."
        hidden = model.hidden
        embedding = weight(root + "embed_tokens.weight", model.vocab, hidden)
        positions = weight(root + "embed_positions.weight", model.learned_positions, hidden) if self._opt else None
        self.embedding = embedding if stage.first else None
        self.positions = positions if stage.first else None
        build = self._opt_layer if self._opt else self._llama_layer
        self.layers: list[Layer] = []
        for i in range(model.layers):
            layer = build(weight, f"{root}layers.{i}.", i)
            if i not in stage.layers(model.layers):  # numbers drawn at random are to be the same however many stages
                continue
            for name in (
                ("qkv", "out", "up", "down") if eights else ()
            ):  # one by one: all of them in 16 bits may not fit
                fit = ranks.quantised if name in ("out", "down") else quantised  # every GPU has a part of their rows
                if getattr(layer, name) is not None:
                    setattr(layer, name, fit(getattr(layer, name)))
            if eights and layer.experts is not None:
                layer.experts = layer.experts.quantised()
            self.layers.append(layer)
        last = root + ("final_layer_norm" if self._opt else "norm")
        self.norm = weight(last + ".weight", hidden)
        self.norm_bias = weight(last + ".bias", hidden) if model.biases == "all" else None
        head = embedding if model.tied_embeddings else weight("lm_head.weight", model.vocab, hidden)
        own = head[ranks.part(model.vocab)]
        self.head = None if not stage.last else own if ranks.count == 1 else own.clone()

    def _llama_layer(self, weight: Callable[..., Tensor], at: str, i: int) -> Layer:
        m = self.model
        names, biased, dense = ("q_proj", "k_proj", "v_proj"), m.biases in ("qkv", "attention"), not m.experts
        width = self.ranks.part(m.ffn)
        gates_and_ups = (f"{at}mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
        out_bias = weight(at + "self_attn.o_proj.bias", m.hidden) if m.biases == "attention" else None
        return Layer(
            norm=weight(at + "input_layernorm.weight", m.hidden),
            norm_bias=None,
            qkv=self._by_head(weight, [f"{at}self_attn.{name}.weight" for name in names], m.hidden),
            qkv_bias=self._by_head(weight, [f"{at}self_attn.{name}.bias" for name in names]) if biased else None,
            query_norm=weight(at + "self_attn.q_norm.weight", m.head_size) if m.qk_norm else None,
            key_norm=weight(at + "self_attn.k_norm.weight", m.head_size) if m.qk_norm else None,
            out=self._from_heads(weight(at + "self_attn.o_proj.weight", m.hidden, m.heads * m.head_size)),
            out_bias=self._once(out_bias),
            mlp_norm=weight(at + "post_attention_layernorm.weight", m.hidden),
            mlp_norm_bias=None,
            up=torch.cat([weight(name, m.ffn, m.hidden)[width] for name in gates_and_ups]) if dense else None,
            up_bias=None,
            down=weight(at + "mlp.down_proj.weight", m.hidden, m.ffn)[:, width].contiguous() if dense else None,
            down_bias=None,
            experts=None if dense else self._experts(weight, at + self._arithmetic.mixture_name, i),
        )

    def _experts(self, weight: Callable[..., Tensor], at: str, layer: int) -> Experts:
        m = self.model
        gate, up, down = self._arithmetic.expert_names
        own = range(m.experts)[self.ranks.part(m.experts)]
        ups = torch.empty((len(own), 2 * m.expert_ffn, m.hidden), dtype=self.dtype, device=self.device)
        downs = torch.empty((len(own), m.hidden, m.expert_ffn), dtype=self.dtype, device=self.device)
        for i in range(m.experts):  # those of other GPUs too: numbers drawn at random are to be the same everywhere
            parts = [weight(f"{at}.experts.{i}.{name}.weight", m.expert_ffn, m.hidden) for name in (gate, up)]
            last = weight(f"{at}.experts.{i}.{down}.weight", m.hidden, m.expert_ffn)
            if i in own:
                ups[i - own.start] = torch.cat(parts)
                downs[i - own.start] = last
        router = weight(f"{at}.gate.weight", m.experts, m.hidden)
        norm = self._arithmetic.expert_norm
        return Experts(router, ups, downs, m.experts_per_token, norm, layer, self._skew, own.start)

    def _opt_layer(self, weight: Callable[..., Tensor], at: str, _: int) -> Layer:
        m = self.model
        names, biased = ("q_proj", "k_proj", "v_proj"), m.biases == "all"
        width = self.ranks.part(m.ffn)

        def bias(name: str, size: int) -> Tensor | None:
            return weight(f"{at}{name}.bias", size) if biased else None

        up_bias = bias("fc1", m.ffn)
        return Layer(
            norm=weight(at + "self_attn_layer_norm.weight", m.hidden),
            norm_bias=bias("self_attn_layer_norm", m.hidden),
            qkv=self._by_head(weight, [f"{at}self_attn.{name}.weight" for name in names], m.hidden),
            qkv_bias=self._by_head(weight, [f"{at}self_attn.{name}.bias" for name in names]) if biased else None,
            query_norm=None,
            key_norm=None,
            out=self._from_heads(weight(at + "self_attn.out_proj.weight", m.hidden, m.heads * m.head_size)),
            out_bias=self._once(bias("self_attn.out_proj", m.hidden)),
            mlp_norm=weight(at + "final_layer_norm.weight", m.hidden),
            mlp_norm_bias=bias("final_layer_norm", m.hidden),
            up=weight(at + "fc1.weight", m.ffn, m.hidden)[width],
            up_bias=None if up_bias is None else up_bias[width],
            down=weight(at + "fc2.weight", m.hidden, m.ffn)[:, width].contiguous(),
            down_bias=self._once(bias("fc2", m.hidden)),
        )

    def _by_head(self, weight: Callable[..., Tensor], names: Sequence[str], *width: int) -> Tensor:
        """Queries', keys' and values' rows of this GPU's heads, one after the other."""
        m, found = self.model, []
        for name, heads in zip(names, (m.heads, m.kv_heads, m.kv_heads), strict=True):
            found.append(weight(name, heads * m.head_size, *width)[self.ranks.part(heads, m.head_size)])
        return torch.cat(found)

    def _from_heads(self, weight: Tensor) -> Tensor:
        """The columns of a matrix that this GPU's heads are multiplied with."""
        return weight[:, self.ranks.part(self.model.heads, self.model.head_size)].contiguous()

    def _once(self, bias: Tensor | None) -> Tensor | None:
        """A bias that is added to a sum over all GPUs: by one of them."""
        return bias if self.ranks.rank == 0 else None

    @torch.inference_mode()
    def forward(self, step: Tokens, cache: Tensor) -> Tensor:
        """Logits ``[sampled rows, vocab]``; keys and values of all rows are in ``cache`` afterwards.

        Of a span no row but the last is sampled.
        """
        if step.sampled is None:
            return self.leave(*self.attended(step, cache), None, step.live)
        last = None if step.spans is None else step.spans.last_rows()
        return self.leave(*self.attended(step, cache, last=last), step.sampled, step.live_sampled)

    @torch.inference_mode()
    def passed(self, step: Tokens, cache: Tensor) -> Tensor:
        """What a stage but the last hands on, ``[rows, hidden]``; keys and values are in ``cache`` afterwards."""
        y, residual = self.attended(step, cache)
        layer = self.layers[-1]
        # the norm is the next stage's to take; this one adds up
        residual_norm(self.rest(layer, y, residual, step.live), residual, layer.norm, layer.norm_bias, self.epsilon)
        return residual

    def attended(
        self,
        step: Tokens,
        cache: Tensor,
        states: Tensor | None = None,
        of: Sequence[int] = (),
        last: Spans | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All of a step up to the last layer's attention: what that gives and the residual, for `leave` and `passed`.

        ``[rows, query · size]`` and ``[rows, hidden]``. Of rows that are nobody's both hold anything, the first also of
        those that do not attend in the last layer. ``states`` [rows, hidden a layer] gets what enters the layers
        ``of``, side by side. ``last``: the spans that attend in the last layer; None: those of the step.
        """
        attention, rows = self.attention, len(step.tokens)
        if step.paging is not None:
            attention.plan(step.paging)
        spans = step.spans
        shared = None if spans is None else attention.plan_chunks(spans, rows)
        residual = self.embed(step.tokens, step.positions) if step.hidden is None else step.hidden
        qkv = self._project(0, None, residual)
        y = torch.empty((rows, self.heads.query * self.heads.size), dtype=self.dtype, device=self.device)
        exchange = self.exchange
        halves = exchange is not None and exchange.halved <= rows <= exchange.rows and not self.model.experts
        for i, layer in enumerate(cache):
            if i and halves:
                qkv = self._by_halves(i, y, residual)
            elif i:
                qkv = self._project(i, self.rest(self.layers[i - 1], y, residual, step.live), residual)
            if states is not None:
                for place in [n for n, one in enumerate(of) if one == i]:
                    states[:, place * self.model.hidden : (place + 1) * self.model.hidden] = residual
            if i == len(cache) - 1 and last is not None:
                spans = last
                shared = attention.plan_chunks(spans, len(spans.each))
            self.attend(qkv, layer, step, spans, shared, y)
        return y, residual

    def attend(
        self, qkv: Tensor, layer: Tensor, step: Tokens, spans: Spans | None, shared: Shared | None, y: Tensor
    ) -> None:
        """Attention of a step's rows over one layer's cache, which then holds their keys and values too.

        ``qkv`` [rows, width] gives ``y`` [rows, query · size] of the step's decodes and of ``spans``. ``shared`` is of
        `PagedAttention.plan_chunks`.
        """
        attention = self.attention
        if step.slots is not None:
            attention.rotate_and_store(qkv, layer, step.positions, step.slots)
        if step.paging is not None:
            decodes = len(step.paging.lengths)
            attention.append_and_decode(qkv[:decodes], layer, step.paging, y[:decodes])
        if spans is not None:
            attention.chunks(qkv, layer, spans, shared, y)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer: ``[rows, hidden]``."""
        assert self.embedding is not None
        residual = functional.embedding(tokens, self.embedding)
        if self.positions is not None:
            residual += functional.embedding(positions + 2, self.positions)  # OPT keeps two rows for padding
        return residual

    def leave(self, y: Tensor, residual: Tensor, sampled: Tensor | None, live: Tensor | None = None) -> Tensor:
        """Logits of the ``sampled`` rows (None: all) from what the last layer attended to; ``live`` of them matter."""
        if sampled is not None:  # of the others only keys and values are needed
            y, residual = y[sampled], residual[sampled]
            if not len(y):
                return y.new_empty((0, self.model.vocab))
        x = self.rest(self.layers[-1], y, residual, live)
        assert self.head is not None
        return linear(residual_norm(x, residual, self.norm, self.norm_bias, self.epsilon), self.head)

    def _by_halves(self, i: int, y: Tensor, residual: Tensor) -> Tensor:
        """`rest` of layer ``i`` - 1, `_project` of layer ``i``: one half of the rows is sent while the other runs."""
        layer, middle = self.layers[i - 1], len(y) // 2
        halves = slice(0, middle), slice(middle, len(y))
        x = [self._part(0, y[half], layer.out, layer.out_bias, half) for half in halves]
        x = [self._mlp(layer, part, residual[half], None, half) for part, half in zip(x, halves, strict=True)]
        qkv = y.new_empty((len(y), self.heads.width))
        for part, half in zip(x, halves, strict=True):
            self._project(i, part, residual[half], qkv[half])
        return qkv

    def _project(
        self, i: int, x: Tensor | Product | Share | None, residual: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Queries, keys and values of layer ``i``, ``[rows, width]``, once ``x`` is added to the residual.

        On a GPU they are in ``out``, if that is given.
        """
        layer = self.layers[i]
        norm = (x, residual, layer.norm, layer.norm_bias, self.epsilon)
        if isinstance(layer.qkv, Eights):
            qkv = linear_e4m3(residual_norm_e4m3(*norm), layer.qkv, layer.qkv_bias, self.dtype, out)
        else:
            qkv = linear(residual_norm(*norm), layer.qkv, layer.qkv_bias, out=out)
        if layer.query_norm is not None and layer.key_norm is not None:
            head_norm(qkv, layer.query_norm, layer.key_norm, self.heads.query, self.heads.kv, self.epsilon)
        return qkv

    def rest(self, layer: Layer, y: Tensor, residual: Tensor, live: Tensor | None) -> Tensor | Product | Share:
        """What follows a layer's attention, but for adding it to the residual."""
        x = self._part(0, y, layer.out, layer.out_bias)
        x = self._mlp(layer, self.ranks.sum(x) if isinstance(x, Tensor) else x, residual, live)
        return self.ranks.sum(x) if isinstance(x, Tensor) else x

    def _mlp(
        self,
        layer: Layer,
        x: Tensor | Product | Share,
        residual: Tensor,
        live: Tensor | None,
        half: slice | None = None,
    ) -> Tensor | Product | Share:
        """This GPU's part of a layer's MLP or experts, once ``x`` is added to the residual; a part as of `_part`."""
        norm = (x, residual, layer.mlp_norm, layer.mlp_norm_bias, self.epsilon)
        if layer.experts is not None:
            share = self._share(1, len(residual))
            made = mixture(residual_norm(*norm), layer.experts, live, None if share is None else share.values)
            return made if share is None else share
        assert layer.up is not None
        assert layer.down is not None
        wide: Tensor | Product
        if isinstance(layer.up, Eights):
            wide = product(residual_norm_e4m3(*norm), layer.up, self.dtype)
        else:
            wide = linear(residual_norm(*norm), layer.up, layer.up_bias, self._activation)
        return self._part(1, wide, layer.down, layer.down_bias, half)

    def _part(
        self,
        place: int,
        x: Tensor | Product,
        weight: Tensor | Eights,
        bias: Tensor | None,
        half: slice | None = None,
    ) -> Tensor | Product | Share:
        """This GPU's part of a product whose sum over all GPUs is to be taken: as `Share`, in a place of the exchange.

        In a step that is too large for that it is a tensor; on one GPU in 8-bit floats a `Product`. One ``half`` of the
        rows of a large step is sent to the other GPU at once.
        """
        rows = len(x if isinstance(x, Tensor) else x.values)
        share = self._share(place, rows, weight.scale if isinstance(weight, Eights) else None)
        if half is not None and self.exchange is not None:
            share = self.exchange.half(place, half, half.start > 0)
        out = None if share is None else share.values
        made: Tensor | Product
        if not isinstance(weight, Eights):
            assert isinstance(x, Tensor)
            made = linear(x, weight, bias, out=out)
        else:
            scale = None if share is None else share.rows
            eights = quantised(x, scale) if isinstance(x, Tensor) else gated_e4m3(x, scale)
            if share is None and self.ranks.count > 1:
                return linear_e4m3(eights, weight, None, self.dtype)
            made = product(eights, weight, self.dtype, out)
            if share is not None and made.rows is None:
                share = share._replace(rows=None, columns=None)
        if share is None:
            return made
        if self.exchange is not None and not share.ours:
            self.exchange.send(share)
        return share

    def _share(self, place: int, rows: int, columns: Tensor | None = None) -> Share | None:
        """Where this GPU's part of a sum goes; None on one GPU, and for steps that are too large for it."""
        if self.exchange is None or rows > self.exchange.rows:
            return None
        return self.exchange.share(place, rows, columns)
