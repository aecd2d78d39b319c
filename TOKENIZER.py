"""TOKENIZER.py: text to tokens and back.

Read in this order: training a tokenizer (`train`), encoding text (`Encoder`), rendering conversations (`render_chat`), writing
token files (`prepare`), and building batches (`Rows`, `WholeRows`, `Mixture`, `collate`, `TokenStream`). Below the banner
`edges`: chat templates, documents and their streams, tokenizer folders, token files, file formats, cleaning, normalization of
records, and the command line.

    python TOKENIZER.py --data data/train.txt data/train.jsonl --out data/    # a tokenizer, train_ids.bin, val_ids.bin
    python TOKENIZER.py --data notes.txt --data.text_unit file --tokenizer.kind byte --out /tmp/notes
"""

from __future__ import annotations

import bisect
import csv
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import MODEL
from MODEL import ModelSection, UserError, check, first_line, knob, load_config, read_json, resolve_folder, run_main, say

# ---------------------------------------------------------------------------------------------------- settings

KINDS: dict[str, Callable] = {}  # tokenizer.kind -> the function that trains it, filled below


@dataclass
class TokenizerSection:
    name: str | None = knob(None, "tokenizer: a folder or a hub name; null: the model's, or one trained on the data")
    kind: str = knob("bpe", "kind of tokenizer to train: bpe (byte-level BPE), char or byte", KINDS, often=True)
    vocab_size: int = knob(MODEL.TRAINED_VOCABULARY, "vocabulary size of the trained BPE tokenizer, including special tokens",
                           low=1, often=True)


@dataclass
class DataSection:
    train: list[str] = knob(["data/train.txt", "data/train.jsonl"],
                             "files, folders, globs (txt jsonl json csv tsv parquet, .gz), hub datasets, one .bin", often=True)
    validation: str = knob("hash", "held-out set: hash (a stable 5% of the documents), tail (the last 5%), none, or a file",
                           often=True)
    validation_fraction: float = knob(0.05, "fraction of the documents that hash and tail hold out", above=0, below=1)
    text_unit: str = knob("line", "unit of .txt files that is one document: line, file or blank_line",
                          ("line", "file", "blank_line"), often=True)
    text_field: str = knob("text", "key or column with the text")
    weights: list[float] | None = knob(None, "sampling weight of each path in data.train; null: every token once per epoch",
                                       above=0)
    packing: bool = knob(True, "pack several documents into each sequence, without attention across documents; false pads one "
                               "document per row", often=True)
    streaming: bool = knob(False, "tokenize while training instead of writing .bin files first")
    normalize: str = knob("NFC", "Unicode normalization", ("NFC", "NFKC", "none"))
    remove_control: bool = knob(True, "remove control characters except newline and tab")
    deduplicate: bool = knob(True, "drop exact duplicate documents, except lines of .txt files")
    min_chars: int = knob(1, "minimum characters of a document; shorter ones are dropped", low=0)
    dir: str = knob("data", "folder for the trained tokenizer and the .bin files")

    def __post_init__(self):
        check(self, "data")
        self.train = [self.train] if isinstance(self.train, str) else [str(path) for path in self.train]
        if not self.train:
            raise UserError("data.train: empty; give at least one path")
        if self.weights is not None and len(self.weights) != len(self.train):
            raise UserError(f"data.weights: expected one per path in data.train ({len(self.train)}), found {len(self.weights)}")


# ---------------------------------------------------------------------------------------------------- training

END = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
UNKNOWN = "<|unk|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]  # part of every trained vocabulary, so that fine-tuning adds no embedding rows
# GPT-4's pattern, but with single digits, which make addition with carry learnable. A word includes its leading space.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


SPECIAL = [END, PAD, *CHAT_TOKENS, MASK]


def train_bpe(texts: Iterable[str], vocab_size: int):
    """Byte-level byte-pair encoding, which represents any text without unknown tokens (Radford 2019, section 2.2)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    check_vocabulary("bpe", vocab_size, len(SPECIAL) + len(alphabet) + 1)
    raw = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
    raw.decoder = decoders.ByteLevel()
    options = dict(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    raw.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **options))
    return raw


def train_char(texts: Iterable[str], vocab_size: int):
    """One token per character of the training text, the most frequent ones first if there are too many."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = [*SPECIAL, UNKNOWN]
    check_vocabulary("char", vocab_size, len(special) + 1)
    counts = Counter(itertools.chain.from_iterable(texts))
    pieces = [*special, *sorted(c for c, _ in counts.most_common(vocab_size - len(special)))]
    raw = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return raw


def train_byte(texts: Iterable[str], vocab_size: int):
    """One token per byte. Neither the texts nor `vocab_size` have an effect."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def check_vocabulary(kind: str, vocab_size: int, smallest: int) -> None:
    if vocab_size < smallest:
        raise UserError(f"tokenizer.vocab_size: {vocab_size} is too small; {kind} needs at least {smallest}")


KINDS.update(bpe=train_bpe, char=train_char, byte=train_byte)


def train(texts: Iterable[str], vocab_size: int = 1024, kind: str = "bpe"):
    """Train a tokenizer with a function of KINDS; returns a transformers tokenizer.

    Such a function returns a tokenizers.Tokenizer with its pre-tokenizer and its decoder. The special tokens, and the
    <|endoftext|> in front of a text that is encoded with special tokens, are added here.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if kind not in KINDS:
        raise UserError(f"tokenizer.kind: '{kind}' is not one of {', '.join(KINDS)}; load others with --tokenizer.name")
    raw = KINDS[kind](texts, vocab_size)
    unknown = getattr(raw.model, "unk_token", None)
    raw.add_special_tokens([*SPECIAL, unknown] if unknown else SPECIAL)
    raw.post_processor = processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B",
                                                       special_tokens=[(END, raw.token_to_id(END))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=PAD, mask_token=MASK,
                                   **({"unk_token": unknown} if unknown else {}), additional_special_tokens=CHAT_TOKENS,
                                   clean_up_tokenization_spaces=False)


def code_of(function: Callable, seen: tuple = ()) -> str:
    """The source of a function, followed by the constants that it names and by the functions of its file that it calls."""
    try:
        parts = [inspect.getsource(function)]
    except OSError:  # typed into an interpreter
        parts = [function.__code__.co_code.hex(), repr(function.__code__.co_consts)]
    for name, value in sorted(inspect.getclosurevars(function).globals.items()):
        if isinstance(value, (str, int, float, list, tuple)):
            parts.append(f"{name} = {value!r}")
        elif inspect.isfunction(value) and value.__module__ == function.__module__ and value not in seen:
            parts.append(code_of(value, (*seen, function)))
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------- encoding


def begin_id(tokenizer) -> int:
    """The id of the token that starts a text: the beginning-of-text token, or the end-of-text token of tokenizers without one
    (GPT-2, Qwen), where the end of one text is the start of the next."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise UserError("the tokenizer has no beginning-of-text and no end-of-text token; use another one (--tokenizer.name)")
    return begin


def end_id(tokenizer) -> int:
    return begin_id(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def vocab_size(tokenizer) -> int:
    """The largest token id + 1. Ids may have gaps, so this can exceed the number of tokens."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def encode_text(tokenizer, text: str) -> list[int]:
    """The ids of a document in training: begin, its tokens, end. Special tokens that occur in the text are plain text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [begin_id(tokenizer), *ids, end_id(tokenizer)]


def encode_pair(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """A prompt and its completion, encoded as one text -> (tokens of the prompt, tokens of the completion).

    The prompt starts once with the special tokens that the tokenizer puts before a text. No end-of-text token follows, even if
    the tokenizer appends one. A token that joins the prompt's trailing space and the completion belongs to the completion.
    """
    encoded = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded.input_ids)
    framed, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start = framed[: next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)]
    start = [] if start and ids[: len(start)] == start else start or ([] if ids else [begin_id(tokenizer)])
    cut = next((i for i, (_, stop) in enumerate(encoded.offset_mapping) if stop > len(prompt)), len(ids))
    return [*start, *ids[:cut]], ids[cut:]


def encode_prompt(tokenizer, text: str) -> list[int]:
    """The ids of a prompt; an empty prompt is the beginning of a text."""
    return encode_pair(tokenizer, text, "")[0]


def prompt_ids(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """The ids of a prompt in INFER.py: rendered by the chat template if there is one, else as text with a message per line."""
    if tokenizer.chat_template:
        return render_chat(tokenizer, as_messages(prompt), tools, add_generation_prompt=True).ids
    return encode_prompt(tokenizer, prompt if isinstance(prompt, str) else "\n".join(item["content"] for item in prompt))


def without_padding(ids: list[int], pad: int | None) -> list[int]:
    """The ids without trailing pad ids, even if they belong to the text: transformers' classifiers read the last other token."""
    last = next((i for i in range(len(ids) - 1, 0, -1) if ids[i] != pad), 0)
    return ids[: last + 1]


def fingerprint(tokenizer) -> str:
    """A digest of a tokenizer: tokenizers with the same fingerprint produce the same ids."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


RUNS = ("  ", *(run for other in "\n\t\r\v\f" for run in (other + " ", " " + other)))
SEAM = re.compile(r"(?<=\S) (?=\S)")  # a single space between two words


class Encoder:
    """Texts -> arrays of ids, without special tokens; special tokens that occur in a text are plain text.

    The words of a text repeat, so for byte-level BPE a dictionary from words to ids is several times faster than the
    tokenizer. It is exact, because byte-level BPE does not merge across a space between two words: "a b" is always "a" followed
    by " b". Other tokenizers use the library's threads.
    """

    LIMIT = 500_000  # maximum number of cached words
    LONGEST = 32  # maximum characters of a cached word; in scripts without spaces, longer ones rarely repeat

    def __init__(self, tokenizer):
        self.raw = tokenizer.backend_tokenizer
        self.dtype = np.uint16 if vocab_size(tokenizer) <= 2**16 else np.uint32
        spec = json.loads(self.raw.to_str())
        steps = spec["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        byte_level = [step for step in steps if step.get("type") == "ByteLevel" and not step["add_prefix_space"]]
        known = all(step.get("type") in ("ByteLevel", "Split", "Digits") for step in steps)
        added = [t for t in spec["added_tokens"] if t["lstrip"] or t["rstrip"] or t["normalized"] or " " in t["content"]]
        self.by_words = spec["model"]["type"] == "BPE" and bool(byte_level) and known and not spec["normalizer"] and not added
        self.by_words = self.by_words and self._splits_at_spaces()
        self.words: dict[str, list[int]] = {}

    def _splits_at_spaces(self) -> bool:
        """Test on a sample whether the pre-tokenizer splits at spaces; letters, digits, marks and breaks differ by pattern."""
        sample = "It's 12 plus 30, isn't it?\n\"Yes\" (42)...\nfoo\tbar e\u0301 \u4f60\u597d x_y 3.14 \n a-b\u00a0c d"
        words = sample.replace(" \n", "\n").split(" ")
        cut = lambda text: [part for part, _ in self.raw.pre_tokenizer.pre_tokenize_str(text)]  # noqa: E731
        joined = [cut(word) for word in (words[0], *(" " + word for word in words[1:]))]
        return list(itertools.chain(*joined)) == cut(" ".join(words))

    def _direct(self, texts: list[str]) -> list[list[int]]:
        self.raw.encode_special_tokens = True
        return [encoding.ids for encoding in self.raw.encode_batch_fast(texts, add_special_tokens=False)]

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        if not self.by_words:
            return [np.array(ids, dtype=self.dtype) for ids in self._direct(texts)]
        split = [self._split(text) for text in texts]
        new = list({word for words in split for word in words} - self.words.keys())
        if len(self.words) + len(new) > self.LIMIT:
            self.words.clear()
            new = list({word for words in split for word in words})
        self.words.update(zip(new, self._direct(new), strict=True))
        ids_of = self.words.__getitem__
        arrays = [np.fromiter(itertools.chain.from_iterable(map(ids_of, words)), self.dtype) for words in split]
        for word in new:
            if len(word) > self.LONGEST:
                del self.words[word]
        return arrays

    @staticmethod
    def _split(text: str) -> list[str]:
        # A run of white space can be a single token, so only single spaces are split. str.split is faster than the pattern.
        plain = text.isascii() and not text.endswith(" ") and not any(run in text for run in RUNS)
        parts = text.split(" ") if plain else SEAM.split(text)
        return [parts[0], *(" " + part for part in parts[1:])]


# ------------------------------------------------------------------------------------------------------- chat

# ChatML, with tools listed in the system turn and calls written as JSON between tags.
CHAT_TEMPLATE = """{{- bos_token or "" }}
{%- set head = messages[0].content if messages and messages[0].role == "system" else "" %}
{%- if head or tools %}
    {{- "<|im_start|>system\\n" + head }}
    {%- if tools %}
        {{- ("\\n\\n" if head else "") + "Tools, called as <tool_call>{\\"name\\": ..., \\"arguments\\": {...}}</tool_call>:" }}
        {%- for tool in tools %}{{ "\\n" + (tool | tojson) }}{% endfor %}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\\n" }}
        {%- if message.reasoning_content %}{{ "<think>\\n" + message.reasoning_content + "\\n</think>\\n\\n" }}{% endif %}
        {{- message.content or "" }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- "<tool_call>" + ({"name": function.name, "arguments": function.arguments} | tojson) + "</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


class Turn(NamedTuple):
    """The tokens start <= t < stop that the assistant generates in a message; the last token ends the turn."""

    message: int  # index of the message in the conversation
    start: int
    stop: int


class Conversation(NamedTuple):
    ids: list[int]
    turns: list[Turn]


def render_chat(tokenizer, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False,
                literal: bool = False, options: dict | None = None) -> Conversation:
    """Render a conversation with the tokenizer's chat template -> its ids and the assistant's turns.

    The ids are those of the whole rendering, so training and serving use the same ids. To find the turns, the conversation is
    rendered a second time with a unique mark instead of the text of each message: everything between the marks comes from the
    template. A turn starts where its prompt ends, and it stops after the end-of-turn token that follows its last mark.
    Everything in between (reasoning, tool calls and their markup) is generated by the model.

    With `literal`, control tokens in the content of messages are encoded as text, so a user cannot end a turn. `options` are
    passed to the template, such as {"enable_thinking": False}.

    [user "Hi", assistant "Yo"] -> ids of "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYo<|im_end|>\\n",
    one turn with the tokens of "Yo<|im_end|>"
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; use --chat off")
    problem = None
    if literal:
        messages = [{**message, "content": hide_special(tokenizer, message["content"])}
                    if isinstance(message.get("content"), str) else message for message in messages]
    for spelling in spellings(messages):
        try:
            text, spans = locate_turns(tokenizer, spelling, tools, add_generation_prompt, options)
        except UserError as error:
            if problem is None or "refuses" in str(problem) and "refuses" not in str(error):
                problem = error  # prefer the error of a spelling that the template renders
        else:
            break
    else:
        raise problem
    if add_generation_prompt:  # a space at its end is part of the completion's first token
        return Conversation(encode_hidden(tokenizer, text.rstrip(" ")), [])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, (starts, stops) = list(encoded.input_ids), np.array(encoded.offset_mapping).reshape(-1, 2).T
    turns = [Turn(i, int(np.searchsorted(stops, start, "right")), int(np.searchsorted(starts, stop))) for i, start, stop in spans]
    ends, last = chat_ends(tokenizer), spans[-1] if spans else Turn(0, 0, 0)
    if last.stop >= len(text.rstrip()) > 0 and not text[: last.stop].endswith(tuple(ends.tokens)):  # the last turn has no end
        end = ends.tokens[-1 if messages[last.message].get("tool_calls") else 0] if ends.tokens else tokenizer.eos_token
        if end and (ends.open_end or not ends.tokens):
            ids.append(tokenizer.convert_tokens_to_ids(end))
            turns[-1] = turns[-1]._replace(stop=len(ids))
    return Conversation(ids, turns)


HIDDEN = "\ue000{}\ue001"  # placeholder of the special token with this number, in private-use characters


def hide_special(tokenizer, text: str) -> str:
    """Replace special tokens in a text by placeholders."""
    for number, token in enumerate(special_texts(tokenizer)):
        text = text.replace(token, HIDDEN.format(number))
    return text


def encode_hidden(tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text; the placeholders of `hide_special` are encoded as text, not as special tokens."""
    special, ids = special_texts(tokenizer), []
    for i, part in enumerate(re.split(HIDDEN.format(r"(\d+)"), text)):
        hidden = i % 2 and int(part) < len(special)
        part = special[int(part)] if hidden else HIDDEN.format(part) if i % 2 else part
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=bool(hidden)).input_ids
    return ids


def special_texts(tokenizer) -> list[str]:
    """The added tokens, longest first."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return sorted(tokens, key=lambda token: (-len(token), token))


def locate_turns(tokenizer, messages: list[dict], tools: list | None, add_generation_prompt: bool,
                 options: dict | None = None) -> tuple[str, list[Turn]]:
    """The rendered text, and the assistant's turns in it as character positions."""
    text = render(tokenizer, messages, tools, add_generation_prompt, options)
    if add_generation_prompt and not any(message.get("tool_calls") for message in messages):
        return text, []
    marks = Marks(messages)
    marked = render(tokenizer, marks.messages, tools, add_generation_prompt, options)
    if (i := marks.hidden(marked)) is not None:
        part = "tool calls" if messages[i].get("tool_calls") else "text"
        raise UserError(f"message {i + 1}: the chat template does not render the {part} of the assistant")
    if add_generation_prompt:
        return text, []
    for part in marks.left_out(marked):
        say_once(f"the chat template does not render {part}, so the model is not trained on them")
    spans = marks.spans(marked, text)
    if spans is None:
        raise UserError("the chat template changes the text of messages, so the assistant's turns cannot be located")
    ends, turns, chosen = chat_ends(tokenizer), [], marks.spans_in_turns(spans)
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        rendered = [span for span in chosen if span.mark.message == i]
        first, last = rendered[0], rendered[-1]
        before = max((span.stop for span in spans if span.stop <= first.start), default=0)
        after = min((span.start for span in chosen if span.start >= last.stop), default=len(text))
        start = before + prompt_part(ends.opening, text[before : first.start])
        stop = last.stop + len(last.mark.rest) * text.startswith(last.mark.rest, last.stop)
        if end := any_of(ends.tokens).search(text, stop, after):
            stop = end.end()
        elif after == len(text):
            stop = max(stop, len(text.rstrip()))
        turns.append(Turn(i, start, stop))
    return text, turns


def any_of(strings: list[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")


@functools.lru_cache(16)
def say_once(line: str) -> None:
    say(line)


@functools.lru_cache(1024)
def prompt_part(opening: str, gap: str) -> int:
    """How many characters of the gap before an answer belong to its prompt: up to the end of what it shares with the opening.

    opening "...assistant\\n<think>\\n", gap "...assistant\\n" -> the whole gap: this answer has no reasoning
    """
    _, start, size = SequenceMatcher(None, opening, gap, autojunk=False).find_longest_match()
    return start + size if size >= max(1, len(opening) / 2) else len(gap)


class Ends(NamedTuple):
    """How a chat template ends the assistant's turns."""

    tokens: list[str]  # tokens that end a turn or a tool call
    stop: list[int]  # ids at which generation stops
    open_end: bool  # a turn ends with the next role's marker, so the last turn of a conversation has no end
    opening: str  # the generation prompt


def chat_ends(tokenizer) -> Ends:
    return _chat_ends(tokenizer, str(tokenizer.chat_template), len(tokenizer))


# ------------------------------------------------------------------------------------------------- token files


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is held out. It depends only on the hash of the text, so other data does not change it."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def framed(ids: Iterable[np.ndarray], begin: int, end: int, first: bool, dtype) -> np.ndarray:
    """Concatenate documents, each as begin, ids, end. If begin equals end, the end of a document begins the next.

    [5, 6], [7] with 1 and 2 -> 1 5 6 2 1 7 2; with 0 and 0 -> 0 5 6 0 7 0 (without the first 0 unless `first`)
    """
    parts = [np.array([begin], dtype)] if begin == end and first else []
    for document in ids:
        parts += [document, [end]] if begin == end else [[begin], document, [end]]
    return np.concatenate([np.asarray(part, dtype) for part in parts] or [np.zeros(0, dtype)])


class TokenWriter:
    """Appends documents to a file of tokens."""

    def __init__(self, path: Path, encoder: Encoder, begin: int, end: int):
        self.path, self.encoder, self.begin, self.end = path, encoder, begin, end
        self.file = open(path, "wb")
        self.tokens = self.documents = self.bytes = self.waiting = 0
        self.queue: list[str] = []

    def add(self, text: str) -> None:
        self.queue.append(text)
        self.waiting += len(text)
        if self.waiting > 2**20:
            self.flush()

    def flush(self) -> None:
        if self.queue:
            ids = framed(self.encoder(self.queue), self.begin, self.end, self.tokens == 0, self.encoder.dtype)
            ids.astype(ids.dtype.newbyteorder("<")).tofile(self.file)
            self.tokens += len(ids)
            self.documents += len(self.queue)
            self.bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in self.queue)
        self.queue, self.waiting = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()
        MODEL.sync(self.path)


def prepare(data: DataSection, tokenizer) -> None:
    """Write train_ids.bin and val_ids.bin, each with a JSON description; all files are replaced together, after success."""
    encoder, counts, seen = Encoder(tokenizer), Counter(), Seen()
    begin, end = begin_id(tokenizer), end_id(tokenizer)
    groups, held_out = data_files(data)
    recipe = token_recipe(data, tokenizer)
    with MODEL.staged(data.dir) as scratch:
        writers = {part: TokenWriter(scratch / f"{part}_ids.bin", encoder, begin, end) for part in ("train", "val")}
        spans = {"train": [], "val": []}
        for files in groups:
            starts = {part: writer.tokens for part, writer in writers.items()}
            for part, text in documents(data, files, counts, seen):
                writers[part].add(text)
            for part, writer in writers.items():
                writer.flush()
                spans[part].append([starts[part], writer.tokens])
        for _, text in documents(data, held_out, counts, seen):
            writers["val"].add(text)
        for part, writer in writers.items():
            writer.close()
            facts = {"format": 1, "dtype": np.dtype(encoder.dtype).name, "tokens": writer.tokens, "documents": writer.documents,
                     "bytes": writer.bytes, "begin": begin, "end": end, "vocab_size": len(tokenizer), "sources": spans[part],
                     "recipe": recipe}
            (scratch / f"{part}_ids.json").write_text(json.dumps(facts, indent=1))
        MODEL.write_checksums(scratch, scratch.iterdir())
        if not writers["train"].documents:
            refuse_empty(data, writers["val"].documents)
    notes = ("too short", "duplicates", "normalized", "with control characters")
    notes = "".join(f"; {key}: {counts[key]:,}" for key in notes if counts[key])
    say(f"{MODEL.counted(counts['documents'], 'document')}, {counts['bytes'] / 1e6:.2f} MB -> {writers['train'].tokens:,} "
        f"training tokens, {writers['val'].tokens:,} held out{notes}")


# ----------------------------------------------------------------------------------------------------- batches


class TokenFile(NamedTuple):
    """The tokens of a part of the data (train or val)."""

    ids: np.ndarray
    sources: list  # [start, stop) of each path in data.train
    bytes: int | None  # of text, if known
    begin: int
    end: int


class Spans:
    """Documents as (start, stop) indices into an array of ids: token i predicts token i + 1 for start <= i < stop.

    A document of n tokens (begin, text, end) has n - 1 (input, target) pairs. If begin equals end, the end of a document is
    also the beginning of the next.
    """

    weights = None  # every token is a target

    def __init__(self, tokens: TokenFile, start: int = 0, stop: int | None = None):
        self.ids = tokens.ids
        stop = len(self.ids) if stop is None else stop
        ends = np.concatenate([np.flatnonzero(self.ids[i : min(i + 2**24, stop)] == tokens.end) + i
                               for i in range(start, max(stop, start + 1), 2**24)]).astype(np.int64)
        shared = tokens.begin == tokens.end
        if shared and len(ends) and ends[0] == start:
            ends = ends[1:]
        if stop > start and (not len(ends) or ends[-1] != stop - 1):
            ends = np.append(ends, stop - 1)  # a last document without its end
        starts = np.concatenate([[start], ends[:-1] + (0 if shared else 1)]).astype(np.int64)[: len(ends)]
        whole = ends > starts
        self.starts, self.lengths = starts[whole], (ends - starts)[whole]

    @property
    def pairs(self) -> int:
        return int(self.lengths.sum())


class Examples(NamedTuple):
    """Conversations as concatenated ids, each id with its weight as a target; like `Spans`, but examples are not split."""

    ids: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray  # number of (input, target) pairs, which is the number of ids - 1

    @classmethod
    def of(cls, samples: list) -> Examples:
        """Build from objects with `ids` and `weights`."""
        sizes = np.array([len(sample.ids) for sample in samples], np.int64)
        ids = np.concatenate([np.array(sample.ids, np.int64) for sample in samples])
        weights = np.concatenate([np.array(sample.weights, np.float32) for sample in samples])
        return cls(ids, weights, np.cumsum(sizes) - sizes, sizes - 1)


# A plan assigns segments of the ids to the rows of an epoch: `count` rows, `row(i)` -> [(start, stop), ...], `spans`.


class Rows:
    """The plan of pretraining: rows of at most `length` pairs, in a random order given by `seed`.

    Packed: the documents are shuffled, concatenated and split every `length` pairs, and the rows are shuffled. A random part of
    the last row's free space is moved to the first row, so that a long document is split at different positions in each epoch.
    Every pair is in exactly one row.
    """

    def __init__(self, spans: Spans, length: int, packing: bool, seed: list[int] | None):
        self.spans, self.length, self.packing = spans, length, packing
        random = np.random.default_rng(seed) if seed is not None else None
        count = len(spans.lengths)
        self.order = random.permutation(count) if random else np.arange(count)
        lengths = spans.lengths[self.order]
        self.phase = 0
        if packing:
            self.edges = np.concatenate([[0], np.cumsum(lengths)])
            self.count = -(-int(self.edges[-1]) // length)
            if random and self.count > 1:
                self.phase = int(random.integers(0, self.count * length - int(self.edges[-1]) + 1))
        else:
            per_document = -(-lengths // length)  # a long document takes several rows
            self.edges = np.concatenate([[0], np.cumsum(per_document)])
            self.count = int(self.edges[-1])
        self.rows = random.permutation(self.count) if random else np.arange(self.count)

    def row(self, i: int) -> list[tuple[int, int]]:
        index = int(self.rows[i])
        if not self.packing:
            position = int(np.searchsorted(self.edges, index, "right")) - 1
            document, offset = self.order[position], (index - int(self.edges[position])) * self.length
            start = int(self.spans.starts[document]) + offset
            return [(start, start + min(self.length, int(self.spans.lengths[document]) - offset))]
        low = max(index * self.length - self.phase, 0)
        high = min((index + 1) * self.length - self.phase, int(self.edges[-1]))
        segments, position = [], int(np.searchsorted(self.edges, low, "right")) - 1
        while low < high:
            document, offset = self.order[position], low - int(self.edges[position])
            take = min(int(self.spans.lengths[document]) - offset, high - low)
            start = int(self.spans.starts[document]) + offset
            segments.append((start, start + take))
            low, position = low + take, position + 1
        return segments


class WholeRows:
    """The plan of fine-tuning: rows of whole examples. Packed: the shuffled examples are packed in windows of 1000, the longest
    first, each into the fullest row with enough room (best-fit decreasing, Krell 2021, section 3.1); the rows are shuffled."""

    def __init__(self, examples: Examples, length: int, packing: bool, seed: list[int] | None):
        self.spans = examples
        random = np.random.default_rng(seed) if seed is not None else None
        count = len(examples.lengths)
        order = random.permutation(count) if random else np.arange(count)
        self.members = self._packed(order, length) if packing else [[int(i)] for i in order]
        self.count = len(self.members)
        self.order = random.permutation(self.count) if random else np.arange(self.count)

    def _packed(self, order: np.ndarray, length: int) -> list[list[int]]:
        sizes, packed = self.spans.lengths, []
        for start in range(0, len(order), 1000):
            window, rows = order[start : start + 1000], []  # rows: (room, number, members), by room
            for number, i in enumerate(window[np.argsort(-sizes[window], kind="stable")]):
                best = bisect.bisect_left(rows, (int(sizes[i]),))
                room, _, members = rows.pop(best) if best < len(rows) else (length, number, [])
                members.append(int(i))
                bisect.insort(rows, (room - int(sizes[i]), number, members))
            packed += [members for _, _, members in sorted(rows, key=lambda row: row[1])]
        return packed

    def row(self, i: int) -> list[tuple[int, int]]:
        starts, lengths = self.spans.starts, self.spans.lengths
        return [(int(starts[m]), int(starts[m] + lengths[m])) for m in self.members[int(self.order[i])]]


class Mixture:
    """The plan of several sources: each row is drawn from a source with a probability proportional to its weight. A small source
    is repeated in another order."""

    def __init__(self, sources: list[Spans], weights: list[float], length: int, packing: bool, seed: list[int]):
        self.spans = sources[0]  # all of one token file
        self.plan = functools.cache(lambda source, epoch: Rows(sources[source], length, packing, [*seed, source, epoch]))
        sizes = [Rows(spans, length, packing, None).count for spans in sources]
        self.count, self.sizes = sum(sizes), sizes
        shares = np.array(weights, float) / sum(weights)
        self.source = np.random.default_rng([*seed, 1]).choice(len(sources), self.count, p=shares)
        self.draws = np.zeros(self.count, np.int64)  # number of earlier rows from the row's source
        for source in range(len(sources)):
            self.draws[self.source == source] = np.arange((self.source == source).sum())

    def row(self, i: int) -> list[tuple[int, int]]:
        source = int(self.source[i])
        epoch, number = divmod(int(self.draws[i]), self.sizes[source])
        return self.plan(source, epoch).row(number)


def collate(spans, rows: list[list[tuple[int, int]]], width: int | None = None) -> dict:
    """Rows of segments -> a batch with these keys; all tensors are (B, T):

    input_ids, targets    token i predicts targets[i]; -100 is ignored
    positions             position of each token in its segment; -1 is padding
    segment_ids           number of each token's segment; segments do not attend to each other
    weights               weight of each target in the loss
    counts                "tokens": the sum of the targets' weights; with weights also the numbers of "targets" and "read" tokens

    Positions and segment_ids are None if every row is one full segment: then causal attention without them is the same and
    faster. Weights are None if every token is a target.
    """
    longest = max((sum(stop - start for start, stop in row) for row in rows), default=0)
    width = width or max(longest, 1)
    shape = (len(rows), width)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    positions, segments = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    weights = None if spans.weights is None else np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        filled = 0
        for segment, (start, stop) in enumerate(row):
            part = slice(filled, filled + stop - start)
            inputs[r, part], targets[r, part] = spans.ids[start:stop], spans.ids[start + 1 : stop + 1]
            positions[r, part], segments[r, part] = np.arange(stop - start), segment
            if weights is not None:
                weights[r, part] = spans.weights[start + 1 : stop + 1]
            filled += stop - start
    counts = {"tokens": int((positions >= 0).sum())}
    if weights is not None:
        targets[weights == 0] = -100
        counts = {"tokens": float(weights.sum()), "targets": int((weights != 0).sum()), "read": counts["tokens"]}
    if all(len(row) == 1 and row[0][1] - row[0][0] == width for row in rows):
        positions = segments = None
    arrays = dict(input_ids=inputs, targets=targets, positions=positions, segment_ids=segments, weights=weights)
    return {**{name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}, "counts": counts}


def data_fingerprint(sources: list) -> str:
    """A digest of the ids, weights and positions of `Spans` or `Examples`; above 2^28 ids, of 64 samples of 2^22 ids."""
    digest = hashlib.blake2b(digest_size=16)
    for spans in sources:
        for start in range(0, len(spans.ids), max(2**22, len(spans.ids) // 64)):
            digest.update(np.ascontiguousarray(spans.ids[start : start + 2**22]).astype("<i4").tobytes())
        for array in (spans.weights, spans.starts, spans.lengths):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class TokenStream:
    """An infinite iterator of batches for `TRAIN.fit`; the order depends only on (seed, epoch).

    One optimizer step takes the next batch_size * grad_accum * world_size rows, in the same order for any number of processes;
    the last step of an epoch has fewer. `blocks(epoch)` yields the sources of the rows: once for a token file; many times when
    streaming from text (then the steps of an epoch are not `counted`). `plan(sources, seed)` splits them into rows. In addition
    to `collate`'s keys, a batch has a `place`: (epoch, block, number of its first row). `identify()` is a digest of the data; a
    resumed run prints a message if it changed.
    """

    def __init__(self, blocks: Callable, plan: Callable, batch_size: int, length: int, counted: bool = True,
                 identify: Callable[[], str] | None = None):
        self.blocks, self.make_plan, self.batch_size, self.length, self.counted = blocks, plan, batch_size, length, counted
        self.steps_per_epoch = None
        self.identify = functools.cache(identify or (lambda: data_fingerprint(next(iter(blocks(0))))))

    def start(self, run) -> None:
        self.run = run
        self.per_step = self.batch_size * run.grad_accum * run.world_size
        self.width = self.length if getattr(run, "static_shapes", False) else None
        self._seek(0, 0, 0)
        if self.counted:
            self.steps_per_epoch = -(-self.plan.count // self.per_step)

    def _plans(self) -> Iterator:
        """The plans of all blocks, starting with the current block."""
        while True:
            for sources in itertools.islice(self.blocks(self.epoch), self.block, None):
                yield self.make_plan(sources, [self.run.seed, self.epoch, self.block])
                self.block += 1
            self.epoch, self.block = self.epoch + 1, 0

    def __next__(self) -> dict:
        if not self.queue:
            if self.next_row >= self.plan.count:
                self.plan, self.next_row = next(self.plans), 0
            run, size = self.run, self.batch_size
            for micro in range(run.grad_accum):
                first = self.next_row + (micro * run.world_size + run.rank) * size
                batch = self.make(range(first, min(first + size, self.plan.count)))
                self.queue.append({**batch, "place": (self.epoch, self.block, first)})
            self.next_row += self.per_step
        return self.queue.pop(0)

    def make(self, numbers: range) -> dict:
        """The batch of these rows, padded to one row, or to batch_size rows if shapes must be static."""
        rows = [self.plan.row(i) for i in numbers]
        fill = (self.batch_size if self.width else 1) - len(rows)
        return collate(self.plan.spans, rows + [[]] * fill, self.width)

    def state_dict(self) -> dict:
        """The position, at a step boundary."""
        return {"epoch": self.epoch, "block": self.block, "next_row": self.next_row, "data": self.identify()}

    def load_state_dict(self, state: dict) -> None:
        if state["data"] != self.identify() and self.run.rank == 0:
            say("the training data changed after the checkpoint was saved, so the resumed run will differ")
        self._seek(state["epoch"], state["block"], state["next_row"])

    def _seek(self, epoch: int, block: int, next_row: int) -> None:
        self.epoch, self.block, self.next_row = epoch, block, next_row
        self.queue: list[dict] = []
        self.plans = self._plans()
        self.plan = next(self.plans)


# ======================================================================================================= edges

# -- chat templates

MARKUP = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")  # templates parse this markup in contents, so it is not replaced by marks
REASONING = ("reasoning_content", "reasoning", "thinking")


def spellings(messages: list[dict]) -> Iterator[list[dict]]:
    """Variants of a conversation for templates: tool calls with empty or null content, with arguments as an object or JSON."""
    yield messages
    for content, as_text in ((None, False), ("", True), (None, True)) if any(m.get("tool_calls") for m in messages) else ():
        spelled = [dict(message) for message in messages]
        for message in (message for message in spelled if message.get("tool_calls")):
            message["content"] = message.get("content") or content
            arguments = [call.get("function", call).get("arguments") or {} for call in message["tool_calls"]]
            message["tool_calls"] = [with_function(call, arguments=json.dumps(value) if as_text else value)
                                     for call, value in zip(message["tool_calls"], arguments, strict=True)]
        yield spelled


def with_function(call: dict, **changes) -> dict:
    """A copy of a tool call with its function changed."""
    return {**call, "function": {**call["function"], **changes}} if "function" in call else {**call, **changes}


def render(tokenizer, messages: list[dict], tools: list | None, add_generation_prompt: bool = False,
           options: dict | None = None) -> str:
    # As transformers does from 5.23 on: templates handle a missing key, but few handle None.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False,
                                             **(options or {}))
    except Exception as error:  # templates can raise any exception
        raise UserError(f"the chat template refuses this conversation ({first_line(error)})") from None
    return checked(text, "the conversation")  # names and arguments of tools included


class Mark(NamedTuple):
    number: int
    message: int
    text: str  # the replaced text
    optional: bool  # reasoning, which templates may leave out
    rest: str  # markup after the replaced text


class Marks:
    """A copy of a conversation with a unique mark for each text: {"content": "Hi <b>you</b>"} -> "zq0z <b>zq1z</b>"."""

    def __init__(self, messages: list[dict]):
        self.marks: dict[str, Mark] = {}
        self.stem, text = "zq", json.dumps(messages, ensure_ascii=False)
        while self.stem in text:
            self.stem += "q"
        self.pattern = re.compile(f"{self.stem}\\d+z")
        self.messages = [self._message(i, message) for i, message in enumerate(messages)]

    def _message(self, i: int, message: dict) -> dict:
        marked = dict(message)
        for key in ("content", *REASONING):
            if isinstance(message.get(key), str):
                marked[key] = self._replaced(i, message[key], key in REASONING)
        if message.get("tool_calls"):
            count = len(self.marks)
            marked["tool_calls"] = self._inside(i, message["tool_calls"])
            if len(self.marks) == count:  # no argument is a string, so mark the names
                marked["tool_calls"] = [with_function(call, name=self._mark(i, call.get("function", call)["name"]))
                                        for call in message["tool_calls"]]
        return marked

    def _inside(self, i: int, value, key: str = ""):
        if isinstance(value, dict):
            return {name: inner if key != "arguments" and name in ("type", "id", "name") else self._inside(i, inner, name)
                    for name, inner in value.items()}
        if isinstance(value, list):
            return [self._inside(i, inner, key) for inner in value]
        return self._replaced(i, value) if isinstance(value, str) else value

    def _replaced(self, i: int, text: str, optional: bool = False) -> str:
        reasoning_end, parts, position = text.rfind("</think>"), MARKUP.split(text), 0
        if not any(part.strip() and not MARKUP.fullmatch(part) for part in parts):
            parts = [text]  # only markup
        for number, part in enumerate(parts):
            stripped, start = part.strip(), position
            position += len(part)
            if stripped and (len(parts) == 1 or not MARKUP.fullmatch(part)):
                rest = text[start + part.index(stripped) + len(stripped) :].rstrip()
                mark = self._mark(i, stripped, optional or start < reasoning_end, rest)
                parts[number] = part.replace(stripped, mark, 1)
        return "".join(parts)

    def _mark(self, i: int, text: str, optional: bool = False, rest: str = "") -> str:
        name = f"{self.stem}{len(self.marks)}z"
        self.marks[name] = Mark(len(self.marks), i, text, optional, rest)
        return name

    def hidden(self, marked: str) -> int | None:
        """The first assistant message whose rendering lacks more than reasoning."""
        rendered = {self.marks[name] for name in self.pattern.findall(marked)}
        for i in (i for i, message in enumerate(self.messages) if message["role"] == "assistant"):
            marks = {mark for mark in self.marks.values() if mark.message == i}
            if not rendered & marks or any(not mark.optional for mark in marks - rendered):
                return i
        return None

    def left_out(self, marked: str) -> list[str]:
        """Names of the parts that are not rendered. Reasoning is checked in the last answer only: templates drop it in others."""
        rendered = {self.marks[name].message for name in self.pattern.findall(marked)}
        nonempty = {mark.message for mark in self.marks.values()}
        lost = {self.messages[i]["role"]: i for i in nonempty - rendered if self.messages[i]["role"] != "assistant"}
        names = [f"{role} messages" for role in lost]
        last = max((i for i in nonempty if self.messages[i]["role"] == "assistant"), default=-1)
        reasoning = {name for name, mark in self.marks.items() if mark.message == last and mark.optional}
        return names + ["reasoning"] * (bool(reasoning) and reasoning.isdisjoint(self.pattern.findall(marked)))

    def spans(self, marked: str, text: str) -> list[Span] | None:
        """The span of each mark's text in the real rendering; None if the two renderings differ in anything else."""
        spans, position, literals, names = [], 0, self.pattern.split(marked), self.pattern.findall(marked)
        for literal, name in zip(literals, [*names, None], strict=True):
            if not text.startswith(literal, position):
                return None
            position += len(literal)
            if name:
                original = self.marks[name].text
                escaped = (json.dumps(original, ensure_ascii=plain)[1:-1] for plain in (False, True))
                found = next((form for form in itertools.chain([original], escaped) if text.startswith(form, position)), None)
                if found is None:
                    return None
                spans.append(Span(self.marks[name], position, position + len(found)))
                position += len(found)
        return spans if position == len(text) else None

    def spans_in_turns(self, spans: list[Span]) -> list[Span]:
        """The span of each mark in its message's turn; a template may repeat the text before the turn (a summary) or after it."""
        result, last = [], 0
        for i in range(len(self.messages)):
            chosen: dict[Mark, Span] = {}
            candidates = [span for span in spans if span.mark.message == i]
            for span in sorted(candidates, key=lambda span: (span.start < last, span.start)):
                chosen.setdefault(span.mark, span)
            last = max([last, *(span.stop for span in chosen.values())])
            result += chosen.values()
        return sorted(result, key=lambda span: span.start)


class Span(NamedTuple):
    """The text of a mark, as character positions in the real rendering."""

    mark: Mark
    start: int
    stop: int


@functools.lru_cache(16)
def _chat_ends(tokenizer, template: str, size: int) -> Ends:
    """Render a few conversations to find the added tokens that follow an answer.

    Most templates have a single end-of-turn token ("<|im_end|>"). In some, the marker of the next role ends an answer (GLM:
    "<|user|>" after an answer, "<|observation|>" after a call). Some use another token at the end of the conversation (gpt-oss:
    "<|end|>", but "<|return|>" at the end) or after a call ("<|call|>").
    """
    added = any_of([token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()])

    def rendering(messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        try:
            return render(tokenizer, messages, tools, add_generation_prompt)
        except UserError:
            return ""

    def between(text: str, first: str, last: str = "\0") -> list[str]:
        """The added tokens between two marks."""
        return added.findall(text.partition(last)[0].rpartition(first)[2]) if first in text else []

    def turn(role: str, content: str, **more) -> dict:
        return {"role": role, "content": content, **more}

    chat = [turn("user", "zq0z"), turn("assistant", "zq1z"), turn("user", "zq2z"), turn("assistant", "zq3z")]
    whole, prompt = rendering(chat), rendering(chat[:1], None, True)
    middle, last = between(whole, "zq1z", "zq2z"), between(rendering(chat[:2]), "zq1z")
    if prompt == rendering(chat[:1]):  # an opening follows every message, so it is not the end of a turn
        first = added.findall(whole.partition("zq0z")[0])
        middle = middle[: len(middle) - len(os.path.commonprefix([first[::-1], middle[::-1]]))] or middle
    ends = os.path.commonprefix([middle, last])[-1:] or middle[:1] + last[:1]
    by_next_role, calls = not last, []

    call = {"type": "function", "function": {"name": "zqname", "arguments": {"key": "zq1z"}}}
    schema = {"type": "object", "properties": {"key": {"type": "string", "description": "zq"}}}
    tools = [{"type": "function", "function": {"name": "zqname", "description": "zq", "parameters": schema}}]
    for spelled in spellings([chat[0], turn("assistant", "", tool_calls=[call]), turn("tool", "zq2z", name="zqname"), chat[3]]):
        whole = rendering(spelled, tools)
        if "zq1z" in whole:
            middle, last = between(whole, "zq1z", "zq2z"), between(rendering(spelled[:2], tools), "zq1z")
            common = os.path.commonprefix([middle, last])
            if not set(middle) & set(ends):
                calls = middle[len(common) :][:1] if by_next_role else common[-1:] or middle[:1]
            break

    reasoning = rendering([chat[0], turn("assistant", "zq1z", **dict.fromkeys(REASONING, "zq2z"))])
    inside = between(reasoning, "zq2z", "zq1z")  # these also occur within a turn, so generation does not stop at them
    stop = [tokenizer.convert_tokens_to_ids(token) for token in [*ends, *calls] if token not in inside]
    return Ends([*ends, *calls], stop, by_next_role, prompt.partition("zq0z")[2])


class Markup(NamedTuple):
    """The format of reasoning and tool calls in a chat template."""

    think: tuple[str, str] | None  # tags around the reasoning, such as ("<think>", "</think>")
    call: list[str] | None = None  # the text around the parts of a call; the first string begins a call
    form: str = ""  # the parts: "json" (name and arguments), "named" (name, arguments as JSON), "pairs" (name, key, value, ...)
    arguments: str = "arguments"  # key of the arguments in "json"


def answer_markup(tokenizer) -> Markup:
    return _answer_markup(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(16)
def _answer_markup(tokenizer, template: str) -> Markup:
    """Render an answer with a tool call to find the format: {"name": "zqname", "arguments": {"zqkey": ...}}, or XML-like text."""
    think = next(((first, last) for first, last in (("<think>", "</think>"), ("[THINK]", "[/THINK]")) if last in template), None)
    marks = ["zqname", "zqkeya", "zqvaluea", "zqkeyb", "zqvalueb"]
    call = {"type": "function", "id": "zqidzqid0", "function": {"name": marks[0], "arguments": dict([marks[1:3], marks[3:]])}}
    schema = {"type": "object", "properties": {key: {"type": "string", "description": "zq"} for key in marks[1::2]}}
    tools = [{"type": "function", "function": {"name": marks[0], "description": "zq", "parameters": schema}}]
    for spelled in spellings([{"role": "user", "content": "zq"}, {"role": "assistant", "content": "", "tool_calls": [call]}]):
        try:
            text, prompt = render(tokenizer, spelled, tools), render(tokenizer, spelled[:1], tools, True)
        except UserError:
            continue
        begin = len(os.path.commonprefix([text, prompt]).rstrip("<|\uff5c["))
        answer = text[begin:].rpartition(think[1] if think else "\0")[2].lstrip()
        answer = any_of([*chat_ends(tokenizer).tokens, "\0"]).split(answer)[0].rstrip()
        for found in re.finditer(r"\[?\{", answer):
            with suppress(ValueError, AttributeError):
                value, stop = json.JSONDecoder().raw_decode(answer, found.start())
                value = value[0] if isinstance(value, list) else value
                if value.get("name") == marks[0] and "zq" not in answer[: found.start()]:
                    key = "parameters" if "parameters" in value else "arguments"
                    return Markup(think, [answer[: found.start()], answer[stop:]], "json", key)
        found = re.fullmatch("(.+)" + "(.+)".join(marks) + "(.*)", answer, re.S)
        if found and "zq" not in "".join(found.groups()) and not found[1].endswith("["):
            if found[2].endswith('{"'):
                return Markup(think, [found[1], found[2][:-2], found[6]], "named")
            return Markup(think, list(found.groups()), "pairs")
    return Markup(think)


def parse_calls(markup: Markup, text: str, tools: list[dict] = ()) -> list[tuple[str, dict]]:
    """The (name, arguments) of the tool calls in an answer; incomplete calls are skipped. If the template writes values as plain
    text, the schemas of `tools` decide which arguments are strings."""
    first, *rest = [r"\s*".join(["", *map(re.escape, part.split()), ""]) for part in markup.call or [""]]
    calls = []

    def json_at(position: int):
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, position)[0]

    if markup.form == "json":
        for found in itertools.islice(re.finditer(first + r"(?=[\[{])", text), None if first else 1):
            values = json_at(found.end())
            values = values if isinstance(values, list) else [values]
            calls += [(value.get("name"), value.get(markup.arguments)) for value in values if isinstance(value, dict)]
    elif markup.form == "named":
        for found in re.finditer(first + "(.+?)" + rest[0] + r"(?=\{)", text):
            calls.append((found[1], json_at(found.end())))
    elif markup.form == "pairs":
        after_name, after_key, between, _, after = rest
        schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}).get("properties", {}) for tool in tools}
        for name, body in re.findall(f"{first}(.+?){after_name}(.*?){after}", text, re.S):
            arguments = dict(re.findall(f"(.+?){after_key}(.*?)(?:{between}|$)", body, re.S))
            for key in arguments.keys() & schemas.get(name, {}).keys():
                if isinstance(schemas[name][key], dict) and schemas[name][key].get("type") != "string":
                    with suppress(ValueError):
                        arguments[key] = json.loads(arguments[key])
            calls.append((name, arguments))
    return [(name, arguments) for name, arguments in calls if isinstance(name, str) and isinstance(arguments, dict)]


def ids_after_calls(tokenizer, results: list[tuple[str, str]], tools: list) -> list[int]:
    """Results (name, text) of the calls in an answer -> the ids of the chat template between this answer and the next.
    Control tokens in the results are encoded as text.

    [("add", "5")] -> ids of "\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n"
    """
    calls = [{"type": "function", "id": f"{i:09d}", "function": {"name": name, "arguments": {"key": "zq"}}}
             for i, (name, _) in enumerate(results)]
    messages = [{"role": "user", "content": "zq"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    def replies(texts: list[str]) -> list[dict]:
        return [{"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": text}
                for call, text in zip(calls, texts, strict=True)]

    for spelled in spellings(messages):
        with suppress(UserError):
            text, [turn] = locate_turns(tokenizer, [*spelled, *replies(["zq"] * len(calls))], tools, False)
            whole = render(tokenizer, [*spelled, *replies([hide_special(tokenizer, text) for _, text in results])], tools, True)
            if whole.startswith(text[: turn.stop]):
                return encode_hidden(tokenizer, whole[turn.stop :].rstrip(" "))
    raise UserError("the chat template does not render the results of tool calls")


def ensure_chat(tokenizer) -> None:
    """Give a tokenizer without a chat template the default one; its tokens are appended, so the model may have to grow."""
    if not tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in CHAT_TOKENS if token not in vocabulary], special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE


def end_with_turns(model, tokenizer) -> None:
    """Add the tokens that end the assistant's turns in the chat template to the model's end-of-text ids."""
    if not tokenizer.chat_template:
        return
    ends = chat_ends(tokenizer)
    if not ends.tokens:
        say("the chat template has no end-of-turn token, so only the last turn of each conversation is trained to end (with "
            f"{tokenizer.eos_token or 'nothing'}); set stop strings for generation, or use another template")
    if new := [i for i in ends.stop if i not in model.config.eos_ids]:
        model.config.eos_token_id = [*new, *model.config.eos_ids]


# -- documents and streams


def splitter(data: DataSection, files: list[Path]) -> Callable[[int, int, int, str], list[tuple[str, str]]]:
    """Return split(file number, document number, characters before it, text) -> [("train" or "val", text), ...].

    `hash` decides by each text's hash; `tail` holds out the last documents. If there is only one document (a book), both hold
    out its tail, split at a line end.
    """

    def read(path: Path) -> Iterator[str]:
        return read_documents(path, data.text_unit, data.text_field)

    if data.validation not in ("hash", "tail"):
        return lambda file, number, before, text: [("train", text)]
    is_text = not any(suffix_of(path) in RECORDS for path in files)
    book = len(files) == 1 and is_text and data.text_unit == "file"
    book = book or len(list(itertools.islice(itertools.chain.from_iterable(map(read, files)), 2))) == 1
    if data.validation == "hash" and not book:
        return lambda file, number, before, text: [("val" if is_held_out(text, data.validation_fraction) else "train", text)]
    sizes = [sum(len(text) if book else 1 for text in read(path)) for path in files]  # characters of a book, else documents
    held = max(1, round(sum(sizes) * data.validation_fraction))
    starts = np.cumsum([0, *sizes]) - (sum(sizes) - held)  # of each file, relative to the start of the held-out part

    def split(file: int, number: int, before: int, text: str) -> list[tuple[str, str]]:
        if not book:
            return [("val" if starts[file] + number >= 0 else "train", text)]
        cut = min(max(-int(starts[file]) - before, 0), len(text))
        cut = text.rfind("\n", 0, cut) + 1 or cut
        return [(part, half) for part, half in (("train", text[:cut]), ("val", text[cut:])) if half]

    return split


def documents(data: DataSection, files: list[Path], counts: Counter, seen: Seen | None = None, share: float = math.inf,
              split: Callable | None = None) -> Iterator[tuple[str, str]]:
    """Yield ("train" or "val", text) for each cleaned document of the files, up to `share` characters per file."""
    seen = (seen or Seen()) if data.deduplicate else None
    split = split or splitter(data, files)
    for file, path in enumerate(files):
        single_lines = suffix_of(path) not in RECORDS and data.text_unit == "line"
        before = taken = 0
        for number, raw in enumerate(read_documents(path, data.text_unit, data.text_field)):
            if taken > share:
                break
            text, before = clean(raw, data, counts), before + len(raw)
            if len(text.strip()) < data.min_chars:
                counts["too short"] += 1
            elif seen and not single_lines and not seen.add(text):
                counts["duplicates"] += 1
            else:
                for part, content in split(file, number, before - len(raw), text):
                    counts["documents"] += 1
                    counts["bytes"] += len(content.encode("utf-8", "surrogatepass"))
                    taken += len(content)
                    yield part, content


def refuse_empty(data: DataSection, held_out: int) -> None:
    if held_out and data.validation in ("hash", "tail"):
        raise UserError(f"data.validation: {data.validation} holds out all of data.train ({MODEL.counted(held_out, 'document')})"
                        "; set it to none or to a file")
    raise UserError("data.train: contains no text to train on")


def rows_plan(data: DataSection, length: int) -> Callable:
    return lambda sources, seed: Rows(*sources, length, data.packing, seed)


class Shuffled:
    """The rows of a plan in another order in each epoch; `order[i]` is the number of row i in the plan."""

    def __init__(self, plan, seed: list[int]):
        self.plan, self.spans, self.count = plan, plan.spans, plan.count
        self.order = np.random.default_rng([*seed, 2]).permutation(plan.count)

    def row(self, i: int) -> list[tuple[int, int]]:
        return self.plan.row(int(self.order[i]))


def cut_once(plan: Callable) -> Callable:
    """The same plan with the same rows in every epoch, so that a row's cached data (a teacher's logits) can be reused."""
    return lambda sources, seed: Shuffled(plan(sources, [0]), seed)


def file_stream(tokens: TokenFile, data: DataSection, batch_size: int, length: int) -> TokenStream:
    """The training stream of a token file."""
    if Spans(tokens).pairs < 1:
        raise UserError("data.train: contains no text to train on (fewer than 2 tokens)")
    if not data.weights:
        spans = Spans(tokens)
        return TokenStream(lambda epoch: [[spans]], rows_plan(data, length), batch_size, length)
    # If begin equals end, a source begins with the end of the previous source.
    shared = tokens.begin == tokens.end
    sources = [Spans(tokens, start - (shared and start > 0 and stop > start), stop) for start, stop in tokens.sources]
    if len(sources) != len(data.weights):
        raise UserError(f"data.weights: expected one per source of the token file ({len(sources)}), found {len(data.weights)}")
    if not all(spans.pairs for spans in sources):
        raise UserError("data.weights: a path in data.train contains no text to train on; remove it")
    plan = lambda sources, seed: Mixture(sources, data.weights, length, data.packing, seed)  # noqa: E731
    return TokenStream(lambda epoch: [sources], plan, batch_size, length)


def text_stream(data: DataSection, tokenizer, batch_size: int, length: int, buffer_bytes: int = 2**23) -> TokenStream:
    """Batches tokenized on the fly: text is read in order in blocks of about 8 MB, and each block is shuffled."""
    if data.weights:
        raise UserError("data.weights: requires data.streaming false")
    if any(name.endswith(".bin") for name in data.train):
        raise UserError("data.streaming: token files (.bin) cannot be streamed; leave it out, or give text files")
    encoder = Encoder(tokenizer)
    files = list(itertools.chain.from_iterable(data_files(data)[0]))
    split = splitter(data, files)

    def blocks(epoch: int) -> Iterator[list[Spans]]:
        texts, size, found, held_out = [], 0, False, 0
        for part, text in documents(data, files, Counter(), split=split):
            if part == "val":
                held_out += 1
                continue
            texts.append(text)
            size += len(text)
            if size >= buffer_bytes:
                yield [Spans(tokens_of(texts, tokenizer, encoder))]
                texts, size, found = [], 0, True
        if texts:
            yield [Spans(tokens_of(texts, tokenizer, encoder))]
        elif not found:
            refuse_empty(data, held_out)

    return TokenStream(blocks, rows_plan(data, length), batch_size, length, False, partial(MODEL.files_fingerprint, files))


def tokens_of(texts: list[str], tokenizer, encoder: Encoder) -> TokenFile:
    begin, end = begin_id(tokenizer), end_id(tokenizer)
    ids = framed(encoder(texts), begin, end, True, encoder.dtype)
    return TokenFile(ids, [], sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), begin, end)


def held_out_tokens(data: DataSection, tokenizer, limit: int) -> TokenFile | None:
    """For streaming: the first held-out documents, about `limit` characters in total."""
    groups, held_out = data_files(data)
    texts, size = [], 0
    for files, wanted in ((list(itertools.chain.from_iterable(groups)), "val"), (held_out, "train")):
        for part, text in documents(data, files, Counter()) if files else ():
            if part == wanted and size < limit:
                texts.append(text)
                size += len(text)
            if size >= limit:
                break
    return tokens_of(texts, tokenizer, Encoder(tokenizer)) if texts else None


def fixed_batches(plan, batch_size: int, limit: int | None = None) -> list[dict]:
    """Batches for validation: the same rows in the same order each time; `limit` batches are spread over the whole plan."""
    chosen = np.arange(plan.count)
    if limit is not None and plan.count > limit * batch_size:
        chosen = np.linspace(0, plan.count - 1, limit * batch_size).astype(int)
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [collate(plan.spans, [plan.row(int(i)) for i in group]) for group in groups]


# -- tokenizer folders


def load(name: str | Path):
    """Load the tokenizer of a folder or hub name, as transformers does."""
    folder = resolve_folder(str(name), "tokenizer.name")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).exists() for name in names):
        newest = max(folder.glob("ckpt-step-*"), default=None)
        hint = f"use the newest checkpoint of this unfinished run, {newest}" if newest else "set --tokenizer.name"
        raise UserError(f"{folder}: contains no tokenizer (tokenizer.json is missing); {hint}")
    facts = read_json(folder / names[1]) if (folder / names[1]).exists() else {}
    generic = facts.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    if generic and (folder / names[0]).exists():  # AutoTokenizer would take two seconds to find this class
        from transformers import PreTrainedTokenizerFast as Loader
    else:
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(folder)
    except Exception as error:  # a damaged tokenizer.json raises Exception itself
        reason = MODEL.first_line(error) if (folder / names[0]).exists() or not generic else f"{names[0]} is missing"
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: {type(tokenizer).__name__} is a slow tokenizer (Python only); convert it to tokenizer.json")
    plain_settings(tokenizer)
    return tokenizer


def plain_settings(tokenizer) -> None:
    """Disable padding and truncation, which tokenizer.json contains if they were enabled when it was saved, and the warning about
    long texts: the programs report texts that exceed a model's context."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # no warning


def save(tokenizer, folder: str | Path, context: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is a chat template, chat_template.jinja. `context`: context
    length of the model in tokens."""
    plain_settings(tokenizer)
    with MODEL.staged(folder) as scratch:
        tokenizer.save_pretrained(scratch)
        path = scratch / "tokenizer_config.json"
        facts = {key: value for key, value in read_json(path).items() if key not in ("is_local", "local_files_only")}
        length = context or facts.pop("model_max_length", None) or math.inf
        facts |= {"model_max_length": length} if length < 1e29 else {}  # transformers writes 1e30 for an unknown length
        path.write_text(json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def of_model(name: str, adapter: str | None = None, named: str | None = None):
    """The tokenizer `named`; if None, that in the adapter's folder, or the model's."""
    name, adapter = MODEL.base_and_adapter(name, adapter)
    folder = adapter if adapter and (Path(adapter) / "tokenizer_config.json").exists() else name
    tokenizer = load(named or folder)
    if named:
        say_foreign(tokenizer, named, folder)
    return tokenizer


def of_run(config, checkpoint: Path | None = None):
    """The tokenizer of a run: that of its checkpoint, or that of its settings."""
    adapter = getattr(config.actions, "adapter", None)
    return load(checkpoint) if checkpoint else choose(config.tokenizer, config.data, config.model.name, adapter)


def open_model(section: ModelSection, tokenizer=None, adapter: str | None = None, key: str = "model.name",
               head: str | tuple | None = None, labels: list | None = None, seed: int = 0, grow: bool = False) -> tuple:
    """(model, tokenizer) of a `model` section: its trained model in eval mode, or its preset with random weights.

    The folder of an adapter is resolved to its base model and the adapter. Without `tokenizer`, the model's tokenizer is loaded.
    `head` is passed to `MODEL.load`, but a trained model without a language-model head is an error; `labels` are the label names
    of a score head. `grow` adds rows for the tokenizer's new tokens. Errors name the setting `key`.
    """
    changes = MODEL.overrides(section) | ({"labels": labels} if labels else {})
    if section.name:
        name, adapter = MODEL.base_and_adapter(section.name, adapter, key)
        tokenizer = of_model(name, adapter) if tokenizer is None else tokenizer
        heads = MODEL.folder_heads(read_json(resolve_folder(name) / "config.json"))
        if "lm" in (head or ()) and ("lm" not in heads or adapter and MODEL.adapter_labels(resolve_folder(adapter))):
            raise UserError(f"{key}: {section.name} has no language-model head, only a classification or reward head; use the "
                            "model that it was trained from")
        model = MODEL.load(name, section.dtype, MODEL.choose_device(section.device), section.attn_implementation, head, seed,
                           changes, adapter, section.quantization)
        if adapter and "lm" in model.heads:
            end_with_turns(model, tokenizer)
        if grow:
            MODEL.grow_vocabulary(model, vocab_size(tokenizer))
    else:
        special = {"bos_token_id": begin_id(tokenizer), "eos_token_id": end_id(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        knobs = {"vocab_size": vocab_size(tokenizer), **special, **changes}
        model = MODEL.build(MODEL.preset_config(section.preset, **knobs), head or "lm", seed,
                            attn_implementation=section.attn_implementation)
        MODEL.say_portability(model.config)
        for name in special.keys() & changes:
            for i in changes[name] if isinstance(changes[name], list) else [changes[name]]:
                if not 0 <= i < model.config.vocab_size:
                    raise UserError(f"model.{name}: {i} must be a token id below vocab_size {model.config.vocab_size}")
    if model.config.vocab_size < (size := vocab_size(tokenizer)):
        where = f"{key}: {section.name}: vocab_size" if section.name else "model.vocab_size:"
        raise UserError(f"{where} {model.config.vocab_size} is smaller than the tokenizer's vocabulary size {size}")
    if not model.config.eos_ids and tokenizer.eos_token_id is not None:
        model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def say_foreign(tokenizer, name: str, folder: str) -> None:
    """Print a warning if the model in this folder was trained with another tokenizer."""
    with suppress(UserError):  # a folder without a tokenizer
        known, vocabulary = load(folder).get_vocab(), tokenizer.get_vocab()
        other = sum(known.get(token) != i for token, i in vocabulary.items())
        if other or len(known) != len(vocabulary):
            say(f"tokenizer.name: {name} is not the tokenizer of {folder}: {other:,} of its {len(vocabulary):,} tokens have "
                "other ids in the model's tokenizer")


def choose(section: TokenizerSection, data: DataSection, model: str | None = None, adapter: str | None = None):
    """The named tokenizer, that of the model or its adapter, or one trained on the data (kept in data.dir/tokenizer)."""
    if model or section.name:
        return of_model(model, adapter, section.name) if model else load(section.name)
    folder = Path(data.dir) / "tokenizer"
    if any(name.endswith(".bin") for name in data.train):
        path = Path(data.train[0]).parent / "tokenizer"
        if not path.exists():
            raise UserError(f"{data.train[0]}: token ids without their tokenizer; name it with --tokenizer.name")
        return load(path)
    code = hashlib.blake2b((code_of(KINDS[section.kind]) + code_of(train)).encode(), digest_size=16).hexdigest()
    recipe = {"kind": section.kind, "code": code, "vocab_size": section.vocab_size, "data": data_recipe(data)}
    stamp = folder / "trained_on.json"
    if stamp.exists() and not MODEL.damage(folder) and read_json(stamp) == recipe:
        return load(folder)
    texts = sample_texts(data)
    first = next(texts, None)
    if first is None:
        raise UserError(f"data.train: no text in {' '.join(data.train)}")
    say(f"training a {section.kind} tokenizer")
    tokenizer = train(itertools.chain([first], texts), section.vocab_size, section.kind)
    if len(tokenizer) < 2 or tokenizer.backend_tokenizer.get_vocab_size() < 2:
        raise UserError("data.train: no text to train a tokenizer on")
    with MODEL.staged(folder) as scratch:
        save(tokenizer, scratch)
        (scratch / stamp.name).write_text(json.dumps(recipe, indent=1))
        MODEL.write_checksums(scratch, scratch.iterdir())
    return tokenizer


def sample_texts(data: DataSection, limit: int = 64_000_000, part: str = "train") -> Iterator[str]:
    """Training or held-out ("val") texts: an equal share from the start of each file, at most `limit` characters in total."""
    groups, held_out = data_files(data)
    groups = [held_out] if held_out and part == "val" else groups
    share = limit // sum(map(len, groups))
    for files in groups:
        yield from (text for found, text in documents(data, files, Counter(), share=share) if found == part or files is held_out)


# -- token files


def token_files(data: DataSection, tokenizer) -> dict[str, TokenFile]:
    """The training tokens and, if there are any, the held-out tokens: {"train": ..., "val": ...}."""
    names = data.train
    if len(names) == 1 and names[0].endswith(".bin"):
        path = Path(names[0])
        val_path = path.with_name(path.name.replace("train", "val"))
        files = {"train": open_tokens(path, tokenizer)}
        if data.validation not in ("hash", "tail", "none"):
            if not data.validation.endswith(".bin"):
                raise UserError(f"data.validation: {data.validation} must be a token file (.bin), as data.train is one")
            files["val"] = open_tokens(Path(data.validation), tokenizer)
        elif data.validation != "none" and val_path != path and val_path.exists():
            files["val"] = open_tokens(val_path, tokenizer)
        return files
    if any(name.endswith(".bin") for name in names):
        raise UserError("data.train: a token file (.bin) must be the only path; it cannot be mixed with other files")
    folder = Path(data.dir)
    if not fits(folder, data, tokenizer):
        prepare(data, tokenizer)
    return {part: tokens for part in ("train", "val") if len((tokens := open_tokens(folder / f"{part}_ids.bin", tokenizer)).ids)}


def data_recipe(data: DataSection) -> dict:
    """The settings and files that determine the text of a run."""
    recipe = {key: value for key, value in asdict(data).items() if key not in ("weights", "packing", "streaming", "dir")}
    groups, held_out = data_files(data)
    stamps = [[str(path), *((path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ())]
              for path in [*itertools.chain.from_iterable(groups), *held_out]]
    return {**recipe, "files": stamps}


def token_recipe(data: DataSection, tokenizer) -> dict:
    return {**data_recipe(data), "tokenizer": fingerprint(tokenizer)}


def fits(folder: Path, data: DataSection, tokenizer) -> bool:
    """Whether the token files in `folder` are complete and were written for this data and tokenizer."""
    facts = [folder / f"{part}_ids.json" for part in ("train", "val")]
    return not MODEL.damage(folder) and all(path.exists() and read_json(path)["recipe"] == token_recipe(data, tokenizer)
                                            for path in facts)


def open_tokens(path: Path, tokenizer) -> TokenFile:
    """Map a token file. Without its JSON file (as from nanoGPT), ids are uint16, or uint32 for a large vocabulary."""
    if not path.exists():
        raise UserError(f"{path}: file not found")
    facts_file = path.with_suffix(".json")
    if problem := MODEL.damage(path.parent, (path.name, facts_file.name)):
        raise UserError(f"{problem}; prepare the text again (TOKENIZER.py --data)")
    facts = read_json(facts_file) if facts_file.exists() else {}
    written_with = facts.get("recipe", {}).get("tokenizer")
    if written_with and written_with != fingerprint(tokenizer):
        raise UserError(f"{path}: written with another tokenizer; delete the file, or set --tokenizer.name to that tokenizer")
    count = vocab_size(tokenizer)
    dtype = np.dtype(facts.get("dtype") or bare_dtype(path, count)).newbyteorder("<")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are not a multiple of {dtype.itemsize} ({dtype.name} ids); the file is truncated")
    if facts and facts["tokens"] != size // dtype.itemsize:
        raise UserError(f"{path}: {size // dtype.itemsize} ids, but its JSON file lists {facts['tokens']}; delete both files")
    ids = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    with open(path, "rb") as file:  # not through the map, whose pages count as memory of this process
        largest = 0
        while len(part := np.fromfile(file, dtype, 2**22)):
            largest = max(largest, int(part.max()))
    if largest >= count:
        raise UserError(f"{path}: id {largest} exceeds the tokenizer's largest, {count - 1}; written with another tokenizer")
    begin, end = facts.get("begin", begin_id(tokenizer)), facts.get("end", end_id(tokenizer))
    return TokenFile(ids, facts.get("sources") or [[0, len(ids)]], facts.get("bytes"), begin, end)


def bare_dtype(path: Path, count: int) -> str:
    """The dtype of the ids in a token file without a JSON file."""
    head = np.fromfile(path, "<u2", 4096)
    if len(head) > 1 and int(head[0]) + 2**16 * int(head[1]) in (20240520, 20240801):
        raise UserError(f"{path}: starts with a header (llm.c's format); remove its 1024 bytes, or give the text instead")
    wide = len(head) > 3 and not head[1::2].any() and head[0::2].any()  # the upper halves of 32-bit numbers are zero
    return "uint32" if count > 2**16 or wide else "uint16"


# -- file formats

RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".hub")
LIBRARIES = (".parquet", ".hub")  # read by libraries, which raise many types of exceptions
FORMATS = (".txt", *RECORDS[:-1], ".md", ".text")
LONGEST = 2**22  # maximum characters of a document; longer documents are split at line ends
OUTPUTS = ("config.json", "tokenizer.json", "train_ids.json", "log.jsonl")  # files that mark the output folder of a run


def suffix_of(path: Path) -> str:
    """a.jsonl and a.jsonl.gz -> .jsonl; owner/name:split (a dataset of the Hugging Face hub) -> .hub"""
    suffix = path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    name, *rest = str(path).split(":")
    known = suffix in (*FORMATS, ".bin") or path.exists() or len(rest) > 2
    return ".hub" if not known and (Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name)) else suffix


def expand_paths(names: list[str], key: str = "data.train", formats: tuple = FORMATS) -> list[list[Path]]:
    """The files of each name (file, folder, glob or hub dataset): ["data/*.txt"] -> [[data/a.txt, data/b.txt]]."""
    groups = []
    for name in names:
        if Path(name).is_dir():
            files = files_in(Path(name), formats)
        elif any(mark in name for mark in "*?[") and not Path(name).exists():
            files = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if not path.is_dir())
        else:
            files = [Path(name)]
        for path in files:
            if path.is_symlink() and not path.exists():
                raise UserError(f"{key}: {path} is a broken link; its target does not exist")
        if not files or not files[0].exists() and suffix_of(files[0]) != ".hub":
            raise UserError(f"{key}: '{name}' does not exist or contains no data file ({', '.join(formats)})")
        groups.append(files)
    return groups


def files_in(folder: Path, formats: tuple) -> list[Path]:
    """The data files of a folder and its subfolders; links are followed. Hidden files and output folders of runs are skipped."""
    files, known = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        written = any((Path(parent) / name).exists() for name in OUTPUTS)
        if os.path.realpath(parent) in known or written and Path(parent) != folder:
            folders.clear()
            continue
        known.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        ours = ("_ids.json", MODEL.CHECKSUMS)
        files += [Path(parent) / name for name in names if not name.startswith(".") and not name.endswith(ours)
                  and suffix_of(Path(name)) in formats]
    return sorted(files)


def data_files(data: DataSection, formats: tuple = FORMATS) -> tuple[list[list[Path]], list[Path]]:
    """(files of each path in data.train, files of data.validation); repeated and held-out files are removed from data.train."""
    names = [] if data.validation in ("hash", "tail", "none") else [data.validation]
    held_out = [path for files in expand_paths(names, "data.validation", formats) for path in files]
    known, groups = set(map(os.path.realpath, held_out)), []
    for name, files in zip(data.train, expand_paths(data.train, formats=formats), strict=True):
        groups.append([path for path in files if os.path.realpath(path) not in known])
        if not groups[-1]:
            raise UserError(f"data.train: all files of '{name}' are already in data.validation or in an earlier path; remove it")
        known |= set(map(os.path.realpath, files))
    return groups, held_out


class Reading:
    """A context that turns any error while reading a file into a UserError with the file and the line."""

    MESSAGES = {PermissionError: "no permission to read", IsADirectoryError: "expected a file, found a folder",
                UnicodeDecodeError: "not UTF-8; convert it with `iconv -f LATIN1 -t UTF-8`"}

    def __init__(self, path: Path):
        self.path, self.line = path, 0

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind, error, _) -> None:
        library = suffix_of(self.path) in LIBRARIES and isinstance(error, Exception) and not isinstance(error, UserError)
        if isinstance(error, UnicodeDecodeError):
            self.line = undecodable_line(self.path) if self.path is not STDIN and self.path.is_file() else 0
        elif not library and not isinstance(error, (OSError, EOFError, zlib.error, csv.Error)):
            return
        reason = f"{type(error).__name__}: {first_line(error)[:160]}" if library else error
        message = f"cannot be read{' as a file or from the hub' * (suffix_of(self.path) == '.hub')} ({reason})"
        raise UserError(f"{self.path}{f':{self.line}' * bool(self.line)}: {self.MESSAGES.get(type(error), message)}") from None


STDIN = Path("stdin")  # stands for stdin, compared by identity


def open_bytes(path: Path):
    if path is STDIN:  # a separate file object, since sys.stdin may be closed while it is read (and is a text stream in tests)
        with suppress(OSError, AttributeError):
            return open(sys.stdin.fileno(), "rb", closefd=False)
        return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode() if sys.stdin else b"")
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def open_text(path: Path) -> io.TextIOWrapper:
    """Open UTF-8 text, decompressed and without a byte-order mark; UserError for binary files."""
    file = open_bytes(path)
    if b"\0" in (file.peek(8192)[:8192] if hasattr(file, "peek") else b""):
        raise UserError(f"{path}: expected UTF-8 text, found a binary file or UTF-16 text")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")


def undecodable_line(path: Path) -> int:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def read_documents(path: Path, unit: str = "line", field: str = "text") -> Iterator[str]:
    """The documents of a file, in order; documents of more than LONGEST characters are split."""
    if suffix_of(path) in RECORDS:
        texts = (text_of(record, field, where) for where, record in read_records(path, field))
    else:
        texts = read_text(path, unit)
    for text in texts:
        while len(text) > LONGEST:
            cut = text.rfind("\n", 0, LONGEST) + 1 or LONGEST
            yield text[:cut]
            text = text[cut:]
        yield text


def read_text(path: Path, unit: str) -> Iterator[str]:
    with Reading(path) as reading, open_text(path) as file:
        parts, size = [], 0
        while line := file.readline(LONGEST):
            reading.line += 1
            if "\0" in line:
                raise UserError(f"{path}:{reading.line}: expected UTF-8 text, found a binary file")
            if unit == "line":
                if line.strip():
                    yield line.rstrip("\r\n")
                continue
            if size and unit == "blank_line" and not line.strip() or size + len(line) > LONGEST:
                yield "".join(parts) if unit == "file" else "".join(parts).rstrip("\r\n")
                parts, size = [], 0
            if line.strip() or unit == "file":
                parts.append(line)
                size += len(line)
        if parts:
            yield "".join(parts) if unit == "file" else "".join(parts).rstrip("\r\n")


def text_of(record, field: str, where: str) -> str:
    """The text of a record; UserError if it is invalid."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with '{field}', found {type(record).__name__}")
    if field not in record:
        keys = ", ".join(map(str, list(record)[:6])) or "none"
        chat = {"messages", "conversations", "prompt", "instruction", "chosen"} & set(record)
        hint = "conversations are for SFT.py, or for a teacher with a chat template" if chat else "set data.text_field"
        raise UserError(f"{where}: no key '{field}' (keys: {keys}); {hint}")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: '{field}' must be a string, found {type(record[field]).__name__}")
    return checked(record[field], f"{where}: '{field}'")


def checked(text: str, where: str) -> str:
    """The text; UserError if it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} contains an unpaired surrogate (invalid Unicode)") from None
    if "\0" in text:
        raise UserError(f"{where} contains a NUL character")
    return text


def read_records(path: Path, field: str | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (file:line, record) for each record of a file; `field` selects a single column of a parquet file."""
    suffix = suffix_of(path)
    if suffix not in RECORDS:
        raise UserError(f"{path}: expected a file of records ({', '.join(RECORDS[:-1])}); plain text is for TRAIN.py")
    with Reading(path) as reading:
        if suffix in LIBRARIES:
            for row, record in enumerate(read_parquet(path, field) if suffix == ".parquet" else read_hub(path), 1):
                yield f"{path}: row {row}", {key: without_nulls(value) for key, value in record.items()}
        else:
            yield from (read_json_records if suffix.startswith(".json") else read_table)(path, reading)


def parse_json(text: str, where: str, located: bool = False):
    """The value of a JSON text. If `located`, the text is the whole file `where`, and errors include the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if located else ""
        raise UserError(f"{where}{line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # such as a number of thousands of digits, or too deep nesting
        raise UserError(f"{where}: the JSON cannot be read ({first_line(error)})") from None


def read_json_records(path: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    """One record per line, or an array of records, for any file name."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        try:
            by_lines = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            by_lines = suffix_of(path) == ".jsonl" and not first.lstrip().startswith("[")
        if not by_lines:
            records = parse_json(file.read(), str(path), located=True) if first else []
            records = records if isinstance(records, list) else [records]
            yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
            return
        for reading.line, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{reading.line}", parse_json(line.strip(), f"{path}:{reading.line}")


def read_table(path: Path, reading: Reading) -> Iterator[tuple[str, dict]]:
    """A header and rows. In a .tsv file, quotes are ordinary characters unless all of them enclose whole cells."""
    csv.field_size_limit(2**31 - 1)
    options: dict = {"delimiter": "\t" if suffix_of(path) == ".tsv" else ",", "strict": True}
    if suffix_of(path) == ".tsv":
        with open_text(path) as file:
            try:
                if any("\t" in cell for row in csv.reader(file, **options) for cell in row):
                    raise csv.Error("a quoted cell contains a tab")
            except csv.Error:
                options["quoting"] = csv.QUOTE_NONE
    with open_text(path) as file:
        rows = csv.DictReader(file, **options)
        if duplicates := [name for name, count in Counter(rows.fieldnames or ()).items() if count > 1]:
            raise UserError(f"{path}:1: two columns have the name '{duplicates[0]}'; rename one of them")
        while True:
            reading.line = rows.line_num + 1
            if (row := next(rows, None)) is None:
                return
            if None in row:
                cells = len(row) - 1 + len(row[None])
                raise UserError(f"{path}:{rows.line_num}: {cells} cells, but the header has {len(rows.fieldnames)}")
            yield f"{path}:{rows.line_num}", {key: value for key, value in row.items() if value is not None}


def read_parquet(path: Path, field: str | None) -> Iterator[dict]:
    file = MODEL.library("pyarrow.parquet", f"{path}: needs").ParquetFile(path)
    if field and field not in file.schema_arrow.names:
        raise UserError(f"{path}: no column '{field}' (columns: {', '.join(file.schema_arrow.names)}); set data.text_field")
    for batch in file.iter_batches(columns=[field] if field else None):
        yield from batch.to_pylist()


def read_hub(source: Path) -> Iterator[dict]:
    """Stream a dataset from the hub, or from a folder in the hub's layout: name, name:split or name:config:split."""
    name, *rest = str(source).split(":")
    datasets = MODEL.library("datasets", f"{source}: needs")
    return datasets.load_dataset(name, *rest[:-1], split=rest[-1] if rest else "train", streaming=True)


def without_nulls(value):
    """Remove the null keys that tables add to nested objects: {"town": "Alder", "days": None} -> {"town": "Alder"}"""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


# -- cleaning

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Seen:
    """A set of texts as 128-bit digests, to find exact duplicates, in a temporary database that moves to disk when it grows."""

    def __init__(self):
        import sqlite3

        self.table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.table.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.table.execute("BEGIN")

    def add(self, text: str) -> bool:
        """Add `text`; True if it is new."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self.table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1


def clean(text: str, data: DataSection, counts: Counter) -> str:
    if not text.isascii() and data.normalize != "none" and not unicodedata.is_normalized(data.normalize, text):
        text = unicodedata.normalize(data.normalize, text)
        counts["normalized"] += 1
    if data.remove_control and CONTROL.search(text):
        text = CONTROL.sub("", text)
        counts["with control characters"] += 1
    return text


# -- records: normalization of layouts

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
         "observation": "tool", "function_response": "tool"}
PROMPT_KEYS = ("prompt", "instruction", "question", "input")
CHAT_KEYS = ("messages", "conversations")
LAYOUTS = (*((key,) for key in CHAT_KEYS), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"),
           ("input", "output"), ("text",))
LABEL_KEYS = ("label", "labels", "class", "category", "target", "sentiment", "intent")
TEXT_KEYS = ("text", "sentence", "content", "message", "sms", "review", "document", "comment", "question", "prompt", "title")
USED_KEYS = frozenset((*PROMPT_KEYS, *CHAT_KEYS, "completion", "output", "answer", "history", "system", "tools"))
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


Record = tuple[str, dict]  # file:line, record


def from_dolly(record: dict) -> dict:
    """instruction, context, response -> instruction, input, output"""
    names = {"context": "input", "response": "output"}
    return {key if names.get(key, key) in record else names[key]: value for key, value in record.items()}


# Layouts with other keys: the keys that a record needs -> a function that returns the record in one of LAYOUTS.
CONVERTERS: dict[tuple, Callable[[dict], dict]] = {("instruction", "response"): from_dolly}


class Unusable(Exception):
    """The reason why a record cannot be trained on; the record is left out and counted."""


class LeftOut:
    """Counts of records that were left out, by reason, with the file:line of the first; truncated records; unused keys."""

    def __init__(self):
        self.truncated = 0
        self.unused: set[str] = set()
        self.counts: Counter = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def text(self) -> str:
        unused = f"; unused keys: {', '.join(sorted(self.unused)[:8])}" if self.unused else ""
        return "".join(f"; left out {n:,} {'duplicate' if (n, reason) == (1, 'duplicates') else reason} (the first: "
                       f"{self.first[reason]})" for reason, n in self.counts.items()) + unused


class Form(NamedTuple):
    """How a stage reads records: `expand(record, where, form)` with the settings of its `section`."""

    expand: Callable
    section: str  # for error messages
    columns: dict | None = None
    system: str | None = None
    keys: frozenset = frozenset()  # the keys that the stage uses, to report unused ones; empty reports none

    def read(self, path: Path, left: LeftOut) -> Iterator[tuple[str, dict]]:
        for where, record in read_records(path):
            record = self.renamed(record, where)
            for keys, convert in CONVERTERS.items():
                record = convert(record) if all(is_given(record, key) for key in keys) else record
            if self.keys:
                left.unused |= {str(key) for key in record if key not in self.keys}
            try:
                yield where, self.expand(record, where, self)
            except Unusable as error:
                left.add(str(error), where)

    def renamed(self, record, where: str) -> dict:
        """A record with its columns renamed: {"my_column": 1}, {"prompt": "my_column"} -> {"prompt": 1}."""
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {type(record).__name__}")
        columns = self.columns or {}
        if missing := [name for name in columns.values() if name not in record]:
            raise UserError(f"{where}: no key '{missing[0]}', which {self.section}.columns names (keys: {keys_of(record)})")
        return {**{k: v for k, v in record.items() if k not in columns.values()}, **{k: record[v] for k, v in columns.items()}}


def read_split(data: DataSection, form: Form, left: LeftOut, kind: str = "record") -> tuple[list[Record], list[Record]]:
    """The training records and the held-out records as (file:line, record), without duplicates. All records with the same prompt
    are in the same set, in every stage, so a held-out prompt is not trained on, not even in an earlier turn of a conversation."""
    groups, held_out = data_files(data, RECORDS[:-1])

    def read(files: Iterable[Path], key: str) -> list[Record]:
        records, seen = [], Seen()
        for where, record in itertools.chain.from_iterable(form.read(path, left) for path in files):
            if data.deduplicate and not seen.add(json.dumps(record, sort_keys=True, default=str)):
                left.add("duplicates", where)
            else:
                records.append((where, record))
        if not records:
            names = " ".join(data.train) if key == "data.train" else data.validation
            raise UserError(f"{key}: no {kind} in {names}{left.text()}")
        return records

    validation = read(held_out, "data.validation") if held_out else []
    records = read(itertools.chain.from_iterable(groups), "data.train")
    keys = [prompt_keys(record) for _, record in records]
    if data.validation == "hash":
        held = {key for key in itertools.chain.from_iterable(keys) if is_held_out(key, data.validation_fraction)}
    elif data.validation == "tail":
        held = {key for prompts in keys[len(keys) - round(len(keys) * data.validation_fraction) :] for key in prompts}
    else:
        held = {key for _, record in validation for key in prompt_keys(record)}
    train = [record for record, prompts in zip(records, keys, strict=True) if held.isdisjoint(prompts)]
    rest = [record for record, prompts in zip(records, keys, strict=True) if not held.isdisjoint(prompts)]
    for where, _ in rest if held_out else ():
        left.add("with a prompt of data.validation", where)
    if not train:
        count = MODEL.counted(len(records), kind)
        raise UserError(f"data.validation: {data.validation} holds out all prompts of data.train ({count}, the first: "
                        f"{records[0][0]}); set it to none or to another file")
    if data.validation in ("hash", "tail") and not rest:
        say(f"data.validation: no {kind} was held out; training without validation, unless it is set to tail or to a file")
    return train, validation if held_out else rest


def prompt_key(record: dict) -> str:
    """The prompt of a record's last answer, independent of the record's layout."""
    return prompt_keys(record)[-1]


def prompt_keys(record: dict) -> list[str]:
    """The prompt of each answer in a record: the turns before it, without the system message; for plain text, the text."""
    if "prompt" in record:
        turns = [*as_messages(record["prompt"]), {"role": "assistant", "content": ""}]
    elif "messages" in record:
        turns = record["messages"]
    else:
        return [record["text"]]
    turns = [turn for turn in turns if turn["role"] != "system"]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [json.dumps(essence(turns[:i] or turns), sort_keys=True) for i in answers]


def essence(turns: list[dict]) -> list[tuple]:
    """Role, content and calls of each turn, for comparison: normalized Unicode, stripped, without call ids and other keys."""
    calls = [[call["function"] for call in turn.get("tool_calls") or ()] for turn in turns]
    texts = [unicodedata.normalize("NFC", turn["content"]).strip() for turn in turns]
    return [(turn["role"], text, functions) for turn, text, functions in zip(turns, texts, calls, strict=True)]


def as_messages(content: str | list[dict], role: str = "user") -> list[dict]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def keys_of(record: dict) -> str:
    return ", ".join(map(str, list(record)[:8])) or "none"


def is_given(record: dict, key: str) -> bool:
    """Whether a key has a value: an empty table cell and null in JSON count as missing."""
    return record.get(key) is not None and not (isinstance(record[key], str) and not record[key].strip())


def parsed(value, where: str):
    """The value of a table cell with JSON; other values are unchanged."""
    return parse_json(value, where) if isinstance(value, str) else value


def message_of(turn: dict, where: str) -> dict:
    """A message with Hugging Face's keys: `from` and `value` become role and content; arguments of calls become objects."""
    if not isinstance(turn, dict):
        raise UserError(f"{where}: expected an object with role and content, found {type(turn).__name__}")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise UserError(f"{where}: unknown role '{name}'; use one of {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    known = ("role", "from", "content", "value", "tool_calls", "function_call")
    more = {key: value for key, value in turn.items() if key not in known and value is not None}
    if isinstance(turn.get("train"), bool):  # Axolotl's name
        more["weight"] = int(turn["train"])
    calls = turn.get("tool_calls") or turn.get("function_call")
    if name == "function_call":
        calls, content = content, ""
    calls = parsed(calls, f"{where}: tool_calls") if calls else []
    if not isinstance(calls, (dict, list)):
        raise UserError(f"{where}: tool_calls must be a list, found {type(calls).__name__}")
    calls = [call_of(call, where) for call in ([calls] if isinstance(calls, dict) else calls)]
    if not isinstance(content, (str, list)) and not (content is None and (calls or role == "tool")):
        raise UserError(f"{where}: content must be a string, found {type(content).__name__}")
    if isinstance(content, list):  # content parts of the OpenAI API
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{where}: content has parts that are not text, which are not supported")
        content = "".join(part["text"] for part in content)
    content = checked(content or "", f"{where}: content")
    if role == "assistant" and not content.strip() and not calls:
        raise Unusable("with an empty answer")
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **more}


def call_of(call, where: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must be an object with name and arguments, found {str(call)[:60]!r}")
    arguments = parsed(function.get("arguments") or {}, f"{where}: a tool call's arguments")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: a tool call's arguments must be an object, found {type(arguments).__name__}")
    more = {key: value for key, value in call.items() if key == "id"}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **more}


def messages_of(value, where: str) -> list[dict]:
    """Normalize a list of messages, or its JSON in a table cell."""
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{"):
        raise UserError(f"{where}: expected a list of messages, found the text '{value[:40]}'")
    value = parsed(value, where)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of messages, found {type(value).__name__}")
    turns = [message_of(turn, f"{where}: message {i}") for i, turn in enumerate(value, 1)]
    systems = [i for i, turn in enumerate(turns, 1) if turn["role"] == "system"]
    if len(systems) > 1:
        raise UserError(f"{where}: {len(systems)} system messages; join them into one")
    if systems and systems != [1]:
        raise UserError(f"{where}: message {systems[0]} is the system message, which must be the first")
    return turns


def chat_in(text: str) -> list[dict] | None:
    """The messages in a text (a table cell) that is JSON; None for any other text."""
    if not re.match(r"\s*\[\s*\{", text):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = all(isinstance(turn, dict) and str(turn.get("role", turn.get("from"))).lower() in ROLES
                and {"content", "value", "tool_calls"} & turn.keys() for turn in turns)
    return turns if known else None


def words_of(value, role: str, where: str, split: bool = True) -> str | list[dict]:
    """A prompt or completion as text or messages; "" if it is empty. A text can contain a conversation as JSON, or if `split` in
    the format "\\n\\nHuman: Hi\\n\\nAssistant: Hello"."""
    if isinstance(value, str) and (turns := chat_in(value)) is not None:
        value = turns
    if value is None:
        return ""
    if isinstance(value, str):
        parts = HH_TURN.split(value) if split else []
        if len(parts) < 3 or parts[0].strip():
            return checked(value, where) if value.strip() else ""
        value = [{"role": name, "content": text.strip()} for name, text in zip(parts[1::2], parts[2::2], strict=True)]
        if role == "user" and value[-1] == {"role": "Assistant", "content": ""}:
            value.pop()  # a prompt may end with "Assistant:"
        if not all(turn["content"] for turn in value):
            raise Unusable("with an empty turn")
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UserError(f"{where}: expected text or a list of messages, found {type(value).__name__}")
    last = value[-1] if value and isinstance(value[-1], dict) else {}
    if not (last.get("content", last.get("value")) or last.get("tool_calls")):
        return ""
    turns = messages_of(value, where)
    if role == "assistant" and turns[-1]["role"] != "assistant":
        raise Unusable("with a completion that does not end with the assistant's message")
    return turns


def prompt_of(record: dict, where: str, system: str | None = None) -> str | list[dict] | None:
    """The prompt of a record under any of the usual keys, with the turns before it (`history`) and the system message."""
    key = next((key for key in (*PROMPT_KEYS, *CHAT_KEYS) if is_given(record, key)), None)
    if key is None:
        return "" if any(name in record for name in PROMPT_KEYS) else None
    read = messages_of if key in CHAT_KEYS else partial(words_of, role="user")
    prompt = read(record[key], where=f"{where}: {key}")
    if key == "instruction" and is_given(record, "input"):
        if not isinstance(prompt, str) or not isinstance(record["input"], str):
            raise UserError(f"{where}: instruction and input are joined, so both must be strings")
        prompt = f"{prompt}\n\n{record['input']}"
    if is_given(record, "history") and prompt:
        prompt = [*history_of(record["history"], f"{where}: history"), *as_messages(prompt)]
    content = record.get("system") if is_given(record, "system") else system
    if not isinstance(content, (str, type(None))):
        raise UserError(f"{where}: system must be a string, found {type(content).__name__}")
    first = as_messages(prompt)[0] if prompt else {}
    if not content or not prompt or first["role"] == "system" and (not is_given(record, "system") or first["content"] == content):
        return prompt
    return messages_of([{"role": "system", "content": content}, *as_messages(prompt)], f"{where}: {key}")


def history_of(value, where: str) -> list[dict]:
    """Earlier turns as messages, or as pairs of question and answer."""
    value = parsed(value, where)
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return messages_of(value, where)
    pairs = value if isinstance(value, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise UserError(f"{where}: expected messages or [question, answer] pairs")
    return [{"role": role, "content": text} for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]


def extras_of(record: dict, where: str) -> dict:
    """`tools` and `weight` of a record, if it has them; UserError if they are invalid."""
    extras = {}
    if is_given(record, "tools"):
        extras["tools"] = parsed(record["tools"], f"{where}: tools")
        if not isinstance(extras["tools"], list):
            raise UserError(f"{where}: tools must be a list, found {type(extras['tools']).__name__}")
    if is_given(record, "weight"):
        extras["weight"] = number_of(record, "weight", where)
        if extras["weight"] < 0:
            raise UserError(f"{where}: weight {record['weight']!r} must be at least 0")
    return extras


def number_of(record: dict, key: str, where: str) -> float:
    try:
        value = math.nan if isinstance(record[key], bool) else float(record[key])
    except (TypeError, ValueError, OverflowError):  # an integer of hundreds of digits
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {key} {str(record[key])[:80]!r} must be a number")
    return value


# -- command line


def warn_short_lines(data: DataSection, tokens: TokenFile, length: int) -> None:
    if data.text_unit == "line" and any(suffix_of(Path(name)) not in RECORDS for name in data.train):
        lengths = Spans(tokens).lengths
        if len(lengths) > 1 and lengths.mean() < length / 8:
            say(f"the lines are short (mean {lengths.mean():.0f} tokens, max_length {length}); if consecutive lines belong "
                "together, set --data.text_unit to blank_line or file")


SECTIONS = {"model": ModelSection, "tokenizer": TokenizerSection, "data": DataSection}


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv, SECTIONS, "tokenizer", {}, __doc__, {"out": "data.dir"})
    tokenizer = of_run(config)
    if not (config.tokenizer.name or config.model.name):
        say(f"tokenizer with {len(tokenizer):,} tokens in {Path(config.data.dir) / 'tokenizer'}")
    for part, tokens in token_files(config.data, tokenizer).items():
        ratio = f", {tokens.bytes / len(tokens.ids):.2f} bytes of text per token" if tokens.bytes else ""
        say(f"{Path(config.data.dir) / (part + '_ids.bin')}: {len(tokens.ids):,} tokens{ratio}")


if __name__ == "__main__":
    run_main(main)
