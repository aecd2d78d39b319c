"""TOKENIZER.py against transformers, plain Python and direct computation."""

import csv
import gzip
import json
import math
import os
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, make_text
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import MODEL
import TOKENIZER
from bench import templates
from MODEL import UserError

DIFFICULT = [
    "", " ", "  ", "\n", "\r\n", "a", " a", "a ", "a  ", "  a", "a b", "a  b", "a   b c", "a\tb", "a \tb", "a\t b", "\t\t x",
    "one\ntwo", "one\n two", "one \ntwo", "one\n\n two", "one\r\ntwo\r\n", "one \r\n two", "line one.\n  indented\n\n\nend\n",
    "It's 12 plus 30 = 42!", "don't, we'll; I'd (no) \"x\"...", "x_y a-b 3.14 1e-5 $5 50% #1", "caf\u00e9 e\u0301 na\u00efve", "你好 世界。日本 語",
    "\U0001f469\u200d\U0001f680 ok \U0001f600\U0001f600", "\u0438 \u0434\u0440\u0443\u0433\u0438\u0435",
    "UPPER lower MiXed", "a.b.c", "...", " . , !", "trailing \n ", "\n leading", "the red fox " * 5,
]
# A space next to other white space: patterns match both as one run.
MIXED_SPACES = ["x\u3000 \u3000y", "x\u00a0 \u00a0y", "a\n 5 b", "a\t 8", "a\u00a0 7",
          "a\n \u00a0b", "\x0b \x0b", "x\u2028 \u2028 y", "\t <|endoftext|>"]


@pytest.fixture(scope="module")
def corpus():
    return make_text(120) + (DIFFICULT + MIXED_SPACES) * 6


def byte_bpe(texts, pre, vocab_size=420, normalizer=None, added=None):
    """A byte-level BPE with other settings than TOKENIZER.train."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre, decoders.ByteLevel()
    if normalizer:
        raw.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False,
                                                       special_tokens=["<|endoftext|>"]))
    if added:
        raw.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def byte_level(**options):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


def plain_ids(tokenizer, texts):
    """Oracle: the library, for each text separately; special tokens that occur in a text are plain text."""
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def separate_ends(tokenizer):
    """A tokenizer with different ids for the beginning and the end of a text."""
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    return other


def section(*paths, **settings):
    return TOKENIZER.DataSection(train=[str(path) for path in paths], **settings)


# -------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", TOKENIZER.KINDS)
def test_kinds_train_and_open_in_transformers(kind, tmp_path):
    texts = make_text(100)
    tokenizer = TOKENIZER.train(texts, 330, kind)
    TOKENIZER.save(tokenizer, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), TOKENIZER.load(tmp_path)
    probe = [*texts[:10], "Unseen \u4f60 42", "<|im_start|>user"]
    assert theirs(probe).input_ids == ours(probe).input_ids == tokenizer(probe).input_ids
    assert TOKENIZER.fingerprint(ours) == TOKENIZER.fingerprint(tokenizer)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (TOKENIZER.END, TOKENIZER.END, TOKENIZER.PAD)
    assert theirs(texts[0]).input_ids[0] == theirs.convert_tokens_to_ids(TOKENIZER.END)
    assert len(theirs) <= 330 and sorted(theirs.get_vocab().values()) == list(range(len(theirs)))


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_byte_level_kinds_give_back_any_text(kind, corpus):
    tokenizer = TOKENIZER.train(make_text(50), 330, kind)
    for text in corpus[120:]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_byte_kind_is_one_id_per_byte():
    tokenizer = TOKENIZER.train([], 5, "byte")
    assert len(tokenizer) == 261
    for text in DIFFICULT:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_char_kind_is_one_id_per_seen_character():
    tokenizer = TOKENIZER.train(DIFFICULT, 500, "char")
    for text in DIFFICULT:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    unknown = tokenizer.convert_tokens_to_ids(TOKENIZER.UNKNOWN)
    assert tokenizer("a\u0416", add_special_tokens=False).input_ids[1] == unknown
    few = TOKENIZER.train(["aaaa bbb cc d"], 6 + 3, "char")  # the commonest characters stay
    assert set(few.get_vocab()) - {TOKENIZER.END, TOKENIZER.PAD, TOKENIZER.UNKNOWN, TOKENIZER.MASK, *TOKENIZER.CHAT_TOKENS} == set("ab ")


def test_digits_are_single_tokens_in_bpe():
    texts = ["12345 12345 2024 2024 12 plus 30 makes 42"] * 200
    tokenizer = TOKENIZER.train(texts, 400, "bpe")
    for token in tokenizer.tokenize("12345 and 2024, x7y 42."):
        assert not re.search(r"\d", token) or re.fullmatch(r"\d", token), token
    assert "plus" in {token.strip("\u0120") for token in tokenizer.get_vocab()}  # words were merged


@pytest.mark.parametrize("kind", TOKENIZER.KINDS)
def test_special_tokens_are_reserved(kind):
    tokenizer = TOKENIZER.train(make_text(50), 330, kind)
    names = [TOKENIZER.END, TOKENIZER.PAD, *TOKENIZER.CHAT_TOKENS, TOKENIZER.MASK]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == names
    for i, name in enumerate(names):
        ids = tokenizer("the" + name + "fox", add_special_tokens=False).input_ids
        assert ids.count(i) == 1
        assert name not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 261), ("char", 6)])
def test_vocab_size_too_small(kind, size):
    with pytest.raises(UserError, match=rf"tokenizer.vocab_size: {size} is too small.*{size + 1}"):
        TOKENIZER.train(make_text(5), size, kind)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "sentencepiece"])
def test_other_kinds_are_not_trained(kind):
    with pytest.raises(UserError, match=f"tokenizer.kind: '{kind}' is not one of bpe, char, byte"):
        TOKENIZER.train(make_text(5), 300, kind)


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="contains no tokenizer"):
        TOKENIZER.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        TOKENIZER.load(tmp_path)


def test_prompts_begin_like_documents(tokenizer):
    assert TOKENIZER.encode_prompt(tokenizer, "the fox") == tokenizer("the fox").input_ids
    assert TOKENIZER.encode_prompt(tokenizer, "") == [tokenizer.bos_token_id]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=TOKENIZER.END)
    assert TOKENIZER.begin_id(bare) == bare.eos_token_id
    with pytest.raises(UserError, match="no beginning-of-text and no end-of-text token"):
        TOKENIZER.begin_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))


def with_ends(tokenizer, single):
    """A tokenizer that adds special tokens to a text according to the template `single`."""
    from tokenizers import processors

    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(t, raw.token_to_id(t)) for t in TOKENIZER.CHAT_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("single", ["<|im_start|> $A <|im_end|>", "<|im_start|> $A", "$A <|im_end|>", "$A"])
@pytest.mark.parametrize("prefix", ["", "<|im_start|>"])
def test_a_prompt_has_one_beginning_and_no_end(single, prefix, tokenizer):
    tokenizer = with_ends(tokenizer, single)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, completion = TOKENIZER.encode_pair(tokenizer, prefix + "the red", " fox ran")
    starts = single.startswith("<") or bool(prefix)
    assert ids.count(begin) == starts and ids[0] == begin or not starts
    assert end not in ids + completion and tokenizer.decode([*ids, *completion]).endswith("the red fox ran")
    assert TOKENIZER.encode_prompt(tokenizer, prefix + "the red") == ids
    assert TOKENIZER.encode_prompt(tokenizer, "") == [begin]


def test_a_trailing_space_of_a_prompt_belongs_to_the_completion(tokenizer):
    whole = tokenizer("the red fox").input_ids
    for cut in (3, 4, 7, 8):  # "the" " red", "the " "red", ...
        prompt, completion = TOKENIZER.encode_pair(tokenizer, "the red fox"[:cut], "the red fox"[cut:])
        assert prompt + completion == whole and tokenizer.decode(completion) == "the red fox"[cut - (cut in (4, 8)) :]
    llama = metaspace_bpe(make_text(200))  # adds a leading space to every text
    prompt, completion = TOKENIZER.encode_pair(llama, "the red", " fox ran")
    assert llama.decode([*prompt, *completion], skip_special_tokens=True) == "the red fox ran"


def test_trailing_padding_is_removed():
    assert TOKENIZER.without_padding([5, 6, 0, 7, 0, 0], 0) == [5, 6, 0, 7]
    assert TOKENIZER.without_padding([5, 6], None) == [5, 6] and TOKENIZER.without_padding([0, 0], 0) == [0]


# ----------------------------------------------------------------------------------------------------- encoder

WORD_TOKENIZERS = {
    "ours": lambda texts: TOKENIZER.train(texts, 420),
    "gpt2": lambda texts: byte_bpe(texts, byte_level(use_regex=True)),
    "digits": lambda texts: byte_bpe(texts, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(use_regex=True)])),
}


@pytest.mark.parametrize("name", WORD_TOKENIZERS)
def test_encoder_equals_the_tokenizer(name, corpus):
    tokenizer = WORD_TOKENIZERS[name](corpus)
    encoder = TOKENIZER.Encoder(tokenizer)
    assert encoder.by_words  # otherwise the cache is not tested
    for _ in range(2):  # the second time from the cache
        got = encoder(DIFFICULT)
        assert [ids.tolist() for ids in got] == plain_ids(tokenizer, DIFFICULT)
    assert all(ids.dtype == np.uint16 for ids in got)
    together = "".join(DIFFICULT)
    assert encoder([together])[0].tolist() == plain_ids(tokenizer, [together])[0]


@pytest.mark.parametrize("name", WORD_TOKENIZERS)
def test_encoder_on_mixed_white_space(name, corpus):
    """The runs are frequent in the training text, so they are merged to tokens."""
    tokenizer = WORD_TOKENIZERS[name](MIXED_SPACES * 20 + corpus)
    got = TOKENIZER.Encoder(tokenizer)(MIXED_SPACES)
    assert {t: ids.tolist() for t, ids in zip(MIXED_SPACES, got)} == dict(zip(MIXED_SPACES, plain_ids(tokenizer, MIXED_SPACES)))


def test_encoder_on_random_texts():
    rng = np.random.default_rng(0)
    parts = ["the", "red", "fox", "5", "42", " ", "  ", "\n", "\t", "\r\n", ",", "'s", "\u4f60", "\u00e9", "(", " a", " b"]
    texts = ["".join(rng.choice(parts, rng.integers(0, 14))) for _ in range(600)]
    for make in WORD_TOKENIZERS.values():
        tokenizer = make(texts)
        got = [ids.tolist() for ids in TOKENIZER.Encoder(tokenizer)(texts)]
        wrong = [text for text, a, b in zip(texts, got, plain_ids(tokenizer, texts)) if a != b]
        assert not wrong, wrong[:3]


def test_encoder_is_exact_after_its_cache_is_cleared(monkeypatch, corpus):
    monkeypatch.setattr(TOKENIZER.Encoder, "LIMIT", 40)
    tokenizer = TOKENIZER.train(corpus, 420)
    encoder = TOKENIZER.Encoder(tokenizer)
    texts = make_text(60, seed=3) + DIFFICULT
    sizes = []
    for i in range(0, len(texts), 4):
        batch = texts[i : i + 4] + texts[:2]
        assert [ids.tolist() for ids in encoder(batch)] == plain_ids(tokenizer, batch)
        sizes.append(len(encoder.words))
    assert any(b < a for a, b in zip(sizes, sizes[1:])), "the limit was never hit"


def test_encoder_dtype_follows_the_vocabulary():
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(2**16 + 1)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TOKENIZER.Encoder(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w1"))
    got = encoder([f"w5 w{2**16}"])[0]
    assert got.dtype == np.uint32 and got.tolist() == [5, 2**16]


def metaspace_bpe(texts):
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<unk>")


def word_pieces(texts):
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=330, special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", bos_token="[UNK]")


NOT_BY_WORDS = {
    "metaspace": metaspace_bpe,
    "prefix_space": lambda texts: byte_bpe(texts, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "normalizer": lambda texts: byte_bpe(texts, byte_level(), normalizer=normalizers.Strip()),
    "lstrip": lambda texts: byte_bpe(texts, byte_level(), added=AddedToken("fox", lstrip=True, normalized=False)),
    "rstrip": lambda texts: byte_bpe(texts, byte_level(), added=AddedToken("fox", rstrip=True, normalized=False)),
    "two_words": lambda texts: byte_bpe(texts, byte_level(), added=AddedToken("red fox", normalized=False)),
    "across_words": lambda texts: byte_bpe(texts, byte_level(use_regex=False)),
    "space_behind": lambda texts: byte_bpe(texts, pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_previous"), byte_level(use_regex=False)])),
    "wordpiece": lambda texts: word_pieces(texts),
    "char": lambda texts: TOKENIZER.train(texts, 330, "char"),
}


@pytest.mark.parametrize("name", NOT_BY_WORDS)
def test_encoder_disables_its_cache_for_other_tokenizers(name):
    tokenizer = NOT_BY_WORDS[name](make_text(200))
    encoder = TOKENIZER.Encoder(tokenizer)
    assert not encoder.by_words
    texts = make_text(30, seed=1) + ["the red fox", " a fox  ran", "fox"]
    assert [ids.tolist() for ids in encoder(texts)] == plain_ids(tokenizer, texts)


# ----------------------------------------------------------------------------------------------------- readers

DOCUMENTS = ['First, with "quotes" and, commas.', "Two\nlines\n\nand a gap", "caf\u00e9 \u4f60\u597d \U0001f600", "tabs are fine",
             "  kept  blanks  ", "x" * 300]


def write_format(path, texts, field="text"):
    """Write documents in any format, with an additional column."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=2)
        return path
    with gzip.open(path, "wt", encoding="utf-8", newline="") if path.suffix == ".gz" else \
            open(path, "w", encoding="utf-8", newline="") as file:
        if suffix == "json":
            json.dump([{"id": i, field: text} for i, text in enumerate(texts)], file)
        elif suffix == "jsonl":
            file.write("\n\n".join(json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)))
        else:
            table = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            table.writerows([["id", field], *enumerate(texts)])
    return path


def read(path, unit="line", field="text"):
    return list(TOKENIZER.read_documents(path, unit, field))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_record_formats_give_the_documents(name, field, tmp_path):
    path = write_format(tmp_path / name, DOCUMENTS, field)
    assert read(path, field=field) == DOCUMENTS


TEXT = "one line\n\n  two \n\nthree\nfour\n\n\n\nfive"
UNITS = {"line": ["one line", "  two ", "three", "four", "five"], "blank_line": ["one line", "  two ", "three\nfour", "five"],
         "file": [TEXT]}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_units(unit, name, ending, mark, tmp_path):
    data = (mark + TEXT + ending).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    expected = [TEXT + ending] if unit == "file" else UNITS[unit]
    assert read(tmp_path / name, unit) == expected


def test_crlf_line_ends_and_byte_order_marks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\r\nthree\r\n")
    assert read(tmp_path / "a.txt", "line") == ["one", "two", "three"]
    assert read(tmp_path / "a.txt", "blank_line") == ["one", "two\r\nthree"]
    assert read(tmp_path / "a.txt", "file") == ["one\r\n\r\ntwo\r\nthree\r\n"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n"a\r\nb",1\r\nc,2\r\n')
    assert read(tmp_path / "a.jsonl") == ["a", "b"]
    assert read(tmp_path / "a.csv") == ["a\r\nb", "c"]


LONG = {
    "line": " ".join(make_text(8)) + "\nshort\n" + "word " * 40 + "end",
    "blank_line": "\n".join(make_text(12)) + "\n\n" + "\n".join(make_text(6, seed=2)) + "\n\nlast",
    "file": "\n".join(make_text(12)) + "\n\n  indented\n\n" + "\n".join(make_text(6, seed=2)),
}


@pytest.mark.parametrize("unit", LONG)
def test_long_documents_are_split_at_line_ends(unit, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text(LONG[unit])
    whole = read(tmp_path / "a.txt", unit)
    assert whole == {"line": LONG[unit].split("\n"), "blank_line": LONG[unit].split("\n\n"), "file": [LONG[unit]]}[unit]
    monkeypatch.setattr(TOKENIZER, "LONGEST", 150)
    cut = read(tmp_path / "a.txt", unit)
    assert len(cut) > len(whole) and max(map(len, cut)) <= 150
    if unit == "file":
        assert "".join(cut) == LONG[unit] and all(text.endswith("\n") for text in cut[:-1])
    elif unit == "blank_line":
        assert {line for text in cut for line in text.split("\n")} == set(LONG[unit].split("\n")) - {""}
    else:
        assert "".join(cut) == LONG[unit].replace("\n", "")


def test_a_carriage_return_at_a_split_is_kept(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abcd\refgh\n")
    monkeypatch.setattr(TOKENIZER, "LONGEST", 7)
    assert "".join(read(tmp_path / "a.txt", "file")) == "abcd\refgh\n"


def test_long_jsonl_and_csv_lines_are_complete(monkeypatch, tmp_path):
    monkeypatch.setattr(TOKENIZER, "LONGEST", 20)
    for name in ("a.jsonl", "a.csv"):
        assert "".join(read(write_format(tmp_path / name, DOCUMENTS))) == "".join(DOCUMENTS)


@pytest.mark.parametrize("kind", TOKENIZER.KINDS)
@pytest.mark.parametrize("unit", LONG)
def test_documents_are_tokenized_whole(unit, kind, tmp_path):
    (tmp_path / "a.txt").write_text(LONG[unit] * 40)
    tokenizer = TOKENIZER.train(make_text(50), 330, kind)
    expected = []
    for document in read(tmp_path / "a.txt", unit):
        expected += [tokenizer.eos_token_id, *plain_ids(tokenizer, [document])[0]]
    data = section(tmp_path / "a.txt", text_unit=unit, validation="none", deduplicate=False, dir=str(tmp_path / "bin"))
    got = TOKENIZER.token_files(data, tokenizer)["train"].ids.tolist()
    assert got == [*expected, tokenizer.eos_token_id]


def test_paths_files_folders_and_globs(tmp_path):
    for name in ("b/1.txt", "b/deep/2.jsonl", "b/3.csv.gz", "b/4.parquet", "b/ignored.png", "c1.txt", "c2.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(("txt", "png")):
            (tmp_path / name).write_text(f"in {name}\n")
        else:
            write_format(tmp_path / name, [f"in {name}"])
    groups = TOKENIZER.expand_paths([str(tmp_path / "b"), str(tmp_path / "c?.txt"), str(tmp_path / "c1.txt")])
    names = [[str(p.relative_to(tmp_path)) for p in group] for group in groups]
    assert names == [["b/1.txt", "b/3.csv.gz", "b/4.parquet", "b/deep/2.jsonl"], ["c1.txt", "c2.txt"], ["c1.txt"]]
    texts = [t for _, t in TOKENIZER.documents(section("x"), groups[0] + groups[1], Counter())]
    assert texts == [f"in {name}" for name in sum(names[:2], [])]


# --------------------------------------------------------------------------------------------------- bad input


def truncated_gzip(text):
    rng = np.random.default_rng(0)
    noise = "".join(rng.choice(list("abcdefghij"), 40000))
    data = gzip.compress(text.replace("NOISE", noise).encode())
    return data[: len(data) // 2]


def parquet_bytes(tmp_path, column, name="text"):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({name: column}), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


BAD = {
    "binary.txt": (b"PK\0\1text\n", "binary"),
    "late_nul.txt": (b"fine\n" * 4000 + b"a\0b\n", "4001.*binary"),
    "late_nul.csv": (b"text\n" + b"fine\n" * 4000 + b"a\0b\n", "binary|NUL"),
    "utf16.txt": ("hello".encode("utf-16"), "UTF-16|binary"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16|binary"),
    "latin1.txt": (b"a\n" * 9 + "caf\u00e9\n".encode("latin-1"), "latin1.txt:10: not UTF-8"),
    "far.txt": (b"a line\n" * 5000 + "caf\u00e9\n".encode("latin-1"), "far.txt:5001: not UTF-8"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "latin1.jsonl:2: not UTF-8"),
    "latin1.csv": (b"text\na\nb\ncaf\xe9\n", "latin1.csv:4"),
    "latin1.json": (b'[{"text": "a"},\n{"text": "caf\xe9"}]', "latin1.json:2"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "broken.jsonl:3: not valid JSON"),
    "unended.jsonl": (b'{"text": "a"}\n{"text": ', "unended.jsonl:2: not valid JSON"),
    "broken.json": (b'[{"text": "a"},\n{"text" "b"}]', "broken.json:2: not valid JSON"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n', "field.jsonl:2: no key 'text'.*body, id.*data.text_field"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', "number.jsonl:2: 'text' must be a string, found int"),
    "null.jsonl": (b'{"text": null}\n', "null.jsonl:1: 'text' must be a string, found NoneType"),
    "list.jsonl": (b'["a"]\n', "list.jsonl: record 1: expected an object with 'text', found str"),
    "list.json": (b'{"text": 3}', "list.json.*'text' must be a string, found int"),
    "field.csv": (b"title,body\na,b\n", "field.csv:2: no key 'text'.*title, body"),
    "short.csv": (b"id,text\n1,a\n2\n", "short.csv:3: no key 'text'"),
    "notgz.txt.gz": (b"plain text", "notgz.txt.gz: cannot be read .Not a gzip"),
    "notgz.json.gz": (b"plain text", "notgz.json.gz: cannot be read .Not a gzip"),
    "cut.txt.gz": (truncated_gzip("NOISE"), "cut.txt.gz"),
    "cut.jsonl.gz": (truncated_gzip('{"text": "NOISE"}\n'), "cut.jsonl.gz"),
    "cut.json.gz": (truncated_gzip('[{"text": "NOISE"}]'), "cut.json.gz"),
    "cut.csv.gz": (truncated_gzip("text\nNOISE\n"), "cut.csv.gz"),
    "not.parquet": (b"PAR1 but not really", "not.parquet: cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_reported(name, tmp_path):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_parquet_is_reported(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(tmp_path, ["a"], "body"))
    with pytest.raises(UserError, match="a.parquet: no column 'text'.*body"):
        read(path)
    path.write_bytes(parquet_bytes(tmp_path, ["a", None]))
    with pytest.raises(UserError, match="a.parquet: row 2: 'text'"):
        read(path)
    path.write_bytes(parquet_bytes(tmp_path, [1, 2]))
    with pytest.raises(UserError, match="a.parquet.*text"):
        read(path)
    whole = bytearray(parquet_bytes(tmp_path, [f"text number {i}" for i in range(4000)]))
    whole[100:3000] = bytes(b ^ 255 for b in whole[100:3000])
    path.write_bytes(whole)
    with pytest.raises(UserError, match="a.parquet"):
        read(path)


def test_a_damaged_gzip_body_is_reported(tmp_path):
    """Damaged data raises zlib.error, which is neither an OSError nor an EOFError."""
    data = bytearray(gzip.compress(b"".join(b"line %d\n" % (i * 7919) for i in range(9000))))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(UserError, match="a.txt.gz"):
        read(tmp_path / "a.txt.gz")


def test_an_unpaired_surrogate_is_a_user_error(tmp_path, tokenizer):
    """JSON can contain an escape that UTF-8 cannot encode."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    data = section(tmp_path / "a.jsonl", validation="none", dir=str(tmp_path / "bin"))
    try:
        ids = TOKENIZER.token_files(data, tokenizer)["train"].ids.tolist()
    except UserError as error:
        assert "a.jsonl:2" in str(error)
    else:
        assert tokenizer.decode(ids[1:]).startswith("fine<|endoftext|>a")


def test_missing_paths_are_reported(tmp_path, tokenizer):
    with pytest.raises(UserError, match="data.train: .*nothere.txt"):
        TOKENIZER.expand_paths([str(tmp_path / "nothere.txt")])
    (tmp_path / "empty").mkdir()
    for name in ("empty", "*.nothing"):
        with pytest.raises(UserError, match="data.train.*no data file"):
            TOKENIZER.expand_paths([str(tmp_path / name)])
    with pytest.raises(UserError, match="found a folder"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n")
    data = section(tmp_path / "a.txt", validation=str(tmp_path / "val.txt"), dir=str(tmp_path / "bin"))
    with pytest.raises(UserError, match="data.validation: .*val.txt"):
        TOKENIZER.token_files(data, tokenizer)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_data_is_refused(content, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match="data.train|a.txt"):
        TOKENIZER.main(["--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(("settings", "message"), [
    ({"weights": [1, 2]}, "data.weights: expected one per path in data.train .1., found 2"),
    ({"weights": [-1]}, "data.weights"),
    ({"validation_fraction": 1.0}, "data.validation_fraction"),
])
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        section("a.txt", **settings)
    with pytest.raises(UserError, match="data.train"):
        TOKENIZER.DataSection(train=[])


# ------------------------------------------------------------------------------------- cleaning and splitting


def clean_documents(path, **settings):
    counts = Counter()
    data = section(path, **settings)
    return [text for _, text in TOKENIZER.documents(data, [path], counts)], counts


def test_cleaning_counts(tmp_path):
    path = write_format(tmp_path / "a.jsonl", ["cafe\u0301", "a\x07b\tc\nd", "same", "same", "same ", "xy", "", "\ufb01ne", "\x85 next"])
    texts, counts = clean_documents(path, min_chars=3)
    assert texts == ["caf\u00e9", "ab\tc\nd", "same", "same ", "\ufb01ne", " next"]
    assert counts["normalized"] == 1 and counts["with control characters"] == 2
    assert counts["duplicates"] == 1 and counts["too short"] == 2
    assert counts["documents"] == 6 and counts["bytes"] == sum(len(t.encode()) for t in texts)
    assert clean_documents(path, normalize="NFKC")[0][-2] == "fine"
    kept, counts = clean_documents(path, normalize="none", remove_control=False, deduplicate=False, min_chars=0)
    assert kept == read(path) and not set(counts) & {"normalized", "duplicates", "too short", "with control characters"}


def test_duplicates_after_cleaning_and_across_files(tmp_path):
    """A text in two Unicode forms is one document; so is a text in two files."""
    first = write_format(tmp_path / "a.jsonl", ["caf\u00e9", "cafe\u0301", "b"])
    second = write_format(tmp_path / "b.csv", ["b", "c"])
    counts = Counter()
    texts = [t for _, t in TOKENIZER.documents(section("x"), [first, second], counts)]
    assert texts == ["caf\u00e9", "b", "c"] and counts["duplicates"] == 2


def test_duplicates_across_paths_are_dropped_when_preparing(tmp_path, tokenizer, capsys):
    paths = [write_format(tmp_path / name, ["shared text", name]) for name in ("a.jsonl", "b.jsonl")]
    data = section(*paths, validation="none", dir=str(tmp_path / "bin"))
    ids = TOKENIZER.token_files(data, tokenizer)["train"].ids.tolist()
    assert tokenizer.decode(ids).count("shared text") == 1
    assert "duplicates: 1" in capsys.readouterr().err


def test_single_lines_are_not_deduplicated(tmp_path):
    (tmp_path / "a.txt").write_text("same\nsame\nother\nsame\n")
    texts, counts = clean_documents(tmp_path / "a.txt")
    assert texts == ["same", "same", "other", "same"] and not counts["duplicates"]
    (tmp_path / "a.txt").write_text("same\n\nsame\n\nother\n")
    texts, counts = clean_documents(tmp_path / "a.txt", text_unit="blank_line")
    assert texts == ["same", "other"] and counts["duplicates"] == 1


@pytest.mark.parametrize("ending", ["", "\n"])
def test_short_lines_are_dropped_also_at_the_end(ending, tmp_path):
    (tmp_path / "a.txt").write_text("long enough\nab\nalso long\nab" + ending)
    texts, counts = clean_documents(tmp_path / "a.txt", min_chars=5)
    assert [t for t in texts if t] == ["long enough", "also long"] and counts["too short"] == 2


def test_seen_finds_exact_duplicates():
    rng = np.random.default_rng(0)
    texts = [str(i) for i in rng.integers(0, 300, 1000)]
    seen, known = TOKENIZER.Seen(), set()
    for text in texts:
        assert seen.add(text) == (text not in known)
        known.add(text)


def split_of(path, **settings):
    parts = {"train": [], "val": []}
    for part, text in TOKENIZER.documents(section(path, **settings), [path], Counter()):
        parts[part].append(text)
    return parts


def test_the_hash_split_depends_only_on_the_document(tmp_path):
    texts = [f"{i}: {text}" for i, text in enumerate(make_text(600))]
    parts = split_of(write_format(tmp_path / "a.jsonl", texts), validation_fraction=0.2)
    held = set(parts["val"])
    assert len(parts["train"]) + len(held) == 600 and abs(len(held) / 600 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 600)
    again = split_of(write_format(tmp_path / "b.csv", texts[::-1][:300] + ["new one"]), validation_fraction=0.2)
    assert set(again["val"]) - {"new one"} == held & set(texts[::-1][:300])
    more = split_of(tmp_path / "a.jsonl", validation_fraction=0.4)
    assert held < set(more["val"])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_tail_split_of_documents(fraction, tmp_path):
    texts = [f"{i}: {text}" for i, text in enumerate(make_text(50))]
    parts = split_of(write_format(tmp_path / "a.jsonl", texts), validation="tail", validation_fraction=fraction)
    cut = 50 - max(1, round(50 * fraction))
    assert parts["train"] == texts[:cut] and parts["val"] == texts[cut:]


@pytest.mark.parametrize("validation", ["hash", "tail"])
@pytest.mark.parametrize("longest", [None, 40, 333])
def test_the_tail_of_a_single_document_is_held_out(longest, validation, monkeypatch, tmp_path):
    text = "\n".join(make_text(40))
    (tmp_path / "a.txt").write_text(text)
    if longest:
        monkeypatch.setattr(TOKENIZER, "LONGEST", longest)
    parts = split_of(tmp_path / "a.txt", text_unit="file", validation=validation, validation_fraction=0.1, deduplicate=False)
    assert "".join(parts["train"]) + "".join(parts["val"]) == text
    size = len("".join(parts["val"]))
    assert 0.1 * len(text) - 1 <= size <= 0.1 * len(text) + max(map(len, text.split("\n")))
    assert "".join(parts["train"]).endswith("\n") or longest == 40  # split at a line end if there is one


def test_a_file_is_read_once_and_not_trained_on_if_it_is_held_out(tmp_path):
    for name in ("a.txt", "part/b.txt", "val.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"in {name}\n")
    data = section(tmp_path, validation=str(tmp_path / "val.txt"))
    assert [[path.name for path in group] for group in TOKENIZER.data_files(data)[0]] == [["a.txt", "b.txt"]]
    data = section(tmp_path / "part", tmp_path, validation="tail")
    assert [[path.name for path in group] for group in TOKENIZER.data_files(data)[0]] == [["b.txt"], ["a.txt", "val.txt"]]
    with pytest.raises(UserError, match="data.train: all files of .*val.txt' are already in data.validation"):
        TOKENIZER.data_files(section(tmp_path / "val.txt", validation=str(tmp_path / "val.txt")))


def test_folders_are_read_without_hidden_files_outputs_and_link_loops(tmp_path):
    for name in ("a.txt", ".git/b.txt", ".hidden.txt", "run/config.json", "run/log.jsonl", "train_ids.json", "sub/c.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("{}\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/d.txt").write_text("linked\n")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/sub/link")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere/back")
    [files] = TOKENIZER.expand_paths([str(tmp_path / "data")])
    assert [path.name for path in files] == ["a.txt", "c.txt", "d.txt"]
    os.symlink(tmp_path / "nothing", tmp_path / "data/sub/e.txt")
    with pytest.raises(UserError, match="e.txt is a broken link"):
        TOKENIZER.expand_paths([str(tmp_path / "data/sub/*.txt")])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_is_read_under_any_suffix(name, tmp_path):
    records = [{"text": "one"}, {"text": "two"}]
    for content in ("\n".join(map(json.dumps, records)), json.dumps(records), json.dumps(records, indent=1), json.dumps(records[:1])):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == ["one", "two"][: content.count("text")]


@pytest.mark.parametrize(("content", "message"), [
    ('{"text": "a", "n": %s}' % ("7" * 5000), "a.jsonl:1: the JSON cannot be read"),
    ('{"text": %s}' % ("[" * 100_000), "a.jsonl:1: the JSON cannot be read"),
])
def test_unreadable_json_is_a_user_error(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("content", "message"), [
    ('text,n\nx,1\n"open,2\nz,3\n', "a.csv:[23]: cannot be read"), ('text,n\nx,1\n"closed" and more,2\n', "a.csv:3: cannot be read"),
    ("text,n,text\na,1,b\n", "a.csv:1: two columns have the name 'text'"),
])
def test_ambiguous_tables_are_refused(content, message, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.csv")


def test_special_tokens_in_texts_are_plain_text(tmp_path, tokenizer):
    """A line with an end token is plain text, so no document is empty (its end right after its beginning)."""
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo<|im_end|>\n")
    data = section(tmp_path / "a.txt", validation="none", dir=str(tmp_path / "bin"))
    ids = TOKENIZER.token_files(data, tokenizer)["train"].ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 4 and tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=True) == "one<|endoftext|>two<|im_end|>"
    assert all(a != b for a, b in zip(ids, ids[1:]) if a == tokenizer.eos_token_id)


def test_saved_padding_and_truncation_are_ignored_and_not_written(tmp_path, tokenizer):
    raw = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
                                  bos_token=TOKENIZER.END, eos_token=TOKENIZER.END, pad_token=TOKENIZER.PAD)
    raw.backend_tokenizer.enable_truncation(4)
    raw.backend_tokenizer.enable_padding(length=9)
    raw.save_pretrained(tmp_path / "a")
    texts = ["a red fox ran over the hills and far away", "fox"]
    assert [ids.tolist() for ids in TOKENIZER.Encoder(TOKENIZER.load(tmp_path / "a"))(texts)] == plain_ids(tokenizer, texts)
    raw(texts, truncation=True, max_length=3)
    TOKENIZER.save(raw, tmp_path / "b")
    saved = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None


def test_long_words_are_not_cached(tokenizer):
    encoder = TOKENIZER.Encoder(tokenizer)
    encoder(["\u4f60\u597d" * 400 + str(i) for i in range(20)] + ["the red fox"])
    assert set(encoder.words) == {"the", " red", " fox"}


def test_a_separate_validation_file(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("train one\ntrain two\n")
    write_format(tmp_path / "v.jsonl", ["val one", "val two"])
    data = section(tmp_path / "a.txt", validation=str(tmp_path / "v.jsonl"), dir=str(tmp_path / "bin"))
    files = TOKENIZER.token_files(data, tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(files["train"].ids.tolist()) == f"{end}train one{end}train two{end}"
    assert tokenizer.decode(files["val"].ids.tolist()) == f"{end}val one{end}val two{end}"
    none = section(tmp_path / "a.txt", validation="none", dir=str(tmp_path / "bin2"))
    assert list(TOKENIZER.token_files(none, tokenizer)) == ["train"]


# ------------------------------------------------------------------------------------------------- token files


def expected_ids(texts, tokenizer):
    """Begin, text, end for each document; a single id between documents if begin equals end."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = []
    for text in texts:
        ids += ([begin] if begin != end or not ids else []) + plain_ids(tokenizer, [text])[0] + [end]
    return ids


@pytest.mark.parametrize("shared", [True, False])
def test_prepare_writes_ids_and_descriptions(shared, tmp_path, tokenizer):
    tokenizer = tokenizer if shared else separate_ends(tokenizer)
    texts = [f"{i} {text}" for i, text in enumerate(make_text(80))]
    paths = [write_format(tmp_path / "a.jsonl", texts[:50]), write_format(tmp_path / "b.csv", texts[50:])]
    data = section(*paths, dir=str(tmp_path / "bin"), validation_fraction=0.2)
    TOKENIZER.prepare(data, tokenizer)
    files = TOKENIZER.token_files(data, tokenizer)
    split = [split_of(path, validation_fraction=0.2) for path in paths]
    for part in ("train", "val"):
        documents = [text for parts in split for text in parts[part]]
        facts = json.loads((tmp_path / f"bin/{part}_ids.json").read_text())
        raw = np.fromfile(tmp_path / f"bin/{part}_ids.bin", "<u2")
        assert raw.tolist() == files[part].ids.tolist() == expected_ids(documents, tokenizer)
        assert facts["tokens"] == len(raw) and facts["documents"] == len(documents) and facts["dtype"] == "uint16"
        assert facts["bytes"] == files[part].bytes == sum(len(t.encode()) for t in documents)
        first = len(expected_ids(split[0][part], tokenizer))
        assert facts["sources"] == [[0, first], [first, len(raw)]]
    assert (files["train"].begin, files["train"].end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_failed_preparation_leaves_no_files(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 50 + "{broken\n")
    data = section(tmp_path / "a.jsonl", dir=str(tmp_path / "bin"))
    with pytest.raises(UserError, match="a.jsonl:51"):
        TOKENIZER.prepare(data, tokenizer)
    assert list((tmp_path / "bin").iterdir()) == []


def test_a_failed_preparation_keeps_the_old_files(tmp_path, tokenizer):
    path = write_format(tmp_path / "a.jsonl", make_text(20))
    data = section(path, dir=str(tmp_path / "bin"))
    TOKENIZER.prepare(data, tokenizer)
    before = {p.name: p.read_bytes() for p in (tmp_path / "bin").iterdir()}
    path.write_text(path.read_text() + "\n{broken\n")
    with pytest.raises(UserError):
        TOKENIZER.token_files(data, tokenizer)
    assert {p.name: p.read_bytes() for p in (tmp_path / "bin").iterdir()} == before


def test_outdated_token_files_are_rebuilt(tmp_path, tokenizer, text_file):
    folder = tmp_path / "bin"
    settings = {"dir": str(folder), "validation": "tail"}
    built = []

    def build(tokenizer=tokenizer, **changes):
        TOKENIZER.token_files(section(text_file, **{**settings, **changes}), tokenizer)
        stamp = (folder / "train_ids.bin").stat()
        built.append((stamp.st_mtime_ns, stamp.st_ino))
        return len(set(built)) == len(built)  # whether the file is new

    assert build()
    assert not build()
    built.pop()
    assert not build(weights=[2.0], packing=False)  # do not affect the ids
    built.pop()
    for change in ({"min_chars": 40}, {"text_unit": "file"}, {"validation_fraction": 0.2}, {"validation": "none"},
                   {"normalize": "none"}, {"remove_control": False}, {"tokenizer": TOKENIZER.train(make_text(50), 300)}):
        assert build(**change), change
        built.clear()
        build(**change)
    built.clear()
    build()
    text_file.write_text(text_file.read_text() + "One more line.\n")
    assert build()
    (folder / "train_ids.bin").write_bytes((folder / "train_ids.bin").read_bytes()[:-10])
    assert build()
    (folder / "val_ids.json").write_text("{cut")
    assert build()
    assert not build()


def write_bin(path, ids, dtype="<u2", facts=None):
    np.array(ids, dtype).tofile(path)
    if facts is not None:
        path.with_suffix(".json").write_text(json.dumps(facts))
    return path


def test_a_bin_without_json_is_uint16(tmp_path, tokenizer):
    ids = np.random.default_rng(0).integers(0, len(tokenizer), 500)
    write_bin(tmp_path / "train.bin", ids)
    write_bin(tmp_path / "val.bin", ids[:50])
    files = TOKENIZER.token_files(section(tmp_path / "train.bin"), tokenizer)
    assert files["train"].ids.tolist() == ids.tolist() and files["val"].ids.tolist() == ids[:50].tolist()
    assert files["train"].sources == [[0, 500]] and files["train"].bytes is None
    assert list(TOKENIZER.token_files(section(tmp_path / "train.bin", validation="none"), tokenizer)) == ["train"]
    other = write_bin(tmp_path / "held.bin", ids[:7])
    assert len(TOKENIZER.token_files(section(tmp_path / "train.bin", validation=str(other)), tokenizer)["val"].ids) == 7


def test_a_32_bit_bin_without_json_is_detected(tmp_path, tokenizer):
    ids = np.random.default_rng(0).integers(0, len(tokenizer), 99)
    write_bin(tmp_path / "a.bin", ids, "<u4")
    assert TOKENIZER.open_tokens(tmp_path / "a.bin", tokenizer).ids.tolist() == ids.tolist()


def test_invalid_token_files_are_refused(tmp_path, tokenizer, text_file):
    def refused(path, message):
        with pytest.raises(UserError, match=f"{re.escape(path.name)}: .*{message}"):
            TOKENIZER.token_files(section(path), tokenizer)

    refused(write_bin(tmp_path / "beyond.bin", [1, 2, len(tokenizer)]), f"id {len(tokenizer)}.*another tokenizer")
    (tmp_path / "odd.bin").write_bytes(b"\1\0\2")
    refused(tmp_path / "odd.bin", "3 bytes.*truncated")
    refused(write_bin(tmp_path / "short.bin", [1, 2, 3], facts={"dtype": "uint16", "tokens": 9}), "3 ids.*9")
    refused(write_bin(tmp_path / "wide.bin", [1, 2, 3], "<u2", {"dtype": "uint32", "tokens": 1}), "6 bytes")
    made = {"dtype": "uint16", "tokens": 3, "recipe": {"tokenizer": "somebody else"}}
    refused(write_bin(tmp_path / "other.bin", [1, 2, 3], facts=made), "another tokenizer")
    (tmp_path / "missing.bin").unlink(missing_ok=True)
    refused(tmp_path / "missing.bin", "file not found")
    refused(write_bin(tmp_path / "llmc.bin", [20240520, 1, 9, 4], "<i4"), "a header")
    with pytest.raises(UserError, match="data.train: a token file .* must be the only path"):
        TOKENIZER.token_files(section(tmp_path / "beyond.bin", text_file), tokenizer)


# ----------------------------------------------------------------------------------------------------- packing


def token_file(ids, begin=0, end=0, sources=None):
    ids = np.array(ids, np.uint16)
    return TOKENIZER.TokenFile(ids, sources or [[0, len(ids)]], None, begin, end)


def spans_of(*args, **options):
    spans = TOKENIZER.Spans(token_file(*args, **options))
    return list(zip(spans.starts.tolist(), (spans.starts + spans.lengths).tolist()))


def test_spans_with_a_shared_begin_and_end():
    assert spans_of([0, 5, 6, 0, 7, 0]) == [(0, 3), (3, 5)]
    assert spans_of([0, 5, 6, 0, 7, 8]) == [(0, 3), (3, 5)]  # without the last end
    assert spans_of([5, 6, 0, 7, 0]) == [(0, 2), (2, 4)]  # without the first beginning
    assert spans_of([5, 6, 7]) == [(0, 2)]
    assert spans_of([0]) == [] and spans_of([]) == [] and spans_of([5]) == []


def test_spans_with_separate_ends():
    def spans(*ids):
        return spans_of(list(ids), begin=1, end=2)

    assert spans(1, 5, 6, 2, 1, 7, 2) == [(0, 3), (4, 6)]
    assert spans(1, 5, 6, 2, 1, 7, 8) == [(0, 3), (4, 6)]
    assert spans(1, 5, 6, 2, 1) == [(0, 3)]  # a beginning without a successor has no pair
    assert spans(1, 2, 1, 2) == [(0, 1), (2, 3)]


def test_spans_of_a_part(tmp_path):
    tokens = token_file([1, 5, 2, 1, 6, 7, 2, 1, 8, 2], begin=1, end=2)
    spans = TOKENIZER.Spans(tokens, 3, 7)
    assert (spans.starts.tolist(), spans.lengths.tolist(), spans.pairs) == ([3], [3], 3)


def random_file(documents=40, seed=0, shared=True, longest=30):
    """Text tokens have ids from 3, all different, so every pair is unique."""
    rng = np.random.default_rng(seed)
    lengths, ids, next_id = rng.integers(1, longest, documents), [], 3
    for length in lengths:
        ids += [0] if shared and not ids else [] if shared else [1]
        ids += list(range(next_id, next_id + length)) + [0 if shared else 2]
        next_id += length
    return token_file(ids, 0 if shared else 1, 0 if shared else 2)


def pair_indices(tokens):
    """Oracle: the indices of all tokens whose successor belongs to the same document."""
    ids = tokens.ids.tolist()
    if tokens.begin == tokens.end:
        return set(range(len(ids) - 1))
    return {i for i in range(len(ids) - 1) if ids[i] != tokens.end}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 64, 10_000])
def test_every_pair_is_in_exactly_one_row(shared, packing, length):
    tokens = random_file(shared=shared)
    spans = TOKENIZER.Spans(tokens)
    edges = np.flatnonzero(tokens.ids == tokens.end)
    for seed in ([0, 0], [0, 1], None):
        rows = TOKENIZER.Rows(spans, length, packing, seed)
        indices = []
        for i in range(rows.count):
            segments = rows.row(i)
            assert 0 < sum(stop - start for start, stop in segments) <= length
            assert packing or len(segments) == 1
            for start, stop in segments:  # no end of a document inside
                assert stop > start and not ((edges > start) & (edges < stop)).any()
            indices += [i for start, stop in segments for i in range(start, stop)]
        assert len(indices) == len(set(indices)) and set(indices) == pair_indices(tokens)
        if packing:
            assert rows.count == -(-len(indices) // length)


def all_rows(rows):
    return [rows.row(i) for i in range(rows.count)]


@pytest.mark.parametrize("packing", [True, False])
def test_order_is_a_function_of_the_seed(packing):
    spans = TOKENIZER.Spans(random_file())
    orders = {seed: all_rows(TOKENIZER.Rows(spans, 16, packing, list(seed))) for seed in ((0, 0), (0, 1), (1, 0))}
    assert orders[0, 0] == all_rows(TOKENIZER.Rows(TOKENIZER.Spans(random_file()), 16, packing, [0, 0]))
    assert orders[0, 0] != orders[0, 1] != orders[1, 0] != orders[0, 0]
    plain = all_rows(TOKENIZER.Rows(spans, 16, packing, None))
    assert [segment[0] for row in plain for segment in row] == sorted(segment[0] for row in plain for segment in row)


def test_a_long_document_is_split_differently_in_each_epoch():
    spans = TOKENIZER.Spans(token_file([0, *range(3, 1003)]))
    cuts = [frozenset(start for row in all_rows(TOKENIZER.Rows(spans, 64, True, [0, epoch])) for start, _ in row)
            for epoch in range(6)]
    assert len(set(cuts)) > 2


def test_collate_equals_batches_built_by_hand():
    spans = SimpleNamespace(ids=np.array([0, 5, 6, 7, 0, 8, 9, 0], np.uint16), weights=None)
    batch = TOKENIZER.collate(spans, [[(0, 3), (4, 6)], [(4, 7)], []])
    assert batch["input_ids"].tolist() == [[0, 5, 6, 0, 8], [0, 8, 9, 0, 0], [0] * 5]
    assert batch["targets"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, -100, -100], [-100] * 5]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, -1, -1], [-1] * 5]
    segments = batch["segment_ids"].tolist()
    assert segments[0][:3] == [segments[0][0]] * 3 and segments[0][3:] == [segments[0][3]] * 2 and segments[0][0] != segments[0][3]
    assert batch["counts"] == {"tokens": 8}
    wide = TOKENIZER.collate(spans, [[(0, 3)]], width=6)
    assert wide["input_ids"].shape == (1, 6) and wide["counts"]["tokens"] == 3
    full = TOKENIZER.collate(spans, [[(0, 3)], [(4, 7)]])
    assert full["positions"] is full["segment_ids"] is full["weights"] is None  # rows of one full segment
    assert set(full) == set(batch) == set(wide)
    spans.weights = np.array([0, 0, 0.5, 0, 0, 2, 1, 0], np.float32)
    weighted = TOKENIZER.collate(spans, [[(0, 3), (4, 6)]])
    assert weighted["targets"].tolist() == [[-100, 6, -100, 8, 9]] and weighted["weights"].tolist() == [[0, 0.5, 0, 2, 1]]
    assert weighted["counts"] == {"tokens": 3.5, "targets": 3, "read": 5} and set(weighted) == set(batch)
    assert TOKENIZER.collate(spans, [[], []])["targets"].tolist() == [[-100], [-100]]


# ----------------------------------------------------------------------------------------------------- streams


def run_of(rank=0, world_size=1, grad_accum=1, seed=0, **more):
    return SimpleNamespace(rank=rank, world_size=world_size, grad_accum=grad_accum, seed=seed, **more)


def rows_of(batch):
    """The rows of a batch without padding, for comparison at any width."""
    rows = []
    for inputs, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist()):
        rows.append(tuple((a, b) for a, b in zip(inputs, targets) if b != -100))
    return rows


def take(stream, batches):
    return [rows_of(next(stream)) for _ in range(batches)]


def started(stream, **run):
    stream.start(run_of(**run))
    return stream


def make_stream(batch_size, weights=None, packing=True, length=16, seed=0):
    tokens = random_file(seed=seed)
    if weights:
        half = int(np.flatnonzero(tokens.ids == 0)[8]) + 1
        tokens = tokens._replace(sources=[[0, half], [half, len(tokens.ids)]])
    data = section("a", "b", weights=weights, packing=packing)
    return TOKENIZER.file_stream(tokens, data, batch_size, length)


@pytest.mark.parametrize("weights", [None, [1, 3]])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "grad_accum", "batch_size"), [(2, 1, 2), (1, 4, 1), (2, 2, 1), (2, 3, 2), (4, 1, 1)])
def test_ranks_and_micro_batches_share_one_step(world_size, grad_accum, batch_size, packing, weights):
    per_step = world_size * grad_accum * batch_size
    reference = started(make_stream(per_step, weights, packing))
    ranks = [started(make_stream(batch_size, weights, packing), rank=rank, world_size=world_size, grad_accum=grad_accum)
             for rank in range(world_size)]
    assert {s.steps_per_epoch for s in ranks} == {reference.steps_per_epoch}
    for _ in range(2 * reference.steps_per_epoch + 1):  # across two epochs
        [whole] = take(reference, 1)
        shares = [take(stream, grad_accum) for stream in ranks]
        joined = [row for micro in range(grad_accum) for share in shares for row in share[micro] if row]
        whole = [row for row in whole if row]
        assert len(whole) <= per_step and sorted(joined) == sorted(whole)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
def test_an_epoch_has_every_pair_once_and_a_filled_last_step(packing, batch_size):
    stream = started(make_stream(batch_size, packing=packing), grad_accum=2)
    tokens = random_file()
    pairs = Counter((int(tokens.ids[i]), int(tokens.ids[i + 1])) for i in pair_indices(tokens))
    orders = []
    for _ in range(2):
        rows = [row for batch in take(stream, 2 * stream.steps_per_epoch) for row in batch]
        assert Counter(pair for row in rows for pair in row) == pairs
        real = [row for row in rows if row]
        assert rows[: len(real)] == real, "padding only at the end"
        assert len(rows) - len(real) < 2  # at most one row of padding
        orders.append(real)
    assert orders[0] != orders[1]
    assert orders[0] == [row for batch in take(started(make_stream(1, packing=packing)), len(orders[0])) for row in batch]


def test_static_shapes():
    stream = make_stream(3)
    stream.start(run_of(static_shapes=True))
    assert {next(stream)["input_ids"].shape for _ in range(2 * stream.steps_per_epoch)} == {(3, 16)}


def streaming(text_file, tokenizer, **settings):
    data = section(text_file, **{"validation": "none", **settings})
    return TOKENIZER.text_stream(data, tokenizer, 2, 32, buffer_bytes=1500)


@pytest.mark.parametrize("kind", ["plain", "weighted", "streaming"])
@pytest.mark.parametrize("steps", [1, 5, 33, 70])
def test_a_stream_continues_where_it_stopped(kind, steps, text_file, tokenizer):
    def fresh(rank):
        stream = streaming(text_file, tokenizer) if kind == "streaming" else make_stream(2, [1, 5] if kind == "weighted" else None)
        return started(stream, rank=rank, world_size=2, grad_accum=2, seed=7)

    for rank in range(2):
        stream = fresh(rank)
        take(stream, 2 * steps)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = fresh(rank)
        resumed.load_state_dict(state)
        assert take(resumed, 60) == take(stream, 60)
    other = fresh(0)
    other.run.seed = 8
    other.load_state_dict(state)
    assert take(other, 20) != take(resumed, 20)


def test_weights_set_the_mixing_ratio_and_small_sources_repeat():
    tokens = random_file(documents=120, longest=20)
    small = int(np.flatnonzero(tokens.ids == 0)[6]) + 1
    tokens = tokens._replace(sources=[[0, small], [small, len(tokens.ids)]])
    stream = started(TOKENIZER.file_stream(tokens, section("a", "b", weights=[1, 1], packing=False), 4, 32))
    rows = [row for batch in take(stream, 6 * stream.steps_per_epoch) for row in batch if row]
    border = int(tokens.ids[small - 2])  # the last text token of the small source
    origin = [all(a <= border and b <= border for a, b in row) for row in rows]
    share = sum(origin) / len(rows)
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / len(rows))
    drawn = Counter(row for row, is_small in zip(rows, origin) if is_small)
    assert min(drawn.values()) > 3, "the small source is repeated"
    epoch = [row for batch in take(started(TOKENIZER.file_stream(tokens, section("a", "b", weights=[1, 1], packing=False), 4, 32)),
                                   stream.steps_per_epoch) for row in batch if row]
    small_rows = [row for row in epoch if row and all(a <= border and b <= border for a, b in row)]
    size = len(drawn)
    passes = [small_rows[i : i + size] for i in range(0, len(small_rows) - size + 1, size)]
    assert len(passes) > 1 and all(len(set(rows)) == size for rows in passes), "each pass contains the whole source"
    assert passes[0] != passes[1]


def test_several_sources_lose_no_pair(tmp_path, tokenizer):
    """The first token of the second file is also predicted, like that of every document."""
    paths = [write_format(tmp_path / name, make_text(5, seed=i)) for i, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl"))]
    data = section(*paths, validation="none", dir=str(tmp_path / "bin"))
    tokens = TOKENIZER.token_files(data, tokenizer)["train"]
    stream = started(TOKENIZER.file_stream(tokens, data, 2, 10_000))
    counted = sum(len(row) for batch in take(stream, stream.steps_per_epoch) for row in batch)
    assert counted == len(tokens.ids) - 1


def test_file_stream_refuses_empty_or_mismatched_data():
    tokens = token_file([0, 5, 6, 0, 7, 0], sources=[[0, 4], [4, 6]])
    with pytest.raises(UserError, match="data.weights: expected one per source of the token file .2., found 3"):
        TOKENIZER.file_stream(tokens, section("a", "b", "c", weights=[1, 1, 1]), 1, 8)
    with pytest.raises(UserError, match="data.weights.*no text"):
        TOKENIZER.file_stream(tokens._replace(sources=[[0, 6], [6, 6]]), section("a", "b", weights=[1, 1]), 1, 8)
    with pytest.raises(UserError, match="data.train: contains no text to train on"):
        TOKENIZER.file_stream(token_file([0]), section("a"), 1, 8)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("validation", ["hash", "tail", "none"])
def test_text_stream_gives_each_training_document_once(validation, shared, tmp_path, tokenizer):
    tokenizer = tokenizer if shared else separate_ends(tokenizer)
    texts = [f"{i} {text}" for i, text in enumerate(make_text(90))]
    path = write_format(tmp_path / "a.jsonl", texts)
    settings = {"validation": validation, "validation_fraction": 0.2}
    expected = texts if validation == "none" else split_of(path, **settings)["train"]
    assert validation == "none" or 0 < len(expected) < 90
    stream = started(TOKENIZER.text_stream(section(path, packing=False, **settings), tokenizer, 3, 500, buffer_bytes=1200))
    orders = []
    while stream.epoch < 2 or not orders:
        epoch, rows = stream.epoch, rows_of(next(stream))
        if stream.epoch < 2:
            orders += [(stream.epoch, row) for row in rows if row]
        assert stream.epoch - epoch in (0, 1)
    for epoch in range(2):
        rows = [row for e, row in orders if e == epoch]
        got = [tokenizer.decode([b for _, b in row[:-1]]) for row in rows]
        assert sorted(got) == sorted(expected)
        assert {row[0][0] for row in rows} == {tokenizer.bos_token_id} and {row[-1][1] for row in rows} == {tokenizer.eos_token_id}
    assert [row for e, row in orders if e == 0] != [row for e, row in orders if e == 1]


def test_text_stream_refuses_weights_and_empty_data(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="data.weights"):
        TOKENIZER.text_stream(section(tmp_path / "a.txt", weights=[1]), tokenizer, 1, 8)
    with pytest.raises(UserError, match="data.train"):
        started(TOKENIZER.text_stream(section(tmp_path / "a.txt"), tokenizer, 1, 8))


@pytest.mark.parametrize("packing", [True, False])
def test_fixed_batches_are_the_same_every_time(packing):
    tokens = random_file()
    plan = TOKENIZER.Rows(TOKENIZER.Spans(tokens), 16, packing, None)
    first, second = ([rows_of(b) for b in TOKENIZER.fixed_batches(plan, 3)] for _ in range(2))
    assert first == second
    pairs = Counter((int(tokens.ids[i]), int(tokens.ids[i + 1])) for i in pair_indices(tokens))
    assert Counter(pair for batch in first for row in batch for pair in row) == pairs
    every = [row for batch in first for row in batch]
    few = [row for batch in TOKENIZER.fixed_batches(plan, 3, limit=2) for row in rows_of(batch)]
    assert len(few) == 6 and few[0] == every[0] and few[-1] == every[-1]
    indices = [every.index(row) for row in few]
    assert indices == sorted(set(indices))


# -------------------------------------------------------------------------------------------------------- chat

PLAIN = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
          "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CONVERSATION = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "The red fox?"},
    {"role": "assistant", "content": "It ran\nover 2 hills."}, {"role": "user", "content": "Why? \U0001f600"},
    {"role": "assistant", "content": "Rain."},
]


def with_template(tokenizer, template):
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token=TOKENIZER.END, eos_token=TOKENIZER.END)
    copy.chat_template = template
    return copy


def ids_and_mask(tokenizer, messages, tools=None):
    ids, turns = TOKENIZER.render_chat(tokenizer, messages, tools)
    mask = [0] * len(ids)
    for turn in turns:
        assert messages[turn.message]["role"] == "assistant"
        mask[turn.start : turn.stop] = [1] * (turn.stop - turn.start)
    return ids, mask


def chat_by_hand(tokenizer, messages):
    """Oracle: ChatML built from its parts; the mask selects the assistant's content and end of turn, not the newline."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in TOKENIZER.CHAT_TOKENS)
    ids, mask = [], []
    for message in messages:
        trained = int(message["role"] == "assistant")
        head, body, newline = plain_ids(tokenizer, [message["role"] + "\n", message["content"], "\n"])
        ids += [start, *head, *body, end, *newline]
        mask += [0] * (1 + len(head)) + [trained] * (len(body) + 1) + [0] * len(newline)
    return ids, mask


@pytest.mark.parametrize("template", [PLAIN, MARKED, TOKENIZER.CHAT_TEMPLATE.replace('bos_token or ""', '""')])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_render_chat_equals_chatml_built_by_hand(template, count, tokenizer):
    tokenizer = with_template(tokenizer, template)
    messages = CONVERSATION[:count]
    ids, mask = ids_and_mask(tokenizer, messages)
    assert (ids, mask) == chat_by_hand(tokenizer, messages)
    assert ids == list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def test_an_unpaired_surrogate_in_a_tool_is_a_user_error(tokenizer):
    tool = {"type": "function", "function": {"name": "look_up", "description": "a\ud800b", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(UserError, match="unpaired surrogate"):
        TOKENIZER.render_chat(with_template(tokenizer, TOKENIZER.CHAT_TEMPLATE), [{"role": "user", "content": "Hi"}], [tool], True)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_render_chat_adds_the_generation_prompt(template, tokenizer):
    tokenizer = with_template(tokenizer, template)
    ids, turns = TOKENIZER.render_chat(tokenizer, CONVERSATION[:4], add_generation_prompt=True)
    assert ids == chat_by_hand(tokenizer, CONVERSATION[:4])[0] + tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    assert ids == list(tokenizer.apply_chat_template(CONVERSATION[:4], add_generation_prompt=True, return_dict=True)["input_ids"])
    assert not turns


def test_training_and_serving_use_the_same_ids(tokenizer):
    tokenizer = with_template(tokenizer, PLAIN)
    ids, mask = ids_and_mask(tokenizer, CONVERSATION)
    served, _ = TOKENIZER.render_chat(tokenizer, CONVERSATION[:4], add_generation_prompt=True)
    assert ids[: len(served)] == served and mask[len(served)] == 1 and mask[len(served) - 1] == 0


def test_templates_that_raise_are_user_errors(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        TOKENIZER.render_chat(with_template(tokenizer, None), CONVERSATION)
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses.*roles must alternate"):
        TOKENIZER.render_chat(strict, CONVERSATION)


def test_template_survives_saving(tokenizer, tmp_path):
    TOKENIZER.save(with_template(tokenizer, MARKED), tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    loaded = TOKENIZER.load(tmp_path)
    assert ids_and_mask(loaded, CONVERSATION) == chat_by_hand(tokenizer, CONVERSATION)


# ---------------------------------------------------------------------------------------------------- choosing


@pytest.fixture()
def trainings(monkeypatch):
    """How often a tokenizer was trained."""
    calls, real = [], TOKENIZER.train
    monkeypatch.setattr(TOKENIZER, "train", lambda *args: calls.append(args[1:]) or real(*args))
    return calls


def test_choose_trains_once_and_again_when_asked_for_something_else(trainings, text_file, tmp_path):
    data = section(text_file, dir=str(tmp_path / "d"))
    first = TOKENIZER.choose(TOKENIZER.TokenizerSection(vocab_size=300), data)
    again = TOKENIZER.choose(TOKENIZER.TokenizerSection(vocab_size=300), data)
    assert trainings == [(300, "bpe")] and TOKENIZER.fingerprint(first) == TOKENIZER.fingerprint(again) and len(first) == 300
    assert len(TOKENIZER.choose(TOKENIZER.TokenizerSection(vocab_size=310), data)) == 310
    TOKENIZER.choose(TOKENIZER.TokenizerSection(kind="char"), data)
    assert trainings[1:] == [(310, "bpe"), (1024, "char")]
    os.utime(text_file, ns=(1, 1))
    TOKENIZER.choose(TOKENIZER.TokenizerSection(kind="char"), data)
    assert len(trainings) == 4


def train_letters(texts, vocab_size):
    """A kind that a fork adds: the first letters of the alphabet, as many as LETTERS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefghij"[:letters()])}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return raw


LETTERS = 4


def letters():
    return LETTERS


def test_a_kind_is_one_entry_of_the_table_and_is_trained_again_when_its_code_changes(trainings, text_file, tmp_path, monkeypatch):
    data = section(text_file, dir=str(tmp_path / "d"))
    with pytest.raises(UserError, match="tokenizer.kind: 'letters' is not one of bpe, char, byte"):
        MODEL.check(TOKENIZER.TokenizerSection(kind="letters"), "tokenizer")
    monkeypatch.setitem(TOKENIZER.KINDS, "letters", train_letters)
    wanted = TOKENIZER.TokenizerSection(kind="letters")
    MODEL.check(wanted, "tokenizer")
    for _ in range(2):
        tokenizer = TOKENIZER.choose(wanted, data)
    assert trainings == [(1024, "letters")] and len(tokenizer) == 4 + 5
    assert tokenizer("dad", add_special_tokens=False).input_ids == [3, 0, 3] and tokenizer.unk_token == "a"
    for name, value in (("LETTERS", 5), ("letters", lambda: 6)):  # a constant, and a function, that the training names
        monkeypatch.setitem(globals(), name, value)
        size = len(TOKENIZER.choose(wanted, data))
        assert size == len(TOKENIZER.choose(wanted, data)) == {"LETTERS": 5, "letters": 6}[name] + 5
    monkeypatch.setitem(TOKENIZER.KINDS, "letters", lambda texts, vocab_size: train_letters(texts, vocab_size))
    TOKENIZER.choose(wanted, data)
    monkeypatch.setattr(TOKENIZER, "WORDS", r"\p{L}+|\P{L}+")
    TOKENIZER.choose(TOKENIZER.TokenizerSection(vocab_size=300), data)
    assert len(trainings) == 5
    monkeypatch.setattr(TOKENIZER, "WORDS", r"\p{L}+|\P{L}")
    TOKENIZER.choose(TOKENIZER.TokenizerSection(vocab_size=300), data)
    assert len(trainings) == 6


def test_choose_takes_a_named_tokenizer(trainings, text_file, tmp_path, tokenizer):
    TOKENIZER.save(tokenizer, tmp_path / "named")
    (tmp_path / "named" / "config.json").write_text("{}")
    data = section(text_file, dir=str(tmp_path / "d"))
    named, unnamed = TOKENIZER.TokenizerSection(name=str(tmp_path / "named")), TOKENIZER.TokenizerSection()
    for options in ((named, data), (unnamed, data, tmp_path / "named")):
        assert TOKENIZER.fingerprint(TOKENIZER.choose(*options)) == TOKENIZER.fingerprint(tokenizer)
    write_bin(tmp_path / "train_ids.bin", [0, 1])
    with pytest.raises(UserError, match="train_ids.bin: token ids without their tokenizer"):
        TOKENIZER.choose(TOKENIZER.TokenizerSection(), section(tmp_path / "train_ids.bin"))
    shutil.copytree(tmp_path / "named", tmp_path / "tokenizer")
    found = TOKENIZER.choose(TOKENIZER.TokenizerSection(), section(tmp_path / "train_ids.bin"))
    assert TOKENIZER.fingerprint(found) == TOKENIZER.fingerprint(tokenizer) and not trainings


def test_a_tokenizer_is_not_trained_on_held_out_text(tmp_path):
    path = write_format(tmp_path / "a.jsonl", [f"{i} {t}" for i, t in enumerate(make_text(60))])
    data = section(path, validation="tail", validation_fraction=0.5)
    assert list(TOKENIZER.sample_texts(data)) == split_of(path, validation="tail", validation_fraction=0.5)["train"]
    few = list(TOKENIZER.sample_texts(data, limit=200))
    assert 200 <= sum(map(len, few)) < 200 + len(few[-1])


def test_main_writes_everything(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(make_text(300)))
    out = tmp_path / "out"
    command = ["--data", str(tmp_path / "a.txt"), str(write_format(tmp_path / "b.jsonl", make_text(100, seed=9))),
               "--out", str(out), "--tokenizer.vocab_size", "330"]
    TOKENIZER.main(command)
    captured = capsys.readouterr()
    assert captured.out == "" and "train_ids.bin" in captured.err and "val_ids.bin" in captured.err
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"train_ids.bin", "train_ids.json", "val_ids.bin", "val_ids.json", "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json"} <= names
    assert not [name for name in names if "tmp" in name]
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    held = np.fromfile(out / "val_ids.bin", "<u2").tolist()
    documents = set(make_text(300) + make_text(100, seed=9))
    texts = [text for text in tokenizer.decode(held).split(tokenizer.eos_token) if text]
    assert len(tokenizer) == 330 and texts and set(texts) <= documents
    stamp = (out / "train_ids.bin").stat().st_mtime_ns
    TOKENIZER.main(command)
    assert (out / "train_ids.bin").stat().st_mtime_ns == stamp


# ------------------------------------------------------------------------------------------------- many templates

TEMPLATES = sorted((ROOT / "tests/templates").glob("*.jinja"))
REFUSED = {("no_calls", "tool call"), *(("parts_only", kind) for kind in templates.conversations()),
           *(("strict", kind) for kind in ("tool call", "system", "assistant first"))}


WRITES_CALLS = {"reasoning": "json", "chatml": "json", "headers": "json", "channels": "named", "next_role": "named", "response_opens": "named"}
PAIRS = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') }}{% for call in m.tool_calls or [] %}"
         "{{ '<tool_call>\n<function=' + call.function.name + '>' }}{% for key, value in call.function.arguments.items() %}"
         "{{ '\n<parameter=' + key + '>\n' + (value if value is string else value | tojson) + '\n</parameter>' }}{% endfor %}"
         "{{ '\n</function>\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("name", [*WRITES_CALLS, "pairs"])
def test_tool_calls_are_parsed_as_the_template_renders_them(name):
    text = PAIRS if name == "pairs" else (ROOT / f"tests/templates/{name}.jinja").read_text()
    tokenizer = templates.tokenizer_of(text)
    markup = TOKENIZER.answer_markup(tokenizer)
    assert markup.form == ("pairs" if name == "pairs" else WRITES_CALLS[name])
    schema = {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "array"}, "code": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": schema}}]
    for arguments in ({"town": "Alder \"on\" Sea", "days": [1, 2], "code": "007"}, {"town": "{Rill}"}):
        call = {"type": "function", "id": "abcdefgh0", "function": {"name": "weather", "arguments": arguments}}
        messages = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        ids, [turn] = TOKENIZER.render_chat(tokenizer, messages, tools)
        written = tokenizer.decode(ids[turn.start : turn.stop])
        assert TOKENIZER.parse_calls(markup, written, tools) == [("weather", arguments)], written
        for cut in range(1, len(written) // 2):
            TOKENIZER.parse_calls(markup, written[:-cut], tools)
    assert TOKENIZER.parse_calls(markup, "No call {here}.", tools) == []


def test_templates_without_parsable_calls():
    for name in ("no_calls", "strict", "summary", "end_at_last"):
        markup = TOKENIZER.answer_markup(templates.tokenizer_of((ROOT / f"tests/templates/{name}.jinja").read_text()))
        assert markup.call is None and TOKENIZER.parse_calls(markup, '{"name": "weather", "arguments": {}}') == []



@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", templates.conversations())
def test_exactly_the_assistants_turns_are_trained(path, kind):
    """Six conversations in templates of every kind; bench/templates.py describes the checks."""
    wrong, shown = templates.verdict(templates.tokenizer_of(path.read_text()), *templates.conversations()[kind])
    assert not wrong, shown
    assert shown.startswith("refused: ") == ((path.stem, kind) in REFUSED)


@pytest.mark.parametrize("change", [lambda turn: turn._replace(start=turn.start - 2), lambda turn: turn._replace(start=turn.start + 1),
                                    lambda turn: turn._replace(stop=turn.stop - 1), lambda turn: turn._replace(stop=turn.stop + 1)])
def test_the_check_detects_a_token_too_many_or_too_few(change):
    tokenizer = templates.tokenizer_of((ROOT / "tests/templates/chatml.jinja").read_text())
    messages, tools = templates.conversations()["two turns"]
    ids, turns = TOKENIZER.render_chat(tokenizer, messages, tools)
    assert not templates.problems(tokenizer, messages, tools, ids, turns)
    assert templates.problems(tokenizer, messages, tools, ids, [change(turns[0]), turns[1]])


ENDS = {"chatml": ["<|im_end|>"], "reasoning": ["<|im_end|>"], "system_last": ["</s>"], "next_role": ["<|user|>", "<|observation|>"],
        "channels": ["<|return|>", "<|call|>"], "headers": ["<|eot_id|>"], "wide_markers": ["<|im_end|>"], "end_at_last": ["<|end|>"],
        "always_asks": ["<|over|>"], "no_end": [], "blank_prompt": ["</s>"], "strict": ["<end_of_turn>"], "response_opens": ["<turn|>", "<|tool_response>"]}


@pytest.mark.parametrize("name", ENDS)
def test_generation_stops_where_turns_end(name, capsys):
    tokenizer = templates.tokenizer_of((ROOT / f"tests/templates/{name}.jinja").read_text())
    config = SimpleNamespace(eos_ids=[0], eos_token_id=0)
    TOKENIZER.end_with_turns(SimpleNamespace(config=config), tokenizer)
    assert config.eos_token_id == ([*map(tokenizer.convert_tokens_to_ids, ENDS[name]), 0] if ENDS[name] else 0)
    assert ("the chat template has no end-of-turn token" in capsys.readouterr().err) == (not ENDS[name])


def test_the_last_turn_gets_an_end_if_only_the_next_role_ends_turns(tokenizer):
    """If only the next role's marker ends a turn, it is added to the last turn of a conversation."""
    tokenizer = templates.tokenizer_of((ROOT / "tests/templates/next_role.jinja").read_text())
    ids, [turn] = TOKENIZER.render_chat(tokenizer, CONVERSATION[1:3])
    assert tokenizer.decode(ids[turn.start : turn.stop]) == "It ran\nover 2 hills.<|user|>" and turn.stop == len(ids)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    ids, [turn] = TOKENIZER.render_chat(tokenizer, [CONVERSATION[1], call])
    assert tokenizer.decode(ids[turn.start : turn.stop]) == "<tool_call>f\n{}</tool_call><|observation|>"


def test_a_trailing_space_of_the_generation_prompt_belongs_to_the_answer():
    tokenizer = templates.tokenizer_of((ROOT / "tests/templates/blank_prompt.jinja").read_text())
    served = TOKENIZER.render_chat(tokenizer, CONVERSATION[1:2], add_generation_prompt=True).ids
    assert tokenizer.decode(served).endswith("ASSISTANT:")
    ids, [turn] = TOKENIZER.render_chat(tokenizer, CONVERSATION[1:3])
    assert ids[: len(served)] == served


def test_a_template_that_changes_texts_is_refused(tokenizer):
    changing = with_template(tokenizer, "{% for m in messages %}{{ m.role + ': ' + (m.content | replace('e', '3')) + '<|im_end|>' }}{% endfor %}")
    with pytest.raises(UserError, match="changes the text of messages"):
        TOKENIZER.render_chat(changing, CONVERSATION)


def test_a_template_gets_no_key_without_a_value(tokenizer, monkeypatch):
    """transformers before 5.23 passes None to the template, and few templates handle it."""
    passed = []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda messages, **options: passed.extend(messages) or "")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    TOKENIZER.render(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}], None)
    assert passed == [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]


def test_hub_datasets_are_streamed(tmp_path, monkeypatch):
    """With a local folder in the hub's layout instead of the hub."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "pairs"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        write_format(folder / f"{split}.jsonl", [f"{split} {i}" for i in range(3)])
    [[source]] = TOKENIZER.expand_paths(["owner/pairs:test"])
    assert list(TOKENIZER.read_documents(source)) == ["test 0", "test 1", "test 2"]
    data = TOKENIZER.DataSection(train=["owner/pairs:train"], validation="owner/pairs:test", dir=str(tmp_path / "bin"))
    files = TOKENIZER.token_files(data, TOKENIZER.train(make_text(20), 300))
    assert set(files) == {"train", "val"}
    with pytest.raises(UserError, match="owner/pairs:nosuch: cannot be read as a file or from the hub"):
        list(TOKENIZER.read_documents(TOKENIZER.expand_paths(["owner/pairs:nosuch"])[0][0]))
    with pytest.raises(UserError, match="data/gone.jsonl' does not exist"):
        TOKENIZER.expand_paths(["data/gone.jsonl"])


@pytest.mark.parametrize(("name", "messages", "trained"), [
    ("chatml", [("user", "q"), ("assistant", "It is <|im_end|>")], ["It is <|im_end|><|im_end|>"]),
    ("chatml", [("user", "<image>\n"), ("assistant", "</div>\n")], ["</div>\n<|im_end|>"]),
    ("chatml", [("system", "S"), ("user", "S"), ("assistant", "S"), ("user", "S"), ("assistant", "S")], ["S<|im_end|>", "S<|im_end|>"]),
    ("reminder", [("system", "S"), ("user", "q"), ("assistant", "Yes")], ["Yes<|im_end|>"]),
    ("reminder", [("system", "Answer in French, whatever is asked."), ("user", "q"), ("assistant", "Oui")], ["Oui<|im_end|>"]),
    ("headers", [("user", " q "), ("assistant", " {a: [1]} \n")], ["{a: [1]}<|eot_id|>"]),
])
def test_texts_that_look_like_markup_or_occur_twice(name, messages, trained):
    tokenizer = templates.tokenizer_of((ROOT / f"tests/templates/{name}.jinja").read_text())
    ids, turns = TOKENIZER.render_chat(tokenizer, [{"role": role, "content": content} for role, content in messages])
    assert [tokenizer.decode(ids[turn.start : turn.stop]) for turn in turns] == trained


def test_an_answer_of_only_markup_with_dropped_reasoning():
    tokenizer = templates.tokenizer_of((ROOT / "tests/templates/reasoning.jinja").read_text())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "[SAFE]", "reasoning_content": "r"},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": "<yes>"}]
    ids, turns = TOKENIZER.render_chat(tokenizer, messages)
    assert [tokenizer.decode(ids[turn.start : turn.stop]) for turn in turns] == ["[SAFE]<|im_end|>", "\n</think>\n\n<yes><|im_end|>"]


@pytest.mark.parametrize("seed", range(40))
def test_random_conversations_in_random_templates(seed):
    """Compared with the mask of transformers, for a template with generation markers."""
    random = np.random.default_rng(seed)
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
                "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    tokenizer = templates.tokenizer_of(template)
    parts = ["user", "assistant", "zq0z", " ", "\n", "<b>", "</think>", "[/X]", "{", "}", '"', "\\", "\u4f60", "\U0001f600", "1", "Yes", "<|", "|>"]
    messages = []
    for i in range(int(random.integers(2, 8))):
        content = "".join(random.choice(parts, random.integers(1, 6))) + "x" * int(random.integers(0, 2))
        messages.append({"role": ("user", "assistant")[i % 2], "content": content if content.strip() else "x"})
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert ids_and_mask(tokenizer, messages) == (list(expected["input_ids"]), list(expected["assistant_masks"]))
