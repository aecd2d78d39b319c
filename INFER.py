"""INFER.py: text generation.

Read in this order: settings (`Sampling`), the sampler (`sample`), the state of one completion (`Row`), continuous batching
(`Engine`), `generate` and `stream`, scoring (`score`). Below the banner: hardware settings, static batching for other models, the
command line, the HTTP server and its chat page.

    echo "Once upon a time" | python INFER.py --model out
    python INFER.py --model out --prompt "What is 12 plus 30?" --temperature 0 --max-new-tokens 32
    python INFER.py --serve --model out/sft --port 8000
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hmac
import importlib.util
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import MODEL
import TOKENIZER
from MODEL import Action, UserError, check, knob, load_config, run_main, say


@dataclass
class Sampling:
    """How one request is sampled. Names and meaning are those of the OpenAI API and vLLM."""

    max_new_tokens: int = knob(256, "maximum number of generated tokens", low=1, often=True)
    temperature: float = knob(0.8, "sampling temperature; 0 is greedy", low=0, often=True)
    top_k: int = knob(0, "sample from the k most probable tokens; 0 is off", low=0, often=True)
    top_p: float = knob(1.0, "sample from the smallest set with this cumulative probability (Holtzman 2019)", low=0, high=1,
                        often=True)
    min_p: float = knob(0.0, "minimum probability of a token relative to the most probable one", low=0, high=1, often=True)
    repetition_penalty: float = knob(1.0, "above 1, tokens of the prompt and completion become less likely (Keskar 2019)",
                                     above=0, often=True)
    presence_penalty: float = knob(0.0, "subtracted once from the logits of generated tokens", often=True)
    frequency_penalty: float = knob(0.0, "subtracted from a token's logit for each time it was generated", often=True)
    stop: list[str] | str | None = knob(None, "stop strings; not included in the completion", often=True)
    seed: int | None = knob(None, "random seed; the completion does not depend on the rest of the batch", low=-(10**30),
                            high=10**30, often=True)
    logit_bias: dict | None = knob(None, "biases added to the logits: {token id: bias}")
    min_tokens: int = knob(0, "minimum number of generated tokens before an end-of-text token", low=0)
    logprobs: bool = knob(False, "return the log-probability of each token", often=True)
    top_logprobs: int = knob(0, "return the log-probabilities of the k most probable tokens at each position",
                            low=0, only="logprobs")
    n: int = knob(1, "completions per prompt", low=1, often=True)
    ignore_eos: bool = knob(False, "continue after the end-of-text token")

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        check(self, "inference")
        if self.logit_bias is not None:
            try:
                self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            except (AttributeError, TypeError, ValueError):
                raise UserError("inference.logit_bias: token ids with a number each are expected") from None
            for bias in self.logit_bias.values():
                if not -100 <= bias <= 100:
                    raise UserError(f"inference.logit_bias: {bias} is not between -100 and 100")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
                    or self.min_tokens)


@dataclass
class InferenceSection(Sampling):
    use_cache: bool = knob(True, "KV cache; false recomputes past tokens at each step, which is much slower", often=True)
    batch_size: int = knob(32, "maximum number of sequences per batch", low=1, often=True)
    chat: str = knob("auto", "apply the chat template: on, off, or auto (if the tokenizer has one)", ("auto", "on", "off"),
                     often=True)
    system: str | None = knob(None, "system message", often=True)
    host: str = knob("127.0.0.1", "--serve: address to bind; 0.0.0.0 accepts other machines", often=True)
    port: int = knob(8000, "--serve: port", low=0, high=65535, often=True)
    api_key: str | None = knob(None, "--serve: API key that requests must send")
    max_queue: int = knob(256, "--serve: maximum running and waiting completions; more get status 429", low=1)
    max_num_batched_tokens: int = knob(512, "--serve: maximum tokens per forward pass; longer prompts are chunked", low=1)
    enable_prefix_caching: bool = knob(True, "--serve: reuse the KV cache of shared prompt prefixes")
    timeout: float = knob(600.0, "--serve: maximum seconds per request", above=0)
    control_tokens: bool = knob(False, "--serve: parse control tokens in chat messages; false treats them as text")
    max_body: int = knob(2**22, "--serve: maximum request size in bytes", low=1)
    model: dict = knob({"name": "./out"}, "overrides `model` for this stage")


SAMPLING_KEYS = [f.name for f in fields(Sampling)]
REQUEST_KEYS = (*SAMPLING_KEYS, "max_tokens", "max_completion_tokens", "prompt", "messages", "tools", "system", "history")


class Completion(NamedTuple):
    """One answer: its ids (the end-of-text id included), log-probabilities of logits / temperature before penalties and
    truncation (None unless asked for), "stop" or "length", its text where a tokenizer was given, and the `top_logprobs`."""

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    text: str | None = None
    best: list[dict[int, float]] | None = None


# ----------------------------------------------------------------------------------------------------- sampler


def adjust(logits: Tensor, rows: list[Row]) -> Tensor:
    """Repetition, presence and frequency penalties, biases, and no end before `min_tokens`, on logits (B, V)."""
    for logit, row in zip(logits, rows, strict=True):
        s = row.sampling
        if s.repetition_penalty != 1:
            ids = torch.tensor(sorted(set(row.prompt) | set(row.ids)), device=logits.device)
            seen = logit[ids]
            logit[ids] = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and row.ids:
            ids, counts = torch.tensor(row.ids, device=logits.device).unique(return_counts=True)
            logit[ids] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            logit[list(s.logit_bias)] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
        if len(row.ids) < s.min_tokens:
            logit[list(row.eos)] = -torch.inf
    return logits


def truncate(probabilities: Tensor, settings: list[Sampling]) -> Tensor:
    """Apply top-k, then top-p, then min-p to probabilities (B, V): excluded tokens become 0. Ties with the last kept token are
    kept, so rounding that reorders ties has no effect."""
    device, vocabulary = probabilities.device, probabilities.shape[1]
    top_k, top_p, min_p = (torch.tensor(limit, device=device)[:, None] for limit in (
        [s.top_k or vocabulary for s in settings], [s.top_p if s.top_p < 1 else 2.0 for s in settings],
        [s.min_p for s in settings]))
    ordered = probabilities.topk(min(int(top_k.max()), vocabulary)).values  # all, sorted, unless each row has a top_k
    ranks = torch.arange(ordered.shape[1], device=device)
    kept = ordered * (ranks < top_k)
    kept = kept / kept.sum(-1, keepdim=True)
    before = kept.cumsum(-1) - kept  # the token that crosses top_p is still in
    inside = (kept > 0) & ((before < top_p) | (ranks == 0)) & (kept >= min_p * kept[:, :1])
    least = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    return probabilities * (probabilities >= least)


def sample(logits: Tensor, rows: list[Row]) -> tuple[list[int], list[float] | None, list[dict[int, float]] | None]:
    """Draw one id for each row from logits (B, V) float32 by inverting the distribution at the row's own random
    number, so a row's text does not depend on who else is in its batch. Also returns the ids' log-probabilities and the most
    probable ids with theirs, if any row wants them."""
    settings = [row.sampling for row in rows]
    device = logits.device
    if not torch.isfinite(logits.amax(-1)).all():
        raise UserError("the model's logits are not finite: its weights or its config.json are broken")
    temperatures = torch.tensor([max(s.temperature or 1.0, 1e-30) for s in settings], device=device)[:, None]  # finite in float32
    plain = logits / temperatures
    if any(s.adjusts for s in settings):
        logits = adjust(logits.clone(), rows)
    greedy = [s.temperature == 0 for s in settings]
    chosen = logits.argmax(-1) if any(greedy) else None
    if not all(greedy):
        uniform = torch.tensor([row.next_uniform() for row in rows], device=device, dtype=torch.float32)[:, None]
        probabilities = (logits / temperatures).softmax(-1)
        if limited := [i for i, s in enumerate(settings) if s.top_k or s.top_p < 1 or s.min_p]:
            probabilities[limited] = truncate(probabilities[limited], [settings[i] for i in limited])
        mass = probabilities.cumsum(-1)
        drawn = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)  # (B, 1)
        last = torch.searchsorted(mass, mass[:, -1:].contiguous())  # rounding may point past the last one that is left
        drawn = torch.minimum(drawn, last)[:, 0]
        chosen = drawn if chosen is None else torch.where(torch.tensor(greedy, device=device), chosen, drawn)
    logprobs = best = None
    if any(s.logprobs for s in settings):
        every = plain.log_softmax(-1)
        logprobs = every.gather(1, chosen[:, None]).squeeze(1).tolist()
        if most := max(s.top_logprobs for s in settings):
            values, ids = every.topk(min(most, every.shape[1]))
            best = [dict(zip(own[: s.top_logprobs], theirs, strict=False))
                    for own, theirs, s in zip(ids.tolist(), values.tolist(), settings, strict=True)]
    return chosen.tolist(), logprobs, best


# -------------------------------------------------------------------------------------------------- generation


class Detokenizer:
    """Ids -> text, piece by piece. Text is held back while its last character is incomplete, as one character may be
    several tokens; each piece is decoded with those before it, as some tokenizers drop a first word's space."""

    def __init__(self, tokenizer, prompt: list[int] = ()):
        self.tokenizer = tokenizer
        self.ids = list(prompt[-6:])
        self.start, self.read = 0, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._new(final=False)

    def flush(self) -> str:
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        before, now = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]


class Row:
    """One answer in the making."""

    def __init__(self, prompt: list[int], sampling: Sampling, key: tuple, tokenizer, eos: list[int], context: int):
        self.prompt, self.sampling, self.eos = prompt, sampling, () if sampling.ignore_eos else tuple(eos)
        if sampling.stop:  # special tokens, which texts do not show
            special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
            self.eos += tuple(special[stop] for stop in sampling.stop if stop in special)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.best: list[dict[int, float]] = []
        self.finish: str | None = None
        self.budget = min(sampling.max_new_tokens, context - len(prompt))
        self.random = np.random.default_rng(key)
        self.detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self.text = ""
        self.told = 0  # characters of the text that are final: no stop text can begin in them
        self.sequence, self.running, self.salt = MODEL.Sequence(), False, b""  # the engine's

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    @property
    def missing(self) -> int:
        """Number of tokens that are not in the KV cache yet."""
        return self.length - self.sequence.length

    def text_ids(self, start: int, stop: int) -> list[int]:
        """Ids of the prompt and the answer, from position `start` to `stop`."""
        first = len(self.prompt)
        return self.prompt[start:stop] + self.ids[max(start - first, 0) : max(stop - first, 0)]

    def next_uniform(self) -> float:
        return self.random.random()

    def accept(self, token: int, logprob: float | None, best: dict | None = None) -> None:
        self.ids.append(token)
        if logprob is not None and self.sampling.logprobs:
            self.logprobs.append(logprob)
            self.best += [best] if self.sampling.top_logprobs else []
        if token in self.eos:
            self.finish = "stop"
        if self.detokenizer and token not in self.eos:
            self._extend(self.detokenizer.push(token))
        if self.finish is None and len(self.ids) >= self.budget:
            self.finish = "length"
        if self.finish and self.detokenizer:
            stopped_by_text = self.finish == "stop" and token not in self.eos
            if not stopped_by_text:
                self._extend(self.detokenizer.flush())
            self.told = len(self.text)

    def _extend(self, piece: str) -> None:
        stops = self.sampling.stop or ()
        searched = max(0, len(self.text) - max(map(len, stops), default=0))
        self.text += piece
        places = [place for stop in stops if stop and (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.finish = self.text[: min(places)], "stop"
        # Hold back an ending that may be the beginning of a stop text.
        held = max((k for stop in stops for k in range(1, len(stop)) if self.text.endswith(stop[:k])), default=0)
        self.told = max(self.told, len(self.text) - held)

    def completion(self) -> Completion:
        return Completion(self.ids, self.logprobs if self.sampling.logprobs else None, self.finish or "length",
                          self.text if self.detokenizer else None, self.best if self.sampling.top_logprobs else None)


STEP_TOKENS = 2048  # of one forward pass, at most
STEP_SCORES = 2**22  # queries x keys of a piece of a prompt: beside the cache, memory stays flat however long the prompt


class Engine:
    """Continuous batching (Yu 2022): requests join and leave the batch between forward passes. Each pass decodes one token of
    every running completion and prefills chunks of waiting prompts: `schedule -> run -> accept`.

    Decoding has priority, then the oldest prompts. When no page is free, the most recent row is preempted: it releases its
    pages and later prefills its prompt and the tokens generated so far. Rows with the same prompt list prefill it once.
    """

    def __init__(self, model, rows: int, pages: int, page: int, tokens: int = 0, reuse: bool = False):
        self.model, self.rows, self.tokens, self.reuse = model, rows, max(tokens or STEP_TOKENS, rows), reuse
        self.cache = model.new_cache(pages, page)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in the order of their admission
        self.computed = 0  # tokens that went through the model

    def add(self, rows: list[Row]) -> None:
        room = self.cache.pages * self.cache.page
        for row in rows:
            if len(row.prompt) >= room:
                raise UserError(f"a prompt of {len(row.prompt)} tokens leaves no room in a cache of {room}")
            row.budget = min(row.budget, room - len(row.prompt))
        self.waiting.extend(rows)

    def step(self) -> list[Row]:
        """One forward pass. Returns the rows that got a token; finished rows (`row.finish`) have been removed."""
        parts = self.schedule()
        ready, logits = self.run(parts)
        self.accept(ready, logits)
        return ready

    def schedule(self) -> dict[Row, int]:
        """How many tokens of each row are computed next."""
        parts: dict[Row, int] = {}
        left = self.tokens
        for row in sorted(self.running, key=lambda row: row.missing > 1):  # answers, then prompts, each in order
            count = self._piece(row, left)
            while row.running and count and not self.cache.extend(row.sequence, row.sequence.length + count):
                left += parts.pop(self.running[-1], 0)
                self.preempt(self.running[-1])
            if row.running and count:
                parts[row] = count
                left -= count
        if self.waiting:
            first = {id(row.prompt): row for row in reversed(self.running)}
            for row in list(self.waiting):
                if not left or len(self.running) == self.rows:
                    break
                if (like := first.get(id(row.prompt))) and like.sequence.length < len(row.prompt) - 1:
                    continue  # its prompt is being computed
                if not self._admit(row, like):
                    break
                first.setdefault(id(row.prompt), row)
                parts[row] = self._piece(row, left)
                left -= parts[row]
        return parts

    def _piece(self, row: Row, left: int) -> int:
        start = row.sequence.length
        return min(row.missing, left, max(1, STEP_SCORES // (start + row.missing)) if start else left)

    def _admit(self, row: Row, like: Row | None) -> bool:
        """Allocate pages for the tokens of a waiting row; cached prefixes are shared."""
        if like is not None:
            sequence = self.cache.fork(like.sequence, len(row.prompt) - 1)
        else:
            sequence = self.cache.find(row.prompt + row.ids, row.salt) if self.reuse else MODEL.Sequence()
        if sequence is None or not self.cache.extend(sequence, row.length):
            if sequence is not None:
                self.cache.close(sequence)
            return False
        row.sequence, row.running = sequence, True
        self.waiting.remove(row)
        self.running.append(row)
        return True

    def preempt(self, row: Row) -> None:
        self.remove(row)
        self.waiting.appendleft(row)

    def remove(self, row: Row) -> None:
        """Remove a running or waiting row and release its pages."""
        if row.running:
            self.running.remove(row)
            self.cache.close(row.sequence)
            row.running = False
        elif row in self.waiting:
            self.waiting.remove(row)

    @torch.no_grad()
    def run(self, parts: dict[Row, int]) -> tuple[list[Row], Tensor]:
        """One forward pass. Returns the rows whose tokens are all computed and the logits (R, V) of their next tokens."""
        rows = sorted(parts, key=lambda row: (parts[row], row.sequence.pages[0]))  # equal and adjacent ones are read together
        ids, ready, at = [], [], []
        for row in rows:
            start = row.sequence.length
            ids += row.text_ids(start, start + parts[row])
            if parts[row] == row.missing:
                ready.append(row)
                at.append(len(ids) - 1)
        step = MODEL.CacheStep(self.cache, [(row.sequence, parts[row]) for row in rows])
        self.computed += len(ids)
        device = self.model.device
        logits = self.model(torch.tensor([ids], device=device), cache=step, at=torch.tensor(at or [0], device=device)).logits
        return ready, logits.float()

    def accept(self, rows: list[Row], logits: Tensor) -> None:
        if rows:
            _accept(logits, rows)
        if self.reuse:
            for row in self.running:
                if row.sequence.length // self.cache.page > len(row.sequence.digests):
                    self.cache.remember(row.sequence, row.prompt + row.ids, row.salt)
        finished = [row for row in rows if row.finish]
        for row in finished:
            self.remove(row)
        if finished:
            self.cache.compact([row.sequence for row in self.running])

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


def _accept(logits: Tensor, rows: list[Row]) -> None:
    tokens, logprobs, best = sample(logits, rows)
    for i, row in enumerate(rows):
        row.accept(tokens[i], logprobs[i] if logprobs else None, best[i] if best else None)


def _make_rows(model, prompts, samplings, tokenizer, step: int, first: int | list[int] = 0) -> list[list[Row]]:
    config = model.config
    groups = []
    numbers = first if isinstance(first, list) else range(first, first + len(prompts))
    for p, prompt, sampling in zip(numbers, prompts, samplings, strict=True):
        if isinstance(prompt, str):
            raise UserError("prompts are lists of token ids here; INFER.load(folder).generate(text) takes a text")
        if not prompt:
            raise UserError("a prompt needs at least one token; an empty text is the beginning-of-text token")
        if len(prompt) >= config.max_position_embeddings:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room in a context of {config.max_position_embeddings}")
        if outside := [i for i in sampling.logit_bias or () if not 0 <= i < config.vocab_size]:
            raise UserError(f"inference.logit_bias: {outside[0]} is no id of a vocabulary of {config.vocab_size:,}")
        if sampling.stop and tokenizer is None:
            raise ValueError("stop texts need the tokenizer")
        # numpy takes no sign
        seed = (sampling.seed if sampling.seed is not None else int(np.random.SeedSequence().entropy)) % 2**64
        groups.append([Row(prompt, sampling, (seed, step, p, s), tokenizer, config.eos_ids, config.max_position_embeddings)
                       for s in range(sampling.n)])
    return groups


def generate(model, prompts: list[list[int]], sampling: Sampling | list[Sampling], tokenizer=None, use_cache: bool = True,
             batch_size: int = 64, step: int = 0, first: int | list[int] = 0) -> list[list[Completion]]:
    """Answers to ragged prompts, computed together: [prompt][sample] -> Completion.

    Each answer draws from its own generator keyed by (seed, step, prompt, sample): the same text alone or in any
    batch. `step` sets calls of one seed apart (rollouts), `first` is the number of the first prompt, or a list of all
    numbers. The tokenizer is needed for stop texts and `.text` only. Where weights are sharded over processes, all have to
    call, each with prompts of its own (or none).
    """
    samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    groups = _make_rows(model, prompts, samplings, tokenizer, step, first)
    rows = [row for group in groups for row in group]
    was_training = model.training
    model.eval()
    with MODEL.unsharded(model):
        for _ in _steps(model, rows, use_cache, batch_size):
            pass
    model.train(was_training)
    return [[row.completion() for row in group] for group in groups]


def _steps(model, rows: list[Row], use_cache: bool, batch_size: int) -> Iterator[None]:
    """Extend all rows until they are finished; yields after every forward pass."""
    if isinstance(model, MODEL.ForeignModel) or not use_cache:
        engine = StaticEngine(model, batch_size, use_cache)
    else:
        seats = min(batch_size, len(rows)) or 1
        page = max((len(row.prompt) + row.budget for row in rows), default=1)  # which holds any row
        engine = Engine(model, seats, seats, page)
    engine.add(rows)
    while engine.busy:
        engine.step()
        yield


def stream(model, tokenizer, prompt_ids: list[int], sampling: Sampling, use_cache: bool = True) -> Iterator[str]:
    """The text of one answer, in pieces as it is generated; a piece never holds part of a character or a stop text."""
    [[row]] = _make_rows(model, [prompt_ids], [replace(sampling, n=1)], tokenizer, 0)
    told = 0
    for _ in _steps(model, [row], use_cache, 1):
        if row.told > told:
            yield row.text[told : row.told]
            told = row.told


# ----------------------------------------------------------------------------------------------------- scoring


class Scored(NamedTuple):
    """One text: its ids (the first is the beginning of text), log-probabilities of ids[1:], and the K best."""

    ids: list[int]
    logprobs: list[float]
    best: list[dict[int, float]] | None


@torch.no_grad()
def score_ids(model, ids: list[int], top: int = 0) -> Scored:
    """Log-probability of each token given those before it. Texts beyond the context are read through windows that
    overlap by half, so that every token but the first ones has at least half a context before it."""
    context = model.config.max_position_embeddings
    logprobs: list[float] = []
    best: list[dict[int, float]] = []
    start = 0
    while len(logprobs) < len(ids) - 1:
        piece = torch.tensor([ids[start : start + context + 1]], device=model.device)
        new = piece.shape[1] - 1 - (len(logprobs) - start)

        def leaders(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
            values, places = logits.float().log_softmax(-1).topk(top)
            return {f"{k}{name}": part[:, k].double() for k in range(top) for name, part in (("v", values), ("i", places))}

        out = model(piece[:, :-1], targets=piece[:, 1:], reduce=leaders if top else None)
        logprobs += out.logprobs[0, -new:].tolist()
        if top:
            columns = {name: column[0, -new:].tolist() for name, column in out.reduced.items()}
            best += [{int(columns[f"{k}i"][t]): columns[f"{k}v"][t] for k in range(top)} for t in range(new)]
        start = max(len(logprobs) - context // 2, 0)
    return Scored(ids, logprobs, best if top else None)


def score_prompt(tokenizer, text: str) -> list[int]:
    """Ids of a text to be scored whole, as training reads it: a beginning goes in front, so that its first token counts too."""
    return TOKENIZER.encode_text(tokenizer, text)[:-1]


def score(model, tokenizer, texts: Iterable[str], top: int = 0, each: Callable | None = None) -> dict:
    """tokens, bytes, nats, nats per token, perplexity and bits per byte of texts, each read by itself.

    `each(text, scored, its measures)` sees every text; `top` asks for the likeliest tokens of each position."""
    sums = [0, 0, 0.0]
    for text in texts:
        scored = score_ids(model, score_prompt(tokenizer, text), top)
        own = len(scored.logprobs), len(text.encode("utf-8")), -math.fsum(scored.logprobs)
        if not math.isfinite(own[2]):
            raise UserError("the model's logits are not finite: its weights or its config.json are broken")
        sums = [total + part for total, part in zip(sums, own, strict=True)]
        if each is not None:
            each(text, scored, measures(*own))
    return measures(*sums)


def measures(tokens: int, size: int, nats: float) -> dict:
    loss = nats / max(tokens, 1)
    return {"tokens": tokens, "bytes": size, "nats": nats, "loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": nats / math.log(2) / max(size, 1)}


# ======================================================================================================== edges

# ---------------------------------------------------------------------------------------------------- hardware


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
        self.widen_from = math.inf if MODEL.fast_half("cpu") else 256

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() // self.in_features >= self.widen_from:
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.packed.to_dense().float(), bias).to(hidden.dtype)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")


def configure_for_hardware(model: MODEL.LanguageModel, device=None, quiet: bool = False) -> MODEL.Transformer:
    """Make a loaded model fast for inference on `device`; it can no longer be trained or saved.

    Query, key and value become one product, as do gate and up: fewer, larger reads. On a CPU bf16 weights are packed
    for oneDNN. On CUDA float32 products may use TF32. Says in one line what it chose.
    """
    device = torch.device(device or model.device)
    if model.adapter and model.quantization == "none" and MODEL.merges_exactly(model):
        MODEL.merge_adapter(model)
    model = model.to(device).eval().requires_grad_(False)
    packed = [f"{model.quantization} weights"] if model.quantization != "none" else []
    chosen = [f"{device.type}", str(model.dtype).removeprefix("torch."), *packed]
    for module in list(model.modules()):
        if isinstance(module, MODEL.Attention) and hasattr(module, "q_proj"):
            _fuse(module, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        elif isinstance(module, MODEL.MLP) and hasattr(module, "gate_proj"):
            _fuse(module, "gate_up_proj", ("gate_proj", "up_proj"))
    chosen.append("fused projections")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        chosen.append("TF32")
    if device.type == "cpu":
        chosen.append(f"{torch.get_num_threads()} threads")
        if model.dtype == torch.bfloat16 and isinstance(model,
                                                        MODEL.Transformer) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _pack(model)
            chosen.append("packed weights")
    if not quiet:
        say("computing with " + ", ".join(chosen))
    return model


def _fuse(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Join linear layers that read the same input into one, which the module's forward prefers."""
    linears = [getattr(module, part) for part in parts]
    if not all(type(linear) is nn.Linear for linear in linears):
        return
    with torch.device("meta"):
        fused = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), linears[0].bias is not None)
    fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if fused.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    setattr(module, name, fused)
    for part in parts:
        delattr(module, part)


def _pack(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        # The head may share its weight with the embedding; absorbed attention multiplies kv_b_proj's weight by itself.
        if type(module) is nn.Linear and not name.startswith("lm_head") and not name.endswith("kv_b_proj"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], PackedLinear(module.weight.data, module.bias))
    if "lm" in model.heads and type(model.lm_head) is nn.Linear:
        model.lm_head = PackedLinear(model.lm_head.weight.data, None)


# -------------------------------------------------------------------------------------- engines and their room


PAGE = 64  # tokens; less memory is wasted by smaller pages, more time by copying them together


def cache_room(model, rows: int) -> int:
    """KV cache capacity in tokens: `rows` full contexts, limited to 4/5 of the free GPU memory or 1/4 of the main memory."""
    a_token = MODEL.cache_numbers(model.config) * torch.empty(0, dtype=model.dtype).element_size()
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] * 4 // 5
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 2**32
    context = model.config.max_position_embeddings
    return max(context, min(rows * context, memory // a_token))


class StaticEngine:
    """Static batching, with the interface of `Engine`: each batch has prompts of equal length and runs to its end. A
    `MODEL.ForeignModel` uses transformers' `generate`; without a KV cache all tokens are recomputed in every step, which is the
    reference for `Engine`."""

    def __init__(self, model, rows: int, use_cache: bool = True):
        self.model, self.rows, self.use_cache = model, rows, use_cache
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.steps: Iterator[None] = iter(())

    def add(self, rows: list[Row]) -> None:
        self.waiting.extend(rows)

    def step(self) -> list[Row]:
        if not self.running:
            size = len(self.waiting[0].prompt)
            self.running = [row for row in self.waiting if len(row.prompt) == size][: self.rows]
            for row in self.running:
                self.waiting.remove(row)
            foreign = isinstance(self.model, MODEL.ForeignModel)
            self.steps = _in_steps(partial(_decode_by_transformers, self.model, self.running, self.use_cache)) if foreign else \
                _uncached(self.model, self.running)
        before = {row: len(row.ids) for row in self.running}
        if next(self.steps, self) is self:
            self.running = []
        return [row for row in before if len(row.ids) > before[row]]

    def remove(self, row: Row) -> None:
        if row in self.waiting:
            self.waiting.remove(row)
        row.finish = row.finish or "abort"

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


def _uncached(model, rows: list[Row]) -> Iterator[None]:
    """Generation without a KV cache: recompute all tokens in every step."""
    while active := [row for row in rows if not row.finish]:
        texts = [row.prompt + row.ids for row in active]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
        positions = torch.tensor([[*range(len(t)), *[-1] * (longest - len(t))] for t in texts], device=model.device)
        last = torch.tensor([i * longest + len(text) - 1 for i, text in enumerate(texts)], device=model.device)
        with torch.no_grad():
            logits = model(ids, positions=positions, at=last).logits
        _accept(logits.float(), active)
        yield


def _decode_by_transformers(model, rows: list[Row], use_cache: bool, each: Callable = lambda: None) -> None:
    """Rows with prompts of one length: the model's own `generate`, in which our sampling names each token. Calls each() after
    every token."""
    from transformers import GenerationConfig

    def name_tokens(ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) -> 0 at the token that each row takes, -inf elsewhere."""
        active = [i for i, row in enumerate(rows) if not row.finish]
        if active:
            _accept(scores[active].float(), [rows[i] for i in active])
            each()
        tokens = torch.tensor([[(row.ids or [0])[-1]] for row in rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

    def finished(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.tensor([bool(row.finish) for row in rows], device=ids.device)

    prompts = torch.tensor([row.prompt for row in rows], device=model.device)  # (B, T)
    longest = max(row.budget for row in rows)
    kept, model.inner.generation_config = model.inner.generation_config, GenerationConfig()  # its penalties are not ours
    try:
        model.inner.generate(prompts, GenerationConfig(max_new_tokens=longest, do_sample=False, use_cache=use_cache),
                             [name_tokens], [finished], attention_mask=torch.ones_like(prompts))
    finally:
        model.inner.generation_config = kept


def _in_steps(run: Callable[[Callable], None]) -> Iterator[None]:
    """A generator over run(each), which calls each() after every step and works in a thread."""
    steps: queue.Queue = queue.Queue()
    stopped = threading.Event()

    def each() -> None:
        steps.put(None)
        if stopped.is_set():
            raise InterruptedError("the consumer has stopped")

    def work() -> None:
        try:
            run(each)
            steps.put(StopIteration())
        except BaseException as error:  # whatever ends the work is raised where the generator is consumed
            steps.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while not isinstance(error := steps.get(), StopIteration):
            if error is not None:
                raise error
            yield
    finally:
        stopped.set()


# ------------------------------------------------------------------------------------------------ command line


class Session:
    """A loaded model with its tokenizer and settings; turns what a user gives into ids and ids into what is printed."""

    def __init__(self, config):
        self.settings = config.inference
        name = config.model.name
        if not name:
            raise UserError("model.preset: fresh weights have nothing to say; name a trained model with --model")
        device = MODEL.choose_device(config.model.device)
        if base := MODEL.adapter_base(name):
            if config.actions.adapter:
                raise UserError(f"model.name: {name} is an adapter itself; give its base model, {base}, or leave out --adapter")
            config.actions.adapter, config.model.name, name = name, base, base
        MODEL.read_json(MODEL.model_folder(name) / "config.json")  # before the tokenizer, whose errors would blame the tokenizer
        adapter = config.actions.adapter
        self.tokenizer = TOKENIZER.of_model(config)
        self.model = MODEL.load(name, config.model.dtype, device, config.model.attn_implementation,
                                changes=MODEL.overrides(config.model), adapter=adapter, quantization=config.model.quantization)
        if adapter:
            TOKENIZER.end_with_turns(self.model, self.tokenizer)
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise UserError(f"{name}: the tokenizer has {len(self.tokenizer)} ids, the model only {self.model.config.vocab_size}")
        configure_for_hardware(self.model, device)
        if not self.model.config.eos_ids and self.tokenizer.eos_token_id is not None:
            self.model.config.eos_token_id = self.tokenizer.eos_token_id
        template = bool(self.tokenizer.chat_template)
        if config.inference.chat == "on" and not template:
            raise UserError("inference.chat: on, but this tokenizer has no chat template")
        self.chat = template and config.inference.chat != "off"

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{key: getattr(self.settings, key) for key in SAMPLING_KEYS})

    def prompt_ids(self, prompt: str | list[dict] | dict, sampling: Sampling) -> list[int]:
        """A text, the messages of a chat, or {"messages", "tools"} -> ids that fit the context."""
        if self.chat or not isinstance(prompt, str):
            said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            asked = prompt if isinstance(prompt, dict) else {"messages": said}
            messages = asked["messages"]
            if self.settings.system and messages[0].get("role") != "system":
                messages = [{"role": "system", "content": self.settings.system}, *messages]
            ids = TOKENIZER.render_chat(self.tokenizer, messages, asked.get("tools"), add_generation_prompt=True).ids
        else:
            ids = TOKENIZER.encode_prompt(self.tokenizer, prompt)
        context = self.model.config.max_position_embeddings
        if len(ids) < context:
            return ids
        room = context - min(sampling.max_new_tokens, context // 2)
        note = f"the prompt has {len(ids)} tokens, {room} fit a context of {context} beside the answer: its first"
        if self.chat or not isinstance(prompt, str):
            system = [message for message in messages[:1] if message["role"] == "system"]
            for start in range(len(system) + 1, len(messages)):
                with contextlib.suppress(UserError):  # a template may refuse a conversation that begins so
                    rest = [*system, *messages[start:]]
                    shorter = TOKENIZER.render_chat(self.tokenizer, rest, asked.get("tools"), add_generation_prompt=True).ids
                    if len(shorter) <= room:
                        say(f"{note} {start - len(system)} messages were dropped")
                        return shorter
        say(f"{note} {len(ids) - room} were dropped")
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(ids) - room + len(begin) :]

    def stream(self, prompt, sampling: Sampling, stoppable: bool = False) -> str:
        """Print a completion as it is generated and return it; if `stoppable`, Ctrl-C stops only this completion."""
        pieces = []
        try:
            for piece in stream(self.model, self.tokenizer, self.prompt_ids(prompt, sampling), sampling, self.settings.use_cache):
                sys.stdout.write(piece)
                sys.stdout.flush()
                pieces.append(piece)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        return "".join(pieces)

    def generate(self, prompt: str | list[dict], **own) -> str | list[str]:
        """The completion of a text or of chat messages, a list if n > 1. `own`: sampling parameters of this request."""
        sampling = own_sampling(own, self.sampling, "")
        if unknown := [key for key in own if OPENAI_KEYS.get(key, key) not in SAMPLING_KEYS]:
            raise UserError(f"{unknown[0]}: unknown setting; nearest is {MODEL.nearest(unknown[0], SAMPLING_KEYS)}")
        [found] = self.answer([prompt], [sampling])
        return found[0].text if sampling.n == 1 else [one.text for one in found]

    def engine(self, reuse: bool = False, tokens: int = 0) -> Engine | StaticEngine:
        """An engine for requests of any length."""
        model, rows = self.model, self.settings.batch_size
        if isinstance(model, MODEL.ForeignModel) or not self.settings.use_cache:
            return StaticEngine(model, rows, self.settings.use_cache)
        return Engine(model, rows, -(-cache_room(model, rows) // PAGE), PAGE, tokens, reuse)

    def answer(self, prompts: list, samplings: list[Sampling], first: int | list[int] = 0) -> list[list[Completion]]:
        ids = [self.prompt_ids(prompt, s) for prompt, s in zip(prompts, samplings, strict=True)]
        return generate(self.model, ids, samplings, self.tokenizer, self.settings.use_cache,
                        max(self.settings.batch_size, 1), first=first)


def load(model: str, **settings) -> Session:
    """Load a model for text generation: load("out", temperature=0).generate("One rainy Monday"). `settings` are those of the
    command line, such as adapter="out/lora", or **{"model.dtype": "bfloat16"}."""
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
             for key, value in {"model": model, **settings}.items()]
    return Session(load_config(["--config", os.devnull, *words], SECTIONS, "inference", ACTIONS, __doc__, SHORTS))


def read_stdin() -> Iterator[str]:
    """The lines of stdin as UTF-8; an error names the line."""
    if sys.stdin is None:
        raise UserError("no prompt: there is no stdin; use --prompt")
    for number, line in enumerate(TOKENIZER.open_bytes(TOKENIZER.STDIN), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"stdin:{number}: not UTF-8; convert it with `iconv -f LATIN1 -t UTF-8`") from None
        yield text.replace("\r\n", "\n")


def read_ahead(items: Iterable, size: int) -> queue.Queue:
    """A queue that a thread fills with (item, None), and at the end with (None, the error or StopIteration)."""
    arrived: queue.Queue = queue.Queue(size)

    def read() -> None:
        try:
            for item in items:
                arrived.put((item, None))
            arrived.put((None, StopIteration()))
        except BaseException as error:  # whatever it is, it is raised where the queue is read
            arrived.put((None, error))

    threading.Thread(target=read, daemon=True).start()
    return arrived


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items: those that arrive within 20 ms of each other, so that a program that waits for the answer to
    one line gets it. Items before an error are yielded first."""
    arrived, error = read_ahead(items, 2 * size), None
    while error is None:
        item, error = arrived.get()
        group = [] if error else [item]
        with contextlib.suppress(queue.Empty):
            while len(group) < size and error is None:
                item, error = arrived.get(timeout=0.02)
                group += [] if error else [item]
        if group:
            yield group
    if not isinstance(error, StopIteration):
        raise error


def answers(session: Session, requests: Iterable[tuple[object, Sampling, int]]) -> Iterator[list[Completion]]:
    """Completions of (prompt, sampling, number), in the order of the requests. Requests join the batch as they arrive, so a
    program can wait for each completion. Requests before an error are completed first."""
    arrived = read_ahead(requests, 4 * session.settings.batch_size)
    engine, pending, error = session.engine(), deque(), None
    while error is None or pending:
        with contextlib.suppress(queue.Empty):
            while error is None and len(engine.waiting) < session.settings.batch_size:
                request, error = arrived.get(block=not pending)
                if error is None:
                    prompt, sampling, number = request
                    ids = session.prompt_ids(prompt, sampling)
                    [rows] = _make_rows(session.model, [ids], [sampling], session.tokenizer, 0, number)
                    engine.add(rows)
                    pending.append(rows)
        if engine.busy:
            engine.step()
        while pending and all(row.finish for row in pending[0]):
            yield [row.completion() for row in pending.popleft()]
    if not isinstance(error, StopIteration):
        raise error


def run_lines(session: Session) -> None:
    """One prompt a line -> one answer a line, in order; line ends inside an answer are written \\n and \\r."""
    lines = ((line.rstrip("\r\n"), session.sampling, number) for number, line in enumerate(read_stdin()))
    for completions in answers(session, lines):
        for completion in completions:
            print(completion.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r"), flush=True)


def run_jsonl(session: Session) -> None:
    """{"prompt": ...} or {"messages": [...], "tools": [...]} a line, with any sampling key -> the record with its answer."""
    given: deque[dict] = deque()

    def requests() -> Iterator[tuple]:
        count = itertools.count()
        for number, line in enumerate(read_stdin(), 1):
            if line.strip():
                record, prompt, sampling = _record(line, f"stdin:{number}", session.sampling)
                if not isinstance(prompt, str) and not session.tokenizer.chat_template:
                    raise UserError(f"stdin:{number}: messages need a chat template, which this tokenizer lacks; give a 'prompt'")
                given.append(record)
                # A request with a seed of its own is answered as if it stood alone.
                place = next(count)
                yield prompt, sampling, 0 if record.get("seed") is not None else place

    for completions in answers(session, requests()):
        asked = given.popleft()
        for index, c in enumerate(completions):
            extra = {"index": index} if len(completions) > 1 else {}
            if c.logprobs is not None:
                extra |= {"tokens": [session.tokenizer.decode([i]) for i in c.ids], "logprobs": c.logprobs}
            if c.best is not None:
                extra["top_logprobs"] = [{session.tokenizer.decode([i]): value for i, value in place.items()} for place in c.best]
            record = {**asked, "completion": c.text, "finish_reason": c.finish_reason, **extra}
            print(json.dumps(record, ensure_ascii=False), flush=True)


def messages_of(value, where: str) -> list[dict]:
    """A request's conversation; what training would leave out is an error here."""
    try:
        return TOKENIZER.messages_of(value, where)
    except TOKENIZER.Unusable as error:
        raise UserError(f"{where}: a conversation {error}") from None


def _record(line: str, where: str, base: Sampling):
    record = TOKENIZER.parse_json(line, where)
    TOKENIZER.checked(json.dumps(record, ensure_ascii=False).replace("\0", ""), f"{where}: the request")
    keys = [key for key in ("prompt", "messages") if isinstance(record, dict) and record.get(key) is not None]
    if len(keys) != 1 or not isinstance(record[keys[0]], (str, list)) or record[keys[0]] == []:
        raise UserError(f"{where}: an object with 'prompt' or 'messages' is expected")
    prompt, extras = record[keys[0]], TOKENIZER.extras_of({"tools": record.get("tools")}, where)
    if keys == ["messages"] or isinstance(prompt, list):
        prompt = messages_of(prompt, where)
    context = {key: record[key] for key in ("system", "history") if TOKENIZER.is_given(record, key)}
    if isinstance(prompt, list) or context or extras:
        request = {"messages" if isinstance(prompt, list) else "prompt": prompt, **context}
        prompt = {"messages": TOKENIZER.as_messages(TOKENIZER.prompt_of(request, where)), **extras}
    for key in record:
        if key in ("chat", "use_cache", "batch_size"):
            raise UserError(f"{where}: '{key}' cannot be set per request; use --{key.replace('_', '-')}")
        plain = key.lower().replace("-", "_")
        if key not in REQUEST_KEYS and (meant := difflib.get_close_matches(plain, REQUEST_KEYS, 1, 0.8)):
            raise UserError(f"{where}: unknown key '{key}'; nearest is '{meant[0]}'")
    return record, prompt, own_sampling(record, base, f"{where}: ")


OPENAI_KEYS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def own_sampling(record: dict, base: Sampling, where: str, **more) -> Sampling:
    """The sampling parameters of a request: its keys, under OpenAI's names or ours, override `base`; null means not set."""
    kinds, stop = MODEL.field_types(Sampling), record.get("stop")
    if stop is not None and not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise UserError(f"{where}stop: {stop!r} is no text or list of texts")
    given = {OPENAI_KEYS.get(key, key): (key, value) for key, value in record.items() if value is not None}
    own = {name: stop if name == "stop" else MODEL.convert(value, kinds[name], f"{where}{key}")
           for name, (key, value) in given.items() if name in SAMPLING_KEYS and name not in more}
    own |= more
    if record.get("best_of") not in (None, own.get("n", base.n)):
        raise UserError(f"{where}best_of: only the value of n is supported")
    try:
        return replace(base, **own)
    except UserError as error:
        raise UserError(f"{where}{error}") from None


def run_terminal(session: Session) -> None:
    """A conversation on a terminal: with a chat template turns are remembered, without one each prompt stands alone."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() gets line editing and a history)
    commands = "chat: /reset forgets, /system TEXT sets the system message, " if session.chat else ""
    say(f"{commands}/exit or Ctrl-D ends, Ctrl-C stops an answer")
    messages: list[dict] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            say("")
            continue
        command, _, rest = text.partition(" ")
        if command == "/exit":
            break
        if session.chat and command in ("/reset", "/system"):
            messages.clear()
            session.settings.system = rest if command == "/system" else session.settings.system
        elif text:
            messages.append({"role": "user", "content": text})
            reply = session.stream(messages if session.chat else text, session.sampling, stoppable=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": reply})


def run_score(session: Session, data: TOKENIZER.DataSection, path: str, lines: bool, logits_path: str | None) -> None:
    """Measures of a whole file as JSON, or with --logprobs one JSON line for each text."""
    if path == "-":
        texts = TOKENIZER.read_documents(TOKENIZER.STDIN, "line" if lines else "file")
    else:
        [files] = TOKENIZER.expand_paths([path], "--score")
        if not lines and TOKENIZER.suffix_of(files[0]) not in TOKENIZER.RECORDS and data.text_unit != "file":
            unit, hint = ("line", " (--lines does so here)") if data.text_unit == "line" else ("paragraph", "")
            say(f"--score: {path} is scored as one text; training reads each {unit} as a text of its own{hint}")
        texts = (text for file in files for text in TOKENIZER.read_documents(file, "line" if lines else "file", data.text_field))
    words = session.tokenizer.convert_ids_to_tokens

    def each(text: str, scored, own: dict) -> None:
        nonlocal logits_path
        if session.settings.logprobs:
            record = {"text": text, **own, "ids": scored.ids, "token_strings": words(scored.ids), "logprobs": scored.logprobs}
            if scored.best is not None:
                record["top_logprobs"] = [{words(i) or f"<{i}>": value for i, value in place.items()} for place in scored.best]
            print(json.dumps(record, ensure_ascii=False), flush=True)
        if logits_path:
            _write_logits(session, scored.ids, logits_path)
            logits_path = None

    total = score(session.model, session.tokenizer, texts, session.settings.top_logprobs, each)
    if not total["bytes"] and not total["tokens"]:
        raise UserError(f"--score: {path} holds no text")
    if not session.settings.logprobs:
        print(json.dumps(total))


@torch.no_grad()
def _write_logits(session: Session, ids: list[int], path: str) -> None:
    """ids (T,) and logits (T, V) of the first text: row t is the prediction after ids[t]."""
    from safetensors.torch import save_file

    if len(ids) > session.model.config.max_position_embeddings:
        raise UserError(f"--logits: {len(ids)} tokens exceed the context of {session.model.config.max_position_embeddings}")
    tensor = torch.tensor([ids], device=session.model.device)
    logits = session.model(tensor).logits[0].contiguous().cpu()
    with MODEL.staged(Path(path).absolute().parent) as scratch:
        save_file({"ids": tensor[0].cpu(), "logits": logits}, scratch / Path(path).name)


@torch.no_grad()
def fill(model, tokenizer, text: str, where: str = "prompt") -> str:
    """An encoder's answer: the text with each mask token replaced by the likeliest piece, which brings its own space along."""
    text = text.replace(f" {tokenizer.mask_token}", tokenizer.mask_token)
    ids = torch.tensor([tokenizer(text).input_ids], device=model.device)  # (1, T)
    hidden = ids == tokenizer.mask_token_id
    if not hidden.any():
        raise UserError(f"{where}: this model is an encoder: it fills in {tokenizer.mask_token}, and the text holds none")
    if ids.shape[1] > model.config.max_position_embeddings:
        raise UserError(f"{where}: {ids.shape[1]} tokens, but this encoder reads {model.config.max_position_embeddings} at "
                        "once; shorten the text")
    logits = model(ids).logits
    logits[..., tokenizer.all_special_ids] = -math.inf
    filled = torch.where(hidden, logits.argmax(-1), ids)[0].tolist()
    return tokenizer.decode(filled, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def refuse_sampling(session: Session, why: str) -> None:
    usual = InferenceSection()
    for key in ("n", "top_k", "top_p", "min_p", "logprobs", "stop", "repetition_penalty", "presence_penalty",
                "frequency_penalty"):
        if getattr(session.settings, key) != getattr(usual, key):
            raise UserError(f"inference.{key}: this model {why} and samples nothing")


def run_fill(session: Session, actions, prompt: str | None) -> None:
    if actions.score is not None or actions.jsonl:
        raise UserError("this model is an encoder: it gives no text a probability and answers no JSONL; use --prompt, --lines "
                        "or a pipe")
    refuse_sampling(session, "is an encoder; it takes the likeliest piece for each mask")
    lines = (line.rstrip("\r\n") for line in read_stdin()) if prompt is None else [prompt]
    for number, line in enumerate(lines, 1):
        print(fill(session.model, session.tokenizer, line, "prompt" if prompt is not None else f"stdin:{number}"), flush=True)


@torch.no_grad()
def scores_of(model, rows: list[list[int]]) -> torch.Tensor:
    """The classification head's outputs (B, L) for each row of ids: at a decoder's last token, which has seen the whole text, or
    an encoder's first."""
    if model.config.causal:
        rows = [TOKENIZER.without_padding(ids, model.config.pad_token_id) for ids in rows]
    shape = len(rows), max(map(len, rows))
    inputs, positions = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for row, ids in enumerate(rows):
        inputs[row, : len(ids)], positions[row, : len(ids)] = torch.tensor(ids), torch.arange(len(ids))
    scores = model(inputs.to(model.device), positions=positions.to(model.device),
                   want=("scores",)).scores.float().cpu()  # (B, T, L)
    return scores[torch.arange(len(rows)), positions.argmax(1) if model.config.causal else 0]  # (B, L)


def completion_text(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of a completion, decoded after its prompt, as some tokenizers drop the blank before a first word."""
    before = tokenizer.decode(prompt[-6:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*prompt[-6:], *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return whole[len(before) :]


def answered_ids(tokenizer, messages: list[dict]) -> list[int]:
    """A conversation up to the end of the assistant's last turn, as a generation leaves it."""
    ids, turns = TOKENIZER.render_chat(tokenizer, messages)
    if not turns:
        raise UserError("no assistant message, so there is nothing to judge")
    return ids[: turns[-1].stop]


def classify(model, tokenizer, texts: list[str | list[dict]]) -> list[list[float]]:
    """Probabilities of the labels for each text, or for the last answer of each conversation, in the order of
    `model.config.labels`; the bare score of a model with one output."""
    context = model.config.max_position_embeddings
    ids = [tokenizer(text).input_ids if isinstance(text, str) else answered_ids(tokenizer, text) for text in texts]
    if longer := sum(len(own) > context for own in ids):
        say(f"{longer} text{'s' * (longer > 1)} of more than {context} tokens, the model's context: truncated")
        ids = [tokenizer(text, truncation=True, max_length=context).input_ids if isinstance(text, str) else own[:context]
               for text, own in zip(texts, ids, strict=True)]
    chosen = scores_of(model, ids)
    return (chosen.softmax(-1) if chosen.shape[1] > 1 else chosen).tolist()


def run_labels(session: Session, actions, prompt: str | None, piped: bool) -> None:
    """A label and its probability for each line, or JSON for each line of JSON; nothing for an empty line."""
    if actions.score is not None or actions.echo:
        raise UserError("this model tells labels apart and writes no words, so --score and --echo mean nothing; use --prompt, "
                        "--lines, --jsonl or a pipe")
    refuse_sampling(session, "tells labels apart")
    labels = MODEL.label_names(session.model)

    def texts() -> Iterator[tuple[dict, str | list[dict]]]:
        lines = read_stdin() if prompt is None else prompt.split("\n") if piped else [prompt]
        for number, line in enumerate(lines, 1):
            record: dict = {}
            if actions.jsonl:
                if not line.strip():
                    continue
                record = TOKENIZER.parse_json(line, f"stdin:{number}")
                if isinstance(record, dict) and isinstance(record.get("messages"), list):
                    if not session.tokenizer.chat_template:
                        raise UserError(f"stdin:{number}: messages need a chat template, which this tokenizer lacks; give a "
                                        "'text'")
                    yield record, messages_of(record["messages"], f"stdin:{number}")
                    continue
                line = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
                if not isinstance(line, str) or not line.strip():
                    raise UserError(f"stdin:{number}: an object with a text is expected, as in {{\"text\": \"...\"}}")
            yield record, line.rstrip("\r\n")

    for group in batches(texts(), session.settings.batch_size):
        full = [text for _, text in group if not isinstance(text, str) or text.strip()]
        given = iter(classify(session.model, session.tokenizer, full) if full else ())
        for record, text in group:
            shares = dict(zip(labels, next(given), strict=True)) if not isinstance(text, str) or text.strip() else {}
            best = max(shares, key=shares.get) if shares else ""
            if actions.jsonl:
                print(json.dumps({**record,
                                  **({"reward": shares[best]} if len(shares) == 1 else {"label": best, "probabilities": shares})},
                                  ensure_ascii=False))
            elif len(shares) == 1:
                print(f"{shares[best]:.4f}")
            else:
                print(f"{best}\t{shares[best]:.4f}" if shares else "")
        sys.stdout.flush()


def run_prompt(session: Session, prompt: str, echo: bool) -> None:
    if session.sampling.n == 1:
        if echo:
            sys.stdout.write(prompt)
        session.stream(prompt, session.sampling)
        print(flush=True)
        return
    for completion in session.answer([prompt], [session.sampling])[0]:
        print((prompt if echo else "") + completion.text, flush=True)


# ------------------------------------------------------------------------------------------------- HTTP server


class Refused(Exception):
    """An HTTP error, returned in OpenAI's format."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", headers: dict | None = None):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self):
        from fastapi.responses import JSONResponse

        error = {"message": str(self), "type": self.kind, "param": None, "code": self.status}
        return JSONResponse({"error": error}, self.status, self.headers)


class Service:
    """Runs the engine in a background thread. Requests are added and removed between steps; a callback reports new tokens."""

    def __init__(self, engine: Engine | StaticEngine, limit: int):
        self.engine, self.limit, self.open = engine, limit, 0
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, rows: list[Row], tell: Callable[[Row, Exception | None], None]) -> None:
        """tell(row, error) is called in the engine's thread after each new token of a row, or if the step fails."""
        if self.open + len(rows) > self.limit:
            raise Refused(429, f"the queue is full: {self.open} of {self.limit} completions run or wait; try again later",
                          "rate_limit_error", {"Retry-After": "1"})
        self.open += len(rows)
        for row in rows:
            row.tell = tell
        self.inbox.put(("add", rows))

    def leave(self, rows: list[Row]) -> None:
        """Remove submitted rows, finished or not; call once per `submit`."""
        self.open -= len(rows)
        self.inbox.put(("remove", rows))

    def _work(self) -> None:
        engine = self.engine
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    what, rows = self.inbox.get(block=not engine.busy)
                    if what == "add":
                        engine.add(rows)
                    else:
                        for row in rows:
                            engine.remove(row)
            try:
                for row in engine.step() if engine.busy else ():
                    row.tell(row, None)
            except Exception as error:  # such as out of memory: the current requests fail, the server continues
                for row in [*engine.running, *engine.waiting]:
                    engine.remove(row)
                    row.tell(row, error)


REQUEST_FIELDS = {"model", "stream", "stream_options", "user", "metadata", "store", "best_of", "response_format", "logprobs"}


def sampling_of(record: dict, base: Sampling, chat: bool) -> Sampling:
    """The sampling parameters of an HTTP request; unknown keys are an error."""
    known = {*SAMPLING_KEYS, *OPENAI_KEYS, *REQUEST_FIELDS, *(("messages", "tools") if chat else ("prompt", "echo"))}
    for key in record:
        if key not in known:
            raise Refused(400, f"{key}: unknown key; nearest is {MODEL.nearest(key, known)}")
    if (record.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Refused(400, "response_format: only {\"type\": \"text\"} is supported")
    count = None if chat else record.get("logprobs")  # the number of alternatives; in a chat yes or no
    more = {} if count is None else {"logprobs": True, "top_logprobs": MODEL.convert(count, int, "logprobs")}
    sampling = own_sampling(record, base, "", **more)
    if sampling.top_logprobs > 20 or sampling.n > 128:
        raise Refused(400, "top_logprobs must be at most 20, and n at most 128")
    return sampling


class Answer:
    """Builds the JSON responses to one request."""

    def __init__(self, session: Session, kind: str, name: str, chat: bool):
        self.session, self.chat, self.name = session, chat, name
        self.id, self.created, self.kind = f"{kind}-{uuid.uuid4().hex}", int(time.time()), kind

    def tokens(self, ids: list[int]) -> list[str]:
        return [self.session.tokenizer.decode([i]) for i in ids]

    def logprobs(self, completion: Completion, start: int, stop: int, place: int = 0) -> dict | None:
        """Log-probabilities of tokens `start` to `stop` in OpenAI's format; `place` is their character offset."""
        if completion.logprobs is None:
            return None
        texts, values = self.tokens(completion.ids[start:stop]), completion.logprobs[start:stop]
        best = completion.best[start:stop] if completion.best else [{}] * len(texts)
        named = [[(self.session.tokenizer.decode([i]), value) for i, value in one.items()] for one in best]
        if self.chat:
            def entry(text: str, value: float) -> dict:
                return {"token": text, "logprob": value, "bytes": list(text.encode())}

            return {"content": [{**entry(text, value), "top_logprobs": [entry(*one) for one in others]}
                                for text, value, others in zip(texts, values, named, strict=True)]}
        offsets = list(itertools.accumulate(map(len, texts), initial=place))[:-1]
        others = [dict(one) for one in named] if completion.best else None
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": others, "text_offset": offsets}

    def choice(self, index: int, text: str, finish: str | None, logprobs: dict | None, delta: bool, first: bool = False) -> dict:
        content = {"role": "assistant"} if first or not delta else {}
        if self.chat:
            content |= {"content": text} if text or not delta or first else {}
        own = {"delta" if delta else "message": content} if self.chat else {"text": text}
        return {"index": index, **own, "logprobs": logprobs, "finish_reason": finish}

    def record(self, choices: list[dict], usage: dict | None, delta: bool) -> dict:
        kind = ("chat.completion.chunk" if delta else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name, "choices": choices,
                **({"usage": usage} if usage is not None else {})}


def make_app(session: Session, name: str, engine: Engine | StaticEngine):
    """The FastAPI application: OpenAI's routes on one engine."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    settings = session.settings
    service = Service(engine, settings.max_queue)
    app, meters, began = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Meters(service), int(time.time())
    model, tokenizer = session.model, session.tokenizer
    context = model.config.max_position_embeddings
    key = settings.api_key and f"Bearer {settings.api_key}".encode()

    def route(path: str, method: str = "POST"):
        """Register a route: errors are returned in OpenAI's format, and every route except /health requires the API key."""

        def add(function: Callable) -> Callable:
            async def guarded(request):
                given = request.headers.get("authorization", "").encode()
                try:
                    if path != "/health" and key and not hmac.compare_digest(given, key):
                        raise Refused(401, "wrong API key", "authentication_error")
                    return await function(request)
                except Refused as error:
                    return error.response()
                except UserError as error:
                    return Refused(400, str(error)).response()

            app.add_route(path, guarded, methods=[method])
            return function

        return add

    @app.exception_handler(404)
    async def unknown(request, _):
        return Refused(404, f"{request.url.path}: no such route", "not_found_error").response()

    @app.exception_handler(Exception)
    async def failed(_, error):
        return Refused(500, "the server failed on this request", "server_error").response()

    async def read(request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            if (size := size + len(part)) > settings.max_body:
                raise Refused(413, f"the request is larger than {settings.max_body:,} bytes")
        return b"".join(parts)

    async def body_of(request) -> dict:
        try:
            data = await asyncio.wait_for(read(request), settings.timeout)
            record = TOKENIZER.parse_json(data.decode("utf-8"), "the request")
        except asyncio.TimeoutError:
            raise Refused(408, "the request did not arrive in time") from None
        except UnicodeDecodeError:
            raise Refused(400, "the request is not UTF-8") from None
        if not isinstance(record, dict):
            raise Refused(400, "the request is not a JSON object")
        TOKENIZER.checked(json.dumps(record, ensure_ascii=False).replace("\0", ""), "the request")
        if record.get("model") not in (None, name):
            raise Refused(404, f"model: '{record['model']}' is not served; {name} is", "not_found_error")
        return record

    def whole(ids: list[int]) -> list[int]:
        if not ids or not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
            raise Refused(400, f"prompt: token ids are numbers below {model.config.vocab_size:,}")
        if len(ids) >= context:
            raise Refused(400, f"the prompt has {len(ids)} tokens; the context is {context}, the answer included")
        return ids

    def prompts_of(record: dict) -> list[list[int]]:
        prompt = record.get("prompt")
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(isinstance(one, (str, list)) for one in prompt):
            raise Refused(400, "prompt: a text, a list of texts, or token ids are expected")
        return [whole(TOKENIZER.encode_prompt(tokenizer, one) if isinstance(one, str) else one) for one in prompt]

    def conversation(record: dict) -> list[list[int]]:
        if not tokenizer.chat_template:
            raise Refused(400, "messages: this model has no chat template; use /v1/completions")
        if record.get("tools"):
            raise Refused(400, "tools: not supported")
        messages = messages_of(record.get("messages"), "messages") if isinstance(record.get("messages"), list) else None
        if not messages:
            raise Refused(400, "messages: a list of messages is expected")
        if settings.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        ids = TOKENIZER.render_chat(tokenizer, messages, add_generation_prompt=True, literal=not settings.control_tokens).ids
        return [whole(ids)]

    async def complete(request, chat: bool):
        record = await body_of(request)
        sampling = sampling_of(record, session.sampling, chat)
        prompts = conversation(record) if chat else prompts_of(record)
        echo, streamed = record.get("echo") is True, record.get("stream") is True
        rows = [row for group in _make_rows(model, prompts, [sampling] * len(prompts), tokenizer, 0) for row in group]
        answer = Answer(session, "chatcmpl" if chat else "cmpl", name, chat)
        events: asyncio.Queue = asyncio.Queue()
        loop, numbers, clock = asyncio.get_running_loop(), {row: i for i, row in enumerate(rows)}, time.perf_counter()

        def tell(row: Row, error: Exception | None) -> None:
            event = (numbers[row], row.text[: row.told], len(row.ids), row.finish, error)
            loop.call_soon_threadsafe(events.put_nowait, event)

        service.submit(rows, tell)

        async def updates():
            """(index, text so far, number of tokens, finish reason) after each token, until all rows are finished."""
            left = set(numbers.values())
            try:
                while left:
                    remaining = settings.timeout - (time.perf_counter() - clock)
                    number, text, count, finish, error = await asyncio.wait_for(events.get(), max(remaining, 0))
                    if error:
                        say(f"a request failed: {type(error).__name__}: {MODEL.first_line(error)}")
                        raise Refused(500, "the model failed on this request", "server_error")
                    meters.token(rows[number], clock, count, finish)
                    yield number, text, count, finish
                    left -= {number} if finish else set()
            except asyncio.TimeoutError:
                raise Refused(504, f"the request took longer than {settings.timeout:g} seconds", "timeout_error") from None
            finally:
                service.leave(rows)

        def usage() -> dict:
            read, written = sum(map(len, prompts)), sum(len(row.ids) for row in rows)
            return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

        if streamed:
            wants_usage = bool((record.get("stream_options") or {}).get("include_usage"))

            async def lines():
                sent, told = [0] * len(rows), [0] * len(rows)
                try:
                    if chat:
                        begins = [answer.choice(i, "", None, None, True, True) for i in range(len(rows))]
                        yield _event(answer.record(begins, None, True))
                    async for number, text, count, finish in updates():
                        row, piece = rows[number], text[sent[number] :]
                        if not piece and not finish:
                            continue
                        logprobs = answer.logprobs(row.completion(), told[number], count, sent[number])
                        if echo and not sent[number] and not told[number]:
                            piece = tokenizer.decode(row.prompt, skip_special_tokens=True) + piece
                        sent[number], told[number] = len(text), count
                        yield _event(answer.record([answer.choice(number, piece, finish, logprobs, True)], None, True))
                    if wants_usage:
                        yield _event(answer.record([], usage(), True))
                    yield "data: [DONE]\n\n"
                except Refused as error:
                    yield _event({"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}})

            return StreamingResponse(lines(), media_type="text/event-stream")

        async def collect() -> None:
            async for _ in updates():
                pass

        work = asyncio.create_task(collect())
        gone = asyncio.create_task(_disconnected(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            return PlainTextResponse("", 499)
        await work
        choices = []
        for number, row in enumerate(rows):
            completion = row.completion()
            before = tokenizer.decode(row.prompt, skip_special_tokens=True) if echo else ""
            logprobs = answer.logprobs(completion, 0, len(completion.ids), len(before))
            choices.append(answer.choice(number, before + completion.text, completion.finish_reason, logprobs, False))
        return JSONResponse(answer.record(choices, usage(), False))

    @route("/v1/completions")
    async def completions(request):
        return await complete(request, chat=False)

    @route("/v1/chat/completions")
    async def chat_completions(request):
        return await complete(request, chat=True)

    @route("/v1/models", "GET")
    async def models(_):
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "created": began, "owned_by": "local",
                                                         "max_model_len": context}]})

    @route("/tokenize")
    async def tokenize(request):
        record = await body_of(request)
        if "messages" in record:
            [ids] = conversation(record)
        elif isinstance(record.get("prompt"), str):
            ids = TOKENIZER.encode_prompt(tokenizer, record["prompt"])
        else:
            raise Refused(400, "prompt: a text is expected, or messages")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})

    @route("/detokenize")
    async def detokenize(request):
        record = await body_of(request)
        ids = record.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids):
            raise Refused(400, f"tokens: a list of token ids below {model.config.vocab_size:,} is expected")
        return JSONResponse({"prompt": tokenizer.decode(ids)})

    @route("/health", "GET")
    async def health(_):
        return JSONResponse({"status": "ok"})

    @route("/metrics", "GET")
    async def metrics(_):
        return PlainTextResponse(meters.text())

    return app


def _event(record: dict) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


async def _disconnected(request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


class Meters:
    """Prometheus metrics under vLLM's names."""

    def __init__(self, service: Service):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry, engine = CollectorRegistry(), service.engine
        named = dict(registry=self.registry)
        gauges = {"num_requests_running": lambda: len(engine.running), "num_requests_waiting": lambda: len(engine.waiting)}
        if isinstance(engine, Engine):
            gauges["kv_cache_usage_perc"] = lambda: 1 - engine.cache.available() / engine.cache.pages
        for name, read in gauges.items():
            Gauge(f"vllm:{name}", name.replace("_", " "), **named).set_function(read)
        self.read = Counter("vllm:prompt_tokens", "tokens of prompts", **named)
        self.written = Counter("vllm:generation_tokens", "tokens of answers", **named)
        self.finished = Counter("vllm:request_success", "answers", ["finished_reason"], **named)
        self.first = Histogram("vllm:time_to_first_token_seconds", "seconds to the first token", **named)
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "seconds to the whole answer", **named)

    def token(self, row: Row, clock: float, count: int, finish: str | None) -> None:
        self.written.inc()
        if count == 1:
            self.read.inc(len(row.prompt))
            self.first.observe(time.perf_counter() - clock)
        if finish:
            self.finished.labels(finish).inc()
            self.whole.observe(time.perf_counter() - clock)

    def text(self) -> str:
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()


def run_server(session: Session, name: str) -> None:
    """Serve until SIGTERM or Ctrl-C, which finish open requests but accept no new ones."""
    s = session.settings
    engine = session.engine(s.enable_prefix_caching, s.max_num_batched_tokens)
    try:
        import uvicorn

        app = make_app(session, name, engine)
    except ImportError as error:
        raise UserError(f"--serve: needs {error.name}; pip install -r requirements-extras.txt") from None
    if isinstance(engine, Engine):
        room = engine.cache.pages * engine.cache.page
        weights = sum(weight.numel() * weight.element_size() for weight in session.model.parameters())
        a_token = MODEL.cache_numbers(session.model.config) * torch.empty(0, dtype=session.model.dtype).element_size()
        say(f"memory: weights {MODEL.size_text(weights)}, cache {MODEL.size_text(room * a_token)} for {room:,} tokens in pages "
            f"of {engine.cache.page}, at most {s.batch_size} sequences per batch")
    generate(session.model, [[session.tokenizer.bos_token_id or 0] * 8], Sampling(2, 0, ignore_eos=True))  # warm up
    say(f"serving {name} at http://{s.host}:{s.port}/v1")
    server = uvicorn.Server(uvicorn.Config(app, s.host, s.port, log_level="warning", access_log=False,
                                           timeout_graceful_shutdown=int(s.timeout)))
    add_page(app, session, name, server)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()


# --------------------------------------------------------------------------------------------------- chat page

PAGE_SETTINGS = {"temperature": 2, "top_p": 1, "min_p": 1, "top_k": None, "max_new_tokens": None, "seed": None}  # slider maximum


def chat_blocks(session: Session, name: str):
    """The chat page: its functions stream from the HTTP API of the server that it is opened on."""
    import gradio as gr
    import httpx

    settings, sampling = session.settings, session.sampling
    headers = {"Authorization": f"Bearer {settings.api_key}".encode()} if settings.api_key else {}
    knows_thinking = session.chat and "enable_thinking" in str(session.tokenizer.chat_template)

    def api(request) -> httpx.AsyncClient:
        host, port = request.request.scope["server"]
        address = httpx.URL(scheme="http", host=host, port=port)
        return httpx.AsyncClient(base_url=address, headers=headers, timeout=None, trust_env=False)

    async def models(request):
        async with api(request) as client:
            ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        return gr.Dropdown(ids, value=ids[0], visible=len(ids) > 1)

    def conversation(history: list[dict], message: str, system: str) -> list[dict]:
        messages = [{"role": "system", "content": system}] if system else []
        for turn in [*history, {"role": "user", "content": [{"text": message}]}]:
            if (turn.get("metadata") or {}).get("title"):
                continue  # thinking, or an error
            if messages and messages[-1]["role"] == turn["role"]:
                messages.pop()  # this question got no answer
            messages.append({"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])})
        return messages

    async def answer(message, history, request, model, system, thinking, *values):
        """Yields the messages of the answer so far. If Gradio closes this generator (stop), the request is aborted as well."""
        record = {key: value for key, value in zip(PAGE_SETTINGS, values, strict=True) if value not in ("", None)}
        record |= {"model": model, "n": 1, "stream": True}
        record |= {"messages": conversation(history, message, system)} if session.chat else {"prompt": message}
        if knows_thinking:
            record["chat_template_kwargs"] = {"enable_thinking": thinking}
        thought = text = error = ""
        shown = 0.0

        def messages(done: bool = True) -> list[dict]:
            status = "done" if text or done else "pending"
            found = [{"content": thought, "metadata": {"title": "Thinking", "status": status}}] if thought else []
            found += [{"content": text}] if text else []
            return [*found, {"content": error, "metadata": {"title": "Error"}}] if error else found

        route = "/v1/chat/completions" if session.chat else "/v1/completions"
        async with api(request) as client, client.stream("POST", route, json=record) as response:
            async for line in response.aiter_lines():
                if line in ("", "data: [DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                error = chunk.get("error", {}).get("message", "")
                for choice in chunk.get("choices", ()):
                    delta = choice.get("delta", choice)  # of a chat, or a text completion
                    thought += delta.get("reasoning_content") or ""
                    text += delta.get("content") or delta.get("text") or ""
                if time.perf_counter() - shown > 0.05:  # the browser need not draw every token of a fast model
                    yield messages(done=False)
                    shown = time.perf_counter()
        yield messages()

    # Gradio passes the request to a parameter of this type; a string annotation cannot name a local import.
    for function in (models, answer):
        function.__annotations__ = {"request": gr.Request}
    with gr.Blocks(title=name, fill_height=True, analytics_enabled=False) as page:
        with gr.Sidebar(open=False, position="right"):
            model = gr.Dropdown([name], value=name, label="Model", visible=False)
            system = gr.Textbox(label="System message", placeholder=settings.system, lines=2, visible=session.chat)
            thinking = gr.Checkbox(True, label="Thinking", visible=knows_thinking)
            values = []
            for key, high in PAGE_SETTINGS.items():
                value, label = getattr(sampling, key), key.replace("_", " ").capitalize()
                if high is None:
                    values.append(gr.Textbox("" if value is None else str(value), label=label, placeholder="default"))
                else:
                    values.append(gr.Slider(0, max(high, value), value, step=0.01, label=label))
        gr.Markdown(f"## {name}")
        note = None if session.chat else "This model has no chat template. It continues each message without the earlier ones."
        chatbot = gr.Chatbot(show_label=False, scale=1, buttons=["copy", "copy_all"], feedback_options=None, placeholder=note)
        gr.ChatInterface(answer, chatbot=chatbot, editable=True, additional_inputs=[model, system, thinking, *values],
                         concurrency_limit=None, api_visibility="private")
        page.load(models, outputs=model, api_visibility="private")
    return page


def add_page(app, session: Session, name: str, server) -> None:
    """Mount the chat page at /. It is built when / is first requested, because importing Gradio takes seconds."""
    if not importlib.util.find_spec("gradio"):
        say("no chat page at /: Gradio is not installed; pip install -r requirements-extras.txt")
        return
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.security import HTTPBasic

    key, opening = (session.settings.api_key or "").encode(), None
    policy = b"default-src 'self' data: blob: 'unsafe-inline'"  # the browser contacts no other host

    def build() -> FastAPI:
        os.environ["GRADIO_RUN_HISTORY"] = "False"  # the browser stores no conversations
        import gradio

        page = FastAPI(openapi_url=None)
        style = "body:has(.stop-button) [aria-label=Clear] {display: none}"  # Gradio's Clear does not stop an answer
        theme = gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
        return gradio.mount_gradio_app(page, chat_blocks(session, name), "/", footer_links=[], max_file_size=0, theme=theme,
                                       head=f"<style>{style}</style>", app_kwargs={"openapi_url": None})

    async def open_page() -> tuple:
        page = await asyncio.to_thread(build)
        lifespan = page.router.lifespan_context(page)
        await lifespan.__aenter__()

        async def close() -> None:
            while not server.should_exit:
                await asyncio.sleep(0.2)
            page.routes[-1].app.stop_event.set()  # else browser tabs hold connections that delay the server's exit
            await lifespan.__aexit__(None, None, None)

        return page, asyncio.create_task(close())

    async def serve(scope, receive, send):
        nonlocal opening
        size = 0
        if scope["path"].startswith("/v1/") or not opening and scope["path"] != "/":
            raise HTTPException(404)
        if key:  # status 401 makes the browser ask for a name, which is ignored, and a password
            given = await HTTPBasic()(Request(scope))
            if not hmac.compare_digest(given.password.encode(), key):
                raise HTTPException(401, "wrong API key", {"WWW-Authenticate": "Basic"})

        async def bounded() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > session.settings.max_body:
                raise HTTPException(413)
            return message

        async def confined(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", policy)]
            await send(message)

        opening = opening or asyncio.create_task(open_page())
        await (await opening)[0](scope, bounded, confined)

    app.mount("/", serve)
    say(f"chat page at http://{session.settings.host}:{session.settings.port}/")


ACTIONS = {
    "prompt": Action("text to continue; '' is the beginning of a text", str),
    "adapter": Action("LoRA adapter to put on the model: a folder that `SFT.py --lora.r` or peft wrote", str),
    "echo": Action("print the prompt before the answer"),
    "lines": Action("each line of stdin (with --score, of the file) is a prompt of its own"),
    "jsonl": Action("stdin is JSONL: {prompt or messages, any sampling key}; so is stdout"),
    "score": Action("measure a file (- or nothing: stdin) instead of generating", str, "-"),
    "serve": Action("start an OpenAI-compatible HTTP server"),
    "logits": Action("with --score: write the raw logits of the first text to this .safetensors file", str),
}
SECTIONS = {**TOKENIZER.SECTIONS, "inference": InferenceSection}
SHORTS = {"max_num_seqs": "inference.batch_size", "quantization": "model.quantization"}


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv, SECTIONS, "inference", ACTIONS, __doc__, SHORTS)
    actions = config.actions
    check_flags(actions, config.inference.logprobs)
    prompt = None if actions.prompt is None else TOKENIZER.checked(actions.prompt, "--prompt")
    elsewhere = actions.score is not None or actions.lines or actions.jsonl or actions.serve
    piped = prompt is None and not elsewhere and not (sys.stdin and sys.stdin.isatty())
    if piped:
        prompt = "".join(read_stdin())
        if not prompt:
            raise UserError("no prompt: stdin is empty; pipe some text in, or use --prompt")
        prompt = prompt.removesuffix("\n")
    session = Session(config)
    if actions.serve:
        if "score" in session.model.heads or not session.model.config.causal:
            raise UserError("--serve: this model generates no text; name a causal language model")
        run_server(session, config.model.name)
    elif "score" in session.model.heads:
        run_labels(session, actions, prompt, piped)
    elif not session.model.config.causal:
        run_fill(session, actions, prompt)
    elif actions.score is not None:
        run_score(session, config.data, actions.score, actions.lines, actions.logits)
    elif actions.jsonl:
        run_jsonl(session)
    elif actions.lines:
        run_lines(session)
    elif prompt is not None:
        run_prompt(session, prompt, actions.echo)
    else:
        run_terminal(session)


def check_flags(actions, logprobs: bool) -> None:
    """Flags that would be ignored together are refused."""
    modes = [f"--{name}" for name in ("prompt", "jsonl", "score", "serve") if getattr(actions, name) not in (None, False)]
    modes += ["--lines"] if actions.lines and actions.score is None else []
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} are mutually exclusive; set one")
    if actions.logits and actions.score is None:
        raise UserError("--logits: goes with --score")
    if logprobs and actions.score is None and not actions.jsonl:
        raise UserError("--logprobs: goes with --jsonl or --score, whose output has a place for them")
    if actions.score not in (None, "-") and (Path(actions.score).is_dir() or not Path(actions.score).exists()):
        raise UserError(f"--score: there is no file '{actions.score}'")


if __name__ == "__main__":
    run_main(main)
