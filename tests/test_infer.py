"""INFER.py against transformers, a slow sampler and direct forward passes."""

import copy
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, foreign_tokenizer, launch, make_text, saved_adapter
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import INFER
import MODEL
import TOKENIZER
from INFER import Detokenizer, Sampling, generate, stream
from MODEL import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ["The red fox", "Rain fell on every tree near the two blue lakes while one old owl saw the hill.", "", "A small", "owl 42 \u00e9"]


@pytest.fixture(scope="module")
def model(model_folder):
    return MODEL.load(model_folder)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [TOKENIZER.encode_prompt(tokenizer, text) for text in TEXTS]


@pytest.fixture(scope="module")
def chat_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def greedy(**options):
    return Sampling(**{"temperature": 0, "max_new_tokens": 24, **options})


def one(model, prompt, sampling, tokenizer=None, **options):
    return generate(model, [prompt], sampling, tokenizer, **options)[0][0]


@torch.no_grad()
def next_logits(model, ids):
    """Oracle: a full forward pass over one sequence."""
    return model(torch.tensor([ids])).logits[0, -1].float()


@torch.no_grad()
def logprobs_of(model, prompt, ids, temperature=1.0):
    """Oracle: log_softmax(logits / temperature) at the chosen ids."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def text_after(tokenizer, prompt, ids):
    """Oracle: decode the prompt with the completion, and remove the text of the prompt."""
    ids = [i for i in ids if i != tokenizer.eos_token_id]
    return tokenizer.decode(prompt + ids, skip_special_tokens=True)[len(tokenizer.decode(prompt, skip_special_tokens=True)) :]


# -------------------------------------------------------------------------------------------------- generation


def test_greedy_equals_argmax_of_full_forward_passes(model, prompts):
    """The reference for the tests below: argmax of a full forward pass for each token."""
    for prompt in prompts:
        ids = []
        while len(ids) < 12 and ids[-1:] != model.config.eos_ids:
            ids.append(int(next_logits(model, prompt + ids).argmax()))
        assert one(model, prompt, greedy(max_new_tokens=12)).ids == ids


SAMPLINGS = [greedy(max_new_tokens=16), Sampling(seed=5, max_new_tokens=16), Sampling(seed=6, top_p=0.9, top_k=40, max_new_tokens=16)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "truncated"])
def test_ids_do_not_depend_on_cache_batch_size_or_streaming(sampling, model, tokenizer, prompts, monkeypatch):
    expected = [completions[0] for completions in generate(model, prompts, sampling, tokenizer)]
    for options in ({"use_cache": False}, {"batch_size": 2}, {"batch_size": 3, "use_cache": False}, {"batch_size": 1}):
        assert [a[0] for a in generate(model, prompts, sampling, tokenizer, **options)] == expected
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], sampling, tokenizer, first=i)[0][0] == expected[i]
        assert "".join(stream(model, tokenizer, prompt, sampling)) == one(model, prompt, sampling, tokenizer).text
        assert expected[i].text == text_after(tokenizer, prompt, expected[i].ids)
    monkeypatch.setattr(INFER, "STEP_TOKENS", 5)
    assert [a[0] for a in generate(model, prompts, sampling, tokenizer)] == expected


def test_long_prompts_are_prefilled_in_chunks(model, prompts, monkeypatch):
    """The tokens of a step, and queries x keys of a chunk, have limits, which also limit the memory."""
    long = [list(range(5, 45)), list(range(60, 85))]
    expected, steps, step = generate(model, long, greedy(max_new_tokens=3)), [], MODEL.CacheStep

    def watched(cache, parts, pad):
        steps.append([(count, sequence.length + count) for sequence, count in parts])
        return step(cache, parts, pad)

    monkeypatch.setattr(MODEL, "CacheStep", watched)
    monkeypatch.setattr(INFER, "STEP_TOKENS", 12)
    monkeypatch.setattr(INFER, "STEP_SCORES", 200)
    assert generate(model, long, greedy(max_new_tokens=3)) == expected
    assert all(sum(count for count, _ in parts) <= 12 for parts in steps)
    assert all(count * end <= 200 for parts in steps for count, end in parts if end > count)
    assert len({count for parts in steps for count, _ in parts}) > 2


FAMILIES = {
    "plain": {}, "windowed": dict(sliding_window=6), "some windows": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "latent": dict(kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4),
    "learned positions": dict(position_embedding_type="learned"),
}


def requests(count, seed=0):
    """Prompts that sometimes share a prefix, each with its own completion length."""
    random = np.random.default_rng(seed)
    common = random.integers(5, 90, 20).tolist()
    prompts = [common[: random.integers(0, 20)] + random.integers(5, 90, random.integers(1, 12)).tolist() for _ in range(count)]
    return prompts, [greedy(max_new_tokens=int(random.integers(1, 20)), ignore_eos=True) for _ in range(count)]


def small_model(family="plain", noise=0.0):
    config = MODEL.ModelConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                               max_position_embeddings=64, **{"num_key_value_heads": 2, **FAMILIES[family]})
    model, generator = MODEL.build(config, seed=3).eval(), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data *= 3  # far from ties
        weight.data += noise * weight.data.std() * torch.randn(weight.shape, generator=generator)
    return model


def drafter_for(kind, family="plain"):
    """PromptLookup with 1-grams, which also finds repetitions in random tokens, or a draft model that is often right."""
    return {"none": lambda: None, "lookup": lambda: INFER.PromptLookup(3, size=1),
            "model": lambda: INFER.DraftModel(small_model(family, 0.1), 3, 30, 4)}[kind]()


PAGES = [(4, 16, True, "none"), (4, 16, False, "lookup"), (1, 60, True, "model"), (64, 5, False, "none"), (16, 200, True, "lookup"),
         (64, 8, False, "model")]


@functools.cache
def without_cache(family):
    return generate(small_model(family), *requests(64), use_cache=False)


# Three families per page setting, and three or four page settings per family.
@pytest.mark.parametrize("family, page, pages, reuse, drafts", [
    (family, *pages) for i, pages in enumerate(PAGES) for k, family in enumerate(FAMILIES) if (2 * i + k) % 5 in (0, 2, 3)])
def test_64_requests_equal_generation_without_a_cache(family, page, pages, reuse, drafts):
    """Requests join, finish, share pages, have drafts, are prefilled in chunks, and are preempted when pages run out."""
    model = small_model(family)
    prompts, samplings = requests(64)
    engine = INFER.Engine(model, 8, pages, page, tokens=16, reuse=reuse, drafter=drafter_for(drafts, family))
    rows = [row for [row] in INFER._make_rows(model, prompts, samplings, None, 0)]
    preempted, preempt = [], engine.preempt
    engine.preempt = lambda row: preempted.append(row) or preempt(row)
    waiting = list(rows)
    random = np.random.default_rng(1)
    while waiting or engine.busy:
        arriving = int(random.integers(0, 6))
        engine.add(waiting[:arriving])
        waiting = waiting[arriving:]
        if engine.busy:
            engine.step()
        assert len(engine.running) <= 8
    assert [[row.completion()] for row in rows] == without_cache(family)
    assert engine.cache.available() == pages and not any(engine.cache.references)
    assert bool(preempted) == (pages * page < 80)
    if engine.drafter:
        assert 0 < engine.drafter.accepted < engine.drafter.drafted
    if drafts == "model":
        assert not engine.drafter.sequences and not any(engine.drafter.cache.references)


# Without a GPU the kernel runs in Triton's interpreter, which conftest.py enables.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def paging(monkeypatch):
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(MODEL, "reads_pages", lambda device: True)
        monkeypatch.setattr(INFER, "can_record", lambda model: True)
        # Run each recorded step again instead of replaying it.
        monkeypatch.setattr(INFER.RecordedStep, "logits", lambda model, step, tokens: model(tokens, cache=step).logits[0].float())
    yield
    MODEL._pages_kernel.cache_clear()


@pytest.mark.parametrize("heads, kv_heads, width, page, window", [(4, 4, 16, 4, None), (6, 2, 24, 64, 5), (4, 1, 32, 300, 290)])
def test_attention_follows_page_tables(heads, kv_heads, width, page, window, paging):
    generator = torch.Generator().manual_seed(0)
    lengths, pages = [1, 70, 257, 600], -(-600 // page)
    tables = torch.randperm(4 * pages, generator=generator).view(4, pages)
    key, value = torch.randn(2, kv_heads, 4 * pages * page, width, generator=generator)
    query = torch.randn(heads, 4, width, generator=generator)
    positions = torch.tensor(lengths) - 1
    found = MODEL.attend_pages(*(x.to(DEVICE) for x in (query, key, value, positions, tables)), 600, page, window).cpu()
    for row, length in enumerate(lengths):
        indices = torch.arange(max(0, length - (window or length)), length)
        slots = tables[row][indices // page] * page + indices % page
        keys, values = (states[:, slots].repeat_interleave(heads // kv_heads, 0).double() for states in (key, value))
        scores = (keys @ query[:, row, :, None].double())[..., 0] / width**0.5
        expected = (scores.softmax(-1)[:, None] @ values)[:, 0]
        torch.testing.assert_close(found[:, row].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, page, pages, drafts", [("plain", 4, 16, "lookup"), ("some windows", 64, 5, "none"),
                                                         ("latent", 16, 20, "none")])
def test_requests_with_the_paged_attention_kernel(family, page, pages, drafts, paging):
    prompts, samplings = requests(3)
    samplings = [dataclasses.replace(sampling, max_new_tokens=7) for sampling in samplings]
    expected = generate(small_model(family), prompts, samplings, use_cache=False)
    drafter = drafter_for(drafts, family)
    engine = INFER.Engine(small_model(family).to(DEVICE), 8, pages, page, tokens=16, reuse=True, drafter=drafter)
    rows = [row for [row] in INFER._make_rows(engine.model, prompts, samplings, None, 0)]
    engine.add(rows)
    while engine.busy:
        engine.step()
    assert [[row.completion()] for row in rows] == expected
    assert not any(engine.cache.references)


@pytest.mark.parametrize("scores", [2**22, 60])
@pytest.mark.parametrize("drafts", ["lookup", "model"])
def test_drafts_do_not_change_sampled_completions(drafts, scores, monkeypatch):
    """Also with penalties, biases and min_tokens, which depend on the tokens before, and with chunks too small for a draft."""
    monkeypatch.setattr(INFER, "STEP_SCORES", scores)
    model = small_model()
    prompts, _ = requests(24)
    samplings = [Sampling(max_new_tokens=20, seed=i, temperature=0.3, **more) for i, more in enumerate(
        [{}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.3}, {"frequency_penalty": 1.0}, {"logprobs": True, "n": 2},
         {"min_tokens": 6, "logit_bias": {0: 5}}] * 4)]
    drafter = drafter_for(drafts)
    found = generate(model, prompts, samplings, drafter=drafter)
    for completion, expected in zip(sum(found, []), sum(generate(model, prompts, samplings), []), strict=True):
        assert completion.ids == expected.ids
        np.testing.assert_allclose(completion.logprobs or 0, expected.logprobs or 0, atol=1e-4)
    assert 0 < drafter.accepted < drafter.drafted


def test_draft_tokens_follow_the_distribution_of_the_large_model():
    """Chi-squared test at 99.9%: the second token of 3,000 completions against its distribution by the chain rule."""
    model, prompt = small_model(), [7, 8]
    count, drafter = 3000, INFER.DraftModel(small_model(noise=0.1), 2, 40, 4)
    completions = generate(model, [prompt], Sampling(max_new_tokens=3, temperature=0.8, n=count, seed=5, ignore_eos=True),
                           drafter=drafter)[0]
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
        after = torch.stack([(model(torch.tensor([[*prompt, i]])).logits[0, -1] / 0.8).softmax(-1) for i in range(100)])
    expected = (first @ after).double().numpy() * count
    seen = np.bincount([c.ids[1] for c in completions], minlength=100)
    often = expected > 5
    seen, expected = [np.append(x[often], x[~often].sum()) for x in (seen, expected)]
    degrees = len(seen) - 1
    assert ((seen - expected) ** 2 / expected).sum() < degrees + 3.1 * math.sqrt(2 * degrees) + 7
    assert drafter.accepted > 0.3 * drafter.drafted


@pytest.mark.parametrize("width", [2, 4])
def test_beam_search_equals_transformers(width, tmp_path):
    model = small_model()
    model.config.eos_token_id = [3, 7]
    MODEL.save(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt in ([9], [20, 21, 22], list(range(10, 40))):
        found = peer.generate(torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=20,
                              do_sample=False, eos_token_id=[3, 7], pad_token_id=0)
        ends = [[i for i, token in enumerate(row) if token in (3, 7)] for row in found[:, len(prompt) :].tolist()]
        expected = [row[len(prompt) :][: end[0] + 1 if end else 20].tolist() for row, end in zip(found, ends, strict=True)]
        [completions] = generate(model, [prompt], Sampling(max_new_tokens=20, num_beams=width, n=width))
        assert [c.ids for c in completions] == expected
        assert [c.finish_reason for c in completions] == ["stop" if end else "length" for end in ends]
    for settings in (dict(n=3), dict(frequency_penalty=1), dict(logprobs=True)):
        with pytest.raises(UserError):
            Sampling(num_beams=2, **settings)


@pytest.mark.parametrize("reuse", [True, False])
def test_adapters_in_one_batch_equal_separate_runs(model_folder, tmp_path, reuse):
    """Requests with two adapters of different ranks and targets, and without an adapter. Some of them share a prompt."""
    folders = {"one": saved_adapter(model_folder, tmp_path / "one", 1),
               "v1.two": saved_adapter(model_folder, tmp_path / "two", 2, r=8, target_modules=["q_proj", "down_proj"])}
    prompts, samplings = requests(30)
    names = [[None, "one", "v1.two"][i % 3] for i in range(30)]
    prompts = [prompts[i - i % 3] if i % 4 else prompt for i, prompt in enumerate(prompts)]
    expected = [None] * 30
    for name in (None, "one", "v1.two"):
        alone = MODEL.load(model_folder, adapter=folders.get(name))
        chosen = [i for i in range(30) if names[i] == name]
        found = generate(alone, [prompts[i] for i in chosen], [samplings[i] for i in chosen], use_cache=False)
        for i, [completion] in zip(chosen, found, strict=True):
            expected[i] = completion
    model = MODEL.load(model_folder)
    MODEL.load_adapters(model, folders)
    model = INFER.configure_for_hardware(model, quiet=True)
    engine = INFER.Engine(model, 8, 24, 4, tokens=16, reuse=reuse)
    rows = [INFER._make_rows(model, [p], [s], None, 0, adapter=name)[0][0] for p, s, name in zip(prompts, samplings, names, strict=True)]
    engine.add(rows)
    while engine.busy:
        engine.step()
    assert [row.completion() for row in rows] == expected
    assert len({tuple(completion.ids) for completion in expected[:3]}) == 3
    for bad in (dict(use_dora=True), dict(modules_to_save=["lm_head"])):
        with pytest.raises(UserError, match="only plain LoRA on linear layers"):
            MODEL.load_adapters(MODEL.load(model_folder), {"bad": saved_adapter(model_folder, tmp_path / "bad", 3, **bad)})


SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.mark.parametrize("drafter", [None, INFER.PromptLookup(3, size=1)], ids=["plain", "with drafts"])
def test_structured_outputs(model, tokenizer, prompts, drafter):
    """A model with random weights follows each structure, also next to unconstrained requests and with speculative decoding."""
    forms = [{"json": SCHEMA}, {"regex": "[0-9]{3}-[a-f]{2}"}, {"choice": ["yes", "no", 'may"be']}, {"json_object": True},
             {"grammar": 'start: "<" WORD ("," WORD)? ">"\nWORD: /[a-z]{1,4}/'}, None]
    samplings = [Sampling(max_new_tokens=80, temperature=1.5, seed=i, structured_outputs=form, n=3, ignore_eos=form is None)
                 for i, form in enumerate(forms)]
    prompts = (prompts * 6)[:6]
    found = generate(model, prompts, samplings, tokenizer, drafter=drafter)
    checks = [lambda text: set(json.loads(text)) == {"name", "age"} and len(json.loads(text)["name"]) <= 8,
              lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text), lambda text: text in forms[2]["choice"],
              lambda text: text.startswith("{"), lambda text: re.fullmatch("<[a-z]{1,4}(,[a-z]{1,4})?>", text)]
    for completions, check in zip(found, checks, strict=False):
        for completion in completions:
            assert check(completion.text), completion.text
            assert completion.finish_reason == "stop" or check is checks[3]
    assert found[5] == generate(model, prompts[5:6], samplings[5], tokenizer, first=5)[0]


@pytest.mark.parametrize("drafts", ["none", "lookup"])
def test_structured_outputs_start_after_the_reasoning(model, tokenizer, prompts, drafts):
    free = one(model, prompts[0], greedy(max_new_tokens=20), tokenizer).text
    form = greedy(max_new_tokens=60, structured_outputs={"regex": "[0-9]{3}"})
    [[row]] = INFER._make_rows(model, [prompts[0]], [form], tokenizer, 0)
    row.grammar.after = mark = re.search("[a-z]{3,}", free)[0]
    assert model.config.eos_ids and not row.grammar.allowed(model.config.vocab_size)[model.config.eos_ids].any()
    for _ in INFER._steps(model, [row], True, 1, drafter_for(drafts)):
        pass
    reasoning = row.text[:-3]
    assert free.startswith(reasoning) and mark in reasoning and row.text[-3:].isdecimal() and row.finish == "stop"


@pytest.mark.parametrize("form", [{}, {"json": {}, "regex": "a"}, {"regex": 5}, {"xml": "a"}, {"json": 3}, {"choice": [1]}, {"choice": []},
                                  {"regex": "("}, {"grammar": "start: ("}, {"json": {"type": "nonsense"}}], ids=str)
def test_invalid_structured_outputs_are_one_line_errors(model, tokenizer, prompts, form):
    with pytest.raises(UserError, match="structured_outputs") as error:
        one(model, prompts[0], Sampling(structured_outputs=form), tokenizer)
    assert "\n" not in str(error.value)


def test_removing_a_row_releases_its_pages(model, prompts):
    engine = INFER.Engine(model, 2, 30, 4)
    rows = [row for [row] in INFER._make_rows(model, prompts[:3], [greedy()] * 3, None, 0)]
    engine.add(rows)
    engine.step()
    engine.remove(rows[2])  # is waiting
    engine.remove(rows[0])  # is running
    while engine.busy:
        engine.step()
    assert engine.cache.available() == 30 and len(rows[0].ids) == 1 and not rows[2].ids
    assert rows[1].completion().ids == one(model, prompts[1], greedy()).ids


def test_a_shared_prefix_is_computed_once(model):
    engine, prompt = INFER.Engine(model, 4, 40, 4, reuse=True), list(range(5, 38))
    computed = []
    for ending in ([50], [51, 52], [50]):
        [[row]] = INFER._make_rows(model, [prompt + ending], [greedy(max_new_tokens=2)], None, 0)
        engine.add([row])
        before = engine.computed
        while engine.busy:
            engine.step()
        computed.append(engine.computed - before)
        assert row.completion() == one(model, prompt + ending, greedy(max_new_tokens=2))
    assert computed == [34 + 1, 3 + 1, 2 + 1]  # 32 of the 33 shared tokens are eight full pages


def test_a_cache_too_small_for_a_prompt_or_completion(model):
    [[row], [longer]] = INFER._make_rows(model, [[5] * 6, [5] * 8], [greedy(max_new_tokens=20, ignore_eos=True)] * 2, None, 0)
    engine = INFER.Engine(model, 2, 2, 4)
    engine.add([row])
    with pytest.raises(UserError, match="a prompt of 8 tokens leaves no room for a completion in a KV cache of 8 tokens"):
        engine.add([longer])
    while engine.busy:
        engine.step()
    assert len(row.ids) == 2 and row.finish == "length"


@pytest.mark.parametrize("use_cache", [True, False])
def test_streamed_text_equals_the_completion(use_cache, model, tokenizer, prompts):
    parts = list(stream(model, tokenizer, prompts[0], greedy(), use_cache))
    assert len(parts) > 3 and "".join(parts) == one(model, prompts[0], greedy(), tokenizer).text


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_several_completions_per_prompt(batch_size, model, tokenizer, prompts):
    sampling = Sampling(n=3, seed=4, max_new_tokens=8)
    groups = generate(model, prompts, sampling, tokenizer, batch_size=batch_size)
    assert [len(group) for group in groups] == [3] * len(prompts)
    assert groups == generate(model, prompts, sampling, tokenizer, use_cache=False)
    for group in groups:
        assert len({tuple(completion.ids) for completion in group}) == 3
    single = generate(model, prompts, Sampling(seed=4, max_new_tokens=8), tokenizer)
    assert [group[0] for group in groups] == [group[0] for group in single]
    same = generate(model, prompts, greedy(n=3, max_new_tokens=8), tokenizer)
    assert all(group[0] == group[1] == group[2] for group in same)


def test_seeds(model, prompts):
    def ids(**options):
        return [a[0].ids for a in generate(model, prompts, Sampling(max_new_tokens=8, seed=options.pop("seed", None)), **options)]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids(seed=1, step=1) != ids(seed=1)
    assert ids(seed=1, first=1) != ids(seed=1)
    assert ids() != ids()  # without a seed, completions differ


def test_numbered_prompts_do_not_depend_on_the_call(model, prompts):
    sampling = Sampling(seed=5, max_new_tokens=12)
    forward = generate(model, prompts, sampling)
    last_two = generate(model, prompts[3:], sampling, first=3)
    first_three = generate(model, prompts[:3], sampling, first=0)
    assert first_three + last_two == forward


def test_completions_do_not_depend_on_settings_of_other_requests(model, tokenizer, prompts):
    samplings = [greedy(), Sampling(seed=1, max_new_tokens=20), Sampling(seed=2, top_k=5, max_new_tokens=9),
                 Sampling(seed=3, repetition_penalty=1.5, temperature=1.3, max_new_tokens=20, logprobs=True),
                 Sampling(seed=4, top_p=0.5, frequency_penalty=0.4, n=2, max_new_tokens=20)]
    together = generate(model, prompts, samplings, tokenizer)
    alone = [generate(model, [p], s, tokenizer, first=i)[0] for i, (p, s) in enumerate(zip(prompts, samplings))]
    for a, b in zip(together, alone):
        assert [x._replace(logprobs=None) for x in a] == [x._replace(logprobs=None) for x in b]
    assert [g[0].logprobs is not None for g in together] == [False, False, False, True, False]
    np.testing.assert_allclose(together[3][0].logprobs, alone[3][0].logprobs, atol=1e-4)


def test_greedy_equals_transformers(model, model_folder, prompts):
    theirs = AutoModelForCausalLM.from_pretrained(model_folder)
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                              max_new_tokens=24, pad_token_id=0)
        assert one(model, prompt, greedy()).ids == out[0, len(prompt) :].tolist()


def test_training_mode_is_restored(model_folder, prompts):
    model = MODEL.load(model_folder).train()
    generate(model, prompts[:1], greedy(max_new_tokens=2))
    assert model.training
    generate(model.eval(), prompts[:1], greedy(max_new_tokens=2))
    assert not model.training


# ------------------------------------------------------------------------------------- the end of a completion


def without_eos():
    """Sampling that ignores end-of-text tokens."""
    return greedy(max_new_tokens=20, ignore_eos=True)


def test_max_new_tokens_and_the_context(model, tokenizer, prompts):
    for count in (1, 7):
        completion = one(model, prompts[0], greedy(max_new_tokens=count, ignore_eos=True))
        assert len(completion.ids) == count and completion.finish_reason == "length"
    context = model.config.max_position_embeddings
    long = (prompts[1] * 20)[: context - 3]
    for use_cache in (True, False):
        completion = one(model, long, greedy(max_new_tokens=50, ignore_eos=True), use_cache=use_cache)
        assert len(completion.ids) == 3 and completion.finish_reason == "length"
    with pytest.raises(UserError, match=f"{context} tokens.*{context}"):
        one(model, (prompts[1] * 20)[:context], greedy())
    with pytest.raises(UserError, match="at least one token"):
        one(model, [], greedy())


def test_several_end_tokens_from_generation_config(model, model_folder, tokenizer, prompts, tmp_path):
    free = one(model, prompts[0], without_eos()).ids
    index = next(i for i in range(3, 20) if free[i] not in free[:i])
    shutil.copytree(model_folder, tmp_path / "m")
    config = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [tokenizer.eos_token_id, free[index]]}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(config))
    ending = MODEL.load(tmp_path / "m")
    first_end = min(free.index(i) for i in config["eos_token_id"] if i in free)
    completion = one(ending, prompts[0], greedy(), tokenizer)
    assert completion.ids == free[: first_end + 1] and completion.finish_reason == "stop"
    assert completion.text == text_after(tokenizer, prompts[0], free[:first_end])  # the text does not contain the end token
    assert "".join(stream(ending, tokenizer, prompts[0], greedy())) == completion.text
    endless = one(ending, prompts[0], without_eos(), tokenizer)
    assert endless.ids == free and endless.finish_reason == "length"


@pytest.fixture(scope="module")
def free_completion(model, tokenizer, prompts):
    """A completion long enough to choose stop strings from."""
    return one(model, prompts[0], Sampling(seed=3, max_new_tokens=50, ignore_eos=True, temperature=1.0), tokenizer)


def stopping(stop):
    return Sampling(seed=3, max_new_tokens=50, ignore_eos=True, temperature=1.0, stop=stop)


@pytest.mark.parametrize("start", [0, 9, 25, 40])
@pytest.mark.parametrize("width", [1, 7])
def test_stop_strings(start, width, model, tokenizer, prompts, free_completion):
    start = next(i for i in range(start, len(free_completion.text)) if "\ufffd" not in free_completion.text[i : i + width])
    stop = free_completion.text[start : start + width]
    expected = free_completion.text[: free_completion.text.find(stop)]
    completion = one(model, prompts[0], stopping([stop, "never there"]), tokenizer)
    assert completion.text == expected and completion.finish_reason == "stop"
    assert completion.ids == free_completion.ids[: len(completion.ids)]
    assert stop in text_after(tokenizer, prompts[0], completion.ids)
    assert stop not in text_after(tokenizer, prompts[0], completion.ids[:-1])  # generation stops at the first possible token
    so_far = ""
    for part in stream(model, tokenizer, prompts[0], stopping([stop])):
        so_far += part
        assert part and expected.startswith(so_far), "part of a stop string was streamed"
    assert so_far == expected


def test_the_earliest_stop_string_wins(model, tokenizer, prompts, free_completion):
    stops = [free_completion.text[30:33], free_completion.text[12:15], free_completion.text[20:26]]
    expected = free_completion.text[: min(free_completion.text.find(stop) for stop in stops)]
    assert one(model, prompts[0], stopping(stops), tokenizer).text == expected


def test_a_partial_stop_string_is_released_at_the_end(model, tokenizer, prompts, free_completion):
    text = free_completion.text
    stops = [text[8:14] + "\0", text[-4:] + "\0", text[-1] + "x\0"]
    completion = one(model, prompts[0], stopping(stops), tokenizer)
    assert completion.text == text and completion.finish_reason == "length"
    assert "".join(stream(model, tokenizer, prompts[0], stopping(stops))) == text
    with pytest.raises(ValueError, match="tokenizer"):
        one(model, prompts[0], stopping(["x"]))


def test_the_start_of_a_stop_string_is_withheld(tokenizer):
    """With one character per token: text that may start the stop string is released only when it no longer matches."""
    byte = TOKENIZER.train([], 0, "byte")
    row = INFER.Row([0], Sampling(stop=["END"], max_new_tokens=99), (0,), byte, [], 999)
    released = []
    for token in byte("E ENx ENEND tail", add_special_tokens=False).input_ids:
        if row.finish:
            break
        row.accept(token, None)
        released.append(row.text[: row.settled])
    assert released == ["", "E ", "E ", "E ", "E ENx", "E ENx ", "E ENx ", "E ENx ", "E ENx EN", "E ENx EN", "E ENx EN"]
    assert row.finish == "stop" and row.completion().text == "E ENx EN"


# ---------------------------------------------------------------------------------------------- detokenization


@pytest.mark.parametrize("prompt", ["", "a", "\U0001f469\u200d\U0001f680\U0001f600"])
def test_characters_of_several_tokens_are_not_split(prompt):
    tokenizer = TOKENIZER.train([], 0, "byte")
    text = "h\u00e9llo \U0001f469\u200d\U0001f680 \u65e5\u672c!\n"
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt).input_ids)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = [detokenizer.push(token) for token in ids]
    assert "".join(parts) + detokenizer.flush() == text and not any("\ufffd" in part for part in parts)
    assert len(ids) == len(text.encode()) and sum(map(bool, parts)) == len(text)


def test_an_incomplete_character_is_flushed_at_the_end():
    tokenizer = TOKENIZER.train([], 0, "byte")
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("ab\U0001f600", add_special_tokens=False).input_ids[:-1]
    assert "".join(detokenizer.push(token) for token in ids) == "ab"
    assert set(detokenizer.flush()) == {"\ufffd"}


def test_random_bytes_equal_decoding_in_one_call():
    tokenizer = TOKENIZER.train([], 0, "byte")
    rng = np.random.default_rng(0)
    for _ in range(40):
        prompt = tokenizer("x").input_ids
        ids = rng.integers(5, 261, 30).tolist()
        detokenizer = Detokenizer(tokenizer, prompt)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "bpe", "char"])
def test_spaces_between_words_are_kept(kind):
    """Metaspace drops the first space of a text and WordPiece joins tokens, so decoding depends on the prompt before."""
    texts = make_text(200)
    tokenizer = TOKENIZER.train(texts, 330, kind) if kind in TOKENIZER.KINDS else foreign_tokenizer(kind, texts)
    whole = tokenizer("The red fox ran over a hill and one owl saw it.", add_special_tokens=False).input_ids
    for cut in range(1, len(whole)):
        detokenizer = Detokenizer(tokenizer, whole[:cut])
        text = "".join(detokenizer.push(token) for token in whole[cut:]) + detokenizer.flush()
        assert text == text_after(tokenizer, whole[:cut], whole[cut:])


def test_generated_emoji_are_not_split(model_folder):
    """A byte-level model, streamed: no part ends inside a character."""
    tokenizer = TOKENIZER.train([], 0, "byte")
    config = MODEL.ModelConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                               num_attention_heads=2, initializer_range=1.0, max_position_embeddings=128)
    model = MODEL.build(config, seed=0).eval()
    prompt = tokenizer("\U0001f600").input_ids
    sampling = Sampling(seed=0, max_new_tokens=100, temperature=1.5)
    completion = one(model, prompt, sampling, tokenizer)
    parts = list(stream(model, tokenizer, prompt, sampling))
    assert "".join(parts) == completion.text == text_after(tokenizer, prompt, completion.ids)
    assert completion.text != completion.text.encode().decode("ascii", "ignore")


# ----------------------------------------------------------------------------------------------------- sampler

VOCABULARY = 40
PROMPT, COMPLETION = [1, 2, 3, 3, 39], [3, 7, 7, 7, 12]


def some_logits(seed=0):
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def row(sampling, uniform, prompt=PROMPT, ids=COMPLETION):
    return SimpleNamespace(sampling=sampling, prompt=list(prompt), ids=list(ids), grammar=None, uniform=lambda index: uniform)


def sample(logits, rows):
    return INFER.Sampler(rows, logits.shape[1], "cpu")(logits)


def sampled_distribution(logits, sampling, count=2000):
    """The distribution of `sample`: evenly spaced random numbers draw each token in proportion to its probability."""
    rows = [row(sampling, (k + 0.5) / count) for k in range(count)]
    chosen, *_ = sample(logits.expand(count, -1).clone(), rows)
    return np.bincount(chosen, minlength=VOCABULARY) / count


def slow_distribution(logits, s):
    """Oracle with Python floats: penalties, temperature, top-k, then top-p, then min-p."""
    values = {i: float(v) for i, v in enumerate(logits)}
    for i in values:
        if i in PROMPT + COMPLETION and s.repetition_penalty != 1:
            values[i] = values[i] / s.repetition_penalty if values[i] > 0 else values[i] * s.repetition_penalty
        if i in COMPLETION:
            values[i] -= s.presence_penalty + s.frequency_penalty * COMPLETION.count(i)
    weights = {i: math.exp(v / s.temperature) for i, v in values.items()}
    ranked = sorted(weights, key=lambda i: -weights[i])
    if s.top_k:
        ranked = ranked[: s.top_k]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= s.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= s.min_p * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(VOCABULARY)])


SETTINGS = [
    dict(temperature=1.0), dict(temperature=0.5), dict(temperature=1.7), dict(top_k=1), dict(top_k=5), dict(top_k=1000),
    dict(top_p=0.1), dict(top_p=0.8), dict(top_p=0.99), dict(min_p=0.05), dict(min_p=0.5), dict(min_p=1.0),
    dict(repetition_penalty=1.4), dict(repetition_penalty=0.6), dict(presence_penalty=1.5), dict(presence_penalty=-1.0),
    dict(frequency_penalty=0.7), dict(frequency_penalty=-0.5), dict(top_k=12, top_p=0.7), dict(top_p=0.9, min_p=0.1),
    dict(temperature=0.7, top_k=20, top_p=0.95, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
    dict(temperature=2.5, top_k=9, top_p=0.6, min_p=0.2, repetition_penalty=1.9, presence_penalty=-0.4, frequency_penalty=0.8),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s))
def test_sampler_equals_a_slow_reference(settings):
    sampling = Sampling(**{"temperature": 1.0, **settings})
    expected, found = slow_distribution(some_logits(), sampling), sampled_distribution(some_logits(), sampling)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, atol=1.01 / 2000)  # one grid point


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "penalty" not in "".join(s).replace("repetition_penalty", "")],
                         ids=lambda s: "-".join(s))
def test_sampler_equals_transformers(settings):
    s = Sampling(**{"temperature": 1.0, **settings})
    processors = [RepetitionPenaltyLogitsProcessor(s.repetition_penalty), TemperatureLogitsWarper(s.temperature),
                  *([TopKLogitsWarper(s.top_k)] if s.top_k else []), *([TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []),
                  *([MinPLogitsWarper(s.min_p)] if s.min_p else [])]
    scores = LogitsProcessorList(processors)(torch.tensor([PROMPT + COMPLETION]), some_logits()[None].clone())
    np.testing.assert_allclose(sampled_distribution(some_logits(), s), scores.softmax(-1)[0].numpy(), atol=1.01 / 2000)


@pytest.mark.parametrize("settings", [dict(), dict(repetition_penalty=3.0), dict(frequency_penalty=5.0)], ids=str)
def test_greedy_takes_the_most_probable_token_after_penalties(settings):
    for seed in range(20):
        logits = some_logits(seed)
        logits[7] = logits.max() + 1  # the most probable token occurs often in the completion
        chosen, *_ = sample(logits[None].clone(), [row(Sampling(temperature=0, **settings), 0.9)])
        assert chosen == [int(slow_distribution(logits, Sampling(temperature=1, **settings)).argmax())]


def test_logit_bias_and_min_tokens(model, tokenizer, prompts):
    logits = some_logits()
    biased = [sample(logits[None].clone(), [row(Sampling(temperature=0, logit_bias={"7": bias}), 0.5)])[0][0] for bias in (100, -100)]
    assert biased == [7, int(logits.index_fill(0, torch.tensor(7), -math.inf).argmax())]
    distribution = sampled_distribution(logits, Sampling(temperature=1.0, logit_bias={3: 2.0, 5: -1.5}))
    expected = logits.clone()
    expected[3], expected[5] = expected[3] + 2, expected[5] - 1.5
    np.testing.assert_allclose(distribution, expected.softmax(-1).numpy(), atol=1.01 / 2000)
    for min_tokens in (0, 5, 12):
        ends = greedy(max_new_tokens=12, logit_bias={tokenizer.eos_token_id: 100}, min_tokens=min_tokens)
        completion = one(model, prompts[0], ends, tokenizer)
        assert len(completion.ids) == min(min_tokens + 1, 12) and completion.finish_reason == ("stop" if min_tokens < 12 else "length")
    for bad in ({"x": 1}, {1: "y"}, {1: 101}, {1: math.nan}, [1]):
        with pytest.raises(UserError):
            Sampling(logit_bias=bad)
    with pytest.raises(UserError, match="token id 10000 is outside the vocabulary of 320"):
        one(model, prompts[0], Sampling(logit_bias={10000: 1}))


def test_top_p_of_zero_is_the_most_probable_token():
    logits = some_logits()
    for uniform in (0.0, 0.5, 0.999999):
        chosen, *_ = sample(logits[None].clone(), [row(Sampling(temperature=1.0, top_p=0.0), uniform)])
        assert chosen == [int(logits.argmax())]


def test_random_numbers_close_to_0_and_1_draw_kept_tokens():
    for settings in (dict(), dict(top_k=3), dict(top_p=0.4), dict(min_p=0.3)):
        s = Sampling(temperature=1.0, **settings)
        kept = set(np.flatnonzero(slow_distribution(some_logits(), s)))
        for uniform in (0.0, 1 - 1e-16, 0.99999999):  # in float32 the last two are 1
            chosen, *_ = sample(some_logits()[None].clone(), [row(s, uniform)])
            assert chosen[0] in kept
    masked = some_logits()
    masked[-5:] = -math.inf
    chosen, *_ = sample(masked[None].clone(), [row(Sampling(temperature=1.0), 1 - 1e-16)])
    assert chosen[0] < VOCABULARY - 5


def test_a_draw_does_not_depend_on_other_rows():
    mixed = [Sampling(**{"temperature": 1.0, **settings}) for settings in SETTINGS] + [Sampling(temperature=0)]
    for k in range(12):
        uniform = (k + 0.5) / 12
        logits = torch.stack([some_logits(i) for i in range(len(mixed))])
        together, *_ = sample(logits.clone(), [row(s, uniform) for s in mixed])
        alone = [sample(logits[i : i + 1].clone(), [row(s, uniform)])[0][0] for i, s in enumerate(mixed)]
        assert together == alone


def test_sampling_does_not_modify_its_logits():
    logits = torch.stack([some_logits(0), some_logits(1)])
    before = logits.clone()
    sample(logits, [row(Sampling(repetition_penalty=2.0), 0.3), row(Sampling(temperature=0), 0.3)])
    assert torch.equal(logits, before)


def test_logprobs_equal_a_full_forward_pass(model, prompts):
    for temperature in (0, 0.6, 1.0, 1.5):
        s = Sampling(temperature=temperature, seed=2, max_new_tokens=20, logprobs=True, top_k=30, repetition_penalty=1.3)
        for prompt, [completion] in zip(prompts, generate(model, prompts, s)):
            expected = logprobs_of(model, prompt, completion.ids, temperature)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert one(model, prompts[0], greedy()).logprobs is None


@pytest.mark.parametrize("settings", [dict(top_p=1.5), dict(top_p=-0.1), dict(temperature=-1), dict(top_k=-2), dict(min_p=2),
                                      dict(max_new_tokens=0), dict(n=0), dict(repetition_penalty=0), dict(temperature=math.nan)], ids=str)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=f"inference.{next(iter(settings))}: "):
        Sampling(**settings)


# ----------------------------------------------------------------------------------------------------- scoring


def window_logprobs(model, ids):
    """Oracle: token j is scored in the window that starts at 0 or half a context before the end of the previous window."""
    context = model.config.max_position_embeddings
    step = context - context // 2
    starts = [max(0, -(-(j - context) // step)) * step for j in range(1, len(ids))]
    tables = {start: model(torch.tensor([ids[start : start + context]])).logits[0].float().log_softmax(-1) for start in set(starts)}
    return [float(tables[start][j - 1 - start, ids[j]]) for j, start in enumerate(starts, 1)]


@pytest.mark.parametrize("length", [2, 5, 127, 128, 129, 130, 192, 193, 194, 400])
@torch.no_grad()
def test_score_ids_in_windows(length, model):
    ids = torch.randint(5, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    scored = INFER.score_ids(model, ids)
    assert len(scored.logprobs) == length - 1 and scored.best is None
    np.testing.assert_allclose(scored.logprobs, window_logprobs(model, ids), atol=1e-4)


@torch.no_grad()
def test_top_logprobs_of_scored_tokens(model):
    ids = torch.randint(5, 320, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    scored = INFER.score_ids(model, ids, top=4)
    assert len(scored.best) == 199
    table = model(torch.tensor([ids[:128]])).logits[0].float().log_softmax(-1)
    for t in range(127):
        values, indices = table[t].topk(4)
        assert list(scored.best[t]) == indices.tolist()
        np.testing.assert_allclose(list(scored.best[t].values()), values, atol=1e-4)
    np.testing.assert_allclose(scored.logprobs, INFER.score_ids(model, ids).logprobs, atol=1e-5)


@torch.no_grad()
def test_score_sums_over_texts(model, tokenizer):
    texts = ["The red fox ran.", "caf\u00e9 \U0001f600", "", "x"]
    nats = tokens = 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        table = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        nats -= sum(float(table[i, ids[i + 1]]) for i in range(len(ids) - 1))
        tokens += len(ids) - 1
    size = sum(len(text.encode()) for text in texts)
    result = INFER.score(model, tokenizer, texts)
    assert (result["tokens"], result["bytes"]) == (tokens, size)
    expected = {"nats": nats, "loss": nats / tokens, "perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size}
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4)
    empty = INFER.score(model, tokenizer, [""])
    assert (empty["tokens"], empty["bytes"], empty["nats"], empty["bits_per_byte"]) == (0, 0, 0, 0)


def test_scored_texts_start_with_one_beginning_of_text_token(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.train(make_text(20), 300).backend_tokenizer, eos_token=TOKENIZER.END)
    for tok in (tokenizer, bare):
        ids = INFER.score_prompt(tok, "the fox")
        assert ids[0] == TOKENIZER.begin_id(tok) and tok.decode(ids[1:]) == "the fox"
        assert INFER.score_prompt(tok, "") == [TOKENIZER.begin_id(tok)]


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture()
def infer(monkeypatch, capsys, model_folder):
    """infer(*flags, stdin="...") -> (stdout, stderr) of one command."""

    def call(*flags, stdin="", folder=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        INFER.main(["--model", str(folder or model_folder), *map(str, flags)])
        return tuple(capsys.readouterr())

    return call


GREEDY = ("--temperature", 0, "--max-new-tokens", 12)


def completion_of(model, tokenizer, text, **options):
    """The completion by the library, which the command line has to print."""
    prompt = tokenizer(text).input_ids if text else [tokenizer.bos_token_id]
    return one(model, prompt, greedy(**{"max_new_tokens": 12, **options}), tokenizer).text


@pytest.mark.parametrize("prompt", ["The red", "", "two\nlines\n", "caf\u00e9 \U0001f600"])
def test_prompt_flag(prompt, infer, model, tokenizer):
    out, err = infer("--prompt", prompt, *GREEDY, stdin="not read")
    assert out == completion_of(model, tokenizer, prompt) + "\n"
    assert err.startswith("running on cpu (float32") and err.count("\n") == 1
    assert infer("--prompt", prompt, "--echo", *GREEDY)[0] == prompt + out
    assert infer("--prompt", prompt, "--use-cache", "false", *GREEDY)[0] == out


@pytest.mark.parametrize(("stdin", "prompt"), [("The red fox\n", "The red fox"), ("The red fox", "The red fox"), ("a\n\n", "a\n"),
                                               ("\n", ""), ("a\nb\n", "a\nb")])
def test_one_final_newline_of_a_piped_prompt_is_dropped(stdin, prompt, infer, model, tokenizer):
    assert infer(*GREEDY, stdin=stdin)[0] == completion_of(model, tokenizer, prompt) + "\n"
    assert infer("--echo", *GREEDY, stdin=stdin)[0].startswith(prompt + completion_of(model, tokenizer, prompt))


def test_empty_pipe(infer):
    with pytest.raises(UserError, match="no prompt"):
        infer()


def test_lines(infer, model, tokenizer):
    lines = ["The red", "", "owl and a longer prompt than the others", "a\\b", "rain", "tree"]
    out, _ = infer("--lines", "--batch-size", 4, *GREEDY, stdin="\r\n".join(lines[:2]) + "\n" + "\n".join(lines[2:]))
    expected = [completion_of(model, tokenizer, line).replace("\\", "\\\\").replace("\n", "\\n") for line in lines]
    assert out == "\n".join(expected) + "\n"


def test_a_line_is_completed_before_the_next_line_arrives(model_folder):
    """A program writes a line and reads its completion before it writes the next line."""
    process = launch(ROOT, "INFER.py", "--model", model_folder, "--lines", "--batch-size", 8, *GREEDY, stdin=subprocess.PIPE)
    completions = []
    for line in ("The red", "rain"):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        completions.append(process.stdout.readline())
    rest, _ = process.communicate("The red\nrain\n", timeout=60)
    assert process.returncode == 0 and all(completions) and rest == "".join(completions)


def test_items_are_grouped_and_those_before_an_error_yielded():
    def items():
        yield from range(5)
        raise UserError("bad")

    groups = []
    with pytest.raises(UserError, match="bad"):
        for group in INFER.batches(items(), 3):
            groups.append(group)
    assert groups == [[0, 1, 2], [3, 4]]


def test_sampled_lines_do_not_depend_on_the_batch_size(infer):
    flags = ("--lines", "--seed", 3, "--max-new-tokens", 8)
    lines = "".join(text + "\n" for text in make_text(7))
    outs = {infer(*flags, "--batch-size", size, stdin=lines)[0] for size in (1, 3, 8)}
    assert len(outs) == 1 and outs.pop().count("\n") == 7


@pytest.mark.parametrize("mode", ["--lines", "--jsonl"])
def test_a_batch_size_of_zero_is_rejected(mode, infer):
    with pytest.raises(UserError, match="inference.batch_size"):
        infer(mode, "--batch-size", 0, *GREEDY, stdin='{"prompt": "a"}\n')


def test_several_completions(infer, model, tokenizer):
    out, _ = infer("--prompt", "The red", "--n", 3, "--seed", 1, "--max-new-tokens", 8, "--echo")
    expected = generate(model, [tokenizer("The red").input_ids], Sampling(n=3, seed=1, max_new_tokens=8), tokenizer)[0]
    assert out == "".join(f"[{i}]\nThe red{completion.text}\n" for i, completion in enumerate(expected, 1))


def test_jsonl_records(infer, model, tokenizer):
    records = [{"prompt": "The red", "id": 7}, {"prompt": "owl", "max_tokens": 3}, {"prompt": "", "n": 2},
               {"prompt": "rain", "temperature": 0.9, "seed": 5, "logprobs": True}, {"prompt": "fox", "repetition_penalty": 2}]
    out, _ = infer("--jsonl", *GREEDY, stdin="\n\n".join(map(json.dumps, records)))
    got = [json.loads(line) for line in out.splitlines()]
    repeated = [*records[:2], records[2], *records[2:]]  # n: 2
    assert [{k: g[k] for k in r if k != "logprobs"} for g, r in zip(got, repeated)] == [
        {k: r[k] for k in r if k != "logprobs"} for r in repeated]
    assert got[0]["completion"] == completion_of(model, tokenizer, "The red")
    assert got[1]["completion"] == completion_of(model, tokenizer, "owl", max_new_tokens=3) and got[1]["finish_reason"] == "length"
    assert got[2]["completion"] == got[3]["completion"] == completion_of(model, tokenizer, "")
    assert got[5]["completion"] == completion_of(model, tokenizer, "fox", repetition_penalty=2.0)
    expected = generate(model, [tokenizer("rain").input_ids], Sampling(temperature=0.9, seed=5, max_new_tokens=12, logprobs=True),
                        tokenizer)[0][0]  # a request with its own seed gets the same completion as alone
    assert got[4]["completion"] == expected.text
    np.testing.assert_allclose(got[4]["logprobs"], expected.logprobs, atol=1e-4)
    assert "".join(got[4]["tokens"]) == tokenizer.decode(expected.ids)
    assert "logprobs" not in got[0] and "index" not in got[0] and [one["index"] for one in got[2:4]] == [0, 1]


@pytest.mark.parametrize("stop", ["\n", "###", "3", "yes", "a: b", "[INST]", ["x", "y"], "e"])
def test_jsonl_stop_strings_are_taken_literally(stop, monkeypatch):
    line = json.dumps({"prompt": "a", "stop": stop})
    _, _, sampling = INFER._record(line, "stdin:1", Sampling())
    assert sampling.stop == ([stop] if isinstance(stop, str) else stop)


@pytest.mark.parametrize(("line", "message"), [
    ("{broken", "stdin:3: not valid JSON"), ("[1]", "stdin:3: .*'prompt' or 'messages'"), ('{"text": "a"}', "stdin:3: .*'prompt'"),
    ('{"prompt": 5}', "stdin:3"), ('{"messages": []}', "stdin:3"), ('{"prompt": "a", "top_k": "many"}', "stdin:3: top_k"),
    ('{"prompt": "a", "top_p": 7}', "stdin:3.*top_p"), ('{"prompt": "a", "stop": [1]}', "stdin:3.*stop"),
])
def test_invalid_jsonl_lines(line, message, infer):
    with pytest.raises(UserError, match=message):
        infer("--jsonl", *GREEDY, stdin='{"prompt": "a"}\n\n' + line + "\n")


@pytest.mark.parametrize("messages", [["hello"], [{"role": "user"}], [5]])
def test_messages_in_a_wrong_format(messages, infer, chat_folder):
    with pytest.raises(UserError):
        infer("--jsonl", "--system", "Be kind.", *GREEDY, stdin=json.dumps({"messages": messages}), folder=chat_folder)


def test_a_prompt_longer_than_the_context(infer, model, tokenizer, capsys):
    text = " ".join(make_text(40))
    ids = tokenizer(text).input_ids
    out, err = infer("--prompt", text, *GREEDY)
    kept = [ids[0], *ids[len(ids) - (128 - 12) + 1 :]]
    assert len(ids) > 200 and len(kept) == 116
    assert out == one(model, kept, greedy(max_new_tokens=12), tokenizer).text + "\n"
    assert f"prompt truncated: dropped the first {len(ids) - 116} of {len(ids)} tokens (context 128, 12 for the completion)" in err
    out, err = infer("--prompt", text, "--temperature", 0, "--max-new-tokens", 500, "--ignore-eos")
    kept = [ids[0], *ids[len(ids) - 63 :]]  # at most half of the context is reserved for the completion
    assert "(context 128, 64 for the completion)" in err
    assert out == one(model, kept, greedy(max_new_tokens=500, ignore_eos=True), tokenizer).text + "\n"


# ------------------------------------------------------------------------------------------ chat


def chat_ids(folder, messages):
    """Oracle: transformers applies the template itself."""
    tokenizer = TOKENIZER.load(folder)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"])


def test_requests_are_parsed_like_training_records(infer, chat_folder, monkeypatch):
    """system, history and tools next to a prompt or messages mean the same as in training; messages may be a JSON text."""
    encoded, real = [], INFER._make_rows
    monkeypatch.setattr(INFER, "_make_rows", lambda model, prompts, *rest: encoded.extend(prompts) or real(model, prompts, *rest))
    user, tools = [{"role": "user", "content": "Hi"}], [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    whole = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *user]
    requests = [({"messages": user, "system": "Be kind."}, whole[:1] + user), ({"prompt": "Hi", "system": "Be kind."}, whole[:1] + user),
                ({"prompt": "Hi", "history": [["a", "b"]], "system": "Be kind."}, whole), ({"messages": json.dumps(whole)}, whole),
                ({"prompt": "Hi", "tools": json.dumps(tools)}, user), ({"messages": user, "tools": tools}, user)]
    infer("--jsonl", *GREEDY, stdin="".join(json.dumps(request) + "\n" for request, _ in requests), folder=chat_folder)
    tokenizer = TOKENIZER.load(chat_folder)
    expected = [TOKENIZER.render_chat(tokenizer, messages, tools if "tools" in request else None, add_generation_prompt=True).ids
                for request, messages in requests]
    assert [ids[-20:] for ids in encoded] == [ids[-20:] for ids in expected]  # long prompts are truncated at the start
    with pytest.raises(UserError, match="stdin:1: expected an object with either 'prompt' or 'messages'"):
        infer("--jsonl", *GREEDY, stdin=json.dumps({"prompt": "Hi", "messages": user}), folder=chat_folder)


def test_chat_auto_on_and_off(infer, chat_folder, model_folder, model, tokenizer):
    user = [{"role": "user", "content": "The red"}]
    wrapped = one(model, chat_ids(chat_folder, user), greedy(max_new_tokens=12), tokenizer).text + "\n"
    assert infer("--prompt", "The red", *GREEDY, folder=chat_folder)[0] == wrapped
    assert infer("--prompt", "The red", "--chat", "on", *GREEDY, folder=chat_folder)[0] == wrapped
    plain = completion_of(model, tokenizer, "The red") + "\n"
    assert plain != wrapped
    assert infer("--prompt", "The red", "--chat", "off", *GREEDY, folder=chat_folder)[0] == plain
    assert infer("--prompt", "The red", *GREEDY)[0] == plain
    system = [{"role": "system", "content": "Be kind."}, *user]
    expected = one(model, chat_ids(chat_folder, system), greedy(max_new_tokens=12), tokenizer).text + "\n"
    assert infer("--prompt", "The red", "--system", "Be kind.", *GREEDY, folder=chat_folder)[0] == expected
    with pytest.raises(UserError, match="inference.chat: on.*no chat template"):
        infer("--prompt", "x", "--chat", "on")


def test_jsonl_messages(infer, chat_folder, model, tokenizer):
    messages = [{"role": "user", "content": "Fox?"}, {"role": "assistant", "content": "Owl."}, {"role": "user", "content": "Why?"}]
    out, _ = infer("--jsonl", *GREEDY, stdin=json.dumps({"messages": messages, "id": 1}), folder=chat_folder)
    record = json.loads(out)
    assert record["messages"] == messages and record["id"] == 1
    assert record["completion"] == one(model, chat_ids(chat_folder, messages), greedy(max_new_tokens=12), tokenizer).text
    with pytest.raises(UserError, match="stdin:1: messages need a chat template"):
        infer("--jsonl", *GREEDY, stdin=json.dumps({"messages": messages}))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def type_lines(monkeypatch, lines):
    remaining = iter(lines)

    def read(prompt=""):
        line = next(remaining, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)


def test_terminal_keeps_a_conversation(monkeypatch, capsys, chat_folder, model, tokenizer):
    type_lines(monkeypatch, ["The red", "Why?"])
    INFER.main(["--model", str(chat_folder), *map(str, GREEDY)])
    messages, replies = [], []
    for text in ("The red", "Why?"):
        messages.append({"role": "user", "content": text})
        replies.append(one(model, chat_ids(chat_folder, messages), greedy(max_new_tokens=12), tokenizer).text)
        messages.append({"role": "assistant", "content": replies[-1]})
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in replies)


def test_terminal_without_a_template(monkeypatch, capsys, model_folder, model, tokenizer):
    type_lines(monkeypatch, ["The red", "", "owl", "/exit", "never read"])
    INFER.main(["--model", str(model_folder), *map(str, GREEDY)])
    assert capsys.readouterr().out == "".join(completion_of(model, tokenizer, text) + "\n" for text in ("The red", "owl"))


def test_terminal_commands_and_ctrl_c(monkeypatch, capsys, chat_folder, model, tokenizer):
    """/reset clears the conversation, /system sets the system message, Ctrl-C stops a completion; at the prompt it has no effect."""
    type_lines(monkeypatch, ["The red", "/reset", "owl", "/system Be kind.", "/resett", KeyboardInterrupt, "fox", "rain"])
    real, encoded = INFER.stream, []

    def interrupted(model, tokenizer, ids, *rest):
        encoded.append(ids)
        for number, part in enumerate(real(model, tokenizer, ids, *rest)):
            if len(encoded) == 3 and number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(INFER, "stream", interrupted)
    INFER.main(["--model", str(chat_folder), *map(str, GREEDY)])
    out, err = capsys.readouterr()
    assert "/resett: unknown command; use /reset, /system, /exit" in err
    system, [fox] = {"role": "system", "content": "Be kind."}, [{"role": "user", "content": "fox"}]
    assert encoded[:3] == [chat_ids(chat_folder, [{"role": "user", "content": "The red"}]), chat_ids(chat_folder, [{"role": "user", "content": "owl"}]),
                         chat_ids(chat_folder, [system, fox])]
    [third] = INFER.generate(model, [encoded[2]], greedy(max_new_tokens=12), tokenizer)[0]
    stopped = next(part for part in (third.text[:end] for end in range(len(third.text), 0, -1))
                   if encoded[3] == chat_ids(chat_folder, [system, fox, {"role": "assistant", "content": part}, {"role": "user", "content": "rain"}]))
    assert len(stopped) < len(third.text) and stopped in out


def test_load_and_generate(model_folder, chat_folder, model, tokenizer):
    session = INFER.load(str(model_folder), temperature=0, max_new_tokens=12)
    assert session.generate("The red") == completion_of(model, tokenizer, "The red")
    assert session.generate("owl", max_tokens=3) == completion_of(model, tokenizer, "owl", max_new_tokens=3)
    assert session.generate("owl", n=2) == 2 * [completion_of(model, tokenizer, "owl")]
    messages = [{"role": "user", "content": "The red"}]
    reply = INFER.load(str(chat_folder), temperature=0, max_new_tokens=12).generate(messages)
    assert reply == one(model, chat_ids(chat_folder, messages), greedy(max_new_tokens=12), tokenizer).text
    with pytest.raises(UserError, match="temprature: unknown setting; nearest is 'temperature'"):
        session.generate("a", temprature=1)
    with pytest.raises(UserError, match="generate expects prompts as lists of token ids"):
        generate(model, ["a text"], greedy(), tokenizer)


# ------------------------------------------------------------------------------------------ scoring on the command line


def test_score_prints_json(infer, tmp_path, model, tokenizer):
    text = "The red fox.\n\nOne owl saw it.\n"
    (tmp_path / "a.txt").write_text(text)
    expected = INFER.score(model, tokenizer, [text])
    for flags, stdin in ((("--score", tmp_path / "a.txt"), ""), (("--score", "-"), text), (("--score",), text)):
        assert json.loads(infer(*flags, stdin=stdin)[0]) == pytest.approx(expected, rel=1e-4)
    lines = INFER.score(model, tokenizer, ["The red fox.", "One owl saw it."])
    assert json.loads(infer("--score", tmp_path / "a.txt", "--lines")[0]) == pytest.approx(lines, rel=1e-4)
    assert json.loads(infer("--score", "--lines", stdin=text)[0]) == pytest.approx(lines, rel=1e-4)
    for flags in (("--score", tmp_path / "nothing.txt"), ("--score",)):
        (tmp_path / "nothing.txt").write_text("")
        with pytest.raises(UserError, match="--score: .*no text"):
            infer(*flags)


def test_score_lines_are_the_same_from_a_file_and_a_pipe(infer, tmp_path):
    text = "one\u2028line\n\nform\x0cfeed\nlast\x85one\n"
    (tmp_path / "a.txt").write_text(text)
    flags = ("--score", "--lines", "--logprobs")
    piped = [json.loads(line)["text"] for line in infer(*flags, stdin=text)[0].split("\n")[:-1]]
    filed = [json.loads(line)["text"] for line in infer("--score", tmp_path / "a.txt", *flags[1:])[0].split("\n")[:-1]]
    assert piped == filed == [line for line in text.split("\n") if line]


@pytest.mark.parametrize("text", ["\ufeffThe red fox\n", "The red\r\nfox\r\n", "\ufeffone\r\n\r\ntwo\n"], ids=["mark", "line ends", "both"])
@pytest.mark.parametrize("lines", [(), ("--lines",)], ids=["whole", "lines"])
def test_the_same_bytes_score_the_same_from_a_file_a_pipe_and_a_named_pipe(text, lines, infer, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(text.encode()), daemon=True).start()
    found = [infer("--score", tmp_path / "a.txt", *lines)[0], infer("--score", tmp_path / "pipe", *lines)[0],
             infer("--score", *lines, stdin=text)[0]]
    assert found[0] == found[1] == found[2] and json.loads(found[0])["tokens"]


@pytest.mark.parametrize("more", [(), ("--lines",), ("--logprobs", "true")])
def test_weights_with_nan_are_not_scored(more, infer, model, tokenizer, tmp_path):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = math.nan
    MODEL.save(broken, tmp_path)
    TOKENIZER.save(tokenizer, tmp_path)
    with pytest.raises(UserError, match="logits are not finite"):
        infer("--score", *more, stdin="The red fox", folder=tmp_path)


def test_line_ends_inside_a_completion_are_escaped(infer, monkeypatch):
    completion = INFER.Completion([1], None, "stop", "a\r\nb\\c\rd")
    monkeypatch.setattr(INFER, "completions_of", lambda session, requests: [[completion] for _ in requests])
    assert infer("--lines", stdin="one\ntwo\n")[0] == 2 * "a\\r\\nb\\\\c\\rd\n"


def test_without_stdin_and_on_a_narrow_console(model_folder):
    """With a closed stdin, as in a service, and on a console whose code page lacks characters."""
    def run(*flags, **more):
        return subprocess.run([sys.executable, "INFER.py", "--model", str(model_folder), *flags], cwd=ROOT, capture_output=True, **more)

    closed = run("--max-new-tokens", "2", preexec_fn=lambda: os.close(0))
    assert closed.returncode == 2 and closed.stderr.decode().splitlines()[-1] == "error: no prompt: stdin is closed; use --prompt"
    narrow = run("--prompt", "caf\u00e9 \U0001f600", "--echo", "--max-new-tokens", "2", env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert narrow.returncode == 0 and narrow.stdout.decode("cp1252").startswith("caf\u00e9 ?")


@pytest.mark.parametrize("flags, message", [
    (("--prompt-lookup", "--use-cache", "false"), "inference.prompt_lookup: has no effect with use_cache false"),
    (("--prompt-lookup", "--num-beams", 2), "inference.prompt_lookup: has no effect with num_beams"),
    (("--num-speculative-tokens", 7), "inference.num_speculative_tokens: has no effect"), (("--lora-modules", "a=b"), "--lora-modules: requires --serve"),
    (("--port", 80), "--port: requires --serve"), (("--api-key", "x"), "--api-key: requires --serve"),
    (("--serve", "--num-beams", 2), "inference.num_beams: the server does not support beam search"),
    (("--serve", "--lora-modules", "nonsense"), "inference.lora_modules: 'nonsense' is not NAME=FOLDER"),
    (("--serve", "--lora-modules", "a=/nope"), "inference.lora_modules: .*nope"), (("--draft-model", "/nope"), "inference.draft_model: .*nope"),
    (("--structured-outputs", "hello"), "is not of type JSON object"), (("--structured-outputs", '{"regex": "("}'), "unclosed group")], ids=str)
def test_settings_without_effect_and_invalid_settings_are_named(flags, message, infer):
    with pytest.raises(UserError, match=message) as error:
        infer(*flags, *(() if "--serve" in flags else ("--prompt", "a")))
    assert "\n" not in str(error.value)


def test_a_draft_model_needs_the_same_vocabulary(infer, model_folder, tokenizer, tmp_path):
    out = infer("--prompt", "The red", "--draft-model", model_folder, *GREEDY)
    assert out[0] == infer("--prompt", "The red", *GREEDY)[0] and "draft tokens accepted (100%)" in out[1]
    MODEL.save(MODEL.load(model_folder), tmp_path)
    TOKENIZER.save(TOKENIZER.train(["ships and sails and storms"] * 20, 300), tmp_path)
    with pytest.raises(UserError, match="with the same vocabulary"):
        infer("--prompt", "The red", "--draft-model", tmp_path, *GREEDY)


def test_typed_lines_get_a_prompt(monkeypatch):
    """Classification, reward models and --lines on a terminal."""
    typed, prompts = iter(["One", "Two"]), []

    def read(prompt):
        prompts.append(prompt)
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert list(INFER.read_stdin()) == ["One", "Two"] and prompts == ["> "] * 3


def test_control_tokens_in_a_typed_message_are_text(infer, chat_folder):
    """`control_tokens` parses them as control tokens."""
    session = INFER.load(str(chat_folder))
    typed = "Hi" + session.tokenizer.eos_token
    ids = [INFER.Session.prompt_ids(session, typed, Sampling()) for session.settings.control_tokens in (False, True)]
    plain = session.prompt_ids("Hi", Sampling())
    count = [part.count(session.tokenizer.eos_token_id) for part in (*ids, plain)]
    assert count[0] == count[2] and count[1] == count[2] + 1
    assert session.tokenizer.decode(ids[0]) == session.tokenizer.decode(ids[1])


def test_an_adapter_folder_loads_its_base_with_the_adapter(infer, model_folder, tmp_path):
    saved_adapter(model_folder, tmp_path / "adapter", 0)
    plain, flag = infer("--prompt", "The red", *GREEDY)[0], infer("--prompt", "The red", "--adapter", tmp_path / "adapter", *GREEDY)[0]
    assert infer("--prompt", "The red", *GREEDY, folder=tmp_path / "adapter")[0] == flag != plain
    with pytest.raises(UserError, match="is an adapter; give its base model"):
        infer("--prompt", "a", "--adapter", tmp_path / "adapter", folder=tmp_path / "adapter")


def test_a_tokenizer_other_than_the_models_is_reported(infer, model_folder, tokenizer, tmp_path):
    TOKENIZER.save(tokenizer, tmp_path / "same")
    TOKENIZER.save(TOKENIZER.train(["ships and sails and storms"] * 20, 300), tmp_path / "other")
    logs = [infer("--prompt", "The", "--tokenizer.name", tmp_path / name, *GREEDY)[1] for name in ("same", "other")]
    assert "is not the tokenizer of" not in logs[0] and "is not the tokenizer of" in logs[1]


@torch.no_grad()
def test_score_logprobs_and_top_logprobs(infer, model, tokenizer):
    text = "The red fox \u00e9"
    out, _ = infer("--score", "--logprobs", "--top-logprobs", 3, stdin=text)
    record = json.loads(out)
    ids = tokenizer(text).input_ids
    table = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert record["text"] == text and record["ids"] == ids and record["token_strings"] == tokenizer.convert_ids_to_tokens(ids)
    np.testing.assert_allclose(record["logprobs"], [table[i, ids[i + 1]] for i in range(len(ids) - 1)], atol=1e-4)
    assert record["perplexity"] == pytest.approx(math.exp(-sum(record["logprobs"]) / (len(ids) - 1)))
    for t, best in enumerate(record["top_logprobs"]):
        values, indices = table[t].topk(3)
        assert list(best) == tokenizer.convert_ids_to_tokens(indices.tolist())
        np.testing.assert_allclose(list(best.values()), values, atol=1e-4)
    assert "top_logprobs" not in json.loads(infer("--score", "--logprobs", stdin=text)[0])


@torch.no_grad()
def test_logits_file(infer, tmp_path, model, tokenizer):
    path = tmp_path / "deep/logits.safetensors"
    infer("--score", "--lines", "--logits", path, stdin="The red fox\nanother line\n")
    tensors = load_file(path)
    ids = tokenizer("The red fox").input_ids
    assert tensors["ids"].tolist() == ids
    torch.testing.assert_close(tensors["logits"], model(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="--logits: .*exceed the context of 128"):
        infer("--score", "--logits", path, stdin=" ".join(make_text(40)))


# ------------------------------------------------------------------------------------------ errors


def exits(monkeypatch, capsys, *flags):
    """The exit status and stderr of a command."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
    with pytest.raises(SystemExit) as caught:
        MODEL.run_main(INFER.main, list(map(str, flags)))
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def test_errors_are_one_line_with_exit_status_two(monkeypatch, capsys, tmp_path, model_folder):
    (tmp_path / "out/ckpt-step-000020").mkdir(parents=True)
    (tmp_path / "out/ckpt-step-000100").mkdir()
    (tmp_path / "bare").mkdir()
    model = ("--model", model_folder)
    for flags, parts in (
        ((*model, "--temprature", 1), ["--temprature", "nearest", "--temperature"]),
        ((*model, "--top-p", 3), ["inference.top_p", "3"]),
        ((*model, "--max-new-tokens", "many"), ["inference.max_new_tokens", "many"]),
        ((*model, "--model.hidden_size", 64), ["model.hidden_size", "fixed"]),
        (("--model", tmp_path / "out"), ["contains no finished model", "--model", "ckpt-step-000100"]),
        (("--model", tmp_path / "bare"), ["contains no finished model", "config.json is missing"]),
        (("--model", tmp_path / "nowhere"), ["model.name", "nowhere"]),
        (("--model.preset", "llama-1m"), ["model.preset", "--model"]),
        (("--model", "somebody/no-such-model"), ["somebody/no-such-model", "spelling"]),
        ((*model, "stray"), ["stray"]),
    ):
        code, err = exits(monkeypatch, capsys, *flags)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(part in err for part in parts), err


def test_a_tokenizer_too_large_for_the_model(infer, tmp_path):
    TOKENIZER.save(TOKENIZER.train(make_text(300), 400), tmp_path)
    size = len(TOKENIZER.load(tmp_path))
    with pytest.raises(UserError, match=f"vocab_size 320 is smaller than the tokenizer's vocabulary size {size}"):
        infer("--prompt", "x", "--tokenizer.name", tmp_path)


def test_help_lists_every_setting(capsys):
    for flags, keys in ((["--help"], ["temperature", "--prompt", "--echo", "--lines", "--jsonl", "--score", "--logits"]), (["--help", "inference"], INFER.SAMPLING_KEYS)):
        with pytest.raises(SystemExit) as caught:
            INFER.main(flags)
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(key in out for key in keys)


# ------------------------------------------------------------------------------------------ the process itself


def test_a_prompt_piped_into_a_process(model_folder, model, tokenizer):
    command = [sys.executable, "INFER.py", "--model", model_folder, *map(str, GREEDY)]
    done = subprocess.run(command, input="The red\n", capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (0, completion_of(model, tokenizer, "The red") + "\n"), done.stderr


def test_a_closed_output_pipe_ends_without_an_error(model_folder, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("the red fox\n" * 400)
    script = (f"{sys.executable} INFER.py --model {model_folder} --lines --batch-size 1 --max-new-tokens 2 < {lines} "
              "| head -1; echo status ${PIPESTATUS[0]}")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.count("\n") == 2 and done.stdout.endswith("\nstatus 0\n")
    assert "Broken" not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


def test_flags_that_would_be_ignored_are_rejected(model_folder):
    for argv in (["--prompt", "a", "--lines"], ["--lines", "--jsonl"], ["--prompt", "a", "--logits", "x.safetensors"],
                 ["--score", "-", "--top-logprobs", "2"], ["--score", "/nonexistent"]):
        with pytest.raises(UserError, match="--|has no effect without inference.logprobs"):
            INFER.main(["--model", str(model_folder), *argv])


# ------------------------------------------------------------------------------------------------ unusual requests


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**70])
def test_completions_with_a_seed_are_reproducible(seed, model, prompts):
    first, again = (one(model, prompts[0], Sampling(12, seed=seed)) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("temperature", [1e-39, 1e-45, 1e-60, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature, model, prompts):
    assert one(model, prompts[0], Sampling(12, temperature, seed=1)).ids == one(model, prompts[0], greedy(max_new_tokens=12)).ids


def test_a_special_token_can_be_a_stop_string(model_folder, tokenizer):
    """Decoded text omits it, so it is compared by its id."""
    model, end = MODEL.load(model_folder), tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = TOKENIZER.encode_prompt(tokenizer, "The red fox")
    free = one(model, prompt, greedy(ignore_eos=True), tokenizer)
    with torch.no_grad():  # the third token of the completion becomes the end token
        head = model.lm_head.weight
        if model.config.tie_word_embeddings:
            head = model.lm_head.weight = torch.nn.Parameter(head.detach().clone())
        head[[end, free.ids[2]]] = head[[free.ids[2], end]]
    for stop in (["<|im_end|>"], "<|im_end|>", ["nowhere", "<|im_end|>"]):
        completion = one(model, prompt, greedy(ignore_eos=True, stop=stop), tokenizer)
        assert completion.ids == [*free.ids[:2], end] and completion.finish_reason == "stop" and completion.text == text_after(tokenizer, prompt, free.ids[:2])


def test_a_prompt_that_fits_is_kept_whole(infer, model, tokenizer, capsys):
    """max_new_tokens does not reserve a part of the context."""
    context = model.config.max_position_embeddings
    prompt = "red fox " * ((context - 6) // 2)
    size = len(TOKENIZER.encode_prompt(tokenizer, prompt))
    assert context // 2 < size < context
    out, err = infer("--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(context), "--ignore-eos", "true")
    assert "dropped" not in err
    assert out.rstrip("\n") == one(model, TOKENIZER.encode_prompt(tokenizer, prompt), greedy(max_new_tokens=context - size, ignore_eos=True), tokenizer).text


def test_a_long_conversation_is_truncated_by_whole_messages(chat_folder):
    config = MODEL.load_config(["--model", str(chat_folder)], INFER.SECTIONS, "inference", INFER.ACTIONS)
    session = INFER.Session(config)
    context = session.model.config.max_position_embeddings
    system, turns = {"role": "system", "content": "be brief"}, [{"role": ("user", "assistant")[i % 2], "content": f"{i} red fox " * 6} for i in range(21)]
    ids = session.prompt_ids([system, *turns], Sampling(8))
    kept = [TOKENIZER.render_chat(session.tokenizer, [system, *turns[start:]], None, True).ids for start in range(1, len(turns))]
    assert ids in kept and len(ids) <= context - 8 and len(kept[kept.index(ids) - 1]) > context - 8


@pytest.mark.parametrize("request_", [{"prompt": "a\ud83d"}, {"prompt": "a", "stop": ["\ud83d"]}, {"prompt": "a", "note": "\ud83d"}])
def test_invalid_unicode_in_a_request_is_a_one_line_error(request_):
    with pytest.raises(UserError, match="stdin:2: the request contains an unpaired surrogate"):
        INFER._record(json.dumps(request_), "stdin:2", Sampling())


def test_an_empty_turn_in_the_history_of_a_request_is_a_one_line_error():
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]
    with pytest.raises(UserError, match="^stdin:3: a conversation with an empty answer$"):
        INFER._record(json.dumps({"prompt": "b", "history": history}), "stdin:3", Sampling())
