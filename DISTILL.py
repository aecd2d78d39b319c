"""DISTILL.py: a small student learns from a large teacher.

A text says which word came next; a teacher says how likely every word was. Read in this order: settings, the losses
(each a short function with its paper), how a teacher is asked (in memory, from a cache on the disk, through another
tokenizer, layer by layer), the student's own texts as a stream, answers written by the teacher, and the command line.

    python DISTILL.py --config config.yaml                                    # out -> out/distill, a quarter of the size
    python DISTILL.py --teacher out/sft --method hidden --out out/small-chat  # conversations; its hidden states as well
    python DISTILL.py --teacher out/sft --model out/small-chat --lmbda 0.5 --out out/on-policy   # half of the steps on its own texts
    python DISTILL.py --cache --cache-dir out/cache && python DISTILL.py --cache-dir out/cache --out out/from-cache
    python DISTILL.py --generate --teacher out/sft --data data/prompts.jsonl --out out/answers.jsonl   # for SFT.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import INFER
import MODEL
import RL
import SFT
import TOKENIZER
import TRAIN
from MODEL import Action, UserError, check, knob, load_config, run_main, say

# ---------------------------------------------------------------------------------------------------- settings

@dataclass
class DistillSection:
    teacher: str = knob("./out", "teacher model: a folder (also of an adapter) or a hub name", often=True)
    teacher_dtype: str = knob("auto", "dtype of the teacher's weights; auto keeps the stored one if the device supports it well",
                              ("auto", *MODEL.DTYPES))
    teacher_quantization: str = knob("none", "quantize the teacher: none, nf4 or int8", MODEL.QUANTIZATIONS)
    method: str = knob("logits", "logits, hidden (logits and hidden states), or universal (across tokenizers)",
                       ("logits", "hidden", "universal"), often=True)
    task: str = knob("auto", "data format: text (as in TRAIN.py) or chat (as in SFT.py); auto is chat for records and a teacher "
                             "with a chat template", ("auto", "text", "chat"), often=True)
    alpha: float = knob(0.1, "weight of the cross-entropy on the data; 1 - alpha weights the distillation loss", low=0, high=1,
                        often=True)
    beta: float = knob(0.0, "0 is the forward KL(teacher || student), 1 the reverse KL, in between Jensen-Shannon", low=0, high=1,
                       only=("method", "logits", "hidden"), often=True)
    temperature: float = knob(1.0, "softmax temperature of both models in the loss (Hinton 2015)", low=1e-3, often=True)
    lmbda: float = knob(0.0, "fraction of steps on completions that the student generates (on-policy)", low=0, high=1, often=True)
    hidden_weight: float = knob(1.0, "hidden: weight of the mean squared error between hidden states", low=0,
                                only=("method", "hidden"), often=True)
    cosine_weight: float = knob(1.0, "hidden: weight of the cosine distance between hidden states", low=0,
                                only=("method", "hidden"), often=True)
    layer_map: dict | None = knob(None, "hidden: {student layer: teacher layer}, 0 is the embeddings; null spreads them evenly",
                                  only=("method", "hidden"))
    init_layers: list[int] | None = knob(None, "initialize the student from these teacher layers, such as [0, 2]; null uses "
                                               "`model`", often=True)
    cache_dir: str | None = knob(None, "folder of cached teacher outputs (written by --cache), used instead of the teacher",
                                 often=True)
    cache_top_k: int = knob(64, "number of top log-probabilities cached per token, plus the remaining probability mass", low=1)
    cache_dtype: str = knob("float16", "dtype of the cache", ("float16", "float32"))
    train_on_prompt: bool = knob(False, "chat: train on user messages as well")
    columns: dict | None = knob(None, "column mapping: {prompt: my_column, completion: another}")
    system: str | None = knob(None, "system message for conversations without one")
    eval_answers: int = knob(1000, "chat: held-out questions to answer in each validation (exact match); 0 is off", low=0)
    max_completion_length: int = knob(64, "maximum tokens per completion", low=1, often=True)
    sampling_temperature: float | None = knob(None, "sampling temperature; null is 1, and 0 for --generate with one completion "
                                                    "per prompt", low=0)
    top_k: int = knob(0, "sample from the k most probable tokens; 0 is off", low=0)
    top_p: float = knob(1.0, "sample from the smallest set with this cumulative probability", above=0, high=1)
    rollout_size: int = knob(256, "on-policy: completions per rollout, over all processes; a multiple of the optimizer step",
                             low=1)
    rollout_batch_size: int = knob(256, "completions generated at a time on one device", low=1)
    num_generations: int = knob(1, "--generate: completions per prompt", low=1)
    reward_funcs: list[str] = knob([], "--generate: reward functions as in rl.reward_funcs; only the best completion is kept")
    reward_weights: list[float] | None = knob(None, "weight of each reward function; null is 1")
    reward_threshold: float | None = knob(None, "--generate: drop completions with a lower reward")
    model: dict = knob({"preset": "llama-225k"}, "the student model")
    data: dict = knob({}, "overrides `data`; conversations default to data/chat.jsonl")
    training: dict = knob({}, "overrides `training` for this stage")
    lora: dict = knob({}, "overrides `lora` for this stage")
    output: dict = knob({"dir": "./out/distill"}, "overrides `output` for this stage")

    def __post_init__(self):
        check(self, "distill")
        if self.method != "logits" and self.cache_dir:
            raise UserError(f"distill.cache_dir: a cache holds probabilities over the student's own vocabulary; distill.method "
                            f"{self.method} needs the teacher itself")
        if self.lmbda and self.cache_dir:
            raise UserError("distill.lmbda: a cache knows nothing of what the student writes; leave out distill.cache_dir")
        if self.lmbda and self.method == "universal":
            raise UserError("distill.lmbda: the student's own texts are compared token by token; distill.method universal "
                            "cannot do that")
        if self.alpha == 1 and (self.lmbda or self.method == "universal"):
            raise UserError(f"distill.alpha: 1 asks no teacher, and "
                            f"{'distill.lmbda' if self.lmbda else 'distill.method universal'} needs one; choose a smaller one")
        if self.method == "hidden" and not (self.hidden_weight or self.cosine_weight):
            raise UserError("distill.hidden_weight and distill.cosine_weight: one of them must be above 0 for distill.method "
                            "hidden")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise UserError(f"distill.reward_weights: {len(self.reward_weights)} for {len(self.reward_funcs)} "
                            "distill.reward_funcs; one for each is expected")

    @property
    def asks_teacher(self) -> bool:
        return self.alpha < 1 or self.method == "hidden"


# ------------------------------------------------------------------------------------------------------ losses


class Divergence(torch.autograd.Function):
    """Logits (..., V) of student and teacher -> divergences (...) in nats. The gradient is known in closed form, so of a batch's
    float32 distributions none is kept for backward, only the gradient itself in the logits' own type."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
        s, t = ((logits.float() / temperature if temperature != 1 else logits.float()).log_softmax(-1)
                for logits in (student, teacher))
        t = t.clamp_(min=-100)  # e^-100 is never: a word that the teacher masks would be infinitely wrong
        if beta == 0:
            p = t.exp()
            losses = t.sub_(s).mul_(p).sum(-1)  # KL(teacher || student)
            gradient = s.exp_().sub_(p)
        else:
            q, mean = s.exp(), t  # KL(student || mean), which the teacher itself is at beta 1
            losses = 0.0
            if beta < 1:
                mean = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
                losses = beta * (t.exp() * (t - mean)).sum(-1)
            ahead = s.sub_(mean)
            reverse = (q * ahead).sum(-1, keepdim=True)
            weight = 1 - beta if beta < 1 else 1.0
            losses = losses + weight * reverse.squeeze(-1)
            gradient = ahead.sub_(reverse).mul_(q).mul_(weight)
        ctx.dtype, scale = student.dtype, torch.ones_like(losses).unsqueeze(-1)
        if student.dtype == torch.float16:  # of a short range: kept in units of each row's largest number
            scale = gradient.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
            gradient.div_(scale)
        ctx.save_for_backward(gradient.to(student.dtype), scale / temperature)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient, scale = ctx.saved_tensors
        return (gradient.float() * (scale * upstream.unsqueeze(-1))).to(ctx.dtype), None, None, None


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Logits (..., V) of both -> losses (...): T^2 times the divergence of the distributions softmax(logits / T).

    beta 0: KL(teacher || student), which makes the student cover all that the teacher thinks possible. 1: KL(student ||
    teacher), which keeps it away from what the teacher thinks impossible. Between them the generalised Jensen-Shannon
    divergence (Agarwal 2024, GKD, eq. 1): beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.
    Near its ends that goes to 0, not to a KL, of which it then is beta or 1 - beta times as much.

    A high temperature shows how the teacher ranks what it thinks unlikely. Gradients shrink with 1 / T^2, which the factor undoes
    (Hinton 2015, section 2), so that `alpha` means the same at every temperature. No gradient goes to the teacher.

    student [0, 0], teacher [2, 0], beta 0, T 1: 0.88 log(0.88 / 0.5) + 0.12 log(0.12 / 0.5) = 0.327
    """
    return temperature**2 * Divergence.apply(student_logits, teacher_logits, beta, temperature)


class Buckets(torch.autograd.Function):
    """Logits (N, V), the ids of k words (N, k) and of one (N,) -> log-probabilities (N, k + 1) of the k, and of all others
    together, at a temperature; and of the one (N,), so that cross-entropy takes no pass of its own. With g the gradient that
    comes back, word j of the k gets g_j - p_j sum(g), and each other word its share p_i / p_rest of g_rest - p_rest sum(g)."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = logits.float() / temperature if temperature != 1 else logits.float()
        weights = scaled - scaled.amax(1, keepdim=True)  # (N, V)
        chosen = weights.gather(1, targets[:, None])
        weights = weights.exp_()
        top = weights.gather(1, ids)
        rest = weights.scatter_(1, ids, 0.0).sum(1, keepdim=True).clamp_(min=1e-38)  # summed, not 1 - top: tails may be tiny
        total = top.sum(1, keepdim=True) + rest
        found = torch.cat((top.clamp(min=1e-38), rest), 1) / total  # (N, k + 1)
        ctx.save_for_backward(weights.div_(rest).to(logits.dtype), ids, targets[:, None], found)
        ctx.temperature = temperature
        return found.log(), (chosen - total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, upstream: Tensor, upstream_chosen: Tensor):
        shares, ids, targets, found = ctx.saved_tensors
        chosen = upstream_chosen[:, None]
        bucket = (upstream - found * (upstream.sum(1, keepdim=True) + chosen)) / ctx.temperature  # (N, k + 1)
        gradient = (shares.float() * bucket[:, -1:]).scatter_(1, ids, bucket[:, :-1])
        gradient.scatter_add_(1, targets, chosen / ctx.temperature)
        return gradient.to(shares.dtype), None, None, None


def top_k_loss(student_logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, beta: float = 0.0, temperature: float = 1.0,
               targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`distill_loss` from a cache: student logits (N, V); the teacher's likeliest ids (N, k), their log-probabilities at
    that temperature, and the log of what all others have together (N,) -> (N,). With `targets` (N,) also the student's
    log-probabilities of these.

    The others are one word to both sides. A divergence never grows when words are merged, so this is a lower bound: the
    forward KL lacks tail mass x KL(teacher's tail || student's tail), which is small where the tail is.
    """
    student, chosen = Buckets.apply(student_logits, ids, ids[:, 0] if targets is None else targets, temperature)
    teacher = torch.cat((logprobs, tail[:, None]), 1)  # (N, k + 1)
    if ids.shape[1] == student_logits.shape[1]:
        student, teacher = student[:, :-1], logprobs
    losses = temperature**2 * Divergence.apply(student, teacher, beta, 1.0)  # the softmax there puts back what rounding took
    return losses if targets is None else (losses, chosen)


def universal_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits (N, V) and (N, W) over different vocabularies -> (N,): sum |p_(i) - q_(i)| of the probabilities in falling
    order, the shorter list filled up with zeros (Boizard 2024, eq. 5: the Wasserstein distance where every two words are
    equally far apart). It tells how sure the teacher is and between how many words, not which."""
    student, teacher = ((logits.float() / temperature).softmax(-1).sort(-1, descending=True).values
                        for logits in (student_logits, teacher_logits))
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(p, (0, width - p.shape[-1])) for p in (student, teacher))
    return (student - teacher).abs().sum(-1)


def hidden_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (..., C) -> mean squared errors (...) (Jiao 2020, TinyBERT, eq. 8), one minus cosines (...) (Sanh 2019, DistilBERT, section 3)."""
    student, teacher = student.float(), teacher.float()
    return ((student - teacher) ** 2).mean(-1), 1 - F.cosine_similarity(student, teacher, dim=-1)


# ----------------------------------------------------------------------------------------------- asking a teacher


class Teacher(NamedTuple):
    """A frozen model with its tokenizer, or what is known of one whose words are in a cache."""

    name: str
    model: MODEL.LanguageModel | None
    tokenizer: object
    parameters: int
    context: int
    causal: bool


def load_teacher(config, device, needed: bool = True) -> Teacher:
    """`needed`: whether it will have to answer; else its tokenizer and its settings are enough."""
    settings, name = config.distill, config.distill.teacher
    if not needed:
        base, tokenizer = RL.base_and_tokenizer(name, "distill.teacher")
        folder = MODEL.resolve_folder(base or name, "distill.teacher")
        causal = MODEL.is_foreign(MODEL.read_json(folder / "config.json")) or MODEL.read_config(folder).causal
        return Teacher(name, None, tokenizer, 0, MODEL.context_length(base or name, {}), causal)
    form = None if settings.teacher_quantization == "none" else settings.teacher_quantization
    dtype = settings.teacher_dtype
    if dtype == "float16" and str(device) == "cpu":
        say("distill.teacher_dtype: float16 on a CPU is slow; the teacher computes in float32")
        dtype = "float32"
    model, tokenizer = RL.second_model(name, "distill.teacher", dtype=dtype, device=device,
                                       attn_implementation=config.model.attn_implementation, quantization=form)
    if "lm" not in model.heads:
        raise UserError(f"distill.teacher: {name} gives words no probability, it has a head for labels or rewards")
    return Teacher(name, model, tokenizer, MODEL.count_parameters(model)[0], model.config.max_position_embeddings,
                   model.config.causal)


def words_of(teacher: Teacher) -> int:
    """Logits may be padded to a rounder number than there are words: those mean nothing."""
    return min(len(teacher.tokenizer), teacher.model.config.vocab_size)


def hold(teacher: MODEL.LanguageModel, mixed: str) -> None:
    """Keep float32 matrices in the type that they will be multiplied in."""
    if mixed != "no" and teacher.dtype == torch.float32:
        MODEL.narrow_frozen(teacher, MODEL.AUTOCAST[mixed])


@torch.no_grad()
def states_of(teacher: MODEL.LanguageModel, batch: dict, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """(last hidden states (B, T, C), all of them in Hugging Face's order if `keep`). Logits are left to `head_logits`, row by row."""
    hidden, states, _ = teacher.backbone(batch["input_ids"], batch["positions"], None, batch["segment_ids"], None, keep)
    return hidden, states


class InMemory:
    """The teacher reads the batch that the student reads."""

    def __init__(self, teacher: Teacher, settings: DistillSection):
        self.model, self.words, self.settings = teacher.model, words_of(teacher), settings

    def __call__(self, batch: dict) -> tuple[Callable, list[Tensor]]:
        """(`reduce` for the student's forward, the teacher's hidden states)."""
        settings = self.settings
        hidden, states = states_of(self.model, batch, settings.method == "hidden")
        hidden = hidden.flatten(0, 1)  # (B*T, C)

        def reduce(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                expected = self.model.head_logits(hidden[rows])[:, : self.words]
            return {"divergence": distill_loss(logits[:, : self.words], expected, settings.beta, settings.temperature)}

        return reduce, states


# ------------------------------------------------------------------------------------------------- cached teacher

CACHE_VERSION = 1
MOVING_ROWS = "rows must be the same in every epoch; data.streaming, data.weights and masked language modelling change them"
CACHE_BLOCK = 16  # batches between two notes of how far the cache is written


def is_fixed(rows, config) -> bool:
    """Whether rows are the same in every epoch, so that what the teacher said of one stays true."""
    return isinstance(rows, TOKENIZER.TokenStream) and not (config.data.weights or config.data.streaming)


def need_fixed(rows, config, key: str) -> None:
    if not is_fixed(rows, config):
        raise UserError(f"{key}: {MOVING_ROWS}")


def data_mark(cut) -> str:
    """Names what rows hold: ids, weights, and where each row begins and ends."""
    digest, spans = hashlib.blake2b(digest_size=16), cut.spans
    for start in range(0, len(spans.ids), 2**24):
        digest.update(np.ascontiguousarray(spans.ids[start : start + 2**24]).astype("<i8").tobytes())
    for array in (np.zeros(0) if spans.weights is None else spans.weights, spans.starts, spans.lengths):
        digest.update(np.ascontiguousarray(array).tobytes())
    some = np.concatenate([cut.row(i) for i in {0, cut.count // 2, cut.count - 1}]).flatten()
    digest.update(json.dumps([cut.count, *map(int, some)]).encode())
    return digest.hexdigest()


def teacher_mark(name: str) -> str | None:
    """Names a teacher's weights, by the sizes of its files and 64 samples of each; None where they are not here."""
    try:
        folder = MODEL.resolve_folder(name, "distill.teacher")
    except UserError:
        return None
    digest = hashlib.blake2b(digest_size=16)
    if (folder / "adapter_config.json").exists():
        digest.update(str(teacher_mark(MODEL.adapter_config(folder).base_model_name_or_path)).encode())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(size // 64, 2**16)):
                file.seek(place)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def make_room(path: Path, size: int) -> None:
    """A file of this size whose blocks exist: writing to a memory map on a full disk would kill the process without a word."""
    with open(path, "wb") as file, room_for(path, f"{size:,} bytes are needed for the cache"):
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)


@contextlib.contextmanager
def alone_at(lock: Path, key: str):
    """The first process holds the lock for all."""
    with TRAIN.locked(lock, key) if MODEL.process_rank() == 0 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def on_interrupt(what: str):
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped. {what}")
        raise


@contextlib.contextmanager
def room_for(path: Path, what: str):
    try:
        yield
    except OSError as error:
        if not TRAIN.is_disk_full(error, path.parent):
            raise
        raise UserError(f"{path}: the disk is full; {what}") from None


def row_starts(cut) -> np.ndarray:
    """How many targets stand before each row."""
    return np.cumsum([0, *(trained_of(cut, i) for i in range(cut.count))])


def trained_of(cut, number: int) -> int:
    """How many targets a row has."""
    weights = cut.spans.weights
    return sum(stop - start if weights is None else int(np.count_nonzero(weights[start + 1 : stop + 1]))
               for start, stop in cut.row(number))


class Cache:
    """What a teacher says of every target of fixed rows, on the disk: the k likeliest ids and their log-probabilities, and the log
    of what is left for all others. Entries follow the rows; `ids.bin`, `logprobs.bin` and `tail.bin` are plain little-endian arrays."""

    def __init__(self, folder: Path, facts: dict, mode: str = "r", fresh: bool = False):
        self.folder, self.facts = folder, facts
        n, k = facts["tokens"], facts["top_k"]
        shapes = {"ids": (facts["ids"], (n, k)), "logprobs": (facts["logprobs"], (n, k)), "tail": ("float32", (n,))}
        self.arrays = {}
        for name, (dtype, shape) in shapes.items():
            path, size = folder / f"{name}.bin", math.prod(shape) * np.dtype(dtype).itemsize
            if fresh:
                make_room(path, size)
            if not path.exists() or path.stat().st_size != size:
                there = f"{path.stat().st_size:,} bytes" if path.exists() else "nothing"
                raise UserError(f"distill.cache_dir: {path} holds {there}, {size:,} are expected: it was cut short; write it "
                                "anew with --cache --overwrite")
            self.arrays[name] = np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode, shape=shape)

    @classmethod
    def open(cls, folder: Path) -> Cache:
        if not (folder / "cache.json").exists():
            unfinished = "; an unfinished cache is there" if (folder / "cache.part.json").exists() else ""
            raise UserError(f"distill.cache_dir: {folder} holds no cache{unfinished}; `DISTILL.py --cache --cache-dir {folder}` "
                            "writes one")
        facts = MODEL.read_json(folder / "cache.json")
        if facts.get("version") != CACHE_VERSION:
            raise UserError(f"distill.cache_dir: {folder / 'cache.json'} is of version {facts.get('version')}, this program "
                            f"reads {CACHE_VERSION}; write it anew with --cache")
        return cls(folder, facts)

    def check(self, cut, settings: DistillSection, length: int) -> None:
        """Whether it was made from these rows, by this teacher, for these settings."""
        mark = teacher_mark(settings.teacher)
        if mark is None:
            say(f"distill.teacher: {settings.teacher} is not here; the cache tells that it was made by {self.facts['teacher']}")
        if mark not in (None, self.facts["teacher_mark"]):
            known = self.facts["teacher"]
            how = f"an earlier {known}, whose weights have changed" if known == settings.teacher else f"the teacher {known}, not by distill.teacher {settings.teacher}: say --teacher {known}"
            raise UserError(f"distill.cache_dir: {self.folder} was made by {how}; or write it anew with --cache --overwrite")
        if self.facts["temperature"] != settings.temperature:
            raise UserError(f"distill.temperature: {settings.temperature:g}, but {self.folder} was made for "
                            f"{self.facts['temperature']:g}; the unlikely words' share is known for that one alone")
        if self.facts["max_length"] != length:
            raise UserError(f"training.max_length: rows have {length} tokens, those of {self.folder} {self.facts['max_length']}")
        if self.facts["data_mark"] != data_mark(cut):
            raise UserError(f"distill.cache_dir: {self.folder} was made from other data (data.train, data.validation, "
                            "data.packing or the tokenizer changed); write it anew with --cache --overwrite")

    def write(self, first: int, ids: Tensor, logprobs: Tensor, tail: Tensor) -> None:
        there = slice(first, first + len(ids))
        limit = -6e4 if self.facts["logprobs"] == "float16" else -1e30
        self.arrays["ids"][there], self.arrays["logprobs"][there], self.arrays["tail"][there] = ids, logprobs.clamp(min=limit), tail

    def read(self, pieces: list[slice]) -> dict[str, Tensor]:
        """Entries of several places, one after another."""
        names = {"ids": np.int64, "logprobs": np.float32, "tail": np.float32}
        found = {name: [np.asarray(self.arrays[name][piece], dtype) for piece in pieces] or [self.arrays[name][:0].astype(dtype)]
                 for name, dtype in names.items()}
        return {f"cached_{name}": torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


BARE_RUN = SimpleNamespace(seed=0, grad_accum=1, world_size=1, rank=0)  # enough to cut rows


def numbers_of(rows: TOKENIZER.TokenStream, batch: dict) -> list[int]:
    """Which rows of the plan, as it was cut, a batch holds."""
    first = batch["place"][2]
    return rows.plan.order[first : min(first + rows.batch_size, rows.plan.count)].tolist()


class CachedRows:
    """A stream of rows, each with what the cache holds of it."""

    def __init__(self, rows: TOKENIZER.TokenStream, cache: Cache, settings: DistillSection):
        self.rows, self.cache, self.settings = rows, cache, settings
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    def check(self) -> None:
        self.rows.start(BARE_RUN)
        self.cache.check(self.rows.plan.plan, self.settings, self.rows.length)

    def start(self, run) -> None:
        self.rows.start(run)
        self.steps_per_epoch, self.starts = self.rows.steps_per_epoch, row_starts(self.rows.plan.plan)

    def __next__(self) -> dict:
        batch = next(self.rows)
        return {**batch, **self.cache.read([slice(self.starts[i], self.starts[i + 1]) for i in numbers_of(self.rows, batch)])}


class FromCache:
    """The teacher's words of this batch, as the cache holds them."""

    def __init__(self, words: int, settings: DistillSection):
        self.words, self.settings = words, settings

    def __call__(self, batch: dict) -> tuple[Callable, list]:
        trained = (batch["targets"] != -100).flatten()
        entry = trained.cumsum(0) - 1  # (B*T,) which entry belongs to a place

        def reduce(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
            places = entry[rows]
            cached = (batch[f"cached_{name}"][places] for name in ("ids", "logprobs", "tail"))
            beta, temperature = self.settings.beta, self.settings.temperature
            if temperature != 1 or self.words != logits.shape[1]:  # else the data's words are of the same distribution
                return {"divergence": top_k_loss(logits[:, : self.words], *cached, beta, temperature)}
            return dict(zip(("divergence", "logprobs"), top_k_loss(logits, *cached, beta, 1.0, batch["targets"].flatten()[rows]),
                            strict=True))

        return reduce, []


def write_cache(config) -> None:
    """The teacher reads all rows once. A kill costs what was written since the last note; several processes share the rows."""
    settings, training = config.distill, config.training
    if not settings.cache_dir:
        raise UserError("--cache: name the folder to write with --cache-dir")
    folder = Path(settings.cache_dir)
    TRAIN.check_apart(folder, teacher=settings.teacher)
    if (folder / "config.json").exists() or TRAIN.checkpoints(folder):
        raise UserError(f"distill.cache_dir: {folder} holds a model; a cache needs a folder of its own")
    _, device = TRAIN.start_processes(training, config.model.device, folder)
    teacher = load_teacher(config, device)
    TRAIN.fit_length(config, teacher.context, "the teacher's")
    rows, _, _ = read_rows(config, teacher.tokenizer, teacher, task_of(config, teacher))
    need_fixed(rows, config, "--cache")
    rows.start(BARE_RUN)
    mixed = TRAIN.precision(training, config.model.dtype, device)
    facts = {**cache_facts(settings, training, teacher, rows.plan.plan), "mixed_precision": mixed}
    stays = f"{folder}: what was noted stays there, and the same command goes on"
    with alone_at(folder / ".lock", "distill.cache_dir"), on_interrupt(stays):
        done = begin_cache(folder, facts, bool(config.actions.overwrite), teacher.tokenizer)
        hold(teacher.model, mixed)
        fill_cache(Cache(folder, facts, "r+"), rows.plan.plan, teacher.model, TRAIN.Run(teacher.model, training, device, mixed),
                   training.batch_size, done)
        if MODEL.process_rank() == 0:
            MODEL.write_text(folder / "cache.json", json.dumps(facts, indent=1) + "\n")
            (folder / "cache.part.json").unlink(missing_ok=True)
            size = sum((folder / f"{name}.bin").stat().st_size for name in ("ids", "logprobs", "tail"))
            say(f"{folder}: {facts['tokens']:,} tokens of {facts['rows']:,} rows, {size / max(facts['tokens'], 1):.0f} bytes "
                f"each (the {facts['top_k']} likeliest of {facts['vocab_size']:,}); train with --cache-dir {folder}")


def cache_facts(settings: DistillSection, training, teacher: Teacher, cut) -> dict:
    """All that decides what a cache holds, and what training has to know of a teacher that is not there."""
    words = words_of(teacher)
    return {"version": CACHE_VERSION, "teacher": teacher.name, "teacher_mark": teacher_mark(teacher.name),
            "teacher_dtype": settings.teacher_dtype, "teacher_quantization": settings.teacher_quantization,
            "parameters": teacher.parameters, "context": teacher.context, "causal": teacher.causal,
            "tokenizer": TOKENIZER.fingerprint(teacher.tokenizer), "vocab_size": words, "data_mark": data_mark(cut),
            "rows": cut.count, "tokens": int(row_starts(cut)[-1]), "max_length": training.max_length,
            "temperature": settings.temperature, "top_k": min(settings.cache_top_k, words),
            "ids": "uint16" if words <= 2**16 else "uint32", "logprobs": settings.cache_dtype}


@torch.no_grad()
def fill_cache(cache: Cache, cut, teacher: MODEL.LanguageModel, run: TRAIN.Run, size: int, done: int) -> None:
    """Blocks of batches, each noted when it is on the disk."""
    starts = row_starts(cut)
    bar = Progress(cut.count, done, "rows")
    while done < cut.count:
        stop = min(done + CACHE_BLOCK * size * run.world_size, cut.count)
        for first in range(done + run.rank * size, stop, run.world_size * size):
            numbers = range(first, min(first + size, stop))
            batch = TOKENIZER.collate(cut.spans, [cut.row(i) for i in numbers])
            with run.autocast():
                cache.write(int(starts[first]), *likeliest(teacher, TRAIN.on_device(batch, run.device), cache.facts))
            bar.show(numbers[-1] + 1)
        for array in cache.arrays.values():
            array.flush()
        TRAIN.barrier()
        done = stop
        if run.rank == 0:
            MODEL.write_text(cache.folder / "cache.part.json", json.dumps({**cache.facts, "done": done}))
    bar.close()


STARTED = {"data_mark": "other data", "teacher_mark": "another teacher", "tokenizer": "another tokenizer"}


def begin_cache(folder: Path, facts: dict, overwrite: bool, tokenizer) -> int:
    """Rows that are written already; clears what stands in the way if it may."""
    if MODEL.process_rank() == 0:
        part, whole = folder / "cache.part.json", folder / "cache.json"
        if whole.exists() and not overwrite:
            raise UserError(f"distill.cache_dir: {folder} holds a whole cache; --overwrite replaces it, or train with it")
        known = MODEL.read_json(part) if part.exists() and not overwrite else None
        if known and (other := [key for key in facts if key != "teacher" and known.get(key) != facts[key]]):
            raise UserError(f"distill.cache_dir: {folder} was started with "
                            f"{' and '.join(STARTED.get(key, f'another {key}') for key in other[:2])}; --overwrite starts over")
        if not known:
            for path in (whole, part):
                path.unlink(missing_ok=True)
            with room_for(part, "nothing was written"):
                TOKENIZER.save(tokenizer, folder)
                Cache(folder, facts, "r+", fresh=True)
                MODEL.write_text(part, json.dumps({**facts, "done": 0}))
        elif known["done"]:
            say(f"{folder}: going on from row {known['done']:,} of {facts['rows']:,}")
    TRAIN.barrier()
    return MODEL.read_json(folder / "cache.part.json")["done"]


def likeliest(teacher: MODEL.LanguageModel, batch: dict, facts: dict) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (N, k), log-probabilities (N, k), log of the rest's probability (N,)) at the N targets of a batch."""
    hidden, _ = states_of(teacher, batch)
    hidden = hidden[batch["targets"] != -100]  # (N, C)
    found = []
    for part in hidden.split(max(1, 2**25 // teacher.config.vocab_size)):
        logprobs = (teacher.head_logits(part)[:, : facts["vocab_size"]].float() / facts["temperature"]).log_softmax(-1)
        top, ids = logprobs.topk(facts["top_k"], -1)
        rest = logprobs.scatter(1, ids, -math.inf).logsumexp(1)
        found.append((ids.cpu(), top.cpu(), rest.cpu()))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


class Progress:
    """A line on stderr that tells how far long work is."""

    def __init__(self, total: int, done: int, what: str):
        self.total, self.first, self.what, self.line = total, done, what, TRAIN.StatusLine()
        self.clock = self.shown = time.perf_counter()
        self.close = self.line.close

    def show(self, done: int) -> None:
        now = time.perf_counter()
        if MODEL.process_rank() or (now - self.shown < (0.2 if sys.stderr.isatty() else 5) and done < self.total):
            return
        self.shown, speed = now, (done - self.first) / max(now - self.clock, 1e-9)
        self.line.show(f"[{'#' * int(20 * done / self.total):<20}] {done:,}/{self.total:,} {self.what} | {speed:,.1f} "
                       f"{self.what}/s | {(self.total - done) / max(speed, 1e-9):.0f} s left")


# ---------------------------------------------------------------------------------------------- another tokenizer


def spell(tokenizer, ids: list[int]) -> tuple[str, dict[int, int]]:
    """(the text of ids, {characters: tokens that spell them}): after how many tokens a text of that length is whole.

    Tokens "Hel", "lo", "!" -> ("Hello!", {0: 0, 3: 1, 5: 2, 6: 3}); half a character is not counted."""
    pieces, detokenizer = "", INFER.Detokenizer(tokenizer)
    places = {0: 0}
    for count, token in enumerate(ids, 1):
        piece = detokenizer.push(int(token))
        pieces += piece
        if piece:
            places.setdefault(len(pieces), count)
    return pieces + detokenizer.flush(), places


def align(student: tuple[str, dict[int, int]], teacher: tuple[str, dict[int, int]]) -> list[tuple[int, int]]:
    """(tokens of the one, tokens of the other) after which both have read the same characters."""
    same = len(os.path.commonprefix([student[0], teacher[0]]))
    return [(count, teacher[1][place]) for place, count in student[1].items() if place <= same and place in teacher[1]]


class BothTokenizers:
    """A stream of rows, each beside the same text in the teacher's ids, and the places where both have read the same characters:
    there both predict what follows, and only there they are compared."""

    def __init__(self, rows: TOKENIZER.TokenStream, tokenizer, teacher: Teacher, samples: list | None):
        self.rows, self.tokenizer, self.teacher, self.samples = rows, tokenizer, teacher, samples
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # start of a piece -> (the teacher's ids, places (n, 2))

    def start(self, run) -> None:
        self.rows.start(run)
        self.steps_per_epoch = self.rows.steps_per_epoch

    def teacher_piece(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if start not in self.known:
            ids = self.rows.plan.spans.ids[start : stop + 1].tolist()
            teacher_ids, places = self.conversation(start, ids) if self.samples else self.text(ids)
            room = self.teacher.context
            self.known[start] = (np.array(teacher_ids[: room + 1], np.int64),
                                 np.array([(i, j) for i, j in places if i < len(ids) - 1 and j < min(len(teacher_ids) - 1, room)],
                                          np.int64).reshape(-1, 2))
        return self.known[start]

    def text(self, ids: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        special, tokenizer = set(self.tokenizer.all_special_ids), self.teacher.tokenizer
        first = int(ids[0] in special)  # else the piece begins inside of a text
        student = spell(self.tokenizer, ids[first:])
        teacher_ids = tokenizer(student[0], add_special_tokens=False).input_ids
        end = [] if ids[-1] not in special else [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else TOKENIZER.begin_id(tokenizer)]
        pairs = align(student, spell(tokenizer, teacher_ids))
        return [TOKENIZER.begin_id(tokenizer), *teacher_ids, *end], [(i + first - 1, j) for i, j in pairs if i + first > 0]

    def conversation(self, start: int, ids: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        sample = self.samples[int(np.searchsorted(self.rows.plan.spans.starts, start))]
        other, pairs = SFT.Sample(sample.where, sample.record, self.teacher.tokenizer, SFT.SFTSection()), []
        if "text" in sample.record:
            return self.text(ids)
        # turn by turn: what templates put around them differs
        for (_, a, b), (_, c, d) in zip(sample.turns, other.turns, strict=True):
            a, c = max(a, 1), max(c, 1)
            pairs += [(a - 1 + i, c - 1 + j)
                      for i, j in align(spell(self.tokenizer, ids[a:b]), spell(self.teacher.tokenizer, other.ids[c:d]))]
        return other.ids, pairs

    def __next__(self) -> dict:
        batch = next(self.rows)
        numbers, cut = numbers_of(self.rows, batch), self.rows.plan.plan
        rows = [[(stop - start, *self.teacher_piece(start, stop)) for start, stop in cut.row(i)] for i in numbers]
        rows += [[]] * (len(batch["input_ids"]) - len(rows))  # padding
        pieces = [ids for row in rows for _, ids, _ in row]
        ends = iter(np.cumsum([len(ids) for ids in pieces]).tolist())
        spans = [[(end - len(ids), end - 1) for _, ids, _ in row for end in [next(ends)]] for row in rows]
        aligned_batch = TOKENIZER.collate(SimpleNamespace(ids=np.concatenate([*pieces, [0]]).astype(np.int64), weights=None),
                                          spans)
        width, places = aligned_batch["input_ids"].shape[1], torch.full(batch["input_ids"].shape, -1)
        for r, row in enumerate(rows):
            at = there = 0
            for length, ids, pairs in row:
                places[r, at + pairs[:, 0]] = torch.from_numpy(r * width + there + pairs[:, 1])
                at, there = at + length, there + len(ids) - 1
        places[batch["targets"] == -100] = -1
        batch |= {f"teacher_{name}": value
                  for name, value in aligned_batch.items() if name in ("input_ids", "positions", "segment_ids")}
        aligned = (places >= 0).sum() if batch["weights"] is None else batch["weights"][places >= 0].sum()
        return {**batch, "places": places, "counts": {**batch["counts"], "aligned": float(aligned)}}


class ThroughText:
    """The teacher reads the same text in its own tokens."""

    def __init__(self, teacher: Teacher, settings: DistillSection):
        self.model, self.words, self.settings = teacher.model, words_of(teacher), settings

    def __call__(self, batch: dict) -> tuple[Callable, list]:
        hidden, _ = states_of(self.model,
                              {name.removeprefix("teacher_"): value
                               for name, value in batch.items() if name.startswith("teacher_")})
        hidden, places = hidden.flatten(0, 1), batch["places"].flatten()

        def reduce(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
            there = (places[rows] >= 0).nonzero()[:, 0]
            with torch.no_grad():
                expected = self.model.head_logits(hidden[places[rows][there]])[:, : self.words]
            losses = universal_loss(logits[there], expected, self.settings.temperature)
            return {"divergence": losses.new_zeros(len(rows)).index_copy(0, there, losses)}

        return reduce, []


# -------------------------------------------------------------------------------------------------- hidden states


def spread_layers(student: int, teacher: int) -> dict[int, int]:
    """Which of the teacher's states each of the student's learns from: 2 layers of 6 -> {0: 0, 1: 3, 2: 6} (Jiao 2020, section 4.1)."""
    return {i: round(i * teacher / student) for i in range(student + 1)}


def read_layer_map(given: dict | None, student: int, teacher: int) -> dict[int, int]:
    if given is None:
        return spread_layers(student, teacher)
    for key, value in given.items():
        for layer, count, whose in ((key, student, "student"), (value, teacher, "teacher")):
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= count:
                raise UserError(f"distill.layer_map: {key}: {value}: the {whose} has layers 0 (its embeddings) to {count}, "
                                f"{layer!r} is none of them")
    if not given:
        raise UserError("distill.layer_map: no layer is named, as in {0: 0, 3: 6}")
    return dict(given)


def add_projections(student: MODEL.LanguageModel, width: int, layers: list[int], seed: int) -> None:
    """Let the student's forward return the mapped hidden states alone, in the teacher's width: where widths differ, through a matrix
    for each that is learnt beside the student and thrown away (Jiao 2020, eq. 8)."""
    size = student.config.hidden_size
    if size != width:
        student.projections = nn.ModuleDict({str(layer): nn.Linear(size, width, bias=False) for layer in layers})
        generator = torch.Generator().manual_seed(seed)
        for matrix in student.projections.values():
            nn.init.normal_(matrix.weight, std=size**-0.5, generator=generator)

    def project(module: nn.Module, _, out: MODEL.Output) -> MODEL.Output:
        if out.hidden_states is None:
            return out
        states = [out.hidden_states[layer] for layer in layers]
        if size != width:
            states = [module.projections[str(layer)](state) for layer, state in zip(layers, states, strict=True)]
        return out._replace(hidden_states=tuple(states))

    student.register_forward_hook(project)


def student_of(teacher: Teacher, layers: list, head_seed: int, attn_implementation: str) -> MODEL.Transformer:
    """The teacher with some of its layers: the same embeddings, head and norms (Sanh 2019, section 3)."""
    source = teacher.model
    if not isinstance(source, MODEL.Transformer) or source.adapter or source.quantization != "none":
        raise UserError("distill.init_layers: layers are taken from a whole, unpacked model of a family known here (merge an "
                        "adapter first; distill.teacher_quantization none)")
    count = source.config.num_hidden_layers
    if not layers or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count for i in layers):
        raise UserError(f"distill.init_layers: {layers} must name layers of the teacher, 0 to {count - 1}")
    c = source.config
    config = dataclasses.replace(c, num_hidden_layers=len(layers),
                                 layer_types=[c.layer_types[i] for i in layers] if c.layer_types else c.layer_types,
                                 mlp_only_layers=[new for new,
                                                  old in enumerate(layers) if old in c.mlp_only_layers] if c.mlp_only_layers else c.mlp_only_layers)
    student = MODEL.build(config, "lm", head_seed, attn_implementation=attn_implementation)
    weights = source.state_dict()

    def origin(name: str) -> str:
        before, found, rest = name.partition("layers.")
        number, _, tail = rest.partition(".")
        return f"{before}{found}{layers[int(number)]}.{tail}" if found else name

    student.load_state_dict({name: weights[origin(name)].float().cpu() for name in student.state_dict()})
    return student


# ---------------------------------------------------------------------------------------- the student's own texts


class StudentTexts(RL.Rollouts):
    """The student answers prompts as RL's policies do; here the teacher alone will judge, token by token."""

    section = "distill"

    def roll_out(self) -> None:
        run, clock = self.run, time.perf_counter()
        with torch.no_grad(), run.autocast():
            self.samples = RL.gather(self.draw(logprobs=False))
        lengths = [sample.length for sample in self.samples]
        self.write_transcripts()
        self.hand_out({"completions/mean_length": sum(lengths) / len(lengths), "time/rollout": time.perf_counter() - clock,
                       "completions/clipped_ratio": sum(sample.finish == "length" for sample in self.samples) / len(lengths)})

    def verdict(self, sample: RL.Sample) -> dict:
        return {}

    def __next__(self) -> dict:
        return {**super().__next__(), "sampled": True}


class Mixed:
    """Steps on the data and steps on the student's own texts in turn: of every n steps, lmbda n are on its texts."""

    def __init__(self, data, texts: StudentTexts, lmbda: float):
        self.data, self.texts, self.lmbda, self.drawn = data, texts, lmbda, 0
        self.metrics = texts.metrics

    def start(self, run) -> None:
        self.run = run
        self.data.start(run)
        self.texts.start(run)
        per_epoch = self.data.steps_per_epoch
        self.steps_per_epoch = self.texts.steps_per_epoch if self.lmbda == 1 else per_epoch and math.ceil(per_epoch / (1 - self.lmbda) - 1e-9)

    def __next__(self) -> dict:
        step = self.drawn // self.run.grad_accum
        self.drawn += 1
        sampled = math.floor((step + 1) * self.lmbda + 1e-9) > math.floor(step * self.lmbda + 1e-9)
        return next(self.texts if sampled else self.data)

    def state_dict(self) -> dict:
        return {"mixed": self.drawn // self.run.grad_accum, "data": self.data.state_dict(), "texts": self.texts.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if "mixed" not in state:
            raise UserError("--resume: the checkpoint was made with distill.lmbda 0")
        self.drawn = state["mixed"] * self.run.grad_accum
        self.data.load_state_dict(state["data"])
        self.texts.load_state_dict(state["texts"])


ANSWER_LENGTH = "distill.max_completion_length"


def student_texts(config, tokenizer, samples: list[SFT.Sample], out: Path) -> StudentTexts:
    """The prompts are the conversations up to their last answers."""
    settings, length = config.distill, config.training.max_length
    room, left, prompts = RL.Room(ANSWER_LENGTH, settings.max_completion_length, length,
                                  "training.max_length"), TOKENIZER.LeftOut(), []
    room.check()
    for sample in samples:
        messages = sample.record.get("messages") or []
        messages_before = messages[: max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)]
        if not messages_before:
            left.add("without a prompt", sample.where)
            continue
        ids = RL.prompt_ids(tokenizer, messages_before, sample.record.get("tools"))
        if room.fits(ids, sample.where, left):
            prompts.append(RL.Prompt(sample.where, messages_before, ids, {}))
    if not prompts:
        raise UserError(f"data.train: no prompt is left for distill.lmbda{left.text()}")
    say(f"{len(prompts):,} prompts for the student's own texts{left.text()}")
    rollouts = RL.RLSection(method="rloo")  # what RL's rollouts ask for and distillation has no word for stays as it is
    given = {key: getattr(settings, key) for key in ("max_completion_length", "top_k", "top_p", "rollout_size",
                                                     "rollout_batch_size")}
    temperature = 1.0 if settings.sampling_temperature is None else settings.sampling_temperature
    rollouts = SimpleNamespace(**{**vars(rollouts), **given, "temperature": temperature, "num_generations": 1,
                                  "num_iterations": 1})
    return StudentTexts(prompts, tokenizer, lambda samples: None, rollouts, config.training, None, out)


# ------------------------------------------------------------------------------------------------------- training


def distillation(ask: Callable | None, settings: DistillSection, layers: dict[int, int]) -> Callable:
    """loss_fn for `fit`: alpha cross-entropy + (1 - alpha) divergence, and what hidden states differ by. On texts that the student
    wrote itself there is nothing to imitate but the teacher: they count their divergence alone."""

    def loss_fn(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        reduce, states = ask(batch) if ask else (None, [])
        reduce = reduce if settings.alpha < 1 else None
        out = model(batch["input_ids"], positions=batch["positions"], segment_ids=batch["segment_ids"], targets=batch["targets"],
                    reduce=reduce, want=("hidden_states",) if layers else ())
        weights = (batch["targets"] != -100).float() if batch["weights"] is None else batch["weights"]  # (B, T)
        alpha = 0.0 if batch.get("sampled") else settings.alpha

        def share(values: Tensor, of: str = "tokens") -> Tensor:
            return (values * weights).sum() / totals[of]

        nats = -share(out.logprobs)
        loss, metrics = alpha * nats if alpha else 0.0, {} if batch.get("sampled") else {"nll": nats.detach()}
        if reduce:
            divergence = share(out.reduced["divergence"], "aligned" if "places" in batch else "tokens")
            loss = loss + (1 - alpha) * divergence
            metrics["divergence_on_policy" if batch.get("sampled") else "divergence"] = divergence.detach()
        if layers:
            pairs = [hidden_losses(student, states[layer])
                     for student, layer in zip(out.hidden_states, layers.values(), strict=True)]
            squared, cosine = (share(sum(values) / len(pairs)) for values in zip(*pairs, strict=True))
            loss = loss + settings.hidden_weight * squared + settings.cosine_weight * cosine
            metrics |= {"hidden_mse": squared.detach(), "hidden_cosine": cosine.detach()}
        return loss + out.aux_loss / totals["micro_batches"], {**metrics, "loss": loss.detach()}

    return loss_fn


def task_of(config, teacher: Teacher) -> str:
    """What is read: conversations where the teacher can read them and the files may hold some."""
    settings, data = config.distill, config.data
    texts = (".txt", ".md", ".text", ".bin")
    usual = data.train == TOKENIZER.DataSection().train
    task = settings.task
    if task == "auto":
        plain = not usual and any(TOKENIZER.suffix_of(path) in texts for group in TOKENIZER.expand_paths(data.train) for path in group)
        task = "chat" if teacher.tokenizer.chat_template and teacher.causal and not plain else "text"
    if task == "chat" and not teacher.tokenizer.chat_template:
        raise UserError(f"distill.task: {teacher.name} has no chat template, so it has never read a conversation; fine-tune it "
                        "with SFT.py first, or take text")
    if task == "chat" and usual:
        data.train, data.validation = ["data/chat.jsonl"], "data/chat_test.jsonl" if data.validation == "hash" else data.validation
    if task == "text" and settings.lmbda:
        why = "the teacher is an encoder" if not teacher.causal else "distill.task is text" if teacher.tokenizer.chat_template else "the teacher has no chat template"
        raise UserError(f"distill.lmbda: the student's own texts are answers to conversations; {why}")
    return task


def as_sft(config) -> SimpleNamespace:
    """The settings as SFT's readers and measures know them."""
    s = config.distill
    section = SFT.SFTSection(columns=s.columns, system=s.system, train_on_prompt=s.train_on_prompt, eval_answers=s.eval_answers,
                             answer_tokens=s.max_completion_length)
    section.section = "distill"
    return SimpleNamespace(**{**vars(config), "sft": section})


def read_rows(config, tokenizer, teacher: Teacher, task: str) -> tuple[object, Callable | None, list | None]:
    """(stream, evaluate, conversations) of the data, in rows that stay as they are cut."""
    if task == "text":
        tell_idle(config.distill, ("train_on_prompt", "columns", "system", "eval_answers", "max_completion_length"),
                  "on text, which holds no conversations")
        stream, evaluate = TRAIN.prepare_data(config, tokenizer, masked=not teacher.causal)
        if is_fixed(stream, config):
            stream.make_plan = TOKENIZER.cut_once(stream.make_plan)
        return stream, evaluate, None
    settings = as_sft(config)
    samples, kept = SFT.read_conversations(settings, tokenizer)
    stream, batches = SFT.in_batches(settings, samples, kept)
    stream.make_plan = TOKENIZER.cut_once(stream.make_plan)
    evaluate = SFT.with_answers(TRAIN.held_out_loss(batches, None) if batches else None, kept, tokenizer, settings)
    return stream, evaluate, samples


def choose_tokenizer(config, checkpoint: Path | None, teacher: Teacher):
    """The student's tokenizer: its own, or the teacher's where that holds all of the student's tokens."""
    settings, name = config.distill, config.tokenizer.name
    if config.model.name and not name:
        name = TOKENIZER.folder_of(config.actions.adapter, config.model.name)
    if settings.method == "universal" and not name and not checkpoint:
        raise UserError("distill.method: universal is for a student with a tokenizer of its own; name one with "
                        "--tokenizer.name, or a trained student with --model")
    tokenizer = TOKENIZER.load(checkpoint or name) if checkpoint or name else teacher.tokenizer
    if settings.method == "universal":
        return tokenizer
    known, vocabulary = teacher.tokenizer.get_vocab(), tokenizer.get_vocab()
    if foreign := sorted((i, token) for token, i in vocabulary.items() if known.get(token) != i):
        raise UserError(f"distill.teacher: {teacher.name} has another vocabulary than the student ({len(known):,} tokens, the "
                        f"student's {len(vocabulary):,}, of which {len(foreign):,} have another number there or none, such as "
                        f"{foreign[0][1]!r}); --distill.method universal compares across tokenizers")
    return teacher.tokenizer if len(known) > len(vocabulary) or not tokenizer.chat_template else tokenizer


def make_student(config, tokenizer, teacher: Teacher, device) -> MODEL.LanguageModel:
    settings, training, section, adapter = config.distill, config.training, config.model, config.actions.adapter
    requested = training.learning_rate, training.optim
    if settings.init_layers is not None:
        if adapter or config.lora.r:
            raise UserError("lora.r: the student of distill.init_layers is on no disk yet, where an adapter could find it "
                            "again; train it as a whole first")
        if section.name or section.preset != DistillSection().model["preset"] or MODEL.overrides(section):
            raise UserError("distill.init_layers: the student is the teacher with fewer layers; leave out --model, model.preset "
                            "and its knobs")
        source = teacher if teacher.model else load_teacher(config, "cpu")
        model = student_of(source, settings.init_layers, training.seed, section.attn_implementation)
        MODEL.grow_vocabulary(model, TOKENIZER.vocab_size(tokenizer))
        TRAIN.fit_length(config, model.config.max_position_embeddings)
    else:
        if section.name:
            SFT.need_model(config)
        model = TRAIN.prepare_model(config, tokenizer, grow=bool(section.name), adapter=bool(adapter or config.lora.r))
    if section.name or settings.init_layers is not None:
        SFT.finish_model(config, model, *requested)
    elif adapter or config.lora.r:
        raise UserError(f"{'--adapter' if adapter else 'lora.r'}: adapters learn on trained weights; name the student with "
                        "--model")
    if model.config.causal != teacher.causal:
        raise UserError(f"distill.teacher: {teacher.name} is {'a causal model' if teacher.causal else 'an encoder'}, the "
                        "student is not; they do not predict the same")
    return model


def introduce(teacher: Teacher, size: int, settings: DistillSection) -> None:
    if not settings.asks_teacher:
        return say(f"teacher {teacher.name}: lends its tokenizer and is not asked, as distill.alpha is 1")
    say(f"teacher {teacher.name}{' (from the cache)' if settings.cache_dir else ''}: {teacher.parameters:,} parameters, "
        f"{teacher.parameters / size:.1f} times the student's")
    if teacher.parameters < size:
        say("warning: the teacher is smaller than the student; did you mean it the other way round?")


def prepare(config, checkpoint: Path | None, device: torch.device) -> TRAIN.Stage:
    settings, training, out = config.distill, config.training, Path(config.output.dir)
    TRAIN.check_apart(out, teacher=settings.teacher, cache_dir=settings.cache_dir)
    cache = Cache.open(Path(settings.cache_dir)) if settings.cache_dir else None
    if cache:
        f = cache.facts
        teacher = Teacher(f["teacher"], None, TOKENIZER.load(cache.folder), f["parameters"], f["context"], f["causal"])
    else:
        teacher = load_teacher(config, device, settings.asks_teacher or settings.init_layers is not None)
    task, tokenizer = task_of(config, teacher), choose_tokenizer(config, checkpoint, teacher)
    if task == "chat":
        TOKENIZER.ensure_chat(tokenizer)
    model = make_student(config, tokenizer, teacher, device)
    if settings.method != "universal":
        TRAIN.fit_length(config, teacher.context, "the teacher's")
    if MODEL.process_rank() == 0:
        introduce(teacher, MODEL.count_parameters(model)[0], settings)
    TRAIN.is_masked(model, tokenizer)
    stream, evaluate, samples = read_rows(config, tokenizer, teacher, task)
    if samples is not None:
        TOKENIZER.end_with_turns(model, tokenizer)
    layers = read_layer_map(settings.layer_map, model.config.num_hidden_layers,
                            teacher.model.config.num_hidden_layers) if settings.method == "hidden" else {}
    if layers:
        add_projections(model, teacher.model.config.hidden_size, list(layers), training.seed)
    ask = None
    if cache:
        need_fixed(stream, config, "distill.cache_dir")
        stream = CachedRows(stream, cache, settings)
        stream.check()
        ask = FromCache(cache.facts["vocab_size"], settings) if settings.asks_teacher else None
    elif settings.method == "universal":
        need_fixed(stream, config, "distill.method: universal")
        stream, ask = BothTokenizers(stream, tokenizer, teacher, samples), ThroughText(teacher, settings)
    elif settings.asks_teacher:
        ask = InMemory(teacher, settings)
    if ask and teacher.model:
        hold(teacher.model, TRAIN.precision(training, config.model.dtype, device))
    if settings.lmbda:
        stream = Mixed(stream, student_texts(config, tokenizer, samples, out), settings.lmbda)
    return TRAIN.Stage(model, tokenizer, stream, distillation(ask, settings, layers), evaluate, TRAIN.save_product)


# ------------------------------------------------------------------------------------------ answers of the teacher


def write_answers(config) -> None:
    """The teacher answers prompts, and its answers become records that SFT.py reads (Kim and Rush 2016). What is written stands in
    FILE.part until all is; a run that was cut off goes on there."""
    settings, overwrite, out = config.distill, bool(config.actions.overwrite), Path(config.output.dir)
    if out.suffix != ".jsonl":
        raise UserError(f"--out: '{out}' must be a file name that ends in .jsonl")
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out} exists; --overwrite replaces it")
    if config.data.train == TOKENIZER.DataSection().train:
        raise UserError("--generate: name the prompts with --data, as in --data data/prompts.jsonl")
    if settings.reward_funcs and settings.num_generations < 2 and settings.reward_threshold is None:
        raise UserError("distill.reward_funcs: choose between answers; set distill.num_generations to 2 or more, or "
                        "distill.reward_threshold")
    if settings.reward_threshold is not None and not settings.reward_funcs:
        raise UserError("distill.reward_threshold: nothing judges; name distill.reward_funcs")
    if settings.num_generations > 1 and settings.sampling_temperature == 0:
        raise UserError("distill.sampling_temperature: 0 gives the same answer each time; raise it, or ask for one "
                        "(distill.num_generations 1)")
    _, device = TRAIN.start_processes(config.training, config.model.device, out.parent)
    part = out.with_name(f"{out.name}.part")
    stays = f"{part} holds what was answered, and the same command goes on"
    with alone_at(out.with_name(f".{out.name}.lock"), "--out"), on_interrupt(stays):
        judges = RL.Judges(settings, RL.base_and_tokenizer(settings.teacher, "distill.teacher")[1], device,
                           "distill") if settings.reward_funcs else None
        teacher = load_teacher(config, device)
        if not teacher.causal:
            raise UserError(f"distill.teacher: {teacher.name} is an encoder, which answers nobody")
        TOKENIZER.end_with_turns(teacher.model, teacher.tokenizer)
        prompts, sampling = read_prompts(config, teacher), sampling_of(settings, config.training.seed)
        known = TRAIN.one_after_another(begin_answers, part, made_by(settings, sampling, prompts), overwrite)
        with room_for(part, "what was answered stays there, and the same command goes on"):
            answer_all(teacher, prompts, known, sampling, judges, settings, part)
        if MODEL.process_rank() == 0:
            finish_answers(known, part, out, settings)
        TRAIN.barrier()
    if MODEL.process_rank() == 0:
        out.with_name(f".{out.name}.lock").unlink(missing_ok=True)


def sampling_of(settings: DistillSection, seed: int) -> INFER.Sampling:
    temperature = settings.sampling_temperature if settings.sampling_temperature is not None else float(settings.num_generations > 1)
    return INFER.Sampling(settings.max_completion_length, temperature, settings.top_k, settings.top_p, seed=seed,
                          n=settings.num_generations)


def made_by(settings: DistillSection, sampling: INFER.Sampling, prompts: list[RL.Prompt]) -> dict:
    """All that decides a file of answers: teacher, sampling, judges as they are now, prompts."""
    def mark(judge: str) -> str | None:
        path = Path(judge.rpartition(":")[0])
        return teacher_mark(judge) if Path(judge).is_dir() else digest_of(path.read_bytes()) if path.is_file() else None

    def digest_of(text: bytes) -> str:
        return hashlib.blake2b(text, digest_size=16).hexdigest()

    return {"teacher": [teacher_mark(settings.teacher), settings.teacher_dtype, settings.teacher_quantization],
            "sampling": dataclasses.asdict(sampling),
            "judges": [*([judge, mark(judge)] for judge in settings.reward_funcs), settings.reward_weights,
                       settings.reward_threshold],
            "prompts": digest_of(repr([prompt.ids for prompt in prompts]).encode())}


def answer_all(teacher: Teacher, prompts: list[RL.Prompt], known: dict[int, list], sampling: INFER.Sampling,
               judges: RL.Judges | None, settings: DistillSection, part: Path) -> None:
    """Answers the prompts that are not `known` yet, block by block; the first process judges them and adds them to `known` and to the file."""
    left, bar = [number for number in range(len(prompts)) if number not in known], Progress(len(prompts), len(known), "prompts")
    size = settings.rollout_batch_size
    block = max(1, size // sampling.n) * TRAIN.world_size()
    for start in range(0, len(left), block):
        group = left[start : start + block]
        share = group[MODEL.process_rank() :: TRAIN.world_size()]
        answers = INFER.generate(teacher.model, [prompts[i].ids for i in share], sampling, teacher.tokenizer, batch_size=size,
                                 first=share)
        samples = RL.gather([RL.Sample(prompts[i], i, completion.ids, completion.finish_reason, completion.text, None)
                             for i, given in zip(share, answers, strict=True) for completion in given])
        if MODEL.process_rank() == 0:
            if judges:
                judges(samples)
            by_prompt: dict[int, list[RL.Sample]] = {i: [] for i in group}
            for sample in samples:
                by_prompt[sample.number].append(sample)
            found = {i: chosen_answers(prompts[i], given, settings, bool(teacher.tokenizer.chat_template))
                     for i, given in by_prompt.items()}
            with open(part, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"number": i, "records": records}, ensure_ascii=False, default=str) + "\n"
                                   for i, records in found.items()))
                file.flush()
                os.fsync(file.fileno())
            known |= found
        bar.show(len(prompts) - len(left) + min(start + block, len(left)))
    bar.close()


def finish_answers(known: dict[int, list], part: Path, out: Path, settings: DistillSection) -> None:
    records, length = [record for _, found in sorted(known.items()) for record in found], settings.max_completion_length
    good = "" if settings.reward_threshold is None else f" with a reward of {settings.reward_threshold:g} or more"
    if not records:
        part.unlink(missing_ok=True)
        raise UserError(f"--generate: no answer{good} ended within distill.max_completion_length {length} tokens; raise it" + (", or lower distill.reward_threshold" if good else ""))
    MODEL.write_text(out, "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records))
    part.unlink(missing_ok=True)
    silent, rewards = sum(not found for found in known.values()), [record["reward"] for record in records] if settings.reward_funcs else []
    say(f"{out}: {len(records):,} answers to {len(known):,} prompts" + (f", mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "")
        + (f"; {silent:,} prompts have none{good} that ended within {length} tokens" if silent else ""))


def read_prompts(config, teacher: Teacher) -> list[RL.Prompt]:
    """Prompts that leave the teacher room to answer."""
    settings, left, found, seen = config.distill, TOKENIZER.LeftOut(), [], set()
    room = RL.Room(ANSWER_LENGTH, settings.max_completion_length, teacher.context, "the teacher's context of")
    room.check()
    form = TOKENIZER.Form(RL.prompt_record, "distill", settings.columns, settings.system)
    for where, record in TOKENIZER.read_split(dataclasses.replace(config.data, validation="none"), form, left, "prompt")[0]:
        if isinstance(record["prompt"], list):
            RL.make_chat(teacher.tokenizer, [(where, record)]) if teacher.tokenizer.chat_template else no_template(where, teacher)
        if given := {"prompts", "completions", "completion_ids", "messages", "conversations"} & record.keys():
            raise UserError(f"{where}: the key '{min(given)}' has a meaning of its own here; rename it by distill.columns")
        key = TOKENIZER.prompt_key(record)
        if config.data.deduplicate and key in seen:
            left.add("duplicates", where)
            continue
        seen.add(key)
        ids = RL.prompt_ids(teacher.tokenizer, record["prompt"], record.get("tools"))
        if room.fits(ids, where, left):
            found.append(RL.Prompt(where, record["prompt"], ids,
                                   {key: value
                                    for key, value in record.items() if key not in ("prompt", "completion", "system")}))
    if not found:
        raise UserError(f"data.train: no prompt is left{left.text()}")
    say(f"{len(found):,} prompts for {teacher.name}{left.text()}")
    return found


def no_template(where: str, teacher: Teacher) -> None:
    raise UserError(f"{where}: a conversation, but {teacher.name} has no chat template; give it prompts that are texts, or "
                    "fine-tune it with SFT.py first")


def begin_answers(part: Path, made_by: dict, overwrite: bool) -> dict[int, list]:
    """{prompt: its records} that an earlier run has written; begins the file where there is none."""
    lines = TRAIN.json_lines(part) if part.exists() and not overwrite else []
    lines = lines if len(lines) > 1 else []  # nothing was answered yet
    if lines and lines[0] != json.loads(json.dumps(made_by)):
        raise UserError(f"--out: {part} was started with other prompts, another teacher or other settings; --overwrite starts "
                        "over")
    if lines:
        say(f"{part}: going on after {len(lines) - 1:,} prompts")
    # without a line that was cut short
    MODEL.write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines or [made_by]))
    return {line["number"]: line["records"] for line in lines[1:]}


def chosen_answers(prompt: RL.Prompt, given: list[RL.Sample], settings: DistillSection, chat: bool) -> list[dict]:
    """The records of one prompt: the answers that came to an end, each text once; where there are judges the best of them, if it is good enough."""
    judged, low = bool(settings.reward_funcs), -math.inf if settings.reward_threshold is None else settings.reward_threshold
    ended, texts = [sample for sample in given if sample.finish != "length" and sample.text.strip()], set()
    if judged:
        ended = [sample for sample in sorted(ended, key=lambda sample: -sample.reward)[:1] if sample.reward >= low]
    records = []
    for sample in ended:
        if sample.text in texts:
            continue
        texts.add(sample.text)
        if chat:
            record = {"messages": [*TOKENIZER.as_messages(prompt.content), {"role": "assistant", "content": sample.text}]}
        else:
            record = {"prompt": prompt.content, "completion": sample.text}
        records.append({**prompt.columns, **record, **({"reward": sample.reward} if judged else {})})
    return records


# ------------------------------------------------------------------------------------------------- command line

ACTIONS = {**TRAIN.ACTIONS, "adapter": SFT.ACTIONS["adapter"],
           "cache": Action("write what the teacher says of --data into --cache-dir, and train nothing"),
           "generate": Action("let the teacher answer the prompts of --data into the JSON lines file --out, and train nothing")}
SECTIONS = {**TRAIN.SECTIONS, "lora": SFT.LoraSection, "distill": DistillSection}
TRAINED = ("method", "task", "alpha", "beta", "temperature", "lmbda", "hidden_weight", "cosine_weight", "layer_map",
           "init_layers", "cache_dir", "train_on_prompt", "eval_answers", "rollout_size")
IDLE = [  # settings, when they mean nothing, and why: they are told of, not swallowed
    (("beta", "temperature"), lambda s, what: what == "train" and s.alpha == 1, "with distill.alpha 1"),
    (("teacher_dtype", "teacher_quantization", "cache_dir"), lambda s, what: what == "train" and not s.asks_teacher,
     "with distill.alpha 1"),
    (("teacher_dtype", "teacher_quantization"), lambda s, what: what == "train" and s.cache_dir and s.asks_teacher,
     "with distill.cache_dir"),
    (("alpha",), lambda s, what: what == "train" and s.lmbda == 1,
     "with distill.lmbda 1: own texts count the teacher's judgement alone"),
    (("num_generations", "reward_funcs", "reward_weights", "reward_threshold"), lambda s, what: what != "generate",
     "without --generate"),
    (("sampling_temperature", "top_k", "top_p", "rollout_batch_size"), lambda s, what: what != "generate" and not s.lmbda,
     "without --generate or distill.lmbda"),
    (("rollout_size",), lambda s, what: what != "generate" and not s.lmbda, "without distill.lmbda"),
    (("cache_top_k", "cache_dtype"), lambda s, what: what != "cache", "without --cache"),
    (("alpha", "beta", "init_layers", "eval_answers"), lambda s, what: what == "cache", "on --cache"),
    (TRAINED, lambda s, what: what == "generate", "on --generate"),
]


def check_actions(config) -> str:
    """Which of train, cache and generate is asked for, when the settings allow it."""
    settings, actions = config.distill, config.actions
    if actions.cache and actions.generate:
        raise UserError("--cache and --generate: both train nothing and stand alone; keep one")
    what = "cache" if actions.cache else "generate" if actions.generate else "train"
    if what != "train" and (actions.resume or actions.adapter):
        raise UserError(f"--{what}: goes on by itself where it was cut off, and trains nothing; leave out --resume and --adapter")
    for keys, idle, why in IDLE:
        tell_idle(settings, keys if idle(settings, what) else (), why)
    if config.model.name and what != "train" and int(os.environ.get("RANK", 0)) == 0:
        say(f"model.name: no effect on --{what}: the teacher is distill.teacher, {settings.teacher}")
    return what


def tell_idle(settings: DistillSection, keys: tuple, why: str) -> None:
    idle = [f"distill.{key}" for key in keys if getattr(settings, key) != MODEL.default_of(settings.__dataclass_fields__[key])]
    if idle and int(os.environ.get("RANK", 0)) == 0:
        say(f"{', '.join(idle)}: no effect {why}")


def main(argv: list[str] | None = None) -> TRAIN.Result | None:
    config = load_config(argv, SECTIONS, "distill", ACTIONS, __doc__)
    what = check_actions(config)
    if what != "train":
        return {"cache": write_cache, "generate": write_answers}[what](config)
    return TRAIN.run_stage("distill", config, prepare)


if __name__ == "__main__":
    run_main(main)
