"""MODEL.py: what the network is.

One decoder-only Transformer, assembled from orthogonal knobs; GPT-2, Llama, Mistral and Qwen are settings of them.
Read in this order: knobs (`ModelConfig`), presets, positions (RoPE), the KV cache, attention, the layers, the
forward pass (`Transformer`), building and Hugging Face folders (`build`, `load`, `save`), and last the typed
loading of config.yaml that every script uses.

    python MODEL.py --model.preset llama3-8b     # layers, parameters, FLOPs, memory; builds no weights
    python MODEL.py --list                       # every family and size
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import types
import typing
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache as memoize
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """A mistake of the user's: shown as one line on stderr, exit status 2."""


def say(line: str) -> None:
    """Talk goes to stderr; stdout carries the product alone."""
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- knobs


def knob(default, comment: str, choices: tuple = ()):
    """A dataclass field whose comment is also its line in config.yaml and in --help."""
    metadata = {"comment": comment, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass
class ModelConfig:
    """The architecture. Names are those of Hugging Face's config.json."""

    model_type: str = knob("llama", "family whose config.json is written")
    vocab_size: int = knob(32000, "rows of the embedding; a preset's follows the tokenizer unless set")
    hidden_size: int = knob(256, "width C of the residual stream")
    intermediate_size: int = knob(704, "width of the MLP")
    num_hidden_layers: int = knob(6, "decoder layers")
    num_attention_heads: int = knob(4, "query heads H")
    num_key_value_heads: int | None = knob(None, "key/value heads: H is MHA, 1 is MQA, between is GQA")
    head_dim: int | None = knob(None, "width of one head; hidden_size / heads unless set")
    max_position_embeddings: int = knob(2048, "context length in tokens")
    hidden_act: str = knob("silu", "activation of the MLP", tuple(ACTIVATIONS))
    mlp_gated: bool = knob(True, "SwiGLU-style gate (Shazeer 2020); false is GPT-2's plain MLP")
    norm_type: str = knob("rmsnorm", "normalisation before attention and MLP", ("rmsnorm", "layernorm"))
    rms_norm_eps: float = knob(1e-5, "epsilon of either norm")
    qk_norm: bool = knob(False, "RMSNorm on each query and key head (Qwen3)")
    position_embedding_type: str = knob("rope", "rotary, or GPT-2's learned table", ("rope", "learned"))
    rope_theta: float = knob(10000.0, "base of the rotary frequencies")
    rope_scaling: dict | None = knob(None, "context extension: {rope_type: linear | llama3 | yarn, factor: 8, ...}")
    sliding_window: int | None = knob(None, "each token sees this many tokens, itself included (Mistral)")
    layer_types: list | None = knob(None, "per layer full_attention or sliding_attention; null is all alike")
    attention_bias: bool = knob(False, "bias of the query, key and value projections (Qwen2, GPT-2)")
    attention_out_bias: bool = knob(False, "bias of the attention's output projection (GPT-2)")
    mlp_bias: bool = knob(False, "biases of the MLP (GPT-2)")
    tie_word_embeddings: bool = knob(False, "the output head shares the embedding's weights")
    attention_dropout: float = knob(0.0, "dropout on attention probabilities")
    resid_pdrop: float = knob(0.0, "dropout on what attention and MLP add to the residual stream")
    embd_pdrop: float = knob(0.0, "dropout on the embeddings")
    initializer_range: float = knob(0.02, "standard deviation of the initial weights")
    bos_token_id: int | None = knob(None, "beginning-of-text id; follows the tokenizer")
    eos_token_id: int | list | None = knob(None, "end-of-text id or ids; follows the tokenizer")
    pad_token_id: int | None = knob(None, "padding id; follows the tokenizer")
    num_labels: int = knob(1, "outputs of the score head")

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "num_labels"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: {getattr(self, name)} must be at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(f"model.num_attention_heads: {self.num_attention_heads} heads do not divide hidden_size "
                                f"{self.hidden_size}; choose a divisor or set model.head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"model.num_key_value_heads: {self.num_key_value_heads} does not divide "
                            f"num_attention_heads {self.num_attention_heads}; GQA needs equal groups")
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            raise UserError(f"model.head_dim: {self.head_dim} is odd; rotary positions turn pairs of numbers")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}: {getattr(self, name)} must be a positive number")
        for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}: {getattr(self, name)} must be in [0, 1)")
        if self.model_type not in (*FAMILIES, CUSTOM):
            raise UserError(f"model.model_type: '{self.model_type}' is not one of {', '.join(FAMILIES)}")
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise UserError(f"model.{f.name}: '{getattr(self, f.name)}' is not one of {', '.join(choices)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"model.sliding_window: {self.sliding_window} must be at least 1, or null for none")
        self._check_layer_types()
        self._check_rope_scaling()

    def _check_layer_types(self):
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise UserError(f"model.layer_types: {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UserError(f"model.layer_types: unknown {sorted(unknown)}; use full_attention or sliding_attention")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise UserError("model.layer_types: sliding_attention needs model.sliding_window")
        same = "sliding_attention" if self.sliding_window else "full_attention"
        if all(kind == same for kind in self.layer_types):  # one spelling for one architecture
            self.layer_types = None
        elif all(kind == "full_attention" for kind in self.layer_types):
            self.layer_types = self.sliding_window = None

    def _check_rope_scaling(self):
        if self.rope_scaling is None:
            return
        scaling = dict(self.rope_scaling)
        kind = scaling["rope_type"] = scaling.pop("rope_type", scaling.pop("type", None))
        scaling.pop("type", None)
        if kind not in ROPE_TYPES:
            raise UserError(f"model.rope_scaling: rope_type '{kind}' is not one of {', '.join(ROPE_TYPES)}")
        needs = {"linear": ("factor",), "yarn": ("factor",), "default": (),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        missing = [key for key in needs[kind] if scaling.get(key) is None]
        if missing:
            raise UserError(f"model.rope_scaling: rope_type {kind} needs {', '.join(missing)}")
        self.rope_scaling = None if kind == "default" else scaling

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer; None sees everything before it."""
        if self.layer_types and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    @property
    def eos_ids(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


# ----------------------------------------------------------------------------------------------------- presets

_LLAMA2 = dict(max_position_embeddings=4096, vocab_size=32000)
_LLAMA3 = dict(max_position_embeddings=8192, vocab_size=128256, rope_theta=500000.0, bos_token_id=128000,
               eos_token_id=128001, num_key_value_heads=8)
_LLAMA31 = dict(_LLAMA3, max_position_embeddings=131072, rope_scaling=dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))
_MISTRAL = dict(model_type="mistral", sliding_window=4096, num_key_value_heads=8, max_position_embeddings=32768)
_QWEN2 = dict(model_type="qwen2", attention_bias=True, rope_theta=1e6, rms_norm_eps=1e-6, vocab_size=151936,
              max_position_embeddings=32768)
_QWEN3 = dict(model_type="qwen3", qk_norm=True, rope_theta=1e6, rms_norm_eps=1e-6, vocab_size=151936, head_dim=128,
              max_position_embeddings=40960)
_GPT2 = dict(model_type="gpt2", norm_type="layernorm", hidden_act="gelu_new", mlp_gated=False, attention_bias=True,
             attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True, position_embedding_type="learned",
             vocab_size=50257, max_position_embeddings=1024, bos_token_id=50256, eos_token_id=50256)


def _size(base: dict, width: int, layers: int, heads: int, mlp: int, **more) -> dict:
    return dict(base, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp,
                **more)


_TINY = dict(tie_word_embeddings=True, vocab_size=4096, max_position_embeddings=1024)
PRESETS = {
    "llama-1m": _size(_TINY, 128, 4, 4, 344),
    "llama-2m": _size(_TINY, 192, 5, 6, 512, num_key_value_heads=3),
    "llama-14m": _size(_LLAMA2, 384, 6, 6, 1024, vocab_size=4096),
    "llama-134m": _size(_LLAMA2, 768, 12, 12, 2048),
    "llama-374m": _size(_LLAMA2, 1024, 24, 16, 2816),
    "gpt2-2m": _size(_GPT2, 192, 4, 6, 768, vocab_size=4096),
    "mistral-2m": _size(dict(_TINY, model_type="mistral", sliding_window=128), 192, 5, 6, 512, num_key_value_heads=3),
    "qwen2-2m": _size(dict(_QWEN2, **_TINY), 192, 5, 6, 512, num_key_value_heads=3),
    "qwen3-2m": _size(dict(_QWEN3, **_TINY, head_dim=32), 192, 5, 6, 512, num_key_value_heads=3),
    "gpt2-124m": _size(_GPT2, 768, 12, 12, 3072),
    "gpt2-355m": _size(_GPT2, 1024, 24, 16, 4096),
    "gpt2-774m": _size(_GPT2, 1280, 36, 20, 5120),
    "gpt2-xl": _size(_GPT2, 1600, 48, 25, 6400),
    "llama2-7b": _size(_LLAMA2, 4096, 32, 32, 11008),
    "llama2-13b": _size(_LLAMA2, 5120, 40, 40, 13824),
    "llama2-70b": _size(_LLAMA2, 8192, 80, 64, 28672, num_key_value_heads=8),
    "llama3-8b": _size(_LLAMA3, 4096, 32, 32, 14336),
    "llama3-70b": _size(_LLAMA3, 8192, 80, 64, 28672),
    "llama3.1-8b": _size(_LLAMA31, 4096, 32, 32, 14336),
    "llama3.1-70b": _size(_LLAMA31, 8192, 80, 64, 28672),
    "llama3.1-405b": _size(_LLAMA31, 16384, 126, 128, 53248),
    "mistral-7b": _size(_MISTRAL, 4096, 32, 32, 14336),
    "qwen2-0.5b": _size(_QWEN2, 896, 24, 14, 4864, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-1.5b": _size(_QWEN2, 1536, 28, 12, 8960, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-7b": _size(dict(_QWEN2, vocab_size=152064), 3584, 28, 28, 18944, num_key_value_heads=4),
    "qwen2-72b": _size(dict(_QWEN2, vocab_size=152064), 8192, 80, 64, 29568, num_key_value_heads=8),
    "qwen3-0.6b": _size(_QWEN3, 1024, 28, 16, 3072, num_key_value_heads=8, tie_word_embeddings=True),
    "qwen3-1.7b": _size(_QWEN3, 2048, 28, 16, 6144, num_key_value_heads=8, tie_word_embeddings=True),
    "qwen3-4b": _size(_QWEN3, 2560, 36, 32, 9728, num_key_value_heads=8, tie_word_embeddings=True),
    "qwen3-8b": _size(_QWEN3, 4096, 36, 32, 12288, num_key_value_heads=8),
    "qwen3-14b": _size(_QWEN3, 5120, 40, 40, 17408, num_key_value_heads=8),
    "qwen3-32b": _size(_QWEN3, 5120, 64, 64, 25600, num_key_value_heads=8),
}


def preset_config(name: str, **overrides) -> ModelConfig:
    """The knobs of a preset, e.g. preset_config("llama-2m", vocab_size=1024)."""
    if name is None:
        raise UserError("model.preset: a value is needed, or a trained model's name in model.name")
    if name not in PRESETS:
        raise UserError(f"model.preset: '{name}' is unknown; nearest is '{nearest(name, PRESETS)}' "
                        "(python MODEL.py --list shows all)")
    knobs = dict(PRESETS[name])
    if "hidden_size" in overrides or "num_attention_heads" in overrides:
        # A preset's derived knobs follow its heads; one who changes the heads means them to be derived again.
        knobs.pop("head_dim", None)
        if "num_attention_heads" in overrides:
            knobs.pop("num_key_value_heads", None)
    return ModelConfig(**{**knobs, **overrides})


# --------------------------------------------------------------------------------------------------- positions


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Rotary frequencies (D/2,) in radians per token, and the factor on cos and sin (1 but for YaRN).

    Default: Su 2021, section 3.4.2. llama3: frequencies whose wavelength exceeds the original context are divided by
    `factor`, those far below it are kept, those between are blended (Llama 3.1 reference code).
    """
    dim, scaling = config.head_dim, config.rope_scaling or {}
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)  # (D/2,)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1 turns fast and is kept, 0 turns slowly and is stretched
        return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0
    if kind == "yarn":
        return _yarn_frequencies(config, frequencies)
    return frequencies, 1.0


def _yarn_frequencies(config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng 2023, sections 3.2 and 3.4): stretch dimensions that turn less than `beta_slow` times over the
    original context, keep those that turn more than `beta_fast` times, ramp between, and sharpen attention."""
    scaling, dim = config.rope_scaling, config.head_dim
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension_of(turns: float) -> float:  # the (fractional) pair that turns this often over the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32.0), dimension_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    stretched = frequencies * (1 - ramp) + frequencies / factor * ramp

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return stretched, attention_factor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of states (B, H, T, D) by its token's angle; cos and sin are (B or 1, 1, T, D/2).

    Hugging Face's layout: the two numbers of a pair stand half a head apart, not side by side as in Meta's files.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(first * cos, second, -sin), torch.addcmul(second * cos, first, sin)), dim=-1)


# ---------------------------------------------------------------------------------------------------- KV cache


class KVCache:
    """Keys and values of past tokens, by sequence row and position; allocated once, bounds checked.

    A layer hands in new states and gets back all states of its rows with the position of every slot (-1: empty).
    No layer indexes storage, so a paged cache can take this one's place. Slot p holds position p; one spare slot at
    the end swallows padding.
    """

    def __init__(self, config: ModelConfig, rows: int, length: int, dtype=None, device=None):
        shape = (rows, config.num_key_value_heads, length + 1, config.head_dim)
        dtype = dtype or torch.get_default_dtype()
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.positions = torch.full((rows, length + 1), -1, device=device)
        self.length = length

    def select(self, rows: Tensor | list[int]) -> CacheRows:
        """A view for one forward pass whose batch row b continues sequence rows[b]."""
        return CacheRows(self, [int(row) for row in rows])

    def copy(self, source: int, target: int) -> None:
        """Give `target` the past of `source` (shared prompts, moving a row)."""
        for states in (*self.keys, *self.values, self.positions):
            states[target] = states[source]

    def clear(self, row: int) -> None:
        self.positions[row] = -1

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class CacheRows:
    """The rows of a KVCache that take part in one forward pass."""

    def __init__(self, cache: KVCache, rows: list[int]):
        self.cache = cache
        first, count = rows[0], len(rows)
        run = rows == list(range(first, first + count))
        # A run of neighbouring rows is read in place; any other choice of rows has to be gathered (copied).
        self.rows = slice(first, first + count) if run else torch.tensor(rows, device=cache.positions.device)
        self.row_ids = torch.tensor(rows, device=cache.positions.device)[:, None]  # (B, 1)
        self._positions = None

    def append(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store keys, values (B, H_kv, T, D) at positions (B, T); return all of (B, H_kv, S, D) and key positions."""
        cache = self.cache
        if positions is not self._positions:  # once per forward: all layers share one layout
            self._place(positions)
        stored = []
        for states, new in ((cache.keys[layer], keys), (cache.values[layer], values)):
            if self.span and isinstance(self.rows, slice):
                states[self.rows, :, self.span] = new
            else:
                states[self.row_ids, :, self.slots] = new.transpose(1, 2).to(states.dtype)  # (B, T, H_kv, D)
            stored.append(states[self.rows, :, : self.used])
        return *stored, self.key_positions

    def _place(self, positions: Tensor) -> None:
        cache, last = self.cache, int(positions.max())
        if last >= cache.length:
            raise IndexError(f"position {last} does not fit a cache of {cache.length} tokens")
        self.slots = torch.where(positions < 0, cache.length, positions)  # padding goes to the spare slot
        low = int(self.slots.min())
        width = positions.shape[1]
        # All rows at the same consecutive places (the usual case): one slice copy instead of a scatter.
        aligned = last - low + 1 == width and bool((self.slots == torch.arange(low, last + 1, device=positions.device)).all())
        self.span = slice(low, last + 1) if aligned else None
        cache.positions[self.row_ids, self.slots] = positions
        self.used = max(int(cache.positions[self.rows].max()) + 1, 1)
        self.key_positions = cache.positions[self.rows, : self.used]  # (B, S)
        self._positions = positions


# --------------------------------------------------------------------------------------------------- attention


class Mask(NamedTuple):
    """What a query may see: an additive bias (B, 1, T, S), and the queries (B, 1, T, 1) that see nothing at all."""

    bias: Tensor
    empty: Tensor | None


class MaskBuilder:
    """Makes masks from query and key positions alone, once per window and key layout of a forward pass.

    A query at p sees keys of its own segment at positions 0 <= k <= p, and k > p - window where a window is set.
    A padding query (-1) sees nothing; a softmax over nothing is NaN, so its row is opened here and its output
    is set to zero after the kernel.
    """

    def __init__(self, positions: Tensor, segment_ids: Tensor | None, dtype: torch.dtype):
        self.positions, self.segment_ids, self.dtype = positions, segment_ids, dtype
        self.made: dict = {}

    def __call__(self, key_positions: Tensor, window: int | None) -> Mask:
        key = (id(key_positions), window)
        if key not in self.made:
            self.made[key] = (self._make(key_positions, window), key_positions)  # keep it alive, so its id is
        return self.made[key][0]

    def _make(self, key_positions: Tensor, window: int | None) -> Mask:
        queries, keys = self.positions[:, :, None], key_positions[:, None, :]  # (B, T, 1), (B, 1, S)
        allowed = (keys >= 0) & (keys <= queries)  # (B, T, S)
        if window is not None:
            allowed &= keys > queries - window
        if self.segment_ids is not None:
            allowed &= self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        empty = queries < 0  # (B, T, 1)
        allowed |= empty
        bias = torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)
        return Mask(bias[:, None], empty[:, None])


def attend_eager(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """Attention written out: softmax(q k^T / sqrt(D) + mask) v. query (B, H, T, D), key and value (B, H_kv, S, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, S, D)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, T, S)
    if mask is not None:
        scores = scores.add_(mask.bias)
    elif query.shape[2] > 1:
        scores = scores.add_(_causal_bias(query.shape[2], scores.dtype, scores.device))
    probabilities = scores.softmax(-1, dtype=value.dtype)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return _blank(probabilities @ value, mask)


def _causal_bias(length: int, dtype: torch.dtype, device) -> Tensor:
    return torch.full((length, length), -math.inf, dtype=dtype, device=device).triu_(1)


def _blank(output: Tensor, mask: Mask | None) -> Tensor:
    return output if mask is None or mask.empty is None else output.masked_fill(mask.empty, 0.0)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """The same through torch's fused kernels (flash attention on CUDA), which never hold all scores at once."""
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask.bias, dropout, causal,
                                            enable_gqa=grouped)
    return _blank(output, mask)


def attend_auto(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """On a CPU the written-out form trains faster in 16 bits than the fused kernel while its scores fit the cache."""
    short = query.device.type == "cpu" and query.requires_grad and key.shape[2] <= 512 and query.dtype != torch.float32
    return (attend_eager if short else attend_sdpa)(query, key, value, mask, window, dropout)


class FlashMask(NamedTuple):
    """Ragged rows for flash-attn: real tokens only, joined end to end; `starts` (N+1,) are the cumulative lengths."""

    tokens: Tensor  # (n,) places of the real tokens in the flattened B*T
    starts: Tensor
    longest: int


def flash_mask(positions: Tensor, segment_ids: Tensor | None) -> FlashMask:
    """Cut a padded, packed batch into the sequences that may see each other."""
    rows = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
    tokens = (positions >= 0).flatten().nonzero()[:, 0]
    owners = rows.flatten()[tokens]
    segments = owners.new_zeros(len(tokens)) if segment_ids is None else segment_ids.flatten()[tokens]
    new = (owners[1:] != owners[:-1]) | (segments[1:] != segments[:-1])
    edges = [owners.new_zeros(1), new.nonzero()[:, 0] + 1, owners.new_tensor([len(tokens)])]
    starts = torch.cat(edges).int()
    return FlashMask(tokens, starts, int(starts.diff().max()) if len(tokens) else 0)


def attend_flash(query: Tensor, key: Tensor, value: Tensor, mask: FlashMask | Mask | None, window=None, dropout=0.0):
    """flash-attn (Dao 2023). With a cache its masks are position-based, which torch's kernel serves."""
    if isinstance(mask, Mask) or query.dtype == torch.float32:
        return attend_sdpa(query, key, value, mask, window, dropout)
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if mask is not None and mask.longest == 0:
        return torch.zeros_like(query)
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))  # (B, T, H, D)
    reach = (-1, -1) if window is None else (window - 1, 0)
    if mask is None:
        return flash_attn_func(q, k, v, dropout_p=dropout, causal=True, window_size=reach).transpose(1, 2)
    q, k, v = (states.flatten(0, 1)[mask.tokens] for states in (q, k, v))  # (n, H, D)
    joined = flash_attn_varlen_func(q, k, v, mask.starts, mask.starts, mask.longest, mask.longest, dropout_p=dropout,
                                    causal=True, window_size=reach)
    batch, heads, length, width = query.shape
    output = query.new_zeros(batch * length, heads, width).index_copy(0, mask.tokens, joined.to(query.dtype))
    return output.view(batch, length, heads, width).transpose(1, 2)  # (B, H, T, D)


ATTENTION = {"auto": attend_auto, "eager": attend_eager, "sdpa": attend_sdpa, "flash_attention_2": attend_flash}


def choose_attention(name: str) -> Callable:
    """The kernel behind model.attn_implementation; auto takes flash-attn where it is installed and can run."""
    if name not in ATTENTION:
        raise UserError(f"model.attn_implementation: '{name}' is not one of {', '.join(ATTENTION)}")
    if name in ("auto", "flash_attention_2") and torch.cuda.is_available() and _installed("flash_attn"):
        return attend_flash
    if name == "flash_attention_2":
        raise UserError("model.attn_implementation: flash_attention_2 needs a CUDA device and `pip install flash-attn`; "
                        "sdpa uses torch's own fused kernels")
    return ATTENTION[name]


@memoize
def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


# ------------------------------------------------------------------------------------------------------ layers


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that matrix products will use: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang 2019, eq. 4), computed in float32 and handed on in the type of the next product."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = compute_dtype(hidden)
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:], None, self.eps)
        return (normed * self.weight).to(dtype)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight + bias (Ba 2016), handed on in the type of the next product."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype)).to(compute_dtype(hidden))


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Attention(nn.Module):
    """Multi-head, grouped-query and multi-query attention in one (Ainslie 2023): H query heads share H_kv keys."""

    def __init__(self, config: ModelConfig, layer: int, attend: Callable):
        super().__init__()
        self.layer, self.attend, self.head_dim = layer, attend, config.head_dim
        self.window = config.window(layer)
        self.dropout = config.attention_dropout
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, config.attention_bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, config.attention_bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)

    def forward(self, hidden: Tensor, rope, mask, positions: Tensor | None, cache: CacheRows | None) -> Tensor:
        batch, length, _ = hidden.shape
        query, key, value = (states.view(batch, length, -1, self.head_dim) for states in self.project(hidden))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, D)
        if rope is not None:
            query, key = rotate(query, *rope), rotate(key, *rope)
        if cache is not None:
            key, value, key_positions = cache.append(self.layer, key, value, positions=positions)  # (B, H_kv, S, D)
            mask = mask(key_positions, self.window)
        dropout = self.dropout if self.training else 0.0
        output = self.attend(query, key, value, mask, self.window, dropout)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))  # (B, T, C)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, Shazeer 2020), or GPT-2's down(act(up(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if config.mlp_gated:
            self.gate_proj = nn.Linear(width, inner, config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.expand = self._gated if config.mlp_gated else self._plain

    def _gated(self, hidden: Tensor) -> Tensor:
        return self.activation(self.gate_proj(hidden)) * self.up_proj(hidden)

    def _plain(self, hidden: Tensor) -> Tensor:
        return self.activation(self.up_proj(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.expand(hidden))


class DecoderLayer(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, attend: Callable):
        super().__init__()
        norm = NORMS[config.norm_type]
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, attend)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop) if config.resid_pdrop else nn.Identity()

    def forward(self, hidden: Tensor, rope, mask, positions=None, cache=None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), rope, mask, positions, cache)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))


class Decoder(nn.Module):
    """Embeddings, layers, final norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig, attend: Callable):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            # A plain attribute: as a buffer it would be rounded when the model is converted to 16 bits.
            self.rope_frequencies, self.rope_factor = rope_frequencies(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, attend) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm_type](config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.embd_pdrop) if config.embd_pdrop else nn.Identity()

    def rope_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D/2). Angles are float32 whatever the model's type: bf16 cannot count past 256."""
        self.rope_frequencies = self.rope_frequencies.to(positions.device)
        angles = positions.clamp(min=0)[..., None].float() * self.rope_frequencies  # (B, T, D/2)
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        return cos[:, None].to(dtype), sin[:, None].to(dtype)

    def masks(self, positions: Tensor, segment_ids, cache, plain: bool, dtype) -> list:
        """One mask a layer; None is plain causal, which every kernel knows by itself."""
        config = self.config
        builder = MaskBuilder(positions, segment_ids, dtype)
        if cache is not None:
            return [builder] * config.num_hidden_layers
        windows = [config.window(i) for i in range(config.num_hidden_layers)]
        if self.layers[0].self_attn.attend is attend_flash and dtype != torch.float32:
            return [None if plain else flash_mask(positions, segment_ids)] * len(windows)
        length = positions.shape[1]
        return [None if plain and (w is None or w >= length) else builder(positions, w) for w in windows]

    def forward(self, input_ids: Tensor, positions=None, cache=None, segment_ids=None, keep: bool = False):
        plain = positions is None and segment_ids is None and cache is None
        if positions is None:
            positions = default_positions(input_ids, segment_ids)
        hidden = self.embed_tokens(input_ids)  # (B, T, C)
        dtype = compute_dtype(hidden)
        rope = None
        if self.config.position_embedding_type == "learned":
            hidden = hidden + self.embed_positions(positions.clamp(min=0))
        else:
            rope = self.rope_tables(positions, dtype)
        hidden = self.dropout(hidden)
        masks = self.masks(positions, segment_ids, cache, plain, dtype)
        states = []
        for layer, mask in zip(self.layers, masks, strict=True):
            if keep:
                states.append(hidden)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None:
                hidden = checkpoint(layer, hidden, rope, mask, use_reentrant=False)
            else:
                hidden = layer(hidden, rope, mask, positions, cache)
        return self.norm(hidden), states


def default_positions(input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
    """0..T-1, or counted from each segment's start: segments [5 5 5 7 7] -> [0 1 2 0 1]. (1 or B, T)"""
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if segment_ids is None:
        return steps
    new = torch.ones_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return steps - torch.where(new, steps, 0).cummax(1).values


# ------------------------------------------------------------------------------------------------- forward pass


class Output(NamedTuple):
    """What a forward pass computed; only what was asked for is set. Shapes in `Transformer.forward`."""

    logits: Tensor | None = None
    logprobs: Tensor | None = None
    reduced: dict | None = None
    entropy: Tensor | None = None
    hidden_states: tuple | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    aux_loss: Tensor | None = None


HEADS = ("lm", "score", "value")
# Float32 logits computed at once, in bytes: at least what a cache may hold, at most what any machine has, and between
# them as much as the head's own weights, whose gradient is added up once for each chunk.
HEAD_CHUNK_BYTES = 24 * 2**20, 128 * 2**20
HEAD_KEEP_BYTES = 2**29  # logits of a whole batch up to this size are kept for backward, above it computed again


class Transformer(nn.Module):
    """A decoder with its heads. `config.json`'s names throughout: model.layers.0.self_attn.q_proj and so on."""

    def __init__(self, config: ModelConfig, head: str | tuple = "lm", attn_implementation: str = "auto"):
        super().__init__()
        self.config = config
        self.heads = (head,) if isinstance(head, str) else tuple(head)
        if not set(self.heads) <= set(HEADS):
            raise UserError(f"head: {head!r} is not one of {', '.join(HEADS)}")
        self.model = Decoder(config, choose_attention(attn_implementation))
        if "lm" in self.heads:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if "score" in self.heads:
            self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        if "value" in self.heads:
            self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings and "lm" in self.heads:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache in the type that attention computes in."""
        return KVCache(self.config, rows, length, compute_dtype(self.model.embed_tokens.weight), self.device)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states (N, C) -> logits (N, V), in the model's type of computation."""
        return self.lm_head(hidden)

    def after_step(self) -> None:
        """Called by the trainer after each optimizer step; routers keep their balance here."""

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: CacheRows | None = None,
                segment_ids: Tensor | None = None, token_types: Tensor | None = None, targets: Tensor | None = None,
                temperature: float = 1.0, reduce: Callable | None = None, want: tuple = ()) -> Output:
        """ids (B, T) -> Output, whose fields are there on request.

        logits        (B, T, V)           without targets and reduce
        logprobs      (B, T) float32      log-probability of targets[b, t] given everything up to t, at `temperature`;
                                          exactly 0, without gradient, where the target is -100 or the position -1
        reduced       {name: (B, T)}      reduce(logits (N, V), rows (N,)) -> {name: (N,)} over the trained places;
                                          rows index the flattened B*T
        entropy       (B, T) float32      with want=("entropy",), of the same distribution
        hidden_states tuple of (B, T, C)  want=("hidden_states",): embeddings, each layer, the last one after the norm
        values, scores (B, T), (B, T, L)  want=("values", "scores"): heads at every position

        positions (B, T): where each token stands, -1 is padding; None is 0..T-1, restarting at each segment.
        segment_ids (B, T): tokens see only their own segment. cache: see `KVCache.select`.
        The caller shifts targets; they are never shifted here. No (B, T, V) tensor exists with targets or reduce.
        """
        if token_types is not None:
            raise ValueError("this model has no token types")
        if "entropy" in want and targets is None:
            raise ValueError("entropy is computed at the places that targets name")
        if cache is not None and (positions is None or segment_ids is not None):
            raise ValueError("with a cache, positions are required and segment_ids are not possible")
        hidden, states = self.model(input_ids, positions, cache, segment_ids, keep="hidden_states" in want)
        out = {"aux_loss": hidden.new_zeros((), dtype=torch.float32)}
        if "hidden_states" in want:
            out["hidden_states"] = (*states, hidden)
        if "values" in want:
            out["values"] = self.value_head(hidden).squeeze(-1).float()  # (B, T)
        if "scores" in want:
            out["scores"] = self.score(hidden).float()  # (B, T, num_labels)
        if targets is not None or reduce is not None:
            out.update(self._from_logits(hidden, positions, targets, temperature, reduce, "entropy" in want))
        elif "lm" in self.heads:
            out["logits"] = self.head_logits(hidden)  # (B, T, V)
        return Output(**out)

    def _from_logits(self, hidden, positions, targets, temperature, reduce, entropy: bool) -> dict:
        """Everything that needs logits, a chunk of rows at a time; backward computes each chunk's logits again.

        Logits of a whole batch in float32 are often the largest tensor of a training step (8 x 2048 x 128256 x 4 bytes
        is 8 GB). Per chunk they stay in the processor's cache, and only (N,) results survive.
        """
        shape = hidden.shape[:2]
        trained = torch.ones(shape, dtype=torch.bool, device=hidden.device)
        if targets is not None:
            trained = targets != -100
        if positions is not None:
            trained = trained & (positions >= 0)
        rows = trained.flatten().nonzero()[:, 0]  # (N,)
        hidden = hidden.flatten(0, 1)  # (B*T, C)
        everywhere = len(rows) == len(hidden)
        chosen = hidden if everywhere else hidden[rows]
        picked = None if targets is None else targets.flatten() if everywhere else targets.flatten()[rows]
        low, high = (limit // (4 * self.config.vocab_size) for limit in HEAD_CHUNK_BYTES)
        size = max(1, low, min(high, hidden.shape[-1]))  # rows at once
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, max(len(rows), 1), size):  # an empty batch still runs once, so that every weight takes part
            piece = slice(start, start + size)
            args = (chosen[piece], None if picked is None else picked[piece], rows[piece], temperature, reduce, entropy)
            again = torch.is_grad_enabled() and 4 * len(rows) * self.config.vocab_size > HEAD_KEEP_BYTES
            results = checkpoint(self._chunk, *args, use_reentrant=False) if again else self._chunk(*args)
            for name, values in results.items():
                parts.setdefault(name, []).append(values)
        spread = {}
        for name, values in parts.items():
            joined = torch.cat(values)  # (N,)
            if not everywhere:
                joined = joined.new_zeros(trained.numel()).index_copy(0, rows, joined)
            spread[name] = joined.view(shape)
        out = {name: spread.pop(name) for name in ("logprobs", "entropy") if name in spread}
        if reduce is not None:
            out["reduced"] = spread
        return out

    def _chunk(self, hidden, targets, rows, temperature, reduce, entropy: bool) -> dict[str, Tensor]:
        logits = self.head_logits(hidden)  # (N, V)
        results = dict(reduce(logits, rows)) if reduce is not None else {}
        if targets is not None:
            results.update(log_softmax_at(logits, targets, temperature, entropy))
        return results


def log_softmax_at(logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False) -> dict:
    """logits (N, V), targets (N,) -> {"logprobs": (N,)} and the distribution's entropy in nats, in float32."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    # cross_entropy is one fused pass each way; gather(logits) - logsumexp(logits) is the same in five.
    results = {"logprobs": -F.cross_entropy(logits, targets, reduction="none")}
    if entropy:
        logprobs = logits.log_softmax(-1)
        results["entropy"] = -(logprobs.exp() * logprobs).sum(-1)
    return results


def token_logprobs(model, input_ids: Tensor, segment_ids: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token given those before it: ids (B, T) -> (B, T-1)."""
    targets = input_ids[:, 1:]
    segments = None if segment_ids is None else segment_ids[:, :-1]
    if segments is not None:
        targets = targets.masked_fill(segment_ids[:, 1:] != segments, -100)  # a segment's first token has no past
    return model(input_ids[:, :-1], segment_ids=segments, targets=targets, temperature=temperature).logprobs


# ---------------------------------------------------------------------------------------- building and folders


def init_weights(model: Transformer, seed: int = 0, only: tuple = ("",)) -> None:
    """Every initial weight of the project, drawn on the CPU from `seed`, the same on every device.

    Matrices and embeddings are normal(0, initializer_range). The two products that write into the residual stream
    (o_proj, down_proj) are smaller by sqrt(2 * layers), so that the stream's variance does not grow with depth
    (GPT-2, Radford 2019, section 2.3). Norms start at one, biases at zero, a value head at zero (it predicts
    nothing before it has learnt). `only` restricts to parameters whose names start so.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, weight in model.named_parameters():
        if not name.startswith(only) or weight.is_meta:
            continue
        with torch.no_grad():
            if name.endswith("bias") or name.startswith("value_head"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1.0)
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers if residual else 1)
                weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


def build(config: ModelConfig | str | dict, head: str | tuple = "lm", seed: int = 0, attn_implementation: str = "auto",
          device=None) -> Transformer:
    """A fresh model with random weights: from a ModelConfig, a preset's name, or a dict of knobs (with or without
    "preset"). device="meta" allocates nothing."""
    if isinstance(config, str):
        config = preset_config(config)
    elif isinstance(config, dict):
        knobs = dict(config)
        preset = knobs.pop("preset", None)
        config = preset_config(preset, **knobs) if preset else ModelConfig(**knobs)
    with torch.device(device or "cpu"):
        model = Transformer(config, head, attn_implementation)
    init_weights(model, seed)
    return model


class Family(NamedTuple):
    """How Hugging Face spells an architecture: class prefix, what its name implies, and its defaults for absent keys."""

    prefix: str
    implied: dict
    defaults: dict
    names: dict = {}  # our knob -> its key in config.json, where they differ


_DEFAULTS = dict(rms_norm_eps=1e-6, hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=False,
                 attention_bias=False, mlp_bias=False, initializer_range=0.02, max_position_embeddings=32768)
_GPT2_NAMES = dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
                   max_position_embeddings="n_positions", intermediate_size="n_inner", attention_dropout="attn_pdrop",
                   hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon")
FAMILIES = {
    "llama": Family("Llama", {}, dict(_DEFAULTS, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "mistral": Family("Mistral", {"attention_bias": False, "mlp_bias": False},
                      dict(_DEFAULTS, num_key_value_heads=8, sliding_window=4096, bos_token_id=1, eos_token_id=2,
                           max_position_embeddings=131072)),
    "qwen2": Family("Qwen2", {"attention_bias": True, "mlp_bias": False}, dict(_DEFAULTS, num_key_value_heads=32)),
    "qwen3": Family("Qwen3", {"qk_norm": True, "mlp_bias": False}, dict(_DEFAULTS, num_key_value_heads=32, head_dim=128)),
    "gpt2": Family("GPT2", {k: _GPT2[k] for k in ("norm_type", "mlp_gated", "attention_bias", "attention_out_bias",
                                                   "mlp_bias", "position_embedding_type")},
                   dict(hidden_act="gelu_new", rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.02,
                        attention_dropout=0.1, resid_pdrop=0.1, embd_pdrop=0.1, vocab_size=50257, bos_token_id=50256,
                        eos_token_id=50256, max_position_embeddings=1024), _GPT2_NAMES),
}
KNOBS = {f.name: f for f in dataclasses.fields(ModelConfig)}
# Knobs that Hugging Face's config.json has no key for: a family implies them or cannot have them.
_LLAMA_LACKS = ("mlp_gated", "norm_type", "qk_norm", "position_embedding_type", "attention_out_bias", "resid_pdrop",
                "embd_pdrop", "rope_scaling", "model_type")
_GPT2_LACKS = ("qk_norm", "rope_theta", "rope_scaling", "sliding_window", "layer_types", "num_key_value_heads",
               "head_dim", "model_type")
HEAD_CLASSES = {"ForCausalLM": ("lm",), "LMHeadModel": ("lm",), "ForSequenceClassification": ("score",)}
CUSTOM = "custom"  # model_type of a mixture of knobs that no Hugging Face class computes


def config_from_hub(raw: dict) -> ModelConfig:
    """A Hugging Face config.json -> ModelConfig. RoPE is read in v4's spelling (rope_theta, rope_scaling) and in v5's
    (rope_parameters); keys that this network has no use for are ignored."""
    kind = raw.get("model_type")
    if kind == CUSTOM:
        return ModelConfig(**{k: v for k, v in raw.items() if k in KNOBS})
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type '{kind}' is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    knobs = dict(family.defaults)
    for name in _hub_knobs(kind):
        key = family.names.get(name, name)
        if key in raw:
            knobs[name] = raw[key]
    knobs.update(family.implied, model_type=kind)
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    knobs["rope_theta"] = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    knobs["rope_scaling"] = rope if rope.get("rope_type", rope.get("type")) else None
    if "num_labels" not in raw and raw.get("id2label"):
        knobs["num_labels"] = len(raw["id2label"])
    _family_quirks(kind, raw, knobs)
    return ModelConfig(**knobs)


def _hub_knobs(kind: str) -> list[str]:
    lacks = _GPT2_LACKS if kind == "gpt2" else _LLAMA_LACKS
    return [name for name in KNOBS if name not in lacks and name not in FAMILIES[kind].implied]


def _family_quirks(kind: str, raw: dict, knobs: dict) -> None:
    """What single families spell in a way of their own."""
    if kind == "gpt2":
        knobs["intermediate_size"] = knobs.get("intermediate_size") or 4 * knobs["hidden_size"]
        for key, usual in (("scale_attn_by_inverse_layer_idx", False), ("reorder_and_upcast_attn", False), ("scale_attn_weights", True)):
            if raw.get(key, usual) != usual:
                raise UserError(f"config.json: {key} {json.dumps(raw[key])} is not supported")
    if kind == "llama":
        knobs["sliding_window"] = knobs["layer_types"] = None
    if kind in ("llama", "qwen3"):
        knobs["attention_out_bias"] = knobs["attention_bias"]
    if kind == "mistral":
        knobs["layer_types"] = None
    if kind in ("qwen2", "qwen3"):
        if not raw.get("use_sliding_window"):
            knobs["sliding_window"] = knobs["layer_types"] = None
        elif not knobs.get("layer_types"):
            full = raw.get("max_window_layers", 28)
            knobs["layer_types"] = ["full_attention" if i < full else "sliding_attention"
                                    for i in range(knobs["num_hidden_layers"])]


def config_to_hub(config: ModelConfig, heads: tuple = ("lm",)) -> dict:
    """ModelConfig -> config.json, under the first family that computes exactly these knobs."""
    own = dataclasses.asdict(config)
    for kind in sorted(FAMILIES, key=lambda k: k != config.model_type):
        family = FAMILIES[kind]
        raw = {family.names.get(name, name): own[name] for name in _hub_knobs(kind)}
        raw["model_type"] = kind
        if kind not in ("qwen2", "qwen3"):
            raw.pop("layer_types", None)
        if kind != "gpt2":
            rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
            raw.update(rope_parameters=rope, rope_scaling=config.rope_scaling)  # v5 reads the one, v4 the other
        if kind in ("qwen2", "qwen3"):
            raw["use_sliding_window"] = config.sliding_window is not None
            raw["max_window_layers"] = (config.layer_types or []).count("full_attention")
        try:
            same = dataclasses.replace(config_from_hub(raw), model_type=config.model_type) == config
        except UserError:
            same = False
        if same:
            head = "ForSequenceClassification" if heads == ("score",) else "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
            return {"architectures": [family.prefix + head], **raw}
    return {"architectures": ["Custom"], **own, "model_type": CUSTOM}


# GPT-2's names for the parts of a Transformer. Its Conv1D keeps weights transposed, and c_attn is q, k and v in one.
GPT2_PARTS = [("model.embed_tokens.", "transformer.wte."), ("model.embed_positions.", "transformer.wpe."),
              ("model.layers.", "transformer.h."), ("model.norm.", "transformer.ln_f."),
              (".input_layernorm.", ".ln_1."), (".post_attention_layernorm.", ".ln_2."), (".mlp.up_proj.", ".mlp.c_fc."),
              (".mlp.down_proj.", ".mlp.c_proj."), (".self_attn.o_proj.", ".attn.c_proj.")]
GPT2_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")
KNOWN_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def weights_to_hub(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> the names and layouts of Hugging Face's class."""
    if kind != "gpt2":
        return dict(state)
    hub = {}
    for name, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        if "self_attn.q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.c_attn")
        for ours, theirs in GPT2_PARTS:
            name = name.replace(ours, theirs)
        hub[name] = tensor.t() if re.search(r"\.c_\w+\.weight$", name) else tensor
    return {name: tensor.contiguous() for name, tensor in hub.items()}


def weights_from_hub(config: ModelConfig, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor of a hub file -> ours; an empty list for a buffer that is known and not needed."""
    if KNOWN_BUFFERS.search(name):
        return []
    if config.model_type != "gpt2":
        bare = name.split(".")[0] in ("embed_tokens", "layers", "norm")  # saved from the base class, without a head
        return [("model." + name if bare else name, tensor)]
    if GPT2_BUFFERS.search(name):
        return []
    if name.split(".")[0] in ("wte", "wpe", "h", "ln_f"):
        name = "transformer." + name
    if re.search(r"\.c_\w+\.weight$", name):
        tensor = tensor.t()
    for ours, theirs in GPT2_PARTS:
        name = name.replace(theirs, ours)
    if ".attn.c_attn." in name:
        names = [name.replace("attn.c_attn", f"self_attn.{part}_proj") for part in "qkv"]
        return list(zip(names, tensor.chunk(3), strict=True))
    return [(name, tensor)]


@contextmanager
def staged(folder: str | Path):
    """A scratch folder inside `folder`; on success its files replace those of the same name, one atomic rename each."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{folder}: this folder cannot be made ({error.strerror})") from None
    scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            path.chmod(0o666 & ~_umask())
            sync(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@memoize
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until a file's (or folder's) bytes are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """A small file, whole or not at all."""
    with staged(Path(path).parent) as scratch:
        (scratch / Path(path).name).write_text(text, encoding="utf-8")


def process_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded over processes (all of them have to call)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save(model: Transformer, folder: str | Path) -> None:
    """Write config.json, generation_config.json and safetensors (sharded above 5 GB) as transformers would.

    Sharded weights (FSDP2) are gathered, so every process has to call; the first one writes."""
    from huggingface_hub import save_torch_state_dict

    state = {name: gathered(tensor) for name, tensor in model.state_dict().items()}
    if process_rank() != 0:
        return
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    raw = config_to_hub(model.config, model.heads)
    kind = raw["model_type"]
    if kind == CUSTOM:
        say(f"{folder}: no Hugging Face class has this mixture of knobs; only this program can open it")
    raw["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    generation = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(k) is not None}
    with staged(folder) as scratch:
        save_torch_state_dict(weights_to_hub(kind, state), scratch, max_shard_size="5GB")
        (scratch / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        new = {path.name for path in scratch.iterdir()}
        stale = [path for path in Path(folder).glob("model*.safetensors*") if path.name not in new]
    for path in stale:  # shards of an earlier, larger model
        path.unlink()


def resolve_folder(name: str) -> Path:
    """A local folder, or a hub name fetched into the local cache."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"model.name: '{name}' is a file; a model is a folder with config.json and weights")
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise UserError(f"model.name: there is no folder '{name}'")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError

        patterns = ["*.json", "*.safetensors", "*.bin", "*.jinja", "*.txt", "*.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"model.name: '{name}' is neither a folder nor a name that a hub could have") from None
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise UserError(f"model.name: '{name}' is no local folder and could not be fetched from the hub ({reason}); "
                        "check the network, or build a fresh model with --model.preset llama-1m") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{path}: names and values are expected, not {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_config(folder: Path) -> ModelConfig:
    """config.json, with the end-of-text ids of generation_config.json, where several may stand."""
    try:
        config = config_from_hub(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder}/config.json: a key is missing or of the wrong type ({error})") from None
    if (folder / "generation_config.json").exists():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = read_json(folder / "generation_config.json").get(key)
            if value is not None:
                setattr(config, key, value)
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before pickles, an index before a single file."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{stem}.index.json").exists():
            weight_map = read_json(folder / f"{stem}.index.json").get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / stem}.index.json: weight_map is missing")
            names = sorted(set(weight_map.values()))
            return [folder / name for name in names]
        if (folder / stem).exists():
            return [folder / stem]
    raise UserError(f"{folder}: holds no weights (model.safetensors or pytorch_model.bin); name the folder of a finished run "
                    "or one of its ckpt-step-*")


def read_tensors(path: Path) -> typing.Iterator[tuple[str, Tensor]]:
    """The tensors of one file, mapped from disk: a page is read when it is used. Pickles hold weights only, or fail."""
    import pickle

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)).items()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, it holds more than tensors and could run code when opened") from None
    except (SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read, it may be cut short ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def load_weights(model: Transformer, folder: Path, dtype=None, device=None, seed: int = 0) -> None:
    """Assign a folder's weights to a model (on `meta` or not); every tensor must fit by name and shape."""
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    state, extra = {}, []
    for path in weight_files(folder):
        for hub_name, tensor in read_tensors(path):
            for name, part in weights_from_hub(model.config, hub_name, tensor):
                if name not in expected:
                    tied = name == "lm_head.weight" and model.config.tie_word_embeddings
                    extra += [] if tied or name.startswith(("lm_head.", "score.", "value_head.")) else [hub_name]
                elif part.shape != expected[name]:
                    raise UserError(f"{path}: {hub_name} is {tuple(part.shape)}, config.json makes it {tuple(expected[name])}")
                else:
                    state[name] = part.to(device=device, dtype=dtype).contiguous()
    missing = [name for name in expected if name not in state]
    fresh = tuple(name for name in missing if name.startswith(("lm_head.", "score.", "value_head.")))
    if "lm_head.weight" in fresh and _names_head(folder, "lm"):
        fresh = tuple(name for name in fresh if name != "lm_head.weight")
    missing = [name for name in missing if name not in fresh]
    for label, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(f"{folder}: {label} tensor {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    for name in fresh:
        state[name] = torch.empty(expected[name], dtype=dtype or torch.float32, device=device or "cpu")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    init_weights(model, seed, fresh or ("no parameter",))


def _names_head(folder: Path, head: str) -> bool:
    return head in folder_heads(read_json(folder / "config.json"))


def folder_heads(raw: dict) -> tuple:
    """The heads that config.json's `architectures` names; a causal LM where it names none."""
    for architecture in raw.get("architectures") or ():
        for suffix, heads in HEAD_CLASSES.items():
            if architecture.endswith(suffix):
                return heads
    return ("lm",)


def load(name: str, dtype: str | torch.dtype | None = None, device=None, attn_implementation: str = "auto",
         head: str | tuple | None = None, seed: int = 0) -> Transformer:
    """A trained model from a folder or hub name, in eval mode.

    dtype None is float32, "auto" what computes fastest here (see `auto_dtype`). head None is what config.json names;
    other heads are initialised from `seed`. Built on `meta` and assigned, so memory stays near one copy.
    """
    folder = resolve_folder(str(name))
    config = read_config(folder)
    raw = read_json(folder / "config.json")
    with torch.device("meta"):
        model = Transformer(config, head or folder_heads(raw), attn_implementation)
    if dtype == "auto":
        dtype = auto_dtype(raw.get("dtype") or raw.get("torch_dtype"), count_parameters(model)[0], device)
    elif isinstance(dtype, str):
        dtype = supported_dtype(dtype, device)
    load_weights(model, folder, dtype or torch.float32, device, seed)
    return model.eval()


# ---------------------------------------------------------------------------------------------------- hardware

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """model.device as a device that is there; auto takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        there = {"cpu": True, "cuda": (device.index or 0) < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    except RuntimeError:
        there = {}
    if not there or not there.get(device.type, False):
        raise UserError(f"model.device: '{name}' is not there; use cpu, or auto for the best there is")
    return device


@memoize
def matmul_flops(dtype: torch.dtype, device: str, size: int = 0) -> float:
    """Measured FLOP/s of a square matrix product: the peak that training and decoding are compared with."""
    size = size or (8192 if device.startswith("cuda") else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@memoize
def fast_half(device: str) -> torch.dtype | None:
    """The 16-bit type whose matrix products clearly beat float32 on this device, measured rather than looked up: of
    two processors that both list AVX512-BF16, one computes it seven times faster than float32 and one at half speed."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.startswith("mps"):
        return None
    faster = matmul_flops(torch.bfloat16, "cpu") > 1.3 * matmul_flops(torch.float32, "cpu")
    return torch.bfloat16 if faster else None


def supported_dtype(name: str, device=None) -> torch.dtype:
    """The asked type, or with one line the nearest that the device does well (float16 is slow and narrow on a CPU)."""
    device = str(device or "cpu")
    if name not in DTYPES:
        raise UserError(f"model.dtype: '{name}' is not one of auto, {', '.join(DTYPES)}")
    if name == "float16" and device == "cpu":
        say("model.dtype: float16 on a CPU is slow; computing in float32")
        return torch.float32
    return DTYPES[name]


def auto_dtype(stored: str | None, parameters: int, device=None) -> torch.dtype:
    """Inference computes in the type the weights were stored in. Large float32 models decode at the speed of memory,
    so theirs is halved; small ones keep every bit."""
    device = str(device or "cpu")
    half = fast_half(device) or torch.bfloat16
    if stored in ("float16", "bfloat16"):
        return half if device != "cpu" or stored == "bfloat16" else torch.float32
    return half if parameters > 100_000_000 and device != "mps" else torch.float32


class PackedLinear(nn.Module):
    """A frozen bf16 Linear on a CPU, its weight laid out once in the blocks that oneDNN reads fastest.

    Few rows wait for memory, so half the bytes are twice the speed. Many rows wait for arithmetic: where the processor
    multiplies float32 faster than bf16, they are computed so, which repays unpacking from about 200 rows on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.widen_from = math.inf if fast_half("cpu") else 256

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() // self.in_features >= self.widen_from:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.packed.to_dense().float(), bias).to(hidden.dtype)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")


def configure_for_hardware(model: Transformer, device=None, quiet: bool = False) -> Transformer:
    """Make a loaded model fast for inference on `device`; it can no longer be trained or saved.

    Query, key and value become one product, as do gate and up: fewer, larger reads. On a CPU bf16 weights are packed
    for oneDNN. On CUDA float32 products may use TF32. Says in one line what it chose.
    """
    device = torch.device(device or model.device)
    model = model.to(device).eval().requires_grad_(False)
    chosen = [f"{device.type}", str(model.dtype).removeprefix("torch.")]
    for layer in model.model.layers:
        _fuse(layer.self_attn, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        if hasattr(layer.mlp, "gate_proj"):
            _fuse(layer.mlp, "gate_up_proj", ("gate_proj", "up_proj"))
    chosen.append("fused projections")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        chosen.append("TF32")
    if device.type == "cpu":
        chosen.append(f"{torch.get_num_threads()} threads")
        if model.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _pack(model)
            chosen.append("packed weights")
    if not quiet:
        say("computing with " + ", ".join(chosen))
    return model


def _fuse(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Join linear layers that read the same input into one, and point the module's method at it."""
    linears = [getattr(module, part) for part in parts]
    if not all(type(linear) is nn.Linear for linear in linears):
        return
    sizes = [linear.out_features for linear in linears]
    with torch.device("meta"):
        fused = nn.Linear(linears[0].in_features, sum(sizes), linears[0].bias is not None)
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    setattr(module, name, fused)
    for part in parts:
        delattr(module, part)
    if isinstance(module, Attention):
        module.project = lambda hidden: module.qkv_proj(hidden).split(sizes, -1)
    else:
        def expand(hidden: Tensor) -> Tensor:
            gate, up = module.gate_up_proj(hidden).chunk(2, -1)
            return module.activation(gate) * up

        module.expand = expand


def _pack(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":  # the head may share its weight with the embedding
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], PackedLinear(module.weight.data, module.bias))
    if "lm" in model.heads and type(model.lm_head) is nn.Linear:
        model.lm_head = PackedLinear(model.lm_head.weight.data, None)


# ----------------------------------------------------------------------------------------------------- summary


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, active per token): parameters counted once where they are shared."""
    total = sum(weight.numel() for weight in model.parameters())
    return total, total


def flops_per_token(config: ModelConfig, context: int) -> float:
    """FLOPs of one forward token with `context` tokens before it: two for each weight of a product, and for each key
    two for its score and two for its value. Training costs three times as much (Kaplan 2020, section 2.1)."""
    width, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    attention = width * dim * (2 * heads + 2 * config.num_key_value_heads)
    mlp = width * config.intermediate_size * (3 if config.mlp_gated else 2)
    seen = [min(context, config.window(i) or context) for i in range(config.num_hidden_layers)]
    scores = sum(4 * heads * dim * keys for keys in seen)
    return 2 * (config.num_hidden_layers * (attention + mlp) + width * config.vocab_size) + scores


def summary(config: ModelConfig) -> str:
    """Layers, parameters, FLOPs and memory as text; the model is built on `meta`, without weights."""
    model = build(config, device="meta")
    total, active = count_parameters(model)
    context = config.max_position_embeddings
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    attention = {1: "MQA"}.get(config.num_key_value_heads, "GQA")
    attention = "MHA" if config.num_key_value_heads == config.num_attention_heads else attention
    window = f", window {config.sliding_window}" if config.sliding_window else ""
    rows = [
        ("family", config.model_type),
        ("layers", f"{config.num_hidden_layers} x (attention {config.num_attention_heads} heads of {config.head_dim}, "
                   f"{config.num_key_value_heads} key/value: {attention}{window}; MLP {config.intermediate_size})"),
        ("width", f"{config.hidden_size}, vocabulary {config.vocab_size:,}, context {context:,}"),
        ("parameters", f"{total:,} ({active:,} active per token)"),
        ("forward FLOPs per token", f"{flops_per_token(config, 0) / 1e9:,.3f} G, at full context "
                                    f"{flops_per_token(config, context) / 1e9:,.3f} G"),
        ("KV cache per token", f"{cache:,} bytes in 16 bits; {size_text(cache * context)} for a full context"),
        ("memory to run", f"{size_text(total * 2)} in 16 bits, {size_text(total * 4)} in float32, plus cache"),
        ("memory to train", f"{size_text(total * 16)} (float32 weights, gradients, AdamW's two moments), plus activations"),
    ]
    shapes = {}
    for name, weight in model.named_parameters():
        shapes.setdefault((re.sub(r"\.\d+\.", ".*.", name), tuple(weight.shape)), []).append(weight.numel())
    lines = [f"{label:24} {text}" for label, text in rows] + [""]
    lines += [f"  {name:46} {str(shape):>18} x {len(counts):<4} {sum(counts):>16,}"
              for (name, shape), counts in shapes.items()]
    return "\n".join(lines)


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def preset_table() -> str:
    lines = [f"{'preset':16} {'family':8} {'parameters':>16} {'layers':>6} {'width':>6} {'heads':>6} {'kv':>4} {'context':>8}"]
    for name in PRESETS:
        c = preset_config(name)
        total, _ = count_parameters(build(c, device="meta"))
        lines.append(f"{name:16} {c.model_type:8} {total:16,} {c.num_hidden_layers:6} {c.hidden_size:6} "
                     f"{c.num_attention_heads:6} {c.num_key_value_heads:4} {c.max_position_embeddings:8}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- config.yaml and flags

SECTIONS = ("model", "tokenizer", "data", "training", "lora", "sft", "rl", "distill", "inference", "quantization", "output")
SHORT_FLAGS = {"model": "model.name", "data": "data.train", "out": "output.dir", "epochs": "training.epochs",
               "max_steps": "training.max_steps", "batch_size": "training.batch_size", "seed": "training.seed",
               "grad_accum": "training.grad_accum", "learning_rate": "training.learning_rate",
               "max_length": "training.max_length"}
HORIZON = ("epochs", "max_steps", "max_minutes")

# `model:` holds what to load or build and how to compute it; every architecture knob may be overridden beside it.
ModelSection = dataclasses.make_dataclass("ModelSection", [
    ("name", str | None, knob(None, "trained weights: a folder or a hub name (gpt2); replaces preset")),
    ("preset", str | None, knob("llama-1m", "fresh weights: python MODEL.py --list shows all; replaces name")),
    ("dtype", str, knob("auto", "type of computation; training keeps float32 weights", ("auto", *DTYPES))),
    ("attn_implementation", str, knob("auto", "attention kernel", tuple(ATTENTION))),
    ("device", str, knob("auto", "auto, cpu, cuda, cuda:1 or mps")),
    *[(name, f.type + " | None" if "None" not in f.type else f.type, knob(None, f.metadata["comment"], f.metadata["choices"]))
      for name, f in KNOBS.items()]], namespace={"__module__": __name__})
MODEL_SETTINGS = ("dtype", "attn_implementation", "device")  # how to compute, whatever the model


@dataclass
class OutputSection:
    dir: str = knob("./out", "folder of checkpoints, log, plot and the final model")


class Action(NamedTuple):
    """A flag of one script that is no setting: `convert` makes its value, None marks a plain switch; `bare` is its
    value where none follows."""

    comment: str
    convert: Callable | None = None
    bare: str | None = None


def nearest(word: str, words) -> str:
    """The likeliest meaning of a misspelt name: num_layers -> num_hidden_layers, which has all of its parts."""
    words = list(words)
    parts = set(re.split(r"[._]", word))
    whole = [known for known in words if parts <= set(re.split(r"[._]", known))]
    return (difflib.get_close_matches(word, whole or words, 1, 0) or [""])[0]


def convert(value, kind, where: str, choices: tuple = ()):
    """A YAML value or a command-line string -> the field's type. PyYAML reads 3e-5 as a string; so does a shell."""
    import yaml

    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str) and list in options and value != "null":  # one text is a list of one, taken as it stands
        with suppress(json.JSONDecodeError):
            value = json.loads(value) if value.startswith("[") else value
    elif isinstance(value, str) and str not in options:
        if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        else:
            with suppress(yaml.YAMLError):
                value = yaml.safe_load(value)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and type(None) in options):
        if type(None) in options:
            return None
        raise UserError(f"{where}: a value is needed, null is none")
    if isinstance(value, bool) and "on" in choices:  # YAML reads a bare on or off as true or false
        value = "on" if value else "off"
    if choices and value not in choices:
        raise UserError(f"{where}: '{value}' is not one of {', '.join(map(str, choices))}"
                        f" (nearest: {nearest(str(value), map(str, choices))})")
    for option in options:
        if option is bool and isinstance(value, bool):
            return value
        if option is int and not isinstance(value, bool) and isinstance(value, (int, float)) and int(value) == value:
            return int(value)
        if option is float and not isinstance(value, bool) and isinstance(value, (int, float)):
            return float(value)
        if option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if option is list and isinstance(value, list):
            return value
        if option is list and str not in options and isinstance(value, str):
            return [value]
        if option is dict and isinstance(value, dict):
            return value
    names = " or ".join(option.__name__ for option in options if option is not type(None))
    raise UserError(f"{where}: {value!r} is not of type {names}")


@memoize
def field_types(section: type) -> dict:
    return typing.get_type_hints(section, vars(sys.modules[section.__module__]))


class Layer(NamedTuple):
    """Settings of one origin: {section: {key: raw value}} and how to name that origin in an error."""

    origin: str
    values: dict


def load_config(argv: list[str] | None, sections: dict[str, type], own: str, actions: dict[str, Action] | None = None,
                doc: str = "", shorts: dict[str, str] | None = None) -> SimpleNamespace:
    """The typed settings of one script: an attribute for each section it owns, plus `actions`.

    Order: dataclass defaults < config.yaml < the stage's block there < command line. `own` is the section whose keys
    need no prefix; `shorts` adds to or replaces the short flags.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    actions, shorts = actions or {}, {**SHORT_FLAGS, **(shorts or {})}
    if {"--help", "-h"} & set(argv):
        print(help_text(doc, sections, own, actions, shorts))
        raise SystemExit(0)
    path, flags, chosen = _read_flags(argv, sections, own, actions, shorts)
    raw = _read_yaml(path) if path else {}
    origin = str(path)
    stage_defaults = {f.name: f.default_factory() for f in dataclasses.fields(sections[own])
                      if f.name in SECTIONS and f.default_factory is not dataclasses.MISSING}
    shared = {name: dict(raw.get(name) or {}) for name in sections}
    block = {name: shared[own].pop(name) for name in stage_defaults if name in shared[own]}
    prefixed = {name: flags[own].pop(name) for name in stage_defaults if name in flags[own]}
    for name, value in [*block.items(), *prefixed.items()]:
        if not isinstance(value, (dict, types.NoneType)):
            raise UserError(f"{own}.{name}: {value!r} is given where keys and values are expected, as in {own}.{name}.KEY")
    layers = [Layer("defaults", stage_defaults), Layer(origin, shared), Layer(f"{origin}: {own}", {k: v or {} for k, v in block.items()}),
              Layer("command line", flags), Layer(f"command line: {own}", prefixed)]
    values = {name: {f.name: _default(f) for f in dataclasses.fields(kind)} for name, kind in sections.items()}
    for layer in layers:
        _apply(values, layer, sections)
    config = SimpleNamespace(**{name: sections[name](**values[name]) for name in sections}, actions=SimpleNamespace(**chosen))
    config.file = path
    return config


def _default(f: dataclasses.Field):
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def _read_yaml(path: Path) -> dict:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen: set = set()
            for key, _ in node.value:
                if key.value in seen:  # YAML would quietly keep the last
                    raise yaml.constructor.ConstructorError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: sections such as 'model:' are expected at the top")
    for name, values in raw.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section '{name}'; nearest is '{nearest(str(name), SECTIONS)}'")
        if values is not None and not isinstance(values, dict):
            raise UserError(f"{path}: {name}: keys and values are expected, not {values!r}")
    return raw


def _read_flags(argv, sections, own, actions, shorts):
    """--config FILE, --section.key value, own keys and short flags -> (path, {section: {key: raw}}, actions)."""
    flags = {name: {} for name in sections}
    chosen = {name: None if action.convert else False for name, action in actions.items()}
    path, i = None, 0
    while i < len(argv):
        word, i = argv[i], i + 1
        if not word.startswith("--"):
            raise UserError(f"'{word}' belongs to no flag; flags look like --section.key value (see --help)")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in actions and actions[name].convert is None:
            chosen[name] = True
            continue
        known = name in ("config", *actions)
        section, key, kind = (None, None, str) if known else _find_key(name, sections, own, shorts)
        if not equals:
            alone = i == len(argv) or argv[i].startswith("--")
            if kind is bool and alone:
                value = "true"
            elif alone and name in actions and actions[name].bare is not None:
                value = actions[name].bare
            elif i == len(argv):
                raise UserError(f"--{name}: a value is missing")
            else:
                value, i = argv[i], i + 1
        listed = kind is list or (isinstance(kind, types.UnionType) and list in typing.get_args(kind))
        if listed and not value.startswith("[") and value != "null":  # --data a.txt b.jsonl
            value = [value]
            while i < len(argv) and not argv[i].startswith("--"):
                value.append(argv[i])
                i += 1
        if name == "config":
            path = Path(value)
            if not path.exists():
                raise UserError(f"--config: there is no file '{value}'")
        elif known:
            chosen[name] = actions[name].convert(value)
        else:
            *inner, key = key.split(".")
            target = flags[section]
            for part in inner:
                target = target.setdefault(part, {})
            target[key] = value
    if path is None and (Path(sys.argv[0]).resolve().parent / "config.yaml").exists():
        path = Path(sys.argv[0]).resolve().parent / "config.yaml"
    return path, flags, chosen


def _find_key(name: str, sections: dict[str, type], own: str, shorts: dict[str, str]) -> tuple[str, str, type]:
    """Which section and key a flag means: an own key, a short flag, section.key, or own.section.key."""
    own_types = field_types(sections[own])
    if name in own_types and name not in SECTIONS:
        return own, name, own_types[name]
    name = shorts.get(name, name)
    section, _, key = name.partition(".")
    if section == own and key.partition(".")[0] in own_types and key.partition(".")[0] in sections:
        block, _, inner = key.partition(".")
        if inner in field_types(sections[block]):
            return own, key, field_types(sections[block])[inner]
    if section in sections and key in field_types(sections[section]):
        return section, key, field_types(sections[section])[key]
    if section in SECTIONS and section not in sections:
        raise UserError(f"--{name}: the section '{section}' belongs to another script")
    words = [*own_types, *shorts, *(f"{s}.{k}" for s, kind in sections.items() for k in field_types(kind))]
    raise UserError(f"--{name}: unknown; nearest is --{nearest(name, words)}")


def _apply(values: dict, layer: Layer, sections: dict[str, type]) -> None:
    """Lay one origin's settings over what stands; a model or a horizon set here displaces the earlier one."""
    given = {section: {k: v for k, v in keys.items() if v not in (None, "null")} for section, keys in layer.values.items()}
    model, training = given.get("model", {}), given.get("training", {})
    if {"name", "preset"} <= set(model):
        raise UserError(f"{layer.origin}: model.name and model.preset exclude each other; keep one")
    if {"name", "preset"} & set(model):
        for key in values["model"]:
            if key not in MODEL_SETTINGS:
                values["model"][key] = None
        if "name" in model and "tokenizer" in values:
            values["tokenizer"] = {f.name: _default(f) for f in dataclasses.fields(sections["tokenizer"])}
    horizons = [key for key in HORIZON if key in training]
    if len(horizons) > 1:
        raise UserError(f"{layer.origin}: training.{' and training.'.join(horizons)} exclude each other; keep one")
    if horizons:
        values["training"].update(dict.fromkeys(HORIZON))
    for section, keys in layer.values.items():
        for key, value in keys.items():
            where = f"{layer.origin}: {section}.{key}"
            hints = field_types(sections[section])
            if key not in hints:
                raise UserError(f"{where}: unknown key; nearest is '{nearest(str(key), hints)}'")
            choices = sections[section].__dataclass_fields__[key].metadata["choices"]
            values[section][key] = convert(value, hints[key], where, choices)


def help_text(doc: str, sections: dict[str, type], own: str, actions: dict[str, Action], shorts: dict[str, str]) -> str:
    lines = [doc.strip(), "", "flags", f"  {'--config FILE':34} settings; config.yaml beside the script unless given"]
    for name, action in actions.items():
        value = "" if action.convert is None else " VALUE"
        lines.append(f"  --{name.replace('_', '-') + value:32} {action.comment}")
    own_keys = field_types(sections[own])
    usable = [flag for flag, key in shorts.items() if key.split(".")[0] in sections and flag not in own_keys]
    lines.append("  " + " ".join(f"--{flag.replace('_', '-')}" for flag in usable) + "   short for "
                 + " ".join(shorts[flag] for flag in usable))
    for name, kind in sections.items():
        lines += ["", f"--{name}.KEY VALUE" + (", or --KEY VALUE" if name == own else "")]
        for f in dataclasses.fields(kind):
            shown = json.dumps(_default(f)) if _default(f) is not None else "null"
            choices = f" ({' | '.join(map(str, f.metadata['choices']))})" if f.metadata["choices"] else ""
            lines.append(f"  {f.name:26} {shown:>16}  {f.metadata['comment']}{choices}")
    return "\n".join(lines)


def config_text(config: SimpleNamespace) -> str:
    """The resolved settings as YAML; unset architecture knobs are left out."""
    import yaml

    sections = {name: dataclasses.asdict(value) for name, value in vars(config).items() if name in SECTIONS}
    sections["model"] = {k: v for k, v in sections["model"].items() if v is not None}
    return yaml.safe_dump(sections, sort_keys=False, width=120)


def overrides(section) -> dict:
    """The architecture knobs that are set in a `model` section."""
    return {k: v for k, v in dataclasses.asdict(section).items() if k in KNOBS and v is not None}


def run_main(main: Callable, argv: list[str] | None = None) -> None:
    """Exit codes of every script: 0, 2 for a user's mistake (one line), 130 for Ctrl-C; a bug keeps its traceback."""
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader went away (| head): nobody is left to write to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main(argv: list[str] | None = None) -> None:
    actions = {"list": Action("show families and sizes")}
    config = load_config(argv, {"model": ModelSection, "output": OutputSection}, "model", actions, __doc__)
    if config.actions.list:
        print(preset_table())
    elif config.model.name:
        print(summary(read_config(resolve_folder(config.model.name))))
    else:
        print(summary(preset_config(config.model.preset, **overrides(config.model))))


if __name__ == "__main__":
    run_main(main)
