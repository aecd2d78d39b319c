"""MODEL.py: the network, and the folders it is loaded from and saved to.

One Transformer, assembled from independent settings; GPT-2, Llama, Mistral, Qwen, Mixtral, DeepSeek-V3, Kimi K2 and BERT are
presets of them. Read in this order: `ModelConfig`, rotary positions, the KV cache, attention (grouped-query and latent), MLP
and experts, the decoder, and the forward pass (`LanguageModel`, `Transformer`). Below the banner `edges`: presets, kernels of
other packages, models that transformers runs, Hugging Face folders (`load`, `save`), LoRA adapters, devices, the summary, and
the settings mechanism (config.yaml and flags) that every script uses.

    python MODEL.py --model.preset llama3-8b     # layers, parameters, FLOPs, memory; allocates no weights
    python MODEL.py --list                       # every family and size
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import hashlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
import types
import typing
import warnings
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# oneDNN caches a kernel for each shape of a matrix product, 1024 by default, up to 2 MB each. Batches of conversations differ in
# shape, so memory would grow by gigabytes. 256 are enough for the shapes that repeat.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class UserError(Exception):
    """A user error: shown as one line on stderr, exit status 2."""


def process_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


QUIET = False  # --quiet: nothing but errors


line_is_open = False  # whether the last output on the terminal is a progress bar, without its line end


def say(line: str) -> None:
    """Print a line to stderr on the first process only; stdout is for results."""
    global line_is_open
    if process_rank() == 0 and not QUIET:
        print("\n" * line_is_open + line, file=sys.stderr, flush=True)
        line_is_open = False


# --------------------------------------------------------------------------------------------------------- knobs


def knob(default, comment: str, choices: Collection[str] = (), *, low: float | None = None, high: float | None = None,
         above: float | None = None, below: float | None = None, only: tuple | str = (), often: bool = False):
    """A dataclass field that declares a setting. `comment` describes it in --help and config.yaml.

    `check` enforces `choices` (a table: its names at that time), low <= number <= high and above < number < below. only = (key,
    *values) restricts a setting to certain values of another one: it has an effect only if the section's `key` has one of
    `values` (without values: is set). Settings that people change `often` are listed in --help.
    """
    only = (only,) if isinstance(only, str) else only
    metadata = dict(comment=comment, choices=choices, low=low, high=high, above=above, below=below, only=only, often=often)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(f: dataclasses.Field):
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


def check(section, name: str) -> None:
    """Check the values of a section against the limits of its knobs; UserError names the first invalid one."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float):
                check_number(number, f.metadata, f"{name}.{f.name}")
        if f.metadata["choices"] and value is not None and value not in f.metadata["choices"]:
            raise UserError(f"{name}.{f.name}: '{value}' is not one of {', '.join(map(str, f.metadata['choices']))}")
        if not_used(section, f) and value != default_of(f):
            key, *values = f.metadata["only"]
            others = f"with {name}.{key} {getattr(section, key)} (only with {', '.join(map(str, values))})"
            raise UserError(f"{name}.{f.name}: has no effect {others if values else f'without {name}.{key}'}; leave it out")


def check_number(number: float, limits: dict, where: str) -> None:
    low, high, above, below = (limits[key] for key in ("low", "high", "above", "below"))
    largest = 2**31 - 1 if isinstance(number, int) else 1e15  # larger numbers are mistakes and may overflow
    floor, ceiling = -largest if low is None else low, largest if high is None else high
    valid = (isinstance(number, int) or math.isfinite(number)) and floor <= number <= ceiling
    if not (valid and (above is None or number > above) and (below is None or number < below)):
        bounds = {"at least": floor if number < floor else low, "above": above,
                  "at most": ceiling if number > ceiling else high, "below": below}
        bounds = [f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None]
        raise UserError(f"{where}: {number} must be {' and '.join(bounds) or 'a number'}")


def not_used(section, f: dataclasses.Field) -> bool:
    """Whether a setting has no effect with the section's other values."""
    if not f.metadata["only"]:
        return False
    key, *values = f.metadata["only"]
    return getattr(section, key) not in values if values else getattr(section, key) in (None, False, [])


ROPE_TYPES = {  # parameters of each type; the first one is required (llama3: all of them)
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
             "mscale_all_dim", "truncate"),
}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


expert_knob = partial(knob, only="num_experts")
latent_knob = partial(knob, only="kv_lora_rank")


@dataclass
class ModelConfig:
    """The architecture. Names are those of Hugging Face's config.json."""
    model_type: str = knob("llama", "Hugging Face model type that is written to config.json")
    vocab_size: int = knob(32000, "vocabulary size; with a preset it defaults to the tokenizer's", low=1)
    hidden_size: int = knob(256, "hidden dimension C", low=1)
    intermediate_size: int = knob(704, "hidden dimension of the dense MLP", low=1)
    num_hidden_layers: int = knob(6, "number of decoder layers", low=1)
    num_attention_heads: int = knob(4, "number of query heads H", low=1)
    num_key_value_heads: int | None = knob(None, "number of key/value heads: H is MHA, 1 is MQA, in between is GQA", low=1)
    head_dim: int | None = knob(None, "dimension of one head; null is hidden_size / heads", low=1)
    max_position_embeddings: int = knob(2048, "context length in tokens", low=1)
    hidden_act: str = knob("silu", "activation function of the MLP", ACTIVATIONS)
    mlp_gated: bool = knob(True, "gated MLP (SwiGLU, Shazeer 2020); false is GPT-2's plain MLP")
    norm_type: str = knob("rmsnorm", "normalization layer", ("rmsnorm", "layernorm"))
    rms_norm_eps: float = knob(1e-5, "epsilon of the normalization layers", above=0)
    qk_norm: bool = knob(False, "RMSNorm on each query and key head (Qwen3)")
    position_embedding_type: str = knob("rope", "rotary or learned position embeddings", ("rope", "learned"))
    rope_theta: float = knob(10000.0, "base of the rotary frequencies", above=0, only=("position_embedding_type", "rope"))
    rope_scaling: dict | None = knob(None, "context extension: {rope_type: linear, llama3 or yarn, factor: 8, ...}",
                                     only=("position_embedding_type", "rope"))
    sliding_window: int | None = knob(None, "number of tokens that each token attends to, including itself (Mistral)", low=1)
    layer_types: list[str] | None = knob(None, "attention type per layer: full_attention or sliding_attention; null: all layers "
                                               "alike")
    attention_bias: bool = knob(False, "bias in the query, key and value projections (Qwen2, GPT-2)")
    fused_qkv: bool | None = knob(None, "one fused query-key-value projection; null is true for gpt2 only")
    attention_out_bias: bool = knob(False, "bias in the attention output projection (GPT-2)")
    mlp_bias: bool = knob(False, "bias in the MLP (GPT-2)")
    tie_word_embeddings: bool = knob(False, "share weights between the embedding and the output head")
    attention_dropout: float = knob(0.0, "dropout on attention probabilities", low=0, below=1)
    resid_pdrop: float = knob(0.0, "dropout on the outputs of attention and MLP", low=0, below=1)
    embd_pdrop: float = knob(0.0, "dropout on the embeddings", low=0, below=1)
    initializer_range: float = knob(0.02, "standard deviation of the initial weights", above=0)
    bos_token_id: int | None = knob(None, "beginning-of-text id; null is the tokenizer's", low=0)
    eos_token_id: int | list[int] | None = knob(None, "end-of-text id or ids; null is the tokenizer's", low=0)
    pad_token_id: int | None = knob(None, "padding id; null is the tokenizer's", low=0)
    num_labels: int = knob(1, "number of labels of the classification head", low=1)
    labels: list[str] | None = knob(None, "names of the labels")
    num_experts: int | None = knob(None, "number of experts per layer; null is a dense MLP", low=1)
    num_experts_per_tok: int = expert_knob(2, "number of experts per token (top-k)", low=1)
    moe_intermediate_size: int | None = expert_knob(None, "hidden dimension of one expert; null is intermediate_size", low=1)
    n_shared_experts: int = expert_knob(0, "number of experts that process every token (DeepSeek)", low=0)
    mlp_only_layers: list[int] | None = expert_knob(None, "indices of layers with a dense MLP instead of experts", low=0)
    scoring_func: str = expert_knob("softmax", "router scores; sigmoid adds a selection bias (DeepSeek-V3)",
                                    ("softmax", "sigmoid"))
    norm_topk_prob: bool = expert_knob(True, "normalize the top-k expert weights to a sum of 1")
    routed_scaling_factor: float = expert_knob(1.0, "scaling factor on the output of the routed experts", above=0)
    n_group: int = expert_knob(1, "number of expert groups", low=1)
    topk_group: int = expert_knob(1, "number of expert groups that a token is routed to", low=1)
    router_aux_loss_coef: float = expert_knob(0.0, "weight of the load-balancing loss", low=0)
    seq_aux: bool = expert_knob(False, "balance the load within each sequence instead of the batch (DeepSeek-V3)")
    router_bias_update_speed: float = expert_knob(0.0, "update rate of the selection bias per optimizer step (Wang 2024)", low=0)
    kv_lora_rank: int | None = knob(None, "rank of the shared key-value latent (MLA); null is standard attention", low=1)
    q_lora_rank: int | None = latent_knob(None, "rank of the query latent (MLA); null projects queries directly", low=1)
    qk_nope_head_dim: int = latent_knob(128, "MLA: dimension of the query and key part without rotary embedding", low=1)
    qk_rope_head_dim: int = latent_knob(64, "MLA: dimension of the rotary query and key part (the key part is shared by all "
                                            "heads)", low=1)
    v_head_dim: int = latent_knob(128, "MLA: dimension of a value head", low=1)
    rope_interleave: bool = knob(False, "rotate adjacent pairs of dimensions instead of halves (DeepSeek)")
    causal: bool = knob(True, "causal attention; false is an encoder (BERT)")
    post_norm: bool = knob(False, "normalize after the residual sums and the embeddings (BERT)")
    type_vocab_size: int = knob(0, "number of token types (BERT: first and second text)", low=0)
    lm_head_transform: bool = knob(False, "dense layer and bias in the output head (BERT)")

    def __post_init__(self):
        check_architecture(self)

    def sparse(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.num_experts is not None and layer not in (self.mlp_only_layers or ())

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens; None is full attention."""
        if self.layer_types and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    @property
    def eos_ids(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


# ----------------------------------------------------------------------------------------------------- positions


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
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, kept; 0: low frequency, divided by factor
        return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0
    if kind == "yarn":
        return _yarn_frequencies(config, frequencies)
    return frequencies, 1.0


def _yarn_frequencies(config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng 2023, sections 3.2 and 3.4): interpolate dimensions with fewer than `beta_slow` rotations over the original
    context, keep dimensions with more than `beta_fast` rotations, blend linearly in between, and scale attention up."""
    scaling, dim = config.rope_scaling, config.head_dim
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension_of(turns: float) -> float:  # the (fractional) pair with this many rotations
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.get("beta_fast") or 32.0), dimension_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    stretched = frequencies * (1 - ramp) + frequencies / factor * ramp

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = _magnitude(factor, mscale) / _magnitude(factor, all_dim) if mscale and all_dim else _magnitude(factor)
    return stretched, attention_factor


def _magnitude(factor: float, weight: float = 1.0) -> float:
    """The factor on queries and keys for a context that is `factor` times as long (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + D/2) of states (B, H, T, D) by its token's angle; cos and sin are those of `rope_tables`.

    Hugging Face's layout: the two numbers of a pair are half a head apart, not adjacent as in Meta's files.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cos, torch.cat((second, first), dim=-1), sin)


def rotate_interleaved(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs (2i, 2i + 1; DeepSeek). The result has them half a head apart, which keeps dot products the same."""
    return rotate(torch.cat((states[..., 0::2], states[..., 1::2]), dim=-1), cos, sin)


# ------------------------------------------------------------------------------------------------------ KV cache


class Sequence:
    """A sequence in a KVCache: its pages, its length in tokens, and the digests of its full pages (see `remember`)."""

    def __init__(self, pages: list[int] = (), length: int = 0, digests: list[bytes] = ()):
        self.pages, self.length, self.digests = list(pages), length, list(digests)


class KVCache:
    """Paged keys and values (or latents) of each layer (Kwon 2023), in pages of `page` tokens, allocated once.

    Position p of a sequence is slot p % page of its page p // page. Full pages do not change, so sequences with a common prefix
    share them: forks of a prompt, and later prompts through `remember` and `find`. Pages without references are reused: first
    pages without a digest, then the least recently used page. All bookkeeping is on the host.

    Without a kernel that follows page tables, adjacent pages are read in place and other pages are gathered in each step, so a
    sequence gets adjacent pages where possible. If the longest sequence fits in a page, each sequence is one page, and adjacent
    sequences are read in place.
    """

    def __init__(self, layers: int, pages: int, page: int, device=None, kernel: Callable | None = None):
        self.states: list[list[Tensor]] = [[] for _ in range(layers)]  # (H, pages * page, D); allocated by the first `attend`
        self.page, self.pages, self.device = page, pages, device
        self.kernel = kernel  # a kernel for single tokens that follows page tables (`attend_pages`), or None
        self.recorded: dict[tuple, object] = {}  # recorded steps (`INFER.RecordedStep`)
        self.references = [0] * pages
        self.free = dict.fromkeys(range(pages))
        self.cursor = 0  # where the search for adjacent free pages starts
        self.found: dict[bytes, int] = {}  # digest of all tokens up to the end of a page -> page
        self.digest_of: dict[int, bytes] = {}
        self.idle: dict[int, None] = {}  # cached pages without references, the least recently used first

    def available(self) -> int:
        """Number of pages that can be allocated."""
        return len(self.free) + len(self.idle)

    def extend(self, sequence: Sequence, length: int, expected: int = 0) -> bool:
        """Allocate pages for `length` tokens of a sequence that may grow to `expected`; False if too few pages are free."""
        missing = -(-length // self.page) - len(sequence.pages)
        if missing > self.available():
            return False
        if missing > 0:
            wanted = sequence.pages[-1] + 1 if sequence.pages else self._gap(-(-max(length, expected) // self.page))
            for _ in range(missing):
                sequence.pages.append(self._take(wanted))
                wanted = sequence.pages[-1] + 1
        return True

    def _gap(self, count: int) -> int:
        """The first of `count` adjacent free pages, or -1. The search continues after the last hit, so sequences can grow."""
        while len(self.free) < count and self.idle:
            self._evict()
        run = 0
        for page in itertools.chain(range(self.cursor, self.pages), range(self.pages)):
            run = run + 1 if page in self.free and page else int(page in self.free)
            if run == count:
                self.cursor = (page + 1) % self.pages
                return page - count + 1
        return -1

    def _take(self, wanted: int = -1) -> int:
        if not self.free:
            self._evict()
        page = wanted if wanted in self.free else next(iter(self.free))
        del self.free[page]
        self.references[page] = 1
        return page

    def _evict(self) -> None:
        page = next(iter(self.idle))
        del self.idle[page], self.found[self.digest_of.pop(page)]
        self.free[page] = None

    def _share(self, page: int) -> None:
        self.idle.pop(page, None)
        self.references[page] += 1

    def close(self, sequence: Sequence) -> None:
        """Release the pages of a sequence, the last one first, because prefixes are the most likely to be reused."""
        for page in reversed(sequence.pages):
            self.references[page] -= 1
            if not self.references[page] and page in self.digest_of:
                self.idle[page] = None
            elif not self.references[page]:
                self.free[page] = None
        sequence.pages, sequence.length, sequence.digests = [], 0, []

    def fork(self, source: Sequence, length: int) -> Sequence | None:
        """Return a new sequence with the first `length` tokens of `source`, or None if no page is free. Full pages are shared;
        the last, partial page is copied."""
        full, rest = divmod(length, self.page)
        copy = Sequence(source.pages[:full], length, source.digests[:full])
        if rest and not self.available():
            return None
        for page in copy.pages:
            self._share(page)
        if rest:
            copy.pages.append(self._take(copy.pages[-1] + 1 if copy.pages else -1))
            self._copy(source.pages[full], copy.pages[full], rest)
        return copy

    def _copy(self, source: int, target: int, length: int) -> None:
        source, target = source * self.page, target * self.page
        for states in itertools.chain(*self.states):
            states[:, target : target + length] = states[:, source : source + length]

    def remember(self, sequence: Sequence, ids: list[int], salt: bytes = b"") -> None:
        """Register the full pages of a sequence in the prefix cache, under a digest of all tokens up to the end of the page;
        `salt` separates the states of different weights (adapters)."""
        while (number := len(sequence.digests)) < sequence.length // self.page:
            digest = self._digest(sequence.digests[-1] if number else salt, ids, number)
            sequence.digests.append(digest)
            page = sequence.pages[number]
            if digest not in self.found and page not in self.digest_of:
                self.found[digest], self.digest_of[page] = page, digest

    def _digest(self, before: bytes, ids: list[int], number: int) -> bytes:
        page = array("q", ids[number * self.page : (number + 1) * self.page])
        return hashlib.blake2b(before + page.tobytes(), digest_size=16).digest()

    def find(self, ids: list[int], salt: bytes = b"") -> Sequence:
        """Return a sequence with the longest cached prefix of `ids` in full pages, without the last token (for its logits)."""
        sequence = Sequence()
        while (number := len(sequence.pages)) < (len(ids) - 1) // self.page:
            digest = self._digest(sequence.digests[-1] if number else salt, ids, number)
            if digest not in self.found:
                break
            self._share(self.found[digest])
            sequence.pages.append(self.found[digest])
            sequence.digests.append(digest)
        sequence.length = len(sequence.pages) * self.page
        return sequence

    def compact(self, sequences: list[Sequence]) -> None:
        """Move single-page sequences to the first pages, so that all of them are adjacent."""
        if any(len(sequence.pages) != 1 for sequence in sequences) or self.idle:
            return
        gaps = [page for page in range(len(sequences)) if not self.references[page]]
        for sequence in sequences:
            if (old := sequence.pages[0]) >= len(sequences):
                new = gaps.pop()
                self._copy(old, new, sequence.length)
                self.references[new], self.references[old], sequence.pages = 1, 0, [new]
        self.free, self.cursor = dict.fromkeys(page for page in range(self.pages) if not self.references[page]), 0

    def bytes(self) -> int:
        return sum(states.numel() * states.element_size() for states in itertools.chain(*self.states))


class Group(NamedTuple):
    """Part of a step that one attention call computes: n sequences of `count` new tokens each, from the step's token `first`."""

    first: int
    count: int
    lengths: list[int]  # of the n sequences, including the new tokens
    read: Callable | None  # (a layer's states (H, slots, D), first position) -> (n, H, S, D); None if all tokens are new


GATHER_BYTES = {"cpu": 2**20}  # maximum size of a layer's gathered states; 2**28 on other devices
FEW = 8  # maximum new tokens of a sequence for the paging kernel, which computes them as independent queries


class CacheStep:
    """One forward pass over the next `count` tokens of each sequence in `parts`, concatenated to a batch (1, N) without
    padding: prompts, chunks of prompts, and single tokens.

    If a kernel follows page tables, the leading sequences with at most FEW new tokens share one call of it. The other sequences
    are computed in groups: sequences with one new token share a call if their pages are adjacent (read in place) or their states
    are small (gathered). Each remaining sequence has its own call, so every key is read once, without padding.

    `pad`: if the kernel computes the whole step, pad it to one of a few sizes; then `plan` contains all indices (`repeatable`).
    """

    def __init__(self, cache: KVCache, parts: list[tuple[Sequence, int]], pad: bool = False):
        self.cache, self.parts, self.groups, self.masks = cache, [], None, {}
        positions, slots, page = [], [], cache.page
        for sequence, count in parts:
            start, stop = sequence.length, sequence.length + count
            if stop > len(sequence.pages) * page:
                raise IndexError(f"{stop} tokens do not fit in {len(sequence.pages)} pages of {page}")
            positions += range(start, stop)
            slots += [sequence.pages[position // page] * page + position % page for position in range(start, stop)]
            sequence.length = stop
            self.parts.append((sequence.pages, stop, count))
        few = list(itertools.takewhile(lambda part: part[2] <= FEW, self.parts)) if cache.kernel else []
        tables = [pages for pages, _, count in few for _ in range(count)]  # of each token
        longest = max((stop for _, stop, _ in few), default=0)
        self.repeatable = pad and len(few) == len(parts)
        if self.repeatable:  # powers of 2: the last token is repeated, and the longest sequence is rounded up
            spare, longest = (1 << (len(slots) - 1).bit_length()) - len(slots), max(SPLIT, 1 << (longest - 1).bit_length())
            positions, slots, tables = (column + column[-1:] * spare for column in (positions, slots, tables))
        self.count, self.few, self.paged, self.longest = len(slots), len(few), len(tables), longest
        width = -(-longest // page)
        flat = itertools.chain(positions, slots, *((pages + [0] * width)[:width] for pages in tables))
        self.plan = torch.tensor(list(flat), dtype=torch.long).to(cache.device)  # one copy for all indices
        self.slots = self.plan[self.count : 2 * self.count]  # (N,)

    @property
    def positions(self) -> Tensor:
        return self.plan[None, : self.count]  # (1, N)

    def attend(self, layer: int, queries: tuple[Tensor, ...], new: tuple[Tensor, ...], window: int | None,
               compute: Callable) -> Tensor:
        """Store a layer's new states (1, H, N, D) and return the attention output (1, H, N, D): compute(*queries, *states, mask)
        for each group, whose queries are (n, H, T, D) and whose states are (n, H, S, D)."""
        stored = self.cache.states[layer]
        if not stored:
            size = self.cache.pages * self.cache.page
            stored += [states.new_zeros(states.shape[1], size, states.shape[3]) for states in new]
        for cached, states in zip(stored, new, strict=True):
            cached[:, self.slots] = states[0].to(cached.dtype)
        if self.groups is None:
            self.groups = list(self._grouped(sum(states.nbytes for states in stored) // stored[0].shape[1]))
        results = []
        if self.paged:
            tables = self.plan[2 * self.count :].view(self.paged, -1)
            results.append(self.cache.kernel(queries[0][0, :, : self.paged], *stored, self.plan, tables, self.longest,
                                             self.cache.page, window))
        for number, group in enumerate(self.groups):
            n = len(group.lengths)
            tokens = slice(group.first, group.first + n * group.count)
            start = max(0, group.lengths[0] - group.count + 1 - window) if window and n == 1 and group.read else 0
            states = [group.read(key, start) for key in stored] if group.read else [_rows(key[:, :, tokens], n) for key in new]
            if (number, window) not in self.masks:  # shared by layers with the same window
                self.masks[number, window] = self._mask(group, start, window, queries[0].dtype)
            result = compute(*(_rows(query[:, :, tokens], n) for query in queries), *states, self.masks[number, window])
            results.append(result[0] if n == 1 else result.transpose(0, 1).flatten(1, 2))  # (H, n * T, D)
        return (results[0] if len(results) == 1 else torch.cat(results, 1))[None]

    def _grouped(self, token_bytes: int) -> Iterator[Group]:
        limit = GATHER_BYTES.get(self.cache.device.type, 2**28)
        start, first = self.few, self.paged  # indices of a part and of its first token
        while start < len(self.parts):
            (pages, length, count), stop = self.parts[start], start + 1
            fresh, slab, longest = length == count, len(pages) == 1, length
            for next_pages, next_length, next_count in self.parts[stop:]:
                if next_count != count or fresh != (next_length == next_count) or not (fresh or count == 1):
                    break
                adjacent = slab and len(next_pages) == 1 and next_pages[0] == pages[0] + stop - start
                longest = max(longest, next_length)
                if not (fresh or adjacent or (stop + 1 - start) * longest * token_bytes <= limit):
                    break
                slab, stop = adjacent, stop + 1
            group = self.parts[start:stop]
            lengths = [length for _, length, _ in group]
            read = None if fresh else self._reader([pages for pages, *_ in group], max(lengths), slab)
            yield Group(first, count, lengths, read)
            first, start = first + count * len(group), stop

    def _reader(self, tables: list[list[int]], longest: int, slab: bool) -> Callable:
        """A function that reads the states of sequences with these pages, up to the length `longest`."""
        n, page, needed = len(tables), self.cache.page, -(-longest // self.cache.page)
        base = tables[0][0]
        if slab:
            return lambda states, start: states.unflatten(1, (-1, page))[:, base : base + n, start:longest].transpose(0, 1)
        if n == 1 and tables[0][:needed] == list(range(base, base + needed)):
            return lambda states, start: states[None, :, base * page + start : base * page + longest]
        tables = [(pages + [pages[-1]] * needed)[:needed] for pages in tables]  # the mask hides what is past a sequence's end
        slots = torch.tensor(tables)[:, :, None] * page + torch.arange(page)  # (n, pages, page)
        slots = slots.flatten(1)[:, :longest].to(self.cache.device)  # (n, S)
        return lambda states, start: _rows(states.index_select(1, slots[:, start:].flatten())[None], n)

    def _mask(self, group: Group, start: int, window: int | None, dtype: torch.dtype) -> Mask | None:
        longest = max(group.lengths)
        inside = window is None or longest - start <= window
        if group.count == 1 and min(group.lengths) == longest and (inside or len(group.lengths) == 1):
            return EVERYTHING
        if group.read is None and inside:
            return None  # causal
        ends = torch.tensor(group.lengths, device=self.cache.device)[:, None, None]  # (n, 1, 1)
        queries = ends - group.count + torch.arange(group.count, device=ends.device)[:, None]  # (n, T, 1)
        keys = torch.arange(start, longest, device=ends.device)  # (S,)
        return Mask(bias_of((keys <= queries) & (keys > queries - (window or longest)), dtype), None)


def _rows(states: Tensor, n: int) -> Tensor:
    """(1, H, n * S, D) -> (n, H, S, D), a view"""
    return states if n == 1 else states[0].unflatten(1, (n, -1)).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------- attention


class Mask(NamedTuple):
    """An additive bias on scores (B, 1, T, S), and the queries that attend to no key (B, 1, T, 1); None if there are none."""

    bias: Tensor | None
    empty: Tensor | None


EVERYTHING = Mask(None, None)  # each query attends to all keys; a mask of None is causal


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, S) -> 0 where attention is allowed, -inf elsewhere (B, 1, T, S)"""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -math.inf)[:, None]


class MaskBuilder:
    """Builds masks from positions, once per window of a forward pass.

    A query at position p attends to keys of its own segment at positions 0 <= k <= p (any k in an encoder), and with a window
    only to k > p - window. A padding query (position -1) attends to no key, and the softmax of an empty set is NaN. So its row
    of the mask allows all keys, and its output is set to zero after the kernel.
    """

    def __init__(self, positions: Tensor, segment_ids: Tensor | None, dtype: torch.dtype, causal: bool = True):
        self.positions, self.segment_ids, self.dtype, self.causal = positions, segment_ids, dtype, causal
        self.built: dict[int | None, Mask] = {}

    def __call__(self, window: int | None) -> Mask:
        if window not in self.built:
            self.built[window] = self._build(window)
        return self.built[window]

    def _build(self, window: int | None) -> Mask:
        queries, keys = self.positions[:, :, None], self.positions[:, None, :]  # (B, T, 1), (B, 1, T)
        allowed = (keys >= 0) & (keys <= queries if self.causal else queries >= 0)  # (B, T, T)
        if window is not None:
            allowed &= keys > queries - window
        if self.segment_ids is not None:
            allowed &= self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        empty = queries < 0  # (B, T, 1)
        allowed |= empty
        return Mask(bias_of(allowed, self.dtype), empty[:, None])


def attend_eager(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """Reference attention: softmax(q k^T / sqrt(D) + mask) v. query (B, H, T, D), key and value (B, H_kv, S, D)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, S, D)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, T, S)
    if mask is not None:
        scores = scores if mask.bias is None else scores.add_(mask.bias)
    elif query.shape[2] > 1:
        future = scores.new_full(scores.shape[-2:], -math.inf).triu_(1)  # (T, T)
        scores = scores.add_(future)
    probabilities = scores.softmax(-1, dtype=value.dtype)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return _zero_empty(probabilities @ value, mask)


def _zero_empty(output: Tensor, mask: Mask | None) -> Tensor:
    return output if mask is None or mask.empty is None else output.masked_fill(mask.empty, 0.0)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """The same with torch's fused kernels (flash attention on CUDA), which do not store the whole score matrix."""
    causal = mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask.bias, dropout, causal,
                                            enable_gqa=grouped)
    return _zero_empty(output, mask)


def attend_auto(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, window=None, dropout=0.0) -> Tensor:
    """`attend_eager` or `attend_sdpa`: on a CPU in 16 bits, eager trains faster while its scores fit in the processor's cache."""
    short = query.device.type == "cpu" and query.requires_grad and key.shape[2] <= 512 and query.dtype != torch.float32
    return (attend_eager if short else attend_sdpa)(query, key, value, mask, window, dropout)


class Ragged(NamedTuple):
    """A batch for a kernel that takes concatenated sequences without padding; `starts` (N+1,) are their boundaries."""

    kernel: Callable
    tokens: Tensor | None  # (n,) indices of the tokens that are not padding in the flattened B*T; None is all tokens
    starts: Tensor
    longest: int


def ragged_rows(kernel: Callable, positions: Tensor, segment_ids: Tensor | None, plain: bool = False) -> Ragged:
    """Split a padded, packed batch (B, T) into its documents; in a `plain` batch each row is one document."""
    batch, length = positions.shape
    if plain:
        return Ragged(kernel, None, torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=positions.device),
                      length)
    rows = torch.arange(batch, device=positions.device)[:, None].expand_as(positions)
    tokens = (positions >= 0).flatten().nonzero()[:, 0]
    rows = rows.flatten()[tokens]
    segments = rows.new_zeros(len(tokens)) if segment_ids is None else segment_ids.flatten()[tokens]
    new = (rows[1:] != rows[:-1]) | (segments[1:] != segments[:-1])
    edges = [rows.new_zeros(1), new.nonzero()[:, 0] + 1, rows.new_tensor([len(tokens)])]
    starts = torch.cat(edges).int()
    return Ragged(kernel, tokens, starts, int(starts.diff().max()) if len(tokens) else 0)


def attend_ragged(query: Tensor, key: Tensor, value: Tensor, rows: Ragged, window: int | None, dropout: float) -> Tensor:
    """Attention by a kernel for concatenated sequences, with the interface of `attend_eager`."""
    batch, heads, length, width = query.shape
    if rows.longest == 0:
        return torch.zeros_like(query)
    if spare := -width % 8:  # the kernels require a multiple of 8, and scale by it
        query = query * (1 + spare / width) ** 0.5
        query, key, value = (F.pad(states, (0, spare)) for states in (query, key, value))
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # (B*T, H, D)
    if rows.tokens is not None:
        q, k, v = (states[rows.tokens] for states in (q, k, v))  # (n, H, D)
    output = rows.kernel(q, k, v, rows, window, dropout).to(query.dtype)
    if rows.tokens is not None:
        output = query.new_zeros(batch * length, heads, width + spare).index_copy(0, rows.tokens, output)
    return output.view(batch, length, heads, -1).transpose(1, 2)[..., :width]  # (B, H, T, D)


def attend(dense: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Ragged | None, window=None,
           dropout=0.0) -> Tensor:
    """Attention by the kernel that the mask was built for."""
    return (attend_ragged if isinstance(mask, Ragged) else dense)(query, key, value, mask, window, dropout)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's if it is enabled, else the tensor's dtype."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang 2019, eq. 4), computed in float32 and returned in the dtype of the next product."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        dtype, weight = compute_dtype(hidden), self.weight
        if hidden.dtype != weight.dtype:  # torch's kernel computes in float32 only if both have the same dtype
            hidden, weight = hidden.float(), weight.float()
        return F.rms_norm(hidden, hidden.shape[-1:], weight, self.eps).to(dtype)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight + bias (Ba 2016), returned in the dtype of the next product."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype)).to(compute_dtype(hidden))


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Attention(nn.Module):
    """Multi-head, grouped-query and multi-query attention (Ainslie 2023): H query heads share H_kv key and value heads."""

    def __init__(self, config: ModelConfig, layer: int, attend: Callable):
        super().__init__()
        self.layer, self.attend, self.head_dim = layer, attend, config.head_dim
        self.rotate = rotate_interleaved if config.rope_interleave else rotate
        self.window = config.window(layer)
        self.dropout = config.attention_dropout
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.heads = [heads, kv_heads]
        if config.fused_qkv:
            self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, config.attention_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, count * self.head_dim, config.attention_bias)
                                                     for count in (heads, kv_heads, kv_heads))
        self.o_proj = nn.Linear(heads * self.head_dim, width, config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, hidden: Tensor, rope) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, T, D), the first two rotated by position."""
        rotate = (lambda states: states) if rope is None else partial(self.rotate, cos=rope[0], sin=rope[1])
        if hasattr(self, "qkv_proj"):  # one product for all three
            both, value = self.by_head(self.qkv_proj(hidden)).split([sum(self.heads), self.heads[1]], 2)
            if not hasattr(self, "q_norm"):  # one rotation for queries and keys
                return *rotate(both.transpose(1, 2)).split(self.heads, 1), value.transpose(1, 2)
            query, key = both.split(self.heads, 2)
        else:
            query, key, value = (self.by_head(linear(hidden)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query.transpose(1, 2)), rotate(key.transpose(1, 2)), value.transpose(1, 2)

    def by_head(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, self.head_dim)  # (B, T, H, D)

    def forward(self, hidden: Tensor, rope, mask, cache: CacheStep | None) -> Tensor:
        batch, length, _ = hidden.shape
        query, key, value = self.project(hidden, rope)  # (B, H, T, D)
        if cache is not None:
            output = cache.attend(self.layer, (query,), (key, value), self.window, self._attend_cached)
        else:
            output = self.attend(query, key, value, mask, self.window, self.dropout if self.training else 0.0)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))  # (B, T, C)

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        """Heads that share keys become queries of one head for a single token, so the keys are not repeated."""
        if query.shape[2] > 1 or query.shape[1] == key.shape[1]:
            return self.attend(query, key, value, mask, self.window)
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # (B, H_kv, H / H_kv, D)
        return self.attend(grouped, key, value, mask, self.window).flatten(1, 2)[:, :, None]  # (B, H, 1, D)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): the cache stores one low-rank latent per token, from which
    the keys and values of all heads are projected, and one rotary key that all heads share.

    It has two equivalent forms. Expanded: project the latents to keys and values, then attend; this needs the fewest operations
    for many queries. Absorbed: since q . (W c) = (W^T q) . c, project the queries into the latent space instead and attend to
    the cached latents; keys and values are not created. A rotation by position does not commute with W, so the rotary
    embedding has separate dimensions of each head.
    """

    def __init__(self, config: ModelConfig, layer: int, attend: Callable):
        super().__init__()
        self.layer, self.attend, self.heads = layer, attend, config.num_attention_heads
        self.rotate = rotate_interleaved if config.rope_interleave else rotate
        self.dropout = config.attention_dropout
        self.nope_dim, self.rope_dim, self.value_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        width, rank, bias, eps = config.hidden_size, config.kv_lora_rank, config.attention_bias, 1e-6
        self.rank = rank
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * (self.nope_dim + self.rope_dim), bias=False)
        else:
            self.q_proj = nn.Linear(width, self.heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, rank + self.rope_dim, bias)
        self.kv_a_layernorm = RMSNorm(rank, eps)
        self.kv_b_proj = nn.Linear(rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, width, bias)
        scaling = config.rope_scaling or {}
        # YaRN scales the whole score, not only its rotary part (through cos and sin).
        self.score_scale = _magnitude(scaling.get("factor", 1), scaling.get("mscale_all_dim") or 0) ** 2
        # With at least this many queries, expanding keys and values once costs less than products of the latents' width.
        spared = 2 * rank - self.nope_dim - self.value_dim
        self.expand_from = rank * (self.nope_dim + self.value_dim) / spared if spared > 0 else math.inf

    def forward(self, hidden: Tensor, rope, mask, cache: CacheStep | None) -> Tensor:
        batch, length, _ = hidden.shape
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden))) if hasattr(self, "q_a_proj") else self.q_proj(hidden)
        query = query.view(batch, length, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        content, rotary = query.split([self.nope_dim, self.rope_dim], -1)
        rotary = self.rotate(rotary, *rope)
        latent, key_rotary = self.kv_a_proj_with_mqa(hidden).split([self.rank, self.rope_dim], -1)
        states = self.kv_a_layernorm(latent)[:, None], self.rotate(key_rotary[:, None], *rope)  # (B, 1, T, R), (B, 1, T, Dr)
        if cache is not None:
            output = cache.attend(self.layer, (content, rotary), states, None, self._attend_cached)
        else:
            output = self._expanded(content, rotary, *states, mask)  # (B, H, T, Dv)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))  # (B, T, C)

    def _attend_cached(self, content: Tensor, rotary: Tensor, latent: Tensor, key_rotary: Tensor, mask: Mask | None) -> Tensor:
        absorb = mask is not None and content.shape[2] < self.expand_from
        return (self._absorbed if absorb else self._expanded)(content, rotary, latent, key_rotary, mask)

    def _expanded(self, content: Tensor, rotary: Tensor, latent: Tensor, key_rotary: Tensor, mask) -> Tensor:
        batch, _, keys, _ = latent.shape
        expanded = self.kv_b_proj(latent).view(batch, keys, self.heads, -1).transpose(1, 2)  # (B, H, S, D)
        key_content, value = expanded.split([self.nope_dim, self.value_dim], -1)
        key = torch.cat((key_content, key_rotary.expand(-1, self.heads, -1, -1)), -1)
        size = self.nope_dim + self.rope_dim
        width = max(size, self.value_dim)  # fused kernels require equal widths, and scale by them
        query = F.pad(torch.cat((content, rotary), -1) * (self.score_scale * (width / size) ** 0.5), (0, width - size))
        key, value = F.pad(key, (0, width - size)), F.pad(value, (0, width - self.value_dim))
        return self.attend(query, key, value, mask, None, self.dropout if self.training else 0.0)[..., : self.value_dim]

    def _absorbed(self, content: Tensor, rotary: Tensor, latent: Tensor, key_rotary: Tensor, mask: Mask) -> Tensor:
        batch, heads, length, _ = content.shape
        latent, key_rotary = latent[:, 0], key_rotary[:, 0]  # (B, S, R), (B, S, Dr)
        weight = effective_weight(self.kv_b_proj, latent).reshape(heads, self.nope_dim + self.value_dim, self.rank)
        to_key, to_value = weight.split([self.nope_dim, self.value_dim], 1)  # (H, Dc, R), (H, Dv, R)
        query = _by_head(content, to_key)  # (B, H, T, R)
        scores = _by_row(query.flatten(1, 2), latent.transpose(1, 2))  # (B, H*T, S)
        scores = scores.add_(_by_row(rotary.flatten(1, 2), key_rotary.transpose(1, 2))).view(batch, heads, length, -1)
        scores = scores.mul_(self.score_scale * (self.nope_dim + self.rope_dim) ** -0.5)
        scores = scores if mask.bias is None else scores.add_(mask.bias)
        probabilities = scores.softmax(-1)
        if self.dropout and self.training:
            probabilities = F.dropout(probabilities, self.dropout)
        mixed = _by_row(probabilities.flatten(1, 2), latent).view(batch, heads, length, -1)  # (B, H, T, R)
        return _zero_empty(_by_head(mixed, to_value.transpose(1, 2)), mask)  # (B, H, T, Dv)


def _by_row(left: Tensor, right: Tensor) -> Tensor:
    """torch.bmm, but row by row on a CPU: oneDNN would copy 16-bit batches with gaps between rows, as in a cache."""
    return torch.stack([a @ b for a, b in zip(left, right, strict=True)]) if left.device.type == "cpu" else torch.bmm(left, right)


def _by_head(states: Tensor, weights: Tensor) -> Tensor:
    """states (B, H, T, D) @ weights (H, D, R) -> (B, H, T, R). A broadcast `@` would copy the weights B times."""
    return torch.bmm(states.transpose(0, 1).flatten(1, 2), weights).unflatten(1, (len(states), -1)).transpose(0, 1)


def effective_weight(linear: nn.Module, like: Tensor) -> Tensor:
    """The (out, in) matrix of a layer without bias, in the dtype of `like`; via unit vectors if it is not nn.Linear."""
    if type(linear) is nn.Linear:
        return linear.weight.to(like.dtype)
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device)).t().to(like.dtype)


# ----------------------------------------------------------------------------------------------- MLP and experts


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU, Shazeer 2020), or GPT-2's down(act(up(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if config.mlp_gated:
            self.gate_proj = nn.Linear(width, inner, config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, config.mlp_bias)
        self.activation, self.gated = ACTIVATIONS[config.hidden_act], config.mlp_gated

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        if hasattr(self, "gate_up_proj"):  # one product for both
            gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        else:
            gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return self.down_proj(self.activation(gate) * up)


class Routing(NamedTuple):
    """The result of a router in one training forward: its balance loss, and the number of tokens of each expert (E,)."""

    loss: Tensor
    counts: Tensor


class Router(nn.Module):
    """Scores each token for each expert and selects the top k (Shazeer 2017; DeepSeek-V3 2024, section 2.1.2).

    Without load balancing, routers send most tokens to a few experts. Two methods balance the load: a loss that grows with the
    imbalance (`balance_loss`), and a selection bias (Wang 2024) that rises after each step for experts with too few tokens.
    The bias affects which experts are selected, not their weights, so it does not change gradients.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.activation = torch.sigmoid if config.scoring_func == "sigmoid" else partial(torch.softmax, dim=-1)
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, hidden: Tensor, real: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Routing | None]:
        """hidden (N, C) of `rows` sequences, real (N,) or None -> experts (N, k), weights (N, k), and Routing in training."""
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):  # in float32: rounding would change the selection
            scores = self.activation(F.linear(hidden.float(), self.weight.float()))  # (N, E)
        experts = self.choose(scores.detach())  # (N, k)
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        routing = balance_loss(scores, experts, real, rows, config) if self.training else None
        return experts, weights * config.routed_scaling_factor, routing

    def choose(self, scores: Tensor) -> Tensor:
        """scores (N, E) -> the top-k experts (N, k); with groups, experts of the top groups only."""
        config = self.config
        if config.scoring_func == "sigmoid":
            scores = scores + self.e_score_correction_bias
        if config.n_group > 1:
            grouped = scores.unflatten(1, (config.n_group, -1))  # (N, G, E/G)
            strength = grouped.topk(2, -1).values.sum(-1)  # (N, G)
            others = torch.ones_like(strength).scatter_(1, strength.topk(config.topk_group, -1).indices, 0.0).bool()
            scores = grouped.masked_fill(others[..., None], -math.inf).flatten(1)  # (N, E)
        return scores.topk(config.num_experts_per_tok, -1).indices


def balance_loss(scores: Tensor, experts: Tensor, real: Tensor | None, rows: int, config: ModelConfig) -> Routing:
    """coefficient * E * sum over experts of (fraction of tokens routed to the expert) * (its mean score), over the whole batch
    (Fedus 2021, eqs. 4-6, with k experts per token) or, with `seq_aux`, for each of `rows` sequences with the fractions divided
    by k and scores that sum to 1 (DeepSeek-V3, eqs. 17-20). The minimum is a uniform load."""
    count, k = scores.shape[1], experts.shape[1]
    groups = rows if config.seq_aux else 1
    valid = torch.ones_like(scores[:, 0]) if real is None else real.to(scores.dtype)  # (N,)
    group = torch.arange(len(scores), device=scores.device) // (len(scores) // groups)  # (N,)
    index = (group[:, None] * count + experts).flatten()  # (N * k,)
    chosen = scores.new_zeros(groups * count).scatter_add_(0, index, valid.repeat_interleave(k)).view(groups, count)
    size = valid.view(groups, -1).sum(1, keepdim=True).clamp(min=1)  # (G, 1)
    if config.scoring_func == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    mean = (scores * valid[:, None]).view(groups, -1, count).sum(1) / size  # (G, E)
    fractions = chosen / size / (k if config.seq_aux else 1)
    return Routing(config.router_aux_loss_coef * count * (fractions * mean).sum(-1).mean(), chosen.sum(0))


class Gather(torch.autograd.Function):
    """rows[index] with a backward that also gathers, through the inverse index, instead of scattering with additions.

    `inverse` (M * k,) lists the k indices to which each of the M rows was copied."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = len(rows)
        return rows[index]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].view(ctx.rows, -1, gradient.shape[-1]).sum(1), None, None


class Experts(nn.Module):
    """The gated MLPs of all experts as stacked weights, computed by grouped products.

    Tokens are sorted by expert, so the tokens of each expert are one run of rows and a grouped product multiplies run e by
    weight e. The shapes depend only on the number of tokens, not on the routing. An expert without tokens has zero rows and
    gets zero gradients.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        count, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.count = count
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.activation = ACTIVATIONS[config.hidden_act]
        self.per_token = config.num_experts_per_tok

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor, real: Tensor | None) -> Tensor:
        """hidden (N, C), experts and weights (N, k), real (N,) or None -> (N, C)."""
        count, k = self.count, experts.shape[1]
        experts = experts.flatten()  # (N * k,)
        if real is not None:
            experts = experts.masked_fill(~real.repeat_interleave(k), count)  # padding is sorted after the last expert
        order = experts.argsort(stable=True)
        inverse = order.argsort()
        ends = F.one_hot(experts, count + 1).sum(0)[:count].cumsum(0, dtype=torch.int32)  # (E,)
        padding = None if real is None else (torch.arange(len(order), device=order.device) >= ends[-1])[:, None]
        runs = Gather.apply(hidden, order // k, inverse)  # (N * k, C)
        runs = runs if padding is None else runs.masked_fill(padding, 0.0)
        gate, up = self.product(runs, "gate_up_proj", ends).chunk(2, -1)
        runs = self.product(self.activation(gate) * up, "down_proj", ends)  # (N * k, C)
        runs = runs if padding is None else runs.masked_fill(padding, 0.0)  # the product leaves these rows undefined
        outputs = Gather.apply(runs, inverse, order).view(len(hidden), k, -1)  # (N, k, C)
        return (weights.to(outputs.dtype)[:, None] @ outputs).squeeze(1)  # (N, C)

    def product(self, runs: Tensor, part: str, ends: Tensor) -> Tensor:
        return grouped_product(runs, getattr(self, part), ends)


def grouped_product(runs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows (M, in), in runs that end at `ends` (E,), by weight (E, out, in) -> (M, out)."""
    # torch.compile supports the product only in bfloat16; in other dtypes it runs uncompiled.
    product = F.grouped_mm if runs.dtype == torch.bfloat16 else torch.compiler.disable(F.grouped_mm)
    return product(runs, weight.to(runs.dtype).transpose(1, 2), offs=ends)


class MixtureOfExperts(nn.Module):
    """A router and its experts, optionally with shared experts that process every token (DeepSeekMoE, Dai 2024)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            shared = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(dataclasses.replace(config, intermediate_size=shared))

    def forward(self, hidden: Tensor, real: Tensor | None) -> tuple[Tensor, Routing | None]:
        flat = hidden.flatten(0, 1)  # (N, C)
        real = None if real is None else real.flatten()
        experts, weights, routing = self.gate(flat, real, hidden.shape[0])
        mixed = self.experts(flat, experts, weights, real).view_as(hidden)  # (B, T, C)
        return mixed + self.shared_experts(hidden) if hasattr(self, "shared_experts") else mixed, routing


# -------------------------------------------------------------------------------------------------------- layers


class DecoderLayer(nn.Module):
    """Attention, then an MLP or experts, each added to the residual stream; returns the stream and the router's result.

    Pre-norm: x + f(norm(x)); the residual stream is not normalized, which keeps deep models trainable. Post-norm, as in BERT
    and the original Transformer (Vaswani 2017): norm(x + f(x)).
    """

    def __init__(self, config: ModelConfig, layer: int, attend: Callable):
        super().__init__()
        norm = NORMS[config.norm_type]
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer, attend)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (MixtureOfExperts if config.sparse(layer) else MLP)(config)
        self.sparse, self.post_norm = config.sparse(layer), config.post_norm
        self.dropout = nn.Dropout(config.resid_pdrop) if config.resid_pdrop else nn.Identity()

    def feed(self, hidden: Tensor, real) -> tuple[Tensor, Routing | None]:
        return self.mlp(hidden, real) if self.sparse else (self.mlp(hidden), None)

    def forward(self, hidden: Tensor, rope, mask, cache=None, real=None) -> tuple[Tensor, Routing | None]:
        if self.post_norm:
            hidden = self.input_layernorm(hidden + self.dropout(self.self_attn(hidden, rope, mask, cache)))
            mixed, routing = self.feed(hidden, real)
            return self.post_attention_layernorm(hidden + self.dropout(mixed)), routing
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), rope, mask, cache))
        mixed, routing = self.feed(self.post_attention_layernorm(hidden), real)
        return hidden + self.dropout(mixed), routing


class Decoder(nn.Module):
    """Embeddings, layers, final norm: ids (B, T) -> hidden states (B, T, C), a list per layer, and the routers' results."""

    def __init__(self, config: ModelConfig, attention: tuple[Callable, list[Kernel]]):
        super().__init__()
        self.config, (dense, self.ragged_kernels) = config, attention
        self.gradient_checkpointing = False
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.embed_types = embedding(config.type_vocab_size, config.hidden_size)
        if config.position_embedding_type == "rope":
            # Not a buffer: converting the model to 16 bits would round it.
            self.rope_frequencies, self.rope_factor = rope_frequencies(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, partial(attend, dense)) for i in range(config.num_hidden_layers))
        norm = NORMS[config.norm_type](config.hidden_size, config.rms_norm_eps)
        self.embed_norm, self.norm = (norm, nn.Identity()) if config.post_norm else (nn.Identity(), norm)
        self.dropout = nn.Dropout(config.embd_pdrop) if config.embd_pdrop else nn.Identity()

    def rope_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, T, D) of the angle of each dimension; sin is negative in the first half, for the first of each pair.
        Angles are float32 in models of any dtype: bf16 does not represent all integers above 256."""
        self.rope_frequencies = self.rope_frequencies.to(positions.device)
        angles = positions.clamp(min=0)[..., None].float() * self.rope_frequencies  # (B, T, D/2)
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)

    def masks(self, rows: int, positions: Tensor, segment_ids, cache, plain: bool, dtype) -> list:
        """One mask per layer; None is causal attention without a window."""
        config = self.config
        if cache is not None:  # it builds the masks
            return [None] * config.num_hidden_layers
        builder = MaskBuilder(positions, segment_ids, dtype, config.causal)
        windows = [config.window(i) for i in range(config.num_hidden_layers)]
        plain, length = plain and config.causal, positions.shape[1]
        dropout = self.layers[0].self_attn.dropout if self.training else 0.0
        for kernel in self.ragged_kernels if config.causal else ():
            if kernel.serves(positions.device, dtype, dropout):  # windows are passed to each call
                return [ragged_rows(kernel.attend, positions.expand(rows, length), segment_ids, plain)] * len(windows)
        return [None if plain and (w is None or w >= length) else builder(w) for w in windows]

    def forward(self, input_ids: Tensor, positions=None, cache=None, segment_ids=None, token_types=None, keep: bool = False):
        plain = positions is None and segment_ids is None and cache is None
        real = None if positions is None else positions >= 0  # padding is not routed
        if cache is not None:
            positions = cache.positions
        elif positions is None:
            positions = default_positions(input_ids, segment_ids)
        hidden = self.embed_tokens(input_ids)  # (B, T, C)
        rope = None
        if self.config.position_embedding_type == "learned":
            hidden = hidden + self.embed_positions(positions.clamp(min=0))
        if self.config.type_vocab_size:
            hidden = hidden + self.embed_types(torch.zeros_like(input_ids) if token_types is None else token_types)
        hidden = self.dropout(self.embed_norm(hidden))
        dtype = compute_dtype(hidden)
        if self.config.position_embedding_type == "rope":
            rope = self.rope_tables(positions, dtype)
        masks = self.masks(input_ids.shape[0], positions, segment_ids, cache, plain, dtype)
        states, routings = [], []
        for layer, mask in zip(self.layers, masks, strict=True):
            if keep:
                states.append(hidden)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None:
                hidden, routing = checkpoint(layer, hidden, rope, mask, None, real, use_reentrant=False)
            else:
                hidden, routing = layer(hidden, rope, mask, cache, real)
            if routing is not None:
                routings.append(routing)
        hidden = self.norm(hidden)
        return hidden, [*states, hidden] if keep else [], routings


def default_positions(input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Positions 0..T-1 (1, T), or restarting at each segment (B, T): segments [5 5 5 7 7] -> [0 1 2 0 1]."""
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if segment_ids is None:
        return steps
    new = torch.ones_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return steps - torch.where(new, steps, 0).cummax(1).values


# -------------------------------------------------------------------------------------------------- forward pass


class Output(NamedTuple):
    """The results of a forward pass; only requested fields are set. Shapes: see `LanguageModel.forward`."""

    logits: Tensor | None = None
    logprobs: Tensor | None = None
    reduced: dict | None = None
    entropy: Tensor | None = None
    hidden_states: tuple | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    aux_loss: Tensor | None = None


HEADS = ("lm", "score", "value")
# Minimum and maximum size of a chunk of float32 logits. A chunk has C rows, since each chunk adds to the gradient of the whole
# head (V, C), but at least what fits in a processor's cache, and at most what fits in the memory of any machine.
HEAD_CHUNK_BYTES = 24 * 2**20, 128 * 2**20
HEAD_KEEP_BYTES = 2**29  # up to this size, the logits of a batch are kept for backward; larger ones are recomputed


class LanguageModel(nn.Module):
    """The interface of every model here: a backbone that turns ids into hidden states, heads on top of it, and one `forward`
    that computes what losses and samplers request."""

    heads: tuple = ("lm",)
    caches = True  # whether `new_cache` and forward's `cache` are supported

    def __init__(self):
        super().__init__()
        settle_vector_functions()
        self.adapter = None  # peft's LoraConfig, if an adapter is attached
        self.adapters: dict[str, str] = {}  # `load_adapters`: names -> peft's names
        self.adapter_tokens: dict[str, Tensor] = {}  # peft's names -> the tokens of this forward pass that use the adapter
        self.quantization = "none"  # quantization of the frozen weights
        self.rates: dict[str, float] = {}  # part of a weight's name -> factor on its learning rate (LoRA+)
        self.new_ids: list[int] = []  # token ids added to the vocabulary after loading
        self.router_counts: Tensor | None = None  # (layers with experts, E) tokens since the last optimizer step

    def add_heads(self, head: str | tuple, width: int, labels: int) -> None:
        """Create the requested heads, except the lm head, which differs between models."""
        self.heads = (head,) if isinstance(head, str) else tuple(head)
        if not set(self.heads) <= set(HEADS):
            raise UserError(f"head: {head!r} is not one of {', '.join(HEADS)}")
        if "score" in self.heads:
            self.score = nn.Linear(width, labels, bias=False)
        if "value" in self.heads:
            self.value_head = nn.Linear(width, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)

    def backbone(self, input_ids, positions, cache, segment_ids, token_types, keep: bool) -> tuple[Tensor, list, list[Routing]]:
        """ids (B, T) -> hidden states (B, T, C) after the final norm; if `keep`, all hidden states; and the routers' results."""
        raise NotImplementedError

    def head_input(self, hidden: Tensor) -> Tensor:
        """The input of the score and value heads."""
        return hidden

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states (N, C) -> logits (N, V), in the dtype of matrix products."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def new_cache(self, pages: int, page: int) -> KVCache:
        kernel = attend_pages if reads_pages(self.device) and not self.config.kv_lora_rank else None
        return KVCache(self.config.num_hidden_layers, pages, page, self.device, kernel)

    def after_step(self) -> dict[str, float]:
        """Called by the trainer after each optimizer step: update the routers' selection bias (Wang 2024, algorithm 1).

        Returns for the log: the load of the busiest expert relative to a uniform split (1 is balanced) and the fraction of
        experts without tokens, averaged over layers.
        """
        if self.router_counts is None:
            return {}
        counts, self.router_counts = self.router_counts, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        uniform = counts.mean(1, keepdim=True)  # (layers, 1)
        routers = [module for module in self.modules() if isinstance(module, Router)]
        for router, excess in zip(routers, counts - uniform, strict=True):
            if router.config.router_bias_update_speed:
                router.e_score_correction_bias -= router.config.router_bias_update_speed * excess.sign()
        return {"expert_load": float((counts.amax(1) / uniform[:, 0].clamp(min=1e-9)).mean()),
                "idle_experts": float((counts == 0).float().mean())}

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: CacheStep | None = None,
                segment_ids: Tensor | None = None, token_types: Tensor | None = None, targets: Tensor | None = None,
                temperature: float = 1.0, reduce: Callable | None = None, want: tuple = (), at: Tensor | None = None) -> Output:
        """ids (B, T) -> Output with the requested fields.

        logits        (B, T, V)           without targets and reduce; with `at` (N,), indices into the flattened B*T: (N, V)
        logprobs      (B, T) float32      log-probability of targets[b, t] given all tokens up to t, at `temperature`;
                                          exactly 0, without gradient, where the target is -100 or the position is -1
        reduced       {name: (B, T)}      reduce(logits (N, V), rows (N,)) -> {name: (N,)} over the trained positions;
                                          rows index the flattened B*T; `logprobs` among the results replaces the default
        entropy       (B, T) float32      want=("entropy",): entropy of the same distribution
        hidden_states tuple of (B, T, C)  want=("hidden_states",): embeddings, then each layer; the last one after the norm
        values, scores (B, T), (B, T, L)  want=("values", "scores"): outputs of these heads at every position
        aux_loss      ()                  in training, the routers' balance loss times its coefficient, mean over layers

        positions (B, T): position of each token, -1 for padding; None is 0..T-1, restarting at each segment.
        segment_ids (B, T): tokens attend only to tokens of the same segment. cache: the `CacheStep` of these ids (1, N).
        The caller shifts the targets. With targets or reduce, no (B, T, V) tensor is created.
        """
        if "entropy" in want and targets is None:
            raise ValueError("entropy requires targets")
        if cache is not None and (positions is not None or segment_ids is not None):
            raise ValueError("positions and segment_ids cannot be passed with a cache, which sets the positions")
        hidden, states, routings = self.backbone(input_ids, positions, cache, segment_ids, token_types, "hidden_states" in want)
        out = {"aux_loss": hidden.new_zeros((), dtype=torch.float32)}
        if routings:
            out["aux_loss"] = torch.stack([routing.loss for routing in routings]).mean()
            counts = torch.stack([routing.counts for routing in routings])
            self.router_counts = counts if self.router_counts is None else self.router_counts + counts
        if "hidden_states" in want:
            out["hidden_states"] = tuple(states)
        if "values" in want:
            out["values"] = outside_autocast(self.value_head, self.head_input(hidden)).squeeze(-1)  # (B, T)
        if "scores" in want:
            out["scores"] = outside_autocast(self.score, self.head_input(hidden))  # (B, T, num_labels)
        if targets is not None or reduce is not None:
            out.update(self._from_logits(hidden, positions, targets, temperature, reduce, "entropy" in want))
        elif "lm" in self.heads:
            out["logits"] = self.head_logits(hidden if at is None else hidden.flatten(0, 1)[at])  # (B, T, V) or (N, V)
        return Output(**out)

    def _from_logits(self, hidden, positions, targets, temperature, reduce, entropy: bool) -> dict:
        """The outputs that are computed from logits, in chunks of rows; for large batches, backward recomputes each chunk.

        The float32 logits of a whole batch are often the largest tensor of a training step (8 x 2048 x 128256 x 4 bytes is
        8 GB). Chunks fit in the processor's cache, and only results of shape (N,) are kept.
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
        inputs = hidden if everywhere else hidden[rows]
        targets = None if targets is None else targets.flatten() if everywhere else targets.flatten()[rows]
        low, high = (limit // (4 * self.config.vocab_size) for limit in HEAD_CHUNK_BYTES)
        size = max(1, low, min(high, hidden.shape[-1]))  # rows of a chunk
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, max(len(rows), 1), size):  # an empty batch has one chunk too, so that every weight gets a gradient
            chunk = slice(start, start + size)
            args = (inputs[chunk], None if targets is None else targets[chunk], rows[chunk], temperature, reduce, entropy)
            recompute = torch.is_grad_enabled() and 4 * len(rows) * self.config.vocab_size > HEAD_KEEP_BYTES
            results = checkpoint(self._chunk, *args, use_reentrant=False) if recompute else self._chunk(*args)
            for name, values in results.items():
                parts.setdefault(name, []).append(values)
        results = {}
        for name, values in parts.items():
            joined = torch.cat(values)  # (N,)
            if not everywhere:
                joined = joined.new_zeros(trained.numel()).index_copy(0, rows, joined)
            results[name] = joined.view(shape)
        out = {name: results.pop(name) for name in ("logprobs", "entropy") if name in results}
        if reduce is not None:
            out["reduced"] = results
        return out

    def _chunk(self, hidden, targets, rows, temperature, reduce, entropy: bool) -> dict[str, Tensor]:
        logits = self.head_logits(hidden)  # (N, V)
        results = dict(reduce(logits, rows)) if reduce is not None else {}
        if targets is not None and (entropy or "logprobs" not in results):
            results.update(log_softmax_at(logits, targets, temperature, entropy))
        return results


def outside_autocast(head: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a score or value head in the dtype of its weights: bf16 would round rewards to three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(next(head.parameters()).dtype)).float()


class Transformer(LanguageModel):
    """The decoder with its heads. Module names are those of Hugging Face's Llama, such as model.layers.0.self_attn.q_proj."""

    def __init__(self, config: ModelConfig, head: str | tuple = "lm", attn_implementation: str = "auto"):
        super().__init__()
        self.config = config
        self.model = Decoder(config, choose_attention(attn_implementation))
        if "lm" in head:
            plain = partial(nn.Linear, config.hidden_size, config.vocab_size, bias=False)
            self.lm_head = MaskedHead(config) if config.lm_head_transform else plain()
        self.add_heads(head, config.hidden_size, config.num_labels)
        if "score" in self.heads and config.lm_head_transform:
            self.score = PooledHead(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings and "lm" in self.heads:
            getattr(self.lm_head, "decoder", self.lm_head).weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_) -> dict:
        """peft requires this method of a causal model."""
        return {"input_ids": input_ids}

    @property
    def tied_name(self) -> str:
        """The name of the head's weight that is shared with the embedding."""
        return "lm_head.decoder.weight" if self.config.lm_head_transform else "lm_head.weight"

    @property
    def _tied_weights_keys(self) -> dict | None:  # peft trains new tokens in both if they are tied
        return {self.tied_name: "model.embed_tokens.weight"} if self.config.tie_word_embeddings and "lm" in self.heads else None

    @property
    def device(self) -> torch.device:
        return next(self.model.embed_tokens.parameters()).device  # peft's wrapper would recompute `.weight`

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.embed_tokens.parameters()).dtype

    @property
    def caches(self) -> bool:
        return self.config.causal

    def backbone(self, input_ids, positions, cache, segment_ids, token_types, keep: bool):
        if token_types is not None and not self.config.type_vocab_size:
            raise ValueError("this model has no token types")
        if cache is not None and not self.config.causal:
            raise ValueError("an encoder cannot use a KV cache")
        return self.model(input_ids, positions, cache, segment_ids, token_types, keep)

    def head_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def log_softmax_at(logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False) -> dict:
    """logits (N, V), targets (N,) -> {"logprobs": (N,)} and the distribution's entropy in nats, in float32."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    # cross_entropy is one fused pass per direction; gather(logits) - logsumexp(logits) takes five passes.
    results = {"logprobs": -F.cross_entropy(logits, targets, reduction="none")}
    if entropy:
        logprobs = logits.log_softmax(-1)
        results["entropy"] = -(logprobs.exp() * logprobs).sum(-1)
    return results


def init_weights(model: Transformer, seed: int = 0, only: tuple = ("",)) -> None:
    """Initialize all weights, drawn on the CPU from `seed`, so that they are the same on every device.

    Matrices and embeddings are normal(0, initializer_range). The weights of the two layers that write to the residual stream
    (o_proj, down_proj) are divided by sqrt(2 * layers), so that its variance does not grow with depth (GPT-2, Radford 2019,
    section 2.3). Norms start at one; biases, value heads and selection biases at zero. `only`: prefixes of the parameter
    names to initialize.
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
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers if residual else 1)
                weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


# ======================================================================================================== edges

# -- presets

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
             attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True, position_embedding_type="learned", fused_qkv=True,
             vocab_size=50257, max_position_embeddings=1024, bos_token_id=50256, eos_token_id=50256)
_BERT = dict(model_type="bert", norm_type="layernorm", hidden_act="gelu", mlp_gated=False, attention_bias=True,
             attention_out_bias=True, mlp_bias=True, position_embedding_type="learned", causal=False, post_norm=True,
             lm_head_transform=True, tie_word_embeddings=True, rms_norm_eps=1e-12, type_vocab_size=2, vocab_size=30522,
             max_position_embeddings=512, pad_token_id=0)
_BERT_IMPLIES = ("norm_type", "mlp_gated", "attention_bias", "attention_out_bias", "mlp_bias", "position_embedding_type",
                 "causal", "post_norm", "lm_head_transform")
_MIXTRAL = dict(model_type="mixtral", num_experts=8, rope_theta=1e6, num_key_value_heads=8, max_position_embeddings=32768,
                router_aux_loss_coef=0.02)
_QWEN3_MOE = dict(_QWEN3, model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, router_aux_loss_coef=0.001)
_DEEPSEEK = dict(model_type="deepseek_v3", rms_norm_eps=1e-6, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
                 qk_rope_head_dim=64, v_head_dim=128, rope_interleave=True, num_experts=256, num_experts_per_tok=8,
                 moe_intermediate_size=2048, n_shared_experts=1, scoring_func="sigmoid", n_group=8, topk_group=4,
                 routed_scaling_factor=2.5, router_aux_loss_coef=1e-4, seq_aux=True, router_bias_update_speed=1e-3,
                 mlp_only_layers=[0, 1, 2], vocab_size=129280, max_position_embeddings=163840, bos_token_id=0, eos_token_id=1,
                 rope_scaling=dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0,
                                   beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0))
_KIMI = dict(_DEEPSEEK, num_experts=384, n_group=1, topk_group=1, routed_scaling_factor=2.827, mlp_only_layers=[0],
             vocab_size=163840, rope_theta=50000.0, max_position_embeddings=131072, bos_token_id=163584, eos_token_id=163585,
             rope_scaling=dict(_DEEPSEEK["rope_scaling"], factor=32.0, beta_fast=1.0))


def _size(base: dict, width: int, layers: int, heads: int, mlp: int, **more) -> dict:
    return dict(base, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp,
                **more)


TRAINED_VOCABULARY = 1024  # vocabulary size of a trained tokenizer (default of tokenizer.vocab_size)
_SMALL = 4096  # vocabulary size of the presets for trained tokenizers
_TINY = dict(tie_word_embeddings=True, vocab_size=_SMALL, max_position_embeddings=1024)
_TINY_MLA = dict(_TINY, kv_lora_rank=48, q_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=24,
                 moe_intermediate_size=96, mlp_only_layers=[0], rope_scaling=None, router_bias_update_speed=5e-3)
PRESETS = {
    "llama-225k": _size(_TINY, 64, 3, 4, 192),
    "llama-1m": _size(_TINY, 128, 4, 4, 344),
    "llama-2m": _size(_TINY, 192, 5, 6, 512, num_key_value_heads=3),
    "llama-14m": _size(_LLAMA2, 384, 6, 6, 1024, vocab_size=_SMALL),
    "llama-134m": _size(_LLAMA2, 768, 12, 12, 2048),
    "llama-374m": _size(_LLAMA2, 1024, 24, 16, 2816),
    "gpt2-2m": _size(_GPT2, 192, 4, 6, 768, vocab_size=_SMALL),
    "mistral-2m": _size(dict(_TINY, model_type="mistral", sliding_window=128), 192, 5, 6, 512, num_key_value_heads=3),
    "qwen2-2m": _size(dict(_QWEN2, **_TINY), 192, 5, 6, 512, num_key_value_heads=3),
    "qwen3-2m": _size(dict(_QWEN3, **_TINY, head_dim=32), 192, 5, 6, 512, num_key_value_heads=3),
    "mixtral-tiny": _size(dict(_MIXTRAL, **_TINY, router_aux_loss_coef=0.05), 128, 4, 4, 192, num_key_value_heads=2),
    "qwen3-moe-tiny": _size(dict(_QWEN3_MOE, **_TINY, head_dim=32, router_aux_loss_coef=0.02), 128, 4, 4, 384,
                            num_key_value_heads=2, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=96),
    "deepseek-v3-tiny": _size(dict(_DEEPSEEK, **_TINY_MLA), 128, 4, 4, 344, num_experts=16, num_experts_per_tok=3, n_group=4,
                              topk_group=2),
    "kimi-k2-tiny": _size(dict(_KIMI, **_TINY_MLA), 128, 4, 4, 344, num_experts=24, num_experts_per_tok=3),
    "bert-2m": _size(dict(_BERT, vocab_size=_SMALL), 192, 4, 6, 768),
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
    "mixtral-8x7b": _size(_MIXTRAL, 4096, 32, 32, 14336),
    "mixtral-8x22b": _size(dict(_MIXTRAL, max_position_embeddings=65536, vocab_size=32768, router_aux_loss_coef=0.001), 6144, 56,
                           48, 16384),
    "qwen3-30b-a3b": _size(_QWEN3_MOE, 2048, 48, 32, 6144, num_key_value_heads=4, moe_intermediate_size=768),
    "qwen3-235b-a22b": _size(_QWEN3_MOE, 4096, 94, 64, 12288, num_key_value_heads=4, moe_intermediate_size=1536),
    "deepseek-v3": _size(_DEEPSEEK, 7168, 61, 128, 18432),
    "kimi-k2": _size(_KIMI, 7168, 61, 64, 18432),
    "bert-110m": _size(_BERT, 768, 12, 12, 3072),
    "bert-340m": _size(_BERT, 1024, 24, 16, 4096),
}


def preset_config(name: str, **overrides) -> ModelConfig:
    """The settings of a preset, e.g. preset_config("llama-2m", vocab_size=1024)."""
    if name is None:
        raise UserError("model.preset: null; set it, or set model.name to a trained model")
    if name not in PRESETS:
        raise UserError(f"model.preset: '{name}' is unknown{suggestion(name, PRESETS)} (python MODEL.py --list shows all)")
    knobs = dict(PRESETS[name])
    if "hidden_size" in overrides or "num_attention_heads" in overrides:
        # Derived from the number of heads, so with another number they are derived again.
        knobs.pop("head_dim", None)
        if "num_attention_heads" in overrides:
            knobs.pop("num_key_value_heads", None)
    return ModelConfig(**{**knobs, **overrides})

# -- checks of an architecture


def check_architecture(config: ModelConfig):
    """Fill in the knobs that are derived from others; UserError for an invalid combination."""
    check(config, "model")
    if config.labels is not None:
        config.labels = [str(label) for label in config.labels]
        config.num_labels = len(config.labels)
    if config.fused_qkv is None:
        config.fused_qkv = config.model_type == "gpt2"
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    _check_latent(config)
    _check_experts(config)
    if config.head_dim is None:
        if config.hidden_size % config.num_attention_heads:
            raise UserError(f"model.num_attention_heads: hidden_size {config.hidden_size} is not divisible by "
                            f"{config.num_attention_heads} heads; choose a divisor or set model.head_dim")
        config.head_dim = config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"model.num_key_value_heads: num_attention_heads {config.num_attention_heads} is not divisible by "
                        f"{config.num_key_value_heads}; choose a divisor")
    if config.position_embedding_type == "rope" and config.head_dim % 2:
        raise UserError(f"model.head_dim: {config.head_dim} is odd; rotary embeddings rotate pairs, so it must be even")
    if config.model_type not in (*FAMILIES, CUSTOM):
        raise UserError(f"model.model_type: '{config.model_type}' is not one of {', '.join(FAMILIES)}")
    if config.sliding_window is not None and not config.causal:
        raise UserError("model.sliding_window: an encoder (model.causal false) cannot have a sliding window; leave it out")
    _check_layer_types(config)
    _check_rope_scaling(config)


def _check_latent(config: ModelConfig):
    if config.kv_lora_rank is None:
        return
    for name, only in (("sliding_window", None), ("position_embedding_type", "rope"), ("qk_norm", False), ("fused_qkv", False)):
        if getattr(config, name) != only:
            raise UserError(f"model.{name}: {getattr(config, name)} is not supported with latent attention (model.kv_lora_rank)")
    if config.qk_rope_head_dim % 2:
        raise UserError(f"model.qk_rope_head_dim: {config.qk_rope_head_dim} is odd; rotary embeddings rotate pairs, so it must "
                        "be even")
    if config.head_dim not in (None, config.qk_rope_head_dim):
        raise UserError(f"model.head_dim: {config.head_dim}, but with latent attention qk_nope_head_dim, qk_rope_head_dim and "
                        "v_head_dim set the dimensions of the heads; leave it out")
    if config.num_key_value_heads != config.num_attention_heads:
        raise UserError(f"model.num_key_value_heads: {config.num_key_value_heads}, but latent attention has one latent for all "
                        f"{config.num_attention_heads} heads; leave it out")
    config.head_dim = config.qk_rope_head_dim  # only this part is rotated


def _check_experts(config: ModelConfig):
    if config.num_experts is None:
        return
    if config.moe_intermediate_size is None:
        config.moe_intermediate_size = config.intermediate_size
    experts, groups = config.num_experts, config.n_group
    if config.num_experts_per_tok > experts:
        raise UserError(f"model.num_experts_per_tok: {config.num_experts_per_tok} must be between 1 and num_experts {experts}")
    if experts % groups:
        raise UserError(f"model.n_group: num_experts {experts} is not divisible by {groups} groups; choose a divisor")
    if not 1 <= config.topk_group <= groups or config.topk_group * (experts // groups) < config.num_experts_per_tok:
        raise UserError(f"model.topk_group: {config.topk_group} must be at most n_group {groups}, with at least "
                        f"num_experts_per_tok {config.num_experts_per_tok} experts in these groups of {experts // groups}")
    if groups > 1 and experts // groups < 2:
        raise UserError(f"model.n_group: {groups} groups have 1 expert each; use fewer groups (a group is scored by its top 2)")
    if config.router_bias_update_speed and config.scoring_func != "sigmoid":
        raise UserError("model.router_bias_update_speed: requires model.scoring_func sigmoid")
    with suppress(ValueError, TypeError):
        config.mlp_only_layers = [int(layer) for layer in config.mlp_only_layers or ()]
    if not all(isinstance(layer, int) and 0 <= layer < config.num_hidden_layers for layer in config.mlp_only_layers or ()):
        raise UserError(f"model.mlp_only_layers: {config.mlp_only_layers} must be layer indices from 0 to "
                        f"{config.num_hidden_layers - 1}")
    config.mlp_only_layers = sorted(set(config.mlp_only_layers or ())) or None


def _check_layer_types(config: ModelConfig):
    if config.layer_types is None:
        return
    if len(config.layer_types) != config.num_hidden_layers:
        raise UserError(f"model.layer_types: expected {config.num_hidden_layers} values (one per layer), found "
                        f"{len(config.layer_types)}")
    unknown = set(config.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"model.layer_types: unknown {sorted(unknown)}; use full_attention or sliding_attention")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise UserError("model.layer_types: sliding_attention requires model.sliding_window")
    same = "sliding_attention" if config.sliding_window else "full_attention"
    if all(kind == same for kind in config.layer_types):  # equal architectures get equal configs
        config.layer_types = None
    elif all(kind == "full_attention" for kind in config.layer_types):
        config.layer_types = config.sliding_window = None


def _check_rope_scaling(config: ModelConfig):
    if config.rope_scaling is None:
        return
    scaling = dict(config.rope_scaling)
    kind = scaling["rope_type"] = scaling.pop("rope_type", scaling.pop("type", None))
    scaling.pop("type", None)
    if kind not in ROPE_TYPES:
        raise UserError(f"model.rope_scaling: rope_type '{kind}' is not one of {', '.join(ROPE_TYPES)}")
    if unknown := set(scaling) - {"rope_type", *ROPE_TYPES[kind]}:
        key = sorted(unknown)[0]
        raise UserError(f"model.rope_scaling: rope_type {kind} has no '{key}'{suggestion(key, ROPE_TYPES[kind])}")
    required = ROPE_TYPES[kind] if kind == "llama3" else ROPE_TYPES[kind][:1]
    missing = [key for key in required if scaling.get(key) is None]
    if missing:
        raise UserError(f"model.rope_scaling: rope_type {kind} requires {', '.join(missing)}")
    for key, value in scaling.items():
        low = 1 if key in ("factor", "original_max_position_embeddings") else 0
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in ("rope_type", "truncate") and value is not None and not (number and low <= value < math.inf):
            raise UserError(f"model.rope_scaling: {key} {value!r} must be a number of at least {low}")
    defaults = {"low_freq_factor": 0, "high_freq_factor": 0} if kind == "llama3" else {"beta_slow": 1, "beta_fast": 32}
    (slow_key, slow), (fast_key, fast) = ((key, scaling.get(key) or default) for key, default in defaults.items())
    if kind in ("llama3", "yarn") and (slow > fast or (kind == "llama3" and slow == fast)):
        raise UserError(f"model.rope_scaling: {slow_key} {slow} must be below {fast_key} {fast}")
    config.rope_scaling = None if kind == "default" else scaling

# -- attention kernels of other packages


def _flash(q, k, v, ragged: Ragged, window: int | None, dropout: float) -> Tensor:
    """flash-attn (Dao 2023): q (n, H, D), k and v (n, H_kv, D) of concatenated sequences."""
    from flash_attn import flash_attn_varlen_func

    reach = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(q, k, v, ragged.starts, ragged.starts, ragged.longest, ragged.longest, dropout_p=dropout,
                                  causal=True, window_size=reach)


def _varlen(q, k, v, ragged: Ragged, window: int | None, dropout: float) -> Tensor:
    """FlashAttention in torch. Older releases do not support grouped-query attention, so key and value heads are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if grouped and "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        grouped, k, v = {}, *(states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    reach = (-1, 0) if window is None else (window - 1, 0)
    return varlen_attn(q, k, v, ragged.starts, ragged.starts, ragged.longest, ragged.longest, window_size=reach, **grouped)


def _xformers(q, k, v, ragged: Ragged, window: int | None, dropout: float) -> Tensor:
    """xformers' memory-efficient attention (Rabe 2021)."""
    from xformers.ops import fmha

    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(ragged.starts.diff().tolist())
    bias = bias if window is None else bias.make_local_attention(window)
    return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, p=dropout)[0]


@memoize
def reads_pages(device: torch.device) -> bool:
    """Whether `attend_pages` runs on this device; Triton needs a C compiler."""
    return device.type == "cuda" and _installed("triton") and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


SPLIT = 256  # keys of one program


def attend_pages(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, tables: Tensor, longest: int, page: int,
                 window: int | None) -> Tensor:
    """Attention of single tokens to the states of their sequences in any pages (PagedAttention, Kwon 2023).

    query (H, N, D), key and value (H_kv, slots, D), positions (N or more,), tables (N, pages) -> (H, N, D). One query cannot
    occupy a GPU, so its keys are split between programs (Flash-Decoding, Dao 2023). The result is the average of their outputs,
    weighted with their sums of exponentials."""
    heads, count, width = query.shape
    splits = -(-longest // SPLIT)
    parts = torch.empty(count, heads, splits, width, device=query.device, dtype=query.dtype if splits == 1 else torch.float32)
    sums = torch.empty(count, heads, splits, device=query.device)  # logarithms
    group = heads // len(key)
    sizes = {"GROUP": group, "ROWS": max(16, 1 << (group - 1).bit_length()), "WIDTH": width,
             "PADDED": max(16, 1 << (width - 1).bit_length()), "SPLIT": SPLIT}
    query = query.transpose(0, 1).contiguous()  # (N, H, D)
    with torch.cuda.device_of(query):
        _pages_kernel()[(count, len(key), splits)](query, key, value, positions, tables, parts, sums, width**-0.5,
                                                   window or 2**30, page, key.shape[1], tables.shape[1], **sizes)
    output = parts[:, :, 0] if splits == 1 else (parts * sums.softmax(-1)[..., None]).sum(2)
    return output.to(query.dtype).transpose(0, 1)  # (H, N, D)


@memoize
def _pages_kernel():
    global triton, tl  # the kernel looks these names up in the module
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(query, key, value, positions, tables, parts, sums, scale, window, page, slots, columns, GROUP: tl.constexpr,
               ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr):
        # A program computes 1 token, 1 key head with its GROUP query heads, and SPLIT keys. Sizes are padded to powers of two.
        token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        splits = tl.num_programs(2)
        stop = tl.load(positions + token) + 1
        first = tl.maximum(stop - window, 0)
        query_head, dim, key_number = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, 64)
        row = token * tl.num_programs(1) * GROUP + head * GROUP + query_head  # rows of (N * H)
        real = (query_head[:, None] < GROUP) & (dim[None, :] < WIDTH)
        q = tl.load(query + row[:, None] * WIDTH + dim[None, :], mask=real, other=0.0)
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([ROWS, PADDED], tl.float32)
        begin = tl.maximum(first, split * SPLIT) // 64 * 64
        for start in range(begin, tl.minimum(stop, (split + 1) * SPLIT), 64):
            position = start + key_number
            inside = (position >= first) & (position < stop)
            slot = tl.load(tables + token * columns + position // page, mask=inside, other=0) * page + position % page
            states = (head * slots + slot)[:, None] * WIDTH + dim[None, :]
            valid = inside[:, None] & (dim[None, :] < WIDTH)
            k, v = tl.load(key + states, mask=valid, other=0.0), tl.load(value + states, mask=valid, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            decay = tl.exp(highest - higher)
            total = total * decay + tl.sum(weights, 1)
            output = output * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            highest = higher
        total = tl.where(total > 0, total, 1.0)  # a split without keys
        tl.store(parts + (row * splits + split)[:, None] * WIDTH + dim[None, :], output / total[:, None], mask=real)
        tl.store(sums + row * splits + split, highest + tl.log(total), mask=query_head < GROUP)

    return kernel


class Kernel(NamedTuple):
    """An attention kernel, and the tensors that it supports."""

    attend: Callable
    ragged: bool = False  # takes concatenated sequences
    float32: bool = True
    dropout: bool = True
    device: str = ""  # required device type; "" is any
    needs: str = ""  # required package

    def serves(self, device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
        """Whether the kernel supports tensors of this device and dtype. A model may be on the CPU of a machine with a GPU."""
        if dtype == torch.float32 and not self.float32 or dropout and not self.dropout or self.device not in ("", device.type):
            return False
        return self.float32 or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


KERNELS = {  # model.attn_implementation
    "auto": Kernel(attend_auto),
    "eager": Kernel(attend_eager),
    "sdpa": Kernel(attend_sdpa),
    "flash_attention_2": Kernel(_flash, True, float32=False, device="cuda", needs="flash_attn"),
    "varlen": Kernel(_varlen, True, float32=False, dropout=False, device="cuda"),
    "xformers": Kernel(_xformers, True, device="cuda", needs="xformers"),
}


def why_not(name: str) -> str | None:
    """The reason why a kernel cannot run here, or None."""
    kernel = KERNELS[name]
    if kernel.device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if kernel.needs and not _installed(kernel.needs):
        return f"needs `pip install {kernel.needs.replace('_', '-')}`"
    return None


def choose_attention(name: str) -> tuple[Callable, list[Kernel]]:
    """The kernels for a value of model.attn_implementation: one that takes masks, and a list for concatenated sequences, the
    fastest first. auto: flash-attn if installed, torch's varlen kernel on CUDA, else torch's scaled_dot_product_attention."""
    if name == "auto":
        return attend_auto, [KERNELS[ragged] for ragged in ("flash_attention_2", "varlen") if why_not(ragged) is None]
    if name not in KERNELS:
        raise UserError(f"model.attn_implementation: '{name}' is not one of {', '.join(KERNELS)}")
    if reason := why_not(name):
        raise UserError(f"model.attn_implementation: {name} {reason}; sdpa uses torch's fused kernels")
    return (attend_sdpa, [KERNELS[name]]) if KERNELS[name].ragged else (KERNELS[name].attend, [])


def library(name: str, need: str):
    """Import an optional package. The error of a missing one starts with `need`, such as "adapters need"."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it prints messages about kernels to download, and type casts
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{need} `pip install {name.partition('.')[0]}`") from None


@memoize
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None

# -- building


class MaskedHead(nn.Module):
    """BERT's output head: a dense layer before the product with the embedding's weights, and a bias for each token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm = NORMS[config.norm_type](config.hidden_size, config.rms_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(hidden))))


class PooledHead(nn.Module):
    """BERT's score head: a dense layer, tanh, dropout, and a linear layer with bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(hidden))))


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without initial values: nn.Embedding initializes it, which on `meta` imports torch's compiler (2 s)."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of any model, which are compiled and sharded separately."""
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    return layers or list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute the layers' activations in the backward pass instead of storing them (Chen 2016)."""
    for module in model.modules():
        if isinstance(module, Decoder):
            module.gradient_checkpointing = on
        elif isinstance(module, ForeignModel) and on:
            module.inner.gradient_checkpointing_enable({"use_reentrant": False})


@memoize
def settle_vector_functions() -> None:
    """Call each vector function of Intel's MKL on one element.

    MKL selects a function's code at its first call. If that call runs on several threads, one of them may use a low-accuracy
    version (https://github.com/pytorch/pytorch/issues/188792): in some processes the first cosine was off by 1.5e-4.
    A call on one element runs on one thread.
    """
    for dtype in (torch.float32, torch.float64):
        element = torch.ones(1, dtype=dtype, device="cpu")  # models are built on meta
        for name in ("cos", "sin", "tan", "acos", "asin", "atan", "exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "tanh",
                     "erf", "erfc"):
            getattr(torch, name)(element)


def build(config: ModelConfig | str | dict, head: str | tuple = "lm", seed: int = 0, attn_implementation: str = "auto",
          device=None) -> Transformer:
    """A model with random weights from a ModelConfig, a preset's name, or a dict of settings (with or without "preset").
    device="meta" allocates no memory."""
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


@torch.no_grad()
def grow_vocabulary(model: LanguageModel, size: int) -> None:
    """Grow the embedding and the output head to `size` rows; new rows are initialized to the mean of the old rows."""
    old = model.config.vocab_size
    if size <= old:
        return
    if isinstance(model, ForeignModel):
        model.inner.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.inner.get_input_embeddings(), model.inner.get_output_embeddings()):
            for rows in module.parameters(recurse=False) if module is not None else ():
                rows[old:] = rows[:old].mean(0)  # transformers would initialize them at random at each load
        model.config.vocab_size, model.new_ids = size, list(range(old, size))
        return
    head = getattr(model.lm_head, "decoder", model.lm_head) if "lm" in model.heads else None
    for module in (model.model.embed_tokens, head):
        for name, rows in list(module.named_parameters()) if module is not None else ():
            setattr(module, name, nn.Parameter(torch.cat((rows, rows.mean(0, keepdim=True).expand(size - old, *rows.shape[1:])))))
    model.model.embed_tokens.num_embeddings = size
    if head is not None:
        head.out_features = size
    model.config.vocab_size = size
    model.new_ids = list(range(old, size))
    model.tie_weights()

# -- architectures run by transformers


@dataclass
class ForeignConfig:
    """The settings that the stages need of a model that transformers runs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    labels: list | None = None
    num_labels: int = 1
    causal: bool = True
    eos_ids = ModelConfig.eos_ids


class ForeignModel(LanguageModel):
    """A causal LM of any architecture in transformers, with the forward pass of transformers.

    Each document becomes a right-padded row with an attention mask, and `INFER` calls the model's `generate`. This is slower
    than `Transformer`, which packs documents into rows and batches requests in one cache, but correct for all architectures:
    many do not take position ids, apply windows by index in their cache, or have a recurrent state.
    """

    caches = False

    def __init__(self, inner: nn.Module, head: str | tuple = "lm", labels: list | None = None):
        super().__init__()
        self.inner = inner
        c = inner.config.get_text_config()
        context = next((getattr(c, key) for key in CONTEXT_KEYS if getattr(c, key, None)), 2048)
        self.config = ForeignConfig(c.model_type, c.vocab_size, c.hidden_size, c.num_hidden_layers, context, c.bos_token_id,
                                    c.eos_token_id, c.pad_token_id, c.tie_word_embeddings, labels,
                                    len(labels or ()) or c.num_labels)
        self.add_heads(head, c.hidden_size, self.config.num_labels)
        if "lm" not in self.heads and not c.tie_word_embeddings and inner.get_output_embeddings() is not None:
            inner.get_output_embeddings().requires_grad_(False)  # no output depends on it

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    @property
    def follows_length(self) -> bool:
        """Whether the rotary angles depend on the longest row of a batch."""
        c = self.inner.config.get_text_config()
        rope = getattr(c, "rope_parameters", None) or {}
        inner = [value for value in rope.values() if isinstance(value, dict)]
        return any(table.get("rope_type") in ("dynamic", "longrope") for table in (rope, *inner))

    def tie_weights(self) -> None:
        self.inner.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def head_logits(self, hidden: Tensor) -> Tensor:
        return hidden[..., : self.config.vocab_size]  # `backbone` already returns logits

    def head_input(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.config.vocab_size :] if "lm" in self.heads else hidden

    def backbone(self, input_ids, positions, cache, segment_ids, token_types, keep: bool):
        """Logits instead of hidden states, since each architecture computes them differently, then the value head's input."""
        if token_types is not None:
            raise ValueError("this model has no token types")
        if cache is not None:
            raise ValueError("this model has no KVCache; call inner.generate")
        if positions is None and segment_ids is None:
            hidden, *states = self._run(input_ids, keep)
        else:
            hidden, *states = self._by_document(input_ids, positions, segment_ids, keep)
        return hidden, states, []

    def _run(self, input_ids: Tensor, keep: bool, mask: Tensor | None = None) -> list[Tensor]:
        """Right-padded rows -> [logits (B, T, V) or hidden states (B, T, C)], followed by all hidden states if `keep`."""
        lm, keep_all = "lm" in self.heads, keep or "value" in self.heads
        network = self.inner if lm else self.inner.base_model
        out = network(input_ids=input_ids, attention_mask=mask, use_cache=False, output_hidden_states=keep_all)
        if keep_all and not out.hidden_states:
            raise UserError(f"model.name: this method needs hidden states, which transformers does not return for "
                            f"{self.config.model_type}")
        hidden = out.logits if lm else out.last_hidden_state
        if "value" in self.heads:
            hidden = torch.cat((hidden, out.hidden_states[-1]), -1) if lm else hidden
        return [hidden, *(out.hidden_states if keep else ())]

    def _by_document(self, input_ids: Tensor, positions: Tensor | None, segment_ids: Tensor | None, keep: bool) -> list[Tensor]:
        """Compute each document as a separate row, in batches of similar length."""
        batch, length = input_ids.shape
        segments = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
        real = torch.ones_like(input_ids, dtype=torch.bool) if positions is None else (positions >= 0).expand_as(input_ids)
        if not real.any():  # only padding: compute one token, so that every weight gets a gradient
            real = torch.arange(batch * length, device=real.device).view_as(real) == 0
        rows = torch.arange(batch, device=input_ids.device)[:, None].expand_as(input_ids)
        _, number, sizes = torch.stack((rows[real], segments[real])).unique(dim=1, return_inverse=True, return_counts=True)
        indices = real.flatten().nonzero()[:, 0][number.argsort(stable=True)]  # into the flattened batch, by document
        # With sharded weights, each process must call the model equally often.
        sharded = any(hasattr(weight, "full_tensor") for weight in self.parameters())
        if sharded and self.follows_length:
            raise UserError(f"training.fsdp: not supported for this {self.config.model_type}, whose rotary angles depend on "
                            "each sequence's length; set it to false")
        ratio, groups = math.inf if sharded else 1.0 if self.follows_length else 1.25, []
        for document in sorted(indices.split(sizes.tolist()), key=len):
            if not groups or len(document) > ratio * len(groups[-1][0]):
                groups.append([])
            groups[-1].append(document)
        parts = []
        for group in groups:
            ids = nn.utils.rnn.pad_sequence([input_ids.flatten()[document] for document in group], batch_first=True)  # (R, L)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in group], batch_first=True)
            full = all(len(document) == ids.shape[1] for document in group)
            parts.append([result[mask.bool()] for result in self._run(ids, keep, None if full else mask)])  # (N, C)
        order = torch.cat([document for group in groups for document in group])
        return [part[0].new_zeros(batch * length, part[0].shape[-1]).index_copy(0, order, torch.cat(part)).view(batch, length, -1)
                for part in zip(*parts, strict=True)]  # (B, T, C)


def is_causal(inner: nn.Module) -> bool:
    """Whether attention is causal: changing the last token does not change the first token's logits."""
    ids = torch.zeros(2, 4, dtype=torch.long, device=inner.device)
    ids[1, -1] = 1
    with torch.no_grad():
        first, second = inner(input_ids=ids, use_cache=False).logits[:, 0]
    return bool((first - second).abs().max() <= 1e-3 * first.std())

# -- config.json and tensor names of each family


class Family(NamedTuple):
    """A model type's keys in config.json, and its tensor names."""

    prefix: str  # of class names
    has: tuple  # knobs with a key, in addition to `_SHARED`
    implied: dict  # values of knobs without a key
    defaults: dict  # values of absent keys
    names: dict = {}  # knob -> key, if they differ
    base: tuple = ("model", "embed_tokens", "layers", "norm")  # prefix of the tensor names, then what may follow it
    parts: tuple = ()  # (part of a tensor name here, in the family's files)
    needs: tuple = ()  # knobs that must be set


_SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
           "head_dim", "max_position_embeddings", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
           "attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "num_labels")
_DEFAULTS = dict(rms_norm_eps=1e-6, hidden_act="silu", rope_theta=10000.0, tie_word_embeddings=False, attention_bias=False,
                 initializer_range=0.02, max_position_embeddings=32768)
_MOE = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
_MLA = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
# GPT-2's Conv1D stores transposed weights.
_GPT2_PARTS = (("model.embed_tokens.", "transformer.wte."), ("model.embed_positions.", "transformer.wpe."),
               ("model.layers.", "transformer.h."), ("model.norm.", "transformer.ln_f."),
               (".input_layernorm.", ".ln_1."), (".post_attention_layernorm.", ".ln_2."), (".mlp.up_proj.", ".mlp.c_fc."),
               (".mlp.down_proj.", ".mlp.c_proj."), (".self_attn.qkv_proj.", ".attn.c_attn."),
               (".self_attn.o_proj.", ".attn.c_proj."))
_BERT_PARTS = (("model.embed_tokens.", "bert.embeddings.word_embeddings."),
               ("model.embed_positions.", "bert.embeddings.position_embeddings."),
               ("model.embed_types.", "bert.embeddings.token_type_embeddings."),
               ("model.embed_norm.", "bert.embeddings.LayerNorm."), ("model.layers.", "bert.encoder.layer."),
               (".input_layernorm.", ".attention.output.LayerNorm."), (".self_attn.o_proj.", ".attention.output.dense."),
               (".self_attn.q_proj.", ".attention.self.query."), (".self_attn.k_proj.", ".attention.self.key."),
               (".self_attn.v_proj.", ".attention.self.value."), (".post_attention_layernorm.", ".output.LayerNorm."),
               (".mlp.up_proj.", ".intermediate.dense."), (".mlp.down_proj.", ".output.dense."),
               ("lm_head.dense.", "cls.predictions.transform.dense."), ("lm_head.norm.", "cls.predictions.transform.LayerNorm."),
               ("lm_head.decoder.bias", "cls.predictions.bias"), ("lm_head.decoder.", "cls.predictions.decoder."),
               ("score.dense.", "bert.pooler.dense."), ("score.out_proj.", "classifier."))
FAMILIES = {
    "llama": Family("Llama", ("mlp_bias",), {}, dict(_DEFAULTS, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)),
    "mistral": Family("Mistral", ("sliding_window",), {"attention_bias": False},
                      dict(_DEFAULTS, num_key_value_heads=8, sliding_window=4096, bos_token_id=1, eos_token_id=2,
                           max_position_embeddings=131072)),
    "qwen2": Family("Qwen2", ("sliding_window", "layer_types"), {"attention_bias": True},
                    dict(_DEFAULTS, num_key_value_heads=32)),
    "qwen3": Family("Qwen3", ("sliding_window", "layer_types"), {"qk_norm": True},
                    dict(_DEFAULTS, num_key_value_heads=32, head_dim=128)),
    "mixtral": Family("Mixtral", ("sliding_window", *_MOE), {"attention_bias": False},
                      dict(_DEFAULTS, rms_norm_eps=1e-5, num_key_value_heads=8, num_experts=8, rope_theta=1e6, bos_token_id=1,
                           eos_token_id=2, max_position_embeddings=131072, router_aux_loss_coef=0.001),
                           {"num_experts": "num_local_experts"},
                      parts=((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."),
                             (".down_proj.", ".w2.")),
                      needs=("num_experts",)),
    "qwen3_moe": Family("Qwen3Moe", ("sliding_window", "moe_intermediate_size", "mlp_only_layers", "norm_topk_prob", *_MOE),
                        {"qk_norm": True},
                        dict(_DEFAULTS, num_key_value_heads=4, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
                             norm_topk_prob=False, router_aux_loss_coef=0.001), needs=("num_experts",)),
    "deepseek_v3": Family("DeepseekV3",
                          ("moe_intermediate_size", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor", "n_group",
                                         "topk_group", "seq_aux", "router_bias_update_speed", *_MOE, *_MLA),
                                         {"scoring_func": "sigmoid"},
                          dict(_DEFAULTS, num_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1,
                               n_group=8, topk_group=4, routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536,
                               rope_interleave=True, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1),
                          {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
                          needs=("num_experts", "kv_lora_rank")),
    "gpt2": Family("GPT2", ("resid_pdrop", "embd_pdrop"),
                   {k: _GPT2[k] for k in ("norm_type", "mlp_gated", "attention_bias", "attention_out_bias", "mlp_bias",
                                          "fused_qkv", "position_embedding_type")},
                   dict(hidden_act="gelu_new", rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.02,
                        attention_dropout=0.1, resid_pdrop=0.1, embd_pdrop=0.1, vocab_size=50257, bos_token_id=50256,
                        eos_token_id=50256, max_position_embeddings=1024),
                   dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
                        max_position_embeddings="n_positions", intermediate_size="n_inner", attention_dropout="attn_pdrop",
                        hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon"),
                   ("transformer", "wte", "wpe", "h", "ln_f"), _GPT2_PARTS),
    "bert": Family("Bert", ("resid_pdrop", "embd_pdrop", "type_vocab_size"),
                   {k: v for k, v in _BERT.items() if k in _BERT_IMPLIES},
                   dict(vocab_size=30522, hidden_act="gelu", rms_norm_eps=1e-12, tie_word_embeddings=True, initializer_range=0.02,
                        attention_dropout=0.1, resid_pdrop=0.1, embd_pdrop=0.1, type_vocab_size=2, pad_token_id=0,
                        max_position_embeddings=512),
                   dict(rms_norm_eps="layer_norm_eps", resid_pdrop="hidden_dropout_prob", embd_pdrop="hidden_dropout_prob",
                        attention_dropout="attention_probs_dropout_prob"),
                   ("bert", "embeddings", "encoder", "pooler"), _BERT_PARTS, ("type_vocab_size",)),
}
ALIASES = {"kimi_k2": "deepseek_v3"}  # the same architecture under another name
KNOBS = {f.name: f for f in dataclasses.fields(ModelConfig)}
HEAD_CLASSES = {"ForCausalLM": ("lm",), "LMHeadModel": ("lm",), "ForMaskedLM": ("lm",), "ForPreTraining": ("lm",),
                "ForSequenceClassification": ("score",)}
CUSTOM = "custom"  # model_type of an architecture that matches no Hugging Face class


def config_from_hub(raw: dict) -> ModelConfig:
    """A Hugging Face config.json -> ModelConfig. RoPE is read from v4's keys (rope_theta, rope_scaling) and from v5's
    (rope_parameters); keys without a meaning here are ignored."""
    kind = raw.get("model_type")
    kind = ALIASES.get(kind, kind)
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
    if knobs.get("position_embedding_type") != "learned":
        # transformers prefers v4's key if both are set
        rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or family.defaults["rope_theta"]
        known = {"rope_type", "type", *ROPE_TYPES.get(rope.get("rope_type", rope.get("type")), ())}
        if raw.get("original_max_position_embeddings"):  # preferred to the key in rope_scaling
            rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        rope = {key: value for key, value in rope.items() if key in known}
        knobs.update(rope_theta=float(theta), rope_scaling=rope if rope.get("rope_type", rope.get("type")) else None)
    knobs["labels"] = hub_labels(raw)
    if folder_heads(raw) == ("score",) and "num_labels" not in raw:
        knobs["num_labels"] = 2  # transformers' default, which it does not save
    _family_quirks(kind, raw, knobs)
    return ModelConfig(**knobs)


def hub_labels(raw: dict) -> list[str] | None:
    """The label names of a config.json in order."""
    return [name for _, name in sorted(raw["id2label"].items(), key=lambda item: int(item[0]))] if raw.get("id2label") else None


def _hub_knobs(kind: str) -> list[str]:
    """The settings that have a key in a family's config.json."""
    learned = FAMILIES[kind].implied.get("position_embedding_type") == "learned"
    lacks = (*FAMILIES[kind].implied, *(("num_key_value_heads", "head_dim") if learned else ()),
             *(("head_dim",) if kind == "deepseek_v3" else ()))
    return [name for name in (*_SHARED, *FAMILIES[kind].has) if name not in lacks]


UNSUPPORTED = {  # family -> key: the only supported value
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "scale_attn_weights": True},
    "bert": {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
}


def _family_quirks(kind: str, raw: dict, knobs: dict) -> None:
    """Read keys that only some families have."""
    for key, only in UNSUPPORTED.get(kind, {}).items():
        if raw.get(key, only) != only:
            raise UserError(f"config.json: {key} {json.dumps(raw[key])} is not supported (only {json.dumps(only)})")
    layers = knobs.get("num_hidden_layers", 0)
    if kind == "gpt2":
        knobs["intermediate_size"] = knobs.get("intermediate_size") or 4 * knobs["hidden_size"]
    if kind in ("llama", "qwen3", "qwen3_moe", "deepseek_v3"):
        knobs["attention_out_bias"] = knobs["attention_bias"]
    if kind.startswith("qwen"):
        if not raw.get("use_sliding_window"):
            knobs["sliding_window"] = knobs["layer_types"] = None
        elif kind != "qwen3_moe" and not knobs.get("layer_types"):
            full = raw.get("max_window_layers", 28)
            knobs["layer_types"] = ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if kind == "qwen3_moe":
        knobs["num_experts"] = raw.get("num_experts", raw.get("num_local_experts", knobs["num_experts"]))  # v4, v5
        step = raw.get("decoder_sparse_step", 1)
        knobs["mlp_only_layers"] = [*(knobs.get("mlp_only_layers") or ()), *(i for i in range(layers) if (i + 1) % step)]
    if kind == "deepseek_v3":
        knobs["mlp_only_layers"] = list(range(min(raw.get("first_k_dense_replace", 3), layers)))


def tanh_gelu(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# What Hugging Face's classes compute under these names of hidden_act and in their norms (with weights of 1).
HUB_ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}
HUB_NORMS = {
    "rmsnorm": lambda x, eps: x * (x.square().mean() + eps).rsqrt(),
    "layernorm": lambda x, eps: (x - x.mean()) * (x.var(correction=0) + eps).rsqrt(),
}


@torch.no_grad()
def computes_as_hub(config: ModelConfig) -> bool:
    """Whether the functions behind hidden_act and norm_type are Hugging Face's. A fork may have added or replaced some, so the
    values are compared, not the names."""
    if config.hidden_act not in HUB_ACTIVATIONS or config.norm_type not in HUB_NORMS:
        return False
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        numbers = torch.arange(-5.0, 5.0, 0.37)
        activated = torch.tensor([HUB_ACTIVATIONS[config.hidden_act](x) for x in numbers.tolist()])
        normalized, norm = HUB_NORMS[config.norm_type](numbers, 0.5), NORMS[config.norm_type](len(numbers), 0.5)
        return (torch.allclose(ACTIVATIONS[config.hidden_act](numbers), activated, atol=1e-5)
                and torch.allclose(norm(numbers), normalized, atol=1e-5))


def config_to_hub(config: ModelConfig, heads: tuple = ("lm",), custom: bool = False) -> dict:
    """ModelConfig -> config.json, under the first family that computes exactly these knobs; model_type custom is kept."""
    own = dataclasses.asdict(config)
    custom = custom or config.model_type == CUSTOM or not computes_as_hub(config)
    for kind in () if custom else sorted(FAMILIES, key=lambda k: k != config.model_type):
        family = FAMILIES[kind]
        raw = {family.names.get(name, name): own[name] for name in _hub_knobs(kind)}
        raw["model_type"] = kind
        if config.labels:
            raw["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
            raw["label2id"] = {name: i for i, name in enumerate(config.labels)}
        if family.implied.get("position_embedding_type") != "learned":
            rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
            # v5 reads the first, v4 the others
            raw.update(rope_parameters=rope, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
        if kind.startswith("qwen"):
            raw["use_sliding_window"] = config.sliding_window is not None
            raw["max_window_layers"] = (config.layer_types or []).count("full_attention")
        if kind == "qwen3_moe":
            raw.update(decoder_sparse_step=1, mlp_only_layers=config.mlp_only_layers or [])
        if kind == "deepseek_v3":
            raw.update(UNSUPPORTED[kind], first_k_dense_replace=len(config.mlp_only_layers or ()), num_nextn_predict_layers=0)
        try:
            same = dataclasses.replace(config_from_hub(raw), model_type=config.model_type) == config
        except UserError:
            same = False
        if same and all(own[name] for name in family.needs):
            if heads != ("score",) and config.num_labels == 1:
                del raw["num_labels"]
            head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM" if config.causal else "ForMaskedLM"
            return {"architectures": [family.prefix + ("ForSequenceClassification" if heads == ("score",) else head)], **raw}
    return {"architectures": ["CustomForSequenceClassification" if heads == ("score",) else "Custom"], **own,
            "model_type": CUSTOM}


def say_portability(config: ModelConfig) -> None:
    """Print a line if a model cannot be saved as the family that its config names."""
    kind = config_to_hub(config)["model_type"]
    if kind == CUSTOM:
        say("model: this architecture matches no Hugging Face class, so only this program can open the folder")
    elif kind != config.model_type:
        say(f"model.model_type: a {config.model_type} has other settings; the folder will be saved as {kind}")


# Tensors of published files that are not needed.
KNOWN_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.attn\.(bias|masked_bias)$|embeddings\.position_ids$"
                           r"|^cls\.seq_relationship\.")


def hub_name(kind: str, name: str, back: bool = False) -> str:
    """For gpt2: model.layers.0.self_attn.o_proj.weight -> transformer.h.0.attn.c_proj.weight; `back` is the inverse."""
    for part, hub_part in FAMILIES[kind].parts if kind in FAMILIES else ():
        name = name.replace(hub_part, part) if back else name.replace(part, hub_part)
    return name


def weights_to_hub(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict -> the names and layouts of Hugging Face's files, with one tensor per expert."""
    hub = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj") and kind != CUSTOM:
            stem = name.removesuffix("gate_up_proj")
            parts = {f"{stem}{e}.{part}_proj.weight": half for e, both in enumerate(tensor)
                     for part, half in zip(("gate", "up"), both.chunk(2), strict=True)}
        elif name.endswith("experts.down_proj") and kind != CUSTOM:
            parts = {name.replace("down_proj", f"{e}.down_proj.weight"): weight for e, weight in enumerate(tensor)}
        else:
            parts = {name: tensor}
        for name, part in parts.items():
            name = hub_name(kind, name)
            hub[name] = part.t() if kind == "gpt2" and re.search(r"\.c_\w+\.weight$", name) else part
    if kind == "bert" and "lm_head.decoder.weight" in state:  # the bias of an untied head has two names
        hub["cls.predictions.decoder.bias"] = hub["cls.predictions.bias"].clone()
    # Safetensors files cannot contain views of a shared storage, so an expert is copied out of its stack.
    return {name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for name, tensor in hub.items()}


class Part(NamedTuple):
    """A tensor of a hub file as a part of a parameter: parameter name, index of the part (such as an expert; () is all)."""

    name: str
    index: tuple
    tensor: Tensor


def weights_from_hub(config: ModelConfig, name: str, tensor: Tensor, extra_layers: int = 0) -> list[Part]:
    """A tensor of a hub file -> the parameter that it is a part of; an empty list for a known tensor that is not needed, such as
    those of DeepSeek-V3's extra layers for multi-token prediction."""
    kind = config.model_type
    if KNOWN_BUFFERS.search(name):
        return []
    prefix, *bare = FAMILIES[kind].base if kind in FAMILIES else ("",)
    if name.split(".")[0] in bare:  # saved from the base class, without the prefix
        name = f"{prefix}.{name}"
    if kind == "bert":
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")  # the same bias has two names
    if kind == "gpt2" and re.search(r"\.c_\w+\.weight$", name):
        tensor = tensor.t()
    name = hub_name(kind, name, back=True)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and 0 <= int(layer[1]) - config.num_hidden_layers < extra_layers:
        return []
    if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight(|_packed|_scale|_shape)", name):
        stem, number, part, inner = expert[1], int(expert[2]), expert[3], config.moe_intermediate_size or 0
        suffix = {"": "{}", "_packed": "parametrizations.{}.original", "_scale": "parametrizations.{}.0.scale"}.get(expert[4])
        if suffix is None:  # shapes of quantized weights are not needed
            return []
        if part == "down":
            return [Part(f"{stem}.{suffix.format('down_proj')}", (number,), tensor)]
        rows = slice(0, inner) if part == "gate" else slice(inner, None)
        return [Part(f"{stem}.{suffix.format('gate_up_proj')}", (number, rows), tensor)]
    return [Part(name, (), tensor)]

# -- files


@contextmanager
def staged(folder: str | Path, key: str = "", parts: str = ""):
    """A temporary folder inside `folder`; on success, its files are moved into `folder`, each by an atomic rename.

    `key` is the file that a program needs to open the folder (config.json). If the key or more than one file of `parts` (a glob)
    changes, the key is removed first and written last. A kill in between then leaves a folder that cannot be opened, instead of
    a mixture of old and new files. Files of `parts` that are not written again are removed.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        yield scratch
        new = {path.name for path in scratch.iterdir()}
        stale = [path for path in folder.glob(parts) if path.name not in new] if parts else []
        several = key and len([*scratch.glob(parts), *stale]) > 1
        if key and (folder / key).exists() and (several or (folder / key).read_bytes() != (scratch / key).read_bytes()):
            (folder / key).unlink()
        for name in sorted(new, key=lambda name: (name == key, name)):
            path = scratch / name
            path.chmod(0o666 & ~_umask())
            sync(path)
            if name == key:
                for old in stale:
                    old.unlink()
            os.replace(path, folder / name)
    except Exception as error:
        if is_disk_full(error, folder):  # some libraries raise exceptions without an errno
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_disk_full(error: Exception, folder: Path) -> bool:
    known = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    # torch.save says only "iostream error", and NumPy how many bytes it wrote
    return known or (isinstance(error, (RuntimeError, OSError)) and shutil.disk_usage(folder).free < 2**20)


@memoize
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file atomically."""
    with staged(Path(path).parent) as scratch:
        (scratch / Path(path).name).write_text(text, encoding="utf-8")


CHECKSUMS = "checksums.json"


def checksum(path: Path) -> int:
    """CRC-32 of a file, computed once for each version of it."""
    status = path.stat()
    return _checksum(path.resolve(), status.st_size, status.st_mtime_ns)


@memoize
def _checksum(path: Path, size: int, modified: int) -> int:
    value = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            value = zlib.crc32(part, value)
    return value


def write_checksums(folder: Path, paths: Iterable[Path]) -> None:
    """Write the checksums of files to CHECKSUMS in a folder, for `damage`."""
    sums = {path.name: checksum(path) for path in sorted(paths)}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def damage(folder: Path, names: Iterable[str] = ()) -> str | None:
    """"FILE is missing or damaged", of the files in CHECKSUMS, or of those of them with these names; None if all are whole, or
    if earlier versions wrote no checksums."""
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name in names or sums:
            if name in sums and not ((folder / name).is_file() and checksum(folder / name) == sums[name]):
                return f"{folder / name} is missing or damaged"
    except (OSError, ValueError, TypeError):
        return f"{folder / CHECKSUMS} is missing or damaged"
    return None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{path}: expected an object, found {type(value).__name__}")
        return value
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def first_line(error: Exception) -> str:
    """The message of an exception as one line; torch writes the reason on the second line."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return (f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and lines[1:] else lines[0])[:240]

# -- saving


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the weights of an FSDP2 model for any number of forward passes per process. All processes must enter and leave."""
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root's weights are used first and last


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a possibly sharded tensor. All processes must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered_on_first(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU of the first process; an empty tensor on the others, which only send their shards, so that
    saving a sharded model needs no memory there. All processes must call."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    part, dist = tensor.to_local(), torch.distributed
    if process_rank() != 0:
        if len(part):
            dist.send(part.contiguous(), 0)
        return part.new_empty(0)
    parts, total = [part.cpu()], len(tensor)
    for rank in range(1, dist.get_world_size()):  # rows are split as by torch.chunk: the last parts are shorter or empty
        if rows := min(len(part), total - sum(map(len, parts))):
            received = part.new_empty(rows, *part.shape[1:])
            dist.recv(received, rank)
            parts.append(received.cpu())
    return torch.cat(parts)


WEIGHTS = "model*.safetensors*"


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write config.json, generation_config.json and safetensors (several files above 5 GB), as transformers does. If the model
    has an adapter, write only the adapter, as peft does.

    Sharded weights (FSDP2) are gathered, so all processes must call; the first process writes.

    Runs in: INFER.py, transformers, vLLM"""
    from huggingface_hub import save_torch_state_dict

    if model.adapter:
        return _save_adapter(model, folder)
    if isinstance(model, ForeignModel):
        state = {name: gathered_on_first(tensor) for name, tensor in model.state_dict().items()}
        if process_rank() == 0:
            quantized_here = model.quantization != "none" and not hasattr(model.inner.config, "quantization_config")
            if quantized_here:  # not by transformers
                import QUANT

                state = QUANT.to_hub(model, state)
                model.inner.config.quantization_config = QUANT.hub_config(model.inner, model.config.model_type)
            inner, state = (_with_score(model, state) if model.heads == ("score",) else
                            (model.inner,
                             {name.removeprefix("inner."): tensor
                              for name, tensor in state.items() if name.startswith("inner.")}))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.inner.generation_config, key, getattr(model.config, key))
            with staged(folder, "config.json", WEIGHTS) as scratch:
                inner.save_pretrained(scratch, state_dict=state)
            if quantized_here:
                del model.inner.config.quantization_config
        return
    state = {name: gathered_on_first(tensor) for name, tensor in model.state_dict().items()}
    if process_rank() != 0:
        return
    state = hub_tensors(model, state)
    with staged(folder, "config.json", WEIGHTS) as scratch:
        save_torch_state_dict(state, scratch, max_shard_size="5GB")
        _write_configs(model, scratch)
    _remove_adapter(folder)


def hub_tensors(model: Transformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a part of it, as they are stored."""
    if model.config.tie_word_embeddings:
        state.pop(model.tied_name, None)
    if model.quantization != "none":
        import QUANT

        state = QUANT.to_hub(model, state)
    if set(model.heads) != {"value"}:  # save the value head only of a separate critic
        state = {name: tensor for name, tensor in state.items() if not is_tool(name)}
    return weights_to_hub(hub_json(model)["model_type"], state)


def hub_json(model: Transformer) -> dict:
    """The config.json of a model."""
    heads = tuple(head for head in model.heads if head != "value") or model.heads
    raw = config_to_hub(model.config, heads)
    if model.quantization != "none" and raw["model_type"] == "gpt2":  # transformers' GPT-2 has Conv1D instead of Linear
        raw = config_to_hub(model.config, heads, custom=True)
    raw["dtype"] = str(model.dtype).removeprefix("torch.")
    return raw


def _write_configs(model: Transformer, scratch: Path) -> None:
    raw = hub_json(model)
    if model.quantization != "none":
        import QUANT

        raw["quantization_config"] = QUANT.hub_config(model, raw["model_type"])
        if model.config.model_type == "gpt2":
            say("model: transformers does not support this quantization of GPT-2, so only this program can open the folder")
    (scratch / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    write_generation_config(raw, scratch)


def write_generation_config(raw: dict, folder: Path) -> None:
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw.get(key) is not None}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def _remove_adapter(folder: str | Path) -> None:
    """Delete an adapter in the folder, since transformers would apply it to the model."""
    for name in ("config.json", "model.safetensors"):
        (Path(folder) / f"adapter_{name}").unlink(missing_ok=True)


@contextmanager
def saving(model: Transformer, folder: str | Path) -> Iterator[Callable[[nn.Module], None]]:
    """Save a model in parts: write(layer) saves the weights of a layer and frees their memory. Other weights are saved last."""
    layers = {*layers_of(model), model}
    names = {module: f"{name}." if name else "" for name, module in model.named_modules() if module in layers}
    with staged(folder, "config.json", WEIGHTS) as scratch:
        shards = Shards(scratch)

        def write(module: nn.Module) -> None:
            state = {names[module] + name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}
            shards.add(hub_tensors(model, state))
            module.to("meta")

        yield write
        write(model)
        shards.close()
        _write_configs(model, scratch)
    _remove_adapter(folder)


class Shards:
    """Writes safetensors files of about half a gigabyte each, with transformers' file names and index."""

    limit = 2**29  # bytes

    def __init__(self, folder: Path):
        self.folder, self.buffer, self.files, self.size = folder, {}, [], 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        self.buffer.update(tensors)
        if sum(tensor.nbytes for tensor in self.buffer.values()) > self.limit:
            self.flush()

    def flush(self) -> None:
        save_file(self.buffer, self.folder / f"{len(self.files)}", metadata={"format": "pt"})
        self.size += sum(tensor.nbytes for tensor in self.buffer.values())
        self.files.append([*self.buffer])
        self.buffer = {}

    def close(self) -> None:
        if self.buffer:
            self.flush()
        count = len(self.files)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
        for i, name in enumerate(names):
            (self.folder / str(i)).rename(self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self.files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _with_score(model: ForeignModel, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' sequence classification model of an architecture, on `meta`, and its weights."""
    import copy

    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.inner.config)
    config.id2label = dict(enumerate(label_names(model)))
    config.label2id = {label: i for i, label in config.id2label.items()}
    config.get_text_config().pad_token_id = model.config.pad_token_id
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(config)
    names = set(shell.state_dict())
    state = {name.removeprefix("inner."): tensor for name, tensor in state.items()}
    if names - set(state):
        raise UserError(f"model.name: cannot save a {model.config.model_type} classifier: transformers' class has the tensor "
                        f"{sorted(names - set(state))[0]}, which this model does not have")
    return shell, {name: state[name] for name in sorted(names)}


TOOLS = ("value_head.", "projections.")  # used in training only: a critic; projections of a student's hidden states
OPTIONAL = ("lm_head.", "score.", *TOOLS)  # heads: they may be missing from a file, or be in it without being requested


def is_tool(name: str) -> bool:
    """Whether a tensor is used in training only."""
    return name.startswith(TOOLS)

# -- loading


@memoize
def from_hub(name: str) -> Path:
    """Download a hub repository into the local cache; pickled weights only if it has no safetensors."""
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(name,
                                                    allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.bin"]))
    return folder


def resolve_folder(name: str, key: str = "model.name") -> Path:
    """The path of a local folder, or of a hub repository in the local cache; errors name the setting `key`."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(f"{key}: '{name}' is a file; give the folder with config.json and the weights")
    parent = Path(name).parent
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1 or "/" in str(name) and parent.is_dir():
        others = sorted({path.parent.name for path in parent.glob("*/*config.json")})
        raise UserError(f"{key}: folder not found: '{name}'" + f"; {parent} contains {', '.join(others[:9])}" * bool(others))
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError

        return from_hub(str(name))
    except HFValidationError:
        raise UserError(f"{key}: '{name}' is neither a folder nor a valid hub name") from None
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = textwrap.shorten(first_line(error), 120, placeholder=" ...")
        raise UserError(f"{key}: '{name}' is not a local folder and cannot be downloaded from the hub ({reason}); check its "
                        "spelling and the network") from None


def files_fingerprint(paths: list[Path]) -> str:
    """A digest of the names and sizes of files and of 64 samples of each file, which is fast for many gigabytes too."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for offset in range(0, size, max(size // 64, 2**16)):
                file.seek(offset)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def weights_fingerprint(name: str, key: str = "model.name") -> str:
    """A digest of the weights of a model, or of an adapter and its base."""
    folder = resolve_folder(name, key)
    patterns = ("*.safetensors", "*config.json", "pytorch_model*.bin")
    digests = [files_fingerprint(sorted(path for pattern in patterns for path in folder.glob(pattern)))]
    if (folder / "adapter_config.json").exists():
        digests.append(weights_fingerprint(base_and_adapter(name, key=key)[0], key))
    return " ".join(digests)


def model_folder(name: str, key: str = "model.name") -> Path:
    """`resolve_folder` for a finished model or adapter; the error for a missing folder names the program that creates it."""
    folder = Path(name)
    if name in PRESETS and not folder.is_dir():
        raise UserError(f"{key}: '{name}' is a preset without trained weights; train it first: python TRAIN.py --preset {name}")
    program = {"out": "TRAIN.py", "out/sft": "SFT.py", "out/rl": "RL.py", "out/distill": "DISTILL.py"}.get(folder.as_posix())
    if (folder.is_dir() or program) and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        if not folder.is_dir():
            raise UserError(f"{key}: folder not found: '{name}' (in {Path.cwd()}); train it first: python {program}")
        newest = max(folder.glob("ckpt-step-*"), default=None)
        hint = (f"use its newest checkpoint: --model {newest}" if newest else
                "GGUF files are for llama.cpp; use the folder that was exported" if any(folder.glob("*.gguf")) else
                f"train it first: python {program}" if program else "config.json is missing")
        raise UserError(f"{key}: {name} contains no finished model; {hint}")
    return resolve_folder(name, key)


def base_and_adapter(name: str, adapter: str | None = None, key: str = "model.name") -> tuple[str, str | None]:
    """Resolve a name to (model, adapter): the folder of an adapter becomes its base model and the adapter."""
    folder = model_folder(name, key)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = adapter_config(folder).base_model_name_or_path
        if not base:
            raise UserError(f"{folder}/adapter_config.json: base_model_name_or_path is missing; pass the base model as --model "
                            "and the adapter as --adapter")
        if adapter:
            raise UserError(f"{key}: {name} is an adapter; give its base model, {base}, or leave out --adapter")
        name, adapter, folder = base, name, model_folder(base, key)
    read_json(folder / "config.json")
    return name, adapter


def read_config(folder: Path) -> ModelConfig:
    """Read config.json, and the special token ids of generation_config.json."""
    try:
        config = config_from_hub(read_json(folder / "config.json"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder}/config.json: a key is missing or has the wrong type ({error})") from None
    read_generation_ids(folder, config)
    return config


def read_generation_ids(folder: Path, config: ModelConfig | ForeignConfig) -> None:
    """Read the special token ids of generation_config.json, which may list several end-of-text ids."""
    path = folder / "generation_config.json"
    for key, value in (read_json(path) if path.exists() else {}).items():
        if key in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            setattr(config, key, value)


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, selected as in transformers: safetensors before pickles, a single file before an index."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).exists():
            return [folder / stem]
        if (folder / f"{stem}.index.json").exists():
            weight_map = read_json(folder / f"{stem}.index.json").get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / stem}.index.json: weight_map is missing")
            names = sorted(set(weight_map.values()))
            return [folder / name for name in names]
    raise UserError(f"{folder}: contains no weights (model.safetensors or pytorch_model.bin); pass the folder of a finished run "
                    "or one of its ckpt-step-*")


def read_tensors(path: Path, ending: str = "") -> typing.Iterator[tuple[str, Tensor]]:
    """The tensors of a file whose names have this ending, memory-mapped. Pickles are loaded with weights_only=True."""
    import pickle

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.endswith(ending)]
            for name in names:
                with safe_open(path, framework="pt") as file:  # a map per tensor: its memory is released with the tensor
                    yield name, file.get_tensor(name)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            yield from ((name, tensor) for name, tensor in tensors.items() if name.endswith(ending))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: it contains more than tensors and could execute code; use safetensors") from None
    except (SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read, and may be truncated ({first_line(error)})") from None


def dequantized(folder: Path, raw: dict) -> typing.Iterator[tuple[Path, str, Tensor]]:
    """All tensors of a folder with their files. DeepSeek's fp8 weights are multiplied by their scales (`weight_scale_inv`): a
    scale per block (usually 128 x 128 weights), or one scale for the whole matrix."""
    files, quantization = weight_files(folder), raw.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        import QUANT

        yield from QUANT.from_hub((path, name, tensor) for path in files for name, tensor in read_tensors(path))
        return
    if method not in (None, "fp8"):
        raise UserError(f"{folder}: the weights are quantized with {method}, which is not supported; use the original model")
    ending = "_scale_inv"
    scales = {name.removesuffix(ending): tensor for path in files if method for name, tensor in read_tensors(path, ending)}
    height, width = quantization.get("weight_block_size") or (128, 128)
    for path in files:
        for name, tensor in read_tensors(path):
            if method and name.endswith((ending, ".activation_scale")):
                continue
            if name in scales:
                scale = scales[name].float()
                if scale.numel() > 1:
                    scale = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)[: tensor.shape[0], : tensor.shape[1]]
                tensor = tensor.float() * scale.view(scale.shape if scale.dim() == 2 else ())
            yield path, name, tensor


def load_weights(model: Transformer, folder: Path, dtype=None, device=None, seed: int = 0,
                 packer: Callable | None = None) -> None:
    """Assign a folder's weights to a model (on `meta` or not); all tensors must match by name and shape.

    packer(name, weight) assigns a weight in another form, such as quantized, and returns True, or returns False. It gets the
    weights that are listed in packer.exact as they are stored, and other weights in `dtype`."""
    config, raw = model.config, read_json(folder / "config.json")
    head = model.tied_name
    expected = dict(model.state_dict())
    shapes = {name: weight.shape for name, weight in expected.items()}
    shapes[head] = shapes.get(head, shapes["model.embed_tokens.weight"])
    state, filled, unexpected = {}, Counter(), []
    for path, hub_name, tensor in dequantized(folder, raw):
        for name, index, part in weights_from_hub(config, hub_name, tensor, raw.get("num_nextn_predict_layers") or 0):
            if name not in expected and not (name == head and config.tie_word_embeddings):
                unexpected += [] if name.startswith(OPTIONAL) else [hub_name]
                continue
            shape = torch.empty(shapes[name], device="meta")[index].shape if not index or index[0] < shapes[name][0] else ()
            if part.shape != shape:
                raise UserError(f"{path}: {hub_name} has shape {tuple(part.shape)}, but config.json implies {tuple(shape)}; "
                                "check for missing or changed keys in config.json")
            # A router's bias is the sum of tiny steps and stays float32; scales and packer.exact keep their dtype.
            kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            exact = name.endswith(("weight_scale", ".scale")) or packer and name in packer.exact
            kind = kind if part.is_floating_point() and not exact else part.dtype
            if index:
                if name not in state:
                    state[name] = torch.empty(shapes[name], dtype=kind or part.dtype, device=device or "cpu")
                state[name][index] = part.to(state[name])
            else:
                state[name] = part.to(device=device, dtype=kind).contiguous()
            filled[name] += part.numel()
            if packer and filled[name] == shapes[name].numel() and packer(name, state[name]):
                del state[name]
    if config.tie_word_embeddings:
        settle_tied_head(model, state, filled)
    if config.tie_word_embeddings:
        expected.pop(head, None)
    missing = [name for name, weight in expected.items() if filled[name] < weight.numel()]
    optional = tuple(part for part in OPTIONAL if part != "lm_head." or "lm" not in folder_heads(raw))
    fresh = tuple(name for name in missing if name.startswith(optional) and name not in state)
    for label, names in (("missing", [name for name in missing if name not in fresh]), ("unexpected", unexpected)):
        if names:
            raise UserError(f"{folder}: {label} tensor {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    for name in fresh:
        state[name] = torch.empty(expected[name].shape, dtype=dtype or torch.float32, device=device or "cpu")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    init_weights(model, seed, fresh or ("no parameter",))


def settle_tied_head(model: Transformer, state: dict[str, Tensor], filled: Counter) -> None:
    """A file may contain the tied tensor under the head's name, or under both names. If the two tensors differ, the model is not
    tied, as in transformers, even if config.json sets tie_word_embeddings."""
    embedding, head = "model.embed_tokens.weight", model.tied_name
    if head not in state:
        return
    if embedding not in state:
        state[embedding], filled[embedding] = state[head], filled[head]
    if "lm" in model.heads and not torch.equal(state[head], state[embedding]):
        model.config.tie_word_embeddings = False
    else:
        del state[head]


def folder_heads(raw: dict) -> tuple:
    """The heads of the classes in config.json's `architectures`; those of a causal LM if there are none."""
    for architecture in raw.get("architectures") or ():
        for suffix, heads in HEAD_CLASSES.items():
            if architecture.endswith(suffix):
                return heads
    return ("lm",)


def load(name: str, dtype: str | torch.dtype | None = None, device=None, attn_implementation: str = "auto",
         head: str | tuple | None = None, seed: int = 0, changes: dict | None = None, adapter: str | None = None,
         quantization: str | None = None) -> LanguageModel:
    """Load a trained model from a folder or hub name, in eval mode.

    dtype None is float32, "auto" the fastest suitable dtype (see `auto_dtype`). head None is the head that config.json names;
    other heads are initialized from `seed`. `changes` are settings that do not change the shapes of the weights (`CHANGEABLE`).
    The model is built on `meta` and the weights are assigned, so peak memory is about one copy. Architectures that are not in
    `FAMILIES` are run by transformers, with the same interface. `adapter` is the folder of a LoRA adapter. `quantization`
    (`QUANTIZATIONS`) quantizes the layers' weights while loading (`QUANT`); they are frozen then, but adapters can be trained.
    """
    folder = resolve_folder(str(name))
    raw = read_json(folder / "config.json")
    if adapter and (labels := adapter_labels(resolve_folder(str(adapter), "--adapter"))):
        head, changes = "score", {**(changes or {}), "labels": labels}
    if quantization not in (None, *QUANTIZATIONS):
        raise UserError(f"quantization: '{quantization}' is not one of {', '.join(QUANTIZATIONS)}")
    quantization = None if quantization == "none" else quantization
    if "score" in folder_heads(raw) and raw.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(f"{folder}/config.json: problem_type '{raw['problem_type']}' is not supported (only "
                        "single_label_classification)")
    if quantization:
        import QUANT
    stored = (raw.get("quantization_config") or {}).get("quant_method")
    if quantization and stored not in (None, "fp8"):
        raise UserError(f"model.quantization: the weights in {folder} are already quantized; leave it out")
    if is_foreign(raw):
        packing = QUANT.hub_settings(quantization) if quantization else None
        model = _load_foreign(folder, raw, dtype, device, attn_implementation, head, seed, changes, packing)
        model.quantization = stored or "none"
        if quantization and not packing:
            QUANT.quantize(model, quantization)
    else:
        packing = partial(QUANT.Packer, method=quantization, device=device) if quantization else None
        model = _load_native(folder, raw, dtype, device, attn_implementation, head, seed, changes, packing)
    if quantization:
        QUANT.keep_form(model, quantization)
    if isinstance(model, ForeignModel) and not is_causal(model.inner):
        raise UserError(f"{folder}: {model.config.model_type} is not a causal language model, since tokens attend to later "
                        "tokens; bert is the only supported encoder")
    if adapter:
        _fit_to_adapter(model, adapter)
        load_adapter(model, adapter)
        model.to(device or "cpu").eval()
    return model


def _fit_to_adapter(model: LanguageModel, adapter: str) -> None:
    """Grow the vocabulary if the tokenizer in the adapter's folder has more tokens than the base model."""
    vocabulary = resolve_folder(adapter) / "tokenizer.json"
    if vocabulary.exists():
        raw = read_json(vocabulary)
        ids = [token["id"] for token in raw.get("added_tokens") or ()] + [len((raw.get("model") or {}).get("vocab") or ()) - 1]
        grow_vocabulary(model, max(ids) + 1)


def _load_native(folder: Path, raw: dict, dtype, device, attn_implementation: str, head, seed: int, changes,
                 packing) -> Transformer:
    config = read_config(folder)
    if fixed := set(changes or ()) - set(CHANGEABLE):
        raise UserError(f"model.{sorted(fixed)[0]}: a trained model's architecture is fixed; leave it out, or start from "
                        "--model.preset")
    config = dataclasses.replace(config, **(changes or {}))
    with torch.device("meta"):
        model = Transformer(config, head or folder_heads(raw), attn_implementation)
    dtype = _chosen_dtype(dtype, raw, model, device) or torch.float32
    if (stored := raw.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        import QUANT

        QUANT.adopt(model, folder, stored)
    load_weights(model, folder, dtype, device, seed, packing and packing(model))
    return model.eval()


def context_length(name: str, changes: dict) -> int:
    """The context length in tokens of the model in a folder, from its config.json and changed settings."""
    folder = resolve_folder(base_and_adapter(name)[0])
    raw = read_json(folder / "config.json")
    if not is_foreign(raw):
        return changes.get("max_position_embeddings") or read_config(folder).max_position_embeddings
    return next((raw[key] for key in CONTEXT_KEYS if raw.get(key)), 2048)


CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions")


def is_foreign(raw: dict) -> bool:
    """Whether a config.json names an architecture that only transformers can run."""
    return ALIASES.get(raw.get("model_type"), raw.get("model_type")) not in (*FAMILIES, CUSTOM)


CHANGEABLE = ("rope_scaling", "rope_theta", "max_position_embeddings", "sliding_window", "attention_dropout", "resid_pdrop",
              "embd_pdrop", "labels", "router_aux_loss_coef", "seq_aux", "router_bias_update_speed", "num_experts_per_tok",
              "initializer_range")


def stored_dtype(raw: dict) -> str:
    """The dtype of a folder's weights according to its config.json."""
    return raw.get("dtype") or raw.get("torch_dtype") or "float32"


def _chosen_dtype(dtype, raw: dict, model: nn.Module, device) -> torch.dtype | None:
    if dtype == "auto":
        return auto_dtype(stored_dtype(raw), count_parameters(model)[0], device)
    return supported_dtype(dtype, device) if isinstance(dtype, str) else dtype


def _load_foreign(folder: Path, raw: dict, dtype, device, attn_implementation: str, head, seed: int, changes,
                  packing) -> ForeignModel:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging as messages

    messages.disable_progress_bar()
    verbosity = messages.get_verbosity()
    kind = raw.get("model_type")
    changes, heads = dict(changes or {}), (head,) if isinstance(head, str) else head or folder_heads(raw)
    labels = changes.pop("labels", None) or (hub_labels(raw) if "score" in folder_heads(raw) else None)
    if changes:
        raise UserError(f"model.{sorted(changes)[0]}: cannot be changed for {kind}, which is run by transformers; leave it out")
    kernels = {"auto": None, "eager": "eager", "sdpa": "sdpa"}
    if attn_implementation not in kernels:
        raise UserError(f"model.attn_implementation: {attn_implementation} is not supported for {kind}, which is run by "
                        "transformers; use auto, eager or sdpa")
    options = {"quantization_config": packing, "device_map": {"": str(device or "cpu")}} if packing else {}
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        dtype = _chosen_dtype(dtype, raw, ForeignModel(empty), device) or torch.float32
        messages.set_verbosity_error()  # no report of missing and unexpected heads
        inner = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernels[attn_implementation],
                                                     use_safetensors=None, weights_only=True, **options)
    except (KeyError, ValueError, OSError, ImportError, TypeError, AttributeError, RuntimeError, SafetensorError,
            StrictDataclassError) as error:
        raise UserError(f"{folder}: model_type '{kind}' is not one of {', '.join(FAMILIES)}, and transformers cannot load it: "
                        f"{first_line(error)}") from None
    finally:
        messages.set_verbosity(verbosity)
    if "score" in heads and type(inner.config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(f"{folder}: transformers has no sequence classification model for {kind}, so a classification or reward "
                        "head could not be saved; choose another model")
    model = ForeignModel(inner if packing else inner.to(device or "cpu"), heads, labels).eval()
    read_generation_ids(folder, model.config)
    if "score" in heads:
        stored = dict(tensor for path in weight_files(folder) for tensor in read_tensors(path, "score.weight"))
        random = torch.empty(model.score.weight.shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        model.score.weight.data = next(iter(stored.values()), random).to(model.device, model.dtype)
        if model.score.weight.shape != random.shape:
            raise UserError(f"{folder}: score.weight has shape {tuple(model.score.weight.shape)}, but {len(labels or ())} labels "
                            f"require {tuple(random.shape)}")
    return model


def label_names(model: LanguageModel) -> list[str]:
    """The names of the labels of a score head; LABEL_0, ... as in transformers if they have no names."""
    return model.config.labels or [f"LABEL_{i}" for i in range(model.config.num_labels)]


def folder_labels(folder: Path) -> list[str] | None:
    """The labels of a folder's classifier or adapter; None for a language model."""
    if (folder / "adapter_config.json").exists():
        return adapter_labels(folder)
    raw = read_json(folder / "config.json")
    return hub_labels(raw) if folder_heads(raw) == ("score",) else None

# -- adapters


def import_peft():
    return library("peft", "adapters need")


def host_of(model: LanguageModel) -> nn.Module:
    """The module that peft adds adapters to: the model, or the model of transformers inside."""
    return model.inner if isinstance(model, ForeignModel) else model


def inject(config, host: nn.Module, name: str = "default") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about patterns that peft generates for experts
        peft = import_peft()
        peft.inject_adapter_in_model(config, host, name)
    for module in host.modules():
        if type(module) is peft.tuners.lora.Linear and type(module.base_layer) is nn.Linear:
            module.forward = partial(adapted_product, module, module.forward)


def adapted_product(layer, peft_forward: Callable, hidden: Tensor) -> Tensor:
    """W x + B (alpha / r A x). peft's forward scales and adds the full width in separate passes. Here only r numbers per token
    are scaled, and the last product is accumulated into W x. For anything but one plain adapter, peft's forward is called."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    plain = name in layer.lora_A and not (layer.disable_adapters or layer.merged or name in layer.lora_variant)
    if not plain or layer.lora_B[name].bias is not None:
        return peft_forward(hidden)
    flat = hidden.flatten(0, -2)  # (N, in): adding into a view would copy its gradient
    out = layer.base_layer(flat)
    flat = layer.lora_dropout[name](flat.to(layer.lora_A[name].weight.dtype))
    low_rank = layer.lora_A[name](flat) * layer.scaling[name]  # (N, r)
    return out.addmm_(low_rank.to(out.dtype), layer.lora_B[name].weight.to(out.dtype).t()).unflatten(0, hidden.shape[:-1])


def _save_adapter(model: LanguageModel, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does, with transformers' tensor names.

    Runs in: INFER.py, peft"""
    from safetensors.torch import save_file

    host = host_of(model)
    state = {name: gathered_on_first(tensor) for name, tensor in host.state_dict().items() if tensor_is_trained(name)}
    if process_rank() != 0:
        return
    config, state = model.adapter, dict(import_peft().get_peft_model_state_dict(host, state, save_embedding_layers=False))
    if not isinstance(model, ForeignModel) and model.config.model_type in RENAMED:
        config, state = rename_adapter(model.config.model_type, config, state)
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    with staged(folder, "adapter_config.json", "adapter_model.*") as scratch:
        config.save_pretrained(scratch)
        labels = {"labels": json.dumps(model.config.labels)} if "score" in model.heads else {}
        save_file(state, scratch / "adapter_model.safetensors", metadata={"format": "pt", **labels})
        write_generation_config(vars(model.config), scratch)


RENAMED = ("gpt2", "bert")  # families whose layers have other names in transformers; peft converts the names of experts


def rename_adapter(kind: str, config, state: dict[str, Tensor], back: bool = False) -> tuple:
    """Convert the (peft config, tensors) of an adapter to transformers' names; `back`: to the names of this file."""
    from peft.utils.other import get_pattern_key

    def renamed(module: str) -> str:
        return hub_name(kind, f"{module}.", back).removesuffix(".")

    ranks = {name.removesuffix(".lora_A.weight"): len(tensor)
             for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    alphas = {module: config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module),
                                               config.lora_alpha) for module in ranks}
    config = dataclasses.replace(config)
    config.target_modules = sorted(map(renamed, ranks))
    config.rank_pattern = {renamed(module): rank for module, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {renamed(module): alpha for module, alpha in alphas.items() if alpha != config.lora_alpha}
    config.fan_in_fan_out = kind == "gpt2" and not back
    state = {hub_name(kind, name, back): tensor for name, tensor in state.items()}
    if not back:
        config.modules_to_save = ["pooler", "classifier"] if config.modules_to_save and kind == "bert" else config.modules_to_save
    elif unsupported := set(config.modules_to_save or ()) - {"pooler", "classifier", "score"}:
        raise UserError(f"modules_to_save {sorted(unsupported)} are not supported for {kind}")
    elif config.modules_to_save:
        last_only = "score.out_proj.weight" in state and "score.dense.weight" not in state  # of the two layers of BERT's head
        config.modules_to_save = ["score.out_proj" if last_only else "score"]
    if isinstance(config.trainable_token_indices, dict):  # rows of the embedding and of an untied head
        embedding = "embed_tokens" if back else renamed("model.embed_tokens").rpartition(".")[2]
        config.trainable_token_indices = {name if name == "lm_head" else embedding: rows
                                          for name, rows in config.trainable_token_indices.items()}
    return config, state


def tensor_is_trained(name: str) -> bool:
    """Whether a tensor of a model with an adapter belongs to the adapter."""
    return any(part in name for part in (".lora_", ".trainable_tokens_", ".modules_to_save."))


def adapter_config(folder: Path):
    read_json(folder / "adapter_config.json")
    try:
        return import_peft().PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/adapter_config.json: peft cannot read it ({first_line(error)})") from None


def adapter_labels(folder: Path) -> list[str] | None:
    """The labels of an adapter with a score head; LABEL_0, ... if peft saved it, which does not save names."""
    path = folder / "adapter_model.safetensors"
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:  # `read_tensors` reports damaged files
        names = json.loads((file.metadata() or {}).get("labels", "null"))
        head = next((name for name in file.keys() if re.search(r"\.(score|classifier)\.weight$", name)), None)
        return names or (head and [f"LABEL_{i}" for i in range(file.get_slice(head).get_shape()[0])])
    return None


def load_adapter(model: LanguageModel, folder: str | Path, train: bool = False, name: str = "default") -> None:
    """Load a saved adapter into its base model; all tensors must match."""
    peft, folder = import_peft(), resolve_folder(str(folder), "--adapter")
    config = adapter_config(folder)
    if config.peft_type != "LORA":
        raise UserError(f"{folder}: {config.peft_type} adapters are not supported; only LoRA and its variants are")
    host = host_of(model)
    for key in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, key, None):
            raise UserError(f"{folder}/adapter_config.json: {key} is not supported")
    config.inference_mode = not train
    path = folder / "adapter_model.safetensors"
    path = path if path.exists() else folder / "adapter_model.bin" if (folder / "adapter_model.bin").exists() else path
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in read_tensors(path)}
    if config.use_dora and model.quantization not in ("none", "nf4"):
        raise UserError(f"{folder}: DoRA does not support {model.quantization} weights; use --model.quantization nf4 or none")
    if model.quantization != "none" and any(".experts." in name for name in state):
        raise UserError(f"{folder}: adapters on experts do not support quantized weights; leave out model.quantization")
    if not isinstance(model, ForeignModel) and model.config.model_type in RENAMED:
        try:
            config, state = rename_adapter(model.config.model_type, config, state, back=True)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    if "score" in model.heads and not config.modules_to_save:
        raise UserError(f"{folder}: this adapter has no classification head; merge it (SFT.py --merge) and start from the "
                        "merged folder")
    try:
        inject(config, host, name)
        if any(re.search(r"\.experts\.\d+\.", name) for name in state):
            state = _stacked(host, config, state, folder)
        result = peft.set_peft_model_state_dict(host, state, name)
    except (ValueError, RuntimeError) as error:
        base = config.base_model_name_or_path
        raise UserError(f"{folder}: trained for another base model ({base}): {first_line(error)}") from None
    weights = dict(host.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in weights.items() if name not in result.missing_keys}  # tied weights are saved once
    others = [f".{key}." for key in model.adapters.values()]
    missing = [name for name in result.missing_keys if tensor_is_trained(name) and id(weights.get(name)) not in loaded
               and not any(key in name for key in others)]
    if missing or result.unexpected_keys:
        raise UserError(f"{folder}: trained for another base model ({config.base_model_name_or_path}): "
                        f"{'missing' if missing else 'unexpected'} tensor {(missing or result.unexpected_keys)[0]}")
    model.adapter = config


def load_adapters(model: Transformer, folders: dict[str, str]) -> None:
    """Load several LoRA adapters, {name: folder}, without merging them; `adapters_for` assigns tokens to them."""
    for number, (name, folder) in enumerate(folders.items()):
        before, key = set(model.modules()), f"adapter{number}"  # a key of ModuleDict, which cannot contain dots
        load_adapter(model, folder, name=key)
        layers = [module for module in model.modules() if hasattr(module, "lora_A") and key in module.lora_A]
        new = [module for module in set(model.modules()) - before if hasattr(module, "adapter_layer_names")]
        if model.adapter.use_dora or model.adapter.lora_bias or not set(new) <= set(layers):
            raise UserError(f"{folder}: only plain LoRA on linear layers can be served with others; serve it with --adapter")
        for layer in layers:
            layer.forward = partial(mixed_product, layer, model.adapter_tokens)
        model.adapters[name], model.adapter = key, None


@contextmanager
def adapters_for(model: LanguageModel, parts: list[tuple[str | None, int]]) -> Iterator[None]:
    """In this context, the tokens of a forward pass (1, N) use these adapters: (name or None, number of tokens), ..."""
    numbers: dict[str, list[int]] = {}
    first = 0
    for name, count in parts:
        if name is not None:
            numbers.setdefault(model.adapters[name], []).extend(range(first, first + count))
        first += count
    model.adapter_tokens.update({key: torch.tensor(tokens, device=model.device) for key, tokens in numbers.items()})
    try:
        yield
    finally:
        model.adapter_tokens.clear()


def mixed_product(layer, tokens: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """W x for all tokens, plus B (alpha / r A x) of each adapter for its tokens; (1, N, out)"""
    out = layer.base_layer(hidden)
    for key, indices in tokens.items():
        if key in layer.lora_A:
            low_rank = layer.lora_A[key](hidden[0, indices].to(layer.lora_A[key].weight.dtype)) * layer.scaling[key]
            out[0].index_add_(0, indices, layer.lora_B[key](low_rank).to(out.dtype))
    return out


def _stacked(host: nn.Module, config, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Convert an adapter on separate experts (transformers 4) to stacked experts; UserError if peft converts it incorrectly."""
    if config.use_rslora or host.config.model_type == "deepseek_v3":
        raise UserError(f"{folder}: this adapter has a layer per expert, which is not supported; merge it with the versions of "
                        "peft and transformers that trained it")
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # the conversion needs a model of transformers, for its tensor names
        shell = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hub(host.config)))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in convert(shell, config, state).items()}


def merges_exactly(model: LanguageModel) -> bool:
    """Whether the merged model computes the same function. Merging into one of two layers that share a tensor (a tied embedding
    or head) would change the other layer too; the bias of B cannot be merged into a layer without bias."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    users = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers += [module.original_module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    weights = [weight for layer in layers for weight in layer._parameters.values() if weight is not None]
    return not model.adapter.lora_bias and all(users[id(weight)] == 1 for weight in weights)


@torch.no_grad()
def narrow_frozen(model: LanguageModel, dtype: torch.dtype) -> None:
    """Store frozen matrices in autocast's dtype: products are bitwise identical, with half the memory and without a conversion
    at each use. Weights with other uses keep their dtype: embeddings, norms, matrices with DoRA, experts with adapters."""
    if model.adapter and (model.adapter.use_dora or model.adapter.target_parameters):
        return
    embedding = model.get_input_embeddings().weight
    native = isinstance(model, Transformer)  # a foreign model may use float32 on purpose in layers without an adapter
    for name, module in model.named_modules():
        weight, plain = getattr(module, "weight", None), type(module) is nn.Linear and (native or name.endswith("base_layer"))
        if plain and not weight.requires_grad and weight is not embedding or type(module) is Experts:
            module.to(dtype)
        elif getattr(weight, "quant_state", None) is not None:
            weight.quant_state.dtype = dtype


def merge_adapter(model: LanguageModel) -> None:
    """Add the adapter to the weights and remove it: W + (alpha / r) B A."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    replaced: tuple = ()
    for name, module in list(model.named_modules()):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not name.startswith(replaced):
            replaced += (name + ".",)  # modules inside are replaced with it
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, BaseTunerLayer):
                plain = module
                while isinstance(plain, BaseTunerLayer):  # nested for experts
                    plain.merge()
                    plain = plain.base_layer
            else:
                plain = module.unload_and_optionally_merge_module(True, False, None)
            setattr(parent, name.rpartition(".")[2], plain)
    model.adapter = None
    model.tie_weights()

# -- devices and dtypes

QUANTIZATIONS = ("none", "int8", "int8_dynamic", "int4", "fp8", "nf4", "llm_int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # training.mixed_precision


def choose_device(name: str = "auto") -> torch.device:
    """The device of model.device; auto is CUDA, else MPS, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        found = {"cpu": True, "cuda": (device.index or 0) < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    except RuntimeError:
        found = {}
    if not found or not found.get(device.type, False):
        raise UserError(f"model.device: '{name}' is not available; use cpu, or auto for the best available device")
    return device


@memoize
def matmul_flops(dtype: torch.dtype, device: str, size: int = 0) -> float:
    """Measured FLOP/s of a square matrix product with the layers' kernel: the peak for MFU."""
    size = size or (8192 if device.startswith("cuda") else 1024)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global generator, which dropout uses, unchanged
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: F.linear(a, b)[0, 0].item()) for _ in range(4))  # .item() waits for the device


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@memoize
def fast_half(device: str) -> torch.dtype | None:
    """The 16-bit dtype whose matrix products are clearly faster than float32 on this device, or None. It is measured on a CPU:
    of two processors that list AVX512-BF16, one is seven times as fast in bfloat16 as in float32 and one half as fast. The
    environment variable FAST_TYPE (bfloat16 or float32) replaces the measurement, so tests can run with both."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.startswith("mps"):
        return None
    if forced := os.environ.get("FAST_TYPE"):
        return torch.bfloat16 if forced == "bfloat16" else None
    for size, gain in ((128, 0.5), (1024, 1.3)):  # the small product rules out emulated bfloat16: 15 s for the large one
        full, half = torch.ones(size, size), torch.ones(size, size, dtype=torch.bfloat16)
        times = [(_seconds(lambda: full @ full), _seconds(lambda: half @ half)) for _ in range(6)]  # noqa: B023
        seconds, seconds_half = map(min, zip(*times, strict=True))  # interleaved, so that other programs slow down both
        if seconds < gain * seconds_half:
            return None
    return torch.bfloat16


def supported_dtype(name: str, device=None) -> torch.dtype:
    """The requested dtype, or float32 with a message instead of float16 on a CPU, which is slow."""
    device = str(device or "cpu")
    if name not in DTYPES:
        raise UserError(f"model.dtype: '{name}' is not one of auto, {', '.join(DTYPES)}")
    if name == "float16" and device == "cpu":
        say("model.dtype: float16 is slow on a CPU; using float32")
        return torch.float32
    return DTYPES[name]


def auto_dtype(stored: str | None, parameters: int, device=None) -> torch.dtype:
    """The dtype for inference: that of the stored weights, but 16 bits for large float32 models (memory bandwidth)."""
    device = str(device or "cpu")
    half = fast_half(device) or torch.bfloat16
    if stored in ("float16", "bfloat16"):
        return half if device != "cpu" or stored == "bfloat16" else torch.float32
    return half if parameters > 100_000_000 and device != "mps" else torch.float32

# -- summary


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(total, active per token): shared parameters are counted once; a token uses only k of the experts."""
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]  # 4-bit: two weights per byte
    total = sum(weight.numel() if state is None else math.prod(state.shape)
                for weight, state in zip(model.parameters(), states, strict=True))
    idle = sum(weight.numel() * (1 - module.per_token / len(weight))
               for module in model.modules() if isinstance(module, Experts) for weight in module.parameters())
    return total, total - round(idle)


def flops_per_token(config: ModelConfig, context: int, head: str | tuple = "lm") -> float:
    """FLOPs of the forward pass of one token with `context` tokens before it, counted from the modules of a model on `meta`: 2
    per weight of a matrix product, and per key 2 for each dimension of the key and of the value. Training takes three times as
    many (Kaplan 2020, section 2.1)."""
    flops = 0.0
    for module in build(config, head, device="meta").modules():
        if isinstance(module, (nn.Linear, Router)):
            flops += 2 * module.weight.numel()
        elif isinstance(module, Experts):
            flops += 2 * sum(weight.numel() for weight in module.parameters()) * module.per_token / module.count
        elif isinstance(module, Attention):
            flops += 4 * config.num_attention_heads * module.head_dim * min(context, module.window or context)
        elif isinstance(module, LatentAttention):
            flops += 2 * module.heads * (module.nope_dim + module.rope_dim + module.value_dim) * context
    return flops


def cache_numbers(config: ModelConfig) -> int:
    """Number of cached elements per token: keys and values of all layers, or latents and rotary keys."""
    if not config.causal:
        return 0
    latent = config.kv_lora_rank and config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * (latent or 2 * config.num_key_value_heads * config.head_dim)


def adapter_memory(model: LanguageModel, rank: int = 16) -> tuple[int, int]:
    """Bytes of a model that learns by adapters on all linear layers but the head (SFT.py --lora.r 16): with frozen matrices in 16
    bits, and in nf4. Embeddings and norms stay in float32; a trained weight takes 16 bytes, as in training of the whole model."""
    embedding = model.get_input_embeddings().weight
    layers = {id(module) for layer in layers_of(model) for module in layer.modules()}
    linear = [module for module in model.modules() if type(module) is nn.Linear and module.weight is not embedding]
    adapted = [module for module in linear if id(module) in layers]
    narrow, packed = (sum(module.weight.numel() for module in found) for found in (linear, adapted))
    trained = sum(rank * (module.in_features + module.out_features) for module in adapted)
    half = 4 * (count_parameters(model)[0] - narrow) + 2 * narrow + 16 * trained
    # Half a byte each, an 8-bit scale for each group of 64, and a float32 scale for 256 of those (Dettmers 2023, section 3).
    return half, half - 2 * packed + round(packed * (0.5 + 1 / 64 + 4 / (64 * 256)))


def summary(config: ModelConfig) -> str:
    """A text with layers, parameters, FLOPs and memory; the model is built on `meta`, without weights."""
    model = build(config, device="meta")
    total, active = count_parameters(model)
    context, cache = config.max_position_embeddings, 2 * cache_numbers(config)
    kind = {1: "MQA", config.num_attention_heads: "MHA"}.get(config.num_key_value_heads, "GQA")
    window = f", window {config.sliding_window}" if config.sliding_window else ""
    attention = (f"attention {config.num_attention_heads} heads of {config.head_dim}, "
                 f"{config.num_key_value_heads} key/value: {kind}{window}")
    if config.kv_lora_rank:
        attention = (f"latent attention (MLA) {config.num_attention_heads} heads of {config.qk_nope_head_dim} + "
                     f"{config.qk_rope_head_dim} rotary, latent {config.kv_lora_rank}")
    sparse = sum(config.sparse(layer) for layer in range(config.num_hidden_layers))
    shared = f" + {config.n_shared_experts} shared" if config.n_shared_experts else ""
    dense = f", MLP {config.intermediate_size}" + (f" in {config.num_hidden_layers - sparse}" if sparse else "")
    experts = (f", {config.num_experts_per_tok} of {config.num_experts} experts of {config.moe_intermediate_size}{shared} in "
               f"{sparse}" if sparse else "")
    rows = [
        ("family", config.model_type + ("" if config.causal else ", an encoder")),
        ("layers", f"{config.num_hidden_layers} x {attention}{dense if sparse < config.num_hidden_layers else ''}{experts}"),
        ("width", f"{config.hidden_size}, vocabulary {config.vocab_size:,}, context {context:,}"),
        ("parameters", f"{total:,} ({active:,} active per token)"),
        ("forward FLOPs per token", f"{flops_per_token(config, 0) / 1e9:,.3f} G, at full context "
                                    f"{flops_per_token(config, context) / 1e9:,.3f} G"),
        ("cache per token", f"{cache:,} bytes in 16 bits; {size_text(cache * context)} for a full context"),
        ("memory for inference", f"{size_text(total * 2)} in 16 bits, {size_text(total * 4)} in float32, plus cache"),
        ("memory for training", f"{size_text(total * 16)} (float32 weights, gradients, AdamW's two moments), plus activations"),
    ]
    if not sparse:  # of a mixture's layers, only some can have adapters
        half, packed = map(size_text, adapter_memory(model))
        rows.append(("memory for LoRA", f"{half} on 16-bit weights, {packed} on nf4 weights (rank 16), plus activations"))
    shapes = {}
    for name, weight in model.named_parameters():
        shapes.setdefault((re.sub(r"\.\d+\.", ".*.", name), tuple(weight.shape)), []).append(weight.numel())
    lines = [f"{label:24} {text}" for label, text in rows] + [""]
    lines += [f"  {name:50} {str(shape):>18} x {len(counts):<4} {sum(counts):>16,}"
              for (name, shape), counts in shapes.items()]
    return "\n".join(lines)


def shows_colors() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def counted(number: int, noun: str) -> str:
    """1, "document" -> "1 document"; 2000 -> "2,000 documents"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def preset_table() -> str:
    """A table of all presets; parameters of small presets are counted with a vocabulary of TRAINED_VOCABULARY."""
    lines = [f"{'preset':16} {'family':11} {'parameters':>17} {'active':>15} {'layers':>6} {'width':>6} {'heads':>5} {'kv':>4} "
             f"{'experts':>7} {'context':>8}"]
    for name in PRESETS:
        c = preset_config(name, **({"vocab_size": TRAINED_VOCABULARY} if PRESETS[name].get("vocab_size") == _SMALL else {}))
        total, active = count_parameters(build(c, device="meta"))
        lines.append(f"{name:16} {c.model_type:11} {total:17,} {active:15,} {c.num_hidden_layers:6} {c.hidden_size:6} "
                     f"{c.num_attention_heads:5} {'mla' if c.kv_lora_rank else c.num_key_value_heads:>4} "
                     f"{c.num_experts or '':>7} {c.max_position_embeddings:8}")
    return "\n".join(lines)

# -- config.yaml and flags

VERSION = "0.1.0"
SECTIONS = ("model", "tokenizer", "data", "training", "lora", "sft", "rl", "distill", "inference", "quantization", "output")
STAGES = ("sft", "rl", "distill", "inference", "quantization")  # whose blocks override the other sections
SHORT_FLAGS = {"model": "model.name", "preset": "model.preset", "data": "data.train", "validation": "data.validation",
               "out": "output.dir", "lora_r": "lora.r", "epochs": "training.epochs",
               "max_steps": "training.max_steps", "max_minutes": "training.max_minutes", "batch_size": "training.batch_size",
               "grad_accum": "training.grad_accum", "learning_rate": "training.learning_rate", "lr": "training.learning_rate",
               "max_length": "training.max_length", "seed": "training.seed"}
HORIZON = ("epochs", "max_steps", "max_minutes")
EXCLUSIVE = (("model.name", "model.preset"), tuple(f"training.{key}" for key in HORIZON))
# The section `model`: which model to load or build, how to run it, and overrides of any architecture setting.
ModelSection = dataclasses.make_dataclass("ModelSection", [
    ("name", str | None, knob(None, "trained weights: a folder or a hub name such as gpt2; replaces preset", often=True)),
    ("preset", str | None,
     knob("llama-1m", "architecture and size for fresh weights (python MODEL.py --list); replaced by model.name", often=True)),
    ("dtype", str, knob("auto", "compute dtype: float32, bfloat16 or float16; auto picks a dtype that is fast on the device; "
                                "training keeps float32 master weights", ("auto", *DTYPES), often=True)),
    ("attn_implementation", str,
     knob("auto", "attention kernel: eager, sdpa, flash_attention_2, varlen or xformers; auto picks the fastest available",
          KERNELS, often=True)),
    ("device", str, knob("auto", "cpu, cuda, cuda:1 or mps; auto picks the best available", often=True)),
    ("quantization", str,
     knob("none", "quantize frozen weights, for QLoRA (nf4 with lora.r) and inference (int8, int4)", QUANTIZATIONS,
          often=True)),
    *[(name, f.type + " | None" if "None" not in f.type else f.type, field(default=None, metadata={**f.metadata, "only": ()}))
      for name, f in KNOBS.items() if name not in ("labels", "num_labels")]],
    namespace={"__module__": __name__, "__post_init__": lambda self: check(self, "model")})
MODEL_SETTINGS = ("dtype", "attn_implementation", "device", "quantization")  # how to run any model


@dataclass
class OutputSection:
    dir: str = knob("./out", "folder for the model, checkpoints, log and plot", often=True)


class Action(NamedTuple):
    """A flag that is not a setting: `convert` parses its value (None: takes no value); `bare` is the value if left out."""

    comment: str
    convert: Callable | None = None
    bare: str | None = None


def suggestion(name: str, names, form: str = "; nearest is '{}'") -> str:
    """The end of an error about an unknown name: the most similar name, if any is similar. A name that contains all parts of the
    unknown one is preferred: num_layers -> num_hidden_layers."""
    names = list(names)
    parts = set(re.split(r"[._]", name))
    containing = [known for known in names if parts <= set(re.split(r"[._]", known))]
    found = difflib.get_close_matches(name, containing or names, 1, 0.5 if containing else 0.75)
    return form.format(found[0]) if found else ""


def convert(value, kind, where: str, choices: tuple = ()):
    """Convert a YAML value or a string from the command line to a knob's type. PyYAML also reads 3e-5 as a string."""
    import yaml

    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    listed = next((option for option in options if typing.get_origin(option) is list), None)
    if isinstance(value, str) and (value[:1] == "[" and listed or value[:1] == "{" and dict in options):
        with suppress(ValueError, RecursionError, yaml.YAMLError):  # with `str`, [INST] is a string and ["INST"] a list
            value = json.loads(value) if listed and str in options else yaml.load(value, _loader())
    elif isinstance(value, str) and str not in options and set(options) - {listed, type(None)}:
        with suppress(ValueError, RecursionError, yaml.YAMLError):
            if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
                value = float(value) if re.search(r"[.eE]", value) else int(value)
            else:
                value = yaml.load(value, _loader())
    if isinstance(value, int) and abs(value) >= 2**1023:  # beyond every float
        raise UserError(f"{where}: a number of {len(str(value))} digits is too large")
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and type(None) in options):
        if type(None) in options:
            return None
        raise UserError(f"{where}: a value is required, not null")
    if isinstance(value, bool) and choices:  # YAML reads a bare on or no as true or false
        value = next((choice for choice in (("on", "yes") if value else ("off", "no")) if choice in choices), value)
    if choices and value not in choices:
        value = next((choice for choice in choices if str(choice).lower() == str(value).lower()), value)  # such as q8_0
    if choices and value not in choices:
        raise UserError(f"{where}: '{value}' is not one of {', '.join(map(str, choices))}"
                        f"{suggestion(str(value), map(str, choices), ' (nearest: {})')}")
    if listed and (isinstance(value, list) or set(options) <= {listed, type(None)} and not isinstance(value, (dict, bool))):
        return [convert(item, *typing.get_args(listed), where) for item in (value if isinstance(value, list) else [value])]
    if float in options and str not in options:
        with suppress(TypeError, ValueError):
            if not math.isfinite(float(value)):  # float() reads nan and inf as well, which YAML writes .nan and .inf
                raise UserError(f"{where}: {value} must be a finite number")
    for option in options:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if option is int and number and math.isfinite(value) and int(value) == value:
            return int(value)
        if option is float and number:
            return float(value)
        if option is str and (number or isinstance(value, str)):
            return str(value)
        if option in (bool, dict) and isinstance(value, option):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    names = names.replace("dict", "JSON object, such as '{key: value}'") if isinstance(value, str) else names
    raise UserError(f"{where}: {value!r} is not of type {names}")


@memoize
def field_types(section: type) -> dict:
    return typing.get_type_hints(section, vars(sys.modules[section.__module__]))


class Setting(NamedTuple):
    """A value from one source. The highest rank has precedence; within a rank, the last source."""

    rank: int
    origin: str
    key: str
    value: object


# the files that set the settings in use, for error messages: {"training.epochs": "set in mine.yaml"}
ORIGINS: dict[str, str] = {}


def load_config(argv: list[str] | None, sections: dict[str, type], primary: str, actions: dict[str, Action] | None = None,
                doc: str = "", shorts: dict[str, str] | None = None, saved: Path | None = None) -> SimpleNamespace:
    """The typed settings of a script: an attribute for each of its `sections`, plus `actions`.

    Precedence, from low to high: dataclass defaults, each --config file in order, the command line; within a source, shared
    sections, then the stage's blocks. Keys of the section `primary` need no prefix; `shorts` adds or replaces short flags.
    A resumed run reads the file `saved` instead of --config.
    """
    global QUIET
    argv = list(sys.argv[1:] if argv is None else argv)
    actions, shorts = {**COMMON, **(actions or {})}, {**SHORT_FLAGS, **(shorts or {})}
    kinds = {f"{name}.{key}": hint for name, kind in sections.items() for key, hint in field_types(kind).items()}
    blocks = [f.name for f in dataclasses.fields(sections[primary]) if f.name in SECTIONS and isinstance(default_of(f), dict)]
    flags, chosen = read_flags(argv, kinds, primary, blocks, actions, shorts)
    if chosen["version"]:
        print(VERSION)
        raise SystemExit(0)
    default_file = Path(sys.argv[0]).resolve().parent / "config.yaml"
    files = [saved] if saved else chosen["config"] or [default_file] * default_file.exists()
    if saved and chosen["config"]:
        say(f"resuming with the settings in {saved}; --config is ignored, flags still apply")
    block_defaults = {f"{primary}.{name}.{key}": value for name in blocks
                      for key, value in default_of(sections[primary].__dataclass_fields__[name]).items()}
    sources = [("defaults", block_defaults), *((str(path), read_settings(path)) for path in files), ("command line", flags)]
    given = [setting for rank, (origin, values) in enumerate(sources)
             for setting in ranked(origin, 2 * rank - 1, values, primary, blocks, sections)]
    defaults, _ = resolve([setting for setting in given if setting.rank == 0], kinds, sections)
    values, origins = resolve(given, kinds, sections)
    if chosen["help"] is not None:
        print(help_page(chosen["help"], doc, sections, primary, actions, shorts, values))
        raise SystemExit(0)
    config = checked_sections(values, origins, sections)
    if chosen["print_config"]:
        print(config_text(config, comments=True))
        raise SystemExit(0)
    QUIET = chosen["quiet"]
    ORIGINS.clear()
    for key, origin in origins.items():
        if not origin.startswith(("defaults", "command line")) and values[key] != defaults[key]:
            inherited = key.partition(".")[0] in blocks and not origin.endswith(f": {primary}")
            ORIGINS[key] = f"set in {origin}" + (f"; {primary}.{key} overrides it for {primary}" if inherited else "")
    config.actions, config.origins = SimpleNamespace(**chosen), origins
    config.defaults, config.given = defaults, settings(config)
    config.reload = partial(load_config, argv, sections, primary, actions, doc, shorts)
    return config


def checked_sections(values: dict, origins: dict, sections: dict[str, type]) -> SimpleNamespace:
    """Build the section objects from {"training.epochs": value}; errors name the source of the value."""
    try:
        config = SimpleNamespace(**{name: kind(**{f.name: values[f"{name}.{f.name}"] for f in dataclasses.fields(kind)})
                                    for name, kind in sections.items()})
        for name in sections:
            check(getattr(config, name), name)
    except UserError as error:
        key = str(error).partition(":")[0]
        raise UserError(f"{origins[key]}: {error}" if key in origins else str(error)) from None
    return config


def ranked(origin: str, rank: int, values: dict, primary: str, blocks: list[str], sections: dict[str, type]) -> Iterator[Setting]:
    """The settings of one source for this script; sft.training.epochs becomes training.epochs with a higher rank."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == primary and "." in name:
            if name.partition(".")[0] not in blocks:
                raise UserError(f"{origin}: {key}: unknown key; the blocks of {primary} are {', '.join(blocks) or 'none'}")
            yield Setting(rank + 1, f"{origin}: {primary}", name, value)
        elif section in sections and "." not in name:
            yield Setting(rank, origin, key, value)


COMMON = {
    "config": Action("settings file; later files override earlier ones (default: config.yaml next to the script)", Path),
    "print_config": Action("print all settings with comments, as a settings file"),
    "help": Action("show this page, or all settings of a section (--help training)", str, ""),
    "version": Action("print the version"),
    "quiet": Action("print errors only"),
}


@memoize
def _loader() -> type:
    """A SafeLoader that rejects duplicate keys and reads 1:30 and 010 as strings, not as the numbers 90 and 8 of YAML 1.1."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen: set = set()
            for key, _ in node.value:
                problem = "keys must be strings" if not isinstance(key.value, str) else f"duplicate key '{key.value}'"
                if not isinstance(key.value, str) or key.value in seen:  # SafeLoader would silently use the last
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:int"]
                                      for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
    return Loader


def read_settings(path: Path) -> dict:
    """Read a YAML file as {"training.epochs": value, "sft.training.epochs": value}."""
    import yaml

    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _loader()) or {}
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nesting without end
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML ({problem})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected sections such as 'model:' at the top level, found {type(raw).__name__}")
    found = {}
    for name, values in raw.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section '{name}'{suggestion(str(name), SECTIONS)}")
        if values is not None and not isinstance(values, dict):
            raise UserError(f"{path}: {name}: expected keys and values, found {values!r}")
        for key, value in (values or {}).items():
            is_block = name in STAGES and key in SECTIONS
            if is_block and not isinstance(value, (dict, types.NoneType)):
                raise UserError(f"{path}: {name}.{key}: {value!r} is not a mapping; set single keys, as in {name}.{key}.KEY")
            found.update({f"{name}.{key}.{inner}": v
                          for inner, v in (value or {}).items()} if is_block else {f"{name}.{key}": value})
    return found


def resolve(given: list[Setting], kinds: dict, sections: dict[str, type]) -> tuple[dict, dict]:
    """Merge all sources into ({"training.epochs": value}, {"training.epochs": the source that set it}).

    Setting a model resets the other model key and the previous model's settings; so does setting a training length."""
    fields = {f"{name}.{f.name}": f for name, kind in sections.items() for f in dataclasses.fields(kind)}
    values, origins = {key: default_of(f) for key, f in fields.items()}, {}
    for (_, origin), source in itertools.groupby(sorted(given, key=lambda setting: setting.rank), lambda setting: setting[:2]):
        source = list(source)
        chosen = {key for _, _, key, value in source if value not in (None, "null")}
        for group in EXCLUSIVE:
            if len(both := [key for key in group if key in chosen]) > 1:
                raise UserError(f"{origin}: {' and '.join(both)} are mutually exclusive; set one")
            values.update(dict.fromkeys(group if both else ()))
        resets = {"model.name": ("model.", "tokenizer."), "model.preset": ("model.",)}
        prefixes = tuple(prefix for key in chosen for prefix in resets.get(key, ()))
        values.update({key: default_of(f) for key, f in fields.items() if prefixes and key.startswith(prefixes)
                       and key not in EXCLUSIVE[0] and key.partition(".")[2] not in MODEL_SETTINGS})
        if "data.train" in chosen and values.get("data.validation") not in ("hash", "tail", "none"):
            values["data.validation"] = "hash"  # the earlier file belongs to the earlier data
        for _, _, key, value in source:
            where, name = f"{origin}: {key}", key.partition(".")[2]
            if key not in fields:
                known = field_types(sections[key.partition(".")[0]])
                raise UserError(f"{where}: unknown key{suggestion(name, known)}")
            standard = PRESETS.get(values.get("model.preset"), {}).get(name) if key.startswith("model.") else None
            if value == "null" and standard is not None and "None" in KNOBS[name].type:
                raise UserError(f"{where}: null is the preset's value, {standard}; to unset it, choose another preset")
            values[key] = convert(value, kinds[key], where, fields[key].metadata["choices"])
            origins[key] = origin
    return values, origins


def flag_names(kinds: dict, primary: str, blocks: list[str], shorts: dict[str, str]) -> dict[str, str]:
    """{flag: key}: all keys, keys of the stage's blocks, short flags, and keys of the primary section without its name."""
    names = {key: key for key in kinds if key.removeprefix(f"{primary}.") not in blocks}  # a block is set key by key
    names |= {f"{primary}.{key}": f"{primary}.{key}" for key in kinds if key.partition(".")[0] in blocks}
    names |= {short: key for short, key in shorts.items() if key in kinds}
    prefix = f"{primary}."
    return names | {key.removeprefix(prefix): key for key in names if key.startswith(prefix) and key.count(".") == 1}


# flags of transformers' and TRL's trainers, for suggestions
TRANSFORMERS_FLAGS = {
    "model_name_or_path": "model", "torch_dtype": "model.dtype", "load_in_4bit": "model.quantization nf4",
    "load_in_8bit": "model.quantization llm_int8", "use_peft": "lora.r 16", "dataset_name": "data", "train_file": "data",
    "eval_dataset": "data.validation", "validation_file": "data.validation", "output_dir": "out", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size", "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum", "max_seq_length": "max_length", "bf16": "training.mixed_precision bf16",
    "fp16": "training.mixed_precision fp16", "warmup_ratio": "training.warmup_steps", "eval_strategy": "training.eval_steps",
    "save_strategy": "training.save_steps", "resume_from_checkpoint": "resume", "do_sample": "temperature"}


def read_flags(argv: list[str], kinds: dict, primary: str, blocks: list[str], actions: dict[str, Action],
               shorts: dict[str, str]) -> tuple[dict, dict]:
    """Parse a command line to ({"training.epochs": raw value}, {action: value}); in flag names, `-` and `_` are the same."""
    names = flag_names(kinds, primary, blocks, shorts)
    values, chosen, i = {}, {name: None if action.convert else False for name, action in actions.items()} | {"config": []}, 0
    while i < len(argv):
        word, i = "--help" if argv[i] == "-h" else argv[i], i + 1
        if not word.startswith("--"):
            raise UserError(f"'{word}': unexpected argument; flags look like --section.key value (see --help)")
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        action, key = actions.get(name), names.get(name)
        if action and action.convert is None:
            if equals:
                raise UserError(f"{flag}: does not take a value; remove '={value}'")
            chosen[name] = True
            continue
        if not action and not key:
            section = shorts.get(name, name).partition(".")[0]
            other = section in SECTIONS and not any(known.startswith(f"{section}.") for known in kinds)
            same = TRANSFORMERS_FLAGS.get(name.rpartition(".")[2], "")
            hint = (f"; use --{same}" if same.partition(" ")[0] in {*names, *actions} else
                    suggestion(name, names, "; nearest is --{}"))
            raise UserError(f"{flag}: '{section}' is a section of another script" if other else f"{flag}: unknown flag{hint}")
        kind = str if action else kinds.get(key) or kinds[key.removeprefix(f"{primary}.")]
        if not equals:
            if i < len(argv) and (not argv[i].startswith("--") or action and action.bare is None):  # such as --prompt "--x"
                value, i = argv[i], i + 1
            elif kind is bool or action and action.bare is not None:
                value = "true" if kind is bool else action.bare
            else:
                hint = "" if i == len(argv) else f"; if it starts with --, write {flag}=VALUE"
                raise UserError(f"{flag}: a value is missing{hint}")
        if value == "" and name not in ("prompt", "help"):
            raise UserError(f"{flag}: the value is empty")
        listed = "list" in str(kind)
        following = list(itertools.takewhile(lambda word: not word.startswith("--"), argv[i:])) if listed else []
        value, i = [value, *following] if following else value, i + len(following)  # --data a.txt b.jsonl
        if name == "config":
            if not Path(value).exists():
                raise UserError(f"--config: file not found: '{value}'")
            chosen["config"].append(Path(value))
        elif chosen.get(name) is not None or key in values and not listed:
            raise UserError(f"{flag}: given more than once; give it once")
        elif action:
            chosen[name] = action.convert(value)
        else:
            earlier = convert(values[key], kind, flag) if key in values else None
            values[key] = value if earlier is None else earlier + (convert(value, kind, flag) or [])
    return values, chosen


def help_page(topic: str, doc: str, sections: dict[str, type], primary: str, actions: dict[str, Action], shorts: dict[str, str],
              values: dict) -> str:
    """The settings that a script would use, with config.yaml and flags applied: common settings, or all of one section."""
    if topic and topic not in sections:
        raise UserError(f"--help {topic}: " + (f"'{topic}' is a section of another script" if topic in SECTIONS else
                                               f"unknown section; the sections are {', '.join(sections)}"))
    flags = {shorts[name]: name for name in reversed(shorts)}
    lines, hidden = [] if topic else [doc.strip()], []
    for name in [topic] if topic else [primary, *(name for name in sections if name != primary)]:
        fields = dataclasses.fields(sections[name])
        section = SimpleNamespace(**{f.name: values[f"{name}.{f.name}"] for f in fields})
        shown = [f for f in fields if topic or f.metadata["often"] and not not_used(section, f)
                 and (name == primary or f"{name}.{f.name}" in flags)]
        hidden += [f"--help {name}"] * (len(shown) < len(fields))
        lines += ["", f"{name}:"] * bool(shown)
        for f in shown:
            flag = flags.get(f"{name}.{f.name}", f.name if name == primary else f"{name}.{f.name}").replace("_", "-")
            value = json.dumps(getattr(section, f.name), ensure_ascii=False).strip('"')
            parts = f.metadata["comment"].split("; ")
            while len(parts) > 1 and len("; ".join(parts)) > 100 and not topic:
                parts.pop()
            comment = "; ".join(parts)
            missing = any(str(choice) not in f"{comment} auto" for choice in f.metadata["choices"])
            choices = f" ({' | '.join(map(str, f.metadata['choices']))})" if missing else ""
            lines.append(f"  {f.name:22} {value:>14}  {comment}{choices} [--{flag}]")
    if not topic:
        lines += ["", f"More settings (--section.key VALUE): {', '.join(hidden)}", ""]
        lines += [f"  {'--' + name.replace('_', '-') + ({Path: ' FILE', None: ''}.get(action.convert, ' VALUE')):20} "
                  f"{action.comment}" for name, action in actions.items()]
    return "\n".join(lines)


def config_text(config: SimpleNamespace, comments: bool = False) -> str:
    """The resolved settings as YAML, from which the run can be repeated. Stage blocks are merged into the shared sections; unset
    architecture settings are included only with `comments`."""
    import yaml

    lines = []
    for name, section in vars(config).items():
        if name in SECTIONS:
            lines.append(f"{name}:")
            for f in dataclasses.fields(section):
                value = getattr(section, f.name)
                if f.name in SECTIONS and isinstance(value, dict) or name == "model" and value is None and not comments:
                    continue
                text = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6,
                                      allow_unicode=True).strip()[1:-1]
                text = json.dumps(value) if "\n" in text else text
                lines.append(f"  {f.name + ': ' + text:44} # {f.metadata['comment']}" if comments else f"  {f.name}: {text}")
    return "\n".join(lines) + "\n"


def settings(config: SimpleNamespace) -> dict:
    """The current settings of all sections as {"training.epochs": value}."""
    return {f"{name}.{f.name}": getattr(section, f.name)
            for name, section in vars(config).items() if name in SECTIONS for f in dataclasses.fields(section)}


def changes(config: SimpleNamespace) -> list[str]:
    """Log lines for the start of a run: non-default settings, and the values that replace `auto` and null."""
    now = settings(config)
    replaced = [key for key in ("training.epochs", "training.max_steps", "training.max_minutes", "model.name", "model.preset")
                if key in now and config.given[key] is None]  # by another setting of the list
    keys_of = {"settings": [key for key in now
                            if config.given[key] != config.defaults[key] and key not in ("output.dir", *replaced)],
               "resolved": [key for key in now if now[key] != config.given[key]]}
    return [f"{kind}: {', '.join(f'{key} {json.dumps(now[key], default=str, ensure_ascii=False)}' for key in keys)}"
            for kind, keys in keys_of.items() if keys]


def overrides(section) -> dict:
    """The architecture settings that are set in a `model` section."""
    return {k: v for k, v in dataclasses.asdict(section).items() if k in KNOBS and v is not None}


# a full, read-only or failing disk, or no permission
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


def run_main(main: Callable, argv: list[str] | None = None) -> None:
    """Run `main`. Exit status: 0; 2 for an error of the user or the disk, shown as one line; 130 for Ctrl-C; other exceptions
    keep a traceback."""
    if sys.stdout is None:  # closed, as in a service
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for characters that a console cannot encode
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        key = re.match(r"\w+\.\w+(?=:)", str(error))
        origin = f" ({ORIGINS[key[0]]})" if key and key[0] in ORIGINS else ""
        print(f"error: {' '.join(str(error).splitlines())}{origin}", file=sys.stderr, flush=True)  # values may have line ends
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader has closed the pipe (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename or 'a file'}: {error.strerror}; check the disk's space and permissions"
        print(f"error: {what}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main(argv: list[str] | None = None) -> None:
    actions = {"list": Action("list all presets with their sizes")}
    config = load_config(argv, {"model": ModelSection}, "model", actions, __doc__)
    if config.actions.list:
        print(preset_table())
    elif config.model.name:
        folder = resolve_folder(config.model.name)
        if is_foreign(read_json(folder / "config.json")):
            model = load(config.model.name)
            print(f"{model.config.model_type}, run by transformers: {count_parameters(model)[0]:,} parameters, "
                  f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}, context "
                  f"{model.config.max_position_embeddings:,}")
        else:
            print(summary(dataclasses.replace(read_config(folder), **overrides(config.model))))
    else:
        print(summary(preset_config(config.model.preset, **overrides(config.model))))


if __name__ == "__main__":
    run_main(main)
