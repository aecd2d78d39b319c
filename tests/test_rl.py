"""Preferences, rewards and rollouts: every estimator against a slow one, and runs from end to end."""

import datetime
import importlib.util
import io
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, in_file, launch, make_text, saved_adapter, two_processes
from safetensors.torch import load_file
from torch import tensor

import INFER
import MODEL
import RL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
G = torch.Generator().manual_seed(0)


def draw(*shape, low=-3.0, high=0.0) -> torch.Tensor:
    return (torch.rand(*shape, generator=G, dtype=torch.float64) * (high - low) + low).requires_grad_()


def same(fast, slow, inputs, tolerance=1e-5) -> None:
    """Equal values, and equal gradients of a weighted sum."""
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    weights = torch.rand(fast.shape, generator=G, dtype=fast.dtype)
    for one, other in zip(torch.autograd.grad((fast * weights).sum(), inputs), torch.autograd.grad((slow * weights).sum(), inputs), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


# ------------------------------------------------------------------------------------------ losses of preferences


@pytest.mark.parametrize("kind, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1), ("sigmoid_norm", 0.0)])
def test_dpo_is_the_published_formula(kind, smoothing):
    c, r, rc, rr = (draw(7) for _ in range(4))
    beta, slow = 0.3, []
    for i in range(7):
        x = beta * (c[i] - rc[i] - r[i] + rr[i])
        slow.append({"sigmoid": -(1 - smoothing) * torch.log(sigmoid(x)) - smoothing * torch.log(sigmoid(-x)),
                     "sigmoid_norm": -torch.log(sigmoid(x)), "hinge": torch.maximum(1 - x, x * 0), "ipo": (x / beta - 1 / (2 * beta)) ** 2,
                     "robust": (-(1 - smoothing) * torch.log(sigmoid(x)) + smoothing * torch.log(sigmoid(-x))) / (1 - 2 * smoothing)}[kind])
    same(RL.dpo_loss(c, r, rc, rr, beta, kind, smoothing), torch.stack(slow), (c, r, rc, rr))


def test_dpo_in_numbers():
    assert float(RL.dpo_loss(*(tensor([x]) for x in (-1.0, -3.0, -2.0, -2.0)))) == pytest.approx(0.598, abs=1e-3)
    assert float(RL.dpo_loss(*(tensor([x]) for x in (-1.0, -3.0, -1.0, -3.0)))) == pytest.approx(math.log(2))


def test_kto_is_the_published_formula():
    gains, baseline = draw(8, low=-5, high=5), tensor(0.7, dtype=torch.float64)
    wanted = tensor([True, False] * 4)
    slow = [1.3 * (1 - sigmoid(0.2 * (g - 0.7))) if w else 0.6 * (1 - sigmoid(0.2 * (0.7 - g))) for g, w in zip(gains, wanted, strict=True)]
    same(RL.kto_loss(gains, wanted, baseline, 0.2, 1.3, 0.6), torch.stack(slow), (gains,))


def test_orpo_simpo_and_rewards_are_the_published_formulas():
    c, r = draw(6), draw(6)

    def odds(logp):
        return torch.exp(logp) / (1 - torch.exp(logp))

    same(RL.orpo_loss(c, r), torch.stack([-torch.log(sigmoid(torch.log(odds(x) / odds(y)))) for x, y in zip(c, r, strict=True)]), (c, r))
    same(RL.simpo_loss(c, r, 2.0, 0.5), torch.stack([-torch.log(sigmoid(2 * x - 2 * y - 0.5)) for x, y in zip(c, r, strict=True)]), (c, r))
    slow = [-torch.log(sigmoid(x - y - 0.4)) + 0.1 * (x + y) ** 2 for x, y in zip(c, r, strict=True)]
    same(RL.reward_loss(c, r, 0.4, 0.1), torch.stack(slow), (c, r))


# ------------------------------------------------------------------------------------------ losses of rollouts

MASK = tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_kl_estimate_is_right_on_average_and_never_negative():
    p, q = torch.randn(2, 9, generator=G, dtype=torch.float64).log_softmax(-1)
    estimates = RL.kl_estimate(p, q)
    assert estimates.min() >= 0
    assert float((p.exp() * estimates).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-12)


def test_a_policy_that_has_left_everything_behind_has_finite_losses():
    now, reference = tensor([-120.0, -0.1], requires_grad=True), tensor([-0.1, -120.0])
    ratio_losses, _ = RL.ppo_loss(now, reference, tensor([-1.0, 1.0]))
    (RL.kl_estimate(now, reference).sum() + ratio_losses.sum()).backward()
    assert now.grad.isfinite().all()


def test_rewards_of_tokens():
    scores, old, reference = draw(4), draw(4, 5), draw(4, 5)
    slow = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for t in range(5):
            if MASK[i, t]:
                last = t == 4 or not MASK[i, t + 1]
                slow[i, t] = -0.1 * (old[i, t] - reference[i, t]) + (scores[i] if last else 0)
    same(RL.token_rewards(scores, old, reference, MASK, 0.1), slow, (scores, old, reference))


def test_gae_is_the_sum_of_later_surprises():
    rewards, values, gamma, lam = draw(4, 5), draw(4, 5), 0.9, 0.8
    slow = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        length = int(MASK[i].sum())
        for t in range(length):
            for k in range(t, length):
                following = values[i, k + 1] if k + 1 < length else 0.0
                slow[i, t] = slow[i, t] + (gamma * lam) ** (k - t) * (rewards[i, k] + gamma * following - values[i, k])
    advantages, returns = RL.gae(rewards, values, MASK, gamma, lam)
    same(advantages, slow, (rewards, values))
    torch.testing.assert_close(returns, (slow + values) * MASK)
    plain, _ = RL.gae(rewards, values, MASK, 1.0, 1.0)  # lambda 1: what came, minus what was expected
    torch.testing.assert_close(plain[0, 1], rewards[0, 1:].sum() - values[0, 1])
    advantages, returns = RL.gae(tensor([[0.0, 1.0]]), tensor([[0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    assert advantages.tolist() == [[0.25, 0.5]] and returns.tolist() == [[0.75, 1.0]]


def test_whitening_ignores_padding():
    values = draw(4, 5).detach()
    chosen = [float(values[i, t]) for i in range(4) for t in range(5) if MASK[i, t]]
    mean = sum(chosen) / len(chosen)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in chosen) / (len(chosen) - 1))
    white = RL.whiten(values, MASK)
    assert not white[~MASK].any()
    torch.testing.assert_close(white[MASK], (values[MASK] - mean) / deviation, atol=1e-5, rtol=0)
    assert RL.whiten(tensor([[5.0]]), tensor([[True]])).tolist() == [[0.0]]


@pytest.mark.parametrize("high", [None, 0.4])
def test_ppo_is_clipped_as_published(high):
    now, old, advantages = draw(4, 5, low=-2, high=-1), draw(4, 5, low=-2, high=-1), draw(4, 5, low=-1, high=1)
    slow, cut = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.bool)
    for i in range(4):
        for t in range(5):
            r, a = torch.exp(now[i, t] - old[i, t]), advantages[i, t]
            limited = torch.clamp(r, 0.8, 1 + (high or 0.2))
            slow[i, t], cut[i, t] = -torch.minimum(r * a, limited * a), limited * a < r * a
    losses, told = RL.ppo_loss(now, old, advantages, 0.2, high)
    assert told.any() and torch.equal(told, cut)
    same(losses, slow, (now, advantages))


def test_value_loss_is_clipped_as_published():
    values, old, returns = draw(4, 5), draw(4, 5), draw(4, 5)
    slow = [[0.5 * torch.maximum((v - r) ** 2, (o + torch.clamp(v - o, -0.2, 0.2) - r) ** 2) for v, o, r in zip(*row, strict=True)]
            for row in zip(values, old, returns, strict=True)]
    same(RL.value_loss(values, old, returns, 0.2), torch.stack([torch.stack(row) for row in slow]), (values, returns))


def test_advantages_of_groups():
    rewards = draw(3, 4).detach()
    for i in range(3):
        own = rewards[i].tolist()
        mean = sum(own) / 4
        deviation = math.sqrt(sum((x - mean) ** 2 for x in own) / 3)
        assert RL.group_advantages(rewards, "none")[i].tolist() == pytest.approx([x - mean for x in own])
        assert RL.group_advantages(rewards, "group")[i].tolist() == pytest.approx([(x - mean) / (deviation + 1e-4) for x in own])
        assert RL.group_advantages(rewards, "leave_one_out")[i].tolist() == pytest.approx([x - (sum(own) - x) / 3 for x in own])
    spread = float(rewards.flatten().std())
    assert RL.group_advantages(rewards, "batch")[1, 2].item() == pytest.approx(float(rewards[1, 2] - rewards[1].mean()) / (spread + 1e-4))
    for reward, scale in itertools.product((1.0, 1000.1, 1 / 3), ("none", "group", "batch", "leave_one_out")):
        assert not RL.group_advantages(torch.full((2, 7), reward), scale).any()  # all alike: nothing to learn, no NaN


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_grpo_is_the_published_formula(kind):
    now, old, reference, advantages = draw(4, 5), draw(4, 5), draw(4, 5), draw(4, low=-1, high=1)
    total, texts, tokens = 0.0, 4, int(MASK.sum())
    for i in range(4):
        length = int(MASK[i].sum())
        for t in range(length):
            r = torch.exp(now[i, t] - old[i, t])
            gain = torch.minimum(r * advantages[i], torch.clamp(r, 0.8, 1.3) * advantages[i])
            if kind == "cispo":
                gain = min(float(r), 1.3) * advantages[i] * now[i, t]
            ratio = torch.exp(reference[i, t] - now[i, t])
            kl = ratio - torch.log(ratio) - 1
            share = {"grpo": 1 / length / texts, "dapo": 1 / tokens, "cispo": 1 / tokens, "dr_grpo": 1 / (texts * 9)}[kind]
            total = total - share * (gain - 0.04 * kl)
    shares, _ = RL.grpo_loss(now, old, advantages, MASK, reference, 0.04, 0.2, 1.3 if kind == "cispo" else 0.3, kind, 9)
    same(shares.sum() / (tokens if kind in ("dapo", "cispo") else texts), total, (now, reference, advantages))


def test_gspo_is_the_published_formula():
    old, advantages = draw(4, 5).detach(), tensor([1.0, -0.5, -0.7, 0.3], dtype=torch.float64, requires_grad=True)
    moved = tensor([[0.4], [-0.4], [0.4], [-0.4]]) + draw(4, 5, low=-0.1, high=0.1).detach()  # on the mean; the first two are clipped
    now, total = (old + moved).requires_grad_(), 0.0
    for i in range(4):
        length = int(MASK[i].sum())
        s = math.prod(torch.exp(now[i, t] - old[i, t]) for t in range(length)) ** (1 / length)
        total = total - torch.minimum(s * advantages[i], torch.clamp(s, 0.9, 1.2) * advantages[i]) / 4
    shares, told = RL.grpo_loss(now, old, advantages, MASK, epsilon=0.1, epsilon_high=0.2, loss_type="grpo", level="sequence")
    assert torch.equal(told, MASK & tensor([[True], [True], [False], [False]]))
    same(shares.sum() / 4, total, (now, advantages))
    assert RL.RLSection(method="grpo", importance_sampling_level="sequence").fill().loss_type == "grpo"


def test_importance_weights_correct_the_sampler_up_to_a_limit():
    old, sampled = draw(4, 5).detach(), draw(4, 5).detach()
    ratios = [[float(torch.exp(old[i, t] - sampled[i, t])) if MASK[i, t] else 1.0 for t in range(5)] for i in range(4)]
    tokens = RL.sampler_weights(old, sampled, MASK, 2.0)
    assert tokens.tolist() == [pytest.approx([min(r, 2.0) for r in row]) for row in ratios] and tokens.max() == 2
    assert RL.sampler_weights(old, sampled, MASK, 2.0, True).tolist() == pytest.approx([min(math.prod(row), 2.0) for row in ratios])


def test_rloo_takes_a_text_as_one_action():
    now, old, advantages = draw(4, 5), draw(4, 5), draw(4, low=-1, high=1)
    slow = []
    for i in range(4):
        r = torch.ones((), dtype=torch.float64)
        for t in range(int(MASK[i].sum())):
            r = r * torch.exp(now[i, t] - old[i, t])
        slow.append(-torch.minimum(r * advantages[i], torch.clamp(r, 0.8, 1.2) * advantages[i]))
    same(RL.rloo_loss(now, old, advantages, MASK)[0], torch.stack(slow), (now, advantages))
    first, _ = RL.rloo_loss(now, now.detach(), advantages.detach(), MASK)  # REINFORCE: the gradient is A grad log p
    [gradient] = torch.autograd.grad(first.sum(), now)
    torch.testing.assert_close(gradient, -advantages.detach()[:, None] * MASK)


# ------------------------------------------------------------------------------------------------------ records

ASKED = [{"role": "user", "content": "What is red?"}]
FOX, OWL = [{"role": "assistant", "content": "The fox."}], [{"role": "assistant", "content": "The owl."}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PAIRS = {
    "texts": ({"prompt": "What is red?", "chosen": "The fox.", "rejected": "The owl."}, "What is red?", "The fox.", "The owl."),
    "alpaca": ({"instruction": "Name it.", "input": "red", "chosen": "The fox.", "rejected": "The owl."}, "Name it.\n\nred", "The fox.", "The owl."),
    "question": ({"question": "What is red?", "chosen": "The fox.", "rejected": "The owl."}, "What is red?", "The fox.", "The owl."),
    "messages": ({"prompt": ASKED, "chosen": FOX, "rejected": OWL}, ASKED, FOX, OWL),
    "implicit": ({"chosen": ASKED + FOX, "rejected": ASKED + OWL}, ASKED, FOX, OWL),
    "mixed": ({"prompt": "What is red?", "chosen": FOX, "rejected": OWL}, ASKED, FOX, OWL),
    "a system": ({"system": "Be brief.", "prompt": "What is red?", "chosen": "The fox.", "rejected": "The owl."},
                 [{"role": "system", "content": "Be brief."}, *ASKED], FOX, OWL),
    "hh": ({"chosen": "\n\nHuman: What is red?\n\nAssistant: The fox.", "rejected": "\n\nHuman: What is red?\n\nAssistant: The owl."}, ASKED, FOX, OWL),
    "the prompt again": ({"prompt": "What is red?", "chosen": ASKED + FOX, "rejected": ASKED + OWL}, ASKED, FOX, OWL),
    "a system of its own": ({"prompt": "What is red?", "chosen": SYSTEM + ASKED + FOX, "rejected": SYSTEM + ASKED + OWL}, SYSTEM + ASKED, FOX, OWL),
    "the prompt's system": ({"prompt": SYSTEM + ASKED, "chosen": ASKED + FOX, "rejected": ASKED + OWL}, SYSTEM + ASKED, FOX, OWL),
    "several turns": ({"prompt": "What is red?", "chosen": ASKED + FOX + ASKED + FOX, "rejected": ASKED + FOX + ASKED + OWL}, ASKED + FOX + ASKED, FOX, OWL),
    "parted early": ({"chosen": ASKED + FOX + ASKED + FOX, "rejected": ASKED + OWL + ASKED + OWL}, ASKED, FOX + ASKED + FOX, OWL + ASKED + OWL),
    "shared": ({"conversations": [{"from": "human", "value": "What is red?"}], "chosen": {"from": "gpt", "value": "The fox."}, "rejected": {"from": "gpt", "value": "The owl."}}, ASKED, FOX, OWL),
    "hh with a prompt": ({"prompt": "\n\nHuman: What is red?\n\nAssistant:", "chosen": "The fox.", "rejected": "The owl."}, ASKED, FOX, OWL),
    "the prompt in both texts": ({"prompt": "What is red? ", "chosen": "What is red? The fox.", "rejected": "What is red? The owl."}, "What is red? ", "The fox.", "The owl."),
    "cells": ({"prompt": "What is red?", "chosen": json.dumps(FOX), "rejected": json.dumps(OWL), "margin": "0"}, ASKED, FOX, OWL),
    "messages beside": ({"messages": ASKED + FOX, "chosen": ASKED + FOX, "rejected": ASKED + OWL}, ASKED, FOX, OWL),
    "ids and blanks": ({"chosen": [{"role": "user", "content": "What is red?", "id": 1}, *FOX], "rejected": [{"role": "user", "content": "What is red?\n", "id": 2}, *OWL]},
                       [{"role": "user", "content": "What is red?", "id": 1}], FOX, OWL),
    "common words": ({"chosen": "What is red? The fox.", "rejected": "What is red? The owl."}, "What is red? The", " fox.", " owl."),
    "a common line": ({"chosen": "What is red?\nA: fox", "rejected": "What is red?\nA: owl"}, "What is red?\nA:", " fox", " owl"),
}
UNUSABLE = {
    "two questions": ({"chosen": ASKED + FOX, "rejected": [{"role": "user", "content": "Who?"}, *OWL]}, "whose completions answer different prompts"),
    "hh with a gap": ({"chosen": "\n\nHuman: What?\n\nAssistant: x\n\nHuman: Who?\n\nAssistant: \n\nHuman: Why?\n\nAssistant: c",
                       "rejected": "\n\nHuman: What?\n\nAssistant: The owl."}, "with an empty turn"),
    "null": ({"prompt": "What is red?", "chosen": "The fox.", "rejected": None, "margin": None}, "with an empty completion"),
    "no answer": ({"prompt": "What is red?", "chosen": "What is red?", "rejected": "What is red?x"}, "with an empty completion"),
    "no prompt": ({"prompt": " ", "chosen": "The fox.", "rejected": "The owl."}, "without a prompt"),
    "contradiction": ({"prompt": "Why?", "chosen": ASKED + FOX, "rejected": ASKED + OWL}, "whose prompt is not that of its completions"),
    "longer": ({"prompt": ASKED + FOX + ASKED, "chosen": ASKED + FOX + ASKED + FOX, "rejected": ASKED + OWL + ASKED + OWL},
               "whose prompt is not that of its completions"),
}
FORM = TOKENIZER.Form(RL.preference, "rl")


@pytest.mark.parametrize("name", PAIRS)
def test_every_layout_of_a_pair_is_read(name):
    record, prompt, chosen, rejected = PAIRS[name]
    assert RL.preference(record, "here", FORM) == {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 0.0}


@pytest.mark.parametrize("name", UNUSABLE)
def test_pairs_that_teach_nothing_are_left_out(name, tmp_path):
    record, why = UNUSABLE[name]
    good, left = PAIRS["texts"][0], TOKENIZER.LeftOut()
    path = write(tmp_path / "a.jsonl", [good, record])
    assert len(list(FORM.read(path, left))) == 1
    assert left.text() == f"; left out 1 {why} (the first: {path}:2)"


def test_a_column_called_text_does_not_decide_what_is_held_out():
    for other in ("something", 3, None):
        record = RL.prompt_record({"prompt": "What is red?", "text": other}, "here", FORM)
        assert record["text"] == other and TOKENIZER.prompt_key(record) == TOKENIZER.prompt_key({"messages": ASKED + FOX})


def test_tools_are_kept_in_every_form():
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert RL.preference({**PAIRS["messages"][0], "tools": given}, "here", FORM)["tools"] == tools
        assert RL.prompt_record({"prompt": ASKED, "tools": given}, "here", FORM)["tools"] == tools
    assert "tools" not in RL.preference({**PAIRS["messages"][0], "tools": None}, "here", FORM)


def test_single_texts_and_prompts_are_read(tmp_path):
    single = {"prompt": "What is red?", "completion": "The fox.", "label": 1}
    assert RL.preference(single, "here", FORM) == {"prompt": "What is red?", "completion": "The fox.", "label": True}
    assert RL.preference({"prompt": "What is red?", "completion": SYSTEM + ASKED + FOX, "label": "false"}, "here", FORM) == {"prompt": SYSTEM + ASKED, "completion": FOX, "label": False}
    path = write(tmp_path / "prompts.jsonl", [{"messages": ASKED + FOX, "answer": "fox"}, {"question": "Why?", "answer": "so #### 4"}, {"prompt": "Go on", "n": 3}])
    found = [record for _, record in TOKENIZER.Form(RL.prompt_record, "rl").read(path, TOKENIZER.LeftOut())]
    assert found == [{"answer": "fox", "completion": "The fox.", "prompt": ASKED}, {"question": "Why?", "answer": "so #### 4", "prompt": "Why?"}, {"n": 3, "prompt": "Go on"}]
    path = write(tmp_path / "sums.jsonl", [{"context": "1 + 1 =", "continuation": " 2"}])
    assert [record for _, record in TOKENIZER.Form(RL.prompt_record, "rl", {"prompt": "context", "answer": "continuation"}).read(path, TOKENIZER.LeftOut())] == [{"prompt": "1 + 1 =", "answer": " 2"}]


BAD_PAIRS = {
    "no pair": ({"prompt": "a", "answer": "b"}, "neither prompt + chosen + rejected"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "no common beginning"),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, "label 'good' must be true"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "margin 'big' must be a number"),
    "a system alone": ({"prompt": "What is red?", "chosen": SYSTEM + FOX, "rejected": SYSTEM + OWL}, "but no question; put the first into the key 'system'"),
    "a system of numbers": ({"prompt": "a", "system": 3, "chosen": "b", "rejected": "c"}, "system must be a string, found int"),
    "two kinds": ({"instruction": ASKED, "input": "red", "chosen": "b", "rejected": "c"}, "instruction and input are joined"),
    "half": ({"prompt": "What is red?", "chosen": ASKED + FOX, "rejected": "The owl."}, "one completion is a whole conversation, the other only an answer"),
    "answered": ({"prompt": ASKED + FOX, "chosen": FOX, "rejected": OWL}, "the prompt ends with the assistant's message"),
    "kind": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen: expected text or a list of messages"),
}


def test_a_completion_that_ends_with_a_question_is_left_out():
    with pytest.raises(TOKENIZER.Unusable, match="that does not end with the assistant's message"):
        RL.preference({"prompt": "a", "chosen": ASKED, "rejected": FOX}, "here", FORM)


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_named(name):
    with pytest.raises(UserError, match=f"here.*{BAD_PAIRS[name][1]}".replace("+", r"\+")):
        RL.preference(BAD_PAIRS[name][0], "here", FORM)


def token_logprobs(model, ids):
    """Log-probability of each token given those before it: ids (B, T) -> (B, T-1)."""
    return model(ids[:, :-1], targets=ids[:, 1:]).logprobs


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -------------------------------------------------------------------------------------- texts and their numbers


@pytest.fixture(scope="session")
def chat(tokenizer):
    """The session's tokenizer with a chat template."""
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    TOKENIZER.ensure_chat(own)
    return own


@pytest.mark.parametrize("prompt, said", [("What is red?", "The fox."), (ASKED + FOX + ASKED, OWL)])
def test_what_is_compared_is_what_is_served(chat, prompt, said):
    one = RL.make_example(chat, prompt, said, None, "here")
    assert one.ids[: one.start] == TOKENIZER.prompt_ids(chat, prompt)
    text = said if isinstance(said, str) else said[0]["content"]
    assert chat.decode(one.ids[one.start :]) == text + "<|im_end|>" and one.ids[-1] == TOKENIZER.chat_ends(chat).stop[0]


def test_of_several_turns_the_assistants_are_learnt(chat):
    one = RL.make_example(chat, ASKED, FOX + ASKED + OWL, None, "here")
    said = "".join(chat.decode([i]) if on else "~" for i, on in zip(one.ids, one.weights, strict=True))
    assert [part for part in said.split("~") if part] == ["The fox.<|im_end|>", "The owl.<|im_end|>"]
    assert one.ids[: one.start] == TOKENIZER.prompt_ids(chat, ASKED)
    [other] = RL.mismatched([RL.Pair("a", [one], ASKED), RL.Pair("b", [RL.make_example(chat, "Who?", "An owl.", None, "")], "Who?")], 0, 128)[1].examples
    assert sum(other.weights) == sum(one.weights) and other.ids[other.start :] == one.ids[one.start :]
    batch = RL.make_batch([RL.Pair("a", [one], ASKED)])
    assert batch["weights"].tolist() == [one.weights[1:]]


def test_answers_are_numbers_too():
    def judged(answer):
        return RL.exact_answer(RL.Sample(RL.Prompt("here:3", "?", [0], {"answer": answer}), 0, [1], "stop", "It is 9.", None))

    assert [judged(answer) for answer in (9, 9.0, "9", "so #### 9", 8)] == [1, 1, 1, 1, 0]
    with pytest.raises(UserError, match="here:3: answer is a list, exact_answer needs a text or a number"):
        judged(["9"])


def test_without_a_template_texts_stand_end_to_end(tokenizer):
    one = RL.make_example(tokenizer, "the red", " fox ran", None, "here")
    assert tokenizer.decode(one.ids[one.start : -1]) == " fox ran" and one.ids[-1] == tokenizer.eos_token_id
    assert one.ids[: one.start] == TOKENIZER.encode_prompt(tokenizer, "the red")


def some_pairs(tokenizer, count: int = 10) -> list[RL.Pair]:
    lines = make_text(3 * count, seed=4)
    texts = [(lines[i], lines[i + 1], lines[i + 2][: 5 + 3 * i]) for i in range(0, 3 * count, 3)]
    return [RL.Pair(f"line {i}", [RL.make_example(tokenizer, prompt, said, None, "") for said in sides], prompt, None, 0.1 * i) for i, (prompt, *sides) in enumerate(texts)]


def test_log_probabilities_of_pairs_are_those_of_transformers(model_folder, tokenizer):
    model, theirs = MODEL.load(model_folder), transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    own = some_pairs(tokenizer)
    sums, tokens, _ = RL.text_logps(model, RL.make_batch(own), 2)
    for i, item in enumerate(own):
        for s, side in enumerate(item.examples):
            logprobs = theirs(tensor([side.ids])).logits[0].log_softmax(-1)
            slow = sum(float(logprobs[t - 1, side.ids[t]]) for t in range(side.start, len(side.ids)))
            assert float(sums[i, s]) == pytest.approx(slow, abs=1e-4) and int(tokens[i, s]) == len(side.ids) - side.start


@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm"])
def test_losses_of_means_divide_by_the_length(kind, model_folder):
    model, settings = MODEL.load(model_folder), RL.RLSection(method="dpo", loss_type=kind, rpo_alpha=0.7).fill()
    pair = RL.Pair("here", [RL.Example([3, 4, 5, 6], [0, 1, 1, 1]), RL.Example([3, 9], [0, 1])], "a")
    batch = RL.make_batch([pair]) | {"real": tensor([True]), "reference": tensor([[-9.0, -4.0]])}
    loss, metrics = RL.preference_loss(settings)(model, batch, {"pairs": 1, "chosen": 3, "micro_batches": 1})
    chosen, rejected = float(token_logprobs(model, tensor([[3, 4, 5, 6]])).sum()), float(token_logprobs(model, tensor([[3, 9]])).sum())
    ahead = (chosen + 9) / 3 - (rejected + 4)
    expected = (ahead - 1) ** 2 if kind == "ipo" else math.log(1 + math.exp(-5 * ahead))  # beta 0.5 and 5
    assert float(metrics["loss"]) == pytest.approx(expected - 0.7 * chosen / 3, abs=1e-4)


def test_rewards_stand_at_the_last_token(model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head="score", changes={"labels": ["reward"]})
    model.config.pad_token_id = tokenizer.pad_token_id
    MODEL.save(model, tmp_path)
    TOKENIZER.save(tokenizer, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1
    own = some_pairs(tokenizer, 4)
    batch = {**RL.make_batch([item._replace(examples=[RL.followed(one) for one in item.examples]) for item in own]), "real": torch.ones(4, dtype=torch.bool), "margin": tensor([item.margin for item in own])}
    settings = RL.RLSection(method="reward", center_rewards_coefficient=0.05)
    loss, metrics = RL.reward_model_loss(settings)(model, batch, {"pairs": 4, "micro_batches": 1})
    scores = [[float(theirs(tensor([side.ids])).logits) for side in item.examples] for item in own]
    slow = [-math.log(1 / (1 + math.exp(-(c - r - item.margin)))) + 0.05 * (c + r) ** 2 for (c, r), item in zip(scores, own, strict=True)]
    assert float(loss) == pytest.approx(sum(slow) / 4, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(sum(c > r for c, r in scores) / 4)
    judge = RL.reward_model(str(tmp_path), tokenizer, "cpu", "rl.reward_funcs")
    samples = [RL.Sample(RL.Prompt("", "", one.ids[: one.start], {}), 0, one.ids[one.start :], "stop", "", None) for item in own for one in item.examples]
    assert judge(samples) == pytest.approx([x for pair in scores for x in pair], abs=1e-5)
    context = model.config.max_position_embeddings
    long = RL.Sample(RL.Prompt("", "", [5] * context, {}), 0, own[0].examples[0].ids, "stop", "", None)
    last = float(theirs(tensor([long.ids[-context:]])).logits)
    assert judge([long] * 65) == pytest.approx([last] * 65, abs=1e-4)


def stream_of(own, held, method, batch_size, grad_accum, model, **more):
    training = TRAIN.TrainingSection(max_steps=1, epochs=None, batch_size=batch_size, grad_accum=grad_accum, max_length=64)
    stream = RL.Pairs(own, held, RL.RLSection(method=method, **more).fill(), training)
    stream.start(TRAIN.Run(model, training, torch.device("cpu"), "no"))
    return stream


def moved(model_folder, by: float = 0.05):
    """A policy that has learnt something since it was the reference."""
    model = MODEL.load(model_folder)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.add_(by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return model.train()


@pytest.mark.parametrize("method", ["dpo", "simpo", "orpo", "kto", "reward"])
def test_a_step_is_the_same_however_it_is_cut(method, model_folder, tokenizer):
    """8 rows, 2 x 4 and 4 x 2: one loss, one gradient, also with fewer items than the step has rows."""
    own = some_pairs(tokenizer, 7)
    if method == "kto":
        own = [item._replace(examples=item.examples[:1], label=i % 3 > 0) for i, item in enumerate(own)]
    found = []
    for size in (8, 4, 2):
        model = MODEL.load(model_folder, head="score", changes={"labels": ["reward"]}) if method == "reward" else MODEL.load(model_folder)
        stream = stream_of(own, [], method, size, 8 // size, model)
        stream.ask_reference(model)
        with torch.no_grad():
            for i, weight in enumerate(model.parameters()):
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
        batches = [next(stream) for _ in range(8 // size)]
        totals = {name: max(sum(batch["counts"][name] for batch in batches), 1) for name in batches[0]["counts"]} | {"micro_batches": 8 // size}
        loss_fn = RL.reward_model_loss(stream.settings) if method == "reward" else RL.preference_loss(stream.settings)
        total = 0.0
        for batch in batches:
            loss, _ = loss_fn(model.train(), batch, totals)
            loss.backward()
            total += float(loss)
        found.append((total, [weight.grad for weight in model.parameters() if weight.grad is not None], [batch.get("baseline") for batch in batches]))
        assert totals["pairs"] == 7
    for total, gradients, baseline in found[1:]:
        assert total == pytest.approx(found[0][0], abs=1e-5)
        for one, other in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        if method == "kto":
            assert all(float(x) == pytest.approx(float(found[0][2][0]), abs=1e-5) for x in baseline)


def test_the_first_loss_of_dpo_is_log_two_and_the_reference_stays(model_folder, tokenizer):
    model = MODEL.load(model_folder)
    own = some_pairs(tokenizer, 4)
    stream = stream_of(own, own[:2], "dpo", 4, 1, model)
    batch, loss_fn = next(stream), RL.preference_loss(stream.settings)
    loss, metrics = loss_fn(model, batch, {**batch["counts"], "micro_batches": 1})
    texts = [pair.examples[0] for pair in own]  # and beside it the chosen texts' cross-entropy, by transformers' logits
    theirs, nats, tokens = transformers.AutoModelForCausalLM.from_pretrained(model_folder), 0.0, 0
    for text in texts:
        with torch.no_grad():
            logprobs = theirs(tensor([text.ids])).logits[0].float().log_softmax(-1)
        nats -= sum(float(logprobs[t - 1, text.ids[t]]) for t in range(text.start, len(text.ids)))
        tokens += len(text.ids) - text.start
    assert float(loss) == pytest.approx(math.log(2) + nats / tokens, abs=1e-4) and float(metrics["rewards/accuracies"]) == pytest.approx(0.5)
    assert float(metrics["preference_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    alone = stream_of(own, [], "dpo", 4, 1, model, rpo_alpha=0.0)
    loss, _ = RL.preference_loss(alone.settings)(model, batch, {"pairs": 4, "micro_batches": 1})
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    state = stream.state_dict()
    other = stream_of(own, own[:2], "dpo", 4, 1, moved(model_folder))  # resumed: the policy is no longer the reference
    other.load_state_dict(state)
    again = {tuple(row.tolist()): reference for row, reference in zip(batch["input_ids"][::2], batch["reference"], strict=True)}
    for row, reference in zip((later := next(other))["input_ids"][::2], later["reference"], strict=True):
        assert torch.equal(again[tuple(row.tolist())], reference)


def test_ktos_baseline_is_the_mean_gain_on_texts_of_others(model_folder, tokenizer):
    own = [item._replace(examples=item.examples[:1]) for item in some_pairs(tokenizer, 6)]
    start = MODEL.load(model_folder)
    stream = stream_of(own, [], "kto", 6, 1, start)
    stream.ask_reference(start)
    policy = moved(model_folder, 0.02)
    stream.run.model = policy
    batch = next(stream)
    total = 0.0
    for item, other in zip(own, stream.sets["train mismatched"], strict=True):
        [one], [mine] = other.examples, item.examples
        assert one.ids[: one.start] == mine.ids[: mine.start] and one.ids[one.start :] != mine.ids[mine.start :]
        assert any(one.ids[one.start :] == third.examples[0].ids[third.examples[0].start :] for third in own)
        both = [sum(float(token_logprobs(model, tensor([one.ids]))[0, t - 1]) for t in range(one.start, len(one.ids))) for model in (policy, start)]
        total += both[0] - both[1]
    assert float(batch["baseline"]) == pytest.approx(max(total / 6, 0.0), abs=1e-4)
    _, metrics = RL.preference_loss(stream.settings)(policy, batch, {"pairs": 6, "desirable": 6, "undesirable": 1, "micro_batches": 1})
    assert "rewards/accuracies" in metrics and "rewards/margins" not in metrics  # all are wanted, there is nothing between


def test_the_reference_is_the_policy_as_it_began(model_folder, tmp_path):
    """A copy of a whole policy; of one with an adapter, fresh or loaded, only the adapter is copied."""
    ids = torch.arange(10)[None]
    for kind in ("whole", "fresh", "loaded"):
        model = MODEL.load(model_folder)
        if kind == "fresh":
            SFT.attach_lora(model, str(model_folder), seed=1, r=4)
        elif kind == "loaded":
            MODEL.load_adapter(model, saved_adapter(model_folder, tmp_path, 2), train=True)
        before = model(ids).logits
        reference = RL.Reference(model)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1)
        after = model(ids).logits
        assert not torch.allclose(before, after)
        for _ in range(2):
            with reference(model) as frozen, torch.no_grad():
                assert (frozen is model) == (kind != "whole") and torch.equal(frozen(ids).logits, before)
            assert torch.equal(model(ids).logits, after)
        kept = sum(weight.numel() for weight in reference.adapter.values())
        assert kept == (0 if kind == "whole" else sum(weight.numel() for weight in model.parameters() if weight.requires_grad))


# ------------------------------------------------------------------------------------------------------ rewards


def sample(text: str, length: int = 4, **columns) -> RL.Sample:
    return RL.Sample(RL.Prompt("file:7", "Q", [1, 2], columns), 0, [3] * length, "stop", text, None)


@pytest.mark.parametrize("name, text, columns, reward", [
    ("exact_answer", "12 plus 30 is 42.", {"answer": "42"}, 1), ("exact_answer", "12 plus 30 is 142.", {"answer": "42"}, 0),
    ("exact_answer", "It is 42, or 43.", {"answer": "42"}, 0), ("exact_answer", "So 1,042 it is 1,042", {"answer": "She has... #### 1042"}, 1),
    ("exact_answer", "Sorted: a, b", {"answer": "A, b."}, 1), ("exact_answer", "-5", {"answer": "5"}, 0), ("exact_answer", "", {"answer": "5"}, 0),
    ("number_after:####", "so 3 #### 18", {"answer": "x #### 18"}, 1), ("number_after:####", "18", {"answer": "18"}, 0),
    ("number_after:=", "a = 1,000.0 b", {"answer": "1000"}, 1), ("regex:o+t", "a root", {}, 1), ("format:o+t", "a root", {}, 0), ("format:a .*", "a root", {}, 1),
    ("length:4", "x", {}, 1), ("length:2", "x", {}, 0), ("length:3", "x", {}, 2 / 3),
])
def test_named_rewards(name, text, columns, reward):
    assert RL.builtin(name)(sample(text, **columns)) == pytest.approx(reward)


FUNCTIONS = '''
import math
def letters(prompts, completions, completion_ids, worth, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(worth)
    return [w * len(c if isinstance(c, str) else c[0]["content"]) for c, w in zip(completions, worth)]
def sometimes(completions, **kwargs):
    return [None if "x" in c else 2 for c in completions]
def nan(completions, **kwargs):
    return [math.nan if "x" in c else 1.0 for c in completions]
def fails(completions, **kwargs):
    return [len(c) if "x" not in c else 1 / 0 for c in completions]
def short(completions, **kwargs):
    return [1.0]
async def later(completions, **kwargs):
    return [len(c) for c in completions]
'''


def judges(tmp_path, *names, weights=None):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    names = [name if ":" in name else f"{tmp_path}/own.py:{name}" for name in names]
    return RL.Judges(RL.RLSection(method="grpo", reward_funcs=names, reward_weights=weights), None, "cpu")


def test_custom_functions_are_called_as_trl_calls_them(tmp_path):
    both = [sample("abc", worth=2), sample("xy", worth=3)]
    judges(tmp_path, "letters", "sometimes", "length:4", weights=[1, 10, 0.5])(both)
    assert [one.rewards for one in both] == [[6, 2, 1], [6, None, 1]] and [one.reward for one in both] == [26.5, 6.5]
    talk = RL.Sample(RL.Prompt("file:7", ASKED, [1], {"worth": 1}), 0, [3], "stop", "abc", None)
    judges(tmp_path, "letters")([talk])
    assert talk.reward == 3


def test_an_async_function_is_awaited_and_someone_has_to_judge(tmp_path):
    both = [sample("abc", worth=2), sample("xy", worth=3)]
    judges(tmp_path, "later")(both)
    assert [one.reward for one in both] == [3, 2]
    with pytest.raises(UserError, match="file:7: rl.reward_funcs: every function .sometimes. returned None for the completion 'xy'"):
        judges(tmp_path, "sometimes")(both)


def judged_by(names, samples, state=None) -> RL.Judges:
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=names), None, "cpu")
    judges(samples, *[state][: state is not None])
    return judges


def test_asynchronous_functions_share_one_loop(tmp_path):
    (tmp_path / "own.py").write_text("""
import asyncio, torch
limit, loops = asyncio.Semaphore(1), set()
async def one(text):
    async with limit:
        await asyncio.sleep(0)
    loops.add(asyncio.get_running_loop())
    return len(text) + 10 * len(loops) + 100 * torch.is_grad_enabled() + 100 * torch.is_autocast_enabled("cpu")
async def first(completions, **_):
    return await asyncio.gather(*map(one, completions))
async def second(completions, **_):
    return await asyncio.gather(*map(one, completions))
async def leaves(completions, **_):
    raise SystemExit(1)
""")
    both = [sample("abc"), sample("xy")]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            judged_by([f"{tmp_path}/own.py:first", f"{tmp_path}/own.py:second"], both)
        assert [one.rewards for one in both] == [[13, 13], [12, 12]]
    with pytest.raises(UserError, match="leaves failed on file:7"):
        judged_by([f"{tmp_path}/own.py:leaves"], both)
    judged_by([f"{tmp_path}/own.py:first"], both)


def test_files_of_judges_keep_to_themselves(tmp_path):
    """They may have any name, import what lies beside them at any time, and replace nothing."""
    judge = """
from __future__ import annotations
import json, pickle, random
from dataclasses import dataclass
import helping
@dataclass
class Verdict:
    points: float = 0.0
def points(completions: list[str], **_) -> list[float]:
    import later.inside
    assert random.random() < 1 and json.dumps({}) == "{}"
    verdict = pickle.loads(pickle.dumps(Verdict(helping.POINTS + later.inside.POINTS)))
    return [verdict.points] * len(completions)
"""
    for folder, points in (("a", 1), ("b", 5)):
        (tmp_path / folder / "later").mkdir(parents=True)
        for name, text in (("MODEL.py", judge), ("random.py", judge), ("helping.py", f"POINTS = {points}"), ("later/inside.py", f"POINTS = {10 * points}")):
            (tmp_path / folder / name).write_text(text)
    before, path, texts = dict(sys.modules), list(sys.path), [sample("abc")]
    names = [f"{tmp_path}/{folder}/{name}.py:points" for folder in "ab" for name in ("MODEL", "random")]
    for _ in range(2):
        judged_by(names, texts)
        assert texts[0].rewards == [11, 11, 55, 55]
    assert sys.path == path and all(sys.modules[name] is module for name, module in before.items())
    assert not [name for name in sys.modules.keys() - before if not name.startswith("_user_")]


def test_functions_get_what_trl_gives_them(tmp_path):
    (tmp_path / "own.py").write_text("""
def state(trainer_state, log_metric, log_extra, completions):
    log_metric("seen", len(completions))
    log_extra("half", [text[:1] for text in completions])
    return [trainer_state.global_step + trainer_state.max_steps] * len(completions)
def unequal(completions, log_extra, **_):
    log_extra("half", [])
def word(completions, log_metric, **_):
    log_metric("seen", "many")
""")
    both = [sample("abc", worth=1), sample("xy", worth=2)]
    judges = judged_by([f"{tmp_path}/own.py:state"], both, RL.SimpleNamespace(global_step=3, max_steps=9, epoch=0.5))
    assert [one.reward for one in both] == [12, 12] and [one.extra for one in both] == [{"half": "a"}, {"half": "x"}] and judges.metrics == {"seen": [2.0]}
    for name, message in (("unequal", "log_extra.'half'. got 0 values for 2 completions"), ("word", "log_metric.'seen', 'many'.: a finite number")):
        with pytest.raises(UserError, match=message):
            judged_by([f"{tmp_path}/own.py:{name}"], both)


@pytest.mark.parametrize("name, message", [("nan", "file:9: .*nan gave nan for the text 'xy'"), ("fails", "fails failed on file:9, text 'xy' .ZeroDivisionError.*own.py:11"),
                                           ("short", "returned 1 rewards for 2 completions"), ("letters", "letters failed on file:7")])
def test_functions_that_fail_are_named_with_their_record(name, message, tmp_path):
    both = [sample("abc"), sample("xy")]
    both[1].where = "file:9"
    with pytest.raises(UserError, match=message):
        judges(tmp_path, name)(both)


def test_rewards_are_numbers(tmp_path):
    (tmp_path / "odd.py").write_text("""
import torch
def grid(completions, **_): return torch.zeros(len(completions), 2)
def huge(completions, **_): return [10 ** 400] * len(completions)
def one(completions, **_): return torch.tensor(1.0)
def table(completions, **_): return {0: 1.0, 1: 2.0}
def tensors(completions, **_): return torch.ones(len(completions))
""")
    for name, message in (("grid", "file:7: grid gave .0.0, 0.0. for the text 'a'"), ("huge", "file:7: huge gave 1000"), ("one", "one returned float; expected a list"), ("table", "table returned dict")):
        with pytest.raises(UserError, match=message):
            RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/odd.py:{name}"]), None, "cpu")([sample("a"), sample("b")])
    both = [sample("a"), sample("b")]
    RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/odd.py:tensors"]), None, "cpu")(both)
    assert [one.reward for one in both] == [1, 1]


@pytest.mark.parametrize("name, message", [("exakt", "'exakt' is none of exact_answer"), ("none.py:f", "file not found: 'none.py'"), ("regex:(", "regex:\\("),
                                           ("length:-3", "length:-3: '-3' must be a number of tokens above 0"), ("length", "'length' must have the form length:TOKENS"), ("exact_answer:x", "must have the form exact_answer"), ("length:x", "length:x: 'x' must be a number"), ("no/where", "rl.reward_funcs"), ("number_afterwards", "is none of")])
def test_unknown_rewards_are_one_line(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        RL.Judges(RL.RLSection(method="grpo", reward_funcs=[name]), None, "cpu")
    (tmp_path / "own.py").write_text(FUNCTIONS)
    with pytest.raises(UserError, match="has no function 'other'; choose a function: .*own.py:letters, "):
        RL.Judges.find(f"{tmp_path}/own.py:other", None, "cpu")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="ends.py cannot be imported .SystemExit: 0"):
        RL.Judges.find(f"{tmp_path}/ends.py:f", None, "cpu")


def test_a_builtin_reward_is_added_with_one_entry(tmp_path, capsys, monkeypatch):
    """An entry in RL.REWARDS appears in the help text and in the error for unknown names, and can be used."""
    entry = '    "ends_with:TEXT": lambda text: lambda sample: float(sample.text.endswith(text)),\n'
    before, key, after = (ROOT / "RL.py").read_text().partition('    "length:TOKENS": ')
    (tmp_path / "changed.py").write_text(before + entry + key + after)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed", changed)  # dataclasses look it up there
    spec.loader.exec_module(changed)
    with pytest.raises(SystemExit):
        changed.main(["--rl.method", "grpo", "--help", "rl"])
    assert "ends_with:TEXT" in capsys.readouterr().out
    with pytest.raises(UserError, match="'nosuch' is none of exact_answer, .*ends_with:TEXT"):
        changed.Judges.find("nosuch", None, "cpu")
    assert [changed.builtin("ends_with:fox")(sample(text)) for text in ("a fox", "an owl")] == [1, 0]


def test_an_answer_that_is_missing_names_its_record_before_any_rollout():
    with pytest.raises(UserError, match="file:7: exact_answer needs the key 'answer'"):
        RL.exact_answer(sample("abc"))
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=["number_after:####", "length:5"]), None, "cpu")
    prompts = [RL.Prompt(f"file:{i}", "?", [0], {"answer": "3"} if i < 9 else {}) for i in range(10)]
    judges.check(prompts[:9])
    with pytest.raises(UserError, match="file:9: number_after needs the key 'answer'"):
        judges.check(prompts)


# ----------------------------------------------------------------------------------------------------- rollouts


class Letters:
    """A tokenizer whose ids are letters."""

    chat_template, eos_token_id = None, None

    def decode(self, ids, **_) -> str:
        return "".join("abc"[i] for i in ids)


class Worth:
    """Judges by letters: a text is worth the sum of its letters."""

    names, metrics = ["worth"], {}

    def __init__(self, **worth):
        self.worth = worth

    def __call__(self, samples, state) -> None:
        for one in samples:
            one.reward = sum(self.worth[letter] for letter in one.text)
            one.rewards = [one.reward]


def bandit(method: str, tmp_path, steps: int, **more) -> torch.Tensor:
    """One choice among three letters, worth 0, 0.5 and 1 -> the probabilities that are learnt."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8, initializer_range=0.5)
    model = MODEL.build(MODEL.ModelConfig(vocab_size=3, bos_token_id=None, eos_token_id=None, **sizes), ("lm", "value") if method == "ppo" else "lm", seed=3)
    settings = RL.RLSection(method=method, max_completion_length=1, **more).fill()
    training = TRAIN.TrainingSection(max_steps=steps, epochs=None, batch_size=settings.rollout_size, learning_rate=0.03, optim="adamw", weight_decay=0.0,
                                     lr_scheduler_type="linear", warmup_steps=0, mixed_precision="no", save_steps=0, max_length=8)
    prompts = [RL.Prompt("here", "a", [0], {})]
    reference = RL.Reference(model) if settings.beta else None
    start = model(tensor([[0]])).logits[0, 0].softmax(-1).detach()
    stream = RL.Rollouts(prompts, Letters(), Worth(a=0.0, b=0.5, c=1.0), settings, training, reference, tmp_path)
    TRAIN.fit(model, stream, RL.rollout_loss(settings), training, tmp_path, lambda model, folder: None, device=torch.device("cpu"))
    return start, model(tensor([[0]])).logits[0, 0].softmax(-1).detach()


@pytest.mark.parametrize("method, more", [("ppo", {}), ("grpo", dict(scale_rewards="none", num_generations=128)), ("rloo", dict(num_generations=128))])
def test_a_bandit_with_a_known_optimum_is_solved(method, more, tmp_path):
    """Without a reference the best letter is taken always; pulled towards one, the best policy is reference * exp(reward / beta)
    (Rafailov 2023, eq. 4), which PPO's whitened advantages leave where it is. GRPO's estimate of the KL has the gradient of the KL
    the other way round, KL(reference || policy), whose best policy is beta * reference / (c - reward) with c so that it adds up to 1."""
    _, alone = bandit(method, tmp_path, 80, rollout_size=128, beta=0.0, **more)
    assert float(alone[2]) > 0.95
    start, pulled = bandit(method, tmp_path, 200, rollout_size=128, beta=0.5, **more)
    worth = tensor([0.0, 0.5, 1.0])
    best = (start.log() + worth / 0.5).softmax(-1)
    if method == "grpo":
        low, high = 1.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float((0.5 * start / (middle - worth)).sum()) > 1 else (low, middle)
        best = 0.5 * start / (low - worth)
    torch.testing.assert_close(pulled, best, atol=0.05, rtol=0)


def rollouts(model, prompts, tmp_path, batch_size, method, judges, tokenizer, **more) -> RL.Rollouts:
    settings = RL.RLSection(**{**dict(method=method, rollout_size=16, num_generations=4, max_completion_length=8, rollout_batch_size=16), **more}).fill()
    training = TRAIN.TrainingSection(max_steps=1, epochs=None, batch_size=batch_size)
    stream = RL.Rollouts(prompts, tokenizer, judges, settings, training, RL.Reference(model) if settings.beta else None, tmp_path)
    stream.start(TRAIN.Run(model, training, torch.device("cpu"), "no"))
    return stream


class Named:
    names, metrics = ["length"], {}

    def __call__(self, samples, state) -> None:
        for one in samples:
            one.reward = float(len(one.text) % 5)
            one.rewards = [one.reward]


def asked(tokenizer, count: int = 6) -> list[RL.Prompt]:
    return [RL.Prompt(f"line {i}", text, TOKENIZER.encode_prompt(tokenizer, text[:12]), {}) for i, text in enumerate(make_text(count, seed=9))]


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 5)])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_an_unchanged_policy_has_ratio_one(method, temperature, top_k, model_folder, tokenizer, tmp_path):
    """Sampled, scored and trained log-probabilities agree, whatever the minibatches; the reference's too."""
    model = MODEL.load(model_folder, head=("lm", "value") if method == "ppo" else None)
    for size in (16, 4):
        stream = rollouts(model, asked(tokenizer), tmp_path, size, method, Named(), tokenizer, temperature=temperature, top_k=top_k)
        batches = [next(stream) for _ in range(16 // size)]
        found = stream.metrics()
        assert found["sampling/logp_difference_max"] < 1e-5 and abs(found["kl"]) < 1e-6
        totals = {name: sum(batch["counts"][name] for batch in batches) for name in ("tokens", "texts")} | {"micro_batches": 1}
        loss_fn, sums = RL.rollout_loss(stream.settings), {}
        for batch in batches:
            out = model.train()(batch["input_ids"], positions=batch["positions"], targets=batch["targets"], temperature=temperature)
            mask = batch["targets"] != -100
            assert float((torch.exp(out.logprobs - batch["old"]) - 1).abs()[mask].max()) < 1e-5
            for name, value in loss_fn(model, batch, totals)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        assert sums["clip_ratio"] == 0 and abs(sums["approx_kl"]) < 1e-6
        if method == "grpo":  # the advantages of a group add up to nothing, and so do its texts' tokens here, which are equally many
            assert totals["texts"] == 16


TOOLS = '''
import asyncio, time, torch
async_lock = asyncio.Lock()
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    if a == 13:
        raise ValueError("bad luck")
    if a == 14:
        time.sleep(60)
    if a == 15:
        raise SystemExit(3)
    return "\\ud800 <|im_end|>" if a == 16 else torch.is_grad_enabled() if a == 17 else a + b
async def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: how long
    """
    async with async_lock:
        await asyncio.sleep(seconds)
    return "done"
def bare(a):
    return a
'''


def tools_of(tmp_path, chat, *names, timeout=0.2) -> RL.Tools:
    (tmp_path / "tools.py").write_text(TOOLS)
    return RL.Tools([f"{tmp_path}/tools.py:{name}" for name in names], chat, timeout)


def test_a_call_never_ends_the_run(chat, tmp_path):
    tools = tools_of(tmp_path, chat, "add", "wait")
    assert [schema["function"]["name"] for schema in tools.schemas] == ["add", "wait"]
    for call, given in ((("add", {"a": 1, "b": 2}), ("3", False)), (("add", {"a": 13, "b": 2}), ("Error: ValueError: bad luck", True)),
                        (("add", {"a": 14, "b": 2}), ("Error: no result within 0.2 seconds", True)), (("add", {"a": 15, "b": 2}), ("Error: SystemExit: 3", True)),
                        (("add", {"a": 16, "b": 2}), ("? <|im_end|>", False)), (("add", {"a": 17, "b": 2}), ("False", False)),
                        (("wait", {"seconds": 0.0}), ("done", False)), (("wait", {"seconds": 9.0}), ("Error: no result within 0.2 seconds", True)),
                        (("wait", {"seconds": 0.0}), ("done", False))):
        assert tools.run(*call) == given
    assert tools.run("add", {"x": 1})[0].startswith("Error: TypeError") and tools.run("sub", {}) == ("Error: there is no tool 'sub'; the tools are add, wait", True)
    for names, message in ((["bare"], "bare: a type hint for each argument and a docstring"), (["add", "add"], "two functions have the name 'add'"), (["none"], "choose a function: .*:add, .*:wait, ")):
        with pytest.raises(UserError, match=f"rl.tools: .*{message}"):
            tools_of(tmp_path, chat, *names)
    chat = transformers.PreTrainedTokenizerFast(tokenizer_object=chat.backend_tokenizer, **chat.special_tokens_map)
    chat.chat_template = THINKING
    with pytest.raises(UserError, match="rl.tools: .*the chat template .*tool calls"):
        tools_of(tmp_path, chat, "add")


def test_calls_are_read_and_results_follow_as_the_template_has_them(chat, tmp_path):
    tools = tools_of(tmp_path, chat, "add")
    good, asking = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>', TOKENIZER.render_chat(chat, ASKED, tools.schemas, add_generation_prompt=True).ids

    def said(text: str, finish: str = "stop") -> RL.Sample:
        ids = chat(text + "<|im_end|>", add_special_tokens=False).input_ids
        return RL.Sample(RL.Prompt("here", ASKED, asking, {}), 0, ids, finish, text, [0.0] * len(ids))

    one = said("Let me see." + good)
    own = len(one.ids)
    assert tools.answer(one, 500) and (one.calls, one.failures, one.length) == (1, 0, own - one.start)
    whole = [*ASKED, *one.messages]
    assert [turn["role"] for turn in one.messages] == ["assistant", "tool"] and one.messages[1]["content"] == "5"
    assert one.ids == TOKENIZER.render_chat(chat, whole, tools.schemas, add_generation_prompt=True).ids and one.places == list(range(one.start, own))
    for text, failures, tail in (('<tool_call>{"name": "add", "arg', 1, "cannot be read"), (good + "<tool_call>{", 1, "cannot be read"), (good.replace("add", "sub"), 1, "no tool 'sub'"),
                                 (good.replace('"a"', '"c"'), 1, "unexpected keyword")):
        one = said(text)
        assert tools.answer(one, 500) and one.failures == failures and tail in one.messages[-1]["content"]
    one = said(good)
    assert not tools.answer(one, one.length + 4) and one.finish == "length" and len(one.messages) == 1 and one.ids[one.start :] == chat(good + "<|im_end|>", add_special_tokens=False).input_ids
    for one in (said("It is 5."), said(good, "length")):
        assert not tools.answer(one, 500) and not one.calls


def test_a_missing_column_is_reported_before_anything_is_generated(tmp_path):
    (tmp_path / "judge.py").write_text("def wants(completions, target, *, size, prompts, limit=3, **_):\n    return [0.0 for _ in completions]\n")
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/judge.py:wants"]), None, "cpu")
    with pytest.raises(UserError, match="rl.reward_funcs: wants needs the key 'size', and the records have prompt, target; name it in rl.columns"):
        judges.check([RL.Prompt("here", "?", [0], {"target": 1})])
    judges.check([RL.Prompt("here", "?", [0], {"target": 1}), RL.Prompt("there", "?", [0], {"size": 1})])


def test_a_file_that_was_just_rewritten_is_loaded_anew(tmp_path, monkeypatch):
    """Python's cache of compiled files compares whole seconds and the size."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for text in ("1", "2", "3"):
        (tmp_path / "judge.py").write_text(f"def judge(completions, **_):\n    return [{text}.0 for _ in completions]\n")
        assert RL.user_function(f"{tmp_path}/judge.py:judge", "rl.reward_funcs")(completions=["a"]) == [float(text)]


# A file of tools that takes each completion of an even prompt for a call, in whatever process it is loaded.
ALWAYS = TOOLS + '''
import RL
def always(self, sample):
    if sample.number % 2 or sample.finish != "stop":
        return []
    sample.finish = "tool_calls"
    return [("add", {"a": sample.number, "b": len(sample.messages)})]
RL.Tools.read = always
'''


@pytest.fixture
def always(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(RL.Tools, "read", RL.Tools.read)  # restored afterwards
    (tmp_path / "always.py").write_text(ALWAYS)
    return f"{tmp_path}/always.py:add"


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_only_what_the_policy_wrote_is_learned(method, world, chat, tmp_path, always):
    """In rollouts with tools too, sampled log-probabilities are those of a full forward, whatever the batches."""
    model = MODEL.load(world / "base", head=("lm", "value") if method == "ppo" else None)
    model.config.eos_token_id = list(range(4, 60))  # short turns
    prompts = [RL.Prompt(f"line {i}", ASKED, TOKENIZER.prompt_ids(chat, ASKED), {}) for i in range(3)]
    found = []
    for size in (16, 3):
        stream = rollouts(model, prompts, tmp_path, 16, method, Named(), chat, max_completion_length=64, rollout_batch_size=size,
                          tools=[always], max_turns=3, num_generations=2)
        stream.tools = RL.Tools(stream.settings.tools, chat, 9.0)
        batch = next(stream)
        found.append([sample.ids for sample in stream.samples])
        logged = stream.metrics()
    assert found[0] == found[1] and logged["sampling/logp_difference_max"] < 1e-5 and logged["tools/call_frequency"] > 0.5 and logged["tools/failure_frequency"] == 0
    several = [sample for sample in stream.samples if len(sample.messages) == 5]
    assert several and {len(sample.messages) for sample in stream.samples} <= {1, 3, 5} and len({str(sample.ids) for sample in several}) > len(several) // 2
    for sample in stream.samples:
        assert len(sample.old) == len(sample.sampled) == sample.length == len(sample.places) <= len(sample.ids) - sample.start <= 64
        written = token_logprobs(model, tensor([sample.ids]))[0, tensor(sample.places) - 1]
        torch.testing.assert_close(tensor(sample.sampled), written.detach(), atol=1e-5, rtol=0)
        others = sorted(set(range(sample.start, len(sample.ids))) - set(sample.places))
        assert bool(others) == (len(sample.messages) > 1) and chat.decode([sample.ids[i] for i in others]).count("<|im_start|>tool") == len(sample.messages) // 2
    assert int((batch["targets"] != -100).sum()) == batch["counts"]["tokens"] == sum(sample.length for sample in stream.samples)
    for row, ids in enumerate(batch["input_ids"]):
        [sample] = [one for one in stream.samples if one.ids[:-1] == ids[: int(batch["positions"][row].max()) + 1].tolist()][:1]
        places = (batch["targets"][row] != -100).nonzero()[:, 0]
        assert places.tolist() == [place - 1 for place in sample.places] and torch.equal(batch["old"][row, places], sample.old)
    if method == "ppo":  # the last token of a text of several turns gets the reward, and earlier turns learn of it
        sample = several[0]
        kl = stream.settings.beta * (sample.old - sample.reference)
        torch.testing.assert_close(sample.returns, sample.reward - (kl.flip(0).cumsum(0).flip(0)), atol=1e-4, rtol=0)


def test_a_run_with_tools_goes_on_exactly(chat, tmp_path, monkeypatch, capsys, always):
    """Judges see the turns, rollouts.jsonl shows them, held-out prompts are answered with tools as well. Two processes learn as one."""
    config = MODEL.ModelConfig(vocab_size=len(chat), bos_token_id=chat.bos_token_id, eos_token_id=list(range(4, 60)), initializer_range=0.2, hidden_size=32,
                               intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=700)
    MODEL.save(MODEL.build(config, seed=1), tmp_path / "base")
    TOKENIZER.save(chat, tmp_path / "base")
    (tmp_path / "judge.py").write_text("def turns(completions, log_metric, log_extra, **_):\n    log_metric('turns', 7)\n    log_extra('roles', [[t['role'] for t in c] for c in completions])\n"
                                       "    return [len(c) + len(c[-1]['content']) % 3 for c in completions]\n")
    for name, numbers in (("prompts", range(4)), ("held", range(20, 22))):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"What is {i}?"} for i in numbers])
    monkeypatch.setattr(TRAIN, "plot_curves", lambda *_, **__: None)  # takes longer than these steps
    flags = in_file(tmp_path / "own.yaml", ["--model", tmp_path / "base", "--data", tmp_path / "prompts.jsonl", "--data.validation", tmp_path / "held.jsonl", "--rl.method", "grpo", "--rl.tools", always, "--rl.reward_funcs",
                                            f"{tmp_path}/judge.py:turns", "--rl.num_generations", "2", "--rl.rollout_size", "4", "--batch-size", "4", "--max-length", "700", "--rl.max_completion_length", "64", "--max-steps", "2",
                                            "--training.save_steps", "1", "--training.save_total_limit", "9", "--training.logging_steps", "1", "--training.sample_tokens", "0"], RL, "rl")
    result = RL.main([*flags, "--out", str(tmp_path / "run")])
    text = (tmp_path / "run" / "rollouts.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) == 8 and {"messages", "roles"} <= set(records[0]) and any(record["roles"] == ["assistant", "tool", "assistant", "tool", "assistant"] for record in records)
    assert all(record["roles"] == [turn["role"] for turn in record["messages"]] for record in records)
    log = log_of(tmp_path / "run")
    assert log[0]["eval_turns"] == 7 and any(record.get("turns") == 7 and record["tools/call_frequency"] > 0 for record in log)
    again = RL.main([*flags, "--out", str(tmp_path / "run"), "--resume", str(tmp_path / "run" / "ckpt-step-000001")])
    assert again.after == result.after and (tmp_path / "run" / "rollouts.jsonl").read_text() == text
    two_processes(tmp_path, {"RL": [[*flags, "--batch-size", "2", "--training.mixed_precision", "no", "--out", str(tmp_path / "two")]]})
    RL.main([*flags, "--training.mixed_precision", "no", "--out", str(tmp_path / "one")])
    for key in ("loss", "grad_norm", "reward", "tools/call_frequency"):
        values = [[record[key] for record in log_of(tmp_path / name) if key in record] for name in ("one", "two")]
        assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], abs=1e-5), key
    texts = [[json.loads(line)["messages"] for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert texts[0] == texts[1]
    capsys.readouterr()
    RL.main([*flags, "--dry-run"])
    assert "add" in capsys.readouterr().out.split("What is")[0]  # the tool's schema, before the question
    with pytest.raises(UserError, match="whose prompt with the schemas of rl.tools and 64 tokens"):
        RL.main([*flags, "--max-length", "100", "--dry-run"])


def test_advantages_reach_the_right_tokens(model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head=("lm", "value"))
    with torch.no_grad():
        model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    stream = rollouts(model, asked(tokenizer), tmp_path, 16, "ppo", Named(), tokenizer, num_generations=1, gamma=0.9, lam=0.8, beta=0.3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.02)
    batch = next(stream)
    assert [one.number for one in stream.samples] == list(range(16))
    start = MODEL.load(model_folder)
    raw, rows = [], []
    for one in stream.samples:
        ids = tensor([one.ids])
        assert one.ids[: one.start] == asked(tokenizer)[int(one.where.split()[1])].ids
        with torch.no_grad():
            now, then = (token_logprobs(m, ids)[0, one.start - 1 :] for m in (model, start))
            values = model(ids, want=("values",)).values[0, one.start - 1 : -1]
        torch.testing.assert_close(one.old, now, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.reference, then, atol=1e-5, rtol=0)
        rewards = -0.3 * (now - then)
        rewards[-1] += one.reward
        advantages, returns = RL.gae(rewards[None], values[None], torch.ones(1, one.length, dtype=torch.bool), 0.9, 0.8)
        torch.testing.assert_close(one.returns, returns[0], atol=1e-4, rtol=0)
        raw.append(advantages[0])
        rows.append(one)
    everything = torch.cat(raw)
    for one, own in zip(rows, raw, strict=True):
        torch.testing.assert_close(one.advantages, (own - everything.mean()) / everything.std(), atol=1e-4, rtol=0)
    for row, ids in enumerate(batch["input_ids"]):
        [one] = [one for one in stream.samples if one.ids[:-1] == ids[: len(one.ids) - 1].tolist() and batch["positions"][row].max() == len(one.ids) - 2][:1]
        places = (batch["targets"][row] != -100).nonzero()[:, 0]
        assert places.tolist() == list(range(one.start - 1, len(one.ids) - 1)) and batch["targets"][row, places].tolist() == one.ids[one.start :]
        assert torch.equal(batch["advantages"][row, places], one.advantages)


def test_equal_rewards_teach_nothing_and_cut_texts_can_be_left_out(model_folder, tokenizer, tmp_path):
    class Alike(Named):
        def __call__(self, samples, state) -> None:
            for one in samples:
                one.reward, one.rewards = 1.0, [1.0]

    model = MODEL.load(model_folder)
    stream = rollouts(model, asked(tokenizer), tmp_path, 16, "grpo", Alike(), tokenizer, beta=0.0)
    batch = next(stream)
    loss, _ = RL.rollout_loss(stream.settings)(model, batch, {"tokens": 1, "texts": 1, "micro_batches": 1})
    loss.backward()
    assert stream.metrics()["frac_reward_zero_std"] == 1 and all(not weight.grad.any() for weight in model.parameters())
    stream = rollouts(model, asked(tokenizer), tmp_path, 16, "grpo", Named(), tokenizer, mask_truncated_completions=True)
    batch = next(stream)
    cut = sum(one.finish == "length" for one in stream.samples)
    assert cut > 0 and batch["counts"]["texts"] == 16 and int((batch["targets"] != -100).any(1).sum()) == 16 - cut


def test_a_judge_that_fails_leaves_the_stream_at_its_step(model_folder, tokenizer, tmp_path):
    class Failing(Named):
        calls = 0

        def __call__(self, samples, state) -> None:
            super().__call__(samples, state)
            self.calls += 1
            if self.calls == 3:
                raise UserError("the service is gone")

    def stream():
        return rollouts(model, asked(tokenizer), tmp_path, 16, "grpo", Failing(), tokenizer)

    model = MODEL.load(model_folder)
    first = stream()
    next(first), next(first)
    before = first.state_dict()
    with pytest.raises(UserError, match="the service is gone"):
        next(first)
    assert repr(first.state_dict()) == repr(before)
    again = stream()
    again.load_state_dict(before)
    text = (tmp_path / "rollouts.jsonl").read_text()
    assert torch.equal(next(again)["input_ids"], next(first)["input_ids"]) and again.rollout == first.rollout == 3
    assert (tmp_path / "rollouts.jsonl").read_text().startswith(text)


def test_other_prompts_or_columns_are_not_continued(model_folder, tokenizer, tmp_path):
    """A resume that is refused leaves the transcripts as they were."""
    model, prompts = MODEL.load(model_folder), asked(tokenizer)
    stream = rollouts(model, prompts, tmp_path, 16, "grpo", Named(), tokenizer)
    next(stream)
    state = stream.state_dict()
    next(stream)
    text = (tmp_path / "rollouts.jsonl").read_text()
    for other in (prompts[:-1], [*prompts[:-1], prompts[-1]._replace(columns={"answer": 7})], [prompts[0]._replace(ids=[5, 6]), *prompts[1:]]):
        with pytest.raises(UserError, match="--resume: prompts or columns differ from those of the checkpoint"):
            rollouts(model, other, tmp_path, 16, "grpo", Named(), tokenizer).load_state_dict(state)
    again = rollouts(model, prompts, tmp_path, 16, "grpo", Named(), tokenizer)
    again.load_state_dict(state)
    assert (tmp_path / "rollouts.jsonl").read_text() == text
    next(again)
    assert (tmp_path / "rollouts.jsonl").read_text() == text


@pytest.mark.parametrize("method, more", [("ppo", {}), ("grpo", dict(beta=0.0)), ("rloo", {})])
def test_losses_are_weighted_by_the_samplers_ratio(method, more, model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head=("lm", "value") if method == "ppo" else "lm")
    batch = next(rollouts(model, asked(tokenizer), tmp_path, 16, method, Named(), tokenizer, **more))
    torch.testing.assert_close(batch["sampled"], batch["old"], atol=1e-4, rtol=0)
    mask, totals = batch["targets"] != -100, {**batch["counts"], "micro_batches": 1}
    length = mask.sum(1, keepdim=True) if method == "rloo" else 1  # there a completion has one ratio
    batch["advantages"] = torch.ones_like(batch["advantages"])
    for largest, factor, loss in ((None, 9.0, -1.0), (3.0, 1.0, -1.0), (3.0, 0.5, -0.5), (3.0, 9.0, -3.0)):
        loss_fn = RL.rollout_loss(RL.RLSection(method=method, importance_sampling_clip_max=largest, **more).fill())
        batch["sampled"] = (batch["old"] - math.log(factor) / length) * mask
        assert float(loss_fn(model, batch, totals)[1]["policy_loss"]) == pytest.approx(loss, rel=1e-4)


def test_groups_with_equal_rewards_are_drawn_again(model_folder, tokenizer, tmp_path):
    class Some(Named):
        def __call__(self, samples, state) -> None:
            for i, one in enumerate(samples):
                one.reward = float(i % 2 and one.number % 3 == 0)  # prompts 0, 3, 6, ... have varied rewards
                one.rewards = [one.reward]

    model = MODEL.load(model_folder)
    for limit, numbers, drawn in ((0, [0, 1, 2, 3], 4), (1, [0, 1, 2, 3], 6), (2, [0, 1, 3, 6], 8), (9, [0, 3, 6, 9], 10)):
        stream = rollouts(model, asked(tokenizer), tmp_path, 16, "grpo", Some(), tokenizer, beta=0.0, dynamic_sampling=limit)
        next(stream)
        assert [one.number for one in stream.samples[::4]] == numbers and stream.drawn == drawn and len(stream.samples) == 16
        assert stream.metrics().get("frac_redrawn", 0.0) == pytest.approx(1 - 4 / drawn)
    other = rollouts(model, asked(tokenizer), tmp_path, 16, "grpo", Some(), tokenizer, beta=0.0, dynamic_sampling=9)
    other.load_state_dict(stream.state_dict())
    for one in (stream, other):
        next(one)
    assert [one.ids for one in stream.samples] == [one.ids for one in other.samples] and stream.drawn == other.drawn > 18


def test_no_dropout_remains(tmp_path):
    model = MODEL.build(MODEL.ModelConfig(vocab_size=40, attention_dropout=0.3, resid_pdrop=0.3, embd_pdrop=0.3, hidden_size=32, intermediate_size=48,
                                          num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)).train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    RL.still(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                                                                dropout=0.3, attention_dropout=0.3, max_position_embeddings=32))
    theirs.save_pretrained(tmp_path)
    model = MODEL.load(tmp_path).train()
    RL.still(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="session")
def world(tmp_path_factory, chat, tokenizer):
    """(model folder with a chat template, pairs, prompts): chosen texts say fox, prompts ask for a colour."""
    folder = tmp_path_factory.mktemp("world")
    config = MODEL.ModelConfig(vocab_size=len(chat), bos_token_id=chat.bos_token_id, eos_token_id=chat.eos_token_id, initializer_range=0.2, hidden_size=32,
                               intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    MODEL.save(MODEL.build(config, seed=1), folder / "base")
    TOKENIZER.save(chat, folder / "base")
    lines = make_text(240, seed=5)
    write(folder / "pairs.jsonl", [{"prompt": a, "chosen": "fox fox", "rejected": b} for a, b in zip(lines[:80], lines[80:160], strict=True)])
    write(folder / "prompts.jsonl", [{"prompt": a[:20], "answer": "fox"} for a in lines[160:]])
    return folder


def flags_of(world, method: str) -> list[str]:
    online = method in RL.ON_POLICY
    flags = ["--model", world / "base", "--data", world / ("prompts.jsonl" if online else "pairs.jsonl"), "--rl.method", method, "--batch-size", "8", "--learning-rate", "3e-3",
             "--training.logging_steps", "1", "--training.sample_tokens", "4", "--training.warmup_steps", "0"]
    flags += ["--rl.rollout_size", "16", "--rl.max_completion_length", "6", "--rl.reward_funcs", "regex:o", "length:3", "--rl.eval_prompts", "6"] if online else []
    return in_file(world / f"{method}.yaml", flags, RL, "rl")


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


STEPS = {"ppo": 16, "grpo": 8, "rloo": 8}


@pytest.mark.parametrize("method, more", [*[(method, []) for method in (*RL.OFFLINE, *RL.ON_POLICY)], ("dpo", ["--lora.r", "4"]), ("ppo", ["--lora.r", "4"]),
                                          ("grpo", ["--lora.r", "4", "--rl.num_iterations", "2", "--rl.dynamic_sampling", "2", "--rl.num_generations", "2"])])
def test_every_method_learns_and_resumes_to_the_last_bit(method, more, world, tmp_path):
    """From a checkpoint, inside a rollout too, what follows is what an undisturbed run does."""
    steps = STEPS.get(method, 12)
    flags = [*flags_of(world, method), *more, "--max-steps", str(steps), "--training.save_steps", str(steps // 2 - 1), "--training.save_total_limit", "9"]
    result = RL.main([*flags, "--out", str(tmp_path / "whole")])
    measure = {"reward": "accuracy", **dict.fromkeys(RL.ON_POLICY, "reward")}.get(method, "rewards/accuracies")
    saved = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert saved["measure"] == measure and saved["stage"] == "rl" and saved["after"] == result.after
    if method in RL.OFFLINE:
        assert saved["after"][measure] > 0.9 and saved["after"]["loss"] < saved["before"]["loss"]
    checkpoint = TRAIN.checkpoints(tmp_path / "whole")[0]
    assert int(checkpoint.name[-6:]) < steps
    text = (tmp_path / "whole" / "rollouts.jsonl").read_text() if method in RL.ON_POLICY else ""
    again = RL.main([*flags, "--out", str(tmp_path / "again"), "--resume", str(checkpoint)])
    assert again.after == result.after
    whole, other = ([record["loss"] for record in log_of(tmp_path / name) if "loss" in record and record["step"] > int(checkpoint.name[-6:])] for name in ("whole", "again"))
    assert whole == other and len(whole) == steps - int(checkpoint.name[-6:])
    if text:
        assert next(record["kl"] for record in log_of(tmp_path / "whole") if "kl" in record) == 0
        rest = (tmp_path / "again" / "rollouts.jsonl").read_text()
        assert rest and text.endswith(rest) and (tmp_path / "whole" / "rollouts.png").exists()
        first = json.loads(text.splitlines()[0])
        assert {"rollout", "prompt", "completion", "reward", "rewards", "advantage", "finish_reason", "kl"} <= set(first)
    if "--lora.r" in more:
        MODEL.load(str(world / "base"), adapter=tmp_path / "whole")
    else:
        names = set(load_file(tmp_path / "whole" / "model.safetensors"))
        assert ("score.weight" in names) == (method == "reward") and not any("value" in name for name in names)
        kind = transformers.AutoModelForSequenceClassification if method == "reward" else transformers.AutoModelForCausalLM
        kind.from_pretrained(tmp_path / "whole")


def test_a_run_goes_on_in_its_folder_without_writing_texts_twice(world, tmp_path):
    flags = [*flags_of(world, "grpo"), "--out", str(tmp_path / "run"), "--training.save_steps", "2"]
    RL.main([*flags, "--max-steps", "4", "--training.lr_scheduler_type", "constant"])
    for folder in TRAIN.checkpoints(tmp_path / "run")[1:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    before = (tmp_path / "run" / "rollouts.jsonl").read_text()
    RL.main([*flags, "--max-steps", "4", "--training.lr_scheduler_type", "constant", "--resume", "auto"])
    assert (tmp_path / "run" / "rollouts.jsonl").read_text() == before and before.count("\n") == 32


def test_inside_a_rollout_a_run_goes_on_however_a_step_is_cut(world, tmp_path):
    flags = [*flags_of(world, "ppo"), "--max-steps", "8", "--rl.num_iterations", "4", "--training.mixed_precision", "no"]
    RL.main([*flags, "--training.save_steps", "3", "--training.save_total_limit", "9", "--out", str(tmp_path / "whole")])
    cut = ["--batch-size", "4", "--resume", str(tmp_path / "whole" / "ckpt-step-000003")]
    RL.main([*cut, "--grad-accum", "2", "--out", str(tmp_path / "cut")])
    whole, other = ([record["loss"] for record in log_of(tmp_path / name) if "loss" in record and record["step"] > 3] for name in ("whole", "cut"))
    assert len(whole) == 5 and other == pytest.approx(whole, abs=1e-5)
    with pytest.raises(UserError, match="40 samples of the checkpoint's rollout are left, which do not fill optimizer steps of 16"):
        RL.main([*cut, "--grad-accum", "4", "--out", str(tmp_path / "wide")])


def test_a_resumed_run_that_ends_in_its_rollout_leaves_no_later_ones(world, tmp_path):
    flags = [*flags_of(world, "grpo"), "--rl.num_iterations", "2", "--training.save_steps", "1", "--training.save_total_limit", "9", "--out", str(tmp_path)]
    RL.main([*flags, "--max-steps", "8"])

    def rollouts() -> set[int]:
        return {json.loads(line)["rollout"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()}

    assert rollouts() == {1, 2}
    RL.main([*flags, "--max-steps", "3", "--resume", str(tmp_path / "ckpt-step-000002")])
    assert rollouts() == {1}


def test_ppo_learns_from_a_reward_model(world, tmp_path, capsys, monkeypatch):
    RL.main([*flags_of(world, "reward"), "--max-steps", "12", "--out", str(tmp_path / "reward")])
    talk = {"messages": [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "fox fox"}], "n": 7}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(talk) + "\n"))
    capsys.readouterr()
    INFER.main(["--model", str(tmp_path / "reward"), "--jsonl"])
    served = json.loads(capsys.readouterr().out)
    tokenizer = TOKENIZER.load(str(tmp_path / "reward"))
    judged = RL.make_example(tokenizer, "What is red?", "fox fox", None, "")
    one = RL.Sample(RL.Prompt("", "", judged.ids[: judged.start], {}), 0, judged.ids[judged.start :], "stop", "", None)
    assert served["n"] == 7 and [served["reward"]] == pytest.approx(RL.reward_model(str(tmp_path / "reward"), tokenizer, "cpu")([one]), abs=1e-5)
    kept, usual = [], RL.Rollouts.write_transcripts
    monkeypatch.setattr(RL.Rollouts, "write_transcripts", lambda self: (kept.extend(self.samples), usual(self)))
    flags = [*flags_of(world, "ppo"), "--rl.reward_funcs", str(tmp_path / "reward")]
    RL.main([*flags, "--data", str(world / "pairs.jsonl"), "--max-steps", "8", "--rl.missing_eos_penalty", "0.5", "--out", str(tmp_path / "ppo")])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert len(kept) == 64
    for one in kept:
        assert one.rewards == pytest.approx([float(theirs(tensor([one.ids])).logits)], abs=1e-4)
        assert one.reward == pytest.approx(one.rewards[0] - 0.5 * (one.finish == "length"))
    log = [line for line in log_of(tmp_path / "ppo") if "explained_variance" in line]
    assert {"value_loss", "policy_loss", "clip_ratio", "approx_kl", "entropy", "kl", "reward", "completions/mean_length"} <= set(log[-1])


def test_another_reference_can_be_named(world, tmp_path):
    model = MODEL.load(str(world / "base"))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.2 * torch.randn(model.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(0)))
    MODEL.save(model, tmp_path / "other")
    TOKENIZER.save(TOKENIZER.load(str(world / "base")), tmp_path / "other")
    for method in ("dpo", "grpo"):
        alone = ["--rl.rpo_alpha", "0"] if method == "dpo" else []
        RL.main([*flags_of(world, method), *alone, "--max-steps", "2", "--rl.ref_model", str(tmp_path / "other"), "--out", str(tmp_path / method)])
    first = next(record for record in log_of(tmp_path / "dpo") if "loss" in record)
    assert abs(first["loss"] - math.log(2)) > 1e-3 and next(record for record in log_of(tmp_path / "grpo") if "kl" in record)["kl"] > 1e-3


def test_what_is_forgotten_is_measured_and_said(world, tmp_path, capsys):
    """`kept` is the exact match of greedy answers; losing more than ten points prints a warning."""
    model, tokenizer = MODEL.load(str(world / "base")), TOKENIZER.load(str(world / "base"))
    questions = make_text(6, seed=9)
    rows = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids = TOKENIZER.render_chat(tokenizer, messages, add_generation_prompt=True).ids
        [[answer]] = INFER.generate(model, [ids], INFER.Sampling(64, temperature=0), tokenizer)
        rows.append({"messages": [*messages, {"role": "assistant", "content": answer.text}], "answer": "x"})
    rows[0]["messages"][-1]["content"] += " other"
    write(tmp_path / "kept.jsonl", rows)
    flags = [*flags_of(world, "dpo"), "--rl.kept", str(tmp_path / "kept.jsonl"), "--max-steps", "6", "--learning-rate", "0.05", "--out", str(tmp_path / "out")]
    flags += ["--training.mixed_precision", "no"]
    result = RL.main(flags)
    assert result.before["kept"] == pytest.approx(5 / 6) and result.after["kept"] < 0.7
    assert re.search(r"warning: held-out kept fell from 83.3% to \d+.\d%", capsys.readouterr().err)
    with pytest.raises(UserError, match="rl.kept: file not found"):
        RL.main([*flags_of(world, "dpo"), "--rl.kept", "none.jsonl", "--out", str(tmp_path / "none")])


def test_an_adapter_can_be_the_reference(world, tmp_path):
    RL.main([*flags_of(world, "dpo"), "--lora.r", "2", "--max-steps", "2", "--out", str(tmp_path / "adapter")])
    RL.main([*flags_of(world, "dpo"), "--max-steps", "1", "--rl.ref_model", str(tmp_path / "adapter"), "--out", str(tmp_path / "run")])
    first = next(record for record in log_of(tmp_path / "run") if "loss" in record)
    assert first["loss"] != pytest.approx(math.log(2), abs=1e-6)


def test_a_loaded_adapter_is_the_reference_of_its_training(world, tmp_path):
    """Exactly: its KL is zero at first; and what has changed of it is not the reference."""
    adapter = saved_adapter(world / "base", tmp_path / "adapter", 3)
    for precision in ("no", "bf16"):
        RL.main([*flags_of(world, "rloo"), "--adapter", adapter, "--max-steps", "4", "--training.mixed_precision", precision, "--data.validation", "none", "--out", str(tmp_path / precision)])
        kl = [record["kl"] for record in log_of(tmp_path / precision) if "kl" in record]
        assert kl[0] == 0 < kl[-1]


def test_columns_may_hold_what_json_cannot(world, tmp_path):
    import pyarrow
    import pyarrow.parquet

    day = datetime.datetime(2020, 1, 2)
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}", "at": day}], "answer": "fox", "day": day, "raw": b"x"} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "judge.py").write_text("def late(completions, day, raw, **_): return [float(d.year + len(r)) for d, r in zip(day, raw)]\n")
    flags = in_file(tmp_path / "own.yaml", [*flags_of(world, "grpo"), "--data", tmp_path / "rows.parquet", "--data.validation", "none", "--rl.reward_funcs", f"{tmp_path}/judge.py:late",
                                            "--batch-size", "8", "--training.save_steps", "1", "--training.save_total_limit", "9", "--out", tmp_path / "run"], RL, "rl")
    RL.main([*flags, "--max-steps", "2"])
    assert json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])["reward"] == 2021
    RL.main([*flags, "--max-steps", "2", "--resume", str(tmp_path / "run" / "ckpt-step-000001")])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(UserError, match="bad.jsonl:1: the key 'completions' is what reward functions are given"):
        RL.main([*flags, "--data", str(bad), "--max-steps", "2", "--out", str(tmp_path / "bad")])


def test_among_equally_good_models_the_loss_decides(world, tmp_path, monkeypatch):
    values = iter([(0.5, 3.0), (1.0, 2.0), (1.00000001, 1.0), (1.0, 1.5), (1.0, 1.6), (1.0, 1.0)])
    monkeypatch.setattr(RL, "held_out_pairs", lambda *_: lambda model: dict(zip(("accuracy", "loss"), next(values), strict=True)))
    flags = [*flags_of(world, "reward"), "--max-steps", "8", "--training.eval_steps", "2", "--training.load_best_model_at_end", "true", "--out", str(tmp_path / "run")]
    RL.main(flags)
    best, final = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("ckpt-step-000004", "."))
    assert all(torch.equal(best[name], final[name]) for name in best)


# ------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_be_compared_is_left_out_and_named(world, tmp_path, capsys):
    long = " ".join(make_text(40))
    good = [{"prompt": f"Say {i}", "chosen": "fox", "rejected": "owl"} for i in range(8)]
    bad = [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": "x", "rejected": " "}, {"prompt": long, "chosen": "x", "rejected": "y"}]
    data = write(tmp_path / "pairs.jsonl", bad + good)
    flags = in_file(tmp_path / "own.yaml", [*flags_of(world, "dpo"), "--data", data, "--data.validation", "none", "--max-steps", "1"], RL, "rl")
    RL.main([*flags, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "8 pairs" in said
    for line, why in ((1, "whose completions are the same"), (2, "with an empty completion"), (3, "whose prompt fills training.max_length 128")):
        assert f"left out 1 {why} (the first: {data}:{line})" in said
    with pytest.raises(UserError, match="0 pairs are left, at least 1 needed.*; left out 1 whose completions are the same"):
        RL.main([*flags, "--data", str(write(tmp_path / "bad.jsonl", bad)), "--out", str(tmp_path / "none")])
    twice = write(tmp_path / "twice.jsonl", good + good[:2] + [{"chosen": [*ASKED, *FOX], "rejected": [{"role": "user", "content": "Who?"}, *OWL]}])
    RL.main([*flags, "--data", str(twice), "--out", str(tmp_path / "twice")])
    said = capsys.readouterr().err
    assert f"left out 2 duplicates (the first: {twice}:9)" in said and f"left out 1 whose completions answer different prompts (the first: {twice}:11)" in said
    (tmp_path / "empty.jsonl").write_text("\n")
    for key in ("--data", "--data.validation"):
        with pytest.raises(UserError, match=f"data.{'train' if key == '--data' else 'validation'}: no pair in {tmp_path}/empty.jsonl"):
            RL.main([*flags, key, str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "none")])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": long, "answer": "x"}])
    with pytest.raises(UserError, match=f"no prompt is left; left out 1 whose prompt and 6 tokens .* exceed training.max_length 128 .the first: {prompts}:1"):
        RL.main([*flags_of(world, "grpo"), "--data", str(prompts), "--data.validation", "none", "--max-steps", "1", "--out", str(tmp_path / "none")])


@pytest.mark.parametrize("method", ["dpo", "kto", "reward", "grpo"])
def test_dry_run_shows_what_is_trained_on(method, world, tmp_path, capsys):
    RL.main([*flags_of(world, method), "--dry-run", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and "prompt" in shown.split("tokens per ")[1] and "median" in shown
    if method == "grpo":
        assert shown.count("<|im_start|>assistant\n\n{\"answer\": \"fox\"}") == 3 and "at most 122 (training.max_length" in shown
    else:
        first = "desirable" if method == "kto" else "chosen"
        trained = "<|im_start|>assistant\nfox fox\033[32m<|im_end|>" if method == "reward" else "<|im_start|>assistant\n\033[32mfox fox<|im_end|>"
        assert shown.count("\033[32m") == 6 and f": {first}\n" in shown and f"{trained}\033[0m\n" in shown


@pytest.mark.parametrize("wanted, others, weights, said", [(1, 19, {}, "set rl.desirable_weight 19"), (30, 10, dict(desirable_weight=2.0), "set rl.undesirable_weight 6"),
                                                           (8, 8, {}, None), (1, 19, dict(desirable_weight=25.0), None), (5, 0, {}, "kto learns from both kinds")])
def test_kto_needs_both_kinds(wanted, others, weights, said, capsys):
    pairs = [RL.Pair("", [], "", label=i < wanted) for i in range(wanted + others)]
    RL.warn_imbalance(pairs, RL.RLSection(method="kto", **weights))
    told = capsys.readouterr().err
    assert said in told and f"{wanted} desirable and {others} undesirable completions" in told if said else not told


@pytest.mark.parametrize("flags, message", [
    (["--rl.method", "dpo", "--rl.gamma", "0.5"], "rl.gamma: has no effect with rl.method dpo .only with ppo"),
    (["--rl.method", "grpo", "--rl.loss_type", "sigmoid"], "rl.loss_type: 'sigmoid' is none of dapo, grpo, dr_grpo"),
    (["--rl.method", "kto", "--rl.loss_type", "hinge"], "kto has only one"),
    (["--rl.method", "grpo", "--rl.num_generations", "1"], "rl.num_generations: 1, but grpo compares"),
    (["--rl.method", "grpo", "--rl.num_generations", "3"], "rl.rollout_size: 16 does not hold whole groups of rl.num_generations 3"),
    (["--rl.method", "grpo", "--batch-size", "5"], "rl.rollout_size: 16 completions do not fill whole optimizer steps of training.batch_size 5"),
    (["--rl.method", "grpo", "--rl.reward_weights", "[1]"], "rl.reward_weights: 1 for 2 rl.reward_funcs"),
    (["--rl.method", "dpo", "--rl.beta", "0"], "rl.beta: must be above 0 for dpo"),
    (["--rl.method", "dpo", "--rl.loss_type", "robust"], "rl.label_smoothing: must be above 0 for rl.loss_type robust"),
    (["--rl.method", "dpo", "--lora.r", "2", "--lora.lora_dropout", "0.1"], "lora.lora_dropout: dropout is not available"),
    (["--rl.method", "grpo", "--rl.temperature", "0"], "rl.temperature: 0.0 must be at least 0.001"),
    (["--rl.method", "gppo"], "'gppo' is not one of"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.importance_sampling_level", "sequence"], "importance_sampling_level: sequence is not available"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.epsilon", "0.3"], "rl.epsilon: has no effect with rl.loss_type cispo"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.epsilon_high", "0.2"], "rl.epsilon_high: 0.2, the largest importance weight"),
    (["--rl.method", "dpo", "--training.report_to", "wandb"], "training.report_to: wandb needs `pip install wandb`"),
])
def test_settings_that_cannot_work_are_one_line(flags, message, world, tmp_path):
    method = flags[1] if flags[1] != "gppo" else "grpo"
    with pytest.raises(UserError, match=message):
        RL.main([*flags_of(world, method), *flags, "--max-steps", "1", "--out", str(tmp_path / "run")])


def test_models_that_do_not_fit_each_other_are_one_line(world, tmp_path, model_folder):
    other = TOKENIZER.train(make_text(50, seed=8), 290, "bpe")
    reward = MODEL.build(MODEL.ModelConfig(vocab_size=len(other), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, labels=["reward"]), "score")
    MODEL.save(reward, tmp_path / "reward")
    TOKENIZER.save(other, tmp_path / "reward")
    MODEL.save(MODEL.build(MODEL.ModelConfig(vocab_size=len(other), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)), tmp_path / "lm")
    TOKENIZER.save(other, tmp_path / "lm")
    flags = [*flags_of(world, "grpo"), "--max-steps", "1", "--out", str(tmp_path / "run")]
    for more, message in ((["--rl.reward_funcs", str(tmp_path / "reward")], "was made with another tokenizer"), (["--rl.reward_funcs", str(world / "base")], "gives no single score"),
                          (["--rl.ref_model", str(tmp_path / "lm")], "does not fit the policy: its tokenizer lacks"), (["--model", str(tmp_path / "reward")], "has no language-model head")):
        with pytest.raises(UserError, match=message):
            RL.main([*flags, *more])
    assert not (tmp_path / "run" / "config.yaml").exists()


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_the_recipes_for_gpt2(method, tmp_path):
    """A folder as transformers writes it, without a chat template, on the shipped data."""
    tokenizer = TOKENIZER.train(make_text(200), 300, "byte")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    few = ["--max-steps", "2", "--batch-size", "8", "--training.eval_batches", "2"]
    few += ["--rl.rollout_size", "8", "--rl.max_completion_length", "8", "--rl.eval_prompts", "4"] if method == "ppo" else []
    (tmp_path / "data").symlink_to(ROOT / "data")
    process = launch(tmp_path, ROOT / "RL.py", "--model", "gpt2", "--rl.method", method, "--out", "out", *few)
    out, talk = process.communicate(timeout=180)
    assert process.returncode == 0 and not out, talk
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == {"stage", "measure", "before", "after", "steps", "seconds", "peak_memory_bytes"} and result["measure"] in result["after"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "gpt2"


def test_two_processes_learn_as_one(world, tmp_path):
    """Two processes of 4 rows are one that adds up twice 4: the same texts, rewards, losses; also with sharded weights."""
    kinds = {name: flags_of(world, name.partition("-")[0]) for name in ("dpo", "kto", "reward", "grpo", "ppo", "grpo-sharded", "ppo-lora", "rloo-sharded-lora")}
    more = {"grpo-sharded": ["--training.fsdp", "true", "--rl.dynamic_sampling", "2", "--rl.num_generations", "2"], "ppo-lora": ["--lora.r", "4"], "rloo-sharded-lora": ["--training.fsdp", "true", "--lora.r", "4"]}
    same = ["--batch-size", "4", "--max-steps", "2", "--training.mixed_precision", "no"]  # in bfloat16 other batches sample other texts
    runs = {name: in_file(tmp_path / f"{name}.yaml", [*flags, *more.get(name, []), *same, "--out", tmp_path / name], RL, "rl") for name, flags in kinds.items()}
    two_processes(tmp_path, {"RL": list(runs.values())})
    for name, argv in runs.items():
        one = tmp_path / f"{name}-one"
        RL.main([*argv, "--training.fsdp", "false", "--grad-accum", "2", "--out", str(one)])
        logs = [[record for record in log_of(folder) if "loss" in record] for folder in (tmp_path / name, one)]
        assert len(logs[0]) == len(logs[1]) == 2
        for key in set(logs[0][0]) & {"loss", "grad_norm", "reward", "kl", "rewards/margins", "accuracy", "explained_variance"}:
            values = [[record[key] for record in log if key in record] for log in logs]
            assert key != "kl" or name == "kto" or values[0][0] == values[1][0] == 0
            assert values[0] == pytest.approx(values[1], abs=1e-5), (name, key)
        results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / name, one)]
        for when in ("before", "after"):
            assert results[0][when] == pytest.approx(results[1][when], abs=1e-4), name
        if (one / "rollouts.jsonl").exists():
            texts = [[json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()] for folder in (tmp_path / name, one)]
            assert [[record["completion"] for record in own] for own in texts][0] == [record["completion"] for record in texts[1]], name


# ------------------------------------------------------------------------------------- what once went wrong


def test_the_reference_is_itself_in_sixteen_bits_too(model_folder):
    """autocast keeps 16-bit copies of weights, and routers a bias that is no parameter."""
    ids = torch.arange(10)[None]
    experts = MODEL.build(MODEL.ModelConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_experts=4, num_experts_per_tok=1,
                                            moe_intermediate_size=16, scoring_func="sigmoid", router_bias_update_speed=0.01, initializer_range=0.3), seed=1)
    for model in (MODEL.load(model_folder), experts.eval()):
        reference = RL.Reference(model)
        reference.start(TRAIN.Run(model, TRAIN.TrainingSection(), torch.device("cpu"), "no"), TRAIN.TrainingSection())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            before = model(ids).logits.clone()
        with torch.no_grad():
            for weight in (*model.parameters(), *(bias for name, bias in model.named_buffers() if name.endswith("correction_bias"))):
                weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            after = model(ids).logits.clone()
            assert (after - before).abs().max() > 0.1
            with reference(model) as frozen:
                assert torch.equal(frozen(ids).logits, before)
            assert torch.equal(model(ids).logits, after)


def test_an_explicit_file_is_read_whatever_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(TRAIN, "run_stage", lambda name, config, *_: seen.append((config.data.train, config.data.validation)))
    for flags in ([], ["--rl.method", "grpo"], ["--rl.method", "ppo", "--data", "data/preferences.jsonl"], ["--rl.method", "grpo", "--data.validation", "none"]):
        RL.main(flags)
    assert seen == [(["data/preferences.jsonl"], "data/preferences_test.jsonl"), (["data/prompts.jsonl"], "data/prompts_test.jsonl"),
                    (["data/preferences.jsonl"], "hash"), (["data/prompts.jsonl"], "none")]


def test_the_best_model_of_a_run_with_rollouts_is_kept(world, tmp_path, monkeypatch):
    """Also one that is found inside a rollout."""
    values = iter([0.1, 0.9, 0.8, 0.7, 0.6, 0.9])
    monkeypatch.setattr(RL, "held_out_rewards", lambda *_: lambda model: {"reward": next(values)})
    flags = [*flags_of(world, "ppo"), "--max-steps", "10", "--training.eval_steps", "3", "--training.load_best_model_at_end", "true", "--out", str(tmp_path / "run")]
    RL.main(flags)
    told = [(record["step"], record["eval_reward"]) for record in log_of(tmp_path / "run") if "eval_reward" in record]
    assert told == [(0, 0.1), (3, 0.9), (6, 0.8), (9, 0.7), (10, 0.6)]
    best, final = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("ckpt-step-000003", "."))
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_pairs_that_changed_are_not_continued(world, tmp_path):
    lines = (world / "pairs.jsonl").read_text().splitlines()
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines) + "\n")
    flags = [*flags_of(world, "dpo"), "--data", str(data), "--training.save_steps", "2", "--max-steps", "4", "--out", str(tmp_path / "run")]
    RL.main(flags)
    resume = [*flags, "--resume", str(tmp_path / "run" / "ckpt-step-000002")]
    with pytest.raises(UserError, match="made with another rl.method"):
        RL.main(["--rl.method", "grpo", "--rl.loss_type", "auto", "--rl.rpo_alpha", "null", "--rl.reward_funcs", "length:3", "--rl.rollout_size", "16", "--data", str(world / "prompts.jsonl"), "--out", str(tmp_path / "run"), "--resume", "auto"])
    data.write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(UserError, match="the pairs differ from those of the checkpoint"):
        RL.main(resume)


def test_an_earlier_run_stays_until_the_new_one_was_measured(world, tmp_path):
    (tmp_path / "own.py").write_text("def letters(**_):\n    raise ValueError('no letters')\n")
    flags = [*flags_of(world, "grpo"), "--max-steps", "2", "--out", str(tmp_path / "run")]
    RL.main(flags)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="letters failed on"):
        RL.main([*flags, "--rl.reward_funcs", f"{tmp_path}/own.py:letters", "length:3", "--overwrite"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_run_repeats_from_its_saved_settings(world, tmp_path):
    for method in ("reward", "grpo"):
        RL.main([*flags_of(world, method), "--max-steps", "2", "--out", str(tmp_path / method)])
        RL.main(["--config", str(tmp_path / method / "config.yaml"), "--out", str(tmp_path / f"{method}-again")])
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in (method, f"{method}-again"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_logs_keep_texts_with_any_line_break(tmp_path):
    records = [{"rollout": i, "completion": f"a\u2028b\x85c {i}"} for i in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records) + '{"rollout": 3, "comp')
    TRAIN.rewind(tmp_path / "log.jsonl", lambda record: record["rollout"] < 2)
    assert TRAIN.json_lines(tmp_path / "log.jsonl") == records[:2]


def test_long_ratios_keep_finite_gradients():
    now = torch.zeros(1, 100, requires_grad=True)
    for advantage in (1.0, -1.0):
        loss, _ = RL.rloo_loss(now + 1, torch.zeros(1, 100), tensor([advantage]), torch.ones(1, 100, dtype=torch.bool))
        [gradient] = torch.autograd.grad(loss.sum(), now)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def test_a_template_that_opens_a_thought_serves_what_is_learnt(tokenizer):
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    TOKENIZER.ensure_chat(own)
    own.chat_template = THINKING
    for said in ("The fox.", "<think>\nwhy</think> The fox."):
        one = RL.make_example(own, "What is red?", said, None, "here")
        assert one.ids[: one.start] == TOKENIZER.prompt_ids(own, "What is red?")
        assert own.decode(one.ids).replace(" ", "").endswith("<think>\n" + said.removeprefix("<think>\n").replace(" ", "") + "<|im_end|>") or "why" in said
    assert own.decode(one.ids).count("<think>") == 1


def test_mismatched_texts_keep_to_the_length(tokenizer):
    own = [item._replace(examples=item.examples[:1]) for item in some_pairs(tokenizer, 6)]
    assert max(len(item.examples[0].ids) for item in RL.mismatched(own, 0, 20)) == 20


def test_a_batch_of_padding_runs_in_models_that_know_no_masks(tmp_path):
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4))
    theirs.save_pretrained(tmp_path)
    model = MODEL.load(tmp_path)
    nothing = torch.zeros(1, 3, dtype=torch.long)
    out = model(nothing, positions=torch.full((1, 3), -1), segment_ids=torch.full((1, 3), -1), targets=torch.full((1, 3), -100))
    assert not out.logprobs.any()
    with pytest.raises(UserError, match="no sequence classification model for mamba"):
        MODEL.load(tmp_path, head="score", changes={"labels": ["reward"]})
