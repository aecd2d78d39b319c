"""RL.py: preference optimization and reinforcement learning.

Read in this order: settings, losses of preference pairs, losses and estimators of rollouts (short functions, each with its
paper), rollouts as a stream of batches. Below the banner `edges`: preference pairs as a stream, user functions, tools, reward
functions, records, and the command line.

    python RL.py --config config.yaml                                # DPO: out/sft -> out/rl, on the bundled pairs
    python RL.py --rl.method grpo --out out/grpo                     # GRPO on sums, with a verifiable reward
    python RL.py --rl.method reward --out out/reward                 # a reward model for the same pairs, then PPO with it:
    python RL.py --rl.method ppo --rl.reward_funcs out/reward --data data/preferences.jsonl --out out/ppo
    python RL.py --rl.method grpo --data mine.jsonl --rl.reward_funcs judge.py:polite length:60 --max-minutes 1
    python RL.py --data mine.jsonl --dry-run                         # preview the trained tokens and the lengths
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import INFER
import MODEL
import SFT
import TOKENIZER
import TRAIN
from MODEL import UserError, check, knob, load_config, run_main, say

# ---------------------------------------------------------------------------------------------------- settings

OFFLINE = ("reward", "dpo", "orpo", "simpo", "kto")
ON_POLICY = ("ppo", "grpo", "rloo")
WITH_NLL = ("dpo", "orpo", "simpo")  # the loss includes the negative log-likelihood of the chosen completion
BETA = {"dpo": 0.1, "ipo": 0.5, "sigmoid_norm": 5.0, "kto": 0.1, "orpo": 0.1, "simpo": 2.0,
        "ppo": 0.05, "grpo": 0.04, "rloo": 0.05}  # default of a loss_type, else of a method
LOSS_TYPES: dict[str, tuple | dict] = {"grpo": ("dapo", "grpo", "dr_grpo", "cispo")}  # dpo's: DPO_LOSSES
SHIPPED_QUESTIONS = "data/chat_test.jsonl"

# The built-in reward functions: a name as in rl.reward_funcs -> a function of the argument after the colon, which returns the
# reward function of a sample. The help text and the error messages list these names.
REWARDS: dict[str, Callable[[str], Callable[[Sample], float]]] = {
    "exact_answer": lambda _: exact_answer,
    "number_after:MARKER": lambda marker: partial(number_after, marker),
    "format:REGEX": lambda regex: partial(matches, re.compile(regex, re.DOTALL).fullmatch),
    "regex:REGEX": lambda regex: partial(matches, re.compile(regex, re.DOTALL).search),
    "length:TOKENS": lambda limit: partial(shortness, token_limit(limit)),
}


def shipped_data(method: str) -> str:
    return "data/prompts.jsonl" if method in ON_POLICY else "data/preferences.jsonl"


rollout_knob = partial(knob, only=("method", *ON_POLICY))
ppo_knob = partial(knob, only=("method", "ppo"))


@dataclass
class RLSection:
    method: str = knob("dpo", "training method: reward, dpo, orpo, simpo, kto, ppo, grpo or rloo", (*OFFLINE, *ON_POLICY),
                       often=True)
    beta: float | None = knob(None, "KL penalty coefficient (0: off, null: the method's default); 0.1 for dpo, kto and orpo "
                                    "(odds-ratio weight), 0.5 for loss_type ipo, 5 for sigmoid_norm, 2 for simpo (reward scale), "
                                    "0.05 for ppo and rloo, 0.04 for grpo", low=0,
                              only=("method", *OFFLINE[1:], *ON_POLICY), often=True)
    loss_type: str = knob("auto", "loss: sigmoid, hinge, ipo, robust, sigmoid_norm (dpo), dapo, grpo, dr_grpo, cispo (grpo); "
                                  "auto is the first, or grpo with importance_sampling_level sequence", often=True)
    label_smoothing: float = knob(0.0, "dpo: assumed fraction of pairs with swapped labels; robust requires it", low=0, below=0.5,
                                  only=("method", "dpo"), often=True)
    rpo_alpha: float | None = knob(None, "weight of the chosen completion's log-likelihood term (Pang 2024); null is 1, 0 off",
                                   low=0, only=("method", *WITH_NLL), often=True)
    simpo_gamma: float = knob(0.5, "simpo: target reward margin", only=("method", "simpo"), often=True)
    desirable_weight: float = knob(1.0, "kto: weight of desirable completions", low=0, only=("method", "kto"), often=True)
    undesirable_weight: float = knob(1.0, "kto: weight of undesirable completions", low=0, only=("method", "kto"), often=True)
    center_rewards_coefficient: float = knob(0.01, "reward: penalty on the squared sum of a pair's rewards", low=0,
                                             only=("method", "reward"), often=True)
    columns: dict | None = knob(None, "column mapping: {prompt: my_column, chosen: another}", often=True)
    system: str | None = knob(None, "system message for prompts without one", often=True)
    ref_model: str | None = knob(None, "reference policy: a folder, or null for the initial model",
                                 only=("method", "dpo", "kto", *ON_POLICY), often=True)
    reward_funcs: list[str] = rollout_knob(
        ["exact_answer"], "ppo, grpo, rloo: reward functions, such as length:60, judge.py:function, out/reward; built-in: "
        f"{', '.join(REWARDS)}; rewards are summed with their weights", often=True)
    reward_weights: list[float] | None = rollout_knob(None, "weight of each reward function (null: 1 for all)")
    tools: list[str] = rollout_knob([], "ppo, grpo, rloo: functions that completions may call, as file.py:function", often=True)
    max_turns: int = knob(4, "with rl.tools: maximum number of assistant turns per completion", low=1, only="tools")
    tool_timeout: float = knob(10.0, "with rl.tools: maximum seconds per call", above=0, only="tools")
    rollout_size: int = rollout_knob(256, "ppo, grpo, rloo: completions per rollout, over all prompts and processes; a multiple "
                                          "of the optimizer step", low=1, often=True)
    num_generations: int | None = rollout_knob(None, "completions per prompt (null: 8, for ppo 1)", low=1, often=True)
    max_completion_length: int = rollout_knob(64, "ppo, grpo, rloo: maximum tokens per completion, including tool results",
                                              low=1, often=True)
    temperature: float = rollout_knob(1.0, "ppo, grpo, rloo: sampling temperature of the rollouts", low=1e-3, often=True)
    top_k: int = rollout_knob(0, "sample from the k most probable tokens; 0 is off", low=0)
    top_p: float = rollout_knob(1.0, "sample from the smallest set with this cumulative probability", above=0, high=1)
    rollout_batch_size: int = rollout_knob(256, "batch size for generating completions, per device", low=1, often=True)
    num_iterations: int = rollout_knob(1, "epochs per rollout", low=1, often=True)
    epsilon: float = rollout_knob(0.2, "ppo, grpo, rloo: clip range of the probability ratio", low=0, often=True)
    epsilon_high: float | None = rollout_knob(None, "upper clip range (clip-higher); null is epsilon; for loss_type cispo the "
                                                    "largest importance weight, null is 5", low=0)
    importance_sampling_level: str = knob("token", "grpo: ratio per token, or its geometric mean per sequence (GSPO)",
                                          ("token", "sequence"), only=("method", "grpo"))
    importance_sampling_clip_max: float | None = rollout_knob(
        None, "cap on the training/sampling probability ratio that weights the loss (TRL: 3); null is off", above=0)
    dynamic_sampling: int = knob(0, "extra draws per rollout, to replace prompts whose rewards are all equal (DAPO); 0 is off",
                                 low=0, only=("method", "grpo", "rloo"))
    scale_rewards: str = knob("group", "grpo: divide advantages by the standard deviation of the group or batch, or not at all",
                              ("group", "batch", "none"), only=("method", "grpo"), often=True)
    mask_truncated_completions: bool = rollout_knob(False, "exclude truncated completions from the loss")
    entropy_coef: float = rollout_knob(0.0, "coefficient of the entropy bonus, which encourages exploration")
    missing_eos_penalty: float = rollout_knob(0.0, "subtracted from the reward of each truncated completion", low=0)
    gamma: float = ppo_knob(1.0, "ppo: discount factor", low=0, high=1)
    lam: float = ppo_knob(1.0, "ppo: GAE lambda; 1 uses full returns, lower values rely more on the critic", low=0, high=1,
                          often=True)
    cliprange_value: float = ppo_knob(0.2, "ppo: clip range of the value function", low=0)
    vf_coef: float = ppo_knob(0.1, "ppo: weight of the value loss", low=0, often=True)
    kept: str | None = knob("auto", "questions to measure forgetting: a file, null, or auto (bundled file with bundled data)",
                            only=("method", "dpo", "kto", "orpo", "simpo", *ON_POLICY), often=True)
    eval_prompts: int = rollout_knob(1000, "held-out prompts to answer greedily in each validation; 0 is off", low=0,
                                     often=True)
    model: dict = knob({"name": "./out/sft"}, "overrides `model` for this stage")
    data: dict = knob({"train": ["auto"]}, "auto: data/prompts.jsonl for ppo, grpo and rloo, else data/preferences.jsonl; "
                                           "overrides `data` for this stage; the held-out sets are their ..._test.jsonl")
    training: dict = knob({"max_steps": 100, "batch_size": 64}, "overrides `training` for this stage")
    lora: dict = knob({}, "overrides `lora` for this stage")
    output: dict = knob({"dir": "./out/rl"}, "overrides `output` for this stage")

    def fill(self) -> RLSection:
        """Replace null and auto with the defaults of the method."""
        sequences = self.importance_sampling_level == "sequence"
        if self.loss_type == "auto":
            self.loss_type = "grpo" if sequences else next(iter(LOSS_TYPES.get(self.method, ("auto",))))
        defaults = {"beta": BETA.get(self.loss_type, BETA.get(self.method)),
                    "rpo_alpha": 1.0 if self.method in WITH_NLL else None,
                    "num_generations": {"ppo": 1, "grpo": 8, "rloo": 8}.get(self.method),
                    "epsilon_high": 5.0 if self.loss_type == "cispo" else None}
        for key, value in defaults.items():
            setattr(self, key, value if getattr(self, key) is None else getattr(self, key))
        return self

    def __post_init__(self):
        check(self, "rl")
        copy.copy(self).fill().check_together()

    def check_together(self) -> None:
        """Raise UserError for incompatible settings, after `fill`."""
        method, loss_type, choices = self.method, self.loss_type, LOSS_TYPES.get(self.method, ("auto",))
        group, weights, functions = self.num_generations or 1, self.reward_weights, len(self.reward_funcs)
        for wrong, message in (
            (loss_type not in choices and len(choices) == 1, f"loss_type: {method} has only one loss; leave it out"),
            (loss_type not in choices, f"loss_type: '{loss_type}' is not one of {', '.join(choices)}"),
            (method in ("grpo", "rloo") and group < 2,
             f"num_generations: {group} must be at least 2: {method} compares completions of the same prompt"),
            (self.rollout_size % group,
             f"rollout_size: {self.rollout_size} is not divisible by rl.num_generations {group}"),
            (weights is not None and len(weights) != functions,
             f"reward_weights: expected {functions}, one for each of rl.reward_funcs; found {len(weights or [])}"),
            (method in ("dpo", "kto", "simpo") and not self.beta, f"beta: must be above 0 for {method}"),
            (loss_type == "robust" and not self.label_smoothing, "label_smoothing: must be above 0 for rl.loss_type robust"),
            (self.label_smoothing and loss_type not in ("sigmoid", "robust", "sigmoid_norm"),
             f"label_smoothing: has no effect with rl.loss_type {loss_type}; leave it out"),
            (loss_type == "cispo" and self.importance_sampling_level == "sequence",
             "importance_sampling_level: sequence is not available for rl.loss_type cispo, which weights tokens"),
            (loss_type == "cispo" and self.epsilon != RLSection.epsilon,
             "epsilon: has no effect with rl.loss_type cispo; leave it out"),
            (loss_type == "cispo" and self.epsilon_high < 1,
             f"epsilon_high: {self.epsilon_high} must be at least 1 with rl.loss_type cispo (the largest importance weight)"),
            (self.ref_model and not self.beta, "ref_model: has no effect with rl.beta 0; leave out one of them"),
        ):
            if wrong:
                raise UserError(f"rl.{message}")


# ---------------------------------------------------------------------------------- losses of preference pairs
#
# Log-probabilities are those of whole completions given their prompts: sums over tokens, or means where stated.


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1,
             loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Log-probabilities (B,) of policy and reference -> losses (B,).

    A policy is optimal for the reward beta log(policy / reference), up to a constant per prompt, which cancels in
    Bradley-Terry (Rafailov 2023, eq. 7). hinge: SLiC (Zhao 2023). ipo: a target margin of 1 / (2 beta) between
    log-probabilities per token (Azar 2023, eq. 17). sigmoid_norm: sigmoid of log-probabilities per token, so long completions do
    not dominate (Lambert 2024, Tulu 3, with beta 5). robust: unbiased if a fraction `label_smoothing` of the pairs is swapped
    (Chowdhury 2024, eq. 12).

    logp -1 and -3, reference -2 and -2, beta 0.1: -log sigmoid(0.1 * (1 - -1)) = 0.598
    """
    return DPO_LOSSES[loss_type](chosen - reference_chosen, rejected - reference_rejected, beta, label_smoothing)


def sigmoid_loss(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    ahead = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(ahead) - smoothing * F.logsigmoid(-ahead)


def robust_loss(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    ahead = beta * (chosen - rejected)
    return (smoothing * F.logsigmoid(-ahead) - (1 - smoothing) * F.logsigmoid(ahead)) / (1 - 2 * smoothing)


# loss_type -> function of log(policy / reference) (B,) of the chosen and the rejected completion, beta and label_smoothing.
DPO_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": lambda chosen, rejected, beta, _: torch.relu(1 - beta * (chosen - rejected)),
    "ipo": lambda chosen, rejected, beta, _: (chosen - rejected - 1 / (2 * beta)) ** 2,
    "robust": robust_loss,
    "sigmoid_norm": sigmoid_loss,
}
PER_TOKEN = {"ipo", "sigmoid_norm"}  # loss types that are computed from log-probabilities per token
LOSS_TYPES["dpo"] = DPO_LOSSES


def kto_loss(logratios: Tensor, desirable: Tensor, baseline: Tensor, beta: float = 0.1, desirable_weight: float = 1.0,
             undesirable_weight: float = 1.0) -> Tensor:
    """logratios (B,) = log(policy / reference) of completions, whether they are desirable (B,), baseline = KL -> losses (B,).

    Prospect theory: people value gains and losses relative to a reference point, here the KL, with diminishing sensitivity.
    The loss is 1 - sigmoid(beta (logratio - KL)) of a desirable completion; an undesirable one has the opposite sign
    (Ethayarajh 2024, eq. 8)."""
    sign = torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - torch.sigmoid(sign * beta * (logratios - baseline)))


def orpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean log-probabilities per token (B,) -> -log sigmoid(log odds ratio) (B,), odds = p / (1 - p) (Hong 2024, eq. 7).
    It needs no reference and is added to the negative log-likelihood of the chosen completion."""

    def log_odds(logp: Tensor) -> Tensor:
        return logp - torch.log(-torch.expm1(logp.clamp(max=-1e-6)))

    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """Mean log-probabilities per token (B,) -> -log sigmoid(beta (chosen - rejected) - gamma) (B,) (Meng 2024, eq. 6).
    It needs no reference; means keep the length from acting as a reward."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centering: float = 0.0) -> Tensor:
    """Rewards (B,) -> -log sigmoid(chosen - rejected - margin) (B,) (Bradley-Terry; margin: Touvron 2023, eq. 2). Pairs only
    determine differences, so `centering` (chosen + rejected)^2 fixes the zero point (Eisenstein 2023, section 2)."""
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def completion_logps(model, batch: dict, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities of the completions (B, count), their lengths in tokens (B, count), router loss)."""
    sums, balance = read_rows(model, batch, lambda out, positions: out.logprobs.sum(1))
    return sums.view(-1, count), (batch["targets"] != -100).float().sum(1).view(-1, count), balance


def read_rows(model, batch: dict, read: Callable[..., Tensor], want: tuple = ()) -> tuple[Tensor, Tensor]:
    """(read(output, positions) of each row (R,), router loss), with one forward pass per half of the batch."""
    values, balance = [], 0.0
    for rows, width in batch["halves"]:
        ids, positions, targets = (None if batch[key] is None else batch[key][rows, :width]
                                   for key in ("input_ids", "positions", "targets"))
        out = model(ids, positions=positions, targets=None if want else targets, want=want)
        values.append(read(out, positions))
        balance = balance + out.aux_loss / len(batch["halves"])
    order = torch.cat([rows for rows, _ in batch["halves"]]).argsort().to(values[0].device)
    return torch.cat(values)[order], balance


def mean_of(values: Tensor, batch: dict, totals: dict) -> Tensor:
    """The contribution of this batch to a mean over the pairs of the optimizer step, without padding."""
    return torch.where(batch["real"], values, 0.0).sum() / totals["pairs"]


def is_correct(margins: Tensor) -> Tensor:
    """1 for a positive margin, else 0. A tie counts half, so chance level is 0.5."""
    return torch.where(margins.abs() < 1e-6, 0.5, (margins > 0).float())


def preference_loss(settings: RLSection) -> Callable:
    """The loss function of dpo, orpo, simpo and kto for `fit`. Metrics have TRL's names."""
    method, beta = settings.method, settings.beta

    def pair_losses(sums: Tensor, tokens: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """(losses (B,), implicit rewards (B, 2))."""
        means = sums / tokens.clamp(min=1)
        if method == "simpo":
            return simpo_loss(*means.unbind(1), beta, settings.simpo_gamma), beta * means
        if method == "orpo":
            return beta * orpo_loss(*means.unbind(1)), beta * means
        policy, reference = sums, batch["reference"]
        if settings.loss_type in PER_TOKEN:
            policy, reference = means, reference / tokens.clamp(min=1)
        losses = dpo_loss(*policy.unbind(1), *reference.unbind(1), beta, settings.loss_type, settings.label_smoothing)
        return losses, beta * (policy - reference)

    def loss_of_pairs(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        sums, tokens, balance = completion_logps(model, batch, 2)
        share = partial(mean_of, batch=batch, totals=totals)
        losses, rewards = pair_losses(sums, tokens, batch)
        loss, (chosen, rejected) = share(losses), rewards.detach().unbind(1)
        metrics = {"rewards/accuracies": share(is_correct(chosen - rejected)), "rewards/margins": share(chosen - rejected),
                   "rewards/chosen": share(chosen), "rewards/rejected": share(rejected),
                   "logps/chosen": share(sums[:, 0].detach()), "logps/rejected": share(sums[:, 1].detach())}
        # The pair loss alone may lower the likelihood of both completions, if that of the rejected one falls further.
        if settings.rpo_alpha:
            nll = -sums[:, 0].sum() / totals["chosen"]
            metrics |= {"nll_loss": nll.detach(), "odds_loss" if method == "orpo" else "preference_loss": loss.detach()}
            loss = loss + settings.rpo_alpha * nll
        return loss + balance / totals["micro_batches"], {**metrics, "loss": loss.detach()}

    def loss_of_singles(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        sums, _, balance = completion_logps(model, batch, 1)
        share = partial(mean_of, batch=batch, totals=totals)
        logratios, label, baseline = sums[:, 0] - batch["reference"][:, 0], batch["label"], batch["baseline"]
        loss = share(kto_loss(logratios, label, baseline, beta, settings.desirable_weight, settings.undesirable_weight))
        rewards, sign = beta * logratios.detach(), torch.where(label, 1, -1)
        metrics = {"rewards/accuracies": share(is_correct(sign * (rewards - beta * baseline))),
                   "kl": share(baseline.expand(len(logratios))), "loss": loss.detach()}
        if totals["desirable"] < totals["pairs"] > totals["undesirable"]:  # the margin needs completions of both labels
            chosen, rejected = (share(rewards * kind) * totals["pairs"] / totals[name]
                                for name, kind in (("desirable", label), ("undesirable", ~label)))
            metrics |= {"rewards/margins": chosen - rejected, "rewards/chosen": chosen, "rewards/rejected": rejected}
        return loss + balance / totals["micro_batches"], metrics

    return loss_of_singles if method == "kto" else loss_of_pairs


def last_scores(out: MODEL.Output, positions: Tensor | None) -> Tensor:
    """The output of the score head at the last token of each row (R,)."""
    scores = out.scores[..., 0]  # (R, T)
    return scores[:, -1] if positions is None else scores.gather(1, positions.argmax(1, keepdim=True))[:, 0]


def reward_model_loss(settings: RLSection) -> Callable:
    """The loss function of reward models for `fit`: the reward is the output of the score head at the last token."""

    def loss_fn(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        rewards, balance = read_rows(model, batch, last_scores, want=("scores",))
        chosen, rejected = rewards.view(-1, 2).unbind(1)  # (B,)
        share = partial(mean_of, batch=batch, totals=totals)
        loss = share(reward_loss(chosen, rejected, batch["margin"], settings.center_rewards_coefficient))
        margins = (chosen - rejected).detach()
        return loss + balance / totals["micro_batches"], {
            "accuracy": share(is_correct(margins)), "margin": share(margins),
            "mean_reward": share((chosen + rejected).detach() / 2), "loss": loss.detach()}

    return loss_fn


# ------------------------------------------------------------------------------------------ losses of rollouts


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) at tokens sampled from the policy: r - 1 - log r with r = reference / policy (Schulman 2020, k3).
    The estimate is unbiased and at least 0. In a loss its gradient is 1 - r, on average that of KL(reference || policy)."""
    logratio = (reference - logprobs).clamp(max=20)  # the gradient of an infinite ratio would be NaN
    return torch.expm1(logratio) - logratio


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Scores of completions (N,), log-probabilities of tokens (N, T) -> rewards of tokens (N, T): -beta log(policy / reference)
    for each token, plus the score at the last token (Ouyang 2022, eq. 2; Ziegler 2019, section 2)."""
    rewards = -beta * (logprobs - reference) * mask
    last = (mask.cumsum(1) * mask).argmax(1, keepdim=True)  # (N, 1)
    return rewards.scatter_add(1, last, (scores * mask.any(1))[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Rewards and critic values (N, T) of right-padded completions -> advantages (N, T), returns (N, T).

    The advantage of a token is how far the return exceeds the critic's value before it: the sum over this and later tokens of
    (gamma lambda)^k delta_{t+k}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the end (Schulman 2016, eq. 16).

    rewards [0, 1], values [0.5, 0.5], gamma 1, lambda 0.5: deltas [0, 0.5], advantages [0.25, 0.5], returns [0.75, 1]
    """
    values = values * mask
    advantages, later = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(later)
        delta = rewards[:, t] + gamma * following - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Normalize the values under the mask to mean 0 and standard deviation 1; others become 0."""
    selected = values[mask]
    variance = selected.var() if len(selected) > 1 else selected.new_ones(())
    return torch.where(mask, (values - selected.mean()) * torch.rsqrt(variance + 1e-8), 0.0)


def ppo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, epsilon: float = 0.2,
             epsilon_high: float | None = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens now and at the rollout, advantages, all (B, T) -> losses (B, T), clip mask (B, T).

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = new / old probability (Schulman 2017, eq. 7). A token has no
    gradient once its ratio has left the clip range in the direction of its advantage. A larger upper limit allows unlikely
    tokens to gain more probability (clip-higher; Yu 2025, section 3.1).

    r = 1.5, epsilon 0.2: A = 1 gives -1.2, without gradient; A = -1 gives 1.5, with gradient
    """
    ratio = torch.exp((logprobs - old).clamp(-20, 20))  # the gradient of an infinite ratio would be NaN
    limited = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    losses = torch.maximum(-ratio * advantages, -limited * advantages)
    return losses, (ratio * advantages > limited * advantages)


def cispo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, largest: float = 5.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens now and at the rollout, advantages, all (B, T) -> losses (B, T), clip mask (B, T).

    -min(r, largest) A log p, where r = new / old probability has no gradient (MiniMax-M1 2025, eq. 4). `ppo_loss` removes the
    gradient of clipped tokens; here every token has one, with a limited weight. Khatri 2025 (ScaleRL) recommends 5.
    """
    ratio = torch.exp((logprobs - old).detach().clamp(max=20))
    return -ratio.clamp(max=largest) * advantages * logprobs, ratio > largest


def sampler_weights(old: Tensor, sampled: Tensor, mask: Tensor, largest: float, whole: bool = False) -> Tensor:
    """Log-probabilities from the training and the sampling code (B, T) -> weights of tokens (B, T); `whole`: completions (B,).

    min(old / sampled, largest): truncated importance sampling (Yao 2025). The sampling probabilities differ slightly from those
    of training, for example because of 16-bit weights and the KV cache. Both are taken at the rollout's temperature and before
    top-k and top-p, which the weights do not correct.
    """
    logratios = (old - sampled) * mask
    return (logratios.sum(1) if whole else logratios).clamp(max=math.log(largest)).exp()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, cliprange: float = 0.2) -> Tensor:
    """Critic values now and at the rollout, returns (B, T) -> losses (B, T): half the squared error of the value, or of the value
    clipped to `cliprange` around the old one, whichever is larger (Huang 2024, detail 7)."""
    limited = torch.clamp(values, old - cliprange, old + cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (limited - returns) ** 2)


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """Rewards (P, G) of G completions for each of P prompts -> advantages (P, G): reward minus the mean of the group, which
    replaces the critic. scale `group` divides by the standard deviation of the group (Shao 2024, section 4.1), `batch` by that
    of all rewards. `none` does not divide, which avoids larger weights for very easy and very hard prompts (Liu 2025).
    `leave_one_out` subtracts the mean of the other completions of the group (RLOO; Ahmadian 2024, eq. 8).

    [[1, 0, 0, 0]]: none [[0.75, -0.25, ...]], group [[1.5, -0.5, ...]], leave_one_out [[1, -0.33, ...]]
    """
    batch_std = rewards.std()
    rewards = rewards - rewards[:, :1]  # the mean of equal numbers can be off by rounding, the mean of zeros cannot
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale == "leave_one_out":
        return advantages * (rewards.shape[1] / (rewards.shape[1] - 1))
    if scale == "none":
        return advantages
    return advantages / ((batch_std if scale == "batch" else rewards.std(1, keepdim=True)) + 1e-4)


def grpo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, reference: Tensor | None = None,
              beta: float = 0.0, epsilon: float = 0.2, epsilon_high: float | None = None, loss_type: str = "dapo",
              max_length: int = 1, level: str = "token", weights: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T), advantages of completions (B,) -> losses of completions (B,), clip mask (B, T).

    Each token has the clipped loss (`cispo`: `cispo_loss`) plus beta times its KL (Shao 2024, eq. 3). The caller divides the sum
    of the losses by the number of completions, or of tokens (`dapo`, Yu 2025, section 3.3; `cispo`). `grpo` takes the mean over
    the tokens of each completion, so tokens of long completions count less; `dr_grpo` divides by a constant length (Liu 2025).
    level `sequence`: all tokens of a completion share the geometric mean of their ratios (GSPO; Zheng 2025, eq. 7).
    """

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)

    if loss_type == "cispo":
        losses, clipped = cispo_loss(logprobs, old, advantages[:, None], epsilon_high)
    else:
        means = (mean(logprobs), mean(old)) if level == "sequence" else (logprobs, old)
        losses, clipped = ppo_loss(*means, advantages[:, None], epsilon, epsilon_high)
    losses = losses * weights  # from `sampler_weights`
    if reference is not None:
        losses = losses + beta * kl_estimate(logprobs, reference)
    losses = (losses * mask).sum(1)  # (B,)
    if loss_type == "grpo":
        losses = losses / mask.sum(1).clamp(min=1)
    elif loss_type == "dr_grpo":
        losses = losses / max_length
    return losses, clipped & mask


def rloo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2,
              epsilon_high: float | None = None, weights: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """`grpo_loss` with a whole completion as one action: r is the product of the token ratios (Ahmadian 2024, section 3.2).
    In the first step after a rollout this is REINFORCE. -> losses of completions (B,), clip mask (B, T)."""
    losses, clipped = ppo_loss((logprobs * mask).sum(1), (old * mask).sum(1), advantages, epsilon, epsilon_high)
    return losses * weights * mask.any(1), clipped[:, None] & mask


def rollout_loss(settings: RLSection) -> Callable:
    """The loss function of ppo, grpo and rloo for `fit`."""
    method = settings.method
    divisor = "tokens" if method == "ppo" or settings.loss_type in ("dapo", "cispo") else "completions"
    want = (("values",) if method == "ppo" else ()) + (("entropy",) if settings.entropy_coef else ())

    def loss_fn(model, batch: dict, totals: dict) -> tuple[Tensor, dict]:
        mask, old, advantages = batch["targets"] != -100, batch["old"], batch["advantages"]
        out = model(batch["input_ids"], positions=batch["positions"], targets=batch["targets"], temperature=settings.temperature,
                    want=want)
        limits = dict(epsilon=settings.epsilon, epsilon_high=settings.epsilon_high)
        weights = 1.0
        if settings.importance_sampling_clip_max:
            weights = sampler_weights(old, batch["sampled"], mask, settings.importance_sampling_clip_max, method == "rloo")
        if method == "ppo":
            losses, clipped = ppo_loss(out.logprobs, old, advantages, **limits)
            losses, clipped = losses * weights * mask, clipped & mask
        elif method == "rloo":
            losses, clipped = rloo_loss(out.logprobs, old, advantages, mask, **limits, weights=weights)
        else:
            losses, clipped = grpo_loss(out.logprobs, old, advantages, mask, batch.get("reference"), settings.beta, **limits,
                                        loss_type=settings.loss_type, max_length=settings.max_completion_length,
                                        level=settings.importance_sampling_level, weights=weights)
        loss = policy_loss = losses.sum() / totals[divisor]
        # KL(old policy || current policy), estimated at tokens of the old policy: how far it has moved since the rollout.
        approx_kl = (kl_estimate(old, out.logprobs.detach()) * mask).sum() / totals["tokens"]
        metrics = {"policy_loss": policy_loss.detach(), "clip_ratio": clipped.sum() / totals["tokens"], "approx_kl": approx_kl}
        if method == "ppo":
            critic = (value_loss(out.values, batch["values"], batch["returns"],
                                 settings.cliprange_value) * mask).sum() / totals["tokens"]
            loss, metrics["value_loss"] = loss + settings.vf_coef * critic, critic.detach()
        if settings.entropy_coef:
            loss = loss - settings.entropy_coef * (out.entropy * mask).sum() / totals["tokens"]
        return loss + out.aux_loss / totals["micro_batches"], {**metrics, "loss": loss.detach()}

    return loss_fn


# ---------------------------------------------------------------------------------------------------- rollouts


class Prompt(NamedTuple):
    """A prompt as text or messages and as token ids, plus the other columns of its record."""

    where: str
    content: str | list[dict]
    ids: list[int]
    columns: dict


class Sample:
    """A completion with its rewards. `ids` includes the prompt and tool results; `places` are the indices of the L tokens that
    the policy generated. Tensors (L,) have one number per such token."""

    def __init__(self, prompt: Prompt, number: int, ids: list[int], finish: str, text: str, sampled: list[float] | None):
        self.where, self.number, self.prompt, self.columns = prompt.where, number, prompt.content, prompt.columns
        self.ids, self.start = list(prompt.ids), len(prompt.ids)
        self.places: list[int] = []
        self.sampled: list[float] = []
        self.messages: list[dict] = []  # turns of the assistant and of tools
        self.calls = self.failures = 0
        self.add(ids, finish, text, sampled)
        self.rewards: list[float | None] = []
        self.reward = 0.0
        self.extra: dict = {}  # columns for rollouts.jsonl, from reward functions
        self.old = self.reference = self.values = self.entropy = self.advantages = self.returns = None

    def add(self, ids: list[int], finish: str, text: str, sampled: list[float] | None) -> None:
        """Append a turn of the policy; `finish` and `text` describe the last turn."""
        self.turn = len(self.ids)  # index of its first token
        self.places += range(self.turn, self.turn + len(ids))
        self.ids, self.sampled = self.ids + ids, self.sampled + (sampled or [])
        self.finish, self.text = finish, text
        self.messages.append({"role": "assistant", "content": text})

    def state(self) -> dict:
        """The fields to save in a checkpoint."""
        return {**vars(self), "columns": {}, "prompt": "", "messages": [], "extra": {}}

    @classmethod
    def restored(cls, state: dict) -> Sample:
        sample = cls.__new__(cls)
        vars(sample).update(state)
        return sample

    @property
    def length(self) -> int:
        return len(self.places)


class SampledTexts:
    """An endless stream of minibatches for `TRAIN.fit`: the current policy generates rollouts of `size` completions each.

    A rollout fills whole optimizer steps and is used for `num_iterations` epochs. A checkpoint inside a rollout contains its
    samples. Each process generates a share of the completions and then gets all of them, so minibatches do not depend on the
    number of processes."""

    section = "rl"  # section of the settings, for error messages

    def __init__(self, prompts: list[Prompt], tokenizer, sampling: INFER.Sampling, size: int, batch_size: int,
                 training: TRAIN.TrainingSection, out: Path, num_iterations: int = 1):
        self.prompts, self.tokenizer, self.sampling, self.size, self.batch_size = prompts, tokenizer, sampling, size, batch_size
        self.training, self.out, self.num_iterations = training, out, num_iterations
        self.drawn = self.rollout = 0  # numbers of prompts drawn, of finished rollouts
        self.queue: list[np.ndarray] = []
        self.samples: list[Sample] = []
        self.sums: dict[str, list[float]] = {}
        self.orders: dict[int, np.ndarray] = {}
        self.steps_per_epoch, self.rewound = None, False

    def start(self, run: TRAIN.Run) -> None:
        self.run = run
        self.per_step = self.training.batch_size * run.grad_accum * run.world_size
        if self.size % self.per_step:
            factors = f"training.batch_size {self.training.batch_size}"
            for name, number in (("grad_accum {}", run.grad_accum), ("{} processes", run.world_size)):
                factors += f" x {name.format(number)}" if number > 1 else ""
            raise UserError(f"{self.section}.rollout_size: {self.size} completions do not fill whole optimizer steps of "
                            f"{factors} = {self.per_step}")
        self.count = self.size // self.sampling.n  # prompts per rollout
        self.steps_per_rollout = self.size // self.per_step * self.num_iterations
        self.steps_per_epoch = -(-len(self.prompts) // self.count) * self.steps_per_rollout

    def prompt(self, number: int) -> Prompt:
        epoch, index = divmod(number, len(self.prompts))
        if epoch not in self.orders:
            self.orders = {epoch: np.random.default_rng([self.run.seed, epoch, 6]).permutation(len(self.prompts))}
        return self.prompts[self.orders[epoch][index]]

    def generate(self, model, numbered: list[tuple[int, Prompt]], sampling: INFER.Sampling, step: int) -> list[Sample]:
        """Generate completions of numbered prompts; completions of the same prompt are adjacent."""
        results = INFER.generate(model, [prompt.ids for _, prompt in numbered], sampling, batch_size=self.batch_size, step=step,
                                 first=[number for number, _ in numbered])
        return [Sample(prompt, number, *self.decode(completion, prompt))
                for (number, prompt), completions in zip(numbered, results, strict=True) for completion in completions]

    def decode(self, completion: INFER.Completion, prompt: Prompt) -> tuple:
        """(ids, finish reason, text, log-probabilities) of a completion."""
        context = prompt.ids if isinstance(prompt.content, str) and not self.tokenizer.chat_template else []
        text = INFER.completion_text(self.tokenizer, context, completion.ids)
        return completion.ids, completion.finish_reason, text, completion.logprobs

    def draw(self, skip: int = 0, count: int | None = None) -> list[Sample]:
        """Generate this process's share of the completions of the next `count` prompts, after the first `skip`."""
        first = self.drawn + skip
        numbers = range(first, first + (count or self.count))[self.run.rank :: self.run.world_size]
        return self.generate(self.run.model, [(number, self.prompt(number)) for number in numbers], self.sampling, self.rollout)

    def roll_out(self) -> None:
        """Set `samples`, the same on all processes, and call `finish_rollout`. If this fails, the stream is unchanged."""
        raise NotImplementedError

    def finish_rollout(self, metrics: dict[str, float], drawn: int | None = None) -> None:
        count = len(self.samples)
        metrics |= {"completions/mean_length": sum(sample.length for sample in self.samples) / count,
                    "completions/clipped_ratio": sum(sample.finish == "length" for sample in self.samples) / count}
        self.write_transcripts()
        for name, value in metrics.items():
            self.sums.setdefault(name, []).append(value)
        self.drawn, self.rollout = self.drawn + (drawn or self.count), self.rollout + 1
        self.queue = self.minibatches()

    def minibatches(self) -> list[np.ndarray]:
        """The sample indices of each minibatch of this process: `num_iterations` epochs in random order."""
        run, size, found = self.run, self.training.batch_size, []
        for epoch in range(self.num_iterations):
            order = np.random.default_rng([run.seed, 5, self.rollout, epoch]).permutation(len(self.samples))
            found += [order[first : first + size] for first in range(run.rank * size, len(order), run.world_size * size)]
        return found

    def __next__(self) -> dict:
        if not self.queue:
            self.roll_out()
        self.rewind_transcripts()
        return self.batch([self.samples[i] for i in self.queue.pop(0)])

    def batch(self, group: list[Sample]) -> dict:
        batch = sample_batch(group)
        counts = {"tokens": int((batch["targets"] != -100).sum()), "completions": len(group),
                  "read": sum(len(sample.ids) - 1 for sample in group)}
        return {**batch, "counts": counts}

    def metrics(self) -> dict[str, float]:
        """Mean metrics of the rollouts since the last call."""
        found = {name: sum(values) / len(values) for name, values in self.sums.items()}
        self.sums = {}
        return found

    def rewind_transcripts(self) -> None:
        """Delete rollouts of an earlier run, or those after the checkpoint, from rollouts.jsonl. A run that fails before its
        first batch changes nothing."""
        if self.run.rank == 0 and not self.rewound:
            TRAIN.rewind(self.out / "rollouts.jsonl", lambda record: record.get("rollout", 0) <= self.rollout)
        self.rewound = True

    def write_transcripts(self) -> None:
        self.rewind_transcripts()
        if self.run.rank != 0:
            return
        with open(self.out / "rollouts.jsonl", "a", encoding="utf-8") as file:
            for sample in self.samples:
                record = {"rollout": self.rollout + 1, "prompt": sample.prompt, "completion": sample.text,
                          **self.transcript(sample), "tokens": sample.length, "finish_reason": sample.finish}
                file.write(json.dumps({**sample.extra, **record}, ensure_ascii=False, default=str) + "\n")

    def transcript(self, sample: Sample) -> dict:
        """Additional fields of a sample in rollouts.jsonl."""
        return {}

    def state_dict(self) -> dict:
        left = len(self.queue) * self.training.batch_size * self.run.world_size
        return {"drawn": self.drawn, "rollout": self.rollout, "sums": {k: list(v) for k, v in self.sums.items()}, "left": left,
                "samples": [sample.state() for sample in self.samples] if left else [],
                "prompts": prompts_fingerprint(self.prompts)}

    def load_state_dict(self, state: dict) -> None:
        if "drawn" not in state:
            raise UserError("--resume: the checkpoint was made with another rl.method")
        if state["prompts"] != prompts_fingerprint(self.prompts):
            raise UserError("--resume: prompts or columns differ from those of the checkpoint (data.train, "
                            "training.max_length, or the settings `columns` and `system` changed)")
        if state["left"] % self.per_step:
            raise UserError(f"--resume: {state['left']} samples are left in the checkpoint's rollout, not divisible by the "
                            f"{self.per_step} of an optimizer step; use the batch size of the checkpoint")
        self.drawn, self.rollout = state["drawn"], state["rollout"]
        self.sums = {k: list(v) for k, v in state["sums"].items()}
        self.samples = [Sample.restored(sample) for sample in state["samples"]]
        batches = self.minibatches()
        self.queue = batches[len(batches) - state["left"] // (self.training.batch_size * self.run.world_size) :]


class Rollouts(SampledTexts):
    """Sampled completions with rewards, log-probabilities and advantages."""

    def __init__(self, prompts: list[Prompt], tokenizer, judges: Judges, settings: RLSection, training: TRAIN.TrainingSection,
                 reference: Reference | None, out: Path, tools: Tools | None = None):
        sampling = INFER.Sampling(settings.max_completion_length, settings.temperature, settings.top_k, settings.top_p,
                                  seed=training.seed, n=settings.num_generations, logprobs=True)
        super().__init__(prompts, tokenizer, sampling, settings.rollout_size, settings.rollout_batch_size, training, out,
                         settings.num_iterations)
        self.judges, self.settings, self.reference, self.tools = judges, settings, reference, tools

    def start(self, run: TRAIN.Run) -> None:
        super().start(run)
        if self.reference:
            self.reference.start(run, self.training)

    def generate(self, model, numbered: list[tuple[int, Prompt]], sampling: INFER.Sampling, step: int) -> list[Sample]:
        """With tools, a completion continues after each call, until a turn has no call or a limit is reached."""
        samples, length = super().generate(model, numbered, sampling, step), sampling.max_new_tokens
        active = list(enumerate(samples)) if self.tools else []
        for turn in range(1, self.settings.max_turns):
            active = [(i, sample) for i, sample in active if self.tools.run_calls(sample, length)]
            if not TRAIN.all_sum([len(active)], self.run.device)[0]:
                break
            # Each turn draws from a generator keyed by (seed, step, prompt, sample, turn).
            keys = [sample.number + (i % sampling.n << 32) + (turn << 64) for i, sample in active]
            rest = [replace(sampling, n=1, max_new_tokens=length - (len(sample.ids) - sample.start)) for _, sample in active]
            results = INFER.generate(model, [sample.ids for _, sample in active], rest, batch_size=self.batch_size, step=step,
                                     first=keys)
            for (_, sample), [completion] in zip(active, results, strict=True):
                sample.add(*self.decode(completion, Prompt(sample.where, sample.prompt, [], {})))
        for _, sample in active:
            self.tools.parse_calls(sample)
        return samples

    def trainer_state(self) -> SimpleNamespace:
        """The progress of the run under TRL's names; `max_steps` is None if a time limit ends it."""
        step = self.run.state.step
        return SimpleNamespace(global_step=step, max_steps=self.run.total_steps, epoch=step / self.steps_per_epoch)

    def compute_rewards(self, samples: list[Sample]) -> dict[str, float]:
        """Set the rewards of this process's samples -> means of the metrics that reward functions logged, over all processes.
        An error in one process is raised in all."""
        problem = None
        try:
            self.judges(samples, self.trainer_state())
        except UserError as error:
            problem = str(error)
        logged: dict[str, list[float]] = defaultdict(list)
        for other_problem, metrics in TRAIN.from_all((problem, dict(self.judges.metrics))):
            problem = problem or other_problem
            for name, values in metrics.items():
                logged[name] += values
        if problem:
            raise UserError(problem)
        return {name: sum(values) / len(values) for name, values in logged.items()}

    @torch.no_grad()
    def score(self, model, samples: list[Sample], rows: int, want: tuple = ()) -> list[dict[str, Tensor]]:
        """Log-probabilities and the outputs in `want` of samples, from a full forward pass at the sampling temperature. `rows` is
        the largest number of samples in any process, because all processes must run the same number of forward passes."""
        size, found = self.training.batch_size, []
        for start in range(0, rows, size):
            group = samples[start : start + size]
            inputs = sample_batch(group, self.run.device)
            out = model(inputs["input_ids"], inputs["positions"], targets=inputs["targets"],
                        temperature=self.settings.temperature, want=want)
            columns = {"logprobs": out.logprobs, "entropy": out.entropy, "values": out.values}
            columns = {name: column.float().cpu() for name, column in columns.items() if column is not None}
            found += [{name: column[i, torch.tensor(sample.places) - 1] for name, column in columns.items()}
                      for i, sample in enumerate(group)]
        return found

    def draw_varied(self) -> tuple[list[Sample], dict, int]:
        """(this process's share of a rollout, metrics of reward functions, number of prompts drawn). Groups with equal rewards
        have zero advantages: up to rl.dynamic_sampling draws replace them by new prompts (DAPO; Yu 2025, section 3.2)."""
        varied, equal, size, logged = [], [], self.settings.num_generations, defaultdict(list)
        for _ in range(1 + self.settings.dynamic_sampling):
            if len(varied) < self.count:
                samples = self.draw(len(varied) + len(equal), self.count - len(varied))
                for name, value in self.compute_rewards(samples).items():
                    logged[name].append(value)
                for sample in samples:
                    sample.reward -= self.settings.missing_eos_penalty * (sample.finish == "length")
                samples = gather(samples)
                for group in (samples[i : i + size] for i in range(0, len(samples), size)):
                    (varied if len({sample.reward for sample in group}) > 1 else equal).append(group)
        groups = (varied + equal)[: self.count][self.run.rank :: self.run.world_size]
        logged = {name: sum(values) / len(values) for name, values in logged.items()}  # means over the draws
        return sum(groups, []), logged, len(varied) + len(equal)

    def roll_out(self) -> None:
        """Produce a rollout: completions, rewards, log-probabilities, advantages."""
        run, settings, model = self.run, self.settings, self.run.model
        was_training, clock = model.training, time.perf_counter()
        model.eval()
        with run.autocast():
            samples, logged, drawn = self.draw_varied()
            spent = {"time/rollout": -clock + (clock := time.perf_counter())}
            rows = -(-self.count // run.world_size) * settings.num_generations
            want = ("entropy", "values") if settings.method == "ppo" else ("entropy",)
            for sample, found in zip(samples, self.score(model, samples, rows, want), strict=True):
                sample.old, sample.entropy, sample.values = found["logprobs"], found["entropy"], found.get("values")
                sample.sampled = torch.tensor(sample.sampled)
            if self.reference:
                with self.reference(model) as frozen:
                    for sample, found in zip(samples, self.score(frozen, samples, rows), strict=True):
                        sample.reference = found["logprobs"]
            spent["time/score"] = time.perf_counter() - clock
        model.train(was_training)
        self.samples = gather(samples)
        metrics = {**logged, **self.measure(), **self.set_advantages(), **spent}
        if metrics.get("frac_reward_zero_std") == 1 and run.rank == 0:
            say(f"rollout {self.rollout + 1}: all completions of every prompt got the same reward; advantages are zero")
        if settings.dynamic_sampling:
            metrics["frac_redrawn"] = 1 - self.count / drawn
        self.finish_rollout(metrics, drawn)

    def measure(self) -> dict[str, float]:
        """The metrics of a rollout, mostly under TRL's names."""
        samples, settings = self.samples, self.settings
        rewards = torch.tensor([sample.reward for sample in samples])
        metrics = {"reward": float(rewards.mean()), "reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0}
        metrics |= {f"rewards/{name}/mean": mean for name, mean in self.mean_rewards(samples).items()}
        metrics["entropy"] = float(torch.cat([sample.entropy for sample in samples]).mean())
        if self.reference:
            metrics["kl"] = sum(float(kl_estimate(sample.old, sample.reference).sum()) for sample in samples) / len(samples)
        if self.tools:
            calls = sum(sample.calls for sample in samples)
            metrics |= {"tools/call_frequency": calls / len(samples),
                        "tools/failure_frequency": sum(sample.failures for sample in samples) / max(calls, 1)}
        if settings.num_generations > 1:
            groups = rewards.view(-1, settings.num_generations)
            metrics["frac_reward_zero_std"] = float((groups.max(1).values == groups.min(1).values).float().mean())
        differences = torch.cat([(sample.old - sample.sampled).abs() for sample in samples])
        return metrics | {"sampling/logp_difference_mean": float(differences.mean()),
                          "sampling/logp_difference_max": float(differences.max())}

    def mean_rewards(self, samples: list[Sample]) -> dict[str, float]:
        """The mean reward of each function, over the samples for which it returned a number."""
        rewards = {name: [sample.rewards[i] for sample in samples if sample.rewards[i] is not None]
                   for i, name in enumerate(self.judges.names)}
        return {name: sum(values) / max(len(values), 1) for name, values in rewards.items()}

    def set_advantages(self) -> dict[str, float]:
        """Set the advantages of all samples (grpo, rloo) or of their tokens (ppo)."""
        samples, settings = self.samples, self.settings
        scores = torch.tensor([sample.reward for sample in samples])
        if settings.method != "ppo":
            scale = settings.scale_rewards
            if settings.method == "rloo":  # the KL is part of the reward
                scale = "leave_one_out"
                if self.reference:
                    scores = scores - settings.beta * torch.stack([(sample.old - sample.reference).sum() for sample in samples])
            for sample, advantage in zip(samples, group_advantages(scores.view(-1, settings.num_generations), scale).flatten(),
                                         strict=True):
                sample.advantages = advantage
            return {}
        old, values = padded([sample.old for sample in samples]), padded([sample.values for sample in samples])
        mask = padded([torch.ones(sample.length, dtype=torch.bool) for sample in samples])
        reference = padded([sample.reference for sample in samples]) if self.reference else old
        rewards = token_rewards(scores, old, reference, mask, settings.beta)
        advantages, returns = gae(rewards, values, mask, settings.gamma, settings.lam)
        trained = mask & ~torch.tensor([self.is_masked(sample) for sample in samples])[:, None]
        variance = float(returns[mask].var()) if mask.sum() > 1 else 0.0
        explained = 1 - float((returns - values)[mask].var()) / variance if variance else 0.0
        advantages = whiten(advantages, trained if trained.any() else mask)
        for i, sample in enumerate(samples):
            sample.advantages, sample.returns = advantages[i, : sample.length], returns[i, : sample.length]
        return {"explained_variance": explained, "value": float(values[mask].mean())}

    def is_masked(self, sample: Sample) -> bool:
        return self.settings.mask_truncated_completions and sample.finish == "length"

    def batch(self, group: list[Sample]) -> dict:
        """A minibatch with the columns of the loss: (B,) per sample, or (B, T) per token."""
        batch = super().batch(group)
        masked = torch.tensor([self.is_masked(sample) for sample in group])
        batch["targets"][masked] = -100
        batch["counts"]["tokens"] = int((batch["targets"] != -100).sum())
        for name in ("old", "sampled", "reference", "values", "returns", "advantages"):
            column = [getattr(sample, name) for sample in group]
            if column[0] is not None:
                rows = [at_places(sample, values) for sample, values in zip(group, column, strict=True) if values.dim()]
                batch[name] = padded(rows) if rows else torch.stack(column)
        return batch

    def transcript(self, sample: Sample) -> dict:
        fields = {"reward": sample.reward, "rewards": dict(zip(self.judges.names, sample.rewards, strict=True)),
                  "advantage": round(float(sample.advantages.mean()), 4)}
        if sample.reference is not None:
            fields["kl"] = round(float(kl_estimate(sample.old, sample.reference).sum()), 4)
        return {**fields, "messages": sample.messages} if self.tools else fields


# ======================================================================================================== edges

# ------------------------------------------------------------------------------------------ batches of rollouts


def prompts_fingerprint(prompts: list[Prompt]) -> str:
    """A hash of the prompts and of their columns, on which rewards depend."""
    text = repr([prompt[1:] for prompt in prompts]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def gather(samples: list[Sample]) -> list[Sample]:
    """Collect the samples of all processes, in the order of their prompts."""
    return sorted(itertools.chain.from_iterable(TRAIN.from_all(samples)), key=lambda sample: sample.number)


def padded(rows: list[Tensor], fill: float = 0) -> Tensor:
    """Rows (T,) of different lengths -> (B, T), right-padded."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def at_places(sample: Sample, values: Tensor, fill: float = 0) -> Tensor:
    """Values of the tokens that the policy generated (L,) -> (T,), at the positions of these targets; `fill` elsewhere."""
    row = torch.full((len(sample.ids) - 1,), fill, dtype=values.dtype)
    row[torch.tensor(sample.places) - 1] = values
    return row


def sample_batch(samples: list[Sample], device="cpu") -> dict[str, Tensor]:
    """One row per sample, or a row of padding without samples. Targets are the tokens that the policy generated."""
    ids = [torch.tensor(sample.ids) for sample in samples]
    targets = [at_places(sample, row[sample.places], -100) for sample, row in zip(samples, ids, strict=True)]
    rows = {"input_ids": [row[:-1] for row in ids], "targets": targets, "positions": [torch.arange(len(row) - 1) for row in ids]}
    fills = {"input_ids": 0, "targets": -100, "positions": -1}
    batch = {name: padded(rows[name] or [torch.tensor([fill])], fill) for name, fill in fills.items()}
    return TRAIN.on_device({**batch, "segment_ids": None, "weights": None}, device)


class Reference:
    """The reference policy: rl.ref_model, or a copy of the initial policy. If the policy has an adapter, only the adapter is
    copied, and swapped with the trained adapter during the forward passes of the reference."""

    def __init__(self, policy: MODEL.LanguageModel, frozen: MODEL.LanguageModel | None = None):
        self.frozen, self.adapter = frozen, {}
        if not frozen and policy.adapter:
            self.adapter = {name: tensor.clone() for name, tensor in self.trained(policy).items()}
        elif not frozen:
            self.frozen = copy.deepcopy(policy).requires_grad_(False)

    @staticmethod
    def trained(policy: MODEL.LanguageModel) -> dict[str, Tensor]:
        """The tensors that training changes in a policy with an adapter: the adapter and the selection bias of routers."""
        return {name: tensor for name, tensor in policy.state_dict().items()
                if MODEL.tensor_is_trained(name) or name.endswith("e_score_correction_bias")}

    def start(self, run: TRAIN.Run, training: TRAIN.TrainingSection) -> None:
        """Compile and shard the model, as `fit` does with the policy."""
        if self.frozen:
            self.frozen.to(run.device).eval()
            if training.torch_compile:
                TRAIN.compile_model(self.frozen)
            if training.fsdp and self.frozen.quantization == "none":
                TRAIN.shard(self.frozen, run.device)

    @contextlib.contextmanager
    def __call__(self, policy: MODEL.LanguageModel):
        self.swap(policy)
        try:
            yield self.frozen or policy
        finally:
            self.swap(policy)

    @torch.no_grad()
    def swap(self, policy: MODEL.LanguageModel) -> None:
        if not self.adapter:
            return
        for name, weight in self.trained(policy).items():
            saved, self.adapter[name] = self.adapter[name].to(weight.device), weight.clone()
            weight.copy_(TRAIN.shard_like(saved, weight))
        for module in policy.modules():
            if hasattr(module, "reshard"):  # the copies that FSDP has gathered are outdated
                module.reshard()
        torch.clear_autocast_cache()  # as are autocast's 16-bit copies


# -------------------------------------------------------------------------------------------- preference pairs


class Example(NamedTuple):
    """Token ids of a prompt and a completion; the weight is 1 for tokens of the completion's assistant messages, else 0."""

    ids: list[int]
    weights: list[int]

    @property
    def start(self) -> int:
        return self.weights.index(1)


class Pair(NamedTuple):
    """Two completions of a prompt (chosen, rejected), or a single one with a label (desirable or not)."""

    where: str
    examples: list[Example]
    prompt: str | list[dict]
    tools: list | None = None
    margin: float = 0.0
    label: bool = True


class Room(NamedTuple):
    """The length limit of prompts: prompt and `reserved` tokens (set by `key`) must fit into `limit` (set by `limit_key`)."""

    key: str
    reserved: int
    limit: int
    limit_key: str
    what: str = "prompt"

    def check(self) -> None:
        if self.reserved >= self.limit:
            raise UserError(f"{self.key}: {self.reserved} leaves no room for a prompt in {self.limit_key} {self.limit}")

    def fits(self, ids: list[int], where: str, left: TOKENIZER.LeftOut) -> bool:
        fits = len(ids) <= self.limit - self.reserved
        if not fits:
            left.add(f"whose {self.what} and {self.reserved} tokens ({self.key}) exceed {self.limit_key} {self.limit}", where)
        return fits


def make_example(tokenizer, prompt: str | list[dict], completion: str | list[dict], tools: list | None, where: str) -> Example:
    """Tokenize a prompt as INFER.py does, and a completion up to the end of its last turn (without a chat template: EOS)."""
    if not tokenizer.chat_template:
        prompt_ids, ids = TOKENIZER.encode_pair(tokenizer, prompt, completion)
        ids += [] if tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        return Example([*prompt_ids, *ids], [0] * len(prompt_ids) + [1] * len(ids))
    messages = TOKENIZER.as_messages(prompt)
    try:
        prompt_ids = TOKENIZER.prompt_ids(tokenizer, prompt, tools)
        ids, turns = TOKENIZER.render_chat(tokenizer, [*messages, *TOKENIZER.as_messages(completion, "assistant")], tools)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    turns = [turn for turn in turns if turn.message >= len(messages)]
    first, last = turns[0].start, turns[-1].stop
    weights = [0] * last
    for turn in turns:
        weights[turn.start : turn.stop] = [1] * (turn.stop - turn.start)
    return Example([*prompt_ids, *ids[first:last]], [0] * len(prompt_ids) + weights[first:])


def form_of(settings: RLSection, expand: Callable) -> TOKENIZER.Form:
    keys = TOKENIZER.USED_KEYS | {"chosen", "rejected", "margin", "label"} if expand is preference else frozenset()
    return TOKENIZER.Form(expand, "rl", settings.columns, settings.system, keys)


def make_chat(tokenizer, records: list[tuple[str, dict]], tools: bool = False) -> None:
    """Add the default chat template if conversations or tools need one. Text records are concatenated without a template."""
    if not tokenizer.chat_template and (tools or any(isinstance(record["prompt"], list) for _, record in records)):
        say(f"the model has no chat template, which {'rl.tools' if tools else 'conversations'} need; adding the default template")
        TOKENIZER.ensure_chat(tokenizer)


def read_pairs(config, tokenizer, records: list[tuple[str, dict]], left: TOKENIZER.LeftOut) -> list[Pair]:
    """Records -> pairs (kto: single completions). Unusable records are counted in `left`."""
    length, method, pairs = config.training.max_length, config.rl.method, []
    for where, record in records:
        both, prompt, tools = "chosen" in record, record["prompt"], record.get("tools")
        if not both and method != "kto":
            raise UserError(f"{where}: a completion with a label is for rl.method kto; {method} needs chosen and rejected")
        completions = [record["chosen"], record["rejected"]] if both else [record["completion"]]
        examples = [make_example(tokenizer, prompt, completion, tools, where) for completion in completions]
        if any(example.start >= length for example in examples):
            left.add(f"whose prompt fills training.max_length {length}", where)
            continue
        longer = any(len(example.ids) > length for example in examples)
        examples = [Example(example.ids[:length], example.weights[:length]) for example in examples]
        left.truncated += longer
        if both and examples[0].ids == examples[1].ids:
            left.add("whose completions are identical", where)
        elif method == "kto":
            labels = (True, False) if both else (record["label"],)
            pairs += [Pair(where, [example], prompt, tools, 0.0, label) for example, label in zip(examples, labels, strict=True)]
        else:
            examples = [repeat_last(example, tokenizer.pad_token_id) for example in examples] if method == "reward" else examples
            pairs.append(Pair(where, examples, prompt, tools, record["margin"]))
    return pairs


def repeat_last(example: Example, pad: int | None = None) -> Example:
    """Repeat the last token. The last id of a row is only a target, but the reward is read at the completion's last token."""
    ids = TOKENIZER.without_padding(example.ids, pad)
    return Example([*ids, ids[-1]], [*example.weights[: len(ids)], 1])


def mismatched(pairs: list[Pair], seed: int, length: int) -> list[Pair]:
    """Each prompt with the completion of the next, different prompt in a random cyclic order, for the KL of KTO."""
    order = np.random.default_rng([seed, 4]).permutation(len(pairs))
    found: list = [None] * len(pairs)
    for rank, i in enumerate(order):
        others = (pairs[order[(rank + k) % len(pairs)]] for k in range(1, len(pairs)))
        other = next((pair for pair in others if pair.prompt != pairs[i].prompt), pairs[i])
        (prompt,), (completion,) = pairs[i].examples, other.examples
        ids = prompt.ids[: prompt.start] + completion.ids[completion.start :]
        weights = prompt.weights[: prompt.start] + completion.weights[completion.start :]
        found[i] = pairs[i]._replace(examples=[Example(ids[:length], weights[:length])])
    return found


def make_batch(pairs: list[Pair], width: int | None = None, rows: int = 1) -> dict:
    """One row per example, with the examples of a pair adjacent; rows of padding fill up to `rows`. `halves` is added to the keys
    of `collate`: [(rows, width), ...], the shorter and the longer rows, which run in separate forward passes to save padding."""
    examples = TOKENIZER.Examples.of([example for pair in pairs for example in pair.examples] or [Example([0], [0])])
    spans = [[(int(start), int(start + size))] for start, size in zip(examples.starts, examples.lengths, strict=True)]
    batch = TOKENIZER.collate(examples, spans + [[]] * (rows - len(spans)), width)
    lengths = np.array([*examples.lengths, *[0] * (rows - len(spans))])
    order = [np.arange(len(lengths))] if width else np.array_split(np.argsort(lengths, kind="stable"), min(2, len(lengths)))
    halves = [(torch.from_numpy(half), width or max(int(lengths[half].max()), 1)) for half in order]
    return {**batch, "segment_ids": None, "halves": halves}  # no segments: one example per row


class Pairs(TOKENIZER.TokenStream):
    """Endless batches of pairs with the log-probabilities of the reference.

    They are computed once, before the first step, with `frozen` (rl.ref_model) or with the policy, which is then unchanged."""

    def __init__(self, pairs: list[Pair], held: list[Pair], settings: RLSection, training: TRAIN.TrainingSection, frozen=None):
        def plan(sources: list, seed: list[int]) -> SimpleNamespace:
            return SimpleNamespace(count=len(sources), order=np.random.default_rng(seed).permutation(len(sources)))

        super().__init__(lambda epoch: [pairs], plan, training.batch_size, training.max_length, identify=self.fingerprint)
        self.pairs, self.held, self.count = pairs, held, len(pairs[0].examples)
        self.settings, self.training, self.frozen = settings, training, frozen
        self.sets = {"train": pairs, "held": held}
        if settings.method == "kto":
            self.sets |= {f"{name} mismatched": mismatched(found, training.seed, training.max_length)
                          for name, found in self.sets.items() if found}
        self.reference: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def scoring(self, model):
        """Disable gradients and switch to evaluation mode."""
        was_training = model.training
        with torch.no_grad(), self.run.autocast():
            yield model.eval()
        model.train(was_training)

    def logps(self, model, name: str, numbers: list[int]) -> Tensor:
        """Log-probabilities (numbers, completions) of the numbered pairs of a set."""
        batch = make_batch([self.sets[name][i] for i in numbers], rows=self.count)
        return completion_logps(model, TRAIN.on_device(batch, model.device), self.count)[0][: len(numbers)].float().cpu()

    def groups_of_rank(self, numbers: list[int]) -> list[list[int]]:
        """Split numbers into batches -> those of this process. All processes get the same number of batches, some empty."""
        size = self.training.batch_size
        return TRAIN.own_share([numbers[i : i + size] for i in range(0, len(numbers), size)], [])

    def score_with_reference(self, model) -> None:
        if self.settings.method not in ("dpo", "kto") or self.reference:
            return
        with self.scoring(model):
            for name, pairs in ((name, pairs) for name, pairs in self.sets.items() if pairs):
                found = torch.zeros(len(pairs), self.count)
                for numbers in self.groups_of_rank(list(range(len(pairs)))):
                    found[numbers] = self.logps(self.frozen or model, name, numbers)
                self.reference[name] = torch.tensor(TRAIN.all_sum(found.flatten().tolist(), model.device)).view(found.shape)
        self.frozen = None

    def batch_of(self, name: str, numbers: list[int], width: int | None = None) -> dict:
        """`make_batch` of the numbered pairs, plus columns of the loss: real, label, margin (B,), reference (B, count)."""
        pairs, fill = [self.sets[name][i] for i in numbers], self.batch_size if width else 1
        batch = make_batch(pairs, width, fill * self.count)
        padding = max(fill - len(pairs), 0)
        rows, pairs = torch.tensor([*numbers, *[-1] * padding]), pairs + [self.sets[name][0]] * padding
        real, label = rows >= 0, torch.tensor([pair.label for pair in pairs])
        batch |= {"rows": rows, "real": real, "label": label, "margin": torch.tensor([pair.margin for pair in pairs])}
        if self.reference:
            batch["reference"] = self.reference[name][rows]
        counts = {**batch["counts"], "pairs": int(real.sum())}
        if self.settings.rpo_alpha:
            counts["chosen"] = int((batch["targets"][::2] != -100).sum())
        if self.settings.method == "kto":
            counts |= {"desirable": int((real & label).sum()), "undesirable": int((real & ~label).sum())}
        return {**batch, "counts": counts}

    def make(self, numbers: range) -> dict:
        return self.batch_of("train", self.plan.order[numbers].tolist(), self.width)

    def __next__(self) -> dict:
        self.score_with_reference(self.run.model)
        starts_step = not self.queue
        batch = super().__next__()
        if self.settings.method == "kto" and starts_step:
            step = [[i for i in micro["rows"].tolist() if i >= 0] for micro in (batch, *self.queue)]
            self.baseline = self.measure_baseline("train mismatched", step)
        return {**batch, "baseline": self.baseline} if self.settings.method == "kto" else batch

    def measure_baseline(self, name: str, groups: list[list[int]]) -> Tensor:
        """The reference point of KTO: the KL of the policy from its reference, estimated with completions of other prompts and
        clamped at 0; one number per optimizer step of all processes (Ethayarajh 2024, section 4.1)."""
        with self.scoring(self.run.model) as model:
            logratios = [self.logps(model, name, numbers) - self.reference[name][numbers] for numbers in groups]
        total, count = TRAIN.all_sum([float(sum(part.sum() for part in logratios)), sum(map(len, logratios))], self.run.device)
        return torch.tensor(max(total / max(count, 1), 0.0))

    def held_out(self, limit: int) -> Iterator[dict]:
        """This process's batches of held-out pairs. All processes get the same number of batches."""
        count = min(len(self.held), limit * self.training.batch_size)
        share = self.groups_of_rank(np.linspace(0, len(self.held) - 1, count).astype(int).tolist())
        baseline = self.measure_baseline("held mismatched", share) if self.settings.method == "kto" else None
        for numbers in share:
            yield {**self.batch_of("held", numbers), "baseline": baseline}

    def state_dict(self) -> dict:
        return {**super().state_dict(), "reference": self.reference}

    def fingerprint(self) -> str:
        """A hash of all token ids, labels and margins. The reference's log-probabilities are only valid for these ids."""
        content = [(pair.examples, pair.label, pair.margin) for pair in (*self.pairs, *self.held)]
        return hashlib.blake2b(str(content).encode(), digest_size=8).hexdigest()

    def load_state_dict(self, state: dict) -> None:
        if "reference" not in state:
            raise UserError("--resume: the checkpoint was made with another rl.method")
        if state["data"] != self.identify():
            raise UserError("--resume: the pairs differ from those of the checkpoint (data.train, data.validation or "
                            "training.max_length changed)")
        super().load_state_dict(state)
        self.reference, self.frozen = state["reference"], None if state["reference"] else self.frozen


def held_out_pairs(stream: Pairs, loss_fn: Callable, limit: int) -> Callable:
    """evaluate(model) for `fit`: the loss and the metrics on held-out pairs."""

    def summed(rows: list[dict], device) -> dict[str, float]:
        """Sums of each key over the batches of all processes."""
        return dict(zip(rows[0], TRAIN.all_sum([sum(float(row[key]) for row in rows) for key in rows[0]], device), strict=True))

    def evaluate(model) -> dict:
        stream.score_with_reference(model)
        batches = list(stream.held_out(limit))
        totals = {name: count or 1 for name, count in summed([batch["counts"] for batch in batches], model.device).items()}
        totals["micro_batches"] = len(batches) * TRAIN.world_size()
        return summed([loss_fn(model, TRAIN.on_device(batch, model.device), totals)[1] for batch in batches], model.device)

    return evaluate


# ---------------------------------------------------------------------------------------------- user functions


@functools.cache
def event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all asynchronous functions, in a daemon thread. Clients and locks are bound to one loop."""
    loop = asyncio.new_event_loop()

    def work() -> None:
        torch.set_grad_enabled(False)
        loop.run_forever()

    threading.Thread(target=work, daemon=True).start()
    return loop


def awaited(value, timeout: float | None = None):
    """The result of a function call. A coroutine is awaited for at most `timeout` seconds."""
    if not inspect.iscoroutine(value):
        return value

    async def run():
        try:
            return await asyncio.wait_for(value, timeout)
        except SystemExit as error:  # would stop the loop
            raise RuntimeError(f"SystemExit: {error}") from error

    return asyncio.run_coroutine_threadsafe(run(), event_loop(os.getpid())).result()


HELPERS: dict[Path, dict] = defaultdict(dict)  # folder -> modules that its files imported from it


@contextlib.contextmanager
def modules_of(folder: Path):
    """Let a user file import modules from its folder, both while it is loaded and inside its functions. Only files of this folder
    see these modules. The folder is last in the search path, so it cannot replace modules of this program or of packages."""
    if any(Path(entry or ".").resolve() == folder for entry in sys.path):
        yield
        return
    before, helpers = set(sys.modules), HELPERS[folder]
    sys.path.append(str(folder))
    sys.modules.update(helpers)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            module, top = sys.modules[name], name.partition(".")[0]
            path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "/")
            if Path(os.path.relpath(path, folder)).parts[0].partition(".")[0] == top:
                helpers[name] = sys.modules.pop(name)


class Uncached(importlib.abc.FileLoader, importlib.abc.SourceLoader):
    """Compile a file each time. Python's bytecode cache misses changes within a second that keep the file size."""


def load_file(path: Path, key: str):
    """Load a user's Python file as a module with a private name. Functions of one file share the module."""
    name = "_user_" + hashlib.blake2b(str(path).encode() + path.read_bytes(), digest_size=8).hexdigest()
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=Uncached(name, str(path)))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look it up
        try:
            with modules_of(path.parent):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # user code may raise anything
            del sys.modules[name]
            raise UserError(f"{key}: {path} cannot be imported ({type(error).__name__}: {MODEL.first_line(error)})") from None
    return sys.modules[name]


def user_function(name: str, key: str) -> Callable:
    """Load the user's `file.py:function`. Its attribute `folder` is the folder of the file."""
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{key}: {name}: file not found: '{path}'")
    module, folder = load_file(Path(path).resolve(), key), Path(path).resolve().parent
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [f"{path}:{other}" for other, value in vars(module).items()
                     if callable(value) and getattr(value, "__module__", "") == module.__name__]
        problem = f"{path} has no function '{attribute}'; " if attribute else ""
        raise UserError(f"{key}: {problem}choose a function: {', '.join(functions) or f'{path} defines none'}")

    @functools.wraps(function)
    def call(**arguments):
        with modules_of(folder):
            return awaited(function(**arguments))

    call.folder = folder
    return call


# ------------------------------------------------------------------------------------------------------- tools


MAX_HANGING = 16  # threads of timed-out calls


class Tools:
    """Functions that the policy may call while it completes a conversation, in the format of the tokenizer's chat template.

    A call runs in a daemon thread. After `timeout` seconds the thread is abandoned, because Python cannot stop it. Every failure
    becomes an error message in the conversation."""

    def __init__(self, names: list[str], tokenizer, timeout: float, key: str = "rl.tools"):
        from transformers.utils import get_json_schema

        self.tokenizer, self.timeout, self.hanging = tokenizer, timeout, []
        self.functions: dict[str, Callable] = {}
        self.schemas: list[dict] = []
        for name in names:
            function = user_function(name, key)
            try:
                self.schemas.append(get_json_schema(function))
            except Exception as error:  # it evaluates the user's type hints, which may raise anything
                raise UserError(f"{key}: {name} needs a type hint for each argument and a Google-style docstring "
                                f"({MODEL.first_line(error)})") from None
            if function.__name__ in self.functions:
                raise UserError(f"{key}: two functions are named '{function.__name__}'; rename one")
            self.functions[function.__name__] = function
        result = [(next(iter(self.functions)), "zqshown")]
        if not (TOKENIZER.answer_markup(tokenizer).call
                and "zqshown" in tokenizer.decode(TOKENIZER.ids_after_calls(tokenizer, result, self.schemas))):
            raise UserError(f"{key}: the chat template of this model does not render tool calls and their results")

    def merged(self, tools: list[dict] | None) -> list[dict]:
        """The schemas of these functions and of a record's other `tools`."""
        return [*(tool for tool in tools or () if tool.get("function", tool).get("name") not in self.functions), *self.schemas]

    def parse_calls(self, sample: Sample) -> list[tuple[str | None, dict]]:
        """The calls at the end of a sample's last turn: (name, arguments). The name of a malformed call is None."""
        if sample.finish != "stop":
            return []
        ends = TOKENIZER.any_of([*TOKENIZER.chat_ends(self.tokenizer).tokens, self.tokenizer.eos_token or "\0"])
        text = ends.split(self.tokenizer.decode(sample.ids[sample.turn :], clean_up_tokenization_spaces=False))[0]
        reader = INFER.answer_reader(self.tokenizer, sample.ids[: sample.turn], self.merged(sample.columns.get("tools")))
        reasoning, content, calls = reader(text, True)
        records = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
        begin, after = reader.markup.call[0].strip(), text.rpartition(reader.markup.think[1])[2] if reader.markup.think else text
        if begin and after.count(begin) > len(calls):
            calls = [*calls, (None, {})]
        if calls:
            turn = {"content": content, "reasoning_content": reasoning, "tool_calls": records}
            sample.messages[-1] = {"role": "assistant", "content": "", **{key: value for key, value in turn.items() if value}}
            sample.finish = "tool_calls"
        return calls

    def run(self, name: str | None, arguments: dict) -> tuple[str, bool]:
        """(the result of a call as text, whether it failed)."""
        if name not in self.functions:
            problem = f"there is no tool '{name}'" if name else "the call cannot be parsed; its arguments must be valid JSON"
            return f"Error: {problem}; the tools are {', '.join(self.functions)}", True
        self.hanging = [thread for thread in self.hanging if thread.is_alive()]
        if len(self.hanging) == MAX_HANGING:
            return "Error: earlier calls are still running", True
        function, found = self.functions[name], [(f"Error: no result within {self.timeout:g} seconds", True)]

        def work() -> None:
            try:
                with torch.no_grad():
                    found.append((str(awaited(function.__wrapped__(**arguments), self.timeout)), False))
            except (TimeoutError, asyncio.TimeoutError):
                return
            except BaseException as error:  # user code may raise anything; SystemExit would end only the thread
                found.append((f"Error: {type(error).__name__}: {error}", True))

        thread = threading.Thread(target=work, daemon=True)
        with modules_of(function.folder):
            thread.start()
            thread.join(self.timeout)
        self.hanging += [thread] if thread.is_alive() else []
        text, failed = found[-1]
        return text.encode("utf-8", "replace").decode(), failed  # replaces unpaired surrogates

    def run_calls(self, sample: Sample, length: int) -> bool:
        """Run the calls of a sample's last turn and append their results. False without calls, or if the results leave no room
        for another turn in a completion of `length` tokens."""
        calls = self.parse_calls(sample)
        if not calls:
            return False
        results = [self.run(*call) for call in calls]
        sample.calls, sample.failures = sample.calls + len(calls), sample.failures + sum(failed for _, failed in results)
        names = [name if name in self.functions else next(iter(self.functions)) for name, _ in calls]
        texts = [text for text, _ in results]
        try:
            ids = TOKENIZER.ids_after_calls(self.tokenizer, list(zip(names, texts, strict=True)), self.schemas)
        except UserError:  # some templates do not support several calls per turn
            return False
        if len(sample.ids) - sample.start + len(ids) >= length:
            sample.finish = "length"
            return False
        sample.ids = sample.ids + ids
        sample.messages += [{"role": "tool", "name": name, "content": text} for (name, _), text in zip(calls, texts, strict=True)]
        return True


# -------------------------------------------------------------------------------------------- reward functions


def expected_answer(sample: Sample, function: str, marker: str = "####") -> str:
    """The record's `answer`, or the part of it after the last marker (GSM8K's format)."""
    answer = sample.columns.get("answer")
    if answer is None:
        raise UserError(f"{sample.where}: {function} needs the key 'answer'; set rl.columns (in DISTILL.py "
                        "sft.columns), as in {answer: my_column}")
    if isinstance(answer, (list, dict)):
        raise UserError(f"{sample.where}: answer is a {type(answer).__name__}; {function} needs text or a number")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # integers in tables may be read as 9.0
    return without_commas(str(answer).rpartition(marker)[2].strip())


def without_commas(text: str) -> str:
    """1,000, or 2 -> 1000, or 2"""
    return re.sub(r"(?<=\d),(?=\d)", "", text)


def exact_answer(sample: Sample) -> float:
    """1 if the completion ends with the answer as a separate word, ignoring a final period: "12 plus 30 is 42." -> 42"""
    texts = without_commas(sample.text), expected_answer(sample, "exact_answer")
    text, answer = (text.rstrip(" .!\n").lower() for text in texts)
    return float(bool(answer) and text.endswith(answer) and not re.match(r"[\w.-]", text[: -len(answer)][-1:]))


NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def number_after(marker: str, sample: Sample) -> float:
    """1 if the number after the last marker in the completion equals the number in the answer."""
    _, found, after = sample.text.rpartition(marker)
    given, expected = NUMBER.search(after) if found else None, NUMBER.search(expected_answer(sample, "number_after", marker))
    if expected is None:
        raise UserError(f"{sample.where}: number_after: answer {sample.columns['answer']!r} contains no number")
    return float(given is not None and float(given[0].replace(",", "")) == float(expected[0].replace(",", "")))


def shortness(limit: float, sample: Sample) -> float:
    """1 for up to `limit` tokens, then falling linearly to 0 at twice the limit."""
    return min(max(2 - sample.length / limit, 0.0), 1.0)


def matches(find: Callable[[str], object], sample: Sample) -> float:
    """1 if `find`, a method of a regular expression, matches the completion."""
    return float(bool(find(sample.text.strip())))


def token_limit(argument: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?", argument) or not float(argument):
        raise ValueError(f"'{argument}' must be a number of tokens above 0, as in length:60")
    return float(argument)


def builtin(name: str, key: str = "rl.reward_funcs") -> Callable[[Sample], float] | None:
    """The built-in reward function with a name such as length:60, or None if REWARDS has no such name."""
    kind, _, argument = name.partition(":")
    for form, make in REWARDS.items():
        if form.partition(":")[0] == kind:
            if bool(argument) != (":" in form):
                raise UserError(f"{key}: '{name}' must have the form {form}")
            try:
                return make(argument)
            except (re.error, ValueError) as error:
                raise UserError(f"{key}: {name}: {error}") from None
    return None


def reward_each(function: Callable[[Sample], float], samples: list[Sample], **_) -> list[float]:
    return [function(sample) for sample in samples]


ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")  # of reward functions


def custom_function(name: str, key: str = "rl.reward_funcs") -> Callable[..., list]:
    """The reward function `file.py:function`, with TRL's signature: f(prompts=, completions=, completion_ids=, trainer_state=,
    log_metric=, log_extra=, and a list for each other key of the records) -> a number or None for each completion. Without
    `**kwargs` it receives only the arguments that it names. Prompts and completions of conversations are lists of messages."""
    function = user_function(name, key)
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def rewards(samples: list[Sample], **more) -> list:
        keys = {key: None for sample in samples for key in sample.columns}
        columns = {key: [sample.columns.get(key) for sample in samples] for key in keys}
        completions = [sample.messages if isinstance(sample.prompt, list) else sample.text for sample in samples]
        arguments = {"prompts": [sample.prompt for sample in samples], "completions": completions,
                     "completion_ids": [sample.ids[sample.start :] for sample in samples], **columns, **more}
        return function(**{key: value for key, value in arguments.items() if takes_all or key in parameters})

    rewards.needs = {key for key, parameter in parameters.items() if parameter.default is parameter.empty
                     and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)} - set(ARGUMENTS)
    return rewards


def reward_model(name: str, tokenizer, device, key: str = "rl.reward_funcs") -> Callable[..., list[float]]:
    """The reward model in a folder. The reward is its score at the last token of the completion."""
    model, model_tokenizer = TOKENIZER.open_model(MODEL.ModelSection(name=name, dtype="float32", device=str(device)), key=key)
    if "score" not in model.heads or model.config.num_labels != 1:
        raise UserError(f"{key}: {name} is not a reward model with a single score; train one with --rl.method reward")
    if model_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{key}: the tokenizers of {name} ({len(model_tokenizer):,} tokens) and the policy ({len(tokenizer):,}) "
                        "differ; train the reward model from the same model as the policy")
    return lambda samples, **_: INFER.scores_of(model, [sample.ids for sample in samples])[:, 0].tolist()


def is_number(value) -> bool:
    """Whether a value is a finite number of Python, numpy or torch."""
    try:
        return not isinstance(value, (str, bytes)) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


NO_TRAINING = SimpleNamespace(global_step=0, max_steps=None, epoch=0.0)  # `trainer_state` outside of training


class Judges:
    """The weighted sum of all reward functions. `metrics` contains the values that they logged in the last call."""

    def __init__(self, settings: RLSection, tokenizer, device, section: str = "rl"):
        self.key, self.device = f"{section}.reward_funcs", torch.device(device).type
        self.names = list(settings.reward_funcs)
        self.weights = settings.reward_weights or [1.0] * len(self.names)
        if not self.names:
            raise UserError(f"{self.key}: no reward function given; set at least one")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise UserError(f"{self.key}: {repeated[0]} is listed twice; use reward_weights instead")
        if not all(map(math.isfinite, self.weights)):
            raise UserError(f"{section}.reward_weights: {self.weights} must be finite numbers")
        self.functions = [self.find(name, tokenizer, device, self.key) for name in self.names]
        # Short names for logs: judge.py:polite -> polite, out/reward -> reward, length:60 unchanged.
        short = [name.rpartition(":")[2] if re.search(r"\.py:\w+$", name) else Path(name).name if Path(name).is_dir() else name
                 for name in self.names]
        self.names = short if len(set(short)) == len(short) else self.names
        self.metrics: dict[str, list[float]] = {}

    def check(self, prompts: list[Prompt]) -> None:
        """Check that the records have the columns of all reward functions; run built-in functions on empty completions."""
        keys = {key for prompt in prompts for key in prompt.columns}
        for name, function in zip(self.names, self.functions, strict=True):
            if missing := getattr(function, "needs", set()) - keys:
                raise UserError(f"{self.key}: {name} needs the key '{min(missing)}', but the records have "
                                f"{TOKENIZER.keys_of(dict.fromkeys(['prompt', *sorted(keys)]))}; set rl.columns, as in "
                                f"{{{min(missing)}: my_column}}")
            if isinstance(function, partial) and function.func is reward_each:
                function([Sample(prompt, 0, [], "stop", "", None) for prompt in prompts])

    @staticmethod
    def find(name: str, tokenizer, device, key: str = "rl.reward_funcs") -> Callable[..., list]:
        if function := builtin(name, key):
            return partial(reward_each, function)
        if re.search(r"\.py(:\w*)?$", name):
            return custom_function(name if ":" in name else f"{name}:", key)
        if Path(name).is_dir() or ("/" in name and ":" not in name):
            return reward_model(name, tokenizer, device, key)
        raise UserError(f"{key}: '{name}' is not one of {', '.join(REWARDS)}, file.py:function, or the folder of a reward model")

    def __call__(self, samples: list[Sample], state: SimpleNamespace = NO_TRAINING) -> None:
        self.metrics = defaultdict(list)
        for sample in samples:
            sample.rewards, sample.extra = [], {}
        with torch.no_grad(), torch.autocast(self.device, enabled=False):  # user code runs without autocast
            for name, function in zip(self.names, self.functions, strict=True) if samples else ():
                for sample, value in zip(samples, self.call(name, function, samples, state), strict=True):
                    if value is not None and not is_number(value):
                        raise UserError(f"{sample.where}: {name} returned {value!r} for the completion {sample.text[:80]!r}; "
                                        "expected a finite number")
                    sample.rewards.append(None if value is None else float(value))
        for sample in samples:
            terms = [weight * value for weight, value in zip(self.weights, sample.rewards, strict=True) if value is not None]
            if not terms:
                raise UserError(f"{sample.where}: {self.key}: every function ({', '.join(self.names)}) returned None for the "
                                f"completion {sample.text[:80]!r}")
            sample.reward = math.fsum(terms)

    def call(self, name: str, function: Callable, samples: list[Sample], state: SimpleNamespace) -> list:
        """The values of one function. If it fails, the error names the first completion on which it also fails alone."""
        try:
            values = function(samples, trainer_state=state, **self.loggers(name, samples))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            line, culprit = traceback.extract_tb(error.__traceback__)[-1], f"{samples[0].where} and later ({len(samples)} in all)"
            for sample in samples:
                try:
                    function([sample], trainer_state=state, **self.loggers(name, [sample]))
                except (Exception, SystemExit):
                    culprit = f"{sample.where}, completion {sample.text[:80]!r}"
                    break
            raise UserError(f"{self.key}: {name} failed on {culprit} ({type(error).__name__}: {MODEL.first_line(error)}, "
                            f"{Path(line.filename).name}:{line.lineno})") from error
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)):
            raise UserError(f"{self.key}: {name} returned {type(values).__name__}; expected a list with a number per completion")
        if len(values) != len(samples):
            raise UserError(f"{self.key}: {name} returned {MODEL.counted(len(values), 'reward')} for "
                                f"{MODEL.counted(len(samples), 'completion')}")
        return values

    def loggers(self, function: str, samples: list[Sample]) -> dict[str, Callable]:
        def log_metric(name: str, value: float) -> None:
            if not is_number(value):
                raise UserError(f"{self.key}: {function}: log_metric('{name}', {value!r}): expected a finite number")
            self.metrics[name].append(float(value))

        def log_extra(column: str, values: list) -> None:
            if len(values) != len(samples):
                raise UserError(f"{self.key}: {function}: log_extra('{column}') got {len(values)} values for {len(samples)} "
                                "completions")
            for sample, value in zip(samples, values, strict=True):
                sample.extra[column] = value

        return {"log_metric": log_metric, "log_extra": log_extra}


# ----------------------------------------------------------------------------------------------------- records


def prompt_record(record: dict, where: str, form: TOKENIZER.Form) -> dict:
    """A record of the on-policy methods: {"prompt", and all other keys, for reward functions}. If a conversation ends with an
    assistant message, this message becomes the key `completion`."""
    prompt = TOKENIZER.prompt_of(record, where, form.system)
    if prompt is None:
        raise UserError(f"{where}: no prompt in keys {TOKENIZER.keys_of(record)}; set {form.section}.columns, as in "
                        "{prompt: my_column}")
    rest = {key: value for key, value in record.items() if key not in ("prompt", *TOKENIZER.CHAT_KEYS)}
    if not prompt:
        raise TOKENIZER.Unusable("without a prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        if any(TOKENIZER.is_given(record, key) for key in TOKENIZER.PROMPT_KEYS):
            raise UserError(f"{where}: the prompt ends with an assistant message, so there is nothing to complete")
        rest["completion"], prompt = prompt[-1]["content"], prompt[:-1]
    return {**rest, **TOKENIZER.extras_of(record, where), "prompt": prompt}


def preference(record: dict, where: str, form: TOKENIZER.Form) -> dict:
    """A preference record: {"prompt", "chosen", "rejected", "margin"} or {"prompt", "completion", "label"}, and `tools`.

    Text stays a string, and a conversation a list of messages. If the prompt is missing or repeated in the completions, it is
    their common prefix.

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: A", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: B"} -> prompt: user message "Hi"
    """
    single = "completion" in record and "label" in record and record.get("chosen") is None
    keys = ("completion",) if single else ("chosen", "rejected")
    if not all(key in record for key in keys):
        raise UserError(f"{where}: keys {TOKENIZER.keys_of(record)} are neither prompt + chosen + rejected nor prompt + "
                        f"completion + label; set {form.section}.columns, as in {{chosen: my_column, rejected: another}}")
    implicit = not any(TOKENIZER.is_given(record, key) for key in TOKENIZER.PROMPT_KEYS)
    completions = [TOKENIZER.words_of(record[key], "assistant", f"{where}: {key}", implicit) for key in keys]
    if not all(completions):
        raise TOKENIZER.Unusable("with an empty completion")
    whole = [isinstance(completion, list) and completion[0]["role"] != "assistant" for completion in completions]
    if any(whole) and not all(whole):
        raise UserError(f"{where}: one completion is a whole conversation, the other only an assistant message")
    prompt, completions = (split_conversations if all(whole) else split_completions)(record, completions, where, form)
    if not prompt:
        raise TOKENIZER.Unusable("without a prompt")
    if not all(completions):
        raise TOKENIZER.Unusable("with an empty completion")
    if isinstance(prompt, list) or any(isinstance(completion, list) for completion in completions):
        prompt, completions = TOKENIZER.as_messages(prompt), [TOKENIZER.as_messages(part, "assistant") for part in completions]
    found = {"prompt": prompt, **dict(zip(keys, completions, strict=True)),
             **TOKENIZER.extras_of({"tools": record.get("tools")}, where)}
    if not single:
        return {**found, "margin": TOKENIZER.number_of(record, "margin", where) if TOKENIZER.is_given(record, "margin") else 0.0}
    label = str(record["label"]).strip().lower()
    if label not in ("true", "1", "1.0", "false", "0", "0.0"):
        raise UserError(f"{where}: label {record['label']!r} must be true (desirable) or false")
    return {**found, "label": label in ("true", "1", "1.0")}


def split_conversations(record: dict, whole: list[list[dict]], where: str, form: TOKENIZER.Form) -> tuple[list[dict], list]:
    """Split whole conversations into (prompt, completions). A separate prompt must match the beginning of their prompt."""
    given = TOKENIZER.prompt_of({key: value for key, value in record.items() if key not in TOKENIZER.CHAT_KEYS}, where,
                                form.system)
    given = TOKENIZER.as_messages(given) if given else []
    prompt, completions = common_prompt(whole, where, form)
    given_turns, turns = ([turn for turn in messages if turn["role"] != "system"] for messages in (given, prompt))
    if TOKENIZER.essence(turns[: len(given_turns)]) != TOKENIZER.essence(given_turns):
        raise TOKENIZER.Unusable("whose prompt differs from the prompt in its completions")
    system = [turn for turn in given if turn["role"] == "system"]
    if content := record.get("system") if TOKENIZER.is_given(record, "system") else form.system:
        system = system or [{"role": "system", "content": content}]
    return (prompt if prompt[0]["role"] == "system" else [*system, *prompt]), completions


def split_completions(record: dict, completions: list, where: str, form: TOKENIZER.Form) -> tuple[str | list[dict] | None, list]:
    """(prompt, completions) from completions without their prompt, or from texts that both start with it."""
    prompt = TOKENIZER.prompt_of(record, where, form.system)
    if prompt is None:
        return common_prompt(completions, where, form)
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant message, so there is nothing to complete")
    repeated = prompt and isinstance(prompt, str) and all(isinstance(c, str) and c.startswith(prompt) for c in completions)
    if repeated and len(completions) == 2:
        completions = [completion[len(prompt) :] for completion in completions]
    return prompt, completions


def common_prompt(whole: list, where: str, form: TOKENIZER.Form) -> tuple[str | list[dict], list]:
    """Split two texts or conversations into (common prompt, the rest of each).

    "Q: blue?\\nA: lake", "Q: blue?\\nA: hill" -> "Q: blue?\\nA:", [" lake", " hill"]; the space belongs to the completion
    """
    if len({type(completion) for completion in whole}) > 1:
        raise TOKENIZER.Unusable("whose completions have different prompts")
    first, last = whole[0], whole[-1]
    if isinstance(first, list):
        common = len(os.path.commonprefix([TOKENIZER.essence(messages) for messages in whole]))
        same = min(common, len(first) - 1, len(last) - 1)  # the last turn is the completion, even if both are equal
        prompt = first[:same]
        if any(messages[same]["role"] != "assistant" for messages in whole):
            raise TOKENIZER.Unusable("whose completions have different prompts")
        if not any(turn["role"] != "system" for turn in prompt):
            raise UserError(f"{where}: the conversations have a system and an assistant message, but no user message; move the "
                            "system message to the key 'system'")
        return prompt, [messages[same:] for messages in whole]
    same = len(os.path.commonprefix(whole)) if len(whole) > 1 else 0
    while same and not (first[same : same + 1].isspace() and last[same : same + 1].isspace()):
        same -= 1  # whole words
    while same and first[same - 1].isspace() and first[same : same + 1] == " ":
        same -= 1
    if not first[:same].strip():
        both = ", and chosen and rejected have no common prefix" if len(whole) > 1 else ""
        raise UserError(f"{where}: no prompt{both}; set {form.section}.columns, as in {{prompt: my_column}}")
    return first[:same], [text[same:] for text in whole]


# ------------------------------------------------------------------------------------------------ command line


def held_out_rewards(stream: Rollouts, held: list[Prompt], config) -> Callable | None:
    """evaluate(model) for `fit`: the rewards of greedy completions of held-out prompts. A few are printed."""
    chosen = [held[i] for i in np.linspace(0, len(held) - 1, min(len(held), config.rl.eval_prompts)).astype(int)]
    if not chosen:
        return None

    def evaluate(model) -> dict:
        share = list(enumerate(chosen))[stream.run.rank :: stream.run.world_size]
        samples = stream.generate(model, share, INFER.Sampling(stream.sampling.max_new_tokens, temperature=0), 0)
        logged, samples = stream.compute_rewards(samples), gather(samples)
        if config.training.sample_tokens:
            for sample in samples[:: max(1, len(samples) // 3)][:3]:
                question = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1]["content"]
                TRAIN.say_sample(question, f"{sample.text}   ({sample.reward:.3g})")
        metrics, means = {"reward": sum(sample.reward for sample in samples) / len(samples)}, stream.mean_rewards(samples)
        metrics |= {f"rewards/{name}": mean for name, mean in means.items() if len(means) > 1}
        metrics["mean_length"] = sum(sample.length for sample in samples) / len(samples)
        return {**metrics, **logged, **metrics}

    return evaluate


def plot_rollouts(out: Path) -> None:
    """Plot reward, KL and completion length over the steps to rollouts.png."""
    records = TRAIN.json_lines(out / "log.jsonl")
    TRAIN.plot_curves(out / "rollouts.png", {
        "mean reward": {"rollouts": TRAIN.curve(records, "reward"), "held-out, greedy": TRAIN.curve(records, "eval_reward")},
        "KL to the reference (nats per completion)": {"kl": TRAIN.curve(records, "kl")},
        "completion length (tokens)": {"length": TRAIN.curve(records, "completions/mean_length")}})


def disable_dropout(model: nn.Module) -> None:
    """Set dropout to 0, because it changes the probabilities that the losses compare. Some layers of transformers read it from
    their config. They get a copy of the config, so the saved config does not change."""
    copies: dict[int, object] = {}

    def clear(owner) -> None:
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(owner, nn.Dropout))):
                setattr(owner, name, 0.0)

    for module in model.modules():
        clear(module)
        if isinstance(model, MODEL.ForeignModel) and hasattr(module, "config") and module not in (model, model.inner):
            if id(module.config) not in copies:
                copies[id(module.config)] = copy.deepcopy(module.config)
                clear(copies[id(module.config)])
            module.config = copies[id(module.config)]


def frozen_model(config, tokenizer, device) -> MODEL.LanguageModel | None:
    """The model of rl.ref_model, which must have the policy's tokenizer."""
    name = config.rl.ref_model
    if not name:
        return None
    section = MODEL.ModelSection(name=name, dtype="float32", device=str(device),
                                 attn_implementation=config.model.attn_implementation)
    model, other = TOKENIZER.open_model(section, key="rl.ref_model", head="lm")
    missing = set(tokenizer.get_vocab().items()) - set(other.get_vocab().items())
    if missing:
        raise UserError(f"rl.ref_model: {name} does not match the policy: its tokenizer lacks {len(missing):,} of the policy's "
                        f"{len(tokenizer):,} tokens")
    if not model.config.causal:
        raise UserError(f"rl.ref_model: {name} is an encoder; choose a causal model")
    if model.config.max_position_embeddings < config.training.max_length:
        raise UserError(f"rl.ref_model: the context of {name} ({model.config.max_position_embeddings} tokens) is shorter than "
                        f"training.max_length {config.training.max_length}")
    return model.requires_grad_(False)


def read_records(config, checkpoint: Path | None = None) -> tuple:
    """(tokenizer, training records, held-out records, LeftOut). Records are (where, record) in the format of the method."""
    TRAIN.fit_length(config, MODEL.context_length(config.model.name, MODEL.overrides(config.model)))
    tokenizer = TOKENIZER.of_run(config, checkpoint)
    left = TOKENIZER.LeftOut()
    SFT.say_unused(config.data)
    expand, kind = (prompt_record, "prompt") if config.rl.method in ON_POLICY else (preference, "pair")
    records, held = TOKENIZER.read_split(config.data, form_of(config.rl, expand), left, kind)
    make_chat(tokenizer, records + held, bool(config.rl.tools))
    return tokenizer, records, held, left


def prepare(config, checkpoint: Path | None, device: torch.device) -> TRAIN.Stage:
    settings, method = config.rl.fill(), config.rl.method
    SFT.need_model(config)
    if config.training.qat != "none":
        raise UserError("training.qat: not available in RL.py, which compares the policy with an unquantized reference; use "
                        "SFT.py or DISTILL.py")
    dropout = ("lora", "lora_dropout"), ("model", "attention_dropout"), ("model", "resid_pdrop"), ("model", "embd_pdrop")
    for section, key in dropout:
        if getattr(getattr(config, section), key):
            raise UserError(f"{section}.{key}: dropout changes the probabilities that RL.py compares; set 0")
    tokenizer, records, held, left = read_records(config, checkpoint)
    judges = Judges(settings, tokenizer, device) if method in ON_POLICY else None
    head = {"reward": "score", "ppo": ("lm", "value")}.get(method, "lm")
    model = SFT.prepare_model(config, tokenizer, head, ["reward"] if method == "reward" else None)
    if not model.config.causal:
        raise UserError(f"model.name: {config.model.name} is an encoder; RL.py trains causal models")
    if method == "ppo":
        model.value_head.requires_grad_(True)
    TOKENIZER.end_with_turns(model, tokenizer)
    disable_dropout(model)
    frozen = frozen_model(config, tokenizer, device)
    build = rollout_stage if method in ON_POLICY else pair_stage
    stage = build(config, model, tokenizer, records, held, left, frozen, judges)
    key, reference = ("rl.ref_model", settings.ref_model) if settings.ref_model else ("model.name", config.model.name)
    sources = {key: reference} if settings.beta else {}
    return stage._replace(evaluate=with_kept(stage.evaluate, config, tokenizer), sources=sources,
                          share=0.1 if method == "reward" else 1 / 30)


def with_kept(evaluate: Callable | None, config, tokenizer) -> Callable | None:
    """Add the metric `kept` to the validation: exact match on questions outside of the training data. It measures forgetting."""
    name = config.rl.kept
    if name == "auto":
        shipped = config.data.train == [shipped_data(config.rl.method)] and config.rl.method != "reward"
        name = SHIPPED_QUESTIONS if shipped and tokenizer.chat_template and Path(SHIPPED_QUESTIONS).exists() else None
    if name is None:
        return evaluate
    questions = SFT.read_questions(name, SFT.SFTSection().eval_answers, "rl.kept", config.rl.system)
    if not tokenizer.chat_template:
        raise UserError("rl.kept: the questions need a chat template, but the tokenizer has none; set --rl.kept null")
    match = SFT.exact_match(questions, tokenizer, INFER.Sampling(64, temperature=0))
    return lambda model: {**(evaluate(model) if evaluate else {}), "kept": match(model)}


def pair_stage(config, model, tokenizer, records, held, left, frozen, _) -> TRAIN.Stage:
    settings = config.rl
    pairs, held_out = (read_pairs(config, tokenizer, part, left) for part in (records, held))
    least, unit = (2, "completion") if settings.method == "kto" else (1, "pair")
    if len(pairs) < least:
        raise UserError(f"data.train: too few usable {unit}s: {len(pairs)}, expected at least {least}{left.text()}")
    truncated = f"; {left.truncated:,} truncated at training.max_length" if left.truncated else ""
    say(f"{MODEL.counted(len(pairs), unit)}; {len(held_out):,} held out{truncated}{left.text()}")
    if settings.method == "kto":
        warn_imbalance(pairs, settings)
    stream = Pairs(pairs, held_out, settings, config.training, frozen)
    loss = reward_model_loss(settings) if settings.method == "reward" else preference_loss(settings)
    evaluate = held_out_pairs(stream, loss, config.training.eval_batches) if held_out else None
    if settings.method != "reward":
        shown = held_out[:: max(1, len(held_out) // 3)][:3]
        texts = [pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"] for pair in shown]
        prompts = [TOKENIZER.prompt_ids(tokenizer, pair.prompt, pair.tools) for pair in shown]
        evaluate = TRAIN.with_samples(evaluate, tokenizer, config.training, list(zip(texts, prompts, strict=True)))
    return TRAIN.Stage(model, tokenizer, stream, loss, evaluate, TRAIN.save_product)


def warn_imbalance(pairs: list[Pair], settings: RLSection) -> None:
    """Warn if the total weights of desirable and undesirable completions are too different for KTO. The recommended ratio is
    1 to 4/3 (Ethayarajh 2024, section 4.2); the warning appears below half or above twice that."""
    desirable = sum(pair.label for pair in pairs)
    undesirable = len(pairs) - desirable
    weights = settings.desirable_weight * desirable, settings.undesirable_weight * undesirable
    if weights[1] / 2 <= weights[0] <= weights[1] * 8 / 3:
        return
    advice = "kto needs both kinds"
    if all(weights):
        key, value = (("desirable_weight", weights[1] / desirable) if weights[0] < weights[1] else
                      ("undesirable_weight", weights[0] / undesirable))
        advice = (f"total weights {weights[0]:.3g} and {weights[1]:.3g}; the recommended ratio is 1 to 4/3: set "
                  f"rl.{key} {value:.3g}")
    say(f"warning: {desirable:,} desirable and {undesirable:,} undesirable completions; {advice}")


def read_prompts(config, tokenizer, records: list[tuple[str, dict]], left: TOKENIZER.LeftOut,
                 tools: Tools | None) -> list[Prompt]:
    """Records -> prompts. Prompts that leave no room for a completion are counted in `left`."""
    room = Room("rl.max_completion_length", config.rl.max_completion_length, config.training.max_length, "training.max_length",
                "prompt with the schemas of rl.tools" if tools else "prompt")
    room.check()
    prompts = []
    for where, record in records:
        if reserved := set(ARGUMENTS) & record.keys():
            raise UserError(f"{where}: the key '{min(reserved)}' is reserved for an argument of reward functions; rename it with "
                            "rl.columns")
        content = TOKENIZER.as_messages(record["prompt"]) if tools else record["prompt"]
        ids = TOKENIZER.prompt_ids(tokenizer, content, tools.merged(record.get("tools")) if tools else record.get("tools"))
        if room.fits(ids, where, left):
            prompts.append(Prompt(where, content, ids, {key: value for key, value in record.items() if key != "prompt"}))
    return prompts


def rollout_stage(config, model, tokenizer, records, held, left, frozen, judges) -> TRAIN.Stage:
    settings, out = config.rl, Path(config.output.dir)
    tools = Tools(settings.tools, tokenizer, settings.tool_timeout) if settings.tools else None
    prompts, held_out = (read_prompts(config, tokenizer, part, left, tools) for part in (records, held))
    if not prompts:
        raise UserError(f"data.train: no usable prompt{left.text()}")
    judges.check(prompts + held_out)
    say(f"{MODEL.counted(len(prompts), 'prompt')}; {len(held_out):,} held out{left.text()}; rewards: {', '.join(judges.names)}")
    reference = Reference(model, frozen) if settings.beta else None
    stream = Rollouts(prompts, tokenizer, judges, settings, config.training, reference, out, tools)

    def save(text: str, tokenizer, model, folder: Path) -> None:
        TRAIN.save_product(text, tokenizer, model, folder)
        if MODEL.process_rank() == 0:
            plot_rollouts(out)

    return TRAIN.Stage(model, tokenizer, stream, rollout_loss(settings), held_out_rewards(stream, held_out, config), save)


def dry_run(config) -> None:
    """Print the first records as the model reads them, and the length distribution. In pairs, trained tokens are marked (for a
    reward model: the token whose score is the reward). Below a prompt are the columns for reward functions."""
    SFT.need_model(config)
    settings = config.rl.fill()
    tokenizer, records, held_out, left = read_records(config)
    if settings.method in ON_POLICY:
        tools = Tools(settings.tools, tokenizer, settings.tool_timeout) if settings.tools else None
        prompts = read_prompts(config, tokenizer, records, left, tools)
        if not prompts:
            raise UserError(f"data.train: no usable prompt{left.text()}")
        say(f"{MODEL.counted(len(prompts), 'prompt')}; {len(held_out):,} held out{left.text()}")
        shown = [(prompt.where, f"{tokenizer.decode(prompt.ids)}\n{json.dumps(prompt.columns, ensure_ascii=False, default=str)}")
                 for prompt in prompts[:3]]
        limit = config.training.max_length - settings.max_completion_length
        return SFT.preview(shown, [len(prompt.ids) for prompt in prompts], "prompt",
                           f"at most {limit} (training.max_length - rl.max_completion_length)")
    pairs, shown, lengths = read_pairs(config, tokenizer, records, left), [], []
    for pair in pairs:
        names = ("chosen", "rejected") if len(pair.examples) == 2 else ("desirable" if pair.label else "undesirable",)
        for name, (ids, weights) in zip(names, pair.examples, strict=True):
            if settings.method == "reward":  # without the repeated last token
                ids, weights = ids[:-1], [*[0] * (len(ids) - 2), 1]
            shown.append((f"{pair.where}: {name}", (ids, weights)))
            lengths.append(len(ids))
    if not pairs:
        raise UserError(f"data.train: no usable record{left.text()}")
    unit = "completion" if settings.method == "kto" else "pair"
    say(f"{MODEL.counted(len(pairs), unit)}; {len(held_out):,} held out{left.text()}")
    SFT.preview([(where, SFT.marked_text(tokenizer, *example)) for where, example in shown[:6]], lengths, "prompt and completion",
                f"max_length {config.training.max_length}")


ACTIONS = {**TRAIN.ACTIONS, "adapter": SFT.ACTIONS["adapter"], "dry_run": SFT.ACTIONS["dry_run"]}
SECTIONS = {**TRAIN.SECTIONS, "lora": SFT.LoraSection, "rl": RLSection}


def main(argv: list[str] | None = None) -> TRAIN.Result | None:
    config = load_config(argv, SECTIONS, "rl", ACTIONS, __doc__)
    if config.data.train == ["auto"]:
        config.data.train = [shipped_data(config.rl.method)]
        held_out = config.data.train[0].replace(".jsonl", "_test.jsonl")
        config.data.validation = held_out if config.data.validation == "hash" else config.data.validation
    if config.actions.dry_run and config.actions.resume:
        raise UserError("--dry-run: does not train; leave out --resume")
    if config.actions.dry_run:
        return dry_run(config)
    show = 'echo "..." | python INFER.py MODEL'
    if config.rl.method == "reward":
        show = ('python INFER.py MODEL --jsonl < conversations.jsonl    # the reward of each {"messages": [...]}, or of '
                '{"text": ...} without a chat template')
    return TRAIN.run_stage("rl", config, prepare, show)


if __name__ == "__main__":
    run_main(main)
