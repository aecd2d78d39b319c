"""TOKENIZER.py: text to ids and back.

Read in this order: settings, tokenizers (`load`, `train`), chat rendering, readers (`read_pieces`), cleaning and
splitting (`documents`), token files (`prepare`), and packing into batches (`TokenStream`).

    python TOKENIZER.py --data data/train.txt data/train.jsonl --out data/    # a tokenizer, train_ids.bin, val_ids.bin
    python TOKENIZER.py --data notes.txt --data.text_unit file --tokenizer.kind byte --out /tmp/notes
"""

from __future__ import annotations

import bisect
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from MODEL import Action, ModelSection, UserError, knob, load_config, read_json, resolve_folder, run_main, say, staged, sync

KINDS = ("bpe", "wordpiece", "unigram", "char", "byte")


@dataclass
class TokenizerSection:
    name: str | None = knob(None, "tokenizer to use: folder or hub name; null is the model's own, or one trained here")
    kind: str = knob("bpe", "what is trained: byte-level BPE, WordPiece, Unigram, characters or bytes", KINDS)
    vocab_size: int = knob(1024, "pieces of a trained tokenizer, special tokens included")


@dataclass
class DataSection:
    train: list | str = knob(["data/train.txt", "data/train.jsonl"], "files, folders, globs (txt jsonl json csv tsv parquet, .gz) or one .bin")
    validation: str = knob("hash", "held-out part: hash (of each document), tail, none, or a file of its own")
    validation_fraction: float = knob(0.05, "share of the documents (hash, tail) that is held out")
    text_unit: str = knob("line", "what one sample of a .txt is", ("line", "file", "blank_line"))
    text_field: str = knob("text", "column or key that holds the text in jsonl, json, csv, tsv and parquet")
    weights: list | None = knob(None, "share of the batches for each path of data.train; null takes each token once")
    packing: bool = knob(True, "join documents into full rows (they cannot see each other); false pads one a row")
    streaming: bool = knob(False, "tokenize while training instead of writing .bin files first")
    normalize: str = knob("NFC", "Unicode normalisation", ("NFC", "NFKC", "none"))
    remove_control: bool = knob(True, "drop control characters other than newline and tab")
    deduplicate: bool = knob(True, "drop exact duplicates (never single lines of a .txt)")
    min_chars: int = knob(1, "shorter documents are dropped")
    dir: str = knob("data", "folder of the trained tokenizer and the .bin files")

    def __post_init__(self):
        self.train = [self.train] if isinstance(self.train, str) else [str(path) for path in self.train]
        if not self.train:
            raise UserError("data.train: no file is named")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction: {self.validation_fraction} must lie between 0 and 1")
        if self.weights is not None:
            if len(self.weights) != len(self.train):
                raise UserError(f"data.weights: {len(self.weights)} weights for {len(self.train)} paths of data.train")
            if not all(isinstance(w, (int, float)) and w > 0 for w in self.weights):
                raise UserError(f"data.weights: {self.weights} must all be positive numbers")


# -------------------------------------------------------------------------------------------------- tokenizers

END = "<|endoftext|>"
PAD = "<|pad|>"
MASK = "<|mask|>"
UNKNOWN = "<|unk|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]  # reserved from the start, so that fine-tuning adds no embedding rows
# GPT-4's pattern, with single digits: a model that sees "128" as 1 2 8 can carry. Words keep their leading space.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def load(name: str | Path):
    """The tokenizer of a folder or hub name, as transformers makes it."""
    folder = resolve_folder(str(name))
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        newest = max(folder.glob("ckpt-step-*"), default=None)
        hint = f"{newest} is the newest checkpoint of this unfinished run" if newest else "name one with --tokenizer.name"
        raise UserError(f"{folder}: no tokenizer here (tokenizer.json is missing); {hint}")
    facts = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    generic = facts.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").exists()
    if generic:  # what AutoTokenizer would find out in two seconds
        from transformers import PreTrainedTokenizerFast as Loader
    else:
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be read ({str(error).strip().splitlines()[0][:160]})") from None
    return tokenizer


def folder_of(adapter: str | None, base: str) -> str:
    """Where the tokenizer of a model with an adapter stands: beside the adapter if it brought one."""
    return adapter if adapter and (Path(adapter) / "tokenizer_config.json").exists() else base


def train(texts, vocab_size: int = 1024, kind: str = "bpe"):
    """Train a tokenizer on an iterable of strings; encoding with special tokens puts <|endoftext|> in front.

    bpe, byte: any bytes, nothing unknown (Radford 2019, section 2.2). unigram: Kudo 2018. wordpiece: BERT's.
    char: the characters seen.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [END, PAD, *CHAT_TOKENS, MASK] + ([UNKNOWN] if kind in ("wordpiece", "unigram", "char") else [])
    smallest = len(special) + (257 if kind == "bpe" else 256 if kind == "byte" else 1)
    if kind == "byte":
        vocab_size = smallest
    elif vocab_size < smallest:
        raise UserError(f"tokenizer.vocab_size: {vocab_size} is too small; {kind} needs at least {smallest}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = dict(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = None
    if kind == "bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), byte_level])
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "byte":
        raw = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*special, *alphabet])}, merges=[]))
        raw.add_special_tokens(special)
        raw.pre_tokenizer, raw.decoder = byte_level, decoders.ByteLevel()
    elif kind == "wordpiece":
        raw = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        digits = pre_tokenizers.Digits(individual_digits=True)
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits]), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=UNKNOWN, **options)
    else:
        counts = Counter(itertools.chain.from_iterable(texts))
        pieces = [*special, *sorted(c for c, _ in counts.most_common(vocab_size - len(special)))]
        raw = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
        raw.add_special_tokens(special)
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        raw.decoder = decoders.Fuse()
    if trainer is not None:
        raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A $B",
                                                       special_tokens=[(END, raw.token_to_id(END))])
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in special else {}
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=PAD, mask_token=MASK, **unknown,
                                   additional_special_tokens=CHAT_TOKENS, clean_up_tokenization_spaces=False)


def save(tokenizer, folder: str | Path) -> None:
    """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
    with staged(folder) as scratch:
        tokenizer.save_pretrained(scratch)


def begin_id(tokenizer) -> int:
    """What a text starts with: the beginning-of-text token, or the end-of-text token of tokenizers that have one
    only (GPT-2, Qwen), where the end of one text is the start of the next."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise UserError("the tokenizer has neither a beginning- nor an end-of-text token")
    return begin


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Ids of a prompt as the tokenizer itself starts a text; an empty prompt is the beginning of a text."""
    return tokenizer(text).input_ids if text else [begin_id(tokenizer)]


def fingerprint(tokenizer) -> str:
    """Names what a tokenizer does: two with the same fingerprint give the same ids."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


RUNS = ("  ", *(run for blank in "\n\t\r\v\f" for run in (blank + " ", " " + blank)))
SEAM = re.compile(r"(?<=\S) (?=\S)")  # a single space between two words


class Encoder:
    """Texts -> arrays of ids, without special tokens.

    The words of a text repeat, so for byte-level BPE a dictionary from word to ids is several times faster than the
    tokenizer itself. It is exact because such a tokenizer never joins across a space between two words: "a b" is
    always "a" followed by " b". Other tokenizers, and texts with runs of spaces, go through the library's threads.
    """

    LIMIT = 500_000  # words kept

    def __init__(self, tokenizer):
        self.raw = tokenizer.backend_tokenizer
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        spec = json.loads(self.raw.to_str())
        steps = spec["pre_tokenizer"] or {}
        steps = steps.get("pretokenizers", [steps])
        byte_level = [step for step in steps if step.get("type") == "ByteLevel" and not step["add_prefix_space"]]
        known = all(step.get("type") in ("ByteLevel", "Split", "Digits") for step in steps)
        added = [t for t in spec["added_tokens"] if t["lstrip"] or t["rstrip"] or t["normalized"] or " " in t["content"]]
        self.by_words = spec["model"]["type"] == "BPE" and bool(byte_level) and known and not spec["normalizer"] and not added
        if self.by_words and not self._proved():
            self.by_words = False
        self.words: dict[str, list[int]] = {}

    def _proved(self) -> bool:
        """A probe of the claim above, with the letters, digits, marks and breaks where patterns differ."""
        probe = "It's 12 plus 30, isn't it?\n\"Yes\" (42)...\nfoo\tbar e\u0301 \u4f60\u597d x_y 3.14 \n a-b\u00a0c d"
        pieces = probe.replace(" \n", "\n").split(" ")
        cut = lambda text: [piece for piece, _ in self.raw.pre_tokenizer.pre_tokenize_str(text)]  # noqa: E731
        joined = [cut(piece) for piece in (pieces[0], *(" " + piece for piece in pieces[1:]))]
        return list(itertools.chain(*joined)) == cut(" ".join(pieces))

    def _direct(self, texts: list[str]) -> list[list[int]]:
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
        look = self.words.__getitem__
        return [np.fromiter(itertools.chain.from_iterable(map(look, words)), self.dtype) for words in split]

    @staticmethod
    def _split(text: str) -> list[str]:
        # A run of white space is one token's business; the plain split is the common case, and the faster one.
        plain = text.isascii() and not text.endswith(" ") and not any(run in text for run in RUNS)
        parts = text.split(" ") if plain else SEAM.split(text)
        return [parts[0], *(" " + part for part in parts[1:])]


# -------------------------------------------------------------------------------------------------------- chat

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
        {{- "<|im_start|>" + message.role + "\\n" + (message.content or "") }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- "<tool_call>" + ({"name": function.name, "arguments": function.arguments} | tojson) + "</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""


def ensure_chat(tokenizer) -> None:
    """A tokenizer without a chat template gets the default one, and the tokens that it needs (at the end of the
    vocabulary, so the model may have to grow)."""
    if not tokenizer.chat_template:
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in CHAT_TOKENS if token not in known], special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE


def end_of_turn(tokenizer) -> int | None:
    """The special token that closes what the assistant says, read off the template; None where there is none."""
    ids, mask = render_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    said = [i for i, on in zip(ids, mask, strict=True) if on]
    return said[-1] if said and said[-1] in special else None


def end_with_turns(model, tokenizer) -> None:
    """Let a model's answers end where the chat template ends the assistant's turn."""
    close = end_of_turn(tokenizer) if tokenizer.chat_template else None
    if close is not None and close not in model.config.eos_ids:
        model.config.eos_token_id = [close, *model.config.eos_ids]


def render_chat(tokenizer, messages: list[dict], tools: list | None = None,
                add_generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """A conversation, rendered once and whole by the tokenizer's own chat template -> (ids, assistant_mask).

    The mask is 1 on what the assistant says, its end-of-turn token included. It comes from the template's
    {% generation %} markers where it has them. Where not, a turn is what its rendering adds to the rendering of
    everything before it, so training and serving see the same ids.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template; use --chat off")
    from jinja2 import TemplateError

    options = dict(tools=tools, tokenize=False)
    try:
        if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(tokenizer.chat_template):
            out = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=add_generation_prompt,
                                                return_dict=True, return_assistant_tokens_mask=True)
            return list(out["input_ids"]), list(out["assistant_masks"])
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                upto = tokenizer.apply_chat_template(messages[: i + 1], **options)
                if i:
                    start = _common(text, tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, **options))
                else:  # there is nothing before it to render: what is said begins with its words
                    start = max(text.find((message.get("content") or "").strip()), 0)
                spans.append((start, _common(text, upto.rstrip())))  # what follows the turn's end is not said
    except TemplateError as error:
        raise UserError(f"the chat template refuses this conversation ({error})") from None
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a <= start < b for a, b in spans)) for start, _ in out["offset_mapping"]]
    return list(out["input_ids"]), mask


def last_turns(tokenizer, messages: list[dict], count: int = 1, tools: list | None = None) -> tuple[list[int], list[int]]:
    """A conversation up to the end of what the assistant says last -> (ids, mask of the last `count` assistant turns): what a
    generation would have left, so without the line break that many templates put after a turn."""
    ids, mask = render_chat(tokenizer, messages, tools)
    starts = [i for i, on in enumerate(mask) if on and not (i and mask[i - 1])]
    if not starts:
        raise UserError("the chat template shows nothing of what the assistant says")
    end = len(mask) - mask[::-1].index(1)
    first = starts[-min(count, len(starts))]
    return ids[:end], [int(on and i >= first) for i, on in enumerate(mask[:end])]


def _common(a: str, b: str) -> int:
    """Length of the common prefix: ("abcd", "abx") -> 2."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ----------------------------------------------------------------------------------------------------- readers

RECORDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FORMATS = (".txt", *RECORDS, ".md", ".text")
PIECE = 2**18  # characters read at once; a longer document is passed on in pieces


class Piece(NamedTuple):
    """A document or a part of one; `last` closes it."""

    text: str
    last: bool = True


def suffix_of(path: Path) -> str:
    return path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def expand_paths(names: list[str], key: str = "data.train") -> list[list[Path]]:
    """For each name (file, folder, glob) the files it means: ["data/*.txt"] -> [[data/a.txt, data/b.txt]]."""
    groups = []
    for name in names:
        if Path(name).is_dir():
            files = sorted(p for p in Path(name).rglob("*") if p.is_file() and suffix_of(p) in FORMATS)
        elif any(mark in name for mark in "*?[") and not Path(name).exists():
            files = sorted(map(Path, glob.glob(name, recursive=True)))
        else:
            files = [Path(name)]
        if not files or not files[0].exists():
            raise UserError(f"{key}: '{name}' does not exist or holds no data file ({', '.join(FORMATS)})")
        groups.append(files)
    return groups


def _open(path: Path) -> io.TextIOWrapper:
    """UTF-8 text, unzipped, without a byte-order mark; binary files are refused."""
    file = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    try:
        head = file.peek(8192)[:8192] if hasattr(file, "peek") else b""
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path}: not a gzip file, although its name ends in .gz") from None
    if b"\0" in head:
        raise UserError(f"{path}: a binary file (or UTF-16 text); UTF-8 text is expected")
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, at most PIECE characters of it); a line that continues lacks its newline."""
    with _open(path) as file:
        number = 1
        try:
            while text := file.readline(PIECE):
                if "\0" in text:
                    raise UserError(f"{path}:{number}: a binary file; UTF-8 text is expected")
                yield number, text
                number += text.endswith("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}:{_undecodable_line(path)}: not UTF-8; convert it with "
                            f"`iconv -f LATIN1 -t UTF-8`") from None
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path}:{number}: cannot be read ({error})") from None


def _undecodable_line(path: Path) -> int:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def read_pieces(path: Path, unit: str = "line", field: str = "text") -> Iterator[Piece]:
    """The documents of one file, in order. Long ones come in pieces that end at a line end."""
    suffix = suffix_of(path)
    try:
        if suffix in RECORDS:
            yield from (Piece(_text_of(record, field, where)) for where, record in read_records(path, field))
        else:
            yield from _read_text(path, unit)
    except PermissionError:
        raise UserError(f"{path}: no permission to read") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, a file is expected") from None


def _read_text(path: Path, unit: str) -> Iterator[Piece]:
    buffer: list[str] = []
    size, fresh, opened = 0, True, False  # fresh: at the start of a line
    for _, line in itertools.chain(_lines(path), [(0, "")]):
        closes = not line or (unit == "line" and fresh) or (unit == "blank_line" and fresh and not line.strip())
        if closes and buffer:
            text = "".join(buffer)
            text = text if unit == "file" else text.rstrip("\r\n")
            if text.strip() or opened or unit == "file":
                yield Piece(text)
            buffer, size, opened = [], 0, False
        if closes and unit == "blank_line":
            fresh = line.endswith("\n")
            continue
        buffer.append(line)
        size += len(line)
        if size > PIECE:
            text = "".join(buffer)
            cut = _seam(text) or (len(text) if size > 64 * PIECE else 0)  # no seam at all: memory comes first
            if cut:
                yield Piece(text[:cut], False)
                opened = True
            buffer, size = [text[cut:]], len(text) - cut
        fresh = line.endswith("\n")


def _seam(text: str) -> int:
    """The last place where a text may be cut and tokenized in parts: a single space between two words, else a line end."""
    for mark in " \n":
        at = len(text) - 1
        while (at := text.rfind(mark, 1, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + (mark == "\n")
    return 0


def _text_of(record, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with '{field}' is expected, not {type(record).__name__}")
    if field not in record:
        keys = ", ".join(map(str, list(record)[:6])) or "none"
        raise UserError(f"{where}: no key '{field}' (keys: {keys}); set data.text_field")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: '{field}' is {type(record[field]).__name__}, text is expected")
    try:
        record[field].encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: '{field}' holds half a surrogate pair, which is no text") from None
    if "\0" in record[field]:
        raise UserError(f"{where}: '{field}' holds a NUL, which is no text")
    return record[field]


def read_records(path: Path, field: str | None = None) -> Iterator[tuple[str, dict]]:
    """(file:line, record) of a file of records; of a parquet file only one column is read where `field` names it."""
    suffix = suffix_of(path)
    if suffix not in RECORDS:
        raise UserError(f"{path}: records are expected ({', '.join(RECORDS)})")
    read = {".csv": _read_table, ".tsv": _read_table, ".parquet": partial(_read_parquet, field=field)}.get(suffix, _read_json)
    yield from read(path, suffix)


def _read_json(path: Path, suffix: str) -> Iterator[tuple[str, dict]]:
    if suffix == ".json":
        try:
            with _open(path) as file:
                records = json.load(file)
        except UnicodeDecodeError:
            raise UserError(f"{path}:{_undecodable_line(path)}: not UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error})") from None
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        records = records if isinstance(records, list) else [records]
        yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, 1))
        return
    parts: list[str] = []
    known = 0
    for number, line in itertools.chain(_lines(path), [(0, "\n")]):  # the closing newline that a file may lack
        known = number = number or known
        parts.append(line)
        if line.endswith("\n"):
            whole, parts = "".join(parts).strip(), []
            if whole:
                try:
                    record = json.loads(whole)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number or 'last line'}: not valid JSON ({error.msg} at column {error.colno})") from None
                yield f"{path}:{number or 'last line'}", record


def _read_table(path: Path, suffix: str) -> Iterator[tuple[str, dict]]:
    """A header and rows; in a .tsv quotes are characters like others unless all of them enclose whole cells."""
    csv.field_size_limit(2**31 - 1)
    options: dict = {"delimiter": "\t" if suffix == ".tsv" else ","}
    if suffix == ".tsv":
        with _open(path) as file, suppress(UnicodeDecodeError, EOFError, zlib.error, OSError):  # said below, with a line
            try:
                if any("\t" in cell for row in csv.reader(file, strict=True, **options) for cell in row):
                    raise csv.Error("two quotes of different rows")
            except csv.Error:
                options["quoting"] = csv.QUOTE_NONE
    with _open(path) as file:
        rows = csv.DictReader(file, **options)
        try:
            for row in rows:
                if None in row:
                    raise UserError(f"{path}:{rows.line_num}: {len(row) - 1 + len(row[None])} cells, but the first line names {len(rows.fieldnames)}")
                yield f"{path}:{rows.line_num}", {k: v for k, v in row.items() if v is not None}
        except UnicodeDecodeError:
            raise UserError(f"{path}:{_undecodable_line(path)}: not UTF-8") from None
        except (csv.Error, EOFError, zlib.error, OSError) as error:
            raise UserError(f"{path}:{rows.line_num}: cannot be read ({error})") from None


def _read_parquet(path: Path, suffix: str, field: str | None) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs `pip install pyarrow`") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error})") from None
    if field and field not in file.schema_arrow.names:
        raise UserError(f"{path}: no column '{field}' (columns: {', '.join(file.schema_arrow.names)}); set data.text_field")
    row, batches = 0, file.iter_batches(columns=[field] if field else None)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read after row {row} ({error})") from None
        if batch is None:
            return
        for record in batch.to_pylist():
            row += 1
            yield f"{path}: row {row}", record


# ----------------------------------------------------------------------------------------------- conversations

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
         "observation": "tool", "function_response": "tool"}
LAYOUTS = {  # name -> the keys that tell it
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question and answer": ("question", "answer"),
    "text": ("text",),
}


def layout_of(record: dict, where: str) -> str:
    """Which of the known layouts a record has, told by its keys."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object is expected, not {type(record).__name__}")
    for name, keys in LAYOUTS.items():
        if all(record.get(key) is not None for key in keys):
            return name
    known = "; ".join(" + ".join(keys) for keys in LAYOUTS.values())
    raise UserError(f"{where}: keys {', '.join(map(str, list(record)[:6])) or 'none'} are none of {known}; name yours in sft.columns, "
                    "as in {prompt: my_column, completion: another}")


def conversation(record: dict, where: str, system: str | None = None) -> dict:
    """A record of any known layout -> {"messages": [{"role", "content"}, ...]} or, for plain text, {"text"}; `tools`,
    `answer` and `weight` are kept where the record has them. `system` opens conversations that have no system turn."""
    layout = layout_of(record, where)
    kept = {key: record[key] for key in ("tools", "weight", *(["answer"] if layout == "messages" else [])) if record.get(key) is not None}
    if layout == "text":
        return {"text": _text_of(record, "text", where), **kept}
    turns: list[dict] = []
    if layout in ("messages", "sharegpt"):
        turns = record[LAYOUTS[layout][0]]
        if isinstance(turns, str):  # a table's cell
            turns = _parsed(turns, f"{where}: {LAYOUTS[layout][0]}")
        if record.get("system") and isinstance(turns, list):
            turns = [{"role": "system", "content": record["system"]}, *turns]
    elif layout == "prompt and completion":
        for key, role in (("prompt", "user"), ("completion", "assistant")):
            turns += record[key] if isinstance(record[key], list) else [{"role": role, "content": record[key]}]
    elif layout == "question and answer":
        turns = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
    else:
        turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        for asked, said in record.get("history") or ():
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        asked = f"{record['instruction']}\n\n{record['input']}" if record.get("input") else record["instruction"]
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    if not isinstance(turns, list):
        raise UserError(f"{where}: a list of messages is expected, not {type(turns).__name__}")
    if isinstance(kept.get("tools"), str):
        kept["tools"] = _parsed(kept["tools"], f"{where}: tools")
    messages = [_message(turn, f"{where}: message {i}") for i, turn in enumerate(turns, 1)]
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    _check_turns(messages, where)
    return {"messages": messages, **kept}


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None


def _message(turn: dict, where: str) -> dict:
    """One turn with Hugging Face's keys: `from` and `value` become role and content, a call's arguments an object."""
    if not isinstance(turn, dict):
        raise UserError(f"{where}: an object with role and content is expected, not {type(turn).__name__}")
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(str(named).lower())
    if role is None:
        raise UserError(f"{where}: unknown role '{named}'; known are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    message = {"role": role, **{k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}}
    if named == "function_call":
        message["tool_calls"], content = [{"type": "function", "function": _parsed(str(content), where)}], ""
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed(function["arguments"], f"{where}: a tool call's arguments")
    if not isinstance(content, (str, list)) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{where}: content is {type(content).__name__}, text is expected")
    if isinstance(content, list):  # the parts of the OpenAI API
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{where}: only parts of text can be read")
        content = "".join(part["text"] for part in content)
    content = content or ""
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise UserError(f"{where}: the answer is empty; fill it in or leave the record out")
    return {"role": role, "content": _text_of({"content": content}, "content", where), **{k: v for k, v in message.items() if k != "role"}}


def _check_turns(messages: list[dict], where: str) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn")
    if roles.count("system") > 1:
        raise UserError(f"{where}: two system messages; join them into one")
    if "system" in roles[1:]:
        raise UserError(f"{where}: message {roles.index('system') + 1} is the system's; it has to come first")


def _renamed(record: dict, columns: dict | None, where: str, key: str = "sft.columns") -> dict:
    """A record under our keys: {"my_column": 1}, {"prompt": "my_column"} -> {"prompt": 1}."""
    if not isinstance(record, dict) or not columns:
        return record
    missing = [name for name in columns.values() if name not in record]
    if missing:
        raise UserError(f"{where}: {key} names '{missing[0]}', but the keys are {', '.join(map(str, list(record)[:8]))}")
    return {**{k: v for k, v in record.items() if k not in columns.values()}, **{k: record[v] for k, v in columns.items()}}


LABEL_KEYS = ("label", "labels", "class", "category", "target", "sentiment", "intent")
TEXT_KEYS = ("text", "sentence", "content", "message", "sms", "review", "document", "comment", "question", "prompt", "title")


def read_labelled(paths: list[Path], columns: dict | None = None) -> Iterator[tuple[str, str, str]]:
    """(file:line, text, label) of all files. Keys are told by their names in any case, the text also by being the only other."""
    for path in paths:
        for where, record in read_records(path):
            record = _renamed(record, columns, where)
            if not isinstance(record, dict):
                raise UserError(f"{where}: an object with a text and a label is expected, not {type(record).__name__}")
            lower = {str(key).lower(): key for key in record}
            label = next((lower[key] for key in LABEL_KEYS if key in lower), None)
            rest = [key for key in record if key != label]
            text = next((lower[key] for key in TEXT_KEYS if key in lower), rest[0] if len(rest) == 1 else None)
            if label is None or text is None:
                what = "label" if label is None else "text"
                raise UserError(f"{where}: which of the keys {', '.join(map(str, list(record)[:8]))} is the {what}? Say it in sft.columns, as in "
                                f"{{text: my_column, label: another}}")
            value = record[label]
            if isinstance(value, (list, dict)) or value is None or not str(value).strip():
                raise UserError(f"{where}: '{label}' is {value!r}, one label is expected")
            if not str(value).strip().isprintable():
                raise UserError(f"{where}: '{label}' is {value!r}, a label is one line of text")
            if not _text_of(record, text, where).strip():
                raise UserError(f"{where}: '{text}' is empty")
            yield where, record[text], str(value).strip()


def read_conversations(paths: list[Path], columns: dict | None = None, system: str | None = None) -> Iterator[tuple[str, dict]]:
    """(file:line, conversation) of all files. `columns` maps our keys to foreign names: {prompt: my_column}."""
    for path in paths:
        first = None
        for where, record in read_records(path):
            record = _renamed(record, columns, where)
            layout = layout_of(record, where)
            first = first or (layout, where)
            if layout != first[0]:
                raise UserError(f"{where}: {layout}, but {first[1]} is {first[0]}; one file holds one layout")
            yield where, conversation(record, where, system)


# ------------------------------------------------------------------------------------ preferences and prompts


def as_messages(said: str | list[dict], role: str = "user") -> list[dict]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def read_preferences(paths: list[Path], columns: dict | None = None, system: str | None = None) -> Iterator[tuple[str, dict]]:
    """(file:line, {prompt, chosen, rejected, [margin]} or {prompt, completion, label}) of all files. Texts stay texts and
    conversations lists of messages; a side that says nothing is "" (see `preference`)."""
    for path in paths:
        for where, record in read_records(path):
            yield where, preference(_renamed(record, columns, where, "rl.columns"), where, system)


def preference(record: dict, where: str, system: str | None = None) -> dict:
    """One record in TRL's layouts. The prompt has any usual name, or is what both sides begin with; sides that repeat it lose it.

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: No"} -> prompt: the user says Hi
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object is expected, not {type(record).__name__}")
    single = "completion" in record and "label" in record and record.get("chosen") is None
    if not single and not ("chosen" in record and "rejected" in record):
        raise UserError(f"{where}: keys {', '.join(map(str, list(record)[:6])) or 'none'} are neither prompt + chosen + rejected nor prompt + completion + label; "
                        "name yours in rl.columns, as in {chosen: my_column, rejected: another}")
    sides = {key: _side(record[key], "assistant", f"{where}: {key}") for key in (("completion",) if single else ("chosen", "rejected"))}
    if all(map(_is_conversation, sides.values())):
        record = {key: value for key, value in record.items() if key not in TALK_KEYS}  # the sides tell the conversation
    prompt, sides = _apart(_prompt_of(record, where), sides, where)
    prompt = _with_system(prompt, _system_of(record, where) or system)
    if isinstance(prompt, list) or any(isinstance(side, list) for side in sides.values()):
        prompt, sides = as_messages(prompt) if prompt else "", {key: as_messages(side, "assistant") if side else "" for key, side in sides.items()}
    if not single:
        margin = record.get("margin")
        try:
            number = 0.0 if margin in (None, "") else float(margin)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(margin, bool):
            raise UserError(f"{where}: margin {margin!r} must be a number")
        return {"prompt": prompt, **sides, "margin": number}
    label = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(str(record["label"]).strip().lower())  # a table's cell is text
    if label is None:
        raise UserError(f"{where}: label {record['label']!r} must be true (a completion to learn) or false")
    return {"prompt": prompt, **sides, "label": label}


def read_prompts(paths: list[Path], columns: dict | None = None, system: str | None = None) -> Iterator[tuple[str, dict]]:
    """(file:line, {prompt, and every other key of the record}): what is asked, and what judges of answers may need. Of a
    conversation that ends with an answer, that answer is the key `completion`."""
    for path in paths:
        for where, record in read_records(path):
            record = _renamed(record, columns, where, "rl.columns")
            prompt = _prompt_of(record, where) if isinstance(record, dict) else None
            if prompt is None:
                keys = ", ".join(map(str, list(record)[:6])) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where}: no prompt among {keys or 'no keys'}; name it in rl.columns, as in {{prompt: my_column}}")
            rest = {key: value for key, value in record.items() if key not in ("prompt", *TALK_KEYS)}
            if record.get("prompt") is None and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
                rest["completion"], prompt = prompt[-1]["content"], prompt[:-1]
            _check_asks(prompt, where)
            yield where, {**rest, "prompt": _with_system(prompt, _system_of(record, where) or system)}


HH_TURN = re.compile(r"\n\n(Human|Assistant):")
TALK_KEYS = ("messages", "conversations")


def _side(said, role: str, where: str) -> str | list[dict]:
    """What is asked (role user) or answered (assistant): a text, or messages; "" where nothing is said."""
    if isinstance(said, str) and re.match(r"\s*\[\s*\{\s*\"(role|from|content|value)\"", said):  # a table's cell
        said = _parsed(said, where)
    if isinstance(said, str):
        parts = HH_TURN.split(said)
        if len(parts) < 3 or parts[0].strip():
            return said if said.strip() else ""
        said = [{"role": name, "content": text.strip()} for name, text in zip(parts[1::2], parts[2::2], strict=True)]
        if role == "user" and said[-1] == {"role": "Assistant", "content": ""}:
            said.pop()  # the prompt's last words open the answer
        if not all(turn["content"] for turn in said):
            return ""  # a conversation with a gap
    said = [said] if isinstance(said, dict) else [] if said is None else said
    if not isinstance(said, list):
        raise UserError(f"{where}: text or a list of messages is expected, not {type(said).__name__}")
    if not said or not (isinstance(said[-1], dict) and (said[-1].get("content", said[-1].get("value")) or said[-1].get("tool_calls"))):
        return ""
    turns = [_message(turn, f"{where}: message {i}") for i, turn in enumerate(said, 1)]
    if role == "assistant" and turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: ends with what the {turns[-1]['role']} says; it has to end with what the assistant says")
    return turns


def _prompt_of(record: dict, where: str) -> str | list[dict] | None:
    for key in ("prompt", "instruction", "question", *TALK_KEYS):
        if record.get(key) is not None:
            prompt = _side(record[key], "user", f"{where}: {key}")
            if key != "instruction" or not record.get("input"):
                return prompt
            if not isinstance(prompt, str) or not isinstance(record["input"], str):
                raise UserError(f"{where}: instruction and input are joined, so both have to be texts")
            return f"{prompt}\n\n{record['input']}"
    return None


def _check_asks(prompt: str | list[dict], where: str) -> None:
    if prompt and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with what the assistant says, so nothing is left to answer")


def _system_of(record: dict, where: str) -> str | None:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: system is {type(system).__name__}, text is expected")
    return system


def _with_system(prompt: str | list[dict], system: str | None) -> str | list[dict]:
    if not system or not prompt or (isinstance(prompt, list) and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": system}, *as_messages(prompt)]


def _is_conversation(said: str | list[dict]) -> bool:
    """Whether an answer holds what was asked, too."""
    return isinstance(said, list) and said[0]["role"] != "assistant"


def _apart(prompt: str | list[dict] | None, sides: dict, where: str) -> tuple[str | list[dict], dict]:
    """Prompt and answers, where sides are whole conversations too; the prompt is "" where they answer different ones."""
    whole = [_is_conversation(said) for said in sides.values() if said]
    if prompt is not None and not any(whole):
        _check_asks(prompt, where)
        if prompt and isinstance(prompt, str) and len(sides) == 2 and all(isinstance(said, str) and said.startswith(prompt) for said in sides.values()):
            sides = {key: said[len(prompt) :] for key, said in sides.items()}  # both repeat it
        return prompt, sides
    if any(whole) and not all(whole):
        raise UserError(f"{where}: one side is a whole conversation, the other only an answer")
    if not any(whole) and len(sides) == 1:
        raise UserError(f"{where}: no prompt; name it in rl.columns, as in {{prompt: my_column}}")
    common, sides = _common_prompt(sides, where)
    asked = as_messages(prompt) if prompt else []
    told, begun = ([_turn(turn)[:2] for turn in turns if turn["role"] != "system"] for turns in (asked, as_messages(common)))
    if common and not begun:
        raise UserError(f"{where}: the conversations hold a system message and an answer, but no question; put the first into the key 'system'")
    for i, turn in enumerate(told if common else ()):
        if begun[i : i + 1] != [turn]:
            other = f"where the conversations say {begun[i][1][:60]!r}" if i < len(begun) else f"but the conversations share {len(begun)} turns before they part"
            raise UserError(f"{where}: turn {i + 1} of the prompt says {turn[1][:60]!r}, {other}; leave the prompt out, or let them agree")
    return _with_system(common, next((turn["content"] for turn in asked if turn["role"] == "system"), None)), sides


def _turn(turn: dict) -> tuple:
    """What of a turn tells it from others."""
    return turn["role"], turn["content"].strip(), turn.get("tool_calls")


def _common_prompt(sides: dict, where: str) -> tuple[str | list[dict], dict]:
    """What all sides begin with, up to their last difference."""
    said = list(sides.values())
    first, last = said[0], said[-1]
    if not first or not last or type(first) is not type(last):
        return "", sides
    key = _turn if isinstance(first, list) else str
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if key(a) != key(b)), min(len(first), len(last)))
    if isinstance(first, list):
        same = min(same, len(first) - 1, len(last) - 1)  # the last turn is the answer, even where both give the same
        if any(turn["role"] != "assistant" for one in said for turn in one[same:][:1]):
            return "", sides  # they answer different questions
    else:
        same = max(first.rfind(" ", 0, same + 1), first.rfind("\n", 0, same + 1)) + 1  # whole words
        if not first[:same].strip():
            raise UserError(f"{where}: no prompt, and chosen and rejected have no common beginning; name it in rl.columns, as in {{prompt: my_column}}")
    return first[:same], {key: one[same:] for key, one in sides.items()}


# ------------------------------------------------------------------------------------- cleaning and splitting

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Seen:
    """Exact duplicates by a 128-bit digest, in a temporary database that moves to disk when it grows."""

    def __init__(self):
        import sqlite3

        self.table = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.table.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self.table.execute("BEGIN")

    def add(self, text: str) -> bool:
        """True if `text` is new."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return self.table.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1


def clean(text: str, data: DataSection, counts: Counter) -> str:
    if not text.isascii() and data.normalize != "none" and not unicodedata.is_normalized(data.normalize, text):
        text = unicodedata.normalize(data.normalize, text)
        counts["normalised"] += 1
    if data.remove_control and CONTROL.search(text):
        text = CONTROL.sub("", text)
        counts["with control characters"] += 1
    return text


def documents(data: DataSection, files: list[Path], counts: Counter, split=None, seen=None) -> Iterator[tuple[str, str, bool]]:
    """Clean documents of the files as (part, text, last), part being "train" or "val" as `split` says."""
    seen = (seen or Seen()) if data.deduplicate else None
    for path in files:
        single_lines = suffix_of(path) not in FORMATS[1:6] and data.text_unit == "line"
        opened, part = False, "train"
        for text, last in read_pieces(path, data.text_unit, data.text_field):
            text = clean(text, data, counts)
            whole = last and not opened
            if whole:
                if len(text.strip()) < data.min_chars:
                    counts["too short"] += 1
                    continue
                if seen and not single_lines and not seen.add(text):
                    counts["duplicates"] += 1
                    continue
            pieces = [(part, text, last)]
            if split is not None:
                pieces = split(text, last, opened, part)
            for part, text, last in pieces:
                counts["documents"] += last
                counts["bytes"] += len(text.encode("utf-8", "surrogatepass"))
                yield part, text, last
            opened = not last


def hash_split(fraction: float):
    """A document's own text decides: the same one falls on the same side whatever else is in the data."""

    def split(text: str, last: bool, opened: bool, part: str):
        if not opened:
            part = "val" if is_held_out(text, fraction) else "train"
        return [(part, text, last)]

    return split


def is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def tail_split(data: DataSection, files: list[Path]):
    """The last documents are held out; a single document is cut at that share of its characters."""
    total, characters = 0, 0
    for _, text, last in documents(data, files, Counter()):
        total, characters = total + last, characters + len(text)
    position = {"documents": 0, "characters": 0}

    def split(text: str, last: bool, opened: bool, part: str):
        if total > 1:
            part = "val" if position["documents"] >= total - max(1, round(total * data.validation_fraction)) else "train"
            position["documents"] += last
            return [(part, text, last)]
        cut = int(characters * (1 - data.validation_fraction)) - position["characters"]
        position["characters"] += len(text)
        if cut <= 0:
            return [("val", text, last)]
        if cut >= len(text):
            return [("train", text, last or cut == len(text))]
        return [("train", text[:cut], True), ("val", text[cut:], last)]

    return split


# ------------------------------------------------------------------------------------------------- token files


class TokenWriter:
    """Appends ids to a temporary file; documents are closed by the end-of-text id."""

    def __init__(self, path: Path, encoder: Encoder, begin: int, end: int):
        self.path, self.encoder, self.begin, self.end = path, encoder, begin, end
        self.file = open(path, "wb")
        self.tokens = self.documents = self.bytes = 0
        self.open = False
        self.queue: list[tuple[str, bool]] = []
        self.queued = 0

    def add(self, text: str, last: bool) -> None:
        self.queue.append((text, last))
        self.queued += len(text)
        if self.queued > 4 * PIECE:
            self.flush()

    def flush(self) -> None:
        parts = []
        for (text, last), ids in zip(self.queue, self.encoder([text for text, _ in self.queue]), strict=True):
            # With one id for both ends, the end of a document is the beginning of the next: written once.
            if not self.open and (self.begin != self.end or self.tokens == 0 and not parts):
                parts.append([self.begin])
            parts.append(ids)
            if last:
                parts.append([self.end])
            self.open = not last
            self.documents += last
            self.bytes += len(text.encode("utf-8", "surrogatepass"))
        if parts:
            joined = np.concatenate([np.asarray(part, dtype=self.encoder.dtype) for part in parts])
            joined.astype(joined.dtype.newbyteorder("<")).tofile(self.file)
            self.tokens += len(joined)
        self.queue, self.queued = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()
        sync(self.path)


class TokenFile(NamedTuple):
    """Ids of one part of the data, its documents' places, and how many bytes of text they stand for (or None)."""

    ids: np.ndarray
    sources: list  # [start, stop) of each path of data.train
    bytes: int | None
    begin: int
    end: int


def token_files(data: DataSection, tokenizer) -> dict[str, TokenFile]:
    """The ids to train on and, where there are any, to validate on: {"train": ..., "val": ...}."""
    names = data.train
    if len(names) == 1 and names[0].endswith(".bin"):
        path = Path(names[0])
        beside = path.with_name(path.name.replace("train", "val"))
        found = {"train": open_tokens(path, tokenizer)}
        if data.validation not in ("hash", "tail", "none"):
            found["val"] = open_tokens(Path(data.validation), tokenizer)
        elif data.validation != "none" and beside != path and beside.exists():
            found["val"] = open_tokens(beside, tokenizer)
        return found
    if any(name.endswith(".bin") for name in names):
        raise UserError("data.train: a .bin file stands alone; text files and .bin files cannot be mixed")
    folder = Path(data.dir)
    if not _fits(folder, data, tokenizer):
        prepare(data, tokenizer)
    return {part: tokens for part in ("train", "val") if len((tokens := open_tokens(folder / f"{part}_ids.bin", tokenizer)).ids)}


def _recipe(data: DataSection, tokenizer) -> dict:
    """Everything that decides the content of the .bin files."""
    recipe = {k: v for k, v in asdict(data).items() if k not in ("weights", "packing", "streaming", "dir")}
    own = [] if data.validation in ("hash", "tail", "none") else [data.validation]
    files = [path for group in expand_paths(data.train) + expand_paths(own, "data.validation") for path in group]
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {**recipe, "tokenizer": fingerprint(tokenizer), "files": stamps}


def _fits(folder: Path, data: DataSection, tokenizer) -> bool:
    """Whether the .bin files in `folder` were made from this data by this tokenizer."""
    recipe = _recipe(data, tokenizer)
    for part in ("train", "val"):
        path = folder / f"{part}_ids.bin"
        if not path.exists() or not path.with_suffix(".json").exists():
            return False
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            return False
        size = path.stat().st_size // np.dtype(facts.get("dtype", "uint16")).itemsize
        if facts.get("recipe") != recipe or facts.get("tokens") != size:
            return False
    return True


def prepare(data: DataSection, tokenizer) -> None:
    """Write train_ids.bin and val_ids.bin with a JSON of facts beside each, whole or not at all."""
    encoder, counts = Encoder(tokenizer), Counter()
    begin, end = begin_id(tokenizer), tokenizer.eos_token_id
    end = begin if end is None else end
    groups = expand_paths(data.train)
    recipe = _recipe(data, tokenizer)
    with staged(data.dir) as scratch:
        writers = {part: TokenWriter(scratch / f"{part}_ids.bin", encoder, begin, end) for part in ("train", "val")}
        spans = {"train": [], "val": []}
        seen = Seen()
        for files in groups:
            starts = {part: writers[part].tokens for part in writers}
            for part, text, last in documents(data, files, counts, _splitter(data, files), seen):
                writers[part].add(text, last)
            for part, writer in writers.items():
                writer.flush()
                spans[part].append([starts[part], writer.tokens])
        if data.validation not in ("hash", "tail", "none"):
            for _, text, last in documents(data, expand_paths([data.validation])[0], counts):
                writers["val"].add(text, last)
        for part, writer in writers.items():
            writer.close()
            facts = {"format": 1, "dtype": np.dtype(encoder.dtype).name, "tokens": writer.tokens, "documents": writer.documents,
                     "bytes": writer.bytes, "begin": begin, "end": end, "vocab_size": len(tokenizer),
                     "sources": spans[part], "recipe": recipe}
            (scratch / f"{part}_ids.json").write_text(json.dumps(facts, indent=1))
        total = writers["train"].tokens
        if not writers["train"].documents:
            raise UserError("data.train: holds no text to train on")
    dropped = ", ".join(f"{counts[k]:,} {k}" for k in ("too short", "duplicates", "normalised", "with control characters") if counts[k])
    say(f"{counts['documents']:,} documents, {counts['bytes'] / 1e6:.2f} MB -> {total:,} tokens to train on, "
        f"{writers['val'].tokens:,} held out" + (f" ({dropped})" if dropped else ""))


def _splitter(data: DataSection, files: list[Path]):
    if data.validation == "hash":
        return hash_split(data.validation_fraction)
    return tail_split(data, files) if data.validation == "tail" else None


def open_tokens(path: Path, tokenizer) -> TokenFile:
    """Map a token file; without a JSON beside it (nanoGPT's) it is read as uint16. A misfit is refused."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    facts = read_json(path.with_suffix(".json")) if path.with_suffix(".json").exists() else {}
    made_by = facts.get("recipe", {}).get("tokenizer")
    if made_by and made_by != fingerprint(tokenizer):
        raise UserError(f"{path}: made by another tokenizer; delete it, or name that tokenizer with --tokenizer.name")
    dtype = np.dtype(facts.get("dtype", "uint16")).newbyteorder("<")
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise UserError(f"{path}: {size} bytes are not a whole number of {dtype.name} ids; the file is cut short")
    if facts and facts["tokens"] != size // dtype.itemsize:
        raise UserError(f"{path}: {size // dtype.itemsize} ids, its JSON says {facts['tokens']}; delete both to rebuild")
    ids = np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    with open(path, "rb") as file:  # read, not mapped: pages of a map count as this process's memory
        largest = 0
        while len(part := np.fromfile(file, dtype, 2**22)):
            largest = max(largest, int(part.max()))
    if largest >= len(tokenizer):
        raise UserError(f"{path}: holds id {largest}, the tokenizer has {len(tokenizer)}; it was made by another tokenizer")
    begin = begin_id(tokenizer)
    end = begin if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return TokenFile(ids, facts.get("sources") or [[0, len(ids)]], facts.get("bytes"), facts.get("begin", begin), facts.get("end", end))


# ----------------------------------------------------------------------------------------------------- packing


class Spans:
    """Documents as (start, stop) places in an array of ids: token i predicts token i + 1 for start <= i < stop.

    A document is begin, text, end; it has one (input, target) pair fewer than tokens. Where one id is both ends,
    the end of a document is also the beginning of the next.
    """

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


class Rows:
    """One epoch's rows of at most `length` pairs, in the order drawn from `seed`; row(i) gives pieces of documents.

    Packed: the documents are shuffled, laid end to end, cut every `length` pairs, and the rows shuffled. The slack of
    the last row moves the first cut, so that one long document is not cut alike in every epoch. Every pair is in
    exactly one row.
    """

    def __init__(self, spans: Spans, length: int, packing: bool, seed: list[int] | None):
        self.spans, self.length, self.packing = spans, length, packing
        random = np.random.default_rng(seed) if seed is not None else None
        documents = len(spans.lengths)
        self.order = random.permutation(documents) if random else np.arange(documents)
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
        """The i-th row as (start, stop) pieces of the ids."""
        index = int(self.rows[i])
        if not self.packing:
            place = int(np.searchsorted(self.edges, index, "right")) - 1
            document, offset = self.order[place], (index - int(self.edges[place])) * self.length
            start = int(self.spans.starts[document]) + offset
            return [(start, start + min(self.length, int(self.spans.lengths[document]) - offset))]
        low = max(index * self.length - self.phase, 0)
        high = min((index + 1) * self.length - self.phase, int(self.edges[-1]))
        pieces, place = [], int(np.searchsorted(self.edges, low, "right")) - 1
        while low < high:
            document, offset = self.order[place], low - int(self.edges[place])
            take = min(int(self.spans.lengths[document]) - offset, high - low)
            start = int(self.spans.starts[document]) + offset
            pieces.append((start, start + take))
            low, place = low + take, place + 1
        return pieces


class Examples(NamedTuple):
    """Conversations as ids end to end, each id with its weight as a target; like `Spans`, but never cut."""

    ids: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray  # (input, target) pairs, one fewer than ids
    group: int = 1  # this many neighbours share a row and are never packed with others: the two sides of a pair


class WholeRows:
    """One epoch's rows of whole examples. Packed: of each thousand in the shuffled order the longest comes first, into
    the fullest row that still has room for it (best-fit decreasing, Krell 2021, section 3.1); the rows are shuffled."""

    def __init__(self, examples: Examples, length: int, packing: bool, seed: list[int] | None):
        self.spans = examples
        random = np.random.default_rng(seed) if seed is not None else None
        count, group = len(examples.lengths) // examples.group, examples.group
        order = random.permutation(count) if random else np.arange(count)
        self.members = self._packed(order, length) if packing else [[*range(int(i) * group, int(i + 1) * group)] for i in order]
        self.count = len(self.members)
        self.order = random.permutation(self.count) if random else np.arange(self.count)

    def _packed(self, order: np.ndarray, length: int) -> list[list[int]]:
        sizes, done = self.spans.lengths, []
        for start in range(0, len(order), 1000):
            window, rows = order[start : start + 1000], []  # rows: (room, number, members), by room
            for number, i in enumerate(window[np.argsort(-sizes[window], kind="stable")]):
                place = bisect.bisect_left(rows, (int(sizes[i]),))
                room, _, members = rows.pop(place) if place < len(rows) else (length, number, [])
                members.append(int(i))
                bisect.insort(rows, (room - int(sizes[i]), number, members))
            done += [members for _, _, members in sorted(rows, key=lambda row: row[1])]
        return done

    def row(self, i: int) -> list[tuple[int, int]]:
        starts, lengths = self.spans.starts, self.spans.lengths
        return [(int(starts[e]), int(starts[e] + lengths[e])) for e in self.members[int(self.order[i])]]


def collate(ids: np.ndarray, rows: list[list[tuple[int, int]]], width: int | None = None, weights: np.ndarray | None = None) -> dict:
    """Rows of pieces -> a batch: input_ids, targets, positions, segment_ids (B, T), counts.

    Each piece is a segment of its own with positions from 0; padding has target -100 and position -1. Full rows
    of one piece each need neither positions nor segments: plain causal attention is the same and faster.
    `weights` says how much each id counts as a target: at 0 it is none, and others stand in batch["weights"] (B, T).
    """
    longest = max((sum(stop - start for start, stop in row) for row in rows), default=0)
    width = width or max(longest, 1)
    shape = (len(rows), width)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    positions, segments = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    worth = None if weights is None else np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        at = 0
        for segment, (start, stop) in enumerate(row):
            there = slice(at, at + stop - start)
            inputs[r, there], targets[r, there] = ids[start:stop], ids[start + 1 : stop + 1]
            positions[r, there], segments[r, there] = np.arange(stop - start), segment
            if worth is not None:
                worth[r, there] = weights[start + 1 : stop + 1]
            at += stop - start
    if worth is not None:
        targets[worth == 0] = -100
    batch = {"input_ids": inputs, "targets": targets, **({} if worth is None else {"weights": worth})}
    if not all(len(row) == 1 and row[0][1] - row[0][0] == width for row in rows):
        batch.update(positions=positions, segment_ids=segments)
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    counts = {"tokens": int((targets != -100).sum())}
    if worth is not None:
        counts = {"tokens": float(worth.sum()), "read": int((positions >= 0).sum())}
    return {**batch, "counts": counts}


class TokenStream:
    """Endless batches of packed rows for `TRAIN.fit`; the order depends on (seed, epoch) alone.

    One optimizer step takes the next batch_size * grad_accum * world_size rows, whichever process computes them.
    The last step of an epoch is filled up with rows of padding. `blocks(epoch)` yields lists of spans to draw from:
    one list for a token file; many, made on the fly, when streaming from text.
    """

    joined = False  # the rows of a batch end to end in one row, without padding, for kernels that take them so
    fixed = False  # rows are cut once, whatever the seed, and only change their order: what was computed of one stays true

    def __init__(self, blocks, batch_size: int, length: int, packing: bool = True, weights=None, blocks_known: bool = True):
        self.blocks, self.batch_size, self.length, self.packing, self.weights = blocks, batch_size, length, packing, weights
        self.known = blocks_known
        self.epoch = self.block = self.next_row = 0
        self.steps_per_epoch = None

    def start(self, run) -> None:
        self.run = run
        self.per_step = self.batch_size * run.grad_accum * run.world_size
        self.width = self.length if getattr(run, "static_shapes", False) else None
        self.queue: list[dict] = []
        self._open_epoch()
        if self.known:
            self.steps_per_epoch = -(-self._count // self.per_step)

    def _open_epoch(self) -> None:
        """Go to (epoch, block), skipping blocks that were used before a resume."""
        self.iterator = iter(self.blocks(self.epoch))
        for _ in range(self.block + 1):
            spans = next(self.iterator, None)
        self._open_block(spans)

    def _open_block(self, spans: list[Spans]) -> None:
        seed = [self.run.seed, self.epoch, self.block]
        if self.weights is None:
            self.parts = [self.cut(spans, [0] if self.fixed else seed)]
            self._count = self.parts[0].count
            self.shuffled = np.random.default_rng([*seed, 2]).permutation(self._count) if self.fixed else np.arange(self._count)
        else:
            self.sources = spans
            sizes = [Rows(s, self.length, self.packing, None).count for s in spans]
            self._count = sum(sizes)
            share = np.array(self.weights, float) / sum(self.weights)
            self.choice = np.random.default_rng([*seed, 1]).choice(len(spans), self._count, p=share)
            self.turn = np.zeros(self._count, np.int64)  # how often the row's source was drawn before
            for s in range(len(spans)):
                self.turn[self.choice == s] = np.arange((self.choice == s).sum())
            self.sizes, self.laps = sizes, {}

    def cut(self, spans: list[Spans], seed: list[int]) -> Rows | WholeRows:
        kind = WholeRows if isinstance(spans[0], Examples) else Rows
        return kind(_pooled(spans), self.length, self.packing, seed)

    def _row(self, i: int):
        if i >= self._count:
            return []
        if self.weights is None:
            return self.parts[0].row(int(self.shuffled[i]))
        source = int(self.choice[i])
        lap, place = divmod(int(self.turn[i]), self.sizes[source])
        if (source, lap) not in self.laps:  # a small source is drawn again, in another order
            seed = [self.run.seed, self.epoch, self.block, source, lap]
            self.laps[source, lap] = Rows(self.sources[source], self.length, self.packing, seed)
        return self.laps[source, lap].row(place)

    def _spans(self) -> Spans | Examples:
        return self.parts[0].spans if self.weights is None else self.sources[0]

    def __next__(self) -> dict:
        if not self.queue:
            if self.next_row >= self._count:
                self._advance()
            run, size = self.run, self.batch_size
            for micro in range(run.grad_accum):
                first = self.next_row + (micro * run.world_size + run.rank) * size
                rows = [self._row(i) for i in range(first, first + size)]
                if self.joined:
                    rows = [list(itertools.chain(*rows))]
                batch = collate(self._spans().ids, rows, self.width, getattr(self._spans(), "weights", None))
                if self.fixed:
                    batch["rows"] = torch.tensor([self.shuffled[i] if i < self._count else -1 for i in range(first, first + size)])
                self.queue.append({**batch, "place": (self.epoch, self.block, first)})
            self.next_row += self.per_step
        return self.queue.pop(0)

    def _advance(self) -> None:
        spans = next(self.iterator, None)
        self.next_row, self.block = 0, self.block + 1
        if spans is None:
            self.epoch, self.block = self.epoch + 1, 0
            self._open_epoch()
        else:
            self._open_block(spans)

    def state_dict(self) -> dict:
        """The position, at a step boundary."""
        return {"epoch": self.epoch, "block": self.block, "next_row": self.next_row}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.block = state["epoch"], state["block"]
        self.queue = []
        self._open_epoch()
        self.next_row = state["next_row"]


def _pooled(spans: list[Spans]) -> Spans:
    """Several sources of the same ids as one."""
    if len(spans) == 1:
        return spans[0]
    pooled = object.__new__(Spans)
    pooled.ids = spans[0].ids
    pooled.starts = np.concatenate([s.starts for s in spans])
    pooled.lengths = np.concatenate([s.lengths for s in spans])
    return pooled


def file_stream(tokens: TokenFile, data: DataSection, batch_size: int, length: int) -> TokenStream:
    """The training stream of a token file."""
    # Where one id is both ends, a source begins with the end of the one before it.
    shared = tokens.begin == tokens.end
    spans = [Spans(tokens, start - (shared and start > 0 and stop > start), stop) for start, stop in tokens.sources]
    if data.weights and len(spans) != len(data.weights):
        raise UserError(f"data.weights: {len(data.weights)} weights, the token file has {len(spans)} sources")
    if data.weights and not all(s.pairs for s in spans):
        raise UserError("data.weights: a source holds no text to train on")
    if sum(s.pairs for s in spans) < 1:
        raise UserError("data.train: fewer than two tokens in all; there is nothing to predict")
    return TokenStream(lambda epoch: [spans], batch_size, length, data.packing, data.weights)


def text_stream(data: DataSection, tokenizer, batch_size: int, length: int, buffer_bytes: int = 2**23) -> TokenStream:
    """Batches straight from text: blocks of about 8 MB are read in order, tokenized, and shuffled within."""
    if data.weights:
        raise UserError("data.weights: needs data.streaming false")
    encoder, begin = Encoder(tokenizer), begin_id(tokenizer)
    end = begin if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    files = [path for group in expand_paths(data.train) for path in group]

    def block(texts: list[tuple[str, bool]]) -> list[Spans]:
        parts, opened = [], False
        for (_, last), ids in zip(texts, encoder([text for text, _ in texts]), strict=True):
            parts += ([] if opened or (begin == end and parts) else [[begin]]) + [ids] + ([[end]] if last else [])
            opened = not last
        joined = np.concatenate([np.asarray(part, dtype=encoder.dtype) for part in parts])
        return [Spans(TokenFile(joined, [], None, begin, end))]

    def blocks(epoch: int):
        texts, size, found = [], 0, False
        split = _splitter(data, files)
        for part, text, last in documents(data, files, Counter(), split):
            if part == "val":
                continue
            texts.append((text, last))
            size += len(text)
            if size >= buffer_bytes:
                yield block(texts)
                texts, size, found = [], 0, True
        if texts:
            yield block(texts)
        elif not found:
            raise UserError("data.train: fewer than two tokens in all; there is nothing to predict")

    return TokenStream(blocks, batch_size, length, data.packing, blocks_known=False)


def fixed_batches(tokens: TokenFile | Examples, batch_size: int, length: int, packing: bool, limit: int | None = None) -> list[dict]:
    """Validation: the same rows in the same order every time, spread over the whole file when limited."""
    rows = WholeRows(tokens, length, packing, None) if isinstance(tokens, Examples) else Rows(Spans(tokens), length, packing, None)
    chosen = np.arange(rows.count)
    if limit is not None and rows.count > limit * batch_size:
        chosen = np.linspace(0, rows.count - 1, limit * batch_size).astype(int)
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [collate(tokens.ids, [rows.row(int(i)) for i in group], weights=getattr(tokens, "weights", None)) for group in groups]


# ---------------------------------------------------------------------------------------------------- choosing


def choose(section: TokenizerSection, data: DataSection, model_name: str | None = None):
    """The tokenizer of a run: named, the model's own, or trained on the data (kept in data.dir/tokenizer)."""
    if section.name or model_name:
        return load(section.name or model_name)
    folder = Path(data.dir) / "tokenizer"
    if any(name.endswith(".bin") for name in data.train):
        path = Path(data.train[0]).parent / "tokenizer"
        if not path.exists():
            raise UserError(f"{data.train[0]}: ids without their tokenizer; name it with --tokenizer.name")
        return load(path)
    recipe = {"kind": section.kind, "vocab_size": section.vocab_size, "data": _sample_recipe(data)}
    stamp = folder / "trained_on.json"
    if stamp.exists() and (folder / "tokenizer.json").exists() and read_json(stamp) == recipe:
        return load(folder)
    say(f"training a {section.kind} tokenizer of {section.vocab_size} pieces")
    tokenizer = train(sample_texts(data), section.vocab_size, section.kind)
    if len(tokenizer) < 2 or tokenizer.backend_tokenizer.get_vocab_size() < 2:
        raise UserError("data.train: no text to train a tokenizer on")
    with staged(folder) as scratch:
        tokenizer.save_pretrained(scratch)
        (scratch / stamp.name).write_text(json.dumps(recipe, indent=1))
    return tokenizer


def _sample_recipe(data: DataSection) -> list:
    files = [path for group in expand_paths(data.train) for path in group]
    return [data.text_unit, data.normalize, *([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def sample_texts(data: DataSection, limit: int = 64_000_000) -> Iterator[str]:
    """Training text for a tokenizer: an equal share of each file's beginning, at most `limit` characters in all."""
    files = [path for group in expand_paths(data.train) for path in group]
    for path in files:
        left = limit // len(files)
        for part, text, _ in documents(data, [path], Counter(), _splitter(data, [path])):
            if part == "train":
                yield text
                left -= len(text)
            if left <= 0:
                break


def warn_short_lines(data: DataSection, tokens: TokenFile, length: int) -> None:
    if data.text_unit == "line" and any(suffix_of(Path(name)) not in FORMATS[1:6] for name in data.train):
        lengths = Spans(tokens).lengths
        if len(lengths) and len(lengths) > 1 and lengths.mean() < length / 8:
            say(f"lines are short ({lengths.mean():.0f} tokens) against max_length {length}: if they belong together, "
                "--data.text_unit blank_line or file lets the model see more at once")


SECTIONS = {"model": ModelSection, "tokenizer": TokenizerSection, "data": DataSection}


def main(argv: list[str] | None = None) -> None:
    actions: dict[str, Action] = {}
    config = load_config(argv, SECTIONS, "tokenizer", actions, __doc__, {"out": "data.dir"})
    own = config.tokenizer.name or config.model.name
    tokenizer = choose(config.tokenizer, config.data, config.model.name)
    if not own:
        say(f"tokenizer of {len(tokenizer):,} pieces in {Path(config.data.dir) / 'tokenizer'}")
    if not _fits(Path(config.data.dir), config.data, tokenizer):
        prepare(config.data, tokenizer)
    for part, tokens in token_files(config.data, tokenizer).items():
        ratio = f", {tokens.bytes / len(tokens.ids):.2f} bytes each" if tokens.bytes else ""
        say(f"{Path(config.data.dir) / (part + '_ids.bin')}: {len(tokens.ids):,} ids{ratio}")


if __name__ == "__main__":
    run_main(main)
