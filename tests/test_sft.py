"""Fine-tuning: formats of conversations, trained tokens, adapters and classifiers."""

import csv
import dataclasses
import io
import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, in_file, launch, two_processes
from safetensors.torch import load_file

import INFER
import MODEL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
             initializer_range=0.2)
TURNS = [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "The fox."}]
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {"day": {"type": "integer"}}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"day": 2}}}]}
LONG = [{"role": "system", "content": "Be brief."}, *TURNS, {"role": "user", "content": "Will it rain?"}, CALL, {"role": "tool", "content": "yes"},
        {"role": "assistant", "content": "It rains."}]




# -------------------------------------------------------------------------------------------------- layouts

CHAT = TOKENIZER.Form(SFT.conversation, "sft")


def conversations(path, *options):
    return [record for _, record in TOKENIZER.Form(SFT.conversation, "sft", *options).read(path, TOKENIZER.LeftOut())]


LAYOUTS = {
    "messages": ({"messages": TURNS}, TURNS),
    "prompt and completion": ({"prompt": "What is red?", "completion": "The fox."}, TURNS),
    "lists of messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
    "alpaca": ({"instruction": "What is red?", "input": "", "output": "The fox."}, TURNS),
    "alpaca with everything": ({"instruction": "And blue?", "input": "Look up.", "output": "The sky.", "system": "Be brief.",
                                "history": [["What is red?", "The fox."]]},
                               [LONG[0], *TURNS, {"role": "user", "content": "And blue?\n\nLook up."}, {"role": "assistant", "content": "The sky."}]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "The fox."}]}, TURNS),
    "sharegpt with a system and a call": ({"system": "Be brief.", "conversations": [
        {"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "The fox."}, {"from": "human", "value": "Will it rain?"},
        {"from": "function_call", "value": '{"name": "rain", "arguments": {"day": 2}}'}, {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains."}]}, LONG),
    "question and answer": ({"question": "What is red?", "answer": "The fox."}, TURNS),
    "parts and arguments as text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "red?"}]},
                                                  {"role": "assistant", "content": None, "tool_calls": [
                                                      {"type": "function", "function": {"name": "rain", "arguments": '{"day": 2}'}}]}]}, [TURNS[0], CALL]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_messages(name):
    record, expected = LAYOUTS[name]
    assert SFT.conversation(record, "here", CHAT)["messages"] == expected


def test_other_layouts_are_converted_and_are_no_unused_keys(tmp_path, monkeypatch):
    """Dolly's records, and a layout that a fork adds as one entry."""
    monkeypatch.setitem(TOKENIZER.CONVERTERS, ("ask", "reply"), lambda record: {"prompt": record["ask"]["text"], "completion": record["reply"]})
    records = [{"instruction": "What is red?", "context": "", "response": "The fox.", "weight": 2},
               {"instruction": "What is red?", "context": "Look.", "response": "The fox."}, {"ask": {"text": "What is red?"}, "reply": "The fox."},
               {"instruction": "What is red?", "output": "The fox.", "response": "Nothing."}]
    left = TOKENIZER.LeftOut()
    found = [record for _, record in CHAT._replace(keys=SFT.KEYS).read(write(tmp_path / "a.jsonl", records), left)]
    assert [record["messages"][1:] for record in found] == [TURNS[1:]] * 4 and found[0]["weight"] == 2
    assert [record["messages"][0]["content"] for record in found] == ["What is red?", "What is red?\n\nLook.", "What is red?", "What is red?"]
    assert left.unused == {"response"}  # of the last record


def test_history_and_table_cells_become_messages():
    pairs = {"instruction": "And blue?", "output": "The sky.", "history": [["What is red?", "The fox."]]}
    expected = SFT.conversation(pairs, "here", CHAT)
    for history in (TURNS, json.dumps(TURNS), json.dumps(pairs["history"])):
        assert SFT.conversation({**pairs, "history": history}, "here", CHAT) == expected
    assert SFT.conversation({**pairs, "history": "", "weight": "", "tools": None}, "here", CHAT) == {"messages": expected["messages"][2:]}
    cells = {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:]), "weight": "0.5", "tools": json.dumps([TOOL])}
    assert SFT.conversation(cells, "here", CHAT) == {"messages": TURNS, "weight": 0.5, "tools": [TOOL]}
    with pytest.raises(UserError, match="here: history: expected messages or .question, answer. pairs"):
        SFT.conversation({**pairs, "history": ["Hi", "Yo"]}, "here", CHAT)


@pytest.mark.parametrize("calls", [
    '[{"name": "rain", "arguments": {"day": 2}}]', {"name": "rain", "arguments": '{"day": 2}'},
    [{"id": "1", "type": "function", "function": {"name": "rain", "arguments": {"day": 2}}}],
])
def test_all_formats_of_tool_calls_are_read(calls):
    [_, call] = SFT.conversation({"messages": [TURNS[0], {"role": "assistant", "tool_calls": calls}]}, "here", CHAT)["messages"]
    assert call["tool_calls"][0]["function"] == CALL["tool_calls"][0]["function"]


@pytest.mark.parametrize("arguments", ["", None, {}, "{}", ...])
def test_calls_without_arguments(arguments):
    function = {"name": "rain"} if arguments is ... else {"name": "rain", "arguments": arguments}
    [_, call] = SFT.conversation({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": function}]}]}, "here", CHAT)["messages"]
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "rain", "arguments": {}}}]


def test_parquet_nulls_are_not_tool_arguments(tmp_path):
    """A Parquet column gives each call the arguments of all calls, most of them null."""
    other = {"type": "function", "function": {"name": "wind", "arguments": {"place": "here"}}}
    rows = [{"messages": [TURNS[0], {**CALL, "tool_calls": [call]}]} for call in (CALL["tool_calls"][0], other)]
    path = write(tmp_path / "a.parquet", rows)
    assert [record["messages"][1]["tool_calls"] for record in conversations(path)] == [CALL["tool_calls"], [other]]


def test_the_same_prompts_are_held_out_in_every_layout(tmp_path):
    """The prompt decides whether a record is held out, whatever its layout. Prompts of a validation file are not trained on."""
    prompts = [f"What is {i}?" for i in range(60)]
    rows = [{"prompt": prompt, "completion": answer} for prompt in prompts for answer in ("One.", "Two.")]
    chats = [{"messages": [LONG[0], {"role": "user", "content": f" {prompt}"}, TURNS[1]]} for prompt in prompts]
    splits = []
    for records in (rows, chats):
        data = TOKENIZER.DataSection(train=[str(write(tmp_path / "a.jsonl", records))], validation_fraction=0.3)
        splits.append([{TOKENIZER.prompt_key(record) for _, record in split} for split in TOKENIZER.read_split(data, CHAT, TOKENIZER.LeftOut())])
    assert splits[0] == splits[1] and not splits[0][0] & splits[0][1] and len(splits[0][1]) > 5
    left = TOKENIZER.LeftOut()
    held = write(tmp_path / "b.jsonl", [*rows[:5:2], {"prompt": "New?", "completion": "Yes."}])
    train, kept = TOKENIZER.read_split(TOKENIZER.DataSection(train=[str(tmp_path / "a.jsonl")], validation=str(held)), CHAT, left)
    assert len(train) == 57 and len(kept) == 4
    assert "left out 3 with a prompt of data.validation (the first: " in left.text()
    data = TOKENIZER.DataSection(train=[str(tmp_path / "a.jsonl")], validation="tail", validation_fraction=0.1)
    assert [len(split) for split in TOKENIZER.read_split(data, CHAT, left)] == [54, 6]


def test_held_out_prompts_do_not_occur_in_earlier_turns(tmp_path):
    secret = [{"role": "user", "content": "What is secret?"}, {"role": "assistant", "content": "This."}]
    held = write(tmp_path / "held.jsonl", [{"messages": secret}])
    train = write(tmp_path / "train.jsonl", [{"messages": secret + TURNS}, {"messages": TURNS}])
    data = TOKENIZER.DataSection(train=[str(train)], validation=str(held))
    assert [record["messages"] for _, record in TOKENIZER.read_split(data, CHAT, TOKENIZER.LeftOut())[0]] == [TURNS]
    calls = [{**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": name}]} for name in ("a", "b")]
    keys = {TOKENIZER.prompt_key({"messages": [TURNS[0], call, {"role": "tool", "content": "yes"}, TURNS[1]]}) for call in calls}
    assert len(keys) == 1  # random ids of calls do not matter


@pytest.mark.parametrize(("record", "expected"), [
    ({"prompt": "a", "completion": '[{"value": "red", "id": 1}]'}, '[{"value": "red", "id": 1}]'),
    ({"prompt": "a", "completion": '[{"role": "admin", "name": "x"}]'}, '[{"role": "admin", "name": "x"}]'),
    ({"prompt": "a", "completion": "\n\nHuman: is a label\n\nAssistant: is another"}, "\n\nHuman: is a label\n\nAssistant: is another"),
    ({"prompt": TURNS[:1], "completion": TURNS}, "The fox."),
    ({"prompt": TURNS[:1], "system": "Be brief.", "completion": LONG[:3]}, "The fox."),
])
def test_completions_are_parsed_as_messages_only_if_they_are_messages(record, expected):
    messages = SFT.conversation(record, "here", CHAT)["messages"]
    assert messages[-1]["content"] == expected and [turn["role"] for turn in messages if turn["role"] != "system"] == ["user", "assistant"]


def test_function_calls_empty_tool_results_and_duplicate_system_messages():
    call = {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": '{"day": 2}'}}
    record = {"system": "Be brief.", "messages": [*LONG[:1], TURNS[0], call, {"role": "tool", "content": None}, TURNS[1]]}
    messages = SFT.conversation(record, "here", CHAT)["messages"]
    assert messages == [LONG[0], TURNS[0], CALL, {"role": "tool", "content": ""}, TURNS[1]]
    pairs = {"messages": TURNS, "history": [["Hi", "Yo"]]}
    assert [turn["content"] for turn in SFT.conversation(pairs, "here", CHAT)["messages"]] == ["Hi", "Yo", "What is red?", "The fox."]


def test_an_error_names_a_held_out_set_of_all_records(tmp_path):
    prompt = next(p for i in range(999) if TOKENIZER.is_held_out(TOKENIZER.prompt_key({"prompt": (p := f"What is {i}?")}), 0.05))
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": f"{i}."} for i in range(9)])
    with pytest.raises(UserError, match="data.validation: hash holds out all prompts of data.train .9 records"):
        TOKENIZER.read_split(TOKENIZER.DataSection(train=[str(path)]), CHAT, TOKENIZER.LeftOut())


def write(path, records):
    """Write records in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_conversations_are_read_from_every_file_type(suffix, tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f'It is "{i}",\nsaid the owl.', "source": "book"} for i in range(3)]
    path = write(tmp_path / f"data{suffix}", rows)
    found = list(CHAT.read(path, TOKENIZER.LeftOut()))
    assert [record["messages"][1]["content"] for _, record in found] == [row["answer"] for row in rows]
    assert all(where.startswith(str(path)) for where, _ in found)


def test_columns_maps_other_names(tmp_path):
    path = write(tmp_path / "a.csv", [{"q": "What is red?", "reply": "The fox."}])
    [record] = conversations(path, {"prompt": "q", "completion": "reply"})
    assert record["messages"] == TURNS
    with pytest.raises(UserError, match="no key 'nope', which sft.columns names .keys: q, reply"):
        conversations(path, {"prompt": "nope"})


def test_convert_writes_messages(tmp_path, capsys):
    write(tmp_path / "a.csv", [{"question": "What is red?", "answer": "The fox."}] * 2)
    write(tmp_path / "b.json", [LAYOUTS["alpaca with everything"][0]])
    SFT.main(["--convert", "--data", str(tmp_path / "a.csv"), str(tmp_path / "b.json"), "--out", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["messages"] for line in lines] == [TURNS, TURNS, LAYOUTS["alpaca with everything"][1]]
    assert "3 records (2 from" in capsys.readouterr().err
    assert conversations(tmp_path / "out.jsonl") == lines
    with pytest.raises(UserError, match="must be a file name that ends in .jsonl"):
        SFT.main(["--convert", "--data", str(tmp_path / "a.csv"), "--out", str(tmp_path / "folder")])


INVALID = {
    "no assistant": ([{"messages": TURNS[:1]}], "; left out 1 without an assistant message .the first: .*bad.jsonl:1"),
    "empty answer": ([{"messages": [TURNS[0], {"role": "assistant", "content": " "}]}], "; left out 1 with an empty answer"),
    "a list's repr": ([{"messages": str(TURNS)}], ":1: messages: not valid JSON"),
    "text as the key": ([{"messages": [{"role": "user", "text": "a"}, TURNS[1]]}], ":1: messages: message 1: content must be a string, found NoneType"),
    "a NUL": ([{"prompt": "a\0b", "completion": "c"}], ":1: prompt contains a NUL character"),
    "unknown role": ([{"messages": [*TURNS, {"role": "narrator", "content": "x"}]}], ":1: messages: message 3: unknown role 'narrator'"),
    "two systems": ([{"messages": [LONG[0], LONG[0], *TURNS]}], ":1: messages: 2 system messages"),
    "late system": ([{"messages": [*TURNS, LONG[0]]}], ":1: messages: message 3 is the system message, which must be the first"),
    "text": ([{"messages": "hi"}], ":1: messages: expected a list of messages, found the text 'hi'"),
    "a pair": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ":1: a preference pair .chosen, rejected.; train on it with RL.py"),
    "no output": ([{"instruction": "a"}], ":1: keys instruction match no format .messages"),
    "late history": ([{"instruction": "a", "output": "b", "history": [["c"]]}], ":1: history: expected messages or .question, answer. pairs"),
    "tools": ([{"messages": TURNS, "tools": "{}"}], ":1: tools must be a list, found dict"),
    "a call": ([{"messages": [TURNS[0], {"role": "assistant", "tool_calls": [3]}]}], ":1: messages: message 2: a tool call must be an object with name"),
    "unknown keys": ([{"ask": "a", "say": "b"}], ":1: keys ask, say match no format .messages; conversations; prompt"),
    "content": ([{"messages": [{"role": "user", "content": 3}, TURNS[1]]}], ":1: messages: message 1: content must be a string, found int"),
    "arguments": ([{"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}],
                  ":1: messages: message 2: a tool call's arguments: not valid JSON"),
    "weight": ([{"messages": TURNS, "weight": -1}], ":1: weight -1 must be at least 0"),
}


def settings(model_folder, *more):
    return MODEL.load_config(["--model", str(model_folder), *map(str, more)], SFT.SECTIONS, "sft", SFT.ACTIONS)


@pytest.mark.parametrize("name", INVALID)
def test_errors_name_the_bad_record(name, tmp_path, tokenizer, model_folder):
    records, message = INVALID[name]
    path = write(tmp_path / "bad.jsonl", records)
    chat = chat_tokenizer(tokenizer)
    with pytest.raises(UserError, match=f"bad.jsonl{message}"):
        SFT.read_conversations(settings(model_folder, "--data", path, "--data.validation", "none"), chat)


def test_records_without_completions_are_skipped_and_counted(tmp_path, tokenizer, model_folder, capsys):
    nothing = [{"instruction": "a", "output": None}, {"instruction": "a", "output": ""}, {"messages": TURNS[:1]}, {"messages": []},
               {"messages": [TURNS[0], {"role": "assistant", "content": ""}]}, {"messages": [LONG[0]]}]
    path = write(tmp_path / "a.jsonl", [*nothing, {"messages": TURNS, "source": "x", "id": 3}, {"instruction": "", "input": "red?", "output": "fox"}])
    train, _ = SFT.read_conversations(settings(model_folder, "--data", path, "--data.validation", "none"), chat_tokenizer(tokenizer))
    assert [sample.record["messages"][0]["content"] for sample in train] == [TURNS[0]["content"], "red?"]
    shown = capsys.readouterr().err
    for words in ("left out 2 with an empty text, prompt or answer", "left out 3 without an assistant message", "left out 1 with an empty answer",
                  "unused keys: id, source"):
        assert words in shown


def test_a_readme_in_a_data_folder_is_ignored(tmp_path):
    write(tmp_path / "data.jsonl", [{"messages": TURNS}])
    (tmp_path / "README.md").write_text("# The data")
    data = TOKENIZER.DataSection(train=[str(tmp_path)], validation="none")
    assert len(TOKENIZER.read_split(data, CHAT, TOKENIZER.LeftOut())[0]) == 1


def test_every_prompt_of_a_validation_file_is_held_out(tmp_path):
    """Prompts of earlier turns and of another Unicode normalization as well."""
    first = [{"role": "user", "content": "What is a caf\u00e9?"}, TURNS[1]]
    held = write(tmp_path / "held.jsonl", [{"messages": first + TURNS}])
    other = [{"role": "user", "content": "What is a cafe\u0301?"}, TURNS[1]]
    train = write(tmp_path / "train.jsonl", [{"messages": other}, {"messages": [LONG[0], *first]}, {"messages": LONG}])
    data = TOKENIZER.DataSection(train=[str(train)], validation=str(held))
    assert [record["messages"] for _, record in TOKENIZER.read_split(data, CHAT, TOKENIZER.LeftOut())[0]] == [LONG]


def test_the_train_key_of_axolotl_sets_the_weight(tokenizer):
    turns = [*TURNS, TURNS[0], {**TURNS[1], "train": False}]
    sample = SFT.Sample("x", SFT.conversation({"messages": turns}, "x", CHAT), chat_tokenizer(tokenizer), SFT.SFTSection())
    [first, last] = sample.turns
    assert all(sample.weights[first.start : first.stop]) and not any(sample.weights[last.start :])


def test_template_omissions_are_reported_once(tokenizer, capsys):
    """The default template renders reasoning; others may omit it, and system messages too."""
    with_reasoning = [LONG[0], TURNS[0], {**TURNS[1], "reasoning_content": "Think of foxes."}]
    ids, [turn] = TOKENIZER.render_chat(chat := chat_tokenizer(tokenizer), with_reasoning)
    assert chat.decode(ids[turn.start : turn.stop]) == "<think>\nThink of foxes.\n</think>\n\n" + TURNS[1]["content"] + "<|im_end|>"
    assert not capsys.readouterr().err
    TOKENIZER.say_once.cache_clear()
    bare = chat_tokenizer(tokenizer, "{% for m in messages if m.role != 'system' %}" + BARE.removeprefix("{% for m in messages %}"))
    for _ in range(2):
        TOKENIZER.render_chat(bare, with_reasoning)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and "does not render system messages" in shown[0] and "does not render reasoning" in shown[1]


# ------------------------------------------------------------------------------------------ trained tokens

BARE = ("{% for m in messages %}{{ '[' + m.role + ']' + (m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
MARKED = ("{% if tools %}{{ 'Tools: ' + tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>' }}"
          "{% generation %}{{ (m.content or '') + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>' }}{% endgeneration %}"
          "{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}")


def chat_tokenizer(tokenizer, template=None):
    import copy

    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    TOKENIZER.ensure_chat(made)
    return made


@pytest.mark.parametrize("template", [None, BARE, MARKED])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_trained_tokens_follow_the_prompt_of_the_server(template, tools, tokenizer, model_folder, tmp_path):
    """In training, each assistant turn with its end token follows exactly the tokens that serving renders as the prompt."""
    chat = chat_tokenizer(tokenizer, template)
    ids, turns = TOKENIZER.render_chat(chat, LONG, tools)
    session = object.__new__(INFER.Session)
    session.tokenizer, session.chat, session.model = chat, True, MODEL.load(model_folder)
    session.model.config.max_position_embeddings = 4096
    session.settings = INFER.InferenceSection()
    expected = [i for i, message in enumerate(LONG) if message["role"] == "assistant"]
    assert [turn.message for turn in turns] == expected
    for place, start, stop in turns:
        assert ids[:start] == session.prompt_ids({"messages": LONG[:place], "tools": tools}, INFER.Sampling(1))
        words = chat.decode(ids[start:stop])
        content = LONG[place]["content"] or '"rain"'
        assert words.endswith("<|im_end|>") and content in words and "<|im_start|>" not in words
        assert LONG[place]["content"] == "" or words == LONG[place]["content"] + "<|im_end|>"
    assert TOKENIZER.chat_ends(chat).stop == [chat.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_that_omits_completions_is_an_error(tokenizer):
    chat = chat_tokenizer(tokenizer, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="here:3: message 2: the chat template does not render the text of the assistant"):
        SFT.Sample("here:3", {"messages": TURNS}, chat, SFT.SFTSection())
    refusing = chat_tokenizer(tokenizer, "{{ raise_exception('no tools here') }}")
    with pytest.raises(UserError, match="here:4: the chat template refuses this conversation .no tools here"):
        SFT.Sample("here:4", {"messages": TURNS}, refusing, SFT.SFTSection())


def test_missing_chat_tokens_are_added(tokenizer):
    """As for GPT-2, whose tokenizer has one special token and no chat template."""
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=bare_backend(), eos_token="<|endoftext|>")
    before = len(plain)
    TOKENIZER.ensure_chat(plain)
    assert len(plain) == before + 2 and TOKENIZER.chat_ends(plain).stop == [before + 1]
    ids, [turn] = TOKENIZER.render_chat(plain, TURNS)
    assert plain.decode(ids[turn.start : turn.stop]) == "The fox.<|im_end|>"


def bare_backend():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(["<|endoftext|>", *alphabet])}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>"])
    return raw


def test_loss_weights_of_turns_prompts_and_texts(tokenizer):
    chat = chat_tokenizer(tokenizer)
    sample = SFT.Sample("x", {"messages": LONG}, chat, SFT.SFTSection())
    last = SFT.Sample("x", {"messages": LONG}, chat, SFT.SFTSection(last_turn_only=True))
    whole = SFT.Sample("x", {"messages": LONG, "weight": 0.5}, chat, SFT.SFTSection(train_on_prompt=True))
    assert chat.decode([i for i, w in zip(last.ids, last.weights) if w]) == "It rains.<|im_end|>"
    assert "The fox.<|im_end|>" in chat.decode([i for i, w in zip(sample.ids, sample.weights) if w]) and set(sample.weights) == {0.0, 1.0}
    assert set(whole.weights) == {0.5}
    text = SFT.Sample("x", {"text": "The owl."}, chat, SFT.SFTSection())
    assert chat.decode(text.ids) == "<|endoftext|>The owl.<|endoftext|>" and all(text.weights)
    with pytest.raises(UserError, match="are mutually exclusive"):
        SFT.SFTSection(train_on_prompt=True, last_turn_only=True)


@pytest.mark.parametrize("choice, count", [("cut", 3), ("drop", 2)])
def test_long_conversations_are_truncated_or_dropped_and_counted(choice, count, tmp_path, tokenizer, model_folder, capsys):
    long = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "fox " * 90}]}
    unusable = {"messages": [{"role": "user", "content": "fox " * 90}, {"role": "assistant", "content": "Yes."}]}
    path = write(tmp_path / "a.jsonl", [{"messages": TURNS}, long, {"messages": LONG[:3]}, {"messages": TURNS}, unusable])
    samples, _ = SFT.read_conversations(settings(model_folder, "--data", path, "--data.validation", "none", "--max-length", 60, "--sft.too_long", choice),
                              chat_tokenizer(tokenizer))
    assert len(samples) == count and max(len(sample.ids) for sample in samples) <= 61
    shown = capsys.readouterr().err
    assert "left out 1 duplicate" in shown and ("2 truncated" in shown and "1 whose completion is beyond training.max_length 60" in shown) == (choice == "cut")
    assert ("left out 2 too long for training.max_length" in shown) == (choice == "drop")


# -------------------------------------------------------------------------------------------------- batches


def some_conversations(chat, count=23):
    generator = np.random.default_rng(3)
    words = "the red fox ran over a small hill and saw one old owl".split()
    return [SFT.Sample("x", {"messages": [{"role": "user", "content": " ".join(generator.choice(words, generator.integers(1, 12)))},
                                        {"role": "assistant", "content": " ".join(generator.choice(words, generator.integers(1, 9)))}],
                           "weight": float(generator.choice([0.5, 1.0, 2.0]))}, chat, SFT.SFTSection()) for _ in range(count)]


def epoch_of(samples, packing, batch_size=4):
    spans = TOKENIZER.Examples.of(samples)
    stream = TOKENIZER.TokenStream(lambda epoch: [[spans]], lambda sources, seed: TOKENIZER.WholeRows(*sources, 80, packing, seed), batch_size, 80)
    stream.start(type("Run", (), dict(rank=0, world_size=1, seed=1, grad_accum=1))())
    return [next(stream) for _ in range(stream.steps_per_epoch)]


def test_packed_and_padded_batches_have_the_same_loss_and_gradients(tokenizer, model_folder):
    """Both equal the sum over single conversations."""
    chat, results = chat_tokenizer(tokenizer), []
    samples = some_conversations(chat)
    model = MODEL.load(model_folder).train()

    def collect(loss):
        model.zero_grad()
        loss.backward()
        return float(loss), torch.cat([w.grad.flatten() for w in model.parameters()])

    for packing in (True, False):
        batches = epoch_of(samples, packing)
        total = sum(batch["counts"]["tokens"] for batch in batches)
        results.append(collect(sum(TRAIN.token_loss(model, batch, {"tokens": total, "micro_batches": 1})[0] for batch in batches)))
        assert (len(batches) < 6) == packing
    one_by_one, weight = 0.0, 0.0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
        weights = torch.tensor(sample.weights[1:])
        one_by_one, weight = one_by_one - (logprobs * weights).sum(), weight + weights.sum()
    results.append(collect(one_by_one / weight))
    for loss, gradient in results[:-1]:
        assert math.isclose(loss, results[-1][0], rel_tol=1e-5)
        assert (gradient - results[-1][1]).norm() <= 1e-4 * results[-1][1].norm()


def test_packed_rows_are_full_and_contain_each_conversation_once(tokenizer):
    samples = some_conversations(chat_tokenizer(tokenizer), 400)
    rows = TOKENIZER.WholeRows(TOKENIZER.Examples.of(samples), 256, True, [0])
    pieces = [piece for i in range(rows.count) for piece in rows.row(i)]
    spans = TOKENIZER.Examples.of(samples)
    assert sorted(pieces) == [(int(s), int(s + n)) for s, n in zip(spans.starts, spans.lengths)]
    filled = [sum(stop - start for start, stop in rows.row(i)) for i in range(rows.count)]
    assert max(filled) <= 256 and np.mean(filled) > 0.95 * 256


def test_neftune_adds_noise_only_in_training(model_folder):
    model, ids = MODEL.load(model_folder), torch.arange(12).view(2, 6)
    plain = model.get_input_embeddings()(ids)
    SFT.neftune(model.get_input_embeddings(), 5.0)
    assert torch.equal(model.eval().get_input_embeddings()(ids), plain)
    noise = model.train().get_input_embeddings()(ids) - plain
    reach = 5.0 / math.sqrt(6 * 32)
    assert 0.5 * reach < noise.abs().max() <= reach * 1.0001


# ------------------------------------------------------------------------------------------ more vocabulary


@pytest.mark.parametrize("preset", ["llama-1m", "gpt2-2m", "bert-2m"])
@pytest.mark.parametrize("tied", [True, False])
def test_growing_the_vocabulary_keeps_the_old_logits(preset, tied, tmp_path):
    model = MODEL.build(MODEL.preset_config(preset, vocab_size=50, num_hidden_layers=1, tie_word_embeddings=tied)).eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    MODEL.grow_vocabulary(model, 53)
    after = model(ids).logits
    assert after.shape[-1] == 53 and torch.allclose(after[..., :50], before, atol=1e-6)
    assert torch.allclose(after[..., 50], before.mean(-1), atol=1e-5)
    model(torch.tensor([[52]]))
    MODEL.save(model, tmp_path)
    assert torch.allclose(MODEL.load(tmp_path)(ids).logits, after, atol=1e-6)


# ---------------------------------------------------------------------------------------------- whole programs


def questions(count, answers=True, verb="Say"):
    """Questions for the first of two words, which are learned in a few steps."""
    generator = np.random.default_rng(0)
    words = "red fox hill owl lake rain tree two".split()
    records = []
    for _ in range(count):
        a, b = generator.choice(words, 2, replace=False)
        record = {"messages": [{"role": "user", "content": f"{verb} {a} {b}"}, {"role": "assistant", "content": str(a)}]}
        records.append({**record, "answer": str(a)} if answers else record)
    return records


@pytest.fixture()
def flags(tmp_path, model_folder):
    write(tmp_path / "train.jsonl", questions(60))
    write(tmp_path / "test.jsonl", questions(20, verb="Now say")[5:])
    usual = ["--model", str(model_folder), "--data", str(tmp_path / "train.jsonl"), "--data.validation", str(tmp_path / "test.jsonl"), "--data.deduplicate", "false",
            "--max-length", "64", "--batch-size", "4", "--learning-rate", "3e-3", "--training.optim", "adamw", "--training.warmup_steps", "2",
            "--training.lr_scheduler_type", "constant", "--training.eval_steps", "0", "--training.save_steps", "5", "--training.mixed_precision", "no",
            "--sft.answer_tokens", "6"]
    return in_file(tmp_path / "usual.yaml", usual, SFT, "sft")


def test_fine_tuning_reduces_the_loss_resumes_and_opens_in_transformers(flags, tmp_path, tokenizer, capsys):
    result = SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "whole")])
    assert list(result.after) == ["exact_match", "loss", "perplexity"] and result.after["loss"] < result.before["loss"] - 0.5
    report = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (report["stage"], report["measure"], report["before"]["exact_match"]) == ("sft", "exact_match", result.before["exact_match"])
    SFT.main([*flags, "--max-steps", "5", "--out", str(tmp_path / "halves")])
    SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert set(whole) == set(halves) and all(torch.equal(whole[name], halves[name]) for name in whole)
    folder = tmp_path / "whole"
    assert (folder / "chat_template.jinja").read_text() == TOKENIZER.CHAT_TEMPLATE
    hf, theirs = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    question = questions(20)[7]["messages"][:1]
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    answer = hf.generate(prompt, do_sample=False, max_new_tokens=6)[0, prompt.shape[1] :]
    capsys.readouterr()
    INFER.main(["--model", str(folder), "--prompt", question[0]["content"], "--temperature", "0", "--max-new-tokens", "6"])
    assert capsys.readouterr().out == theirs.decode(answer, skip_special_tokens=True) + "\n"


def test_exact_match_compares_complete_answers(tmp_path, tokenizer, model_folder, flags):
    chat = chat_tokenizer(tokenizer)
    config = settings(model_folder, *flags)
    samples, kept = SFT.read_conversations(config, chat)
    assert len(kept) == 15
    model = MODEL.load(model_folder)
    prompts_seen = []

    def generate(_, prompts, sampling, *args, **kwargs):
        prompts_seen.extend(prompts)
        answers = [" " + sample.record["messages"][-1]["content"].upper() + "\n" if i % 2 else "no" for i, sample in enumerate(kept)]
        return [[type("C", (), {"text": answers[i % len(kept)]})] for i in range(len(prompts))]

    original, INFER.generate = INFER.generate, generate
    try:
        measures = SFT.with_answers(None, kept, chat, config)(model)
    finally:
        INFER.generate = original
    assert measures == {"exact_match": 7 / 15}
    assert prompts_seen[0] == TOKENIZER.render_chat(chat, kept[0].record["messages"][:1], add_generation_prompt=True).ids


def test_new_training_data_resets_the_validation_file():
    """With other training data, the bundled validation file is not used; an explicit data.validation is."""
    assert settings("x").data.validation == "data/chat_test.jsonl"
    assert settings("x", "--data", "mine.jsonl").data.validation == "hash"
    assert settings("x", "--data", "mine.jsonl", "--data.validation", "b.jsonl").data.validation == "b.jsonl"


@pytest.mark.parametrize("wrong, message", [
    (["--lora.loraplus_lr_ratio", "4"], "lora.loraplus_lr_ratio: needs an adapter"),
    (["--lora.r", "2", "--lora.target_modules", "[nope]"], "lora.target_modules: nope cannot get adapters"),
])
def test_settings_without_effect_are_errors(wrong, message, flags, tmp_path):
    with pytest.raises(UserError, match=message):
        SFT.main([*flags, *wrong, "--max-steps", "1", "--out", str(tmp_path / "out")])


def test_an_encoder_cannot_be_trained_on_conversations(flags, tmp_path, tokenizer):
    MODEL.save(MODEL.build(MODEL.preset_config("bert-2m", vocab_size=len(tokenizer), num_hidden_layers=1)), tmp_path / "bert")
    TOKENIZER.save(tokenizer, tmp_path / "bert")
    with pytest.raises(UserError, match="is an encoder"):
        SFT.main([*flags, "--model", str(tmp_path / "bert"), "--max-steps", "1", "--out", str(tmp_path / "out")])


def test_dry_run_highlights_trained_tokens(flags, capsys, monkeypatch):
    SFT.main([*flags, "--dry-run"])
    shown = capsys.readouterr().out
    assert shown.count("[[") == 3 and "<|im_start|>assistant\n[[" in shown and "tokens per conversation: median" in shown
    assert shown.split("[[")[1].startswith(questions(1)[0]["messages"][1]["content"] + "<|im_end|>]]")
    monkeypatch.setattr(MODEL, "shows_colors", lambda: True)
    SFT.main([*flags, "--dry-run"])
    assert capsys.readouterr().out == shown.replace("[[", "\033[32m").replace("]]", "\033[0m")


def test_a_model_without_chat_tokens_gets_them(tmp_path, flags, capsys):
    """As for GPT-2: its tokenizer has no chat tokens, so that the embedding and the head get two more rows."""
    from peft import AutoPeftModelForCausalLM

    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=bare_backend(), eos_token="<|endoftext|>")
    config = MODEL.preset_config("gpt2-2m", vocab_size=len(plain), num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
                                 max_position_embeddings=128, eos_token_id=0, bos_token_id=0)
    MODEL.save(MODEL.build(config), tmp_path / "base")
    TOKENIZER.save(plain, tmp_path / "base")
    result = SFT.main([*flags, "--model", str(tmp_path / "base"), "--max-steps", "4", "--out", str(tmp_path / "out")])
    assert result.after["loss"] < result.before["loss"]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.config.vocab_size == len(plain) + 2 == len(TOKENIZER.load(tmp_path / "out"))
    assert hf.generation_config.eos_token_id == [len(plain) + 1, 0]
    capsys.readouterr()
    SFT.main([*flags, "--model", str(tmp_path / "base"), "--max-steps", "4", "--lora.r", "4", "--learning-rate", "1e-2", "--out", str(tmp_path / "lora")])
    assert f"--adapter {tmp_path / 'lora'}" in capsys.readouterr().err.splitlines()[-1]
    SFT.main(["--merge", str(tmp_path / "lora"), "--out", str(tmp_path / "merged")])
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "lora").eos_token_id == [len(plain) + 1, 0]
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = MODEL.load(tmp_path / "base", adapter=tmp_path / "lora")(ids).logits
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()(ids).logits
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)

# ------------------------------------------------------------------------------------------------- adapters

ADAPTER_OPTIONS = {"lora": {}, "dora": dict(use_dora=True), "rslora": dict(use_rslora=True), "some": dict(target_modules=["q_proj", "down_proj"])}


def steps_of(model, forward, count=4):
    """Losses of a few AdamW steps on the trained weights; forward(ids) -> logits."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2), []
    for i in range(count):
        ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(i))
        loss = torch.nn.functional.cross_entropy(forward(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", ADAPTER_OPTIONS)
def test_adapters_train_like_peft_and_load_there(name, model_folder, tmp_path):
    from peft import PeftModel

    ids = torch.arange(20).view(2, 10)
    ours = MODEL.load(model_folder)
    plain = ours(ids).logits
    torch.manual_seed(0)
    SFT.attach_lora(ours, model_folder, r=4, lora_alpha=8, **ADAPTER_OPTIONS[name])
    assert torch.allclose(ours(ids).logits, plain, atol=1e-5)
    assert all(MODEL.tensor_is_trained(n) == w.requires_grad for n, w in ours.named_parameters())
    MODEL.save(ours, tmp_path / "start")
    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "start", is_trainable=True)
    expected = steps_of(theirs, lambda x: theirs(x).logits)
    np.testing.assert_allclose(steps_of(ours, lambda x: ours(x).logits), expected, atol=1e-4)
    MODEL.save(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (raw["task_type"], raw["base_model_name_or_path"], raw.get("auto_mapping")) == ("CAUSAL_LM", str(model_folder), None)
    with torch.no_grad():
        there = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "ours")(ids).logits
        here = MODEL.load(model_folder, adapter=tmp_path / "theirs")
        close = dict(atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.eval()(ids).logits, there, **close)
        torch.testing.assert_close(here(ids).logits, theirs.eval()(ids).logits, **close)
        assert not torch.allclose(there, plain, atol=1e-2)
        unmerged = here(ids).logits
        MODEL.merge_adapter(here)
        torch.testing.assert_close(here(ids).logits, unmerged, **close)
    assert set(here.state_dict()) == set(MODEL.load(model_folder).state_dict())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_trained_with_adapters(tied, kind, tmp_path):
    from peft import AutoPeftModelForCausalLM

    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=bare_backend(), eos_token="<|endoftext|>")
    knobs = MODEL._GPT2 if kind == "gpt2" else {}
    config = MODEL.ModelConfig(**{**knobs, **SMALL, "vocab_size": len(plain), "max_position_embeddings": 128, "tie_word_embeddings": tied})
    MODEL.save(MODEL.build(config), tmp_path / "base")
    TOKENIZER.save(plain, tmp_path / "base")
    TOKENIZER.ensure_chat(plain)
    model = MODEL.load(tmp_path / "base")
    MODEL.grow_vocabulary(model, len(plain))
    SFT.attach_lora(model, tmp_path / "base", r=4, trainable_token_indices=SFT.rows_to_train(model, model.new_ids))
    new, before = model.new_ids, model.get_input_embeddings().weight.detach().clone()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    ids = torch.tensor([[5, new[0], 9, new[1], 7]])
    for _ in range(3):
        loss = -model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    MODEL.save(model, tmp_path / "adapter")
    TOKENIZER.save(plain, tmp_path / "adapter")
    with torch.no_grad():
        logits = model.eval()(ids).logits
        loaded = MODEL.load(tmp_path / "base", adapter=tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-5)
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=1e-4)
        MODEL.merge_adapter(loaded)
        torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-5)
        assert set(loaded.state_dict()) == set(MODEL.load(tmp_path / "base").state_dict())
    assert torch.equal(model.get_input_embeddings().original_module.weight, before)


KINDS = {"gpt2": (MODEL._GPT2, ["c_attn", "c_proj", "c_fc"]), "bert": (MODEL._BERT, ["query", "value", "intermediate.dense", "output.dense"])}
FORMS = {"plain": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True), "some": dict(target_modules=["o_proj", "down_proj"])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gpt2_and_bert_adapters_are_exchanged_with_peft(kind, form, tmp_path, tokenizer):
    """GPT-2 and BERT have other weight names in transformers. Adapters from here load there and back, with the same rank."""
    from peft import LoraConfig, PeftModel, get_peft_model

    knobs, names = KINDS[kind]
    small = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                 initializer_range=0.2, model_type=kind, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
    MODEL.save(MODEL.build(MODEL.ModelConfig(**{**{k: v for k, v in knobs.items() if k in MODEL.KNOBS}, **small})), tmp_path / "base")
    auto = transformers.AutoModelForCausalLM if kind == "gpt2" else transformers.AutoModelForMaskedLM
    ids, options = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0)), {"r": 4, "lora_alpha": 6, **FORMS[form]}

    def shake(model):
        generator = torch.Generator().manual_seed(2)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += torch.empty(weight.shape).normal_(0, 0.2, generator=generator)
        return model.eval()

    targets = options.pop("target_modules", ["all-linear"])
    ours = MODEL.load(tmp_path / "base")
    SFT.attach_lora(ours, tmp_path / "base", targets, **options)
    with torch.no_grad():
        logits = shake(ours)(ids).logits
        MODEL.save(ours, tmp_path / "ours")
        theirs = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=1e-4)
        again = MODEL.load(tmp_path / "base", adapter=tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, logits, atol=1e-5, rtol=1e-5)
        sizes = [sum(w.numel() for name, w in model.named_parameters() if "lora_" in name) for model in (ours, again)]
        assert sizes[0] == sizes[1]
        MODEL.merge_adapter(again)
        torch.testing.assert_close(again(ids).logits, logits, atol=1e-4, rtol=1e-4)
        foreign = shake(get_peft_model(auto.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=names, **options)))
        logits = foreign(ids).logits
        foreign.save_pretrained(tmp_path / "theirs")
        here = MODEL.load(tmp_path / "base", adapter=tmp_path / "theirs")
        torch.testing.assert_close(here(ids).logits, logits, atol=1e-4, rtol=1e-4)
        MODEL.save(here, tmp_path / "back")
        back = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "back").eval()
        torch.testing.assert_close(back(ids).logits, logits, atol=1e-4, rtol=1e-4)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back")]
    assert {name: tensor.shape for name, tensor in tensors[0].items()} == {name: tensor.shape for name, tensor in tensors[1].items()}


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_16_bit_matrices_give_identical_results(tied, tmp_path):
    """Under autocast, which would otherwise convert them at each use."""
    config = MODEL.ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, attention_bias=True,
                               max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2)
    MODEL.save(MODEL.build(config, seed=1), tmp_path)
    ids = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(0))

    def gradients(narrow):
        model = MODEL.load(tmp_path).train()
        SFT.attach_lora(model, tmp_path, r=4)
        for name, weight in model.named_parameters():
            weight.data += 0.1 * ("lora_B" in name)
        if narrow:
            MODEL.narrow_frozen(model, torch.bfloat16)
            kinds = {name: weight.dtype for name, weight in model.named_parameters()}
            assert kinds["model.layers.0.mlp.up_proj.base_layer.weight"] == torch.bfloat16 and kinds["model.norm.weight"] == torch.float32
            assert kinds["model.embed_tokens.weight"] == torch.float32 and all("lora" not in name or kind == torch.float32 for name, kind in kinds.items())
        with torch.autocast("cpu", torch.bfloat16):
            loss = -model(ids[:, :-1], targets=ids[:, 1:]).logprobs.mean()
        loss.backward()
        return loss.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])

    for plain, narrow in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, narrow)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_lora_forward_equals_pefts(dropout, tmp_path):
    """Outputs and gradients compared with peft's forward, with a bias, dropout, and 3-D and 2-D inputs."""
    config = MODEL.ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, attention_bias=True)
    model = MODEL.build(config)
    SFT.attach_lora(model, "x", r=4, lora_alpha=6, lora_dropout=dropout)
    layer = model.model.layers[0].self_attn.q_proj.train()
    layer.lora_B["default"].weight.data.normal_()
    for shape in ((2, 5, 32), (7, 32)):
        hidden, results = torch.randn(shape, requires_grad=True), []
        for forward in (layer.forward, type(layer).forward.__get__(layer)):
            layer.zero_grad()
            hidden.grad = None
            torch.manual_seed(0)
            out = forward(hidden)
            out.square().sum().backward()
            results.append([out, hidden.grad.clone(), layer.lora_A["default"].weight.grad.clone(), layer.lora_B["default"].weight.grad.clone()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert layer.forward is not type(layer).forward and layer.forward.func is MODEL.adapted_product


@pytest.mark.parametrize("extra", [dict(lora_bias=True), dict(bias="lora_only"), dict(init_lora_weights="pissa"), dict(rank_pattern={"c_fc": 2}, alpha_pattern={"h.0.attn": 40}),
                                   dict(trainable_token_indices={"wte": [3, 5]})], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_optional_features_of_peft_adapters_are_computed(kind, extra, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    knobs = MODEL._GPT2 if kind == "gpt2" else dict(attention_bias=True, attention_out_bias=True, mlp_bias=True)
    MODEL.save(MODEL.build(MODEL.ModelConfig(**{**knobs, **SMALL, "model_type": kind})), tmp_path / "base")
    names = {"gpt2": {"wte": "wte"}, "llama": {"wte": "embed_tokens", "c_fc": "up_proj", "h.0.attn": "layers.0.self_attn"}}[kind]
    extra = {key: {names.get(name, name): value for name, value in values.items()} if isinstance(values, dict) else values for key, values in extra.items()}
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "up_proj"]
    theirs = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=4, target_modules=targets, **extra))
    for i, weight in enumerate(theirs.parameters()):
        weight.data += 0.3 * weight.requires_grad * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()(ids).logits
        torch.testing.assert_close(MODEL.load(tmp_path / "base", adapter=tmp_path / "adapter")(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_unsupported_adapters_are_one_line_errors(tmp_path):
    from peft import LoraConfig, get_peft_model

    MODEL.save(MODEL.build(MODEL.ModelConfig(**SMALL)), tmp_path / "llama")
    MODEL.save(MODEL.build(MODEL.ModelConfig(**{**MODEL._GPT2, **SMALL, "model_type": "gpt2"})), tmp_path / "gpt2")
    made = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"), LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["wpe"]))
    made.save_pretrained(tmp_path / "extra")
    with pytest.raises(UserError, match="extra: modules_to_save .'wpe'. are not supported"):
        MODEL.load(tmp_path / "gpt2", adapter=tmp_path / "extra")
    packed = MODEL.load(tmp_path / "llama", quantization="llm_int8")
    with pytest.raises(UserError, match="lora.use_dora: does not work on llm_int8 weights"):
        SFT.attach_lora(packed, "x", r=4, use_dora=True)
    with pytest.raises(UserError, match="a folder cannot store llm_int8 weights"):
        MODEL.save(packed, tmp_path / "no")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("targets", [["all-linear"], ["gate_proj", "up_proj", "down_proj"]])
def test_adapters_on_mixtures_of_experts_agree_with_peft_and_merge(kind, targets, tmp_path, capsys):
    """In peft, whether gate_proj means the experts depends on the family. Layers without an adapter are printed."""
    from peft import AutoPeftModelForCausalLM

    latent = dict(kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_shared_experts=1, scoring_func="sigmoid", rope_interleave=True)
    more = {"mixtral": {}, "qwen3_moe": dict(qk_norm=True, moe_intermediate_size=24), "deepseek_v3": dict(latent, moe_intermediate_size=24, mlp_only_layers=[0])}
    config = MODEL.ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_experts=4, model_type=kind,
                               initializer_range=0.2, max_position_embeddings=64, **more[kind])
    MODEL.save(MODEL.build(config, seed=1), tmp_path / "base")
    model = MODEL.load(tmp_path / "base")
    if kind == "mixtral" and targets != ["all-linear"]:
        with pytest.raises(UserError, match="lora.target_modules: gate_proj, up_proj, down_proj cannot get adapters"):
            SFT.attach_lora(model, tmp_path / "base", targets, r=4)
        return
    SFT.attach_lora(model, tmp_path / "base", targets, r=4)
    assert "no adapter on" in capsys.readouterr().err or targets != ["all-linear"]
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(weight.numel()))
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(ids).logits
        MODEL.save(model, tmp_path / "adapter")
        torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids).logits, logits, atol=1e-4, rtol=1e-4)
        loaded = MODEL.load(tmp_path / "base", adapter=tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-5)
        MODEL.merge_adapter(loaded)
        torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-4, rtol=1e-4)
    if "experts" in "".join(name for name, weight in model.named_parameters() if weight.requires_grad):
        with pytest.raises(UserError, match="adapters on experts do not support quantized weights"):
            MODEL.load(tmp_path / "base", adapter=tmp_path / "adapter", quantization="nf4")


def test_other_bases_and_unknown_targets_are_one_line_errors(model_folder, tmp_path):
    model = MODEL.load(model_folder)
    with pytest.raises(UserError, match="lora.target_modules: nope cannot get adapters in this model .*; its layers are down_proj, gate_proj"):
        SFT.attach_lora(model, model_folder, ["nope"], r=2)
    SFT.attach_lora(model, model_folder, r=2)
    MODEL.save(model, tmp_path / "adapter")
    other = MODEL.build(MODEL.ModelConfig(vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    MODEL.save(other, tmp_path / "other")
    with pytest.raises(UserError, match="adapter: trained for another base model"):
        MODEL.load(tmp_path / "other", adapter=tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter_config.json: missing"):
        MODEL.load(model_folder, adapter=tmp_path / "other")


def test_an_adapter_trains_resumes_and_is_served(flags, tmp_path, model_folder, capsys):
    flags = in_file(tmp_path / "lora.yaml", [*flags, "--lora.r", "4", "--learning-rate", "1e-2", "--lora.loraplus_lr_ratio", "2"], SFT, "sft")
    result = SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "whole")])
    assert result.after["loss"] < result.before["loss"] - 0.3
    SFT.main([*flags, "--max-steps", "5", "--out", str(tmp_path / "halves")])
    SFT.main([*flags, "--max-steps", "10", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert set(whole) == set(halves) and all(torch.equal(whole[name], halves[name]) for name in whole)
    assert not (tmp_path / "whole" / "model.safetensors").exists()
    question, options = questions(20)[7]["messages"][0]["content"], ["--temperature", "0", "--max-new-tokens", "6"]
    capsys.readouterr()
    INFER.main(["--model", str(model_folder), "--adapter", str(tmp_path / "whole"), "--prompt", question, *options])
    served = capsys.readouterr().out
    SFT.main(["--merge", str(tmp_path / "whole"), "--out", str(tmp_path / "merged")])
    assert "differ by at most" in capsys.readouterr().err
    INFER.main(["--model", str(tmp_path / "merged"), "--prompt", question, *options])
    assert capsys.readouterr().out == served
    with pytest.raises(UserError, match="lora.r: 8, but .* has rank 4"):
        SFT.main([*flags, "--lora.r", "8", "--adapter", str(tmp_path / "whole"), "--max-steps", "3", "--out", str(tmp_path / "no")])
    more = SFT.main([*flags, "--adapter", str(tmp_path / "whole"), "--max-steps", "3", "--out", str(tmp_path / "more")])
    assert math.isclose(more.before["loss"], result.after["loss"], rel_tol=1e-4)


# -------------------------------------------------------------------------------------------------- labels

FAMILY_KNOBS = {"llama": {}, "qwen3": dict(qk_norm=True), "mixtral": dict(num_experts=4), "gpt2": MODEL._GPT2, "bert": MODEL._BERT}


def scorer(kind, tokenizer, labels=("a", "b", "c")):
    knobs = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                 initializer_range=0.3, labels=list(labels), model_type=kind, pad_token_id=tokenizer.pad_token_id, resid_pdrop=0.0, embd_pdrop=0.0,
                 attention_dropout=0.0)
    return MODEL.build(MODEL.ModelConfig(**{**{k: v for k, v in FAMILY_KNOBS[kind].items() if k in MODEL.KNOBS}, **knobs}), head="score", seed=1).eval()


def labeled_texts(count, seed=0):
    """(text, label): the text contains the label among unrelated words."""
    generator = np.random.default_rng(seed)
    words = "the red ran over a small and saw one old near".split()
    for _ in range(count):
        label = ["fox", "hill", "owl"][generator.integers(3)]
        text = [*generator.choice(words, generator.integers(2, 8)), label, label]
        yield " ".join(str(text[i]) for i in generator.permutation(len(text))), label


LABELS = TOKENIZER.Form(SFT.labeled, "sft")


def texts_in(path):
    return [record["text"] for _, record in LABELS.read(path, TOKENIZER.LeftOut())]


LABELED = {
    "the names of a table": ({"text": "Hello", "label": "yes"}, ("Hello", "yes")),
    "capitals": ({"Label": "ham", "SMS": "Hello"}, ("Hello", "ham")),
    "the only other key": ({"utterance": "Hello", "intent": "greet"}, ("Hello", "greet")),
    "numbers": ({"sentence": "Hello", "label": 1, "idx": 7}, ("Hello", "1")),
}


@pytest.mark.parametrize("name", LABELED)
def test_labeled_texts_are_detected_by_their_keys(name, tmp_path):
    record, expected = LABELED[name]
    [(where, found)] = LABELS.read(write(tmp_path / "a.jsonl", [record]), TOKENIZER.LeftOut())
    assert (found["text"], found["label"]) == expected and where.endswith("a.jsonl:1")


def test_quotes_in_tsv_files(tmp_path):
    """Quotes are characters like others in a file in which they do not enclose whole cells."""
    (tmp_path / "a.tsv").write_text('label\ttext\nham\t"Happy day" I know\nspam\tcall "now\nham\tlast"\n')
    assert texts_in(tmp_path / "a.tsv") == ['"Happy day" I know', 'call "now', 'last"']
    (tmp_path / "c.tsv").write_text('label\ttext\nham\t"Hello\nspam\tbye"\n')
    assert texts_in(tmp_path / "c.tsv") == ['"Hello', 'bye"']
    (tmp_path / "b.tsv").write_text('label\ttext\nham\t"two\nlines"\nspam\t"a ""b"""\n')
    assert texts_in(tmp_path / "b.tsv") == ["two\nlines", 'a "b"']


INVALID_LABELS = {
    "no label": ([{"text": "a", "source": "b"}], ":1: none of the keys text, source is recognized as the label"),
    "which text": ([{"label": "a", "first": "b", "second": "c"}], ":1: none of the keys label, first, second is recognized as the text"),
    "empty text": ([{"label": "a", "text": " "}], ":1: 'text' is empty"),
    "empty label": ([{"label": "a", "text": "x"}, {"label": "", "text": "y"}], ":2: 'label' is '', expected one label"),
    "several labels": ([{"label": ["a", "b"], "text": "x"}], ":1: 'label' is .*, expected one label"),
    "one label": ([{"label": "a", "text": f"x{i}"} for i in range(9)], ":1: the training data has 1 different label in 9 texts"),
    "the wrong column": ([{"label": f"a{i}", "text": f"x{i}"} for i in range(9)], ":1: the training data has 9 different labels in 9 texts"),
}


@pytest.mark.parametrize("name", INVALID_LABELS)
def test_errors_name_the_bad_labeled_record(name, tmp_path, tokenizer, model_folder):
    records, message = INVALID_LABELS[name]
    path = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(UserError, match=f"bad.jsonl{message}"):
        SFT.read_labeled(settings(model_folder, "--sft.task", "classify", "--data", path, "--data.validation", "none"), tokenizer, None)


def test_labels_seen_only_in_validation_or_unknown_to_the_model_are_refused(tmp_path, tokenizer, model_folder):
    known = [{"text": f"x{i}", "label": "ab"[i % 2]} for i in range(8)]
    train, held = write(tmp_path / "train.jsonl", known), write(tmp_path / "held.jsonl", [{"text": "y", "label": "a"}, {"text": "z", "label": "c"}])
    config = settings(model_folder, "--sft.task", "classify", "--data", train, "--data.validation", held)
    with pytest.raises(UserError, match="held.jsonl:2: label 'c' is not one of a, b, the labels of the training data"):
        SFT.read_labeled(config, tokenizer, None)
    with pytest.raises(UserError, match="train.jsonl:1: label 'a' is not one of x, b, the labels of .*;"):
        SFT.read_labeled(config, tokenizer, ["x", "b"])
    with pytest.raises(UserError, match="sft.class_weights: c: 2; expected one of the labels a, b and a weight"):
        SFT.read_labeled(settings(model_folder, "--sft.task", "classify", "--data", train, "--data.validation", "none", "--sft.class_weights", "{c: 2}"), tokenizer, None)
    with pytest.raises(UserError, match="sft.class_weights: has no effect with sft.task chat"):
        settings(model_folder, "--sft.class_weights", "balanced")


@pytest.mark.parametrize("kind", FAMILY_KNOBS)
def test_label_probabilities_are_those_of_transformers(kind, tokenizer, tmp_path):
    model = scorer(kind, tokenizer)
    MODEL.save(model, tmp_path)
    TOKENIZER.save(tokenizer, tmp_path)
    texts = [text for text, _ in labeled_texts(7)]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"} and json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        expected = theirs(**batch).logits.softmax(-1)
    loaded = MODEL.load(tmp_path)
    assert loaded.heads == ("score",) and loaded.config.labels == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(INFER.classify(loaded, tokenizer, texts)), expected, atol=1e-5, rtol=1e-4)


def test_scores_are_read_before_an_eos_token_that_is_also_the_padding(tokenizer, tmp_path):
    """As for Llama: each text ends with </s>, which is also the padding; transformers reads the token before it."""
    from tokenizers import Tokenizer, processors

    raw, end = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.eos_token
    raw.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, pad_token=end)
    model = scorer("llama", own)
    model.config.pad_token_id = own.pad_token_id
    MODEL.save(model, tmp_path)
    texts = [text for text, _ in labeled_texts(6)]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(**own(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits.softmax(-1)
    torch.testing.assert_close(torch.tensor(INFER.classify(model, own, texts)), expected, atol=1e-5, rtol=1e-4)
    sample = SFT.Labeled("x", {"text": texts[0], "label": "a"}, own)
    assert sample.text_ids[-1] != own.pad_token_id and own(texts[0]).input_ids == [*sample.text_ids, own.pad_token_id]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_label_loss_is_the_weighted_cross_entropy_packed_or_padded(kind, tokenizer):
    """Compared with single texts and the class weights of torch's cross_entropy."""
    model, labels = scorer(kind, tokenizer), {"fox": 0, "hill": 1, "owl": 2}
    weights = {"fox": 0.5, "hill": 1.0, "owl": 3.0}
    texts = [SFT.Labeled("x", {"text": text, "label": label}, tokenizer) for text, label in labeled_texts(13)]
    for text in texts:
        text.number(labels, weights)
    scores = []
    for text in texts:
        at = -1 if kind == "llama" else 0
        scores.append(model(torch.tensor([text.text_ids]), want=("scores",)).scores[0, at])
    target = torch.tensor([labels[text.record["label"]] for text in texts])
    expected = torch.nn.functional.cross_entropy(torch.stack(scores), target, weight=torch.tensor([0.5, 1.0, 3.0]))
    model.zero_grad()
    expected.backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    for packing in (True, False):
        batches = epoch_of(texts, packing)
        total = {**{name: sum(batch["counts"][name] for batch in batches) for name in ("tokens", "targets")}, "micro_batches": 1}
        model.zero_grad()
        pieces = [SFT.label_loss(kind == "llama")(model, batch, total) for batch in batches]
        loss = sum(piece for piece, _ in pieces)
        right = sum(float(scores[i].argmax() == target[i]) if not scores[i].isnan().any() else 0 for i in range(len(scores)))
        assert math.isclose(sum(float(metrics["accuracy"]) for _, metrics in pieces), right / len(scores), rel_tol=1e-6)  # not weighted
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]), gradient, atol=1e-5, rtol=1e-4)


def test_accuracy_f1_and_confusion_matrix(tokenizer):
    model = scorer("llama", tokenizer, ["fox", "hill", "owl"])
    texts = [SFT.Labeled("x", {"text": text, "label": label}, tokenizer) for text, label in labeled_texts(40)]
    for text in texts:
        text.number({"fox": 0, "hill": 1, "owl": 2}, dict.fromkeys(("fox", "hill", "owl"), 1.0))
    names = np.array(["fox", "hill", "owl"])
    given = names[np.argmax(INFER.classify(model, tokenizer, [text.record["text"] for text in texts]), 1)]
    true = np.array([text.record["label"] for text in texts])
    with torch.no_grad():
        confusion = SFT.Confusion(TOKENIZER.fixed_batches(TOKENIZER.WholeRows(TOKENIZER.Examples.of(texts), 80, True, None), 4), list(names), True)
        measures = confusion(model)
    assert confusion.counts.tolist() == [[int(((true == a) & (given == b)).sum()) for b in names] for a in names]
    precision = [((true == name) & (given == name)).sum() / max((given == name).sum(), 1) for name in names]
    recall = [((true == name) & (given == name)).sum() / (true == name).sum() for name in names]
    f1 = np.mean([2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)])
    assert math.isclose(measures["accuracy"], (true == given).mean()) and math.isclose(measures["f1_macro"], f1)
    two = SFT.Confusion([], ["ham", "spam"], True)
    two.counts = np.array([[90, 2], [3, 7]])
    assert math.isclose(two.f1(), 2 * 7 / (2 * 7 + 2 + 3))  # of the rarer label
    absent = SFT.Confusion([], ["a", "b", "c", "d"], True)
    absent.counts = np.array([[5, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 2, 0, 3]])
    assert math.isclose(absent.f1(), np.mean([10 / 11, 8 / 11, 6 / 8]))  # c occurs nowhere


def test_the_confusion_plot_does_not_warn_or_need_matplotlib(tmp_path, monkeypatch, capsys):
    confusion = SFT.Confusion([], ["ham", "\u597d"], True)  # the default font lacks the second label
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion.plot(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    TOKENIZER.say_once.cache_clear()
    confusion.plot(tmp_path / "second.png")
    assert "matplotlib is not installed" in capsys.readouterr().err and not (tmp_path / "second.png").exists()


@pytest.fixture()
def label_flags(tmp_path, model_folder):
    write(tmp_path / "notes.tsv", [{"label": label, "text": text} for text, label in labeled_texts(120)])
    usual = ["--model", str(model_folder), "--model.device", "cpu", "--sft.task", "classify", "--data", str(tmp_path / "notes.tsv"), "--data.validation_fraction", "0.3",
            "--max-length", "40", "--batch-size", "8", "--learning-rate", "5e-3", "--training.optim", "adamw", "--training.warmup_steps", "2", "--training.eval_steps", "0",
            "--training.save_steps", "10", "--training.mixed_precision", "no", "--training.lr_scheduler_type", "constant"]
    return in_file(tmp_path / "labels.yaml", usual, SFT, "sft")


def test_classification_improves_resumes_and_is_served(label_flags, tmp_path, tokenizer, capsys, monkeypatch):
    result = SFT.main([*label_flags, "--max-steps", "40", "--out", str(tmp_path / "whole")])
    assert list(result.after) == ["accuracy", "f1_macro", "loss"] and result.after["accuracy"] > result.before["accuracy"] + 0.3
    table = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  | ")][:4]
    assert "true / predicted" in table[0] and len(set(map(len, table))) == 1 and (tmp_path / "whole" / "confusion.png").exists()
    assert (tmp_path / "whole" / "ckpt-step-000040" / "confusion.png").exists()
    SFT.main([*label_flags, "--max-steps", "20", "--out", str(tmp_path / "halves")])
    SFT.main([*label_flags, "--max-steps", "40", "--out", str(tmp_path / "halves"), "--resume", "auto"])
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert set(whole) == set(halves) and all(torch.equal(whole[name], halves[name]) for name in whole)
    texts = [text for text, _ in labeled_texts(5, seed=9)]
    theirs = transformers.pipeline("text-classification", model=str(tmp_path / "whole"))(texts)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join([*texts[:2], "", *texts[2:]]).encode() + b"\n")))
    INFER.main(["--model", str(tmp_path / "whole"), "--batch-size", "2", "--model.device", "cpu"])
    lines = capsys.readouterr().out.split("\n")
    assert lines[2] == "" and lines[-1] == "" and len(lines) == 7
    for line, expected in zip([*lines[:2], *lines[3:6]], theirs, strict=True):
        label, share = line.split("\t")
        assert label == expected["label"] and abs(float(share) - expected["score"]) < 1e-4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"id": 7, "text": texts[0]}).encode() + b"\n\n")))
    INFER.main(["--model", str(tmp_path / "whole"), "--jsonl", "--model.device", "cpu"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["id"] == 7
    assert answer["label"] == theirs[0]["label"] and math.isclose(sum(answer["probabilities"].values()), 1.0, abs_tol=1e-5)
    with pytest.raises(UserError, match="inference.top_k: this model is a classifier"):
        INFER.main(["--model", str(tmp_path / "whole"), "--prompt", "x", "--top-k", "3"])
    SFT.main(["--config", str(tmp_path / "whole" / "config.yaml"), "--out", str(tmp_path / "same")])  # the saved settings reproduce the run
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    with pytest.raises(UserError, match="has no language-model head, only a classification or reward head"):
        SFT.main(["--model", str(tmp_path / "whole"), "--data", str(write(tmp_path / "a.jsonl", [{"messages": TURNS}])), "--out", str(tmp_path / "no")])
    more = SFT.main([*label_flags, "--model", str(tmp_path / "whole"), "--max-steps", "2", "--out", str(tmp_path / "more")])
    assert math.isclose(more.before["loss"], result.after["loss"], rel_tol=1e-4)


def test_classifiers_of_every_kind_load_again(label_flags, tmp_path, tokenizer, model_folder):
    """An architecture without a Hugging Face class, whose routers are balanced, and the two default labels of transformers."""
    knobs = dict(qk_norm=True, attention_bias=True, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=5.0)
    model = scorer("llama", tokenizer)
    MODEL.save(MODEL.build(dataclasses.replace(model.config, labels=None, num_labels=1, **knobs)), tmp_path / "custom")
    TOKENIZER.save(tokenizer, tmp_path / "custom")
    flags = in_file(tmp_path / "own.yaml", [*label_flags, "--model", tmp_path / "custom", "--max-steps", "3", "--training.logging_steps", "1"], SFT, "sft")
    result = SFT.main([*flags, "--out", str(tmp_path / "out")])
    again = SFT.main([*flags, "--model", str(tmp_path / "out"), "--out", str(tmp_path / "more")])
    assert math.isclose(again.before["loss"], result.after["loss"], rel_tol=1e-5)
    SFT.main([*flags, "--model.router_aux_loss_coef", "0", "--out", str(tmp_path / "unbalanced")])
    balanced, unbalanced = (load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.gate.weight"] for name in ("out", "unbalanced"))
    assert (balanced - unbalanced).abs().max() > 1e-4
    config = transformers.BertConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    assert MODEL.load(tmp_path / "bert").config.num_labels == 2
    SFT.main([*label_flags, "--model", str(tmp_path / "custom"), "--lora.r", "2", "--max-steps", "1", "--out", str(tmp_path / "adapter")])
    write(tmp_path / "chat.jsonl", questions(20))
    SFT.main(["--model", str(model_folder), "--data", str(tmp_path / "chat.jsonl"), "--lora.r", "2", "--max-steps", "1", "--max-length", "32", "--out", str(tmp_path / "chat")])
    with pytest.raises(UserError, match="this adapter has no classification head; merge it"):
        SFT.main([*label_flags, "--adapter", str(tmp_path / "chat"), "--max-steps", "1", "--out", str(tmp_path / "no")])


def test_only_the_ratio_of_class_weights_counts(tmp_path, tokenizer, model_folder):
    path = write(tmp_path / "a.jsonl", [{"text": f"x{i}", "label": "aab"[i % 3]} for i in range(30)])
    found = []
    for weights in ("{a: 0.01, b: 0.03}", "{a: 1, b: 3}"):
        config = settings(model_folder, "--sft.task", "classify", "--data", path, "--data.validation", "none", "--sft.class_weights", weights)
        train, *_ = SFT.read_labeled(config, tokenizer, None)
        found.append([text.weights[-1] for text in train])
    assert found[0] == pytest.approx(found[1]) and math.isclose(sum(found[0]), 30) and math.isclose(max(found[0]) / min(found[0]), 3)


def test_dry_run_shows_texts_and_labels(label_flags, capsys):
    SFT.main([*label_flags, "--dry-run"])
    shown = capsys.readouterr().out
    assert sum(f"{text} [[{label}]]" in shown for text, label in labeled_texts(8)) == 3 and "tokens per text: median" in shown


def test_a_transformers_model_learns_labels(label_flags, tmp_path, tokenizer):
    config = transformers.GPTNeoXConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    TOKENIZER.save(tokenizer, tmp_path / "neox")
    flags = in_file(tmp_path / "own.yaml", [*label_flags, "--model", tmp_path / "neox"], SFT, "sft")
    result = SFT.main([*flags, "--max-steps", "30", "--out", str(tmp_path / "out")])
    assert result.after["loss"] < result.before["loss"] - 0.2
    texts = [text for text, _ in labeled_texts(5, seed=9)]
    theirs = transformers.pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)(texts)
    ours = INFER.classify(MODEL.load(tmp_path / "out"), tokenizer, texts)
    for shares, expected in zip(ours, theirs, strict=True):
        named = dict(zip(["fox", "hill", "owl"], shares, strict=True))
        assert named == pytest.approx({answer["label"]: answer["score"] for answer in expected}, abs=1e-4)
    more = SFT.main([*flags, "--model", str(tmp_path / "out"), "--max-steps", "2", "--out", str(tmp_path / "more")])
    assert math.isclose(more.before["loss"], result.after["loss"], rel_tol=1e-3)
    with pytest.raises(UserError, match="its new head cannot join an adapter"):
        SFT.main([*flags, "--lora.r", "2", "--out", str(tmp_path / "no")])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_label_adapter_works_here_and_in_peft(kind, label_flags, tmp_path, tokenizer, capsys):
    from peft import AutoPeftModelForSequenceClassification

    body = scorer(kind, tokenizer)
    MODEL.save(MODEL.build(dataclasses.replace(body.config, labels=None, num_labels=1), seed=1), tmp_path / "base")
    TOKENIZER.save(tokenizer, tmp_path / "base")
    flags = [*label_flags, "--model", str(tmp_path / "base")]
    result = SFT.main([*flags, "--lora.r", "4", "--max-steps", "40", "--out", str(tmp_path / "adapter")])
    assert result.after["loss"] < result.before["loss"] - 0.1
    texts = [text for text, _ in labeled_texts(5, seed=9)]
    ours = MODEL.load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert ours.config.labels == ["fox", "hill", "owl"]
    expected = torch.tensor(INFER.classify(ours, tokenizer, texts))
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    theirs.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        logits = theirs(**tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-4, rtol=1e-4)
    SFT.main(["--merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert "scores differ by at most" in capsys.readouterr().err
    torch.testing.assert_close(torch.tensor(INFER.classify(MODEL.load(tmp_path / "merged"), tokenizer, texts)), expected, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- whole commands


def gpt2_folder(folder):
    """A tiny folder like gpt2 on the hub: the files of transformers, vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir()
    raw = ByteLevelBPETokenizer()
    raw.train_from_iterator([text for text, _ in labeled_texts(50)], vocab_size=300, special_tokens=["<|endoftext|>"])
    raw.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "model_max_length": 64}')
    end = raw.token_to_id("<|endoftext|>")
    config = transformers.GPT2Config(vocab_size=raw.get_vocab_size(), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def command(folder, script, *words):
    process = launch(folder, ROOT / script, *words)
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return out


def test_the_commands_for_classification(tmp_path):
    gpt2_folder(tmp_path / "gpt2")
    write(tmp_path / "sms_spam.tsv", [{"Label": label, "SMS": text} for text, label in labeled_texts(300)])
    command(tmp_path, *"SFT.py --model gpt2 --data sms_spam.tsv --sft.task classify".split())
    report = json.loads((tmp_path / "out" / "sft" / "result.json").read_text())
    assert report["measure"] == "accuracy" and report["after"]["loss"] < report["before"]["loss"] - 0.1
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "out" / "sft"))
    assert {answer["label"] for answer in pipe(["the fox", "a hill"])} <= {"fox", "hill", "owl"}


def test_the_commands_for_alpaca_with_adapters(tmp_path):
    gpt2_folder(tmp_path / "gpt2-xl")
    write(tmp_path / "alpaca_data.json", [{"instruction": f"Say {label} {number}.", "input": "", "output": text} for number, (text, label) in enumerate(labeled_texts(40))])
    command(tmp_path, *"SFT.py --model gpt2-xl --data alpaca_data.json --lora.r 16".split())
    report = json.loads((tmp_path / "out" / "sft" / "result.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"]
    assert json.loads((tmp_path / "out" / "sft" / "adapter_config.json").read_text())["r"] == 16
    assert command(tmp_path, *"INFER.py --model gpt2-xl --adapter out/sft --prompt hello --temperature 0 --max-new-tokens 3".split())


def test_two_processes_fine_tune_like_one(flags, label_flags, tmp_path):
    """Full, LoRA, sharded and label training: two processes with 4 rows equal one that accumulates twice 4."""
    some = ["--max-steps", "4", "--training.logging_steps", "1", "--sft.eval_answers", "5", "--training.sample_tokens", "2"]
    kinds = {"full": flags, "lora": [*flags, "--lora.r", "4"], "sharded": [*flags, "--lora.r", "4", "--training.fsdp", "true"],
             "labels": [*label_flags, "--batch-size", "4"], "label-lora": [*label_flags, "--batch-size", "4", "--lora.r", "4"]}
    runs = {name: in_file(tmp_path / f"run-{name}.yaml", [*kind, *some, "--out", tmp_path / name], SFT, "sft") for name, kind in kinds.items()}
    two_processes(tmp_path, {"SFT": list(runs.values())})
    for name, argv in runs.items():
        single = tmp_path / f"{name}-single"
        SFT.main([*argv, "--training.fsdp", "false", "--grad-accum", "2", "--out", str(single)])
        logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (tmp_path / name, single)]
        for key in ("loss", "grad_norm"):
            values = [[record[key] for record in log if key in record] for log in logs]
            assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], abs=2e-5), (name, key)
        results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / name, single)]
        for when in ("before", "after"):
            assert results[0][when] == pytest.approx(results[1][when], rel=1e-4), name
        file = "adapter_model.safetensors" if "lora" in name or name == "sharded" else "model.safetensors"
        two, alone = load_file(tmp_path / name / file), load_file(single / file)
        assert set(two) == set(alone)
        for key in two:
            torch.testing.assert_close(two[key], alone[key], atol=5e-5, rtol=0, msg=f"{name} {key}")


# ------------------------------------------------------------------------------------- errors overwrite nothing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_failing_run_overwrites_nothing(flags, tmp_path, model_folder):
    few = ["--max-steps", "1", "--sft.eval_answers", "0", "--training.sample_tokens", "0"]
    SFT.main([*flags, *few, "--lora.r", "2", "--out", str(tmp_path / "out")])
    before = contents(tmp_path / "out")
    bad = write(tmp_path / "bad.jsonl", [{"messages": TURNS[:1]}])
    for wrong in (["--data", str(tmp_path / "nope.jsonl")], ["--data", str(bad)], ["--lora.r", "2", "--lora.target_modules", "zz"], ["--model", str(tmp_path / "no")]):
        with pytest.raises(UserError):
            SFT.main([*flags, *few, *wrong, "--overwrite", "--out", str(tmp_path / "out")])
        assert contents(tmp_path / "out") == before
    base = contents(model_folder)
    for wrong in (["--out", str(model_folder)], ["--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "out")],
                  ["--merge", str(tmp_path / "out"), "--out", str(model_folder)], ["--merge", str(tmp_path / "out"), "--out", str(tmp_path / "out")]):
        start = [] if "--merge" in wrong else [*flags, *few]
        with pytest.raises(UserError, match="is an input of the run"):
            SFT.main([*start, *wrong, "--overwrite"])
    assert contents(model_folder) == base and contents(tmp_path / "out") == before
    SFT.main([*flags, *few, "--overwrite", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "adapter_config.json").exists() and (tmp_path / "out" / "model.safetensors").exists()


REFUSED = {
    "fresh weights": (["--model.preset", "llama-1m"], "model.preset: fine-tuning starts from a trained model"),
    "no adapter": (["--lora.use_dora", "true"], "lora.use_dora: needs an adapter; set lora.r"),
    "unknown layer": (["--lora.r", "2", "--lora.target_modules", "[q_proj, nonsense]"], "lora.target_modules: 'nonsense' is not a layer"),
    "muon": (["--lora.r", "2", "--lora.loraplus_lr_ratio", "4", "--training.optim", "muon"], "lora.loraplus_lr_ratio: has no effect with training.optim muon"),
    "nothing to choose by": (["--data.validation", "none", "--sft.eval_answers", "0", "--training.sample_tokens", "0", "--training.load_best_model_at_end", "true"],
                             "training.load_best_model_at_end: needs held-out data"),
    "two actions": (["--dry-run", "--merge", "x"], "--merge and --dry-run: cannot be combined with other actions"),
    "a lost adapter": (["--adapter", "./nowhere"], "--adapter: folder not found: './nowhere'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_combinations_are_errors(name, flags, tmp_path):
    more, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        SFT.main([*(flags[2:] if "--model.preset" in more else flags), *more, "--max-steps", "1", "--out", str(tmp_path / "out")])


def test_merging_needs_a_folder_and_a_resumed_adapter_keeps_its_rank(flags, tmp_path):
    few = [*flags, "--max-steps", "2", "--sft.eval_answers", "0", "--training.sample_tokens", "0", "--out", str(tmp_path / "lora")]
    SFT.main([*few, "--lora.r", "4"])
    with pytest.raises(UserError, match="--merge: needs a folder for the merged model; set --out"):
        SFT.main(["--merge", str(tmp_path / "lora")])
    with pytest.raises(UserError, match="lora.r: 2 differs from 4 in .*adapter cannot change on resume"):
        SFT.main([*few, "--lora.r", "2", "--resume", "auto"])


def test_an_adapter_keeps_its_settings_and_its_base_may_move(flags, tmp_path, model_folder, capsys):
    import shutil

    few = ["--max-steps", "2", "--sft.eval_answers", "0", "--training.sample_tokens", "0"]
    shutil.copytree(model_folder, tmp_path / "base")
    flags = [*flags, "--model", str(tmp_path / "base")]
    SFT.main([*flags, *few, "--lora.r", "2", "--out", str(tmp_path / "adapter")])
    with pytest.raises(UserError, match="lora.lora_alpha: .* has its own value; leave this out"):
        SFT.main([*flags, *few, "--adapter", str(tmp_path / "adapter"), "--lora.lora_alpha", "99", "--out", str(tmp_path / "more")])
    with pytest.raises(UserError, match="lora.r: 4 differs from 2 in .*; architecture, tokenizer and adapter cannot change on resume"):
        SFT.main([*flags, *few, "--lora.r", "4", "--resume", "auto", "--out", str(tmp_path / "adapter")])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="folder not found"):
        SFT.main(["--merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    SFT.main(["--merge", str(tmp_path / "adapter"), "--model", str(tmp_path / "moved"), "--out", str(tmp_path / "merged")])
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(MODEL.load(tmp_path / "merged")(ids).logits, MODEL.load(tmp_path / "moved", adapter=tmp_path / "adapter")(ids).logits, atol=1e-5, rtol=1e-5)


def test_classifiers_truncate_to_the_context_and_save_their_padding(label_flags, tmp_path, tokenizer):
    MODEL.save(MODEL.build(dataclasses.replace(scorer("gpt2", tokenizer).config, labels=None, num_labels=1, max_position_embeddings=16)), tmp_path / "base")
    TOKENIZER.save(tokenizer, tmp_path / "base")
    write(tmp_path / "long.tsv", [{"label": label, "text": f"{text} {text} {text}"} for text, label in labeled_texts(60)])
    SFT.main([*label_flags, "--model", str(tmp_path / "base"), "--data", str(tmp_path / "long.tsv"), "--lora.r", "2", "--max-steps", "2", "--out", str(tmp_path / "adapter")])
    SFT.main(["--merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id
    with pytest.raises(UserError, match="model.name: .*adapter is an adapter; train it with --model .*base --adapter .*adapter"):
        SFT.main([*label_flags, "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "more")])


def test_message_weights_and_conversations_that_start_with_the_assistant(tokenizer):
    chat = chat_tokenizer(tokenizer)

    def trained_text(messages):
        sample = SFT.Sample("x", {"messages": messages}, chat, SFT.SFTSection())
        return chat.decode([i for i, w in zip(sample.ids, sample.weights, strict=True) if w])

    assert trained_text([TURNS[0], {**TURNS[1], "weight": 0}, TURNS[0], {"role": "assistant", "content": "It rains."}]) == "It rains.<|im_end|>"
    assert trained_text([{"role": "assistant", "content": "Hello."}, *TURNS]) == "Hello.<|im_end|>The fox.<|im_end|>"
    last = SFT.Sample("x", {"messages": [*TURNS, TURNS[0], {**TURNS[1], "weight": 0}]}, chat, SFT.SFTSection(last_turn_only=True))
    assert not last.has_targets()
    both = SFT.Sample("x", {"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]}, chat, SFT.SFTSection(train_on_prompt=True))
    assert "The fox." not in chat.decode([i for i, w in zip(both.ids, both.weights, strict=True) if w][: -len(both.turns[1]) - 3])
    with pytest.raises(UserError, match="message 2: weight 0.5 must be 0 or 1"):
        trained_text([TURNS[0], {**TURNS[1], "weight": 0.5}])


def test_convert_does_not_overwrite_files_or_drop_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": TURNS}])
    with pytest.raises(UserError, match="a.jsonl exists; replace it with --overwrite"):
        SFT.main(["--convert", "--data", str(path), "--out", str(path)])
    with pytest.raises(UserError, match="labeled texts are not converted"):
        SFT.main(["--convert", "--data", str(write(tmp_path / "l.tsv", [{"text": "a", "label": "b"}])), "--out", str(tmp_path / "o.jsonl")])


def peft_folder(base, folder, **options):
    """Save a random adapter with peft; returns its model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def served(base, adapter):
    """The model as INFER.py loads it."""
    return INFER.configure_for_hardware(MODEL.load(base, adapter=adapter), "cpu", quiet=True)


@pytest.mark.parametrize("options", [dict(target_modules=["embed_tokens", "q_proj"]), dict(target_modules=["lm_head", "q_proj"]),
                                     dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), dict(target_modules=["q_proj"], lora_bias=True), dict(target_modules=["q_proj", "up_proj"])])
def test_adapters_on_tied_embeddings_compute_as_in_peft(options, tmp_path):
    """An adapter merged into a tied embedding would change the head as well."""
    config = MODEL.ModelConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True,
                               initializer_range=0.2)
    MODEL.save(MODEL.build(config), tmp_path / "base")
    theirs = peft_folder(tmp_path / "base", tmp_path / "adapter", **options)
    ids = torch.arange(20).view(2, 10)
    try:
        model = served(tmp_path / "base", tmp_path / "adapter")
    except UserError as error:
        assert "\n" not in str(error) and "up_proj" not in options["target_modules"]
        return
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert (model.adapter is None) == ("up_proj" in options["target_modules"])  # ordinary adapters are merged


def test_pickled_and_unsupported_adapters(model_folder, tmp_path):
    from safetensors.torch import load_file

    theirs = peft_folder(model_folder, tmp_path / "adapter", target_modules=["q_proj"])
    torch.save(load_file(tmp_path / "adapter/adapter_model.safetensors"), tmp_path / "adapter/adapter_model.bin")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(served(model_folder, tmp_path / "adapter")(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    for key, value in (("layer_replication", [[0, 1], [0, 1]]), ("alora_invocation_tokens", [3, 4])):
        raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/adapter_config.json").write_text(json.dumps({**raw, key: value}))
        with pytest.raises(UserError, match=f"other/adapter_config.json: {key} is not supported"):
            MODEL.load(model_folder, adapter=tmp_path / "other")


def test_a_merged_model_has_the_dtype_of_its_base(model_folder, tokenizer, tmp_path):
    from safetensors.torch import load_file

    MODEL.save(MODEL.load(model_folder).to(torch.bfloat16), tmp_path / "base")
    TOKENIZER.save(tokenizer, tmp_path / "base")
    peft_folder(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    SFT.main(["--merge", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "merged")])
    merged, base = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {name for name in base if "q_proj.weight" in name}


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_on_separate_experts_of_transformers_4(rslora, tmp_path):
    """Each expert has a separate pair A, B. Adapters that peft converts to another function are refused."""
    from safetensors.torch import save_file

    knobs = dict(vocab_size=60, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
                 num_experts_per_tok=2, initializer_range=0.2)
    torch.manual_seed(2)
    whole = transformers.MixtralForCausalLM(transformers.MixtralConfig(**knobs)).eval()
    whole.save_pretrained(tmp_path / "base")
    state: dict = {}

    def product(stem: str, out: int, into: int) -> torch.Tensor:
        low, high = torch.randn(2, into) * 0.3, torch.randn(out, 2) * 0.3
        state[f"base_model.model.{stem}.lora_A.weight"], state[f"base_model.model.{stem}.lora_B.weight"] = low, high
        return high @ low * (6 / 2)

    with torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            for e in range(3):
                stem = f"model.layers.{i}.block_sparse_moe.experts.{e}"
                layer.mlp.experts.gate_up_proj[e] += torch.cat((product(f"{stem}.w1", 24, 32), product(f"{stem}.w3", 24, 32)))
                layer.mlp.experts.down_proj[e] += product(f"{stem}.w2", 32, 24)
            layer.self_attn.q_proj.weight += product(f"model.layers.{i}.self_attn.q_proj", 32, 32)
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "base"), "r": 2, "lora_alpha": 6, "use_rslora": rslora,
        "target_modules": ["w1", "w3", "w2", "q_proj"]}))
    if rslora:
        with pytest.raises(UserError, match="adapter: this adapter has a layer per expert, which is not supported; merge it"):
            served(tmp_path / "base", tmp_path / "adapter")
        return
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(served(tmp_path / "base", tmp_path / "adapter")(ids).logits, whole(ids).logits, atol=1e-4, rtol=1e-4)


def test_merging_a_folder_without_an_adapter_is_an_error(model_folder, tmp_path):
    with pytest.raises(UserError, match="--merge: .* is not the folder of an adapter"):
        SFT.main(["--merge", str(model_folder), "--out", str(tmp_path / "out")])
