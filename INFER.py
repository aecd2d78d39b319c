"""INFER.py: text generation.

Read in this order: settings (`Sampling`), sampling (`Sampler`), the state of one completion (`Row`), continuous batching
(`Engine`), speculative decoding (`PromptLookup`, `DraftModel`), `generate` and `stream`, `beam_search`, scoring (`score`). Below
the banner: hardware settings, structured outputs, static batching for other models, the command line, evaluation by lm-eval, the
HTTP server and its chat page.

    echo "Once upon a time" | python INFER.py --model out
    python INFER.py --model out/sft                                   # a chat in the terminal
    python INFER.py --model out --prompt "What is 12 plus 30?" --temperature 0 --max-new-tokens 32
    python INFER.py --serve --model out/sft --port 8000
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import difflib
import gc
import hmac
import importlib.util
import itertools
import json
import math
import os
import queue
import re
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
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
                                     low=0.01, high=100, often=True)
    presence_penalty: float = knob(0.0, "penalty subtracted once from the logit of each generated token", often=True)
    frequency_penalty: float = knob(0.0, "penalty subtracted from a token's logit for each time it was generated", often=True)
    stop: list[str] | str | None = knob(None, "stop strings; not included in the completion", often=True)
    seed: int | None = knob(None, "random seed; the completion does not depend on the rest of the batch", low=-(10**30),
                            high=10**30, often=True)
    logit_bias: dict | None = knob(None, "biases added to the logits: {token id: bias}")
    min_tokens: int = knob(0, "minimum number of generated tokens before an end-of-text token", low=0)
    structured_outputs: dict | None = knob(
        None, "constrain the completion; {json: SCHEMA}, {json_object: true}, {regex: TEXT}, {choice: [TEXT]} or {grammar: LARK}")
    logprobs: bool = knob(False, "return the log-probability of each token", often=True)
    top_logprobs: int = knob(0, "return the log-probabilities of the k most probable tokens at each position",
                            low=0, only="logprobs")
    n: int = knob(1, "completions per prompt", low=1, often=True)
    num_beams: int = knob(1, "number of beams; above 1, beam search for the highest mean log-probability per token", low=1)
    ignore_eos: bool = knob(False, "continue after the end-of-text token")

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop
        check(self, "inference")
        if self.structured_outputs is not None:
            kinds = {"json": dict, "json_object": bool, "regex": str, "choice": list, "grammar": str}
            given = {kind: value for kind, value in self.structured_outputs.items() if value not in (None, False)}
            if len(given) != 1 or not all(isinstance(value, kinds.get(kind, ())) for kind, value in given.items()) \
                    or not all(isinstance(text, str) for text in given.get("choice", [""]) or [None]):
                raise UserError("inference.structured_outputs: expected {json: SCHEMA}, {json_object: true}, {regex: TEXT}, "
                                f"{{choice: [TEXT, ...]}} or {{grammar: LARK}}, got {self.structured_outputs}")
            self.structured_outputs = given
        if self.num_beams > 1 and (self.penalizes or self.logit_bias or self.min_tokens or self.logprobs or
                                   self.structured_outputs):
            raise UserError("inference.num_beams: beam search does not support penalties, logit_bias, min_tokens, "
                            "structured_outputs and logprobs; leave them out")
        if self.n > self.num_beams > 1:
            raise UserError(f"inference.n: {self.n} completions need at least {self.n} beams; num_beams is {self.num_beams}")
        if self.logit_bias is not None:
            try:
                if not all(re.fullmatch("[0-9]+", str(token)) for token in self.logit_bias):
                    raise ValueError
                self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
            except (AttributeError, TypeError, ValueError, OverflowError):
                raise UserError(f"inference.logit_bias: expected {{token id: number}}, got {self.logit_bias}") from None
            for bias in self.logit_bias.values():
                if not -100 <= bias <= 100:
                    raise UserError(f"inference.logit_bias: {bias} is not between -100 and 100")

    @property
    def penalizes(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


@dataclass
class InferenceSection(Sampling):
    use_cache: bool = knob(True, "use a KV cache; false recomputes past tokens at each step, which is much slower", often=True)
    batch_size: int = knob(32, "maximum number of sequences per batch", low=1, often=True)
    chat: str = knob("auto", "apply the chat template: on, off, or auto (if the tokenizer has one)", ("auto", "on", "off"),
                     often=True)
    system: str | None = knob(None, "system message", often=True)
    host: str = knob("127.0.0.1", "--serve: address to bind; 0.0.0.0 accepts connections from other machines", often=True)
    port: int = knob(8000, "--serve: port", low=0, high=65535, often=True)
    api_key: str | None = knob(None, "--serve: API key that requests must send")
    max_queue: int = knob(256, "--serve: maximum running and waiting completions; further requests get status 429", low=1)
    max_num_batched_tokens: int | None = knob(
        None, "--serve: maximum tokens per forward pass; longer prompts are chunked; null: 512, on a GPU 4096", low=1)
    enable_prefix_caching: bool = knob(True, "--serve: reuse the KV cache of shared prompt prefixes")
    timeout: float = knob(600.0, "--serve: maximum seconds per request", above=0)
    control_tokens: bool = knob(False, "parse control tokens in chat messages; false treats them as text")
    max_body: int = knob(2**22, "--serve: maximum request size in bytes", low=1)
    response_cache: int = knob(0, "--serve: number of cached responses to deterministic requests; temperature 0 or a seed", low=0)
    lora_modules: list[str] = knob([], "--serve: LoRA adapters as NAME=FOLDER; requests choose one by `model`")
    prompt_lookup: bool = knob(False, "speculative decoding by n-gram lookup in the preceding tokens; completions do not change")
    draft_model: str | None = knob(None, "speculative decoding with this smaller model; completions do not change")
    num_speculative_tokens: int = knob(4, "speculative decoding: maximum number of draft tokens per step", low=1)
    model: dict = knob({"name": "./out"}, "overrides `model` for this stage")

    def __post_init__(self):
        super().__post_init__()
        drafts = [key for key in ("prompt_lookup", "draft_model") if getattr(self, key)]
        if len(drafts) == 2:
            raise UserError("inference.prompt_lookup and inference.draft_model are mutually exclusive; set one")
        if drafts and (not self.use_cache or self.num_beams > 1):
            raise UserError(f"inference.{drafts[0]}: has no effect " +
                            ("with num_beams" if self.use_cache else "with use_cache false") + "; leave it out")
        if not drafts and self.num_speculative_tokens != 4:
            raise UserError("inference.num_speculative_tokens: has no effect without prompt_lookup or draft_model; leave it out")


SAMPLING_KEYS = [f.name for f in fields(Sampling)]
REQUEST_KEYS = (*SAMPLING_KEYS, "max_tokens", "max_completion_tokens", "prompt", "messages", "tools", "system", "history")


class Completion(NamedTuple):
    """One completion: its token ids (including the end-of-text token), their log-probabilities under logits / temperature before
    penalties and truncation (None unless requested), "stop" or "length", its text (with a tokenizer), and the `top_logprobs`."""

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str
    text: str | None = None
    best: list[dict[int, float]] | None = None


# ----------------------------------------------------------------------------------------------------- sampler


class Sampler:
    """Sampling for one batch of rows. Their settings become tensors once, and are reused while the batch stays the same."""

    def __init__(self, rows: list[Row], vocabulary: int, device):
        self.rows, self.device, settings = rows, device, [row.sampling for row in rows]
        self.greedy = self._column([s.temperature == 0 for s in settings])[:, 0]
        self.draws = any(s.temperature for s in settings)
        self.temperatures = self._column([max(s.temperature or 1.0, 1e-30) for s in settings])  # finite in float32
        self.limited = [i for i, s in enumerate(settings) if s.temperature and (s.top_k or s.top_p < 1 or s.min_p)]
        limits = [settings[i] for i in self.limited]
        self.limits = [self._column([s.top_k or vocabulary for s in limits]), self._column([s.top_p for s in limits]),
                       self._column([s.min_p for s in limits])]
        self.penalized = [i for i, s in enumerate(settings) if s.penalizes]
        weights = [settings[i] for i in self.penalized]
        self.penalties = [self._column([getattr(s, f"{kind}_penalty") for s in weights])
                          for kind in ("repetition", "presence", "frequency")]
        self.counts = torch.zeros(len(weights), vocabulary, device=device)  # of each token in the completion
        self.seen = torch.zeros_like(self.counts, dtype=torch.bool)  # in the prompt or the completion
        for seen, i in zip(self.seen, self.penalized, strict=True):
            seen[rows[i].prompt] = True
        self.counted = [0] * len(weights)
        self.adjusts = any(s.penalizes or s.logit_bias or s.min_tokens or row.grammar
                           for s, row in zip(settings, rows, strict=True))

    def _column(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]  # (B, 1)

    def __call__(self, logits: Tensor, ahead: int = 0) -> tuple[list[int], list[float] | None, list[dict[int, float]] | None]:
        """Draw one token id per row from logits (B, V) float32 by inverting the cumulative distribution at the row's random
        number for this position, so a completion does not depend on the rest of the batch. Also returns the log-probabilities of
        the ids and of the most probable ids if a row requests them. `ahead`: number of draft tokens after the row's last one."""
        if not torch.isfinite(logits.amax(-1)).all():
            raise UserError("the model's logits are not finite; its weights or its config.json are damaged")
        plain = logits / self.temperatures
        if self.adjusts:
            logits = self._adjust(logits.clone())
        chosen = logits.argmax(-1)
        if self.draws:
            probabilities = (logits / self.temperatures).softmax(-1)
            if self.limited:
                probabilities[self.limited] = truncate(probabilities[self.limited], *self.limits)
            uniform = self._column([row.uniform(len(row.ids) + ahead) for row in self.rows]).float()
            mass = probabilities.cumsum(-1)
            drawn = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)  # (B, 1)
            last = torch.searchsorted(mass, mass[:, -1:].contiguous())  # rounding may point past the last possible token
            chosen = torch.where(self.greedy, chosen, torch.minimum(drawn, last)[:, 0])
        logprobs = best = None
        settings = [row.sampling for row in self.rows]
        if any(s.logprobs for s in settings):
            all_logprobs = plain.log_softmax(-1)  # (B, V)
            logprobs = all_logprobs.gather(1, chosen[:, None]).squeeze(1).tolist()
            if count := max(s.top_logprobs for s in settings):
                values, ids = all_logprobs.topk(min(count, all_logprobs.shape[1]))
                best = [dict(zip(row_ids[: s.top_logprobs], row_values, strict=False))
                        for row_ids, row_values, s in zip(ids.tolist(), values.tolist(), settings, strict=True)]
        return chosen.tolist(), logprobs, best

    def _adjust(self, logits: Tensor) -> Tensor:
        """Apply penalties, biases, `min_tokens` (by masking the end-of-text tokens) and the grammar's mask."""
        for number, i in enumerate(self.penalized):
            new = torch.tensor(self.rows[i].ids[self.counted[number] :], device=self.device, dtype=torch.long)
            self.counts[number] += torch.bincount(new, minlength=logits.shape[1])
            self.seen[number, new] = True
            self.counted[number] = len(self.rows[i].ids)
        if self.penalized:
            repetition, presence, frequency = self.penalties
            penalized = logits[self.penalized]
            weaker = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
            penalized = torch.where(self.seen, weaker, penalized)
            logits[self.penalized] = penalized - presence * (self.counts > 0) - frequency * self.counts
        for logit, row in zip(logits, self.rows, strict=True):
            if bias := row.sampling.logit_bias:
                logit[list(bias)] += torch.tensor(list(bias.values()), device=self.device)
            if len(row.ids) < row.sampling.min_tokens:
                logit[list(row.eos)] = -torch.inf
            if row.grammar:
                logit[~row.grammar.allowed(len(logit)).to(self.device)] = -torch.inf
        return logits


def truncate(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Apply top-k, then top-p, then min-p (each (B, 1)) to probabilities (B, V): excluded tokens become 0. Ties with the last
    kept token are kept, so rounding that reorders ties has no effect."""
    ordered = probabilities.topk(min(int(top_k.max()), probabilities.shape[1])).values  # sorted; all, unless each row has a top_k
    ranks = torch.arange(ordered.shape[1], device=probabilities.device)
    kept = ordered * (ranks < top_k)
    kept = kept / kept.sum(-1, keepdim=True)
    before = kept.cumsum(-1) - kept  # the token that crosses top_p is kept
    inside = (kept > 0) & ((before < top_p) | (top_p == 1) | (ranks == 0)) & (kept >= min_p * kept[:, :1])
    least = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    return probabilities * (probabilities >= least)


def choose_tokens(logits: Tensor, rows: list[Row], last: Sampler | None = None) -> Sampler:
    """Sample the next token of each row; returns the sampler, to be passed as `last` in the next step."""
    sampler = last if last and last.rows == rows else Sampler(rows, logits.shape[1], logits.device)
    tokens, logprobs, best = sampler(logits)
    for i, row in enumerate(rows):
        row.accept(tokens[i], logprobs[i] if logprobs else None, best[i] if best else None)
    return sampler


# -------------------------------------------------------------------------------------------------- generation


class Detokenizer:
    """Convert token ids to text incrementally. Text is withheld while its last character is incomplete, as a character may span
    several tokens. New tokens are decoded with the tokens before them, as some tokenizers drop the space of a first word."""

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


def partial_match(text: str, marks: Iterable[str]) -> int:
    """Number of characters at the end of a text that may be the start of a mark: "Yes. <tool" and ["<tool_call>"] -> 5"""
    return max((k for mark in marks for k in range(1, len(mark)) if text.endswith(mark[:k])), default=0)


class Row:
    """One completion in progress: its prompt, generated tokens and state in the engine."""

    def __init__(self, prompt: list[int], sampling: Sampling, key: tuple, tokenizer, eos: list[int], context: int):
        self.prompt, self.sampling, self.eos = prompt, sampling, () if sampling.ignore_eos else tuple(eos)
        if sampling.stop:  # decoded text omits special tokens, so such a stop string is compared by its id
            special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
            self.eos += tuple(special[stop] for stop in sampling.stop if stop in special)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.best: list[dict[int, float]] = []
        self.finish: str | None = None
        self.budget = min(sampling.max_new_tokens, context - len(prompt))
        self.random, self.uniforms = np.random.default_rng(key), []
        self.grammar = self.adapter = None
        self.detokenizer = Detokenizer(tokenizer, prompt) if tokenizer else None
        self.text = ""
        self.settled = 0  # number of characters of the text that are final: no stop string can start in them
        self.sequence, self.running, self.draft = MODEL.Sequence(), False, []  # set by the engine; `draft`: guessed next tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    @property
    def salt(self) -> bytes:
        """Separates the prefix cache of rows with different adapters."""
        return (self.adapter or "").encode()

    @property
    def missing(self) -> int:
        """Number of tokens that are not in the KV cache yet."""
        return self.length + len(self.draft) - self.sequence.length

    def text_ids(self, start: int, stop: int) -> list[int]:
        """Token ids of the prompt, the completion and the draft from position `start` to `stop`."""
        first = len(self.prompt)
        return self.prompt[start:stop] + (self.ids + self.draft)[max(start - first, 0) : max(stop - first, 0)]

    def uniform(self, index: int) -> float:
        """The random number for token `index` of the completion. It depends only on (seed, step, prompt, sample, index)."""
        while len(self.uniforms) <= index:
            self.uniforms.append(self.random.random())
        return self.uniforms[index]

    def accept(self, token: int, logprob: float | None, best: dict | None = None) -> None:
        self.ids.append(token)
        if logprob is not None and self.sampling.logprobs:
            self.logprobs.append(logprob)
            self.best += [best] if self.sampling.top_logprobs else []
        if token in self.eos or (self.grammar and self.grammar.push(token)):
            self.finish = "stop"
        if self.detokenizer and token not in self.eos:
            self._extend(self.detokenizer.push(token))
        if self.finish is None and len(self.ids) >= self.budget:
            self.finish = "length"
        if self.finish and self.detokenizer:
            stopped_by_text = self.finish == "stop" and token not in self.eos
            if not stopped_by_text:
                self._extend(self.detokenizer.flush())
            self.settled = len(self.text)

    def _extend(self, text: str) -> None:
        stops = self.sampling.stop or ()
        searched = max(0, len(self.text) - max(map(len, stops), default=0))
        self.text += text
        starts = [start for stop in stops if stop and (start := self.text.find(stop, searched)) >= 0]
        if starts:
            self.text, self.finish = self.text[: min(starts)], "stop"
        # Withhold an ending that may be the start of a stop string.
        self.settled = max(self.settled, len(self.text) - partial_match(self.text, stops))

    def completion(self) -> Completion:
        return Completion(self.ids, self.logprobs if self.sampling.logprobs else None, self.finish or "length",
                          self.text if self.detokenizer else None, self.best if self.sampling.top_logprobs else None)


@torch.no_grad()
def next_logits(model, cache: MODEL.KVCache, parts: list[tuple[MODEL.Sequence, list[int], int]]) -> Tensor:
    """Run one forward pass over parts (sequence, new token ids, number of last tokens to return logits for) -> (R, V)."""
    ids, at = [], []
    for _, new, count in parts:
        ids += new
        at += range(len(ids) - count, len(ids))
    step = MODEL.CacheStep(cache, [(sequence, len(new)) for sequence, new, _ in parts], can_record(model))
    tokens = torch.tensor([ids + ids[-1:] * (step.count - len(ids))], device=model.device)
    positions = torch.tensor(at or [0], device=model.device)
    if step.repeatable:
        return RecordedStep.logits(model, step, tokens)[positions]
    return model(tokens, cache=step, at=positions).logits.float()


PAGE = 64  # tokens; smaller pages waste less memory but take longer to gather
STEP_TOKENS = 2048  # maximum tokens per forward pass on a CPU; four times as many on a GPU
STEP_SCORES = 2**22  # maximum queries x keys of a prompt chunk, so memory besides the cache does not grow with the prompt


class Engine:
    """Continuous batching (Yu 2022): requests join and leave the batch between forward passes. Each pass decodes one token of
    every running completion and prefills chunks of waiting prompts: `schedule -> run -> accept`.

    Decoding has priority, then the oldest prompts. When no page is free, the most recent row is preempted: it releases its
    pages and later prefills its prompt and the tokens generated so far. Rows with the same prompt list prefill it once.

    Speculative decoding (Leviathan 2023): `drafter` guesses the next tokens of each completion, and one pass computes the logits
    after all of them. A draft token is accepted if sampling from these logits chooses the same token, so the completions are the
    same as without a drafter.
    """

    def __init__(self, model, rows: int, pages: int, page: int, tokens: int = 0, reuse: bool = False, drafter=None):
        usual = STEP_TOKENS if model.device.type == "cpu" else 4 * STEP_TOKENS
        self.model, self.rows, self.tokens, self.reuse = model, rows, max(tokens or usual, rows), reuse
        self.cache, self.drafter, self.sampler = model.new_cache(pages, page), drafter, None
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in order of admission
        self.computed = 0  # number of tokens that the model computed

    def add(self, rows: list[Row]) -> None:
        room = self.cache.pages * self.cache.page
        for row in rows:
            if len(row.prompt) >= room:
                raise UserError(f"a prompt of {len(row.prompt)} tokens leaves no room for a completion in a KV cache of {room} "
                                "tokens")
            row.budget = min(row.budget, room - len(row.prompt))
        self.waiting.extend(rows)

    def step(self) -> list[Row]:
        """One forward pass. Returns the rows that got a token; finished rows (`row.finish`) have been removed."""
        parts = self.schedule()
        ready, logits = self.run(parts)
        self.accept(ready, logits)
        return ready

    def schedule(self) -> dict[Row, int]:
        """Number of tokens of each row that the next forward pass computes."""
        parts: dict[Row, int] = {}
        left = self.tokens
        decoding = [row for row in self.running if row.missing == 1]
        if self.drafter and decoding:
            limit = max(0, min(self.drafter.count, left // len(decoding) - 1))
            self.drafter({row: min(limit, row.budget - len(row.ids) - 1) for row in decoding})
        for row in [*decoding, *(row for row in self.running if row.missing > 1 and row not in decoding)]:
            count = self._chunk(row, left)
            row.draft = row.draft[: max(count - 1, 0)]  # a draft is not split between passes
            while row.running and count and not self.cache.extend(row.sequence, row.sequence.length + count):
                if row.draft:
                    row.draft, count = [], 1
                    continue
                left += parts.pop(self.running[-1], 0)
                self.preempt(self.running[-1])
            if row.running and count:
                parts[row] = count
                left -= count
        if self.waiting:
            first = {(id(row.prompt), row.adapter): row for row in reversed(self.running)}
            for row in list(self.waiting):
                if not left or len(self.running) == self.rows:
                    break
                if (source := first.get((id(row.prompt), row.adapter))) and source.sequence.length < len(row.prompt) - 1:
                    continue  # its prompt is being computed
                if not self._admit(row, source):
                    break
                first.setdefault((id(row.prompt), row.adapter), row)
                parts[row] = self._chunk(row, left)
                left -= parts[row]
        return parts

    def _chunk(self, row: Row, left: int) -> int:
        start = row.sequence.length
        return min(row.missing, left, max(1, STEP_SCORES // (start + row.missing)) if start else left)

    def _admit(self, row: Row, source: Row | None) -> bool:
        """Allocate pages for a waiting row, sharing the prompt of `source` or a cached prefix; False if too few are free."""
        if source is not None:
            sequence = self.cache.fork(source.sequence, len(row.prompt) - 1)
        else:
            sequence = self.cache.find(row.prompt + row.ids, row.salt) if self.reuse else MODEL.Sequence()
        if sequence is None or not self.cache.extend(sequence, row.length, len(row.prompt) + row.budget):
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
            row.running, row.draft = False, []
            if self.drafter:
                self.drafter.forget(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def run(self, parts: dict[Row, int]) -> tuple[list[Row], Tensor]:
        """One forward pass. Returns the rows whose tokens are all computed and the logits (R, V) after the last token of each and
        after each token of its draft."""
        rows = sorted(parts, key=lambda row: (parts[row], row.sequence.pages[0]))  # adjacent pages share an attention call
        ready = [row for row in rows if parts[row] == row.missing]
        counts = {row: 1 + len(row.draft) for row in ready}
        self.computed += sum(parts.values())
        with MODEL.adapters_for(self.model, [(row.adapter, parts[row]) for row in rows]):
            return ready, next_logits(self.model, self.cache, [
                (row.sequence, row.text_ids(row.sequence.length, row.sequence.length + parts[row]), counts.get(row, 0))
                for row in rows])

    def accept(self, rows: list[Row], logits: Tensor) -> None:
        if rows:
            self._choose(rows, logits)
        if self.reuse:
            for row in self.running:
                if row.sequence.length // self.cache.page > len(row.sequence.digests):
                    self.cache.remember(row.sequence, row.prompt + row.ids, row.salt)
        finished = [row for row in rows if row.finish]
        for row in finished:
            self.remove(row)
        if finished:
            self.cache.compact([row.sequence for row in self.running])

    def _choose(self, rows: list[Row], logits: Tensor) -> None:
        """Sample the next token of each row, then further tokens as long as they match its draft."""
        drafts = [row for row in rows if row.draft]
        starts = dict(zip(rows, itertools.accumulate((1 + len(row.draft) for row in rows), initial=0), strict=False))
        self.sampler = choose_tokens(logits[list(starts.values())] if drafts else logits, rows, self.sampler)
        for number in itertools.count():
            drafts = [row for row in drafts if not row.finish and row.draft[number : number + 1] == row.ids[-1:]]
            if not drafts:
                break
            self.drafter.accepted += len(drafts)
            choose_tokens(logits[[starts[row] + number + 1 for row in drafts]], drafts)
        for row in rows:
            if row.draft:
                self.drafter.drafted += len(row.draft)
            row.sequence.length, row.draft = min(row.sequence.length, row.length - 1), []  # drops rejected draft tokens

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


class PromptLookup:
    """Drafts without a model (Saxena 2023): the tokens that followed the last occurrence of the current `size` tokens."""

    drafted = accepted = 0  # number of tokens

    def __init__(self, count: int, size: int = 3):
        self.count, self.size = count, size
        self.ends: dict[Row, dict[tuple, int]] = {}  # for each row: n-gram -> its end position

    def __call__(self, counts: dict[Row, int]) -> None:
        """Set `row.draft` to at most counts[row] tokens."""
        for row, count in counts.items():
            text, ends = row.prompt + row.ids, self.ends.setdefault(row, {(): self.size})
            for end in range(ends[()], len(text)):
                ends[tuple(text[end - self.size : end])] = end
            ends[()] = max(len(text), self.size)  # where the next call continues
            start = ends.get(tuple(text[-self.size :]), len(text))
            row.draft = text[start : start + count]

    def forget(self, row: Row) -> None:
        self.ends.pop(row, None)


class DraftModel:
    """Drafts from a smaller model with the same vocabulary. It samples with the same random numbers as the large model: the
    closer the two distributions, the more often both choose the same token."""

    drafted = accepted = 0  # number of tokens

    def __init__(self, model, count: int, pages: int, page: int):
        self.model, self.count, self.cache = model, count, model.new_cache(pages, page)
        self.sequences: dict[Row, MODEL.Sequence] = {}

    def __call__(self, counts: dict[Row, int]) -> None:
        """Set `row.draft` to at most counts[row] tokens, fewer if pages run out."""
        for row in counts:
            sequence = self.sequences.setdefault(row, MODEL.Sequence())
            sequence.length = min(sequence.length, row.length - 1)  # drops rejected draft tokens
        for number in range(max(counts.values())):
            rows = [row for row, count in counts.items() if len(row.draft) == number < count
                    and self.cache.extend(self.sequences[row], row.length + number)]
            if not rows:
                break
            sequences = [self.sequences[row] for row in rows]
            logits = next_logits(self.model, self.cache, [
                (sequence, row.text_ids(sequence.length, row.length + number), 1)
                for row, sequence in zip(rows, sequences, strict=True)])
            tokens, *_ = Sampler(rows, logits.shape[1], logits.device)(logits, number)
            for row, token in zip(rows, tokens, strict=True):
                row.draft.append(token)

    def forget(self, row: Row) -> None:
        if row in self.sequences:
            self.cache.close(self.sequences.pop(row))


def _make_rows(model, prompts, samplings, tokenizer, step: int, first: int | list[int] = 0,
               adapter: str | None = None) -> list[list[Row]]:
    config = model.config
    groups = []
    numbers = first if isinstance(first, list) else range(first, first + len(prompts))
    for p, prompt, sampling in zip(numbers, prompts, samplings, strict=True):
        if isinstance(prompt, str):
            raise UserError("generate expects prompts as lists of token ids; for text, use INFER.load(folder).generate(text)")
        if not prompt:
            raise UserError("empty prompt: at least one token is required; for an empty text, use the beginning-of-text token")
        if len(prompt) >= config.max_position_embeddings:
            raise UserError(f"a prompt of {len(prompt)} tokens leaves no room for a completion in a context of "
                            f"{config.max_position_embeddings} tokens")
        if outside := [i for i in sampling.logit_bias or () if not 0 <= i < config.vocab_size]:
            raise UserError(f"inference.logit_bias: token id {outside[0]} is outside the vocabulary of {config.vocab_size:,}")
        if (sampling.stop or sampling.structured_outputs) and tokenizer is None:
            raise ValueError("stop strings and structured outputs need the tokenizer")
        # numpy accepts no negative seeds.
        seed = (sampling.seed if sampling.seed is not None else int(np.random.SeedSequence().entropy)) % 2**64
        groups.append([Row(prompt, sampling, (seed, step, p, s), tokenizer, config.eos_ids, config.max_position_embeddings)
                       for s in range(sampling.n)])
        for row in groups[-1]:
            row.adapter = adapter
            if sampling.structured_outputs:
                row.grammar = Grammar(sampling.structured_outputs, tokenizer, config.vocab_size, tuple(config.eos_ids))
    return groups


def generate(model, prompts: list[list[int]], sampling: Sampling | list[Sampling], tokenizer=None, use_cache: bool = True,
             batch_size: int = 64, step: int = 0, first: int | list[int] = 0, drafter=None) -> list[list[Completion]]:
    """Complete prompts of any lengths in batches: [prompt][sample] -> Completion.

    Each completion draws from its own generator, keyed by (seed, step, prompt, sample), so it is the same alone and in any batch.
    `step` distinguishes calls with one seed (rollouts). `first` is the number of the first prompt, or a list of all numbers. The
    tokenizer is needed only for stop strings and `.text`. If weights are sharded, all processes must call this function, each
    with its own prompts (or none).
    """
    samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    groups = _make_rows(model, prompts, samplings, tokenizer, step, first)
    rows = [row for group in groups for row in group if row.sampling.num_beams == 1]
    was_training = model.training
    model.eval()
    with MODEL.unsharded(model):
        for group in groups:
            if group[0].sampling.num_beams > 1:
                beam_search(model, group)
        for _ in _steps(model, rows, use_cache, batch_size, drafter):
            pass
    model.train(was_training)
    return [[row.completion() for row in group] for group in groups]


def _steps(model, rows: list[Row], use_cache: bool, batch_size: int, drafter=None) -> Iterator[None]:
    """Extend all rows until they are finished; yields after every forward pass."""
    if isinstance(model, MODEL.ForeignModel) or not use_cache:
        engine = StaticEngine(model, batch_size, use_cache)
    else:
        size = min(batch_size, len(rows)) or 1
        page = max((len(row.prompt) + row.budget for row in rows), default=1)  # large enough for any row
        engine = Engine(model, size, size, page, drafter=drafter)
    engine.add(rows)
    try:
        while engine.busy:
            engine.step()
            yield
    finally:  # if the caller stops early, this also ends the thread of a `StaticEngine`
        for row in rows:
            engine.remove(row)


def stream(model, tokenizer, prompt_ids: list[int], sampling: Sampling, use_cache: bool = True, drafter=None) -> Iterator[str]:
    """Yield the text of one completion as it is generated, without incomplete characters and stop strings."""
    [[row]] = _make_rows(model, [prompt_ids], [replace(sampling, n=1)], tokenizer, 0)
    sent = 0
    for _ in _steps(model, [row], use_cache, 1, drafter):
        if row.settled > sent:
            yield row.text[sent : row.settled]
            sent = row.settled


def beam_search(model, rows: list[Row]) -> None:
    """Complete `rows`, the n completions of one prompt, by beam search: in each step keep the `num_beams` most probable
    continuations of all beams. A completion's score is its mean log-probability."""
    prompt, width, eos, budget = rows[0].prompt, rows[0].sampling.num_beams, rows[0].eos, rows[0].budget
    cache = model.new_cache(2 * width * (1 + (len(prompt) + budget) // PAGE), PAGE)
    root = MODEL.Sequence()
    cache.extend(root, len(prompt))
    beams, new, finished = [(0.0, [], root)], [prompt], []  # (log-probability, token ids, sequence in the cache)
    for length in range(1, budget + 1):
        logits = next_logits(model, cache, [(sequence, ids, 1) for (_, _, sequence), ids in zip(beams, new, strict=True)])
        sums = torch.tensor([beam[0] for beam in beams], device=logits.device)[:, None] + logits.double().log_softmax(-1)
        values, indices = sums.flatten().topk(min((1 + len(eos)) * width, sums.numel()))
        grown = []
        for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            beam, token = divmod(index, sums.shape[1])
            ids = [*beams[beam][1], token]
            if token in eos or length == budget:
                finished += [(value / length, ids)] if rank < width else []
            elif len(grown) < width:
                grown.append((value, ids, cache.fork(beams[beam][2], beams[beam][2].length)))
        for _, _, sequence in beams:
            cache.close(sequence)
        finished = sorted(finished, key=lambda scored: -scored[0])[:width]
        if not grown or len(finished) == width and finished[-1][0] >= grown[0][0] / length:
            break
        for _, _, sequence in grown:
            cache.extend(sequence, sequence.length + 1)
        beams, new = grown, [ids[-1:] for _, ids, _ in grown]
    for row, (_, ids) in zip(rows, finished, strict=False):
        for token in ids:
            if not row.finish:
                row.accept(token, None)


# ----------------------------------------------------------------------------------------------------- scoring


class Scored(NamedTuple):
    """One text: its token ids, the log-probabilities of ids[1:], and the `top` most probable tokens at these positions."""

    ids: list[int]
    logprobs: list[float]
    best: list[dict[int, float]] | None


@torch.no_grad()
def score_ids(model, ids: list[int], top: int = 0) -> Scored:
    """Log-probability of each token given the tokens before it. Texts longer than the context are scored in windows that overlap
    by half, so every token after the first window has at least half a context before it."""
    context = model.config.max_position_embeddings
    logprobs: list[float] = []
    best: list[dict[int, float]] = []
    start = 0
    while len(logprobs) < len(ids) - 1:
        window = torch.tensor([ids[start : start + context + 1]], device=model.device)
        new = window.shape[1] - 1 - (len(logprobs) - start)

        def most_probable(logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
            values, indices = logits.float().log_softmax(-1).topk(top)
            return {f"{k}{name}": part[:, k].double() for k in range(top) for name, part in (("v", values), ("i", indices))}

        out = model(window[:, :-1], targets=window[:, 1:], reduce=most_probable if top else None)
        logprobs += out.logprobs[0, -new:].tolist()
        if top:
            columns = {name: column[0, -new:].tolist() for name, column in out.reduced.items()}
            best += [{int(columns[f"{k}i"][t]): columns[f"{k}v"][t] for k in range(top)} for t in range(new)]
        start = max(len(logprobs) - context // 2, 0)
    return Scored(ids, logprobs, best if top else None)


def score_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a text to score, encoded as in training: after a beginning-of-text token, so its first token is scored too."""
    return TOKENIZER.encode_text(tokenizer, text)[:-1]


def score(model, tokenizer, texts: Iterable[str], top: int = 0, each: Callable | None = None) -> dict:
    """Score texts independently. Returns totals: tokens, bytes, nats, loss (nats per token), perplexity and bits per byte.

    `each(text, scored, measures)` is called for every text. `top`: number of most probable tokens to return per position."""
    sums = [0, 0, 0.0]
    for text in texts:
        scored = score_ids(model, score_prompt(tokenizer, text), top)
        counts = len(scored.logprobs), len(text.encode("utf-8")), -math.fsum(scored.logprobs)
        if not math.isfinite(counts[2]):
            raise UserError("the model's logits are not finite; its weights or its config.json are damaged")
        sums = [total + part for total, part in zip(sums, counts, strict=True)]
        if each is not None:
            each(text, scored, measures(*counts))
    return measures(*sums)


def measures(tokens: int, size: int, nats: float) -> dict:
    loss = nats / max(tokens, 1)
    return {"tokens": tokens, "bytes": size, "nats": nats, "loss": loss, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": nats / math.log(2) / max(size, 1)}


# ======================================================================================================== edges

# ---------------------------------------------------------------------------------------------------- hardware


PACK_WIDTH = 256  # in narrower models, the overhead of calling these kernels exceeds their gain


class PackedLinear(nn.Module):
    """A frozen Linear on a CPU, with its weight packed once into the layout of the fastest kernel.

    Small batches are limited by memory bandwidth, so half the bytes give almost twice the speed. FBGEMM stores weights in float16
    and multiplies in float32, which is lossless for weights that were stored in 16 bits. oneDNN is used for bfloat16 on
    processors that multiply it, and for float32 weights that float16 cannot represent.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, half: bool):
        super().__init__()
        self.in_features, self.out_features, self.bias, self.half = weight.shape[1], weight.shape[0], bias, half
        self.bytes = 2 if half else weight.element_size()  # per weight
        if half:
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        else:
            rows = 1 if weight.dtype == torch.bfloat16 else 16  # the layout is best for batches of about this size
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.half:
            return torch.ops.quantized.linear_dynamic_fp16(hidden.float(), self.packed).to(hidden.dtype)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.packed, self.bias, "none", [], "")


class PackedNorm(nn.Module):
    """RMSNorm on a CPU. A single token is divided by one Python number, which takes two kernels instead of eight."""

    def __init__(self, norm: MODEL.RMSNorm):
        super().__init__()
        self.norm, self.weight, self.zeros = norm, norm.weight.detach(), torch.zeros_like(norm.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[-1]
        if hidden.numel() > width or hidden.dtype != self.weight.dtype:
            return self.norm(hidden)
        length = torch.linalg.vector_norm(hidden, dtype=torch.float32).item()
        return torch.addcmul(self.zeros, hidden, self.weight, value=(length**2 / width + self.norm.eps) ** -0.5)


def fits_float16(weight: Tensor) -> bool:
    """Whether FBGEMM is available, this processor computes fastest in float32, and float16 represents the weight without loss."""
    if "fbgemm" not in torch.backends.quantized.supported_engines or weight.dtype == MODEL.fast_half("cpu"):
        return False
    chunks = (chunk.float() for chunk in weight.split(1024))  # most weights that do not fit fail at the first chunk
    return all(bool((chunk - chunk.half().float()).norm() <= 2.0**-20 * chunk.norm()) for chunk in chunks)


def configure_for_hardware(model: MODEL.LanguageModel, device=None, quiet: bool = False) -> MODEL.Transformer:
    """Optimize a loaded model for inference on `device`; afterwards it cannot be trained or saved.

    The query, key and value projections are fused, as are gate and up. On a CPU weights are packed, and the other layers of a
    bfloat16 model compute in float32 if that is faster. On CUDA float32 products may use TF32. Logs the choices in one line.
    """
    device = torch.device(device or model.device)
    if model.adapter and model.quantization == "none" and MODEL.merges_exactly(model):
        MODEL.merge_adapter(model)
    model = model.to(device).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, MODEL.Attention) and hasattr(module, "q_proj"):
            _fuse(module, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        elif isinstance(module, MODEL.MLP) and hasattr(module, "gate_proj"):
            _fuse(module, "gate_up_proj", ("gate_proj", "up_proj"))
    chosen = ["fused projections"]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        chosen += ["TF32", *_pack(model)]
    if device.type == "cpu":
        chosen.append(MODEL.counted(torch.get_num_threads(), "thread"))
        if isinstance(model, MODEL.Transformer):
            chosen += _pack(model) if model.config.hidden_size >= PACK_WIDTH else _restore(model)
        emulated = model.dtype not in (torch.float32, MODEL.fast_half("cpu"))
        if emulated and model.quantization == "none" and isinstance(model, MODEL.Transformer) and not model.config.num_experts:
            model.float()
    kind = [f"{model.quantization} weights"] if model.quantization != "none" else []
    if not quiet:
        say(f"running on {device.type} ({', '.join([str(model.dtype).removeprefix('torch.'), *kind, *chosen])})")
    return model


def _fuse(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    """Fuse linear layers with the same input into one. The module's forward uses the fused layer if it exists."""
    linears = [getattr(module, part) for part in parts]
    if len({(type(linear), getattr(linear, "form", None)) for linear in linears}) > 1:
        return
    if hasattr(linears[0], "join"):  # `QUANT.QuantizedLinear`
        fused = linears[0].join(linears)
    elif type(linears[0]) is nn.Linear:
        with torch.device("meta"):
            fused = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), linears[0].bias is not None)
        fused.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
        if fused.bias is not None:
            fused.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    else:
        return
    setattr(module, name, fused)
    for part in parts:
        delattr(module, part)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, including packed weights and quantization scales. Shared weights count once."""
    tensors, packed = [*model.parameters(), *model.buffers()], 0
    for module in model.modules():
        weight = module._parameters.get("weight")  # a quantized layer's attribute would be restored
        holders = [module, getattr(module, "state", None), weight, getattr(weight, "quant_state", None)]
        holders += [getattr(holder, "state2", None) for holder in holders]  # scales of scales
        tensors += [getattr(holder, name, None) for holder in holders for name in ("absmax", "SCB", "scale")]
        packed += module.out_features * module.in_features * module.bytes if hasattr(module, "bytes") else 0
    return packed + sum({id(tensor): tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor)}.values())


def _pack(model: MODEL.Transformer) -> list[str]:
    """Pack the linear layers, on CUDA only quantized layers. Quantized weights without a fast kernel are dequantized to float16
    if FBGEMM supports it. Returns descriptions for the log."""
    on_cpu = model.device.type == "cpu"

    def packed(linear: nn.Linear) -> nn.Module:
        stored = hasattr(linear, "weight_packed")  # `QUANT.QuantizedLinear`
        if stored and (kernel := linear.packed()):
            descriptions.add("integer kernels")
            return kernel
        if stored and linear.form.dynamic or not on_cpu:
            return linear
        weight, onednn = linear.weight.detach(), torch.backends.mkldnn.is_available()
        half = fits_float16(weight.half() if stored else weight)
        if half or onednn and not stored and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            descriptions.add("float16 weights" if half else "packed weights")
            return PackedLinear(weight, linear.bias, half)
        return linear

    def packs(linear: nn.Module) -> bool:
        return type(linear) is nn.Linear or hasattr(linear, "weight_packed")

    descriptions: set[str] = set()
    for name, module in list(model.named_modules()):
        # The head may share its weight with the embedding; absorbed attention multiplies by kv_b_proj's weight directly.
        if packs(module) and not (name.startswith("lm_head") or name.endswith("kv_b_proj") or "lora_" in name):
            model.set_submodule(name, packed(module))
        if on_cpu and type(module) is MODEL.RMSNorm:
            model.set_submodule(name, PackedNorm(module))
    if "lm" in model.heads and packs(model.lm_head):
        model.lm_head = packed(model.lm_head)
    return sorted(descriptions)


def _restore(model: MODEL.Transformer) -> list[str]:
    """Dequantize the weights of a model that is too narrow to gain from integer kernels. Returns descriptions for the log."""
    stored = [(name, module) for name, module in model.named_modules() if hasattr(module, "weight_packed")]
    for name, module in stored:
        if not module.form.dynamic:
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(module.weight.to(model.dtype), requires_grad=False), module.bias
            model.set_submodule(name, plain)
    return ["dequantized weights"] if stored else []


def can_record(model) -> bool:
    """Whether each forward pass launches the same kernels and does not synchronize with the GPU."""
    return model.device.type == "cuda" and model.quantization not in ("nf4", "llm_int8") and not model.adapter_tokens and \
        not model.config.num_experts and not torch.is_autocast_enabled("cuda")


class RecordedStep:
    """A step with few tokens per sequence, recorded as a CUDA graph because launching the kernels of all layers takes longer than
    running them. Later steps of the same size copy their numbers into its tensors and replay it."""

    graph = None

    @staticmethod
    def logits(model, step: MODEL.CacheStep, tokens: Tensor) -> Tensor:
        """Logits (N, V) of all tokens (1, N)."""
        cache, size = step.cache, (step.count, step.longest)
        recorded = cache.recorded.get(size)
        if recorded is None:  # the first step of a size runs normally, which compiles kernels
            cache.recorded[size] = RecordedStep()
            return model(tokens, cache=step).logits[0].float()
        if recorded.graph is None:
            recorded.graph, recorded.step, recorded.tokens = torch.cuda.CUDAGraph(), step, tokens
            others = (other.graph for other in cache.recorded.values() if other is not recorded and other.graph)
            gc.disable()  # freeing an older graph during the recording would abort it
            try:
                with torch.cuda.graph(recorded.graph, next((graph.pool() for graph in others), None)):
                    recorded.result = model(tokens, cache=step).logits[0].float()
            finally:
                gc.enable()
        recorded.step.plan.copy_(step.plan)
        recorded.tokens.copy_(tokens)
        recorded.graph.replay()
        return recorded.result


# ------------------------------------------------------------------------------------------- structured outputs


class Grammar:
    """The tokens allowed next in a structured completion (llguidance); until the text `after` (</think>) all are allowed."""

    after: str | None = None

    def __init__(self, options: dict, tokenizer, vocabulary: int, eos: tuple[int, ...]):
        self.tokenizer, self.eos, self.last = tokenizer, list(eos), []
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise UserError("inference.structured_outputs: needs llguidance; pip install -r requirements-extras.txt") from None
        [(kind, value)] = options.items()
        compact = {"whitespace_flexible": False}  # otherwise a weak model may generate whitespace forever
        source = {"json": lambda: LLMatcher.grammar_from_json_schema(value, overrides=compact),
                  "json_object": lambda: LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=compact),
                  "regex": lambda: LLMatcher.grammar_from_regex(value),
                  "choice": lambda: LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, value))),
                  "grammar": lambda: LLMatcher.grammar_from_lark(value)}[kind]
        try:
            self.matcher = LLMatcher(_grammar_tokenizer(tokenizer, vocabulary, eos), source(), log_level=0)
            problem = self.matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:  # the reason of a regex error is in a later line
            lines = problem.splitlines()
            reason = " ".join(line for line in lines[1:] if line.startswith("error: "))
            raise UserError(f"inference.structured_outputs.{kind}: {lines[0]} {reason}".rstrip())

    def allowed(self, vocabulary: int) -> Tensor:
        """(V,) True for the tokens that may come next."""
        if self.after:
            return torch.ones(vocabulary, dtype=torch.bool).index_fill_(0, torch.tensor(self.eos, dtype=torch.long), False)
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[:vocabulary].astype(bool))

    def push(self, token: int) -> bool:
        """Consume a token; True if the completion must end here."""
        if self.after:
            self.last = [*self.last[-15:], token]
            self.after = None if self.after in self.tokenizer.decode(self.last) else self.after
            return False
        self.matcher.consume_token(token)
        return self.matcher.is_stopped()


@lru_cache(maxsize=4)
def _grammar_tokenizer(tokenizer, vocabulary: int, eos: tuple[int, ...]):
    """Cached, because it takes about a second for a large vocabulary."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, vocabulary, list(eos) or None)


# ------------------------------------------------------------------------------- cache capacity, static batching


def cache_pages(model, rows: int) -> int:
    """KV cache capacity in pages: `rows` full contexts, limited to 4/5 of the free GPU memory or 1/4 of the main memory."""
    token_bytes = MODEL.cache_numbers(model.config) * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] * 4 // 5
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 if hasattr(os, "sysconf") else 2**32
    context = model.config.max_position_embeddings
    return -(-max(context, min(rows * context, memory // token_bytes)) // PAGE)


class StaticEngine:
    """Static batching with the interface of `Engine`: each batch has prompts of equal length and runs until all its rows are
    finished. A `MODEL.ForeignModel` uses transformers' `generate`. Without a KV cache all tokens are recomputed in every step,
    which is the reference for `Engine`."""

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
        ids, positions = padded([row.prompt + row.ids for row in active], model.device)
        last = torch.arange(len(active), device=model.device) * ids.shape[1] + positions.argmax(1)
        with torch.no_grad():
            logits = model(ids, positions=positions, at=last).logits
        choose_tokens(logits.float(), active)
        yield


def padded(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded with zeros on the right, and their positions (B, T), -1 for padding."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return ids.to(device), torch.where(positions < lengths, positions, -1).to(device)


def _decode_by_transformers(model, rows: list[Row], use_cache: bool, each: Callable) -> None:
    """Complete rows with prompts of equal length by the model's `generate`, with our sampling. Calls each() after every token."""
    from transformers import GenerationConfig

    def force_tokens(ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) -> 0 at the token that each row takes, -inf elsewhere."""
        active = [i for i, row in enumerate(rows) if not row.finish]
        if active:
            choose_tokens(scores[active].float(), [rows[i] for i in active])
            each()
        tokens = torch.tensor([[(row.ids or [0])[-1]] for row in rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)

    def finished(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.tensor([bool(row.finish) for row in rows], device=ids.device)

    prompts = torch.tensor([row.prompt for row in rows], device=model.device)  # (B, T)
    longest = max(row.budget for row in rows)
    original, model.inner.generation_config = model.inner.generation_config, GenerationConfig()  # no penalties
    try:
        model.inner.generate(prompts, GenerationConfig(max_new_tokens=longest, do_sample=False, use_cache=use_cache),
                             [force_tokens], [finished], attention_mask=torch.ones_like(prompts))
    finally:
        model.inner.generation_config = original


def _in_steps(run: Callable[[Callable], None]) -> Iterator[None]:
    """Run run(each) in a thread and yield whenever it calls each(), which it does after every step."""
    steps = in_thread(run)
    while (error := steps.get()[1]) is None:
        yield
    if not isinstance(error, StopIteration):
        raise error


def in_thread(work: Callable[[Callable], None], size: int = 0) -> queue.Queue:
    """Run work(put) in a thread. Returns a queue of (item, None), and (None, the exception or StopIteration) at the end."""
    arrived: queue.Queue = queue.Queue(size)

    def run() -> None:
        error: BaseException = StopIteration()
        try:
            work(lambda item=None: arrived.put((item, None)))
        except BaseException as raised:  # it is raised again where the queue is read
            error = raised
        arrived.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    return arrived


# ------------------------------------------------------------------------------------------------ command line


class Session:
    """A loaded model with its tokenizer and settings: encodes prompts, and generates and prints completions."""

    def __init__(self, config):
        self.settings, section = config.inference, config.model
        if not section.name:
            raise UserError("model.preset: an untrained model cannot generate text; set --model to a trained model")
        self.model, self.tokenizer = TOKENIZER.open_model(section, TOKENIZER.of_run(config), config.actions.adapter)
        folders = adapter_folders(config.inference.lora_modules, self.model) if config.inference.lora_modules else {}
        if folders:
            MODEL.load_adapters(self.model, folders)
        configure_for_hardware(self.model)
        template = bool(self.tokenizer.chat_template)
        if config.inference.chat == "on" and not template:
            raise UserError("inference.chat: on, but this tokenizer has no chat template; use auto or off")
        self.chat = template and config.inference.chat != "off"
        self.of_adapter: dict[str, Session] = {}  # adapter -> session with its chat template
        for name, folder in folders.items():
            if Path(folder, "tokenizer_config.json").exists() and (tokenizer := TOKENIZER.load(folder)).chat_template:
                self.of_adapter[name] = copy.copy(self)
                self.of_adapter[name].tokenizer = tokenizer

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{key: getattr(self.settings, key) for key in SAMPLING_KEYS})

    def chat_ids(self, messages: list[dict], tools: list | None = None, options: dict | None = None) -> list[int]:
        """Token ids of a conversation as a prompt. It starts with `inference.system` unless it has a system message."""
        if self.settings.system and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.settings.system}, *messages]
        return TOKENIZER.render_chat(self.tokenizer, messages, tools, add_generation_prompt=True,
                                     literal=not self.settings.control_tokens, options=options).ids

    def prompt_ids(self, prompt: str | list[dict] | dict, sampling: Sampling) -> list[int]:
        """A text, chat messages, or {"messages", "tools"} -> token ids, truncated at the start if they exceed the context."""
        messages, tools = [], None
        if self.chat or not isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if isinstance(prompt, dict):
                messages, tools = prompt["messages"], prompt.get("tools")
            ids = self.chat_ids(messages, tools)
        else:
            ids = TOKENIZER.encode_prompt(self.tokenizer, prompt)
        context = self.model.config.max_position_embeddings
        if len(ids) < context:
            return ids
        room = context - min(sampling.max_new_tokens, context // 2)
        note, reserved = "prompt truncated: dropped the first", f"context {context}, {context - room} for the completion"
        system = [message for message in messages[:1] if message["role"] == "system"]
        for start in range(len(system) + 1, len(messages)):
            with contextlib.suppress(UserError):  # a template may reject a conversation that starts with this message
                shorter = self.chat_ids([*system, *messages[start:]], tools)
                if len(shorter) <= room:
                    say(f"{note} {start - len(system)} of {len(messages) - len(system)} messages ({len(ids)} tokens, {reserved})")
                    return shorter
        say(f"{note} {len(ids) - room} of {len(ids)} tokens ({reserved})")
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(ids) - room + len(begin) :]

    def stream(self, prompt, sampling: Sampling, stoppable: bool = False) -> str:
        """Print a completion as it is generated and return it; if `stoppable`, Ctrl-C stops only this completion."""
        parts = []
        try:
            for part in stream(self.model, self.tokenizer, self.prompt_ids(prompt, sampling), sampling, self.settings.use_cache,
                               self.drafter):
                sys.stdout.write(part)
                sys.stdout.flush()
                parts.append(part)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        return "".join(parts)

    def generate(self, prompt: str | list[dict], **parameters) -> str | list[str]:
        """The completion of a text or of chat messages, a list if n > 1. `parameters`: sampling parameters of this request."""
        sampling = request_sampling(parameters, self.sampling, "")
        if unknown := [key for key in parameters if OPENAI_KEYS.get(key, key) not in SAMPLING_KEYS]:
            raise UserError(f"{unknown[0]}: unknown setting{MODEL.suggestion(unknown[0], SAMPLING_KEYS)}")
        found = self.complete(prompt, sampling)
        return found[0].text if sampling.n == 1 else [completion.text for completion in found]

    @cached_property
    def drafter(self) -> PromptLookup | DraftModel | None:
        s = self.settings
        if s.prompt_lookup:
            return PromptLookup(s.num_speculative_tokens)
        if not s.draft_model:
            return None
        MODEL.model_folder(s.draft_model, "inference.draft_model")
        model = MODEL.load(s.draft_model, str(self.model.dtype).removeprefix("torch."), self.model.device)
        same = TOKENIZER.load(s.draft_model).get_vocab() == self.tokenizer.get_vocab()
        if isinstance(model, MODEL.ForeignModel) or not (same and model.config.causal and "lm" in model.heads):
            raise UserError(f"inference.draft_model: {s.draft_model} cannot draft for this model; expected a causal language "
                            "model of a supported family with the same vocabulary")
        model = configure_for_hardware(model, quiet=True)
        return DraftModel(model, s.num_speculative_tokens, cache_pages(model, s.batch_size), PAGE)

    def report(self) -> None:
        """Log how many draft tokens were accepted."""
        if self.drafter and self.drafter.drafted:
            drafted, accepted = self.drafter.drafted, self.drafter.accepted
            say(f"speculative decoding: {accepted:,} of {drafted:,} draft tokens accepted ({accepted / drafted:.0%})")

    def engine(self, reuse: bool = False, tokens: int = 0) -> Engine | StaticEngine:
        """An engine for requests of any length."""
        model, rows = self.model, self.settings.batch_size
        if isinstance(model, MODEL.ForeignModel) or not self.settings.use_cache:
            return StaticEngine(model, rows, self.settings.use_cache)
        return Engine(model, rows, cache_pages(model, rows), PAGE, tokens, reuse, self.drafter)

    def complete(self, prompt, sampling: Sampling) -> list[Completion]:
        [found] = generate(self.model, [self.prompt_ids(prompt, sampling)], sampling, self.tokenizer, self.settings.use_cache,
                           self.settings.batch_size, drafter=self.drafter)
        return found


def adapter_folders(modules: list[str], model) -> dict[str, str]:
    """["sql=out/sql"] -> {"sql": "out/sql"}"""
    pairs = [module.partition("=")[::2] for module in modules]
    for module, (name, folder) in zip(modules, pairs, strict=True):
        if not (name and folder) or dict(pairs)[name] != folder:
            raise UserError(f"inference.lora_modules: '{module}' is not NAME=FOLDER with a unique name")
        MODEL.resolve_folder(folder, "inference.lora_modules")
    if isinstance(model, MODEL.ForeignModel) or model.adapter:
        raise UserError("inference.lora_modules: " + (
            "the model already has an adapter; set --model to its base and list the adapter here" if model.adapter else
            f"not supported for {model.config.model_type}, which runs in transformers"))
    return dict(pairs)


def load(model: str, **settings) -> Session:
    """Load a model for text generation: load("out", temperature=0).generate("One rainy Monday"). `settings` are command-line
    flags, such as adapter="out/lora", or **{"model.dtype": "bfloat16"}."""
    flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
             for key, value in {"model": model, **settings}.items()]
    return Session(load_config(["--config", os.devnull, *flags], SECTIONS, "inference", ACTIONS, __doc__, SHORTS))


def read_stdin() -> Iterator[str]:
    """The lines of stdin, decoded as UTF-8. An error contains the line number."""
    if sys.stdin is None:
        raise UserError("no prompt: stdin is closed; use --prompt")
    if sys.stdin.isatty():
        with contextlib.suppress(EOFError):
            while True:
                yield typed()
        return
    for number, line in enumerate(TOKENIZER.open_bytes(TOKENIZER.STDIN), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"stdin:{number}: not UTF-8; convert it with `iconv -f LATIN1 -t UTF-8`") from None
        yield text.replace("\r\n", "\n")


def read_ahead(items: Iterable, size: int) -> queue.Queue:
    """A queue of items as in `in_thread`, at most `size` of them read in advance."""
    def read(put: Callable) -> None:
        for item in items:
            put(item)

    return in_thread(read, size)


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items that arrive within 20 ms of each other, so a program can wait for the result of each line.
    Items before an error are yielded first."""
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


def completions_of(session: Session, requests: Iterable[tuple[object, Sampling, int]]) -> Iterator[list[Completion]]:
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
                    if sampling.num_beams > 1:
                        beam_search(session.model, rows)
                    else:
                        engine.add(rows)
                    pending.append(rows)
        if engine.busy:
            engine.step()
        while pending and all(row.finish for row in pending[0]):
            yield [row.completion() for row in pending.popleft()]
    if not isinstance(error, StopIteration):
        raise error


def run_lines(session: Session) -> None:
    """One prompt per line -> one completion per line, in order. Line ends inside a completion are written \\n and \\r."""
    lines = ((line.rstrip("\r\n"), session.sampling, number) for number, line in enumerate(read_stdin()))
    for completions in completions_of(session, lines):
        for completion in completions:
            print(completion.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r"), flush=True)


def run_jsonl(session: Session) -> None:
    """{"prompt": ...} or {"messages": [...], "tools": [...]} per line -> the record with its completion."""
    given: deque[dict] = deque()

    def requests() -> Iterator[tuple]:
        count = itertools.count()
        for number, line in enumerate(read_stdin(), 1):
            if line.strip():
                record, prompt, sampling = _record(line, f"stdin:{number}", session.sampling)
                if not isinstance(prompt, str) and not session.tokenizer.chat_template:
                    raise UserError(f"stdin:{number}: messages need a chat template, which this tokenizer lacks; use 'prompt'")
                given.append(record)
                # A request with its own seed gets the completion that it would get alone.
                index = next(count)
                yield prompt, sampling, 0 if record.get("seed") is not None else index

    for completions in completions_of(session, requests()):
        request = given.popleft()
        for index, c in enumerate(completions):
            extra = {"index": index} if len(completions) > 1 else {}
            if c.logprobs is not None:
                extra |= {"tokens": [session.tokenizer.decode([i]) for i in c.ids], "logprobs": c.logprobs}
            if c.best is not None:
                extra["top_logprobs"] = [{session.tokenizer.decode([i]): value for i, value in best.items()} for best in c.best]
            record = {**request, "completion": c.text, "finish_reason": c.finish_reason, **extra}
            print(json.dumps(record, ensure_ascii=False), flush=True)


def messages_of(value, where: str) -> list[dict]:
    """The messages of a request. A conversation that training would skip is an error here."""
    try:
        return TOKENIZER.messages_of(value, where)
    except TOKENIZER.Unusable as error:
        raise UserError(f"{where}: a conversation {error}") from None


def _record(line: str, where: str, base: Sampling):
    record = TOKENIZER.parse_json(line, where)
    TOKENIZER.checked(json.dumps(record, ensure_ascii=False).replace("\0", ""), f"{where}: the request")
    keys = [key for key in ("prompt", "messages") if isinstance(record, dict) and record.get(key) is not None]
    if len(keys) != 1 or not isinstance(record[keys[0]], (str, list)) or record[keys[0]] == []:
        raise UserError(f"{where}: expected an object with either 'prompt' or 'messages'")
    prompt, extras = record[keys[0]], TOKENIZER.extras_of({"tools": record.get("tools")}, where)
    if keys == ["messages"] or isinstance(prompt, list):
        prompt = messages_of(prompt, where)
    context = {key: record[key] for key in ("system", "history") if TOKENIZER.is_given(record, key)}
    if isinstance(prompt, list) or context or extras:
        request = {"messages" if isinstance(prompt, list) else "prompt": prompt, **context}
        try:
            prompt = {"messages": TOKENIZER.as_messages(TOKENIZER.prompt_of(request, where)), **extras}
        except TOKENIZER.Unusable as error:
            raise UserError(f"{where}: a conversation {error}") from None
    for key in record:
        if key in ("chat", "use_cache", "batch_size"):
            raise UserError(f"{where}: '{key}' cannot be set per request; use --{key.replace('_', '-')}")
        plain = key.lower().replace("-", "_")
        if key not in REQUEST_KEYS and (meant := difflib.get_close_matches(plain, REQUEST_KEYS, 1, 0.8)):
            raise UserError(f"{where}: unknown key '{key}'; nearest is '{meant[0]}'")
    return record, prompt, request_sampling(record, base, f"{where}: ")


OPENAI_KEYS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def request_sampling(record: dict, base: Sampling, where: str, **more) -> Sampling:
    """The sampling parameters of a request: its keys, under OpenAI's names or ours, override `base`; null means not set."""
    kinds, stop = MODEL.field_types(Sampling), record.get("stop")
    if stop is not None and not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise UserError(f"{where}stop: {stop!r} is not a string or a list of strings")
    given = {OPENAI_KEYS.get(key, key): (key, value) for key, value in record.items() if value is not None}
    changed = {name: stop if name == "stop" else MODEL.convert(value, kinds[name], f"{where}{key}")
           for name, (key, value) in given.items() if name in SAMPLING_KEYS and name not in more}
    changed |= more
    if record.get("best_of") is not None and (record["best_of"] is True or record["best_of"] != changed.get("n", base.n)):
        raise UserError(f"{where}best_of: only the value of n is supported")
    try:
        return replace(base, **changed)
    except UserError as error:
        text = str(error).replace("inference.", "")
        for name, (key, _) in given.items():  # the error contains the name that the request used
            text = re.sub(rf"\b{name}\b", key, text) if name in SAMPLING_KEYS else text
        raise UserError(f"{where}{text}") from None


def typed() -> str:
    """Read a line from the terminal, with line editing and a history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it)
    return input("> ")


def run_terminal(session: Session) -> None:
    """Read prompts from a terminal: a conversation if the model has a chat template, else independent prompts."""
    commands = ("/reset", "/system", "/exit") if session.chat else ("/exit",)
    say(("chat: /reset clears the conversation, /system TEXT sets the system message, " if session.chat else "") +
        "/exit or Ctrl-D quits, Ctrl-C stops a completion")
    messages: list[dict] = []
    while True:
        try:
            text = typed().strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            say("")
            continue
        command, _, rest = text.partition(" ")
        if command == "/exit":
            break
        if re.fullmatch("/[a-z]+", command) and command not in commands:
            say(f"{command}: unknown command; use {', '.join(commands)}")
        elif command in commands:
            messages.clear()
            session.settings.system = rest if command == "/system" else session.settings.system
            say("new conversation" + (f"; system message: {rest}" if command == "/system" else ""))
        elif text:
            messages.append({"role": "user", "content": text})
            reply = session.stream(messages if session.chat else text, session.sampling, stoppable=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": reply})


def run_score(session: Session, data: TOKENIZER.DataSection, path: str, lines: bool, logits_path: str | None) -> None:
    """Print the measures of a file as JSON, or with --logprobs one JSON line per text."""
    if path == "-":
        texts = TOKENIZER.read_documents(TOKENIZER.STDIN, "line" if lines else "file")
    else:
        [files] = TOKENIZER.expand_paths([path], "--score")
        if not lines and TOKENIZER.suffix_of(files[0]) not in TOKENIZER.RECORDS and data.text_unit != "file":
            unit, hint = ("line", "; use --lines to score each line") if data.text_unit == "line" else ("paragraph", "")
            say(f"--score: {path} is scored as one text, but in training each {unit} is a text{hint}")
        texts = (text for file in files for text in TOKENIZER.read_documents(file, "line" if lines else "file", data.text_field))
    strings = session.tokenizer.convert_ids_to_tokens

    def each(text: str, scored, measured: dict) -> None:
        nonlocal logits_path
        if session.settings.logprobs:
            record = {"text": text, **measured, "ids": scored.ids, "token_strings": strings(scored.ids),
                      "logprobs": scored.logprobs}
            if scored.best is not None:
                record["top_logprobs"] = [{strings(i) or f"<{i}>": value for i, value in best.items()} for best in scored.best]
            print(json.dumps(record, ensure_ascii=False), flush=True)
        if logits_path:
            _write_logits(session, scored.ids, logits_path)
            logits_path = None

    total = score(session.model, session.tokenizer, texts, session.settings.top_logprobs, each)
    if not total["bytes"] and not total["tokens"]:
        raise UserError(f"--score: {path} contains no text")
    if not session.settings.logprobs:
        print(json.dumps(total))


@torch.no_grad()
def _write_logits(session: Session, ids: list[int], path: str) -> None:
    """Write `ids` (T,) and `logits` (T, V) of a text; row t predicts the token after ids[t]."""
    from safetensors.torch import save_file

    if len(ids) > session.model.config.max_position_embeddings:
        raise UserError(f"--logits: {len(ids)} tokens exceed the context of {session.model.config.max_position_embeddings}")
    tensor = torch.tensor([ids], device=session.model.device)
    logits = session.model(tensor).logits[0].contiguous().cpu()
    with MODEL.staged(Path(path).absolute().parent) as scratch:
        save_file({"ids": tensor[0].cpu(), "logits": logits}, scratch / Path(path).name)


@torch.no_grad()
def fill(model, tokenizer, text: str, where: str = "prompt") -> str:
    """Replace each mask token of a text by the most probable token of an encoder."""
    text = text.replace(f" {tokenizer.mask_token}", tokenizer.mask_token)  # the predicted token includes its space
    ids = torch.tensor([tokenizer(text).input_ids], device=model.device)  # (1, T)
    hidden = ids == tokenizer.mask_token_id
    if not hidden.any():
        raise UserError(f"{where}: this model is an encoder and fills in {tokenizer.mask_token}, which the text does not contain")
    if ids.shape[1] > model.config.max_position_embeddings:
        raise UserError(f"{where}: {ids.shape[1]} tokens exceed this encoder's context of "
                        f"{model.config.max_position_embeddings}; shorten the text")
    logits = model(ids).logits
    logits[..., tokenizer.all_special_ids] = -math.inf
    filled = torch.where(hidden, logits.argmax(-1), ids)[0].tolist()
    return tokenizer.decode(filled, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def refuse_sampling(session: Session, why: str) -> None:
    """Reject sampling parameters that would be ignored, except those that a shared config.yaml may set."""
    default = Sampling()
    for key in SAMPLING_KEYS:
        shared = key in ("temperature", "max_new_tokens", "seed", "ignore_eos")
        if not shared and getattr(session.settings, key) != getattr(default, key):
            raise UserError(f"inference.{key}: {why}; leave it out")


def run_fill(session: Session, actions, prompt: str | None) -> None:
    if actions.score is not None or actions.jsonl:
        raise UserError(f"--{'jsonl' if actions.jsonl else 'score'}: not supported for encoders; use --prompt, --lines or a pipe")
    refuse_sampling(session, "this model is an encoder and fills in masks without sampling")
    lines = (line.rstrip("\r\n") for line in read_stdin()) if prompt is None else [prompt]
    for number, line in enumerate(lines, 1):
        print(fill(session.model, session.tokenizer, line, "prompt" if prompt is not None else f"stdin:{number}"), flush=True)


@torch.no_grad()
def scores_of(model, rows: list[list[int]], batch_size: int = 64) -> Tensor:
    """Outputs (N, L) of the classification head: at the last token of each row for a decoder (it attends to the whole text), at
    the first for an encoder. Rows longer than the context are truncated at the start for a decoder, at the end for an encoder."""
    if len(rows) > batch_size:
        return torch.cat([scores_of(model, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)])
    context = model.config.max_position_embeddings
    if model.config.causal:
        rows = [TOKENIZER.without_padding(ids[-context:], model.config.pad_token_id) for ids in rows]
    rows = [ids[:context] for ids in rows]
    ids, positions = padded(rows, model.device)
    scores = model(ids, positions=positions, want=("scores",)).scores.float().cpu()  # (B, T, L)
    return scores[torch.arange(len(rows)), positions.argmax(1).cpu() if model.config.causal else 0]  # (B, L)


def completion_text(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of a completion, decoded after its prompt, as some tokenizers drop the space before a first word."""
    before = tokenizer.decode(prompt[-6:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*prompt[-6:], *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return whole[len(before) :]


def ids_to_score(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids of a conversation up to the end of the last assistant message, where generation ends too."""
    ids, turns = TOKENIZER.render_chat(tokenizer, messages)
    if not turns:
        raise UserError("messages: no assistant message to score")
    return ids[: turns[-1].stop]


def classify(model, tokenizer, texts: list[str | list[dict]]) -> list[list[float]]:
    """Probabilities of the labels for each text, or for the last assistant message of each conversation, in the order of
    `model.config.labels`. For a model with one output, its score."""
    context = model.config.max_position_embeddings
    rows = [tokenizer(text).input_ids if isinstance(text, str) else ids_to_score(tokenizer, text) for text in texts]
    if longer := sum(len(ids) > context for ids in rows):
        say(f"truncated {MODEL.counted(longer, 'text')} with more than {context} tokens (the model's context)")
        rows = [tokenizer(text, truncation=True, max_length=context).input_ids if isinstance(text, str) else ids
                for text, ids in zip(texts, rows, strict=True)]
    scores = scores_of(model, rows)  # (N, L)
    return (scores.softmax(-1) if scores.shape[1] > 1 else scores).tolist()


def run_labels(session: Session, actions, prompt: str | None, piped: bool) -> None:
    """Print a label and its probability per line, or JSON per line of JSONL. The result of an empty line is empty."""
    if actions.score is not None or actions.echo:
        raise UserError(f"--{'echo' if actions.echo else 'score'}: not supported for classifiers; use --prompt, --lines, --jsonl "
                        "or a pipe")
    refuse_sampling(session, "this model is a classifier and does not sample")
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
                        raise UserError(f"stdin:{number}: messages need a chat template, which this tokenizer lacks; use 'text'")
                    yield record, messages_of(record["messages"], f"stdin:{number}")
                    continue
                line = record.get("text", record.get("prompt")) if isinstance(record, dict) else None
                if not isinstance(line, str) or not line.strip():
                    raise UserError(f"stdin:{number}: expected an object with a text, as in {{\"text\": \"...\"}}")
            yield record, line.rstrip("\r\n")

    for group in batches(texts(), session.settings.batch_size):
        nonempty = [text for _, text in group if not isinstance(text, str) or text.strip()]
        results = iter(classify(session.model, session.tokenizer, nonempty) if nonempty else ())
        for record, text in group:
            values = dict(zip(labels, next(results), strict=True)) if not isinstance(text, str) or text.strip() else {}
            best = max(values, key=values.get, default="")
            if actions.jsonl:
                result = {"reward": values[best]} if len(values) == 1 else {"label": best, "probabilities": values}
                print(json.dumps({**record, **result}, ensure_ascii=False))
            elif len(values) == 1:
                print(f"{values[best]:.4f}")
            else:
                print(f"{best}\t{values[best]:.4f}" if values else "")
        sys.stdout.flush()


def run_prompt(session: Session, prompt: str, echo: bool) -> None:
    if session.sampling.n == session.sampling.num_beams == 1:
        if echo:
            sys.stdout.write(prompt)
        session.stream(prompt, session.sampling)
        print(flush=True)
        return
    completions = session.complete(prompt, session.sampling)
    for number, completion in enumerate(completions, 1):
        if len(completions) > 1:
            print(f"\033[2m[{number}]\033[0m" if MODEL.shows_colors() else f"[{number}]")
        print((prompt if echo else "") + completion.text, flush=True)


# ------------------------------------------------------------------------------------------ evaluation by lm-eval


@torch.no_grad()
def score_continuations(model, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """A batch of (context ids, continuation ids) -> the log-probability of each continuation in nats and whether greedy decoding
    generates it. Contexts that are too long are truncated at the start."""
    context = model.config.max_position_embeddings
    if (longest := max(len(continuation) for _, continuation in pairs)) > context:
        raise UserError(f"--eval: a continuation of {longest} tokens exceeds the model's context of {context}")
    texts = [[*before, *continuation][-context - 1 :] for before, continuation in pairs]
    ids, positions = padded([text[:-1] for text in texts], model.device)  # (B, T)
    targets, _ = padded([text[1:] for text in texts], model.device)
    counts = torch.tensor([[len(continuation)] for _, continuation in pairs], device=model.device)
    before = positions < positions.amax(1, keepdim=True) + 1 - counts
    targets = targets.masked_fill(before | (positions < 0), -100)
    out = model(ids, positions=positions, targets=targets, reduce=lambda logits, rows: {"best": logits.argmax(-1)})
    greedy = ((out.reduced["best"] == targets) | (targets == -100)).all(1)
    return list(zip(out.logprobs.cpu().double().sum(1).tolist(), greedy.tolist(), strict=True))


def as_lm(session: Session):
    """Wrap the model of a session for lm-eval. Texts are encoded, truncated and cut at stop strings as in lm-eval's class for
    transformers (`HFLM`), so the results agree with `lm_eval --model hf`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    model, tokenizer, settings = session.model, session.tokenizer, session.settings
    context = model.config.max_position_embeddings
    base = Sampling(temperature=0, seed=settings.seed or 0)

    class Evaluated(TemplateLM):
        tokenizer, tokenizer_name = session.tokenizer, session.tokenizer.name_or_path
        eot_token_id, prefix_token_id = session.tokenizer.eos_token_id, TOKENIZER.begin_id(session.tokenizer)

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                                                 continue_final_message=not add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            if add_special_tokens is None:  # a chat template may have written the beginning-of-text token
                add_special_tokens = not string.startswith(tokenizer.decode(self.prefix_token_id))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[tuple[float, bool]]:
            ordered = Collator(requests, sort_fn=lambda request: -len(request[1]) - len(request[2]))
            batches = tqdm(ordered.get_batched(settings.batch_size), desc="batches scored",
                           total=-(-len(requests) // settings.batch_size))
            return ordered.get_original([score for batch in batches
                                         for score in score_continuations(model, [request[1:] for request in batch])])

        def loglikelihood_rolling(self, requests, **_) -> list[float]:
            windows = [[(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, context, 1)] for request in requests]
            scores = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
            return [math.fsum(next(scores)[0] for _ in text) for text in windows]

        def generate_until(self, requests, **_) -> list[str]:
            if unknown := {key for request in requests for key in request.args[1]} - {
                    *SAMPLING_KEYS, *OPENAI_KEYS, "until", "do_sample", "max_gen_toks"}:
                say(f"--eval: unsupported generation settings are ignored: {', '.join(sorted(unknown))}")
            prompts, samplings = [], []
            for text, given in (request.args for request in requests):
                given = normalize_gen_kwargs(given, settings.max_new_tokens)
                stop, count = handle_stop_sequences(given["until"], tokenizer.eos_token), given["max_gen_toks"]
                room = context - count if count < context else context // 2
                prompts.append((self.tok_encode(text) or [self.prefix_token_id])[-room:])
                samplings.append(request_sampling(given, base, "--eval: ", max_new_tokens=count, stop=stop))
            rows = [row for [row] in _make_rows(model, prompts, samplings, tokenizer, 0)]
            engine = session.engine(reuse=True)
            engine.add(rows)
            with tqdm(total=len(rows), desc="completions") as bar:
                while engine.busy:
                    bar.update(sum(bool(row.finish) for row in engine.step()))
            return [postprocess_generated_text(tokenizer.decode(row.ids, skip_special_tokens=True), row.sampling.stop, None)
                    for row in rows]

    return Evaluated()


def find_tasks(names: list[str]) -> tuple[list[str], object]:
    """Resolve names and patterns (mmlu_*) of tasks, YAML files and their folders to tasks of lm-eval and its TaskManager."""
    from lm_eval.tasks import TaskManager

    folders, unknown = [name for name in names if Path(name).is_dir()], [name for name in names if not Path(name).exists()]
    tasks = [name for name in names if Path(name).is_file()]
    tasks += [task for name in folders for task in TaskManager(include_path=name, include_defaults=False).all_subtasks]
    manager = TaskManager(include_path=folders, include_defaults=bool(unknown))  # reading lm-eval's 14,000 tasks takes seconds
    for name in unknown:
        if not (found := manager.match_tasks([name])):
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3, 0))
            raise UserError(f"--eval: no task or file is named '{name}'; nearest are {near}")
        tasks += found
    return tasks, manager


def result_table(results: Iterable[dict]) -> str:
    """lm-eval's results of tasks and groups -> one line per task and metric."""
    rows = [("task", "metric", "value", "stderr", "n")]
    for found in results:
        for key, value in found.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                numbers = [f"{number:.4f}" if isinstance(number, float) else str(number)
                           for number in (value, found.get(f"{metric}_stderr,{kind}", "N/A"))]
                label = metric if kind == "none" else f"{metric} ({kind})"
                rows.append((found["alias"], label, *numbers, str(found["sample_len"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def run_eval(session: Session, actions, name: str) -> None:
    """Run tasks of lm-eval, print a table, and write `eval.json` into the folder `name`. stdout gets only the table."""
    settings, chat = session.settings, session.settings.chat == "on"
    try:
        from lm_eval import simple_evaluate
    except ImportError as error:
        raise UserError(f"--eval: needs {error.name}; pip install -r requirements-extras.txt") from None
    refuse_sampling(session, "the tasks of --eval set the sampling parameters")
    try:
        with (open(os.devnull, "w") if MODEL.QUIET else contextlib.nullcontext(sys.stderr) as log,
              contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
            tasks, manager = find_tasks([task.strip() for task in actions.eval.split(",")])
            results = simple_evaluate(as_lm(session), tasks=tasks, num_fewshot=actions.num_fewshot, limit=actions.limit,
                                      log_samples=False, task_manager=manager, apply_chat_template=chat,
                                      system_instruction=settings.system)
    except (OSError, ImportError) as error:
        hint = "; the dataset of a task is downloaded on first use" if isinstance(error, ConnectionError) else ""
        raise UserError(f"--eval: {MODEL.first_line(error)}{hint}") from None
    print(result_table(results["results"].values()))
    used = {"tasks": tasks, "limit": actions.limit, "num_fewshot": actions.num_fewshot, "chat": chat, "system": settings.system,
            "dtype": str(session.model.dtype).removeprefix("torch."), "seed": settings.seed, "batch_size": settings.batch_size}
    record = {**results, "model": name, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": used}
    record.pop("pretty_env_info", None)
    try:
        if not Path(name).is_dir():
            raise UserError(f"{name} is not a folder")
        MODEL.write_text(Path(name) / "eval.json", json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
    except UserError as error:
        say(f"--eval: eval.json was not written: {error}")


# ------------------------------------------------------------------------------------------------- HTTP server


def respond(record: dict, status: int = 200, headers: dict | None = None):
    from fastapi.responses import JSONResponse

    return JSONResponse(record, status, headers)


class Refused(Exception):
    """An HTTP error, returned in OpenAI's format."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", headers: dict | None = None):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def record(self) -> dict:
        key = re.match(r"([a-z_]+)[\w.]*: ", str(self))
        return {"error": {"message": str(self), "type": self.kind, "param": key and key[1], "code": self.status}}

    def response(self):
        return respond(self.record(), self.status, self.headers)


class Service:
    """Runs the engine in a background thread. Requests are added and removed between steps; a callback reports new tokens."""

    def __init__(self, engine: Engine | StaticEngine, limit: int):
        self.engine, self.limit, self.open = engine, limit, 0
        self.calls: deque[tuple[Future, Callable]] = deque()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # functions for the engine's thread
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, rows: list[Row], notify: Callable[[Row, Exception | None], None]) -> None:
        """notify(row, error) is called in the engine's thread after new tokens of a row, or if the step fails."""
        if len(rows) > self.limit:
            raise Refused(400, f"n: {len(rows)} completions exceed the server's --max-queue {self.limit}")
        if self.open + len(rows) > self.limit:
            raise Refused(429, f"the queue is full ({self.open} of {self.limit} completions running or waiting); try again later",
                          "rate_limit_error", {"Retry-After": "1"})
        self.open += len(rows)
        for row in rows:
            row.notify = notify
        self.inbox.put(partial(self._add, [row for row in rows if not row.finish]))

    def call(self, function: Callable) -> Future:
        """Run function() in the engine's thread between two steps, as only one thread at a time may run the model."""
        future: Future = Future()
        self.inbox.put(partial(self.calls.append, (future, function)))
        return future

    def leave(self, rows: list[Row]) -> None:
        """Remove submitted rows, finished or not; call once per `submit`."""
        self.open -= len(rows)
        self.inbox.put(partial(self._remove, rows))

    def _add(self, rows: list[Row]) -> None:
        try:
            self.engine.add(rows)
        except UserError as error:  # a prompt that does not fit the cache
            for row in rows:
                row.notify(row, error)

    def _remove(self, rows: list[Row]) -> None:
        for row in rows:
            self.engine.remove(row)

    def _work(self) -> None:
        engine = self.engine
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    self.inbox.get(block=not (engine.busy or self.calls))()
            # While a static batch is running, transformers' `generate` runs in another thread.
            if self.calls and not (isinstance(engine, StaticEngine) and engine.running):
                future, function = self.calls.popleft()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(function())
                    except Exception as error:  # raised where the future is awaited
                        future.set_exception(error)
            try:
                for row in engine.step() if engine.busy else ():
                    row.notify(row, None)
            except Exception as error:  # such as out of memory: the current requests fail, the server continues
                for row in [*engine.running, *engine.waiting]:
                    engine.remove(row)
                    row.notify(row, error)


COMMON_FIELDS = {"model", "stream", "stream_options", "user", "metadata", "store", "best_of", "response_format", "logprobs"}
CHAT_FIELDS = {"messages", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs"}
TEXT_FIELDS = {"prompt", "echo"}


def field(record: dict, key: str, kind: type, default=None):
    """The value of a key in a request, after a check of its type. null means not set."""
    value = record.get(key)
    if value is not None and not (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        raise Refused(400, f"{key}: {json.dumps(value)[:100]} is not of type {kind.__name__}")
    return default if value is None else value


def check_keys(record: dict, known: set[str]) -> None:
    for key in record:
        if key not in known:
            route = {"messages": "/v1/chat/completions", "tools": "/v1/chat/completions", "prompt": "/v1/completions"}.get(key)
            raise Refused(400, f"{key}: unknown key" + (f"; use {route}" if route else MODEL.suggestion(key, known)))


def sampling_of(record: dict, base: Sampling, chat: bool) -> Sampling:
    """The sampling parameters of an HTTP request; unknown keys are an error."""
    check_keys(record, {*SAMPLING_KEYS, *OPENAI_KEYS, *COMMON_FIELDS, *(CHAT_FIELDS if chat else TEXT_FIELDS)})
    count = None if chat else record.get("logprobs")  # the number of alternatives; in a chat request a boolean
    more = {} if count is None else {"logprobs": True, "top_logprobs": MODEL.convert(count, int, "logprobs")}
    if (response := field(record, "response_format", dict, {"type": "text"})) != {"type": "text"}:
        if record.get("structured_outputs"):
            raise Refused(400, "response_format and structured_outputs are mutually exclusive; set one")
        if (kind := response.get("type")) not in ("json_object", "json_schema"):
            raise Refused(400, f"response_format.type: {kind!r} is not text, json_object or json_schema")
        schema = field(field(response, "json_schema", dict, {}), "schema", dict)
        if kind == "json_schema" and schema is None:
            raise Refused(400, "response_format.json_schema.schema: a JSON schema is required")
        more["structured_outputs"] = {"json_object": True} if kind == "json_object" else {"json": schema}
    sampling = request_sampling(record, base, "", **more)
    if sampling.top_logprobs > 20 or sampling.n > 128:
        raise Refused(400, "top_logprobs must be at most 20, and n at most 128")
    if sampling.num_beams > 1:
        raise Refused(400, "num_beams: the server does not support beam search")
    return sampling


class Reader(NamedTuple):
    """Splits a chat completion into reasoning, content and tool calls."""

    markup: TOKENIZER.Markup
    thinks: bool  # the prompt ends with the opening tag of the reasoning
    tools: list[dict]

    def __call__(self, text: str, final: bool) -> tuple[str, str, list[tuple[str, dict]]]:
        """(reasoning, content, calls) of a completion so far. An ending that may become markup is withheld until it is final."""
        reasoning, calls = "", []
        if self.markup.think:
            first, last = self.markup.think
            start = text.lstrip()
            if not (self.thinks or final) and first.startswith(start):
                return "", "", []
            if self.thinks or start.startswith(first):
                reasoning, closed, text = start.removeprefix(first).partition(last)
                reasoning = reasoning[: len(reasoning) - (0 if closed or final else partial_match(reasoning, [last]))].strip()
                text = text.lstrip()
        if self.tools and self.markup.call:
            begin = self.markup.call[0].strip()
            start = text.find(begin) if begin else 0 if text.lstrip()[:1] in ("{", "[") else -1
            calls = TOKENIZER.parse_calls(self.markup, text[start:], self.tools) if final and start >= 0 else []
            if start >= 0 and (calls or not final):
                text = text[:start]
            elif not final:
                text = text[: len(text) - partial_match(text, [begin])]
        return reasoning, text, calls


def answer_reader(tokenizer, prompt: list[int], tools: list[dict]) -> Reader:
    """The `Reader` for completions of a prompt."""
    markup = TOKENIZER.answer_markup(tokenizer)
    return Reader(markup, bool(markup.think) and tokenizer.decode(prompt[-16:]).rstrip().endswith(markup.think[0]), tools)


def call_grammar(markup: TOKENIZER.Markup, tools: list[dict], tokenizer) -> str:
    """The Lark grammar (for llguidance) of one call to one of the tools, in the format of the chat template."""
    if markup.form != "json":
        raise Refused(400, "tool_choice: only auto and none, because this model's chat template does not write calls as JSON")
    schemas = [{"type": "object", "properties": {"name": {"const": tool["function"]["name"]},
                                                 markup.arguments: tool["function"].get("parameters") or {"type": "object"}},
                "required": ["name", markup.arguments], "additionalProperties": False} for tool in tools]
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    before, after = ("".join(f" <[{special[part]}]>" if part in special else f" {json.dumps(part)}" for part in
                             re.split(f"({TOKENIZER.any_of(list(special)).pattern})", text) if part) for text in markup.call)
    schema = {"anyOf": schemas, "x-guidance": {"whitespace_flexible": False}}
    return f"start:{before} call{after}\ncall: %json {json.dumps(schema)}"


class Exchange:
    """One request for completions, from its rows in the engine to the JSON of its response."""

    def __init__(self, server: Server, record: dict, chat: bool):
        session, self.server, self.chat = server.session, server, chat
        self.echo, self.name = field(record, "echo", bool, False), field(record, "model", str, server.name)
        self.with_usage = field(field(record, "stream_options", dict, {}), "include_usage", bool, False)
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.prompt_only = self.echo and record.get("max_tokens") == 0
        self.sampling = sampling_of({**record, "max_tokens": 1} if self.prompt_only else record, session.sampling, chat)
        self.reader = None
        session = session.of_adapter.get(self.name, session) if chat else session
        if chat:
            ids, self.reader, grammar = server.conversation(record, self.sampling)
            self.prompts, self.sampling = [ids], replace(self.sampling, structured_outputs=grammar)
        else:
            self.prompts = server.prompts_of(record)
        adapter = self.name if self.name in session.model.adapters else None
        deterministic = self.sampling.temperature == 0 or self.sampling.seed is not None
        self.key = repr((adapter, self.prompts, self.sampling)) if deterministic and not self.prompt_only else None
        self.cached = server.responses.get(self.key)
        self.rows = self.cached or list(itertools.chain(*_make_rows(
            session.model, self.prompts, [self.sampling] * len(self.prompts), session.tokenizer, 0, adapter=adapter)))
        ends = TOKENIZER.chat_ends(session.tokenizer).stop if chat and not self.sampling.ignore_eos else ()
        for row in self.rows:
            row.eos = (*row.eos, *ends)
            row.finish = "length" if self.prompt_only else row.finish
            if row.grammar and self.reader and self.reader.thinks:
                row.grammar.after = self.reader.markup.think[1]
        self.before = [session.tokenizer.decode(row.prompt, skip_special_tokens=True) if self.echo else "" for row in self.rows]
        self.scored: list[Scored] = []  # the prompts, with echo and logprobs
        self.sent: list[tuple | None] = [None] * len(self.rows)  # number of characters of reasoning and content, and of tokens

    def submit(self) -> None:
        """Submit the rows to the engine, which fills `self.events`: (index, text so far, number of tokens, finish, error)."""
        self.events: asyncio.Queue = asyncio.Queue()
        self.clock = time.perf_counter()
        loop, numbers = asyncio.get_running_loop(), {row: i for i, row in enumerate(self.rows)}

        def notify(row: Row, error: Exception | None) -> None:
            event = (numbers[row], row.text[: row.settled], len(row.ids), row.finish, error)
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        if self.cached:
            self.server.meters.cached.inc()
            for row in self.rows:
                notify(row, None)
        else:
            self.server.service.submit(self.rows, notify)

    async def updates(self):
        """(index, text so far, number of tokens, finish reason) after new tokens, until all rows are finished; with echo also
        before the first token."""
        server, counts = self.server, [0] * len(self.rows)
        left = set() if self.prompt_only else set(range(len(self.rows)))
        try:
            if self.echo and self.sampling.logprobs:
                top = self.sampling.top_logprobs
                calls = [server.service.call(partial(score_ids, server.session.model, prompt, top)) for prompt in self.prompts]
                self.scored += await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, calls)), server.settings.timeout)
            for number, row in enumerate(self.rows) if self.echo else ():
                yield number, "", 0, row.finish if self.prompt_only else None
            while left:
                remaining = server.settings.timeout - (time.perf_counter() - self.clock)
                number, text, count, finish, error = await asyncio.wait_for(self.events.get(), max(remaining, 0))
                if error:
                    raise error
                if not self.cached:
                    server.meters.tokens(self.rows[number], self.clock, counts[number], count, finish)
                counts[number] = count
                yield number, text, count, finish
                left -= {number} if finish else set()
            if self.key:
                server.responses.pop(self.key, None)
                server.responses[self.key] = self.rows
                if len(server.responses) > server.settings.response_cache:
                    del server.responses[next(iter(server.responses))]
        except asyncio.TimeoutError:
            raise Refused(504, f"the request took longer than {server.settings.timeout:g} seconds", "timeout_error") from None
        except Refused:
            raise
        except Exception as error:  # raised by the model; other requests are not affected
            say(f"a request failed: {type(error).__name__}: {MODEL.first_line(error)}")
            raise Refused(500, "the model failed on this request", "server_error") from None
        finally:
            if not self.cached:
                server.service.leave(self.rows)

    def usage(self) -> dict:
        read, written = sum(map(len, self.prompts)), sum(len(row.ids) for row in self.rows)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def record(self, choices: list[dict], usage: dict | None, chunk: bool) -> dict:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name, "choices": choices,
                **({"usage": usage} if usage is not None else {})}

    def choice(self, number: int, text: str, count: int, finish: str | None, whole: bool = False) -> dict | None:
        """The choice of a whole response or of a chunk (the text since the last chunk); None if there is nothing to send yet."""
        first = self.sent[number] is None
        reasoned, written, tokens = self.sent[number] or (0, 0, 0)
        reasoning, content, calls = self.reader(text, bool(finish)) if self.chat else ("", text, [])
        if not (finish or first and self.echo or reasoning[reasoned:] or content[written:]):
            return None
        before = self.before[number]
        logprobs = self.logprobs(self.rows[number].completion(), tokens, count, len(before) + written)
        if first and self.scored:  # the prompt comes first
            logprobs = {key: values and values + logprobs[key] for key, values in self.prompt_logprobs(number).items()}
        self.sent[number] = (max(reasoned, len(reasoning)), max(written, len(content)), count)
        if not self.chat:
            new = {"text": before * first + content[written:]}
        else:
            records = [{"index": i, "id": f"call_{uuid.uuid4().hex}", "type": "function",
                        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
                       for i, (name, arguments) in enumerate(calls)]
            new = {"reasoning_content": reasoning[reasoned:], "content": content[written:], "tool_calls": records}
            new = {key: value for key, value in new.items() if value}
            content = None if calls and not content.strip() else content
            new = {"message": {"role": "assistant", **new, "content": content}} if whole else {"delta": new}
        return {"index": number, **new, "logprobs": logprobs, "finish_reason": "tool_calls" if calls else finish}

    def logprobs(self, completion: Completion, start: int, stop: int, offset: int = 0) -> dict | None:
        """Log-probabilities of tokens `start` to `stop` in OpenAI's format; `offset` is their character offset."""
        if completion.logprobs is None:
            return None
        decode = self.server.session.tokenizer.decode
        ids, values = completion.ids[start:stop], completion.logprobs[start:stop]
        best = completion.best[start:stop] if completion.best else [{}] * len(ids)
        named = [[(decode([i]), value) for i, value in alternatives.items()] for alternatives in best]
        if self.chat:
            def entry(text: str, value: float) -> dict:
                return {"token": text, "logprob": value, "bytes": list(text.encode())}

            return {"content": [{**entry(decode([i]), value), "top_logprobs": [entry(*pair) for pair in pairs]}
                                for i, value, pairs in zip(ids, values, named, strict=True)]}
        sizes = [len(decode([i], skip_special_tokens=True)) for i in ids]
        # the most probable of several tokens with the same text, such as parts of characters
        others = [dict(reversed(pairs)) for pairs in named] if completion.best is not None else None
        return {"tokens": [decode([i]) for i in ids], "token_logprobs": values, "top_logprobs": others,
                "text_offset": list(itertools.accumulate(sizes, initial=offset))[:-1]}

    def prompt_logprobs(self, number: int) -> dict:
        """Log-probabilities of a prompt's tokens, null for the first. The alternatives include the token itself."""
        scored = self.scored[number // self.sampling.n]
        best = None if scored.best is None else [{}, *({**others, token: value} for others, token, value in zip(
            scored.best, scored.ids[1:], scored.logprobs, strict=True))]
        found = self.logprobs(Completion(scored.ids, [None, *scored.logprobs], "length", best=best), 0, len(scored.ids))
        if best:
            found["top_logprobs"][0] = None
        return found

    async def events_of_stream(self):
        """Server-sent events."""
        try:
            if self.chat:
                first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                yield _event(self.record([{"index": i, **first} for i in range(len(self.rows))], None, True))
            async for update in self.updates():
                if choice := self.choice(*update):
                    yield _event(self.record([choice], None, True))
            if self.with_usage:
                yield _event(self.record([], self.usage(), True))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.record())


def _event(record: dict) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False)}\n\n"


@torch.no_grad()
def embed(model, rows: list[list[int]], adapter: str | None) -> list[list[float]]:
    """Embeddings of texts: the mean of the last hidden states, normalized to length 1."""
    found = []
    for ids in rows:
        with MODEL.adapters_for(model, [(adapter, len(ids))]):
            hidden = model(torch.tensor([ids], device=model.device), want=("hidden_states",)).hidden_states[-1]  # (1, T, C)
        found.append(F.normalize(hidden[0].float().mean(0), dim=0).tolist())
    return found


class Server:
    """An OpenAI-compatible HTTP API over one engine."""

    def __init__(self, session: Session, name: str, engine: Engine | StaticEngine):
        self.session, self.name, self.settings, self.began = session, name, session.settings, int(time.time())
        self.service = Service(engine, self.settings.max_queue)
        self.meters = Meters(self.service)
        self.responses: dict[str, list[Row]] = {}  # to deterministic requests, the least recently used first
        self.context, self.vocabulary = session.model.config.max_position_embeddings, session.model.config.vocab_size

    def app(self):
        """The FastAPI application, whose errors have OpenAI's format."""
        from fastapi import FastAPI

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, exception_handlers={
            Refused: lambda _, error: error.response(),
            UserError: lambda _, error: Refused(400, str(error)).response(),
            404: lambda request, _: Refused(404, f"no route {request.url.path}", "not_found_error").response(),
            405: lambda request, _: Refused(405, f"{request.url.path} does not accept {request.method}").response(),
            Exception: lambda *_: Refused(500, "the server failed on this request", "server_error").response()})
        for path, method, function in (("/v1/completions", "POST", partial(self.complete, chat=False)),
                                       ("/v1/chat/completions", "POST", partial(self.complete, chat=True)),
                                       ("/v1/embeddings", "POST", self.embeddings), ("/v1/models", "GET", self.models),
                                       ("/tokenize", "POST", self.tokenize), ("/detokenize", "POST", self.detokenize),
                                       ("/health", "GET", self.health), ("/metrics", "GET", self.metrics)):
            app.add_route(path, self.guarded(function, path != "/health"), methods=[method])
        return app

    def guarded(self, function: Callable, needs_key: bool) -> Callable:
        """A route that checks the API key."""
        key = self.settings.api_key and f"Bearer {self.settings.api_key}".encode()

        async def handler(request):
            if needs_key and key and not hmac.compare_digest(request.headers.get("authorization", "").encode(), key):
                raise Refused(401, "wrong API key", "authentication_error")
            return await function(request)

        return handler

    async def read(self, request) -> dict:
        """The JSON object in a request's body."""
        from starlette.requests import ClientDisconnect

        async def body() -> bytearray:
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > self.settings.max_body:
                    raise Refused(413, f"the request is larger than {self.settings.max_body:,} bytes")
            return data

        try:
            data = await asyncio.wait_for(body(), self.settings.timeout)
            record = TOKENIZER.parse_json(data.decode("utf-8"), "the request")
        except asyncio.TimeoutError:
            raise Refused(408, f"the request did not arrive within {self.settings.timeout:g} seconds") from None
        except ClientDisconnect:
            raise Refused(499, "the client disconnected") from None
        except UnicodeDecodeError:
            raise Refused(400, "the request is not UTF-8") from None
        if not isinstance(record, dict):
            raise Refused(400, "the request is not a JSON object")
        TOKENIZER.checked(json.dumps(record, ensure_ascii=False).replace("\0", ""), "the request")
        if record.get("model") not in (None, self.name, *self.session.model.adapters):
            raise Refused(404, f"model: '{record['model']}' is not served; GET /v1/models lists the models", "not_found_error")
        return record

    def checked(self, ids: list[int]) -> list[int]:
        """Check that the token ids of a prompt are valid and leave room for a completion."""
        if not ids or not all(type(i) is int and 0 <= i < self.vocabulary for i in ids):
            raise Refused(400, f"expected at least one token id, each a number below {self.vocabulary:,}")
        if len(ids) >= self.context:
            raise Refused(400, f"the prompt has {len(ids)} tokens; prompt and completion must fit a context of {self.context}")
        return ids

    def prompts_of(self, record: dict, key: str = "prompt") -> list[list[int]]:
        prompt = record.get(key)
        if isinstance(prompt, str):
            prompt = [prompt]
        if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(isinstance(part, (str, list)) for part in prompt):
            raise Refused(400, f"{key}: expected a text, a list of texts, or token ids")
        return [self.checked(TOKENIZER.encode_prompt(self.session.tokenizer, part) if isinstance(part, str) else part)
                for part in prompt]

    def conversation(self, record: dict, sampling: Sampling) -> tuple[list[int], Reader, dict | None]:
        """The prompt of a chat request, the reader of its completion, and the `structured_outputs` of its completion."""
        session = self.session.of_adapter.get(record.get("model"), self.session)
        tokenizer = session.tokenizer
        if not tokenizer.chat_template:
            raise Refused(400, "messages: this model has no chat template; use /v1/completions")
        messages = messages_of(field(record, "messages", list, []), "messages")
        if not messages:
            raise Refused(400, "messages: expected a list of messages")
        tools, form = tools_of(record), sampling.structured_outputs
        choice = "auto" if record.get("tool_choice") is None else record["tool_choice"]
        tools = [] if choice == "none" else tools
        if choice not in ("none", "auto"):
            function = choice.get("function") if isinstance(choice, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            chosen = [tool for tool in tools if choice == "required" or tool["function"]["name"] == name]
            if not chosen or form:
                raise Refused(400, f"tool_choice: {json.dumps(choice)[:100]} is not auto, none, required or one of the tools"
                              if not chosen else "tool_choice and response_format are mutually exclusive; set one")
            form = {"grammar": call_grammar(TOKENIZER.answer_markup(tokenizer), chosen, tokenizer)}
        ids = session.chat_ids(messages, tools or None, field(record, "chat_template_kwargs", dict))
        return self.checked(ids), answer_reader(tokenizer, ids, tools), form

    async def complete(self, request, chat: bool):
        from fastapi.responses import PlainTextResponse, StreamingResponse

        record = await self.read(request)
        exchange = Exchange(self, record, chat)
        streamed = field(record, "stream", bool, False)
        exchange.submit()
        if streamed:
            return StreamingResponse(exchange.events_of_stream(), media_type="text/event-stream")

        async def collect() -> None:
            async for _ in exchange.updates():
                pass

        work = asyncio.create_task(collect())
        while not (await asyncio.wait({work}, timeout=0.1))[0]:
            if await request.is_disconnected():
                work.cancel()
                return PlainTextResponse("", 499)
        await work
        choices = [exchange.choice(i, row.text, len(row.ids), row.finish, whole=True) for i, row in enumerate(exchange.rows)]
        return respond(exchange.record(choices, exchange.usage(), False))

    async def embeddings(self, request):
        record = await self.read(request)
        check_keys(record, {"model", "input", "encoding_format", "dimensions", "user"})
        rows = self.prompts_of(record, "input")
        encoding = field(record, "encoding_format", str, "float")
        if encoding not in ("float", "base64"):
            raise Refused(400, f"encoding_format: {encoding!r} is not float or base64")
        if record.get("dimensions") is not None:
            raise Refused(400, "dimensions: not supported")
        name = field(record, "model", str, self.name)
        adapter = name if name in self.session.model.adapters else None
        vectors = await asyncio.wrap_future(self.service.call(partial(embed, self.session.model, rows, adapter)))
        if encoding == "base64":
            vectors = [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
        count = sum(map(len, rows))
        return respond({"object": "list", "model": name, "usage": {"prompt_tokens": count, "total_tokens": count},
                        "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]})

    async def models(self, _):
        entry = {"object": "model", "created": self.began, "owned_by": "local", "max_model_len": self.context}
        adapters = [{"id": name, "parent": self.name, **entry} for name in self.session.model.adapters]
        return respond({"object": "list", "data": [{"id": self.name, **entry}, *adapters]})

    async def tokenize(self, request):
        record = await self.read(request)
        check_keys(record, {"model", "prompt", "messages", "tools", "tool_choice", "chat_template_kwargs"})
        if "messages" in record:
            ids, *_ = self.conversation(record, self.session.sampling)
        elif isinstance(record.get("prompt"), str):
            ids = TOKENIZER.encode_prompt(self.session.tokenizer, record["prompt"])
        else:
            raise Refused(400, "expected a text as 'prompt', or 'messages'")
        return respond({"tokens": ids, "count": len(ids), "max_model_len": self.context})

    async def detokenize(self, request):
        record = await self.read(request)
        check_keys(record, {"model", "tokens"})
        ids = record.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.vocabulary for i in ids):
            raise Refused(400, f"tokens: expected a list of token ids below {self.vocabulary:,}")
        return respond({"prompt": self.session.tokenizer.decode(ids)})

    async def health(self, _):
        return respond({"status": "ok"})

    async def metrics(self, _):
        from fastapi.responses import PlainTextResponse
        from prometheus_client import generate_latest

        return PlainTextResponse(generate_latest(self.meters.registry))


def tools_of(record: dict) -> list[dict]:
    """The tools of a chat request, in OpenAI's format."""
    tools = field(record, "tools", list, [])
    for i, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) \
                or not isinstance(function.get("parameters") or {}, dict):
            form = '{"type": "function", "function": {"name": ..., "parameters": SCHEMA}}'
            raise Refused(400, f"tools: tool {i} does not have the format {form}")
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise Refused(400, "tools: two tools have the same name")
    return tools


class Meters:
    """Prometheus metrics under vLLM's names."""

    def __init__(self, service: Service):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry, engine = CollectorRegistry(), service.engine
        named = dict(registry=self.registry)
        gauges = {"num_requests_running": lambda: len(engine.running), "num_requests_waiting": lambda: len(engine.waiting)}
        if isinstance(engine, Engine):
            gauges["kv_cache_usage_perc"] = lambda: 1 - engine.cache.available() / engine.cache.pages
            if engine.drafter:
                gauges["spec_decode_num_draft_tokens_total"] = lambda: engine.drafter.drafted
                gauges["spec_decode_num_accepted_tokens_total"] = lambda: engine.drafter.accepted
        for name, read in gauges.items():
            Gauge(f"vllm:{name}", name.replace("_", " "), **named).set_function(read)
        self.read = Counter("vllm:prompt_tokens", "prompt tokens", **named)
        self.written = Counter("vllm:generation_tokens", "generated tokens", **named)
        self.finished = Counter("vllm:request_success", "finished completions", ["finished_reason"], **named)
        self.cached = Counter("vllm:response_cache_hits", "requests served from the response cache", **named)
        self.first = Histogram("vllm:time_to_first_token_seconds", "seconds to the first token", **named)
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "seconds to the last token", **named)

    def tokens(self, row: Row, clock: float, before: int, count: int, finish: str | None) -> None:
        """A row had `before` tokens and has `count` now."""
        self.written.inc(count - before)
        if not before:
            self.read.inc(len(row.prompt))
            self.first.observe(time.perf_counter() - clock)
        if finish:
            self.finished.labels(finish).inc()
            self.whole.observe(time.perf_counter() - clock)


def show_figures(meters: Meters) -> None:
    """Log the load to stderr: on a terminal in one line that is updated every second, otherwise in a line every ten seconds."""
    def work() -> None:
        interval, before, read = 1 if sys.stderr.isatty() else 10, 0, meters.registry.get_sample_value
        while True:
            time.sleep(interval)
            written, usage = read("vllm:generation_tokens_total"), read("vllm:kv_cache_usage_perc")
            if written == before:
                continue
            line = (f"{read('vllm:num_requests_running'):.0f} running, {read('vllm:num_requests_waiting'):.0f} waiting, "
                    f"{(written - before) / interval:,.0f} tokens/s{'' if usage is None else f', cache {usage:.0%}'}, "
                    f"{written:,.0f} tokens in total")
            sys.stderr.write(f"\r\033[K{line}" if sys.stderr.isatty() else f"{line}\n")
            sys.stderr.flush()
            before = written

    threading.Thread(target=work, daemon=True).start()


def warm_up(engine: Engine | StaticEngine) -> None:
    """Generate a few tokens; on a GPU in batches of 1, 2, 4, ... sequences, whose steps are recorded."""
    for exponent in range(1 if engine.model.device.type == "cpu" else engine.rows.bit_length()):
        prompts, sampling = [[0] * 8 for _ in range(2**exponent)], Sampling(3, 0, ignore_eos=True)
        engine.add([row for [row] in _make_rows(engine.model, prompts, [sampling] * len(prompts), None, 0)])
        while engine.busy:
            engine.step()


def run_server(session: Session, name: str) -> None:
    """Serve until SIGTERM or Ctrl-C. Then open requests are finished, and new connections are rejected."""
    s = session.settings
    if s.num_beams > 1:
        raise UserError("inference.num_beams: the server does not support beam search; leave it out")
    default = 512 if session.model.device.type == "cpu" else 4096  # running completions wait for the whole step
    engine = session.engine(s.enable_prefix_caching, s.max_num_batched_tokens or default)
    try:
        import uvicorn

        server = Server(session, name, engine)
        app = server.app()
    except ImportError as error:
        raise UserError(f"--serve: needs {error.name}; pip install -r requirements-extras.txt") from None
    if isinstance(engine, Engine):
        room = engine.cache.pages * engine.cache.page
        size = MODEL.size_text(room * MODEL.cache_numbers(session.model.config) * session.model.dtype.itemsize)
        say(f"memory: weights {MODEL.size_text(weight_bytes(session.model))}, KV cache {size} ({room:,} tokens in pages of "
            f"{engine.cache.page}), at most {s.batch_size} sequences per batch")
    warm_up(engine)
    say(f"serving {name} at http://{s.host}:{s.port}/v1")
    http = uvicorn.Server(uvicorn.Config(app, s.host, s.port, log_level="warning", access_log=False, timeout_keep_alive=60,
                                         timeout_graceful_shutdown=int(s.timeout)))
    add_page(app, session, name, http)
    show_figures(server.meters)
    with contextlib.suppress(KeyboardInterrupt):
        http.run()


# --------------------------------------------------------------------------------------------------- chat page

PAGE_SETTINGS = {"temperature": 2, "top_p": 1, "min_p": 1, "top_k": None, "max_new_tokens": None, "seed": None}  # slider maximum


def chat_blocks(session: Session, name: str):
    """The chat page, whose functions stream from the HTTP API of the server that opened it."""
    import gradio as gr
    import httpx

    settings, sampling = session.settings, session.sampling
    headers = {"Authorization": f"Bearer {settings.api_key}".encode()} if settings.api_key else {}
    has_thinking = session.chat and "enable_thinking" in str(session.tokenizer.chat_template)

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
                messages.pop()  # the previous question got no answer
            messages.append({"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])})
        return messages

    async def answer(message, history, request, model, system, thinking, *values):
        """Yield the messages of the answer so far. If Gradio closes this generator (stop), the request is aborted as well."""
        record = {key: value for key, value in zip(PAGE_SETTINGS, values, strict=True) if value not in ("", None)}
        record |= {"model": model, "n": 1, "stream": True}
        record |= {"messages": conversation(history, message, system)} if session.chat else {"prompt": message}
        if has_thinking:
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
                if time.perf_counter() - shown > 0.05:  # drawing every token would slow down a fast model
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
            thinking = gr.Checkbox(True, label="Thinking", visible=has_thinking)
            values = []
            for key, high in PAGE_SETTINGS.items():
                value, label = getattr(sampling, key), key.replace("_", " ").capitalize()
                if high is None:
                    values.append(gr.Textbox("" if value is None else str(value), label=label, placeholder="default"))
                else:
                    values.append(gr.Slider(0, max(high, value), value, step=0.01, label=label))
        gr.Markdown(f"## {name}")
        note = None if session.chat else "This model has no chat template. It continues each message independently."
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

    async def open_page() -> FastAPI:
        page, shutdown = await asyncio.to_thread(build), server.shutdown
        lifespan = page.router.lifespan_context(page)
        await lifespan.__aenter__()

        async def close(sockets=None) -> None:
            page.routes[-1].app.stop_event.set()  # otherwise connections of open browser tabs delay the server's exit
            await lifespan.__aexit__(None, None, None)
            await shutdown(sockets)

        server.shutdown = close
        return page

    async def serve(scope, receive, send):
        nonlocal opening
        size = 0
        if any(route.path == scope["path"] != "/" for route in app.routes):
            raise HTTPException(405)
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

        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", policy)]
            await send(message)

        opening = opening or asyncio.create_task(open_page())
        await (await opening)(scope, bounded, with_policy)

    app.mount("/", serve)
    say(f"chat page at http://{session.settings.host}:{session.settings.port}/")


ACTIONS = {
    "prompt": Action("prompt text; '' generates from the beginning-of-text token", str),
    "adapter": Action("LoRA adapter for the model: a folder written by `SFT.py --lora.r` or PEFT", str),
    "echo": Action("print the prompt before the completion"),
    "lines": Action("treat each line of stdin (with --score, of the file) as a separate text"),
    "jsonl": Action("read requests as JSONL from stdin and write JSONL: {prompt or messages, any sampling parameter}"),
    "score": Action("compute loss and perplexity of a file instead of generating; - or no value: stdin", str, "-"),
    "eval": Action("evaluate with lm-eval: comma-separated tasks, YAML files or folders; writes eval.json", str),
    "limit": Action("with --eval: maximum samples per task", partial(MODEL.convert, kind=int, where="--limit")),
    "num_fewshot": Action("with --eval: number of examples in each prompt",
                          partial(MODEL.convert, kind=int, where="--num_fewshot")),
    "serve": Action("start an OpenAI-compatible HTTP server"),
    "logits": Action("with --score: write the logits of the first text to this .safetensors file", str),
}
SECTIONS = {**TOKENIZER.SECTIONS, "inference": InferenceSection}
SHORTS = {"max_num_seqs": "inference.batch_size", "quantization": "model.quantization"}


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv, SECTIONS, "inference", ACTIONS, __doc__, SHORTS)
    actions = config.actions
    piped = not check_flags(config) and not (sys.stdin and sys.stdin.isatty())
    prompt = None if actions.prompt is None else TOKENIZER.checked(actions.prompt, "--prompt")
    if piped:
        prompt = "".join(read_stdin())
        if not prompt:
            raise UserError("no prompt: stdin is empty; pipe a text to it or use --prompt")
        prompt = prompt.removesuffix("\n")
    session = Session(config)
    if (actions.serve or actions.eval) and ("score" in session.model.heads or not session.model.config.causal):
        raise UserError(f"--{'serve' if actions.serve else 'eval'}: this model cannot generate text; use a causal language model")
    if actions.eval:
        run_eval(session, actions, actions.adapter or config.model.name)
    elif actions.serve:
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
    session.report()


def check_flags(config) -> list[str]:
    """Reject flags that cannot be combined. Returns the flag that sets the mode, if any."""
    actions, settings = config.actions, config.inference
    modes = [f"--{name}" for name in ("prompt", "jsonl", "score", "eval", "serve") if getattr(actions, name) not in (None, False)]
    modes += ["--lines"] if actions.lines and actions.score is None else []
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} are mutually exclusive; set one")
    if actions.logits and actions.score is None:
        raise UserError("--logits: requires --score")
    for name, low in (("limit", 1), ("num_fewshot", 0)):
        if (value := getattr(actions, name)) is not None and (actions.eval is None or value < low):
            raise UserError(f"--{name}: requires --eval" if actions.eval is None else f"--{name}: {value} is not >= {low}")
    served = [f.name for f in fields(InferenceSection) if f.metadata["comment"].startswith("--serve:")]
    for name in served if not actions.serve else ():
        given = config.origins.get(f"inference.{name}", "").startswith("command line")
        if given or name == "lora_modules" and settings.lora_modules:
            hint = "; without it, use --adapter FOLDER" if name == "lora_modules" else ""
            raise UserError(f"--{name.replace('_', '-')}: requires --serve{hint}")
    if actions.serve:
        try:
            with socket.create_server((settings.host, settings.port)):
                pass
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise UserError(f"--port: cannot listen on {settings.host}:{settings.port} ({reason}); set another --port") from None
    if settings.logprobs and actions.score is None and not actions.jsonl:
        raise UserError("--logprobs: requires --jsonl or --score")
    if actions.score not in (None, "-") and (Path(actions.score).is_dir() or not Path(actions.score).exists()):
        raise UserError(f"--score: '{actions.score}' is not a file")
    return modes


if __name__ == "__main__":
    run_main(main)
