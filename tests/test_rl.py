"""Preferences, rewards and rollouts: each loss and estimator compared with a slow version, and complete runs."""

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


def assert_same(fast, slow, inputs, tolerance=1e-5) -> None:
    """Equal values, and equal gradients of a weighted sum."""
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    weights = torch.rand(fast.shape, generator=G, dtype=fast.dtype)
    for gradient, expected in zip(torch.autograd.grad((fast * weights).sum(), inputs), torch.autograd.grad((slow * weights).sum(), inputs), strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=0)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


# ------------------------------------------------------------------------------------------ losses of preferences


@pytest.mark.parametrize("kind, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1), ("sigmoid_norm", 0.0)])
def test_dpo_loss_matches_the_published_formula(kind, smoothing):
    c, r, rc, rr = (draw(7) for _ in range(4))
    beta, slow = 0.3, []
    for i in range(7):
        x = beta * (c[i] - rc[i] - r[i] + rr[i])
        slow.append({"sigmoid": -(1 - smoothing) * torch.log(sigmoid(x)) - smoothing * torch.log(sigmoid(-x)),
                     "sigmoid_norm": -torch.log(sigmoid(x)), "hinge": torch.maximum(1 - x, x * 0), "ipo": (x / beta - 1 / (2 * beta)) ** 2,
                     "robust": (-(1 - smoothing) * torch.log(sigmoid(x)) + smoothing * torch.log(sigmoid(-x))) / (1 - 2 * smoothing)}[kind])
    assert_same(RL.dpo_loss(c, r, rc, rr, beta, kind, smoothing), torch.stack(slow), (c, r, rc, rr))


def test_dpo_loss_has_the_values_of_the_docstring():
    assert float(RL.dpo_loss(*(tensor([x]) for x in (-1.0, -3.0, -2.0, -2.0)))) == pytest.approx(0.598, abs=1e-3)
    assert float(RL.dpo_loss(*(tensor([x]) for x in (-1.0, -3.0, -1.0, -3.0)))) == pytest.approx(math.log(2))


def test_kto_loss_matches_the_published_formula():
    logratios, baseline = draw(8, low=-5, high=5), tensor(0.7, dtype=torch.float64)
    desirable = tensor([True, False] * 4)
    slow = [1.3 * (1 - sigmoid(0.2 * (g - 0.7))) if w else 0.6 * (1 - sigmoid(0.2 * (0.7 - g))) for g, w in zip(logratios, desirable, strict=True)]
    assert_same(RL.kto_loss(logratios, desirable, baseline, 0.2, 1.3, 0.6), torch.stack(slow), (logratios,))


def test_orpo_simpo_and_reward_losses_match_the_published_formulas():
    c, r = draw(6), draw(6)

    def odds(logp):
        return torch.exp(logp) / (1 - torch.exp(logp))

    assert_same(RL.orpo_loss(c, r), torch.stack([-torch.log(sigmoid(torch.log(odds(x) / odds(y)))) for x, y in zip(c, r, strict=True)]), (c, r))
    assert_same(RL.simpo_loss(c, r, 2.0, 0.5), torch.stack([-torch.log(sigmoid(2 * x - 2 * y - 0.5)) for x, y in zip(c, r, strict=True)]), (c, r))
    slow = [-torch.log(sigmoid(x - y - 0.4)) + 0.1 * (x + y) ** 2 for x, y in zip(c, r, strict=True)]
    assert_same(RL.reward_loss(c, r, 0.4, 0.1), torch.stack(slow), (c, r))


# ------------------------------------------------------------------------------------------ losses of rollouts

MASK = tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def test_kl_estimate_is_unbiased_and_not_negative():
    p, q = torch.randn(2, 9, generator=G, dtype=torch.float64).log_softmax(-1)
    estimates = RL.kl_estimate(p, q)
    assert estimates.min() >= 0
    assert float((p.exp() * estimates).sum()) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-12)


def test_gradients_are_finite_far_from_the_reference():
    now, reference = tensor([-120.0, -0.1], requires_grad=True), tensor([-0.1, -120.0])
    ratio_losses, _ = RL.ppo_loss(now, reference, tensor([-1.0, 1.0]))
    (RL.kl_estimate(now, reference).sum() + ratio_losses.sum()).backward()
    assert now.grad.isfinite().all()


def test_token_rewards():
    scores, old, reference = draw(4), draw(4, 5), draw(4, 5)
    slow = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for t in range(5):
            if MASK[i, t]:
                last = t == 4 or not MASK[i, t + 1]
                slow[i, t] = -0.1 * (old[i, t] - reference[i, t]) + (scores[i] if last else 0)
    assert_same(RL.token_rewards(scores, old, reference, MASK, 0.1), slow, (scores, old, reference))


def test_gae_is_the_discounted_sum_of_td_errors():
    rewards, values, gamma, lam = draw(4, 5), draw(4, 5), 0.9, 0.8
    slow = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        length = int(MASK[i].sum())
        for t in range(length):
            for k in range(t, length):
                following = values[i, k + 1] if k + 1 < length else 0.0
                slow[i, t] = slow[i, t] + (gamma * lam) ** (k - t) * (rewards[i, k] + gamma * following - values[i, k])
    advantages, returns = RL.gae(rewards, values, MASK, gamma, lam)
    assert_same(advantages, slow, (rewards, values))
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
def test_ppo_loss_matches_the_published_formula(high):
    now, old, advantages = draw(4, 5, low=-2, high=-1), draw(4, 5, low=-2, high=-1), draw(4, 5, low=-1, high=1)
    slow, cut = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.bool)
    for i in range(4):
        for t in range(5):
            r, a = torch.exp(now[i, t] - old[i, t]), advantages[i, t]
            limited = torch.clamp(r, 0.8, 1 + (high or 0.2))
            slow[i, t], cut[i, t] = -torch.minimum(r * a, limited * a), limited * a < r * a
    losses, clipped = RL.ppo_loss(now, old, advantages, 0.2, high)
    assert clipped.any() and torch.equal(clipped, cut)
    assert_same(losses, slow, (now, advantages))


def test_value_loss_matches_the_published_formula():
    values, old, returns = draw(4, 5), draw(4, 5), draw(4, 5)
    slow = [[0.5 * torch.maximum((v - r) ** 2, (o + torch.clamp(v - o, -0.2, 0.2) - r) ** 2) for v, o, r in zip(*row, strict=True)]
            for row in zip(values, old, returns, strict=True)]
    assert_same(RL.value_loss(values, old, returns, 0.2), torch.stack([torch.stack(row) for row in slow]), (values, returns))


def test_group_advantages():
    rewards = draw(3, 4).detach()
    for i in range(3):
        group = rewards[i].tolist()
        mean = sum(group) / 4
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / 3)
        assert RL.group_advantages(rewards, "none")[i].tolist() == pytest.approx([x - mean for x in group])
        assert RL.group_advantages(rewards, "group")[i].tolist() == pytest.approx([(x - mean) / (deviation + 1e-4) for x in group])
        assert RL.group_advantages(rewards, "leave_one_out")[i].tolist() == pytest.approx([x - (sum(group) - x) / 3 for x in group])
    batch_deviation = float(rewards.flatten().std())
    assert RL.group_advantages(rewards, "batch")[1, 2].item() == pytest.approx(float(rewards[1, 2] - rewards[1].mean()) / (batch_deviation + 1e-4))
    for reward, scale in itertools.product((1.0, 1000.1, 1 / 3), ("none", "group", "batch", "leave_one_out")):
        assert not RL.group_advantages(torch.full((2, 7), reward), scale).any()  # all alike: nothing to learn, no NaN


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_grpo_loss_matches_the_published_formula(kind):
    now, old, reference, advantages = draw(4, 5), draw(4, 5), draw(4, 5), draw(4, low=-1, high=1)
    total, completions, tokens = 0.0, 4, int(MASK.sum())
    for i in range(4):
        length = int(MASK[i].sum())
        for t in range(length):
            r = torch.exp(now[i, t] - old[i, t])
            gain = torch.minimum(r * advantages[i], torch.clamp(r, 0.8, 1.3) * advantages[i])
            if kind == "cispo":
                gain = min(float(r), 1.3) * advantages[i] * now[i, t]
            ratio = torch.exp(reference[i, t] - now[i, t])
            kl = ratio - torch.log(ratio) - 1
            share = {"grpo": 1 / length / completions, "dapo": 1 / tokens, "cispo": 1 / tokens, "dr_grpo": 1 / (completions * 9)}[kind]
            total = total - share * (gain - 0.04 * kl)
    losses, _ = RL.grpo_loss(now, old, advantages, MASK, reference, 0.04, 0.2, 1.3 if kind == "cispo" else 0.3, kind, 9)
    assert_same(losses.sum() / (tokens if kind in ("dapo", "cispo") else completions), total, (now, reference, advantages))


def test_gspo_loss_matches_the_published_formula():
    old, advantages = draw(4, 5).detach(), tensor([1.0, -0.5, -0.7, 0.3], dtype=torch.float64, requires_grad=True)
    change = tensor([[0.4], [-0.4], [0.4], [-0.4]]) + draw(4, 5, low=-0.1, high=0.1).detach()  # on the mean; the first two are clipped
    now, total = (old + change).requires_grad_(), 0.0
    for i in range(4):
        length = int(MASK[i].sum())
        s = math.prod(torch.exp(now[i, t] - old[i, t]) for t in range(length)) ** (1 / length)
        total = total - torch.minimum(s * advantages[i], torch.clamp(s, 0.9, 1.2) * advantages[i]) / 4
    losses, clipped = RL.grpo_loss(now, old, advantages, MASK, epsilon=0.1, epsilon_high=0.2, loss_type="grpo", level="sequence")
    assert torch.equal(clipped, MASK & tensor([[True], [True], [False], [False]]))
    assert_same(losses.sum() / 4, total, (now, advantages))
    assert RL.RLSection(method="grpo", importance_sampling_level="sequence").fill().loss_type == "grpo"


def test_sampler_weights_are_truncated_probability_ratios():
    old, sampled = draw(4, 5).detach(), draw(4, 5).detach()
    ratios = [[float(torch.exp(old[i, t] - sampled[i, t])) if MASK[i, t] else 1.0 for t in range(5)] for i in range(4)]
    tokens = RL.sampler_weights(old, sampled, MASK, 2.0)
    assert tokens.tolist() == [pytest.approx([min(r, 2.0) for r in row]) for row in ratios] and tokens.max() == 2
    assert RL.sampler_weights(old, sampled, MASK, 2.0, True).tolist() == pytest.approx([min(math.prod(row), 2.0) for row in ratios])


def test_rloo_treats_a_completion_as_one_action():
    now, old, advantages = draw(4, 5), draw(4, 5), draw(4, low=-1, high=1)
    slow = []
    for i in range(4):
        r = torch.ones((), dtype=torch.float64)
        for t in range(int(MASK[i].sum())):
            r = r * torch.exp(now[i, t] - old[i, t])
        slow.append(-torch.minimum(r * advantages[i], torch.clamp(r, 0.8, 1.2) * advantages[i]))
    assert_same(RL.rloo_loss(now, old, advantages, MASK)[0], torch.stack(slow), (now, advantages))
    first, _ = RL.rloo_loss(now, now.detach(), advantages.detach(), MASK)  # REINFORCE: the gradient is A grad log p
    [gradient] = torch.autograd.grad(first.sum(), now)
    torch.testing.assert_close(gradient, -advantages.detach()[:, None] * MASK)


# ------------------------------------------------------------------------------------------------------ records

QUESTION = [{"role": "user", "content": "What is red?"}]
FOX, OWL = [{"role": "assistant", "content": "The fox."}], [{"role": "assistant", "content": "The owl."}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PAIRS = {
    "texts": ({"prompt": "What is red?", "chosen": "The fox.", "rejected": "The owl."}, "What is red?", "The fox.", "The owl."),
    "alpaca": ({"instruction": "Name it.", "input": "red", "chosen": "The fox.", "rejected": "The owl."}, "Name it.\n\nred", "The fox.", "The owl."),
    "question": ({"question": "What is red?", "chosen": "The fox.", "rejected": "The owl."}, "What is red?", "The fox.", "The owl."),
    "messages": ({"prompt": QUESTION, "chosen": FOX, "rejected": OWL}, QUESTION, FOX, OWL),
    "implicit": ({"chosen": QUESTION + FOX, "rejected": QUESTION + OWL}, QUESTION, FOX, OWL),
    "mixed": ({"prompt": "What is red?", "chosen": FOX, "rejected": OWL}, QUESTION, FOX, OWL),
    "a system": ({"system": "Be brief.", "prompt": "What is red?", "chosen": "The fox.", "rejected": "The owl."},
                 [{"role": "system", "content": "Be brief."}, *QUESTION], FOX, OWL),
    "hh": ({"chosen": "\n\nHuman: What is red?\n\nAssistant: The fox.", "rejected": "\n\nHuman: What is red?\n\nAssistant: The owl."}, QUESTION, FOX, OWL),
    "a repeated prompt": ({"prompt": "What is red?", "chosen": QUESTION + FOX, "rejected": QUESTION + OWL}, QUESTION, FOX, OWL),
    "a system message inside": ({"prompt": "What is red?", "chosen": SYSTEM + QUESTION + FOX, "rejected": SYSTEM + QUESTION + OWL}, SYSTEM + QUESTION, FOX, OWL),
    "the prompt's system": ({"prompt": SYSTEM + QUESTION, "chosen": QUESTION + FOX, "rejected": QUESTION + OWL}, SYSTEM + QUESTION, FOX, OWL),
    "several turns": ({"prompt": "What is red?", "chosen": QUESTION + FOX + QUESTION + FOX, "rejected": QUESTION + FOX + QUESTION + OWL}, QUESTION + FOX + QUESTION, FOX, OWL),
    "an early difference": ({"chosen": QUESTION + FOX + QUESTION + FOX, "rejected": QUESTION + OWL + QUESTION + OWL}, QUESTION, FOX + QUESTION + FOX, OWL + QUESTION + OWL),
    "shared": ({"conversations": [{"from": "human", "value": "What is red?"}], "chosen": {"from": "gpt", "value": "The fox."}, "rejected": {"from": "gpt", "value": "The owl."}}, QUESTION, FOX, OWL),
    "hh with a prompt": ({"prompt": "\n\nHuman: What is red?\n\nAssistant:", "chosen": "The fox.", "rejected": "The owl."}, QUESTION, FOX, OWL),
    "the prompt in both completions": ({"prompt": "What is red? ", "chosen": "What is red? The fox.", "rejected": "What is red? The owl."}, "What is red? ", "The fox.", "The owl."),
    "cells": ({"prompt": "What is red?", "chosen": json.dumps(FOX), "rejected": json.dumps(OWL), "margin": "0"}, QUESTION, FOX, OWL),
    "messages as well": ({"messages": QUESTION + FOX, "chosen": QUESTION + FOX, "rejected": QUESTION + OWL}, QUESTION, FOX, OWL),
    "ids and blanks": ({"chosen": [{"role": "user", "content": "What is red?", "id": 1}, *FOX], "rejected": [{"role": "user", "content": "What is red?\n", "id": 2}, *OWL]},
                       [{"role": "user", "content": "What is red?", "id": 1}], FOX, OWL),
    "a common prefix": ({"chosen": "What is red? The fox.", "rejected": "What is red? The owl."}, "What is red? The", " fox.", " owl."),
    "a common line": ({"chosen": "What is red?\nA: fox", "rejected": "What is red?\nA: owl"}, "What is red?\nA:", " fox", " owl"),
}
UNUSABLE = {
    "two questions": ({"chosen": QUESTION + FOX, "rejected": [{"role": "user", "content": "Who?"}, *OWL]}, "whose completions have different prompts"),
    "hh with a gap": ({"chosen": "\n\nHuman: What?\n\nAssistant: x\n\nHuman: Who?\n\nAssistant: \n\nHuman: Why?\n\nAssistant: c",
                       "rejected": "\n\nHuman: What?\n\nAssistant: The owl."}, "with an empty turn"),
    "null": ({"prompt": "What is red?", "chosen": "The fox.", "rejected": None, "margin": None}, "with an empty completion"),
    "no answer": ({"prompt": "What is red?", "chosen": "What is red?", "rejected": "What is red?x"}, "with an empty completion"),
    "no prompt": ({"prompt": " ", "chosen": "The fox.", "rejected": "The owl."}, "without a prompt"),
    "contradiction": ({"prompt": "Why?", "chosen": QUESTION + FOX, "rejected": QUESTION + OWL}, "whose prompt differs from the prompt in its completions"),
    "longer": ({"prompt": QUESTION + FOX + QUESTION, "chosen": QUESTION + FOX + QUESTION + FOX, "rejected": QUESTION + OWL + QUESTION + OWL},
               "whose prompt differs from the prompt in its completions"),
}
FORM = TOKENIZER.Form(RL.preference, "rl")


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_a_pair_is_read(name):
    record, prompt, chosen, rejected = PAIRS[name]
    assert RL.preference(record, "here", FORM) == {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 0.0}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pairs_are_left_out(name, tmp_path):
    record, why = UNUSABLE[name]
    good, left = PAIRS["texts"][0], TOKENIZER.LeftOut()
    path = write(tmp_path / "a.jsonl", [good, record])
    assert len(list(FORM.read(path, left))) == 1
    assert left.text() == f"; left out 1 {why} (the first: {path}:2)"


def test_a_text_column_does_not_change_the_split():
    for other in ("something", 3, None):
        record = RL.prompt_record({"prompt": "What is red?", "text": other}, "here", FORM)
        assert record["text"] == other and TOKENIZER.prompt_key(record) == TOKENIZER.prompt_key({"messages": QUESTION + FOX})


def test_tools_are_kept_in_every_format():
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        assert RL.preference({**PAIRS["messages"][0], "tools": given}, "here", FORM)["tools"] == tools
        assert RL.prompt_record({"prompt": QUESTION, "tools": given}, "here", FORM)["tools"] == tools
    assert "tools" not in RL.preference({**PAIRS["messages"][0], "tools": None}, "here", FORM)


def test_labeled_completions_and_prompts_are_read(tmp_path):
    single = {"prompt": "What is red?", "completion": "The fox.", "label": 1}
    assert RL.preference(single, "here", FORM) == {"prompt": "What is red?", "completion": "The fox.", "label": True}
    assert RL.preference({"prompt": "What is red?", "completion": SYSTEM + QUESTION + FOX, "label": "false"}, "here", FORM) == {"prompt": SYSTEM + QUESTION, "completion": FOX, "label": False}
    path = write(tmp_path / "prompts.jsonl", [{"messages": QUESTION + FOX, "answer": "fox"}, {"question": "Why?", "answer": "so #### 4"}, {"prompt": "Go on", "n": 3}])
    found = [record for _, record in TOKENIZER.Form(RL.prompt_record, "rl").read(path, TOKENIZER.LeftOut())]
    assert found == [{"answer": "fox", "completion": "The fox.", "prompt": QUESTION}, {"question": "Why?", "answer": "so #### 4", "prompt": "Why?"}, {"n": 3, "prompt": "Go on"}]
    path = write(tmp_path / "sums.jsonl", [{"context": "1 + 1 =", "continuation": " 2"}])
    assert [record for _, record in TOKENIZER.Form(RL.prompt_record, "rl", {"prompt": "context", "answer": "continuation"}).read(path, TOKENIZER.LeftOut())] == [{"prompt": "1 + 1 =", "answer": " 2"}]


BAD_PAIRS = {
    "no pair": ({"prompt": "a", "answer": "b"}, "neither prompt + chosen + rejected"),
    "no prompt": ({"chosen": "yes", "rejected": "no"}, "no common prefix"),
    "label": ({"prompt": "a", "completion": "b", "label": "good"}, "label 'good' must be true"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "margin 'big' must be a number"),
    "a system alone": ({"prompt": "What is red?", "chosen": SYSTEM + FOX, "rejected": SYSTEM + OWL}, "but no user message; move the system message to the key 'system'"),
    "a system of numbers": ({"prompt": "a", "system": 3, "chosen": "b", "rejected": "c"}, "system must be a string, found int"),
    "two kinds": ({"instruction": QUESTION, "input": "red", "chosen": "b", "rejected": "c"}, "instruction and input are joined"),
    "half": ({"prompt": "What is red?", "chosen": QUESTION + FOX, "rejected": "The owl."}, "one completion is a whole conversation, the other only an assistant message"),
    "answered": ({"prompt": QUESTION + FOX, "chosen": FOX, "rejected": OWL}, "the prompt ends with an assistant message"),
    "kind": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen: expected text or a list of messages"),
}


def test_a_completion_that_ends_with_a_user_message_is_left_out():
    with pytest.raises(TOKENIZER.Unusable, match="that does not end with the assistant's message"):
        RL.preference({"prompt": "a", "chosen": QUESTION, "rejected": FOX}, "here", FORM)


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_invalid_pairs_raise_errors(name):
    with pytest.raises(UserError, match=f"here.*{BAD_PAIRS[name][1]}".replace("+", r"\+")):
        RL.preference(BAD_PAIRS[name][0], "here", FORM)


def token_logprobs(model, ids):
    """Log-probability of each token given those before it: ids (B, T) -> (B, T-1)."""
    return model(ids[:, :-1], targets=ids[:, 1:]).logprobs


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ------------------------------------------------------------------------ token ids, losses and references


@pytest.fixture(scope="session")
def chat(tokenizer):
    """The session's tokenizer with a chat template."""
    copy = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    TOKENIZER.ensure_chat(copy)
    return copy


@pytest.mark.parametrize("prompt, completion", [("What is red?", "The fox."), (QUESTION + FOX + QUESTION, OWL)])
def test_training_prompts_equal_inference_prompts(chat, prompt, completion):
    example = RL.make_example(chat, prompt, completion, None, "here")
    assert example.ids[: example.start] == TOKENIZER.prompt_ids(chat, prompt)
    text = completion if isinstance(completion, str) else completion[0]["content"]
    assert chat.decode(example.ids[example.start :]) == text + "<|im_end|>" and example.ids[-1] == TOKENIZER.chat_ends(chat).stop[0]


def test_only_assistant_turns_are_trained(chat):
    example = RL.make_example(chat, QUESTION, FOX + QUESTION + OWL, None, "here")
    shown = "".join(chat.decode([i]) if on else "~" for i, on in zip(example.ids, example.weights, strict=True))
    assert [part for part in shown.split("~") if part] == ["The fox.<|im_end|>", "The owl.<|im_end|>"]
    assert example.ids[: example.start] == TOKENIZER.prompt_ids(chat, QUESTION)
    [other] = RL.mismatched([RL.Pair("a", [example], QUESTION), RL.Pair("b", [RL.make_example(chat, "Who?", "An owl.", None, "")], "Who?")], 0, 128)[1].examples
    assert sum(other.weights) == sum(example.weights) and other.ids[other.start :] == example.ids[example.start :]
    batch = RL.make_batch([RL.Pair("a", [example], QUESTION)])
    assert batch["weights"].tolist() == [example.weights[1:]]


def test_answers_may_be_numbers():
    def reward(answer):
        return RL.exact_answer(RL.Sample(RL.Prompt("here:3", "?", [0], {"answer": answer}), 0, [1], "stop", "It is 9.", None))

    assert [reward(answer) for answer in (9, 9.0, "9", "so #### 9", 8)] == [1, 1, 1, 1, 0]
    with pytest.raises(UserError, match="here:3: answer is a list; exact_answer needs text or a number"):
        reward(["9"])


def test_without_a_template_prompt_and_completion_are_concatenated(tokenizer):
    example = RL.make_example(tokenizer, "the red", " fox ran", None, "here")
    assert tokenizer.decode(example.ids[example.start : -1]) == " fox ran" and example.ids[-1] == tokenizer.eos_token_id
    assert example.ids[: example.start] == TOKENIZER.encode_prompt(tokenizer, "the red")


def some_pairs(tokenizer, count: int = 10) -> list[RL.Pair]:
    lines = make_text(3 * count, seed=4)
    texts = [(lines[i], lines[i + 1], lines[i + 2][: 5 + 3 * i]) for i in range(0, 3 * count, 3)]
    return [RL.Pair(f"line {i}", [RL.make_example(tokenizer, prompt, completion, None, "") for completion in completions], prompt, None, 0.1 * i) for i, (prompt, *completions) in enumerate(texts)]


def test_log_probabilities_of_pairs_match_transformers(model_folder, tokenizer):
    model, theirs = MODEL.load(model_folder), transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    pairs = some_pairs(tokenizer)
    sums, tokens, _ = RL.completion_logps(model, RL.make_batch(pairs), 2)
    for i, pair in enumerate(pairs):
        for c, example in enumerate(pair.examples):
            logprobs = theirs(tensor([example.ids])).logits[0].log_softmax(-1)
            slow = sum(float(logprobs[t - 1, example.ids[t]]) for t in range(example.start, len(example.ids)))
            assert float(sums[i, c]) == pytest.approx(slow, abs=1e-4) and int(tokens[i, c]) == len(example.ids) - example.start


@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm"])
def test_losses_per_token_divide_by_the_length(kind, model_folder):
    model, settings = MODEL.load(model_folder), RL.RLSection(method="dpo", loss_type=kind, rpo_alpha=0.7).fill()
    pair = RL.Pair("here", [RL.Example([3, 4, 5, 6], [0, 1, 1, 1]), RL.Example([3, 9], [0, 1])], "a")
    batch = RL.make_batch([pair]) | {"real": tensor([True]), "reference": tensor([[-9.0, -4.0]])}
    loss, metrics = RL.preference_loss(settings)(model, batch, {"pairs": 1, "chosen": 3, "micro_batches": 1})
    chosen, rejected = float(token_logprobs(model, tensor([[3, 4, 5, 6]])).sum()), float(token_logprobs(model, tensor([[3, 9]])).sum())
    ahead = (chosen + 9) / 3 - (rejected + 4)
    expected = (ahead - 1) ** 2 if kind == "ipo" else math.log(1 + math.exp(-5 * ahead))  # beta 0.5 and 5
    assert float(metrics["loss"]) == pytest.approx(expected - 0.7 * chosen / 3, abs=1e-4)


def test_the_reward_is_read_at_the_last_token(model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head="score", changes={"labels": ["reward"]})
    model.config.pad_token_id = tokenizer.pad_token_id
    MODEL.save(model, tmp_path)
    TOKENIZER.save(tokenizer, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1
    pairs = some_pairs(tokenizer, 4)
    batch = {**RL.make_batch([pair._replace(examples=[RL.repeat_last(example) for example in pair.examples]) for pair in pairs]), "real": torch.ones(4, dtype=torch.bool), "margin": tensor([pair.margin for pair in pairs])}
    settings = RL.RLSection(method="reward", center_rewards_coefficient=0.05)
    loss, metrics = RL.reward_model_loss(settings)(model, batch, {"pairs": 4, "micro_batches": 1})
    scores = [[float(theirs(tensor([example.ids])).logits) for example in pair.examples] for pair in pairs]
    slow = [-math.log(1 / (1 + math.exp(-(c - r - pair.margin)))) + 0.05 * (c + r) ** 2 for (c, r), pair in zip(scores, pairs, strict=True)]
    assert float(loss) == pytest.approx(sum(slow) / 4, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(sum(c > r for c, r in scores) / 4)
    reward_model = RL.reward_model(str(tmp_path), tokenizer, "cpu", "rl.reward_funcs")
    samples = [RL.Sample(RL.Prompt("", "", example.ids[: example.start], {}), 0, example.ids[example.start :], "stop", "", None) for pair in pairs for example in pair.examples]
    assert reward_model(samples) == pytest.approx([x for pair in scores for x in pair], abs=1e-5)
    context = model.config.max_position_embeddings
    long = RL.Sample(RL.Prompt("", "", [5] * context, {}), 0, pairs[0].examples[0].ids, "stop", "", None)
    last = float(theirs(tensor([long.ids[-context:]])).logits)
    assert reward_model([long] * 65) == pytest.approx([last] * 65, abs=1e-4)


def stream_of(pairs, held, method, batch_size, grad_accum, model, **more):
    training = TRAIN.TrainingSection(max_steps=1, epochs=None, batch_size=batch_size, grad_accum=grad_accum, max_length=64)
    stream = RL.Pairs(pairs, held, RL.RLSection(method=method, **more).fill(), training)
    stream.start(TRAIN.Run(model, training, torch.device("cpu"), "no"))
    return stream


def changed_policy(model_folder, by: float = 0.05):
    """A trained policy, which differs from its reference."""
    model = MODEL.load(model_folder)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            weight.add_(by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
    return model.train()


@pytest.mark.parametrize("method", ["dpo", "simpo", "orpo", "kto", "reward"])
def test_a_step_does_not_depend_on_the_micro_batch_size(method, model_folder, tokenizer):
    """Micro-batches of 8, 4 and 2 pairs give the same loss and gradient, also with fewer pairs than the step has rows."""
    pairs = some_pairs(tokenizer, 7)
    if method == "kto":
        pairs = [pair._replace(examples=pair.examples[:1], label=i % 3 > 0) for i, pair in enumerate(pairs)]
    found = []
    for size in (8, 4, 2):
        model = MODEL.load(model_folder, head="score", changes={"labels": ["reward"]}) if method == "reward" else MODEL.load(model_folder)
        stream = stream_of(pairs, [], method, size, 8 // size, model)
        stream.score_with_reference(model)
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
        for gradient, expected in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)
        if method == "kto":
            assert all(float(x) == pytest.approx(float(found[0][2][0]), abs=1e-5) for x in baseline)


def test_the_initial_dpo_loss_is_log_2_and_the_reference_is_fixed(model_folder, tokenizer):
    model = MODEL.load(model_folder)
    pairs = some_pairs(tokenizer, 4)
    stream = stream_of(pairs, pairs[:2], "dpo", 4, 1, model)
    batch, loss_fn = next(stream), RL.preference_loss(stream.settings)
    loss, metrics = loss_fn(model, batch, {**batch["counts"], "micro_batches": 1})
    chosen = [pair.examples[0] for pair in pairs]  # plus the cross-entropy of the chosen completions, from transformers' logits
    theirs, nats, tokens = transformers.AutoModelForCausalLM.from_pretrained(model_folder), 0.0, 0
    for example in chosen:
        with torch.no_grad():
            logprobs = theirs(tensor([example.ids])).logits[0].float().log_softmax(-1)
        nats -= sum(float(logprobs[t - 1, example.ids[t]]) for t in range(example.start, len(example.ids)))
        tokens += len(example.ids) - example.start
    assert float(loss) == pytest.approx(math.log(2) + nats / tokens, abs=1e-4) and float(metrics["rewards/accuracies"]) == pytest.approx(0.5)
    assert float(metrics["preference_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    without_nll = stream_of(pairs, [], "dpo", 4, 1, model, rpo_alpha=0.0)
    loss, _ = RL.preference_loss(without_nll.settings)(model, batch, {"pairs": 4, "micro_batches": 1})
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)
    state = stream.state_dict()
    resumed = stream_of(pairs, pairs[:2], "dpo", 4, 1, changed_policy(model_folder))  # resumed: the policy is no longer the reference
    resumed.load_state_dict(state)
    again = {tuple(row.tolist()): reference for row, reference in zip(batch["input_ids"][::2], batch["reference"], strict=True)}
    for row, reference in zip((later := next(resumed))["input_ids"][::2], later["reference"], strict=True):
        assert torch.equal(again[tuple(row.tolist())], reference)


def test_the_kto_baseline_is_the_mean_log_ratio_of_mismatched_completions(model_folder, tokenizer):
    pairs = [pair._replace(examples=pair.examples[:1]) for pair in some_pairs(tokenizer, 6)]
    start = MODEL.load(model_folder)
    stream = stream_of(pairs, [], "kto", 6, 1, start)
    stream.score_with_reference(start)
    policy = changed_policy(model_folder, 0.02)
    stream.run.model = policy
    batch = next(stream)
    total = 0.0
    for pair, other in zip(pairs, stream.sets["train mismatched"], strict=True):
        [mixed], [example] = other.examples, pair.examples
        assert mixed.ids[: mixed.start] == example.ids[: example.start] and mixed.ids[mixed.start :] != example.ids[example.start :]
        assert any(mixed.ids[mixed.start :] == third.examples[0].ids[third.examples[0].start :] for third in pairs)
        logprobs = [sum(float(token_logprobs(model, tensor([mixed.ids]))[0, t - 1]) for t in range(mixed.start, len(mixed.ids))) for model in (policy, start)]
        total += logprobs[0] - logprobs[1]
    assert float(batch["baseline"]) == pytest.approx(max(total / 6, 0.0), abs=1e-4)
    _, metrics = RL.preference_loss(stream.settings)(policy, batch, {"pairs": 6, "desirable": 6, "undesirable": 1, "micro_batches": 1})
    assert "rewards/accuracies" in metrics and "rewards/margins" not in metrics  # the margin needs both labels


def test_the_reference_is_the_initial_policy(model_folder, tmp_path):
    """The whole policy is copied. If it has an adapter, fresh or loaded, only the adapter is copied."""
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


def make_sample(text: str, length: int = 4, **columns) -> RL.Sample:
    return RL.Sample(RL.Prompt("file:7", "Q", [1, 2], columns), 0, [3] * length, "stop", text, None)


@pytest.mark.parametrize("name, text, columns, reward", [
    ("exact_answer", "12 plus 30 is 42.", {"answer": "42"}, 1), ("exact_answer", "12 plus 30 is 142.", {"answer": "42"}, 0),
    ("exact_answer", "It is 42, or 43.", {"answer": "42"}, 0), ("exact_answer", "So 1,042 it is 1,042", {"answer": "She has... #### 1042"}, 1),
    ("exact_answer", "Sorted: a, b", {"answer": "A, b."}, 1), ("exact_answer", "-5", {"answer": "5"}, 0), ("exact_answer", "", {"answer": "5"}, 0),
    ("number_after:####", "so 3 #### 18", {"answer": "x #### 18"}, 1), ("number_after:####", "18", {"answer": "18"}, 0),
    ("number_after:=", "a = 1,000.0 b", {"answer": "1000"}, 1), ("regex:o+t", "a root", {}, 1), ("format:o+t", "a root", {}, 0), ("format:a .*", "a root", {}, 1),
    ("length:4", "x", {}, 1), ("length:2", "x", {}, 0), ("length:3", "x", {}, 2 / 3),
])
def test_builtin_rewards(name, text, columns, reward):
    assert RL.builtin(name)(make_sample(text, **columns)) == pytest.approx(reward)


FUNCTIONS = '''
import math
def letters(prompts, completions, completion_ids, weight, **kwargs):
    assert len(prompts) == len(completions) == len(completion_ids) == len(weight)
    return [w * len(c if isinstance(c, str) else c[0]["content"]) for c, w in zip(completions, weight)]
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


def make_judges(tmp_path, *names, weights=None):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    names = [name if ":" in name else f"{tmp_path}/functions.py:{name}" for name in names]
    return RL.Judges(RL.RLSection(method="grpo", reward_funcs=names, reward_weights=weights), None, "cpu")


def test_custom_functions_have_the_signature_of_trl(tmp_path):
    samples = [make_sample("abc", weight=2), make_sample("xy", weight=3)]
    make_judges(tmp_path, "letters", "sometimes", "length:4", weights=[1, 10, 0.5])(samples)
    assert [sample.rewards for sample in samples] == [[6, 2, 1], [6, None, 1]] and [sample.reward for sample in samples] == [26.5, 6.5]
    conversation = RL.Sample(RL.Prompt("file:7", QUESTION, [1], {"weight": 1}), 0, [3], "stop", "abc", None)
    make_judges(tmp_path, "letters")([conversation])
    assert conversation.reward == 3


def test_async_functions_are_awaited_and_every_sample_needs_a_reward(tmp_path):
    samples = [make_sample("abc", weight=2), make_sample("xy", weight=3)]
    make_judges(tmp_path, "later")(samples)
    assert [sample.reward for sample in samples] == [3, 2]
    with pytest.raises(UserError, match="file:7: rl.reward_funcs: every function .sometimes. returned None for the completion 'xy'"):
        make_judges(tmp_path, "sometimes")(samples)


def compute_rewards(names, samples, state=None) -> RL.Judges:
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=names), None, "cpu")
    judges(samples, *[state][: state is not None])
    return judges


def test_async_functions_share_an_event_loop(tmp_path):
    (tmp_path / "functions.py").write_text("""
import asyncio, torch
limit, loops = asyncio.Semaphore(1), set()
async def reward(text):
    async with limit:
        await asyncio.sleep(0)
    loops.add(asyncio.get_running_loop())
    return len(text) + 10 * len(loops) + 100 * torch.is_grad_enabled() + 100 * torch.is_autocast_enabled("cpu")
async def first(completions, **_):
    return await asyncio.gather(*map(reward, completions))
async def second(completions, **_):
    return await asyncio.gather(*map(reward, completions))
async def leaves(completions, **_):
    raise SystemExit(1)
""")
    samples = [make_sample("abc"), make_sample("xy")]
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            compute_rewards([f"{tmp_path}/functions.py:first", f"{tmp_path}/functions.py:second"], samples)
        assert [sample.rewards for sample in samples] == [[13, 13], [12, 12]]
    with pytest.raises(UserError, match="leaves failed on file:7"):
        compute_rewards([f"{tmp_path}/functions.py:leaves"], samples)
    compute_rewards([f"{tmp_path}/functions.py:first"], samples)


def test_files_of_reward_functions_are_isolated(tmp_path):
    """They may have any name, import modules of their folder at any time, and do not replace other modules."""
    code = """
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
        for name, text in (("MODEL.py", code), ("random.py", code), ("helping.py", f"POINTS = {points}"), ("later/inside.py", f"POINTS = {10 * points}")):
            (tmp_path / folder / name).write_text(text)
    before, path, samples = dict(sys.modules), list(sys.path), [make_sample("abc")]
    names = [f"{tmp_path}/{folder}/{name}.py:points" for folder in "ab" for name in ("MODEL", "random")]
    for _ in range(2):
        compute_rewards(names, samples)
        assert samples[0].rewards == [11, 11, 55, 55]
    assert sys.path == path and all(sys.modules[name] is module for name, module in before.items())
    assert not [name for name in sys.modules.keys() - before if not name.startswith("_user_")]


def test_functions_get_the_trainer_state_and_the_loggers_of_trl(tmp_path):
    (tmp_path / "functions.py").write_text("""
def state(trainer_state, log_metric, log_extra, completions):
    log_metric("seen", len(completions))
    log_extra("half", [text[:1] for text in completions])
    return [trainer_state.global_step + trainer_state.max_steps] * len(completions)
def unequal(completions, log_extra, **_):
    log_extra("half", [])
def word(completions, log_metric, **_):
    log_metric("seen", "many")
""")
    samples = [make_sample("abc", weight=1), make_sample("xy", weight=2)]
    judges = compute_rewards([f"{tmp_path}/functions.py:state"], samples, RL.SimpleNamespace(global_step=3, max_steps=9, epoch=0.5))
    assert [sample.reward for sample in samples] == [12, 12] and [sample.extra for sample in samples] == [{"half": "a"}, {"half": "x"}] and judges.metrics == {"seen": [2.0]}
    for name, message in (("unequal", "log_extra.'half'. got 0 values for 2 completions"), ("word", "log_metric.'seen', 'many'.: expected a finite number")):
        with pytest.raises(UserError, match=message):
            compute_rewards([f"{tmp_path}/functions.py:{name}"], samples)


@pytest.mark.parametrize("name, message", [("nan", "file:9: .*nan returned nan for the completion 'xy'; expected a finite number"), ("fails", "fails failed on file:9, completion 'xy' .ZeroDivisionError.*functions.py:11"),
                                           ("short", "returned 1 reward for 2 completions"), ("letters", "letters failed on file:7")])
def test_errors_name_the_function_and_the_record(name, message, tmp_path):
    samples = [make_sample("abc"), make_sample("xy")]
    samples[1].where = "file:9"
    with pytest.raises(UserError, match=message):
        make_judges(tmp_path, name)(samples)


def test_rewards_must_be_numbers(tmp_path):
    (tmp_path / "odd.py").write_text("""
import torch
def grid(completions, **_): return torch.zeros(len(completions), 2)
def huge(completions, **_): return [10 ** 400] * len(completions)
def single(completions, **_): return torch.tensor(1.0)
def table(completions, **_): return {0: 1.0, 1: 2.0}
def tensors(completions, **_): return torch.ones(len(completions))
""")
    for name, message in (("grid", "file:7: grid returned .0.0, 0.0. for the completion 'a'"), ("huge", "file:7: huge returned 1000"), ("single", "single returned float; expected a list"), ("table", "table returned dict")):
        with pytest.raises(UserError, match=message):
            RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/odd.py:{name}"]), None, "cpu")([make_sample("a"), make_sample("b")])
    samples = [make_sample("a"), make_sample("b")]
    RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/odd.py:tensors"]), None, "cpu")(samples)
    assert [sample.reward for sample in samples] == [1, 1]


@pytest.mark.parametrize("name, message", [("exakt", "'exakt' is not one of exact_answer"), ("none.py:f", "file not found: 'none.py'"), ("regex:(", "regex:\\("),
                                           ("length:-3", "length:-3: '-3' must be a number of tokens above 0"), ("length", "'length' must have the form length:TOKENS"), ("exact_answer:x", "must have the form exact_answer"), ("length:x", "length:x: 'x' must be a number"), ("no/where", "rl.reward_funcs"), ("number_afterwards", "is not one of")])
def test_invalid_reward_names_raise_errors(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        RL.Judges(RL.RLSection(method="grpo", reward_funcs=[name]), None, "cpu")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    with pytest.raises(UserError, match="has no function 'other'; choose a function: .*functions.py:letters, "):
        RL.Judges.find(f"{tmp_path}/functions.py:other", None, "cpu")
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
    with pytest.raises(UserError, match="'nosuch' is not one of exact_answer, .*ends_with:TEXT"):
        changed.Judges.find("nosuch", None, "cpu")
    assert [changed.builtin("ends_with:fox")(make_sample(text)) for text in ("a fox", "an owl")] == [1, 0]


def test_a_missing_answer_is_reported_before_the_first_rollout():
    with pytest.raises(UserError, match="file:7: exact_answer needs the key 'answer'; set rl.columns"):
        RL.exact_answer(make_sample("abc"))
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=["number_after:####", "length:5"]), None, "cpu")
    prompts = [RL.Prompt(f"file:{i}", "?", [0], {"answer": "3"} if i < 9 else {}) for i in range(10)]
    judges.check(prompts[:9])
    with pytest.raises(UserError, match="file:9: number_after needs the key 'answer'"):
        judges.check(prompts)


# ----------------------------------------------------------------------------------------------------- rollouts


class Letters:
    """A tokenizer with one letter per token id."""

    chat_template, eos_token_id = None, None

    def decode(self, ids, **_) -> str:
        return "".join("abc"[i] for i in ids)


class LetterRewards:
    """The reward of a completion is the sum of the values of its letters."""

    names, metrics = ["letters"], {}

    def __init__(self, **values):
        self.values = values

    def __call__(self, samples, state) -> None:
        for sample in samples:
            sample.reward = sum(self.values[letter] for letter in sample.text)
            sample.rewards = [sample.reward]


def bandit(method: str, tmp_path, steps: int, **more) -> torch.Tensor:
    """Train on a choice among three letters with the rewards 0, 0.5 and 1 -> probabilities before and after."""
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8, initializer_range=0.5)
    model = MODEL.build(MODEL.ModelConfig(vocab_size=3, bos_token_id=None, eos_token_id=None, **sizes), ("lm", "value") if method == "ppo" else "lm", seed=3)
    settings = RL.RLSection(method=method, max_completion_length=1, **more).fill()
    training = TRAIN.TrainingSection(max_steps=steps, epochs=None, batch_size=settings.rollout_size, learning_rate=0.03, optim="adamw", weight_decay=0.0,
                                     lr_scheduler_type="linear", warmup_steps=0, mixed_precision="no", save_steps=0, max_length=8)
    prompts = [RL.Prompt("here", "a", [0], {})]
    reference = RL.Reference(model) if settings.beta else None
    start = model(tensor([[0]])).logits[0, 0].softmax(-1).detach()
    stream = RL.Rollouts(prompts, Letters(), LetterRewards(a=0.0, b=0.5, c=1.0), settings, training, reference, tmp_path)
    TRAIN.fit(model, stream, RL.rollout_loss(settings), training, tmp_path, lambda model, folder: None, device=torch.device("cpu"))
    return start, model(tensor([[0]])).logits[0, 0].softmax(-1).detach()


@pytest.mark.parametrize("method, more", [("ppo", {}), ("grpo", dict(scale_rewards="none", num_generations=128)), ("rloo", dict(num_generations=128))])
def test_a_bandit_converges_to_its_known_optimum(method, more, tmp_path):
    """Without a reference, the optimal policy always chooses the best letter. With a KL penalty, it is proportional to
    reference * exp(reward / beta) (Rafailov 2023, eq. 4); whitened advantages do not change this optimum. GRPO's KL estimate has
    the gradient of KL(reference || policy). Its optimal policy is beta * reference / (c - reward), with c such that the sum is 1."""
    _, alone = bandit(method, tmp_path, 80, rollout_size=128, beta=0.0, **more)
    assert float(alone[2]) > 0.95
    start, pulled = bandit(method, tmp_path, 200, rollout_size=128, beta=0.5, **more)
    rewards = tensor([0.0, 0.5, 1.0])
    best = (start.log() + rewards / 0.5).softmax(-1)
    if method == "grpo":
        low, high = 1.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float((0.5 * start / (middle - rewards)).sum()) > 1 else (low, middle)
        best = 0.5 * start / (low - rewards)
    torch.testing.assert_close(pulled, best, atol=0.05, rtol=0)


def rollouts(model, prompts, tmp_path, batch_size, method, judges, tokenizer, **more) -> RL.Rollouts:
    settings = RL.RLSection(**{**dict(method=method, rollout_size=16, num_generations=4, max_completion_length=8, rollout_batch_size=16), **more}).fill()
    training = TRAIN.TrainingSection(max_steps=1, epochs=None, batch_size=batch_size)
    stream = RL.Rollouts(prompts, tokenizer, judges, settings, training, RL.Reference(model) if settings.beta else None, tmp_path)
    stream.start(TRAIN.Run(model, training, torch.device("cpu"), "no"))
    return stream


class LengthReward:
    names, metrics = ["length"], {}

    def __call__(self, samples, state) -> None:
        for sample in samples:
            sample.reward = float(len(sample.text) % 5)
            sample.rewards = [sample.reward]


def some_prompts(tokenizer, count: int = 6) -> list[RL.Prompt]:
    return [RL.Prompt(f"line {i}", text, TOKENIZER.encode_prompt(tokenizer, text[:12]), {}) for i, text in enumerate(make_text(count, seed=9))]


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 5)])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_an_unchanged_policy_has_ratio_one(method, temperature, top_k, model_folder, tokenizer, tmp_path):
    """Log-probabilities from sampling, scoring and training agree for all minibatch sizes, and equal those of the reference."""
    model = MODEL.load(model_folder, head=("lm", "value") if method == "ppo" else None)
    for size in (16, 4):
        stream = rollouts(model, some_prompts(tokenizer), tmp_path, size, method, LengthReward(), tokenizer, temperature=temperature, top_k=top_k)
        batches = [next(stream) for _ in range(16 // size)]
        found = stream.metrics()
        assert found["sampling/logp_difference_max"] < 1e-5 and abs(found["kl"]) < 1e-6
        totals = {name: sum(batch["counts"][name] for batch in batches) for name in ("tokens", "completions")} | {"micro_batches": 1}
        loss_fn, sums = RL.rollout_loss(stream.settings), {}
        for batch in batches:
            out = model.train()(batch["input_ids"], positions=batch["positions"], targets=batch["targets"], temperature=temperature)
            mask = batch["targets"] != -100
            assert float((torch.exp(out.logprobs - batch["old"]) - 1).abs()[mask].max()) < 1e-5
            for name, value in loss_fn(model, batch, totals)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        assert sums["clip_ratio"] == 0 and abs(sums["approx_kl"]) < 1e-6
        if method == "grpo":
            assert totals["completions"] == 16


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


def test_a_failing_tool_call_does_not_stop_the_run(chat, tmp_path):
    tools = tools_of(tmp_path, chat, "add", "wait")
    assert [schema["function"]["name"] for schema in tools.schemas] == ["add", "wait"]
    for call, given in ((("add", {"a": 1, "b": 2}), ("3", False)), (("add", {"a": 13, "b": 2}), ("Error: ValueError: bad luck", True)),
                        (("add", {"a": 14, "b": 2}), ("Error: no result within 0.2 seconds", True)), (("add", {"a": 15, "b": 2}), ("Error: SystemExit: 3", True)),
                        (("add", {"a": 16, "b": 2}), ("? <|im_end|>", False)), (("add", {"a": 17, "b": 2}), ("False", False)),
                        (("wait", {"seconds": 0.0}), ("done", False)), (("wait", {"seconds": 9.0}), ("Error: no result within 0.2 seconds", True)),
                        (("wait", {"seconds": 0.0}), ("done", False))):
        assert tools.run(*call) == given
    assert tools.run("add", {"x": 1})[0].startswith("Error: TypeError") and tools.run("sub", {}) == ("Error: there is no tool 'sub'; the tools are add, wait", True)
    for names, message in ((["bare"], "bare needs a type hint for each argument and a Google-style docstring"), (["add", "add"], "two functions are named 'add'"), (["none"], "choose a function: .*:add, .*:wait, ")):
        with pytest.raises(UserError, match=f"rl.tools: .*{message}"):
            tools_of(tmp_path, chat, *names)
    chat = transformers.PreTrainedTokenizerFast(tokenizer_object=chat.backend_tokenizer, **chat.special_tokens_map)
    chat.chat_template = THINKING
    with pytest.raises(UserError, match="rl.tools: .*the chat template .*tool calls"):
        tools_of(tmp_path, chat, "add")


def test_calls_are_parsed_and_results_follow_the_template(chat, tmp_path):
    tools = tools_of(tmp_path, chat, "add")
    good, prompt = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>', TOKENIZER.render_chat(chat, QUESTION, tools.schemas, add_generation_prompt=True).ids

    def completed(text: str, finish: str = "stop") -> RL.Sample:
        ids = chat(text + "<|im_end|>", add_special_tokens=False).input_ids
        return RL.Sample(RL.Prompt("here", QUESTION, prompt, {}), 0, ids, finish, text, [0.0] * len(ids))

    sample = completed("Let me see." + good)
    end = len(sample.ids)
    assert tools.run_calls(sample, 500) and (sample.calls, sample.failures, sample.length) == (1, 0, end - sample.start)
    whole = [*QUESTION, *sample.messages]
    assert [turn["role"] for turn in sample.messages] == ["assistant", "tool"] and sample.messages[1]["content"] == "5"
    assert sample.ids == TOKENIZER.render_chat(chat, whole, tools.schemas, add_generation_prompt=True).ids and sample.places == list(range(sample.start, end))
    for text, failures, tail in (('<tool_call>{"name": "add", "arg', 1, "cannot be parsed"), (good + "<tool_call>{", 1, "cannot be parsed"), (good.replace("add", "sub"), 1, "no tool 'sub'"),
                                 (good.replace('"a"', '"c"'), 1, "unexpected keyword")):
        sample = completed(text)
        assert tools.run_calls(sample, 500) and sample.failures == failures and tail in sample.messages[-1]["content"]
    sample = completed(good)
    assert not tools.run_calls(sample, sample.length + 4) and sample.finish == "length" and len(sample.messages) == 1 and sample.ids[sample.start :] == chat(good + "<|im_end|>", add_special_tokens=False).input_ids
    for sample in (completed("It is 5."), completed(good, "length")):
        assert not tools.run_calls(sample, 500) and not sample.calls


def test_a_missing_column_is_reported_before_anything_is_generated(tmp_path):
    (tmp_path / "judge.py").write_text("def wants(completions, target, *, size, prompts, limit=3, **_):\n    return [0.0 for _ in completions]\n")
    judges = RL.Judges(RL.RLSection(method="grpo", reward_funcs=[f"{tmp_path}/judge.py:wants"]), None, "cpu")
    with pytest.raises(UserError, match="rl.reward_funcs: wants needs the key 'size', but the records have prompt, target; set rl.columns"):
        judges.check([RL.Prompt("here", "?", [0], {"target": 1})])
    judges.check([RL.Prompt("here", "?", [0], {"target": 1}), RL.Prompt("there", "?", [0], {"size": 1})])


def test_a_changed_file_is_loaded_again(tmp_path, monkeypatch):
    """Python's bytecode cache compares only whole seconds and the file size."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for text in ("1", "2", "3"):
        (tmp_path / "judge.py").write_text(f"def judge(completions, **_):\n    return [{text}.0 for _ in completions]\n")
        assert RL.user_function(f"{tmp_path}/judge.py:judge", "rl.reward_funcs")(completions=["a"]) == [float(text)]


# A file of tools that treats each completion of a prompt with an even number as a call, in every process that loads it.
ALWAYS = TOOLS + '''
import RL
def always(self, sample):
    if sample.number % 2 or sample.finish != "stop":
        return []
    sample.finish = "tool_calls"
    return [("add", {"a": sample.number, "b": len(sample.messages)})]
RL.Tools.parse_calls = always
'''


@pytest.fixture
def always(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(RL.Tools, "parse_calls", RL.Tools.parse_calls)  # restored afterwards
    (tmp_path / "always.py").write_text(ALWAYS)
    return f"{tmp_path}/always.py:add"


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_only_generated_tokens_are_trained(method, assets, chat, tmp_path, always):
    """In rollouts with tools, sampled log-probabilities equal those of a full forward pass for all batch sizes."""
    model = MODEL.load(assets / "base", head=("lm", "value") if method == "ppo" else None)
    model.config.eos_token_id = list(range(4, 60))  # short turns
    prompts = [RL.Prompt(f"line {i}", QUESTION, TOKENIZER.prompt_ids(chat, QUESTION), {}) for i in range(3)]
    found = []
    for size in (16, 3):
        stream = rollouts(model, prompts, tmp_path, 16, method, LengthReward(), chat, max_completion_length=64, rollout_batch_size=size,
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
        [sample] = [sample for sample in stream.samples if sample.ids[:-1] == ids[: int(batch["positions"][row].max()) + 1].tolist()][:1]
        places = (batch["targets"][row] != -100).nonzero()[:, 0]
        assert places.tolist() == [place - 1 for place in sample.places] and torch.equal(batch["old"][row, places], sample.old)
    if method == "ppo":  # the reward is at the last token, and its return reaches earlier turns
        sample = several[0]
        kl = stream.settings.beta * (sample.old - sample.reference)
        torch.testing.assert_close(sample.returns, sample.reward - (kl.flip(0).cumsum(0).flip(0)), atol=1e-4, rtol=0)


def test_a_run_with_tools_resumes_exactly(chat, tmp_path, monkeypatch, capsys, always):
    """Reward functions and rollouts.jsonl get all turns, validation uses tools as well, and two processes match one process."""
    config = MODEL.ModelConfig(vocab_size=len(chat), bos_token_id=chat.bos_token_id, eos_token_id=list(range(4, 60)), initializer_range=0.2, hidden_size=32,
                               intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=700)
    MODEL.save(MODEL.build(config, seed=1), tmp_path / "base")
    TOKENIZER.save(chat, tmp_path / "base")
    (tmp_path / "judge.py").write_text("def turns(completions, log_metric, log_extra, **_):\n    log_metric('turns', 7)\n    log_extra('roles', [[t['role'] for t in c] for c in completions])\n"
                                       "    return [len(c) + len(c[-1]['content']) % 3 for c in completions]\n")
    for name, numbers in (("prompts", range(4)), ("held", range(20, 22))):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"What is {i}?"} for i in numbers])
    monkeypatch.setattr(TRAIN, "plot_curves", lambda *_, **__: None)  # takes longer than these steps
    flags = in_file(tmp_path / "settings.yaml", ["--model", tmp_path / "base", "--data", tmp_path / "prompts.jsonl", "--data.validation", tmp_path / "held.jsonl", "--rl.method", "grpo", "--rl.tools", always, "--rl.reward_funcs",
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


def test_advantages_belong_to_the_correct_tokens(model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head=("lm", "value"))
    with torch.no_grad():
        model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    stream = rollouts(model, some_prompts(tokenizer), tmp_path, 16, "ppo", LengthReward(), tokenizer, num_generations=1, gamma=0.9, lam=0.8, beta=0.3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.02)
    batch = next(stream)
    assert [sample.number for sample in stream.samples] == list(range(16))
    start = MODEL.load(model_folder)
    raw, rows = [], []
    for sample in stream.samples:
        ids = tensor([sample.ids])
        assert sample.ids[: sample.start] == some_prompts(tokenizer)[int(sample.where.split()[1])].ids
        with torch.no_grad():
            now, then = (token_logprobs(m, ids)[0, sample.start - 1 :] for m in (model, start))
            values = model(ids, want=("values",)).values[0, sample.start - 1 : -1]
        torch.testing.assert_close(sample.old, now, atol=1e-5, rtol=0)
        torch.testing.assert_close(sample.reference, then, atol=1e-5, rtol=0)
        rewards = -0.3 * (now - then)
        rewards[-1] += sample.reward
        advantages, returns = RL.gae(rewards[None], values[None], torch.ones(1, sample.length, dtype=torch.bool), 0.9, 0.8)
        torch.testing.assert_close(sample.returns, returns[0], atol=1e-4, rtol=0)
        raw.append(advantages[0])
        rows.append(sample)
    all_advantages = torch.cat(raw)
    for sample, expected in zip(rows, raw, strict=True):
        torch.testing.assert_close(sample.advantages, (expected - all_advantages.mean()) / all_advantages.std(), atol=1e-4, rtol=0)
    for row, ids in enumerate(batch["input_ids"]):
        [sample] = [sample for sample in stream.samples if sample.ids[:-1] == ids[: len(sample.ids) - 1].tolist() and batch["positions"][row].max() == len(sample.ids) - 2][:1]
        places = (batch["targets"][row] != -100).nonzero()[:, 0]
        assert places.tolist() == list(range(sample.start - 1, len(sample.ids) - 1)) and batch["targets"][row, places].tolist() == sample.ids[sample.start :]
        assert torch.equal(batch["advantages"][row, places], sample.advantages)


def test_equal_rewards_have_no_gradient_and_truncated_completions_can_be_masked(model_folder, tokenizer, tmp_path):
    class EqualReward(LengthReward):
        def __call__(self, samples, state) -> None:
            for sample in samples:
                sample.reward, sample.rewards = 1.0, [1.0]

    model = MODEL.load(model_folder)
    stream = rollouts(model, some_prompts(tokenizer), tmp_path, 16, "grpo", EqualReward(), tokenizer, beta=0.0)
    batch = next(stream)
    loss, _ = RL.rollout_loss(stream.settings)(model, batch, {"tokens": 1, "completions": 1, "micro_batches": 1})
    loss.backward()
    assert stream.metrics()["frac_reward_zero_std"] == 1 and all(not weight.grad.any() for weight in model.parameters())
    stream = rollouts(model, some_prompts(tokenizer), tmp_path, 16, "grpo", LengthReward(), tokenizer, mask_truncated_completions=True)
    batch = next(stream)
    truncated = sum(sample.finish == "length" for sample in stream.samples)
    assert truncated > 0 and batch["counts"]["completions"] == 16 and int((batch["targets"] != -100).any(1).sum()) == 16 - truncated


def test_a_failing_reward_function_leaves_the_stream_unchanged(model_folder, tokenizer, tmp_path):
    class Failing(LengthReward):
        calls = 0

        def __call__(self, samples, state) -> None:
            super().__call__(samples, state)
            self.calls += 1
            if self.calls == 3:
                raise UserError("the service is gone")

    def stream():
        return rollouts(model, some_prompts(tokenizer), tmp_path, 16, "grpo", Failing(), tokenizer)

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


def test_resuming_with_other_prompts_or_columns_is_an_error(model_folder, tokenizer, tmp_path):
    """The error leaves rollouts.jsonl unchanged."""
    model, prompts = MODEL.load(model_folder), some_prompts(tokenizer)
    stream = rollouts(model, prompts, tmp_path, 16, "grpo", LengthReward(), tokenizer)
    next(stream)
    state = stream.state_dict()
    next(stream)
    text = (tmp_path / "rollouts.jsonl").read_text()
    for other in (prompts[:-1], [*prompts[:-1], prompts[-1]._replace(columns={"answer": 7})], [prompts[0]._replace(ids=[5, 6]), *prompts[1:]]):
        with pytest.raises(UserError, match="--resume: prompts or columns differ from those of the checkpoint"):
            rollouts(model, other, tmp_path, 16, "grpo", LengthReward(), tokenizer).load_state_dict(state)
    again = rollouts(model, prompts, tmp_path, 16, "grpo", LengthReward(), tokenizer)
    again.load_state_dict(state)
    assert (tmp_path / "rollouts.jsonl").read_text() == text
    next(again)
    assert (tmp_path / "rollouts.jsonl").read_text() == text


@pytest.mark.parametrize("method, more", [("ppo", {}), ("grpo", dict(beta=0.0)), ("rloo", {})])
def test_losses_are_weighted_by_the_sampler_ratio(method, more, model_folder, tokenizer, tmp_path):
    model = MODEL.load(model_folder, head=("lm", "value") if method == "ppo" else "lm")
    batch = next(rollouts(model, some_prompts(tokenizer), tmp_path, 16, method, LengthReward(), tokenizer, **more))
    torch.testing.assert_close(batch["sampled"], batch["old"], atol=1e-4, rtol=0)
    mask, totals = batch["targets"] != -100, {**batch["counts"], "micro_batches": 1}
    length = mask.sum(1, keepdim=True) if method == "rloo" else 1  # one ratio per completion
    batch["advantages"] = torch.ones_like(batch["advantages"])
    for largest, factor, loss in ((None, 9.0, -1.0), (3.0, 1.0, -1.0), (3.0, 0.5, -0.5), (3.0, 9.0, -3.0)):
        loss_fn = RL.rollout_loss(RL.RLSection(method=method, importance_sampling_clip_max=largest, **more).fill())
        batch["sampled"] = (batch["old"] - math.log(factor) / length) * mask
        assert float(loss_fn(model, batch, totals)[1]["policy_loss"]) == pytest.approx(loss, rel=1e-4)


def test_groups_with_equal_rewards_are_replaced(model_folder, tokenizer, tmp_path):
    class Some(LengthReward):
        def __call__(self, samples, state) -> None:
            for i, sample in enumerate(samples):
                sample.reward = float(i % 2 and sample.number % 3 == 0)  # prompts 0, 3, 6, ... have different rewards
                sample.rewards = [sample.reward]

    model = MODEL.load(model_folder)
    for limit, numbers, drawn in ((0, [0, 1, 2, 3], 4), (1, [0, 1, 2, 3], 6), (2, [0, 1, 3, 6], 8), (9, [0, 3, 6, 9], 10)):
        stream = rollouts(model, some_prompts(tokenizer), tmp_path, 16, "grpo", Some(), tokenizer, beta=0.0, dynamic_sampling=limit)
        next(stream)
        assert [sample.number for sample in stream.samples[::4]] == numbers and stream.drawn == drawn and len(stream.samples) == 16
        assert stream.metrics().get("frac_redrawn", 0.0) == pytest.approx(1 - 4 / drawn)
    other = rollouts(model, some_prompts(tokenizer), tmp_path, 16, "grpo", Some(), tokenizer, beta=0.0, dynamic_sampling=9)
    other.load_state_dict(stream.state_dict())
    next(stream), next(other)
    assert [sample.ids for sample in stream.samples] == [sample.ids for sample in other.samples] and stream.drawn == other.drawn > 18


def test_dropout_is_disabled(tmp_path):
    model = MODEL.build(MODEL.ModelConfig(vocab_size=40, attention_dropout=0.3, resid_pdrop=0.3, embd_pdrop=0.3, hidden_size=32, intermediate_size=48,
                                          num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)).train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    RL.disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                                                                dropout=0.3, attention_dropout=0.3, max_position_embeddings=32))
    theirs.save_pretrained(tmp_path)
    model = MODEL.load(tmp_path).train()
    RL.disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="session")
def assets(tmp_path_factory, chat, tokenizer):
    """A folder with a model that has a chat template, pairs whose chosen completions are "fox fox", and prompts with the answer fox."""
    folder = tmp_path_factory.mktemp("rl")
    config = MODEL.ModelConfig(vocab_size=len(chat), bos_token_id=chat.bos_token_id, eos_token_id=chat.eos_token_id, initializer_range=0.2, hidden_size=32,
                               intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    MODEL.save(MODEL.build(config, seed=1), folder / "base")
    TOKENIZER.save(chat, folder / "base")
    lines = make_text(240, seed=5)
    write(folder / "pairs.jsonl", [{"prompt": a, "chosen": "fox fox", "rejected": b} for a, b in zip(lines[:80], lines[80:160], strict=True)])
    write(folder / "prompts.jsonl", [{"prompt": a[:20], "answer": "fox"} for a in lines[160:]])
    return folder


def flags_of(assets, method: str) -> list[str]:
    online = method in RL.ON_POLICY
    flags = ["--model", assets / "base", "--data", assets / ("prompts.jsonl" if online else "pairs.jsonl"), "--rl.method", method, "--batch-size", "8", "--learning-rate", "3e-3",
             "--training.logging_steps", "1", "--training.sample_tokens", "4", "--training.warmup_steps", "0"]
    flags += ["--rl.rollout_size", "16", "--rl.max_completion_length", "6", "--rl.reward_funcs", "regex:o", "length:3", "--rl.eval_prompts", "6"] if online else []
    return in_file(assets / f"{method}.yaml", flags, RL, "rl")


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


STEPS = {"ppo": 16, "grpo": 8, "rloo": 8}


@pytest.mark.parametrize("method, more", [*[(method, []) for method in (*RL.OFFLINE, *RL.ON_POLICY)], ("dpo", ["--lora.r", "4"]), ("ppo", ["--lora.r", "4"]),
                                          ("grpo", ["--lora.r", "4", "--rl.num_iterations", "2", "--rl.dynamic_sampling", "2", "--rl.num_generations", "2"])])
def test_every_method_learns_and_resumes_exactly(method, more, assets, tmp_path):
    """After resuming, also inside a rollout, the run repeats an uninterrupted run."""
    steps = STEPS.get(method, 12)
    flags = [*flags_of(assets, method), *more, "--max-steps", str(steps), "--training.save_steps", str(steps // 2 - 1), "--training.save_total_limit", "9"]
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
        MODEL.load(str(assets / "base"), adapter=tmp_path / "whole")
    else:
        names = set(load_file(tmp_path / "whole" / "model.safetensors"))
        assert ("score.weight" in names) == (method == "reward") and not any("value" in name for name in names)
        kind = transformers.AutoModelForSequenceClassification if method == "reward" else transformers.AutoModelForCausalLM
        kind.from_pretrained(tmp_path / "whole")


def test_resuming_does_not_repeat_rollouts_in_the_file(assets, tmp_path):
    flags = [*flags_of(assets, "grpo"), "--out", str(tmp_path / "run"), "--training.save_steps", "2"]
    RL.main([*flags, "--max-steps", "4", "--training.lr_scheduler_type", "constant"])
    for folder in TRAIN.checkpoints(tmp_path / "run")[1:]:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    before = (tmp_path / "run" / "rollouts.jsonl").read_text()
    RL.main([*flags, "--max-steps", "4", "--training.lr_scheduler_type", "constant", "--resume", "auto"])
    assert (tmp_path / "run" / "rollouts.jsonl").read_text() == before and before.count("\n") == 32


def test_resuming_inside_a_rollout_allows_another_batch_size(assets, tmp_path):
    flags = [*flags_of(assets, "ppo"), "--max-steps", "8", "--rl.num_iterations", "4", "--training.mixed_precision", "no"]
    RL.main([*flags, "--training.save_steps", "3", "--training.save_total_limit", "9", "--out", str(tmp_path / "whole")])
    cut = ["--batch-size", "4", "--resume", str(tmp_path / "whole" / "ckpt-step-000003")]
    RL.main([*cut, "--grad-accum", "2", "--out", str(tmp_path / "cut")])
    whole, other = ([record["loss"] for record in log_of(tmp_path / name) if "loss" in record and record["step"] > 3] for name in ("whole", "cut"))
    assert len(whole) == 5 and other == pytest.approx(whole, abs=1e-5)
    with pytest.raises(UserError, match="40 samples are left in the checkpoint's rollout, not divisible by the 16 of an optimizer step"):
        RL.main([*cut, "--grad-accum", "4", "--out", str(tmp_path / "wide")])


def test_resuming_deletes_later_rollouts_from_the_file(assets, tmp_path):
    flags = [*flags_of(assets, "grpo"), "--rl.num_iterations", "2", "--training.save_steps", "1", "--training.save_total_limit", "9", "--out", str(tmp_path)]
    RL.main([*flags, "--max-steps", "8"])

    def rollouts() -> set[int]:
        return {json.loads(line)["rollout"] for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()}

    assert rollouts() == {1, 2}
    RL.main([*flags, "--max-steps", "3", "--resume", str(tmp_path / "ckpt-step-000002")])
    assert rollouts() == {1}


def test_ppo_learns_from_a_reward_model(assets, tmp_path, capsys, monkeypatch):
    RL.main([*flags_of(assets, "reward"), "--max-steps", "12", "--out", str(tmp_path / "reward")])
    conversation = {"messages": [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "fox fox"}], "n": 7}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(conversation) + "\n"))
    capsys.readouterr()
    INFER.main(["--model", str(tmp_path / "reward"), "--jsonl"])
    served = json.loads(capsys.readouterr().out)
    tokenizer = TOKENIZER.load(str(tmp_path / "reward"))
    example = RL.make_example(tokenizer, "What is red?", "fox fox", None, "")
    sample = RL.Sample(RL.Prompt("", "", example.ids[: example.start], {}), 0, example.ids[example.start :], "stop", "", None)
    assert served["n"] == 7 and [served["reward"]] == pytest.approx(RL.reward_model(str(tmp_path / "reward"), tokenizer, "cpu")([sample]), abs=1e-5)
    kept, usual = [], RL.Rollouts.write_transcripts
    monkeypatch.setattr(RL.Rollouts, "write_transcripts", lambda self: (kept.extend(self.samples), usual(self)))
    flags = [*flags_of(assets, "ppo"), "--rl.reward_funcs", str(tmp_path / "reward")]
    RL.main([*flags, "--data", str(assets / "pairs.jsonl"), "--max-steps", "8", "--rl.missing_eos_penalty", "0.5", "--out", str(tmp_path / "ppo")])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert len(kept) == 64
    for sample in kept:
        assert sample.rewards == pytest.approx([float(theirs(tensor([sample.ids])).logits)], abs=1e-4)
        assert sample.reward == pytest.approx(sample.rewards[0] - 0.5 * (sample.finish == "length"))
    log = [line for line in log_of(tmp_path / "ppo") if "explained_variance" in line]
    assert {"value_loss", "policy_loss", "clip_ratio", "approx_kl", "entropy", "kl", "reward", "completions/mean_length"} <= set(log[-1])


def test_another_reference_can_be_set(assets, tmp_path):
    model = MODEL.load(str(assets / "base"))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.2 * torch.randn(model.model.embed_tokens.weight.shape, generator=torch.Generator().manual_seed(0)))
    MODEL.save(model, tmp_path / "other")
    TOKENIZER.save(TOKENIZER.load(str(assets / "base")), tmp_path / "other")
    for method in ("dpo", "grpo"):
        alone = ["--rl.rpo_alpha", "0"] if method == "dpo" else []
        RL.main([*flags_of(assets, method), *alone, "--max-steps", "2", "--rl.ref_model", str(tmp_path / "other"), "--out", str(tmp_path / method)])
    first = next(record for record in log_of(tmp_path / "dpo") if "loss" in record)
    assert abs(first["loss"] - math.log(2)) > 1e-3 and next(record for record in log_of(tmp_path / "grpo") if "kl" in record)["kl"] > 1e-3


def test_forgetting_is_measured_and_prints_a_warning(assets, tmp_path, capsys):
    """`kept` is the exact match of greedy answers. A loss of more than ten points prints a warning."""
    model, tokenizer = MODEL.load(str(assets / "base")), TOKENIZER.load(str(assets / "base"))
    questions = make_text(6, seed=9)
    rows = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids = TOKENIZER.render_chat(tokenizer, messages, add_generation_prompt=True).ids
        [[answer]] = INFER.generate(model, [ids], INFER.Sampling(64, temperature=0), tokenizer)
        rows.append({"messages": [*messages, {"role": "assistant", "content": answer.text}], "answer": "x"})
    rows[0]["messages"][-1]["content"] += " other"
    write(tmp_path / "kept.jsonl", rows)
    flags = [*flags_of(assets, "dpo"), "--rl.kept", str(tmp_path / "kept.jsonl"), "--max-steps", "6", "--learning-rate", "0.05", "--out", str(tmp_path / "out")]
    flags += ["--training.mixed_precision", "no"]
    result = RL.main(flags)
    assert result.before["kept"] == pytest.approx(5 / 6) and result.after["kept"] < 0.7
    assert re.search(r"warning: held-out kept fell from 83.3% to \d+.\d%", capsys.readouterr().err)
    with pytest.raises(UserError, match="rl.kept: file not found"):
        RL.main([*flags_of(assets, "dpo"), "--rl.kept", "none.jsonl", "--out", str(tmp_path / "none")])


def test_an_adapter_can_be_the_reference(assets, tmp_path):
    RL.main([*flags_of(assets, "dpo"), "--lora.r", "2", "--max-steps", "2", "--out", str(tmp_path / "adapter")])
    RL.main([*flags_of(assets, "dpo"), "--max-steps", "1", "--rl.ref_model", str(tmp_path / "adapter"), "--out", str(tmp_path / "run")])
    first = next(record for record in log_of(tmp_path / "run") if "loss" in record)
    assert first["loss"] != pytest.approx(math.log(2), abs=1e-6)


def test_a_loaded_adapter_is_the_reference_of_its_own_training(assets, tmp_path):
    """The initial KL is exactly zero, and the trained adapter differs from the reference."""
    adapter = saved_adapter(assets / "base", tmp_path / "adapter", 3)
    for precision in ("no", "bf16"):
        RL.main([*flags_of(assets, "rloo"), "--adapter", adapter, "--max-steps", "4", "--training.mixed_precision", precision, "--data.validation", "none", "--out", str(tmp_path / precision)])
        kl = [record["kl"] for record in log_of(tmp_path / precision) if "kl" in record]
        assert kl[0] == 0 < kl[-1]


def test_columns_may_have_values_that_json_lacks(assets, tmp_path):
    import pyarrow
    import pyarrow.parquet

    day = datetime.datetime(2020, 1, 2)
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}", "at": day}], "answer": "fox", "day": day, "raw": b"x"} for i in range(8)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "judge.py").write_text("def late(completions, day, raw, **_): return [float(d.year + len(r)) for d, r in zip(day, raw)]\n")
    flags = in_file(tmp_path / "settings.yaml", [*flags_of(assets, "grpo"), "--data", tmp_path / "rows.parquet", "--data.validation", "none", "--rl.reward_funcs", f"{tmp_path}/judge.py:late",
                                            "--batch-size", "8", "--training.save_steps", "1", "--training.save_total_limit", "9", "--out", tmp_path / "run"], RL, "rl")
    RL.main([*flags, "--max-steps", "2"])
    assert json.loads((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()[0])["reward"] == 2021
    RL.main([*flags, "--max-steps", "2", "--resume", str(tmp_path / "run" / "ckpt-step-000001")])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(UserError, match="bad.jsonl:1: the key 'completions' is reserved for an argument of reward functions; rename it with rl.columns"):
        RL.main([*flags, "--data", str(bad), "--max-steps", "2", "--out", str(tmp_path / "bad")])


def test_the_loss_breaks_ties_between_models(assets, tmp_path, monkeypatch):
    values = iter([(0.5, 3.0), (1.0, 2.0), (1.00000001, 1.0), (1.0, 1.5), (1.0, 1.6), (1.0, 1.0)])
    monkeypatch.setattr(RL, "held_out_pairs", lambda *_: lambda model: dict(zip(("accuracy", "loss"), next(values), strict=True)))
    flags = [*flags_of(assets, "reward"), "--max-steps", "8", "--training.eval_steps", "2", "--training.load_best_model_at_end", "true", "--out", str(tmp_path / "run")]
    RL.main(flags)
    best, final = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("ckpt-step-000004", "."))
    assert all(torch.equal(best[name], final[name]) for name in best)


# ------------------------------------------------------------------------------------------------ bad input


def test_left_out_records_are_reported(assets, tmp_path, capsys):
    long = " ".join(make_text(40))
    good = [{"prompt": f"Say {i}", "chosen": "fox", "rejected": "owl"} for i in range(8)]
    bad = [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": "x", "rejected": " "}, {"prompt": long, "chosen": "x", "rejected": "y"}]
    data = write(tmp_path / "pairs.jsonl", bad + good)
    flags = in_file(tmp_path / "settings.yaml", [*flags_of(assets, "dpo"), "--data", data, "--data.validation", "none", "--max-steps", "1"], RL, "rl")
    RL.main([*flags, "--out", str(tmp_path / "run")])
    log = capsys.readouterr().err
    assert "8 pairs; 0 held out" in log
    for line, why in ((1, "whose completions are identical"), (2, "with an empty completion"), (3, "whose prompt fills training.max_length 128")):
        assert f"left out 1 {why} (the first: {data}:{line})" in log
    with pytest.raises(UserError, match="data.train: too few usable pairs: 0, expected at least 1; .*left out 1 whose completions are identical"):
        RL.main([*flags, "--data", str(write(tmp_path / "bad.jsonl", bad)), "--out", str(tmp_path / "none")])
    twice = write(tmp_path / "twice.jsonl", good + good[:2] + [{"chosen": [*QUESTION, *FOX], "rejected": [{"role": "user", "content": "Who?"}, *OWL]}])
    RL.main([*flags, "--data", str(twice), "--out", str(tmp_path / "twice")])
    log = capsys.readouterr().err
    assert f"left out 2 duplicates (the first: {twice}:9)" in log and f"left out 1 whose completions have different prompts (the first: {twice}:11)" in log
    (tmp_path / "empty.jsonl").write_text("\n")
    for key in ("--data", "--data.validation"):
        with pytest.raises(UserError, match=f"data.{'train' if key == '--data' else 'validation'}: no pair in {tmp_path}/empty.jsonl"):
            RL.main([*flags, key, str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "none")])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": long, "answer": "x"}])
    with pytest.raises(UserError, match=f"data.train: no usable prompt; left out 1 whose prompt and 6 tokens .* exceed training.max_length 128 .the first: {prompts}:1"):
        RL.main([*flags_of(assets, "grpo"), "--data", str(prompts), "--data.validation", "none", "--max-steps", "1", "--out", str(tmp_path / "none")])


@pytest.mark.parametrize("method", ["dpo", "kto", "reward", "grpo"])
def test_dry_run_shows_the_trained_tokens(method, assets, tmp_path, capsys):
    RL.main([*flags_of(assets, method), "--dry-run", "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and "prompt" in shown.split("tokens per ")[1] and "median" in shown
    if method == "grpo":
        assert shown.count("<|im_start|>assistant\n\n{\"answer\": \"fox\"}") == 3 and "at most 122 (training.max_length" in shown
    else:
        first = "desirable" if method == "kto" else "chosen"
        trained = "<|im_start|>assistant\nfox fox[[<|im_end|>" if method == "reward" else "<|im_start|>assistant\n[[fox fox<|im_end|>"
        assert shown.count("[[") == 6 and f": {first}\n" in shown and f"{trained}]]\n" in shown


@pytest.mark.parametrize("desirable, undesirable, weights, advice", [(1, 19, {}, "set rl.desirable_weight 19"), (30, 10, dict(desirable_weight=2.0), "set rl.undesirable_weight 6"),
                                                                     (8, 8, {}, None), (1, 19, dict(desirable_weight=25.0), None), (5, 0, {}, "kto needs both kinds")])
def test_kto_warns_about_imbalanced_labels(desirable, undesirable, weights, advice, capsys):
    pairs = [RL.Pair("", [], "", label=i < desirable) for i in range(desirable + undesirable)]
    RL.warn_imbalance(pairs, RL.RLSection(method="kto", **weights))
    log = capsys.readouterr().err
    assert advice in log and f"warning: {desirable} desirable and {undesirable} undesirable completions" in log if advice else not log


@pytest.mark.parametrize("flags, message", [
    (["--rl.method", "dpo", "--rl.gamma", "0.5"], "rl.gamma: has no effect with rl.method dpo .only with ppo"),
    (["--rl.method", "grpo", "--rl.loss_type", "sigmoid"], "rl.loss_type: 'sigmoid' is not one of dapo, grpo, dr_grpo"),
    (["--rl.method", "kto", "--rl.loss_type", "hinge"], "kto has only one loss"),
    (["--rl.method", "grpo", "--rl.num_generations", "1"], "rl.num_generations: 1 must be at least 2: grpo compares"),
    (["--rl.method", "grpo", "--rl.num_generations", "3"], "rl.rollout_size: 16 is not divisible by rl.num_generations 3"),
    (["--rl.method", "grpo", "--batch-size", "5"], "rl.rollout_size: 16 completions do not fill whole optimizer steps of training.batch_size 5"),
    (["--rl.method", "grpo", "--rl.reward_weights", "[1]"], "rl.reward_weights: expected 2, one for each of rl.reward_funcs; found 1"),
    (["--rl.method", "dpo", "--rl.beta", "0"], "rl.beta: must be above 0 for dpo"),
    (["--rl.method", "dpo", "--rl.loss_type", "robust"], "rl.label_smoothing: must be above 0 for rl.loss_type robust"),
    (["--rl.method", "dpo", "--lora.r", "2", "--lora.lora_dropout", "0.1"], "lora.lora_dropout: dropout changes the probabilities that RL.py compares; set 0"),
    (["--rl.method", "grpo", "--rl.temperature", "0"], "rl.temperature: 0.0 must be at least 0.001"),
    (["--rl.method", "gppo"], "'gppo' is not one of"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.importance_sampling_level", "sequence"], "importance_sampling_level: sequence is not available"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.epsilon", "0.3"], "rl.epsilon: has no effect with rl.loss_type cispo"),
    (["--rl.method", "grpo", "--rl.loss_type", "cispo", "--rl.epsilon_high", "0.2"], "rl.epsilon_high: 0.2 must be at least 1 with rl.loss_type cispo"),
    (["--rl.method", "dpo", "--training.report_to", "wandb"], "training.report_to: wandb needs `pip install wandb`"),
])
def test_incompatible_settings_raise_errors(flags, message, assets, tmp_path):
    method = flags[1] if flags[1] != "gppo" else "grpo"
    with pytest.raises(UserError, match=message):
        RL.main([*flags_of(assets, method), *flags, "--max-steps", "1", "--out", str(tmp_path / "run")])


def test_incompatible_models_raise_errors(assets, tmp_path, model_folder):
    other = TOKENIZER.train(make_text(50, seed=8), 290, "bpe")
    reward = MODEL.build(MODEL.ModelConfig(vocab_size=len(other), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, labels=["reward"]), "score")
    MODEL.save(reward, tmp_path / "reward")
    TOKENIZER.save(other, tmp_path / "reward")
    MODEL.save(MODEL.build(MODEL.ModelConfig(vocab_size=len(other), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)), tmp_path / "lm")
    TOKENIZER.save(other, tmp_path / "lm")
    flags = [*flags_of(assets, "grpo"), "--max-steps", "1", "--out", str(tmp_path / "run")]
    for more, message in ((["--rl.reward_funcs", str(tmp_path / "reward")], "the tokenizers of .* and the policy .* differ"), (["--rl.reward_funcs", str(assets / "base")], "is not a reward model with a single score"),
                          (["--rl.ref_model", str(tmp_path / "lm")], "does not match the policy: its tokenizer lacks"), (["--model", str(tmp_path / "reward")], "has no language-model head")):
        with pytest.raises(UserError, match=message):
            RL.main([*flags, *more])
    assert not (tmp_path / "run" / "config.yaml").exists()


# ------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_gpt2_without_a_chat_template(method, tmp_path):
    """A folder written by transformers, without a chat template, with the bundled data."""
    tokenizer = TOKENIZER.train(make_text(200), 300, "byte")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    few = ["--max-steps", "2", "--batch-size", "8", "--training.eval_batches", "2"]
    few += ["--rl.rollout_size", "8", "--rl.max_completion_length", "8", "--rl.eval_prompts", "4"] if method == "ppo" else []
    (tmp_path / "data").symlink_to(ROOT / "data")
    process = launch(tmp_path, ROOT / "RL.py", "--model", "gpt2", "--rl.method", method, "--out", "out", *few)
    out, log = process.communicate(timeout=180)
    assert process.returncode == 0 and not out, log
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result) == {"stage", "measure", "before", "after", "steps", "seconds", "peak_memory_bytes"} and result["measure"] in result["after"]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "gpt2"


def test_two_processes_match_one_process(assets, tmp_path):
    """Two processes with 4 rows match a single process with 2 x 4: completions, rewards and losses, also with sharded weights."""
    kinds = {name: flags_of(assets, name.partition("-")[0]) for name in ("dpo", "kto", "reward", "grpo", "ppo", "grpo-sharded", "ppo-lora", "rloo-sharded-lora")}
    more = {"grpo-sharded": ["--training.fsdp", "true", "--rl.dynamic_sampling", "2", "--rl.num_generations", "2"], "ppo-lora": ["--lora.r", "4"], "rloo-sharded-lora": ["--training.fsdp", "true", "--lora.r", "4"]}
    same = ["--batch-size", "4", "--max-steps", "2", "--training.mixed_precision", "no"]  # in bfloat16 the batch size changes the samples
    runs = {name: in_file(tmp_path / f"{name}.yaml", [*flags, *more.get(name, []), *same, "--out", tmp_path / name], RL, "rl") for name, flags in kinds.items()}
    two_processes(tmp_path, {"RL": list(runs.values())})
    for name, argv in runs.items():
        single = tmp_path / f"{name}-single"
        RL.main([*argv, "--training.fsdp", "false", "--grad-accum", "2", "--out", str(single)])
        logs = [[record for record in log_of(folder) if "loss" in record] for folder in (tmp_path / name, single)]
        assert len(logs[0]) == len(logs[1]) == 2
        for key in set(logs[0][0]) & {"loss", "grad_norm", "reward", "kl", "rewards/margins", "accuracy", "explained_variance"}:
            values = [[record[key] for record in log if key in record] for log in logs]
            assert key != "kl" or name == "kto" or values[0][0] == values[1][0] == 0
            assert values[0] == pytest.approx(values[1], abs=1e-5), (name, key)
        results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / name, single)]
        for when in ("before", "after"):
            assert results[0][when] == pytest.approx(results[1][when], abs=1e-4), name
        if (single / "rollouts.jsonl").exists():
            texts = [[json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()] for folder in (tmp_path / name, single)]
            assert [[record["completion"] for record in lines] for lines in texts][0] == [record["completion"] for record in texts[1]], name


# ---------------------------------------------------------------------------------------- regression tests


def test_the_reference_is_exact_in_16_bits(model_folder):
    """Autocast caches 16-bit copies of weights, and routers have a bias that is not a parameter."""
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


def test_default_and_explicit_data_files(monkeypatch):
    seen = []
    monkeypatch.setattr(TRAIN, "run_stage", lambda name, config, *_: seen.append((config.data.train, config.data.validation)))
    for flags in ([], ["--rl.method", "grpo"], ["--rl.method", "ppo", "--data", "data/preferences.jsonl"], ["--rl.method", "grpo", "--data.validation", "none"]):
        RL.main(flags)
    assert seen == [(["data/preferences.jsonl"], "data/preferences_test.jsonl"), (["data/prompts.jsonl"], "data/prompts_test.jsonl"),
                    (["data/preferences.jsonl"], "hash"), (["data/prompts.jsonl"], "none")]


def test_the_best_model_may_come_from_inside_a_rollout(assets, tmp_path, monkeypatch):
    values = iter([0.1, 0.9, 0.8, 0.7, 0.6, 0.9])
    monkeypatch.setattr(RL, "held_out_rewards", lambda *_: lambda model: {"reward": next(values)})
    flags = [*flags_of(assets, "ppo"), "--max-steps", "10", "--training.eval_steps", "3", "--training.load_best_model_at_end", "true", "--out", str(tmp_path / "run")]
    RL.main(flags)
    evaluations = [(record["step"], record["eval_reward"]) for record in log_of(tmp_path / "run") if "eval_reward" in record]
    assert evaluations == [(0, 0.1), (3, 0.9), (6, 0.8), (9, 0.7), (10, 0.6)]
    best, final = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("ckpt-step-000003", "."))
    assert all(torch.equal(best[name], final[name]) for name in best)


def test_resuming_with_changed_pairs_is_an_error(assets, tmp_path):
    lines = (assets / "pairs.jsonl").read_text().splitlines()
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines) + "\n")
    flags = [*flags_of(assets, "dpo"), "--data", str(data), "--training.save_steps", "2", "--max-steps", "4", "--out", str(tmp_path / "run")]
    RL.main(flags)
    resume = [*flags, "--resume", str(tmp_path / "run" / "ckpt-step-000002")]
    with pytest.raises(UserError, match="made with another rl.method"):
        RL.main(["--rl.method", "grpo", "--rl.loss_type", "auto", "--rl.rpo_alpha", "null", "--rl.reward_funcs", "length:3", "--rl.rollout_size", "16", "--data", str(assets / "prompts.jsonl"), "--out", str(tmp_path / "run"), "--resume", "auto"])
    data.write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(UserError, match="the pairs differ from those of the checkpoint"):
        RL.main(resume)


def test_overwrite_keeps_the_old_run_until_the_new_run_is_validated(assets, tmp_path):
    (tmp_path / "functions.py").write_text("def letters(**_):\n    raise ValueError('no letters')\n")
    flags = [*flags_of(assets, "grpo"), "--max-steps", "2", "--out", str(tmp_path / "run")]
    RL.main(flags)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match="letters failed on"):
        RL.main([*flags, "--rl.reward_funcs", f"{tmp_path}/functions.py:letters", "length:3", "--overwrite"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_run_repeats_with_its_saved_settings(assets, tmp_path):
    for method in ("reward", "grpo"):
        RL.main([*flags_of(assets, method), "--max-steps", "2", "--out", str(tmp_path / method)])
        RL.main(["--config", str(tmp_path / method / "config.yaml"), "--out", str(tmp_path / f"{method}-again")])
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in (method, f"{method}-again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_log_records_may_contain_unicode_line_breaks(tmp_path):
    records = [{"rollout": i, "completion": f"a\u2028b\x85c {i}"} for i in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records) + '{"rollout": 3, "comp')
    TRAIN.rewind(tmp_path / "log.jsonl", lambda record: record["rollout"] < 2)
    assert TRAIN.json_lines(tmp_path / "log.jsonl") == records[:2]


def test_gradients_are_finite_for_large_ratios():
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


def test_a_template_that_opens_a_thought_gives_equal_prompts(tokenizer):
    copy = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    TOKENIZER.ensure_chat(copy)
    copy.chat_template = THINKING
    for completion in ("The fox.", "<think>\nwhy</think> The fox."):
        example = RL.make_example(copy, "What is red?", completion, None, "here")
        assert example.ids[: example.start] == TOKENIZER.prompt_ids(copy, "What is red?")
        assert copy.decode(example.ids).replace(" ", "").endswith("<think>\n" + completion.removeprefix("<think>\n").replace(" ", "") + "<|im_end|>") or "why" in completion
    assert copy.decode(example.ids).count("<think>") == 1


def test_mismatched_completions_respect_the_length_limit(tokenizer):
    pairs = [pair._replace(examples=pair.examples[:1]) for pair in some_pairs(tokenizer, 6)]
    assert max(len(pair.examples[0].ids) for pair in RL.mismatched(pairs, 0, 20)) == 20


def test_a_padding_batch_runs_in_models_without_masks(tmp_path):
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4))
    theirs.save_pretrained(tmp_path)
    model = MODEL.load(tmp_path)
    nothing = torch.zeros(1, 3, dtype=torch.long)
    out = model(nothing, positions=torch.full((1, 3), -1), segment_ids=torch.full((1, 3), -1), targets=torch.full((1, 3), -100))
    assert not out.logprobs.any()
    with pytest.raises(UserError, match="no sequence classification model for mamba"):
        MODEL.load(tmp_path, head="score", changes={"labels": ["reward"]})
