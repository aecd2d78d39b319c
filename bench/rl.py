"""The effect of fine-tuning and of the methods of RL.py on held-out prompts, and a time profile of a GRPO step.

    python bench/rl.py                               # all methods, three seeds, both precisions (hours); trains a base and an SFT model for each
    python bench/rl.py --method grpo --seeds 0 --precisions no      # appends rows to out/bench/rl.jsonl; existing rows are skipped
    python bench/rl.py --model out/sft               # start all methods from this model
    python bench/rl.py --table                       # print the rows as a table
    python bench/rl.py rollouts                      # 64 prompts x 8 completions x 64 tokens: batched, one at a time, and transformers' generate
    python bench/rl.py time                          # fraction of a GRPO step for rollout, scoring and training
    python bench/rl.py losses                        # losses and gradients of all methods, compared with TRL on the same batches
    python bench/rl.py trl                           # DPO and GRPO compared with TRL's trainers: seconds, and the DPO loss of each step

solved: greedy answers to the 500 prompts of data/prompts_test.jsonl that end with the correct number. introduced: completions (temperature
0.8, the first 32 tokens) of the 500 prompts of data/preferences_test.jsonl that are fluent and whose first sentence introduces the main
character: it names a home, a job or a kind of creature, and no day, month or time before it. Fluent means: for the model before the stage,
the likelihood per token is at least that of the 1% least likely held-out chosen completions. kept: exact match on the questions of
data/chat_test.jsonl, which are in no training set. pairs: held-out pairs whose chosen completion has the higher reward (for methods
without a reference: the higher log-probability per token).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import INFER
import MODEL
import RL
import SFT
import TOKENIZER
import TRAIN

STORIES = ["--data", str(ROOT / "data/preferences.jsonl"), "--data.validation", str(ROOT / "data/preferences_test.jsonl")]
RUNS = {  # name -> flags of RL.py, measure
    "sft": ([], "answered"),
    "grpo": (["--rl.method", "grpo"], "solved"),
    "rloo": (["--rl.method", "rloo"], "solved"),
    "ppo": (["--rl.method", "ppo"], "solved"),
    "reward": (["--rl.method", "reward"], "pairs"),
    "ppo-reward-model": (["--rl.method", "ppo", "--rl.max_completion_length", "32", "--rl.reward_funcs", "{reward}", *STORIES], "introduced"),
    "dpo": (["--rl.method", "dpo"], "introduced"),
    "ipo": (["--rl.method", "dpo", "--rl.loss_type", "ipo"], "introduced"),
    "simpo": (["--rl.method", "simpo"], "introduced"),
    "orpo": (["--rl.method", "orpo"], "introduced"),
    "kto": (["--rl.method", "kto"], "introduced"),
}
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
GENERATOR = (ROOT / "data/make.py").read_text()
CAST = re.findall(r"^(\w+) +(?:he|she) +(\w+) +(\w+) +\| ([\w ]+?) +\|", GENERATOR, re.M)
WHO = re.compile(r"\b(" + "|".join(sorted({word for _, *words in CAST for word in words})) + r")\b")
WHEN = re.compile(r"^(One|On|Early|It was|That|Every|Once)\b|\b(\w+day|day|morning|afternoon)\b")


def load(name: str):
    return MODEL.load(name, device="cuda" if torch.cuda.is_available() else "cpu")


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text().splitlines()]


def generate(model, tokenizer, prompts: list[str], sampling: INFER.Sampling) -> list[str]:
    ids = [TOKENIZER.prompt_ids(tokenizer, prompt) for prompt in prompts]
    return [completion.text for [completion] in INFER.generate(model, ids, sampling, tokenizer, batch_size=256)]


def solved(model, tokenizer) -> list[bool]:
    """Whether each held-out sum is answered correctly. The answer is extracted here, not by the reward function used in training."""
    tests = records("prompts_test.jsonl")
    completions = generate(model, tokenizer, [test["prompt"] for test in tests], INFER.Sampling(64, 0.0))
    return [re.findall(r"\d+", text)[-1:] == [test["answer"]] for text, test in zip(completions, tests, strict=True)]


def is_introduction(text: str) -> bool:
    """Mip was a brave duskmouse who lived in Mossbank. -> True; One Monday, Mip the baker of Mossbank lost her pen. -> False"""
    sentence = text.strip().partition(".")[0]
    when, who = WHEN.search(sentence), WHO.search(sentence)
    return who is not None and not (when and when.start() < who.start())


@torch.no_grad()
def nats_per_token(model, tokenizer, prompts: list[str], texts: list[str]) -> torch.Tensor:
    """Mean negative log-likelihood of the first 32 tokens of each text (N,)."""
    examples = []
    for prompt, text in zip(prompts, texts, strict=True):
        prompt_ids, ids = TOKENIZER.prompt_ids(tokenizer, prompt), tokenizer(text, add_special_tokens=False).input_ids[:32]
        examples.append(RL.Example([*prompt_ids, *ids], [0] * len(prompt_ids) + [1] * len(ids)))
    found = []
    for start in range(0, len(examples), 100):
        batch = RL.make_batch([RL.Pair("", [example], "") for example in examples[start : start + 100]])
        sums, tokens, _ = RL.completion_logps(model, TRAIN.on_device(batch, model.device), 1)
        found.append((-sums[:, 0] / tokens[:, 0]).cpu())  # an empty text gives NaN (0 / 0), which is below no bound
    return torch.cat(found)


def introduced(model, tokenizer, seed: int, start) -> tuple[list[bool], list[str]]:
    tests = records("preferences_test.jsonl")
    prompts = [test["prompt"] for test in tests]
    completions = generate(model, tokenizer, prompts, INFER.Sampling(32, 0.8, seed=seed))
    bound = nats_per_token(start, tokenizer, prompts, [test["chosen"] for test in tests]).quantile(0.99)
    fluent = nats_per_token(start, tokenizer, prompts, completions) <= bound
    return [is_introduction(text) and bool(good) for text, good in zip(completions, fluent, strict=True)], completions


def kept(model, tokenizer) -> float:
    questions = SFT.read_questions(ROOT / "data/chat_test.jsonl", 10**6, "rl.kept")
    return SFT.exact_match(questions, tokenizer, INFER.Sampling(64, temperature=0))(model)


@torch.no_grad()
def pairs(folder: str, start: str, kind: str) -> float:
    """Fraction of held-out pairs in the correct order, by the scores of a reward model or by log-probabilities (minus those of `start`)."""
    tokenizer, config = TOKENIZER.load(folder), MODEL.SimpleNamespace(training=MODEL.SimpleNamespace(max_length=256), rl=RL.RLSection(method="dpo"))
    form, left = TOKENIZER.Form(RL.preference, "rl"), TOKENIZER.LeftOut()
    read = RL.read_pairs(config, tokenizer, list(form.read(ROOT / "data/preferences_test.jsonl", left)), left)
    if kind == "reward":
        reward_model = RL.reward_model(folder, tokenizer, "cpu")
        scores = torch.tensor([reward_model([RL.Sample(RL.Prompt("", "", example.ids[: example.start], {}), 0, example.ids[example.start :], "stop", "", None)
                                             for example in pair.examples]) for pair in read])
    else:
        def logps(name: str) -> torch.Tensor:
            model = load(name)
            batches = [RL.make_batch(read[i : i + 50]) for i in range(0, len(read), 50)]
            sums, tokens = (torch.cat(part).cpu() for part in zip(*(RL.completion_logps(model, TRAIN.on_device(batch, model.device), 2)[:2] for batch in batches), strict=True))
            return sums / tokens if kind in ("simpo", "orpo") else sums

        scores = logps(folder) - (0 if kind in ("simpo", "orpo") else logps(start))
    return float((scores[:, 0] > scores[:, 1]).float().mean() + 0.5 * (scores[:, 0] == scores[:, 1]).float().mean())


def measure(method: str, folder: str, start: str, reward: str, seed: int) -> dict:
    found, kind = {}, RUNS[method][1]
    tokenizer = TOKENIZER.load(folder)
    if kind == "pairs":
        return {"pairs": pairs(folder, start, "reward") if folder != start else 0.5}
    model = load(folder)
    if kind == "solved":
        right = solved(model, tokenizer)
        return {"solved": sum(right) / len(right), "kept": kept(model, tokenizer)}
    right, completions = introduced(model, tokenizer, seed, load(start))
    found |= {"introduced": sum(right) / len(right), "kept": kept(model, tokenizer)}
    if method == "ppo-reward-model":
        reward_model, prompts = RL.reward_model(reward, tokenizer, "cpu"), [test["prompt"] for test in records("preferences_test.jsonl")]
        samples = [RL.Sample(RL.Prompt("", "", TOKENIZER.prompt_ids(tokenizer, prompt), {}), 0, tokenizer(text, add_special_tokens=False).input_ids, "length", text, None)
                   for prompt, text in zip(prompts, completions, strict=True)]
        found["score"] = sum(reward_model(samples)) / len(samples)
    else:
        found["pairs"] = pairs(folder, start, method)
    return found


def train(program: str, out: Path, options, *flags: str) -> dict:
    """Run a program unless its result exists -> its result.json. An interrupted run resumes from its newest checkpoint."""
    if not (out / "result.json").exists():
        command = [sys.executable, str(ROOT / program), "--config", str(ROOT / "config.yaml"), "--out", str(out), *flags, "--resume", "auto"]
        subprocess.run(command, check=True, cwd=ROOT, stderr=None if options.loud else subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())


def run(method: str, seed: int, precision: str, options) -> dict:
    """Run a method, and measure the model before and after it -> a row of the table."""
    def folder(name: str) -> Path:
        return Path(options.out) / f"{name}-{seed}-{precision}"

    same = ["--seed", str(seed), "--training.mixed_precision", precision]
    start = options.model or str(folder("sft"))
    row = {"method": method, "seed": seed, "precision": precision}
    if not options.model:
        train("TRAIN.py", folder("base"), options, *same)
        fine_tuned = train("SFT.py", folder("sft"), options, "--model", str(folder("base")), *same)
    if method == "sft":
        after = {"answered": kept(load(start), TOKENIZER.load(start))}
        return row | {"before": {"answered": fine_tuned["before"]["exact_match"]}, "after": after, "kl": None, "seconds": round(fine_tuned["seconds"])}
    reward = str(folder("reward"))
    if method == "ppo-reward-model" and not (Path(reward) / "result.json").exists():
        save(run("reward", seed, precision, options), options.rows)
    out, flags = folder(method), [flag.format(reward=reward) for flag in RUNS[method][0]]
    result = train("RL.py", out, options, "--model", start, *same, *flags, *options.flags)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kl = next((record["kl"] for record in reversed(log) if "kl" in record), None)
    before, after = (measure(method, each, start, reward, seed) for each in (start, str(out)))
    return row | {"before": before, "after": after, "kl": kl, "seconds": round(result["seconds"])}


def save(row: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def each_seed(seeds: list[dict], name: str, form: str = "{:.1%}") -> tuple[str, str]:
    """(mean before, mean after with the values of all seeds) of a measure."""
    starts, ends = ([row[when][name] for row in seeds] for when in ("before", "after"))
    return form.format(statistics.mean(starts)), f"{form.format(statistics.mean(ends))} ({', '.join(form.format(x) for x in ends)})"


def table(found: list[dict]) -> str:
    """Means over the seeds, and the gain with two standard errors (of 500 answers or of the seeds, whichever is larger)."""
    lines = ["| method | precision | measure | before | after (each seed) | gain | kept before | kept after (each seed) | KL | seconds (each seed) |", "|---|---|---|---|---|---|---|---|---|---|"]
    for method, precision in itertools.product(RUNS, PRECISIONS):
        seeds = sorted((row for row in found if (row["method"], row["precision"]) == (method, precision)), key=lambda row: row["seed"])
        for name in [name for name in seeds[0]["after"] if name != "kept"] if seeds else ():
            starts, ends = [row["before"][name] for row in seeds], [row["after"][name] for row in seeds]
            start, end = statistics.mean(starts), statistics.mean(ends)
            spread = math.sqrt(sum((x - end) ** 2 for x in ends) / max(len(seeds) - 1, 1) / len(seeds))
            share = name != "score"
            chance = math.sqrt(start * (1 - start) / 500 + end * (1 - end) / 500 / len(seeds)) if share else 0.0
            form = "{:.1%}" if share else "{:.2f}"
            kept = each_seed(seeds, "kept") if "kept" in seeds[0]["after"] else ("", "")
            kl = [row["kl"] for row in seeds if row["kl"] is not None and method != "kto"]  # the kl of kto is the baseline of its loss
            cells = [method, PRECISIONS[precision], name, *each_seed(seeds, name, form), f"{form.format(end - start)} ± {form.format(2 * max(chance, spread))}", *kept,
                     f"{statistics.mean(kl):.1f}" if kl else "", ", ".join(str(row["seconds"]) for row in seeds)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- speed


def time_rollouts(options) -> None:
    """Print tokens per second: medians of alternating rounds. Every completion has 64 tokens."""
    from transformers import AutoModelForCausalLM

    tokenizer, model = TOKENIZER.load(options.model), MODEL.load(options.model)
    theirs = AutoModelForCausalLM.from_pretrained(options.model).eval()
    prompts = [TOKENIZER.prompt_ids(tokenizer, record["prompt"]) for record in records("prompts_test.jsonl")[:64]]
    pad, width = theirs.config.pad_token_id or 0, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts]).repeat_interleave(8, 0)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).repeat_interleave(8, 0)
    batched = INFER.Sampling(64, 1.0, seed=0, n=8, ignore_eos=True)

    def ours() -> int:
        return sum(len(completion.ids) for group in INFER.generate(model, prompts, batched, batch_size=256) for completion in group)

    def peer() -> int:
        out = theirs.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=64, eos_token_id=None, pad_token_id=pad)
        return len(out) * (out.shape[1] - width)

    def sequential() -> int:
        single = INFER.Sampling(64, 1.0, seed=0, ignore_eos=True)
        return sum(len(INFER.generate(model, [prompt], single)[0][0].ids) for prompt in prompts[:16])

    speeds: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, function in (("batched", ours), ("transformers, batched", peer), ("one at a time", sequential)):
            clock = time.perf_counter()
            speeds.setdefault(name, []).append(function() / (time.perf_counter() - clock))
    medians = {name: sorted(values)[len(values) // 2] for name, values in speeds.items()}
    for name, speed in medians.items():
        print(f"{name}: {speed:,.0f} tokens/s; batched is {medians['batched'] / speed:.2f}x as fast")


def time_step(options) -> None:
    """Print the time of a GRPO rollout of 256 completions and its four steps by part, from the log of twelve rollouts."""
    out = Path(options.out) / "time"
    command = [sys.executable, str(ROOT / "RL.py"), "--config", str(ROOT / "config.yaml"), "--model", options.model, "--out", str(out), "--overwrite", "--rl.method", "grpo",
               "--batch-size", "64", "--max-steps", "48", "--training.logging_steps", "8", "--training.save_steps", "0", "--training.eval_steps", "0", *options.flags]
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    log = [record for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "time/rollout" in record]
    steps = 256 // 64
    whole = (log[-1]["seconds"] - log[0]["seconds"]) / (log[-1]["step"] - log[0]["step"]) * steps
    parts = {name: sum(record[f"time/{name}"] for record in log[1:]) / len(log[1:]) for name in ("rollout", "score")}
    parts["train"] = whole - sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name}: {seconds:.2f} s per rollout, {seconds / whole:.0%}")


STEPS = 10
# The turns of the bundled template, without the final line break, on which TRL would train as well.
TURNS = ("{{ bos_token }}{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + ('' if loop.last and message.role == 'assistant' else '\\n') }}"
         "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")
PLAIN = ["--training.optim", "adamw", "--training.lr_scheduler_type", "constant", "--training.warmup_steps", "0", "--training.weight_decay", "0", "--training.adam_beta2", "0.999",
         "--training.mixed_precision", "no", "--max-steps", str(STEPS), "--data.validation", "none", "--rl.kept", "null",
         "--training.logging_steps", "1", "--training.eval_steps", "0", "--training.save_steps", "0", "--training.sample_tokens", "0"]


def train_ours(method: str, options) -> tuple[float, list[float], list[str]]:
    """(seconds of training, losses, records in training order)."""
    out, order, make = Path(options.out) / f"compared-{method}", [], RL.Pairs.make

    def recorded(stream, numbers):
        order.extend(stream.pairs[int(stream.plan.order[i])].where for i in numbers)
        return make(stream, numbers)

    RL.Pairs.make = recorded
    with contextlib.redirect_stderr(io.StringIO()):
        plain = [*PLAIN, *(["--rl.rpo_alpha", "0"] if method == "dpo" else [])]
        RL.main(["--config", str(ROOT / "config.yaml"), "--model", options.model, "--out", str(out), "--overwrite", "--rl.method", method, "--learning-rate", "1e-4", "--batch-size", "64", *plain])
    RL.Pairs.make = make
    losses = [record["loss"] for record in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in record]
    return json.loads((out / "result.json").read_text())["seconds"], losses, order


def train_trl(method: str, options, order: list[str]) -> tuple[float, list[float]]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = TURNS
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    usual = dict(output_dir=str(Path(options.out) / "trl"), per_device_train_batch_size=64, max_steps=STEPS, learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0,
                 adam_beta2=0.999, optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    user = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    if method == "dpo":
        found = records("preferences.jsonl")
        ordered = [found[int(where.rpartition(":")[2]) - 1] for where in order]
        pairs = [{"prompt": user(pair["prompt"]), **{key: [{"role": "assistant", "content": pair[key]}] for key in ("chosen", "rejected")}} for pair in ordered]
        settings = trl.DPOConfig(**usual, precompute_ref_log_probs=True, max_length=256, train_sampling_strategy="sequential")
        make = partial(trl.DPOTrainer, model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    else:
        def exact(prompts, completions, answer, **_):
            return [float(re.findall(r"\d+", turns[-1]["content"])[-1:] == [right]) for turns, right in zip(completions, answer, strict=True)]

        prompts = [{"prompt": user(record["prompt"]), "answer": record["answer"]} for record in records("prompts.jsonl")]
        settings = trl.GRPOConfig(**usual, num_generations=8, steps_per_generation=4, max_completion_length=64, beta=0.04)
        make = partial(trl.GRPOTrainer, model, exact, settings, train_dataset=Dataset.from_list(prompts), processing_class=tokenizer)
    with contextlib.redirect_stderr(io.StringIO()):
        clock = time.perf_counter()
        trainer = make()  # includes the log-probabilities of the reference
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return time.perf_counter() - clock, [record["loss"] for record in trainer.state.log_history if "loss" in record]


def compare_trl(options) -> None:
    """Print the medians of alternating rounds."""
    for method in ("dpo", "grpo"):
        times: dict[str, list[float]] = {"ours": [], "TRL": []}
        for _ in range(options.rounds):
            seconds, losses, order = train_ours(method, options)
            times["ours"].append(seconds)
            seconds, their_losses = train_trl(method, options, order)
            times["TRL"].append(seconds)
        ours, theirs = (statistics.median(values) for values in times.values())
        difference = f"; losses differ by at most {max(abs(a - b) for a, b in zip(losses, their_losses, strict=True)):.1g}" if method == "dpo" else ""
        print(f"{method}, {STEPS} steps of 64 completions: RL.py {ours:.1f} s, TRL {theirs:.1f} s, {theirs / ours:.2f}x{difference}")


# ------------------------------------------------------------------------- losses and gradients compared with TRL

ROWS = 8  # pairs or completions per batch
OFFLINE = {  # name -> our settings, TRL's trainer, TRL's settings
    "dpo sigmoid": ({"method": "dpo", "rpo_alpha": 0.0}, "DPO", {"loss_type": ["sigmoid"]}),
    "dpo sigmoid, rpo_alpha 0.7": ({"method": "dpo", "rpo_alpha": 0.7}, "DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
    "dpo hinge": ({"method": "dpo", "loss_type": "hinge", "rpo_alpha": 0.0}, "DPO", {"loss_type": ["hinge"]}),
    "dpo ipo": ({"method": "dpo", "loss_type": "ipo", "rpo_alpha": 0.0}, "DPO", {"loss_type": ["ipo"]}),
    "dpo robust": ({"method": "dpo", "loss_type": "robust", "label_smoothing": 0.2, "rpo_alpha": 0.0}, "DPO", {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "dpo sigmoid_norm": ({"method": "dpo", "loss_type": "sigmoid_norm", "rpo_alpha": 0.0}, "DPO", {"loss_type": ["sigmoid_norm"]}),
    "kto": ({"method": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.8}, "KTO", {"desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "orpo": ({"method": "orpo"}, "ORPO", {}),
    "simpo": ({"method": "simpo", "rpo_alpha": 0.0}, "CPO", {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
    "simpo, rpo_alpha 1": ({"method": "simpo"}, "CPO", {"loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 1.0}),
    "reward": ({"method": "reward"}, "Reward", {"center_rewards_coefficient": 0.01}),
}
ON_POLICY = {  # name -> settings, mostly under TRL's names
    "grpo grpo": {"loss_type": "grpo"}, "grpo dapo": {"loss_type": "dapo"}, "grpo dr_grpo": {"loss_type": "dr_grpo"},
    "grpo dapo, epsilon_high 0.28": {"loss_type": "dapo", "epsilon_high": 0.28},
    "grpo cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "grpo sequence (GSPO)": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    "grpo dapo, importance sampling": {"loss_type": "dapo", "importance_sampling_clip_max": 1.2},
    "rloo": {"method": "rloo", "epsilon": 0.5},
}


def gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return float(loss), {name.replace("model.model.", "model."): weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def report(name: str, ours: tuple, theirs: tuple) -> None:
    (loss, ours), (their_loss, theirs) = ours, theirs
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the gradients belong to different weights: {sorted(ours.keys() ^ theirs.keys())[:6]}")
    difference = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    print(f"| {name} | {loss:.6f} | {abs(loss - their_loss):.1e} | {difference / largest:.1e} |", flush=True)


def padded(rows: list, left: bool = False, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of numbers -> (values, mask), both (B, T)."""
    side = "left" if left else "right"
    values = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side, padding_value=fill)
    return values, torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)


def trainer(kind: str, folder: Path, **settings):
    """A trainer of TRL with a placeholder dataset."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental import cpo, orpo

    module = {"ORPO": orpo, "CPO": cpo}.get(kind, trl)
    usual = dict(output_dir=str(folder / "trl"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, per_device_train_batch_size=ROWS)
    data = {"GRPO": {"prompt": "a"}, "RLOO": {"prompt": "a"}, "KTO": {"prompt": "a", "completion": "b", "label": True}}.get(kind, {"prompt": "a", "chosen": "b", "rejected": "c"})
    model = (AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if kind in ("GRPO", "RLOO") else {}
    made = getattr(module, f"{kind}Trainer")(model=model, args=getattr(module, f"{kind}Config")(**usual, **settings), train_dataset=Dataset.from_list([data] * ROWS),
                                             processing_class=AutoTokenizer.from_pretrained(folder), **more)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def their_inputs(kind: str, stream, batch: dict) -> dict:
    """A batch of a stream of pairs, in the format of TRL's collators."""
    pairs = [stream.pairs[i] for i in batch["rows"].tolist()]
    examples = [pair.examples[i] for i in range(stream.count) for pair in pairs]  # all chosen completions first
    if kind == "Reward":
        ids, mask = padded([example.ids[:-1] for example in examples], fill=stream.run.model.config.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask, "margin": batch["margin"]}

    def inputs(given: list, prefix: str = "") -> dict:
        ids, mask = padded([example.ids for example in given])
        return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": padded([example.weights for example in given])[0]}

    if kind == "DPO":
        return inputs(examples) | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), batch["reference"].unbind(1), strict=True))
    if kind == "KTO":
        others = [stream.sets["train mismatched"][i].examples[0] for i in batch["rows"].tolist()]
        return inputs(examples) | inputs(others, "KL_") | {"label": batch["label"], "ref_logps": batch["reference"][:, 0],
                                                           "ref_KL_logps": stream.reference["train mismatched"][batch["rows"], 0]}
    found = {}
    for i, name in enumerate(("chosen", "rejected")):
        columns = inputs([pair.examples[i] for pair in pairs], f"{name}_")
        mask = columns.pop(f"{name}_completion_mask").bool()
        if kind == "ORPO":  # TRL's likelihood loss includes the prompt; ours only the completion
            prompt = columns[f"{name}_input_ids"].masked_fill(mask | (columns[f"{name}_attention_mask"] == 0), -100)
            found["prompt labels"] = prompt if name == "chosen" else found["prompt labels"]
        found |= columns | {f"{name}_labels": columns[f"{name}_input_ids"].masked_fill(~mask, -100)}
    return found


def compare_offline(folder: Path, reference) -> None:
    config = MODEL.SimpleNamespace(training=TRAIN.TrainingSection(batch_size=ROWS, max_length=256))
    for name, (given, kind, settings) in OFFLINE.items():
        config.rl = RL.RLSection(**given).fill()
        model, tokenizer = MODEL.load(folder / "reward" if kind == "Reward" else folder, dtype="float32", device="cpu").train(), TOKENIZER.load(folder)
        form, left = TOKENIZER.Form(RL.preference, "rl"), TOKENIZER.LeftOut()
        found = [record for record, _ in zip(form.read(ROOT / "data/preferences.jsonl", left), range(ROWS), strict=False)]
        stream = RL.Pairs(RL.read_pairs(config, tokenizer, found, left)[:ROWS], [], config.rl, config.training, reference)
        stream.start(TRAIN.Run(model, config.training, model.device, "no"))
        batch = next(stream)
        assert kind != "KTO" or batch["baseline"] > 0  # a KL clamped to 0 would hide differences
        loss_fn = RL.reward_model_loss(config.rl) if kind == "Reward" else RL.preference_loss(config.rl)
        ours = gradients(model, loss_fn(model, batch, {**batch["counts"], "micro_batches": 1})[0])
        their = trainer(kind, folder / "reward" if kind == "Reward" else folder, **settings, **({"precompute_ref_log_probs": True} if kind in ("DPO", "KTO") else {}),
                        **({} if kind == "Reward" else {"beta": config.rl.beta}), **({"loss_type": "kto"} if kind == "KTO" else {}))
        inputs = their_inputs(kind, stream, batch)
        extra = inputs.pop("prompt labels", None)
        loss = their.compute_loss(their.model, inputs)
        if extra is not None:
            loss = loss - prompt_part(their.model, inputs, extra)
        report(name, ours, gradients(their.model, loss))


def prompt_part(model, inputs: dict, prompts: torch.Tensor) -> torch.Tensor:
    """The likelihood loss of TRL's ORPO, which includes the prompt, minus that of the completion alone."""
    logits = model(inputs["chosen_input_ids"], attention_mask=inputs["chosen_attention_mask"]).logits[:, :-1].flatten(0, 1)
    completions = inputs["chosen_labels"]
    both = torch.where(prompts != -100, prompts, completions)
    with_prompt, without = (torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()) for labels in (both, completions))
    return with_prompt - without


def compare_on_policy(folder: Path, policy, reference) -> None:
    draw, tokenizer = torch.Generator().manual_seed(0), TOKENIZER.load(folder)
    samples = []
    for i, record in enumerate(records("preferences.jsonl")[: ROWS]):
        ids = tokenizer(record["chosen"], add_special_tokens=False).input_ids[: 12 + 4 * i]
        samples.append(RL.Sample(RL.Prompt("", "", TOKENIZER.prompt_ids(tokenizer, record["prompt"]), {}), i, ids, "stop", "", None))
    batch = RL.sample_batch(samples)
    mask = batch["targets"] != -100

    def logps(model) -> torch.Tensor:
        with torch.no_grad():
            return model(batch["input_ids"], batch["positions"], targets=batch["targets"], temperature=0.9).logprobs

    now, counts = logps(policy), {"tokens": int(mask.sum()), "completions": ROWS, "micro_batches": 1}
    old = now + 0.3 * torch.randn(now.shape, generator=draw)  # ratios on both sides of the clip range
    sampled = old + 0.2 * torch.randn(now.shape, generator=draw)
    batch |= {"old": old * mask, "sampled": sampled * mask, "reference": logps(reference), "advantages": torch.randn(ROWS, generator=draw)}
    prompts, prompt_mask = padded([sample.ids[: sample.start] for sample in samples], left=True)
    completions, completion_mask = padded([sample.ids[sample.start :] for sample in samples])

    def theirs(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(completions.shape).masked_scatter(completion_mask.bool(), values[mask])

    inputs = {"prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": completions, "completion_mask": completion_mask, "advantages": batch["advantages"],
              "old_per_token_logps": theirs(old), "ref_per_token_logps": theirs(batch["reference"]), "old_logps": theirs(old).sum(1), "num_items_in_batch": mask.sum()}
    for name, given in ON_POLICY.items():
        settings = {"method": "grpo", "temperature": 0.9, "max_completion_length": 64, **given}
        filled, model = RL.RLSection(**settings).fill(), MODEL.load(folder, dtype="float32", device="cpu").train()
        ours = gradients(model, RL.rollout_loss(filled)(model, batch, counts)[0])
        largest, method = settings.pop("importance_sampling_clip_max", None), settings.pop("method")
        if method == "grpo":  # the KL of Shao 2024, eq. 4, without the probability ratio
            settings["use_bias_correction_kl"] = False
        their = trainer(method.upper(), folder, **settings, beta=filled.beta, num_generations=4, steps_per_generation=1)
        if largest:  # TRL computes these weights only for completions from vLLM
            their.use_vllm = their.vllm_importance_sampling_correction = True
            inputs["importance_sampling_ratio"] = (theirs(old) - theirs(sampled)).exp().clamp(max=largest)
        report(name, ours, gradients(their.model, their.compute_loss(their.model, inputs)))


def compare_losses(options) -> None:
    """Print each loss, its difference from TRL's, and the largest difference of gradients relative to the largest gradient. The
    computation uses float32 and a policy that differs from its reference."""
    folder, draw = Path(options.out) / "losses", torch.Generator().manual_seed(0)
    reference, policy = (MODEL.load(options.model, dtype="float32", device="cpu") for _ in range(2))
    scores, tokenizer = TOKENIZER.open_model(MODEL.ModelSection(name=options.model, dtype="float32", device="cpu"), head="score", labels=["reward"])
    scores.config.pad_token_id = SFT.pad_id(tokenizer)
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=draw)
        scores.score.weight.normal_(generator=draw)
    for model, path in ((policy, folder), (scores, folder / "reward")):
        TOKENIZER.save(tokenizer, path)
        MODEL.save(model, path)
    print("| loss | value | difference of the loss | relative difference of the gradient |\n|---|---|---|---|")
    with contextlib.redirect_stderr(io.StringIO()):
        compare_offline(folder, reference)
        compare_on_policy(folder, policy, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("gains", "rollouts", "time", "losses", "trl"), default="gains")
    parser.add_argument("--method", choices=(*RUNS, "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--model", help="initial model instead of one trained for each seed; timings use out/sft")
    parser.add_argument("--out", default=str(ROOT / "out/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--loud", action="store_true", help="show the logs of the programs")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="flags for RL.py, up to the end of the line")
    options = parser.parse_args()
    options.rows = Path(options.out) / "rl.jsonl"
    if options.what != "gains":
        options.model = options.model or str(ROOT / "out/sft")
        return {"rollouts": time_rollouts, "time": time_step, "losses": compare_losses, "trl": compare_trl}[options.what](options)
    methods = [name for name in RUNS if options.method in (name, "all") and not (name == "sft" and options.model)]
    for seed, precision, method in itertools.product(options.seeds, options.precisions, [] if options.table else methods):
        if (method, seed, precision) not in {(row["method"], row["seed"], row["precision"]) for row in rows(options.rows)}:
            save(run(method, seed, precision, options), options.rows)
    print(table(rows(options.rows)))


if __name__ == "__main__":
    main()
